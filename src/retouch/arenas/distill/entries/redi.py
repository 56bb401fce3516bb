"""REDI in the arena `distill`."""

from retouch.arenas.contest import Claim, Entry
from retouch.arenas.distill import Replica, Solution
from retouch.arenas.distill.tasks.traces import LOW, NAME, RATES, second
from retouch.distill.redi import REDI


def solve(replica: Replica, *, alpha: float = 0.8, rate: float = LOW) -> Solution:
    """Stage 2: right traces up, wrong ones down at a lower weight."""
    return second(replica, REDI(alpha=alpha), rate=rate)


def _claim(text: str, other: str, measure: str = "error") -> Claim:
    return Claim(text=text, problem=NAME, measure=measure, other=other, relation="at most", source="main results")


ENTRY = Entry(
    name="redi",
    title="REDI",
    solve=solve,
    grid={"alpha": (0.5, 0.8), "rate": RATES},
    problems=(NAME,),
    note="alpha 0.8, low rate",
    weakness=(
        "Right traces teach precedence too, at a higher learning rate than wrong ones bear; and what a model of 112 "
        "thousand weights unlearns, its neighbours lose too."
    ),
    claims=(
        _claim("Stage 2 makes fewer errors than stage 1.", "teacher"),
        _claim("REDI makes fewer errors than more SFT on positives.", "positives"),
        _claim("It makes fewer where the solver's own mistake can be made.", "positives", "misled"),
        _claim("REDI makes fewer errors than the symmetric loss.", "symmetric_low"),
        _claim("REDI makes fewer errors than DPO.", "dpo"),
        _claim("REDI makes fewer errors than SimPO.", "simpo"),
    ),
)
