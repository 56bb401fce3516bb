"""RS2: fresh subsets every round, each a function of (seed, round), with every sample used equally often."""

import itertools

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from retouch.core.batches import as_batches
from retouch.core.errors import InputError
from retouch.core.loop import Checkpoint, fit
from retouch.train.rs2 import RepeatedRandomSampler, recipe, rs2_subset, steps_per_run, stratified_subset


def rounds(sampler, count):
    return [sampler.subset(epoch).tolist() for epoch in range(count)]


def joined(parts):
    return list(itertools.chain.from_iterable(parts))


def sampler(n=20, fraction=0.25, **settings):
    return RepeatedRandomSampler(n, fraction, **settings)


# --- without replacement --------------------------------------------------------------------------------------------


def test_the_whole_share_is_an_ordinary_epoch():
    found = rounds(sampler(20, 1.0), 3)
    assert all(sorted(rows) == list(range(20)) for rows in found)
    assert found[0] != found[1] != found[2]


def test_rounds_of_a_pass_cut_the_data_into_parts():
    found = rounds(sampler(20, 0.25), 8)
    for start in (0, 4):
        assert sorted(joined(found[start : start + 4])) == list(range(20))
    assert found[:4] != found[4:]


@pytest.mark.parametrize("fraction", [0.07, 0.13, 0.3, 0.45, 0.55, 0.7, 0.95])
@pytest.mark.parametrize("n", [10, 23])
def test_carried_rounds_are_full_without_repeats_and_use_all_samples_alike(n, fraction):
    size = round(fraction * n)
    if size == 0:
        pytest.skip("no sample a round")
    counts = torch.zeros(n)
    for number, rows in enumerate(rounds(sampler(n, fraction), 60), start=1):
        assert len(rows) == len(set(rows)) == size
        assert 0 <= min(rows) <= max(rows) < n
        counts[rows] += 1
        within = 1 if (number * size) % n == 0 or size <= n // 2 else 2
        assert counts.max() - counts.min() <= within, number


def test_whole_passes_use_every_sample_equally_often():
    counts = torch.zeros(10)
    for rows in rounds(sampler(10, 0.3), 10):  # three passes
        counts[rows] += 1
    assert counts.tolist() == [3.0] * 10


def test_dropped_remainders_are_left_out():
    found = rounds(sampler(10, 0.3, remainder="drop"), 6)
    for start in (0, 3):
        assert len(set(joined(found[start : start + 3]))) == 9


@pytest.mark.parametrize("fraction", [0.25, 0.7])
@pytest.mark.parametrize("settings", [{}, {"remainder": "drop"}, {"replacement": True}])
def test_a_round_does_not_depend_on_the_ones_gone_through(fraction, settings):
    walked = rounds(sampler(11, fraction, **settings), 12)
    for epoch in (11, 4, 7, 0):
        assert sampler(11, fraction, **settings).subset(epoch).tolist() == walked[epoch]
    back = sampler(11, fraction, **settings)
    assert [back.subset(epoch).tolist() for epoch in (9, 3, 10)] == [walked[9], walked[3], walked[10]]


def test_where_the_share_divides_the_data_all_remainders_agree():
    assert rounds(sampler(20, 0.25), 9) == rounds(sampler(20, 0.25, remainder="drop"), 9)


# --- with replacement -----------------------------------------------------------------------------------------------


def test_rounds_with_replacement_overlap_as_chance_has_it():
    found = rounds(sampler(400, 0.25, replacement=True), 40)
    overlaps = [len(set(one) & set(two)) for one, two in zip(found[::2], found[1::2], strict=True)]
    mean, deviation = 25.0, (100 * 0.25 * 0.75 * 300 / 399) ** 0.5
    assert abs(sum(overlaps) / 20 - mean) < 5 * deviation / 20**0.5
    assert all(len(set(rows)) == 100 for rows in found)


@pytest.mark.parametrize("fraction", [0.1, 0.35, 0.5])
def test_balanced_rounds_take_the_same_share_of_each_class(fraction):
    labels = torch.tensor([0] * 15 + [1] * 25 + [2] * 60)
    rows = stratified_subset(labels, fraction, generator=torch.Generator().manual_seed(0))
    assert len(rows.unique()) == len(rows)
    assert torch.bincount(labels[rows]).tolist() == [round(fraction * count) for count in (15, 25, 60)]
    found = sampler(100, fraction, replacement=True, labels=labels).subset(3)
    assert torch.bincount(labels[found]).tolist() == [round(fraction * count) for count in (15, 25, 60)]


def test_tiny_shares_take_one_of_each_class_first():
    labels = torch.arange(10).repeat_interleave(20)
    for seed in range(5):
        draw = torch.Generator().manual_seed(seed)
        assert sorted(labels[stratified_subset(labels, 0.05, generator=draw)].tolist()) == list(range(10))
        few = labels[stratified_subset(labels, 0.02, generator=draw)]
        assert len(few) == len(few.unique()) == 4
        uneven = torch.tensor([0] * 5 + [1] * 100)
        assert torch.bincount(uneven[stratified_subset(uneven, 0.05, generator=draw)]).tolist()[0] >= 1


# --- as a sampler ---------------------------------------------------------------------------------------------------


def test_a_round_is_gone_through_in_an_order_of_its_own(global_rng_untouched):
    chosen = sampler(20, 0.5)
    chosen.set_epoch(3)
    order = list(chosen)
    assert sorted(order) == sorted(chosen.subset(3).tolist())
    assert order == list(chosen)
    assert len(chosen) == 10
    chosen.set_epoch(4)
    assert list(chosen) != order


def test_ranks_share_a_round_evenly_and_disjointly():
    parts = []
    for rank in range(3):
        part = sampler(20, 0.5, rank=rank, world_size=3)
        assert len(list(part)) == len(part)
        parts.append(list(part))
    assert sorted(joined(parts)) == sorted(sampler(20, 0.5).subset(0).tolist())
    assert sorted(map(len, parts)) == [3, 3, 4]


def test_seeds_decide():
    assert rounds(sampler(seed=1), 4) == rounds(sampler(seed=1), 4) != rounds(sampler(seed=2), 4)


def test_state_round_trips():
    one, two = sampler(20, 0.3, seed=5), sampler(20, 0.3, seed=6)
    one.set_epoch(7)
    two.load_state_dict(one.state_dict())
    assert list(two) == list(one)
    assert two.subset(2).tolist() == one.subset(2).tolist()


def test_fit_tells_the_epoch_and_resumes_exactly(tmp_path):
    data = TensorDataset(torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 2)

    def loader():
        return DataLoader(data, 4, sampler=sampler(20, 0.5))

    source = as_batches(loader())
    assert len(source) == 3
    seen = [joined(batch[0].tolist() for batch, _, _ in source.epoch(epoch)) for epoch in range(2)]
    assert sorted(seen[0] + seen[1]) == sorted(data.tensors[0].tolist())

    def model():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return torch.nn.Linear(3, 2)

    whole, resumed = model(), model()
    fit(whole, loader(), steps=9)
    for steps in (4, 9):
        fit(resumed, loader(), steps=steps, checkpoint=Checkpoint(tmp_path, 2))
    assert torch.equal(whole.weight, resumed.weight)


def test_recipe_trains_a_real_vit(tiny_vit, digits_small):
    plan = recipe(tiny_vit, digits_small.train, fraction=0.1, batch_size=8)
    _, history = plan.fit(epochs=2)
    assert len(history) == 6  # 24 of 240 samples an epoch


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [((100, 0.1, 5, 4, True), 10), ((100, 0.1, 5, 4, False), 15), ((10, 1.0, 2, 64, False), 2)],
)
def test_steps_of_a_run(arguments, expected):
    *numbers, drop_last = arguments
    assert steps_per_run(*numbers, drop_last=drop_last) == expected


def test_a_part_of_a_shuffling():
    order = torch.arange(10).flip(0)
    assert rs2_subset(order, 1, subset_size=3).tolist() == [6, 5, 4]
    assert rs2_subset(order, 3, subset_size=3).tolist() == [0]
    with pytest.raises(InputError, match="round is 4, but this shuffling has rounds 0 to 3"):
        rs2_subset(order, 4, subset_size=3)


BAD = {
    "no share": ({"fraction": 0.0}, r"fraction is 0\.0, but must be greater than 0"),
    "too much": ({"fraction": 1.5}, r"fraction is 1\.5, but must be greater than 0 and at most 1"),
    "empty": ({"fraction": 0.01}, r"fraction is 0\.01, but must give at least one of the 20 samples"),
    "labels": (
        {"replacement": True, "labels": torch.zeros(3)},
        "labels has 3 entries, but must have one for each of 20",
    ),
    "labels alone": ({"labels": torch.zeros(20)}, "labels is given, but must be None without replacement"),
    "remainder": ({"remainder": "keep"}, "remainder is 'keep', but must be one of 'carry', 'drop'"),
    "rank": ({"rank": 2, "world_size": 2}, "rank is 2, but must be at least 0 and less than 2"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_refused(kind):
    changes, message = BAD[kind]
    with pytest.raises(InputError, match=message):
        RepeatedRandomSampler(**{"num_samples": 20, **changes})


def test_a_negative_epoch_is_refused():
    with pytest.raises(InputError, match="epoch is -1, but must be at least 0"):
        sampler().set_epoch(-1)
    with pytest.raises(InputError, match=r"fraction is 2, but must be"):
        stratified_subset(torch.zeros(4), 2)
