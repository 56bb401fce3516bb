"""Handwritten digits without a condition, in few steps, of a small UNet that is not trained to the end.

The study of perturbed-attention guidance in small, and that of Skip-Tuning: neither needs a condition. What is judged
is whether the shipped classifier is sure of what it sees, and how far its features are from those of real digits.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from retouch.arenas.contest import Measure, Plot
from retouch.arenas.guide import Outcome, Replica, Task, baseline, timed
from retouch.arenas.guide.tasks import _digits as world
from retouch.core import seeds
from retouch.core.diffusion.denoiser import Denoiser
from retouch.core.diffusion.steering import Steering
from retouch.worlds import digits

NAME = "free"
COUNT, STEPS = 500, 10


@dataclass(frozen=True)
class Given:
    """A model and noise."""

    denoiser: Denoiser
    noise: Tensor


def prepare(seed: int, search: bool) -> Given:
    """A network of its own for every replica."""
    return Given(world.taught(seed), torch.randn(COUNT, 1, 8, 8, generator=seeds.generator(seed, "noise")))


def judge(given: Given, images: Tensor) -> dict[str, float]:
    """What the classifier makes of the images."""
    return {"distance": world.distance(images), "unsure": world.unsure(images), "variety": world.variety(images)}


def drawn(replica: Replica, steer: Callable[[Denoiser], Steering] | None = None, steps: int = STEPS) -> Outcome:
    """Images by DDIM, perhaps steered."""
    given = replica.given
    steering = Steering() if steer is None else steer(given.denoiser)

    def draw() -> Tensor:
        x = steering.sample(given.denoiser, given.noise, None, scale=1.0, times=steps)
        return given.denoiser.decode(x)

    return timed([given.denoiser], COUNT, draw)


def real(replica: Replica) -> Outcome:
    """Digits of training: the distance of two real sets."""
    train: Any = digits.data("train").inputs
    order = torch.randperm(len(train), generator=seeds.generator(replica.seed, "real"))
    return Outcome(train[order[:COUNT]])


_baseline = functools.partial(baseline, NAME)


TASK = Task(
    name=NAME,
    text="Handwritten digits without a condition, in 10 steps, of a small UNet that is not trained to the end.",
    prepare=prepare,
    judge=judge,
    order="distance",
    measures={
        "distance": Measure(
            title="distance",
            better="low",
            digits=2,
            line="Fréchet distance to real digits, of features.",
        ),
        "unsure": Measure(
            title="unsure", unit="%", better="low", line="Images that a classifier gives no class 90% of."
        ),
        "variety": Measure(title="variety", unit="nats", better="high", digits=2, line="Entropy of the classes drawn."),
    },
    baselines=(
        _baseline("free_plain", "10 steps", drawn, "original"),
        _baseline("twice", "20 steps", lambda replica: drawn(replica, steps=2 * STEPS)),
        _baseline("many", "50 steps", lambda replica: drawn(replica, steps=5 * STEPS)),
        _baseline("real", "real digits", real, "oracle"),
    ),
    plots=(Plot(kind="scatter", x="calls", y="distance", text="Near real digits, at what cost?", problems=(NAME,)),),
)
