"""Sums of several steps with the way to their result, and a solver that errs at a known rate.

    prompt   Compute 3 + 4 * 2 step by step.
    trace    3 + 8 = 11. The answer is 11.

A step does the one operation that is due (the first product, or else what is leftmost) and writes down what is then
left. `check_trace` verifies each step against the line before it, so that an error is counted where it is made and not
again where it is carried on.
"""

import operator
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from retouch.core.errors import InputError, in_range, one_of
from retouch.worlds.text.samples import Claim, Sample, draws, split_of, take

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
ERRORS = ("slip", "carry", "order")
Expression = tuple[int | str, ...]  # numbers and the operators between them


@dataclass(frozen=True)
class Problem:
    """An expression to compute, such as "3 + 4 * 2"."""

    expression: str

    @property
    def prompt(self) -> str:
        """The problem in words."""
        return f"Compute {self.expression} step by step."

    @property
    def value(self) -> int:
        """The right result."""
        left = read(self.expression)
        while len(left) > 1:
            left = reduce(left)
        return int(left[0])

    @property
    def steps(self) -> int:
        """Operations in it."""
        return len(read(self.expression)) // 2

    def check(self, answer: str) -> bool:
        """Whether the final answer of a trace is right, whatever its steps."""
        return check_trace(self, answer).answer


@dataclass(frozen=True)
class TraceCheck:
    """Which steps of a trace follow from the line before, and whether its answer is the problem's value.

    A trace that is not of this form has no steps and no right answer. One that ends too early has a wrong answer.
    """

    steps: tuple[bool, ...]
    answer: bool

    @property
    def right(self) -> bool:
        """Every step and the answer."""
        return self.answer and all(self.steps)


@dataclass(frozen=True)
class Trace:
    """A solution of a problem, and whether every step of it is right."""

    problem: Problem
    text: str
    right: bool


def read(expression: str) -> Expression:
    """Numbers and operators of an expression.

    Raises:
        InputError: if it is not made of whole numbers with one of + - * between each two.
    """
    if not re.fullmatch(r"-?\d+( [+*-] -?\d+)*", expression):
        raise InputError(f"expression is {expression!r}, but must be whole numbers with + - or * and spaces between")
    return tuple(part if part in OPERATIONS else int(part) for part in expression.split())


def write(expression: Expression) -> str:
    """An expression as text."""
    return " ".join(map(str, expression))


def due(expression: Expression) -> int:
    """Position of the operator that is due: the first product, or else the leftmost."""
    return expression.index("*") if "*" in expression else 1


def reduce(expression: Expression, at: int | None = None, off: int = 0) -> Expression:
    """The expression after one operation.

    Args:
        expression: of at least one operation.
        at: position of the operator; the one that is due if None.
        off: added to the right result, to make it wrong.
    """
    at = due(expression) if at is None else at
    first, sign, second = expression[at - 1 : at + 2]
    return (*expression[: at - 1], OPERATIONS[str(sign)](first, second) + off, *expression[at + 2 :])


def problems(
    count: int,
    split: str = "train",
    *,
    steps: Sequence[int] = (1, 2, 3),
    largest: int = 9,
    limit: int = 99,
    signs: Sequence[str] = tuple(OPERATIONS),
    seed: int = 0,
) -> list[Problem]:
    """Problems drawn at random; the splits share no expression.

    Args:
        count: how many.
        split: "train", "validation" or "test".
        steps: numbers of operations to draw from.
        largest: operand.
        limit: largest result on the way; none is below 0.
        signs: operations to draw from.
        seed: of the draws.
    """
    in_range("largest", largest, 1)
    in_range("limit", limit, largest)
    for number in steps:
        in_range("steps", number, 1)
    for sign in signs:
        one_of("sign", sign, tuple(OPERATIONS))

    def stream() -> Iterator[tuple[Problem, str]]:
        rng = draws(seed, "problems", split)
        while True:
            expression: Expression = (rng.randint(1, largest),)
            for _ in range(rng.choice(steps)):
                expression += (rng.choice(signs), rng.randint(1, largest))
            if _within(expression, limit):
                text = write(expression)
                yield Problem(text), split_of("problem", text)

    return take(stream(), split, count)


def _within(expression: Expression, limit: int) -> bool:
    """Whether all results on the way are from 0 to the limit."""
    while len(expression) > 1:
        at = due(expression)
        expression = reduce(expression, at)
        if not 0 <= int(expression[at - 1]) <= limit:
            return False
    return True


def solve(problem: Problem, *, rate: float = 0.0, error: str = "slip", seed: int = 0) -> Trace:
    """A way to the result, with an error at each step where one of its kind can be made, at a known rate.

    What follows an error goes on from it, and can meet numbers below 0 or above the limit.

    Args:
        problem: to solve.
        rate: chance of an error at a step where it can be made, 0 to 1.
        error: "slip", at any step: the result is off by 1 to 9 either way, at random. Two are systematic: "carry", at
            a + or - of two numbers from 0 on whose last digits carry or borrow: the ten is forgotten; "order", at a
            step whose operation is not the leftmost: the leftmost is done.
        seed: of the errors.
    """
    in_range("rate", rate, 0, 1)
    one_of("error", error, ERRORS)
    rng, left = draws(seed, "solve", problem.expression), read(problem.expression)
    lines = []
    while len(left) > 1:
        at, off = due(left), 0
        if error == "slip":
            off = rng.choice((-1, 1)) * rng.randint(1, 9)
        elif error == "carry":
            off = _forgotten_ten(*left[at - 1 : at + 2])
        possible = at != 1 if error == "order" else off != 0
        if possible and rng.random() < rate:
            left = reduce(left, 1) if error == "order" else reduce(left, at, off)
        else:
            left = reduce(left, at)
        lines.append(write(left))
    text = f"{' = '.join(lines)}. The answer is {left[0]}."
    return Trace(problem, text, check_trace(problem, text).right)


def _forgotten_ten(first: int | str, sign: int | str, second: int | str) -> int:
    """What a forgotten carry or borrow adds to a result; 0 where there is none."""
    a, b = int(first), int(second)
    if min(a, b) < 0:
        return 0
    if sign == "+" and a % 10 + b % 10 >= 10:
        return -10
    return 10 if sign == "-" and a >= b and a % 10 < b % 10 else 0


def check_trace(problem: Problem, trace: str) -> TraceCheck:
    """Verify each step of a trace, and its answer."""
    number = r"-?\d+"
    line = rf"{number}(?: [+*-] {number})*"
    found = re.fullmatch(rf"({line}(?: = {line})*)\. The answer is ({number})\.", trace)
    if not found:
        return TraceCheck((), False)
    before, steps = read(problem.expression), []
    for text in found[1].split(" = "):
        after = read(text)
        steps.append(len(before) > 1 and after == reduce(before))
        before = after
    return TraceCheck(tuple(steps), before == (int(found[2]),) == (problem.value,))


def parse(prompt: str) -> Problem:
    """The problem in a text.

    Raises:
        InputError: if it is none of this world.
    """
    found = re.fullmatch(r"Compute (.*) step by step\.", prompt)
    if not found:
        raise InputError(f"prompt is {prompt!r}, but must be 'Compute ... step by step.'")
    return Problem(write(read(found[1])))


def samples(traces: Sequence[Trace]) -> list[Sample]:
    """Problems with the answers of traces."""
    return [Sample(trace.problem.prompt, trace.text, "arithmetic", trace.problem) for trace in traces]


def is_true(equation: str) -> bool:
    """Whether a text such as "3 + 4 = 7." is an equation and a true one."""
    expression, _, result = equation.removesuffix(".").partition(" = ")
    if not equation.endswith(".") or not re.fullmatch(r"-?\d+", result):
        return False
    try:
        return Problem(expression).value == int(result)
    except InputError:
        return False


def claims(count: int, split: str = "train", *, largest: int = 20, limit: int = 99, seed: int = 0) -> list[Claim]:
    """Equations of one operation, half of them wrong by 1 to 10; the splits share no left side."""
    rng, found = draws(seed, "equations", split), []
    for number, problem in enumerate(problems(count, split, steps=(1,), largest=largest, limit=limit, seed=seed)):
        value = problem.value
        if number % 2:
            value = rng.choice([other for other in range(max(0, value - 10), value + 11) if other != value])
        found.append(Claim(f"{problem.expression} = {value}.", number % 2 == 0, "arithmetic"))
    return found


def lexicon() -> Iterator[str]:
    """Texts that hold all words of this part of the world."""
    yield Problem("1 + 1 - 1 * 1").prompt
    yield "= The answer is 1."
