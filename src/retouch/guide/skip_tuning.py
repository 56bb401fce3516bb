"""Skip-Tuning: better samples in few steps from a UNet whose long skip connections are turned down, without training.

A decoder position i joins what comes up with what an encoder stored, and only the stored half is scaled:

    concat(u_i, d_i)  ->  concat(u_i, rho_i d_i)         i = 0 is the deepest skip, used first, and k - 1 the top one
    rho_i = rho_bottom + (rho_top - rho_bottom) / k i    the deepest is turned down most

Weights, schedule and sampler stay. Models that were distilled to few steps have a lower ratio ||d_i|| / ||u_i|| than
their teachers (`skip_norm_ratio`), and this imitates it. Where no group of the GroupNorm that follows has channels of
both halves, the norm cancels rho, and the whole effect is (rho - 1) W_d d_i in the block's 1x1 shortcut.

    with SkipTuning(unet, skip_coefficients(count_skips(unet), rho_bottom=0.8)):
        sample(denoiser, noise, "a red circle", times=8)          # or pipe("a red circle", num_inference_steps=8)

Use it on UNets that are sampled in about 5 to 20 steps, with rho searched for that model, number of steps and guidance
(`search_skip_coefficients`; on one seed, reported on others: a metric of few samples is fitted soon). Not on models
without long skips (DiT, SD3, Flux), and not together with FreeU, which scales the same tensors and is refused. The
denoising loss in pixels rises as rho leaves 1; the paper finds that in a classifier's features it falls at middle noise
(`discriminative_score_matching` measures both). A small network that fits its data well may be best at 1.

Paper: arXiv 2402.15170; no code was published. By its formula rho_{k-1} is a little less than rho_top, which
`endpoint=True` reaches. Its numbers for rho are not certain: 0.8 is our starting point. rho here is not the rho of
Karras' noise levels. What a ControlNet adds to the skips is scaled with them.

Cost: k multiplications of a tensor a call. A search costs a set of samples for every pair that is tried. Networks that
are compiled must be tuned first and compiled then.
"""

import inspect
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from retouch.core import seeds
from retouch.core.cards import Card
from retouch.core.diffusion.denoiser import Denoiser
from retouch.core.diffusion.process import spread
from retouch.core.diffusion.steering import Steering
from retouch.core.diffusion.steps import draw_like
from retouch.core.errors import InputError, positive
from retouch.core.models import mode

CARD = Card(
    title="Skip-Tuning",
    room="guide",
    paper="arXiv:2402.15170",
    shape="sampler part",
    line="Turns down a UNet's long skip connections, the deepest most, for better samples in few steps.",
    tags=("diffusion", "few steps", "unet", "skip connections", "no training"),
    plugin="SkipTuning",
)

Schedule = Callable[[float], Sequence[float] | Tensor]
TIMES = ("timestep", "sigma", "timesteps", "noise_labels", "t", "time")  # as forward functions name them

# --- functional core --------------------------------------------------------------------------------------------------


def skip_coefficients(
    num_skips: int, *, rho_bottom: float = 0.8, rho_top: float = 1.0, endpoint: bool = False
) -> Tensor:
    """One factor for each skip (num_skips,), the deepest first.

    Args:
        num_skips: k, see `count_skips`.
        rho_bottom: of the deepest skip, at least 0.
        rho_top: where the line leads, one step past the top skip.
        endpoint: let the top skip itself have `rho_top`.
    """
    positive("num_skips", num_skips)
    for name, rho in (("rho_bottom", rho_bottom), ("rho_top", rho_top)):
        _check_factor(name, rho)
    steps = max(num_skips - 1, 1) if endpoint else num_skips
    return rho_bottom + (rho_top - rho_bottom) / steps * torch.arange(num_skips, dtype=torch.float32)


def discriminative_score_matching(
    denoise: Callable[[Tensor, Any], Tensor],
    x0: Tensor,
    sigma: float | Tensor,
    feature_net: Callable[[Tensor], Tensor],
    *,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Denoising loss at one noise level, in pixels and in the features of a classifier.

    Args:
        denoise: (x0 + sigma noise, sigma) -> x0; alpha is 1, so a VP model is asked with alpha times the first.
        x0: clean samples (b, ...).
        sigma: noise level: above 0, a number or (b,).
        feature_net: x0 -> features (b, ...).
        noise: unit noise, like x0; drawn if None.
        generator: of that noise.

    Returns:
        Mean squared errors, two scalars.
    """
    levels = torch.as_tensor(sigma, dtype=x0.dtype, device=x0.device).reshape(-1)
    if len(levels) not in (1, len(x0)) or not bool((levels > 0).all()):
        raise InputError(f"sigma is {sigma}, but must be a number above 0, or one for each of {len(x0)} samples")
    noise = draw_like(x0, seeds.fresh(generator)) if noise is None else noise
    if noise.shape != x0.shape:
        raise InputError(f"noise has shape {tuple(noise.shape)}, but must have x0's, {tuple(x0.shape)}")
    found = denoise(x0 + spread(levels, x0) * noise, sigma)
    features, wanted = feature_net(found), feature_net(x0)
    return (found - x0).square().mean(), (features - wanted).square().mean()


def _check_factor(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise InputError(f"{name} is {value}, but must be at least 0 and finite")


# --- where a model has its skips --------------------------------------------------------------------------------------


class NoSkips(InputError, TypeError):
    """The model has no long skip connections that are known here."""


@dataclass(frozen=True)
class _UpBlock:
    """An up block of diffusers, which is handed its skips in a tuple and takes the last one first."""

    module: nn.Module
    count: int

    def scaled(self, args: tuple[Any, ...], kwargs: dict[str, Any], rhos: Sequence[float]) -> tuple[Any, Any]:
        """The block's arguments, with its skips scaled; out of place, since the encoder's tensors may be in use."""
        _refuse_freeu(self.module)
        named = "res_hidden_states_tuple" in kwargs
        skips = list(kwargs["res_hidden_states_tuple"] if named else args[1])
        for place, rho in enumerate(rhos, 1):
            skips[-place] = skips[-place] * rho if rho != 1 else skips[-place]
        if named:
            return args, {**kwargs, "res_hidden_states_tuple": tuple(skips)}
        return (args[0], tuple(skips), *args[2:]), kwargs

    @contextmanager
    def parts(self, see: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
        """Show (place in the block, u, d) of every skip as it is joined, in the input of a residual block."""
        widths: list[int] = []

        def note(_module: nn.Module, args: Any, kwargs: Any) -> None:
            skips = kwargs["res_hidden_states_tuple"] if "res_hidden_states_tuple" in kwargs else args[1]
            widths[:] = [skip.shape[1] for skip in skips[::-1][: self.count]]

        def look(place: int) -> Callable[..., None]:
            def hook(_module: nn.Module, args: Any) -> None:
                see(place, args[0][:, : -widths[place]], args[0][:, -widths[place] :])

            return hook

        handles = [self.module.register_forward_pre_hook(note, with_kwargs=True)]
        blocks: Any = self.module.resnets
        handles += [blocks[place].register_forward_pre_hook(look(place)) for place in range(self.count)]
        try:
            yield
        finally:
            _remove(handles)


@dataclass(frozen=True)
class _Joined:
    """A module whose first input has the skip behind what comes up: EDM's decoder blocks, U-ViT's merging layers."""

    module: nn.Module
    width: int  # of what comes up
    dim: int
    count: int = 1

    def scaled(self, args: tuple[Any, ...], kwargs: dict[str, Any], rhos: Sequence[float]) -> tuple[Any, Any]:
        """The module's arguments, with the skip scaled."""
        if rhos[0] == 1:
            return args, kwargs
        up, skip = self.split(args[0])
        return (torch.cat([up, skip * rhos[0]], self.dim), *args[1:]), kwargs

    def split(self, joined: Tensor) -> tuple[Tensor, Tensor]:
        up, skip = joined.tensor_split([self.width], self.dim)
        return up, skip

    @contextmanager
    def parts(self, see: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
        """Show (0, u, d) as they come in."""
        handle = self.module.register_forward_pre_hook(lambda _module, args: see(0, *self.split(args[0])))
        try:
            yield
        finally:
            handle.remove()


def _sites(model: nn.Module) -> list[_UpBlock | _Joined]:
    """Where skips are joined, the deepest first; modules are registered in the order in which they run."""
    found: list[_UpBlock | _Joined] = []
    for module in model.modules():
        decoder, merge = getattr(module, "dec", None), getattr(module, "skip_linear", None)
        if any(parameter.name == "res_hidden_states_tuple" for parameter in _parameters(module.forward)):
            kind = type(module).__name__
            # Those of K-diffusion and of one-dimensional UNets take one skip for all of their residual blocks.
            single = "1D" in kind or kind.startswith("K")
            blocks: Any = module.resnets
            found.append(_UpBlock(module, 1 if single else len(blocks)))
        elif isinstance(decoder, nn.ModuleDict) and isinstance(getattr(module, "enc", None), nn.ModuleDict):
            found += _edm(decoder)
        elif isinstance(merge, nn.Linear):
            # Some have a norm in between, which would undo part of the factor if it came after.
            norm = getattr(module, "skip_norm", None)
            found.append(_Joined(merge if norm is None else norm, merge.in_features // 2, -1))
    if not found:
        raise NoSkips(
            f"model is a {type(model).__name__}, but must have long skip connections: a UNet of diffusers or of EDM, "
            "or a U-ViT"
        )
    return found


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


def _edm(decoder: nn.ModuleDict) -> list[_UpBlock | _Joined]:
    """Blocks that are wider at their input than the one before them at its output."""
    found: list[_UpBlock | _Joined] = []
    blocks: list[Any] = [block for name, block in decoder.items() if "aux" not in name]
    for before, block in pairwise(blocks):
        if block.in_channels > before.out_channels:
            found.append(_Joined(block, before.out_channels, 1))
    return found


def _refuse_freeu(block: nn.Module) -> None:
    if getattr(block, "s1", None) or getattr(block, "b1", None):
        raise InputError("model has FreeU on, which scales the same skips, but must have it off: disable_freeu()")


def _remove(handles: Sequence[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def count_skips(model: nn.Module) -> int:
    """k: how many long skip connections a model has.

    Raises:
        NoSkips: if there is none; it is a TypeError.
    """
    return sum(site.count for site in _sites(model))


@torch.no_grad()
def skip_norm_ratio(model: nn.Module, x: Tensor, t: Any, **cond: Any) -> Tensor:
    """||d_i|| / ||u_i|| of each skip (k,), the deepest first, as a mean over samples.

    Args:
        model: with long skips; asked once, in eval mode.
        x: its input (b, ...).
        t: its time.
        cond: its keywords.
    """
    ratios: dict[int, Tensor] = {}

    def keep(place: int) -> Callable[[int, Tensor, Tensor], None]:
        def see(inner: int, up: Tensor, skip: Tensor) -> None:
            norms = [part.flatten(1).float().norm(dim=1) for part in (skip, up)]
            ratios[place + inner] = (norms[0] / norms[1]).mean()

        return see

    sites, place = _sites(model), 0
    with ExitStack() as stack:
        stack.enter_context(mode(model, training=False))
        for site in sites:
            stack.enter_context(site.parts(keep(place)))
            place += site.count
        model(x, t, **cond)
    return torch.stack([ratios[i] for i in range(place)])


# --- plug-ins ---------------------------------------------------------------------------------------------------------


class _Handles(RemovableHandle):
    """Several hooks that are removed as one."""

    def __init__(self, handles: Sequence[RemovableHandle]) -> None:
        super().__init__(OrderedDict())
        self.handles = tuple(handles)

    def remove(self) -> None:
        _remove(self.handles)


def scale_skips(
    model: nn.Module,
    coefficients: Sequence[float] | Tensor | Schedule,
    *,
    window: tuple[float, float] | None = None,
) -> RemovableHandle:
    """Scale the skips of a model from now on, until the handle's `remove()`.

    Args:
        model: a UNet of diffusers (`UNet2DModel`, `UNet2DConditionModel` and their kin) or of EDM, or a U-ViT.
        coefficients: rho (k,), the deepest first, each at least 0; or a function of the time that the model is told,
            a number, which gives them and is called once a forward pass.
        window: smallest and largest time, as the model is told it, at which it acts; all if None.

    Raises:
        NoSkips: if the model has no skips; it is a TypeError.
        InputError: if there are not k coefficients or one cannot be used, or FreeU is on.
    """
    sites = _sites(model)
    count = sum(site.count for site in sites)
    for site in sites:
        _refuse_freeu(site.module)
    constant = None if callable(coefficients) else _checked(coefficients, count)
    now = list(constant or [1.0] * count)  # factors of the forward pass that runs

    def begin(_module: nn.Module, args: Any, kwargs: Any) -> None:
        time = _time_of(args, kwargs)
        acts = window is None or window[0] <= time <= window[1]
        if not acts:
            now[:] = [1.0] * count
        elif callable(coefficients):
            now[:] = _checked(coefficients(time), count)
        elif constant is not None:
            now[:] = constant

    def scaling(site: _UpBlock | _Joined, start: int) -> Callable[..., Any]:
        return lambda _module, args, kwargs: site.scaled(args, kwargs, now[start : start + site.count])

    handles = [] if constant is not None and window is None else [_hook(model, begin)]
    start = 0
    for site in sites:
        handles.append(_hook(site.module, scaling(site, start)))
        start += site.count
    return _Handles(handles)


def _hook(module: nn.Module, function: Callable[..., Any]) -> RemovableHandle:
    return module.register_forward_pre_hook(function, with_kwargs=True)


def _checked(coefficients: Sequence[float] | Tensor, count: int) -> list[float]:
    """As numbers; a Python number leaves the precision of what it scales."""
    values = [float(value) for value in coefficients]
    if len(values) != count:
        raise InputError(
            f"coefficients has {len(values)} numbers, but must have {count}, one for each skip of the model"
        )
    for place, value in enumerate(values):
        _check_factor(f"coefficients[{place}]", value)
    return values


def _time_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
    given = next((kwargs[name] for name in TIMES if name in kwargs), args[1] if len(args) > 1 else None)
    if given is None:
        raise InputError(f"The model was called without a time, but a schedule needs it: {', '.join(TIMES)}")
    times = torch.as_tensor(given).flatten()
    if not bool((times == times[0]).all()):
        raise InputError("The model was called with several times in one batch, but a schedule needs a single one")
    return float(times[0])


class SkipTuning:
    """Scaled skips inside a block; afterwards, also after an error, the model is as it was.

        with SkipTuning(unet, lambda t: skip_coefficients(7, rho_bottom=0.7 if 300 < t < 700 else 1.0)):
            images = pipe("a red circle", num_inference_steps=8).images

    Args:
        model: see `scale_skips`.
        coefficients: rho (k,) or a function of the time; `skip_coefficients(k)` if None.
        window: smallest and largest time, as the model is told it, at which it acts; all if None.
    """

    def __init__(
        self,
        model: nn.Module,
        coefficients: Sequence[float] | Tensor | Schedule | None = None,
        *,
        window: tuple[float, float] | None = None,
    ) -> None:
        count = count_skips(model)
        if coefficients is None:
            coefficients = skip_coefficients(count)
        if not callable(coefficients):
            coefficients = _checked(coefficients, count)
        if window is not None and not window[0] <= window[1]:
            raise InputError(f"window is {window}, but must be (smallest, largest) time")
        self.model, self.coefficients, self.window = model, coefficients, window
        self.handles: list[RemovableHandle] = []

    def __enter__(self) -> "SkipTuning":
        self.handles.append(scale_skips(self.model, self.coefficients, window=self.window))
        return self

    def __exit__(self, *error: object) -> None:
        self.handles.pop().remove()


def steer(denoiser: Denoiser, prompt: str, *, rho_bottom: float = 0.8, rho_top: float = 1.0) -> Steering:
    """Sample with scaled skips.

    Args:
        denoiser: of a model with long skips.
        prompt: not used.
        rho_bottom: factor of the deepest skip.
        rho_top: where the line leads, one step past the top skip.
    """
    rhos = skip_coefficients(count_skips(denoiser.model), rho_bottom=rho_bottom, rho_top=rho_top)
    return Steering(context=lambda: SkipTuning(denoiser.model, rhos))


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        rho_bottom: of the best pair.
        rho_top: likewise.
        value: of the metric there.
        coefficients: (k,) of that pair.
        table: (rho_bottom, rho_top, value) of all that were tried, in order.
    """

    rho_bottom: float
    rho_top: float
    value: float
    coefficients: Tensor
    table: tuple[tuple[float, float, float], ...]


def search_skip_coefficients(
    model: nn.Module,
    sample_fn: Callable[..., Any],
    metric_fn: Callable[[Any], Any],
    *,
    rho_bottom: Sequence[float] = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    rho_top: Sequence[float] = (1.0,),
) -> SearchResult:
    """The pair of coefficients with the least metric; of equal ones, that which is nearest to an untouched model.

    Args:
        model: its skips are scaled while samples are drawn, and it is as it was afterwards.
        sample_fn: model -> samples, or a function of nothing; with the guidance and number of steps that will be used,
            and the same noise each time, or the search is one of luck.
        metric_fn: samples -> a number, less is better.
        rho_bottom: values to try; include some above 1, so that the search has two sides.
        rho_top: likewise; every pair is tried.
    """
    count = count_skips(model)
    pairs = [(float(bottom), float(top)) for top in rho_top for bottom in rho_bottom]
    if not pairs:
        raise InputError("rho_bottom or rho_top is empty, but must have at least one value to try")
    takes_model = any(p.default is p.empty and p.kind < p.VAR_POSITIONAL for p in _parameters(sample_fn))
    table = []
    for bottom, top in pairs:
        with SkipTuning(model, skip_coefficients(count, rho_bottom=bottom, rho_top=top)):
            samples = sample_fn(model) if takes_model else sample_fn()
        value = float(metric_fn(samples))
        if math.isnan(value):
            raise InputError(f"metric_fn gave nan at rho_bottom {bottom} and rho_top {top}, but must give a number")
        table.append((bottom, top, value))
    bottom, top, value = min(table, key=lambda row: (row[2], abs(row[0] - 1) + abs(row[1] - 1)))
    best = skip_coefficients(count, rho_bottom=bottom, rho_top=top)
    return SearchResult(bottom, top, value, best, tuple(table))
