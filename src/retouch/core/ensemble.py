"""Many models of one kind trained at once, each on its own part of the data: oracles, subset models, seeds.

The models' parameters are stacked along a first dimension and the forward pass is vmapped over it, so a step of sixteen
small models costs a few large matrix products. Optimizers that work entry by entry (SGD, Adam, AdamW) then step every
model exactly as they would alone.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from retouch.core import seeds
from retouch.core.data import TensorData, as_dataset
from retouch.core.errors import InputError, positive
from retouch.core.models import forward, logits_of, mode, rows_of
from retouch.core.progress import bar

State = dict[str, Tensor]


class Ensemble:
    """Models of one architecture as stacked parameters.

    Args:
        template: a model of that architecture; its own weights are not used.
        state: parameters and buffers by name, (models, *shape).
    """

    def __init__(self, template: nn.Module, state: State) -> None:
        self.template, self.state = template, state

    def __len__(self) -> int:
        return len(next(iter(self.state.values())))

    def __getitem__(self, index: int) -> nn.Module:
        """One model, as a module of its own."""
        model = copy.deepcopy(self.template)
        own = {**dict(model.named_parameters()), **dict(model.named_buffers())}  # a state_dict may lack some of them
        with torch.no_grad():
            for name, value in self.state.items():
                own[name].copy_(value[index])
        return model.eval()

    def __iter__(self) -> Iterator[nn.Module]:
        return (self[index] for index in range(len(self)))

    @torch.no_grad()
    def logits(self, inputs: Any, *, chunk: int = 16, batch_size: int = 512) -> Tensor:
        """Logits of every model for the same inputs, in eval mode: (models, n, k)."""
        with mode(self.template, training=False):
            run = vmap(lambda state, x: logits_of(_call(self.template, state, x)), in_dims=(0, None))
            rows = []
            for start in range(0, len(self), chunk):
                state = {name: value[start : start + chunk] for name, value in self.state.items()}
                count = len(TensorData(inputs))
                pieces = range(0, count, batch_size)
                parts = [run(state, rows_of(inputs, a, a + batch_size)) for a in pieces]
                rows.append(torch.cat(parts, dim=1))
        return torch.cat(rows)


def _call(template: nn.Module, state: State, inputs: Any) -> Any:
    return forward(lambda *args, **kwargs: functional_call(template, state, args, kwargs), inputs)


def train_many(
    build: Callable[[], nn.Module],
    data: Any,
    members: Tensor,
    *,
    epochs: int,
    batch_size: int = 64,
    optimizer: Callable[..., Optimizer] = torch.optim.AdamW,
    scheduler: Callable[[Optimizer, int], LRScheduler] | None = None,
    loss: Callable[..., Tensor] = F.cross_entropy,
    seed: int = 0,
    chunk: int = 16,
    progress: bool | None = None,
) -> Ensemble:
    """Train one model for each row of `members`, on the samples that the row says.

    Args:
        build: makes an untrained model; called under a seed of each model's own.
        data: samples held as tensors, with targets.
        members: boolean (models, n): which samples each model is trained on; equally many in every row.
        epochs: passes of each model over its samples.
        batch_size: samples a step and model.
        optimizer: from parameters to an optimizer that works entry by entry.
        scheduler: from (optimizer, steps) to a scheduler.
        loss: (logits, targets, reduction="none") -> per-sample losses.
        seed: model i draws its weights and its orders from (seed, i), whatever `chunk` is.
        chunk: models trained at once.

    Raises:
        InputError: for rows of different sizes, data that is not held as tensors, or batch normalisation (its running
            statistics cannot be stacked).
    """
    data = as_dataset(data)
    positive("epochs", epochs)
    positive("batch_size", batch_size)
    positive("chunk", chunk)
    if not isinstance(data, TensorData) or data.targets is None:
        raise InputError(f"The data is a {type(data).__name__}, but must be (inputs, targets) held as tensors")
    if members.ndim != 2 or members.shape[1] != len(data) or members.dtype != torch.bool:
        raise InputError(f"members has shape {tuple(members.shape)}, but must be boolean (models, {len(data)})")
    sizes = members.sum(1).unique().tolist()
    if len(sizes) != 1 or sizes[0] == 0:
        raise InputError(f"The rows of members hold {sizes} samples, but must all hold equally many, at least one")
    states, total = [], len(members) * epochs * -(-int(sizes[0]) // batch_size)
    with bar("training models", total, show=progress) as line:
        for start in range(0, len(members), chunk):
            numbers = range(start, min(start + chunk, len(members)))
            models = []
            for number in numbers:
                with seeds.isolated(seeds.derive(seed, "weights", number)):
                    models.append(build())
            _check_stackable(models[0])
            rows = torch.stack([members[number].nonzero().squeeze(1) for number in numbers])
            generators = [seeds.generator(seed, "order", number) for number in numbers]
            with seeds.isolated(seeds.derive(seed, "noise", start)):
                states.append(
                    _train_chunk(models, data, rows, generators, epochs, batch_size, optimizer, scheduler, loss, line)
                )
    return Ensemble(models[0], {name: torch.cat([state[name] for state in states]) for name in states[0]})


def _check_stackable(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            raise InputError(f"{name} is batch normalisation, which cannot be trained stacked: use group normalisation")


def _train_chunk(
    models: list[nn.Module],
    data: TensorData,
    rows: Tensor,
    generators: list[torch.Generator],
    epochs: int,
    batch_size: int,
    optimizer: Callable[..., Optimizer],
    scheduler: Callable[[Optimizer, int], LRScheduler] | None,
    loss: Callable[..., Tensor],
    line: Any,
) -> State:
    template = models[0]
    parameters, buffers = stack_module_state(models)
    run = vmap(lambda p, b, x: logits_of(_call(template, {**p, **b}, x)), randomness="different")
    steps = -(-rows.shape[1] // batch_size)
    stepper = optimizer(list(parameters.values()))
    rates = scheduler(stepper, epochs * steps) if scheduler else None
    with mode(template, training=True):
        for _ in range(epochs):
            orders = torch.stack([torch.randperm(rows.shape[1], generator=generator) for generator in generators])
            for index in rows.gather(1, orders).split(batch_size, dim=1):
                inputs, targets = data[index]
                logits = run(parameters, buffers, inputs)
                values = loss(logits.flatten(0, 1), targets.flatten(0, 1), reduction="none")
                # The sum over models of each one's mean: every model gets the gradient it would get alone.
                (values.view(len(models), -1).mean(1).sum()).backward()
                stepper.step()
                stepper.zero_grad()
                if rates is not None:
                    rates.step()
                line.advance(len(models))
    return {name: value.detach() for name, value in {**parameters, **buffers}.items()}
