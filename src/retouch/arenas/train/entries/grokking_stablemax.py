"""StableMax in the arena `train`."""

from retouch.arenas.contest import Claim, Entry
from retouch.arenas.train import Replica, Solution
from retouch.train.grokking import stablemax_loss


def solve(replica: Replica) -> Solution:
    """Another loss."""
    return replica.train(objective=stablemax_loss)


ENTRY = Entry(
    name="grokking_stablemax",
    title="StableMax",
    solve=solve,
    problems=("digits", "modular"),
    weakness="The paper trains for 80 000 steps until StableMax alone generalises; here are 400.",
    claims=(
        Claim(
            text="StableMax alone generalises without weight decay: its test error is at least 50 points lower.",
            problem="modular",
            measure="error",
            other="plain",
            relation="at most",
            margin=-50.0,
            source="abstract; after 80 000 steps",
        ),
    ),
)
