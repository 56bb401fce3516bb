"""A-STAR: gradient steps on the latent, so that no concept of a prompt is lost or merged with another.

Before every step the network is asked once with the text, and A^m is the map of concept m: cross-attention to its
tokens, as a mean over heads and over the layers whose queries lie on an r x r grid. With the overlap of two maps

    O(P, Q) = sum min(P, Q) / sum (P + Q)                      0 (disjoint) to 1/2 (equal)
    L_seg   = sum_{m > n} O(A^m, A^n)                          segregation: concepts do not share places
    L_ret   = sum_m 1 - O(A^m, B^m)                            retention: a concept stays where it was
    z'      = z - alpha_t grad_z (L_seg + L_ret)               and then the step as always, with any guidance

B^m is the binary mask of where concept m was at the step before (detached; none at the first step), so L_ret is 1/2 a
concept at best. Masks given by hand in its place are layout control.

    astar = AStarGuidance(find_tokens(pipe.tokenizer, prompt, ["circle", "square"]))
    sample(denoiser, noise, prompt, guidance=cfg(7.5), hooks=[astar])
    with astar.attached(pipe):                                 # or the pipeline itself
        pipe(prompt)

Use it for prompts of two or more objects where one is missing or takes on what belongs to the other. Not where the
model succeeds already (the overlap still falls, as it is what is minimised), nor with large steps: they leave blotches.

Paper: arXiv 2306.14544; no code was published. It gives neither alpha nor how maps are made binary or scaled: here
alpha is 20 sqrt(1 to 1/2), as in Attend-and-Excite, the mask is Otsu's, and maps are divided by their maximum for L_ret
alone, since attention of about 1/77 can never be near a mask of ones. `preprocess="attend_and_excite"` has that code's
softmax over the prompt and its smoothing. Masks are those of the map before the update. The functions sum, as the
paper does; a peer's code (gsn-factory) takes means.

Cost: one forward and backward pass of the conditional branch for each step it is active in, about 2.5 times plain
sampling. `alpha=0` changes nothing and still measures: see `history` and `maps`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retouch.core import seeds
from retouch.core.attention import AttentionCall, attention_layers, edit_attention
from retouch.core.cards import Card
from retouch.core.diffusion.attach import attach
from retouch.core.diffusion.denoiser import Condition, Denoiser
from retouch.core.diffusion.process import Grid, Level
from retouch.core.diffusion.sampling import Hook, unit_noise
from retouch.core.diffusion.steering import Steering
from retouch.core.errors import InputError, in_range, one_of, positive
from retouch.core.models import mode, training_only, tree_map

CARD = Card(
    title="A-STAR",
    room="guide",
    paper="arXiv:2306.14544",
    shape="sampler part",
    line="Moves the latent by gradients so that the concepts of a prompt keep their own places in cross-attention.",
    tags=("diffusion", "text-to-image", "attention", "layout", "no training"),
    plugin="AStarGuidance",
)

BINARY = ("otsu", "fraction", "mean_std", "top")
REDUCTIONS = ("sum", "mean", "none")
Size = int | tuple[int, int]
Concepts = Sequence[Any]  # token numbers, groups of them, or such a list for each sample

# --- functional core --------------------------------------------------------------------------------------------------


def overlap_ratio(p: Tensor, q: Tensor, *, eps: float = 1e-12) -> Tensor:
    """O(p, q) of maps (..., h, w), which are not negative: 0 to 1/2 (...).

    Args:
        p: maps; the leading dimensions of both broadcast.
        q: likewise.
        eps: least denominator, for maps of zeros.
    """
    if p.shape[-2:] != q.shape[-2:]:
        raise InputError(f"q has maps of {tuple(q.shape[-2:])}, but must have p's size, {tuple(p.shape[-2:])}")
    return torch.minimum(p, q).sum((-2, -1)) / (p + q).sum((-2, -1)).clamp_min(eps)


def pairwise_overlap(maps: Tensor) -> Tensor:
    """O of all pairs: (..., concepts, h, w) -> (..., concepts, concepts), with 1/2 on the diagonal."""
    return overlap_ratio(maps.unsqueeze(-3), maps.unsqueeze(-4))


def attention_segregation_loss(maps: Tensor, *, reduction: str = "sum") -> Tensor:
    """L_seg: how much the maps of different concepts share.

    Args:
        maps: (concepts, h, w) or (batch, concepts, h, w), taken as they are.
        reduction: "sum" or "mean" over pairs and samples, or "none" for (pairs,) or (batch, pairs).
    """
    _check_maps(maps)
    first, second = torch.triu_indices(maps.shape[-3], maps.shape[-3], 1, device=maps.device)
    return _reduced(overlap_ratio(maps[..., first, :, :], maps[..., second, :, :]), reduction)


def attention_retention_loss(maps: Tensor, masks: Tensor, *, reduction: str = "sum") -> Tensor:
    """L_ret: how far the maps are from where the concepts were.

    Args:
        maps: (concepts, h, w) or (batch, concepts, h, w), taken as they are: their maximum should be about 1.
        masks: 0 or 1, of the same shape; no gradient reaches them.
        reduction: "sum" or "mean" over concepts and samples, or "none" for (concepts,) or (batch, concepts).
    """
    _check_maps(maps)
    if masks.shape != maps.shape:
        raise InputError(f"masks has shape {tuple(masks.shape)}, but must have maps', {tuple(maps.shape)}")
    _check_filled("masks", masks)
    return _reduced(1 - overlap_ratio(maps, masks.detach().to(maps)), reduction)


def binarize_attention(maps: Tensor, *, method: str = "otsu", threshold: float = 0.5) -> Tensor:
    """Where attention is high: 0 or 1 (..., h, w), detached; each map has its maximum in it.

    Args:
        maps: (..., h, w), each taken alone; only ratios matter.
        method: "otsu" (the split of most variance between its sides), "fraction" of the maximum, "mean_std" (above
            the mean by a standard deviation), or "top" for a share of the places.
        threshold: that fraction or share, 0 to 1; of no use to the others.
    """
    one_of("method", method, BINARY)
    in_range("threshold", threshold, 0, 1)
    flat = maps.detach().double().flatten(-2)
    highest = flat.amax(-1, keepdim=True)
    if method == "otsu":
        high = flat > _otsu(flat)
    elif method == "fraction":
        high = flat >= threshold * highest
    elif method == "mean_std":
        high = flat >= flat.mean(-1, keepdim=True) + flat.std(-1, keepdim=True, correction=0)
    else:
        kept = max(math.ceil(threshold * flat.shape[-1]), 1)
        high = flat >= flat.topk(kept, -1).values[..., -1:]
    return (high | (flat == highest)).to(maps.dtype).view(maps.shape)


def _otsu(flat: Tensor) -> Tensor:
    """The largest value of the lower class (..., 1), over all splits of the sorted values (..., n)."""
    ordered = flat.sort(-1).values
    sums, count = ordered.cumsum(-1), flat.shape[-1]
    below = torch.arange(1, count, device=flat.device, dtype=flat.dtype)
    apart = (sums[..., -1:] - sums[..., :-1]) / (count - below) - sums[..., :-1] / below
    between = below * (count - below) * apart.square()
    between = between.masked_fill(ordered.diff(dim=-1) <= 0, -1.0)  # equal values are on one side
    return ordered.gather(-1, between.argmax(-1, keepdim=True))


def aggregate_cross_attention(
    store: Mapping[str, Tensor], *, resolution: Size, tokens: Sequence[int] | None = None
) -> Tensor:
    """Maps of the text's tokens (batch, tokens, r, r) in float32: a mean over heads and layers.

    Args:
        store: layer -> attention probabilities (batch, heads, queries, keys), as of `core.attention.record_attention`.
        resolution: r, or (height, width); layers with other numbers of queries are left out.
        tokens: keys to give; all if None.

    Raises:
        InputError: if no layer has such a grid, or there is no such token.
    """
    height, width = _size(resolution)
    chosen = [maps for maps in store.values() if maps.shape[-2] == height * width]
    if not chosen:
        raise _no_grid(resolution, {maps.shape[-2] for maps in store.values()})
    mean = torch.stack([maps.float().mean(1) for maps in chosen]).mean(0)
    if tokens is not None:
        for token in tokens:
            in_range("tokens", token, 0, mean.shape[-1] - 1)
        mean = mean[..., list(tokens)]
    return mean.mT.unflatten(-1, (height, width))


def _size(resolution: Size) -> tuple[int, int]:
    height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
    positive("resolution", min(height, width))
    return height, width


def _no_grid(resolution: Size, counts: set[int]) -> InputError:
    names = [f"{math.isqrt(n)} x {math.isqrt(n)}" if math.isqrt(n) ** 2 == n else f"{n} places" for n in sorted(counts)]
    height, width = _size(resolution)
    return InputError(
        f"resolution is {height} x {width}, but text is attended to from grids of {', '.join(names) or 'no size'} only"
    )


def _check_maps(maps: Tensor) -> None:
    if maps.ndim not in (3, 4) or not maps.shape[-3]:
        raise InputError(f"maps has shape {tuple(maps.shape)}, but must be (concepts, h, w) or (batch, concepts, h, w)")


def _check_filled(name: str, masks: Tensor) -> None:
    if not bool((masks != 0).flatten(-2).any(-1).all()):
        raise InputError(f"{name} has an empty mask, but each must have at least one place")


def _reduced(values: Tensor, reduction: str) -> Tensor:
    one_of("reduction", reduction, REDUCTIONS)
    if reduction == "none":
        return values
    return values.sum() if reduction == "sum" else values.sum() / max(values.numel(), 1)


# --- tokens -----------------------------------------------------------------------------------------------------------


def find_tokens(tokenizer: Any, prompt: str, words: Sequence[str]) -> list[list[int]]:
    """Where words are among the tokens of a prompt, a group for each word; a word named twice is its next occurrence.

    Args:
        tokenizer: of transformers.
        prompt: as it will be encoded.
        words: in it, such as "circle" or "blue square".
    """
    ids, taken, groups = list(tokenizer(prompt).input_ids), set(), []
    for word in words:
        own = list(tokenizer(word, add_special_tokens=False).input_ids)
        starts = [k for k in range(len(ids) - len(own) + 1) if ids[k : k + len(own)] == own and k not in taken]
        if not own or not starts:
            raise InputError(f"words has {word!r}, but must have words of the prompt {prompt!r}")
        taken.add(starts[0])
        groups.append(list(range(starts[0], starts[0] + len(own))))
    return groups


def _groups(concepts: Concepts | None, samples: int) -> list[list[list[int]]]:
    """For all samples, or for each: its concepts, each a list of tokens."""
    told = [] if concepts is None else list(concepts)
    nested = any(isinstance(c, Sequence) and any(isinstance(group, Sequence) for group in c) for c in told)
    each = [list(sample) for sample in told] if nested else [told]
    groups = [[list(c) if isinstance(c, Sequence) else [c] for c in sample] for sample in each]
    if not all(sample and all(sample) for sample in groups):
        raise InputError("concept_tokens names no token of a concept, but must have at least one for each")
    if len(groups) not in (1, samples) or len({len(sample) for sample in groups}) > 1:
        raise InputError(
            f"concept_tokens is for {len(groups)} samples, but must be for {samples} or for all of them alike, with "
            "equally many concepts"
        )
    return groups


# --- plug-in ----------------------------------------------------------------------------------------------------------


class AStarGuidance(Hook):
    """The technique as a hook of `sample`, inside of a pipeline (`attached`), or by hand (`before_step`).

    Args:
        concept_tokens: the concepts, each a token number or a list of them (their maps are averaged), counted with the
            start token as 0, see `find_tokens`; or such a list for each sample of the batch.
        resolution: r of the attention's grid, or (height, width): 16 for latents of 64, a quarter of their side.
        alpha: size of a step at the start; 0 only measures.
        decay: what alpha^2 is multiplied by at the end, with a line in between.
        segregation: weight of L_seg.
        retention: weight of L_ret.
        iterations: updates before each step of the sampler.
        stop: share of the sampler's steps at which it ends.
        method: of `binarize_attention`.
        threshold: likewise.
        layout_masks: where each concept should be (concepts, h, w) or (batch, concepts, h, w), 0 or 1, of any size; in
            place of the maps of the step before.
        preprocess: None, or "attend_and_excite".
        prompt_length: tokens of the prompt without those that mark its ends; tokens behind are refused if given, or
            the last place alone if None.
        start_token: whether token 0 marks the start, as with CLIP; False for T5.
        layers: patterns of names of the layers that are read.
        loss_scale: what the loss is multiplied by before the backward pass and the gradient divided by after it, for
            networks in half precision, whose small gradients would be lost.

    Attributes:
        masks: B (batch, concepts, r, r) for the next step, or None.
        maps: A (batch, concepts, r, r) of the latest step, as the losses see them.
        history: of each update, {"segregation": (batch,), "retention": (batch,) or None}.
    """

    def __init__(
        self,
        concept_tokens: Concepts | None = None,
        *,
        resolution: Size = 16,
        alpha: float = 20.0,
        decay: float = 0.5,
        segregation: float = 1.0,
        retention: float = 1.0,
        iterations: int = 1,
        stop: float = 1.0,
        method: str = "otsu",
        threshold: float = 0.5,
        layout_masks: Tensor | None = None,
        preprocess: str | None = None,
        prompt_length: int | None = None,
        start_token: bool = True,
        layers: str | Sequence[str] = ".*",
        loss_scale: float = 1.0,
    ) -> None:
        for name, value in (("alpha", alpha), ("segregation", segregation), ("retention", retention)):
            in_range(name, value, 0)
        for name, value in (("decay", decay), ("stop", stop), ("threshold", threshold)):
            in_range(name, value, 0, 1)
        for name, value in (("iterations", iterations), ("loss_scale", loss_scale)):
            positive(name, value)
        one_of("method", method, BINARY)
        one_of("preprocess", preprocess, (None, "attend_and_excite"))
        if prompt_length is not None:
            positive("prompt_length", prompt_length)
        if concept_tokens is not None:
            _groups(concept_tokens, len(concept_tokens))
        self.concept_tokens, self.size, self.layers = concept_tokens, _size(resolution), layers
        self.alpha, self.decay, self.iterations, self.stop = alpha, decay, iterations, stop
        self.weights, self.loss_scale = (segregation, retention), loss_scale
        self.method, self.threshold, self.preprocess = method, threshold, preprocess
        self.prompt_length, self.first = prompt_length, int(start_token)
        self.layout = None if layout_masks is None else _resized(layout_masks, self.size)
        self.reset()

    def reset(self) -> None:
        """Forget the masks and what was measured."""
        self.masks: Tensor | None = None
        self.maps: Tensor | None = None
        self.history: list[dict[str, Tensor | None]] = []

    def start(self, x: Tensor, grid: Grid) -> None:
        self.reset()

    def before(self, x: Tensor, level: Level, denoiser: Denoiser, conditions: dict[str, Condition]) -> Tensor:
        if level.index / level.steps >= self.stop:
            return x
        progress = level.index / max(level.steps - 1, 1)
        cond = conditions["cond"]
        return self._update(denoiser.model, x, lambda z: denoiser(z, level, cond), self.concept_tokens, progress)

    def before_step(
        self,
        model: nn.Module,
        z: Tensor,
        t: Any,
        cond: Tensor | Mapping[str, Any],
        concept_tokens: Concepts | None = None,
        *,
        progress: float = 0.0,
    ) -> Tensor:
        """The latent to make the next step from (b, ...), for loops that are written by hand.

        Args:
            model: UNet or transformer, called with text alone.
            z: latent (b, ...).
            t: its time, as the model takes it.
            cond: encoded text (1 or b, tokens, width), or keywords of the model.
            concept_tokens: see the class; its own if None.
            progress: share of the steps that are done, which lowers alpha.

        Raises:
            InputError: if there is no concept, a token is not one of the prompt, or no layer has the grid.
        """
        in_range("progress", progress, 0, 1)
        keywords = {"encoder_hidden_states": cond} if isinstance(cond, Tensor) else cond
        keywords = tree_map(lambda v: v.expand(len(z), *v.shape[1:]) if v.ndim and len(v) == 1 else v, keywords)

        def ask(latent: Tensor) -> Any:
            if "Transformer2DModel" in type(model).__name__:
                return model(hidden_states=latent, timestep=torch.as_tensor(t).expand(len(z)), **keywords)
            return model(latent, t, **keywords)

        chosen = self.concept_tokens if concept_tokens is None else concept_tokens
        return self._update(model, z, ask, chosen, progress)

    # --- one update ---------------------------------------------------------------------------------------------------

    def _update(
        self,
        model: nn.Module,
        z: Tensor,
        ask: Callable[[Tensor], Any],
        concepts: Concepts | None,
        progress: float,
    ) -> Tensor:
        groups = _groups(concepts, len(z))
        step = self.alpha * math.sqrt(1 - (1 - self.decay) * progress)
        masks = self.masks if self.layout is None else self._layout(len(z), len(groups[0]))
        # Frozen, so that no graph is kept for the weights.
        with mode(model, training=False), training_only(model, ()), torch.set_grad_enabled(step > 0):
            for _ in range(self.iterations):
                latent = z.detach().requires_grad_()  # the graph ends here: nothing of earlier steps is kept
                maps = self._read(model, latent, ask, groups)
                loss = self._loss(maps, masks)
                if step:
                    (gradient,) = torch.autograd.grad(loss * self.loss_scale, latent)
                    z = z - step * (gradient / self.loss_scale)
        self.maps = maps.detach()
        own = binarize_attention(self.maps, method=self.method, threshold=self.threshold)
        self.masks = own if self.layout is None else masks
        return z.detach()

    def _loss(self, maps: Tensor, masks: Tensor | None) -> Tensor:
        segregation = attention_segregation_loss(maps, reduction="none").sum(-1)
        loss, retention = self.weights[0] * segregation, None
        if masks is not None:
            if masks.shape != maps.shape:
                raise InputError(
                    f"The masks have shape {tuple(masks.shape)} and the maps {tuple(maps.shape)}: call reset() first"
                )
            whole = maps / maps.amax((-2, -1), keepdim=True).clamp_min(1e-12)
            retention = attention_retention_loss(whole, masks, reduction="none").sum(-1)
            loss = loss + self.weights[1] * retention
        kept = None if retention is None else retention.detach()
        self.history.append({"segregation": segregation.detach(), "retention": kept})
        return loss.sum()

    def _read(
        self, model: nn.Module, latent: Tensor, ask: Callable[[Tensor], Any], groups: list[list[list[int]]]
    ) -> Tensor:
        """A (batch, concepts, r, r) of one forward pass, with gradients."""
        kind = next((kind for kind in ("cross", "joint") if attention_layers(model, kind)), None)
        if kind is None:
            raise InputError(f"model is a {type(model).__name__}, but must have layers in which images attend to text")
        store: dict[str, Tensor] = {}
        counts: set[int] = set()

        def keep(call: AttentionCall) -> Tensor:
            """Other grids stay with the fused kernel, which is faster and keeps no probabilities."""
            if call.image is None or call.kind == "self":
                return call.original()
            image = range(call.query.shape[-2])[call.image]
            counts.add(len(image))
            if len(image) != self.size[0] * self.size[1]:
                return call.original()
            probabilities = call.probabilities
            text = slice(None)
            if call.kind == "joint":
                text = slice(len(image), None) if image.start == 0 else slice(0, image.start)
            store[call.layer] = probabilities[..., call.image, text]
            return probabilities.to(call.value.dtype) @ call.value

        with edit_attention(model, keep, self.layers, kind=kind):
            ask(latent)
        if not store:
            raise _no_grid(self.size, counts)
        maps = aggregate_cross_attention(store, resolution=self.size)
        first, last = self._bounds(maps.shape[1], groups)
        if self.preprocess is not None:
            maps = F.pad((100 * maps[:, first : last + 1]).softmax(1), (0, 0, 0, 0, first, maps.shape[1] - 1 - last))
            maps = _smooth(maps)
        share = maps.new_zeros(len(groups), len(groups[0]), maps.shape[1])
        for sample, concepts in enumerate(groups):
            for place, tokens in enumerate(concepts):
                share[sample, place, tokens] = 1 / len(set(tokens))
        return torch.einsum("bkn,bnhw->bkhw", share.expand(len(maps), -1, -1), maps)

    def _bounds(self, count: int, groups: list[list[list[int]]]) -> tuple[int, int]:
        """The first and the last token of the prompt; those of concepts must be among them."""
        last = count - 2 if self.prompt_length is None else self.first + self.prompt_length - 1
        for token in (token for sample in groups for tokens in sample for token in tokens):
            if not self.first <= token <= min(last, count - 1):
                raise InputError(
                    f"concept_tokens has token {token}, but must have tokens of the prompt, {self.first} to "
                    f"{min(last, count - 1)}, and none that mark its ends or fill it up"
                )
        return self.first, min(last, count - 1)

    def _layout(self, samples: int, concepts: int) -> Tensor:
        assert self.layout is not None
        layout = self.layout if self.layout.ndim == 4 else self.layout.expand(samples, *self.layout.shape)
        if layout.shape[:2] != (samples, concepts):
            raise InputError(
                f"layout_masks has masks for {tuple(layout.shape[:2])} samples and concepts, but must have them for "
                f"{(samples, concepts)}"
            )
        return layout

    # --- in a pipeline ------------------------------------------------------------------------------------------------

    def attached(self, pipeline: Any) -> AbstractContextManager[Any]:
        """Update the latents of a pipeline of diffusers inside the block; it is called as always.

        Together with a guidance it is `retouch.guide.attach(pipeline, guidance, hooks=[self])`.

        Args:
            pipeline: Stable Diffusion, SDXL, SD3, PixArt, Flux and what is made like them, without extra channels.
        """
        return attach(pipeline, hooks=[self])


def steer(
    denoiser: Denoiser,
    prompt: str,
    *,
    words: str = "",
    resolution: int | None = None,
    alpha: float = 20.0,
    stop: float = 1.0,
) -> Steering:
    """Sample with gradient steps on the latent.

    Args:
        denoiser: of a text-to-image pipeline.
        prompt: in which the words are.
        words: the concepts, with commas between them, such as "circle, blue square".
        resolution: of the attention's grid; if left out, that of the model's which is nearest to a quarter of the
            latent's side, as the paper's 16 is for latents of 64.
        alpha: size of a step at the start.
        stop: share of the sampler's steps at which it ends.
    """
    if denoiser.tokenizer is None:
        raise InputError("The pipeline has no tokenizer, but must have one to find the words in the prompt")
    concepts = [word.strip() for word in words.split(",") if word.strip()]
    if not concepts:
        raise InputError("words is empty, but must name the concepts of the prompt, with commas between them")
    groups = find_tokens(denoiser.tokenizer, prompt, concepts)
    size = _nearest_grid(denoiser) if resolution is None else resolution
    return Steering(hooks=[AStarGuidance(groups, resolution=size, alpha=alpha, stop=stop)])


@torch.no_grad()
def _nearest_grid(denoiser: Denoiser) -> tuple[int, int]:
    """The grid from which images attend to text that is nearest to a quarter of the latent's side."""
    noise = unit_noise(denoiser, 1, seeds.generator(0))
    grids: set[tuple[int, int]] = set()
    quarter = max(1, noise.shape[-2] // 4), max(1, noise.shape[-1] // 4)

    def note(call: AttentionCall) -> Tensor:
        if call.kind == "cross" and call.grid is not None:
            grids.add(call.grid)
        return call.original()

    with mode(denoiser.model, training=False), edit_attention(denoiser.model, note):
        denoiser(noise, denoiser.process.grid(1).levels[0], denoiser.encode("", 1))
    return min(sorted(grids), key=lambda grid: abs(math.log(grid[0] / quarter[0])), default=quarter)


def _resized(masks: Tensor, size: tuple[int, int]) -> Tensor:
    if masks.ndim not in (3, 4):
        raise InputError(
            f"layout_masks has shape {tuple(masks.shape)}, but must be (concepts, h, w) or (batch, concepts, h, w)"
        )
    masks = (masks != 0).float()
    flat = masks.reshape(-1, 1, *masks.shape[-2:])
    resized = (F.interpolate(flat, size, mode="area") >= 0.5).float().reshape(*masks.shape[:-2], *size)
    _check_filled(f"layout_masks, at {size[0]} x {size[1]},", resized)
    return resized


def _smooth(maps: Tensor) -> Tensor:
    """Each map with a Gaussian of 3 x 3 and standard deviation 1/2."""
    line = torch.tensor([-1.0, 0.0, 1.0], device=maps.device, dtype=maps.dtype).square().mul(-2).exp()
    kernel = torch.outer(line, line)
    padded = F.pad(maps.flatten(0, 1).unsqueeze(1), (1, 1, 1, 1), mode="reflect")
    return F.conv2d(padded, (kernel / kernel.sum()).view(1, 1, 3, 3)).view_as(maps)
