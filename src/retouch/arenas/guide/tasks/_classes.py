"""What the tasks of class-conditional models of shapes share: the shipped models, and what the oracle says of images.

A class is "red circle" and the like; an image is right if the oracle reads one thing in it and no more, and this thing
is what was asked for.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from retouch.arenas.contest import Answer, Measure, Picture
from retouch.arenas.guide import Outcome, Replica
from retouch.core import seeds
from retouch.core.diffusion.denoiser import Denoiser
from retouch.core.metrics.frechet import frechet_distance
from retouch.worlds import shapes
from retouch.worlds.shapes import oracle
from retouch.worlds.shapes.models import recipes
from retouch.worlds.shapes.scenes import COLOURS, SHAPES, Scene

CLASSES = shapes.classes("colour", "shape")
HELD_OUT = 480  # scenes that distances are measured to, the same for all
SHOWN = 6  # images on the page
BATCH = 48  # samples drawn at once

RIGHT, DISTANCE, VALID = "right", "frechet", "valid"
MEASURES = {
    RIGHT: Measure(
        title="right", unit="%", better="high", line="Images of one thing alone, the one that is asked for."
    ),
    DISTANCE: Measure(
        title="distance", better="low", digits=2, line="Fréchet distance to held-out scenes, on the oracle's features."
    ),
    VALID: Measure(title="valid", unit="%", better="high", line="Images that are scenes of this world at all."),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """What is asked for, and from what noise.

    Attributes:
        noise: a sample each.
        classes: a name each, such as "red circle" or "circle".
        seed: of further draws.
    """

    noise: Tensor
    classes: list[str]
    seed: int

    @property
    def prompts(self) -> list[str]:
        """The classes as the oracle is asked for them."""
        return [shapes.with_article(name) for name in self.classes]


@functools.cache
def denoiser(variant: str) -> Denoiser:
    """A shipped model, loaded once for all replicas."""
    return shapes.denoiser(variant)


def every_class(times: int, seed: int) -> list[str]:
    """All classes, each so many times, in an order of the seed's."""
    order = torch.randperm(times * len(CLASSES), generator=seeds.generator(seed, "classes")).tolist()
    return [CLASSES[number % len(CLASSES)] for number in order]


def batches(draw: Callable[[slice], Tensor], count: int) -> Tensor:
    """Samples drawn in parts of 48: at the small end of what is fastest, and little memory."""
    return torch.cat([draw(slice(start, start + BATCH)) for start in range(0, count, BATCH)])


def judge(given: Asked, images: Tensor) -> dict[str, float]:
    """Right, distance and valid, of images (n, 3, size, size) in 0 to 1."""
    readings = oracle.read(images)
    told = oracle.prompt_fidelity(readings, given.prompts)
    distance = frechet_distance(oracle.oracle_features(images, readings), held_out(images.shape[-1]))
    return {RIGHT: 100 * told["all"], DISTANCE: distance, VALID: 100 * told["valid"]}


@functools.cache
def held_out(size: int) -> Tensor:
    """Oracle features of scenes of single things that no model was trained on."""
    return oracle.oracle_features(shapes.data("test", size=size, count=HELD_OUT, distribution=recipes.SINGLE).images)


def real(replica: Replica, size: int) -> Outcome:
    """Scenes of the classes asked for, drawn by the world itself: what the best model could do."""
    given: Asked = replica.given
    return Outcome(rendered(given.classes, size, given.seed))


def rendered(classes: Sequence[str], size: int, seed: int) -> Tensor:
    """A scene (n, 3, size, size) of each class."""
    return shapes.render([_scene(name, seeds.derive(seed, i)) for i, name in enumerate(classes)], size)


def _scene(name: str, seed: int) -> Scene:
    words = name.split()
    colours = tuple(word for word in words if word in COLOURS) or tuple(COLOURS)
    shaped = tuple(word for word in words if word in SHAPES) or SHAPES
    return shapes.scene(
        "test", 0, seed=seed, distribution=dataclasses.replace(recipes.SINGLE, colours=colours, shapes=shaped)
    )


def wishes(given: Asked) -> list[Picture]:
    """The first prompts, as columns of the page's pictures."""
    return [Picture(image=None, title=text, group="prompts") for text in given.prompts[:SHOWN]]


def shown(given: Asked, images: Tensor) -> list[Answer]:
    """The images made of the first prompts, and whether each is right."""
    pairs = zip(images[:SHOWN], given.prompts[:SHOWN], strict=True)
    return [Answer(text="", right=oracle.matches(image, text)["all"], image=image) for image, text in pairs]
