"""The arena `guide` with the text-to-image model of the shapes: tasks, judges and entries, on an untrained one."""

import dataclasses
import math

import pytest
import torch

from retouch.arenas.contest import Terms, arena
from retouch.arenas.guide.entries import a_star, cfgpp, pag
from retouch.arenas.guide.tasks import _shapes as world
from retouch.arenas.guide.tasks import crowded, inversion, prompts, reconstruction, unprompted
from retouch.arenas.sampling import SamplingProblem, answers, measure, pictures
from retouch.core.diffusion.denoiser import Denoiser
from retouch.core.diffusion.steering import Steering
from retouch.worlds import shapes
from retouch.worlds.shapes.models import architectures, references
from retouch.worlds.shapes.models.training import built

TASKS = {task.NAME: task for task in (prompts, crowded, reconstruction, unprompted)}
GUIDE = arena("guide")


@pytest.fixture(scope="module")
def model():
    """A pipeline of the shipped one's form, untrained and narrow; its images are nearly gray, which is soon read."""
    unet = built(lambda: architectures.new_unet(widths=(8, 16)), 0)
    autoencoder = built(lambda: architectures.new_autoencoder(widths=(8, 8, 8)), 0)
    text = built(lambda: architectures.new_text_encoder(layers=1), 0)
    with torch.no_grad():
        autoencoder.decoder.conv_out.weight *= 0.01
    return references.text_pipeline(autoencoder.eval(), text.eval(), unet.eval())


@pytest.fixture(autouse=True)
def small(monkeypatch, model):
    """The untrained model in place of the shipped one, few samples and steps."""
    monkeypatch.setattr(world, "pipeline", lambda: model)
    denoiser = Denoiser.from_pipeline(model)
    monkeypatch.setattr(world, "denoiser", lambda: denoiser)
    real = world.held_out
    monkeypatch.setattr(world, "held_out", lambda counts: real(counts, 60))
    for module, name, value in (
        (prompts, "PROMPTS", 4),
        (prompts, "STEPS", 2),
        (reconstruction, "COUNT", 4),
        (reconstruction, "STEPS", 2),
        (unprompted, "COUNT", 5),
        (unprompted, "STEPS", 2),
    ):
        monkeypatch.setattr(module, name, value)


def problem(name, **terms):
    return SamplingProblem(TASKS[name].TASK, Terms(replicas=1, **terms))


def entries(name):
    return [entry for entry in GUIDE.entries() if name in entry.problems]


@pytest.mark.parametrize("name", list(TASKS))
def test_every_entry_is_measured_shown_and_leaves_the_global_generators_alone(name, global_rng_untouched):
    posed = problem(name)
    found = entries(name)
    assert {"oracle", "original", "baseline", "technique"} >= {entry.kind for entry in found}
    columns = pictures(posed)
    for entry in found:
        outcome = entry.solve(posed.replica(0), **entry.settings_for(name))
        assert bool(torch.isfinite(outcome.samples).all())
        values = measure(posed, [outcome])
        own = {"each", "calls", "sampling"}
        assert set(posed.task.measures) - own <= set(values)
        if entry.kind != "oracle":  # which is not sampled
            assert set(values) == set(posed.task.measures) | own
            assert outcome.own["each"] > 0 and outcome.own["calls"] > 0
        assert all(math.isfinite(value[0]) for key, value in values.items() if key not in own)
        row = answers(posed, outcome)
        assert len(row) == len(columns) > 0
        assert all(answer.right in (True, False) and answer.image.shape == (3, 64, 64) for answer in row)
    claims = [claim for entry in found for claim in entry.claims if claim.problem == name]
    assert claims and all(claim.measure in posed.task.measures for claim in claims)


def test_calls_are_those_of_the_branches():
    posed = problem("prompts").replica(0)
    solved = {entry.name: entry.solve(posed, **entry.settings_for("prompts")) for entry in entries("prompts")}
    calls = {name: outcome.own.get("calls") for name, outcome in solved.items()}
    assert calls["prompts_unguided"] == prompts.STEPS
    assert calls["prompts_cfg_3"] == calls["prompts_cfg_75"] == calls["cfgpp"] == 2 * prompts.STEPS
    assert calls["pag"] == calls["a_star"] == calls["prompts_cfg_more"] == 3 * prompts.STEPS
    three = problem("crowded").replica(0)
    assert a_star.solve(three).own["calls"] == prompts.drawn(three, Steering(), longer=1.5).own["calls"]
    back = problem("reconstruction").replica(0)
    assert reconstruction.guided(back, None).own["calls"] == 2 * reconstruction.STEPS
    assert cfgpp.solve(back).own["calls"] == 4 * reconstruction.STEPS
    free = problem("unprompted").replica(0)
    assert unprompted.drawn(free, Steering()).own["calls"] == unprompted.STEPS
    assert pag.solve(free).own["calls"] == 2 * unprompted.STEPS


def test_seeds_decide_prompts_and_noise_and_a_search_has_others():
    first, again = (problem("prompts").replica(0).given for _ in range(2))
    assert first.prompts == again.prompts and torch.equal(first.noise, again.noise)
    searched, second = problem("prompts", search=True).replica(0).given, problem("prompts").replica(1).given
    for other in (searched, second):
        assert first.prompts != other.prompts and not torch.equal(first.noise, other.noise)
    half = len(first.prompts) // 2
    assert first.prompts[:half] == first.prompts[half:] and not torch.equal(first.noise[:half], first.noise[half:])
    relations = [shapes.parse(prompt).relations[0] for prompt in first.prompts]
    assert relations[::2] == [None] * half and None not in relations[1::2]
    scenes, others = (problem("reconstruction", search=search).replica(0).given for search in (False, True))
    assert scenes.captions != others.captions and scenes.latents.shape == (4, 4, 16, 16)


def test_a_crowd_is_of_three_things_half_of_them_with_their_places():
    given = problem("crowded").replica(0).given
    told = [shapes.parse(prompt) for prompt in given.prompts]
    assert all(len(one.things) == 3 for one in told)
    assert [all(one.relations) for one in told] == [any(one.relations) for one in told] == [False, True] * 4
    for one in told[:2]:
        assert all(thing.shape and thing.colour for thing in one.things)


def test_scenes_of_a_prompt_are_as_it_says_and_differ_in_all_else():
    prompt = "a red circle left of a blue circle and above a green star"
    scenes = [prompts.scene_of(prompt, number, 0) for number in range(8)]
    assert all(shapes.describe(scene, ("shape", "colour", "relation")) == shapes.parse(prompt) for scene in scenes)
    assert len({scene.things[0].x for scene in scenes}) == 8 and len({scene.background for scene in scenes}) > 1


def test_two_things_of_three_are_not_enough():
    replica = problem("crowded").replica(0)
    scenes = [prompts.scene_of(prompt, k, 1) for k, prompt in enumerate(replica.given.prompts)]
    fewer = [dataclasses.replace(scene, things=scene.things[:2]) for scene in scenes]
    assert prompts.judge(replica.given, shapes.render(scenes, 64))["bound"] == 100
    assert prompts.judge(replica.given, shapes.render(fewer, 64))["bound"] == 0


@pytest.mark.parametrize("name", ["prompts", "crowded"])
def test_the_prompts_judge_tells_scenes_of_the_prompts_from_others(name):
    replica = problem(name).replica(0)
    images = prompts.real(replica).samples
    good, shuffled = (prompts.judge(replica.given, x) for x in (images, images.roll(1, 0)))
    assert good["bound"] == good["objects"] == good["relations"] == 100
    assert shuffled["bound"] < 50 and shuffled["frechet"] == pytest.approx(good["frechet"], rel=1e-3)
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    bad = prompts.judge(replica.given, noise)
    assert bad["bound"] == 0 and bad["frechet"] > 2 * good["frechet"]
    assert [answer.right for answer in prompts.shown(replica.given, images)] == [True] * world.SHOWN
    # All shapes are the same in a mirror, but a relation along x is not true there, and one along y not upside down.
    told = [prompts.judge(replica.given, images.flip(axis)) for axis in (3, 2)]
    assert told[0]["bound"] == 100 and min(one["relations"] for one in told) < 100


def test_images_that_are_all_alike_are_not_diverse():
    replica = problem("prompts").replica(0)
    images = prompts.real(replica).samples
    half = len(images) // 2
    same = prompts.judge(replica.given, torch.cat([images[:half]] * 2))
    assert same["diversity"] < 1e-5 < prompts.judge(replica.given, images)["diversity"]


def test_diversity_is_the_mean_distance_within_a_wish():
    features = torch.tensor([[[0.0], [3.0]], [[5.0], [6.0]]])
    assert world.diversity(features) == pytest.approx(2.0)
    assert world.diversity(torch.tensor([[[0.0], [1.0], [2.0]]])) == pytest.approx(4 / 3)


def test_saturation_is_none_in_gray_and_all_in_pure_colours():
    assert world.saturation(torch.full((2, 3, 4, 4), 0.7)) == 0
    red = torch.tensor([1.0, 0.0, 0.0])[None, :, None, None].expand(1, 3, 4, 4)
    assert world.saturation(red) == 100


def test_things_in_each_others_colours_are_there_but_not_bound():
    given = problem("prompts").replica(0).given
    scenes = [prompts.scene_of(text, k, 1) for k, text in enumerate(given.prompts)]
    crossed = []
    for scene in scenes:
        one, other = scene.things
        things = (dataclasses.replace(one, colour=other.colour), dataclasses.replace(other, colour=one.colour))
        crossed.append(dataclasses.replace(scene, things=things))
    told = prompts.judge(given, shapes.render(crossed, 64))
    same = [a.colour == b.colour or a.shape == b.shape for a, b in (scene.things for scene in scenes)]
    assert told["objects"] == 100 and told["bound"] <= 100 * sum(same) / len(same) < 100


def test_the_reconstruction_judge_sees_errors(monkeypatch):
    given = problem("reconstruction").replica(0).given
    exact = reconstruction.judge(given, given.latents)
    off = reconstruction.judge(given, given.latents + 0.5)
    assert exact["latent"] == 0 and off["latent"] == pytest.approx(0.5)

    class Told:
        """A decoder that gives the scenes themselves, or in another order."""

        def __init__(self, shift):
            self.shift = shift

        def decode(self, latents):
            return given.images.roll(self.shift, 0)

    found = []
    for shift in (0, 1):
        monkeypatch.setattr(world, "denoiser", lambda shift=shift: Told(shift))
        found.append(reconstruction.judge(given, given.latents))
    assert found[0]["told"] == 100 and found[0]["psnr"] > 100
    assert found[1]["told"] < 100 and found[1]["psnr"] < 40


def test_the_unprompted_judge_tells_scenes_from_noise():
    replica = problem("unprompted").replica(0)
    images = unprompted.real(replica).samples
    good = unprompted.judge(replica.given, images)
    bad = unprompted.judge(replica.given, torch.rand(images.shape, generator=torch.Generator().manual_seed(0)))
    assert good["valid"] == 100 and bad["valid"] == 0 and bad["frechet"] > good["frechet"]
    assert all(answer.right for answer in unprompted.shown(replica.given, images))


def test_concepts_are_the_tokens_of_nouns_or_of_phrases():
    prompt = "a red circle left of a blue circle"
    words = world.denoiser().tokenizer
    ids = words(prompt).input_ids

    def told(said):
        return [words.convert_ids_to_tokens([ids[k] for k in group]) for group in a_star.concepts(prompt, said)]

    assert told("shapes") == [["circle</w>"], ["circle</w>"]]
    assert a_star.concepts(prompt, "shapes")[0] != a_star.concepts(prompt, "shapes")[1]
    assert told("phrases") == [["red</w>", "circle</w>"], ["blue</w>", "circle</w>"]]


def test_without_a_step_size_a_star_is_plain_guidance_and_so_is_pag_of_scale_0():
    replica = problem("prompts").replica(0)
    plain = prompts.drawn(replica, Steering()).samples
    assert torch.equal(a_star.solve(replica, alpha=0.0).samples, plain)
    assert torch.equal(pag.solve(replica, scale=0.0).samples, plain)
    assert not torch.equal(pag.solve(replica, scale=3.0).samples, plain)


def test_cfgpp_keeps_the_strength_it_has_in_fifty_steps():
    assert cfgpp.STEPS == inversion.STEPS  # so that there the setting is lam itself
    for name in ("prompts", "reconstruction"):
        steps = {"prompts": prompts, "reconstruction": reconstruction}[name].STEPS
        assert steps < cfgpp.STEPS
    assert cfgpp.ENTRY.settings_for("prompts") == cfgpp.ENTRY.settings_for("reconstruction") == {"scale": 0.25}
