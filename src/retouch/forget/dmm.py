"""Datamodel Matching: predict what a retrained model would say, and fine-tune the trained one to say it.

A datamodel beta[i, x, c] is the effect of training point i on logit c at point x: a linear model from which points
were trained on to the logits, fitted to many models trained on random halves of the data. The oracle that was never
trained is then simulated, and the given model is matched to it:

    simulated oracle    h(x) = f(x; theta_0) - mu * sum over i in F of beta[i, x, :]
    match               minimise |f(x; theta) - h(x)|^2  over the forget set F and a sample of the rest

The base is the model's own logits, not the datamodel's intercept, so every model keeps its own randomness. Labels are
not used.

Use it for forget sets that are not special in any way, random samples and small subpopulations, where methods that
raise the loss fail: it aims at the retrained model's outputs and not at a loss. The subset models are paid once and
serve every request. Do not use it where one removal changes more than a linear model of random halves has seen, such
as a whole class: no random half was without it.

Paper: arXiv 2410.23232 (DM-Direct is `simulated_oracle_logits`, DMM is `datamodel_matching`, Oracle Matching, an
upper bound with really retrained models, is `oracle_matching`). Code: the evaluation is RoyRin/data-unlearning-bench.
The paper fits sparse linear models to 1,000 to 20,000 subset models; ridge regression is our stand-in for fewer of
them, "lasso" the paper's. The benchmark reports KLoM (`core.metrics.unlearning.klom`, also importable from here).

Cost: the subset models, once; then `epochs` short passes with one forward pass of the frozen model beside each.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from retouch.core import seeds
from retouch.core.batches import Shuffled, in_order
from retouch.core.cards import Card
from retouch.core.data import as_dataset, concat, in_memory, indexed, subset
from retouch.core.ensemble import train_many
from retouch.core.errors import InputError, in_range, one_of, positive
from retouch.core.loop import Run, fit
from retouch.core.metrics.unlearning import classification_margins, klom
from retouch.core.models import Batch, count_classes, device_of, forward, logits_of, own
from retouch.core.teachers import Teacher

__all__ = [
    "CARD",
    "classification_margins",
    "datamodel_matching",
    "dmm",
    "fit_datamodels",
    "fresh_like",
    "half_subsets",
    "klom",
    "matching_indices",
    "oracle_matching",
    "simulated_oracle_logits",
]

CARD = Card(
    title="Datamodel Matching",
    room="forget",
    paper="arXiv:2410.23232",
    shape="model edit",
    line="Predicts the retrained model's logits from data attribution and fine-tunes the model to match them.",
    tags=("classification", "no labels", "data attribution", "fine-tuning"),
)

# --- datamodels -----------------------------------------------------------------------------------------------------

STRENGTHS = tuple(10.0**power for power in torch.arange(-2.0, 4.5, 0.5).tolist())


def half_subsets(count: int, num_train: int, *, share: float = 0.5, seed: int = 0) -> Tensor:
    """Boolean masks (count, num_train) of random subsets that hold exactly int(share * num_train) points each."""
    positive("count", count)
    in_range("share", share, 0, 1, above=True)
    scores = torch.rand(count, num_train, generator=seeds.generator(seed, "subsets"))
    size = max(1, int(share * num_train))
    return torch.zeros(count, num_train, dtype=torch.bool).scatter_(1, scores.topk(size, dim=1).indices, True)


def fit_datamodels(masks: Tensor, outputs: Tensor, *, method: str = "ridge", strength: float | None = None) -> Tensor:
    """Effect of every training point on every output, from models trained on subsets (section 2).

    Args:
        masks: which of N points each of M models was trained on, (M, N), boolean or 0/1.
        outputs: the models' logits at X points, (M, X, k).
        method: "ridge" or "lasso"; the intercept is not penalised.
        strength: of the penalty. For ridge, None takes the one of 10^-2 to 10^4 with the least leave-one-out error; 0
            is least squares. For lasso, None takes scikit-learn's cross-validation over all targets' mean.

    Returns:
        (N, X, k), in the outputs' dtype; the intercept is left out.
    """
    one_of("method", method, ("ridge", "lasso"))
    if masks.ndim != 2 or outputs.ndim != 3 or len(masks) != len(outputs):
        raise InputError(
            f"masks and outputs have shapes {tuple(masks.shape)} and {tuple(outputs.shape)}, "
            "but must be (models, points) and (models, evaluation points, classes)"
        )
    if strength is not None:
        in_range("strength", strength, 0)
    a = masks.double() - masks.double().mean(0)
    b = outputs.double().flatten(1)
    b = b - b.mean(0)
    beta = _ridge(a, b, strength) if method == "ridge" else _lasso(a, b, strength)
    return beta.view(masks.shape[1], *outputs.shape[1:]).to(outputs.dtype)


def _ridge(a: Tensor, b: Tensor, strength: float | None) -> Tensor:
    """Ridge regression of centred targets on centred inputs, one factorisation for all targets."""
    u, s, vt = torch.linalg.svd(a, full_matrices=False)
    kept = s > s[0] * 1e-10
    u, s, vt = u[:, kept], s[kept], vt[kept]
    projected = u.T @ b
    if strength is None:
        strength = min(STRENGTHS, key=lambda value: _leave_one_out(u, s, b, projected, value))
    return vt.T @ ((s / (s.square() + strength))[:, None] * projected)


def _leave_one_out(u: Tensor, s: Tensor, b: Tensor, projected: Tensor, strength: float) -> float:
    """Mean squared error of predicting each row from all others, in closed form (one row for the intercept)."""
    shrink = s.square() / (s.square() + strength)
    residual = b - u @ (shrink[:, None] * projected)
    leverage = (u.square() * shrink).sum(1) + 1 / len(b)
    return float((residual / (1 - leverage).clamp_min(1e-12)[:, None]).square().mean())


def _lasso(a: Tensor, b: Tensor, strength: float | None) -> Tensor:
    from sklearn.linear_model import Lasso, LassoCV

    # Nothing here is random, but without a seed of ours scikit-learn draws one from numpy's global generator.
    x, y = a.numpy(), b.numpy()
    if strength is None:
        strength = float(LassoCV(cv=5, random_state=0).fit(x, y.mean(1)).alpha_)
    lasso = Lasso(alpha=strength, fit_intercept=False, random_state=0)
    return torch.from_numpy(lasso.fit(x, y).coef_).view(b.shape[1], -1).T


# --- matching -------------------------------------------------------------------------------------------------------


def _check_forget(forget_indices: Sequence[int] | Tensor, num_train: int) -> Tensor:
    rows = torch.as_tensor(forget_indices, dtype=torch.long)
    outside = rows[(rows < 0) | (rows >= num_train)]
    if len(outside):
        raise InputError(f"forget_indices holds {int(outside[0])}, but must be between 0 and {num_train - 1}")
    values, counts = rows.unique(return_counts=True)
    if len(values) < len(rows):
        raise InputError(f"forget_indices holds {int(values[counts > 1][0])} twice, but every one must be different")
    return rows


def simulated_oracle_logits(
    logits: Tensor, datamodel: Tensor, forget_indices: Any, index: Any, *, multiplier: float = 1.0
) -> Tensor:
    """What a model trained without the forget set would say: logits - multiplier * sum of the forget points' effects.

    Args:
        logits: of the model to unlearn, at the evaluation points `index`, (n, k).
        datamodel: (N, X, k).
        forget_indices: of training points, each once.
        index: evaluation points of the rows of `logits`, (n,).
        multiplier: of the effect; 1 in the paper.
    """
    if datamodel.ndim != 3 or datamodel.shape[2] != logits.shape[-1]:
        raise InputError(
            f"datamodel has shape {tuple(datamodel.shape)}, but must be (training points, evaluation points, "
            f"{logits.shape[-1]} classes of the logits)"
        )
    rows = _check_forget(forget_indices, len(datamodel))
    where = torch.as_tensor(index, dtype=torch.long)
    return logits - multiplier * datamodel[rows].sum(0)[where].to(logits)


def matching_indices(
    forget_indices: Any,
    num_train: int,
    *,
    retain_multiplier: float = 3.0,
    forget_multiplier: float = 1.0,
    seed: int = 42,
) -> Tensor:
    """Training points to fine-tune on: the forget points, repeated, and a random part of the others.

    Args:
        forget_indices: each once.
        num_train: training points in all.
        retain_multiplier: retained points drawn, as a multiple of the forget points.
        forget_multiplier: how often each forget point comes; a fraction takes the first of them once more.
        seed: of the draw.
    """
    in_range("retain_multiplier", retain_multiplier, 0)
    in_range("forget_multiplier", forget_multiplier, 0)
    rows = _check_forget(forget_indices, num_train)
    whole, part = divmod(forget_multiplier, 1)
    kept = torch.ones(num_train, dtype=torch.bool)
    kept[rows] = False
    others, wanted = kept.nonzero().squeeze(1), int(retain_multiplier * len(rows))
    if wanted > len(others):
        raise InputError(
            f"retain_multiplier is {retain_multiplier}, which asks for {wanted} retained points, but there are only "
            f"{len(others)}: it must be at most {len(others) / max(len(rows), 1):.3g}"
        )
    drawn = others[torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))[:wanted]]
    return torch.cat([rows.repeat(int(whole)), rows[: int(part * len(rows))], drawn])


Target = Callable[[nn.Module, Any, Tensor], Tensor]  # (frozen model, inputs, training points) -> outputs


def _match(
    model: nn.Module,
    dataset: Any,
    rows: Tensor,
    target: Target,
    *,
    epochs: int = 5,
    lr: float = 5e-4,
    batch_size: int = 512,
    loss: str = "mse",
    weight_decay_to_start: float = 0.0,
    seed: int = 0,
    inplace: bool = False,
) -> nn.Module:
    """Fine-tune towards a target on these rows of the data (section 4); labels are not read."""
    positive("lr", lr)
    positive("epochs", epochs)
    in_range("weight_decay_to_start", weight_decay_to_start, 0)
    frozen, edited = Teacher(model), own(model, inplace=inplace)
    if len(rows) == 0:
        return edited
    start = [parameter.detach().clone() for parameter in edited.parameters()]

    def match(model: nn.Module, batch: Batch, run: Run) -> dict[str, Tensor]:
        inputs, index = batch
        wanted, logits = target(frozen, inputs, index), logits_of(forward(model, inputs))
        distance = F.mse_loss(logits, wanted) if loss == "mse" else F.cross_entropy(logits, wanted)
        if weight_decay_to_start == 0:
            return {"match": distance}
        moved = [(p - s).square().sum() for p, s in zip(run.module.parameters(), start, strict=True)]
        return {"match": distance, "to_start": weight_decay_to_start * torch.stack(moved).sum()}

    batches = Shuffled(subset(indexed(dataset), rows), batch_size, seed=seed)

    def slower_each_epoch(optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
        return LambdaLR(optimizer, lambda step: 0.95 ** (step // len(batches)))

    fit(
        edited,
        batches,
        match,
        epochs=epochs,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=lr),
        scheduler=slower_each_epoch,
        seed=seed,
    )
    return edited


def datamodel_matching(
    model: nn.Module,
    dataset: Any,
    forget_indices: Any,
    datamodel: Tensor,
    *,
    epochs: int = 5,
    lr: float = 5e-4,
    batch_size: int = 512,
    retain_multiplier: float = 3.0,
    forget_multiplier: float = 1.0,
    multiplier: float = 1.0,
    loss: str = "mse",
    weight_decay_to_start: float = 0.0,
    seed: int = 42,
    inplace: bool = False,
) -> nn.Module:
    """DMM: fine-tune a model to the simulated oracle.

    Args:
        model: classifier trained on the whole data set.
        dataset: training data without random augmentation; sample i is training point i.
        forget_indices: training points to forget, each once.
        datamodel: effects (N, X, k) whose first N evaluation points are the training points.
        epochs: passes over the matching set, the learning rate falling by 5% with each.
        lr: learning rate of Adam.
        batch_size: samples a batch.
        retain_multiplier: retained points in the matching set, as a multiple of the forget points.
        forget_multiplier: how often each forget point is in it.
        multiplier: of the effect; 1 in the paper.
        loss: "mse" on logits, or "ce" against the simulated oracle's softmax.
        weight_decay_to_start: weight of the squared distance to the given weights.
        seed: of the draw of retained points and the orders.
        inplace: train the given model instead of a copy.
    """
    one_of("loss", loss, ("mse", "ce"))
    data = indexed(dataset)
    count, classes = len(data), count_classes(model, in_order(data, 1))
    if datamodel.ndim != 3 or len(datamodel) != count or datamodel.shape[1] < count or datamodel.shape[2] != classes:
        raise InputError(
            f"datamodel has shape {tuple(datamodel.shape)}, but must be ({count} training points, at least {count} "
            f"evaluation points, {classes} classes)"
        )
    rows = _check_forget(forget_indices, count)
    effect = (multiplier * datamodel[rows].sum(0)).to(device_of(model))

    def simulated(frozen: nn.Module, inputs: Any, index: Tensor) -> Tensor:
        logits = logits_of(forward(frozen, inputs))
        oracle = logits - effect[index].to(logits)
        return oracle if loss == "mse" else oracle.softmax(-1)

    multipliers = {"retain_multiplier": retain_multiplier, "forget_multiplier": forget_multiplier}
    return _match(
        model,
        dataset,
        matching_indices(rows, count, seed=seed, **multipliers),
        simulated,
        epochs=epochs,
        lr=lr,
        batch_size=batch_size,
        loss=loss,
        weight_decay_to_start=weight_decay_to_start,
        seed=seed,
        inplace=inplace,
    )


def oracle_matching(
    model: nn.Module,
    oracles: Sequence[nn.Module],
    dataset: Any,
    forget_indices: Any,
    *,
    retain_multiplier: float = 3.0,
    forget_multiplier: float = 1.0,
    loss: str = "mse",
    seed: int = 42,
    **training: Any,
) -> nn.Module:
    """Fine-tune a model to the mean output of models that were really retrained without the forget set: DMM's limit.

    Args:
        model: classifier trained on the whole data set.
        oracles: retrained models; 10 in the paper.
        dataset: as for `datamodel_matching`.
        forget_indices: likewise.
        retain_multiplier: likewise.
        forget_multiplier: likewise.
        loss: "mse" against mean logits, or "ce" against the mean softmax.
        seed: likewise.
        training: further keywords of `datamodel_matching`.
    """
    one_of("loss", loss, ("mse", "ce"))
    if not oracles:
        raise InputError("oracles is empty, but must hold at least one retrained model")
    teachers = [Teacher(oracle) for oracle in oracles]

    def mean_oracle(frozen: nn.Module, inputs: Any, index: Tensor) -> Tensor:
        logits = torch.stack([logits_of(forward(teacher, inputs)) for teacher in teachers])
        return (logits if loss == "mse" else logits.softmax(-1)).mean(0)

    rows = matching_indices(
        forget_indices,
        len(as_dataset(dataset)),
        retain_multiplier=retain_multiplier,
        forget_multiplier=forget_multiplier,
        seed=seed,
    )
    return _match(model, dataset, rows, mean_oracle, loss=loss, seed=seed, **training)


# --- the room's contract --------------------------------------------------------------------------------------------


def fresh_like(model: nn.Module) -> Callable[[], nn.Module]:
    """A function that makes untrained models of the same architecture."""
    config = getattr(model, "config", None)
    kind = type(model)
    if isinstance(config, dict):
        return lambda: kind(**config)
    if hasattr(config, "to_dict"):  # transformers
        return lambda: kind(copy.deepcopy(config))
    raise InputError(f"{kind.__name__} has no config to build untrained models from: give build=, a function")


def dmm(
    model: nn.Module,
    forget: Any,
    retain: Any,
    *,
    datamodel: Tensor | None = None,
    build: Callable[[], nn.Module] | None = None,
    models: int = 256,
    model_epochs: int = 30,
    model_lr: float = 1e-2,
    model_batch_size: int = 64,
    epochs: int = 5,
    lr: float = 5e-4,
    batch_size: int = 512,
    retain_multiplier: float = 3.0,
    forget_multiplier: float = 1.0,
    multiplier: float = 1.0,
    loss: str = "mse",
    seed: int = 42,
    inplace: bool = False,
) -> nn.Module:
    """Forget some of the training samples of a classifier; labels are read for the subset models only.

    Args:
        model: classifier that was trained on both data sets.
        forget: samples to forget; no random augmentation.
        retain: all other training samples.
        datamodel: effects (N, N, k) over the forget samples and then the retain samples, if there are any from
            before.
        build: makes an untrained model for the subset models; one like the given model if None.
        models: subset models to train, on random halves; more predict better, 1,000 and more in the paper.
        model_epochs: passes of each subset model. Their recipe should be the one the given model was trained with.
        model_lr: highest learning rate of their one-cycle schedule (AdamW).
        model_batch_size: samples a batch of a subset model.
        epochs: passes over the matching set.
        lr: learning rate of matching (Adam).
        batch_size: samples a batch of matching.
        retain_multiplier: retained points in the matching set, as a multiple of the forget points; cut to what is
            there.
        forget_multiplier: how often each forget point is in it.
        multiplier: of the predicted effect.
        loss: "mse" on logits, or "ce" against the simulated oracle's softmax.
        seed: of subsets, subset models, the matching set and orders.
        inplace: train the given model instead of a copy.
    """
    data = in_memory(concat(forget, retain))
    count, total = len(as_dataset(forget)), len(data)
    if count == 0:
        return own(model, inplace=inplace)  # before any subset model is trained for nothing
    if datamodel is None:
        masks = half_subsets(models, total, seed=seed)
        ensemble = train_many(
            build or fresh_like(model),
            data,
            masks,
            epochs=model_epochs,
            batch_size=model_batch_size,
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=model_lr, weight_decay=0.1),
            scheduler=lambda optimizer, steps: OneCycleLR(optimizer, model_lr, total_steps=steps),
            seed=seed,
        )
        datamodel = fit_datamodels(masks, ensemble.logits(data.inputs))
    return datamodel_matching(
        model,
        data,
        range(count),
        datamodel,
        epochs=epochs,
        lr=lr,
        batch_size=batch_size,
        retain_multiplier=min(retain_multiplier, (total - count) / count),
        forget_multiplier=forget_multiplier,
        multiplier=multiplier,
        loss=loss,
        seed=seed,
        inplace=inplace,
    )
