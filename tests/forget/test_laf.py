import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from retouch.core import seeds
from retouch.core.batches import in_order
from retouch.core.data import TensorData, subset
from retouch.core.errors import Diverged, InputError
from retouch.core.features import features_of
from retouch.core.models import predict
from retouch.forget.laf import (
    RepresentationVAE,
    label_agnostic_forgetting,
    laf,
    laf_alignment_loss,
    laf_extractor_loss,
    laf_vae_loss,
)
from retouch.worlds import digits

QUICK = {"epochs": 2, "vae_epochs": 1, "lr_ue": 1e-3, "lr_ra": 1e-3, "latent": 4}


def rows(n, d=5, seed=0, scale=1.0):
    return scale * torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8), nn.Linear(8, 3))


def split(model, x):
    return model[:3](x)


def inputs(count, seed=1):
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


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


# --- formulas, the plainest way -------------------------------------------------------------------------------------


def test_vae_loss_by_loops():
    reconstruction, x, mu, sigma = rows(4), rows(4, seed=1), rows(4, 3, 2), rows(4, 3, 3).exp()
    expected = 0.0
    for i in range(4):
        for j in range(5):
            expected += float(reconstruction[i, j] - x[i, j]) ** 2 / 4
        for j in range(3):
            m, s = float(mu[i, j]), float(sigma[i, j])
            expected += -0.025 * 0.5 * (math.log(s**2 + 1e-8) + 1 - m**2 - s**2) / 4
    assert float(laf_vae_loss(reconstruction, x, mu, sigma)) == pytest.approx(expected, rel=1e-12)
    without = sum(float(v) ** 2 for v in (reconstruction - x).flatten()) / 4
    assert float(laf_vae_loss(reconstruction, x, mu, sigma, kl_weight=0.0)) == pytest.approx(without, rel=1e-12)
    exact = laf_vae_loss(x, x, torch.zeros(4, 3), torch.ones(4, 3), kl_weight=1.0)
    assert abs(float(exact)) < 1e-6  # the standard normal diverges by nothing from itself


def bounded_by_loops(a, e):
    total = 0.0
    for one, other in zip(a.tolist(), e.tolist(), strict=True):
        distance = sum((x - y) ** 2 for x, y in zip(one, other, strict=True))
        total += math.exp(distance / (distance + 1))
    return total


def test_extractor_loss_by_loops():
    parts = rows(4), rows(4, seed=1), rows(3, seed=2), rows(3, seed=3)
    expected = bounded_by_loops(*parts[:2]) - bounded_by_loops(*parts[2:])
    assert float(laf_extractor_loss(*parts)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 5.0, 20.0])
def test_alignment_loss_by_loops(temperature):
    def distance(a, b):
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return 1 - dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))

    retain, retain_0, forget, forget_0 = rows(4), rows(4, seed=1), rows(3, seed=2), rows(3, seed=3)
    below = sum(math.exp(distance(a, b) / temperature) for a, b in zip(forget.tolist(), forget_0.tolist(), strict=True))
    expected = sum(
        math.log(math.exp(distance(a, b)) / below) for a, b in zip(retain.tolist(), retain_0.tolist(), strict=True)
    )
    actual = laf_alignment_loss(retain, retain_0, forget, forget_0, temperature=temperature)
    assert float(actual) == pytest.approx(expected, rel=1e-10)


def test_default_temperature_is_twenty():
    parts = rows(4), rows(4, seed=1), rows(3, seed=2), rows(3, seed=3)
    assert float(laf_alignment_loss(*parts)) == float(laf_alignment_loss(*parts, temperature=20.0))


def test_autoencoder_has_the_layers_of_the_paper_and_samples_its_code():
    vae = RepresentationVAE(10, latent=3)
    widths = [(m.in_features, m.out_features) for m in vae.modules() if isinstance(m, nn.Linear)]
    assert widths == [(10, 128), (128, 32), (32, 3), (32, 3), (3, 32), (32, 128), (128, 10)]
    x = rows(2, 10).float()
    code = vae.encoder(x)
    assert (code >= 0).all()
    reconstruction, mu, sigma = vae(x)
    assert torch.equal(mu, vae.mu(code))
    torch.testing.assert_close(sigma, (vae.log_variance(code) / 2).exp())
    assert reconstruction.shape == x.shape
    assert not torch.equal(vae.eval()(x)[0], vae(x)[0])  # also in eval mode
    torch.manual_seed(3)
    noise = torch.randn(2, 3)
    torch.manual_seed(3)
    torch.testing.assert_close(vae(x)[0], vae.decoder(mu + sigma * noise))


def test_last_activation_of_the_decoder_is_an_option():
    with_sigmoid = RepresentationVAE(10, hidden=(12, 6), output_activation=torch.sigmoid)
    assert [m.out_features for m in with_sigmoid.encoder if isinstance(m, nn.Linear)] == [12, 6]
    reconstruction = with_sigmoid(rows(50, 10, scale=30.0).float())[0]
    assert (reconstruction > 0).all()
    assert (reconstruction < 1).all()
    without = RepresentationVAE(10)(rows(50, 10, scale=30.0).float())[0]
    assert (without < 0).any()


# --- checks of the spec: the unlearning loss ------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_extractor_loss_is_bounded(scale):
    n_r, n_f = 4, 3
    for seed in range(5):
        parts = rows(n_r, seed=seed), rows(n_r, seed=9), rows(n_f, seed=seed + 20), rows(n_f, seed=10)
        value = float(laf_extractor_loss(scale * parts[0], parts[1], scale * parts[2], parts[3]))
        assert n_r - math.e * n_f < value < math.e * n_r - n_f


def test_extractor_loss_of_exact_reconstructions_is_the_difference_of_counts():
    e_r, e_f = rows(7), rows(3, seed=1)
    assert float(laf_extractor_loss(e_r.clone(), e_r, e_f.clone(), e_f)) == 7 - 3


def test_extractor_loss_is_antisymmetric_under_swapping_the_pairs():
    retain, forget = (rows(4), rows(4, seed=1)), (rows(3, seed=2), rows(3, seed=3))
    assert float(laf_extractor_loss(*retain, *forget)) == -float(laf_extractor_loss(*forget, *retain))


def test_extractor_loss_has_no_gradient_at_a_reconstruction_error_of_zero():
    e_r, e_f = rows(4), rows(3, seed=1)
    parts = [t.clone().requires_grad_(True) for t in (e_r, e_r, e_f, e_f)]
    for gradient in torch.autograd.grad(laf_extractor_loss(*parts), parts):
        assert not gradient.any()


def test_extractor_loss_gradient_flows_into_embeddings_and_reconstructions():
    parts = [rows(4), rows(4, seed=1), rows(3, seed=2), rows(3, seed=3)]
    parts = [part.requires_grad_(True) for part in parts]
    assert torch.autograd.gradcheck(laf_extractor_loss, parts)
    assert all(g.abs().min() > 0 for g in torch.autograd.grad(laf_extractor_loss(*parts), parts))


# --- checks of the spec: the alignment loss -------------------------------------------------------------------------


def test_alignment_loss_at_the_original_model_is_minus_retain_count_times_log_forget_count():
    e_r, e_f = rows(7), rows(5, seed=1)
    value = laf_alignment_loss(e_r, e_r.clone(), e_f, e_f.clone(), temperature=5.0)
    assert float(value) == pytest.approx(-7 * math.log(5), rel=1e-12)


@pytest.mark.parametrize("which", range(4))
def test_alignment_loss_is_invariant_to_rescaling_any_row(which):
    parts = [rows(4), rows(4, seed=1), rows(3, seed=2), rows(3, seed=3)]
    before = float(laf_alignment_loss(*parts))
    for row, factor in ((0, 1e-3), (1, 7.0), (2, 1e3)):
        parts[which] = parts[which].clone()
        parts[which][row] *= factor
        assert float(laf_alignment_loss(*parts)) == pytest.approx(before, rel=1e-10)


def test_alignment_loss_gives_the_original_models_tensors_no_gradient():
    parts = [rows(4), rows(4, seed=1), rows(3, seed=2), rows(3, seed=3)]
    parts = [part.requires_grad_(True) for part in parts]
    laf_alignment_loss(*parts).backward()
    assert parts[1].grad is None
    assert parts[3].grad is None
    assert parts[0].grad.any()
    assert parts[2].grad.any()


def test_endless_temperature_leaves_the_forget_part_without_gradient():
    retain, forget = rows(4).requires_grad_(True), rows(3, seed=2).requires_grad_(True)
    for temperature, largest in ((math.inf, 0.0), (1e12, 1e-11)):
        loss = laf_alignment_loss(retain, rows(4, seed=1), forget, rows(3, seed=3), temperature=temperature)
        kept, let_go = torch.autograd.grad(loss, [retain, forget])
        assert let_go.abs().max() <= largest
        assert kept.abs().max() > 0.01


def test_alignment_keeps_retained_and_pushes_forget_samples_away():
    retain, forget = rows(4), rows(3, seed=2)
    retain_0, forget_0 = rows(4, seed=1), rows(3, seed=3)
    for moved_retain, moved_forget in ((retain_0, forget), (retain, -forget_0)):
        better = laf_alignment_loss(moved_retain, retain_0, moved_forget, forget_0)
        assert float(better) < float(laf_alignment_loss(retain, retain_0, forget, forget_0))


def test_zero_rows_give_finite_losses_and_gradients():
    retain = torch.cat([torch.zeros(1, 5), rows(3).float()]).requires_grad_(True)
    forget = torch.cat([torch.zeros(1, 5), rows(2, seed=1).float()]).requires_grad_(True)
    loss = laf_alignment_loss(retain, rows(4, seed=2).float(), forget, forget.detach().clone())
    assert torch.isfinite(loss)
    for gradient in torch.autograd.grad(loss, [retain, forget]):
        assert torch.isfinite(gradient).all()
    assert torch.isfinite(laf_extractor_loss(retain, torch.zeros(4, 5), forget, torch.zeros(3, 5)))


# --- the algorithm --------------------------------------------------------------------------------------------------


class VaeCalls:
    """Every call of an autoencoder while the block runs: (module, its mode, torch's random state before it)."""

    def __enter__(self):
        self.calls = []
        self.handle = nn.modules.module.register_module_forward_pre_hook(self.note)
        return self.calls

    def note(self, module, args):
        if isinstance(module, RepresentationVAE):
            self.calls.append((module, module.training, torch.get_rng_state()))

    def __exit__(self, *error):
        self.handle.remove()


def batches_of(x, size):
    return [(part,) for part in x.split(size)]


def test_stage_two_equals_a_plain_loop():
    """Two Adam optimizers in turn over zipped batches, the autoencoders' noise replayed."""
    model = net()
    forget, retain = batches_of(inputs(12), 4), batches_of(inputs(25, 2), 5)  # 3 and 5 batches: an epoch is 3 pairs
    settings = {"epochs": 2, "lr_ue": 2e-3, "lr_ra": 5e-3, "temperature": 5.0, "latent": 4, "vae_epochs": 2}
    with VaeCalls() as calls:
        actual = label_agnostic_forgetting(model, split, retain + forget, forget, retain, **settings)
    calls = [(vae, rng) for vae, training, rng in calls if not training]
    assert len(calls) == 2 * 3 * 2

    expected, original = copy.deepcopy(model), copy.deepcopy(model).requires_grad_(False)
    unlearn = torch.optim.Adam(expected.parameters(), lr=2e-3)
    align = torch.optim.Adam(expected.parameters(), lr=5e-3)
    with seeds.isolated():
        for _ in range(2):
            for (x_f,), (x_r,) in zip(forget, retain, strict=False):
                (h, rng), (h_f, rng_f) = calls[:2]
                del calls[:2]
                assert h is not h_f
                e_f, e_r = split(expected, x_f), split(expected, x_r)
                torch.set_rng_state(rng)
                error = (h(e_r)[0] - e_r).square().sum(1)
                torch.set_rng_state(rng_f)
                error_f = (h_f(e_f)[0] - e_f).square().sum(1)
                loss = (error / (error + 1)).exp().sum() - (error_f / (error_f + 1)).exp().sum()
                unlearn.zero_grad()
                loss.backward()
                unlearn.step()

                e_f, e_r = split(expected, x_f), split(expected, x_r)
                c_r = 1 - F.cosine_similarity(e_r, split(original, x_r))
                c_f = 1 - F.cosine_similarity(e_f, split(original, x_f))
                loss = (c_r.exp() / (c_f / 5.0).exp().sum()).log().sum()
                align.zero_grad()
                loss.backward()
                align.step()
    for name, p in expected.named_parameters():
        torch.testing.assert_close(dict(actual.named_parameters())[name], p, rtol=1e-3, atol=1e-5, msg=name)
    assert (actual[0].weight - model[0].weight).abs().max() > 5e-3


def test_autoencoders_are_fitted_to_all_and_to_forget_representations():
    """The one of all data reconstructs both kinds, the one of the forget set its own kind better than the other."""
    model = net()
    with torch.no_grad():
        model[2].weight.mul_(3)
    x_f, x_r = inputs(60) + 2, inputs(60, 2) - 2
    with VaeCalls() as calls:
        label_agnostic_forgetting(
            model,
            split,
            torch.cat([x_f, x_r]),
            x_f,
            x_r,
            **{**QUICK, "epochs": 1, "vae_epochs": 100},
        )
    (h, *_), (h_f, *_) = [call for call in calls if not call[1]][:2]
    with torch.no_grad():
        e_f, e_r = split(model, x_f), split(model, x_r)
        errors = [[float((vae(e)[0] - e).square().sum(1).mean()) for e in (e_f, e_r)] for vae in (h, h_f)]
    spread = float(torch.cat([e_f, e_r]).var(0).sum())
    assert max(errors[0]) < 0.3 * spread
    assert errors[1][0] < 0.3 * spread
    assert errors[1][1] > 3 * errors[1][0]


def test_autoencoders_and_original_get_no_gradient_and_stay_in_stage_two():
    asked = []

    def recording_split(model, x):
        asked.append(model)
        return split(model, x)

    model = net()
    with VaeCalls() as calls:
        edited = label_agnostic_forgetting(
            model, recording_split, inputs(20), inputs(8), inputs(12, 2), batch_size=4, **QUICK
        )
    originals = {id(one): one for one in asked if one is not edited}
    assert len(originals) == 1
    (original,) = originals.values()
    assert_same(state(original), state(model))
    autoencoders = {id(vae): vae for vae, training, _ in calls if not training}
    assert len(autoencoders) == 2
    for frozen in (original, *autoencoders.values()):
        assert all(p.grad is None and not p.requires_grad for p in frozen.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_autoencoders_do_not_change_in_stage_two():
    seen = {}

    def watch(module, args):
        if isinstance(module, RepresentationVAE) and not module.training:
            seen.setdefault(id(module), []).append(torch.cat([p.flatten() for p in module.parameters()]))

    handle = nn.modules.module.register_module_forward_pre_hook(watch)
    try:
        label_agnostic_forgetting(net(), split, inputs(20), inputs(8), inputs(12, 2), batch_size=4, **QUICK)
    finally:
        handle.remove()
    assert len(seen) == 2
    for weights in seen.values():
        assert len(weights) == 4
        assert all(torch.equal(weights[0], w) for w in weights)


def test_head_is_bitwise_unchanged_without_repair(trained_cnn, digits_small):
    data = digits_small.train
    edited = laf(trained_cnn, subset(data, range(24)), subset(data, range(24, 240)), **QUICK)
    assert torch.equal(edited.head.weight, trained_cnn.head.weight)
    assert torch.equal(edited.head.bias, trained_cnn.head.bias)
    for name, p in edited.named_parameters():
        assert name.startswith("head") or not torch.equal(p, trained_cnn.get_parameter(name))


def test_repair_trains_the_head_only():
    model, x = net(), inputs(24, 3)
    labels = torch.randint(3, (24,), generator=torch.Generator().manual_seed(0))
    model[0].bias.requires_grad_(False)
    data = inputs(20), inputs(8), inputs(12, 2)
    plain = label_agnostic_forgetting(model, split, *data, **QUICK)
    repaired = label_agnostic_forgetting(
        model, split, *data, repair_loader=(x, labels), repair_epochs=30, repair_lr=1e-2, **QUICK
    )
    for name, p in plain.named_parameters():
        assert torch.equal(repaired.get_parameter(name), p) != name.startswith("3."), name
    with torch.no_grad():
        losses = [float(F.cross_entropy(one(x), labels)) for one in (plain, repaired)]
    assert losses[1] < losses[0] - 0.05
    for one in (plain, repaired):
        assert [name for name, p in one.named_parameters() if not p.requires_grad] == ["0.bias"]


def test_garbage_or_absent_labels_give_bit_identical_results(trained_cnn, digits_small):
    x = digits_small.train.inputs
    runs = []
    for labels in (digits_small.train.targets, torch.full((240,), -7), torch.full((240,), math.nan), None):
        forget = TensorData(x[:24], None if labels is None else labels[:24])
        retain = TensorData(x[24:], None if labels is None else labels[24:])
        runs.append(state(laf(trained_cnn, forget, retain, **QUICK)))
    for run in runs[1:]:
        assert_same(run, runs[0])


def test_absent_labels_in_loaders_and_lists_of_batches():
    x_f, x_r = inputs(8), inputs(12, 2)
    garbage = torch.full((12,), -7)
    runs = [
        label_agnostic_forgetting(net(), split, x_r, forget, retain, **QUICK)
        for forget, retain in (
            ([(x_f[:4],), (x_f[4:],)], [(x_r[:6],), (x_r[6:],)]),
            ([x_f[:4], x_f[4:]], [x_r[:6], x_r[6:]]),
            ([(x_f[:4], garbage[:4]), (x_f[4:], garbage[:4])], [(x_r[:6], garbage[:6]), (x_r[6:], garbage[:6])]),
        )
    ]
    assert_same(state(runs[0]), state(runs[1]))
    assert_same(state(runs[0]), state(runs[2]))


def loader(x, batch_size, shuffle):
    return DataLoader(x, batch_size=batch_size, shuffle=shuffle)


@pytest.mark.parametrize("kind", ["data", "loader", "shuffled loader", "list of batches"])
def test_asking_the_original_once_equals_asking_it_every_time(kind):
    def wrap(x, size):
        if kind == "data":
            return x
        if kind == "list of batches":
            return batches_of(x, size)
        return loader(x, size, kind == "shuffled loader")

    data = inputs(20), wrap(inputs(16), 4), wrap(inputs(32, 2), 8)
    torch.manual_seed(0)  # of the user's shuffled loaders
    every = label_agnostic_forgetting(net(), split, *data, **{**QUICK, "epochs": 4, "lr_ra": 0.02})
    torch.manual_seed(0)
    once = label_agnostic_forgetting(net(), split, *data, cache_original=True, **{**QUICK, "epochs": 4, "lr_ra": 0.02})
    for name, p in every.named_parameters():
        torch.testing.assert_close(once.get_parameter(name), p, rtol=1e-3, atol=1e-4, msg=name)


def test_plug_in_with_shuffled_loaders_keeps_the_others(trained_cnn):
    """Aligned with the original's answers for other samples, they would not stay."""
    forget, retain = (loader(part.inputs, 32, True) for part in one_class())
    edited = laf(trained_cnn, forget, retain, epochs=20, lr_ue=1e-3, lr_ra=1e-3, latent=8)
    assert accuracies(edited)[1] > 90


def test_plug_in_with_shuffled_loaders_is_the_same_for_the_same_seed(trained_cnn, digits_small):
    x = digits_small.train.inputs
    data = loader(x[:24], 8, True), loader(x[24:], 32, True)
    one, other = (laf(trained_cnn, *data, **QUICK) for _ in range(2))
    assert_same(state(one), state(other))


def test_cycling_goes_through_the_larger_data_set():
    asked = []

    def counting_split(model, x):
        asked.append(len(x))
        return split(model, x)

    counts = {}
    for cycle in (False, True):
        asked.clear()
        forget, retain = batches_of(inputs(4), 4), batches_of(inputs(25, 2), 5)
        label_agnostic_forgetting(
            net(), counting_split, [(inputs(3),)], forget, retain, cycle=cycle, **{**QUICK, "epochs": 1}
        )
        counts[cycle] = asked.count(5)
    assert counts == {False: 3, True: 15}  # a pair asks for the retain batch twice and the original once


# --- the plug-in ----------------------------------------------------------------------------------------------------


def test_forgets_a_class_of_digits_without_labels_and_keeps_the_others(trained_cnn):
    forget, retain = (TensorData(part.inputs) for part in one_class())
    edited = laf(trained_cnn, forget, retain, epochs=40, lr_ue=1e-3, lr_ra=1e-3, latent=8)
    forgotten, others = accuracies(edited)
    assert forgotten < 20
    assert others > 90


@pytest.mark.parametrize(
    "settings", [{}, {"layer": "fc", "side": "output"}, {"layer": "conv2"}, {"reference": "retain"}]
)
def test_any_layer_may_be_the_representation(trained_cnn, digits_small, settings):
    data = digits_small.train
    edited = laf(trained_cnn, subset(data, range(24)), subset(data, range(24, 240)), **QUICK, **settings)
    moved = {name for name, p in edited.named_parameters() if not torch.equal(p, trained_cnn.get_parameter(name))}
    layers = {"conv1", "conv2", "fc"} - ({"fc"} if settings.get("layer") == "conv2" else set())
    if settings.get("layer") == "conv2":
        layers -= {"conv2"}  # its input is the representation
    assert {name.partition(".")[0] for name in moved} == layers


def test_autoencoder_of_what_remains_may_be_fitted_to_the_retained_data_alone(trained_cnn, digits_small):
    data = digits_small.train
    forget, retain = subset(data, range(24)), subset(data, range(24, 240))
    actual = laf(trained_cnn, forget, retain, reference="retain", **QUICK)

    def before_head(model, x):
        return features_of(model, x, "head", side="input")

    expected = label_agnostic_forgetting(trained_cnn, before_head, retain, forget, retain, cache_original=True, **QUICK)
    assert_same(state(actual), state(expected))
    with_all = label_agnostic_forgetting(trained_cnn, before_head, data, forget, retain, cache_original=True, **QUICK)
    assert_same(state(laf(trained_cnn, forget, retain, **QUICK)), state(with_all))
    assert not torch.equal(actual.fc.weight, with_all.fc.weight)


def test_moves_a_real_vit_but_for_its_head(tiny_vit, digits_small):
    data = digits_small.train
    edited = laf(tiny_vit, subset(data, range(24)), subset(data, range(24, 120)), **QUICK)
    assert type(edited) is type(tiny_vit)
    assert torch.equal(edited.classifier.weight, tiny_vit.classifier.weight)
    assert not torch.equal(edited.vit.layernorm.weight, tiny_vit.vit.layernorm.weight)

    def pooled(model, rows):
        with torch.no_grad():
            return model.vit(data.inputs[rows]).last_hidden_state[:, 0]

    far = laf(tiny_vit, subset(data, range(24)), subset(data, range(24, 120)), **{**QUICK, "epochs": 40})
    similar = [
        float(F.cosine_similarity(pooled(far, part), pooled(tiny_vit, part)).mean())
        for part in (slice(0, 24), slice(24, 120))
    ]
    assert similar[0] < similar[1]


@pytest.mark.parametrize("training", [False, True])
def test_given_model_stays_bit_identical_unless_in_place(trained_cnn, digits_small, training):
    data = digits_small.train
    forget, retain = subset(data, range(24)), subset(data, range(24, 240))
    model = copy.deepcopy(trained_cnn).train(training)
    model.conv1.bias.requires_grad_(False)
    before = state(model)
    edited = laf(model, forget, retain, **QUICK)
    assert edited is not model
    assert_same(state(model), before)
    assert laf(model, forget, retain, inplace=True, **QUICK) is model
    assert_same(state(model), state(edited))
    assert not torch.equal(model.fc.weight, before["fc.weight"])
    assert torch.equal(model.conv1.bias, before["conv1.bias"])
    for one in (model, edited):
        assert all(module.training == training for module in one.modules())
        assert [name for name, p in one.named_parameters() if not p.requires_grad] == ["conv1.bias"]
        assert all(p.grad is None for p in one.parameters())


def test_same_seed_same_bits_and_no_global_randomness(trained_cnn, digits_small, global_rng_untouched):
    data = digits_small.train
    forget, retain = subset(data, range(24)), subset(data, range(24, 240))
    runs = [laf(trained_cnn, forget, retain, seed=seed, **QUICK) for seed in (5, 5, 6)]
    assert_same(state(runs[0]), state(runs[1]))
    assert not torch.equal(runs[0].fc.weight, runs[2].fc.weight)


def test_double_precision_models_are_taken():
    model = net().double()
    edited = label_agnostic_forgetting(
        model, split, inputs(20).double(), inputs(8).double(), inputs(12, 2).double(), **QUICK
    )
    assert edited[0].weight.dtype == torch.float64
    assert not torch.equal(edited[0].weight, model[0].weight)


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, -5.0, math.nan])
def test_temperature_must_be_positive(temperature, trained_cnn, digits_small):
    data = digits_small.train
    calls = [
        lambda: laf_alignment_loss(rows(2), rows(2), rows(2), rows(2), temperature=temperature),
        lambda: laf(trained_cnn, data, data, temperature=temperature),
    ]
    for call in calls:
        with pytest.raises(InputError, match=rf"temperature is {temperature}.*greater than 0"):
            call()


def test_dimension_mismatch_is_an_error_that_says_both_shapes():
    for parts in (rows(4, 5), rows(4, 6), rows(3), rows(3)), (rows(3), rows(3), rows(4, 6), rows(4, 5)):
        with pytest.raises(InputError, match=r"\(4, [56]\).*\(4, [56]\)"):
            laf_extractor_loss(*parts)
        with pytest.raises(InputError, match=r"\(4, [56]\).*\(4, [56]\)"):
            laf_alignment_loss(*parts)


def test_retain_and_forget_of_different_dimensions_do_not_meet():
    assert math.isfinite(float(laf_extractor_loss(rows(4, 5), rows(4, 5, 1), rows(3, 6), rows(3, 6, 1))))


@pytest.mark.parametrize("empty", ["all", "forget", "retain"])
@pytest.mark.parametrize("as_list", [False, True])
def test_empty_loaders_are_an_error_that_names_them(empty, as_list):
    data = {name: inputs(6) for name in ("all", "forget", "retain")}
    data[empty] = inputs(0)
    if as_list:
        data = {name: batches_of(x, 3) if len(x) else [] for name, x in data.items()}
    with pytest.raises(InputError, match=rf"{empty}.*empty"):
        label_agnostic_forgetting(net(), split, *data.values(), **QUICK)


@pytest.mark.parametrize("empty", ["forget", "retain"])
def test_empty_data_of_the_plug_in_is_an_error_that_names_it(empty, trained_cnn, digits_small):
    data = {"forget": digits_small.train, "retain": digits_small.train}
    data[empty] = subset(digits_small.train, [])
    with pytest.raises(InputError, match=rf"{empty}.*empty"):
        laf(trained_cnn, **data, **QUICK)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("epochs", 0, "epochs is 0"),
        ("latent", 0, "latent is 0"),
        ("reference", "forget", "reference is 'forget'.*'all', 'retain'"),
        ("layer", "hed", "no layer 'hed'.*head"),
        ("side", "middle", "side is 'middle'"),
    ],
)
def test_other_bad_arguments_are_named(name, value, message, trained_cnn, digits_small):
    with pytest.raises(InputError, match=message):
        laf(trained_cnn, digits_small.train, digits_small.train, **{**QUICK, name: value})


def test_a_loss_that_is_not_finite_stops_with_a_clear_error():
    x = inputs(8)
    x[2] = math.inf
    with pytest.raises(Diverged, match="not finite"):
        label_agnostic_forgetting(net(), lambda model, x: model[0](x), inputs(8), inputs(8), x, **QUICK)
