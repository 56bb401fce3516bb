"""A small and a large diffusion transformer of shapes make one trajectory: who should make which steps?

The study of T-Stitch in small: both are shipped DiT models on the same latents, trained for as many steps, and what is
asked for are classes such as "red circle", each as often as the others.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from retouch.accelerate.t_stitch import stitch, stitched_cost
from retouch.arenas.contest import Measure, Plot
from retouch.arenas.guide import Outcome, Replica, Task, baseline, timed
from retouch.arenas.guide.tasks import _classes as world
from retouch.core import seeds
from retouch.core.diffusion.denoiser import Denoiser
from retouch.core.diffusion.guidance import cfg
from retouch.core.diffusion.sampling import sample, unit_noise

NAME = "stitched"
TIMES, STEPS, SCALE = 2, 30, 2.0  # images a class; steps of DDIM; guidance scale that the models are measured at
RATIO = 0.4  # the paper's
SIZE = 64


@dataclass(frozen=True, kw_only=True)
class Given(world.Asked):
    """Two models, noise and classes."""

    small: Denoiser
    large: Denoiser


def prepare(seed: int, search: bool) -> Given:
    """The models are the same in all replicas."""
    small, large = world.denoiser("dit-small"), world.denoiser("dit-large")
    classes = world.every_class(TIMES, seed)
    noise = unit_noise(large, len(classes), seeds.generator(seed, "noise"))
    return Given(small=small, large=large, noise=noise, classes=classes, seed=seed)


@functools.lru_cache(maxsize=4)
def work(denoiser: Denoiser) -> int:
    """Multiplications and additions of one call for one sample."""
    from torch.utils.flop_counter import FlopCounterMode

    grid = denoiser.process.grid(1)
    noise = unit_noise(denoiser, 1, seeds.generator(0))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        denoiser(noise, grid.levels[0], denoiser.encode(world.CLASSES[0], 1))
    return int(counter.get_total_flops())


def share(given: Given, ratio: float) -> float:
    """Work with the small model at this share of the steps, against that of the large one alone."""
    costs = [work(given.small), work(given.large)]
    return stitched_cost(costs, ratio, STEPS) / (costs[1] * STEPS)


def drawn(replica: Replica, denoiser: Any, cost: float, steps: int | None = None) -> Outcome:
    """Images of a denoiser by DDIM, with its work against the large one's at all steps."""
    given: Given = replica.given
    times = STEPS if steps is None else steps

    def draw() -> Tensor:
        return world.batches(
            lambda part: given.large.decode(
                sample(denoiser, given.noise[part], given.classes[part], guidance=cfg(SCALE), times=times)
            ),
            len(given.noise),
        )

    return timed([given.small, given.large], len(given.noise), draw, {"cost": 100 * cost})


def stitched(replica: Replica, ratio: float) -> Outcome:
    """The small one first."""
    given = replica.given
    return drawn(replica, stitch([given.small, given.large], ratio), share(given, ratio))


def large_first(replica: Replica) -> Outcome:
    """The same work the wrong way round."""
    given = replica.given
    return drawn(replica, stitch([given.large, given.small], 1 - RATIO), share(given, RATIO))


def large(replica: Replica) -> Outcome:
    """The large one at all steps."""
    return drawn(replica, replica.given.large, 1.0)


def small(replica: Replica) -> Outcome:
    """The small one at all steps."""
    return drawn(replica, replica.given.small, share(replica.given, 1.0))


def fewer(replica: Replica) -> Outcome:
    """The large one in as many steps as cost what stitching costs."""
    steps = round(STEPS * share(replica.given, RATIO))
    return drawn(replica, replica.given.large, steps / STEPS, steps)


_baseline = functools.partial(baseline, NAME)


TASK = Task(
    name=NAME,
    text="A small and a large diffusion transformer of shapes share the 30 steps of one trajectory.",
    prepare=prepare,
    judge=world.judge,
    order=world.RIGHT,
    measures={
        **world.MEASURES,
        "cost": Measure(title="cost", unit="%", better="low", line="Multiplications, against the large model's."),
    },
    wishes=world.wishes,
    shown=world.shown,
    baselines=(
        _baseline("dit_large", "large alone", large, "original"),
        _baseline("dit_small", "small alone", small),
        _baseline("dit_fewer_steps", "large, fewer steps at T-Stitch's cost", fewer),
        _baseline("dit_large_first", "large first, at T-Stitch's cost", large_first),
        _baseline("dit_real", "scenes of these classes", functools.partial(world.real, size=SIZE), "oracle"),
    ),
    plots=(Plot(kind="scatter", x="cost", y=world.RIGHT, text="Right images, at what cost?", problems=(NAME,)),),
)
