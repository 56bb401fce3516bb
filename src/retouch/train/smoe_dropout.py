"""SMoE-Dropout: MLPs cut into experts behind a random, frozen router, of which more and more are active in training.

    routing     g = R x + r,  T = the k largest of N logits,  w = softmax of g over T alone: they sum to 1 at every k
    MLP         y = sum over e in T of w_e E_e(x),  E_e(x) = W2_e act(W1_e x + b1_e) + b2_e
    schedule    k(s) = round((k_max - k_min) s / S) + k_min; R and r are frozen from the start

A dense MLP is N experts of 1 / N of its inner width, so the number of weights stays. The router learns nothing: it
cannot collapse onto a few experts nor fit itself to one k, and the trained model runs with any k ("self-slimmable"),
better the larger it is. Use it to train transformers that must run at several budgets; not to speed up a trained model
without training it (it falls apart at half of the experts), nor where all of N can always be paid for and the network
does not overfit: a dense one is then as good. Always report the whole curve over k.

Paper: arXiv 2303.01610. Code: VITA-Group/Random-MoE-as-Dropout. Where they part: the paper writes the k largest of a
softmax over all N, the code a softmax of the k alone. The code is followed: outputs would otherwise shrink with k. The
official runs train from scratch, N = 16 and k from 8 to 16. Ours, not the paper's, is `convert`: MLPs that are there,
pretrained and gated ones too, are cut along their inner width, and what experts give is multiplied by N, so that all of
them at equal weights are the dense MLP.

Cost: d N of the router, and k / N of the MLP. For k from N / 2 on, and on small batches, all experts are computed and
weighted, which saves nothing but is faster; otherwise tokens are sorted by expert and each expert sees only its own.
Limits: no load balancing and no capacity limit; "exp_increase" ends short of k_max if the ramp is longer than 10.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retouch.core import seeds
from retouch.core.cards import Card
from retouch.core.errors import InputError, in_range, one_of, positive
from retouch.core.loop import Callback, Run
from retouch.core.models import Batch, own
from retouch.core.recipe import Recipe

CARD = Card(
    title="SMoE-Dropout",
    room="train",
    paper="arXiv:2303.01610",
    shape="layer",
    line="Cuts MLPs into experts behind a frozen random router and trains with more and more of them active.",
    tags=("mixture of experts", "transformers", "any budget at inference"),
    plugin="convert",
)
Activation = Callable[[Tensor], Tensor]
Match = Callable[[str, nn.Module], bool] | str
Mode = Literal["linear_increase", "cosine_increase", "exp_increase"]
ACTIVATIONS: dict[str, Activation] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}
WORTH_SORTING = 2**25  # multiplications to be saved before N small matrix products are faster than two large ones


def num_active_experts(
    step: int, total_steps: int, *, minimum: int, maximum: int, mode: Mode = "linear_increase"
) -> int:
    """Active experts at a step: a ramp from `minimum` to `maximum`, with halves rounded to even.

    Args:
        step: from 0; beyond `total_steps` the ramp stays at its end.
        total_steps: S, length of the ramp; at least 300 for "exp_increase", which has 300 stages.
        minimum: experts at step 0.
        maximum: experts at the end.
        mode: "linear_increase"; "cosine_increase", a quarter of a wave, steep at its end; or "exp_increase", steep at
            its start, which ends 0.05 (maximum - minimum) short of the maximum before it is rounded.
    """
    one_of("mode", mode, ("linear_increase", "cosine_increase", "exp_increase"))
    in_range("step", step, 0)
    in_range("total_steps", total_steps, 300 if mode == "exp_increase" else 1)
    in_range("minimum", minimum, 1, maximum)
    span = maximum - minimum
    if mode == "linear_increase":
        k = round(span * step / total_steps) + minimum
    elif mode == "cosine_increase":
        k = round(-span * math.cos(math.pi * min(step, total_steps) / (2 * total_steps))) + maximum
    else:
        k = round(-span * 0.99 ** (step // (total_steps // 300))) + maximum
    return min(max(k, minimum), maximum)


def route_top_k(tokens: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """The k experts of each token, and their weights: a softmax over those k logits only.

    Args:
        tokens: (..., d).
        weight: of the router (N, d).
        bias: of the router (N,), or None.
        k: active experts, 1 to N.

    Returns:
        Indices (..., k), largest logit first and ties by position: the experts of k are among those of k + 1. And
        weights (..., k) that sum to 1.
    """
    in_range("k", k, 1, len(weight))
    logits, indices = F.linear(tokens, weight, bias).sort(dim=-1, descending=True, stable=True)
    return indices[..., :k], logits[..., :k].softmax(-1)


class Experts(NamedTuple):
    """Weights of N experts of width h for tokens of width d.

    Attributes:
        inner: weights (N, h, d) and biases (N, h) or None; in a gated MLP a second pair, for what act is multiplied by.
        outer: weights (N, d, h).
        bias: (N, d), or None.
        activation: act.
    """

    inner: tuple[tuple[Tensor, Tensor | None], ...]
    outer: Tensor
    bias: Tensor | None
    activation: Activation = F.relu

    def units(self, parts: list[Tensor]) -> Tensor:
        """Inner units, from what the inner weights give."""
        return functools.reduce(torch.mul, [self.activation(parts[0]), *parts[1:]])


def by_expert(indices: Tensor, weights: Tensor, num_experts: int) -> Tensor:
    """Weights of all experts (..., N), zero for those not active, from those of the active ones, both (..., k)."""
    return weights.new_zeros(*weights.shape[:-1], num_experts).scatter(-1, indices, weights)


def dense_experts(tokens: Tensor, indices: Tensor, weights: Tensor, experts: Experts) -> Tensor:
    """The mixture of experts by computing all of them: tokens (t, d), indices and weights (t, k) to (t, d)."""
    share = by_expert(indices, weights, len(experts.outer))
    units = experts.units(
        [F.linear(tokens, w.flatten(0, 1), None if b is None else b.flatten()) for w, b in experts.inner]
    )
    weighted = units.unflatten(-1, experts.inner[0][0].shape[:2]) * share[..., None]
    output = torch.einsum("tnh,ndh->td", weighted, experts.outer)
    return output if experts.bias is None else output + share @ experts.bias


def sparse_experts(tokens: Tensor, indices: Tensor, weights: Tensor, experts: Experts) -> Tensor:
    """The same by sorting tokens by expert, so that each expert computes its own only: k / N of the work."""
    chosen = indices.flatten()
    order, counts = chosen.argsort(stable=True), chosen.bincount(minlength=len(experts.outer)).tolist()
    rows = order // indices.shape[-1]
    columns = rows, tokens.index_select(0, rows), weights.flatten()[order, None]
    output = torch.zeros_like(tokens)
    for e, (where, part, share) in enumerate(zip(*(column.split(counts) for column in columns), strict=True)):
        units = experts.units([F.linear(part, w[e], None if b is None else b[e]) for w, b in experts.inner])
        answer = share * F.linear(units, experts.outer[e], None if experts.bias is None else experts.bias[e])
        output = output.index_add_(0, where, answer.to(output.dtype))  # no row twice: the same sums on any device
    return output


def _uniform(shape: tuple[int, ...], fan_in: int, generator: torch.Generator | None) -> Tensor:
    """As nn.Linear starts."""
    return (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(fan_in)


class Router(nn.Module):
    """A linear layer from d to N at its random start; buffers, so that no optimizer and no weight decay reaches it."""

    weight: Tensor
    bias: Tensor

    def __init__(self, dim: int, num_experts: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", _uniform((num_experts, dim), dim, generator))
        self.register_buffer("bias", _uniform((num_experts,), dim, generator))


class SMoEDropoutMLP(nn.Module):
    """An MLP of experts behind a frozen random router: (..., dim) to (..., dim).

    Args:
        dim: width of tokens.
        hidden: width of each expert.
        num_experts: N.
        activation: "relu", "gelu", "silu", "tanh", or a function.
        dropout: of the output.
        generator: of the first weights; torch's global one if None, as in every layer of torch.

    Attributes:
        router: its buffers are saved with the model.
        sparse: whether tokens are sorted by expert; None takes what is likely to be faster.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        num_experts: int = 16,
        activation: str | Activation = "relu",
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("dim", dim), ("hidden", hidden), ("num_experts", num_experts)):
            positive(name, size)
        if isinstance(activation, str):
            one_of("activation", activation, tuple(ACTIVATIONS))
            activation = ACTIVATIONS[activation]
        self.activation, self.dropout = activation, nn.Dropout(dropout)
        self.w1 = nn.Parameter(_uniform((num_experts, hidden, dim), dim, generator))
        self.b1 = nn.Parameter(_uniform((num_experts, hidden), dim, generator))
        self.w2 = nn.Parameter(_uniform((num_experts, dim, hidden), hidden, generator))
        self.b2 = nn.Parameter(_uniform((num_experts, dim), hidden, generator))
        self._route_at_random(dim, hidden, num_experts, generator)

    def _route_at_random(self, dim: int, hidden: int, num_experts: int, generator: torch.Generator | None) -> None:
        self.router = Router(dim, num_experts, generator=generator)
        self.num_experts, self.hidden, self.k = num_experts, hidden, num_experts
        self.sparse: bool | None = None

    @classmethod
    def from_dense(
        cls,
        fc1: nn.Linear,
        fc2: nn.Linear,
        *,
        num_experts: int,
        rescale: bool = True,
        activation: str | Activation = "relu",
        generator: torch.Generator | None = None,
    ) -> "SMoEDropoutMLP":
        """Experts from a copy of a dense MLP, cut evenly along its inner width (ours, not the paper's).

        Args:
            fc1: d to N h, with or without a bias.
            fc2: N h to d.
            num_experts: N, which must divide the inner width.
            rescale: multiply what experts give by N, so that at k = N and equal weights they are the dense MLP;
                otherwise that is N times smaller.
            activation: of the dense MLP.
            generator: of the router; torch's global one if None.
        """
        cut, scale = _cut((fc1,), fc2, num_experts), num_experts if rescale else 1
        (w1, b1), bias = cut.inner[0], fc2.bias
        made = cls(w1.shape[2], w1.shape[1], num_experts=num_experts, activation=activation, generator=generator)
        b2 = None if bias is None else (bias * scale / num_experts).expand(num_experts, -1)
        for name, value in {"w1": w1, "b1": b1, "w2": cut.outer * scale, "b2": b2}.items():
            setattr(made, name, None if value is None else nn.Parameter(value.detach().clone().contiguous()))
        made.router.to(w1)
        return made

    @property
    def k(self) -> int:
        """Active experts, 1 to N; N at first."""
        return self._k

    @k.setter
    def k(self, value: int) -> None:
        in_range("k", value, 1, self.num_experts)
        self._k = int(value)

    @property
    def experts(self) -> Experts:
        """The weights."""
        return Experts(((self.w1, self.b1),), self.w2, self.b2, self.activation)

    def sorts(self, tokens: Tensor) -> bool:
        """Whether tokens (..., d) are sorted by expert: below half of the experts, where that saves enough work."""
        if self.sparse is not None:
            return self.sparse
        saved = 2 * tokens.numel() * self.hidden * (self.num_experts - self.k)
        return 2 * self.k < self.num_experts and saved > WORTH_SORTING

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (..., dim), perhaps none of them, to (..., dim)."""
        flat = tokens.reshape(-1, tokens.shape[-1])
        indices, weights = route_top_k(flat, self.router.weight, self.router.bias, self.k)
        mix = sparse_experts if self.sorts(flat) else dense_experts
        return self.dropout(mix(flat, indices, weights, self.experts)).view(tokens.shape)

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, k={self.k}"


def _matrix(layer: Any) -> Tensor:
    return layer.weight.t() if type(layer).__name__ == "Conv1D" else layer.weight  # transformers' own, of GPT-2


def _cut(first: tuple[Any, ...], last: Any, num_experts: int, activation: Activation = F.relu) -> Experts:
    """Views of a dense MLP's weights as experts, without the output bias, which belongs to all of them."""
    positive("num_experts", num_experts)
    inner, dim = _matrix(first[0]).shape
    for layer, shape in ((first[-1], (inner, dim)), (last, (dim, inner))):
        if _matrix(layer).shape != shape:
            found = tuple(_matrix(layer).shape)
            raise InputError(f"A layer of the MLP has weights {found}, but must have {shape} to fit its first layer")
    if inner % num_experts:
        raise InputError(f"num_experts is {num_experts}, but must divide the inner width {inner} of the MLP")
    size = (num_experts, inner // num_experts)
    pairs = [(_matrix(f).unflatten(0, size), None if f.bias is None else f.bias.view(size)) for f in first]
    return Experts(tuple(pairs), _matrix(last).unflatten(1, size).transpose(0, 1), None, activation)


# --- in models ------------------------------------------------------------------------------------------------------

LAYOUTS = (  # of the linear layers, below the layer that holds an MLP
    ("fc1", "fc2"),  # ViT, CLIP, OPT, Phi
    ("intermediate.dense", "output.dense"),  # BERT, RoBERTa
    ("ffn", "ffn_output"),  # ALBERT
    ("lin1", "lin2"),  # DistilBERT
    ("c_fc", "c_proj"),  # GPT-2, GPT-Neo
    ("dense_h_to_4h", "dense_4h_to_h"),  # GPT-NeoX, Falcon
    ("gate_proj", "up_proj", "down_proj"),  # Llama, Mistral, Qwen, Gemma
)
ACTIVATION_NAMES = ("act", "act_fn", "activation_fn", "activation", "intermediate.intermediate_act_fn")


class MLP(NamedTuple):
    """A dense MLP in a model: the layer that holds it, its linear layers, and the activation, if that is known."""

    name: str
    holder: nn.Module
    first: tuple[Any, ...]
    last: Any
    activation: Activation | None


def _below(module: Any, path: str) -> Any:
    return functools.reduce(lambda found, name: getattr(found, name, None), path.split("."), module)


def find_mlps(model: nn.Module, match: Match | None = None) -> list[MLP]:
    """The two-layer and gated MLPs of a model, in order.

    Args:
        model: of transformers, or with `nn.Sequential(Linear, activation, Linear)` back to the same width.
        match: a regular expression searched in the name of the layer that holds the MLP or of its first linear layer;
            or a function of (name of the holder, holder); all if None.
    """
    found, names = list[MLP](), {module: name for name, module in model.named_modules()}
    for holder, name in names.items():
        for layout in LAYOUTS:
            *first, last = [_below(holder, path) for path in layout]
            if all(isinstance(layer, nn.Module) and hasattr(layer, "weight") for layer in (*first, last)):
                known = [act for path in ACTIVATION_NAMES if callable(act := _below(holder, path))]
                found.append(MLP(name, holder, tuple(first), last, known[0] if known else None))
        layers: list[Any] = list(holder) if isinstance(holder, nn.Sequential) else []
        for one, act, two in zip(layers, layers[1:], layers[2:], strict=False):
            if isinstance(one, nn.Linear) and isinstance(two, nn.Linear) and one.in_features == two.out_features:
                found.append(MLP(name, holder, (one,), two, act))
    if isinstance(match, str):
        return [mlp for mlp in found if any(re.search(match, text) for text in (mlp.name, names[mlp.first[0]]))]
    return [mlp for mlp in found if match is None or match(mlp.name, mlp.holder)]


NONE = torch.empty(0)


class HostedExperts(SMoEDropoutMLP):
    """Experts whose weights are a model's own: a child of the MLP's last layer, acting by hooks.

    Where all experts are computed, the model's layers do it and the units between them are weighted. Where tokens are
    sorted by expert, those layers are called on no tokens at all, and the output of the last one is replaced.
    """

    bias: Tensor | None

    def __init__(self, mlp: MLP, num_experts: int, generator: torch.Generator) -> None:
        nn.Module.__init__(self)
        self.mlp = mlp  # a tuple, so that its layers are not registered here as well
        cut = self._experts(num_experts)
        width, dim = cut.inner[0][0].shape[1:]
        self._route_at_random(dim, width, num_experts, generator)
        self.router.to(cut.outer)
        self.sparse = None if mlp.activation else False  # the model's own layers know what lies between them
        own_bias = None if mlp.last.bias is None else nn.Parameter(cut.outer.new_zeros(num_experts, dim))
        self.register_parameter("bias", own_bias)  # of each expert, besides that of the layer
        self.tokens = self.share = NONE
        self.sorting = False
        self.handles: list[Any] = [layer.register_forward_pre_hook(self._enter) for layer in mlp.first]
        self.handles += [mlp.last.register_forward_pre_hook(self._weigh), mlp.last.register_forward_hook(self._leave)]

    def _experts(self, num_experts: int) -> Experts:
        return _cut(self.mlp.first, self.mlp.last, num_experts, self.mlp.activation or F.relu)

    @property
    def experts(self) -> Experts:
        """The model's own weights, cut: without a bias of the output, and with outputs N times too small."""
        return self._experts(self.num_experts)

    def forward(self, tokens: Tensor) -> Tensor:
        """What the MLP gives for tokens (..., dim), up to dropout inside of it."""
        flat = tokens.reshape(-1, tokens.shape[-1])
        indices, weights = route_top_k(flat, self.router.weight, self.router.bias, self.k)
        mix = sparse_experts if self.sorts(flat) else dense_experts
        output = mix(flat, indices, self.num_experts * weights, self.experts)
        if self.bias is not None:
            output = output + self.mlp.last.bias + by_expert(indices, weights, self.num_experts) @ self.bias
        return output.view(tokens.shape)

    def _enter(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if module is self.mlp.first[0]:
            self.tokens, self.sorting = args[0], self.sorts(args[0])
        return (args[0][:0],) if self.sorting else None

    def _weigh(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self.sorting:
            return None
        routes = route_top_k(self.tokens, self.router.weight, self.router.bias, self.k)
        self.share = by_expert(*routes, self.num_experts)
        units = args[0].unflatten(-1, (self.num_experts, -1)) * (self.num_experts * self.share)[..., None]
        return (units.flatten(-2),)

    def _leave(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        tokens, share, self.tokens, self.share = self.tokens, self.share, NONE, NONE  # nothing outlives the pass
        if self.sorting:
            return self(tokens)
        return None if self.bias is None else output + share @ self.bias


def apply_smoe_dropout(
    model: nn.Module, *, num_experts: int = 16, match: Match | None = None, seed: int = 0
) -> nn.Module:
    """Cut the MLPs of a model into experts, in place; returns the model, with all experts active.

    Works by hooks: weights stay where they are, under their names, and optimizers and tied weights stay valid. The last
    layer of each MLP gets a child `experts`, a `SMoEDropoutMLP` with the router and a bias for each expert. What they
    give is multiplied by N, as in `from_dense`. To load a saved model, build it, apply this, and load its state_dict.

    Args:
        model: transformer, of transformers or with `nn.Sequential(Linear, activation, Linear)`.
        num_experts: N, which must divide the inner width of each MLP.
        match: which MLPs, see `find_mlps`; all if None.
        seed: of the routers.

    Raises:
        InputError: if there is no such MLP, or one cannot be cut or has been cut; the model is then as it was.
    """
    found = find_mlps(model, match)
    if not found:
        raise InputError(f"{type(model).__name__} has no two-layer or gated MLP, or match={match!r} takes none of them")
    for mlp in found:
        _cut(mlp.first, mlp.last, num_experts)
        if hasattr(mlp.last, "experts"):
            raise InputError(f"The MLP in {mlp.name} has experts already, but must be dense: see remove_smoe_dropout")
    for number, mlp in enumerate(found):
        mlp.last.add_module("experts", HostedExperts(mlp, num_experts, seeds.generator(seed, "router", number)))
    return model


def convert(
    model: nn.Module, *, num_experts: int = 16, match: Match | None = None, seed: int = 0, inplace: bool = False
) -> nn.Module:
    """A copy of a model with its MLPs cut into experts, or the model itself if `inplace`; see `apply_smoe_dropout`."""
    return apply_smoe_dropout(own(model, inplace=inplace), num_experts=num_experts, match=match, seed=seed)


@torch.no_grad()
def remove_smoe_dropout(model: nn.Module) -> nn.Module:
    """Take out what `apply_smoe_dropout` put in; returns the model, whose MLPs are dense again.

    Without training in between it is the model of before, exactly; with it, its MLPs are all experts at equal weights.
    """
    for experts in [layer for layer in model.modules() if isinstance(layer, HostedExperts)]:
        for handle in experts.handles:
            handle.remove()
        if experts.bias is not None:
            experts.mlp.last.bias.add_(experts.bias.mean(0))
        del experts.mlp.last.experts
    return model


def set_active_experts(model: nn.Module, k: int) -> None:
    """Set k for all layers of experts in a model; none of them changes if one has fewer than k experts."""
    layers = _layers(model)
    in_range("k", k, 1, min(layer.num_experts for layer in layers))
    for layer in layers:
        layer.k = k


def _layers(model: nn.Module) -> list[SMoEDropoutMLP]:
    layers = [layer for layer in model.modules() if isinstance(layer, SMoEDropoutMLP)]
    if not layers:
        raise InputError(f"{type(model).__name__} has no layers of experts, but must have some: see apply_smoe_dropout")
    return layers


class SMoEDropoutSchedule(Callback):
    """Raises the number of active experts while training, in `fit` or as `on_step(step)` in a loop of one's own.

    It has no state: k follows from the step, and the trained model has k of the last one, the maximum.

    Args:
        model: with layers of experts.
        total_steps: S, length of the ramp; in `fit`, that of the run if None.
        minimum: experts at the start; half of them if None.
        maximum: experts at the end; all of them if None.
        mode: see `num_active_experts`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        total_steps: int | None = None,
        minimum: int | None = None,
        maximum: int | None = None,
        mode: Mode = "linear_increase",
    ) -> None:
        self.layers = _layers(model)
        number = min(layer.num_experts for layer in self.layers)
        self.minimum = max(1, number // 2) if minimum is None else minimum
        self.maximum = number if maximum is None else maximum
        in_range("maximum", self.maximum, 1, number)
        self.total_steps, self.mode = total_steps, mode
        self.k_at(0, 300 if total_steps is None else total_steps)  # refuses what cannot be

    def k_at(self, step: int, total_steps: int) -> int:
        """Active experts at a step."""
        return num_active_experts(step, total_steps, minimum=self.minimum, maximum=self.maximum, mode=self.mode)

    def on_step(self, step: int | Run) -> int:  # type: ignore[override]
        """Set k for a step (from 0) and return it; `fit` gives its run in place of the step."""
        total = step.steps if self.total_steps is None and isinstance(step, Run) else self.total_steps
        if total is None:
            raise InputError("total_steps is None, but must be given outside of fit, which knows its own")
        k = self.k_at(step.step if isinstance(step, Run) else step, total)
        for layer in self.layers:
            layer.k = k
        return k

    def on_batch(self, run: Run, batch: Batch) -> Batch:
        run.log(active_experts=self.on_step(run))
        return batch


def recipe(
    model: nn.Module,
    data: Any,
    validation: Any = None,
    *,
    num_experts: int = 16,
    minimum: int | None = None,
    maximum: int | None = None,
    mode: str = "linear_increase",
    seed: int = 0,
) -> Recipe:
    """Train a transformer with SMoE-Dropout.

    Args:
        model: with two-layer or gated MLPs, such as transformers' ViT; trained in place.
        data: labelled samples.
        validation: not used.
        num_experts: experts of each MLP.
        minimum: active experts at the start; half of them if not given.
        maximum: active experts at the end; all of them if not given.
        mode: of the ramp: linear_increase, cosine_increase or exp_increase.
        seed: of the routers.
    """
    apply_smoe_dropout(model, num_experts=num_experts, seed=seed)
    schedule = SMoEDropoutSchedule(model, minimum=minimum, maximum=maximum, mode=mode)  # type: ignore[arg-type]
    return Recipe(model=model, data=data, callbacks=[schedule])
