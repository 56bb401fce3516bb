"""Where an image shows a concept, and covering that place with another."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from retouch.core import seeds
from retouch.core.errors import InputError, one_of, positive

MODES = ("localized", "center", "random", "full", "none")
Encoder = Callable[[Tensor], Tensor]  # images (n, c, h, w) -> embeddings (n, d)


def locate_concepts(
    images: Tensor, vector: Any, encoder: Encoder, *, patch: int = 64, stride: int = 16, chunk: int = 4096
) -> Tensor:
    """Centre of the patch that shows a concept most, in every image: (n, 2) as row and column.

    Every patch is resized to the image's size, encoded, and compared with the concept vector by cosine.

    Args:
        images: (n, c, h, w).
        vector: concept vector (d,).
        encoder: images (n, c, h, w) -> embeddings (n, d).
        patch: side of the square patch.
        stride: step of the grid of patches.
        chunk: patches encoded at once.
    """
    height, width = images.shape[-2:]
    positive("stride", stride)
    _check_side(patch, height, width)
    pieces = images.unfold(2, patch, stride).unfold(3, patch, stride)  # (n, c, rows, columns, patch, patch)
    rows, columns = pieces.shape[2:4]
    pieces = pieces.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    scores = []
    with torch.no_grad():
        for some in pieces.split(chunk):
            embeddings = encoder(F.interpolate(some, size=(height, width), mode="bilinear", align_corners=False))
            scores.append(F.cosine_similarity(embeddings, torch.as_tensor(vector).to(embeddings)[None]).cpu())
    best = torch.cat(scores).view(len(images), rows * columns).argmax(1)
    return torch.stack([best // columns, best % columns], dim=1) * stride + patch // 2


def locate_concept(
    image: Tensor, vector: Any, encoder: Encoder, *, patch: int = 64, stride: int = 16
) -> tuple[int, int]:
    """Centre (row, column) of the patch that shows a concept most in one image (c, h, w); see `locate_concepts`."""
    row, column = locate_concepts(image[None], vector, encoder, patch=patch, stride=stride)[0].tolist()
    return row, column


def _check_side(patch: int, height: int, width: int) -> None:
    if not 1 <= patch <= min(height, width):
        raise InputError(f"patch is {patch}, but must be between 1 and the image's side, which is {height} x {width}")


def _corner(size: tuple[int, int], within: tuple[int, int], center: Any) -> tuple[int, int]:
    """Top left corner of a rectangle around a centre, moved inside where it would stick out."""
    places = zip(size, within, center, strict=True)
    top, left = (min(max(int(middle) - side // 2, 0), limit - side) for side, limit, middle in places)
    return top, left


def paste_patch(image: Tensor, patch: Tensor, center: Any) -> Tensor:
    """A copy of the image with the patch pasted over it, moved inside where it would stick out.

    Args:
        image: (c, h, w).
        patch: (c, p, q), not larger than the image.
        center: row and column of the patch's middle.
    """
    (height, width), (rows, columns) = image.shape[-2:], patch.shape[-2:]
    if rows > height or columns > width:
        raise InputError(f"patch is {rows} x {columns}, but must be at most the image's {height} x {width}")
    top, left = _corner((rows, columns), (height, width), center)
    result = image.clone()
    result[..., top : top + rows, left : left + columns] = patch
    return result


def _crop(image: Tensor, size: int, center: Any) -> Tensor:
    top, left = _corner((size, size), (image.shape[-2], image.shape[-1]), center)
    return image[..., top : top + size, left : left + size]


def poison_class(
    images: Tensor,
    donor_images: Tensor,
    *,
    mode: str = "localized",
    target_vector: Any = None,
    donor_vector: Any = None,
    encoder: Encoder | None = None,
    patch: int | None = None,
    stride: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Cover the concept of a class in its images with that of a donor class, one random donor image for each.

    Args:
        images: of the class to forget (n, c, h, w).
        donor_images: (m, c, h, w).
        mode: "localized" pastes the donor's best concept patch over the target's; "center" the donor's middle over
            the middle and "random" at a random place, both with patches 1.5 times as large; "full" the whole donor
            image, shrunk to 5/7 of the side, over the middle; "none" leaves the images.
        target_vector: concept to cover (d,), for "localized".
        donor_vector: concept to show (d,), for "localized".
        encoder: images -> embeddings, for "localized".
        patch: side of the patch; 64 of 224 pixels, in proportion, if None.
        stride: step of the search; 16 of 224 pixels, in proportion, if None.
        generator: a CPU generator for donors and places.

    Returns:
        (n, c, h, w).
    """
    one_of("mode", mode, MODES)
    if len(images) == 0 or len(donor_images) == 0:
        raise InputError(f"There are {len(images)} images and {len(donor_images)} donor images, but must be both")
    if mode == "none":
        return images.clone()
    height, width = images.shape[-2:]
    side = min(height, width)
    patch = max(1, round(side * 64 / 224)) if patch is None else patch
    stride = max(1, round(side * 16 / 224)) if stride is None else stride
    _check_side(patch, height, width)
    positive("stride", stride)
    generator = seeds.fresh(generator)
    donors = donor_images[torch.randint(len(donor_images), (len(images),), generator=generator)]
    middle = torch.tensor([height // 2, width // 2]).expand(len(images), 2)
    if mode == "full":
        size = (round(height * 160 / 224), round(width * 160 / 224))
        return _paste(images, F.interpolate(donors, size=size, mode="bilinear", align_corners=False), middle)
    if mode == "localized":
        if encoder is None or target_vector is None or donor_vector is None:
            raise InputError("mode is 'localized', which needs encoder, target_vector and donor_vector")
        shown = locate_concepts(donors, donor_vector, encoder, patch=patch, stride=stride)
        covered = locate_concepts(images, target_vector, encoder, patch=patch, stride=stride)
        return _paste(images, [_crop(d, patch, place) for d, place in zip(donors, shown, strict=True)], covered)
    large = min(side, round(1.5 * patch))
    places = middle
    if mode == "random":
        places = (torch.rand(len(images), 2, generator=generator) * torch.tensor([height, width])).long()
    return _paste(images, [_crop(d, large, place) for d, place in zip(donors, middle, strict=True)], places)


def _paste(images: Tensor, patches: Iterable[Tensor], places: Tensor) -> Tensor:
    return torch.stack([paste_patch(*parts) for parts in zip(images, patches, places, strict=True)])
