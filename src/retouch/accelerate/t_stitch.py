"""T-Stitch: a small model takes the noisy share of the sampling steps, a large one the rest.

With models D_0 (smallest) to D_m-1 (largest) of the same data, latents and noise levels, shares f_i of the trajectory
that sum to 1, and c_i = f_0 + ... + f_i, each step runs one model: the first i with

    step        (step + 1) / steps <= c_i      Stable Diffusion; the default, as it holds for any spacing and for flows
    timestep    t / T >= 1 - c_i               DiT, two models; t is the timestep of training, not the number of a step
    progress    1 - t / T <= c_i               DiT, any number of models

and for two models f_0 is the ratio r. Nothing is trained: at high noise models of different size predict nearly the
same, and only late do they part. On evenly spaced timesteps the rules agree within one step.

Use it where a smaller model of the same family is at hand (DiT-S with DiT-XL, BK-SDM-Tiny with Stable Diffusion, SSD-1B
with SDXL); it goes with fewer steps, any solver, guidance, ControlNet and LoRA. Up to r = 0.4 the paper sees no loss.
Not for pairs of other latents or another noise schedule (refused where it can be told): samples would look right and
drift. Large first is worse at equal cost.

    stitch([small, large], [0.4, 0.6])                    for our sampler, of two `Denoiser`s
    with stitch_pipeline(pipe, small_unet, 0.4): pipe(…)  inside a pipeline of diffusers
    StitchedDenoiser([small_unet, unet], [0.4, 0.6])      a network in the place of another

Paper: arXiv 2402.14167. Code: NVlabs/T-Stitch, whose rules differ by one step as above. Here a share of 0 is skipped
by all rules, and where rounding leaves "progress" above the last c_i the last model is taken (their code returns
nothing). Their LCM pipeline alone tests step / steps <= r, which is "step" with r + 1 / steps. As there, a multistep
solver keeps its history over the switch.

Cost: the calls of the models alone (`stitched_cost`); both stay in memory, where they are: nothing is moved or copied.
Compile each model, not the wrapper. Limits: schedulers with steps in between (KDPM2) may switch within a step; a loop
that asks its branches one after the other needs a scheduler without repeated timesteps.
"""

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from retouch.core.cards import Card
from retouch.core.diffusion.denoiser import (
    DIFFUSERS_NAMES,
    PREDICTS,
    Condition,
    Denoiser,
    Prediction,
    from_prediction,
    to_prediction,
)
from retouch.core.diffusion.pipelines import network_of
from retouch.core.diffusion.process import EDM, VP, Level, Process, from_scheduler
from retouch.core.diffusion.steps import Move, Step
from retouch.core.errors import InputError, in_range, one_of, positive
from retouch.core.models import device_of

CARD = Card(
    title="T-Stitch",
    room="accelerate",
    paper="arXiv:2402.14167",
    shape="sampler part",
    line="Samples with a small model at the noisiest share of the steps and with the large one after.",
    tags=("diffusion", "two models", "any sampler", "no training"),
    plugin="stitch",
)

Rule = Literal["step", "timestep", "progress"]
RULES = ("step", "timestep", "progress")
SLACK = {"step": 1e-9, "timestep": 1e-9, "progress": 1e-6}  # the paper's code sums fractions in float32
BFLOAT16 = 1 / 256  # timesteps that went through bfloat16 are this far off

# --- functional core ------------------------------------------------------------------------------------------------


def stitch_index(
    position: Any,
    *,
    fractions: Sequence[float] | float,
    rule: Rule = "step",
    num_steps: int | None = None,
    num_train_timesteps: int = 1000,
) -> int:
    """Which model makes a step; 0 is the smallest.

    Args:
        position: the step's number 0 to num_steps - 1, the noisiest first, for "step"; else the timestep of training,
            0 to num_train_timesteps.
        fractions: share of each model, 0 or more, of sum 1; or the ratio r alone for two models.
        rule: "step", "timestep" or "progress", see above.
        num_steps: of the sampler, for "step".
        num_train_timesteps: T.
    """
    fractions = check_fractions(fractions)
    one_of("rule", rule, RULES)
    if rule == "step":
        if num_steps is None:
            raise InputError("num_steps is None, but must be the number of sampling steps for the rule 'step'")
        positive("num_steps", num_steps)
        in_range("position", position, 0, num_steps - 1)
        progress = (float(position) + 1) / num_steps
    else:
        positive("num_train_timesteps", num_train_timesteps)
        in_range("position", position, 0, num_train_timesteps)
        progress = 1 - float(position) / num_train_timesteps
    # All three rules compare progress with c_i; they differ in what progress is, and in slack.
    shares = zip(fractions, itertools.accumulate(fractions), strict=True)
    fits = (i for i, (share, until) in enumerate(shares) if share > 0 and progress <= until + SLACK[rule])
    return next(fits, max(i for i, share in enumerate(fractions) if share > 0))


def stitched_cost(
    costs: Sequence[float],
    fractions: Sequence[float] | float,
    num_steps: int,
    *,
    rule: Rule = "step",
    num_train_timesteps: int = 1000,
) -> float:
    """Cost of a whole trajectory, in whole steps: the sum over steps of the cost of the model that makes it.

    Args:
        costs: of one call of each model, in any unit.
        fractions: as for `stitch_index`.
        num_steps: of the sampler; for the rules on timesteps they are evenly spaced from T - 1 to 0.
        rule: as for `stitch_index`.
        num_train_timesteps: T.
    """
    fractions = check_fractions(fractions, len(costs))
    in_range("num_steps", num_steps, 1)
    last = num_train_timesteps - 1
    even = [round(last * (1 - k / max(num_steps - 1, 1))) for k in range(num_steps)]
    positions = range(num_steps) if rule == "step" else even
    settings: Any = {"rule": rule, "num_steps": num_steps, "num_train_timesteps": num_train_timesteps}
    return float(sum(costs[stitch_index(p, fractions=fractions, **settings)] for p in positions))


def best_fractions(
    quality: Callable[[Sequence[float]], float], costs: Sequence[float], budget: float, *, grid: float = 0.1
) -> Sequence[float]:
    """The fractions of highest quality within a budget, of all those on a grid; of equal ones the cheapest.

    Args:
        quality: of fractions; higher is better. It is asked once for each point of the grid within the budget.
        costs: of one call of each model.
        budget: largest mean cost of a step, sum f_i cost_i, in the unit of `costs`.
        grid: distance of two shares, 1 over a whole number.
    """
    if len(costs) < 2:
        raise InputError(f"costs has {len(costs)} entries, but must have at least 2, one a model")
    in_range("grid", grid, 0, 1, above=True)
    parts = round(1 / grid)
    if abs(parts * grid - 1) > 1e-6:
        raise InputError(f"grid is {grid}, but must be 1 over a whole number")
    cuts = itertools.combinations_with_replacement(range(parts + 1), len(costs) - 1)
    points = [tuple((b - a) / parts for a, b in itertools.pairwise((0, *cut, parts))) for cut in cuts]
    mean = {point: sum(f * c for f, c in zip(point, costs, strict=True)) for point in points}
    within = [point for point in points if mean[point] <= budget + 1e-9 * abs(budget)]
    if not within:
        raise InputError(f"budget is {budget}, but must be at least {min(mean.values()):g}, the cheapest model's cost")
    return max(within, key=lambda point: (quality(point), -mean[point]))


def check_fractions(fractions: Sequence[float] | float, count: int | None = None) -> tuple[float, ...]:
    """Fractions as numbers, of a ratio those of two models.

    Raises:
        InputError: if they are fewer than 2, not `count`, negative, or do not sum to 1 within 1e-6.
    """
    if isinstance(fractions, int | float):
        in_range("ratio", fractions, 0, 1)
        fractions = (fractions, 1 - fractions)
    shares = tuple(float(share) for share in fractions)
    if len(shares) < 2 or (count is not None and len(shares) != count):
        wanted = "at least 2" if count is None or count < 2 else str(count)
        raise InputError(f"fractions has {len(shares)} entries, but must have {wanted}, one a model")
    for number, share in enumerate(shares):
        in_range(f"fractions[{number}]", share, 0, 1 + 1e-6)
    if abs(sum(shares) - 1) > 1e-6:
        raise InputError(f"fractions sum to {sum(shares):g}, but must sum to 1")
    return shares


def check_levels(processes: Sequence[Process]) -> None:
    """Raise unless all have the same noise at the same time."""
    for process in processes[:-1]:
        last = processes[-1]
        same = type(process) is type(last)
        if same and isinstance(process, VP) and isinstance(last, VP):
            tables = process.alphas_cumprod, last.alphas_cumprod
            same = len(tables[0]) == len(tables[1]) and torch.allclose(*tables, rtol=1e-3, atol=1e-6)
        if not same:
            raise InputError("The denoisers differ in their noise schedules, but must be trained with the same one")


# --- as a network -----------------------------------------------------------------------------------------------------


class StitchedDenoiser(nn.Module):
    """Networks of diffusers, or plain ones (x, timestep, ...) -> prediction, in the place of one.

    It has the attributes of the largest model (`config`, `dtype`, `in_channels`, ...), so that a pipeline takes it as
    its `unet` or `transformer`. Branches that share a call share the model.

    Args:
        denoisers: the smallest first.
        fractions: share of each; or the ratio r for two.
        rule: see `stitch_index`. "step" needs `set_timesteps`, a scheduler, or `num_steps` alone.
        num_steps: of the sampler; without timesteps to look up, falling timesteps are counted as they come.
        num_train_timesteps: T.
        prediction_types: of each, "epsilon", "sample", "v_prediction" (or "noise", "x0", "velocity", "flow"); outputs
            are converted to what the largest predicts. None if they predict the same.
        processes: noise levels of each: they must agree, and are needed where prediction types differ.
        scheduler: of diffusers, whose timesteps are looked up at every call.
        timestep_scale: what the caller multiplies timesteps by: 1 / 1000 in Flux.
    """

    def __init__(
        self,
        denoisers: Sequence[nn.Module],
        fractions: Sequence[float] | float,
        *,
        rule: Rule = "step",
        num_steps: int | None = None,
        num_train_timesteps: int = 1000,
        prediction_types: Sequence[str] | None = None,
        processes: Sequence[Process] | None = None,
        scheduler: Any = None,
        timestep_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if len(denoisers) < 2:
            raise InputError(f"denoisers has {len(denoisers)} entries, but must have at least 2")
        one_of("rule", rule, RULES)
        if num_steps is not None:
            in_range("num_steps", num_steps, 1)
        positive("timestep_scale", timestep_scale)
        self.fractions: tuple[float, ...] = check_fractions(fractions, len(denoisers))
        self.rule, self.num_steps, self.num_train_timesteps = rule, num_steps, num_train_timesteps
        self.timestep_scale, self.scheduler = timestep_scale, scheduler
        self.prediction_types = _prediction_types(prediction_types, len(denoisers))
        self.process: Process | None = None
        if processes is not None:
            if len(processes) != len(denoisers):
                raise InputError(f"processes has {len(processes)} entries, but must have {len(denoisers)}")
            check_levels(processes)
            self.process = processes[-1]
        if len(set(self.prediction_types)) > 1 and self.process is None:
            raise InputError(f"prediction_types are {prediction_types}, which differ, so that processes must be given")
        for name in ("in_channels", "out_channels"):
            known = [getattr(getattr(model, "config", None), name, None) for model in denoisers]
            if len({value for value in known if value is not None}) > 1:
                raise InputError(f"The denoisers have {name} of {known}, but must have the same")
        self.denoisers = nn.ModuleList(denoisers)
        self._times: list[float] = []
        self._starts: list[int] = []  # for each timestep, where in the list its step begins
        self._told: Any = None
        self._place, self._time = -1, float("-inf")
        self._shapes: tuple[Any, Any] = (None, None)

    def set_timesteps(self, timesteps: Sequence[Any] | Tensor) -> None:
        """The sampler's timesteps, the noisiest first, in the scheduler's own units.

        Where one is repeated (Heun, PNDM), its first call ends the step before, with the model of that step.
        """
        times = [float(t) for t in timesteps]
        if not times or any(b > a for a, b in itertools.pairwise(times)):
            raise InputError(f"timesteps is {times}, but must be at least one, falling")
        starts: list[int] = []
        for k, time in enumerate(times):
            twice = 0 < k < len(times) - 1 and times[k + 1] == time != times[k - 1]
            starts.append(starts[-1] if twice else k)
        self._times, self._starts, self._place = times, starts, -1
        self.num_steps = len(set(starts))

    def choose(self, timestep: Any) -> int:
        """Which model a call at this timestep goes to: a number, or a tensor of equal ones ( ) or (b,)."""
        values = set(timestep.reshape(-1).tolist()) if isinstance(timestep, Tensor) else {timestep}
        if len(values) != 1:
            raise InputError(f"timestep holds {sorted(values)}, but all samples of a batch must be at the same one")
        time = float(values.pop()) / self.timestep_scale
        if self.scheduler is not None and self.scheduler.timesteps is not self._told:
            self._told = self.scheduler.timesteps
            self.set_timesteps(self._told)
        if self._times:
            start = self._look_up(time)
            position = len(set(self._starts[:start])) if self.rule == "step" else self._times[start]
        else:
            position = self._count(time) if self.rule == "step" else time
        total = self.num_train_timesteps
        return stitch_index(
            position, fractions=self.fractions, rule=self.rule, num_steps=self.num_steps, num_train_timesteps=total
        )

    def _look_up(self, time: float) -> int:
        times = self._times
        place = min(range(len(times)), key=lambda k: abs(times[k] - time))
        if abs(times[place] - time) > max(abs(time) * BFLOAT16, 1e-3):
            raise InputError(f"timestep is {time:g}, but must be one of those that set_timesteps was given")
        if place + 1 < len(times) and times[place + 1] == times[place] and self._place in (place, place + 1):
            place += 1
        self._place = place
        return self._starts[place]

    def _count(self, time: float) -> int:
        if self.num_steps is None:
            raise InputError("The rule 'step' must know the steps: call set_timesteps, or give num_steps or scheduler")
        self._place = 0 if self._place < 0 or time > self._time else self._place + (time < self._time)
        self._time = time
        return self._place

    def forward(self, sample: Tensor | None = None, timestep: Any = None, *args: Any, **kwargs: Any) -> Any:
        """One model's answer, as it gives it.

        Args:
            sample: noisy input (b, ...); transformers may name it hidden_states.
            timestep: a number or a tensor ( ) or (b,), the same for all.
            args: of the model.
            kwargs: of the model.
        """
        x = kwargs["hidden_states"] if sample is None else sample
        index = self.choose(timestep)
        model = self.denoisers[index]
        if sample is None:
            output = model(*args, timestep=timestep, **kwargs)
        elif not args and "timestep" in inspect.signature(model.forward).parameters:
            output = model(sample, timestep=timestep, **kwargs)  # it is not always the second argument
        else:
            output = model(sample, timestep, *args, **kwargs)
        told = output if isinstance(output, Tensor) else output[0]
        if self._shapes[0] == x.shape and self._shapes[1] != told.shape:
            raise InputError(
                f"Denoiser {index} puts out {tuple(told.shape)}, but must put out what the others do, "
                f"{tuple(self._shapes[1])}"
            )
        self._shapes = x.shape, told.shape
        own, wanted = self.prediction_types[index], self.prediction_types[-1]
        return output if own == wanted else self._converted(output, told, x, timestep, own, wanted)

    def _converted(self, output: Any, told: Tensor, x: Tensor, timestep: Any, own: str, wanted: str) -> Any:
        assert self.process is not None
        time = torch.as_tensor(timestep, dtype=torch.float64).reshape(-1)[:1] / self.timestep_scale
        alpha, sigma = (float(value) for value in self.process.levels(time))
        channels = x.shape[1]
        prediction = to_prediction(own, told[:, :channels], x, alpha, sigma)
        result = torch.cat([from_prediction(wanted, prediction, alpha, sigma), told[:, channels:]], 1).to(told.dtype)
        if isinstance(output, Tensor):
            return result
        if isinstance(output, tuple):
            return (result, *output[1:])
        output.sample = result
        return output

    @property
    def dtype(self) -> torch.dtype:
        """Of the largest model."""
        return next((p.dtype for p in self.denoisers[-1].parameters()), torch.get_default_dtype())

    @property
    def device(self) -> torch.device:
        """Of the largest model."""
        return device_of(self.denoisers[-1])

    @property
    def in_channels(self) -> Any:
        """Of the largest model."""
        largest = self.denoisers[-1]
        config = getattr(largest, "config", None)
        source: Any = config if hasattr(config, "in_channels") else largest
        return source.in_channels

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "denoisers":
                raise
            return getattr(self.denoisers[-1], name)


def _prediction_types(given: Sequence[str] | None, count: int) -> tuple[str, ...]:
    if given is None:
        return ("noise",) * count
    if len(given) != count:
        raise InputError(f"prediction_types has {len(given)} entries, but must have {count}, one a denoiser")
    for kind in given:
        one_of("prediction_types", kind, (*DIFFUSERS_NAMES, *PREDICTS[:4]))
    return tuple(DIFFUSERS_NAMES.get(kind, kind) for kind in given)


@contextmanager
def stitch_pipeline(
    pipeline: Any, smaller: Any, fractions: Sequence[float] | float = 0.4, *, rule: Rule = "step"
) -> Iterator[Any]:
    """Let smaller models make the first steps of a pipeline of diffusers inside the block.

    Args:
        pipeline: its own network is the largest.
        smaller: a network or a pipeline, or a sequence of them, the smallest first. Networks are taken to predict what
            the pipeline's does under the same schedule; of pipelines both are read off their schedulers.
        fractions: share of each, or the ratio r of a single one.
        rule: see `stitch_index`.

    Yields:
        The pipeline.
    """
    name = "transformer" if getattr(pipeline, "unet", None) is None else "unet"
    parts = [*(smaller if isinstance(smaller, list | tuple) else [smaller]), pipeline]
    schedulers = [getattr(part, "scheduler", pipeline.scheduler) for part in parts]
    flow = "FlowMatch" in type(pipeline.scheduler).__name__
    kinds = [scheduler.config.get("prediction_type", "flow" if flow else "epsilon") for scheduler in schedulers]
    own = network_of(pipeline)
    stitched = StitchedDenoiser(
        [part if isinstance(part, nn.Module) else network_of(part) for part in parts],
        fractions,
        rule=rule,
        num_train_timesteps=pipeline.scheduler.config.num_train_timesteps,
        prediction_types=kinds,
        processes=[from_scheduler(scheduler) for scheduler in schedulers],
        scheduler=pipeline.scheduler,
        timestep_scale=1e-3 if "Flux" in type(pipeline).__name__ else 1.0,
    )
    setattr(pipeline, name, stitched)
    try:
        yield pipeline
    finally:
        setattr(pipeline, name, own)


# --- for our sampler --------------------------------------------------------------------------------------------------


def stitch(denoisers: Sequence[Denoiser], fractions: Sequence[float] | float = 0.4, *, rule: Rule = "step") -> Denoiser:
    """One denoiser of several, for `sample`, `invert` and whatever takes one.

    Each encodes a text or a label for itself, and all branches of a step are one model's. A guidance scale of each
    model's own is two guidances with windows: cfg(2).within(0, r) + cfg(4).within(r, 1), where r steps is whole.

    Args:
        denoisers: the smallest first; they may predict different things, but at the same noise levels.
        fractions: share of each; or the ratio r for two.
        rule: see `stitch_index`.
    """
    return Stitched(denoisers, fractions, rule=rule)


class _Each(dict[str, Any]):
    """The condition of each model; to those who do not ask, that of the largest."""

    def __init__(self, parts: Sequence[Condition]) -> None:
        super().__init__(parts[-1])
        self.parts = tuple(parts)


class Stitched(Denoiser):
    """What `stitch` gives."""

    def __init__(
        self, denoisers: Sequence[Denoiser], fractions: Sequence[float] | float = 0.4, *, rule: Rule = "step"
    ) -> None:
        if len(denoisers) < 2:
            raise InputError(f"denoisers has {len(denoisers)} entries, but must have at least 2")
        one_of("rule", rule, RULES)
        largest = denoisers[-1]
        check_levels([denoiser.process for denoiser in denoisers])
        if rule != "step" and isinstance(largest.process, EDM):
            raise InputError(f"rule is {rule!r}, but must be 'step' where time is sigma, as in EDM")
        super().__init__(
            nn.ModuleList([denoiser.model for denoiser in denoisers]),
            largest.process,
            predicts=largest.predicts,
            sigma_data=largest.sigma_data,
            decode=largest.decode,
        )
        self.denoisers, self.rule = tuple(denoisers), rule
        self.fractions = check_fractions(fractions, len(denoisers))
        self.kept: int | None = None

    def encode(self, condition: Any, count: int) -> Condition:
        """See `Denoiser.encode`."""
        if isinstance(condition, Mapping):
            return condition
        return _Each([denoiser.encode(condition, count) for denoiser in self.denoisers])

    def index(self, level: Level) -> int:
        """Which model makes the step that starts at a level."""
        if self.rule == "step":
            return stitch_index(level.index, fractions=self.fractions, num_steps=level.steps)
        total = self.process.timesteps if isinstance(self.process, VP) else 1000
        return stitch_index(level.time, fractions=self.fractions, rule=self.rule, num_train_timesteps=total)

    def predict(self, x: Tensor, level: Level, branches: Mapping[str, Condition]) -> dict[str, Prediction]:
        """See `Denoiser.predict`."""
        index = self.index(level) if self.kept is None else self.kept
        own = {name: part.parts[index] if isinstance(part, _Each) else part for name, part in branches.items()}
        found = self.denoisers[index].predict(x, level, own)
        for prediction in found.values():
            if prediction.x0.shape != x.shape:
                raise InputError(
                    f"Denoiser {index} predicts {tuple(prediction.x0.shape)}, but must predict the shape of x, "
                    f"{tuple(x.shape)}"
                )
        return found


def one_model(step: Step) -> Step:
    """A step that asks more than once, such as `heun`, with the model that it began with to its end."""

    def made(move: Move) -> Tensor:
        if not isinstance(move.denoiser, Stitched):
            return step(move)
        move.denoiser.kept = move.denoiser.index(move.here)
        try:
            return step(move)
        finally:
            move.denoiser.kept = None

    return made
