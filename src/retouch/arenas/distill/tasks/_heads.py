"""What the tasks of dual-head distillation share: the same two losses on one head, and how their gradients agree."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retouch.arenas.contest import Claim, Entry, Measure, mean
from retouch.arenas.distill import Replica, Solution
from retouch.core.distillation import Answer, Distillation
from retouch.core.gradients import batch_gradients
from retouch.core.loop import Callback, Run
from retouch.core.models import head_of, logits_of, mode
from retouch.core.objectives import cross_entropy_batch
from retouch.core.teachers import Teacher
from retouch.distill.dhkd import DHKD, DualHead, binary_kl_norm

TASKS = ("two_heads", "pairs")
ALPHA = {"two_heads": 0.3, "pairs": 1.0}  # of the logit loss, the same on one head and on two
MEASURES = {
    "head_cosine": Measure(
        title="head cosine",
        better="high",
        digits=2,
        line="Cosine of the gradients of cross entropy and logit loss, both put on the main head, by the weights of "
        "that head: mean over the second half of training.",
    ),
    "backbone_cosine": Measure(
        title="backbone cosine", better="high", digits=2, line="The same by the weights of all other layers."
    ),
}


class Agreement(Callback):
    """Looks now and then at how far the gradients of both losses agree, on some training samples, in eval mode.

    Args:
        teacher: whose logits are imitated.
        data: samples.
        looks: how often during a run.
    """

    def __init__(self, teacher: Teacher, data: Any, looks: int = 20) -> None:
        self.batch, self.looks = data[torch.arange(min(256, len(data)))], looks
        self.logits = logits_of(teacher(self.batch[0]))
        self.head: list[float] = []
        self.backbone: list[float] = []

    def on_step(self, run: Run) -> None:
        if run.step <= run.steps // 2 or run.step % max(1, run.steps // self.looks):
            return
        student = run.module.student if isinstance(run.module, DualHead) else run.module

        def imitation(model: nn.Module, batch: Any) -> Tensor:
            return binary_kl_norm(logits_of(model(batch[0])), self.logits)

        with mode(student, training=False):
            both = [batch_gradients(student, self.batch, loss) for loss in (cross_entropy_batch, imitation)]
        head = head_of(student)
        inside = [f"{head}.weight"]
        outside = [name for name in both[0] if not name.startswith(f"{head}.")]
        for names, found in ((inside, self.head), (outside, self.backbone)):
            one, two = (torch.cat([gradients[name].flatten() for name in names]) for gradients in both)
            found.append(float(F.cosine_similarity(one, two, dim=0)))

    def measures(self, model: nn.Module) -> dict[str, float]:
        """Means over the looks."""
        return {"head_cosine": mean(self.head), "backbone_cosine": mean(self.backbone)}


def dual(replica: Replica, *, alpha: float, temperature: float = 2.0, aux: str = "linear", **settings: Any) -> Solution:
    """DHKD, with the agreement of gradients where a task has it."""
    with_teacher = DHKD(replica.teacher, alpha=alpha, temperature=temperature, **settings)
    model = DualHead.of(replica.build(), aux=aux, seed=replica.seed)
    watch = Agreement(replica.teacher, replica.split.train) if replica.task.name in TASKS else None
    more: dict[str, Any] = {"callbacks": [watch], "own": watch.measures} if watch is not None else {}
    return replica.train(model, objective=with_teacher, finish=lambda trained: model.export(), **more)


def single(*, labels: bool) -> Callable[[Replica], Solution]:
    """The logit loss on the student's only head, with or without cross entropy on it."""

    def solve(replica: Replica) -> Solution:
        def loss(student: Answer, teacher: Answer, targets: Tensor | None) -> dict[str, Tensor]:
            assert targets is not None
            logit = ALPHA[replica.task.name] * binary_kl_norm(student.logits, teacher.logits)
            return {"logit": logit, **({"ce": F.cross_entropy(student.logits, targets)} if labels else {})}

        watch = Agreement(replica.teacher, replica.split.train)
        objective = Distillation(replica.teacher, loss)
        return replica.train(objective=objective, callbacks=[watch], own=watch.measures)

    return solve


def aligned(replica: Replica) -> Solution:
    """The paper's example for CIFAR-100: a nonlinear second head, and gradients aligned over all parameters."""
    return dual(replica, alpha=ALPHA[replica.task.name], aux="mlp", align="all")


def _conflicts(task: str) -> tuple[Claim, ...]:
    return (
        Claim(
            text="Both losses on one head are worse than labels alone: the collapse that DHKD is to cure.",
            problem=task,
            measure="error",
            other="plain",
            relation="at least",
            source="section 1",
        ),
        Claim(
            text="Both losses on one head are worse than the logit loss alone.",
            problem=task,
            measure="error",
            other="logit_alone",
            relation="at least",
            source="section 1",
        ),
        Claim(
            text="On one head, the gradients of the classifier conflict: their cosine is below 0.",
            problem=task,
            measure="head_cosine",
            other="dhkd",
            relation="at most",
            factor=0.0,
            source="section 3",
        ),
        Claim(
            text="The gradients of the backbone do not conflict: their cosine is above 0.",
            problem=task,
            measure="backbone_cosine",
            other="dhkd",
            relation="at least",
            factor=0.0,
            source="section 3",
        ),
    )


CONFLICTS = tuple(claim for name in TASKS for claim in _conflicts(name))


def baselines(task: str) -> tuple[Entry, ...]:
    """One head for both losses, for the logit loss alone, and the paper's own combination of options."""
    one: dict[str, Any] = {"kind": "baseline", "problems": (task,)}
    return (
        Entry(name="one_head", title="both losses, one head", solve=single(labels=True), claims=CONFLICTS, **one),
        Entry(name="logit_alone", title="logit loss, no labels", solve=single(labels=False), **one),
        Entry(name="dhkd_aligned", title="DHKD, nonlinear head, aligned gradients", solve=aligned, **one),
    )
