"""OFA-KD: a teacher of one architecture teaches a student of another through exits in the student's stages.

Features of a ViT, a CNN and an MLP have little in common, so hints between them mislead; their logits do have a common
meaning. Every stage of the student gets an exit, a small branch that maps its feature to logits, and student and exits
all learn from the teacher's predictions p, the label's class y taking more weight where the teacher is sure of it:

    weights  w_c = (p_c + [c = y])^gamma - [c = y]
    loss     l = -sum_c w_c log softmax(logits / T)_c                       gamma = 1: plain soft-target cross entropy
    total    w_gt CE + w_kd l(student) + w_ofa sum over exits of l(exit)

Exits are thrown away after training. Use it where teacher and student are of different families, or where a deep
student needs a signal in its middle. Between networks of one family hints or plain KL do as well; for language models
and regression it is not made. Only the teacher's logits are needed, so they can be asked beforehand (`answered`).

Paper: arXiv 2310.19444 (section 3). Code: Hao840/OFAKD. Where they part: the paper folds the label into one loss with
target weight (1 + p)^gamma, the code keeps cross entropy apart and subtracts the mask; the code is followed. On
CIFAR-100 the authors ran w_ofa = 0.1, not the 1 of the paper: the sum over stages swamps cross entropy. Here exits are
built from one dry run instead of tables of models, maps smaller than the paper's are not halved below one pixel, and a
stage of another width than the last is first projected to it.

Cost: exits add some 5 to 30 % to a large student's training, several times a tiny one's, and nothing to its use. Exits
on maps normalise over the batch: no batches of one sample. `student.state_dict()` is as without exits.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retouch.core import seeds
from retouch.core.batches import in_order
from retouch.core.cards import Card
from retouch.core.distillation import ask, check_pair
from retouch.core.errors import InputError, in_range, one_of, positive
from retouch.core.features import layer_of, shapes
from retouch.core.models import Batch, count_classes, device_of, forward, head_of, rows_of, size_of, unpack
from retouch.core.recipe import Recipe
from retouch.core.teachers import Teacher

CARD = Card(
    title="OFA-KD: one-for-all distillation",
    room="distill",
    paper="arXiv:2310.19444",
    shape="objective",
    line="Distils across architectures: exits in the student's stages learn from the teacher's logits alone.",
    tags=("classification", "heterogeneous architectures", "intermediate layers", "logits"),
    plugin="OFADistiller",
)

SHARES = (2 / 12, 4 / 12, 10 / 12, 1.0)  # depths of a plain transformer at which its four stages end
PREFIXES = ("cls_token", "dist_token", "distillation_token", "register_tokens", "reg_token")


def ofa_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    gamma: float = 1.5,
    temperature: float = 1.0,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """Cross entropy with the teacher's predictions, the label's class enhanced (section 3.2).

    Args:
        student_logits: (batch, classes).
        teacher_logits: (batch, classes); no gradient goes into them.
        labels: classes (batch,), or distributions (batch, classes) whose largest entry counts.
        gamma: > 0, and >= 1 to enhance; 1 is plain soft-target cross entropy.
        temperature: > 0, of both softmaxes; the loss is not multiplied by its square.
        reduction: "mean" over the batch, or "none" for one value a sample.

    Raises:
        InputError: for logits of different shapes, labels of another batch, or values out of range.
    """
    positive("gamma", gamma)
    positive("temperature", temperature)
    one_of("reduction", reduction, ("mean", "none"))
    if gamma < 1:
        warnings.warn(f"gamma is {gamma}, but below 1 it weakens the target instead of enhancing it", stacklevel=2)
    check_pair(student_logits, teacher_logits)
    if student_logits.ndim != 2 or labels.shape not in (student_logits.shape, student_logits.shape[:1]):
        raise InputError(
            f"labels have shape {tuple(labels.shape)} and the logits {tuple(student_logits.shape)}, but logits must be "
            "(batch, classes) and labels (batch,) or (batch, classes)"
        )
    target = F.one_hot(labels.argmax(-1) if labels.ndim == 2 else labels, student_logits.shape[1])
    wide = torch.promote_types(student_logits.dtype, torch.float32)
    p = (teacher_logits.detach().to(wide) / temperature).softmax(-1)
    weights = (p + target).pow(gamma) - target
    loss = -(weights * (student_logits.to(wide) / temperature).log_softmax(-1)).sum(-1)
    return loss.mean() if reduction == "mean" else loss


# --- exits ----------------------------------------------------------------------------------------------------------


class PatchMerge(nn.Module):
    """Tokens of a grid, two by two merged into one: (batch, rows * columns, dim) -> (batch, a quarter, out_dim).

    Args:
        grid: rows and columns, even numbers; one number for a square.
        dim: width of the tokens.
        out_dim: width of the merged ones.
        act: activation at the end, a module or its class; none if None.
    """

    def __init__(
        self, grid: int | tuple[int, int], dim: int, out_dim: int, act: type[nn.Module] | nn.Module | None = None
    ) -> None:
        super().__init__()
        self.grid = (grid, grid) if isinstance(grid, int) else tuple(grid)
        if any(side % 2 or side < 2 for side in self.grid):
            raise InputError(f"grid is {grid}, but must be even on both sides to be merged two by two")
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False)
        self.act = nn.Identity() if act is None else act() if isinstance(act, type) else act

    def forward(self, tokens: Tensor) -> Tensor:
        """Neighbours are laid side by side in the order (0, 0), (1, 0), (0, 1), (1, 1) of row and column."""
        rows, columns = self.grid
        if tokens.shape[1] != rows * columns:
            raise InputError(f"There are {tokens.shape[1]} tokens, but the grid is {rows} by {columns}")
        cells = tokens.unflatten(1, (rows // 2, 2, columns // 2, 2))  # (b, row, down, column, right, dim)
        return self.act(self.reduction(self.norm(cells.permute(0, 1, 3, 4, 2, 5).flatten(3).flatten(1, 2))))


class ConvExit(nn.Module):
    """From a map to logits: depthwise separable blocks, each halving the map and doubling channels, and a linear layer.

    Args:
        feature_shape: (channels, height, width).
        stage: of the feature, from 1.
        num_stages: of the student; there are num_stages - stage blocks, and a 1x1 convolution for the last stage.
        out_width: channels at the end.
        num_classes: logits.
    """

    def __init__(
        self, feature_shape: Sequence[int], stage: int, num_stages: int, out_width: int, num_classes: int
    ) -> None:
        super().__init__()
        in_range("stage", stage, 1, num_stages)
        channels, height, width = feature_shape
        count, halvings = num_stages - stage, min(height, width).bit_length() - 1  # no map shrinks below one pixel
        layers: list[nn.Module] = [] if count else [nn.Conv2d(channels, out_width, 1, bias=False)]
        for number in range(count):
            out = out_width if number == count - 1 else 2 * channels
            layers += _separable(channels, out, stride=2 if number < halvings else 1)
            channels = out
        self.blocks = nn.Sequential(*layers)
        self.classifier = nn.Linear(out_width, num_classes)
        self.apply(_init)

    def forward(self, maps: Tensor) -> Tensor:
        """(batch, channels, height, width) -> (batch, classes)."""
        return self.classifier(self.blocks(maps).mean((2, 3)))


def _separable(wide: int, out: int, *, stride: int) -> list[nn.Module]:
    def half(last: int, step: int) -> list[nn.Module]:
        depthwise = nn.Conv2d(wide, wide, 3, step, 1, groups=wide, bias=False)
        return [depthwise, nn.Conv2d(wide, last, 1, bias=False), nn.BatchNorm2d(last), nn.ReLU()]

    return [*half(wide, stride), *half(out, 1)]


class TokenExit(nn.Module):
    """From tokens to logits: merged to a small grid, a few transformer blocks, the class token or the mean of all.

    Args:
        num_patches: tokens of the (square) grid, without those in front.
        dim: width of the tokens.
        stage: of the feature, from 1.
        num_stages: of the student; there are max(num_stages - stage, 1) blocks.
        width: of the blocks.
        num_classes: logits.
        num_prefix_tokens: tokens in front of the grid, of which the first is the class token.
        final_grid: side of the grid up to which patches are merged.
    """

    def __init__(
        self,
        num_patches: int,
        dim: int,
        stage: int,
        num_stages: int,
        width: int,
        num_classes: int,
        num_prefix_tokens: int = 0,
        final_grid: int = 7,
    ) -> None:
        super().__init__()
        in_range("stage", stage, 1, num_stages)
        positive("final_grid", final_grid)
        grid = round(num_patches**0.5)
        if grid < 1 or grid * grid != num_patches:
            raise InputError(f"num_patches is {num_patches}, but must be a square number: exits need a square grid")
        self.prefix = num_prefix_tokens
        count, changes = max((grid // final_grid).bit_length() - 1, 0), dim != width
        self.merges = nn.Sequential(
            *(
                PatchMerge(grid >> i, width if i else dim, width, nn.GELU if i < count - 1 else None)
                for i in range(count)
            )
        )
        # Merging changes the width along the way; what is not merged must be brought to it as well.
        self.project = nn.Linear(dim, width) if changes and not count else nn.Identity()
        self.project_prefix = nn.Linear(dim, width) if changes and num_prefix_tokens else nn.Identity()
        heads = next(h for h in (4, 2, 1) if width % h == 0)
        settings: dict[str, Any] = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        blocks = max(num_stages - stage, 1)
        self.blocks = nn.Sequential(
            *(nn.TransformerEncoderLayer(width, heads, 4 * width, **settings) for _ in range(blocks))
        )
        self.classifier = nn.Linear(width, num_classes)
        self.apply(_init)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, prefix + patches, dim) -> (batch, classes)."""
        prefix, patches = tokens[:, : self.prefix], tokens[:, self.prefix :]
        merged = self.project(self.merges(patches))
        seen = self.blocks(torch.cat([self.project_prefix(prefix), merged], 1) if self.prefix else merged)
        return self.classifier(seen[:, 0] if self.prefix else seen.mean(1))


def _init(module: nn.Module) -> None:
    """Convolutions He-normal by fan-out, linear layers truncated normal of 0.02; norms as torch has them."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.MultiheadAttention):
        nn.init.trunc_normal_(module.in_proj_weight, std=0.02)


# --- student and exits ----------------------------------------------------------------------------------------------


class OFADistiller(nn.Module):
    """A student with exits, and the losses of all of them; `.student` is the product.

        distiller = OFADistiller(student, teacher, {"layer1": 1, "layer2": 2, "layer3": 3, "layer4": 4}, 100)
        distiller.build(images)                         exits, from a dry run; the first forward does it as well
        fit(distiller, data, distiller.objective)

    Build the exits before an optimizer is made, or it will not have their parameters; `fit` refuses one without.

    Args:
        student: classifier with stages that give maps (batch, channels, height, width) or tokens (batch, n, dim).
        teacher: any classifier of the same classes, kept as a frozen copy; None where the data brings its logits.
        stages: number of the stage, from 1, by the name of the module that ends it.
        num_classes: of both.
        gamma: of all losses, or one an exit and a last one for the student's own logits.
        weights: (w_gt, w_kd, w_ofa) of cross entropy, the student's loss and the sum of the exits'.
        temperature: of `ofa_loss`.
        num_stages: of the student; the largest number among `stages` if None.
        num_prefix_tokens: tokens in front of the grid; counted by the student's parameters (`cls_token`, ...) if None.
        seed: of the exits' weights.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        stages: Mapping[str, int],
        num_classes: int,
        gamma: float | Sequence[float] = 1.5,
        weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
        *,
        temperature: float = 1.0,
        num_stages: int | None = None,
        num_prefix_tokens: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not stages:
            raise InputError("stages is empty, but must name at least one module of the student")
        for name in stages:
            layer_of(student, name)
        self.gammas = [gamma] * (len(stages) + 1) if isinstance(gamma, int | float) else list(gamma)
        if len(self.gammas) != len(stages) + 1:
            raise InputError(
                f"gamma has {len(self.gammas)} values, but must have {len(stages) + 1}: exits, then student"
            )
        for value in self.gammas:
            positive("gamma", value)
        for name, weight in zip(("w_gt", "w_kd", "w_ofa"), weights, strict=True):
            in_range(name, weight, 0)
        positive("num_classes", num_classes)
        positive("temperature", temperature)
        self.student, self.stages, self.num_classes = student, dict(stages), num_classes
        self.weights, self.temperature, self.seed = weights, temperature, seed
        self.num_stages = num_stages or max(stages.values())
        self.prefix = count_prefix(student) if num_prefix_tokens is None else num_prefix_tokens
        self.exits = nn.ModuleList()
        # In a tuple it is no submodule: not in checkpoints, not among the parameters.
        self._teacher = (teacher if teacher is None or isinstance(teacher, Teacher) else Teacher(teacher),)

    @property
    def teacher(self) -> Teacher | None:
        """The frozen copy."""
        return self._teacher[0]

    def build(self, images: Any) -> "OFADistiller":
        """Make the exits for the features that the student has for these images, in one dry run of one of them.

        Raises:
            InputError: for a feature that is neither a map nor tokens, tokens of no square grid, or other classes.
        """
        found = shapes(self.student, (rows_of(images, 0, 1),), self.stages)
        for name in self.stages:
            if len(found.get(name, ())) not in (3, 4):
                raise InputError(
                    f"The feature of {name} has shape {found.get(name)}, but must be (batch, channels, height, width) "
                    "or (batch, tokens, dim)"
                )
        last = found[max(self.stages, key=self.stages.__getitem__)]
        width = last[1] if len(last) == 4 else last[2]
        widest = max(width, _head_width(self.teacher))
        self.exits = nn.ModuleList()
        with seeds.isolated(seeds.derive(self.seed, "exits")):
            for name, stage in self.stages.items():
                _, *shape = found[name]
                where = (stage, self.num_stages)
                self.exits.append(
                    ConvExit(shape, *where, widest, self.num_classes)
                    if len(shape) == 3
                    else TokenExit(shape[0] - self.prefix, shape[1], *where, width, self.num_classes, self.prefix)
                )
        self.exits.to(device_of(self.student)).train(self.training)
        return self

    def forward(self, images: Any, labels: Tensor | None = None, teacher_logits: Tensor | None = None) -> Any:
        """The student's output; with labels, (student_logits, {"ce", "kd", "ofa"}), the losses weighted.

        Args:
            images: what the student takes: a tensor, or a mapping handed on as keywords.
            labels: classes (batch,), or distributions (batch, classes).
            teacher_logits: (batch, classes); the teacher is asked if None.
        """
        if labels is None:
            return forward(self.student, images)
        if not len(self.exits):
            self.build(images)
        if self.training and size_of(images) < 2 and any(isinstance(one, ConvExit) for one in self.exits):
            raise InputError("The batch has 1 sample, but must have at least 2: exits normalise over the batch")
        theirs = self._ask(images) if teacher_logits is None else teacher_logits
        answer = ask(self.student, images, self.stages)
        for logits, whose in ((answer.logits, "student"), (theirs, "teacher")):
            if logits.shape[-1] != self.num_classes:
                raise InputError(f"num_classes is {self.num_classes}, but the {whose} tells {logits.shape[-1]} apart")
        outputs = [exit_(answer.features[name]) for exit_, name in zip(self.exits, self.stages, strict=True)]
        losses = [
            ofa_loss(logits, theirs, labels, gamma=gamma, temperature=self.temperature)
            for logits, gamma in zip([*outputs, answer.logits], self.gammas, strict=True)
        ]
        w_gt, w_kd, w_ofa = self.weights
        terms = {"ce": w_gt * F.cross_entropy(answer.logits, labels), "kd": w_kd * losses[-1]}
        return answer.logits, {**terms, "ofa": w_ofa * torch.stack(losses[:-1]).sum()}

    def _ask(self, images: Any) -> Tensor:
        if self.teacher is None:
            raise InputError("teacher is None, but must be a model where the batch does not bring its answers")
        return ask(self.teacher.to(device_of(self.student)), images).logits

    @staticmethod
    def objective(model: nn.Module, batch: Batch, run: Any = None) -> dict[str, Tensor]:
        """Objective for `fit`; `answered` data brings the teacher's logits along."""
        distiller: Any = getattr(run, "module", model)
        if not len(distiller.exits):
            raise InputError("The exits are not built, but must be before training: call build(images)")
        inputs, targets = unpack(batch)
        brought = targets if isinstance(targets, Mapping) else {"labels": targets}
        if brought.get("labels") is None:
            raise InputError("The batch has no labels, but OFA needs them: samples must be (input, target)")
        return model(inputs, brought["labels"], brought.get("teacher"))[1]


def count_prefix(model: nn.Module) -> int:
    """Tokens that a transformer puts in front of its grid, by the names of its parameters."""
    named = ((name.rpartition(".")[2], parameter) for name, parameter in model.named_parameters())
    return sum(p.shape[-2] if p.ndim > 1 else 1 for name, p in named if name in PREFIXES)


def _head_width(teacher: nn.Module | None) -> int:
    """Width of the teacher's last feature: what its last linear layer takes in."""
    if teacher is None or not any(isinstance(module, nn.Linear) for module in teacher.modules()):
        return 0
    head: Any = layer_of(teacher, head_of(teacher))
    return int(head.in_features)


def stages_of(model: nn.Module, inputs: Any) -> dict[str, int]:
    """Modules that end the stages of a network, found in a dry run: stage by name, at most four.

    In a network whose maps shrink, the last child at each size of the module whose children show the most sizes; in
    one that keeps its size, the blocks at a sixth, a third, five sixths and the end of its longest list of blocks.

    Args:
        model: a CNN, or a network of tokens.
        inputs: what it takes; one sample is used.

    Raises:
        InputError: if nothing in it gives maps or tokens in turn.
    """
    modules = dict(model.named_modules())
    ran = shapes(model, (rows_of(inputs, 0, 1),), [name for name in modules if name])
    area = {name: shape[1:-1] if len(shape) == 3 else shape[2:] for name, shape in ran.items() if len(shape) in (3, 4)}
    sizes = {name: int(torch.Size(sides).numel()) for name, sides in area.items()}
    shrinking, rank, blocks = list[str](), (1, True), list[str]()
    for name, module in modules.items():
        inside = [f"{name}.{child}" if name else child for child, _ in module.named_children()]
        inside = [child for child in ran if child in inside and sizes.get(child, 1) > 1]  # in the order they ran
        ends: list[str] = []
        for child in inside:
            if not ends or sizes[child] <= sizes[ends[-1]] // 2:
                ends.append(child)
            elif sizes[child] == sizes[ends[-1]]:
                ends[-1] = child
        listed = isinstance(module, nn.ModuleList | nn.Sequential)
        if (len(ends), listed) > rank:
            shrinking, rank = ends, (len(ends), listed)
        if listed and len({type(modules[child]) for child in inside}) == 1 and len(inside) > len(blocks):
            blocks = inside
    picked = shrinking[-4:] or [blocks[max(round(share * len(blocks)), 1) - 1] for share in SHARES if blocks]
    if not picked:
        raise InputError(f"{type(model).__name__} shows no stages of maps or tokens, but exits need them: name layers")
    return {name: number + 1 for number, name in enumerate(dict.fromkeys(picked))}


def recipe(
    student: nn.Module,
    teacher: nn.Module,
    data: Any,
    validation: Any = None,
    *,
    gamma: float = 1.5,
    temperature: float = 1.0,
    w_gt: float = 1.0,
    w_kd: float = 1.0,
    w_ofa: float = 1.0,
    layers: str = "",
    seed: int = 0,
) -> Recipe:
    """Teach a classifier through exits in its stages.

    Args:
        student: classifier with maps or tokens inside.
        teacher: classifier of the same classes, of any architecture.
        data: labelled samples.
        validation: not used.
        gamma: enhancement of the label's class; the authors tune it for each pair over 1 to 1.5.
        temperature: of the predictions.
        w_gt: weight of cross entropy.
        w_kd: weight of the student's own imitation.
        w_ofa: weight of the exits' imitation, summed; the authors took 0.1 on CIFAR-100.
        layers: names of the modules that end the stages, in order, separated by commas; found if empty.
        seed: of the exits' weights.
    """
    inputs, _ = unpack(next(iter(in_order(data, 2))))
    names = [name.strip() for name in layers.split(",") if name.strip()]
    stages = {name: number + 1 for number, name in enumerate(names)} or stages_of(student, inputs)
    classes = count_classes(teacher, [(inputs,)])
    settings: dict[str, Any] = {"gamma": gamma, "weights": (w_gt, w_kd, w_ofa), "temperature": temperature}
    distiller = OFADistiller(student, teacher, stages, classes, seed=seed, **settings).build(inputs)
    return Recipe(model=distiller, data=data, objective=distiller.objective, finish=lambda trained: student)
