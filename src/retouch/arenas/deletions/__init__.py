"""How many deletion requests are served before anything must be retrained, and how accurate is the model on the way?

    stream      3 shards of 4 slices of 800 digits, a ViT with 8 layers and LoRA; 60 requests for uniformly drawn
    samples simulated   5 shards of 6 slices, bookkeeping only: requests until every model is gone

The backbone has learned digits turned by a quarter, from 400 samples that are not in any slice. Unlearning here is
exact: what is measured is how long it lasts and what it costs, and `exact` is a test, not a score.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from retouch.arenas.contest import Arena, Entry, Measure, Plot, Terms, Values, mean
from retouch.core import seeds
from retouch.core.batches import in_order
from retouch.core.data import TensorData, labels_of, subset
from retouch.core.metrics.unlearning import accuracy
from retouch.core.models import predict
from retouch.forget.s3t import (
    Prefix,
    S3TEnsemble,
    SlicedAdapters,
    cyclic_sequences,
    delete_slice,
    split_shards,
    stage_trainer,
)
from retouch.worlds import digits

REQUESTS = 200  # more than any ensemble here survives
CHECKED = 2  # streams in which exactness is tested by training again
SHARDS, SLICES = 3, 4
SIMULATED = {"shards": 5, "slices": 6}


def new_backbone() -> nn.Module:
    """An untrained ViT of 8 layers for the digits."""
    from transformers import ViTConfig, ViTForImageClassification

    settings: dict[str, Any] = {
        "hidden_size": 48,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "num_labels": 10,
    }
    config = ViTConfig(image_size=8, patch_size=2, num_channels=1, **settings)
    return ViTForImageClassification(config)


class DeletionProblem:
    """Backbone, shards, streams of requests, and ensembles trained once for all of them.

    The ensembles are the same in all replicas; "forget" varies the streams. A search has other streams and seeds, and
    the validation split in the test split's place.

    Args:
        name: "stream" or "simulated".
        terms: seeds and the like.
    """

    def __init__(self, name: str, terms: Terms) -> None:
        self.name, self.terms, self.root = name, terms, int(terms.search)
        self.test = digits.data("validation" if terms.search else "test")
        whole = digits.data("train")
        self.public, self.private = subset(whole, range(400)), subset(whole, range(400, len(whole)))
        self.rows = split_shards(len(self.private), SHARDS, SLICES, seed=self.root)
        self.store: dict[int, tuple[S3TEnsemble, dict[tuple[int, Prefix], Tensor]]] = {}  # ensembles by budget
        self.slices = [[subset(self.private, rows) for rows in shard] for shard in self.rows]

    @cached_property
    def backbone(self) -> nn.Module:
        """Trained on turned digits that are in no slice."""
        with seeds.isolated(seeds.derive(self.root, "backbone")):
            model = new_backbone()
        assert isinstance(self.public.inputs, Tensor)
        turned = TensorData(torch.rot90(self.public.inputs, 1, (2, 3)), labels_of(self.public))
        return digits.Recipe(150, 1e-3, 0.05, jitter=True).train(model, turned, seed=self.root)

    @property
    def train_stage(self) -> Callable[[SlicedAdapters, Any, int], None]:
        """How every stage is trained."""
        return stage_trainer(epochs=30, lr=5e-3, batch_size=32)

    def new_ensemble(self, budget: int) -> S3TEnsemble:
        """An untrained ensemble on this backbone."""
        return S3TEnsemble(self.backbone, slices=SLICES, budget=budget, rank=8, alpha=8, seed=self.root)

    def replica(self, number: int) -> "Replica":
        """One stream of requests, as (shard, slice)."""
        shape = (SIMULATED["shards"], SIMULATED["slices"]) if self.name == "simulated" else (SHARDS, SLICES)
        draw = seeds.generator(self.root, "stream", self.terms.number("forget", number))
        count = REQUESTS if self.name == "stream" else 100 * shape[0] * shape[1]
        hits = torch.randint(shape[0] * shape[1], (count,), generator=draw).tolist()
        return Replica(number, [divmod(hit, shape[1]) for hit in hits], self)


@dataclass(frozen=True)
class Replica:
    """What an entry is given: requests as (shard, slice), in order."""

    number: int
    requests: list[tuple[int, int]]
    problem: DeletionProblem


@dataclass(frozen=True)
class Served:
    """What an entry gives back.

    Attributes:
        count: requests after which some model was left; in the simulation, the last request is counted too.
        logits: test logits after 0, 1, 2, ... requests, (requests + 1, n, 10); None once nothing survives, or where
            nothing was predicted.
        exact: whether what survived equals, bit for bit, a model trained without the deleted data; None if not
            tested.
    """

    count: int
    logits: Sequence[Tensor | None]
    exact: bool | None = None


def measure(problem: DeletionProblem, solutions: Sequence[Served]) -> Values:
    """Requests served, accuracy along the stream (a dead ensemble counts as a guess), exactness."""
    values: Values = {"served": [float(served.count) for served in solutions]}
    if problem.name == "simulated":
        return values
    labels = labels_of(problem.test)
    curves = [[10.0 if step is None else accuracy(step, labels) for step in served.logits] for served in solutions]
    values["start"] = [curve[0] for curve in curves]
    values["area"] = [sum(curve[1:21]) / 20 for curve in curves]
    for requests in (5, 10, 20):
        values[f"after_{requests}"] = [curve[requests] for curve in curves]
    tested = [float(served.exact) for served in solutions if served.exact is not None]
    return {**values, "exact": tested} if tested else values


def train_ensemble(problem: DeletionProblem, budget: int) -> None:
    """Train the ensemble of a budget once for all streams, and note what its models say of the test data."""
    if problem.name == "stream":
        ensemble = problem.new_ensemble(budget).fit(problem.slices, problem.train_stage)
        said = {key: predict(ensemble.member(*key), in_order(problem.test)) for key in ensemble.checkpoints}
        problem.store[budget] = ensemble, said


def serve(replica: Replica, budget: int) -> Served:
    """Answer a stream of requests with orders of a budget."""
    if replica.problem.name == "simulated":
        return Served(_count(replica, budget), [])
    trained, said = replica.problem.store[budget]
    ensemble = copy.copy(trained)  # the weights are shared, the bookkeeping is this stream's own
    ensemble.sequences, ensemble.checkpoints = copy.deepcopy(trained.sequences), dict(trained.checkpoints)
    logits: list[Tensor | None] = [_answer(ensemble, said)]
    count, exact = 0, None
    for number, request in enumerate(replica.requests):
        alive = ensemble.delete(*request).alive
        logits.append(_answer(ensemble, said))
        count += int(alive)
        if number == 2 and replica.number < CHECKED:
            exact = is_exact(replica, ensemble, replica.requests[:3])
    return Served(count, logits, exact)


def _count(replica: Replica, budget: int) -> int:
    """Requests until the orders of every shard are gone, the last one included."""
    sequences = [cyclic_sequences(SIMULATED["slices"], budget) for _ in range(SIMULATED["shards"])]
    for number, (shard, slice_id) in enumerate(replica.requests, start=1):
        sequences[shard] = delete_slice(sequences[shard], slice_id)
        if not any(sequences):
            return number
    return len(replica.requests)


def _answer(ensemble: S3TEnsemble, said: dict[tuple[int, Prefix], Tensor]) -> Tensor | None:
    """Mean logits of the serving models."""
    serving = ensemble.serving()
    return torch.stack([said[key] for key in serving]).mean(0) if serving else None


def is_exact(replica: Replica, ensemble: S3TEnsemble, requests: Sequence[tuple[int, int]]) -> bool:
    """Train the shortest surviving model anew, with other data in the deleted slices, and compare bit for bit."""
    problem = replica.problem
    shard, prefix = min(ensemble.serving(), key=lambda key: len(key[1]))
    data = list(problem.slices[shard])
    for hit, slice_id in requests:
        if hit == shard:
            data[slice_id] = TensorData(torch.zeros_like(data[slice_id].inputs), labels_of(data[slice_id]))
    anew = problem.new_ensemble(ensemble.budget)
    for length in range(1, len(prefix) + 1):
        part = prefix[:length]
        anew.checkpoints[shard, part] = anew.train_prefix(shard, part, data, problem.train_stage)
    kept, trained = ensemble.checkpoints[shard, prefix], anew.checkpoints[shard, prefix]
    return kept.keys() == trained.keys() and all(torch.equal(kept[name], trained[name]) for name in kept)


def words(problem: str, rows: Mapping[str, Any]) -> list[str]:
    """The result in plain sentences."""
    if "s3t" not in rows or "sisa" not in rows:
        return []
    s3t, sisa = (mean(rows[name]["values"]["served"]) for name in ("s3t", "sisa"))
    sentences = [
        f"With an order of the slices for each slice, {s3t:.0f} requests are served before anything must be trained; "
        f"with one order (SISA) {sisa:.0f}. Serving a request trains nothing: it switches layers off."
    ]
    exact = rows["s3t"]["values"].get("exact")
    if exact:
        all_of_them = "all" if mean(exact) == 1 else f"{100 * mean(exact):.0f}%"
        sentences.append(
            f"In {all_of_them} of the {len(exact)} streams tested, a model that survived three deletions equals, bit "
            "for bit, one trained without the deleted data."
        )
    return sentences


def _baselines() -> Sequence[Entry]:
    from retouch.arenas.deletions.baselines import BASELINES

    return BASELINES


MEASURES = {
    "served": Measure(title="served", better="high", line="Deletion requests served before all had to be retrained."),
    "area": Measure(title="area", unit="%", better="high", line="Mean test accuracy over the first 20 requests."),
    "start": Measure(title="at the start", unit="%", better="high", line="Test accuracy before any request."),
    "after_5": Measure(title="after 5", unit="%", better="high", line="Test accuracy after 5 requests."),
    "after_10": Measure(title="after 10", unit="%", better="high", line="Test accuracy after 10 requests."),
    "after_20": Measure(title="after 20", unit="%", better="high", line="Test accuracy after 20 requests."),
    "exact": Measure(
        title="exact",
        better="high",
        line="Share of tested streams in which a surviving model equals, bit for bit, one without the deleted data.",
    ),
    "seconds": Measure(title="time", unit="s", better="low", digits=3, line="Seconds for the whole stream."),
}

ARENA = Arena(
    name="deletions",
    question="How many deletion requests are served before anything must be retrained, and how good is the model then?",
    problems={
        "stream": f"Requests for random samples of 800 digits in {SHARDS} shards of {SLICES} slices; a ViT with LoRA.",
        "simulated": "Uniform requests against 5 shards of 6 slices until every model is gone; bookkeeping only.",
    },
    measures=MEASURES,
    prepare=DeletionProblem,
    measure=measure,
    order="served",
    baselines=_baselines,
    plots=(
        Plot(kind="bars", x="served", text="Deletion requests served before everything has to be trained again."),
        Plot(kind="bars", x="area", text="Mean test accuracy over the first 20 requests.", problems=("stream",)),
    ),
    words=words,
)
