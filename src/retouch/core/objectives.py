"""What `fit` minimises: functions of (model, batch, run) that add up.

An objective returns a scalar, or several named ones. Sums and multiples of objectives are objectives:

    fit(student, data, cross_entropy + 0.5 * imitation)

and each term keeps its name in the history, so that a run that goes wrong says which term did.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retouch.core.errors import InputError
from retouch.core.models import Batch, forward, logits_of, unpack

Losses = Tensor | Mapping[str, Tensor]


class Objective:
    """A named loss that can be added to others and weighted.

    Args:
        function: (model, batch, run) -> scalar, or mapping of names to scalars; another objective's only term is
            renamed.
        name: what the history calls a single scalar.
    """

    def __init__(self, function: Callable[..., Losses], name: str) -> None:
        functools.update_wrapper(self, function, updated=())
        self.function, self.name = function, name

    def __call__(self, model: nn.Module, batch: Batch, run: Any = None) -> dict[str, Tensor]:
        """Scalars by name; their sum is what is minimised."""
        losses = self.function(model, batch, run)
        if not isinstance(losses, Mapping):
            return {self.name: losses}
        if isinstance(self.function, Objective) and len(losses) == 1:
            return {self.name: next(iter(losses.values()))}
        return dict(losses)

    def __add__(self, other: Callable[..., Losses]) -> "Objective":
        first, second = self, as_objective(other)

        def total(model: nn.Module, batch: Batch, run: Any) -> dict[str, Tensor]:
            one, two = first(model, batch, run), second(model, batch, run)
            if one.keys() & two.keys():
                raise InputError(f"Two loss terms are named {', '.join(one.keys() & two.keys())}: rename one of them")
            return {**one, **two}

        return Objective(total, f"{first.name} + {second.name}")

    def __radd__(self, other: Any) -> "Objective":
        return self if other == 0 else as_objective(other) + self  # sum() begins with 0

    def __mul__(self, weight: float) -> "Objective":
        def weighted(model: nn.Module, batch: Batch, run: Any) -> dict[str, Tensor]:
            return {name: weight * loss for name, loss in self(model, batch, run).items()}

        return Objective(weighted, self.name)

    __rmul__ = __mul__

    def __neg__(self) -> "Objective":
        return self * -1.0


def objective(function: Callable[..., Losses]) -> Objective:
    """Make a function of (model, batch, run) an objective; its name becomes the loss term's."""
    return Objective(function, getattr(function, "__name__", type(function).__name__))


def as_objective(function: Callable[..., Losses]) -> Objective:
    """The objective itself, or a plain function made into one."""
    return function if isinstance(function, Objective) else objective(function)


def cross_entropy_batch(model: Callable[..., Any], batch: Batch) -> Tensor:
    """Mean cross entropy of a batch: logits (n, k) against class ids (n,) or distributions (n, k).

    A model may give several answers a sample, (answers, n, k): the mean is over all of them.
    """
    inputs, targets = unpack(batch)
    if targets is None:
        raise InputError("The batch has no targets, but cross entropy needs them: samples must be (input, target)")
    logits = logits_of(forward(model, inputs))
    if logits.ndim == 3 and (targets.ndim == 1 or targets.is_floating_point()) and logits.shape[1] == len(targets):
        logits, targets = logits.flatten(0, 1), torch.cat([targets] * len(logits))
    return F.cross_entropy(logits, targets)


def next_token_batch(model: Callable[..., Any], batch: Batch) -> Tensor:
    """Mean cross entropy of each token given those before it: logits (n, t, v), labels (n, t), -100 not counted."""
    inputs, labels = unpack(batch)
    if labels is None:
        raise InputError("The batch has no labels, but a next-token loss needs them, one for every position")
    logits = logits_of(forward(model, inputs))
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)


@objective
def cross_entropy(model: nn.Module, batch: Batch, run: Any = None) -> Tensor:
    """Mean cross entropy of a batch, see `cross_entropy_batch`."""
    return cross_entropy_batch(model, batch)


@objective
def next_token(model: nn.Module, batch: Batch, run: Any = None) -> Tensor:
    """Mean next-token cross entropy of a batch, see `next_token_batch`."""
    return next_token_batch(model, batch)
