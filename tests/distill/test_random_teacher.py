"""Random teachers: starts, head and losses against recorded numbers and closed forms, training, probes, pruning."""

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
from retouch.core.teachers import Teacher
from retouch.distill.random_teacher import (
    Projected,
    ProjectionHead,
    RandomTeacher,
    RandomTeacherPretraining,
    interpolate_init,
    iterative_magnitude_prune,
    knn_probe,
    linear_probe,
    neighborhood_init,
    random_teacher_loss,
)

DRAW = torch.Generator().manual_seed(0)
S, T = (torch.randn(7, 5, generator=DRAW, dtype=torch.float64) for _ in range(2))
HEAD = {"hidden_dims": (32,), "bottleneck_dim": 8, "out_dim": 64}


def made(build, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


class ConvNet(nn.Module):
    """A small encoder with BatchNorm: (n, 1, 8, 8) to (n, 12)."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(1, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.Linear(96, 12)

    def forward(self, images):
        return self.out(self.norm(self.conv(images)).relu().flatten(1))


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.GELU(), nn.Linear(24, 12))


def same(one, two):
    a, b = one.state_dict(), two.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- recorded numbers -----------------------------------------------------------------------------------------------


def test_golden(golden):
    case, logits = golden("random_teacher"), {}
    for who in ("teacher", "student"):
        head = made(lambda: ProjectionHead(6, (10, 10), 4, 12, weight_norm=False)).double()
        layers = {"mlp0": head.mlp[0], "mlp1": head.mlp[1], "bottleneck": head.bottleneck, "last": head.last}
        for name, layer in layers.items():
            for part, value in layer.named_parameters():
                value.data = torch.tensor(getattr(case, f"param_{who}_{name}_{part}"))
        logits[who] = head(torch.tensor(case.in_embeddings))
        case.close(f"out_{who}_logits", logits[who])
    for t, s in ((1.0, 1.0), (0.04, 0.1)):
        for loss in ("ce", "kl"):
            temperatures = {"teacher_temperature": t, "student_temperature": s}
            value = random_teacher_loss(logits["student"], logits["teacher"], loss=loss, **temperatures)
            case.close(f"out_{loss}_t{t}_s{s}", value)
    case.close("out_mse", random_teacher_loss(logits["student"], logits["teacher"], loss="mse"))
    teacher, random = torch.tensor(case.in_teacher_w), torch.tensor(case.in_random_w)
    for name, keep in (("var", True), ("raw", False)):
        mixed = interpolate_init(teacher, random, alpha=float(case.param_alpha), variance_preserving=keep)
        case.close(f"out_init_interpolated_{name}", mixed)
    case.close("out_init_neighborhood_var", neighborhood_init(teacher, random, eps=float(case.param_eps)))
    case.close("out_init_teacher_raw", interpolate_init(teacher, random))


# --- starts ---------------------------------------------------------------------------------------------------------


def test_the_ends_are_the_two_draws():
    assert torch.equal(interpolate_init(S, T), S)
    assert torch.equal(interpolate_init(S, T, alpha=1.0), T)
    assert torch.equal(interpolate_init(S, torch.full_like(S, torch.inf)), S)
    assert torch.equal(neighborhood_init(S, T, eps=0.0), S)
    assert interpolate_init(S, T) is not S
    torch.testing.assert_close(neighborhood_init(S, T, eps=1e9), T)


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_mix_of_unit_variances_has_unit_variance(alpha):
    one, two = torch.randn(2, 100_000, generator=DRAW)
    assert float(interpolate_init(one, two, alpha=alpha).var()) == pytest.approx(1, abs=0.03)
    assert float(neighborhood_init(one, two, eps=alpha).var()) == pytest.approx(1, abs=0.03)
    raw = interpolate_init(one, two, alpha=alpha, variance_preserving=False)
    assert float(raw.var()) == pytest.approx(alpha**2 + (1 - alpha) ** 2, abs=0.03)


def test_every_parameter_of_a_module_is_mixed_and_buffers_are_the_teachers():
    teacher, random = made(ConvNet, 0), made(ConvNet, 1)
    teacher.norm.running_mean += 1
    with torch.no_grad():
        random.norm.weight += 2
    before = copy.deepcopy(teacher), copy.deepcopy(random)
    mixed = interpolate_init(teacher, random, alpha=0.3)
    for (name, p), t, r in zip(mixed.named_parameters(), teacher.parameters(), random.parameters(), strict=True):
        torch.testing.assert_close(p, (0.7 * t + 0.3 * r) / (0.7**2 + 0.3**2) ** 0.5, msg=name)
    assert torch.equal(mixed.norm.running_mean, teacher.norm.running_mean)
    assert same(interpolate_init(teacher, random), teacher)
    assert same(teacher, before[0])
    assert same(random, before[1])


def test_a_start_from_a_frozen_teacher_can_be_trained():
    mixed = interpolate_init(Teacher(made(mlp)).model, made(mlp, 1))
    assert all(p.requires_grad for p in mixed.parameters())
    assert mixed.training


def test_unusual_starts_warn_or_are_refused():
    with pytest.warns(UserWarning, match=r"alpha is 1\.5, but between the two draws only from 0 to 1"):
        interpolate_init(S, T, alpha=1.5)
    with pytest.raises(InputError, match="eps is -1, but must be at least 0"):
        neighborhood_init(S, T, eps=-1)
    with pytest.raises(InputError, match=r"teacher has shape \(7, 5\) and random \(6, 5\)"):
        interpolate_init(S, T[:6], alpha=0.5)
    with pytest.raises(InputError, match="parameters under other names than the teacher's"):
        interpolate_init(made(mlp), made(ConvNet))
    wide = nn.Sequential(nn.Flatten(), nn.Linear(64, 25), nn.GELU(), nn.Linear(25, 12))
    with pytest.raises(InputError, match=r"teacher has shape \(24, 64\) and random \(25, 64\)"):
        interpolate_init(made(mlp), wide)


# --- loss and head --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("t", "s"), [(1.0, 1.0), (0.5, 2.0)])
def test_cross_entropy_is_kl_and_the_teachers_entropy(t, s):
    student, found = S.clone().requires_grad_(), {}
    for loss in ("ce", "kl"):
        value = random_teacher_loss(student, T, teacher_temperature=t, student_temperature=s, loss=loss)
        found[loss] = value, torch.autograd.grad(value, student)[0]
    entropy = torch.special.entr((T / t).softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(found["ce"][0] - found["kl"][0], entropy)
    torch.testing.assert_close(found["ce"][1], found["kl"][1])


def test_mse_is_the_mean_over_samples_and_outputs():
    torch.testing.assert_close(random_teacher_loss(S, T, loss="mse"), (S - T).square().sum() / 35)
    cold = random_teacher_loss(S, T, loss="mse", teacher_temperature=2.0, student_temperature=0.5)
    torch.testing.assert_close(cold, (S / 0.5 - T / 2).square().mean())


def test_the_teacher_gets_no_gradient():
    student, teacher = S.clone().requires_grad_(), T.clone().requires_grad_()
    random_teacher_loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


def test_an_equal_student_without_batchnorm_is_at_the_minimum():
    teacher = made(lambda: Projected(mlp(), ProjectionHead(12, **HEAD))).eval().double()
    student = interpolate_init(teacher, teacher).eval()
    images = torch.rand(16, 1, 8, 8, generator=DRAW, dtype=torch.float64)
    kl = random_teacher_loss(student(images), teacher(images), loss="kl")
    assert abs(float(kl.detach())) < 1e-7
    kl.backward()
    assert sum(float(p.grad.square().sum()) for p in student.parameters()) ** 0.5 < 1e-6


def test_with_batchnorm_an_equal_student_in_train_mode_is_not():
    teacher = made(lambda: Projected(ConvNet(), ProjectionHead(12, **HEAD)))
    student = copy.deepcopy(teacher).train()
    images = torch.rand(16, 1, 8, 8, generator=DRAW)
    assert RandomTeacher(teacher, loss="kl")(student, (images,))["imitation"] > 1e-6


def test_cosines_with_normalised_weights():
    head = made(lambda: ProjectionHead(12, (16, 16), 8, 300))
    with torch.no_grad():
        head.last.weight *= 100
    out = head(10 * torch.randn(50, 12, generator=DRAW))
    assert float(out.detach().abs().max()) <= 1 + 1e-6
    raw = made(lambda: ProjectionHead(12, (16, 16), 8, 300, weight_norm=False))
    raw.load_state_dict(head.state_dict())
    rows = head.last.weight.norm(dim=1)
    x = torch.randn(5, 12, generator=DRAW)
    torch.testing.assert_close(raw(x), head(x) * rows)


def test_the_heads_start_and_parts():
    head = made(lambda: ProjectionHead(64))
    assert [tuple(p.shape) for p in head.parameters()] == [
        (2048, 64), (2048,), (2048, 2048), (2048,), (256, 2048), (256,), (65536, 256),
    ]  # fmt: skip
    assert float(head.mlp[1].weight.detach().std()) == pytest.approx(0.02, rel=0.02)
    assert not head.mlp[0].bias.any()
    linear = made(lambda: ProjectionHead(12, (), None, 20, weight_norm=False))
    x = torch.randn(3, 12, generator=DRAW)
    torch.testing.assert_close(linear(x), x @ linear.last.weight.T)  # the head of the authors' regression
    assert made(lambda: ProjectionHead(12, (16,), 8, 20, act="relu")).act is F.relu
    twin = copy.deepcopy(head)  # no hooks of weight norm in the way
    assert torch.equal(twin(torch.ones(1, 64)), head(torch.ones(1, 64)))


BAD = {
    "teacher's temperature": (
        lambda: random_teacher_loss(S, T, teacher_temperature=0),
        "teacher_temperature is 0, but must be greater than 0",
    ),
    "student's temperature": (
        lambda: random_teacher_loss(S, T, student_temperature=-1.0),
        r"student_temperature is -1\.0, but must be greater",
    ),
    "loss": (lambda: random_teacher_loss(S, T, loss="l1"), "loss is 'l1', but must be one of 'ce', 'kl', 'mse'"),
    "outputs": (lambda: random_teacher_loss(S, T[:, :4]), "The student tells 5 classes apart and the teacher 4"),
    "act": (lambda: ProjectionHead(4, act="tanh"), "act is 'tanh', but must be one of"),
    "lr": (lambda: RandomTeacherPretraining(mlp, lr=0), "lr is 0, but must be greater than 0"),
    "epochs": (lambda: RandomTeacherPretraining(mlp, epochs=0), "epochs is 0, but must be greater than 0"),
    "embedding": (
        lambda: RandomTeacherPretraining(lambda: nn.Conv2d(1, 3, 3), HEAD).fit([torch.zeros(2, 1, 8, 8)]),
        r"The encoder gives \(1, 3, 6, 6\), but must give one embedding a sample",
    ),
    "no data": (lambda: RandomTeacherPretraining(mlp, HEAD).fit([]), "loader gave no batch"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_refused(kind):
    call, message = BAD[kind]
    with pytest.raises(InputError, match=message):
        call()


# --- training -------------------------------------------------------------------------------------------------------


def plan(encoder=ConvNet, **settings):
    return RandomTeacherPretraining(encoder, HEAD, **{"epochs": 2, "batch_size": 80, **settings})


def test_the_teacher_stays_and_the_student_moves(digits_small, global_rng_untouched):
    images = digits_small.train.inputs
    start, _ = plan(seed=3).start(images)
    student, teacher = plan(seed=3).fit(TensorData(images))
    assert same(start.encoder, teacher)  # alpha 0, buffers of BatchNorm included
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert not torch.equal(student.conv.weight, teacher.conv.weight)
    assert not torch.equal(student.norm.running_mean, teacher.norm.running_mean)
    assert not student.training
    assert same(plan(seed=3).fit(TensorData(images))[0], student)
    assert not same(plan(seed=4).fit(TensorData(images))[0], student)


def test_labels_are_never_looked_at(digits_small):
    images, labels = digits_small.train.inputs, digits_small.train.targets
    shuffled = labels[torch.randperm(len(labels), generator=DRAW)]
    told = [TensorData(images, labels), TensorData(images, shuffled), TensorData(images), images]
    loaders = [
        DataLoader(TensorData(images, labels), 80, shuffle=True),
        DataLoader(TensorData(images), 80, shuffle=True),
    ]
    students = [plan(epochs=1).fit(data)[0] for data in (*told, *loaders)]
    assert all(same(students[0], student) for student in students[1:])
    batches = [images[:80], images[80:160]]  # bare tensors
    assert isinstance(plan(epochs=1).fit(batches)[0], ConvNet)


def test_starts_follow_alpha():
    images = torch.rand(4, 1, 8, 8, generator=DRAW)
    student, teacher = plan(seed=1, alpha=1.0).start(images)
    near, again = plan(seed=1, alpha=0.1).start(images)
    assert same(teacher, again)

    def gap(model):
        return float((model.encoder.conv.weight - teacher.encoder.conv.weight).norm().detach())

    assert 0 < gap(near) < gap(student)
    assert not torch.equal(
        student.head.last.weight, teacher.head.last.weight
    )  # the head starts off as the encoder does


def test_a_run_that_was_killed_ends_alike(digits_small, tmp_path):
    data = TensorData(digits_small.train.inputs)
    whole, _ = plan(epochs=2).fit(data)
    student, teacher = plan().start(data.inputs)
    objective = RandomTeacher(teacher)
    settings = {"batch_size": 80, "optimizer": plan().optimizer, "checkpoint": Checkpoint(tmp_path, every=1)}

    def broken(model, batch, run):
        if run.step == 4:
            raise KeyboardInterrupt
        return objective(model, batch, run)

    with pytest.raises(KeyboardInterrupt):
        fit(student, data, broken, epochs=2, **settings)
    student, _ = plan().start(data.inputs)
    fit(student, data, objective, epochs=2, **settings)
    assert same(student.encoder, whole)


def test_real_encoders(tiny_vit, digits_small):
    from transformers import ResNetConfig, ResNetModel

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            shape = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic"}
            self.body = ResNetModel(ResNetConfig(num_channels=1, **shape))

        def forward(self, images):
            return self.body(images).pooler_output.flatten(1)

    class ClassToken(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = copy.deepcopy(tiny_vit.vit)

        def forward(self, images):
            return self.body(images).last_hidden_state[:, 0]

    for encoder in (Pooled, ClassToken):
        student, teacher = plan(encoder, epochs=1, loss="mse", alpha=0.1).fit(TensorData(digits_small.train.inputs))
        assert not same(student, teacher)
        assert 0 <= knn_probe(student, digits_small.train, digits_small.test, k=5) <= 1
    with pytest.raises(InputError, match="The encoder gives .*Output.*, but must give one embedding"):
        plan(lambda: copy.deepcopy(tiny_vit.vit)).fit(TensorData(digits_small.train.inputs))


# --- probes ---------------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """Every dimension of an embedding shifted and scaled."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        scale, shift = torch.rand(2, 64, generator=torch.Generator().manual_seed(1))
        self.register_buffer("scale", 10 * scale + 0.1)
        self.register_buffer("shift", shift)

    def forward(self, images):
        return self.encoder(images) * self.scale + self.shift


def test_probes_of_pixels_and_their_invariance(digits_small, global_rng_untouched):
    pixels, train, test = nn.Flatten(), digits_small.train, digits_small.test
    plain = linear_probe(pixels, train, test, lr=1e-2)
    assert plain > 0.8
    assert linear_probe(Scaled(pixels), train, test, lr=1e-2) == pytest.approx(plain, abs=1e-2)
    assert linear_probe(pixels, train, test, lr=1e-2) == plain
    assert linear_probe(Scaled(pixels), train, test, standardize=False) != plain
    near = knn_probe(pixels, train, test)
    assert near > 0.75
    assert knn_probe(Scaled(pixels), train, test) == pytest.approx(near, abs=1e-2)
    assert knn_probe(pixels, train, train, k=1) == 1
    with pytest.raises(InputError, match="k is 0, but must be at least 1 and at most 240"):
        knn_probe(pixels, train, test, k=0)


# --- lottery tickets ------------------------------------------------------------------------------------------------


def test_pruning_rewinds_and_follows_its_schedule(digits_small):
    model, seen = made(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))), []
    before = copy.deepcopy(model)

    def train(candidate):
        start = {name: p.detach().clone() for name, p in candidate.named_parameters()}
        sgd = torch.optim.SGD(candidate.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        history = fit(candidate, digits_small.train, steps=5, optimizer=sgd)
        seen.append((start, copy.deepcopy(candidate)))
        return history["loss"][-1]

    records = iterative_magnitude_prune(model, train, ratio=0.25, rounds=4)
    assert same(model, before)
    assert [record.round for record in records] == [0, 1, 2, 3]
    assert [record.amount for record in records] == pytest.approx([1 - 0.75**r for r in range(4)])
    for record, (start, trained) in zip(records, seen, strict=True):
        kept = sum(int(keep.sum()) for keep in record.mask.values())
        assert kept == int((1 - record.amount) * 592)
        for name, keep in record.mask.items():
            assert torch.equal(start[name], before.state_dict()[name] * keep)  # rewound
            assert not trained.state_dict()[name][~keep].any()  # held at zero through momentum and decay
            assert trained.state_dict()[name][keep].any()
        assert isinstance(record.score, float)
        assert "1.bias" not in record.mask
    for one, two in itertools.pairwise(records):
        assert all((one.mask[name] | ~two.mask[name]).all() for name in one.mask)  # what is gone stays gone
    trained = seen[0][1].state_dict()
    gone = torch.cat([trained[n][~records[1].mask[n]].abs() for n in records[1].mask])
    kept = torch.cat([trained[n][records[1].mask[n]].abs() for n in records[1].mask])
    assert gone.max() <= kept.min()  # one ranking over all layers


def test_pruning_leaves_no_hook_behind():
    from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

    def fails(candidate):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        iterative_magnitude_prune(made(mlp), fails, rounds=1)
    assert not _global_optimizer_post_hooks
    assert not _global_optimizer_pre_hooks
    with pytest.raises(InputError, match="ratio is 0, but must be greater than 0 and less than 1"):
        iterative_magnitude_prune(made(mlp), fails, ratio=0)
