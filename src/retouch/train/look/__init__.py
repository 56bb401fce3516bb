"""LOOK: pre-train an encoder by leave-one-out nearest neighbours, so that a class may be several clusters.

A memory holds an embedding u_j of every training example. An example is classified by the vote of its k nearest
neighbours in it, itself left out, and the log of that vote is maximised:

    s_ij = <z_i, u_j>                               unit embeddings; the memory's carry no gradient
    w_ij = exp(s_ij / t) / sum over the k nearest   N(i): the k largest s_ij, j not i
    L_i  = -log sum of w_ij over j in N(i) with y_j = y_i
    dL_i/ds_ij = (w_ij - [y_j = y_i] w_ij / p_i) / t        p_i: the vote for y_i; 0 for all that are no neighbours

An example must only agree with most of its neighbours, not with its whole class. Cross entropy and supervised
contrastive learning (whose sum stands outside of the log) draw a class to one point, and lose what a later task may
need. Use it to pre-train on coarse labels what is then used for other, finer tasks; read out the encoder, not the
projection. Not where the labels at hand are the task: it costs more than cross entropy and gains little on them.

Paper: arXiv 2110.06014. No official code is known, and the published equations could not be compared: the weights, the
log of the vote, what is done where no neighbour is of the class (`fallback`), the projection and the defaults of k and
t are this file's reading of "weighted kNN with a leave-one-out error". With k = all it is NCA.

Cost: batch * N * dim for the similarities, in tiles; the bank holds N * dim numbers. Limits: one label an example;
above a million examples use `MomentumQueue`.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retouch.core import seeds
from retouch.core.batches import in_order
from retouch.core.cards import Card
from retouch.core.data import indexed, labels_of
from retouch.core.errors import InputError, one_of, positive
from retouch.core.features import capture, layer_of
from retouch.core.loop import Callback
from retouch.core.models import Batch, device_of, first_tensor, forward, head_of, mode, to_device, unpack
from retouch.core.objectives import Losses
from retouch.core.recipe import Recipe
from retouch.train.look.memory import LOOKLoss, MemoryBank, MomentumQueue, k_schedule, knn_predict
from retouch.train.look.vote import (
    FALLBACKS,
    Fallback,
    leave_one_out_knn_probabilities,
    look_loss,
    nearest_neighbours,
)

__all__ = [
    "CARD",
    "LOOK",
    "Embedder",
    "LOOKLoss",
    "MemoryBank",
    "MomentumQueue",
    "features_of_data",
    "fit_head",
    "k_schedule",
    "knn_predict",
    "leave_one_out_knn_probabilities",
    "look_loss",
    "nearest_neighbours",
    "recipe",
]

CARD = Card(
    title="LOOK: leave-one-out k nearest neighbours",
    room="train",
    paper="arXiv:2110.06014",
    shape="objective",
    line="Pre-trains an encoder whose classes may form several clusters, for better transfer to other tasks.",
    tags=("pre-training", "transfer", "nearest neighbours", "metric learning"),
    plugin="LOOK",
)


class Embedder(nn.Module):
    """A model with a projection head of two layers on its features: inputs to unit embeddings (n, dim).

    Args:
        model: encoder, or a classifier whose features go into `layer`.
        width: of the features.
        dim: of the embeddings; None leaves the projection out, and embeds the features themselves.
        layer: name of the layer of `model` whose input are the features; `model`'s output if None.
    """

    def __init__(self, model: nn.Module, width: int, dim: int | None = 128, *, layer: str | None = None) -> None:
        super().__init__()
        if layer is not None:
            layer_of(model, layer)
        self.model, self.layer = model, layer
        layers = [] if dim is None else [nn.Linear(width, width), nn.ReLU(), nn.Linear(width, dim)]
        self.projection = nn.Sequential(*layers)

    def features(self, *args: Any, **kwargs: Any) -> Tensor:
        """What is kept after pre-training: (n, width)."""
        if self.layer is None:
            output = self.model(*args, **kwargs)
            features = first_tensor(output)
            if features is None:
                raise InputError(f"The model returned {type(output).__name__}, but must return a tensor: name a layer")
            return features
        with capture(self.model, [self.layer], side="input") as seen:
            self.model(*args, **kwargs)
        return seen[self.layer]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Unit embeddings (n, dim)."""
        return F.normalize(self.projection(self.features(*args, **kwargs)), dim=-1)


class LOOK(Callback):
    """LOOK in `fit`, on samples with their numbers: objective, and callback that keeps the memory in checkpoints.

        look = LOOK(labels_of(data))
        fit(Embedder(model, width), indexed(data), look, callbacks=[look], steps=...)

    Args:
        labels: class of every training sample (N,), in the order of the data.
        dim: of the embeddings.
        k: neighbours, or a function from the step to them.
        temperature: of the weights.
        fallback: see `look_loss`.
        bank: another memory than one row a sample, such as `MomentumQueue`.
    """

    def __init__(
        self,
        labels: Tensor,
        dim: int = 128,
        *,
        k: int | Callable[[int], int] = 20,
        temperature: float = 0.1,
        fallback: Fallback = "nearest_positive",
        bank: MemoryBank | None = None,
    ) -> None:
        self.labels = labels
        self.loss = LOOKLoss(len(labels), dim, k=k, temperature=temperature, fallback=fallback, bank=bank)

    def __call__(self, model: nn.Module, batch: Batch, run: Any = None) -> Losses:
        inputs, index = unpack(batch)
        if index is None or index.ndim != 1 or index.is_floating_point():
            raise InputError("The batch has no sample numbers, but LOOK needs them as targets: pass indexed(data)")
        embeddings = forward(model, inputs)
        self.loss.to(embeddings.device)
        labels, bank = self.labels.to(index.device)[index], self.loss.bank
        if not isinstance(bank, MomentumQueue):
            return {"look": self.loss(embeddings, labels, index)}
        bank.follow(model if run is None else run.module)
        return {"look": self.loss(embeddings, labels, index, keys=bank.encode(inputs))}

    def state_dict(self) -> dict[str, Any]:
        return self.loss.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loss.load_state_dict(state)


@torch.no_grad()
def features_of_data(model: nn.Module, data: Any, layer: str) -> Tensor:
    """What goes into a layer for all samples (n, e), in eval mode."""
    device, found = device_of(model), []
    with mode(model, training=False), capture(model, [layer], side="input") as seen:
        for batch in in_order(data):
            forward(model, unpack(to_device(batch, device))[0])
            found.append(seen[layer])
    return torch.cat(found)


def fit_head(model: nn.Module, data: Any, *, head: str | None = None, decay: float = 1e-4) -> nn.Module:
    """Fit a linear head on frozen features, in place: multinomial logistic regression from zero weights.

    Args:
        model: classifier; all but its head stays as it is.
        data: labelled samples.
        head: name of the linear layer; the last one if None.
        decay: half of it times the squared weights is added to the mean cross entropy.
    """
    name = head or head_of(model)
    linear: Any = layer_of(model, name)
    features, labels = features_of_data(model, data, name), labels_of(data)
    weight = torch.zeros_like(linear.weight, requires_grad=True)
    bias = torch.zeros(len(weight), dtype=weight.dtype, device=weight.device, requires_grad=linear.bias is not None)
    solver = torch.optim.LBFGS(
        [weight, bias] if linear.bias is not None else [weight], max_iter=200, line_search_fn="strong_wolfe"
    )
    labels = labels.to(features.device)

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(F.linear(features, weight, bias), labels) + decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    with torch.no_grad():
        linear.weight.copy_(weight)
        if linear.bias is not None:
            linear.bias.copy_(bias)
    return model


def recipe(
    model: nn.Module,
    data: Any,
    validation: Any = None,
    *,
    k: int = 20,
    temperature: float = 0.1,
    dim: int = 128,
    warmup: int = 0,
    fallback: str = "nearest_positive",
    seed: int = 0,
) -> Recipe:
    """Train a classifier's encoder with LOOK, then fit its head on frozen features.

    Args:
        model: classifier with a linear head; trained in place.
        data: labelled samples.
        validation: not used.
        k: neighbours; 20 for small data, 200 for a hundred thousand samples and more.
        temperature: of the neighbours' weights.
        dim: of the embeddings behind the projection.
        warmup: steps in which the neighbours fall from all samples to k.
        fallback: where no neighbour is of the class: nearest_positive, skip or clamp.
        seed: of the projection's first weights.
    """
    one_of("fallback", fallback, FALLBACKS)
    head = head_of(model)
    with seeds.isolated(seeds.derive(seed, "projection")):
        embedder = Embedder(model, layer_of(model, head).in_features, dim, layer=head)  # type: ignore[arg-type]
    labels = labels_of(data)

    def neighbours(step: int) -> int:
        return k_schedule(step, k=k, start=len(labels), warmup=warmup)

    positive("k", k)
    look = LOOK(labels, dim, k=neighbours, temperature=temperature, fallback=fallback)  # type: ignore[arg-type]

    def finish(trained: nn.Module) -> nn.Module:
        return fit_head(model, data, head=head)

    return Recipe(
        model=embedder.to(device_of(model)), data=indexed(data), objective=look, callbacks=[look], finish=finish
    )
