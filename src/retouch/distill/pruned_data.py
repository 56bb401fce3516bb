"""Distilling on pruned data: a teacher that saw everything makes up for what a student is not shown.

A fraction f of N samples is kept, at random or by a score, and the student learns from labels and teacher alike:

    loss      (1 - alpha) * CE(student, y) + alpha * T^2 KL(softmax(z_t / T) || softmax(z_s / T))
    weight    alpha grows as f falls: 0.9 for f up to 0.1, 0.5 from 0.7 on, a line between
    EL2N      ||softmax(z) - onehot(y)||_2 of early checkpoints, in the mean: large for hard samples, and wrong labels

With a teacher, random pruning does as well as pruning by scores, which cost a training of their own; and the samples
that scores call hard bring their wrong labels along, which the teacher corrects. Use it where training on all data is
too dear for the student, or data must be left out. Not where the student could be trained on all of it for as long: at
equal steps the gain is small from f = 0.5 on. A teacher larger than the student can hurt at small f.

`fraction` is the share kept; half of the literature names the share removed. Score with models that have not seen the
test data. At very small f without a teacher, easy samples are better to keep than hard ones.

Paper: arXiv 2403.07854 (ICML 2025; section 3). No official code was found, so these are choices of ours: the numbers of
the weight rule (the paper has the direction only), T = 4 and the factor T^2, and pruning within each class.

Cost: a run of the teacher a step, or once a sample where inputs are not augmented (`precompute`). Limits: equal epochs
on less data are fewer steps; say `steps` to compare at equal steps.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retouch.core import seeds
from retouch.core.batches import in_order
from retouch.core.cards import Card
from retouch.core.data import as_dataset, labels_of, subset
from retouch.core.distillation import Answer, Distillation, answered, check_pair, softened_kl
from retouch.core.errors import InputError, in_range, one_of, positive
from retouch.core.loop import Callback, History, Run
from retouch.core.models import predict
from retouch.core.recipe import Recipe

CARD = Card(
    title="Distillation on pruned data",
    room="distill",
    paper="arXiv:2403.07854",
    shape="objective",
    line="Trains a student on a random share of the data, with a teacher that has seen all of it.",
    tags=("classification", "data pruning", "label noise", "logits"),
    plugin="PrunedDistillation",
)

Keep = Literal["random", "hardest", "easiest"]
KEEP = ("random", "hardest", "easiest")


def prune_indices(
    labels: Tensor,
    fraction: float,
    *,
    scores: Tensor | None = None,
    keep: Keep = "random",
    class_balanced: bool = True,
    generator: torch.Generator | None = None,
    allow_empty: bool = False,
) -> Tensor:
    """Indices to keep, sorted (int64). A smaller fraction's are among a larger one's, for the same scores or draws.

    Args:
        labels: class of every sample (N,).
        fraction: share to keep, above 0 and at most 1.
        scores: (N,), for "hardest" (largest first) and "easiest" (smallest first); ties go to the lower index.
        keep: "random" takes no notice of scores.
        class_balanced: keep round(fraction * size) of every class; otherwise round(fraction * N) of all.
        generator: a CPU generator, for "random".
        allow_empty: let a class be without samples.
    """
    in_range("fraction", fraction, 0, 1, above=True)
    one_of("keep", keep, KEEP)
    if keep == "random":
        order = torch.randperm(len(labels), generator=seeds.fresh(generator))
    elif scores is None:
        raise InputError(f"scores is None, but must be given to keep the {keep}")
    elif scores.shape != labels.shape:
        raise InputError(f"scores has shape {tuple(scores.shape)}, but must have that of labels, {tuple(labels.shape)}")
    else:
        order = scores.detach().cpu().argsort(stable=True, descending=keep == "hardest")
    labels = labels.cpu()
    if class_balanced:
        ranked = labels[order]
        kept = []
        for label in labels.unique():
            rows = order[ranked == label]
            kept.append(rows[: round(fraction * len(rows))])
        chosen = torch.cat(kept)
    else:
        chosen = order[: round(fraction * len(order))]
    missing = set(labels.tolist()) - set(labels[chosen].tolist())
    if missing and not allow_empty:
        lost = f"none is left of class {min(missing)}"
        raise InputError(f"fraction is {fraction}, but must keep a sample of every class: {lost}")
    return chosen.sort().values


def el2n_scores(logits: Tensor, labels: Tensor) -> Tensor:
    """||softmax(z) - onehot(y)||_2, (samples,), 0 to sqrt(2).

    Args:
        logits: (samples, classes), or (checkpoints, samples, classes) for the mean over early checkpoints or seeds.
        labels: class ids (samples,).
    """
    if logits.ndim not in (2, 3) or logits.shape[-2] != len(labels):
        shape = tuple(logits.shape)
        raise InputError(f"logits has shape {shape}, but must be ([checkpoints,] samples, classes) for {len(labels)}")
    gaps = logits.softmax(-1) - F.one_hot(labels.long(), logits.shape[-1])
    return gaps.norm(dim=-1).reshape(-1, len(labels)).mean(0)


class ForgettingTracker(Callback):
    """Counts how often a sample goes from right to wrong between two looks at it (Toneva et al., 2019).

    `update` it with the batches of a loop of one's own, or give it to `fit`, where it asks about all of `data` before
    every epoch and after the last.

    Args:
        num_samples: N; that of the data if None.
        data: labelled samples that `fit`'s model is asked about.
    """

    def __init__(self, num_samples: int | None = None, data: Any = None) -> None:
        if num_samples is None and data is None:
            raise InputError("num_samples and data are None, but one of them must be given")
        self.data = data
        size = num_samples if num_samples is not None else len(as_dataset(data))
        self.forgotten, self.seen = torch.zeros(size, dtype=torch.long), torch.zeros(size, dtype=torch.long)
        self.right, self.learned = torch.zeros(size, dtype=torch.bool), torch.zeros(size, dtype=torch.bool)

    def update(self, indices: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Look at some samples, each at most once: indices (n,), logits (n, classes), class ids (n,)."""
        indices = indices.cpu().long()
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(self.seen):
            raise InputError(f"indices has {int(indices.max())}, but must be 0 to {len(self.seen) - 1}")
        now = (logits.argmax(-1) == labels).cpu()
        self.forgotten[indices] += (self.right[indices] & ~now).long()
        self.right[indices] = now
        self.learned[indices] |= now
        self.seen[indices] += 1

    def scores(self) -> Tensor:
        """Forgettings (N,); a sample never right has the largest score, the number of looks."""
        return torch.where(self.learned, self.forgotten, self.seen.max()).float()

    def on_epoch(self, run: Run) -> None:
        if self.data is not None:
            logits = predict(run.module, in_order(self.data)).cpu()
            self.update(torch.arange(len(logits)), logits, labels_of(self.data))

    def on_end(self, run: Run) -> None:
        if run.step >= run.steps:  # and not after an error
            self.on_epoch(run)

    def state_dict(self) -> dict[str, Any]:
        """What has been counted."""
        return {name: getattr(self, name) for name in ("forgotten", "seen", "right", "learned")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        for name, value in state.items():
            setattr(self, name, value.clone())


def kd_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 4.0) -> Tensor:
    """T^2 KL(teacher || student) at temperature T, of logits (samples, classes), mean over samples."""
    check_pair(student_logits, teacher_logits)
    return softened_kl(student_logits, teacher_logits, temperature=temperature)


def pruned_kd_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, alpha: float, temperature: float = 4.0
) -> Tensor:
    """(1 - alpha) cross entropy + alpha KL (section 3), of logits (samples, classes) and class ids (samples,).

    Args:
        student_logits: of the student.
        teacher_logits: no gradient goes into them.
        labels: class ids.
        alpha: 0 to 1.
        temperature: of both softmaxes of KL.
    """
    in_range("alpha", alpha, 0, 1)
    kl = kd_kl(student_logits, teacher_logits, temperature=temperature)
    return (1 - alpha) * F.cross_entropy(student_logits, labels) + alpha * kl


def kd_weight_for_fraction(fraction: float, *, low: float = 0.5, high: float = 0.9) -> float:
    """The weight alpha for a share kept: `high` up to 0.1, `low` from 0.7 on, a line between.

    Args:
        fraction: share kept, above 0 and at most 1.
        low: 0 to 1.
        high: 0 to 1.
    """
    in_range("fraction", fraction, 0, 1, above=True)
    in_range("low", low, 0, 1)
    in_range("high", high, 0, 1)
    return high + (low - high) * min(max((fraction - 0.1) / 0.6, 0.0), 1.0)


class PrunedDistillation:
    """Prune, then distil: `PrunedDistillation(teacher, student, dataset, 0.1).fit(epochs=30)`.

    Args:
        teacher: trained on all of the data; kept as a frozen copy.
        student: trained in place.
        dataset: labelled samples, of which a share is kept.
        fraction: share to keep.
        keep: which, see `prune_indices`.
        alpha: weight of the teacher against the labels, or "auto" for `kd_weight_for_fraction`.
        temperature: of KL.
        scores: for "hardest" and "easiest"; EL2N of the teacher if None, though the paper takes early checkpoints.
        class_balanced: keep the same share of every class.
        precompute: ask the teacher about every kept sample once; only where inputs are not augmented.
        seed: of random pruning.

    Attributes:
        indices: of the samples kept.
        data: the samples kept.
        alpha: the weight used.
        recipe: model, data and objective for `fit`.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        dataset: Any,
        fraction: float,
        *,
        keep: Keep = "random",
        alpha: Literal["auto"] | float = "auto",
        temperature: float = 4.0,
        scores: Tensor | None = None,
        class_balanced: bool = True,
        precompute: bool = False,
        seed: int = 0,
    ) -> None:
        if isinstance(alpha, str):
            one_of("alpha", alpha, ("auto",))
            alpha = kd_weight_for_fraction(fraction)
        in_range("alpha", alpha, 0, 1)
        positive("temperature", temperature)
        one_of("keep", keep, KEEP)
        labels = labels_of(dataset)
        if keep != "random" and scores is None:
            scores = el2n_scores(predict(teacher, in_order(as_dataset(dataset))).cpu(), labels.cpu())
        chosen = {"scores": scores, "keep": keep, "class_balanced": class_balanced}
        self.indices = prune_indices(labels, fraction, **chosen, generator=seeds.generator(seed, "prune"))  # type: ignore[arg-type]
        self.data, self.alpha, self.temperature = subset(dataset, self.indices), alpha, temperature
        self.recipe = Recipe(
            model=student,
            data=answered(self.data, teacher) if precompute else self.data,
            objective=Distillation(None if precompute else teacher, self.loss),
        )

    def loss(self, student: Answer, teacher: Answer, labels: Tensor | None) -> Tensor:
        """The loss of `pruned_kd_loss`, as `Distillation` asks for it."""
        if labels is None:
            raise InputError("The batch has no labels, but pruned distillation needs them: give (input, target)")
        settings = {"alpha": self.alpha, "temperature": self.temperature}
        return pruned_kd_loss(student.logits, teacher.logits, labels, **settings)

    def fit(self, **settings: Any) -> History:
        """Train the student; settings of `core.fit`, either `epochs` or `steps` among them.

        Returns:
            The history, whose length is the number of steps made: equal epochs on less data are fewer.
        """
        return self.recipe.fit(**settings)[1]


def recipe(
    student: nn.Module,
    teacher: nn.Module,
    data: Any,
    validation: Any = None,
    *,
    fraction: float = 0.1,
    keep: str = "random",
    alpha: float | None = None,
    temperature: float = 4.0,
    class_balanced: bool = True,
    seed: int = 0,
) -> Recipe:
    """Teach a classifier on a share of the data.

    Args:
        student: classifier to train.
        teacher: classifier of the same classes that was trained on all of the data.
        data: labelled samples.
        validation: not used.
        fraction: share to keep; equal epochs on less data are fewer steps.
        keep: "random", or "hardest" or "easiest" by the teacher's EL2N.
        alpha: weight of the teacher against the labels; by the share kept if None.
        temperature: of KL.
        class_balanced: keep the same share of every class.
        seed: of random pruning.
    """
    settings: dict[str, Any] = {"keep": keep, "alpha": "auto" if alpha is None else alpha, "temperature": temperature}
    settings |= {"class_balanced": class_balanced, "seed": seed}
    return PrunedDistillation(teacher, student, data, fraction, **settings).recipe
