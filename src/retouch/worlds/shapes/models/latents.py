"""The autoencoder, 64 x 64 pixels to 16 x 16 latents: its training, and the latents of scenes."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retouch.core.checkpoints import load_state, save_state
from retouch.core.data import TensorData
from retouch.core.errors import InputError
from retouch.core.loop import Run
from retouch.core.models import Batch, device_of, unpack
from retouch.worlds import shapes
from retouch.worlds.shapes.models import architectures
from retouch.worlds.shapes.models.architectures import CHANNELS, SIZE
from retouch.worlds.shapes.models.recipes import Recipe, built
from retouch.worlds.shapes.scenes import Scene

KL = 3e-5  # weight of the pull towards a normal distribution, a latent number; 1e-3 leaves one channel of four in use
CROP = 32


def autoencoder(recipe: Recipe, *, seed: int = 0, checkpoint: Path | None = None) -> Any:
    """The autoencoder, with latents of unit variance by its `scaling_factor`."""
    model: Any = built(architectures.new_autoencoder, seed)
    images = shapes.data("train", size=SIZE, count=recipe.scenes, seed=seed).images
    with torch.no_grad():  # latents speak up from the start, or else the decoder learns to do without them
        model.quant_conv.weight[:CHANNELS] *= 4
        model.quant_conv.bias[CHANNELS:] = -5.0

    def objective(model: Any, batch: Batch, run: Run) -> dict[str, Tensor]:
        pixels = 2 * crops(unpack(batch)[0], run.generator) - 1
        moments = model.encode(pixels).latent_dist
        noise = torch.randn(moments.mean.shape, generator=run.generator).to(pixels)
        found = model.decode(moments.mean + moments.std * noise).sample
        error = found - pixels
        terms = {"absolute": error.abs().mean(), "squared": 2 * error.square().mean()}
        return {**terms, "kl": KL * moments.kl().mean() / moments.mean[0].numel()}

    recipe.train(model, TensorData(images, None), objective, seed=seed, checkpoint=checkpoint)
    model.register_to_config(scaling_factor=round(1 / float(encoded(model, images[:1000]).std()), 4))
    return model


def crops(images: Tensor, generator: torch.Generator) -> Tensor:
    """A part (n, 3, 32, 32) of each image, anywhere."""
    places = torch.randint(0, images.shape[-1] - CROP + 1, (len(images), 2), generator=generator).tolist()
    return torch.stack([image[:, y : y + CROP, x : x + CROP] for image, (y, x) in zip(images, places, strict=True)])


@torch.no_grad()
def encoded(autoencoder: Any, images: Tensor, batch_size: int = 128) -> Tensor:
    """Means of the latents (n, 4, 16, 16) of images in 0 to 1, not scaled."""
    device = device_of(autoencoder)
    parts = [autoencoder.encode(2 * part.to(device) - 1).latent_dist.mean for part in images.split(batch_size)]
    return torch.cat(parts).cpu()


def scaled(autoencoder: Any, images: Tensor) -> Tensor:
    """Latents (n, 4, 16, 16) as the diffusion models see them."""
    return encoded(autoencoder, images) * autoencoder.config.scaling_factor


def latents_of(scenes: Sequence[Scene], autoencoder: Any, folder: Path | None) -> Tensor:
    """Latents (n, 4, 16, 16) of scenes, which take minutes: they are kept beside the checkpoint of a run.

    Raises:
        InputError: if those in the folder are of other scenes or another autoencoder.
    """
    if folder is None:
        return scaled(autoencoder, shapes.render(scenes, SIZE))
    kept = folder / "latents.safetensors"
    weights = torch.cat([parameter.detach().flatten().cpu() for parameter in autoencoder.parameters()])
    made_from = hashlib.sha256(repr(scenes).encode() + weights.numpy().tobytes()).hexdigest()
    if not kept.exists():
        save_state(kept, {"made from": made_from, "latents": scaled(autoencoder, shapes.render(scenes, SIZE))})
    state = load_state(kept)
    if state["made from"] != made_from:
        raise InputError(f"{kept} has latents of other scenes or another autoencoder: give another folder or delete it")
    return state["latents"]
