"""RS2: train on a fresh random subset every round instead of pruning the data once.

With a budget of T rounds of m = round(r N) samples each, a new random subset every round sees far more of the data than
one chosen subset used T times:

    without replacement   shuffle all N once, take the next m each round, shuffle again when they are used up
    with replacement      draw m distinct samples anew each round (balanced over classes, if labels are given)

The learning rate must be stretched over the steps really made, `steps_per_run(...)`. Use it as the baseline that any
selection of data must beat, and to train under a fixed budget on more data than there is time for. At equal steps it is
nearly ordinary training with a short schedule, which is the point: choosing costs time and does not pay.

Paper: arXiv 2305.18424 (algorithm 1). Code: PatrikOkanovic/RS2. Where they part: when m does not divide N, the code's
index arithmetic gives a short subset at the seam of two shufflings; here the seam takes the rest of the old shuffling
and the head of the new one (`remainder="carry"`), or drops the rest ("drop"). Where m divides N all three agree.

Cost: one permutation of N a pass. Limits: balanced subsets are drawn with replacement only, as in the code.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from retouch.core import seeds
from retouch.core.cards import Card
from retouch.core.data import as_dataset
from retouch.core.errors import InputError, in_range, one_of, positive
from retouch.core.recipe import Recipe

CARD = Card(
    title="RS2: repeated random subsets",
    room="train",
    paper="arXiv:2305.18424",
    shape="callback",
    line="Trains on a fresh random share of the data every round, in place of pruning it once.",
    tags=("data sampler", "time to accuracy", "coreset baseline"),
    plugin="RepeatedRandomSampler",
)


def rs2_subset(permutation: Tensor, round: int, *, subset_size: int) -> Tensor:
    """The part of one shuffling that a round takes, (subset_size,); fewer at its end.

    Args:
        permutation: of all samples (N,).
        round: number of the round within this shuffling, from 0.
        subset_size: samples a round.
    """
    positive("subset_size", subset_size)
    start = round * subset_size
    if not 0 <= start < len(permutation):
        raise InputError(
            f"round is {round}, but this shuffling has rounds 0 to {(len(permutation) - 1) // subset_size}"
        )
    return permutation[start : start + subset_size]


def stratified_subset(labels: Tensor, fraction: float, *, generator: torch.Generator | None = None) -> Tensor:
    """Indices of a random share of every class, in random order.

    Args:
        labels: class of each sample (N,).
        fraction: 0 to 1; round(fraction * size) of each class. If that is fewer samples than classes, one of each class
            is drawn first where there is room, in random order of the classes.
        generator: a CPU generator.
    """
    in_range("fraction", fraction, 0, 1, above=True)
    generator = seeds.fresh(generator)
    shuffled = torch.randperm(len(labels), generator=generator)
    classes, counts = labels.unique(return_counts=True)
    size = round(fraction * len(labels))
    if size < len(classes) or min(round(fraction * int(count)) for count in counts) == 0:
        takes = _one_each(len(classes), counts, max(size, 1), generator)
    else:
        takes = [round(fraction * int(count)) for count in counts]
    chosen = [shuffled[labels[shuffled] == c][:take] for c, take in zip(classes, takes, strict=True)]
    rows = torch.cat(chosen)
    return rows[torch.randperm(len(rows), generator=generator)]


def _one_each(classes: int, counts: Tensor, size: int, generator: torch.Generator) -> list[int]:
    """One of each class, then further ones from randomly chosen classes that have some left; `size` in all."""
    takes = [0] * classes
    for number in torch.randperm(classes, generator=generator)[:size].tolist():
        takes[number] = 1
    while sum(takes) < size:
        open_classes = [c for c in range(classes) if takes[c] < int(counts[c])]
        takes[open_classes[int(torch.randint(len(open_classes), (), generator=generator))]] += 1
    return takes


def steps_per_run(num_samples: int, fraction: float, rounds: int, batch_size: int, *, drop_last: bool) -> int:
    """Optimizer steps of all rounds, for the learning rate schedule."""
    for name, value in (("num_samples", num_samples), ("rounds", rounds), ("batch_size", batch_size)):
        positive(name, value)
    in_range("fraction", fraction, 0, 1, above=True)
    size = round(fraction * num_samples)
    return rounds * (size // batch_size if drop_last else math.ceil(size / batch_size))


class RepeatedRandomSampler(Sampler[int]):
    """A sampler for `DataLoader(data, batch_size, sampler=...)`: a fresh subset every epoch.

    `fit` tells it the epoch. The subset of an epoch is a function of (seed, epoch): none must have been gone through.

    Args:
        num_samples: N, of the data.
        fraction: share of the data a round, 0 to 1.
        replacement: draw every round from all data; otherwise use each sample once before any comes again.
        labels: class of each sample (N,), to draw the same share of each; with replacement only.
        remainder: where the rounds do not divide the data, "carry" the rest into the next round or "drop" it.
        seed: of all draws.
        rank: this process's number, where several share a round.
        world_size: how many processes share it.
    """

    def __init__(
        self,
        num_samples: int,
        fraction: float = 0.1,
        *,
        replacement: bool = False,
        labels: Tensor | None = None,
        remainder: Literal["carry", "drop"] = "carry",
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        positive("num_samples", num_samples)
        in_range("fraction", fraction, 0, 1, above=True)
        one_of("remainder", remainder, ("carry", "drop"))
        positive("world_size", world_size)
        in_range("rank", rank, 0, world_size, below=True)
        if labels is not None and not replacement:
            raise InputError("labels is given, but must be None without replacement: balanced subsets are drawn anew")
        if labels is not None and len(labels) != num_samples:
            raise InputError(f"labels has {len(labels)} entries, but must have one for each of {num_samples} samples")
        self.num_samples, self.fraction, self.size = num_samples, fraction, round(fraction * num_samples)
        if self.size == 0:
            raise InputError(f"fraction is {fraction}, but must give at least one of the {num_samples} samples")
        self.replacement, self.labels, self.remainder, self.seed = replacement, labels, remainder, seed
        self.rank, self.world_size, self.epoch = rank, world_size, 0
        self._known: dict[int, Tensor] = {}  # adjusted shufflings by number, the latest two

    def set_epoch(self, epoch: int) -> None:
        """Choose the round that is gone through next."""
        in_range("epoch", epoch, 0)
        self.epoch = epoch

    def subset(self, epoch: int) -> Tensor:
        """Indices of one round (m,), over all processes, each at most once."""
        if self.labels is not None:
            return stratified_subset(self.labels, self.fraction, generator=seeds.generator(self.seed, "round", epoch))
        if self.replacement:
            draw = seeds.generator(self.seed, "round", epoch)
            return torch.randperm(self.num_samples, generator=draw)[: self.size]
        if self.remainder == "drop":
            shuffling, number = divmod(epoch, self.num_samples // self.size)
            return rs2_subset(self._shuffling(shuffling), number, subset_size=self.size)
        shuffling, start = divmod(epoch * self.size, self.num_samples)
        rows = self._adjusted(shuffling)[start : start + self.size]
        missing = self.size - len(rows)
        return torch.cat([rows, self._adjusted(shuffling + 1)[:missing]]) if missing else rows

    def _shuffling(self, number: int) -> Tensor:
        return torch.randperm(self.num_samples, generator=seeds.generator(self.seed, "shuffling", number))

    def _adjusted(self, number: int) -> Tensor:
        """A shuffling whose head has no sample of the round that it completes: those come right after the head.

        What is moved back comes no further than 2 m, so the end of a long shuffling is as drawn, and only the one
        before is needed; shares above a half are worked out from the first on.
        """
        if number not in self._known:
            alone = self.num_samples >= 2 * self.size
            first = number if alone else max((known for known in self._known if known < number), default=-1) + 1
            for current in range(first, number + 1):
                before = self._shuffling(current - 1) if alone else self._known.get(current - 1, torch.empty(0))
                latest = {current: self._adjust(current, before)}
                self._known = {k: order for k, order in self._known.items() if k == current - 1} | latest
        return self._known[number]

    def _adjust(self, number: int, before: Tensor) -> Tensor:
        order = self._shuffling(number)
        head = -(number * self.num_samples) % self.size
        if number == 0 or head == 0:
            return order
        chosen = (~torch.isin(order, before[head - self.size :])).nonzero()[:head, 0]
        rest = torch.ones(self.num_samples, dtype=torch.bool)
        rest[chosen] = False
        return torch.cat([order[chosen], order[rest]])

    def __iter__(self) -> Iterator[int]:
        rows = self.subset(self.epoch)
        order = torch.randperm(len(rows), generator=seeds.generator(self.seed, "order", self.epoch))
        return iter(rows[order][self.rank :: self.world_size].tolist())

    def __len__(self) -> int:
        whole = len(self.subset(self.epoch)) if self.labels is not None else self.size
        return len(range(self.rank, whole, self.world_size))

    def state_dict(self) -> dict[str, Any]:
        """The epoch; all else follows from the settings."""
        return {"epoch": self.epoch, "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.epoch, self.seed = state["epoch"], state["seed"]
        self._known = {}


def recipe(
    model: nn.Module,
    data: Any,
    validation: Any = None,
    *,
    fraction: float = 0.1,
    replacement: bool = False,
    batch_size: int = 64,
    seed: int = 0,
) -> Recipe:
    """Train a classifier on a fresh random share of the data every epoch.

    Args:
        model: classifier.
        data: labelled samples.
        validation: not used.
        fraction: share of the data an epoch.
        replacement: draw every epoch from all data; otherwise use each sample once before any comes again.
        batch_size: samples a step.
        seed: of the subsets.
    """
    dataset = as_dataset(data)
    sampler = RepeatedRandomSampler(len(dataset), fraction, replacement=replacement, seed=seed)
    return Recipe(model=model, data=DataLoader(dataset, batch_size, sampler=sampler))
