"""What goes into a model and comes out of it, and modes and flags that come back."""

from collections import namedtuple

import pytest
import torch
from torch import nn
from transformers import BatchEncoding
from transformers.modeling_outputs import ImageClassifierOutput

from retouch.core.errors import InputError
from retouch.core.models import (
    count_classes,
    device_of,
    first_tensor,
    forward,
    head_of,
    logits_of,
    mode,
    own,
    predict,
    rows_of,
    size_of,
    to_device,
    training_only,
    tree_map,
    unpack,
)
from retouch.core.teachers import Teacher

X, Y = torch.arange(12.0).view(4, 3), torch.tensor([0, 1, 2, 1])


class Keywords(nn.Module):
    """Takes keywords and gives back whatever kind of output it is told to."""

    def __init__(self, kind=None):
        super().__init__()
        self.kind, self.head = kind, nn.Linear(3, 5)

    def forward(self, pixel_values, scale=1.0):
        logits = self.head(pixel_values) * scale
        return self.kind(logits=logits) if self.kind else logits


@pytest.mark.parametrize(
    ("batch", "inputs", "targets"),
    [
        ((X, Y), X, Y),
        ([X, Y], X, Y),
        ((X,), X, None),
        (X, X, None),
        ({"pixel_values": X, "labels": Y}, {"pixel_values": X}, Y),
        ({"pixel_values": X, "label": Y}, {"pixel_values": X}, Y),
        ({"pixel_values": X, "targets": Y}, {"pixel_values": X}, Y),
        ({"pixel_values": X}, {"pixel_values": X}, None),
        (({"pixel_values": X}, Y), {"pixel_values": X}, Y),
        (BatchEncoding({"pixel_values": X, "labels": Y}), {"pixel_values": X}, Y),
    ],
)
def test_unpack_splits_every_kind_of_batch(batch, inputs, targets):
    got = unpack(batch)
    assert got[1] is targets
    if isinstance(inputs, dict):
        assert list(got[0]) == list(inputs)
        assert got[0]["pixel_values"] is X
    else:
        assert got[0] is inputs


def test_unpack_refuses_a_batch_of_three_parts():
    with pytest.raises(InputError, match="A batch has 3 parts"):
        unpack((X, Y, Y))


def test_forward_hands_mappings_on_as_keywords():
    model = Keywords()
    assert torch.equal(forward(model, {"pixel_values": X, "scale": 2.0}), 2 * forward(model, X))


@pytest.mark.parametrize("kind", [None, dict, ImageClassifierOutput], ids=["tensor", "dict", "ModelOutput"])
def test_logits_of_and_predict_read_tensors_outputs_and_mappings_alike(kind):
    model = Keywords(kind)
    expected = model.head(X)
    assert torch.equal(logits_of(model(X)), expected)
    found = predict(model, [(X[:3], Y[:3]), {"pixel_values": X[3:], "labels": Y[3:]}])
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad


@pytest.mark.parametrize("output", [None, (X,), {"loss": X}, ImageClassifierOutput(loss=X), "logits"])
def test_logits_of_refuses_outputs_without_logits(output):
    with pytest.raises(InputError, match=f"The model returned {type(output).__name__}, but must return a tensor"):
        logits_of(output)


def test_predict_is_in_eval_mode_and_gives_each_modules_own_mode_back():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.9), nn.BatchNorm1d(3), nn.Linear(3, 2))
    model.train()
    model[2].eval()
    statistics = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = predict(model, [X]), predict(model, [X[:2], X[2:]])
    torch.testing.assert_close(first, second)
    assert [module.training for module in model] == [True, True, False, True]
    assert model.training
    assert all(torch.equal(value, statistics[name]) for name, value in model.state_dict().items())


def test_first_tensor_and_size_look_into_nested_batches():
    nested = {"a": [None, ("text", {"b": X})], "c": Y}
    assert first_tensor(nested) is X
    assert size_of(nested) == 4
    assert first_tensor({"a": "text"}) is None
    assert size_of({"a": "text"}) == 0
    assert size_of(torch.tensor(3.0)) == 1


def test_rows_of_cuts_every_tensor_and_leaves_the_rest():
    cut = rows_of({"x": X, "more": [Y, "text"]}, 1, 3)
    assert torch.equal(cut["x"], X[1:3])
    assert torch.equal(cut["more"][0], Y[1:3])
    assert cut["more"][1] == "text"
    assert isinstance(rows_of((X, Y), 0, 1), tuple)
    assert isinstance(rows_of([X, Y], 0, 1), list)


def test_named_tuples_keep_their_names():
    pair = namedtuple("Pair", "image label")(X, Y)
    cut = rows_of(pair, 0, 2)
    assert torch.equal(cut.image, X[:2])
    assert torch.equal(cut.label, Y[:2])


def test_to_device_gives_the_batch_itself_where_it_is_there_already():
    batch = {"x": X, "y": Y}
    assert to_device(batch, "cpu") is batch
    moved = to_device(batch, "meta")
    assert (moved["x"].device.type, moved["y"].device.type) == ("meta", "meta")
    assert to_device("text", "cpu") == "text"


def test_device_of_is_the_first_parameters():
    assert device_of(nn.Linear(2, 2, device="meta")).type == "meta"
    assert device_of(nn.ReLU()).type == "cpu"


@pytest.mark.parametrize("training", [True, False])
def test_mode_gives_every_submodules_mode_back_also_after_an_error(training):
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Dropout(), nn.ReLU()))
    model[1][0].eval()
    before = [module.training for module in model.modules()]
    with mode(model, training=training) as inside:
        assert inside is model
        assert all(module.training is training for module in model.modules())
    assert [module.training for module in model.modules()] == before
    with pytest.raises(KeyError), mode(model, training=training):
        raise KeyError
    assert [module.training for module in model.modules()] == before


def test_mode_leaves_a_teacher_inside_of_the_model_in_eval_mode():
    model = nn.ModuleList([nn.Linear(2, 2), Teacher(nn.Dropout())])
    with mode(model, training=True):
        assert model[0].training
        assert not model[1].model.training


def test_training_only_lets_the_named_parameters_train_and_gives_flags_back():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    model[0].bias.requires_grad_(False)
    with training_only(model, ["0.bias", "1.weight"]):
        assert [n for n, p in model.named_parameters() if p.requires_grad] == ["0.bias", "1.weight"]
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["0.bias"]
    with pytest.raises(KeyError), training_only(model, []):
        assert not any(p.requires_grad for p in model.parameters())
        raise KeyError
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["0.bias"]


def test_training_only_names_unknown_parameters():
    model = nn.Linear(2, 2)
    with pytest.raises(InputError, match="Linear has no parameter body"), training_only(model, ["body"]):
        pass
    assert all(p.requires_grad for p in model.parameters())


def test_own_copies_unless_in_place():
    model = nn.Linear(2, 2)
    assert own(model, inplace=True) is model
    copied = own(model, inplace=False)
    assert copied.weight is not model.weight
    assert torch.equal(copied.weight, model.weight)


def test_count_classes_asks_the_model(tiny_vit):
    assert count_classes(Keywords(), [(X, Y)]) == 5
    assert count_classes(tiny_vit, [(torch.zeros(2, 1, 8, 8), None)]) == 10
    with pytest.raises(InputError, match="The data is empty"):
        count_classes(Keywords(), [])


def test_head_of_finds_the_last_linear_layer(tiny_vit, tiny_llama, trained_cnn):
    assert head_of(tiny_vit) == "classifier"
    assert head_of(tiny_llama) == "lm_head"
    assert head_of(trained_cnn) == "head"
    assert head_of(nn.Sequential(nn.Linear(2, 2), nn.ReLU())) == "0"
    with pytest.raises(InputError, match="The model Sequential has no linear layer"):
        head_of(nn.Sequential(nn.ReLU()))


def test_tree_map_keeps_the_structure():
    mapped = tree_map(lambda t: t + 1, ({"a": X}, [Y, 3], None))
    assert torch.equal(mapped[0]["a"], X + 1)
    assert torch.equal(mapped[1][0], Y + 1)
    assert mapped[1][1] == 3
    assert mapped[2] is None
