"""Teacher hacking and its remedy in the arena `distill`."""

from retouch.arenas.contest import Entry
from retouch.arenas.distill import Replica, Solution
from retouch.arenas.distill.tasks.hacking import NAME, claim, distil


def solve(replica: Replica, *, source: str = "online_teacher") -> Solution:
    """The remedy: the teacher responds anew each time a prompt is used."""
    return distil(replica, source=source)


ENTRY = Entry(
    name="teacher_hacking",
    title="online, from the teacher",
    solve=solve,
    grid={"source": ("offline", "online_teacher", "online_student", "mixed")},
    problems=(NAME,),
    note="the paper's remedy",
    weakness=(
        "At this size fixed responses over-fit, so that the proxy on held-out prompts may rise with golden; and on "
        "many seeds golden rises from the first steps on, without falling before."
    ),
    claims=(
        claim("Online data ends nearer to the oracle than offline data.", "offline", "golden", "at most", -0.02),
        claim("Online data ends nearer to the teacher than offline data.", "offline", "proxy", "at most"),
        claim("Hacking is seen in no more runs online than offline.", "offline", "hacking", "at most"),
        claim("With online data golden does not come back up as it does offline.", "offline", "rise", "at most"),
    ),
)
