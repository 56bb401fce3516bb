"""Explaining patches of an image: the drawing of each shape in each style that comes nearest to what is there.

For a shape, a style, a position and a radius, `paint` gives alpha, shade and gloss of each pixel, and the difference
between image and background is

    alpha * gloss - background * alpha + colour * w                 with w = alpha * shade * (1 - gloss)

It is linear in the colour, so the best colour and its error are in closed form. Position, radius and blur (a mixture of
the drawing and the drawing through a Gaussian of one pixel) are found by Gauss-Newton on that error. The derivatives
come from differences between neighbouring pixels of the drawing, which costs no further drawing.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from retouch.worlds.shapes.drawing import paint, reach
from retouch.worlds.shapes.scenes import COLOURS, EXTENTS, SHAPES, SIZES, STYLES

PALETTE = 0.2  # weight of a colour's distance to the nearest named colour, against the error of the drawing
BLUR = 0.3  # at the start
BETWEEN = 0.152  # radius up to which a component counts as a small thing at first, as a share of the image's side
SMALLEST, LARGEST = 0.04, 0.3  # radius, as a share of the image's side

_NAMED = torch.tensor(list(COLOURS.values()))
_EXTENTS = torch.tensor([EXTENTS[name] for name in SHAPES])


@dataclass
class Patches:
    """Square pieces of images, each around one component.

    Args:
        pixels: difference from the background (k, 3, p, p).
        background: colour (k, 3).
        weight: 1 where a pixel counts, 0 where it belongs to another component or lies outside of the image (k, p, p).
        rows: of the patch in the image (k, p).
        columns: likewise.
        boxes: upper, lower, left and right edge of the component in pixels (k, 4).
        size: side of the image.
    """

    pixels: Tensor
    background: Tensor
    weight: Tensor
    rows: Tensor
    columns: Tensor
    boxes: Tensor
    size: int

    def __post_init__(self) -> None:
        self.energy = self.pixels.square().sum((1, 2, 3))

    def __len__(self) -> int:
        return len(self.pixels)


@dataclass
class Fits:
    """Drawings fitted to patches.

    Args:
        patch: number of the patch each is for (m,).
        shape: number in `SHAPES` (m,).
        style: number in `STYLES` (m,).
        place: x, y and radius in pixels, and blur 0 to 1 (m, 4).
        colour: (m, 3).
        power: sum of w^2 (m,).
        error: sum of squares over the patch (m,).
        cost: error plus the penalty for colours that have no name (m,).
    """

    patch: Tensor
    shape: Tensor
    style: Tensor
    place: Tensor
    colour: Tensor
    power: Tensor
    error: Tensor
    cost: Tensor

    def __getitem__(self, rows: Tensor) -> "Fits":
        return Fits(*(getattr(self, f.name)[rows] for f in fields(self)))

    def better(self, other: "Fits") -> "Fits":
        """Of each two fits the one of less cost."""
        won = other.cost < self.cost
        pairs = [(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)]
        return Fits(*(torch.where(won if a.ndim == 1 else won[:, None], b, a) for a, b in pairs))


def smooth(x: Tensor) -> Tensor:
    """Images (..., p, p) through a Gaussian of one pixel, zero outside."""
    for axis in (-1, -2):
        n = x.shape[axis]
        y = 0.4026 * x
        for step, share in ((1, 0.2442), (2, 0.0545)):
            y.narrow(axis, step, n - step).add_(x.narrow(axis, 0, n - step), alpha=share)
            y.narrow(axis, 0, n - step).add_(x.narrow(axis, step, n - step), alpha=share)
        x = y
    return x


def slope(x: Tensor, axis: int) -> Tensor:
    """Differences between neighbours (..., p, p), zero at the ends."""
    n = x.shape[axis]
    y = torch.zeros_like(x)
    y.narrow(axis, 1, n - 2).copy_(x.narrow(axis, 2, n - 2)).sub_(x.narrow(axis, 0, n - 2)).mul_(0.5)
    return y


def named(colour: Tensor) -> Tensor:
    """Squared distance (..., colours) to each named colour."""
    return (colour[..., None, :] - _NAMED).square().sum(-1)


def explain(patches: Patches) -> tuple[Fits, Tensor]:
    """The best drawing for each patch, and the least cost found of every shape and style (k, shapes, styles).

    All shapes and styles are drawn where they fill the component's box; each shape's best style takes one step; the
    three best shapes then take one step in every style, and the three best of those drawings three more.
    """
    k, s, t = len(patches), len(SHAPES), len(STYLES)
    fits = _rough(patches)
    costs = fits.cost.clone()
    fits = _refine(patches, fits[_least(fits.cost, k * s, 1)], 1)
    fits = fits[_least(fits.cost, k, 3)]
    fits = fits[torch.arange(len(fits.cost)).repeat_interleave(t)]
    fits = replace(fits, style=torch.arange(t).repeat(3 * k), cost=torch.full_like(fits.cost, torch.inf))
    fits = _refine(patches, fits, 1)
    costs = costs.scatter_reduce(0, (fits.patch * s + fits.shape) * t + fits.style, fits.cost, "amin")
    fits = _refine(patches, fits[_least(fits.cost, k, 3)], 3)
    costs = costs.scatter_reduce(0, (fits.patch * s + fits.shape) * t + fits.style, fits.cost, "amin")
    return fits[_least(fits.cost, k, 1)], costs.view(k, s, t)


def draw(patches: Patches, fits: Fits) -> Tensor:
    """The drawings themselves, as differences from the background (m, 3, p, p)."""
    drawn = _Drawn(patches, fits.patch, fits.shape, fits.style, fits.place)
    return torch.einsum("mlhw,mlc->mchw", drawn.maps, drawn.mixture)


def _least(cost: Tensor, groups: int, count: int) -> Tensor:
    """Positions of the least costs in each of the groups that they fall into one after the other."""
    cost = cost.view(groups, -1)
    return (cost.topk(count, 1, largest=False).indices + torch.arange(groups)[:, None] * cost.shape[1]).flatten()


def _rough(patches: Patches) -> Fits:
    """Every shape in every style, where it fills the component's box; k * shapes * styles of them, in that order."""
    top, bottom, left, right = patches.boxes.T[:, :, None]  # (k, 1) each
    west, east, north, south = _EXTENTS.T
    radius = ((right - left) / (west + east) + (bottom - top) / (north + south)) / 2
    # A component is larger than its thing by an unknown blur, and the likely radii are known.
    small, large = (radius * patches.size for radius in SIZES.values())
    radius = torch.where(radius < BETWEEN * patches.size, small, large)
    x = (left + right) / 2 - (east - west) / 2 * radius
    y = (top + bottom) / 2 - (south - north) / 2 * radius
    place = torch.stack([x, y, radius, torch.full_like(x, BLUR)], -1).flatten(0, 1)
    patch, shape = torch.cartesian_prod(torch.arange(len(patches)), torch.arange(len(SHAPES))).T
    border = reach(shape, *_axes(patches, patch, place), place[:, 2])
    again = torch.arange(len(patch)).repeat_interleave(len(STYLES))  # a shape's border serves all styles
    style = torch.arange(len(STYLES)).repeat(len(patch))
    return _Drawn(patches, patch[again], shape[again], style, place[again], border[again]).fits


def _refine(patches: Patches, fits: Fits, steps: int) -> Fits:
    """Each drawing at the best of the places that some steps of Gauss-Newton lead to from where it was."""
    best, now = fits, fits
    for step in range(steps + 1):
        drawn = _Drawn(patches, now.patch, now.shape, now.style, now.place)
        best = best.better(drawn.fits)
        if step < steps:
            now = replace(now, place=drawn.next_place())
    return best


def _axes(patches: Patches, patch: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels to the right of (m, 1, p) and below (m, p, 1) the centres."""
    u = (patches.columns[patch] + 0.5 - place[:, :1])[:, None]
    v = (patches.rows[patch] + 0.5 - place[:, 1:2])[:, :, None]
    return u, v


class _Drawn:
    """Drawings of given shapes, styles and places with their best colours, and what is needed to improve the places.

    Image and derivatives are combinations of a few maps of one channel, so all sums over pixels that are needed are the
    products of those maps with each other and with the patch.
    """

    def __init__(
        self,
        patches: Patches,
        patch: Tensor,
        shape: Tensor,
        style: Tensor,
        place: Tensor,
        border: Tensor | None = None,
    ) -> None:
        self.limits = SMALLEST * patches.size, LARGEST * patches.size
        self.u, self.v = _axes(patches, patch, place)
        border = reach(shape, self.u, self.v, place[:, 2]) if border is None else border
        alpha, shade, gloss = paint(border, style, self.u, self.v, place[:, 2], patches.size)
        maps = torch.stack([alpha * shade * (1 - gloss), alpha, alpha * gloss], 1)
        keep = patches.weight[patch][:, None]
        self.change = (smooth(maps) - maps).mul_(keep)
        self.maps = maps.mul_(keep).addcmul_(self.change, place[:, 3].view(-1, 1, 1, 1))
        self.pixels = patches.pixels[patch].flatten(2).mT  # (m, p * p, 3)
        flat = self.maps.flatten(2)
        own, seen = flat @ flat.mT, flat @ self.pixels  # (m, 3, 3): of maps with maps, and of maps with channels
        # What is known of the mixture of maps: alpha takes the background away, gloss adds white.
        mixture = torch.stack([torch.zeros(len(patch), 3), -patches.background[patch], torch.ones(len(patch), 3)], 1)
        power = own[:, 0, 0] + 1e-6
        mixture[:, 0] = (seen[:, 0] - (own[:, :1] @ mixture)[:, 0]) / power[:, None]
        error = patches.energy[patch] + ((own @ mixture - 2 * seen) * mixture).sum((1, 2))
        cost = error + PALETTE * power * named(mixture[:, 0]).amin(-1)
        self.mixture, self.fits = mixture, Fits(patch, shape, style, place, mixture[:, 0], power, error, cost)

    def next_place(self) -> Tensor:
        """Position, radius and blur after one step of Gauss-Newton, the colours following."""
        fits, m = self.fits, len(self.maps)
        east, south = slope(self.maps, -1), slope(self.maps, -2)
        wider = (self.u[:, None] * east).addcmul_(self.v[:, None], south).div_(fits.place[:, 2].view(-1, 1, 1, 1))
        maps = torch.stack([self.maps, east, south, wider, self.change], 1).flatten(3).flatten(1, 2)  # (m, 15, p * p)
        sign = torch.tensor([1.0, -1, -1, -1, 1]).repeat_interleave(3)[:, None]
        products = (maps @ maps.mT) * sign * sign.T
        seen = ((maps @ self.pixels) * sign).view(m, 5, 3, 3)
        products = products.view(m, 5, 3, 5, 3)
        mixed = torch.einsum("makbl,mlc->makbc", products, self.mixture)  # maps with derivatives
        along = (self.mixture[:, None] * (seen - mixed[:, :, :, 0])).sum((2, 3))[:, 1:]  # derivatives with what is left
        share = mixed[:, 0, 0, 1:]  # of each derivative, what another colour would do as well (m, 4, 3)
        normal = torch.einsum("makbc,mkc->mab", mixed[:, 1:, :, 1:], self.mixture)
        normal = normal - share @ share.mT / fits.power.view(-1, 1, 1)
        normal = normal + torch.diag_embed(1e-3 * normal.diagonal(dim1=1, dim2=2).abs() + 1e-4)
        move = torch.linalg.solve(normal, along[..., None])[..., 0]
        x, y, radius, blur = (fits.place + move.clamp(-1, 1)).unbind(1)
        return torch.stack([x, y, radius.clamp(*self.limits), blur.clamp(0, 1)], 1)
