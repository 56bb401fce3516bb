"""`retouch train TECHNIQUE`: train an image classifier with a technique of the room, beside plain training."""

import dataclasses
import importlib
import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from retouch.core.cards import Card, cards, find
from retouch.core.errors import InputError, positive


@dataclasses.dataclass
class Shared:
    """What every training run needs to know.

    Args:
        model: folder of an image classifier saved with save_pretrained, or an embedded one such as digits/cnn; one of a
            world is trained from new weights.
        data: the training data: a folder with a subfolder of images for each class, parquet files, a folder of
            datasets.save_to_disk, or an embedded world.
        out: new folder for the trained model, evidence.json and report.html.
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

    model: str = "digits/cnn"
    data: str = "digits"
    out: Path = Path("retouch-train")
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


def run(arguments: Sequence[str]) -> None:
    """Train with a technique."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())  # noqa: T201
        return
    name, *rest = arguments
    card = find(name, "train")
    recipe = _recipe(card)
    from retouch.cli.options import parse

    text = f"{card.title}: {card.line}"
    shared, options = parse(Shared, recipe, rest, prog=f"retouch train {name}", text=text)
    train(card, recipe, shared, options)


def _usage() -> str:
    lines = ["usage: retouch train TECHNIQUE [OPTIONS]", ""]
    lines += [f"  {card.name:22} {card.line}" for card in cards("train")]
    return "\n".join([*lines, "", "retouch train TECHNIQUE --help lists the options of each."])


def _recipe(card: Card) -> Callable[..., Any]:
    """How the technique trains an ordinary classifier, if it does."""
    recipe = getattr(importlib.import_module(card.module), "recipe", None)
    if recipe is None:
        raise InputError(
            f"{card.name} does not train an ordinary image classifier; it is used from Python, see retouch show "
            f"{card.name}, and measured by retouch bench train"
        )
    return recipe


def train(card: Card, recipe: Callable[..., Any], shared: Shared, options: dict[str, Any]) -> None:
    """Check everything, train, and write model, evidence and page: all of it or nothing."""
    from retouch.cli.report_command import write_request_page
    from retouch.core.checkpoints import atomic_folder
    from retouch.report.training import carry_out

    for name in ("epochs", "batch_size", "lr"):
        positive(f"--{name.replace('_', '-')}", getattr(shared, name))
    own = inspect.signature(recipe).parameters
    options |= {name: getattr(shared, name) for name in ("batch_size", "seed") if name in own}
    with atomic_folder(shared.out) as folder:
        source, request = _request(shared)
        model, evidence = carry_out(request, card, recipe, options)
        source.save(model, folder)
        (folder / "evidence.json").write_text(json.dumps(evidence, indent=1) + "\n")
        write_request_page(evidence, folder)
    for sentence in evidence["words"]:
        print(sentence)  # noqa: T201
    print(f"\nModel, evidence.json and report.html are in {shared.out}")  # noqa: T201


def _request(shared: Shared) -> tuple[Any, Any]:
    """The model's source, and what is to be trained on what."""
    import torch

    from retouch.cli import sources
    from retouch.core import seeds
    from retouch.core.data import subset
    from retouch.core.models import own
    from retouch.report.training import TrainRequest

    source = sources.load_model_source(shared.model)
    data = sources.load_data_source(shared.data, source)
    sources.check_fit(source, data)
    samples, validation = data.data, _other(shared.validation, "validation", data, source)
    if validation is None:
        order = torch.randperm(len(samples), generator=seeds.generator(shared.seed, "validation"))
        count = len(samples) // 10
        if count == 0:
            raise InputError(
                f"--data {shared.data} has {len(samples)} samples, but must have at least 10, or --validation"
            )
        samples, validation = subset(samples, order[count:].sort().values), subset(samples, order[:count].sort().values)
    start = source.untrained(shared.seed) if shared.from_scratch or source.world else source.model

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=shared.lr, weight_decay=shared.weight_decay)

    def scheduler(optimizer: torch.optim.Optimizer, steps: int) -> Any:
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, shared.lr, total_steps=max(steps, 2))

    settings = {"epochs": shared.epochs, "batch_size": shared.batch_size, "seed": shared.seed}
    request = TrainRequest(
        build=lambda: own(start, inplace=False),
        train=samples,
        validation=validation,
        test=_other(shared.test or (shared.data if data.world else None), "test", data, source),
        settings={**settings, "optimizer": optimizer, "scheduler": scheduler},
        plain=shared.plain,
        checkpoint=shared.checkpoint,
        described={
            "data": shared.data,
            "model": shared.model,
            "weights": "new" if start is not source.model else "those of the model",
            **settings,
            "highest learning rate": shared.lr,
            "weight decay": shared.weight_decay,
        },
    )
    return source, request


def _other(name: str | None, split: str, data: Any, source: Any) -> Any:
    """Further data with the same classes, or None if none is named."""
    from retouch.cli import sources

    if name is None:
        return None
    other = sources.load_data_source(name, source, split=split)
    if other.classes != data.classes:
        raise InputError(f"--{split} has the classes {', '.join(other.classes)}, but must have those of --data")
    return other.data
