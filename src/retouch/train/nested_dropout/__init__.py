"""Nested dropout with Co-teaching: learn from partly wrong labels with features that are ordered by importance.

Only the first k channels of the features reach the classifier, with a k drawn for every batch: the first channels learn
what most labels agree on. The k to use is chosen on clean validation data.

    layer     k in 1..K with p_k ~ exp(-((k - mean) / std)^2)        no 1/2 in the exponent
    logits    z = W[:, :k] h[:k], not rescaled, without a bias (it would be the same for every k)
    choice    k* = argmax_k (accuracy_k - 1e-5 (k - 1))

Two networks trained so are then fine-tuned by Co-teaching, each on what the *other* finds easy: network 1 ranks one
half of a batch by its losses, network 2 the other, the int((1 - forget_rate) n) smallest of each are kept, and each
network steps on what the other has kept, both with the same k and with batch normalisation frozen.

    fit(network, data) for each of two networks = convert(model, std=10)         stage one; `recipe` does one of them
    pair = co_teach(network1, network2, data, validation, epochs=30)             stage two

Use it for classifiers that are trained long enough to memorise wrong labels. Not where training ends before that (small
networks, Adam, few epochs): it slows fitting and does harm there. `validation` must have clean labels. The paper splits
the risk under compression into bias and variance, and reads truncation as an information bottleneck.

Paper: arXiv 2206.13140; Co-teaching: arXiv 1804.06872. Code: yingyichen-cyy/Nested-Co-teaching. Followed from the code
where the paper leaves it open: one k a batch, the two halves, a forget rate that has risen by epoch num_gradual - 1.
Not followed: in the code's second stage a chosen k of 1 stands for all channels; here it is 1.

Cost: one masked copy of the features; stage two runs every sample twice. Limits: batch normalisation may come before
the layer, never behind it; Co-teaching is for one process.
"""

from typing import Any

from torch import nn

from retouch.core.cards import Card
from retouch.core.recipe import Recipe
from retouch.train.nested_dropout.co_teaching import (
    ChooseKeep,
    CoTeaching,
    Pair,
    co_teach,
    co_teaching,
    exchanged_losses,
    forget_rate_schedule,
    small_loss_indices,
)
from retouch.train.nested_dropout.truncation import (
    Alternate,
    NestedDropout,
    accuracy_per_keep,
    choose_keep,
    convert,
    merge,
    nested_dropout,
    nested_dropout_distribution,
    nested_layers,
    select_keep,
)

__all__ = [
    "CARD",
    "Alternate",
    "ChooseKeep",
    "CoTeaching",
    "NestedDropout",
    "Pair",
    "accuracy_per_keep",
    "choose_keep",
    "co_teach",
    "co_teaching",
    "convert",
    "exchanged_losses",
    "forget_rate_schedule",
    "merge",
    "nested_dropout",
    "nested_dropout_distribution",
    "nested_layers",
    "recipe",
    "select_keep",
    "small_loss_indices",
]

CARD = Card(
    title="Nested dropout with Co-teaching",
    room="train",
    paper="arXiv:2206.13140",
    shape="layer",
    line="Orders features by importance and truncates them, to learn less of what is wrong in the labels.",
    tags=("classification", "noisy labels", "dropout", "co-teaching"),
    plugin="convert",
)


def recipe(
    model: nn.Module,
    data: Any,
    validation: Any = None,
    *,
    std: float = 100.0,
    mean: float = 0.0,
    penalty: float = 1e-5,
) -> Recipe:
    """Train a classifier with nested dropout (stage one); the finished model is an ordinary one.

    Args:
        model: classifier with a linear head; trained in place, a bias of its head set to zero.
        data: labelled samples, with labels that may be wrong.
        validation: samples with clean labels, for k*; all channels are used if None.
        std: of the number of channels kept; about the number of classes or a few times it.
        mean: of it.
        penalty: accuracy that a further channel must bring.
    """

    def finish(trained: nn.Module) -> nn.Module:
        if validation is not None:
            choose_keep(trained, validation, penalty=penalty)
        return merge(trained)

    model = convert(model, std=std, mean=mean, drop_bias=True, inplace=True)
    return Recipe(model=model, data=data, finish=finish)
