"""A forgetting request on a user's classifier: do it, measure before and after, and write down the evidence."""

import hashlib
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from retouch import __version__
from retouch.core.batches import in_order
from retouch.core.cards import Card
from retouch.core.data import labels_of, subset
from retouch.core.metrics.unlearning import (
    accuracy,
    activation_distance,
    logit_kl,
    membership_inference_svc,
)
from retouch.core.models import predict

MEASURES = {
    "forget": ("forget", "%", 1, "Accuracy on the samples to forget."),
    "retain": ("keep", "%", 1, "Accuracy on all other samples of the data."),
    "test": ("test", "%", 1, "Accuracy on held-out samples, without those of a class that was forgotten whole."),
    "test_forget": ("test, forgotten", "%", 1, "Accuracy on held-out samples of the forgotten class."),
    "attack": ("attack", "%", 1, "Share of the samples to forget that an attack on confidence takes for never seen."),
    "kl": ("KL", "", 2, "Divergence of predictions on the samples to forget from the retrained model's."),
    "distance": ("distance", "", 2, "L2 distance of predictions on the samples to forget to the retrained model's."),
}


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        model: classifier trained on the data.
        data: labelled samples; those to forget are among them.
        forget: rows of the data to forget.
        classes: names of the classes.
        test: held-out labelled samples, if there are any.
        oracle: a model trained without the forget set, if there is one.
        picture: row of the data -> image to show on the page.
        described: the request in words, by name: model, data, forget.
    """

    model: nn.Module
    data: Any
    forget: Tensor
    classes: Sequence[str]
    test: Any
    oracle: nn.Module | None
    picture: Callable[[int], str]
    described: Mapping[str, str]


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over the names and bytes of all weights and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def carry_out(
    request: Request, card: Card, technique: Callable[..., nn.Module], options: Mapping[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    """Run the technique and measure what it did.

    Returns:
        The changed model, and the evidence.
    """
    kept = torch.ones(len(request.data), dtype=torch.bool)
    kept[request.forget] = False
    forget, retain = subset(request.data, request.forget), subset(request.data, kept.nonzero()[:, 0])
    before = _Outputs(request, request.model, forget, retain)
    start = time.perf_counter()
    changed = technique(request.model, forget, retain, **options)
    seconds = time.perf_counter() - start
    outputs = {"before": before, "after": _Outputs(request, changed, forget, retain)}
    if request.oracle is not None:
        outputs["oracle"] = _Outputs(request, request.oracle, forget, retain)
    titles = {"before": "before", "after": f"after {card.title}", "oracle": "retrained without them"}
    kinds = {"before": "original", "after": "technique", "oracle": "oracle"}
    shown = _shown(request.forget, kept)
    rows = {
        name: {
            "title": titles[name],
            "kind": kinds[name],
            "values": {m: [v] for m, v in _measure(output, outputs.get("oracle")).items()},
            "answers": [_answer(request, output, row) for row in shown],
        }
        for name, output in outputs.items()
    }
    counts = {"samples to forget": len(request.forget), "samples to keep": int(kept.sum())}
    described = {**request.described, **counts}
    evidence: dict[str, Any] = {
        "technique": {key: value for key, value in asdict(card).items() if key in ("name", "title", "paper", "line")},
        "title": f"{card.title}: {request.described['forget']}",
        "lead": card.line,
        "caption": "The model before and after"
        + ("" if request.oracle is None else ", and retrained without the forget set"),
        "request": described,
        "options": {name: str(value) for name, value in options.items()},
        "measures": {
            name: {"title": title, "unit": unit, "better": "oracle", "digits": digits, "line": line}
            for name, (title, unit, digits, line) in MEASURES.items()
        },
        "order": "forget",
        "rows": rows,
        "pictures": [
            {
                "png": request.picture(row),
                "title": request.classes[int(labels_of(request.data)[row])],
                "group": "to keep" if kept[row] else "to forget",
            }
            for row in shown
        ],
        "record": {
            "made on": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "seconds for the technique": f"{seconds:.2f}",
            "weights before (SHA-256)": weights_digest(request.model),
            "weights after (SHA-256)": weights_digest(changed),
            "software": f"retouch {__version__}, torch {torch.__version__}, python {platform.python_version()}",
        },
    }
    return changed, {**evidence, "words": _words(rows, described)}


class _Outputs:
    """A model's logits on all parts of a request, computed once."""

    def __init__(self, request: Request, model: nn.Module, forget: Any, retain: Any) -> None:
        self.request = request
        self.forget, self.retain = predict(model, in_order(forget)).cpu(), predict(model, in_order(retain)).cpu()
        self.labels = labels_of(forget), labels_of(retain)
        self.test = None if request.test is None else predict(model, in_order(request.test)).cpu()

    def of_row(self, row: int) -> Tensor:
        """Logits of one sample of the data."""
        place = (self.request.forget == row).nonzero()
        if len(place):
            return self.forget[int(place[0])]
        return self.retain[row - int((self.request.forget < row).sum())]


def _measure(mine: _Outputs, oracle: _Outputs | None) -> dict[str, float]:
    forgotten, kept = mine.labels
    values = {"forget": accuracy(mine.forget, forgotten), "retain": accuracy(mine.retain, kept)}
    if mine.test is not None:
        labels = labels_of(mine.request.test)
        gone = ~torch.isin(labels, kept)
        values["test"] = accuracy(mine.test[~gone], labels[~gone])
        if gone.any():
            values["test_forget"] = accuracy(mine.test[gone], labels[gone])
        count = min(len(kept), int((~gone).sum()))
        draw = torch.randperm(len(kept), generator=torch.Generator().manual_seed(0))[:count]
        tested = (mine.test[~gone][:count], labels[~gone][:count])
        share = membership_inference_svc((mine.retain[draw], kept[draw]), tested, (mine.forget, forgotten))
        values["attack"] = 100 * share
    if oracle is not None:
        values["kl"] = logit_kl(mine.forget, oracle.forget)
        values["distance"] = activation_distance(mine.forget, oracle.forget)
    return values


def _shown(forget: Tensor, kept: Tensor) -> list[int]:
    """Rows for the page: five to forget, seven to keep, spread over the data."""
    others = kept.nonzero()[:, 0]
    return [*_spread(forget, 5), *_spread(others, 7)]


def _spread(rows: Tensor, count: int) -> list[int]:
    count = min(count, len(rows))
    return [int(rows[k * len(rows) // count]) for k in range(count)]


def _answer(request: Request, output: _Outputs, row: int) -> dict[str, Any]:
    probabilities = output.of_row(row).softmax(-1)
    seen, label = int(probabilities.argmax()), int(labels_of(request.data)[row])
    right = None if bool((request.forget == row).any()) else seen == label
    return {"text": f"{request.classes[seen]} ({100 * float(probabilities.max()):.0f}%)", "right": right}


def _words(rows: Mapping[str, Any], request: Mapping[str, Any]) -> list[str]:
    """The result in plain sentences."""
    value = {name: {m: v[0] for m, v in row["values"].items()} for name, row in rows.items()}
    before, after = value["before"], value["after"]
    sentences = [
        f"The model was right on {before['forget']:.1f}% of the {request['samples to forget']} samples to forget, and "
        f"is now right on {after['forget']:.1f}%. On the {request['samples to keep']} samples to keep it was right on "
        f"{before['retain']:.1f}%, and is now on {after['retain']:.1f}%."
    ]
    if "test" in after:
        went = f"went from {before['test']:.1f}% to {after['test']:.1f}%"
        sentences.append(f"On held-out samples of what it should keep, accuracy {went}.")
    if "oracle" in value:
        oracle = value["oracle"]
        sentences.append(
            f"A model trained again without these samples is right on {oracle['forget']:.1f}% of them: that is the "
            "aim, and it need not be zero. The nearer the changed model is to it in every column, the better."
        )
    else:
        sentences.append(
            "Whether that is enough is decided by a model trained again without these samples, which may well "
            "recognise some of them; give one with --oracle to compare."
        )
    return sentences
