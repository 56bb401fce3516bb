"""The model of pixels, told no class, is steered to a shape by a classifier that has seen clean images alone.

Studies of EluCD and of PPAP on shapes. The diffusion model is EDM's; both techniques come with DDPM steps, so it is
asked as a variance-preserving one: x / alpha at the noise sigma / alpha, on EDM's own levels. All sample by DDPM in 30
steps. Who judges is the oracle, which is no network.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from retouch.arenas.guide import Outcome, Replica, Task, baseline, timed
from retouch.arenas.guide.tasks import _classes as world
from retouch.arenas.guide.tasks.classes import AtNoise
from retouch.core import seeds
from retouch.core.data import TensorData
from retouch.core.diffusion.denoiser import Denoiser
from retouch.core.diffusion.process import VP, Level
from retouch.core.diffusion.sampling import sample, unit_noise
from retouch.core.diffusion.steps import ddpm, dpmpp_2m
from retouch.core.loop import Run, fit
from retouch.core.models import Batch, unpack
from retouch.guide.elucd import OffTheShelfClassifierGuidance
from retouch.worlds import shapes
from retouch.worlds.shapes.scenes import COLOURS, SHAPES

NAME = "classifier"
TIMES, STEPS = 10, 30  # images a shape; steps
SIZE = 32
TIMESTEPS = 1000
TRAINING, RATE = 400, 1e-2  # steps of the classifier; 98% of held-out images are right then
ITERATIONS = 300  # of experts
SYNTHETIC = 360  # images that the model makes for those who train on such


@dataclass(frozen=True, kw_only=True)
class Given(world.Asked):
    """An unconditional model, a classifier of clean images, noise and what is asked for, in numbers as well."""

    denoiser: Denoiser
    classifier: nn.Module
    labels: Tensor


class Preserving(nn.Module):
    """EDM's network for variance-preserving noise: (x_t, t, ...) -> x0.

    Args:
        edm: the denoiser.
        process: of x_t.
    """

    def __init__(self, edm: Denoiser, process: VP) -> None:
        super().__init__()
        self.network, self.edm, self.process = edm.model, edm, process

    def forward(self, x: Tensor, time: Tensor, **condition: Any) -> Tensor:
        """All samples are at the same time."""
        alpha, sigma = (float(value) for value in self.process.levels(time[:1]))
        return self.edm(x / alpha, Level(sigma / alpha, 1.0, sigma / alpha), condition).x0


@functools.cache
def denoiser() -> Denoiser:
    """The shipped model as a DDPM: told no class unless a condition says so."""
    edm = world.denoiser("pixels")
    sigmas = torch.tensor([level.sigma for level in edm.process.grid(TIMESTEPS).levels[-2::-1]], dtype=torch.float64)
    process = VP(1 / (1 + sigmas.square()), spacing="linspace")
    model = Preserving(edm, process).eval()
    return Denoiser(
        model, process, predicts="x0", encode=lambda names: edm.encode(names, len(names)), null=edm.encode(None, 1)
    )


@functools.cache
def classifier() -> nn.Module:
    """A small network from images in -1 to 1 to logits of the shapes, trained once for all replicas."""
    with seeds.isolated(seeds.derive(0, "classifier of shapes")):
        layers: list[nn.Module] = []
        for i, o, stride in ((3, 16, 1), (16, 32, 2), (32, 64, 2)):
            layers += [nn.Conv2d(i, o, 3, stride=stride, padding=1), nn.BatchNorm2d(o), nn.ReLU()]
        model = nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(64, len(SHAPES)))
    train: Any = shapes.classification("train", "shape", size=SIZE)

    def objective(model: nn.Module, batch: Batch, run: Run) -> Tensor:
        images, labels = unpack(batch)
        turned = torch.rand(len(images), generator=run.generator) < 0.5
        return F.cross_entropy(model(torch.where(turned[:, None, None, None], images.flip(-1), images)), labels)

    fit(
        model,
        TensorData(2 * train.inputs - 1, train.targets),
        objective,
        steps=TRAINING,
        batch_size=64,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.05),
        scheduler=lambda optimizer, steps: OneCycleLR(optimizer, RATE, total_steps=steps, cycle_momentum=False),
        seed=seeds.derive(0, "training of the classifier of shapes"),
        progress=False,
    )
    return model.eval().requires_grad_(False)


@functools.cache
def synthetic() -> Tensor:
    """Images in -1 to 1 that the model makes by itself, for experts to be trained on, once for all replicas."""
    noise = unit_noise(world.denoiser("pixels"), SYNTHETIC, seeds.generator(0, "synthetic"))
    model = denoiser()
    return world.batches(lambda part: sample(model, noise[part], times=10, step=dpmpp_2m), SYNTHETIC)


def prepare(seed: int, search: bool) -> Given:
    """Model and classifier are the same in all replicas."""
    model = world.denoiser("pixels")
    order = torch.randperm(TIMES * len(SHAPES), generator=seeds.generator(seed, "shapes"))
    labels = order % len(SHAPES)
    noise = unit_noise(model, len(labels), seeds.generator(seed, "noise"))
    classes = [SHAPES[number] for number in labels.tolist()]
    return Given(denoiser=denoiser(), classifier=classifier(), noise=noise, classes=classes, labels=labels, seed=seed)


def steered(replica: Replica, hooks: Any, condition: Any = None) -> Outcome:
    """Images by DDPM with hooks, all in one batch, as hooks know their labels by place."""
    given: Given = replica.given

    def draw() -> Tensor:
        generator = seeds.generator(given.seed, "sampling")
        settings: Any = {"times": STEPS, "step": ddpm, "hooks": hooks, "generator": generator}
        return given.denoiser.decode(sample(given.denoiser, given.noise, condition, **settings))

    return timed([given.denoiser], len(given.noise), draw)


def unguided(replica: Replica) -> Outcome:
    """What the model draws by itself."""
    return steered(replica, [])


def on_noise(replica: Replica, *, scale: float) -> Outcome:
    """Classifier guidance as it is with a classifier of noisy images: the gradient at x_t."""
    given = replica.given
    return steered(replica, [AtNoise(lambda x, level: given.classifier(x), given.labels, scale)])


def on_x0(replica: Replica, *, scale: float) -> Outcome:
    """The gradient of log p(y | x0) at the predicted x0, without EluCD's smoothness, direction and schedule."""
    given = replica.given
    plain: Any = {"joint_temperature": 1.0, "marginal_temperature": 1.0, "gamma": 0.0, "softplus_beta": None}
    return steered(replica, [OffTheShelfClassifierGuidance(given.classifier, given.labels, scale=scale, **plain)])


def told(replica: Replica) -> Outcome:
    """The model's own class of this shape, in any colour: what it was trained for."""
    given = replica.given
    colours = torch.randint(len(COLOURS), given.labels.shape, generator=seeds.generator(given.seed, "colours"))
    names = [f"{tuple(COLOURS)[c]} {SHAPES[s]}" for c, s in zip(colours.tolist(), given.labels.tolist(), strict=True)]
    return steered(replica, [], names)


_baseline = functools.partial(baseline, NAME)


SCALES = (1.0, 3.0, 10.0, 30.0)
TASK = Task(
    name=NAME,
    text="A classifier of clean images steers a model of pixels, which is told no class, to the shape asked for.",
    prepare=prepare,
    judge=world.judge,
    order=world.RIGHT,
    measures=world.MEASURES,
    wishes=world.wishes,
    shown=world.shown,
    baselines=(
        _baseline("pixels_unguided", "no guidance", unguided, "original"),
        _baseline(
            "classifier_on_noise",
            "the same classifier, on x_t",
            on_noise,
            settings={"": {"scale": 1.0}},
            grid={"scale": SCALES},
        ),
        _baseline(
            "classifier_on_x0",
            "the same classifier, on x0, plainly",
            on_x0,
            settings={"": {"scale": 10.0}},
            grid={"scale": SCALES},
        ),
        _baseline("pixels_told", "the model told the class", told, "oracle"),
    ),
)
