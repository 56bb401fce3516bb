"""Noise levels: x = alpha x0 + sigma noise, for every family of diffusion models.

    VP      alpha^2 + sigma^2 = 1       DDPM, Stable Diffusion, DiT; a table over training timesteps
    EDM     alpha = 1                   Karras et al.; time is sigma itself
    Flow    alpha = 1 - sigma           rectified flow: SD3, Flux; time is 1000 sigma

A `Process` says what alpha and sigma are at a time, and gives the `Grid` of levels that a sampler walks down.
`from_scheduler` reads both off a scheduler of diffusers, so that we take the very steps that it would take.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retouch.core.errors import InputError, in_range, one_of, positive

SPACINGS = ("leading", "linspace", "trailing")


@dataclass(frozen=True)
class Level:
    """A noise level on a grid.

    Attributes:
        time: what the model is told.
        alpha: of x0 in x.
        sigma: of the noise in x.
        index: of the step that starts here; 0 is the noisiest.
        steps: of the grid.
    """

    time: float
    alpha: float
    sigma: float
    index: int = 0
    steps: int = 1

    @property
    def ratio(self) -> float:
        """sigma / alpha: the noise level on EDM's scale."""
        return self.sigma / self.alpha if self.alpha else math.inf


@dataclass(frozen=True)
class Grid:
    """The levels that a sampler walks down.

    Attributes:
        levels: one more than steps, the noisiest first.
        start: what unit noise is multiplied by to be x at the first level.
    """

    levels: tuple[Level, ...]
    start: float

    @property
    def steps(self) -> int:
        """How many."""
        return len(self.levels) - 1


def make_grid(times: Sequence[float], alphas: Sequence[float], sigmas: Sequence[float], start: float) -> Grid:
    """A grid from its columns, each one longer than there are steps."""
    steps = len(times) - 1
    rows = zip(times, alphas, sigmas, strict=True)
    return Grid(tuple(Level(float(t), float(a), float(s), k, steps) for k, (t, a, s) in enumerate(rows)), float(start))


class Process(ABC):
    """What alpha and sigma are at a time; `VP`, `EDM` and `Flow` are its kinds."""

    @abstractmethod
    def levels(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """Alpha and sigma (b,), in float64, at times (b,)."""

    @abstractmethod
    def grid(self, steps: int) -> Grid:
        """The levels of a sampler with so many steps."""

    @abstractmethod
    def random_times(self, count: int, generator: torch.Generator) -> Tensor:
        """Times to train at (count,)."""

    def add_noise(self, x0: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """x at given times, one a sample.

        Args:
            x0: clean (b, ...): images, latents or clips.
            noise: like x0.
            times: (b,).
        """
        alpha, sigma = (spread(value, x0) for value in self.levels(times))
        return alpha * x0 + sigma * noise


def spread(value: Tensor, like: Tensor) -> Tensor:
    """Numbers (b,) with as many dimensions, and of the kind, of a tensor (b, ...)."""
    return value.to(like.device, like.dtype).view(-1, *[1] * (like.ndim - 1))


class VP(Process):
    """Variance-preserving noise, from a table.

    Args:
        alphas_cumprod: alpha^2 at every training timestep (T,), falling.
        spacing: of sampling steps: "leading", "linspace" or "trailing", as diffusers has them.
        offset: added to "leading" timesteps.
        final: alpha^2 at the end of sampling: 1, or that of timestep 0 if None.
        grid: steps -> the grid, in place of spacing, offset and final.
    """

    def __init__(
        self,
        alphas_cumprod: Tensor,
        *,
        spacing: str = "leading",
        offset: int = 0,
        final: float | None = 1.0,
        grid: Callable[[int], Grid] | None = None,
    ) -> None:
        one_of("spacing", spacing, SPACINGS)
        self.alphas_cumprod = torch.as_tensor(alphas_cumprod).detach().double().cpu()
        if self.alphas_cumprod.ndim != 1 or len(self.alphas_cumprod) < 2:
            raise InputError(f"alphas_cumprod has shape {tuple(self.alphas_cumprod.shape)}, but must be (T,)")
        if not bool((self.alphas_cumprod.diff() < 0).all()) or not 0 <= float(self.alphas_cumprod[-1]) < 1:
            raise InputError("alphas_cumprod must fall from at most 1 to at least 0")
        self.spacing, self.offset, self.final, self._grid = spacing, offset, final, grid

    @classmethod
    def linear(cls, start: float = 1e-4, end: float = 0.02, timesteps: int = 1000, **settings: Any) -> "VP":
        """Betas on a line (DDPM)."""
        return cls((1 - torch.linspace(start, end, timesteps, dtype=torch.float64)).cumprod(0), **settings)

    @classmethod
    def scaled_linear(cls, start: float = 0.00085, end: float = 0.012, timesteps: int = 1000, **settings: Any) -> "VP":
        """Roots of betas on a line (Stable Diffusion)."""
        betas = torch.linspace(start**0.5, end**0.5, timesteps, dtype=torch.float64) ** 2
        return cls((1 - betas).cumprod(0), **settings)

    @classmethod
    def cosine(cls, timesteps: int = 1000, **settings: Any) -> "VP":
        """Squared cosine (Nichol and Dhariwal), betas at most 0.999."""
        place = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
        bar = ((place + 0.008) / 1.008 * math.pi / 2).cos() ** 2
        return cls((1 - (1 - bar[1:] / bar[:-1]).clamp(max=0.999)).cumprod(0), **settings)

    @property
    def timesteps(self) -> int:
        """T, of training."""
        return len(self.alphas_cumprod)

    def levels(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """See `Process.levels`; between two timesteps sigma / alpha is on a line."""
        times = times.detach().double().cpu()
        below = times.floor().clamp(0, self.timesteps - 1).long()
        above = (below + 1).clamp(max=self.timesteps - 1)
        whole = times == below
        ratios = ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt()
        ratio = torch.lerp(ratios[below], ratios[above], times - below)
        alpha = torch.where(whole, self.alphas_cumprod[below].sqrt(), (1 + ratio.square()).rsqrt())
        sigma = torch.where(whole, (1 - self.alphas_cumprod[below]).sqrt(), ratio * (1 + ratio.square()).rsqrt())
        return alpha, sigma

    def grid(self, steps: int) -> Grid:
        """See `Process.grid`."""
        in_range("steps", steps, 1, self.timesteps)
        if self._grid is not None:
            return self._grid(steps)
        total = self.timesteps
        times: Any
        if self.spacing == "leading":
            times = (np.arange(steps) * (total // steps)).round()[::-1] + self.offset
        elif self.spacing == "linspace":
            times = np.linspace(0, total - 1, steps).round()[::-1]
        else:
            times = np.round(np.arange(total, 0, -total / steps)) - 1
        alpha, sigma = self.levels(torch.tensor(times.copy()))
        last = float(self.alphas_cumprod[0]) if self.final is None else self.final
        return make_grid([*times, 0.0], [*alpha.tolist(), last**0.5], [*sigma.tolist(), (1 - last) ** 0.5], start=1.0)

    def random_times(self, count: int, generator: torch.Generator) -> Tensor:
        """Each timestep as likely as the others."""
        return torch.randint(self.timesteps, (count,), generator=generator)


class EDM(Process):
    """Noise on top of data (Karras et al. 2022): alpha is 1 and time is sigma.

    Args:
        sigma_min: smallest noise level of sampling above 0.
        sigma_max: the largest.
        rho: how much the levels crowd at small noise.
        mean: of log sigma in training.
        std: of log sigma in training.
    """

    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
        *,
        mean: float = -1.2,
        std: float = 1.2,
    ) -> None:
        positive("sigma_min", sigma_min)
        in_range("sigma_max", sigma_max, sigma_min, above=True)
        positive("rho", rho)
        self.sigma_min, self.sigma_max, self.rho, self.mean, self.std = sigma_min, sigma_max, rho, mean, std

    def levels(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """See `Process.levels`."""
        sigma = times.detach().double().cpu()
        return torch.ones_like(sigma), sigma

    def grid(self, steps: int) -> Grid:
        """See `Process.grid` (equation 5)."""
        in_range("steps", steps, 1)
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        places = [k / max(steps - 1, 1) for k in range(steps)]
        sigmas = [*((high + place * (low - high)) ** self.rho for place in places), 0.0]
        return make_grid(sigmas, [1.0] * len(sigmas), sigmas, start=sigmas[0])

    def random_times(self, count: int, generator: torch.Generator) -> Tensor:
        """Log-normal."""
        return (self.mean + self.std * torch.randn(count, generator=generator)).exp()


class Flow(Process):
    """Rectified flow: on a line from data to noise; time is 1000 sigma.

    Args:
        shift: moves sampling steps towards noise; 1 leaves them even.
        grid: steps -> the grid, in place of shift.
    """

    def __init__(self, shift: float = 1.0, *, grid: Callable[[int], Grid] | None = None) -> None:
        positive("shift", shift)
        self.shift, self._grid = shift, grid

    def levels(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """See `Process.levels`."""
        sigma = times.detach().double().cpu() / 1000
        return 1 - sigma, sigma

    def grid(self, steps: int) -> Grid:
        """See `Process.grid`."""
        in_range("steps", steps, 1)
        if self._grid is not None:
            return self._grid(steps)
        sigmas = [1 - k / steps for k in range(steps + 1)]
        sigmas = [self.shift * s / (1 + (self.shift - 1) * s) for s in sigmas]
        return make_grid([1000 * s for s in sigmas], [1 - s for s in sigmas], sigmas, start=1.0)

    def random_times(self, count: int, generator: torch.Generator) -> Tensor:
        """Logit-normal (Esser et al. 2024)."""
        return 1000 * torch.randn(count, generator=generator).sigmoid()


def from_scheduler(scheduler: Any, **settings: Any) -> Process:
    """The process of a scheduler of diffusers, with its very grid of steps.

    Args:
        scheduler: DDIM, DDPM, Euler, DPM-Solver or FlowMatchEuler, or one that is made like them.
        settings: further arguments of its `set_timesteps`, such as `mu` for schedules that depend on resolution.

    Raises:
        InputError: if it has neither `alphas_cumprod` nor a flow's sigmas.
    """
    scheduler = copy.deepcopy(scheduler)
    if hasattr(scheduler, "alphas_cumprod"):
        return VP(scheduler.alphas_cumprod, grid=lambda steps: _vp_grid(scheduler, steps, settings))
    if "FlowMatch" in type(scheduler).__name__:
        return Flow(grid=lambda steps: flow_grid(scheduler, steps, settings))
    raise InputError(
        f"scheduler is a {type(scheduler).__name__}, but must have alphas_cumprod (DDIM, DDPM, Euler, DPM-Solver) or "
        "be a FlowMatch scheduler"
    )


def _vp_grid(scheduler: Any, steps: int, settings: dict[str, Any]) -> Grid:
    """Schedulers with sigmas (Euler, DPM-Solver) have x / alpha in place of x; those without jump by a fixed stride."""
    scheduler.set_timesteps(steps, **settings)
    times = [float(t) for t in scheduler.timesteps]
    if hasattr(scheduler, "sigmas") and len(scheduler.sigmas) == len(times) + 1:
        ratios = [float(s) for s in scheduler.sigmas]
        alphas = [(1 + ratio**2) ** -0.5 for ratio in ratios]
        sigmas = [ratio * alpha for ratio, alpha in zip(ratios, alphas, strict=True)]
        own = float(scheduler.init_noise_sigma)
        # DPM-Solver keeps x itself, with unit noise; Euler keeps x / alpha.
        start = own if own == 1 else own * alphas[0]
        return make_grid([*times, 0.0], alphas, sigmas, start)
    bars = scheduler.alphas_cumprod.double()
    stride = len(bars) // steps
    final = float(getattr(scheduler, "final_alpha_cumprod", 1.0))
    squares = [float(bars[int(t)]) for t in times]
    last = times[-1] - stride
    squares.append(float(bars[int(last)]) if last >= 0 else final)
    return make_grid([*times, 0.0], [a**0.5 for a in squares], [(1 - a) ** 0.5 for a in squares], start=1.0)


def flow_grid(scheduler: Any, steps: int, settings: dict[str, Any]) -> Grid:
    """The grid of a flow's scheduler; settings are those of its `set_timesteps`."""
    if scheduler.config.get("use_dynamic_shifting") and "mu" not in settings:
        raise InputError("The scheduler shifts its steps with the resolution: from_scheduler needs mu")
    scheduler.set_timesteps(steps, **settings)
    sigmas = [float(s) for s in scheduler.sigmas]
    times = [*(float(t) for t in scheduler.timesteps), 0.0]
    return make_grid(times, [1 - s for s in sigmas], sigmas, start=1.0)
