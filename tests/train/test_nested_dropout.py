"""Nested dropout and Co-teaching: truncation without rescaling, the choice of k, and what each network learns from."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from retouch.core.batches import in_order
from retouch.core.data import TensorData
from retouch.core.errors import InputError
from retouch.core.loop import Checkpoint, fit
from retouch.core.models import predict
from retouch.core.seeds import isolated
from retouch.train.nested_dropout import (
    Alternate,
    ChooseKeep,
    CoTeaching,
    NestedDropout,
    Pair,
    accuracy_per_keep,
    choose_keep,
    co_teach,
    co_teaching,
    convert,
    exchanged_losses,
    forget_rate_schedule,
    merge,
    nested_dropout,
    nested_dropout_distribution,
    nested_layers,
    recipe,
    select_keep,
    small_loss_indices,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))


FEATURES, WEIGHT, LABELS = random(40, 8), random(8, 3, seed=1), torch.arange(40) % 3
DATA = TensorData(random(90, 6, seed=9), torch.arange(90) % 3)
CLEAN = TensorData(random(60, 6, seed=10), torch.arange(60) % 3)


def network(seed=0, *, bias=False, norm=True):
    """Inputs of 6, 8 features, 3 classes."""
    with isolated(seed):
        middle = [nn.BatchNorm1d(8)] if norm else []
        return nn.Sequential(nn.Linear(6, 8), *middle, nn.ReLU(), nn.Linear(8, 3, bias=bias))


def test_golden(golden):
    case = golden("nested_dropout")
    case.close("out_dist_100_512", nested_dropout_distribution(512, std=100.0))
    case.close("out_dist_10_64", nested_dropout_distribution(64, std=10.0))
    case.close("out_dist_3_8", nested_dropout_distribution(8, std=3.0))
    labels, x = [torch.tensor(case.in_labels1), torch.tensor(case.in_labels2)], [case.in_x1, case.in_x2]
    rate = float(case.param_forget_rate)
    kept = [
        small_loss_indices(torch.tensor(logits), y, forget_rate=rate)
        for logits, y in zip((case.in_logits1, case.in_logits2), labels, strict=True)
    ]
    assert np.array_equal(kept[0], case.out_index1)
    assert np.array_equal(kept[1], case.out_index2)
    weights = [(case.param_feature1, case.param_class1), (case.param_feature2, case.param_class2)]
    for number, (feature, head) in enumerate(weights):
        index, other = kept[1 - number], 1 - number  # each learns from what the other has kept
        h = torch.relu(torch.tensor(x[other])[index] @ torch.tensor(feature))
        logits = nested_dropout(h, keep=int(case.param_keep)) @ torch.tensor(head)
        case.close(f"out_loss{number + 1}", F.cross_entropy(logits, labels[other][index]))


# --- the distribution -----------------------------------------------------------------------------------------------


def test_neighbouring_probabilities_have_the_ratio_of_a_gaussian_without_one_half():
    p = nested_dropout_distribution(20, std=4.0)
    k = torch.arange(1, 20, dtype=torch.float64)
    torch.testing.assert_close(p[:-1] / p[1:], torch.exp(((k + 1) ** 2 - k**2) / 16))
    assert float(p.sum()) == pytest.approx(1, abs=1e-12)
    assert p.dtype == torch.float64
    assert nested_dropout_distribution(20, std=4.0, dtype=torch.float32).dtype == torch.float32


def test_limits_of_the_width():
    torch.testing.assert_close(nested_dropout_distribution(9, std=1e9), torch.full((9,), 1 / 9, dtype=torch.float64))
    torch.testing.assert_close(nested_dropout_distribution(9, std=float("inf")).sum(), torch.tensor(1.0).double())
    for std in (1e-3, 1e-200):
        assert nested_dropout_distribution(9, std=std).tolist() == [1.0] + [0.0] * 8
    assert int(nested_dropout_distribution(9, std=1.0, mean=4.0).argmax()) == 3


def test_about_fifty_six_of_512_channels_are_kept_at_100():
    p = nested_dropout_distribution(512, std=100.0)
    assert float((p * torch.arange(1, 513)).sum()) == pytest.approx(56, abs=1)


# --- truncation -----------------------------------------------------------------------------------------------------


def test_all_channels_is_the_identity_and_kept_ones_are_bit_equal():
    assert nested_dropout(FEATURES, keep=8) is FEATURES
    for keep in range(1, 8):
        out = nested_dropout(FEATURES, keep=keep)
        assert torch.equal(out[:, :keep], FEATURES[:, :keep])  # no rescaling
        assert not out[:, keep:].any()
    assert torch.equal(nested_dropout(FEATURES, keep=torch.tensor(3)), nested_dropout(FEATURES, keep=3))


def test_channels_beyond_have_no_effect_and_exactly_zero_gradients():
    features, weight = FEATURES.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
    loss = F.cross_entropy(nested_dropout(features, keep=3) @ weight, LABELS)
    loss.backward()
    assert not features.grad[:, 3:].any()
    assert not weight.grad[3:].any()
    assert weight.grad[:3].all()
    changed = FEATURES.clone()
    changed[:, 3:] = float("nan")  # not even such values get through
    assert F.cross_entropy(nested_dropout(changed, keep=3) @ WEIGHT, LABELS) == loss
    sliced = WEIGHT[:3].clone().requires_grad_()
    F.cross_entropy(FEATURES[:, :3] @ sliced, LABELS).backward()
    torch.testing.assert_close(weight.grad[:3], sliced.grad)


def test_maps_and_numbers_for_each_sample():
    maps, keep = random(4, 8, 2, 3), torch.tensor([1, 8, 3, 5])
    out = nested_dropout(maps, keep=keep)
    for row in range(4):
        assert torch.equal(out[row], nested_dropout(maps, keep=int(keep[row]))[row])
    last = nested_dropout(maps.movedim(1, -1), keep=keep, dim=-1)
    assert torch.equal(last.movedim(-1, 1), out)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_kept(dtype):
    assert nested_dropout(FEATURES.to(dtype), keep=2).dtype == dtype


def test_the_layer_draws_one_number_a_batch_and_follows_its_generator(global_rng_untouched):
    layer = NestedDropout(8, std=4.0, generator=seeded())
    counts = []
    for _ in range(2000):
        kept = (layer(torch.ones(5, 8)) != 0).sum(1)
        assert len(kept.unique()) == 1
        counts.append(int(kept[0]))
    share = torch.tensor(counts).bincount(minlength=9)[1:] / 2000
    assert (share - layer.probabilities).abs().max() < 0.03
    again = NestedDropout(8, std=4.0, generator=seeded())
    assert [int((again(torch.ones(1, 8)) != 0).sum()) for _ in range(20)] == counts[:20]


def test_per_sample_draws_differ_inside_the_batch():
    layer = NestedDropout(8, std=10.0, per_sample=True, generator=seeded())
    assert len((layer(torch.ones(50, 8)) != 0).sum(1).unique()) > 1


def test_in_eval_mode_all_channels_until_told_otherwise():
    layer = NestedDropout(8, std=2.0).eval()
    assert layer.eval_keep == 8
    assert layer(FEATURES) is FEATURES
    layer.eval_keep = 2
    assert torch.equal(layer(FEATURES), nested_dropout(FEATURES, keep=2))
    assert "eval_keep=2" in repr(layer)
    assert not layer.state_dict()


# --- the choice of k ------------------------------------------------------------------------------------------------


def test_all_accuracies_at_once_are_those_of_masked_evaluations(monkeypatch):
    expected = [
        float(((nested_dropout(FEATURES, keep=k) @ WEIGHT).argmax(1) == LABELS).double().mean()) for k in range(1, 9)
    ]
    assert accuracy_per_keep(FEATURES, WEIGHT, LABELS).tolist() == expected
    wide, heavy = random(300, 2048), random(2048, 30, seed=3)  # more than one chunk
    labels = torch.arange(300) % 30
    whole = accuracy_per_keep(wide, heavy, labels)
    for keep in (1, 700, 2048):
        alone = ((nested_dropout(wide, keep=keep) @ heavy).argmax(1) == labels).double().mean()
        assert float(whole[keep - 1]) == pytest.approx(float(alone), abs=0.004)  # sums in another order


def test_half_precision_features_are_summed_in_single():
    h, w = FEATURES.half(), WEIGHT.half()
    assert torch.equal(accuracy_per_keep(h, w, LABELS), accuracy_per_keep(h.float(), w.float(), LABELS))


def test_of_equal_accuracies_the_fewest_channels_are_taken():
    assert select_keep(torch.full((12,), 0.8)) == 1
    assert select_keep(torch.full((12,), 0.8), penalty=0.0) == 1
    assert select_keep(torch.arange(12.0) * 2e-5) == 12
    assert select_keep(torch.arange(12.0).double() * 0.5e-5) == 1
    assert select_keep(torch.tensor([0.1, 0.9, 0.2, 0.9])) == 2
    assert select_keep(torch.tensor([0.1, 0.9, 0.2, 0.9]), penalty=0.5) == 2


def test_the_k_chosen_is_that_of_the_model_and_a_pair_is_judged_by_its_mean():
    one, two = convert(network(0)), convert(network(1))
    data = TensorData(random(200, 6, seed=5), torch.arange(200) % 3)
    for models in ([one], [one, two]):
        keep = choose_keep(models, data)
        accuracy = []
        for k in range(1, 9):
            for model in models:
                nested_layers(model)[0].eval_keep = k
            logits = sum(predict(model, in_order(data)) for model in models)
            accuracy.append(float((logits.argmax(1) == data.targets).double().mean()))
        assert keep == select_keep(torch.tensor(accuracy).double())
    assert choose_keep(one, data) == nested_layers(one)[0].eval_keep
    assert choose_keep(one, data, penalty=1.0) == 1


def test_a_model_without_a_place_for_k_is_refused():
    data = TensorData(random(9, 6), torch.arange(9) % 3)
    with pytest.raises(InputError, match="Sequential has no NestedDropout, but must have it before its head"):
        choose_keep(network(), data)
    with_bias = nn.Sequential(nn.Linear(6, 8), NestedDropout(8), nn.Linear(8, 3))
    with pytest.raises(InputError, match="but must be a linear layer without bias on the 8 channels"):
        choose_keep(with_bias, data)


# --- into a model and out again -------------------------------------------------------------------------------------


def test_converted_the_model_is_the_one_given_until_a_k_is_chosen(tiny_vit):
    images = random(4, 1, 8, 8)
    converted = convert(tiny_vit, std=5.0, drop_bias=True)  # a new ViT's bias is zero already
    assert torch.equal(converted(images).logits, tiny_vit(images).logits)
    assert list(converted.state_dict()) == list(tiny_vit.state_dict())
    assert not nested_layers(tiny_vit)
    nested_layers(converted)[0].eval_keep = 5
    assert not torch.equal(converted(images).logits, tiny_vit(images).logits)
    copied = copy.deepcopy(converted)
    nested_layers(copied)[0].eval_keep = 16
    assert torch.equal(copied(images).logits, tiny_vit(images).logits)  # a copy truncates for itself


def test_merged_it_is_an_ordinary_model_with_the_same_answers(tiny_vit):
    images = random(4, 1, 8, 8)
    converted = convert(tiny_vit, drop_bias=True)
    nested_layers(converted)[0].eval_keep = 5
    before = converted(images).logits
    merged = merge(converted)
    assert torch.equal(merged(images).logits, before)
    assert not nested_layers(merged)
    assert not merged.classifier._forward_pre_hooks
    tiny_vit.load_state_dict(merged.state_dict())
    assert torch.equal(tiny_vit(images).logits, before)
    assert merge(network()).state_dict().keys() == network().state_dict().keys()


def test_a_head_with_a_bias_is_refused_or_loses_it():
    model = network(bias=True)
    with pytest.raises(InputError, match="The head '3' has a bias, but must have none.*drop_bias=True"):
        convert(model)
    converted = convert(model, drop_bias=True)
    assert not converted[3].bias.any()
    assert not converted[3].bias.requires_grad
    assert model[3].bias.any()
    fit(converted, TensorData(random(20, 6), torch.arange(20) % 3), steps=3)
    assert not converted[3].bias.any()
    assert convert(converted, head="0") is not converted  # a second layer, whose bias is not the head's


def test_training_leaves_the_last_channels_alone_and_the_generators_as_they_were(global_rng_untouched):
    model = convert(network(), std=1e-3)  # always one channel
    before = model[3].weight.detach().clone()
    fit(model, TensorData(random(64, 6), torch.arange(64) % 3), steps=5, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    assert torch.equal(model[3].weight[:, 1:], before[:, 1:])
    assert not torch.equal(model[3].weight[:, 0], before[:, 0])


def test_recipe_on_a_real_vit_chooses_on_validation(tiny_vit, digits_small):
    plan = recipe(tiny_vit, digits_small.train, digits_small.test, std=5.0)
    model, history = plan.fit(steps=3, batch_size=32)
    assert model is tiny_vit
    assert len(history) == 3
    used = model.classifier.weight.abs().sum(0) > 0
    keep = int(used.sum())
    assert used[:keep].all()
    assert not nested_layers(model)
    without, _ = recipe(copy.deepcopy(tiny_vit), digits_small.train, std=5.0).fit(steps=1)
    assert not nested_layers(without)


def test_of_several_layers_one_is_truncated_at_a_time():
    model = convert(convert(network(norm=False), std=1e-3), std=1e-3, head="0")
    assert [layer.num_features for layer in nested_layers(model)] == [6, 8]
    seen = []
    for layer in nested_layers(model):
        layer.register_forward_hook(lambda module, args, output: seen.append(torch.equal(args[0], output)))
    fit(model, DATA, steps=12, callbacks=[Alternate()])
    assert set(zip(seen[::2], seen[1::2], strict=True)) == {(False, True), (True, False)}
    assert all(layer.train_keep is None for layer in nested_layers(model))


# --- Co-teaching ----------------------------------------------------------------------------------------------------


def test_small_losses_are_sorted_counted_and_lost_with_a_wrong_label():
    logits, labels = FEATURES @ WEIGHT, (FEATURES @ WEIGHT).argmax(1)
    order = small_loss_indices(logits, labels, forget_rate=0.0)
    losses = F.cross_entropy(logits, labels, reduction="none")
    assert sorted(order.tolist()) == list(range(40))
    assert torch.equal(losses[order], losses.sort().values)
    wrong = order[:5]
    noisy = labels.clone()
    noisy[wrong] = (labels[wrong] + 1) % 3
    assert not torch.isin(small_loss_indices(logits, noisy, forget_rate=0.2), wrong).any()


@pytest.mark.parametrize(
    ("rate", "count", "kept"), [(0.3, 10, 7), (0.2, 5, 4), (0.9, 10, 0), (0.5, 7, 3), (0.1, 10, 9)]
)
def test_counts_are_cut_in_the_authors_order(rate, count, kept):
    logits = random(count, 3)
    assert len(small_loss_indices(logits, torch.zeros(count).long(), forget_rate=rate)) == int((1 - rate) * count)
    assert int((1 - rate) * count) == kept


def test_the_forget_rate_rises_linearly():
    rates = [forget_rate_schedule(epoch, forget_rate=0.4, num_gradual=5) for epoch in range(8)]
    np.testing.assert_allclose(rates, [0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.4])
    assert forget_rate_schedule(0, forget_rate=0.4, num_gradual=0) == 0.4
    assert [forget_rate_schedule(epoch, forget_rate=0.4, num_gradual=1) for epoch in range(3)] == [0.0, 0.4, 0.4]


def two(*, nested=True, norm=True):
    models = [network(seed, norm=norm) for seed in range(2)]
    return [convert(model, std=4.0) for model in models] if nested else models


BATCH, GIVEN = random(20, 6, seed=8), torch.arange(20) % 3


def test_each_network_learns_only_from_the_other_half():
    one, other = two()
    for layer in nested_layers(one) + nested_layers(other):
        layer.train_keep = 4

    def gradients(images, number):
        one.zero_grad(), other.zero_grad()
        exchanged_losses(one, other, images, GIVEN, forget_rate=0.2)[f"loss{number}"].backward()
        model = (one, other)[number - 1]
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    first_changed, second_changed = BATCH.clone(), BATCH.clone()
    first_changed[:10] += 1
    second_changed[10:] += 1
    assert torch.equal(gradients(BATCH, 1), gradients(first_changed, 1))
    assert not torch.equal(gradients(BATCH, 1), gradients(second_changed, 1))
    assert torch.equal(gradients(BATCH, 2), gradients(second_changed, 2))
    assert not torch.equal(gradients(BATCH, 2), gradients(first_changed, 2))


def test_ranking_is_in_eval_mode_with_k():
    one, other = two()
    for model, keep in ((one, 3), (other, 5)):
        nested_layers(model)[0].eval_keep = keep
        with torch.no_grad():
            model[1].running_mean.fill_(0.3)
    found = exchanged_losses(one, other, BATCH, GIVEN, forget_rate=0.3)
    for model, name, rows in ((one.eval(), "index1", slice(10)), (other.eval(), "index2", slice(10, 20))):
        assert torch.equal(found[name], small_loss_indices(model(BATCH[rows]), GIVEN[rows], forget_rate=0.3))


def test_both_networks_are_trained_with_one_random_k():
    models, drawn = two(), []
    for model in models:
        nested_layers(model)[0].register_forward_pre_hook(
            lambda module, args: drawn.append(module.train_keep) if module.training else None
        )
    with isolated(0):
        for _ in range(20):
            exchanged_losses(*models, BATCH, GIVEN, forget_rate=0.3)
    assert drawn[::2] == drawn[1::2]
    assert len(set(drawn)) > 2
    assert all(layer.train_keep is None for model in models for layer in nested_layers(model))


def test_unsplit_batches_are_the_classic_exchange():
    one, other = two(nested=False, norm=False)
    found = exchanged_losses(one, other, BATCH, GIVEN, forget_rate=0.3, split_batch=False)
    index = small_loss_indices(other(BATCH), GIVEN, forget_rate=0.3)
    assert torch.equal(found["index2"], index)
    assert len(index) == 14
    torch.testing.assert_close(found["loss1"], F.cross_entropy(one(BATCH[index]), GIVEN[index]))


def test_nothing_forgotten_and_one_half_is_plain_training_on_the_other():
    one, other = two(nested=False, norm=False)
    found = exchanged_losses(one, other, BATCH, GIVEN, forget_rate=0.0)
    torch.testing.assert_close(found["loss1"], F.cross_entropy(one(BATCH[10:]), GIVEN[10:]))
    torch.testing.assert_close(found["loss2"], F.cross_entropy(other(BATCH[:10]), GIVEN[:10]))


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, **options)


def test_a_step_trains_both_and_batch_normalisation_stays_frozen(global_rng_untouched):
    one, other = two()
    with isolated(0):
        teaching = CoTeaching(one, other, sgd(one), sgd(other), forget_rate=0.3)
        before = [{k: v.clone() for k, v in model.state_dict().items()} for model in (one, other)]
        for _ in range(3):
            one.train(), other.train()  # undoes eval() of the layers, which must not matter
            found = teaching.step(BATCH, GIVEN, epoch=0)
    assert set(found) == {"loss1", "loss2", "index1", "index2"}
    assert not found["loss1"].requires_grad
    assert len(found["index1"]) == 7
    for model, was in zip((one, other), before, strict=True):
        now = model.state_dict()
        assert all(torch.equal(now[name], was[name]) for name in now if name.startswith("1."))
        assert not torch.equal(now["0.weight"], was["0.weight"])
        assert model[1].training
        assert all(p.requires_grad for p in model.parameters())


def test_without_freezing_statistics_move():
    one, other = two()
    with isolated(0):
        CoTeaching(one, other, sgd(one), sgd(other), freeze_bn=False).step(BATCH, GIVEN, epoch=0)
    assert one[1].num_batches_tracked == 1  # once in train mode; the ranking is in eval mode


def test_the_last_sample_of_an_odd_batch_is_dropped():
    one, other = two(nested=False, norm=False)
    whole = exchanged_losses(one, other, BATCH[:20], GIVEN[:20], forget_rate=0.2)
    odd = exchanged_losses(one, other, torch.cat([BATCH, BATCH[:1]]), torch.cat([GIVEN, GIVEN[:1]]), forget_rate=0.2)
    assert whole["loss1"] == odd["loss1"]
    assert whole["loss2"] == odd["loss2"]


def test_in_fit_a_pair_steps_as_two_networks_with_optimizers_of_their_own():
    one, other = two(nested=False)
    pair = Pair(*copy.deepcopy([one, other]))
    teaching = CoTeaching(one, other, sgd(one), sgd(other), forget_rate=0.2)
    for _ in range(3):
        teaching.step(BATCH, GIVEN, epoch=0)
    fit(
        pair,
        [(BATCH, GIVEN)] * 3,
        co_teaching(forget_rate=0.2),
        steps=3,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=5e-4),
    )
    for ours, theirs in zip(pair.networks, (one, other), strict=True):
        for name, value in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], value)
    mean = (one.eval()(BATCH) + other.eval()(BATCH)) / 2
    torch.testing.assert_close(pair.eval()(BATCH), mean)


def test_co_teach_fine_tunes_and_chooses_k(global_rng_untouched):
    one, other = two()
    pair = co_teach(one, other, DATA, CLEAN, epochs=2, batch_size=20, progress=False)
    assert pair.networks[0] is one
    assert not pair.training
    layers = nested_layers(pair)
    assert layers[0].eval_keep == layers[1].eval_keep == choose_keep(pair.networks, CLEAN)
    plain = co_teach(*two(nested=False), DATA, epochs=1, batch_size=89, progress=False)  # a last batch of one sample
    assert plain(CLEAN.inputs).shape == (60, 3)


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path):
    def run(folder, steps):
        pair = Pair(*two())
        callbacks = [ChooseKeep(CLEAN)]
        history = fit(
            pair, DATA, co_teaching(), steps=steps, batch_size=20, callbacks=callbacks, checkpoint=Checkpoint(folder, 1)
        )
        return pair, history

    whole, history = run(tmp_path / "whole", 8)
    run(tmp_path / "parts", 3)  # in the middle of an epoch of five steps
    parts, _ = run(tmp_path / "parts", 8)
    for name, value in whole.state_dict().items():
        assert torch.equal(parts.state_dict()[name], value)
    assert [layer.eval_keep for layer in nested_layers(parts)] == [layer.eval_keep for layer in nested_layers(whole)]
    assert len(history["keep"]) == 2


def test_pairs_of_real_vits(tiny_vit, digits_small):
    other = copy.deepcopy(tiny_vit)
    with torch.no_grad():
        other.classifier.weight.neg_()
    one, other = (convert(model, std=5.0, drop_bias=True) for model in (tiny_vit, other))
    data = TensorData({"pixel_values": digits_small.train.inputs}, digits_small.train.targets)
    pair = co_teach(one, other, data, digits_small.test, steps=2, batch_size=32, progress=False)
    assert pair(digits_small.test.inputs).shape == (100, 10)


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nested_dropout_distribution(8, std=0.0), "std is 0.0, but must be greater than 0"),
        (lambda: nested_dropout_distribution(0, std=1.0), "num_features is 0, but must be greater than 0"),
        (lambda: NestedDropout(8, std=-1.0), "std is -1.0, but must be"),
        (lambda: nested_dropout(FEATURES, keep=0), "keep is 0, but must be at least 1 and at most 8"),
        (lambda: nested_dropout(FEATURES, keep=9), "keep is 9, but must be at least 1 and at most 8"),
        (lambda: nested_dropout(FEATURES, keep=torch.tensor([1, 2])), r"keep has shape \(2,\), but must be one number"),
        (lambda: NestedDropout(7)(FEATURES), r"features has shape \(40, 8\), but must have 7 channels in dimension 1"),
        (
            lambda: small_loss_indices(FEATURES, LABELS, forget_rate=1.0),
            "forget_rate is 1.0, but must be .* less than 1",
        ),
        (lambda: small_loss_indices(FEATURES, LABELS[:3], forget_rate=0.1), "labels has shape"),
        (lambda: forget_rate_schedule(0, forget_rate=-0.1, num_gradual=0), "forget_rate is -0.1"),
        (lambda: forget_rate_schedule(0, forget_rate=0.1, num_gradual=-1), "num_gradual is -1"),
        (lambda: accuracy_per_keep(FEATURES, WEIGHT.T, LABELS), "they must be"),
        (lambda: accuracy_per_keep(FEATURES, WEIGHT, LABELS[:2]), "labels has shape"),
        (lambda: select_keep(torch.ones(2, 2)), "accuracy has shape"),
        (lambda: select_keep(torch.ones(2), penalty=-1), "penalty is -1"),
        (lambda: convert(network(), head="2"), "head is '2', a ReLU, but must be an nn.Linear"),
        (lambda: convert(convert(network())), "has nested dropout already"),
        (lambda: exchanged_losses(*two(), BATCH[:1], GIVEN[:1], forget_rate=0.0), "The batch has 1 samples, but must"),
        (
            lambda: exchanged_losses(*two(), BATCH, GIVEN, forget_rate=0.95),
            "each network keeps one at forget_rate 0.95",
        ),
        (lambda: fit(network(), DATA, co_teaching(), steps=1), "The model is a Sequential, but must be a Pair"),
        (lambda: co_teaching(forget_rate=1.0), "forget_rate is 1.0"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_one_network_is_no_pair():
    model = network()
    with pytest.raises(InputError, match="The two models share parameters, but must have weights of their own"):
        CoTeaching(model, model, sgd(model), sgd(model))
    with pytest.raises(InputError, match="share parameters"):
        Pair(model, model)


# --- the study ------------------------------------------------------------------------------------------------------


def study(**entries):
    """Test error and share of wrong labels learnt of each entry, on one replica with 40% wrong labels."""
    from retouch.arenas.contest import Terms
    from retouch.arenas.train.tasks import noise40
    from retouch.arenas.training import TrainProblem, measure

    problem = TrainProblem(noise40.TASK, Terms(replicas=1))
    values = {name: measure(problem, [solve(problem.replica(0))]) for name, solve in entries.items()}
    return [{name: row[which][0] for name, row in values.items()} for which in ("error", "memorised")]


@pytest.mark.slow
def test_under_noise_it_memorises_less_than_dropout_and_beats_plain_training():
    from retouch.arenas.train.entries import nested_dropout as entry
    from retouch.arenas.train.tasks import noise20

    error, memorised = study(
        plain=lambda replica: replica.train(),
        dropout=lambda replica: noise20.dropout(replica, p=0.5),
        nested=lambda replica: entry.solve(replica, std=5.0),
    )
    assert error["nested"] < error["plain"]
    assert error["dropout"] < error["plain"] - 1
    assert memorised["nested"] < memorised["dropout"] - 20


@pytest.mark.slow
def test_co_teaching_from_nested_networks_beats_co_teaching_from_plain_ones():
    from retouch.arenas.train.entries import nested_co_teaching as entry
    from retouch.arenas.train.tasks import noise20

    error, _ = study(
        plain=lambda replica: noise20.plain_co_teaching(replica, forget_rate=0.4, rate=0.01, epochs=10),
        nested=lambda replica: entry.solve(replica, std=10.0, forget_rate=0.4, rate=0.01, epochs=10),
    )
    assert error["nested"] < error["plain"] - 5
