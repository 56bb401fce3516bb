"""What S3T is compared with: one order a shard (SISA with LoRA), and one model trained on everything."""

from retouch.arenas.contest import Entry
from retouch.arenas.deletions import SLICES, DeletionProblem, Replica, Served, serve, train_ensemble
from retouch.core import seeds
from retouch.core.batches import in_order
from retouch.core.models import predict
from retouch.forget.s3t import SlicedAdapters


def train_sisa(problem: DeletionProblem) -> None:
    """Train one order."""
    train_ensemble(problem, 1)


def sisa(replica: Replica) -> Served:
    """Serve the stream with one order a shard."""
    return serve(replica, 1)


def whole(replica: Replica) -> Served:
    """LoRA on all layers and all data at once: the accuracy to pay for, and no request can be served."""
    problem = replica.problem
    adapters = SlicedAdapters(problem.backbone, 1, rank=8, alpha=8)
    adapters.fresh(1, seeds.derive(problem.root, "whole"))
    problem.train_stage(adapters.stage(1), problem.private, problem.root)
    logits = predict(adapters.truncate(1), in_order(problem.test))
    return Served(0, [logits, *[None for _ in replica.requests]])


BASELINES = (
    Entry(
        name="whole",
        title="one model on everything",
        kind="original",
        solve=whole,
        problems=("stream",),
        note="the first request already asks for retraining",
    ),
    Entry(
        name="sisa",
        title="SISA with LoRA",
        kind="baseline",
        solve=sisa,
        shared=train_sisa,
        note=f"one order; LoRA rank 8, {SLICES} slices",
    ),
)
