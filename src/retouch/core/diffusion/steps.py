"""From one noise level to the next, as pure functions of alpha and sigma: the same for VP, EDM and flow models.

    ddim        x' = alpha' x0 + sigma' noise                     also Euler's step: of EDM in x / alpha, of a flow in x
    ddpm        the same with fresh noise (eta = 1)               also the ancestral Euler step
    heun        Euler, asked again at its end, and averaged       two calls a step but for the last
    dpmpp_2m    DPM-Solver++ of order 2 with the last prediction  one call a step

A step takes x0 and noise as they are predicted and never derives one from the other, so that a rule which takes them
from different branches (CFG++) works with all of them: the first-order part is alpha' x0 + sigma' noise, and what
higher orders add is a change of x0 along the way.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from retouch.core.diffusion.denoiser import Prediction
from retouch.core.diffusion.process import Level
from retouch.core.errors import in_range


@dataclass
class Move:
    """One step of a sampler.

    Attributes:
        x: where it starts (b, ...).
        prediction: there.
        here: noise level it starts at.
        there: noise level it leads to.
        predict: (x, level) -> prediction, for steps that ask again.
        generator: of fresh noise.
        last: the move before this one, or None.
        denoiser: which is asked.
        conditions: of its branches.
    """

    x: Tensor
    prediction: Prediction
    here: Level
    there: Level
    predict: Callable[[Tensor, Level], Prediction]
    generator: torch.Generator | None = None
    last: "Move | None" = None
    denoiser: Any = field(default=None, repr=False)
    conditions: Any = field(default=None, repr=False)

    @property
    def straight(self) -> Tensor:
        """alpha' x0 + sigma' noise: where the prediction leads if it is true."""
        return self.there.alpha * self.prediction.x0 + self.there.sigma * self.prediction.noise


class Step(Protocol):
    """A rule that makes a move."""

    def __call__(self, move: Move) -> Tensor: ...


def ddim(move: Move, *, eta: float = 0.0) -> Tensor:
    """Deterministic, or with a share eta of DDPM's noise (Song et al. 2021, equation 12, for any alpha and sigma)."""
    if eta == 0:
        return move.straight
    in_range("eta", eta, 0, 1)
    fresh = eta * ancestral_sigma(move.here, move.there)
    noise = draw_like(move.x, move.generator)
    kept = math.sqrt(max(move.there.sigma**2 - fresh**2, 0.0))
    return move.there.alpha * move.prediction.x0 + kept * move.prediction.noise + fresh * noise


def ddpm(move: Move) -> Tensor:
    """With all of DDPM's noise: the posterior of x' given x and x0."""
    return ddim(move, eta=1.0)


euler = ddim  # of the flow or of EDM: the same step, here under the name that is usual there


def heun(move: Move) -> Tensor:
    """Second order: the mean of the directions at both ends (Karras et al. 2022, algorithm 1)."""
    here, there = move.here, move.there
    end = move.straight
    if there.sigma == 0:
        return end
    again = move.predict(end, replace(there, index=here.index))  # still this step, for windows and the like
    # In x / alpha over sigma / alpha a direction is the noise itself, as it leads from x0.
    start = move.x / here.alpha if here.alpha else None
    width = there.ratio - here.ratio
    if start is None or not math.isfinite(width):
        return end
    first = (end / there.alpha - start) / width
    second = (end / there.alpha - again.x0) / there.ratio
    return there.alpha * (start + width * (first + second) / 2)


def dpmpp_2m(move: Move) -> Tensor:
    """Second order from the step before (Lu et al. 2022, algorithm 2): x0 is taken on as it has changed."""
    here, there, last = move.here, move.there, move.last
    if last is None or there.sigma == 0 or last.here.alpha == 0:
        return move.straight
    width = math.log(here.ratio / there.ratio)
    before = math.log(last.here.ratio / here.ratio)
    # The x0 that the last move started from; if x0 and noise come from two branches, that of the noise's.
    old = (last.x - last.here.sigma * last.prediction.noise) / last.here.alpha
    change = (move.prediction.x0 - old) * (width / before) / 2
    return move.straight - there.alpha * math.expm1(-width) * change


def ancestral_sigma(here: Level, there: Level) -> float:
    """Standard deviation of what DDPM adds on the way from one level to the next."""
    if here.sigma == 0:
        return 0.0
    rest = here.sigma**2 - (here.alpha / there.alpha) ** 2 * there.sigma**2
    return there.sigma / here.sigma * math.sqrt(max(rest, 0.0))


def draw_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Unit noise of the shape of x, drawn on the CPU, so that a seed means the same on every device."""
    from retouch.core import seeds

    drawn = torch.randn(x.shape, generator=seeds.fresh(generator), dtype=torch.float32)
    return drawn.to(x.device, x.dtype)


def ddim_inverse(x: Tensor, prediction: Prediction, here: Level, there: Level) -> Tensor:
    """From a level to a noisier one: the step `ddim` from there, solved for where it started.

    Args:
        x: at `here`.
        prediction: of x at the time of `there`, which is taken for that of the sample wanted.
        here: where x is.
        there: the noisier level.
    """
    x0 = (x - here.sigma * prediction.noise) / here.alpha
    along = (x - there.alpha * prediction.x0) / there.sigma  # the noise that x0 was predicted with
    return there.alpha * x0 + there.sigma * along
