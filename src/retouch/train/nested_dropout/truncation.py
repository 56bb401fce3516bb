"""Features truncated after k channels: the layer, putting it into a model and out again, and the choice of k."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from retouch.core.batches import in_order
from retouch.core.data import labels_of
from retouch.core.errors import InputError, in_range, positive
from retouch.core.features import capture, layer_of
from retouch.core.loop import Callback, Run
from retouch.core.models import Batch, device_of, forward, head_of, mode, own, to_device, unpack


def nested_dropout_distribution(
    num_features: int, *, std: float, mean: float = 0.0, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Probabilities (K,) of keeping 1, 2, ..., K channels: exp(-((k - mean) / std)^2), normalised.

    Args:
        num_features: K.
        std: width, > 0; infinity is uniform.
        mean: centre; with 0 the mass decreases from k = 1 on.
        dtype: of the result; it is computed in double precision.
    """
    positive("num_features", num_features)
    positive("std", std)
    distance = (torch.arange(1, num_features + 1, dtype=torch.float64) - mean).square()
    # Less the smallest, and divided twice: for a tiny std its square is no number, and all k would be infinitely far.
    return ((distance.min() - distance) / std / std).softmax(0).to(dtype)


def nested_dropout(features: Tensor, *, keep: int | Tensor, dim: int = 1) -> Tensor:
    """Features with all channels from number `keep` on set to zero; the others as they were, without rescaling.

    Args:
        features: (n, K, ...).
        keep: 1 to K; or (n,), one for each sample.
        dim: of the channels.
    """
    width, counts = features.shape[dim], torch.as_tensor(keep)
    if counts.ndim > 1 or (counts.ndim == 1 and len(counts) != len(features)):
        allowed = f"one number, or one for each of {len(features)} samples"
        raise InputError(f"keep has shape {tuple(counts.shape)}, but must be {allowed}")
    for bound in (counts.min(), counts.max()) if counts.numel() else ():
        in_range("keep", int(bound), 1, width)
    if counts.ndim == 0 and int(counts) == width:
        return features
    shape = [1] * features.ndim
    shape[dim] = width
    channels = torch.arange(width, device=features.device).view(shape)
    limits = counts.to(features.device).view(-1, *[1] * (features.ndim - 1))
    return features.masked_fill(channels >= limits, 0)


class NestedDropout(nn.Module):
    """Truncates features: in train mode after a random number of channels, in eval mode after `eval_keep`.

    Batch normalisation must not come behind it, and the classifier that does must have no bias.

    Args:
        num_features: K, channels of the features.
        std: of the number kept; about the number of classes or a few times it.
        mean: of it.
        per_sample: draw for every sample instead of once a batch; not the paper's method.
        generator: a CPU generator; torch's global one if None, as in every dropout layer.
        dim: of the channels.

    Attributes:
        eval_keep: channels kept in eval mode; K at first, see `choose_keep`.
        train_keep: channels kept in train mode; drawn if None.
    """

    def __init__(
        self,
        num_features: int,
        *,
        std: float = 100.0,
        mean: float = 0.0,
        per_sample: bool = False,
        generator: torch.Generator | None = None,
        dim: int = 1,
    ) -> None:
        super().__init__()
        self.probabilities = nested_dropout_distribution(num_features, std=std, mean=mean)
        self.num_features, self.std, self.mean, self.dim = num_features, std, mean, dim
        self.per_sample, self.generator = per_sample, generator
        self.eval_keep = num_features
        self.train_keep: int | None = None

    def draw(self, count: int = 1) -> Tensor:
        """Random numbers of channels to keep, (count,)."""
        return torch.multinomial(self.probabilities, count, replacement=True, generator=self.generator) + 1

    def forward(self, features: Tensor) -> Tensor:
        """Features (n, K, ...) of the same shape, truncated."""
        if features.shape[self.dim] != self.num_features:
            wanted = f"{self.num_features} channels in dimension {self.dim}"
            raise InputError(f"features has shape {tuple(features.shape)}, but must have {wanted}")
        keep: int | Tensor | None = self.train_keep if self.training else self.eval_keep
        if keep is None:
            keep = self.draw(len(features)) if self.per_sample else int(self.draw())
        return nested_dropout(features, keep=keep, dim=self.dim)

    def extra_repr(self) -> str:
        return f"{self.num_features}, std={self.std:g}, mean={self.mean:g}, eval_keep={self.eval_keep}"


def nested_layers(model: nn.Module) -> list[NestedDropout]:
    """The nested dropout layers of a model, in order."""
    return [module for module in model.modules() if isinstance(module, NestedDropout)]


# --- into a model and out again -------------------------------------------------------------------------------------


def _truncate(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Hook before a layer. It asks the layer's own child, so that a copy of a model truncates for itself."""
    return module.nested_dropout(args[0]), *args[1:]


def convert(
    model: nn.Module,
    *,
    std: float = 100.0,
    mean: float = 0.0,
    head: str | None = None,
    drop_bias: bool = False,
    inplace: bool = False,
) -> nn.Module:
    """Put nested dropout before a model's classification head.

    It works by a hook: names and state_dict stay, and until `choose_keep` is called the model is in eval mode the one
    given, exactly. `merge` makes an ordinary model of it.

    Args:
        model: any classifier whose head is a linear layer, such as transformers' ...ForImageClassification.
        std: of the number of channels kept.
        mean: of it.
        head: name of the layer; the last linear one if None. A second call may name an earlier one, see `Alternate`.
        drop_bias: set a bias of the head to zero and leave it untrained.
        inplace: convert the given model instead of a copy.
    """
    last = head_of(model)
    name = head or last
    model = own(model, inplace=inplace)
    linear = layer_of(model, name)
    if not isinstance(linear, nn.Linear):
        raise InputError(f"head is {name!r}, a {type(linear).__name__}, but must be an nn.Linear: see NestedDropout")
    if hasattr(linear, "nested_dropout"):
        raise InputError(f"head is {name!r}, which has nested dropout already, but must be a layer without")
    bias: Any = linear.bias
    if bias is not None and name == last and (bias.requires_grad or bias.any()):
        if not drop_bias:
            raise InputError(
                f"The head {name!r} has a bias, but must have none, as it would be the same for every k: pass "
                "drop_bias=True to set it to zero and leave it untrained"
            )
        bias.requires_grad_(False).zero_()
    layer = NestedDropout(linear.in_features, std=std, mean=mean, dim=-1)
    linear.add_module("nested_dropout", layer.train(linear.training))
    linear.register_forward_pre_hook(_truncate)
    return model


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Make an ordinary model of a converted one, in place: head columns from `eval_keep` on become zero.

    In eval mode it answers as before, bit for bit.
    """
    for linear in model.modules():
        layer = getattr(linear, "nested_dropout", None)
        if isinstance(linear, nn.Linear) and isinstance(layer, NestedDropout):
            linear.weight[:, layer.eval_keep :] = 0
            for number in [key for key, hook in linear._forward_pre_hooks.items() if hook is _truncate]:
                del linear._forward_pre_hooks[number]
            del linear.nested_dropout
    return model


class Alternate(Callback):
    """For models with several nested dropout layers (VGG-19 has two): each batch truncates at one of them.

    Which one is drawn, each alike; the others keep all channels.
    """

    def on_batch(self, run: Run, batch: Batch) -> Batch:
        layers = nested_layers(run.module)
        chosen = int(torch.randint(len(layers), (), generator=run.generator))
        for number, layer in enumerate(layers):
            layer.train_keep = None if number == chosen else layer.num_features
        return batch

    def on_end(self, run: Run) -> None:
        for layer in nested_layers(run.module):
            layer.train_keep = None


# --- the choice of k ------------------------------------------------------------------------------------------------


@torch.no_grad()
def accuracy_per_keep(features: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Accuracy with the first k channels, for all k at once: (K,), 0 to 1.

    Args:
        features: (n, K), not truncated.
        weight: of the head without bias, (K, classes).
        labels: class ids (n,).
    """
    if features.ndim != 2 or weight.ndim != 2 or features.shape[1] != len(weight):
        shapes = f"features has shape {tuple(features.shape)} and weight {tuple(weight.shape)}"
        raise InputError(f"{shapes}, but they must be (n, K) and (K, classes)")
    check_labels(features, labels)
    wide = torch.promote_types(features.dtype, torch.float32)  # sums over channels would drift in half precision
    weight, labels = weight.to(features.device, wide), labels.to(features.device)
    right = torch.zeros(len(weight), dtype=torch.float64, device=features.device)
    size = max(1, 2**22 // weight.numel())
    for rows, given in zip(features.to(wide).split(size), labels.split(size), strict=True):
        logits = (rows[:, :, None] * weight).cumsum(1)  # (b, K, classes); [:, k - 1] is that of k channels
        right += (logits.argmax(2) == given[:, None]).sum(0)
    return right / len(features)


def check_labels(rows: Tensor, labels: Tensor) -> None:
    """Refuse labels that are not one class id a row."""
    if labels.shape != rows.shape[:1]:
        raise InputError(f"labels has shape {tuple(labels.shape)}, but must have one class id for each of {len(rows)}")


def select_keep(accuracy: Tensor, *, penalty: float = 1e-5) -> int:
    """The number of channels, 1 to K, of the best accuracy (K,) in 0 to 1, less `penalty` for each beyond the first."""
    in_range("penalty", penalty, 0)
    if accuracy.ndim != 1 or len(accuracy) == 0:
        raise InputError(f"accuracy has shape {tuple(accuracy.shape)}, but must be (K,)")
    steps = torch.arange(len(accuracy), dtype=torch.float64)
    return int((accuracy.double().cpu() - penalty * steps).argmax()) + 1  # of equal ones, argmax gives the first


@torch.no_grad()
def choose_keep(model: nn.Module | Sequence[nn.Module], validation: Any, *, penalty: float = 1e-5) -> int:
    """Choose k* on validation data and set it as `eval_keep`.

    Args:
        model: with a nested dropout layer before its head (the last is set); or several, judged by their mean logits.
        validation: samples with clean labels.
        penalty: accuracy that a further channel must bring.
    """
    models = [model] if isinstance(model, nn.Module) and not isinstance(model, nn.ModuleList) else list(model)
    parts = [_features_and_weight(network, validation) for network in models]
    # Channel 1 of each network, then channel 2 of each: summed up to the last one's channel k, logits are the mean's.
    features = torch.stack([part[0] for part in parts], 2).flatten(1)
    weight = torch.stack([part[1] for part in parts], 1).flatten(0, 1)
    accuracy = accuracy_per_keep(features, weight, labels_of(validation))
    keep = select_keep(accuracy[len(parts) - 1 :: len(parts)], penalty=penalty)
    for network in models:
        nested_layers(network)[-1].eval_keep = keep
    return keep


def _features_and_weight(model: nn.Module, data: Any) -> tuple[Tensor, Tensor]:
    """What goes into the last nested dropout layer, (n, K), and the head's weight, (K, classes)."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, NestedDropout)}
    if not layers:
        raise InputError(f"{type(model).__name__} has no NestedDropout, but must have it before its head: see convert")
    name, width = list(layers)[-1], list(layers.values())[-1].num_features
    head: Any = layer_of(model, head_of(model))
    if head.in_features != width or (head.bias is not None and head.bias.any()):
        wanted = f"a linear layer without bias on the {width} channels of nested dropout"
        raise InputError(f"The head is {head_of(model)!r}, {head}, but must be {wanted}")
    found, device = [], device_of(model)
    with mode(model, training=False), capture(model, [name], side="input") as seen:
        for batch in in_order(data):
            forward(model, unpack(to_device(batch, device))[0])
            found.append(seen[name])
    return torch.cat(found), head.weight.T
