"""PerpGrad with StableMax in the arena `train`."""

from retouch.arenas.contest import Claim, Entry
from retouch.arenas.train import Replica, Solution
from retouch.train.grokking import ProjectGradients, stablemax_loss


def solve(replica: Replica) -> Solution:
    """A callback on gradients, and another loss."""
    return replica.train(objective=stablemax_loss, callbacks=[ProjectGradients()])


ENTRY = Entry(
    name="grokking_both",
    title="PerpGrad and StableMax",
    solve=solve,
    problems=("modular",),
    claims=(
        Claim(
            text="With StableMax, too, PerpGrad's test error is at least 50 points lower than AdamW's alone.",
            problem="modular",
            measure="error",
            other="plain",
            relation="at most",
            margin=-50.0,
        ),
    ),
)
