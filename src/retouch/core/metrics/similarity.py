"""How alike two representations of the same samples are."""

from torch import Tensor

from retouch.core.errors import InputError


def linear_cka(x: Tensor, y: Tensor) -> Tensor:
    """Linear centred kernel alignment, 0 (nothing in common) to 1 (equal up to rotation and scale); arXiv 1905.00414.

        ||Y'X||^2 / (||X'X|| ||Y'Y||)    of centred features, Frobenius norms

    With far fewer samples than features it is biased upwards: compare only values of equal n.

    Args:
        x: features (n, ...) of one model, flattened.
        y: features (n, ...) of another, of any width.

    Returns:
        A scalar; NaN where all samples have one and the same feature.

    Raises:
        InputError: if the numbers of samples differ or are below 2.
    """
    if len(x) != len(y) or len(x) < 2:
        raise InputError(f"x has {len(x)} samples and y {len(y)}, but both must have the same ones, at least 2")
    a, b = (side.detach().flatten(1).double() for side in (x, y))
    a, b = a - a.mean(0), b - b.mean(0)
    if len(a) < max(a.shape[1], b.shape[1]):  # the same numbers from the (n, n) products, which are smaller here
        p, q = a @ a.T, b @ b.T
        return (p * q).sum() / (p.norm() * q.norm())
    return (b.T @ a).square().sum() / ((a.T @ a).norm() * (b.T @ b).norm())
