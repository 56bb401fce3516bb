"""A small and a large network of 25 Gaussians on a grid make one trajectory: who should make which steps?

The Gaussian study of T-Stitch. The large one alone is the aim: samples are held against what it makes of the same
noise, and against the data.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from retouch.accelerate.t_stitch import stitch
from retouch.arenas.contest import Measure, Plot
from retouch.arenas.guide import Outcome, Replica, Task, baseline, timed
from retouch.arenas.guide.tasks import _points as points
from retouch.core import seeds
from retouch.core.diffusion.denoiser import Denoiser
from retouch.core.diffusion.process import VP
from retouch.core.diffusion.sampling import sample
from retouch.worlds.gaussians import Mixture, lattice

NAME = "two_models"
STEPS, COUNT = 20, 2000
GRID = lattice(5, spacing=0.7, std=0.05)


@dataclass(frozen=True)
class Given:
    """Two models, noise, and what the large one makes of it."""

    mixture: Mixture
    small: Denoiser
    large: Denoiser
    noise: Tensor
    aim: Tensor


def prepare(seed: int, search: bool) -> Given:
    """Both networks are the replica's own, trained on the same data for as long."""
    process = VP.linear(spacing="trailing")
    small, large = (points.taught(GRID, process, seed=seed, width=width, steps=2500) for width in (24, 128))
    noise = torch.randn(COUNT, 2, generator=seeds.generator(seed, "noise"))
    return Given(GRID, small, large, noise, sample(large, noise, times=STEPS))


def judge(given: Given, samples: Tensor) -> dict[str, float]:
    """How far samples are from the large model's, and from the data."""
    return {
        "apart": float((samples - given.aim).square().sum(1).mean().sqrt()),
        "outside": points.outside(given.mixture, samples),
    }


def work(denoiser: Denoiser) -> int:
    """Multiplications of one call for one sample."""
    return sum(p.numel() for p in denoiser.model.parameters() if p.ndim == 2)


def drawn(replica: Replica, denoiser: Any, cost: float, steps: int = STEPS) -> Outcome:
    """Samples of a denoiser, with its cost against the large one's at all steps."""
    given = replica.given
    return timed([given.small, given.large], COUNT, lambda: sample(denoiser, given.noise, times=steps), {"cost": cost})


def stitched(replica: Replica, ratio: float) -> Outcome:
    """The small one first."""
    given = replica.given
    few = round(ratio * STEPS)
    cost = 100 * (few * work(given.small) / work(given.large) + STEPS - few) / STEPS
    return drawn(replica, stitch([given.small, given.large], ratio), cost)


def large_first(replica: Replica, ratio: float) -> Outcome:
    """The same cost the wrong way round."""
    given = replica.given
    few = round(ratio * STEPS)
    cost = 100 * (few * work(given.small) / work(given.large) + STEPS - few) / STEPS
    return drawn(replica, stitch([given.large, given.small], 1 - ratio), cost)


_baseline = functools.partial(baseline, NAME)


TASK = Task(
    name=NAME,
    text="A small and a large network of 25 Gaussians on a grid share the 20 steps of one trajectory.",
    prepare=prepare,
    judge=judge,
    order="apart",
    measures={
        "apart": Measure(
            title="apart", better="low", digits=3, line="Root mean square distance to the large model's samples."
        ),
        "outside": Measure(
            title="outside", unit="%", better="low", digits=2, line="Samples more than 6 deviations from every mode."
        ),
        "cost": Measure(title="cost", unit="%", better="low", line="Multiplications, against the large model's."),
    },
    baselines=(
        _baseline("large", "large alone", lambda replica: drawn(replica, replica.given.large, 100.0), "oracle"),
        _baseline(
            "small",
            "small alone",
            lambda replica: drawn(
                replica, replica.given.small, 100 * work(replica.given.small) / work(replica.given.large)
            ),
            "original",
        ),
        _baseline("large_first", "large first", lambda replica: large_first(replica, 0.4)),
        _baseline(
            "fewer_steps", "large, 12 steps", lambda replica: drawn(replica, replica.given.large, 60.0, steps=12)
        ),
        _baseline("stitch_20", "small for 20%", lambda replica: stitched(replica, 0.2)),
        _baseline("stitch_60", "small for 60%", lambda replica: stitched(replica, 0.6)),
        _baseline("stitch_80", "small for 80%", lambda replica: stitched(replica, 0.8)),
    ),
    plots=(Plot(kind="scatter", x="cost", y="apart", text="Near the large model, at what cost?", problems=(NAME,)),),
)
