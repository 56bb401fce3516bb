"""Distillation on mixed samples: the teacher is asked about mixes of two inputs, and logits are scaled by their spread.

Of a batch of b samples with classes y, two random orders p and q and shares lam_i ~ Beta(beta, beta), one a sample:

    inputs    x~_i = lam_i x_p(i) + (1 - lam_i) x_q(i)           for a part of the batch; elsewhere lam_i = 1
    targets   y~_i = lam_i onehot(y_p(i)) + (1 - lam_i) onehot(y_q(i))
    scaling   s^ = s / std(s),  t^ = t / std(t)                  std over a sample's classes, in place of a temperature
    loss      gamma * CE(y~, softmax(s^)) + alpha * KL(softmax(t^) || softmax(s^))

Mixed inputs make a teacher's answers smoother, and differently so from sample to sample; the scaling takes that out,
and mixing only a part of the batch (partial mixup) keeps the rest clean. The teacher itself is trained without mixup:
with it, its answers are smooth on all inputs. Use it for inputs that can be averaged, with few samples for the student.
Not where the student's probabilities are used as they are: its loss fixes only the directions of its logits, so that
their size is arbitrary and needs calibrating. Do not interpolate the teacher's answers to the two clean inputs, and do
not cache answers: every mix is new.

Paper: arXiv 2211.03946 (sections 3 and 4). Code: hchoi71/MIX-KD, its branch `mixstd` (its branch `kd` pairs shuffled
inputs with labels that are not). Where they part: the paper mixes a chosen percentage; the code draws the samples to
keep clean with replacement, so that 90% leaves only 59% clean (`with_replacement=True`). Here the fraction is exact.
The code lets gradients run through the student's std, which is the default here too (`detach_std=False`).

Cost: one run of the teacher a step. Limits: the scaled cross entropy cannot reach zero, as the largest scaled logit of
K classes is (K - 1) / sqrt(K); its least value is log(1 + (K - 1) exp(-sqrt(K))), 0.32 for ten: no underfitting.
"""

import math
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retouch.core import seeds
from retouch.core.cards import Card
from retouch.core.distillation import Answer, Distillation, check_pair, softened_kl
from retouch.core.errors import InputError, in_range, one_of, positive
from retouch.core.loop import Callback, Run
from retouch.core.models import count_classes, first_tensor, unpack
from retouch.core.recipe import Recipe

CARD = Card(
    title="Mixup distillation",
    room="distill",
    paper="arXiv:2211.03946",
    shape="callback",
    line="Distils on mixed samples, with every sample's logits scaled by their own spread.",
    tags=("classification", "augmentation", "logits"),
    plugin="MixupDistillation",
)


class MixupPlan(NamedTuple):
    """Which samples are mixed, and how: two orders of the batch (b,), and the share (b,) of the first, 1 for clean."""

    index_a: Tensor
    index_b: Tensor
    lam: Tensor


def sample_mixup(
    batch_size: int,
    *,
    beta: float = 1.0,
    mix_fraction: float = 0.1,
    generator: torch.Generator | None = None,
    with_replacement: bool = False,
) -> MixupPlan:
    """Draw who is mixed with whom (section 3).

    Args:
        batch_size: b.
        beta: > 0; shares are Beta(beta, beta).
        mix_fraction: 0 to 1; round(mix_fraction * b) samples are mixed. 1 is full mixup.
        generator: a CPU generator.
        with_replacement: draw the clean ones with replacement, as the official code does: more are mixed then, 41% in
            the mean for a fraction of 0.1.
    """
    positive("batch_size", batch_size)
    positive("beta", beta)
    in_range("mix_fraction", mix_fraction, 0, 1)
    generator = seeds.fresh(generator)
    index_a, index_b = (torch.randperm(batch_size, generator=generator) for _ in range(2))
    draw = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
    lam = torch.from_numpy(draw.beta(beta, beta, batch_size)).float()
    lam = lam.clamp(max=1 - 2**-24)  # a mixed sample is never clean by rounding
    if with_replacement:
        count = math.floor(batch_size * (1 - mix_fraction) + 1e-9)
        clean = torch.randint(batch_size, (count,), generator=generator)
    else:
        clean = torch.randperm(batch_size, generator=generator)[round(mix_fraction * batch_size) :]
    lam[clean] = 1.0
    return MixupPlan(index_a, index_b, lam)


def apply_mixup(
    inputs: Tensor, labels: Tensor, *, index_a: Tensor, index_b: Tensor, lam: Tensor, num_classes: int
) -> tuple[Tensor, Tensor]:
    """Mix a batch by a plan.

    Args:
        inputs: (b, ...), floating point; not written to.
        labels: class ids (b,), or distributions (b, num_classes).
        index_a: first sample of each mix (b,).
        index_b: second sample (b,).
        lam: share of the first (b,), 0 to 1.
        num_classes: of the targets.

    Returns:
        Inputs like those given, and targets (b, num_classes) whose rows sum to 1.
    """
    if not inputs.is_floating_point():
        raise InputError(f"inputs has type {inputs.dtype}, but must be of floating point to be mixed")
    if not len(inputs) == len(labels) == len(index_a) == len(index_b) == len(lam):
        sizes = [len(inputs), len(labels), len(index_a), len(index_b), len(lam)]
        raise InputError(f"inputs, labels, index_a, index_b and lam have lengths {sizes}, but must have one length")
    if labels.ndim > 1 and labels.shape[1] != num_classes:
        raise InputError(f"labels has {labels.shape[1]} classes, but must have num_classes, which is {num_classes}")
    if labels.ndim == 1 and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        span = f"{int(labels.min())} to {int(labels.max())}"
        raise InputError(f"labels has classes {span}, but must have 0 to {num_classes - 1}")
    for bound in (lam.min(), lam.max()):
        in_range("lam", float(bound), 0, 1)
    index_a, index_b = index_a.to(inputs.device), index_b.to(inputs.device)
    share = lam.to(inputs).view(-1, *[1] * (inputs.ndim - 1))
    mixed = share * inputs[index_a] + (1 - share) * inputs[index_b]
    rows = (labels if labels.ndim > 1 else F.one_hot(labels.long(), num_classes)).to(inputs.device, lam.dtype)
    weight = lam.to(inputs.device)[:, None]
    return mixed, weight * rows[index_a] + (1 - weight) * rows[index_b]


def _standardised(name: str, logits: Tensor, eps: float, *, detach: bool = False) -> Tensor:
    """Logits divided by the standard deviation (n - 1) of each sample's own."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if eps == 0 and bool((wide.amax(-1) == wide.amin(-1)).any()):
        raise InputError(f"{name} holds a sample whose logits are all equal, but must not, unless eps is above 0")
    return wide / ((wide.detach() if detach else wide).std(-1, keepdim=True) + eps)


def std_scaled_distill_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    soft_targets: Tensor,
    *,
    gamma: float = 0.1,
    alpha: float = 0.9,
    detach_std: bool = False,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(gamma * cross entropy, alpha * KL) of logits scaled by their spread (section 4), means over samples.

    Args:
        student_logits: (samples, classes), at least 2 classes.
        teacher_logits: likewise; no gradient goes into them.
        soft_targets: (samples, classes), rows summing to 1.
        gamma: weight of cross entropy.
        alpha: weight of KL(teacher || student).
        detach_std: take the student's std for a constant.
        eps: added to both stds. At 0, the loss does not depend on the size of the logits at all.

    Raises:
        InputError: for a sample of equal logits at eps 0, whose std is 0.
    """
    check_pair(student_logits, teacher_logits)
    in_range("eps", eps, 0)
    if student_logits.ndim != 2 or student_logits.shape[1] < 2:
        shape = tuple(student_logits.shape)
        raise InputError(f"student_logits has shape {shape}, but must be (samples, classes) with at least 2 classes")
    if soft_targets.shape != student_logits.shape:
        shape = tuple(soft_targets.shape)
        raise InputError(f"soft_targets has shape {shape}, but must have the logits', {tuple(student_logits.shape)}")
    log_p = _standardised("student_logits", student_logits, eps, detach=detach_std).log_softmax(-1)
    log_q = _standardised("teacher_logits", teacher_logits.detach(), eps).log_softmax(-1)
    ce = -(soft_targets.to(log_p) * log_p).sum(-1).mean()
    return gamma * ce, alpha * F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")


class MixupDistillation(Callback):
    """Mixes batches, and has the loss for what student and teacher say of them:

        mix = MixupDistillation()
        fit(student, data, mix.objective(teacher), callbacks=[mix])

    or, in a loop of one's own, `mixed, soft = mix.on_batch(inputs, labels)` and
    `mix.loss(student(mixed), teacher(mixed), soft)`.

    Args:
        beta: of the Beta distribution of shares.
        mix_fraction: part of a batch that is mixed; 1 is full mixup, 0 none.
        with_replacement: as in `sample_mixup`.
        gamma: weight of cross entropy.
        alpha: weight of KL.
        scaling: "std" by each sample's spread; "temperature" is ordinary distillation on the mixed batch.
        temperature: of KL where scaling is "temperature", with the factor T^2.
        detach_std: take the student's std for a constant.
        eps: added to the stds.
        num_classes: of the targets; asked of the model in `fit` if None.
        generator: of the draws outside of `fit`; there, the run's own is used.
    """

    def __init__(
        self,
        *,
        beta: float = 1.0,
        mix_fraction: float = 0.1,
        with_replacement: bool = False,
        gamma: float = 0.1,
        alpha: float = 0.9,
        scaling: Literal["std", "temperature"] = "std",
        temperature: float = 4.0,
        detach_std: bool = False,
        eps: float = 0.0,
        num_classes: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        positive("beta", beta)
        in_range("mix_fraction", mix_fraction, 0, 1)
        in_range("gamma", gamma, 0)
        in_range("alpha", alpha, 0)
        one_of("scaling", scaling, ("std", "temperature"))
        positive("temperature", temperature)
        in_range("eps", eps, 0)
        self.drawn: dict[str, Any] = {
            "beta": beta,
            "mix_fraction": mix_fraction,
            "with_replacement": with_replacement,
        }
        self.gamma, self.alpha, self.scaling, self.temperature = gamma, alpha, scaling, temperature
        self.detach_std, self.eps = detach_std, eps
        self.num_classes, self.generator = num_classes, generator
        self.classes = num_classes

    def on_start(self, run: Run) -> None:
        self.classes = self.num_classes

    def on_batch(self, run: Any, batch: Any) -> Any:
        """In `fit`, (run, batch) -> batch; in a loop of one's own, (inputs, labels) -> (mixed inputs, soft targets)."""
        if not isinstance(run, Run):
            return self._mixed(run, batch, self.num_classes, seeds.fresh(self.generator))
        inputs, labels = unpack(batch)
        if labels is None:
            raise InputError("The batch has no targets, but mixup mixes them: samples must be (input, target)")
        if not isinstance(labels, Tensor):
            raise InputError("The batch brings its teacher's answers, but mixes are new: ask the teacher at every step")
        if self.classes is None:
            self.classes = count_classes(run.module, [batch])
        values = inputs if isinstance(inputs, Tensor) else first_tensor(inputs)
        if values is None or (not isinstance(inputs, Tensor) and len(inputs) != 1):
            raise InputError("The batch has several inputs, but mixup takes one tensor, such as pixel_values")
        mixed, soft = self._mixed(values, labels, self.classes, run.generator)
        return (mixed if isinstance(inputs, Tensor) else {next(iter(inputs)): mixed}), soft

    def _mixed(
        self, inputs: Tensor, labels: Tensor, classes: int | None, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        if classes is None:
            if labels.ndim == 1:
                raise InputError("num_classes is None, but must be given outside of fit where labels are class ids")
            classes = labels.shape[1]
        plan = sample_mixup(len(inputs), generator=generator, **self.drawn)
        return apply_mixup(inputs, labels, **plan._asdict(), num_classes=classes)

    def loss(self, student_logits: Tensor, teacher_logits: Tensor, soft_targets: Tensor) -> dict[str, Tensor]:
        """{"ce", "kl"}, both weighted."""
        if self.scaling == "std":
            settings: dict[str, Any] = {"gamma": self.gamma, "alpha": self.alpha}
            settings |= {"detach_std": self.detach_std, "eps": self.eps}
            ce, kl = std_scaled_distill_loss(student_logits, teacher_logits, soft_targets, **settings)
        else:
            check_pair(student_logits, teacher_logits)
            ce = self.gamma * F.cross_entropy(student_logits, soft_targets.to(student_logits))
            kl = self.alpha * softened_kl(student_logits, teacher_logits, temperature=self.temperature)
        return {"ce": ce, "kl": kl}

    def objective(self, teacher: nn.Module) -> Distillation:
        """The objective of `fit`: both are asked about the mixed inputs.

        Args:
            teacher: kept as a frozen copy in eval mode, so that mixes do not shift its batch statistics.
        """

        def mixup_kd(student: Answer, teacher: Answer, labels: Tensor | None) -> dict[str, Tensor]:
            if labels is None or labels.ndim != 2:
                raise InputError("The batch has no soft targets: give fit callbacks=[...] this MixupDistillation")
            return self.loss(student.logits, teacher.logits, labels)

        return Distillation(teacher, mixup_kd)


def recipe(
    student: nn.Module,
    teacher: nn.Module,
    data: Any,
    validation: Any = None,
    *,
    beta: float = 1.0,
    mix_fraction: float = 0.1,
    with_replacement: bool = False,
    gamma: float = 0.1,
    alpha: float = 0.9,
    scaling: str = "std",
    temperature: float = 4.0,
) -> Recipe:
    """Teach a classifier on mixed samples.

    Args:
        student: classifier to train.
        teacher: classifier of the same classes, trained without mixup.
        data: labelled samples that can be averaged.
        validation: not used.
        beta: of the Beta distribution of shares; 1 is uniform.
        mix_fraction: part of every batch that is mixed; 1 is full mixup.
        with_replacement: draw the clean samples with replacement, as the official code does.
        gamma: weight of cross entropy.
        alpha: weight of KL.
        scaling: "std" by each sample's spread, or "temperature" for ordinary distillation on mixed batches.
        temperature: of KL where scaling is "temperature".
    """
    mix = MixupDistillation(
        beta=beta,
        mix_fraction=mix_fraction,
        with_replacement=with_replacement,
        gamma=gamma,
        alpha=alpha,
        scaling=scaling,  # type: ignore[arg-type]
        temperature=temperature,
    )
    return Recipe(model=student, data=data, objective=mix.objective(teacher), callbacks=[mix])
