"""`retouch forget TECHNIQUE`: a technique of the room on a user's classifier, with evidence to file."""

import dataclasses
import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from retouch.core.cards import Card, cards, find
from retouch.core.errors import InputError

CONTRACT = ("model", "forget", "retain")


@dataclasses.dataclass
class Shared:
    """What every technique of the room needs to know.

    Args:
        forget: what to forget: label=NAME for a class, or index=FILE with row numbers of the data, one a line (images
            of a folder count in the order of their class and file names).
        model: folder of an image classifier saved with save_pretrained, or an embedded one such as digits/vit.
        data: the training data: a folder with a subfolder of images for each class, parquet files, a folder of
            datasets.save_to_disk, or an embedded world.
        out: new folder for the changed model, evidence.json and report.html.
        test: held-out data of the same kinds, for accuracy on unseen samples and an attack; that of the world if the
            data is a world's.
        oracle: folder of a model trained without the samples to forget, to compare with; "auto" trains one where an
            embedded model can be retrained in seconds; "none" for none.
    """

    forget: str
    model: str = "digits/cnn"
    data: str = "digits"
    out: Path = Path("retouch-forget")
    test: str | None = None
    oracle: str = "auto"


def run(arguments: Sequence[str]) -> None:
    """Forget something on a user's model, or on the embedded one."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())  # noqa: T201
        return
    name, *rest = arguments
    card = find(name, "forget")
    technique = _checked(card)
    from retouch.cli.options import parse

    text = f"{card.title}: {card.line}"
    shared, options = parse(Shared, technique, rest, prog=f"retouch forget {name}", text=text)
    forget(card, technique, shared, options)


def _usage() -> str:
    lines = ["usage: retouch forget TECHNIQUE --forget label=NAME|index=FILE [OPTIONS]", ""]
    lines += [f"  {card.name:20} {card.line}" for card in cards("forget")]
    return "\n".join([*lines, "", "retouch forget TECHNIQUE --help lists the options of each."])


def _checked(card: Card) -> Callable[..., Any]:
    """The technique, if it edits a trained model as the room's contract says."""
    technique = card.load()
    if tuple(inspect.signature(technique).parameters)[: len(CONTRACT)] != CONTRACT:
        raise InputError(
            f"{card.name} is not applied to a trained model: the model must be trained with it from the start, see "
            f"retouch show {card.name}"
        )
    return technique


def forget(card: Card, technique: Callable[..., Any], shared: Shared, options: dict[str, Any]) -> None:
    """Check everything, do it, and write model, evidence and page: all of it or nothing."""
    from retouch.cli import sources
    from retouch.cli.report_command import write_request_page
    from retouch.core.checkpoints import atomic_folder
    from retouch.report.request import Request, carry_out

    with atomic_folder(shared.out) as folder:
        source = sources.load_model_source(shared.model)
        if source.tokenizer is not None:
            raise InputError(
                f"--model {shared.model} reads texts, but retouch forget takes classifiers of images so far"
            )
        data = sources.load_data_source(shared.data, source)
        sources.check_fit(source, data)
        rows = sources.rows_to_forget(shared.forget, data)
        test = _test(shared, source, data)
        request = Request(
            model=source.model,
            data=data.data,
            forget=rows,
            classes=data.classes,
            test=test,
            oracle=_oracle(shared.oracle, source, data, rows),
            picture=data.picture,
            described={"forget": shared.forget, "model": shared.model, "data": shared.data},
        )
        changed, evidence = carry_out(request, card, technique, options)
        source.save(changed, folder)
        (folder / "evidence.json").write_text(json.dumps(evidence, indent=1) + "\n")
        write_request_page(evidence, folder)
    for sentence in evidence["words"]:
        print(sentence)  # noqa: T201
    print(f"\nModel, evidence.json and report.html are in {shared.out}")  # noqa: T201


def _test(shared: Shared, source: Any, data: Any) -> Any:
    from retouch.cli import sources

    if shared.test is None and data.world is None:
        return None
    test = sources.load_data_source(shared.test or shared.data, source, split="test")
    if test.classes != data.classes:
        raise InputError(f"--test has the classes {', '.join(test.classes)}, but must have those of --data")
    return test.data


def _oracle(choice: str, source: Any, data: Any, rows: Any) -> Any:
    """The model to compare with: none, from a folder, or trained by the world's own recipe."""
    import torch

    from retouch.core.checkpoints import load_model
    from retouch.core.data import subset
    from retouch.worlds import world

    if choice == "none":
        return None
    if choice != "auto":
        return load_model(choice)
    if source.world is None or source.world[0] != data.world:
        return None
    module, variant = world(source.world[0]), source.world[1]
    if variant not in module.QUICK:
        return None
    kept = torch.ones(len(data.data), dtype=torch.bool)
    kept[rows] = False
    return module.train(variant, subset(data.data, kept.nonzero()[:, 0]), seed=1)
