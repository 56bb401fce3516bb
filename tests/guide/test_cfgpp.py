"""CFG++: its identities with plain guidance, exact inversion, and the same steps in every sampler and pipeline."""

import itertools
import warnings

import pytest
import tiny_pipelines as tiny
import torch

from retouch.core.diffusion.denoiser import Denoiser, Prediction
from retouch.core.diffusion.guidance import cfg
from retouch.core.diffusion.process import EDM, VP, Flow, Level
from retouch.core.diffusion.sampling import invert, sample
from retouch.core.diffusion.steps import Move, ddim, ddpm, dpmpp_2m, euler
from retouch.core.errors import InputError
from retouch.guide import attach
from retouch.guide.cfgpp import (
    CFGPlusPlus,
    cfg_scale_equivalent,
    cfgpp,
    cfgpp_ddim_inverse_step,
    cfgpp_ddim_step,
    cfgpp_dpmpp_2m_step,
    cfgpp_euler_step,
)
from retouch.worlds.gaussians import only, ring

DRAW = torch.Generator().manual_seed(0)
X, EU, EC = (torch.randn(2, 3, 4, 4, generator=DRAW, dtype=torch.float64) for _ in range(3))
A, B = 0.3, 0.5
Z = tiny.latents()
PROMPTS = ["a red circle", "a large blue square"]


def plain_step(x, noise, here, there, renoise=None):
    x0 = (x - (1 - here) ** 0.5 * noise) / here**0.5
    return x0, there**0.5 * x0 + (1 - there) ** 0.5 * (noise if renoise is None else renoise)


def step(scale, x=X, uncond=EU, cond=EC, here=A, there=B):
    return cfgpp_ddim_step(x, noise_uncond=uncond, noise_cond=cond, alpha_t=here, alpha_prev=there, scale=scale)


# --- identities -------------------------------------------------------------------------------------------------------


def test_at_scale_zero_it_is_the_unconditional_step():
    for ours, theirs in zip(step(0.0), plain_step(X, EU, A, B), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("scale", [0.0, 0.3, 0.6, 1.0])
def test_equal_branches_are_plain_ddim(scale):
    for ours, theirs in zip(step(scale, cond=EU), plain_step(X, EU, A, B), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("scale", [0.2, 0.6, 1.0])
@pytest.mark.parametrize(("here", "there"), [(0.3, 0.5), (0.01, 0.05), (0.9, 0.99)])
def test_it_equals_plain_guidance_at_another_scale(scale, here, there):
    w = float(cfg_scale_equivalent(scale, here, there))
    _, theirs = plain_step(X, EU + w * (EC - EU), here, there)
    torch.testing.assert_close(step(scale, here=here, there=there)[1], theirs, rtol=1e-12, atol=1e-11)


def test_that_scale_grows_with_the_number_of_steps():
    means = []
    for steps in (10, 50, 100):
        bars = [level.alpha**2 for level in VP.scaled_linear(final=None).grid(steps).levels]
        scales = torch.stack([cfg_scale_equivalent(0.6, a, b) for a, b in itertools.pairwise(bars[:-1])])
        means.append(float(scales.mean()))
        if steps == 50:
            assert float(scales.max()) == pytest.approx(9.4, abs=0.5)
    assert means[0] < means[1] < means[2]


def test_at_scale_one_x0_is_conditional_and_noise_is_not():
    x0, moved = step(1.0)
    assert torch.allclose(x0, plain_step(X, EC, A, B)[0])
    assert not torch.allclose(moved, plain_step(X, EC, A, B)[1])
    torch.testing.assert_close(moved, plain_step(X, EC, A, B, renoise=EU)[1])


@pytest.mark.parametrize("scale", [0.0, 0.6, 1.0])
def test_inverse_and_step_with_the_same_predictions_lead_back(scale):
    same = {"noise_uncond": EU, "noise_cond": EC, "scale": scale}
    noisier = cfgpp_ddim_inverse_step(X, alpha_from=B, alpha_to=A, **same)
    torch.testing.assert_close(cfgpp_ddim_step(noisier, alpha_t=A, alpha_prev=B, **same)[1], X)
    torch.testing.assert_close(cfgpp_ddim_inverse_step(step(scale)[1], alpha_from=B, alpha_to=A, **same), X)


def test_steps_of_length_zero_stay():
    torch.testing.assert_close(step(0.0, there=A)[1], X)
    same = {"noise_uncond": EU, "noise_cond": EU}
    torch.testing.assert_close(cfgpp_ddim_inverse_step(X, alpha_from=A, alpha_to=A, **same), X)


def test_alphas_may_be_tensors():
    alphas = torch.tensor([0.3, 0.4], dtype=torch.float64).view(2, 1, 1, 1)
    whole = cfgpp_ddim_step(X, noise_uncond=EU, noise_cond=EC, alpha_t=alphas, alpha_prev=alphas + 0.2)[1]
    for row in range(2):
        a = float(alphas[row])
        torch.testing.assert_close(whole[row], step(0.6, here=a, there=a + 0.2)[1][row])


# --- where alpha is 1 -------------------------------------------------------------------------------------------------


def test_euler_is_ddim_in_other_units():
    """x / sqrt(a) of the variance-preserving step."""
    sigma, after = (((1 - a) / a) ** 0.5 for a in (A, B))
    x = X / A**0.5
    noise = EU + 0.6 * (EC - EU)
    moved = cfgpp_euler_step(
        x, denoised=x - sigma * noise, denoised_uncond=x - sigma * EU, sigma=sigma, sigma_next=after
    )
    torch.testing.assert_close(moved, step(0.6)[1] / B**0.5)


def test_the_last_step_gives_what_is_denoised():
    settings = {"denoised": EC, "denoised_uncond": EU, "sigma": 2.0, "sigma_next": 0.0}
    assert torch.equal(cfgpp_euler_step(X, **settings), EC)
    assert torch.equal(cfgpp_euler_step(X, noise=X, sigma_up=1.0, **settings), EC)
    two = {"denoised_uncond_prev": EU, "sigma_prev": 3.0}
    assert torch.equal(cfgpp_dpmpp_2m_step(X, **settings, **two), EC)


def test_an_ancestral_step_adds_noise():
    settings = {"denoised": EC, "denoised_uncond": EU, "sigma": 2.0, "sigma_next": 1.0}
    noisy = cfgpp_euler_step(X, noise=X, sigma_up=0.5, **settings)
    torch.testing.assert_close(noisy, cfgpp_euler_step(X, **settings) + 0.5 * X)


def test_second_order_is_the_formula_and_without_a_past_the_first():
    past = X.flip(0)
    settings = {"denoised": EC, "denoised_uncond": EU, "sigma": 2.0, "sigma_next": 1.2}
    first = cfgpp_dpmpp_2m_step(X, denoised_uncond_prev=None, sigma_prev=None, **settings)
    torch.testing.assert_close(first, cfgpp_euler_step(X, **settings))
    second = cfgpp_dpmpp_2m_step(X, denoised_uncond_prev=past, sigma_prev=3.0, **settings)
    h, h_last = torch.log(torch.tensor([2 / 1.2, 3 / 2], dtype=torch.float64))
    r = h_last / h
    expected = EC - (-h).exp() * EU - torch.expm1(-h) * (EC - past) / (2 * r) + (-h).exp() * X
    torch.testing.assert_close(second, expected)
    torch.testing.assert_close(
        cfgpp_dpmpp_2m_step(X, denoised_uncond_prev=EC, sigma_prev=3.0, **settings), first
    )  # nothing has changed since


# --- the guidance in our steps ----------------------------------------------------------------------------------------


def predictions(x, level, scale):
    """What the guidance makes of fixed noises at a level."""
    found = {
        name: Prediction((x - level.sigma * noise) / level.alpha, noise)
        for name, noise in (("uncond", EU), ("cond", EC))
    }
    from retouch.core.diffusion.guidance import as_sum

    return as_sum(cfgpp(scale)).combine(found, x, level)


def test_our_steps_are_the_functions():
    here, there = Level(0, A**0.5, (1 - A) ** 0.5, 1, 50), Level(0, B**0.5, (1 - B) ** 0.5, 2, 50)
    move = Move(X, predictions(X, here, 0.6), here, there, lambda *_: None)
    torch.testing.assert_close(ddim(move), step(0.6)[1])
    one, two = Level(2.0, 1.0, 2.0, 1, 50), Level(1.2, 1.0, 1.2, 2, 50)
    move = Move(X, predictions(X, one, 0.6), one, two, lambda *_: None)
    given = {"denoised": move.prediction.x0, "denoised_uncond": X - 2 * EU, "sigma": 2.0, "sigma_next": 1.2}
    torch.testing.assert_close(euler(move), cfgpp_euler_step(X, **given))
    before = X.flip(0)
    last = Level(3.0, 1.0, 3.0, 0, 50)
    move.last = Move(before, predictions(before, last, 0.6), last, one, lambda *_: None)
    past = {"denoised_uncond_prev": before - 3 * EU, "sigma_prev": 3.0}
    torch.testing.assert_close(dpmpp_2m(move), cfgpp_dpmpp_2m_step(X, **given, **past))


@pytest.mark.parametrize("make", [tiny.stable_diffusion, tiny.stable_diffusion_xl, tiny.stable_diffusion_3, tiny.dit])
def test_on_real_pipelines(make):
    pipe = make()
    denoiser = Denoiser.from_pipeline(pipe)
    what = [0, 1] if make is tiny.dit else PROMPTS
    at_zero = sample(denoiser, Z, what, times=4, guidance=cfgpp(0.0))
    torch.testing.assert_close(at_zero, sample(denoiser, Z, None, times=4), rtol=1e-4, atol=1e-4)
    guided = sample(denoiser, Z, what, times=4, guidance=cfgpp(0.6))
    assert torch.isfinite(guided).all() and not torch.allclose(guided, at_zero, rtol=1e-3)
    for step in (dpmpp_2m, ddpm):
        moved = sample(denoiser, Z, what, times=4, guidance=cfgpp(0.6), step=step, generator=torch.Generator())
        assert torch.isfinite(moved).all()


def test_inside_a_pipeline_that_is_called_as_always():
    pipe = tiny.stable_diffusion()
    settings = {"num_inference_steps": 4, "latents": Z, "output_type": "latent"}
    with attach(pipe, cfgpp(0.6)):
        theirs = pipe(PROMPTS, negative_prompt=["gray", ""], **settings).images
    ours = sample(Denoiser.from_pipeline(pipe), Z, PROMPTS, negative=["gray", ""], times=4, guidance=cfgpp(0.6))
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4 * float(ours.abs().max()))


def test_noise_follows_the_negative_prompt():
    pipe = tiny.stable_diffusion()
    denoiser = Denoiser.from_pipeline(pipe)
    with_negative = sample(denoiser, Z, PROMPTS, negative="gray", times=3, guidance=cfgpp(1.0))
    assert not torch.allclose(with_negative, sample(denoiser, Z, PROMPTS, times=3, guidance=cfgpp(1.0)))


def test_the_strength_may_be_kept_over_numbers_of_steps():
    level = Level(0, A**0.5, (1 - A) ** 0.5, 0, 25)
    found = {name: Prediction(noise, noise) for name, noise in (("uncond", EU), ("cond", EC))}
    kept = cfgpp(0.3, reference_steps=50).change(found, X, level)
    torch.testing.assert_close(kept.x0, cfgpp(0.6).change(found, X, level).x0)


# --- sampling, inversion, editing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", [VP.linear(), EDM(), Flow()])
def test_on_exact_scores_it_finds_the_mode_and_back(process):
    mixture = ring(8)
    denoiser = mixture.denoiser(process)
    wanted = torch.arange(64) % 8
    every = {"modes": torch.ones(1, 8)}
    tool = CFGPlusPlus(0.6, steps=100)
    noise = torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cond = only(mixture, wanted.tolist())
    x = tool.sample(denoiser, noise, cond, every)
    assert float((mixture.responsibilities(x).argmax(1) == wanted).double().mean()) > 0.95
    data = mixture.draw_with_modes(64, seed=1)
    x, cond = data[1].double(), only(mixture, data[0].tolist())
    back = tool.sample(denoiser, tool.invert(denoiser, x, cond, every), cond, every)
    assert float((back - x).norm(dim=1).mean()) < 0.25
    target = only(mixture, ((data[0] + 1) % 8).tolist())
    edited = tool.edit(denoiser, x, cond, target, every)
    assert float((mixture.responsibilities(edited).argmax(1) == (data[0] + 1) % 8).double().mean()) > 0.9


def test_the_sampler_gives_the_last_x0():
    pipe = tiny.stable_diffusion()  # ends at the alpha of timestep 0, not at 1
    denoiser = Denoiser.from_pipeline(pipe)
    x0 = CFGPlusPlus(0.6, steps=4).sample(denoiser, Z, PROMPTS)
    moved = sample(denoiser, Z, PROMPTS, times=4, guidance=cfgpp(0.6))
    assert not torch.equal(x0, moved)
    assert torch.equal(x0, sample(denoiser, Z, PROMPTS, times=4, guidance=cfgpp(0.6), last="x0"))
    assert torch.isfinite(invert(denoiser, x0, PROMPTS, times=4, guidance=cfgpp(0.6))).all()


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: step(1.6), "scale is 1.6, but must be at most 1.5"),
        (lambda: step(0.6, cond=EC[:1]), "A prediction has shape"),
        (lambda: step(0.6, here=0.0), "alpha_t is 0.0, but must be greater than 0"),
        (lambda: step(0.6, there=1.2), "alpha_prev is 1.2"),
        (lambda: step(0.6, here=0.5, there=0.3), "alpha_prev is less than alpha_t"),
        (
            lambda: cfgpp_ddim_inverse_step(X, noise_uncond=EU, noise_cond=EC, alpha_from=0.3, alpha_to=0.5),
            "alpha_to is greater than alpha_from",
        ),
        (
            lambda: cfgpp_euler_step(X, denoised=EC, denoised_uncond=EU, sigma=1.0, sigma_next=1.0),
            "sigma_next is 1.0, but must be at least 0 and less than sigma",
        ),
        (lambda: cfgpp(0.5, reference_steps=0), "reference_steps is 0"),
        (lambda: CFGPlusPlus(steps=0), "steps is 0"),
        (lambda: cfgpp(0.5) + cfg(2.0) + other(), "take the noise from"),
    ],
)
def test_bad_input(wrong, words):
    with pytest.raises(InputError, match=words):
        wrong()


def other():
    from dataclasses import replace

    return replace(cfgpp(0.5), renoise="cond")


def test_scales_beyond_one_are_warned_of():
    for scale in (1.2, -0.1):
        with pytest.warns(UserWarning, match="CFG\\+\\+ mixes with 0 to 1"):
            cfgpp(scale)
        with pytest.warns(UserWarning, match="mixes with 0 to 1"):
            step(scale)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cfgpp(1.2, beyond=True)
        cfgpp(1.0)
