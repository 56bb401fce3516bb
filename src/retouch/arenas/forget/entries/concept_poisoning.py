"""Concept poisoning in the arena `forget`, and its two parts alone: relabelling, and covering."""

from torch import nn

from retouch.arenas.contest import Claim, Entry
from retouch.arenas.forget import Replica
from retouch.forget.concept_poisoning import forget_class


def solve(replica: Replica, *, lr: float, epochs: int) -> nn.Module:
    """Only the head is trained."""
    return forget_class(replica.model, replica.forget, replica.retain, lr=lr, epochs=epochs, seed=replica.seed)


ENTRY = Entry(
    name="concept_poisoning",
    title="concept poisoning",
    solve=solve,
    problems=("class",),
    settings={"": {"lr": 0.03, "epochs": 5}},
    grid={"lr": (0.001, 0.003, 0.01, 0.03), "epochs": (5, 10)},
    note="last layer only; concepts are the classes' directions in the model's own features",
    claims=(
        Claim(
            text="Concept poisoning leaves at most 7% of the forgotten class on test samples.",
            problem="class",
            measure="test_forget",
            other="retrain",
            relation="at most",
            margin=7.0,
            source="CIFAR-10 deer: 1.7 to 6.8%",
        ),
        Claim(
            text="Concept poisoning keeps the remaining classes: within 3 points of the oracle's test accuracy.",
            problem="class",
            measure="test",
            other="retrain",
            relation="within",
            margin=3.0,
            source="96.3 to 97.1% against 96.4%",
        ),
    ),
)
