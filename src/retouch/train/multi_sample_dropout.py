"""Multi-Sample Dropout: several dropout masks of the same features in every step, and the mean of their losses.

The backbone runs once; the dropout before the head and all that follows it is repeated with masks of its own:

    h = f(x),  h_m = h * b_m / (1 - p),  z_m = g(h_m) for m = 1..M,  loss = mean over m of l(z_m, y)

A step then behaves like one on a larger, more varied batch, and training needs fewer steps. Use it where the head is
small next to the backbone, so that a step costs little more; where the head is most of the network, the time saved in
steps is spent in steps. Losses are averaged, never logits: cross entropy is convex, so the loss of mean logits is
smaller and another, weaker aim. Nothing changes at inference, where one pass without dropout is made.

Paper: arXiv 1905.09788 (section 3). No code of the authors is known; the best known public one computes most losses on
features instead of logits. The paper also makes samples differ by pooling or flipping: that is `perturb`.

Cost: M passes of the head, M masks of the features. Limits: batch normalisation behind the dropout would see each
sample M times, so such heads are run sample by sample.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retouch.core.cards import Card
from retouch.core.errors import InputError, in_range, one_of, positive
from retouch.core.features import layer_of
from retouch.core.models import head_of, own
from retouch.core.recipe import Recipe

CARD = Card(
    title="Multi-Sample Dropout",
    room="train",
    paper="arXiv:1905.09788",
    shape="layer",
    line="Trains the head on several dropout masks of the same features in every step.",
    tags=("classification", "dropout", "fewer steps"),
    plugin="convert",
)


def multi_sample_dropout(
    features: Tensor, *, num_samples: int = 8, p: float = 0.5, generator: torch.Generator | None = None
) -> Tensor:
    """Independent dropout masks of the same features: (n, ...) -> (num_samples, n, ...).

    Args:
        features: what dropout acts on.
        num_samples: masks; every sample and every entry of the batch has its own.
        p: share dropped, 0 to 1 (not 1); the rest is multiplied by 1 / (1 - p).
        generator: on the features' device; torch's global one if None, as in every dropout layer.
    """
    positive("num_samples", num_samples)
    in_range("p", p, 0, 1, below=True)
    repeated = features.expand(num_samples, *features.shape)
    if generator is None:
        return F.dropout(repeated, p)
    kept = torch.rand(repeated.shape, generator=generator, device=features.device) >= p
    return repeated * kept / (1 - p)


def multi_sample_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    loss_fn: Callable[..., Tensor] = F.cross_entropy,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """Mean over samples of the loss (section 3.1); with reduction "none", the loss of each sample (num_samples,).

    Args:
        logits: (num_samples, n, classes).
        targets: class ids (n,), or distributions (n, classes).
        loss_fn: (logits, targets) -> mean over a batch.
        reduction: "mean" or "none".
    """
    one_of("reduction", reduction, ("mean", "none"))
    if logits.ndim < 3:
        raise InputError(f"logits has shape {tuple(logits.shape)}, but must be (num_samples, n, classes)")
    if len(targets) != logits.shape[1]:
        raise InputError(f"targets has {len(targets)} rows, but must have {logits.shape[1]}, as each sample of logits")
    if reduction == "none":
        return torch.stack([loss_fn(sample, targets) for sample in logits])
    return loss_fn(logits.flatten(0, 1), torch.cat([targets] * len(logits)))


class MultiSampleDropout(nn.Module):
    """A head that is trained on several dropout masks of its input.

    In train mode features (n, ...) become logits (num_samples, n, classes), in eval mode (n, classes).

    Args:
        head: from features to logits, its weights shared by all samples.
        num_samples: masks.
        p: share dropped.
        perturb: (features, sample number) -> features, to make samples differ in more than their masks.
    """

    def __init__(
        self,
        head: nn.Module,
        *,
        num_samples: int = 8,
        p: float = 0.5,
        perturb: Callable[[Tensor, int], Tensor] | None = None,
    ) -> None:
        super().__init__()
        positive("num_samples", num_samples)
        in_range("p", p, 0, 1, below=True)
        self.head, self.num_samples, self.p, self.perturb = head, num_samples, p, perturb

    def forward(self, features: Tensor) -> Tensor:
        """Features (n, ...) to logits."""
        if not self.training:
            return self.head(features)
        samples = multi_sample_dropout(features, num_samples=self.num_samples, p=self.p)
        if self.perturb is not None:
            samples = torch.stack([self.perturb(sample, number) for number, sample in enumerate(samples)])
        if _has_batch_norm(self.head):
            return torch.stack([self.head(sample) for sample in samples])
        logits = self.head(samples.flatten(0, 1))
        return logits.view(self.num_samples, len(features), *logits.shape[1:])

    def loss(
        self, features: Tensor, targets: Tensor, *, loss_fn: Callable[..., Tensor] = F.cross_entropy
    ) -> tuple[Tensor, Tensor]:
        """The averaged loss, and the mean of the samples' logits to look at."""
        logits = self(features)
        logits = logits if self.training else logits[None]
        return multi_sample_loss(logits, targets, loss_fn=loss_fn), logits.mean(0)


def _has_batch_norm(module: nn.Module) -> bool:
    return any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())


class _Repeat:
    """Hooks that repeat a dropout and the rest of its Sequential; nothing is put into the model."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples

    def dropout(self, module: nn.Dropout, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """In place of the dropout's output: all samples, one after the other (num_samples * n, ...)."""
        if not module.training:
            return None
        return multi_sample_dropout(args[0], num_samples=self.num_samples, p=module.p).flatten(0, 1)

    def split(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """The Sequential's output as (num_samples, n, ...)."""
        if not module.training:
            return None
        return output.view(self.num_samples, -1, *output.shape[1:])


def attach_multi_sample_dropout(model: nn.Module, dropout_name: str, *, num_samples: int = 8) -> nn.Module:
    """Repeat a named dropout and all that follows it in its Sequential, in train mode.

    Works by hooks on the model given: its modules, names and state_dict stay as they are.

    Args:
        model: returned.
        dropout_name: as `model.named_modules()` has it; directly inside of an `nn.Sequential` that ends the model.
        num_samples: masks.

    Raises:
        InputError: if that is no dropout, is not in a Sequential, or batch normalisation follows it.
    """
    positive("num_samples", num_samples)
    dropout = layer_of(model, dropout_name)
    if not isinstance(dropout, nn.Dropout):
        raise InputError(f"dropout_name is {dropout_name!r}, a {type(dropout).__name__}, but must be an nn.Dropout")
    around, _, last = dropout_name.rpartition(".")
    head = layer_of(model, around) if around else model
    if not isinstance(head, nn.Sequential):
        raise InputError(
            f"{dropout_name} is inside a {type(head).__name__}, but must be in an nn.Sequential: see convert"
        )
    names = [name for name, _ in head.named_children()]
    if any(_has_batch_norm(head.get_submodule(name)) for name in names[names.index(last) :]):
        raise InputError(f"Batch normalisation follows {dropout_name}, whose statistics would count each sample often")
    repeat = _Repeat(num_samples)
    dropout.register_forward_hook(repeat.dropout)
    head.register_forward_hook(repeat.split)
    return model


class _Head:
    """Hooks that give a linear head several masks of its input, in place of the dropout that came before it."""

    def __init__(self, samples: int, p: float | None) -> None:
        self.samples, self.p = samples, p
        self.last: tuple[nn.Dropout, Tensor, Any] | None = None

    def seen(self, module: nn.Dropout, args: tuple[Tensor, ...], output: Tensor) -> None:
        """Remember the latest dropout of the model."""
        self.last = module, args[0], output

    def features(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Before the head: (n, d) becomes (samples, n, d)."""
        last, self.last = self.last, None
        if not module.training:
            return None
        features, p = args[0], 0.5 if self.p is None else self.p
        if last is not None and last[2] is features:
            dropout, features, _ = last  # as they were before that dropout, whose place is taken
            p = dropout.p if self.p is None else self.p
        return multi_sample_dropout(features, num_samples=self.samples, p=p), *args[1:]


def convert(
    model: nn.Module, *, samples: int = 8, p: float | None = None, head: str | None = None, inplace: bool = False
) -> nn.Module:
    """Put Multi-Sample Dropout before a model's classification head.

    In train mode the model's logits become (samples, n, classes), whose losses `core.objectives.cross_entropy`
    averages; in eval mode the model is the one given, exactly. It works by hooks: modules, names and state_dict stay. A
    dropout directly before the head is replaced, not added to.

    Args:
        model: any classifier whose head is a linear layer, such as transformers' ...ForImageClassification.
        samples: dropout masks a step; the gain flattens beyond 8.
        p: share dropped; that of the dropout before the head if None, or 0.5 where there is none.
        head: name of the head; the last linear layer if None.
        inplace: put the hooks on the given model instead of a copy.
    """
    positive("samples", samples)
    if p is not None:
        in_range("p", p, 0, 1, below=True)
    name = head or head_of(model)
    model = own(model, inplace=inplace)
    linear = layer_of(model, name)
    if not isinstance(linear, nn.Linear):
        raise InputError(
            f"head is {name!r}, a {type(linear).__name__}, but must be an nn.Linear: see MultiSampleDropout"
        )
    hooks = _Head(samples, p)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(hooks.seen)
    linear.register_forward_pre_hook(hooks.features)
    return model


def recipe(model: nn.Module, data: Any, validation: Any = None, *, samples: int = 8, p: float | None = None) -> Recipe:
    """Train a classifier with Multi-Sample Dropout.

    Args:
        model: classifier with a linear head; trained in place.
        data: labelled samples.
        validation: not used.
        samples: dropout masks a step.
        p: share dropped; that of the dropout before the head if None, or 0.5 where there is none.
    """
    return Recipe(model=convert(model, samples=samples, p=p, inplace=True), data=data)
