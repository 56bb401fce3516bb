"""`retouch guide TECHNIQUE`: images of a prompt with a technique of the room, beside plain guidance."""

import dataclasses
import importlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retouch import __version__
from retouch.core.cards import Card, cards, find
from retouch.core.errors import InputError, in_range, nearest, positive

if TYPE_CHECKING:
    from torch import Tensor

    from retouch.core.diffusion.denoiser import Denoiser
    from retouch.core.diffusion.steering import Steering

EMBEDDED = {"shapes": "pipeline", "shapes/dit-large": "dit-large", "shapes/dit-small": "dit-small"}


@dataclasses.dataclass
class Shared:
    """What every run needs to know.

    Args:
        pipeline: folder of a pipeline of diffusers, saved with save_pretrained: Stable Diffusion, SDXL, SD3, DiT or
            PixArt; or one of the package's own small ones: shapes, shapes/dit-large, shapes/dit-small.
        prompt: text, or the number or name of a class for DiT.
        negative: negative prompt.
        images: how many, with the same noise for both rows.
        steps: of sampling.
        guidance_scale: of classifier-free guidance, plain and beneath the technique.
        seed: of the noise.
        out: new folder for the images, comparison.png and guidance.json.
    """

    pipeline: str = "shapes"
    prompt: str = ""
    negative: str | None = None
    images: int = 4
    steps: int = 30
    guidance_scale: float = 7.5
    seed: int = 0
    out: Path = Path("retouch-guide")

    def check(self) -> None:
        """Refuse numbers that cannot be."""
        for name in ("images", "steps"):
            positive(f"--{name}", getattr(self, name))
        in_range("--guidance-scale", self.guidance_scale, 0)
        if not self.prompt:
            raise InputError("--prompt is missing, but must be given")


def run(arguments: Sequence[str]) -> None:
    """Sample with a technique."""
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = ["usage: retouch guide TECHNIQUE [OPTIONS]", ""]
        lines += [f"  {card.name:24} {card.line}" for card in cards("guide")]
        print("\n".join([*lines, "", "retouch guide TECHNIQUE --help lists the options of each."]))  # noqa: T201
        return
    name, *rest = arguments
    card = find(name, "guide")
    steer = getattr(importlib.import_module(card.module), "steer", None)
    if steer is None:
        raise InputError(
            f"{card.name} needs more than a prompt, such as a classifier: use it from Python, see retouch show "
            f"{card.name}"
        )
    from retouch.cli.options import parse

    shared, options = parse(Shared, steer, rest, prog=f"retouch guide {name}", text=f"{card.title}: {card.line}")
    guide(card, steer, shared, options)


def load_pipeline(name: str) -> Any:
    """A pipeline of diffusers from a folder, or an embedded one."""
    saved = (Path(name) / "model_index.json").exists()
    embedded = None if saved else EMBEDDED.get(name)
    if embedded is None and not saved:
        raise InputError(
            f"There is no pipeline at {name}: give a folder saved with save_pretrained, which has a model_index.json, "
            f"or {', '.join(EMBEDDED)}.{nearest(name, EMBEDDED)}"
        )
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    if embedded is not None:
        from retouch.worlds import shapes

        return shapes.reference(embedded)
    return diffusers.DiffusionPipeline.from_pretrained(name, local_files_only=True, use_safetensors=True)


def guide(card: Card, steer: Any, shared: Shared, options: dict[str, Any]) -> None:
    """Sample twice from the same noise, and write images and evidence: all of it or nothing."""
    shared.check()
    from retouch.core.checkpoints import atomic_folder
    from retouch.core.diffusion.denoiser import Denoiser
    from retouch.core.diffusion.steering import Steering

    with atomic_folder(shared.out) as folder:
        denoiser = Denoiser.from_pipeline(load_pipeline(shared.pipeline))
        runs = {"plain": Steering(), card.name: steer(denoiser, shared.prompt, **options)}
        pictures, seconds = {}, {}
        for name, steering in runs.items():
            start = time.perf_counter()
            pictures[name] = draw(denoiser, steering, shared)
            seconds[name] = time.perf_counter() - start
            for number, picture in enumerate(pictures[name]):
                picture.save(folder / f"{name}-{number}.png")
        grid(list(pictures.values())).save(folder / "comparison.png")
        asked = {key: str(value) for key, value in dataclasses.asdict(shared).items() if key != "out"}
        evidence = {
            "technique": {key: getattr(card, key) for key in ("name", "title", "paper", "line")},
            "request": asked,
            "options": {name: str(value) for name, value in options.items()},
            "seconds an image": {name: value / shared.images for name, value in seconds.items()},
            "software": f"retouch {__version__}",
            "made on": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        }
        (folder / "guidance.json").write_text(json.dumps(evidence, indent=1) + "\n")
    print(f"comparison.png: above plain guidance, below {card.title}, the same noise in each column")  # noqa: T201
    print(f"\nImages and guidance.json are in {shared.out}")  # noqa: T201


def draw(denoiser: "Denoiser", steering: "Steering", shared: Shared) -> list[Any]:
    """PIL images of the prompt."""
    from retouch.core import seeds
    from retouch.core.diffusion.sampling import unit_noise

    noise = unit_noise(denoiser, shared.images, seeds.generator(shared.seed, "noise"))
    prompt: Any = int(shared.prompt) if shared.prompt.isdigit() else shared.prompt
    x = steering.sample(
        denoiser,
        noise,
        prompt,
        negative=shared.negative,
        scale=shared.guidance_scale,
        times=shared.steps,
        generator=seeds.generator(shared.seed, "sampling"),
        progress=None,
    )
    return pil_images(denoiser.decode(x))


def pil_images(images: "Tensor") -> list[Any]:
    """PIL images of (n, channels, h, w) in 0 to 1."""
    import torch
    from PIL import Image

    arrays = (255 * images.permute(0, 2, 3, 1).cpu()).round().to(torch.uint8).numpy()
    return [Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array) for array in arrays]


def grid(rows: Sequence[Sequence[Any]], gap: int = 4) -> Any:
    """Pictures in rows, small ones enlarged."""
    from PIL import Image

    factor = max(1, -(-128 // rows[0][0].height))
    width, height = (factor * side for side in rows[0][0].size)
    whole = Image.new("RGB", (len(rows[0]) * (width + gap) - gap, len(rows) * (height + gap) - gap), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            large = picture.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
            whole.paste(large, (x * (width + gap), y * (height + gap)))
    return whole
