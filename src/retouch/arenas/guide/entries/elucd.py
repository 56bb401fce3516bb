"""EluCD in the arena `guide`."""

from typing import Any

from retouch.arenas.contest import Claim, Entry
from retouch.arenas.guide import Outcome, Replica
from retouch.arenas.guide.tasks.classes import NAME, steered
from retouch.guide.elucd import OffTheShelfClassifierGuidance


def solve(replica: Replica, *, scale: float = 1.0, **settings: Any) -> Outcome:
    """A clean classifier at x0, smoothed, towards the joint direction, with a sine bump."""
    given = replica.given
    return steered(replica, [OffTheShelfClassifierGuidance(given.classifier, given.modes, scale=scale, **settings)])


def _claim(text: str, other: str, margin: float = 0.0) -> Claim:
    return Claim(
        text=text, problem=NAME, measure="wrong", other=other, relation="at most", margin=margin, source="section 4"
    )


ENTRY = Entry(
    name="elucd",
    title="EluCD",
    solve=solve,
    settings={"": {"scale": 0.1}},
    grid={"scale": (0.02, 0.05, 0.1, 0.3, 1.0)},
    problems=(NAME,),
    note="as the paper's for DDPM but for the scale",
    weakness=(
        "In two dimensions a classifier of clean points is right on noisy ones as well, since their direction tells; "
        "and the joint direction, which asks for a larger logit whatever the others are, leads out of the ring."
    ),
    claims=(
        _claim("A classifier at x0 guides better than the same on x_t, by 10 points.", "clean_on_noise", margin=-10.0),
        _claim("It guides as well as a noise-aware classifier, within a point.", "noise_aware", margin=1.0),
        _claim("It is wrong at least 40 points less often than without guidance.", "unguided", margin=-40.0),
    ),
)
