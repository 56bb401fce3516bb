"""Mamba PKD in the arena `distill`."""

from typing import Any

from retouch.arenas.contest import Claim, Entry
from retouch.arenas.distill import Replica, Solution
from retouch.arenas.distill.tasks.weak_learners import NAME, group


def solve(replica: Replica, *, alpha: float = 0.5, temperature: float = 4.0) -> Solution:
    """Four students of falling size, each on what the sum of those before it has left."""
    return group(replica, alpha=alpha, temperature=temperature)


def _claim(text: str, other: str, source: str, *, measure: str = "error", **more: Any) -> Claim:
    return Claim(text=text, problem=NAME, measure=measure, other=other, relation="at most", source=source, **more)


ENTRY = Entry(
    name="mamba_pkd",
    title="Mamba PKD",
    solve=solve,
    settings={"": {"alpha": 0.5, "temperature": 2.0}},
    grid={"alpha": (0.1, 0.5, 0.9), "temperature": (1.0, 2.0, 4.0)},
    problems=(NAME,),
    note="residual mode, a reading of ours: the paper has no code and does not state its rule",
    weakness=(
        "Students of 200 steps each, not trained to the end; and one that fits what others left is not meant to be "
        "used alone."
    ),
    claims=(
        _claim(
            "The weakest alone is right on 72% of the samples.",
            "teacher",
            "MNIST",
            measure="last",
            factor=0.0,
            margin=28.0,
        ),
        _claim("It takes at most 1% of the operations.", "teacher", "MNIST", measure="last_flops", factor=0.01),
        _claim("Students that work on what is left beat independent ones.", "independent", "progressive training"),
        _claim("Soft targets help.", "pkd_hard", "loss"),
        _claim("The students together beat a single one of the same operations and steps.", "big_kd", "weak learners"),
    ),
)
