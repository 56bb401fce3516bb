"""A diffusion model with its noise levels: asked for several branches at once, it answers with x0 and noise.

    denoiser = Denoiser.from_pipeline(pipe)                                   # Stable Diffusion, SDXL, DiT, PixArt, SD3
    denoiser = Denoiser(unet, VP.linear(), predicts="noise")                  # or any module
    predictions = denoiser.predict(x, level, {"uncond": empty, "cond": text})  # one batch

x0 and noise are kept apart in a `Prediction`, because some rules of sampling take them from different branches.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from retouch.core import attention
from retouch.core.diffusion.process import EDM, Level, Process
from retouch.core.errors import InputError, one_of
from retouch.core.models import device_of, tree_map

Condition = Mapping[str, Any]  # keywords of the model: tensors (1 or b, ...), or mappings of them
PREDICTS = ("noise", "x0", "velocity", "flow", "edm")
DIFFUSERS_NAMES = {"epsilon": "noise", "sample": "x0", "v_prediction": "velocity"}


@dataclass(frozen=True)
class Prediction:
    """What a model, or a rule on top of it, takes x for: x = alpha x0 + sigma noise.

    Attributes:
        x0: clean sample (b, ...).
        noise: (b, ...).
    """

    x0: Tensor
    noise: Tensor


def to_prediction(predicts: str, output: Tensor, x: Tensor, alpha: Any, sigma: Any) -> Prediction:
    """Read a model's output, whatever it predicts.

    Args:
        predicts: "noise", "x0", "velocity" (alpha noise - sigma x0), or "flow" (noise - x0).
        output: of the model (b, ...).
        x: what the model was given (b, ...), before any scaling.
        alpha: of x0 in x: a number, or a tensor that broadcasts.
        sigma: of the noise in x, likewise, above 0.
    """
    one_of("predicts", predicts, PREDICTS[:4])
    if predicts == "noise":
        return Prediction((x - sigma * output) / alpha, output)
    if predicts == "x0":
        return Prediction(output, (x - alpha * output) / sigma)
    if predicts == "velocity":
        length = alpha**2 + sigma**2
        return Prediction((alpha * x - sigma * output) / length, (sigma * x + alpha * output) / length)
    return Prediction((x - sigma * output) / (alpha + sigma), (x + alpha * output) / (alpha + sigma))


def from_prediction(predicts: str, prediction: Prediction, alpha: Any, sigma: Any) -> Tensor:
    """What a model that predicts something else would have put out."""
    one_of("predicts", predicts, PREDICTS[:4])
    if predicts == "noise":
        return prediction.noise
    if predicts == "x0":
        return prediction.x0
    if predicts == "velocity":
        return alpha * prediction.noise - sigma * prediction.x0
    return prediction.noise - prediction.x0


Call = Callable[[nn.Module, Tensor, Tensor, Condition], Any]


def call_unet(model: nn.Module, x: Tensor, time: Tensor, condition: Condition) -> Any:
    """UNets, and plain modules: model(x, time, **condition)."""
    return model(x, time, **condition)


def call_transformer(model: nn.Module, x: Tensor, time: Tensor, condition: Condition) -> Any:
    """Transformers of diffusers: model(hidden_states=x, timestep=time, **condition)."""
    return model(hidden_states=x, timestep=time, **condition)


class Denoiser:
    """A model, the process it was trained with, and what it predicts.

    Args:
        model: any module; those of diffusers are called as diffusers calls them.
        process: its noise levels.
        predicts: "noise", "x0", "velocity" (alpha noise - sigma x0), "flow" (noise - x0), or "edm" for a network inside
            of EDM's preconditioning.
        sigma_data: standard deviation of the data, for "edm".
        call: (model, x, time (b,), condition) -> its output, where the usual ways do not fit.
        encode: texts or labels -> condition.
        decode: x -> images (b, channels, height, width) in 0 to 1.
        null: the condition of the unconditional branch, where it is no encoded "".
        tokenizer: of the texts, for techniques that look for words in a prompt.
    """

    def __init__(
        self,
        model: nn.Module,
        process: Process,
        *,
        predicts: str = "noise",
        sigma_data: float = 0.5,
        call: Call | None = None,
        encode: Callable[[Sequence[Any]], Condition] | None = None,
        decode: Callable[[Tensor], Tensor] | None = None,
        null: Condition | None = None,
        tokenizer: Any = None,
    ) -> None:
        predicts = DIFFUSERS_NAMES.get(predicts, predicts)
        one_of("predicts", predicts, PREDICTS)
        if predicts == "edm" and not isinstance(process, EDM):
            raise InputError("predicts is 'edm', but must go with the process EDM")
        self.model, self.process, self.predicts, self.sigma_data = model, process, predicts, sigma_data
        transformer = "Transformer2DModel" in type(model).__name__
        self.call = call or (call_transformer if transformer else call_unet)
        self._encode, self._decode, self._null = encode, decode, null
        self.tokenizer = tokenizer
        self._joined: tuple[Any, Any] = (None, None)

    @classmethod
    def from_pipeline(cls, pipeline: Any, **settings: Any) -> "Denoiser":
        """The denoiser of a pipeline of diffusers: Stable Diffusion, SDXL, DiT, PixArt, SD3 and what is made like them.

        Args:
            pipeline: it is not changed.
            settings: for `process.from_scheduler`.
        """
        from retouch.core.diffusion.pipelines import parts_of

        return cls(**parts_of(pipeline, settings))

    # --- conditions ---------------------------------------------------------------------------------------------------

    def encode(self, condition: Any, count: int) -> Condition:
        """A condition as keywords of the model.

        Args:
            condition: a text, a label, a sequence of `count` of them, keywords as they are, or None for no condition.
            count: samples.
        """
        if condition is None:
            if self._null is not None:
                return self._null
            return {} if self._encode is None else self._encode([""] * count)
        if isinstance(condition, Mapping):
            return condition
        if isinstance(condition, Tensor):
            condition = condition.tolist()
        several = condition if isinstance(condition, list | tuple) else [condition] * count
        if len(several) != count:
            raise InputError(
                f"condition has {len(several)} parts, but must have {count}, one a sample, or be a single one"
            )
        if self._encode is None:
            known = type(self.model).__name__
            raise InputError(f"condition is {several[0]!r}, but this denoiser has no encoder: give keywords of {known}")
        return self._encode(several)

    def decode(self, x: Tensor) -> Tensor:
        """Images (b, channels, height, width) in 0 to 1 of latents, or of pixels in -1 to 1."""
        return (x / 2 + 0.5).clamp(0, 1) if self._decode is None else self._decode(x)

    # --- asking -------------------------------------------------------------------------------------------------------

    def predict(self, x: Tensor, level: Level, branches: Mapping[str, Condition]) -> dict[str, Prediction]:
        """The prediction of every branch, from one call of the model.

        Args:
            x: noisy samples (b, ...), the same for all branches.
            level: where they are.
            branches: name -> condition.

        Returns:
            Name -> prediction, in float32 at least.
        """
        names, count = tuple(branches), len(branches)
        condition = self._join(branches, len(x))
        many = torch.cat([x] * count) if count > 1 else x
        with attention.branches(names, level):
            found = self._ask(many, level, condition)
        chunks = zip(found.x0.chunk(count), found.noise.chunk(count), strict=True)
        return {name: Prediction(x0, noise) for name, (x0, noise) in zip(names, chunks, strict=True)}

    def __call__(self, x: Tensor, level: Level, condition: Condition | None = None) -> Prediction:
        """The prediction of one branch."""
        return self.predict(x, level, {"cond": condition or {}})["cond"]

    def _ask(self, x: Tensor, level: Level, condition: Condition) -> Prediction:
        scale, time = 1.0, level.time
        if self.predicts == "edm":
            scale, time = (level.sigma**2 + self.sigma_data**2) ** -0.5, 0.25 * math.log(level.sigma)
        dtype = next((p.dtype for p in self.model.parameters()), x.dtype)
        times = torch.full((len(x),), time, device=x.device, dtype=torch.float32 if time % 1 else torch.long)
        output = self.call(self.model, (x * scale if scale != 1 else x).to(dtype), times, condition)
        if not isinstance(output, Tensor):
            output = output[0] if isinstance(output, tuple) else output.sample
        if output.shape[1] == 2 * x.shape[1]:
            output = output[:, : x.shape[1]]  # the other half is a learned variance
        output = output.to(x.dtype)
        if self.predicts == "edm":
            data, sigma = self.sigma_data, level.sigma
            x0 = data**2 / (sigma**2 + data**2) * x + sigma * data * (sigma**2 + data**2) ** -0.5 * output
            return to_prediction("x0", x0, x, level.alpha, level.sigma)
        return to_prediction(self.predicts, output, x, level.alpha, level.sigma)

    def _join(self, branches: Mapping[str, Condition], count: int) -> Condition:
        """The conditions of all branches as those of one batch; kept, since they are the same at every step."""
        key = (count, *((name, id(condition)) for name, condition in branches.items()))
        if self._joined[0] != key:
            parts = [tree_map(lambda t: _rows(t, count), condition) for condition in branches.values()]
            joined = parts[0] if len(parts) == 1 else _cat(parts)
            device = device_of(self.model)
            # The conditions themselves are kept as well: their ids must not be given to others meanwhile.
            self._joined = (key, (tree_map(lambda t: t.to(device), joined), tuple(branches.values())))
        return self._joined[1][0]


def _rows(tensor: Tensor, count: int) -> Tensor:
    if tensor.ndim and len(tensor) == 1 and count > 1:
        return tensor.expand(count, *tensor.shape[1:])
    if tensor.ndim and len(tensor) != count:
        raise InputError(f"A condition has {len(tensor)} rows, but must have {count}, one a sample, or a single one")
    return tensor


def _cat(parts: Sequence[Any]) -> Any:
    """Nested conditions, one after the other along the batch."""
    first = parts[0]
    if isinstance(first, Mapping):
        if any(set(part) != set(first) for part in parts):
            names = sorted(set().union(*parts) - set(first) or set(first))
            raise InputError(
                f"The conditions of two branches differ in {', '.join(names)}, but must have the same names"
            )
        return {name: _cat([part[name] for part in parts]) for name in first}
    return torch.cat(list(parts)) if isinstance(first, Tensor) and first.ndim else first
