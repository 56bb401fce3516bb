"""Training runs that are killed: each run is a process of its own, forked once torch is imported, and ends by SIGKILL.

python _resume_job.py FOLDER    runs every scenario in FOLDER/<its name> and writes FOLDER/report.json
"""

import json
import math
import os
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim import Adam
from torch.optim.lr_scheduler import OneCycleLR

from retouch.core import checkpoints, seeds
from retouch.core.checkpoints import load_state, save_state
from retouch.core.loop import Callback, Checkpoint, fit

EPOCHS, BATCH, SAMPLES = 3, 4, 22  # 6 steps an epoch, 18 in all

# name: (steps between checkpoints, places where the runs are killed one after the other)
# a place is (event, step): the event of the callback, and the steps that are finished at that time
SCENARIOS = {
    "before the first checkpoint": (4, [("gradients", 2)]),
    "between two checkpoints": (4, [("gradients", 6)]),
    "at the step of a checkpoint before it is written": (4, [("step", 8)]),
    "after the metrics before the checkpoint": (4, [("state_dict", 8)]),
    "right after a checkpoint": (4, [("batch", 8)]),
    "at the end of an epoch before its checkpoint": (None, [("step", 12)]),
    "at the start of an epoch right after a checkpoint": (None, [("epoch", 6)]),
    "in an epoch after its start was saved": (None, [("batch", 9)]),
    "at the start of an epoch whose last step was saved": (6, [("epoch", 12)]),
    "while the checkpoint is being written": (4, [("writing", 8)]),
    "after the last step": (4, [("end", 18)]),
    "at the last step": (5, [("step", 18)]),
    "twice": (4, [("step", 7), ("batch", 13)]),
    "twice at one place": (3, [("gradients", 7), ("gradients", 7)]),
    "twice before the first checkpoint": (None, [("batch", 3), ("gradients", 5)]),
}


class Drifting(Callback):
    """Needs its state: gradients are scaled by what it has counted, and it keeps a mean of the weights."""

    def __init__(self):
        self.count, self.means = 0, []

    def on_batch(self, run, batch):
        noise = torch.randn(batch[0].shape, generator=run.generator)
        return batch[0] + 0.1 * noise, batch[1]

    def on_gradients(self, run):
        self.count += 1
        for parameter in run.module.parameters():
            parameter.grad.mul_(1 + 0.5 * math.cos(self.count))

    def on_step(self, run):
        values = [p.detach().clone() for p in run.module.parameters()]
        self.means = [0.9 * m + 0.1 * v for m, v in zip(self.means, values, strict=True)] if self.means else values
        run.log(count=self.count)

    def state_dict(self):
        return {"count": self.count, "means": self.means}

    def load_state_dict(self, state):
        self.count, self.means = state["count"], state["means"]


class Killer(Callback):
    """Ends the process at one event, as a power cut would."""

    def __init__(self, place):
        self.event, self.step = place or (None, None)
        self.run = None

    def reach(self, event, run):
        self.run = run
        if (event, run.step) == (self.event, self.step):
            os.kill(os.getpid(), signal.SIGKILL)

    def on_start(self, run):
        self.run = run
        if self.event == "writing":
            checkpoints.save_file = self.write_half

    def write_half(self, tensors, path, metadata):
        save_file(tensors, path, metadata=metadata)
        if self.run.step == self.step:
            with Path(path).open("r+b") as file:
                file.truncate(Path(path).stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def on_epoch(self, run):
        self.reach("epoch", run)

    def on_batch(self, run, batch):
        self.reach("batch", run)
        return batch

    def on_gradients(self, run):
        self.reach("gradients", run)

    def on_step(self, run):
        self.reach("step", run)

    def on_end(self, run):
        self.reach("end", run)

    def state_dict(self):
        self.reach("state_dict", self.run)
        return {}


def train(checkpoint=None, place=None, log=None):
    """The run: dropout, batch statistics, Adam, a scheduler, and a callback with a state."""
    draw = torch.Generator().manual_seed(0)
    data = torch.randn(SAMPLES, 4, generator=draw), torch.randint(3, (SAMPLES,), generator=draw)
    with seeds.isolated(0):
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    drifting = Drifting()
    history = fit(
        model,
        data,
        epochs=EPOCHS,
        batch_size=BATCH,
        optimizer=lambda parameters: Adam(parameters, lr=0.01),
        scheduler=lambda optimizer, steps: OneCycleLR(optimizer, 0.05, total_steps=steps),
        callbacks=[drifting, Killer(place)],
        checkpoint=checkpoint,
        log=log,
        seed=3,
    )
    return {"model": model.state_dict(), "callback": drifting.state_dict(), "history": history.records}


def start(folder, every, place):
    """Train in a new process; its exit status, negative for a signal."""
    process = os.fork()
    if process == 0:
        try:
            result = train(Checkpoint(folder, every), place)
            save_state(folder / "result.safetensors", result)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def main(folder):
    """All scenarios, and what each start found and how it ended."""
    torch.set_num_threads(1)
    train()  # what torch and accelerate load on first use is loaded before the processes are forked
    report = {}
    for name, (every, places) in SCENARIOS.items():
        saved, own = [], folder / name
        ended = []
        for place in [*places, None]:
            ended.append(start(own, every, place))
            state = Checkpoint(own).state
            saved.append(load_state(state)["position"]["step"] if state.exists() else None)
        report[name] = {"ended": ended, "saved": saved}
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
