"""A tenth of the data a round: a fresh subset every time, or one that was chosen."""

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from retouch.arenas.contest import Entry
from retouch.arenas.train import Replica, Solution, Split, Task
from retouch.core import seeds
from retouch.core.batches import in_order
from retouch.core.data import TensorData, labels_of, subset
from retouch.core.features import features_of
from retouch.core.models import predict
from retouch.train.rs2 import steps_per_run
from retouch.worlds import digits

FRACTION, ROUNDS, BATCH = 0.1, 50, 24
SIZE = round(FRACTION * digits.SPLITS["train"])


def split(seed: int, search: bool) -> Split:
    """All training digits."""
    return Split(train=digits.data("train"), test=digits.data("validation" if search else "test"))


def build() -> nn.Module:
    """Two hidden layers of 128."""
    layers = [nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)]
    return nn.Sequential(*layers)


def sgd(parameters: list[Tensor]) -> torch.optim.Optimizer:
    """Nesterov's momentum, 0.1."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)


def cosine(optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    """Down to 1e-4 over the steps that are really made."""
    return CosineAnnealingLR(optimizer, steps, eta_min=1e-4)


def static(replica: Replica) -> Solution:
    """One random subset, used in every round."""
    data = replica.split.train
    rows = torch.randperm(len(data), generator=seeds.generator(replica.seed, "static"))[:SIZE]
    return replica.train(data=subset(data, rows))


def herding(replica: Replica) -> Solution:
    """The subset whose mean features follow each class's, chosen with a network trained on all data (Welling, 2009)."""
    data = replica.split.train
    scout = replica.train(replica.build("scout"), steps=steps_per_run(len(data), 1.0, 4, BATCH, drop_last=False)).model
    return replica.train(data=subset(data, herded(scout, data, SIZE)))


def herded(scout: nn.Module, data: TensorData, size: int) -> Tensor:
    """Rows chosen greedily, so that the mean of the features chosen of a class stays nearest to the class's own."""
    with torch.no_grad():
        features = torch.cat([features_of(scout, inputs, "4") for inputs, _ in in_order(data)])
    labels, chosen = labels_of(data), []
    for label in labels.unique():
        rows = (labels == label).nonzero()[:, 0]
        own, total = features[rows], torch.zeros(features.shape[1])
        free = torch.ones(len(rows), dtype=torch.bool)
        for count in range(1, round(size * len(rows) / len(data)) + 1):
            distance = ((total + own) / count - own.mean(0)).square().sum(1).masked_fill(~free, torch.inf)
            best = int(distance.argmin())
            free[best], total = False, total + own[best]
            chosen.append(int(rows[best]))
    return torch.tensor(chosen)


def hardest(replica: Replica) -> Solution:
    """The subset with the largest losses under a network trained on all data for four epochs."""
    data = replica.split.train
    scout = replica.train(replica.build("scout"), steps=steps_per_run(len(data), 1.0, 4, BATCH, drop_last=False)).model
    losses = nn.functional.cross_entropy(predict(scout, in_order(data)), labels_of(data), reduction="none")
    return replica.train(data=subset(data, losses.topk(SIZE).indices))


def _baseline(name: str, title: str, solve: object, note: str = "") -> Entry:
    return Entry(name=name, title=title, kind="baseline", solve=solve, problems=("rounds",), note=note)  # type: ignore[arg-type]


TASK = Task(
    name="rounds",
    text="1200 handwritten digits, of which a tenth is used in each of 50 rounds; a network of three layers.",
    split=split,
    build=build,
    steps=steps_per_run(digits.SPLITS["train"], FRACTION, ROUNDS, BATCH, drop_last=False),
    batch_size=BATCH,
    optimizer=sgd,
    scheduler=cosine,
    target=6.0,
    baselines=(
        _baseline("static_subset", "a static random tenth", static),
        _baseline("herding", "herding, a tenth", herding, "the network that chooses is trained for 200 further steps"),
        _baseline(
            "hardest", "largest losses, a tenth", hardest, "the network that chooses is trained for 200 further steps"
        ),
    ),
)
