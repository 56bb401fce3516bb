"""Image classifiers of transformers as judges: they take images in 0 to 1, and gradients pass to the pixels."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retouch.core.checkpoints import load_model
from retouch.core.errors import InputError, nearest
from retouch.core.models import logits_of
from retouch.core.teachers import Teacher


class ImageJudge(nn.Module):
    """A classifier with what its image processor does to pixels: size, mean and standard deviation.

    Args:
        model: image classifier.
        processor: of transformers.
    """

    def __init__(self, model: nn.Module, processor: Any) -> None:
        super().__init__()
        self.model = Teacher(model)
        size = processor.size
        side = size.get("shortest_edge")
        self.size = (side, side) if side else (size["height"], size["width"])
        one = [0.0], [1.0]
        mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else one
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Images (n, channels, h, w) in 0 to 1 to logits (n, classes)."""
        if self.mean.shape[1] == 1 and images.shape[1] == 3:
            weights = images.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
            images = (images * weights).sum(1, keepdim=True)
        if images.shape[-2:] != self.size:
            images = F.interpolate(images, self.size, mode="bilinear", antialias=True, align_corners=False)
        # The teacher's own forward keeps no gradients; those to the pixels are what a search asks for.
        return logits_of(self.model.model((images - self.mean) / self.std))


def load_judge(folder: str) -> tuple[ImageJudge, dict[str, int]]:
    """A judge and its classes from a folder that save_pretrained wrote.

    Raises:
        InputError: if it holds no image classifier with its processor.
    """
    import transformers

    if not (Path(folder) / "preprocessor_config.json").exists():
        raise InputError(f"{folder} has no preprocessor_config.json: it must be an image classifier with its processor")
    processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    model: Any = load_model(folder)
    return ImageJudge(model, processor), dict(model.config.label2id)


def load_judges(folders: str, label: str) -> tuple[list[ImageJudge], int]:
    """Judges of the same classes, and the number of one of them.

    Args:
        folders: with commas between them, at least two; the last is held out of the search.
        label: name of a class.
    """
    names = [name.strip() for name in folders.split(",") if name.strip()]
    if len(names) < 2:
        raise InputError(f"classifiers is {folders!r}, but must name at least two folders, with commas between them")
    found = [load_judge(name) for name in names]
    classes = found[0][1]
    other = next((name for name, (_, own) in zip(names, found, strict=True) if own != classes), None)
    if other is not None:
        raise InputError(f"The classifiers {names[0]} and {other} have other classes, but must have the same")
    if label not in classes:
        raise InputError(f"label is {label!r}, but must be a class of the classifiers.{nearest(label, classes)}")
    return [judge for judge, _ in found], int(classes[label])
