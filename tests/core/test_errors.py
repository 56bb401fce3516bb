"""Bad input gets one sentence with the argument, its value and what is allowed."""

import math

import pytest

from retouch.core.errors import Diverged, InputError, in_range, nearest, one_of, positive


@pytest.mark.parametrize(
    ("value", "bounds", "options"),
    [
        (0, (0, 1), {}),
        (1, (0, 1), {}),
        (0.5, (0, 1), {"above": True, "below": True}),
        (1e-300, (0,), {"above": True}),
        (-5, (), {}),
        (math.inf, (0,), {}),
    ],
)
def test_in_range_accepts_what_is_in_range(value, bounds, options):
    in_range("x", value, *bounds, **options)


@pytest.mark.parametrize(
    ("value", "bounds", "options", "message"),
    [
        (-0.1, (0, 1), {}, "x is -0.1, but must be at least 0 and at most 1"),
        (1.1, (0, 1), {}, "x is 1.1, but must be at least 0 and at most 1"),
        (0, (0, 1), {"above": True}, "x is 0, but must be greater than 0 and at most 1"),
        (1, (0, 1), {"below": True}, "x is 1, but must be at least 0 and less than 1"),
        (-3, (0,), {}, "x is -3, but must be at least 0"),
        (3, (-math.inf, 2), {}, "x is 3, but must be at most 2"),
        (math.nan, (0, 1), {}, "x is nan, but must be at least 0 and at most 1"),
        (math.nan, (), {}, "x is nan, but must be a number"),
    ],
)
def test_in_range_names_the_value_and_what_is_allowed(value, bounds, options, message):
    with pytest.raises(InputError) as caught:
        in_range("x", value, *bounds, **options)
    assert str(caught.value) == message


@pytest.mark.parametrize("value", [0, -1, math.nan])
def test_positive_refuses_zero_negative_numbers_and_nan(value):
    with pytest.raises(InputError, match=f"^steps is {value}, but must be greater than 0$"):
        positive("steps", value)


def test_positive_accepts_a_positive_number():
    positive("steps", 1e-9)


def test_one_of_lists_what_is_allowed():
    one_of("mode", "a", ("a", "b"))
    with pytest.raises(InputError, match=r"^mode is 'c', but must be one of 'a', 'b'$"):
        one_of("mode", "c", ("a", "b"))


def test_nearest_suggests_close_names_only():
    assert nearest("slaun", ["salun", "ssd", "dmm"]) == " Did you mean salun?"
    assert nearest("fc", {"fc1": 0, "fc2": 0, "head": 0}) in (" Did you mean fc1 or fc2?", " Did you mean fc2 or fc1?")
    assert nearest("zzzzzz", ["salun", "ssd"]) == ""


def test_bad_input_is_a_value_error_and_divergence_is_not():
    assert issubclass(InputError, ValueError)
    assert issubclass(Diverged, RuntimeError)
    assert not issubclass(Diverged, ValueError)
