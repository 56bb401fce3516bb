"""The shipped models as what users have: pipelines of diffusers, a CLIP, and denoisers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from retouch.core.diffusion.denoiser import Condition, Denoiser
from retouch.core.errors import InputError, one_of
from retouch.worlds import WEIGHTS
from retouch.worlds.shapes.models import architectures, training
from retouch.worlds.shapes.models.architectures import CLASSES, NO_CLASS, SIGMA_DATA

VARIANTS = ("pipeline", "clip", "pixels", "dit-large", "dit-small")


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


def quality(variant: str, *, folder: Path = WEIGHTS) -> dict[str, float]:
    """Recorded quality of a shipped model; `measures` says what the numbers are."""
    one_of("variant", variant, VARIANTS)
    return json.loads((folder / f"shapes-{variant}" / "quality.json").read_text())
