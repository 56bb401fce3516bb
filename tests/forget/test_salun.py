import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from retouch.core.batches import in_order
from retouch.core.data import TensorData, subset
from retouch.core.errors import InputError
from retouch.core.loop import Callback, fit
from retouch.core.models import predict
from retouch.core.objectives import cross_entropy_batch
from retouch.forget.salun import (
    MaskedOptimizer,
    SoftThreshold,
    concept_shift_loss,
    predict_noise,
    random_labels,
    saliency_mask,
    salun,
    salun_diffusion,
)
from retouch.worlds import digits


def net(classes=4):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, classes)).double()


def samples(count=12, classes=4, seed=1):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, dtype=torch.float64, generator=draw)
    return x, torch.randint(classes, (count,), generator=draw)


def batches_of(x, y, size):
    return list(zip(x.split(size), y.split(size), strict=True))


def flat(tensors):
    values = tensors.values() if isinstance(tensors, dict) else tensors
    return torch.cat([value.detach().flatten() for value in values])


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def one_class(forgotten=3):
    data = digits.data("train")
    members = data.targets == forgotten
    return subset(data, members.nonzero()[:, 0]), subset(data, (~members).nonzero()[:, 0])


def accuracies(model, forgotten=3):
    test = digits.data("test")
    right = predict(model, in_order(test)).argmax(1) == test.targets
    members = test.targets == forgotten
    return [100 * float(part.double().mean()) for part in (right[members], right[~members])]


# --- the authors' numbers -------------------------------------------------------------------------------------------


def test_golden_masks_and_two_masked_steps(golden):
    case = golden("salun")
    model = net()
    names = {name: name.replace(".", "_") for name, _ in model.named_parameters()}
    model.load_state_dict({name: torch.tensor(getattr(case, f"param_w_{key}")) for name, key in names.items()})
    x, y, random_y = (torch.tensor(a) for a in (case.in_x, case.in_y, case.in_random_labels))
    batches = batches_of(x, y, int(case.param_batch_size))
    for percent in (10, 50, 80, 100):
        mask = saliency_mask(model, batches, cross_entropy_batch, ratio=percent / 100)
        for name, key in names.items():
            case.close(f"out_mask_{percent}_{key}", mask[name])
    mask = saliency_mask(model, batches, cross_entropy_batch, ratio=0.5)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    masked = MaskedOptimizer(sgd, model, mask)
    for inputs, labels in ((x[:6], random_y[:6]), (x[6:], y[6:])):
        masked.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        masked.step()
    for name, p in model.named_parameters():
        case.close(f"out_w_{names[name]}", p)


# --- the mask -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.1, 0.33, 0.5, 0.999, 1.0])
def test_mask_has_exactly_the_asked_share_of_ones(ratio):
    model = net()
    mask = saliency_mask(model, batches_of(*samples(), 5), ratio=ratio)
    count = sum(p.numel() for p in model.parameters())
    assert int(flat(mask).sum()) == int(ratio * count)
    for name, p in model.named_parameters():
        assert mask[name].shape == p.shape
        assert mask[name].dtype == torch.bool


def test_mask_has_the_asked_share_also_when_all_gradients_tie():
    model = net()
    mask = saliency_mask(model, [samples()], lambda model, batch: 0.0 * model(batch[0]).sum(), ratio=0.3)
    count = sum(p.numel() for p in model.parameters())
    expected = torch.arange(count) < int(0.3 * count)  # ties are resolved by position
    assert torch.equal(flat(mask), expected)


def test_masks_are_nested_in_ratio():
    model = net()
    for batches in (batches_of(*samples(), 5), [(torch.zeros(3, 6, dtype=torch.float64), torch.arange(3))]):
        smaller = flat(saliency_mask(model, batches, ratio=0.0))
        for ratio in (0.05, 0.2, 0.5, 0.7, 0.95, 1.0):
            larger = flat(saliency_mask(model, batches, ratio=ratio))
            assert not (smaller & ~larger).any()
            smaller = larger


def test_mask_is_the_largest_absolute_sum_of_batch_gradients():
    model = net()
    batches = batches_of(*samples(), 5)  # 5, 5 and 2: each counts as one
    total = sum(flat(torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))) for x, y in batches)
    for ratio in (0.1, 0.5):
        count = int(ratio * len(total))
        expected = torch.zeros(len(total), dtype=torch.bool)
        expected[sorted(range(len(total)), key=lambda k: -abs(float(total[k])))[:count]] = True
        assert torch.equal(flat(saliency_mask(model, batches, ratio=ratio)), expected)


def test_absolute_value_is_taken_after_the_sum_over_batches():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(2))

    batches = [torch.tensor([[10.0, 1.0]]), torch.tensor([[-10.0, 1.0]])]
    mask = saliency_mask(Two(), batches, lambda model, x: (x @ model.w).mean(), ratio=0.5)
    assert mask["w"].tolist() == [False, True]


def test_gradient_norm_of_each_batch_is_clipped_before_the_sum():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(2))

    batches = [torch.tensor([[100.0, 0.0]]), torch.tensor([[0.0, 2.0]]), torch.tensor([[0.0, 2.0]])]

    def loss(model, x):
        return (x @ model.w).mean()

    assert saliency_mask(Two(), batches, loss, ratio=0.5)["w"].tolist() == [True, False]
    assert saliency_mask(Two(), batches, loss, ratio=0.5, clip=1.0)["w"].tolist() == [False, True]
    small = [torch.tensor([[0.3, 0.0]]), torch.tensor([[0.3, 0.0]]), torch.tensor([[0.0, 0.7]])]
    assert saliency_mask(Two(), small, loss, ratio=0.5, clip=1.0)["w"].tolist() == [False, True]  # not made larger


def test_tensor_scope_ranks_each_parameter_for_itself():
    model = net()
    mask = saliency_mask(model, [samples()], ratio=0.5, scope="tensor")
    assert [int(part.sum()) for part in mask.values()] == [p.numel() // 2 for p in model.parameters()]
    with pytest.raises(InputError, match="scope is 'layer'"):
        saliency_mask(model, [samples()], ratio=0.5, scope="layer")


def test_chosen_parameters_are_ranked_among_themselves():
    model = net()
    mask = saliency_mask(model, [samples()], ratio=0.5, params={"2.weight": model[2].weight})
    assert list(mask) == ["2.weight"]
    assert int(mask["2.weight"].sum()) == 10


@pytest.mark.parametrize("scale", [-1.0, 8.0, -0.125])
def test_mask_is_unchanged_if_the_loss_is_negated_or_scaled(scale):
    model, batches = net(), batches_of(*samples(), 5)
    expected = saliency_mask(model, batches, ratio=0.4)
    actual = saliency_mask(model, batches, lambda model, batch: scale * cross_entropy_batch(model, batch), ratio=0.4)
    assert_same(actual, expected)


def test_mask_of_parameters_whose_gradients_are_one_tensor():
    class TwoOffsets(nn.Module):  # like position and token embeddings, which are added up
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Parameter(torch.zeros(2)) for _ in range(3))

    def loss(model, x):
        return ((x * (model.a + model.b)).sum(1) + 1.5 * (x * model.c).sum(1)).mean()

    batches = [torch.tensor([[3.0, 1.0]]), torch.tensor([[3.0, 1.0]]), torch.tensor([[3.0, 1.0]])]
    mask = saliency_mask(TwoOffsets(), batches, loss, ratio=1 / 6)  # |sums|: a, b = (9, 3), c = (13.5, 4.5)
    assert {name: part.tolist() for name, part in mask.items()} == {
        "a": [False, False],
        "b": [False, False],
        "c": [True, False],
    }


def test_mask_is_taken_in_eval_mode_and_leaves_mode_flags_and_grad():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 4)).double().train()
    model[0].bias.requires_grad_(False)
    before, batches = state(model), batches_of(*samples(), 5)
    mask = saliency_mask(model, batches, ratio=0.5)
    assert_same(mask, saliency_mask(model.eval(), batches, ratio=0.5))
    assert_same(state(model), before)
    assert "0.bias" not in mask
    assert not model[0].bias.requires_grad
    assert all(p.grad is None for p in model.parameters())
    saliency_mask(model.train(), batches, ratio=0.5)
    assert all(module.training for module in model.modules())


# --- masked steps ---------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=5e-2),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.05, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.5),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_masked_out_weights_stay_bitwise_after_any_number_of_steps(kind):
    model, (x, y) = net(), samples()
    mask = saliency_mask(model, [(x, y)], ratio=0.5)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    masked = MaskedOptimizer(OPTIMIZERS[kind](model.parameters()), model, mask)
    for _ in range(7):
        masked.zero_grad()
        F.cross_entropy(model(x), y).backward()
        masked.step()
        for name, p in model.named_parameters():
            assert torch.equal(p[~mask[name]], start[name][~mask[name]]), name
            assert not p.grad[~mask[name]].any()
            for value in masked.optimizer.state[p].values():
                if value is not None and value.shape == p.shape:
                    assert not value[~mask[name]].any()
    moved = flat({name: p != start[name] for name, p in model.named_parameters()})
    assert torch.equal(moved, flat(mask))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_masked_out_weights_stay_bitwise_with_a_momentum_from_before(kind):
    model, (x, y) = net(), samples()
    optimizer = OPTIMIZERS[kind](model.parameters())
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    mask = saliency_mask(model, [(x, y)], ratio=0.3)
    start = flat(model.parameters())
    masked = MaskedOptimizer(optimizer, model, mask)
    for _ in range(3):
        masked.zero_grad()
        F.cross_entropy(model(x), y).backward()
        masked.step()
    kept = ~flat(mask)
    assert torch.equal(flat(model.parameters())[kept], start[kept])


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_ratio_one_equals_unmasked_training_step_for_step(kind):
    one, other, (x, y) = net(), net(), samples()
    masked = MaskedOptimizer(OPTIMIZERS[kind](one.parameters()), one, saliency_mask(one, [(x, y)], ratio=1.0))
    plain = OPTIMIZERS[kind](other.parameters())
    for _ in range(5):
        for model, optimizer in ((one, masked), (other, plain)):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        assert torch.equal(flat(one.parameters()), flat(other.parameters()))


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.0}, {"weight_decay": 0.3}])
def test_ratio_zero_leaves_the_model_bit_identical(settings):
    model, (x, y) = net(), samples()
    edited = salun(model, (x[:4], y[:4]), (x[4:], y[4:]), ratio=0.0, epochs=3, lr=0.1, **settings)
    assert_same(state(edited), state(model))


def test_taking_the_masking_off_frees_the_optimizer():
    model, (x, y) = net(), samples()
    masked = MaskedOptimizer(OPTIMIZERS["sgd"](model.parameters()), model, saliency_mask(model, [(x, y)], ratio=0.0))
    masked.masking.remove()
    before = flat(model.parameters())
    F.cross_entropy(model(x), y).backward()
    masked.step()
    assert (flat(model.parameters()) != before).all()


# --- labels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_label_draw_never_equals_the_true_label(classes):
    truth = torch.arange(6000) % classes
    drawn = random_labels(truth, classes, generator=torch.Generator().manual_seed(0))
    assert drawn.dtype == truth.dtype
    assert not (drawn == truth).any()
    for true in range(classes):
        counts = torch.bincount(drawn[truth == true], minlength=classes).double()
        expected = 6000 / classes / (classes - 1)
        others = counts[torch.arange(classes) != true]
        assert (others - expected).abs().max() < 6 * math.sqrt(expected)


def test_with_two_classes_the_draw_is_the_flip():
    truth = torch.tensor([0, 1, 1, 0, 1])
    assert random_labels(truth, 2).tolist() == [1, 0, 0, 1, 0]


def test_draw_over_all_classes_holds_the_true_one_with_its_share():
    truth = torch.full((8000,), 2)
    drawn = random_labels(truth, 4, exclude_true=False, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn, minlength=4).double()
    assert (counts - 2000).abs().max() < 6 * math.sqrt(2000)


@pytest.mark.parametrize("exclude_true", [True, False])
def test_same_generator_same_labels(exclude_true, global_rng_untouched):
    truth = torch.arange(50) % 7
    one, other = (
        random_labels(truth, 7, exclude_true=exclude_true, generator=torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert torch.equal(one, other)
    random_labels(truth, 7, exclude_true=exclude_true)  # without a generator: from the system


# --- SalUn for classifiers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.4, 1.0])
def test_salun_equals_a_plain_loop_over_forget_and_then_retain(ratio):
    """With two classes the random label is the flip, and with whole batches the order does not matter."""
    model, (x, y) = net(classes=2), samples(20, classes=2)
    forget, retain = (x[:8], y[:8]), (x[8:], y[8:])
    settings = {"lr": 0.2, "momentum": 0.9, "weight_decay": 0.01}
    actual = salun(model, forget, retain, ratio=ratio, epochs=3, batch_size=64, **settings)

    expected = copy.deepcopy(model)
    start = [p.detach().clone() for p in expected.parameters()]
    gradients = torch.autograd.grad(F.cross_entropy(expected(forget[0]), forget[1]), list(expected.parameters()))
    order = flat(gradients).abs().argsort(descending=True)[: int(ratio * sum(p.numel() for p in start))]
    chosen = torch.zeros(sum(p.numel() for p in start))
    chosen[order] = 1.0
    masks = [m.view_as(p) for m, p in zip(chosen.split([p.numel() for p in start]), start, strict=True)]
    velocity = [torch.zeros_like(p) for p in start]
    for _ in range(3):
        for inputs, labels in ((forget[0], 1 - forget[1]), retain):
            gradients = torch.autograd.grad(F.cross_entropy(expected(inputs), labels), list(expected.parameters()))
            for p, g, v, m in zip(expected.parameters(), gradients, velocity, masks, strict=True):
                v.mul_(0.9).add_(m * (g + 0.01 * p.detach()))
                p.data.sub_(0.2 * v)
    torch.testing.assert_close(flat(actual.parameters()), flat(expected.parameters()), rtol=1e-9, atol=1e-12)
    assert (flat(actual.parameters()) != flat(start)).any()


def test_labels_are_drawn_anew_for_every_batch_and_epoch():
    """Weights of one-hot inputs would run to a label fixed once; new draws keep them between both wrong labels."""
    model = nn.Linear(6, 3, bias=False).double()
    nn.init.zeros_(model.weight)
    x = torch.eye(6, dtype=torch.float64)
    labels = torch.zeros(6).long()
    edited = salun(model, (x, labels), (0 * x, labels), ratio=1.0, epochs=300, lr=2.0, momentum=0.0)
    probs = edited(x).softmax(1)
    assert (probs[:, 0] < 0.1).all()
    assert (probs[:, 1:] > 0.05).all()
    assert (probs[:, 1:] < 0.95).all()


@pytest.mark.parametrize("settings", [{}, {"soft": True}, {"exclude_true": False}])
def test_forgets_a_class_of_digits_and_keeps_the_others(trained_cnn, settings):
    edited = salun(trained_cnn, *one_class(), epochs=5, batch_size=64, **settings)
    forgotten, others = accuracies(edited)
    assert forgotten < 20
    assert others > 80
    changed = (flat(edited.parameters()) != flat(trained_cnn.parameters())).sum()
    if "soft" not in settings:
        assert 0 < changed <= int(0.5 * sum(p.numel() for p in edited.parameters()))


def test_moves_the_masked_half_of_a_real_vit(tiny_vit, digits_small):
    data = digits_small.train
    forget, retain = subset(data, range(24)), subset(data, range(24, 240))
    for p in tiny_vit.parameters():
        p.grad = None
    gradients = torch.autograd.grad(
        F.cross_entropy(tiny_vit(forget.inputs).logits, forget.targets), list(tiny_vit.parameters())
    )
    edited = salun(tiny_vit, forget, retain, ratio=0.1, epochs=1, lr=0.05)
    assert type(edited) is type(tiny_vit)
    size = flat(gradients).abs()
    threshold = size.sort(descending=True).values[int(0.1 * len(size)) - 1]
    moved = flat(edited.parameters()) != flat(tiny_vit.parameters())
    assert 0 < int(moved.sum()) <= int(0.1 * len(size))
    assert size[moved].min() >= threshold * (1 - 1e-3)


def test_raises_the_forget_loss_of_a_real_vit_given_mappings(tiny_vit, digits_small):
    data = digits_small.train
    fit(tiny_vit, data, epochs=6, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    forget = ({"pixel_values": data.inputs[:24]}, data.targets[:24])
    retain = ({"pixel_values": data.inputs[24:]}, data.targets[24:])
    edited = salun(tiny_vit, forget, retain, epochs=4, lr=0.05, batch_size=32)
    with torch.no_grad():
        before, after = (float(F.cross_entropy(m(**forget[0]).logits, forget[1])) for m in (tiny_vit, edited))
    assert after > before + 0.5


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("soft", [False, True])
def test_given_model_stays_bit_identical_unless_in_place(trained_cnn, digits_small, training, soft):
    data = digits_small.train
    forget, retain = subset(data, range(24)), subset(data, range(24, 240))
    model = copy.deepcopy(trained_cnn).train(training)
    model.conv1.bias.requires_grad_(False)
    before = state(model)
    edited = salun(model, forget, retain, epochs=1, soft=soft)
    assert edited is not model
    assert_same(state(model), before)
    assert salun(model, forget, retain, epochs=1, soft=soft, inplace=True) is model
    assert_same(state(model), state(edited))
    assert torch.equal(edited.conv1.bias, before["conv1.bias"])
    assert not torch.equal(edited.head.weight, before["head.weight"])
    for one in (model, edited):
        assert all(module.training == training for module in one.modules())
        assert [name for name, p in one.named_parameters() if not p.requires_grad] == ["conv1.bias"]


@pytest.mark.parametrize("soft", [False, True])
def test_same_seed_same_bits_and_no_global_randomness(trained_cnn, digits_small, soft, global_rng_untouched):
    data = digits_small.train
    forget, retain = subset(data, range(24)), subset(data, range(24, 240))
    runs = [salun(trained_cnn, forget, retain, epochs=1, batch_size=64, soft=soft, seed=seed) for seed in (5, 5, 6)]
    assert_same(state(runs[0]), state(runs[1]))
    assert not torch.equal(runs[0].head.weight, runs[2].head.weight)


def loader(data, batch_size, *, shuffle=False):
    return DataLoader(TensorDataset(data.inputs, data.targets), batch_size=batch_size, shuffle=shuffle)


def test_loaders_over_our_data_equal_loaders_over_torch_data(trained_cnn, digits_small):
    data = digits_small.train
    forget, retain = subset(data, range(24)), subset(data, range(24, 240))
    expected = salun(trained_cnn, loader(forget, 10), loader(retain, 64), epochs=1)
    actual = salun(trained_cnn, DataLoader(forget, batch_size=10), DataLoader(retain, batch_size=64), epochs=1)
    assert_same(state(actual), state(expected))


def test_same_seed_same_bits_also_with_shuffled_loaders(trained_cnn, digits_small):
    data = digits_small.train
    forget, retain = subset(data, range(24)), subset(data, range(24, 240))
    loaders = loader(forget, 10, shuffle=True), loader(retain, 64, shuffle=True)
    one, other = (salun(trained_cnn, *loaders, epochs=1) for _ in range(2))
    assert_same(state(one), state(other))


def test_no_global_randomness_with_loaders(trained_cnn, digits_small, global_rng_untouched):
    data = digits_small.train
    forget, retain = subset(data, range(24)), subset(data, range(24, 240))
    salun(trained_cnn, loader(forget, 10), loader(retain, 64), epochs=1)


# --- SalUn-soft -----------------------------------------------------------------------------------------------------


class Watch(Callback):
    """What the weights were after every step, before and after the soft threshold if it stands around that."""

    def __init__(self):
        self.seen = []

    def on_step(self, run):
        self.seen.append(flat(run.module.parameters()).clone())


@pytest.mark.parametrize("ratio", [0.5, 0.9])
def test_soft_holds_a_share_that_decays_linearly_exactly_at_the_start(ratio):
    model, (x, y) = net(), samples()
    start, watch, steps = flat(model.parameters()), Watch(), 8
    fit(
        model,
        [(x, y), (x[:6], y[:6])],  # an epoch is two steps: the start is the true one, not the epoch's
        steps=steps,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9),
        callbacks=[SoftThreshold(ratio), watch],
    )
    held = [int((weights == start).sum()) for weights in watch.seen]
    assert held == [int(ratio * (1 - step / steps) * len(start)) for step in range(1, steps + 1)]


def test_soft_step_shrinks_every_change_by_the_share_th_smallest():
    model, (x, y) = net(), samples()
    start, before, after = flat(model.parameters()), Watch(), Watch()
    fit(
        model,
        [(x, y)],
        steps=4,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.3),
        callbacks=[before, SoftThreshold(0.5), after],
    )
    for step in range(1, 4):
        change = (before.seen[step - 1] - start).tolist()
        threshold = sorted(map(abs, change))[int(0.5 * (1 - step / 4) * len(change)) - 1]
        expected = [math.copysign(max(abs(c) - threshold, 0.0), c) for c in change]
        torch.testing.assert_close((after.seen[step - 1] - start).tolist(), expected, rtol=1e-9, atol=1e-15)
    assert torch.equal(before.seen[3], after.seen[3])


def test_soft_of_ratio_zero_is_plain_training():
    one, other, (x, y) = net(), net(), samples()
    fit(one, [(x, y)], steps=4, callbacks=[SoftThreshold(0.0)])
    fit(other, [(x, y)], steps=4)
    assert_same(state(one), state(other))


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [-0.1, 1.1, math.nan])
def test_ratio_outside_of_zero_to_one_is_an_error(ratio):
    model, (x, y) = net(), samples()
    calls = [
        lambda: saliency_mask(model, [(x, y)], ratio=ratio),
        lambda: SoftThreshold(ratio),
        lambda: salun(model, (x, y), (x, y), ratio=ratio),
        lambda: salun(model, (x, y), (x, y), ratio=ratio, soft=True),
        lambda: salun_diffusion(
            Toy(), clean_batch(1), clean_batch(2), Linear(), alternative=lambda c: c, ratio=ratio, predict=toy_predict
        ),
    ]
    for call in calls:
        with pytest.raises(InputError, match=rf"ratio is {ratio}.*at least 0 and at most 1"):
            call()


@pytest.mark.parametrize("settings", [{}, {"num_classes": 4}, {"num_classes": 4, "soft": True}])
def test_empty_forget_set_is_an_error_that_names_it(settings):
    model, (x, y) = net(), samples()
    with pytest.raises(InputError, match=r"forget.*empty"):
        salun(model, TensorData(x[:0], y[:0]), (x, y), **settings)


def test_empty_retain_set_is_an_error_that_names_it():
    model, (x, y) = net(), samples()
    with pytest.raises(InputError, match=r"retain.*empty"):
        salun(model, (x, y), TensorData(x[:0], y[:0]))


def test_mask_of_no_batches_is_an_error():
    with pytest.raises(InputError, match="batches is empty"):
        saliency_mask(net(), [])


def test_missing_mask_keys_are_named():
    model = net()
    mask = saliency_mask(model, [samples()])
    del mask["0.bias"], mask["2.weight"]
    with pytest.raises(InputError, match=r"mask lacks 0\.bias, 2\.weight"):
        MaskedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, mask)


def test_wrongly_shaped_mask_is_named():
    model = net()
    mask = {**saliency_mask(model, [samples()]), "2.bias": torch.ones(3)}
    with pytest.raises(InputError, match=r"2\.bias.*\(3,\).*\(4,\)"):
        MaskedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, mask)


@pytest.mark.parametrize("num_classes", [-1, 0, 1])
def test_fewer_than_two_classes_are_an_error(num_classes):
    model, (x, y) = net(), samples()
    with pytest.raises(InputError, match=rf"num_classes is {num_classes}.*at least 2"):
        random_labels(y, num_classes)
    with pytest.raises(InputError, match=rf"num_classes is {num_classes}.*at least 2"):
        salun(model, (x[:4], y[:4]), (x[4:], y[4:]), epochs=1, num_classes=num_classes)


def test_learning_rate_must_be_positive():
    model, (x, y) = net(), samples()
    with pytest.raises(InputError, match="lr is 0"):
        salun(model, (x, y), (x, y), lr=0)


# --- diffusion ------------------------------------------------------------------------------------------------------


class Toy(nn.Module):
    """A noise predictor small enough to be recomputed."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.mix, self.table = nn.Linear(6, 6), nn.Embedding(4, 6)

    def forward(self, noisy, t, condition):
        return torch.tanh(self.mix(noisy) + t[:, None] / 20) * self.table(condition)


class Linear:
    """A schedule from which the noise can be read back: x_t = x + (t + 1) * noise."""

    class config:
        num_train_timesteps = 20

    @staticmethod
    def add_noise(clean, noise, t):
        return clean + (t + 1)[:, None] * noise


def toy_predict(model, noisy, t, condition):
    return model(noisy, t, condition)


def clean_batch(seed, count=6):
    draw = torch.Generator().manual_seed(seed)
    return [(torch.randn(count, 6, generator=draw), torch.full((count,), 0 if seed == 1 else 2))]


def recording(calls):
    def predict(model, noisy, t, condition):
        calls.append((noisy.clone(), t.clone(), condition.clone()))
        return model(noisy, t, condition)

    return predict


def test_concept_shift_loss_is_the_mean_squared_distance_of_two_predictions():
    model, (x, _) = Toy(), clean_batch(1)[0]
    t, forget, other = torch.arange(6), torch.zeros(6).long(), torch.ones(6).long()
    expected = float((model(x, t, forget) - model(x, t, other)).detach().square().sum()) / x.numel()
    assert float(concept_shift_loss(model, x, t, forget, other, predict=toy_predict)) == pytest.approx(expected)


def test_concept_shift_loss_of_equal_conditions_is_zero_with_zero_gradient():
    model, (x, _) = Toy(), clean_batch(1)[0]
    condition = torch.zeros(6).long()
    loss = concept_shift_loss(model, x, torch.arange(6), condition, condition.clone(), predict=toy_predict)
    assert float(loss) == 0.0
    for gradient in torch.autograd.grad(loss, list(model.parameters())):
        assert not gradient.any()


def test_no_gradient_reaches_the_target_branch():
    model, (x, _) = Toy(), clean_batch(1)[0]
    t, forget, other = torch.arange(6), torch.zeros(6).long(), torch.ones(6).long()
    loss = concept_shift_loss(model, x, t, forget, other, predict=toy_predict)
    actual = torch.autograd.grad(loss, list(model.parameters()))
    assert not actual[2][1].any()  # the alternative's embedding
    assert actual[2][0].any()
    constant = model(x, t, other).detach()
    expected = torch.autograd.grad((model(x, t, forget) - constant).square().mean(), list(model.parameters()))
    for one, two in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("guided", [False, True])
def test_diffusion_mask_and_steps_equal_a_plain_loop(guided):
    """Replayed from what the run saw: the mask's loss, both terms, clipping before masking, Adam."""
    model, calls, alpha, ratio, iterations = Toy(), [], 0.01, 0.4, 4
    forget, retain = clean_batch(1) + clean_batch(1, 5), clean_batch(2, 7) + clean_batch(2, 4)
    forget[1] = (30 * forget[1][0], forget[1][1])  # a batch whose gradient would drown the other's without the clip
    empty = {"unconditional": lambda c: torch.full_like(c, 3), "guidance": 2.0} if guided else {}
    edited = salun_diffusion(
        model,
        forget,
        retain,
        Linear(),
        alternative=lambda c: c + 1,
        alpha=alpha,
        ratio=ratio,
        iterations=iterations,
        lr=0.01,
        predict=recording(calls),
        **empty,
    )

    replay = Toy()
    names, parameters = zip(*replay.named_parameters(), strict=True)
    total = torch.zeros(sum(p.numel() for p in parameters))
    for clean, condition in forget:
        noisy, t, seen = calls.pop(0)
        assert torch.equal(seen, condition)
        prediction = replay(noisy, t, condition)
        if guided:
            again, t_again, seen = calls.pop(0)
            assert torch.equal(again, noisy)
            assert torch.equal(t_again, t)
            assert (seen == 3).all()
            prediction = 3 * prediction - 2 * replay(noisy, t, seen)
        noise = (noisy - clean) / (t + 1)[:, None]
        gradient = flat(torch.autograd.grad((prediction - noise).square().sum() / len(clean), parameters))
        total += gradient * min(1.0, 1.0 / float(gradient.norm()))
    mask = torch.zeros(len(total), dtype=torch.bool)
    mask[total.abs().argsort(descending=True)[: int(ratio * len(total))]] = True
    keep = [m.view_as(p) for m, p in zip(mask.split([p.numel() for p in parameters]), parameters, strict=True)]

    adam = torch.optim.Adam(parameters, lr=0.01)
    for step in range(iterations):
        (target_x, target_t, other), (x, t, condition), (kept_x, kept_t, kept) = calls[:3]
        del calls[:3]
        assert torch.equal(x, target_x)
        assert torch.equal(t, target_t)
        assert torch.equal(other, condition + 1)
        clean = retain[step % 2][0]
        noise = (kept_x - clean) / (kept_t + 1)[:, None]
        target = replay(target_x, target_t, other).detach()
        loss = (replay(x, t, condition) - target).square().mean()
        loss = loss + alpha * (replay(kept_x, kept_t, kept) - noise).square().sum() / len(clean)
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        start = [p.detach().clone() for p in parameters]
        for p, m in zip(parameters, keep, strict=True):
            p.grad *= m
        adam.step()
        for p, m, s in zip(parameters, keep, start, strict=True):
            p.data = torch.where(m, p.data, s)
    assert not calls
    for name, p in zip(names, parameters, strict=True):
        torch.testing.assert_close(dict(edited.named_parameters())[name], p, rtol=1e-4, atol=1e-6)
    unseen = torch.arange(len(mask)) >= len(mask) - 6 * (1 if guided else 0)  # training never asks for the empty one
    moved = flat(edited.parameters()) != flat(model.parameters())
    assert torch.equal(moved, mask & ~unseen)


def test_timesteps_come_in_antithetic_pairs():
    calls = []
    salun_diffusion(
        Toy(),
        clean_batch(1, 8),
        clean_batch(2, 8),
        Linear(),
        alternative=lambda c: c + 1,
        iterations=3,
        predict=recording(calls),
    )
    for _, t, _ in calls:
        assert (t[:4] + t[4:] == 19).all()
        assert t.min() >= 0
    assert len({tuple(t.tolist()) for _, t, _ in calls}) > 4


def small_unet(kind):
    import diffusers

    shape = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "norm_num_groups": 4}
    shape["block_out_channels"] = (8, 16)
    torch.manual_seed(0)
    if kind == "class":
        down, up = ("DownBlock2D", "DownBlock2D"), ("UpBlock2D", "UpBlock2D")
        return diffusers.UNet2DModel(
            **shape, down_block_types=down, up_block_types=up, add_attention=False, num_class_embeds=4
        ).eval()
    down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    return diffusers.UNet2DConditionModel(
        **shape, down_block_types=down, up_block_types=up, cross_attention_dim=8, attention_head_dim=2
    ).eval()


def unet_problem(kind):
    """Forget and retain batches, the alternative condition, and noisy inputs to look at it."""
    from diffusers import DDPMScheduler

    draw = torch.Generator().manual_seed(0)
    images = torch.randn(24, 1, 8, 8, generator=draw)
    if kind == "class":
        conditions, other = torch.arange(24) // 8, lambda c: (c + 1) % 4
    else:
        words = torch.randn(4, 3, 8, generator=draw)
        conditions, other = words[torch.arange(24) // 8], lambda c: words[3].expand_as(c)
    forget = TensorData(images[:8], conditions[:8])
    retain = TensorData(images[8:], conditions[8:])
    noisy, t = torch.randn(8, 1, 8, 8, generator=draw), torch.randint(20, (8,), generator=draw)
    return forget, retain, DDPMScheduler(num_train_timesteps=20), other, noisy, t


@pytest.mark.parametrize("kind", ["class", "text"])
def test_real_unet_moves_the_forget_condition_to_the_alternative_and_nothing_outside_of_the_mask(kind):
    model = small_unet(kind)
    forget, retain, schedule, other, noisy, t = unet_problem(kind)
    model.conv_in.bias.requires_grad_(False)
    before, count = state(model), sum(p.numel() for p in model.parameters()) - 8
    edited = salun_diffusion(
        model, forget, retain, schedule, alternative=other, iterations=20, lr=2e-3, ratio=0.3, batch_size=8
    )
    assert type(edited) is type(model)
    assert_same(state(model), before)
    moved = flat(edited.parameters()) != flat(model.parameters())
    assert 0 < int(moved.sum()) <= int(0.3 * count)
    assert torch.equal(edited.conv_in.bias, model.conv_in.bias)
    assert [n for n, p in edited.named_parameters() if not p.requires_grad] == ["conv_in.bias"]
    assert not any(module.training for module in edited.modules())
    condition = forget.targets
    with torch.no_grad():
        losses = [
            float(concept_shift_loss(m, noisy, t, condition, other(condition), predict=predict_noise))
            for m in (model, edited)
        ]
    assert losses[1] < 0.5 * losses[0]


def test_only_chosen_parameters_of_a_unet_move_and_it_is_edited_in_place(global_rng_untouched):
    rng = torch.get_rng_state()
    model = small_unet("text")
    torch.set_rng_state(rng)
    forget, retain, schedule, other, _, _ = unet_problem("text")
    before = state(model)
    chosen = {name: p for name, p in model.named_parameters() if "attn2" in name}
    settings = {"iterations": 2, "params": chosen, "unconditional": torch.zeros_like, "guidance": 7.5, "batch_size": 8}
    twice = [salun_diffusion(model, forget, retain, schedule, alternative=other, **settings) for _ in range(2)]
    assert_same(state(twice[0]), state(twice[1]))
    assert salun_diffusion(model, forget, retain, schedule, alternative=other, inplace=True, **settings) is model
    assert_same(state(model), state(twice[0]))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert moved <= chosen.keys()
    count = sum(p.numel() for p in chosen.values())
    assert sum(int((p != before[name]).sum()) for name, p in model.named_parameters()) <= count // 2


def test_unet_with_ratio_zero_stays_bit_identical():
    model = small_unet("class")
    forget, retain, schedule, other, _, _ = unet_problem("class")
    edited = salun_diffusion(model, forget, retain, schedule, alternative=other, iterations=2, ratio=0.0, batch_size=8)
    assert_same(state(edited), state(model))


def test_predict_noise_reads_classes_text_and_the_first_channels():
    noisy, t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 7])
    by_class, by_text = small_unet("class"), small_unet("text")
    ids, words = torch.tensor([1, 2]), torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(predict_noise(by_class, noisy, t, ids), by_class(noisy, t, class_labels=ids).sample)
        assert torch.equal(predict_noise(by_text, noisy, t, words), by_text(noisy, t, words).sample)


def test_a_real_dit_with_learned_variances_runs():
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=1,
        out_channels=2,
        num_layers=1,
        norm_num_groups=1,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=4,
    ).eval()
    forget, retain, schedule, other, noisy, t = unet_problem("class")
    assert predict_noise(model, noisy, t, forget.targets).shape == noisy.shape
    edited = salun_diffusion(
        model, forget, retain, schedule, alternative=other, iterations=2, lr=1e-3, ratio=0.2, batch_size=8
    )
    count = sum(p.numel() for p in model.parameters())
    assert 0 < int((flat(edited.parameters()) != flat(model.parameters())).sum()) <= int(0.2 * count)


def test_empty_forget_and_retain_batches_of_diffusion_are_errors():
    for forget, retain in (([], clean_batch(2)), (clean_batch(1), [])):
        with pytest.raises(InputError, match="empty"):
            salun_diffusion(Toy(), forget, retain, Linear(), alternative=lambda c: c, predict=toy_predict)


@pytest.mark.parametrize(("name", "value"), [("alpha", -1.0), ("lr", 0.0)])
def test_bad_numbers_of_diffusion_are_named(name, value):
    settings = {name: value, "alternative": lambda c: c, "predict": toy_predict}
    with pytest.raises(InputError, match=f"{name} is {value}"):
        salun_diffusion(Toy(), clean_batch(1), clean_batch(2), Linear(), **settings)
