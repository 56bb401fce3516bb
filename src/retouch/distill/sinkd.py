"""SinKD: match the set of a student's predictions in a batch to the teacher's by optimal transport.

Every student prediction p_i of a batch is compared with every teacher prediction q_j, not with its partner alone:

    cost     C_ij = sum_k |p_ik - q_jk|
    plan     P from exp(-C / epsilon), rows and then columns scaled to sum 1, n times
    loss     sum_ij P_ij C_ij     added to cross entropy and KL

KL explodes and reverse KL and Jensen-Shannon lose their gradients where the two hardly overlap; this cost is bounded
by 2 a sample and keeps a gradient. Use it beside KL where students are far from their teacher; where KL already works,
expect a tie. It depends on the batch, whose size it grows with (`reduction="sum"`), and sees one process's part only.

Paper: arXiv 2402.17110 (section 3). Code: 2018cx/SinKD. Where they part: a factor of 0.001 on the summed cost is in the
code alone (`scale=0.001, reduction="sum"`); here the mean over samples is the default. In the released loop the term is
added only by accident of a flag. Its variant for language models softens over time instead of the vocabulary: flatten
the supervised positions to (N, vocabulary) instead, which `SinKD` does.

Cost: b^2 d for the distances and n b^2 for the plan; little beside a forward pass for batches up to 64.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retouch.core.cards import Card
from retouch.core.distillation import Answer, Distillation, check_pair
from retouch.core.errors import InputError, in_range, one_of, positive
from retouch.core.recipe import Recipe

CARD = Card(
    title="SinKD: Sinkhorn distillation",
    room="distill",
    paper="arXiv:2402.17110",
    shape="objective",
    line="Matches the set of predictions in a batch to the teacher's by optimal transport.",
    tags=("classification", "language models", "optimal transport", "logits"),
    plugin="SinKD",
)

CHUNK = 2**24  # elements of the (n, m, classes) differences held at once


def _cost(p: Tensor, q: Tensor, power: float) -> Tensor:
    """sum_k |p_ik - q_jk|^power for all pairs (n, m), without holding (n, m, classes) for large vocabularies."""
    if power == 1:
        return torch.cdist(p, q, p=1)
    rows = max(1, CHUNK // max(q.numel(), 1))
    return torch.cat([(part[:, None] - q).abs().pow(power).sum(-1) for part in p.split(rows)])


def sinkhorn_plan(
    p: Tensor,
    q: Tensor,
    *,
    epsilon: float = 0.1,
    n_iters: int = 20,
    log_domain: bool = True,
    cost_p: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Entropic transport plan between two sets of distributions, and its cost (section 3.2).

    Args:
        p: distributions (n, classes).
        q: distributions (m, classes).
        epsilon: > 0; weight of the entropy. Small values need `log_domain`.
        n_iters: scalings of rows, then columns.
        log_domain: scale logarithms, which does not underflow.
        cost_p: exponent of the cost sum_k |p_k - q_k| ^ cost_p.

    Returns:
        (plan, cost), both (n, m); columns of the plan sum to 1, rows nearly so.
    """
    positive("epsilon", epsilon)
    positive("n_iters", n_iters)
    positive("cost_p", cost_p)
    cost = _cost(p, q, cost_p)
    if log_domain:
        plan = -cost / epsilon
        for _ in range(n_iters):
            plan = plan - plan.logsumexp(1, keepdim=True)
            plan = plan - plan.logsumexp(0, keepdim=True)
        return plan.exp(), cost
    plan = (-cost / epsilon).exp()
    for _ in range(n_iters):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0, keepdim=True)
    return plan, cost


def sinkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 2.0,
    epsilon: float = 0.1,
    n_iters: int = 20,
    scale: float = 1.0,
    reduction: Literal["mean", "sum"] = "mean",
    unroll: bool = True,
) -> Tensor:
    """Transport cost between the predictions of a batch; the official setting is scale 0.001, reduction "sum".

    Args:
        student_logits: (n, classes), at least 2 classes.
        teacher_logits: (n, classes); no gradient goes into them.
        temperature: > 0, of both softmaxes.
        epsilon: > 0; weight of the entropy.
        n_iters: scalings of the plan.
        scale: of the result.
        reduction: "mean" is the cost a sample, 0 to 2; "sum" grows with the batch.
        unroll: let gradients run through the scalings; without, the plan is a constant, which costs less and differs
            little once it has converged.

    Raises:
        InputError: for logits of another shape, a single class (regression), or values that are not finite.
    """
    positive("temperature", temperature)
    one_of("reduction", reduction, ("mean", "sum"))
    check_pair(student_logits, teacher_logits)
    if student_logits.ndim != 2:
        raise InputError(f"student_logits has shape {tuple(student_logits.shape)}, but must be (samples, classes)")
    if student_logits.shape[1] < 2:
        raise InputError(f"student_logits has {student_logits.shape[1]} class, but must have at least 2: no regression")
    for name, logits in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        if not torch.isfinite(logits).all():
            raise InputError(f"{name} holds values that are not finite, but must be finite")
    wide = torch.promote_types(student_logits.dtype, torch.float32)  # half precision has too few digits for the plan
    p = (student_logits.to(wide) / temperature).softmax(-1)
    q = (teacher_logits.detach().to(wide) / temperature).softmax(-1)
    plan, cost = sinkhorn_plan(p, q, epsilon=epsilon, n_iters=n_iters)
    total = ((plan if unroll else plan.detach()) * cost).sum()
    return scale * (total / len(p) if reduction == "mean" else total)


class SinKDLoss(nn.Module):
    """(1 - alpha) cross entropy + alpha KL + beta transport cost, as named terms and their total.

    The KL term is the soft-target cross entropy at `kd_temperature` without the factor T^2, as in the released code.

    Args:
        alpha: weight of the KL term against cross entropy, 0 to 1.
        beta: weight of the transport cost.
        kd_temperature: of the KL term.
        settings: further keywords of `sinkd_loss`.
    """

    def __init__(self, *, alpha: float = 0.8, beta: float = 0.8, kd_temperature: float = 2.0, **settings: Any) -> None:
        super().__init__()
        in_range("alpha", alpha, 0, 1)
        in_range("beta", beta, 0)
        positive("kd_temperature", kd_temperature)
        self.alpha, self.beta, self.kd_temperature, self.settings = alpha, beta, kd_temperature, settings

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """{"total", "ce", "kl", "sinkhorn"}, the last three weighted."""
        soft = (teacher_logits.detach() / self.kd_temperature).softmax(-1)
        terms = {
            "ce": (1 - self.alpha) * F.cross_entropy(student_logits, labels),
            "kl": self.alpha * F.cross_entropy(student_logits / self.kd_temperature, soft),
            "sinkhorn": self.beta * sinkd_loss(student_logits, teacher_logits, **self.settings),
        }
        return {"total": terms["ce"] + terms["kl"] + terms["sinkhorn"], **terms}


class SinKD(Distillation):
    """Objective for `fit`: `SinKDLoss` between a student and its teacher.

    Logits of language models (n, tokens, vocabulary) are flattened to the positions with labels (not -100), each
    predicted from the one before.

    Args:
        teacher: as in `Distillation`.
        settings: of `SinKDLoss`.
    """

    def __init__(self, teacher: nn.Module | None, **settings: Any) -> None:
        super().__init__(teacher, self.loss_of)
        self.terms = SinKDLoss(**settings)

    def loss_of(self, student: Answer, teacher: Answer, labels: Tensor | None) -> dict[str, Tensor]:
        """The three terms."""
        if labels is None:
            raise InputError("The batch has no labels, but SinKD adds cross entropy: samples must be (input, target)")
        ours, theirs = student.logits, teacher.logits
        if ours.ndim == 3:
            told = labels[:, 1:] != -100
            ours, theirs, labels = ours[:, :-1][told], theirs[:, :-1][told], labels[:, 1:][told]
        terms = self.terms(ours, theirs, labels)
        return {name: term for name, term in terms.items() if name != "total"}


def recipe(
    student: nn.Module,
    teacher: nn.Module,
    data: Any,
    validation: Any = None,
    *,
    alpha: float = 0.8,
    beta: float = 0.8,
    kd_temperature: float = 2.0,
    temperature: float = 2.0,
    epsilon: float = 0.1,
) -> Recipe:
    """Teach a classifier with cross entropy, KL and the transport cost.

    Args:
        student: classifier to train.
        teacher: classifier of the same classes.
        data: labelled samples.
        validation: not used.
        alpha: weight of KL against cross entropy.
        beta: weight of the transport cost, a mean over samples.
        kd_temperature: of KL.
        temperature: of the transport cost.
        epsilon: weight of the plan's entropy.
    """
    transport = {"temperature": temperature, "epsilon": epsilon}
    objective = SinKD(teacher, alpha=alpha, beta=beta, kd_temperature=kd_temperature, **transport)
    return Recipe(model=student, data=data, objective=objective)
