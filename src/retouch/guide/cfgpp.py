"""CFG++: classifier-free guidance with a scale in 0 to 1 that stays on the way the unconditional model takes.

x0 is guided as always, between the unconditional and the conditional prediction, and then noise is added again as the
unconditional branch sees it, where plain guidance adds the guided noise:

    x0'  = (1 - lam) x0_u + lam x0_c          e = e_u + lam (e_c - e_u) in terms of noise
    x_s  = alpha_s x0' + sigma_s e_u          plain guidance has e here; this is the whole change        algorithm 2

In a `Prediction(x0, noise)` that is a rule which takes x0 from the mix and noise from the unconditional branch, so any
of our steps makes it: DDIM, Euler, DPM-Solver++ (whose history then holds the unconditional x0), flows and EDM alike.
Inversion (`core.diffusion.sampling.invert`) solves the same step for where it came from.

Use it in place of `cfg` where high scales burn out or inversion must lead back. One DDIM step of CFG++ equals one of
plain guidance at scale w = lam S_t / (S_t - S_s), S = sigma / alpha: the strength of a fixed lam grows with the number
of steps, so keep lam with the number of steps, or give `reference_steps`. With an exact score there is no advantage at
equal strength: what it repairs are errors of a learned one. For few-step DPM++ the paper reports no steady gain.

Paper: arXiv 2406.08070. Code: CFGpp-diffusion/CFGpp; it counts timesteps from 1, here they are as in diffusers. For
flows, whose predictions are velocities, x0 and noise are formed first, as the authors advise; scales are lower there,
about 0.15. With a negative prompt, noise is added as the negative branch sees it.

Cost: that of `cfg`. Give back the last x0 (`sample(..., last="x0")`), as the paper does: where the schedule does not
end at alpha 1, x still has unconditional noise.
"""

import warnings
from typing import Any

import torch
from torch import Tensor

from retouch.core.cards import Card
from retouch.core.diffusion.denoiser import Denoiser, Prediction
from retouch.core.diffusion.guidance import Guidance, difference
from retouch.core.diffusion.process import Level
from retouch.core.diffusion.sampling import invert, sample
from retouch.core.diffusion.steering import Steering
from retouch.core.errors import InputError, in_range, positive

CARD = Card(
    title="CFG++",
    room="guide",
    paper="arXiv:2406.08070",
    shape="sampler part",
    line="Guides x0 between unconditional and conditional, and adds noise again as the unconditional branch sees it.",
    tags=("diffusion", "guidance", "inversion", "editing", "no training"),
    plugin="cfgpp",
)

Number = float | Tensor

# --- functional core ------------------------------------------------------------------------------------------------


def cfgpp_ddim_step(
    x: Tensor,
    *,
    noise_uncond: Tensor,
    noise_cond: Tensor,
    alpha_t: Number,
    alpha_prev: Number,
    scale: float = 0.6,
) -> tuple[Tensor, Tensor]:
    """One DDIM step (algorithm 2).

    Args:
        x: at t (b, ...).
        noise_uncond: predicted noise without the condition.
        noise_cond: with it.
        alpha_t: alphas_cumprod at t, 0 to 1; a number, or a tensor that broadcasts.
        alpha_prev: at the less noisy timestep that the step leads to, at least `alpha_t`.
        scale: lam, 0 to 1.

    Returns:
        The guided x0, and x there.
    """
    _check_scale(scale)
    _check_shapes(x, noise_uncond, noise_cond)
    alpha_t, alpha_prev = _alphas(x, alpha_t=alpha_t, alpha_prev=alpha_prev)
    if bool((alpha_prev < alpha_t).any()):
        raise InputError("alpha_prev is less than alpha_t, but a step must lead to less noise")
    noise = noise_uncond + scale * (noise_cond - noise_uncond)
    x0 = (x - (1 - alpha_t).sqrt() * noise) / alpha_t.sqrt()
    return x0, alpha_prev.sqrt() * x0 + (1 - alpha_prev).sqrt() * noise_uncond


def cfgpp_ddim_inverse_step(
    x: Tensor,
    *,
    noise_uncond: Tensor,
    noise_cond: Tensor,
    alpha_from: Number,
    alpha_to: Number,
    scale: float = 0.6,
) -> Tensor:
    """The step above, solved for where it started: with the same predictions it leads back exactly.

    Args:
        x: at the less noisy timestep (b, ...).
        noise_uncond: predicted for x at the noisier timestep.
        noise_cond: likewise.
        alpha_from: alphas_cumprod where x is.
        alpha_to: at the noisier timestep, at most `alpha_from`.
        scale: lam.
    """
    _check_scale(scale)
    _check_shapes(x, noise_uncond, noise_cond)
    alpha_from, alpha_to = _alphas(x, alpha_from=alpha_from, alpha_to=alpha_to)
    if bool((alpha_to > alpha_from).any()):
        raise InputError("alpha_to is greater than alpha_from, but an inverse step must lead to more noise")
    noise = noise_uncond + scale * (noise_cond - noise_uncond)
    x0 = (x - (1 - alpha_from).sqrt() * noise_uncond) / alpha_from.sqrt()
    return alpha_to.sqrt() * x0 + (1 - alpha_to).sqrt() * noise


def cfgpp_euler_step(
    x: Tensor,
    *,
    denoised: Tensor,
    denoised_uncond: Tensor,
    sigma: Number,
    sigma_next: Number,
    noise: Tensor | None = None,
    sigma_up: Number = 0.0,
) -> Tensor:
    """One Euler step where alpha is 1 (EDM, k-diffusion), with fresh noise for the ancestral step.

    Args:
        x: at sigma (b, ...).
        denoised: the guided x0.
        denoised_uncond: the unconditional x0.
        sigma: noise level, above `sigma_next`.
        sigma_next: the next one; that of the ancestral step's way down ("sigma_down") if noise is added.
        noise: unit noise to add (b, ...).
        sigma_up: its standard deviation.
    """
    _check_shapes(x, denoised, denoised_uncond)
    sigma, sigma_next = _sigmas(x, sigma, sigma_next)
    moved = denoised + sigma_next * (x - denoised_uncond) / sigma
    if noise is None or not bool((sigma_next > 0).any()):
        return moved
    return moved + sigma_up * noise


def cfgpp_dpmpp_2m_step(
    x: Tensor,
    *,
    denoised: Tensor,
    denoised_uncond: Tensor,
    denoised_uncond_prev: Tensor | None,
    sigma_prev: Number | None,
    sigma: Number,
    sigma_next: Number,
) -> Tensor:
    """One step of DPM-Solver++(2M) where alpha is 1; its history holds the unconditional x0.

    Args:
        x: at sigma (b, ...).
        denoised: the guided x0.
        denoised_uncond: the unconditional x0.
        denoised_uncond_prev: that of the step before; None in the first step, which is Euler's.
        sigma_prev: noise level of the step before.
        sigma: noise level.
        sigma_next: the next one; at 0 the step is Euler's.
    """
    _check_shapes(x, denoised, denoised_uncond)
    now, after = _sigmas(x, sigma, sigma_next)
    if denoised_uncond_prev is None or sigma_prev is None or not bool((after > 0).all()):
        return cfgpp_euler_step(
            x, denoised=denoised, denoised_uncond=denoised_uncond, sigma=sigma, sigma_next=sigma_next
        )
    before, _ = _sigmas(x, sigma_prev, sigma)
    width = (now / after).log()
    ratio = (before / now).log() / width
    kept = (-width).exp()
    change = (denoised - denoised_uncond_prev) / (2 * ratio)
    return denoised - kept * denoised_uncond - torch.expm1(-width) * change + kept * x


def cfg_scale_equivalent(scale: float, alpha_t: Number, alpha_prev: Number) -> Tensor:
    """Scale w of plain guidance at which its DDIM step is the same: lam S_t / (S_t - S_s), S = sqrt((1 - a) / a).

    Args:
        scale: lam.
        alpha_t: alphas_cumprod at t.
        alpha_prev: at the less noisy timestep; infinite where both are equal.
    """
    alphas = [torch.as_tensor(alpha, dtype=torch.float64) for alpha in (alpha_t, alpha_prev)]
    here, there = (((1 - alpha) / alpha).sqrt() for alpha in alphas)
    return scale * here / (here - there)


def _check_scale(scale: float, beyond: bool = False) -> None:
    in_range("scale", scale, high=1.5)
    if not 0 <= scale <= (1.5 if beyond else 1):
        warnings.warn(f"scale is {scale}, but CFG++ mixes with 0 to 1", stacklevel=3)


def _check_shapes(x: Tensor, *others: Tensor) -> None:
    for other in others:
        if other.shape != x.shape:
            raise InputError(f"A prediction has shape {tuple(other.shape)}, but must have that of x, {tuple(x.shape)}")


def _alphas(x: Tensor, **given: Number) -> list[Tensor]:
    found = []
    for name, value in given.items():
        alpha = torch.as_tensor(value, dtype=x.dtype, device=x.device)
        if not bool(((alpha > 0) & (alpha <= 1)).all()):
            raise InputError(f"{name} is {value}, but must be greater than 0 and at most 1")
        found.append(alpha)
    return found


def _sigmas(x: Tensor, sigma: Number, sigma_next: Number) -> tuple[Tensor, Tensor]:
    here, there = (torch.as_tensor(value, dtype=x.dtype, device=x.device) for value in (sigma, sigma_next))
    if not bool((there < here).all()) or bool((there < 0).any()):
        raise InputError(f"sigma_next is {sigma_next}, but must be at least 0 and less than sigma, {sigma}")
    return here, there


# --- plug-in ----------------------------------------------------------------------------------------------------------


def cfgpp(scale: float = 0.6, *, reference_steps: int | None = None, beyond: bool = False) -> Guidance:
    """The guidance, for `sample(guidance=...)`, `invert` and `attach`.

    Args:
        scale: lam, 0 (unconditional) to 1; the paper matches 0.2, 0.6 and 1 with plain scales of 2, 7.5 and 12.5 at 50
            steps.
        reference_steps: keep the strength that the scale has with so many steps, whatever their number: lam is
            multiplied by reference_steps / steps.
        beyond: allow scales up to 1.5 without a warning.
    """
    _check_scale(scale, beyond)
    if reference_steps is not None:
        positive("reference_steps", reference_steps)

    def change(found: Any, x: Tensor, level: Level) -> Prediction:
        strength = scale if reference_steps is None else scale * reference_steps / level.steps
        return difference(found["cond"], found["uncond"], strength - 1)

    return Guidance(name="cfgpp", branches={"uncond": "uncond"}, change=change, renoise="uncond")


def steer(denoiser: Denoiser, prompt: str, *, scale: float = 0.6, reference_steps: int | None = None) -> Steering:
    """Sample with CFG++ in place of classifier-free guidance.

    Args:
        denoiser: model and noise levels.
        prompt: not used.
        scale: lam, 0 (unconditional) to 1.
        reference_steps: keep the strength that the scale has with so many steps, whatever their number.
    """
    return Steering(guidance=cfgpp(scale, reference_steps=reference_steps))


class CFGPlusPlus:
    """Sampling, inversion and editing with one scale.

    Args:
        scale: lam.
        steps: of DDIM.
    """

    def __init__(self, scale: float = 0.6, steps: int = 50) -> None:
        positive("steps", steps)
        self.guidance, self.steps = cfgpp(scale), steps

    def sample(self, denoiser: Denoiser, latents: Tensor, cond: Any, uncond: Any = None) -> Tensor:
        """The last x0 (b, ...) from unit noise.

        Args:
            denoiser: model and noise levels.
            latents: noise (b, ...).
            cond: condition, as for `core.diffusion.sampling.sample`.
            uncond: negative condition.
        """
        return sample(denoiser, latents, cond, negative=uncond, times=self.steps, guidance=self.guidance, last="x0")

    def invert(self, denoiser: Denoiser, x: Tensor, cond: Any, uncond: Any = None) -> Tensor:
        """Noise (b, ...) that leads back to x."""
        return invert(denoiser, x, cond, times=self.steps, guidance=self.guidance, negative=uncond)

    def edit(self, denoiser: Denoiser, x: Tensor, source: Any, target: Any, uncond: Any = None) -> Tensor:
        """x (b, ...), inverted under one condition and sampled again under another."""
        return self.sample(denoiser, self.invert(denoiser, x, source, uncond), target, uncond)
