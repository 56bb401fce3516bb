"""Our sampler against diffusers' own loop: a small Stable Diffusion with classifier-free guidance, 20 DDIM steps."""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from ratios import compare

from retouch.core import seeds
from retouch.core.diffusion.denoiser import Denoiser
from retouch.core.diffusion.guidance import cfg
from retouch.core.diffusion.sampling import sample

STEPS, SCALE = 20, 5.0


def pipeline():
    """A random one, whose texts come as embeddings, so that nothing has to be downloaded."""
    with seeds.isolated(0):
        unet = UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(32, 64),
            norm_num_groups=8,
            cross_attention_dim=64,
            attention_head_dim=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
        )
        vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    parts = dict.fromkeys(["text_encoder", "tokenizer", "safety_checker", "feature_extractor"])
    made = StableDiffusionPipeline(
        unet=unet.eval(), vae=vae, scheduler=scheduler, requires_safety_checker=False, **parts
    )
    made.set_progress_bar_config(disable=True)
    return made


if __name__ == "__main__":
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)
    pipe, noise = pipeline(), torch.randn(4, 4, 16, 16, generator=draw)
    text, empty = torch.randn(4, 8, 64, generator=draw), torch.zeros(4, 8, 64)
    denoiser = Denoiser.from_pipeline(pipe)

    def ours():
        given = {"condition": {"encoder_hidden_states": text}, "negative": {"encoder_hidden_states": empty}}
        return sample(denoiser, noise, **given, times=STEPS, guidance=cfg(SCALE))

    def theirs():
        embeddings = {"prompt_embeds": text, "negative_prompt_embeds": empty}
        settings = {"num_inference_steps": STEPS, "guidance_scale": SCALE, "latents": noise, "output_type": "latent"}
        return pipe(**embeddings, **settings).images

    torch.testing.assert_close(ours(), theirs(), rtol=1e-3, atol=1e-3 * float(theirs().abs().max()))
    compare(
        f"{STEPS} DDIM steps with guidance, batch 4",
        ours,
        theirs,
        against="StableDiffusionPipeline",
        rounds=9,
        wanted="at least 0.95",
    )
