"""A user's labelled texts: a CSV or JSON-lines file, parquet files, or a `datasets` folder on disk, as tokens."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from retouch.core.data import TensorData
from retouch.core.errors import InputError
from retouch.core.labelled import LABELS, Ids, column_of_labels, is_table, read_table, targets_of

TEXTS = ("text", "sentence", "content")  # names that a column of texts may have


class LabelledTexts(TensorData):
    """Tokens and class ids.

    Attributes:
        inputs: what the tokenizer gives: {"input_ids": (n, longest), "attention_mask": (n, longest), ...}.
        targets: class ids (n,).
        texts: as they were read.
        classes: names of the classes, by id.
    """

    def __init__(
        self, texts: Sequence[str], targets: Sequence[int], classes: Sequence[str], tokenizer: Any, max_length: int
    ) -> None:
        tokens = tokenizer(list(texts), padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        super().__init__(dict(tokens), torch.tensor(list(targets), dtype=torch.long))
        self.texts, self.classes = tuple(texts), tuple(classes)


def load_texts(
    path: str | Path, tokenizer: Any, label2id: Ids | None = None, *, max_length: int = 512
) -> LabelledTexts:
    """Read labelled texts.

    Args:
        path: .csv with a header, .jsonl, .parquet or a folder of it, or a folder of `datasets.save_to_disk`; with a
            column "text" and a column "label" of names or numbers.
        tokenizer: of the model.
        label2id: the model's names of its classes; where the data's names are all among them, they decide the ids.
        max_length: tokens; longer texts are cut.

    Raises:
        InputError: if there is nothing at the path, or nothing that can be used.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"There is no data at {path}")
    if is_table(path):
        rows = read_table(path)
        label, names = column_of_labels(rows)
        columns: dict[str, Any] = {name: rows[name] for name in rows.features}
    elif path.is_file() and path.suffix in (".csv", ".jsonl"):
        columns, names = _columns(path), None
        label = next((name for name in LABELS if name in columns), None)
    else:
        raise InputError(f"{path} must be a .csv, .jsonl or .parquet file of texts, or a folder of datasets")
    text = next((name for name in TEXTS if name in columns), None)
    if text is None or label is None:
        raise InputError(f"{path} has the columns {', '.join(columns)}, but must have text and label")
    if not len(columns[text]):
        raise InputError(f"{path} has no rows, but must have at least one")
    wrong = next((row for row, value in enumerate(columns[text]) if not isinstance(value, str)), None)
    if wrong is not None:
        raise InputError(f"Row {wrong} of {path} is {columns[text][wrong]!r}, but must be a text")
    targets, classes = targets_of(list(columns[label]), names, label2id)
    limit = min(max_length, getattr(tokenizer, "model_max_length", max_length))
    return LabelledTexts(columns[text], targets, classes, tokenizer, limit)


def _columns(path: Path) -> dict[str, list[Any]]:
    """Columns of a small table; numbers of CSV stay numbers where all of a column are."""
    try:
        with path.open(newline="") as file:
            if path.suffix == ".csv":
                rows = list(csv.DictReader(file))
            else:
                rows = [json.loads(line) for line in file if line.strip()]
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read ({error})") from None
    if not rows or not all(isinstance(row, dict) and row.keys() == rows[0].keys() for row in rows):
        raise InputError(f"{path} must have rows that all have the same columns")
    columns = {str(name): [row[name] for row in rows] for name in rows[0]}
    for name in set(columns) & set(LABELS):
        if all(isinstance(value, str) and value.isdigit() for value in columns[name]):
            columns[name] = [int(value) for value in columns[name]]
    return columns
