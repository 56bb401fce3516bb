"""SAGE in the arena `guide`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from retouch.arenas.contest import Claim, Entry
from retouch.arenas.guide import Outcome, Replica
from retouch.arenas.guide.tasks import _classes as world
from retouch.arenas.guide.tasks import failing
from retouch.arenas.guide.tasks.failing import NAME, Found, Given
from retouch.audit.sage import search_latent
from retouch.core import seeds
from retouch.worlds import shapes


class Once:
    """A deterministic sampler that makes images of the same latents once only, and knows when it made which.

    `search_latent` makes its start three times, to see whether it comes out the same; none of these is a new image.
    """

    def __init__(self, sampler: Callable[[Tensor], Tensor], before: int) -> None:
        self.sampler, self.total = sampler, before
        self.made: list[tuple[Tensor, Tensor, int]] = []

    def __call__(self, z: Tensor) -> Tensor:
        """Clean samples."""
        if not self.made or not torch.equal(self.made[-1][0], z):
            self.total += len(z)
            self.made.append((z.detach().clone(), self.sampler(z), self.total))
        return self.made[-1][1]

    def when(self, latent: Tensor) -> int:
        """How many images had been made when that of this latent was."""
        return next(total for z, _, total in self.made if bool((z == latent).flatten(1).all(1).any()))


def solve(replica: Replica, *, latents: int = 8, steps: int = 3, step_size: float = 0.4) -> Outcome:
    """Some latents a prompt, pushed to where CLIP no longer sees what it says; then the next prompt."""

    def search(given: Given) -> Found:
        found, draw, turn = Found(), seeds.generator(given.seed, "sage"), 0
        while found.total < failing.BUDGET:
            left = failing.BUDGET - found.total
            count = min(latents, left)
            name = given.classes[turn % len(given.classes)]
            start = torch.randn(count, *failing.SHAPE, generator=draw)
            one_prompt(given, found, name, start, steps=min(steps, left // count - 1), step_size=step_size)
            turn += 1
        return found

    return failing.searched(replica, search)


def one_prompt(given: Given, found: Found, name: str, start: Tensor, *, steps: int, step_size: float) -> None:
    """Search latents of one prompt, and hand in those that CLIP or the oracle takes for failures."""
    label, prompt = world.CLASSES.index(name), shapes.with_article(name)
    make = given.generator(start)
    sampler = Once(make.sampler(prompt), found.total)

    def seen(images: Tensor) -> Tensor:
        """The oracle as a judge: the class asked for where it is there, and another where it is not."""
        missed = torch.tensor(failing.fails(images, [prompt] * len(images)))
        return (label + missed.long()) % len(world.CLASSES)

    settings: Any = {"steps": steps, "step_size": step_size, "held_out": [seen], "shrink": True}
    result = search_latent(sampler, make.decode, [given.classifier], start, label, **settings)
    report = result.report
    for row in (report.fooled | report.verdicts[-1]).nonzero()[:, 0].tolist():
        latent = result.inputs[row]
        found.add(prompt, latent, result.images[row], sampler.when(latent))
    found.total = sampler.total


def _claim(text: str, measure: str, relation: str, factor: float) -> Claim:
    return Claim(
        text=text,
        problem=NAME,
        measure=measure,
        other="random_search",
        relation=relation,
        factor=factor,
        source="section 4; our factor",
    )


ENTRY = Entry(
    name="sage",
    title="SAGE, latents",
    solve=solve,
    settings={"": {"latents": 8, "steps": 3, "step_size": 0.4}},
    grid={"steps": (3, 7, 15), "step_size": (0.05, 0.1, 0.2, 0.4)},
    problems=(NAME,),
    note="searched with the shipped CLIP, confirmed by the oracle",
    weakness=(
        "A model that fails often leaves random search little to lose: a push costs several images. One that keeps its "
        "prompts nearly whatever the noise gives a push nowhere to lead. And with a single classifier to search with, "
        "some failures are the classifier's own."
    ),
    claims=(
        _claim("It finds twice as many failures as random search in as many images.", "found", "at least", 2.0),
        _claim("The first comes no later.", "first", "at most", 1.0),
    ),
)
