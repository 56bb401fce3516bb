"""A run that is killed anywhere and started again ends with the weights of one that was not, bit for bit."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import _resume_job as job
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from retouch.core import seeds
from retouch.core.batches import InTurn, Together
from retouch.core.checkpoints import load_state, save_state
from retouch.core.errors import InputError
from retouch.core.loop import Callback, Checkpoint, fit
from retouch.core.masks import TrainOnly
from retouch.core.objectives import cross_entropy
from retouch.core.optimizers import MuonAdamW

DRAW = torch.Generator().manual_seed(0)
X, Y = torch.randn(22, 4, generator=DRAW), torch.randint(3, (22,), generator=DRAW)
SAVED = {  # the step of the checkpoint that is there after each start
    "before the first checkpoint": [None, 18],
    "between two checkpoints": [4, 18],
    "at the step of a checkpoint before it is written": [4, 18],
    "after the metrics before the checkpoint": [4, 18],
    "right after a checkpoint": [8, 18],
    "at the end of an epoch before its checkpoint": [6, 18],
    "at the start of an epoch right after a checkpoint": [6, 18],
    "in an epoch after its start was saved": [6, 18],
    "at the start of an epoch whose last step was saved": [12, 18],
    "while the checkpoint is being written": [4, 18],
    "after the last step": [18, 18],
    "at the last step": [15, 18],
    "twice": [4, 12, 18],
    "twice at one place": [6, 6, 18],
    "twice before the first checkpoint": [None, None, 18],
}


def same(first, second):
    """Bit for bit, in any nesting."""
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


# --- killed ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Every scenario of the job, from one start of Python, and the run that nothing happened to."""
    folder = tmp_path_factory.mktemp("killed")
    subprocess.run([sys.executable, job.__file__, str(folder)], check=True, timeout=120)
    report = json.loads((folder / "report.json").read_text())
    (folder / "whole").mkdir()
    return folder, report, job.train(log=folder / "whole.jsonl")


@pytest.mark.parametrize("name", job.SCENARIOS)
def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(killed, name):
    folder, report, whole = killed
    places = job.SCENARIOS[name][1]
    assert report[name]["ended"] == [-signal.SIGKILL] * len(places) + [0]
    assert report[name]["saved"] == SAVED[name], "the run was killed where it should be"
    resumed = load_state(folder / name / "result.safetensors")
    assert same(resumed["model"], dict(whole["model"]))
    assert same(resumed["callback"], whole["callback"])
    assert resumed["history"] == whole["history"]
    lines = (folder / name / "metrics.jsonl").read_text()
    assert [json.loads(line) for line in lines.splitlines()] == whole["history"]
    assert lines == (folder / "whole.jsonl").read_text()


# --- interrupted, in one process ------------------------------------------------------------------------------------


class Interrupt(Callback):
    """Raises at one step."""

    def __init__(self, step):
        self.step = step

    def on_step(self, run):
        if run.step == self.step:
            raise KeyboardInterrupt


class Net(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        with seeds.isolated(seed):
            self.first, self.drop, self.last = nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.drop(self.first(x)))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(X, Y, strict=True))


class Groups:
    """A user's own batch sampler, which draws from the global generator."""

    def __len__(self):
        return 6

    def __iter__(self):
        return iter(torch.randint(22, (6, 4)).tolist())


def both_parts(model, batch, run):
    parts = batch.values()
    return sum(nn.functional.cross_entropy(model(inputs), targets) for inputs, targets in parts)


def halves():
    return {"forget": (X[:9], Y[:9]), "retain": (X[9:], Y[9:])}


DATA = {
    "tensors": lambda: (X, Y),
    "list": lambda: list(zip(X.split(4), Y.split(4), strict=True)),
    "shuffled loader": lambda: DataLoader(TensorDataset(X, Y), 4, shuffle=True),
    "batch sampler": lambda: DataLoader(TensorDataset(X, Y), batch_sampler=Groups()),
    "together": lambda: Together(halves(), 3),
    "in turn": lambda: InTurn(halves(), 4),
    "stream": Stream,
    "loader with workers": lambda: DataLoader(TensorDataset(X, Y), 4, shuffle=True, num_workers=1),
}


def interrupted(folder, at, make=Net, *, callbacks=list, every=2, data=lambda: (X, Y), again=None, **settings):
    """(model trained at once, model interrupted after step `at` and resumed), both for 14 steps."""
    settings = {"steps": 14, "batch_size": 4, "optimizer": lambda p: Adam(p, lr=0.01), **settings}
    whole, first, second = make(), make(), (again or make)()
    fit(whole, data(), callbacks=[*callbacks(), Interrupt(None)], **settings)
    settings["checkpoint"] = Checkpoint(folder, every)
    with pytest.raises(KeyboardInterrupt):
        fit(first, data(), callbacks=[*callbacks(), Interrupt(at)], **settings)
    fit(second, data(), callbacks=[*callbacks(), Interrupt(None)], **settings)
    return whole, second


@pytest.mark.parametrize("at", [1, 5, 8, 13])
@pytest.mark.parametrize("kind", DATA)
def test_every_kind_of_data_resumes_exactly(tmp_path, kind, at):
    objective = both_parts if kind in ("together", "in turn") else cross_entropy
    whole, resumed = interrupted(tmp_path, at, data=DATA[kind], objective=objective)
    assert same(whole.state_dict(), resumed.state_dict())


def test_an_optimizer_of_two_parts_resumes_exactly(tmp_path):
    class Wide(Net):
        def __init__(self):
            super().__init__()
            with seeds.isolated(0):
                self.first, self.last = nn.Linear(4, 32), nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))

    assert MuonAdamW(Wide().parameters()).matrices
    whole, resumed = interrupted(tmp_path, 5, Wide, optimizer=MuonAdamW)
    assert same(whole.state_dict(), resumed.state_dict())


@pytest.mark.parametrize("at", [2, 5])
def test_accumulated_steps_resume_exactly(tmp_path, at):
    accelerator = Accelerator(gradient_accumulation_steps=3)
    whole, resumed = interrupted(tmp_path, at, accelerator=accelerator, clip=0.5)
    assert same(whole.state_dict(), resumed.state_dict())


def test_a_resumed_run_takes_the_checkpoints_weights_and_not_its_own(tmp_path):
    whole, resumed = interrupted(tmp_path, 5, again=lambda: Net(seed=1))
    assert same(whole.state_dict(), resumed.state_dict())


@pytest.mark.parametrize("seed", [0, 1], ids=["same start", "other start"])
def test_masked_training_resumes_exactly(tmp_path, seed):
    def mask():
        draw = torch.Generator().manual_seed(0)
        return [TrainOnly({n: torch.rand(p.shape, generator=draw) > 0.5 for n, p in Net().named_parameters()})]

    whole, resumed = interrupted(tmp_path, 5, callbacks=mask, again=lambda: Net(seed))
    assert same(whole.state_dict(), resumed.state_dict())


class Noise(Callback):
    """Draws at the given events, from the global generator or from the run's."""

    def __init__(self, events, source):
        self.source = source
        for event in events:
            setattr(self, f"on_{event}", self.on_batch if event == "batch" else self.on_step)
        if "step" not in events:
            self.on_step = lambda run: None
        if "batch" not in events:
            self.on_batch = lambda run, batch: batch

    def draw(self, run, shape):
        return 0.1 * torch.randn(shape, generator=run.generator if self.source == "run" else None)

    def on_batch(self, run, batch):
        return batch[0] + self.draw(run, batch[0].shape), batch[1]

    def on_step(self, run):
        with torch.no_grad():
            run.module.first.weight.add_(self.draw(run, (8, 4)))


@pytest.mark.parametrize("source", ["run", "global"])
@pytest.mark.parametrize(
    "events", [["batch"], ["step"], ["gradients"], ["epoch"], ["step", "batch"], ["epoch", "batch"]]
)
@pytest.mark.parametrize(("at", "every"), [(5, 2), (8, None)])
def test_callbacks_that_draw_at_any_event_resume_exactly(tmp_path, events, source, at, every):
    whole, resumed = interrupted(tmp_path, at, callbacks=lambda: [Noise(events, source)], every=every)
    assert same(whole.state_dict(), resumed.state_dict())


def test_a_run_can_be_made_longer(tmp_path):
    whole, model = Net(), Net()
    fit(whole, (X, Y), steps=15, batch_size=4)
    for steps in (6, 11, 15):
        history = fit(model, (X, Y), steps=steps, batch_size=4, checkpoint=tmp_path)
        assert history["step"] == list(range(1, steps + 1))
    assert same(whole.state_dict(), model.state_dict())


class Log(Callback):
    """Writes down what happens, and has a state."""

    def __init__(self):
        self.seen = []

    def on_start(self, run):
        self.seen.append(("start", run.step, run.module.last.bias[0].item()))

    def on_epoch(self, run):
        self.seen.append(("epoch", run.step))

    def on_batch(self, run, batch):
        self.seen.append(("batch", run.step))
        return batch

    def state_dict(self):
        return {"one": 1}

    def load_state_dict(self, state):
        self.seen.append(("state", state))


def test_resuming_comes_after_on_start_and_on_epoch_not_again_inside_of_an_epoch(tmp_path):
    settings = {"steps": 8, "batch_size": 4, "checkpoint": Checkpoint(tmp_path, 2)}
    first = Log()
    with pytest.raises(KeyboardInterrupt):
        fit(Net(), (X, Y), callbacks=[first, Interrupt(4)], **settings)
    assert first.seen[1:3] == [("epoch", 0), ("batch", 0)]
    second, fresh = Log(), Net()
    start = fresh.last.bias[0].item()
    fit(fresh, (X, Y), callbacks=[second, Interrupt(None)], **settings)
    began = [("start", 0, start), ("state", {"one": 1})]
    assert second.seen == [*began, *[("batch", k) for k in (2, 3, 4, 5)], ("epoch", 6), ("batch", 6), ("batch", 7)]


# --- finished -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stopped", [False, True])
def test_a_finished_run_started_again_trains_nothing_and_gives_the_same_history(tmp_path, stopped):
    class Stop(Callback):
        def on_step(self, run):
            if stopped and run.step == 7:
                run.stop()

    class Never(Callback):
        def on_epoch(self, run):
            raise AssertionError("an epoch was begun")

        def on_batch(self, run, batch):
            raise AssertionError("a batch was read")

    Never.__name__ = "Stop"
    model, again = Net(), Net(seed=1)
    settings = {"epochs": 2, "batch_size": 4, "checkpoint": Checkpoint(tmp_path, 5)}
    history = fit(model, (X, Y), callbacks=[Stop()], **settings)
    lines = (tmp_path / "metrics.jsonl").read_text()
    repeated = fit(again, (X, Y), callbacks=[Never()], **settings)
    assert len(history) == (7 if stopped else 12)
    assert repeated.records == history.records
    assert same(model.state_dict(), again.state_dict())
    assert (tmp_path / "metrics.jsonl").read_text() == lines


def test_the_end_of_a_run_is_saved_whatever_the_interval(tmp_path):
    model = Net()
    fit(model, (X, Y), steps=7, batch_size=4, checkpoint=Checkpoint(tmp_path, every=100))
    state = load_state(tmp_path / "state.safetensors")
    assert state["position"] == {"step": 7, "epoch": 1, "index": 1, "stopped": False}
    assert same(dict(model.state_dict()), state["model"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "state.safetensors"]


def test_a_last_line_that_was_cut_off_is_written_anew(tmp_path):
    settings = {"steps": 8, "batch_size": 4, "checkpoint": Checkpoint(tmp_path, 2)}
    with pytest.raises(KeyboardInterrupt):
        fit(Net(), (X, Y), callbacks=[Interrupt(6)], **settings)
    metrics = tmp_path / "metrics.jsonl"
    with metrics.open("a") as lines:
        lines.write('{"step": 6, "epo')
    history = fit(Net(), (X, Y), callbacks=[Interrupt(None)], **settings)
    assert history["step"] == list(range(1, 9))
    assert [json.loads(line) for line in metrics.read_text().splitlines()] == history.records


def test_a_log_of_its_own_is_resumed_as_well(tmp_path):
    settings = {"steps": 8, "batch_size": 4, "checkpoint": Checkpoint(tmp_path / "run", 2), "log": tmp_path / "log"}
    with pytest.raises(KeyboardInterrupt):
        fit(Net(), (X, Y), callbacks=[Interrupt(6)], **settings)
    history = fit(Net(), (X, Y), callbacks=[Interrupt(None)], **settings)
    assert history["step"] == list(range(1, 9))
    assert [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()] == history.records
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# --- refused --------------------------------------------------------------------------------------------------------


def truncate(path):
    path.write_bytes(path.read_bytes()[:-200])


def foreign(path):
    save_file({"weight": torch.zeros(3)}, path)


DAMAGED = {
    "truncated": truncate,
    "cut inside of its header": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "empty": lambda path: path.write_bytes(b""),
    "random bytes": lambda path: path.write_bytes(torch.randint(256, (3000,), dtype=torch.uint8).numpy().tobytes()),
    "safetensors from elsewhere": foreign,
    "another state of ours": lambda path: save_state(path, {"weights": torch.zeros(2)}),
    "a state that is no mapping": lambda path: save_state(path, [1, 2]),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


def refused(folder, **changes):
    """What a run says that is refused; it left the model, the callbacks and the checkpoint as they were."""
    model = changes.pop("model", None) or Net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = {"steps": 8, "batch_size": 4, "optimizer": lambda p: SGD(p, lr=0.1), "checkpoint": folder, **changes}
    with pytest.raises(InputError) as caught:
        fit(model, settings.pop("data", (X, Y)), **settings)
    assert same(before, dict(model.state_dict()))
    message = str(caught.value)
    assert "\n" not in message
    assert str(Path(folder) / "state.safetensors") in message
    return message


@pytest.fixture
def saved(tmp_path):
    fit(Net(), (X, Y), steps=4, batch_size=4, optimizer=lambda p: SGD(p, lr=0.1), checkpoint=tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_or_foreign_checkpoint_is_refused_in_one_sentence(saved, kind):
    path = saved / "state.safetensors"
    DAMAGED[kind](path)
    content = path.read_bytes() if path.is_file() else None
    refused(saved)
    assert (path.read_bytes() if path.is_file() else None) == content


OTHER = {
    "seed": ({"seed": 5}, "its seed is 0, this run's is 5"),
    "shape of the model": ({"model": nn.Linear(4, 3)}, "its model is "),
    "type of the weights": ({"model": Net().double(), "data": (X.double(), Y)}, "its model is "),
    "optimizer": ({"optimizer": lambda p: Adam(p)}, "its optimizer is 'SGD', this run's is 'Adam'"),
    "scheduler": ({"scheduler": lambda o, s: LambdaLR(o, lambda k: 1.0)}, "this run's is 'LambdaLR'"),
    "callbacks": ({"callbacks": [Interrupt(None)]}, r"its callbacks is [], this run's is ['Interrupt']"),
    "number of batches": ({"batch_size": 2}, "its batches an epoch is 6, this run's is 11"),
    "data": ({"data": (X[:4], Y[:4])}, "its batches an epoch is 6, this run's is 1"),
}


@pytest.mark.parametrize("kind", OTHER)
def test_the_checkpoint_of_another_run_is_refused_in_one_sentence(saved, kind):
    changes, part = OTHER[kind]
    content = (saved / "state.safetensors").read_bytes()
    message = refused(saved, **changes)
    assert part in message
    assert "is the checkpoint of another run" in message
    assert "give another folder or delete it" in message
    assert (saved / "state.safetensors").read_bytes() == content


def test_the_checkpoint_of_other_accumulation_is_refused(saved):
    accelerator = Accelerator(gradient_accumulation_steps=2)
    assert "its batches a step is 1, this run's is 2" in refused(saved, accelerator=accelerator)
