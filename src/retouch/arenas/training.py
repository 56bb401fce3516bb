"""What arenas of training techniques share: tasks, replicas that train within a budget, and how models are measured.

Every problem is a task: a model, data, a budget of steps and an optimizer, the same for all entries. A file of an
arena's folder `tasks` is a task. An entry changes one thing in `replica.train(...)`: the model, the data, the
objective, the callbacks, or the optimizer. While it trains, the test error is watched (the clock stands still for
that), so that steps and seconds to a target can be compared as well as the end.
"""

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from retouch.arenas.contest import KIND_NAMES, Arena, Entry, Measure, Plot, Terms, Values, mean, merged, tasks_of
from retouch.core import seeds
from retouch.core.batches import in_order
from retouch.core.data import labels_of
from retouch.core.loop import Callback, OptimizerChoice, Run, SchedulerChoice, fit
from retouch.core.metrics.compute import forward_flops
from retouch.core.metrics.unlearning import accuracy
from retouch.core.models import predict, unpack
from retouch.core.objectives import Losses, cross_entropy
from retouch.core.teachers import Teacher

WATCHED = 20  # times that the test error is looked at during a run


@dataclass(frozen=True, kw_only=True)
class Split:
    """The data of one replica.

    Attributes:
        train: what entries train on.
        test: what they are judged on; in a search of settings, data that no evidence uses.
        validation: what an entry may choose by.
        notes: what else a task needs to judge, such as the true labels behind noisy ones.
    """

    train: Any
    test: Any
    validation: Any = None
    notes: Mapping[str, Any] = field(default_factory=dict)


def classification_error(model: nn.Module, split: Split) -> float:
    """Share of test samples classified wrongly, in percent."""
    return 100.0 - accuracy(predict(model, in_order(split.test)), labels_of(split.test))


def classification_measures(model: nn.Module, split: Split) -> dict[str, float]:
    """Test error and calibration error of a classifier, in percent."""
    from torchmetrics.functional.classification import multiclass_calibration_error

    logits, labels = predict(model, in_order(split.test)).nan_to_num(), labels_of(split.test)
    calibration = multiclass_calibration_error(logits.softmax(-1), labels, num_classes=logits.shape[-1])
    return {"error": 100.0 - accuracy(logits, labels), "calibration": 100.0 * float(calibration)}


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """AdamW at 1e-3."""
    return torch.optim.AdamW(parameters, lr=1e-3)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A problem of the arena.

    Args:
        name: of the problem.
        text: what is trained on what, in a sentence.
        split: (seed, search) -> the data of a replica.
        build: () -> an untrained model, called under a seed of the replica's own.
        steps: optimizer steps; the budget.
        batch_size: samples a step.
        optimizer: parameters -> optimizer.
        scheduler: (optimizer, steps) -> scheduler.
        objective: what plain training minimises.
        error: (model, split) -> percent, watched during training.
        judge: (model, split) -> measures at the end.
        target: error that the steps and seconds are counted to.
        early: step at which the error is shown as well; none if 0.
        order: measure that the leaderboard is ordered by.
        measures: columns that other tasks do not have.
        baselines: entries besides plain training; each names this task in its `problems`.
        plots: pictures of the leaderboard; each names this task in its `problems`.
        teacher: replica -> the trained model that students learn from, where there is one.
    """

    name: str
    text: str
    split: Callable[[int, bool], Split]
    build: Callable[[], nn.Module]
    steps: int
    batch_size: int = 64
    optimizer: OptimizerChoice = adamw
    scheduler: SchedulerChoice | None = None
    objective: Callable[..., Losses] = cross_entropy
    error: Callable[[nn.Module, Split], float] = classification_error
    judge: Callable[[nn.Module, Split], dict[str, float]] = classification_measures
    target: float = 10.0
    early: int = 0
    order: str = "error"
    measures: Mapping[str, Measure] = field(default_factory=dict)
    baselines: tuple[Entry, ...] = ()
    plots: tuple[Plot, ...] = ()
    teacher: Callable[["Replica"], nn.Module] | None = None


@dataclass(frozen=True)
class Solution:
    """A trained model and how it came to be.

    Attributes:
        model: in eval mode, as it would be used.
        curve: (steps, seconds of training, error in percent), in order.
        step_seconds: median time of a training step.
        own: measures that the entry itself adds.
    """

    model: nn.Module
    curve: Sequence[tuple[int, float, float]]
    step_seconds: float
    own: Mapping[str, float] = field(default_factory=dict)


class Stopwatch(Callback):
    """Times every step, and looks at the error now and then with the clock stopped.

    Args:
        error: model -> percent.
        every: steps between two looks.
        early: one more step to look at.
    """

    def __init__(self, error: Callable[[nn.Module], float], every: int, early: int = 0) -> None:
        self.error, self.every, self.early = error, every, early
        self.seconds: list[float] = []
        self.curve: list[tuple[int, float, float]] = []

    def on_start(self, run: Run) -> None:
        self.last = time.perf_counter()

    def on_step(self, run: Run) -> None:
        self.seconds.append(time.perf_counter() - self.last)
        if run.step % self.every == 0 or run.step in (self.early, run.steps):
            with seeds.isolated():
                self.curve.append((run.step, sum(self.seconds), self.error(run.module)))
        self.last = time.perf_counter()


class TrainProblem:
    """A task under several seeds; "train" varies the weights and orders, "evaluate" the data where a task draws it.

    Args:
        task: what is trained.
        terms: seeds and the like.
    """

    def __init__(self, task: Task, terms: Terms) -> None:
        self.name, self.terms, self.task = task.name, terms, task
        self.root = int(terms.search)  # all seeds are derived from this
        self.store: dict[str, Any] = {}  # what an entry shares between replicas

    def replica(self, number: int) -> "Replica":
        """What an entry is given for replica `number`."""
        return Replica(number, seeds.derive(self.root, "train", self.terms.number("train", number)), self)

    @functools.lru_cache(maxsize=4)  # noqa: B019  problems live as long as a run
    def split(self, number: int) -> Split:
        """The data of a replica."""
        seed = seeds.derive(self.root, "data", self.terms.number("evaluate", number))
        return self.task.split(seed, self.terms.search)


@dataclass(frozen=True)
class Replica:
    """What an entry is given.

    Attributes:
        number: of the replica.
        seed: of weights, orders, and an entry's own randomness.
        problem: for what is shared by all replicas.
    """

    number: int
    seed: int
    problem: TrainProblem

    @property
    def task(self) -> Task:
        """Model, data and budget."""
        return self.problem.task

    @property
    def split(self) -> Split:
        """The data."""
        return self.problem.split(self.number)

    @property
    def teacher(self) -> Teacher:
        """The task's teacher, trained once for all entries and frozen."""
        teachers = self.problem.store.setdefault("teachers", {})
        if self.seed not in teachers:
            assert self.task.teacher is not None, f"the task {self.task.name} has no teacher"
            teachers[self.seed] = Teacher(self.task.teacher(self))
        return teachers[self.seed]

    def build(self, key: object = "weights") -> nn.Module:
        """An untrained model: the same one for all entries, or another of the same kind under another key."""
        with seeds.isolated(seeds.derive(self.seed, key)):
            return self.task.build()

    def train(
        self,
        model: nn.Module | None = None,
        data: Any = None,
        objective: Callable[..., Losses] | None = None,
        *,
        callbacks: Sequence[Callback] = (),
        optimizer: OptimizerChoice | None = None,
        steps: int | None = None,
        error: Callable[[nn.Module], float] | None = None,
        finish: Callable[[nn.Module], nn.Module] = lambda model: model,
        own: Callable[[nn.Module], Mapping[str, float]] = lambda model: {},
    ) -> Solution:
        """Train within the task's budget; what is not given is as in plain training.

        Args:
            model: to train; a new one of the task's kind if None.
            data: to train on; the task's if None.
            objective: the task's if None.
            callbacks: of the technique.
            optimizer: from parameters to an optimizer.
            steps: fewer or more than the task's budget, for what trains in several runs.
            error: model -> percent, where the task's way to look at a model does not fit while it trains.
            finish: trained model -> the model as it is used, such as with a width chosen on the validation data.
            own: finished model -> measures of the technique's own.
        """
        task, split = self.task, self.split
        steps = steps or task.steps
        look = error or (lambda model: task.error(model, split))
        watch = Stopwatch(look, max(1, steps // WATCHED), task.early)
        model = model if model is not None else self.build()
        fit(
            model,
            split.train if data is None else data,
            objective or task.objective,
            steps=steps,
            batch_size=task.batch_size,
            optimizer=optimizer or task.optimizer,
            scheduler=task.scheduler,
            callbacks=[*callbacks, watch],
            seed=self.seed,
            progress=False,
        )
        finished = finish(model).eval()
        ordered = sorted(watch.seconds)
        return Solution(finished, watch.curve, ordered[len(ordered) // 2], own(finished))


def measure(problem: TrainProblem, solutions: Sequence[Solution]) -> Values:
    """The task's measures, steps and seconds to its target error, and the time of a step."""
    rows = []
    for number, solution in enumerate(solutions):
        with seeds.isolated():
            values = problem.task.judge(solution.model, problem.split(number))
        steps, seconds = to_target(solution.curve, problem.task.target)
        milliseconds = 1000 * solution.step_seconds
        values |= {"steps": steps, "wait": seconds, "step": milliseconds}
        if problem.task.teacher is not None and problem.task.judge is classification_measures:
            values |= against_teacher(problem, number, solution.model)
        if problem.task.early:
            later = (error for step, _, error in solution.curve if step >= problem.task.early)
            values["early"] = next(later, solution.curve[-1][2])
        rows.append({**values, **solution.own})
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name, math.nan) for row in rows] for name in names}


def to_target(curve: Sequence[tuple[int, float, float]], target: float) -> tuple[float, float]:
    """Steps and seconds until the error was first seen at the target; those of the whole run if it never was."""
    steps, seconds, _ = next((point for point in curve if point[2] <= target), curve[-1])
    return float(steps), seconds


def against_teacher(problem: TrainProblem, number: int, model: nn.Module) -> dict[str, float]:
    """Share of test samples on which a student says what its teacher says, and its size and compute in percent."""
    teacher, test = problem.replica(number).teacher.model, problem.split(number).test
    both = [predict(one, in_order(test)).argmax(-1) for one in (model, teacher)]
    sizes = [sum(p.numel() for p in one.parameters()) for one in (model, teacher)]
    work = [sample_flops(one, test) for one in (model, teacher)]
    return {
        "agreement": 100.0 * float((both[0] == both[1]).double().mean()),
        "size": 100.0 * sizes[0] / sizes[1],
        "flops": 100.0 * work[0] / max(work[1], 1),
    }


def sample_flops(model: nn.Module, data: Any) -> int:
    """Operations of one sample's forward pass, in eval mode."""
    return forward_flops(model, unpack(next(iter(in_order(data, 1))))[0])


def derive(rows: dict[str, Any]) -> None:
    """Time of a step against plain training's of the same run."""
    plain = mean(rows["plain"]["values"]["step"]) if "plain" in rows else math.nan
    for row in rows.values():
        row["values"]["overhead"] = [100 * (step / plain - 1) for step in row["values"]["step"]]


def plain(replica: Replica) -> Solution:
    """Nothing but the task's own objective."""
    return replica.train()


def teacher(replica: Replica) -> Solution:
    """The teacher itself."""
    model = replica.teacher.model
    return Solution(model, [(0, 0.0, replica.task.error(model, replica.split))], math.nan)


MEASURES = {
    "error": Measure(title="error", unit="%", better="low", digits=2, line="Test samples classified wrongly."),
    "calibration": Measure(
        title="calibration", unit="%", better="low", digits=2, line="Expected calibration error on test samples."
    ),
    "agreement": Measure(
        title="agreement", unit="%", better="high", line="Test samples on which the student says what the teacher says."
    ),
    "early": Measure(title="early error", unit="%", better="low", line="Error at an early step, see the problem."),
    "steps": Measure(title="steps", better="low", digits=0, line="Steps until the error was at the task's target."),
    "wait": Measure(title="wait", unit="s", better="low", digits=2, line="Seconds of training until then."),
    "step": Measure(title="step", unit="ms", better="low", digits=2, line="Median time of a training step."),
    "overhead": Measure(
        title="overhead",
        unit="%",
        better="low",
        digits=0,
        line="Time of a step above plain training's of this run.",
    ),
    "size": Measure(title="size", unit="%", better="low", line="Parameters, against the teacher's."),
    "flops": Measure(
        title="compute", unit="%", better="low", line="Operations of a forward pass, against the teacher's."
    ),
    "seconds": Measure(title="time", unit="s", better="low", line="Seconds in all."),
}


def training_arena(name: str, question: str) -> Arena:
    """The arena of the package `retouch.arenas.NAME`, put together from its tasks.

    Args:
        name: of the package.
        question: that it answers.
    """
    found = tasks_of(name)
    tasks = {task.name: task for task in found}
    always = [Entry(name="plain", title="plain training", kind="original", solve=plain)]
    taught = tuple(task.name for task in found if task.teacher is not None)
    if taught:
        always.append(Entry(name="teacher", title="the teacher", kind="oracle", solve=teacher, problems=taught))
    own = {name: measure for task in found for name, measure in task.measures.items()}
    return Arena(
        name=name,
        question=question,
        problems={task.name: task.text for task in found},
        measures={**own, **MEASURES},
        prepare=lambda problem, terms: TrainProblem(tasks[problem], terms),
        measure=measure,
        order="error",
        orders={task.name: task.order for task in found},
        derive=derive,
        baselines=lambda: (*always, *merged([entry for task in found for entry in task.baselines])),
        kinds={**KIND_NAMES, "oracle": "teacher", "original": "plain training"},
        plots=tuple(plot for task in found for plot in task.plots),
    )
