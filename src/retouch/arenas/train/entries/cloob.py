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
    settings={"": {"inv_tau": 14.3, "beta": 30.0}},
    grid={"inv_tau": (14.3, 30.0), "beta": (8.0, 14.3, 30.0)},
    problems=("captions",),
    weakness="The paper trains on millions of pairs, where InfoLOOB alone overfits; 2000 clean ones let it not.",
    claims=(
        Claim(
            text="CLOOB uses more directions of the embedding than InfoNCE: a higher effective rank.",
            problem="captions",
            measure="rank",
            other="plain",
            relation="at least",
            source="analysis of the covariance",
        ),
        Claim(
            text="CLOOB knows at least as much of the shape, the attribute that a contrast can do without.",
            problem="captions",
            measure="shape",
            other="plain",
            relation="at least",
        ),
        Claim(
            text="CLOOB is at least as good as InfoNCE in zero-shot classification.",
            problem="captions",
            measure="error",
            other="plain",
            relation="at most",
            source="zero-shot transfer",
        ),
        Claim(
            text="It is better than InfoLOOB alone,",
            problem="captions",
            measure="error",
            other="infoloob",
            relation="at most",
            source="ablation",
        ),
        Claim(
            text="and than Hopfield with InfoNCE.",
            problem="captions",
            measure="error",
            other="hopfield_infonce",
            relation="at most",
            source="ablation",
        ),
    ),
)
