"""CutMix: boxes as the authors' code draws them, labels by the area pasted, and batches that keep their form."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from retouch.core.data import TensorData
from retouch.core.errors import InputError
from retouch.core.loop import fit
from retouch.train.cutmix import CutMix, cutmix, cutmix_box, cutmix_loss, mixed_targets, paste, recipe

DRAW = torch.Generator().manual_seed(0)
IMAGES = torch.rand(6, 3, 8, 10, generator=DRAW)
LABELS = torch.tensor([0, 1, 2, 3, 1, 0])
SHIFT = torch.tensor([1, 2, 3, 4, 5, 0])  # a permutation in which nobody is its own partner


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_golden(golden):
    case = golden("cutmix")
    images, labels = torch.tensor(case.in_images), torch.tensor(case.in_labels)
    boxes, shares, mixed, losses = [], [], [], []
    for lam, center, permutation in zip(case.in_lam, case.in_center, case.in_permutation, strict=True):
        center = tuple(center.tolist())
        batch = cutmix(images, labels, lam=float(lam), center=center, permutation=torch.tensor(permutation))
        boxes.append(cutmix_box(9, 12, float(lam), center=center))
        shares.append(batch.lam)
        mixed.append(batch.images)
        logits = batch.images.flatten(1) @ torch.tensor(case.in_weight)
        losses.append(cutmix_loss(logits, batch.labels, batch.partner_labels, batch.lam))
    assert boxes == [tuple(box) for box in case.out_box.tolist()]
    case.close("out_lam", torch.tensor(shares, dtype=torch.float64))
    case.close("out_images", torch.stack(mixed))
    case.close("out_loss", torch.stack(losses))


# --- limits ---------------------------------------------------------------------------------------------------------


def test_all_kept_changes_nothing():
    batch = cutmix(IMAGES, LABELS, lam=1.0, generator=seeded())
    assert torch.equal(batch.images, IMAGES)
    assert batch.lam == 1
    top, bottom, left, right = cutmix_box(8, 10, 1.0, center=(3, 4))
    assert top == bottom or left == right
    logits = torch.randn(6, 4, generator=seeded())
    assert cutmix_loss(logits, *batch[1:]) == F.cross_entropy(logits, LABELS)


def test_nothing_kept_gives_the_partners():
    batch = cutmix(IMAGES, LABELS, lam=0.0, center=(4, 5), permutation=SHIFT)
    assert torch.equal(batch.images, IMAGES[SHIFT])
    assert batch.lam == 0
    logits = torch.randn(6, 4, generator=seeded())
    assert cutmix_loss(logits, *batch[1:]) == F.cross_entropy(logits, LABELS[SHIFT])


@pytest.mark.parametrize("per_sample", [False, True])
def test_the_share_is_that_of_pixels_left_as_they_were(per_sample):
    for seed in range(20):
        batch = cutmix(IMAGES, LABELS, permutation=SHIFT, per_sample=per_sample, generator=seeded(seed))
        own = (batch.images == IMAGES).all(1).float().mean((1, 2))
        assert torch.allclose(own, torch.as_tensor(batch.lam).expand(6), atol=1e-6)
        foreign = batch.images != IMAGES
        assert torch.equal(batch.images[foreign], IMAGES[SHIFT][foreign])


def test_an_image_that_is_its_own_partner_does_not_change():
    batch = cutmix(IMAGES, LABELS, permutation=torch.arange(6), generator=seeded(1))
    assert torch.equal(batch.images, IMAGES)
    logits = torch.randn(6, 4, generator=seeded())
    torch.testing.assert_close(cutmix_loss(logits, *batch[1:]), F.cross_entropy(logits, LABELS))


def test_boxes_are_clipped_at_the_border_and_odd_sides_lose_a_pixel():
    assert cutmix_box(10, 10, 0.0, center=(0, 9)) == (0, 5, 4, 10)
    assert cutmix_box(9, 12, 0.75, center=(4, 6)) == (2, 6, 3, 9)  # sides 4.5 and 6
    assert cutmix_box(9, 9, 1 - (3 / 9) ** 2 - 1e-9, center=(4, 4)) == (3, 5, 3, 5)  # a side of 3 pastes 2


def test_shares_follow_the_beta_distribution():
    def ends(alpha):
        large, draw = torch.zeros(400, 1, 64, 64), seeded()
        shares = cutmix(large, torch.zeros(400), alpha=alpha, center=(32, 32), per_sample=True, generator=draw).lam
        return float(((shares < 0.1) | (shares > 0.9)).float().mean())

    assert ends(1.0) == pytest.approx(0.2, abs=0.06)  # uniform
    assert ends(0.2) > 0.55


# --- labels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_sample", [False, True])
def test_the_loss_is_that_of_mixed_targets(per_sample):
    batch = cutmix(IMAGES, LABELS, per_sample=per_sample, generator=seeded(3))
    logits = torch.randn(6, 4, generator=seeded()).double()
    targets = mixed_targets(*batch[1:], num_classes=4)
    assert targets.shape == (6, 4)
    assert targets.dtype == torch.get_default_dtype()
    torch.testing.assert_close(targets.sum(1), torch.ones(6))
    torch.testing.assert_close(
        cutmix_loss(logits, *batch[1:]), F.cross_entropy(logits, targets.double()), rtol=1e-6, atol=0
    )


def test_each_label_is_smoothed_before_mixing():
    targets = mixed_targets(torch.tensor([0]), torch.tensor([1]), 0.75, num_classes=4, smoothing=0.2)
    torch.testing.assert_close(targets, torch.tensor([[0.75 * 0.8 + 0.05, 0.25 * 0.8 + 0.05, 0.05, 0.05]]))


def test_vectors_are_labels_too():
    vectors = torch.rand(6, 4, generator=seeded())
    batch = cutmix(IMAGES, vectors, permutation=SHIFT, generator=seeded(2))
    expected = batch.lam * vectors + (1 - batch.lam) * vectors[SHIFT]
    torch.testing.assert_close(mixed_targets(*batch[1:], num_classes=4), expected)


# --- tensors and randomness -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float64])
@pytest.mark.parametrize("per_sample", [False, True])
def test_dtype_and_memory_format_are_kept_and_the_input_is_not_written_to(dtype, per_sample):
    images = (255 * IMAGES).to(dtype).to(memory_format=torch.channels_last)
    before = images.clone()
    batch = cutmix(images, LABELS, per_sample=per_sample, generator=seeded(4))
    assert torch.equal(images, before)
    assert batch.images.dtype == dtype
    assert batch.images.is_contiguous(memory_format=torch.channels_last)


def test_the_same_generator_gives_the_same_batch(global_rng_untouched):
    one, two, three = (cutmix(IMAGES, LABELS, generator=seeded(seed)) for seed in (5, 5, 6))
    assert torch.equal(one.images, two.images)
    assert not torch.equal(one.images, three.images)
    cutmix(IMAGES, LABELS)


def test_per_sample_draws_differ_inside_the_batch():
    assert len(cutmix(IMAGES, LABELS, per_sample=True, generator=seeded()).lam.unique()) > 1


def test_masks_and_clips_are_pasted_alike():
    clips = torch.rand(6, 3, 2, 8, 10, generator=seeded())
    masks = torch.rand(6, 8, 10, generator=seeded())
    box = cutmix_box(8, 10, 0.5, center=(3, 5))
    for frame in range(2):
        assert torch.equal(paste(clips, box, SHIFT)[:, :, frame], paste(clips[:, :, frame], box, SHIFT))
    boxes = torch.tensor([box]).expand(6, 4)
    assert torch.equal(paste(masks, boxes, SHIFT), paste(masks, box, SHIFT))
    assert torch.equal(paste(clips, boxes, SHIFT), paste(clips, box, SHIFT))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 0.0}, "alpha is 0.0, but must be greater than 0"),
        ({"lam": 1.5}, "lam is 1.5, but must be at least 0 and at most 1"),
        ({"images": torch.rand(6, 8)}, r"images has shape \(6, 8\), but must be"),
        ({"permutation": torch.arange(5)}, r"permutation is \[0, 1, 2, 3, 4\], but must hold each of 0 to 5 once"),
        ({"permutation": torch.tensor([0, 0, 1, 2, 3, 4])}, "but must hold each of 0 to 5 once"),
        ({"labels": LABELS[:4]}, "labels has 4 rows, but must have one for each of the 6 images"),
    ],
)
def test_bad_input_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        cutmix(**{"images": IMAGES, "labels": LABELS, **changes})


def test_bad_settings_are_refused():
    with pytest.raises(InputError, match=r"probability is 1\.2, but must be at least 0 and at most 1"):
        CutMix(probability=1.2)
    with pytest.raises(InputError, match="alpha is -1, but must be"):
        CutMix(alpha=-1)
    with pytest.raises(InputError, match="lam is 2, but must be"):
        cutmix_box(8, 8, 2, center=(0, 0))


# --- the callback ---------------------------------------------------------------------------------------------------


def test_a_batch_is_mixed_with_the_probability_given():
    mix = CutMix(probability=0.25, generator=seeded())
    mixed = [not torch.equal(mix(IMAGES, LABELS).images, IMAGES) for _ in range(400)]
    assert 0.12 < sum(mixed) / 400 < 0.3  # some boxes are empty
    untouched = CutMix(probability=0.0)(IMAGES, LABELS)
    assert untouched.images is IMAGES
    logits = torch.randn(6, 4, generator=seeded())
    assert CutMix(probability=0.0).loss(logits, untouched) == F.cross_entropy(logits, LABELS)


class Seen(nn.Module):
    """A linear classifier that keeps what it is trained on."""

    def __init__(self):
        super().__init__()
        self.head, self.seen = nn.Linear(240, 4), []

    def forward(self, pixel_values):
        if self.training:
            self.seen.append(pixel_values)
        return self.head(pixel_values.flatten(1))


FORMS = {
    "pair": lambda: TensorData(IMAGES, LABELS),
    "keywords": lambda: TensorData({"pixel_values": IMAGES}, LABELS),
    "mapping": lambda: [{"pixel_values": IMAGES, "labels": LABELS}] * 3,
}


@pytest.mark.parametrize("form", FORMS)
def test_in_fit_every_form_of_batch_is_mixed(form):
    model, plain = Seen(), Seen()
    fit(plain, FORMS[form](), steps=3, batch_size=6)
    fit(model, FORMS[form](), steps=3, batch_size=6, callbacks=[CutMix(alpha=1.0, probability=1.0)])
    assert len(model.seen) == 3
    for mixed, images in zip(model.seen, plain.seen, strict=True):  # in one order
        assert not torch.equal(mixed, images)
        assert torch.isin(mixed, IMAGES).all()


def test_trains_a_real_vit(tiny_vit, digits_small):
    from retouch.core.batches import in_order
    from retouch.core.models import predict

    before = predict(tiny_vit, in_order(digits_small.test))
    plan = recipe(tiny_vit, digits_small.train, probability=1.0)
    model, history = plan.fit(steps=3, batch_size=32)
    assert len(history) == 3
    assert not torch.equal(predict(model, in_order(digits_small.test)), before)


def test_unlabelled_data_is_refused():
    with pytest.raises(InputError, match="CutMix mixes them"):
        fit(Seen(), TensorData(IMAGES), steps=1, callbacks=[CutMix(probability=1.0)])
