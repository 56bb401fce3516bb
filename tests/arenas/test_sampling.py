"""Arenas of sampling techniques: what tasks, replicas and measures do, and a smoke of every task."""

import dataclasses
import math

import pytest
import torch

from retouch.arenas.contest import Answer, Picture, Terms, arena
from retouch.arenas.guide.tasks import (
    _digits,
    classifier,
    failing,
    few_steps,
    free,
    prompts,
    reconstruction,
    stitched,
    unprompted,
)
from retouch.arenas.guide.tasks import _points as points
from retouch.arenas.runner import run
from retouch.arenas.sampling import Outcome, SamplingProblem, Task, answers, measure, pictures, timed
from retouch.core.diffusion.denoiser import Denoiser
from retouch.core.diffusion.process import VP
from retouch.core.diffusion.sampling import sample
from retouch.worlds.gaussians import ring

PREPARED = []
TASK = Task(
    name="t",
    text="?",
    prepare=lambda seed, search: (PREPARED.append((seed, search)), seed)[1],
    judge=lambda given, samples: {"sum": float(sum(samples)) + given % 1},
    order="sum",
    measures={},
)


def test_what_is_prepared_is_made_once_a_replica_and_seeds_vary():
    problem = SamplingProblem(TASK, Terms(replicas=2))
    PREPARED.clear()
    assert problem.replica(0).given == problem.replica(0).given != problem.replica(1).given
    assert len(PREPARED) == 2
    search = SamplingProblem(TASK, Terms(replicas=2, search=True))
    assert search.replica(0).given != problem.replica(0).given and PREPARED[-1][1]
    fixed = SamplingProblem(TASK, Terms(replicas=2, vary=("train",)))
    assert fixed.replica(0).given == fixed.replica(1).given


def test_measures_are_the_tasks_the_clocks_and_the_entrys_own():
    problem = SamplingProblem(TASK, Terms(replicas=2))
    values = measure(problem, [Outcome([1, 2], 0.5, {"calls": 3.0}), Outcome([4])])
    assert values["sum"] == [3.0, 4.0] and values["sampling"][0] == 500.0
    assert values["calls"][0] == 3.0 and math.isnan(values["calls"][1])


def test_calls_are_counted_a_sample():
    denoiser = ring(8).denoiser(VP.linear())
    noise = torch.randn(6, 2)
    outcome = timed([denoiser], 6, lambda: sample(denoiser, noise, times=5), {"own": 1.0})
    assert outcome.own == {"calls": 5.0, "own": 1.0} and outcome.seconds > 0
    assert not denoiser.model._forward_hooks


def test_rows_are_counted_however_the_model_is_called():
    linear = torch.nn.Linear(2, 2)

    class Transformer(torch.nn.Module):
        def forward(self, hidden_states, timestep=None):
            return linear(hidden_states)

    def by_keyword(model, x, time, condition):
        return model(hidden_states=x, timestep=time)

    noise = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    for model, call in ((torch.nn.Identity(), lambda model, x, time, condition: model(x)), (Transformer(), by_keyword)):
        denoiser = Denoiser(model, VP.linear(), call=call)
        outcome = timed([denoiser], 3, lambda denoiser=denoiser: sample(denoiser, noise, {}, times=4))
        assert outcome.own["calls"] == 4.0 and outcome.samples.shape == noise.shape
        assert not model._forward_hooks


def test_pictures_of_a_task_are_what_is_asked_for_and_what_is_made_of_it():
    task = dataclasses.replace(
        TASK,
        wishes=lambda given: [Picture(image=None, title="a", group="g")],
        shown=lambda given, samples: [Answer(text="", right=samples[0] > 1, image=[[float(samples[0])]])],
    )
    problem, plain = SamplingProblem(task, Terms(replicas=1)), SamplingProblem(TASK, Terms(replicas=1))
    assert [picture.title for picture in pictures(problem)] == ["a"]
    assert [answer.right for answer in answers(problem, Outcome([2]))] == [True]
    assert pictures(plain) == answers(plain, Outcome([2])) == ()


def test_points_are_judged_exactly():
    mixture = ring(8)
    modes = torch.arange(8)
    at = mixture.means.float()
    assert points.missed(mixture, at, modes) == points.outside(mixture, at) == points.wrong(mixture, at, modes) == 0
    assert points.missed(mixture, at, modes.roll(1)) == points.wrong(mixture, at, modes.roll(1)) == 100
    assert points.outside(mixture, torch.zeros(4, 2)) == 100
    draws = mixture.draw_with_modes(4000)
    assert points.spread(mixture, draws[1], draws[0]) == pytest.approx(1.0, abs=0.05)


@pytest.mark.slow
def test_a_network_of_points_learns_them_with_and_without_their_class():
    mixture, process = ring(4), VP.linear(0.001, 0.2, 100)
    denoiser = points.taught(mixture, process, seed=0, steps=400, classes=4)
    assert isinstance(denoiser, Denoiser)
    again = points.taught(mixture, process, seed=0, steps=2, classes=4)
    other = points.taught(mixture, process, seed=0, steps=2, classes=4)
    for one, two in zip(again.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(one, two)
    noise, modes = torch.randn(400, 2, generator=torch.Generator().manual_seed(0)), torch.arange(400) % 4
    asked = sample(denoiser, noise, points.asked(modes), times=50)
    assert points.missed(mixture, asked, modes) < 10
    free = sample(denoiser, noise, times=50)
    assert 50 < points.missed(mixture, free, modes) < 95


@pytest.fixture
def made_anew():
    """What tasks keep for all replicas is made of a few steps here, and must not be there for other tests."""
    kept = (classifier.classifier, classifier.synthetic)
    for function in kept:
        function.cache_clear()
    yield
    for function in kept:
        function.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("task", list(arena("guide").problems))
def test_smoke_of_every_task(tmp_path, monkeypatch, made_anew, task):
    """Every entry runs with models of a few steps, and is measured."""
    fit = points.fit
    for module in (points, _digits):
        monkeypatch.setattr(module, "fit", lambda *a, steps, **k: fit(*a, steps=max(2, steps // 100), **k))
    monkeypatch.setattr(free, "COUNT", 40)
    small = {
        prompts: {"PROMPTS": 2, "STEPS": 3},
        reconstruction: {"COUNT": 2, "STEPS": 3},
        unprompted: {"COUNT": 4, "STEPS": 3},
        stitched: {"TIMES": 1, "STEPS": 4},
        few_steps: {"TIMES": 1, "STEPS": 3},
        classifier: {"TIMES": 1, "STEPS": 3, "SYNTHETIC": 8, "TRAINING": 4, "ITERATIONS": 2},
        failing: {"BUDGET": 8, "STEPS": 2},
    }
    for module, counts in small.items():
        for name, count in counts.items():
            monkeypatch.setattr(module, name, count)
    evidence = run(arena("guide"), tmp_path, problems=[task], terms=Terms(replicas=1))
    record = evidence["problems"][task]
    entered = {entry.name for entry in arena("guide").entries() if not entry.problems or task in entry.problems}
    assert set(record["rows"]) == entered
    assert all(claim["difference"] is not None for claim in record["claims"])
