"""CLOOB in the arena `train`."""

from retouch.arenas.contest import Claim, Entry
from retouch.arenas.train import Replica, Solution
from retouch.train.cloob import CLOOB


def solve(replica: Replica, *, inv_tau: float = 30.0, beta: float = 8.0) -> Solution:
    """The objective."""
    return replica.train(objective=CLOOB(inv_tau=inv_tau, beta=beta))


ENTRY = Entry(
    name="cloob",
    title="CLOOB",
    solve=solve,
    settings={"": {"inv_tau": 14.3, "beta": 14.3}},
    grid={"inv_tau": (14.3, 30.0), "beta": (8.0, 14.3, 30.0)},
    problems=("captions",),
    weakness="Two thousand procedural scenes and small towers: contrasts are easy, and all losses learn them.",
    claims=(
        Claim(
            text="CLOOB uses more directions of the embedding than InfoNCE: a higher effective rank.",
            problem="captions",
            measure="rank",
            other="plain",
            relation="at least",
            source="section 5",
        ),
        Claim(
            text="CLOOB is at least as good as InfoNCE in zero-shot classification.",
            problem="captions",
            measure="error",
            other="plain",
            relation="at most",
            source="table 1",
        ),
        Claim(
            text="It is better than InfoLOOB alone.",
            problem="captions",
            measure="error",
            other="infoloob",
            relation="at most",
            source="ablation",
        ),
    ),
)
