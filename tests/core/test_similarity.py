"""Linear CKA: invariances, closed forms, both ways to compute it, bad input."""

import pytest
import torch

from retouch.core.errors import InputError
from retouch.core.metrics.similarity import linear_cka

DRAW = torch.Generator().manual_seed(0)


def features(n, d):
    return torch.randn(n, d, generator=DRAW, dtype=torch.float64)


def test_it_is_one_for_rotated_scaled_and_shifted_features():
    x = features(40, 6)
    rotation, _ = torch.linalg.qr(features(6, 6))
    torch.testing.assert_close(linear_cka(x, x), torch.tensor(1.0, dtype=torch.float64))
    torch.testing.assert_close(linear_cka(x, 3 * x @ rotation + 7), torch.tensor(1.0, dtype=torch.float64))


def test_it_is_zero_for_features_without_correlation():
    x = torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None]
    y = torch.tensor([1.0, 1.0, -1.0, -1.0])[:, None]
    assert linear_cka(x, y) == 0


def test_of_single_features_it_is_the_squared_correlation():
    x, y = features(50, 1), features(50, 1)
    expected = torch.corrcoef(torch.cat([x, y], 1).T)[0, 1] ** 2
    torch.testing.assert_close(linear_cka(x, y), expected)


def test_few_and_many_samples_are_computed_alike_and_it_is_symmetric():
    x, y = features(12, 30), features(12, 5)
    a, b = x - x.mean(0), y - y.mean(0)
    expected = (b.T @ a).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())
    torch.testing.assert_close(linear_cka(x, y), expected)
    torch.testing.assert_close(linear_cka(y, x), expected)


def test_maps_are_flattened_and_width_may_differ():
    maps, tokens = features(9, 12).view(9, 3, 2, 2), features(9, 10).view(9, 5, 2)
    torch.testing.assert_close(linear_cka(maps, tokens), linear_cka(maps.flatten(1), tokens.flatten(1)))
    assert 0 <= linear_cka(maps, tokens) <= 1


def test_other_samples_are_refused():
    with pytest.raises(InputError, match="x has 3 samples and y 4, but both must have the same ones, at least 2"):
        linear_cka(features(3, 2), features(4, 2))
    with pytest.raises(InputError, match="x has 1 samples"):
        linear_cka(features(1, 2), features(1, 2))
