"""How much work a model is."""

from typing import Any

import torch
from torch import nn

from retouch.core.models import device_of, forward, mode, to_device


@torch.no_grad()
def forward_flops(model: nn.Module, inputs: Any) -> int:
    """Operations of a forward pass in eval mode, two a multiplication and addition.

    PyTorch's counter knows products and convolutions. A module that computes otherwise, such as by a scan, can tell
    what its own work is in a method `own_flops(*args)`, called with what it is called with; activations and norms are
    not counted.

    Args:
        model: to count.
        inputs: of a batch: a tensor, or a mapping handed on as keywords.
    """
    from torch.utils.flop_counter import FlopCounterMode

    told = 0

    def count(module: Any, args: Any, output: Any) -> None:
        nonlocal told
        told += module.own_flops(*args)

    handles = [m.register_forward_hook(count) for m in model.modules() if hasattr(m, "own_flops")]
    try:
        with mode(model, training=False), FlopCounterMode(display=False) as counter:
            forward(model, to_device(inputs, device_of(model)))
    finally:
        for handle in handles:
            handle.remove()
    return counter.get_total_flops() + told
