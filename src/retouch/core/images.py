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
from retouch.core.labelled import Ids, class_ids, class_names, column_of_labels, is_table, read_table, targets_of

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


def load_images(path: str | Path, processor: Processor, label2id: Ids | None = None) -> LabelledImages:
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
    if is_table(path):
        return _from_table(path, processor, label2id)
    return _from_folder(path, processor, label2id)


def _from_folder(path: Path, processor: Processor, label2id: Ids | None) -> LabelledImages:
    names = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise InputError(f"{path} has no subfolders, but must have one for each class, with that class's images")
    ids, files = class_ids(names, label2id), []
    for name in names:
        found = sorted(f for f in (path / name).rglob("*") if f.suffix.lower() in SUFFIXES)
        if not found:
            raise InputError(f"{path / name} holds no image, but each class must have at least one")
        files += [(file, ids[name]) for file in found]

    def open_image(index: int) -> Any:
        from PIL import Image

        return Image.open(files[index][0])

    targets = [target for _, target in files]
    return LabelledImages(open_image, targets, class_names(ids, label2id), processor, lambda i: str(files[i][0]))


def _from_table(path: Path, processor: Processor, label2id: Ids | None) -> LabelledImages:
    rows = read_table(path)
    import datasets

    image = next((name for name, kind in rows.features.items() if isinstance(kind, datasets.Image)), None)
    label, names = column_of_labels(rows)
    if image is None or label is None:
        raise InputError(f"{path} has the columns {', '.join(rows.features)}, but must have an image and a label")
    targets, classes = targets_of(list(rows[label]), names, label2id)
    return LabelledImages(lambda i: rows[i][image], targets, classes, processor, lambda i: f"Row {i} of {path}")


def held_in_memory(images: LabelledImages, *, limit_bytes: int = 2**30) -> LabelledImages | TensorData:
    """The images as tensors, read once, if they take up at most `limit_bytes`; else as they are, read when asked
    for."""
    sample = images[0][0]
    return in_memory(images) if sample.numel() * sample.element_size() * len(images) <= limit_bytes else images
