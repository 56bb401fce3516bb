"""Activations of named layers, by hooks that leave nothing behind."""

import pytest
import torch
from torch import nn

from retouch.core.errors import InputError
from retouch.core.features import capture, features_of, layer_of, shapes


class Net(nn.Module):
    """A layer that gives a tuple, one that is called with a keyword, and one that is not called at all."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
        self.recurrent = nn.GRU(6, 5, batch_first=True)
        self.head = nn.Linear(5, 3)
        self.drop = nn.Dropout(0.9)
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        steps, _ = self.recurrent(self.body(x))
        return self.head(input=self.drop(steps[:, -1]))


@pytest.fixture
def model():
    return Net().eval()


X = torch.randn(2, 7, 4, generator=torch.Generator().manual_seed(0))


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


def test_layer_of_finds_a_layer_by_its_name(model):
    assert layer_of(model, "body.0") is model.body[0]
    with pytest.raises(InputError, match=r"Net has no layer 'body\.O'\. Did you mean .*body\.0"):
        layer_of(model, "body.O")
    with pytest.raises(InputError, match="Net has no layer ''"):
        layer_of(model, "")


def test_outputs_and_inputs_are_those_of_the_layers(model):
    with (
        capture(model, ["body", "recurrent", "head"]) as outputs,
        capture(model, ["head", "body.1"], side="input") as ins,
    ):
        result = model(X)
    hidden = model.body(X)
    steps, _ = model.recurrent(hidden)
    assert list(outputs) == ["body", "recurrent", "head"]
    assert torch.equal(outputs["body"], hidden)
    assert torch.equal(outputs["recurrent"], steps), "the first tensor of a tuple"
    assert torch.equal(outputs["head"], result)
    assert torch.equal(ins["head"], steps[:, -1]), "given as a keyword"
    assert torch.equal(ins["body.1"], model.body[0](X))


def test_off_equals_the_original_and_on_does_too(model):
    expected = model(X)
    with capture(model, ["body", "head"]):
        assert torch.equal(model(X), expected)
    assert torch.equal(model(X), expected)
    assert hooks(model) == 0


def test_every_forward_pass_is_recorded_anew(model):
    with capture(model, ["body"]) as seen:
        model(X)
        first = seen["body"]
        model(X + 1)
        assert not torch.equal(seen["body"], first)


def test_activations_have_gradients(model):
    x = X.clone().requires_grad_()
    features = features_of(model, x, "body.0")
    features.sum().backward()
    torch.testing.assert_close(x.grad, model.body[0].weight.sum(0).expand_as(x))
    assert torch.equal(model.body[0].bias.grad, torch.full((6,), 14.0))


def test_hooks_are_gone_after_an_error(model):
    with pytest.raises(KeyError), capture(model, ["body", "head"]):
        raise KeyError
    assert hooks(model) == 0


def test_an_unknown_layer_leaves_no_hook_behind(model):
    with pytest.raises(InputError, match="has no layer 'haed'"), capture(model, ["body", "haed"]):
        pass
    assert hooks(model) == 0


def test_an_unknown_side_is_refused(model):
    with pytest.raises(InputError, match="side is 'middle', but must be one of 'output', 'input'"):
        features_of(model, X, "body", side="middle")
    assert hooks(model) == 0


def test_a_layer_that_does_not_run_is_named(model):
    with pytest.raises(InputError, match="The layer 'unused' did not run"):
        features_of(model, X, "unused")
    assert hooks(model) == 0


def test_features_of_real_models(tiny_vit, trained_cnn):
    images = torch.rand(3, 1, 8, 8)
    pooled = tiny_vit.vit(images).last_hidden_state[:, 0]
    torch.testing.assert_close(features_of(tiny_vit, images, "classifier", side="input"), pooled)
    torch.testing.assert_close(features_of(tiny_vit, {"pixel_values": images}, "classifier", side="input"), pooled)
    torch.testing.assert_close(features_of(trained_cnn, images, "head"), trained_cnn(images))


def test_shapes_are_found_in_one_dry_run_in_eval_mode(model, tiny_llama):
    model.train()
    model.drop.eval()
    assert shapes(model, (X, None), ["body", "recurrent", "head"]) == {
        "body": (2, 7, 6),
        "recurrent": (2, 7, 5),
        "head": (2, 3),
    }
    assert shapes(model, X, ["head"], side="input") == {"head": (2, 5)}
    assert model.training
    assert not model.drop.training
    batch = {"input_ids": torch.ones(2, 5, dtype=torch.long), "labels": torch.ones(2, 5, dtype=torch.long)}
    assert shapes(tiny_llama, batch, ["model.layers.0.mlp"]) == {"model.layers.0.mlp": (2, 5, 16)}
    assert hooks(model) == 0
