"""What arenas are made of: problems, entries, measures, claims, and the numbers that come out.

A problem has replicas: the same question under other seeds. An entry solves each replica, so that any two entries are
compared replica by replica (paired seeds): mean difference and its standard error.
"""

import dataclasses
import importlib
import itertools
import math
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from retouch.core.errors import InputError, nearest, one_of, positive

Values = dict[str, list[float]]  # measure -> one value a replica, or a single value over all of them
KIND_NAMES = {
    "technique": "technique",
    "baseline": "baseline",
    "oracle": "retrained (the aim)",
    "original": "original",
}
VARIED = ("train", "forget", "evaluate")
RELATIONS = ("at most", "at least", "within")


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One column of a leaderboard.

    Args:
        title: its name on the page.
        unit: such as "%" or "s"; empty for none.
        better: "low", "high", or "oracle" where the best value is the oracle's.
        digits: decimals shown.
        line: what it is, in a sentence.
    """

    title: str
    unit: str = ""
    better: str = "oracle"
    digits: int = 1
    line: str = ""


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A picture of a leaderboard on the page.

    Args:
        kind: "scatter" of two measures, or "bars" of one.
        x: measure on the horizontal axis.
        y: measure on the vertical axis of a scatter.
        text: what to see in it.
        problems: those it is drawn for; all if empty.
    """

    kind: str
    x: str
    y: str = ""
    text: str = ""
    problems: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse a kind that cannot be drawn."""
        one_of("kind", self.kind, ("scatter", "bars"))


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A column of the pictures on the page: a sample, to see what every solution says of it, or what is asked for.

    Args:
        image: (h, w) or (c, h, w) in 0 to 1, or None where nothing is given but the words.
        title: what it is.
        group: heading it stands under.
    """

    image: Any
    title: str
    group: str


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a solution says of a picture, or makes of what is asked for.

    Args:
        text: short; may be empty beside an image.
        right: whether that is as it should be; None if that is open.
        image: (h, w) or (c, h, w) in 0 to 1, for solutions that draw.
    """

    text: str
    right: bool | None = None
    image: Any = None


@dataclass(frozen=True, kw_only=True)
class Claim:
    """An inequality between two measured numbers of one run.

    Holds if the mean over replicas of (ours - other) is at most, at least, or within plus or minus `margin`.

    Args:
        text: the claim as a sentence.
        problem: where it is measured.
        measure: what is compared.
        other: name of the entry compared with.
        relation: "at most", "at least" or "within".
        margin: in the measure's unit.
        factor: the other's value is multiplied by this first, for claims such as "half of".
        source: where the claim comes from.
    """

    text: str
    problem: str
    measure: str
    other: str
    relation: str
    margin: float = 0.0
    factor: float = 1.0
    source: str = ""

    def __post_init__(self) -> None:
        """Refuse a relation that could not be judged."""
        one_of("relation", self.relation, RELATIONS)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A contestant.

    Args:
        name: the technique's file name, or the baseline's name.
        title: as shown.
        kind: original, oracle, baseline or technique.
        solve: (replica, **settings) -> solution; timed.
        settings: hyperparameters by problem, found with `retouch bench ARENA --search NAME`; "" for all other
            problems.
        grid: hyperparameters and the values that the search tries, at most a dozen combinations.
        shared: problem -> None, work that is done once for all requests (kept in `problem.store`); timed apart.
        problems: those it takes part in; all if empty.
        note: what else a reader of the leaderboard must know.
        weakness: why it may miss here, for the page to say when it does.
        claims: what its paper says, to be measured.
    """

    name: str
    title: str
    kind: str = "technique"
    solve: Callable[..., Any]
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    shared: Callable[[Any], None] | None = None
    problems: tuple[str, ...] = ()
    note: str = ""
    weakness: str = ""
    claims: tuple[Claim, ...] = ()

    def settings_for(self, problem: str) -> dict[str, Any]:
        """Hyperparameters in one problem."""
        return dict(self.settings.get(problem, self.settings.get("", {})))

    def grid_points(self) -> list[dict[str, Any]]:
        """All combinations of the grid."""
        return [dict(zip(self.grid, point, strict=True)) for point in itertools.product(*self.grid.values())]


@dataclass(frozen=True, kw_only=True)
class Terms:
    """On what terms a problem is posed.

    Args:
        replicas: how many seeds.
        vary: what the seeds vary; the rest is the same in all replicas.
        search: for a search of settings: seeds and held-out data that no evidence uses.
        quick: save on what entries share, where a problem can.
    """

    replicas: int = 16
    vary: tuple[str, ...] = VARIED
    search: bool = False
    quick: bool = False

    def __post_init__(self) -> None:
        """Refuse terms that cannot be met."""
        positive("replicas", self.replicas)
        for name in self.vary:
            one_of("vary", name, VARIED)

    def number(self, what: str, replica: int) -> int:
        """The seed number of a replica for "train", "forget" or "evaluate"."""
        return replica if what in self.vary else 0


class Problem(Protocol):
    """A question under several seeds."""

    name: str
    terms: Terms

    def replica(self, number: int) -> Any:
        """What an entry is given."""


@dataclass(frozen=True, kw_only=True)
class Arena:
    """A question, and how answers to it are measured.

    Args:
        name: its package.
        question: what users want to know, as a sentence.
        problems: description by name.
        measures: columns by name, the most important first.
        prepare: (problem name, terms) -> problem.
        measure: (problem, solutions) -> values.
        order: measure that the leaderboards are ordered by, best first.
        orders: another measure than that, by problem.
        baselines: () -> entries that are no technique.
        derive: rows by name -> None, adds to a problem's rows what compares them, such as ratios of time.
        kinds: what the page calls each kind of entry.
        plots: drawn on the page.
        pictures: problem -> samples shown on the page.
        answers: (problem, solution) -> what it says of each picture.
        words: (problem name, rows) -> the result in plain sentences.
    """

    name: str
    question: str
    problems: Mapping[str, str]
    measures: Mapping[str, Measure]
    prepare: Callable[[str, Terms], Problem]
    measure: Callable[[Any, Sequence[Any]], Values]
    order: str
    orders: Mapping[str, str] = field(default_factory=dict)
    derive: Callable[[dict[str, Any]], None] = lambda rows: None
    kinds: Mapping[str, str] = field(default_factory=lambda: dict(KIND_NAMES))
    baselines: Callable[[], Sequence[Entry]] = tuple
    plots: tuple[Plot, ...] = ()
    pictures: Callable[[Any], Sequence[Picture]] = lambda problem: ()
    answers: Callable[[Any, Any], Sequence[Answer]] = lambda problem, solution: ()
    words: Callable[[str, Mapping[str, Any]], Sequence[str]] = lambda problem, rows: ()

    def order_of(self, problem: str) -> str:
        """Measure that a problem's leaderboard is ordered by."""
        return self.orders.get(problem, self.order)

    def entries(self) -> list[Entry]:
        """Baselines, and every file of the folder `entries`."""
        folder = importlib.import_module(f"retouch.arenas.{self.name}.entries")
        found = [
            importlib.import_module(f"{folder.__name__}.{m.name}").ENTRY for m in pkgutil.iter_modules(folder.__path__)
        ]
        return [*self.baselines(), *sorted(found, key=lambda entry: entry.name)]


def tasks_of(arena: str) -> list[Any]:
    """The TASK of every file in an arena's folder `tasks`; files beginning with "_" are what tasks share."""
    folder = importlib.import_module(f"retouch.arenas.{arena}.tasks")
    files = [module.name for module in pkgutil.iter_modules(folder.__path__) if not module.name.startswith("_")]
    return [importlib.import_module(f"{folder.__name__}.{file}").TASK for file in files]


def merged(entries: Sequence[Entry]) -> list[Entry]:
    """Entries of one name from several tasks as one entry in all of them."""
    found: dict[str, Entry] = {}
    for entry in entries:
        other = found.get(entry.name, entry)
        made = [getattr(one.solve, "__qualname__", None) for one in (other, entry)]
        if made[0] != made[1]:
            raise ValueError(f"The tasks {other.problems} and {entry.problems} have different entries {entry.name!r}")
        before = found[entry.name].problems if entry.name in found else ()
        found[entry.name] = dataclasses.replace(entry, problems=(*before, *entry.problems))
    return list(found.values())


def arena_names() -> list[str]:
    """All arenas."""
    import retouch.arenas

    return [module.name for module in pkgutil.iter_modules(retouch.arenas.__path__) if module.ispkg]


def arena(name: str) -> Arena:
    """An arena by name."""
    if name not in arena_names():
        raise InputError(f"There is no arena {name!r}, only {', '.join(arena_names())}.{nearest(name, arena_names())}")
    return importlib.import_module(f"retouch.arenas.{name}").ARENA


# --- numbers --------------------------------------------------------------------------------------------------------


def mean(values: Sequence[float]) -> float:
    """Mean over replicas; NaN for none."""
    return float(np.mean(values)) if len(values) else math.nan


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean; NaN for fewer than two replicas."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def judge(claim: Claim, ours: Values, other: Values) -> dict[str, Any]:
    """Measure a claim: mean paired difference, its standard error, and whether it holds."""
    a, b = ours.get(claim.measure), other.get(claim.measure)
    if not a or not b or len(a) != len(b):
        return {"difference": None, "error": None, "holds": None}
    differences = [x - claim.factor * y for x, y in zip(a, b, strict=True)]
    difference = mean(differences)
    holds = {
        "at most": difference <= claim.margin,
        "at least": difference >= claim.margin,
        "within": abs(difference) <= claim.margin,
    }[claim.relation]
    return {"difference": difference, "error": standard_error(differences), "holds": bool(holds)}
