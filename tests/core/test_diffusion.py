"""Noise levels, denoisers, steps, guidance and sampling: the same images as diffusers makes, in every family."""

import itertools
import math

import pytest
import tiny_pipelines as tiny
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
)
from torch import nn

from retouch.core.diffusion.attach import attach
from retouch.core.diffusion.denoiser import Denoiser, Prediction, from_prediction, to_prediction
from retouch.core.diffusion.guidance import AttentionEdit, Guidance, cfg, difference
from retouch.core.diffusion.process import EDM, VP, Flow, Level, from_scheduler
from retouch.core.diffusion.sampling import Hook, invert, sample
from retouch.core.diffusion.steps import Move, ancestral_sigma, ddim, ddim_inverse, ddpm, dpmpp_2m, euler, heun
from retouch.core.errors import InputError

PROMPTS = ["a red circle", "a large blue square"]
Z = tiny.latents()
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * max(1.0, float(theirs.abs().max())))


# --- the same as diffusers --------------------------------------------------------------------------------------------

SCHEDULERS = {
    "ddim": (None, ddim),
    "ddim to alpha one": (DDIMScheduler(**SD, clip_sample=False, steps_offset=1), ddim),
    "ddim, trailing": (DDIMScheduler(**SD, clip_sample=False, timestep_spacing="trailing", steps_offset=1), ddim),
    "ddim, velocity": (
        DDIMScheduler(**SD, clip_sample=False, prediction_type="v_prediction", steps_offset=1),
        ddim,
    ),
    "euler": (EulerDiscreteScheduler(**SD, steps_offset=1), euler),
    "euler, leading": (EulerDiscreteScheduler(**SD, timestep_spacing="leading", steps_offset=1), euler),
    "euler, Karras": (EulerDiscreteScheduler(**SD, use_karras_sigmas=True, steps_offset=1), euler),
    "dpm++": (DPMSolverMultistepScheduler(**SD, steps_offset=1), dpmpp_2m),
    "dpm++, Karras": (DPMSolverMultistepScheduler(**SD, use_karras_sigmas=True, steps_offset=1), dpmpp_2m),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_stable_diffusion_with_any_scheduler(name):
    scheduler, step = SCHEDULERS[name]
    pipe = tiny.stable_diffusion(scheduler)
    settings = {"num_inference_steps": 5, "guidance_scale": 4.0, "latents": Z, "output_type": "latent"}
    theirs = pipe(PROMPTS, negative_prompt=["gray", ""], **settings).images
    denoiser = Denoiser.from_pipeline(pipe)
    ours = sample(denoiser, Z, PROMPTS, negative=["gray", ""], times=5, step=step, guidance=cfg(4.0))
    close(ours, theirs)
    settings["guidance_scale"] = 1.0
    close(sample(denoiser, Z, PROMPTS, times=5, step=step), pipe(PROMPTS, **settings).images)


def test_noise_of_ddpm_is_that_of_diffusers_with_the_same_generator():
    pipe = tiny.stable_diffusion(DDIMScheduler(**SD, clip_sample=False, steps_offset=1))
    generator = torch.Generator().manual_seed(3)
    settings = {"num_inference_steps": 5, "guidance_scale": 4.0, "latents": Z, "output_type": "latent"}
    theirs = pipe(PROMPTS, eta=1.0, generator=generator, **settings).images
    denoiser = Denoiser.from_pipeline(pipe)
    generator = torch.Generator().manual_seed(3)
    close(sample(denoiser, Z, PROMPTS, times=5, step=ddpm, guidance=cfg(4.0), generator=generator), theirs)


def test_other_families():
    xl = tiny.stable_diffusion_xl()
    settings = {"num_inference_steps": 5, "guidance_scale": 4.0, "latents": Z}
    theirs = xl(PROMPTS, output_type="latent", **settings).images
    denoiser = Denoiser.from_pipeline(xl)
    close(sample(denoiser, Z, PROMPTS, times=5, guidance=cfg(4.0)), theirs)
    theirs = xl(PROMPTS, negative_prompt="gray", output_type="latent", **settings).images
    close(sample(denoiser, Z, PROMPTS, negative="gray", times=5, guidance=cfg(4.0)), theirs)

    three = tiny.stable_diffusion_3()
    theirs = three(PROMPTS, output_type="latent", height=8, width=8, **settings).images
    close(sample(Denoiser.from_pipeline(three), Z, PROMPTS, times=5, step=euler, guidance=cfg(4.0)), theirs)

    dit = tiny.dit()
    generator = torch.Generator().manual_seed(0)
    theirs = dit([0, 1], guidance_scale=4.0, num_inference_steps=5, generator=generator, output_type="np").images
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    denoiser = Denoiser.from_pipeline(dit)
    for labels in ([0, 1], ["circle", "square"], torch.tensor([0, 1])):
        ours = denoiser.decode(sample(denoiser, noise, labels, times=5, guidance=cfg(4.0)))
        close(ours, torch.tensor(theirs).permute(0, 3, 1, 2))

    pixart = tiny.pixart()
    call = {"height": 8, "width": 8, "use_resolution_binning": False, "output_type": "latent"}
    theirs = pixart(PROMPTS, negative_prompt=["gray", ""], **call, **settings).images
    denoiser = Denoiser.from_pipeline(pixart)
    close(sample(denoiser, Z, PROMPTS, negative=["gray", ""], times=5, step=dpmpp_2m, guidance=cfg(4.0)), theirs)
    both = cfg(4.0) + perturb(1.0)
    with attach(pixart, both):
        theirs = pixart(PROMPTS, negative_prompt=["gray", ""], **call, **settings).images
    close(sample(denoiser, Z, PROMPTS, negative=["gray", ""], times=5, step=dpmpp_2m, guidance=both), theirs)

    flux = tiny.flux()
    packed = flux._pack_latents(Z, 2, 4, 8, 8)
    call = {"num_inference_steps": 5, "latents": packed, "height": 8, "width": 8, "output_type": "latent"}
    theirs = flux(PROMPTS, guidance_scale=1.0, true_cfg_scale=3.0, negative_prompt=["", ""], **call).images
    ours = sample(Denoiser.from_pipeline(flux), Z, PROMPTS, times=5, guidance=cfg(3.0))
    close(flux._pack_latents(ours, 2, 4, 8, 8), theirs)


def test_images_are_those_of_the_pipeline():
    pipe = tiny.stable_diffusion()
    theirs = pipe(PROMPTS, num_inference_steps=3, guidance_scale=2.0, latents=Z, output_type="np").images
    denoiser = Denoiser.from_pipeline(pipe)
    ours = denoiser.decode(sample(denoiser, Z, PROMPTS, times=3, guidance=cfg(2.0)))
    close(ours, torch.tensor(theirs).permute(0, 3, 1, 2))


def test_a_pixel_unet_with_ddpm():
    unet, scheduler = tiny.pixel_unet(), DDPMScheduler(clip_sample=False)
    noise, generator = tiny.latents(channels=3), torch.Generator().manual_seed(1)
    scheduler.set_timesteps(5)
    x = noise
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(unet(x, t).sample, t, x, generator=generator).prev_sample
    ours = sample(
        Denoiser(unet, from_scheduler(scheduler)),
        noise,
        times=5,
        step=ddpm,
        generator=torch.Generator().manual_seed(1),
    )
    close(ours, x)


# --- noise levels -----------------------------------------------------------------------------------------------------


def test_levels_of_each_process():
    vp = VP.linear()
    alpha, sigma = vp.levels(torch.arange(1000))
    torch.testing.assert_close(alpha.square() + sigma.square(), torch.ones(1000, dtype=torch.float64))
    torch.testing.assert_close(alpha.square().float(), DDPMScheduler().alphas_cumprod)
    torch.testing.assert_close(VP.scaled_linear().alphas_cumprod.float(), DDIMScheduler(**SD).alphas_cumprod)
    theirs = DDIMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod
    torch.testing.assert_close(VP.cosine().alphas_cumprod.float(), theirs, rtol=1e-4, atol=1e-6)
    between = vp.levels(torch.tensor([10.5]))
    ratio = [s / a for a, s in zip(*(v.tolist() for v in vp.levels(torch.tensor([10, 11]))), strict=True)]
    assert float(between[1] / between[0]) == pytest.approx(sum(ratio) / 2)
    assert float(between[0] ** 2 + between[1] ** 2) == pytest.approx(1)
    assert [v.tolist() for v in EDM().levels(torch.tensor([2.0]))] == [[1.0], [2.0]]
    assert [v.tolist() for v in Flow().levels(torch.tensor([250.0]))] == [[0.75], [0.25]]


@pytest.mark.parametrize("process", [VP.linear(), VP.cosine(spacing="trailing"), EDM(), Flow(shift=3.0)])
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_grids_fall_to_the_data(process, steps):
    grid = process.grid(steps)
    ratios = [level.ratio for level in grid.levels]
    assert grid.steps == steps and ratios == sorted(ratios, reverse=True) and ratios[-1] == 0
    assert [level.index for level in grid.levels] == list(range(steps + 1))
    assert all(level.steps == steps for level in grid.levels)


def test_the_grid_of_edm_is_equation_five():
    sigmas = [level.sigma for level in EDM().grid(18).levels]
    assert sigmas[0] == pytest.approx(80) and sigmas[17] == pytest.approx(0.002) and sigmas[18] == 0
    a, b = 80 ** (1 / 7), 0.002 ** (1 / 7)
    assert sigmas[5] == pytest.approx((a + 5 / 17 * (b - a)) ** 7)


def test_noise_is_added_per_sample():
    x0, noise = torch.ones(2, 3, 4, 4, 4), torch.full((2, 3, 4, 4, 4), 2.0)  # clips as well as images
    x = VP.linear().add_noise(x0, noise, torch.tensor([0, 999]))
    bars = DDPMScheduler().alphas_cumprod[[0, 999]]
    torch.testing.assert_close(x[:, 0, 0, 0, 0], bars.sqrt() + 2 * (1 - bars).sqrt())
    assert x.dtype == torch.float32
    for process in (VP.linear(), EDM(), Flow()):
        times = process.random_times(100, torch.Generator().manual_seed(0))
        assert times.shape == (100,)
        torch.testing.assert_close(times, process.random_times(100, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("predicts", ["noise", "x0", "velocity", "flow"])
@pytest.mark.parametrize("process", [VP.linear(), EDM(), Flow()])
def test_every_kind_of_prediction_is_read_back(predicts, process):
    draw = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(2, 3, generator=draw, dtype=torch.float64) for _ in range(2))
    level = process.grid(8).levels[3]
    x = level.alpha * x0 + level.sigma * noise
    output = from_prediction(predicts, Prediction(x0, noise), level.alpha, level.sigma)
    found = to_prediction(predicts, output, x, level.alpha, level.sigma)
    torch.testing.assert_close(found.x0, x0)
    torch.testing.assert_close(found.noise, noise)


# --- steps ------------------------------------------------------------------------------------------------------------


def gaussian(std=0.5, mean=0.3):
    """The exact denoiser of N(mean, std^2) for any process."""

    class Exact(nn.Module):
        def forward(self, x, level):
            weight = level.alpha * std**2 / (level.alpha**2 * std**2 + level.sigma**2)
            return mean + weight * (x - level.alpha * mean)

    class Asked(Denoiser):
        def _ask(self, x, level, condition):
            return to_prediction("x0", self.model(x, level), x, level.alpha, level.sigma)

    return lambda process: Asked(Exact(), process)


@pytest.mark.parametrize("process", [VP.linear(), EDM(), Flow()])
@pytest.mark.parametrize("step", [ddim, ddpm, heun, dpmpp_2m])
def test_samples_of_a_gaussian_are_those_of_a_gaussian(process, step):
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(4000, 1, generator=draw, dtype=torch.float64)
    x = sample(gaussian()(process), noise, times=100, step=step, generator=draw)
    assert float(x.mean()) == pytest.approx(0.3, abs=0.03)
    assert float(x.std()) == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize("process", [VP.linear(spacing="trailing"), EDM(sigma_max=20.0), Flow()])
def test_higher_orders_are_closer_to_the_exact_path(process):
    """On a Gaussian the path is known: x - alpha mean grows as sqrt(alpha^2 std^2 + sigma^2)."""
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(200, 1, generator=draw, dtype=torch.float64)
    grid = process.grid(20)
    first = grid.levels[0]
    spread = math.sqrt(first.alpha**2 * 0.25 + first.sigma**2)
    exact = 0.3 + (noise * grid.start - first.alpha * 0.3) * 0.5 / spread
    errors = {
        step.__name__: float((sample(gaussian()(process), noise, times=grid, step=step) - exact).abs().mean())
        for step in (ddim, heun, dpmpp_2m)
    }
    assert errors["heun"] < 0.4 * errors["ddim"], errors
    assert errors["dpmpp_2m"] < 0.5 * errors["ddim"], errors


def test_heun_is_edms():
    sigma_data = 0.5

    def denoise(x, sigma):
        return x * sigma_data**2 / (sigma_data**2 + sigma**2)

    sigmas = [level.sigma for level in EDM().grid(6).levels]
    noise = tiny.latents().double()
    x = noise * sigmas[0]
    for now, after in itertools.pairwise(sigmas):
        slope = (x - denoise(x, now)) / now
        end = x + (after - now) * slope
        if after:
            end = x + (after - now) * (slope + (end - denoise(end, after)) / after) / 2
        x = end
    ours = sample(gaussian(std=0.5, mean=0.0)(EDM()), noise, times=6, step=heun)
    torch.testing.assert_close(ours, x)


def test_preconditioning_of_edm():
    class Network(nn.Module):
        def forward(self, x, t):
            seen.append((x.clone(), t.clone()))
            return torch.ones_like(x)

    seen = []
    denoiser = Denoiser(Network(), EDM(), predicts="edm")
    level = Level(2.0, 1.0, 2.0)
    found = denoiser(Z, level)
    torch.testing.assert_close(seen[0][0], Z / math.sqrt(4.25))
    assert float(seen[0][1][0]) == pytest.approx(0.25 * math.log(2.0))
    torch.testing.assert_close(found.x0, 0.25 / 4.25 * Z + 2 * 0.5 / math.sqrt(4.25))


def test_noise_of_an_ancestral_step():
    a, b = 0.3, 0.6
    here, there = Level(0, a**0.5, (1 - a) ** 0.5), Level(0, b**0.5, (1 - b) ** 0.5)
    assert ancestral_sigma(here, there) ** 2 == pytest.approx((1 - b) / (1 - a) * (1 - a / b))  # DDPM
    here, there = Level(0, 1.0, 3.0), Level(0, 1.0, 2.0)
    assert ancestral_sigma(here, there) ** 2 == pytest.approx(4 * (9 - 4) / 9)  # ancestral Euler


def test_steps_keep_x0_and_noise_apart():
    """As CFG++ needs it: first-order parts renoise with the noise given, whatever x0 was predicted with."""
    x0, noise = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0))
    here, there = Level(0, 0.6, 0.8), Level(0, 0.8, 0.6)
    move = Move(Z, Prediction(x0, noise), here, there, lambda *_: None)
    for step in (ddim, dpmpp_2m):
        torch.testing.assert_close(step(move), 0.8 * x0 + 0.6 * noise)


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_branches_are_one_batch_and_inactive_ones_are_not_asked():
    unet, sizes = tiny.unet(), []
    unet.register_forward_pre_hook(lambda module, args, kwargs: sizes.append(len(args[0])), with_kwargs=True)
    text = {"encoder_hidden_states": torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))}
    empty = {"encoder_hidden_states": torch.zeros(1, 5, 8)}
    denoiser = Denoiser(unet, VP.scaled_linear(), null=empty)
    sample(denoiser, Z, text, times=4, guidance=cfg(3.0).within(0.25, 0.75))
    assert sizes == [2, 4, 4, 2]
    sizes.clear()
    sample(denoiser, Z, text, times=3)
    assert sizes == [2, 2, 2]
    sizes.clear()
    sample(denoiser, Z, text, times=3, step=heun)
    assert sizes == [2] * 5


def test_guidances_add_up():
    push = Guidance(
        name="push",
        branches={"other": "uncond"},
        change=lambda found, x, level: difference(found["cond"], found["other"], 2.0),
    )
    both = cfg(3.0) + push
    assert list(both.branches) == ["uncond", "cond", "other"]
    one = {
        name: Prediction(torch.full((1,), v), torch.full((1,), -v))
        for name, v in zip("abc", (1.0, 5.0, 2.0), strict=True)
    }
    found = {"uncond": one["a"], "cond": one["b"], "other": one["c"]}
    result = both.combine(found, Z, Level(0, 1, 1))
    assert float(result.x0) == 5 + 2 * (5 - 1) + 2 * (5 - 2) and float(result.noise) == -float(result.x0)
    assert float(cfg(1.0).active(Level(0, 1, 1))) == 1
    again = Guidance(name="again", change=push.change, renoise="uncond")
    assert float((push + again + cfg(1.0)).combine(found, Z, Level(0, 1, 1)).noise) == -1.0
    with pytest.raises(InputError, match="Two guidances take the noise from other and uncond"):
        again + Guidance(name="x", change=push.change, renoise="other")
    with pytest.raises(InputError, match="the branch other with different conditions"):
        _ = (push + Guidance(name="x", branches={"other": "cond"}, change=push.change)).branches
    with pytest.raises(InputError, match="stop is 0.1, but must be at least 0.5"):
        cfg().within(0.5, 0.1)


def test_hooks_see_every_step_and_may_change_it():
    class Note(Hook):
        def start(self, x, grid):
            self.events, self.grid, self.seen = [], grid, None

        def before(self, x, level, denoiser, conditions):
            with torch.enable_grad():
                z = x.clone().requires_grad_()
                (slope,) = torch.autograd.grad(denoiser(z, level, conditions["cond"]).x0.sum(), z)
            assert slope.abs().sum() > 0
            self.events.append(("before", level.index))
            return x + 1

        def predicted(self, move):
            assert self.seen is None or torch.equal(move.x, self.seen + 1)
            self.events.append(("predicted", move.here.index))
            return Prediction(torch.zeros_like(move.x), move.prediction.noise)

        def after(self, move, x):
            torch.testing.assert_close(x, move.there.sigma * move.prediction.noise)
            self.seen = x
            self.events.append(("after", move.there.index))
            return x

    note = Note()
    denoiser = Denoiser(tiny.pixel_unet(), VP.linear())
    x = sample(denoiser, tiny.latents(channels=3), times=2, hooks=[note])
    assert note.events == [("before", 0), ("predicted", 0), ("after", 1), ("before", 1), ("predicted", 1), ("after", 2)]
    assert not x.abs().sum()
    assert sample(denoiser, tiny.latents(channels=3), times=2, hooks=[note], last="x0").abs().sum() == 0


def test_the_model_is_left_as_it_was(global_rng_untouched):
    unet = tiny.pixel_unet().train()
    denoiser = Denoiser(unet, VP.linear())
    x = sample(denoiser, tiny.latents(channels=3), times=2, step=ddpm, generator=torch.Generator().manual_seed(0))
    assert unet.training and not x.requires_grad
    assert all(p.grad is None and p.requires_grad for p in unet.parameters())
    sample(denoiser, tiny.latents(channels=3), times=2, step=ddpm)  # without a generator


@pytest.mark.parametrize("process", [VP.linear(), EDM(), Flow()])
def test_inversion_and_back(process):
    denoiser, x = gaussian()(process), torch.linspace(-1, 1.5, 20, dtype=torch.float64)[:, None]
    errors = []
    for times in (50, 400):
        noise = invert(denoiser, x, times=times)
        errors.append(float((sample(denoiser, noise, times=times) - x).abs().mean()))
    assert errors[1] < 0.3 * errors[0] and errors[1] < 0.08, errors


def test_a_step_and_its_inverse_with_the_same_predictions():
    draw = torch.Generator().manual_seed(0)
    x, cond, uncond = (torch.randn(2, 3, generator=draw, dtype=torch.float64) for _ in range(3))
    here, there = Level(0, 0.6, 0.8), Level(0, 0.8, 0.6)
    guided = uncond + 0.6 * (cond - uncond)

    def predicted(x, level):
        return Prediction((x - level.sigma * guided) / level.alpha, uncond)

    moved = ddim(Move(x, predicted(x, here), here, there, lambda *_: None))
    torch.testing.assert_close(ddim_inverse(moved, predicted(moved, here), there, here), x)


# --- inside a pipeline ------------------------------------------------------------------------------------------------


def perturb(scale):
    """Away from the same prediction with the values of attention in place of attention."""

    def edit(call):
        if "perturbed" not in call.branches:
            return call.original()
        result = call.original().clone()
        result[call.branch("perturbed")] = call.value[call.branch("perturbed")]
        return result

    return Guidance(
        name="perturb",
        branches={"perturbed": "cond"},
        change=lambda found, x, level: difference(found["cond"], found["perturbed"], scale),
        edits=(AttentionEdit(function=edit, kind="self"),),
    )


def split(scale):
    """x0 from the guided prediction, noise from the unconditional one."""

    def change(found, x, level):
        return difference(found["cond"], found["uncond"], scale - 1)

    return Guidance(name="split", branches={"uncond": "uncond"}, change=change, renoise="uncond")


@pytest.mark.parametrize("make", [tiny.stable_diffusion, tiny.stable_diffusion_xl, tiny.stable_diffusion_3])
def test_attached_to_a_pipeline_it_is_the_same_as_in_our_sampler(make):
    pipe = make()
    denoiser = Denoiser.from_pipeline(pipe)
    size = {"height": 8, "width": 8} if make is tiny.stable_diffusion_3 else {}
    call = {"num_inference_steps": 4, "latents": Z, "output_type": "latent", **size}
    before = pipe(PROMPTS, guidance_scale=3.0, **call).images
    joint = make is tiny.stable_diffusion_3
    rule = perturb(2.0) if not joint else cfg(5.0)
    with attach(pipe, rule):
        theirs = pipe(PROMPTS, guidance_scale=3.0, **call).images
    ours = sample(denoiser, Z, PROMPTS, times=4, guidance=cfg(5.0) if joint else cfg(3.0) + rule)
    close(theirs, ours)
    assert not torch.allclose(theirs, before, rtol=1e-2)
    with attach(pipe, split(0.6)):
        theirs = pipe(PROMPTS, guidance_scale=3.0, **call).images
    close(theirs, sample(denoiser, Z, PROMPTS, times=4, guidance=split(0.6)))
    if not joint:
        with attach(pipe, perturb(2.0)):
            theirs = pipe(PROMPTS, guidance_scale=1.0, **call).images
        close(theirs, sample(denoiser, Z, PROMPTS, times=4, guidance=perturb(2.0)))
        with attach(pipe, perturb(2.0).within(0.0, 0.5) + split(0.6)):
            theirs = pipe(PROMPTS, guidance_scale=2.0, **call).images
        close(theirs, sample(denoiser, Z, PROMPTS, times=4, guidance=perturb(2.0).within(0.0, 0.5) + split(0.6)))
    assert torch.equal(pipe(PROMPTS, guidance_scale=3.0, **call).images, before)


def test_attached_to_dit():
    pipe = tiny.dit()
    settings = {"guidance_scale": 4.0, "num_inference_steps": 4, "output_type": "np"}
    with attach(pipe, cfg(2.0) + perturb(1.0)):
        theirs = pipe([0, 1], generator=torch.Generator().manual_seed(0), **settings).images
    denoiser = Denoiser.from_pipeline(pipe)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    ours = denoiser.decode(sample(denoiser, noise, [0, 1], times=4, guidance=cfg(2.0) + perturb(1.0)))
    close(torch.tensor(theirs).permute(0, 3, 1, 2), ours)
    with attach(pipe, split(0.6)):
        theirs = pipe([0, 1], generator=torch.Generator().manual_seed(0), **settings).images
    ours = denoiser.decode(sample(denoiser, noise, [0, 1], times=4, guidance=split(0.6)))
    close(torch.tensor(theirs).permute(0, 3, 1, 2), ours)
    with attach(pipe, perturb(1.0)), pytest.raises(InputError, match="does not tell its guidance scale"):
        pipe([0, 1], **settings)


class Nudge(Hook):
    """Moves what comes in by a gradient of the model, and counts."""

    def __init__(self):
        self.starts, self.levels = 0, []

    def start(self, x, grid):
        self.starts, self.levels = self.starts + 1, []

    def before(self, x, level, denoiser, conditions):
        self.levels.append((level.index, level.steps))
        with torch.enable_grad():
            z = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(denoiser(z, level, conditions["cond"]).x0.square().sum(), z)
        return x - 0.05 * gradient / gradient.std()


class Shrink(Nudge):
    """Also rewrites x0 alone, and what a step gives; it sees where it is."""

    def predicted(self, move):
        assert move.x.shape == move.prediction.x0.shape and move.there.sigma < move.here.sigma
        return Prediction(0.5 * move.prediction.x0, move.prediction.noise)

    def after(self, move, x):
        return x + 0.1 * move.there.sigma


@pytest.mark.parametrize("scheduler", ["ddim, velocity", "euler, leading"])
@pytest.mark.parametrize("hook", [Nudge, Shrink])
@pytest.mark.parametrize("rule", [None, cfg(3.0), split(0.6)], ids=["none", "cfg", "split"])
def test_hooks_attached_to_a_pipeline_do_what_they_do_in_our_sampler(scheduler, hook, rule):
    pipe = tiny.stable_diffusion(SCHEDULERS[scheduler][0])
    call = {"num_inference_steps": 4, "output_type": "latent", "guidance_scale": 3.0}
    before = pipe(PROMPTS, latents=Z, **call).images
    seen = hook()
    for _ in range(2):
        with attach(pipe, rule, hooks=[seen]):
            theirs = pipe(PROMPTS, latents=Z, **call).images
        assert seen.levels == [(k, 4) for k in range(4)]
    assert seen.starts == 2
    ours = sample(Denoiser.from_pipeline(pipe), Z, PROMPTS, times=4, guidance=rule or cfg(3.0), hooks=[hook()])
    close(theirs, ours)
    assert not torch.allclose(theirs, before, rtol=1e-2)
    assert torch.equal(pipe(PROMPTS, latents=Z, **call).images, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipe.unet.modules())


@pytest.mark.parametrize("make", [tiny.stable_diffusion_xl, tiny.stable_diffusion_3, tiny.pixart])
def test_hooks_attached_to_other_families(make):
    pipe = make()
    size = {} if make is tiny.stable_diffusion_xl else {"height": 8, "width": 8}
    if make is tiny.pixart:
        size["use_resolution_binning"] = False
    call = {"num_inference_steps": 4, "latents": Z, "output_type": "latent", "guidance_scale": 3.0, **size}
    with attach(pipe, hooks=[Nudge()]):
        theirs = pipe(PROMPTS, **call).images
    step = dpmpp_2m if make is tiny.pixart else ddim
    denoiser = Denoiser.from_pipeline(pipe)
    close(theirs, sample(denoiser, Z, PROMPTS, times=4, step=step, guidance=cfg(3.0), hooks=[Nudge()]))


def test_hooks_attached_to_dit():
    pipe = tiny.dit()
    settings = {"guidance_scale": 4.0, "num_inference_steps": 4, "output_type": "np"}
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    denoiser = Denoiser.from_pipeline(pipe)
    for hook in (Nudge, Shrink):
        with attach(pipe, cfg(4.0), hooks=[hook()]):
            theirs = pipe([0, 1], generator=torch.Generator().manual_seed(0), **settings).images
        ours = denoiser.decode(sample(denoiser, noise, [0, 1], times=4, guidance=cfg(4.0), hooks=[hook()]))
        close(torch.tensor(theirs).permute(0, 3, 1, 2), ours)


def test_hooks_that_only_move_latents_do_not_care_how_the_scheduler_steps():
    pipe = tiny.stable_diffusion(DPMSolverMultistepScheduler(**SD, steps_offset=1))
    call = {"num_inference_steps": 4, "latents": Z, "output_type": "latent", "guidance_scale": 3.0}
    with attach(pipe, hooks=[Nudge()]):
        theirs = pipe(PROMPTS, **call).images
    denoiser = Denoiser.from_pipeline(pipe)
    close(theirs, sample(denoiser, Z, PROMPTS, times=4, guidance=cfg(3.0), step=dpmpp_2m, hooks=[Nudge()]))
    with pytest.raises(InputError, match="for Shrink"), attach(pipe, hooks=[Shrink()]):
        pass


def test_a_block_inside_of_another_is_refused():
    pipe, other = tiny.stable_diffusion(), tiny.stable_diffusion()
    with attach(pipe, perturb(2.0)):
        with pytest.raises(InputError, match="has something attached already"), attach(pipe, hooks=[Nudge()]):
            pass
        with attach(other, cfg(2.0)):
            pass
    with attach(pipe, cfg(2.0)):
        pass


def test_hooks_start_anew_where_a_run_begins_in_the_middle():
    pipe, hook = tiny.stable_diffusion(), Nudge()
    with attach(pipe, hooks=[hook]):
        for _ in range(2):
            pipe.scheduler.set_timesteps(4)
            for time in pipe.scheduler.timesteps[2:]:
                noise = pipe.unet(Z, time, encoder_hidden_states=torch.zeros(2, 12, 8)).sample
                pipe.scheduler.step(noise, time, Z)
    assert hook.starts == 2 and hook.levels == [(2, 4), (3, 4)]


def test_a_hook_that_fails_leaves_nothing_behind():
    class Failing(Hook):
        def before(self, x, level, denoiser, conditions):
            denoiser(x, level, conditions["cond"])
            raise RuntimeError("no")

    pipe = tiny.stable_diffusion()
    call = {"num_inference_steps": 2, "latents": Z, "output_type": "latent"}
    before = pipe(PROMPTS, **call).images
    with pytest.raises(RuntimeError, match="no"), attach(pipe, cfg(3.0), hooks=[Failing()]):
        pipe(PROMPTS, **call)
    assert torch.equal(pipe(PROMPTS, **call).images, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipe.unet.modules())


def test_attachments_that_cannot_work():
    pipe = tiny.stable_diffusion(DPMSolverMultistepScheduler(**SD, steps_offset=1))
    before = pipe(PROMPTS, num_inference_steps=2, latents=Z, output_type="latent").images
    with pytest.raises(InputError, match="scheduler is a DPMSolverMultistepScheduler"), attach(pipe, split(0.6)):
        pass
    with attach(pipe, cfg(3.0)), pytest.raises(InputError, match="guidance_scale is 1 or less"):
        pipe(PROMPTS, num_inference_steps=2, guidance_scale=1.0, latents=Z)
    assert torch.equal(pipe(PROMPTS, num_inference_steps=2, latents=Z, output_type="latent").images, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipe.unet.modules())


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: Denoiser(nn.Linear(2, 2), VP.linear(), predicts="epsilons"), "predicts is 'epsilons'"),
        (lambda: Denoiser(nn.Linear(2, 2), VP.linear(), predicts="edm"), "must go with the process EDM"),
        (lambda: VP(torch.tensor([0.1, 0.5])), "alphas_cumprod must fall"),
        (lambda: VP(torch.ones(2, 2)), r"shape \(2, 2\)"),
        (lambda: VP.linear(spacing="even"), "spacing is 'even'"),
        (lambda: VP.linear().grid(0), "steps is 0"),
        (lambda: VP.linear().grid(2000), "steps is 2000, but must be at least 1 and at most 1000"),
        (lambda: EDM(sigma_max=0.001), "sigma_max is 0.001"),
        (lambda: Flow(shift=0), "shift is 0"),
        (lambda: from_scheduler(object()), "scheduler is a object"),
        (lambda: cfg(-1.0), "scale is -1.0"),
        (lambda: sample(Denoiser(nn.Linear(2, 2), VP.linear()), Z, last="y"), "last is 'y'"),
        (lambda: sample(Denoiser(tiny.unet(), VP.linear()), Z, "a circle"), "this denoiser has no encoder"),
        (lambda: sample(tiny_denoiser(), Z, ["a circle"] * 3), "condition has 3 parts, but must have 2"),
        (lambda: sample(tiny_denoiser(), Z, {"encoder_hidden_states": torch.zeros(3, 5, 8)}), "has 3 rows"),
        (lambda: sample(tiny_denoiser(), Z, "a red circle " * 9), "of 29 tokens, but must have at most 12"),
        (lambda: sample(Denoiser.from_pipeline(tiny.dit()), Z, "triangle"), "must be a class number or a name"),
        (lambda: sample(Denoiser.from_pipeline(tiny.dit()), Z, 2000), "must be a class from 0 to 999"),
        (lambda: Denoiser.from_pipeline(nn.Linear(2, 2)), "pipeline is a Linear, but must be one of Stable"),
    ],
)
def test_bad_input(wrong, words):
    with pytest.raises(InputError, match=words):
        wrong()


def tiny_denoiser():
    return Denoiser.from_pipeline(tiny.stable_diffusion())


def test_schedulers_made_like_known_ones():
    assert isinstance(from_scheduler(PNDMScheduler(**SD)), VP)
