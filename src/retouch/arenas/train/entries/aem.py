"""AEM in the arena `train`."""

from retouch.arenas.contest import Claim, Entry
from retouch.arenas.train import Replica, Solution
from retouch.arenas.train.tasks.bags import PROBLEMS
from retouch.train.aem import AEM


def solve(replica: Replica, *, weight: float = 0.1) -> Solution:
    """The objective."""
    return replica.train(objective=AEM(weight))


ENTRY = Entry(
    name="aem",
    title="AEM",
    solve=solve,
    settings={"": {"weight": 0.2}},
    grid={"weight": (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)},
    problems=PROBLEMS,
    weakness="In one replica of ten or so, 30 bags do not tell which digit matters; entropy does not mend that.",
    claims=(
        Claim(
            text="AEM raises the AUC by at least 0.8 points.",
            problem="bags",
            measure="auc",
            other="plain",
            relation="at least",
            margin=0.8,
            source="main results",
        ),
        Claim(
            text="AEM lowers the error.",
            problem="bags",
            measure="error",
            other="plain",
            relation="at most",
            source="main results",
        ),
        Claim(
            text="AEM beats mean pooling, which has the most entropy, by at least 5 points of AUC.",
            problem="bags",
            measure="auc",
            other="mean_pooling",
            relation="at least",
            margin=5.0,
        ),
        Claim(
            text="Entropy rises with lambda: at 0.2 it is above that at 0.05,",
            problem="bags",
            measure="entropy",
            other="aem_0.05",
            relation="at least",
        ),
        Claim(
            text="and below that at 1.",
            problem="bags",
            measure="entropy",
            other="aem_1",
            relation="at most",
        ),
        Claim(
            text="Too much entropy costs AUC again: at lambda 1 it is at least 0.5 points lower.",
            problem="bags",
            measure="auc",
            other="aem_1",
            relation="at least",
            margin=0.5,
        ),
        Claim(
            text="Attention finds more of the key instances.",
            problem="bags",
            measure="recovery",
            other="plain",
            relation="at least",
        ),
        Claim(
            text="With four times the bags the gain in AUC is below 0.8 points.",
            problem="more_bags",
            measure="auc",
            other="plain",
            relation="at most",
            margin=0.8,
        ),
    ),
)
