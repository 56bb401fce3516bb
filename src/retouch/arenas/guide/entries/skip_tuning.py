"""Skip-Tuning in the arena `guide`."""

from retouch.arenas.contest import Claim, Entry
from retouch.arenas.guide import Outcome, Replica
from retouch.arenas.guide.tasks.free import NAME, drawn
from retouch.guide.skip_tuning import steer


def solve(replica: Replica, *, rho_bottom: float = 0.8) -> Outcome:
    """The deepest skip turned down most."""
    return drawn(replica, lambda denoiser: steer(denoiser, "", rho_bottom=rho_bottom))


def _claim(text: str, measure: str, other: str) -> Claim:
    return Claim(text=text, problem=NAME, measure=measure, other=other, relation="at most", source="tables 1 and 2")


ENTRY = Entry(
    name="skip_tuning",
    title="Skip-Tuning",
    solve=solve,
    settings={"": {"rho_bottom": 0.95}},
    grid={"rho_bottom": (0.7, 0.8, 0.9, 0.95, 1.05, 1.1)},
    problems=(NAME,),
    weakness="A small network that fits its data may have its optimum at 1; the search has values above it as well.",
    claims=(
        _claim("Images of few steps come nearer to real digits.", "distance", "free_plain"),
        _claim("Nearer than with twice the steps.", "distance", "twice"),
    ),
)
