"""Learning rates that rise and fall."""

import pytest
import torch

from retouch.core.errors import InputError
from retouch.core.schedules import warm_up_then_down


@pytest.mark.parametrize(
    ("ratio", "steps", "expected"),
    [
        (0.2, 10, [0.5, 1.0, *((8 - k) / 8 for k in range(8))]),
        (0.1, 20, [0.5, 1.0, *(k / 18 for k in range(18, 0, -1))]),
        (0.0, 4, [1.0, 0.75, 0.5, 0.25]),
        (0.5, 1, [1.0]),
    ],
)
def test_a_rise_and_a_fall(ratio, steps, expected):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule, rates = warm_up_then_down(ratio)(optimizer, steps), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx(expected)
    assert optimizer.param_groups[0]["lr"] == 0.0


@pytest.mark.parametrize("ratio", [-0.1, 1.0])
def test_bad_input(ratio):
    with pytest.raises(InputError, match=f"ratio is {ratio}, but must be at least 0 and less than 1"):
        warm_up_then_down(ratio)
