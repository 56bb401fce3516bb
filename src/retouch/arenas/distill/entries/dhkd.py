"""DHKD in the arena `distill`."""

from retouch.arenas.contest import Claim, Entry
from retouch.arenas.distill import Replica, Solution
from retouch.arenas.distill.tasks._heads import ALPHA, TASKS, dual


def solve(replica: Replica, *, alpha: float = 0.1, temperature: float = 2.0) -> Solution:
    """Labels on the student's head, the teacher's logits on a linear one beside it."""
    return dual(replica, alpha=alpha, temperature=temperature)


def _claims(task: str) -> tuple[Claim, ...]:
    others = {
        "plain": "labels alone, though its head never sees the teacher",
        "one_head": "both losses on one head",
        "kd": "KL",
    }
    return tuple(
        Claim(
            text=f"DHKD beats {text}.",
            problem=task,
            measure="error",
            other=other,
            relation="at most",
            source="tables 1 and 2",
        )
        for other, text in others.items()
    )


ENTRY = Entry(
    name="dhkd",
    title="DHKD",
    solve=solve,
    settings={name: {"alpha": alpha} for name, alpha in ALPHA.items()},
    grid={"alpha": (0.03, 0.1, 0.3, 1.0), "temperature": (1.0, 2.0, 4.0)},
    problems=("digits", "cnn_vit", "vit_mlp", "few", "noisy", *TASKS),
    note="linear second head, gradients not aligned",
    weakness="One head for both losses does not collapse here, so a second head has nothing to repair, and the "
    "main head learns from the teacher through the features alone.",
    claims=tuple(claim for name in TASKS for claim in _claims(name)),
)
