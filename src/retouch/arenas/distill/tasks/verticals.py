"""Six specialists, one for each shape, teach one student of all classes: 6 shapes x 8 colours x 4 styles, drawn.

Small-scale study of Knowledge Concentration. Labels are hierarchical: a hatched red star is a "star", a "red star" and
a "hatched red star", so each vertical has 41 classes and an image has three labels. Specialists have seen many images
of their own shape, students few of all.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from retouch.arenas.contest import Entry, Measure
from retouch.arenas.distill import Replica, Solution, Split, Task
from retouch.arenas.distill.tasks._pairs import one_cycle
from retouch.core import seeds
from retouch.core.batches import in_order
from retouch.core.data import TensorData, subset
from retouch.core.models import Batch, forward, logits_of, predict, unpack
from retouch.distill.knowledge_concentration import (
    KnowledgeConcentration,
    PacedScale,
    SCHead,
    concentration_loss,
)
from retouch.worlds.shapes.drawing import render
from retouch.worlds.shapes.scenes import COLOURS, SHAPES, STYLES, Distribution, scene

NAME = "verticals"
PIXELS = 32
WIDTH = 64  # of the feature
LEAVES = len(COLOURS) * len(STYLES)
EACH = 1 + len(COLOURS) + LEAVES  # classes of a vertical: the shape, the shape in a colour, and in a style as well
GROUPS = [torch.arange(number * EACH, (number + 1) * EACH) for number in range(len(SHAPES))]
CLASSES = len(SHAPES) * EACH
TAUGHT, SEEN, TESTED = 4800, 480, 1200  # images of all specialists together, of a student, of the test


@functools.cache
def drawn(split: str, count: int, seed: int) -> TensorData:
    """Images of one thing each, and which of all classes they are in (n, classes)."""
    alone = Distribution(counts=(1,), sizes=("large",))
    scenes = [scene(split, index, seed=seed, distribution=alone) for index in range(count)]
    targets = torch.zeros(count, CLASSES)
    for row, one in enumerate(scenes):
        thing = one.things[0]
        colour, style = list(COLOURS).index(thing.colour), STYLES.index(thing.style)
        first = SHAPES.index(thing.shape) * EACH
        for place in (0, 1 + colour, 1 + len(COLOURS) + colour * len(STYLES) + style):
            targets[row, first + place] = 1
    return TensorData(render(scenes, PIXELS), targets)


def split(seed: int, search: bool) -> Split:
    """A student sees every tenth image that the specialists have learned from."""
    whole = drawn("train", TAUGHT, 0)
    rows = torch.randperm(TAUGHT, generator=seeds.generator(seed))[:SEEN]
    return Split(train=subset(whole, rows), test=drawn("validation" if search else "test", TESTED, 0))


def backbone(width: int = 16) -> nn.Module:
    """Three convolutions, from 32 pixels to a feature of 64."""
    layers, wide = list[nn.Module](), 3
    for number in range(3):
        out = width << number
        layers += [nn.Conv2d(wide, out, 3, 2, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        wide = out
    return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten())


def network(kind: str, *, scale: bool = False, seed: int = 0) -> nn.Module:
    """A student; all heads have layers of the same widths, so grouped ones have more weights."""
    head = SCHead(WIDTH, GROUPS, 64, 32, kind, class_bias=0.0 if scale else -3.0)  # type: ignore[arg-type]
    return nn.Sequential(backbone(), head, *([PacedScale(GROUPS, bias=-3.0, seed=seed)] if scale else []))


def hard(model: nn.Module, batch: Batch, run: Any = None) -> Tensor:
    """Sigmoid cross entropy with the labels."""
    inputs, labels = unpack(batch)
    return concentration_loss(logits_of(forward(model, inputs)), labels)


# --- specialists ----------------------------------------------------------------------------------------------------


class Specialists(nn.Module):
    """All of them at once: each one's logits stand at its own classes."""

    def __init__(self, models: list[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, images: Tensor) -> Tensor:
        """Images (n, 3, 32, 32) to logits (n, classes)."""
        return torch.cat([model(images) for model in self.models], 1)


def specialists(replica: Replica) -> nn.Module:
    """One for each shape, trained on all images of it."""
    whole, models = drawn("train", TAUGHT, 0), list[nn.Module]()
    for number, group in enumerate(GROUPS):
        rows = whole.targets[:, group[0]].nonzero()[:, 0]  # type: ignore[index]
        own = TensorData(whole.inputs[rows], whole.targets[rows][:, group])  # type: ignore[index]
        with seeds.isolated(seeds.derive(replica.seed, "specialist", number)):
            head = nn.Linear(WIDTH, EACH)
            nn.init.constant_(head.bias, -3.0)
            model = nn.Sequential(backbone(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), head)
        models.append(replica.train(model, own, steps=300, error=lambda _: 100.0).model)
    return Specialists(models)


# --- measures -------------------------------------------------------------------------------------------------------


def precision(scores: Tensor, targets: Tensor) -> float:
    """Mean average precision over the classes that have a positive, in percent."""
    order = scores.argsort(dim=0, descending=True, stable=True)
    hits = targets.gather(0, order)
    ranks = torch.arange(1, len(scores) + 1)[:, None]
    found = (hits * hits.cumsum(0) / ranks).sum(0) / hits.sum(0)
    return 100 * float(found[hits.sum(0) > 0].mean())


def within(logits: Tensor, targets: Tensor) -> float:
    """Mean over verticals of the precision among a vertical's own images and classes."""
    values = []
    for group in GROUPS:
        rows = targets[:, group].amax(1) > 0
        values.append(precision(logits[rows][:, group], targets[rows][:, group]))
    return sum(values) / len(values)


def error(model: nn.Module, split: Split) -> float:
    """What is missing to a perfect precision within verticals, in percent."""
    return 100 - within(predict(model, in_order(split.test)), split.test.targets)


def judge(model: nn.Module, split: Split) -> dict[str, float]:
    """The same, over all images and classes too, and the weights of the head and of the whole."""
    logits, targets = predict(model, in_order(split.test)), split.test.targets
    total = sum(p.numel() for p in model.parameters())
    return {
        "error": 100 - within(logits, targets),
        "error_all": 100 - precision(logits, targets),
        "parameters": total / 1000,
    }


# --- students -------------------------------------------------------------------------------------------------------


def student(replica: Replica, kind: str, *, taught: bool, scale: bool = False, top_k: int | None = 100) -> Solution:
    """Train one student of all classes: with labels, or taught by the specialists."""
    with seeds.isolated(seeds.derive(replica.seed, "weights")):
        model = network(kind, scale=scale, seed=replica.seed)
    if not taught:
        return replica.train(model)
    teachers: Any = replica.teacher.model
    objective = KnowledgeConcentration(model, dict(enumerate(teachers.models)), GROUPS, top_k)
    return replica.train(model, objective.answered(replica.split.train), objective)


def _arm(name: str, title: str, kind: str, **settings: Any) -> Entry:
    solve: Callable[[Replica], Solution] = lambda replica: student(replica, kind, **settings)  # noqa: E731
    return Entry(name=name, title=title, kind="baseline", solve=solve, problems=(NAME,))


TASK = Task(
    name=NAME,
    text="Six specialists of a shape each, trained on 4800 drawings, teach one student of 246 classes on 480 of them.",
    split=split,
    build=lambda: network("fc-fc"),
    steps=400,
    scheduler=one_cycle,
    objective=hard,
    error=error,
    judge=judge,
    target=40.0,
    early=100,
    teacher=specialists,
    measures={
        "error_all": Measure(
            title="error, all classes",
            unit="%",
            better="low",
            digits=2,
            line="100 less mean average precision over all classes and images.",
        ),
        "parameters": Measure(title="weights", unit="thousand", better="low", line="Of the whole network."),
    },
    baselines=(
        _arm("fcsc", "FC-SC generalist", "fc-sc", taught=False),
        _arm("fcsc_d", "FC-SC, distilled", "fc-sc", taught=True),
        _arm("fcsc_ds", "FC-SC, distilled, paced", "fc-sc", taught=True, scale=True),
        _arm("scsc_d", "SC-SC, distilled", "sc-sc", taught=True),
    ),
)
