"""Mixup distillation: mixing and the scaled loss against the authors' code and closed forms, and both in the loop."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from retouch.core import seeds
from retouch.core.data import TensorData
from retouch.core.distillation import answered, softened_kl
from retouch.core.errors import InputError
from retouch.core.loop import Callback, Checkpoint, fit
from retouch.core.models import predict
from retouch.distill.mixup_kd import MixupDistillation, apply_mixup, recipe, sample_mixup, std_scaled_distill_loss

DRAW = torch.Generator().manual_seed(0)
S, T = (2 * torch.randn(6, 5, generator=DRAW, dtype=torch.float64) for _ in range(2))
SOFT = torch.randn(6, 5, generator=DRAW, dtype=torch.float64).softmax(-1)
X = torch.randn(6, 2, 3, 3, generator=DRAW)
Y = torch.tensor([0, 1, 2, 3, 4, 0])


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def net(seed, classes=10):
    with seeds.isolated(seed):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, classes))


def test_golden(golden):
    case = golden("mixup_kd")
    student, teacher, soft = (
        torch.tensor(getattr(case, f"in_{name}")) for name in ("student", "teacher", "soft_targets")
    )
    student.requires_grad_()
    weights = {"gamma": float(case.param_gamma), "alpha": float(case.param_alpha)}
    ce, kd = std_scaled_distill_loss(student, teacher, soft, **weights)
    case.close("out_ce", ce)
    case.close("out_kd", kd)
    case.close("out_grad", torch.autograd.grad(ce + kd, student)[0])
    images, labels = torch.tensor(case.in_images), torch.tensor(case.in_labels)
    for kind in ("pmu", "fmu"):
        plan = {"index_a": "perm_a", "index_b": "perm_b", "lam": "lam"}
        plan = {name: torch.tensor(getattr(case, f"in_{kind}_{key}")) for name, key in plan.items()}
        mixed, targets = apply_mixup(images, labels, **plan, num_classes=100)
        case.close(f"out_{kind}_images", mixed)
        case.close(f"out_{kind}_targets", targets)


# --- who is mixed with whom -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("beta", [0.01, 1.0])
def test_as_many_samples_are_mixed_as_asked_for(fraction, beta):
    plan = sample_mixup(64, beta=beta, mix_fraction=fraction, generator=gen())
    assert int((plan.lam < 1).sum()) == round(fraction * 64)
    assert ((plan.lam >= 0) & (plan.lam <= 1)).all()
    for index in (plan.index_a, plan.index_b):
        assert sorted(index.tolist()) == list(range(64))
    assert not torch.equal(plan.index_a, plan.index_b)


def test_the_same_generator_draws_the_same_plan(global_rng_untouched):
    one, two, other = (sample_mixup(32, mix_fraction=0.5, generator=gen(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one.lam, other.lam)
    assert not torch.equal(sample_mixup(32).index_a, sample_mixup(32).index_a)


def test_every_sample_has_a_share_of_its_own_from_the_beta_distribution():
    lam = sample_mixup(20000, beta=0.4, mix_fraction=1.0, generator=gen()).lam
    assert len(lam.unique()) > 10000
    assert float(lam.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(lam.var()) == pytest.approx(1 / (4 * (2 * 0.4 + 1)), rel=0.03)


def test_with_replacement_more_are_mixed_as_in_the_official_code():
    shares = [
        float((sample_mixup(64, mix_fraction=0.1, generator=gen(seed), with_replacement=True).lam < 1).float().mean())
        for seed in range(200)
    ]
    assert sum(shares) / 200 == pytest.approx((1 - 1 / 64) ** 57, abs=0.01)  # 41%, and not 10%
    whole = sample_mixup(64, mix_fraction=1.0, generator=gen(), with_replacement=True)
    assert (whole.lam < 1).all()


# --- mixing ---------------------------------------------------------------------------------------------------------


def test_at_the_ends_it_gives_the_one_sample_or_the_other():
    plan = sample_mixup(6, generator=gen())
    for lam, index in ((1.0, plan.index_a), (0.0, plan.index_b)):
        shares = torch.full((6,), lam)
        mixed, soft = apply_mixup(X, Y, index_a=plan.index_a, index_b=plan.index_b, lam=shares, num_classes=5)
        assert torch.equal(mixed, X[index])
        assert torch.equal(soft, F.one_hot(Y, 5).float()[index])  # clean samples are permuted too, with their labels


def test_mixing_by_hand():
    lam = torch.tensor([0.25, 1.0, 0.5, 0.0, 0.75, 0.1])
    a, b = torch.tensor([1, 2, 3, 4, 5, 0]), torch.tensor([3, 3, 0, 1, 0, 2])
    mixed, soft = apply_mixup(X, Y, index_a=a, index_b=b, lam=lam, num_classes=5)
    torch.testing.assert_close(mixed[0], 0.25 * X[1] + 0.75 * X[3])
    torch.testing.assert_close(soft[0], torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0]))
    torch.testing.assert_close(mixed[4], 0.75 * X[5] + 0.25 * X[0])
    assert torch.equal(soft[4], torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0]))  # both are of class 0


def test_targets_sum_to_one_and_are_certain_where_both_labels_are_one():
    plan = sample_mixup(500, mix_fraction=1.0, generator=gen())
    labels = torch.randint(3, (500,), generator=gen())
    _, soft = apply_mixup(torch.zeros(500, 1), labels, **plan._asdict(), num_classes=3)
    assert (soft.sum(1) - 1).abs().max() < 1e-6
    same = labels[plan.index_a] == labels[plan.index_b]
    assert torch.equal(soft[same], F.one_hot(labels[plan.index_a][same], 3).float())


@pytest.mark.parametrize("shape", [(6,), (6, 4), (6, 2, 3, 3), (6, 1, 2, 3, 4)])
def test_inputs_of_any_rank_and_soft_labels_are_mixed(shape):
    inputs = torch.randn(shape, generator=gen())
    before, plan = inputs.clone(), sample_mixup(6, mix_fraction=0.5, generator=gen())
    mixed, hard = apply_mixup(inputs, Y, **plan._asdict(), num_classes=5)
    assert mixed.shape == shape
    assert torch.equal(inputs, before)
    _, soft = apply_mixup(inputs, F.one_hot(Y, 5).float(), **plan._asdict(), num_classes=5)
    assert torch.equal(soft, hard)


def test_half_precision_inputs_have_targets_of_full_precision():
    mixed, soft = apply_mixup(X.half(), Y, **sample_mixup(6, generator=gen())._asdict(), num_classes=5)
    assert mixed.dtype == torch.float16
    assert soft.dtype == torch.float32


# --- the loss -------------------------------------------------------------------------------------------------------


def test_the_loss_by_hand():
    s, t = S / S.std(-1, keepdim=True), T / T.std(-1, keepdim=True)
    ce, kd = std_scaled_distill_loss(S, T, SOFT, gamma=0.3, alpha=0.6)
    torch.testing.assert_close(ce, 0.3 * F.cross_entropy(s, SOFT))
    torch.testing.assert_close(kd, 0.6 * F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="batchmean"))


def test_it_knows_neither_size_nor_shift_of_any_samples_logits():
    scale, shift = torch.rand(6, 1, generator=DRAW) * 9 + 0.1, torch.randn(6, 1, generator=DRAW)
    expected = std_scaled_distill_loss(S, T, SOFT)
    for changed in ((scale * S + shift, T), (S, scale * T + shift)):
        for loss, value in zip(std_scaled_distill_loss(*changed, SOFT), expected, strict=True):
            torch.testing.assert_close(loss, value)


def test_a_positive_affine_copy_of_the_teacher_is_at_the_optimum():
    s = (3 * T - 1).requires_grad_()
    kd = std_scaled_distill_loss(s, T, SOFT)[1]
    assert abs(float(kd.detach())) < 1e-12
    assert torch.autograd.grad(kd, s)[0].abs().max() < 1e-12
    assert std_scaled_distill_loss(-T, T, SOFT)[1] > 0.1


def test_the_gradient_cannot_change_the_size_of_logits_unless_the_std_is_a_constant():
    s = S.clone().requires_grad_()
    centred = S - S.mean(-1, keepdim=True)
    grads = [
        torch.autograd.grad(sum(std_scaled_distill_loss(s, T, SOFT, detach_std=detach)), s)[0]
        for detach in (False, True)
    ]
    along = [(grad * centred).sum(-1).abs() for grad in grads]
    assert along[0].max() < 1e-12
    assert along[1].max() > 1e-3
    one, two = (std_scaled_distill_loss(S, T, SOFT, detach_std=detach) for detach in (False, True))
    assert one == two  # the value is the same


def test_without_weight_cross_entropy_is_zero_and_no_gradient_goes_into_the_teacher():
    s, t = S.clone().requires_grad_(), T.clone().requires_grad_()
    ce, kd = std_scaled_distill_loss(s, t, SOFT, gamma=0.0)
    assert ce == 0
    (ce + kd).backward()
    assert t.grad is None


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_cross_entropy_has_a_floor(classes):
    """At best, one logit stands out from all others, which are equal."""
    best = F.one_hot(torch.tensor([0]), classes).double()
    floor = math.log(1 + (classes - 1) * math.exp(-math.sqrt(classes)))
    assert float(std_scaled_distill_loss(best, best, best, gamma=1.0)[0]) == pytest.approx(floor)
    logits = torch.randn(500, classes, generator=DRAW, dtype=torch.float64) * 5
    target = best.expand(500, -1)
    assert float(std_scaled_distill_loss(logits, logits, target, gamma=1.0)[0]) > floor
    if classes == 10:
        assert floor == pytest.approx(0.323, abs=1e-3)


def test_equal_logits_are_refused_or_taken_with_eps():
    flat = torch.full((6, 5), 0.1)
    with pytest.raises(InputError, match="student_logits holds a sample whose logits are all equal"):
        std_scaled_distill_loss(flat, T.float(), SOFT)
    with pytest.raises(InputError, match="teacher_logits holds a sample whose logits are all equal"):
        std_scaled_distill_loss(S.float(), flat, SOFT)
    s = flat.clone().requires_grad_()
    loss = sum(std_scaled_distill_loss(s, T.float(), SOFT, eps=1e-3))
    assert torch.isfinite(loss)
    assert torch.isfinite(torch.autograd.grad(loss, s)[0]).all()


def test_half_precision_is_computed_in_single():
    loss = sum(std_scaled_distill_loss(S.half(), T.half(), SOFT))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, sum(std_scaled_distill_loss(S, T, SOFT)).float(), rtol=1e-2, atol=1e-3)


PLAN = sample_mixup(6, generator=gen())._asdict()
BAD = {
    "beta": (lambda: sample_mixup(4, beta=0.0), r"beta is 0\.0, but must be greater than 0"),
    "fraction": (
        lambda: sample_mixup(4, mix_fraction=1.2),
        r"mix_fraction is 1\.2, but must be at least 0 and at most 1",
    ),
    "batch": (lambda: sample_mixup(0), "batch_size is 0, but must be greater than 0"),
    "whole numbers": (
        lambda: apply_mixup(X.long(), Y, **PLAN, num_classes=5),
        r"inputs has type torch\.int64, but must be of floating point",
    ),
    "lengths": (
        lambda: apply_mixup(X, Y[:4], **PLAN, num_classes=5),
        r"have lengths \[6, 4, 6, 6, 6\], but must have one length",
    ),
    "labels": (lambda: apply_mixup(X, Y, **PLAN, num_classes=4), "labels has classes 0 to 4, but must have 0 to 3"),
    "soft labels": (
        lambda: apply_mixup(X, SOFT, **PLAN, num_classes=4),
        "labels has 5 classes, but must have num_classes",
    ),
    "lam": (
        lambda: apply_mixup(X, Y, **{**PLAN, "lam": torch.full((6,), 1.5)}, num_classes=5),
        r"lam is 1\.5, but must be at least 0 and at most 1",
    ),
    "one class": (
        lambda: std_scaled_distill_loss(S[:, :1], T[:, :1], SOFT[:, :1]),
        r"shape \(6, 1\), but must be \(samples, classes\) with at least 2 classes",
    ),
    "pair": (lambda: std_scaled_distill_loss(S, T[:, :4], SOFT), "The student tells 5 classes apart and the teacher 4"),
    "targets": (
        lambda: std_scaled_distill_loss(S, T, SOFT[:, :4]),
        r"soft_targets has shape \(6, 4\), but must have the logits', \(6, 5\)",
    ),
    "ids": (lambda: std_scaled_distill_loss(S, T, Y), r"soft_targets has shape \(6,\), but must have the logits'"),
    "eps": (lambda: std_scaled_distill_loss(S, T, SOFT, eps=-1.0), r"eps is -1\.0, but must be at least 0"),
    "scaling": (lambda: MixupDistillation(scaling="none"), "scaling is 'none', but must be one of"),
    "classes": (lambda: MixupDistillation().on_batch(X, Y), "num_classes is None, but must be given outside of fit"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_refused(kind):
    call, message = BAD[kind]
    with pytest.raises(InputError, match=message):
        call()


# --- in a loop of one's own, and in ours ----------------------------------------------------------------------------


def test_a_loop_of_ones_own():
    mix = MixupDistillation(mix_fraction=0.5, num_classes=5, generator=gen())
    mixed, soft = mix.on_batch(X, Y)
    plan = sample_mixup(6, mix_fraction=0.5, generator=gen())
    expected = apply_mixup(X, Y, **plan._asdict(), num_classes=5)
    assert torch.equal(mixed, expected[0])
    assert torch.equal(soft, expected[1])
    terms = mix.loss(S, T, SOFT)
    assert list(terms.values()) == list(std_scaled_distill_loss(S, T, SOFT))
    soft_labels = MixupDistillation(generator=gen()).on_batch(X, F.one_hot(Y, 5).float())[1]
    assert soft_labels.shape == (6, 5)


def test_with_a_temperature_it_is_ordinary_distillation_on_the_mixed_batch():
    terms = MixupDistillation(scaling="temperature", gamma=0.2, alpha=0.7, temperature=3.0).loss(S, T, SOFT)
    torch.testing.assert_close(terms["ce"], 0.2 * F.cross_entropy(S, SOFT))
    torch.testing.assert_close(terms["kl"], 0.7 * softened_kl(S, T, temperature=3.0))


class Seen(Callback):
    """Keeps the batches that are trained on."""

    def __init__(self):
        self.batches = []

    def on_batch(self, run, batch):
        self.batches.append(batch)
        return batch


def test_teacher_and_student_see_the_mixed_inputs(digits_small, global_rng_untouched):
    teacher, student, seen = net(0), net(1), Seen()
    before = copy.deepcopy(student)
    mix = MixupDistillation(mix_fraction=0.5)
    history = fit(student, digits_small.train, mix.objective(teacher), steps=2, callbacks=[mix, seen])
    mixed, soft = seen.batches[0]
    assert int((soft.amax(1) < 1).sum()) > 20
    clean = {row.numpy().tobytes() for row in digits_small.train.inputs}
    assert sum(row.numpy().tobytes() not in clean for row in mixed) == 32
    ce, kd = std_scaled_distill_loss(before(mixed), teacher(mixed), soft)
    assert history["ce"][0] == pytest.approx(float(ce.detach()), rel=1e-5)
    assert history["kl"][0] == pytest.approx(float(kd.detach()), rel=1e-5)


def test_unmixed_batches_are_the_old_ones_in_another_order(digits_small):
    seen, mix = Seen(), MixupDistillation(mix_fraction=0.0)
    fit(net(1), digits_small.train, mix.objective(net(0)), steps=1, batch_size=240, callbacks=[mix, seen])
    images, soft = seen.batches[0]
    rows = {
        row.numpy().tobytes(): int(label) for row, label in zip(*digits_small.train[torch.arange(240)], strict=True)
    }
    assert [rows[row.numpy().tobytes()] for row in images] == soft.argmax(1).tolist()
    assert (soft.amax(1) == 1).all()


def test_resuming_draws_the_same_mixes(digits_small, tmp_path):
    found = []
    for name, budgets in (("whole", (6,)), ("parts", (3, 6))):
        for steps in budgets:
            student, mix = net(1), MixupDistillation(mix_fraction=1.0)
            folder = Checkpoint(tmp_path / name, every=2)
            fit(student, digits_small.train, mix.objective(net(0)), steps=steps, callbacks=[mix], checkpoint=folder)
        found.append(student)
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in found), strict=True))


def test_a_teacher_with_batch_norm_keeps_its_statistics(digits_small):
    teacher = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10)).train()
    before = copy.deepcopy(teacher.state_dict())
    mix = MixupDistillation(mix_fraction=1.0)
    objective = mix.objective(teacher)
    fit(net(1), digits_small.train, objective, steps=3, callbacks=[mix])
    for state in (teacher.state_dict(), objective.teacher.model.state_dict()):
        assert all(torch.equal(before[name], value) for name, value in state.items())


def test_a_vit_teaches_a_vit_also_from_mappings(tiny_vit, digits_small):
    student = copy.deepcopy(tiny_vit)
    before = copy.deepcopy(tiny_vit.state_dict())
    model, history = recipe(student, tiny_vit, digits_small.train, mix_fraction=0.5, beta=0.4).fit(epochs=1)
    assert model is student
    assert len(history) == 4
    assert all(torch.equal(before[name], value) for name, value in tiny_vit.state_dict().items())
    data = TensorData({"pixel_values": digits_small.train.inputs}, digits_small.train.targets)
    made = recipe(copy.deepcopy(tiny_vit), tiny_vit, data, mix_fraction=0.5)
    assert len(made.fit(steps=2)[1]) == 2


def test_a_student_of_few_samples_learns_from_mixes(digits_small):
    teacher, fast = net(0), lambda parameters: torch.optim.AdamW(parameters, lr=1e-2)
    fit(teacher, digits_small.train, epochs=40, optimizer=fast)
    few = TensorData(digits_small.train.inputs[::4], digits_small.train.targets[::4])
    model, _ = recipe(net(1), teacher, few, mix_fraction=0.5).fit(steps=150, optimizer=fast)
    right = predict(model, [digits_small.test[torch.arange(100)]]).argmax(-1) == digits_small.test.targets
    assert right.float().mean() > 0.8


def test_what_does_not_fit_in_the_loop_is_refused(digits_small):
    mix = MixupDistillation()
    with pytest.raises(InputError, match=r"The batch has no soft targets: give fit callbacks=\[\.\.\.\]"):
        fit(net(1), digits_small.train, mix.objective(net(0)), steps=1)
    with pytest.raises(InputError, match="The batch has no targets, but mixup mixes them"):
        fit(net(1), TensorData(digits_small.train.inputs), mix.objective(net(0)), steps=1, callbacks=[mix])
    with pytest.raises(InputError, match="mixes are new: ask the teacher at every step"):
        fit(net(1), answered(digits_small.train, net(0)), mix.objective(net(0)), steps=1, callbacks=[mix])
    two = TensorData({"a": digits_small.train.inputs, "b": digits_small.train.inputs}, digits_small.train.targets)

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net(1)

        def forward(self, a, b):
            return self.net(a) + self.net(b)

    with pytest.raises(InputError, match="The batch has several inputs, but mixup takes one tensor"):
        fit(Both(), two, mix.objective(Both()), steps=1, callbacks=[mix])
