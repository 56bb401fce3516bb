"""One kind of error for bad input, and the checks that raise it.

Every message is one sentence that names the argument, the value given and what is allowed. The command line prints it
and ends with exit code 2; anything that is not an `InputError` is a defect of ours.
"""

import difflib
import math
from collections.abc import Collection, Iterable


class InputError(ValueError):
    """Something the caller passed cannot be used; the message says what, and what can."""


def in_range(
    name: str,
    value: float,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: bool = False,
    below: bool = False,
) -> None:
    """Raise unless low <= value <= high; `above` and `below` make the bounds strict. NaN is never in range."""
    ok = (value > low if above else value >= low) and (value < high if below else value <= high)
    if ok:
        return
    lower = f"greater than {low:g}" if above else f"at least {low:g}"
    upper = f"less than {high:g}" if below else f"at most {high:g}"
    wanted = [text for text, bound in ((lower, low), (upper, high)) if math.isfinite(bound)] or ["a number"]
    raise InputError(f"{name} is {value}, but must be {' and '.join(wanted)}")


def positive(name: str, value: float) -> None:
    """Raise unless value > 0."""
    in_range(name, value, 0, above=True)


def one_of(name: str, value: object, allowed: Collection[object]) -> None:
    """Raise unless value is one of the allowed ones."""
    if value not in allowed:
        raise InputError(f"{name} is {value!r}, but must be one of {', '.join(map(repr, allowed))}")


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a message about an unknown name: the closest known ones, or nothing if none is close."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(close)}?" if close else ""


class Diverged(RuntimeError):
    """Training produced a number that is not finite; the message says where and what to try."""
