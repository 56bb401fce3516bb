"""Co-teaching: two networks, each trained on the samples that the other one finds easy."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from retouch.core.batches import Shuffled, as_batches
from retouch.core.errors import InputError, in_range
from retouch.core.loop import Callback, Run, fit
from retouch.core.models import Batch, forward, logits_of, mode, rows_of, tree_map, unpack
from retouch.core.objectives import Losses, Objective
from retouch.train.nested_dropout.truncation import check_labels, choose_keep, nested_layers


@torch.no_grad()
def small_loss_indices(logits: Tensor, labels: Tensor, *, forget_rate: float) -> Tensor:
    """The int((1 - forget_rate) * n) samples of smallest cross entropy, by ascending loss.

    Args:
        logits: (n, classes).
        labels: class ids (n,), as given.
        forget_rate: share left out, 0 to 1 (not 1); near the share of wrong labels.
    """
    in_range("forget_rate", forget_rate, 0, 1, below=True)
    check_labels(logits, labels)
    losses = F.cross_entropy(logits, labels, reduction="none")
    return losses.argsort(stable=True)[: _remembered(len(labels), forget_rate)]


def _remembered(count: int, forget_rate: float) -> int:
    return int((1 - forget_rate) * count)  # the authors' expression: in another order, rounding may cost a sample


def forget_rate_schedule(epoch: int, *, forget_rate: float, num_gradual: int) -> float:
    """The share left out in an epoch: it rises linearly from 0 and is `forget_rate` from epoch num_gradual - 1 on.

    Args:
        epoch: from 0.
        forget_rate: in the end.
        num_gradual: epochs of the rise; 0 for none.
    """
    in_range("forget_rate", forget_rate, 0, 1, below=True)
    in_range("num_gradual", num_gradual, 0)
    in_range("epoch", epoch, 0)
    return forget_rate if epoch >= num_gradual else forget_rate * epoch / max(num_gradual - 1, 1)


def exchanged_losses(
    model1: nn.Module,
    model2: nn.Module,
    inputs: Any,
    labels: Tensor,
    *,
    forget_rate: float,
    split_batch: bool = True,
    freeze_bn: bool = True,
) -> dict[str, Tensor]:
    """Losses of two networks, each on the samples that the other one has kept.

    Both rank in eval mode and without gradients, and answer for the loss in train mode, with one shared random k.

    Args:
        model1: ranks the first half of the batch, and learns from what `model2` keeps of the second half.
        model2: the other way round.
        inputs: of the batch.
        labels: class ids (n,); the last sample of an odd batch is left out when it is split.
        forget_rate: share left out.
        split_batch: halves, as in the authors' code; otherwise both see the whole batch, as in Co-teaching.
        freeze_bn: keep the statistics and the weights of batch normalisation.

    Returns:
        loss1 and loss2, scalars with gradients; index1 and index2, what each network has kept of what it ranked.
    """
    half, whole = len(labels) // 2, len(labels)
    if _remembered(half if split_batch else whole, forget_rate) == 0:
        raise InputError(
            f"The batch has {whole} samples, but must have so many that each network keeps one at forget_rate "
            f"{forget_rate}: use larger batches, and leave out a short last one"
        )
    bounds = [(0, half), (half, 2 * half)] if split_batch else [(0, whole)] * 2
    models, parts = (model1, model2), [(rows_of(inputs, a, b), labels[a:b]) for a, b in bounds]
    with torch.no_grad(), mode(model1, training=False), mode(model2, training=False):
        ranked = [logits_of(forward(model, x)) for model, (x, _) in zip(models, parts, strict=True)]
    kept = [small_loss_indices(z, y, forget_rate=forget_rate) for z, (_, y) in zip(ranked, parts, strict=True)]
    losses = []
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(mode(model, training=True))
            if freeze_bn:
                stack.enter_context(_frozen_batch_norm(model))
        stack.enter_context(_shared_keep(*models))
        for model, (x, y), index in zip(models, parts[::-1], kept[::-1], strict=True):
            logits = logits_of(forward(model, _rows(x, index)))
            losses.append(F.cross_entropy(logits, y[index]))
    return {"loss1": losses[0], "loss2": losses[1], "index1": kept[0], "index2": kept[1]}


def _rows(inputs: Any, index: Tensor) -> Any:
    return tree_map(lambda t: t[index], inputs)


@contextmanager
def _frozen_batch_norm(model: nn.Module) -> Iterator[None]:
    """Batch normalisation in eval mode and without gradients, also where the rest of the model is in train mode."""
    layers = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    before = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
    for layer in layers:
        layer.eval().requires_grad_(False)  # `mode` gives the layers their own mode back
    try:
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


@contextmanager
def _shared_keep(first: nn.Module, second: nn.Module) -> Iterator[None]:
    """One draw for the nested dropout layers that two networks have at the same place."""
    pairs = list(zip(nested_layers(first), nested_layers(second), strict=False))
    before = [(a.train_keep, b.train_keep) for a, b in pairs]
    for a, b in pairs:
        a.train_keep = b.train_keep = int(a.draw()) if a.train_keep is None else a.train_keep
    try:
        yield
    finally:
        for (a, b), keeps in zip(pairs, before, strict=True):
            a.train_keep, b.train_keep = keeps


class CoTeaching:
    """Co-teaching for a training loop of one's own; `co_teach` is the same in `fit`.

    Between epochs, call `choose_keep([model1, model2], validation)` for networks with nested dropout.

    Args:
        model1: classifier.
        model2: another one of the same kind, with weights of its own.
        optimizer1: over `model1`'s parameters.
        optimizer2: over `model2`'s.
        forget_rate: share left out.
        split_batch: each ranks its own half of the batch; otherwise both the whole.
        freeze_bn: keep batch normalisation as it is.
        num_gradual: epochs in which the share left out rises; 0 for fine-tuning, 5 from scratch.
    """

    def __init__(
        self,
        model1: nn.Module,
        model2: nn.Module,
        optimizer1: Optimizer,
        optimizer2: Optimizer,
        *,
        forget_rate: float = 0.2,
        split_batch: bool = True,
        freeze_bn: bool = True,
        num_gradual: int = 0,
    ) -> None:
        _check_two(model1, model2)
        forget_rate_schedule(0, forget_rate=forget_rate, num_gradual=num_gradual)  # checks both
        self.models, self.optimizers = (model1, model2), (optimizer1, optimizer2)
        self.forget_rate, self.num_gradual = forget_rate, num_gradual
        self.split_batch, self.freeze_bn = split_batch, freeze_bn

    def step(self, images: Any, labels: Tensor, *, epoch: int) -> dict[str, Tensor]:
        """Train both networks on a batch.

        Returns:
            loss1, loss2 (without gradients), and index1, index2: the samples kept, as in `exchanged_losses`.
        """
        rate = forget_rate_schedule(epoch, forget_rate=self.forget_rate, num_gradual=self.num_gradual)
        found = exchanged_losses(
            *self.models, images, labels, forget_rate=rate, split_batch=self.split_batch, freeze_bn=self.freeze_bn
        )
        for name, optimizer in zip(("loss1", "loss2"), self.optimizers, strict=True):
            optimizer.zero_grad(set_to_none=True)
            found[name].backward()
            optimizer.step()
        return {name: value.detach() for name, value in found.items()}


def _check_two(first: nn.Module, second: nn.Module) -> None:
    if not {id(p) for p in first.parameters()}.isdisjoint(id(p) for p in second.parameters()):
        raise InputError("The two models share parameters, but must have weights of their own")


# --- in fit ---------------------------------------------------------------------------------------------------------


class Pair(nn.Module):
    """Two classifiers that answer with the mean of their logits.

    Args:
        first: classifier.
        second: classifier of the same classes, with weights of its own.
    """

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        _check_two(first, second)
        self.networks = nn.ModuleList([first, second])

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Mean logits (n, classes)."""
        first, second = (logits_of(network(*args, **kwargs)) for network in self.networks)
        return (first + second) / 2


def co_teaching(
    *, forget_rate: float = 0.2, num_gradual: int = 0, split_batch: bool = True, freeze_bn: bool = True
) -> Objective:
    """Co-teaching as an objective: `fit(Pair(network1, network2), data, co_teaching(), callbacks=[ChooseKeep(clean)])`.

    An optimizer that works entry by entry steps both networks as two of them would.
    """
    forget_rate_schedule(0, forget_rate=forget_rate, num_gradual=num_gradual)  # checks both

    def losses(model: nn.Module, batch: Batch, run: Run) -> Losses:
        pair, (inputs, labels) = run.module, unpack(batch)
        if not isinstance(pair, Pair):
            raise InputError(f"The model is a {type(pair).__name__}, but must be a Pair of two networks")
        rate = forget_rate_schedule(run.epoch, forget_rate=forget_rate, num_gradual=num_gradual)
        one, two = pair.networks
        found = exchanged_losses(
            one, two, inputs, labels, forget_rate=rate, split_batch=split_batch, freeze_bn=freeze_bn
        )
        return {"first": found["loss1"], "second": found["loss2"]}

    return Objective(losses, "co_teaching")


class ChooseKeep(Callback):
    """Chooses k* before every epoch of `fit`, as the ranking of Co-teaching needs it.

    Args:
        validation: samples with clean labels.
        penalty: accuracy that a further channel must bring.
    """

    def __init__(self, validation: Any, *, penalty: float = 1e-5) -> None:
        self.validation, self.penalty = validation, penalty
        self.module: nn.Module = nn.Identity()

    def on_start(self, run: Run) -> None:
        self.module = run.module

    def on_epoch(self, run: Run) -> None:
        run.log(keep=self.choose())

    def choose(self) -> int:
        """Choose k* for the networks of the run."""
        models: Any = self.module.networks if isinstance(self.module, Pair) else self.module
        return choose_keep(models, self.validation, penalty=self.penalty)

    def state_dict(self) -> dict[str, Any]:
        return {"keep": [layer.eval_keep for layer in nested_layers(self.module)]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for layer, keep in zip(nested_layers(self.module), state["keep"], strict=True):
            layer.eval_keep = keep


def paper_sgd(parameters: Any) -> Optimizer:
    """SGD as the paper fine-tunes on CIFAR."""
    return SGD(parameters, lr=1e-3, momentum=0.9, weight_decay=5e-4)


def co_teach(
    model1: nn.Module,
    model2: nn.Module,
    data: Any,
    validation: Any = None,
    *,
    forget_rate: float = 0.2,
    num_gradual: int = 0,
    split_batch: bool = True,
    freeze_bn: bool = True,
    penalty: float = 1e-5,
    batch_size: int = 64,
    optimizer: Callable[..., Optimizer] = paper_sgd,
    seed: int = 0,
    **settings: Any,
) -> Pair:
    """Fine-tune two networks in place by Co-teaching.

    Args:
        model1: classifier, with nested dropout or without.
        model2: another one of the same kind.
        data: labelled samples; a short last batch of an epoch is left out.
        validation: samples with clean labels, for k* of networks with nested dropout; their k* stays if None.
        forget_rate: share left out; near the share of wrong labels.
        num_gradual: epochs in which it rises; 0 for fine-tuning, 5 from scratch.
        split_batch: each network ranks its own half of a batch; otherwise both the whole.
        freeze_bn: keep batch normalisation as it is; False from scratch.
        penalty: accuracy that a further channel must bring.
        batch_size: samples a step.
        optimizer: parameters -> optimizer; SGD at 0.001 if not given.
        seed: of orders and draws.
        settings: of `core.loop.fit`, such as `epochs`.

    Returns:
        The pair, in eval mode, with the k* found at the end.
    """
    pair, source = Pair(model1, model2), as_batches(data, batch_size, seed=seed)
    if isinstance(source, Shuffled):
        source.drop_last = len(source.data) >= source.batch_size
    objective = co_teaching(
        forget_rate=forget_rate, num_gradual=num_gradual, split_batch=split_batch, freeze_bn=freeze_bn
    )
    choosing = [] if validation is None else [ChooseKeep(validation, penalty=penalty)]
    callbacks = [*choosing, *settings.pop("callbacks", ())]
    fit(pair, source, objective, optimizer=optimizer, callbacks=callbacks, seed=seed, **settings)
    for choice in choosing:
        choice.choose()
    return pair.eval()
