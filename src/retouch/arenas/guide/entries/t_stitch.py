"""T-Stitch in the arena `guide`."""

from retouch.arenas.contest import Claim, Entry
from retouch.arenas.guide import Outcome, Replica
from retouch.arenas.guide.tasks.two_models import NAME, stitched


def solve(replica: Replica, *, ratio: float = 0.4) -> Outcome:
    """The small model makes the noisiest share of the steps."""
    return stitched(replica, ratio)


def _claim(text: str, measure: str, other: str, margin: float = 0.0, factor: float = 1.0) -> Claim:
    return Claim(
        text=text,
        problem=NAME,
        measure=measure,
        other=other,
        relation="at most",
        margin=margin,
        factor=factor,
        source="figures 1 and 5",
    )


ENTRY = Entry(
    name="t_stitch",
    title="T-Stitch, 40%",
    solve=solve,
    grid={"ratio": (0.2, 0.4, 0.6)},
    problems=(NAME,),
    note="the paper's ratio",
    weakness="At high noise points have a closed form that any network finds; of images it is their layout.",
    claims=(
        _claim("Up to 40% of the steps cost no quality, within a point of samples outside.", "outside", "large", 1.0),
        _claim("Its samples stay nearer to the large model's than with the large one first.", "apart", "large_first"),
        _claim("They stay nearer than with fewer steps of the large one at equal cost.", "apart", "fewer_steps"),
        _claim("It saves in proportion: at most 65% of the cost.", "cost", "large", factor=0.65),
    ),
)
