"""Data sets of samples: held as tensors, cut, joined, asked for their labels.

A data set is whatever has a length and gives sample i: a torch Dataset, a `datasets.Dataset` (formatted for torch), or
tensors `(inputs, targets)`. How samples become batches is in `core.batches`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, default_collate

from retouch.core.errors import InputError
from retouch.core.models import tree_map, unpack


class TensorData(Dataset[Any]):
    """Samples held in memory as tensors, so that a batch is one indexing operation.

    Args:
        inputs: tensor (n, ...), or a mapping of such tensors that is handed to the model as keywords.
        targets: tensor (n, ...), a mapping of such tensors, or None for data without labels.
    """

    def __init__(
        self, inputs: Tensor | Mapping[str, Tensor], targets: Tensor | Mapping[str, Tensor] | None = None
    ) -> None:
        self.inputs, self.targets = inputs, targets
        parts = [part for part in (inputs, targets) if part is not None]
        lengths = {len(c) for part in parts for c in (part.values() if isinstance(part, Mapping) else [part])}
        if len(lengths) != 1:
            raise InputError(f"inputs and targets have lengths {sorted(lengths)}, but must have one length")

    def __len__(self) -> int:
        inputs = self.inputs
        return len(next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs)

    def __getitem__(self, index: Any) -> Any:
        inputs = tree_map(lambda t: t[index], self.inputs)
        if self.targets is not None:
            return inputs, tree_map(lambda t: t[index], self.targets)
        return inputs if isinstance(inputs, Mapping) else (inputs,)


def as_dataset(data: Any) -> Any:
    """Map-style view of data: something with a length that gives sample i.

    Raises:
        InputError: if the data is a stream or something else without samples to index.
    """
    if isinstance(data, DataLoader):
        data = data.dataset
    if isinstance(data, Tensor):
        return TensorData(data)
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[1], Tensor):
        return TensorData(*data)
    samples = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    if isinstance(data, IterableDataset | tuple) or not samples:
        parts = f" of {', '.join(type(part).__name__ for part in data[:4])}" if isinstance(data, tuple) else ""
        raise InputError(
            f"The data is a {type(data).__name__}{parts}, but must be a Dataset, a DataLoader over one, or "
            "(inputs, targets) as tensors"
        )
    return data


def collate(samples: list[Any]) -> Any:
    """Samples into a batch, as torch does it; a number and a tensor of one element may stand in the same place."""
    try:
        return default_collate(samples)
    except TypeError:
        return default_collate([_numbers_as_tensors(sample) for sample in samples])


def _numbers_as_tensors(sample: Any) -> Any:
    if isinstance(sample, Mapping):
        return {key: _numbers_as_tensors(value) for key, value in sample.items()}
    if isinstance(sample, tuple | list):
        return [_numbers_as_tensors(value) for value in sample]
    return torch.as_tensor(sample) if isinstance(sample, int | float) else sample


class Indexed(Dataset[Any]):
    """A data set whose samples come as (input, index), without labels: for answers that are looked up by sample."""

    def __init__(self, data: Any) -> None:
        self.data = as_dataset(data)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return unpack(self.data[index])[0], index


def indexed(data: Any) -> Any:
    """Samples as (input, index); tensors stay tensors."""
    data = as_dataset(data)
    return TensorData(data.inputs, torch.arange(len(data))) if isinstance(data, TensorData) else Indexed(data)


def subset(data: Any, indices: Sequence[int] | Tensor) -> Any:
    """The samples at the given indices, in that order, as data of the same kind."""
    data, rows = as_dataset(data), torch.as_tensor(indices)
    if rows.dtype == torch.bool:
        raise InputError("indices is a boolean mask, but must be positions: mask.nonzero()[:, 0]")
    rows = rows.long()
    if rows.numel() and not (int(rows.min()) >= 0 and int(rows.max()) < len(data)):
        raise InputError(f"An index is outside of the data: indices must be 0 to {len(data) - 1}")
    if isinstance(data, TensorData):
        inputs = tree_map(lambda t: t[rows], data.inputs)
        return TensorData(inputs, tree_map(lambda t: t[rows], data.targets))
    return Subset(data, rows.tolist())


def in_memory(data: Any) -> TensorData:
    """All samples as tensors, read once."""
    data = as_dataset(data)
    if isinstance(data, TensorData):
        return data
    inputs, targets = unpack(collate([data[i] for i in range(len(data))]))
    return TensorData(inputs, targets)


def concat(*parts: Any) -> Any:
    """Several data sets one after the other."""
    datasets = [as_dataset(part) for part in parts]
    if all(isinstance(d, TensorData) and not isinstance(d.inputs, Mapping) for d in datasets) and not any(
        isinstance(d.targets, Mapping) for d in datasets
    ):
        targets = [d.targets for d in datasets]
        joined = None if any(t is None for t in targets) else torch.cat(targets)
        return TensorData(torch.cat([d.inputs for d in datasets]), joined)
    return ConcatDataset(datasets)


def labels_of(data: Any) -> Tensor:
    """Class of every sample (n,), read from the targets where the data has them apart from the inputs."""
    data = as_dataset(data)
    if isinstance(data, Subset):
        return labels_of(data.dataset)[torch.as_tensor(data.indices)]
    if isinstance(data, ConcatDataset):
        return torch.cat([labels_of(part) for part in data.datasets])
    targets = getattr(data, "targets", None)
    if isinstance(targets, Mapping):
        targets = targets.get("labels")
    if targets is None:
        targets = [unpack(data[i])[1] for i in range(len(data))]
        if any(t is None or isinstance(t, Mapping) for t in targets):
            raise InputError("The data has no labels, but this needs them: samples must be (input, target)")
    return torch.as_tensor(targets).long()
