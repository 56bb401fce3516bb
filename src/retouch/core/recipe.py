"""What a technique puts in place of the parts of plain training, so that any of them can be run in the same way."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from retouch.core.loop import Callback, History, fit
from retouch.core.objectives import Losses, cross_entropy


def as_trained(model: nn.Module) -> nn.Module:
    """The model itself: nothing is left to do after training."""
    return model


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The parts of a training run.

    Args:
        model: to train, perhaps with layers put in.
        data: to train on, perhaps with a sampler of its own.
        objective: to minimise.
        callbacks: to call.
        finish: trained model -> the model as it is used, such as with a width chosen on validation data.
    """

    model: nn.Module
    data: Any
    objective: Callable[..., Losses] = cross_entropy
    callbacks: Sequence[Callback] = ()
    finish: Callable[[nn.Module], nn.Module] = as_trained

    def fit(self, *, callbacks: Sequence[Callback] = (), **settings: Any) -> tuple[nn.Module, History]:
        """Train, with further callbacks and settings of `core.loop.fit`; returns the finished model in eval mode."""
        history = fit(self.model, self.data, self.objective, callbacks=[*self.callbacks, *callbacks], **settings)
        return self.finish(self.model).eval(), history
