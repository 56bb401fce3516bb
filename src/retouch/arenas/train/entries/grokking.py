"""PerpGrad in the arena `train`."""

from retouch.arenas.contest import Claim, Entry
from retouch.arenas.train import Replica, Solution
from retouch.train.grokking import ProjectGradients


def solve(replica: Replica, *, rescale: bool = True) -> Solution:
    """A callback on gradients, with the task's own optimizer and loss."""
    return replica.train(callbacks=[ProjectGradients(rescale=rescale)])


ENTRY = Entry(
    name="grokking",
    title="PerpGrad",
    solve=solve,
    settings={"": {"rescale": True}},
    grid={"rescale": (True, False)},
    problems=("digits", "modular"),
    weakness="On digits, weights have to grow to fit within 400 steps, and there is nothing hidden to find after that.",
    claims=(
        Claim(
            text="PerpGrad has found the rule after 400 steps: its test error is below 20%.",
            problem="modular",
            measure="error",
            other="plain",
            relation="at most",
            factor=0.0,
            margin=20.0,
        ),
        Claim(
            text="AdamW alone has not: PerpGrad's test error is at least 70 points lower.",
            problem="modular",
            measure="error",
            other="plain",
            relation="at most",
            margin=-70.0,
        ),
        Claim(
            text="Weight decay, chosen well, takes longer: PerpGrad's test error is at least 20 points lower by then.",
            problem="modular",
            measure="error",
            other="weight_decay",
            relation="at most",
            margin=-20.0,
        ),
        Claim(
            text="With ordinary cross entropy PerpGrad is no slower than with StableMax.",
            problem="modular",
            measure="steps",
            other="grokking_both",
            relation="at most",
            source="an issue of the authors' repository",
        ),
    ),
)
