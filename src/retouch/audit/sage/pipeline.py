"""A pipeline of diffusers as the searches need it."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from retouch.core import seeds
from retouch.core.diffusion.denoiser import Condition, Denoiser
from retouch.core.diffusion.guidance import as_sum, cfg
from retouch.core.diffusion.pipelines import network_of
from retouch.core.diffusion.process import Level
from retouch.core.diffusion.sampling import sample
from retouch.core.errors import InputError, in_range, positive
from retouch.core.models import device_of, mode


class PipelineGenerator:
    """A pipeline of diffusers as the searches need it: deterministic, and differentiable where they ask for it.

    Args:
        pipeline: Stable Diffusion, DiT and others that `Denoiser.from_pipeline` knows; it is not changed.
        latents: how many are drawn, or the latents themselves (b, channels, height, width).
        times: steps of DDIM.
        guidance_scale: of classifier-free guidance; 1 for none.
        negative: prompt of the unconditional branch.
        through: last steps of the sampler that gradients go through; all if None.
        seed: of the latents.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        latents: int | Tensor = 16,
        times: int = 20,
        guidance_scale: float = 7.5,
        negative: str | None = None,
        through: int | None = None,
        seed: int = 0,
    ) -> None:
        positive("times", times)
        if through is not None:
            in_range("through", through, 0, times)
        self.pipeline, self.denoiser = pipeline, Denoiser.from_pipeline(pipeline)
        self.times, self.negative, self.through = times, negative, through
        self.guidance = cfg(guidance_scale) if guidance_scale != 1 else None
        if isinstance(latents, int):
            config: Any = network_of(pipeline).config
            if getattr(config, "sample_size", None) is None:
                raise InputError(
                    f"latents is {latents}, but must be the latents: {type(pipeline).__name__} has no size"
                )
            shape = (latents, config.in_channels, config.sample_size, config.sample_size)
            latents = torch.randn(shape, generator=seeds.generator(seed, "sage", "start"))
        self.z = latents.to(device_of(network_of(pipeline)))

    def sampler(self, prompt: Any, *, through: int | None = 0) -> Callable[[Tensor], Tensor]:
        """Latents -> clean samples for a prompt or class, with gradients through so many last steps."""
        return lambda z: self._sample(z, self.denoiser.encode(prompt, len(z)), through)

    def decode(self, x: Tensor) -> Tensor:
        """Images in 0 to 1 of clean samples; gradients pass where values are cut off."""
        vae = getattr(self.pipeline, "vae", None)
        if vae is None:
            images = x / 2 + 0.5
        else:
            shift = getattr(vae.config, "shift_factor", None) or 0.0
            images = vae.decode((x / vae.config.scaling_factor + shift).to(vae.dtype)).sample.float() / 2 + 0.5
        return images + (images.clamp(0, 1) - images).detach()

    def __call__(self, prompts: str | Sequence[str], embedding: Tensor | None = None) -> Tensor:
        """Images of every prompt with every latent, with one more token of this embedding (width,) at its end."""
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        return self._images(texts, self.z, embedding)

    def generate(self, prompt: str, latents: int, embedding: Tensor | None = None) -> Tensor:
        """Images of one prompt with the first so many latents."""
        in_range("latents", latents, 1, len(self.z))
        return self._images([prompt], self.z[:latents], embedding)

    @property
    def width(self) -> int:
        """Of the text encoder's input embeddings."""
        return self._table().weight.shape[1]

    @torch.no_grad()
    def words(self, words: list[str]) -> Tensor:
        """Input embeddings (n, width) of words; the mean of its tokens' where a word has several."""
        table, tokenizer = self._table(), self.pipeline.tokenizer
        ids = [tokenizer(word, add_special_tokens=False).input_ids or [tokenizer.unk_token_id] for word in words]
        return torch.stack([table.weight[each].mean(0) for each in ids])

    def _images(self, texts: list[str], z: Tensor, embedding: Tensor | None) -> Tensor:
        each = [text for text in texts for _ in range(len(z))]
        noise = z.repeat(len(texts), *[1] * (z.ndim - 1))
        if embedding is None:
            return self.decode(self._sample(noise, self.denoiser.encode(each, len(each)), 0))
        return self.decode(self._sample(noise, self._condition(each, embedding), self.through))

    def _table(self) -> nn.Embedding:
        encoder = getattr(self.pipeline, "text_encoder", None)
        if encoder is None or getattr(self.pipeline, "text_encoder_2", None) is not None:
            raise InputError(f"pipeline is a {type(self.pipeline).__name__}, but must have one text encoder for tokens")
        return encoder.get_input_embeddings()

    def _condition(self, texts: list[str], embedding: Tensor) -> Condition:
        """The condition of texts that end with a token of this embedding, with gradients."""
        table, pipeline = self._table(), self.pipeline
        if embedding.shape != (self.width,):
            raise InputError(f"embedding has shape {tuple(embedding.shape)}, but must have ({self.width},)")
        end = pipeline.tokenizer.eos_token_id

        def put(_module: nn.Module, args: Any, output: Tensor) -> Tensor:
            last = (args[0] == end).int().argmax(1) - 1  # the token before the first that ends the text
            here = torch.arange(output.shape[1], device=output.device) == last[:, None]
            return torch.where(here[..., None], embedding.to(output), output)

        longer = [f"{text} a" for text in texts]  # "a" is only there to be replaced
        condition = self.denoiser.encode(longer, len(longer))  # all there is to it, without gradients
        with ExitStack() as stack:
            for module in pipeline.text_encoder.modules():  # T5 has its table in two modules
                if isinstance(module, nn.Embedding) and module.weight is table.weight:
                    stack.callback(module.register_forward_hook(put).remove)
            stack.enter_context(mode(pipeline.text_encoder, training=False))
            settings = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
            tokens = pipeline.encode_prompt(longer, device=device_of(network_of(pipeline)), **settings)[0]
        return {**condition, "encoder_hidden_states": tokens}

    def _sample(self, z: Tensor, condition: Condition, through: int | None) -> Tensor:
        settings: dict[str, Any] = {"guidance": self.guidance, "negative": self.negative}
        if through == 0 or not torch.is_grad_enabled():
            return sample(self.denoiser, z, condition, times=self.times, **settings)
        grid, rules = self.denoiser.process.grid(self.times), as_sum(self.guidance)
        conditions = {"cond": condition}
        if "uncond" in rules.branches.values():
            conditions["uncond"] = self.denoiser.encode(self.negative, len(z))
        branches = {name: conditions[which] for name, which in rules.branches.items()}

        def advance(x: Tensor, here: Level, there: Level) -> Tensor:
            with mode(self.denoiser.model, training=False):  # inside: a checkpoint runs it again later
                found = rules.combine(self.denoiser.predict(x, here, branches), x, here)
            return there.alpha * found.x0 + there.sigma * found.noise

        x, free = z * grid.start, 0 if through is None else grid.steps - through
        for here, there in pairwise(grid.levels):
            if here.index < free:
                with torch.no_grad():
                    x = advance(x, here, there)
            else:
                x = checkpoint(advance, x, here, there, use_reentrant=False, preserve_rng_state=False)
        return x
