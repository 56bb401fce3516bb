"""An easy and a hard cue that agree in training: does a network attend to the hard one as well?"""

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from retouch.arenas.contest import Measure
from retouch.arenas.train import Split, Task, classification_measures
from retouch.core.batches import in_order
from retouch.core.data import labels_of
from retouch.core.metrics.unlearning import accuracy
from retouch.core.models import predict
from retouch.worlds import cues


def split(seed: int, search: bool) -> Split:
    """New images for every replica; those judged on are of another split, with one cue taken out as well."""
    held_out = "validation" if search else "test"
    without = {name: cues.two_cue(held_out, seed=seed, **{name: False}) for name in ("easy", "hard")}
    return Split(train=cues.two_cue("train", seed=seed), test=cues.two_cue(held_out, seed=seed), notes=without)


def build() -> nn.Module:
    """Two convolutions with batch normalisation, and the mean over all places."""
    layers = [nn.Conv2d(1, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(24, 48, 3, padding=1), nn.BatchNorm2d(48), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 4))


def judge(model: nn.Module, split: Split) -> dict[str, float]:
    """Error with both cues, and with either one alone."""
    values = classification_measures(model, split)
    for name, data in split.notes.items():
        values[f"without_{name}"] = 100.0 - accuracy(predict(model, in_order(data)), labels_of(data))
    return values


TASK = Task(
    name="cues",
    text="300 images of 16 x 16 pixels with an easy and a hard cue; two convolutions, 500 steps.",
    split=split,
    build=build,
    steps=500,
    batch_size=48,
    optimizer=lambda parameters: torch.optim.Adam(parameters, lr=3e-3),
    scheduler=lambda optimizer, steps: CosineAnnealingLR(optimizer, steps),
    judge=judge,
    target=5.0,
    order="without_easy",
    measures={
        "without_easy": Measure(title="hard alone", unit="%", better="low", line="Error with the easy cue taken out."),
        "without_hard": Measure(title="easy alone", unit="%", better="low", line="Error with the hard cue taken out."),
    },
)
