"""Mamba PKD: a trained image classifier becomes a sequence of tiny Mamba students that add up to it.

Each student is a weak learner, trained on what its predecessors, frozen, have left over. Any first j of them answer
together, or as many as a sample needs for the sum to be sure (`anytime`). With the teacher's logits z and labels y:

    loss        alpha CE(p, y) + (1 - alpha) T^2 KL(softmax(z / T) || softmax(p / T))
    "residual"  p = f_1 + ... + f_t, logits summed before they are divided by T; only f_t gets a gradient
    "boost"     p = f_t; sample i weighs KL(z_i || ensemble_i) / mean; students averaged, weighed by held-out accuracy
    "chain"     p = f_t, and z are the logits of student t - 1; students averaged
    block       u + W_out (o * SiLU(b)),  [a, b] = W_in RMSNorm(u),  a <- SiLU(causal convolution of a)
    scan        h_t = exp(delta_t A) h_{t-1} + delta_t B_t a_t,  o_t = C_t h_t + D a_t;  delta, B and C read from a

Use it where a model must run in several sizes or stop early, and operations, not milliseconds, are scarce: a scan in
Python is slower than a convolution of many times its operations. Not where one size is all that is needed: in our
measurements (arena `distill`, task `weak_learners`) a single student of all their operations and steps does better than
four together, which do better than four that were taught apart; and soft targets made no difference there.

Paper: arXiv 2503.01727 (SAC 2025), without public code. The paper says that students of Mamba blocks and of falling
size learn from hard and soft targets, each from what the ones before it left; it does not say by which rule, nor the
widths, patches, alpha or T. The three modes here are our reading of it and none of them is "the" algorithm: "residual"
is the plainest, "boost" follows progressive ensemble distillation (B-DISTIL), "chain" a chain of teacher assistants.

Cost: teacher and frozen students are asked once and not at every step, so a stage costs its own student alone; with
random augmentation give `cache=False`. Limits: the scan runs in single precision or more, one position after the other
(`chunk` trades memory and work for fewer and larger operations); FLOPs leave out activations and norms.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from retouch.core import seeds
from retouch.core.batches import as_batches, in_order
from retouch.core.cards import Card
from retouch.core.data import TensorData, in_memory, labels_of
from retouch.core.distillation import check_pair
from retouch.core.errors import InputError, in_range, one_of, positive
from retouch.core.loop import Checkpoint, fit
from retouch.core.metrics.compute import forward_flops
from retouch.core.models import (
    Batch,
    device_of,
    first_tensor,
    forward,
    logits_of,
    mode,
    predict,
    rows_of,
    size_of,
    to_device,
    tree_map,
    unpack,
)
from retouch.core.teachers import Teacher

CARD = Card(
    title="Mamba PKD: progressive distillation into Mamba students",
    room="distill",
    paper="arXiv:2503.01727",
    shape="objective",
    line="Distils a classifier into a sequence of tiny Mamba students that add up to it and can stop early.",
    tags=("classification", "state-space models", "ensembles", "anytime prediction", "logits"),
    plugin="ProgressiveDistiller",
)

MODES = ("residual", "boost", "chain")

# --- the selective state space --------------------------------------------------------------------------------------


def selective_scan(
    a: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    *,
    z: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """h_t = exp(delta_t A) h_{t-1} + delta_t B_t a_t from h_0 = 0, read as C_t h_t + D a_t: (batch, length, e).

    Args:
        a: input (batch, length, e).
        delta: step sizes (batch, length, e), at least 0.
        A: decay rates (e, n), at most 0.
        B: (batch, length, n).
        C: (batch, length, n).
        D: (e,).
        z: gate (batch, length, e): the result is multiplied by SiLU(z).
        chunk: positions worked on at once, in log2(chunk) passes; one after the other if None, which is the fastest on
            a CPU. It need not divide the length.

    Returns:
        In a's type; computed in single precision or more, as products of decays underflow in half.
    """
    batch, length, channels, state = (*a.shape, A.shape[-1]) if a.ndim == 3 and A.ndim == 2 else (0, 0, 0, 0)
    wanted = {"delta": (batch, length, channels), "A": (channels, state), "D": (channels,)}
    wanted |= dict.fromkeys("BC", (batch, length, state)) | {"a": (batch, length, channels)}
    for (name, shape), value in zip(wanted.items(), (delta, A, D, B, C, a), strict=True):
        if value.shape != shape or length == 0:
            raise InputError(
                f"{name} has shape {tuple(value.shape)}, but a and delta must be (batch, length, channels), A "
                "(channels, state), B and C (batch, length, state) and D (channels,)"
            )
    if chunk is not None:
        positive("chunk", chunk)
    wide = torch.promote_types(a.dtype, torch.float32)
    x, delta, A, B, C, D = (value.to(wide) for value in (a, delta, A, B, C, D))
    drive = delta * x
    h = x.new_zeros(batch, channels, state)
    read = []
    for part in (slice(None),) if chunk is None else (slice(s, s + chunk) for s in range(0, length, chunk)):
        decay, push = (delta[:, part, :, None] * A).exp(), drive[:, part, :, None] * B[:, part, None]
        states = _stepped(decay, push, h) if chunk is None else _doubled(decay, push, h)
        h = states[:, -1]
        read.append((states * C[:, part, None]).sum(-1))
    out = torch.cat(read, 1) + D * x
    return (out if z is None else out * F.silu(z.to(wide))).to(a.dtype)


def _stepped(decay: Tensor, push: Tensor, h: Tensor) -> Tensor:
    """The recurrence, step by step."""
    states = []
    for keep, new in zip(decay.unbind(1), push.unbind(1), strict=True):
        h = torch.addcmul(new, keep, h)
        states.append(h)
    return torch.stack(states, 1)


def _doubled(decay: Tensor, push: Tensor, h: Tensor) -> Tensor:
    """The recurrence in log2(length) passes: after each, a position knows twice as much of its past.

    Only products of decays are formed, never quotients: they may underflow to 0, which is right, and not overflow.
    """
    reach = 1
    while reach < push.shape[1]:
        push = torch.cat([push[:, :reach], torch.addcmul(push[:, reach:], decay[:, reach:], push[:, :-reach])], 1)
        decay = torch.cat([decay[:, :reach], decay[:, reach:] * decay[:, :-reach]], 1)
        reach *= 2
    return torch.addcmul(push, decay, h[:, None])


class SelectiveSSM(nn.Module):
    """Mamba's mixer (batch, length, dim) -> the same, with the parameter names of transformers' `MambaMixer`.

    Args:
        dim: width of the tokens.
        state_dim: n, states a channel.
        conv_kernel: width of the causal convolution.
        expand: channels e = expand * dim.
        dt_rank: rank of the map to the step sizes; "auto" is dim / 16, rounded up.
        dt_range: step sizes at the start are drawn log-uniform between these; long memory needs small ones.
        chunk: as in `selective_scan`.
    """

    def __init__(
        self,
        dim: int,
        state_dim: int = 16,
        conv_kernel: int = 4,
        expand: int = 2,
        dt_rank: int | Literal["auto"] = "auto",
        *,
        dt_range: tuple[float, float] = (1e-3, 1e-1),
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        rank = math.ceil(dim / 16) if dt_rank == "auto" else dt_rank
        sizes = {"dim": dim, "state_dim": state_dim, "conv_kernel": conv_kernel, "expand": expand, "dt_rank": rank}
        for name, value in sizes.items():
            positive(name, value)
        inner = expand * dim
        self.rank, self.state_dim, self.chunk = rank, state_dim, chunk
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, conv_kernel, groups=inner)
        self.x_proj = nn.Linear(inner, rank + 2 * state_dim, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.arange(1.0, state_dim + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, dim, bias=False)
        low, high = dt_range
        with torch.no_grad():
            self.dt_proj.weight.uniform_(-(rank**-0.5), rank**-0.5)
            steps = (math.log(low) + torch.rand(inner) * math.log(high / low)).exp().clamp_min(1e-4)
            self.dt_proj.bias.copy_(steps + (-torch.expm1(-steps)).log())  # the inverse of softplus

    def forward(self, tokens: Tensor) -> Tensor:
        """See the class."""
        a, gate = self.in_proj(tokens).chunk(2, dim=-1)
        kernel = self.conv1d.kernel_size[0]
        a = F.silu(self.conv1d(F.pad(a.transpose(1, 2), (kernel - 1, 0))).transpose(1, 2))
        low_rank, B, C = self.x_proj(a).split([self.rank, self.state_dim, self.state_dim], dim=-1)
        wide = torch.promote_types(a.dtype, torch.float32)
        delta = F.softplus(F.linear(low_rank, self.dt_proj.weight).to(wide) + self.dt_proj.bias.to(wide))
        out = selective_scan(a, delta, -self.A_log.to(wide).exp(), B, C, self.D, z=gate, chunk=self.chunk)
        return self.out_proj(out)

    def own_flops(self, tokens: Tensor) -> int:
        """Operations of the scans and gates of a batch: 7 a state and 4 a channel, at every position."""
        return len(tokens) * tokens.shape[1] * self.D.numel() * (7 * self.state_dim + 4)


class MambaBlock(nn.Module):
    """u + SSM(RMSNorm(u)), perhaps with a second scan from the end to the start."""

    def __init__(self, dim: int, *, bidirectional: bool = False, **settings: Any) -> None:
        super().__init__()
        self.norm, self.mixer = nn.RMSNorm(dim, eps=1e-5), SelectiveSSM(dim, **settings)
        self.backward_mixer = SelectiveSSM(dim, **settings) if bidirectional else None

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, length, dim) to the same."""
        x = self.norm(tokens)
        out = tokens + self.mixer(x)
        return out if self.backward_mixer is None else out + self.backward_mixer(x.flip(1)).flip(1)


class MambaClassifier(nn.Module):
    """A student: patches, a learned position each, Mamba blocks, a norm, one vector of all tokens, a linear layer.

    Args:
        image_size: side of the images in pixels, a multiple of `patch`.
        channels: of the images.
        patch: side of a patch.
        dim: width of the tokens.
        depth: blocks.
        num_classes: logits.
        pool: "mean" of the tokens, which helps as the scan is causal and the first ones see little, or the "last".
        bidirectional: scan in both directions.
        settings: state_dim, conv_kernel, expand and so on, as in `SelectiveSSM`.
    """

    def __init__(
        self,
        image_size: int,
        channels: int,
        patch: int,
        dim: int,
        depth: int,
        num_classes: int,
        *,
        pool: Literal["mean", "last"] = "mean",
        bidirectional: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__()
        sizes = {"image_size": image_size, "channels": channels, "patch": patch, "dim": dim, "depth": depth}
        for name, value in {**sizes, "num_classes": num_classes}.items():
            positive(name, value)
        one_of("pool", pool, ("mean", "last"))
        if image_size % patch:
            raise InputError(f"image_size is {image_size}, but must be a multiple of patch, which is {patch}")
        self.config = {**sizes, "num_classes": num_classes, "pool": pool, "bidirectional": bidirectional, **settings}
        self.pool = pool
        self.patches = nn.Conv2d(channels, dim, patch, patch)
        self.positions = nn.Parameter(0.02 * torch.randn((image_size // patch) ** 2, dim))
        self.blocks = nn.ModuleList([MambaBlock(dim, bidirectional=bidirectional, **settings) for _ in range(depth)])
        self.norm, self.head = nn.RMSNorm(dim, eps=1e-5), nn.Linear(dim, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (n, channels, side, side) to logits (n, num_classes)."""
        side = self.config["image_size"]
        if images.ndim != 4 or images.shape[1:] != (self.config["channels"], side, side):
            allowed = f"(samples, {self.config['channels']}, {side}, {side})"
            raise InputError(f"images have shape {tuple(images.shape)}, but must be {allowed}")
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            tokens = block(tokens)
        tokens = self.norm(tokens)
        return self.head(tokens.mean(1) if self.pool == "mean" else tokens[:, -1])


def adamw(model: nn.Module, *, lr: float = 1e-3, weight_decay: float = 0.01) -> torch.optim.AdamW:
    """AdamW that leaves the decay rates and the skip (`A_log`, `D`) of Mamba mixers without weight decay."""
    held: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            held[name.rpartition(".")[2] not in ("A_log", "D")].append(parameter)
    groups = [{"params": rows, "weight_decay": weight_decay * decays} for decays, rows in held.items() if rows]
    return torch.optim.AdamW(groups, lr=lr)


# --- loss -----------------------------------------------------------------------------------------------------------


def _terms(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    prior_logits: Tensor | None = None,
    alpha: float = 0.5,
    temperature: float = 4.0,
    sample_weight: Tensor | None = None,
) -> dict[str, Tensor]:
    """The two terms of `pkd_loss`, weighted."""
    in_range("alpha", alpha, 0, 1)
    positive("temperature", temperature)
    check_pair(student_logits, teacher_logits)
    if prior_logits is not None:
        check_pair(student_logits, prior_logits)
        student_logits = student_logits + prior_logits.detach()  # before T divides either
    if sample_weight is not None and sample_weight.shape != student_logits.shape[:1]:
        raise InputError(
            f"sample_weight has shape {tuple(sample_weight.shape)}, but must have one number a sample: "
            f"({len(student_logits)},)"
        )
    p, q = ((logits / temperature).log_softmax(-1) for logits in (teacher_logits.detach(), student_logits))
    hard = F.cross_entropy(student_logits, labels, reduction="none")
    soft = temperature**2 * F.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    if sample_weight is not None:
        hard, soft = sample_weight * hard, sample_weight * soft
    return {"hard": alpha * hard.mean(), "soft": (1 - alpha) * soft.mean()}


def pkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    prior_logits: Tensor | None = None,
    alpha: float = 0.5,
    temperature: float = 4.0,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """alpha CE + (1 - alpha) T^2 KL(teacher || prediction), mean over samples, for student plus prior.

    Args:
        student_logits: (n, classes).
        teacher_logits: (n, classes); no gradient goes into them.
        labels: classes (n,).
        prior_logits: sum of the frozen students' (n, classes), without gradient; 0 if None.
        alpha: weight of the labels, 0 to 1.
        temperature: T > 0, of both softmaxes of the KL term.
        sample_weight: (n,), factor of each sample's loss, of mean 1; see `gap_weights`.
    """
    weights: dict[str, Any] = {"alpha": alpha, "temperature": temperature, "sample_weight": sample_weight}
    terms = _terms(student_logits, teacher_logits, labels, prior_logits=prior_logits, **weights)
    return terms["hard"] + terms["soft"]


def gap_weights(ensemble_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Weights (n,) of mean 1 in proportion to KL(teacher || ensemble); all 1 where there is no gap left.

    Args:
        ensemble_logits: (n, classes).
        teacher_logits: (n, classes).
        temperature: of both softmaxes.
    """
    positive("temperature", temperature)
    check_pair(ensemble_logits, teacher_logits)
    p, q = ((logits.detach() / temperature).log_softmax(-1) for logits in (teacher_logits, ensemble_logits))
    gap = F.kl_div(q, p, log_target=True, reduction="none").sum(-1).clamp_min(0)
    mean = gap.mean()
    return gap / mean if float(mean) > 0 else torch.ones_like(gap)


# --- the ensemble ---------------------------------------------------------------------------------------------------


class Anytime(NamedTuple):
    """Logits (n, classes), and how many students each sample took (n,)."""

    logits: Tensor
    used: Tensor


class ProgressiveEnsemble(nn.Module):
    """Students in the order they were trained, whose logits are added or averaged.

    Args:
        students: classifiers of the same classes.
        combine: "sum" of the logits, or "mean" by `weights`.
        weights: one a student; all 1 if None.
        costs: operations of each student for one sample.
        teacher_cost: likewise of the teacher.
    """

    def __init__(
        self,
        students: Iterable[nn.Module] = (),
        *,
        combine: Literal["sum", "mean"] = "sum",
        weights: Sequence[float] | None = None,
        costs: Sequence[float] | None = None,
        teacher_cost: float = math.nan,
    ) -> None:
        super().__init__()
        one_of("combine", combine, ("sum", "mean"))
        self.students, self.combine = nn.ModuleList(students), combine
        count = len(self.students)
        self.weights: Tensor
        self.costs: Tensor  # the teacher's first
        self.register_buffer("weights", torch.ones(count) if weights is None else torch.tensor(weights).float())
        own = [math.nan] * count if costs is None else list(costs)
        self.register_buffer("costs", torch.tensor([teacher_cost, *own], dtype=torch.float64))
        if len(self.weights) != count or len(own) != count:
            raise InputError(f"weights has {len(self.weights)} numbers and costs {len(own)}, but must have {count}")

    def __len__(self) -> int:
        return len(self.students)

    def add(self, student: nn.Module, *, weight: float = 1.0, cost: float = math.nan) -> None:
        """Take in one more student, frozen."""
        self.students.append(student.eval().requires_grad_(False))
        self.weights = torch.cat([self.weights, self.weights.new_tensor([weight])])
        self.costs = torch.cat([self.costs, self.costs.new_tensor([cost])])

    def _shares(self, count: int) -> Tensor:
        weights = self.weights[:count]
        return weights / weights.sum() if self.combine == "mean" else weights

    def _count(self, num_students: int | None) -> int:
        if not len(self):
            raise InputError("The ensemble has no students, but must have at least one")
        count = len(self) if num_students is None else num_students
        in_range("num_students", count, 1, len(self))
        return count

    def forward(self, x: Any = None, num_students: int | None = None, **inputs: Any) -> Tensor:
        """Logits (n, classes) of the first students, all if None; inputs are x or keywords."""
        count, given = self._count(num_students), inputs if x is None else x
        parts = [logits_of(forward(student, given)) for student in list(self.students)[:count]]
        shares = self._shares(count)
        return torch.stack([share * logits for share, logits in zip(shares, parts, strict=True)]).sum(0)

    @torch.no_grad()
    def anytime(self, x: Any, threshold: float) -> Anytime:
        """Add student after student, for each sample until its largest probability is at the threshold.

        Args:
            x: inputs, as in `forward`.
            threshold: 0 (one student each) to 1.
        """
        in_range("threshold", threshold, 0, 1)
        self._count(None)
        rows = torch.arange(size_of(x), device=self.weights.device)  # of samples that are not sure yet
        used, total = torch.zeros_like(rows), torch.empty(0)
        with mode(self, training=False):
            for number, student in enumerate(self.students):
                part = x if number == 0 else tree_map(lambda t: t[rows], x)  # noqa: B023  called at once
                logits = self.weights[number] * logits_of(forward(student, part))
                total = logits if number == 0 else total.index_add(0, rows, logits)
                used[rows] = number + 1
                scale = self.weights[: number + 1].sum() if self.combine == "mean" else 1.0
                rows = rows[(total[rows] / scale).softmax(-1).amax(-1) < threshold]
                if not len(rows):
                    break
        if self.combine == "mean":
            total = total / self.weights.cumsum(0)[used - 1, None]
        return Anytime(total, used)

    def flops(self, num_students: int | None = None) -> float:
        """Operations of the first students (all if None) against the teacher's; NaN if they were not counted."""
        return float(self.costs[1 : 1 + self._count(num_students)].sum() / self.costs[0])

    def student_flops(self) -> list[float]:
        """Operations of each student against the teacher's: to stand beside its own accuracy, not the ensemble's."""
        return (self.costs[1:] / self.costs[0]).tolist()


# --- training -------------------------------------------------------------------------------------------------------


class PKD:
    """Objective for `fit` of one stage: a student learns from labels, the teacher, and the frozen students before it.

    A batch may bring what they say: targets {"labels", "teacher", "prior", "weight"}, the last two where they apply.

    Args:
        teacher: kept as a frozen copy; None where the batch brings its logits.
        prior: frozen students.
        weigh: weigh samples by the gap of the frozen students to the teacher, instead of adding to their logits.
        alpha: as in `pkd_loss`.
        temperature: as in `pkd_loss`.
    """

    __name__ = "pkd"

    def __init__(
        self,
        teacher: nn.Module | None,
        prior: ProgressiveEnsemble | None = None,
        *,
        weigh: bool = False,
        alpha: float = 0.5,
        temperature: float = 4.0,
    ) -> None:
        in_range("alpha", alpha, 0, 1)
        positive("temperature", temperature)
        self.teacher, self.prior = (m if m is None or isinstance(m, Teacher) else Teacher(m) for m in (teacher, prior))
        self.weigh = weigh
        self.settings: dict[str, Any] = {"alpha": alpha, "temperature": temperature}

    def __call__(self, model: nn.Module, batch: Batch, run: Any = None) -> dict[str, Tensor]:
        """{"hard", "soft"}, weighted."""
        inputs, targets = unpack(batch)
        told = targets if isinstance(targets, Mapping) else self.told(inputs, targets)
        if told.get("labels") is None:
            raise InputError("The batch has no labels, but this adds cross entropy: samples must be (input, target)")
        rest: dict[str, Any] = {"prior_logits": told.get("prior"), "sample_weight": told.get("weight")}
        return _terms(logits_of(forward(model, inputs)), told["teacher"], told["labels"], **rest, **self.settings)

    def told(self, inputs: Any, labels: Tensor | None) -> dict[str, Any]:
        """What teacher and frozen students say of inputs, with the labels, as targets of a batch."""
        if self.teacher is None:
            raise InputError("teacher is None, but must be a model where the batch does not bring its logits")
        device = getattr(first_tensor(inputs), "device", "cpu")
        found: dict[str, Any] = {"labels": labels, "teacher": logits_of(forward(self.teacher.to(device), inputs))}
        if self.prior is None:
            return found
        before = logits_of(forward(self.prior.to(device), inputs))
        return {**found, **({"weight": gap_weights(before, found["teacher"])} if self.weigh else {"prior": before})}


class ProgressiveDistiller:
    """Trains one student after the other; an ensemble comes out.

        small = [lambda: MambaClassifier(32, 3, 8, dim, 1, 10) for dim in (16, 12, 8)]
        ensemble = ProgressiveDistiller(teacher, small).fit(images)
        ensemble(x, num_students=2), ensemble.anytime(x, 0.9), ensemble.flops(2)

    Args:
        teacher: classifier, kept as a frozen copy.
        student_factories: () -> an untrained student, in the order of training: by the paper, from large to small.
        mode: "residual", "boost" or "chain", see the top of this file.
        alpha: weight of the labels, 0 to 1.
        temperature: T > 0.
        lr: of AdamW with a cosine schedule to 0.
        cache: ask teacher and frozen students once for each sample, which wants data without random augmentation and
            holds it in memory. A list of batches is never cached.
        seed: of all weights and orders.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student_factories: Sequence[Callable[[], nn.Module]],
        mode: Literal["residual", "boost", "chain"] = "residual",
        *,
        alpha: float = 0.5,
        temperature: float = 4.0,
        lr: float = 1e-3,
        cache: bool = True,
        seed: int = 0,
    ) -> None:
        one_of("mode", mode, MODES)
        in_range("alpha", alpha, 0, 1)
        for name, value in (("temperature", temperature), ("lr", lr)):
            positive(name, value)
        if not len(student_factories):
            raise InputError("student_factories is empty, but must have at least one function that makes a student")
        self.teacher = teacher if isinstance(teacher, Teacher) else Teacher(teacher)
        self.student_factories, self.mode, self.lr, self.cache, self.seed = student_factories, mode, lr, cache, seed
        self.settings: dict[str, Any] = {"alpha": alpha, "temperature": temperature}
        self.histories: list[Any] = []

    def fit(self, loader: Any, *, validation: Any = None, **settings: Any) -> ProgressiveEnsemble:
        """All stages; see `stages` for the arguments."""
        *_, ensemble = self.stages(loader, validation=validation, **settings)
        return ensemble

    def stages(
        self, loader: Any, *, validation: Any = None, trainer: Callable[..., Any] | None = None, **settings: Any
    ) -> Iterator[ProgressiveEnsemble]:
        """The ensemble after every stage, one student larger each time.

        Args:
            loader: labelled samples, as `core.loop.fit` takes its data.
            validation: held-out samples that "boost" weighs students by; the training samples if None.
            trainer: called like `core.loop.fit`, instead of it, for every student; what it returns is kept.
            settings: of `core.loop.fit`, for each stage: 300 steps unless said otherwise. A checkpoint's folder gets
                one folder a student, and a run that was stopped goes on where it was.
        """
        if "epochs" not in settings:
            settings.setdefault("steps", 300)
        if isinstance(loader, DataLoader) and loader.batch_size:
            settings.setdefault("batch_size", loader.batch_size)
        held = in_memory(loader) if self.cache and not isinstance(loader, list) else None
        one = next(iter(as_batches(loader if held is None else held, 1).epoch(0)), None)
        if one is None:
            raise InputError("loader gave no batch, but must have at least one sample")
        sample = rows_of(unpack(one[0])[0], 0, 1)
        ensemble = ProgressiveEnsemble(
            combine="sum" if self.mode == "residual" else "mean", teacher_cost=forward_flops(self.teacher, sample)
        )
        self.histories = []
        for number, factory in enumerate(self.student_factories):
            with seeds.isolated(seeds.derive(self.seed, "student", number)):
                student = factory()
            chained = self.mode == "chain" and number > 0
            teacher = Teacher(ensemble.students[-1]) if chained else self.teacher
            prior = ensemble if number and self.mode != "chain" else None
            objective = PKD(teacher, prior, weigh=self.mode == "boost", **self.settings)
            data = loader if held is None else _cached(held, objective)
            given: dict[str, Any] = {"optimizer": adamw(student, lr=self.lr), "scheduler": _cosine, **settings}
            if given.get("checkpoint") is not None:
                given["checkpoint"] = _stage(given["checkpoint"], number)
            stage_seed = seeds.derive(self.seed, "stage", number)
            self.histories.append((trainer or fit)(student, data, objective, **{"seed": stage_seed, **given}))
            weight = _accuracy(student, loader if validation is None else validation) if self.mode == "boost" else 1.0
            ensemble.to(device_of(student)).add(student, weight=weight, cost=forward_flops(student, sample))
            yield ensemble.eval()


def _cosine(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def _stage(checkpoint: Any, number: int) -> Checkpoint:
    whole = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint(checkpoint)
    return replace(whole, folder=Path(whole.folder) / f"student-{number + 1}")


def _cached(data: TensorData, objective: PKD) -> TensorData:
    """The data with what teacher and frozen students say of it among its targets."""
    inputs = TensorData(data.inputs)
    asked = {"teacher": objective.teacher, "prior": objective.prior}
    found = {name: predict(m, in_order(inputs)).cpu() for name, m in asked.items() if m is not None}
    if objective.weigh and "prior" in found:
        found["weight"] = gap_weights(found.pop("prior"), found["teacher"])
    return TensorData(data.inputs, {"labels": labels_of(data), **found})


def _accuracy(model: nn.Module, data: Any) -> float:
    """Share of samples classified rightly; at least a little, so that weights never sum to 0."""
    hits = [
        (predict(model, [batch]).argmax(-1) == to_device(unpack(batch)[1], device_of(model))).float()
        for batch in in_order(data)
    ]
    return max(float(torch.cat(hits).mean()), 1e-6)
