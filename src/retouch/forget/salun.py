"""SalUn: forget by fine-tuning towards random labels, but only the weights that a forgetting loss is sensitive to.

A saliency mask picks the share `ratio` of all weights with the largest gradient of the forgetting loss at the trained
weights, and training moves nothing else:

    mask     m = 1[ |grad L_f(theta_0)| >= gamma ],  gamma the quantile over all weights together that leaves `ratio`
    weights  theta = m * (theta_0 + delta) + (1 - m) * theta_0

    classifier   minimise E_forget[CE(f(x), y')] + E_retain[CE(f(x), y)],  y' random and never the true label
    diffusion    minimise E_forget[|eps(x_t, c) - sg eps(x_t, c')|^2] + alpha * E_retain[|eps - eps(x_t, c)|^2]

Use it for whole classes or concepts when retain data is at hand and a few epochs are affordable. Its weak spot is the
learning rate: too small and nothing is forgotten, too large and both sides are wrecked; the mask widens the range that
works rather than raising the best result. Batch statistics drift in train mode also where weights may not.

Paper: arXiv 2310.12508 (equations 3 to 6). Code: OPTML-Group/Unlearn-Saliency. Where they part: the paper wants
y' != y, the code draws over all classes (`random_labels` offers both, `salun` follows the paper); the paper weights the
retain loss, the classification code passes over the forget set and then over the retain set, both with weight 1
(followed). The gradient is summed over batches before the absolute value, as in the code. Masked-out weights are
restored after every step, or momentum and weight decay would move them.

Cost: a gradient pass over the forget set, then `epochs` passes over forget and retain set.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retouch.core import seeds
from retouch.core.batches import InTurn, Together, in_order
from retouch.core.cards import Card
from retouch.core.errors import in_range, positive
from retouch.core.gradients import BatchLoss, summed_gradient
from retouch.core.loop import Callback, Run, fit
from retouch.core.masks import MaskedOptimizer, TrainOnly, top_share
from retouch.core.models import Batch, count_classes, device_of, forward, logits_of, own, to_device, unpack
from retouch.core.objectives import cross_entropy_batch

__all__ = [
    "CARD",
    "MaskedOptimizer",
    "SoftThreshold",
    "concept_shift_loss",
    "predict_noise",
    "random_labels",
    "saliency_mask",
    "salun",
    "salun_diffusion",
]

CARD = Card(
    title="SalUn: saliency-masked unlearning",
    room="forget",
    paper="arXiv:2310.12508",
    shape="model edit",
    line="Fine-tunes the weights most sensitive to the forget set towards random labels or another concept.",
    tags=("classification", "diffusion", "fine-tuning", "weight saliency"),
)


def saliency_mask(
    model: nn.Module,
    batches: Iterable[Batch],
    loss_fn: BatchLoss = cross_entropy_batch,
    *,
    ratio: float = 0.5,
    scope: str = "global",
    params: Mapping[str, Tensor] | None = None,
    clip: float | None = None,
) -> dict[str, Tensor]:
    """Mask of the weights with the largest |sum over batches of the loss gradient| (equation 3), in eval mode.

    Args:
        model: at the trained weights.
        batches: forget batches of (inputs, targets), or of what `loss_fn` takes.
        loss_fn: (model, batch) -> scalar, a batch's mean; its sign and scale do not matter.
        ratio: share of weights to keep, 0 to 1; exactly int(ratio * weights) are, ties by position.
        scope: rank all weights together ("global") or each parameter's for itself ("tensor").
        params: parameters by name; all that require gradients if None.
        clip: largest gradient norm of a batch (the diffusion code uses 1).

    Returns:
        Boolean tensors in the parameters' shapes, True where weights may move.
    """
    in_range("ratio", ratio, 0, 1)
    gradient = summed_gradient(model, batches, loss_fn, params, clip=clip)
    return top_share({name: g.abs() for name, g in gradient.items()}, ratio, scope=scope)


def random_labels(
    targets: Tensor, num_classes: int, *, exclude_true: bool = True, generator: torch.Generator | None = None
) -> Tensor:
    """Labels drawn uniformly over all classes, or over all but the true one.

    Args:
        targets: class ids (n,).
        num_classes: at least 2.
        exclude_true: never draw the true label; with two classes this is the flip.
        generator: a CPU generator.
    """
    in_range("num_classes", num_classes, 2)
    generator = seeds.fresh(generator)
    if not exclude_true:
        return torch.randint(num_classes, targets.shape, generator=generator).to(targets)
    return (targets + torch.randint(1, num_classes, targets.shape, generator=generator).to(targets)) % num_classes


class SoftThreshold(Callback):
    """SalUn-soft in place of the mask: after every step, the smallest changes since the start are set to zero.

    The share of weights held at their start decays linearly from `ratio` to 0 over the run; the others move towards
    their start by the threshold, which is the proximal step of an L1 penalty on the change.
    """

    def __init__(self, ratio: float = 0.5) -> None:
        in_range("ratio", ratio, 0, 1)
        self.ratio = ratio
        self.start: dict[str, Tensor] = {}

    def on_start(self, run: Run) -> None:
        self.start = {n: p.detach().clone() for n, p in run.module.named_parameters() if p.requires_grad}

    def state_dict(self) -> dict[str, Any]:
        return dict(self.start)  # a resumed run may begin with other weights

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, start in self.start.items():
            start.copy_(state[name])

    @torch.no_grad()
    def on_step(self, run: Run) -> None:
        named = dict(run.module.named_parameters())
        change = torch.cat([(named[name] - start).flatten() for name, start in self.start.items()])
        count = int(self.ratio * (1 - run.step / run.steps) * change.numel())
        if count == 0:
            return
        change = F.softshrink(change, float(change.abs().kthvalue(count).values))
        parts = change.split([start.numel() for start in self.start.values()])
        for (name, start), part in zip(self.start.items(), parts, strict=True):
            named[name].copy_(start + part.view_as(start))


def salun(
    model: nn.Module,
    forget: Any,
    retain: Any,
    *,
    ratio: float = 0.5,
    epochs: int = 10,
    lr: float = 0.013,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    batch_size: int = 256,
    num_classes: int | None = None,
    exclude_true: bool = True,
    soft: bool = False,
    seed: int = 0,
    inplace: bool = False,
) -> nn.Module:
    """Forget some of the training samples of a classifier.

    Args:
        model: classifier that was trained on both data sets.
        forget: samples to forget.
        retain: all other training samples, or a part of them.
        ratio: share of weights that may move.
        epochs: passes over the forget set and then the retain set.
        lr: learning rate of SGD; the one setting that must be searched, from 0.0005 to 0.1.
        momentum: of SGD.
        weight_decay: of SGD.
        batch_size: samples a batch.
        num_classes: classes to draw labels from; those of the model if None.
        exclude_true: never draw the true label, as the paper has it; the released code does draw it.
        soft: SalUn-soft, an L1 penalty on the change in place of the mask.
        seed: of orders and labels.
        inplace: train the given model instead of a copy.
    """
    in_range("ratio", ratio, 0, 1)
    positive("lr", lr)
    passes = InTurn({"forget": forget, "retain": retain}, batch_size, seed=seed)
    classes = count_classes(model, in_order(forget)) if num_classes is None else num_classes
    in_range("num_classes", classes, 2)
    edited = own(model, inplace=inplace)
    restraint: Callback
    if soft:
        restraint = SoftThreshold(ratio)
    else:
        restraint = TrainOnly(saliency_mask(edited, in_order(forget, batch_size), ratio=ratio))

    def relabel(model: nn.Module, batch: Batch, run: Run) -> Tensor:
        """Cross entropy against random labels on forget batches, against the true ones on retain batches."""
        ((part, samples),) = batch.items()
        inputs, targets = unpack(samples)
        if part == "forget":
            targets = random_labels(targets, classes, exclude_true=exclude_true, generator=run.generator)
        return F.cross_entropy(logits_of(forward(model, inputs)), targets)

    def sgd(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)

    fit(edited, passes, relabel, epochs=epochs, optimizer=sgd, callbacks=[restraint], seed=seed)
    return edited


# --- diffusion ------------------------------------------------------------------------------------------------------

Predictor = Callable[[nn.Module, Tensor, Tensor, Any], Tensor]  # (model, noisy, t, condition) -> noise


def predict_noise(model: nn.Module, noisy: Tensor, t: Tensor, condition: Any) -> Tensor:
    """Noise prediction of a diffusers UNet or transformer: class ids as `class_labels`, embeddings as text."""
    name = "encoder_hidden_states" if condition.is_floating_point() else "class_labels"
    output = model(noisy, t, **{name: condition}).sample
    return output[:, : noisy.shape[1]]  # a model that also predicts variances gives them in further channels


def concept_shift_loss(
    model: nn.Module, noisy: Tensor, t: Tensor, cond_forget: Any, cond_alternative: Any, *, predict: Predictor
) -> Tensor:
    """Mean squared distance of the prediction under one condition from that under another (equation 6, first term).

    The target comes from the current weights and carries no gradient; both see the same noisy input.

    Args:
        model: of any kind that `predict` can call.
        noisy: x_t (n, ...).
        t: timesteps (n,).
        cond_forget: condition to forget.
        cond_alternative: condition that takes its place.
        predict: (model, noisy, t, condition) -> predicted noise.
    """
    with torch.no_grad():
        target = predict(model, noisy, t, cond_alternative)
    return F.mse_loss(predict(model, noisy, t, cond_forget), target)


def _antithetic(count: int, steps: int, generator: torch.Generator) -> Tensor:
    """Timesteps in pairs t and steps - 1 - t (n,)."""
    half = torch.randint(steps, ((count + 1) // 2,), generator=generator)
    return torch.cat([half, steps - 1 - half])[:count]


def _noisy(clean: Tensor, schedule: Any, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """x_t, t and the noise, for clean samples."""
    t = _antithetic(len(clean), schedule.config.num_train_timesteps, generator).to(clean.device)
    noise = torch.randn(clean.shape, generator=generator).to(clean)
    return schedule.add_noise(clean, noise, t), t, noise


def _noise_loss(prediction: Tensor, noise: Tensor) -> Tensor:
    """Squared error, summed over a sample's elements and averaged over samples."""
    return (prediction - noise).square().flatten(1).sum(1).mean()


def salun_diffusion(
    model: nn.Module,
    forget_batches: Any,
    retain_batches: Any,
    schedule: Any,
    *,
    alternative: Callable[[Any], Any],
    alpha: float = 1e-3,
    iterations: int = 1000,
    lr: float = 1e-4,
    ratio: float = 0.5,
    unconditional: Callable[[Any], Any] | None = None,
    guidance: float = 2.0,
    params: Mapping[str, Tensor] | None = None,
    predict: Predictor = predict_noise,
    batch_size: int = 128,
    seed: int = 0,
    inplace: bool = False,
) -> nn.Module:
    """Make a conditional diffusion model give another concept where one was asked for that it should forget.

    Args:
        model: diffusers UNet2DModel, UNet2DConditionModel or DiT that predicts noise.
        forget_batches: (clean samples, condition) of the concept to forget: a data set, loader or list of batches.
        retain_batches: the same of everything else.
        schedule: diffusers scheduler with `add_noise`.
        alternative: condition of the forget samples -> condition that takes its place; (class + 1) mod classes in the
            paper's class-conditional runs.
        alpha: weight of the retain loss, which is summed over a sample's elements; 0 destroys all concepts.
        iterations: optimizer steps, each on a batch of both.
        lr: learning rate of Adam.
        ratio: share of weights that may move.
        unconditional: condition -> empty condition; if given, the mask's loss is that of the guided prediction
            (1 + guidance) * eps(c) - guidance * eps(empty), as in the released code.
        guidance: of the mask's loss; 2 for DDPM, 7.5 for Stable Diffusion.
        params: parameters by name that may be in the mask, such as those with "attn2" in it; all if None.
        predict: how the model is called.
        batch_size: samples of each kind a step, where the data does not say itself.
        seed: of orders, timesteps and noise.
        inplace: train the given model instead of a copy.
    """
    positive("lr", lr)
    in_range("alpha", alpha, 0)
    both = Together({"forget": forget_batches, "retain": retain_batches}, batch_size, seed=seed)
    edited = own(model, inplace=inplace)

    def guided_loss(model: nn.Module, batch: Batch) -> Tensor:
        clean, condition = unpack(to_device(batch, device_of(edited)))
        noisy, t, noise = _noisy(clean, schedule, draws)
        prediction = predict(model, noisy, t, condition)
        if unconditional is not None:
            empty = predict(model, noisy, t, unconditional(condition))
            prediction = (1 + guidance) * prediction - guidance * empty
        return _noise_loss(prediction, noise)

    draws, batches = seeds.generator(seed, "mask"), in_order(forget_batches, batch_size)
    mask = saliency_mask(edited, batches, guided_loss, ratio=ratio, params=params, clip=1.0)
    for name, parameter in edited.named_parameters():
        if parameter.requires_grad and name not in mask:
            mask[name] = torch.zeros_like(parameter, dtype=torch.bool)

    def shift_and_keep(model: nn.Module, batch: Batch, run: Run) -> dict[str, Tensor]:
        clean, condition = unpack(batch["forget"])
        noisy, t, _ = _noisy(clean, schedule, run.generator)
        shift = concept_shift_loss(model, noisy, t, condition, alternative(condition), predict=predict)
        clean, condition = unpack(batch["retain"])
        noisy, t, noise = _noisy(clean, schedule, run.generator)
        return {"shift": shift, "keep": alpha * _noise_loss(predict(model, noisy, t, condition), noise)}

    fit(
        edited,
        both,
        shift_and_keep,
        steps=iterations,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=lr),
        callbacks=[TrainOnly(mask)],
        clip=1.0,
        seed=seed,
    )
    return edited
