"""Gradients of a model's parameters, per batch and per sample, without touching `.grad`.

Per-sample gradients are `torch.func`'s vmap of grad over a batch, which is cut into chunks so that memory never holds a
copy of the parameters for each sample of a large batch.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from retouch.core.errors import InputError, one_of
from retouch.core.models import Batch, device_of, mode, rows_of, size_of, to_device, tree_map

BatchLoss = Callable[[Any, Batch], Tensor]  # (model, batch) -> scalar, or (batch,)
CHUNK_BYTES = 256 * 2**20


def trainable(model: nn.Module, params: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The parameters to differentiate by, each once: those given, or all that require gradients.

    Raises:
        InputError: if there is none, or a given name is not a parameter of the model.
    """
    own = dict(model.named_parameters())
    if params is not None:
        unknown = [name for name in params if name not in own]
        if unknown:
            raise InputError(f"params names {', '.join(unknown)}, but the model has no such parameter")
    chosen: dict[str, Tensor] = {
        name: p for name, p in own.items() if p.requires_grad and (params is None or name in params)
    }
    if not chosen:
        raise InputError(f"{type(model).__name__} has no parameter that requires gradients")
    return chosen


def batch_gradients(
    model: nn.Module, batch: Batch, loss_fn: BatchLoss, params: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Gradient of one batch's loss; parameters that the loss does not reach get zeros."""
    named = trainable(model, params)
    loss = loss_fn(model, to_device(batch, device_of(model)))
    if loss.numel() != 1:
        raise InputError(f"loss_fn returned shape {tuple(loss.shape)}, but must return a scalar for a batch")
    gradients = torch.autograd.grad(loss.reshape(()), list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), gradients, strict=True)}


class _Loss(nn.Module):
    """A loss as a module, so that torch.func can put other parameters wherever the loss function looks for them."""

    def __init__(self, model: nn.Module, loss_fn: BatchLoss) -> None:
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, batch: Batch) -> Tensor:
        return self.loss_fn(self.model, batch).sum()


def per_sample_gradients(
    model: nn.Module, batch: Batch, loss_fn: BatchLoss, params: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Gradient of every sample's loss: for a batch of b samples, tensors (b, *parameter shape).

    Args:
        model: in the mode it should be differentiated in; batch normalisation must be in eval mode.
        batch: samples along the first dimension of every tensor.
        loss_fn: (model, batch) -> scalar or (batch,); called on batches of one sample.
        params: parameters by name; all that require gradients if None.
    """
    named = {name: p.detach() for name, p in trainable(model, params).items()}
    module = _Loss(model, loss_fn)

    def loss(parameters: Mapping[str, Tensor], sample: Any) -> Tensor:
        single = tree_map(lambda t: t.unsqueeze(0), sample)
        return functional_call(module, {f"model.{name}": p for name, p in parameters.items()}, (single,))

    batch = to_device(batch, device_of(model))
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no rule for vmap and would run in a loop
        return vmap(grad(loss), in_dims=(None, 0), randomness="different")(named, batch)


def fisher_diagonal(
    model: nn.Module,
    batches: Iterable[Batch],
    loss_fn: BatchLoss,
    *,
    per_sample: bool = False,
    power: int = 2,
    params: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Mean of |gradient|^power over batches, or over samples: the diagonal of the empirical Fisher at power 2.

    Args:
        model: put in eval mode for the pass, and back.
        batches: gone through once.
        loss_fn: (model, batch) -> scalar; a batch's mean unless `per_sample`.
        per_sample: take every sample's gradient apart instead of the batch's mean gradient.
        power: 2, or 1 for the mean absolute gradient.
        params: parameters by name; all if None. Those that need no gradient get zeros.

    Returns:
        By parameter name: detached, the parameter's shape, at least float32.

    Raises:
        InputError: if there is no batch, or a gradient is not finite.
    """
    one_of("power", power, (1, 2))
    named = trainable(model, params)
    everything = {name: p for name, p in model.named_parameters() if params is None or name in params}
    total = {
        name: torch.zeros(p.shape, dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)
        for name, p in everything.items()
    }
    bytes_of_one = sum(p.numel() * p.element_size() for p in named.values())
    chunk = max(1, CHUNK_BYTES // (2 * bytes_of_one))  # a gradient and its square, for each sample of a chunk
    count = 0
    with mode(model, training=False):
        for batch in batches:
            size = size_of(batch)
            pieces = range(0, size, chunk) if per_sample else (0,)
            for start in pieces:
                if per_sample:
                    piece = rows_of(batch, start, start + chunk)
                    gradients = per_sample_gradients(model, piece, loss_fn, params)
                else:
                    gradients = {n: g[None] for n, g in batch_gradients(model, batch, loss_fn, params).items()}
                for name, gradient in gradients.items():
                    # not in place: two parameters may have one gradient tensor in common
                    total[name] += gradient.to(total[name].dtype).abs().pow(power).sum(0)
            count += size if per_sample else 1
    if count == 0:
        raise InputError("batches is empty, but importances need at least one batch")
    for name, value in total.items():
        if not torch.isfinite(value).all():
            raise InputError(f"The gradient of {name} is not finite: look for bad inputs or too large a loss")
        value /= count
    return total


def summed_gradient(
    model: nn.Module,
    batches: Iterable[Batch],
    loss_fn: BatchLoss,
    params: Mapping[str, Tensor] | None = None,
    *,
    clip: float | None = None,
) -> dict[str, Tensor]:
    """Sum over batches of the gradient of each batch's loss, in eval mode; each one's norm at most `clip`."""
    total: dict[str, Tensor] = {}
    with mode(model, training=False):
        for batch in batches:
            gradients = batch_gradients(model, batch, loss_fn, params)
            if clip is not None:
                norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients.values()]))
                gradients = {name: g * (clip / (norm + 1e-6)).clamp(max=1.0) for name, g in gradients.items()}
            for name, gradient in gradients.items():
                total[name] = gradient.clone() if name not in total else total[name].add_(gradient)
    if not total:
        raise InputError("batches is empty, but a gradient needs at least one batch")
    return total
