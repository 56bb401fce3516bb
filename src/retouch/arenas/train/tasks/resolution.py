"""Handwritten digits enlarged to 32x32 with noise, and a convolutional network that takes any size.

Compute is counted, not timed: on a CPU, transforms and small products hide part of what smaller images save.
"""

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler
from torch.utils.flop_counter import FlopCounterMode

from retouch.arenas.contest import Entry, Measure
from retouch.arenas.train import Replica, Solution, Split, Task, classification_measures
from retouch.core import seeds
from retouch.core.data import TensorData
from retouch.core.loop import Callback, Run
from retouch.core.models import Batch, images_of
from retouch.train.efficient_train import efficient_train_curriculum, relative_cost
from retouch.worlds import digits

SIZE, STRIDE, NOISE, EPOCHS, BATCH = 32, 4, 0.1, 30, 50
STEPS = EPOCHS * digits.SPLITS["train"] // BATCH
COST = relative_cost(efficient_train_curriculum(SIZE, multiple=STRIDE), SIZE)  # 0.69


def enlarged(split: str, seed: int) -> TensorData:
    """Digits of a split at 32x32, with noise of their own."""
    small, labels = digits.data(split)[:]
    images = F.interpolate(small, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    noise = torch.randn(images.shape, generator=seeds.generator(seed, "noise", split))
    return TensorData(images + NOISE * noise, labels)


def draw(seed: int, search: bool) -> Split:
    """All training digits, with noise drawn anew for every replica."""
    train, validation, test = (enlarged(split, seed) for split in ("train", "validation", "test"))
    return Split(train=train, validation=validation, test=validation if search else test)


def build() -> nn.Module:
    """Three convolutions at 32, 16 and 8 pixels, and a mean over what is left of them."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 8), (8, 16), (16, 32)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """AdamW at 0.01."""
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.05)


def cosine(optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    """Down to nothing over the steps that are made."""
    return CosineAnnealingLR(optimizer, steps)


class Compute(Callback):
    """Counts the floating point operations of all steps, by the shapes of the batches; put it behind what changes them.

    Attributes:
        shapes: how many batches there were of each shape.
    """

    def __init__(self) -> None:
        self.shapes: Counter[tuple[int, ...]] = Counter()

    def on_batch(self, run: Run, batch: Batch) -> Batch:
        self.shapes[tuple(images_of(batch).shape)] += 1
        return batch

    def total(self, model: nn.Module) -> dict[str, float]:
        """Operations of all steps, in 10^9."""
        return {"compute": sum(count * step_flops(model, shape) for shape, count in self.shapes.items()) / 1e9}


def step_flops(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Floating point operations of a forward and a backward pass."""
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(shape)).sum().backward()
    model.zero_grad()
    return counter.get_total_flops()


def judge(model: nn.Module, split: Split) -> dict[str, float]:
    """Errors, and the compute of all steps at full size, where an entry does not count its own."""
    whole = STEPS * step_flops(model, (BATCH, 1, SIZE, SIZE)) / 1e9
    return {**classification_measures(model, split), "compute": whole}


def short(replica: Replica) -> Solution:
    """Plain training with the compute of the curriculum, its rate brought down within that."""
    compute = Compute()
    return replica.train(callbacks=[compute], steps=round(COST * STEPS), own=compute.total)


TASK = Task(
    name="resolution",
    text=f"Handwritten digits enlarged to 32x32, with noise; a convolutional network, {EPOCHS} epochs.",
    split=draw,
    build=build,
    steps=STEPS,
    batch_size=BATCH,
    optimizer=adamw,
    scheduler=cosine,
    judge=judge,
    target=2.0,
    measures={
        "compute": Measure(
            title="compute", unit="GFLOP", better="low", digits=0, line="Floating point operations of all steps."
        )
    },
    baselines=(
        Entry(
            name="short",
            title="plain, fewer steps",
            kind="baseline",
            solve=short,
            problems=("resolution",),
            note="as much compute as EfficientTrain",
        ),
    ),
)
