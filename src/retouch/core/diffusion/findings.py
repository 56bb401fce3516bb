"""What a probe of a diffusion model found, so that any of them can be run in the same way by the command line."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Images and what is known of each.

    Attributes:
        images: (n, channels, h, w) in 0 to 1, those that matter most first.
        rows: what is known of each, n of them, as JSON can hold it.
        words: the result in sentences.
        tensors: to keep beside, such as latents that lead back to the images (n, ...).
    """

    images: Tensor
    rows: Sequence[Mapping[str, Any]]
    words: Sequence[str]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
