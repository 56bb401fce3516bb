"""How far two sets of features are apart, as Gaussians."""

import torch
from torch import Tensor

from retouch.core.errors import InputError


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), with means and covariances of the features.

    On features of an Inception network this is the FID; on others it has another scale. It falls with the number of
    samples, so compare sets of equal size, and beside the distance of two real ones.

    Args:
        a: features (n, d), at least 2 samples.
        b: features (m, d).
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise InputError(
            f"a and b have shapes {tuple(a.shape)} and {tuple(b.shape)}, but must be (samples, features) of the same "
            "features, of at least 2 samples each"
        )
    a, b = a.double(), b.double()
    one, two = (torch.cov(x.T).reshape(x.shape[1], x.shape[1]) for x in (a, b))
    # (S_a S_b)^(1/2) has the trace of (S_a^(1/2) S_b S_a^(1/2))^(1/2), which is symmetric.
    values, vectors = torch.linalg.eigh(one)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ two @ root).clamp(min=0).sqrt().sum()
    apart = (a.mean(0) - b.mean(0)).square().sum()
    return float((apart + one.trace() + two.trace() - 2 * cross).clamp(min=0))
