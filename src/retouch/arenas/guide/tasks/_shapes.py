"""The shipped text-to-image model of the world `shapes`, and what its images are judged by.

All replicas ask the same model: a replica's seed decides what is asked for, and the noise.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from retouch.arenas.contest import Measure
from retouch.arenas.guide import Outcome, timed
from retouch.core.diffusion.denoiser import Denoiser
from retouch.core.metrics.frechet import frechet_distance
from retouch.worlds import shapes
from retouch.worlds.shapes import oracle
from retouch.worlds.shapes.models import recipes

SHOWN = 6  # columns of the page's pictures
REAL = 400  # held-out scenes that images are compared with


@functools.cache
def pipeline() -> Any:
    """The shipped `StableDiffusionPipeline`."""
    return shapes.reference("pipeline")


@functools.cache
def denoiser() -> Denoiser:
    """The same as a denoiser; conditions are captions."""
    return Denoiser.from_pipeline(pipeline())


def clocked(count: int, draw: Callable[[], Tensor]) -> Outcome:
    """What is drawn, with the model's calls counted, and the seconds that one image takes.

    Args:
        count: images that are drawn.
        draw: () -> images or latents.
    """
    outcome = timed([denoiser()], count, draw)
    return dataclasses.replace(outcome, own={**outcome.own, "each": outcome.seconds / count})


@functools.cache
def held_out(counts: tuple[int, ...], size: int = REAL) -> Tensor:
    """The oracle's features (n, 44) of scenes of the validation split, which no replica asks for.

    Args:
        counts: numbers of things in a scene.
        size: n.
    """
    distribution = shapes.Distribution(counts=counts, **recipes.COMMON)
    return oracle.oracle_features(shapes.data("validation", count=size, distribution=distribution).images)


def likeness(features: Tensor, counts: tuple[int, ...]) -> float:
    """Fréchet distance of the oracle's features (n, 44) to those of held-out scenes."""
    return frechet_distance(features, held_out(counts))


def diversity(features: Tensor) -> float:
    """Mean distance between features of images that were asked for with the same words.

    Args:
        features: (wishes, images of each, 44).
    """
    apart = torch.cdist(features.double(), features.double())
    images = features.shape[1]
    return float(apart.sum() / (len(features) * images * (images - 1)))


def saturation(images: Tensor) -> float:
    """Mean over pixels of the largest channel less the smallest, in percent.

    That is HSV's chroma; its saturation, which divides by the largest channel, is noise alone on a black background.
    """
    return 100 * float((images.amax(1) - images.amin(1)).double().mean())


FRECHET = Measure(
    title="distance",
    better="low",
    digits=2,
    line="Fréchet distance to held-out scenes, on what the oracle sees in images.",
)
DIVERSITY = Measure(
    title="diversity",
    digits=2,
    line="Mean distance, in what the oracle sees, of images that were asked for with the same words; real scenes say "
    "how much is right.",
)
SATURATION = Measure(
    title="saturation",
    unit="%",
    line="Mean over pixels of the largest channel less the smallest; real scenes say how much is right.",
)
VALID = Measure(
    title="valid", unit="%", better="high", line="Images in which the oracle finds nothing but things of this world."
)
EACH = Measure(title="an image", unit="s", better="low", digits=3, line="Seconds of sampling for one image.")
