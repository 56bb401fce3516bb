"""Orders that are a function of (seed, epoch), that can be entered anywhere and shared over processes."""

import itertools

import datasets
import pytest
import torch
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from retouch.core.batches import InTurn, Ready, Sampled, Shuffled, Streamed, Together, as_batches, in_order
from retouch.core.data import TensorData
from retouch.core.errors import InputError
from retouch.core.models import first_tensor, size_of

N = 11
X = torch.arange(N * 1.0).view(N, 1)  # sample i is the number i, so a batch says which samples it holds
Y = torch.arange(N) % 3


class Counting(Dataset):
    """Remembers which samples were read."""

    def __init__(self):
        self.read = []

    def __len__(self):
        return N

    def __getitem__(self, index):
        self.read.append(index)
        return X[index], Y[index]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(X, Y, strict=True))


class Pairs:
    """A user's own batch sampler: sample i with sample i + 1, last ones first."""

    def __init__(self):
        self.epochs = []

    def __len__(self):
        return N - 1

    def __iter__(self):
        return iter([[i, i + 1] for i in reversed(range(N - 1))])

    def set_epoch(self, epoch):
        self.epochs.append(epoch)


def rows(batch):
    return first_tensor(batch).view(-1).int().tolist()


def read(source, epoch=0, **position):
    """Rows of every batch of an epoch."""
    return [rows(batch) for batch, _, _ in source.epoch(epoch, **position)]


def ordered(batches):
    """All rows of some batches, sorted."""
    return sorted(itertools.chain.from_iterable(batches))


SOURCES = {
    "tensors": lambda: as_batches((X, Y), 3),
    "TensorDataset": lambda: as_batches(TensorDataset(X, Y), 3),
    "Subset of TensorData": lambda: as_batches(Subset(TensorData(X, Y), range(N)), 3),
    "Subset of a Subset": lambda: as_batches(Subset(Subset(TensorData(X, Y), range(N)), range(N)), 3),
    "ConcatDataset": lambda: as_batches(ConcatDataset([TensorData(X[:4], Y[:4]), TensorDataset(X[4:], Y[4:])]), 3),
    "mapping": lambda: as_batches(TensorData({"x": X}, Y), 3),
    "datasets.Dataset": lambda: as_batches(
        datasets.Dataset.from_dict({"x": X.tolist(), "label": Y.tolist()}).with_format("torch"), 3
    ),
    "shuffled loader": lambda: as_batches(DataLoader(TensorDataset(X, Y), 3, shuffle=True)),
    "sequential loader": lambda: as_batches(DataLoader(TensorDataset(X, Y), 3)),
    "list": lambda: as_batches([(X[:3], Y[:3]), {"x": X[3:6], "label": Y[3:6]}, (X[6:9], Y[6:9]), (X[9:], Y[9:])]),
}


@pytest.fixture(params=SOURCES)
def source(request):
    return SOURCES[request.param]()


def test_an_epoch_has_every_sample_once_with_its_label(source, global_rng_untouched):
    assert len(source) == 4
    batches = list(source.epoch(0))
    assert ordered(rows(batch) for batch, _, _ in batches) == list(range(N))
    assert [size_of(batch) for batch, _, _ in batches] == [3, 3, 3, 2]
    assert [(local, total) for _, local, total in batches] == [(3, 3), (3, 3), (3, 3), (2, 2)]
    for batch, _, _ in batches:
        labels = batch["label"] if isinstance(batch, dict) else batch[1]
        assert torch.equal(labels, Y[rows(batch)])


def test_an_epoch_can_be_entered_at_any_batch(source):
    for epoch in (0, 3):
        whole = read(source, epoch)
        assert [read(source, epoch, start=start) for start in range(5)] == [whole[start:] for start in range(5)]


@pytest.mark.parametrize("world", [2, 3, 5])
def test_processes_share_every_batch(source, world):
    whole = list(source.epoch(1))
    parts = [list(source.epoch(1, rank=rank, world=world)) for rank in range(world)]
    for number, (batch, _, size) in enumerate(whole):
        of_batch = [part[number] for part in parts]
        assert [row for b, local, _ in of_batch for row in rows(b)[:local]] == rows(batch)
        assert all(total == size for _, _, total in of_batch)
        sizes = [local for _, local, _ in of_batch]
        assert sum(sizes) == size
        assert max(sizes) - min(sizes) <= 1
        assert all(size_of(b) == max(local, 1) for b, local, _ in of_batch), "a process without a sample borrows one"


def test_a_process_enters_an_epoch_where_the_others_do():
    source = as_batches((X, Y), 3)
    assert read(source, 2, start=2, rank=1, world=2) == read(source, 2, rank=1, world=2)[2:]


def test_the_order_is_a_function_of_seed_and_epoch(global_rng_untouched):
    source, again = Shuffled((X, Y), 3, seed=1), Shuffled((X, Y), 3, seed=1)
    orders = [read(source, epoch) for epoch in range(4)]
    assert [read(again, epoch) for epoch in reversed(range(4))] == orders[::-1]
    assert len({str(order) for order in orders}) == 4
    assert read(Shuffled((X, Y), 3, seed=2)) != orders[0]


def test_without_shuffling_samples_keep_their_order():
    assert read(Shuffled((X, Y), 4, shuffle=False), 5) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]


def test_skipped_samples_and_those_of_other_processes_are_not_read():
    data = Counting()
    source = Shuffled(data, 4, shuffle=False)
    read(source, start=2)
    assert data.read == [8, 9, 10]
    data.read.clear()
    read(source, start=1, rank=0, world=2)
    assert data.read == [4, 5, 8]


def test_samples_are_read_only_when_their_batch_is_asked_for():
    data = Counting()
    batches = Shuffled(data, 4, shuffle=False).epoch(0)
    next(batches)
    assert data.read == [0, 1, 2, 3]


def test_drop_last_leaves_out_a_batch_that_is_not_full():
    source = Shuffled((X, Y), 4, drop_last=True)
    assert len(source) == 2
    assert [len(batch) for batch in read(source)] == [4, 4]
    assert len(Shuffled((X, Y), N, drop_last=True)) == 1


def test_worker_processes_read_the_same_batches():
    plain, working = (Shuffled(TensorDataset(X, Y), 4, seed=3, workers=workers) for workers in (0, 2))
    assert read(working, 1, start=1) == read(plain, 1, start=1)
    assert read(working, 1, rank=1, world=2) == read(plain, 1, rank=1, world=2)


@pytest.mark.parametrize("size", [0, -2])
def test_a_batch_size_that_is_not_positive_is_refused(size):
    with pytest.raises(InputError, match=f"batch_size is {size}, but must be greater than 0"):
        as_batches((X, Y), size)


def test_data_that_cannot_be_batched_is_refused():
    with pytest.raises(InputError, match="The data is a int"):
        as_batches(3)


def test_batches_stay_what_they_are():
    source = Ready([(X, Y)])
    assert as_batches(source) is source


# --- loaders --------------------------------------------------------------------------------------------------------


def test_a_shuffled_loader_is_put_in_our_order():
    loader = DataLoader(TensorDataset(X, Y), 3, shuffle=True)
    assert read(as_batches(loader, 64, seed=4), 1) == read(Shuffled((X, Y), 3, seed=4), 1)
    assert read(as_batches(loader, seed=5), 1) != read(as_batches(loader, seed=4), 1)


def test_a_sequential_loader_keeps_its_order_and_its_settings():
    loader = DataLoader(TensorDataset(X, Y), 4, drop_last=True, num_workers=2)
    source = as_batches(loader)
    assert source.workers == 2
    assert read(source, 3) == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize("data", [TensorDataset(X, Y), TensorData(X, Y)], ids=["TensorDataset", "TensorData"])
def test_a_loader_keeps_its_collate_function(data):
    def collate(samples):
        inputs, targets = default_collate(samples)
        return {"x": inputs + 100, "labels": targets}

    source = as_batches(DataLoader(data, 4, collate_fn=collate))
    assert read(source)[0] == [100, 101, 102, 103]


def test_a_batch_sampler_keeps_its_order_and_is_told_the_epoch(global_rng_untouched):
    sampler = Pairs()
    source = as_batches(DataLoader(TensorDataset(X, Y), batch_sampler=sampler))
    assert isinstance(source, Sampled)
    assert len(source) == N - 1
    assert read(source, 7, start=8) == [[1, 2], [0, 1]]
    assert sampler.epochs[-1] == 7
    assert read(source, rank=1, world=2)[0] == [10]


def test_a_random_sampler_of_the_users_own_is_seeded_by_us(global_rng_untouched):
    def source(seed):
        weights = [0.0, 0.0, *[1.0] * (N - 2)]
        return as_batches(DataLoader(TensorDataset(X, Y), 5, sampler=WeightedRandomSampler(weights, 20)), seed=seed)

    first = source(1)
    assert [len(batch) for batch in read(first)] == [5, 5, 5, 5]
    assert {0, 1}.isdisjoint(ordered(read(first)))
    assert read(first, 2) == read(source(1), 2)
    assert read(first, 0) != read(first, 1)
    assert read(first) != read(source(2))


def test_sampling_with_replacement_stays_so():
    sampler = RandomSampler(range(N), replacement=True, num_samples=40)
    drawn = read(as_batches(DataLoader(TensorDataset(X, Y), 8, sampler=sampler)))
    assert [len(batch) for batch in drawn] == [8] * 5


def test_a_random_sampler_of_a_part_of_the_data_stays_so():
    sampler = RandomSampler(range(N), num_samples=4)
    source = as_batches(DataLoader(TensorDataset(X, Y), 2, sampler=sampler))
    assert len(source) == 2
    assert len(set(ordered(read(source)))) == 4


def test_a_sequential_sampler_of_a_part_of_the_data_stays_so():
    source = as_batches(DataLoader(TensorDataset(X, Y), 2, sampler=SequentialSampler(range(4))))
    assert read(source) == [[0, 1], [2, 3]]


def test_a_loader_over_ready_batches_gives_them():
    generators = torch.get_rng_state()
    ready = [(X[:4], Y[:4]), (X[4:], Y[4:])]
    source = as_batches(DataLoader(ready, batch_size=None, shuffle=True))
    batches = list(source.epoch(0))
    assert sorted(local for _, local, _ in batches) == [4, 7]
    for (inputs, targets), _, _ in batches:
        assert torch.equal(Y[inputs.view(-1).long()], targets)
    assert torch.equal(torch.get_rng_state(), generators)


# --- several data sets ----------------------------------------------------------------------------------------------


def parts():
    return {"forget": (X[:4], Y[:4]), "retain": (X[4:], Y[4:])}


def columns(source, epoch=0, **position):
    """Rows of every part's batches."""
    found = [batch for batch, _, _ in source.epoch(epoch, **position)]
    return {name: [rows(batch[name]) for batch in found] for name in source.parts}


def test_together_gives_a_batch_of_every_part_and_ends_with_the_longest(global_rng_untouched):
    source = Together(parts(), 2)
    assert len(source) == 4
    read = columns(source)
    assert ordered(read["retain"]) == [4, 5, 6, 7, 8, 9, 10]
    assert ordered(read["forget"][:2]) == ordered(read["forget"][2:]) == [0, 1, 2, 3]
    assert [(local, total) for _, local, total in source.epoch(0)] == [(4, 4), (4, 4), (4, 4), (3, 3)]


def test_together_without_cycling_ends_with_the_shortest():
    source = Together(parts(), 2, cycle=False)
    assert len(source) == 2
    read = columns(source)
    assert ordered(read["forget"]) == [0, 1, 2, 3]
    assert len(ordered(read["retain"])) == 4


def test_every_round_of_a_short_part_has_an_order_of_its_own():
    short, long = (X[:5], Y[:5]), (torch.arange(20.0), None)
    source = Together({"short": short, "long": TensorData(*long)}, 1)
    seen = [columns(source, epoch)["short"] for epoch in range(3)]
    rounds = [str(read[start : start + 5]) for read in seen for start in range(0, 20, 5)]
    assert len(set(rounds)) > 10


def test_parts_have_orders_of_their_own():
    source = Together({"a": (X, Y), "b": (X, Y)}, 3)
    read = columns(source)
    assert read["a"] != read["b"]
    assert columns(Together({"a": (X, Y), "b": (X, Y)}, 3)) == read
    assert columns(Together({"a": (X, Y), "b": (X, Y)}, 3, seed=1)) != read


def test_together_can_be_entered_anywhere_and_shared():
    source = Together(parts(), 2)
    whole = columns(source, 3)
    assert columns(source, 3, start=3) == {name: batches[3:] for name, batches in whole.items()}
    shared = [columns(source, 3, rank=rank, world=2) for rank in range(2)]
    for number in range(3):  # the last batch of retain has one sample
        for name in whole:
            assert shared[0][name][number] + shared[1][name][number] == whole[name][number]


def test_parts_may_be_loaders_lists_and_together_themselves():
    inner = Together(parts(), 2)
    loader = DataLoader(TensorDataset(X, Y), 6)
    source = Together({"inner": inner, "loader": loader, "list": [(X[:1], Y[:1])]}, 2)
    assert len(source) == 4
    batch, local, total = next(source.epoch(0))
    assert batch["inner"].keys() == {"forget", "retain"}
    assert rows(batch["loader"]) == [0, 1, 2, 3, 4, 5]
    assert rows(batch["list"]) == [0]
    assert (local, total) == (2 + 2 + 6 + 1, 2 + 2 + 6 + 1)


def test_in_turn_gives_all_of_one_part_and_then_all_of_the_next():
    source = InTurn(parts(), 2)
    assert len(source) == 2 + 4
    batches = [batch for batch, _, _ in source.epoch(1)]
    assert [list(batch) for batch in batches] == [["forget"]] * 2 + [["retain"]] * 4
    assert ordered(rows(batch["forget"]) for batch in batches[:2]) == [0, 1, 2, 3]
    assert ordered(rows(batch["retain"]) for batch in batches[2:]) == [4, 5, 6, 7, 8, 9, 10]
    assert [list(batch) for batch, _, _ in source.epoch(1, start=1)] == [["forget"]] + [["retain"]] * 4
    assert [total for _, _, total in source.epoch(0)] == [2, 2, 2, 2, 2, 1]


@pytest.mark.parametrize("kind", [Together, InTurn])
@pytest.mark.parametrize("empty", [(X[:0], Y[:0]), []], ids=["tensors", "list"])
def test_an_empty_part_is_refused_by_name(kind, empty):
    with pytest.raises(InputError, match="The forget data is empty"):
        kind({"forget": empty, "retain": (X, Y)})


def test_a_stream_as_a_part_is_refused_by_name():
    with pytest.raises(InputError, match="The retain data is a stream"):
        Together({"forget": (X, Y), "retain": Stream()})


# --- streams and single passes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [Stream(), DataLoader(Stream(), 4)], ids=["stream", "loader"])
def test_a_stream_is_batched_entered_and_shared(data):
    source = as_batches(data, 4)
    assert isinstance(source, Streamed)
    assert read(source) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert read(source, 1, start=2) == [[8, 9, 10]]
    assert read(source, rank=0, world=2) == [[0, 1], [4, 5], [8]]
    assert [(local, total) for _, local, total in source.epoch(0, rank=1, world=2)] == [(2, 4), (2, 4), (2, 3)]


def test_a_stream_has_no_length():
    with pytest.raises(InputError, match="a stream without a length"):
        len(as_batches(Stream()))


def test_in_order_goes_through_data_once_and_again():
    for data in ((X, Y), TensorDataset(X, Y), Counting(), X, Stream()):
        batches = in_order(data, 4)
        for _ in range(2):
            assert [rows(batch) for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert len(in_order((X, Y), 4)) == 3


def test_in_order_gives_every_sample_of_a_loader_in_its_sizes(global_rng_untouched):
    loader = DataLoader(TensorDataset(X, Y), 4, shuffle=True, drop_last=True)
    for _ in range(2):
        assert [rows(batch) for batch in in_order(loader)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]


def test_in_order_gives_lists_back():
    ready = [(X, Y)]
    assert in_order(ready) is ready
