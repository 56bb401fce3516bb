"""From teacher to student: the loop's objective that asks both, answers kept on disk, and the two classic losses.

    fit(student, data, Distillation(teacher, loss))              loss(student, teacher, labels) of two `Answer`s
    fit(student, answered(data, teacher), Distillation(None, loss))     the teacher is asked once, not at every step

The teacher runs once a batch, frozen, and never again where a batch brings its answers along.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retouch.core.batches import in_order
from retouch.core.checkpoints import load_tensors, save_tensors
from retouch.core.data import TensorData, in_memory, subset
from retouch.core.errors import InputError, positive
from retouch.core.features import capture
from retouch.core.models import Batch, forward, logits_of, predict, unpack
from retouch.core.objectives import Losses
from retouch.core.progress import track
from retouch.core.teachers import Teacher

SHARD = 4096  # samples in a file of kept answers


@dataclass(frozen=True)
class Answer:
    """What a model says of a batch.

    Attributes:
        logits: (n, classes), or (n, tokens, vocabulary).
        features: activations of the layers asked for, by name.
    """

    logits: Tensor
    features: Mapping[str, Tensor] = field(default_factory=dict)


def ask(model: nn.Module, inputs: Any, layers: Iterable[str] = ()) -> Answer:
    """Run a model once for its logits and the outputs of named layers, with gradients."""
    with capture(model, layers) as features:
        return Answer(logits_of(forward(model, inputs)), features)


class Distillation:
    """Objective for `fit`: a loss between what the student and the teacher say of the same inputs.

    Args:
        teacher: kept as a frozen copy; None where the data has its answers (`answered`).
        loss: (student: Answer, teacher: Answer, labels) -> scalar or named scalars; labels are None where there are
            none.
        student_layers: layers whose outputs the loss looks at, as `named_modules()` has them.
        teacher_layers: likewise.
    """

    def __init__(
        self,
        teacher: nn.Module | None,
        loss: Callable[[Answer, Answer, Tensor | None], Losses],
        *,
        student_layers: Sequence[str] = (),
        teacher_layers: Sequence[str] = (),
    ) -> None:
        self.teacher = teacher if teacher is None or isinstance(teacher, Teacher) else Teacher(teacher)
        self.loss, self.student_layers, self.teacher_layers = loss, student_layers, teacher_layers
        self.__name__ = getattr(loss, "__name__", type(loss).__name__)

    def __call__(self, model: nn.Module, batch: Batch, run: Any = None) -> Losses:
        """The loss of one batch."""
        inputs, targets = unpack(batch)
        if isinstance(targets, Mapping):
            labels, theirs = targets.get("labels"), Answer(targets["teacher"])
        elif self.teacher is None:
            raise InputError("teacher is None, but must be a model where the batch does not bring its answers")
        else:
            first = next(self.teacher.parameters(), None)
            self.teacher.to(first.device) if first is not None else None
            labels, asked = targets, [f"model.{name}" for name in self.teacher_layers]
            with torch.no_grad():
                found = ask(self.teacher, inputs, asked)
            theirs = Answer(found.logits, {name.removeprefix("model."): f for name, f in found.features.items()})
        ours = ask(model, inputs, self.student_layers)
        check_pair(ours.logits, theirs.logits)
        return self.loss(ours, theirs, labels)


def check_pair(student_logits: Tensor, teacher_logits: Tensor) -> None:
    """Raise unless both tell the same classes apart, for the same samples."""
    if student_logits.shape[-1] != teacher_logits.shape[-1]:
        raise InputError(
            f"The student tells {student_logits.shape[-1]} classes apart and the teacher {teacher_logits.shape[-1]}, "
            "but both must have the same classes or vocabulary"
        )
    if student_logits.shape != teacher_logits.shape:
        raise InputError(
            f"The student's logits have shape {tuple(student_logits.shape)} and the teacher's "
            f"{tuple(teacher_logits.shape)}, but both must be for the same samples"
        )


def answered(data: Any, teacher: nn.Module, *, folder: str | Path | None = None, batch_size: int = 256) -> TensorData:
    """The data with the teacher's logits beside every label: targets are {"labels": ..., "teacher": ...}.

    For data without random augmentation. The answers are asked once; in a folder they are kept as safetensors shards
    and read back the next time, also after a run that was stopped.

    Args:
        data: samples, read into memory.
        teacher: asked in eval mode.
        folder: where the answers are kept; nowhere if None.
        batch_size: samples asked at once.

    Raises:
        InputError: if the folder has the answers of another teacher or other data.
    """
    held = in_memory(data)
    shards = [range(start, min(start + SHARD, len(held))) for start in range(0, len(held), SHARD)]
    if folder is not None:
        _claim(Path(folder), held, teacher)
    parts = []
    for number, rows in enumerate(track(shards, "asking the teacher")):
        path = None if folder is None else Path(folder) / f"answers-{number:05}.safetensors"
        if path is not None and path.exists():
            parts.append(load_tensors(path)["logits"])
            continue
        parts.append(predict(teacher, in_order(subset(TensorData(held.inputs), rows), batch_size)).cpu())
        if path is not None:
            save_tensors(path, {"logits": parts[-1]})
    targets: dict[str, Tensor] = {"teacher": torch.cat(parts)}
    if isinstance(held.targets, Tensor):
        targets["labels"] = held.targets
    return TensorData(held.inputs, targets)


def _claim(folder: Path, data: TensorData, teacher: nn.Module) -> None:
    """Note whose answers a folder keeps, and refuse one that keeps others."""
    digest = hashlib.sha256()
    inputs = data.inputs if isinstance(data.inputs, Mapping) else {"inputs": data.inputs}
    for name, value in [*sorted(teacher.state_dict().items()), *sorted(inputs.items())]:
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    note = folder / "answers.json"
    mine = {"samples": len(data), "digest": digest.hexdigest()}
    if note.exists() and json.loads(note.read_text()) != mine:
        raise InputError(f"{folder} keeps the answers of another teacher or to other data: give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(mine) + "\n")


def softened_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 4.0) -> Tensor:
    """T^2 KL(teacher || student) of predictions softened by T, summed over classes, mean over samples (Hinton, 2015).

    Args:
        student_logits: (..., classes).
        teacher_logits: likewise; no gradient goes into them.
        temperature: T > 0.
    """
    positive("temperature", temperature)
    p, q = ((logits / temperature).log_softmax(-1) for logits in (teacher_logits.detach(), student_logits))
    return temperature**2 * F.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean()


def hint_loss(student_features: Tensor, teacher_features: Tensor, adapter: nn.Module) -> Tensor:
    """Mean squared distance of adapted student features from the teacher's (FitNets, arXiv 1412.6550).

    Args:
        student_features: (n, ...), flattened.
        teacher_features: (n, ...), flattened.
        adapter: from the student's width to the teacher's, trained along.
    """
    return F.mse_loss(adapter(student_features.flatten(1)), teacher_features.detach().flatten(1))
