"""Arenas of training techniques: what tasks, replicas and measures do, and a smoke of every task."""

import dataclasses

import pytest
import torch
from torch import nn

from retouch.arenas import training
from retouch.arenas.contest import Entry, Terms, arena, merged
from retouch.arenas.runner import run
from retouch.arenas.training import Split, Task, TrainProblem, derive, measure, plain, to_target
from retouch.core.data import TensorData
from retouch.core.loop import Callback


def blobs(seed, search=False):
    draw = torch.Generator().manual_seed(seed % 2**31)
    labels = torch.randint(3, (120,), generator=draw)
    inputs = torch.eye(3)[labels] + 0.3 * torch.randn(120, 3, generator=draw)
    data = TensorData(inputs, labels)
    return Split(train=TensorData(*data[:80]), test=TensorData(*data[80:]))


TASK = Task(name="blobs", text="?", split=blobs, build=lambda: nn.Linear(3, 3), steps=20, target=50.0, early=7)


def problem(**terms):
    return TrainProblem(TASK, Terms(replicas=2, **terms))


def test_all_entries_start_from_the_same_weights_and_see_the_same_data():
    one, two = problem().replica(0), problem().replica(0)
    assert torch.equal(one.build().weight, two.build().weight)
    assert not torch.equal(one.build().weight, one.build("other").weight)
    assert not torch.equal(one.build().weight, problem().replica(1).build().weight)
    assert torch.equal(one.split.train.inputs, two.split.train.inputs)
    found = [plain(replica).model.weight for replica in (one, two)]
    assert torch.equal(*found)


def test_seeds_vary_separately_and_a_search_has_its_own():
    fixed = problem(vary=("evaluate",))
    assert fixed.replica(0).seed == fixed.replica(1).seed
    assert not torch.equal(fixed.split(0).train.inputs, fixed.split(1).train.inputs)
    search = problem(search=True)
    assert search.replica(0).seed != problem().replica(0).seed
    assert not torch.equal(search.split(0).train.inputs, problem().split(0).train.inputs)


def test_the_clock_stands_still_while_the_error_is_looked_at(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(training.time, "perf_counter", lambda: now[0])

    class Tick(Callback):
        def on_step(self, run):
            now[0] += 1.0

    def slow(model, split):
        now[0] += 100.0
        return 40.0

    task = Task(**{**vars(TASK), "error": slow, "judge": lambda model, split: {"error": 1.0}})
    solution = TrainProblem(task, Terms(replicas=1)).replica(0).train(callbacks=[Tick()])
    assert solution.step_seconds == 1.0
    assert [(step, seconds) for step, seconds, _ in solution.curve] == [(k, float(k)) for k in range(1, 21)]


def test_measures_of_a_solution():
    asked = problem()
    solutions = [plain(asked.replica(number)) for number in range(2)]
    values = measure(asked, solutions)
    assert all(len(found) == 2 for found in values.values())
    assert values["early"] == [next(e for s, _, e in made.curve if s == 7) for made in solutions]
    assert set(values) == {"error", "calibration", "steps", "wait", "step", "early"}
    rows = {"plain": {"values": {"step": [2.0, 4.0]}}, "ours": {"values": {"step": [6.0]}}}
    derive(rows)
    assert rows["ours"]["values"]["overhead"] == [100.0]


def test_steps_to_a_target():
    curve = [(5, 0.5, 60.0), (10, 1.0, 20.0), (15, 1.5, 30.0)]
    assert to_target(curve, 20.0) == (10.0, 1.0)
    assert to_target(curve, 5.0) == (15.0, 1.5)  # never reached: the whole run


def test_own_measures_finish_and_teachers():
    class Doubled(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return 2 * self.model(x)

    made = problem().replica(0).train(finish=Doubled, own=lambda model: {"kind": float(isinstance(model, Doubled))})
    assert made.own == {"kind": 1.0}
    assert isinstance(made.model, Doubled) and not made.model.training
    task = Task(**{**vars(TASK), "teacher": lambda replica: replica.train().model})
    asked = TrainProblem(task, Terms(replicas=1))
    assert asked.replica(0).teacher is asked.replica(0).teacher


def test_two_tasks_cannot_have_different_entries_of_one_name():
    def other(replica):
        return replica.train(steps=2)

    one = Entry(name="mine", title="mine", solve=plain, problems=("a",))
    same = merged([one, dataclasses.replace(one, problems=("b",))])
    assert [entry.problems for entry in same] == [("a", "b")]
    with pytest.raises(ValueError, match="different entries 'mine'"):
        merged([one, dataclasses.replace(one, solve=other, problems=("b",))])


TASKS = [(name, task) for name in ("train", "distill") for task in arena(name).problems]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "task"), TASKS, ids=[f"{name}/{task}" for name, task in TASKS])
def test_smoke_of_every_task(tmp_path, monkeypatch, name, task):
    """Every entry runs on a hundredth of the budget, and is measured."""
    fit = training.fit
    monkeypatch.setattr(training, "fit", lambda *a, steps, **k: fit(*a, steps=max(2, steps // 100), **k))
    evidence = run(arena(name), tmp_path, problems=[task], terms=Terms(replicas=1))
    record = evidence["problems"][task]
    entered = {entry.name for entry in arena(name).entries() if not entry.problems or task in entry.problems}
    assert set(record["rows"]) == entered
    order = record["order"]
    for row in record["rows"].values():
        assert len(row["values"][order]) == 1
    assert all(claim["difference"] is not None for claim in record["claims"])
