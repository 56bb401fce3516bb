"""Attention of any model, seen and changed by one function.

    def identity(call):                                    # every token keeps its own value
        return call.value

    with edit_attention(unet, identity, layers="mid_block", kind="self"):
        unet(latents, t, encoder_hidden_states=text)

    with record_attention(unet, kind="cross") as maps:     # maps[layer]: probabilities (batch, heads, queries, keys)
        unet(latents, t, encoder_hidden_states=text)

Diffusers' processors and transformers' layers differ in norms, fused projections, rotary embeddings and residuals, and
all of them end in `torch.nn.functional.scaled_dot_product_attention`. That one call is taken over, only while a chosen
layer runs, so everything around it stays as the model has it, and no processor is ever replaced. Blocks can be nested:
what is called inside an inner function's `call.original` is the function of the outer block. Outside of the blocks
nothing is left in the model.

Limits: transformers models must be loaded with `attn_implementation="sdpa"`, their default; a layer that was chosen
and never called that function raises an error when the block ends. `torch.compile` must come after, not before.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from retouch.core.errors import InputError, nearest, one_of
from retouch.core.models import first_tensor

KINDS = ("self", "cross", "joint", "image", "any")
PROJECTIONS = ("to_q", "to_qkv", "q_proj", "query", "c_attn", "q", "qkv", "qkv_proj")  # as the libraries name them

BRANCHES: ContextVar[tuple[str, ...]] = ContextVar("BRANCHES", default=())  # what the parts of the batch are
STEP: ContextVar[Any] = ContextVar("STEP", default=None)  # the noise level that a denoiser is at


@dataclass(frozen=True)
class AttentionCall:
    """One attention, about to be computed.

    Attributes:
        query: (batch, heads, queries, dim).
        key: (batch, heads, keys, dim); fewer heads where keys are shared by groups of heads.
        value: like `key`.
        mask: added to the scores, or boolean, or None.
        scale: of the scores.
        causal: whether each query sees only the keys up to its own place.
        layer: name of the module.
        kind: "self", "cross", or "joint" for image and text tokens in one sequence.
        grid: (height, width) that the queries of self and cross attention lie on, or None if they are no grid.
        image: where the image's tokens are among those of joint attention, or None if that is not known; all of them
            elsewhere.
        branches: names of the equal parts of the batch, in order, such as ("uncond", "cond"); () if not known.
        step: the noise level, inside of a denoiser.
        original: computes attention; of this call unless given other parts, as in `call.original(value=other)`.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scale: float
    causal: bool
    layer: str
    kind: str
    grid: tuple[int, int] | None
    image: slice | None
    branches: tuple[str, ...]
    step: Any
    _compute: Callable[["AttentionCall"], Tensor] = field(repr=False)

    def original(self, **changes: Any) -> Tensor:
        """Attention (batch, heads, queries, dim), with parts of the call changed."""
        return self._compute(replace(self, **changes) if changes else self)

    @property
    def probabilities(self) -> Tensor:
        """softmax(query key^T scale + mask) (batch, heads, queries, keys), with gradients."""
        key = self.key
        if key.shape[1] != self.query.shape[1]:
            key = key.repeat_interleave(self.query.shape[1] // key.shape[1], dim=1)
        scores = self.query @ key.transpose(-1, -2) * self.scale
        if self.causal:
            seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~seen, -math.inf)
        if self.mask is not None and self.mask.dtype == torch.bool:
            scores = scores.masked_fill(~self.mask, -math.inf)
        elif self.mask is not None:
            scores = scores + self.mask
        return scores.softmax(-1)

    def branch(self, name: str) -> slice:
        """Rows of the batch that belong to a branch; all rows where branches are not known."""
        if not self.branches:
            return slice(None)
        one_of("branch", name, self.branches)
        size = len(self.query) // len(self.branches)
        place = self.branches.index(name)
        return slice(place * size, (place + 1) * size)


Edit = Callable[[AttentionCall], Tensor]


def attention_layers(model: nn.Module, kind: str = "any") -> dict[str, nn.Module]:
    """The attention layers of a model by name.

    Args:
        model: of diffusers or transformers.
        kind: "self", "cross", "joint", "image" for self or joint (where image tokens see each other), or "any".
    """
    one_of("kind", kind, KINDS)
    wanted = {"any": ("self", "cross", "joint"), "image": ("self", "joint")}.get(kind, (kind,))
    found = {
        name: module
        for name, module in model.named_modules()
        if any(hasattr(module, projection) for projection in PROJECTIONS) and not isinstance(module, nn.Linear)
    }
    return {name: module for name, module in found.items() if kind_of(name, module) in wanted}


def kind_of(name: str, module: nn.Module) -> str:
    """What a layer attends to: "self", "cross" or "joint"."""
    if getattr(module, "added_kv_proj_dim", None) is not None or "single_transformer_blocks" in name:
        return "joint"
    told = getattr(module, "is_cross_attention", None)
    if told is None:
        told = re.search(r"cross|encoder_attn|EncDec", name + type(module).__name__) is not None
    return "cross" if told else "self"


def select_layers(model: nn.Module, layers: str | Sequence[str] = ".*", kind: str = "any") -> dict[str, nn.Module]:
    """The attention layers whose names hold a pattern as whole parts: "blocks.1" is not in "blocks.10".

    Args:
        model: of diffusers or transformers.
        layers: regular expressions; a layer is chosen if one of them matches.
        kind: of attention, see `attention_layers`.

    Raises:
        InputError: if there is no pattern, or one that matches nothing.
    """
    known = attention_layers(model, kind)
    patterns = (layers,) if isinstance(layers, str) else tuple(layers)
    if not patterns:
        raise InputError("layers is empty, but must name at least one attention layer")
    chosen: dict[str, None] = {}
    for pattern in patterns:
        hits = [name for name in known if re.search(rf"(?:^|\.)(?:{pattern})(?:\.|$)", name)]
        if not hits:
            what = f"{kind} attention layer" if kind != "any" else "attention layer"
            hint = nearest(pattern, known) or f" They are {', '.join(list(known)[:6]) or 'none'}" + (
                ", ..." if len(known) > 6 else "."
            )
            raise InputError(f"layers is {pattern!r}, but no {what} of {type(model).__name__} matches it.{hint}")
        chosen |= dict.fromkeys(hits)
    return {name: module for name, module in known.items() if name in chosen}


@contextmanager
def branches(names: Sequence[str], step: Any = None) -> Iterator[None]:
    """Tell the edits inside the block what the parts of the batch are, and at which noise level it is."""
    tokens = BRANCHES.set(tuple(names)), STEP.set(step)
    try:
        yield
    finally:
        BRANCHES.reset(tokens[0])
        STEP.reset(tokens[1])


class _TakeOver(TorchFunctionMode):
    """While it is on, attention goes through the edit."""

    def __init__(self, edit: Edit, note: Callable[[], None], pixels: tuple[int, int] | None, **told: Any) -> None:
        super().__init__()
        self.edit, self.note, self.pixels, self.told = edit, note, pixels, told

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        return self.attend(*args, **kwargs)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        def compute(call: AttentionCall) -> Tensor:
            shared = call.key.shape[1] != call.query.shape[1]
            return F.scaled_dot_product_attention(
                call.query,
                call.key,
                call.value,
                attn_mask=call.mask,
                dropout_p=dropout_p,
                is_causal=call.causal,
                scale=call.scale,
                **({"enable_gqa": True} if shared or enable_gqa else {}),
            )

        self.note()
        call = AttentionCall(
            query=query,
            key=key,
            value=value,
            mask=attn_mask,
            scale=query.shape[-1] ** -0.5 if scale is None else scale,
            causal=is_causal,
            grid=None if self.told["kind"] == "joint" else _grid(query.shape[-2], self.pixels),
            **self.told,
            branches=BRANCHES.get(),
            step=STEP.get(),
            _compute=compute,
        )
        return self.edit(call)


def _image_of(module: nn.Module, kind: str, args: Any, kwargs: Any) -> slice | None:
    """The image's tokens: SD3 has them first, Flux last; Flux's single blocks do not tell."""
    if kind != "joint":
        return slice(None)
    text = kwargs.get("encoder_hidden_states")
    if text is None:
        return None
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    return slice(text.shape[1], None) if "Flux" in type(module).__name__ else slice(0, hidden.shape[1])


def _grid(tokens: int, pixels: tuple[int, int] | None) -> tuple[int, int] | None:
    """Height and width of so many tokens of an image, if they are its pixels at some lower resolution."""
    if pixels is None:
        return None
    shrink = math.sqrt(pixels[0] * pixels[1] / tokens)
    height, width = round(pixels[0] / shrink), round(pixels[1] / shrink)
    return (height, width) if height * width == tokens else None


@contextmanager
def edit_attention(
    model: nn.Module, function: Edit, layers: str | Sequence[str] = ".*", *, kind: str = "any"
) -> Iterator[list[str]]:
    """Let a function compute attention in chosen layers inside the block.

    Args:
        model: of diffusers or transformers.
        function: takes an `AttentionCall` and gives attention (batch, heads, queries, dim).
        layers: patterns of their names, see `select_layers`.
        kind: of attention, see `attention_layers`.

    Yields:
        Names of the chosen layers.

    Raises:
        InputError: if a pattern matches nothing, or a layer ran without the function that is taken over.
    """
    chosen = select_layers(model, layers, kind)
    pixels: list[tuple[int, int] | None] = [None]
    ran: dict[str, bool] = {}
    running: list[_TakeOver] = []

    def look(_module: nn.Module, args: Any, kwargs: Any) -> None:
        sample = first_tensor((args, kwargs))
        pixels[0] = tuple(sample.shape[-2:]) if sample is not None and sample.ndim == 4 else None  # type: ignore[assignment]

    def enter(name: str, own_kind: str) -> Callable[..., None]:
        def pre(module: nn.Module, args: Any, kwargs: Any) -> None:
            told = kwargs.get("encoder_hidden_states") is not None
            now = "cross" if own_kind == "self" and told else own_kind
            ran.setdefault(name, False)
            image = _image_of(module, now, args, kwargs)
            note = lambda: ran.update({name: True})  # noqa: E731
            mode = _TakeOver(function, note, pixels[0], layer=name, kind=now, image=image)
            mode.__enter__()
            running.append(mode)

        return pre

    def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
        if running:
            running.pop().__exit__(None, None, None)

    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(look, with_kwargs=True).remove)
        for name, module in chosen.items():
            stack.callback(
                module.register_forward_pre_hook(enter(name, kind_of(name, module)), with_kwargs=True).remove
            )
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        yield list(chosen)
    silent = [name for name, saw in ran.items() if not saw]
    if silent:
        raise InputError(
            f"The layer {silent[0]} does not compute attention by scaled_dot_product_attention: load the model with "
            "attn_implementation='sdpa'"
        )


@contextmanager
def taken_over(function: Edit, *, layer: str, kind: str, branches: Sequence[str] = ()) -> Iterator[None]:
    """Let a function compute whatever attention runs inside the block: for one layer that is called by hand."""
    names = tuple(branches) or BRANCHES.get()
    mode = _TakeOver(function, lambda: None, None, layer=layer, kind=kind, image=slice(None))
    token = BRANCHES.set(names)
    try:
        with mode:
            yield
    finally:
        BRANCHES.reset(token)


@contextmanager
def record_attention(
    model: nn.Module, layers: str | Sequence[str] = ".*", *, kind: str = "any", detach: bool = False
) -> Iterator[dict[str, Tensor]]:
    """Keep the attention probabilities of chosen layers, with gradients, at every forward pass inside the block.

    Args:
        model: of diffusers or transformers.
        layers: patterns of their names.
        kind: of attention.
        detach: keep them without gradients.

    Yields:
        A dict from layer to its latest probabilities (batch, heads, queries, keys), filled by each forward pass.
    """
    seen: dict[str, Tensor] = {}

    def keep(call: AttentionCall) -> Tensor:
        probabilities = call.probabilities
        seen[call.layer] = probabilities.detach() if detach else probabilities
        # Taken from the same probabilities, so that a gradient reaches what was kept.
        value = call.value
        if value.shape[1] != call.query.shape[1]:
            value = value.repeat_interleave(call.query.shape[1] // value.shape[1], dim=1)
        return probabilities.to(value.dtype) @ value

    with edit_attention(model, keep, layers, kind=kind):
        yield seen
