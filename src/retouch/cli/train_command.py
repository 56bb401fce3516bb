"""`retouch train TECHNIQUE`: train a classifier with a technique of the room, beside plain training."""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from retouch.cli import on_world, training
from retouch.core.cards import Card, find


@dataclasses.dataclass
class Shared(training.Budget):
    """What every training run needs to know.

    Args:
        model: folder of a classifier of images or of texts (ForSequenceClassification, with its tokenizer) saved with
            save_pretrained, or an embedded one such as digits/cnn; one of a world is trained from new weights.
        out: new folder for the trained model, evidence.json and report.html.
    """

    model: str = "digits/cnn"
    out: Path = Path("retouch-train")


def run(arguments: Sequence[str]) -> None:
    """Train with a technique."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(training.usage("train"))  # noqa: T201
        return
    name, *rest = arguments
    card = find(name, "train")
    recipe = training.recipe_of(card)
    if recipe is None:
        on_world.run(card, rest)
        return
    from retouch.cli.options import parse

    text = f"{card.title}: {card.line}"
    shared, options = parse(Shared, recipe, rest, prog=f"retouch train {name}", text=text)
    train(card, recipe, shared, options)


def train(card: Card, recipe: Callable[..., Any], shared: Shared, options: dict[str, Any]) -> None:
    """Check everything, train, and write model, evidence and page: all of it or nothing."""
    from retouch.cli import sources
    from retouch.core.checkpoints import atomic_folder
    from retouch.core.models import own
    from retouch.report.training import TrainRequest, carry_out

    shared.check()
    given = {
        name: getattr(shared, name) for name in ("batch_size", "seed") if name in inspect.signature(recipe).parameters
    }
    with atomic_folder(shared.out) as folder:
        source = sources.load_model_source(shared.model)
        _, parts = training.load_data(shared, source)
        start = training.start_of(source, shared)
        weights = "those of the model" if start is source.model else "new"
        request = TrainRequest(
            build=lambda: own(start, inplace=False),
            settings=training.fit_settings(shared),
            plain=shared.plain,
            checkpoint=shared.checkpoint,
            described={
                "data": shared.data,
                "model": shared.model,
                "weights": weights,
                **training.described(shared),
            },
            **parts,
        )
        model, evidence = carry_out(
            request, card, lambda model: recipe(model, parts["train"], parts["validation"], **options, **given), options
        )
        training.write(folder, source, model, evidence)
    training.say(evidence, shared.out)
