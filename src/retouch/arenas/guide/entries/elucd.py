"""EluCD in the arena `guide`."""

from typing import Any

from retouch.arenas.contest import Claim, Entry
from retouch.arenas.guide import Outcome, Replica
from retouch.arenas.guide.tasks import classes, classifier
from retouch.guide.elucd import OffTheShelfClassifierGuidance

STEERED = {classes.NAME: classes.steered, classifier.NAME: classifier.steered}
ASKED = {classes.NAME: lambda given: given.modes, classifier.NAME: lambda given: given.labels}


def solve(replica: Replica, *, scale: float = 1.0, **settings: Any) -> Outcome:
    """A clean classifier at x0, smoothed, towards the joint direction, with a sine bump."""
    given, problem = replica.given, replica.problem.name
    guide = OffTheShelfClassifierGuidance(given.classifier, ASKED[problem](given), scale=scale, **settings)
    return STEERED[problem](replica, [guide])


def _claim(text: str, other: str, margin: float = 0.0) -> Claim:
    return Claim(
        text=text,
        problem=classes.NAME,
        measure="wrong",
        other=other,
        relation="at most",
        margin=margin,
        source="section 4",
    )


def _right(text: str, other: str, margin: float = 0.0) -> Claim:
    return Claim(
        text=text,
        problem=classifier.NAME,
        measure="right",
        other=other,
        relation="at least",
        margin=margin,
        source="section 4",
    )


ENTRY = Entry(
    name="elucd",
    title="EluCD",
    solve=solve,
    settings={classes.NAME: {"scale": 0.1}, classifier.NAME: {"scale": 3.0}},
    grid={"scale": (0.02, 0.05, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)},
    problems=(classes.NAME, classifier.NAME),
    note="as the paper's for DDPM but for the scale",
    weakness=(
        "In two dimensions a classifier of clean points is right on noisy ones as well, since their direction tells; "
        "and the joint direction, which asks for a larger logit whatever the others are, leads out of the ring. A "
        "small classifier of shapes has gradients that a diffusion model turns into texture instead of another outline."
    ),
    claims=(
        _claim("A classifier at x0 guides better than the same on x_t, by 10 points.", "clean_on_noise", margin=-10.0),
        _claim("It guides as well as a noise-aware classifier, within a point.", "noise_aware", margin=1.0),
        _claim("It is wrong at least 40 points less often than without guidance.", "unguided", margin=-40.0),
        _right(
            "More shapes are right than with the same classifier on x_t, by 10 points.", "classifier_on_noise", 10.0
        ),
        _right("As many at least as with the same classifier on x0, plainly.", "classifier_on_x0"),
        _right("More than without guidance, by 10 points.", "pixels_unguided", 10.0),
    ),
)
