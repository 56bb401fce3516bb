"""The Fréchet distance in closed form."""

import pytest
import torch

from retouch.core.errors import InputError
from retouch.core.metrics.frechet import frechet_distance

X = torch.randn(500, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_equal_sets_and_moved_ones():
    assert frechet_distance(X, X) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(X, X + 3) == pytest.approx(4 * 9)
    assert frechet_distance(X, X.flip(0)) == pytest.approx(0, abs=1e-9)


def test_scaled_sets():
    variance = float(torch.cov(X.T).trace())
    centred = X - X.mean(0)
    assert frechet_distance(centred, 2 * centred) == pytest.approx(variance)  # (2 - 1)^2 of every direction


def test_against_the_matrix_square_root():
    from scipy.linalg import sqrtm

    a, b = X[:200] @ torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64), X[200:] + 0.5
    one, two = (torch.cov(x.T).numpy() for x in (a, b))
    expected = float((a.mean(0) - b.mean(0)).square().sum()) + (one + two - 2 * sqrtm(one @ two).real).trace()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a))
    assert frechet_distance(a.float(), b.float()) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.zeros(1, 4), torch.zeros(3, 5)])
def test_bad_input(wrong):
    with pytest.raises(InputError, match="must be \\(samples, features\\) of the same features"):
        frechet_distance(X, wrong)
