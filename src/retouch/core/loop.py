"""The one training loop, and this is all of it:

    on_start(run)                                   the model is in train mode, on its device, at its first weights
    (resuming: weights, optimizer, scheduler and callbacks take the state of the checkpoint)
    for every epoch:
        on_epoch(run)                               not again when resuming inside of the epoch
        for every step:
            for every batch of the step:            one, or as many as gradients are accumulated over
                batch = on_batch(run, batch)        may give back another batch
                losses = objective(model, batch, run)
                backward of their sum
            gradients are clipped
            on_gradients(run)                       may change them
            the optimizer steps, the scheduler steps, gradients are dropped
            on_step(run)                            may change the weights
            metrics and, when it is due, the checkpoint are written
    on_end(run)                                     always, also after an error

Devices, mixed precision, accumulation, several processes and trackers are accelerate's: pass an `Accelerator` to set
them up.

Two promises. A run killed at any moment and started again with the same checkpoint ends with the weights of a run that
was not (bit for bit on CPU): a step draws its randomness from (seed, step), an epoch its order from (seed, epoch). And
several processes give the weights of one, within rounding: `batch_size` counts samples over all of them, and each one
weighs in with its share of a batch (dropout and batch statistics apart, which each process has for itself).
"""

import contextlib
import functools
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from retouch.core import seeds
from retouch.core.batches import Batches, Streamed, as_batches
from retouch.core.checkpoints import atomic_file, load_state, save_state
from retouch.core.errors import Diverged, InputError, positive
from retouch.core.models import Batch, mode, to_device
from retouch.core.objectives import Losses, Objective, as_objective, cross_entropy
from retouch.core.progress import Bar, bar

if TYPE_CHECKING:
    from accelerate import Accelerator

OptimizerChoice = Optimizer | Callable[..., Optimizer]
SchedulerChoice = LRScheduler | Callable[[Optimizer, int], LRScheduler]
NO_BATCH = "The data gave no batch, but must have at least one sample"


class Callback:
    """Something that acts at the loop's events; see the top of this file for when each of them is.

    A callback with a state that training changes gives it as `state_dict` and takes it back, so that a resumed run has
    it: any nesting of dicts and lists over tensors, numbers and text.
    """

    def on_start(self, run: "Run") -> None:
        """Before the first step; when resuming, before the checkpoint is loaded."""

    def on_epoch(self, run: "Run") -> None:
        """Before an epoch."""

    def on_batch(self, run: "Run", batch: Batch) -> Batch:
        """Give back the batch to train on."""
        return batch

    def on_gradients(self, run: "Run") -> None:
        """Gradients are complete, unscaled and clipped."""

    def on_step(self, run: "Run") -> None:
        """The optimizer has stepped."""

    def on_end(self, run: "Run") -> None:
        """After the last step, or after an error."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""


class History:
    """A record a step: step (from 1), epoch (from 0), loss and its named terms, lr, and what callbacks logged."""

    def __init__(self, records: Sequence[dict[str, Any]] = ()) -> None:
        self.records = list(records)

    def __getitem__(self, name: str) -> list[Any]:
        """All values of one measure, in order."""
        return [record[name] for record in self.records if name in record]

    def __len__(self) -> int:
        return len(self.records)


@dataclass
class Run:
    """What objectives and callbacks see of a training run.

    Attributes:
        model: call this one; under several processes it wraps the user's model so that gradients are shared.
        module: the user's own model, for its layers and attributes.
        optimizer: the torch optimizer.
        accelerator: accelerate's handle on devices and processes.
        seed: the run's seed.
        steps: optimizer steps in all.
        step: optimizer steps finished.
        epoch: epochs finished.
        index: batches of the current epoch that have been trained on.
        history: of the steps finished.
        generator: a CPU generator for this step's draws; the same ones when the step is repeated after a resume.
    """

    model: nn.Module
    module: nn.Module
    optimizer: Optimizer
    accelerator: "Accelerator"
    seed: int
    steps: int
    step: int = 0
    epoch: int = 0
    index: int = 0
    history: History = field(default_factory=History)
    generator: torch.Generator = field(default_factory=torch.Generator)
    _logged: dict[str, float] = field(default_factory=dict)
    _stopping: bool = False

    def reseed(self, *keys: object) -> None:
        """Make all randomness from here on a function of (seed, keys, process), with the global generators too."""
        rank = self.accelerator.process_index
        self.generator = seeds.generator(self.seed, "draws", *keys, rank)
        seeds.reseed(seeds.derive(self.seed, *keys, rank))

    def log(self, **values: float) -> None:
        """Add measures to this step's record."""
        _free_names(values)
        self._logged.update(values)

    def stop(self) -> None:
        """End the run after this step."""
        self._stopping = True

    @property
    def over(self) -> bool:
        """Whether all steps are done, or the run was told to stop."""
        return self.step >= self.steps or self._stopping


@dataclass(frozen=True)
class Checkpoint:
    """Where and how often a run is saved.

    Args:
        folder: holds `state.safetensors` (the latest state, replaced at once) and `metrics.jsonl`.
        every: steps between two saves; None saves at the end of every epoch. The end of the run is always saved.
    """

    folder: str | Path
    every: int | None = None

    @property
    def state(self) -> Path:
        """The file of the latest state."""
        return Path(self.folder) / "state.safetensors"

    @property
    def metrics(self) -> Path:
        """The metrics up to that state and perhaps beyond."""
        return Path(self.folder) / "metrics.jsonl"


def fit(
    model: nn.Module,
    data: Any,
    objective: Callable[..., Losses] = cross_entropy,
    *,
    steps: int | None = None,
    epochs: int | None = None,
    batch_size: int = 64,
    optimizer: OptimizerChoice | None = None,
    scheduler: SchedulerChoice | None = None,
    callbacks: Sequence[Callback] = (),
    clip: float | None = None,
    accelerator: "Accelerator | None" = None,
    checkpoint: Checkpoint | str | Path | None = None,
    log: str | Path | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> History:
    """Train a model in place.

    Args:
        model: any nn.Module; parameters that do not require gradients are left alone.
        data: a Dataset, DataLoader, (inputs, targets), list of batches, or `Batches` such as `Together`.
        objective: (model, batch, run) -> scalar or named scalars, minimised in sum.
        steps: optimizer steps; give either steps or epochs.
        epochs: passes over the data.
        batch_size: samples a batch over all processes, where the data does not say itself.
        optimizer: a torch optimizer, or a function from parameters to one; AdamW at 1e-3 if None.
        scheduler: a learning rate scheduler stepped after every optimizer step, or a function from
            (optimizer, steps) to one.
        callbacks: called in this order at every event.
        clip: largest norm of all gradients together.
        accelerator: an `accelerate.Accelerator`; a plain one if None.
        checkpoint: where the run is saved and, if it was there before, resumed from.
        log: file of JSON lines that takes every step's record; with a checkpoint, its `metrics.jsonl` does.
        seed: of the order of the data and of all randomness inside.
        progress: show a progress bar; None shows it on a terminal.

    Returns:
        The history, of the whole run also when it was resumed.

    Raises:
        InputError: if the arguments do not fit together, or the checkpoint is damaged or another run's.
        Diverged: if the loss is not finite, with the step and the terms.
    """
    with _accelerator(accelerator) as accelerator:
        source = as_batches(data, batch_size, seed=seed)
        total = _count_steps(source, steps, epochs, accelerator.gradient_accumulation_steps)
        if clip is not None:
            positive("clip", clip)
        if isinstance(checkpoint, str | Path):
            checkpoint = Checkpoint(checkpoint)
        if checkpoint and checkpoint.every is not None:
            positive("checkpoint.every", checkpoint.every)
        if checkpoint and accelerator.distributed_type == "FSDP":
            raise InputError(
                "checkpoint is given, but must be None here: checkpoints of sharded (FSDP) models are not made"
            )

        torch_optimizer = _make_optimizer(model, optimizer)
        torch_scheduler = scheduler(torch_optimizer, total) if callable(scheduler) else scheduler
        loop = _Loop(source, as_objective(objective), callbacks, torch_scheduler, clip, checkpoint, progress)
        with (
            seeds.isolated(seeds.derive(seed, "start")),
            mode(model, training=True),
            _prepared(accelerator, model, torch_optimizer) as (wrapped, stepper),
        ):
            run = Run(wrapped, model, torch_optimizer, accelerator, seed, total)
            run.reseed("start")
            loop.train(run, stepper, Path(log) if log else checkpoint.metrics if checkpoint else None)
    return run.history


@contextlib.contextmanager
def _accelerator(given: "Accelerator | None") -> Iterator["Accelerator"]:
    """The user's accelerator, or one of our own.

    All accelerators of a process share the number of accumulated steps: the user's comes back afterwards.
    """
    from accelerate import Accelerator
    from accelerate.state import GradientState

    if given is not None:
        yield given
        return
    shared = GradientState()
    before = shared.plugin_kwargs
    try:
        yield Accelerator()
    finally:
        shared.plugin_kwargs = before


def _count_steps(source: Batches, steps: int | None, epochs: int | None, accumulate: int) -> int:
    if (steps is None) == (epochs is None):
        raise InputError(f"steps is {steps} and epochs is {epochs}, but exactly one of them must be given")
    if steps is not None:
        positive("steps", steps)
        return steps
    positive("epochs", epochs or 0)
    if len(source) == 0:
        raise InputError(NO_BATCH)
    return (epochs or 0) * math.ceil(len(source) / accumulate)


def _make_optimizer(model: nn.Module, choice: OptimizerChoice | None) -> Optimizer:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise InputError(f"{type(model).__name__} has no parameter that requires gradients: there is nothing to train")
    if choice is None:
        return torch.optim.AdamW(trainable, lr=1e-3)
    if not isinstance(choice, Optimizer):
        return choice(trainable)
    held = {id(parameter) for group in choice.param_groups for parameter in group["params"]}
    if not held & {id(parameter) for parameter in trainable}:
        raise InputError("optimizer holds no parameter of the model, but must be built from this model's parameters")
    return choice


@contextlib.contextmanager
def _prepared(
    accelerator: "Accelerator", model: nn.Module, optimizer: Optimizer
) -> Iterator[tuple[nn.Module, Optimizer]]:
    """The model and optimizer as accelerate wraps them; the user's model is as before when the block ends."""
    own_forward = model.__dict__.get("forward")
    try:
        yield accelerator.prepare(model, optimizer)
    finally:
        # Mixed precision sets `forward` on the model itself, and accelerate marks it so that it is not wrapped again.
        for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
            model.__dict__.pop(name, None)
        if own_forward is not None:
            model.__dict__["forward"] = own_forward


@dataclass
class _Loop:
    """The parts of one run that objectives and callbacks have no business with."""

    source: Batches
    objective: Objective
    callbacks: Sequence[Callback]
    scheduler: LRScheduler | None
    clip: float | None
    checkpoint: Checkpoint | None
    progress: bool | None

    def train(self, run: Run, stepper: Any, log: Path | None) -> None:
        """All steps, from the checkpoint's on."""
        try:
            for callback in self.callbacks:
                callback.on_start(run)
            self.resume(run)
            with (
                _metrics_file(run, log) as lines,
                bar("training", run.steps, show=self.progress, done=run.step) as line,
            ):
                while not run.over:
                    self.epoch(run, stepper, lines, line)
                self.save(run)
        finally:
            for callback in self.callbacks:
                callback.on_end(run)

    def epoch(self, run: Run, stepper: Any, lines: TextIO | None, line: Bar) -> None:
        """The steps of one epoch, from batch `run.index` on."""
        accelerator, first = run.accelerator, run.step
        if run.index == 0:
            run.reseed("epoch", run.epoch)
            for callback in self.callbacks:
                callback.on_epoch(run)
        run.reseed("step", run.step)  # before its data is read; holds up to the next step
        batches = self.source.epoch(
            run.epoch, start=run.index, rank=accelerator.process_index, world=accelerator.num_processes
        )
        while group := list(itertools.islice(batches, accelerator.gradient_accumulation_steps)):
            losses = self.gradients(run, group)
            self.update(run, stepper)
            run.step, run.index = run.step + 1, run.index + len(group)
            for callback in self.callbacks:
                callback.on_step(run)
            self.record(run, losses, lines)
            line.advance(note=f"loss {run.history.records[-1]['loss']:.4g}")
            if self.checkpoint and self.checkpoint.every and run.step % self.checkpoint.every == 0:
                self.save(run)
            if run.over:
                return
            run.reseed("step", run.step)
        if run.step == first and run.index == 0:
            raise InputError(NO_BATCH)
        run.epoch, run.index = run.epoch + 1, 0
        if self.checkpoint and self.checkpoint.every is None:
            self.save(run)

    def gradients(self, run: Run, group: list[tuple[Batch, float, int]]) -> dict[str, float]:
        """Gradient of the mean loss over all samples of a step; returns the loss terms."""
        accelerator, terms = run.accelerator, dict[str, float]()
        samples = sum(total for _, _, total in group)
        for number, (batch, local, _) in enumerate(group):
            batch = to_device(batch, accelerator.device)
            for callback in self.callbacks:
                batch = callback.on_batch(run, batch)
                if batch is None:
                    raise InputError(f"{type(callback).__name__}.on_batch returned None, but must give back the batch")
            more_to_come = number < len(group) - 1
            with accelerator.no_sync(run.model) if more_to_come else contextlib.nullcontext():
                losses = self.objective(run.model, batch, run)
                share = local / samples
                for name, value in _read(losses, share, accelerator).items():
                    terms[name] = terms.get(name, 0.0) + value
                if not all(map(math.isfinite, terms.values())):
                    raise Diverged(_divergence(run, terms))
                # accelerate divides by the number of batches and DDP averages over processes; undo both.
                weight = share * accelerator.gradient_accumulation_steps * accelerator.num_processes
                loss = functools.reduce(torch.add, losses.values())
                accelerator.backward(loss if weight == 1 else loss * weight)
        return terms

    def update(self, run: Run, stepper: Any) -> None:
        """One step of the optimizer and the scheduler."""
        from accelerate.optimizer import AcceleratedOptimizer

        if self.clip is not None:
            run.accelerator.clip_grad_norm_(run.model.parameters(), self.clip)
        elif run.accelerator.scaler is not None:
            run.accelerator.unscale_gradients(stepper)
        for callback in self.callbacks:
            callback.on_gradients(run)
        # accelerate's wrapper searches for optional packages at every step, so it is used only where it does something.
        plain = isinstance(stepper, AcceleratedOptimizer) and run.accelerator.scaler is None
        (run.optimizer if plain else stepper).step()
        if self.scheduler is not None and (plain or not stepper.step_was_skipped):
            self.scheduler.step()
        run.optimizer.zero_grad(set_to_none=True)

    @staticmethod
    def record(run: Run, losses: dict[str, float], lines: TextIO | None) -> None:
        """Add the step to the history, the metrics file and the trackers."""
        terms = {name: loss for name, loss in losses.items() if name != "loss"} if len(losses) > 1 else {}
        rate = run.optimizer.param_groups[0]["lr"]
        position = {"step": run.step, "epoch": run.epoch, "loss": sum(losses.values())}
        record = {**position, **terms, "lr": float(rate), **run._logged}
        run._logged = {}
        run.history.records.append(record)
        if lines is not None:
            lines.write(json.dumps(record) + "\n")
            lines.flush()
        if run.accelerator.trackers:
            run.accelerator.log(record, step=run.step)

    def save(self, run: Run) -> None:
        """Write the checkpoint, from the main process."""
        if self.checkpoint is None or not run.accelerator.is_main_process:
            return
        scaler = run.accelerator.scaler
        state = {
            "run": self.identity(run),
            "position": {"step": run.step, "epoch": run.epoch, "index": run.index, "stopped": run._stopping},
            "model": run.module.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler else None,
            "scaler": scaler.state_dict() if scaler else None,
            "callbacks": [callback.state_dict() for callback in self.callbacks],
        }
        save_state(self.checkpoint.state, state)

    def resume(self, run: Run) -> None:
        """Take the checkpoint's state, if there is one and it is this run's."""
        if self.checkpoint is not None and self.checkpoint.state.exists():
            state = load_state(self.checkpoint.state)
            mine, its = self.identity(run), state.get("run", {}) if isinstance(state, dict) else {}
            for name, value in mine.items():
                if its.get(name) != value:
                    raise InputError(
                        f"{self.checkpoint.state} is the checkpoint of another run: its {name} is {its.get(name)!r}, "
                        f"this run's is {value!r}; give another folder or delete it"
                    )
            run.module.load_state_dict(state["model"])
            run.optimizer.load_state_dict(state["optimizer"])
            if self.scheduler:
                self.scheduler.load_state_dict(state["scheduler"])
            if run.accelerator.scaler:
                run.accelerator.scaler.load_state_dict(state["scaler"])
            for callback, its_state in zip(self.callbacks, state["callbacks"], strict=True):
                callback.load_state_dict(its_state)
            position = state["position"]
            run.step, run.epoch, run.index = position["step"], position["epoch"], position["index"]
            run._stopping = position["stopped"]
        if run.accelerator.num_processes > 1:
            run.accelerator.wait_for_everyone()  # or a fast process could overwrite what a slow one has yet to read

    def identity(self, run: Run) -> dict[str, Any]:
        """What must agree between a checkpoint and the run that resumes from it."""
        shapes = [(name, str(p.dtype), tuple(p.shape)) for name, p in run.module.state_dict().items()]
        return {
            "seed": run.seed,
            "model": hashlib.sha256(repr(shapes).encode()).hexdigest()[:16],
            "optimizer": type(run.optimizer).__name__,
            "scheduler": type(self.scheduler).__name__,
            "callbacks": [type(callback).__name__ for callback in self.callbacks],
            "batches an epoch": None if isinstance(self.source, Streamed) else len(self.source),
            "batches a step": run.accelerator.gradient_accumulation_steps,
        }


def _read(losses: Mapping[str, Tensor], share: float, accelerator: "Accelerator") -> dict[str, float]:
    """Values of loss terms, weighted with this batch's share of the step and summed over processes."""
    if not losses:
        raise InputError("The objective gave no loss term, but must give at least one")
    _free_names(losses)
    for name, loss in losses.items():
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise InputError(f"The loss term {name} is {_describe(loss)}, but must be a tensor of one element")
    if accelerator.num_processes == 1:
        return {name: loss.item() * share for name, loss in losses.items()}
    values = torch.stack([loss.detach().float().reshape(()) for loss in losses.values()]) * share
    return dict(zip(losses, accelerator.reduce(values, "sum").tolist(), strict=True))


def _free_names(values: Mapping[str, Any]) -> None:
    """Raise if a measure would take the place of a record's own fields."""
    taken = [name for name in values if name in ("step", "epoch", "lr")]
    if taken:
        raise InputError(f"A loss term or measure is named {taken[0]}, which is the name of a record's own field")


def _describe(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _divergence(run: Run, terms: dict[str, float]) -> str:
    bad = [name for name, value in terms.items() if not math.isfinite(value)]
    listed = ", ".join(f"{name} = {value:.4g}" for name, value in terms.items())
    return (
        f"The loss is not finite at step {run.step + 1}: {' and '.join(bad)} went wrong ({listed}). "
        "Try a lower learning rate, clip=1.0, or full precision, and look for empty or non-finite inputs in the data."
    )


@contextlib.contextmanager
def _metrics_file(run: Run, path: Path | None) -> Iterator[TextIO | None]:
    """Open the metrics for appending; what goes beyond the step resumed from is taken out, what is before goes into the
    history."""
    if path is None:
        yield None
        return
    if run.step and path.exists():
        for text in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # the last line of a killed run may be cut off
                run.history.records.append(json.loads(text))
        run.history.records = [record for record in run.history.records if record["step"] <= run.step]
    if not run.accelerator.is_main_process:
        yield None
        return
    with atomic_file(path) as temporary:
        temporary.write_text("".join(json.dumps(record) + "\n" for record in run.history.records))
    with path.open("a") as lines:
        yield lines
