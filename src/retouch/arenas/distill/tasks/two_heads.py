"""Labels on one head and the teacher's logits on another, on few digits.

Small-scale study of DHKD: does a second head repair what a loss on logits breaks?
"""

from typing import Any

import torch

from retouch.arenas.distill.tasks._heads import MEASURES, baselines
from retouch.arenas.distill.tasks._pairs import draw, mlp, task


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """Momentum 0.9, at 0.05."""
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


TASK = task(
    "two_heads",
    "A network of three layers, trained on 1000 digits, teaches a narrow one on 300 of them, by labels and by logits.",
    student=lambda: mlp(24, 24),
    teacher=lambda: mlp(96, 96),
    split=draw(300),
    steps=800,
    optimizer=sgd,
    scheduler=None,
    measures=MEASURES,
    more=baselines("two_heads"),
)
