"""Knowledge concentration: one student takes over from several specialists, each expert in one part of the classes.

A large set of N classes is split into M verticals (birds, cars, ...). A specialist is trained on each, with sigmoids,
because labels are hierarchical: a black bird is a "bird" and a "black bird". The student then learns all of them:

    target   z_ij = sigma(specialist's logit) for the specialist's top K classes, 0 for all others and other verticals
    loss     -(1/b) sum_i sum_j z_ij log sigma(y_ij) + (1 - z_ij) log(1 - sigma(y_ij))        sum over all N classes
    head     a shared layer, then a layer of its own for each vertical, which alone its classes read ("fc-sc")
    scale    y = gamma_v x / ||x||, the logits x of a vertical at a length that is learned: it sets its own pace

Use it where specialists exist or are easy to get and one model must be served, with many classes in natural groups.
Teachers must be sigmoid classifiers: softmax makes hierarchical labels contradict each other. For a single teacher of
all classes with exclusive labels use classic distillation. A vertical of one class has logits of +-gamma and nothing
else: merge tiny ones. The student rejects other verticals only as well as the zeros taught it to: judge it within
verticals, as the paper does, and over all classes as well.

Paper: arXiv 1711.07607. No code of the authors was found, so what the paper leaves open is decided here: ReLU between
the head's layers, biases in them (`parameter_formula` counts none, as the paper's does), logits normalised within each
vertical, soft targets alone. Every class begins near a score of a half, so the first loss is about 0.7 N: without the
scale give `class_bias` a negative value, or warm up.

Cost: a specialist's forward for its own samples alone; targets of fixed data are asked once and kept as top K pairs
(`answered`). The grouped layers are one product each.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retouch.core import seeds
from retouch.core.batches import in_order
from retouch.core.cards import Card
from retouch.core.data import TensorData, in_memory
from retouch.core.errors import InputError, in_range, one_of, positive
from retouch.core.loop import History, fit
from retouch.core.models import Batch, forward, logits_of, tree_map, unpack
from retouch.core.progress import track
from retouch.core.teachers import Teacher

CARD = Card(
    title="Knowledge concentration",
    room="distill",
    paper="arXiv:1711.07607",
    shape="objective",
    line="Distils several specialists, each for one group of classes, into a single student of all classes.",
    tags=("classification", "many classes", "several teachers", "hierarchical labels", "logits"),
    plugin="KnowledgeConcentration",
)

KINDS = ("fc-fc", "fc-sc", "sc-sc")

# --- targets and loss -----------------------------------------------------------------------------------------------


def concentrate_targets(
    teacher_logits: Tensor, class_index: Tensor, *, num_classes: int, top_k: int | None = 100
) -> Tensor:
    """Soft targets over all classes from one vertical's specialist (section 3.2).

    Args:
        teacher_logits: (batch, classes of the vertical); no gradient goes into them.
        class_index: the vertical's classes among all (classes of the vertical,).
        num_classes: of all verticals.
        top_k: classes kept a sample; all if None.

    Returns:
        (batch, num_classes): sigmoids of the kept logits, 0 elsewhere.
    """
    if len(class_index) != teacher_logits.shape[1]:
        raise InputError(
            f"class_index has {len(class_index)} classes and teacher_logits {teacher_logits.shape[1]}, but both must "
            "have the vertical's"
        )
    if len(class_index) and not 0 <= int(class_index.min()) <= int(class_index.max()) < num_classes:
        raise InputError(f"class_index goes to {int(class_index.max())}, but must be 0 to {num_classes - 1}")
    values, kept = _top(teacher_logits.detach(), top_k)
    targets = values.new_zeros(len(values), num_classes)
    return targets.scatter(1, class_index.to(kept.device)[kept], values)


def _top(logits: Tensor, top_k: int | None) -> tuple[Tensor, Tensor]:
    """The k largest scores of each sample and where they are, (batch, k)."""
    if top_k is not None:
        in_range("top_k", top_k, 1)
    values, kept = logits.topk(min(top_k or logits.shape[1], logits.shape[1]), dim=1)
    return values.sigmoid(), kept


def concentration_loss(student_logits: Tensor, soft_targets: Tensor) -> Tensor:
    """Sigmoid cross entropy, summed over classes, mean over the batch (equation 1); a mean over classes is too small.

    Args:
        student_logits: (batch, classes).
        soft_targets: (batch, classes), 0 to 1.
    """
    if student_logits.shape != soft_targets.shape:
        raise InputError(
            f"student_logits have shape {tuple(student_logits.shape)} and soft_targets {tuple(soft_targets.shape)}, "
            "but both must have the same"
        )
    targets = soft_targets.detach().to(student_logits.dtype)
    return F.binary_cross_entropy_with_logits(student_logits, targets, reduction="sum") / len(student_logits)


# --- groups of classes ----------------------------------------------------------------------------------------------


def vertical_of_class(class_groups: Sequence[Tensor]) -> Tensor:
    """Vertical of every class (num_classes,).

    Raises:
        InputError: unless every class from 0 on is in exactly one group.
    """
    groups = [torch.as_tensor(group).long().flatten() for group in class_groups]
    if not groups or any(len(group) == 0 for group in groups):
        raise InputError("class_groups has an empty group or none, but every vertical must have a class")
    together = torch.cat(groups)
    if not torch.equal(together.sort().values, torch.arange(len(together), device=together.device)):
        raise InputError("class_groups overlap or leave out a class, but must hold every class from 0 on exactly once")
    found = torch.empty_like(together)
    for number, group in enumerate(groups):
        found[group] = number
    return found


def vertical_ids(labels: Tensor, class_groups: Sequence[Tensor]) -> Tensor:
    """Vertical of every sample (n,), from its labels.

    Args:
        labels: classes (n,), or 0 and 1 for every class (n, classes).
        class_groups: classes of each vertical.

    Raises:
        InputError: if a sample has labels of no vertical or of several.
    """
    owner = vertical_of_class(class_groups).to(labels.device)
    if labels.ndim == 1:
        return owner[labels]
    inside = torch.stack([labels[:, owner == number].amax(1) > 0 for number in range(len(class_groups))], 1)
    if not (inside.sum(1) == 1).all():
        raise InputError("A sample has labels of no vertical or of several, but must have those of one")
    return inside.long().argmax(1)


# --- the student's head ---------------------------------------------------------------------------------------------


class PerVertical(nn.Module):
    """A linear layer for each vertical: (b, inputs) or (b, verticals, inputs) -> (b, verticals, outputs)."""

    def __init__(self, verticals: int, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs)  # as nn.Linear has it
        self.weight = nn.Parameter(torch.empty(verticals, outputs, inputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(verticals, outputs).uniform_(-bound, bound)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        y = torch.einsum("bi,voi->bvo" if x.ndim == 2 else "bvi,voi->bvo", x, self.weight)
        return y if self.bias is None else y + self.bias


class SCHead(nn.Module):
    """Two hidden layers and a class layer, connected densely ("fc") or within verticals ("sc") (section 3.3).

    Args:
        in_features: width of the feature, s_b.
        class_groups: classes of each vertical.
        s1: units of the first hidden layer (of each vertical's, if "sc").
        s2: units that a class reads.
        kind: "fc-fc", "fc-sc" (the paper's best) or "sc-sc".
        shared: for "fc-sc", how many of the s2 units all verticals share; the others are private.
        activation: "relu", "gelu" or another function of `torch.nn.functional`.
        bias: have biases.
        class_bias: where the biases of the classes start.
    """

    def __init__(
        self,
        in_features: int,
        class_groups: Sequence[Tensor],
        s1: int = 4096,
        s2: int = 512,
        kind: Literal["fc-fc", "fc-sc", "sc-sc"] = "fc-sc",
        shared: int = 0,
        activation: str = "relu",
        *,
        bias: bool = True,
        class_bias: float = 0.0,
    ) -> None:
        super().__init__()
        one_of("kind", kind, KINDS)
        for name, value in (("in_features", in_features), ("s1", s1), ("s2", s2)):
            positive(name, value)
        in_range("shared", shared, 0, s2 if kind == "fc-sc" else 0)
        if not hasattr(F, activation):
            raise InputError(f"activation is {activation!r}, but must be a function of torch.nn.functional")
        owner, count = vertical_of_class(class_groups), len(class_groups)
        self.sizes = (in_features, s1, s2, shared, count, len(owner))
        self.kind, self.act = kind, getattr(F, activation)
        dense, grouped = nn.Linear, PerVertical
        self.first = grouped(count, in_features, s1, bias) if kind == "sc-sc" else dense(in_features, s1, bias)
        self.second = None if shared == s2 or kind == "fc-fc" else grouped(count, s1, s2 - shared, bias)
        common = s2 if kind == "fc-fc" else shared
        self.second_shared = dense(s1, common, bias) if common else None
        self.classes = dense(s2, len(owner), bias)
        if bias:
            nn.init.constant_(self.classes.bias, class_bias)
        # Verticals of different sizes are padded to the largest, so that the class layer is one product as well.
        widest = max(len(group) for group in class_groups)
        slots, position = torch.zeros(count, widest, dtype=torch.long), torch.empty(len(owner), dtype=torch.long)
        for number, group in enumerate(class_groups):
            slots[number, : len(group)] = torch.as_tensor(group)
            position[torch.as_tensor(group)] = number * widest + torch.arange(len(group))
        self.slots: Tensor
        self.position: Tensor
        self.register_buffer("slots", slots, persistent=False)
        self.register_buffer("position", position, persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """(batch, in_features) -> logits (batch, classes)."""
        hidden = self.act(self.first(features))
        if self.kind == "fc-fc":
            assert self.second_shared is not None
            return self.classes(self.act(self.second_shared(hidden)))
        parts = [] if self.second is None else [self.second(hidden)]
        if self.second_shared is not None:
            parts.insert(0, self.second_shared(hidden)[:, None].expand(-1, len(self.slots), -1))
        units = self.act(torch.cat(parts, -1) if len(parts) > 1 else parts[0])  # (b, verticals, s2)
        logits = torch.einsum("bvi,vni->bvn", units, self.classes.weight[self.slots])
        logits = logits.flatten(1)[:, self.position]
        return logits if self.classes.bias is None else logits + self.classes.bias

    def parameter_formula(self) -> int:
        """Weights without biases, as the paper counts them."""
        s_b, s1, s2, shared, verticals, classes = self.sizes
        if self.kind == "fc-fc":
            return s_b * s1 + s1 * s2 + s2 * classes
        first = s_b * s1 * (verticals if self.kind == "sc-sc" else 1)
        return first + s1 * shared + s1 * (s2 - shared) * verticals + s2 * classes


class PacedScale(nn.Module):
    """Logits of every vertical at a length of their own, which is learned (section 3.4).

    Args:
        class_groups: classes of each vertical.
        level: one length a "vertical", or one factor a "class".
        init: "sqrt" of the vertical's number of classes, which gives logits of typical size 1, or a number.
        learn: train it, from a draw 0.001 around `init`.
        eps: smallest length that logits are divided by.
        bias: start of a learned number a class that is added to the scaled logits; None, as in the paper, for none.
            Without, no logit can pass gamma, and where positives are rare the first thing learned is one constant
            direction that says no to all; a negative bias says it instead.
        seed: of that draw.
    """

    def __init__(
        self,
        class_groups: Sequence[Tensor],
        level: Literal["vertical", "class"] = "vertical",
        init: Literal["sqrt"] | float = "sqrt",
        learn: bool = True,
        *,
        eps: float = 1e-6,
        bias: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        one_of("level", level, ("vertical", "class"))
        positive("eps", eps)
        if isinstance(init, str):
            one_of("init", init, ("sqrt",))
        owner = vertical_of_class(class_groups)
        sizes = torch.bincount(owner).float()
        start = sizes.sqrt() if isinstance(init, str) else torch.full_like(sizes, init)
        gamma = start[owner] if level == "class" else start
        self.level, self.eps = level, eps
        self.owner: Tensor
        self.gamma: Tensor
        self.register_buffer("owner", owner, persistent=False)
        self.bias = None if bias is None else nn.Parameter(torch.full((len(owner),), float(bias)))
        if learn:
            draw = torch.randn(gamma.shape, generator=seeds.generator(seed, "gamma"))
            self.gamma = nn.Parameter(gamma + 1e-3 * draw)
        else:
            self.register_buffer("gamma", gamma)

    def forward(self, logits: Tensor) -> Tensor:
        """(batch, classes) -> the same, gamma x / ||x|| within each vertical."""
        owner = self.owner
        count = int(owner.max()) + 1
        squares = logits.square()  # in float32 under autocast
        squares = squares.new_zeros(len(logits), count).index_add(1, owner, squares)
        lengths = squares.clamp_min(self.eps**2).sqrt()
        gamma = self.gamma if self.level == "class" else self.gamma[owner]
        scaled = gamma * logits / lengths[:, owner]
        return scaled if self.bias is None else scaled + self.bias


# --- several teachers, one student ----------------------------------------------------------------------------------


def _rows(inputs: Any, rows: Tensor) -> Any:
    return tree_map(lambda t: t[rows], inputs)


class KnowledgeConcentration:
    """Objective for `fit`, and training by itself: a student learns what the specialists say of their own samples.

        fit(student, data, KnowledgeConcentration(student, specialists, class_groups))
        KnowledgeConcentration(student, specialists, class_groups).fit(data, epochs=5)

    Targets of the data are vertical ids (n,), or labels (n, classes) of 0 and 1 that tell them, or kept answers.

    Args:
        student: gives logits (n, classes) for all classes, such as a backbone with `SCHead` and `PacedScale`.
        specialists: by vertical id; each gives logits for its group's classes, in the group's order. Kept as frozen
            copies.
        class_groups: classes of each vertical.
        top_k: classes kept a sample; all if None.
    """

    def __init__(
        self,
        student: nn.Module,
        specialists: Mapping[int, nn.Module],
        class_groups: Sequence[Tensor],
        top_k: int | None = 100,
    ) -> None:
        if top_k is not None:
            in_range("top_k", top_k, 1)
        self.num_classes = len(vertical_of_class(class_groups))
        self.student, self.class_groups, self.top_k = student, [torch.as_tensor(g) for g in class_groups], top_k
        self.specialists = {number: Teacher(model) for number, model in specialists.items()}
        self.__name__ = "concentration"

    def targets(self, images: Any, vertical_ids: Tensor) -> Tensor:
        """Soft targets (batch, classes) of a mixed batch: each specialist is asked for its own samples alone.

        Raises:
            InputError: for a vertical without a specialist.
        """
        classes, values = self._ask(images, vertical_ids)
        return values.new_zeros(len(values), self.num_classes).scatter_add_(1, classes, values)

    def _ask(self, images: Any, vertical_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Classes and scores of the top K (batch, k); padded with scores of 0."""
        kept = max(len(group) for group in self.class_groups)
        kept = min(self.top_k or kept, kept)
        classes = torch.zeros(len(vertical_ids), kept, dtype=torch.long, device=vertical_ids.device)
        values = torch.zeros(len(vertical_ids), kept, device=vertical_ids.device)
        for number in vertical_ids.unique().tolist():
            if number not in self.specialists or not 0 <= number < len(self.class_groups):
                known = ", ".join(map(str, self.specialists))
                raise InputError(f"The vertical id {number} has no specialist, but must be one of {known}")
            rows = (vertical_ids == number).nonzero()[:, 0]
            teacher = self.specialists[number].to(vertical_ids.device)
            logits = logits_of(forward(teacher, _rows(images, rows)))
            group = self.class_groups[number].to(logits.device)
            if logits.shape[1] != len(group):
                raise InputError(
                    f"The specialist {number} gives {logits.shape[1]} logits, but must give one for each of its "
                    f"{len(group)} classes"
                )
            scores, places = _top(logits, self.top_k)
            classes[rows, : scores.shape[1]] = group[places]
            values[rows, : scores.shape[1]] = scores.float()
        return classes, values

    def loss(self, images: Any, vertical_ids: Tensor) -> Tensor:
        """Loss of the student on a batch.

        Args:
            images: inputs of student and specialists.
            vertical_ids: of each sample (batch,).
        """
        return concentration_loss(logits_of(forward(self.student, images)), self.targets(images, vertical_ids))

    def __call__(self, model: nn.Module, batch: Batch, run: Any = None) -> Tensor:
        """Loss of one batch in `fit`."""
        inputs, told = unpack(batch)
        if told is None:
            raise InputError("The batch has no vertical ids, but needs them: samples must be (input, vertical id)")
        logits = logits_of(forward(model, inputs))
        if isinstance(told, Mapping):
            zeros = logits.new_zeros(len(logits), self.num_classes)
            return concentration_loss(logits, zeros.scatter_add_(1, told["classes"], told["values"].to(zeros.dtype)))
        return concentration_loss(logits, self.targets(inputs, self._ids(told)))

    def _ids(self, told: Tensor) -> Tensor:
        return told if told.ndim == 1 else vertical_ids(told, self.class_groups)

    def answered(self, data: Any, *, batch_size: int = 256) -> TensorData:
        """The data with the specialists' top K beside it, asked once: for data without random augmentation.

        Args:
            data: as for `fit`, read into memory.
            batch_size: samples asked at once.
        """
        held, parts = in_memory(data), []
        for batch in track(in_order(held, batch_size), "asking the specialists"):
            inputs, told = unpack(batch)
            parts.append(self._ask(inputs, self._ids(told)))
        classes, values = (torch.cat(part) for part in zip(*parts, strict=True))
        return TensorData(held.inputs, {"classes": classes, "values": values})

    def fit(self, loader: Any, **settings: Any) -> History:
        """Train the student in place; settings are those of `core.loop.fit`.

        Args:
            loader: data of (input, vertical id).
            settings: such as epochs.
        """
        return fit(self.student, loader, self, **settings)
