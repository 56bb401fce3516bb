"""SalUn in the arena `forget`."""

from torch import nn

from retouch.arenas.contest import Claim, Entry
from retouch.arenas.forget import Replica
from retouch.forget.salun import salun


def solve(replica: Replica, *, lr: float, epochs: int) -> nn.Module:
    """The paper's ratio of one half."""
    parts = replica.model, replica.forget, replica.retain
    return salun(*parts, ratio=0.5, epochs=epochs, lr=lr, batch_size=64, seed=replica.seed)


ENTRY = Entry(
    name="salun",
    title="SalUn",
    solve=solve,
    settings={
        "class": {"lr": 0.01, "epochs": 4},
        "subset": {"lr": 0.03, "epochs": 4},
        "subpopulation": {"lr": 0.003, "epochs": 2},
    },
    grid={"lr": (0.001, 0.003, 0.01, 0.03), "epochs": (2, 4, 8)},
    claims=(
        Claim(
            text="SalUn forgets a class: within 5 points of the oracle's forget accuracy.",
            problem="class",
            measure="forget",
            other="retrain",
            relation="within",
            margin=5.0,
        ),
        Claim(
            text="SalUn keeps the remaining classes: within 3 points of the oracle's test accuracy.",
            problem="class",
            measure="test",
            other="retrain",
            relation="within",
            margin=3.0,
        ),
        Claim(
            text="SalUn costs at most a fifth of retraining.",
            problem="class",
            measure="seconds",
            other="retrain",
            relation="at most",
            factor=0.2,
        ),
        Claim(
            text="SalUn's mask brings it no further from the oracle than random labels without it.",
            problem="subset",
            measure="gap",
            other="random_labels",
            relation="at most",
            margin=0.0,
            source="table 1: smallest average gap",
        ),
        Claim(
            text="SalUn is nearer to the oracle than fine-tuning on the rest.",
            problem="subset",
            measure="gap",
            other="fine_tune",
            relation="at most",
            margin=0.0,
            source="table 1",
        ),
    ),
)
