"""PerpGrad and StableMax: generalise at once where training otherwise only scales its logits until they overflow.

Once all training samples are right, the loss still falls by multiplying the logits with a growing factor, and in a
homogeneous network the weights grow along themselves to do that. Nothing is learnt by it, and in float32 it ends
training for good: where exp(-margin) is below 2^-24, the softmax rounds to its target and the loss is exactly 0.

    PerpGrad    c = <w, g> / <w, w>,   g' = (g - c w) |g| / |g - c w|      for each tensor w with its gradient g
    StableMax   s(x) = x + 1 for x >= 0, 1 / (1 - x) for x < 0;   p_i = s(z_i) / sum_j s(z_j)
                = softmax(t(z)) with t(z) = sign(z) log(1 + |z|),   dL/dz_j = (p_j - [j = y]) / (1 + |z_j|)

PerpGrad takes the direction of scaling out of the gradient, StableMax lets logits grow far before anything is lost. Use
them where a network fits its training data early and its test error stays, as in tasks with an exact rule; PerpGrad
with ordinary cross entropy is the quicker of the two, and both together are slower than it. Not where weights must
shrink or grow to fit (a norm's scale, a temperature: leave them out with `filter`), nor in short training far from
fitting, where there is nothing to take out.

Paper: arXiv 2501.04697. Code:
LucasPrietoAl/grokking-at-the-edge-of-numerical-stability. Followed: the rescaling to |g| and the loss in float64, which
are the code's. Parted with: its wrapper rebuilds the optimizer from parts of its settings and projects before a closure
has made the gradient; here an instance is wrapped and projection comes after the closure. Its division blows up what
rounding leaves of a gradient along w to |g|: here that is zero by default (`min_sine`), and the projection is made
twice, since once leaves a component of the order of rounding / sine. The name "perp-AdamW + StableMax" of a published
figure belongs to runs with ordinary cross entropy (an open issue of the repository).

Cost: about as much as the step of Adam, no waiting for a GPU. StableMax in float64 is dear over large
vocabularies: `compute_dtype=None` is safe in float32. Limits: weights whose shards are on several devices (FSDP) cannot
be projected. The paper trains StableMax without projection for 80 000 steps. Gradients become very small: Adam's eps
must be as well (1e-25); at 1e-8 it hides the effect.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from retouch.core.cards import Card
from retouch.core.errors import InputError, in_range, one_of
from retouch.core.loop import Callback, Run
from retouch.core.models import Batch, forward, logits_of, unpack
from retouch.core.objectives import cross_entropy, objective
from retouch.core.recipe import Recipe

CARD = Card(
    title="PerpGrad and StableMax",
    room="train",
    paper="arXiv:2501.04697",
    shape="callback",
    line="Takes the direction that only scales the weights out of the gradient, so that a fitted network generalises.",
    tags=("classification", "grokking", "numerical stability", "optimizer"),
    plugin="ProjectGradients",
)


# --- StableMax ------------------------------------------------------------------------------------------------------


def stablemax_map(x: Tensor) -> Tensor:
    """s(x) = x + 1 for x >= 0 and 1 / (1 - x) for x < 0, in place of exp(x); s(0) = 1, s(-x) s(x) = 1.

    Args:
        x: of any shape and floating dtype; overflows only where x does.
    """
    _floating("x", x)
    # One summand is constant on either side, so that no branch gives the other a gradient that is not a number.
    return F.relu(x) + 1 / (1 - x.clamp(max=0))


def _stretched(logits: Tensor) -> Tensor:
    """t(z) = log s(z) = sign(z) log(1 + |z|), with the derivative 1 at 0, where that of sign and abs would be 0."""
    return torch.log1p(logits.clamp(min=0)) - torch.log1p(F.relu(-logits))


def log_stablemax(logits: Tensor, dim: int = -1) -> Tensor:
    """Logarithm of StableMax, in the logits' dtype; finite for all finite logits.

    Args:
        logits: of any shape.
        dim: of the classes.
    """
    _floating("logits", logits)
    return F.log_softmax(_stretched(logits), dim)


def stablemax(logits: Tensor, dim: int = -1) -> Tensor:
    """Probabilities s(z_i) / sum_j s(z_j) along `dim`; their order is that of softmax."""
    return log_stablemax(logits, dim).exp()


def stablemax_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    reduction: str = "mean",
    weight: Tensor | None = None,
    ignore_index: int = -100,
    compute_dtype: torch.dtype | None = torch.float64,
) -> Tensor:
    """-log StableMax(z)_y, with the arguments of `F.cross_entropy`.

    Args:
        logits: (n, classes, ...), floating.
        targets: class ids (n, ...), or distributions in the logits' shape.
        reduction: "mean", "sum" or "none".
        weight: of each class (classes,).
        ignore_index: a class id that does not count.
        compute_dtype: that it is computed in and comes back in; float64 as in the code, None for the logits' own.
    """
    _floating("logits", logits)
    one_of("reduction", reduction, ("mean", "sum", "none"))
    if targets.is_floating_point():
        if targets.shape != logits.shape:
            raise InputError(
                f"targets has shape {tuple(targets.shape)}, but must have {tuple(logits.shape)}, as logits"
            )
    elif targets.device.type == "cpu":  # on a GPU, looking would mean waiting for it, and torch looks itself
        classes = logits.shape[1 if logits.ndim > 1 else 0]
        bad = targets[(targets != ignore_index) & ((targets < 0) | (targets >= classes))]
        if len(bad):
            raise InputError(f"targets has {int(bad[0])}, but must have 0 to {classes - 1}, or {ignore_index}")
    logits = logits if compute_dtype is None else logits.to(compute_dtype)
    targets = targets.to(logits.dtype) if targets.is_floating_point() else targets
    weight = None if weight is None else weight.to(logits.dtype)
    return F.cross_entropy(_stretched(logits), targets, weight, reduction=reduction, ignore_index=ignore_index)


def _floating(name: str, value: Tensor) -> None:
    if not value.is_floating_point():
        raise InputError(f"{name} has dtype {value.dtype}, but must be floating")


@objective
def stablemax_loss(model: nn.Module, batch: Batch, run: Any = None) -> Tensor:
    """Objective for `fit`: StableMax cross entropy of a batch, in float64.

    As with `core.objectives.cross_entropy`, a model may give several answers a sample, (answers, n, classes).
    """
    inputs, targets = unpack(batch)
    if targets is None:
        raise InputError("The batch has no targets, but StableMax needs them: samples must be (input, target)")
    logits = logits_of(forward(model, inputs))
    if logits.ndim == 3 and (targets.ndim == 1 or targets.is_floating_point()) and logits.shape[1] == len(targets):
        logits, targets = logits.flatten(0, 1), torch.cat([targets] * len(logits))
    return stablemax_cross_entropy(logits, targets)


# --- PerpGrad -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def perp_gradient(
    weight: Tensor, grad: Tensor, *, eps: float = 1e-30, rescale: bool = True, min_sine: float | None = None
) -> Tensor:
    """The part of a gradient that is perpendicular to the weight, as one vector each.

    Args:
        weight: of any shape; all zero gives the gradient as it is.
        grad: in the weight's shape.
        eps: added to both denominators.
        rescale: to the norm that the gradient had.
        min_sine: a gradient whose sine with the weight is below this becomes zero. None for four roundings of the
            dtype, below which there is nothing but rounding; 0 for never, as in the code.

    Returns:
        In the gradient's shape and dtype; float16 and bfloat16 are computed in float32.
    """
    _check_projection(eps, min_sine)
    if weight.shape != grad.shape:
        raise InputError(f"grad has shape {tuple(grad.shape)}, but must have the weight's, {tuple(weight.shape)}")
    new = grad.clone()
    _project_([weight], [new], eps, rescale, min_sine)
    return new


@torch.no_grad()
def project_gradients_(
    parameters: Iterable[Tensor],
    *,
    eps: float = 1e-30,
    rescale: bool = True,
    filter: Callable[[Tensor], bool] | None = None,
    min_sine: float | None = None,
) -> None:
    """Replace the gradients of parameters by `perp_gradient`, each tensor for itself.

    Project once a step: after gradients are accumulated, averaged over processes and unscaled.

    Args:
        parameters: those without a gradient are passed over.
        eps: added to denominators.
        rescale: to the norm that each gradient had.
        filter: parameter -> whether it is projected; all are if None, also biases and norms.
        min_sine: see `perp_gradient`.
    """
    _check_projection(eps, min_sine)
    groups: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is None or (filter is not None and not filter(parameter)):
            continue
        if parameter.grad.layout != torch.strided:
            raise InputError(
                f"The gradient of a parameter of shape {tuple(parameter.shape)} is sparse, but must be dense: "
                "leave that parameter out with filter"
            )
        groups.setdefault((parameter.device, parameter.dtype), []).append(parameter)
    for some in groups.values():
        _project_(some, [p.grad for p in some if p.grad is not None], eps, rescale, min_sine)


def _check_projection(eps: float, min_sine: float | None) -> None:
    in_range("eps", eps, 0)
    if min_sine is not None:
        in_range("min_sine", min_sine, 0, 1)


def _project_(weights: list[Tensor], grads: list[Tensor], eps: float, rescale: bool, min_sine: float | None) -> None:
    """Project gradients on one device and of one dtype in place; the scalars of all tensors are one vector."""
    if not grads:
        return
    dtype = torch.promote_types(grads[0].dtype, torch.float32)  # dot products in less would lose the projection
    flat_weights = [weight.detach().to(dtype).reshape(-1) for weight in weights]
    flat = [grad.to(dtype).reshape(-1) for grad in grads]  # the gradients themselves where nothing is to be converted
    squares, before = _norms(flat_weights).square() + eps, _norms(flat)
    for _ in range(2):  # what rounding left of the weight the first time is gone the second
        dots = torch.stack([torch.dot(w, g) for w, g in zip(flat_weights, flat, strict=True)])
        shares = (dots / squares).to(dtype).unbind()
        for w, g, share in zip(flat_weights, flat, shares, strict=True):
            g.addcmul_(w, share, value=-1)
    after = _norms(flat)
    factors = before / (after + eps) if rescale else torch.ones_like(after)
    least = 4 * torch.finfo(dtype).eps if min_sine is None else min_sine
    torch._foreach_mul_(flat, list(torch.where(after < least * before, 0.0, factors).to(dtype).unbind()))
    for grad, new in zip(grads, flat, strict=True):
        if new.data_ptr() != grad.data_ptr():
            grad.copy_(new.view(grad.shape))


def _norms(tensors: list[Tensor]) -> Tensor:
    """Norms (tensors,) in float64: in float32 the squares of a fitted network's small gradients underflow."""
    if tensors[0].device.type != "cpu":
        return torch.stack(torch._foreach_norm(tensors, 2, torch.float64))
    norms = torch.stack(torch._foreach_norm(tensors)).double()
    for number in ((norms < 1e-12) | (norms > 1e12)).nonzero()[:, 0].tolist():  # adding up in float64 is slow on a CPU
        norms[number] = torch.linalg.vector_norm(tensors[number], dtype=torch.float64)
    return norms


class PerpGrad(Optimizer):
    """Any torch optimizer, stepping along perpendicular gradients; for a loop of one's own, or `fit(optimizer=...)`.

    The optimizer given is used and not copied: parameter groups, state, hooks and schedulers are its own.

    Args:
        base: an optimizer, already built.
        rescale: each gradient to its norm before.
        eps: added to denominators.
        filter: parameter -> whether it is projected.
        min_sine: see `perp_gradient`.
    """

    _step_supports_amp_scaling = False  # a GradScaler must unscale, not hand its scale to the wrapped optimizer

    def __init__(
        self,
        base: Optimizer,
        *,
        rescale: bool = True,
        eps: float = 1e-30,
        filter: Callable[[Tensor], bool] | None = None,
        min_sine: float | None = None,
    ) -> None:
        # Optimizer.__init__ would make groups and state of its own; all that it sets is read from the base instead.
        if not isinstance(base, Optimizer):
            raise InputError(f"base is {base!r}, but must be an optimizer that is already built, such as SGD(...)")
        _check_projection(eps, min_sine)
        self.base = base
        self.settings: dict[str, Any] = {"rescale": rescale, "eps": eps, "filter": filter, "min_sine": min_sine}

    def __getattr__(self, name: str) -> Any:
        if name == "base":  # not set yet, while a copy is made
            raise AttributeError(name)
        return getattr(self.base, name)

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __repr__(self) -> str:
        return f"PerpGrad({self.base!r})"

    def project(self) -> None:
        """Project the gradients that are there now."""
        project_gradients_((p for group in self.base.param_groups for p in group["params"]), **self.settings)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Project, and step. With a closure, every gradient that it makes is projected before it is used."""
        if closure is None:
            self.project()
            return self.base.step()

        def projected() -> Any:
            loss = closure()
            self.project()
            return loss

        return self.base.step(projected)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.base.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        return self.base.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.base.load_state_dict(dict(state_dict))


class ProjectGradients(Callback):
    """PerpGrad for `fit(callbacks=[...])`, with any optimizer.

    `fit` clips gradients before; as their norms stay, that is the same as clipping them after.

    Args:
        rescale: each gradient to its norm before.
        eps: added to denominators.
        filter: parameter -> whether it is projected.
        min_sine: see `perp_gradient`.
        optimizer_eps: the eps of Adam and its like is set to this; left as it is if None.
    """

    def __init__(
        self,
        *,
        rescale: bool = True,
        eps: float = 1e-30,
        filter: Callable[[Tensor], bool] | None = None,
        min_sine: float | None = None,
        optimizer_eps: float | None = None,
    ) -> None:
        _check_projection(eps, min_sine)
        if optimizer_eps is not None:
            in_range("optimizer_eps", optimizer_eps, 0)
        self.settings: dict[str, Any] = {"rescale": rescale, "eps": eps, "filter": filter, "min_sine": min_sine}
        self.optimizer_eps = optimizer_eps

    def on_start(self, run: Run) -> None:
        if run.accelerator.distributed_type == "FSDP":
            raise InputError("The model is sharded (FSDP), but must be whole on each device to project its gradients")
        for group in run.optimizer.param_groups if self.optimizer_eps is not None else ():
            if "eps" in group:
                group["eps"] = self.optimizer_eps

    def on_gradients(self, run: Run) -> None:
        project_gradients_(run.module.parameters(), **self.settings)


# --- what to look at ------------------------------------------------------------------------------------------------


@torch.no_grad()
def softmax_collapse_fraction(logits: Tensor, targets: Tensor) -> float:
    """Share of samples whose softmax cross entropy is exactly 0 in the logits' dtype: they teach no more.

    Args:
        logits: (n, classes), in the dtype of training.
        targets: class ids (n,).
    """
    _floating("logits", logits)
    return float((F.cross_entropy(logits, targets, reduction="none") == 0).double().mean())


@torch.no_grad()
def nlm_alignment(model: nn.Module) -> dict[str, float]:
    """Cosine of minus the gradient with the weight, by parameter: near 1 where a step only scales the weights.

    Parameters without a gradient are left out; a zero weight or gradient has 0.
    """
    cosines = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            weight, grad = parameter.double().flatten(), -parameter.grad.double().flatten()
            norms = weight.norm() * grad.norm()
            cosines[name] = torch.dot(weight, grad) / torch.where(norms == 0, 1.0, norms)
    return {name: float(cosine) for name, cosine in cosines.items()}


def recipe(
    model: nn.Module,
    data: Any,
    validation: Any = None,
    *,
    loss: str = "cross_entropy",
    project: bool = True,
    rescale: bool = True,
    min_sine: float | None = None,
    optimizer_eps: float = 1e-25,
) -> Recipe:
    """Train a classifier with PerpGrad, StableMax or both.

    Args:
        model: classifier.
        data: labelled samples.
        validation: not used.
        loss: "cross_entropy", or "stablemax" for cross entropy with StableMax in place of softmax.
        project: take the direction that scales the weights out of the gradients.
        rescale: each projected gradient to the norm that it had.
        min_sine: gradients whose sine with their weight is smaller become zero; rounding alone if left out.
        optimizer_eps: of Adam, where gradients are projected.
    """
    one_of("loss", loss, ("cross_entropy", "stablemax"))
    projection = ProjectGradients(rescale=rescale, min_sine=min_sine, optimizer_eps=optimizer_eps)
    return Recipe(
        model=model,
        data=data,
        objective=cross_entropy if loss == "cross_entropy" else stablemax_loss,
        callbacks=[projection] if project else [],
    )
