"""Fisher importances of single samples: `fisher_diagonal(per_sample=True)` against a Python loop over the samples."""

import torch
from ratios import compare

from retouch.core.batches import in_order
from retouch.core.data import subset
from retouch.core.gradients import batch_gradients, fisher_diagonal
from retouch.core.objectives import cross_entropy_batch
from retouch.worlds import digits


def vectorised(model, data, batch_size):
    return fisher_diagonal(model, in_order(data, batch_size), cross_entropy_batch, per_sample=True)


def one_by_one(model, data):
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for row in range(len(data)):
        batch = data.inputs[row : row + 1], data.targets[row : row + 1]
        for name, gradient in batch_gradients(model, batch, cross_entropy_batch).items():
            total[name] += gradient.square() / len(data)
    return total


if __name__ == "__main__":
    data = subset(digits.data("train"), range(512))
    for variant in digits.VARIANTS:
        model = digits.reference(variant).eval()
        compare(
            f"importances of samples, {variant}",
            lambda model=model: vectorised(model, data, 128),
            lambda model=model: one_by_one(model, data),
            against="a loop over samples",
            rounds=5,
            wanted="at least 3",
        )
