"""Knowledge concentration in the arena `distill`."""

from retouch.arenas.contest import Claim, Entry
from retouch.arenas.distill import Replica, Solution
from retouch.arenas.distill.tasks.verticals import NAME, student


def solve(replica: Replica, *, kind: str = "fc-sc", scale: bool = True, top_k: int = 100) -> Solution:
    """A student with either head learns the specialists' top K, perhaps with learned lengths of its logits."""
    return student(replica, kind, taught=True, scale=scale, top_k=top_k)


def _claim(text: str, other: str, *, measure: str = "error", relation: str = "at most", factor: float = 1.0) -> Claim:
    source = "section 4"
    return Claim(text=text, problem=NAME, measure=measure, other=other, relation=relation, factor=factor, source=source)


ENTRY = Entry(
    name="knowledge_concentration",
    title="Knowledge concentration",
    solve=solve,
    settings={"": {"kind": "fc-fc", "scale": False, "top_k": 100}},
    grid={"kind": ("fc-fc", "fc-sc", "sc-sc"), "scale": (False, True), "top_k": (10, 100)},
    problems=(NAME,),
    note="the search chose a dense head without learned lengths; the paper's own choice is FC-SC, distilled, paced",
    weakness=(
        "Verticals share colours and styles, which a dense head learns from all of them and a grouped one from each; "
        "and learned lengths have 400 steps to grow in, not millions."
    ),
    claims=(
        _claim("One student of several specialists beats the generalist baseline.", "plain"),
        _claim("It does so over all classes and images too.", "plain", measure="error_all"),
        _claim("An FC-SC head is better than a dense one, both distilled.", "fcsc_d", relation="at least"),
        _claim("An FC-SC head with learned lengths is better still.", "fcsc_ds", relation="at least"),
        _claim("Learned lengths speed up the beginning.", "fcsc_ds", measure="early", relation="at least"),
        _claim("The specialists together stay better.", "teacher", relation="at least"),
        _claim("The student has less than half of their weights.", "teacher", measure="parameters", factor=0.5),
    ),
)
