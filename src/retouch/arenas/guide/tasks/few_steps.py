"""The class-conditional model of pixels in few steps of Heun.

The study of Skip-Tuning in small, on EDM's preconditioning and sampler as in the paper: 5 steps, which are 9 calls.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from retouch.arenas.contest import Plot
from retouch.arenas.guide import Outcome, Replica, Task, baseline, timed
from retouch.arenas.guide.tasks import _classes as world
from retouch.core import seeds
from retouch.core.diffusion.denoiser import Denoiser
from retouch.core.diffusion.sampling import unit_noise
from retouch.core.diffusion.steering import Steering
from retouch.core.diffusion.steps import heun

NAME = "few_steps"
TIMES, STEPS = 2, 5  # images a class; steps
SIZE = 32


@dataclass(frozen=True, kw_only=True)
class Given(world.Asked):
    """A model, noise and classes."""

    denoiser: Denoiser


def prepare(seed: int, search: bool) -> Given:
    """The model is the same in all replicas."""
    denoiser = world.denoiser("pixels")
    classes = world.every_class(TIMES, seed)
    noise = unit_noise(denoiser, len(classes), seeds.generator(seed, "noise"))
    return Given(denoiser=denoiser, noise=noise, classes=classes, seed=seed)


def drawn(replica: Replica, steer: Callable[[Denoiser], Steering] | None = None, steps: int | None = None) -> Outcome:
    """Images by Heun's sampler, perhaps steered; the model is told the class, and not guided beyond that."""
    given: Given = replica.given
    steering = Steering() if steer is None else steer(given.denoiser)
    times = STEPS if steps is None else steps

    def part(rows: slice) -> Tensor:
        classes = given.classes[rows]
        x = steering.sample(given.denoiser, given.noise[rows], classes, scale=1.0, step=heun, times=times)
        return given.denoiser.decode(x)

    return timed([given.denoiser], len(given.noise), lambda: world.batches(part, len(given.noise)))


def plain(replica: Replica) -> Outcome:
    """As it is."""
    return drawn(replica)


def twice(replica: Replica) -> Outcome:
    """Twice the steps."""
    return drawn(replica, steps=2 * STEPS)


_baseline = functools.partial(baseline, NAME)


TASK = Task(
    name=NAME,
    text="A class-conditional model of pixels draws shapes in 5 steps of Heun.",
    prepare=prepare,
    judge=world.judge,
    order=world.DISTANCE,
    measures=world.MEASURES,
    wishes=world.wishes,
    shown=world.shown,
    baselines=(
        _baseline("heun_5", "5 steps", plain, "original"),
        _baseline("heun_10", "10 steps", twice),
        _baseline("pixels_real", "scenes of these classes", functools.partial(world.real, size=SIZE), "oracle"),
    ),
    plots=(
        Plot(kind="scatter", x="calls", y=world.DISTANCE, text="Near held-out scenes, at what cost?", problems=(NAME,)),
    ),
)
