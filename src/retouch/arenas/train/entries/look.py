"""LOOK in the arena `train`."""

from retouch.arenas.contest import Claim, Entry
from retouch.arenas.train import Replica, Solution
from retouch.arenas.train.tasks import transfer
from retouch.train.look import LOOK


def solve(replica: Replica, *, k: int, dim: int | None, temperature: float = 0.1) -> Solution:
    """The encoder by LOOK, then the head on frozen features."""
    return transfer.pretrain(replica, LOOK, dim=dim, k=int(k), temperature=temperature)


ENTRY = Entry(
    name="look",
    title="LOOK",
    solve=solve,
    settings={"": {"k": 20, "dim": None}},
    grid={"k": (5, 20, 50), "dim": (None, 128)},
    problems=("digits", "transfer"),
    note="as specified here, see its page; without a projection; on `digits` the labels at hand are the task",
    weakness="The published equations could not be compared; the sets are small and the images simple.",
    claims=(
        Claim(
            text="LOOK beats cross entropy on the digits by more than 10 points, in a linear probe.",
            problem="transfer",
            measure="error",
            other="plain",
            relation="at most",
            margin=-10.0,
        ),
        Claim(
            text="LOOK beats cross entropy on the digits by more than 4 points, by neighbours.",
            problem="transfer",
            measure="neighbours",
            other="plain",
            relation="at most",
            margin=-4.0,
        ),
        *(
            Claim(
                text="LOOK beats supervised contrastive learning on the features by more than 8 points.",
                problem="transfer",
                measure=measure,
                other="contrastive_direct",
                relation="at most",
                margin=-8.0,
            )
            for measure in ("error", "neighbours")
        ),
        *(
            Claim(
                text="LOOK transfers better than supervised contrastive learning with a projection.",
                problem="transfer",
                measure=measure,
                other="contrastive",
                relation="at most",
                source="the paper's tables of downstream tasks",
            )
            for measure in ("error", "neighbours")
        ),
        Claim(
            text="LOOK loses at most 1 point on the labels that it was trained on.",
            problem="transfer",
            measure="upstream",
            other="plain",
            relation="at most",
            margin=1.0,
        ),
    ),
)
