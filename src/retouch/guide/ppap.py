"""PPAP: make any classifier, depth or segmentation model a guide on noisy images, one small adapter a noise range.

The T timesteps fall into N equal ranges, and each has an expert: the frozen off-the-shelf model phi plus a trained part
psi_n, of less than 5% of its weights in the paper's models. It learns without labels and without real data, from
images that the unconditional diffusion model made:

    transfer     KL(softmax(f_phi(x0) / tau) || softmax(f_(phi, psi_n)(x_t))), t of the expert's range, tau = 0.25;
                 mean squared error of the outputs for dense tasks
    LoRA         W' = W + (alpha / r) reshape(B A, W.shape), A (r k, C_in k), B (C_out k, r k), kernel k; B = 0 at first
    psi          LoRA of chosen layers, all biases but the last classification layer's, weights and statistics of
                 batch normalisation
    guidance     g = grad_x log softmax(f_n(x_t))_y, or minus the gradient of a task's loss, with t's expert
                 DDIM    noise' = noise - sigma s g            DDPM    mean' = mean + s Sigma g

Use it where an unconditional model must follow a predictor that knows clean images only, and many guidances share one
diffusion model. With a classifier at hand and nothing to train, `elucd` asks it at the predicted x0 instead. Where
noise hides everything no guide can tell anything, and an expert's answer is near chance: that is right. Gradients at x
are needed, so the guide runs on what the diffusion model runs on: pixels, or latents if it was trained on them.

    experts = add_noise_experts(resnet, num_experts=5)
    train_experts(experts, resnet, made_images, scheduler.alphas_cumprod, iterations=300_000)
    images = sample(denoiser, noise, guidance=ppap(experts, target=3))             DDIM; or attach(pipe, ppap(...))
    images = sample(denoiser, noise, step=ddpm, hooks=[ExpertGuidance(experts, target=3)])

Paper: arXiv 2212.05973 (CVPR 2023). Code: riiid/PPAP. It routes by the first timestep of a batch, to the first range
whose upper end reaches t, so t = 200 of 1000 goes to an expert trained on 0 to 199; here each sample is routed by
floor(t N / T), and `boundary="lower"` is the release's. Its linear LoRA leaves alpha / r out until it is merged; here
it is always in. One adapter goes through the ranges in order, with one optimizer, and is saved after each
(`warm_start`); the paper may mean fresh ones. Its KL is a mean over classes, 1 / classes of KL (`class_reduction`).

Experts are no adapters of `peft`, which trains the biases of one adapter only and has another LoRA for convolutions;
for linear layers both agree. They live beside the model and stand in for its tensors during a call; merging keeps
folded tensors and changes no model.

Cost: one forward and backward pass of the guide a step; memory of one model and N adapters.
"""

import copy
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.lr_scheduler import LambdaLR

from retouch.core import seeds
from retouch.core.batches import Batches
from retouch.core.cards import Card
from retouch.core.diffusion.denoiser import Prediction
from retouch.core.diffusion.guidance import Guidance
from retouch.core.diffusion.process import VP, Level
from retouch.core.diffusion.sampling import Hook
from retouch.core.diffusion.steps import Move, ancestral_sigma
from retouch.core.errors import InputError, in_range, nearest, one_of, positive
from retouch.core.loop import Run, fit
from retouch.core.models import Batch, first_tensor, mode, training_only
from retouch.core.teachers import Teacher

CARD = Card(
    title="Practical plug-and-play diffusion (PPAP)",
    room="guide",
    paper="arXiv:2212.05973",
    shape="sampler part",
    line="Makes an off-the-shelf predictor a guide: one small adapter a noise range, learned without data or labels.",
    tags=("diffusion", "guidance", "classifier", "LoRA", "unconditional", "data-free distillation"),
    plugin="ppap",
)

Preprocess = Callable[[Tensor], Tensor]
BOUNDARIES = ("upper", "lower")
# What the paper adapts, by the names of torchvision, timm, MiDaS and transformers; of the first family that is there.
LAYERS = (
    (r"conv_pwl?", r"layer\d_rn", r"out_conv"),
    (
        r"attn\.(qkv|proj)",
        r"attention\.([qkvo]_proj|query|key|value|output\.dense)",
        r"neck\.convs\.\d+",
        r"fusion_stage\.layers\.\d+\.projection",
    ),
    (r"conv[12]", r"embedder\.convolution", r"layer\.[01]\.convolution"),
)

# --- functional core ------------------------------------------------------------------------------------------------


def expert_index(timesteps: Any, *, num_experts: int = 5, num_timesteps: int = 1000, boundary: str = "upper") -> Tensor:
    """Which expert a timestep belongs to.

    Args:
        timesteps: t, a number or a tensor of any shape, 0 to T - 1; fractions are allowed.
        num_experts: N, 1 to T.
        num_timesteps: T, of training, also where the sampler takes fewer steps.
        boundary: "upper" ends range n before t = (n + 1) T / N, as in training: floor(t N / T); "lower" ends it there,
            as the release does: the first n with t <= (n + 1) T / N.

    Returns:
        Integers like timesteps, 0 to N - 1.
    """
    one_of("boundary", boundary, BOUNDARIES)
    in_range("num_timesteps", num_timesteps, 1)
    in_range("num_experts", num_experts, 1, num_timesteps)
    t = torch.as_tensor(timesteps)
    t = t.double() if t.is_floating_point() else t.long()
    inside = t < num_timesteps if boundary == "upper" else t <= num_timesteps
    if not bool(((t >= 0) & inside).all()):
        raise InputError(f"timesteps is {t.tolist()}, but must be 0 to {num_timesteps - 1}")
    if boundary == "upper":
        return torch.div(t * num_experts, num_timesteps, rounding_mode="floor").long()
    return (-torch.div(-t * num_experts, num_timesteps, rounding_mode="floor") - 1).long().clamp_min(0)


def lora_delta(lora_a: Tensor, lora_b: Tensor, *, shape: Sequence[int], rank: int, lora_alpha: float) -> Tensor:
    """(alpha / r) reshape(B A): what LoRA adds to the weight of a linear layer (out, in) or a convolution.

    Args:
        lora_a: A (r k, in k), k the size of the square kernel, 1 for a linear layer.
        lora_b: B (out k, r k).
        shape: of the weight: (out, in), or (out, in, k, k) of a convolution in one group.
        rank: r, at least 1.
        lora_alpha: alpha.
    """
    in_range("rank", rank, 1)
    k = _kernel(shape)
    wanted = (rank * k, shape[1] * k), (shape[0] * k, rank * k)
    for name, given, size in (("lora_a", lora_a, wanted[0]), ("lora_b", lora_b, wanted[1])):
        if tuple(given.shape) != size:
            raise InputError(f"{name} has shape {tuple(given.shape)}, but must be {size} for rank {rank}")
    return lora_alpha / rank * (lora_b @ lora_a).view(*shape)


def lora_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    lora_a: Tensor,
    lora_b: Tensor,
    rank: int,
    lora_alpha: float,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """A convolution with the weight W + (alpha / r) reshape(B A).

    Args:
        x: (b, in, h, w).
        weight: W (out, in, k, k).
        bias: (out,) or None.
        lora_a: A (r k, in k).
        lora_b: B (out k, r k).
        rank: r.
        lora_alpha: alpha.
        stride: as of the convolution, like padding and dilation.
        padding: likewise.
        dilation: likewise.
        groups: only 1, as B A has no place for more.
    """
    if groups != 1:
        raise InputError(f"groups is {groups}, but must be 1: this LoRA is not defined for grouped convolutions")
    delta = lora_delta(lora_a, lora_b, shape=weight.shape, rank=rank, lora_alpha=lora_alpha)
    return F.conv2d(x, weight + delta, bias, stride, padding, dilation)


def knowledge_transfer_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    teacher_temperature: float = 0.25,
    class_reduction: str = "mean",
    reduction: str = "mean",
) -> Tensor:
    """KL(softmax(teacher / tau) || softmax(student)): the teacher alone is sharpened, and gets no gradient.

    Args:
        student_logits: (b, classes, ...).
        teacher_logits: likewise.
        teacher_temperature: tau.
        class_reduction: "mean" over classes as in the release, or "sum", which is KL proper.
        reduction: over samples: "mean", "sum" or "none".

    Returns:
        A scalar, or (b, ...) with "none".
    """
    positive("teacher_temperature", teacher_temperature)
    one_of("class_reduction", class_reduction, ("mean", "sum"))
    one_of("reduction", reduction, ("mean", "sum", "none"))
    if student_logits.ndim < 2 or student_logits.shape != teacher_logits.shape:
        raise InputError(
            f"student_logits has shape {tuple(student_logits.shape)}, but must be (batch, classes, ...) like "
            f"teacher_logits, {tuple(teacher_logits.shape)}"
        )
    wanted = (teacher_logits.detach() / teacher_temperature).log_softmax(1)
    terms = wanted.exp() * (wanted - student_logits.log_softmax(1))
    loss = terms.mean(1) if class_reduction == "mean" else terms.sum(1)
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def _kernel(shape: Sequence[int]) -> int:
    """Size of a square kernel; 1 for a linear layer."""
    if len(shape) == 2:
        return 1
    if len(shape) != 4 or shape[2] != shape[3]:
        raise InputError(f"weight has shape {tuple(shape)}, but must be (out, in) or (out, in, k, k)")
    return shape[2]


# --- experts ----------------------------------------------------------------------------------------------------------


class _Expert(nn.Module):
    """psi_n: trained tensors by the name of what they stand in for, with "/" for its dots."""

    def __init__(self, model: nn.Module, layers: Sequence[str], rank: int, lora_alpha: float, seed: int) -> None:
        super().__init__()
        self.rank, self.lora_alpha = rank, lora_alpha
        draw = seeds.generator(seed, "lora")
        self.lora_a, self.lora_b, self.values = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        for name in layers:
            weight = model.get_parameter(f"{name}.weight")
            k = _kernel(weight.shape)
            a = nn.init.kaiming_uniform_(torch.empty(rank * k, weight.shape[1] * k), math.sqrt(5), generator=draw)
            key = f"{name}.weight".replace(".", "/")
            self.lora_a[key] = nn.Parameter(a.to(weight))
            self.lora_b[key] = nn.Parameter(weight.new_zeros(weight.shape[0] * k, rank * k))
        norms = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
        fixed = _head(model) + ".bias"
        for name, parameter in model.named_parameters():
            owner, _, kind = name.rpartition(".")
            if (kind.endswith("bias") and name != fixed) or owner in norms:
                self.values[name.replace(".", "/")] = nn.Parameter(parameter.detach().clone())
        for name, norm in norms.items():
            for kind, buffer in norm.named_buffers(recurse=False):
                self.register_buffer(f"{name}.{kind}".replace(".", "/"), buffer.clone())

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """What this expert has its own of, LoRA folded in, by names in the model."""
        found = {**self.values, **dict(self.named_buffers(recurse=False))}
        for key, a in self.lora_a.items():
            weight = model.get_parameter(key.replace("/", "."))
            b, shape = self.lora_b[key], weight.shape
            found[key] = weight + lora_delta(a, b, shape=shape, rank=self.rank, lora_alpha=self.lora_alpha)
        return {key.replace("/", "."): tensor for key, tensor in found.items()}


class NoiseExperts(nn.Module):
    """A frozen model and N experts of it; made by `add_noise_experts`.

    Attributes:
        model: phi, with no gradients.
        experts: psi_0 to psi_(N - 1).
        num_timesteps: T that experts are routed by.
        boundary: see `expert_index`.
    """

    def __init__(
        self,
        model: nn.Module,
        experts: Iterable[nn.Module],
        *,
        num_timesteps: int,
        boundary: str,
        preprocess: Preprocess | None,
    ) -> None:
        super().__init__()
        self.num_timesteps, self.boundary, self.preprocess = num_timesteps, boundary, preprocess
        self.experts = nn.ModuleList(experts)
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.training = model.training
        self._folded: dict[int, dict[str, Tensor]] = {}

    def route(self, timesteps: Any) -> Tensor:
        """The experts of timesteps."""
        settings = {"num_experts": len(self.experts), "num_timesteps": self.num_timesteps}
        return expert_index(timesteps, **settings, boundary=self.boundary)

    def forward(self, x_t: Tensor, t: Any = None, *, expert: int | None = None) -> Tensor:
        """The model's output (b, ...), each sample by the expert of its timestep.

        Args:
            x_t: noisy samples (b, ...).
            t: timesteps (b,), or one for all.
            expert: takes this one, whatever the timestep.
        """
        if expert is not None:
            return self._ask(expert, x_t)
        if t is None:
            raise InputError("t is None, but must be the timesteps of x_t, if no expert is given")
        chosen = self.route(t).to(x_t.device)
        if chosen.ndim and chosen.shape != (len(x_t),):
            raise InputError(f"t has shape {tuple(chosen.shape)}, but must be ({len(x_t)},), or be one for all")
        used = chosen.unique().tolist()
        if len(used) == 1:
            return self._ask(used[0], x_t)
        rows = [(chosen == n).nonzero()[:, 0] for n in used]
        parts = [self._ask(n, x_t[mine]) for n, mine in zip(used, rows, strict=True)]
        return torch.cat(parts)[torch.cat(rows).argsort()]

    def tensors(self, expert: int) -> dict[str, Tensor]:
        """The model's tensors that an expert has its own of, LoRA folded in, by their names in the model."""
        in_range("expert", expert, 0, len(self.experts) - 1)
        psi = self.experts[expert]
        assert isinstance(psi, _Expert)
        return psi.tensors(self.model)

    @torch.no_grad()
    def merge(self, expert: int | None = None) -> "NoiseExperts":
        """Keep the folded weights of one expert, or of all, so that guidance does not fold them at every step.

        Nothing in the model changes. Until `unmerge` the expert is as it was now: it cannot be trained.
        """
        for n in range(len(self.experts)) if expert is None else (expert,):
            self._folded[n] = {name: tensor.detach().clone() for name, tensor in self.tensors(n).items()}
        return self

    def unmerge(self) -> "NoiseExperts":
        """Forget the folded weights."""
        self._folded.clear()
        return self

    @torch.no_grad()
    def merged(self, expert: int) -> nn.Module:
        """One expert as a model of the original's class, of its own weights."""
        model = copy.deepcopy(self.model)
        for name, tensor in self.tensors(expert).items():
            owner, _, kind = name.rpartition(".")
            getattr(model.get_submodule(owner), kind).copy_(tensor)
        return model

    def _ask(self, expert: int, x: Tensor) -> Tensor:
        tensors = self._folded.get(expert) or self.tensors(expert)
        x = x if self.preprocess is None else self.preprocess(x)
        kind = next((p.dtype for p in self.model.parameters()), x.dtype)
        return _answer(functional_call(self.model, tensors, (x.to(kind),)))


def add_noise_experts(
    model: nn.Module,
    *,
    num_experts: int = 5,
    rank: int = 16,
    lora_alpha: float = 8,
    target_layers: str | Sequence[str] | None = None,
    num_timesteps: int = 1000,
    boundary: str = "upper",
    preprocess: Preprocess | None = None,
    seed: int = 0,
) -> NoiseExperts:
    """Experts of an off-the-shelf model; until they are trained, each of them is the model itself.

    Args:
        model: any with Conv2d or Linear layers; it is copied.
        num_experts: N, 1 to T.
        rank: r, at least 1.
        lora_alpha: alpha.
        target_layers: patterns of names of the layers that get LoRA; None takes what the paper does in ResNets, vision
            transformers and MiDaS, and all layers but the last of a model that has none of these.
        num_timesteps: T; `train_experts` sets it to that of its noise levels.
        boundary: of the ranges, see `expert_index`.
        preprocess: differentiable, of x_t before the model sees it; as it is if None, as the paper's ResNets have it.
        seed: of A.

    Raises:
        InputError: if no layer fits, or one that is named cannot have this LoRA.
    """
    in_range("rank", rank, 1)
    positive("lora_alpha", lora_alpha)
    expert_index(0, num_experts=num_experts, num_timesteps=num_timesteps, boundary=boundary)  # refuses what is wrong
    layers = _select(model, target_layers)
    experts = [_Expert(model, layers, rank, lora_alpha, seeds.derive(seed, n)) for n in range(num_experts)]
    return NoiseExperts(model, experts, num_timesteps=num_timesteps, boundary=boundary, preprocess=preprocess)


def _select(model: nn.Module, patterns: str | Sequence[str] | None) -> list[str]:
    """Names of the layers that get LoRA."""
    known = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and name}

    def hits(pattern: str) -> list[str]:
        return [name for name in known if re.search(rf"(?:^|\.)(?:{pattern})$", name)]

    if patterns is None:
        families = ([name for pattern in family for name in hits(pattern)] for family in LAYERS)
        found = set(next(filter(None, families), ())) or set(known) - {_head(model)} or set(known)
        chosen = [name for name, layer in known.items() if name in found and not _misfit(layer)]
        if not chosen:
            raise InputError(f"{type(model).__name__} has no Conv2d or Linear layer that could be adapted")
        return chosen
    found = set()
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        if not hits(pattern):
            raise InputError(
                f"target_layers has {pattern!r}, but no Conv2d or Linear layer of {type(model).__name__} matches it."
                f"{nearest(pattern, known)}"
            )
        found |= set(hits(pattern))
    if not found:
        raise InputError("target_layers is empty, but must name at least one Conv2d or Linear layer")
    for name in sorted(found):
        if reason := _misfit(known[name]):
            raise InputError(f"target_layers has {name!r}, {reason}")
    return [name for name in known if name in found]


def _misfit(layer: nn.Module) -> str:
    """Why a layer cannot have this LoRA, if it cannot."""
    if not isinstance(layer, nn.Conv2d):
        return ""
    if layer.groups != 1:
        return f"a convolution in {layer.groups} groups, but this LoRA is defined for groups of 1 only"
    return "" if layer.kernel_size[0] == layer.kernel_size[1] else "a convolution whose kernel is not square"


def _head(model: nn.Module) -> str:
    """The last layer, if it is linear: that of a classifier."""
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    return layers[-1][0] if layers and isinstance(layers[-1][1], nn.Linear) else ""


def _answer(output: Any) -> Tensor:
    """Logits, depth or whatever a model answers with first."""
    found = first_tensor(output)
    if found is None:
        raise InputError(f"The model returned {type(output).__name__}, but must return a tensor, or a mapping of some")
    return found


# --- training ---------------------------------------------------------------------------------------------------------


class _Drawn(Batches):
    """Images of a sampler, a batch at a time."""

    def __init__(self, sampler: Callable[[int], Tensor], batch_size: int) -> None:
        self.sampler, self.batch_size = sampler, batch_size

    def __len__(self) -> int:
        return 1

    def epoch(self, epoch: int, *, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[tuple[Batch, float, int]]:
        if start == 0:
            images = self.sampler(self.batch_size)
            yield images, len(images) / world, len(images)


def train_experts(
    experts: NoiseExperts,
    teacher: nn.Module,
    images_or_sampler: Any,
    alphas_cumprod: Tensor,
    *,
    iterations: int,
    lr: float = 1e-4,
    weight_decay: float = 0.05,
    loss: str = "kl",
    teacher_temperature: float = 0.25,
    class_reduction: str = "mean",
    batch_size: int = 256,
    warm_start: bool = True,
    flip: bool = True,
    teacher_preprocess: Preprocess | None = None,
    seed: int = 0,
    progress: bool | None = False,
) -> NoiseExperts:
    """Let every expert give on noisy images of its range what the teacher says of the clean ones.

    Args:
        experts: trained in place; only psi changes.
        teacher: the off-the-shelf model; a frozen copy is asked.
        images_or_sampler: clean images (n, ...) in -1 to 1 that the diffusion model made, or a function that makes so
            many as it is told.
        alphas_cumprod: alpha^2 of the diffusion model at every training timestep (T,); experts are routed by this T
            from now on.
        iterations: optimizer steps of all experts together (the paper: 300 000); each has at least one.
        lr: learning rate of AdamW, falling on a line to 0 for every expert.
        weight_decay: of AdamW.
        loss: "kl", or "mse" for depth and other dense tasks.
        teacher_temperature: tau of "kl".
        class_reduction: of "kl", see `knowledge_transfer_loss`.
        batch_size: images a step.
        warm_start: let an expert start from the one before, with its optimizer's state, as the release does.
        flip: mirror half of the images, where they are images (b, channels, h, w).
        teacher_preprocess: from x0 to what the teacher was trained with; x0 as it is if None.
        seed: of all randomness.
        progress: show a bar; None shows it on a terminal.

    Returns:
        The experts.
    """
    one_of("loss", loss, ("kl", "mse"))
    for name, value in (("iterations", iterations), ("lr", lr), ("batch_size", batch_size)):
        positive(name, value)
    in_range("weight_decay", weight_decay, 0)
    process = VP(alphas_cumprod)
    count, total = len(experts.experts), process.timesteps
    in_range("num_experts", count, 1, total)
    experts.unmerge()
    experts.num_timesteps = total
    frozen = Teacher(teacher)
    drawn = callable(images_or_sampler) and not isinstance(images_or_sampler, Tensor)
    data = _Drawn(images_or_sampler, batch_size) if drawn else images_or_sampler
    state: dict[str, Any] | None = None
    for n in range(count):
        first, stop = -(-n * total // count), -(-(n + 1) * total // count)  # t with floor(t N / T) = n
        steps = max(1, (n + 1) * iterations // count - n * iterations // count)

        def objective(
            model: nn.Module, batch: Batch, run: Run, n: int = n, first: int = first, stop: int = stop
        ) -> Tensor:
            x0 = first_tensor(batch)
            assert x0 is not None
            draw = run.generator
            if flip and x0.ndim == 4:
                turned = (torch.rand(len(x0), generator=draw) < 0.5).to(x0.device)
                x0 = torch.where(turned[:, None, None, None], x0.flip(-1), x0)
            times = torch.randint(first, stop, (len(x0),), generator=draw)
            noise = torch.randn(x0.shape, generator=draw).to(x0)
            wanted = _answer(frozen.to(x0.device)(x0 if teacher_preprocess is None else teacher_preprocess(x0)))
            found = model(process.add_noise(x0, noise, times), expert=n)
            if loss == "mse":
                return F.mse_loss(found, wanted)
            return knowledge_transfer_loss(
                found, wanted, teacher_temperature=teacher_temperature, class_reduction=class_reduction
            )

        psi = experts.experts[n]
        if warm_start and n:
            psi.load_state_dict(experts.experts[n - 1].state_dict())
        optimizer = torch.optim.AdamW(psi.parameters(), lr=lr, weight_decay=weight_decay)
        if warm_start and state is not None:
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})  # the rate starts anew
        names = [name for name, _ in experts.named_parameters() if name.startswith(f"experts.{n}.")]
        with training_only(experts, names):
            fit(
                experts,
                data,
                objective,
                steps=steps,
                batch_size=batch_size,
                optimizer=optimizer,
                scheduler=lambda optimizer, steps: LambdaLR(optimizer, lambda k: 1 - k / steps),
                seed=seeds.derive(seed, "expert", n),
                progress=progress,
            )
        state = optimizer.state_dict()["state"]
    return experts


# --- plug-ins ---------------------------------------------------------------------------------------------------------


class ExpertGuidance(Hook):
    """Gradient of what the experts say, as a conditional function; for our sampler the guidance of its DDPM steps.

        guide = ExpertGuidance(experts, target=3, scale=7.5)
        images = sample(denoiser, noise, step=ddpm, hooks=[guide], generator=generator)

    Args:
        experts: asked in eval mode; `experts.merge()` makes it faster.
        target: wanted classes (b,), or one for all, or what `loss` takes; may be given in the call instead.
        scale: s; 0 switches it off.
        loss: (output, target) -> (b,), made small; minus log softmax of the target's class if None.
    """

    def __init__(
        self,
        experts: NoiseExperts,
        target: Any = None,
        *,
        scale: float = 7.5,
        loss: Callable[[Tensor, Any], Tensor] | None = None,
    ) -> None:
        in_range("scale", scale, 0)
        self.experts, self.target, self.scale, self.loss = experts, target, scale, loss or class_loss

    def __call__(self, x_t: Tensor, t: Any, target: Any = None, **_: Any) -> Tensor:
        """s g at noisy samples, like x_t, detached: a sampler adds its variance times this to its mean.

        Args:
            x_t: (b, ...).
            t: timesteps of training (b,), or one for all.
            target: that of the guidance if None.
        """
        target = self.target if target is None else target
        if target is None:
            raise InputError("target is None, but must be the wanted classes or what the loss takes")
        if self.scale == 0:
            return torch.zeros_like(x_t)
        with torch.enable_grad(), mode(self.experts, training=False):
            x_t = x_t.detach().requires_grad_()
            loss = self.loss(self.experts(x_t, t), target)
            (gradient,) = torch.autograd.grad(loss.sum(), x_t)
        return -self.scale * gradient

    def after(self, move: Move, x: Tensor) -> Tensor:
        variance = ancestral_sigma(move.here, move.there) ** 2
        if variance * self.scale == 0:
            return x
        return x + variance * self(move.x, _time(move.here))


def ppap(
    experts: NoiseExperts,
    target: Any,
    *,
    scale: float = 7.5,
    loss: Callable[[Tensor, Any], Tensor] | None = None,
) -> Guidance:
    """The guidance of DDIM and the other deterministic steps, for `sample(guidance=...)` and `attach`.

    noise' = noise - sigma s g, and x0 with it; for DDPM steps `ExpertGuidance` is the paper's.

    Args:
        experts: as for `ExpertGuidance`, like the others.
        target: likewise.
        scale: likewise.
        loss: likewise.
    """
    guide = ExpertGuidance(experts, target, scale=scale, loss=loss)

    def change(found: Any, x: Tensor, level: Level) -> Prediction:
        gradient = guide(x, _time(level))
        return Prediction(level.sigma**2 / level.alpha * gradient, -level.sigma * gradient)

    return Guidance(name="ppap", change=change)


def class_loss(output: Tensor, target: Any) -> Tensor:
    """Minus log softmax of a class (b,).

    Args:
        output: logits (b, classes).
        target: classes (b,), or one for all.
    """
    if output.ndim != 2:
        raise InputError(
            f"The experts' output has shape {tuple(output.shape)}, but must be (batch, classes): give a loss"
        )
    told = torch.as_tensor(target, device=output.device)
    told = told.expand(len(output)) if told.ndim == 0 else told
    if told.shape != (len(output),) or told.is_floating_point():
        raise InputError(f"target has shape {tuple(told.shape)}, but must be ({len(output)},) classes, or one for all")
    if len(told) and not 0 <= int(told.min()) <= int(told.max()) < output.shape[1]:
        raise InputError(
            f"target is {told.tolist()}, but must be 0 to {output.shape[1] - 1}, the classes of the experts"
        )
    return F.cross_entropy(output, told.long(), reduction="none")


def _time(level: Level) -> float:
    """The timestep of a level of the process that the experts were trained with."""
    if abs(level.alpha**2 + level.sigma**2 - 1) > 1e-3:
        raise InputError(
            f"The level has alpha {level.alpha:g} and sigma {level.sigma:g}, but must be of a VP process: experts are "
            "trained for its timesteps"
        )
    return level.time
