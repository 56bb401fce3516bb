"""Random teachers in the arena `distill`."""

from retouch.arenas.contest import Claim, Entry
from retouch.arenas.distill import Replica, Solution
from retouch.arenas.distill.tasks.random_teacher import NAME, imitate


def solve(replica: Replica, *, alpha: float = 0.0, loss: str = "ce", student_temperature: float = 1.0) -> Solution:
    """Imitation of a frozen random draw from the same weights, without labels."""
    return imitate(replica, alpha=alpha, loss=loss, student_temperature=student_temperature)


def _claim(text: str, other: str, *, measure: str = "error", source: str = "table 1") -> Claim:
    return Claim(text=text, problem=NAME, measure=measure, other=other, relation="at most", source=source)


ENTRY = Entry(
    name="random_teacher",
    title="Random teacher",
    solve=solve,
    grid={"alpha": (0.0, 0.1), "loss": ("ce", "mse"), "student_temperature": (0.5, 1.0, 2.0)},
    problems=(NAME,),
    note="no labels; only the probe has them",
    weakness="An encoder of a few thousand weights on 64 pixels: a linear probe on the pixels is nearly perfect.",
    claims=(
        _claim("A student distilled from a random teacher beats that teacher under a linear probe.", "teacher"),
        _claim("And under a k-NN probe.", "teacher", measure="knn"),
        _claim("It beats raw pixels under a linear probe.", "pixels"),
        _claim("It needs real data: noise of the same mean and spread does worse.", "noise_inputs", source="section 4"),
        _claim("The closer the start the better: alpha 0 beats 0.5.", "alpha_half", source="section 4"),
        _claim("The closer the start the better: alpha 0 beats 1.", "alpha_one", source="section 4"),
    ),
)
