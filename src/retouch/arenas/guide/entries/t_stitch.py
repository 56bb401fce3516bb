"""T-Stitch in the arena `guide`."""

from typing import Any

from retouch.arenas.contest import Claim, Entry
from retouch.arenas.guide import Outcome, Replica
from retouch.arenas.guide.tasks import stitched, two_models

SOLVE = {two_models.NAME: two_models.stitched, stitched.NAME: stitched.stitched}


def solve(replica: Replica, *, ratio: float = 0.4) -> Outcome:
    """The small model makes the noisiest share of the steps."""
    return SOLVE[replica.problem.name](replica, ratio)


def _claim(problem: str, text: str, measure: str, other: str, **more: Any) -> Claim:
    settings: Any = {"relation": "at most", "source": "figures 1 and 5", **more}
    return Claim(text=text, problem=problem, measure=measure, other=other, **settings)


POINTS = (
    _claim(
        two_models.NAME,
        "Up to 40% of the steps cost no quality, within a point of samples outside.",
        "outside",
        "large",
        margin=1.0,
    ),
    _claim(
        two_models.NAME,
        "Its samples stay nearer to the large model's than with the large one first.",
        "apart",
        "large_first",
    ),
    _claim(
        two_models.NAME,
        "They stay nearer than with fewer steps of the large one at equal cost.",
        "apart",
        "fewer_steps",
    ),
    _claim(two_models.NAME, "It saves in proportion: at most 65% of the cost.", "cost", "large", factor=0.65),
)
SHAPES = (
    _claim(
        stitched.NAME,
        "The small model's 40% of the steps keep quality: as many images right, but for a point.",
        "right",
        "dit_large",
        relation="at least",
        margin=-1.0,
    ),
    _claim(
        stitched.NAME,
        "More images are right than with the large model first.",
        "right",
        "dit_large_first",
        relation="at least",
    ),
    _claim(stitched.NAME, "It saves work in proportion: at most 70% of it.", "cost", "dit_large", factor=0.7),
    _claim(stitched.NAME, "And time with it: at most 75%, decoder included.", "sampling", "dit_large", factor=0.75),
)


ENTRY = Entry(
    name="t_stitch",
    title="T-Stitch, 40%",
    solve=solve,
    grid={"ratio": (0.2, 0.4, 0.6)},
    problems=(two_models.NAME, stitched.NAME),
    note="the paper's ratio",
    weakness=(
        "Of points a network finds what is left at high noise whatever its size. Of images it is their layout, and a "
        "small model of few layers may place the thing or choose its colour worse."
    ),
    claims=(*POINTS, *SHAPES),
)
