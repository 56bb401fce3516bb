"""EfficientTrain: train on all images, but at first on their low frequencies alone, which are smaller images.

A network learns the low frequencies of its images first, whatever it is shown. So the spectrum of each image is
cropped to its B x B lowest frequencies and transformed back: an image of B x B pixels with exactly those frequencies,
and a step that costs (B / H)^2 as much. Over five equal stages B / H is 5/7, 5/7, 5/7, 6/7 and 1, while the magnitude
of RandAugment rises from 1 to 9. The compute is 0.653 of that of training at full size for as many steps.

    F   = fft2(x),  frequencies -B/2 to B/2 - 1 of each axis kept
    x'  = (B / H)^2 real(ifft2(F kept)),  size B x B, the mean of the image unchanged
        = real(A x A^T),  A[n, m] = 1/H sum over k of exp(2 pi i k (n / B - m / H)), how it is computed here

Use it for long training of networks that take several image sizes: convolutional ones with global pooling, and vision
transformers, whose position embeddings are resized with their Adam moments. Not for short training, where objects
that change size between stages and batch statistics that shift cost more than is saved; nor where a fine texture
decides from the beginning. One learning rate schedule runs over all stages, and the optimizer's state is kept.

Paper: arXiv 2211.09703 (section 4; "++": arXiv 2405.08768). Code: LeapLabTHU/EfficientTrain; its present head resizes
images in the loader ("++"), the method of this paper is in commits before May 2024. Followed: the paper and that code;
"plusplus_deit" has the later schedule, with this crop. The paper's magnitude rises linearly from 0 to 9, the code's has
five values, followed here. Where they have more images a device in the early stages, batches here keep their size.

Cost: two products with small matrices an image, 2 to 5 times as fast as the Fourier transforms on a CPU at 224 and 32
pixels. Limits: square images. A position embedding keeps its shape while it
trains; of its rows the first hold the present grid, so that checkpoints made then are good for resuming only, and
averages of weights mix grids at a change of stage (see `on_stage_change`). torch.compile compiles once for each size.
"""

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from retouch.core.cards import Card
from retouch.core.data import as_dataset
from retouch.core.errors import InputError, in_range, one_of, positive
from retouch.core.loop import Callback, Run
from retouch.core.models import Batch, forward, images_of, mode, replaced, rows_of, unpack
from retouch.core.recipe import Recipe

CARD = Card(
    title="EfficientTrain",
    room="train",
    paper="arXiv:2211.09703",
    shape="callback",
    line="Trains on the low frequencies of all images first, as smaller images, and saves a third of the compute.",
    tags=("classification", "curriculum", "compute"),
    plugin="EfficientTrain",
)

PRESETS = ("iccv", "plusplus_deit")
INTERPOLATE = "interpolate_pos_encoding"  # what transformers calls the argument that lets a model take other sizes


# --- the crop -------------------------------------------------------------------------------------------------------


def low_frequency_crop(images: Tensor, bandwidth: int | tuple[int, int]) -> Tensor:
    """Images of the lowest frequencies alone, at the size that these need.

    Args:
        images: (batch, channel, height, width), floating; further dimensions before the last two may follow.
        bandwidth: frequencies to keep of each axis, or of (height, width): 2 to the size of the image, an odd number
            counts as the even one below.

    Returns:
        (batch, channel, bandwidth, bandwidth), in the images' dtype; computed in float32 at least. The mean over pixels
        stays, but values may leave the images' range. The images themselves where all is kept.
    """
    if not images.is_floating_point():
        raise InputError(f"images has dtype {images.dtype}, but must be floating")
    if images.ndim < 4:
        raise InputError(f"images has shape {tuple(images.shape)}, but must be (batch, channel, height, width)")
    (height, width), both = images.shape[-2:], bandwidth if isinstance(bandwidth, tuple) else (bandwidth, bandwidth)
    for kept, size in zip(both, (height, width), strict=True):
        in_range("bandwidth", kept, 2, size)
    rows, columns = (2 * (kept // 2) for kept in both)
    if (rows, columns) == (height, width):
        return images
    dtype = torch.promote_types(images.dtype, torch.float32)
    with torch.autocast(images.device.type, enabled=False):
        real_rows, odd_rows = _resampling(height, rows, dtype, images.device)
        real_columns, odd_columns = _resampling(width, columns, dtype, images.device)
        x = images.to(dtype)
        # The imaginary parts of both matrices are (-1)^n times a vector: only the frequencies -B/2 have no partner.
        imaginary = torch.einsum("h,...hw,w->...", odd_rows, x, odd_columns)[..., None, None]
        signs = _signs(rows, x)[:, None] * _signs(columns, x)
        cropped = (real_rows @ x @ real_columns.T - imaginary * signs).to(images.dtype)
    last = images.ndim == 4 and images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    return cropped.contiguous(memory_format=torch.channels_last) if last else cropped


@functools.lru_cache(maxsize=32)
@torch.inference_mode(mode=False)
def _resampling(size: int, kept: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Real part (kept, size) of the matrix A, and the vector (size,) that is its imaginary part up to signs."""
    k = torch.arange(kept // 2 + 1, dtype=torch.float64)
    n, m = torch.arange(kept, dtype=torch.float64), torch.arange(size, dtype=torch.float64)
    there, back = 2 * math.pi * torch.outer(m, k) / size, 2 * math.pi * torch.outer(n, k) / kept
    weights = torch.full_like(k, 2.0)  # of k and -k together; 0 and the Nyquist frequency are there once
    weights[0] = weights[-1] = 1.0
    real = (back.cos() * weights) @ there.cos().T + (back.sin() * weights) @ there.sin().T
    return (real / size).to(device, dtype), (there[:, -1].sin() / size).to(device, dtype)


def _signs(count: int, like: Tensor) -> Tensor:
    return 1 - 2 * (torch.arange(count, device=like.device) % 2).to(like.dtype)


# --- the curriculum -------------------------------------------------------------------------------------------------


class CurriculumStage(NamedTuple):
    """A part of training: from the share `start` of its steps on, images of `bandwidth` pixels, and the magnitude of
    RandAugment."""

    start: float
    bandwidth: int
    magnitude: float


def efficient_train_curriculum(
    resolution: int = 224, *, multiple: int = 1, preset: Literal["iccv", "plusplus_deit"] = "iccv"
) -> list[CurriculumStage]:
    """The stages for images of a given size.

    Args:
        resolution: side of the images in pixels; the last stage's bandwidth.
        multiple: what bandwidths must be divisible by, such as the patch size or the stride of the network; they are
            even besides.
        preset: "iccv" is five equal stages of 160, 160, 160, 192 and 224 of 224 pixels; "plusplus_deit" is ten stages
            of equal compute, of 96, 96, 4 times 160, 192, 192, 224 and 224.
    """
    in_range("resolution", resolution, 2)
    positive("multiple", multiple)
    one_of("preset", preset, PRESETS)
    if resolution % multiple:
        raise InputError(f"resolution is {resolution}, but must be divisible by multiple, {multiple}")
    if preset == "iccv":
        sizes, magnitudes = [160, 160, 160, 192, 224], [1, 3, 5, 7, 9]
        lengths = [1.0] * 5
    else:
        sizes, magnitudes = [96] * 2 + [160] * 4 + [192] * 2 + [224] * 2, list(range(10))
        lengths = [(224 / size) ** 2 for size in sizes]
    step = math.lcm(multiple, 2)
    scaled = [size * resolution / 224 / step for size in sizes]
    bandwidths = [min(max(step, step * int(size + 0.5)), resolution) for size in scaled[:-1]]
    starts = [sum(lengths[:k]) / sum(lengths) for k in range(len(sizes))]
    stages = zip(starts, [*bandwidths, resolution], magnitudes, strict=True)
    return [CurriculumStage(start, bandwidth, float(magnitude)) for start, bandwidth, magnitude in stages]


def _check_curriculum(curriculum: Sequence[CurriculumStage], resolution: int | None = None) -> None:
    starts = [stage.start for stage in curriculum]
    if not starts or starts[0] != 0 or sorted(set(starts)) != starts or starts[-1] >= 1:
        raise InputError(f"curriculum has stages that start at {starts}, but they must begin with 0 and rise below 1")
    for stage in curriculum:
        in_range("bandwidth", stage.bandwidth, 2)
    last, largest = curriculum[-1].bandwidth, max(stage.bandwidth for stage in curriculum)
    full = largest if resolution is None else resolution
    if last != full or largest > full:
        raise InputError(f"curriculum ends at {last} pixels, but must end at the full resolution, {full}")


def stage_at(curriculum: Sequence[CurriculumStage], progress: float) -> CurriculumStage:
    """The stage at a share of training, 0 to 1."""
    in_range("progress", progress, 0, 1)
    return [stage for stage in curriculum if stage.start <= progress][-1]


def relative_cost(curriculum: Sequence[CurriculumStage], resolution: int) -> float:
    """Compute of all stages against that of as many steps at full size, taken to grow with the number of pixels."""
    _check_curriculum(curriculum, resolution)
    ends = [*(stage.start for stage in curriculum[1:]), 1.0]
    lengths = [end - stage.start for stage, end in zip(curriculum, ends, strict=True)]
    return sum(length * (s.bandwidth / resolution) ** 2 for length, s in zip(lengths, curriculum, strict=True))


# --- position embeddings --------------------------------------------------------------------------------------------


def resize_position_embedding(
    pos: Tensor, *, grid: tuple[int, int], new_grid: tuple[int, int], num_prefix_tokens: int = 1
) -> Tensor:
    """A position embedding for another grid of patches, bilinear; for the moments of Adam as well.

    Args:
        pos: (1, num_prefix_tokens + rows * columns, width).
        grid: (rows, columns) that it has.
        new_grid: (rows, columns) that it gets.
        num_prefix_tokens: tokens before the patches, such as the class token, which are kept.
    """
    tokens = num_prefix_tokens + grid[0] * grid[1]
    if pos.ndim != 3 or pos.shape[1] != tokens:
        raise InputError(f"pos has shape {tuple(pos.shape)}, but must be (1, {tokens}, width) for a grid of {grid}")
    if min(new_grid) < 1:
        raise InputError(f"new_grid is {new_grid}, but must be at least (1, 1)")
    if grid == new_grid:
        return pos
    patches = pos[:, num_prefix_tokens:].unflatten(1, grid).movedim(-1, 1)
    dtype = torch.promote_types(pos.dtype, torch.float32)
    resized = F.interpolate(patches.to(dtype), size=new_grid, mode="bilinear", align_corners=False).to(pos.dtype)
    return torch.cat([pos[:, :num_prefix_tokens], resized.flatten(2).mT], 1)


class _Positions:
    """What lets a vision transformer of the transformers library take several sizes while it trains.

    Hooks ask every module that can interpolate position embeddings for other sizes to do so. A learnt embedding is
    besides resized at a change of stage, as in the paper. The parameter keeps its shape, so that optimizer, checkpoints
    and processes are not troubled: its first rows hold the embedding of the present grid, and a hook on the module that
    owns it shows it those rows alone. It then interpolates only for other sizes, such as in a look between two steps.
    """

    def __init__(self, model: nn.Module) -> None:
        self.flexible = [
            module for module in model.modules() if INTERPOLATE in inspect.signature(type(module).forward).parameters
        ]
        self.owner = next((module for module in self.flexible if _learns_positions(module)), None)
        self.handles: list[Any] = []
        self.grid = self.full = (0, 0)
        if self.owner is not None:
            self.parameter: nn.Parameter = self.owner.position_embeddings  # type: ignore[assignment]
            patches: Any = self.owner.patch_embeddings
            self.patch = _pair(patches.patch_size)
            self.size = _pair(patches.image_size)
            self.grid = self.full = self._grid(*self.size)
            self.prefix = self.parameter.shape[1] - math.prod(self.full)

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        return height // self.patch[0], width // self.patch[1]

    def attach(self) -> None:
        """Put the hooks on."""
        for module in self.flexible:
            self.handles.append(module.register_forward_pre_hook(_interpolating, with_kwargs=True))
        if self.owner is not None:
            self.handles.append(self.owner.register_forward_pre_hook(self._show))
            self.handles.append(self.owner.register_forward_hook(_restore, always_call=True))

    def detach(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def _show(self, module: nn.Module, args: Any) -> None:
        if self.grid != self.full:  # an attribute hides the parameter of its name, which stays where it is
            module.__dict__["position_embeddings"] = self.parameter[:, : self.prefix + math.prod(self.grid)]

    @torch.no_grad()
    def resize(self, size: int, optimizer: Optimizer) -> None:
        """Bring a learnt embedding and its moments to the grid of images of a size; the rows left over are zero."""
        if self.owner is None or (grid := self._grid(size, size)) == self.grid:
            return
        state = [value for value in optimizer.state.get(self.parameter, {}).values() if isinstance(value, Tensor)]
        for tensor in (self.parameter, *(value for value in state if value.shape == self.parameter.shape)):
            old = tensor[:, : self.prefix + math.prod(self.grid)]
            new = resize_position_embedding(old, grid=self.grid, new_grid=grid, num_prefix_tokens=self.prefix)
            tensor.zero_()[:, : new.shape[1]] = new
        self.grid = grid


def _learns_positions(module: nn.Module) -> bool:
    positions = module._parameters.get("position_embeddings")
    patches = getattr(module, "patch_embeddings", None)
    return positions is not None and positions.requires_grad and hasattr(patches, "patch_size")


def _interpolating(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, INTERPOLATE: True}


def _restore(module: nn.Module, args: Any, output: Any) -> None:
    module.__dict__.pop("position_embeddings", None)


def _patch_of(model: nn.Module) -> int:
    """The patch size of a vision transformer; 1 for other models."""
    found = [getattr(module, "patch_size", None) for module in model.modules()]
    return next((math.lcm(*_pair(size)) for size in found if isinstance(size, int | tuple | list)), 1)


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


# --- the callback ---------------------------------------------------------------------------------------------------


class EfficientTrain(Callback):
    """The curriculum for `fit(callbacks=[...])`, or for a loop of one's own: `set_progress(epoch / epochs)`, then
    `images = curriculum(images)`.

    In `fit` it follows the steps and resizes a vision transformer's position embedding. Put it before CutMix and the
    like. In a loop of one's own, use `resize_position_embedding` in a hook.

    Args:
        curriculum: stages, the last one at the images' full size.
        augment: called with each stage's magnitude, to set that of an augmentation.
        on_stage_change: each is called with the stage that begins.

    Attributes:
        stage: the present one.
        on_stage_change: a list, to add to.
    """

    def __init__(
        self,
        curriculum: Sequence[CurriculumStage],
        *,
        augment: Callable[[float], None] | None = None,
        on_stage_change: Sequence[Callable[[CurriculumStage], None]] = (),
    ) -> None:
        _check_curriculum(curriculum)
        self.curriculum, self.augment = list(curriculum), augment
        self.on_stage_change = list(on_stage_change)
        self.resolution = curriculum[-1].bandwidth
        self.positions: _Positions | None = None
        self.checked = False
        self._enter(self.curriculum[0])

    def _enter(self, stage: CurriculumStage) -> None:
        self.stage = stage
        if self.augment is not None:
            self.augment(stage.magnitude)

    @property
    def bandwidth(self) -> int:
        """Side of the images of the present stage, in pixels."""
        return self.stage.bandwidth

    @property
    def magnitude(self) -> float:
        """Of RandAugment, in the present stage."""
        return self.stage.magnitude

    def set_progress(self, progress: float) -> None:
        """Say what share of training is done, 0 to 1."""
        stage = stage_at(self.curriculum, progress)
        if stage != self.stage:
            self._enter(stage)
            for hook in self.on_stage_change:
                hook(stage)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Images (n, channel, resolution, resolution) at the present stage's size."""
        if tuple(images.shape[-2:]) != (self.resolution, self.resolution):
            height, width = images.shape[-2:]
            raise InputError(
                f"The images are {height}x{width}, but must be {self.resolution}x{self.resolution}, the full size with "
                "which the curriculum ends"
            )
        return images if self.bandwidth == self.resolution else low_frequency_crop(images, self.bandwidth)

    def on_start(self, run: Run) -> None:
        self.checked = False
        self._enter(self.curriculum[0])
        patch = _patch_of(run.module)
        for stage in self.curriculum:
            if stage.bandwidth % patch:
                raise InputError(f"bandwidth is {stage.bandwidth}, but must be divisible by the patch size, {patch}")
        self.positions = _Positions(run.module)
        if self.positions.owner is not None and self.positions.size != (self.resolution, self.resolution):
            height, width = self.positions.size
            raise InputError(
                f"curriculum ends at {self.resolution} pixels, but must end at the size that the model's position "
                f"embedding is for, {height}x{width}"
            )
        self.positions.attach()

    def on_batch(self, run: Run, batch: Batch) -> Batch:
        self.set_progress(run.step / run.steps)
        cropped = replaced(batch, images=self(images_of(batch)))
        if self.positions is not None:
            self.positions.resize(self.bandwidth, run.optimizer)
        if not self.checked:
            self._try(run.module, cropped)
        return cropped

    def _try(self, model: nn.Module, batch: Batch) -> None:
        """Raise unless the model takes the smallest images: else the error would come from somewhere inside of it."""
        self.checked = True
        try:
            with torch.no_grad(), mode(model, training=False):
                forward(model, unpack(rows_of(batch, 0, 1))[0])
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(
                f"The model {type(model).__name__} cannot be run on images of {self.bandwidth}x{self.bandwidth}, but "
                f"must take several sizes, as with global pooling before its head: {reason}"
            ) from None

    def on_end(self, run: Run) -> None:
        if self.positions is not None:  # a run that stopped early leaves an embedding of full size, too
            self.positions.detach()
            self.positions.resize(self.resolution, run.optimizer)
            self.positions = None

    def state_dict(self) -> dict[str, Any]:
        """The stage, and the grid that the position embedding has."""
        return {
            "stage": self.curriculum.index(self.stage),
            "grid": list(self.positions.grid if self.positions else (0, 0)),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave; the embedding itself comes with the model's weights."""
        self._enter(self.curriculum[state["stage"]])
        if self.positions is not None:
            self.positions.grid = (state["grid"][0], state["grid"][1])


def recipe(
    model: nn.Module,
    data: Any,
    validation: Any = None,
    *,
    preset: str = "iccv",
    multiple: int | None = None,
) -> Recipe:
    """Train an image classifier with EfficientTrain's crops; an augmentation, which is the data's, stays as it is.

    Args:
        model: image classifier that takes several sizes.
        data: labelled square images.
        validation: not used.
        preset: "iccv", or "plusplus_deit" for stages of equal compute that begin with smaller images.
        multiple: what image sizes must be divisible by, such as the network's stride; the patch size of a vision
            transformer, or else 2, if left out.
    """
    one_of("preset", preset, PRESETS)
    size = images_of(as_dataset(data)[0]).shape[-1]
    curriculum = efficient_train_curriculum(size, multiple=multiple or _patch_of(model), preset=preset)  # type: ignore[arg-type]
    return Recipe(model=model, data=data, callbacks=[EfficientTrain(curriculum)])
