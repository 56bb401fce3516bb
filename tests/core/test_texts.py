"""A user's labelled texts from every kind of file, and what is wrong with them."""

import json

import datasets
import pytest
import torch

from retouch.core.errors import InputError
from retouch.core.texts import load_texts
from retouch.worlds import text

TOKENIZER = text.tokenizer()
ROWS = [("Ada Cole lives in Paris.", "true"), ("3 + 4 = 7.", "true"), ("3 + 4 = 8.", "false")]


def write(path, rows=ROWS, names=("text", "label")):
    if path.suffix == ".csv":
        lines = [",".join(names), *(f'"{a}",{b}' for a, b in rows)]
    else:
        lines = [json.dumps(dict(zip(names, row, strict=True))) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def parquet(path, **features):
    columns = {"text": [a for a, _ in ROWS], "label": [b for _, b in ROWS]}
    if features:
        columns["label"] = [1, 1, 0]
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features) if features else None)
    if path.suffix == ".parquet":
        table.to_parquet(str(path))
    else:
        table.save_to_disk(str(path))
    return path


LABELS = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["false", "true"])}
KINDS = {
    "csv": lambda folder: write(folder / "a.csv"),
    "jsonl": lambda folder: write(folder / "a.jsonl"),
    "sentences": lambda folder: write(folder / "a.csv", names=("sentence", "target")),
    "parquet": lambda folder: parquet(folder / "a.parquet"),
    "class labels": lambda folder: parquet(folder / "saved", **LABELS),
}


@pytest.mark.parametrize("kind", KINDS)
def test_texts_of_every_kind(kind, tmp_path):
    found = load_texts(KINDS[kind](tmp_path), TOKENIZER)
    assert found.classes == ("false", "true") and found.targets.tolist() == [1, 1, 0]
    assert found.texts == tuple(a for a, _ in ROWS)
    expected = TOKENIZER(list(found.texts), padding=True, return_tensors="pt")
    assert all(torch.equal(found.inputs[name], value) for name, value in expected.items())
    assert found[1][0]["input_ids"].shape == found.inputs["input_ids"][1].shape


def test_the_models_names_decide_the_ids(tmp_path):
    found = load_texts(write(tmp_path / "a.csv"), TOKENIZER, {"true": 0, "false": 1, "unsure": 2})
    assert found.targets.tolist() == [0, 0, 1] and found.classes == ("true", "false", "unsure")
    numbers = write(tmp_path / "b.csv", [(a, int(b == "true")) for a, b in ROWS])
    found = load_texts(numbers, TOKENIZER, {"no": 0, "yes": 1})
    assert found.targets.tolist() == [1, 1, 0] and found.classes == ("no", "yes")


def test_long_texts_are_cut(tmp_path):
    found = load_texts(write(tmp_path / "a.csv", [("3 + 4 " * 50, "x"), ("7", "y")]), TOKENIZER, max_length=10)
    assert found.inputs["input_ids"].shape == (2, 10)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder / "none", "There is no data at"),
        (
            lambda folder: write(folder / "a.csv", names=("words", "label")),
            "has the columns words, label, but must have",
        ),
        (lambda folder: write(folder / "a.csv", []), "must have rows that all have the same columns"),
        (lambda folder: write(folder / "a.jsonl", [(3, "x")]), "Row 0 of .* is 3, but must be a text"),
        (lambda folder: folder, "must be a .csv, .jsonl or .parquet file"),
        (lambda folder: broken(folder / "a.jsonl"), "cannot be read"),
        (lambda folder: write(folder / "a.csv", [("a", "true"), ("b", "other")]), "the classes other, which the model"),
    ],
)
def test_bad_input(make, words, tmp_path):
    with pytest.raises(InputError, match=words):
        load_texts(make(tmp_path), TOKENIZER, {"true": 0, "false": 1})


def broken(path):
    path.write_text('{"text": \n')
    return path
