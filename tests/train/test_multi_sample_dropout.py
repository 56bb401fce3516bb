"""Multi-Sample Dropout: independent masks, averaged losses, and nothing at inference."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from retouch.core.data import TensorData
from retouch.core.errors import InputError
from retouch.core.loop import fit
from retouch.core.models import head_of
from retouch.core.objectives import cross_entropy_batch
from retouch.train.cutmix import CutMix
from retouch.train.multi_sample_dropout import (
    MultiSampleDropout,
    attach_multi_sample_dropout,
    convert,
    multi_sample_dropout,
    multi_sample_loss,
    recipe,
)

DRAW = torch.Generator().manual_seed(0)
H = torch.randn(5, 12, generator=DRAW)
Y = torch.tensor([0, 1, 2, 1, 0])


def linear(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(12, 3)


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


# --- masks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 12), (5, 3, 4, 4)])
def test_kept_entries_are_scaled_exactly_and_masks_are_independent(shape):
    features = torch.randn(shape, generator=DRAW)
    samples = multi_sample_dropout(features, num_samples=6, p=0.25, generator=torch.Generator().manual_seed(1))
    assert samples.shape == (6, *shape)
    assert ((samples == 0) | (samples == features / 0.75)).all()
    masks = (samples != 0).flatten(2)
    assert len(masks.flatten(1).unique(dim=0)) == 6  # another one for every sample
    assert all(len(mask.unique(dim=0)) == 5 for mask in masks)  # and for every example


def test_samples_average_to_the_features():
    samples = multi_sample_dropout(H, num_samples=4000, p=0.5, generator=torch.Generator().manual_seed(2))
    error = samples.mean(0) - H
    assert (error.abs() < 5 * H.abs() / 4000**0.5 + 1e-6).all()  # 5 standard errors: p = 0.5 has one of |h|


def test_the_same_generator_gives_the_same_masks(global_rng_untouched):
    one, two = (multi_sample_dropout(H, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two)


# --- limits and equalities ------------------------------------------------------------------------------------------


def test_one_sample_is_ordinary_dropout():
    head, features = linear(), H.clone().requires_grad_()
    layer = MultiSampleDropout(head, num_samples=1, p=0.4).train()
    with torch.random.fork_rng():
        torch.manual_seed(5)
        loss, logits = layer.loss(features, Y)
        torch.manual_seed(5)
        expected = head(F.dropout(features, 0.4))
        plain = F.cross_entropy(expected, Y)
    assert torch.equal(logits, expected)
    for one, two in zip(
        gradients(loss, features, *head.parameters()), gradients(plain, features, *head.parameters()), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(loss, plain)


@pytest.mark.parametrize("samples", [1, 3, 8])
def test_without_dropping_all_samples_are_the_plain_head(samples):
    head, features = linear(), H.clone().requires_grad_()
    layer = MultiSampleDropout(head, num_samples=samples, p=0.0).train()
    assert all(torch.allclose(logits, head(features), atol=1e-6) for logits in layer(features))
    loss, _ = layer.loss(features, Y)
    plain = F.cross_entropy(head(features), Y)
    torch.testing.assert_close(loss, plain)
    for one, two in zip(gradients(loss, features), gradients(plain, features), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("samples", [1, 8])
def test_inference_is_the_head(samples):
    head = linear()
    layer = MultiSampleDropout(head, num_samples=samples, p=0.9).eval()
    assert torch.equal(layer(H), head(H))
    assert layer.loss(H, Y)[0] == F.cross_entropy(head(H), Y)


def test_the_mean_of_losses_is_at_least_the_loss_of_mean_logits():
    logits = torch.randn(8, 5, 3, generator=DRAW)
    assert multi_sample_loss(logits, Y) > F.cross_entropy(logits.mean(0), Y)
    same = logits[:1].expand(8, -1, -1)
    torch.testing.assert_close(multi_sample_loss(same, Y), F.cross_entropy(same.mean(0), Y))


def test_every_samples_loss_depends_on_the_heads_weights():
    head = linear()
    losses = multi_sample_loss(MultiSampleDropout(head, num_samples=4).train()(H), Y, reduction="none")
    assert losses.shape == (4,)
    for loss in losses:
        assert torch.autograd.grad(loss, head.weight, retain_graph=True)[0].abs().sum() > 0


def test_the_features_gradient_is_the_mean_of_the_samples_gradients():
    head, features = linear(), H.clone().requires_grad_()
    samples = multi_sample_dropout(features, num_samples=6, generator=torch.Generator().manual_seed(4))
    logits = head(samples)
    alone = [torch.autograd.grad(F.cross_entropy(sample, Y), features, retain_graph=True)[0] for sample in logits]
    whole = torch.autograd.grad(multi_sample_loss(logits, Y), features)[0]
    torch.testing.assert_close(whole, torch.stack(alone).mean(0))


def test_folding_equals_a_loop_over_samples():
    head = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    layer = MultiSampleDropout(head, num_samples=5, p=0.3).train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        folded = layer(H)
        torch.manual_seed(0)
        looped = torch.stack([head(sample) for sample in multi_sample_dropout(H, num_samples=5, p=0.3)])
    torch.testing.assert_close(folded, looped)


def test_batch_normalisation_in_the_head_sees_each_sample_alone():
    head = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    layer = MultiSampleDropout(head, num_samples=3, p=0.5).train()
    layer(H)
    assert int(head[1].num_batches_tracked) == 3


def test_samples_can_be_perturbed():
    seen = []

    def flip(features, number):
        seen.append(number)
        return -features if number % 2 else features

    layer = MultiSampleDropout(nn.Identity(), num_samples=4, p=0.0, perturb=flip).train()
    found = layer(H)
    assert torch.equal(found[0], H)
    assert torch.equal(found[1], -H)
    assert seen == [0, 1, 2, 3]


def test_soft_targets():
    logits, targets = torch.randn(4, 5, 3, generator=DRAW), torch.rand(5, 3, generator=DRAW).softmax(1)
    expected = torch.stack([F.cross_entropy(sample, targets) for sample in logits]).mean()
    torch.testing.assert_close(multi_sample_loss(logits, targets), expected)


BAD = {
    "no samples": (lambda: multi_sample_dropout(H, num_samples=0), "num_samples is 0, but must be greater than 0"),
    "all dropped": (lambda: multi_sample_dropout(H, p=1.0), r"p is 1\.0, but must be at least 0 and less than 1"),
    "negative": (lambda: MultiSampleDropout(linear(), p=-0.1), r"p is -0\.1, but must be"),
    "two dimensions": (lambda: multi_sample_loss(torch.zeros(5, 3), Y), r"logits has shape \(5, 3\), but must be"),
    "batch": (lambda: multi_sample_loss(torch.zeros(2, 5, 3), Y[:4]), "targets has 4 rows, but must have 5"),
    "reduction": (lambda: multi_sample_loss(torch.zeros(2, 5, 3), Y, reduction="sum"), "reduction is 'sum'"),
    "no dropout": (
        lambda: attach_multi_sample_dropout(nn.Sequential(linear()), "0"),
        "dropout_name is '0', a Linear, but must be an nn.Dropout",
    ),
    "batch norm": (
        lambda: attach_multi_sample_dropout(nn.Sequential(nn.Dropout(), nn.Linear(12, 8), nn.BatchNorm1d(8)), "0"),
        "Batch normalisation follows 0",
    ),
    "not sequential": (
        lambda: attach_multi_sample_dropout(nn.ModuleDict({"drop": nn.Dropout()}), "drop"),
        r"drop is inside a ModuleDict, but must be in an nn\.Sequential",
    ),
    "not linear": (lambda: convert(nn.Sequential(nn.ReLU(), linear()), head="0"), "head is '0', a ReLU, but must be"),
    "no head": (lambda: convert(nn.Sequential(nn.ReLU())), "has no linear layer that could be its head"),
    "samples": (lambda: convert(linear(), samples=-1), "samples is -1, but must be greater than 0"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_refused(kind):
    call, message = BAD[kind]
    with pytest.raises(InputError, match=message):
        call()


# --- in models ------------------------------------------------------------------------------------------------------


def mlp():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))


def test_attach_repeats_the_dropout_and_what_follows_and_leaves_the_state_dict():
    model, original = mlp(), mlp()
    found = attach_multi_sample_dropout(model, "2", num_samples=4)
    assert found is model
    assert model.state_dict().keys() == original.state_dict().keys()
    assert torch.equal(model.eval()(H), original.eval()(H))
    logits = model.train()(H)
    assert logits.shape == (4, 5, 3)
    assert len(logits.flatten(1).unique(dim=0)) == 4
    model[2].p = 0.0
    torch.testing.assert_close(model(H), original.eval()(H).expand(4, -1, -1))


def test_convert_takes_the_place_of_the_dropout_before_the_head():
    body = nn.Sequential(nn.Linear(12, 8), nn.Dropout(0.7), nn.Linear(8, 3))
    model = convert(body, samples=64)
    features = []
    model[2].register_forward_pre_hook(lambda module, args: features.append(args[0]))
    hidden = body[0](H)
    model.train()(H)
    kept = features[0] != 0
    assert features[0].shape == (64, 5, 8)
    assert float(kept.float().mean()) == pytest.approx(0.3, abs=0.05)  # once, and not on top of the other
    expected = (hidden / 0.3).expand(64, -1, -1)
    torch.testing.assert_close(features[0][kept], expected[kept])
    assert not body._forward_hooks
    assert not body[1]._forward_hooks


def test_a_converted_copy_is_the_original_in_eval_mode_and_the_original_is_left_alone(tiny_vit, digits_small):
    images, labels = digits_small.test[torch.arange(6)]
    before = tiny_vit(images).logits
    model = convert(tiny_vit, samples=5, p=0.3)
    assert torch.equal(model.eval()(images).logits, before)
    assert model.state_dict().keys() == tiny_vit.state_dict().keys()
    logits = model.train()(images).logits
    assert logits.shape == (5, 6, 10)
    assert tiny_vit.train()(images).logits.shape == (6, 10)
    torch.testing.assert_close(
        cross_entropy_batch(lambda x: logits, (images, labels)), multi_sample_loss(logits, labels)
    )


def test_hooks_of_a_copied_or_saved_model_are_its_own(tiny_vit, digits_small, tmp_path):
    images = digits_small.test.inputs[:4]
    model = convert(tiny_vit, samples=3)
    twin = copy.deepcopy(model).train()
    assert twin(images).logits.shape == (3, 4, 10)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(again.eval()(images).logits, model.eval()(images).logits)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_real_sequence_classifiers(kind):
    import transformers

    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = {"bert": transformers.BertConfig, "roberta": transformers.RobertaConfig}[kind](vocab_size=30, **tiny)
    name = {"bert": "BertForSequenceClassification", "roberta": "RobertaForSequenceClassification"}[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, name)(config)
    converted = convert(model, samples=4)
    data = TensorData({"input_ids": torch.randint(3, 30, (8, 6), generator=DRAW)}, torch.tensor([0, 1] * 4))
    assert converted.train()(**data.inputs).logits.shape == (4, 8, 2)
    assert torch.equal(converted.eval()(**data.inputs).logits, model.eval()(**data.inputs).logits)
    assert len(fit(converted, data, steps=2)) == 2


def test_trains_together_with_cutmix(tiny_vit, digits_small, global_rng_untouched):
    start = tiny_vit.classifier.weight.clone()
    plan = recipe(tiny_vit, digits_small.train, samples=4, p=0.2)
    model, history = plan.fit(steps=4, batch_size=32, callbacks=[CutMix(probability=1.0)])
    assert len(history) == 4
    assert not torch.equal(model.classifier.weight, start)
    assert head_of(model) == "classifier"


@pytest.mark.slow
def test_study_more_samples_are_ahead_early(capsys):
    """300 digits, dropout of 0.8: 8 masks a step against 1, after 40 steps and at the end."""
    from retouch.arenas.contest import Terms, arena
    from retouch.arenas.train.entries.multi_sample_dropout import solve

    problem = arena("train").prepare("dropout", Terms(replicas=3))
    early, end = [], []
    for number in range(3):
        replica = problem.replica(number)
        curves = [{s: e for s, _, e in made.curve} for made in (replica.train(), solve(replica, samples=8))]
        early.append(curves[0][40] - curves[1][40])
        end.append(curves[0][300] - curves[1][300])
    assert sum(early) / 3 > 4
    assert sum(end) / 3 > -1
