"""Data made worse on purpose and by a known amount: wrong labels, rare classes.

What was done can be read off by comparing with the data given, so arenas can judge what a model learnt of it.
"""

from typing import Any

import torch

from retouch.core import seeds
from retouch.core.data import TensorData, in_memory, labels_of, subset
from retouch.core.errors import InputError, in_range


def noisy(data: Any, share: float, seed: int, *, classes: int | None = None) -> TensorData:
    """Symmetric label noise: a share of the samples gets the label of another class, each other class alike.

    Args:
        data: labelled samples; not changed.
        share: 0 to 1; exactly round(share * n) samples are drawn, and all of them get a wrong label.
        seed: of which samples and which labels. Those that are wrong at one share are wrong at every larger one.
        classes: how many there are; one more than the largest label if None.

    Returns:
        The same samples in the same order, in memory.
    """
    in_range("share", share, 0, 1)
    whole = in_memory(data)
    labels = labels_of(whole)
    classes = int(labels.max()) + 1 if classes is None else classes
    if classes < 2 or int(labels.max()) >= classes:
        raise InputError(
            f"classes is {classes}, but must be at least 2 and more than the largest label, {labels.max()}"
        )
    draw = seeds.generator(seed, "label noise")
    wrong = torch.randperm(len(labels), generator=draw)[: round(share * len(labels))]
    steps = torch.randint(1, classes, (len(labels),), generator=draw)  # 1 to classes - 1: to another class
    given = labels.clone()
    given[wrong] = (labels[wrong] + steps[wrong]) % classes
    return TensorData(whole.inputs, given)


def long_tail(data: Any, ratio: float, seed: int) -> Any:
    """A long-tailed subset: class c of C keeps in proportion to ratio ** (-c / (C - 1)).

    Args:
        data: labelled samples; class 0 becomes the most frequent and the last class the rarest.
        ratio: of the largest class to the smallest, at least 1 (the imbalance ratio; 10 to 100 in the field).
        seed: of which samples are kept.

    Returns:
        The largest such subset that the data can supply, at least one sample of each class, in the data's order.

    Source: the exponential profile of "Class-balanced loss based on effective number of samples", arXiv 1901.05555.
    """
    in_range("ratio", ratio, 1)
    labels = labels_of(data)
    present, counts = labels.unique(return_counts=True)
    profile = float(ratio) ** -(torch.arange(len(present), dtype=torch.float64) / max(len(present) - 1, 1))
    largest = float((counts / profile).min())
    takes = (largest * profile).round().long().clamp(min=1).minimum(counts)
    order = torch.randperm(len(labels), generator=seeds.generator(seed, "long tail"))
    rows = [order[labels[order] == c][:take] for c, take in zip(present, takes.tolist(), strict=True)]
    return subset(data, torch.cat(rows).sort().values)
