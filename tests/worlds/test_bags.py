"""The world `bags`: labels that follow from known key instances, padding that means nothing, splits without overlap."""

import pytest
import torch

from retouch.core.errors import InputError
from retouch.worlds import bags, digits, names, world


@pytest.fixture(scope="module")
def train():
    return bags.data("train")


def test_it_is_a_world_of_its_own_kind():
    assert "bags" in names()
    assert world("bags").KIND == "bags"
    assert world("bags").VARIANTS == ()


@pytest.mark.parametrize("split", bags.SPLITS)
def test_forms(split):
    data = bags.data(split)
    (inputs, label), n = data[0], bags.SPLITS[split]
    longest = data.inputs["mask"].shape[1]
    assert data.inputs["bag"].shape == (n, longest, 64)
    assert data.keys.shape == data.inputs["mask"].shape == (n, longest)
    assert inputs["bag"].shape == (longest, 64)
    assert label in (0, 1)
    assert len(data) == n
    assert int(data.targets.sum()) == n // 2


def test_labels_follow_from_the_keys_and_keys_from_the_digits(train):
    source = digits.data("train")
    numbers = {image.numpy().tobytes(): int(digit) for image, digit in zip(source.inputs, source.targets, strict=True)}
    assert torch.equal(train.targets, train.keys.any(1).long())
    sizes, found = train.inputs["mask"].sum(1), train.keys.sum(1)
    assert sizes.min() >= 40
    assert sizes.max() <= 80
    assert set(found.tolist()) == {0, 3, 4, 5, 6, 7, 8}
    for number in range(20):
        valid = train.inputs["mask"][number]
        drawn = [numbers[image.numpy().tobytes()] for image in train.inputs["bag"][number, valid]]
        assert torch.equal(torch.tensor(drawn) == 9, train.keys[number, valid])


def test_padding_is_zero_and_no_key(train):
    mask = train.inputs["mask"]
    assert not train.inputs["bag"][~mask].any()
    assert not train.keys[~mask].any()
    assert train.inputs["bag"][mask].any(-1).all()
    assert torch.equal(mask, mask.long().cummin(1).values.bool())  # valid instances come first


def test_no_digit_is_twice_in_a_bag(train):
    for number in range(20):
        drawn = train.inputs["bag"][number, train.inputs["mask"][number]]
        assert len(drawn.unique(dim=0)) >= len(drawn) - 1  # two of the data's own images may be alike


def test_keys_are_anywhere_in_a_bag(train):
    places = train.keys.nonzero()[:, 1].double()
    assert 15 < places.mean() < 45


def test_bags_of_different_splits_share_no_digit():
    drawn = [bags.data(split, count=20) for split in ("train", "test")]
    sets = [{image.numpy().tobytes() for image in data.inputs["bag"][data.inputs["mask"]]} for data in drawn]
    assert not sets[0] & sets[1]


def test_bags_depend_on_the_seed_alone(global_rng_untouched):
    one, same, other = (bags.data("train", count=8, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.inputs["bag"], same.inputs["bag"])
    assert torch.equal(one.keys, same.keys)
    assert one.inputs["bag"].shape != other.inputs["bag"].shape or not torch.equal(
        one.inputs["bag"], other.inputs["bag"]
    )


def test_other_digits_and_sizes():
    data = bags.data("train", count=11, sizes=(12, 12), keys=(1, 2), digit=0, seed=4)
    assert data.inputs["mask"].all()
    assert data.inputs["bag"].shape == (11, 12, 64)
    assert data.targets.sum() == 6  # half, and one more of an odd number
    assert data.keys.sum(1).max() <= 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "all"}, "split is 'all', but must be one of"),
        ({"digit": 10}, "digit is 10, but must be one of 0, 1"),
        ({"count": 0}, "count is 0, but must be greater than 0"),
        ({"sizes": (9, 5)}, r"sizes is \(9, 5\), but must be two numbers from 1 to"),
        ({"sizes": (50, 5000)}, r"sizes is \(50, 5000\), but must be two numbers from 1 to 10"),
        ({"keys": (0, 5)}, r"keys is \(0, 5\), but must be two numbers from 1 to 1"),
        ({"sizes": (4, 9), "keys": (3, 8)}, "keys is 8, but must be at least 1 and at most 4"),
    ],
)
def test_bad_input_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        bags.data(**changes)
