"""Where models and data come from: an embedded world, by name, or the user's disk."""

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from retouch.core import seeds
from retouch.core.batches import in_order
from retouch.core.checkpoints import load_model, save_model
from retouch.core.data import labels_of
from retouch.core.errors import InputError, nearest
from retouch.core.images import LabelledImages, held_in_memory, load_images
from retouch.core.models import count_classes
from retouch.core.pictures import png_address
from retouch.core.texts import load_texts
from retouch.worlds import names, world

PROCESSOR, TOKENIZER = "preprocessor_config.json", "tokenizer_config.json"


@dataclass
class ModelSource:
    """A classifier, what turns images or texts into its inputs, and where it is from.

    Attributes:
        model: in eval mode.
        processor: image processor, or None if it has none.
        tokenizer: of a classifier of texts.
        label2id: the model's names of its classes, or None if it has none of its own.
        world: (world, variant) of an embedded model.
    """

    model: nn.Module
    processor: Any = None
    tokenizer: Any = None
    label2id: dict[str, int] | None = None
    world: tuple[str, str] | None = None

    def untrained(self, seed: int) -> nn.Module:
        """A model of the same class and settings with new weights."""
        config: Any = self.model.config
        with seeds.isolated(seeds.derive(seed, "weights")):
            return type(self.model)(**config) if isinstance(config, dict) else type(self.model)(config)

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write a changed model in the format that this one came in."""
        save_model(model, folder)
        for part in (self.processor, self.tokenizer):
            if part is not None:
                part.save_pretrained(folder)


@dataclass
class DataSource:
    """Labelled samples, names of their classes, and pictures of them.

    Attributes:
        data: data set.
        classes: names, by id.
        images: the images as they are on disk; None for a world's tensors.
        world: name, for embedded data.
    """

    data: Any
    classes: tuple[str, ...]
    images: LabelledImages | None = None
    world: str | None = None

    def picture(self, row: int) -> str:
        """A small PNG of a sample, as a data address."""
        if self.images is None:
            return png_address(self.data[row][0])
        image = self.images.open_image(row).convert("RGB")
        image.thumbnail((64, 64))
        return png_address(image)


def _is_world(name: str) -> bool:
    return name.partition("/")[0] in names() and not Path(name).exists()


def _image_world(name: str) -> ModuleType:
    """A world of labelled images, which is what image classifiers are for."""
    module = world(name)
    if module.KIND != "images":
        fitting = [other for other in names() if world(other).KIND == "images"]
        raise InputError(f"The world {name} is of {module.KIND}, but must be one of images: {', '.join(fitting)}")
    return module


def load_model_source(name: str) -> ModelSource:
    """A model by world or folder."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if _is_world(name):
        where, _, variant = name.partition("/")
        module = _image_world(where)
        variant = variant or module.VARIANTS[0]
        if variant not in module.VARIANTS:
            raise InputError(
                f"The world {where} has no model {variant!r}, only {', '.join(module.VARIANTS)}."
                f"{nearest(variant, module.VARIANTS)}"
            )
        labels = {label: number for number, label in enumerate(module.CLASSES)}
        return ModelSource(module.reference(variant), module.image_processor(), None, labels, (where, variant))
    if not Path(name).exists():
        raise InputError(f"There is no model at {name}, and no world of that name (worlds: {', '.join(names())})")
    model = load_model(name)
    processor = None
    if (Path(name) / PROCESSOR).exists():
        processor = transformers.AutoImageProcessor.from_pretrained(name, local_files_only=True)
    tokenizer = None
    if type(model).__name__.endswith("ForSequenceClassification") and (Path(name) / TOKENIZER).exists():
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, local_files_only=True)
    own = getattr(getattr(model, "config", None), "label2id", None)
    if own and all(label.startswith("LABEL_") for label in own):
        own = None  # names that transformers makes up where none are given
    return ModelSource(model, processor, tokenizer, own)


def load_data_source(name: str, source: ModelSource, *, split: str = "train") -> DataSource:
    """Labelled data by world, folder or file, as inputs of a model."""
    if _is_world(name):
        module = _image_world(name.partition("/")[0])
        return DataSource(module.data(split), module.CLASSES, None, name)
    if not Path(name).exists():
        raise InputError(f"There is no data at {name}, and no world of that name (worlds: {', '.join(names())})")
    if source.tokenizer is not None:
        longest = getattr(getattr(source.model, "config", None), "max_position_embeddings", 512)
        texts = load_texts(name, source.tokenizer, source.label2id, max_length=longest)
        return DataSource(texts, texts.classes)
    if source.processor is None:
        raise InputError(f"The model has no image processor ({PROCESSOR}), which is needed to read images from {name}")
    images = load_images(name, source.processor, source.label2id)
    return DataSource(held_in_memory(images), images.classes, images)


def check_fit(source: ModelSource, data: DataSource) -> None:
    """Raise unless the model can be run on the data, and tells apart as many classes as the data has."""
    try:
        classes = count_classes(source.model, in_order(data.data, 1))
    except (RuntimeError, ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"The model cannot be run on this data: {reason}") from None
    highest = int(labels_of(data.data).max()) + 1
    if len(data.classes) != classes or highest > classes:
        raise InputError(
            f"The model tells {classes} classes apart, but the data has {max(len(data.classes), highest)}: "
            f"{', '.join(data.classes[:12])}{', ...' if len(data.classes) > 12 else ''}"
        )


def check_tokenizers(student: ModelSource, teacher: ModelSource) -> None:
    """Raise unless two classifiers of texts read the same tokens."""
    if (student.tokenizer is None) != (teacher.tokenizer is None):
        raise InputError(
            "Student and teacher must both be classifiers of texts with their tokenizers, or both of images"
        )
    if student.tokenizer is not None and student.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        sizes = len(student.tokenizer), len(teacher.tokenizer)
        raise InputError(
            f"The tokenizers of student and teacher have {sizes[0]} and {sizes[1]} tokens and differ, but must have "
            "the same vocabulary"
        )


def rows_to_forget(text: str, data: DataSource) -> Tensor:
    """Rows of the data that 'label=NAME' or 'index=FILE' names.

    Raises:
        InputError: for another form, an unknown label or missing file, no rows, or all of them.
    """
    kind, separator, value = text.partition("=")
    if not separator or kind not in ("label", "index") or not value:
        raise InputError(f"--forget is {text!r}, but must be label=NAME or index=FILE with a row number on each line")
    labels = labels_of(data.data)
    rows = _rows_of_label(value, data, labels) if kind == "label" else _rows_of_file(Path(value), len(labels))
    if len(rows) == 0:
        raise InputError(f"--forget {text} names no sample, but must name at least one")
    if len(rows) == len(labels):
        raise InputError(f"--forget {text} names all {len(labels)} samples, but some must be left to keep")
    return rows


def _rows_of_label(name: str, data: DataSource, labels: Tensor) -> Tensor:
    if name not in data.classes:
        raise InputError(f"There is no label {name!r}; the labels are {', '.join(data.classes)}")
    return (labels == data.classes.index(name)).nonzero()[:, 0]


def _rows_of_file(path: Path, count: int) -> Tensor:
    if not path.is_file():
        raise InputError(f"There is no file {path} with row numbers")
    rows = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        if not text.isdigit() or int(text) >= count:
            raise InputError(f"Line {number} of {path} is {text!r}, but must be a row number from 0 to {count - 1}")
        rows.append(int(text))
    return torch.tensor(sorted(set(rows)), dtype=torch.long)
