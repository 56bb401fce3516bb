"""What a pipeline of diffusers is made of: its network, how that is called, and how texts and images go in and out."""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from retouch.core.diffusion.process import Flow, flow_grid, from_scheduler
from retouch.core.errors import InputError

Parts = dict[str, Any]  # keywords of `Denoiser`


def parts_of(pipeline: Any, settings: Mapping[str, Any]) -> Parts:
    """Keywords of `Denoiser` for a pipeline.

    Args:
        pipeline: of a family of `FAMILIES`.
        settings: for `from_scheduler`.

    Raises:
        InputError: if its family is not known.
    """
    name = type(pipeline).__name__
    family = next((make for words, make in FAMILIES if words in name), None)
    if family is None:
        known = ", ".join(f"{words}Pipeline" for words, _ in FAMILIES)
        raise InputError(f"pipeline is a {name}, but must be one of {known}, or made like them")
    common = {"decode": _decoder(pipeline), "tokenizer": getattr(pipeline, "tokenizer", None)}
    return {**common, **family(pipeline, settings)}


def network_of(pipeline: Any) -> nn.Module:
    """Its UNet or transformer."""
    found = getattr(pipeline, "unet", None)
    return pipeline.transformer if found is None else found


def _decoder(pipeline: Any) -> Callable[[Tensor], Tensor]:
    @torch.no_grad()
    def decode(latents: Tensor) -> Tensor:
        vae = pipeline.vae
        latents = latents / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0.0)
        return (vae.decode(latents.to(vae.dtype)).sample / 2 + 0.5).clamp(0, 1).float()

    return decode


def _prompts(pipeline: Any, texts: Sequence[Any], **settings: Any) -> Any:
    """What `encode_prompt` gives for texts alone, without a negative prompt."""
    pipeline_device = network_of(pipeline).device
    known = inspect.signature(pipeline.encode_prompt).parameters
    wanted = {"device": pipeline_device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False, **settings}
    _check_length(pipeline, texts)
    with torch.no_grad():
        return pipeline.encode_prompt(list(texts), **{name: value for name, value in wanted.items() if name in known})


def _check_length(pipeline: Any, texts: Sequence[Any]) -> None:
    """CLIP cuts long prompts off without a word; that is refused."""
    tokenizer = getattr(pipeline, "tokenizer", None)
    if tokenizer is None or "T5" in type(tokenizer).__name__:
        return
    for text in texts:
        length = len(tokenizer(text, verbose=False).input_ids)
        if length > tokenizer.model_max_length:
            raise InputError(
                f"prompt is {text!r} of {length} tokens, but must have at most {tokenizer.model_max_length} with the "
                "two that mark its ends"
            )


def _stable_diffusion(pipeline: Any, settings: Mapping[str, Any]) -> Parts:
    def encode(texts: Sequence[Any]) -> dict[str, Any]:
        return {"encoder_hidden_states": _prompts(pipeline, texts)[0]}

    return _vp_parts(pipeline, pipeline.unet, settings) | {"encode": encode}


def _stable_diffusion_xl(pipeline: Any, settings: Mapping[str, Any]) -> Parts:
    size = pipeline.default_sample_size * pipeline.vae_scale_factor
    bare = _stable_diffusion(pipeline, settings)

    def encode(texts: Sequence[Any]) -> dict[str, Any]:
        empty = all(text == "" for text in texts) and pipeline.config.force_zeros_for_empty_prompt
        tokens, _, pooled, _ = _prompts(pipeline, texts)
        if empty:  # what the pipeline takes for no prompt
            tokens, pooled = torch.zeros_like(tokens), torch.zeros_like(pooled)
        ids = torch.tensor([[size, size, 0, 0, size, size]], dtype=tokens.dtype).expand(len(texts), -1)
        return {"encoder_hidden_states": tokens, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}}

    return bare | {"encode": encode}


def _dit(pipeline: Any, settings: Mapping[str, Any]) -> Parts:
    null = pipeline.transformer.config.num_embeds_ada_norm
    names = getattr(pipeline, "labels", None) or {}

    def encode(labels: Sequence[Any]) -> dict[str, Any]:
        numbers = []
        for label in labels:
            if isinstance(label, str) and label and label not in names:
                raise InputError(f"condition is {label!r}, but must be a class number or a name in pipeline.labels")
            number = null if label == "" else names[label] if isinstance(label, str) else int(label)
            if not 0 <= number <= null:
                raise InputError(f"condition is {number}, but must be a class from 0 to {null - 1}")
            numbers.append(number)
        return {"class_labels": torch.tensor(numbers)}

    return _vp_parts(pipeline, pipeline.transformer, settings) | {"encode": encode}


def _pixart(pipeline: Any, settings: Mapping[str, Any]) -> Parts:
    def encode(texts: Sequence[Any]) -> dict[str, Any]:
        tokens, mask = _prompts(pipeline, texts)[:2]
        # Resolution and aspect ratio are for the large models alone.
        rest = {"resolution": None, "aspect_ratio": None}
        return {"encoder_hidden_states": tokens, "encoder_attention_mask": mask, "added_cond_kwargs": rest}

    return _vp_parts(pipeline, pipeline.transformer, settings) | {"encode": encode}


def _vp_parts(pipeline: Any, model: nn.Module, settings: Mapping[str, Any]) -> Parts:
    process = from_scheduler(pipeline.scheduler, **settings)
    predicts = getattr(pipeline.scheduler.config, "prediction_type", "epsilon")
    return {"model": model, "process": process, "predicts": "flow" if isinstance(process, Flow) else predicts}


def _stable_diffusion_3(pipeline: Any, settings: Mapping[str, Any]) -> Parts:
    def encode(texts: Sequence[Any]) -> dict[str, Any]:
        tokens, _, pooled, _ = _prompts(pipeline, texts, prompt_2=None, prompt_3=None)
        return {"encoder_hidden_states": tokens, "pooled_projections": pooled}

    return _flow_parts(pipeline, settings) | {"encode": encode}


def _flux(pipeline: Any, settings: Mapping[str, Any]) -> Parts:
    """Latents (b, c, h, w) are packed into tokens of two by two for the transformer, and back."""
    guided = pipeline.transformer.config.guidance_embeds

    def encode(texts: Sequence[Any]) -> dict[str, Any]:
        tokens, pooled, _ = _prompts(pipeline, texts, prompt_2=None)
        strength = {"guidance": torch.full((len(texts),), 3.5)} if guided else {}
        return {"encoder_hidden_states": tokens, "pooled_projections": pooled, **strength}

    def call(model: nn.Module, x: Tensor, time: Tensor, condition: Mapping[str, Any]) -> Tensor:
        count, channels, height, width = x.shape
        tokens = condition["encoder_hidden_states"]
        output = model(
            hidden_states=pipeline._pack_latents(x, count, channels, height, width),
            timestep=time / 1000,
            txt_ids=torch.zeros(tokens.shape[1], 3, device=x.device, dtype=tokens.dtype),
            img_ids=pipeline._prepare_latent_image_ids(count, height // 2, width // 2, x.device, tokens.dtype),
            **condition,
        ).sample
        folded = output.view(count, height // 2, width // 2, channels, 2, 2)
        return folded.permute(0, 3, 1, 4, 2, 5).reshape(count, channels, height, width)

    # Flux starts at pure noise and divides evenly, where the scheduler's own steps end at a thousandth of it.
    even = lambda steps: {"sigmas": [1 - k / steps for k in range(steps)]}  # noqa: E731
    return _flow_parts(pipeline, settings, even) | {"encode": encode, "call": call}


def _flow_parts(
    pipeline: Any, settings: Mapping[str, Any], each: Callable[[int], dict[str, Any]] = lambda steps: {}
) -> Parts:
    config = pipeline.scheduler.config
    if config.get("use_dynamic_shifting") and "mu" not in settings:
        tokens = (pipeline.default_sample_size // 2) ** 2
        low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        slope = (config.get("max_shift", 1.15) - config.get("base_shift", 0.5)) / (high - low)
        settings = {**settings, "mu": config.get("base_shift", 0.5) + slope * (tokens - low)}
    scheduler = copy.deepcopy(pipeline.scheduler)
    process = Flow(grid=lambda steps: flow_grid(scheduler, steps, {**settings, **each(steps)}))
    return {"model": pipeline.transformer, "process": process, "predicts": "flow"}


# The first whose words are in the name of the pipeline's class.
FAMILIES: tuple[tuple[str, Callable[[Any, Mapping[str, Any]], Parts]], ...] = (
    ("StableDiffusionXL", _stable_diffusion_xl),
    ("StableDiffusion3", _stable_diffusion_3),
    ("StableDiffusion", _stable_diffusion),
    ("DiT", _dit),
    ("PixArt", _pixart),
    ("Flux", _flux),
)
