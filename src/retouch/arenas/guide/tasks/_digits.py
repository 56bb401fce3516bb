"""A small class-conditional UNet of handwritten digits, and judges of what it draws."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from retouch.core import seeds
from retouch.core.data import TensorData
from retouch.core.diffusion.denoiser import Denoiser
from retouch.core.diffusion.process import VP
from retouch.core.features import features_of
from retouch.core.loop import Run, fit
from retouch.core.metrics.frechet import frechet_distance
from retouch.core.models import Batch, head_of, mode, unpack
from retouch.worlds import digits

NONE = 10  # the class that stands for none
STEPS, BATCH = 800, 64
SURE = 0.9


def unet() -> Any:
    """diffusers' UNet for 8 x 8 pixels, with attention at 4 x 4."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(24, 48),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=12,
        num_class_embeds=NONE + 1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def taught(seed: int, *, steps: int = STEPS) -> Denoiser:
    """A denoiser of digits in -1 to 1, which knows their classes and does without them too."""
    data, process = digits.data("train"), VP.linear(spacing="trailing")
    with seeds.isolated(seeds.derive(seed, "weights")):
        model = unet()

    def objective(model: nn.Module, batch: Batch, run: Run) -> Tensor:
        images, labels = unpack(batch)
        x0 = 2 * images - 1
        noise, times = torch.randn(x0.shape, generator=run.generator), process.random_times(len(x0), run.generator)
        hidden = torch.rand(len(x0), generator=run.generator) < 0.2
        told = torch.where(hidden, NONE, labels)
        return (model(process.add_noise(x0, noise, times), times, class_labels=told).sample - noise).square().mean()

    fit(
        model,
        TensorData(data.inputs, data.targets),
        objective,
        steps=steps,
        batch_size=BATCH,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=2e-3),
        scheduler=lambda optimizer, count: torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=count),
        clip=1.0,
        seed=seeds.derive(seed, "training"),
        progress=False,
    )
    return Denoiser(model.eval(), process, null={"class_labels": torch.tensor([NONE])})


@dataclass(frozen=True)
class Seen:
    """What the shipped classifier makes of images: probabilities (n, 10) and features (n, d)."""

    probabilities: Tensor
    features: Tensor


@torch.no_grad()
def look(images: Any) -> Seen:
    """Images (n, 1, 8, 8) in 0 to 1, through the reference CNN."""
    model: Any = digits.reference("cnn")
    with mode(model, training=False):
        features = features_of(model, images, head_of(model), side="input")
        return Seen(model(images).softmax(1), features)


def unsure(images: Tensor) -> float:
    """Images that the classifier is not sure of, in percent."""
    return 100 * float((look(images).probabilities.amax(1) < SURE).double().mean())


def distance(images: Tensor) -> float:
    """Fréchet distance to held-out digits, on the classifier's features."""
    return frechet_distance(look(images).features, look(digits.data("test").inputs).features)


def variety(images: Tensor) -> float:
    """Entropy of the classes drawn, in nats; log 10 is the most."""
    shares = look(images).probabilities.mean(0)
    return float(torch.special.entr(shares).sum())
