"""Drawing scenes: anti-aliased images, and the exact masks and layers that they consist of.

A shape is a signed distance (negative inside); its coverage of a pixel is that distance, in pixels, cut to a ramp one
pixel wide. A style turns distance and position into three numbers a pixel, from which the pixel's colour follows:

    alpha         how much of the pixel the thing covers
    shade         factor on the thing's colour (dark stripes, soft shadow)
    gloss         share of white (highlight)
    colour        thing's colour * shade * (1 - gloss) + gloss
    image         image * (1 - alpha) + colour * alpha, things from back to front

All of it works on many things at once, each in its own small patch of pixels.
"""

from collections.abc import Sequence
from math import ceil, cos, hypot, pi, sin, sqrt

import torch
from torch import Tensor

from retouch.core.errors import InputError, in_range
from retouch.worlds.shapes.scenes import (
    BACKGROUNDS,
    CIRCLE,
    COLOURS,
    CROSS,
    CROSS_ARM,
    HEART,
    SHAPES,
    SIZES,
    SQUARE,
    STAR,
    STAR_INNER,
    STYLES,
    TRIANGLE,
    Scene,
    Thing,
)

REACH = 1.2  # radius of the circle around every shape, in the thing's radii
LINE = 0.036  # width of an outline, as a share of the image's side
STRIPES = 0.09  # from one stripe to the next
DARK = 0.55  # shade of the dark stripes
CHUNK = 256  # scenes rendered at once


def distance(shape: str, u: Tensor, v: Tensor) -> Tensor:
    """Signed distance to a shape's border, negative inside, all lengths in radii.

    Exact near the border except just outside of corners, where it is the distance to the extended sides; this keeps
    corners sharp.

    Args:
        shape: one of `SHAPES`.
        u: to the right of the centre, any form.
        v: below the centre.
    """
    if shape == "circle":
        return torch.hypot(u, v) - CIRCLE
    if shape == "square":
        return torch.maximum(u.abs(), v.abs()) - SQUARE
    if shape == "triangle":
        return torch.maximum(v, u.abs() * (sqrt(3) / 2) - v / 2) - TRIANGLE / 2
    if shape == "cross":
        long, short = torch.maximum(u.abs(), v.abs()), torch.minimum(u.abs(), v.abs())
        return torch.maximum(long - CROSS, short - CROSS_ARM)
    if shape == "heart":  # a square that stands on its corner, and a half circle on each of its upper sides
        u = u.abs()
        arc = torch.hypot(u - HEART * sqrt(0.5), v + HEART * sqrt(0.5)) - HEART
        notch = torch.hypot(u, v + HEART * sqrt(2))
        side = torch.maximum((u + v) * sqrt(0.5) - HEART, -notch)
        return torch.where(u - v > HEART * sqrt(2), arc, side)
    # The star's ten sides are one side, mirrored: fold the plane into the tenth of it that holds this side.
    turn = torch.atan2(u, -v)
    turn = (turn - (2 * pi / 5) * torch.round(turn / (2 * pi / 5))).abs()
    rho = torch.hypot(u, v)
    back, across = STAR - STAR_INNER * cos(pi / 5), STAR_INNER * sin(pi / 5)  # from a point to the corner beside it
    return ((rho * turn.cos() - STAR) * across + rho * turn.sin() * back) / hypot(back, across)


def reach(shape: Tensor, u: Tensor, v: Tensor, radius: Tensor) -> Tensor:
    """Signed distance in pixels to the border of k things, each in a patch of pixels, negative inside.

    Args:
        shape: number in `SHAPES` (k,).
        u: pixels to the right of the thing's centre, (k, h, w) or broadcastable to it.
        v: pixels below it.
        radius: in pixels (k,).
    """
    r = radius.view(-1, 1, 1)
    u, v = torch.broadcast_tensors(u / r, v / r)
    found = torch.empty_like(u)
    for number, name in enumerate(SHAPES):
        rows = (shape == number).nonzero()[:, 0]
        if len(rows):
            found[rows] = distance(name, u[rows], v[rows])
    return found * r


def paint(
    reach: Tensor, style: Tensor, u: Tensor, v: Tensor, radius: Tensor, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Alpha, shade and gloss (k, h, w) of k things.

    Args:
        reach: signed distance in pixels to each thing's border (k, h, w).
        style: number in `STYLES` (k,).
        u: pixels to the right of the thing's centre, (k, h, w) or broadcastable to it.
        v: pixels below it.
        radius: in pixels (k,).
        size: side of the image in pixels, which sets the width of lines and stripes.
    """
    alpha = (0.5 - reach).clamp(0, 1)
    shade, gloss = torch.ones_like(alpha), torch.zeros_like(alpha)
    rows = (style == STYLES.index("outlined")).nonzero()[:, 0]
    if len(rows):
        alpha[rows] -= (0.5 - LINE * size - reach[rows]).clamp(0, 1)
    rows = (style == STYLES.index("hatched")).nonzero()[:, 0]
    if len(rows):
        period = STRIPES * size
        phase = (u[rows] + v[rows]) * (sqrt(0.5) / period)
        beyond = ((phase - phase.round()).abs() - 0.25) * period  # pixels outside of the nearest dark stripe
        shade[rows] = DARK + (1 - DARK) * (0.5 + beyond).clamp(0, 1)
    rows = (style == STYLES.index("glossy")).nonzero()[:, 0]
    if len(rows):
        r = radius[rows].view(-1, 1, 1)
        a, b = u[rows] / r, v[rows] / r
        shade[rows] = 1 - 0.25 * (0.5 + 0.45 * (a + b)).clamp(0, 1.4)
        gloss[rows] = 0.9 * (-((a + 0.2) ** 2 + (b + 0.25) ** 2) / 0.09).exp()
    return alpha, shade, gloss


def render(scenes: Scene | Sequence[Scene], size: int = 64) -> Tensor:
    """Images of scenes in 0 to 1: (3, size, size) for one scene, (n, 3, size, size) for a sequence of them.

    Raises:
        InputError: if the size is below 32, where small shapes cannot be told apart.
    """
    check_size(size)
    if isinstance(scenes, Scene):
        return _render([scenes], size)[0]
    if not len(scenes):
        return torch.zeros(0, 3, size, size)
    return torch.cat([_render(scenes[i : i + CHUNK], size) for i in range(0, len(scenes), CHUNK)])


def check_size(size: int) -> None:
    """Raise unless images can have this side length."""
    in_range("size", size, 32)


def _render(scenes: Sequence[Scene], size: int) -> Tensor:
    pad = _half(size) * 2 + 1
    canvas = torch.tensor([BACKGROUNDS[s.background] for s in scenes])[:, None, None]
    canvas = canvas.expand(-1, size + 2 * pad, size + 2 * pad, 3).clone()
    for depth in range(max(len(s.things) for s in scenes)):
        which = [i for i, s in enumerate(scenes) if len(s.things) > depth]
        patches = _Patches([scenes[i].things[depth] for i in which], size)
        where = torch.tensor(which)[:, None, None], patches.rows[:, :, None] + pad, patches.columns[:, None] + pad
        alpha = patches.alpha[..., None]
        canvas[where] = canvas[where] * (1 - alpha) + patches.colour * alpha
    return canvas[:, pad:-pad, pad:-pad].permute(0, 3, 1, 2).contiguous()


class _Patches:
    """Things drawn in patches: `alpha` (k, p, p), `colour` (k, p, p, 3), and the `rows` and `columns` (k, p) they fill.

    `silhouette` is the shape filled, whatever the style.
    """

    def __init__(self, things: Sequence[Thing], size: int) -> None:
        half = _half(size)
        numbers = [
            (SHAPES.index(t.shape), STYLES.index(t.style), t.x * size, t.y * size, t.radius * size, t.opacity)
            for t in things
        ]
        shape, style, x, y, radius, opacity = torch.tensor(numbers, dtype=torch.float32).T
        steps = torch.arange(-half, half + 1)
        self.rows, self.columns = y.floor().long()[:, None] + steps, x.floor().long()[:, None] + steps
        u, v = (self.columns + 0.5 - x[:, None])[:, None], (self.rows + 0.5 - y[:, None])[:, :, None]
        border = reach(shape.long(), u, v, radius)
        alpha, shade, gloss = paint(border, style.long(), u, v, radius, size)
        self.alpha = alpha * opacity.view(-1, 1, 1)
        plain = torch.tensor([COLOURS[t.colour] for t in things])[:, None, None]
        self.colour = plain * (shade * (1 - gloss))[..., None] + gloss[..., None]
        self.silhouette = (0.5 - border).clamp(0, 1)


def _half(size: int) -> int:
    """Half of a patch's side: every thing fits into 2 * half + 1 pixels wherever its centre is in the middle one."""
    return ceil(max(SIZES.values()) * REACH * size + 1)


def _in_place(scene: Scene, size: int, values: str) -> Tensor:
    """What `_Patches` calls `values`, at its place in the image (n, size, size, ...), zero elsewhere."""
    check_size(size)
    if not scene.things:
        return torch.zeros(0, size, size, *([3] if values == "colour" else []))
    pad = _half(size) * 2 + 1
    patches = _Patches(scene.things, size)
    found = getattr(patches, values)
    canvas = torch.zeros(len(found), size + 2 * pad, size + 2 * pad, *found.shape[3:])
    canvas[torch.arange(len(found))[:, None, None], patches.rows[:, :, None] + pad, patches.columns[:, None] + pad] = (
        found
    )
    return canvas[:, pad:-pad, pad:-pad]


def alphas(scene: Scene, size: int = 64) -> Tensor:
    """How much each thing covers each pixel if nothing is in front of it, (things, size, size) in 0 to 1."""
    return _in_place(scene, size, "alpha")


def silhouettes(scene: Scene, size: int = 64) -> Tensor:
    """The things' shapes, filled and opaque whatever their style and opacity, (things, size, size) in 0 to 1."""
    return _in_place(scene, size, "silhouette")


def visible(scene: Scene, size: int = 64) -> Tensor:
    """Each thing's share in each pixel of the image, (things, size, size); what is missing to 1 is background."""
    alpha = alphas(scene, size)
    through = torch.cat([(1 - alpha).flip(0).cumprod(0).flip(0)[1:], torch.ones(1, size, size)])[: len(alpha)]
    return alpha * through


def layers(scene: Scene, size: int = 64) -> Tensor:
    """RGBA layers from back to front, (1 + things, 4, size, size) in 0 to 1: the background, then the things.

    Colours are not multiplied by alpha, and are zero where a layer has nothing. `composite` gives the image back.
    """
    alpha, colour = alphas(scene, size), _in_place(scene, size, "colour")
    colour = colour.permute(0, 3, 1, 2) * (alpha > 0)[:, None]
    back = torch.tensor([*BACKGROUNDS[scene.background], 1.0]).view(1, 4, 1, 1).expand(1, 4, size, size)
    return torch.cat([back, torch.cat([colour, alpha[:, None]], 1)])


def composite(layers: Tensor) -> Tensor:
    """Layers (..., n, 4, h, w), from back to front, as one image (..., 3, h, w)."""
    if layers.ndim < 4 or layers.shape[-3] != 4:
        raise InputError(f"layers have the form {tuple(layers.shape)}, but must be (..., n, 4, height, width)")
    image = torch.zeros_like(layers[..., 0, :3, :, :])
    for colour, alpha in ((layer[..., :3, :, :], layer[..., 3:, :, :]) for layer in layers.unbind(-4)):
        image = image * (1 - alpha) + colour * alpha
    return image
