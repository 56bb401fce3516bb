"""Real handwriting: 1797 digits of 8x8 pixels (scikit-learn's copy of the UCI test set), and two classifiers.

    data("train")         1200 samples, "validation" 200, "test" 397; the same split everywhere, stratified by digit
    reference("cnn")      28 thousand weights, two convolutions
    reference("vit")      200 thousand weights, a transformers ViTForImageClassification

Images are (1, 8, 8) in 0 to 1. The oracle is the label. `build` trains both again; their measured accuracy is recorded
beside the weights.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from retouch.core import seeds
from retouch.core.batches import in_order
from retouch.core.checkpoints import load_model, save_model
from retouch.core.data import TensorData, labels_of
from retouch.core.errors import one_of
from retouch.core.loop import Callback, Run, fit
from retouch.core.metrics.unlearning import accuracy
from retouch.core.models import Batch, predict
from retouch.worlds import WEIGHTS

KIND = "images"
CLASSES = tuple("0123456789")
SPLITS = {"train": 1200, "validation": 200, "test": 397}
VARIANTS = ("cnn", "vit")
QUICK = ("cnn",)  # can be trained again in seconds


@functools.cache
def data(split: str = "train") -> TensorData:
    """One of the three splits; do not change its tensors."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    one_of("split", split, tuple(SPLITS))
    images, labels = load_digits(return_X_y=True)
    rest, test = train_test_split(range(len(labels)), test_size=SPLITS["test"], stratify=labels, random_state=0)
    train, validation = train_test_split(rest, test_size=SPLITS["validation"], stratify=labels[rest], random_state=0)
    rows = {"train": train, "validation": validation, "test": test}[split]
    inputs = torch.tensor(images[rows] / 16.0, dtype=torch.float32).view(-1, 1, 8, 8)
    return TensorData(inputs, torch.tensor(labels[rows]))


class DigitsCNN(nn.Module):
    """Two convolutions with pooling, a hidden layer `fc`, and the classification layer `head`.

    Args:
        width: channels of the first convolution; the second has twice as many.
        hidden: units of `fc`.
    """

    def __init__(self, width: int = 32, hidden: int = 64) -> None:
        super().__init__()
        self.config = {"width": width, "hidden": hidden}
        self.conv1 = nn.Conv2d(1, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.fc = nn.Linear(2 * width * 4, hidden)
        self.head = nn.Linear(hidden, len(CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        """Images (n, 1, 8, 8) to logits (n, 10)."""
        x = F.max_pool2d(F.relu(self.conv1(images)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.head(F.relu(self.fc(x.flatten(1))))


def new_vit() -> nn.Module:
    """An untrained ViT for these images: 2x2 patches, 6 layers of width 64."""
    from transformers import ViTConfig, ViTForImageClassification

    settings: dict[str, Any] = {
        "hidden_size": 64,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "id2label": dict(enumerate(CLASSES)),
        "label2id": {name: number for number, name in enumerate(CLASSES)},
    }
    config = ViTConfig(image_size=8, patch_size=2, num_channels=1, **settings)
    return ViTForImageClassification(config)


def image_processor() -> Any:
    """Turns pictures of any size into the ViT's inputs."""
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    size = {"height": 8, "width": 8}
    return ViTImageProcessorPil(size=size, image_mean=[0.0], image_std=[1.0], do_convert_rgb=False)


class Recipe:
    """How a classifier of this world is trained: the same for references, oracles and subset models.

    Args:
        epochs: passes over the data.
        rate: highest learning rate of a one-cycle schedule.
        decay: weight decay of AdamW.
        jitter: turn, scale and shift the images a little at every step.
    """

    def __init__(self, epochs: int, rate: float, decay: float = 0.01, *, jitter: bool = False) -> None:
        self.epochs, self.rate, self.decay, self.jitter = epochs, rate, decay, jitter
        self.batch_size = 64

    def optimizer(self, parameters: Any) -> Optimizer:
        """AdamW."""
        return AdamW(parameters, lr=self.rate, weight_decay=self.decay)

    def scheduler(self, optimizer: Optimizer, steps: int) -> LRScheduler:
        """One cycle up and down."""
        return OneCycleLR(optimizer, self.rate, total_steps=steps)

    def train(self, model: nn.Module, samples: Any, *, seed: int, progress: bool | None = None) -> nn.Module:
        """Train a model in place and return it in eval mode."""
        fit(
            model,
            samples,
            epochs=self.epochs,
            batch_size=self.batch_size,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            callbacks=[Jitter()] if self.jitter else [],
            seed=seed,
            progress=progress,
        )
        return model.eval()


class Jitter(Callback):
    """Turn images by up to 0.15 rad, scale them by up to 10% and shift them by up to half a pixel."""

    def on_batch(self, run: Run, batch: Batch) -> Batch:
        images, labels = batch
        n, draw = len(images), run.generator
        angle, scale = (torch.rand(2, n, generator=draw) * 2 - 1) * torch.tensor([[0.15], [0.1]])
        shift = (torch.rand(n, 2, generator=draw) * 2 - 1) / 8
        cos, sin = (1 + scale) * angle.cos(), (1 + scale) * angle.sin()
        rows = [torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)]
        grid = F.affine_grid(torch.stack(rows, 1).to(images), images.shape, align_corners=False)
        return F.grid_sample(images, grid, align_corners=False), labels


RECIPES = {"cnn": Recipe(30, 1e-2, 0.1), "vit": Recipe(150, 1e-3, 0.05, jitter=True)}
BUILDERS: dict[str, Callable[[], nn.Module]] = {"cnn": DigitsCNN, "vit": new_vit}


def train(variant: str, samples: Any, *, seed: int) -> nn.Module:
    """A classifier trained from scratch by the world's recipe."""
    one_of("variant", variant, VARIANTS)
    with seeds.isolated(seeds.derive(seed, "weights")):
        model = BUILDERS[variant]()
    return RECIPES[variant].train(model, samples, seed=seed)


def reference(variant: str = "cnn") -> nn.Module:
    """The shipped classifier, in eval mode; `quality(variant)` says how good it is."""
    one_of("variant", variant, VARIANTS)
    return load_model(WEIGHTS / f"digits-{variant}")


def quality(variant: str) -> dict[str, float]:
    """Recorded accuracy of the shipped classifier on each split, in percent."""
    return json.loads((WEIGHTS / f"digits-{variant}" / "quality.json").read_text())


def measure(model: nn.Module) -> dict[str, float]:
    """Accuracy on each split, in percent."""
    return {
        split: round(accuracy(predict(model, in_order(data(split))), labels_of(data(split))), 2) for split in SPLITS
    }


def build(folder: Path = WEIGHTS, *, seed: int = 0, checkpoint: Path | None = None) -> None:
    """Train the reference models and write them with their measured accuracy; that takes no time worth a checkpoint."""
    for variant in VARIANTS:
        model = train(variant, data("train"), seed=seed)
        target = folder / f"digits-{variant}"
        target.mkdir(parents=True, exist_ok=True)
        save_model(model, target)
        if variant == "vit":
            image_processor().save_pretrained(target)
        (target / "quality.json").write_text(json.dumps(measure(model), indent=1) + "\n")
