"""RS2 in the arena `train`."""

from torch.utils.data import DataLoader

from retouch.arenas.contest import Claim, Entry
from retouch.arenas.train import Replica, Solution
from retouch.arenas.train.tasks.rounds import FRACTION
from retouch.train.rs2 import RepeatedRandomSampler


def solve(replica: Replica, *, replacement: bool = False) -> Solution:
    """A fresh tenth of the data every round; the budget of steps is that of all others."""
    data = replica.split.train
    sampler = RepeatedRandomSampler(len(data), FRACTION, replacement=replacement, seed=replica.seed)
    return replica.train(data=DataLoader(data, replica.task.batch_size, sampler=sampler))


ENTRY = Entry(
    name="rs2",
    title="RS2",
    solve=solve,
    problems=("rounds",),
    note="without replacement; plain training sees all data in shuffled order for as many steps",
    claims=(
        Claim(
            text="RS2 beats a static random subset by at least 3 points.",
            problem="rounds",
            measure="error",
            other="static_subset",
            relation="at most",
            margin=-3.0,
            source="figure 1",
        ),
        Claim(
            text="RS2 is at least as good as the subset that herding chooses.",
            problem="rounds",
            measure="error",
            other="herding",
            relation="at most",
            source="table 1",
        ),
        Claim(
            text="RS2 is at least as good as the subset of largest losses.",
            problem="rounds",
            measure="error",
            other="hardest",
            relation="at most",
            source="table 1",
        ),
        Claim(
            text="At equal steps RS2 ties with ordinary shuffled training on all data, within half a point.",
            problem="rounds",
            measure="error",
            other="plain",
            relation="within",
            margin=0.5,
        ),
    ),
)
