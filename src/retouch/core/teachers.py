"""Models that are asked and never trained: frozen copies, and caches of what they said."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from retouch.core.models import Batch, device_of, mode, to_device


class Teacher(nn.Module):
    """A frozen copy of a model, called like the model: always in eval mode, never with gradients.

    `train()` has no effect, so it stays as it is inside of a module that is trained.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The copy's output."""
        return self.model(*args, **kwargs)

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in eval mode."""
        return self


@torch.no_grad()
def cache(model: nn.Module, batches: Iterable[Batch], answer: Callable[[nn.Module, Batch], Tensor]) -> Tensor:
    """What a model says of every sample, asked once, to be looked up by sample index: (n, ...).

    Args:
        model: asked in eval mode.
        batches: all samples in order.
        answer: (model, batch) -> (b, ...), such as logits or a layer's activation.
    """
    device = device_of(model)
    with mode(model, training=False):
        return torch.cat([answer(model, to_device(batch, device)) for batch in batches])
