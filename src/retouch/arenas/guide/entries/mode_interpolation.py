"""The filter of mode interpolation in the arena `guide`."""

from retouch.arenas.contest import Claim, Entry
from retouch.arenas.guide import Outcome, Replica
from retouch.arenas.guide.tasks.between import NAME, scored


def solve(replica: Replica, *, window: float = 0.05) -> Outcome:
    """Variance of the predicted x0 over the last steps."""
    return scored(replica, window)


def _claim(text: str, other: str, measure: str = "removed", margin: float = 0.0, factor: float = 1.0) -> Claim:
    return Claim(
        text=text,
        problem=NAME,
        measure=measure,
        other=other,
        relation="at least",
        margin=margin,
        factor=factor,
        source="section 5",
    )


ENTRY = Entry(
    name="mode_interpolation",
    title="variance, last 5%",
    solve=solve,
    grid={"window": (0.02, 0.05, 0.1, 0.2)},
    problems=(NAME,),
    note="the paper's window is the last 1% of 1000 steps; here are 100",
    weakness="A network of seconds of training makes many such samples, some of which settle as early as right ones.",
    claims=(
        _claim("It removes more than 95% of them and keeps 90% of the others.", "random_filter", margin=95, factor=0.0),
        _claim("It removes more than a random filter does.", "random_filter", margin=20.0),
        _claim("It removes more than looking for outliers does.", "outlier"),
        _claim("Its window must be late: a wide one tells less.", "wide_window", "auroc"),
    ),
)
