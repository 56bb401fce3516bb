"""EluCD: the authors' numbers, its limits, the equations of both samplers, and real pipelines under every plug-in."""

import math

import pytest
import tiny_pipelines as tiny
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import nn

from retouch.core import seeds
from retouch.core.diffusion.denoiser import Denoiser, Prediction
from retouch.core.diffusion.guidance import cfg
from retouch.core.diffusion.process import EDM, VP, Flow, Level, from_scheduler
from retouch.core.diffusion.sampling import Hook, sample
from retouch.core.diffusion.steps import ancestral_sigma, ddpm, heun
from retouch.core.errors import InputError
from retouch.guide import attach
from retouch.guide.elucd import (
    EDMClassifierGuidance,
    OffTheShelfClassifierGuidance,
    classifier_gradient,
    edm_push,
    edm_weights,
    elucd,
    elucd_edm_sample,
    expected_calibration_error,
    guided_mean,
    joint_marginal_log_prob,
    sine_boost,
    softplus_activations,
)
from retouch.worlds.gaussians import ring

DRAW = torch.Generator().manual_seed(0)
LOGITS = torch.randn(6, 5, generator=DRAW, dtype=torch.float64)
LABELS = torch.tensor([0, 1, 4, 2, 3, 0])
Z = tiny.latents()
PIXELS = tiny.latents(2, 3)
PROMPTS = ["a red circle", "a large blue square"]


def made(*layers, seed=0):
    with seeds.isolated(seed):
        return nn.Sequential(*(layer() if isinstance(layer, type) else layer for layer in layers)).eval()


def classifier(channels=3, seed=0):
    """A small convolutional classifier of five classes, with nested ReLUs, one of them used twice."""
    with seeds.isolated(seed):
        relu = nn.ReLU(inplace=True)
        inner = nn.Sequential(nn.Conv2d(channels, 6, 3, padding=1), relu, nn.Conv2d(6, 6, 3, padding=1), relu)
        return nn.Sequential(inner, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5)).eval()


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, x):
        return F.relu(self.relu(x))


class Module(nn.Module):
    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(x)


# --- the direction ----------------------------------------------------------------------------------------------------


def test_golden(golden):
    case = golden("elucd")
    t = {name: torch.as_tensor(getattr(case, name)) for name in case.keys}

    def logits(x):
        hidden = F.softplus(x.flatten(1) @ t["param_w1"].T + t["param_b1"], beta=float(t["param_softplus_beta"]))
        return hidden @ t["param_w2"].T

    for end in ("", "_b"):
        told = {name: float(t[f"param_{name}{end}"]) for name in ("joint_temperature", "marginal_temperature")}
        scale = float(t["param_scale_b"]) if end else 1.0
        gradient = classifier_gradient(logits, t["in_x0"], t["in_y"], scale=scale, **told)
        case.close(f"out_grad{end}", gradient)
    wide = (slice(None), *[None] * 4)
    extra = sine_boost(
        t["in_timesteps"],
        num_timesteps=int(t["param_num_timesteps"]),
        max_variance=t["param_max_variance"],
        gamma=float(t["param_gamma"]),
    )
    mean = guided_mean(t["in_mean"], grad=t["in_step_grad"], variance=t["param_variance"][wide], extra=extra[wide])
    case.close("out_guided_mean", mean)
    # The object keeps the running maximum by itself.
    guide = OffTheShelfClassifierGuidance(logits)
    for step, expected, variance in zip(t["in_timesteps"], extra, t["param_variance"], strict=True):
        assert guide.boost(variance, timestep=int(step), num_timesteps=1000) == pytest.approx(float(expected), rel=1e-5)

    data = float(t["param_edm_sigma_data2"])
    for guide, name in ((logits, "guided"), (None, "unguided")):
        found = elucd_edm_sample(
            lambda x, sigma: x * data / (data + sigma**2),
            t["in_edm_latents"],
            t["in_y"],
            guide,
            num_steps=int(t["param_edm_steps"]),
            joint_temperature=1.0,
            marginal_temperature=0.0,
            max_guidance=float(t["param_edm_max_guidance"]),
            add_factor=float(t["param_edm_add_factor"]),
        )
        case.close(f"out_edm_{name}", found)


def gradient_of(value, by):
    return torch.autograd.grad(value.sum(), by)[0]


def test_limits_of_the_temperatures():
    f = LOGITS.clone().requires_grad_()
    usual = f.log_softmax(1).gather(1, LABELS[:, None])[:, 0]
    ours = joint_marginal_log_prob(f, LABELS, joint_temperature=1.0, marginal_temperature=1.0)
    torch.testing.assert_close(ours, usual)
    torch.testing.assert_close(gradient_of(ours, f), gradient_of(usual, f))
    raw = joint_marginal_log_prob(f, LABELS, joint_temperature=3.0, marginal_temperature=0.0)
    torch.testing.assert_close(gradient_of(raw, f), 3.0 * F.one_hot(LABELS, 5).double())
    torch.testing.assert_close(raw, 3.0 * f.gather(1, LABELS[:, None])[:, 0] - math.log(5))


@pytest.mark.parametrize(("t1", "t2"), [(1.0, 1.0), (1.0, 0.5), (2.0, 0.0)])
def test_a_shift_of_all_logits_counts_t1_minus_t2(t1, t2):
    told = {"joint_temperature": t1, "marginal_temperature": t2}
    shift = torch.zeros((), dtype=torch.float64, requires_grad=True)
    moved = joint_marginal_log_prob(LOGITS + shift, LABELS, **told)
    torch.testing.assert_close(gradient_of(moved, shift), torch.tensor(6 * (t1 - t2), dtype=torch.float64))
    far = joint_marginal_log_prob(LOGITS + 7.0, LABELS, **told)
    torch.testing.assert_close(far - moved.detach(), torch.full((6,), 7 * (t1 - t2), dtype=torch.float64))


def test_large_logits_do_not_overflow():
    f = (LOGITS.float() * 1e4).requires_grad_()
    value = joint_marginal_log_prob(f, LABELS)
    assert torch.isfinite(value).all() and torch.isfinite(gradient_of(value, f)).all()


def test_the_gradient_stops_at_x0_and_at_the_weights():
    model = classifier().train()
    made_from = PIXELS.clone().requires_grad_()
    x0 = made_from * 2
    gradient = classifier_gradient(model, x0, torch.tensor([1, 2]))
    assert not gradient.requires_grad and made_from.grad is None and model.training
    assert all(p.grad is None for p in model.parameters())
    scaled = classifier_gradient(model, x0, torch.tensor([1, 2]), scale=3.0)
    torch.testing.assert_close(scaled, 3 * gradient)
    half = classifier_gradient(model, x0, torch.tensor([1, 2]), preprocess=lambda x: x / 2)
    torch.testing.assert_close(half, classifier_gradient(model, x0 / 2, torch.tensor([1, 2])) / 2)
    alone = classifier_gradient(model, x0[1:], torch.tensor([2]))
    torch.testing.assert_close(gradient[1:], alone)


# --- the classifier ---------------------------------------------------------------------------------------------------


def test_every_relu_becomes_softplus_in_a_copy():
    model = classifier()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    smooth = softplus_activations(model, beta=3.0)
    assert sum(isinstance(m, nn.ReLU) for m in model.modules()) == 1  # one, used twice
    assert not any(isinstance(m, nn.ReLU) for m in smooth.modules())
    assert [m.beta for m in smooth.modules() if isinstance(m, nn.Softplus)] == [3.0, 3.0]
    assert all(torch.equal(value, before[name]) for name, value in smooth.state_dict().items())
    same = softplus_activations(model, inplace=True)
    assert same is model and not any(isinstance(m, nn.ReLU) for m in model.modules())
    assert isinstance(softplus_activations(nn.ReLU(), beta=2.0), nn.Softplus)


def test_a_large_beta_is_relu():
    x = torch.linspace(-3, 3, 61)[None]
    for beta in (3.0, 10.0, 1000.0):
        gap = (softplus_activations(Module(), beta=beta)(x) - x.relu()).abs().max()
        assert float(gap) <= math.log(2) / beta + 1e-6
    model = classifier()
    torch.testing.assert_close(softplus_activations(model, beta=1e5)(PIXELS), model(PIXELS), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("model", "where"),
    [
        (nn.Sequential(nn.Linear(2, 2), Functional()), r"1 \(Functional\)"),
        (nn.TransformerEncoderLayer(4, 2, 8), "TransformerEncoderLayer"),
        (Functional(), "the module itself"),
    ],
)
def test_relu_called_as_a_function_is_refused(model, where):
    with pytest.raises(InputError, match=f"calls relu as a function in .*{where}"):
        softplus_activations(model)
    with pytest.raises(InputError, match="relu as a function"):
        OffTheShelfClassifierGuidance(model, 0)
    OffTheShelfClassifierGuidance(model, 0, softplus_beta=None)
    with pytest.warns(UserWarning, match="relu as a function"):
        softplus_activations(model, strict=False)


def test_a_transformers_classifier_is_smoothed():
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=3)
    resnet = tiny.made(lambda: ResNetForImageClassification(config))
    smooth = softplus_activations(resnet)
    assert not any(isinstance(m, nn.ReLU) for m in smooth.modules())
    gradient = classifier_gradient(smooth, PIXELS, torch.tensor([0, 2]))
    assert gradient.shape == PIXELS.shape and float(gradient.abs().sum()) > 0


# --- the schedule -----------------------------------------------------------------------------------------------------


def test_the_bump():
    t = torch.arange(0, 251)
    bump = sine_boost(t, num_timesteps=250, max_variance=0.02, gamma=0.3)
    assert bump[0] == 0 and bump[-1] == 0 and (bump >= 0).all()
    assert int(bump.argmax()) == 125 and float(bump[125]) == pytest.approx(0.006)
    assert not sine_boost(t, num_timesteps=250, max_variance=0.02, gamma=0.0).any()
    mean, grad = LOGITS, LOGITS.flip(0)
    torch.testing.assert_close(guided_mean(mean, grad=grad, variance=0.5), mean + 0.5 * grad)
    torch.testing.assert_close(guided_mean(mean, grad=grad, variance=0.5, extra=0.25), mean + 0.75 * grad)


# --- EDM --------------------------------------------------------------------------------------------------------------


def test_the_push_has_its_size_and_sees_samples_of_rms_one():
    seen = []

    def gradient(x):
        seen.append(x)
        return x.roll(1, -1) * 3

    x = torch.stack([5.0 * PIXELS[0], 0.1 * PIXELS[1]]).double()
    push = edm_push(gradient, x, weight=0.07)
    rms = x.square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(push.square().mean((1, 2, 3)).sqrt(), 0.07 * rms)
    assert seen[0].dtype == torch.float32 and push.dtype == torch.float64
    torch.testing.assert_close(seen[0][0].double(), x[0] / rms[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(seen[0][1], x[1].float())  # an RMS below 1 is not scaled up
    none = edm_push(lambda x: x * torch.tensor([0.0, 1.0])[:, None, None, None], x, weight=0.07)
    assert not none[0].any() and none[1].any() and torch.isfinite(none).all()
    # x / alpha in EDM is x in any other process.
    torch.testing.assert_close(edm_push(gradient, 0.4 * x, weight=0.07, alpha=0.4), 0.4 * push)
    assert torch.isfinite(edm_push(gradient, x, weight=0.07, alpha=0.0)).all()


def test_the_weights_of_the_steps():
    found = edm_weights(10, max_guidance=0.004, add_factor=0.3)
    wanted = [max(0.004 / 11 * (11 - i), 1e-5) + math.sin(math.pi * i / 10) * 0.0012 for i in range(10)]
    assert found == pytest.approx(wanted)
    assert edm_weights(3, max_guidance=1e-6, add_factor=0.0) == pytest.approx([1e-5] * 3)
    assert edm_weights(3, max_guidance=0.0) == [0.0] * 3


def test_the_classifier_is_asked_once_a_step_and_may_be_off():
    calls = []

    def logits(x):
        calls.append(x)
        return x.flatten(1)[:, :5]

    latents = PIXELS.double()
    plain = elucd_edm_sample(lambda x, sigma: x / (1 + sigma**2), latents, None, None, num_steps=4)
    told = {"denoise": lambda x, sigma: x / (1 + sigma**2), "labels": torch.tensor([0, 1]), "num_steps": 4}
    assert torch.equal(elucd_edm_sample(latents=latents, classifier=logits, max_guidance=0.0, **told), plain)
    assert not calls
    guided = elucd_edm_sample(latents=latents, classifier=logits, **told)
    assert len(calls) == 4 and not torch.allclose(guided, plain)


@pytest.mark.parametrize("process", [EDM(), VP.linear(), Flow()])
def test_the_hook_is_the_sampler(process):
    mixture = ring(8)
    scores = made(nn.Linear(2, 16), nn.ReLU, nn.Linear(16, 8))
    noise = torch.randn(16, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = torch.arange(16) % 8
    denoiser = mixture.denoiser(process)
    hook = EDMClassifierGuidance(scores, labels, max_guidance=0.05)
    found = sample(denoiser, noise, times=18, step=heun, hooks=[hook])
    plain = sample(denoiser, noise, times=18, step=heun)
    assert torch.isfinite(found).all() and not torch.allclose(found, plain)
    off = EDMClassifierGuidance(scores, labels, max_guidance=0.0)
    assert torch.equal(sample(denoiser, noise, times=18, step=heun, hooks=[off]), plain)
    if isinstance(process, EDM):
        smooth = softplus_activations(scores, beta=5.0)
        exact = lambda x, sigma: mixture.x0(x, 1.0, float(sigma))  # noqa: E731
        theirs = elucd_edm_sample(exact, noise, labels, smooth, max_guidance=0.05)
        torch.testing.assert_close(found, theirs)


# --- DDPM -------------------------------------------------------------------------------------------------------------


class Seen(Hook):
    """Keeps what a run went through."""

    def start(self, x, grid):
        self.moves = []

    def after(self, move, x):
        self.moves.append((move.x, move.prediction, move.here, move.there, x))
        return x


def ddpm_run(hooks, denoiser=None, steps=5, **settings):
    denoiser = denoiser or Denoiser(tiny.pixel_unet(), VP.linear())
    generator = torch.Generator().manual_seed(3)
    return sample(denoiser, PIXELS, times=steps, step=ddpm, hooks=hooks, generator=generator, **settings)


def test_the_hook_makes_the_steps_of_the_equations():
    model, seen, shifted, steps = classifier(), Seen(), Seen(), 5
    guide = OffTheShelfClassifierGuidance(model, torch.tensor([1, 3]), scale=4.0)
    ddpm_run([seen, guide, shifted], steps=steps)
    assert guide.max_variance > 0
    largest, smooth = 0.0, softplus_activations(model)
    for (_, prediction, here, there, before), (*_, after) in zip(seen.moves, shifted.moves, strict=True):
        variance = ancestral_sigma(here, there) ** 2
        largest = max(largest, variance)
        g = classifier_gradient(smooth, prediction.x0, torch.tensor([1, 3]), scale=4.0)
        bump = max(math.sin(math.pi * (steps - 1 - here.index) / steps) * largest * 0.3, 0)
        torch.testing.assert_close(after, before + (variance + bump) * g)
    assert torch.equal(shifted.moves[-1][-1], seen.moves[-1][-1])  # no variance, no bump: t = 0


def test_variances_are_forgotten_between_runs():
    guide = OffTheShelfClassifierGuidance(classifier(), 1, scale=4.0)
    first = ddpm_run([guide])
    kept = guide.max_variance
    guide.max_variance = 99.0
    assert torch.equal(ddpm_run([guide]), first) and guide.max_variance == kept
    guide.reset()
    assert guide.max_variance == 0.0
    guide.boost(torch.full((2, 3, 8, 8), 0.5), timestep=3, num_timesteps=5)
    guide.boost(torch.full((2, 3, 8, 8), 0.1), timestep=2, num_timesteps=5)
    assert guide.max_variance == 0.5


def test_off_is_the_sampler_itself(global_rng_untouched):
    plain = ddpm_run([])
    assert torch.equal(ddpm_run([OffTheShelfClassifierGuidance(classifier(), 1, scale=0.0)]), plain)
    assert not torch.equal(ddpm_run([OffTheShelfClassifierGuidance(classifier(), 1)]), plain)


def test_the_denoiser_gets_no_gradient_and_the_classifier_its_mode_back():
    model, unet = classifier().train(), tiny.pixel_unet()
    guide = OffTheShelfClassifierGuidance(model, 1, softplus_beta=None)
    ddpm_run([guide], Denoiser(unet, VP.linear()))
    assert all(p.grad is None for p in [*unet.parameters(), *model.parameters()])
    assert model.training
    broken = OffTheShelfClassifierGuidance(model, 77, softplus_beta=None)
    with pytest.raises(InputError, match="labels is"):
        ddpm_run([broken], Denoiser(unet, VP.linear()))
    assert model.training and torch.is_grad_enabled()


def test_clipping_is_of_gradient_and_step():
    seen = Seen()
    guide = OffTheShelfClassifierGuidance(classifier(), 1, clip=True)
    ddpm_run([guide, seen])
    for x, prediction, here, _, _ in seen.moves:
        assert float(prediction.x0.abs().max()) <= 1
        torch.testing.assert_close(here.alpha * prediction.x0 + here.sigma * prediction.noise, x)


def test_through_the_denoiser_is_the_chain_rule():
    mixture, process = ring(8), VP.linear()
    scores = made(nn.Linear(2, 16), nn.ReLU, nn.Linear(16, 8)).double()
    seen, shifted = Seen(), Seen()
    guide = OffTheShelfClassifierGuidance(scores, 2, through_denoiser=True, gamma=0.0)
    noise = torch.randn(4, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    told = {"times": 4, "step": ddpm, "generator": torch.Generator().manual_seed(2)}
    sample(mixture.denoiser(process), noise, hooks=[seen, guide, shifted], **told)
    x, _, here, there, before = seen.moves[1]
    x = x.clone().requires_grad_()
    smooth = softplus_activations(scores)
    ell = joint_marginal_log_prob(smooth(mixture.x0(x, here.alpha, here.sigma)), torch.full((4,), 2)).sum()
    shift = ancestral_sigma(here, there) ** 2 * torch.autograd.grad(ell, x)[0]
    torch.testing.assert_close(shifted.moves[1][-1], before + shift)


# --- it guides --------------------------------------------------------------------------------------------------------


def test_an_unconditional_model_is_led_to_the_class():
    mixture = ring(8, std=0.1)
    wanted = torch.arange(64) % 8
    noise = torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def clean(x):  # exact logits of clean samples
        return -(x[:, None] - mixture.means.to(x)).square().sum(-1) / (2 * 0.3**2)

    def share(**settings):
        x = sample(mixture.denoiser(VP.linear()), noise, times=50, **settings)
        return float((mixture.responsibilities(x).argmax(1) == wanted).double().mean())

    def hooked(**settings):
        guide = OffTheShelfClassifierGuidance(clean, wanted, **settings)
        return share(step=ddpm, hooks=[guide], generator=torch.Generator().manual_seed(1))

    assert hooked(scale=0.0) < 0.3
    assert hooked(scale=4.0) > 0.8
    assert share(guidance=elucd(clean, wanted, scale=4.0)) > 0.8


# --- real pipelines ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny.stable_diffusion, tiny.dit])
def test_on_latents_of_real_pipelines(make):
    pipe = make()
    denoiser = Denoiser.from_pipeline(pipe)
    what = [0, 1] if make is tiny.dit else PROMPTS
    decode = lambda z: pipe.vae.decode(z / pipe.vae.config.scaling_factor).sample  # noqa: E731
    rule = elucd(classifier(), [1, 3], scale=50.0, preprocess=decode)
    plain = sample(denoiser, Z, what, times=3, guidance=cfg(4.0))
    guided = sample(denoiser, Z, what, times=3, guidance=cfg(4.0) + rule)
    assert torch.isfinite(guided).all() and not torch.allclose(guided, plain)
    off = elucd(classifier(), 1, scale=0.0, preprocess=decode)
    assert torch.equal(sample(denoiser, Z, what, times=3, guidance=cfg(4.0) + off), plain)
    hook = OffTheShelfClassifierGuidance(classifier(4), torch.tensor([1, 3]), scale=9.0)
    settings = {"times": 3, "step": ddpm, "guidance": cfg(4.0)}
    hooked = sample(denoiser, Z, what, hooks=[hook], generator=torch.Generator().manual_seed(1), **settings)
    bare = sample(denoiser, Z, what, generator=torch.Generator().manual_seed(1), **settings)
    assert torch.isfinite(hooked).all() and not torch.allclose(hooked, bare)
    assert all(p.grad is None for p in denoiser.model.parameters())


def test_inside_a_pipeline_that_is_called_as_always():
    pipe = tiny.stable_diffusion()
    rule = elucd(classifier(4), [1, 3], scale=20.0)
    settings = {"num_inference_steps": 4, "latents": Z, "output_type": "latent", "guidance_scale": 4.0}
    plain = pipe(PROMPTS, **settings).images
    with attach(pipe, rule):
        theirs = pipe(PROMPTS, **settings).images
    ours = sample(Denoiser.from_pipeline(pipe), Z, PROMPTS, times=4, guidance=cfg(4.0) + rule)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4 * float(ours.abs().max()))
    assert torch.equal(pipe(PROMPTS, **settings).images, plain)


def test_the_variant_is_classifier_guidance_of_ddim():
    rule = elucd(classifier(), 1, scale=3.0, softplus_beta=None)
    x0, noise = PIXELS, PIXELS.flip(0)
    level = Level(100, 0.8, 0.6, 1, 5)
    g = classifier_gradient(classifier(), x0, torch.tensor([1, 1]), scale=3.0)
    change = rule.change({"cond": Prediction(x0, noise)}, level.alpha * x0 + level.sigma * noise, level)
    torch.testing.assert_close(change.noise, -0.6 * g)
    torch.testing.assert_close(level.alpha * change.x0 + level.sigma * change.noise, torch.zeros_like(x0))


def test_ddpm_steps_of_diffusers_with_our_shift():
    """A loop over diffusers' own scheduler, with the conditional function by hand, is our sampler with the hook."""
    scheduler = DDPMScheduler(clip_sample=False, variance_type="fixed_small")
    unet, model = tiny.pixel_unet(), classifier()
    hook = OffTheShelfClassifierGuidance(model, 2, scale=5.0)
    ours = ddpm_run([hook], Denoiser(unet, from_scheduler(scheduler)), steps=5)
    guide = OffTheShelfClassifierGuidance(model, scale=5.0)
    scheduler.set_timesteps(5)
    draw, x = torch.Generator().manual_seed(3), PIXELS
    with torch.no_grad():
        for k, t in enumerate(scheduler.timesteps):
            result = scheduler.step(unet(x, t).sample, t, x, generator=draw)
            variance = scheduler._get_variance(t) if t > 0 else torch.tensor(0.0)
            extra = guide.boost(variance, timestep=4 - k, num_timesteps=5)
            grad = guide(result.pred_original_sample, t, torch.tensor([2, 2]))
            x = guided_mean(result.prev_sample, grad=grad, variance=variance, extra=extra)
    torch.testing.assert_close(ours, x, rtol=1e-3, atol=1e-3 * float(x.abs().max()))


# --- calibration ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_the_calibration_error_is_torchmetrics(bins):
    from torchmetrics.functional.classification import multiclass_calibration_error

    draw = torch.Generator().manual_seed(5)
    probs = torch.randn(500, 4, generator=draw).mul(2).softmax(1)
    labels = torch.randint(4, (500,), generator=draw)
    theirs = float(multiclass_calibration_error(probs, labels, num_classes=4, n_bins=bins))
    assert expected_calibration_error(probs, labels, num_bins=bins) == pytest.approx(theirs, abs=1e-5)


def test_calibration_in_closed_form():
    sure = torch.eye(4)[torch.tensor([0, 1, 2, 3])]
    assert expected_calibration_error(sure, torch.tensor([0, 1, 2, 3])) == 0
    assert expected_calibration_error(sure, torch.tensor([1, 2, 3, 0])) == 1
    half = torch.tensor([[0.75, 0.25]] * 4)
    assert expected_calibration_error(half, torch.tensor([0, 0, 0, 1])) == 0
    assert expected_calibration_error(half, torch.tensor([0, 0, 1, 1])) == pytest.approx(0.25)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (
            lambda: joint_marginal_log_prob(LOGITS[0], LABELS),
            r"logits has shape \(5,\), but must be \(batch, classes\)",
        ),
        (lambda: joint_marginal_log_prob(LOGITS, LABELS[:3]), r"labels has shape \(3,\), but must be \(6,\)"),
        (lambda: joint_marginal_log_prob(LOGITS, LABELS + 1), "but must be 0 to 4"),
        (lambda: joint_marginal_log_prob(LOGITS, LABELS - 1), "but must be 0 to 4"),
        (lambda: joint_marginal_log_prob(LOGITS, LABELS.float()), "labels is of torch.float32"),
        (lambda: joint_marginal_log_prob(LOGITS, LABELS, joint_temperature=-1.0), "joint_temperature is -1.0"),
        (lambda: joint_marginal_log_prob(LOGITS, LABELS, marginal_temperature=-1.0), "marginal_temperature is -1.0"),
        (lambda: classifier_gradient(classifier(), PIXELS, torch.tensor([1])), "labels has shape"),
        (lambda: sine_boost(torch.tensor([11]), num_timesteps=10, max_variance=1.0), "timesteps is"),
        (lambda: sine_boost(torch.tensor([1]), num_timesteps=0, max_variance=1.0), "num_timesteps is 0"),
        (lambda: sine_boost(torch.tensor([1]), num_timesteps=10, max_variance=1.0, gamma=-1), "gamma is -1"),
        (lambda: guided_mean(LOGITS, grad=LOGITS[:2], variance=1.0), "grad has shape"),
        (lambda: softplus_activations(classifier(), beta=0.0), "beta is 0.0"),
        (lambda: edm_weights(0), "num_steps is 0"),
        (lambda: edm_weights(5, max_guidance=-1.0), "max_guidance is -1.0"),
        (lambda: EDMClassifierGuidance(classifier(), 0, add_factor=-1.0), "add_factor is -1.0"),
        (lambda: OffTheShelfClassifierGuidance(classifier(), 0, scale=-1.0), "scale is -1.0"),
        (lambda: OffTheShelfClassifierGuidance(classifier(), 0, marginal_temperature=-1.0), "marginal_temperature"),
        (lambda: OffTheShelfClassifierGuidance(classifier())(PIXELS), "labels is None"),
        (lambda: elucd_edm_sample(lambda x, s: x, PIXELS, None, classifier()), "labels is None"),
        (lambda: elucd(classifier(), 0, scale=-1.0), "scale is -1.0"),
        (lambda: expected_calibration_error(LOGITS, LABELS), "probs has rows"),
        (lambda: expected_calibration_error(LOGITS.softmax(1), LABELS, num_bins=0), "num_bins is 0"),
        (lambda: expected_calibration_error(LOGITS.softmax(1)[0], LABELS), "probs has shape"),
    ],
)
def test_bad_input(wrong, words):
    with pytest.raises(InputError, match=words):
        wrong()
