"""What is in a scene, and how scenes are drawn at random.

A `Scene` is a background and one to four `Thing`s, the later ones in front. Lengths and positions are shares of the
image's side, x to the right and y down, so a scene can be rendered at any size.

    left, right, up, down = extent(thing)       the box that a thing fills, measured from its position
    scene("train", 7)                           the scene number 7 of that split
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from math import cos, pi, sin, sqrt
from typing import Any

import numpy as np

from retouch.core import seeds
from retouch.core.errors import InputError, in_range, one_of

SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
COLOURS = {
    "red": (0.90, 0.10, 0.12),
    "orange": (1.00, 0.55, 0.05),
    "yellow": (1.00, 0.93, 0.20),
    "green": (0.12, 0.62, 0.20),
    "cyan": (0.15, 0.85, 0.90),
    "blue": (0.15, 0.30, 0.95),
    "purple": (0.55, 0.12, 0.75),
    "pink": (1.00, 0.50, 0.78),
}
SIZES = {"small": 0.11, "large": 0.18}  # radius
STYLES = ("flat", "outlined", "hatched", "glossy")
BACKGROUNDS = {
    "gray": (0.50, 0.50, 0.50),
    "white": (1.00, 1.00, 1.00),
    "black": (0.00, 0.00, 0.00),
    "navy": (0.04, 0.06, 0.30),
}
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "size": tuple(SIZES),
    "style": STYLES,
}
SPLITS = {"train": 4000, "validation": 500, "test": 1000}

# Proportions of the shapes, in radii: chosen so that all six look equally large and fit a circle of 1.2 radii.
CIRCLE = 0.95  # radius
SQUARE = 0.84  # half of the side
TRIANGLE = 1.15  # centre to corner
STAR, STAR_INNER = 1.18, 0.53  # centre to the points, and to the corners between them
CROSS, CROSS_ARM = 1.0, 0.42  # half of the length and of the width of the bars
HEART = 0.62  # half of the side of the heart's square, and radius of its two circles

GAP = 0.06  # between the boxes of two things
MARGIN = 0.03  # between a thing's box and the image's border

EXTENTS = {  # left, right, up, down, in radii
    "circle": (CIRCLE,) * 4,
    "square": (SQUARE,) * 4,
    "triangle": (TRIANGLE * sqrt(3) / 2, TRIANGLE * sqrt(3) / 2, TRIANGLE, TRIANGLE / 2),
    "star": (STAR * sin(2 * pi / 5), STAR * sin(2 * pi / 5), STAR, STAR * cos(pi / 5)),
    "cross": (CROSS,) * 4,
    "heart": (HEART * (1 + sqrt(0.5)), HEART * (1 + sqrt(0.5)), HEART * (1 + sqrt(0.5)), HEART * sqrt(2)),
}


@dataclass(frozen=True)
class Thing:
    """One thing in a scene.

    Args:
        shape: one of `SHAPES`.
        colour: one of `COLOURS`.
        size: one of `SIZES`.
        style: one of `STYLES`; an outlined thing lets the background through, the others are filled.
        x: of its centre, 0 (left border) to 1.
        y: of its centre, 0 (upper border) to 1.
        opacity: above 0 up to 1.
    """

    shape: str
    colour: str
    size: str = "large"
    style: str = "flat"
    x: float = 0.5
    y: float = 0.5
    opacity: float = 1.0

    def __post_init__(self) -> None:
        for name, allowed in ATTRIBUTES.items():
            one_of(name, getattr(self, name), allowed)
        in_range("x", self.x, 0, 1)
        in_range("y", self.y, 0, 1)
        in_range("opacity", self.opacity, 0, 1, above=True)

    @property
    def radius(self) -> float:
        """Half of its width or so, as a share of the image's side."""
        return SIZES[self.size]


@dataclass(frozen=True)
class Scene:
    """Things on a background, the later ones in front of the earlier ones."""

    things: tuple[Thing, ...]
    background: str = "gray"

    def __post_init__(self) -> None:
        one_of("background", self.background, tuple(BACKGROUNDS))
        if not isinstance(self.things, tuple):
            object.__setattr__(self, "things", tuple(self.things))


def extent(thing: Thing) -> tuple[float, float, float, float]:
    """How far a thing reaches left, right, up and down of its position, as shares of the image's side."""
    left, right, up, down = (thing.radius * reach for reach in EXTENTS[thing.shape])
    return left, right, up, down


@dataclass(frozen=True)
class Distribution:
    """What scenes are drawn from: every choice uniform among those given, independently of the others.

    Two things of a scene never share both shape and colour, so that a caption tells them apart. Unless `overlap`, the
    boxes of two things are apart by `GAP` along x or along y; where a draw of sizes leaves no room for this, sizes are
    drawn again. Things always lie within the image.

    Args:
        counts: numbers of things, each 0 to 4.
        shapes: allowed shapes, and likewise `colours`, `sizes`, `styles`, `backgrounds`.
        opacity: lowest and highest.
        overlap: let things cover each other.
        keep: a condition on scenes; draws that fail it are drawn again.
    """

    counts: tuple[int, ...] = (1, 2, 3)
    shapes: tuple[str, ...] = SHAPES
    colours: tuple[str, ...] = tuple(COLOURS)
    sizes: tuple[str, ...] = tuple(SIZES)
    styles: tuple[str, ...] = STYLES
    backgrounds: tuple[str, ...] = tuple(BACKGROUNDS)
    opacity: tuple[float, float] = (1.0, 1.0)
    overlap: bool = False
    keep: Callable[[Scene], bool] | None = None

    def __post_init__(self) -> None:
        choices = {"counts": (0, 1, 2, 3, 4), "backgrounds": tuple(BACKGROUNDS)}
        choices |= {f"{name}s": allowed for name, allowed in ATTRIBUTES.items()}
        for name, allowed in choices.items():
            given = getattr(self, name)
            if isinstance(given, str) or not given:
                raise InputError(f"{name} is {given!r}, but must be a tuple of {', '.join(map(repr, allowed))}")
            for value in given:
                one_of(name, value, allowed)
        pairs = len(self.shapes) * len(self.colours)
        if max(self.counts) > pairs:
            raise InputError(f"counts is {self.counts}, but these shapes and colours make at most {pairs} things")
        low, high = self.opacity
        in_range("opacity", low, 0, high, above=True)
        in_range("opacity", high, low, 1)

    def sample(self, random: np.random.Generator) -> Scene:
        """A scene drawn with the given generator.

        Raises:
            InputError: if `keep` accepts none of 10000 draws.
        """
        for _ in range(10_000):
            drawn = self._draw(random)
            if self.keep is None or self.keep(drawn):
                return drawn
        raise InputError("keep accepts none of 10000 scenes drawn, but must accept some of the distribution's")

    def _draw(self, random: np.random.Generator) -> Scene:
        count = _pick(random, self.counts)
        nouns = [(shape, colour) for shape in self.shapes for colour in self.colours]
        chosen = [nouns.pop(_index(random, len(nouns))) for _ in range(count)]
        styles = [_pick(random, self.styles) for _ in range(count)]
        low, high = self.opacity
        opacities = [low + (high - low) * float(u) for u in random.random(count)]
        background = _pick(random, self.backgrounds)
        while True:
            sizes = [_pick(random, self.sizes) for _ in range(count)]
            things = [
                Thing(*noun, size, style, opacity=opacity)
                for noun, size, style, opacity in zip(chosen, sizes, styles, opacities, strict=True)
            ]
            places = self._places(random, things)
            if places is not None:
                break
        placed = (replace(thing, x=float(x), y=float(y)) for thing, (x, y) in zip(things, places, strict=True))
        return Scene(tuple(placed), background)

    def _places(self, random: np.random.Generator, things: list[Thing], tries: int = 256) -> np.ndarray | None:
        """Positions (things, 2) that fulfil the rules, or None if none of some blocks of draws does."""
        reach = np.array([extent(thing) for thing in things]).reshape(-1, 4)
        low, high = MARGIN + reach[:, [0, 2]], 1 - MARGIN - reach[:, [1, 3]]
        for _ in range(8):
            places = low + (high - low) * random.random((tries, len(things), 2))
            if self.overlap or len(things) < 2:
                return places[0]
            starts, ends = places - reach[:, [0, 2]], places + reach[:, [1, 3]]
            good = np.ones(tries, dtype=bool)
            for a, b in combinations(range(len(things)), 2):
                apart = np.maximum(starts[:, a] - ends[:, b], starts[:, b] - ends[:, a])  # (tries, 2)
                good &= apart.max(1) >= GAP
            if good.any():
                return places[good.argmax()]
        return None


def _index(random: np.random.Generator, n: int) -> int:
    return int(random.random() * n)


def _pick(random: np.random.Generator, options: tuple[Any, ...]) -> Any:
    return options[_index(random, len(options))]


EVERYTHING = Distribution()


def scene(split: str, index: int, *, seed: int = 0, distribution: Distribution = EVERYTHING) -> Scene:
    """Scene number `index` of a split: a function of these four arguments alone."""
    one_of("split", split, tuple(SPLITS))
    in_range("index", index, 0)
    return distribution.sample(np.random.default_rng(seeds.derive(seed, "shapes", split, index)))


def all_things(distribution: Distribution = EVERYTHING) -> Iterator[Thing]:
    """Every combination of attributes once, in the middle of the image."""
    for shape in distribution.shapes:
        for colour in distribution.colours:
            for size in distribution.sizes:
                for style in distribution.styles:
                    yield Thing(shape, colour, size, style)
