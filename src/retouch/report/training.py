"""A training run on a user's data, by a technique and plainly with the same budget, and the evidence of both."""

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from retouch import __version__
from retouch.core.batches import in_order
from retouch.core.cards import Card
from retouch.core.data import labels_of
from retouch.core.metrics.unlearning import accuracy
from retouch.core.models import predict
from retouch.core.recipe import Recipe
from retouch.report.request import weights_digest

MEASURES = {
    "test": ("test", "%", 2, "Accuracy on held-out samples."),
    "calibration": (
        "calibration",
        "%",
        2,
        "Expected calibration error on held-out samples: confidence minus accuracy.",
    ),
    "validation": ("validation", "%", 2, "Accuracy on the samples that a technique may choose by."),
    "train": ("train", "%", 2, "Accuracy on the training samples."),
    "agreement": ("agreement", "%", 2, "Held-out samples on which the model says what the teacher says."),
    "parameters": ("parameters", "thousand", 1, "Weights of the model."),
    "seconds": ("time", "s", 1, "Seconds of training."),
    "step": ("step", "ms", 1, "Milliseconds a training step."),
}


@dataclass(frozen=True)
class TrainRequest:
    """What is asked for.

    Attributes:
        build: () -> the model to train, the same every time.
        train: labelled samples.
        validation: labelled samples that a technique may choose by.
        test: held-out labelled samples, if there are any.
        settings: keywords of `core.loop.fit`: epochs, batch size, optimizer, scheduler, seed.
        plain: train plainly as well, to compare.
        checkpoint: folder where both runs are saved and resumed from, or None.
        described: the request in words.
        teacher: the model that is learned from, if there is one.
    """

    build: Callable[[], nn.Module]
    train: Any
    validation: Any
    test: Any
    settings: Mapping[str, Any]
    plain: bool
    checkpoint: Path | None
    described: Mapping[str, Any]
    teacher: nn.Module | None = None


def carry_out(
    request: TrainRequest, card: Card, make: Callable[[nn.Module], Recipe], options: Mapping[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    """Train with the technique, and plainly if asked for, and measure both.

    Args:
        request: what is asked for.
        card: of the technique.
        make: model to train -> the technique's recipe.
        options: of the technique, for the evidence.

    Returns:
        The model that the technique trained, and the evidence.
    """
    import accelerate  # noqa: F401  so that its import is not in the time of the first run

    made = make(request.build())
    rows = {}
    if request.teacher is not None:
        rows["teacher"] = {"title": "the teacher", "kind": "oracle", "values": _measure(request, request.teacher)}
        rows["teacher"]["answers"] = []
    if request.plain:
        _, rows["plain"] = _run(
            request, Recipe(model=request.build(), data=request.train), "plain training", "original"
        )
    model, rows["technique"] = _run(request, made, card.title, "technique")
    evidence: dict[str, Any] = {
        "title": f"{card.title} on {request.described['data']}",
        "technique": {key: value for key, value in asdict(card).items() if key in ("name", "title", "paper", "line")},
        "lead": card.line,
        "caption": "Trained with the technique" + (" and plainly, with the same budget" if request.plain else ""),
        "request": {**request.described, "training samples": len(request.train)},
        "options": {name: str(value) for name, value in options.items()},
        "measures": {
            name: {
                "title": title,
                "unit": unit,
                "better": "high" if unit == "%" else "low",
                "digits": digits,
                "line": line,
            }
            for name, (title, unit, digits, line) in MEASURES.items()
        },
        "order": "test" if request.test is not None else "validation",
        "rows": rows,
        "pictures": [],
        "record": {
            "made on": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "weights (SHA-256)": weights_digest(model),
            "software": f"retouch {__version__}, torch {torch.__version__}, python {platform.python_version()}",
        },
    }
    return model, {**evidence, "words": _words(evidence["order"], rows, card)}


def _run(request: TrainRequest, recipe: Recipe, title: str, kind: str) -> tuple[nn.Module, dict[str, Any]]:
    settings = dict(request.settings)
    if request.checkpoint is not None:
        settings["checkpoint"] = request.checkpoint / kind
    start = time.perf_counter()
    model, history = recipe.fit(**settings)
    seconds = time.perf_counter() - start
    values = _measure(request, model)
    values |= {"seconds": [seconds], "step": [1000 * seconds / max(len(history), 1)]}
    return model, {"title": title, "kind": kind, "values": values, "answers": []}


def _measure(request: TrainRequest, model: nn.Module) -> dict[str, list[float]]:
    """Accuracy on all parts, calibration, and size."""
    parts = {"test": request.test, "validation": request.validation, "train": request.train}
    logits = {name: predict(model, in_order(data)).cpu() for name, data in parts.items() if data is not None}
    labels = {name: labels_of(parts[name]) for name in logits}
    values = {name: [accuracy(logits[name], labels[name])] for name in logits}
    held_out = "test" if "test" in logits else "validation"
    values["calibration"] = [_calibration(logits[held_out], labels[held_out])]
    if request.teacher is not None:
        theirs = predict(request.teacher, in_order(parts[held_out])).cpu()
        values["agreement"] = [100.0 * float((theirs.argmax(-1) == logits[held_out].argmax(-1)).double().mean())]
        values["parameters"] = [sum(p.numel() for p in model.parameters()) / 1000]
    return values


def _calibration(logits: torch.Tensor, labels: torch.Tensor) -> float:
    from torchmetrics.functional.classification import multiclass_calibration_error

    return 100.0 * float(multiclass_calibration_error(logits.softmax(-1), labels, num_classes=logits.shape[-1]))


def _words(held_out: str, rows: Mapping[str, Any], card: Card) -> Sequence[str]:
    """The result in plain sentences."""
    value = {name: {m: v[0] for m, v in row["values"].items()} for name, row in rows.items()}
    ours, samples = value["technique"], "held-out" if held_out == "test" else "validation"
    if "plain" not in value:
        return [f"Trained with {card.title}, the model is right on {ours[held_out]:.2f}% of the {samples} samples."]
    plain = value["plain"]
    return [
        f"Trained with {card.title}, the model is right on {ours[held_out]:.2f}% of the {samples} samples; plain "
        f"training with the same budget reaches {plain[held_out]:.2f}%. The calibration error is "
        f"{ours['calibration']:.2f}% against {plain['calibration']:.2f}%, and training took {ours['seconds']:.1f} s "
        f"against {plain['seconds']:.1f} s.",
        "This is one seed of each: a difference below a percent or so may be chance.",
    ]
