"""OFA-KD in the arena `distill`."""

from retouch.arenas.contest import Claim, Entry
from retouch.arenas.distill import Replica, Solution
from retouch.arenas.distill.tasks.families import NAME, beside, through_exits


def solve(
    replica: Replica, *, gamma: float = 1.5, temperature: float = 1.0, w_gt: float = 1.0, w_ofa: float = 1.0
) -> Solution:
    """Cross entropy, and imitation by the student and by an exit in each of its stages."""
    own = beside(replica, replica.teacher) if replica.task.name == NAME else lambda model: {}
    settings = {"gamma": gamma, "temperature": temperature, "w_gt": w_gt, "w_ofa": w_ofa}
    return through_exits(replica, replica.teacher, own=own, **settings)


ENTRY = Entry(
    name="ofa",
    title="OFA-KD",
    solve=solve,
    grid={"gamma": (1.0, 1.25, 1.5), "temperature": (1.0, 4.0), "w_ofa": (0.1, 1.0)},
    problems=("digits", "cnn_vit", "vit_mlp", "few", "noisy", NAME),
    weakness="Branches of stages are made for images of many stages; on 16 patches there is little to branch off.",
    claims=tuple(
        Claim(
            text=f"Where architectures differ, OFA-KD beats {title}.",
            problem=problem,
            measure="error",
            other=other,
            relation="at most",
            source="tables 1 to 3",
        )
        for problem in ("cnn_vit", "vit_mlp")
        for other, title in (("plain", "the student alone"), ("kd", "KD"), ("hints", "hints"))
    ),
)
