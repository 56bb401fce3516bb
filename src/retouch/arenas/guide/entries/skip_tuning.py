"""Skip-Tuning in the arena `guide`."""

from retouch.arenas.contest import Claim, Entry
from retouch.arenas.guide import Outcome, Replica
from retouch.arenas.guide.tasks import few_steps, free
from retouch.guide.skip_tuning import steer

DRAWN = {free.NAME: free.drawn, few_steps.NAME: few_steps.drawn}


def solve(replica: Replica, *, rho_bottom: float = 0.8) -> Outcome:
    """The deepest skip turned down most."""
    return DRAWN[replica.problem.name](replica, lambda denoiser: steer(denoiser, "", rho_bottom=rho_bottom))


def _claim(problem: str, text: str, measure: str, other: str, relation: str = "at most") -> Claim:
    return Claim(text=text, problem=problem, measure=measure, other=other, relation=relation, source="tables 1 and 2")


ENTRY = Entry(
    name="skip_tuning",
    title="Skip-Tuning",
    solve=solve,
    settings={"": {"rho_bottom": 0.95}},
    grid={"rho_bottom": (0.6, 0.7, 0.8, 0.9, 0.95, 1.05, 1.1)},
    problems=(free.NAME, few_steps.NAME),
    weakness="A small network that fits its data may have its optimum at 1; the search has values above it as well.",
    claims=(
        _claim(free.NAME, "Images of few steps come nearer to real digits.", "distance", "free_plain"),
        _claim(free.NAME, "Nearer than with twice the steps.", "distance", "twice"),
        _claim(few_steps.NAME, "Images of 5 steps come nearer to held-out scenes.", "frechet", "heun_5"),
        _claim(few_steps.NAME, "Nearer than with twice the steps.", "frechet", "heun_10"),
        _claim(few_steps.NAME, "At least as many of them are right.", "right", "heun_5", "at least"),
    ),
)
