"""What a user's labelled images and labelled texts have in common: class names and their ids, and tables on disk."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retouch.core.errors import InputError

LABELS = ("label", "labels", "target", "class")  # names that a column of labels may have
Ids = dict[str, int]


def class_ids(names: Sequence[str], label2id: Ids | None) -> Ids:
    """Class ids by name: the model's if it knows these names, their order if it knows none of them."""
    unknown = [name for name in names if name not in (label2id or {})]
    if label2id and not unknown:
        return {name: int(label2id[name]) for name in names}
    if len(unknown) < len(names):
        raise InputError(f"The data has the classes {', '.join(unknown)}, which the model does not know")
    return {name: number for number, name in enumerate(names)}


def class_names(ids: Ids, label2id: Ids | None) -> list[str]:
    """Names by id: the data's own, and the model's for classes that the data lacks."""
    named = {number: name for name, number in ids.items()}
    if label2id and set(ids) <= set(label2id):
        named = {number: name for name, number in label2id.items()}
    return [named.get(number, str(number)) for number in range(max(named) + 1)]


def targets_of(column: Sequence[Any], names: Sequence[str] | None, label2id: Ids | None) -> tuple[list[int], list[str]]:
    """Class ids of a column of labels, and the names of all classes by id.

    Args:
        column: numbers or names.
        names: by number, where the table tells them.
        label2id: the model's names of its classes.
    """
    if names is not None:
        column = [names[value] for value in column]
    elif column and isinstance(column[0], str):
        names = sorted(set(column))
    if names is not None:
        ids = class_ids(names, label2id)
        return [ids[value] for value in column], class_names(ids, label2id)
    targets = [int(value) for value in column]
    known = {number: name for name, number in (label2id or {}).items()}
    return targets, [known.get(number, str(number)) for number in range(max(targets) + 1)]


def is_table(path: Path) -> bool:
    """Whether something on disk is parquet, a folder of it, or a folder of `datasets.save_to_disk`."""
    if path.is_file():
        return path.suffix == ".parquet"
    return bool(list(path.glob("*.parquet"))) or any((path / n).exists() for n in ("state.json", "dataset_dict.json"))


def read_table(path: Path) -> Any:
    """A `datasets.Dataset`; of several splits the one called train."""
    try:
        import datasets
    except ImportError:
        raise InputError(f"{path} needs the package datasets: pip install 'retouch[datasets]'") from None

    tables = [path] if path.is_file() else sorted(path.glob("*.parquet"))
    if tables:
        return datasets.Dataset.from_parquet([str(table) for table in tables])
    rows = datasets.load_from_disk(str(path))
    if not isinstance(rows, datasets.DatasetDict):
        return rows
    if "train" not in rows:
        raise InputError(f"{path} has the splits {', '.join(rows)}, but must have one called train, or give one")
    return rows["train"]


def column_of_labels(rows: Any) -> tuple[str | None, Sequence[str] | None]:
    """Name of the column of labels in a `datasets.Dataset`, and the names of its classes if it tells them."""
    import datasets

    found = next((name for name in LABELS if name in rows.features), None)
    kind = rows.features[found] if found else None
    return found, list(kind.names) if isinstance(kind, datasets.ClassLabel) else None
