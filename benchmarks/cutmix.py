"""CutMix: the vectorised paste against a straightforward loop over images, one box a batch and one an image."""

import torch
from ratios import compare

from retouch.train.cutmix import cutmix, cutmix_box


def loop(images, labels, *, per_sample):
    draw = torch.Generator().manual_seed(0)
    partners = torch.randperm(len(images), generator=draw)
    mixed, box = images.clone(), None
    for number, partner in enumerate(partners.tolist()):
        if box is None or per_sample:
            lam = float(torch.rand((), generator=draw))
            center = tuple(int(torch.randint(side, (), generator=draw)) for side in images.shape[-2:])
            box = cutmix_box(*images.shape[-2:], lam, center=center)
        top, bottom, left, right = box
        mixed[number, :, top:bottom, left:right] = images[partner, :, top:bottom, left:right]
    return mixed


if __name__ == "__main__":
    images, labels = torch.rand(256, 3, 32, 32), torch.arange(256) % 10
    for per_sample in (False, True):
        compare(
            "CutMix, 256 images of 32 pixels, a box " + ("an image" if per_sample else "a batch"),
            lambda per_sample=per_sample: cutmix(images, labels, per_sample=per_sample),
            lambda per_sample=per_sample: loop(images, labels, per_sample=per_sample),
            against="a loop over images",
            rounds=15,
            wanted="more than 1",
        )
