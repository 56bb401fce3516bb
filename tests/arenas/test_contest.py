"""Claims, terms and entries."""

import math

import pytest

from retouch.arenas.contest import (
    Claim,
    Entry,
    Picture,
    Plot,
    Terms,
    arena,
    arena_names,
    judge,
    mean,
    standard_error,
)
from retouch.core.cards import cards
from retouch.core.errors import InputError


def claim(relation, margin=0.0, factor=1.0):
    return Claim(text="", problem="p", measure="m", other="o", relation=relation, margin=margin, factor=factor)


@pytest.mark.parametrize(
    ("relation", "margin", "ours", "holds"),
    [
        ("at most", 1.0, [2.0, 4.0], True),  # mean difference 1
        ("at most", 0.9, [2.0, 4.0], False),
        ("at least", 1.0, [2.0, 4.0], True),
        ("at least", 1.1, [2.0, 4.0], False),
        ("within", 1.0, [0.0, 2.0], True),  # mean difference -1
        ("within", 0.9, [0.0, 2.0], False),
    ],
)
def test_a_claim_is_judged_on_the_mean_paired_difference(relation, margin, ours, holds):
    verdict = judge(claim(relation, margin), {"m": ours}, {"m": [1.0, 3.0]})
    assert verdict["holds"] is holds
    assert verdict["error"] == 0.0  # the difference is the same in both replicas, whatever their level


def test_a_factor_scales_the_other_side():
    verdict = judge(claim("at most", factor=0.5), {"m": [4.0]}, {"m": [10.0]})
    assert verdict == {"difference": -1.0, "error": pytest.approx(math.nan, nan_ok=True), "holds": True}


def test_a_claim_without_numbers_is_not_measured():
    assert judge(claim("at most"), {}, {"m": [1.0]})["holds"] is None
    assert judge(claim("at most"), {"m": [1.0]}, {"m": [1.0, 2.0]})["holds"] is None


def test_mean_and_standard_error():
    assert mean([1.0, 2.0, 3.0]) == 2.0
    assert standard_error([1.0, 2.0, 3.0]) == pytest.approx(1 / math.sqrt(3))
    assert math.isnan(standard_error([1.0]))
    assert math.isnan(mean([]))


def test_terms_say_what_the_seeds_vary():
    terms = Terms(replicas=4, vary=("forget",))
    assert (terms.number("forget", 3), terms.number("train", 3)) == (3, 0)
    with pytest.raises(InputError, match="replicas is 0"):
        Terms(replicas=0)
    with pytest.raises(InputError, match="vary is 'weather'"):
        Terms(vary=("weather",))


def test_settings_by_problem_and_grid_points():
    entry = Entry(
        name="e",
        title="E",
        solve=lambda replica: None,
        settings={"": {"a": 1}, "p": {"a": 2}},
        grid={"a": (1, 2), "b": (3,)},
    )
    assert entry.settings_for("p") == {"a": 2}
    assert entry.settings_for("q") == {"a": 1}
    assert entry.grid_points() == [{"a": 1, "b": 3}, {"a": 2, "b": 3}]


def test_bad_parts_are_refused():
    with pytest.raises(InputError, match="relation is 'near'"):
        claim("near")
    with pytest.raises(InputError, match="kind is 'pie'"):
        Plot(kind="pie", x="m")
    assert Picture(image=None, title="a", group="b").title == "a"


def test_every_technique_has_an_arena_entry_and_every_claim_can_be_judged():
    entered = {}
    for name in arena_names():
        found = arena(name)
        entries = found.entries()
        names = {entry.name for entry in entries}
        assert len(names) == len(entries)
        entered.update({entry.name: entry for entry in entries if entry.kind == "technique"})
        for entry in entries:
            for made in entry.claims:
                assert made.problem in found.problems
                assert made.other in names
                assert made.measure in found.measures or made.measure == "seconds"
            assert set(entry.settings) <= {"", *found.problems}
        assert found.order in found.measures
        assert all(plot.x in found.measures for plot in found.plots)
    for card in cards():
        assert card.name in entered, card.name
        assert entered[card.name].claims, card.name


def test_an_unknown_arena_suggests_the_nearest():
    with pytest.raises(InputError, match="Did you mean forget"):
        arena("forgets")
