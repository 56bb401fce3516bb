"""Procedural scenes: coloured shapes with exact captions, masks and layers, and an oracle that reads images back.

    data("train", size=64)                images, captions and scenes of a split, 4000, 500 and 1000 of them
    scene("train", 7)                     one scene: a function of seed, split and number
    render(scene, 64)                     its image (3, 64, 64) in 0 to 1, or a batch for a list of scenes
    caption(scene)                        "a large flat red circle left of a small glossy blue square on gray"
    parse(text)                           what a caption says
    classification("train", "shape")      images of single things with labels
    layers(scene), visible(scene)         exact RGBA layers and masks, for edits
    oracle.read(images)                   which things are where, and what they look like
    reference("pipeline"), denoiser("pipeline")   the shipped text-to-image model, and others of `VARIANTS`
    oracle.prompt_fidelity(images, captions), oracle.change_outside(...), oracle.oracle_features(images)

A scene has one to three things (`Distribution` changes that and all else) of 6 shapes, 8 colours, 2 sizes and 4 styles
at continuous positions on one of 4 plain backgrounds. Things do not overlap unless asked to. The oracle is exact on
images as rendered, down to 32 x 32 pixels; how well it reads blurred and noisy ones is recorded in `oracle_quality`.
"""

from collections.abc import Collection, Sequence
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from retouch.core import seeds
from retouch.core.data import TensorData
from retouch.core.errors import InputError, one_of, positive
from retouch.worlds import WEIGHTS
from retouch.worlds.shapes import oracle
from retouch.worlds.shapes.captions import (
    RELATIONS,
    SAYABLE,
    TEMPLATES,
    VOCABULARY,
    Description,
    Mention,
    caption,
    describe,
    parse,
    phrase,
    reword,
    tokenize,
    with_article,
)
from retouch.worlds.shapes.drawing import alphas, check_size, composite, layers, render, silhouettes, visible
from retouch.worlds.shapes.scenes import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLOURS,
    EVERYTHING,
    SHAPES,
    SIZES,
    SPLITS,
    STYLES,
    Distribution,
    Scene,
    Thing,
    scene,
)

if TYPE_CHECKING:
    from retouch.core.diffusion.denoiser import Denoiser

__all__ = [
    "ATTRIBUTES",
    "BACKGROUNDS",
    "CLASSES",
    "COLOURS",
    "EVERYTHING",
    "KIND",
    "RELATIONS",
    "SAYABLE",
    "SHAPES",
    "SIZES",
    "SPLITS",
    "STYLES",
    "TEMPLATES",
    "VARIANTS",
    "VOCABULARY",
    "Description",
    "Distribution",
    "Mention",
    "Samples",
    "Scene",
    "Thing",
    "alphas",
    "build",
    "caption",
    "classes",
    "classification",
    "composite",
    "data",
    "denoiser",
    "describe",
    "labels",
    "layers",
    "oracle",
    "parse",
    "phrase",
    "quality",
    "reference",
    "render",
    "reword",
    "scene",
    "silhouettes",
    "tokenize",
    "visible",
    "with_article",
]

KIND = "scenes"
VARIANTS = ("pipeline", "clip", "pixels", "dit-large", "dit-small")
CLASSES = SHAPES


class Samples(Dataset[tuple[Tensor, str]]):
    """Scenes with their captions; sample i is (image, caption).

    Args:
        scenes: the scenes.
        captions: one a scene.
        size: side of the images in pixels.
    """

    def __init__(self, scenes: Sequence[Scene], captions: Sequence[str], size: int) -> None:
        self.scenes, self.captions, self.size = tuple(scenes), tuple(captions), size

    @cached_property
    def images(self) -> Tensor:
        """All images (n, 3, size, size) in 0 to 1, rendered at first use; do not change them."""
        return render(self.scenes, self.size)

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        # One sample is drawn alone as long as nobody has asked for all.
        rendered = "images" in self.__dict__
        return self.images[index] if rendered else render(self.scenes[index], self.size), self.captions[index]


def data(
    split: str = "train",
    *,
    size: int = 64,
    count: int | None = None,
    say: Collection[str] = SAYABLE,
    paraphrase: bool = False,
    distribution: Distribution = EVERYTHING,
    seed: int = 0,
) -> Samples:
    """Scenes of one split with captions.

    Args:
        split: "train", "validation" or "test"; no scene is in two of them.
        size: side of the images in pixels, at least 32; the scenes do not depend on it.
        count: scenes; by default 4000, 500 and 1000. Fewer are the first of more.
        say: what captions say, of `SAYABLE`.
        paraphrase: put each caption in one of the four ways to put it, and leave out size, style, relation and
            background half of the time each.
        distribution: what scenes are drawn from.
        seed: of scenes and captions.
    """
    one_of("split", split, tuple(SPLITS))
    check_size(size)
    count = SPLITS[split] if count is None else count
    positive("count", count)
    scenes = [scene(split, i, seed=seed, distribution=distribution) for i in range(count)]
    if not paraphrase:
        return Samples(scenes, [caption(s, say=say) for s in scenes], size)
    captions = [
        reword(one, seeds.generator(seed, "shapes captions", split, i), say=say) for i, one in enumerate(scenes)
    ]
    return Samples(scenes, captions, size)


def reference(variant: str = "pipeline") -> Any:
    """A shipped model: see `models.references.reference`."""
    from retouch.worlds.shapes.models import references

    return references.reference(variant)


def denoiser(variant: str = "pipeline") -> "Denoiser":
    """A shipped diffusion model as a denoiser: see `models.references.denoiser`."""
    from retouch.worlds.shapes.models import references

    return references.denoiser(variant)


def quality(variant: str) -> dict[str, float]:
    """Recorded quality of a shipped model: see `models.references`."""
    from retouch.worlds.shapes.models import references

    return references.quality(variant)


def build(folder: Path = WEIGHTS, *, seed: int = 0, checkpoint: Path | None = None) -> None:
    """Train the reference models again: see `models.building.build`."""
    from retouch.worlds.shapes.models import building

    building.build(folder, seed=seed, checkpoint=checkpoint)


def classes(*attributes: str) -> tuple[str, ...]:
    """Names of the classes that attributes make, such as "red circle" for ("colour", "shape")."""
    for name in attributes:
        one_of("attributes", name, tuple(ATTRIBUTES))
    if not attributes:
        raise InputError(f"attributes is empty, but must be some of {', '.join(ATTRIBUTES)}")
    return tuple(" ".join(words) for words in product(*(ATTRIBUTES[name] for name in attributes)))


def labels(scenes: Sequence[Scene], *attributes: str) -> Tensor:
    """Class of the one thing in each scene (n,), a number in `classes(*attributes)`."""
    numbers = {name: number for number, name in enumerate(classes(*attributes))}
    if any(len(one.things) != 1 for one in scenes):
        raise InputError("A scene has no thing or several, but labels need scenes of one thing")
    return torch.tensor([numbers[" ".join(getattr(s.things[0], name) for name in attributes)] for s in scenes])


def classification(
    split: str = "train",
    *attributes: str,
    size: int = 32,
    count: int | None = None,
    distribution: Distribution | None = None,
    seed: int = 0,
) -> TensorData:
    """Images of single things (n, 3, size, size) in 0 to 1, with labels (n,) by `attributes`, by default the shape.

    Args:
        split: "train", "validation" or "test".
        attributes: one or more of "shape", "colour", "size" and "style"; `classes` names what they make together.
        size: side of the images in pixels.
        count: images; by default 4000, 500 and 1000.
        distribution: what scenes are drawn from; its counts must be (1,).
        seed: of the scenes.
    """
    distribution = Distribution(counts=(1,)) if distribution is None else distribution
    samples = data(split, size=size, count=count, distribution=distribution, seed=seed)
    return TensorData(samples.images, labels(samples.scenes, *(attributes or ("shape",))))
