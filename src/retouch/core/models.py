"""What goes into a model and comes out of it: batches, logits, modes, heads.

A batch is `(inputs, targets)`, or a mapping such as `datasets` and transformers use: its "labels" (or "label",
"targets") are the targets and all the rest are the inputs. Inputs are a tensor, or a mapping handed to the model as
keywords. A batch of inputs alone is a bare tensor. `Together` and `InTurn` of `core.batches` give mappings of parts,
each of them a batch.
"""

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from retouch.core.errors import InputError

TARGET_NAMES = ("labels", "label", "targets")
Batch = Any  # (inputs, targets) | mapping | tensor, see above


def unpack(batch: Batch) -> tuple[Any, Any]:
    """Split a batch into (inputs, targets); targets are None where the batch has none."""
    if isinstance(batch, Mapping):
        names = [name for name in TARGET_NAMES if name in batch]
        inputs = {key: value for key, value in batch.items() if key not in names}
        return inputs, batch[names[0]] if names else None
    if isinstance(batch, tuple | list):
        if len(batch) > 2:
            raise InputError(
                f"A batch has {len(batch)} parts, but must be (inputs, targets), inputs alone, or a mapping"
            )
        return batch[0], batch[1] if len(batch) == 2 else None
    return batch, None


def forward(model: Callable[..., Any], inputs: Any) -> Any:
    """Call the model: mappings as keywords, everything else as the one argument."""
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def logits_of(output: Any) -> Tensor:
    """The logits in a model's output: the tensor itself, or `.logits` of a transformers ModelOutput or mapping."""
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise InputError(
            f"The model returned {type(output).__name__}, but must return a tensor or an output with logits"
        )
    return logits


def images_of(batch: Batch) -> Tensor:
    """The images (n, ..., height, width) among a batch's inputs: the first tensor of at least three dimensions."""
    inputs, _ = unpack(batch)
    for value in inputs.values() if isinstance(inputs, Mapping) else (inputs,):
        if isinstance(value, Tensor) and value.ndim >= 3:
            return value
    raise InputError("The batch has no images, but its inputs must hold a tensor (n, ..., height, width)")


def replaced(batch: Batch, *, images: Tensor | None = None, targets: Any = None) -> Batch:
    """The batch in its own form with other images or other targets; the batch given is not changed."""
    inputs, own = unpack(batch)
    if images is not None:
        old = images_of(batch)
        is_map = isinstance(inputs, Mapping)
        inputs = {key: images if value is old else value for key, value in inputs.items()} if is_map else images
    targets = own if targets is None else targets
    if isinstance(batch, Mapping):
        names = [name for name in TARGET_NAMES if name in batch]
        return {**inputs, **dict.fromkeys(names[:1], targets)}
    return inputs if isinstance(batch, Tensor) else (inputs,) if own is None else (inputs, targets)


def first_tensor(value: Any) -> Tensor | None:
    """The first tensor in a nested batch, or None."""
    if isinstance(value, Tensor):
        return value
    children = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return next((found for child in children if (found := first_tensor(child)) is not None), None)


def size_of(batch: Batch) -> int:
    """Number of samples: the length of the first tensor."""
    tensor = first_tensor(batch)
    return 0 if tensor is None else len(tensor) if tensor.ndim else 1


def tree_map(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Apply a function to every tensor of a nested batch; other values stay."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: tree_map(function, child) for key, child in value.items()}
    if isinstance(value, tuple | list):
        children = [tree_map(function, child) for child in value]
        return type(value)(*children) if hasattr(value, "_fields") else type(value)(children)
    return value


def rows_of(batch: Batch, start: int, stop: int) -> Batch:
    """Samples start to stop of a batch."""
    return tree_map(lambda t: t[start:stop], batch)


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """The batch with every tensor on `device`; the batch itself where it is there already."""
    tensor = first_tensor(batch)
    if tensor is None or tensor.device == torch.device(device):
        return batch
    return tree_map(lambda t: t.to(device), batch)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter is; the CPU for a model without parameters."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@contextmanager
def mode(model: nn.Module, *, training: bool) -> Iterator[nn.Module]:
    """Put a model in train or eval mode for a block; every submodule's own mode comes back afterwards."""
    before = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield model
    finally:
        for module, was_training in before.items():
            module.training = was_training


@contextmanager
def training_only(model: nn.Module, names: Collection[str]) -> Iterator[nn.Module]:
    """Let only the named parameters require gradients for a block; each one's own setting comes back afterwards."""
    parameters = dict(model.named_parameters())
    unknown = [name for name in names if name not in parameters]
    if unknown:
        raise InputError(f"{type(model).__name__} has no parameter {', '.join(unknown)}")
    before = {name: parameter.requires_grad for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in names)
        yield model
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(before[name])


def own(model: nn.Module, *, inplace: bool) -> nn.Module:
    """The model that an edit may change: the given one if `inplace`, else a copy."""
    return model if inplace else copy.deepcopy(model)


@torch.no_grad()
def predict(model: nn.Module, batches: Iterable[Batch]) -> Tensor:
    """Logits of all samples (n, ...), in eval mode."""
    device = device_of(model)
    with mode(model, training=False):
        return torch.cat([logits_of(forward(model, unpack(to_device(batch, device))[0])) for batch in batches])


@torch.no_grad()
def count_classes(model: nn.Module, data: Iterable[Batch]) -> int:
    """Number of classes that the model tells apart, from its logits for the first batch."""
    batch = next(iter(data), None)
    if batch is None:
        raise InputError("The data is empty, but must have at least one sample")
    return int(predict(model, [rows_of(batch, 0, 1)]).shape[-1])


def head_of(model: nn.Module) -> str:
    """Name of the classification head: the last linear layer of the model.

    Raises:
        InputError: if the model has no linear layer.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not names:
        raise InputError(f"The model {type(model).__name__} has no linear layer that could be its head")
    return names[-1]
