"""Random teachers: an encoder learns features from a randomly initialised copy of itself, without labels.

A teacher drawn at random is frozen for ever. A student that starts at or near it learns to give the same softened
predictions through a wide projection head, from single views of the data; the head is then dropped. The student's
features are better than its teacher's, though all that the teacher knows is its architecture:

    start   theta_S = ((1 - alpha) theta_T + alpha theta') / sqrt(alpha^2 + (1 - alpha)^2)      theta' another draw
    loss    CE = -sum_k softmax(z_T / t)_k log softmax(z_S / s)_k

Use it to study what self-distillation learns from its dynamics and data alone, or for a start that is better than a
random one where there are no labels. It is no way to a good encoder: the gain is over the random teacher, far from
supervised training or any self-supervision with augmentation, and on data whose raw inputs are almost linearly
separable it loses to them. Probe the encoder, not the head.

Paper: arXiv 2302.12091. Code: safelix/dinopl. Where they part: the code's head computes a normalised last weight and
then does not use it; its stand-alone script and DINO do (`weight_norm`, on by default; False is the pipeline).
With alpha = 0, no BatchNorm and equal temperatures the loss starts at its minimum: training then begins from rounding
errors that Adam blows up, which is why some of the authors' runs take alpha = 1e-10. With BatchNorm the teacher, in
eval mode, uses its initial statistics and the student those of its batch, which already differ. Weight decay and
schedules change what happens and are not used.

Cost: two forwards of the encoder and one backward; for small encoders the head's last product (batch x 256 x 65 536)
is most of it, and 512 to 4096 outputs serve as well at their scale.
"""

import copy
import itertools
import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from retouch.core import seeds
from retouch.core.batches import as_batches, in_order
from retouch.core.cards import Card
from retouch.core.data import TensorData, labels_of
from retouch.core.distillation import Answer, Distillation, check_pair
from retouch.core.errors import InputError, in_range, one_of, positive
from retouch.core.loop import fit
from retouch.core.masks import top_share
from retouch.core.models import device_of, forward, mode, predict, rows_of, to_device, unpack

CARD = Card(
    title="Random teachers",
    room="distill",
    paper="arXiv:2302.12091",
    shape="objective",
    line="Learns features without labels by imitating a randomly initialised, frozen copy of the encoder.",
    tags=("self-distillation", "representations", "no labels", "initialisation", "lottery tickets"),
    plugin="RandomTeacher",
)

Weights = TypeVar("Weights", bound=Tensor | nn.Module)

# --- where the student starts ---------------------------------------------------------------------------------------


def interpolate_init(
    teacher: Weights, random: Weights, *, alpha: float = 0.0, variance_preserving: bool = True
) -> Weights:
    """Weights on the line from a teacher to another draw.

    Args:
        teacher: a tensor, or a module whose every parameter is mixed; buffers are copied from it.
        random: of the same shapes.
        alpha: 0 is a copy of the teacher, 1 the other draw.
        variance_preserving: divide by sqrt(alpha^2 + (1 - alpha)^2), which keeps the variance of independent draws.

    Raises:
        InputError: for other shapes. An alpha outside of 0 to 1 warns.
    """
    if not 0 <= alpha <= 1:
        warnings.warn(f"alpha is {alpha}, but between the two draws only from 0 to 1", stacklevel=2)
    norm = math.hypot(alpha, 1 - alpha) if variance_preserving else 1.0
    return _mix(teacher, random, (1 - alpha) / norm, alpha / norm)


def neighborhood_init(teacher: Weights, random: Weights, *, eps: float, variance_preserving: bool = True) -> Weights:
    """Weights near a teacher: teacher + eps random, divided by sqrt(1 + eps^2) if `variance_preserving`.

    Args:
        teacher: as in `interpolate_init`.
        random: likewise.
        eps: >= 0; how far off.
        variance_preserving: see above.
    """
    in_range("eps", eps, 0)
    norm = math.hypot(1, eps) if variance_preserving else 1.0
    return _mix(teacher, random, 1 / norm, eps / norm)


@torch.no_grad()
def _mix(teacher: Any, random: Any, a: float, b: float) -> Any:
    """a teacher + b random, of tensors or of all parameters."""
    if isinstance(teacher, Tensor):
        if teacher.shape != random.shape:
            raise InputError(
                f"teacher has shape {tuple(teacher.shape)} and random {tuple(random.shape)}, but both must be alike"
            )
        return teacher.clone() if b == 0 else a * teacher + b * random  # 0 times infinity is no copy
    mixed, other = copy.deepcopy(teacher), dict(random.named_parameters())
    if other.keys() != dict(mixed.named_parameters()).keys():
        raise InputError(f"random has {len(other)} parameters under other names than the teacher's, but must be alike")
    for name, parameter in mixed.named_parameters():
        parameter.copy_(_mix(parameter, other[name], a, b))
        parameter.requires_grad_(other[name].requires_grad)
    return mixed.train(random.training)


# --- head and loss --------------------------------------------------------------------------------------------------


def random_teacher_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    teacher_temperature: float = 1.0,
    student_temperature: float = 1.0,
    loss: Literal["ce", "kl", "mse"] = "ce",
) -> Tensor:
    """How far a student's projections are from the teacher's, mean over samples.

    Args:
        student_logits: (n, outputs).
        teacher_logits: (n, outputs); no gradient goes into them.
        teacher_temperature: > 0; divides the teacher's logits.
        student_temperature: > 0; divides the student's.
        loss: "ce" and "kl", which differ by the teacher's entropy and so have one gradient, or "mse" between the
            logits, mean over outputs as well.
    """
    positive("teacher_temperature", teacher_temperature)
    positive("student_temperature", student_temperature)
    one_of("loss", loss, ("ce", "kl", "mse"))
    check_pair(student_logits, teacher_logits)
    z, s = teacher_logits.detach() / teacher_temperature, student_logits / student_temperature
    if loss == "mse":
        return F.mse_loss(s, z)
    p, q = z.log_softmax(-1), s.log_softmax(-1)
    if loss == "ce":
        return -(p.exp() * q).sum(-1).mean()
    return F.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean()


class ProjectionHead(nn.Module):
    """DINO's head: an MLP, a bottleneck of unit length, and a linear layer to many outputs.

    Args:
        embed_dim: width of the embedding.
        hidden_dims: of the MLP, each layer followed by the activation; may be empty.
        bottleneck_dim: of the vector that is brought to unit length; None for none, and no such vector.
        out_dim: outputs.
        weight_norm: bring the rows of the last weight to unit length too, so that outputs are cosines.
        act: "gelu" or "relu".
    """

    def __init__(
        self,
        embed_dim: int,
        hidden_dims: tuple[int, ...] = (2048, 2048),
        bottleneck_dim: int | None = 256,
        out_dim: int = 65536,
        weight_norm: bool = True,
        act: Literal["gelu", "relu"] = "gelu",
    ) -> None:
        super().__init__()
        one_of("act", act, ("gelu", "relu"))
        self.act, self.weight_norm = getattr(F, act), weight_norm
        widths = [embed_dim, *hidden_dims]
        self.mlp = nn.ModuleList([nn.Linear(a, b) for a, b in itertools.pairwise(widths)])
        self.bottleneck = None if bottleneck_dim is None else nn.Linear(widths[-1], bottleneck_dim)
        self.last = nn.Linear(bottleneck_dim or widths[-1], out_dim, bias=False)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, embeddings: Tensor) -> Tensor:
        """(n, embed_dim) -> (n, out_dim), from -1 to 1 with `weight_norm`."""
        x = embeddings
        for layer in self.mlp:
            x = self.act(layer(x))
        if self.bottleneck is not None:
            x = F.normalize(self.bottleneck(x), dim=-1, eps=1e-12)
        elif self.weight_norm:
            x = F.normalize(x, dim=-1, eps=1e-12)
        weight = F.normalize(self.last.weight, dim=-1) if self.weight_norm else self.last.weight
        return F.linear(x, weight)


class Projected(nn.Module):
    """An encoder with a projection head behind it."""

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Projections (n, outputs)."""
        return self.head(_flat(self.encoder(*args, **kwargs)))


def _flat(embedding: Any) -> Tensor:
    if not isinstance(embedding, Tensor) or embedding.ndim != 2:
        shape = tuple(embedding.shape) if isinstance(embedding, Tensor) else type(embedding).__name__
        raise InputError(f"The encoder gives {shape}, but must give one embedding a sample: a tensor (samples, width)")
    return embedding


# --- training -------------------------------------------------------------------------------------------------------


class RandomTeacher(Distillation):
    """Objective for `fit`: a student imitates a frozen teacher's projections; labels are not looked at.

    Args:
        teacher: encoder and head at random weights, kept as a frozen copy in eval mode.
        settings: of `random_teacher_loss`.
    """

    def __init__(self, teacher: nn.Module, **settings: Any) -> None:
        super().__init__(teacher, self.loss_of)
        self.settings = settings

    def loss_of(self, student: Answer, teacher: Answer, labels: Any) -> dict[str, Tensor]:
        """The one term."""
        return {"imitation": random_teacher_loss(student.logits, teacher.logits, **self.settings)}


class RandomTeacherPretraining:
    """Draw a teacher, start a student near it, train it, and drop the heads.

        student, teacher = RandomTeacherPretraining(resnet18, {"out_dim": 4096}, epochs=100).fit(images)

    Args:
        encoder_factory: () -> an encoder at random weights, called twice: for the teacher and the other draw.
        head_kwargs: of `ProjectionHead`; the embedding's width is found if it is not among them.
        alpha: how far from the teacher the student starts, see `interpolate_init`.
        lr: of AdamW without weight decay.
        epochs: passes over the data.
        seed: of both draws and of the order of the data.
        batch_size: samples a batch, where the data does not say itself.
        settings: of `random_teacher_loss`.
    """

    def __init__(
        self,
        encoder_factory: Callable[[], nn.Module],
        head_kwargs: Mapping[str, Any] | None = None,
        alpha: float = 0.0,
        lr: float = 1e-3,
        epochs: int = 100,
        seed: int = 0,
        *,
        batch_size: int = 256,
        **settings: Any,
    ) -> None:
        for name, value in (("lr", lr), ("epochs", epochs), ("batch_size", batch_size)):
            positive(name, value)
        self.encoder_factory, self.head_kwargs, self.alpha = encoder_factory, dict(head_kwargs or {}), alpha
        self.lr, self.epochs, self.seed, self.batch_size, self.settings = lr, epochs, seed, batch_size, settings

    def start(self, inputs: Any) -> tuple[Projected, Projected]:
        """(student, teacher) before training, both with their heads.

        Args:
            inputs: some of the data, for the embedding's width; one sample is used.
        """
        teacher, random = (self._draw(which, inputs) for which in ("teacher", "random"))
        student: Any = interpolate_init(teacher, random, alpha=self.alpha)
        return student, teacher

    def _draw(self, which: str, inputs: Any) -> Projected:
        with seeds.isolated(seeds.derive(self.seed, which)):
            encoder, settings = self.encoder_factory(), self.head_kwargs
            if "embed_dim" not in settings:
                with torch.no_grad(), mode(encoder, training=False):
                    one = to_device(rows_of(inputs, 0, 1), device_of(encoder))
                    settings = {"embed_dim": _flat(forward(encoder, one)).shape[1], **settings}
            return Projected(encoder, ProjectionHead(**settings).to(device_of(encoder)))

    def objective(self, teacher: nn.Module) -> RandomTeacher:
        """What `fit` minimises."""
        return RandomTeacher(teacher, **self.settings)

    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        """AdamW without weight decay."""
        return torch.optim.AdamW(parameters, lr=self.lr, weight_decay=0.0)

    def fit(self, loader: Any, **settings: Any) -> tuple[nn.Module, nn.Module]:
        """Train on inputs, of which labels may be a part that is not used; returns (student, teacher) encoders.

        Args:
            loader: as `core.loop.fit` takes its data.
            settings: further ones of `core.loop.fit`.
        """
        source = as_batches(loader, self.batch_size, seed=self.seed)
        first = next(source.epoch(0), None)
        if first is None:
            raise InputError("loader gave no batch, but must have at least one sample")
        student, teacher = self.start(unpack(first[0])[0])
        objective = self.objective(teacher)
        fit(
            student,
            loader,
            objective,
            **{
                "epochs": self.epochs,
                "batch_size": self.batch_size,
                "optimizer": self.optimizer,
                "seed": self.seed,
                **settings,
            },
        )
        frozen: Any = objective.teacher
        return student.encoder.eval(), frozen.model.encoder


# --- how good features are ------------------------------------------------------------------------------------------


def linear_probe(
    encoder: nn.Module,
    train: Any,
    test: Any,
    *,
    standardize: bool = True,
    epochs: int = 100,
    lr: float = 1e-3,
    batch_size: int = 256,
    seed: int = 0,
) -> float:
    """Share of test samples, 0 to 1, that a linear classifier on frozen embeddings gets right.

    Args:
        encoder: gives embeddings (n, width), asked once in eval mode.
        train: labelled samples that the classifier learns from.
        test: labelled samples that it is judged on.
        standardize: shift and scale every dimension by its mean and deviation over `train`.
        epochs: of AdamW; 10 while tracking, more for final numbers.
        lr: its learning rate.
        batch_size: its batches.
        seed: of the classifier's weights and the order of samples.
    """
    x, y, xs, ys = _embedded(encoder, train, test, standardize=standardize)
    with seeds.isolated(seeds.derive(seed, "probe")):
        probe = nn.Linear(x.shape[1], int(max(y.max(), ys.max())) + 1)
    settings: dict[str, Any] = {"optimizer": lambda p: torch.optim.AdamW(p, lr=lr), "batch_size": batch_size}
    fit(probe, TensorData(x, y), epochs=epochs, seed=seed, progress=False, **settings)
    with torch.no_grad():
        return float((probe(xs).argmax(-1) == ys).double().mean())


def knn_probe(encoder: nn.Module, train: Any, test: Any, *, k: int = 20) -> float:
    """Share of test samples, 0 to 1, that the k nearest training embeddings (standardised) vote right.

    Args:
        encoder: as in `linear_probe`; likewise `train` and `test`.
        train: see there.
        test: see there.
        k: neighbours, 1 to the number of training samples.
    """
    from sklearn.neighbors import KNeighborsClassifier

    x, y, xs, ys = _embedded(encoder, train, test, standardize=True)
    in_range("k", k, 1, len(x))
    return float(KNeighborsClassifier(k).fit(x.numpy(), y.numpy()).score(xs.numpy(), ys.numpy()))


def _embedded(encoder: nn.Module, train: Any, test: Any, *, standardize: bool) -> tuple[Tensor, ...]:
    x, xs = (_flat(predict(encoder, in_order(data))).float().cpu() for data in (train, test))
    if standardize:
        mean, deviation = x.mean(0), x.std(0)
        deviation = torch.where(deviation > 1e-12 * mean.abs().clamp_min(1), deviation, 1.0)  # dead dimensions stay
        x, xs = (x - mean) / deviation, (xs - mean) / deviation
    return x, labels_of(train), xs, labels_of(test)


# --- lottery tickets ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """A round of pruning.

    Attributes:
        round: from 0, which is dense.
        amount: share of the prunable weights that were zero while training.
        score: what `train_fn` returned.
        mask: by parameter name, True where a weight was kept.
    """

    round: int
    amount: float
    score: Any
    mask: dict[str, Tensor]


def iterative_magnitude_prune(
    model: nn.Module, train_fn: Callable[[nn.Module], Any], *, ratio: float = 0.2, rounds: int = 10
) -> list[Record]:
    """Train, drop the smallest weights of all layers together, rewind the rest to the start; again and again.

    Every round trains a copy of the model as it is given, with the weights dropped so far held at zero, whatever
    optimizer `train_fn` makes. It must begin each time from the same state of that optimizer: a new one, or the
    checkpoint's.

    Args:
        model: where each round starts; not changed. Its tensors of two and more dimensions are pruned.
        train_fn: trains a model in place, and returns how good it is.
        ratio: share of the remaining weights that a round drops, 0 to 1.
        rounds: trainings; the first one is dense.
    """
    in_range("ratio", ratio, 0, 1, above=True, below=True)
    positive("rounds", rounds)
    mask = {name: torch.ones_like(p, dtype=torch.bool) for name, p in model.named_parameters() if p.ndim > 1}
    amount, records = 0.0, list[Record]()
    for number in range(rounds):
        candidate = copy.deepcopy(model)
        with _held_at_zero(candidate, mask):
            score = train_fn(candidate)
        records.append(Record(number, amount, score, mask))
        trained = dict(candidate.named_parameters())
        amount += (1 - amount) * ratio
        sizes = {name: torch.where(keep, trained[name].detach().abs(), -1.0) for name, keep in mask.items()}
        mask = top_share(sizes, 1 - amount)
    return records


@contextmanager
def _held_at_zero(model: nn.Module, mask: Mapping[str, Tensor]) -> Any:
    """Keep masked-out weights at zero through the steps of every optimizer."""
    parameters = dict(model.named_parameters())
    parts = [(parameters[name], keep) for name, keep in mask.items()]

    @torch.no_grad()
    def gradients(*_: Any) -> None:
        for parameter, keep in parts:
            if parameter.grad is not None:
                parameter.grad.mul_(keep)

    @torch.no_grad()
    def weights(*_: Any) -> None:
        for parameter, keep in parts:
            parameter.mul_(keep)

    weights()
    handles = [register_optimizer_step_pre_hook(gradients), register_optimizer_step_post_hook(weights)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
