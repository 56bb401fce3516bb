"""The reference models, untrained, and their tokenizer."""

import functools
from collections import Counter
from itertools import pairwise
from typing import Any

from retouch.worlds import shapes
from retouch.worlds.shapes.captions import VOCABULARY

SIZE, LATENT, CHANNELS = 64, 16, 4  # pixels; and the sides and channels of latents
PIXELS = 32  # side of the images of the model without latents
TOKENS = 40  # of a caption at most: three things with all that can be said of them
WIDTH = 128  # of the text encoder
CLASSES = shapes.classes("colour", "shape")  # of the class-conditional models
NO_CLASS = len(CLASSES)
SIGMA_DATA = 0.75  # standard deviation that EDM's preconditioning takes images in -1 to 1 to have


@functools.cache
def _merges() -> tuple[dict[str, int], list[Any]]:
    """Vocabulary and merges of a byte pair encoding in which every word of the world is one token.

    Nearly all pairs are equally frequent here, and which of them the trainer of `tokenizers` takes first differs from
    process to process; weights need the same numbers always, so ties go to the alphabet.
    """
    last = "</w>"
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [[*word[:-1], word[-1] + last] for word in sorted(VOCABULARY)]
    merges: list[Any] = []  # pairs, as CLIPTokenizer takes them, though it does not say so
    while counts := Counter(pair for word in words for pair in pairwise(word)):
        merges.append(min(counts, key=lambda pair: (-counts[pair], pair)))
        words = [_merged(word, merges[-1]) for word in words]
    pieces = [*letters, *(letter + last for letter in letters), *map("".join, merges)]
    vocabulary = dict.fromkeys(["<|startoftext|>", "<|endoftext|>", *pieces])
    return {piece: number for number, piece in enumerate(vocabulary)}, merges


def _merged(word: list[str], pair: tuple[str, str]) -> list[str]:
    """A word's pieces, with this pair of neighbours made one wherever it occurs."""
    pieces: list[str] = []
    for piece in word:
        if pieces and (pieces[-1], piece) == pair:
            pieces[-1] += piece
        else:
            pieces.append(piece)
    return pieces


def tokenizer() -> Any:
    """A `CLIPTokenizer` of this world's words, one token each; it spells all others."""
    from transformers import CLIPTokenizer

    vocabulary, merges = _merges()
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)


def _text_settings(width: int, layers: int) -> dict[str, Any]:
    start, end = (_merges()[0][word] for word in ("<|startoftext|>", "<|endoftext|>"))
    return {
        "vocab_size": len(_merges()[0]),
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 32,
        "max_position_embeddings": TOKENS,
        "bos_token_id": start,
        "eos_token_id": end,
        "pad_token_id": end,
    }


def new_text_encoder(*, width: int = WIDTH, layers: int = 2) -> Any:
    """An untrained `CLIPTextModel`."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(**_text_settings(width, layers)))


def new_clip(*, width: int = 96, text_layers: int = 2, layers: int = 3, projection: int = 64) -> Any:
    """An untrained `CLIPModel` of images of 64 pixels in patches of 8."""
    from transformers import CLIPConfig, CLIPModel

    vision = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 32,
        "image_size": SIZE,
        "patch_size": 8,
    }
    text = _text_settings(width, text_layers)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection))


def new_autoencoder(*, widths: tuple[int, ...] = (32, 48, 64)) -> Any:
    """An untrained `AutoencoderKL`, 64 x 64 x 3 to 16 x 16 x 4."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        sample_size=SIZE,
        latent_channels=CHANNELS,
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,  # what is in an image's corner says nothing on its other side
    )


def new_unet(*, widths: tuple[int, ...] = (56, 104), layers: int = 1) -> Any:
    """An untrained `UNet2DConditionModel` of latents, with attention to the text at 8 x 8."""
    from diffusers import UNet2DConditionModel

    deeper = len(widths) - 1
    return UNet2DConditionModel(
        sample_size=LATENT,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=widths,
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * deeper),
        up_block_types=(*["CrossAttnUpBlock2D"] * deeper, "UpBlock2D"),
        layers_per_block=layers,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # diffusers' name for the number of heads
        norm_num_groups=8,
    )


def new_pixel_unet(*, widths: tuple[int, ...] = (32, 48, 64)) -> Any:
    """An untrained class-conditional `UNet2DModel` of images of 32 pixels, with attention at 8 x 8."""
    from diffusers import UNet2DModel

    plain = len(widths) - 1
    return UNet2DModel(
        sample_size=PIXELS,
        in_channels=3,
        out_channels=3,
        block_out_channels=widths,
        down_block_types=(*["DownBlock2D"] * plain, "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", *["UpBlock2D"] * plain),
        layers_per_block=1,
        attention_head_dim=16,
        norm_num_groups=8,
        num_class_embeds=len(CLASSES) + 1,
    )


def new_dit(*, heads: int, layers: int) -> Any:
    """An untrained class-conditional `DiTTransformer2DModel` of latents, heads of 32, patches of 2."""
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        sample_size=LATENT,
        patch_size=2,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=heads,
        attention_head_dim=32,
        num_layers=layers,
        num_embeds_ada_norm=len(CLASSES),
    )
