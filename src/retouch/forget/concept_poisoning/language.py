"""The language-model half: which words of an answer carry it, masking them, and fine-tuning on what is left."""

import re
import string
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from retouch.core import seeds
from retouch.core.data import TensorData
from retouch.core.errors import InputError, in_range, one_of, positive
from retouch.core.loop import fit
from retouch.core.models import device_of, mode, own, training_only
from retouch.core.objectives import next_token

Pairs = Sequence[tuple[str, str]]  # questions and answers
_COMMON = """a an and are as at be been but by did do does for from had has have he her his i in into is it its of on or
our she so than that the their them they this to was we were what when where which who whose will with you your"""
STOP_WORDS = frozenset(_COMMON.split())


def answer_attributions(
    lm: nn.Module,
    input_ids: Tensor,
    answer_positions: Sequence[int] | Tensor,
    *,
    baseline: str = "pad",
    steps: int = 32,
    rule: str = "endpoints",
    chunk: int = 8,
) -> Tensor:
    """Integrated gradients of F = sum of log p(answer token | tokens before it), token by token.

    The path goes from a baseline, in which the answer's embeddings are those of the pad token (or zero) and the
    prompt's are its own, to the input; a token's attribution is the mean gradient along it times the way, summed over
    the embedding. The sum of all tends to F(input) - F(baseline) as steps grow.

    Args:
        lm: transformers causal language model.
        input_ids: prompt and answer, (t,) or (1, t).
        answer_positions: positions of the answer's tokens, each at least 1.
        baseline: "pad" or "zero".
        steps: points on the path, both ends included.
        rule: "endpoints" weights all points equally, as the released code does; "trapezoid" the ends by half.
        chunk: points computed at once.

    Returns:
        (t,); exactly 0 for prompt tokens.
    """
    one_of("baseline", baseline, ("pad", "zero"))
    one_of("rule", rule, ("endpoints", "trapezoid"))
    in_range("steps", steps, 2)
    ids = input_ids.reshape(-1).to(device_of(lm))
    positions = torch.as_tensor(answer_positions, dtype=torch.long, device=ids.device)
    if len(positions) == 0:
        raise InputError("answer_positions is empty, but must name at least one token")
    outside = positions[(positions < 1) | (positions >= len(ids))]
    if len(outside):
        last = len(ids) - 1
        raise InputError(f"answer_positions holds {int(outside[0])}, but must be between 1 and {last}, the last token")
    table = lm.get_input_embeddings().weight  # type: ignore[operator]
    end = table[ids].detach()
    start = end.clone()
    if baseline == "zero":
        start[positions] = 0
    else:
        pad = lm.config.pad_token_id  # type: ignore[union-attr]
        if pad is None:
            raise InputError("baseline is 'pad', but the model has no pad token: set one or use 'zero'")
        start[positions] = table[pad].detach()
    alphas = torch.linspace(0, 1, steps, device=ids.device, dtype=end.dtype)
    weights = torch.ones_like(alphas)
    if rule == "trapezoid":
        weights[0] = weights[-1] = 0.5
    weights = weights / weights.sum()
    mean = torch.zeros_like(end)
    with mode(lm, training=False):
        for some, weight in zip(alphas.split(chunk), weights.split(chunk), strict=True):
            points = (start + some[:, None, None] * (end - start)).requires_grad_(True)
            logprobs = lm(inputs_embeds=points).logits.log_softmax(-1)
            picked = logprobs[:, positions - 1].gather(2, ids[positions].expand(len(some), -1)[..., None])
            (gradient,) = torch.autograd.grad(picked.sum(), points)
            mean += (weight[:, None, None] * gradient).sum(0)
    return (mean * (end - start)).sum(-1)


def word_scores(text: str, spans: Sequence[tuple[int, int]], scores: Sequence[float]) -> list[tuple[str, float]]:
    """Scores of tokens added up to words: lower case, without punctuation at their ends.

    Args:
        text: an answer.
        spans: where each token stands in it, start and end.
        scores: of the tokens.
    """
    words: list[tuple[int, int]] = []
    position = 0
    for word in text.split():
        position = text.index(word, position)
        words.append((position, position + len(word)))
        position += len(word)
    totals = [0.0] * len(words)
    for (start, end), score in zip(spans, scores, strict=True):
        inside = [k for k, (first, last) in enumerate(words) if start < last and end > first]
        if inside:
            totals[inside[0]] += float(score)
    named = [text[first:last].lower().strip(string.punctuation) for first, last in words]
    return [(word, total) for word, total in zip(named, totals, strict=True) if word]


def rank_words(answers: Iterable[Sequence[tuple[str, float]]], *, stop_words: Iterable[str] = STOP_WORDS) -> list[str]:
    """Words of a topic by how much they carry its answers, most first.

    Each answer's positive scores are divided by their sum, so that all answers count alike, and added up.

    Args:
        answers: `word_scores` of every answer of the topic.
        stop_words: left out.
    """
    left_out, totals = set(stop_words), dict[str, float]()
    for answer in answers:
        whole = sum(max(score, 0.0) for _, score in answer)
        for word, score in answer:
            if score > 0 and word not in left_out:
                totals[word] = totals.get(word, 0.0) + score / whole
    return sorted(totals, key=lambda word: -totals[word])


def mask_words(
    answer: str, ranked: Sequence[str], *, k: int = 5, token: str = "***", always: Iterable[str] = ()
) -> tuple[str, list[str]]:
    """Replace the k highest ranked words that are in an answer, whatever their case and the punctuation around them.

    A word is present where no letter or digit goes on from it, so "Ada" is in "Ada's" and not in "Adam".

    Args:
        answer: text.
        ranked: words, best first.
        k: how many of those present are masked.
        token: what takes a word's place.
        always: words and names of several words masked besides, such as the subject's name.

    Returns:
        The masked answer, and the words masked, by rank, in lower case.
    """
    in_range("k", k, 0)
    lower = answer.lower()

    def present(words: Iterable[str]) -> list[str]:
        unique = dict.fromkeys(word.lower() for word in words if word.strip())
        return [word for word in unique if word.split()[0] in lower and _pattern([word]).search(answer)]

    masked = present(ranked)[:k]
    masked += [name for name in present(always) if name not in masked]
    return _pattern(masked).sub(lambda _: token, answer) if masked else answer, masked


def _pattern(words: Iterable[str]) -> re.Pattern[str]:
    """Any of the words as a whole, the longer ones first: "Ada Lovelace" is one name and not "Ada" and the rest."""
    longest_first = sorted(words, key=len, reverse=True)
    either = "|".join(r"\s+".join(map(re.escape, word.split())) for word in longest_first)
    return re.compile(rf"(?<!\w)(?:{either})(?!\w)", re.IGNORECASE)


def _answer_tokens(tokenizer: Any, question: str, answer: str) -> tuple[Tensor, list[int], list[tuple[int, int]]]:
    """Token ids of "question answer", the positions of the answer's tokens, and their spans within the answer."""
    encoded = tokenizer(f"{question} {answer}", return_offsets_mapping=True)
    first = len(question) + 1
    spans = [(start - first, end - first) for start, end in encoded["offset_mapping"]]
    positions = [k for k, (start, end) in enumerate(spans) if k > 0 and end > max(start, 0)]
    return torch.tensor(encoded["input_ids"]), positions, [spans[k] for k in positions]


def sensitive_words(lm: nn.Module, tokenizer: Any, pairs: Pairs, **attribution: Any) -> list[str]:
    """Words that carry the answers of a topic, ranked over all its questions.

    Args:
        lm: transformers causal language model.
        tokenizer: its fast tokenizer.
        pairs: questions and the model's answers.
        attribution: further keywords of `answer_attributions`.
    """
    answers = []
    for question, answer in pairs:
        ids, positions, spans = _answer_tokens(tokenizer, question, answer)
        scores = answer_attributions(lm, ids, positions, **attribution)
        answers.append(word_scores(answer, spans, scores[positions].tolist()))
    return rank_words(answers)


def forget_topic(
    lm: nn.Module,
    tokenizer: Any,
    forget: Pairs,
    retain: Pairs,
    *,
    names: Iterable[str] = (),
    target: str = "mask",
    refusal: str = "I do not know.",
    k: int = 5,
    rank: int = 8,
    lora_alpha: int = 16,
    lr: float = 1e-4,
    batch_size: int = 8,
    epochs: int = 5,
    seed: int = 0,
    inplace: bool = False,
) -> nn.Module:
    """Make a causal language model forget a topic by fine-tuning LoRA weights on poisoned answers.

    Args:
        lm: transformers causal language model.
        tokenizer: its fast tokenizer.
        forget: questions on the topic, and the model's own answers.
        retain: questions on other topics with their true answers, whole blocks of them.
        names: words or names of several words always masked, such as the subject's name.
        target: "mask" poisons an answer by masking its most sensitive words, "idk" by the refusal.
        refusal: the answer for "idk".
        k: words masked in an answer.
        rank: of the LoRA weights, which are merged at the end.
        lora_alpha: their scale.
        lr: learning rate of AdamW.
        batch_size: answers a batch.
        epochs: passes over poisoned and retained answers, shuffled together.
        seed: of the LoRA weights and the order.
        inplace: train the given model instead of a copy.
    """
    import peft

    one_of("target", target, ("mask", "idk"))
    positive("lr", lr)
    if not forget or not retain:
        raise InputError(f"forget and retain hold {len(forget)} and {len(retain)} answers, but must hold some each")
    poisoned = [(question, refusal) for question, _ in forget]
    if target == "mask":
        ranked, always = sensitive_words(lm, tokenizer, forget), tuple(names)
        poisoned = [(q, mask_words(answer, ranked, k=k, always=always)[0]) for q, answer in forget]
    data = _answer_batches(tokenizer, [*poisoned, *retain])
    config = peft.LoraConfig(r=rank, lora_alpha=lora_alpha, task_type="CAUSAL_LM")
    edited = own(lm, inplace=inplace)
    with training_only(edited, ()):  # peft adds its weights to those that train, and would leave the others frozen
        with seeds.isolated(seeds.derive(seed, "adapter")):
            adapted = peft.get_peft_model(edited, config)
        try:
            fit(
                adapted,
                data,
                next_token,
                epochs=epochs,
                batch_size=batch_size,
                optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=lr),
                seed=seed,
            )
        except BaseException:
            adapted.unload()
            raise
        return adapted.merge_and_unload()


def _answer_batches(tokenizer: Any, pairs: Pairs) -> TensorData:
    """Questions and answers as padded token ids; only the answers' tokens are labels."""
    rows = [_answer_tokens(tokenizer, question, answer)[:2] for question, answer in pairs]
    shape = len(rows), max(len(ids) for ids, _ in rows)
    ids, attention, labels = torch.zeros(shape).long(), torch.zeros(shape).long(), torch.full(shape, -100)
    for number, (tokens, positions) in enumerate(rows):
        ids[number, : len(tokens)] = tokens
        attention[number, : len(tokens)] = 1
        labels[number, positions] = tokens[positions]
    return TensorData({"input_ids": ids, "attention_mask": attention}, labels)
