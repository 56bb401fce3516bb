"""A convolutional network teaches a few tiny Mamba students, which are used together: the study of Mamba PKD.

Operations of the scans are counted here as well, which the common counter cannot see, and the wall time of a forward
pass stands beside them, as a scan in Python is slow for what it computes.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from retouch.arenas.contest import Claim, Entry, Measure
from retouch.arenas.distill import Replica, Solution, Split, Task
from retouch.arenas.distill.tasks._pairs import draw, taught
from retouch.arenas.training import classification_error, classification_measures
from retouch.core import seeds
from retouch.core.batches import in_order
from retouch.core.data import labels_of
from retouch.core.distillation import answered
from retouch.core.metrics.compute import forward_flops
from retouch.core.models import predict
from retouch.distill.mamba_pkd import (
    PKD,
    MambaClassifier,
    ProgressiveDistiller,
    ProgressiveEnsemble,
    adamw,
)
from retouch.worlds.digits import DigitsCNN

NAME = "weak_learners"
SIZES = (12, 8, 6, 4)  # widths of the students, by the paper from large to small
SEVEN = (20, 16, 12, 8, 6, 4, 4)  # as many as the paper has
TINY = (3, 3, 3, 3)  # so weak that each alone is hardly better than a guess
BIG = 20  # width of one student that takes as many operations as those of SIZES together
STEPS, LR = 200, 1e-2  # of each student
SOFT: dict[str, Any] = {"alpha": 0.5, "temperature": 2.0}  # found for Mamba PKD, and the same for all that distil


def student(dim: int) -> nn.Module:
    """One block on the 16 patches of a digit."""
    return MambaClassifier(8, 1, 2, dim, 1, 10, state_dim=4)


def optimizer(parameters: Any) -> torch.optim.Optimizer:
    """AdamW at 1e-2."""
    return torch.optim.AdamW(parameters, lr=LR)


def cosine(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """From 1e-2 to 0, for each student anew."""
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def trained(replica: Replica, model: nn.Module, data: Any, objective: Any) -> Solution:
    """One student, in its share of the budget."""
    optimizer = adamw(model, lr=LR)
    return replica.train(model, data, objective, steps=STEPS, optimizer=optimizer, error=lambda _: 100.0)


def group(replica: Replica, sizes: Sequence[int] = SIZES, *, mode: Any = "residual", **settings: Any) -> Solution:
    """Students one after the other."""

    def trainer(model: nn.Module, data: Any, objective: Any, **given: Any) -> Solution:
        return trained(replica, model, data, objective)

    seed = seeds.derive(replica.seed, "students")
    factories = [lambda dim=dim: student(dim) for dim in sizes]
    distiller = ProgressiveDistiller(replica.teacher, factories, mode, seed=seed, **{**SOFT, **settings})
    train, errors = replica.split.train, list[float]()
    ensemble = ProgressiveEnsemble()
    for ensemble in distiller.stages(train, trainer=trainer):
        errors.append(classification_error(ensemble, replica.split))
    return summed(ensemble, distiller.histories, errors)


def summed(ensemble: ProgressiveEnsemble, parts: Sequence[Solution], errors: Sequence[float]) -> Solution:
    """One solution of several students; the curve has the error after each of them."""
    curve, steps, seconds = [], 0, 0.0
    for part, error in zip(parts, errors, strict=True):
        steps, seconds = steps + part.curve[-1][0], seconds + part.curve[-1][1]
        curve.append((steps, seconds, error))
    return Solution(ensemble, curve, seconds / steps)


def independent(replica: Replica, sizes: Sequence[int] = SIZES) -> Solution:
    """The same students, each distilled as if it were the only one, and their logits averaged."""
    seed = seeds.derive(replica.seed, "students")
    data = answered(replica.split.train, replica.teacher)
    ensemble, parts, errors = ProgressiveEnsemble(combine="mean"), list[Solution](), list[float]()
    for number, dim in enumerate(sizes):
        with seeds.isolated(seeds.derive(seed, "student", number)):
            model = student(dim)
        parts.append(trained(replica, model, data, PKD(None, **SOFT)))
        ensemble.add(model)
        errors.append(classification_error(ensemble, replica.split))
    return summed(ensemble, parts, errors)


def one_big(replica: Replica) -> Solution:
    """One student of the whole budget, distilled in the same way."""
    model = replica.build()
    data = answered(replica.split.train, replica.teacher)
    return replica.train(model, data, PKD(None, **SOFT), optimizer=adamw(model, lr=LR))


def judge(model: nn.Module, split: Split) -> dict[str, float]:
    """Errors of the whole, of the last student alone and of stopping early, with what each takes."""
    one, test = split.test[torch.arange(1)][0], split.test
    whole = forward_flops(teacher_model(), one)
    found = {**classification_measures(model, split), "flops": 100 * forward_flops(model, one) / whole}
    last = model.students[-1] if isinstance(model, ProgressiveEnsemble) else model
    found |= {"last": classification_error(last, split), "last_flops": 100 * forward_flops(last, one) / whole}
    if isinstance(model, ProgressiveEnsemble):
        batch, labels = next(iter(in_order(test, len(test))))
        sure = model.anytime(batch, 0.9)
        costs = torch.tensor([forward_flops(s, one) for s in model.students]).cumsum(0).double()
        found["anytime"] = 100 * float((sure.logits.argmax(-1) != labels).double().mean())
        found["anytime_flops"] = 100 * float(costs[sure.used - 1].mean()) / whole
    times = []
    for _ in range(5):
        start = time.perf_counter()
        predict(model, in_order(test))
        times.append(1000 * (time.perf_counter() - start))
    return {**found, "latency": 1000 * sorted(times)[2] / len(labels_of(test))}


def teacher_model() -> nn.Module:
    """Two convolutions of 48 and 96 channels: 1.4 million operations a digit."""
    return DigitsCNN(48, 64)


def _percent(title: str, line: str, *, digits: int = 2) -> Measure:
    return Measure(title=title, unit="%", better="low", digits=digits, line=line)


def _entry(name: str, title: str, solve: Any, note: str, *claims: Claim) -> Entry:
    return Entry(name=name, title=title, kind="baseline", solve=solve, problems=(NAME,), note=note, claims=claims)


def _claim(text: str, other: str, source: str = "MNIST", *, measure: str = "error", **more: Any) -> Claim:
    return Claim(text=text, problem=NAME, measure=measure, other=other, relation="at most", source=source, **more)


WEAK = _claim(
    "Where single students are weak, the residual mode wins by 5 points over independent ones.",
    "tiny_alone",
    "study of ours",
    margin=-5.0,
)
TOGETHER = (
    _claim("Seven students together are as good as the teacher, to half a point.", "teacher", margin=0.5),
    _claim("They take at most 63% of its operations.", "teacher", measure="flops", factor=0.63),
)

TASK = Task(
    name=NAME,
    text="A CNN of 1.4 million operations teaches Mamba students of 12, 8, 6 and 4 channels, 200 steps each; plain "
    "training and the distilled big student are one of 20 channels, as costly as the four together, for 800 steps.",
    split=draw(1000),
    build=lambda: student(BIG),
    steps=STEPS * len(SIZES),
    optimizer=optimizer,
    scheduler=cosine,
    judge=judge,
    target=20.0,
    teacher=taught(teacher_model),
    measures={
        "last": _percent("last alone", "Error of the last student, which is the smallest, alone."),
        "last_flops": _percent("its compute", "Operations of that student, against the teacher's."),
        "anytime": _percent("anytime error", "Error if each sample takes students until one class has 90%."),
        "anytime_flops": _percent("anytime compute", "Operations of that, mean over samples, against the teacher's."),
        "latency": Measure(
            title="latency", unit="µs", better="low", line="Wall time of a forward pass on this CPU, per digit."
        ),
    },
    baselines=(
        _entry("big_kd", "one student", one_big, "20 channels, distilled, as costly as the four, 800 steps"),
        _entry("independent", "independent students", independent, "each distilled alone, then averaged"),
        _entry("pkd_hard", "residual, labels only", lambda r: group(r, alpha=1.0), "without the soft loss"),
        _entry("pkd_boost", "boosted students", lambda r: group(r, mode="boost"), "samples weigh by what is left"),
        _entry("pkd_chain", "chain of students", lambda r: group(r, mode="chain"), "each learns from the one before"),
        _entry("seven", "seven students", lambda r: group(r, SEVEN), "residual, 20 to 4 channels", *TOGETHER),
        _entry("tiny", "residual, tiny", lambda r: group(r, TINY), "four students of 3 channels", WEAK),
        _entry("tiny_alone", "independent, tiny", lambda r: independent(r, TINY), "four students of 3 channels"),
    ),
)
