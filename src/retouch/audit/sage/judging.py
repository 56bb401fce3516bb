"""The judges of SAGE: an ensemble of classifiers to search with, others that confirm, and what they say."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from retouch.core import seeds
from retouch.core.errors import InputError, in_range, one_of
from retouch.core.models import forward, logits_of, mode

Classifier = Callable[[Tensor], Any]  # images -> scores (n, classes), an output with logits, or classes (n,)
REDUCTIONS = ("mean", "mixture", "max")
AGREEMENTS = ("all", "majority")


def ensemble_log_prob(
    images: Tensor, labels: int | Tensor, classifiers: Sequence[Classifier], *, reduction: str = "mean"
) -> Tensor:
    """What several classifiers together make of the label of each image.

    Args:
        images: (n, channels, height, width).
        labels: one class for all, or (n,).
        classifiers: images -> scores before softmax (n, classes), or an output with logits.
        reduction: "mean" of log-probabilities, log of the mean probability ("mixture"), or "max": of the member that is
            surest, so that all have to be fooled.

    Returns:
        (n,), at most 0, with gradients.

    Raises:
        InputError: for no classifier, or a label outside of its classes.
    """
    one_of("reduction", reduction, REDUCTIONS)
    return together(log_probabilities(images, several(classifiers)), class_numbers("labels", labels, images), reduction)


class Rate(NamedTuple):
    """A share, with its 95% interval (Wilson); NaN between 0 and 1 if it is of nothing."""

    share: float
    low: float
    high: float
    hits: int
    total: int


@dataclass(frozen=True, kw_only=True)
class FailureReport:
    """Which inputs are failures, by whose word.

    Attributes:
        inputs: n of them: latents (n, ...), or prompts.
        images: made of them (n, channels, height, width).
        labels: what they should show (n,), or None if that is not known.
        target: what they should be turned into (n,), or None.
        verdicts: (judges, n), booleans: this judge sees the failure (not the label, or the target if there is one).
        base_verdicts: the same of the original images; there with labels it is not seeing the label.
        held_out: how many judges, the last ones, took no part in the search.
        natural: (n,), booleans: the input passed its test.
        p_values: (n,) of that test, or None.
        agreement: "all" or "majority" of the judges that were searched with; all that were held out have to confirm.
    """

    inputs: Any
    images: Tensor
    labels: Tensor | None
    target: Tensor | None
    verdicts: Tensor
    base_verdicts: Tensor
    held_out: int
    natural: Tensor
    p_values: Tensor | None = None
    agreement: str = "all"

    def __post_init__(self) -> None:
        """Refuse a report without a judge of the search."""
        one_of("agreement", self.agreement, AGREEMENTS)
        in_range("held_out", self.held_out, 0, len(self.verdicts) - 1)

    @property
    def fooled(self) -> Tensor:
        """(n,): the judges that were searched with agree on a failure."""
        return agreed(self.verdicts[: len(self.verdicts) - self.held_out], self.agreement)

    @property
    def base_failed(self) -> Tensor:
        """(n,): some judge saw the original image fail already."""
        return self.base_verdicts.any(0)

    @property
    def failed(self) -> Tensor:
        """(n,): fooled, confirmed by judges that were held out, and not failing from the start."""
        if not self.held_out:
            return torch.zeros_like(self.natural)
        return self.fooled & self.verdicts[-self.held_out :].all(0) & ~self.base_failed

    @property
    def success(self) -> Tensor:
        """(n,): failed, on a natural input."""
        return self.failed & self.natural

    @property
    def success_rate(self) -> Rate:
        """SSR: successes among the inputs that did not fail from the start."""
        return _rate(self.success, ~self.base_failed)

    @property
    def base_failure_rate(self) -> Rate:
        """Originals that failed already."""
        return _rate(self.base_failed)

    @property
    def non_gaussian_rate(self) -> Rate:
        """NGR: failures whose input fails its test, among all."""
        return _rate(self.failed & ~self.natural, self.failed)

    @property
    def unconfirmed_rate(self) -> Rate:
        """Failures of the judges that were searched with that the others do not confirm: failures of classifiers."""
        fooled = self.fooled & ~self.base_failed
        return _rate(fooled & ~self.failed, fooled)

    def success_rate_by(self, verdicts: Tensor) -> Rate:
        """SSR(H): successes that other verdicts (n,), such as a human's, confirm."""
        return _rate(self.success & verdicts.to(self.success), ~self.base_failed)

    def summary(self) -> dict[str, Any]:
        """All rates, ready for JSON."""
        names = ("success_rate", "base_failure_rate", "non_gaussian_rate", "unconfirmed_rate")
        return {name: getattr(self, name)._asdict() for name in names} | {"held_out": self.held_out}


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a search ends with.

    Attributes:
        inputs: the latents (b, ...), the embedding (d,), or the prompt at every length.
        images: of the last of them, as the report judges them.
        history: loss of every step, a mean; of prompts the share of latents that fail at every length.
        report: who says what of it.
        generations: images that the search made, without those that checked whether they come out the same again.
        measures: further numbers.
    """

    inputs: Any
    images: Tensor
    history: list[float]
    report: FailureReport
    generations: int
    measures: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def judge(
    inputs: Any,
    images: Tensor,
    originals: Tensor,
    labels: int | Tensor | None,
    classifiers: Sequence[Classifier],
    *,
    held_out: int | Sequence[Classifier] = 1,
    target: int | Tensor | None = None,
    natural: Tensor | None = None,
    p_values: Tensor | None = None,
    agreement: str = "all",
) -> FailureReport:
    """Put images, and those they came from, before all judges.

    Args:
        inputs: n of them.
        images: (n, channels, height, width).
        originals: likewise, before the search.
        labels: what they should show, one for all or (n,); None if only the target is known.
        classifiers: that were searched with, and the held-out ones after them if `held_out` is a number.
        held_out: how many of the last ones were not searched with (which leaves one to search with at least, and none
            counts that is among those as well), or further judges.
        target: what they should be turned into.
        natural: (n,); all if None.
        p_values: (n,).
        agreement: "all" or "majority".
    """
    searched, others = split(classifiers, held_out)
    wanted = None if labels is None else class_numbers("labels", labels, images)
    goal = None if target is None else class_numbers("target", target, images)
    if wanted is None and goal is None:
        raise InputError("labels and target are both None, but one must say what a failure is")
    with evaluating([*searched, *others]):
        now, before = (classes_seen(shown, [*searched, *others]) for shown in (images, originals))
    verdicts = torch.eq(now, goal) if goal is not None else torch.ne(now, wanted if wanted is not None else -1)
    base = torch.ne(before, wanted) if wanted is not None else torch.eq(before, goal if goal is not None else -1)
    return FailureReport(
        inputs=inputs,
        images=images,
        labels=wanted,
        target=goal,
        verdicts=verdicts,
        base_verdicts=base,
        held_out=len(others),
        natural=torch.ones(len(images), dtype=torch.bool, device=images.device) if natural is None else natural,
        p_values=p_values,
        agreement=agreement,
    )


def distinct(inputs: Any, *, similarity: float = 0.95) -> list[int]:
    """Rows of the first of every group of near-duplicates.

    Args:
        inputs: latents (n, ...), or prompts.
        similarity: -1 to 1: latents of a cosine above it are the same. Prompts are that have the same words.
    """
    in_range("similarity", similarity, -1, 1)
    if not isinstance(inputs, Tensor):
        words = [" ".join(sorted(set(text.casefold().split()))) for text in inputs]
        return [row for row, text in enumerate(words) if text not in words[:row]]
    unit = nn.functional.normalize(inputs.detach().flatten(1).float(), dim=1)
    alike = unit @ unit.T > similarity
    kept: list[int] = []
    for row in range(len(unit)):
        if not bool(alike[row, kept].any()):
            kept.append(row)
    return kept


# --- helpers of the searches -----------------------------------------------------------------------------------------


def several(classifiers: Sequence[Classifier]) -> list[Classifier]:
    """At least one."""
    found = list(classifiers)
    if not found:
        raise InputError("classifiers is empty, but must have at least one")
    return found


def split(
    classifiers: Sequence[Classifier], held_out: int | Sequence[Classifier]
) -> tuple[list[Classifier], list[Classifier]]:
    """Those that a search may ask, and those that only judge."""
    found = several(classifiers)
    if isinstance(held_out, int):
        in_range("held_out", held_out, 0)
        first = len(found) - min(held_out, len(found) - 1)
        searched = found[:first]
        return searched, [other for other in found[first:] if not any(other is one for one in searched)]
    others = list(held_out)
    if any(one is other for one in found for other in others):
        raise InputError("held_out has a classifier that is searched with, but must have others, which confirm it")
    return found, others


@contextmanager
def evaluating(classifiers: Sequence[Any]) -> Iterator[None]:
    """In eval mode, those that are modules."""
    with ExitStack() as stack:
        for module in classifiers:
            if isinstance(module, nn.Module):
                stack.enter_context(mode(module, training=False))
        yield


def class_numbers(name: str, labels: int | Tensor, like: Tensor) -> Tensor:
    """Classes (n,) of n samples, given one for all or one each."""
    found = torch.as_tensor(labels, device=like.device)
    if found.is_floating_point() or found.shape not in ((), (len(like),)):
        raise InputError(f"{name} has shape {tuple(found.shape)}, but must be one class, or ({len(like)},) of them")
    if bool((found < 0).any()):
        raise InputError(f"{name} has {int(found.min())}, but classes begin at 0")
    return found.long().expand(len(like))


def log_probabilities(images: Tensor, classifiers: Sequence[Classifier]) -> list[Tensor]:
    """Log-probabilities (n, classes) of every classifier."""
    found = [logits_of(forward(classifier, images)) for classifier in classifiers]
    for scores in found:
        if scores.ndim != 2 or len(scores) != len(images):
            raise InputError(f"A classifier gave shape {tuple(scores.shape)}, but must give ({len(images)}, classes)")
    return [scores.log_softmax(1) for scores in found]


def together(scores: list[Tensor], labels: Tensor, reduction: str) -> Tensor:
    """The members' log-probabilities of the labels as one (n,)."""
    for each in scores:
        if len(labels) and int(labels.max()) >= each.shape[1]:
            raise InputError(f"label is {int(labels.max())}, but must be from 0 to {each.shape[1] - 1}")
    members = torch.stack([each.gather(1, labels[:, None])[:, 0] for each in scores])
    if reduction == "mixture":
        return members.logsumexp(0) - math.log(len(members))
    return members.mean(0) if reduction == "mean" else members.amax(0)


def classes_seen(images: Tensor, judges: Sequence[Classifier]) -> Tensor:
    """What every judge sees (judges, n); one may answer with classes right away."""
    found = []
    for one in judges:
        answer = logits_of(forward(one, images))
        found.append((answer if answer.ndim == 1 else answer.argmax(1)).to(images.device))
    return torch.stack(found)


def agreed(verdicts: Tensor, agreement: str) -> Tensor:
    """Verdicts (judges, n) as one (n,)."""
    return verdicts.all(0) if agreement == "all" else verdicts.float().mean(0) > 0.5


def _rate(hits: Tensor, among: Tensor | None = None) -> Rate:
    from scipy import stats

    count, total = int(hits.sum()), len(hits) if among is None else int(among.sum())
    if not total:
        return Rate(math.nan, 0.0, 1.0, 0, 0)
    low, high = stats.binomtest(count, total).proportion_ci(method="wilson")
    return Rate(count / total, float(low), float(high), count, total)


@torch.no_grad()
def check_deterministic(make: Callable[[], Tensor], name: str) -> None:
    """Refuse a generator that gives something else when it is called again."""
    with seeds.isolated():  # one block, so that a second call would draw on
        first, again = make(), make()
    room = 1e-3 * float(first.abs().max()) + 1e-6  # for sums that an accelerator adds up in another order
    if first.shape != again.shape or float((first - again).abs().max()) > room:
        raise InputError(f"{name} gave two results for the same input, but must be deterministic: fix noise, eta 0")


def gradient_of(loss: Tensor, x: Tensor, whose: str) -> Tensor:
    """Of a scalar, without touching any parameter's `.grad`; `whose` is who cuts it off, if someone does."""
    found = torch.autograd.grad(loss, x, allow_unused=True)[0] if loss.requires_grad else None
    if found is None:
        raise InputError(f"{whose} lets no gradients through, but the search needs them")
    return found


def each_image(values: list[Any], count: int) -> list[Any]:
    """One an image, where each has the same number of images."""
    if not values or count % len(values):
        raise InputError(f"There are {count} images for {len(values)} prompts or labels, but each must have the same")
    return [value for value in values for _ in range(count // len(values))]
