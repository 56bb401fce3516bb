"""Students that learn from mixed samples, from teachers trained with and without them.

Small-scale study of mixup distillation. Mixing, partial mixing and the scaling of logits by their spread are taken
apart; `teacher entropy` shows what mixing does to a teacher.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from retouch.arenas.contest import Claim, Entry, Measure
from retouch.arenas.distill import Replica, Solution
from retouch.arenas.distill.tasks._pairs import TAUGHT, draw, kl, mlp, task
from retouch.core import seeds
from retouch.core.batches import in_order
from retouch.core.data import labels_of, subset
from retouch.core.distillation import Distillation
from retouch.core.features import capture
from retouch.core.loop import Callback, Run
from retouch.core.models import Batch, head_of, predict
from retouch.core.teachers import Teacher
from retouch.distill.mixup_kd import MixupDistillation, apply_mixup, sample_mixup
from retouch.worlds import digits

NAME, TEACHER = "mixes", (128, 128)


class Mixup(Callback):
    """Ordinary mixup of every batch, for the teacher that the paper warns of."""

    def on_batch(self, run: Run, batch: Batch) -> Batch:
        inputs, labels = batch
        plan = sample_mixup(len(inputs), mix_fraction=1.0, generator=run.generator)
        return apply_mixup(inputs, labels, **plan._asdict(), num_classes=10)


def entropy(model: nn.Module, data: Any) -> float:
    """Mean entropy of a model's predictions, in nats."""
    return float(torch.special.entr(predict(model, in_order(data)).softmax(-1)).sum(-1).mean())


def dispersion(model: nn.Module, data: Any) -> float:
    """Spread of the head's inputs within classes against that between them: 0 where each class is a point."""
    with torch.no_grad(), capture(model, [head := head_of(model)], side="input") as seen:
        model(data.inputs)
    features, labels = seen[head], labels_of(data)
    centres = torch.stack([features[labels == label].mean(0) for label in labels.unique()])
    within = torch.stack([features[labels == label].var(0, correction=0).sum() for label in labels.unique()]).mean()
    return float(within / (centres - centres.mean(0)).square().sum(1).mean())


def measures(replica: Replica, teacher: Teacher) -> Callable[[nn.Module], dict[str, float]]:
    """What is measured of a student beside its error."""
    test = replica.split.test

    def own(model: nn.Module) -> dict[str, float]:
        return {
            "teacher_entropy": entropy(teacher.model, test),
            "entropy": entropy(model, test),
            "dispersion": dispersion(model, test),
        }

    return own


def mixing(replica: Replica, **settings: Any) -> Solution:
    """Mixup distillation; the measures are those of this task where it is this one."""
    mix = MixupDistillation(**settings)
    more: dict[str, Any] = {"own": measures(replica, replica.teacher)} if replica.task.name == NAME else {}
    return replica.train(objective=mix.objective(replica.teacher), callbacks=[mix], **more)


def variant(**settings: Any) -> Callable[[Replica], Solution]:
    """The same under other settings."""
    return lambda replica: mixing(replica, **settings)


def mixed_teacher(replica: Replica) -> Solution:
    """Classic distillation from a teacher that was trained with mixup, from the same first weights."""
    with seeds.isolated(seeds.derive(replica.seed, "teacher")):
        model = mlp(*TEACHER)
    data = subset(digits.data("train"), range(TAUGHT))
    teacher = Teacher(replica.train(model, data, steps=600, callbacks=[Mixup()]).model)
    return replica.train(objective=Distillation(teacher, kl), own=measures(replica, teacher))


def _row(name: str, title: str, solve: Callable[..., Any], note: str = "", claims: tuple[Claim, ...] = ()) -> Entry:
    return Entry(name=name, title=title, kind="baseline", solve=solve, problems=(NAME,), note=note, claims=claims)


def _claim(text: str, other: str, *, measure: str = "error", relation: str = "at most", margin: float = 0.0) -> Claim:
    return Claim(
        text=text, problem=NAME, measure=measure, other=other, relation=relation, margin=margin, source="section 4"
    )


WARNING = (
    _claim("A teacher trained with mixup makes a worse student than one trained without.", "kd", relation="at least"),
    _claim(
        "Its answers to clean inputs are smoother, by 0.2 nats or more.",
        "mixup_kd",
        measure="teacher_entropy",
        relation="at least",
        margin=0.2,
    ),
)
GAIN = (_claim("Mixed inputs improve classic distillation.", "kd"),)
PARTIAL = (_claim("Mixing a tenth of a batch is better than mixing all of it.", "kd_full_mixup"),)
PLAIN_KD: dict[str, Any] = {"scaling": "temperature"}

TASK = task(
    NAME,
    "A network of three layers, trained on 1000 digits, teaches a narrow one on 120 of them, by mixed samples.",
    student=lambda: mlp(24, 24),
    teacher=lambda: mlp(*TEACHER),
    split=draw(120),
    steps=300,
    target=10.0,
    measures={
        "teacher_entropy": Measure(
            title="teacher entropy",
            digits=3,
            line="Mean entropy of the teacher's predictions of test samples, in nats.",
        ),
        "entropy": Measure(title="entropy", digits=3, line="That of the student's, from its logits as they are."),
        "dispersion": Measure(
            title="dispersion", digits=3, line="Spread of the student's features within classes, against that between."
        ),
    },
    more=(
        _row("kd_mixed_teacher", "KD, teacher trained with mixup", mixed_teacher, claims=WARNING),
        _row("kd_full_mixup", "KD + full mixup", variant(mix_fraction=1.0, **PLAIN_KD), claims=GAIN),
        _row("kd_partial_mixup", "KD + 10% mixup", variant(mix_fraction=0.1, **PLAIN_KD), claims=PARTIAL),
        _row("std_scaling", "scaling by spread, no mixup", variant(mix_fraction=0.0)),
        _row("full_mixup_std", "scaling by spread, full mixup", variant(mix_fraction=1.0)),
    ),
)
