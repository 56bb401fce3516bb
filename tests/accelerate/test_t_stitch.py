"""T-Stitch: which model makes which step, recorded and counted; pipelines of every family, and our sampler."""

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import tiny_pipelines as tiny
import torch
from torch import nn

from retouch.accelerate.t_stitch import (
    StitchedDenoiser,
    best_fractions,
    one_model,
    stitch,
    stitch_index,
    stitch_pipeline,
    stitched_cost,
)
from retouch.core.diffusion.attach import attach
from retouch.core.diffusion.denoiser import Denoiser, Prediction, from_prediction
from retouch.core.diffusion.guidance import cfg
from retouch.core.diffusion.process import EDM, VP, Flow
from retouch.core.diffusion.sampling import Hook, invert, sample
from retouch.core.diffusion.steps import ddim, dpmpp_2m, heun
from retouch.core.errors import InputError
from retouch.core.seeds import isolated
from retouch.worlds.gaussians import only, ring

pytestmark = pytest.mark.usefixtures("global_rng_untouched")
RULES = ("step", "timestep", "progress")
Z = tiny.latents()
PROMPTS = ["a red circle", "a large blue square"]
LATENT = {"num_inference_steps": 4, "latents": Z, "output_type": "latent"}


class Net(nn.Module):
    """Keeps the timesteps it was called at; puts out its number times x, or a function of x and time."""

    def __init__(self, number, answer=None):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(float(number)))
        self.answer, self.calls, self.rows = answer, [], []

    def forward(self, sample, timestep, **rest):
        self.calls.append(float(torch.as_tensor(timestep).reshape(-1)[0]))
        self.rows.append(len(sample))
        return self.weight * sample if self.answer is None else self.answer(sample, timestep)


def nets(count=2):
    return [Net(number) for number in range(count)]


def other(make, seed=7):
    """The network of such a pipeline with weights of its own."""
    network = tiny_network(make())
    with isolated(seed), torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def tiny_network(pipe):
    return pipe.transformer if getattr(pipe, "unet", None) is None else pipe.unet


def counted(model):
    model.count = 0
    model.register_forward_hook(lambda module, args, output: setattr(module, "count", module.count + 1))
    return model


# --- which model ------------------------------------------------------------------------------------------------------


def test_golden(golden):
    case = golden("t_stitch")
    total = int(case.param_num_train_timesteps)
    for steps in (50, 10):
        times = getattr(case, f"in_timesteps_{steps}")
        found = [
            [
                stitch_index(t, num_train_timesteps=total, fractions=(float(r), float(1 - r)), rule="timestep")
                for t in times
            ]
            for r in case.param_ratios
        ]
        case.close(f"out_index_{steps}", found)
    found = [
        [stitch_index(t, num_train_timesteps=1000, fractions=f, rule="progress") for t in case.in_timesteps_50]
        for f in case.param_fractions3
    ]
    case.close("out_index3_50", found)


@pytest.mark.parametrize("r", range(11))
def test_calls_of_the_small_model_are_whole_steps(r):
    ratio = r / 10
    for n in range(1, 51):
        indices = [stitch_index(i, fractions=(ratio, 1 - ratio), num_steps=n) for i in range(n)]
        assert indices.count(0) == math.floor(ratio * n + 1e-9) == int(Fraction(r, 10) * n)
        assert stitched_cost((1, 0), (ratio, 1 - ratio), n) == indices.count(0)


def test_a_third_of_ten_is_three():
    assert [stitch_index(i, fractions=(0.3, 0.7), num_steps=10) for i in range(10)] == [0] * 3 + [1] * 7


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "fractions", [(0.4, 0.2, 0.4), (0.0, 0.5, 0.5), (0.1,) * 10, (0.25, 0.0, 0.75), (0.5, 0.5, 0.0)]
)
def test_the_index_never_falls(rule, fractions):
    for n in (1, 7, 50):
        positions = range(n) if rule == "step" else [1000 * (1 - k / n) for k in range(n)]  # a flow's begin at T itself
        found = [stitch_index(p, fractions=fractions, rule=rule, num_steps=n) for p in positions]
        assert all(a <= b for a, b in pairwise(found))
        assert all(fractions[index] > 0 for index in found)


@pytest.mark.parametrize("rule", RULES)
def test_at_the_limits_there_is_one_model(rule):
    for position in (0, 1, 500, 999):
        settings = {"rule": rule, "num_steps": 1000}
        assert stitch_index(position, fractions=0.0, **settings) == 1
        assert stitch_index(position, fractions=(1, 0), **settings) == 0
        assert stitch_index(position, fractions=(0, 0, 1), **settings) == 2
    if rule != "step":
        assert stitch_index(1000, fractions=0.0, rule=rule) == 1
        assert stitch_index(0, fractions=(1.0, 0.0), rule=rule) == 0


def test_rounding_of_single_precision_fractions_is_forgiven():
    thirds = torch.full((3,), 1 / 3).tolist()
    assert stitch_index(0, fractions=thirds, rule="progress") == 2
    sevenths = torch.tensor([0.1, 0.3, 0.6]).tolist()
    assert stitch_index(600, fractions=sevenths, rule="progress") == 1  # on the border: the earlier model
    assert stitch_index(900, fractions=sevenths, rule="progress") == 0


def test_rules_agree_within_a_step_on_even_timesteps():
    for n in (10, 50):
        times = [round(999 * (1 - k / (n - 1))) for k in range(n)]
        for r in range(11):
            count = {
                rule: [
                    stitch_index(k if rule == "step" else t, fractions=r / 10, rule=rule, num_steps=n)
                    for k, t in enumerate(times)
                ].count(0)
                for rule in RULES
            }
            assert max(count.values()) - min(count.values()) <= 1


def test_the_rule_of_their_lcm_pipeline_is_a_step_more():
    for r in (0.25, 0.5):
        ours = [stitch_index(i, fractions=r + 1 / 4, num_steps=4) for i in range(4)]
        assert ours == [int(i / 4 > r) for i in range(4)]


def test_the_number_of_a_step_is_no_timestep():
    """The same number means nearly all of the way under one rule and its end under the other."""
    assert stitch_index(9, fractions=0.5, num_steps=50) == 0
    assert stitch_index(9, fractions=0.5, rule="timestep") == 1


def test_cost_and_the_best_within_it():
    assert stitched_cost((1, 20), 0.4, 10) == 4 * 1 + 6 * 20
    assert stitched_cost((1, 4, 20), (0.4, 0.2, 0.4), 10) == 4 + 8 + 80
    assert stitched_cost((0, 1), 0.0, 7, rule="timestep") == 7
    assert stitched_cost((1, 0), 0.5, 10, rule="timestep") == 5  # 999 to 555
    assert stitched_cost((1, 0), 0.5, 1, rule="progress") == 1
    asked = []

    def quality(fractions):
        asked.append(fractions)
        return fractions[-1] - (fractions[0] - 0.3) ** 2

    best = best_fractions(quality, (1.0, 10.0), budget=5.5)
    assert best == (0.5, 0.5) and len(asked) == 6 and all(f[0] >= 0.5 for f in asked)
    assert best_fractions(lambda f: 0.0, (1.0, 10.0), budget=10) == (1.0, 0.0)  # of equal ones the cheapest
    assert best_fractions(lambda f: -abs(f[1] - 0.25), (1, 2, 3), budget=3, grid=0.25)[1] == 0.25
    assert len({best_fractions(lambda f, k=k: f[k], (1, 2, 3), budget=3, grid=0.5) for k in range(3)}) == 3


# --- as a network -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_each_call_runs_one_model_and_gives_what_it_gives(rule):
    small, large = nets()
    times = [999, 749, 499, 249]
    model = StitchedDenoiser([small, large], 0.5, rule=rule)
    model.set_timesteps(torch.tensor(times))
    for k, t in enumerate(times):
        for given in (t, torch.tensor(t), torch.full((2,), t)):  # branches of a step share its model
            assert torch.equal(model(Z, given), 0 * Z if k < 2 else Z)
    assert {t: small.calls.count(t) for t in times} == {999: 3, 749: 3, 499: 0, 249: 0}
    assert {t: large.calls.count(t) for t in times} == {999: 0, 749: 0, 499: 3, 249: 3}


def test_without_a_list_falling_timesteps_are_counted():
    small, large = nets()
    model = StitchedDenoiser([small, large], 0.3, num_steps=10)
    for _ in range(2):  # from the top again
        small.calls.clear()
        large.calls.clear()
        for t in [1000 - (k / 10) ** 2 * 900 for k in range(10)]:  # shifted
            model(Z, t)
            model(Z, t)
        assert (len(small.calls), len(large.calls)) == (6, 14)


def test_a_new_list_replaces_the_old():
    small, large = nets()
    model = StitchedDenoiser([small, large], 0.5)
    for steps in (4, 8, 4):
        small.calls.clear()
        times = [1000 - 1000 * k // steps for k in range(steps)]
        model.set_timesteps(times)
        for t in times:
            model(Z, t)
        assert len(small.calls) == steps // 2 and model.num_steps == steps


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_a_second_call_of_a_step_keeps_the_model(rule, ratio):
    from diffusers import HeunDiscreteScheduler

    scheduler = HeunDiscreteScheduler()
    small, large = nets()
    model = StitchedDenoiser([small, large], ratio, rule=rule, scheduler=scheduler)
    for _ in range(2):
        scheduler.set_timesteps(8)
        small.calls.clear()
        large.calls.clear()
        chosen = [model.choose(t) for t in scheduler.timesteps]
        firsts = chosen[::2]
        assert chosen[1::2] == firsts[:-1]  # the second call is asked at the time of the next step's first
        assert abs(firsts.count(0) - 8 * ratio) <= (rule != "step")


def test_a_repeated_timestep_of_pndm():
    from diffusers import PNDMScheduler

    scheduler = PNDMScheduler(skip_prk_steps=True)
    scheduler.set_timesteps(4)
    model = StitchedDenoiser(nets(), 0.25)
    model.set_timesteps(scheduler.timesteps)
    assert [model.choose(t) for t in scheduler.timesteps] == [0, 0, 1, 1, 1] and model.num_steps == 4


def test_timesteps_in_low_precision_are_found():
    model = StitchedDenoiser(nets(), 0.5)
    times = [999 - 50 * k for k in range(20)]
    model.set_timesteps(times)
    assert [model.choose(torch.tensor([t, t]).bfloat16()) for t in times] == [0] * 10 + [1] * 10


def test_it_looks_like_the_largest_and_moves_nothing():
    small, large = tiny.unet(block_out_channels=(4, 8)), tiny.unet()
    before = [p.data_ptr() for p in (*small.parameters(), *large.parameters())]
    model = StitchedDenoiser([small, large], 0.5, num_steps=4)
    assert model.config is large.config and model.in_channels == 4
    assert model.dtype == torch.float32 and model.device == torch.device("cpu")
    assert model.conv_in is large.conv_in and not hasattr(model, "nothing")
    with torch.no_grad():
        text = torch.zeros(2, 3, 8)
        for t in (900, 600, 300, 0):
            chosen = small if t > 300 else large
            assert torch.equal(model(Z, t, text).sample, chosen(Z, t, text).sample)
            assert torch.equal(model(Z, t, encoder_hidden_states=text, return_dict=False)[0], chosen(Z, t, text)[0])
            assert torch.equal(model(sample=Z, timestep=t, encoder_hidden_states=text).sample, chosen(Z, t, text)[0])
    assert [p.data_ptr() for p in (*small.parameters(), *large.parameters())] == before
    assert model.half().dtype == torch.float16 and small.dtype == torch.float16


def test_gradients_go_through():
    small, large = nets()
    model = StitchedDenoiser([small, large], 0.5, num_steps=2)
    x = Z.clone().requires_grad_()
    (model(x, 900).sum() + model(x, 100).sum()).backward()
    assert torch.equal(x.grad, torch.ones_like(Z)) and small.weight.grad is not None


@pytest.mark.parametrize("wanted", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("own", ["epsilon", "sample", "v_prediction"])
def test_what_the_small_model_predicts_is_converted(own, wanted):
    process = VP.linear()
    x0, noise = Z.double(), Z.flip(0).double()
    names = {"epsilon": "noise", "sample": "x0", "v_prediction": "velocity"}
    alpha, sigma = (float(v) for v in process.levels(torch.tensor([600])))
    x = alpha * x0 + sigma * noise
    small = Net(0, lambda x, t: from_prediction(names[own], Prediction(x0, noise), alpha, sigma))
    model = StitchedDenoiser(
        [small, Net(1)], 1.0, num_steps=3, prediction_types=[own, wanted], processes=[process, VP.linear()]
    )
    expected = from_prediction(names[wanted], Prediction(x0, noise), alpha, sigma)
    torch.testing.assert_close(model(x, torch.tensor([600, 600])), expected)


# --- in the user's own pipeline ---------------------------------------------------------------------------------------

MAKES = [tiny.stable_diffusion, tiny.stable_diffusion_xl, tiny.dit, tiny.stable_diffusion_3, tiny.flux]


def run(pipe, make, generator=None):
    if make is tiny.dit:
        draw = torch.Generator().manual_seed(1)
        return torch.as_tensor(pipe([0, 1], num_inference_steps=4, generator=draw, output_type="np").images)
    if make is tiny.flux:
        draw = torch.Generator().manual_seed(1)
        size = {"height": 8, "width": 8, "generator": draw}
        return pipe(PROMPTS, num_inference_steps=4, output_type="latent", **size).images
    return pipe(PROMPTS, **LATENT).images


@pytest.mark.parametrize("make", MAKES)
def test_inside_pipelines_of_every_family(make):
    pipe, small = make(), counted(other(make))
    own = counted(tiny_network(pipe))
    config = dict(pipe.config)
    plain = run(pipe, make)
    for rule in RULES:
        own.count = small.count = 0
        with stitch_pipeline(pipe, small, 0.0, rule=rule):
            assert torch.equal(run(pipe, make), plain) and (small.count, own.count) == (0, 4)
    with stitch_pipeline(pipe, small, 0.5):
        own.count = small.count = 0
        half = run(pipe, make)
        assert (small.count, own.count) == (2, 2)
        assert torch.equal(run(pipe, make), half)
    with stitch_pipeline(pipe, small, (1.0, 0.0)):
        whole = run(pipe, make)
    with pytest.raises(KeyError), stitch_pipeline(pipe, small):
        raise KeyError
    assert tiny_network(pipe) is own and dict(pipe.config) == config
    assert torch.equal(run(pipe, make), plain) and not torch.allclose(half, plain)
    setattr(pipe, "transformer" if hasattr(pipe, "transformer") else "unet", small)
    assert torch.equal(run(pipe, make), whole)


@pytest.mark.parametrize("make", [tiny.stable_diffusion, tiny.stable_diffusion_xl, tiny.dit, tiny.stable_diffusion_3])
def test_the_pipeline_and_our_sampler_agree(make):
    pipe, small = make(), make()
    weights = other(make).state_dict()
    tiny_network(small).load_state_dict(weights)
    both = stitch([Denoiser.from_pipeline(small), Denoiser.from_pipeline(pipe)], 0.5)
    what = [0, 1] if make is tiny.dit else PROMPTS
    ours = sample(both, Z, what, times=4, guidance=cfg(5.0))
    assert torch.isfinite(ours).all()
    if make is not tiny.dit:  # whose pipeline takes no latents
        scale = {"guidance_scale": 5.0}
        with stitch_pipeline(pipe, small, 0.5):
            theirs = pipe(PROMPTS, **LATENT, **scale).images
            with attach(pipe, cfg(5.0)):
                guided = pipe(PROMPTS, **LATENT, **scale).images
        start = {"rtol": 1e-4, "atol": 1e-4 * float(theirs.abs().max())}
        torch.testing.assert_close(ours, theirs, **start)
        torch.testing.assert_close(guided, theirs, **start)


def test_it_may_be_given_to_a_pipeline_for_good():
    from diffusers import StableDiffusionPipeline

    pipe, small = tiny.stable_diffusion(), other(tiny.stable_diffusion)
    with stitch_pipeline(pipe, small, 0.5):
        expected = pipe(PROMPTS, **LATENT).images
    model = StitchedDenoiser([small, pipe.unet], 0.5, scheduler=pipe.scheduler)
    kept = StableDiffusionPipeline(**{**pipe.components, "unet": model}, requires_safety_checker=False)
    assert torch.equal(tiny.quiet(kept)(PROMPTS, **LATENT).images, expected)
    theirs = sample(Denoiser.from_pipeline(kept), Z, PROMPTS, times=4)
    assert torch.isfinite(theirs).all()


def test_a_multistep_solver_keeps_its_history_over_the_switch():
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    pipe, small = tiny.stable_diffusion(scheduler), tiny.stable_diffusion(scheduler)
    small.unet.load_state_dict(other(tiny.stable_diffusion).state_dict())
    with stitch_pipeline(pipe, small, 0.5):
        theirs = pipe(PROMPTS, **LATENT, guidance_scale=1.0).images
    both = stitch([Denoiser.from_pipeline(small), Denoiser.from_pipeline(pipe)], 0.5)
    ours = sample(both, Z, PROMPTS, times=4, step=dpmpp_2m)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


# --- in our sampler ---------------------------------------------------------------------------------------------------


def pair(process=None):
    """Two of different opinions, and their networks."""
    process = process or VP.linear()
    kind = "flow" if isinstance(process, Flow) else "noise"
    models = [Net(0.1), Net(0.3)]
    return models, [Denoiser(model, process, predicts=kind) for model in models]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("process", [VP.linear(), Flow(3.0)])
def test_limits_in_our_sampler(rule, process):
    (small, large), denoisers = pair(process)
    plain = [sample(denoiser, Z, times=10) for denoiser in denoisers]
    assert torch.equal(sample(stitch(denoisers, 0.0, rule=rule), Z, times=10), plain[1])
    assert torch.equal(sample(stitch(denoisers, 1.0, rule=rule), Z, times=10), plain[0])
    for ratio in (0.0, 0.3, 0.7, 1.0):
        same = stitch([denoisers[0]] * 2, ratio, rule=rule)
        assert torch.equal(sample(same, Z, times=10), plain[0])
    small.calls.clear()
    large.calls.clear()
    sample(stitch(denoisers, 0.3, rule=rule), Z, times=10)
    assert len(small.calls) + len(large.calls) == 10 and min(small.calls) > max(large.calls)
    if rule == "step":
        assert len(small.calls) == 3


def test_three_models_and_other_predictions():
    models = [Net(0.1), Net(0.2), Net(0.3)]
    kinds = ("velocity", "x0", "noise")
    denoisers = [Denoiser(m, VP.linear(), predicts=kind) for m, kind in zip(models, kinds, strict=True)]
    x = sample(stitch(denoisers, (0.4, 0.2, 0.4)), Z, times=10)
    assert [len(m.calls) for m in models] == [4, 2, 4]
    walked = Z
    levels = VP.linear().grid(10).levels
    for k, (here, there) in enumerate(pairwise(levels)):
        found = denoisers[0 if k < 4 else 1 if k < 6 else 2](walked, here)
        walked = there.alpha * found.x0 + there.sigma * found.noise
    assert torch.equal(x, walked)


def test_all_branches_of_a_step_are_one_models():
    (small, large), denoisers = pair()
    shares = cfg(2.0).within(0, 0.4) + cfg(4.0).within(0.4, 1)  # a scale of each model's own
    both = stitch(denoisers, 0.4)
    sample(both, Z, {"text": torch.zeros(1, 3)}, negative={"text": torch.ones(1, 3)}, times=5, guidance=shares)
    assert small.rows == [4, 4] and large.rows == [4, 4, 4]


def test_each_model_encodes_for_itself():
    seen = {"small": [], "large": []}

    def denoiser(name):
        class Told(nn.Module):
            def forward(self, x, t, label):
                seen[name].append(label.tolist())
                return 0 * x

        factor = 1 if name == "small" else 10
        return Denoiser(
            Told(), VP.linear(), encode=lambda texts: {"label": torch.tensor([factor * len(t) for t in texts])}
        )

    both = stitch([denoiser("small"), denoiser("large")], 0.5)
    sample(both, Z, ["a", "ab"], times=2, guidance=cfg(2.0))
    assert seen == {"small": [[0, 0, 1, 2]], "large": [[0, 0, 10, 20]]}
    assert both.encode(["a", "ab"], 2)["label"].tolist() == [10, 20]
    sample(both, Z, {"label": torch.tensor([5, 6])}, times=2)
    assert seen["small"][-1] == seen["large"][-1] == [5, 6]


@pytest.mark.parametrize("rule", RULES)
def test_heun_asks_one_model_within_a_step(rule):
    (small, large), denoisers = pair()
    both = stitch(denoisers, 0.5, rule=rule)
    held = sample(both, Z, times=4, step=one_model(heun))
    assert both.kept is None
    times = [level.time for level in VP.linear().grid(4).levels]
    first = len(small.calls) // 2
    assert small.calls == [t for both_ends in pairwise(times) for t in both_ends][: 2 * first]
    assert len(small.calls) + len(large.calls) == 7  # the last step is Euler's
    levels, x = VP.linear().grid(4).levels, Z
    for k, (here, there) in enumerate(pairwise(levels)):
        grid = [here, there]
        x = sample_one(denoisers[k >= first], x, grid)
    torch.testing.assert_close(held, x)
    one = sample(denoisers[0], Z, times=4, step=heun)
    assert torch.equal(sample(denoisers[0], Z, times=4, step=one_model(heun)), one)  # of others it is the step itself
    with pytest.raises(KeyError):
        sample(both, Z, times=4, step=one_model(failing))
    assert both.kept is None


def sample_one(denoiser, x, levels):
    from retouch.core.diffusion.process import Grid

    return sample(denoiser, x, times=Grid(tuple(levels), 1.0), step=heun)


def failing(move):
    raise KeyError


def test_modes_and_hooks_and_inversion():
    (small, large), denoisers = pair()
    small.train()
    both, seen = stitch(denoisers, 0.5), []

    class Watch(Hook):
        def before(self, x, level, denoiser, conditions):
            assert denoiser is both and not small.training
            seen.append(denoiser(x, level, conditions["cond"]).x0.shape)
            return x

    noise = sample(both, Z, times=4, hooks=[Watch()])
    assert len(seen) == 4 and small.training and large.training
    assert len(small.calls) == len(large.calls) == 4
    assert torch.isfinite(invert(both, noise, times=4)).all()


def test_small_first_is_nearer_to_the_large_model_than_large_first():
    """A model whose score is right only at high noise; the other is exact."""
    process, mixture = VP.linear(), ring(8)
    exact = mixture.denoiser(process)
    coarse = ring(8, std=0.3).denoiser(process)  # the same but for fine detail
    noise = torch.randn(256, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cond = only(mixture, [k % 8 for k in range(256)])

    def error(denoiser):
        wanted = sample(exact, noise, cond, times=20)
        return float((sample(denoiser, noise, cond, times=20) - wanted).square().mean())

    errors = [error(stitch([coarse, exact], r)) for r in (0.0, 0.2, 0.4, 0.6, 1.0)]
    assert errors[0] == 0 and errors[2] < 0.1 * errors[-1] and errors == sorted(errors)
    assert error(stitch([coarse, exact], 0.5)) < 0.3 * error(stitch([exact, coarse], 0.5))


# --- bad input --------------------------------------------------------------------------------------------------------


def wide(sample, timestep):
    return torch.cat([sample, sample], 1)


def called(model, *times):
    for t in times:
        model(Z, t)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (
            lambda: stitch_index(0, fractions=(-0.1, 1.1), num_steps=4),
            r"fractions\[0\] is -0.1, but must be at least 0",
        ),
        (lambda: stitch_index(0, fractions=(0.5, 0.4), num_steps=4), "fractions sum to 0.9, but must sum to 1"),
        (lambda: stitch_index(0, fractions=(0.5, 0.50001), num_steps=4), "must sum to 1"),
        (lambda: stitch_index(0, fractions=(1.0,), num_steps=4), "fractions has 1 entries, but must have at least 2"),
        (lambda: stitch_index(0, fractions=1.5, num_steps=4), "ratio is 1.5, but must be at least 0 and at most 1"),
        (lambda: stitch_index(0, fractions=(float("nan"), 1.0), num_steps=4), r"fractions\[0\] is nan"),
        (lambda: stitch_index(0, fractions=0.5), "num_steps is None, but must be the number of sampling steps"),
        (lambda: stitch_index(4, fractions=0.5, num_steps=4), "position is 4, but must be at least 0 and at most 3"),
        (lambda: stitch_index(1001, fractions=0.5, rule="timestep"), "position is 1001"),
        (lambda: stitch_index(0, fractions=0.5, rule="time"), "rule is 'time', but must be one of 'step'"),
        (lambda: stitched_cost((1, 2, 3), 0.5, 4), "fractions has 2 entries, but must have 3"),
        (lambda: best_fractions(sum, (1, 2), 0.5), "budget is 0.5, but must be at least 1"),
        (lambda: best_fractions(sum, (1, 2), 2, grid=0.3), "grid is 0.3"),
        (lambda: best_fractions(sum, (1,), 2), "costs has 1 entries"),
        (lambda: StitchedDenoiser(nets(1), (1.0,)), "denoisers has 1 entries, but must have at least 2"),
        (lambda: StitchedDenoiser(nets(3), 0.5), "fractions has 2 entries, but must have 3"),
        (lambda: called(StitchedDenoiser(nets(), 0.5), 900), "The rule 'step' must know the steps"),
        (
            lambda: called(StitchedDenoiser(nets(), 0.5, num_steps=4), torch.tensor([900, 800])),
            r"timestep holds \[800, 900\], but all samples of a batch must be at the same one",
        ),
        (
            lambda: called(StitchedDenoiser([Net(0, wide), Net(1)], 0.5, num_steps=2), 900, 100),
            r"Denoiser 1 puts out \(2, 4, 8, 8\), but must put out what the others do, \(2, 8, 8, 8\)",
        ),
        (
            lambda: StitchedDenoiser([tiny.unet(in_channels=5), tiny.unet()], 0.5),
            r"The denoisers have in_channels of \[5, 4\], but must have the same",
        ),
        (lambda: StitchedDenoiser(nets(), 0.5).set_timesteps([100, 200]), r"timesteps is \[100.0, 200.0\], but"),
        (lambda: StitchedDenoiser(nets(), 0.5, prediction_types=["noisy", "epsilon"]), "prediction_types is 'noisy'"),
        (lambda: StitchedDenoiser(nets(), 0.5, prediction_types=["epsilon"]), "prediction_types has 1 entries"),
        (
            lambda: StitchedDenoiser(nets(), 0.5, prediction_types=["sample", "epsilon"]),
            "which differ, so that processes must be given",
        ),
        (
            lambda: StitchedDenoiser(nets(), 0.5, processes=[VP.linear(), VP.cosine()]),
            "differ in their noise schedules",
        ),
        (lambda: stitch([pair()[1][0]], (1.0,)), "denoisers has 1 entries"),
        (lambda: stitch([pair()[1][0], pair(VP.cosine())[1][0]]), "must be trained with the same one"),
        (lambda: stitch([pair()[1][0], pair(Flow())[1][0]]), "must be trained with the same one"),
        (lambda: stitch(pair(EDM())[1], 0.5, rule="timestep"), "rule is 'timestep', but must be 'step'"),
    ],
)
def test_bad_input(wrong, words):
    with pytest.raises(InputError, match=words):
        wrong()


def test_a_timestep_that_is_not_on_the_list():
    model = StitchedDenoiser(nets(), 0.5)
    model.set_timesteps([900, 600, 300, 0])
    with pytest.raises(InputError, match="timestep is 450, but must be one of those that set_timesteps was given"):
        model(Z, 450)


def test_pipelines_of_another_schedule_are_refused():
    from diffusers import DDIMScheduler

    pipe = tiny.stable_diffusion()
    for wrong in (tiny.stable_diffusion(DDIMScheduler()), tiny.stable_diffusion_3()):
        with pytest.raises(InputError, match="differ in their noise schedules"), stitch_pipeline(pipe, wrong):
            pass
    assert type(pipe.unet).__name__ == "UNet2DConditionModel"


def test_a_wrong_shape_in_our_sampler():
    flat = Denoiser(Net(0, lambda x, t: x[:, :1]), VP.linear(), predicts="x0")
    with pytest.raises(InputError, match="Denoiser 0 predicts"):
        sample(stitch([flat, pair()[1][1]], 0.5), Z, times=2, step=ddim)
