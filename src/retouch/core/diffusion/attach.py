"""Guidance inside a pipeline of diffusers, called as always: `with attach(pipe, pag(3.0)): pipe("a red circle")`.

The pipeline asks its network for [uncond, cond] and mixes the halves by its own scale. While attached, hooks on the
network add the rows of further branches to what goes in, and put the guided prediction in both halves of what comes
out, so that mixing them changes nothing. Rules that take x0 and noise from different branches need the step as well:
the scheduler's result is corrected by sigma' (noise - the noise that x0 was predicted with).

The sampler's hooks work here as well. They are given the pipeline's latents and a denoiser of the very keywords that it
calls its network with; how they move the latents is added to what the scheduler steps from.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from retouch.core import attention
from retouch.core.diffusion.denoiser import (
    DIFFUSERS_NAMES,
    Condition,
    Denoiser,
    Prediction,
    from_prediction,
    to_prediction,
)
from retouch.core.diffusion.guidance import Guidance, Sum, as_sum, cfg
from retouch.core.diffusion.pipelines import network_of
from retouch.core.diffusion.process import Flow, Grid, Level, from_scheduler, make_grid
from retouch.core.diffusion.sampling import Hook
from retouch.core.diffusion.steps import Move
from retouch.core.errors import InputError
from retouch.core.models import rows_of, tree_map

ATTACHED: WeakSet[Any] = WeakSet()  # networks: two blocks would each split and widen the other's batch
STEPPING = ("DDIMScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler")


@contextmanager
def attach(pipeline: Any, guidance: Guidance | Sum | None = None, *, hooks: Sequence[Hook] = ()) -> Iterator[Any]:
    """Let a guidance and hooks steer a pipeline inside the block.

    Args:
        pipeline: Stable Diffusion, SDXL, DiT, PixArt, SD3 and what is made like them.
        guidance: a rule or a sum; one that does not use the unconditional branch comes on top of the pipeline's own
            guidance scale, one that does takes its place. None leaves it as it is.
        hooks: of the sampler, called in order; their `start` before the first step.

    Yields:
        The pipeline.

    Raises:
        InputError: if the pipeline is in such a block already; in the call, if a rule needs the unconditional branch
            and the pipeline was told to do without (guidance_scale of 1); if one needs a step that the scheduler does
            not make.
    """
    session = _Session(pipeline, as_sum(guidance), hooks)
    scheduler, network = pipeline.scheduler, network_of(pipeline)
    if session.demanding and type(scheduler).__name__ not in STEPPING:
        raise InputError(
            f"The pipeline's scheduler is a {type(scheduler).__name__}, but must be one of {', '.join(STEPPING)} for "
            f"{session.demanding}"
        )
    if network in ATTACHED:
        raise InputError("pipeline has something attached already: attach a sum of rules, and all hooks, in one block")
    with ExitStack() as stack:
        ATTACHED.add(network)
        stack.callback(ATTACHED.discard, network)
        stack.enter_context(session.rules.attached(network))
        stack.callback(network.register_forward_pre_hook(session.widen, with_kwargs=True).remove)
        stack.callback(network.register_forward_hook(session.narrow).remove)
        stack.callback(network.register_forward_hook(session.forget, always_call=True).remove)
        if session.demanding or hooks:
            outer = vars(scheduler).get("step")  # of another block around this one
            scheduler.step = session.stepping(scheduler.step)
            stack.callback(lambda: delattr(scheduler, "step") if outer is None else setattr(scheduler, "step", outer))
        yield pipeline


class _Session:
    """What has to be kept between the hooks of one attachment."""

    def __init__(self, pipeline: Any, rules: Sum, hooks: Sequence[Hook] = ()) -> None:
        self.pipeline, self.rules, self.hooks = pipeline, rules, hooks
        # What takes x0 and noise apart, or rewrites what a step gives, must know how the scheduler steps.
        names = [part.name for part in rules.parts if part.renoise is not None]
        names += [
            type(hook).__name__
            for hook in hooks
            if type(hook).predicted is not Hook.predicted or type(hook).after is not Hook.after
        ]
        self.demanding = names[0] if names else ""
        self.mixes = bool(rules.parts or names)  # else the pipeline mixes its halves as always
        self.moved: Tensor | None = None  # by how much hooks have moved the latents
        self.move: Move | None = None
        self.turn = -1 if "DiT" in type(pipeline).__name__ else 1  # DiT's pipeline has the conditional half first
        self.correction: Tensor | None = None
        self.context: Any = None
        self.asking = False  # a hook asks the network itself
        self.steps: int | None = None  # that the grid is for
        self.index: int | None = None  # of the step before

    def widen(self, _model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Before the network: rows of all branches that are active."""
        if self.asking:
            return args, kwargs
        named = next((name for name in ("sample", "hidden_states") if name in kwargs), None)
        self.x = kwargs[named] if named else args[0]
        time = kwargs["timestep"] if "timestep" in kwargs else args[1]
        self.level = self._level(float(torch.as_tensor(time).flatten()[0]))
        both = self._guided()
        self.halves = ("uncond", "cond")[:: self.turn] if both else ("cond",)
        if self.hooks:
            self.x = self._hooked(args, kwargs, named)
            args, kwargs = (args, {**kwargs, named: self.x}) if named else ((self.x, *args[1:]), kwargs)
        whole = "uncond" in self.rules.branches
        if not both and whole:
            raise InputError("guidance_scale is 1 or less, but must be above 1, so that the pipeline has both branches")
        rules = self.rules if whole or not both or not self.mixes else cfg(self._scale()) + self.rules
        self.active = rules.active(self.level)
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
        if self.asking:
            return
        if self.context is not None:
            self.context.__exit__(None, None, None)
            self.context = None

    def narrow(self, _model: Any, _args: Any, output: Any) -> Any:
        """After the network: the guided prediction, in the place of each branch that the pipeline knows."""
        if self.asking or not self.mixes:
            return output
        whole = output[0] if isinstance(output, tuple) else output.sample
        count = len(self.x) // len(self.halves)
        x, level = self.x[:count], self.level
        predicts = self._predicts()
        parts = dict(zip(self.names, whole.split(count), strict=True))
        channels = x.shape[1]
        told = {name: part[:, :channels] for name, part in parts.items()}  # without a learned variance
        found = {name: to_prediction(predicts, one, x, level.alpha, level.sigma) for name, one in told.items()}
        guided = self.active.combine(found, x, level)
        if self.hooks:
            there = self.grid.levels[level.index + 1]
            self.move = Move(x, guided, level, there, self._ask, denoiser=self.denoiser, conditions=self.conditions)
            for hook in self.hooks:
                guided = self.move.prediction = hook.predicted(self.move)
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
        """The scheduler's step, from where hooks have moved to, with the noise of the branch that was asked for."""
        scheduler = self.pipeline.scheduler

        def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.moved is not None:
                scaling = getattr(scheduler, "scale_model_input", lambda ones, _time: ones)
                factor = scaling(torch.ones_like(self.moved[:1]), timestep)  # the network may see the latents scaled
                sample = sample + like(self.moved / factor, sample)
            result = own(model_output, timestep, sample, *args, **kwargs)
            if not self.demanding:
                return result
            moved = result[0] if isinstance(result, tuple) else result.prev_sample
            there = self.grid.levels[self.level.index + 1]
            # Euler's samples are x / alpha.
            scale = there.alpha if type(scheduler).__name__ == "EulerDiscreteScheduler" else 1.0
            assert self.correction is not None
            moved = moved + there.sigma / scale * like(self.correction, moved)
            if self.hooks and self.move is not None:
                x = moved[: len(self.move.x)] * scale
                for hook in self.hooks:
                    x = hook.after(self.move, x)
                moved = like(x / scale, moved)
            if isinstance(result, tuple):
                return (moved, *result[1:])
            result.prev_sample = moved
            return result

        return step

    def _hooked(self, args: tuple[Any, ...], kwargs: dict[str, Any], named: str | None) -> Tensor:
        """The network's input once hooks have moved its latents; what they need to ask is made from the same call."""
        count, size = len(self.x), len(self.x) // len(self.halves)
        told = inspect.signature(network_of(self.pipeline).forward).parameters
        whole = {**dict(zip(told, args, strict=False)), **kwargs}
        latents, time = (named or next(iter(told))), float(torch.as_tensor(whole["timestep"]).flatten()[0])
        others = {name: value for name, value in whole.items() if name not in (latents, "timestep")}
        batch, rest = rows_and_rest(others, count)
        places = {name: slice(k * size, (k + 1) * size) for k, name in enumerate(self.halves)}
        self.conditions = {name: rows_of(batch, at.start, at.stop) for name, at in places.items()}
        ratio = time / self.level.time if self.level.time else 1.0  # Flux is told a thousandth of the time

        def call(model: Any, x: Tensor, times: Tensor, condition: Condition) -> Any:
            return model(**{latents: x, "timestep": times * ratio if ratio != 1 else times, **rest, **condition})

        self.denoiser = Denoiser(network_of(self.pipeline), self.process, predicts=self._predicts(), call=call)
        x = before = self.x[places["cond"]]
        first = self.index is None or self.level.index == 0 or self.level.index < self.index
        self.index = self.level.index
        with self._asking():
            for hook in self.hooks:
                if first:
                    hook.start(x, self.grid)
                x = hook.before(x, self.level, self.denoiser, self.conditions).detach()
        self.moved = x - before
        return like(x, self.x)

    def _ask(self, x: Tensor, level: Level) -> Prediction:
        """The conditional prediction elsewhere, for hooks that ask again."""
        with self._asking():
            return self.denoiser(x, level, self.conditions["cond"])

    @contextmanager
    def _asking(self) -> Iterator[None]:
        self.asking = True
        try:
            yield
        finally:
            self.asking = False

    def _level(self, time: float) -> Level:
        scheduler = self.pipeline.scheduler
        if self.steps != scheduler.num_inference_steps:
            self.process, self.steps = from_scheduler(scheduler), scheduler.num_inference_steps
            self.flow = isinstance(self.process, Flow)
            # How a family sets up a flow is its pipeline's knowledge; what it has set is in the scheduler.
            self.grid = flow_levels(scheduler) if self.flow else self.process.grid(self.steps)

        def apart(level: Level) -> float:
            return min(abs(level.time - time), abs(level.time - 1000 * time))  # Flux tells its network a thousandth

        return min(self.grid.levels[:-1], key=apart)

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


def flow_levels(scheduler: Any) -> Grid:
    """The levels that a flow's scheduler is set to."""
    sigmas, scale = scheduler.sigmas.double().tolist(), scheduler.config.num_train_timesteps
    return make_grid([scale * s for s in sigmas], [1 - s for s in sigmas], sigmas, start=sigmas[0])


def like(x: Tensor, batch: Tensor) -> Tensor:
    """One half's rows for every half of a batch, in its precision."""
    return torch.cat([x] * (len(batch) // len(x))).to(batch.dtype)


def rows_and_rest(keywords: Mapping[str, Any], count: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keywords of a network that have a row a sample, tensors or mappings of them, and all others."""
    rows = {
        name: value
        for name, value in keywords.items()
        if (isinstance(value, Tensor) and value.ndim and len(value) == count)
        or (isinstance(value, Mapping) and value and all(isinstance(part, Tensor) for part in value.values()))
    }
    return rows, {name: value for name, value in keywords.items() if name not in rows}
