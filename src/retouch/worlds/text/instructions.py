"""Small instructions on lists of words, such as to reverse or to sort them, with an exact check of any answer.

A list is held out whole: which split it belongs to depends on the instruction and its words, not on the seed.
"""

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from retouch.core.errors import InputError, in_range, one_of
from retouch.worlds.text.samples import Sample, draws, split_of, take, word_list

WORDS = word_list("apple bell cloud drum egg fish glass hat ink jar kite lamp map nest orange pen quilt ring ship tree")
LONGEST = 5


@dataclass(frozen=True)
class Kind:
    """How an instruction is worded, and what follows it.

    Attributes:
        wordings: with places for {words}, {word} and {number}.
        solve: instruction -> its answer.
    """

    wordings: tuple[str, ...]
    solve: Callable[["Instruction"], str]


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        kind: one of `KINDS`.
        words: the list that it is about; a single word for "times".
        wording: which wording.
        word: the word to leave out, for "without".
        number: how often, for "times".
    """

    kind: str
    words: tuple[str, ...]
    wording: int = 0
    word: str = ""
    number: int = 0

    @property
    def prompt(self) -> str:
        """The instruction in words."""
        places = {"words": " ".join(self.words), "word": self.word or self.words[0], "number": self.number}
        return KINDS[self.kind].wordings[self.wording].format(**places)

    @property
    def answer(self) -> str:
        """The only right answer."""
        return KINDS[self.kind].solve(self)

    def check(self, answer: str) -> bool:
        """Whether an answer is the right one."""
        return answer == self.answer


def _join(words: Sequence[str]) -> str:
    return " ".join(words)


KINDS = {
    "repeat": Kind(("Repeat: {words}.", "Say this again: {words}."), lambda i: _join(i.words)),
    "reverse": Kind(("Reverse: {words}.", "Say this backwards: {words}."), lambda i: _join(i.words[::-1])),
    "sort": Kind(("Sort: {words}.", "Say this in order: {words}."), lambda i: _join(sorted(i.words))),
    "count": Kind(("Count: {words}.", "How many words are here: {words}?"), lambda i: str(len(i.words))),
    "first": Kind(("First of: {words}.", "Which word is first: {words}?"), lambda i: i.words[0]),
    "last": Kind(("Last of: {words}.", "Which word is last: {words}?"), lambda i: i.words[-1]),
    "times": Kind(("Say {word} {number} times.", "Copy {number} times: {word}."), lambda i: _join(i.words * i.number)),
    "without": Kind(
        ("Leave out {word}: {words}.", "Without {word}: {words}."), lambda i: _join([w for w in i.words if w != i.word])
    ),
}


def instructions(
    count: int, split: str = "train", *, kinds: Sequence[str] = tuple(KINDS), longest: int = LONGEST, seed: int = 0
) -> list[Instruction]:
    """Instructions drawn at random; the splits share no list.

    Args:
        count: how many.
        split: "train", "validation" or "test".
        kinds: to draw from.
        longest: words of a list at most, or times to say a word; the reference model knows up to 5.
        seed: of the draws.
    """
    in_range("longest", longest, 2, 9)
    for kind in kinds:
        one_of("kind", kind, tuple(KINDS))

    def stream() -> Iterator[tuple[Instruction, str]]:
        rng = draws(seed, "instructions", split)
        while True:
            kind, length = rng.choice(list(kinds)), rng.randint(2, longest)
            words = tuple(rng.choices(WORDS, k=1 if kind == "times" else length))
            if kind == "without" and len(set(words)) == 1:
                continue  # nothing would be left to say
            word, number = rng.choice(words) if kind == "without" else "", length if kind == "times" else 0
            wording = rng.randrange(len(KINDS[kind].wordings))
            yield Instruction(kind, words, wording, word, number), split_of(kind, words, word, number)

    return take(stream(), split, count)


def parse(prompt: str) -> Instruction:
    """The instruction in a text.

    Raises:
        InputError: if it is none of this world.
    """
    for kind, wording, pattern in _patterns():
        if found := pattern.fullmatch(prompt):
            parts = found.groupdict("")
            words = tuple(parts.get("words", parts.get("word", "")).split())
            word = parts["word"] if kind == "without" else ""
            return Instruction(kind, words, wording, word, int(parts.get("number", 0)))
    raise InputError(f"prompt is {prompt!r}, but must be an instruction of this world")


@functools.cache
def _patterns() -> list[tuple[str, int, re.Pattern[str]]]:
    word = rf"(?:{'|'.join(WORDS)})"
    places = {"words": rf"{word}(?: {word})*", "word": word, "number": r"[1-9]"}
    patterns = []
    for name, kind in KINDS.items():
        for number, wording in enumerate(kind.wordings):
            pattern = re.escape(wording)
            for place, value in places.items():
                pattern = pattern.replace(rf"\{{{place}\}}", f"(?P<{place}>{value})")
            patterns.append((name, number, re.compile(pattern)))
    return patterns


def samples(found: Sequence[Instruction]) -> list[Sample]:
    """Instructions with their answers."""
    return [Sample(one.prompt, one.answer, "instructions", one) for one in found]


def lexicon() -> Iterator[str]:
    """Texts that hold all words of this part of the world."""
    yield " ".join(WORDS)
    for kind in KINDS.values():
        yield from (wording.format(words=WORDS[0], word=WORDS[0], number=1) for wording in kind.wordings)
