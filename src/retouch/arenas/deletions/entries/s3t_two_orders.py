"""S3T with two orders a shard: half the price, most of the gain."""

from retouch.arenas.contest import Entry
from retouch.arenas.deletions import DeletionProblem, Replica, Served, serve, train_ensemble


def shared(problem: DeletionProblem) -> None:
    """Train two orders."""
    train_ensemble(problem, 2)


def solve(replica: Replica) -> Served:
    """Serve the stream; nothing is trained."""
    return serve(replica, 2)


ENTRY = Entry(name="s3t_two_orders", title="S3T, two orders", solve=solve, shared=shared, note="LoRA rank 8")
