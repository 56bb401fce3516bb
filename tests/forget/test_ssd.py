import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from retouch.core.batches import in_order
from retouch.core.data import TensorData, subset
from retouch.core.errors import InputError
from retouch.core.models import predict
from retouch.core.objectives import cross_entropy_batch
from retouch.forget.ssd import (
    SelectiveSynapticDampening,
    squared_logits,
    ssd,
    ssd_dampen,
    ssd_importance,
    ssd_select,
)
from retouch.worlds import digits


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)).double()


def samples(count=24, seed=1):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 5, dtype=torch.float64, generator=draw)
    return x, torch.randint(3, (count,), generator=draw)


def batches_of(x, y, size):
    return list(zip(x.split(size), y.split(size), strict=True))


def importances(model, size=4):
    """Of the first 8 samples (to be forgotten) and of all 24."""
    x, y = samples()
    return ssd_importance(model, batches_of(x[:8], y[:8], size)), ssd_importance(model, batches_of(x, y, size))


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


def test_accuracies(model, forgotten=3):
    test = digits.data("test")
    right = predict(model, in_order(test)).argmax(1) == test.targets
    members = test.targets == forgotten
    return [100 * float(part.double().mean()) for part in (right[members], right[~members])]


test_accuracies.__test__ = False


# --- the authors' numbers -------------------------------------------------------------------------------------------


def test_golden_importances_and_dampened_weights(golden):
    case = golden("ssd")
    model = net()
    names = {name: name.replace(".", "_") for name, _ in model.named_parameters()}
    model.load_state_dict({name: torch.tensor(getattr(case, f"param_w_{key}")) for name, key in names.items()})
    x, y, size, count = torch.tensor(case.in_x), torch.tensor(case.in_y), int(case.param_batch_size), 8
    assert int(case.param_forget_count) == count
    forget = ssd_importance(model, batches_of(x[:count], y[:count], size))
    full = ssd_importance(model, batches_of(x, y, size))
    for name, key in names.items():
        case.close(f"out_imp_forget_{key}", forget[name])
        case.close(f"out_imp_full_{key}", full[name])
    for j in range(3):
        alpha, lam = float(getattr(case, f"param_alpha_{j}")), float(getattr(case, f"param_lam_{j}"))
        edited = dict(ssd_dampen(model, forget, full, alpha=alpha, lam=lam).named_parameters())
        for name, key in names.items():
            case.close(f"out_w{j}_{key}", edited[name])


# --- formulas, the plainest way -------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("per_sample", [False, True])
def test_importance_is_the_mean_power_of_gradients(power, per_sample):
    model, (x, y) = net(), samples()
    pieces = batches_of(x, y, 1 if per_sample else 5)  # the last batch of five is not full and still counts as one
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for some_x, some_y in pieces:
        loss = F.cross_entropy(model(some_x), some_y)
        for (name, p), g in zip(
            model.named_parameters(), torch.autograd.grad(loss, [*model.parameters()]), strict=True
        ):
            assert g.shape == p.shape
            expected[name] += g.abs() ** power / len(pieces)
    actual = ssd_importance(model, batches_of(x, y, 5), power=power, per_sample=per_sample)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-10, atol=1e-14)
        assert not actual[name].requires_grad


@pytest.mark.parametrize(
    ("alpha", "lam", "exponent"), [(1.5, 1.0, 1.0), (1.0, 0.1, 1.0), (2.0, 3.0, 1.0), (1.2, 1.0, 2.0)]
)
def test_dampening_entry_by_entry(alpha, lam, exponent):
    model = net()
    forget, full = importances(model)
    masks = ssd_select(forget, full, alpha=alpha)
    edited = dict(ssd_dampen(model, forget, full, alpha=alpha, lam=lam, exponent=exponent).named_parameters())
    selected = 0
    for name, p in model.named_parameters():
        entries = zip(*(t.flatten().tolist() for t in (p, forget[name], full[name], masks[name])), strict=True)
        expected = []
        for weight, f, d, chosen in entries:
            assert chosen == (f > alpha * d)
            selected += chosen
            expected.append(min((lam * d / f) ** exponent, 1.0) * weight if chosen else weight)
        torch.testing.assert_close(
            edited[name].flatten(), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0
        )
    assert 0 < selected < sum(p.numel() for p in model.parameters())


def test_selection_is_strict():
    one = {"w": torch.tensor([2.0, 2.0000002, 0.0, 1.0])}
    assert ssd_select(one, {"w": torch.tensor([1.0, 1.0, 0.0, 0.0])}, alpha=2.0)["w"].tolist() == [
        False,
        True,
        False,
        True,
    ]


def test_label_free_loss_is_the_mean_squared_norm_of_logits():
    model, (x, _) = net(), samples(6)
    expected = sum(float(logits @ logits) for logits in model(x).detach()) / 6
    assert float(squared_logits(model, (x,))) == pytest.approx(expected, rel=1e-12)
    assert float(squared_logits(model, x)) == pytest.approx(expected, rel=1e-12)
    garbage = torch.full((6,), 99)
    assert_same(
        ssd_importance(model, [(x, garbage)], loss_fn=squared_logits, power=1),
        ssd_importance(model, [(x,)], loss_fn=squared_logits, power=1),
    )


def test_importances_of_chosen_parameters_equal_those_of_all():
    model, (x, y) = net(), samples()
    full = ssd_importance(model, batches_of(x, y, 4))
    chosen = ssd_importance(model, batches_of(x, y, 4), params={"2.bias": model[2].bias})
    assert_same(chosen, {"2.bias": full["2.bias"]})


# --- checks of the spec ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [math.inf, 1e30])
def test_endless_alpha_returns_the_model_bit_identical(alpha):
    model = net()
    assert_same(state(ssd_dampen(model, *importances(model), alpha=alpha)), state(model))


def test_forget_importances_of_zero_return_the_model_bit_identical():
    model = net()
    forget, full = importances(model)
    nothing = {name: torch.zeros_like(value) for name, value in forget.items()}
    assert_same(state(ssd_dampen(model, nothing, full, alpha=1e-6)), state(model))
    assert_same(state(ssd_dampen(model, nothing, nothing, alpha=1e-6)), state(model))


def test_lam_above_the_largest_ratio_changes_nothing_even_where_selected():
    model = net()
    forget, full = importances(model)
    masks = ssd_select(forget, full, alpha=1.5)
    assert any(mask.any() for mask in masks.values())
    lam = max(float((forget[name][mask] / full[name][mask]).max()) for name, mask in masks.items() if mask.any())
    assert_same(state(ssd_dampen(model, forget, full, alpha=1.5, lam=1.01 * lam)), state(model))


def test_lam_of_zero_sets_selected_weights_to_exactly_zero():
    model = net()
    forget, full = importances(model)
    masks = ssd_select(forget, full, alpha=1.5)
    edited = state(ssd_dampen(model, forget, full, alpha=1.5, lam=0.0))
    for name, value in state(model).items():
        assert torch.equal(edited[name], torch.where(masks[name], torch.zeros_like(value), value))


@pytest.mark.parametrize("lam", [0.3, 1.0, 5.0])
def test_no_weight_grows_or_flips_and_unselected_entries_and_buffers_stay_bitwise(lam):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3)).double()
    x, y = samples()
    model(x)  # batch statistics that are not the initial ones
    model.eval()
    forget, full = (ssd_importance(model, batches_of(*rows, 4)) for rows in ((x[:8], y[:8]), (x, y)))
    masks = ssd_select(forget, full, alpha=1.2)
    before, after = state(model), state(ssd_dampen(model, forget, full, alpha=1.2, lam=lam))
    for name, old in before.items():
        new = after[name]
        if name not in masks:  # running mean, variance, count
            assert torch.equal(old, new)
            continue
        assert (new.abs() <= old.abs()).all()
        assert (new * old >= 0).all()
        assert torch.equal(new[~masks[name]], old[~masks[name]])
    assert lam > 1 or any(not torch.equal(before[name], after[name]) for name in masks)


def test_norm_gains_and_biases_are_edited_like_any_parameter():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))
    ones = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    edited = ssd_dampen(model, {n: 4 * v for n, v in ones.items()}, ones, alpha=2.0)
    for old, new in zip(model.parameters(), edited.parameters(), strict=True):
        assert torch.equal(new, old / 4)


def test_scaling_the_loss_multiplies_importances_by_its_square_and_leaves_the_edit():
    model, (x, y), c = net(), samples(), 7.0

    def scaled(model, batch):
        return c * cross_entropy_batch(model, batch)

    forget, full = importances(model)
    forget_c = ssd_importance(model, batches_of(x[:8], y[:8], 4), loss_fn=scaled)
    full_c = ssd_importance(model, batches_of(x, y, 4), loss_fn=scaled)
    for name in full:
        torch.testing.assert_close(full_c[name], c**2 * full[name])
        torch.testing.assert_close(forget_c[name], c**2 * forget[name])
    one, other = (state(ssd_dampen(model, *pair, alpha=1.5)) for pair in ((forget, full), (forget_c, full_c)))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("per_sample", [False, True])
def test_importance_is_invariant_to_the_order_of_batches(per_sample):
    model, (x, y) = net(), samples()
    pieces = batches_of(x, y, 4)
    one = ssd_importance(model, pieces, per_sample=per_sample)
    other = ssd_importance(model, pieces[::-1], per_sample=per_sample)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-12, atol=1e-16)


def test_batches_of_one_sample_equal_the_per_sample_path():
    model, (x, y) = net(), samples()
    one = ssd_importance(model, batches_of(x, y, 1))
    other = ssd_importance(model, batches_of(x, y, 9), per_sample=True)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-12, atol=1e-16)


def test_forget_set_equal_to_all_data_selects_nothing_from_alpha_one_on():
    model, (x, y) = net(), samples()
    imp = ssd_importance(model, batches_of(x, y, 4))
    for alpha in (1.0, 2.0):
        assert not any(mask.any() for mask in ssd_select(imp, imp, alpha=alpha).values())
    assert_same(state(ssd_dampen(model, imp, imp, alpha=1.0)), state(model))


def test_per_sample_ratio_cannot_exceed_all_over_forget_so_larger_alphas_select_nothing():
    model, (x, y) = net(), samples()
    forget = ssd_importance(model, [(x[:8], y[:8])], per_sample=True)
    full = ssd_importance(model, [(x, y)], per_sample=True)
    assert not any(mask.any() for mask in ssd_select(forget, full, alpha=24 / 8 + 1e-9).values())


@pytest.mark.parametrize("per_sample", [False, True])
def test_parameters_without_gradient_get_importance_zero_and_are_never_selected(per_sample):
    class WithUnused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.frozen, self.unused = nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(2, 2)
            self.frozen.weight.requires_grad_(False)

        def forward(self, x):
            return self.frozen(self.used(x).tanh())

    torch.manual_seed(0)
    model, (x, y) = WithUnused().double(), samples()
    forget = ssd_importance(model, batches_of(x[:8], y[:8], 4), per_sample=per_sample)
    full = ssd_importance(model, batches_of(x, y, 4), per_sample=per_sample)
    assert forget.keys() == dict(model.named_parameters()).keys()
    for name in ("unused.weight", "unused.bias", "frozen.weight"):
        assert torch.equal(forget[name], torch.zeros_like(forget[name]))
        assert not ssd_select(forget, full, alpha=1e-9)[name].any()
    assert forget["frozen.bias"].any()
    assert forget["used.weight"].any()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("per_sample", [False, True])
def test_mode_flags_and_grad_are_as_before(training, per_sample):
    model, (x, y) = net().train(training), samples()
    model[2].train(not training)
    model[0].bias.requires_grad_(False)
    before = state(model)
    ssd_importance(model, [(x, y)], per_sample=per_sample)
    with pytest.raises(InputError):
        ssd_importance(model, [(x * torch.inf, y)], per_sample=per_sample)
    assert [m.training for m in model] == [training, training, not training]
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]
    assert all(p.grad is None for p in model.parameters())
    assert_same(state(model), before)


def test_importance_is_taken_in_eval_mode_without_dropout_and_with_running_statistics():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Dropout(0.5), nn.Linear(7, 3)).double()
    x, y = samples()
    statistics = model[1].running_mean.clone()
    one, again = (ssd_importance(model.train(), batches_of(x, y, 4)) for _ in range(2))
    assert_same(one, again)
    assert torch.equal(model[1].running_mean, statistics)
    assert_same(one, ssd_importance(model.eval(), batches_of(x, y, 4)))


@pytest.mark.parametrize("per_sample", [False, True])
def test_parameters_whose_gradients_are_one_tensor_get_each_its_own_importance(per_sample):
    class TwoOffsets(nn.Module):  # like position and token embeddings, which are added up
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.zeros(4, 3))

        def forward(self, x):
            return x * (self.a + self.b)

    def loss(model, x):
        return model(x).pow(3).mean()

    x = torch.arange(1.0, 73.0).view(6, 4, 3)
    model, pieces = TwoOffsets(), x.split(1 if per_sample else 2)
    expected = torch.zeros(4, 3)
    for some in pieces:
        expected += torch.autograd.grad(loss(model, some), model.a)[0] ** 2 / len(pieces)
    actual = ssd_importance(model, x.split(2), loss_fn=loss, per_sample=per_sample)
    torch.testing.assert_close(actual["a"], expected)
    torch.testing.assert_close(actual["b"], expected)


# --- errors ---------------------------------------------------------------------------------------------------------


def test_empty_batches_are_an_error():
    with pytest.raises(InputError, match="batches is empty"):
        ssd_importance(net(), [])


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan])
def test_alpha_must_be_positive(alpha, digits_small, trained_cnn):
    model = net()
    pair = importances(model)
    calls = [
        lambda: ssd_select(*pair, alpha=alpha),
        lambda: ssd_dampen(model, *pair, alpha=alpha),
        lambda: SelectiveSynapticDampening(alpha=alpha),
        lambda: ssd(trained_cnn, digits_small.train, digits_small.train, alpha=alpha),
    ]
    for call in calls:
        with pytest.raises(InputError, match=rf"alpha is {alpha}.*greater than 0"):
            call()


@pytest.mark.parametrize("lam", [-0.5, math.nan])
def test_lam_must_not_be_negative(lam, digits_small, trained_cnn):
    model = net()
    pair = importances(model)
    calls = [
        lambda: ssd_dampen(model, *pair, lam=lam),
        lambda: SelectiveSynapticDampening(lam=lam),
        lambda: ssd(trained_cnn, digits_small.train, digits_small.train, lam=lam),
    ]
    for call in calls:
        with pytest.raises(InputError, match=rf"lam is {lam}.*at least 0"):
            call()


def test_missing_importance_keys_are_named():
    model = net()
    forget, full = importances(model)
    for pair in ({**forget, "extra": torch.ones(1)}, full), (forget, {**full, "extra": torch.ones(1)}):
        with pytest.raises(InputError, match="extra"):
            ssd_dampen(model, *pair)
    both = ({**forget, "extra": torch.ones(1)}, {**full, "extra": torch.ones(1)})
    with pytest.raises(InputError, match="extra"):
        ssd_dampen(model, *both)


def test_wrongly_shaped_importances_are_named_with_their_shape():
    model = net()
    forget, full = importances(model)
    wrong = torch.ones(4)
    with pytest.raises(InputError, match=r"2\.bias.*\(4,\).*\(3,\)"):
        ssd_dampen(model, {**forget, "2.bias": wrong}, full)
    with pytest.raises(InputError, match=r"2\.bias.*\(4,\).*\(3,\)"):
        ssd_dampen(model, {**forget, "2.bias": wrong}, {**full, "2.bias": wrong})


def test_bad_importances_leave_a_model_given_in_place_as_it_was():
    model = net()
    before = state(model)
    ones = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    forget = {**{name: 100 * value for name, value in ones.items()}, "2.bias": torch.full((4,), 100.0)}
    with pytest.raises(InputError, match=r"2\.bias"):
        ssd_dampen(model, forget, {**ones, "2.bias": torch.ones(4)}, inplace=True)
    assert_same(state(model), before)


@pytest.mark.parametrize("per_sample", [False, True])
def test_gradients_that_are_not_finite_name_the_tensor(per_sample):
    model, (x, y) = net(), samples()
    x[3, 2] = torch.inf
    with pytest.raises(InputError, match=r"gradient of 0\.weight is not finite"):
        ssd_importance(model, batches_of(x, y, 4), per_sample=per_sample)


def test_power_other_than_one_and_two_is_an_error():
    with pytest.raises(InputError, match="power is 3"):
        ssd_importance(net(), [samples()], power=3)


# --- the class that keeps importances -------------------------------------------------------------------------------


def test_kept_importances_serve_later_requests_with_their_forget_batches_only():
    model, (x, y) = net(), samples()
    edit = SelectiveSynapticDampening(alpha=1.5, lam=0.5).fit(model, batches_of(x, y, 4))
    full = {name: value.clone() for name, value in edit.full_imp.items()}
    first = edit(model, batches_of(x[:8], y[:8], 4))
    second = edit(first, batches_of(x[8:12], y[8:12], 4))
    assert_same(edit.full_imp, full)
    forget = ssd_importance(model, batches_of(x[:8], y[:8], 4))
    assert_same(state(first), state(ssd_dampen(model, forget, full, alpha=1.5, lam=0.5)))
    later = ssd_importance(first, batches_of(x[8:12], y[8:12], 4))
    assert_same(state(second), state(ssd_dampen(first, later, full, alpha=1.5, lam=0.5)))


def test_report_counts_what_was_selected():
    model, (x, y) = net(), samples()
    edit = SelectiveSynapticDampening(alpha=1.5, lam=0.5).fit(model, batches_of(x, y, 4))
    edited = dict(edit(model, batches_of(x[:8], y[:8], 4)).named_parameters())
    factors = []
    for name, p in model.named_parameters():
        changed = edited[name] != p
        assert edit.report.selected[name] == int(changed.sum())
        assert edit.report.share[name] == pytest.approx(int(changed.sum()) / p.numel())
        factors += (edited[name] / p)[changed].tolist()
    assert edit.report.mean_factor == pytest.approx(sum(factors) / len(factors))
    edit.alpha = 1e30
    edit(model, batches_of(x[:8], y[:8], 4))
    assert edit.report.mean_factor == 1.0
    assert set(edit.report.selected.values()) == {0}


def test_request_before_fit_is_an_error():
    with pytest.raises(InputError, match="fit"):
        SelectiveSynapticDampening()(net(), [samples()])


# --- the plug-in ----------------------------------------------------------------------------------------------------


def test_forgets_a_class_of_digits_and_keeps_the_others(trained_cnn):
    before = test_accuracies(trained_cnn)
    forgotten, others = test_accuracies(ssd(trained_cnn, *one_class(), alpha=5.0))
    assert min(before) > 90
    assert forgotten < 20
    assert others > 80


def test_plug_in_equals_its_parts(trained_cnn, digits_small):
    data = digits_small.train
    forget, retain = subset(data, range(24)), subset(data, range(24, 240))
    forget_imp = ssd_importance(trained_cnn, [(forget.inputs, forget.targets)], per_sample=True)
    full_imp = ssd_importance(trained_cnn, [(data.inputs, data.targets)], per_sample=True)
    expected = ssd_dampen(trained_cnn, forget_imp, full_imp, alpha=3.0, lam=0.5)
    actual = ssd(trained_cnn, forget, retain, alpha=3.0, lam=0.5, batch_size=50)
    for (name, p), q in zip(expected.named_parameters(), actual.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-3, atol=1e-5, msg=name)
    assert not torch.equal(actual.head.weight, trained_cnn.head.weight)


@pytest.mark.parametrize("per_sample", [False, True])
def test_edits_a_real_vit_and_takes_mappings_as_batches(tiny_vit, digits_small, per_sample):
    data = digits_small.train
    rows = torch.cat([torch.arange(12), torch.arange(24, 60)])
    x, y = data.inputs[rows], data.targets[rows]
    forget, retain = TensorData(x[:12], y[:12]), TensorData(x[12:], y[12:])
    edited = ssd(tiny_vit, forget, retain, alpha=1.5, lam=0.5, per_sample=per_sample, batch_size=12)
    assert type(edited) is type(tiny_vit)
    changed = 0
    for old, new in zip(tiny_vit.parameters(), edited.parameters(), strict=True):
        assert (new.abs() <= old.abs()).all()
        changed += int((new != old).sum())
    assert 0 < changed < sum(p.numel() for p in tiny_vit.parameters())
    named = ({"pixel_values": x[:12]}, y[:12]), ({"pixel_values": x[12:]}, y[12:])
    same = ssd(tiny_vit, *named, alpha=1.5, lam=0.5, per_sample=per_sample, batch_size=12)
    assert_same(state(same), state(edited))


def test_per_sample_importances_of_a_real_vit_equal_single_backward_passes(tiny_vit, digits_small):
    x, y = digits_small.train.inputs[::40], digits_small.train.targets[::40]
    actual = ssd_importance(tiny_vit, [(x, y)], per_sample=True)
    expected = {name: torch.zeros_like(p) for name, p in tiny_vit.named_parameters()}
    for i in range(len(x)):
        loss = F.cross_entropy(tiny_vit(x[i : i + 1]).logits, y[i : i + 1])
        gradients = torch.autograd.grad(loss, list(tiny_vit.parameters()))
        for name, g in zip(expected, gradients, strict=True):
            expected[name] += g**2 / len(x)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-3, atol=1e-9, msg=name)


def test_tied_weights_are_edited_once(tiny_llama):
    tiny_llama.lm_head.weight = tiny_llama.model.embed_tokens.weight
    ones = {name: torch.ones_like(p) for name, p in tiny_llama.named_parameters()}
    assert "lm_head.weight" not in ones
    edited = ssd_dampen(tiny_llama, {n: 4 * v for n, v in ones.items()}, ones, alpha=2.0)
    assert edited.lm_head.weight is edited.model.embed_tokens.weight
    assert torch.equal(edited.lm_head.weight, tiny_llama.lm_head.weight / 4)


def test_works_with_any_loss_on_a_real_llama(tiny_llama):
    ids = torch.arange(24).view(4, 6)

    def next_token(model, batch):
        logits = model(input_ids=batch["input_ids"]).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())

    batches = [{"input_ids": ids[:2]}, {"input_ids": ids[2:]}]
    edit = SelectiveSynapticDampening(alpha=1.2, loss_fn=next_token).fit(tiny_llama, batches)
    edited = edit(tiny_llama, batches[:1])
    assert sum(edit.report.selected.values()) > 0
    assert not torch.equal(edited.model.embed_tokens.weight, tiny_llama.model.embed_tokens.weight)


@pytest.mark.parametrize("training", [False, True])
def test_given_model_stays_bit_identical_unless_in_place(trained_cnn, digits_small, training):
    data = digits_small.train
    forget, retain = subset(data, range(24)), subset(data, range(24, 240))
    model = copy.deepcopy(trained_cnn).train(training)
    model.conv1.bias.requires_grad_(False)
    before = state(model)
    edited = ssd(model, forget, retain, alpha=2.0)
    assert edited is not model
    assert_same(state(model), before)
    assert ssd(model, forget, retain, alpha=2.0, inplace=True) is model
    assert_same(state(model), state(edited))
    assert not torch.equal(model.head.weight, before["head.weight"])
    for one in (model, edited):
        assert all(module.training == training for module in one.modules())
        assert [name for name, p in one.named_parameters() if not p.requires_grad] == ["conv1.bias"]
        assert all(p.grad is None for p in one.parameters())


def test_twice_the_same_bits_and_no_global_randomness(trained_cnn, digits_small, global_rng_untouched):
    data = digits_small.train
    forget, retain = subset(data, range(24)), subset(data, range(24, 240))
    one, other = (ssd(trained_cnn, forget, retain, alpha=2.0) for _ in range(2))
    assert_same(state(one), state(other))


def test_warns_when_alpha_selects_nothing(trained_cnn, digits_small):
    data = digits_small.train
    with pytest.warns(UserWarning, match="alpha=1000.0 selected no weight"):
        edited = ssd(trained_cnn, subset(data, range(24)), subset(data, range(24, 240)), alpha=1000.0)
    assert_same(state(edited), state(trained_cnn))


def test_empty_forget_set_is_an_error(trained_cnn, digits_small):
    with pytest.raises(InputError, match="empty"):
        ssd(trained_cnn, subset(digits_small.train, []), digits_small.train)
