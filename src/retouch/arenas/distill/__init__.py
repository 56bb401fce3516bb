"""Which way of teaching makes the best student of the same size, on the same data and budget?

Each file of the folder `tasks` is a problem, each of `entries` a contestant; how they are run is in `arenas.training`.
"""

from typing import Any

from retouch.arenas.training import (
    Replica,
    Solution,
    Split,
    Task,
    TrainProblem,
    classification_error,
    classification_measures,
)

__all__ = [
    "ARENA",
    "Replica",
    "Solution",
    "Split",
    "Task",
    "TrainProblem",
    "classification_error",
    "classification_measures",
]


def __getattr__(name: str) -> Any:
    """`ARENA`, made when it is first asked for: tasks and entries import this module."""
    if name != "ARENA":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from retouch.arenas.training import training_arena

    question = "Which way of teaching makes the best student of the same size, on the same data and budget?"
    globals()["ARENA"] = training_arena("distill", question)
    return globals()["ARENA"]
