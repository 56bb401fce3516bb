"""Mixtures of Gaussians in one or two dimensions, whose score is known exactly at every noise level.

    mixture = line((1.0, 2.0, 3.0))          or ring(8), lattice(5), or a Mixture of your own
    mixture.draw(1000, seed=0)               samples (1000, d)
    mixture.denoiser(VP.linear())            a `Denoiser` that is exact, for `core.diffusion.sampling.sample`
    mixture.distances(x)                     to the nearest mean, in standard deviations: the oracle of what is a sample

With noise, x = alpha x0 + sigma noise, it is such a mixture still, of means alpha m and variance alpha^2 s^2 + sigma^2,
so x0 and score have closed forms. A network that learns from samples can be held against them.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from retouch.core import seeds
from retouch.core.diffusion.denoiser import Denoiser
from retouch.core.diffusion.process import Process
from retouch.core.errors import InputError, in_range, positive

KIND = "gaussians"
VARIANTS: tuple[str, ...] = ()


class Mixture:
    """Gaussians of one width.

    Args:
        means: (k, d).
        std: of each, in every direction.
        weights: of each (k,); equal if None.
    """

    def __init__(self, means: Tensor, std: float = 0.05, weights: Tensor | None = None) -> None:
        self.means = torch.as_tensor(means, dtype=torch.float64)
        if self.means.ndim != 2 or not len(self.means):
            raise InputError(f"means has shape {tuple(self.means.shape)}, but must be (modes, dimensions)")
        positive("std", std)
        weights = torch.ones(len(self.means)) if weights is None else torch.as_tensor(weights)
        if weights.shape != self.means.shape[:1] or not bool((weights > 0).all()):
            raise InputError(f"weights is {weights.tolist()}, but must be {len(self.means)} numbers above 0")
        self.std, self.weights = std, weights.double() / weights.double().sum()

    @property
    def dimensions(self) -> int:
        """1, 2 or more."""
        return self.means.shape[1]

    def draw(self, count: int, *, seed: int = 0) -> Tensor:
        """Samples (count, d), in float32."""
        return self.draw_with_modes(count, seed=seed)[1]

    def draw_with_modes(self, count: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Modes (count,) and samples of them (count, d)."""
        positive("count", count)
        draw = seeds.generator(seed, "gaussians")
        modes = torch.multinomial(self.weights, count, replacement=True, generator=draw)
        noise = torch.randn(count, self.dimensions, generator=draw, dtype=torch.float64)
        return modes, (self.means[modes] + self.std * noise).float()

    def responsibilities(self, x: Tensor, alpha: float = 1.0, sigma: float = 0.0) -> Tensor:
        """Posterior probability of each mode (n, k) for noisy samples (n, d)."""
        means, weights = self.means.to(x), self.weights.to(x)
        variance = alpha**2 * self.std**2 + sigma**2
        squares = (x[:, None] - alpha * means).square().sum(-1)
        return (weights.log() - squares / (2 * variance)).softmax(-1)

    def log_density(self, x: Tensor, alpha: float = 1.0, sigma: float = 0.0) -> Tensor:
        """Of noisy samples (n, d), in nats (n,)."""
        means, weights = self.means.to(x), self.weights.to(x)
        variance = alpha**2 * self.std**2 + sigma**2
        squares = (x[:, None] - alpha * means).square().sum(-1)
        width = self.dimensions / 2 * math.log(2 * math.pi * variance)
        return (weights.log() - squares / (2 * variance)).logsumexp(-1) - width

    def x0(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """The mean of x0 given x: the best prediction there is (n, d)."""
        means = self.means.to(x)
        variance = alpha**2 * self.std**2 + sigma**2
        within = means + alpha * self.std**2 / variance * (x[:, None] - alpha * means)
        return (self.responsibilities(x, alpha, sigma)[..., None] * within).sum(1)

    def score(self, x: Tensor, alpha: float = 1.0, sigma: float = 0.0) -> Tensor:
        """Gradient of the log-density at noisy samples (n, d)."""
        means = self.means.to(x)
        variance = alpha**2 * self.std**2 + sigma**2
        pull = (alpha * means - x[:, None]) / variance
        return (self.responsibilities(x, alpha, sigma)[..., None] * pull).sum(1)

    def distances(self, x: Tensor) -> Tensor:
        """To the nearest mean, in standard deviations (n,)."""
        return torch.cdist(x.double(), self.means.to(x.device)).amin(1) / self.std

    def denoiser(self, process: Process) -> Denoiser:
        """An exact denoiser; its condition {"modes": (n, k)} weighs the modes, and without one all are as here."""
        return Denoiser(_Exact(self, process), process, predicts="x0")


class _Exact(nn.Module):
    def __init__(self, mixture: Mixture, process: Process) -> None:
        super().__init__()
        self.mixture, self.process = mixture, process

    def forward(self, x: Tensor, time: Tensor, modes: Tensor | None = None) -> Tensor:
        alpha, sigma = (float(v[0]) for v in self.process.levels(time[:1]))
        if modes is None:
            return self.mixture.x0(x, alpha, sigma)
        # Weights of a sample's own enter the posterior as a further factor.
        mixture, means = self.mixture, self.mixture.means.to(x)
        variance = alpha**2 * mixture.std**2 + sigma**2
        posterior = mixture.responsibilities(x, alpha, sigma) * modes.to(x)
        posterior = posterior / posterior.sum(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
        within = means + alpha * mixture.std**2 / variance * (x[:, None] - alpha * means)
        return (posterior[..., None] * within).sum(1)


def only(mixture: Mixture, modes: Sequence[int]) -> Mapping[str, Any]:
    """The condition that a sample is of one mode, for each of a number of samples."""
    for mode in modes:
        in_range("modes", mode, 0, len(mixture.means) - 1)
    return {"modes": torch.eye(len(mixture.means))[torch.as_tensor(modes)]}


def line(modes: Sequence[float] = (1.0, 2.0, 3.0), std: float = 0.05) -> Mixture:
    """In one dimension."""
    return Mixture(torch.tensor(modes, dtype=torch.float64)[:, None], std)


def ring(modes: int = 8, radius: float = 1.0, std: float = 0.05) -> Mixture:
    """On a circle."""
    in_range("modes", modes, 1)
    angle = 2 * math.pi * torch.arange(modes, dtype=torch.float64) / modes
    return Mixture(radius * torch.stack([angle.cos(), angle.sin()], 1), std)


def lattice(side: int = 5, spacing: float = 2.0, std: float = 0.05, *, turned: bool = False) -> Mixture:
    """On a square grid around the origin, or on its diagonals if `turned`."""
    in_range("side", side, 1)
    place = spacing * (torch.arange(side, dtype=torch.float64) - (side - 1) / 2)
    means = torch.cartesian_prod(place, place)
    half = math.sqrt(0.5)
    turn = torch.tensor([[half, -half], [half, half]], dtype=torch.float64)
    return Mixture(means @ turn if turned else means, std)
