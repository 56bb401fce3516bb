"""Scenes are inverted to noise and made again, by the shipped text-to-image model with their captions.

CFG++'s study on images. The autoencoder alone is the aim: nothing that goes through it can come back better. The two
ways are asked at equal strength: see the problem `prompts`, where the same scales are measured from noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from retouch.arenas.contest import Answer, Entry, Measure, Picture, Plot
from retouch.arenas.guide import Outcome, Replica, Task, baseline
from retouch.arenas.guide.tasks import _shapes as world
from retouch.core.diffusion.guidance import Guidance, cfg
from retouch.core.diffusion.sampling import invert, sample
from retouch.worlds import shapes
from retouch.worlds.shapes import oracle
from retouch.worlds.shapes.models import recipes
from retouch.worlds.shapes.models.latents import scaled

NAME = "reconstruction"
STEPS, COUNT = 30, 32


@dataclass(frozen=True)
class Given:
    """Scenes, what is said of them, and their latents."""

    images: Tensor
    captions: tuple[str, ...]
    latents: Tensor


def prepare(seed: int, search: bool) -> Given:
    """Scenes of the test split with all that can be said of them."""
    data = shapes.data("test", count=COUNT, distribution=recipes.SCENES, seed=seed)
    return Given(data.images, tuple(data.captions), scaled(world.pipeline().vae, data.images))


def judge(given: Given, latents: Tensor) -> dict[str, float]:
    """How near latents and images come to where they were, and whether the captions are still true."""
    images = world.denoiser().decode(latents)
    squares = (images - given.images).double().square().flatten(1).mean(1)
    return {
        "latent": float((latents - given.latents).double().square().mean().sqrt()),
        "psnr": float(-10 * squares.clamp(min=1e-12).log10().mean()),
        "told": 100 * oracle.prompt_fidelity(images, given.captions)["all"],
    }


def wishes(given: Given) -> Sequence[Picture]:
    """The first scenes."""
    pairs = zip(given.images[: world.SHOWN], given.captions, strict=False)
    return [Picture(image=image, title=caption, group="scenes") for image, caption in pairs]


def shown(given: Given, latents: Tensor) -> Sequence[Answer]:
    """What came back; right if all that was said is still true."""
    images = world.denoiser().decode(latents[: world.SHOWN])
    pairs = zip(images, given.captions, strict=False)
    return [Answer(text="", right=oracle.matches(image, caption)["all"], image=image) for image, caption in pairs]


def guided(replica: Replica, guidance: Guidance | None) -> Outcome:
    """Invert and sample again under one rule. What is given back is x, the exact inverse of where inversion began."""
    given, denoiser = replica.given, world.denoiser()
    captions = list(given.captions)

    def draw() -> Tensor:
        noise = invert(denoiser, given.latents, captions, times=STEPS, guidance=guidance)
        return sample(denoiser, noise, captions, times=STEPS, guidance=guidance)

    return world.clocked(COUNT, draw)


def autoencoded(replica: Replica) -> Outcome:
    """Encoded and decoded, with no diffusion in between."""
    return Outcome(replica.given.latents)


def _cfg(name: str, title: str, scale: float, kind: str = "baseline") -> Entry:
    rule = cfg(scale) if scale != 1 else None
    return baseline(NAME, name, title, lambda replica: guided(replica, rule), kind)


TASK = Task(
    name=NAME,
    text="Scenes with captions are inverted in 30 steps of DDIM by the shapes' text-to-image model, and made again.",
    prepare=prepare,
    judge=judge,
    order="latent",
    measures={
        "latent": Measure(
            title="latent error",
            better="low",
            digits=3,
            line="Root mean square difference of the latents, which vary by about 1.",
        ),
        "psnr": Measure(title="PSNR", unit="dB", better="high", line="Of images and the scenes they were, their mean."),
        "told": Measure(
            title="captions true", unit="%", better="high", line="Images of which all that was said is still true."
        ),
        "each": world.EACH,
    },
    wishes=wishes,
    shown=shown,
    baselines=(
        baseline(NAME, "autoencoded", "the autoencoder alone", autoencoded, "oracle"),
        _cfg("back_cfg_3", "guidance, scale 3", 3.0, "original"),
        _cfg("back_unguided", "no guidance", 1.0),
        _cfg("back_cfg_75", "guidance, scale 7.5", 7.5),
    ),
    plots=(Plot(kind="bars", x="latent", text="How far from where it was does a scene come back?", problems=(NAME,)),),
)
