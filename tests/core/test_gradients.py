"""Gradients per batch and per sample equal those of a plain loop, and leave the model as it was."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from retouch.core import gradients, seeds
from retouch.core.errors import InputError
from retouch.core.gradients import batch_gradients, fisher_diagonal, per_sample_gradients, summed_gradient, trainable
from retouch.core.models import rows_of
from retouch.core.objectives import cross_entropy_batch, next_token_batch
from retouch.worlds.digits import DigitsCNN

DRAW = torch.Generator().manual_seed(0)
IMAGES = torch.rand(5, 1, 8, 8, generator=DRAW), torch.tensor([3, 1, 4, 1, 5])
TOKENS = torch.randint(1, 40, (5, 6), generator=DRAW)


def cnn():
    with seeds.isolated(0):
        return DigitsCNN(width=2, hidden=6)


MODELS = {
    "cnn": lambda request: (cnn(), IMAGES, cross_entropy_batch),
    "vit": lambda request: (request.getfixturevalue("tiny_vit"), IMAGES, cross_entropy_batch),
    "llama": lambda request: (
        request.getfixturevalue("tiny_llama"),
        {"input_ids": TOKENS, "labels": TOKENS.masked_fill(torch.arange(6) < 2, -100)},
        next_token_batch,
    ),
}


@pytest.fixture(params=MODELS)
def case(request):
    """(model, batch of 5, loss function), of a CNN, a ViT and a Llama."""
    return MODELS[request.param](request)


def by_backward(model, batch, loss):
    """One batch's gradients in the plainest way."""
    model.zero_grad()
    loss(model, batch).backward()
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    return found


def singles(batch):
    return [rows_of(batch, k, k + 1) for k in range(5)]


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    largest = max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():  # some gradients are 0 but for rounding, such as those of key biases
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6 * largest, msg=name)


class Sum(nn.Module):
    """Two parameters whose gradients autograd gives as one and the same tensor."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor([[1.0, 2.0]])), nn.Parameter(torch.tensor([[0.5, 0.5]]))

    def forward(self, x):
        return x + self.a + self.b


def squares(model, batch):
    return model(batch).square().sum()


# --- single gradients -----------------------------------------------------------------------------------------------


def test_batch_gradients_are_those_of_backward(case):
    model, batch, loss = case
    assert_close(batch_gradients(model, batch, loss), by_backward(model, batch, loss))


def test_per_sample_gradients_are_those_of_a_loop(case):
    model, batch, loss = case
    alone = [by_backward(model, single, loss) for single in singles(batch)]
    found = per_sample_gradients(model, batch, loss)
    assert_close(found, {name: torch.stack([one[name] for one in alone]) for name in alone[0]})


def test_per_sample_gradients_average_to_the_batchs(case):
    model, batch, loss = case
    found = per_sample_gradients(model, batch, loss)
    assert_close({name: g.mean(0) for name, g in found.items()}, by_backward(model, batch, loss))


def test_a_loss_for_each_sample_will_do_as_well():
    model = cnn()

    def each(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    assert_close(per_sample_gradients(model, IMAGES, each), per_sample_gradients(model, IMAGES, cross_entropy_batch))


def test_a_loss_function_sees_the_models_attributes():
    model = cnn()

    def loss(model, batch):
        assert model.config == {"width": 2, "hidden": 6}
        return cross_entropy_batch(model, batch)

    assert per_sample_gradients(model, IMAGES, loss)["head.bias"].shape == (5, 10)


def test_a_loss_function_may_call_layers_itself():
    model = cnn()

    def loss(model, batch):
        hidden = F.max_pool2d(model.conv2(F.max_pool2d(model.conv1(batch[0]), 2)), 2)
        return F.cross_entropy(model.head(model.fc(hidden.flatten(1))), batch[1])

    found = per_sample_gradients(model, IMAGES, loss)
    assert_close({name: g.mean(0) for name, g in found.items()}, by_backward(model, IMAGES, loss))


def test_only_the_chosen_parameters_are_differentiated():
    model = cnn()
    names = ["conv1.bias", "head.weight"]
    params = {name: p for name, p in model.named_parameters() if name in names}
    everything = by_backward(model, IMAGES, cross_entropy_batch)
    assert_close(
        batch_gradients(model, IMAGES, cross_entropy_batch, params), {name: everything[name] for name in names}
    )
    assert list(per_sample_gradients(model, IMAGES, cross_entropy_batch, params)) == names


def test_parameters_that_the_loss_does_not_reach_get_zeros():
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "unused": nn.Linear(3, 2)})
    batch = torch.randn(4, 3)

    def loss(model, batch):
        return model["used"](batch).square().mean()

    found = batch_gradients(model, batch, loss)
    assert torch.equal(found["unused.weight"], torch.zeros(2, 3))
    assert found["used.weight"].abs().sum() > 0
    fisher = fisher_diagonal(model, [batch], loss)
    assert torch.equal(fisher["unused.bias"], torch.zeros(2))


def test_a_batch_loss_that_is_no_scalar_is_refused():
    with pytest.raises(InputError, match=r"loss_fn returned shape \(5, 10\), but must return a scalar"):
        batch_gradients(cnn(), IMAGES, lambda model, batch: model(batch[0]))


def test_trainable_lists_what_requires_gradients_and_names_what_is_unknown():
    model = cnn()
    model.conv1.requires_grad_(False)
    assert list(trainable(model)) == ["conv2.weight", "conv2.bias", "fc.weight", "fc.bias", "head.weight", "head.bias"]
    assert list(trainable(model, {"head.bias": model.head.bias, "conv1.bias": model.conv1.bias})) == ["head.bias"]
    with pytest.raises(InputError, match=r"params names tail\.weight, but the model has no such parameter"):
        trainable(model, {"tail.weight": model.head.weight})
    with pytest.raises(InputError, match="DigitsCNN has no parameter that requires gradients"):
        trainable(model.requires_grad_(False))


# --- the diagonal of the Fisher information -------------------------------------------------------------------------


@pytest.mark.parametrize("power", [1, 2])
def test_fisher_of_batches_is_the_mean_over_batches(case, power):
    model, batch, loss = case
    parts = [rows_of(batch, 0, 3), rows_of(batch, 3, 5)]
    alone = [by_backward(model, part, loss) for part in parts]
    expected = {n: (alone[0][n].abs() ** power + alone[1][n].abs() ** power) / 2 for n in alone[0]}
    assert_close(fisher_diagonal(model, iter(parts), loss, power=power), expected)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("sizes", [(5,), (3, 2), (1, 4)])
def test_fisher_of_samples_is_the_mean_over_samples_whatever_the_batches(case, power, sizes):
    model, batch, loss = case
    alone = [by_backward(model, single, loss) for single in singles(batch)]
    expected = {name: sum(one[name].abs() ** power for one in alone) / 5 for name in alone[0]}
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    parts = [rows_of(batch, start, start + size) for start, size in zip(starts, sizes, strict=True)]
    assert_close(fisher_diagonal(model, parts, loss, per_sample=True, power=power), expected)


def test_fisher_of_samples_is_that_of_batches_of_one(case):
    model, batch, loss = case
    assert_close(fisher_diagonal(model, [batch], loss, per_sample=True), fisher_diagonal(model, singles(batch), loss))


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 100])
def test_chunks_do_not_matter(case, monkeypatch, chunk):
    model, batch, loss = case
    expected = fisher_diagonal(model, [batch], loss, per_sample=True)
    bytes_of_one = sum(p.numel() * p.element_size() for p in model.parameters())
    monkeypatch.setattr(gradients, "CHUNK_BYTES", 2 * bytes_of_one * chunk)
    sizes, original = [], per_sample_gradients

    def counted(model, batch, *arguments):
        found = original(model, batch, *arguments)
        sizes.append(len(next(iter(found.values()))))
        return found

    monkeypatch.setattr(gradients, "per_sample_gradients", counted)
    assert_close(fisher_diagonal(model, [batch], loss, per_sample=True), expected)
    assert sizes == [min(chunk, 5 - start) for start in range(0, 5, chunk)]


@pytest.mark.parametrize("per_sample", [False, True])
def test_parameters_with_one_gradient_in_common_are_squared_once_each(per_sample):
    fisher = fisher_diagonal(Sum(), [torch.zeros(1, 2)], squares, per_sample=per_sample)
    assert torch.equal(fisher["a"], torch.tensor([[9.0, 25.0]]))  # (2 (a + b))^2
    assert torch.equal(fisher["b"], torch.tensor([[9.0, 25.0]]))


@pytest.mark.parametrize("per_sample", [False, True])
def test_a_loss_that_sums_a_parameter_has_importance_one(per_sample):
    fisher = fisher_diagonal(Sum(), [torch.zeros(1, 2)], lambda model, batch: model.a.sum(), per_sample=per_sample)
    assert torch.equal(fisher["a"], torch.ones(1, 2))
    assert torch.equal(fisher["b"], torch.zeros(1, 2))


def test_frozen_and_left_out_parameters(case):
    model, batch, loss = case
    everything = fisher_diagonal(model, [batch], loss)
    first, *_, last = dict(model.named_parameters())
    frozen = dict(model.named_parameters())[first].requires_grad_(False)
    found = fisher_diagonal(model, [batch], loss)
    assert torch.equal(found[first], torch.zeros_like(frozen))
    assert_close({last: found[last]}, {last: everything[last]})
    chosen = {first: frozen, last: dict(model.named_parameters())[last]}
    assert list(fisher_diagonal(model, [batch], loss, params=chosen)) == [first, last]


def test_importances_are_in_float32_at_least():
    model = nn.Linear(3, 2).bfloat16()
    batch = torch.randn(4, 3).bfloat16()
    for per_sample in (False, True):
        found = fisher_diagonal(model, [batch], lambda m, b: m(b).square().mean(), per_sample=per_sample)
        assert {value.dtype for value in found.values()} == {torch.float32}
        assert not any(value.requires_grad for value in found.values())
    assert fisher_diagonal(nn.Linear(3, 2).double(), [batch.double()], squares)["bias"].dtype == torch.float64


def test_importances_are_measured_in_eval_mode():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.9), nn.Linear(6, 3)).train()
    model[3].eval()
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    batch = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    found = [fisher_diagonal(model, [batch], cross_entropy_batch, per_sample=p) for p in (False, False, True, True)]
    assert_close(found[0], found[1])
    assert_close(found[2], found[3])
    assert [m.training for m in model] == [True, True, True, False]
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())


def test_bad_input_is_refused():
    model = cnn()
    with pytest.raises(InputError, match="power is 3, but must be one of 1, 2"):
        fisher_diagonal(model, [IMAGES], cross_entropy_batch, power=3)
    with pytest.raises(InputError, match="batches is empty, but importances need at least one batch"):
        fisher_diagonal(model, [], cross_entropy_batch)
    with pytest.raises(InputError, match="batches is empty, but a gradient needs at least one batch"):
        summed_gradient(model, [], cross_entropy_batch)
    bad = IMAGES[0].clone()
    bad[2] = torch.nan
    for per_sample in (False, True):
        with pytest.raises(InputError, match=r"The gradient of conv1\.weight is not finite"):
            fisher_diagonal(model, [(bad, IMAGES[1])], cross_entropy_batch, per_sample=per_sample)


# --- sums over batches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [None, 1e-3, 1e3])
def test_summed_gradient_adds_the_batches_gradients_each_clipped(case, clip):
    model, batch, loss = case
    expected = {}
    for part in (rows_of(batch, 0, 3), rows_of(batch, 3, 5)):
        model.zero_grad()
        loss(model, part).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        for name, parameter in model.named_parameters():
            expected[name] = expected.get(name, 0) + parameter.grad
        model.zero_grad()
    assert_close(summed_gradient(model, [rows_of(batch, 0, 3), rows_of(batch, 3, 5)], loss, clip=clip), expected)


@pytest.mark.parametrize("clip", [None, 1e3])
def test_parameters_with_one_gradient_in_common_are_added_once_each(clip):
    total = summed_gradient(Sum(), [torch.zeros(1, 2)] * 3, squares, clip=clip)
    assert torch.equal(total["a"], torch.tensor([[9.0, 15.0]]))  # 3 * 2 (a + b)
    assert torch.equal(total["b"], torch.tensor([[9.0, 15.0]]))


def test_a_sum_over_batches_of_a_loss_that_sums_a_parameter():
    total = summed_gradient(Sum(), [torch.zeros(1, 2)] * 2, lambda model, batch: model.a.sum())
    assert torch.equal(total["a"], torch.full((1, 2), 2.0))


def test_a_sum_over_batches_is_taken_in_eval_mode():
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.9)).train()
    batch = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    first, second = (summed_gradient(model, [batch], cross_entropy_batch) for _ in range(2))
    assert_close(first, second)
    assert model[1].training


# --- what is left behind --------------------------------------------------------------------------------------------


def test_grad_fields_flags_and_modes_are_untouched(case, global_rng_untouched):
    model, batch, loss = case
    model.train()
    next(model.children()).eval()
    flags = [module.training for module in model.modules()]
    mine = {name: torch.full_like(p, 7.0) for name, p in model.named_parameters()}
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.grad = mine[name].clone()
    batch_gradients(model, batch, loss)
    per_sample_gradients(model, batch, loss)
    fisher_diagonal(model, [batch], loss)
    fisher_diagonal(model, [batch], loss, per_sample=True)
    summed_gradient(model, [batch], loss, clip=0.1)
    assert all(torch.equal(p.grad, mine[name]) for name, p in model.named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert [module.training for module in model.modules()] == flags


def test_modes_come_back_after_an_error():
    model = cnn().train()
    with pytest.raises(ValueError, match="the user's own"):
        fisher_diagonal(model, [IMAGES], lambda model, batch: (_ for _ in ()).throw(ValueError("the user's own")))
    assert model.training
