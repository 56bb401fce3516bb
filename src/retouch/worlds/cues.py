"""Two cues that agree: images whose class shows in an easy way on the left and in a hard way on the right.

    two_cue("train", count=300)                  both cues, 16 x 16 pixels, 4 classes
    two_cue("test", easy=False)                  the same images with the easy cue taken out; hard=False likewise

The left half holds a square whose brightness is the class, the right half a weak grating whose orientation is, both
under noise. A classifier may use either or both, and taking one cue out tells which: does a training technique make a
network attend to the less discriminative part as well?

A network of two convolutions (24 and 48 channels, batch norm, global pooling), Adam 3e-3, 500 steps of 48 images, mean
of 3 seeds, accuracy with both cues / without the easy one / without the hard one: trained plainly 1.00 / 0.43 / 0.98,
with CutMix on half of the batches 1.00 / 0.64 / 0.95; chance is 0.25.
"""

from math import pi

import torch

from retouch.core import seeds
from retouch.core.data import TensorData
from retouch.core.errors import one_of, positive

KIND = "cues"
VARIANTS: tuple[str, ...] = ()
CLASSES = ("dark, level", "dim, rising", "bright, upright", "white, falling")
SPLITS = {"train": 300, "validation": 400, "test": 1000}
SIDE = 16
SQUARE = 6  # side of the square in pixels
BRIGHTNESS = (0.1, 0.4, 0.7, 1.0)  # of the square, by class
PLAIN = 0.5  # brightness of everything else
WAVE = 4.0  # pixels from one line of the grating to the next
AMPLITUDE = 0.09  # of the grating
NOISE = 0.1  # standard deviation, everywhere


def two_cue(
    split: str = "train", *, count: int | None = None, easy: bool = True, hard: bool = True, seed: int = 0
) -> TensorData:
    """Images (count, 1, 16, 16) around 0 to 1, not cut off, and classes (count,), as many of each as possible.

    Args:
        split: "train", "validation" or "test": other draws of everything.
        count: images; by default 300, 400 and 1000.
        easy: draw the square.
        hard: draw the grating.
        seed: of all draws; class, places and noise do not depend on which cues are drawn.
    """
    one_of("split", split, tuple(SPLITS))
    count = SPLITS[split] if count is None else count
    positive("count", count)
    draw = seeds.generator(seed, "cues", split)
    labels = (torch.arange(count) % len(CLASSES))[torch.randperm(count, generator=draw)]
    corner = torch.randint(0, SIDE // 2 - SQUARE + 1, (count,), generator=draw)
    top = torch.randint(0, SIDE - SQUARE + 1, (count,), generator=draw)
    phase = 2 * pi * torch.rand(count, generator=draw)
    images = PLAIN + NOISE * torch.randn(count, SIDE, SIDE, generator=draw)

    x, y = torch.arange(SIDE)[None, None], torch.arange(SIDE)[None, :, None]
    if easy:
        dx, dy = x - corner.view(-1, 1, 1), y - top.view(-1, 1, 1)
        square = (dx >= 0) & (dx < SQUARE) & (dy >= 0) & (dy < SQUARE)
        images += square * (torch.tensor(BRIGHTNESS)[labels].view(-1, 1, 1) - PLAIN)
    if hard:
        angle = (labels * pi / len(CLASSES)).view(-1, 1, 1)
        wave = torch.cos(2 * pi / WAVE * (y * angle.cos() + x * angle.sin()) + phase.view(-1, 1, 1))
        images += AMPLITUDE * wave * (x >= SIDE // 2)
    return TensorData(images[:, None], labels)


def data(split: str = "train") -> TensorData:
    """One of the three splits, with both cues."""
    return two_cue(split)
