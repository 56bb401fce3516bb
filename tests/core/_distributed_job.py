"""Training runs whose weights must not depend on the number of processes.

    torchrun --nproc-per-node 2 _distributed_job.py FOLDER

Every process writes what `run_all` gives to FOLDER/results-RANK.safetensors. It is started by torchrun because
`accelerate launch --cpu` starts one process only, whatever its --num_processes, unless there is MPI.
"""

import contextlib
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from retouch.core import seeds
from retouch.core.batches import InTurn, Together
from retouch.core.checkpoints import save_state
from retouch.core.errors import Diverged
from retouch.core.loop import Callback, Checkpoint, fit
from retouch.core.objectives import cross_entropy, objective

DRAW = torch.Generator().manual_seed(0)
N = 21  # batches of 4 leave a last one of 1 sample; neither is a multiple of 2
X, Y = torch.randn(N, 5, generator=DRAW), torch.randint(3, (N,), generator=DRAW)


@objective
def size(model, batch, run):
    """Mean square of the logits."""
    return model(batch[0]).square().mean()


def both_parts(model, batch, run):
    """Cross entropy of each part."""
    return {name: F.cross_entropy(model(part[0]), part[1]) for name, part in batch.items()}


def one_part(model, batch, run):
    """Cross entropy of the part that is there."""
    ((inputs, targets),) = batch.values()
    return F.cross_entropy(model(inputs), targets)


class Stream(IterableDataset):
    """The samples one after the other."""

    def __iter__(self):
        return iter(zip(X, Y, strict=True))


class Interrupt(Callback):
    """Raises after one step."""

    def __init__(self, step):
        self.step = step

    def on_step(self, run):
        if run.step == self.step:
            raise KeyboardInterrupt


def sgd(parameters):
    """With momentum, so that every step's gradient leaves a trace."""
    return SGD(parameters, lr=0.3, momentum=0.9)


RUNS = {
    "a last batch of one sample": {"data": (X, Y), "batch_size": 4},
    "odd batches": {"data": (X, Y), "batch_size": 5},
    "one sample a batch": {"data": (X, Y), "batch_size": 1},
    "all samples in a batch": {"data": (X, Y), "batch_size": 64},
    "adam": {"data": (X, Y), "batch_size": 4, "optimizer": lambda parameters: Adam(parameters, lr=0.01)},
    "clipped": {"data": (X, Y), "batch_size": 4, "clip": 0.1},
    "two terms": {"data": (X, Y), "batch_size": 4, "objective": cross_entropy + 0.5 * size},
    "loader": {"data": DataLoader(TensorDataset(X, Y), 4, shuffle=True)},
    "list of batches": {"data": list(zip(X.split((7, 3, 10, 1)), Y.split((7, 3, 10, 1)), strict=True))},
    "stream": {"data": Stream(), "steps": 12, "epochs": None, "batch_size": 4},
    "accumulated": {"data": (X, Y), "batch_size": 4, "accumulate": 2},
    "in turn": {"data": InTurn({"a": (X[:9], Y[:9]), "b": (X[9:], Y[9:])}, 5), "objective": one_part},
    "together": {"data": Together({"a": (X[:8], Y[:8]), "b": (X[8:20], Y[8:20])}, 4), "objective": both_parts},
    "together uneven": {"data": Together({"a": (X[:9], Y[:9]), "b": (X[9:], Y[9:])}, 5), "objective": both_parts},
}


def run(data, *, objective=cross_entropy, optimizer=sgd, epochs=2, accumulate=1, checkpoint=None, **settings):
    """One run's weights and history."""
    with seeds.isolated(0):
        model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    settings |= {"optimizer": optimizer, "accelerator": accelerator, "epochs": epochs, "seed": 1}
    if checkpoint is not None:
        settings["checkpoint"] = Checkpoint(checkpoint, 3)
        with contextlib.suppress(KeyboardInterrupt):
            fit(model, data, objective, callbacks=[Interrupt(4)], **settings)
        settings["callbacks"] = [Interrupt(None)]
        nn.init.zeros_(model[0].weight)  # the checkpoint has it
    history = fit(model, data, objective, **settings)
    return {"model": dict(model.state_dict()), "history": history.records}


def diverge():
    """What every process says of a loss that is not finite on one of them."""
    batches = [(X[:4], Y[:4]), (torch.cat([X[:3], torch.full((1, 5), torch.inf)]), Y[:4])]
    try:
        run(batches)
    except Diverged as error:
        return str(error)
    return "nothing"


def run_all(folder):
    """All runs, and an interrupted one."""
    results = {name: run(**settings) for name, settings in RUNS.items()}
    results["interrupted"] = run((X, Y), batch_size=4, checkpoint=folder / "checkpoint")
    results["diverged"] = diverge()
    results["processes"] = Accelerator(cpu=True).num_processes
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    found = run_all(target)
    save_state(target / f"results-{Accelerator(cpu=True).process_index}.safetensors", found)
