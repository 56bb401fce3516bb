"""Mode interpolation: the score, its invariances, filters, exact mixtures, and recorders in samplers and pipelines."""

import itertools

import numpy as np
import pytest
import tiny_pipelines as tiny
import torch
from torch import nn

from retouch.audit.mode_interpolation import (
    HallucinationFilter,
    Scored,
    TrajectoryRecorder,
    auroc,
    filter_samples,
    gaussian_mixture_score,
    in_support,
    interpolation_fraction,
    mode_interpolation,
    neighbours,
    sampler,
    select_window,
    threshold_at,
    trajectory_variance,
)
from retouch.core import seeds
from retouch.core.diffusion.attach import attach
from retouch.core.diffusion.denoiser import Denoiser, Prediction
from retouch.core.diffusion.guidance import cfg
from retouch.core.diffusion.process import EDM, VP, Flow
from retouch.core.diffusion.sampling import Hook, sample
from retouch.core.diffusion.steps import ddpm, dpmpp_2m, heun
from retouch.core.errors import InputError
from retouch.guide.cfgpp import cfgpp
from retouch.worlds.gaussians import Mixture, lattice, line, ring

pytestmark = pytest.mark.usefixtures("global_rng_untouched")
X0 = torch.randn(6, 20, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
PROMPTS = ["a red circle", "a large blue square"]
Z = tiny.latents()
WIDE = VP.linear(0.001, 0.2, 100)


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


# --- the score --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [slice(-10, None), slice(3, 8), slice(0, 20, 3), slice(None), slice(-1, None)])
def test_it_is_the_population_variance_over_the_window(window):
    expected = np.var(X0.numpy()[:, window], axis=1, ddof=0).reshape(6, -1)
    np.testing.assert_allclose(trajectory_variance(X0, window=window), expected.mean(1), rtol=1e-12, atol=1e-15)
    for reduction, of in (("sum", expected.sum(1)), ("max", expected.max(1))):
        found = trajectory_variance(X0, window=window, reduction=reduction)
        np.testing.assert_allclose(found, of, rtol=1e-12, atol=1e-15)
    moved = trajectory_variance(X0.movedim(1, 0), window=window, time_dim=0)
    torch.testing.assert_close(moved, trajectory_variance(X0, window=window))
    last = trajectory_variance(X0.movedim(1, -1), window=window, time_dim=-1)
    torch.testing.assert_close(last, trajectory_variance(X0, window=window))


def test_invariances():
    score = trajectory_variance(X0)
    constant = X0[:, :1].expand_as(X0)
    assert torch.equal(trajectory_variance(constant), torch.zeros(6, dtype=torch.float64))
    torch.testing.assert_close(trajectory_variance(-3 * X0), 9 * score)
    torch.testing.assert_close(trajectory_variance(X0 + 5), score)
    torch.testing.assert_close(trajectory_variance(X0 + X0[:, :1]), score)
    torch.testing.assert_close(trajectory_variance(X0.flip(0)), score.flip(0))
    assert torch.equal(trajectory_variance(X0, window=slice(7, 8)), torch.zeros(6, dtype=torch.float64))


def test_one_number_a_step_and_low_precision():
    flat = X0[..., 0, 0]
    np.testing.assert_allclose(trajectory_variance(flat), flat.numpy()[:, -10:].var(1))
    assert trajectory_variance(X0.half()).dtype == torch.float32


def test_last_steps_are_the_last_of_sampling():
    """A sample that moves early only, and one that moves late only."""
    x0 = torch.zeros(2, 20)
    x0[0, :10:2], x0[1, 10::2] = 1, 1
    early, late = trajectory_variance(x0)
    assert early == 0 and late == 0.25
    assert trajectory_variance(x0.flip(1)).tolist() == [0.25, 0]


def test_a_window_may_be_a_share_of_the_steps():
    for share, steps in ((0.5, 10), (0.01, 2), (1.0, 20)):
        torch.testing.assert_close(
            trajectory_variance(X0, window=share), trajectory_variance(X0, window=slice(-steps, None))
        )


# --- filters ----------------------------------------------------------------------------------------------------------


def test_filtered_samples_are_the_lowest_in_order():
    scores = torch.tensor([3.0, 1.0, 2.0, 1.0, 0.0, 3.0, 1.0])
    samples = torch.arange(7)
    assert filter_samples(samples, scores, keep=7).tolist() == [4, 1, 3, 6, 2, 0, 5]  # equal ones as given
    for keep in range(8):
        kept = filter_samples(samples, scores, keep=keep)
        rest = torch.tensor([k for k in samples if k not in kept], dtype=torch.long)
        assert len(kept) == keep
        if 0 < keep < 7:
            assert scores[kept].max() <= scores[rest].min()
    assert filter_samples(samples, scores, keep=0.5).tolist() == [4, 1, 3]  # of 3.5
    assert len(filter_samples(samples, scores, keep=1.0)) == 7 and len(filter_samples(samples, scores, keep=1)) == 1
    hundred = torch.arange(100)
    assert [len(filter_samples(hundred, hundred.float(), keep=k / 100)) for k in range(101)] == list(range(101))


def test_a_threshold_is_a_quantile_and_moves_with_the_scale():
    scores = torch.rand(100, generator=draw())
    for retain in (0.01, 0.5, 0.96, 1.0):
        for scale in (1.0, 1e-6, 1e6):
            passed = scale * scores <= threshold_at(scale * scores, retain)
            assert int(passed.sum()) == round(100 * retain)


def test_drawing_until_enough_pass():
    numbers = iter(range(1000))

    def drawn(count):
        batch = torch.tensor([next(numbers) for _ in range(count)])
        return batch, (batch % 10).float()

    keep = HallucinationFilter(drawn, threshold=2.0, batch=8)
    assert keep(7).tolist() == [0, 1, 2, 10, 11, 12, 20]
    assert (keep.drawn, keep.passed) == (24, 9)
    never = HallucinationFilter(lambda n: Scored(torch.zeros(n, 2), torch.ones(n)), threshold=0.5, limit=10)
    with pytest.raises(InputError, match="threshold is 0.5, but of 256 samples drawn only 0 pass it"):
        never(3)


# --- exact mixtures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mixture", [line(), ring(5), lattice(3), Mixture(ring(3).means, 0.2, torch.tensor([1.0, 2, 3]))]
)
def test_the_exact_score_is_the_worlds(mixture):
    x = torch.randn(40, mixture.dimensions, generator=draw(), dtype=torch.float64)
    bars = WIDE.alphas_cumprod
    settings = {"means": mixture.means, "std": mixture.std, "alphas_cumprod": bars, "weights": mixture.weights}
    for t in (0, 30, 99):
        alpha, sigma = bars[t].sqrt().item(), (1 - bars[t]).sqrt().item()
        expected = mixture.score(x, alpha, sigma)
        torch.testing.assert_close(gaussian_mixture_score(x, t, **settings), expected)
        noisy = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(mixture.log_density(noisy, alpha, sigma).sum(), noisy)
        torch.testing.assert_close(gaussian_mixture_score(x, torch.tensor([t] * 40), **settings), gradient)
        assert gaussian_mixture_score(x.float(), t, **settings).dtype == torch.float32
    if mixture.dimensions == 1:
        flat = gaussian_mixture_score(x[:, 0], 3, **{**settings, "means": mixture.means[:, 0]})
        torch.testing.assert_close(flat, gaussian_mixture_score(x, 3, **settings)[:, 0])


def test_at_the_mean_of_a_single_mode_the_score_is_zero():
    mean = torch.tensor([[2.0, -1.0]], dtype=torch.float64)
    for t in (0, 50):
        x = WIDE.alphas_cumprod[t].sqrt() * mean
        score = gaussian_mixture_score(x, t, means=mean, std=0.05, alphas_cumprod=WIDE.alphas_cumprod)
        torch.testing.assert_close(score, torch.zeros_like(x))


class ExactNoise(nn.Module):
    """Predicts noise by the exact score; with `ramp` its jumps between modes are smooth, as a network's are."""

    def __init__(self, mixture, process, ramp=0.0):
        super().__init__()
        self.mixture, self.process, self.ramp = mixture, process, ramp

    def forward(self, x, t):
        bars = self.process.alphas_cumprod
        sigma = (1 - bars[t[0]]).sqrt()
        if not self.ramp:
            score = gaussian_mixture_score(x, t, means=self.mixture.means, std=self.mixture.std, alphas_cumprod=bars)
            return -sigma * score
        alpha, mixture = bars[t[0]].sqrt(), self.mixture
        means, variance = mixture.means.to(x), alpha**2 * mixture.std**2 + sigma**2
        squares = (x[:, None] - alpha * means).square().sum(-1)
        weights = (-squares / (2 * (variance + self.ramp**2))).softmax(-1)
        return sigma * (weights[..., None] * (x[:, None] - alpha * means) / variance).sum(1)


@pytest.mark.parametrize("mixture", [line(), lattice(3)])
def test_samples_of_the_exact_score_are_all_in_support(mixture):
    denoiser = Denoiser(ExactNoise(mixture, WIDE), WIDE)
    noise = torch.randn(4000, mixture.dimensions, generator=draw(), dtype=torch.float64)
    x = sample(denoiser, noise, times=100, step=ddpm, generator=draw(1))
    assert bool(in_support(x, mixture.means, std=mixture.std).all())
    assert interpolation_fraction(x, mixture.means, std=mixture.std) == 0


def test_support_does_not_depend_on_the_order_of_modes():
    mixture = lattice(3)
    x = 4 * torch.randn(200, 2, generator=draw())
    inside = in_support(x, mixture.means, std=0.2)
    assert inside.dtype == torch.bool and 0 < int(inside.sum()) < 200
    assert torch.equal(inside, in_support(x, mixture.means.flip(0), std=0.2))
    assert torch.equal(inside, mixture.distances(x) * 0.05 <= 6 * 0.2)
    fractions = {
        interpolation_fraction(x, mixture.means[order], std=0.1) for order in (torch.arange(9), torch.arange(9).flip(0))
    }
    assert len(fractions) == 1
    flat = in_support(torch.tensor([1.0, 1.3, 1.31, 2.0]), torch.tensor([1.0, 2.0]), std=0.05)
    assert flat.tolist() == [True, True, False, True]  # 6 deviations are 0.3


@pytest.mark.parametrize("turned", [False, True])
def test_neighbours_on_a_grid_are_at_its_edges(turned):
    mixture = lattice(5, turned=turned)
    pairs = neighbours(mixture.means)
    assert len(pairs) == 40
    torch.testing.assert_close(
        (mixture.means[pairs[:, 0]] - mixture.means[pairs[:, 1]]).norm(dim=1),
        torch.full((40,), 2.0, dtype=torch.float64),
    )
    assert neighbours(line((4, 1, 2, 5)).means).tolist() == [[0, 2], [0, 3], [1, 2]]
    assert len(neighbours(ring(8).means)) == 8
    assert neighbours(torch.zeros(2, 2)).tolist() == neighbours(torch.zeros(1, 2)).tolist() == []


def test_interpolations_are_on_lines_between_neighbours():
    mixture = lattice(3)  # at -2, 0, 2
    x = torch.tensor(
        [[0.0, 0.0], [1.0, 0.0], [1.0, 0.25], [1.0, 1.0], [3.0, 0.0], [0.0, -1.0], [2.0, 2.05], [9.0, 9.0]]
    )
    assert interpolation_fraction(x, mixture.means, std=0.05) == 3 / 8  # neither on a diagonal nor beyond the border
    assert interpolation_fraction(torch.tensor([1.5, 1.0, 4.0, 3.0]), torch.tensor([1, 2, 4, 5]), std=0.05) == 0.5


# --- recorders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [slice(-10, None), slice(3, 9), slice(0, None, 4), 0.3])
@pytest.mark.parametrize("shift", [0.0, 1e3])
def test_running_moments_are_those_of_the_trajectory(window, shift):
    stored, running = (TrajectoryRecorder(window=window, running=kind) for kind in (False, True))
    for recorder in (stored, running):
        for _ in range(2):  # it begins anew
            recorder.begin(20)
            for x0 in (X0 + shift).unbind(1):
                recorder.add(x0)
    assert torch.equal(stored.trajectory, X0 + shift)
    torch.testing.assert_close(running.scores, stored.scores, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(stored.scores, trajectory_variance(X0, window=window), rtol=1e-8, atol=1e-10)
    assert running.kept == []


@pytest.mark.parametrize("process", [WIDE, EDM(), Flow()])
@pytest.mark.parametrize("step", [ddpm, heun, dpmpp_2m])
def test_in_our_sampler_x0_is_recorded_and_nothing_changed(process, step):
    denoiser = ring(4).denoiser(process)
    noise = torch.randn(16, 2, generator=draw(), dtype=torch.float64)
    settings = {"times": 20, "step": step}
    plain = sample(denoiser, noise, generator=draw(1), **settings)
    stored, running = TrajectoryRecorder(), TrajectoryRecorder(running=True)
    recorded = sample(denoiser, noise, generator=draw(1), hooks=[stored, running], **settings)
    assert torch.equal(plain, recorded)
    assert stored.trajectory.shape == (16, 20, 2)
    torch.testing.assert_close(
        stored.trajectory[:, -1], sample(denoiser, noise, generator=draw(1), last="x0", **settings)
    )
    torch.testing.assert_close(running.scores, stored.scores, rtol=1e-10, atol=1e-10)
    found = mode_interpolation(denoiser, noise, window=slice(-10, None), generator=draw(1), **settings)
    assert torch.equal(found.samples, plain) and torch.equal(found.scores, running.scores)
    assert torch.equal(found.best(0.5), filter_samples(plain, running.scores, keep=8))


def test_it_is_x0_and_neither_x_nor_noise():
    """One mode and no width: x0 is known from the first step on, while x and its noise move."""
    mixture = Mixture(torch.tensor([[1.0, 2.0]]), 1e-6)
    recorder = TrajectoryRecorder(window=slice(None))
    noise = torch.randn(8, 2, generator=draw(), dtype=torch.float64)
    sample(mixture.denoiser(WIDE), noise, times=20, step=ddpm, hooks=[recorder], generator=draw(1))
    assert float(recorder.scores.max()) < 1e-9


def test_clipping_counts():
    class Clip(Hook):
        def predicted(self, move):
            return Prediction(move.prediction.x0.clamp(-0.1, 0.1), move.prediction.noise)

    denoiser, noise = ring(4).denoiser(WIDE), torch.randn(8, 2, generator=draw(), dtype=torch.float64)
    before, after = TrajectoryRecorder(), TrajectoryRecorder()
    sample(denoiser, noise, times=20, hooks=[before, Clip(), after])
    assert torch.equal(after.trajectory, before.trajectory.clamp(-0.1, 0.1))


def test_samplers_of_one_seed_draw_the_same_and_go_on():
    settings = {"times": 20, "window": 0.25}
    one, two = (sampler(ring(4).denoiser(WIDE), (2,), seed=3, **settings) for _ in range(2))
    first = one(16)
    assert torch.equal(first.samples, two(16).samples) and first.samples.shape == (16, 2)
    assert not torch.equal(first.samples, one(16).samples)
    keep = HallucinationFilter(two, threshold=threshold_at(first.scores, 0.5), batch=16)
    kept = keep(20)
    assert kept.shape == (20, 2) and 0 < keep.passed < keep.drawn


def test_between_modes_where_the_score_has_a_ramp():
    """The paper's cause without training: a jump made smooth leaves samples between, and they move late."""
    mixture = line()
    denoiser = Denoiser(ExactNoise(mixture, WIDE, ramp=0.25), WIDE)
    noise = torch.randn(8000, 1, generator=draw(), dtype=torch.float64)
    recorder = TrajectoryRecorder()
    x = sample(denoiser, noise, times=100, step=ddpm, hooks=[recorder], generator=draw(1))
    bad = ~in_support(x, mixture.means, std=0.05)
    assert 20 < int(bad.sum()) < 400
    assert interpolation_fraction(x, mixture.means, std=0.05) == int(bad.sum()) / 8000
    late, wide = slice(-3, None), slice(-60, None)
    areas = {w: auroc(trajectory_variance(recorder.trajectory, window=slice(w, None)), bad) for w in (-3, -60)}
    assert areas[-3] > 0.75 and areas[-3] > areas[-60] + 0.2
    assert select_window(recorder.trajectory, bad, candidates=[wide, late]) == late
    assert select_window(recorder.trajectory, bad, candidates=[0.6, 0.03]) == slice(97, 100)
    assert select_window(recorder.trajectory, bad, candidates=iter([wide, wide])) == wide
    score = trajectory_variance(recorder.trajectory, window=late)
    removed = float((score[bad] > threshold_at(score[~bad], 0.96)).float().mean())
    assert removed > 0.2  # at random it is 0.04


def test_auroc():
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0])
    for labels, area in (([0, 0, 1, 1], 1.0), ([1, 1, 0, 0], 0.0), ([1, 0, 0, 1], 0.5), ([0, 1, 0, 1], 0.75)):
        assert auroc(scores, torch.tensor(labels)) == area
    assert auroc(torch.ones(4), torch.tensor([0, 1, 0, 1])) == 0.5


# --- pipelines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny.stable_diffusion, tiny.stable_diffusion_xl, tiny.stable_diffusion_3])
def test_inside_a_pipeline_it_records_what_our_sampler_does(make):
    pipe = make()
    settings = {"num_inference_steps": 5, "latents": Z, "output_type": "latent", "guidance_scale": 4.0}
    plain = pipe(PROMPTS, **settings).images
    stored, running = TrajectoryRecorder(window=0.6), TrajectoryRecorder(window=0.6, running=True)
    with stored.attached(pipe), running.attached(pipe):
        for _ in range(2):
            assert torch.equal(pipe(PROMPTS, **settings).images, plain)
    ours = TrajectoryRecorder(window=0.6)
    sample(Denoiser.from_pipeline(pipe), Z, PROMPTS, times=5, guidance=cfg(4.0), hooks=[ours])
    size = float(ours.trajectory.abs().max())
    torch.testing.assert_close(stored.trajectory, ours.trajectory, rtol=1e-3, atol=1e-3 * size)
    torch.testing.assert_close(running.scores, stored.scores, rtol=1e-4, atol=1e-6 * size**2)
    assert "step" not in vars(pipe.scheduler)
    with pytest.raises(KeyError), stored.attached(pipe):
        raise KeyError
    assert "step" not in vars(pipe.scheduler)
    assert torch.equal(pipe(PROMPTS, **settings).images, plain)


def test_with_dpm_solver_and_with_a_guidance_that_has_the_step():
    from diffusers import DPMSolverMultistepScheduler

    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    pipe = tiny.stable_diffusion(DPMSolverMultistepScheduler(**betas))
    settings = {"num_inference_steps": 5, "latents": Z, "output_type": "latent", "guidance_scale": 4.0}
    recorder, ours = TrajectoryRecorder(window=0.6), TrajectoryRecorder(window=0.6)
    with recorder.attached(pipe):
        pipe(PROMPTS, **settings)
    sample(Denoiser.from_pipeline(pipe), Z, PROMPTS, times=5, step=dpmpp_2m, guidance=cfg(4.0), hooks=[ours])
    size = float(ours.trajectory.abs().max())
    torch.testing.assert_close(recorder.trajectory, ours.trajectory, rtol=1e-3, atol=1e-3 * size)
    pipe = tiny.stable_diffusion()
    with attach(pipe, cfgpp(0.6)):
        expected = pipe(PROMPTS, **settings).images
        with recorder.attached(pipe):
            assert torch.equal(pipe(PROMPTS, **settings).images, expected)
        assert torch.equal(pipe(PROMPTS, **settings).images, expected)  # the guidance has its step again
    assert "step" not in vars(pipe.scheduler) and recorder.trajectory.shape == (2, 5, 4, 8, 8)


def test_dit_has_a_score_for_each_sample():
    pipe = tiny.dit()
    recorder = TrajectoryRecorder(window=0.5, running=True)
    with recorder.attached(pipe):
        pipe([0, 1], num_inference_steps=4, generator=draw(), output_type="np")
    assert recorder.scores.shape == (2,) and bool((recorder.scores > 0).all())
    denoiser = Denoiser.from_pipeline(pipe)
    found = mode_interpolation(denoiser, Z, [0, 1], times=4, window=0.5, guidance=cfg(4.0), generator=draw())
    assert found.scores.shape == (2,) and bool(found.scores.isfinite().all())


# --- bad input --------------------------------------------------------------------------------------------------------


def spoilt(value):
    x0 = X0.clone()
    x0[0, -1, 0, 0] = value
    return x0


def unfinished():
    recorder = TrajectoryRecorder(running=True)
    recorder.begin(20)
    for x0 in X0.unbind(1)[:15]:
        recorder.add(x0)
    return recorder.scores


def too_many():
    recorder = TrajectoryRecorder()
    recorder.begin(2)
    for x0 in X0.unbind(1):
        recorder.add(x0)


def nan_while_running():
    recorder = TrajectoryRecorder(running=True)
    recorder.begin(20)
    for x0 in spoilt(float("nan")).unbind(1):
        recorder.add(x0)
    return recorder.scores


def heun_pipeline():
    from diffusers import HeunDiscreteScheduler

    with TrajectoryRecorder().attached(tiny.stable_diffusion(HeunDiscreteScheduler(steps_offset=1))):
        pass


NONE = torch.zeros(6, dtype=torch.bool)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (
            lambda: trajectory_variance(X0, window=slice(5, 5)),
            r"window is slice\(5, 5, None\), but must hold at least one",
        ),
        (lambda: trajectory_variance(X0, window=slice(-21, None)), "must not reach beyond the 20 steps"),
        (lambda: trajectory_variance(X0, window=slice(0, 30)), "must not reach beyond the 20 steps"),
        (lambda: trajectory_variance(X0[:, :5]), "must not reach beyond the 5 steps"),
        (lambda: trajectory_variance(X0, window=slice(None, None, -1)), "window.step is -1"),
        (lambda: trajectory_variance(X0, window=0.0), "window is 0.0, but must be greater than 0"),
        (
            lambda: trajectory_variance(X0[:, :1], window=slice(None)),
            "The trajectory has 1 steps, but must have at least 2",
        ),
        (lambda: trajectory_variance(X0[0, 0, 0]), "x0_trajectory has shape"),
        (lambda: trajectory_variance(spoilt(float("nan"))), "x0_trajectory holds NaN"),
        (lambda: trajectory_variance(spoilt(float("inf"))), "x0_trajectory holds NaN or infinite"),
        (lambda: trajectory_variance(X0, reduction="median"), "reduction is 'median', but must be one of 'mean'"),
        (lambda: filter_samples(X0, torch.zeros(6), keep=7), "keep is 7, but must be at least 0 and at most 6"),
        (lambda: filter_samples(X0, torch.zeros(6), keep=1.5), "keep is 1.5, but must be at least 0 and at most 1"),
        (lambda: filter_samples(X0, torch.zeros(6), keep=-1), "keep is -1"),
        (lambda: filter_samples(X0, torch.zeros(5), keep=2), r"scores has shape \(5,\), but must be \(6,\)"),
        (lambda: filter_samples(X0, torch.full((6,), torch.nan), keep=2), "scores holds NaN"),
        (lambda: threshold_at(torch.zeros(0)), "scores is empty"),
        (lambda: threshold_at(torch.zeros(3), 0.0), "retain is 0.0"),
        (lambda: in_support(torch.zeros(3, 2), torch.zeros(2, 3), std=0.1), "means has shape"),
        (lambda: in_support(torch.zeros(3), torch.zeros(2), std=0.0), "std is 0.0, but must be greater than 0"),
        (lambda: in_support(torch.zeros(3), torch.zeros(2), std=0.1, margin=-1), "margin is -1"),
        (lambda: select_window(X0, NONE, candidates=[0.5]), "hallucinated marks 0 of 6 samples, but must mark some"),
        (lambda: select_window(X0, ~NONE, candidates=[0.5]), "hallucinated marks 6 of 6"),
        (lambda: select_window(X0, ~NONE[:5], candidates=[0.5]), "hallucinated has shape"),
        (lambda: select_window(X0, NONE, candidates=[]), "candidates is empty"),
        (
            lambda: gaussian_mixture_score(
                torch.zeros(3), 100, means=Z[0, 0, 0], std=0.1, alphas_cumprod=WIDE.alphas_cumprod
            ),
            "t is 100, but must be at least 0 and at most 99",
        ),
        (lambda: TrajectoryRecorder(running=True).begin(5), "must not reach beyond the 5 steps"),
        (lambda: TrajectoryRecorder().scores, "There is no trajectory: sample first"),
        (lambda: TrajectoryRecorder(running=True).trajectory, "There is no trajectory"),
        (unfinished, "The window has 5 steps so far: sample to its end first"),
        (too_many, "x0 is that of step 3, but begin was told of 2 steps"),
        (nan_while_running, "The predicted x0 holds NaN"),
        (heun_pipeline, "The scheduler is a HeunDiscreteScheduler, but must ask once a step"),
        (lambda: HallucinationFilter(lambda n: None, threshold=float("nan")), "threshold is nan, but must be a number"),
        (lambda: HallucinationFilter(lambda n: None, threshold=1.0)(0), "keep is 0"),
    ],
)
def test_bad_input(wrong, words):
    with pytest.raises(InputError, match=words):
        wrong()


# --- a trained network ------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Three layers of 64 on x and the logarithm of signal to noise."""

    def __init__(self, process):
        super().__init__()
        bars = process.alphas_cumprod
        self.register_buffer("ratio", ((bars / (1 - bars)).log() / 4).float())
        sizes = [9, 64, 64, 64]
        hidden = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(64, 1))

    def forward(self, x, t):
        s = self.ratio[t][:, None]
        waves = [wave for k in (1, 2, 4) for wave in ((k * s).sin(), (k * s).cos())]
        return self.layers(torch.cat([x, x * (1 + (-4 * s).exp()).sqrt() - 2, s, *waves], 1))


@pytest.mark.slow
def test_a_network_hallucinates_between_modes_and_the_score_tells():
    mixture, count, steps = line(), 512, 3000
    data, draws = mixture.draw(20_000), seeds.generator(0, "toy")
    with seeds.isolated(0):
        net = Net(WIDE)
    optimizer = torch.optim.Adam(net.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x0 = data[torch.randint(len(data), (count,), generator=draws)]
        noise, times = torch.randn(x0.shape, generator=draws), WIDE.random_times(count, draws)
        loss = (net(WIDE.add_noise(x0, noise, times), times) - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    recorder = TrajectoryRecorder()
    noise = torch.randn(20_000, 1, generator=draws)
    x = sample(Denoiser(net, WIDE), noise, times=100, step=ddpm, hooks=[recorder], generator=draws)
    good = in_support(x, mixture.means, std=0.05)
    assert 20 < int((~good).sum()) < 4000
    assert interpolation_fraction(x, mixture.means, std=0.05) > 0.8 * float((~good).float().mean())
    area = {w: auroc(trajectory_variance(recorder.trajectory, window=slice(-w, None)), ~good) for w in (5, 40)}
    assert area[5] > 0.7 and area[5] > area[40] + 0.2  # wide windows tell nothing
    score = trajectory_variance(recorder.trajectory, window=slice(-5, None))
    kept = score <= threshold_at(score[good], 0.96)
    removed = 1 - int((~good & kept).sum()) / int((~good).sum())
    assert removed > 0.15  # at random it is 0.04
