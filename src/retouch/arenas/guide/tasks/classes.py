"""An unconditional network of eight Gaussians on a ring is steered to one of them by a classifier.

Studies of EluCD and of PPAP, in points: the classifier has seen clean points alone, and what it says of noisy ones is
a guess. Who judges is exact: the distance to the mode that was asked for.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retouch.arenas.contest import Measure
from retouch.arenas.guide import Outcome, Replica, Task, baseline, timed
from retouch.arenas.guide.tasks import _points as points
from retouch.core import seeds
from retouch.core.data import TensorData
from retouch.core.diffusion.denoiser import Denoiser
from retouch.core.diffusion.process import VP
from retouch.core.diffusion.sampling import Hook, sample
from retouch.core.diffusion.steps import Move, ancestral_sigma, ddpm
from retouch.core.loop import Run, fit
from retouch.core.models import Batch, unpack
from retouch.worlds.gaussians import Mixture, ring

NAME = "classes"
STEPS, COUNT, ITERATIONS = 100, 1600, 1000
RING = ring(8)


@dataclass(frozen=True)
class Given:
    """An unconditional model, a classifier of clean points, noise and what is asked for."""

    mixture: Mixture
    denoiser: Denoiser
    classifier: nn.Module
    noise: Tensor
    modes: Tensor
    seed: int


def classifier() -> nn.Module:
    """Points to logits of the eight modes; with layers for ReLU, as off-the-shelf classifiers have them."""
    return nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))


def prepare(seed: int, search: bool) -> Given:
    """Both networks are the replica's own."""
    process = VP.linear()
    denoiser = points.taught(RING, process, seed=seed, steps=2000)
    modes, data = RING.draw_with_modes(10_000, seed=seeds.derive(seed, "classifier"))
    with seeds.isolated(seeds.derive(seed, "classifier weights")):
        guide = classifier()
    _train(guide, data, modes, seed, lambda x, run: x)
    noise = torch.randn(COUNT, 2, generator=seeds.generator(seed, "noise"))
    return Given(RING, denoiser, guide.eval(), noise, torch.arange(COUNT) % 8, seed)


def _train(model: nn.Module, data: Tensor, modes: Tensor, seed: int, noisy: Any) -> None:
    def objective(model: nn.Module, batch: Batch, run: Run) -> Tensor:
        x, labels = unpack(batch)
        return F.cross_entropy(model(noisy(x, run)), labels)

    fit(
        model,
        TensorData(data, modes),
        objective,
        steps=ITERATIONS,
        batch_size=256,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=2e-3),
        seed=seeds.derive(seed, "classifier training"),
        progress=False,
    )


def judge(given: Given, samples: Tensor) -> dict[str, float]:
    """How near samples are to what was asked for."""
    return {
        "wrong": points.wrong(given.mixture, samples, given.modes),
        "missed": points.missed(given.mixture, samples, given.modes),
        "outside": points.outside(given.mixture, samples),
        "width": points.spread(given.mixture, samples, given.modes),
    }


class AtNoise(Hook):
    """Classifier guidance on x_t (Dhariwal and Nichol, 2021): the mean moves by variance times the gradient there.

    Args:
        model: (x_t, level) -> logits.
        modes: asked for (n,).
        scale: of the gradient.
    """

    def __init__(self, model: Any, modes: Tensor, scale: float) -> None:
        self.model, self.modes, self.scale = model, modes, scale

    def after(self, move: Move, x: Tensor) -> Tensor:
        with torch.enable_grad():
            at = move.x.detach().requires_grad_()
            logits = self.model(at, move.here).log_softmax(1)
            (slope,) = torch.autograd.grad(logits.gather(1, self.modes[:, None]).sum(), at)
        return x + ancestral_sigma(move.here, move.there) ** 2 * self.scale * slope


def steered(replica: Replica, hooks: Any) -> Outcome:
    """DDPM with hooks."""
    given = replica.given

    def draw() -> Tensor:
        generator = seeds.generator(given.seed, "sampling")
        return sample(given.denoiser, given.noise, times=STEPS, step=ddpm, hooks=hooks, generator=generator)

    return timed([given.denoiser], COUNT, draw)


def on_noise(replica: Replica, *, scale: float) -> Outcome:
    """The clean classifier asked about noisy points."""
    given = replica.given
    return steered(replica, [AtNoise(lambda x, level: given.classifier(x), given.modes, scale)])


class NoiseAware(nn.Module):
    """A classifier that is told the noise level."""

    def __init__(self, process: VP) -> None:
        super().__init__()
        self.process, self.net = process, nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.head = nn.Linear(64, 8)

    def forward(self, both: tuple[Tensor, Tensor]) -> Tensor:
        """Noisy points (n, 2) and log of signal to noise (n, 1), to logits."""
        return self.head(self.net(torch.cat(both, 1)))


def aware(replica: Replica, *, scale: float) -> Outcome:
    """A classifier trained on noisy points with labels, as long as the clean one."""
    given = replica.given
    process: Any = given.denoiser.process
    modes, data = given.mixture.draw_with_modes(10_000, seed=seeds.derive(given.seed, "classifier"))
    with seeds.isolated(seeds.derive(given.seed, "aware")):
        model = NoiseAware(process)

    def told(times: Tensor) -> Tensor:
        alpha, sigma = process.levels(times)
        return ((alpha / sigma).log() / 4).float()[:, None]

    def noisy(x: Tensor, run: Run) -> tuple[Tensor, Tensor]:
        times = process.random_times(len(x), run.generator)
        return process.add_noise(x, torch.randn(x.shape, generator=run.generator), times), told(times)

    _train(model, data, modes, given.seed, noisy)
    model.eval()

    def asked(x: Tensor, level: Any) -> Tensor:
        return model((x, told(torch.full((len(x),), int(level.time)))))

    return steered(replica, [AtNoise(asked, given.modes, scale)])


_baseline = functools.partial(baseline, NAME)


SCALES = (1.0, 2.0, 4.0, 8.0)
TASK = Task(
    name=NAME,
    text="A classifier steers an unconditional network of eight Gaussians on a ring to the one asked for.",
    prepare=prepare,
    judge=judge,
    order="wrong",
    measures={
        "wrong": Measure(
            title="wrong",
            unit="%",
            better="low",
            digits=2,
            line="Samples far from the mode asked for.",
        ),
        "missed": Measure(title="missed", unit="%", better="low", digits=2, line="Samples of another mode than asked."),
        "outside": Measure(
            title="outside", unit="%", better="low", digits=2, line="Samples more than 6 deviations from every mode."
        ),
        "width": Measure(title="width", better="high", digits=2, line="Spread around the modes; 1 is right."),
    },
    baselines=(
        _baseline("unguided", "no guidance", lambda replica: steered(replica, []), "original"),
        _baseline(
            "clean_on_noise",
            "the same classifier, on x_t",
            on_noise,
            settings={"": {"scale": 2.0}},
            grid={"scale": SCALES},
        ),
        _baseline(
            "noise_aware", "a noise-aware classifier", aware, settings={"": {"scale": 8.0}}, grid={"scale": SCALES}
        ),
    ),
)
