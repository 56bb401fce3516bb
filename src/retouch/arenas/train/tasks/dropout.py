"""A network whose head sees a fifth of its features at a time: what repeated masks are for."""

from torch import nn

from retouch.arenas.train import Task
from retouch.arenas.train.tasks import digits


def build() -> nn.Module:
    """Three layers, and dropout of 0.8 before the last."""
    layers = [nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()]
    return nn.Sequential(*layers, nn.Dropout(0.8), nn.Linear(128, 10))


TASK = Task(
    name="dropout",
    text="300 handwritten digits; a network of three layers with dropout of 0.8 at its head. Early: step 40 of 300.",
    split=digits.draw,
    build=build,
    steps=300,
    target=20.0,
    early=40,
)
