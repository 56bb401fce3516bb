"""The vote of the nearest neighbours: the search, the votes of a batch, and the loss against a memory."""

import math
import warnings
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from retouch.core.errors import InputError, in_range, one_of, positive

Fallback = Literal["nearest_positive", "skip", "clamp"]
FALLBACKS = ("nearest_positive", "skip", "clamp")
TILE = 2**22  # similarities held at once by the search: 16 MiB


@torch.no_grad()
def nearest_neighbours(
    queries: Tensor,
    memory: Tensor,
    *,
    k: int,
    self_index: Tensor | None = None,
    memory_index: Tensor | None = None,
    valid: Tensor | None = None,
    classes: tuple[Tensor, Tensor] | None = None,
    tile: int = TILE,
) -> tuple[Tensor, Tensor]:
    """The k rows of the memory with the largest inner product, never holding more than `tile` products at once.

    Args:
        queries: (n, e).
        memory: (N, e), of any floating dtype.
        k: neighbours; all if there are fewer.
        self_index: (n,) example of each query, which is no neighbour of its own; -1 for none.
        memory_index: (N,) example that each row of the memory belongs to; row j to example j if None.
        valid: (N,) True for rows that may be neighbours; all if None.
        classes: labels of the queries (n,) and of the memory (N,), to search in each query's class alone.
        tile: products at once.

    Returns:
        Products and rows (n, min(k, N)), in no particular order; where there are fewer neighbours, a product of -inf.
    """
    positive("k", k)
    count, k = len(memory), min(k, len(memory))
    # topk of k among 64 k or more numbers is several times faster than among fewer
    height = max(1, min(len(queries), 256, tile // max(1, min(count, 64 * k))))
    width = max(k, tile // height)
    best: list[tuple[Tensor, Tensor]] = []
    for rows in torch.arange(len(queries), device=queries.device).split(height):
        values = queries.new_full((len(rows), 0), -math.inf)
        found = torch.zeros(len(rows), 0, dtype=torch.long, device=queries.device)
        for start in range(0, count, width):
            part = slice(start, start + width)
            products = queries[rows] @ memory[part].to(queries.dtype).T
            if self_index is not None:
                _leave_out(products, self_index[rows], start, None if memory_index is None else memory_index[part])
            if valid is not None:
                products.masked_fill_(~valid[part], -math.inf)
            if classes is not None:
                products.masked_fill_(classes[0][rows, None] != classes[1][part], -math.inf)
            top = products.topk(min(k, products.shape[1]), sorted=False)
            values = torch.cat([values, top.values], 1)
            found = torch.cat([found, top.indices + start], 1)
            if values.shape[1] > k:
                values, order = values.topk(k, sorted=False)
                found = found.gather(1, order)
        best.append((values, found))
    if not best:
        return queries.new_zeros(0, k), torch.zeros(0, k, dtype=torch.long, device=queries.device)
    return torch.cat([values for values, _ in best]), torch.cat([found for _, found in best])


def _leave_out(products: Tensor, own: Tensor, start: int, owners: Tensor | None) -> None:
    """Set products (n, m) with rows from `start` on to -inf where they are those of the queries' own examples."""
    if owners is not None:
        products.masked_fill_(owners == own[:, None], -math.inf)
        return
    here = ((own >= start) & (own < start + products.shape[1])).nonzero()[:, 0]
    products[here, own[here] - start] = -math.inf


def _unit(rows: Tensor, name: str, normalise: bool) -> Tensor:
    """Rows of length 1: as they are if they are so, else normalised, or refused."""
    lengths = torch.linalg.vector_norm(rows.detach().float(), dim=-1)
    tolerance = 1e-3 if rows.dtype in (torch.float32, torch.float64) else 2e-2
    if not len(rows) or float((lengths - 1).abs().max()) <= tolerance:
        return rows
    if normalise:
        return F.normalize(rows, dim=-1)
    low, high = float(lengths.min()), float(lengths.max())
    raise InputError(
        f"{name} has rows of length {low:.3g} to {high:.3g}, but must have unit rows: pass normalise=True for that"
    )


def check(k: int, temperature: float, rows: Tensor, labels: Tensor, name: str) -> None:
    """Refuse settings and shapes that no vote can be taken with."""
    positive("k", k)
    positive("temperature", temperature)
    if rows.ndim != 2:
        raise InputError(f"{name} has shape {tuple(rows.shape)}, but must be (n, e)")
    if labels.shape != rows.shape[:1]:
        raise InputError(
            f"The labels of {name} have shape {tuple(labels.shape)}, but must be one class id for each of {len(rows)}"
        )


def leave_one_out_knn_probabilities(
    embeddings: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    k: int,
    temperature: float = 0.1,
    normalise: bool = True,
) -> Tensor:
    """Votes of each example's k nearest among the others of the batch: (n, num_classes), rows sum to 1.

    Args:
        embeddings: unit rows (n, e); gradients flow to both sides.
        labels: class ids (n,).
        num_classes: of the votes.
        k: neighbours; all others if there are fewer.
        temperature: of the weights exp(cosine / temperature); infinity counts votes.
        normalise: bring rows that are not unit to length 1; otherwise they are refused.
    """
    check(k, temperature, embeddings, labels, "embeddings")
    if len(embeddings) < 2:
        raise InputError(f"embeddings has {len(embeddings)} rows, but must have at least 2")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise InputError(f"A label is outside of the classes: labels must be 0 to {num_classes - 1}")
    unit = _unit(embeddings, "embeddings", normalise)
    cosines = (unit @ unit.T).masked_fill(torch.eye(len(unit), dtype=torch.bool, device=unit.device), -math.inf)
    near, rows = cosines.topk(min(k, len(unit) - 1))
    weights = (near / temperature).softmax(1)
    return weights.new_zeros(len(unit), num_classes).scatter_add(1, labels[rows], weights)


# --- the loss -------------------------------------------------------------------------------------------------------


def look_loss(
    queries: Tensor,
    labels: Tensor,
    memory: Tensor,
    memory_labels: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.1,
    self_index: Tensor | None = None,
    fallback: Fallback = "nearest_positive",
    log_floor: float = -20.0,
    reduction: str = "mean",
    memory_index: Tensor | None = None,
    valid: Tensor | None = None,
    normalise: bool = True,
) -> Tensor:
    """Negative log of the vote that each query's neighbours give to its own class.

    Args:
        queries: unit rows (n, e).
        labels: class ids (n,).
        memory: unit rows (N, e); detached here.
        memory_labels: class ids (N,).
        k: neighbours; all if there are fewer.
        temperature: of the weights exp(cosine / temperature).
        self_index: (n,) row of the memory that is the query itself and left out; -1 for none.
        fallback: where no neighbour is of the class: "nearest_positive" adds the nearest example of it to the
            neighbours, "skip" leaves the query out, "clamp" gives it the loss -log_floor, without a gradient.
        log_floor: of the log with "clamp".
        reduction: "mean" over the queries that are not left out, "sum", or "none" for (n,) with 0 for those.
        memory_index: (N,) example of each row, where rows are not the examples in order: all rows of `self_index`'s
            example are left out then.
        valid: (N,) True for rows that may be neighbours.
        normalise: bring rows that are not unit to length 1; otherwise they are refused.

    Raises:
        InputError: for bad settings or shapes, or a self_index outside of the memory.

    Warns:
        With "nearest_positive", of queries whose class has no other example; they are left out.
    """
    one_of("fallback", fallback, FALLBACKS)
    one_of("reduction", reduction, ("mean", "sum", "none"))
    check(k, temperature, queries, labels, "queries")
    check(k, temperature, memory, memory_labels, "memory")
    if queries.shape[1] != memory.shape[1]:
        raise InputError(f"queries has {queries.shape[1]} columns and memory {memory.shape[1]}, but must have as many")
    if self_index is not None:
        if self_index.shape != labels.shape:
            raise InputError(f"self_index has shape {tuple(self_index.shape)}, but must be {tuple(labels.shape)}")
        high = len(memory) if memory_index is None else None
        for bound in (self_index.min(), self_index.max()) if len(self_index) else ():
            in_range("self_index", int(bound), -1, math.inf if high is None else high - 1)
    counted_rows = memory if valid is None else memory[valid]
    if _unit(counted_rows, "memory", normalise) is not counted_rows:
        memory = F.normalize(memory, dim=-1)
    losses, counted, alone = vote_losses(
        _unit(queries, "queries", normalise),
        labels,
        memory,
        memory_labels,
        k=k,
        temperature=temperature,
        self_index=self_index,
        memory_index=memory_index,
        valid=valid,
        fallback=fallback,
        log_floor=log_floor,
    )
    if alone:
        text = f"{alone} of {len(labels)} queries have no other example of their class in the memory and are left out"
        warnings.warn(text, UserWarning, stacklevel=2)
    return reduced(losses, counted, reduction)


def reduced(losses: Tensor, counted: Tensor, reduction: str) -> Tensor:
    """Mean over the losses that count, their sum, or all of them."""
    if reduction == "none":
        return losses
    return losses.sum() / counted.sum().clamp(min=1) if reduction == "mean" else losses.sum()


def vote_losses(
    queries: Tensor,
    labels: Tensor,
    memory: Tensor,
    memory_labels: Tensor,
    *,
    k: int,
    temperature: float,
    self_index: Tensor | None,
    memory_index: Tensor | None,
    valid: Tensor | None,
    fallback: str,
    log_floor: float,
) -> tuple[Tensor, Tensor, int]:
    """Losses (n,), which of them count (n,), and how many queries have no other example of their class."""
    memory = memory.detach()
    near, rows = nearest_neighbours(queries, memory, k=k, self_index=self_index, memory_index=memory_index, valid=valid)
    found = near > -math.inf
    same = found & (memory_labels[rows] == labels[:, None])
    asked, without, alone = found.any(1), ~same.any(1), 0
    if fallback == "nearest_positive" and without.any():
        own = None if self_index is None else self_index[without]
        pair = labels[without], memory_labels
        near, extra = nearest_neighbours(
            queries[without], memory, k=1, self_index=own, memory_index=memory_index, valid=valid, classes=pair
        )
        rows = torch.cat([rows, rows.new_zeros(len(rows), 1).masked_scatter(without[:, None], extra)], 1)
        added = torch.zeros_like(without).masked_scatter(without, near[:, 0] > -math.inf)[:, None]
        found, same = torch.cat([found, added], 1), torch.cat([same, added], 1)
        alone = int((~added[:, 0] & without).sum())
    usable = same.any(1)
    rows, found, same = rows[usable], found[usable], same[usable]
    scores = _products(queries[usable], memory, rows) / temperature
    voted = scores.masked_fill(~found, -math.inf).logsumexp(1)
    log_p = scores.masked_fill(~same, -math.inf).logsumexp(1) - voted
    # The sum keeps the graph where nothing counts, so that a first batch has a gradient: zero.
    losses = (0.0 * queries.sum(1)).masked_scatter(usable, -log_p)
    if fallback == "clamp":
        return losses.clamp(max=-log_floor).masked_fill(asked & without, -log_floor), asked, alone
    return losses, usable, alone


def _products(queries: Tensor, memory: Tensor, rows: Tensor) -> Tensor:
    """Inner products with chosen rows of the memory, (n, k), by whichever way holds fewer numbers."""
    memory = memory.to(queries.dtype)
    if rows.shape[1] * memory.shape[1] < len(memory):
        return torch.einsum("ne,nke->nk", queries, memory[rows])
    return (queries @ memory.clone().T).gather(1, rows)  # a bank is written to before the backward pass
