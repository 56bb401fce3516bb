"""Which of 27 untrained students will be the best one? Scores of each, against how good it is once distilled.

Small-scale study of DisWOT: residual networks with 1 to 3 blocks at 8 and at 4 pixels and 2 to 8 channels in the first
stage, all of which end in 32 channels; the teacher is a deeper and wider one of the same family. The truth is the mean
test error of two trainings of each, made once a replica for all entries. An entry scores, chooses, and is given the
chosen student as trained.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from retouch.arenas.contest import Claim, Entry, Measure
from retouch.arenas.distill import Replica, Solution, Split, Task, TrainProblem, classification_error
from retouch.arenas.distill.tasks._pairs import TAUGHT, draw, kl, one_cycle
from retouch.arenas.training import classification_measures, sample_flops
from retouch.core import seeds
from retouch.core.data import concat, subset
from retouch.core.distillation import Distillation, answered
from retouch.core.features import capture
from retouch.core.models import mode
from retouch.distill.diswot import rank_students
from retouch.worlds import digits

NAME = "architectures"
Arch = tuple[int, int, int]  # blocks of the first and the second stage, channels of the first
SPACE: tuple[Arch, ...] = tuple(itertools.product((1, 2, 3), (1, 2, 3), (2, 4, 8)))
LAST, TRAININGS, BATCH, RESAMPLED = 32, 2, 64, 1000
MATCHED = 1.3  # largest ratio of parameters of two students of about the same size


class Block(nn.Module):
    """A convolution with a shortcut around it where the shape stays."""

    def __init__(self, wide: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(wide, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.act, self.residual = nn.ReLU(), wide == out and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        """Maps to maps."""
        y = self.norm(self.conv(x))
        return self.act(x + y if self.residual else y)


def network(arch: Arch) -> nn.Module:
    """A network of the family for images (n, 1, 8, 8)."""
    first, second, width = arch
    stages = [Block(1, width), *(Block(width, width) for _ in range(first - 1))]
    stages += [Block(width, LAST, 2), *(Block(LAST, LAST) for _ in range(second - 1))]
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(LAST, 10))


def built(replica: Replica, arch: Arch, key: object = "candidate") -> nn.Module:
    """The network under a seed of the replica's own."""
    with seeds.isolated(seeds.derive(replica.seed, key, arch)):
        return network(arch)


def split(seed: int, search: bool) -> Split:
    """200 of the teacher's samples; a search is judged on digits that nobody has seen."""
    found = draw(200)(seed, search)
    spare = subset(digits.data("train"), range(TAUGHT, len(digits.data("train"))))
    return dataclasses.replace(found, test=concat(found.test, spare)) if search else found


def teacher(replica: Replica) -> nn.Module:
    """Four blocks a stage, 32 channels throughout."""
    data = subset(digits.data("train"), range(TAUGHT))
    return replica.train(built(replica, (4, 4, LAST)), data, steps=200, error=lambda model: math.nan).model


# --- the truth --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Truth:
    """All candidates distilled.

    Attributes:
        errors: on the test samples, in percent, mean over trainings (candidates,).
        validation: likewise on the validation samples.
        solutions: the first training of each.
        seconds: of the processor for one training of each, in all.
        parameters: of each.
    """

    errors: np.ndarray
    validation: np.ndarray
    solutions: list[Solution]
    seconds: float
    parameters: np.ndarray


def truth(replica: Replica) -> Truth:
    """What training all candidates tells, once a replica."""
    kept: dict[int, Truth] = replica.problem.store.setdefault("truth", {})
    if replica.seed not in kept:
        data = answered(replica.split.train, replica.teacher)
        checked = dataclasses.replace(replica.split, test=replica.split.validation)
        errors, validation, solutions, seconds = [], [], list[Solution](), 0.0
        for arch, training in itertools.product(SPACE, range(TRAININGS)):
            model = built(replica, arch, ("training", training))
            start = time.process_time()
            made = replica.train(model, data, Distillation(None, kl), error=lambda model: math.nan)
            seconds += (time.process_time() - start) / TRAININGS
            errors.append(classification_error(made.model, replica.split))
            validation.append(classification_error(made.model, checked))
            if training == 0:
                solutions.append(dataclasses.replace(made, curve=[(*made.curve[-1][:2], errors[-1])]))
        tested, checked_on = (np.reshape(found, (-1, TRAININGS)).mean(1) for found in (errors, validation))
        parameters = [sum(p.numel() for p in solution.model.parameters()) for solution in solutions]
        kept[replica.seed] = Truth(tested, checked_on, solutions, seconds, np.array(parameters))
    return kept[replica.seed]


def prepare(problem: TrainProblem) -> None:
    """Train all candidates of all replicas, before any entry is timed."""
    for number in range(problem.terms.replicas):
        truth(problem.replica(number))


# --- how good a ranking is --------------------------------------------------------------------------------------------


def kendall(scores: np.ndarray, accuracies: np.ndarray, pairs: np.ndarray | None = None) -> np.ndarray:
    """Kendall's tau-b over the last axis, of all pairs or of those given (candidates, candidates)."""
    x, y = (np.sign(values[..., :, None] - values[..., None, :]) for values in (scores, accuracies))
    chosen = np.ones(x.shape[-2:]) if pairs is None else pairs
    both, norm = (x * y * chosen).sum((-2, -1)), (x**2 * chosen).sum((-2, -1)) * (y**2 * chosen).sum((-2, -1))
    return both / np.sqrt(np.where(norm > 0, norm, np.inf))


def choose(replica: Replica, scores: Any, seconds: float) -> Solution:
    """The student that scores best, with how well the scores rank all of them.

    Args:
        replica: of the task.
        scores: of `SPACE`, the higher the better.
        seconds: of the processor that scoring all of it took.
    """
    from scipy.stats import spearmanr

    found, x = truth(replica), np.asarray(scores, dtype=float)
    y, size = -found.errors, found.parameters
    rows = np.random.default_rng(seeds.derive(replica.seed, "bootstrap")).integers(len(x), size=(RESAMPLED, len(x)))
    low, high = np.quantile(kendall(x[rows], y[rows]), (0.025, 0.975))
    ratio = size[:, None] / size[None, :]
    best, chosen = int(x.argmax()), found.solutions[int(x.argmax())]
    flat = x.std() == 0
    own = {
        "kendall": kendall(x, y),
        "low": low,
        "high": high,
        "spearman": 0.0 if flat else spearmanr(x, y).statistic,
        "matched": kendall(x, y, (ratio < MATCHED) & (ratio > 1 / MATCHED)),
        "regret": found.errors.mean() + y.max() if flat else y.max() - y[best],
        "scored": 1000 * seconds / len(x),
        "cheaper": found.seconds / max(seconds, 1e-9),
        "size": 100 * size[best] / sum(p.numel() for p in replica.teacher.model.parameters()),
    }
    return dataclasses.replace(chosen, own={name: float(value) for name, value in own.items()})


def by(score: Callable[..., list[float]], **settings: Any) -> Callable[[Replica], Solution]:
    """An entry that chooses by scores of all candidates; the processor's time is taken, whatever else it does."""

    def solve(replica: Replica, **more: Any) -> Solution:
        truth(replica)
        start = time.process_time()
        scores = score(replica, **{**settings, **more})
        return choose(replica, scores, time.process_time() - start)

    return solve


# --- scores -----------------------------------------------------------------------------------------------------------


def batches(replica: Replica, count: int) -> list[tuple[Tensor, Tensor]]:
    """Labelled batches of the training samples."""
    data = replica.split.train
    order = torch.randperm(len(data), generator=seeds.generator(replica.seed, "batches"))
    return [data[rows] for rows in order[: count * BATCH].chunk(count)]


def diswot(replica: Replica, *, part: str = "total", count: int = 1, **settings: Any) -> list[float]:
    """DisWOT or one of its parts, mean over batches."""
    draws, untaught = seeds.generator(replica.seed, "diswot"), built(replica, (4, 4, LAST))
    totals = dict.fromkeys(SPACE, 0.0)
    for batch in batches(replica, count):
        candidates = {arch: built(replica, arch) for arch in SPACE}
        for row in rank_students(untaught, candidates, *batch, generator=draws, **settings):
            totals[row.name] += getattr(row, part) / count
    return list(totals.values())


def naswot(replica: Replica) -> list[float]:
    """log |det| of the kernel that counts ReLUs in the same state, over pairs of a batch (arXiv 2006.04647)."""
    ((images, _),) = batches(replica, 1)
    found = []
    for arch in SPACE:
        model, kernel = built(replica, arch), torch.zeros(len(images), len(images), dtype=torch.float64)
        layers = [name for name, module in model.named_modules() if isinstance(module, nn.ReLU)]
        with torch.no_grad(), capture(model, layers) as seen:
            model(images)
        for activation in seen.values():
            on = (activation.flatten(1) > 0).double()
            kernel += on @ on.T + (1 - on) @ (1 - on).T
        found.append(float(torch.linalg.slogdet(kernel).logabsdet))
    return found


def synflow(replica: Replica) -> list[float]:
    """log of the sum of w dR/dw at absolute weights and an input of ones, R the sum of logits (arXiv 2006.05467)."""
    found = []
    for arch in SPACE:
        model = built(replica, arch).double()
        for parameter in model.parameters():
            parameter.data.abs_()
        with mode(model, training=False):
            total = model(torch.ones(1, 1, 8, 8, dtype=torch.float64)).sum()
        gradients = torch.autograd.grad(total, list(model.parameters()))
        flow = [float((p * g).detach().sum()) for p, g in zip(model.parameters(), gradients, strict=True)]
        found.append(math.log(math.fsum(flow)))
    return found


def parameters(replica: Replica) -> list[float]:
    """Number of parameters."""
    return [sum(p.numel() for p in built(replica, arch).parameters()) for arch in SPACE]


def flops(replica: Replica) -> list[float]:
    """Operations of a forward pass."""
    return [sample_flops(built(replica, arch), replica.split.test) for arch in SPACE]


def any_student(replica: Replica) -> list[float]:
    """No preference."""
    return [0.0] * len(SPACE)


def train_all(replica: Replica) -> Solution:
    """Distil all of them and look at the validation samples."""
    found = truth(replica)
    return choose(replica, -found.validation, found.seconds)


def judge(model: nn.Module, split: Split) -> dict[str, float]:
    """As for any classifier; what does not rank has no rank correlation."""
    return {**classification_measures(model, split), "kendall": math.nan}


def _entry(name: str, title: str, solve: Callable[[Replica], Solution], note: str = "", **more: Any) -> Entry:
    own: dict[str, Any] = {"kind": "baseline", "shared": prepare, "problems": (NAME,), **more}
    return Entry(name=name, title=title, solve=solve, note=note, **own)


def claim(text: str, measure: str, other: str, *, relation: str = "at least", factor: float = 1.0) -> Claim:
    """A claim of the paper's section on search."""
    by: dict[str, Any] = {"relation": relation, "factor": factor, "source": "section 4"}
    return Claim(text=text, problem=NAME, measure=measure, other=other, **by)


CHEAP = claim("It costs a hundredth of distilling all of them.", "cheaper", "train_all", factor=100.0)
OFFICIAL = (claim("Its scores go with accuracy after distillation: tau is above 0.", "kendall", "any_student"), CHEAP)


def _measure(title: str, line: str, better: str = "high", unit: str = "", digits: int = 2) -> Measure:
    return Measure(title=title, line=line, better=better, unit=unit, digits=digits)


TASK = Task(
    name=NAME,
    text="Of 27 untrained residual networks, one is chosen to be taught on 200 digits in 100 steps.",
    split=split,
    build=lambda: network((2, 2, 4)),
    steps=100,
    scheduler=one_cycle,
    target=10.0,
    judge=judge,
    order="kendall",
    teacher=teacher,
    measures={
        "kendall": _measure(
            "Kendall tau", "Of the scores with test accuracy after distillation, 1 for the same order, 0 for chance."
        ),
        "low": _measure("from", "Lower end of its 95% interval, candidates drawn again with replacement."),
        "high": _measure("to", "Upper end of it."),
        "spearman": _measure("Spearman rho", "Correlation of both ranks."),
        "matched": _measure(
            "tau at equal size", "Kendall's tau over pairs whose parameter counts differ by less than 30%."
        ),
        "regret": _measure(
            "regret", "Test error of the chosen student above the best one's, means over two trainings.", "low", "%"
        ),
        "scored": _measure("time a score", "Of the processor, for a candidate.", "low", "ms", 1),
        "cheaper": _measure(
            "times cheaper", "Seconds to distil every candidate once, by seconds to score them.", "high", "x", 0
        ),
    },
    baselines=(
        _entry("train_all", "distil all of them", train_all, "chooses by validation error, mean over two trainings"),
        _entry("any_student", "any of them", by(any_student), "regret of a random choice"),
        _entry("relation", "relation alone", by(diswot, part="relation", repeats=5)),
        _entry("semantic", "semantics alone", by(diswot, part="semantic", repeats=5)),
        _entry("diswot_sum", "DisWOT, official sum, one draw", by(diswot), claims=OFFICIAL),
        _entry("diswot_gaussian", "DisWOT, official sum, N(0, 1) weights", by(diswot, init="gaussian")),
        _entry("diswot_mean", "DisWOT, official sum, 5 draws x 3 batches", by(diswot, repeats=5, count=3)),
        _entry("relation_mean", "relation, 5 draws x 3 batches", by(diswot, part="relation", repeats=5, count=3)),
        _entry("parameters", "parameter count", by(parameters)),
        _entry("flops", "operations", by(flops)),
        _entry("naswot", "NASWOT", by(naswot)),
        _entry("synflow", "SynFlow", by(synflow)),
    ),
)
