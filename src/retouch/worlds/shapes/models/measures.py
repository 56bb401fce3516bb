"""How good the reference models are, as the oracle tells it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from retouch.core import seeds
from retouch.core.data import labels_of
from retouch.core.diffusion.denoiser import Denoiser
from retouch.core.diffusion.guidance import cfg
from retouch.core.diffusion.process import EDM
from retouch.core.diffusion.sampling import sample, unit_noise
from retouch.core.diffusion.steps import heun
from retouch.core.metrics.frechet import frechet_distance
from retouch.worlds import shapes
from retouch.worlds.shapes import oracle
from retouch.worlds.shapes.captions import caption, with_article
from retouch.worlds.shapes.models import architectures
from retouch.worlds.shapes.models.architectures import CLASSES
from retouch.worlds.shapes.models.latents import scaled
from retouch.worlds.shapes.models.recipes import SCENES, SINGLE
from retouch.worlds.shapes.models.references import pixel_denoiser
from retouch.worlds.shapes.models.wordings import tokens

BATCH = 50  # images sampled at once


def measured_quality(variant: str, model: Any, count: int = 500) -> dict[str, float]:
    """What `quality` records of a model."""
    if variant == "pipeline":
        return measure_pipeline(model, count=count)
    if variant == "clip":
        return measure_clip(model, count=count)
    classes = pixel_denoiser(model) if variant == "pixels" else Denoiser.from_pipeline(model)
    return measure_classes(classes, count=max(1, count // len(CLASSES)))


def drawn(model: Denoiser, conditions: Sequence[Any], *, scale: float, seed: int = 0, **settings: Any) -> Tensor:
    """Images (n, 3, h, w) in 0 to 1, one a condition.

    Args:
        model: denoiser.
        conditions: n captions or classes.
        scale: of classifier-free guidance.
        seed: of the noise.
        settings: for `sample`.
    """
    noise = unit_noise(model, len(conditions), seeds.generator(seed, "noise"))
    images = []
    for start in range(0, len(conditions), BATCH):
        part = slice(start, start + BATCH)
        images.append(model.decode(sample(model, noise[part], conditions[part], guidance=cfg(scale), **settings)))
    return torch.cat(images)


def measure_pipeline(pipeline: Any, *, count: int = 500, seed: int = 0) -> dict[str, float]:
    """Prompt fidelity by the oracle, in 30 steps of DDIM at a guidance scale of 3.

    Args:
        pipeline: text to image.
        count: prompts of each kind, from scenes of the test split.
        seed: of the noise.

    Returns:
        single: images of "a red circle" in which one has this colour and shape, in percent; single_alone: in which
        besides there is nothing else. bound: images of "a red circle and a blue square" in which both are there, each
        with its own colour; two_alone likewise. told_all: images of captions that say all there is to say in which all
        of it is true. frechet: distance of these images to as many held-out scenes, on the oracle's features;
        frechet_real: that of two halves of the held-out scenes. autoencoded: things of scenes that the oracle still
        reads right, in all attributes, once they have been through the autoencoder.
    """
    model = Denoiser.from_pipeline(pipeline)
    found: dict[str, float] = {}
    for name, alone, number in (("single", "single_alone", 1), ("bound", "two_alone", 2)):
        scenes = shapes.data("test", count=count, distribution=shapes.Distribution(counts=(number,))).scenes
        said = [caption(scene, say=("shape", "colour")) for scene in scenes]
        told = oracle.prompt_fidelity(drawn(model, said, scale=3.0, times=30, seed=seed), said)
        found |= {name: told["attributes"], alone: told["all"]}
    held_out = shapes.data("test", count=2 * count, distribution=SCENES)
    images = drawn(model, held_out.captions[:count], scale=3.0, times=30, seed=seed)
    readings = oracle.read(images)
    found["told_all"] = oracle.prompt_fidelity(readings, held_out.captions[:count])["all"]
    again = model.decode(scaled(pipeline.vae, held_out.images[:count]))
    found["autoencoded"] = oracle.prompt_fidelity(again, held_out.captions[:count])["attributes"]
    one, other = (oracle.oracle_features(part) for part in (held_out.images[:count], held_out.images[count:]))
    rates = {name: round(100 * value, 1) for name, value in found.items()}
    distances = {
        "frechet": frechet_distance(oracle.oracle_features(images, readings), other),
        "frechet_real": frechet_distance(one, other),
    }
    return {**rates, **{name: round(value, 3) for name, value in distances.items()}}


@torch.no_grad()
def measure_clip(clip: Any, *, count: int = 500) -> dict[str, float]:
    """What CLIP tells of scenes of the test split, in percent.

    Returns:
        zero_shot: single things whose colour and shape it finds among all 48; retrieved: scenes of one or two things
        whose full caption it finds among a hundred.
    """
    single = shapes.classification("test", "colour", "shape", size=architectures.SIZE, count=count)
    names = tokens([with_article(name) for name in CLASSES])
    images: Any = single.inputs
    right = _scores(clip, images, names).argmax(1) == labels_of(single)
    data = shapes.data("test", count=count - count % 100 or count, distribution=SCENES)
    ids = tokens(data.captions)
    pairs = zip(data.images.split(100), ids.split(100), strict=True)
    hits = [_scores(clip, images, texts).argmax(1) == torch.arange(len(images)) for images, texts in pairs]
    return {
        "zero_shot": round(100 * float(right.double().mean()), 1),
        "retrieved": round(100 * float(torch.cat(hits).double().mean()), 1),
    }


def _scores(clip: Any, images: Any, ids: Tensor) -> Tensor:
    return clip(input_ids=ids, pixel_values=2 * images - 1).logits_per_image


def measure_classes(model: Denoiser, *, count: int = 10, seed: int = 0) -> dict[str, float]:
    """How well a class-conditional model draws its classes: 18 steps of Heun on pixels, 30 of DDIM on latents.

    Args:
        model: denoiser.
        count: images a class.
        seed: of the noise.

    Returns:
        right: images with one thing, of the colour and shape asked for, in percent; likewise colour and shape alone;
        frechet: distance to as many held-out images, on the oracle's features, and frechet_real, that of real ones.
    """
    pixels = isinstance(model.process, EDM)
    settings: dict[str, Any] = {"scale": 1.0, "step": heun, "times": 18} if pixels else {"scale": 2.0, "times": 30}
    wanted = [name for name in CLASSES for _ in range(count)]
    images = drawn(model, wanted, seed=seed, **settings)
    readings = oracle.read(images)
    told = oracle.prompt_fidelity(readings, [with_article(name) for name in wanted])
    rates = {"right": told["all"], "colour": told["colour"], "shape": told["shape"]}
    side, total = images.shape[-1], len(images)
    real = shapes.data("test", size=side, count=2 * total, distribution=SINGLE).images
    one, other = (oracle.oracle_features(part) for part in (real[:total], real[total:]))
    distances = {"frechet": frechet_distance(oracle.oracle_features(images, readings), other)}
    distances["frechet_real"] = frechet_distance(one, other)
    return {
        **{name: round(100 * value, 1) for name, value in rates.items()},
        **{name: round(value, 3) for name, value in distances.items()},
    }
