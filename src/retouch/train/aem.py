"""Attention entropy maximisation: a bag's decision may not hang on a few of its instances.

A bag classifier pools instances by attention weights p = softmax(a). One term is added to its loss, the negative
entropy of these weights:

    L = L_bag + lambda * sum_i p_i log p_i              mean over heads, or over rows of one attention a class
    dL/da_j = dL_bag/da_j + lambda * p_j (log p_j + H)      H = -sum_i p_i log p_i

Few labelled bags let attention settle on the first instances that tell the training bags apart; spread attention sees
all that do. Use it for multiple-instance classifiers (ABMIL, DSMIL, multi-head queries) that overfit small sets of
bags, and for attention pooling of tokens or patches alike. Not where the evidence really is a single instance among
many, nor with many bags, where little is left to gain. Too large a lambda is mean pooling. The entropy grows with
log n and is not normalised: a lambda found on bags of thousands of patches is not right for sixty instances.

Paper: arXiv 2406.15303. Code: dazhangyu123/AEM. Where they part: the code sums a single-head attention over its batch,
which is one bag there; here every leading dimension is averaged over. Its top-k variant is not the paper's and is left
out. The third version of the paper anneals lambda by a cosine; `schedule="cosine"` is our reading of it, lambda
(1 + cos(pi t / T)) / 2.

Cost: a log-softmax of the logits already there. Limits: it needs the logits before their softmax; of a model that gives
only weights, pass their logarithm.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from retouch.core import seeds
from retouch.core.cards import Card
from retouch.core.errors import InputError, in_range, one_of, positive
from retouch.core.features import layer_of
from retouch.core.loop import Callback, Run
from retouch.core.models import Batch, unpack
from retouch.core.objectives import Losses, as_objective, cross_entropy

CARD = Card(
    title="Attention entropy maximisation (AEM)",
    room="train",
    paper="arXiv:2406.15303",
    shape="objective",
    line="Spreads the attention of a bag classifier over more instances by one loss term.",
    tags=("multiple-instance learning", "attention pooling", "regularisation"),
    plugin="AEM",
)


def _checked(attention_logits: Tensor, dim: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logits with instances last, in at least single precision, and which of them count; refuses what is no logits."""
    if attention_logits.ndim == 0 or attention_logits.shape[dim] == 0:
        shape = tuple(attention_logits.shape)
        raise InputError(f"attention_logits has shape {shape}, but must have a dimension of at least one instance")
    logits = attention_logits.movedim(dim, -1)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    valid = logits != -math.inf
    if mask is not None:
        valid = valid & _mask_for(logits, mask.movedim(dim, -1) if mask.ndim == logits.ndim else mask)
    counted = torch.where(valid, logits, 0.0).detach()
    shares = ((counted >= 0) & (counted <= 1)).all() & ((counted.sum(-1) - 1).abs() < 1e-3).all()
    empty, bad, shares_given = torch.stack([~valid.any(-1).all(), ~counted.isfinite().all(), shares]).tolist()
    if empty:
        raise InputError("mask leaves a row without an instance, but must keep at least one of each")
    if bad:
        raise InputError("attention_logits holds NaN or infinity, but must be finite (-inf leaves an instance out)")
    if shares_given and logits.shape[-1] > 1:
        text = "attention_logits are all within 0 to 1 and sum to 1: pass the logits before the softmax, not its result"
        warnings.warn(text, UserWarning, stacklevel=4)
    return logits, valid


def _mask_for(logits: Tensor, mask: Tensor) -> Tensor:
    """The mask in a form that broadcasts to logits (..., n); one of bags (batch, n) is the same for all heads."""
    rows = mask.unsqueeze(-2) if 2 <= mask.ndim == logits.ndim - 1 else mask
    fits = rows.ndim and rows.ndim <= logits.ndim and rows.shape[-1] == logits.shape[-1]
    sizes = zip(rows.shape[::-1], logits.shape[::-1], strict=False)
    if not fits or any(size not in (1, wanted) for size, wanted in sizes):
        raise InputError(
            f"mask has shape {tuple(mask.shape)}, but must be (batch, instances) or that of the attention logits, "
            f"{tuple(logits.shape)} with instances last"
        )
    return rows.to(logits.device, torch.bool)


def attention_entropy(
    attention_logits: Tensor, *, dim: int = -1, mask: Tensor | None = None, normalized: bool = False
) -> Tensor:
    """Entropy of softmax attention over instances, in nats: (..., n) -> (...).

    Args:
        attention_logits: before the softmax; half precision is computed in single. Entries of -inf are left out.
        dim: of the instances.
        mask: True where an instance counts: (batch, n) for all heads, or in the form of the logits.
        normalized: divide by the log of the number of instances that count, to compare bags of different size; 0 for a
            bag of one.

    Raises:
        InputError: for NaN, a row without instances, or a mask of another form.
    """
    entropy, most = _entropy(attention_logits, dim, mask)
    return entropy / most if normalized else entropy


def _entropy(attention_logits: Tensor, dim: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Entropy of each row, and the largest that it could have."""
    logits, valid = _checked(attention_logits, dim, mask)
    # The smallest number instead of -inf: its softmax is 0 as well, but gradients stay free of NaN.
    log_p = logits.masked_fill(~valid, torch.finfo(logits.dtype).min).log_softmax(-1)
    entropy = -torch.where(valid, log_p.exp() * log_p, 0.0).sum(-1)
    return entropy, valid.sum(-1).to(entropy.dtype).log().clamp(min=torch.finfo(entropy.dtype).tiny)


def aem_loss(attention_logits: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Negative entropy of attention, mean over all leading dimensions; least, at -log n, where attention is uniform.

    Args:
        attention_logits: before the softmax, instances last: (batch, heads, n), (heads, 1, n), (n,).
        mask: True where an instance counts, see `attention_entropy`.
    """
    return -_entropy(attention_logits, -1, mask)[0].mean()


class AttentionEntropyMaximization:
    """The weighted term, for a training loop of one's own: `loss = bag_loss + aem(attention_logits)`.

    Args:
        weight: lambda, at least 0.
        schedule: "constant", or "cosine" from `weight` down to 0.
        total_steps: of the training run, for the cosine.
    """

    def __init__(
        self,
        weight: float = 0.1,
        *,
        schedule: Literal["constant", "cosine"] = "constant",
        total_steps: int | None = None,
    ) -> None:
        in_range("weight", weight, 0)
        one_of("schedule", schedule, ("constant", "cosine"))
        if schedule == "cosine" and total_steps is None:
            raise InputError("total_steps is None, but must be the length of the run for the cosine schedule")
        if total_steps is not None:
            positive("total_steps", total_steps)
        self.weight, self.schedule, self.total_steps = weight, schedule, total_steps

    def weight_at(self, step: int) -> float:
        """Lambda at a step, from 0."""
        in_range("step", step, 0)
        if self.schedule == "constant" or self.total_steps is None:
            return self.weight
        return self.weight * (1 + math.cos(math.pi * min(step / self.total_steps, 1.0))) / 2

    def __call__(self, attention_logits: Tensor, *, mask: Tensor | None = None, step: int = 0) -> Tensor:
        """Lambda at this step times `aem_loss`."""
        return self.weight_at(step) * aem_loss(attention_logits, mask=mask)


class BagOutput(NamedTuple):
    """What a bag classifier gives: logits (batch, classes), and attention logits (batch, heads, n), not softmaxed."""

    logits: Tensor
    attention_logits: Tensor


class GatedAttentionMIL(nn.Module):
    """Gated attention over instances (ABMIL), the host model of the paper.

        h_i = ReLU(W x_i),  a_i = w (tanh(V h_i) * sigmoid(U h_i)),  z = sum_i softmax(a)_i h_i,  logits = C z

    Args:
        in_dim: size of an instance.
        num_classes: of bags.
        hidden: size of h.
        attention_hidden: size of V h and U h.
        heads: attentions, each with its own w; their z are concatenated.
        dropout: share of z dropped before the classifier.
    """

    def __init__(
        self,
        in_dim: int,
        num_classes: int,
        *,
        hidden: int = 256,
        attention_hidden: int = 128,
        heads: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = {"in_dim": in_dim, "num_classes": num_classes, "hidden": hidden, "attention_hidden": attention_hidden}
        for name, value in {**sizes, "heads": heads}.items():
            positive(name, value)
        in_range("dropout", dropout, 0, 1)
        self.config = {**sizes, "heads": heads, "dropout": dropout}
        self.reduction = nn.Linear(in_dim, hidden, bias=False)
        self.attention_v = nn.Linear(hidden, attention_hidden)
        self.attention_u = nn.Linear(hidden, attention_hidden)
        self.attention_weights = nn.Linear(attention_hidden, heads)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(heads * hidden, num_classes)

    def forward(self, bag: Tensor, mask: Tensor | None = None) -> BagOutput:
        """Bags (batch, n, in_dim), and True where an instance is no padding (batch, n).

        Padding may hold anything. Its attention logits are the smallest number of their type.
        """
        if bag.ndim != 3:
            raise InputError(f"bag has shape {tuple(bag.shape)}, but must be (batch, instances, in_dim)")
        if mask is not None:
            mask = mask.bool()
            if mask.shape != bag.shape[:2]:
                raise InputError(f"mask has shape {tuple(mask.shape)}, but must be {tuple(bag.shape[:2])}, as the bags")
            if not mask.any(1).all():
                raise InputError("mask leaves a bag without an instance, but must keep at least one of each")
            bag = bag.masked_fill(~mask[..., None], 0.0)
        h = self.reduction(bag).relu()
        gate = self.attention_v(h).tanh() * self.attention_u(h).sigmoid()
        attention = self.attention_weights(gate).transpose(1, 2)
        if mask is not None:
            attention = attention.masked_fill(~mask[:, None], torch.finfo(attention.dtype).min)
        z = attention.softmax(-1) @ h
        return BagOutput(self.classifier(self.dropout(z.flatten(1))), attention)


def attention_logits_of(output: Any) -> Tensor:
    """The attention logits in the output of a model, or of a layer that gives nothing else."""
    if isinstance(output, Tensor):
        return output
    found = output.get("attention_logits") if isinstance(output, Mapping) else getattr(output, "attention_logits", None)
    if not isinstance(found, Tensor):
        raise InputError(
            f"The output is a {type(output).__name__} without attention_logits: name the `layer` that gives them, or "
            "give `attention`, a function from the output to them"
        )
    return found


@contextmanager
def _outputs(module: nn.Module) -> Iterator[list[Any]]:
    """What a module gives at each call inside the block, whole."""
    seen: list[Any] = []
    handle = module.register_forward_hook(lambda _module, _args, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()


class AEM:
    """An objective for `fit`: a bag loss and the entropy term, from one pass of the model.

        fit(GatedAttentionMIL(64, 2), bags, AEM(0.05))
        fit(mine, bags, AEM(0.05, layer="pool.scores", attention=lambda scores: scores.transpose(1, 2)))

    The history has the terms of the bag loss, `aem`, and the normalised `attention_entropy` (1 is uniform).

    Args:
        weight: lambda, at least 0.
        bag_loss: an objective; cross entropy of the model's logits if not given.
        schedule: "constant", or "cosine" from `weight` at the first step to 0 at the last.
        layer: name of the layer whose output holds the attention logits; the model itself if empty.
        attention: that output -> attention logits, instances last.
        mask: name of the input, among several, that is True where an instance counts; not needed if it is missing.
    """

    def __init__(
        self,
        weight: float = 0.1,
        *,
        bag_loss: Callable[..., Losses] = cross_entropy,
        schedule: Literal["constant", "cosine"] = "constant",
        layer: str = "",
        attention: Callable[[Any], Tensor] = attention_logits_of,
        mask: str = "mask",
    ) -> None:
        AttentionEntropyMaximization(weight, schedule=schedule, total_steps=1)  # refuses bad settings now
        self.weight, self.schedule, self.bag_loss = weight, schedule, as_objective(bag_loss)
        self.layer, self.attention, self.mask = layer, attention, mask

    def __call__(self, model: nn.Module, batch: Batch, run: Run | None = None) -> dict[str, Tensor]:
        """The terms of a batch of bags."""
        module = model if run is None else run.module
        with _outputs(layer_of(module, self.layer) if self.layer else module) as seen:
            losses = self.bag_loss(model, batch, run)
        if not seen:
            raise InputError(f"layer is {self.layer!r}, which did not run when the model was called")
        logits, inputs = self.attention(seen[-1]), unpack(batch)[0]
        mask = inputs.get(self.mask) if isinstance(inputs, Mapping) else None
        entropy, most = _entropy(logits, -1, mask)
        weight = self.weight
        if run is not None:
            weight = AttentionEntropyMaximization(weight, schedule=self.schedule, total_steps=run.steps).weight_at(
                run.step
            )
            run.log(attention_entropy=float((entropy.detach() / most).mean()))
        return {**losses, "aem": -weight * entropy.mean()}


def collate_bags(samples: Sequence[tuple[Tensor, Any]]) -> tuple[dict[str, Tensor], Tensor]:
    """Bags of different sizes as a padded batch, for `DataLoader(collate_fn=collate_bags)`.

    Args:
        samples: (instances (n_i, ...), label) of each bag.

    Returns:
        ({"bag": (batch, n, ...), "mask": (batch, n)}, labels (batch,)).
    """
    bags = [bag for bag, _ in samples]
    sizes = torch.tensor([len(bag) for bag in bags])
    mask = torch.arange(int(sizes.max())) < sizes[:, None]
    bag = nn.utils.rnn.pad_sequence(bags, batch_first=True)
    return {"bag": bag, "mask": mask}, torch.tensor([int(label) for _, label in samples])


def subsample(
    bag: Tensor, mask: Tensor | None = None, *, ratio: float, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """A random share of each bag's instances, without replacement, and the mask of what is left.

    Args:
        bag: (batch, n, ...).
        mask: True where an instance is no padding (batch, n).
        ratio: above 0 up to 1; int(ratio * instances) of each bag, but at least one.
        generator: a CPU generator.
    """
    in_range("ratio", ratio, 0, 1, above=True)
    mask = torch.ones(bag.shape[:2], dtype=torch.bool) if mask is None else mask.bool().cpu()
    keep = (mask.sum(1).double() * ratio + 1e-9).long().clamp(min=1)
    order = (
        torch.rand(mask.shape, generator=seeds.fresh(generator)).masked_fill(~mask, -1.0).argsort(1, descending=True)
    )
    order = order[:, : int(keep.max())]
    kept = (torch.arange(order.shape[1]) < keep[:, None]).to(bag.device)
    return bag[torch.arange(len(bag))[:, None].to(bag.device), order.to(bag.device)], kept


class Subsampling(Callback):
    """Callback for `fit` that trains each step on a random share of the instances; combines with `AEM`.

    Args:
        ratio: above 0 up to 1, which changes nothing.
        bag: name of the input (batch, n, ...) that holds the instances, where a batch has several inputs.
        mask: name of the input that tells padding.
    """

    def __init__(self, ratio: float, *, bag: str = "bag", mask: str = "mask") -> None:
        in_range("ratio", ratio, 0, 1, above=True)
        self.ratio, self.bag, self.mask = ratio, bag, mask

    def on_batch(self, run: Run, batch: Batch) -> Batch:
        if self.ratio == 1:
            return batch
        inputs, targets = unpack(batch)
        if not isinstance(inputs, Mapping):
            return subsample(inputs, ratio=self.ratio, generator=run.generator)[0], targets
        bag, mask = subsample(inputs[self.bag], inputs.get(self.mask), ratio=self.ratio, generator=run.generator)
        return {**inputs, self.bag: bag, self.mask: mask}, targets
