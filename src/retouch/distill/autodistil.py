"""AutoDistil: one training of a weight-shared super-network, out of which a student of any size is cut.

A sub-network (layers l, hidden h, heads a, MLP ratio r) uses the leading part of every matrix of the super-network,
W[:out, :in], with attention of width a times the teacher's head size, and layers floor(i L / l), i < l. Every step
trains four of them on one batch, the largest, the smallest and two at random, by relations in the last layer alone:
query, key and value (batch, length, width) are regrouped into the teacher's number of relation heads, of width d,

    R_QQ = Q Q^T / sqrt(d), R_KK and R_VV alike      loss = sum of KL(softmax R of the teacher || of the student)

No labels and no equal widths are needed. Afterwards any sub-network of the space can be judged as it is: the best one
within a budget is cut out, and fine-tuned for a task. Use it where students of several sizes are wanted from one
pre-trained encoder. For a single size known beforehand, distilling that student alone costs a quarter. Keep a space
compact: in a wide one the large and the small disturb each other, so train one super-network each (`sub_space`).

Paper: arXiv 2201.12507. Code: microsoft/autodistil. Where they part: the code compares unnormalised scores by their
mean squared error, with padding in it (`divergence="mse"`); the default is the KL divergence of MiniLM, which the paper
builds on. `bert_param_count` orders architectures as the code does and is off by some per cent; `AutoDistil.parameters`
counts. Losses of the four are summed, not averaged, as in the code.

Cost: a teacher pass and four student passes a step, whose graphs are held together. Slices are views, not copies.
Limits: BERT encoders (`BertModel` and classes on it); the relation loss takes any model with query, key and value
layers. What is cut out is a BERT whose attention width is its own: build it by `bert` before loading its weights, as
its configuration alone does not say so. One process. Weight decay acts on all weights that a step has touched: with
the largest in every step, on all within its width.
"""

import copy
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from retouch.core import seeds
from retouch.core.batches import in_order
from retouch.core.cards import Card
from retouch.core.errors import InputError, in_range, one_of, positive
from retouch.core.features import capture
from retouch.core.loop import History, fit
from retouch.core.models import Batch, device_of, forward, mode, to_device, unpack
from retouch.core.teachers import Teacher

CARD = Card(
    title="AutoDistil",
    room="distill",
    paper="arXiv:2201.12507",
    shape="objective",
    line="Trains a super-network by self-attention relations and cuts the best student of any size out of it.",
    tags=("transformers", "language models", "architecture search", "weight sharing", "without labels"),
    plugin="AutoDistil",
)

MASKED = -1e4  # added to the scores of padding; more is no different after softmax
QKV = (("query", "key", "value"), ("q_proj", "k_proj", "v_proj"))  # what transformers calls these layers
LAYER = re.compile(r"((?:^|\.)encoder\.layer\.)(\d+)(?=\.)")

# --- architectures --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, order=True)
class Arch:
    """Sizes of a transformer; attention is as wide as heads times the teacher's head size, whatever `hidden` is."""

    layers: int
    heads: int
    hidden: int
    mlp_ratio: float

    def __post_init__(self) -> None:
        """Refuse sizes that are not whole."""
        for name, value in (("layers", self.layers), ("heads", self.heads), ("hidden", self.hidden)):
            positive(name, value)
            if value != int(value):
                raise InputError(f"{name} is {value}, but must be a whole number")
        if self.mlp_ratio <= 0 or abs(self.mlp_ratio * self.hidden - self.mlp) > 1e-6:
            raise InputError(f"mlp_ratio is {self.mlp_ratio}, but its product with hidden {self.hidden} must be whole")

    @property
    def mlp(self) -> int:
        """Width of the MLP."""
        return round(self.mlp_ratio * self.hidden)


@dataclass(frozen=True)
class SearchSpace:
    """All combinations of some layers, heads, hidden sizes and MLP ratios."""

    layers: Sequence[int]
    heads: Sequence[int]
    hidden: Sequence[int]
    mlp_ratio: Sequence[float]

    def all(self) -> list[Arch]:
        """Every architecture."""
        return [Arch(*sizes) for sizes in itertools.product(self.layers, self.heads, self.hidden, self.mlp_ratio)]

    def sorted_by_params(self, fn: Callable[[Arch], float]) -> list[tuple[Arch, float]]:
        """(architecture, parameter count) by a function that counts, ascending."""
        return sorted(((arch, fn(arch)) for arch in self.all()), key=lambda pair: pair[1])

    @property
    def largest(self) -> Arch:
        """The most of everything."""
        return Arch(max(self.layers), max(self.heads), max(self.hidden), max(self.mlp_ratio))

    @property
    def smallest(self) -> Arch:
        """The least of everything."""
        return Arch(min(self.layers), min(self.heads), min(self.hidden), min(self.mlp_ratio))

    def check(self, arch: Arch) -> None:
        """Raise unless the architecture is in the space."""
        for name in ("layers", "heads", "hidden", "mlp_ratio"):
            one_of(f"{name} of the architecture", getattr(arch, name), getattr(self, name))


SUB_SPACES = {
    "tiny": SearchSpace((4, 5, 6, 7), (7, 8, 9, 10), (128, 160, 192, 224), (2.0, 2.5, 3.0, 3.5)),
    "small": SearchSpace((9, 10, 11, 12), (7, 8, 9, 10), (256, 288, 320, 352), (2.5, 3.0, 3.5, 4.0)),
    "base": SearchSpace((9, 10, 11, 12), (9, 10, 11, 12), (544, 576, 608, 640), (2.5, 3.0, 3.5, 4.0)),
}


def sub_space(name: Literal["tiny", "small", "base"]) -> SearchSpace:
    """One of the paper's three spaces of 256 students of BERT-base: 4 to 11, 13 to 28, 39 to 79 million parameters."""
    one_of("name", name, tuple(SUB_SPACES))
    return SUB_SPACES[name]


def bert_param_count(arch: Arch, *, vocab: int = 30522, positions: int = 512, head_dim: int = 64) -> float:
    """Parameters as the released code counts them, to order architectures: some per cent off.

    Args:
        arch: sizes.
        vocab: tokens.
        positions: longest text.
        head_dim: size of a head; attention is taken to be h a head_dim / 768 wide, not a head_dim.
    """
    l, h, r, share = arch.layers, arch.hidden, arch.mlp_ratio, arch.heads * head_dim / 768
    attention, mlp = h**2 + 3 * h**2 * share + 6 * h, 2 * r * h**2 + r * h + 3 * h
    return h * (vocab + positions + 4) + l * attention + l * mlp + h**2 + 2 * h


def kept_layers(num_layers: int, depth: int) -> list[int]:
    """Layers that a sub-network of some depth uses, evenly spread: floor(i num_layers / depth)."""
    in_range("depth", depth, 1, num_layers)
    return [i * num_layers // depth for i in range(depth)]


# --- relations --------------------------------------------------------------------------------------------------------


def relation_scores(
    a: Tensor,
    b: Tensor,
    *,
    num_relation_heads: int,
    additive_mask: Tensor | None = None,
    normalize: bool = True,
) -> Tensor:
    """How much every position of a goes with every position of b, in each relation head.

    Channels that are left over beyond a multiple of the heads are not used; relation heads may cut across heads.

    Args:
        a: queries, keys or values (batch, length, width), before they are split into heads.
        b: likewise.
        num_relation_heads: at most the width.
        additive_mask: added to the scores, such as (batch, 1, 1, length) with -10000 at padding.
        normalize: softmax over the last axis; raw scaled products otherwise.

    Returns:
        (batch, num_relation_heads, length, length).
    """
    in_range("num_relation_heads", num_relation_heads, 1, a.shape[-1])
    if a.shape != b.shape:
        raise InputError(f"a has shape {tuple(a.shape)} and b {tuple(b.shape)}, but both must have the same")
    width = a.shape[-1] // num_relation_heads
    heads = [
        x[..., : num_relation_heads * width].unflatten(-1, (num_relation_heads, width)).transpose(1, 2) for x in (a, b)
    ]
    scores = heads[0] @ heads[1].transpose(-2, -1) / math.sqrt(width)
    scores = scores if additive_mask is None else scores + additive_mask
    return scores.softmax(-1) if normalize else scores


def relation_loss(
    student_qkv: Sequence[Tensor],
    teacher_qkv: Sequence[Tensor],
    *,
    num_relation_heads: int,
    additive_mask: Tensor | None = None,
    divergence: Literal["kl", "mse"] = "kl",
) -> Tensor:
    """Distance of the relations among queries, among keys and among values, summed over the three.

    Args:
        student_qkv: three of (batch, length, width).
        teacher_qkv: likewise, of any width; no gradient goes into them.
        num_relation_heads: of both.
        additive_mask: as in `relation_scores`.
        divergence: "kl" is KL(teacher || student) of softmaxes, mean over batch, heads and positions; "mse" the mean
            squared difference of raw scores, also of those to padding, whose masks cancel.
    """
    one_of("divergence", divergence, ("kl", "mse"))
    total: Any = 0.0
    for ours, theirs in zip(student_qkv, teacher_qkv, strict=True):
        if ours.shape[:2] != theirs.shape[:2]:
            raise InputError(
                f"The student has (batch, length) {tuple(ours.shape[:2])} and the teacher {tuple(theirs.shape[:2])}, "
                "but both must read the same tokens"
            )
        settings: dict[str, Any] = {"num_relation_heads": num_relation_heads, "normalize": False}
        s, t = (relation_scores(x, x, **settings) for x in (ours, theirs.detach()))
        if divergence == "mse":  # without the mask, which is on both sides: adding it only costs digits
            total = total + F.mse_loss(s, t)
            continue
        if additive_mask is not None:
            s, t = (scores + additive_mask.clamp(min=MASKED) for scores in (s, t))
        kl = F.kl_div(s.log_softmax(-1), t.log_softmax(-1), reduction="none", log_target=True)
        total = total + kl.sum(-1).mean()
    return total


def qkv_layers(model: nn.Module) -> tuple[str, str, str]:
    """Names of the last query, key and value layers of a transformer."""
    names = [name for name, _ in model.named_modules()]
    for triple in QKV:
        found = [[name for name in names if name.split(".")[-1] == part] for part in triple]
        if all(found):
            return found[0][-1], found[1][-1], found[2][-1]
    raise InputError(f"{type(model).__name__} has no layers named {' or '.join(map(', '.join, QKV))}")


def padding_mask(inputs: Any) -> Tensor | None:
    """-10000 where a batch's "attention_mask" (batch, length) is 0, as (batch, 1, 1, length); None if there is none."""
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    return None if mask is None else (mask[:, None, None] == 0).float() * MASKED


# --- the super-network ------------------------------------------------------------------------------------------------


def head_size(model: Any) -> int:
    """Width of a BERT's attention heads.

    Raises:
        InputError: if the model is another one.
    """
    base: Any = getattr(model, "base_model", None)
    if not hasattr(getattr(base, "encoder", None), "layer") or not hasattr(base, "pooler"):
        raise InputError(f"The model is a {type(model).__name__}, but must be a BertModel or a class on it")
    return base.encoder.layer[0].attention.self.attention_head_size


def bert(model: Any, arch: Arch) -> nn.Module:
    """A BERT of the model's class and head size in other sizes, with untrained weights.

    Args:
        model: `BertModel`, or a class on it.
        arch: sizes.
    """
    base, config, size = model.base_model, copy.deepcopy(model.config), head_size(model)
    config.hidden_size, config.intermediate_size = arch.hidden, arch.mlp
    config.num_hidden_layers, config.num_attention_heads = arch.layers, 1  # heads that the constructor does not refuse
    made = type(model)(config)
    made.config.num_attention_heads, made.config.head_dim = arch.heads, size
    if base.pooler is None:
        made.base_model.pooler = None
    inner = size * arch.heads
    for layer in made.base_model.encoder.layer:
        attention, output = layer.attention.self, layer.attention.output
        for name in QKV[0]:
            setattr(attention, name, nn.Linear(arch.hidden, inner))
        output.dense = nn.Linear(inner, arch.hidden)
        attention.num_attention_heads, attention.attention_head_size = arch.heads, size
        attention.all_head_size, attention.scaling = inner, size**-0.5
    return made


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _leading(source: nn.Module, like: nn.Module, kept: Sequence[int]) -> dict[str, Tensor]:
    """The leading part of every tensor of a model, for one of the same kind in smaller sizes; views."""
    whole, parts = _tensors(source), dict[str, Tensor]()
    for name, small in _tensors(like).items():
        full = whole[LAYER.sub(lambda found: f"{found[1]}{kept[int(found[2])]}", name)]
        parts[name] = full[tuple(slice(n) for n in small.shape)]
    return parts


def _filled(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A model made without weights, with copies of the given ones."""
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        owner, value = model.get_submodule(path), tensor.detach().clone()
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(value)
        else:
            owner._buffers[leaf] = value
    return model


class SuperTransformer(nn.Module):
    """A BERT that can be run in any of the sizes of a space, all of them on the leading parts of the same weights.

    It stores the teacher's number of layers, so that depth l uses the teacher's layers floor(i L / l), and the widths
    of the space's largest.

    Args:
        storage: the weights, see `from_teacher`.
        space: sizes it may be run in.
    """

    def __init__(self, storage: nn.Module, space: SearchSpace) -> None:
        super().__init__()
        self.storage, self.space, self.arch = storage, space, space.largest
        self.shells: dict[Arch, nn.Module] = {}  # by size, without weights
        self.depth = len(storage.base_model.encoder.layer)  # type: ignore[union-attr, arg-type]

    @classmethod
    def from_teacher(cls, model: Any, space: SearchSpace) -> "SuperTransformer":
        """A super-network that starts from the leading parts of a teacher's weights; the teacher is not changed."""
        head_size(model)  # which is checked first: it must be a BERT
        top, layers = space.largest, len(model.base_model.encoder.layer)
        attention, config = model.base_model.encoder.layer[0].attention.self, model.config
        has = {"layers": layers, "heads": attention.num_attention_heads, "hidden": config.hidden_size}
        for name, most in {**has, "mlp": config.intermediate_size}.items():
            in_range(f"The largest {name} of the space", getattr(top, name), 1, most)
        shell = _shell(model, Arch(layers, top.heads, top.hidden, top.mlp_ratio))
        return cls(_filled(shell, _leading(model, shell, range(layers))), space)

    def set_arch(self, arch: Arch) -> "SuperTransformer":
        """Choose the sizes of the calls from here on."""
        self.space.check(arch)
        self.arch = arch
        return self

    def shell(self, arch: Arch) -> nn.Module:
        """The plain module of a size, without weights."""
        self.space.check(arch)
        if arch not in self.shells:
            self.shells[arch] = _shell(self.storage, arch)
        return self.shells[arch]

    def forward(self, *args: Any, return_qkv: bool = False, **kwargs: Any) -> Any:
        """The sub-network's output; with `return_qkv` also (q, k, v) of its last layer, (batch, length, width)."""
        shell = self.shell(self.arch).train(self.training)
        weights = _leading(self.storage, shell, kept_layers(self.depth, self.arch.layers))
        layers = qkv_layers(shell) if return_qkv else ()
        with capture(shell, layers) as seen:
            output = functional_call(shell, weights, args, kwargs)
        return (output, tuple(seen[name] for name in layers)) if return_qkv else output

    def extract(self, arch: Arch) -> nn.Module:
        """A plain model of one size with weights of its own, in eval mode."""
        shell = copy.deepcopy(self.shell(arch))
        return _filled(shell, _leading(self.storage, shell, kept_layers(self.depth, arch.layers))).eval()


def _shell(model: nn.Module, arch: Arch) -> nn.Module:
    with torch.device("meta"), seeds.isolated():
        return bert(model, arch)


class SandwichSampler:
    """The largest, the smallest and some random architectures of a space for every step, the same in all processes.

    Args:
        space: to draw from.
        extra: random ones, different from each other and from both.
        seed: of the draws.
    """

    def __init__(self, space: SearchSpace, extra: int = 2, seed: int = 0) -> None:
        self.ends = list(dict.fromkeys([space.largest, space.smallest]))  # one, in a space of one
        self.others = [arch for arch in space.all() if arch not in self.ends]
        in_range("extra", extra, 0, len(self.others))
        self.extra, self.seed = extra, seed

    def draw(self, step: int) -> list[Arch]:
        """The architectures of a step."""
        order = torch.randperm(len(self.others), generator=seeds.generator(self.seed, "sandwich", step))
        return [*self.ends, *(self.others[i] for i in order[: self.extra])]


# --- training and search ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """A row of `AutoDistil.search`: an architecture, what it was ranked by (less is better), and its size."""

    arch: Arch
    loss: float
    params: int
    flops: int


def linear_decay(optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    """Down to 0 in a straight line."""
    return LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))


class AutoDistil:
    """Objective for `fit` over a `SuperTransformer`, and training, search and cutting by itself.

        made = AutoDistil(teacher, sub_space("small"))
        made.train(texts, epochs=8)
        student = made.extract(made.search(held_out, max_params=20_000_000)[0].arch)

    Args:
        teacher: BERT that knows what is to be taught; kept as a frozen copy.
        space: sizes of students, none larger than the teacher.
        num_relation_heads: the teacher's number of heads if None.
        divergence: see `relation_loss`.
        extra: random architectures a step, see `SandwichSampler`.
        lr: of AdamW at the start of a linear decay.
        weight_decay: of AdamW.
        seed: of the architectures and of the order of the data.
    """

    def __init__(
        self,
        teacher: nn.Module,
        space: SearchSpace,
        *,
        num_relation_heads: int | None = None,
        divergence: Literal["kl", "mse"] = "kl",
        extra: int = 2,
        lr: float = 4e-5,
        weight_decay: float = 0.01,
        seed: int = 0,
    ) -> None:
        positive("lr", lr)
        in_range("weight_decay", weight_decay, 0)
        one_of("divergence", divergence, ("kl", "mse"))
        self.model = SuperTransformer.from_teacher(teacher, space)
        self.teacher, self.sampler = Teacher(teacher), SandwichSampler(space, extra, seed)
        own: Any = teacher.config
        self.heads = own.num_attention_heads if num_relation_heads is None else num_relation_heads
        narrowest = min(space.heads) * head_size(teacher)
        in_range("num_relation_heads", self.heads, 1, narrowest)
        self.divergence, self.lr, self.weight_decay, self.seed = divergence, lr, weight_decay, seed

    @torch.no_grad()
    def relations(self, inputs: Any) -> tuple[Tensor, ...]:
        """The teacher's q, k and v of a batch."""
        self.teacher.to(device_of(self.model))
        layers = qkv_layers(self.teacher)
        with capture(self.teacher, layers) as seen:
            forward(self.teacher, inputs)
        return tuple(seen[name] for name in layers)

    def loss(self, model: nn.Module, inputs: Any, theirs: Sequence[Tensor]) -> Tensor:
        """Relation loss of the sub-network that the super-network is set to."""
        named = inputs if isinstance(inputs, Mapping) else {"input_ids": inputs}
        _, ours = model(**named, return_qkv=True)
        settings: dict[str, Any] = {"num_relation_heads": self.heads, "divergence": self.divergence}
        return relation_loss(ours, theirs, additive_mask=padding_mask(inputs), **settings)

    def __call__(self, model: nn.Module, batch: Batch, run: Any = None) -> dict[str, Tensor]:
        """The losses of the step's sub-networks; a batch's labels are not used."""
        inputs, _ = unpack(batch)
        module: Any = model if run is None else run.module
        theirs, losses = self.relations(inputs), dict[str, Tensor]()
        archs, before = self.sampler.draw(0 if run is None else run.step), module.arch
        names = [*("largest", "smallest")[: len(self.sampler.ends)], *(f"random {i + 1}" for i in range(len(archs)))]
        for name, arch in zip(names, archs, strict=False):
            module.set_arch(arch)
            losses[name] = self.loss(model, inputs, theirs)
        module.set_arch(before)
        return losses

    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay)

    def train(self, loader: Any, **settings: Any) -> History:
        """Train the super-network on texts.

        Args:
            loader: as `core.loop.fit` takes its data; inputs are token ids, or a mapping with "input_ids".
            settings: of `core.loop.fit`; 8 epochs unless steps or epochs are given.
        """
        own: dict[str, Any] = {"optimizer": self.optimizer, "scheduler": linear_decay, "seed": self.seed}
        own |= {} if "steps" in settings else {"epochs": 8}
        return fit(self.model, loader, self, **{**own, **settings})

    def parameters(self, arch: Arch) -> int:
        """Exact number of parameters of the student that `extract` gives."""
        return sum(p.numel() for p in self.model.shell(arch).parameters())

    def flops(self, arch: Arch, length: int = 128) -> int:
        """Operations of the layers for a text of some length (two a multiplication and addition)."""
        inner = arch.heads * head_size(self.teacher.model)
        token = 4 * arch.hidden * inner + 2 * arch.hidden * arch.mlp + 2 * length * inner
        return 2 * length * arch.layers * token

    @torch.no_grad()
    def search(
        self,
        loader: Any,
        *,
        max_params: float | None = None,
        max_flops: float | None = None,
        length: int = 128,
        archs: Iterable[Arch] | None = None,
        proxy: Callable[[nn.Module], float] | None = None,
    ) -> list[Candidate]:
        """Students within a budget, the best first, none of them trained any more.

        Args:
            loader: held-out texts, gone through once a student.
            max_params: largest exact number of parameters; any if None.
            max_flops: most operations, see `flops`; any if None.
            length: of the texts whose operations are counted.
            archs: candidates; the whole space if None.
            proxy: student -> number to rank by, less is better, such as its error on a task after a short fine-tuning;
                the relation loss if None.

        Raises:
            InputError: if nothing is within the budget, or there are no candidates.
        """
        every = self.model.space.all() if archs is None else archs
        found = [(arch, self.parameters(arch), self.flops(arch, length)) for arch in every]
        if not found:
            raise InputError("archs is empty, but must hold at least one architecture")
        most = [math.inf if cap is None else cap for cap in (max_params, max_flops)]
        fits = [row for row in found if row[1] <= most[0] and row[2] <= most[1]]
        if not fits:
            raise InputError(
                f"max_params is {max_params} and max_flops {max_flops}, but must allow a student: the smallest has "
                f"{min(n for _, n, _ in found)} parameters and {min(f for *_, f in found)} operations"
            )
        if proxy is not None:
            with torch.enable_grad():
                scores = [proxy(self.extract(arch)) for arch, *_ in fits]
        else:
            scores = self.losses([arch for arch, *_ in fits], loader)
        rows = [Candidate(arch, score, *sizes) for (arch, *sizes), score in zip(fits, scores, strict=True)]
        return sorted(rows, key=lambda row: row.loss)

    @torch.no_grad()
    def losses(self, archs: Sequence[Arch], loader: Any) -> list[float]:
        """Relation loss of sub-networks on held-out texts, mean over batches; the teacher is asked once a batch."""
        device, before = device_of(self.model), self.model.arch
        totals, count = torch.zeros(len(archs)), 0
        with mode(self.model, training=False):
            for batch in in_order(loader, 64):
                inputs, _ = unpack(to_device(batch, device))
                theirs, count = self.relations(inputs), count + 1
                totals += torch.stack([self.loss(self.model.set_arch(a), inputs, theirs).cpu() for a in archs])
        self.model.set_arch(before)
        return (totals / max(count, 1)).tolist()

    def alone(self, arch: Arch) -> "AutoDistil":
        """The same for one student, cut out: to distil it on by itself."""
        one, space = copy.copy(self), SearchSpace((arch.layers,), (arch.heads,), (arch.hidden,), (arch.mlp_ratio,))
        one.model, one.sampler = SuperTransformer(self.extract(arch), space), SandwichSampler(space, 0, self.seed)
        return one

    def extract(self, arch: Arch) -> nn.Module:
        """A plain student with weights of its own."""
        return self.model.extract(arch)
