"""What arenas of sampling techniques share: tasks with trained models, entries that sample from them, and measures.

Every problem is a task: models, noise and what is wanted, the same for all entries. A file of an arena's folder `tasks`
is a task. An entry gives an `Outcome`, which the task judges against what is known exactly.
"""

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from retouch.arenas.contest import (
    KIND_NAMES,
    Answer,
    Arena,
    Entry,
    Measure,
    Picture,
    Plot,
    Terms,
    Values,
    merged,
    tasks_of,
)
from retouch.core import seeds
from retouch.core.diffusion.denoiser import Denoiser


@dataclass(frozen=True)
class Outcome:
    """What an entry made.

    Attributes:
        samples: in the order of the task's noise and wishes.
        seconds: of sampling alone.
        own: further measures of the entry's.
    """

    samples: Any
    seconds: float = math.nan
    own: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A problem of the arena.

    Args:
        name: of the problem.
        text: what is sampled from what, in a sentence.
        prepare: (seed, search) -> models, noise and wishes of a replica, made once for all entries.
        judge: (what was prepared, samples) -> measures.
        order: measure that the leaderboard is ordered by.
        measures: columns.
        wishes: what was prepared -> what is asked for, as columns of the page's pictures; None for no pictures.
        shown: (what was prepared, samples) -> what an entry has made of each of these wishes.
        baselines: entries that are no technique; each names this task in its `problems`.
        plots: pictures of the leaderboard; each names this task in its `problems`.
    """

    name: str
    text: str
    prepare: Callable[[int, bool], Any]
    judge: Callable[[Any, Any], dict[str, float]]
    order: str
    measures: Mapping[str, Measure]
    wishes: Callable[[Any], Sequence[Picture]] | None = None
    shown: Callable[[Any, Any], Sequence[Answer]] | None = None
    baselines: tuple[Entry, ...] = ()
    plots: tuple[Plot, ...] = ()


class SamplingProblem:
    """A task under several seeds; they vary models and noise alike.

    Args:
        task: what is sampled.
        terms: seeds and the like.
    """

    def __init__(self, task: Task, terms: Terms) -> None:
        self.name, self.terms, self.task = task.name, terms, task

    def replica(self, number: int) -> "Replica":
        """What an entry is given for replica `number`."""
        seed = seeds.derive(int(self.terms.search), "guide", self.terms.number("evaluate", number))
        return Replica(number, seed, self)

    @functools.lru_cache(maxsize=64)  # noqa: B019  problems live as long as a run
    def prepared(self, seed: int) -> Any:
        """Models, noise and wishes of a replica."""
        return self.task.prepare(seed, self.terms.search)


@dataclass(frozen=True)
class Replica:
    """What an entry is given.

    Attributes:
        number: of the replica.
        seed: of an entry's own randomness.
        problem: the task under its terms.
    """

    number: int
    seed: int
    problem: SamplingProblem

    @property
    def given(self) -> Any:
        """What the task has prepared."""
        return self.problem.prepared(self.seed)


def timed(
    denoisers: Sequence[Denoiser], count: int, draw: Callable[[], Any], own: Mapping[str, float] | None = None
) -> Outcome:
    """Draw samples, with the clock running and the rows counted that the models are asked for.

    Args:
        denoisers: whose calls count.
        count: samples that are drawn.
        draw: () -> samples.
        own: further measures.
    """
    rows = 0

    def note(_module: Any, args: Any, kwargs: Any, _output: Any) -> None:
        nonlocal rows
        rows += len(args[0] if args else kwargs["hidden_states"])  # transformers are called by keyword

    handles = [denoiser.model.register_forward_hook(note, with_kwargs=True) for denoiser in denoisers]
    start = time.perf_counter()
    try:
        samples = draw()
    finally:
        for handle in handles:
            handle.remove()
    seconds = time.perf_counter() - start
    return Outcome(samples, seconds, {"calls": rows / count, **(own or {})})


def measure(problem: SamplingProblem, outcomes: Sequence[Outcome]) -> Values:
    """The task's measures and the entry's own, one a replica."""
    rows = []
    for number, outcome in enumerate(outcomes):
        with torch.no_grad(), seeds.isolated():
            found = problem.task.judge(problem.replica(number).given, outcome.samples)
        rows.append({**found, "sampling": 1000 * outcome.seconds, **outcome.own})
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name, math.nan) for row in rows] for name in names}


def pictures(problem: SamplingProblem) -> Sequence[Picture]:
    """The columns: what the first replica asks for."""
    return () if problem.task.wishes is None else problem.task.wishes(problem.replica(0).given)


def answers(problem: SamplingProblem, outcome: Outcome) -> Sequence[Answer]:
    """A row: what an entry has made of the first replica."""
    return () if problem.task.shown is None else problem.task.shown(problem.replica(0).given, outcome.samples)


MEASURES = {
    "calls": Measure(title="calls", better="low", line="Forward passes of the diffusion models a sample."),
    "sampling": Measure(title="sampling", unit="ms", better="low", digits=0, line="Wall time of all samples."),
    "seconds": Measure(title="time", unit="s", better="low", line="Seconds in all."),
}


def sampling_arena(name: str, question: str) -> Arena:
    """The arena of the package `retouch.arenas.NAME`, put together from its tasks.

    Args:
        name: of the package.
        question: that it answers.
    """
    found = tasks_of(name)
    tasks = {task.name: task for task in found}
    own = {name: measure for task in found for name, measure in task.measures.items()}
    return Arena(
        name=name,
        question=question,
        problems={task.name: task.text for task in found},
        measures={**own, **MEASURES},
        prepare=lambda problem, terms: SamplingProblem(tasks[problem], terms),
        measure=measure,
        order=found[0].order,
        orders={task.name: task.order for task in found},
        baselines=lambda: tuple(merged([entry for task in found for entry in task.baselines])),
        kinds={**KIND_NAMES, "oracle": "the aim", "original": "as it is"},
        pictures=pictures,
        answers=answers,
        plots=tuple(plot for task in found for plot in task.plots),
    )


def baseline(
    task: str, name: str, title: str, solve: Callable[..., Outcome], kind: str = "baseline", **more: Any
) -> Entry:
    """An entry of one task that is no technique; `more` is of `Entry`."""
    return Entry(name=name, title=title, kind=kind, solve=solve, problems=(task,), **more)
