"""What the parts of this world share: samples whose answers can be checked, and splits that never overlap."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

from retouch.core import seeds
from retouch.core.errors import one_of

SPLITS = ("train", "validation", "test")


class Meaning(Protocol):
    """What a text is about, as an oracle of answers to it."""

    def check(self, answer: str) -> bool:
        """Whether an answer is right."""
        ...


@dataclass(frozen=True)
class Sample:
    """A prompt and an answer for a language model.

    Attributes:
        prompt: text that is given; empty for a statement, all of which is learned.
        answer: text to learn.
        task: "facts", "instructions" or "arithmetic".
        meaning: the `Fact`, `Question`, `Instruction` or `Problem` in it.
    """

    prompt: str
    answer: str
    task: str
    meaning: Meaning

    @property
    def text(self) -> str:
        """Prompt and answer."""
        return f"{self.prompt} {self.answer}".strip()

    def check(self, answer: str) -> bool:
        """Whether another answer to the prompt is right, exactly."""
        return self.meaning.check(answer)


@dataclass(frozen=True)
class Claim:
    """A statement for a classifier, and whether it is true."""

    text: str
    true: bool
    task: str


def word_list(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())


def draws(seed: int, *keys: object) -> random.Random:
    """A generator of its own, seeded with `seeds.derive`."""
    return random.Random(seeds.derive(seed, *keys))


def split_of(*key: object) -> str:
    """The split that content belongs to, whatever the seed: a tenth to validation, a tenth to test."""
    return {0: "validation", 1: "test"}.get(seeds.derive(0, "split", *key) % 10, "train")


T = TypeVar("T")


def take(stream: Iterator[tuple[T, str]], split: str, count: int) -> list[T]:
    """The first `count` things of a stream of (thing, its split) that belong to a split."""
    one_of("split", split, SPLITS)
    found: list[T] = []
    while len(found) < count:
        thing, its_split = next(stream)
        if its_split == split:
            found.append(thing)
    return found
