import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from retouch.core.data import TensorData, subset
from retouch.core.errors import InputError
from retouch.forget.dmm import (
    classification_margins,
    datamodel_matching,
    dmm,
    fit_datamodels,
    fresh_like,
    half_subsets,
    klom,
    matching_indices,
    oracle_matching,
    simulated_oracle_logits,
)
from retouch.worlds import digits


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def samples(count=20, seed=1):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, dtype=torch.float64, generator=draw)
    return TensorData(x, torch.randint(3, (count,), generator=draw))


def random_datamodel(n=20, x=20, k=3, seed=2):
    return 0.3 * torch.randn(n, x, k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


# --- the authors' numbers -------------------------------------------------------------------------------------------


def test_golden_margins_and_klom(golden):
    case = golden("dmm")
    case.close("out_margins", classification_margins(torch.tensor(case.in_logits), torch.tensor(case.in_labels)))
    settings = {"bins": int(case.param_bins), "clip": float(case.param_clip), "eps": float(case.param_eps)}
    sides = torch.tensor(case.in_unlearned_margins), torch.tensor(case.in_oracle_margins)
    case.close("out_klom", klom(*sides, **settings))
    case.close("out_klom", klom(*sides))  # these are the defaults


# --- margins and KLoM -----------------------------------------------------------------------------------------------


def klom_by_numpy(unlearned, oracle, bins=20, clip=100.0, eps=1e-5):
    values = []
    for p_all, q_all in zip(unlearned.T, oracle.T, strict=True):
        p_all, q_all = np.clip(p_all, -clip, clip), np.clip(q_all, -clip, clip)
        low, high = min(p_all.min(), q_all.min()), max(p_all.max(), q_all.max())
        edges = np.linspace(low, high if high > low else low + 1, bins + 1)
        counts = [
            np.array([np.sum(np.digitize(side, edges) == i) for i in range(1, bins + 1)], dtype=float)
            for side in (p_all, q_all)
        ]
        p, q = (count / count.sum() for count in counts)  # the largest sample is in bin 21 and not counted
        q = np.where(p > 0, np.maximum(q, eps), q)
        q = q / q.sum()
        values.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))
    return np.array(values)


@pytest.mark.parametrize(("models", "bins", "scale"), [(100, 20, 1.0), (7, 20, 1.0), (30, 5, 1.0), (40, 20, 80.0)])
def test_klom_equals_histograms_by_numpy_digitize(models, bins, scale):
    draw = np.random.default_rng(0)
    unlearned = scale * draw.normal(1.0, 2.0, (models, 12))
    oracle = scale * draw.normal(0.0, 1.0, (models + 3, 12))
    unlearned[:, 0] = np.round(unlearned[:, 0])  # ties and samples on edges
    oracle[:, 0] = np.round(oracle[:, 0])
    np.testing.assert_allclose(klom(unlearned, oracle, bins=bins), klom_by_numpy(unlearned, oracle, bins), rtol=1e-9)


def test_klom_of_equal_sides_is_zero():
    draw = torch.randn(50, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert klom(draw, draw).abs().max() < 1e-12


def test_klom_is_not_negative():
    draw = torch.Generator().manual_seed(0)
    for models in (2, 3, 10, 100):
        sides = (torch.randn(models, 40, dtype=torch.float64, generator=draw) for _ in range(2))
        assert klom(*sides).min() > -1e-9


def test_klom_is_invariant_to_permuting_models():
    draw = torch.Generator().manual_seed(0)
    one, other = (torch.randn(30, 8, dtype=torch.float64, generator=draw) for _ in range(2))
    order = torch.randperm(30, generator=draw)
    torch.testing.assert_close(klom(one[order], other), klom(one, other), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(klom(one, other[order]), klom(one, other), rtol=1e-12, atol=1e-14)


def test_klom_clips_extreme_values():
    draw = torch.Generator().manual_seed(0)
    one, other = (20 * torch.randn(30, 4, dtype=torch.float64, generator=draw) for _ in range(2))
    wild, cut = one.clone(), one.clone()
    wild[0], wild[1], cut[0], cut[1] = 1e9, -1e9, 100.0, -100.0
    assert torch.equal(klom(wild, other), klom(cut, other))
    wild[0], wild[1], cut[0], cut[1] = 1e9, -math.inf, 7.0, -7.0
    wild.clamp_(max=1e9)
    assert torch.equal(klom(wild, other, clip=7.0), klom(cut.clamp(-7, 7), other.clamp(-7, 7), clip=1e6))


def test_klom_of_constant_inputs_is_zero_with_a_range_of_one():
    constant = torch.full((5, 3), 2.5)
    assert torch.equal(klom(constant, constant), torch.zeros(3, dtype=torch.float64))


def test_klom_of_distributions_that_do_not_meet_is_that_of_the_floor():
    low, high = torch.linspace(0, 1, 50)[:, None], torch.linspace(9, 10, 50)[:, None]
    torch.testing.assert_close(
        klom(low, high), torch.from_numpy(klom_by_numpy(low.numpy(), high.numpy())), rtol=1e-5, atol=0
    )
    assert float(klom(low, high)) > 9  # about -log(1e-5) less the entropy


def test_margin_by_loops():
    logits = torch.randn(4, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 3, 4, 0, 1])
    actual = classification_margins(logits, labels)
    assert actual.shape == (4, 7)
    for m in range(4):
        for i in range(7):
            others = [math.exp(v) for c, v in enumerate(logits[m, i].tolist()) if c != labels[i]]
            expected = float(logits[m, i, labels[i]]) - math.log(sum(others))
            assert float(actual[m, i]) == pytest.approx(expected, rel=1e-12)
    assert torch.equal(classification_margins(logits[0], labels), actual[0])


def test_margin_is_unchanged_by_a_constant_on_all_logits():
    logits = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 3, 4, 0, 1])
    shifted = logits + torch.linspace(-50, 50, 7, dtype=torch.float64)[:, None]
    torch.testing.assert_close(classification_margins(shifted, labels), classification_margins(logits, labels))


def test_margin_of_two_classes_is_the_difference():
    logits = torch.tensor([[1.0, 4.0], [2.0, -3.0]])
    assert classification_margins(logits, torch.tensor([0, 0])).tolist() == [-3.0, 5.0]
    assert classification_margins(logits, torch.tensor([1, 1])).tolist() == [3.0, -5.0]


# --- datamodels -----------------------------------------------------------------------------------------------------


def subset_outputs(models=60, points=12, x=5, k=3, noise=0.0):
    masks = half_subsets(models, points, seed=3)
    draw = torch.Generator().manual_seed(0)
    beta = torch.randn(points, x, k, dtype=torch.float64, generator=draw)
    outputs = torch.einsum("mn,nxk->mxk", masks.double(), beta) + 10.0
    return masks, outputs + noise * torch.randn(outputs.shape, dtype=torch.float64, generator=draw), beta


def test_datamodels_recover_beta_exactly_and_leave_the_intercept_out():
    """Of Bernoulli masks: with exactly half the points in each the sum of a row is known and the intercept is not."""
    draw = torch.Generator().manual_seed(4)
    masks = torch.rand(60, 12, generator=draw) < 0.5
    beta = torch.randn(12, 5, 3, dtype=torch.float64, generator=draw)
    for intercept in (0.0, 100.0):
        outputs = torch.einsum("mn,nxk->mxk", masks.double(), beta) + intercept
        for strength in (0.0, 1e-10):
            torch.testing.assert_close(fit_datamodels(masks, outputs, strength=strength), beta, rtol=1e-8, atol=1e-8)
        lasso = fit_datamodels(masks, outputs, method="lasso", strength=1e-8)
        torch.testing.assert_close(lasso, beta, rtol=1e-3, atol=1e-4)


def test_datamodels_recover_beta_with_the_fewest_models_that_suffice():
    draw = torch.Generator().manual_seed(4)
    masks = torch.rand(14, 12, generator=draw) < 0.5
    assert torch.linalg.matrix_rank(masks.double() - masks.double().mean(0)) == 12
    beta = torch.randn(12, 5, 3, dtype=torch.float64, generator=draw)
    outputs = torch.einsum("mn,nxk->mxk", masks.double(), beta) - 3
    torch.testing.assert_close(fit_datamodels(masks, outputs, strength=0.0), beta, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("strength", [0.1, 3.0, 500.0])
@pytest.mark.parametrize("models", [8, 60])
def test_ridge_equals_scikit_learn(strength, models):
    from sklearn.linear_model import Ridge

    masks, outputs, _ = subset_outputs(models=models, noise=0.5)
    theirs = Ridge(alpha=strength).fit(masks.double().numpy(), outputs.flatten(1).numpy()).coef_.T
    actual = fit_datamodels(masks, outputs, strength=strength)
    np.testing.assert_allclose(actual.flatten(1), theirs, rtol=1e-7, atol=1e-9)


def test_lasso_equals_scikit_learn():
    from sklearn.linear_model import Lasso

    masks, outputs, _ = subset_outputs(noise=0.5)
    theirs = Lasso(alpha=0.05).fit(masks.double().numpy(), outputs.flatten(1).numpy()).coef_.T
    actual = fit_datamodels(masks, outputs, method="lasso", strength=0.05)
    np.testing.assert_allclose(actual.flatten(1), theirs, rtol=1e-6, atol=1e-8)
    assert (actual == 0).any()
    chosen = fit_datamodels(masks, outputs, method="lasso")
    assert chosen.shape == actual.shape
    assert torch.isfinite(chosen).all()


def test_lasso_of_a_single_output():
    masks, outputs, beta = subset_outputs(x=1, k=1)
    assert fit_datamodels(masks, outputs, method="lasso", strength=1e-3).shape == beta.shape


@pytest.mark.parametrize("noise", [0.01, 2.0, 20.0])
def test_strength_that_is_not_given_has_the_least_leave_one_out_error(noise):
    from sklearn.linear_model import Ridge

    masks, outputs, _ = subset_outputs(models=25, points=8, noise=noise)
    a, b = masks.double().numpy(), outputs.flatten(1).numpy()
    errors = {}
    for strength in 10.0 ** np.arange(-2, 4.5, 0.5):
        residuals = []
        for row in range(len(a)):
            rest = np.arange(len(a)) != row
            residuals.append(Ridge(alpha=strength).fit(a[rest], b[rest]).predict(a[row : row + 1])[0] - b[row])
        errors[strength] = np.mean(np.square(residuals))
    best = min(errors, key=errors.get)
    expected = fit_datamodels(masks, outputs, strength=best)
    torch.testing.assert_close(fit_datamodels(masks, outputs), expected, rtol=1e-9, atol=1e-12)


def test_datamodels_keep_the_outputs_dtype():
    masks, outputs, beta = subset_outputs(models=200)
    half = fit_datamodels(masks.float(), outputs.half())
    assert half.dtype == torch.float16
    centred = beta - beta.mean(0)  # masks of exactly half the points say nothing about a common part
    torch.testing.assert_close((half.double() - half.double().mean(0)), centred, rtol=0.05, atol=0.05)


def test_half_subsets_hold_exactly_half_and_every_point_equally_often(global_rng_untouched):
    masks = half_subsets(400, 31, seed=1)
    assert masks.dtype == torch.bool
    assert (masks.sum(1) == 15).all()
    assert (masks.double().mean(0) - 15 / 31).abs().max() < 6 * 0.5 / math.sqrt(400)
    assert torch.equal(masks, half_subsets(400, 31, seed=1))
    assert not torch.equal(masks, half_subsets(400, 31, seed=2))
    assert (half_subsets(3, 10, share=0.25).sum(1) == 2).all()
    assert half_subsets(3, 10, share=1.0).all()


# --- the simulated oracle -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multiplier", [1.0, 0.5, -2.0])
def test_simulated_oracle_is_logits_minus_the_sum_of_effects(multiplier):
    datamodel, index, forget = random_datamodel(), [3, 0, 19, 3], [1, 4, 7]
    logits = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    actual = simulated_oracle_logits(logits, datamodel, forget, index, multiplier=multiplier)
    assert torch.equal(actual, logits - multiplier * datamodel[forget].sum(0)[index])
    for row, x in enumerate(index):
        for c in range(3):
            effect = sum(float(datamodel[i, x, c]) for i in forget)
            assert float(actual[row, c]) == pytest.approx(float(logits[row, c]) - multiplier * effect, rel=1e-12)


def test_simulated_oracle_is_additive_over_disjoint_forget_sets():
    datamodel, index = random_datamodel(), torch.arange(20)
    logits = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    both = simulated_oracle_logits(logits, datamodel, [1, 4, 7, 9], index)
    one_by_one = simulated_oracle_logits(
        simulated_oracle_logits(logits, datamodel, [4, 9], index), datamodel, [1, 7], index
    )
    torch.testing.assert_close(both, one_by_one, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("forget", "multiplier"), [([], 1.0), ([1, 2], 0.0)])
def test_simulated_oracle_of_an_empty_set_or_multiplier_zero_is_the_model(forget, multiplier):
    logits = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    oracle = simulated_oracle_logits(logits, random_datamodel(), forget, range(20), multiplier=multiplier)
    assert torch.equal(oracle, logits)


def test_convex_check_matching_the_simulated_oracle_reaches_the_closed_form_leave_out_solution():
    """Linear regression with exact influence: the effects of the forget points, removed one after the other."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(40, 5, dtype=torch.float64, generator=draw)
    y = x @ torch.randn(5, 2, dtype=torch.float64, generator=draw) + torch.randn(
        40, 2, dtype=torch.float64, generator=draw
    )
    forget = [3, 11, 17, 30]

    def solution(without):
        kept = [i for i in range(40) if i not in without]
        return torch.linalg.lstsq(x[kept], y[kept]).solution  # (5, 2)

    datamodel = torch.zeros(40, 40, 2, dtype=torch.float64)
    for number, i in enumerate(forget):
        datamodel[i] = x @ (solution(forget[:number]) - solution(forget[: number + 1]))
    everything, oracle = solution([]), solution(forget)
    rows = matching_indices(forget, 40)
    targets = simulated_oracle_logits(x[rows] @ everything, datamodel, forget, rows)
    matched = torch.linalg.lstsq(x[rows], targets).solution
    torch.testing.assert_close(matched, oracle, rtol=0, atol=1e-9)
    assert (everything - oracle).abs().max() > 0.01

    model = nn.Linear(5, 2, bias=False).double()
    model.weight.data = everything.T.clone()
    settings = {"epochs": 100, "lr": 0.05, "batch_size": 2}
    trained = datamodel_matching(model, TensorData(x, torch.zeros(40)), forget, datamodel, **settings)
    assert (trained.weight.T - oracle).abs().max() < 1e-6

    retained = [i for i in range(40) if i not in forget]
    plain = copy.deepcopy(model)  # descent on the retained points' labels, for as many steps, does not come as far
    plain.weight.data = everything.T.clone()
    adam = torch.optim.Adam(plain.parameters(), lr=0.05)
    for step in range(800):
        adam.param_groups[0]["lr"] = 0.05 * 0.95 ** (step // 8)
        rows = torch.tensor(retained)[torch.randint(36, (2,), generator=draw)]
        adam.zero_grad()
        F.mse_loss(plain(x[rows]), y[rows]).backward()
        adam.step()
    assert (plain.weight.T - oracle).abs().max() > 1e-4


# --- the matching set -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("retain", "forget", "expected"),
    [
        (3.0, 1.0, (18, 6)),
        (0.0, 1.0, (0, 6)),
        (2.5, 2.0, (15, 12)),
        (1.0, 2.5, (6, 15)),
        (0.5, 0.5, (3, 3)),
        (1.0, 0.0, (6, 0)),
    ],
)
def test_matching_set_repeats_forget_points_and_draws_retained_ones_without_replacement(retain, forget, expected):
    points = [9, 2, 30, 4, 15, 7]
    rows = matching_indices(points, 50, retain_multiplier=retain, forget_multiplier=forget)
    chosen = [i for i in rows.tolist() if i in points]
    drawn = [i for i in rows.tolist() if i not in points]
    assert (len(drawn), len(chosen)) == expected
    assert len(set(drawn)) == len(drawn)
    assert all(0 <= i < 50 for i in drawn)
    whole, part = divmod(forget, 1)
    assert chosen == points * int(whole) + points[: int(part * 6)]  # a fraction takes the first share again


def test_matching_set_takes_every_retained_point_at_most_once_up_to_all(global_rng_untouched):
    rows = matching_indices([0, 1, 2, 3, 4], 20, retain_multiplier=3.0)
    assert sorted(rows.tolist()) == list(range(20))
    assert torch.equal(rows, matching_indices([0, 1, 2, 3, 4], 20, retain_multiplier=3.0, seed=42))
    assert not torch.equal(rows, matching_indices([0, 1, 2, 3, 4], 20, retain_multiplier=3.0, seed=43))


# --- matching -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["mse", "ce"])
@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_matching_equals_a_plain_loop(loss, decay):
    """Whole batches, so that the order does not matter: Adam, its rate times 0.95 an epoch, the start's target."""
    model, data, datamodel, forget = net(), samples(), random_datamodel(), [2, 5, 6]
    actual = datamodel_matching(
        model,
        data,
        forget,
        datamodel,
        epochs=6,
        lr=0.02,
        multiplier=0.8,
        forget_multiplier=2.0,
        loss=loss,
        weight_decay_to_start=decay,
    )
    rows = matching_indices(forget, 20, forget_multiplier=2.0)
    x = data.inputs[rows]
    with torch.no_grad():
        target = model(x) - 0.8 * (datamodel[2] + datamodel[5] + datamodel[6])[rows]
    expected, start = copy.deepcopy(model), flat(model)
    for p in expected.parameters():
        p.first, p.second = torch.zeros_like(p), torch.zeros_like(p)
    for epoch in range(6):
        logits = expected(x)
        if loss == "mse":
            value = ((logits - target) ** 2).sum() / logits.numel()
        else:
            value = -(target.softmax(1) * logits.log_softmax(1)).sum() / len(x)
        weights = torch.cat([p.flatten() for p in expected.parameters()])
        value = value + decay * ((weights - start) ** 2).sum()
        gradients = torch.autograd.grad(value, list(expected.parameters()))
        for p, g in zip(expected.parameters(), gradients, strict=True):
            p.first = 0.9 * p.first + 0.1 * g
            p.second = 0.999 * p.second + 0.001 * g**2
            hat = p.first / (1 - 0.9 ** (epoch + 1)), p.second / (1 - 0.999 ** (epoch + 1))
            p.data -= 0.02 * 0.95**epoch * hat[0] / (hat[1].sqrt() + 1e-8)
    torch.testing.assert_close(flat(actual), flat(expected), rtol=1e-6, atol=1e-8)
    assert (flat(actual) - start).abs().max() > 0.01


def test_learning_rate_falls_with_epochs_and_not_with_steps():
    """Where the gradient's sign does not change, Adam moves by the sum of the rates."""
    model = nn.Linear(1, 1, bias=False).double()
    data = TensorData(torch.ones(8, 1, dtype=torch.float64))
    datamodel = torch.full((8, 8, 1), -1e6, dtype=torch.float64)
    edited = datamodel_matching(model, data, [0, 1], datamodel, epochs=3, lr=0.1, batch_size=2)  # 8 rows: 4 steps
    moved = (edited.weight - model.weight).item()
    assert moved == pytest.approx(4 * 0.1 * (1 + 0.95 + 0.95**2), rel=1e-3)


@pytest.mark.parametrize("loss", ["mse", "ce"])
def test_oracle_matching_equals_a_plain_loop_with_the_mean_oracle(loss):
    model, data, forget = net(), samples(), [2, 5, 6]
    oracles = [net(seed) for seed in (1, 2, 3)]
    actual = oracle_matching(model, oracles, data, forget, epochs=3, lr=0.02, loss=loss)
    x = data.inputs[matching_indices(forget, 20)]
    with torch.no_grad():
        answers = [oracle(x) if loss == "mse" else oracle(x).softmax(1) for oracle in oracles]
    target, expected = sum(answers) / 3, copy.deepcopy(model)
    adam = torch.optim.Adam(expected.parameters(), lr=0.02)
    for epoch in range(3):
        adam.param_groups[0]["lr"] = 0.02 * 0.95**epoch
        adam.zero_grad()
        logits = expected(x)
        value = (logits - target).square().mean() if loss == "mse" else -(target * logits.log_softmax(1)).sum(1).mean()
        value.backward()
        adam.step()
    torch.testing.assert_close(flat(actual), flat(expected), rtol=1e-6, atol=1e-9)


def test_oracle_matching_with_the_model_as_its_own_oracle_changes_nothing():
    model = net()
    assert_same(state(oracle_matching(model, [model, copy.deepcopy(model)], samples(), [1, 2], lr=0.1)), state(model))


@pytest.mark.parametrize(("forget", "multiplier"), [([], 1.0), ([1, 5, 9], 0.0)])
def test_empty_forget_set_or_multiplier_zero_keeps_parameters_bitwise(forget, multiplier):
    model = net()
    edited = datamodel_matching(
        model, samples(), forget, random_datamodel(), multiplier=multiplier, lr=0.1, batch_size=5
    )
    assert edited is not model
    assert_same(state(edited), state(model))


def test_multiplier_zero_keeps_parameters_of_real_models_bitwise(trained_cnn, tiny_vit, digits_small):
    data = subset(digits_small.train, range(40))
    for model in (trained_cnn, tiny_vit):
        edited = datamodel_matching(model, data, [1, 2], torch.ones(40, 40, 10), multiplier=0.0, epochs=2)
        assert_same(state(edited), state(model))


def test_permuted_labels_give_the_identical_result():
    data, datamodel = samples(), random_datamodel()
    runs = [
        datamodel_matching(net(), TensorData(data.inputs, labels), [1, 2], datamodel, lr=0.01, batch_size=4)
        for labels in (data.targets, data.targets.flip(0), torch.full((20,), -9), None)
    ]
    for run in runs[1:]:
        assert_same(state(run), state(runs[0]))
    assert not torch.equal(flat(runs[0]), flat(net()))


def test_matches_towards_the_simulated_oracle(trained_cnn, digits_small):
    data, forget = subset(digits_small.train, range(0, 240, 3)), [0, 1, 2, 3]
    datamodel = torch.zeros(80, 80, 10)
    datamodel[forget] = torch.linspace(-1, 1, 10)  # as if each forget point raised the logits of later classes
    edited = datamodel_matching(trained_cnn, data, forget, datamodel, epochs=60, lr=3e-3, batch_size=16)
    rows = matching_indices(forget, 80)
    with torch.no_grad():
        before, after = (model(data.inputs[rows]) for model in (trained_cnn, edited))
    target = simulated_oracle_logits(before, datamodel, forget, rows)
    assert (after - target).square().mean() < 0.1 * (before - target).square().mean()


# --- the plug-in ----------------------------------------------------------------------------------------------------


class Mlp(nn.Module):
    def __init__(self, hidden=16):
        super().__init__()
        self.config = {"hidden": hidden}
        self.body, self.head = nn.Linear(64, hidden), nn.Linear(hidden, 10)

    def forward(self, x):
        return self.head(self.body(x.flatten(1)).relu())


QUICK = {"models": 6, "model_epochs": 2, "epochs": 2}


def test_plug_in_end_to_end_moves_forget_points_as_retraining_would():
    """Points with a wrong label: models trained without them do not know it, so their margin must fall."""
    from retouch.core.loop import fit

    data = digits.data("train")
    x, y = data.inputs[:60], data.targets[:60].clone()
    y[:3] = (y[:3] + 5) % 10
    torch.manual_seed(0)
    model = Mlp()
    fit(model, TensorData(x, y), epochs=60, batch_size=32, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    forget, retain = TensorData(x[:3], y[:3]), TensorData(x[3:], y[3:])
    edited = dmm(model, forget, retain, models=96, model_epochs=20, model_batch_size=32, epochs=40, lr=5e-3)
    with torch.no_grad():
        before, after = (classification_margins(one(x), y) for one in (model, edited))
    assert (before > 0).all()
    change = after - before
    assert (change[:3] < -0.1).all()
    assert change[:3].mean() < -0.3
    assert change[3:].abs().mean() < 0.5 * change[:3].abs().mean()
    assert (after[3:] > 0).all()


def test_plug_in_equals_its_parts(digits_small):
    from torch.optim.lr_scheduler import OneCycleLR

    from retouch.core.ensemble import train_many

    data = subset(digits_small.train, range(0, 240, 6))
    torch.manual_seed(0)
    model = Mlp()
    edited = dmm(model, subset(data, range(4)), subset(data, range(4, 40)), model_lr=0.02, seed=7, **QUICK)
    masks = half_subsets(6, 40, seed=7)
    trained = train_many(
        Mlp,
        data,
        masks,
        epochs=2,
        optimizer=lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
        scheduler=lambda optimizer, steps: OneCycleLR(optimizer, 0.02, total_steps=steps),
        seed=7,
    )
    datamodel = fit_datamodels(masks, trained.logits(data.inputs))
    expected = datamodel_matching(model, data, range(4), datamodel, epochs=2, seed=7)
    assert_same(state(edited), state(expected))
    given = dmm(model, subset(data, range(4)), subset(data, range(4, 40)), datamodel=datamodel, seed=7, epochs=2)
    assert_same(state(edited), state(given))


def test_runs_on_a_real_vit_and_trains_subset_models_like_it(tiny_vit, digits_small):
    data = subset(digits_small.train, range(0, 240, 6))
    edited = dmm(tiny_vit, subset(data, range(4)), subset(data, range(4, 40)), **{**QUICK, "models": 3})
    assert type(edited) is type(tiny_vit)
    assert not torch.equal(flat(edited), flat(tiny_vit))
    assert torch.isfinite(flat(edited)).all()


def test_untrained_models_of_the_same_architecture(tiny_vit, trained_cnn):
    for model in (tiny_vit, trained_cnn, Mlp(5)):
        one = fresh_like(model)()
        assert type(one) is type(model)
        assert [p.shape for p in one.parameters()] == [p.shape for p in model.parameters()]
        assert not torch.equal(flat(one), flat(model))


@pytest.mark.parametrize("training", [False, True])
def test_given_model_stays_bit_identical_unless_in_place(trained_cnn, digits_small, training):
    data = subset(digits_small.train, range(0, 240, 6))
    model = copy.deepcopy(trained_cnn).train(training)
    model.conv1.bias.requires_grad_(False)
    before, parts = state(model), (subset(data, range(4)), subset(data, range(4, 40)))
    datamodel = torch.randn(40, 40, 10, generator=torch.Generator().manual_seed(0))
    edited = dmm(model, *parts, datamodel=datamodel, epochs=2)
    assert edited is not model
    assert_same(state(model), before)
    assert dmm(model, *parts, datamodel=datamodel, epochs=2, inplace=True) is model
    assert_same(state(model), state(edited))
    assert not torch.equal(model.head.weight, before["head.weight"])
    assert torch.equal(model.conv1.bias, before["conv1.bias"])
    for one in (model, edited):
        assert all(module.training == training for module in one.modules())
        assert [name for name, p in one.named_parameters() if not p.requires_grad] == ["conv1.bias"]


def test_start_is_the_oracle_s_base_also_in_place():
    """The frozen copy is made before training, so that the target does not run away with the weights."""
    runs = [
        datamodel_matching(model, samples(), [1, 2], random_datamodel(), lr=0.05, batch_size=4, inplace=inplace)
        for model, inplace in ((net(), False), (net(), True))
    ]
    assert_same(state(runs[0]), state(runs[1]))


def test_same_seed_same_bits_and_no_global_randomness(trained_cnn, digits_small, global_rng_untouched):
    data = subset(digits_small.train, range(0, 240, 6))
    parts = subset(data, range(4)), subset(data, range(4, 40))
    runs = [dmm(trained_cnn, *parts, seed=seed, **{**QUICK, "models": 3}) for seed in (5, 5, 6)]
    assert_same(state(runs[0]), state(runs[1]))
    assert not torch.equal(runs[0].head.weight, runs[2].head.weight)


def test_retain_multiplier_of_the_plug_in_is_cut_to_what_is_there(trained_cnn, digits_small):
    data = subset(digits_small.train, range(0, 240, 6))
    datamodel = torch.randn(40, 40, 10, generator=torch.Generator().manual_seed(0))
    parts = subset(data, range(30)), subset(data, range(30, 40))
    one, other = (dmm(trained_cnn, *parts, datamodel=datamodel, retain_multiplier=r, epochs=1) for r in (3.0, 1 / 3))
    assert_same(state(one), state(other))


def test_plug_in_with_an_empty_forget_set_changes_nothing(trained_cnn, digits_small):
    data = subset(digits_small.train, range(10))
    edited = dmm(trained_cnn, subset(data, []), data, datamodel=torch.ones(10, 10, 10))
    assert_same(state(edited), state(trained_cnn))


# --- errors ---------------------------------------------------------------------------------------------------------


def calls_with(forget):
    model, data, datamodel = net(), samples(), random_datamodel()
    return [
        lambda: matching_indices(forget, 20),
        lambda: simulated_oracle_logits(torch.zeros(20, 3), datamodel, forget, range(20)),
        lambda: datamodel_matching(model, data, forget, datamodel),
        lambda: oracle_matching(model, [model], data, forget),
    ]


def test_duplicated_forget_indices_are_an_error_that_names_one():
    for call in calls_with([3, 17, 5, 17]):
        with pytest.raises(InputError, match=r"forget_indices.*17.*twice|forget_indices.*twice.*17"):
            call()


@pytest.mark.parametrize(("forget", "value"), [([3, 20], 20), ([99], 99), ([-1], -1), ([-7, 3], -7)])
def test_forget_indices_out_of_range_are_an_error_that_names_one(forget, value):
    for call in calls_with(forget):
        with pytest.raises(InputError, match=rf"forget_indices.* {value}, .*between 0 and 19"):
            call()


def test_more_retained_points_than_there_are_is_an_error():
    message = r"retain_multiplier is 10.*asks for 20.*only 18.*at most 9"
    for call in (
        lambda: matching_indices([1, 2], 20, retain_multiplier=10.0),
        lambda: datamodel_matching(net(), samples(), [1, 2], random_datamodel(), retain_multiplier=10.0),
        lambda: oracle_matching(net(), [net()], samples(), [1, 2], retain_multiplier=10.0),
    ):
        with pytest.raises(InputError, match=message):
            call()


@pytest.mark.parametrize("shape", [(19, 20, 3), (20, 19, 3), (20, 20), (20, 20, 1), (20, 20, 4)])
def test_datamodel_of_another_shape_is_an_error_that_says_it(shape):
    """A datamodel of margins only (one column) has no target for the logits."""
    numbers = ", ".join(map(str, shape))
    with pytest.raises(InputError, match=rf"datamodel has shape \({numbers}\)"):
        datamodel_matching(net(), samples(), [1, 2], torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("classes", [1, 4])
def test_simulated_oracle_of_another_number_of_classes_is_an_error(classes):
    with pytest.raises(InputError, match=rf"datamodel.*{classes}"):
        simulated_oracle_logits(torch.zeros(20, 3), torch.zeros(20, 20, classes), [1], range(20))


@pytest.mark.parametrize(("unlearned", "oracle"), [((1, 3), (5, 3)), ((5, 3), (1, 3)), ((0, 3), (5, 3))])
def test_fewer_than_two_models_in_klom_is_an_error(unlearned, oracle):
    with pytest.raises(InputError, match=rf"klom has {unlearned[0]} and {oracle[0]} models.*at least 2"):
        klom(torch.zeros(unlearned), torch.zeros(oracle))


@pytest.mark.parametrize(("unlearned", "oracle"), [((5, 3), (5, 4)), ((5,), (5,))])
def test_klom_over_other_points_is_an_error(unlearned, oracle):
    with pytest.raises(InputError, match="Margins have shapes"):
        klom(torch.zeros(unlearned), torch.zeros(oracle))


@pytest.mark.parametrize(("masks", "outputs"), [((5, 4), (6, 2, 3)), ((5,), (5, 2, 3)), ((5, 4), (5, 2))])
def test_masks_and_outputs_that_do_not_fit_are_an_error(masks, outputs):
    with pytest.raises(InputError, match="masks and outputs have shapes"):
        fit_datamodels(torch.ones(masks), torch.ones(outputs))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "kl"}, "loss is 'kl'.*'mse', 'ce'"),
        ({"lr": 0.0}, "lr is 0"),
        ({"epochs": 0}, "epochs is 0"),
        ({"retain_multiplier": -1.0}, "retain_multiplier is -1"),
        ({"forget_multiplier": -1.0}, "forget_multiplier is -1"),
        ({"weight_decay_to_start": -1.0}, "weight_decay_to_start is -1"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(InputError, match=message):
        datamodel_matching(net(), samples(), [1, 2], random_datamodel(), **settings)
    with pytest.raises(InputError, match=message):
        oracle_matching(net(), [net()], samples(), [1, 2], **settings)


def test_bad_settings_of_datamodels_are_named():
    masks, outputs, _ = subset_outputs()
    with pytest.raises(InputError, match=r"method is 'trak'"):
        fit_datamodels(masks, outputs, method="trak")
    with pytest.raises(InputError, match=r"strength is -1"):
        fit_datamodels(masks, outputs, strength=-1.0)
    with pytest.raises(InputError, match=r"share is 0"):
        half_subsets(3, 10, share=0.0)
    with pytest.raises(InputError, match=r"count is 0"):
        half_subsets(0, 10)


def test_no_oracles_is_an_error():
    with pytest.raises(InputError, match="oracles is empty"):
        oracle_matching(net(), [], samples(), [1, 2])


def test_model_without_a_config_needs_build(digits_small):
    data = subset(digits_small.train, range(10))
    with pytest.raises(InputError, match="Sequential has no config.*build="):
        dmm(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), subset(data, [0]), subset(data, range(1, 10)))
    torch.manual_seed(0)
    build = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10))  # noqa: E731
    edited = dmm(build(), subset(data, [0]), subset(data, range(1, 10)), build=build, **{**QUICK, "models": 3})
    assert torch.isfinite(F.cross_entropy(edited(data.inputs), data.targets))
