"""DHKD: let the labels teach a student's classifier, and the teacher's logits a second one that is thrown away.

A student of features v = f(x) gets an auxiliary head beside its own, for training alone. With K classes and N samples:

    main head    s1 = h1(v)     cross entropy(s1, y)
    auxiliary    s2 = h2(v)     tau^2 / N  sum_nk KL(Bernoulli(1/2) || Bernoulli(sigmoid((s2 - z)_nk / tau)))
                                = tau^2 / N  sum_nk log cosh((s2 - z)_nk / (2 tau))            z: the teacher's logits
    total        gamma * cross entropy + alpha * logit loss

The logit loss asks for the logits themselves and not only for their differences: zero only at s2 = z, near it a squared
distance, far from it a line, so that its gradient never exceeds tau / (2 N). The older form, `binary_kl`, loses its
gradient where logits are large. Alignment takes out of the gradient g1 of the logit loss what points against g0, that
of cross entropy: if <g1, g0> < 0, g1 <- g1 - (<g1, g0> / |g0|^2) g0; never the reverse.

Use it to add a loss on raw logits to training with labels. On small problems one head for both losses does as well: the
collapse that the second head is to cure needs many classes and training far into neural collapse, and did not show in
our measurements (arena `distill`, tasks `two_heads` and `pairs`). Not for a teacher with other classes.

Paper: arXiv 2411.08937 (sections 3 and 4). Code: penghui-yang/DHKD. Where they part: the code computes sigmoid, clamp
and logarithm one by one, which has no gradient beyond |s2 - z| = 18 tau; here the closed form. Its alignment is over
all parameters in one vector (`"all"`), so that the projection also adds |c| g0 to the main head; `"shared"` is over
those that both losses reach. It distils for the first 50 of 100 epochs on ImageNet (`stop_after`).

Cost: one linear layer. Alignment goes backward twice, a step then takes about half as long again. Limits: the sum over
classes makes large gradients, so large learning rates diverge at alpha = 1: give `fit` clip=1.0, or a smaller alpha.
Alignment works on each micro-batch and process apart; in half precision it wants bfloat16, as gradients are unscaled.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retouch.core import seeds
from retouch.core.cards import Card
from retouch.core.distillation import Answer, Distillation, check_pair
from retouch.core.errors import InputError, in_range, one_of, positive
from retouch.core.features import capture, layer_of
from retouch.core.models import Batch, head_of, logits_of
from retouch.core.recipe import Recipe

CARD = Card(
    title="DHKD: dual-head distillation",
    room="distill",
    paper="arXiv:2411.08937",
    shape="objective",
    line="Gives the loss on the teacher's logits a second head of its own, for training only.",
    tags=("classification", "logits", "gradient conflict"),
    plugin="DHKD",
)

LOG2 = 0.6931471805599453


def _check(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> None:
    positive("temperature", temperature)
    check_pair(student_logits, teacher_logits)
    if student_logits.ndim != 2:
        raise InputError(f"student_logits has shape {tuple(student_logits.shape)}, but must be (samples, classes)")


def binary_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 2.0) -> Tensor:
    """tau^2 KL of each class's Bernoulli, teacher || student: summed over classes, mean over samples.

    Args:
        student_logits: (samples, classes).
        teacher_logits: (samples, classes); no gradient goes into them.
        temperature: tau > 0.
    """
    _check(student_logits, teacher_logits, temperature)
    t, s = teacher_logits.detach() / temperature, student_logits / temperature
    yes, no = F.logsigmoid(t) - F.logsigmoid(s), F.logsigmoid(-t) - F.logsigmoid(-s)
    return temperature**2 * (t.sigmoid() * yes + (-t).sigmoid() * no).sum() / len(s)


def binary_kl_norm(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 2.0) -> Tensor:
    """tau^2 log cosh((s - z) / (2 tau)): summed over classes, mean over samples; the method's loss (section 3).

    Args:
        student_logits: (samples, classes).
        teacher_logits: (samples, classes); no gradient goes into them.
        temperature: tau > 0; the gradient of an entry is tau / (2 samples) at most.
    """
    _check(student_logits, teacher_logits, temperature)
    a = (student_logits - teacher_logits.detach()).abs() / (2 * temperature)
    return temperature**2 * (a + F.softplus(-2 * a) - LOG2).sum() / len(a)  # log cosh a, without cosh


def align_gradients(
    primary: Sequence[Tensor | None], secondary: Sequence[Tensor | None], *, scope: Literal["all", "shared"] = "all"
) -> list[Tensor]:
    """g0 + g1 by parameter, where g1 first loses its part against g0, if it has one (section 4).

    Args:
        primary: g0, one tensor a parameter; None counts as zero.
        secondary: g1, likewise; it alone is projected.
        scope: "all" takes all parameters as one vector, as the official code does; "shared" those alone where both
            are given, and the others get what they have.

    Returns:
        One tensor a parameter; a scalar zero where neither is given.
    """
    one_of("scope", scope, ("all", "shared"))
    if not primary or len(primary) != len(secondary):
        raise InputError(
            f"primary has {len(primary)} gradients and secondary {len(secondary)}, but both must have one a parameter"
        )
    for number, (first, second) in enumerate(zip(primary, secondary, strict=True)):
        if first is not None and second is not None and first.shape != second.shape:
            raise InputError(
                f"primary[{number}] has shape {tuple(first.shape)} and secondary[{number}] {tuple(second.shape)}, but "
                "both must have the parameter's"
            )
    both = [(a, b) for a, b in zip(primary, secondary, strict=True) if a is not None and b is not None]
    against = [a for a in primary if a is not None] if scope == "all" else [a for a, _ in both]
    dot = sum(float((a.double() * b.double()).sum()) for a, b in both)
    share = dot / sum(float(a.double().square().sum()) for a in against) if dot < 0 else 0.0
    merged = []
    for first, second in zip(primary, secondary, strict=True):
        parts = [part for part in (first, second) if part is not None]
        if share and first is not None and (scope == "all" or second is not None):
            parts.append(-share * first)
        merged.append(sum(parts, torch.zeros(())))
    return merged


class DualLogits(NamedTuple):
    """(main, auxiliary) logits, both (samples, classes)."""

    logits: Tensor
    aux: Tensor


class DualHead(nn.Module):
    """A student with a second head on the input of its own; in eval mode it answers like the student alone.

    Args:
        backbone: inputs -> features (samples, width).
        head: the student's own linear classifier.
        num_classes: of both heads.
        aux: "linear", or "mlp" for Linear, Dropout, BatchNorm, ReLU, Linear.
        hidden: units of "mlp".
        dropout: of "mlp".
        seed: of the auxiliary head's weights.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        *,
        num_classes: int,
        aux: Literal["linear", "mlp"] = "linear",
        hidden: int = 200,
        dropout: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        student = nn.Sequential(OrderedDict(backbone=backbone, head=head))
        self._build(student, "head", num_classes, aux=aux, hidden=hidden, dropout=dropout, seed=seed)

    @classmethod
    def of(cls, student: nn.Module, head: str | None = None, **settings: Any) -> "DualHead":
        """A whole classifier with a second head, on whatever its own takes in; `export` gives the classifier back.

        Args:
            student: trained in place.
            head: name of its linear classifier; its last linear layer if None.
            settings: aux, hidden, dropout and seed, as above.
        """
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        name = head or head_of(student)
        classes = getattr(layer_of(student, name), "out_features", 0)
        self._build(student, name, classes, **{"aux": "linear", "hidden": 200, "dropout": 0.1, "seed": 0, **settings})
        return self

    def _build(
        self, student: nn.Module, name: str, classes: int, *, aux: str, hidden: int, dropout: float, seed: int
    ) -> None:
        one_of("aux", aux, ("linear", "mlp"))
        positive("hidden", hidden)
        in_range("dropout", dropout, 0, 1, below=True)
        head = layer_of(student, name)
        width, own = getattr(head, "in_features", None), getattr(head, "out_features", None)
        if width is None:
            raise InputError(f"head is a {type(head).__name__}, but must be a linear layer")
        if own != classes:
            raise InputError(f"num_classes is {classes}, but must be {own}, as the head has it")
        self.student, self.name = student, name
        with seeds.isolated(seeds.derive(seed, "aux")):
            layers: list[nn.Module] = [nn.Linear(width, classes)]
            if aux == "mlp":
                layers = [nn.Linear(width, hidden), nn.Dropout(dropout), nn.BatchNorm1d(hidden), nn.ReLU()]
                layers.append(nn.Linear(hidden, classes))
            weight = next(head.parameters())
            self.aux = nn.Sequential(*layers).to(weight.device, weight.dtype)

    @property
    def head(self) -> nn.Module:
        """The student's own classifier."""
        return layer_of(self.student, self.name)

    def forward(self, *args: Any, **kwargs: Any) -> DualLogits | Tensor:
        """(main, auxiliary) logits in train mode, the student's logits in eval mode."""
        if not self.training:
            return logits_of(self.student(*args, **kwargs))
        with capture(self.student, [self.name], side="input") as seen:
            main = logits_of(self.student(*args, **kwargs))
        features = seen[self.name]
        if features.ndim != 2:
            raise InputError(f"The head's input has shape {tuple(features.shape)}, but must be (samples, features)")
        return DualLogits(main, self.aux(features))

    def export(self) -> nn.Module:
        """The student with its own head: the auxiliary one is gone."""
        return self.student


class DHKDLoss(nn.Module):
    """Cross entropy on the main head and the logit loss on the auxiliary one.

    Args:
        alpha: weight of the logit loss; the paper has 1 for CIFAR-100 and 0.1 for ImageNet.
        gamma: weight of cross entropy.
        temperature: tau > 0.
        stop_after: epochs after which the logit loss is left out; None for never.
    """

    def __init__(
        self, *, alpha: float = 1.0, gamma: float = 1.0, temperature: float = 2.0, stop_after: int | None = None
    ) -> None:
        super().__init__()
        in_range("alpha", alpha, 0)
        in_range("gamma", gamma, 0)
        positive("temperature", temperature)
        if stop_after is not None:
            in_range("stop_after", stop_after, 0)
        self.alpha, self.gamma, self.temperature, self.stop_after = alpha, gamma, temperature, stop_after

    def forward(
        self, main_logits: Tensor, aux_logits: Tensor | None, teacher_logits: Tensor, labels: Tensor, *, epoch: int = 0
    ) -> dict[str, Tensor]:
        """{"total", "ce", "logit"}, the last two weighted; `epoch` counts from 0, for `stop_after`."""
        if aux_logits is None:
            raise InputError("aux_logits is None, but must be the auxiliary head's: is the model in eval mode?")
        ce = self.gamma * F.cross_entropy(main_logits, labels)
        if self.stop_after is not None and epoch >= self.stop_after:
            logit = ce.new_zeros(())
        else:
            logit = self.alpha * binary_kl_norm(aux_logits, teacher_logits, temperature=self.temperature)
        return {"total": ce + logit, "ce": ce, "logit": logit}


def _aligned(
    losses: Mapping[str, Tensor], params: Iterable[Tensor], scope: Literal["all", "shared"]
) -> list[tuple[Tensor, Tensor]]:
    """(parameter, merged gradient) for all that a loss reaches; the graph is kept."""
    params = [p for p in params if p.requires_grad]
    grads: list[Sequence[Tensor | None]] = []
    for name in ("ce", "logit"):
        if losses[name].requires_grad:
            grads.append(torch.autograd.grad(losses[name], params, retain_graph=True, allow_unused=True))
        else:
            grads.append((None,) * len(params))
    rows = [row for row in zip(params, *grads, strict=True) if row[1] is not None or row[2] is not None]
    if not rows:
        raise InputError("params has no parameter that the losses reach, but must be those of the student")
    owners, primary, secondary = zip(*rows, strict=True)
    return list(zip(owners, align_gradients(primary, secondary, scope=scope), strict=True))


def dhkd_backward(
    losses: Mapping[str, Tensor], params: Iterable[Tensor], scope: Literal["all", "shared"] = "all"
) -> None:
    """Add the aligned gradients of both terms to `.grad`, as `losses["total"].backward()` adds plain ones.

    Args:
        losses: "ce" and "logit", as `DHKDLoss` gives them; both under one loss scale, if any.
        params: of the student and both heads.
        scope: of `align_gradients`.
    """
    for parameter, gradient in _aligned(losses, params, scope):
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


class DHKD(Distillation):
    """Objective for `fit`: `fit(DualHead.of(student), data, DHKD(teacher))`, then `export()`.

    Args:
        teacher: as in `Distillation`.
        align: "all" or "shared" aligns gradients over that scope; None does not.
        settings: of `DHKDLoss`.
    """

    def __init__(
        self, teacher: nn.Module | None, *, align: Literal["all", "shared"] | None = None, **settings: Any
    ) -> None:
        one_of("align", align, ("all", "shared", None))
        super().__init__(teacher, self.loss_of, student_layers=("aux",))
        self.terms, self.align, self.epoch = DHKDLoss(**settings), align, 0

    def __call__(self, model: nn.Module, batch: Batch, run: Any = None) -> dict[str, Tensor]:
        """Both terms; with alignment, their sum has the merged gradient."""
        self.epoch = 0 if run is None else run.epoch
        if not isinstance(model if run is None else run.module, DualHead):
            raise InputError(f"The model is a {type(model).__name__}, but must be a DualHead: DualHead.of(student)")
        losses = dict(super().__call__(model, batch, run))
        if self.align is None or not losses["logit"].requires_grad:
            return losses
        rows = _aligned(losses, model.parameters(), self.align)
        lever = torch.stack([(p * g.detach()).sum() for p, g in rows]).sum()
        # The values stay; backward of their sum gives each parameter exactly its merged gradient.
        return {"ce": losses["ce"].detach() + (lever - lever.detach()), "logit": losses["logit"].detach()}

    def loss_of(self, student: Answer, teacher: Answer, labels: Tensor | None) -> dict[str, Tensor]:
        """The two terms."""
        if labels is None:
            raise InputError("The batch has no labels, but DHKD adds cross entropy: samples must be (input, target)")
        terms = self.terms(student.logits, student.features.get("aux"), teacher.logits, labels, epoch=self.epoch)
        return {name: terms[name] for name in ("ce", "logit")}


def recipe(
    student: nn.Module,
    teacher: nn.Module,
    data: Any,
    validation: Any = None,
    *,
    alpha: float = 0.1,
    gamma: float = 1.0,
    temperature: float = 2.0,
    aux: str = "linear",
    align: str | None = None,
    stop_after: int | None = None,
    seed: int = 0,
) -> Recipe:
    """Teach a classifier with labels on its own head and the teacher's logits on a second one.

    Args:
        student: classifier to train; it comes back without the second head.
        teacher: classifier of the same classes.
        data: labelled samples.
        validation: not used.
        alpha: weight of the logit loss; the paper has 1 (CIFAR-100) and 0.1 (ImageNet).
        gamma: weight of cross entropy.
        temperature: of the logit loss.
        aux: second head, "linear" or "mlp".
        align: "all" or "shared" takes out of the logit loss's gradient what works against cross entropy.
        stop_after: epochs after which the logit loss is left out.
        seed: of the second head's weights.
    """
    model = DualHead.of(student, aux=aux, seed=seed)
    settings: dict[str, Any] = {"alpha": alpha, "gamma": gamma, "temperature": temperature, "stop_after": stop_after}
    objective = DHKD(teacher, align=align, **settings)  # type: ignore[arg-type]
    return Recipe(model=model, data=data, objective=objective, finish=lambda trained: model.export())
