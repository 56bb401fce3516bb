"""Pairs shared over processes, whose loss, gradients and trained weights must be those of one process.

    torchrun --nproc-per-node 2 _cloob_job.py FOLDER

Every process writes what it found to FOLDER/results-RANK.safetensors.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from retouch.core import seeds
from retouch.core.checkpoints import save_state
from retouch.core.data import TensorData
from retouch.core.loop import fit
from retouch.train.cloob import CLOOB, CLOOBLoss

DRAW = torch.Generator().manual_seed(0)
N = 11  # batches of 5 are shared as 2 and 3, and leave one of 1
IMAGES, TEXTS = (torch.randn(N, 6, generator=DRAW) for _ in range(2))
BLOCKS = {0: slice(0, 4), 1: slice(4, N)}


class Towers(nn.Module):
    """A linear layer a modality."""

    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, images, texts):
        return self.image(images), self.text(texts)


def unit():
    """Embeddings of all pairs, float64."""
    return F.normalize(IMAGES.double(), dim=1), F.normalize(TEXTS.double(), dim=1)


def loss_and_gradients(rows):
    """CLOOB over all processes' rows, and the gradient of this process's."""
    images, texts = (embeds[rows].clone().requires_grad_() for embeds in unit())
    loss = CLOOBLoss(gather=True)(images, texts)
    loss.backward()
    return {"loss": loss.detach(), "images": images.grad, "texts": texts.grad}


def train():
    """Weights and losses after some steps."""
    with seeds.isolated(0):
        model = Towers()
    data = TensorData({"images": IMAGES[:10], "texts": TEXTS[:10]})
    settings = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9), "accelerator": Accelerator(cpu=True)}
    history = fit(model, data, CLOOB(), epochs=3, batch_size=5, seed=1, **settings)
    return {"weights": dict(model.state_dict()), "history": history["loss"]}


def run_all(rows):
    """Everything that this process finds."""
    return {"training": train(), **loss_and_gradients(rows)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    rank = Accelerator(cpu=True).process_index
    save_state(Path(sys.argv[1]) / f"results-{rank}.safetensors", run_all(BLOCKS[rank]))
