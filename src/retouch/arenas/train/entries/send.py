"""SenD in the arena `train`."""

from retouch.arenas.contest import Claim, Entry
from retouch.arenas.train import Replica, Solution
from retouch.arenas.train.tasks.facts import train


def solve(replica: Replica, *, fraction: float = 0.2) -> Solution:
    """The most sensitive indices are dropped for three epochs after every three."""
    return train(replica, fraction=fraction)


ENTRY = Entry(
    name="send",
    title="SenD",
    solve=solve,
    settings={"": {"fraction": 0.2}},
    grid={"fraction": (0.1, 0.2, 0.3)},
    problems=("facts",),
    note="windows of 3 epochs",
    weakness="The paper's models have 70 million to 12 billion weights; here is one of 200 thousand and twelve epochs.",
    claims=(
        Claim(
            text="SenD's answers waver less from epoch to epoch than without dropping.",
            problem="facts",
            measure="wavering",
            other="normal",
            relation="at most",
            source="figure 4",
        ),
        Claim(
            text="SenD lowers the EigenScore more than dropping random indices.",
            problem="facts",
            measure="eigenscore",
            other="random_indices",
            relation="at most",
            source="figure 3",
        ),
        Claim(
            text="SenD does not make the answers wrong: within 5 points of training without it.",
            problem="facts",
            measure="error",
            other="normal",
            relation="at most",
            margin=5.0,
            source="table 1",
        ),
    ),
)
