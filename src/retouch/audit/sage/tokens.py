"""The search over one token's embedding, universal over prompts."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from retouch.audit.sage.judging import (
    Classifier,
    SearchResult,
    check_deterministic,
    each_image,
    ensemble_log_prob,
    evaluating,
    gradient_of,
    judge,
    split,
)
from retouch.core import seeds
from retouch.core.errors import InputError, in_range, positive


def search_token(
    generate_from_embeddings: Callable[[list[str], Tensor], Tensor],
    prompts: Sequence[str],
    classifiers: Sequence[Classifier],
    target: int,
    *,
    embed_dim: int,
    steps: int = 200,
    lr: float = 1e-2,
    labels: int | Sequence[int] | None = None,
    unseen: Sequence[str] = (),
    init: Tensor | None = None,
    init_scale: float = 0.02,
    held_out: int | Sequence[Classifier] = 1,
    original: Callable[[list[str]], Tensor] | None = None,
    similarity: Callable[[Tensor, list[str]], Tensor] | None = None,
    similarity_weight: float = 0.0,
    reduction: str = "mean",
    agreement: str = "all",
    seed: int = 0,
) -> SearchResult:
    """One embedding that, appended to any prompt, turns its images into a target class.

    Args:
        generate_from_embeddings: (prompts, embedding (embed_dim,)) -> images, the same number of each prompt, one
            prompt after the other; deterministic and differentiable in the embedding.
        prompts: that it is optimised over.
        classifiers: see `judge`.
        target: class.
        embed_dim: width of the text encoder's input embeddings.
        steps: of Adam.
        lr: its learning rate.
        labels: what the prompts (the unseen ones, if there are any) describe, one for all or one each; if None, an
            original image fails if it shows the target.
        unseen: prompts to judge the embedding on, in place of `prompts`.
        init: to start from (embed_dim,), such as a rare token's; random if None.
        init_scale: standard deviation of a random start; CLIP's embeddings have 0.01 to 0.02.
        held_out: see `judge`.
        original: prompts -> their images without the embedding; if None, the originals are those with the start.
        similarity: (images, prompts, one an image) -> (n,), such as CLIP's score; reported before and after.
        similarity_weight: of its mean in the objective, at least 0.
        reduction: see `ensemble_log_prob`.
        agreement: see `judge`.
        seed: of a random start.

    Returns:
        The embedding; its loss at every step, minus the mean log-probability of the target.
    """
    searched, _ = split(classifiers, held_out)
    in_range("target", target, 0)
    in_range("steps", steps, 0)
    positive("embed_dim", embed_dim)
    positive("lr", lr)
    in_range("similarity_weight", similarity_weight, 0)
    prompts, shown_on = list(prompts), list(unseen) or list(prompts)
    if not prompts:
        raise InputError("prompts is empty, but must have at least one")
    known = None if labels is None else [labels] if isinstance(labels, int) else list(labels)
    if known is not None and target in known:
        raise InputError(f"target is {target}, but must be another class than the prompts' labels")
    if init is None:
        init = init_scale * torch.randn(embed_dim, generator=seeds.generator(seed, "sage", "token"))
    if init.shape != (embed_dim,):
        raise InputError(f"init has shape {tuple(init.shape)}, but must have ({embed_dim},)")
    start = init.detach().clone().float()
    embedding = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([embedding], lr=lr)
    history, generations = list[float](), 0

    def loss_of(value: Tensor) -> Tensor:
        images = generate_from_embeddings(prompts, value)
        loss = -ensemble_log_prob(images, target, searched, reduction=reduction).mean()
        if similarity is not None and similarity_weight:
            loss = loss - similarity_weight * similarity(images, each_image(prompts, len(images))).mean()
        nonlocal generations
        generations += len(images)
        return loss

    with evaluating(searched):
        check_deterministic(lambda: generate_from_embeddings(prompts, start), "generate_from_embeddings")
        for _ in range(steps):
            with torch.enable_grad():
                loss = loss_of(embedding)
                embedding.grad = gradient_of(loss, embedding, "generate_from_embeddings")
            history.append(loss.item())
            optimizer.step()
        with torch.no_grad():
            found = embedding.detach()
            history.append(loss_of(found).item())
            images = generate_from_embeddings(shown_on, found)
            originals = original(shown_on) if original else generate_from_embeddings(shown_on, start)
    names = each_image(shown_on, len(images))
    report = judge(
        names,
        images,
        originals,
        None if known is None else torch.tensor(each_image(known, len(images))),
        classifiers,
        held_out=held_out,
        target=target,
        agreement=agreement,
    )
    measures = {}
    if similarity is not None:
        with torch.no_grad():
            measures["similarity"] = float(similarity(images, names).mean())
            measures["similarity_before"] = float(similarity(originals, names).mean())
    generations += len(images) + len(originals)
    return SearchResult(
        inputs=found, images=images, history=history, report=report, generations=generations, measures=measures
    )
