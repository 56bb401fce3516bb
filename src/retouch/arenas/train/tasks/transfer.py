"""Pre-training on coarse labels, judged by what it is worth for finer ones: odd and even, and then the ten digits."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retouch.arenas.contest import Entry, Measure
from retouch.arenas.train import Replica, Solution, Split, Task
from retouch.core import seeds
from retouch.core.data import TensorData, indexed, labels_of
from retouch.core.features import layer_of
from retouch.core.metrics.unlearning import accuracy
from retouch.core.models import Batch, forward, head_of, unpack
from retouch.train.look import LOOK, Embedder, MemoryBank, features_of_data, fit_head, knn_predict
from retouch.worlds import digits

NEIGHBOURS = 5


def draw(seed: int, search: bool) -> Split:
    """All training digits, labelled as even or odd; test digits have their own labels. Seeds vary the weights only."""
    train, test = digits.data("train"), digits.data("validation" if search else "test")
    labels = labels_of(train)
    return Split(train=TensorData(train.inputs, labels % 2), test=test, notes={"digits": labels})


def build() -> nn.Module:
    """Three layers to 32 features, and a head for even and odd."""
    layers = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 32)]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(32, 2))


def adam(parameters: Any) -> torch.optim.Optimizer:
    """Adam at 1e-3."""
    return torch.optim.Adam(parameters, lr=1e-3)


def features(model: nn.Module, split: Split) -> tuple[Tensor, Tensor]:
    """What goes into the head, of the training and of the test samples, at unit length."""
    name = head_of(model)
    one, two = (features_of_data(model, data, name) for data in (split.train, split.test))
    return F.normalize(one, dim=1), F.normalize(two, dim=1)


def by_neighbours(train: Tensor, labels: Tensor, test: Tensor) -> Tensor:
    """Class ids of the test samples by their nearest training samples, each with one vote."""
    bank = MemoryBank(len(train), train.shape[1])
    bank.update(torch.arange(len(train)), train, labels)
    return knn_predict(bank, test, k=NEIGHBOURS, temperature=1e6)


def neighbour_error(model: nn.Module, split: Split) -> float:
    """Test digits that their nearest neighbours do not tell, in percent."""
    train, test = features(model, split)
    right = by_neighbours(train, split.notes["digits"], test) == labels_of(split.test)
    return 100.0 - 100.0 * float(right.double().mean())


def judge(model: nn.Module, split: Split) -> dict[str, float]:
    """Errors on the digits by a linear probe and by neighbours, and on even and odd by neighbours."""
    train, test = features(model, split)
    fine, truth = split.notes["digits"], labels_of(split.test)
    probe = fit_head(nn.Sequential(nn.Linear(train.shape[1], 10)), TensorData(train, fine))
    parity = by_neighbours(train, labels_of(split.train), test)
    return {
        "error": 100.0 - accuracy(probe(test), truth),
        "neighbours": neighbour_error(model, split),
        "upstream": 100.0 - 100.0 * float((parity == truth % 2).double().mean()),
    }


class SupervisedContrastive(LOOK):
    """Supervised contrastive learning against the same memory: the mean over a class stands outside of the log."""

    def __call__(self, model: nn.Module, batch: Batch, run: Any = None) -> Any:
        inputs, index = unpack(batch)
        embeddings, labels, bank = forward(model, inputs), self.labels[index], self.loss.bank
        others = bank.filled & (torch.arange(len(bank.filled)) != index[:, None])
        same = others & (bank.labels == labels[:, None])
        counted = same.any(1)
        others, same = others[counted], same[counted]
        scores = embeddings[counted] @ bank.features.clone().T / self.loss.temperature  # it is written to below
        log_p = scores - scores.masked_fill(~others, -torch.inf).logsumexp(1, keepdim=True)
        losses = -(log_p * same).sum(1) / same.sum(1)
        bank.update(index, embeddings, labels)
        return {"contrastive": losses.sum() / counted.sum().clamp(min=1) + 0.0 * embeddings.sum()}


def pretrain(replica: Replica, kind: type[LOOK], *, dim: int | None, **settings: Any) -> Solution:
    """Train encoder and projection on numbered samples, then the classifier's head on frozen features."""
    model, data = replica.build(), replica.split.train
    name = head_of(model)
    width = layer_of(model, name).in_features
    with seeds.isolated(seeds.derive(replica.seed, "projection")):
        embedder = Embedder(model, width, dim, layer=name)  # type: ignore[arg-type]
    objective = kind(labels_of(data), dim or width, **settings)  # type: ignore[arg-type]
    return replica.train(
        embedder,
        indexed(data),
        objective,
        callbacks=[objective],
        error=lambda _: replica.task.error(fit_head(model, data), replica.split),  # the head is not trained meanwhile
        finish=lambda _: fit_head(model, data),
    )


def contrastive(replica: Replica, *, dim: int | None, temperature: float) -> Solution:
    """Supervised contrastive learning with LOOK's memory."""
    return pretrain(replica, SupervisedContrastive, dim=dim, temperature=temperature)


BASELINES = (
    Entry(
        name="contrastive",
        title="supervised contrastive",
        kind="baseline",
        solve=contrastive,
        settings={"": {"dim": 128, "temperature": 0.05}},
        grid={"temperature": (0.05, 0.1, 0.3, 1.0)},
        problems=("transfer",),
        note="with a projection, as usual",
    ),
    Entry(
        name="contrastive_direct",
        title="supervised contrastive on the features",
        kind="baseline",
        solve=contrastive,
        settings={"": {"dim": None, "temperature": 0.1}},
        problems=("transfer",),
        note="without a projection",
    ),
)


TASK = Task(
    name="transfer",
    text="An encoder learns to tell even from odd handwritten digits, 1200 to learn from, in 400 steps. Its features "
    "are judged by what a linear classifier (error) and five neighbours make of them for the ten digits.",
    split=draw,
    build=build,
    steps=400,
    batch_size=256,
    optimizer=adam,
    error=neighbour_error,
    judge=judge,
    measures={
        "neighbours": Measure(
            title="neighbours", unit="%", better="low", digits=2, line="Error of five nearest neighbours on the digits."
        ),
        "upstream": Measure(
            title="upstream", unit="%", better="low", digits=2, line="Error of five nearest neighbours on odd and even."
        ),
    },
    baselines=BASELINES,
)
