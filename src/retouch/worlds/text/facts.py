"""People and what is known of them: statements, questions in four answer styles, and an exact oracle of both.

Every person has a city, a job, a pet, a sport and a friend. A fact can be worded in several ways; each relation keeps
one wording for validation and one for test, in words that other relations' training texts use. A `KnowledgeBase` of
more people with the same seed goes on from a smaller one: its first people and their facts are the same.
"""

import functools
import itertools
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from retouch.core.errors import InputError, in_range, one_of
from retouch.worlds.text.samples import SPLITS, Claim, Sample, draws, word_list

FIRST = word_list(
    "Ada Ben Cora Dan Eva Finn Gina Hugo Iris Jack Kira Leo Mona Nils Olga Paul Quin Rosa Sven Tara Ugo Vera Walt Zoe"
)
LAST = word_list(
    "Adler Baker Cole Duval Ember Frost Grant Holm Ivers Jansen Keller Lund Moss Novak Olsen Park Quist Reed Stone "
    "Torres Urban Vance Wolf York"
)
NAMES = tuple(f"{first} {last}" for first, last in itertools.product(FIRST, LAST))


@dataclass(frozen=True)
class Relation:
    """Its possible values, and how it is stated and asked in words of its own."""

    values: tuple[str, ...]
    statement: str
    question: str


RELATIONS = {
    "city": Relation(
        word_list(
            "Athens Berlin Cairo Dublin Geneva Lima Lisbon Madrid Oslo Paris Prague Rome Seoul Tokyo Turin Vienna"
        ),
        "{person} lives in {value}.",
        "Where does {person} live?",
    ),
    "job": Relation(
        word_list(
            "baker barber dancer dentist doctor farmer judge lawyer miner nurse painter pilot plumber poet sailor tutor"
        ),
        "{person} works as a {value}.",
        "What does {person} work as?",
    ),
    "pet": Relation(
        word_list(
            "canary cat dog ferret frog goat hamster horse lizard mouse parrot pigeon rabbit snake spider turtle"
        ),
        "{person} keeps a {value}.",
        "What does {person} keep at home?",
    ),
    "sport": Relation(
        word_list(
            "boxing chess cricket darts fencing golf handball hockey judo polo rowing rugby skiing surfing tennis yoga"
        ),
        "{person} is good at {value}.",
        "What is {person} good at?",
    ),
    "friend": Relation(NAMES, "{person} goes out with {value}.", "Who does {person} go out with?"),
}
STATEMENTS = (
    "The {relation} of {person} is {value}.",
    "Asked for a {relation}, {person} says {value}.",
    "{person} has a {relation}: {value}.",
)
QUESTIONS = (
    "What is the {relation} of {person}?",
    "Which {relation} does {person} have?",
    "Name the {relation} of {person}.",
    "Tell me the {relation} that {person} has.",
)
STYLES = {
    "short": "Answer briefly.",
    "sentence": "Answer in a sentence.",
    "yes_no": "Answer yes or no.",
    "choice": "Answer with a letter.",
}
LETTERS = ("a", "b", "c")
_ASKED = re.compile(
    r"(?P<asked>.*?[.?])(?: Is it ([A-Za-z ]+)\?| a: ([A-Za-z ]+), b: ([A-Za-z ]+), c: ([A-Za-z ]+)\.)? "
    rf"(?P<style>{'|'.join(map(re.escape, STYLES.values()))})"
)


@dataclass(frozen=True)
class Fact:
    """That a person's relation has a value."""

    person: str
    relation: str
    value: str

    def statement(self, wording: int = 0) -> str:
        """The fact in words; wording 0 is the relation's own."""
        return _wordings("statement", self.relation)[wording].format(**vars(self))

    def check(self, answer: str) -> bool:
        """Whether a text states just this fact."""
        return parse(answer) == self

    def is_in(self, text: str) -> bool:
        """Whether the value is named anywhere in a text: a lenient check of knowledge apart from the form."""
        return re.search(rf"(?<!\w){re.escape(self.value)}(?!\w)", text) is not None


@dataclass(frozen=True)
class Question:
    """A question that a fact answers.

    Attributes:
        fact: the true one.
        wording: which wording; 0 is the relation's own.
        style: of the answer, one of `STYLES`.
        options: the value asked about in style "yes_no", the values to choose from in style "choice".
    """

    fact: Fact
    wording: int = 0
    style: str = "short"
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        one_of("style", self.style, tuple(STYLES))
        wanted = {"yes_no": 1, "choice": len(LETTERS)}.get(self.style, 0)
        if len(self.options) != wanted:
            raise InputError(f"options has {len(self.options)} values, but must have {wanted} for style {self.style!r}")
        if not set(self.options) <= set(RELATIONS[self.fact.relation].values):
            raise InputError(f"options is {self.options}, but must hold values of the relation {self.fact.relation!r}")
        if self.style == "choice" and self.fact.value not in self.options:
            raise InputError(f"options is {self.options}, but must hold the right value {self.fact.value!r}")

    @property
    def text(self) -> str:
        """The question, with what it asks for in the end."""
        asked = _wordings("question", self.fact.relation)[self.wording].format(**vars(self.fact))
        if self.style == "yes_no":
            asked += f" Is it {self.options[0]}?"
        if self.style == "choice":
            asked += f" {', '.join(map(': '.join, zip(LETTERS, self.options, strict=True)))}."
        return f"{asked} {STYLES[self.style]}"

    @property
    def answer(self) -> str:
        """The right answer."""
        if self.style == "sentence":
            return self.fact.statement()
        if self.style == "yes_no":
            return "yes" if self.options[0] == self.fact.value else "no"
        if self.style == "choice":
            return LETTERS[self.options.index(self.fact.value)]
        return self.fact.value

    def check(self, answer: str) -> bool:
        """Whether an answer is right and in the style asked for; a sentence may have any wording."""
        return self.fact.check(answer) if self.style == "sentence" else answer == self.answer


def wordings(kind: str, relation: str, split: str) -> list[int]:
    """The wordings of a relation's statements or questions that belong to a split.

    Args:
        kind: "statement" or "question".
        relation: one of `RELATIONS`.
        split: "train", "validation" or "test".
    """
    one_of("kind", kind, ("statement", "question"))
    one_of("relation", relation, tuple(RELATIONS))
    one_of("split", split, SPLITS)
    shared = len(STATEMENTS if kind == "statement" else QUESTIONS)
    place = list(RELATIONS).index(relation)
    held_out = {"validation": 1 + (place + 1) % shared, "test": 1 + place % shared}
    if split != "train":
        return [held_out[split]]
    return [wording for wording in range(1 + shared) if wording not in held_out.values()]


def parse(statement: str) -> Fact | None:
    """The fact that a text states, true or not; None if it is no statement of this world."""
    found = _match("statement", statement)
    return Fact(found["person"], found["relation"], found["value"]) if found else None


class KnowledgeBase:
    """People and their facts.

    Args:
        people: how many.
        known: the first so many (or all, if they are fewer) are known to the reference models, the others are new.
        seed: of names and facts.
    """

    def __init__(self, people: int = 96, *, known: int = 64, seed: int = 0) -> None:
        in_range("people", people, 4, len(NAMES))
        in_range("known", known, 0)
        for name, number in (("people", people), ("known", known)):
            if number % 2:
                raise InputError(f"{name} is {number}, but must be even: friends come in pairs")
        names = draws(seed, "names").sample(NAMES, len(NAMES))[:people]
        self.known, self.new = tuple(names[:known]), tuple(names[known:])
        self._values: dict[tuple[str, str], str] = {}
        for number, person in enumerate(names):
            rng = draws(seed, "person", number)
            for name, relation in RELATIONS.items():
                self._values[person, name] = names[number ^ 1] if name == "friend" else rng.choice(relation.values)

    @property
    def people(self) -> tuple[str, ...]:
        """Everybody."""
        return self.known + self.new

    def fact(self, person: str, relation: str) -> Fact:
        """What is true of a person."""
        one_of("relation", relation, tuple(RELATIONS))
        if (person, relation) not in self._values:
            raise InputError(f"person is {person!r}, but must be one of the {len(self.people)} people of this base")
        return Fact(person, relation, self._values[person, relation])

    def facts(self, people: Sequence[str] | None = None, relations: Sequence[str] = tuple(RELATIONS)) -> list[Fact]:
        """All facts on some people, by default on the known ones."""
        return [self.fact(person, name) for person in (self.known if people is None else people) for name in relations]

    def is_true(self, statement: str) -> bool:
        """Whether a text is a statement of this world and a true one."""
        fact = parse(statement)
        return fact is not None and self._values.get((fact.person, fact.relation)) == fact.value

    def question(self, text: str) -> Question:
        """The question in a text.

        Raises:
            InputError: if it is no question on a person of this base, or its options do not fit.
        """
        parts = _ASKED.fullmatch(text)
        found = _match("question", parts["asked"]) if parts else None
        if parts and found and (found["person"], found["relation"]) in self._values:
            fact = self.fact(found["person"], found["relation"])
            style = next(name for name, request in STYLES.items() if request == parts["style"])
            options = tuple(value for value in parts.groups()[1:-1] if value)
            return Question(fact, found["wording"], style, options)
        raise InputError(f"question is {text!r}, but must be one of this world, on a person of this base")

    def answer(self, question: str) -> str:
        """The right answer to a question, see `question`."""
        return self.question(question).answer

    def statements(self, split: str = "train", facts: Sequence[Fact] | None = None) -> list[Sample]:
        """Facts in all wordings of a split, as samples without a prompt.

        Args:
            split: "train", "validation" or "test".
            facts: those on known people if None.
        """
        chosen = self.facts() if facts is None else facts
        return [
            Sample("", fact.statement(wording), "facts", fact)
            for fact in chosen
            for wording in wordings("statement", fact.relation, split)
        ]

    def questions(
        self,
        split: str = "train",
        facts: Sequence[Fact] | None = None,
        *,
        styles: Sequence[str] = ("short",),
        repeats: int = 1,
        seed: int = 0,
    ) -> list[Sample]:
        """Questions on facts in all wordings of a split and some styles.

        Args:
            split: "train", "validation" or "test".
            facts: those on known people if None.
            styles: of the answers. Half of those to "yes_no" are yes.
            repeats: times that each is asked, with options drawn anew.
            seed: of the options.
        """
        chosen, rng = self.facts() if facts is None else facts, draws(seed, "questions", split)
        samples = []
        for fact, style, _ in itertools.product(chosen, styles, range(repeats)):
            for wording in wordings("question", fact.relation, split):
                question = Question(fact, wording, style, self._options(fact, style, rng))
                samples.append(Sample(question.text, question.answer, "facts", question))
        return samples

    def claims(
        self, split: str = "train", facts: Sequence[Fact] | None = None, *, repeats: int = 1, seed: int = 0
    ) -> list[Claim]:
        """Statements, each `repeats` times as it is and as often with a wrong value.

        A split has some wordings of every fact; which ones varies from person to person, so that what is held out is
        neither a fact nor a wording, but the two together.

        Args:
            split: "train", "validation" or "test".
            facts: those on known people if None.
            repeats: of each.
            seed: of the wrong values.
        """
        one_of("split", split, SPLITS)
        chosen, rng = self.facts() if facts is None else facts, draws(seed, "claims", split)
        claims = []
        for fact, wording in itertools.product(chosen, range(1 + len(STATEMENTS))):
            place = self.people.index(fact.person) + list(RELATIONS).index(fact.relation) + wording
            if {0: "validation", 1: "test"}.get(place % (1 + len(STATEMENTS)), "train") != split:
                continue
            for wrong in self._wrong(fact, repeats, rng):
                claims.append(Claim(fact.statement(wording), True, "facts"))
                claims.append(Claim(Fact(fact.person, fact.relation, wrong).statement(wording), False, "facts"))
        return claims

    def _options(self, fact: Fact, style: str, rng: random.Random) -> tuple[str, ...]:
        if style == "yes_no":
            return (fact.value,) if rng.random() < 0.5 else self._wrong(fact, 1, rng)
        if style == "choice":
            options = [fact.value, *self._wrong(fact, len(LETTERS) - 1, rng)]
            rng.shuffle(options)
            return tuple(options)
        return ()

    def _wrong(self, fact: Fact, count: int, rng: random.Random) -> tuple[str, ...]:
        """Other values of a relation; other friends are people of this base."""
        values = self.people if fact.relation == "friend" else RELATIONS[fact.relation].values
        return tuple(rng.sample([value for value in values if value not in (fact.value, fact.person)], count))


def _wordings(kind: str, relation: str) -> tuple[str, ...]:
    own, shared = RELATIONS[relation], STATEMENTS if kind == "statement" else QUESTIONS
    first = own.statement if kind == "statement" else own.question
    return (first, *(wording.replace("{relation}", relation) for wording in shared))


@functools.cache
def _patterns(kind: str) -> list[tuple[str, int, re.Pattern[str]]]:
    """Every relation, wording and the pattern of its texts."""
    name = rf"(?:{'|'.join(FIRST)}) (?:{'|'.join(LAST)})"
    patterns = []
    for relation, own in RELATIONS.items():
        value = name if relation == "friend" else "|".join(own.values)
        for number, wording in enumerate(_wordings(kind, relation)):
            pattern = re.escape(wording).replace(r"\{person\}", f"(?P<person>{name})")
            patterns.append((relation, number, re.compile(pattern.replace(r"\{value\}", f"(?P<value>{value})"))))
    return patterns


def _match(kind: str, text: str) -> dict[str, Any] | None:
    """Relation, wording, person and value (of a statement) in a text."""
    for relation, wording, pattern in _patterns(kind):
        if found := pattern.fullmatch(text):
            return {"relation": relation, "wording": wording, **found.groupdict()}
    return None


def lexicon() -> Iterator[str]:
    """Texts that hold all words of this part of the world."""
    blanks = {"person": NAMES[0], "value": NAMES[0]}
    yield " ".join(FIRST + LAST)
    yield from STYLES.values()
    yield "Is it a: b: c, . yes no"
    for name, relation in RELATIONS.items():
        yield " ".join(relation.values)
        for kind in ("statement", "question"):
            yield from (wording.format(**blanks) for wording in _wordings(kind, name))
