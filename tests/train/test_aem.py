"""AEM: the entropy and its gradient in closed form, masks that change nothing, and hosts of several kinds."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from retouch.core.data import TensorData
from retouch.core.errors import InputError
from retouch.core.loop import Callback, Checkpoint, fit
from retouch.core.objectives import cross_entropy, objective
from retouch.train.aem import (
    AEM,
    AttentionEntropyMaximization,
    GatedAttentionMIL,
    Subsampling,
    aem_loss,
    attention_entropy,
    attention_logits_of,
    collate_bags,
    subsample,
)
from retouch.worlds import bags


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def logits(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def gradient(values, **settings):
    values = values.clone().requires_grad_()
    aem_loss(values, **settings).backward()
    return values.grad


def host(seed=0, **settings):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GatedAttentionMIL(64, 2, **{"hidden": 16, "attention_hidden": 8, **settings})


@pytest.fixture(scope="module")
def some_bags():
    return bags.data("train", count=16, seed=1)


# --- closed forms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 7, 1000])
def test_uniform_attention_has_entropy_log_n_and_no_gradient(n):
    for level in (0.0, -3.0, 50.0):
        uniform = torch.full((1, 2, n), level, dtype=torch.float64)
        assert float(aem_loss(uniform)) == pytest.approx(-math.log(n), rel=1e-12)
        torch.testing.assert_close(gradient(uniform), torch.zeros_like(uniform), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_on_one_instance_has_no_entropy_and_a_finite_gradient(dtype):
    one = torch.zeros(1, 1, 5, dtype=dtype)
    one[..., 2] = 1e4
    assert float(aem_loss(one)) == 0
    assert gradient(one).isfinite().all()


def test_a_bag_of_one_instance_has_loss_zero():
    single = torch.full((3, 2, 1), 7.0)
    assert float(aem_loss(single)) == 0
    assert not gradient(single).any()
    assert not attention_entropy(single, normalized=True).any()


def test_the_gradient_is_p_times_log_p_plus_entropy():
    a = logits(9)
    log_p = a.log_softmax(0)
    expected = log_p.exp() * (log_p + attention_entropy(a))
    torch.testing.assert_close(gradient(a), expected)
    assert float(gradient(a).sum()) == pytest.approx(0, abs=1e-12)


def test_two_heads_are_the_mean_of_each():
    a = logits(1, 2, 6)
    torch.testing.assert_close(aem_loss(a), (aem_loss(a[:, :1]) + aem_loss(a[:, 1:])) / 2)
    heads_first = a.transpose(0, 1)  # (heads, 1, n), as the authors' multi-head model gives it
    torch.testing.assert_close(aem_loss(heads_first), aem_loss(a))
    batch = torch.cat([a, a, a])  # more bags do not multiply lambda
    torch.testing.assert_close(aem_loss(batch), aem_loss(a))


def test_shifts_and_orders_do_not_matter():
    a = logits(2, 3, 8)
    torch.testing.assert_close(aem_loss(a + 100.0), aem_loss(a))
    torch.testing.assert_close(aem_loss(a[..., torch.randperm(8, generator=seeded())]), aem_loss(a))


def test_entropy_keeps_leading_dimensions_and_takes_any_for_instances():
    a = logits(2, 3, 8)
    entropy = attention_entropy(a)
    p = a.softmax(-1)
    torch.testing.assert_close(entropy, -(p * p.log()).sum(-1))
    torch.testing.assert_close(attention_entropy(a.movedim(-1, 0), dim=0), entropy)
    torch.testing.assert_close(attention_entropy(a, normalized=True), entropy / math.log(8))
    torch.testing.assert_close(aem_loss(a), -entropy.mean())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype):
    a = (3 * logits(1, 1, 100_000)).to(dtype).requires_grad_()
    loss = aem_loss(a)
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, aem_loss(a.detach().float()))
    assert -math.log(100_000) < float(loss.detach()) < -5
    assert a.grad.isfinite().all()
    assert a.grad.dtype == dtype


# --- masks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [0.0, 1e30, -math.inf, math.nan])
@pytest.mark.parametrize("heads", [1, 3])
def test_padding_changes_neither_loss_nor_gradient(padding, heads):
    a, extra = logits(2, heads, 5), 400
    padded = torch.cat([a, torch.full((2, heads, extra), padding, dtype=a.dtype)], -1)
    mask = torch.arange(5 + extra).expand(2, -1) < 5
    for form in (mask, mask[:, None], mask[:, None].expand(-1, heads, -1), mask.long()):
        torch.testing.assert_close(aem_loss(padded, mask=form), aem_loss(a))
        changed = gradient(padded, mask=form)
        torch.testing.assert_close(changed[..., :5], gradient(a))
        assert not changed[..., 5:].any()
    torch.testing.assert_close(
        attention_entropy(padded, mask=mask, normalized=True), attention_entropy(a, normalized=True)
    )


def test_minus_infinity_leaves_an_instance_out():
    a = logits(1, 2, 6)
    holes = a.masked_fill(torch.tensor([False, True, False, False, True, False]), -math.inf)
    torch.testing.assert_close(aem_loss(holes), aem_loss(a[..., [0, 2, 3, 5]]))
    assert gradient(holes).isfinite().all()


def test_bags_of_different_size_in_one_batch():
    sizes = (3, 9, 1)
    parts = [logits(1, 2, n, seed=n) for n in sizes]
    padded = torch.cat([F.pad(part, (0, 9 - part.shape[-1])) for part in parts])
    mask = torch.arange(9) < torch.tensor(sizes)[:, None]
    torch.testing.assert_close(aem_loss(padded, mask=mask), torch.stack([aem_loss(p) for p in parts]).mean())


# --- the weighted term ----------------------------------------------------------------------------------------------


def test_the_weight_follows_its_schedule():
    a = logits(1, 1, 6)
    constant = AttentionEntropyMaximization(0.3)
    assert float(constant(a, step=0)) == float(constant(a, step=500)) == float(0.3 * aem_loss(a))
    cosine = AttentionEntropyMaximization(0.3, schedule="cosine", total_steps=10)
    assert [cosine.weight_at(step) for step in (0, 5, 10, 12)] == pytest.approx([0.3, 0.15, 0.0, 0.0])
    assert float(cosine(a, step=5)) == pytest.approx(0.15 * float(aem_loss(a)))


def test_a_step_raises_the_entropy():
    a = logits(4, 1, 20).requires_grad_()
    before = attention_entropy(a).detach()
    AttentionEntropyMaximization(1.0)(a).backward()
    assert (attention_entropy(a.detach() - a.grad) > before).all()


def test_attention_trained_on_the_term_alone_pools_the_mean(some_bags):
    model = host()
    attention = [p for name, p in model.named_parameters() if name.startswith("attention")]
    inputs, _ = some_bags[torch.arange(16)]
    optimizer = torch.optim.Adam(attention, lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        aem_loss(model(**inputs).attention_logits, mask=inputs["mask"]).backward()
        optimizer.step()
    found = model(**inputs)
    share = attention_entropy(found.attention_logits, mask=inputs["mask"], normalized=True)
    assert share.min() > 0.999
    h, mask = model.reduction(inputs["bag"]).relu(), inputs["mask"][..., None]
    mean = (h * mask).sum(1) / mask.sum(1)
    torch.testing.assert_close(found.logits, model.classifier(mean), rtol=0.02, atol=0.02)


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AttentionEntropyMaximization(-0.1), r"weight is -0\.1, but must be at least 0"),
        (lambda: AttentionEntropyMaximization(math.nan), "weight is nan, but must be"),
        (
            lambda: AttentionEntropyMaximization(schedule="linear"),
            "schedule is 'linear', but must be one of 'constant'",
        ),
        (lambda: AttentionEntropyMaximization(schedule="cosine"), "total_steps is None, but must be the length"),
        (lambda: AttentionEntropyMaximization(schedule="cosine", total_steps=0), "total_steps is 0, but must be"),
        (lambda: AttentionEntropyMaximization()(logits(4), step=-1), "step is -1, but must be at least 0"),
        (lambda: AEM(-1.0), r"weight is -1\.0, but must be at least 0"),
        (lambda: aem_loss(torch.tensor([0.3, math.nan])), "attention_logits holds NaN or infinity"),
        (lambda: aem_loss(torch.tensor([0.3, math.inf])), "attention_logits holds NaN or infinity"),
        (lambda: aem_loss(torch.tensor(1.0)), r"attention_logits has shape \(\), but must have a dimension"),
        (lambda: aem_loss(torch.zeros(2, 0)), r"attention_logits has shape \(2, 0\), but must have a dimension"),
        (lambda: aem_loss(torch.full((2, 3), -math.inf)), "leaves a row without an instance"),
        (lambda: aem_loss(logits(2, 1, 3), mask=torch.zeros(2, 3)), "leaves a row without an instance"),
        (
            lambda: aem_loss(logits(2, 1, 3), mask=torch.ones(2, 4)),
            r"mask has shape \(2, 4\), but must be \(batch, ins",
        ),
        (lambda: aem_loss(logits(2, 4, 3), mask=torch.ones(4, 3)), r"mask has shape \(4, 3\), but must be"),
        (lambda: aem_loss(logits(2, 1, 3), mask=torch.ones(2, 1, 1)), r"mask has shape \(2, 1, 1\), but must be"),
        (lambda: host()(torch.zeros(5, 64)), r"bag has shape \(5, 64\), but must be \(batch, instances, in_dim\)"),
        (lambda: host()(torch.zeros(2, 5, 64), torch.ones(2, 4)), r"mask has shape \(2, 4\), but must be \(2, 5\)"),
        (lambda: host()(torch.zeros(2, 5, 64), torch.zeros(2, 5)), "mask leaves a bag without an instance"),
        (lambda: host(heads=0), "heads is 0, but must be greater than 0"),
        (lambda: subsample(torch.zeros(2, 5, 1), ratio=0.0), r"ratio is 0\.0, but must be greater than 0"),
        (lambda: Subsampling(1.5), r"ratio is 1\.5, but must be greater than 0 and at most 1"),
        (lambda: attention_logits_of((1, 2)), "The output is a tuple without attention_logits"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_probabilities_are_warned_of_and_logits_are_not():
    with pytest.warns(UserWarning, match="pass the logits before the softmax"):
        aem_loss(logits(2, 1, 9).softmax(-1))
    with pytest.warns(UserWarning, match="pass the logits before the softmax"):
        attention_entropy(logits(2, 9).softmax(-1), mask=torch.ones(2, 9))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for fine in (logits(2, 1, 9), torch.zeros(3, 4), torch.ones(2, 1, 1), logits(4, 5).log_softmax(-1)):
            aem_loss(fine)


# --- the host model -------------------------------------------------------------------------------------------------


def test_the_host_is_gated_attention_pooling():
    model, bag = host(), logits(3, 7, 64, dtype=torch.float32)
    parts = {name for name, _ in model.named_children()}
    assert parts >= {"reduction", "attention_v", "attention_u", "attention_weights", "classifier"}
    assert model.reduction.bias is None
    found, attention = model(bag)
    assert (found.shape, attention.shape) == ((3, 2), (3, 1, 7))
    for number in range(3):
        h = F.relu(bag[number] @ model.reduction.weight.T)
        a = model.attention_weights(torch.tanh(model.attention_v(h)) * torch.sigmoid(model.attention_u(h)))[:, 0]
        torch.testing.assert_close(attention[number, 0], a)
        torch.testing.assert_close(found[number], model.classifier(a.softmax(0) @ h))


@pytest.mark.parametrize("heads", [1, 4])
def test_padding_changes_nothing_in_the_host(heads):
    model, bag = host(heads=heads), logits(2, 5, 64, dtype=torch.float32)
    padded = torch.cat([bag, torch.full((2, 300, 64), math.nan)], 1)
    mask = torch.arange(305).expand(2, -1) < 5
    whole, cut = model(padded, mask), model(bag)
    torch.testing.assert_close(whole.logits, cut.logits)
    torch.testing.assert_close(whole.attention_logits[..., :5], cut.attention_logits)
    assert not whole.attention_logits.softmax(-1)[..., 5:].any()
    (whole.logits.sum() + aem_loss(whole.attention_logits, mask=mask)).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_the_order_of_instances_does_not_matter_to_the_host():
    model, bag = host(heads=2), logits(2, 9, 64, dtype=torch.float32)
    torch.testing.assert_close(model(bag[:, torch.randperm(9, generator=seeded())]).logits, model(bag).logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_host_runs_in_half_precision(dtype, some_bags):
    inputs, _ = some_bags[torch.arange(4)]
    output = host().to(dtype)(inputs["bag"].to(dtype), inputs["mask"])
    assert output.logits.isfinite().all()
    assert aem_loss(output.attention_logits, mask=inputs["mask"]).isfinite()


# --- in fit ---------------------------------------------------------------------------------------------------------


def trained(data, *args, seed=3, steps=6, **settings):
    model = host()
    history = fit(model, data, *args, steps=steps, batch_size=4, seed=seed, **settings)
    return model, history


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def test_weight_zero_is_plain_training_bit_for_bit(some_bags, global_rng_untouched):
    plain, off, on = (trained(some_bags, *args)[0] for args in ((), (AEM(0.0),), (AEM(0.5),)))
    assert same(plain, off)
    assert not same(plain, on)


def test_terms_are_the_bag_loss_and_the_weighted_entropy(some_bags):
    model, batch = host(), some_bags[torch.arange(4)]
    found = AEM(0.3)(model, batch)
    assert list(found) == ["cross_entropy", "aem"]
    output = model(**batch[0])
    assert torch.equal(found["cross_entropy"], cross_entropy(model, batch)["cross_entropy"])
    torch.testing.assert_close(found["aem"], 0.3 * aem_loss(output.attention_logits, mask=batch[0]["mask"]))
    assert not model._forward_hooks


def test_the_history_has_the_normalised_entropy_which_rises_with_the_weight(some_bags):
    (_, plain), (_, spread) = (trained(some_bags, AEM(weight), steps=40) for weight in (0.0, 1.0))
    assert len(spread["attention_entropy"]) == len(spread["aem"]) == 40
    assert all(0 < value <= 1 for value in spread["attention_entropy"])
    assert sum(spread["attention_entropy"][-5:]) > sum(plain["attention_entropy"][-5:])


def test_the_cosine_runs_over_the_whole_run(some_bags):
    _, history = trained(some_bags, AEM(1.0, schedule="cosine"), steps=8)
    sizes = [abs(value) for value in history["aem"]]
    assert sizes[0] > sizes[4] > sizes[7] > 0
    assert sizes[7] < 0.1 * sizes[0]


class Interrupt(Callback):
    def __init__(self, step):
        self.step = step

    def on_step(self, run):
        if run.step == self.step:
            raise KeyboardInterrupt


def test_an_interrupted_run_ends_as_one_that_was_not(some_bags, tmp_path):
    def go(**settings):
        stop = settings.pop("stop", None)
        callbacks = [Subsampling(0.5), Interrupt(stop)]
        return trained(some_bags, AEM(0.2, schedule="cosine"), callbacks=callbacks, steps=9, **settings)[0]

    whole = go()
    with pytest.raises(KeyboardInterrupt):
        go(stop=5, checkpoint=Checkpoint(tmp_path, 2))
    assert same(whole, go(checkpoint=Checkpoint(tmp_path, 2)))


class DualStream(nn.Module):
    """As DSMIL: instance scores, and one row of attention a class, instances first."""

    def __init__(self):
        super().__init__()
        self.instances, self.query, self.bag = nn.Linear(64, 2), nn.Linear(64, 8), nn.Conv1d(2, 2, 64)

    def forward(self, bag):
        scores, query = self.instances(bag[0]), self.query(bag[0])
        attention = query @ query[scores.argmax(0)].T / math.sqrt(8)  # (n, classes)
        return scores, self.bag((attention.softmax(0).T @ bag[0])[None])[..., 0], attention


@objective
def dual_stream(model, batch, run=None):
    scores, logits, _ = model(batch[0])
    best = scores.max(0, keepdim=True).values
    return 0.5 * F.cross_entropy(best, batch[1]) + 0.5 * F.cross_entropy(logits, batch[1])


def test_a_host_with_its_own_loss_and_a_row_of_attention_a_class():
    model = DualStream()
    aem = AEM(0.4, bag_loss=dual_stream, attention=lambda output: output[2].T)
    batch = (logits(1, 30, 64, dtype=torch.float32), torch.tensor([1]))
    found = aem(model, batch)
    rows = [aem_loss(model(batch[0])[2][:, c]) for c in range(2)]
    torch.testing.assert_close(found["aem"], 0.4 * (rows[0] + rows[1]) / 2)
    torch.testing.assert_close(found["dual_stream"], dual_stream(model, batch)["dual_stream"])
    assert len(fit(model, [batch] * 3, aem, steps=3)) == 3


def test_attention_of_a_named_layer(some_bags):
    model, batch = host(), some_bags[torch.arange(4)]
    by_layer = AEM(0.3, layer="attention_weights", attention=lambda scores: scores.transpose(1, 2))
    torch.testing.assert_close(by_layer(model, batch)["aem"], AEM(0.3)(model, batch)["aem"])
    with pytest.raises(InputError, match="has no layer 'attention_weight'"):
        AEM(layer="attention_weight")(model, batch)
    with pytest.raises(InputError, match="The output is a list without attention_logits"):
        AEM(attention=lambda output: attention_logits_of([output]))(model, batch)


def test_spreads_the_attention_of_a_real_vit(digits_small):
    from transformers import ViTConfig, ViTForImageClassification

    settings = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, initializer_range=0.3, **settings)
    config.output_attentions, config._attn_implementation = True, "eager"

    def class_token(output):
        return output.attentions[-1][:, :, 0].log()  # weights are given: their logarithm is as good as logits

    def run(weight):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = ViTForImageClassification(config)
        history = fit(model, digits_small.train, AEM(weight, attention=class_token), steps=25, batch_size=32)
        return history["attention_entropy"]

    plain, spread = run(0.0), run(2.0)
    assert spread[0] == plain[0] < 0.95
    assert spread[-1] > plain[-1] + 0.02


# --- sub-sampling and padding ---------------------------------------------------------------------------------------


def test_a_share_of_each_bags_instances_is_kept_once_each(some_bags, global_rng_untouched):
    inputs, _ = some_bags[torch.arange(16)]
    numbers = torch.arange(inputs["mask"].shape[1]).expand(16, -1)
    kept, mask = subsample(numbers, inputs["mask"], ratio=0.3, generator=seeded())
    sizes = inputs["mask"].sum(1)
    assert mask.sum(1).tolist() == [int(0.3 * int(size) + 1e-9) for size in sizes]
    assert kept.shape == mask.shape == (16, int(mask.sum(1).max()))
    for row, valid, size in zip(kept, mask, sizes, strict=True):
        assert len(row[valid].unique()) == int(valid.sum())
        assert row[valid].max() < size
    again, _ = subsample(numbers, inputs["mask"], ratio=0.3, generator=seeded())
    other, _ = subsample(numbers, inputs["mask"], ratio=0.3, generator=seeded(1))
    assert torch.equal(kept, again)
    assert not torch.equal(kept, other)


def test_at_least_one_instance_is_kept_and_at_ratio_one_all():
    bag, mask = torch.arange(12).view(2, 6), torch.tensor([[True] * 6, [True] + [False] * 5])
    one, left = subsample(bag, mask, ratio=0.01, generator=seeded())
    assert left.tolist() == [[True], [True]]
    assert int(one[1]) == 6
    everything, left = subsample(bag, ratio=1.0, generator=seeded())
    assert left.all()
    assert torch.equal(everything.sort(1).values, bag)


def test_subsampling_combines_with_aem_and_off_is_exactly_off(some_bags):
    plain = trained(some_bags, AEM(0.1))[0]
    assert same(plain, trained(some_bags, AEM(0.1), callbacks=[Subsampling(1.0)])[0])
    model, history = trained(some_bags, AEM(0.1), callbacks=[Subsampling(0.5)])
    assert not same(plain, model)
    assert len(history["aem"]) == 6


def test_subsampling_of_bags_without_masks():
    seen = []

    class Host(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = host()

        def forward(self, bag):
            seen.append(bag.shape)
            return self.inner(bag)

    data = TensorData(torch.rand(8, 10, 64), torch.arange(8) % 2)
    fit(Host(), data, AEM(0.1), steps=2, batch_size=4, callbacks=[Subsampling(0.5)])
    assert seen == [(4, 5, 64)] * 2


def test_a_loader_of_bags_of_different_size_is_padded():
    samples = [(torch.rand(n, 64, generator=seeded(n)), n % 2) for n in (3, 9, 1, 5)]
    inputs, labels = collate_bags(samples)
    assert inputs["bag"].shape == (4, 9, 64)
    assert inputs["mask"].sum(1).tolist() == [3, 9, 1, 5]
    assert labels.tolist() == [1, 1, 1, 1]
    model = host()
    for number, (bag, _) in enumerate(samples):
        torch.testing.assert_close(model(**inputs).logits[number], model(bag[None]).logits[0])
    assert len(fit(model, DataLoader(samples, 2, collate_fn=collate_bags), AEM(0.1), steps=3)) == 3


# --- the study ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_little_entropy_helps_and_too_much_is_mean_pooling():
    from retouch.arenas.train.tasks.bags import adamw, build, judge
    from retouch.arenas.training import Split

    def study(seed, weight):
        train = bags.data("train", count=30, sizes=(60, 60), seed=seed)
        test = bags.data("test", count=300, sizes=(60, 60), seed=seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = build()
        fit(model, train, AEM(weight), steps=400, batch_size=8, optimizer=adamw, seed=seed)
        return judge(model, Split(train=train, test=test))

    found = {weight: [study(seed, weight) for seed in range(2)] for weight in (0.0, 0.05, 1.0)}
    mean = {w: {name: sum(row[name] for row in rows) / 2 for name in rows[0]} for w, rows in found.items()}
    assert mean[0.0]["entropy"] + 0.5 < mean[0.05]["entropy"] < mean[1.0]["entropy"] < math.log(60)
    assert mean[0.05]["auc"] > mean[0.0]["auc"]
    assert mean[0.05]["recovery"] > mean[0.0]["recovery"] + 5
