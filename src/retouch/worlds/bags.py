"""Bags of handwritten digits: a bag is positive if it holds a given digit, and which instances those are is known.

    data("train")         bags of the digits in that split of the world `digits`, drawn anew for every seed

A bag has 40 to 80 instances of 64 pixels in 0 to 1, in random order; a positive one has 3 to 8 of the key digit among
them, a negative one none. Half of the bags are positive. Bags are padded to the longest and come with a mask:

    ({"bag": (n, longest, 64), "mask": (n, longest)}, labels (n,))        data.keys (n, longest) are the key instances

The oracle is exact: the label follows from `keys`, and `keys` from the digits' own labels.
"""

import torch
from torch import Tensor

from retouch.core import seeds
from retouch.core.data import TensorData
from retouch.core.errors import InputError, in_range, one_of, positive
from retouch.worlds import digits

KIND = "bags"
VARIANTS: tuple[str, ...] = ()
SPLITS = {"train": 120, "validation": 200, "test": 300}


class Bags(TensorData):
    """Padded bags, their labels, and what the labels come from.

    Attributes:
        inputs: {"bag": (n, longest, 64), "mask": (n, longest)}; padding is zero, and False in the mask.
        targets: 1 for bags that hold the key digit (n,).
        keys: True at instances of the key digit (n, longest).
    """

    def __init__(self, bag: Tensor, mask: Tensor, keys: Tensor) -> None:
        super().__init__({"bag": bag, "mask": mask}, keys.any(1).long())
        self.keys = keys


def data(
    split: str = "train",
    *,
    count: int | None = None,
    sizes: tuple[int, int] = (40, 80),
    keys: tuple[int, int] = (3, 8),
    digit: int = 9,
    seed: int = 0,
) -> Bags:
    """Bags of one split, a function of the arguments alone. No digit is twice in a bag; bags may share digits.

    Args:
        split: "train", "validation" or "test": bags of different splits share no digit.
        count: bags; by default 120, 200 and 300.
        sizes: fewest and most instances of a bag.
        keys: fewest and most instances of the key digit in a positive bag.
        digit: the key.
        seed: of all draws.
    """
    one_of("split", split, tuple(SPLITS))
    one_of("digit", digit, range(len(digits.CLASSES)))
    count = SPLITS[split] if count is None else count
    positive("count", count)
    source, draw = digits.data(split), seeds.generator(seed, "bags", split)
    images, labels = source[torch.arange(len(source))]
    pools = [(labels == digit).nonzero()[:, 0], (labels != digit).nonzero()[:, 0]]
    for name, (low, high), most in (("sizes", sizes, len(pools[1])), ("keys", keys, len(pools[0]))):
        if not 1 <= low <= high <= most:
            raise InputError(f"{name} is ({low}, {high}), but must be two numbers from 1 to {most} in order")
    in_range("keys", keys[1], 1, sizes[0])

    def between(low: int, high: int) -> Tensor:
        return torch.randint(low, high + 1, (count,), generator=draw)

    lengths, found = between(*sizes), between(*keys)
    found *= torch.randperm(count, generator=draw) < (count + 1) // 2
    longest = int(lengths.max())
    mask = torch.arange(longest) < lengths[:, None]
    bag, is_key = torch.zeros(count, longest, 64), torch.zeros(count, longest, dtype=torch.bool)
    for number, (length, some) in enumerate(zip(lengths.tolist(), found.tolist(), strict=True)):
        wanted = ((pools[0], some), (pools[1], length - some))
        parts = [pool[torch.randperm(len(pool), generator=draw)[:n]] for pool, n in wanted]
        order = torch.randperm(length, generator=draw)
        bag[number, :length] = images[torch.cat(parts)[order]].flatten(1)
        is_key[number, :length] = order < some
    return Bags(bag, mask, is_key)
