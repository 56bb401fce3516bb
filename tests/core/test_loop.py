"""The training loop: its events in order, its arithmetic against plain torch, and what it leaves behind."""

import copy
import json
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from retouch.core import seeds
from retouch.core.batches import InTurn, Together
from retouch.core.data import TensorData
from retouch.core.errors import Diverged, InputError
from retouch.core.loop import Callback, Checkpoint, History, fit
from retouch.core.models import forward
from retouch.core.objectives import cross_entropy, objective
from retouch.core.progress import bar, track

DRAW = torch.Generator().manual_seed(0)
X, Y = torch.randn(22, 4, generator=DRAW), torch.randint(3, (22,), generator=DRAW)


def net(seed=0, dropout=0.0):
    with seeds.isolated(seed):
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3))


def sgd(rate=0.1, **options):
    return lambda parameters: SGD(parameters, lr=rate, **options)


def weights(model):
    return torch.cat([value.flatten().float() for value in model.state_dict().values()]).clone()


def batches(*sizes):
    return list(zip(X[: sum(sizes)].split(sizes), Y[: sum(sizes)].split(sizes), strict=True))


@objective
def size(model, batch, run):
    return model(batch[0]).square().mean()


class On(Callback):
    """A callback of the given functions: On(step=lambda run: ...)."""

    def __init__(self, **events):
        for name, function in events.items():
            setattr(self, f"on_{name}", function)


def plain_training(model, data, optimizer, *, clip=None, loss=F.cross_entropy):
    """The same in plain torch: a step for each batch of the list."""
    model.train()
    losses = []
    for inputs, targets in data:
        optimizer.zero_grad()
        value = loss(model(inputs), targets)
        value.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(value.item())
    return losses


# --- the order of events --------------------------------------------------------------------------------------------


def test_all_events_come_in_the_order_that_the_docstring_says(monkeypatch):
    seen, model = [], net()

    class Recorder(Callback):
        def __init__(self, name):
            self.name = name

        def on_start(self, run):
            assert model.training
            seen.append(f"start {self.name}")

        def on_epoch(self, run):
            seen.append(f"epoch {self.name}")

        def on_batch(self, run, batch):
            seen.append(f"batch {self.name}")
            return batch

        def on_gradients(self, run):
            seen.append(f"gradients {self.name}")

        def on_step(self, run):
            assert all(p.grad is None for p in model.parameters())
            seen.append(f"step {self.name}")

        def on_end(self, run):
            seen.append(f"end {self.name}")

    class Optimizer(SGD):
        def step(self, closure=None):
            seen.append("optimizer")
            return super().step(closure)

        def zero_grad(self, set_to_none=True):
            seen.append("dropped")
            super().zero_grad(set_to_none)

    class Scheduler(LambdaLR):
        def step(self, epoch=None):
            seen.append("scheduler")
            super().step(epoch)

    def loss(model, batch, run):
        seen.append("objective")
        return cross_entropy(model, batch)["cross_entropy"]

    clip = Accelerator.clip_grad_norm_
    monkeypatch.setattr(Accelerator, "clip_grad_norm_", lambda *a, **k: (seen.append("clip"), clip(*a, **k))[1])
    model[3].bias.register_hook(lambda gradient: seen.append("backward"))
    optimizer = Optimizer(model.parameters(), lr=0.1)
    scheduler = Scheduler(optimizer, lambda step: 1.0)
    seen.clear()  # a scheduler steps once when it is made
    fit(
        model,
        batches(4, 4, 4),
        loss,
        epochs=2,
        optimizer=optimizer,
        scheduler=scheduler,
        clip=1.0,
        callbacks=[Recorder("a"), Recorder("b")],
        accelerator=Accelerator(gradient_accumulation_steps=2),
    )
    one = ["batch a", "batch b", "objective", "backward"]
    update = ["clip", "gradients a", "gradients b", "optimizer", "scheduler", "dropped", "step a", "step b"]
    epoch = ["epoch a", "epoch b", *one, *one, *update, *one, *update]
    assert seen == ["start a", "start b", *epoch, *epoch, "end a", "end b"]


def test_run_says_where_training_stands_at_every_event():
    seen = []

    def note(name):
        return lambda run, *rest: (seen.append((name, run.step, run.epoch, run.index)), *rest)[-1]

    events = ("start", "epoch", "batch", "gradients", "step", "end")
    fit(net(), batches(4, 4), epochs=2, callbacks=[On(**{name: note(name) for name in events})])
    step = [("batch", 0, 0, 0), ("gradients", 0, 0, 0), ("step", 1, 0, 1)]
    step += [("batch", 1, 0, 1), ("gradients", 1, 0, 1), ("step", 2, 0, 2)]
    second = [("batch", 2, 1, 0), ("gradients", 2, 1, 0), ("step", 3, 1, 1)]
    second += [("batch", 3, 1, 1), ("gradients", 3, 1, 1), ("step", 4, 1, 2)]
    assert seen == [("start", 0, 0, 0), ("epoch", 0, 0, 0), *step, ("epoch", 2, 1, 0), *second, seen[-1]]
    assert seen[-1][:2] == ("end", 4)


def test_run_has_the_users_model_and_optimizer():
    model = net()
    optimizer, runs = SGD(model.parameters(), lr=0.1), []
    fit(model, (X, Y), steps=3, seed=7, optimizer=optimizer, callbacks=[On(start=runs.append)])
    (run,) = runs
    assert run.module is model
    assert run.optimizer is optimizer
    assert (run.seed, run.steps, run.step) == (7, 3, 3)
    assert run.accelerator.num_processes == 1


def test_metrics_and_checkpoint_are_written_after_on_step(tmp_path):
    written = []

    def look(run, *batch):
        lines = tmp_path / "metrics.jsonl"
        written.append((run.step, len(lines.read_text().splitlines()), (tmp_path / "state.safetensors").exists()))
        return batch[0] if batch else None

    look_on = On(batch=look, step=look)
    fit(net(), batches(4, 4, 4), epochs=1, checkpoint=Checkpoint(tmp_path, every=2), callbacks=[look_on])
    assert written == [(0, 0, False), (1, 0, False), (1, 1, False), (2, 1, False), (2, 2, True), (3, 2, True)]


def test_on_batch_gives_the_batch_to_train_on():
    model, other = net(), net()
    fit(model, batches(6, 6), epochs=1, optimizer=sgd(), callbacks=[On(batch=lambda run, b: (b[0] + 1, b[1]))])
    fit(other, [(x + 1, y) for x, y in batches(6, 6)], epochs=1, optimizer=sgd())
    assert torch.equal(weights(model), weights(other))


def test_on_gradients_may_change_gradients_and_on_step_weights():
    model, start = net(), weights(net())

    def drop(run):
        for parameter in run.module.parameters():
            parameter.grad.zero_()

    fit(model, (X, Y), steps=2, optimizer=sgd(), callbacks=[On(gradients=drop)])
    assert torch.equal(weights(model), start)

    def clear(run):
        with torch.no_grad():
            run.module[3].bias.fill_(5.0)

    fit(model, (X, Y), steps=2, optimizer=sgd(), callbacks=[On(step=clear)])
    assert torch.equal(model[3].bias, torch.full((3,), 5.0))


# --- arithmetic -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("kind", [lambda p: SGD(p, lr=0.2, momentum=0.9), lambda p: Adam(p, lr=0.01)])
def test_training_is_that_of_a_plain_loop(clip, kind):
    model, plain, data = net(), net(), batches(5, 5, 3, 5)
    history = fit(model, data, epochs=3, optimizer=kind, clip=clip)
    losses = plain_training(plain, data * 3, kind(plain.parameters()), clip=clip)
    torch.testing.assert_close(weights(model), weights(plain))
    assert history["loss"] == pytest.approx(losses)


def test_clip_bounds_the_norm_of_all_gradients_together():
    def norm(model):
        return torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()

    norms = []
    for clip in (None, 0.03, 1e3):
        fit(net(), (X, Y), steps=1, clip=clip, callbacks=[On(gradients=lambda run: norms.append(norm(run.module)))])
    assert norms[1] == pytest.approx(0.03, rel=1e-4)
    assert norms[0] == norms[2] > 0.03


@pytest.mark.parametrize("sizes", [(6, 6, 5, 5), (7, 3, 1, 8), (6, 2, 9)], ids=["even", "uneven", "odd number"])
def test_accumulating_over_two_batches_is_one_batch_of_both(sizes):
    model, whole = net(), net()
    joined = [sum(sizes[k : k + 2]) for k in range(0, len(sizes), 2)]
    accelerator = Accelerator(gradient_accumulation_steps=2)
    objectives = cross_entropy + 0.5 * size
    accumulated = fit(model, batches(*sizes), objectives, epochs=2, optimizer=sgd(), accelerator=accelerator, clip=0.2)
    history = fit(whole, batches(*joined), objectives, epochs=2, optimizer=sgd(), clip=0.2)
    torch.testing.assert_close(weights(model), weights(whole), rtol=1e-5, atol=1e-7)
    for name in ("step", "epoch", "loss", "cross_entropy", "size"):
        assert accumulated[name] == pytest.approx(history[name], rel=1e-5)


def test_another_run_leaves_the_settings_of_the_users_accelerator_alone():
    accelerator = Accelerator(gradient_accumulation_steps=2)
    fit(net(), batches(4), steps=1)
    assert len(fit(net(), batches(4, 4, 4, 4), epochs=1, accelerator=accelerator)) == 2


def test_the_scheduler_steps_after_every_step_and_is_told_how_many_there_are():
    rates, told = [], []

    def halving(optimizer, steps):
        told.append(steps)
        return LambdaLR(optimizer, lambda step: 0.5**step)

    note = On(gradients=lambda run: rates.append(run.optimizer.param_groups[0]["lr"]))
    fit(net(), batches(4, 4, 4), epochs=2, optimizer=sgd(1.0), scheduler=halving, callbacks=[note])
    accelerator = Accelerator(gradient_accumulation_steps=2)
    fit(net(), batches(4, 4, 4), epochs=2, optimizer=sgd(1.0), scheduler=halving, accelerator=accelerator)
    fit(net(), batches(4, 4, 4), steps=5, optimizer=sgd(1.0), scheduler=halving)
    assert rates == [1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125]
    assert told == [6, 4, 5]


def test_a_scheduler_of_the_users_own_optimizer_is_stepped():
    model = net()
    optimizer = SGD(model.parameters(), lr=1.0)
    scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    fit(model, (X, Y), steps=3, optimizer=optimizer, scheduler=scheduler)
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_without_an_optimizer_it_is_adamw():
    model, other = net(), net()
    fit(model, batches(6, 6), epochs=1)
    fit(other, batches(6, 6), epochs=1, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3))
    assert torch.equal(weights(model), weights(other))


def test_parameters_that_need_no_gradient_are_left_alone():
    model = net()
    model[0].requires_grad_(False)
    before, last = model[0].weight.clone(), model[3].weight.clone()
    fit(model, (X, Y), steps=3, optimizer=sgd(weight_decay=0.1))
    assert torch.equal(model[0].weight, before)
    assert not torch.equal(model[3].weight, last)


def test_gradients_left_by_the_user_do_not_count():
    model, other = net(), net()
    optimizer = SGD(model.parameters(), lr=0.1)
    fit(other, batches(6), steps=1, optimizer=sgd())
    model(X).sum().backward()
    optimizer.zero_grad()
    fit(model, batches(6), steps=1, optimizer=optimizer)
    assert torch.equal(weights(model), weights(other))
    assert all(p.grad is None for p in model.parameters())


# --- data -----------------------------------------------------------------------------------------------------------


class Groups:
    """A user's own batch sampler."""

    def __len__(self):
        return 3

    def __iter__(self):
        return iter([[4, 5], [0, 1, 2, 3], [21]])


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(X, Y, strict=True))


def mappings():
    return [{"input": x, "labels": y} for x, y in batches(8, 8, 6)]


DATA = {
    "tuple of tensors": lambda: (X, Y),
    "TensorData": lambda: TensorData(X, Y),
    "TensorDataset": lambda: TensorDataset(X, Y),
    "mapping of inputs": lambda: TensorData({"input": X}, Y),
    "shuffled DataLoader": lambda: DataLoader(TensorDataset(X, Y), 8, shuffle=True),
    "sequential DataLoader": lambda: DataLoader(TensorDataset(X, Y), 8),
    "list of tuples": lambda: batches(8, 8, 6),
    "list of mappings": mappings,
    "stream": Stream,
    "stream in a DataLoader": lambda: DataLoader(Stream(), 8),
}


@pytest.mark.parametrize("kind", DATA)
def test_every_kind_of_data_trains_on_every_sample_once_an_epoch(kind):
    read = []

    def loss(model, batch, run):
        inputs, targets = (batch["input"], batch["labels"]) if isinstance(batch, dict) else batch
        values = inputs["input"] if isinstance(inputs, dict) else inputs
        read.append((values, targets))
        return F.cross_entropy(forward(model, inputs), targets)

    history = fit(net(), DATA[kind](), loss, steps=6, batch_size=8)
    assert [len(targets) for _, targets in read] == [8, 8, 6] * 2
    assert history["epoch"] == [0, 0, 0, 1, 1, 1]
    for epoch in (read[:3], read[3:]):
        values, targets = torch.cat([v for v, _ in epoch]), torch.cat([t for _, t in epoch])
        rows = (values[:, None] == X).all(-1).int().argmax(1)
        assert sorted(rows.tolist()) == list(range(22))
        assert torch.equal(targets, Y[rows])


@pytest.mark.parametrize("kind", DATA)
def test_cross_entropy_trains_on_every_kind_of_data(kind):
    history = fit(net(), DATA[kind](), steps=60, batch_size=8, optimizer=sgd(0.5))
    assert sum(history["loss"][-3:]) < 0.8 * sum(history["loss"][:3])


def test_an_order_of_the_users_own_is_kept():
    read, loader = [], DataLoader(TensorDataset(X, Y), batch_sampler=Groups())
    note = On(batch=lambda run, batch: (read.append(batch[0]), batch)[1])
    fit(net(), loader, epochs=2, callbacks=[note])
    assert [torch.equal(x, X[rows]) for x, rows in zip(read, [*Groups()] * 2, strict=True)] == [True] * 6
    read.clear()
    fit(net(), DataLoader(TensorDataset(X, Y), 8), epochs=1, callbacks=[note])
    assert torch.equal(torch.cat(read), X)


def test_together_feeds_an_objective_a_batch_of_every_part():
    parts, model = {"forget": (X[:8], Y[:8]), "retain": (X[8:], Y[8:])}, net()

    def unlearn(model, batch, run):
        forget, retain = (F.cross_entropy(model(batch[part][0]), batch[part][1]) for part in ("forget", "retain"))
        return {"forget": -forget, "retain": retain}

    history = fit(model, Together(parts, 4), unlearn, epochs=20, optimizer=sgd(0.1))
    assert len(history) == 20 * 4
    assert all(
        f + r == pytest.approx(t) for f, r, t in zip(history["forget"], history["retain"], history["loss"], strict=True)
    )
    assert F.cross_entropy(model(X[:8]), Y[:8]) > 2 * F.cross_entropy(model(X[8:]), Y[8:])


def test_in_turn_feeds_one_part_after_the_other():
    names = []
    note = On(batch=lambda run, batch: (names.extend(batch), next(iter(batch.values())))[1])
    fit(net(), InTurn({"forget": (X[:8], Y[:8]), "retain": (X[8:], Y[8:])}, 5), epochs=2, callbacks=[note])
    assert names == ["forget", "forget", "retain", "retain", "retain"] * 2


@pytest.mark.parametrize("steps", [1, 5, 7])
def test_steps_end_inside_of_an_epoch_or_go_over_several(steps):
    history = fit(net(), batches(4, 4, 4), steps=steps)
    assert history["step"] == list(range(1, steps + 1))
    assert history["epoch"] == [k // 3 for k in range(steps)]


def test_stop_ends_the_run_after_the_step():
    ended = []
    stop = On(step=lambda run: run.stop() if run.step == 2 else None, end=lambda run: ended.append(run.step))
    assert fit(net(), batches(4, 4, 4), epochs=5, callbacks=[stop])["step"] == [1, 2]
    assert ended == [2]


# --- history --------------------------------------------------------------------------------------------------------


def test_history_has_every_term_and_what_callbacks_logged(tmp_path):
    path = tmp_path / "new" / "log.jsonl"
    log = On(step=lambda run: run.log(norm=1.5 * run.step) if run.step != 2 else None)
    objectives = cross_entropy + 2 * size
    history = fit(net(), batches(4, 4, 4), objectives, epochs=1, optimizer=sgd(0.25), callbacks=[log], log=path)
    assert len(history) == 3
    assert list(history.records[0]) == ["step", "epoch", "loss", "cross_entropy", "size", "lr", "norm"]
    assert history["norm"] == [1.5, 4.5]
    assert history["lr"] == [0.25] * 3
    assert history["nothing"] == []
    assert history["loss"] == pytest.approx(torch.tensor([history["cross_entropy"], history["size"]]).sum(0).tolist())
    assert [json.loads(line) for line in path.read_text().splitlines()] == history.records


def test_a_new_run_writes_its_log_anew(tmp_path):
    path = tmp_path / "log.jsonl"
    for steps in (5, 2):
        fit(net(), batches(4, 4), steps=steps, log=path)
    assert len(path.read_text().splitlines()) == 2


def test_the_loss_of_a_record_is_the_sum_of_its_terms_whatever_they_are_called():
    @objective
    def loss(model, batch, run):
        return model(batch[0]).square().mean()

    model = net()
    expected = sum(value.item() for value in (cross_entropy + loss)(model, (X, Y), None).values())
    history = fit(model, [(X, Y)], cross_entropy + loss, steps=1)
    assert history["loss"] == pytest.approx([expected])


@pytest.mark.parametrize("name", ["step", "epoch", "lr"])
def test_a_term_does_not_take_the_place_of_the_position(name):
    @objective
    def other(model, batch, run):
        return {name: model(batch[0]).square().mean()}

    try:
        history = fit(net(), [(X, Y)], cross_entropy + other, steps=2, optimizer=sgd(0.5))
    except InputError:
        return  # a name that is taken may be refused
    assert (history["step"], history["epoch"], history["lr"]) == ([1, 2], [0, 1], [0.5, 0.5])


def test_history_counts_and_gives_columns():
    history = History([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "extra": 3}])
    assert (len(history), history["loss"], history["extra"]) == (2, [2.0, 1.0], [3])


def test_trackers_of_the_accelerator_take_every_record():
    class Keep(GeneralTracker):
        name, requires_logging_directory, tracker = "keep", False, None

        def __init__(self):
            super().__init__()
            self.records = []

        def store_init_configuration(self, values):
            pass

        def log(self, values, step, **options):
            self.records.append((step, values))

    keep = Keep()
    accelerator = Accelerator(log_with=keep)
    accelerator.init_trackers("test")
    history = fit(net(), batches(4, 4), epochs=1, accelerator=accelerator)
    assert keep.records == [(record["step"], record) for record in history.records]


def test_the_progress_bar_is_shown_only_when_asked_for(capsys):
    fit(net(), batches(4, 4), epochs=1, progress=False)
    fit(net(), batches(4, 4), epochs=1)  # what pytest captures is no terminal
    with bar("work", 2) as shown, bar("work", 2, show=False) as hidden:
        assert shown.display is hidden.display is None
        shown.advance()
    assert capsys.readouterr().err == ""
    assert len(fit(net(), batches(4, 4), epochs=1, progress=True)) == 2
    assert capsys.readouterr().err != ""


def test_bars_of_nested_work_share_one_display():
    with bar("outer", 2, show=True) as outer, bar("inner", 3, show=True, done=1) as inner:
        assert inner.display is outer.display
        assert list(track([1, 2], "items", show=True)) == [1, 2]
        inner.advance(2, note="x")
        assert [task.completed for task in inner.display.tasks] == [0, 3]
    with bar("next", 1, show=True) as later:
        assert later.display is not outer.display


# --- divergence and errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_with_the_step_and_the_term(tmp_path, bad):
    model, other, ended = net(), net(), []

    def strange(model, batch, run):
        return model(batch[0]).mean() * (bad if run.step == 2 else 1.0)

    with pytest.raises(Diverged, match=r"not finite at step 3: strange went wrong \(cross_entropy = \d") as caught:
        fit(
            model,
            batches(4, 4, 4, 4),
            cross_entropy + strange,
            epochs=1,
            optimizer=sgd(),
            callbacks=[On(end=lambda run: ended.append(run.step))],
            log=tmp_path / "log.jsonl",
        )
    assert f"strange = {bad}" in str(caught.value)
    assert ended == [2]
    fit(other, batches(4, 4), cross_entropy + strange, epochs=1, optimizer=sgd())
    assert torch.equal(weights(model), weights(other)), "the bad step left no trace"
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2


def stranger():
    return SGD(net().parameters(), lr=0.1)


def frozen():
    return net().requires_grad_(False)


BAD = {
    "steps and epochs": (
        {"steps": 3, "epochs": 2},
        "steps is 3 and epochs is 2, but exactly one of them must be given",
    ),
    "neither steps nor epochs": ({"steps": None}, "steps is None and epochs is None, but exactly one"),
    "no steps": ({"steps": 0}, "steps is 0, but must be greater than 0"),
    "negative steps": ({"steps": -4}, "steps is -4, but must be"),
    "no epochs": ({"steps": None, "epochs": 0}, "epochs is 0, but must be greater than 0"),
    "negative epochs": ({"steps": None, "epochs": -1}, "epochs is -1, but must be"),
    "no batch size": ({"batch_size": 0}, "batch_size is 0, but must be greater than 0"),
    "no clip": ({"clip": 0.0}, "clip is 0.0, but must be greater than 0"),
    "negative clip": ({"clip": -1.5}, "clip is -1.5, but must be"),
    "clip nan": ({"clip": math.nan}, "clip is nan, but must be"),
    "checkpoint every 0": ({"checkpoint": Checkpoint("nowhere", every=0)}, "checkpoint.every is 0, but must be"),
    "optimizer of another model": ({"optimizer": stranger()}, "optimizer holds no parameter of the model"),
    "nothing to train": (
        {"model": frozen()},
        "Sequential has no parameter that requires gradients: there is nothing to train",
    ),
    "no samples for steps": ({"data": (X[:0], Y[:0])}, "The data gave no batch, but must have at least one sample"),
    "no samples for epochs": ({"data": (X[:0], Y[:0]), "steps": None, "epochs": 1}, "data"),
    "no batches": ({"data": [], "steps": None, "epochs": 1}, "data"),
    "lengths": ({"data": (X, Y[:3])}, r"lengths \[3, 22\], but must have one length"),
    "number as data": ({"data": 5}, "The data is a int, but must be"),
    "targets None": ({"data": (X, None)}, "data"),
    "unlabelled": ({"data": TensorData(X)}, "The batch has no targets, but cross entropy needs them"),
    "stream for epochs": ({"data": Stream(), "steps": None, "epochs": 1}, "stream without a length.*give fit steps="),
    "on_batch gives None": ({"callbacks": [On(batch=lambda run, batch: None)]}, "On.on_batch returned None"),
    "loss None": (
        {"objective": lambda model, batch, run: None},
        "The loss term <lambda> is a NoneType, but must be a tensor",
    ),
    "loss a number": ({"objective": lambda model, batch, run: {"a": 0.5}}, "The loss term a is a float"),
    "loss of many elements": (
        {"objective": lambda model, batch, run: model(batch[0])},
        r"is a tensor of shape \(22, 3\), but must be",
    ),
    "no loss terms": ({"objective": lambda model, batch, run: {}}, "loss"),
    "clash of names": ({"objective": cross_entropy + cross_entropy}, "Two loss terms are named cross_entropy"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_named_with_its_value_and_nothing_is_trained(tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    arguments = {"model": net(), "data": (X, Y), "steps": 1, **changes}
    model = arguments["model"].eval()
    before = weights(model)
    with pytest.raises(InputError, match=message):
        fit(arguments.pop("model"), arguments.pop("data"), **arguments)
    assert torch.equal(weights(model), before)
    assert not model.training
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("event", ["start", "epoch", "batch", "gradients", "step"])
def test_on_end_is_called_for_every_callback_also_after_an_error(event):
    ended = []

    def fail(run, *batch):
        raise KeyError("the user's own")

    callbacks = [On(**{event: fail}, end=lambda run: ended.append(1)), On(end=lambda run: ended.append(2))]
    with pytest.raises(KeyError, match="the user's own"):
        fit(net(), (X, Y), steps=2, callbacks=callbacks)
    assert ended == [1, 2]


# --- what is left behind --------------------------------------------------------------------------------------------


def broken(model, batch, run):
    raise KeyError


@pytest.mark.parametrize("loss", [cross_entropy, broken], ids=["done", "after an error"])
def test_modes_attributes_and_forward_are_as_before(loss):
    model = net(dropout=0.5)
    model[0].eval()
    own = model.forward
    model.forward = lambda inputs: own(inputs) + 0.0
    kept, attributes = model.forward, set(vars(model))
    flags = [module.training for module in model.modules()]
    ready = On(start=lambda run: flags.append(all(module.training for module in model.modules())))
    if loss is broken:
        with pytest.raises(KeyError):
            fit(model, (X, Y), loss, steps=2, callbacks=[ready])
    else:
        fit(model, (X, Y), loss, steps=2, callbacks=[ready])
    assert flags.pop(), "every module is in train mode while training"
    assert [module.training for module in model.modules()] == flags
    assert model.forward is kept
    assert set(vars(model)) == attributes
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    del model.forward
    assert model.forward == own
    copy.deepcopy(model)


def test_global_randomness_is_untouched(global_rng_untouched):
    noise = On(batch=lambda run, b: (b[0] + torch.rand(4), b[1]))
    fit(net(dropout=0.5), DataLoader(TensorDataset(X, Y), 8, shuffle=True), epochs=2, callbacks=[noise])
    with pytest.raises(KeyError):
        fit(net(dropout=0.5), (X, Y), broken, steps=1, callbacks=[noise])


def test_training_does_not_depend_on_global_randomness():
    models = [net(dropout=0.5), net(dropout=0.5)]
    for seed, model in enumerate(models):
        with seeds.isolated(seed):
            fit(model, (X, Y), epochs=2, batch_size=4)
    assert torch.equal(*map(weights, models))


@pytest.mark.parametrize("kind", ["dropout", "order", "generator"])
def test_the_seed_alone_decides(kind):
    def train(seed):
        model = net(dropout=0.5 if kind == "dropout" else 0.0)
        data = (X, Y) if kind == "order" else batches(8, 8, 6)
        noise = On(batch=lambda run, b: (b[0] + torch.rand(b[0].shape, generator=run.generator), b[1]))
        fit(model, data, epochs=2, batch_size=4, seed=seed, callbacks=[noise] if kind == "generator" else [])
        return weights(model)

    assert torch.equal(train(1), train(1))
    assert not torch.equal(train(1), train(2))


def test_every_step_draws_anew():
    drawn = []
    note = On(
        batch=lambda run, b: (drawn.append((float(torch.rand(())), torch.rand((), generator=run.generator))), b)[1]
    )
    fit(net(), batches(4, 4, 4), epochs=2, callbacks=[note])
    assert len({a for a, _ in drawn}) == len({float(b) for _, b in drawn}) == 6


def test_mixed_precision_trains_and_leaves_the_models_forward_as_it_was():
    """In a process of its own, because accelerate keeps the precision for all of a process."""
    program = """
import copy, torch
from accelerate import Accelerator
from torch import nn
from retouch.core.loop import fit
torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
y = x[:, :3].argmax(1)
attributes, own, seen = set(vars(model)), model.forward, []
model[0].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
def loss(model, batch, run):
    logits = model(batch[0])
    seen.append(logits.dtype)
    return nn.functional.cross_entropy(logits, batch[1])
accelerator = Accelerator(mixed_precision="bf16", cpu=True)
def train(model, loss=loss):
    return fit(model, (x, y), loss, epochs=10, optimizer=lambda p: torch.optim.SGD(p, lr=0.5), accelerator=accelerator)
before = train(model)["loss"]
assert set(seen) == {torch.bfloat16, torch.float32}, seen
assert before[-1] < 0.8 * before[0], before
def unchanged(model):
    assert set(vars(model)) == attributes, set(vars(model)) ^ attributes
    assert model.forward == own
    seen.clear()
    assert model(x).dtype == torch.float32 and set(seen) == {torch.float32}
    copy.deepcopy(model)
unchanged(model)
after = train(model)["loss"]                      # a second time: wrapped again, and not twice
assert after[0] < before[0] and torch.bfloat16 in seen
unchanged(model)
def broken(model, batch, run): raise KeyError
try:
    train(model, broken)
except KeyError:
    unchanged(model)
    print("done")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr
