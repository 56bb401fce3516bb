"""Overhead of `fit` against a bare loop written by hand: same network, data, batches, optimizer, both on the CPU."""

import torch
import torch.nn.functional as F
from ratios import compare

from retouch.core.loop import fit
from retouch.worlds import digits

EPOCHS, BATCH = 10, 64


def by_fit():
    fit(digits.DigitsCNN(), digits.data("train"), epochs=EPOCHS, batch_size=BATCH, progress=False)


def by_hand():
    model, data = digits.DigitsCNN().train(), digits.data("train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(data)).split(BATCH):
            loss = F.cross_entropy(model(data.inputs[rows]), data.targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if not loss.isfinite():
                raise RuntimeError("the loss is not finite")


if __name__ == "__main__":
    compare("fit", by_fit, by_hand, against="a loop by hand", rounds=15, wanted="at least 0.95 (5% overhead)")
