"""A network of three Gaussians on a line makes samples that lie between them: does a score find those?

The study of mode interpolation: draw, score, keep 90%. What is right is exact: within 6 deviations of a mode.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from retouch.arenas.contest import Measure
from retouch.arenas.guide import Outcome, Replica, Task, baseline
from retouch.arenas.guide.tasks import _points as points
from retouch.audit.mode_interpolation import Scored, auroc, mode_interpolation
from retouch.core import seeds
from retouch.core.diffusion.denoiser import Denoiser
from retouch.core.diffusion.process import VP
from retouch.core.diffusion.sampling import sample
from retouch.core.diffusion.steps import ddpm
from retouch.worlds.gaussians import Mixture, line

NAME = "between"
STEPS, COUNT, KEPT = 100, 20_000, 0.9
LINE = line((1.0, 2.0, 3.0))


@dataclass(frozen=True)
class Given:
    """A model and noise."""

    mixture: Mixture
    denoiser: Denoiser
    noise: Tensor
    seed: int


def prepare(seed: int, search: bool) -> Given:
    """A network of its own for every replica."""
    denoiser = points.taught(LINE, VP.linear(0.001, 0.2, STEPS), seed=seed, steps=3000)
    noise = torch.randn(COUNT, 1, generator=seeds.generator(seed, "noise"))
    return Given(LINE, denoiser, noise, seed)


def judge(given: Given, scored: Scored) -> dict[str, float]:
    """Of the samples outside of the data, the share that is gone when 90% of the others are kept."""
    outside = given.mixture.distances(scored.samples) > points.MARGIN
    kept = scored.scores <= scored.scores[~outside].double().quantile(KEPT).to(scored.scores)
    found = {
        "outside": 100 * float(outside.double().mean()),
        "left": 100 * float((outside & kept).double().sum() / kept.double().sum().clamp(min=1)),
    }
    if bool(outside.any()):
        found |= {
            "removed": 100 * float((outside & ~kept).double().sum() / outside.double().sum()),
            "auroc": 100 * auroc(scored.scores, outside),
        }
    return found


def scored(replica: Replica, window: float) -> Outcome:
    """Variance of the predicted x0 over the last share of the steps."""
    given = replica.given
    draw = seeds.generator(given.seed, "sampling")
    return Outcome(
        mode_interpolation(given.denoiser, given.noise, window=window, times=STEPS, step=ddpm, generator=draw)
    )


def at_random(replica: Replica) -> Outcome:
    """A score that knows nothing."""
    given = replica.given
    draw = seeds.generator(given.seed, "sampling")
    x = sample(given.denoiser, given.noise, times=STEPS, step=ddpm, generator=draw)
    return Outcome(Scored(x, torch.rand(len(x), generator=seeds.generator(given.seed, "random"))))


def far(replica: Replica) -> Outcome:
    """Distance to the mean of all samples: what an outlier is without looking at the trajectory."""
    found = at_random(replica).samples
    assert isinstance(found, Scored)
    return Outcome(Scored(found.samples, (found.samples - found.samples.mean(0)).norm(dim=1)))


def exact(replica: Replica) -> Outcome:
    """The true score makes hardly any of them."""
    given = replica.given
    draw = seeds.generator(given.seed, "sampling")
    denoiser = given.mixture.denoiser(given.denoiser.process)
    return Outcome(mode_interpolation(denoiser, given.noise, window=0.05, times=STEPS, step=ddpm, generator=draw))


_baseline = functools.partial(baseline, NAME)


TASK = Task(
    name=NAME,
    text="Samples between three Gaussians on a line, of a small network, are looked for; 90% of the others are kept.",
    prepare=prepare,
    judge=judge,
    order="removed",
    measures={
        "removed": Measure(
            title="removed", unit="%", better="high", line="Samples outside of the data that the filter takes out."
        ),
        "auroc": Measure(title="AUROC", unit="%", better="high", line="Of the score; 50 is chance."),
        "outside": Measure(
            title="outside", unit="%", better="low", digits=2, line="Samples more than 6 deviations from every mode."
        ),
        "left": Measure(title="left", unit="%", better="low", digits=2, line="Such samples among those kept."),
    },
    baselines=(
        _baseline("exact", "the true score", exact, "oracle"),
        _baseline("random_filter", "at random", at_random, "original"),
        _baseline("outlier", "far from the mean", far),
        _baseline("wide_window", "variance, last 40%", lambda replica: scored(replica, 0.4)),
    ),
)
