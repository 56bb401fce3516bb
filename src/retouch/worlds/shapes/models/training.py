"""How the reference models are trained: one recipe each, all on scenes of one or two things.

autoencoder   crops of 32 pixels, absolute and squared error and a weak pull towards a normal distribution
text encoder  it learns to tell from each noun what is said of its thing
unet          velocity on Stable Diffusion's noise levels; one caption in ten is left out
clip          which of 128 captions belongs to which image
pixels        EDM's preconditioning and loss at larger noise, colour and shape as the class
dit           as the UNet, colour and shape as the class
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from retouch.core import seeds
from retouch.core.averages import MovingAverage
from retouch.core.checkpoints import load_state, save_state
from retouch.core.data import TensorData
from retouch.core.diffusion.denoiser import Prediction, from_prediction
from retouch.core.diffusion.process import EDM, VP, spread
from retouch.core.errors import InputError
from retouch.core.loop import Checkpoint, Run, fit
from retouch.core.models import Batch, device_of, unpack
from retouch.worlds import shapes
from retouch.worlds.shapes.captions import RELATIONS, caption, parse, reword
from retouch.worlds.shapes.models import architectures
from retouch.worlds.shapes.models.architectures import CHANNELS, NO_CLASS, SIGMA_DATA, SIZE
from retouch.worlds.shapes.scenes import ATTRIBUTES, BACKGROUNDS, SHAPES, Distribution, Scene

# Large and flat things are the most common ones: what a thing's shape is shows best in them, and of a mean squared
# error its shape is but a hundredth.
COMMON: dict[str, Any] = {
    "sizes": ("large", "large", "small"),
    "styles": ("flat", "flat", "flat", "outlined", "hatched", "glossy"),
}
SCENES = Distribution(counts=(1, 2), **COMMON)
SINGLE = Distribution(counts=(1,), **COMMON)
WORDINGS = 4  # captions of a scene, one of which is drawn at every step
DROPPED = 0.1  # share of the captions and classes that are left out
PROCESS = VP.scaled_linear()
# What is where is decided at noise of two to ten times the image's strength, where EDM's own choice (mean -1.2, std
# 1.2), made for photographs, would train one step in ten. Noise 25 times as strong leaves nothing of an image.
PIXEL_PROCESS = EDM(sigma_max=20.0, mean=0.0, std=1.4)


@dataclass(frozen=True)
class Recipe:
    """How long and how fast a model learns.

    Attributes:
        steps: of the optimizer, in each of one or more cycles; a later one begins with the weights of the one before.
        batch_size: samples a step.
        rate: highest learning rate of each cycle's schedule, up and down once.
        scenes: that the data is made of.
        decay: weight decay of AdamW.
        average: decay of the moving average of the weights; None for none.
    """

    steps: tuple[int, ...]
    batch_size: int
    rate: float
    scenes: int
    decay: float = 0.01
    average: float | None = None

    def train(
        self, model: nn.Module, data: TensorData, objective: Any, *, seed: int, checkpoint: Path | None = None
    ) -> None:
        """Train a model in place; with a checkpoint, a run that was stopped goes on from it."""

        def optimizer(parameters: Any) -> Optimizer:
            return AdamW(parameters, lr=self.rate, weight_decay=self.decay, betas=(0.9, 0.99))

        def scheduler(optimizer: Optimizer, steps: int) -> LRScheduler:
            return OneCycleLR(optimizer, self.rate, total_steps=steps, pct_start=0.05, cycle_momentum=False)

        for cycle, steps in enumerate(self.steps):
            folder = checkpoint / f"cycle-{cycle}" if checkpoint and cycle else checkpoint
            fit(
                model,
                data,
                objective,
                steps=steps,
                batch_size=self.batch_size,
                optimizer=optimizer,
                scheduler=scheduler,
                callbacks=[] if self.average is None else [MovingAverage(self.average)],
                clip=1.0,
                checkpoint=None if folder is None else Checkpoint(folder, every=200),
                seed=seeds.derive(seed, "cycle", cycle) if cycle else seed,
            )
        model.eval()


RECIPES = {
    "autoencoder": Recipe((3600,), 16, 1e-3, 8000),
    "text": Recipe((600,), 64, 2e-3, 12000),
    "unet": Recipe((3600,), 32, 1.5e-3, 16000, average=0.999),
    "clip": Recipe((1000,), 128, 1e-3, 12000, decay=0.1),
    "pixels": Recipe((3000,), 32, 1.5e-3, 8000, average=0.999),
    "dit-large": Recipe((4000,), 48, 1.5e-3, 6000, average=0.999),
    "dit-small": Recipe((4000,), 48, 2e-3, 6000, average=0.999),
}


def precise(model: nn.Module) -> Any:
    """Half the precision where it only costs time: bfloat16 in what autocast deems safe."""
    return torch.autocast(device_of(model).type, torch.bfloat16)


def built(new: Callable[[], Any], seed: int) -> Any:
    """An untrained model of weights that the seed decides."""
    with seeds.isolated(seeds.derive(seed, "weights")):
        return new()


# --- the autoencoder --------------------------------------------------------------------------------------------------

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


# --- the text encoder -------------------------------------------------------------------------------------------------


def tokens(captions: Sequence[str]) -> Tensor:
    """Captions as ids (n, 40)."""
    words = architectures.tokenizer()
    return words(list(captions), padding="max_length", truncation=True, return_tensors="pt")["input_ids"]


@dataclass(frozen=True)
class Wordings:
    """Scenes, and ways to say them: captions[i][k] is a text on scenes[i]."""

    scenes: tuple[Scene, ...]
    captions: tuple[tuple[str, ...], ...]

    @property
    def ids(self) -> Tensor:
        """The captions' tokens (n, wordings, 40)."""
        return tokens([text for texts in self.captions for text in texts]).view(len(self.scenes), WORDINGS, -1)


def wordings(count: int, seed: int, distribution: Distribution = SCENES) -> Wordings:
    """Scenes of training, each with a short caption of shapes and colours and three that say now this, now that."""
    scenes = shapes.data("train", count=count, distribution=distribution, seed=seed).scenes
    captions = []
    for i, scene in enumerate(scenes):
        draw = seeds.generator(seed, "wordings", i)
        longer = [reword(scene, draw) for _ in range(WORDINGS - 1)]
        captions.append((caption(scene, say=("shape", "colour")), *longer))
    return Wordings(scenes, tuple(captions))


class Reader(nn.Module):
    """A text encoder and a head that tells from every noun what is said of its thing; only the encoder is kept."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleDict({name: nn.Linear(architectures.WIDTH, len(values)) for name, values in SAID.items()})

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        """Ids (n, t) to logits (n, t, values) of everything in `SAID`."""
        states = self.encoder(input_ids=ids).last_hidden_state
        return {name: head(states) for name, head in self.heads.items()}


SAID = {**ATTRIBUTES, "relation": ("none", *RELATIONS), "background": tuple(BACKGROUNDS)}
IGNORED = -100


def readings(captions: Sequence[str], ids: Tensor) -> dict[str, Tensor]:
    """What is to be told from captions with ids (n, t).

    Returns:
        For everything in `SAID` numbers (n, t): at the noun of a thing its attributes, and the relation of the first
        thing to it; at the end the background; -100 elsewhere and where nothing is said.
    """
    words = architectures.tokenizer()
    nouns = torch.isin(ids, torch.tensor(words.convert_tokens_to_ids([f"{shape}</w>" for shape in SHAPES])))
    ends = (ids == words.eos_token_id).int().argmax(1)
    found = {name: torch.full_like(ids, IGNORED) for name in SAID}
    for row, text in enumerate(captions):
        said = parse(text)
        for k, (mention, at) in enumerate(zip(said.things, nouns[row].nonzero()[:, 0].tolist(), strict=True)):
            for name, value in mention.said().items():
                found[name][row, at] = ATTRIBUTES[name].index(value)
            if k:
                found["relation"][row, at] = SAID["relation"].index(said.relations[k - 1] or "none")
        if said.background:
            found["background"][row, ends[row]] = SAID["background"].index(said.background)
    return found


def text_encoder(recipe: Recipe, *, seed: int = 0, checkpoint: Path | None = None) -> Any:
    """A text encoder whose states of nouns tell what their things are like: what the UNet must find in them."""
    encoder = built(architectures.new_text_encoder, seed)
    reader = built(lambda: Reader(encoder), seed)
    given = wordings(recipe.scenes // WORDINGS, seed)
    captions = [text for texts in given.captions for text in texts]
    ids = tokens(captions)

    def objective(model: nn.Module, batch: Batch, run: Run) -> dict[str, Tensor]:
        inputs, targets = unpack(batch)
        logits: dict[str, Tensor] = model(inputs)
        said = {name: targets[name].flatten() for name in SAID}
        errors = {name: F.cross_entropy(logits[name].flatten(0, 1), said[name], reduction="sum") for name in SAID}
        return {name: error / (said[name] != IGNORED).sum().clamp(min=1) for name, error in errors.items()}

    recipe.train(reader, TensorData(ids, readings(captions, ids)), objective, seed=seed, checkpoint=checkpoint)
    return encoder


# --- text to image ----------------------------------------------------------------------------------------------------


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
