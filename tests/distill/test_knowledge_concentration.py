"""Knowledge concentration: targets, loss, wiring of the head and pace in closed form, and training from specialists."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from retouch.core.data import TensorData
from retouch.core.errors import InputError
from retouch.core.loop import Checkpoint, fit
from retouch.distill.knowledge_concentration import (
    KnowledgeConcentration,
    PacedScale,
    SCHead,
    concentrate_targets,
    concentration_loss,
    vertical_ids,
    vertical_of_class,
)

DRAW = torch.Generator().manual_seed(0)
GROUPS = [torch.tensor([4, 0, 2]), torch.tensor([1, 3]), torch.tensor([8, 5, 6, 7])]  # 9 classes, out of order
X = torch.randn(6, 9, generator=DRAW, dtype=torch.float64) * 2
IMAGES = torch.rand(12, 1, 8, 8, generator=DRAW)
IDS = torch.tensor([0, 1, 2, 2, 1, 0, 0, 2, 1, 1, 2, 0])


def made(build, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


def net(classes, seed=0):
    return made(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, classes)), seed)


def student(seed=0, scale=True):
    head = made(lambda: SCHead(16, GROUPS, 8, 5), seed)
    body = made(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU()), seed)
    return nn.Sequential(*body, head, *([PacedScale(GROUPS)] if scale else []))


def specialists():
    return {number: net(len(group), 10 + number) for number, group in enumerate(GROUPS)}


# --- targets and loss -----------------------------------------------------------------------------------------------


def test_targets_are_the_top_scores_in_their_vertical():
    logits, group = X[:, :4], GROUPS[2]
    targets = concentrate_targets(logits, group, num_classes=9, top_k=2)
    assert targets.shape == (6, 9)
    assert ((targets > 0).sum(1) == 2).all()
    outside = [c for c in range(9) if c not in group.tolist()]
    assert not targets[:, outside].any()
    inside = targets[:, group]
    assert torch.equal(inside > 0, logits >= logits.sort(1).values[:, 2:3])
    torch.testing.assert_close(inside[inside > 0], logits.sigmoid()[inside > 0])


@pytest.mark.parametrize("top_k", [4, 100, None])
def test_large_k_keeps_the_vertical(top_k):
    targets = concentrate_targets(X[:, :4], GROUPS[2], num_classes=9, top_k=top_k)
    torch.testing.assert_close(targets[:, GROUPS[2]], X[:, :4].sigmoid())


def test_the_loss_is_a_sum_over_classes_and_a_mean_over_samples():
    student = X.clone().requires_grad_()
    targets = torch.rand(6, 9, generator=DRAW, dtype=torch.float64)
    loss = concentration_loss(student, targets)
    y = student.sigmoid()
    by_hand = -(targets * y.log() + (1 - targets) * (1 - y).log()).sum() / 6
    torch.testing.assert_close(loss, by_hand)
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(student, targets, reduction="sum") / 6)
    torch.testing.assert_close(loss, 9 * F.binary_cross_entropy_with_logits(student, targets))  # not torch's default
    torch.testing.assert_close(torch.autograd.grad(loss, student)[0], (y - targets) / 6)


def test_hard_targets_give_the_specialists_loss():
    hard = F.one_hot(torch.arange(6), 9).double()
    expected = -(X.sigmoid().log() * hard + (-X).sigmoid().log() * (1 - hard)).sum(1).mean()
    torch.testing.assert_close(concentration_loss(X, hard), expected)


def test_teachers_get_no_gradient():
    teacher, ours = X[:, :3].clone().requires_grad_(), X.clone().requires_grad_()
    concentration_loss(ours, concentrate_targets(teacher, GROUPS[0], num_classes=9)).backward()
    assert teacher.grad is None
    assert ours.grad.abs().sum() > 0


# --- groups ---------------------------------------------------------------------------------------------------------


def test_verticals_of_classes_and_labels():
    assert vertical_of_class(GROUPS).tolist() == [0, 1, 0, 1, 0, 2, 2, 2, 2]
    assert vertical_ids(torch.tensor([0, 1, 8, 5]), GROUPS).tolist() == [0, 1, 2, 2]
    many = torch.zeros(3, 9)
    many[0, [0, 4]] = many[1, 3] = many[2, [5, 7, 8]] = 1  # with ancestors
    assert vertical_ids(many, GROUPS).tolist() == [0, 1, 2]


BAD = {
    "overlap": (lambda: SCHead(4, [torch.tensor([0, 1]), torch.tensor([1, 2])]), "class_groups overlap or leave out"),
    "gap": (lambda: PacedScale([torch.tensor([0, 1]), torch.tensor([3])]), "class_groups overlap or leave out"),
    "empty": (lambda: vertical_of_class([torch.tensor([0]), torch.tensor([])]), "class_groups has an empty group"),
    "none": (lambda: vertical_of_class([]), "class_groups has an empty group or none"),
    "top_k": (lambda: concentrate_targets(X[:, :3], GROUPS[0], num_classes=9, top_k=0), "top_k is 0, but must be at"),
    "top_k of all": (lambda: KnowledgeConcentration(student(), {}, GROUPS, 0), "top_k is 0, but must be at least 1"),
    "classes": (lambda: concentrate_targets(X, GROUPS[0], num_classes=9), "class_index has 3 classes and teacher_l"),
    "index": (lambda: concentrate_targets(X[:, :4], GROUPS[2], num_classes=8), "class_index goes to 8, but must be 0"),
    "shape": (lambda: concentration_loss(X, X[:, :4]), r"student_logits have shape \(6, 9\) and soft_targets \(6, 4\)"),
    "kind": (lambda: SCHead(4, GROUPS, kind="sc"), "kind is 'sc', but must be one of 'fc-fc', 'fc-sc', 'sc-sc'"),
    "shared": (lambda: SCHead(4, GROUPS, 4, 4, shared=5), "shared is 5, but must be at least 0 and at most 4"),
    "shared of dense": (lambda: SCHead(4, GROUPS, 4, 4, "fc-fc", 2), "shared is 2, but must be at least 0 and at most"),
    "activation": (lambda: SCHead(4, GROUPS, 4, 4, activation="rely"), "activation is 'rely', but must be"),
    "level": (lambda: PacedScale(GROUPS, "group"), "level is 'group', but must be one of 'vertical', 'class'"),
    "init": (lambda: PacedScale(GROUPS, init="one"), "init is 'one', but must be one of 'sqrt'"),
    "two verticals": (lambda: vertical_ids(torch.ones(2, 9), GROUPS), "labels of no vertical or of several"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_refused(kind):
    call, message = BAD[kind]
    with pytest.raises(InputError, match=message):
        call()


# --- head -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "shared"), [("fc-fc", 0), ("fc-sc", 0), ("sc-sc", 0), ("fc-sc", 2), ("fc-sc", 5)])
@pytest.mark.parametrize("sizes", [(7, 6, 5), (3, 11, 8)])
def test_weights_are_as_many_as_the_paper_counts(kind, shared, sizes):
    s_b, s1, s2 = sizes
    m, n, g = len(GROUPS), 9, shared
    expected = {
        ("fc-fc", 0): s_b * s1 + s1 * s2 + s2 * n,
        ("fc-sc", 0): s_b * s1 + s1 * s2 * m + s2 * n,
        ("sc-sc", 0): s_b * s1 * m + s1 * s2 * m + s2 * n,
    }.get((kind, shared), s_b * s1 + s1 * g + s1 * (s2 - g) * m + s2 * n)
    head = made(lambda: SCHead(s_b, GROUPS, s1, s2, kind, shared, bias=False))
    assert head.parameter_formula() == expected == sum(p.numel() for p in head.parameters())
    biased = made(lambda: SCHead(s_b, GROUPS, s1, s2, kind, shared))
    assert (
        biased.parameter_formula()
        == expected
        == sum(p.numel() for p in biased.parameters() if p.ndim > 1)
        - (sum(p.numel() for name, p in biased.named_parameters() if name.endswith("bias") and p.ndim > 1))
    )
    assert biased(torch.randn(4, s_b, generator=DRAW)).shape == (4, 9)


@pytest.mark.parametrize("kind", ["fc-sc", "sc-sc"])
def test_verticals_read_their_own_units_alone(kind):
    head = made(lambda: SCHead(7, GROUPS, 16, 5, kind))
    features = torch.randn(20, 7, generator=DRAW)
    for number, group in enumerate(GROUPS):
        head.zero_grad()
        head(features)[:, group].sum().backward()
        others = [v for v in range(len(GROUPS)) if v != number]
        assert not head.second.weight.grad[others].any()
        assert head.second.weight.grad[number].any()
        outside = [c for c in range(9) if c not in group.tolist()]
        assert not head.classes.weight.grad[outside].any()
        first = head.first.weight.grad
        assert first.any()
        assert kind == "fc-sc" or not first[others].any()


def test_the_head_by_hand():
    head = made(lambda: SCHead(7, GROUPS, 6, 5, shared=2))
    x = torch.randn(4, 7, generator=DRAW)
    hidden, expected = F.relu(head.first(x)), torch.empty(4, 9)
    for number, group in enumerate(GROUPS):
        private = hidden @ head.second.weight[number].T + head.second.bias[number]
        units = F.relu(torch.cat([head.second_shared(hidden), private], 1))
        expected[:, group] = units @ head.classes.weight[group].T + head.classes.bias[group]
    torch.testing.assert_close(head(x), expected)
    grouped = made(lambda: SCHead(7, GROUPS, 6, 5, "sc-sc"))
    for number, group in enumerate(GROUPS):
        one = F.relu(x @ grouped.first.weight[number].T + grouped.first.bias[number])
        two = F.relu(one @ grouped.second.weight[number].T + grouped.second.bias[number])
        expected[:, group] = two @ grouped.classes.weight[group].T + grouped.classes.bias[group]
    torch.testing.assert_close(grouped(x), expected)


def test_nothing_shared_is_private_and_all_shared_is_dense():
    x = torch.randn(4, 7, generator=DRAW)
    private, none = (made(lambda s=s: SCHead(7, GROUPS, 6, 5, **s)) for s in ({}, {"shared": 0}))
    assert torch.equal(private(x), none(x))
    shared, dense = made(lambda: SCHead(7, GROUPS, 6, 5, shared=5)), made(lambda: SCHead(7, GROUPS, 6, 5, "fc-fc"))
    assert shared.second is None
    dense.load_state_dict(shared.state_dict())
    torch.testing.assert_close(shared(x), dense(x))


def test_one_vertical_is_a_dense_head():
    whole = [torch.arange(9)]
    grouped, dense = made(lambda: SCHead(7, whole, 6, 5)), made(lambda: SCHead(7, whole, 6, 5, "fc-fc"))
    with torch.no_grad():
        for name in ("first", "classes"):
            getattr(dense, name).load_state_dict(getattr(grouped, name).state_dict())
        dense.second_shared.weight.copy_(grouped.second.weight[0])
        dense.second_shared.bias.copy_(grouped.second.bias[0])
    x = torch.randn(4, 7, generator=DRAW)
    torch.testing.assert_close(grouped(x), dense(x))


def test_a_negative_bias_of_classes_starts_with_a_small_loss():
    x, hard = torch.randn(50, 7, generator=DRAW), F.one_hot(torch.arange(50) % 9, 9).float()
    losses = [
        float(concentration_loss(made(lambda b=bias: SCHead(7, GROUPS, 6, 5, class_bias=b))(x), hard).detach())
        for bias in (0.0, -2.0)
    ]
    assert losses[0] == pytest.approx(0.69 * 9, rel=0.05)
    assert losses[1] < 0.7 * losses[0]


# --- pace -----------------------------------------------------------------------------------------------------------


def test_lengths_are_the_learned_ones_and_scales_of_logits_do_not_matter():
    pace = PacedScale(GROUPS).double()
    y = pace(X)
    for number, group in enumerate(GROUPS):
        lengths = y[:, group].norm(dim=1)
        torch.testing.assert_close(lengths, pace.gamma[number].abs().expand(6))
        scaled = X.clone()
        scaled[:, group] *= 37.0
        torch.testing.assert_close(pace(scaled), y)
    assert float(y.detach().square().mean().sqrt()) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("level", ["vertical", "class"])
def test_gradients_are_orthogonal_to_the_logits(level):
    pace, x = PacedScale(GROUPS, level).double(), X.clone().requires_grad_()
    targets = torch.rand(6, 9, generator=DRAW, dtype=torch.float64)
    concentration_loss(pace(x), targets).backward()
    for group in GROUPS:
        inner = (x.grad * X)[:, group].sum(1)
        torch.testing.assert_close(inner, torch.zeros_like(inner), rtol=0, atol=1e-12)
    assert pace.gamma.grad.shape == ((3,) if level == "vertical" else (9,))


def test_starts_of_the_pace():
    sizes = torch.tensor([3.0, 2.0, 4.0])
    near = PacedScale(GROUPS).gamma.detach()
    assert (near - sizes.sqrt()).abs().max() < 0.01
    assert not torch.equal(near, sizes.sqrt())
    assert not torch.equal(near, PacedScale(GROUPS, seed=1).gamma.detach())
    assert torch.equal(PacedScale(GROUPS, learn=False).gamma, sizes.sqrt())
    assert not list(PacedScale(GROUPS, learn=False).parameters())
    assert PacedScale(GROUPS, "class", 10.0, False).gamma.tolist() == [10.0] * 9
    each = PacedScale(GROUPS, "class", learn=False).gamma
    torch.testing.assert_close(each, sizes[vertical_of_class(GROUPS)].sqrt())


def test_zero_logits_stay_zero_with_finite_gradients():
    x = torch.zeros(2, 9, requires_grad=True)
    y = PacedScale(GROUPS)(x)
    assert not y.any()
    y.sum().backward()
    assert torch.isfinite(x.grad).all()


def test_a_vertical_of_one_class_has_only_its_sign():
    alone = PacedScale([torch.tensor([0]), torch.tensor([1, 2])], learn=False)
    y = alone(torch.tensor([[0.3, 1.0, 2.0], [-7.0, 1.0, 2.0]]))
    assert y[:, 0].tolist() == [1.0, -1.0]


# --- several teachers -----------------------------------------------------------------------------------------------


def test_each_specialist_is_asked_for_its_own_samples_alone(global_rng_untouched):
    teachers = specialists()
    objective = KnowledgeConcentration(student(), teachers, GROUPS, 2)
    asked = []
    for number, teacher in objective.specialists.items():
        teacher.register_forward_hook(lambda m, args, out, n=number: asked.append((n, len(args[0]))))
    targets = objective.targets(IMAGES, IDS)
    assert asked == [(0, 4), (1, 4), (2, 4)]
    for row in range(12):
        number = int(IDS[row])
        own = concentrate_targets(teachers[number](IMAGES[row : row + 1]), GROUPS[number], num_classes=9, top_k=2)
        torch.testing.assert_close(targets[row : row + 1], own)
    asked.clear()
    objective.targets(IMAGES[IDS == 1], IDS[IDS == 1])
    assert asked == [(1, 4)]
    expected = concentration_loss(objective.student(IMAGES), targets)
    torch.testing.assert_close(objective.loss(IMAGES, IDS), expected)
    torch.testing.assert_close(objective(objective.student, (IMAGES, IDS)), expected)


def test_one_teacher_of_all_classes_is_plain_sigmoid_distillation():
    teacher, ours = net(9, 1), made(lambda: nn.Sequential(nn.Flatten(), SCHead(64, [torch.arange(9)], 6, 5, "fc-fc")))
    objective = KnowledgeConcentration(ours, {0: teacher}, [torch.arange(9)], None)
    expected = concentration_loss(ours(IMAGES), teacher(IMAGES).sigmoid())
    torch.testing.assert_close(objective.loss(IMAGES, torch.zeros(12, dtype=torch.long)), expected)


def test_training_leaves_the_specialists_alone_and_asking_beforehand_equals_asking_at_every_step():
    teachers, trained = specialists(), []
    before = copy.deepcopy(teachers)
    many = torch.zeros(12, 9)
    for row, number in enumerate(IDS.tolist()):
        many[row, GROUPS[number][:2]] = 1
    for told in ("ids", "labels", "answers", "loader"):
        objective = KnowledgeConcentration(student(), teachers, GROUPS, 2)
        data = TensorData(IMAGES, many if told == "labels" else IDS)
        data = {"answers": objective.answered, "loader": lambda d: DataLoader(d, 6, shuffle=True)}.get(
            told, lambda d: d
        )(data)
        history = objective.fit(data, epochs=3, batch_size=6)
        assert history["loss"][-1] < history["loss"][0]
        trained.append(objective.student.state_dict())
    for other in trained[1:]:
        assert all(
            torch.allclose(trained[0][name], other[name], atol=1e-6) for name in other
        )  # other batches, rounding
    for number, teacher in teachers.items():
        assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), before[number].parameters(), strict=True))
        assert all(p.grad is None for p in teacher.parameters())
    assert "6.gamma" not in trained[0]
    assert any(name.endswith("gamma") for name in trained[0])


def test_real_classifiers(tiny_vit):
    from transformers import ResNetConfig, ResNetForImageClassification

    shape = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic"}
    config = ResNetConfig(num_channels=1, num_labels=4, **shape)
    teachers = {0: net(3), 1: net(2), 2: made(lambda: ResNetForImageClassification(config))}
    tiny_vit.classifier = made(lambda: nn.Sequential(SCHead(16, GROUPS, 8, 5), PacedScale(GROUPS)))
    objective = KnowledgeConcentration(tiny_vit, teachers, GROUPS)
    history = fit(tiny_vit, TensorData({"pixel_values": IMAGES}, IDS), KnowledgeConcentration(
        tiny_vit, {n: Named(t) for n, t in teachers.items()}, GROUPS), steps=2, batch_size=6)  # fmt: skip
    assert len(history) == 2
    assert list(history.records[0])[:4] == ["step", "epoch", "loss", "lr"]
    assert objective.loss(IMAGES, IDS) > 0


class Named(nn.Module):
    """Takes a mapping's entry, as models of transformers do."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        return self.model(pixel_values)


def test_a_killed_run_resumes(tmp_path):
    def run(folder, stop):
        objective = KnowledgeConcentration(student(), specialists(), GROUPS)

        def concentration(model, batch, run):
            if run.step == stop:
                raise KeyboardInterrupt
            return objective(model, batch, run)

        checkpoint = Checkpoint(folder, every=1)
        fit(objective.student, TensorData(IMAGES, IDS), concentration, steps=5, batch_size=6, checkpoint=checkpoint)
        return objective.student.state_dict()

    whole = run(tmp_path / "whole", None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", 3)
    resumed = run(tmp_path / "killed", None)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_missing_and_wrong_specialists_are_refused():
    teachers = specialists()
    del teachers[1]
    objective = KnowledgeConcentration(student(), teachers, GROUPS)
    with pytest.raises(InputError, match="The vertical id 1 has no specialist, but must be one of 0, 2"):
        objective.loss(IMAGES, IDS)
    with pytest.raises(InputError, match="The vertical id 7 has no specialist"):
        objective.loss(IMAGES, IDS.clamp(max=0) + 7)
    wrong = KnowledgeConcentration(student(), {**teachers, 1: net(5)}, GROUPS)
    with pytest.raises(InputError, match="The specialist 1 gives 5 logits, but must give one for each of its 2"):
        wrong.loss(IMAGES, IDS)
    with pytest.raises(InputError, match="The batch has no vertical ids, but needs them"):
        fit(objective.student, TensorData(IMAGES), objective, steps=1)
    with pytest.raises(InputError, match=r"student_logits have shape \(12, 5\) and soft_targets \(12, 9\)"):
        KnowledgeConcentration(net(5), specialists(), GROUPS).loss(IMAGES, IDS)


def test_larger_paces_pass_larger_gradients():
    x = torch.randn(6, 9, generator=DRAW, dtype=torch.float64)
    sizes = []
    for gamma in (1.0, 2.0):
        pace = PacedScale(GROUPS, init=gamma, learn=False).double()
        raw = x.clone().requires_grad_()
        concentration_loss(pace(raw), torch.full_like(raw, 0.5)).backward()
        sizes.append(float(raw.grad.norm()))
    assert all(a < b for a, b in itertools.pairwise(sizes))
