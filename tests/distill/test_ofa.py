"""OFA-KD: the loss in closed form, exits for maps and tokens, and students of real classes in the loop."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from retouch.core import seeds
from retouch.core.data import TensorData
from retouch.core.distillation import answered
from retouch.core.errors import InputError
from retouch.core.loop import Callback, Checkpoint, fit
from retouch.distill.ofa import (
    ConvExit,
    OFADistiller,
    PatchMerge,
    TokenExit,
    count_prefix,
    ofa_loss,
    recipe,
    stages_of,
)

DRAW = torch.Generator().manual_seed(0)
S, T = (torch.randn(7, 5, generator=DRAW, dtype=torch.float64) * 2 for _ in range(2))
Y = torch.tensor([0, 1, 2, 3, 4, 0, 1])
IMAGES = torch.rand(6, 1, 32, 32, generator=DRAW)
SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}


def made(build, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


def resnet(seed=0, layer_type="basic"):
    from transformers import ResNetConfig, ResNetForImageClassification

    widths = {"embedding_size": 8, "hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 1, 1], "layer_type": layer_type}
    config = ResNetConfig(num_channels=1, num_labels=10, downsample_in_first_stage=False, **widths)
    return made(lambda: ResNetForImageClassification(config), seed)


def vit(seed=0, size=32, patch=8):
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(image_size=size, patch_size=patch, num_channels=1, num_labels=10, **SMALL)
    return made(lambda: ViTForImageClassification(config), seed)


def swin(seed=0):
    from transformers import SwinConfig, SwinForImageClassification

    shape = {"embed_dim": 8, "depths": [1, 1, 1], "num_heads": [2, 2, 2], "window_size": 4, "drop_path_rate": 0.0}
    config = SwinConfig(image_size=32, patch_size=2, num_channels=1, num_labels=10, **shape)
    return made(lambda: SwinForImageClassification(config), seed)


class Mixer(nn.Module):
    """Patches of 8 by 8 mixed over the grid and over channels."""

    def __init__(self, width=12):
        super().__init__()
        self.patches = nn.Conv2d(1, width, 8, 8)
        self.across = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])
        self.along = nn.ModuleList([nn.Linear(width, width) for _ in range(3)])
        self.head = nn.Linear(width, 10)

    def forward(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2)
        for across, along in zip(self.across, self.along, strict=True):
            x = x + along(F.gelu(across(x.transpose(1, 2)).transpose(1, 2)))
        return self.head(x.mean(1))


RESNET = {f"resnet.encoder.stages.{i}": i + 1 for i in range(4)}


# --- the loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_gamma_one_is_soft_cross_entropy(temperature):
    student = S.clone().requires_grad_()
    p, q = (T / temperature).softmax(-1), (student / temperature).log_softmax(-1)
    loss = ofa_loss(student, T, Y, gamma=1.0, temperature=temperature)
    torch.testing.assert_close(loss, -(p * q).sum(-1).mean())
    entropy = torch.special.entr(p).sum(-1).mean()
    torch.testing.assert_close(loss, F.kl_div(q, p, reduction="batchmean") + entropy)
    torch.testing.assert_close(torch.autograd.grad(loss, student)[0], (q.exp() - p) / (temperature * len(S)))


def weights(teacher, gamma):
    """The weights of the loss, from the gradient of -sum w log q by the log probabilities: here by linearity."""
    found = []
    for c in range(5):
        # With log q_c = -1 at one class and 0 elsewhere the loss is w_c; log_softmax cannot give that, so solve for it:
        # student logits (0, ..., x at c, ..., 0) give log q_c = x - Z and log q_other = -Z.
        x = 3.0
        student = torch.zeros(len(teacher), 5, dtype=torch.float64)
        student[:, c] = x
        found.append(ofa_loss(student, teacher, Y, gamma=gamma, reduction="none"))
    norm = math.log(math.exp(3.0) + 4)
    losses = torch.stack(found, 1)  # loss_c = Z sum(w) - x w_c
    total = losses.sum(1, keepdim=True) / (5 * norm - 3.0)
    return (norm * total - losses) / 3.0


@pytest.mark.parametrize("gamma", [1.0, 1.25, 1.5, 2.0])
def test_weights_in_closed_form(gamma):
    p, mask = T.softmax(-1), F.one_hot(Y, 5).double()
    found = weights(T, gamma)
    torch.testing.assert_close(found, torch.where(mask == 1, (1 + p) ** gamma - 1, p**gamma), rtol=1e-7, atol=1e-10)
    assert (found > -1e-12).all()
    target = found[mask == 1]
    order = p[mask == 1].argsort()
    assert (target[order].diff() >= 0).all()  # the surer the teacher, the more the target counts


def test_other_classes_count_less_the_larger_gamma():
    mask = F.one_hot(Y, 5) == 1
    found = [weights(T, gamma)[~mask] for gamma in (1.0, 1.25, 1.5, 2.0)]
    assert all((b <= a + 1e-12).all() for a, b in itertools.pairwise(found))


def test_a_sure_and_right_teacher_gives_scaled_cross_entropy():
    for gamma in (1.0, 1.5, 2.0):
        expected = (2**gamma - 1) * F.cross_entropy(S, Y)
        torch.testing.assert_close(ofa_loss(S, 1000.0 * F.one_hot(Y, 5), Y, gamma=gamma), expected)


def test_the_mask_is_the_labels_not_the_teachers():
    teacher = torch.tensor([[8.0, 0.0, 0.0]], dtype=torch.float64)
    student = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    p, q = teacher.softmax(-1)[0], student.log_softmax(-1)[0]
    expected = -(p[0] ** 2 * q[0] + ((1 + p[1]) ** 2 - 1) * q[1] + p[2] ** 2 * q[2])
    torch.testing.assert_close(ofa_loss(student, teacher, torch.tensor([1]), gamma=2.0), expected)


def test_the_teacher_gets_no_gradient_and_soft_labels_count_by_their_largest():
    student, teacher = S.clone().requires_grad_(), T.clone().requires_grad_()
    soft = (5 * F.one_hot(Y, 5).double()).softmax(-1)
    loss = ofa_loss(student, teacher, soft)
    loss.backward()
    assert teacher.grad is None
    assert torch.equal(loss, ofa_loss(student, teacher, Y))


def test_none_keeps_the_samples_and_peaked_students_do_not_underflow():
    each = ofa_loss(S, T, Y, reduction="none")
    assert each.shape == (7,)
    torch.testing.assert_close(each.mean(), ofa_loss(S, T, Y))
    peaked = torch.tensor([[2000.0, 0.0, 0.0]], requires_grad=True)
    loss = ofa_loss(peaked, torch.zeros(1, 3), torch.tensor([1]))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(peaked.grad).all()
    half = ofa_loss(S.half(), T.half(), Y)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, ofa_loss(S.float(), T.float(), Y), rtol=1e-2, atol=1e-3)


BAD = {
    "gamma": (lambda: ofa_loss(S, T, Y, gamma=0.0), r"gamma is 0\.0, but must be greater than 0"),
    "temperature": (lambda: ofa_loss(S, T, Y, temperature=0), "temperature is 0, but must be greater than 0"),
    "reduction": (lambda: ofa_loss(S, T, Y, reduction="sum"), "reduction is 'sum', but must be one of"),
    "classes": (lambda: ofa_loss(S, T[:, :4], Y), "The student tells 5 classes apart and the teacher 4"),
    "labels": (lambda: ofa_loss(S, T, Y[:3]), r"labels have shape \(3,\) and the logits \(7, 5\)"),
    "odd": (lambda: PatchMerge((4, 3), 2, 2), r"grid is \(4, 3\), but must be even"),
    "tokens": (lambda: PatchMerge(4, 2, 2)(torch.zeros(1, 9, 2)), "There are 9 tokens, but the grid is 4 by 4"),
    "square": (lambda: TokenExit(12, 8, 1, 4, 8, 10), "num_patches is 12, but must be a square number"),
    "odd grid": (lambda: TokenExit(15 * 15, 8, 1, 4, 8, 10), "grid is 15, but must be even"),
    "stage": (lambda: ConvExit((4, 8, 8), 5, 4, 8, 10), "stage is 5, but must be at least 1 and at most 4"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_refused(kind):
    call, message = BAD[kind]
    with pytest.raises(InputError, match=message):
        call()


def test_gamma_below_one_warns():
    with pytest.warns(UserWarning, match=r"gamma is 0\.5, but below 1 it weakens the target"):
        ofa_loss(S, T, Y, gamma=0.5)


# --- exits ----------------------------------------------------------------------------------------------------------


def test_merged_neighbours_stand_in_the_papers_order():
    """Four tokens, numbered by row: the left ones above each other come first."""
    merge = PatchMerge(2, 1, 4)
    merge.norm = nn.Identity()
    with torch.no_grad():
        merge.reduction.weight.copy_(torch.eye(4))
    tokens = torch.tensor([0.0, 1.0, 2.0, 3.0]).view(1, 4, 1)  # (0, 0), (0, 1), (1, 0), (1, 1)
    assert merge(tokens).flatten().tolist() == [0.0, 2.0, 1.0, 3.0]
    wide = PatchMerge((2, 4), 1, 4)
    wide.norm, wide.reduction = nn.Identity(), nn.Identity()
    assert wide(torch.arange(8.0).view(1, 8, 1))[0].tolist() == [[0, 4, 1, 5], [2, 6, 3, 7]]


def test_merging_is_norm_projection_activation():
    merge = made(lambda: PatchMerge(4, 3, 5, nn.GELU))
    tokens = torch.randn(2, 16, 3, generator=DRAW)
    grid = tokens.view(2, 4, 4, 3)
    parts = [grid[:, r::2, c::2] for r, c in ((0, 0), (1, 0), (0, 1), (1, 1))]
    expected = F.gelu(merge.reduction(merge.norm(torch.cat(parts, -1).view(2, 4, 12))))
    torch.testing.assert_close(merge(tokens), expected)
    assert merge.reduction.bias is None


@pytest.mark.parametrize(("grid", "merges"), [(2, 0), (7, 0), (13, 0), (14, 1), (28, 2)])
def test_grids_are_merged_down_to_seven(grid, merges):
    exit_ = made(lambda: TokenExit(grid * grid, 8, 2, 4, 12, 10, num_prefix_tokens=1))
    assert len(exit_.merges) == merges
    assert len(exit_.blocks) == 2
    kinds = [type(merge.act) for merge in exit_.merges]
    assert kinds == [nn.GELU] * (merges - 1) + [nn.Identity] * min(merges, 1)
    assert exit_(torch.randn(3, 1 + grid * grid, 8, generator=DRAW)).shape == (3, 10)


def test_the_class_token_answers_or_the_mean_of_all():
    exit_ = made(lambda: TokenExit(4, 8, 4, 4, 8, 10, num_prefix_tokens=1))
    exit_.blocks = nn.Identity()
    tokens = torch.randn(2, 5, 8, generator=DRAW)
    torch.testing.assert_close(exit_(tokens), exit_.classifier(tokens[:, 0]))
    exit_.prefix = 0
    torch.testing.assert_close(exit_(tokens), exit_.classifier(tokens.mean(1)))


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_every_stage_of_either_layout_gives_logits(stage):
    maps = made(lambda: ConvExit((4 << stage, 32 >> stage, 32 >> stage), stage, 4, 48, 10))
    assert maps(torch.randn(2, 4 << stage, 32 >> stage, 32 >> stage, generator=DRAW)).shape == (2, 10)
    strides = [m.stride[0] for m in maps.blocks if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert strides == [2, 1] * (4 - stage)
    tokens = made(lambda: TokenExit(16, 8, stage, 4, 8, 10))
    assert tokens(torch.randn(2, 16, 8, generator=DRAW)).shape == (2, 10)
    assert len(tokens.blocks) == max(4 - stage, 1)


def test_the_last_stage_of_maps_is_one_projection():
    exit_ = made(lambda: ConvExit((6, 4, 4), 4, 4, 16, 10))
    (only,) = exit_.blocks
    assert (only.kernel_size, only.out_channels, only.bias) == ((1, 1), 16, None)


def test_maps_do_not_shrink_below_a_pixel():
    exit_ = made(lambda: ConvExit((4, 2, 2), 1, 4, 16, 10))
    strides = [m.stride[0] for m in exit_.blocks if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert strides == [2, 1, 1, 1, 1, 1]
    assert exit_(torch.randn(3, 4, 2, 2, generator=DRAW)).shape == (3, 10)


def test_weights_start_as_in_the_paper():
    exit_ = made(lambda: ConvExit((32, 8, 8), 2, 4, 64, 10))
    convolution = exit_.blocks[1]
    assert float(convolution.weight.detach().std()) == pytest.approx((2 / 32) ** 0.5, rel=0.1)
    tokens = made(lambda: TokenExit(16, 64, 4, 4, 64, 10))
    for weight in (tokens.blocks[0].self_attn.in_proj_weight, tokens.blocks[0].linear1.weight):
        assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert not tokens.classifier.bias.any()


# --- students and teachers ------------------------------------------------------------------------------------------

PAIRS = {
    "resnet learns from vit": (resnet, vit, RESNET),
    "vit learns from resnet": (vit, resnet, {f"vit.layers.{i}": i + 1 for i in range(3)}),
    "swin learns from mixer": (swin, lambda: made(Mixer), {f"swin.encoder.layers.{i}": i + 2 for i in range(3)}),
    "mixer learns from resnet": (lambda: made(Mixer), resnet, {f"along.{i}": i + 1 for i in range(3)}),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_losses_of_real_pairs(pair, global_rng_untouched):
    student, teacher, stages = PAIRS[pair][0](), PAIRS[pair][1](), PAIRS[pair][2]
    keys, labels = list(student.state_dict()), torch.arange(6)
    distiller = OFADistiller(student, teacher, stages, 10, weights=(1.0, 0.5, 0.1))
    logits, losses = distiller(IMAGES, labels)
    theirs = teacher.eval()(IMAGES)
    theirs = theirs if isinstance(theirs, torch.Tensor) else theirs.logits
    torch.testing.assert_close(losses["ce"], F.cross_entropy(logits, labels))
    torch.testing.assert_close(losses["kd"], 0.5 * ofa_loss(logits, theirs, labels))
    assert losses["ofa"] > 0
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in distiller.exits.parameters())
    assert all(p.grad is None for p in distiller.teacher.parameters())
    assert len(distiller.exits) == len(stages)
    assert list(distiller.student.state_dict()) == keys
    assert not any(module._forward_hooks for module in student.modules())


def test_exits_send_gradients_into_the_stages_and_add_up():
    student, teacher = resnet(), vit()
    distiller = OFADistiller(student, teacher, RESNET, 10, weights=(0.0, 0.0, 1.0)).build(IMAGES)
    _, losses = distiller(IMAGES, torch.arange(6))
    sum(losses.values()).backward()
    assert student.classifier[1].weight.grad.abs().sum() == 0  # no exit looks at the student's own logits
    assert student.resnet.encoder.stages[0].layers[0].layer[0].convolution.weight.grad.abs().sum() > 0
    alone = []
    for name, stage in RESNET.items():
        single = OFADistiller(student, teacher, {name: stage}, 10, weights=(0.0, 0.0, 1.0), num_stages=4)
        single.exits.append(distiller.exits[stage - 1])
        alone.append(single(IMAGES, torch.arange(6))[1]["ofa"])
    torch.testing.assert_close(losses["ofa"], torch.stack(alone).sum())


def test_one_gamma_each():
    student, teacher = resnet(), vit()
    plain = OFADistiller(student, teacher, RESNET, 10, gamma=1.0)(IMAGES, torch.arange(6))[1]
    mixed = OFADistiller(student, teacher, RESNET, 10, gamma=[1.0] * 4 + [2.0])(IMAGES, torch.arange(6))[1]
    assert mixed["ofa"] == plain["ofa"]
    assert mixed["kd"] != plain["kd"]
    with pytest.raises(InputError, match="gamma has 2 values, but must have 5"):
        OFADistiller(student, teacher, RESNET, 10, gamma=[1.0, 2.0])


def test_without_imitation_it_is_the_student_alone():
    one, two = resnet(), resnet()
    labels = torch.arange(6)
    distiller = OFADistiller(one, vit(), RESNET, 10, weights=(1.0, 0.0, 0.0))
    _, losses = distiller(IMAGES, labels)
    sum(losses.values()).backward()
    F.cross_entropy(two.train()(IMAGES).logits, labels).backward()
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_prefixes_are_counted():
    from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher, Dinov2WithRegistersConfig
    from transformers import Dinov2WithRegistersForImageClassification as Dino

    size = {"image_size": 8, "patch_size": 2, "num_channels": 1, **SMALL}
    assert count_prefix(vit()) == 1
    assert count_prefix(made(lambda: DeiTForImageClassificationWithTeacher(DeiTConfig(**size)))) == 2
    assert count_prefix(made(lambda: Dino(Dinov2WithRegistersConfig(**size)))) == 5
    assert count_prefix(swin()) == count_prefix(made(Mixer)) == 0


def test_stages_are_found():
    large = torch.zeros(1, 1, 64, 64)
    assert stages_of(resnet(), large) == RESNET
    assert stages_of(resnet(layer_type="bottleneck"), large) == RESNET
    assert stages_of(swin(), IMAGES) == {"swin.encoder.layers.0": 1, "swin.encoder.layers.2": 2}
    assert stages_of(vit(), IMAGES) == {"vit.layers.0": 1, "vit.layers.1": 2, "vit.layers.2": 3}
    deep = made(lambda: nn.Sequential(*(nn.Conv2d(1, 1, 3, padding=1) for _ in range(12))))
    assert list(stages_of(deep, IMAGES)) == ["1", "3", "9", "11"]  # as the paper has them for a ViT of 12 blocks
    with pytest.raises(InputError, match="shows no stages of maps or tokens"):
        stages_of(nn.Sequential(nn.Flatten(), nn.Linear(1024, 10)), IMAGES)


def test_bad_distillers_are_refused():
    labels = torch.arange(6)
    with pytest.raises(InputError, match=r"has no layer 'resnet.encoder.stages.9'.*Did you mean"):
        OFADistiller(resnet(), vit(), {"resnet.encoder.stages.9": 1}, 10)
    with pytest.raises(InputError, match="stages is empty"):
        OFADistiller(resnet(), vit(), {}, 10)
    with pytest.raises(InputError, match=r"The feature of 1 has shape \(1, 10\), but must be"):
        OFADistiller(made(lambda: nn.Sequential(nn.Flatten(), nn.Linear(1024, 10))), vit(), {"1": 1}, 10).build(IMAGES)
    with pytest.raises(InputError, match="num_classes is 7, but the student tells 10 apart"):
        OFADistiller(resnet(), vit(), RESNET, 7)(IMAGES, labels)
    with pytest.raises(InputError, match="num_patches is 15, but must be a square"):
        OFADistiller(made(Mixer), resnet(), {"along.0": 1}, 10, num_prefix_tokens=1).build(IMAGES)
    with pytest.raises(InputError, match="The batch has 1 sample, but must have at least 2"):
        OFADistiller(resnet(), vit(), RESNET, 10)(IMAGES[:1], labels[:1])
    with pytest.raises(InputError, match="teacher is None, but must be a model"):
        OFADistiller(resnet(), None, RESNET, 10)(IMAGES, labels)
    with pytest.raises(InputError, match="w_ofa is -1, but must be at least 0"):
        OFADistiller(resnet(), vit(), RESNET, 10, weights=(1, 1, -1))


# --- in the loop ----------------------------------------------------------------------------------------------------

DATA = TensorData(torch.rand(20, 1, 32, 32, generator=DRAW), torch.arange(20) % 10)


def test_recipe_leaves_a_trained_student_and_an_untouched_teacher(global_rng_untouched):
    student, teacher = resnet(), vit()
    before, start = copy.deepcopy(teacher.state_dict()), copy.deepcopy(student.state_dict())
    model, history = recipe(student, teacher, DATA).fit(steps=2, batch_size=10)
    assert model is student
    assert {"ce", "kd", "ofa"} <= history.records[0].keys()
    assert all(torch.equal(a, b) for a, b in zip(teacher.state_dict().values(), before.values(), strict=True))
    assert list(model.state_dict()) == list(start)
    assert not torch.equal(model.classifier[1].weight, start["classifier.1.weight"])


def test_layers_may_be_named():
    made_of = recipe(vit(), resnet(), DATA, layers="vit.layers.0, vit.layers.2")
    assert made_of.model.stages == {"vit.layers.0": 1, "vit.layers.2": 2}


def test_asking_beforehand_equals_asking_at_every_step():
    teacher, students = vit(), [resnet(), resnet()]
    for student, whom, data in ((students[0], teacher, DATA), (students[1], None, answered(DATA, teacher))):
        distiller = OFADistiller(student, whom, {"resnet.encoder.stages.3": 4}, 10).build(IMAGES)
        fit(distiller, data, distiller.objective, steps=2, batch_size=20)
    # The teacher's last width is not known from its answers: the last exit is narrower, if the student is.
    assert students[0].config.hidden_sizes[-1] == 24 > 16
    for a, b in zip(*(s.parameters() for s in students), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


class Kill(Callback):
    """Ends a run in its third step, if it is to."""

    def __init__(self, step):
        self.step = step

    def on_step(self, run):
        if run.step == self.step:
            raise KeyboardInterrupt


def test_exits_learn_and_a_killed_run_resumes_with_them(tmp_path):
    def run(folder, kill):
        distiller = OFADistiller(resnet(), vit(), RESNET, 10, seed=3).build(IMAGES)
        before = copy.deepcopy(distiller.exits[0].classifier.weight)
        settings = {"steps": 4, "batch_size": 10, "callbacks": [Kill(kill)]}
        fit(distiller, DATA, distiller.objective, checkpoint=Checkpoint(folder, every=1), **settings)
        assert not torch.equal(before, distiller.exits[0].classifier.weight)
        return distiller.state_dict()

    whole = run(tmp_path / "whole", 0)
    assert not any("teacher" in name for name in whole)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", 3)
    for name, value in run(tmp_path / "killed", 0).items():
        assert torch.equal(value, whole[name]), name


def test_training_without_exits_or_labels_is_refused():
    distiller = OFADistiller(resnet(), vit(), RESNET, 10)
    with pytest.raises(InputError, match="The exits are not built, but must be before training"):
        fit(distiller, DATA, distiller.objective, steps=1)
    distiller.build(IMAGES)
    with pytest.raises(InputError, match="The batch has no labels, but OFA needs them"):
        fit(distiller, TensorData(DATA.inputs), distiller.objective, steps=1)


def test_building_follows_the_seed_and_happens_once():
    one, two, other = (OFADistiller(resnet(), vit(), RESNET, 10, seed=seed) for seed in (1, 1, 2))
    for distiller in (one, two, other):
        distiller.build(IMAGES)
    assert torch.equal(one.exits[0].classifier.weight, two.exits[0].classifier.weight)
    assert not torch.equal(one.exits[0].classifier.weight, other.exits[0].classifier.weight)
    before = list(one.exits.parameters())
    one(IMAGES, torch.arange(6))
    assert all(a is b for a, b in zip(before, one.exits.parameters(), strict=True))
    assert len(one.build(IMAGES).exits) == 4


def test_without_labels_it_is_the_student():
    student = resnet().eval()
    distiller = OFADistiller(student, vit(), RESNET, 10).eval()
    assert torch.equal(distiller(IMAGES).logits, student(IMAGES).logits)
    assert len(distiller.exits) == 0


def test_deep_copies_are_independent():
    distiller = OFADistiller(resnet(), vit(), RESNET, 10).build(IMAGES)
    twin = copy.deepcopy(distiller)
    with seeds.isolated(0):
        one, two = (d(IMAGES, torch.arange(6))[1]["ofa"] for d in (distiller, twin))
    assert torch.equal(one, two)
    assert twin.exits[0] is not distiller.exits[0]
