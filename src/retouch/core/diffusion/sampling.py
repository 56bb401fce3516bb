"""From noise to samples, and back.

for every step:
    hook.before(x, level, denoiser, conditions)  -> x           may rewrite x, by gradients as well
    predictions of all branches, in one batch
    guidance                                     -> prediction
    hook.predicted(move)                         -> prediction  may rewrite x0 and noise
    step(move)                                   -> x'
    hook.after(move, x')                         -> x'          may rewrite what comes out
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from retouch.core.diffusion.denoiser import Condition, Denoiser, Prediction
from retouch.core.diffusion.guidance import Guidance, Sum, as_sum
from retouch.core.diffusion.process import Grid, Level
from retouch.core.diffusion.steps import Move, Step, ddim, ddim_inverse
from retouch.core.errors import InputError, one_of
from retouch.core.models import mode
from retouch.core.progress import bar


class Hook:
    """Sees every step and may change it; a hook with a state of its own begins anew at `start`."""

    def start(self, x: Tensor, grid: Grid) -> None:
        """Before the first step."""

    def before(self, x: Tensor, level: Level, denoiser: Denoiser, conditions: dict[str, Condition]) -> Tensor:
        """Before the model is asked; gives x. Gradients may be switched on inside."""
        return x

    def predicted(self, move: Move) -> Prediction:
        """After guidance; gives the prediction."""
        return move.prediction

    def after(self, move: Move, x: Tensor) -> Tensor:
        """After the step; gives x at `move.there`."""
        return x


def unit_noise(denoiser: Denoiser, count: int, generator: torch.Generator) -> Tensor:
    """Noise to sample from (count, channels, height, width), in the size that the model was made for.

    Raises:
        InputError: if the model does not say what that is.
    """
    config: Any = getattr(denoiser.model, "config", None)
    channels, size = getattr(config, "in_channels", None), getattr(config, "sample_size", None)
    if channels is None or size is None:
        raise InputError(f"The model {type(denoiser.model).__name__} does not tell its size: give noise instead")
    height, width = (size, size) if isinstance(size, int) else size
    drawn = torch.randn(count, channels, height, width, generator=generator)
    return drawn.to(next(denoiser.model.parameters()).device)


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    noise: Tensor,
    condition: Any = None,
    *,
    times: int | Grid = 50,
    step: Step = ddim,
    guidance: Guidance | Sum | None = None,
    negative: Any = None,
    hooks: Sequence[Hook] = (),
    generator: torch.Generator | None = None,
    last: str = "x",
    progress: bool | None = False,
) -> Tensor:
    """Samples from noise.

    Args:
        denoiser: model and noise levels.
        noise: of unit variance (b, ...).
        condition: a text, a label, a sequence of b of them, or keywords of the model; None for none.
        times: steps, or a grid.
        step: such as `ddim`, `ddpm`, `heun`, `dpmpp_2m`.
        guidance: a rule or a sum of rules; plain conditional sampling if None.
        negative: condition of the unconditional branch; none if None.
        hooks: called in order.
        generator: of fresh noise, for steps that need some.
        last: what is given back: "x" at the last level, or the "x0" that was predicted last.
        progress: show a bar; None shows it on a terminal.

    Returns:
        (b, ...): latents or pixels; `denoiser.decode` makes images of them.
    """
    one_of("last", last, ("x", "x0"))
    grid = denoiser.process.grid(times) if isinstance(times, int) else times
    rules = as_sum(guidance)
    conditions = {"cond": denoiser.encode(condition, len(noise))}
    if "uncond" in rules.branches.values():
        conditions["uncond"] = denoiser.encode(negative, len(noise))
    ask = _asker(denoiser, rules, conditions)
    x, move = noise * grid.start, None
    for hook in hooks:
        hook.start(x, grid)
    with mode(denoiser.model, training=False), bar("sampling", grid.steps, show=progress) as line:
        for here, there in pairwise(grid.levels):
            for hook in hooks:
                x = hook.before(x, here, denoiser, conditions).detach()
            move = Move(x, ask(x, here), here, there, ask, generator, move, denoiser, conditions)
            if move.last is not None:
                move.last.last = None  # only one move back is ever looked at
            for hook in hooks:
                move.prediction = hook.predicted(move)
            x = step(move)
            for hook in hooks:
                x = hook.after(move, x)
            line.advance()
    return x if last == "x" or move is None else move.prediction.x0


@torch.no_grad()
def invert(
    denoiser: Denoiser,
    x: Tensor,
    condition: Any = None,
    *,
    times: int | Grid = 50,
    guidance: Guidance | Sum | None = None,
    negative: Any = None,
) -> Tensor:
    """The noise that `sample` with `ddim` makes (nearly) these samples of: DDIM inversion.

    Args:
        denoiser: model and noise levels.
        x: clean samples (b, ...).
        condition: as for `sample`.
        times: steps, or a grid; the same as for sampling again.
        guidance: as for sampling again.
        negative: as for `sample`.

    Returns:
        Noise (b, ...), to be given to `sample`.
    """
    grid = denoiser.process.grid(times) if isinstance(times, int) else times
    if not grid.start:
        raise InputError("times is a grid that starts from no noise, but must start from some")
    rules = as_sum(guidance)
    conditions = {"cond": denoiser.encode(condition, len(x))}
    if "uncond" in rules.branches.values():
        conditions["uncond"] = denoiser.encode(negative, len(x))
    ask = _asker(denoiser, rules, conditions)
    with mode(denoiser.model, training=False):
        for there, here in reversed(list(pairwise(grid.levels))):
            x = ddim_inverse(x, ask(x, there), here, there)
    return x / grid.start


def _asker(denoiser: Denoiser, rules: Sum, conditions: dict[str, Condition]) -> Callable[[Tensor, Level], Prediction]:
    """A function that asks the branches of the rules that are active, with their edits of attention in the model."""

    def ask(x: Tensor, level: Level) -> Prediction:
        active = rules.active(level)
        branches = {name: conditions[which] for name, which in active.branches.items()}
        with active.attached(denoiser.model):
            predictions = denoiser.predict(x, level, branches)
        return active.combine(predictions, x, level)

    return ask
