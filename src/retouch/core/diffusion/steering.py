"""What a technique puts into sampling, so that any of them can be run in the same way: the command line's contract."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from retouch.core.diffusion.denoiser import Denoiser
from retouch.core.diffusion.guidance import Guidance, Sum, as_sum, cfg
from retouch.core.diffusion.sampling import Hook, sample


@dataclass(frozen=True, kw_only=True)
class Steering:
    """The parts of a steered run.

    Args:
        guidance: rules; classifier-free guidance is added where none of them uses the unconditional branch.
        hooks: of the sampler.
        context: () -> a block to sample in, for techniques that change the model meanwhile.
    """

    guidance: Guidance | Sum | None = None
    hooks: Sequence[Hook] = ()
    context: Callable[[], AbstractContextManager[Any]] = nullcontext

    def sample(
        self, denoiser: Denoiser, noise: Tensor, condition: Any, *, scale: float = 7.5, **settings: Any
    ) -> Tensor:
        """Samples (b, ...), with settings of `core.diffusion.sampling.sample`.

        Args:
            denoiser: model and noise levels.
            noise: (b, ...).
            condition: as for `sample`.
            scale: of classifier-free guidance; 1 for none.
            settings: further ones.
        """
        rules = as_sum(self.guidance)
        if "uncond" not in rules.branches and scale != 1:
            rules = cfg(scale) + rules
        with self.context():
            return sample(denoiser, noise, condition, guidance=rules, hooks=self.hooks, **settings)
