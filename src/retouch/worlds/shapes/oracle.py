"""Reading an image back: which things are in it, where, and what they look like. No learned network.

    read(images)                            a `Reading` of every image
    matches(image, caption)                 what of a caption is true of an image
    prompt_fidelity(images, captions)       how often, over many images
    change_outside(before, after, mask)     how local an edit was
    oracle_features(images)                 a vector an image, for Fréchet distances

An image is read by explaining it. The background is the median colour of the frame; what differs from it falls into
connected components; each component is drawn again as every shape in every style, with position, radius, blur and
colour fitted by least squares, and the drawing with the least error is what is there. Things that touch are taken apart
by colour where this explains the image better.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from math import log

import torch
from torch import Tensor

from retouch.core.errors import InputError
from retouch.worlds.shapes import components as pieces
from retouch.worlds.shapes.captions import Description, Mention, holds, parse
from retouch.worlds.shapes.drawing import check_size
from retouch.worlds.shapes.fitting import PALETTE, Fits, draw, explain, named
from retouch.worlds.shapes.scenes import ATTRIBUTES, BACKGROUNDS, COLOURS, SHAPES, SIZES, STYLES, Scene, Thing

CHUNK = 2**15  # pixels read at once; more do not fit a core's cache
TEMPERATURE = 0.02  # share of a thing's energy that an explanation may lack and still be e times less likely
TOUCHING = 0.85  # share of its energy that must be explained, or else a component may be two things
BETTER = 0.5  # share of the error beyond noise that another way to cut an image into things may leave to be taken
MIDDLE = (SIZES["small"] * SIZES["large"]) ** 0.5  # radius between small and large
VALID, NEAR = 0.8, 0.25  # see `Reading.valid`
MOST = 6  # things that captions are compared with, the largest ones


@dataclass(frozen=True)
class Seen:
    """A thing as the oracle sees it.

    Args:
        shape: the likeliest of `SHAPES`; likewise `colour`, `size` and `style`.
        x: of the centre, as a share of the image; likewise `y` and `radius`.
        rgb: fitted colour.
        area: share of the image's pixels that stand out from the background here.
        explained: share of what stands out, beyond noise, that the best drawing accounts for; at most 1.
        scores: a probability of every value of every attribute, by how much of the thing the best drawing with that
            value leaves unexplained.
    """

    shape: str
    colour: str
    size: str
    style: str
    x: float
    y: float
    radius: float
    rgb: tuple[float, float, float]
    area: float
    explained: float
    scores: dict[str, dict[str, float]]

    def confidence(self, attribute: str) -> float:
        """Probability of the value that was read, 0 to 1."""
        return self.scores[attribute][getattr(self, attribute)]

    def thing(self) -> Thing:
        """The nearest thing that a scene can have."""
        x, y = (min(max(value, 0.0), 1.0) for value in (self.x, self.y))
        return Thing(self.shape, self.colour, self.size, self.style, x, y)


@dataclass(frozen=True)
class Reading:
    """What is in an image.

    Args:
        things: from left to right.
        background: nearest of `BACKGROUNDS`.
        rgb: colour of the background.
        scores: a probability of every background.
        noise: standard deviation of the plain parts of the background.
        error: root mean square difference of the image from its explanation, over pixels and channels.
    """

    things: tuple[Seen, ...]
    background: str
    rgb: tuple[float, float, float]
    scores: dict[str, float]
    noise: float
    error: float

    @property
    def valid(self) -> bool:
        """Whether the image is a scene of this world.

        It is if something is in it, each thing is explained to 80%, and all colours are within 0.25 of named ones.
        """
        colours = [(self.rgb, BACKGROUNDS[self.background]), *((t.rgb, COLOURS[t.colour]) for t in self.things)]
        near = all(sum((a - b) ** 2 for a, b in zip(*pair, strict=True)) ** 0.5 <= NEAR for pair in colours)
        return bool(self.things) and near and all(thing.explained >= VALID for thing in self.things)

    def scene(self) -> Scene:
        """The scene that was read; rendered, it is the valid image nearest to this one as far as was understood."""
        return Scene(tuple(seen.thing() for seen in self.things), self.background)


def read(images: Tensor) -> list[Reading]:
    """Readings of images.

    Args:
        images: (n, 3, size, size) with values in 0 to 1, size at least 32; values outside are cut off.

    Raises:
        InputError: if the images have another form or values that are not finite.
    """
    _check_images(images)
    images = images.detach().float().cpu().clamp(0, 1)
    step = max(CHUNK // images[0, 0].numel(), 1) if len(images) else 1
    return [reading for part in images.split(step) if len(part) for reading in _read(part)]


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
        raise InputError(f"images have the form {tuple(images.shape)}, but must be (n, 3, size, size)")
    check_size(images.shape[-1])
    if not bool(torch.isfinite(images).all()):
        raise InputError("images have values that are not finite, but must be in 0 to 1")


@torch.no_grad()
def _read(images: Tensor) -> list[Reading]:
    colour, noise = pieces.background(images)
    difference = images - colour[:, :, None, None]
    found = pieces.components(difference)
    seen, error, doubtful, left = _explain(difference, colour, noise, found)
    if len(doubtful):
        rows = found.image[doubtful].unique()
        which = (torch.isin(found.image, rows).cumsum(0) - 1)[doubtful]  # their numbers among these images alone
        part = difference[rows], colour[rows], noise[rows]
        again = pieces.components(part[0])
        others = (
            pieces.parted(again, which),
            pieces.by_colour(again, which, images[rows]),
            pieces.uncovered(again, which, left[rows], part[0]),
        )
        for other in others:
            new_seen, new_error, *_ = _explain(*part, other)
            excess = new_error.square() - part[2].square()
            better = excess < BETTER * (error[rows].square() - part[2].square())
            for j in better.nonzero()[:, 0].tolist():
                i = int(rows[j])
                if _worst(new_seen[j]) > _worst(seen[i]):
                    seen[i], error[i] = new_seen[j], new_error[j]
    far = torch.cdist(colour, torch.tensor(list(BACKGROUNDS.values())))
    scores = (-far.square() / 0.02).softmax(1)
    return [
        Reading(
            tuple(sorted(seen[i], key=lambda thing: thing.x)),
            tuple(BACKGROUNDS)[int(far[i].argmin())],
            tuple(colour[i].tolist()),
            dict(zip(BACKGROUNDS, scores[i].tolist(), strict=True)),
            float(noise[i]),
            float(error[i]),
        )
        for i in range(len(difference))
    ]


def _worst(things: list[Seen]) -> float:
    return min((thing.explained for thing in things), default=0.0)


def _explain(
    difference: Tensor, colour: Tensor, noise: Tensor, found: pieces.Components
) -> tuple[list[list[Seen]], Tensor, Tensor, Tensor]:
    """Images explained with the foreground cut into the given components.

    Returns:
        the things in each image, the images' errors (n,), the numbers of the components that are badly explained, and
        what is left of the images (n, 3, size, size).
    """
    left = difference
    seen: list[list[Seen]] = [[] for _ in difference]
    doubtful = []
    for numbers, patches in pieces.cut(difference, colour, found):
        image = found.image[numbers]
        fits, costs = explain(patches)
        left = pieces.subtract(left, image, patches, draw(patches, fits))
        chance = 3 * patches.weight.sum((1, 2)) * noise[image].square()  # what noise alone would leave
        energy = (patches.energy - chance).clamp(min=1e-3)
        explained = 1 - (fits.error - chance).clamp(min=0) / energy
        doubtful.append(numbers[explained < TOUCHING])
        areas = found.areas[numbers] / difference[0, 0].numel()
        things = _things(fits, costs, energy, explained, areas, difference.shape[-1])
        for i, thing in zip(image.tolist(), things, strict=True):
            seen[i].append(thing)
    error = left.square().mean((1, 2, 3)).sqrt()
    return seen, error, torch.cat(doubtful) if doubtful else torch.zeros(0, dtype=torch.long), left


def _things(fits: Fits, costs: Tensor, energy: Tensor, explained: Tensor, areas: Tensor, size: int) -> Iterator[Seen]:
    scale = TEMPERATURE * energy[:, None]
    hues = named(fits.colour)
    big = 4 * (fits.place[:, 2] / (size * MIDDLE)).log() / log(SIZES["large"] / MIDDLE)
    tables = {
        "shape": (-costs.amin(2) / scale).softmax(1),
        "colour": (-fits.power[:, None] * hues * PALETTE / scale).softmax(1),
        "size": torch.stack([-big, big], 1).softmax(1),
        "style": (-costs.amin(1) / scale).softmax(1),
    }
    shapes, styles, colours = fits.shape.tolist(), fits.style.tolist(), hues.argmin(1).tolist()
    for k, (x, y, radius, _) in enumerate(fits.place.tolist()):
        yield Seen(
            SHAPES[shapes[k]],
            tuple(COLOURS)[colours[k]],
            "large" if big[k] > 0 else "small",
            STYLES[styles[k]],
            x / size,
            y / size,
            radius / size,
            tuple(fits.colour[k].tolist()),
            float(areas[k]),
            float(explained[k]),
            {name: dict(zip(ATTRIBUTES[name], table[k].tolist(), strict=True)) for name, table in tables.items()},
        )


def matches(image: Tensor | Reading, caption: str | Description) -> dict[str, bool]:
    """What of a caption is true of an image.

    The caption's things are matched with things in the image so that as many as possible agree in all words said of
    them, then so that relations hold, then so that single words agree.

    Args:
        image: (3, size, size) in 0 to 1, or what `read` returned for it.
        caption: in this world's words, or what `parse` returned for it.

    Returns:
        "count": as many things as the caption mentions. "objects": every shape that it mentions is there, as often as
        it is mentioned. "attributes": every thing is there with all its words at once. "relations": they hold between
        things of the shapes said. "background": as said. "all": all of these. What a caption does not say is true.
    """
    reading = image if isinstance(image, Reading) else read(image[None] if image.ndim == 3 else image)[0]
    return _judge(reading, caption if isinstance(caption, Description) else parse(caption))[0]


def prompt_fidelity(images: Tensor | Sequence[Reading], captions: Sequence[str]) -> dict[str, float]:
    """How often captions are true of images.

    Args:
        images: (n, 3, size, size) in 0 to 1, or what `read` returned for them.
        captions: one an image.

    Returns:
        Share of the images, 0 to 1, for each part that `matches` tells; and under "shape", "colour", "size" and "style"
        the share of the words of that kind in all captions that are true of the thing that matches best. A kind that
        no caption mentions is missing. "valid" is the share of the images that are scenes of this world.
    """
    readings = read(images) if isinstance(images, Tensor) else list(images)
    if len(readings) != len(captions) or not readings:
        raise InputError(f"There are {len(captions)} captions for {len(readings)} images, but must be one for each")
    judged = [_judge(reading, parse(caption)) for reading, caption in zip(readings, captions, strict=True)]
    rates = {part: sum(parts[part] for parts, _ in judged) / len(judged) for part in judged[0][0]}
    for name in ATTRIBUTES:
        right = [word for _, words in judged for kind, word in words if kind == name]
        if right:
            rates[name] = sum(right) / len(right)
    return {**rates, "valid": sum(reading.valid for reading in readings) / len(readings)}


def _judge(reading: Reading, caption: Description) -> tuple[dict[str, bool], list[tuple[str, bool]]]:
    """Parts that are true, and of every word of an attribute whether it is."""
    mentions = caption.things
    things: list[Seen | None] = sorted(reading.things, key=lambda thing: -thing.area)[:MOST]  # type: ignore[assignment]
    things += [None] * (len(mentions) - len(things))

    def compare(order: Sequence[Seen | None]) -> tuple[int, int, int]:
        right = [_words(mention, thing) for mention, thing in zip(mentions, order, strict=True)]
        return sum(map(_all, right)), sum(_relations(caption, order)), sum(ok for words in right for _, ok in words)

    best = max(permutations(things, len(mentions)), key=compare)
    shapes = Counter(thing.shape for thing in reading.things)
    wanted = Counter(mention.shape for mention in mentions if mention.shape)
    words = [_words(mention, thing) for mention, thing in zip(mentions, best, strict=True)]
    parts = {
        "count": len(reading.things) == len(mentions),
        "objects": wanted <= shapes and len(reading.things) >= len(mentions),
        "attributes": all(map(_all, words)),
        "relations": all(_relations(caption, best)),
        "background": caption.background in (None, reading.background),
    }
    return {**parts, "all": all(parts.values())}, [pair for pairs in words for pair in pairs]


def _words(mention: Mention, thing: Seen | None) -> list[tuple[str, bool]]:
    """Of every word said of a thing whether it is true; for a thing that is missing, none is."""
    said = mention.said().items()
    return [(name, thing is not None and getattr(thing, name) == value) for name, value in said]


def _all(words: list[tuple[str, bool]]) -> bool:
    return all(ok for _, ok in words)


def _relations(caption: Description, order: Sequence[Seen | None]) -> list[bool]:
    """Of every relation said whether it holds between things of the shapes said."""
    right = [
        thing is not None and mention.shape in (None, thing.shape)
        for mention, thing in zip(caption.things, order, strict=True)
    ]
    told = []
    for number, relation in enumerate(caption.relations, start=1):
        one, other = order[0], order[number]
        if relation is not None:
            near = one is not None and other is not None and holds(relation, (one.x, one.y), (other.x, other.y))
            told.append(near and right[0] and right[number])
    return told


def change_outside(before: Tensor, after: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute change of pixels outside of a mask (n,); 0 for an edit that stays within it.

    Args:
        before: images (n, 3, h, w).
        after: the same images edited.
        mask: where change is allowed, 0 to 1, (n, h, w) or (h, w).

    Raises:
        InputError: if forms differ, or a mask leaves nothing outside.
    """
    if before.shape != after.shape or before.ndim != 4 or mask.shape[-2:] != before.shape[-2:]:
        forms = tuple(before.shape), tuple(after.shape), tuple(mask.shape)
        raise InputError(f"before, after and mask have the forms {forms}, but must be (n, 3, h, w) twice and (n, h, w)")
    outside = (1 - mask.float()).expand(len(before), *mask.shape[-2:])
    area = outside.sum((1, 2))
    if bool((area <= 0).any()):
        raise InputError("mask covers a whole image, but must leave something outside")
    return ((after - before).abs().mean(1) * outside).sum((1, 2)) / area


def oracle_features(images: Tensor, readings: Sequence[Reading] | None = None) -> Tensor:
    """What the oracle sees as a vector an image, for Fréchet distances between sets of images.

    Args:
        images: (n, 3, size, size) in 0 to 1.
        readings: what `read` returned for them, if it was asked already.

    Returns:
        (n, 44), each number scaled so that it varies by about 1 over scenes: scores of the backgrounds (4); number of
        things; scores of shapes (6), colours (8), sizes (2) and styles (4), summed over the things; mean and spread of
        their x and y (4); their area; what is unexplained of them; error; and the share of pixels near each named
        colour of things and backgrounds (12).
    """
    readings = read(images) if readings is None else readings
    rows = torch.tensor([_row(reading) for reading in readings]).reshape(len(readings), 32)
    return torch.cat([rows, _histogram(images.detach().float().cpu())], 1)


def _row(reading: Reading) -> list[float]:
    things = reading.things
    summed = [sum(t.scores[name][value] for t in things) for name in ATTRIBUTES for value in ATTRIBUTES[name]]
    places = torch.tensor([[t.x, t.y] for t in things] or [[0.5, 0.5]])
    spread = places.std(0, correction=0)
    unexplained = sum(1 - t.explained for t in things) / max(len(things), 1)
    return [
        *reading.scores.values(),
        float(len(things)),
        *summed,
        *(4 * places.mean(0)).tolist(),
        *(4 * spread).tolist(),
        20 * sum(t.area for t in things),
        4 * unexplained,
        20 * reading.error,
    ]


def _histogram(images: Tensor) -> Tensor:
    names = torch.tensor([*COLOURS.values(), *BACKGROUNDS.values()])
    width = torch.tensor([20.0] * len(COLOURS) + [2.0] * len(BACKGROUNDS))
    shares = []
    for part in images.split(64):
        far = torch.cdist(part.flatten(2).mT, names)  # (n, pixels, names)
        shares.append((-far.square() / 0.02).softmax(2).mean(1) * width)
    return torch.cat(shares) if shares else torch.zeros(0, len(names))
