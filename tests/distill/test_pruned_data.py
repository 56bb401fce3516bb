"""Distillation on pruned data: what is kept, scores of samples, the loss, and the whole in the loop."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from retouch.core import seeds
from retouch.core.batches import in_order
from retouch.core.data import TensorData, subset
from retouch.core.errors import InputError
from retouch.core.loop import Checkpoint, fit
from retouch.core.models import predict
from retouch.distill.pruned_data import (
    ForgettingTracker,
    PrunedDistillation,
    el2n_scores,
    kd_kl,
    kd_weight_for_fraction,
    prune_indices,
    pruned_kd_loss,
    recipe,
)

DRAW = torch.Generator().manual_seed(0)
S, T = (2 * torch.randn(6, 5, generator=DRAW, dtype=torch.float64) for _ in range(2))
Y = torch.tensor([0, 1, 2, 3, 4, 0])
LABELS = torch.randint(4, (103,), generator=DRAW)
SCORES = torch.rand(103, generator=DRAW)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def net(seed, classes=10):
    with seeds.isolated(seed):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, classes))


def test_golden(golden):
    case = golden("pruned_data")
    student, teacher, labels = (torch.tensor(getattr(case, f"in_{name}")) for name in ("student", "teacher", "labels"))
    for temperature in (1, 4):
        case.close(f"out_kd_T{temperature}", kd_kl(student, teacher, temperature=float(temperature)))
    case.close("out_ce", pruned_kd_loss(student, teacher, labels, alpha=0.0))
    for alpha in (0.0, 0.5, 0.9, 1.0):
        case.close(f"out_total_T4_alpha{alpha}", pruned_kd_loss(student, teacher, labels, alpha=alpha))


# --- what is kept ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", ["random", "hardest", "easiest"])
@pytest.mark.parametrize("balanced", [True, False])
def test_kept_indices_are_unique_sorted_nested_and_as_many_as_asked_for(keep, balanced, global_rng_untouched):
    before = torch.empty(0, dtype=torch.long)
    for fraction in (0.1, 0.3, 0.5, 0.95, 1.0):
        settings = {"scores": SCORES, "keep": keep, "class_balanced": balanced, "allow_empty": not balanced}
        kept = prune_indices(LABELS, fraction, **settings, generator=gen())
        assert kept.dtype == torch.int64
        assert torch.equal(kept, kept.unique())
        assert torch.isin(before, kept).all()
        assert torch.equal(kept, prune_indices(LABELS, fraction, **settings, generator=gen()))
        if balanced:
            counts = [round(fraction * int(count)) for count in LABELS.bincount()]
            assert LABELS[kept].bincount().tolist() == counts
        else:
            assert len(kept) == round(fraction * 103)
        before = kept
    assert len(before) == 103


def test_random_pruning_depends_on_its_generator_alone():
    one, two = (prune_indices(LABELS, 0.3, generator=gen(seed)) for seed in (0, 1))
    assert not torch.equal(one, two)
    assert torch.equal(one, prune_indices(LABELS, 0.3, scores=SCORES, generator=gen()))


def test_scores_are_kept_from_either_end_and_ties_go_to_the_lower_index():
    labels = torch.zeros(10, dtype=torch.long)
    scores = torch.arange(10.0)
    assert prune_indices(labels, 0.3, scores=scores, keep="hardest").tolist() == [7, 8, 9]
    assert prune_indices(labels, 0.3, scores=scores, keep="easiest").tolist() == [0, 1, 2]
    for keep in ("hardest", "easiest"):
        assert prune_indices(labels, 0.3, scores=torch.ones(10), keep=keep).tolist() == [0, 1, 2]
    halves = torch.arange(10) // 5
    assert prune_indices(halves, 0.4, scores=scores, keep="hardest").tolist() == [3, 4, 8, 9]
    settings = {"scores": scores, "keep": "hardest", "class_balanced": False, "allow_empty": True}
    assert prune_indices(halves, 0.5, **settings).tolist() == [5, 6, 7, 8, 9]


def test_a_class_left_without_samples_is_refused_unless_allowed():
    labels = torch.tensor([0] * 50 + [1] * 4)
    with pytest.raises(
        InputError, match=r"fraction is 0\.1, but must keep a sample of every class: none is left of class 1"
    ):
        prune_indices(labels, 0.1)
    assert labels[prune_indices(labels, 0.1, allow_empty=True)].unique().tolist() == [0]


# --- scores ---------------------------------------------------------------------------------------------------------


def test_el2n_at_its_ends():
    sure = 1e4 * F.one_hot(torch.tensor([0, 1, 2]), 5).float()
    labels = torch.tensor([0, 1, 4])
    torch.testing.assert_close(el2n_scores(sure, labels), torch.tensor([0.0, 0.0, math.sqrt(2)]))
    torch.testing.assert_close(el2n_scores(torch.zeros(3, 5), labels), torch.full((3,), math.sqrt(1 - 1 / 5)))


def test_el2n_of_several_checkpoints_is_their_mean():
    many = torch.stack([S, T])
    torch.testing.assert_close(el2n_scores(many, Y), (el2n_scores(S, Y) + el2n_scores(T, Y)) / 2)


def test_forgetting_is_going_from_right_to_wrong():
    """Four samples over six looks; the third is never right, and one look leaves the fourth out."""
    runs = {0: "111111", 1: "101010", 2: "000000", 3: "010-01"}
    tracker = ForgettingTracker(4)
    for look in range(6):
        rows = [i for i in runs if runs[i][look] != "-"]
        logits = torch.tensor([[0.0, 1.0] if runs[i][look] == "1" else [1.0, 0.0] for i in rows])
        tracker.update(torch.tensor(rows), logits, torch.ones(len(rows), dtype=torch.long))
    assert tracker.scores().tolist() == [0.0, 3.0, 6.0, 1.0]
    assert int(tracker.scores().argmax()) == 2


def test_the_tracker_looks_before_every_epoch_and_after_the_last(digits_small, tmp_path):
    whole = ForgettingTracker(data=digits_small.train)
    fit(net(1), digits_small.train, epochs=3, callbacks=[whole])
    assert whole.seen.tolist() == [4] * 240
    assert whole.learned.any()
    parts = [ForgettingTracker(data=digits_small.train) for _ in range(2)]
    for tracker, steps in zip(parts, (6, 12), strict=True):
        model = net(1)
        fit(
            model,
            digits_small.train,
            steps=steps,
            callbacks=[tracker],
            checkpoint=Checkpoint(tmp_path / "run", every=2),
        )
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts[1].state_dict()[name]), name


def test_a_tracker_changes_nothing_in_training(digits_small):
    one, two = net(1), net(1)
    fit(one, digits_small.train, epochs=1)
    fit(two, digits_small.train, epochs=1, callbacks=[ForgettingTracker(data=digits_small.train)])
    assert torch.equal(one[1].weight, two[1].weight)


# --- the loss -------------------------------------------------------------------------------------------------------


def value_and_gradient(loss, *others, **settings):
    s = S.clone().requires_grad_()
    value = loss(s, *others, **settings)
    return value.detach(), torch.autograd.grad(value, s)[0]


def test_at_the_ends_it_is_cross_entropy_and_kl():
    labels, plain = value_and_gradient(pruned_kd_loss, T, Y, alpha=0.0), value_and_gradient(F.cross_entropy, Y)
    assert all(torch.equal(a, b) for a, b in zip(labels, plain, strict=True))
    taught, kl = value_and_gradient(pruned_kd_loss, T, Y, alpha=1.0), value_and_gradient(kd_kl, T)
    assert all(torch.equal(a, b) for a, b in zip(taught, kl, strict=True))
    assert pruned_kd_loss(S, T, Y, alpha=1.0) == pruned_kd_loss(S, T, (Y + 1) % 5, alpha=1.0)
    assert pruned_kd_loss(S, T, Y, alpha=0.9) != pruned_kd_loss(S, T, (Y + 1) % 5, alpha=0.9)


def test_kl_is_zero_with_a_zero_gradient_at_the_teacher():
    z = S.clone().requires_grad_()
    loss = kd_kl(z, S)
    assert abs(float(loss.detach())) < 1e-12
    assert torch.autograd.grad(loss, z)[0].abs().max() < 1e-12


def test_at_high_temperature_kl_is_the_squared_distance_of_centred_logits():
    s, t = (z - z.mean(-1, keepdim=True) for z in (S, T))
    expected = (s - t).square().sum(-1).mean() / (2 * 5)
    torch.testing.assert_close(kd_kl(s, t, temperature=1e4), expected, rtol=1e-3, atol=0)


def test_no_gradient_goes_into_the_teacher():
    t, s = T.clone().requires_grad_(), S.clone().requires_grad_()
    pruned_kd_loss(s, t, Y, alpha=0.5).backward()
    assert t.grad is None


def test_the_weight_falls_from_a_tenth_to_seven_tenths():
    assert [kd_weight_for_fraction(f) for f in (0.01, 0.1, 0.7, 1.0)] == pytest.approx([0.9, 0.9, 0.5, 0.5])
    assert kd_weight_for_fraction(0.4) == pytest.approx(0.7)
    assert kd_weight_for_fraction(0.4, low=0.0, high=1.0) == pytest.approx(0.5)


def test_the_teacher_corrects_wrong_labels_that_hardest_pruning_collects():
    """EL2N of a good model ranks flipped labels first."""
    labels = torch.arange(100) % 5
    logits = 4 * F.one_hot(labels, 5).float() + torch.randn(100, 5, generator=gen())
    noisy = torch.where(torch.arange(100) < 20, (labels + 1) % 5, labels)
    kept = prune_indices(noisy, 0.2, scores=el2n_scores(logits, noisy), keep="hardest")
    assert (kept < 20).float().mean() > 0.9


# --- in the loop ----------------------------------------------------------------------------------------------------


def test_the_teachers_answers_may_be_asked_beforehand(digits_small, global_rng_untouched):
    teacher, students = net(0), [net(1), net(1)]
    histories = [
        PrunedDistillation(teacher, student, digits_small.train, 0.5, precompute=ahead).fit(epochs=2)
        for student, ahead in zip(students, (False, True), strict=True)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*(s.parameters() for s in students), strict=True))
    assert [len(history) for history in histories] == [4, 4]  # 120 samples in batches of 64, twice
    assert len(PrunedDistillation(teacher, net(1), digits_small.train, 0.5).fit(steps=9)) == 9


def test_its_parts_are_what_they_are_called(digits_small):
    teacher = net(0)
    made = PrunedDistillation(teacher, net(1), digits_small.train, 0.25, seed=3)
    labels = digits_small.train.targets
    assert torch.equal(made.indices, prune_indices(labels, 0.25, generator=seeds.generator(3, "prune")))
    assert made.alpha == kd_weight_for_fraction(0.25)
    assert torch.equal(made.data.inputs, digits_small.train.inputs[made.indices])
    hard = PrunedDistillation(teacher, net(1), digits_small.train, 0.25, keep="hardest", alpha=0.3)
    scores = el2n_scores(predict(teacher, in_order(digits_small.train)), labels)
    assert torch.equal(hard.indices, prune_indices(labels, 0.25, scores=scores, keep="hardest"))
    assert hard.alpha == 0.3
    given = PrunedDistillation(teacher, net(1), digits_small.train, 0.25, keep="easiest", scores=-scores)
    assert torch.equal(given.indices, hard.indices)


def test_without_the_teacher_it_is_plain_training_on_the_subset(digits_small):
    one, two = net(1), net(1)
    made = PrunedDistillation(net(0), one, digits_small.train, 0.5, alpha=0.0)
    made.fit(epochs=2)
    fit(two, subset(digits_small.train, made.indices), epochs=2)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_a_vit_teaches_a_vit_and_stays_as_it_is(tiny_vit, digits_small):
    student, before = copy.deepcopy(tiny_vit), copy.deepcopy(tiny_vit.state_dict())
    model, history = recipe(student, tiny_vit, digits_small.train, fraction=0.5, keep="hardest").fit(epochs=1)
    assert model is student
    assert len(history) == 2
    assert all(torch.equal(before[name], value) for name, value in tiny_vit.state_dict().items())
    assert all(p.grad is None for p in tiny_vit.parameters())


def test_data_sets_that_give_samples_one_by_one(digits_small):
    samples = [(image, int(label)) for image, label in zip(*digits_small.train[torch.arange(240)], strict=True)]

    class Listed(torch.utils.data.Dataset):
        def __len__(self):
            return 240

        def __getitem__(self, index):
            return samples[index]

    one, two = net(1), net(1)
    PrunedDistillation(net(0), one, Listed(), 0.5).fit(epochs=1)
    PrunedDistillation(net(0), two, digits_small.train, 0.5).fit(epochs=1)
    assert torch.equal(one[1].weight, two[1].weight)


BAD = {
    "fraction": (lambda: prune_indices(LABELS, 0.0), r"fraction is 0\.0, but must be greater than 0 and at most 1"),
    "more": (lambda: prune_indices(LABELS, 1.1), r"fraction is 1\.1, but must be greater than 0 and at most 1"),
    "keep": (lambda: prune_indices(LABELS, 0.5, keep="best"), "keep is 'best', but must be one of 'random', 'hardest'"),
    "scores": (lambda: prune_indices(LABELS, 0.5, keep="hardest"), "scores is None, but must be given to keep the"),
    "length": (
        lambda: prune_indices(LABELS, 0.5, keep="easiest", scores=SCORES[:9]),
        r"scores has shape \(9,\), but must have that of labels, \(103,\)",
    ),
    "el2n": (lambda: el2n_scores(S, LABELS), r"logits has shape \(6, 5\), but must be .* for 103"),
    "alpha": (lambda: pruned_kd_loss(S, T, Y, alpha=1.5), r"alpha is 1\.5, but must be at least 0 and at most 1"),
    "temperature": (lambda: kd_kl(S, T, temperature=0.0), r"temperature is 0\.0, but must be greater than 0"),
    "classes": (lambda: kd_kl(S, T[:, :4]), "The student tells 5 classes apart and the teacher 4"),
    "weight": (lambda: kd_weight_for_fraction(0.0), r"fraction is 0\.0, but must be greater than 0"),
    "tracker": (lambda: ForgettingTracker(), "num_samples and data are None, but one of them must be given"),
    "index": (
        lambda: ForgettingTracker(4).update(torch.tensor([4]), S[:1], Y[:1]),
        "indices has 4, but must be 0 to 3",
    ),
    "auto": (
        lambda: PrunedDistillation(net(0), net(1), (torch.zeros(4, 64), torch.zeros(4).long()), 0.5, alpha="best"),
        "alpha is 'best', but must be one of 'auto'",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_refused(kind):
    call, message = BAD[kind]
    with pytest.raises(InputError, match=message):
        call()


def test_a_teacher_of_other_classes_and_data_without_labels_are_refused(digits_small):
    with pytest.raises(InputError, match="The student tells 10 classes apart and the teacher 4"):
        PrunedDistillation(net(0, classes=4), net(1), digits_small.train, 0.5).fit(steps=1)
    with pytest.raises(InputError, match="The data has no labels"):
        PrunedDistillation(net(0), net(1), TensorData(digits_small.train.inputs), 0.5)
