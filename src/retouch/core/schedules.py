"""Learning-rate schedules that several techniques share, for `fit(scheduler=...)`."""

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from retouch.core.errors import in_range


def warm_up_then_down(ratio: float = 0.1) -> Callable[[Optimizer, int], LRScheduler]:
    """The rate rises in a line over a share of the steps, then falls in a line towards 0.

    Args:
        ratio: that share, 0 to 1.
    """
    in_range("ratio", ratio, 0, 1, below=True)

    def scheduler(optimizer: Optimizer, steps: int) -> LRScheduler:
        up = math.ceil(ratio * steps)

        def factor(step: int) -> float:
            return (step + 1) / up if step < up else max(0.0, (steps - step) / max(1, steps - up))

        return LambdaLR(optimizer, factor)

    return scheduler
