"""`retouch audit TECHNIQUE`: what a probe of the room finds in a pipeline of diffusers."""

import dataclasses
import importlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retouch import __version__
from retouch.cli.guide_command import grid, load_pipeline, pil_images
from retouch.core.cards import Card, cards, find
from retouch.core.errors import InputError

SHOWN = 64  # images on the overview, eight in a row


@dataclasses.dataclass
class Shared:
    """What every audit needs to know.

    Args:
        pipeline: folder of a pipeline of diffusers, saved with save_pretrained; or one of the package's own small ones:
            shapes, shapes/dit-large, shapes/dit-small.
        prompt: text, or the number or name of a class for DiT.
        out: new folder for the images, overview.png, findings.json and tensors.safetensors.
    """

    pipeline: str = "shapes"
    prompt: str = ""
    out: Path = Path("retouch-audit")


def run(arguments: Sequence[str]) -> None:
    """Run a probe."""
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = ["usage: retouch audit TECHNIQUE [OPTIONS]", ""]
        lines += [f"  {card.name:24} {card.line}" for card in cards("audit")]
        print("\n".join([*lines, "", "retouch audit TECHNIQUE --help lists the options of each."]))  # noqa: T201
        return
    name, *rest = arguments
    card = find(name, "audit")
    probe = getattr(importlib.import_module(card.module), "findings", None)
    if probe is None:
        raise InputError(f"{card.name} is no probe of a pipeline: use it from Python, see retouch show {card.name}")
    from retouch.cli.options import parse

    shared, options = parse(Shared, probe, rest, prog=f"retouch audit {name}", text=f"{card.title}: {card.line}")
    audit(card, probe, shared, options)


def audit(card: Card, probe: Any, shared: Shared, options: dict[str, Any]) -> None:
    """Check everything, probe, and write what was found: all of it or nothing."""
    if not shared.prompt:
        raise InputError("--prompt is missing, but must be given")
    from retouch.core.checkpoints import atomic_folder, save_tensors

    with atomic_folder(shared.out) as folder:
        prompt: Any = int(shared.prompt) if shared.prompt.isdigit() else shared.prompt
        found = probe(load_pipeline(shared.pipeline), prompt, **options)
        pictures = pil_images(found.images)
        for number, picture in enumerate(pictures):
            picture.save(folder / f"{number:04}.png")
        shown = pictures[:SHOWN]
        grid([shown[start : start + 8] for start in range(0, len(shown), 8)]).save(folder / "overview.png")
        save_tensors(folder / "tensors.safetensors", found.tensors)
        evidence = {
            "technique": {key: getattr(card, key) for key in ("name", "title", "paper", "line")},
            "request": {"pipeline": shared.pipeline, "prompt": shared.prompt},
            "options": {name: str(value) for name, value in options.items()},
            "words": list(found.words),
            "images": [dict(row) for row in found.rows],
            "software": f"retouch {__version__}",
            "made on": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        }
        (folder / "findings.json").write_text(json.dumps(evidence, indent=1) + "\n")
    for sentence in found.words:
        print(sentence)  # noqa: T201
    print(f"\nImages, overview.png and findings.json are in {shared.out}")  # noqa: T201
