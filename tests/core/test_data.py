"""Data sets of every kind: held, cut, joined, numbered, read into memory, asked for their labels."""

import datasets
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from retouch.core.data import TensorData, as_dataset, concat, in_memory, indexed, labels_of, subset
from retouch.core.errors import InputError

N = 7
X, Y = torch.arange(N * 2.0).view(N, 2), torch.tensor([3, 1, 4, 1, 5, 2, 6])


class Plain(Dataset):
    """The plainest of torch data sets; labels are Python numbers."""

    def __len__(self):
        return N

    def __getitem__(self, index):
        return X[index], int(Y[index])


class Targets(Plain):
    """As torchvision does it: labels in a list beside the samples, and samples dear to read."""

    targets = Y.tolist()

    def __getitem__(self, index):
        raise AssertionError("labels must be read without the samples")


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(X, Y, strict=True))


def hugging_face():
    return datasets.Dataset.from_dict({"x": X.tolist(), "label": Y.tolist()}).with_format("torch")


KINDS = {
    "tensors": lambda: (X, Y),
    "TensorData": lambda: TensorData(X, Y),
    "TensorDataset": lambda: TensorDataset(X, Y),
    "torch Dataset": Plain,
    "Subset": lambda: Subset(TensorDataset(torch.cat([X, X]), torch.cat([Y, Y])), range(N)),
    "ConcatDataset": lambda: ConcatDataset([TensorDataset(X[:3], Y[:3]), TensorData(X[3:], Y[3:])]),
    "DataLoader": lambda: DataLoader(TensorDataset(X, Y), batch_size=3),
    "list of samples": lambda: list(zip(X, Y, strict=True)),
    "mapping in TensorData": lambda: TensorData({"x": X}, Y),
    "datasets.Dataset": hugging_face,
}


@pytest.fixture(params=KINDS)
def data(request):
    return KINDS[request.param]()


def inputs_of(samples):
    """The one input column, of mappings and tensors alike."""
    return samples["x"] if isinstance(samples, dict) else samples


def test_every_kind_of_data_is_read_into_memory(data):
    held = in_memory(data)
    assert isinstance(held, TensorData)
    assert len(held) == N
    assert torch.equal(inputs_of(held.inputs), X)
    assert torch.equal(held.targets, Y)


def test_labels_are_read_from_every_kind_of_data(data):
    labels = labels_of(data)
    assert labels.dtype == torch.long
    assert torch.equal(labels, Y)


def test_a_subset_of_every_kind_has_the_chosen_samples_in_the_chosen_order(data):
    rows = [5, 0, 3, 3]
    chosen = subset(data, rows)
    assert torch.equal(labels_of(chosen), Y[rows])
    assert torch.equal(inputs_of(in_memory(chosen).inputs), X[rows])
    assert torch.equal(inputs_of(in_memory(subset(chosen, torch.tensor([1]))).inputs), X[:1])


def test_every_kind_can_be_joined_to_itself(data):
    twice = concat(data, data)
    assert len(twice) == 2 * N
    assert torch.equal(labels_of(twice), torch.cat([Y, Y]))
    assert torch.equal(inputs_of(in_memory(twice).inputs), torch.cat([X, X]))


def test_indexed_samples_carry_their_number_in_place_of_a_label(data):
    numbered = indexed(data)
    assert len(numbered) == N
    inputs, number = numbered[4]
    assert torch.equal(inputs_of(inputs), X[4])
    assert int(number) == 4


def test_data_of_different_kinds_can_be_joined():
    joined = concat(TensorData(X, Y), TensorDataset(X, Y))
    assert torch.equal(in_memory(joined).inputs, torch.cat([X, X]))
    assert torch.equal(labels_of(joined), torch.cat([Y, Y]))


def test_data_with_labels_as_numbers_and_as_tensors_can_be_joined():
    joined = concat(TensorData(X, Y), Plain())
    assert torch.equal(labels_of(joined), torch.cat([Y, Y]))
    assert torch.equal(in_memory(joined).targets, torch.cat([Y, Y]))


def test_tensors_stay_tensors():
    held = TensorData(X, Y)
    assert isinstance(subset(held, [1]), TensorData)
    assert isinstance(concat(held, (X, Y)), TensorData)
    assert isinstance(indexed(held), TensorData)
    assert in_memory(held) is held
    assert as_dataset(held) is held


def test_tensor_data_gives_samples_and_whole_batches():
    held = TensorData(X, Y)
    assert torch.equal(held[2][0], X[2])
    assert int(held[2][1]) == 4
    inputs, targets = held[torch.tensor([4, 1])]
    assert torch.equal(inputs, X[[4, 1]])
    assert torch.equal(targets, Y[[4, 1]])


def test_tensor_data_without_labels_gives_inputs_alone():
    (inputs,) = TensorData(X)[1]
    assert torch.equal(inputs, X[1])
    sample = TensorData({"a": X, "b": Y})[1]
    assert torch.equal(sample["a"], X[1])
    assert int(sample["b"]) == 1
    assert in_memory(Subset(TensorData(X), range(3))).targets is None


def test_a_data_loader_over_tensor_data_gives_batches():
    loader = DataLoader(TensorData(X, Y), batch_size=3)
    inputs, targets = next(iter(loader))
    assert torch.equal(inputs, X[:3])
    assert torch.equal(targets, Y[:3])


@pytest.mark.parametrize(
    "columns", [(X, Y[:3]), ({"a": X, "b": Y[:3]},), ({"a": X}, Y[:3])], ids=["targets", "inputs", "both"]
)
def test_columns_of_different_lengths_are_refused(columns):
    with pytest.raises(InputError, match=rf"lengths \[3, {N}\], but must have one length"):
        TensorData(*columns)


@pytest.mark.parametrize("data", [Stream(), DataLoader(Stream()), 3, None], ids=["stream", "loader", "number", "None"])
def test_data_without_samples_to_index_is_refused(data):
    with pytest.raises(InputError, match="but must be a Dataset, a DataLoader over one, or"):
        as_dataset(data)


@pytest.mark.parametrize("rows", [[0, N], [-1], torch.tensor([3, 99])])
def test_a_subset_beyond_the_data_is_refused(rows):
    with pytest.raises(InputError, match=f"indices must be 0 to {N - 1}"):
        subset((X, Y), rows)


def test_a_boolean_mask_is_not_taken_for_positions():
    with pytest.raises(InputError):
        subset((X, Y), Y == 1)


def test_an_empty_subset_is_empty():
    assert len(subset((X, Y), [])) == 0
    assert len(subset(Plain(), [])) == 0
    assert labels_of(subset((X, Y), [])).shape == (0,)


def test_labels_beside_the_samples_are_read_without_the_samples():
    assert torch.equal(labels_of(Targets()), Y)
    assert torch.equal(labels_of(Subset(Targets(), [2, 0])), Y[[2, 0]])
    assert torch.equal(labels_of(ConcatDataset([Targets(), Targets()])), torch.cat([Y, Y]))


@pytest.mark.parametrize("data", [TensorData(X), TensorDataset(X), [{"x": X[0]}]])
def test_data_without_labels_is_refused_where_labels_are_needed(data):
    with pytest.raises(InputError, match="The data has no labels, but this needs them"):
        labels_of(data)


def test_cutting_and_joining_leave_the_data_as_it_was():
    held = TensorData(X.clone(), Y.clone())
    subset(held, [0])[0][0].zero_()
    concat(held, held).inputs.zero_()
    assert torch.equal(held.inputs, X)
    assert torch.equal(held.targets, Y)
