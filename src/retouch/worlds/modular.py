"""Arithmetic modulo a number: all pairs (a, b) below it, of which a share is to be learnt from.

    data("train")         half of the 961 pairs modulo 31, drawn under a seed; "validation" 96 pairs, "test" all others

A sample is a pair as two concatenated one-hot vectors (2 * modulus,), or as tokens (3,) "a b =" for a transformer; its
label is a + b, a - b or a * b modulo the modulus. Nothing in a pair's form tells its result, so that a network which
only remembers the pairs that it saw is right on the others by chance. The validation pairs are the same under all
seeds, so that settings which are chosen on them were chosen on pairs that no test has. The oracle is `result`.
"""

import operator

import torch
from torch import Tensor, nn

from retouch.core import seeds
from retouch.core.data import TensorData
from retouch.core.errors import InputError, in_range, one_of

KIND = "numbers"
CLASSES = tuple(str(number) for number in range(31))
VARIANTS: tuple[str, ...] = ()
QUICK: tuple[str, ...] = ()
SPLITS = ("train", "validation", "test")
OPERATIONS = {"addition": operator.add, "subtraction": operator.sub, "product": operator.mul}
HELD_OUT = 0.1  # share of all pairs that is kept for validation


def result(pairs: Tensor, *, modulus: int = 31, operation: str = "addition") -> Tensor:
    """The exact result of every pair: (..., 2) -> (...)."""
    one_of("operation", operation, tuple(OPERATIONS))
    return OPERATIONS[operation](pairs[..., 0], pairs[..., 1]) % modulus


def all_pairs(modulus: int = 31) -> Tensor:
    """Every pair below the modulus (modulus**2, 2), in order."""
    numbers = torch.arange(modulus)
    return torch.cartesian_prod(numbers, numbers)


def pairs_of(data: TensorData) -> Tensor:
    """The pairs (n, 2) that samples stand for, in either form."""
    inputs = data.inputs
    if not isinstance(inputs, Tensor):
        return inputs["input_ids"][:, :2]
    return inputs.unflatten(1, (2, -1)).argmax(2)


def data(
    split: str = "train",
    *,
    modulus: int = 31,
    operation: str = "addition",
    share: float = 0.5,
    form: str = "one-hot",
    seed: int = 0,
) -> TensorData:
    """One part of all pairs; the three parts of a seed share no pair and have all of them.

    Args:
        split: "train", "validation" or "test".
        modulus: at least 5, and how many classes there are.
        operation: "addition", "subtraction" or "product".
        share: of all pairs that are in "train", above 0 and below 0.9.
        form: "one-hot" for (n, 2 * modulus) of 0 and 1, or "tokens" for {"input_ids": (n, 3)}, where the token
            `modulus` stands for "=".
        seed: of what is trained on; validation does not depend on it.
    """
    one_of("split", split, SPLITS)
    one_of("form", form, ("one-hot", "tokens"))
    in_range("modulus", modulus, 5)
    in_range("share", share, 0, 1 - HELD_OUT, above=True, below=True)
    pairs = all_pairs(modulus)
    fixed = torch.randperm(len(pairs), generator=seeds.generator(0, "modular", modulus))
    held = round(HELD_OUT * len(pairs))
    order = fixed[held:][torch.randperm(len(pairs) - held, generator=seeds.generator(seed, "modular", modulus))]
    count = round(share * len(pairs))
    if not 0 < count < len(order):
        raise InputError(f"share is {share}, but must leave some of the {len(order)} pairs for training and for test")
    rows = {"train": order[:count], "validation": fixed[:held], "test": order[count:]}[split]
    return TensorData(
        encoded(pairs[rows], modulus=modulus, form=form), result(pairs[rows], modulus=modulus, operation=operation)
    )


def encoded(pairs: Tensor, *, modulus: int = 31, form: str = "one-hot") -> Tensor | dict[str, Tensor]:
    """Pairs (n, 2) as inputs of a network, see `data`."""
    if form == "tokens":
        return {"input_ids": torch.cat([pairs, torch.full_like(pairs[:, :1], modulus)], 1)}
    return nn.functional.one_hot(pairs, modulus).flatten(1).float()


class ModularMLP(nn.Module):
    """Two hidden layers with ReLU and no biases: weights k times as large give logits k**3 times as large.

    Args:
        modulus: of the task; inputs are (n, 2 * modulus), logits (n, modulus).
        width: units of each hidden layer.
    """

    def __init__(self, modulus: int = 31, width: int = 128) -> None:
        super().__init__()
        self.config = {"modulus": modulus, "width": width}
        self.layers = nn.Sequential(
            nn.Linear(2 * modulus, width, bias=False),
            nn.ReLU(),
            nn.Linear(width, width, bias=False),
            nn.ReLU(),
            nn.Linear(width, modulus, bias=False),
        )

    def forward(self, pairs: Tensor) -> Tensor:
        """Pairs (n, 2 * modulus) to logits (n, modulus)."""
        return self.layers(pairs)
