"""An exponential moving average of the weights, kept while training, as diffusion models are sampled from.

    fit(model, data, objective, callbacks=[MovingAverage(0.999)])

The model ends with the averaged weights; a checkpoint holds both, so that a resumed run has the same average.
"""

from typing import Any

import torch
from torch import Tensor

from retouch.core.errors import in_range
from retouch.core.loop import Callback, Run


class MovingAverage(Callback):
    """After a run that ended without an error, the model's weights are the average; buffers are the last ones.

    Args:
        decay: share of the average that a step keeps, 0 to 1; in the first steps less, (1 + step) / (10 + step).
    """

    def __init__(self, decay: float = 0.999) -> None:
        in_range("decay", decay, 0, 1)
        self.decay = decay
        self.average: list[Tensor] = []

    def on_start(self, run: Run) -> None:
        """The average begins at the first weights."""
        self.average = [parameter.detach().clone() for parameter in self._followed(run)]

    @torch.no_grad()
    def on_step(self, run: Run) -> None:
        """Follow the weights."""
        decay = min(self.decay, (1 + run.step) / (10 + run.step))
        torch._foreach_lerp_(self.average, [parameter.detach() for parameter in self._followed(run)], 1 - decay)

    @torch.no_grad()
    def on_end(self, run: Run) -> None:
        """The model takes the average."""
        if run.over:
            for parameter, mean in zip(self._followed(run), self.average, strict=True):
                parameter.copy_(mean)

    def state_dict(self) -> dict[str, Any]:
        """The average."""
        return {"average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The average."""
        for mean, stored in zip(self.average, state["average"], strict=True):
            mean.copy_(stored)

    @staticmethod
    def _followed(run: Run) -> list[Tensor]:
        return [parameter for parameter in run.module.parameters() if parameter.requires_grad]
