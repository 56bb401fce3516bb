"""CutMix: paste a box of one training image into another, and mix their labels by the area that was pasted.

    share     lam ~ Beta(alpha, alpha),  a partner pi(i) for every image i
    box       sides sqrt(1 - lam) of the image's, centre uniform, clipped at the border
    images    x_i outside of the box, x_pi(i) inside of it
    labels    lam' y_i + (1 - lam') y_pi(i),  lam' = 1 - area of the clipped box / area of the image

A network can then not rely on the most telling part of an object alone. Use it for image classifiers that are trained
long enough to overfit; not for short runs, where it only slows fitting, nor where a class is decided by a small detail
that the box may cut away. Do not smooth labels twice: smooth with `mixed_targets(smoothing=...)`.

Paper: arXiv 1905.04899 (equations 1 and 2). Code: clovaai/CutMix-PyTorch. They agree; the code's names for height and
width are swapped, consistently. An odd side loses a pixel and boxes near the border are smaller: both are kept, and are
why labels are mixed by the area pasted and not by the share drawn. `per_sample` (a box for every image) is timm's, not
the paper's. Accuracy on mixed batches against one label looks broken: weigh both.

Cost: a copy of the batch and of the box. Limits: one box for the whole batch unless `per_sample`; masks and other maps
must be cut alike, with `paste`. Feature CutMix is the same function on a feature map.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retouch.core import seeds
from retouch.core.cards import Card
from retouch.core.errors import InputError, in_range, positive
from retouch.core.loop import Callback, Run
from retouch.core.models import Batch, count_classes, images_of, replaced, unpack
from retouch.core.recipe import Recipe

CARD = Card(
    title="CutMix",
    room="train",
    paper="arXiv:1905.04899",
    shape="callback",
    line="Pastes boxes between training images and mixes their labels by area.",
    tags=("classification", "augmentation", "calibration"),
    plugin="CutMix",
)


class MixedBatch(NamedTuple):
    """Images with boxes pasted in, both labels of each, and the share of the first: one number, or one an image."""

    images: Tensor
    labels: Tensor
    partner_labels: Tensor
    lam: float | Tensor


def _boxes(height: int, width: int, lam: Tensor, centers: Tensor) -> Tensor:
    """Top, bottom, left and right (n, 4), ends exclusive, for shares (n,) and centres (n, 2) as (row, column)."""
    sides = torch.tensor([height, width])
    half = (sides * (1 - lam.double()).sqrt()[:, None]).long() // 2
    low = torch.maximum(centers - half, torch.zeros(2, dtype=torch.long))
    high = torch.minimum(centers + half, sides)
    return torch.stack([low[:, 0], high[:, 0], low[:, 1], high[:, 1]], 1)


def cutmix_box(height: int, width: int, lam: float, *, center: tuple[int, int]) -> tuple[int, int, int, int]:
    """The box to paste: (top, bottom, left, right), ends exclusive, clipped to the image.

    Args:
        height: of the image, in pixels.
        width: of the image.
        lam: share of the image to keep, before clipping.
        center: (row, column) of the box.
    """
    in_range("lam", lam, 0, 1)
    box = _boxes(height, width, torch.tensor([lam], dtype=torch.float64), torch.tensor([center]))
    top, bottom, left, right = box[0].tolist()
    return top, bottom, left, right


def paste(images: Tensor, box: tuple[int, int, int, int] | Tensor, permutation: Tensor) -> Tensor:
    """A copy of (n, ..., height, width) with each partner's box pasted in; also for masks and feature maps.

    Args:
        images: not changed.
        box: (top, bottom, left, right) for all, or (n, 4) with a box for each.
        permutation: partner of each image (n,).
    """
    if isinstance(box, tuple):
        top, bottom, left, right = box
        mixed = images.clone()
        mixed[..., top:bottom, left:right] = images[..., top:bottom, left:right][permutation]
        return mixed
    height, width = images.shape[-2:]
    rows, columns = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    edges = box.to(images.device)[:, :, None]  # (n, 4, 1), to be compared with rows and columns
    inside_rows = (rows >= edges[:, 0]) & (rows < edges[:, 1])
    inside = inside_rows[:, :, None] & ((columns >= edges[:, 2]) & (columns < edges[:, 3]))[:, None, :]
    inside = inside.view(len(images), *[1] * (images.ndim - 3), height, width)
    return torch.where(inside, images[permutation], images).contiguous(memory_format=_format(images))


def _format(images: Tensor) -> torch.memory_format:
    last = images.ndim == 4 and images.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last and not images.is_contiguous() else torch.contiguous_format


def cutmix(
    images: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    lam: float | None = None,
    center: tuple[int, int] | None = None,
    permutation: Tensor | None = None,
    per_sample: bool = False,
    generator: torch.Generator | None = None,
) -> MixedBatch:
    """Paste a random box of a random partner into every image (section 3.1).

    Args:
        images: (n, ..., height, width), of any dtype; not written to.
        labels: class ids (n,), or distributions or multi-label vectors (n, k).
        alpha: > 0; of the Beta distribution that `lam` is drawn from.
        lam: share to keep before clipping, 0 to 1; drawn if None.
        center: (row, column) of the box; drawn uniformly if None.
        permutation: partner of each image; drawn if None, with partners that may be the image itself.
        per_sample: draw share and box for every image instead of once.
        generator: a CPU generator.

    Returns:
        The mixed batch; its `lam` is the share of each image's own pixels after clipping, a float, or (n,) per sample.
    """
    positive("alpha", alpha)
    if images.ndim < 3:
        raise InputError(f"images has shape {tuple(images.shape)}, but must be (n, ..., height, width)")
    if len(labels) != len(images):
        raise InputError(f"labels has {len(labels)} rows, but must have one for each of the {len(images)} images")
    if lam is not None:
        in_range("lam", lam, 0, 1)
    generator = seeds.fresh(generator)
    (height, width), count = images.shape[-2:], len(images) if per_sample else 1
    if lam is None:
        draw = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
        shares = torch.from_numpy(draw.beta(alpha, alpha, count))
    else:
        shares = torch.full((count,), lam, dtype=torch.float64)
    if permutation is None:
        permutation = torch.randperm(len(images), generator=generator)
    elif sorted(permutation.tolist()) != list(range(len(images))):
        raise InputError(f"permutation is {permutation.tolist()}, but must hold each of 0 to {len(images) - 1} once")
    if center is None:
        sides = [torch.randint(side, (count,), generator=generator) for side in (height, width)]
        centers = torch.stack(sides, 1)
    else:
        centers = torch.tensor([center]).expand(count, 2)
    boxes = _boxes(height, width, shares, centers)
    kept = 1 - (boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2]) / (height * width)
    permutation = permutation.to(images.device)
    box: Any = boxes if per_sample else tuple(boxes[0].tolist())
    share = kept.to(images.device, torch.get_default_dtype()) if per_sample else float(kept.double())
    return MixedBatch(paste(images, box, permutation), labels, labels[permutation.to(labels.device)], share)


def cutmix_loss(
    logits: Tensor,
    labels: Tensor,
    partner_labels: Tensor,
    lam: float | Tensor,
    *,
    loss_fn: Callable[..., Tensor] = F.cross_entropy,
) -> Tensor:
    """lam * loss(labels) + (1 - lam) * loss(partner_labels) (equation 1).

    With a `lam` for each sample, `loss_fn` is called with reduction="none" and the mean is taken.
    """
    if not isinstance(lam, Tensor):
        return lam * loss_fn(logits, labels) + (1 - lam) * loss_fn(logits, partner_labels)
    own, other = (loss_fn(logits, target, reduction="none") for target in (labels, partner_labels))
    return (lam * own + (1 - lam) * other).mean()


def mixed_targets(
    labels: Tensor, partner_labels: Tensor, lam: float | Tensor, *, num_classes: int, smoothing: float = 0.0
) -> Tensor:
    """Both labels as one distribution (n, num_classes); rows sum to 1 for class ids.

    Args:
        labels: class ids (n,), or vectors (n, num_classes).
        partner_labels: likewise.
        lam: share of `labels`, a number or (n,).
        num_classes: of the distribution.
        smoothing: 0 to 1, of each label before they are mixed.
    """
    in_range("smoothing", smoothing, 0, 1)

    def vectors(ids: Tensor) -> Tensor:
        rows = ids if ids.ndim > 1 else F.one_hot(ids.long(), num_classes)
        return (1 - smoothing) * rows.to(torch.get_default_dtype()) + smoothing / num_classes

    share = lam[:, None] if isinstance(lam, Tensor) else lam
    return share * vectors(labels) + (1 - share) * vectors(partner_labels)


class CutMix(Callback):
    """CutMix for `fit(callbacks=[...])`, or for a loop of one's own as `batch = mix(images, labels)`.

    In `fit`, batches keep their form and targets become distributions.

    Args:
        alpha: of the Beta distribution.
        probability: of mixing a batch at all.
        per_sample: a box for every image.
        generator: of the draws outside of `fit`; there, the run's own is used.
    """

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        probability: float = 0.5,
        per_sample: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        positive("alpha", alpha)
        in_range("probability", probability, 0, 1)
        self.alpha, self.probability, self.per_sample, self.generator = alpha, probability, per_sample, generator
        self.classes: int | None = None

    def __call__(self, images: Tensor, labels: Tensor, *, generator: torch.Generator | None = None) -> MixedBatch:
        """Mix a batch with this object's probability; else it comes back with itself as its partner."""
        generator = seeds.fresh(generator or self.generator)
        if float(torch.rand((), generator=generator)) >= self.probability:
            return MixedBatch(images, labels, labels, 1.0)
        return cutmix(images, labels, alpha=self.alpha, per_sample=self.per_sample, generator=generator)

    def loss(self, logits: Tensor, batch: MixedBatch, *, loss_fn: Callable[..., Tensor] = F.cross_entropy) -> Tensor:
        """The mixed loss of a batch that this object gave."""
        return cutmix_loss(logits, batch.labels, batch.partner_labels, batch.lam, loss_fn=loss_fn)

    def on_start(self, run: Run) -> None:
        self.classes = None

    def on_batch(self, run: Run, batch: Batch) -> Batch:
        labels = unpack(batch)[1]
        if labels is None:
            raise InputError("The batch has no targets, but CutMix mixes them: samples must be (input, target)")
        if self.classes is None:
            self.classes = count_classes(run.module, [batch])
        mixed = self(images_of(batch), labels, generator=run.generator)
        targets = mixed_targets(mixed.labels, mixed.partner_labels, mixed.lam, num_classes=self.classes)
        return replaced(batch, images=mixed.images, targets=targets)


def recipe(
    model: nn.Module,
    data: Any,
    validation: Any = None,
    *,
    alpha: float = 1.0,
    probability: float = 0.5,
    per_sample: bool = False,
) -> Recipe:
    """Train a classifier with CutMix.

    Args:
        model: image classifier.
        data: labelled images.
        validation: not used.
        alpha: of the Beta distribution that the share to keep is drawn from; 1 is uniform.
        probability: of mixing a batch; 0.5 for small images, 1 for large ones.
        per_sample: a box for every image instead of one for the batch.
    """
    mix = CutMix(alpha=alpha, probability=probability, per_sample=per_sample)
    return Recipe(model=model, data=data, callbacks=[mix])
