"""How the UNet, CLIP and the class-conditional models are trained.

unet          velocity on Stable Diffusion's noise levels; one caption in ten is left out
clip          which of a batch of captions belongs to which image
pixels        EDM's preconditioning and loss at larger noise, colour and shape as the class
dit           as the UNet, colour and shape as the class
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from retouch.core.data import TensorData
from retouch.core.diffusion.denoiser import Prediction, from_prediction
from retouch.core.diffusion.process import EDM, VP, spread
from retouch.core.loop import Run
from retouch.core.models import Batch, unpack
from retouch.worlds import shapes
from retouch.worlds.shapes.models import architectures
from retouch.worlds.shapes.models.architectures import NO_CLASS, SIGMA_DATA, SIZE
from retouch.worlds.shapes.models.latents import latents_of
from retouch.worlds.shapes.models.recipes import SINGLE, Recipe, built, precise
from retouch.worlds.shapes.models.wordings import WORDINGS, tokens, wordings

DROPPED = 0.1  # share of the captions and classes that are left out
PROCESS = VP.scaled_linear()
# What is where is decided at noise of two to ten times the image's strength, where EDM's own choice (mean -1.2, std
# 1.2), made for photographs, would train one step in ten. Noise 25 times as strong leaves nothing of an image.
PIXEL_PROCESS = EDM(sigma_max=20.0, mean=0.0, std=1.4)


def random_times(count: int, draw: torch.Generator) -> Tensor:
    """Timesteps of `PROCESS` (count,), most of them in the middle, where it is decided what things there are.

    Logit-normal, as Stable Diffusion 3 draws them.
    """
    return (1000 * (0.3 + torch.randn(count, generator=draw)).sigmoid()).long().clamp(max=999)


def velocity_loss(ask: Callable[[Tensor, Tensor], Tensor], x0: Tensor, draw: torch.Generator) -> Tensor:
    """Mean squared error of the velocity, alpha noise - sigma x0, at `random_times`.

    Args:
        ask: (noisy latents, timesteps (n,)) -> velocities.
        x0: clean latents (n, ...).
        draw: of noise and timesteps.
    """
    noise = torch.randn(x0.shape, generator=draw).to(x0)
    times = random_times(len(x0), draw)
    alpha, sigma = (spread(value, x0) for value in PROCESS.levels(times))
    found = ask(PROCESS.add_noise(x0, noise, times), times.to(x0.device))
    return (found.float() - from_prediction("velocity", Prediction(x0, noise), alpha, sigma)).square().mean()


def unet(recipe: Recipe, autoencoder: Any, encoder: Any, *, seed: int = 0, checkpoint: Path | None = None) -> Any:
    """The UNet. The text encoder is frozen: trained with it, it forgets shapes, of which a UNet makes use only late."""
    model = built(architectures.new_unet, seed)
    given = wordings(recipe.scenes, seed)
    latents = latents_of(given.scenes, autoencoder, checkpoint)
    nothing = tokens([""])

    def objective(model: nn.Module, batch: Batch, run: Run) -> Tensor:
        x0, ids = unpack(batch)
        which = torch.randint(WORDINGS, (len(x0),), generator=run.generator).to(ids.device)
        said = ids[torch.arange(len(x0), device=ids.device), which]
        dropped = (torch.rand(len(x0), generator=run.generator) < DROPPED).to(ids.device)
        said = torch.where(dropped[:, None], nothing.to(ids.device), said)
        with precise(model):
            with torch.no_grad():
                text = encoder.to(ids.device)(input_ids=said).last_hidden_state
            return velocity_loss(lambda x, times: model(x, times, encoder_hidden_states=text).sample, x0, run.generator)

    recipe.train(model, TensorData(latents, given.ids), objective, seed=seed, checkpoint=checkpoint)
    return model


# --- CLIP -------------------------------------------------------------------------------------------------------------


def clip(recipe: Recipe, *, seed: int = 0, checkpoint: Path | None = None) -> Any:
    """The CLIP model."""
    model = built(architectures.new_clip, seed)
    given = wordings(recipe.scenes, seed)
    images = shapes.render(given.scenes, SIZE)

    def objective(model: nn.Module, batch: Batch, run: Run) -> Tensor:
        pixels, ids = unpack(batch)
        which = torch.randint(WORDINGS, (len(ids),), generator=run.generator)
        said = ids[torch.arange(len(ids)), which.to(ids.device)]
        with precise(model):
            return model(input_ids=said, pixel_values=2 * pixels - 1, return_loss=True).loss.float()

    recipe.train(model, TensorData(images, given.ids), objective, seed=seed, checkpoint=checkpoint)
    return model


# --- class-conditional models -----------------------------------------------------------------------------------------


def without(labels: Tensor, draw: torch.Generator) -> Tensor:
    """Labels (n,), one in ten of which is taken away."""
    return torch.where((torch.rand(len(labels), generator=draw) < DROPPED).to(labels.device), NO_CLASS, labels)


def pixels(recipe: Recipe, *, seed: int = 0, checkpoint: Path | None = None) -> Any:
    """The class-conditional UNet of pixels, inside of EDM's preconditioning."""
    model = built(architectures.new_pixel_unet, seed)

    def objective(model: nn.Module, batch: Batch, run: Run) -> Tensor:
        images, labels = unpack(batch)
        x0, draw = 2 * images - 1, run.generator
        sigma = spread(PIXEL_PROCESS.random_times(len(x0), draw), x0)
        x = x0 + sigma * torch.randn(x0.shape, generator=draw).to(x0)
        told = without(labels, draw)
        length = (sigma**2 + SIGMA_DATA**2).sqrt()
        # The target of the network is what makes x0 of it; EDM's weight makes all levels' errors count alike.
        target = (x0 - SIGMA_DATA**2 / length**2 * x) * length / (sigma * SIGMA_DATA)
        with precise(model):
            found = model(x / length, 0.25 * sigma.flatten().log(), class_labels=told).sample
        return (found.float() - target).square().mean()

    data = shapes.classification(
        "train",
        "colour",
        "shape",
        size=architectures.PIXELS,
        count=recipe.scenes,
        distribution=SINGLE,
        seed=seed,
    )
    recipe.train(model, data, objective, seed=seed, checkpoint=checkpoint)
    return model


def dit(
    recipe: Recipe, autoencoder: Any, new: Callable[[], Any], *, seed: int = 0, checkpoint: Path | None = None
) -> Any:
    """A class-conditional DiT of latents; one class in ten is left out.

    Diffusers' own dropout of labels is switched off: each block would draw for itself, and hardly a sample would be
    without its class in all of them, as sampling without a class is.
    """
    model = built(new, seed)
    for part in model.modules():
        if hasattr(part, "dropout_prob"):
            part.dropout_prob = 0.0
    scenes = shapes.data("train", count=recipe.scenes, distribution=SINGLE, seed=seed).scenes

    def objective(model: nn.Module, batch: Batch, run: Run) -> Tensor:
        x0, labels = unpack(batch)
        told = without(labels, run.generator)
        with precise(model):
            return velocity_loss(lambda x, times: model(x, timestep=times, class_labels=told).sample, x0, run.generator)

    latents = latents_of(scenes, autoencoder, checkpoint)
    labels = shapes.labels(scenes, "colour", "shape")
    recipe.train(model, TensorData(latents, labels), objective, seed=seed, checkpoint=checkpoint)
    return model
