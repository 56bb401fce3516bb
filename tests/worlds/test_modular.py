"""The world `modular`: every pair once, its exact result, and splits that share nothing."""

import pytest
import torch

from retouch.core.errors import InputError
from retouch.worlds import modular, names, world


def as_set(data):
    return set(map(tuple, modular.pairs_of(data).tolist()))


@pytest.mark.parametrize("form", ["one-hot", "tokens"])
@pytest.mark.parametrize(("modulus", "share"), [(31, 0.5), (53, 0.4), (7, 0.3)])
def test_the_parts_share_no_pair_and_have_all(modulus, share, form):
    parts = [modular.data(split, modulus=modulus, share=share, form=form) for split in modular.SPLITS]
    pairs = [as_set(part) for part in parts]
    assert set.union(*pairs) == {(a, b) for a in range(modulus) for b in range(modulus)}
    assert sum(map(len, parts)) == modulus**2
    assert len(parts[0]) == round(share * modulus**2)
    for part in parts:
        a, b = modular.pairs_of(part).T
        assert torch.equal(part.targets, (a + b) % modulus)


def test_operations_are_exact():
    pairs = torch.tensor([[5, 4], [2, 6], [0, 3]])
    assert modular.result(pairs, modulus=7).tolist() == [2, 1, 3]
    assert modular.result(pairs, modulus=7, operation="subtraction").tolist() == [1, 3, 4]
    assert modular.result(pairs, modulus=7, operation="product").tolist() == [6, 5, 0]


def test_forms_of_a_pair():
    pairs = torch.tensor([[5, 4], [2, 6]])
    vectors = modular.encoded(pairs, modulus=7)
    assert vectors.shape == (2, 14)
    assert vectors.nonzero()[:, 1].tolist() == [5, 11, 2, 13]
    assert modular.encoded(pairs, modulus=7, form="tokens")["input_ids"].tolist() == [[5, 4, 7], [2, 6, 7]]


def test_the_seed_decides_on_training_and_test_but_not_on_validation(global_rng_untouched):
    one, again, other = (modular.data("train", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.inputs, again.inputs)
    assert as_set(one) != as_set(other)
    assert as_set(modular.data("validation", seed=1)) == as_set(modular.data("validation", seed=2))


def test_the_mlp_is_homogeneous_of_degree_three():
    model = modular.ModularMLP(7, 16).double()
    inputs = modular.data("train", modulus=7).inputs.double()
    before = model(inputs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    torch.testing.assert_close(model(inputs), 8 * before)


def test_is_a_world_without_models():
    assert "modular" in names()
    assert world("modular").VARIANTS == ()
    assert world("modular").KIND == "numbers"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "all"}, "split is 'all', but must be one of"),
        ({"form": "text"}, "form is 'text', but must be one of"),
        ({"operation": "power"}, "operation is 'power', but must be one of"),
        ({"modulus": 3}, "modulus is 3, but must be at least 5"),
        ({"share": 0.95}, r"share is 0\.95, but must be greater than 0 and less than 0\.9"),
        ({"share": 0.001, "modulus": 5}, r"share is 0\.001, but must leave some"),
    ],
)
def test_bad_input_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        modular.data(**options)
