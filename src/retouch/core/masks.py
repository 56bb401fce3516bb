"""Masks over named parameters: a dict from parameter name to a boolean tensor of its shape, True where it may change.

A masked optimizer step leaves every other entry bit-identical, whatever the optimizer does with momentum or weight
decay: it is restored after the step, and the optimizer's state for it is cleared.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from retouch.core.errors import InputError, in_range, one_of
from retouch.core.loop import Callback, Run

Mask = Mapping[str, Tensor]


def top_share(scores: Mapping[str, Tensor], ratio: float, *, scope: str = "global") -> dict[str, Tensor]:
    """Mask of the entries with the largest scores: exactly int(ratio * entries) of them.

    Entries of equal score are taken in order of position, so masks are nested in `ratio`.

    Args:
        scores: by parameter name.
        ratio: share to keep, 0 to 1.
        scope: "global" ranks all entries together, "tensor" each parameter for itself.
    """
    in_range("ratio", ratio, 0, 1)
    one_of("scope", scope, ("global", "tensor"))
    if scope == "tensor":
        return {name: top_share({name: score}, ratio)[name] for name, score in scores.items()}
    flat = torch.cat([score.reshape(-1) for score in scores.values()])
    mask = _top(flat, int(ratio * flat.numel()))
    parts = mask.split([score.numel() for score in scores.values()])
    return {name: part.view(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)}


def _top(flat: Tensor, count: int) -> Tensor:
    """The `count` largest of a vector, ties by position; a k-th value and two passes, no full sort."""
    if count == 0:
        return torch.zeros_like(flat, dtype=torch.bool)
    threshold = flat.kthvalue(flat.numel() - count + 1).values
    mask = flat > threshold
    ties = (flat == threshold).nonzero().squeeze(1)
    mask[ties[: count - int(mask.sum())]] = True
    return mask


def share(mask: Mask) -> float:
    """Share of entries that the mask lets change."""
    entries = sum(part.numel() for part in mask.values())
    return sum(int(part.sum()) for part in mask.values()) / max(entries, 1)


def check_mask(mask: Mask, parameters: Mapping[str, Tensor]) -> None:
    """Raise unless the mask has every parameter, in its shape."""
    missing = [name for name in parameters if name not in mask]
    if missing:
        raise InputError(f"The mask lacks {', '.join(missing)}, but must have every trained parameter")
    for name, parameter in parameters.items():
        if mask[name].shape != parameter.shape:
            raise InputError(
                f"The mask of {name} has shape {tuple(mask[name].shape)}, but must have {tuple(parameter.shape)}"
            )


class MaskedSteps:
    """Hooks on an optimizer that keep masked-out entries at the values they have now; `remove` takes them off.

    Gradients are masked before each step; after it, masked-out weights are restored and their entries in the
    optimizer's state (momentum, moments) are zero.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module, mask: Mask) -> None:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        check_mask(mask, trained)
        self.parts = [(p, mask[name].to(p.device, torch.bool), p.detach().clone()) for name, p in trained.items()]
        self.handles = [
            optimizer.register_step_pre_hook(lambda *_: self._mask_gradients()),
            optimizer.register_step_post_hook(lambda *_: self._restore(optimizer)),
        ]

    @torch.no_grad()
    def _mask_gradients(self) -> None:
        for parameter, keep, _ in self.parts:
            if parameter.grad is not None:
                parameter.grad.mul_(keep)

    @torch.no_grad()
    def _restore(self, optimizer: Optimizer) -> None:
        for parameter, keep, start in self.parts:
            parameter.copy_(torch.where(keep, parameter, start))
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    value.mul_(keep)

    @torch.no_grad()
    def hold(self) -> None:
        """Keep the weights at the values that they have now."""
        for parameter, _, start in self.parts:
            start.copy_(parameter)

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()


class MaskedOptimizer:
    """Any torch optimizer, stepping only where a mask allows; everything else is bit-identical after every step.

    Args:
        optimizer: over parameters of the model.
        model: names the parameters.
        mask: by parameter name, True (or 1) where weights may change.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module, mask: Mask) -> None:
        self.optimizer = optimizer
        self.masking = MaskedSteps(optimizer, model, mask)

    def step(self, closure: Any = None) -> Any:
        """One masked step."""
        return self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)


class TrainOnly(Callback):
    """Callback for `fit`: only the masked-in entries of the parameters change.

    Args:
        mask: by parameter name, True where weights may change.
    """

    def __init__(self, mask: Mask) -> None:
        self.mask = mask
        self.masking: MaskedSteps | None = None

    def on_start(self, run: Run) -> None:
        self.masking = MaskedSteps(run.optimizer, run.module, self.mask)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.masking is not None:
            self.masking.hold()  # those of the checkpoint, which have just been loaded

    def on_end(self, run: Run) -> None:
        if self.masking is not None:
            self.masking.remove()
            self.masking = None
