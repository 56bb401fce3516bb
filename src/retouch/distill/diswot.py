"""DisWOT: which untrained student will learn best from a teacher, told by one batch and without any training.

Teacher and candidates stay at their random initialisation. For one labelled batch two things are compared:

    relation   G = A A^T (b, b) of the flattened last feature maps, rows at length 1    d_rel = |G_t - G_s|^2 / b^2
    semantic   w = gradient of cross entropy by the head's weights (classes, channels); for every class w_n w_n^T with
               rows at length 1                                                         d_sem = |.._t - .._s|^2 / (K C)
    score      -(d_rel + d_sem), the higher the better; `evolutionary_search` looks for it in spaces too large to list

Use it to shorten a long list of students within a budget of size or compute before any is trained. Do not use it for a
final choice among a few, which distilling each briefly makes better, and put it beside the number of parameters, which
is as good in small spaces. Scores compare only under one teacher, batch and initialisation (`rank_students` sees to
it). d_sem is often 2 to 40 times as spread as d_rel, so their sum is mostly d_sem: look at both, or add up ranks.

Paper: arXiv 2303.15678. Code: lilujunai/DisWOT-CVPR2023. Where they part: the ranking script compares channels of the
first image alone, its README the batch as the paper does, which is followed (`channel_distance` is the other). Weights
are N(0, 1) in the ranking script and the layers' own in the search script: the latter here, for under N(0, 1) softmax
saturates and the semantic term can turn against accuracy (`init="gaussian"`). The search script sorts a tournament the
wrong way round and breeds from its worse half; here the best is the parent.

Cost: one forward pass a network: the head's gradient is (softmax - onehot)^T f / b, and class Grams are never formed.
Limits: teacher and student must agree in classes and in the width the head reads (`weights=(1, 0)` otherwise).
"""

import copy
import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from retouch.core import seeds
from retouch.core.cards import Card
from retouch.core.errors import InputError, in_range, one_of, positive
from retouch.core.features import capture, layer_of
from retouch.core.models import forward, head_of, logits_of, size_of, tree_map

CARD = Card(
    title="DisWOT: student search without training",
    room="distill",
    paper="arXiv:2303.15678",
    shape="probe",
    line="Ranks untrained students by how alike they are to an untrained teacher on one batch.",
    tags=("classification", "architecture search", "zero-cost proxy"),
    plugin="rank_students",
)

Arch = TypeVar("Arch")
SIDES = ("input", "output")
EPS = 1e-12  # of the official normaliser: rows shorter than this are not brought to length 1
ATTEMPTS = 10_000  # draws until an architecture within the budget must have turned up

# --- distances ------------------------------------------------------------------------------------------------------


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))  # squares of half precision overflow


def _finite(name: str, x: Tensor) -> Tensor:
    if not torch.isfinite(x).all():
        raise InputError(f"{name} holds values that are not finite, but must be finite")
    return _wide(x)


def _grams(features: Tensor) -> Tensor:
    """Products (..., n, n) of all rows (..., n, d), each row of them at length 1; a row of zeros stays."""
    scale = features.detach().abs().amax((-2, -1), keepdim=True)  # cancels, and keeps the squares in range
    features = features / torch.where(scale > 0, scale, 1.0)
    return F.normalize(features @ features.transpose(-2, -1), dim=-1)


def _same_batch(teacher: Tensor, student: Tensor) -> None:
    if teacher.ndim < 2 or student.ndim < 2 or len(teacher) != len(student) or len(teacher) == 0:
        raise InputError(
            f"teacher_feat has shape {tuple(teacher.shape)} and student_feat {tuple(student.shape)}, but both must be "
            "(b, C, H, W) for the same images"
        )


def relation_distance(teacher_feat: Tensor, student_feat: Tensor) -> Tensor:
    """How differently two networks see which images of a batch are alike: 0 to 4 / b (section 3.2).

    Args:
        teacher_feat: last feature maps (b, C, H, W), or anything else (b, ...).
        student_feat: likewise; C, H and W may differ.

    Raises:
        InputError: if an image's features are all zero, or not finite.
    """
    _same_batch(teacher_feat, student_feat)
    grams = []
    for name, features in (("teacher_feat", teacher_feat), ("student_feat", student_feat)):
        flat = _finite(name, features).flatten(1)
        dead = (flat == 0).all(1)
        if dead.any():
            raise InputError(f"{name} is zero everywhere for {int(dead.sum())} of the images, but must say something")
        grams.append(_grams(flat))
    return (grams[0] - grams[1]).square().mean()


def semantic_distance(teacher_head_grad: Tensor, student_head_grad: Tensor) -> Tensor:
    """How differently classes are tied to channels: 0 to 4 (section 3.2).

    Row i of the Gram of a class is sign(w_i) w / |w| at length 1, which gives each pair of rows in closed form. Where
    |w_i| |w| is below 1e-12, as for classes that a saturated softmax rules out, the row fades to zeros.

    Args:
        teacher_head_grad: gradient by the head's weights (classes, channels).
        student_head_grad: likewise, of the same shape.
    """
    t, s = _finite("teacher_head_grad", teacher_head_grad), _finite("student_head_grad", student_head_grad)
    if t.ndim != 2 or s.ndim != 2 or len(t) != len(s):
        raise InputError(
            f"teacher_head_grad has shape {tuple(t.shape)} and student_head_grad {tuple(s.shape)}, but both must be "
            "(classes, channels) with the same classes"
        )
    if t.shape[1] != s.shape[1]:
        raise InputError(
            f"The teacher's head reads {t.shape[1]} channels and the student's {s.shape[1]}, but the semantic term "
            "needs as many: weights=(1, 0) scores by the relation term alone"
        )
    lengths = [g.norm(dim=1, keepdim=True) for g in (t, s)]
    # Length of row i, 1 but for the entries that are next to nothing, and its sign.
    a, b = (g * n / (g.abs() * n).clamp_min(EPS) for g, n in zip((t, s), lengths, strict=True))
    one, two = (g / torch.where(n > 0, n, 1.0) for g, n in zip((t, s), lengths, strict=True))
    apart = (one - two).square().sum(1, keepdim=True)  # 2 - 2 cos, without its rounding
    either = (one.square().sum(1, keepdim=True) > 0) & (two.square().sum(1, keepdim=True) > 0)
    return ((a - b).square() + a * b * torch.where(either, apart, 0.0)).mean().clamp_min(0)


def channel_distance(teacher_feat: Tensor, student_feat: Tensor) -> Tensor:
    """How differently channels go together within each image: the form of ICKD, 0 to 4.

    Args:
        teacher_feat: feature maps (b, C, H, W).
        student_feat: likewise, with as many channels.
    """
    _same_batch(teacher_feat, student_feat)
    if teacher_feat.ndim < 3 or student_feat.ndim < 3 or teacher_feat.shape[1] != student_feat.shape[1]:
        raise InputError(
            f"teacher_feat has shape {tuple(teacher_feat.shape)} and student_feat {tuple(student_feat.shape)}, but "
            "both must be (b, C, H, W) with the same C"
        )
    t, s = (_grams(_wide(features).flatten(2)) for features in (teacher_feat, student_feat))
    return (t - s).square().sum() / (t.shape[0] * t.shape[1])


def head_gradient(features: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Gradient of the mean cross entropy by a linear head's weights, without a backward pass: (classes, channels).

    Args:
        features: what the head reads (b, channels).
        logits: what it says (b, classes).
        labels: (b,).
    """
    error = logits.softmax(1) - F.one_hot(labels, logits.shape[1])
    return error.T @ features / len(features)


# --- scores of networks ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DisWOTScore:
    """How alike a student is to its teacher, the higher the better.

    Attributes:
        total: the weighted sum.
        relation: minus the relation distance; NaN where its weight is 0.
        semantic: minus the semantic distance; NaN where its weight is 0.
    """

    total: float
    relation: float
    semantic: float


class _LastMap(TorchFunctionMode):
    """Keeps the latest feature map or sequence of tokens, whether a layer or a function made it."""

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.latest: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.ndim in (3, 4) and len(out) == self.samples:
            sizes = out.shape[1:] if out.ndim == 3 else (out.shape[2:].numel(),)  # global pooling makes one of them 1
            self.latest = out if min(sizes) > 1 else self.latest
        return out


NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def _reset(model: nn.Module, init: str) -> None:
    """New weights by the model's own rule (transformers) or its layers', or from N(0, 1)."""
    rule: Any = getattr(model, "_init_weights", None)

    def reset(module: nn.Module) -> None:
        default: Any = getattr(module, "reset_parameters", None)
        if rule is None and default is not None:
            default()
        if init == "gaussian" and isinstance(module, (nn.modules.conv._ConvNd, nn.Linear, *NORMS)):
            if isinstance(module.weight, Tensor):
                nn.init.ones_(module.weight) if isinstance(module, NORMS) else nn.init.normal_(module.weight)
            if isinstance(module.bias, Tensor):
                nn.init.zeros_(module.bias)

    if rule is not None:
        model.apply(rule)
    model.apply(reset)


def _scratch(model: nn.Module) -> nn.Module:
    """A copy in at least float32, which normalises by the batch and drops nothing out."""
    model = copy.deepcopy(model).requires_grad_(False)
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = _wide(tensor.data) if tensor.is_floating_point() else tensor.data
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.train()  # an untrained network has no statistics but the batch's
    return model


@torch.no_grad()
def _look(
    who: str,
    model: nn.Module,
    inputs: Any,
    labels: Tensor,
    *,
    seed: int,
    init: str | None,
    weights: tuple[float, float],
    feature_layer: str | None,
    head: str | None,
) -> tuple[Tensor | None, Tensor | None]:
    """A network's last map (b, ...) and its head's gradient (classes, channels) at new weights, None if not needed."""
    samples = size_of(inputs)
    head = head_of(model) if head is None and weights[1] else head
    with seeds.isolated(seed), ExitStack() as stack:
        if init is not None:
            _reset(model, init)
        first = next(model.parameters(), torch.empty(0))
        inputs = tree_map(lambda t: t.to(first if t.is_floating_point() else first.device), inputs)
        named = stack.enter_context(capture(model, [feature_layer] if feature_layer else []))
        read, said = (stack.enter_context(capture(model, [head] if head else [], side=side)) for side in SIDES)
        maps, recorder = list[Tensor | None](), _LastMap(samples)
        if head is not None:
            handle = layer_of(model, head).register_forward_pre_hook(lambda *_: maps.append(recorder.latest))
            stack.callback(handle.remove)
        with recorder:
            output = forward(model, inputs)
    features = named.get(feature_layer) if feature_layer else (maps or [recorder.latest])[-1]
    if features is None and weights[0]:
        raise InputError(f"The {who} shows no feature map before its head, so feature_layer must name a layer")
    if head is None or not weights[1]:
        return features, None
    logits, its = logits_of(output), said.get(head)
    if logits.ndim != 2 or its is None or not torch.equal(logits, its):
        raise InputError(f"head is {head!r}, but must be the linear layer whose output the {who} gives as its logits")
    classes = logits.shape[1]
    if labels.shape != (samples,) or labels.is_floating_point():
        raise InputError(f"labels has shape {tuple(labels.shape)}, but must be one class a sample, ({samples},)")
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise InputError(
            f"labels go from {int(labels.min())} to {int(labels.max())}, but must be 0 to {classes - 1}: the {who} "
            f"tells {classes} classes apart"
        )
    return features, head_gradient(read[head], logits, labels.to(logits.device))


def _scorer(
    teacher: nn.Module,
    images: Any,
    labels: Tensor,
    *,
    init: str | None,
    weights: tuple[float, float],
    generator: torch.Generator | None,
    repeats: int,
    **layers: str | None,
) -> Callable[[nn.Module], DisWOTScore]:
    """What scores students, all against the same draws of the teacher."""
    one_of("init", init, ("default", "gaussian", None))
    positive("repeats", repeats)
    if len(weights) != 2 or min(weights) < 0 or not any(weights):
        raise InputError(f"weights is {tuple(weights)}, but must be two numbers from 0 on, not both 0")
    if size_of(images) == 0:
        raise InputError("images is empty, but must hold at least one image")
    batch: tuple[Any, Tensor] = images, torch.as_tensor(labels)
    settings: dict[str, Any] = {"init": init, "weights": weights, **layers}
    base = int(torch.randint(2**62, (), generator=seeds.fresh(generator)))
    draws = range(repeats if init is not None else 1)  # weights as they are give the same every time

    def views(who: str, model: nn.Module) -> Iterator[tuple[Tensor | None, Tensor | None]]:
        model = _scratch(model)
        return (_look(who, model, *batch, seed=seeds.derive(base, i, who), **settings) for i in draws)

    theirs = list(views("teacher", teacher))

    def score(student: nn.Module) -> DisWOTScore:
        relation, semantic = list[float](), list[float]()
        for (features, gradient), ours in zip(theirs, views("student", student), strict=True):
            if weights[0] and features is not None and ours[0] is not None:
                relation.append(-float(relation_distance(features, ours[0])))
            if gradient is not None and ours[1] is not None:
                semantic.append(-float(semantic_distance(gradient, ours[1])))
        parts = [math.fsum(found) / len(found) if found else math.nan for found in (relation, semantic)]
        return DisWOTScore(_weighted(parts, weights), *parts)

    return score


def _weighted(parts: Sequence[float], weights: Sequence[float]) -> float:
    return math.fsum(weight * part for weight, part in zip(weights, parts, strict=True) if weight)


def diswot_score(
    teacher: nn.Module,
    student: nn.Module,
    images: Any,
    labels: Tensor,
    *,
    feature_layer: str | None = None,
    head: str | None = None,
    init: Literal["default", "gaussian"] | None = "default",
    weights: tuple[float, float] = (1.0, 1.0),
    generator: torch.Generator | None = None,
    repeats: int = 1,
) -> DisWOTScore:
    """How alike an untrained student is to an untrained teacher on one batch; the models are not changed.

    Args:
        teacher: classifier whose logits are the output of a linear layer.
        student: likewise, of the same classes; its head must read as many features.
        images: one batch (b, ...), or a mapping handed on as keywords.
        labels: classes (b,).
        feature_layer: layer of both whose output is compared; if None the last map (b, C, H, W) or sequence (b, tokens,
            width) before the head, which is what global pooling reads.
        head: linear layer of both that gives the logits; the last one if None.
        init: new weights for copies of both: "default" asks every layer's `reset_parameters`, "gaussian" is N(0, 1)
            for convolutions and linear layers without biases; None takes the weights as they are.
        weights: of the relation and the semantic term; a term of weight 0 is not computed.
        generator: a CPU generator of the new weights; a fresh one if None.
        repeats: draws of the weights that the score is a mean over.

    Raises:
        InputError: for labels out of range, heads of different widths, networks without a linear head, and features
            that are zero or not finite.
    """
    settings: dict[str, Any] = {"init": init, "weights": weights, "generator": generator, "repeats": repeats}
    return _scorer(teacher, images, labels, feature_layer=feature_layer, head=head, **settings)(student)


@dataclass(frozen=True)
class Ranked:
    """A row of `rank_students`: the student's name or number, its place from 1, and its scores."""

    name: Any
    place: int
    total: float
    relation: float
    semantic: float


def combined(
    relation: Sequence[float],
    semantic: Sequence[float],
    *,
    combine: Literal["sum", "rank"] = "sum",
    weights: tuple[float, float] = (1.0, 1.0),
) -> list[float]:
    """Totals of a set of candidates from both scores of each.

    Args:
        relation: of every candidate, the higher the better.
        semantic: likewise.
        combine: "sum" of scores (official), or of ranks from 1 for the worst; equal scores share their mean rank.
        weights: of the two; where one is 0 its scores may be NaN.
    """
    one_of("combine", combine, ("sum", "rank"))
    columns: list[Any] = [np.asarray(scores, dtype=float) for scores in (relation, semantic)]
    if combine == "rank":
        from scipy.stats import rankdata

        columns = [rankdata(column) for column in columns]
    return [_weighted(pair, weights) for pair in zip(*columns, strict=True)]


def rank_students(
    teacher: nn.Module,
    students: Iterable[nn.Module] | Mapping[Any, nn.Module],
    images: Any,
    labels: Tensor,
    combine: Literal["sum", "rank"] = "sum",
    *,
    init: Literal["default", "gaussian"] | None = "default",
    weights: tuple[float, float] = (1.0, 1.0),
    generator: torch.Generator | None = None,
    repeats: int = 1,
    feature_layer: str | None = None,
    head: str | None = None,
) -> list[Ranked]:
    """Students from the most promising one on, all held against the same draw of the teacher on the same batch.

    Args:
        teacher: as in `diswot_score`, like all that is not explained here.
        students: candidates, by name or in a row (then named 0, 1, ...); a generator is asked for one at a time.
        images: see there.
        labels: see there.
        combine: see `combined`.
        init: see there.
        weights: see there.
        generator: see there.
        repeats: see there.
        feature_layer: see there.
        head: see there.
    """
    one_of("combine", combine, ("sum", "rank"))
    settings: dict[str, Any] = {"init": init, "weights": weights, "generator": generator, "repeats": repeats}
    score = _scorer(teacher, images, labels, feature_layer=feature_layer, head=head, **settings)
    items = students.items() if isinstance(students, Mapping) else enumerate(students)
    found = [(name, score(student)) for name, student in items]
    if not found:
        raise InputError("students is empty, but must hold at least one candidate")
    parts = [its.relation for _, its in found], [its.semantic for _, its in found]
    totals = combined(*parts, combine=combine, weights=weights)
    order = sorted(range(len(found)), key=lambda i: -totals[i])
    return [
        Ranked(found[i][0], place, totals[i], found[i][1].relation, found[i][1].semantic)
        for place, i in enumerate(order, 1)
    ]


# --- search ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SearchResult(Generic[Arch]):
    """What a search has seen.

    Attributes:
        best: architecture of the highest score.
        score: its score.
        history: all (architecture, score), in the order of their evaluation.
        population: those alive at the end, the oldest first.
    """

    best: Arch
    score: float
    history: list[tuple[Arch, float]]
    population: list[tuple[Arch, float]]

    def top(self, k: int = 5) -> list[tuple[Arch, float]]:
        """The k best different ones of the history, the best first."""
        found = list[tuple[Arch, float]]()
        for arch, score in sorted(self.history, key=lambda pair: -pair[1]):
            if len(found) < k and all(arch != other for other, _ in found):
                found.append((arch, score))
        return found


def evolutionary_search(
    sample: Callable[[random.Random], Arch],
    mutate: Callable[[Arch, random.Random], Arch],
    score: Callable[[Arch], float],
    *,
    feasible: Callable[[Arch], bool] | None = None,
    population: int = 36,
    tournament: int = 8,
    evaluations: int = 1000,
    seed: int = 0,
) -> SearchResult[Arch]:
    """Regularised evolution: the best of a random few is mutated, its child joins, and the oldest leaves.

    Args:
        sample: generator of draws -> an architecture of the space.
        mutate: (architecture, generator of draws) -> a neighbour; the given one must stay as it is.
        score: architecture -> number, the higher the better; NaN counts as the worst.
        feasible: whether an architecture is within the budget; the others are never scored.
        population: architectures alive at a time, drawn at random in the beginning.
        tournament: of them drawn with replacement to choose a parent from.
        evaluations: scores computed in all, at least `population`.
        seed: of all draws.

    Raises:
        InputError: if nothing within the budget turns up.
    """
    positive("population", population)
    positive("tournament", tournament)
    in_range("evaluations", evaluations, population)
    rng = random.Random(seeds.derive(seed, "evolution"))
    history, alive = list[tuple[Arch, float]](), deque[tuple[Arch, float]](maxlen=population)

    def child() -> Arch:
        parent, _ = max((rng.choice(alive) for _ in range(tournament)), key=lambda pair: pair[1])
        return mutate(parent, rng)

    for number in range(evaluations):
        draw = child if number >= population else lambda: sample(rng)
        arch = next((a for a in (draw() for _ in range(ATTEMPTS)) if feasible is None or feasible(a)), None)
        if arch is None:
            raise InputError(f"feasible refused {ATTEMPTS} architectures in a row, but must allow some of the space")
        value = float(score(arch))
        history.append((arch, -math.inf if math.isnan(value) else value))
        alive.append(history[-1])  # the oldest leaves, however good it is
    best, value = max(history, key=lambda pair: pair[1])
    return SearchResult(best, value, history, list(alive))
