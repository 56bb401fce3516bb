"""SinKD in the arena `distill`."""

from retouch.arenas.contest import Claim, Entry
from retouch.arenas.distill import Replica, Solution
from retouch.distill.sinkd import SinKD


def solve(replica: Replica, *, alpha: float = 0.9, beta: float = 0.8) -> Solution:
    """Cross entropy, KL at temperature 4 and the mean transport cost."""
    return replica.train(objective=SinKD(replica.teacher, alpha=alpha, beta=beta, kd_temperature=4.0))


TASKS = ("digits", "cnn_vit", "vit_mlp", "few", "noisy")

ENTRY = Entry(
    name="sinkd",
    title="SinKD",
    solve=solve,
    grid={"alpha": (0.5, 0.8, 0.9), "beta": (0.2, 0.8, 2.0)},
    problems=TASKS,
    weakness="The paper's gains are tenths of a point on pre-trained language models; its pilot on digits was a tie.",
    claims=tuple(
        Claim(
            text=f"SinKD beats {title}.",
            problem="digits",
            measure="error",
            other=other,
            relation="at most",
            source="table 1",
        )
        for other, title in (("plain", "the student alone"), ("kd", "KL"), ("reverse_kl", "reverse KL"), ("js", "JS"))
    ),
)
