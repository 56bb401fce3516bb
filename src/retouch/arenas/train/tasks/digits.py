"""The same small problem for all techniques that train an image classifier."""

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from retouch.arenas.train import Split, Task
from retouch.core import seeds
from retouch.core.data import TensorData, subset
from retouch.worlds import digits

SAMPLES = 300


def draw(seed: int, search: bool, samples: int = SAMPLES) -> Split:
    """Training digits drawn anew for every replica; the rest of the training split is not seen."""
    whole = digits.data("train")
    rows = torch.randperm(len(whole), generator=seeds.generator(seed))[:samples]
    test: TensorData = digits.data("validation" if search else "test")
    return Split(train=subset(whole, rows), test=test, validation=digits.data("validation"))


def build() -> nn.Module:
    """The CNN of the world, half as wide, with dropout before its head."""
    model = digits.DigitsCNN(width=16, hidden=64)
    model.head = nn.Sequential(nn.Dropout(0.5), model.head)  # type: ignore[assignment]
    return model


def one_cycle(optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    """Up to 0.01 and down."""
    return OneCycleLR(optimizer, 1e-2, total_steps=steps)


TASK = Task(
    name="digits",
    text=f"Handwritten digits, {SAMPLES} to learn from; a small convolutional network with dropout, 400 steps.",
    split=draw,
    build=build,
    steps=400,
    scheduler=one_cycle,
    target=5.0,
)
