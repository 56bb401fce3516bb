"""Sixteen small networks trained at once (`train_many`) against one after the other."""

import torch
from ratios import compare

from retouch.arenas.forget import SmallNetwork
from retouch.core.data import subset
from retouch.core.ensemble import train_many
from retouch.worlds import digits


def train(build, count, chunk):
    data = subset(digits.data("train"), range(200))
    members = torch.ones(count, len(data), dtype=torch.bool)
    train_many(build, data, members, epochs=5, batch_size=32, chunk=chunk, progress=False)


if __name__ == "__main__":
    for build, count, wanted in ((SmallNetwork, 64, "more than 5"), (digits.DigitsCNN, 16, "more than 1")):
        compare(
            f"{count} networks at once, {build.__name__}",
            lambda build=build, count=count: train(build, count, count),
            lambda build=build, count=count: train(build, count, 1),
            against="one after the other",
            rounds=3,
            wanted=wanted,
        )
