"""What stands out from the background of an image, in pieces: the first half of reading it.

    background(images)          median colour of the frame, and how noisy the plain parts are
    components(difference)      connected pieces of what differs from it
    cut(...)                    a patch of pixels around each, for `fitting`

Where a piece cannot be explained as one thing, `parted`, `by_colour` and `uncovered` are three ways to cut it further.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from retouch.worlds.shapes.drawing import REACH
from retouch.worlds.shapes.fitting import Patches
from retouch.worlds.shapes.scenes import SIZES

THRESHOLD = 0.12  # distance from the background's colour, averaged over 3 x 3 pixels, from which on a pixel stands out
EDGE = 0.3  # share of the strongest of the 5 x 5 pixels around: keeps what lies between two things out
SMALLEST = 0.004  # share of the image below which a piece is noise
PLAIN = 0.15  # distance from the frame's colour up to which a pixel counts as background
EXTRA = 3  # pixels that a component may be larger than what is drawn, because of blur


@dataclass
class Components:
    """Pieces of foreground.

    Args:
        labels: number of the piece from 1 on, 0 for background (n, h, w).
        image: which image each piece is in (k,).
        boxes: first and last row, exclusive, and first and last column (k, 4).
        areas: pixels (k,).
    """

    labels: Tensor
    image: Tensor
    boxes: Tensor
    areas: Tensor

    def __len__(self) -> int:
        return len(self.image)


def background(images: Tensor) -> tuple[Tensor, Tensor]:
    """Colour (n, 3) of images (n, 3, h, w), and the standard deviation around it in its plain parts (n,)."""
    sides = images[:, :, :2], images[:, :, -2:], images[..., :2], images[..., -2:]
    middle = torch.cat([side.flatten(2) for side in sides], 2).median(2).values
    plain = ((images - middle[:, :, None, None]).square().sum(1) < PLAIN**2).float()
    count = plain.sum((1, 2)).clamp(min=1)
    colour = torch.einsum("nchw,nhw->nc", images, plain) / count[:, None]
    spread = torch.einsum("nchw,nhw->n", (images - colour[:, :, None, None]).square(), plain) / (3 * count)
    return colour, spread.sqrt()


def components(difference: Tensor) -> Components:
    """Connected pieces of what differs from the background.

    Args:
        difference: images minus the colour of their backgrounds (n, 3, h, w).
    """
    raw = difference.square().sum(1).sqrt()
    smooth = F.avg_pool2d(F.pad(difference, (1,) * 4, mode="replicate"), 3, 1).square().sum(1).sqrt()
    nearby = F.max_pool2d(raw[:, None], 5, 1, 2)[:, 0]
    return _boxed(_connected((smooth > THRESHOLD) & (raw > EDGE * nearby)))


def _connected(mask: Tensor) -> np.ndarray:
    """Number of the connected piece, corners touching, that each pixel of masks (n, h, w) is in; 0 outside."""
    from scipy import ndimage

    within = np.zeros((3, 3, 3), dtype=bool)
    within[1] = True  # not from one image to the next
    return ndimage.label(mask.numpy(), within)[0]


def _boxed(labels: np.ndarray) -> Components:
    """Numbered pieces (n, h, w) without those that are too small, numbered anew."""
    from scipy import ndimage

    areas = np.bincount(labels.ravel(), minlength=1)[1:]
    kept = (areas >= SMALLEST * labels[0].size).nonzero()[0]
    slices = ndimage.find_objects(labels)
    bounds = [[(s.start, s.stop) for s in slices[i]] for i in kept]
    numbers = np.zeros(len(areas) + 1, dtype=np.int64)
    numbers[kept + 1] = np.arange(1, len(kept) + 1)
    image = torch.tensor([b[0][0] for b in bounds], dtype=torch.long)
    boxes = torch.tensor([[*b[1], *b[2]] for b in bounds], dtype=torch.float32).reshape(-1, 4)
    return Components(torch.from_numpy(numbers[labels]), image, boxes, torch.from_numpy(areas[kept]))


def parted(found: Components, which: Tensor) -> Components:
    """Some components cut where they are narrow, holes counting as filled: for things that touch.

    Args:
        found: the components.
        which: numbers, from 0 on, of those to cut.
    """
    from scipy import ndimage

    kernel = np.ones((3, 3), dtype=bool)
    rounds = round(found.labels.shape[-1] / 32)

    def cores(own: np.ndarray, image: int) -> np.ndarray:
        thin = ndimage.binary_erosion(ndimage.binary_fill_holes(own), kernel, rounds)
        return ndimage.label(thin, kernel)[0]

    return _recut(found, which, cores)


def by_colour(found: Components, which: Tensor, images: Tensor) -> Components:
    """Some components cut into two of different colours: for things that touch.

    Args:
        found: the components.
        which: numbers, from 0 on, of those to cut.
        images: (n, 3, h, w).
    """
    from scipy import ndimage

    hues = (images / images.amax(1, keepdim=True).clamp(min=0.1)).permute(0, 2, 3, 1).numpy()  # as if without shade

    def cores(own: np.ndarray, image: int) -> np.ndarray:
        pixels = hues[image][own]
        middle = pixels.mean(0)
        axis = np.linalg.svd(pixels - middle, full_matrices=False)[2][0]
        side = (pixels - middle) @ axis > 0
        for _ in range(5):  # two means
            if side.all() or not side.any():
                break
            one, other = pixels[side].mean(0), pixels[~side].mean(0)
            side = np.square(pixels - one).sum(1) < np.square(pixels - other).sum(1)
        labels = np.zeros(own.shape, dtype=np.int64)
        for number, chosen in enumerate((side, ~side), start=1):
            part = own.copy()
            part[own] = chosen
            pieces, count = ndimage.label(part)
            if count:
                labels[pieces == 1 + np.bincount(pieces.ravel())[1:].argmax()] = number  # the largest piece
        return labels

    return _recut(found, which, cores)


def _recut(found: Components, which: Tensor, cores: Callable[[np.ndarray, int], np.ndarray]) -> Components:
    """Components cut anew: each pixel goes to the nearest of the cores that a function finds in a mask and image."""
    from scipy import ndimage

    labels = found.labels.numpy().copy()
    for number in which.tolist():
        image = int(found.image[number])
        own = labels[image] == number + 1
        seeds = cores(own, image)
        if seeds.max() > 1:
            nearest = ndimage.distance_transform_edt(seeds == 0, return_distances=False, return_indices=True)
            labels[image][own] = (seeds[tuple(nearest)] + labels.max())[own]
    return _boxed(labels)


def uncovered(found: Components, which: Tensor, left: Tensor, difference: Tensor) -> Components:
    """Some components without what their drawings leave unexplained, which becomes components of its own.

    Args:
        found: the components.
        which: numbers, from 0 on, of those to cut.
        left: images minus their explanation (n, 3, h, w).
        difference: images minus the colour of their backgrounds (n, 3, h, w).
    """
    share = F.avg_pool2d(left.square().sum(1), 3, 1, 1) / F.avg_pool2d(difference.square().sum(1), 3, 1, 1)
    rest = torch.isin(found.labels, which + 1) & (share > 0.5)
    labels = _connected(rest)
    return _boxed(np.where(rest, labels + (labels > 0) * len(found), found.labels.numpy()))


def cut(difference: Tensor, colour: Tensor, found: Components) -> Iterator[tuple[Tensor, Patches]]:
    """Patches around the components, in groups of one size each, with the components' numbers.

    Args:
        difference: images minus the colour of their backgrounds (n, 3, h, w).
        colour: of the backgrounds (n, 3).
        found: the components.
    """
    size = difference.shape[-1]
    longest = torch.maximum(found.boxes[:, 1] - found.boxes[:, 0], found.boxes[:, 3] - found.boxes[:, 2])
    smaller = longest <= 2 * REACH * SIZES["small"] * size + EXTRA
    for name, chosen in (("small", smaller), ("large", ~smaller)):
        numbers = chosen.nonzero()[:, 0]
        if len(numbers):
            yield numbers, _cut(difference, colour, found, numbers, round(REACH * SIZES[name] * size) + EXTRA)


def _cut(difference: Tensor, colour: Tensor, found: Components, numbers: Tensor, half: int) -> Patches:
    size = difference.shape[-1]
    image, boxes = found.image[numbers], found.boxes[numbers]
    steps = torch.arange(-half, half + 1)
    rows = ((boxes[:, 0] + boxes[:, 1]) / 2).long()[:, None] + steps
    columns = ((boxes[:, 2] + boxes[:, 3]) / 2).long()[:, None] + steps
    inside = ((rows >= 0) & (rows < size))[:, :, None] & ((columns >= 0) & (columns < size))[:, None]
    where = image[:, None, None], rows.clamp(0, size - 1)[:, :, None], columns.clamp(0, size - 1)[:, None]
    labels = found.labels[where]
    own = labels == numbers[:, None, None] + 1
    others = F.max_pool2d(((labels != 0) & ~own).float()[:, None], 3, 1, 1)[:, 0] > 0  # with their blurred borders
    weight = (inside & (own | ~others)).float()
    pixels = difference.permute(0, 2, 3, 1)[where].permute(0, 3, 1, 2) * weight[:, None]
    return Patches(pixels, colour[image], weight, rows, columns, boxes, size)


def subtract(images: Tensor, image: Tensor, patches: Patches, drawn: Tensor) -> Tensor:
    """Images (n, 3, h, w) less the drawings (k, 3, p, p) that patches of the images with numbers `image` (k,) got."""
    left = images.permute(0, 2, 3, 1).clone()
    last = images.shape[-1] - 1
    where = image[:, None, None], patches.rows.clamp(0, last)[:, :, None], patches.columns.clamp(0, last)[:, None]
    left.index_put_(where, -drawn.permute(0, 2, 3, 1), accumulate=True)  # drawings are zero outside of the image
    return left.permute(0, 3, 1, 2)
