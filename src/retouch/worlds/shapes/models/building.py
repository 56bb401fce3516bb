"""Training the reference models again, and how they are kept: in half precision, with recipe and measured quality."""

import copy
import functools
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from retouch.core.checkpoints import atomic_folder
from retouch.worlds import WEIGHTS
from retouch.worlds.shapes.models import architectures, latents, training, wordings
from retouch.worlds.shapes.models.measures import measured_quality
from retouch.worlds.shapes.models.recipes import RECIPES, Recipe
from retouch.worlds.shapes.models.references import reference, text_pipeline

DITS: dict[str, Callable[[], Any]] = {
    "dit-large": functools.partial(architectures.new_dit, heads=3, layers=5),
    "dit-small": functools.partial(architectures.new_dit, heads=2, layers=2),
}
LICENCE = "Apache-2.0: trained from random weights on scenes that retouch draws itself"


def build(
    folder: Path = WEIGHTS,
    *,
    seed: int = 0,
    checkpoint: Path | None = None,
    recipes: Mapping[str, Recipe] = RECIPES,
    measured: int = 500,
) -> None:
    """Train the reference models and write them, in half precision, with recipe, licence and measured quality.

    Args:
        folder: takes a folder a model.
        seed: of scenes, weights and orders.
        checkpoint: folder from which a run that was stopped goes on.
        recipes: by model.
        measured: samples that quality is measured on.
    """

    def settings(name: str) -> dict[str, Any]:
        return {"seed": seed, "checkpoint": checkpoint and checkpoint / name}

    vae = latents.autoencoder(recipes["autoencoder"], **settings("autoencoder"))
    text = wordings.text_encoder(recipes["text"], **settings("text"))
    unet = training.unet(recipes["unet"], vae, text, **settings("unet"))
    parts = {name: recipes[name] for name in ("autoencoder", "text", "unet")}
    write(folder, "pipeline", text_pipeline(vae, text, unet), parts, seed, measured)
    write(folder, "clip", training.clip(recipes["clip"], **settings("clip")), recipes, seed, measured)
    write(folder, "pixels", training.pixels(recipes["pixels"], **settings("pixels")), recipes, seed, measured)
    for name, new in DITS.items():
        write(folder, name, training.dit(recipes[name], vae, new, **settings(name)), recipes, seed, measured)


def write(
    folder: Path, variant: str, model: Any, recipes: Mapping[str, Recipe], seed: int, measured: int = 500
) -> None:
    """One model: half its precision, weights, recipe; then the quality of what is read back."""
    target = folder / f"shapes-{variant}"
    recipe = {name: asdict(recipes[name]) for name in recipes if variant in ("pipeline", name)}
    command = f"retouch worlds build shapes --seed {seed}"
    made = {"command": command, "licence": LICENCE, "recipes": recipe, "quality is of samples, at most": measured}
    with atomic_folder(target.with_name(f"{target.name}.new")) as new:
        copy.deepcopy(model).to(torch.float16).save_pretrained(new)
        (new / "recipe.json").write_text(json.dumps(made, indent=1) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    target.with_name(f"{target.name}.new").rename(target)
    read = reference(variant, folder=folder)
    (target / "quality.json").write_text(json.dumps(measured_quality(variant, read, measured), indent=1) + "\n")
