"""Distillation on pruned data in the arena `distill`."""

from typing import Any

from retouch.arenas.contest import Claim, Entry
from retouch.arenas.distill import Replica, Solution
from retouch.arenas.distill.tasks._pruned import CLEAN, RATES, TASKS, pruned


def solve(replica: Replica, *, temperature: float = 4.0, alpha: Any = "auto") -> Solution:
    """A random share of every class, and the weight of the teacher by the share."""
    return pruned(replica, temperature=temperature, alpha=alpha)


def _claim(task: str, text: str, measure: str, other: str) -> Claim:
    return Claim(text=text, problem=task, measure=measure, other=other, relation="at most", source="section 4")


ENTRY = Entry(
    name="pruned_data",
    title="random share with a teacher",
    solve=solve,
    grid={"temperature": (1.0, 2.0, 4.0, 8.0), "alpha": ("auto", 0.9)},
    problems=TASKS,
    note="alpha 0.9 at 3 and 10%, 0.77 at 30%, 0.63 at 50%; as many steps at every share, unlike at equal epochs",
    weakness="Digits are few and easy: at half of them little is left to gain, and the best weight hardly moves.",
    claims=(
        *(
            _claim(task, f"On a random {rate:.0%} it beats labels alone on the same samples.", name, "labels")
            for task in TASKS
            for name, rate in RATES.items()
        ),
        *(
            _claim(task, f"A random {rate:.0%} is at least as good as the hardest {rate:.0%}.", name, "hardest_kd")
            for task in TASKS
            for name, rate in RATES.items()
        ),
        *(
            _claim(task, "A random half with a teacher beats all of the data with labels alone.", "error_50", "plain")
            for task in TASKS
        ),
        *(
            _claim(CLEAN, f"At {RATES[name]:.0%}, the weight by the share is at least as good as 0.5.", name, "half")
            for name in ("error_3", "error_10")
        ),
    ),
)
