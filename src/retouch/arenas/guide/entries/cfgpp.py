"""CFG++ in the arena `guide`."""

from retouch.arenas.contest import Claim, Entry
from retouch.arenas.guide import Outcome, Replica
from retouch.arenas.guide.tasks.inversion import NAME, guided
from retouch.guide.cfgpp import cfgpp


def solve(replica: Replica, *, scale: float = 0.6) -> Outcome:
    """In place of classifier-free guidance, with its own inversion."""
    return guided(replica, cfgpp(scale))


def _claim(text: str, measure: str, margin: float = 0.0) -> Claim:
    return Claim(
        text=text,
        problem=NAME,
        measure=measure,
        other="cfg_75",
        relation="at most",
        margin=margin,
        source="sections 4.1 and 4.2",
    )


ENTRY = Entry(
    name="cfgpp",
    title="CFG++",
    solve=solve,
    grid={"scale": (0.2, 0.4, 0.6, 0.8)},
    problems=(NAME,),
    note="lam 0.6, which the paper matches with a scale of 7.5 at 50 steps",
    weakness=(
        "With a score that is exact, CFG++ has no advantage at equal strength; a small network in two dimensions has "
        "nearly that, and its effect is on learned models of images."
    ),
    claims=(
        _claim("Inverted points come back nearer than with plain guidance.", "back"),
        _claim("It misses what is asked for no more often, within a point.", "missed", margin=1.0),
        _claim("Fewer samples lie outside of the data.", "outside"),
    ),
)
