"""Concepts as directions of an embedding space, and which of them speak for a class."""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from retouch.core import seeds
from retouch.core.errors import InputError, in_range, positive

PENALTIES = (0.001, 0.01, 0.1, 1.0, 10.0)


def concept_activation_vector(pos: Any, neg: Any, *, C: float = 0.1) -> tuple[np.ndarray, float]:
    """Normal vector and intercept of a linear support vector machine that tells a concept's embeddings from others.

    Args:
        pos: embeddings with the concept (n, d).
        neg: embeddings without it (m, d).
        C: inverse strength of the penalty; the paper tries 0.001 to 10, see `class_concepts`.
    """
    from sklearn.svm import SVC

    positive("C", C)
    sides = [np.asarray(torch.as_tensor(side).detach().cpu()) for side in (pos, neg)]
    if min(map(len, sides)) == 0 or sides[0].shape[1:] != sides[1].shape[1:]:
        raise InputError(
            f"pos and neg have shapes {sides[0].shape} and {sides[1].shape}, but must be (n, d) and (m, d), not empty"
        )
    labels = np.r_[np.ones(len(sides[0])), np.zeros(len(sides[1]))]
    # random_state has no effect here, but without it scikit-learn draws a seed from numpy's global generator
    machine = SVC(C=C, kernel="linear", random_state=0).fit(np.concatenate(sides), labels)
    return machine.coef_[0].copy(), float(machine.intercept_[0])


def concept_margins(embeddings: Any, vectors: Any, intercepts: Any) -> Tensor:
    """Signed distance of every embedding from every concept's plane: (v_k . e + b_k) / |v_k|.

    Args:
        embeddings: (n, d).
        vectors: (K, d).
        intercepts: (K, 1).

    Returns:
        (n, K).
    """
    e, v = torch.as_tensor(embeddings), torch.as_tensor(vectors)
    if e.shape[-1] != v.shape[-1]:
        raise InputError(f"Embeddings have {e.shape[-1]} dimensions and concept vectors {v.shape[-1]}, but must agree")
    return (e @ v.T + torch.as_tensor(intercepts).reshape(-1)) / v.norm(dim=-1)


def concept_bottleneck(
    margins: Any, labels: Any, *, strength: float = 1e-5, l1_ratio: float = 0.99, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Class scores from concept margins: logistic regression with an elastic net, one class against the rest.

    Args:
        margins: (n, K).
        labels: class ids (n,), every class at least once.
        strength: of the penalty.
        l1_ratio: share of the absolute penalty in it.
        seed: of the stochastic gradient descent.

    Returns:
        W (classes, K) and c (classes,).
    """
    from sklearn.linear_model import SGDClassifier

    x, y = torch.as_tensor(margins).detach().cpu().numpy(), torch.as_tensor(labels).cpu().numpy()
    settings: dict[str, Any] = {
        "alpha": strength,
        "l1_ratio": l1_ratio,
        "max_iter": 10000,
        "random_state": seed % 2**32,
    }
    head = SGDClassifier(loss="log_loss", penalty="elasticnet", **settings).fit(x, y)
    if len(head.classes_) != int(y.max()) + 1:
        raise InputError(f"labels hold {len(head.classes_)} classes up to {y.max()}, but must hold each one below")
    w, c = torch.from_numpy(head.coef_), torch.from_numpy(head.intercept_)
    return (torch.cat([-w, w]), torch.cat([-c, c])) if len(w) == 1 else (w, c)


def rank_concepts(class_weights: Any, class_index: int, *, k: int = 5) -> list[int]:
    """The k concepts with the largest weight for a class, best first; class_weights is (classes, K)."""
    weights = torch.as_tensor(class_weights)
    in_range("k", k, 1, weights.shape[1])
    in_range("class_index", class_index, 0, len(weights) - 1)
    return weights[class_index].topk(k).indices.tolist()


def nearest_class(class_weights: Any, class_index: int) -> int:
    """The class whose concept weights point most nearly the same way: the default donor (ours)."""
    rows = F.normalize(torch.as_tensor(class_weights).double(), dim=1)
    cosine = rows @ rows[class_index]
    cosine[class_index] = -math.inf
    return int(cosine.argmax())


def class_concepts(embeddings: Tensor, classes: Tensor, *, count: int = 100, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A concept bank with one vector for each class: the class's samples against as many others.

    The penalty is the one of 0.001 to 10 that tells a held-out fifth of them apart best.

    Args:
        embeddings: (n, d).
        classes: ids (n,), every class up to the largest at least twice.
        count: samples on each side, at least 2, as far as there are.
        seed: of the draw.

    Returns:
        Vectors (classes, d) and intercepts (classes, 1).
    """
    in_range("count", count, 2)
    held = classes.bincount()
    if len(held) < 2:
        raise InputError("classes holds no class but 0, but a concept needs samples of others beside it")
    if held.min() < 2:
        raise InputError(f"Class {int(held.argmin())} has {int(held.min())} samples, but a concept needs at least 2")
    vectors, intercepts = [], []
    for index in range(len(held)):
        sides = []
        for mask in (classes == index, classes != index):
            rows = mask.nonzero().squeeze(1)
            draw = torch.randperm(len(rows), generator=seeds.generator(seed, "concept", index))
            sides.append(embeddings[rows[draw[:count]]].numpy())
        size = min(map(len, sides))
        held_out = max(1, size // 5)
        pos, neg = (side[:size] for side in sides)

        def score(C: float, pos: np.ndarray = pos, neg: np.ndarray = neg, held_out: int = held_out) -> float:
            vector, intercept = concept_activation_vector(pos[held_out:], neg[held_out:], C=C)
            right = [(pos[:held_out] @ vector + intercept > 0), (neg[:held_out] @ vector + intercept <= 0)]
            return float(np.mean(right))

        vector, intercept = concept_activation_vector(pos, neg, C=max(PENALTIES, key=score))
        vectors.append(torch.tensor(vector))
        intercepts.append(torch.tensor([intercept]))
    return torch.stack(vectors).to(embeddings), torch.stack(intercepts).to(embeddings)
