"""PALBERT in the arena `train`."""

from typing import Any

from retouch.arenas.contest import Claim, Entry
from retouch.arenas.train import Replica, Solution
from retouch.arenas.train.tasks import depth


def solve(replica: Replica, *, threshold: float = 0.5, **settings: Any) -> Solution:
    """Trained with all layers, stopped by Q-exit."""
    return depth.stopped(replica, lambda model: depth.Exits(model, depth.by_q(threshold)), **settings)


def claim(text: str, measure: str, other: str, relation: str, **rest: Any) -> Claim:
    """A claim about this task."""
    return Claim(text=text, problem="depth", measure=measure, other=other, relation=relation, **rest)


ENTRY = Entry(
    name="palbert",
    title="PALBERT, q = 0.5",
    solve=solve,
    settings={"": {"threshold": 0.5, "beta": 0.05, "lambda_p": 0.2}},
    grid={"beta": (0.02, 0.05, 0.1), "lambda_p": (0.1, 0.2, 0.3)},
    problems=("depth",),
    note="What is left of the exit probability goes to the last layer: without that, not to stop costs no task loss, "
    "and a network trained from scratch learns never to stop, see the entry beside it. The paper starts from "
    "pretrained weights.",
    weakness="Layers that share one head share their capacity with it: plain training need only be right at the end.",
    claims=(
        claim("Q-exit gives the same answers every time.", "spread", "sampled_exit", "at most", factor=0.0),
        claim(
            "Q-exit is at least as accurate as sampled exits of the same weights (within 0.5 points).",
            "error",
            "sampled_exit",
            "at most",
            margin=0.5,
            source="table 3",
        ),
        claim("q = 0.5 uses at least the layers that q = 0.3 uses.", "layers", "q_exit_30", "at least"),
        claim("q = 0.5 uses at most the layers that q = 0.7 uses.", "layers", "q_exit_70", "at most"),
        claim(
            "Harder sequences use more layers (a correlation of at least 0.1).",
            "relation",
            "sampled_exit",
            "at least",
            factor=0.0,
            margin=0.1,
        ),
        claim("Q-exit is at least as accurate as patience.", "error", "patience", "at most", source="table 1"),
        claim(
            "It is within a point of training and running all layers.",
            "error",
            "plain",
            "at most",
            margin=1.0,
            source="table 1",
        ),
        claim(
            "It uses at most two thirds of the layers.", "layers", "plain", "at most", factor=2 / 3, source="figure 3"
        ),
        claim(
            "The exit head on two states is at least as accurate as a linear one on one state.",
            "error",
            "linear_exit_head",
            "at most",
            source="table 4",
        ),
    ),
)
