"""Which way of steering a diffusion model keeps to what is asked for, and at what price?

Each file of the folder `tasks` is a problem, each of `entries` a contestant; how they are run is in `arenas.sampling`.
Some problems are points of `worlds.gaussians`, where everything is known exactly; the others are images of the trained
models of `worlds.shapes`, whose oracle reads them back, and digits without a condition.
"""

from typing import Any

from retouch.arenas.sampling import Outcome, Replica, Task, baseline, timed

__all__ = ["ARENA", "Outcome", "Replica", "Task", "baseline", "timed"]


def __getattr__(name: str) -> Any:
    """`ARENA`, made when it is first asked for: tasks and entries import this module."""
    if name != "ARENA":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from retouch.arenas.sampling import sampling_arena

    question = "Which way of steering a diffusion model keeps to what is asked for, and at what price?"
    globals()["ARENA"] = sampling_arena("guide", question)
    return globals()["ARENA"]
