"""PCoreSet in the arena `distill`."""

from retouch.arenas.contest import Claim, Entry
from retouch.arenas.distill import Replica, Solution
from retouch.arenas.distill.tasks.active import NAME, rounds


def solve(replica: Replica, *, alpha: float = 0.5, temperature: float = 2.0) -> Solution:
    """Cover the student's predictions."""
    return rounds(replica, "pcoreset", alpha=alpha, temperature=temperature)


def _claim(text: str, other: str, *, measure: str = "area", relation: str = "at most") -> Claim:
    return Claim(text=text, problem=NAME, measure=measure, other=other, relation=relation, source="section 4")


ENTRY = Entry(
    name="pcoreset",
    title="PCoreSet",
    solve=solve,
    problems=(NAME,),
    note="settings are the paper's: in active learning there is no data to choose them on",
    weakness="Ten classes and sixty labels: some dozen labels of the two blind classes decide, whoever finds them.",
    claims=(
        *(
            _claim(f"PCoreSet beats {title} over all rounds.", f"query_{other}")
            for other, title in (
                ("random", "random choice"),
                ("entropy", "the most uncertain samples"),
                ("coreset", "a core-set of features"),
                ("badge", "BADGE"),
                ("balanced", "class-balanced choice"),
            )
        ),
        _claim(
            "It asks for more of the classes that the teacher never says.",
            "query_random",
            measure="blind",
            relation="at least",
        ),
        *(
            _claim(f"It leaves the predictions better covered than {title}.", other, measure="radius")
            for other, title in (("query_random", "random choice"), ("query_coreset", "the features' core-set"))
        ),
        _claim("A teacher and a choice beat as many random labels alone.", "plain", measure="error"),
        _claim("The student beats its teacher in the end.", "teacher", measure="error"),
    ),
)
