"""Many classes, batch normalisation and training until labels are fitted: where logits and labels should conflict most.

An image is two digits side by side, its class their number, 00 to 99. Second study of DHKD, for its paper explains the
conflict by neural collapse, which ten classes and a small MLP hardly have.
"""

from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from retouch.arenas.distill import Replica, Split, Task
from retouch.arenas.distill.tasks._heads import MEASURES, baselines
from retouch.arenas.distill.tasks._pairs import TAUGHT
from retouch.arenas.distill.tasks._pairs import baselines as classic
from retouch.core import seeds
from retouch.core.data import TensorData, subset
from retouch.worlds import digits


def joined(data: TensorData, samples: int, seed: int) -> TensorData:
    """Random pairs of digits as images (n, 1, 8, 16), of classes 0 to 99."""
    left, right = torch.randint(len(data), (2, samples), generator=seeds.generator(seed, "pairs"))
    assert isinstance(data.inputs, torch.Tensor) and isinstance(data.targets, torch.Tensor)
    images = torch.cat([data.inputs[left], data.inputs[right]], -1)
    return TensorData(images, 10 * data.targets[left] + data.targets[right])


def split(seed: int, search: bool) -> Split:
    """Students see 1000 of the teacher's 8000 pairs; the test pairs are of digits that neither has seen."""
    whole = joined(subset(digits.data("train"), range(TAUGHT)), 8000, seed)
    test = joined(digits.data("validation" if search else "test"), 2000, seed)
    return Split(train=subset(whole, range(1000)), test=test, notes={"teacher": whole})


def conv(width: int, hidden: int) -> nn.Module:
    """Two convolutions and a hidden layer, each with batch normalisation."""
    layers: list[nn.Module] = []
    for inside, outside in ((1, width), (width, 2 * width)):
        layers += [nn.Conv2d(inside, outside, 3, padding=1), nn.BatchNorm2d(outside), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Flatten(), nn.Linear(16 * width, hidden), nn.BatchNorm1d(hidden), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden, 100))


def teacher(replica: Replica) -> nn.Module:
    """Twice as wide as the student, trained on all pairs."""
    with seeds.isolated(seeds.derive(replica.seed, "teacher")):
        model = conv(16, 64)
    return replica.train(model, replica.split.notes["teacher"], steps=400).model


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """Momentum 0.9 and weight decay, as the paper's."""
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4)


def cosine(optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    """Down to 0."""
    return CosineAnnealingLR(optimizer, steps)


TASK = Task(
    name="pairs",
    text="A convolutional network, trained on 8000 pairs of digits, teaches a small one on 1000 of them: 100 classes.",
    split=split,
    build=lambda: conv(8, 32),
    teacher=teacher,
    steps=600,
    optimizer=sgd,
    scheduler=cosine,
    target=5.0,
    measures=MEASURES,
    baselines=(classic("pairs")[0], *baselines("pairs")),
)
