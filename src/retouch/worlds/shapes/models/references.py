"""The shipped models as what users have: pipelines of diffusers, a CLIP, and denoisers; their quality, and `build`."""

import copy
import functools
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retouch.core import seeds
from retouch.core.checkpoints import atomic_folder
from retouch.core.data import labels_of
from retouch.core.diffusion.denoiser import Condition, Denoiser
from retouch.core.diffusion.guidance import cfg
from retouch.core.diffusion.process import EDM
from retouch.core.diffusion.sampling import sample, unit_noise
from retouch.core.diffusion.steps import heun
from retouch.core.errors import InputError, one_of
from retouch.core.metrics.frechet import frechet_distance
from retouch.worlds import WEIGHTS, shapes
from retouch.worlds.shapes import oracle
from retouch.worlds.shapes.captions import caption, with_article
from retouch.worlds.shapes.models import architectures, training
from retouch.worlds.shapes.models.architectures import CLASSES, NO_CLASS, SIGMA_DATA
from retouch.worlds.shapes.models.training import RECIPES, Recipe

VARIANTS = ("pipeline", "clip", "pixels", "dit-large", "dit-small")
DITS: dict[str, Callable[[], Any]] = {
    "dit-large": functools.partial(architectures.new_dit, heads=3, layers=5),
    "dit-small": functools.partial(architectures.new_dit, heads=2, layers=2),
}
LICENCE = "Apache-2.0: trained from random weights on scenes that retouch draws itself"
BATCH = 50  # images sampled at once


# --- loading ----------------------------------------------------------------------------------------------------------


def reference(variant: str = "pipeline", *, folder: Path = WEIGHTS) -> Any:
    """A shipped model in float32, in eval mode.

    Args:
        variant: "pipeline", a `StableDiffusionPipeline`; "clip", a `CLIPModel`; "pixels", a class-conditional
            `UNet2DModel` inside of EDM's preconditioning; "dit-large" or "dit-small", a `DiTPipeline`.
        folder: of the weights.
    """
    import diffusers
    import transformers

    one_of("variant", variant, VARIANTS)
    path = str(folder / f"shapes-{variant}")
    if variant == "pipeline":
        pipeline: Any = diffusers.StableDiffusionPipeline.from_pretrained(path, safety_checker=None)
        return quiet(pipeline.to(torch.float32))
    if variant == "clip":
        return transformers.CLIPModel.from_pretrained(path, dtype=torch.float32).eval()
    if variant == "pixels":
        return diffusers.UNet2DModel.from_pretrained(path).eval()
    transformer = diffusers.DiTTransformer2DModel.from_pretrained(path)
    vae = diffusers.AutoencoderKL.from_pretrained(str(folder / "shapes-pipeline" / "vae"))
    return dit_pipeline(transformer, vae)


def denoiser(variant: str = "pipeline", *, folder: Path = WEIGHTS) -> Denoiser:
    """A shipped diffusion model, ready for `sample`; conditions are captions, or classes by number or by name.

    Args:
        variant: one of `VARIANTS` but "clip".
        folder: of the weights.
    """
    one_of("variant", variant, [name for name in VARIANTS if name != "clip"])
    model = reference(variant, folder=folder)
    return pixel_denoiser(model) if variant == "pixels" else Denoiser.from_pipeline(model)


def pixel_denoiser(unet: Any) -> Denoiser:
    """A denoiser of the class-conditional model of pixels."""
    null = {"class_labels": torch.tensor([NO_CLASS])}
    return Denoiser(unet, training.PIXEL_PROCESS, predicts="edm", sigma_data=SIGMA_DATA, encode=_labels, null=null)


def _labels(classes: Sequence[Any]) -> Condition:
    numbers = []
    for one in classes:
        if isinstance(one, str):
            one_of("condition", one, CLASSES)
        number = CLASSES.index(one) if isinstance(one, str) else int(one)
        if not 0 <= number <= NO_CLASS:
            raise InputError(f"condition is {number}, but must be a class from 0 to {NO_CLASS - 1}")
        numbers.append(number)
    return {"class_labels": torch.tensor(numbers)}


def scheduler() -> Any:
    """Stable Diffusion's noise levels, with DDIM."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        steps_offset=1,  # as Stable Diffusion's; with this spacing it shifts nothing
        clip_sample=False,
        set_alpha_to_one=False,
    )


def text_pipeline(autoencoder: Any, text_encoder: Any, unet: Any) -> Any:
    """The parts of the text-to-image model as a `StableDiffusionPipeline`."""
    from diffusers import StableDiffusionPipeline

    parts = {"vae": autoencoder, "text_encoder": text_encoder, "tokenizer": architectures.tokenizer(), "unet": unet}
    none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return quiet(StableDiffusionPipeline(**parts, scheduler=scheduler(), **none))


def dit_pipeline(transformer: Any, autoencoder: Any) -> Any:
    """A DiT as a `DiTPipeline` with names of the classes."""
    from diffusers import DiTPipeline

    names = dict(enumerate(CLASSES))
    return quiet(DiTPipeline(transformer.eval(), autoencoder.eval(), scheduler(), id2label=names))


def quiet(pipeline: Any) -> Any:
    """Without a progress bar of its own."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# --- quality ----------------------------------------------------------------------------------------------------------


def quality(variant: str, *, folder: Path = WEIGHTS) -> dict[str, float]:
    """Recorded quality of a shipped model; `MEASURES` says what the numbers are."""
    one_of("variant", variant, VARIANTS)
    return json.loads((folder / f"shapes-{variant}" / "quality.json").read_text())


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
    held_out = shapes.data("test", count=2 * count, distribution=training.SCENES)
    images = drawn(model, held_out.captions[:count], scale=3.0, times=30, seed=seed)
    readings = oracle.read(images)
    found["told_all"] = oracle.prompt_fidelity(readings, held_out.captions[:count])["all"]
    again = model.decode(training.scaled(pipeline.vae, held_out.images[:count]))
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
    names = training.tokens([with_article(name) for name in CLASSES])
    images: Any = single.inputs
    right = _scores(clip, images, names).argmax(1) == labels_of(single)
    data = shapes.data("test", count=count - count % 100 or count, distribution=training.SCENES)
    ids = training.tokens(data.captions)
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
    real = shapes.data("test", size=side, count=2 * total, distribution=training.SINGLE).images
    one, other = (oracle.oracle_features(part) for part in (real[:total], real[total:]))
    distances = {"frechet": frechet_distance(oracle.oracle_features(images, readings), other)}
    distances["frechet_real"] = frechet_distance(one, other)
    return {
        **{name: round(100 * value, 1) for name, value in rates.items()},
        **{name: round(value, 3) for name, value in distances.items()},
    }


# --- building ---------------------------------------------------------------------------------------------------------


def build(
    folder: Path = WEIGHTS,
    *,
    seed: int = 0,
    checkpoint: Path | None = None,
    recipes: Mapping[str, Recipe] = RECIPES,
    measured: int = 500,
) -> None:
    """Train the reference models and write them, in half precision, with recipe, licence and measured quality.

    Args:
        folder: takes a folder a model.
        seed: of scenes, weights and orders.
        checkpoint: folder from which a run that was stopped goes on.
        recipes: by model.
        measured: samples that quality is measured on.
    """

    def settings(name: str) -> dict[str, Any]:
        return {"seed": seed, "checkpoint": checkpoint and checkpoint / name}

    vae = training.autoencoder(recipes["autoencoder"], **settings("autoencoder"))
    text = training.text_encoder(recipes["text"], **settings("text"))
    unet = training.unet(recipes["unet"], vae, text, **settings("unet"))
    parts = {name: recipes[name] for name in ("autoencoder", "text", "unet")}
    write(folder, "pipeline", text_pipeline(vae, text, unet), parts, seed, measured)
    write(folder, "clip", training.clip(recipes["clip"], **settings("clip")), recipes, seed, measured)
    write(folder, "pixels", training.pixels(recipes["pixels"], **settings("pixels")), recipes, seed, measured)
    for name, new in DITS.items():
        write(folder, name, training.dit(recipes[name], vae, new, **settings(name)), recipes, seed, measured)


def write(
    folder: Path, variant: str, model: Any, recipes: Mapping[str, Recipe], seed: int, measured: int = 500
) -> None:
    """One model: half its precision, weights, recipe; then the quality of what is read back."""
    target = folder / f"shapes-{variant}"
    recipe = {name: asdict(recipes[name]) for name in recipes if variant in ("pipeline", name)}
    command = f"retouch worlds build shapes --seed {seed}"
    made = {"command": command, "licence": LICENCE, "recipes": recipe, "quality is of samples": measured}
    with atomic_folder(target.with_name(f"{target.name}.new")) as new:
        copy.deepcopy(model).to(torch.float16).save_pretrained(new)
        (new / "recipe.json").write_text(json.dumps(made, indent=1) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    target.with_name(f"{target.name}.new").rename(target)
    read = reference(variant, folder=folder)
    (target / "quality.json").write_text(json.dumps(measured_quality(variant, read, measured), indent=1) + "\n")


def measured_quality(variant: str, model: Any, count: int = 500) -> dict[str, float]:
    """What `quality` records of a model."""
    if variant == "pipeline":
        return measure_pipeline(model, count=count)
    if variant == "clip":
        return measure_clip(model, count=count)
    classes = pixel_denoiser(model) if variant == "pixels" else Denoiser.from_pipeline(model)
    return measure_classes(classes, count=max(1, count // len(CLASSES)))
