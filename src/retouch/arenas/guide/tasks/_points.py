"""Small networks that learn to denoise points of `worlds.gaussians`, and what their samples are judged by."""

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from retouch.core import seeds
from retouch.core.data import TensorData
from retouch.core.diffusion.denoiser import Denoiser
from retouch.core.diffusion.process import VP
from retouch.core.loop import Run, fit
from retouch.core.models import Batch, unpack
from retouch.worlds.gaussians import Mixture

MARGIN = 6.0  # standard deviations from the nearest mean within which a sample is one


class Points(nn.Module):
    """A network for noise in points: x (n, d), timesteps (n,) and classes (n,) or None, to noise (n, d).

    Args:
        dimensions: d.
        process: whose signal-to-noise ratio it is told.
        width: of its three hidden layers.
        classes: that it may be told; one more stands for none.
    """

    def __init__(self, dimensions: int, process: VP, width: int = 64, classes: int = 0) -> None:
        super().__init__()
        bars = process.alphas_cumprod
        self.ratio: Tensor
        self.register_buffer("ratio", ((bars / (1 - bars)).log() / 4).float(), persistent=False)
        told = 16 if classes else 0
        self.classes = nn.Embedding(classes + 1, told) if classes else None
        sizes = [dimensions + 7 + told, width, width, width]
        hidden = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, dimensions))

    def forward(self, x: Tensor, time: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """See the class."""
        ratio = self.ratio[time.long()][:, None]
        waves = [wave for k in (1, 2, 4) for wave in ((k * ratio).sin(), (k * ratio).cos())]
        parts = [x, ratio, *waves]
        if self.classes is not None:
            none = torch.full_like(time, self.classes.num_embeddings - 1).long()
            parts.append(self.classes(none if class_labels is None else class_labels))
        return self.layers(torch.cat(parts, 1))


def taught(
    mixture: Mixture,
    process: VP,
    *,
    seed: int,
    width: int = 64,
    steps: int = 1500,
    samples: int = 20_000,
    classes: int = 0,
    drop: float = 0.1,
) -> Denoiser:
    """A denoiser that has learned from samples of a mixture.

    Args:
        mixture: to learn.
        process: noise levels.
        seed: of data, weights and training.
        width: of the network.
        steps: of training, 512 points each.
        samples: of the data.
        classes: modes that it is told; 0 for none.
        drop: share of the samples without their class.
    """
    modes, points = mixture.draw_with_modes(samples, seed=seeds.derive(seed, "data"))
    with seeds.isolated(seeds.derive(seed, "weights", width)):
        net = Points(mixture.dimensions, process, width, classes)

    def objective(model: nn.Module, batch: Batch, run: Run) -> Tensor:
        x0, told = unpack(batch)
        noise = torch.randn(x0.shape, generator=run.generator)
        times = process.random_times(len(x0), run.generator)
        keywords: dict[str, Any] = {}
        if classes:
            hidden = torch.rand(len(x0), generator=run.generator) < drop
            keywords["class_labels"] = torch.where(hidden, classes, told)
        return (model(process.add_noise(x0, noise, times), times, **keywords) - noise).square().mean()

    fit(
        net,
        TensorData(points, modes),
        objective,
        steps=steps,
        batch_size=512,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=4e-3),
        scheduler=lambda optimizer, count: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, count),
        seed=seeds.derive(seed, "training", width),
        progress=False,
    )
    null = {"class_labels": torch.tensor([classes])} if classes else {}
    return Denoiser(net.eval(), process, null=null)


def asked(modes: Tensor) -> dict[str, Tensor]:
    """The condition that samples are of given modes (n,)."""
    return {"class_labels": modes}


def missed(mixture: Mixture, samples: Tensor, modes: Tensor) -> float:
    """Samples that are not of the mode asked for, in percent."""
    nearest = torch.cdist(samples.double(), mixture.means).argmin(1)
    return 100 * float((nearest != modes).double().mean())


def wrong(mixture: Mixture, samples: Tensor, modes: Tensor) -> float:
    """Samples that are far from the mode asked for, in percent: of another one, or of none."""
    far = (samples.double() - mixture.means[modes]).norm(dim=1) > MARGIN * mixture.std
    return 100 * float(far.double().mean())


def outside(mixture: Mixture, samples: Tensor) -> float:
    """Samples far from every mode, in percent."""
    return 100 * float((mixture.distances(samples) > MARGIN).double().mean())


def spread(mixture: Mixture, samples: Tensor, modes: Tensor) -> float:
    """Standard deviation of the samples around their modes, against the true one; 1 is right."""
    off = samples.double() - mixture.means[modes]
    near = off.norm(dim=1) <= MARGIN * mixture.std
    return float(off[near].square().mean().sqrt() / mixture.std) if bool(near.any()) else float("nan")
