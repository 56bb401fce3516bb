"""PALBERT: exit probabilities in closed form, exits that equal the loop over examples, and encoders taken apart."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from retouch.core.batches import in_order
from retouch.core.data import TensorData
from retouch.core.errors import InputError
from retouch.core.loop import Callback, Checkpoint, fit
from retouch.core.models import predict
from retouch.train.palbert import (
    EarlyExit,
    LambdaHead,
    PonderingClassifier,
    convert,
    exit_distribution,
    ponder_kl,
    ponder_task_loss,
    pondering,
    q_exit,
    recipe,
    truncated_geometric,
)

DRAW = torch.Generator().manual_seed(0)
LAMBDAS = torch.rand(6, 9, generator=DRAW)
LOGITS = torch.randn(6, 9, 4, generator=DRAW)
Y = torch.randint(0, 4, (9,), generator=DRAW)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def written_out(lambdas, epsilon, remainder="none"):
    """The distribution layer by layer, as in the specification."""
    layers, batch = lambdas.shape
    pdf, left, cdf = torch.zeros(layers, batch), torch.ones(batch), torch.zeros(batch)
    for number in range(layers):
        for row in range(batch):
            past = cdf[row] > 1 - epsilon
            pdf[number, row] = epsilon / layers if past else lambdas[number, row] * left[row]
            left[row] *= 1 - lambdas[number, row]
        if remainder == "last" and number == layers - 1:
            pdf[number] = (1 - cdf).clamp(min=0)
        cdf += pdf[number]
    return pdf


# --- exit probabilities ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("remainder", ["none", "last"])
def test_the_distribution_is_the_loop_over_layers(epsilon, remainder):
    found = exit_distribution(LAMBDAS, epsilon=epsilon, remainder=remainder)
    torch.testing.assert_close(found, written_out(LAMBDAS, epsilon, remainder), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("a", [0.1, 0.3, 0.6])
def test_a_constant_probability_is_geometric(a):
    constant = torch.full((8, 2), a)
    expected = torch.tensor([a * (1 - a) ** number for number in range(8)])[:, None].expand(8, 2)
    torch.testing.assert_close(exit_distribution(constant, epsilon=0.0), expected)
    for q in (0.05, 0.25, 0.55, 0.85, 0.995):
        layer = min(math.floor(math.log(1 - q) / math.log(1 - a)), 7)  # the first l with 1 - (1 - a)^(l + 1) > q
        assert q_exit(constant, threshold=q).tolist() == [layer, layer]


def test_a_certain_exit_leaves_the_truncations_share():
    lambdas = LAMBDAS.clone()
    lambdas[0] = 1
    pdf = exit_distribution(lambdas)
    assert torch.equal(pdf[0], torch.ones(9))
    torch.testing.assert_close(pdf[1:], torch.full((5, 9), 0.05 / 6))
    for q in (0.0, 0.5, 0.99):
        assert torch.equal(q_exit(lambdas, threshold=q), torch.zeros(9, dtype=torch.long))


def test_no_exit_anywhere():
    nowhere = torch.zeros(6, 9)
    assert torch.equal(exit_distribution(nowhere), nowhere)
    at_last = exit_distribution(nowhere, remainder="last")
    assert torch.equal(at_last[-1], torch.ones(9))
    assert torch.equal(at_last[:-1], nowhere[:-1])
    assert torch.equal(q_exit(nowhere, threshold=0.0), torch.full((9,), 5))


def test_with_the_remainder_it_sums_to_one():
    torch.testing.assert_close(exit_distribution(LAMBDAS, epsilon=0.0, remainder="last").sum(0), torch.ones(9))
    sums = exit_distribution(torch.rand(12, 500, generator=DRAW)).sum(0)
    assert 0.9 < sums.min() < sums.max() <= 1.05


def test_truncated_layers_are_constants():
    lambdas = torch.tensor([[0.2], [0.97], [0.5], [0.4]], requires_grad=True)
    pdf = exit_distribution(lambdas)
    torch.testing.assert_close(pdf[2:], torch.full((2, 1), 0.05 / 4))
    (gradient,) = torch.autograd.grad(pdf.square().sum(), lambdas)
    assert gradient[:2].abs().min() > 0
    assert torch.equal(gradient[2:], torch.zeros(2, 1))


def test_gradients_are_finite_at_zero_and_one():
    lambdas = torch.tensor([[0.0, 1.0, 0.5], [1.0, 0.0, 1.0], [0.5, 1.0, 0.0]], requires_grad=True)
    for remainder in ("none", "last"):
        (gradient,) = torch.autograd.grad(exit_distribution(lambdas, epsilon=0.0, remainder=remainder).sum(), lambdas)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype):
    lambdas = torch.full((40, 1), 0.01).to(dtype)
    pdf = exit_distribution(lambdas)
    assert pdf.dtype == torch.float32
    torch.testing.assert_close(pdf, exit_distribution(lambdas.float()))
    assert torch.equal(q_exit(lambdas, threshold=0.3), q_exit(lambdas.float(), threshold=0.3))


def test_the_prior():
    prior = truncated_geometric(0.1, 12)
    torch.testing.assert_close(prior.sum(), torch.tensor(1.0))
    torch.testing.assert_close(prior[:3], torch.tensor([0.1, 0.09, 0.081]))
    assert float(prior[-1]) == pytest.approx(0.9**11)
    assert truncated_geometric(0.5, 1).tolist() == [1]
    constant = exit_distribution(torch.full((12, 3), 0.1), epsilon=0.0, remainder="last")
    torch.testing.assert_close(constant, prior[:, None].expand(12, 3))


# --- losses ---------------------------------------------------------------------------------------------------------


def test_all_probability_at_one_layer_gives_its_plain_loss():
    for layer in range(6):
        pdf = torch.zeros(6, 9)
        pdf[layer] = 1
        torch.testing.assert_close(ponder_task_loss(LOGITS, pdf, Y), F.cross_entropy(LOGITS[layer], Y))


def test_the_gradient_of_a_layers_logits_is_weighted_by_its_probability():
    logits, pdf = LOGITS.clone().requires_grad_(), exit_distribution(LAMBDAS)
    (found,) = torch.autograd.grad(ponder_task_loss(logits, pdf, Y), logits)
    for layer in range(6):
        plain = LOGITS[layer].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(plain, Y), plain)
        torch.testing.assert_close(found[layer], pdf[layer, :, None] * gradient)


def test_layers_that_were_not_reached_carry_no_task_loss():
    pdf = exit_distribution(LAMBDAS)
    few = ponder_task_loss(LOGITS[:4], pdf, Y)
    without = pdf.clone()
    without[4:] = 0
    torch.testing.assert_close(few, ponder_task_loss(LOGITS, without, Y))


def test_regressions_and_soft_targets():
    values, outputs, pdf = torch.randn(9, generator=DRAW), LOGITS[..., :1], exit_distribution(LAMBDAS)
    expected = (pdf * (outputs[..., 0] - values).square()).mean(1).sum()
    torch.testing.assert_close(ponder_task_loss(outputs, pdf, values, loss_fn=F.mse_loss), expected)
    torch.testing.assert_close(ponder_task_loss(outputs, pdf, values[:, None], loss_fn=F.mse_loss), expected)
    soft = torch.rand(9, 4, generator=DRAW).softmax(1)
    losses = torch.stack([F.cross_entropy(layer, soft, reduction="none") for layer in LOGITS])
    torch.testing.assert_close(ponder_task_loss(LOGITS, pdf, soft), (pdf * losses).mean(1).sum())


@pytest.mark.parametrize("direction", ["prior_posterior", "posterior_prior"])
def test_the_divergence_is_zero_only_at_the_prior(direction):
    prior = truncated_geometric(0.2, 6)
    assert float(ponder_kl(prior[:, None].expand(6, 3), prior=prior, direction=direction)) == pytest.approx(0, abs=1e-6)
    for seed in range(5):
        pdf = torch.rand(6, 4, generator=seeded(seed)).softmax(0)
        assert ponder_kl(pdf, prior=prior, direction=direction) > 1e-3


def test_the_divergences_in_numbers_and_which_is_which():
    prior, pdf = truncated_geometric(0.2, 6), exit_distribution(LAMBDAS, epsilon=0.0, remainder="last")
    g = prior[:, None].expand(6, 9)
    torch.testing.assert_close(ponder_kl(pdf, prior=prior), F.kl_div(pdf.T.log(), g.T, reduction="batchmean"))
    torch.testing.assert_close(
        ponder_kl(pdf, prior=prior, direction="posterior_prior"), F.kl_div(g.T.log(), pdf.T, reduction="batchmean")
    )
    early = torch.zeros(6, 1)
    early[0] = 1  # no probability late: one direction minds, the other hardly does
    assert ponder_kl(early, prior=prior) > 10
    assert ponder_kl(early, prior=prior, direction="posterior_prior") < 2


def test_divergences_are_finite_with_gradients_where_probability_is_zero():
    for lambdas in (torch.zeros(6, 2), torch.ones(6, 2)):
        for direction in ("prior_posterior", "posterior_prior"):
            given = lambdas.clone().requires_grad_()
            loss = ponder_kl(exit_distribution(given), prior=truncated_geometric(0.1, 6), direction=direction)
            assert loss.isfinite()
            assert torch.autograd.grad(loss, given)[0].isfinite().all()


# --- exits ----------------------------------------------------------------------------------------------------------


def test_an_exit_needs_more_than_the_threshold():
    assert q_exit(torch.tensor([[0.5], [0.1]]), threshold=0.5).tolist() == [1]  # equal to it: goes on
    assert q_exit(torch.tensor([[0.5], [0.1]]), threshold=0.49).tolist() == [0]
    assert q_exit(torch.tensor([[0.0], [1e-6], [1.0]]), threshold=0.0).tolist() == [1]


def test_a_larger_threshold_never_stops_earlier():
    exits = torch.stack([q_exit(LAMBDAS, threshold=q / 20) for q in range(20)])
    assert (exits.diff(dim=0) >= 0).all()


def test_the_truncation_of_training_plays_no_part_in_exits():
    lambdas = torch.tensor([[0.96], [0.0], [0.9], [0.0]])
    truncated = exit_distribution(lambdas).cumsum(0)
    assert (truncated > 0.98).int().argmax(0).tolist() == [2]  # epsilon / 4 twice, with or without an exit probability
    assert q_exit(lambdas, threshold=0.97).tolist() == [2]
    assert q_exit(lambdas[[0, 1, 3, 3]], threshold=0.97).tolist() == [3]


@pytest.mark.parametrize(("mode", "width"), [("cat", 16), ("diff", 8), ("single", 8)])
def test_the_exit_head(mode, width):
    head = LambdaHead(8, mode=mode).eval()
    linear = [part for part in head.modules() if isinstance(part, nn.Linear)]
    assert [(part.in_features, part.out_features) for part in linear] == [(width, width)] * 3 + [(width, 1)]
    current, previous = torch.randn(2, 5, 8, generator=DRAW)
    seen = {"cat": torch.cat([current, previous], 1), "diff": current - previous, "single": current}[mode]
    for part in linear[:-1]:
        seen = part(seen).tanh()
    torch.testing.assert_close(head(current, previous), linear[-1](seen)[:, 0].sigmoid())
    assert head(current, previous).shape == (5,)
    assert torch.equal(head(current, previous), head(current, current)) == (mode == "single")


BAD = {
    "negative": (lambda: exit_distribution(LAMBDAS - 1), "lambdas is between -.*, but must be between 0 and 1"),
    "above one": (lambda: q_exit(LAMBDAS + 1), "lambdas is between .*, but must be between 0 and 1"),
    "shape": (lambda: exit_distribution(torch.rand(3)), r"lambdas has shape \(3,\), but must be \(layers, batch\)"),
    "epsilon": (lambda: exit_distribution(LAMBDAS, epsilon=1.0), r"epsilon is 1\.0, but must be .* less than 1"),
    "remainder": (lambda: exit_distribution(LAMBDAS, remainder="first"), "remainder is 'first', but must be one of"),
    "threshold": (lambda: q_exit(LAMBDAS, threshold=1.0), r"threshold is 1\.0, but must be at least 0 and less than 1"),
    "lambda_p": (lambda: truncated_geometric(0.0, 4), r"lambda_p is 0\.0, but must be greater than 0 and less than 1"),
    "one": (lambda: truncated_geometric(1.0, 4), r"lambda_p is 1\.0, but must be"),
    "no layers": (lambda: truncated_geometric(0.5, 0), "num_layers is 0, but must be greater than 0"),
    "prior": (
        lambda: ponder_kl(LAMBDAS, prior=truncated_geometric(0.5, 5)),
        r"prior has \(5,\) entries, but exit_pdf has 6 layers",
    ),
    "direction": (lambda: ponder_kl(LAMBDAS, prior=torch.ones(6), direction="x"), "direction is 'x'"),
    "pdf": (lambda: ponder_task_loss(LOGITS, LAMBDAS[:5], Y), r"exit_pdf has shape \(5, 9\), but must be \(at least 6"),
    "targets": (lambda: ponder_task_loss(LOGITS, LAMBDAS, Y[:3]), "targets has 3 rows, but must have 9"),
    "mode": (lambda: LambdaHead(4, mode="sum"), "mode is 'sum', but must be one of"),
    "encoder": (lambda: PonderingClassifier(nn.Linear(3, 3)), "encoder is Linear, but must be one of albert, bert"),
    "dim": (lambda: PonderingClassifier(Plain(), 3), "dim is None, but must be given for this encoder"),
    "classes": (lambda: PonderingClassifier(Plain(), dim=8), "num_classes is None, but must be given for an encoder"),
    "empty": (lambda: PonderingClassifier(Plain(0), 3, dim=8), "Plain without layers, but must have at least one"),
    "beta": (lambda: PonderingClassifier(Plain(), 3, dim=8, beta=-1), "beta is -1, but must be at least 0"),
    "criterion": (lambda: small().predict(X, criterion="never"), "criterion is 'never', but must be one of 'q_exit'"),
    "q": (lambda: small().predict(X, threshold=1), "threshold is 1, but must be"),
    "no targets": (lambda: fit(small(), TensorData(X), pondering, steps=1), "pondering needs them"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_refused(kind):
    call, message = BAD[kind]
    with pytest.raises(InputError, match=message):
        call()


# --- the classifier -------------------------------------------------------------------------------------------------

X = torch.randn(12, 8, generator=DRAW)
LABELS = torch.randint(0, 3, (12,), generator=DRAW)


class Plain(nn.Module):
    """An encoder of vectors, with a mask that the layers take as well, and one row a sample of how often they ran."""

    def __init__(self, depth=5):
        super().__init__()
        self.layers = nn.ModuleList(Counted() for _ in range(depth))

    def embed(self, x):
        return x, torch.ones(len(x), 1)


class Counted(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.rows = nn.Linear(8, 8), 0

    def forward(self, x, mask):
        assert len(x) == len(mask)
        self.rows += len(x)
        return (self.linear(x) * mask).tanh()


def small(seed=0, sharp=3.0, **settings):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = PonderingClassifier(Plain(), 3, dim=8, **settings).eval()
    with torch.no_grad():
        for part in [p for p in model.modules() if isinstance(p, nn.Linear)]:
            part.weight.mul_(sharp)  # so that rows differ in where they stop
        model.lambda_head.layers[-1].bias.fill_(-1.0)
    return model


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.7, 0.95])
def test_batched_exits_equal_the_loop_over_examples_and_the_exits_of_all_layers(threshold):
    model = small()
    logits, used = model.predict(X, threshold=threshold)
    one_by_one = [model.predict(row[None], threshold=threshold) for row in X]
    assert torch.equal(used, torch.cat([u for _, u in one_by_one]))
    torch.testing.assert_close(logits, torch.cat([z for z, _ in one_by_one]), rtol=1e-5, atol=1e-6)
    output = model(X)
    assert torch.equal(used, q_exit(output.lambdas, threshold=threshold) + 1)
    torch.testing.assert_close(logits, output.logits[used - 1, torch.arange(12)], rtol=1e-5, atol=1e-6)
    if threshold == 0.5:
        assert len(used.unique()) > 2


def test_rows_that_are_done_leave_the_batch():
    model = small()
    _, used = model.predict(X, threshold=0.5)
    assert [layer.rows for layer in model.encoder.layers] == [int((used > n).sum()) for n in range(5)]


def test_the_first_layer_sees_zeros_as_the_state_before():
    model = small()
    state = model.pooler(model.encoder.layers[0](X, torch.ones(12, 1))).tanh()
    torch.testing.assert_close(model(X).lambdas[0], model.lambda_head(state, torch.zeros_like(state)))
    assert not torch.allclose(model(X).lambdas[0], model.lambda_head(state, state))


def test_last_and_expected_answers():
    model = small()
    output = model(X)
    logits, used = model.predict(X, criterion="last")
    torch.testing.assert_close(logits, output.logits[-1])
    assert used.tolist() == [5] * 12
    weights = exit_distribution(output.lambdas, epsilon=0.0, remainder="last")
    expected = (weights[..., None] * output.logits.softmax(-1)).sum(0)
    logits, used = model.predict(X, criterion="expectation")
    torch.testing.assert_close(logits.softmax(-1), expected)
    assert used.tolist() == [5] * 12


def test_sampled_exits_follow_the_distribution(global_rng_untouched):
    model = small()
    pdf = exit_distribution(model(X).lambdas, epsilon=0.0, remainder="last")
    counts = torch.zeros(5, 12)
    for seed in range(600):
        _, used = model.predict(X, criterion="sample", generator=seeded(seed))
        counts[used - 1, torch.arange(12)] += 1
    assert (counts / 600 - pdf).abs().max() < 5 * (0.25 / 600) ** 0.5
    one, two = (model.predict(X, criterion="sample", generator=seeded(3))[1] for _ in range(2))
    assert torch.equal(one, two)
    model.predict(X, criterion="sample")


def test_losses_of_the_classifier():
    model = small(beta=0.3, lambda_p=0.2)
    output = model(X, targets=LABELS)
    assert output.logits.shape == (5, 12, 3)
    assert output.exit_pdf.shape == output.lambdas.shape == (5, 12)
    torch.testing.assert_close(output.exit_pdf, exit_distribution(output.lambdas))
    torch.testing.assert_close(output.task_loss, ponder_task_loss(output.logits, output.exit_pdf, LABELS))
    torch.testing.assert_close(output.kl, ponder_kl(output.exit_pdf, prior=truncated_geometric(0.2, 5)))
    torch.testing.assert_close(output.loss, output.task_loss + 0.3 * output.kl)
    assert model(X).loss is None


def test_in_training_layers_are_left_out_once_all_rows_are_past_the_bound():
    model, whole = small(dropout=0.0), small(dropout=0.0)
    for one in (model, whole):
        one.lambda_head.layers[-1].bias.data.fill_(6.0)
    output, full = model.train()(X, targets=LABELS), whole.eval()(X, targets=LABELS)
    computed = len(output.logits)
    assert 1 <= computed < 5
    assert [layer.rows > 0 for layer in model.encoder.layers] == [True] * computed + [False] * (5 - computed)
    torch.testing.assert_close(output.exit_pdf, full.exit_pdf)
    torch.testing.assert_close(output.kl, full.kl)
    torch.testing.assert_close(output.task_loss, ponder_task_loss(full.logits[:computed], full.exit_pdf, LABELS))
    assert len(full.logits) == 5  # in eval mode there is something to look at after every layer


def test_predicting_leaves_the_mode_and_the_randomness_alone(global_rng_untouched):
    model = small().train()
    one, two = model.predict(X), model.predict(X)
    assert torch.equal(one[0], two[0])
    assert model.training
    assert all(part.training for part in model.modules())
    assert not one[0].requires_grad


def test_a_regression():
    with torch.random.fork_rng():
        model = PonderingClassifier(Plain(), 1, dim=8)
    values = torch.randn(12, generator=DRAW)
    output = model.eval()(X, targets=values)
    torch.testing.assert_close(
        output.task_loss, ponder_task_loss(output.logits, output.exit_pdf, values, loss_fn=F.mse_loss)
    )
    weights = exit_distribution(output.lambdas, epsilon=0.0, remainder="last")
    torch.testing.assert_close(
        model.predict(X, criterion="expectation")[0], (weights[..., None] * output.logits).sum(0)
    )


def test_trains_in_fit_and_is_used_like_any_classifier(global_rng_untouched):
    model = small().train()
    data = TensorData(X, LABELS)
    history = fit(model, data, pondering, steps=60, batch_size=12, optimizer=lambda p: torch.optim.Adam(p, 0.01))
    assert history["task"][-1] < history["task"][0]
    assert len(history["divergence"]) == 60
    ready = EarlyExit(model, threshold=0.4)
    assert torch.equal(predict(ready, in_order(data)), model.predict(X, threshold=0.4)[0])


def test_without_the_remainder_not_to_stop_costs_nothing():
    """The code's loss falls by exits that never come; with the remainder it cannot."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        chance = torch.randint(0, 3, (300,))  # nothing can be learned: the loss at chance is log 3
        inputs = torch.randn(300, 8)
    losses = {}
    for remainder in ("none", "last"):
        model = small(remainder=remainder, beta=0.05, sharp=1.0).train()
        history = fit(
            model,
            TensorData(inputs, chance),
            pondering,
            steps=150,
            batch_size=50,
            optimizer=lambda p: torch.optim.Adam(p, 0.01),
        )
        losses[remainder] = sum(history["task"][-20:]) / 20
    assert losses["none"] < 0.5 * math.log(3)
    assert losses["last"] > 0.8 * math.log(3)


class Kill(Callback):
    def __init__(self, at):
        self.at = at

    def on_step(self, run):
        if run.step == self.at:
            raise InterruptedError


def test_a_run_that_was_killed_resumes_to_the_same_weights(tmp_path):
    def train(folder, kill=None):
        model = small().train()
        settings = {"steps": 8, "batch_size": 5, "callbacks": [Kill(kill)]}
        fit(model, TensorData(X, LABELS), pondering, checkpoint=Checkpoint(folder, every=2), **settings)
        return model.state_dict()

    whole = train(tmp_path / "whole")
    with pytest.raises(InterruptedError):
        train(tmp_path / "killed", kill=5)
    resumed = train(tmp_path / "killed")
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


# --- transformers ---------------------------------------------------------------------------------------------------

TINY = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32, "num_labels": 3}


def build(kind, bare=False, **settings):
    import transformers as t

    words = {"vocab_size": 30, "max_position_embeddings": 20, "pad_token_id": 0, **TINY, **settings}
    name, config = {
        "albert": ("Albert", lambda: t.AlbertConfig(embedding_size=8, initializer_range=0.3, **words)),
        "bert": ("Bert", lambda: t.BertConfig(initializer_range=0.3, **words)),
        "roberta": ("Roberta", lambda: t.RobertaConfig(initializer_range=0.3, **words)),
        "vit": ("ViT", lambda: t.ViTConfig(image_size=8, patch_size=4, num_channels=1, **{**TINY, **settings})),
    }[kind]
    ending = "Model" if bare else "ForImageClassification" if kind == "vit" else "ForSequenceClassification"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(t, name + ending)(config()).eval()


def inputs_of(kind):
    if kind == "vit":
        return {"pixel_values": torch.rand(5, 1, 8, 8, generator=seeded(1))}
    ids = torch.randint(3, 30, (5, 7), generator=seeded(1))
    mask = torch.arange(7) < torch.tensor([7, 3, 5, 7, 2])[:, None]
    return {"input_ids": torch.where(mask, ids, 0), "attention_mask": mask.long()}


KINDS = ("albert", "bert", "roberta", "vit")


@pytest.mark.parametrize("kind", KINDS)
def test_after_the_last_layer_the_answer_is_the_models_own(kind, global_rng_untouched):
    model, inputs = build(kind), inputs_of(kind)
    before = model(**inputs).logits
    pondering_model = convert(model, seed=3)
    logits, used = pondering_model.predict(**inputs, criterion="last")
    torch.testing.assert_close(logits, before, rtol=1e-5, atol=1e-6)
    assert used.tolist() == [4] * 5
    assert torch.equal(model(**inputs).logits, before)
    output = pondering_model(**inputs)
    assert output.logits.shape == (4, 5, 3)
    assert len(output.logits.flatten(1).unique(dim=0)) == 4  # another answer after every layer
    assert not pondering_model.training
    same, other = convert(model, seed=3), convert(model, seed=4)
    weights = [one.lambda_head.layers[-1].weight for one in (pondering_model, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("kind", KINDS)
def test_exits_of_real_models_equal_the_loop_over_examples(kind):
    model, inputs = convert(build(kind)), inputs_of(kind)
    with torch.no_grad():
        model.lambda_head.layers[-1].weight.mul_(20)
        lambdas = model(**inputs).lambdas
        used_up = (1 - (1 - lambdas).cumprod(0))[1].sort().values
        threshold = float(used_up[1:3].mean())  # some rows stop after two layers, others do not
    logits, used = model.predict(**inputs, threshold=threshold)
    assert torch.equal(used, q_exit(lambdas, threshold=threshold) + 1)
    for row in range(5):
        one = {name: value[row : row + 1] for name, value in inputs.items()}
        alone, layers = model.predict(**one, threshold=threshold)
        torch.testing.assert_close(alone[0], logits[row], rtol=1e-4, atol=1e-5)
        assert layers[0] == used[row]
    assert len(used.unique()) > 1
    first, *others = inputs.values()
    assert torch.equal(model.predict(first, *others, threshold=threshold)[0], logits)


@pytest.mark.parametrize("kind", KINDS)
def test_real_models_train(kind):
    model, inputs = convert(build(kind)), inputs_of(kind)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    data = TensorData(inputs, torch.tensor([0, 1, 2, 0, 1]))
    history = fit(model, data, pondering, steps=3, batch_size=5, optimizer=lambda p: torch.optim.SGD(p, 0.1))
    assert len(history) == 3
    unmoved = [name for name, p in model.named_parameters() if torch.equal(p, start[name])]
    assert not [name for name in unmoved if "position" not in name and "token_type" not in name]


def test_layers_of_albert_stay_one():
    model = convert(build("albert"))
    assert len({id(layer) for layer in model.parts().layers}) == 1
    grouped = convert(build("albert", num_hidden_groups=2))
    assert [id(layer) == id(grouped.parts().layers[0]) for layer in grouped.parts().layers] == [
        True,
        True,
        False,
        False,
    ]
    twin = copy.deepcopy(model)
    assert twin.parts().layers[0] is twin.encoder.albert.encoder.albert_layer_groups[0]


@pytest.mark.parametrize("kind", KINDS)
def test_bare_encoders_get_a_pooler_and_a_classifier(kind):
    model = convert(build(kind, bare=True), num_classes=7)
    assert model.predict(**inputs_of(kind))[0].shape == (5, 7)
    assert model.pooler.in_features == 16


def test_other_models_are_refused(tiny_llama):
    with pytest.raises(InputError, match="encoder is llama, but must be one of albert, bert, roberta"):
        convert(tiny_llama, num_classes=2)


def test_a_vit_by_recipe(digits_small, global_rng_untouched):
    model = build("vit", num_labels=10)
    plan = recipe(model, digits_small.train, threshold=0.6, beta=0.1)
    finished, history = plan.fit(steps=3, batch_size=32)
    assert isinstance(finished, EarlyExit)
    assert {"task", "divergence"} <= history.records[0].keys()
    assert predict(finished, in_order(digits_small.test)).shape == (100, 10)


@pytest.mark.slow
def test_study_exits_follow_difficulty():
    from retouch.arenas.contest import Terms
    from retouch.arenas.train import TrainProblem
    from retouch.arenas.train.entries.palbert import solve
    from retouch.arenas.train.tasks.depth import DRAWS, TASK, Exits, by_q, by_rule, judge, sampled

    replica = TrainProblem(dataclasses.replace(TASK, steps=400), Terms(replicas=1)).replica(0)
    ours = solve(replica)
    found = judge(ours.model, replica.split)
    others = [judge(Exits(ours.model.model, by_q(q)).eval(), replica.split)["layers"] for q in (0.3, 0.7, 0.9)]
    drawn = judge(Exits(ours.model.model, by_rule(sampled, DRAWS)).eval(), replica.split)
    assert found["spread"] == 0 < drawn["spread"]
    assert found["error"] <= drawn["error"] + 0.5
    assert others[0] <= found["layers"] <= others[1] <= others[2]
    assert found["relation"] > 0.1
