"""Samples into batches, in an order that can be resumed and shared over processes.

`in_order(data)` goes through data once. `as_batches(data)` makes what `fit` trains on: the order of epoch e is a
function of (seed, e) alone, so a resumed run skips what it has seen and no order is stored. `Together` and `InTurn`
feed several data sets to one objective, as unlearning needs. A list is taken as ready-made batches.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)

from retouch.core import seeds
from retouch.core.data import TensorData, as_dataset, collate
from retouch.core.errors import InputError, positive
from retouch.core.models import Batch, rows_of, size_of


class Batches(ABC):
    """What `fit` reads from: the batches of epoch e, from any number on, shared over processes."""

    @abstractmethod
    def __len__(self) -> int:
        """Batches an epoch."""

    @abstractmethod
    def epoch(self, epoch: int, *, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[tuple[Batch, float, int]]:
        """Batches from number `start` on, as (this process's batch, samples it weighs, samples over all processes)."""


class Planned(Batches):
    """Batches of an epoch as a plan: a list of items, each saying what to fetch for one batch.

    Because the plan is known before anything is read, batches are skipped on resuming and split over processes without
    loading them.
    """

    workers = 0

    @abstractmethod
    def plan(self, epoch: int) -> list[Any]:
        """The items of an epoch, in order."""

    @abstractmethod
    def fetch(self, item: Any) -> Batch:
        """The batch for one item."""

    @abstractmethod
    def split(self, item: Any, rank: int, world: int) -> tuple[Any, float, int]:
        """Process `rank`'s part of an item, the number of samples that it weighs, and that of the whole item.

        A batch of fewer samples than processes leaves some with one sample that counts as none.
        """

    def epoch(self, epoch: int, *, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[tuple[Batch, float, int]]:
        parts = [self.split(item, rank, world) for item in self.plan(epoch)[start:]]
        if self.workers:
            fetched: Iterable[Batch] = DataLoader(
                _Fetcher(self),
                sampler=[p[0] for p in parts],
                batch_size=None,
                num_workers=self.workers,
                collate_fn=_same,
                generator=torch.Generator().manual_seed(
                    epoch
                ),  # of the workers' seeds; else the global one is drawn from
            )
        else:
            fetched = (self.fetch(item) for item, _, _ in parts)
        for batch, (_, local, total) in zip(fetched, parts, strict=True):
            yield batch, local, total


def _same(value: Any) -> Any:
    return value


class _Fetcher(Dataset[Any]):
    """Lets torch's worker processes fetch the items of a plan."""

    def __init__(self, source: Planned) -> None:
        self.source = source

    def __getitem__(self, item: Any) -> Batch:
        return self.source.fetch(item)


def _split_rows(rows: Any, rank: int, world: int) -> tuple[Any, int, int]:
    """Contiguous part `rank` of `world` of a list of rows."""
    if world == 1:
        return rows, len(rows), len(rows)
    start, stop = rank * len(rows) // world, (rank + 1) * len(rows) // world
    return (rows[start:stop], stop - start, len(rows)) if stop > start else (rows[:1], 0, len(rows))


class Shuffled(Planned):
    """Batches of a data set in a new order every epoch.

    Args:
        data: samples to index.
        batch_size: samples a batch, over all processes together.
        shuffle: draw an order for every epoch from (seed, epoch); otherwise keep the data's own.
        seed: where the order comes from.
        drop_last: leave out a last batch that is not full.
        collate: how a list of samples becomes a batch.
        workers: worker processes that read the samples. Random transforms inside of them resume exactly only at the
            start of an epoch; without workers they do at every step.
    """

    def __init__(
        self,
        data: Any,
        batch_size: int = 64,
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        collate: Callable[[Any], Any] = collate,
        workers: int = 0,
    ) -> None:
        positive("batch_size", batch_size)
        self.data, self.batch_size, self.shuffle, self.seed = as_dataset(data), batch_size, shuffle, seed
        self.drop_last, self.workers, self.collate = drop_last, workers, collate

    def __len__(self) -> int:
        whole, rest = divmod(len(self.data), self.batch_size)
        return whole + (1 if rest and not self.drop_last else 0)

    def plan(self, epoch: int) -> list[Any]:
        n = len(self.data)
        order = (
            torch.randperm(n, generator=seeds.generator(self.seed, "order", epoch)) if self.shuffle else torch.arange(n)
        )
        return list(order.split(self.batch_size))[: len(self)]

    def fetch(self, item: Any) -> Batch:
        if isinstance(self.data, TensorData) and self.collate is collate:
            return self.data[torch.as_tensor(item)]  # a batch is one indexing operation
        rows = torch.as_tensor(item).tolist()
        if hasattr(self.data, "__getitems__"):
            return self.collate(self.data.__getitems__(rows))
        return self.collate([self.data[i] for i in rows])

    def split(self, item: Any, rank: int, world: int) -> tuple[Any, int, int]:
        return _split_rows(item, rank, world)


class Sampled(Shuffled):
    """Batches in the order of a user's own batch sampler, asked for anew at every epoch under a seed of ours."""

    def __init__(self, data: Any, batch_sampler: Any, **options: Any) -> None:
        super().__init__(data, **options)
        self.batch_sampler = batch_sampler

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def plan(self, epoch: int) -> list[Any]:
        for sampler in (self.batch_sampler, getattr(self.batch_sampler, "sampler", None)):
            if sampler is not None and hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
        with seeds.isolated(seeds.derive(self.seed, "order", epoch)):
            return [list(rows) for rows in self.batch_sampler]


class Ready(Planned):
    """A list of ready-made batches, in the list's order."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def plan(self, epoch: int) -> list[Any]:
        return [(number, None) for number in range(len(self.batches))]

    def fetch(self, item: Any) -> Batch:
        number, rows = item
        return self.batches[number] if rows is None else rows_of(self.batches[number], rows.start, rows.stop)

    def split(self, item: Any, rank: int, world: int) -> tuple[Any, int, int]:
        size = size_of(self.batches[item[0]])
        if world == 1:
            return item, size, size
        rows, local, total = _split_rows(range(size), rank, world)
        return (item[0], rows), local, total


class Together(Planned):
    """One batch of every part at a time: {"forget": batch, "retain": batch}.

    The epoch ends with the longest part, the shorter ones begin anew (in a new order); with `cycle=False` it ends with
    the shortest.

    Args:
        parts: data sets by name, each anything that `as_batches` takes.
        batch_size: samples of every part in a batch.
        cycle: let the longest part decide.
        seed: where the orders come from; every part has its own.
    """

    def __init__(self, parts: Mapping[str, Any], batch_size: int = 64, *, cycle: bool = True, seed: int = 0) -> None:
        self.parts = _named_batches(parts, batch_size, seed)
        self.cycle = cycle

    def __len__(self) -> int:
        return (max if self.cycle else min)(len(part) for part in self.parts.values())

    def plan(self, epoch: int) -> list[Any]:
        def items(part: Planned) -> Iterator[Any]:
            rounds = -(-len(self) // len(part))
            yield from itertools.chain.from_iterable(part.plan(epoch * rounds + r) for r in range(rounds))

        columns = {name: list(itertools.islice(items(part), len(self))) for name, part in self.parts.items()}
        return [{name: column[k] for name, column in columns.items()} for k in range(len(self))]

    def fetch(self, item: Any) -> Batch:
        return {name: self.parts[name].fetch(sub) for name, sub in item.items()}

    def split(self, item: Any, rank: int, world: int) -> tuple[Any, float, int]:
        if len(item) == 1:
            ((name, sub),) = item.items()
            part, local, total = self.parts[name].split(sub, rank, world)
            return {name: part}, local, total
        # A process weighs all its parts alike, so they must all be split evenly; one that cannot be goes to each whole.
        sizes = {name: self.parts[name].split(sub, 0, 1)[2] for name, sub in item.items()}
        even = {name: sub for name, sub in item.items() if sizes[name] % world == 0}
        split = {name: self.parts[name].split(sub, rank, world)[0] for name, sub in even.items()}
        total = sum(sizes.values())
        return {name: split.get(name, sub) for name, sub in item.items()}, total / world, total


class InTurn(Together):
    """All batches of the first part, then all of the next: {"forget": batch}, ..., {"retain": batch}, ..."""

    def __init__(self, parts: Mapping[str, Any], batch_size: int = 64, *, seed: int = 0) -> None:
        super().__init__(parts, batch_size, seed=seed)

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts.values())

    def plan(self, epoch: int) -> list[Any]:
        return [{name: item} for name, part in self.parts.items() for item in part.plan(epoch)]


def _named_batches(parts: Mapping[str, Any], batch_size: int, seed: int) -> dict[str, Planned]:
    named = {}
    for name, data in parts.items():
        part = as_batches(data, batch_size, seed=seeds.derive(seed, name))
        if not isinstance(part, Planned):
            raise InputError(f"The {name} data is a stream, but must have a length to be taken with other data")
        if len(part) == 0:
            raise InputError(f"The {name} data is empty, but must have at least one sample")
        named[name] = part
    return named


class Streamed(Batches):
    """Batches as a loader gives them; resuming reads past what was seen, and processes share each batch."""

    def __init__(self, loader: DataLoader[Any], *, seed: int = 0) -> None:
        self.loader, self.seed = loader, seed

    def __len__(self) -> int:
        if isinstance(self.loader.dataset, IterableDataset):
            raise InputError("The data is a stream without a length, so epochs cannot be counted: give fit steps=...")
        return len(self.loader)

    def epoch(self, epoch: int, *, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[tuple[Batch, float, int]]:
        with seeds.isolated(seeds.derive(self.seed, "order", epoch)):  # a loader draws when it starts
            batches = iter(self.loader)
            first = list(itertools.islice(batches, start, start + 1))
        for batch in itertools.chain(first, batches):
            rows, local, total = _split_rows(range(size_of(batch)), rank, world)
            yield (batch if world == 1 else rows_of(batch, rows.start, rows.stop)), local, total


def as_batches(data: Any, batch_size: int = 64, *, seed: int = 0, shuffle: bool = True) -> Batches:
    """Batches for training, from any kind of data.

    A DataLoader keeps its batch size, collate function and workers. Shuffled and sequential loaders are put in order by
    us (seeded, resumable); a sampler of the user's own keeps its order. One with `batch_size=None` gives ready batches.
    """
    if isinstance(data, Batches):
        return data
    if isinstance(data, list):
        return Ready(data)
    if isinstance(data, DataLoader):
        loader = data
        if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
            return Streamed(loader, seed=seed)
        own = loader.collate_fn is not default_collate
        options: dict[str, Any] = {"seed": seed, "workers": loader.num_workers}
        options["collate"] = loader.collate_fn if own else collate
        sampler: Any = loader.sampler
        random = type(sampler) is RandomSampler and not sampler.replacement
        ordered = random or type(sampler) is SequentialSampler
        if loader.batch_size and ordered and len(sampler) == len(as_dataset(loader)):
            drop_last = loader.drop_last
            return Shuffled(loader.dataset, loader.batch_size, shuffle=random, drop_last=drop_last, **options)
        return Sampled(loader.dataset, loader.batch_sampler, **options)
    if isinstance(data, IterableDataset):
        return Streamed(DataLoader(data, batch_size), seed=seed)
    return Shuffled(data, batch_size, shuffle=shuffle, seed=seed)


def in_order(data: Any, batch_size: int = 256) -> Iterable[Batch]:
    """Every sample once, in the data's own order: a loader's sizes are kept and its shuffling is not.

    A list of batches is given back, and a sampler of the user's own keeps its order.
    """
    if isinstance(data, list):
        return data
    source = as_batches(data, batch_size, shuffle=False)
    if isinstance(source, Shuffled):
        source.shuffle = source.drop_last = False
    return _InOrder(source)


class _InOrder:
    """An epoch that can be gone through again."""

    def __init__(self, source: Batches) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[Batch]:
        return (batch for batch, _, _ in self.source.epoch(0))
