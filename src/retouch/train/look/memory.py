"""Memories of embeddings, the loss that owns one, and the classifier that reads one."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retouch.core.errors import InputError, in_range, one_of, positive
from retouch.core.models import forward
from retouch.train.look.vote import FALLBACKS, Fallback, check, nearest_neighbours, reduced, vote_losses


class MemoryBank(nn.Module):
    """One row for each training example: exact leave-one-out.

    Args:
        num_examples: N.
        dim: of the embeddings.
    """

    def __init__(self, num_examples: int, dim: int) -> None:
        super().__init__()
        positive("num_examples", num_examples)
        positive("dim", dim)
        self.register_buffer("features", torch.zeros(num_examples, dim))
        self.register_buffer("labels", torch.full((num_examples,), -1))
        self.register_buffer("filled", torch.zeros(num_examples, dtype=torch.bool))
        self.features: Tensor
        self.labels: Tensor
        self.filled: Tensor

    def examples(self) -> Tensor | None:
        """The example that each row belongs to (N,); None where row j belongs to example j."""
        return None

    @torch.no_grad()
    def update(self, index: Tensor, features: Tensor, labels: Tensor) -> None:
        """Write examples, normalised to unit length and without a gradient.

        Args:
            index: of the examples (n,).
            features: (n, dim).
            labels: class ids (n,).
        """
        if len(index):
            for bound in (index.min(), index.max()):
                in_range("index", int(bound), 0, len(self.features) - 1)
        self._write(index, features, labels)

    def _write(self, rows: Tensor, features: Tensor, labels: Tensor) -> None:
        wanted = (len(rows), self.features.shape[1])
        if tuple(features.shape) != wanted or labels.shape != rows.shape:
            shapes = f"{tuple(features.shape)} and {tuple(labels.shape)}"
            raise InputError(f"features and labels have shapes {shapes}, but must have {wanted} and {wanted[:1]}")
        self.features[rows] = F.normalize(features.detach(), dim=-1).to(self.features.dtype)
        self.labels[rows] = labels
        self.filled[rows] = True


class MomentumQueue(MemoryBank):
    """The latest embeddings of a slow copy of the encoder, first in, first out: for data too large for a bank.

    Args:
        encoder: model from inputs to embeddings; copied.
        dim: of the embeddings.
        length: rows.
        momentum: share of its weights that the copy keeps at each step.
    """

    def __init__(self, encoder: nn.Module, dim: int, *, length: int = 65536, momentum: float = 0.999) -> None:
        super().__init__(length, dim)
        in_range("momentum", momentum, 0, 1)
        self.encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.momentum = momentum
        self.register_buffer("owners", torch.full((length,), -1))
        self.register_buffer("written", torch.zeros((), dtype=torch.long))
        self.owners: Tensor
        self.written: Tensor

    def examples(self) -> Tensor | None:
        return self.owners

    @torch.no_grad()
    def update(self, index: Tensor, features: Tensor, labels: Tensor) -> None:
        length = len(self.features)
        index, features, labels = index[-length:], features[-length:], labels[-length:]
        rows = (self.written + torch.arange(len(index), device=self.written.device)) % length
        self._write(rows, features, labels)
        self.owners[rows] = index.to(self.owners)
        self.written += len(index)

    @torch.no_grad()
    def encode(self, inputs: Any) -> Tensor:
        """Embeddings by the slow copy, in its present mode: the one that the fast encoder is in."""
        return forward(self.encoder, inputs)

    @torch.no_grad()
    def follow(self, encoder: nn.Module) -> None:
        """Move the slow copy's weights towards the encoder's; buffers are taken over."""
        self.encoder.train(encoder.training)
        for slow, fast in zip(self.encoder.parameters(), encoder.parameters(), strict=True):
            slow.lerp_(fast, 1 - self.momentum)
        for kept, new in zip(self.encoder.buffers(), encoder.buffers(), strict=True):
            kept.copy_(new)


@torch.no_grad()
def knn_predict(bank: MemoryBank, queries: Tensor, *, k: int = 20, temperature: float = 0.1) -> Tensor:
    """Class ids (n,) by the weighted vote of each query's k nearest rows of a bank: the classifier for evaluation.

    Args:
        bank: with at least one row filled.
        queries: (n, dim), normalised here.
        k: neighbours.
        temperature: of the weights.
    """
    check(k, temperature, queries, torch.zeros(len(queries)), "queries")
    if not bank.filled.any():
        raise InputError("bank is empty, but must hold at least one example: call update first")
    unit = F.normalize(queries.to(bank.features), dim=-1)
    near, rows = nearest_neighbours(unit, bank.features, k=k, valid=bank.filled)
    weights = (near / temperature).softmax(1)
    votes = weights.new_zeros(len(unit), int(bank.labels.max()) + 1)
    return votes.scatter_add(1, bank.labels[rows].clamp(min=0), weights).argmax(1)  # unfilled rows weigh 0


def k_schedule(step: int, *, k: int, start: int, warmup: int) -> int:
    """Neighbours at a step, from 0: from `start` geometrically down to `k` in `warmup` steps.

    Early neighbours are random, so many of them are asked. `LOOKLoss(k=functools.partial(k_schedule, k=20, ...))`.
    """
    if step >= warmup:
        return k
    return round(start * (k / start) ** (step / warmup))


class LOOKLoss(nn.Module):
    """The loss with its memory, for a training loop of one's own: `loss = look(embeddings, labels, index)`.

    Queries without an example of their class in the memory are left out, in silence until the memory is full.

    Args:
        num_examples: N, of the training data.
        dim: of the embeddings.
        k: neighbours, or a function from the step (from 0) to them.
        temperature: of the weights.
        fallback: see `look_loss`.
        log_floor: see `look_loss`.
        bank: another memory than one row an example, such as `MomentumQueue`.
    """

    def __init__(
        self,
        num_examples: int,
        dim: int,
        *,
        k: int | Callable[[int], int] = 20,
        temperature: float = 0.1,
        fallback: Fallback = "nearest_positive",
        log_floor: float = -20.0,
        bank: MemoryBank | None = None,
    ) -> None:
        super().__init__()
        positive("temperature", temperature)
        one_of("fallback", fallback, FALLBACKS)
        if not callable(k):
            positive("k", k)
        self.bank = MemoryBank(num_examples, dim) if bank is None else bank
        self.k, self.temperature, self.fallback, self.log_floor = k, temperature, fallback, log_floor
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.step: Tensor

    def forward(self, embeddings: Tensor, labels: Tensor, index: Tensor, *, keys: Tensor | None = None) -> Tensor:
        """Mean loss; then the memory takes the embeddings in.

        Args:
            embeddings: (n, dim), normalised here.
            labels: class ids (n,).
            index: of the examples (n,), 0 to num_examples - 1.
            keys: what the memory takes in instead (n, dim), such as a slow encoder's embeddings.
        """
        bank, k = self.bank, self.k(int(self.step)) if callable(self.k) else self.k
        check(k, self.temperature, embeddings, labels, "embeddings")
        losses, counted, alone = vote_losses(
            F.normalize(embeddings, dim=-1),
            labels,
            bank.features,
            bank.labels,
            k=k,
            temperature=self.temperature,
            self_index=index,
            memory_index=bank.examples(),
            valid=None if bank.filled.all() else bank.filled,
            fallback=self.fallback,
            log_floor=self.log_floor,
        )
        if alone and bank.filled.all():
            text = f"{alone} of {len(labels)} examples have no other of their class in the memory and are left out"
            warnings.warn(text, UserWarning, stacklevel=2)
        bank.update(index, embeddings if keys is None else keys, labels)
        self.step += 1
        return reduced(losses, counted, "mean")
