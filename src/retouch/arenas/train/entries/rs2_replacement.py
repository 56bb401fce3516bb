"""RS2 with replacement in the arena `train`."""

from retouch.arenas.contest import Claim, Entry
from retouch.arenas.train import Replica, Solution
from retouch.arenas.train.entries.rs2 import solve as rs2


def solve(replica: Replica) -> Solution:
    """Every round is drawn from all data."""
    return rs2(replica, replacement=True)


ENTRY = Entry(
    name="rs2_replacement",
    title="RS2, with replacement",
    solve=solve,
    problems=("rounds",),
    claims=(
        Claim(
            text="RS2 with replacement is no better than without, within half a point.",
            problem="rounds",
            measure="error",
            other="rs2",
            relation="at least",
            margin=-0.5,
            source="section 5",
        ),
    ),
)
