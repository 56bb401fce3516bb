"""EluCD: classifier guidance with an ordinary classifier, trained on clean images alone.

Four choices make a classifier off the shelf guide as well as one that was trained on noise:

    input        the predicted clean image x0, cut off from the diffusion model: no gradient goes through it
    smoothness   every ReLU of the classifier becomes Softplus(beta), with the same weights
    direction    ell = t1 f_y - logsumexp(t2 f), f the logits; g = c grad_x0 ell
    schedule     b_t = max(gamma max_variance sin(pi t / T), 0), t of T sampling steps

    DDPM         mean' = mean + (V + b_t) g, V the posterior variance, max_variance the largest V of the run so far
    EDM          x_hat = x + gamma_i r g on the way of Heun's sampler, with r the RMS of x, g of unit RMS taken at
                 x / max(r, 1), t1 = 1, t2 = 0, and
                 gamma_i = max(m (N + 1 - i) / (N + 1), 1e-5) + m a sin(pi i / N)        step i of N

t2 = t1 is the usual gradient of log p(y | x), t2 = 0 that of the bare logit: t1 draws towards the joint p(x, y), t2
takes the marginal p(x) away. Both multiply logits: they are inverse temperatures, called as in the paper.

Use it to put a class on an unconditional or weakly conditional model when a classifier of clean images is at hand.
Guiding a conditional model mixes two conditions: look at an unconditional one too. Not for tasks where the chain rule
matters (inverse problems): the shift is V times a gradient in x0, a heuristic and no posterior;
`through_denoiser=True` has the true gradient at x, for the price of a backward pass through the model.

Which plug-in:

    sample(..., step=ddpm, hooks=[OffTheShelfClassifierGuidance(classifier, labels)])      the paper's DDPM sampler
    sample(..., step=heun, hooks=[EDMClassifierGuidance(classifier, labels)])              its EDM sampler
    sample(..., guidance=cfg(4.0) + elucd(classifier, labels)), or attach(pipe, ...)       a variant, see below

`elucd` is a variant of ours for DDIM and the deterministic steps, which have no V: noise' = noise - sigma g, as
classifier guidance does it, and no bump. The paper guides DiT on top of classifier-free guidance as well, but has not
released how.

Paper: arXiv 2310.11311 (ICLR 2024). Code: AlexMaOLS/EluCD. It exponentiates raw logits, here logsumexp is used; it
takes max_variance from one pixel of the first sample, as is done here; it feeds the classifier 64 or 128
pixels in -1 to 1 without ImageNet's mean and deviation: `preprocess` is for those who want them, and must decode
latents. Its weight is above 0 even at m = 0; here max_guidance = 0 is off.

Cost: one forward and backward pass of the classifier a step, and none of the diffusion model.
"""

import ast
import functools
import inspect
import math
import textwrap
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retouch.core.cards import Card
from retouch.core.diffusion.denoiser import Prediction
from retouch.core.diffusion.guidance import Guidance
from retouch.core.diffusion.process import EDM, Grid, Level
from retouch.core.diffusion.sampling import Hook
from retouch.core.diffusion.steps import Move, ancestral_sigma
from retouch.core.errors import InputError, in_range, positive
from retouch.core.models import logits_of, mode, own

CARD = Card(
    title="Off-the-shelf classifier guidance (EluCD)",
    room="guide",
    paper="arXiv:2310.11311",
    shape="sampler part",
    line="Steers a diffusion model to a class by the smoothed gradient of an ordinary classifier at the predicted x0.",
    tags=("diffusion", "guidance", "classifier", "unconditional", "no training"),
    plugin="OffTheShelfClassifierGuidance",
)

Classifier = Callable[[Tensor], Any]  # images (b, ...) to logits (b, classes), or an output that has them
Labels = Tensor | int
Preprocess = Callable[[Tensor], Tensor]
SMALLEST = 1e-5  # the least weight in the EDM sampler; what is below is not worth a call of the classifier

# --- functional core ------------------------------------------------------------------------------------------------


def joint_marginal_log_prob(
    logits: Tensor, labels: Tensor, *, joint_temperature: float = 1.0, marginal_temperature: float = 0.5
) -> Tensor:
    """ell = t1 f_y - logsumexp(t2 f): log p(y | x) if both are 1.

    Args:
        logits: f (b, classes).
        labels: y (b,), integers from 0 to classes - 1.
        joint_temperature: t1, at least 0; multiplies the label's logit.
        marginal_temperature: t2, at least 0; multiplies all logits of the sum. At 0 the sum is a constant.

    Returns:
        (b,), with gradients.
    """
    in_range("joint_temperature", joint_temperature, 0)
    in_range("marginal_temperature", marginal_temperature, 0)
    if logits.ndim != 2:
        raise InputError(f"logits has shape {tuple(logits.shape)}, but must be (batch, classes)")
    _check_labels(labels, *logits.shape)
    chosen = logits.gather(1, labels.to(logits.device).long()[:, None])[:, 0]
    return joint_temperature * chosen - (marginal_temperature * logits).logsumexp(1)


def classifier_gradient(
    classifier: Classifier,
    x0: Tensor,
    labels: Tensor,
    *,
    joint_temperature: float = 1.0,
    marginal_temperature: float = 0.5,
    scale: float = 1.0,
    preprocess: Preprocess | None = None,
) -> Tensor:
    """g = scale grad_x0 ell: nothing flows further back than x0, nor into the classifier's weights.

    Args:
        classifier: a module, asked in eval mode and in the type of its weights, or a function.
        x0: predicted clean images (b, ...).
        labels: (b,).
        joint_temperature: t1.
        marginal_temperature: t2.
        scale: c.
        preprocess: differentiable, of x0 before the classifier sees it; as it is if None.

    Returns:
        Like x0, detached.
    """
    guide = _Guide(classifier, labels, joint_temperature, marginal_temperature, preprocess)
    return scale * guide.gradient(x0)


def sine_boost(timesteps: Tensor, *, num_timesteps: int, max_variance: float | Tensor, gamma: float = 0.3) -> Tensor:
    """b_t = max(gamma max_variance sin(pi t / T), 0): 0 at both ends and largest in the middle.

    Args:
        timesteps: t (any shape), 0 to T.
        num_timesteps: T, the steps that sampling takes.
        max_variance: largest posterior variance so far, at least 0.
        gamma: at least 0; 0 switches it off.
    """
    positive("num_timesteps", num_timesteps)
    in_range("gamma", gamma, 0)
    t, total = torch.as_tensor(timesteps), int(num_timesteps)
    if not bool(((t >= 0) & (t <= total)).all()):
        raise InputError(f"timesteps is {t.tolist()}, but must be 0 to {total}, which is num_timesteps")
    share = torch.minimum(t, total - t) / total  # the sine is the same, and exactly 0 at T
    return ((math.pi * share).sin() * max_variance * gamma).clamp_min(0.0)


def guided_mean(mean: Tensor, *, grad: Tensor, variance: float | Tensor, extra: float | Tensor = 0.0) -> Tensor:
    """mean + (V + b) g.

    Args:
        mean: of the posterior (b, ...).
        grad: like mean.
        variance: V, a number or a tensor that broadcasts.
        extra: b, likewise.
    """
    if grad.shape != mean.shape:
        raise InputError(f"grad has shape {tuple(grad.shape)}, but must have that of mean, {tuple(mean.shape)}")
    return mean + torch.as_tensor(variance + extra).to(mean.device, mean.dtype) * grad


def softplus_activations(
    module: nn.Module, *, beta: float = 3.0, inplace: bool = False, strict: bool = True
) -> nn.Module:
    """The module with Softplus(beta) in the place of every `nn.ReLU`, and the same weights.

    Args:
        module: a classifier.
        beta: smoothness; each activation differs from ReLU by at most ln 2 / beta.
        inplace: change the module itself instead of a copy.
        strict: refuse a module whose code calls relu as a function, which cannot be swapped; False only warns.

    Raises:
        InputError: if there are such calls, with the layers.
    """
    positive("beta", beta)
    calls = [
        f"{name or 'the module itself'} ({type(m).__name__})" for name, m in module.named_modules() if _calls_relu(m)
    ]
    if calls:
        message = (
            f"module calls relu as a function in {', '.join(calls[:5])}{', ...' if len(calls) > 5 else ''}, but must "
            "have nn.ReLU layers to be swapped"
        )
        if strict:
            raise InputError(message)
        warnings.warn(message, stacklevel=2)
    module = own(module, inplace=inplace)
    if isinstance(module, nn.ReLU):
        return nn.Softplus(beta).train(module.training)
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):  # named_children leaves out what is there twice
            if isinstance(child, nn.ReLU):
                setattr(parent, name, nn.Softplus(beta).train(child.training))
    return module


def edm_weights(num_steps: int, *, max_guidance: float = 0.004, add_factor: float = 0.3) -> list[float]:
    """gamma_i of every step: falls on a line from m, with a sine bump of height m a.

    Args:
        num_steps: N.
        max_guidance: m, at least 0; 0 is no guidance at all.
        add_factor: a, at least 0.
    """
    in_range("num_steps", num_steps, 1)
    in_range("max_guidance", max_guidance, 0)
    in_range("add_factor", add_factor, 0)
    if max_guidance == 0:
        return [0.0] * num_steps
    length = num_steps + 1
    falling = (max(max_guidance / length * (length - i), SMALLEST) for i in range(num_steps))
    return [f + math.sin(math.pi * i / num_steps) * max_guidance * add_factor for i, f in enumerate(falling)]


def edm_push(gradient: Callable[[Tensor], Tensor], x: Tensor, *, weight: float, alpha: float = 1.0) -> Tensor:
    """What is added to a noisy sample: `weight` times its RMS, along the gradient where its RMS is scaled down to 1.

    Args:
        gradient: of ell, asked at x / max(RMS, 1) in float32.
        x: noisy (b, ...).
        weight: gamma_i.
        alpha: of x0 in x; 1 in EDM. Elsewhere the rule is that of x / alpha.

    Returns:
        Like x; its RMS is weight times that of x, or 0 where the gradient is 0.
    """
    size = _rms(x)
    clean = (x / size.clamp_min(alpha if alpha > 0 else torch.finfo(x.dtype).tiny)).float()
    direction = gradient(clean).to(x.dtype)
    length = _rms(direction)
    return weight * size * torch.where(length > 0, direction / length, 0.0)


@torch.no_grad()
def elucd_edm_sample(
    denoise: Callable[[Tensor, Tensor], Tensor],
    latents: Tensor,
    labels: Labels | None,
    classifier: Classifier | None,
    *,
    num_steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    max_guidance: float = 0.004,
    add_factor: float = 0.3,
    joint_temperature: float = 1.0,
    marginal_temperature: float = 0.0,
    preprocess: Preprocess | None = None,
) -> Tensor:
    """Heun's sampler of EDM with the push at the start of every step; its correction asks the classifier no more.

    Args:
        denoise: (x, sigma) -> x0; sigma is a tensor without dimensions.
        latents: unit noise (b, ...), in the type to compute in (EDM: float64).
        labels: (b,), or one for all.
        classifier: as it is: smooth it by `softplus_activations` (the EDM code has beta = 5); None is no guidance.
        num_steps: N.
        sigma_min: the last noise level above 0.
        sigma_max: the first.
        rho: of the schedule.
        max_guidance: m; 0 is no guidance.
        add_factor: a.
        joint_temperature: t1.
        marginal_temperature: t2.
        preprocess: of the classifier's input.

    Returns:
        Clean samples (b, ...).
    """
    sigmas = [level.sigma for level in EDM(sigma_min, sigma_max, rho).grid(num_steps).levels]
    weights = edm_weights(num_steps, max_guidance=max_guidance, add_factor=add_factor)
    if classifier is None:
        weights = [0.0] * num_steps
    guide = _Guide(classifier, labels, joint_temperature, marginal_temperature, preprocess)
    x = latents * sigmas[0]

    def slope(x: Tensor, sigma: float) -> Tensor:
        return (x - denoise(x, torch.tensor(sigma, dtype=x.dtype, device=x.device))) / sigma

    for (now, after), weight in zip(pairwise(sigmas), weights, strict=True):
        start = x + edm_push(guide.gradient, x, weight=weight) if weight >= SMALLEST else x
        first = slope(start, now)
        x = start + (after - now) * first
        if after > 0:
            x = start + (after - now) * (first + slope(x, after)) / 2
    return x


def expected_calibration_error(probs: Tensor, labels: Tensor, *, num_bins: int = 15) -> float:
    """Mean distance between confidence and accuracy over equal-width bins of confidence, weighted by their samples.

    Measured on samples along the reverse process it tells what input a classifier can be trusted with: the paper's
    diagnosis. The paper does not say how many bins it has.

    Args:
        probs: (b, classes), each row of sum 1.
        labels: (b,).
        num_bins: at least 1.

    Returns:
        0 to 1.
    """
    in_range("num_bins", num_bins, 1)
    if probs.ndim != 2 or not len(probs):
        raise InputError(f"probs has shape {tuple(probs.shape)}, but must be (batch, classes)")
    _check_labels(labels, *probs.shape)
    if bool((probs < 0).any()) or not torch.allclose(probs.sum(1), torch.ones_like(probs[:, 0]), atol=1e-3):
        raise InputError("probs has rows that are below 0 or do not sum to 1, but must have probabilities")
    confidence, chosen = probs.detach().double().max(1)
    right = (chosen == labels.to(probs.device)).double()
    bins = (confidence * num_bins).ceil().long().clamp(1, num_bins) - 1  # each holds its upper edge
    gaps = torch.zeros(num_bins, dtype=torch.float64, device=probs.device).index_add_(0, bins, confidence - right)
    return float(gaps.abs().sum()) / len(probs)


# --- plug-ins ---------------------------------------------------------------------------------------------------------


class _Guide:
    """A classifier, what is wanted of it, and the gradient of that."""

    def __init__(
        self,
        classifier: Classifier | None,
        labels: Labels | None,
        joint_temperature: float,
        marginal_temperature: float,
        preprocess: Preprocess | None,
        softplus_beta: float | None = None,
    ) -> None:
        in_range("joint_temperature", joint_temperature, 0)
        in_range("marginal_temperature", marginal_temperature, 0)
        if softplus_beta is not None and isinstance(classifier, nn.Module):
            classifier = softplus_activations(classifier, beta=softplus_beta)
        self.classifier, self.labels, self.preprocess = classifier, labels, preprocess
        self.temperatures = {"joint_temperature": joint_temperature, "marginal_temperature": marginal_temperature}

    def ell(self, x0: Tensor, labels: Labels | None = None) -> Tensor:
        """Its sum over the samples; in eval mode they do not mix."""
        labels = self.labels if labels is None else labels
        if labels is None or self.classifier is None:
            raise InputError("labels is None, but must be the wanted classes, one a sample or one for all")
        told = torch.as_tensor(labels)
        told = told.expand(len(x0)) if told.ndim == 0 else told
        seen = x0 if self.preprocess is None else self.preprocess(x0)
        if not isinstance(self.classifier, nn.Module):
            return joint_marginal_log_prob(logits_of(self.classifier(seen)), told, **self.temperatures).sum()
        kind = next((p.dtype for p in self.classifier.parameters()), seen.dtype)
        with mode(self.classifier, training=False):
            logits = logits_of(self.classifier(seen.to(kind)))
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return joint_marginal_log_prob(wide, told, **self.temperatures).sum()

    def gradient(self, x0: Tensor, labels: Labels | None = None) -> Tensor:
        """At x0, and no further back."""
        with torch.enable_grad():
            x0 = x0.detach().requires_grad_()
            (found,) = torch.autograd.grad(self.ell(x0, labels), x0)
        return found


class OffTheShelfClassifierGuidance(Hook):
    """The guidance for DDPM: a hook of our sampler, to go with `step=ddpm`, and a conditional function for others.

        guide = OffTheShelfClassifierGuidance(resnet, labels)
        images = sample(denoiser, noise, step=ddpm, hooks=[guide], generator=generator)

        guide.reset()                       # in a sampler of your own: at the start of a run, and then at every step
        extra = guide.boost(variance, timestep=t, num_timesteps=T)
        mean = guided_mean(mean, grad=guide(x0), variance=variance, extra=extra)

    Args:
        classifier: of clean images.
        labels: wanted classes (b,), or one for all; may be given in the call instead.
        joint_temperature: t1.
        marginal_temperature: t2.
        scale: c; 0 switches all of it off.
        gamma: height of the sine bump.
        softplus_beta: the guidance has a copy of the classifier with Softplus(beta); None takes it as it is.
        preprocess: differentiable, of x0 before the classifier sees it: statistics, size, or a decoder of latents.
        clip: let the sampler clip x0 to -1 to 1, as the released code does for pixels; never for latents.
        through_denoiser: differentiate at x, through the diffusion model, for comparison.

    Attributes:
        max_variance: the largest posterior variance of this run; `reset` (and the start of `sample`) puts it to 0.
    """

    def __init__(
        self,
        classifier: Classifier,
        labels: Labels | None = None,
        *,
        joint_temperature: float = 1.0,
        marginal_temperature: float = 0.5,
        scale: float = 1.0,
        gamma: float = 0.3,
        softplus_beta: float | None = 3.0,
        preprocess: Preprocess | None = None,
        clip: bool = False,
        through_denoiser: bool = False,
    ) -> None:
        in_range("scale", scale, 0)
        in_range("gamma", gamma, 0)
        self.guide = _Guide(classifier, labels, joint_temperature, marginal_temperature, preprocess, softplus_beta)
        self.scale, self.gamma, self.clip, self.through_denoiser = scale, gamma, clip, through_denoiser
        self.max_variance = 0.0

    def reset(self) -> None:
        """Forget the variances of the last run."""
        self.max_variance = 0.0

    def __call__(self, x0: Tensor, t: Any = None, y: Labels | None = None, **_: Any) -> Tensor:
        """g (b, ...) at a predicted x0, for samplers that take a conditional function; t is not looked at."""
        return self.scale * self.guide.gradient(x0, y)

    def boost(self, variance: float | Tensor, *, timestep: int, num_timesteps: int) -> float:
        """b_t of the next step of a run; the first value of the variance goes into `max_variance`.

        Args:
            variance: of the posterior, a number or (b, ...).
            timestep: t, counted in sampling steps, from T - 1 down to 0.
            num_timesteps: T, the steps that sampling takes.
        """
        self.max_variance = max(self.max_variance, float(torch.as_tensor(variance).flatten()[0]))
        t = torch.tensor(timestep, dtype=torch.float64)
        return float(sine_boost(t, num_timesteps=num_timesteps, max_variance=self.max_variance, gamma=self.gamma))

    def start(self, x: Tensor, grid: Grid) -> None:
        self.reset()

    def predicted(self, move: Move) -> Prediction:
        if not self.clip:
            return move.prediction
        x0 = move.prediction.x0.clamp(-1, 1)
        return Prediction(x0, (move.x - move.here.alpha * x0) / move.here.sigma)

    def after(self, move: Move, x: Tensor) -> Tensor:
        here = move.here
        variance = ancestral_sigma(here, move.there) ** 2
        extra = self.boost(variance, timestep=here.steps - 1 - here.index, num_timesteps=here.steps)
        if (variance + extra) * self.scale < SMALLEST:
            return x
        gradient = self._chained(move) if self.through_denoiser else self(move.prediction.x0)
        return guided_mean(x, grad=gradient, variance=variance, extra=extra)

    def _chained(self, move: Move) -> Tensor:
        with torch.enable_grad():
            x = move.x.detach().requires_grad_()
            (found,) = torch.autograd.grad(self.guide.ell(move.predict(x, move.here).x0), x)
        return self.scale * found


class EDMClassifierGuidance(Hook):
    """The guidance for `step=heun`: `elucd_edm_sample` as a hook of our sampler, for EDM and every other process.

    Args:
        classifier: of clean images.
        labels: wanted classes (b,), or one for all.
        max_guidance: m; 0 switches it off.
        add_factor: a.
        joint_temperature: t1.
        marginal_temperature: t2.
        softplus_beta: as for `OffTheShelfClassifierGuidance`; the EDM code has 5.
        preprocess: likewise.
    """

    def __init__(
        self,
        classifier: Classifier,
        labels: Labels,
        *,
        max_guidance: float = 0.004,
        add_factor: float = 0.3,
        joint_temperature: float = 1.0,
        marginal_temperature: float = 0.0,
        softplus_beta: float | None = 5.0,
        preprocess: Preprocess | None = None,
    ) -> None:
        self.settings = {"max_guidance": max_guidance, "add_factor": add_factor}
        edm_weights(1, **self.settings)  # refuses what is no weight
        self.guide = _Guide(classifier, labels, joint_temperature, marginal_temperature, preprocess, softplus_beta)

    def before(self, x: Tensor, level: Level, denoiser: Any, conditions: Any) -> Tensor:
        weight = edm_weights(level.steps, **self.settings)[level.index]
        return x if weight < SMALLEST else x + edm_push(self.guide.gradient, x, weight=weight, alpha=level.alpha)


def elucd(
    classifier: Classifier,
    labels: Labels,
    *,
    joint_temperature: float = 1.0,
    marginal_temperature: float = 0.5,
    scale: float = 1.0,
    softplus_beta: float | None = 3.0,
    preprocess: Preprocess | None = None,
) -> Guidance:
    """The variant for DDIM and the other deterministic steps, for `sample(guidance=...)` and `attach`: not the paper's.

    noise' = noise - sigma g and x0' = x0 + sigma^2 / alpha g, with g at the conditional branch's x0.

    Args:
        classifier: of clean images.
        labels: wanted classes (b,), or one for all.
        joint_temperature: t1.
        marginal_temperature: t2.
        scale: c; 0 switches it off.
        softplus_beta: as for `OffTheShelfClassifierGuidance`.
        preprocess: likewise; for latents it must decode them.
    """
    in_range("scale", scale, 0)
    guide = _Guide(classifier, labels, joint_temperature, marginal_temperature, preprocess, softplus_beta)

    def change(found: Any, x: Tensor, level: Level) -> Prediction:
        x0 = found["cond"].x0
        gradient = scale * guide.gradient(x0) if scale else torch.zeros_like(x0)
        return Prediction(level.sigma**2 / level.alpha * gradient, -level.sigma * gradient)

    return Guidance(name="elucd", change=change)


# --- helpers ----------------------------------------------------------------------------------------------------------


def _rms(x: Tensor) -> Tensor:
    """Of each sample, (b, 1, ...)."""
    return x.square().mean(tuple(range(1, x.ndim)), keepdim=True).sqrt()


def _check_labels(labels: Tensor, batch: int, classes: int) -> None:
    if labels.shape != (batch,):
        raise InputError(f"labels has shape {tuple(labels.shape)}, but must be ({batch},), one a sample")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise InputError(f"labels is of {labels.dtype}, but must be of integers")
    if batch and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise InputError(f"labels is {labels.tolist()}, but must be 0 to {classes - 1}, the classes of the classifier")


RELUS = {"relu", "relu_"}


def _calls_relu(module: nn.Module) -> bool:
    """Whether a layer's own code calls relu as a function, or it was handed one, as torch's transformers are."""
    held = (F.relu, torch.relu, torch.relu_, torch.nn.functional.relu_)
    if any(value is function for value in vars(module).values() for function in held):
        return True
    return any(_source_calls_relu(kind) for kind in type(module).__mro__ if not kind.__module__.startswith("torch.nn"))


@functools.cache
def _source_calls_relu(kind: type) -> bool:
    if not issubclass(kind, nn.Module):
        return False
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):  # made without a file: nothing can be said
        return False
    return any(name in RELUS for name in _functions_called(tree))


def _functions_called(tree: ast.AST) -> Iterator[str]:
    """Names of what is called and is no attribute of self: of `F.relu(x)` and `x.relu()`, not of `self.relu(x)`."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name):
            yield node.func.id
        elif isinstance(node.func, ast.Attribute):
            root: ast.expr = node.func
            while isinstance(root, ast.Attribute | ast.Subscript):
                root = root.value
            if not (isinstance(root, ast.Name) and root.id == "self"):
                yield node.func.attr
