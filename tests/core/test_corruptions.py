"""Label noise and long tails: exactly as much as was asked for, and nothing else."""

import pytest
import torch
from torch.utils.data import TensorDataset

from retouch.core.corruptions import long_tail, noisy
from retouch.core.data import TensorData, labels_of
from retouch.core.errors import InputError

N = 500
DATA = TensorData(torch.arange(float(N))[:, None], torch.arange(N) % 5)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
def test_exactly_the_share_is_wrong(share, global_rng_untouched):
    given = noisy(DATA, share, 3)
    assert int((given.targets != DATA.targets).sum()) == round(share * N)
    assert torch.equal(given.inputs, DATA.inputs)
    assert torch.equal(DATA.targets, torch.arange(N) % 5)


def test_every_other_class_is_drawn_alike():
    data = TensorData(torch.zeros(8000, 1), torch.full((8000,), 2))
    counts = noisy(data, 1.0, 0, classes=5).targets.bincount(minlength=5)
    assert counts[2] == 0
    assert counts[[0, 1, 3, 4]].float().div(2000).sub(1).abs().max() < 0.06


def test_noise_is_nested_in_the_share_and_follows_the_seed():
    few, many, other = noisy(DATA, 0.2, 0), noisy(DATA, 0.5, 0), noisy(DATA, 0.2, 1)
    wrong = few.targets != DATA.targets
    assert torch.equal(few.targets[wrong], many.targets[wrong])
    assert torch.equal(few.targets, noisy(DATA, 0.2, 0).targets)
    assert not torch.equal(few.targets, other.targets)


def test_any_labelled_data_can_be_made_noisy():
    given = noisy(TensorDataset(*DATA[:]), 0.2, 3)
    assert torch.equal(given.targets, noisy(DATA, 0.2, 3).targets)


@pytest.mark.parametrize("ratio", [1.0, 10.0, 50.0])
def test_a_long_tail_has_the_ratio_asked_for(ratio, global_rng_untouched):
    counts = labels_of(long_tail(DATA, ratio, 0)).bincount()
    assert counts[0] == 100
    expected = [max(1, round(100 * ratio ** (-c / 4))) for c in range(5)]
    assert counts.tolist() == expected


def test_the_tail_is_the_largest_that_the_data_can_supply():
    labels = torch.tensor([0] * 30 + [1] * 100 + [2] * 100)
    counts = labels_of(long_tail(TensorData(torch.zeros(230, 1), labels), 4.0, 0)).bincount()
    assert counts.tolist() == [30, 15, 8]


def test_a_tail_keeps_one_of_each_class_the_order_and_the_kind_of_data():
    tail = long_tail(DATA, 1e6, 0)
    assert labels_of(tail).bincount().min() == 1
    assert torch.equal(tail.inputs, tail.inputs.sort(0).values)
    assert len(long_tail(TensorDataset(*DATA[:]), 1e6, 0)) == len(tail)
    assert not torch.equal(long_tail(DATA, 10, 1).inputs, long_tail(DATA, 10, 2).inputs)


def test_bad_input_is_refused():
    with pytest.raises(InputError, match="share is 1.5, but must be at least 0 and at most 1"):
        noisy(DATA, 1.5, 0)
    with pytest.raises(InputError, match="classes is 3, but must be at least 2 and more than the largest label, 4"):
        noisy(DATA, 0.5, 0, classes=3)
    with pytest.raises(InputError, match="ratio is 0.5, but must be at least 1"):
        long_tail(DATA, 0.5, 0)
    with pytest.raises(InputError, match="labels"):
        noisy(TensorData(torch.zeros(4, 1)), 0.5, 0)
