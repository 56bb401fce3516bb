"""Two things are asked for in words, of the shipped text-to-image model: are both there, each with its own colour?

"a red circle and a blue square", and for every second prompt where they are, "a red circle left of a blue square".
Every prompt is asked for twice with different noise, to see how much is left of the variety that it allows. The
oracle judges: it reads from an image which things are where. The model fails hardly ever here, so that this shows what
a technique costs; `crowded` is the same with three things, of which it fails nearly always.
"""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from retouch.arenas.contest import Answer, Entry, Measure, Picture, Plot
from retouch.arenas.guide import Outcome, Replica, Task, baseline
from retouch.arenas.guide.tasks import _shapes as world
from retouch.core import seeds
from retouch.core.diffusion.sampling import unit_noise
from retouch.core.diffusion.steering import Steering
from retouch.worlds import shapes
from retouch.worlds.shapes import oracle
from retouch.worlds.shapes.models import recipes

NAME = "prompts"
PROMPTS, IMAGES = 24, 2  # wishes, and images of each
STEPS, SCALE = 20, 3.0  # of DDIM; of classifier-free guidance, at which the model's quality is recorded


@dataclass(frozen=True)
class Given:
    """Noise, and a prompt of so many things for each sample: all of them in turn, and then all of them again."""

    things: int
    prompts: tuple[str, ...]
    noise: Tensor
    seed: int


def said(scene: shapes.Scene, number: int) -> str:
    """The caption of a scene as the prompt of this number: shapes and colours, and the relation in every second."""
    return shapes.caption(scene, say=("shape", "colour", "relation") if number % 2 else ("shape", "colour"))


def prepare(seed: int, search: bool, *, things: int = 2) -> Given:
    """Prompts are captions of scenes of the test split."""
    distribution = dataclasses.replace(recipes.SCENES, counts=(things,))
    scenes = shapes.data("test", count=PROMPTS, distribution=distribution, seed=seed).scenes
    prompts = IMAGES * tuple(said(scene, number) for number, scene in enumerate(scenes))
    return Given(things, prompts, unit_noise(world.denoiser(), len(prompts), seeds.generator(seed, "noise")), seed)


def judge(given: Given, images: Tensor) -> dict[str, float]:
    """What of the prompts is true of the images, and what the images are like."""
    readings = oracle.read(images)
    features = oracle.oracle_features(images, readings)
    told = oracle.prompt_fidelity(readings, given.prompts)
    related = [number for number, prompt in enumerate(given.prompts) if any(shapes.parse(prompt).relations)]
    placed = oracle.prompt_fidelity([readings[k] for k in related], [given.prompts[k] for k in related])
    return {
        "bound": 100 * told["attributes"],
        "objects": 100 * told["objects"],
        "relations": 100 * placed["relations"],
        "frechet": world.likeness(features, (given.things,)),
        "diversity": world.diversity(features.unflatten(0, (IMAGES, -1)).transpose(0, 1)),
        "saturation": world.saturation(images),
    }


def wishes(given: Given) -> Sequence[Picture]:
    """The first prompts."""
    return [Picture(image=None, title=prompt, group="prompts") for prompt in given.prompts[: world.SHOWN]]


def shown(given: Given, images: Tensor) -> Sequence[Answer]:
    """The images made of them; right if all things are there as said, and where they were said to be."""
    answers = []
    for image, prompt in zip(images[: world.SHOWN], given.prompts, strict=False):
        true = oracle.matches(image, prompt)
        answers.append(Answer(text="", right=true["attributes"] and true["relations"], image=image))
    return answers


def drawn(replica: Replica, steering: Steering, *, scale: float = SCALE, longer: float = 1.0) -> Outcome:
    """Images by DDIM, steered, on top of classifier-free guidance unless the steering takes its place.

    Args:
        replica: noise and prompts.
        steering: what is added.
        scale: of classifier-free guidance.
        longer: what the number of steps is multiplied by.
    """
    given, denoiser = replica.given, world.denoiser()
    # x0 and not x, which at the end of this model's noise levels still has some noise.
    settings: dict[str, Any] = {"scale": scale, "times": round(longer * STEPS), "last": "x0"}

    def draw() -> Tensor:
        return denoiser.decode(steering.sample(denoiser, given.noise, list(given.prompts), **settings))

    return world.clocked(len(given.noise), draw)


def scene_of(prompt: str, number: int, seed: int) -> shapes.Scene:
    """A scene of which a prompt is true, and all else is free."""
    told = shapes.parse(prompt)
    words = ("shape", "colour", "relation") if any(told.relations) else ("shape", "colour")

    def as_told(scene: shapes.Scene) -> shapes.Scene:
        pairs = zip(scene.things, told.things, strict=True)
        things = [dataclasses.replace(thing, shape=str(said.shape), colour=str(said.colour)) for thing, said in pairs]
        return dataclasses.replace(scene, things=tuple(things))

    distribution = dataclasses.replace(
        recipes.SCENES,
        counts=(len(told.things),),
        keep=lambda scene: shapes.describe(as_told(scene), words) == told,
    )
    return as_told(shapes.scene("test", number, seed=seed, distribution=distribution))


def real(replica: Replica) -> Outcome:
    """Scenes of which the prompts are true, drawn anew for each."""
    given = replica.given
    seed = seeds.derive(given.seed, "real")
    scenes = [scene_of(prompt, number, seed) for number, prompt in enumerate(given.prompts)]
    return Outcome(shapes.render(scenes, 64))


def task(name: str, things: int, text: str) -> Task:
    """The task for prompts of so many things."""

    def cfg(own: str, title: str, scale: float, kind: str = "baseline", longer: float = 1.0, note: str = "") -> Entry:
        def solve(replica: Replica) -> Outcome:
            return drawn(replica, Steering(), scale=scale, longer=longer)

        return baseline(name, f"{name}_{own}", title, solve, kind, note=note)

    return Task(
        name=name,
        text=text,
        prepare=functools.partial(prepare, things=things),
        judge=judge,
        order="bound",
        measures=MEASURES,
        wishes=wishes,
        shown=shown,
        baselines=(
            baseline(name, f"{name}_real", "real scenes", real, "oracle"),
            cfg("cfg_3", "guidance, scale 3", SCALE, "original"),
            cfg("unguided", "no guidance", 1.0),
            cfg("cfg_75", "guidance, scale 7.5", 7.5),
            cfg(
                "cfg_more",
                "guidance, 30 steps",
                SCALE,
                longer=1.5,
                note="as many calls as A-STAR has, and as PAG has on top of guidance",
            ),
        ),
        plots=(
            Plot(
                kind="scatter", x="frechet", y="bound", text="Prompts kept, and images like scenes?", problems=(name,)
            ),
            Plot(kind="scatter", x="calls", y="bound", text="Prompts kept, at what cost?", problems=(name,)),
        ),
    )


MEASURES = {
    "bound": Measure(
        title="bound", unit="%", better="high", line="Images with all things, each in its own shape and colour."
    ),
    "objects": Measure(title="objects", unit="%", better="high", line="Images with all shapes, in any colour."),
    "relations": Measure(
        title="relations", unit="%", better="high", line="Of the relations that prompts tell, those that are kept."
    ),
    "frechet": world.FRECHET,
    "diversity": world.DIVERSITY,
    "saturation": world.SATURATION,
    "each": world.EACH,
}
TASK = task(
    NAME,
    2,
    "Two things are asked for in words, half of the time with their places, of the shapes' text-to-image model in "
    "20 steps of DDIM.",
)
