"""The arena's tasks on class-conditional models of shapes and on failures, with tiny untrained models."""

import functools
import importlib
import math

import pytest
import torch

from retouch.arenas.contest import Terms
from retouch.arenas.guide.entries import elucd, ppap, ppap_one, sage, skip_tuning, t_stitch
from retouch.arenas.guide.tasks import _classes as world
from retouch.arenas.guide.tasks import classifier, failing, few_steps, stitched
from retouch.arenas.sampling import SamplingProblem, answers, measure, pictures
from retouch.core import seeds
from retouch.core.diffusion.denoiser import Denoiser
from retouch.core.diffusion.process import Level
from retouch.worlds import shapes
from retouch.worlds.shapes.models import architectures, references

TASKS = (stitched, few_steps, classifier, failing)
ENTRIES = [module.ENTRY for module in (t_stitch, skip_tuning, elucd, ppap, ppap_one, sage)]
CACHED = (
    world.denoiser,
    world.held_out,
    stitched.work,
    classifier.denoiser,
    classifier.classifier,
    classifier.synthetic,
    failing.models,
)


def tiny(variant):
    """An untrained model of the variant's class."""
    with seeds.isolated(0):
        autoencoder = architectures.new_autoencoder(widths=(8, 8, 8))
        if variant == "clip":
            return architectures.new_clip(width=32, text_layers=1, layers=1, projection=8)
        if variant == "pixels":
            return architectures.new_pixel_unet(widths=(8, 16))
        if variant == "pipeline":
            text, unet = architectures.new_text_encoder(layers=1), architectures.new_unet(widths=(8, 16))
            return references.text_pipeline(autoencoder.eval(), text.eval(), unet.eval())
        transformer = architectures.new_dit(heads=1, layers=2 if variant == "dit-large" else 1)
        return references.dit_pipeline(transformer, autoencoder)


def tiny_denoiser(variant):
    model = tiny(variant)
    return references.pixel_denoiser(model.eval()) if variant == "pixels" else Denoiser.from_pipeline(model)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Tiny models, two prompts, few steps."""
    monkeypatch.setattr(shapes, "reference", tiny)
    monkeypatch.setattr(shapes, "denoiser", tiny_denoiser)
    monkeypatch.setattr(world, "HELD_OUT", 8)
    monkeypatch.setattr(world, "every_class", lambda times, seed: ["red circle", "blue star"])
    monkeypatch.setattr(stitched, "STEPS", 5)
    monkeypatch.setattr(few_steps, "STEPS", 2)
    for name, value in {"TIMES": 1, "STEPS": 3, "TRAINING": 2, "SYNTHETIC": 4}.items():
        monkeypatch.setattr(classifier, name, value)
    for name, value in {"BUDGET": 5, "STEPS": 2, "BATCH": 2}.items():
        monkeypatch.setattr(failing, name, value)
    monkeypatch.setattr(shapes, "classification", functools.partial(shapes.classification, count=64))
    train = ppap.train_experts
    monkeypatch.setattr(ppap, "train_experts", lambda *a, iterations, **k: train(*a, iterations=5, **k))
    for function in CACHED:
        function.cache_clear()
    yield
    for function in CACHED:
        function.cache_clear()


def problem_of(task):
    return SamplingProblem(task.TASK, Terms(replicas=1))


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.NAME)
def test_every_entry_is_measured_and_pictured(task):
    problem = problem_of(task)
    entries = [entry for entry in ENTRIES if task.NAME in entry.problems]
    assert entries
    for entry in (*task.TASK.baselines, *entries):
        outcome = entry.solve(problem.replica(0), **entry.settings_for(task.NAME))
        values = measure(problem, [outcome])
        for name in task.TASK.measures:
            if name != "cost" or entry.kind != "oracle":
                assert math.isfinite(values[name][0]), (entry.name, name)
        assert len(answers(problem, outcome)) == len(pictures(problem)) > 0
        if "calls" in values:
            assert values["calls"][0] > 0 and outcome.seconds > 0


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.NAME)
def test_seeds_of_a_search_are_others_and_claims_name_what_is_there(task):
    assert problem_of(task).replica(0).seed != SamplingProblem(task.TASK, Terms(search=True)).replica(0).seed
    assert task.TASK.order in task.TASK.measures
    names = {entry.name for entry in (*task.TASK.baselines, *ENTRIES)}
    for claim in (claim for entry in ENTRIES for claim in entry.claims if claim.problem == task.NAME):
        assert claim.other in names and claim.measure in {*task.TASK.measures, "sampling"}


def test_entries_know_how_to_solve_all_their_problems():
    for module, solvers in ((t_stitch, t_stitch.SOLVE), (skip_tuning, skip_tuning.DRAWN), (ppap, ppap.SOLVE)):
        assert set(solvers) == set(module.ENTRY.problems)
    assert set(elucd.STEERED) == set(elucd.ASKED) == set(elucd.ENTRY.problems)


def test_calls_are_counted():
    problem = problem_of(stitched)
    found = {entry.name: entry.solve(problem.replica(0)).own for entry in stitched.TASK.baselines}
    assert found["dit_large"]["calls"] == 10  # two branches at five steps
    assert found["dit_fewer_steps"]["calls"] < 10 and found["dit_small"]["cost"] < 100
    assert t_stitch.ENTRY.solve(problem.replica(0)).own["cost"] == found["dit_large_first"]["cost"] < 100
    assert few_steps.plain(problem_of(few_steps).replica(0)).own["calls"] == 3  # of two steps of Heun
    assert classifier.unguided(problem_of(classifier).replica(0)).own["calls"] == 3
    assert failing.at_random(problem_of(failing).replica(0)).own["calls"] == 4


def test_limits_are_the_models_alone():
    replica = problem_of(stitched).replica(0)
    assert torch.equal(stitched.stitched(replica, 0.0).samples, stitched.large(replica).samples)
    assert torch.equal(stitched.stitched(replica, 1.0).samples, stitched.small(replica).samples)
    assert torch.equal(t_stitch.solve(replica, ratio=0.0).samples, stitched.large(replica).samples)
    assert torch.equal(t_stitch.solve(replica).samples, stitched.stitched(replica, 0.4).samples)
    replica = problem_of(few_steps).replica(0)
    plain = few_steps.plain(replica).samples
    assert torch.equal(skip_tuning.solve(replica, rho_bottom=1.0).samples, plain)
    assert not torch.equal(skip_tuning.solve(replica, rho_bottom=0.5).samples, plain)
    replica = problem_of(classifier).replica(0)
    assert torch.equal(elucd.solve(replica, scale=0.0).samples, classifier.unguided(replica).samples)


@pytest.mark.parametrize("size", [32, 64])
def test_the_judge_tells_right_images_from_those_of_other_prompts(size):
    classes = [name for name in world.CLASSES if "circle" in name or "star" in name]
    images = world.rendered(classes, size, seed=0)
    given = world.Asked(noise=images, classes=classes, seed=0)
    right, wrong = world.judge(given, images), world.judge(given, images.roll(1, 0))
    assert right["right"] > 90 and wrong["right"] == 0 and right["valid"] == wrong["valid"] > 90
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    assert world.judge(given, noise)["frechet"] > 2 * right["frechet"]
    assert [answer.right for answer in world.shown(given, images)] == [True] * world.SHOWN
    assert [picture.title for picture in world.wishes(given)] == given.prompts[: world.SHOWN]


def test_every_class_is_asked_for_as_often(monkeypatch):
    monkeypatch.undo()
    asked = world.every_class(2, seed=0)
    assert sorted(asked) == sorted(2 * world.CLASSES) and asked != world.every_class(2, seed=1)


def test_the_model_of_pixels_is_the_same_as_a_ddpm():
    edm, vp = world.denoiser("pixels"), classifier.denoiser()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    level = vp.process.grid(5).levels[2]
    found = vp(level.alpha * x, level, vp.encode(None, 2))
    wanted = edm(x, Level(level.ratio, 1.0, level.ratio), edm.encode(None, 2))
    assert torch.allclose(found.x0, wanted.x0, atol=1e-5)
    ratios = [level.ratio for level in vp.process.grid(5).levels]
    assert ratios == pytest.approx([level.sigma for level in edm.process.grid(5).levels], rel=0.05, abs=1e-6)


def test_only_true_natural_and_distinct_failures_count():
    given = problem_of(failing).replica(0).given
    classes = ["red circle", "blue star", "pink heart", "green cross"]
    images = world.rendered(classes, 64, seed=0)
    latents = torch.randn(4, *failing.SHAPE, generator=torch.Generator().manual_seed(4))
    assert bool(failing.gaussianity(latents)[0].all())
    latents[3] = 1.0  # no draw of N(0, I)
    found = failing.Found(total=20)
    asked = ["a red circle", "a red star", "a red heart", "a red cross"]
    for row, prompt in enumerate(asked):
        found.add(prompt, latents[row], images[row], row + 1)
    found.add(asked[1], latents[1], images[1], 5)
    told = failing.judge(given, found)
    assert told == {
        "found": 10.0,
        "first": 2.0,
        "verified": 80.0,
        "natural": 80.0,
    }  # two of 20; one is shown, and so on
    assert failing.judge(given, failing.Found(total=20))["first"] == 20
    assert [answer.right for answer in failing.shown(given, found)] == [False, True, True, True, True, None]


def test_sage_keeps_to_the_budget_and_its_images_come_again():
    problem = problem_of(failing)
    outcome = sage.solve(problem.replica(0), latents=2, steps=1)
    found, given = outcome.samples, problem.replica(0).given
    assert found.total == failing.BUDGET and outcome.own["calls"] == 4 and found.images
    assert max(found.made) <= failing.BUDGET and found.made == sorted(found.made)
    for prompt, latent, image in zip(found.prompts, found.latents, found.images, strict=True):
        make = given.generator(latent[None])
        with torch.no_grad():
            assert torch.allclose(make.decode(make.sampler(prompt)(latent[None]))[0], image, atol=1e-4)


def test_the_modules_are_tasks():
    for task in TASKS:
        assert importlib.import_module(f"retouch.arenas.guide.tasks.{task.NAME}").TASK.name == task.NAME
