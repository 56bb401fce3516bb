"""Steer a diffusion model while it samples.

The room's contract: `technique(**hyper) -> Guidance`, added to others and handed to our sampler or attached to a
pipeline of diffusers:

    images = sample(denoiser, noise, "a red circle", guidance=cfgpp(0.6) + pag(3.0))
    with retouch.guide.attach(pipe, pag(3.0)):
        pipe("a red circle")

Techniques that change the model or the latents instead are context managers or hooks of `core.diffusion.sampling`.
A technique that needs no more than a prompt also has `steer(denoiser, prompt, **hyper) -> Steering`, which puts its
parts together: that is what `retouch guide NAME` runs.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retouch.core.diffusion.guidance import Guidance, Sum
    from retouch.core.diffusion.sampling import Hook


def attach(
    pipeline: Any, guidance: "Guidance | Sum | None" = None, *, hooks: "Sequence[Hook]" = ()
) -> AbstractContextManager[Any]:
    """Let a guidance and hooks steer a pipeline of diffusers inside a block; see `core.diffusion.attach`."""
    from retouch.core.diffusion.attach import attach as attached

    return attached(pipeline, guidance, hooks=hooks)
