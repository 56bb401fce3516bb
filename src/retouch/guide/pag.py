"""Perturbed-attention guidance: better structure, without training and without a condition.

Each prediction is pushed away from a second one in which chosen self-attention maps are the identity: every token
keeps its own value, and nothing is gathered from the others.

    perturbed    Attention(Q, K, V) = V in the chosen layers; projections, residuals and all else stay
    guided       eps + s (eps - eps_perturbed)                                            equation 15
    with cfg     eps_u + w (eps_c - eps_u) + s (eps_c - eps_perturbed_c)                  three branches, one batch

As a sum of rules that is `cfg(w) + pag(s)`. The perturbed branch has the condition; noise, x0 and velocity are guided
alike, as they are linear in each other.

Use it where samples lack structure: unconditional models, empty prompts, restoration with an unconditional model, or
on top of classifier-free guidance. Not where the model is nearly right already: there it only narrows and saturates,
as any large scale does. Choose the layer on one seed and report on others: "mid_block" is the paper's for Stable
Diffusion; small networks may need another.

Paper: arXiv 2403.17377. Code: KU-CVLAB/Perturbed-Attention-Guidance. Its ADM code counts the scale as g = s + 1, and
so does the guider class of diffusers by default: s here is that of the paper and of the pipelines of diffusers. For
joint attention (SD3) the authors' way is followed: an image token sees itself and the text, and no other image token.

Cost: one more forward pass a step (twice that of plain sampling, 1.5 times that of cfg), in the same batch.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from retouch.core.attention import AttentionCall, branches, edit_attention, select_layers, taken_over
from retouch.core.cards import Card
from retouch.core.diffusion.denoiser import Denoiser
from retouch.core.diffusion.guidance import AttentionEdit, Guidance, difference
from retouch.core.diffusion.steering import Steering
from retouch.core.errors import InputError, in_range

CARD = Card(
    title="Perturbed-attention guidance",
    room="guide",
    paper="arXiv:2403.17377",
    shape="sampler part",
    line="Pushes samples away from what the model predicts when chosen self-attention layers see no other token.",
    tags=("diffusion", "guidance", "attention", "unconditional", "no training"),
    plugin="pag",
)

BRANCH = "perturbed"
MIDDLE = {"mid": "mid_block"}  # diffusers' short name

# --- functional core ------------------------------------------------------------------------------------------------


def identity_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention whose map is the identity: the value itself.

    Args:
        query: (batch, heads, tokens, dim); not used, like the key.
        key: likewise.
        value: likewise.
    """
    return value


def pag_guidance(
    noise: Tensor,
    noise_perturbed: Tensor,
    *,
    pag_scale: float = 3.0,
    noise_uncond: Tensor | None = None,
    guidance_scale: float | None = None,
) -> Tensor:
    """The guided prediction (equation 15), with classifier-free guidance if its parts are given.

    Args:
        noise: the conditional prediction (b, ...): noise, x0 or velocity.
        noise_perturbed: likewise, with perturbed attention.
        pag_scale: s; 0 switches it off.
        noise_uncond: the unconditional prediction.
        guidance_scale: w of classifier-free guidance; needed with `noise_uncond`.
    """
    if (noise_uncond is None) != (guidance_scale is None):
        raise InputError("noise_uncond and guidance_scale must be given together, or neither of them")
    if noise.shape != noise_perturbed.shape:
        raise InputError(
            f"noise_perturbed has shape {tuple(noise_perturbed.shape)}, but must have noise's, {tuple(noise.shape)}"
        )
    base = noise
    if noise_uncond is not None and guidance_scale is not None:
        base = noise_uncond + guidance_scale * (noise - noise_uncond)
    return base if pag_scale == 0 else base + pag_scale * (noise - noise_perturbed)


def pag_adaptive_scale(
    timesteps: Tensor, *, pag_scale: float = 3.0, adaptive_scale: float = 0.0, num_train_timesteps: int = 1000
) -> Tensor:
    """The scale that falls with progress, as diffusers has it: max(0, s - k (T - t)); not of the paper.

    Args:
        timesteps: of training (any shape).
        pag_scale: s.
        adaptive_scale: k; above s / T the scale is 0 in the end, and from about 0.003 on for half of the steps.
        num_train_timesteps: T.
    """
    return (pag_scale - adaptive_scale * (num_train_timesteps - timesteps)).clamp_min(0.0)


def select_self_attention(model: nn.Module, layers: str | Sequence[str]) -> dict[str, nn.Module]:
    """Layers in which tokens of the image see each other, by patterns of their names; "mid" is the middle block.

    Raises:
        InputError: if there is no pattern, or one matches nothing; "blocks.1" does not match "blocks.10".
    """
    return select_layers(model, _patterns(layers), "image")


def _patterns(layers: str | Sequence[str]) -> list[str]:
    patterns = [MIDDLE.get(name, name) for name in ((layers,) if isinstance(layers, str) else layers)]
    if not patterns:
        raise InputError("layers is empty, but must name at least one self-attention layer")
    return patterns


# --- plug-ins ---------------------------------------------------------------------------------------------------------


def perturb(call: AttentionCall) -> Tensor:
    """The edit of attention: the identity for the perturbed branch, and the layer's own for all others."""
    if BRANCH not in call.branches:
        return call.original()
    rows = call.branch(BRANCH)
    others = slice(0, rows.start)  # it is the last, unless another rule's branches follow
    parts = [_rows(call, others)] if rows.start else []
    parts.append(_blind(call, rows))
    if rows.stop < len(call.query):
        parts.append(_rows(call, slice(rows.stop, None)))
    return torch.cat(parts)


def _rows(call: AttentionCall, rows: slice, sees: Tensor | None = None) -> Tensor:
    """The layer's own attention for some rows, of which each query sees only the keys that `sees` allows as well."""
    mask = call.mask
    if mask is not None and mask.ndim > 2 and len(mask) == len(call.query):
        mask = mask[rows]
    if sees is not None:
        own = sees if mask is None else mask
        mask = own & sees if own.dtype == torch.bool else own.masked_fill(~sees, -torch.inf)
    return call.original(query=call.query[rows], key=call.key[rows], value=call.value[rows], mask=mask)


def _blind(call: AttentionCall, rows: slice) -> Tensor:
    """Attention in which no token of the image sees another one."""
    if call.kind != "joint":
        return identity_attention(call.query[rows], call.key[rows], call.value[rows])
    if call.image is None:
        raise InputError(f"The layer {call.layer} does not tell which of its tokens are the image's: choose others")
    tokens = call.query.shape[-2]
    place = torch.arange(tokens, device=call.query.device)
    image = torch.zeros_like(place, dtype=torch.bool)
    image[call.image] = True
    return _rows(call, rows, ~(image[:, None] & image) | (place[:, None] == place))


def pag(scale: float = 3.0, layers: str | Sequence[str] = "mid", *, adaptive_scale: float = 0.0) -> Guidance:
    """The guidance, for `sample(guidance=...)` and `attach`.

    Args:
        scale: s; the paper has 3 with classifier-free guidance and 5 without. At 0 no branch is added.
        layers: patterns of names of the self-attention layers that are perturbed.
        adaptive_scale: lowers the scale by so much a timestep, see `pag_adaptive_scale`; only of use where time is a
            timestep of training, 0 to 1000, and not EDM's sigma.
    """
    in_range("scale", scale, 0)
    in_range("adaptive_scale", adaptive_scale, 0)
    patterns = _patterns(layers)
    if scale == 0:
        return Guidance(name="pag", change=lambda found, x, level: difference(found["cond"], found["cond"], 0.0))

    def change(found: Any, x: Tensor, level: Any) -> Any:
        strength = float(pag_adaptive_scale(torch.tensor(level.time), pag_scale=scale, adaptive_scale=adaptive_scale))
        return difference(found["cond"], found[BRANCH], strength)

    return Guidance(
        name="pag",
        branches={BRANCH: "cond"},
        change=change,
        edits=(AttentionEdit(function=perturb, layers=patterns, kind="image"),),
    )


def steer(
    denoiser: Denoiser, prompt: str, *, scale: float = 3.0, layers: str = "mid", adaptive_scale: float = 0.0
) -> Steering:
    """Sample with perturbed-attention guidance on top of classifier-free guidance.

    Args:
        denoiser: model and noise levels.
        prompt: not used.
        scale: s.
        layers: pattern of names of the self-attention layers that are perturbed; "mid" is the middle block.
        adaptive_scale: lowers the scale by so much a timestep.
    """
    select_self_attention(denoiser.model, layers)  # an unknown layer is told of before anything is sampled
    return Steering(guidance=pag(scale, layers, adaptive_scale=adaptive_scale))


class PerturbedSelfAttnProcessor:
    """A processor of diffusers that perturbs the last branch of the batch, for models that are steered by hand.

    It runs diffusers' own processor and takes over the attention inside of it, so norms, projections and residuals are
    those of the layer.

    Args:
        num_branches: 2 for [plain, perturbed], 3 for [uncond, cond, perturbed].
        processor: the layer's own; diffusers' default if None.
    """

    def __init__(self, num_branches: int, processor: Any = None) -> None:
        in_range("num_branches", num_branches, 2, 3)
        if processor is None:
            from diffusers.models.attention_processor import AttnProcessor2_0

            processor = AttnProcessor2_0()
        self.names = ("cond", BRANCH) if num_branches == 2 else ("uncond", "cond", BRANCH)
        self.processor = processor

    def __call__(self, attn: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What diffusers calls: the layer and its input (b, tokens, channels) or (b, channels, h, w)."""
        if len(hidden_states) % len(self.names):
            raise InputError(
                f"hidden_states has {len(hidden_states)} rows, but must have a multiple of {len(self.names)}: the "
                f"branches {', '.join(self.names)}"
            )
        with taken_over(perturb, layer="", kind="self", branches=self.names):
            return self.processor(attn, hidden_states, *args, **kwargs)


class PAG:
    """The rule for a model that is called by hand: one batch of two or three branches.

        with PAG(unet, scale=3.0, layers="mid") as guided:
            noise = guided(x, t, encoder_hidden_states=text, uncond={"encoder_hidden_states": empty})

    Args:
        model: of diffusers.
        scale: s.
        layers: patterns, see `pag`.
        guidance_scale: w of classifier-free guidance, where the unconditional keywords are given.
    """

    def __init__(
        self,
        model: nn.Module,
        scale: float = 3.0,
        layers: str | Sequence[str] = "mid",
        *,
        guidance_scale: float = 4.0,
    ) -> None:
        in_range("scale", scale, 0)
        self.model, self.scale, self.guidance_scale = model, scale, guidance_scale
        self.layers = list(select_self_attention(model, layers))
        self.stack = ExitStack()

    def __enter__(self) -> "PAG":
        patterns = [re.escape(name) for name in self.layers]
        self.stack.enter_context(edit_attention(self.model, perturb, patterns, kind="image"))
        return self

    def __exit__(self, *error: Any) -> None:
        self.stack.__exit__(*error)
        self.stack = ExitStack()

    def __call__(self, x: Tensor, time: Any, *, uncond: Mapping[str, Tensor] | None = None, **cond: Tensor) -> Tensor:
        """The guided prediction (b, ...) of whatever the model predicts.

        Args:
            x: noisy samples (b, ...).
            time: as the model takes it.
            uncond: keywords of the unconditional branch, for classifier-free guidance.
            cond: keywords of the conditional branch.
        """
        names = (() if uncond is None else ("uncond",)) + ("cond",) + ((BRANCH,) if self.scale else ())
        keywords = {name: [(uncond if branch == "uncond" else cond)[name] for branch in names] for name in cond}  # type: ignore[index]
        with branches(names):
            output = self.model(
                torch.cat([x] * len(names)), time, **{name: torch.cat(parts) for name, parts in keywords.items()}
            )
        output = output if isinstance(output, Tensor) else output.sample
        parts = dict(zip(names, output.chunk(len(names)), strict=True))
        found = {name: part[:, : x.shape[1]] for name, part in parts.items()}  # the rest is a learned variance
        both = {} if uncond is None else {"noise_uncond": found["uncond"], "guidance_scale": self.guidance_scale}
        perturbed = found[BRANCH] if self.scale else found["cond"]
        guided = pag_guidance(found["cond"], perturbed, pag_scale=self.scale, **both)
        return torch.cat([guided, parts["cond"][:, x.shape[1] :]], 1)
