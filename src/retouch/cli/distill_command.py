"""`retouch distill TECHNIQUE`: a teacher teaches a student classifier, beside the student trained alone."""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from retouch.cli import on_world, training
from retouch.core.cards import Card, find
from retouch.core.errors import InputError


@dataclasses.dataclass
class Shared(training.Budget):
    """What every lesson needs to know.

    Args:
        teacher: folder of a classifier of images or of texts (ForSequenceClassification, with its tokenizer) saved with
            save_pretrained, or an embedded one such as digits/vit.
        student: likewise; one of a world is trained from new weights.
        out: new folder for the student, evidence.json and report.html.
    """

    teacher: str = "digits/vit"
    student: str = "digits/cnn"
    out: Path = Path("retouch-distill")


def run(arguments: Sequence[str]) -> None:
    """Teach a student by a technique."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(training.usage("distill"))  # noqa: T201
        return
    name, *rest = arguments
    card = find(name, "distill")
    recipe = training.recipe_of(card)
    if recipe is None:
        on_world.run(card, rest)
        return
    from retouch.cli.options import parse

    text = f"{card.title}: {card.line}"
    shared, options = parse(Shared, recipe, rest, prog=f"retouch distill {name}", text=text)
    distill(card, recipe, shared, options)


def distill(card: Card, recipe: Callable[..., Any], shared: Shared, options: dict[str, Any]) -> None:
    """Check everything, teach, and write student, evidence and page: all of it or nothing."""
    from retouch.cli import sources
    from retouch.core.batches import in_order
    from retouch.core.checkpoints import atomic_folder
    from retouch.core.models import count_classes, own
    from retouch.report.training import TrainRequest, carry_out

    shared.check()
    given = {
        name: getattr(shared, name) for name in ("batch_size", "seed") if name in inspect.signature(recipe).parameters
    }
    with atomic_folder(shared.out) as folder:
        source, teaching = sources.load_model_source(shared.student), sources.load_model_source(shared.teacher)
        sources.check_tokenizers(source, teaching)
        teacher = teaching.model
        data, parts = training.load_data(shared, source)
        try:
            classes = count_classes(teacher, in_order(data.data, 1))
        except (RuntimeError, ValueError, TypeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"The teacher {shared.teacher} cannot be run on the student's inputs: {reason}") from None
        if classes != len(data.classes):
            told = f"--teacher {shared.teacher} tells {classes} classes apart"
            raise InputError(f"{told}, but must tell those of the student and the data apart: {len(data.classes)}")
        start = training.start_of(source, shared)
        request = TrainRequest(
            build=lambda: own(start, inplace=False),
            teacher=teacher,
            settings=training.fit_settings(shared),
            plain=shared.plain,
            checkpoint=shared.checkpoint,
            described={
                "data": shared.data,
                "student": shared.student,
                "teacher": shared.teacher,
                "weights": "those of the student" if start is source.model else "new",
                **training.described(shared),
            },
            **parts,
        )

        def make(student: Any) -> Any:
            return recipe(student, teacher, parts["train"], parts["validation"], **options, **given)

        model, evidence = carry_out(request, card, make, options)
        training.write(folder, source, model, evidence)
    training.say(evidence, shared.out)
