"""What `retouch train` and `retouch distill` share: the budget, the data, and writing what came out."""

import dataclasses
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retouch.core.cards import Card, cards
from retouch.core.errors import InputError, positive

if TYPE_CHECKING:
    from torch import nn

    from retouch.cli.sources import DataSource, ModelSource
    from retouch.core.recipe import Recipe


@dataclasses.dataclass
class Budget:
    """Data and budget of a training run.

    Args:
        data: the training data: a folder with a subfolder of images for each class, a .csv or .jsonl of texts and
            labels, parquet files, a folder of datasets.save_to_disk, or an embedded world.
        test: held-out data of the same kinds; that of the world if the data is a world's.
        validation: data that a technique may choose by; a tenth of the training data is kept apart for it if left out.
        from_scratch: give a model from a folder new weights first.
        epochs: passes over the data.
        batch_size: samples a step.
        lr: highest learning rate of AdamW, of one cycle up and down.
        weight_decay: of AdamW.
        seed: of weights, orders and draws.
        plain: train plainly as well, to compare.
        checkpoint: folder where a long run is saved after every epoch; the same command goes on from there.
    """

    data: str = "digits"
    test: str | None = None
    validation: str | None = None
    from_scratch: bool = False
    epochs: int = 20
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.01
    seed: int = 0
    plain: bool = True
    checkpoint: Path | None = None

    def check(self) -> None:
        """Refuse numbers that cannot be."""
        for name in ("epochs", "batch_size", "lr"):
            positive(f"--{name.replace('_', '-')}", getattr(self, name))


def usage(room: str) -> str:
    """What `retouch ROOM --help` prints."""
    lines = [f"usage: retouch {room} TECHNIQUE [OPTIONS]", ""]
    lines += [f"  {card.name:24} {card.line}" for card in cards(room)]
    return "\n".join([*lines, "", f"retouch {room} TECHNIQUE --help lists the options of each."])


def recipe_of(card: Card) -> "Callable[..., Recipe] | None":
    """How the technique trains an ordinary classifier, if it does; else it runs `on_world`."""
    return getattr(importlib.import_module(card.module), "recipe", None)


def start_of(source: "ModelSource", budget: Budget) -> "nn.Module":
    """The model to train: with new weights for one of a world or where they are asked for."""
    return source.untrained(budget.seed) if budget.from_scratch or source.world else source.model


def load_data(budget: Budget, source: "ModelSource") -> "tuple[DataSource, dict[str, Any]]":
    """The data as named, and its parts: train, validation and test."""
    import torch

    from retouch.cli import sources
    from retouch.core import seeds
    from retouch.core.data import subset

    data = sources.load_data_source(budget.data, source)
    sources.check_fit(source, data)
    samples, validation = data.data, _other(budget.validation, "validation", data, source)
    if validation is None:
        order = torch.randperm(len(samples), generator=seeds.generator(budget.seed, "validation"))
        count = len(samples) // 10
        if count == 0:
            few = f"--data {budget.data} has {len(samples)} samples"
            raise InputError(f"{few}, but must have at least 10, or --validation must be given")
        samples, validation = subset(samples, order[count:].sort().values), subset(samples, order[:count].sort().values)
    test = _other(budget.test or (budget.data if data.world else None), "test", data, source)
    return data, {"train": samples, "validation": validation, "test": test}


def _other(name: str | None, split: str, data: "DataSource", source: "ModelSource") -> Any:
    """Further data with the same classes, or None if none is named."""
    from retouch.cli import sources

    if name is None:
        return None
    other = sources.load_data_source(name, source, split=split)
    if other.classes != data.classes:
        raise InputError(f"--{split} has the classes {', '.join(other.classes)}, but must have those of --data")
    return other.data


def fit_settings(budget: Budget) -> dict[str, Any]:
    """Keywords of `core.loop.fit`."""
    import torch

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=budget.lr, weight_decay=budget.weight_decay)

    def scheduler(optimizer: torch.optim.Optimizer, steps: int) -> Any:
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, budget.lr, total_steps=max(steps, 2))

    numbers = {"epochs": budget.epochs, "batch_size": budget.batch_size, "seed": budget.seed}
    return {**numbers, "optimizer": optimizer, "scheduler": scheduler}


def described(budget: Budget) -> dict[str, Any]:
    """The budget in words, for the evidence."""
    names = ("epochs", "batch_size", "lr", "weight_decay", "seed")
    return {name.replace("_", " "): getattr(budget, name) for name in names}


def write(folder: Path, source: "ModelSource", model: "nn.Module", evidence: dict[str, Any]) -> None:
    """Model, evidence and page into a folder."""
    from retouch.cli.report_command import write_request_page

    source.save(model, folder)
    (folder / "evidence.json").write_text(json.dumps(evidence, indent=1) + "\n")
    write_request_page(evidence, folder)


def say(evidence: dict[str, Any], out: Path) -> None:
    """Print the result in words, and where it is."""
    for sentence in evidence["words"]:
        print(sentence)  # noqa: T201
    print(f"\nModel, evidence.json and report.html are in {out}")  # noqa: T201
