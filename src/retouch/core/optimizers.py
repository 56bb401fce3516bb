"""Muon for every weight matrix of a model, convolutions among them, with AdamW for the rest.

fit(model, data, optimizer=lambda parameters: MuonAdamW(parameters, lr=1e-3))
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

NARROW = 16  # a matrix with a shorter side is left to AdamW: its few directions are hardly worth making equal


class MuonAdamW(Optimizer):
    """PyTorch's Muon, which takes nothing but matrices, on all weights that can be read as one, and its AdamW beside.

    Muon makes all directions of a matrix's step equally long (Jordan et al., 2024), so that what is a small part of
    the loss is learned along with what is a large one. Its steps are scaled to the size of AdamW's, which is why both
    take one learning rate (Liu et al., 2025, Muon is Scalable for LLM Training, section 2.2).

    Args:
        parameters: of the model; those of two or more dimensions, the first of which and the others together have a
            size of at least 16, are taken as matrices.
        lr: learning rate of both.
        weight_decay: of both.
        betas: of AdamW.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.99),
    ) -> None:
        given = list(parameters)
        self.matrices = [p for p in given if p.ndim > 1 and min(len(p), p[0].numel()) >= NARROW]
        matrices = {id(p) for p in self.matrices}
        rest = [p for p in given if id(p) not in matrices]
        super().__init__([{"params": part} for part in (self.matrices, rest) if part], {"lr": lr})
        self.parts: list[Optimizer] = []
        if self.matrices:
            flat = [nn.Parameter(_flat(p)) for p in self.matrices]
            self.parts.append(Muon(flat, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
        if rest:
            self.parts.append(AdamW(rest, lr=lr, weight_decay=weight_decay, betas=betas))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both, at the learning rates of `param_groups`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for view, matrix in zip(self._views(), self.matrices, strict=True):
            view.data = _flat(matrix)  # anew, since weights may have been moved since the last step
            view.grad = None if matrix.grad is None else _flat(matrix.grad)
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups[0]["lr"] = group["lr"]
            part.step()
        for view, matrix in zip(self._views(), self.matrices, strict=True):
            if view.data_ptr() != matrix.data_ptr():  # weights of another memory format were copied to be flattened
                matrix.copy_(view.view_as(matrix))
            view.grad = None  # or gradients that are dropped would stay in memory
        return loss

    def _views(self) -> list[nn.Parameter]:
        return self.parts[0].param_groups[0]["params"] if self.matrices else []

    def state_dict(self) -> dict[str, Any]:
        """States of both."""
        return {**super().state_dict(), "parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """States of both."""
        own = {name: value for name, value in state_dict.items() if name != "parts"}
        super().load_state_dict(own)
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)


def _flat(values: Tensor) -> Tensor:
    return values.detach().flatten(1)
