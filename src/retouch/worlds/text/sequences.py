"""Sequences to classify whose difficulty varies: the parity of the first n bits, and where n pointers lead.

    Parity of the first 3: 1 0 1 1 0.                     label 0, difficulty 3
    Follow 2 from c: a d, b a, c b, d c.                  label 0 (a), difficulty 2

A model of fixed depth finds those with a large n harder, so techniques that choose how long to compute have something
to choose.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from retouch.core.data import TensorData
from retouch.core.errors import InputError, in_range
from retouch.worlds.text.samples import draws, split_of, take
from retouch.worlds.text.tokens import encode_texts

NODES = "abcdefghijklmnop"


@dataclass(frozen=True)
class Sequences:
    """A classification task.

    Attributes:
        texts: the sequences.
        data: inputs "input_ids" and "attention_mask" (n, t), labels (n,).
        difficulty: the n of each sequence (n,).
        classes: number of labels.
    """

    texts: list[str]
    data: TensorData
    difficulty: Tensor
    classes: int


def parity(count: int, split: str = "train", *, length: int = 12, seed: int = 0) -> Sequences:
    """Parity of the first n of `length` bits, n uniform from 1 to `length`.

    Args:
        count: sequences.
        split: "train", "validation" or "test"; they share no sequence.
        length: bits.
        seed: of the draws.
    """
    in_range("length", length, 5, 64)

    def stream() -> Iterator[tuple[str, str]]:
        rng = draws(seed, "parity", split)
        while True:
            bits = " ".join(rng.choices("01", k=length))
            yield f"Parity of the first {rng.randint(1, length)}: {bits}.", split_of("parity", bits)

    return _sequences(take(stream(), split, count), 2)


def chain(count: int, split: str = "train", *, nodes: int = 8, longest: int | None = None, seed: int = 0) -> Sequences:
    """The node reached after n pointers, n uniform from 1 to `longest`; the pointers form one ring, in random order.

    Args:
        count: sequences.
        split: "train", "validation" or "test"; they share no sequence.
        nodes: of the ring, and classes.
        longest: chain; nodes - 1 if None, so that none comes back to its start.
        seed: of the draws.
    """
    in_range("nodes", nodes, 4, len(NODES))
    longest = nodes - 1 if longest is None else longest
    in_range("longest", longest, 1, nodes - 1)

    def stream() -> Iterator[tuple[str, str]]:
        rng = draws(seed, "chain", split)
        while True:
            ring = rng.sample(NODES[:nodes], nodes)
            pointers = [f"{ring[k - 1]} {ring[k]}" for k in range(nodes)]
            rng.shuffle(pointers)
            text = f"Follow {rng.randint(1, longest)} from {rng.choice(ring)}: {', '.join(pointers)}."
            yield text, split_of("chain", text)

    return _sequences(take(stream(), split, count), nodes)


def label_of(text: str) -> int:
    """The oracle: the right label, read off the text.

    Raises:
        InputError: if the text is no sequence of this world.
    """
    if found := re.fullmatch(r"Parity of the first (\d+): ([01](?: [01])*)\.", text):
        bits, n = found[2].split(), int(found[1])
        if 0 < n <= len(bits):
            return bits[:n].count("1") % 2
    if found := re.fullmatch(r"Follow (\d+) from ([a-p]): ([a-p] [a-p](?:, [a-p] [a-p])*)\.", text):
        pointers, node = dict(pair.split() for pair in found[3].split(", ")), found[2]
        for _ in range(int(found[1])):
            node = pointers.get(node, "?")
        if node in NODES:
            return NODES.index(node)
    raise InputError(f"text is {text!r}, but must be a sequence of this world")


def _sequences(texts: list[str], classes: int) -> Sequences:
    difficulty = [int(next(re.finditer(r"\d+", text))[0]) for text in texts]
    labels = torch.tensor([label_of(text) for text in texts])
    return Sequences(texts, encode_texts(texts, labels), torch.tensor(difficulty), classes)


def lexicon() -> Iterator[str]:
    """Texts that hold all words of this part of the world."""
    yield "Parity of the first 1: 0."
    yield f"Follow 1 from a: {' '.join(NODES)}, a."
