"""Teachers and students of the digits, and the baselines that every task of theirs has."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from retouch.arenas.contest import Entry
from retouch.arenas.distill import Replica, Solution, Split, Task
from retouch.core import seeds
from retouch.core.data import TensorData, subset
from retouch.core.distillation import Answer, Distillation, hint_loss, softened_kl
from retouch.core.features import capture, shapes
from retouch.core.models import head_of, logits_of
from retouch.worlds import digits

TAUGHT = 1000  # samples the teacher has learned from


def mlp(*widths: int) -> nn.Module:
    """Layers of the given widths, from 64 pixels to 10 classes."""
    layers: list[nn.Module] = [nn.Flatten()]
    for wide, narrow in itertools.pairwise((64, *widths)):
        layers += [nn.Linear(wide, narrow), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 10))


def vit(width: int = 32, depth: int = 2) -> nn.Module:
    """A small transformers ViT for the digits."""
    from transformers import ViTConfig, ViTForImageClassification

    settings: dict[str, Any] = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": 4}
    settings |= {"intermediate_size": 2 * width, "num_labels": 10}
    config = ViTConfig(image_size=8, patch_size=2, num_channels=1, **settings)
    return ViTForImageClassification(config)


def draw(samples: int, *, wrong: float = 0.0) -> Callable[[int, bool], Split]:
    """Students see some of the teacher's samples, a share of them with a wrong label."""

    def split(seed: int, search: bool) -> Split:
        whole = subset(digits.data("train"), range(TAUGHT))
        rows = torch.randperm(len(whole), generator=seeds.generator(seed))[:samples]
        train = subset(whole, rows)
        if wrong:
            labels = train.targets.clone()
            flipped = torch.rand(samples, generator=seeds.generator(seed, "wrong")) < wrong
            shift = torch.randint(1, 10, (samples,), generator=seeds.generator(seed, "shift"))
            train = TensorData(train.inputs, torch.where(flipped, (labels + shift) % 10, labels))
        test = digits.data("validation" if search else "test")
        return Split(train=train, test=test, validation=digits.data("validation"))

    return split


def one_cycle(optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    """Up to 0.01 and down."""
    return OneCycleLR(optimizer, 1e-2, total_steps=steps)


def taught(build: Callable[[], nn.Module], *, steps: int = 600) -> Callable[[Replica], nn.Module]:
    """A teacher trained on all the samples that it may see."""

    def teacher(replica: Replica) -> nn.Module:
        with seeds.isolated(seeds.derive(replica.seed, "teacher")):
            model = build()
        return replica.train(model, subset(digits.data("train"), range(TAUGHT)), steps=steps).model

    return teacher


def kl(student: Answer, teacher: Answer, labels: Tensor | None, *, temperature: float = 4.0, alpha: float = 0.9) -> Any:
    """Classic distillation: a tenth of cross entropy, and KL softened by 4 (Hinton, 2015)."""
    assert labels is not None
    ce = nn.functional.cross_entropy(student.logits, labels)
    return {
        "ce": (1 - alpha) * ce,
        "kl": alpha * softened_kl(student.logits, teacher.logits, temperature=temperature),
    }


def reverse_kl(student: Answer, teacher: Answer, labels: Tensor | None) -> Any:
    """The same with KL(student || teacher), at temperature 4."""
    p, q = ((answer.logits / 4).log_softmax(-1) for answer in (student, teacher))
    return _mixed(student, labels, 16 * nn.functional.kl_div(q.detach(), p, log_target=True, reduction="batchmean"))


def js(student: Answer, teacher: Answer, labels: Tensor | None) -> Any:
    """The same with the Jensen-Shannon divergence, at temperature 4."""
    p, q = (answer.logits.div(4).softmax(-1) for answer in (student, teacher))
    entropy = torch.special.entr
    divergence = entropy((p + q.detach()) / 2) - (entropy(p) + entropy(q.detach())) / 2
    return _mixed(student, labels, 16 * divergence.sum(-1).mean())


def _mixed(student: Answer, labels: Tensor | None, imitation: Tensor) -> dict[str, Tensor]:
    assert labels is not None
    return {"ce": 0.1 * nn.functional.cross_entropy(student.logits, labels), "imitation": 0.9 * imitation}


def by(loss: Callable[..., Any]) -> Callable[[Replica], Solution]:
    """An entry that trains with a loss of two answers and the labels."""
    return lambda replica: replica.train(objective=Distillation(replica.teacher, loss))


def classic(replica: Replica) -> Solution:
    """KL to the teacher's softened predictions, and a tenth of cross entropy."""
    return replica.train(objective=Distillation(replica.teacher, kl))


class Hinted(nn.Module):
    """A student with an adapter that is trained along and left behind."""

    def __init__(self, student: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        self.student, self.adapter = student, adapter

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The student's output."""
        return self.student(*args, **kwargs)


def hints(replica: Replica) -> Solution:
    """FitNets: classic distillation, and the head's input is pulled to the teacher's through a linear adapter."""
    student, teacher = replica.build(), replica.teacher
    heads = head_of(student), head_of(teacher.model)
    batch = replica.split.train[torch.arange(2)]
    widths = [shapes(m, batch, [h], side="input")[h] for m, h in zip((student, teacher.model), heads, strict=True)]
    with seeds.isolated(seeds.derive(replica.seed, "adapter")):
        model = Hinted(student, nn.Linear(widths[0][-1], widths[1][-1]))

    def objective(module: nn.Module, batch: Any, run: Any) -> Any:
        inputs, labels = batch
        ours, theirs = f"student.{heads[0]}", f"model.{heads[1]}"
        with capture(model, [ours], side="input") as mine, capture(teacher, [theirs], side="input") as its:
            answers = [Answer(logits_of(each(inputs))) for each in (module, teacher)]
        return {**kl(answers[0], answers[1], labels), "hint": hint_loss(mine[ours], its[theirs], model.adapter)}

    return replica.train(model, objective=objective, finish=lambda trained: model.student)


def baselines(task: str) -> tuple[Entry, ...]:
    """Classic distillation and hints, in one task."""
    note = "alpha 0.9, temperature 4"
    return (
        Entry(name="kd", title="KD", kind="baseline", solve=classic, problems=(task,), note=note),
        Entry(name="hints", title="FitNets hints", kind="baseline", solve=hints, problems=(task,), note=note),
    )


def task(
    name: str,
    text: str,
    *,
    student: Callable[[], nn.Module],
    teacher: Callable[[], nn.Module],
    more: tuple[Entry, ...] = (),
    **changes: Any,
) -> Task:
    """A task of this kind: 200 samples and 400 steps unless said otherwise."""
    settings: dict[str, Any] = {"split": draw(200), "steps": 400, "scheduler": one_cycle, "target": 8.0, **changes}
    return Task(
        name=name, text=text, build=student, teacher=taught(teacher), baselines=(*baselines(name), *more), **settings
    )
