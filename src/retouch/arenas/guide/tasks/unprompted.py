"""Images of the shipped text-to-image model without a prompt: are they scenes of this world at all?

The study of perturbed-attention guidance, which needs no condition. The oracle judges whether what it finds is made of
shapes in named colours, and how the images as a whole differ from held-out scenes. They are made in 5 steps. In 20, 98%
are scenes already, and PAG with a scale of 3 made no more of them valid and moved them away from real ones (2.47
instead of 2.12, 5 seeds): the problem was made harder when that was known.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from retouch.arenas.contest import Answer, Picture, Plot
from retouch.arenas.guide import Outcome, Replica, Task, baseline
from retouch.arenas.guide.tasks import _shapes as world
from retouch.core import seeds
from retouch.core.diffusion.sampling import unit_noise
from retouch.core.diffusion.steering import Steering
from retouch.worlds import shapes
from retouch.worlds.shapes import oracle
from retouch.worlds.shapes.models import recipes

NAME = "unprompted"
STEPS, COUNT = 5, 120


@dataclass(frozen=True)
class Given:
    """Noise."""

    noise: Tensor
    seed: int


def prepare(seed: int, search: bool) -> Given:
    """The model is the same in all replicas."""
    return Given(unit_noise(world.denoiser(), COUNT, seeds.generator(seed, "noise")), seed)


def judge(given: Given, images: Tensor) -> dict[str, float]:
    """What the oracle sees."""
    readings = oracle.read(images)
    features, valid = oracle.oracle_features(images, readings), [reading.valid for reading in readings]
    return {
        "valid": 100 * sum(valid) / len(valid),
        "frechet": world.likeness(features, recipes.SCENES.counts),
        "diversity": world.diversity(features[None]),
        "saturation": world.saturation(images),
    }


def wishes(given: Given) -> Sequence[Picture]:
    """Nothing is asked for."""
    return [
        Picture(image=None, title=f"noise {k + 1}", group="no prompt")
        for k in range(min(world.SHOWN, len(given.noise)))
    ]


def shown(given: Given, images: Tensor) -> Sequence[Answer]:
    """The first images; right if they are scenes of this world."""
    pairs = zip(images[: world.SHOWN], oracle.read(images[: world.SHOWN]), strict=True)
    return [Answer(text="", right=reading.valid, image=image) for image, reading in pairs]


def drawn(replica: Replica, steering: Steering, *, longer: int = 1) -> Outcome:
    """Images by DDIM without a prompt, steered, in `longer` times as many steps."""
    given, denoiser = replica.given, world.denoiser()
    settings: dict[str, Any] = {"scale": 1.0, "times": longer * STEPS, "last": "x0"}

    def draw() -> Tensor:
        return denoiser.decode(steering.sample(denoiser, given.noise, None, **settings))

    return world.clocked(len(given.noise), draw)


def real(replica: Replica) -> Outcome:
    """Scenes of the test split."""
    seed = seeds.derive(replica.given.seed, "real")
    return Outcome(shapes.data("test", count=COUNT, distribution=recipes.SCENES, seed=seed).images)


_baseline = functools.partial(baseline, NAME)


TASK = Task(
    name=NAME,
    text="Images without a prompt, of the shapes' text-to-image model in 5 steps of DDIM.",
    prepare=prepare,
    judge=judge,
    order="frechet",
    measures={
        "valid": world.VALID,
        "frechet": world.FRECHET,
        "diversity": world.DIVERSITY,
        "saturation": world.SATURATION,
        "each": world.EACH,
    },
    wishes=wishes,
    shown=shown,
    baselines=(
        _baseline("unprompted_real", "real scenes", real, "oracle"),
        _baseline("unprompted_plain", "5 steps", lambda replica: drawn(replica, Steering()), "original"),
        _baseline("unprompted_twice", "10 steps", lambda replica: drawn(replica, Steering(), longer=2)),
    ),
    plots=(
        Plot(kind="scatter", x="diversity", y="valid", text="Valid, and still diverse?", problems=(NAME,)),
        Plot(kind="scatter", x="calls", y="frechet", text="Near real scenes, at what cost?", problems=(NAME,)),
    ),
)
