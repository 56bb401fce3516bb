"""S3T in the arena `deletions`: as many orders as slices."""

from retouch.arenas.contest import Claim, Entry
from retouch.arenas.deletions import SIMULATED, SLICES, DeletionProblem, Replica, Served, serve, train_ensemble


def budget(problem: DeletionProblem) -> int:
    """One order for each slice."""
    return SIMULATED["slices"] if problem.name == "simulated" else SLICES


def shared(problem: DeletionProblem) -> None:
    """Train the orders."""
    train_ensemble(problem, budget(problem))


def solve(replica: Replica) -> Served:
    """Serve the stream; nothing is trained."""
    return serve(replica, budget(replica.problem))


ENTRY = Entry(
    name="s3t",
    title="S3T, an order a slice",
    solve=solve,
    shared=shared,
    note="rotated orders; LoRA rank 8",
    claims=(
        Claim(
            text="S3T serves at least 1.4 times as many deletions as SISA (5 shards of 6 slices).",
            problem="simulated",
            measure="served",
            other="sisa",
            factor=1.4,
            relation="at least",
            source="section 4.3; the authors' simulator: 121 against 67",
        ),
        Claim(
            text="S3T serves more deletions than SISA before retraining is due.",
            problem="stream",
            measure="served",
            other="sisa",
            relation="at least",
            source="figure 6",
        ),
        Claim(
            text="S3T is more accurate than SISA over the first 20 deletions, by 2 points or more.",
            problem="stream",
            measure="area",
            other="sisa",
            relation="at least",
            margin=2.0,
            source="figure 7",
        ),
    ),
)
