"""What the tasks of pruned data share: the same training at several shares of the data, and its error at each."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from retouch.arenas.contest import Claim, Entry, Measure
from retouch.arenas.distill import Replica, Solution, Split, Task, classification_error, classification_measures
from retouch.arenas.distill.tasks._pairs import TAUGHT, mlp, one_cycle
from retouch.core import seeds
from retouch.core.batches import in_order
from retouch.core.data import TensorData, labels_of, subset
from retouch.core.models import predict
from retouch.core.teachers import Teacher
from retouch.distill.pruned_data import PrunedDistillation, el2n_scores
from retouch.worlds import digits

CLEAN, NOISY = TASKS = ("pruned", "pruned_noisy")
RATES = {"error_3": 0.03, "error_10": 0.1, "error_30": 0.3, "error_50": 0.5}  # measure -> share of the data kept
SHOWN = "error_10"  # the model that the other columns are of
SCOUTS, EARLY = 3, 60  # networks that score samples, and the steps they are trained for
MEASURES = {
    name: Measure(
        title=f"error at {rate:.0%}",
        unit="%",
        better="low",
        digits=2,
        line=f"Test samples classified wrongly by a student of {rate:.0%} of the data; at every share as many steps.",
    )
    for name, rate in RATES.items()
}
MEASURES["wrong"] = Measure(
    title="wrong labels", unit="%", better="low", line="Wrong labels among the samples kept, at a share of 10%."
)


def judge(model: nn.Module, split: Split) -> dict[str, float]:
    """As for any classifier; one that was not trained at several shares has the same error at each."""
    values = classification_measures(model, split)
    return {**values, **dict.fromkeys(RATES, values["error"])}


def learned(replica: Replica, width: int = 64) -> nn.Module:
    """A teacher of all the data, wrong labels and all."""
    with seeds.isolated(seeds.derive(replica.seed, "teacher", width)):
        model = mlp(width, width)
    return replica.train(model, steps=600).model


def scores(replica: Replica) -> Tensor:
    """EL2N of all samples, in the mean over networks that were stopped early."""
    kept = replica.problem.store.setdefault("el2n", {})
    if replica.seed not in kept:
        data = replica.split.train
        scouts = [replica.train(replica.build(("scout", i)), steps=EARLY).model for i in range(SCOUTS)]
        logits = torch.stack([predict(scout, in_order(data)) for scout in scouts])
        kept[replica.seed] = el2n_scores(logits, labels_of(data))
    return kept[replica.seed]


def pruned(replica: Replica, *, teacher: nn.Module | None = None, keep: str = "random", **settings: Any) -> Solution:
    """Train at every share of the data, for the task's steps at each."""
    data, found = replica.split.train, {}
    by: dict[str, Any] = {"keep": keep, "scores": None if keep == "random" else scores(replica), "seed": replica.seed}
    for name, rate in RATES.items():
        made = PrunedDistillation(teacher or replica.teacher, replica.build(), data, rate, **by, **settings)
        found[name] = made.indices, replica.train(made.recipe.model, made.data, made.recipe.objective)
    own = {name: classification_error(solution.model, replica.split) for name, (_, solution) in found.items()}
    kept, shown = found[SHOWN]
    wrong = 100 * float(replica.split.notes["flipped"][kept].double().mean())
    return dataclasses.replace(shown, own={**own, "wrong": wrong})


def variant(**settings: Any) -> Callable[[Replica], Solution]:
    """An entry with other settings."""
    return lambda replica: pruned(replica, **settings)


def taught_by(width: int) -> Callable[[Replica], Solution]:
    """An entry with a teacher of another width."""
    return lambda replica: pruned(replica, teacher=Teacher(learned(replica, width)))


def _claim(task: str, text: str, measure: str, other: str, relation: str = "at most", margin: float = 0.0) -> Claim:
    whole: dict[str, Any] = {"relation": relation, "margin": margin, "source": "section 4"}
    return Claim(text=text, problem=task, measure=measure, other=other, **whole)


MOVES = (
    _claim(CLEAN, "Of 3%, the teacher alone (alpha 1) is better than half teacher, half labels.", "error_3", "half"),
    _claim(CLEAN, "Of 10%, the teacher alone is better than half teacher, half labels.", "error_10", "half"),
    _claim(
        CLEAN, "Of 50%, half teacher, half labels is better than the teacher alone.", "error_50", "half", "at least"
    ),
)
HARDEST = (
    *(
        _claim(task, f"A teacher helps on the hardest {rate:.0%} too.", name, "hardest_labels")
        for task in TASKS
        for name, rate in RATES.items()
    ),
    _claim(
        NOISY,
        "The hardest tenth has 50 points more of wrong labels than a random one.",
        "wrong",
        "labels",
        "at least",
        50,
    ),
    _claim(NOISY, "On it, a teacher takes 20 points or more off the error.", "error_10", "hardest_labels", margin=-20),
)


def rows(task: str) -> tuple[Entry, ...]:
    """What is the same in both tasks."""
    kind: dict[str, Any] = {"kind": "baseline", "problems": (task,)}
    found = (
        Entry(name="labels", title="random share, labels alone", solve=variant(alpha=0.0), **kind),
        Entry(name="half", title="random share, alpha 0.5", solve=variant(alpha=0.5), **kind),
        Entry(name="teacher_alone", title="random share, alpha 1", solve=variant(alpha=1.0), claims=MOVES, **kind),
    )
    hardest = {"hardest_labels": ("labels alone", {"alpha": 0.0}, ()), "hardest_kd": ("with a teacher", {}, HARDEST)}
    return found + tuple(
        Entry(
            name=name, title=f"hardest by EL2N, {words}", solve=variant(keep="hardest", **more), claims=claims, **kind
        )
        for name, (words, more, claims) in hardest.items()
    )


def pruned_task(name: str, text: str, *, wrong: float = 0.0, **changes: Any) -> Task:
    """A network of three layers, taught by one of its own kind on a share of 1000 digits."""

    def split(seed: int, search: bool) -> Split:
        train = subset(digits.data("train"), range(TAUGHT))
        labels = labels_of(train)
        flipped = torch.rand(TAUGHT, generator=seeds.generator(seed, "wrong")) < wrong
        shift = torch.randint(1, 10, (TAUGHT,), generator=seeds.generator(seed, "shift"))
        test = digits.data("validation" if search else "test")
        noisy = TensorData(train.inputs, torch.where(flipped, (labels + shift) % 10, labels))
        return Split(train=noisy, test=test, notes={"flipped": flipped})

    settings: dict[str, Any] = {"steps": 300, "scheduler": one_cycle, "target": 10.0, "measures": MEASURES, **changes}
    settings |= {"teacher": learned, "judge": judge, "order": SHOWN}
    return Task(name=name, text=text, split=split, build=lambda: mlp(64, 64), **settings)
