"""Pipelines of diffusers in every family, of a few thousand random weights, made without a download."""

import torch

from retouch.core import seeds

WORDS = ["a", "red", "blue", "circle", "square", "large", "small", "on", "left", "of", "gray"]


def tokenizer(length=12):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=length,
    )


def made(build, seed=0):
    with seeds.isolated(seed):
        return build().eval()


def text_encoder(projection=None, seed=0, width=8):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=16,
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        projection_dim=projection or 8,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    kind = CLIPTextModel if projection is None else CLIPTextModelWithProjection
    return made(lambda: kind(config), seed)


def vae(channels=4):
    from diffusers import AutoencoderKL

    return made(
        lambda: AutoencoderKL(
            block_out_channels=(8,),
            down_block_types=("DownEncoderBlock2D",),
            up_block_types=("UpDecoderBlock2D",),
            latent_channels=channels,
            norm_num_groups=4,
            layers_per_block=1,
            sample_size=8,
        ),
        3,
    )


def unet(**settings):
    from diffusers import UNet2DConditionModel

    sizes = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "cross_attention_dim": 8,
        "attention_head_dim": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
    }
    return made(lambda: UNet2DConditionModel(**{**sizes, **settings}), 1)


def pixel_unet():
    from diffusers import UNet2DModel

    return made(
        lambda: UNet2DModel(
            sample_size=8,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            attention_head_dim=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
        ),
        1,
    )


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stable_diffusion(scheduler=None, **settings):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    default = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return quiet(
        StableDiffusionPipeline(
            vae=vae(),
            text_encoder=text_encoder(),
            tokenizer=tokenizer(),
            unet=unet(**settings),
            scheduler=scheduler or default,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def stable_diffusion_xl():
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    return quiet(
        StableDiffusionXLPipeline(
            vae=vae(),
            text_encoder=text_encoder(),
            text_encoder_2=text_encoder(projection=6, seed=5),
            tokenizer=tokenizer(),
            tokenizer_2=tokenizer(),
            unet=unet(
                cross_attention_dim=16,
                addition_embed_type="text_time",
                addition_time_embed_dim=4,
                projection_class_embeddings_input_dim=6 * 4 + 6,
            ),
            scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
            add_watermarker=False,
        )
    )


def dit():
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    transformer = made(
        lambda: DiTTransformer2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=4,
            num_embeds_ada_norm=1000,  # the pipeline takes 1000 for no class
            patch_size=2,
        )
    )
    scheduler = DDIMScheduler(clip_sample=False)
    return quiet(DiTPipeline(transformer, vae(), scheduler, id2label={0: "circle", 1: "square"}))


def stable_diffusion_3():
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = made(
        lambda: SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=4,
            num_attention_heads=2,
            joint_attention_dim=16,
            caption_projection_dim=8,
            pooled_projection_dim=12,
            pos_embed_max_size=8,
        )
    )
    return quiet(
        StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae(),
            text_encoder=text_encoder(projection=6),
            tokenizer=tokenizer(),
            text_encoder_2=text_encoder(projection=6, seed=5),
            tokenizer_2=tokenizer(),
            text_encoder_3=None,
            tokenizer_3=None,
        )
    )


def flux():
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    transformer = made(
        lambda: FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=8,
            pooled_projection_dim=8,
            axes_dims_rope=(2, 2, 4),
        )
    )
    t5 = T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    return quiet(
        FluxPipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
            vae=vae(),
            text_encoder=text_encoder(),
            tokenizer=tokenizer(),
            text_encoder_2=made(lambda: T5EncoderModel(t5)),
            tokenizer_2=tokenizer(),
        )
    )


def pixart():
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    transformer = made(
        lambda: PixArtTransformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=4,
            cross_attention_dim=8,
            caption_channels=8,
            use_additional_conditions=False,
        )
    )
    t5 = T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    return quiet(
        PixArtAlphaPipeline(
            tokenizer=tokenizer(),
            text_encoder=made(lambda: T5EncoderModel(t5)),
            vae=vae(),
            transformer=transformer,
            scheduler=DPMSolverMultistepScheduler(),
        )
    )


def latents(count=2, channels=4, size=8, seed=0):
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))
