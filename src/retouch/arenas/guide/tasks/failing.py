"""Where does the text-to-image model fail? Prompts and noise are searched whose image does not show what was asked for.

The study of SAGE's search over latents. Prompts are of one thing, as "a red circle", which the model draws well in 4
steps as a rule, and always in the 10 or more that the study has. All searches may make as many images, and what they
find is a failure only if the oracle sees no such thing in the image, the noise passes for a draw of N(0, I), and no
other failure is all but the same.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from retouch.arenas.contest import Answer, Measure, Picture, Plot
from retouch.arenas.guide import Outcome, Replica, Task, baseline, timed
from retouch.arenas.guide.tasks import _classes as world
from retouch.audit.sage import PipelineGenerator, distinct, gaussianity
from retouch.core import seeds
from retouch.core.diffusion.denoiser import Denoiser
from retouch.worlds import shapes
from retouch.worlds.shapes import oracle

NAME = "failing"
BUDGET, BATCH = 240, 16  # images that a search may make; images that random search makes at once
STEPS, SCALE = 4, 3.0  # of DDIM; of classifier-free guidance
SHAPE = (4, 16, 16)  # of a latent


@dataclass(frozen=True)
class Given:
    """A text-to-image model, a differentiable classifier of its images, and what to ask for.

    Attributes:
        pipeline: of diffusers.
        denoiser: of the same.
        classifier: images -> logits of all classes.
        classes: in the order in which searches take them.
        seed: of noise.
    """

    pipeline: Any
    denoiser: Denoiser
    classifier: Callable[[Tensor], Tensor]
    classes: list[str]
    seed: int

    def generator(self, latents: Tensor) -> PipelineGenerator:
        """The model as SAGE's searches need it."""
        return PipelineGenerator(self.pipeline, latents=latents, times=STEPS, guidance_scale=SCALE)


@dataclass
class Found:
    """What a search hands in.

    Attributes:
        prompts: one a failure.
        latents: (...) each.
        images: (3, size, size) each.
        made: images that had been made when this one was.
        total: images made in all.
    """

    prompts: list[str] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)
    images: list[Tensor] = field(default_factory=list)
    made: list[int] = field(default_factory=list)
    total: int = 0

    def add(self, prompt: str, latent: Tensor, image: Tensor, made: int) -> None:
        """One more."""
        self.prompts.append(prompt)
        self.latents.append(latent)
        self.images.append(image.detach())
        self.made.append(made)


@functools.cache
def models() -> tuple[Any, Denoiser, "ZeroShot"]:
    """The shipped pipeline, its denoiser, and the shipped CLIP."""
    pipeline = shapes.reference("pipeline")
    return pipeline, Denoiser.from_pipeline(pipeline), ZeroShot(shapes.reference("clip"))


class ZeroShot:
    """CLIP as a classifier of all classes: images (n, 3, 64, 64) in 0 to 1 to logits (n, classes).

    Args:
        clip: of transformers.
    """

    def __init__(self, clip: Any) -> None:
        from retouch.worlds.shapes.models.training import tokens

        self.clip = clip.eval().requires_grad_(False)
        self.ids = tokens([shapes.with_article(name) for name in world.CLASSES])

    def __call__(self, images: Tensor) -> Tensor:
        """Gradients pass to the pixels."""
        return self.clip(input_ids=self.ids, pixel_values=2 * images - 1).logits_per_image


def prepare(seed: int, search: bool) -> Given:
    """The models are the same in all replicas."""
    return Given(*models(), world.every_class(1, seed), seed)


def fails(images: Tensor, prompts: Sequence[str]) -> list[bool]:
    """Whether the oracle misses the thing that is asked for; what else there is in an image does not count."""
    pairs = zip(oracle.read(images), prompts, strict=True)
    return [not oracle.matches(reading, prompt)["attributes"] for reading, prompt in pairs]


def judge(given: Given, found: Found) -> dict[str, float]:
    """What of it is true."""
    if not found.images:
        return {"found": 0.0, "first": float(found.total), "verified": 100.0, "natural": 100.0}
    latents = torch.stack(found.latents)
    true = torch.tensor(fails(torch.stack(found.images), found.prompts))
    natural, _ = gaussianity(latents)
    alone = torch.zeros_like(true)
    alone[distinct(latents)] = True
    counted = true & natural & alone
    made = torch.tensor(found.made)[counted]
    return {
        "found": 100 * int(counted.sum()) / found.total,
        "first": float(made.min()) if len(made) else float(found.total),
        "verified": 100 * float(true.double().mean()),
        "natural": 100 * float(natural.double().mean()),
    }


def wishes(given: Given) -> list[Picture]:
    """As many failures as there is room for."""
    return [Picture(image=None, title=f"failure {k + 1}", group="failures") for k in range(world.SHOWN)]


def shown(given: Given, found: Found) -> list[Answer]:
    """The first that were found, each with its prompt; right if the oracle agrees."""
    images, prompts = found.images[: world.SHOWN], found.prompts[: world.SHOWN]
    told = fails(torch.stack(images), prompts) if images else []
    answers = [
        Answer(text=prompt, right=true, image=image) for prompt, true, image in zip(prompts, told, images, strict=True)
    ]
    return answers + [Answer(text="none found")] * (world.SHOWN - len(answers))


def searched(replica: Replica, search: Callable[[Given], Found]) -> Outcome:
    """A search, with the model's calls counted an image of the budget: equal for all that use it up."""
    given: Given = replica.given
    return timed([given.denoiser], BUDGET, lambda: search(given))


def at_random(replica: Replica) -> Outcome:
    """One prompt after the other with fresh noise; the oracle looks at every image."""
    return searched(replica, random_search)


def random_search(given: Given) -> Found:
    """The search of `at_random`."""
    found, draw = Found(), seeds.generator(given.seed, "random search")
    while found.total < BUDGET:
        count = min(BATCH, BUDGET - found.total)
        places = range(found.total, found.total + count)
        prompts = [shapes.with_article(given.classes[place % len(given.classes)]) for place in places]
        latents = torch.randn(count, *SHAPE, generator=draw)
        make = given.generator(latents)
        with torch.no_grad():
            images = make.decode(make.sampler(prompts)(latents))
        for row, failed in enumerate(fails(images, prompts)):
            if failed:
                found.add(prompts[row], latents[row], images[row], found.total + row + 1)
        found.total += count
    return found


_baseline = functools.partial(baseline, NAME)


TASK = Task(
    name=NAME,
    text="A text-to-image model, in 4 steps, is searched for prompts and noise whose image lacks the thing asked for.",
    prepare=prepare,
    judge=judge,
    order="found",
    measures={
        "found": Measure(title="found", better="high", line="Failures that count, for 100 images made."),
        "first": Measure(
            title="first", better="low", digits=0, line="Images made until the first failure that counts."
        ),
        "verified": Measure(
            title="verified", unit="%", better="high", line="Of what a search hands in, failures by the oracle's word."
        ),
        "natural": Measure(
            title="natural",
            unit="%",
            better="high",
            line="Of what it hands in, noise that passes for a draw of N(0, I).",
        ),
    },
    wishes=wishes,
    shown=shown,
    baselines=(_baseline("random_search", "random search", at_random, "original"),),
    plots=(Plot(kind="bars", x="found", text="Failures for 100 images made.", problems=(NAME,)),),
)
