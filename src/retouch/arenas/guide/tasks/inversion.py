"""One of eight Gaussians on a ring is asked for, and points of the data are inverted and made again.

The Gaussian world of CFG++'s study, with a network that has learned it in place of the exact score. Strengths are
those that the paper matches at 50 steps: lam 0.6 with a scale of 7.5.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from retouch.arenas.contest import Entry, Measure, Plot
from retouch.arenas.guide import Outcome, Replica, Task, timed
from retouch.arenas.guide.tasks import _points as points
from retouch.core import seeds
from retouch.core.diffusion.denoiser import Denoiser
from retouch.core.diffusion.guidance import Guidance, cfg
from retouch.core.diffusion.process import VP
from retouch.core.diffusion.sampling import invert, sample
from retouch.worlds.gaussians import Mixture, ring

NAME = "inversion"
STEPS, COUNT = 50, 1600
RING = ring(8)


@dataclass(frozen=True)
class Given:
    """A model, noise, what is asked for, and points of the data to invert."""

    mixture: Mixture
    denoiser: Denoiser
    noise: Tensor
    modes: Tensor
    data: Tensor
    data_modes: Tensor


def prepare(seed: int, search: bool) -> Given:
    """A network of its own for every replica."""
    denoiser = points.taught(RING, VP.linear(), seed=seed, steps=800, classes=8)
    noise = torch.randn(COUNT, 2, generator=seeds.generator(seed, "noise"))
    modes, data = RING.draw_with_modes(COUNT, seed=seeds.derive(seed, "held out"))
    return Given(RING, denoiser, noise, torch.arange(COUNT) % 8, data, modes)


def judge(given: Given, samples: Any) -> dict[str, float]:
    """How near samples are to what was asked for, and inverted points to where they were."""
    made, again = samples
    return {
        "missed": points.missed(given.mixture, made, given.modes),
        "outside": points.outside(given.mixture, made),
        "width": points.spread(given.mixture, made, given.modes),
        "back": float((again - given.data).square().sum(1).mean().sqrt()),
    }


def guided(replica: Replica, guidance: Guidance | None) -> Outcome:
    """Sample from noise, and invert data and sample again, under one rule."""
    given = replica.given
    asked, known = points.asked(given.modes), points.asked(given.data_modes)
    settings: dict[str, Any] = {"times": STEPS, "guidance": guidance}

    def draw() -> Any:
        made = sample(given.denoiser, given.noise, asked, last="x0", **settings)
        inverted = invert(given.denoiser, given.data, known, **settings)
        return made, sample(given.denoiser, inverted, known, last="x0", **settings)

    return timed([given.denoiser], 3 * COUNT, draw)


def _cfg(name: str, title: str, scale: float, kind: str = "baseline") -> Entry:
    rule = cfg(scale) if scale != 1 else None
    return Entry(name=name, title=title, kind=kind, solve=lambda replica: guided(replica, rule), problems=(NAME,))


TASK = Task(
    name=NAME,
    text="One of eight Gaussians on a ring is asked for, of a small network; points are inverted and made again.",
    prepare=prepare,
    judge=judge,
    order="back",
    measures={
        "back": Measure(
            title="way back",
            better="low",
            digits=3,
            line="Root mean square distance of a point and its reconstruction.",
        ),
        "missed": Measure(title="missed", unit="%", better="low", digits=2, line="Samples of another mode than asked."),
        "outside": Measure(
            title="outside", unit="%", better="low", digits=2, line="Samples more than 6 deviations from every mode."
        ),
        "width": Measure(title="width", better="high", digits=2, line="Spread around the modes; 1 is right."),
    },
    baselines=(
        _cfg("no_guidance", "conditional", 1.0, "original"),
        _cfg("cfg_2", "guidance, scale 2", 2.0),
        _cfg("cfg_75", "guidance, scale 7.5", 7.5),
    ),
    plots=(Plot(kind="scatter", x="back", y="missed", text="Both should be small.", problems=(NAME,)),),
)
