"""SSD in the arena `forget`."""

from torch import nn

from retouch.arenas.contest import Claim, Entry
from retouch.arenas.forget import Replica
from retouch.forget.ssd import ssd


def solve(replica: Replica, *, alpha: float, lam: float = 1.0) -> nn.Module:
    """Per-sample importances; nothing is random."""
    return ssd(replica.model, replica.forget, replica.retain, alpha=alpha, lam=lam)


ENTRY = Entry(
    name="ssd",
    title="SSD",
    solve=solve,
    settings={"class": {"alpha": 3.0}, "subset": {"alpha": 5.0}, "subpopulation": {"alpha": 7.0}},
    grid={"alpha": (1.5, 2.0, 3.0, 4.0, 5.0, 7.0), "lam": (0.1, 1.0)},
    note="importances of single samples",
    claims=(
        Claim(
            text="SSD forgets a class: within 5 points of the oracle's forget accuracy.",
            problem="class",
            measure="forget",
            other="retrain",
            relation="within",
            margin=5.0,
        ),
        Claim(
            text="SSD keeps the remaining classes: within 3 points of the oracle's test accuracy.",
            problem="class",
            measure="test",
            other="retrain",
            relation="within",
            margin=3.0,
        ),
        Claim(
            text="SSD costs at most a fifth of retraining.",
            problem="class",
            measure="seconds",
            other="retrain",
            relation="at most",
            factor=0.2,
            source="section 5: two passes of gradients",
        ),
        Claim(
            text="SSD leaves accuracy on random forget samples near the oracle's, within 5 points.",
            problem="subset",
            measure="forget",
            other="retrain",
            relation="within",
            margin=5.0,
            source="random forgetting, section 5",
        ),
    ),
)
