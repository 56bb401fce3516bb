"""Multi-Sample Dropout in the arena `train`."""

from retouch.arenas.contest import Claim, Entry
from retouch.arenas.train import Replica, Solution
from retouch.train.multi_sample_dropout import convert


def solve(replica: Replica, *, samples: int = 8) -> Solution:
    """The dropout before the head is repeated."""
    return replica.train(convert(replica.build(), samples=int(samples), inplace=True))


ENTRY = Entry(
    name="multi_sample_dropout",
    title="Multi-Sample Dropout",
    solve=solve,
    settings={"": {"samples": 8}},
    grid={"samples": (2, 4, 8, 16)},
    problems=("digits", "dropout"),
    claims=(
        Claim(
            text="Multi-Sample Dropout reaches the target in fewer steps.",
            problem="dropout",
            measure="steps",
            other="plain",
            relation="at most",
            source="figure 2",
        ),
        Claim(
            text="After 40 steps, 8 samples are at least 4 points ahead of one.",
            problem="dropout",
            measure="early",
            other="plain",
            relation="at most",
            margin=-4.0,
        ),
        Claim(
            text="A step costs at most 15% more where the head is small.",
            problem="digits",
            measure="step",
            other="plain",
            factor=1.15,
            relation="at most",
            source="section 3.2",
        ),
    ),
)
