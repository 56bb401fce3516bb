"""The search over prompts that a language model would write."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from retouch.audit.sage.judging import (
    Classifier,
    SearchResult,
    agreed,
    check_deterministic,
    classes_seen,
    ensemble_log_prob,
    evaluating,
    gradient_of,
    judge,
    split,
)
from retouch.core.errors import InputError, in_range
from retouch.core.models import logits_of

# They take the class back. Other classes' words are banned as well: a prompt that asks for them is no failure.
CONTRADICTING = ("no", "not", "without", "never", "none", "neither", "nor", "non", "instead")


def search_prompt(
    generate: Callable[..., Tensor],
    text_embeddings: Callable[[list[str]], Tensor] | nn.Embedding | Tensor,
    language_model: nn.Module,
    tokenizer: Any,
    classifiers: Sequence[Classifier],
    label: int,
    *,
    top_k: int = 50,
    max_words: int = 8,
    latents: int = 8,
    template: str = "a photo of a {}",
    class_names: Sequence[str] | None = None,
    banned: Sequence[str] = (),
    threshold: float = 0.5,
    inner_steps: int = 5,
    inner_lr: float = 1e-2,
    likelihood_weight: float = 0.0,
    held_out: int | Sequence[Classifier] = 1,
    reduction: str = "mean",
    agreement: str = "all",
) -> SearchResult:
    """A readable prompt, grown word by word, of which the generator fails to show the class.

    Args:
        generate: (prompt, latents) -> images of that many latents, always the same ones; and (prompt, latents,
            embedding (d,)) -> the same with one more token of this embedding at the end, differentiable in it.
        text_embeddings: input embeddings of the text encoder: words -> (n, d), or a table (tokens, d) if encoder and
            language model have one tokenizer.
        language_model: of transformers, with a head for the next token, such as LlamaForCausalLM.
        tokenizer: its own.
        classifiers: see `judge`.
        label: class.
        top_k: likeliest next tokens that words are taken from.
        max_words: added at most.
        latents: images a prompt.
        template: of the first prompt; {} is the class.
        class_names: words of all classes, of which other classes' are banned; if None, those that a transformers
            classifier tells.
        banned: words, beside those that contradict the class (`CONTRADICTING`).
        threshold: share of latents that fail above which a prompt is done.
        inner_steps: of Adam on the free embedding.
        inner_lr: its learning rate.
        likelihood_weight: of a word's log-probability beside its cosine to the free embedding.
        held_out: see `judge`; never asked before the end.
        reduction: see `ensemble_log_prob`.
        agreement: see `judge`.

    Returns:
        The prompts from the template to the last one, which the report is on; in `history` the share of the latents
        that failed of each.
    """
    searched, _ = split(classifiers, held_out)
    for name, value, least in (("top_k", top_k, 1), ("max_words", max_words, 0), ("latents", latents, 1)):
        in_range(name, value, least)
    in_range("threshold", threshold, 0, 1)
    in_range("inner_steps", inner_steps, 0)
    if "{}" not in template:
        raise InputError(f"template is {template!r}, but must have {{}} in the place of the class")
    names = _class_names(class_names, classifiers)
    in_range("label", label, 0, len(names) - 1)
    forbidden = _forbidden(names, label, banned)
    prompts, generations = [template.replace("{}", names[label])], 0

    def show(prompt: str) -> tuple[Tensor, float]:
        nonlocal generations
        images = generate(prompt, latents)
        generations += len(images)
        return images, float(agreed(classes_seen(images, searched) != label, agreement).float().mean())

    def wish(prompt: str, start: Tensor) -> Tensor:
        """The embedding of the next token at which the class is lost."""
        nonlocal generations
        free = start.detach().clone().float().requires_grad_()
        optimizer = torch.optim.Adam([free], lr=inner_lr)
        for _ in range(inner_steps):
            with torch.enable_grad():
                images = generate(prompt, latents, free)
                loss = ensemble_log_prob(images, label, searched, reduction=reduction).mean()
                free.grad = gradient_of(loss, free, "generate")
            generations += len(images)
            optimizer.step()
        return free.detach()

    with torch.no_grad(), ExitStack() as stack:
        stack.enter_context(evaluating([*searched, language_model]))
        check_deterministic(lambda: generate(prompts[0], latents), "generate")
        images, failing = show(prompts[0])
        originals, history = images, [failing]
        while len(prompts) <= max_words and history[-1] <= threshold:
            words, ids, likelihood = _next_words(language_model, tokenizer, prompts[-1], top_k, forbidden)
            if not words:
                break
            table = _embeddings_of(text_embeddings, words, ids)
            free = wish(prompts[-1], table.mean(0))
            score = nn.functional.cosine_similarity(table, free, dim=1) + likelihood_weight * likelihood.to(table)
            prompts.append(f"{prompts[-1]} {words[int(score.argmax())]}")
            images, failing = show(prompts[-1])
            history.append(failing)
    report = judge(
        [prompts[-1]] * len(images),
        images,
        originals,
        label,
        classifiers,
        held_out=held_out,
        agreement=agreement,
    )
    return SearchResult(inputs=prompts, images=images, history=history, report=report, generations=generations)


def _class_names(names: Sequence[str] | None, classifiers: Sequence[Any]) -> list[str]:
    if names is not None:
        return list(names)
    for one in classifiers:
        known = getattr(getattr(one, "config", None), "id2label", None)
        if isinstance(known, Mapping) and not str(known.get(0)).startswith("LABEL_"):
            return [known[number] for number in range(len(known))]
    raise InputError("class_names is None, but must have the word of every class, since no classifier tells it")


def _forbidden(names: Sequence[str], label: int, banned: Sequence[str]) -> set[str]:
    own = set(names[label].casefold().split())
    others = {word for name in names for word in name.casefold().split()} - own
    words = {*others, *CONTRADICTING, *(word.casefold() for word in banned)}
    return {f"{word}{plural}" for word in words for plural in ("", "s", "es")}


def _next_words(
    model: nn.Module, tokenizer: Any, text: str, top_k: int, forbidden: set[str]
) -> tuple[list[str], list[int], Tensor]:
    """Whole words among the likeliest next tokens, without those forbidden: words, ids, log-probabilities."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    device = next(model.parameters()).device
    logits = logits_of(model(input_ids=torch.tensor([begin + ids], device=device)))[0, -1].float()
    found = logits.log_softmax(0).topk(min(top_k, len(logits), len(tokenizer)))
    marks = ("Ġ", "▁")  # a token that begins a word, in byte-level and in sentence-piece vocabularies
    marked = any(token.startswith(marks) for token in tokenizer.get_vocab())
    before = text.casefold().split()[-1]
    words, kept = list[str](), list[int]()
    for number, token in enumerate(tokenizer.convert_ids_to_tokens(found.indices.tolist())):
        word = (token or "").lstrip("Ġ▁")
        begins = bool(token) and token.startswith(marks) == marked
        special = int(found.indices[number]) in tokenizer.all_special_ids
        if begins and not special and word.isalpha() and word.casefold() not in {*forbidden, before, *words}:
            words.append(word)
            kept.append(number)
    return words, found.indices[kept].tolist(), found.values[kept]


def _embeddings_of(source: Any, words: list[str], ids: list[int]) -> Tensor:
    if isinstance(source, nn.Embedding | Tensor):
        table = source.weight if isinstance(source, nn.Embedding) else source
        if max(ids) >= len(table):
            raise InputError(f"text_embeddings has {len(table)} rows, but the tokenizer has a token {max(ids)}")
        found = table.detach()[ids]
    else:
        found = source(words)
    if found.ndim != 2 or len(found) != len(words):
        raise InputError(f"text_embeddings gave shape {tuple(found.shape)}, but must give ({len(words)}, width)")
    return found.detach().float()
