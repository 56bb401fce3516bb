"""Selective Synaptic Dampening: forget samples after training by shrinking the weights that matter far more to them.

Two passes of gradients and one edit; nothing is trained. With diagonal Fisher importances I_f of the forget set and I_D
of all training data (the forget set included), every single weight is judged by itself:

    select   I_f > alpha * I_D
    dampen   w <- min(lam * I_D / I_f, 1) * w

Use it when retraining is too dear and a few points of accuracy are not: it is the cheapest technique of the room, and
once I_D is kept, later requests need the forget samples only. Do not use it for samples that look like all others:
nothing is special to them, so little is selected.

Importances are squared gradients of the loss, averaged. The paper (arXiv 2308.07707, section 3) squares each sample's
gradient; the released code (if-loops/selective-synaptic-dampening) squares the mean gradient of each mini-batch. That
is not the same: gradients of a batch of one class add up, those of a mixed batch cancel, so that alpha changes its
meaning with the composition of the batches. `ssd_importance` offers both and squares batches by default, as released.
`ssd` squares samples, and no batches matter. Then I_f / I_D cannot exceed |D| / |D_f|, because D holds the forget set:
an alpha beyond that selects nothing, and the released alphas (10 for ResNet-18; for ViT 5 full class, 25 sub-class, 10
random), which belong to nearly class-pure batches, are upper ends of the range to search.

Label-free variant (LFSSD, arXiv 2402.19308): `loss_fn=squared_logits` with `power=1`.

Cost: one pass over all data (kept for later), one over the forget set. Limits: biases and norm gains are dampened like
all weights, buffers such as batch statistics are left; every edit takes I_D of the original model.
"""

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from retouch.core.batches import in_order
from retouch.core.cards import Card
from retouch.core.data import concat
from retouch.core.errors import InputError, in_range, positive
from retouch.core.gradients import BatchLoss, fisher_diagonal
from retouch.core.models import Batch, forward, logits_of, own, unpack
from retouch.core.objectives import cross_entropy_batch

CARD = Card(
    title="Selective Synaptic Dampening",
    room="forget",
    paper="arXiv:2308.07707",
    shape="model edit",
    line="Shrinks the weights that matter far more to the forget set than to all data; no training.",
    tags=("classification", "post hoc", "no training", "Fisher information"),
)

Importance = Mapping[str, Tensor]


def squared_logits(model: Callable[..., Any], batch: Batch) -> Tensor:
    """Mean over the batch of the squared norm of the logits: a loss without labels (LFSSD)."""
    return logits_of(forward(model, unpack(batch)[0])).square().sum(-1).mean()


def ssd_importance(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    loss_fn: BatchLoss = cross_entropy_batch,
    power: int = 2,
    per_sample: bool = False,
    params: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Importance of every parameter entry: the mean of |gradient|^power, in eval mode (section 3.1).

    Args:
        model: any module; its mode, gradients and flags are as before afterwards.
        batches: of (inputs, targets), or of what `loss_fn` takes.
        loss_fn: (model, batch) -> scalar, the batch's mean; per sample it is called on batches of one.
        power: 2 for squared gradients, 1 for absolute values (LFSSD).
        per_sample: take each sample's own gradient and average over samples, as the paper writes; otherwise take each
            batch's mean gradient and average over batches, as the released code does.
        params: parameters by name to look at; all of them if None.

    Returns:
        Detached tensors in the parameters' shapes; zeros where the loss has no gradient.

    Raises:
        InputError: if there is no batch, or a gradient is not finite.
    """
    return fisher_diagonal(model, batches, loss_fn, per_sample=per_sample, power=power, params=params)


def ssd_select(forget_imp: Importance, full_imp: Importance, *, alpha: float = 10.0) -> dict[str, Tensor]:
    """Entries to dampen, as boolean masks: I_f > alpha * I_D (equation 4, strict)."""
    positive("alpha", alpha)
    _check_pair(forget_imp, full_imp)
    return {name: imp > alpha * full_imp[name] for name, imp in forget_imp.items()}


@torch.no_grad()
def ssd_dampen(
    model: nn.Module,
    forget_imp: Importance,
    full_imp: Importance,
    *,
    alpha: float = 10.0,
    lam: float = 1.0,
    exponent: float = 1.0,
    inplace: bool = False,
) -> nn.Module:
    """Scale each selected weight by min((lam * I_D / I_f) ^ exponent, 1) (equation 5).

    No weight grows or changes sign, and what is not selected stays as it is, bit for bit.

    Args:
        model: its parameters are named like the importances.
        forget_imp: importances on the forget set.
        full_imp: importances on all training data.
        alpha: > 0; larger edits fewer weights.
        lam: >= 0; smaller dampens more, 0 removes.
        exponent: of the ratio; 1 in the paper.
        inplace: edit the given model instead of a copy.
    """
    in_range("lam", lam, 0)
    selected = ssd_select(forget_imp, full_imp, alpha=alpha)
    _check_names(model, forget_imp)
    model = own(model, inplace=inplace)
    for name, mask in selected.items():
        weight = model.get_parameter(name)
        weight.copy_(torch.where(mask, weight * _factor(forget_imp[name], full_imp[name], lam, exponent), weight))
    return model


def _factor(forget_imp: Tensor, full_imp: Tensor, lam: float, exponent: float) -> Tensor:
    """Dampening factor of every entry; where nothing is selected it means nothing."""
    return (lam * full_imp / forget_imp).pow(exponent).clamp(max=1.0)


def _check_names(model: nn.Module, importance: Importance) -> None:
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name, imp in importance.items():
        if name not in shapes:
            raise InputError(f"The importances name {name}, but the model has no such parameter")
        if tuple(imp.shape) != shapes[name]:
            raise InputError(f"The importance of {name} has shape {tuple(imp.shape)}, but must have {shapes[name]}")


def _check_pair(forget_imp: Importance, full_imp: Importance) -> None:
    missing = forget_imp.keys() ^ full_imp.keys()
    if missing:
        raise InputError(f"Only one of the importances has {', '.join(sorted(missing))}, but both must have all of it")
    for name, imp in forget_imp.items():
        if imp.shape != full_imp[name].shape:
            raise InputError(
                f"The importances of {name} have shapes {tuple(imp.shape)} and {tuple(full_imp[name].shape)}, "
                "but must have one shape"
            )


@dataclasses.dataclass(frozen=True)
class SelectionReport:
    """What an edit did.

    Attributes:
        selected: entries dampened, by parameter.
        share: the same as shares of each parameter's entries.
        mean_factor: mean factor over all selected entries; 1 if there is none.
    """

    selected: dict[str, int]
    share: dict[str, float]
    mean_factor: float


class SelectiveSynapticDampening:
    """SSD that keeps the importance of all data, so that each later request needs its forget batches only.

    Args:
        alpha: selection ratio, see `ssd_dampen`.
        lam: dampening, see `ssd_dampen`.
        importance: further keywords of `ssd_importance`.

    Attributes:
        full_imp: what `fit` kept; may be saved with `core.checkpoints.save_tensors` and set again.
        report: of the latest edit.
    """

    def __init__(self, *, alpha: float = 10.0, lam: float = 1.0, **importance: Any) -> None:
        positive("alpha", alpha)
        in_range("lam", lam, 0)
        self.alpha, self.lam, self.importance = alpha, lam, importance
        self.full_imp: dict[str, Tensor] | None = None
        self.report: SelectionReport | None = None

    def fit(self, model: nn.Module, full_batches: Iterable[Batch]) -> "SelectiveSynapticDampening":
        """Measure the importance of all training data, forget set included; the data is not needed again."""
        self.full_imp = ssd_importance(model, full_batches, **self.importance)
        return self

    def __call__(self, model: nn.Module, forget_batches: Iterable[Batch], *, inplace: bool = False) -> nn.Module:
        """Forget these batches: an edited copy, or the model itself if `inplace`."""
        if self.full_imp is None:
            raise InputError("fit(model, full_batches) must come before the first request")
        forget_imp = ssd_importance(model, forget_batches, **self.importance)
        edited = ssd_dampen(model, forget_imp, self.full_imp, alpha=self.alpha, lam=self.lam, inplace=inplace)
        masks = ssd_select(forget_imp, self.full_imp, alpha=self.alpha)
        factors = [_factor(forget_imp[n], self.full_imp[n], self.lam, 1.0)[mask] for n, mask in masks.items()]
        selected = torch.cat(factors)
        self.report = SelectionReport(
            selected={name: int(mask.sum()) for name, mask in masks.items()},
            share={name: float(mask.float().mean()) for name, mask in masks.items()},
            mean_factor=float(selected.mean()) if len(selected) else 1.0,
        )
        return edited


def ssd(
    model: nn.Module,
    forget: Any,
    retain: Any,
    *,
    alpha: float = 5.0,
    lam: float = 1.0,
    per_sample: bool = True,
    batch_size: int = 128,
    inplace: bool = False,
) -> nn.Module:
    """Forget some of the training samples of a classifier.

    Args:
        model: classifier that was trained on both data sets.
        forget: samples to forget.
        retain: all other training samples.
        alpha: how many times more important a weight must be to the forget set than to all data; larger edits fewer
            weights, and with `per_sample` none from |all data| / |forget set| on. Search 1.5 to 10.
        lam: dampening; smaller shrinks the selected weights more.
        per_sample: square each sample's gradient; otherwise each batch's mean gradient, as the released code does.
        batch_size: samples a batch.
        inplace: edit the given model instead of a copy.
    """
    edit = SelectiveSynapticDampening(alpha=alpha, lam=lam, per_sample=per_sample)
    edit.fit(model, in_order(concat(forget, retain), batch_size))
    edited = edit(model, in_order(forget, batch_size), inplace=inplace)
    if edit.report is not None and not any(edit.report.selected.values()):
        warnings.warn(f"alpha={alpha} selected no weight, so the model is unchanged: lower it", stacklevel=2)
    return edited
