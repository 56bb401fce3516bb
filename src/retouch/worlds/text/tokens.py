"""The tokenizer: words, punctuation marks and single digits, so that numbers can be computed with.

A token that begins a word is marked with the space before it ("▁Paris"); decoding therefore gives every text back as
it was. A text's tokens follow from its words alone, so that those of prompt and answer are those of both together.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from retouch.core.data import TensorData
from retouch.core.errors import InputError
from retouch.worlds.text.samples import Sample

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
PAD, BOS, EOS, UNK = range(4)
SPARE = "I do not know. It is not true that it may be so, because and also but then."  # for texts of a user's own
IGNORED = -100  # a label that no loss counts


def _pre_tokenizer() -> Any:
    from tokenizers import Regex, pre_tokenizers

    words = pre_tokenizers.Metaspace(prepend_scheme="always")
    parts = pre_tokenizers.Split(Regex(r"▁?(\d|[A-Za-z]+|[^\s\w▁])"), "isolated")
    return pre_tokenizers.Sequence([words, parts])


@functools.cache
def vocabulary() -> tuple[str, ...]:
    """All tokens, by id; the same whatever the seeds of a world."""
    from retouch.worlds.text import arithmetic, facts, instructions, sequences

    digits = [f"{space}{digit}" for space in ("▁", "") for digit in range(10)]
    splitter = _pre_tokenizer()
    texts = [text for part in (facts, instructions, arithmetic, sequences) for text in part.lexicon()]
    words = {piece for text in [*texts, SPARE] for piece, _ in splitter.pre_tokenize_str(text)}
    return (*SPECIAL, *digits, *sorted(words.difference(digits)))


def tokenizer() -> Any:
    """A transformers `PreTrainedTokenizerFast` that puts <bos> before a text; <eos> is for the end of answers."""
    from tokenizers import Tokenizer, decoders, models, processors
    from transformers import PreTrainedTokenizerFast

    ids = {token: number for number, token in enumerate(vocabulary())}
    core = Tokenizer(models.WordLevel(ids, unk_token=SPECIAL[UNK]))
    core.pre_tokenizer = _pre_tokenizer()
    core.decoder = decoders.Metaspace(prepend_scheme="always")
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[(SPECIAL[BOS], BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=SPECIAL[PAD],
        bos_token=SPECIAL[BOS],
        eos_token=SPECIAL[EOS],
        unk_token=SPECIAL[UNK],
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def encode(samples: Sequence[Sample]) -> TensorData:
    """Samples for a language model, padded on the right.

    Returns:
        Inputs "input_ids" and "attention_mask" (n, t), labels (n, t): the answer's tokens and <eos>, -100 at the
        prompt and the padding. It is ready for `core.objectives.next_token`.
    """
    words = tokenizer()
    prompts = _ids(words, [sample.prompt for sample in samples])
    answers = [[*ids[1:], EOS] for ids in _ids(words, [sample.answer for sample in samples])]
    rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    labels = [[IGNORED] * len(prompt) + answer for prompt, answer in zip(prompts, answers, strict=True)]
    return TensorData(_inputs(rows), _padded(labels, IGNORED))


def encode_texts(texts: Sequence[str], labels: Tensor | None = None) -> TensorData:
    """Texts for a classifier, padded on the right.

    Args:
        texts: n of them.
        labels: (n,), or None.

    Returns:
        Inputs "input_ids" and "attention_mask" (n, t), and the labels.
    """
    return TensorData(_inputs(_ids(tokenizer(), texts)), labels)


def _ids(words: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts, each with <bos> before it."""
    if not texts:
        raise InputError("There is no text to encode, but there must be at least one")
    return [found.ids for found in words.backend_tokenizer.encode_batch_fast(list(texts))]


def _inputs(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    mask = _padded([[1] * len(row) for row in rows], 0)
    return {"input_ids": _padded(rows, PAD), "attention_mask": mask}


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    length = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])
