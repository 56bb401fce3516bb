"""Guidance inside a pipeline of diffusers, called as always: `with attach(pipe, pag(3.0)): pipe("a red circle")`.

The pipeline asks its network for [uncond, cond] and mixes the halves by its own scale. While attached, hooks on the
network add the rows of further branches to what goes in, and put the guided prediction in both halves of what comes
out, so that mixing them changes nothing. Rules that take x0 and noise from different branches need the step as well:
the scheduler's result is corrected by sigma' (noise - the noise that x0 was predicted with).
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from retouch.core import attention
from retouch.core.diffusion.denoiser import DIFFUSERS_NAMES, Prediction, from_prediction, to_prediction
from retouch.core.diffusion.guidance import Guidance, Sum, as_sum, cfg
from retouch.core.diffusion.pipelines import network_of
from retouch.core.diffusion.process import Flow, Level, from_scheduler
from retouch.core.errors import InputError
from retouch.core.models import tree_map

STEPPING = ("DDIMScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler")


@contextmanager
def attach(pipeline: Any, guidance: Guidance | Sum) -> Iterator[Any]:
    """Let a guidance steer a pipeline inside the block.

    Args:
        pipeline: Stable Diffusion, SDXL, DiT, PixArt, SD3 and what is made like them.
        guidance: a rule or a sum; one that does not use the unconditional branch comes on top of the pipeline's own
            guidance scale, one that does takes its place.

    Yields:
        The pipeline.

    Raises:
        InputError: in the call, if a rule needs the unconditional branch and the pipeline was told to do without
            (guidance_scale of 1), or needs a step that the scheduler does not make.
    """
    session = _Session(pipeline, as_sum(guidance))
    scheduler, network = pipeline.scheduler, network_of(pipeline)
    if session.renoise is not None and type(scheduler).__name__ not in STEPPING:
        raise InputError(
            f"The pipeline's scheduler is a {type(scheduler).__name__}, but must be one of {', '.join(STEPPING)} for "
            f"{session.renoise.name}"
        )
    with ExitStack() as stack:
        stack.enter_context(session.rules.attached(network))
        stack.callback(network.register_forward_pre_hook(session.widen, with_kwargs=True).remove)
        stack.callback(network.register_forward_hook(session.narrow).remove)
        stack.callback(network.register_forward_hook(session.forget, always_call=True).remove)
        if session.renoise is not None:
            outer = vars(scheduler).get("step")  # of another block around this one
            scheduler.step = session.stepping(scheduler.step)
            stack.callback(lambda: delattr(scheduler, "step") if outer is None else setattr(scheduler, "step", outer))
        yield pipeline


class _Session:
    """What has to be kept between the hooks of one attachment."""

    def __init__(self, pipeline: Any, rules: Sum) -> None:
        self.pipeline, self.rules = pipeline, rules
        self.renoise = next((part for part in rules.parts if part.renoise is not None), None)
        self.turn = -1 if "DiT" in type(pipeline).__name__ else 1  # DiT's pipeline has the conditional half first
        self.correction: Tensor | None = None
        self.context: Any = None
        self.steps: int | None = None  # that the grid is for

    def widen(self, _model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Before the network: rows of all branches that are active."""
        named = next((name for name in ("sample", "hidden_states") if name in kwargs), None)
        self.x = kwargs[named] if named else args[0]
        time = kwargs["timestep"] if "timestep" in kwargs else args[1]
        self.level = self._level(float(torch.as_tensor(time).flatten()[0]))
        both = self._guided()
        if not both and "uncond" in self.rules.branches:
            raise InputError("guidance_scale is 1 or less, but must be above 1, so that the pipeline has both branches")
        whole = "uncond" in self.rules.branches
        rules = self.rules if whole or not both else cfg(self._scale()) + self.rules
        self.active = rules.active(self.level)
        self.halves = ("uncond", "cond")[:: self.turn] if both else ("cond",)
        self.names = (*self.halves, *(name for name in self.active.branches if name not in ("uncond", "cond")))
        size, count = len(self.x) // len(self.halves), len(self.x)
        rows = {name: slice(k * size, (k + 1) * size) for k, name in enumerate(self.halves)}
        extra = [rows[self.active.branches[name]] for name in self.names[len(self.halves) :]]

        def grow(value: Tensor) -> Tensor:
            if value.ndim == 0 or len(value) != count:
                return value
            return torch.cat([value, *(value[part] for part in extra)])

        self.context = attention.branches(self.names, self.level)
        self.context.__enter__()
        return (tree_map(grow, args), tree_map(grow, kwargs)) if extra else (args, kwargs)

    def forget(self, _model: Any, _args: Any, _output: Any) -> None:
        """After the network, also after an error."""
        if self.context is not None:
            self.context.__exit__(None, None, None)
            self.context = None

    def narrow(self, _model: Any, _args: Any, output: Any) -> Any:
        """After the network: the guided prediction, in the place of each branch that the pipeline knows."""
        whole = output[0] if isinstance(output, tuple) else output.sample
        count = len(self.x) // len(self.halves)
        x, level = self.x[:count], self.level
        predicts = self._predicts()
        parts = dict(zip(self.names, whole.split(count), strict=True))
        channels = x.shape[1]
        told = {name: part[:, :channels] for name, part in parts.items()}  # without a learned variance
        found = {name: to_prediction(predicts, one, x, level.alpha, level.sigma) for name, one in told.items()}
        guided = self.active.combine(found, x, level)
        noise = (x - level.alpha * guided.x0) / level.sigma
        self.correction = guided.noise - noise
        # With the noise that x0 implies, the scheduler finds this x0 in whatever the network predicts.
        result = from_prediction(predicts, Prediction(guided.x0, noise), level.alpha, level.sigma)
        rows = [torch.cat([result, parts[name][:, channels:]], 1) for name in self.halves]
        joined = torch.cat(rows).to(whole.dtype)
        if isinstance(output, tuple):
            return (joined, *output[1:])
        output.sample = joined
        return output

    def stepping(self, own: Any) -> Any:
        """The scheduler's step, with the noise of the branch that was asked for."""

        def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            result = own(model_output, timestep, sample, *args, **kwargs)
            moved = result[0] if isinstance(result, tuple) else result.prev_sample
            there = self.grid.levels[self.level.index + 1]
            in_alpha = type(self.pipeline.scheduler).__name__ == "EulerDiscreteScheduler"  # its samples are x / alpha
            assert self.correction is not None
            correction = self.correction
            if len(correction) != len(moved):  # DiT's pipeline steps both halves
                correction = torch.cat([correction, correction])
            moved = moved + (there.ratio if in_alpha else there.sigma) * correction.to(moved.dtype)
            if isinstance(result, tuple):
                return (moved, *result[1:])
            result.prev_sample = moved
            return result

        return step

    def _level(self, time: float) -> Level:
        steps = self.pipeline.scheduler.num_inference_steps
        if self.steps != steps:
            process = from_scheduler(self.pipeline.scheduler)
            self.grid, self.steps, self.flow = process.grid(steps), steps, isinstance(process, Flow)
        return min(self.grid.levels[:-1], key=lambda level: abs(level.time - time))

    def _predicts(self) -> str:
        kind = getattr(self.pipeline.scheduler.config, "prediction_type", "epsilon")
        return "flow" if self.flow else DIFFUSERS_NAMES.get(kind, kind)

    def _guided(self) -> bool:
        told = getattr(self.pipeline, "do_classifier_free_guidance", None)
        return self._rows_doubled() if told is None else bool(told)

    def _rows_doubled(self) -> bool:
        """For pipelines that do not tell: both halves of the input are the same samples."""
        half = len(self.x) // 2
        return len(self.x) % 2 == 0 and torch.equal(self.x[:half], self.x[half:])

    def _scale(self) -> float:
        scale = getattr(self.pipeline, "guidance_scale", None)
        if not isinstance(scale, int | float):
            raise InputError(
                f"{type(self.pipeline).__name__} does not tell its guidance scale: attach cfg(scale) + the guidance"
            )
        return float(scale)
