"""What named layers take in and give out while a model runs, by hooks that are gone when the block ends."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from retouch.core.errors import InputError, nearest, one_of
from retouch.core.models import first_tensor, forward, mode, unpack


def layer_of(model: nn.Module, name: str) -> nn.Module:
    """The submodule of a given name, with the nearest names in the error if there is none."""
    modules = dict(model.named_modules())
    if name not in modules or not name:
        raise InputError(f"{type(model).__name__} has no layer {name!r}.{nearest(name, modules)}")
    return modules[name]


@contextmanager
def capture(model: nn.Module, layers: Iterable[str], *, side: str = "output") -> Iterator[dict[str, Tensor]]:
    """Record the activations of layers, with their gradients, at every forward pass inside the block.

    Args:
        model: the model; it is not changed, and outside of the block nothing is left in it.
        layers: names as `model.named_modules()` gives them.
        side: "output", or "input" for the first tensor a layer is called on.

    Yields:
        A dict from layer name to its latest activation (a tuple's first tensor), filled by each forward pass.
    """
    one_of("side", side, ("output", "input"))
    seen: dict[str, Tensor] = {}

    def recorder(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            value = first_tensor(output if side == "output" else (args, kwargs))
            if value is not None:
                seen[name] = value

        return record

    named = {name: layer_of(model, name) for name in layers}  # before any hook is set: a name may be unknown
    handles = [layer.register_forward_hook(recorder(name), with_kwargs=True) for name, layer in named.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def features_of(model: nn.Module, inputs: Any, layer: str, *, side: str = "output") -> Tensor:
    """One layer's activation for given inputs, with gradients."""
    with capture(model, [layer], side=side) as seen:
        forward(model, inputs)
    if layer not in seen:
        raise InputError(f"The layer {layer!r} did not run, or gave no tensor, when the model was called")
    return seen[layer]


@torch.no_grad()
def shapes(model: nn.Module, batch: Any, layers: Iterable[str], *, side: str = "output") -> dict[str, tuple[int, ...]]:
    """Shapes of the layers' activations in one dry run, in eval mode."""
    with mode(model, training=False), capture(model, layers, side=side) as seen:
        forward(model, unpack(batch)[0])
    return {name: tuple(value.shape) for name, value in seen.items()}
