"""A user's labelled images: a folder with one subfolder a class, parquet files, or a `datasets` folder on disk.

Images are opened when they are asked for and go through the model's own image processor.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from retouch.core.data import TensorData, in_memory
from retouch.core.errors import InputError

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
Processor = Callable[..., Any]  # transformers image processor


class LabelledImages(Dataset[Any]):
    """Images with class ids.

    Args:
        open_image: index -> PIL image.
        targets: class ids (n,).
        classes: names of the classes, by id.
        processor: of the model.
        describe: index -> what to call the image in a message.
    """

    def __init__(
        self,
        open_image: Callable[[int], Any],
        targets: Sequence[int],
        classes: Sequence[str],
        processor: Processor,
        describe: Callable[[int], str],
    ) -> None:
        self.open_image, self.processor, self.describe = open_image, processor, describe
        self.targets, self.classes = torch.tensor(list(targets), dtype=torch.long), tuple(classes)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        from PIL import UnidentifiedImageError

        try:
            image = self.open_image(index)
            image.load()
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            raise InputError(f"{self.describe(index)} cannot be read as an image ({error})") from None
        if getattr(self.processor, "do_convert_rgb", None) is not False and image.mode != "RGB":
            image = image.convert("RGB")
        elif self.processor_is_gray() and image.mode != "L":
            image = image.convert("L")
        return self.processor(image, return_tensors="pt")["pixel_values"][0], self.targets[index]

    def processor_is_gray(self) -> bool:
        """Whether the model takes images of one channel."""
        mean = getattr(self.processor, "image_mean", None)
        return isinstance(mean, list | tuple) and len(mean) == 1


def load_images(path: str | Path, processor: Processor, label2id: dict[str, int] | None = None) -> LabelledImages:
    """Read labelled images.

    Args:
        path: folder of class subfolders, parquet file or folder of them, or folder of `datasets.save_to_disk`.
        processor: of the model.
        label2id: the model's names of its classes; where the data's names are all among them, they decide the ids.

    Raises:
        InputError: if there is nothing at the path, or nothing that can be used.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"There is no data at {path}")
    if path.is_file() and path.suffix != ".parquet":
        raise InputError(f"{path} is a {path.suffix or 'plain'} file, but data must be a folder of images or parquet")
    tables = [path] if path.is_file() else sorted(path.glob("*.parquet"))
    if tables or (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        return _from_datasets(path, tables, processor, label2id)
    return _from_folder(path, processor, label2id)


def _ids(names: Sequence[str], label2id: dict[str, int] | None) -> dict[str, int]:
    """Class ids by name: the model's if it knows these names, their order if it knows none of them."""
    unknown = [name for name in names if name not in (label2id or {})]
    if label2id and not unknown:
        return {name: int(label2id[name]) for name in names}
    if len(unknown) < len(names):
        raise InputError(f"The data has the classes {', '.join(unknown)}, which the model does not know")
    return {name: number for number, name in enumerate(names)}


def _class_names(ids: dict[str, int], label2id: dict[str, int] | None) -> list[str]:
    """Names by id: the data's own, and the model's for classes that the data lacks."""
    named = {number: name for name, number in ids.items()}
    if label2id and set(ids) <= set(label2id):
        named = {number: name for name, number in label2id.items()}
    return [named.get(number, str(number)) for number in range(max(named) + 1)]


def _from_folder(path: Path, processor: Processor, label2id: dict[str, int] | None) -> LabelledImages:
    names = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise InputError(f"{path} has no subfolders, but must have one for each class, with that class's images")
    ids, files = _ids(names, label2id), []
    for name in names:
        found = sorted(f for f in (path / name).rglob("*") if f.suffix.lower() in SUFFIXES)
        if not found:
            raise InputError(f"{path / name} holds no image, but each class must have at least one")
        files += [(file, ids[name]) for file in found]

    def open_image(index: int) -> Any:
        from PIL import Image

        return Image.open(files[index][0])

    targets = [target for _, target in files]
    return LabelledImages(open_image, targets, _class_names(ids, label2id), processor, lambda i: str(files[i][0]))


def _from_datasets(
    path: Path, tables: list[Path], processor: Processor, label2id: dict[str, int] | None
) -> LabelledImages:
    try:
        import datasets
    except ImportError:
        raise InputError(f"{path} needs the package datasets: pip install 'retouch[datasets]'") from None

    if tables:
        rows = datasets.Dataset.from_parquet([str(table) for table in tables])
    else:
        rows = datasets.load_from_disk(str(path))
        if isinstance(rows, datasets.DatasetDict):
            if "train" not in rows:
                raise InputError(
                    f"{path} has the splits {', '.join(rows)}, but must have one called train, or give one"
                )
            rows = rows["train"]
    image = next((name for name, kind in rows.features.items() if isinstance(kind, datasets.Image)), None)
    label = next((name for name in ("label", "labels", "target", "class") if name in rows.features), None)
    if image is None or label is None:
        raise InputError(f"{path} has the columns {', '.join(rows.features)}, but must have an image and a label")
    kind, column = rows.features[label], rows[label]
    if isinstance(kind, datasets.ClassLabel):
        names = list(kind.names)
        ids = _ids(names, label2id)
        targets, classes = [ids[names[value]] for value in column], _class_names(ids, label2id)
    elif kind.dtype == "string":
        ids = _ids(sorted(set(column)), label2id)
        targets, classes = [ids[value] for value in column], _class_names(ids, label2id)
    else:
        targets = [int(value) for value in column]
        known = {number: name for name, number in (label2id or {}).items()}
        classes = [known.get(number, str(number)) for number in range(max(targets) + 1)]
    return LabelledImages(lambda i: rows[i][image], targets, classes, processor, lambda i: f"Row {i} of {path}")


def held_in_memory(images: LabelledImages, *, limit_bytes: int = 2**30) -> LabelledImages | TensorData:
    """The images as tensors, read once, if they take up at most `limit_bytes`; else as they are, read when asked
    for."""
    sample = images[0][0]
    return in_memory(images) if sample.numel() * sample.element_size() * len(images) <= limit_bytes else images
