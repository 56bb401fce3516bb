"""Objectives add up, keep their terms' names, and equal the closed forms."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from retouch.core.errors import InputError
from retouch.core.loop import fit
from retouch.core.objectives import (
    Objective,
    as_objective,
    cross_entropy,
    cross_entropy_batch,
    next_token,
    next_token_batch,
    objective,
)

BATCH = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1, 2])


@objective
def size(model, batch, run):
    """Mean square of the logits."""
    return model(batch[0]).square().mean()


def several(model, batch, run):
    return {"one": batch[0].sum(), "two": batch[0].mean()}


class Callable:
    """An objective with settings."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, model, batch, run):
        return self.factor * model(batch[0]).square().mean()


@pytest.fixture
def model():
    return nn.Linear(4, 3)


def test_an_objective_has_its_functions_name_and_docstring():
    assert size.name == "size"
    assert size.__doc__ == "Mean square of the logits."
    assert cross_entropy.name == "cross_entropy"
    assert as_objective(size) is size
    assert as_objective(several).name == "several"


def test_a_scalar_takes_the_objectives_name_and_named_scalars_keep_theirs(model):
    assert size(model, BATCH, None).keys() == {"size"}
    assert as_objective(several)(model, BATCH, None).keys() == {"one", "two"}


def test_sums_and_multiples_keep_every_term(model):
    total = cross_entropy + 0.5 * size + as_objective(several) * 3
    terms = total(model, BATCH, None)
    assert list(terms) == ["cross_entropy", "size", "one", "two"]
    torch.testing.assert_close(terms["cross_entropy"], F.cross_entropy(model(BATCH[0]), BATCH[1]))
    torch.testing.assert_close(terms["size"], 0.5 * model(BATCH[0]).square().mean())
    torch.testing.assert_close(terms["one"], 3 * BATCH[0].sum())
    torch.testing.assert_close(terms["two"], 3 * BATCH[0].mean())


def test_a_weight_weighs_every_term_of_a_sum(model):
    both, weighted = (cross_entropy + size)(model, BATCH, None), (2 * (cross_entropy + size))(model, BATCH, None)
    assert weighted.keys() == both.keys()
    assert all(torch.equal(weighted[name], 2 * both[name]) for name in both)
    assert torch.equal((-size)(model, BATCH, None)["size"], -both["size"])


def test_plain_functions_add_from_either_side(model):
    assert (cross_entropy + several)(model, BATCH, None).keys() == {"cross_entropy", "one", "two"}
    assert (several + cross_entropy)(model, BATCH, None).keys() == {"cross_entropy", "one", "two"}


def test_two_terms_of_one_name_are_refused(model):
    with pytest.raises(InputError, match="Two loss terms are named cross_entropy: rename one of them"):
        (cross_entropy + 0.1 * cross_entropy)(model, BATCH, None)


def test_a_term_can_be_renamed(model):
    retain = Objective(cross_entropy, "retain")
    assert (cross_entropy + retain)(model, BATCH, None).keys() == {"cross_entropy", "retain"}


@pytest.mark.parametrize("function", [Callable(2.0), functools.partial(size.function)], ids=["object", "partial"])
def test_a_callable_without_a_name_is_an_objective(model, function):
    history = fit(model, BATCH, function, steps=1)
    assert len(history) == 1


def test_attributes_of_a_function_do_not_change_the_objective(model):
    def named(model, batch, run):
        return batch[0].sum()

    named.name, named.function = "other", None
    assert as_objective(named).name == "named"
    assert as_objective(named)(model, BATCH, None).keys() == {"named"}


def test_objectives_can_be_summed_as_a_list(model):
    total = sum([size, cross_entropy])
    assert total(model, BATCH, None).keys() == {"size", "cross_entropy"}


def test_cross_entropy_takes_classes_and_distributions(model):
    inputs, targets = BATCH
    expected = -model(inputs).log_softmax(-1)[range(6), targets].mean()
    torch.testing.assert_close(cross_entropy_batch(model, (inputs, targets)), expected)
    torch.testing.assert_close(cross_entropy_batch(model, (inputs, F.one_hot(targets, 3).float())), expected)
    torch.testing.assert_close(cross_entropy(model, BATCH)["cross_entropy"], expected)
    uniform = torch.full((6, 3), 1 / 3)
    with torch.no_grad():
        model.weight.zero_(), model.bias.zero_()
    torch.testing.assert_close(cross_entropy_batch(model, (inputs, uniform)), torch.tensor(3.0).log())


def test_cross_entropy_reads_mappings_and_model_outputs(tiny_vit):
    pixels, labels = torch.rand(2, 1, 8, 8), torch.tensor([1, 2])
    expected = F.cross_entropy(tiny_vit(pixels).logits, labels)
    torch.testing.assert_close(cross_entropy_batch(tiny_vit, {"pixel_values": pixels, "labels": labels}), expected)


def test_next_token_predicts_each_token_from_those_before_it(tiny_llama):
    tokens = torch.randint(1, 40, (2, 7), generator=torch.Generator().manual_seed(0))
    labels = tokens.masked_fill(torch.arange(7) < 3, -100)  # a prompt of three tokens is not counted
    batch = {"input_ids": tokens, "labels": labels}
    logprobs = tiny_llama(input_ids=tokens).logits.log_softmax(-1)
    expected = -torch.stack([logprobs[i, t - 1, tokens[i, t]] for i in range(2) for t in range(3, 7)]).mean()
    torch.testing.assert_close(next_token_batch(tiny_llama, batch), expected)
    torch.testing.assert_close(next_token(tiny_llama, batch)["next_token"], expected)
    torch.testing.assert_close(tiny_llama(**batch).loss, expected)


@pytest.mark.parametrize("loss", [cross_entropy_batch, next_token_batch])
def test_a_batch_without_targets_is_refused(model, loss):
    with pytest.raises(InputError, match=r"The batch has no (targets|labels), but"):
        loss(model, (BATCH[0],))
