"""How long the reference models train and how fast, and on what: scenes of one or two things."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from retouch.core import seeds
from retouch.core.averages import MovingAverage
from retouch.core.data import TensorData
from retouch.core.loop import Checkpoint, fit
from retouch.core.models import device_of
from retouch.core.optimizers import MuonAdamW
from retouch.worlds.shapes.scenes import Distribution

# Large and flat things are the most common ones: what a thing's shape is shows best in them, and of a mean squared
# error its shape is but a hundredth.
USUAL = {"size": "large", "style": "flat"}
COMMON: dict[str, Any] = {
    "sizes": (*["large"] * 5, "small"),
    "styles": (*["flat"] * 9, "outlined", "hatched", "glossy"),
}
SCENES = Distribution(counts=(1, 2, 2), **COMMON)
SINGLE = Distribution(counts=(1,), **COMMON)


@dataclass(frozen=True)
class Recipe:
    """How long and how fast a model learns.

    Attributes:
        steps: of the optimizer.
        batch_size: samples a step.
        rate: highest learning rate of a schedule that goes up and down once.
        scenes: that the data is made of.
        decay: weight decay.
        average: decay of the moving average of the weights; None for none.
        muon: whether weight matrices take the steps of Muon; AdamW takes all others.
    """

    steps: int
    batch_size: int
    rate: float
    scenes: int
    decay: float = 0.01
    average: float | None = None
    muon: bool = False

    def train(
        self, model: nn.Module, data: TensorData, objective: Any, *, seed: int, checkpoint: Path | None = None
    ) -> None:
        """Train a model in place; with a checkpoint, a run that was stopped goes on from it."""

        def optimizer(parameters: Any) -> Optimizer:
            kind = MuonAdamW if self.muon else AdamW
            return kind(parameters, lr=self.rate, weight_decay=self.decay, betas=(0.9, 0.99))

        def scheduler(optimizer: Optimizer, steps: int) -> LRScheduler:
            return OneCycleLR(optimizer, self.rate, total_steps=steps, pct_start=0.05, cycle_momentum=False)

        fit(
            model,
            data,
            objective,
            steps=self.steps,
            batch_size=self.batch_size,
            optimizer=optimizer,
            scheduler=scheduler,
            callbacks=[] if self.average is None else [MovingAverage(self.average)],
            clip=1.0,
            checkpoint=None if checkpoint is None else Checkpoint(checkpoint, every=200),
            seed=seed,
        )
        model.eval()


# The autoencoder and the text encoder take minutes on two CPU cores. The others were trained on an H200, compiled (but
# for CLIP) and all at a time, in 25 minutes. The UNet's steps would take a day on two cores (reckoned from a step's
# time); the average of its weights after the first eighth of them kept 100 of 100 prompts of one thing and 98 of two.
RECIPES = {
    "autoencoder": Recipe(3600, 16, 1e-3, 8000),
    "text": Recipe(600, 64, 2e-3, 12000),
    "unet": Recipe(20600, 500, 2e-3, 40000, average=0.999, muon=True),
    "clip": Recipe(5000, 256, 1e-3, 40000, decay=0.1, muon=True),
    "pixels": Recipe(8900, 128, 1.5e-3, 40000, average=0.999, muon=True),
    "dit-large": Recipe(12000, 128, 1.5e-3, 40000, average=0.999, muon=True),
    "dit-small": Recipe(12000, 128, 1.5e-3, 40000, average=0.999, muon=True),
}


def precise(model: nn.Module) -> Any:
    """Half the precision where it only costs time: bfloat16 in what autocast deems safe.

    Attention is spelled out: on a CPU, PyTorch's fused one takes twice as long to differentiate here.
    """
    stack = ExitStack()
    stack.enter_context(torch.autocast(device_of(model).type, torch.bfloat16))
    stack.enter_context(sdpa_kernel(SDPBackend.MATH))
    return stack


def built(new: Callable[[], Any], seed: int) -> Any:
    """An untrained model of weights that the seed decides."""
    with seeds.isolated(seeds.derive(seed, "weights")):
        return new()
