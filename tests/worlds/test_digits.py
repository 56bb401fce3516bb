"""The world `digits`: real data in a fixed split, and reference models as good as recorded."""

import json

import pytest
import torch

from retouch.core.batches import in_order
from retouch.core.checkpoints import load_model
from retouch.core.errors import InputError
from retouch.core.models import predict
from retouch.worlds import WEIGHTS, digits, names, world


def test_splits_are_fixed_disjoint_and_stratified():
    from sklearn.datasets import load_digits

    parts = {name: digits.data(name) for name in digits.SPLITS}
    assert {name: len(part) for name, part in parts.items()} == {"train": 1200, "validation": 200, "test": 397}
    rows = torch.cat([part.inputs.flatten(1) for part in parts.values()])
    everything = torch.tensor(load_digits().data / 16.0, dtype=torch.float32)
    order, wanted = (sorted(map(tuple, some.tolist())) for some in (rows, everything))
    assert order == wanted
    for part in parts.values():
        share = torch.bincount(part.targets) / len(part)
        assert (share - 0.1).abs().max() < 0.02
    assert parts["train"].targets[:5].tolist() == digits.data("train").targets[:5].tolist()


def test_images_are_in_range():
    data = digits.data("train")
    assert data.inputs.shape == (1200, 1, 8, 8)
    assert data.inputs.min() == 0
    assert data.inputs.max() == 1


@pytest.mark.parametrize("variant", digits.VARIANTS)
def test_reference_models_are_as_good_as_recorded(variant):
    model = digits.reference(variant)
    assert not model.training
    assert digits.measure(model) == pytest.approx(digits.quality(variant), abs=0.01)
    assert digits.quality(variant)["test"] >= 97.5


def test_reference_vit_is_a_transformers_model_with_its_processor():
    import transformers
    from PIL import Image

    folder = WEIGHTS / "digits-vit"
    model = transformers.ViTForImageClassification.from_pretrained(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    image = (digits.data("test").inputs[0, 0] * 255).round().to(torch.uint8).numpy()
    pixels = processor(Image.fromarray(image), return_tensors="pt")["pixel_values"]
    assert torch.allclose(pixels[0], digits.data("test").inputs[0], atol=1 / 255)
    assert model.config.id2label[int(model(pixels).logits.argmax())] == str(int(digits.data("test").targets[0]))


def test_training_depends_on_the_seed_alone(global_rng_untouched):
    from retouch.core.data import subset

    some = subset(digits.data("train"), range(64))
    one, two, three = (digits.train("cnn", some, seed=seed) for seed in (1, 1, 2))
    batches = in_order(some)
    assert torch.equal(predict(one, batches), predict(two, batches))
    assert not torch.equal(predict(one, batches), predict(three, batches))


def test_jitter_moves_images_but_not_labels():
    from types import SimpleNamespace

    images, labels = digits.data("train")[torch.arange(32)]
    moved, kept = digits.Jitter().on_batch(
        SimpleNamespace(generator=torch.Generator().manual_seed(0)), (images, labels)
    )
    assert moved.shape == images.shape
    assert not torch.allclose(moved, images)
    assert torch.equal(kept, labels)


def test_build_writes_models_and_their_quality(tmp_path, monkeypatch):
    short = {"cnn": digits.Recipe(1, 1e-2), "vit": digits.Recipe(1, 1e-3)}
    monkeypatch.setattr(digits, "RECIPES", short)
    digits.build(tmp_path, seed=3)
    for variant in digits.VARIANTS:
        folder = tmp_path / f"digits-{variant}"
        recorded = json.loads((folder / "quality.json").read_text())
        assert digits.measure(load_model(folder)) == recorded
    assert (tmp_path / "digits-vit" / "preprocessor_config.json").exists()


def test_worlds_are_found_and_unknown_ones_refused():
    assert "digits" in names()
    assert world("digits") is digits
    with pytest.raises(InputError, match="digit.*Did you mean digits"):
        world("digit")
    with pytest.raises(InputError, match="split is 'all'"):
        digits.data("all")
