"""Masks take exactly the share asked for, and what is masked out stays bit for bit."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, RMSprop

from retouch.core import seeds
from retouch.core.errors import InputError
from retouch.core.loop import Callback, fit
from retouch.core.masks import MaskedOptimizer, MaskedSteps, TrainOnly, check_mask, share, top_share

DRAW = torch.Generator().manual_seed(0)
X, Y = torch.randn(20, 4, generator=DRAW), torch.randint(3, (20,), generator=DRAW)

OPTIMIZERS = {
    "sgd": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.05),
    "nesterov": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.05, nesterov=True),
    "adam": lambda p: Adam(p, lr=0.01, weight_decay=0.1),
    "adamw": lambda p: AdamW(p, lr=0.01, weight_decay=0.5),
    "amsgrad": lambda p: AdamW(p, lr=0.01, weight_decay=0.5, amsgrad=True),
    "rmsprop": lambda p: RMSprop(p, lr=0.01, momentum=0.9, weight_decay=0.1),
    "adagrad": lambda p: Adagrad(p, lr=0.1, weight_decay=0.1),
}


def net():
    with seeds.isolated(0):
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def half(model, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.rand(p.shape, generator=draw) > 0.5 for name, p in model.named_parameters()}


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def train(model, optimizer, steps=25):
    for step in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X[step % 4 :: 4]), Y[step % 4 :: 4]).backward()
        optimizer.step()


# --- the largest scores ---------------------------------------------------------------------------------------------


def scores():
    draw = torch.Generator().manual_seed(3)
    return {
        "a": torch.randn(7, 3, generator=draw),
        "b": torch.randn(11, generator=draw),
        "c": torch.randn((), generator=draw),
    }


@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.1, 0.3, 0.5, 2 / 3, 0.99, 1.0])
def test_top_share_takes_exactly_the_largest(ratio):
    mask = top_share(scores(), ratio)
    assert {name: (part.dtype, part.shape) for name, part in mask.items()} == {
        name: (torch.bool, score.shape) for name, score in scores().items()
    }
    taken = torch.cat([score[mask[name]].flatten() for name, score in scores().items()])
    everything = torch.cat([score.flatten() for score in scores().values()]).sort(descending=True).values
    assert len(taken) == int(ratio * 33)
    assert torch.equal(taken.sort(descending=True).values, everything[: len(taken)])
    assert share(mask) == len(taken) / 33


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 1.0])
def test_top_share_of_each_tensor_for_itself(ratio):
    mask = top_share(scores(), ratio, scope="tensor")
    assert [int(part.sum()) for part in mask.values()] == [int(ratio * 21), int(ratio * 11), int(ratio)]
    for name, score in scores().items():
        assert torch.equal(mask[name], top_share({name: score}, ratio)[name])


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("kind", ["random", "ties", "equal"])
def test_masks_are_nested_in_the_ratio(scope, kind):
    draw = torch.Generator().manual_seed(0)
    if kind == "random":
        values = torch.randn(60, generator=draw)
    else:
        values = torch.randint(3 if kind == "ties" else 1, (60,), generator=draw).float()
    given = {"a": values[:40].view(8, 5), "b": values[40:]}
    masks = [top_share(given, ratio / 20, scope=scope) for ratio in range(21)]
    for smaller, larger in itertools.pairwise(masks):
        assert all((larger[name] | ~smaller[name]).all() for name in given)


def test_ties_are_taken_by_position():
    mask = top_share({"a": torch.tensor([1.0, 2.0, 1.0, 1.0]), "b": torch.tensor([[1.0, 3.0]])}, 4 / 6)
    assert mask["a"].tolist() == [True, True, True, False]
    assert mask["b"].tolist() == [[False, True]]
    assert top_share({"a": torch.zeros(10)}, 0.3)["a"].tolist() == [True] * 3 + [False] * 7


def test_infinite_scores_come_first_and_last():
    mask = top_share({"a": torch.tensor([0.0, torch.inf, -torch.inf, 5.0])}, 0.75)
    assert mask["a"].tolist() == [True, True, False, True]


@pytest.mark.parametrize("ratio", [-0.1, 1.01, float("nan")])
def test_a_ratio_out_of_range_is_refused(ratio):
    with pytest.raises(InputError, match=f"ratio is {ratio}, but must be at least 0 and at most 1"):
        top_share(scores(), ratio)


def test_an_unknown_scope_is_refused():
    with pytest.raises(InputError, match="scope is 'layer', but must be one of 'global', 'tensor'"):
        top_share(scores(), 0.5, scope="layer")


def test_share_counts_entries():
    assert share({"a": torch.tensor([True, False, False]), "b": torch.tensor([[True]])}) == 0.5
    assert share({}) == 0


# --- masked steps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_masked_out_entries_stay_bit_for_bit_over_many_steps(kind):
    model = net()
    mask, before = half(model), weights(model)
    optimizer = OPTIMIZERS[kind](model.parameters())
    train(model, MaskedOptimizer(optimizer, model, mask))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter[~mask[name]], before[name][~mask[name]])
        assert (parameter[mask[name]] != before[name][mask[name]]).all()
        for key, value in optimizer.state[parameter].items():
            if value.shape == parameter.shape:
                assert not value[~mask[name]].any(), key


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_masked_in_entries_are_trained_as_if_the_others_were_constants(kind):
    model, mask = net(), half(net())

    class Constant(nn.Module):
        """Gives what is masked out as a constant."""

        def __init__(self, start, keep):
            super().__init__()
            self.start, self.keep = start.detach().clone(), keep

        def forward(self, free):
            return torch.where(self.keep, free, self.start)

    reference = net()
    for name, parameter in list(reference.named_parameters()):
        module, _, kind_of_weight = name.rpartition(".")
        layer = reference.get_submodule(module)
        nn.utils.parametrize.register_parametrization(layer, kind_of_weight, Constant(parameter, mask[name]))
    train(model, MaskedOptimizer(OPTIMIZERS[kind](model.parameters()), model, mask))
    train(reference, OPTIMIZERS[kind](reference.parameters()))
    for name, parameter in model.named_parameters():
        module, _, kind_of_weight = name.rpartition(".")
        torch.testing.assert_close(parameter, getattr(reference.get_submodule(module), kind_of_weight))


def test_entries_masked_out_after_some_training_stop_at_once():
    model = net()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    train(model, optimizer, 5)
    mask, before = half(model), weights(model)
    train(model, MaskedOptimizer(optimizer, model, mask), 5)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter[~mask[name]], before[name][~mask[name]])


def test_a_full_mask_changes_nothing_and_an_empty_one_keeps_everything():
    plain, full, empty = net(), net(), net()
    train(plain, OPTIMIZERS["adamw"](plain.parameters()))
    train(full, MaskedOptimizer(OPTIMIZERS["adamw"](full.parameters()), full, top_share(weights(full), 1.0)))
    train(empty, MaskedOptimizer(OPTIMIZERS["adamw"](empty.parameters()), empty, top_share(weights(empty), 0.0)))
    assert all(torch.equal(value, weights(full)[name]) for name, value in weights(plain).items())
    assert all(torch.equal(value, weights(empty)[name]) for name, value in weights(net()).items())


def test_after_remove_every_entry_is_trained():
    model = net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    masking = MaskedSteps(optimizer, model, top_share(weights(model), 0.0))
    train(model, optimizer, 3)
    before = weights(model)
    masking.remove()
    train(model, optimizer, 3)
    assert all((value != weights(model)[name]).any() for name, value in before.items())
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_masks_of_numbers_do_as_well():
    model = net()
    mask, before = half(model), weights(model)
    numbers = {name: part.float() for name, part in mask.items()}
    train(model, MaskedOptimizer(OPTIMIZERS["sgd"](model.parameters()), model, numbers), 3)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter != before[name], mask[name])


def test_a_masked_optimizer_is_used_like_its_optimizer():
    model = net()
    masked = MaskedOptimizer(SGD(model.parameters(), lr=0.5), model, half(model))

    def closure():
        masked.zero_grad()
        loss = model(X).square().mean()
        loss.backward()
        return loss

    assert masked.step(closure).item() == pytest.approx(net()(X).square().mean().item())
    assert masked.param_groups[0]["lr"] == 0.5
    masked.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_frozen_parameters_need_no_mask():
    model = net()
    model[0].requires_grad_(False)
    mask = {name: part for name, part in half(model).items() if name.startswith("2.")}
    before = weights(model)
    train(model, MaskedOptimizer(OPTIMIZERS["sgd"](model[2].parameters()), model, mask))
    assert torch.equal(model[0].weight, before["0.weight"])


def test_a_mask_that_does_not_fit_is_refused():
    model = net()
    mask = half(model)
    parameters = dict(model.named_parameters())
    check_mask(mask, parameters)
    with pytest.raises(InputError, match=r"The mask lacks 0\.weight, 0\.bias, but must have every trained parameter"):
        check_mask({name: mask[name] for name in ("2.weight", "2.bias")}, parameters)
    wrong = {**mask, "2.weight": mask["2.weight"].T}
    with pytest.raises(InputError, match=r"The mask of 2\.weight has shape \(8, 3\), but must have \(3, 8\)"):
        MaskedOptimizer(SGD(model.parameters(), lr=0.1), model, wrong)


# --- in fit ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_train_only_in_fit_leaves_the_rest_bit_for_bit(kind):
    model = net()
    mask, before = half(model), weights(model)
    optimizers = []

    def make(parameters):
        optimizers.append(OPTIMIZERS[kind](parameters))
        return optimizers[0]

    fit(model, (X, Y), epochs=4, batch_size=8, optimizer=make, clip=1.0, callbacks=[TrainOnly(mask)])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter != before[name], mask[name])
    assert not optimizers[0]._optimizer_step_pre_hooks
    assert not optimizers[0]._optimizer_step_post_hooks


def test_train_only_takes_its_hooks_off_after_an_error_and_can_be_used_again():
    class Fail(Callback):
        def on_step(self, run):
            raise KeyError

    model, mask = net(), half(net())
    optimizer, only = OPTIMIZERS["sgd"](model.parameters()), TrainOnly(mask)
    with pytest.raises(KeyError):
        fit(model, (X, Y), steps=2, optimizer=optimizer, callbacks=[only, Fail()])
    assert not optimizer._optimizer_step_post_hooks
    other = copy.deepcopy(model)
    before = weights(other)
    fit(other, (X, Y), steps=2, callbacks=[only])
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter != before[name], mask[name])


def test_train_only_refuses_a_mask_that_does_not_fit_before_anything_is_trained():
    model = net()
    before = weights(model)
    with pytest.raises(InputError, match="The mask lacks"):
        fit(model, (X, Y), steps=2, callbacks=[TrainOnly({})])
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
