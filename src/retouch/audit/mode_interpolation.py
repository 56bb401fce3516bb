"""Mode interpolation: which samples of a diffusion model lie between the modes of its data.

A sample is a hallucination where the data has next to no density. At small noise the true score jumps from one mode to
the next; a network makes a ramp of the jump, and samples that come into it late stay between the two. Their predicted
x0 moves to the very end, where others have long settled, so its variance over a late window W of the steps tells:

    Hal(x) = mean over coordinates of  1 / |W| sum_{t in W} (x0_t - mean_W x0)^2              definition 2 of the paper

    found = mode_interpolation(denoiser, noise)          samples and their scores; found.best(0.96) keeps the lowest
    recorder = TrajectoryRecorder(window=0.01)           sample(..., hooks=[recorder]); recorder.scores
    with recorder.attached(pipe): pipe(...)              in a pipeline of diffusers
    HallucinationFilter(sampler, threshold=...)(1000)    draws until so many have passed

Use it to drop bad samples, above all before a next model trains on them (draw more, keep the lowest: `filter_samples`).
Not as a number of its own: the scale depends on the data, its dimension, sampler and clipping, so set thresholds by a
quantile of samples that are known to be right (`threshold_at`), under the very sampler that is used. The window counts:
wide ones hold the phase in which every sample moves, and tell nothing. On images it lies further inside;
`select_window` finds it on labelled samples.

Paper: arXiv 2406.09358. Code: locuslab/diffusion-model-hallucination (toys only). Followed here: the last 10 of 1000
steps, population variance, mean over coordinates, keep the lowest. Windows are in the order of sampling: the last steps
are those of least noise. Shares of the steps stand for any number of them. "Neighbours" in `interpolation_fraction` are
this library's reading: two modes to neither of which a third is nearer than they are to each other.

Cost: that of sampling; `running=True` keeps two moments in place of the trajectory. Hallucinations are rare (1 in 1000
and less in the toys), so draw tens of thousands and report counts.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from retouch.core import seeds
from retouch.core.cards import Card
from retouch.core.diffusion.denoiser import Denoiser, Prediction
from retouch.core.diffusion.findings import Findings
from retouch.core.diffusion.guidance import cfg
from retouch.core.diffusion.process import Grid
from retouch.core.diffusion.sampling import Hook, sample, unit_noise
from retouch.core.diffusion.steps import Move, Step, ddpm
from retouch.core.errors import InputError, in_range, one_of, positive
from retouch.core.models import device_of

CARD = Card(
    title="Mode interpolation",
    room="audit",
    paper="arXiv:2406.09358",
    shape="probe",
    line="Finds samples between the modes of the data by how much the predicted x0 still moves late in sampling.",
    tags=("diffusion", "hallucination", "filter", "synthetic data", "no training"),
)

Window = slice | float
LAST = slice(-10, None)
REDUCTIONS = ("mean", "sum", "max")

# --- functional core ------------------------------------------------------------------------------------------------


def trajectory_variance(
    x0_trajectory: Tensor, *, window: Window = LAST, time_dim: int = 1, reduction: str = "mean"
) -> Tensor:
    """The hallucination score of each sample (samples,): variance of the predicted x0 over a window of the steps.

    Args:
        x0_trajectory: predicted x0 (samples, steps, ...), in the order of sampling, the noisiest first; not clipped,
            or clipped as it was for calibration.
        window: of the steps, a slice that does not reach beyond them; or the last share of them, above 0 to 1, of two
            steps at least.
        time_dim: which dimension the steps are; the first of the others is samples.
        reduction: over coordinates, "mean", "sum" or "max".

    Raises:
        InputError: for fewer than 2 steps, a window that is empty or beyond them, or numbers that are not finite.
    """
    one_of("reduction", reduction, REDUCTIONS)
    if x0_trajectory.ndim < 2:
        raise InputError(f"x0_trajectory has shape {tuple(x0_trajectory.shape)}, but must be (samples, steps, ...)")
    x0 = x0_trajectory.movedim(time_dim, 1)
    part = steps_of(window, x0.shape[1])
    late = x0[:, part.start : part.stop : part.step]
    if not bool(late.isfinite().all()) or bool(x0.isnan().any()):
        raise InputError("x0_trajectory holds NaN or infinite numbers, but must be finite in the window")
    late = late.to(torch.promote_types(late.dtype, torch.float32))
    return _reduced(late.var(1, correction=0), reduction)


def filter_samples(samples: Tensor, scores: Tensor, *, keep: int | float) -> Tensor:
    """Samples of the lowest scores, in ascending order; equal ones stay in the order given.

    Args:
        samples: (n, ...).
        scores: (n,).
        keep: how many, 0 to n; or as a float their share, 0 to 1, rounded down.
    """
    count = len(samples)
    if scores.shape != (count,):
        raise InputError(f"scores has shape {tuple(scores.shape)}, but must be ({count},), one a sample")
    if bool(scores.isnan().any()):
        raise InputError("scores holds NaN, but must be numbers")
    in_range("keep", keep, 0, 1 if isinstance(keep, float) else count)
    number = math.floor(keep * count + 1e-9) if isinstance(keep, float) else keep
    return samples[scores.argsort(stable=True)[:number].to(samples.device)]


def threshold_at(scores: Tensor, retain: float = 0.96) -> float:
    """The least score at which a share of these samples passes; give scores of samples that are known to be right.

    Args:
        scores: (n,), one at least.
        retain: share, above 0 to 1.
    """
    in_range("retain", retain, 0, 1, above=True)
    if not scores.numel():
        raise InputError("scores is empty, but must have at least one")
    place = math.ceil(retain * scores.numel() - 1e-9) - 1
    return float(scores.flatten().sort().values[place])


def in_support(samples: Tensor, means: Tensor, *, std: float, margin: float = 6.0) -> Tensor:
    """Whether each sample is within `margin` standard deviations of a mode: (n,), of booleans.

    Args:
        samples: (n, d), or (n,) in one dimension.
        means: (k, d), or (k,).
        std: of each mode, in every direction.
        margin: the paper names none; 6 is this library's.
    """
    positive("std", std)
    in_range("margin", margin, 0)
    points, centres = _points(samples, means)
    return torch.cdist(points, centres).amin(1) <= margin * std


def interpolation_fraction(samples: Tensor, means: Tensor, *, std: float, margin: float = 6.0) -> float:
    """Share of all samples that are out of support and within `margin` deviations of a line between two neighbours.

    Neighbours are modes to neither of which a third is nearer than they are to each other: on a square grid those at
    its edges and not on diagonals, in one dimension one and the next. Over the share that is out of support this is
    the share of hallucinations that are interpolations.

    Args:
        samples: (n, d), or (n,).
        means: (k, d), or (k,).
        std: of each mode.
        margin: as for `in_support`.
    """
    out = samples[~in_support(samples, means, std=std, margin=margin)]
    points, centres = _points(out, means)
    pairs = neighbours(centres)
    if not len(pairs) or not len(points):
        return 0.0
    start, line = centres[pairs[:, 0]], centres[pairs[:, 1]] - centres[pairs[:, 0]]
    along = ((points[:, None] - start) * line).sum(-1) / line.square().sum(-1)
    nearest = start + along.clamp(0, 1)[..., None] * line
    near = (points[:, None] - nearest).norm(dim=-1).amin(1) <= margin * std
    return int(near.sum()) / len(samples)


def neighbours(means: Tensor) -> Tensor:
    """Pairs (p, 2) of modes (k, d), each once: the relative neighbourhood graph (Toussaint 1980)."""
    distance = torch.cdist(means, means)
    # A third mode between: nearer to both than they are to each other (with slack for grids that are turned).
    between = torch.maximum(distance[:, None], distance[None]) < distance[..., None] * (1 - 1e-6)
    apart = (distance > 0) & ~between.any(-1)
    return apart.triu(1).nonzero()


def select_window(
    x0_trajectory: Tensor,
    hallucinated: Tensor,
    *,
    candidates: Iterable[Window],
    time_dim: int = 1,
    reduction: str = "mean",
) -> slice:
    """The window whose score tells labelled samples best, by the area under the ROC curve; of equal ones the first.

    Args:
        x0_trajectory: as for `trajectory_variance`, of a validation set that is not reported on.
        hallucinated: (samples,), of booleans, with both kinds in it.
        candidates: windows to try.
        time_dim: as for `trajectory_variance`.
        reduction: likewise.
    """
    steps, windows = x0_trajectory.shape[time_dim], list(candidates)
    if not windows:
        raise InputError("candidates is empty, but must have at least one window")
    settings: Any = {"time_dim": time_dim, "reduction": reduction}
    areas = [auroc(trajectory_variance(x0_trajectory, window=w, **settings), hallucinated) for w in windows]
    best = windows[max(range(len(windows)), key=lambda k: areas[k])]
    if isinstance(best, slice):
        return best
    return slice(steps_of(best, steps).start, steps)


def auroc(scores: Tensor, hallucinated: Tensor) -> float:
    """Chance that a hallucination scores higher than another sample; 0.5 tells nothing.

    Args:
        scores: (n,).
        hallucinated: (n,), of booleans, with both kinds in it.
    """
    labels = torch.as_tensor(hallucinated).bool().cpu()
    if labels.shape != scores.shape:
        raise InputError(f"hallucinated has shape {tuple(labels.shape)}, but must be {tuple(scores.shape)}")
    if not 0 < int(labels.sum()) < len(labels):
        raise InputError(
            f"hallucinated marks {int(labels.sum())} of {len(labels)} samples, but must mark some, not all"
        )
    _, place, counts = scores.double().cpu().unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[place]  # equal scores share a rank
    bad, good = int(labels.sum()), int((~labels).sum())
    return (float(ranks[labels].sum()) - bad * (bad + 1) / 2) / (bad * good)


def gaussian_mixture_score(
    x: Tensor, t: int | Tensor, *, means: Tensor, std: float, alphas_cumprod: Tensor, weights: Tensor | None = None
) -> Tensor:
    """The exact score of noised Gaussians, like x: what a network is held against; its samples are never between.

    Args:
        x: noisy samples (n, d), or (n,) in one dimension.
        t: timestep, the same for all or (n,).
        means: of the modes (k, d), or (k,).
        std: of each mode.
        alphas_cumprod: (T,).
        weights: of the modes (k,); equal if None.
    """
    positive("std", std)
    points, centres = _points(x, means)
    times = torch.as_tensor(t, device=alphas_cumprod.device).long()
    if bool(((times < 0) | (times >= len(alphas_cumprod))).any()):
        raise InputError(f"t is {t}, but must be at least 0 and at most {len(alphas_cumprod) - 1}")
    bar = alphas_cumprod[times].to(points).reshape(-1, 1, 1)
    variance = bar * std**2 + 1 - bar
    ways = bar.sqrt() * centres - points[:, None]  # (n, k, d)
    logits = -ways.square().sum(-1, keepdim=True) / (2 * variance)
    if weights is not None:
        logits = logits + torch.as_tensor(weights).to(points).log()[:, None]
    return (logits.softmax(1) * ways / variance).sum(1).view_as(x).to(x.dtype)


def steps_of(window: Window, steps: int) -> range:
    """The numbers of the steps in a window.

    Raises:
        InputError: if there are fewer than 2 steps, or the window is empty or reaches beyond them.
    """
    if steps < 2:
        raise InputError(f"The trajectory has {steps} steps, but must have at least 2")
    if not isinstance(window, slice):
        in_range("window", window, 0, 1, above=True)
        return range(steps - max(round(window * steps), 2), steps)
    if any(bound is not None and not -steps <= bound <= steps for bound in (window.start, window.stop)):
        raise InputError(f"window is {window}, but must not reach beyond the {steps} steps of the trajectory")
    if window.step is not None:
        in_range("window.step", window.step, 1)
    part = range(*window.indices(steps))
    if not len(part):
        raise InputError(f"window is {window}, but must hold at least one of the {steps} steps")
    return part


def _reduced(variance: Tensor, reduction: str) -> Tensor:
    flat = variance.reshape(len(variance), -1)
    return flat.amax(1) if reduction == "max" else flat.sum(1) if reduction == "sum" else flat.mean(1)


def _points(samples: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
    """Both in double precision, as (n, d) and (k, d)."""
    points = (samples[:, None] if samples.ndim == 1 else samples.flatten(1)).double()
    centres = torch.as_tensor(means, device=points.device, dtype=torch.float64)
    centres = centres[:, None] if centres.ndim == 1 else centres.flatten(1)
    if not len(centres) or centres.shape[1] != points.shape[1]:
        raise InputError(
            f"means has shape {tuple(torch.as_tensor(means).shape)}, but must be (modes, dimensions) for samples of "
            f"shape {tuple(samples.shape)}"
        )
    return points, centres


# --- plug-in ----------------------------------------------------------------------------------------------------------


class TrajectoryRecorder(Hook):
    """Collects the predicted x0 of every step: after guidance, and after what hooks before it in the list have made.

    With a sampler of your own: `begin(steps)`, then `add(x0)` at every step.

    Args:
        window: of the score, see `trajectory_variance`.
        running: keep mean and squared deviation over the window alone, in memory that does not grow.
        reduction: over coordinates.
    """

    def __init__(self, *, window: Window = LAST, running: bool = False, reduction: str = "mean") -> None:
        one_of("reduction", reduction, REDUCTIONS)
        self.window, self.running, self.reduction = window, running, reduction
        self.steps = self.count = self.seen = 0
        self.kept: list[Tensor] = []
        self.mean: Tensor | None = None
        self.squares: Tensor | None = None

    def begin(self, steps: int) -> None:
        """Forget all, before a trajectory of so many steps."""
        self.part = steps_of(self.window, steps) if self.running else range(steps)
        self.steps, self.count, self.seen = steps, 0, 0
        self.kept, self.mean, self.squares = [], None, None

    def add(self, x0: Tensor) -> None:
        """The predicted x0 (samples, ...) of the next step."""
        if self.count >= self.steps:
            raise InputError(f"x0 is that of step {self.count + 1}, but begin was told of {self.steps} steps")
        step, self.count = self.count, self.count + 1
        x0 = x0.detach()
        if not self.running:
            self.kept.append(x0)
        elif step in self.part:  # Welford's update
            x0 = x0.to(torch.promote_types(x0.dtype, torch.float32))
            mean = torch.zeros_like(x0) if self.mean is None else self.mean
            squares = torch.zeros_like(x0) if self.squares is None else self.squares
            self.seen += 1
            change = x0 - mean
            self.mean = mean + change / self.seen
            self.squares = squares + change * (x0 - self.mean)

    def start(self, x: Tensor, grid: Grid) -> None:
        """See `Hook.start`."""
        self.begin(grid.steps)

    def predicted(self, move: Move) -> Prediction:
        """See `Hook.predicted`; nothing is changed."""
        self.add(move.prediction.x0)
        return move.prediction

    @property
    def trajectory(self) -> Tensor:
        """Predicted x0 (samples, steps, ...)."""
        if not self.kept:
            raise InputError("There is no trajectory: sample first, with running=False")
        return torch.stack(self.kept, 1)

    @property
    def scores(self) -> Tensor:
        """Hallucination score of each sample (samples,) of the last trajectory."""
        if not self.running:
            return trajectory_variance(self.trajectory, window=self.window, reduction=self.reduction)
        if self.squares is None or self.seen < len(self.part):
            raise InputError(f"The window has {self.seen} steps so far: sample to its end first")
        if not bool(self.squares.isfinite().all()):
            raise InputError("The predicted x0 holds NaN or infinite numbers, but must be finite in the window")
        return _reduced(self.squares / self.seen, self.reduction)

    @contextmanager
    def attached(self, pipeline: Any) -> Iterator[Any]:
        """Record what a pipeline of diffusers predicts, inside the block, with whatever guidance it has.

        Args:
            pipeline: whose scheduler tells x0 (DDIM, DDPM, Euler, LCM, ...), or is a FlowMatchEuler or DPM-Solver++.

        Yields:
            The pipeline.
        """
        scheduler = pipeline.scheduler
        if getattr(scheduler, "order", 1) != 1:
            raise InputError(f"The scheduler is a {type(scheduler).__name__}, but must ask once a step")
        before, own = vars(scheduler).get("step"), scheduler.step
        halved = "DiT" in type(pipeline).__name__  # whose pipeline steps the rows of both branches

        def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            whole = kwargs.pop("return_dict", True)
            result = own(model_output, timestep, sample, *args, return_dict=True, **kwargs)
            x0 = _x0_of(scheduler, result, model_output, timestep, sample)
            half = len(x0) // 2
            if halved and torch.equal(sample[:half], sample[half:]):
                x0 = x0[:half]
            place = int((scheduler.timesteps - torch.as_tensor(timestep).to(scheduler.timesteps)).abs().argmin())
            if place == 0 or place < self.count or self.steps != len(scheduler.timesteps):
                self.begin(len(scheduler.timesteps))
                self.count = place  # image-to-image begins further down
            self.add(x0)
            return result if whole else (result.prev_sample,)

        scheduler.step = step
        try:
            yield pipeline
        finally:
            if before is None:
                del scheduler.step  # the class's own is seen again
            else:
                scheduler.step = before


def _x0_of(scheduler: Any, result: Any, output: Tensor, timestep: Any, sample: Tensor) -> Tensor:
    told = getattr(result, "pred_original_sample", None)
    if told is not None:
        return told
    if "FlowMatch" in type(scheduler).__name__:
        return sample - float(timestep) / scheduler.config.num_train_timesteps * output
    if "dpmsolver++" in scheduler.config.get("algorithm_type", ""):
        return scheduler.model_outputs[-1]
    raise InputError(
        f"The scheduler is a {type(scheduler).__name__}, but must tell pred_original_sample (DDIM, DDPM, Euler), or be "
        "a FlowMatchEuler or DPM-Solver++ scheduler"
    )


@dataclass(frozen=True)
class Scored:
    """Samples and how much each was still moving.

    Attributes:
        samples: (n, ...).
        scores: (n,); higher is more likely a hallucination.
    """

    samples: Tensor
    scores: Tensor

    def best(self, keep: int | float) -> Tensor:
        """See `filter_samples`."""
        return filter_samples(self.samples, self.scores, keep=keep)


def mode_interpolation(
    denoiser: Denoiser,
    noise: Tensor,
    condition: Any = None,
    *,
    window: Window = 0.01,
    times: int | Grid = 1000,
    step: Step = ddpm,
    reduction: str = "mean",
    hooks: Sequence[Hook] = (),
    **settings: Any,
) -> Scored:
    """Sample, and score every sample, in memory that does not grow with the steps.

    Args:
        denoiser: model and noise levels.
        noise: of unit variance (b, ...).
        condition: as for `core.diffusion.sampling.sample`.
        window: of the steps, a slice or the last share of them; the paper's is the last 10 of 1000.
        times: steps, or a grid.
        step: the paper samples by DDPM.
        reduction: over coordinates.
        hooks: further ones; x0 is recorded after them.
        settings: further ones of `sample`, such as `guidance` and `generator`.
    """
    recorder = TrajectoryRecorder(window=window, running=True, reduction=reduction)
    samples = sample(denoiser, noise, condition, times=times, step=step, hooks=[*hooks, recorder], **settings)
    return Scored(samples, recorder.scores)


def findings(
    pipeline: Any,
    prompt: Any,
    *,
    count: int = 64,
    steps: int = 100,
    window: float = 0.1,
    keep: float = 0.9,
    guidance_scale: float = 7.5,
    seed: int = 0,
) -> Findings:
    """Images of a prompt, the most doubtful first.

    Args:
        pipeline: of diffusers.
        prompt: text, or a class of DiT.
        count: images.
        steps: of DDPM.
        window: last share of the steps that the score looks at.
        keep: share of the images, those of the lowest scores, that are called fine.
        guidance_scale: of classifier-free guidance.
        seed: of the noise.
    """
    in_range("keep", keep, 0, 1)
    positive("count", count)
    denoiser, draw = Denoiser.from_pipeline(pipeline), seeds.generator(seed, "findings")
    noise = unit_noise(denoiser, count, draw)
    guidance = None if guidance_scale == 1 else cfg(guidance_scale)
    found = mode_interpolation(denoiser, noise, prompt, window=window, times=steps, guidance=guidance, generator=draw)
    order = found.scores.argsort(descending=True, stable=True)
    fine = math.floor(keep * count + 1e-9)
    rows = [
        {"image": place, "score": float(found.scores[row]), "noise": int(row), "kept": place >= count - fine}
        for place, row in enumerate(order.tolist())
    ]
    low, high = float(found.scores.min()), float(found.scores.max())
    words = [
        f"The predicted x0 still moved by {low:.3g} to {high:.3g} (a variance) in the last {window:.0%} of the steps; "
        f"{count - fine} of {count} images are above the limit that keeps {keep:.0%}.",
        "The score has no scale of its own: look at the first images beside the last.",
    ]
    images = torch.cat([denoiser.decode(part) for part in found.samples[order.to(found.samples.device)].split(16)])
    return Findings(images=images, rows=rows, words=words, tensors={"noise": noise[order.to(noise.device)].cpu()})


def sampler(
    denoiser: Denoiser, shape: Sequence[int], condition: Any = None, *, seed: int = 0, **settings: Any
) -> Callable[[int], Scored]:
    """A function that draws so many samples with their scores, others at each call.

    Args:
        denoiser: model and noise levels.
        shape: of one sample.
        condition: a text, a label, or keywords of the model with a single row.
        seed: of noise.
        settings: of `mode_interpolation`.
    """
    draw = seeds.generator(seed, "mode_interpolation")

    def drawn(count: int) -> Scored:
        noise = torch.randn(count, *shape, generator=draw).to(device_of(denoiser.model))
        return mode_interpolation(denoiser, noise, condition, generator=draw, **settings)

    return drawn


class HallucinationFilter:
    """Draws until enough samples have passed.

    Args:
        sample_fn: count -> `Scored`, or (samples, scores); see `sampler`.
        threshold: highest score that passes, see `threshold_at`.
        batch: samples at once.
        limit: most draws for each sample kept.

    Attributes:
        drawn: samples drawn so far.
        passed: of them.
    """

    def __init__(
        self, sample_fn: Callable[[int], Any], *, threshold: float, batch: int = 256, limit: float = 100.0
    ) -> None:
        in_range("threshold", threshold)
        in_range("batch", batch, 1)
        in_range("limit", limit, 1)
        self.sample_fn, self.threshold, self.batch, self.limit = sample_fn, threshold, batch, limit
        self.drawn = self.passed = 0

    def __call__(self, keep: int) -> Tensor:
        """So many samples (keep, ...) that pass, in the order they were drawn.

        Raises:
            InputError: if next to none passes.
        """
        in_range("keep", keep, 1)
        found: list[Tensor] = []
        have = draws = 0
        while have < keep:
            if draws >= max(self.limit * keep, self.batch):
                raise InputError(f"threshold is {self.threshold:g}, but of {draws} samples drawn only {have} pass it")
            batch = self.sample_fn(self.batch)
            samples, scores = (batch.samples, batch.scores) if isinstance(batch, Scored) else batch
            good = samples[scores <= self.threshold]
            self.drawn, self.passed = self.drawn + len(samples), self.passed + len(good)
            found, have, draws = [*found, good], have + len(good), draws + len(samples)
        return torch.cat(found)[:keep]
