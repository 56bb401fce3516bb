"""Derived seeds are stable, and global randomness is the caller's own."""

import random

import numpy as np
import pytest
import torch

from retouch.core import seeds


def draw():
    """One draw from each of the global generators."""
    return float(torch.rand(())), float(np.random.random()), random.random()


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ((0,), 2631537505891389924),
        ((0, "order", 0), 2094333682667709378),
        ((0, "order", 1), 2002067703672271585),
        ((1, "order", 0), 299572666420262285),
        ((7, "step", 3, 1), 4858567180236780208),
    ],
)
def test_derive_gives_the_same_seed_on_every_machine_and_in_every_version(arguments, value):
    assert seeds.derive(*arguments) == value


def test_derived_seeds_depend_on_seed_and_on_every_key():
    made = [seeds.derive(s, name, k) for s in range(3) for name in ("order", "step") for k in range(20)]
    assert len(set(made)) == len(made)
    assert all(0 <= seed < 2**63 for seed in made)
    assert seeds.derive(0, "a", "b") != seeds.derive(0, "ab") != seeds.derive(0, "a'b")
    assert seeds.derive(0, 1) != seeds.derive(0, "1")


def test_generator_repeats_its_draws(global_rng_untouched):
    first, second = (torch.randn(5, generator=seeds.generator(3, "draws", 1)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, torch.randn(5, generator=seeds.generator(3, "draws", 2)))


def test_fresh_keeps_a_given_generator_and_seeds_a_new_one_by_the_system(global_rng_untouched):
    given = torch.Generator()
    assert seeds.fresh(given) is given
    one, two = (torch.randint(2**60, (4,), generator=seeds.fresh(None)) for _ in range(2))
    assert not torch.equal(one, two)


def test_isolated_seeds_all_global_generators():
    with seeds.isolated(5):
        first = draw()
    with seeds.isolated(5):
        assert draw() == first
    with seeds.isolated(6):
        assert all(a != b for a, b in zip(draw(), first, strict=True))


@pytest.mark.parametrize("seed", [None, 11, 2**63 - 1])
def test_isolated_gives_the_callers_randomness_back(seed):
    with seeds.isolated(1):
        expected = [draw(), draw()]
    with seeds.isolated(1):
        first = draw()
        with seeds.isolated(seed):
            draw()
        assert [first, draw()] == expected


def test_isolated_gives_the_callers_randomness_back_after_an_error():
    with seeds.isolated(1):
        expected = draw()
    with seeds.isolated(1):
        with pytest.raises(KeyError), seeds.isolated(2):
            draw()
            raise KeyError
        assert draw() == expected


def test_isolated_blocks_can_be_nested(global_rng_untouched):
    with seeds.isolated(1):
        expected = draw()
    with seeds.isolated(2), seeds.isolated(1):
        assert draw() == expected


def test_reseed_inside_isolated_repeats_a_stream():
    with seeds.isolated():
        seeds.reseed(9)
        first = draw()
        seeds.reseed(9)
        assert draw() == first
