"""Rules that turn the predictions of several branches into one.

A guidance names the branches it needs and which condition each of them has, and says how it changes the conditional
prediction. Guidances are added: `cfg(7.5) + pag(3.0)` asks for uncond, cond and perturbed in one batch, and its result
is cond + (6.5 (cond - uncond)) + (3 (cond - perturbed)).

    cfg(w)      (w - 1) (cond - uncond), on x0 and on noise alike (Ho and Salimans 2022)
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from retouch.core.attention import Edit, edit_attention
from retouch.core.diffusion.denoiser import Prediction
from retouch.core.diffusion.process import Level
from retouch.core.errors import InputError, in_range

Predictions = Mapping[str, Prediction]
Change = Callable[[Predictions, Tensor, Level], Prediction]


@dataclass(frozen=True, kw_only=True)
class AttentionEdit:
    """Attention that a guidance changes while the model runs.

    Attributes:
        function: see `core.attention.edit_attention`; `call.branches` tells it which rows are whose.
        layers: patterns of names.
        kind: of attention.
    """

    function: Edit
    layers: Any = ".*"
    kind: str = "any"


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """One rule.

    Attributes:
        name: for messages.
        branches: branch -> the condition it is asked with, "cond" or "uncond"; "cond" itself is always there.
        change: (predictions, x, level) -> what is added to the conditional prediction.
        renoise: branch whose noise is taken in place of the sum's, if any.
        edits: of attention, while the branches are asked.
        start: share of the steps before it is active.
        stop: share of the steps at which it ends.
    """

    name: str
    branches: Mapping[str, str] = field(default_factory=dict)
    change: Change
    renoise: str | None = None
    edits: tuple[AttentionEdit, ...] = ()
    start: float = 0.0
    stop: float = 1.0

    def __post_init__(self) -> None:
        """Refuse a window that is none."""
        in_range("start", self.start, 0, 1)
        in_range("stop", self.stop, self.start, 1)

    def active(self, level: Level) -> bool:
        """Whether it acts on the step that starts at a level."""
        return self.start <= level.index / level.steps < self.stop

    def within(self, start: float, stop: float) -> "Guidance":
        """The same in a window of the steps, as shares of their number."""
        return replace(self, start=start, stop=stop)

    def __add__(self, other: "Guidance | Sum") -> "Sum":
        return Sum((self,)) + other


@dataclass(frozen=True)
class Sum:
    """Several rules at once; none of them is plain conditional sampling."""

    parts: tuple[Guidance, ...] = ()

    def __post_init__(self) -> None:
        """Refuse two rules that want the noise from different branches."""
        wanted = {part.renoise for part in self.parts if part.renoise is not None}
        if len(wanted) > 1:
            raise InputError(f"Two guidances take the noise from {' and '.join(sorted(wanted))}, but only one can")

    def __add__(self, other: "Guidance | Sum") -> "Sum":
        return Sum((*self.parts, *as_sum(other).parts))

    def active(self, level: Level) -> "Sum":
        """Those that act on the step that starts at a level."""
        return Sum(tuple(part for part in self.parts if part.active(level)))

    @property
    def branches(self) -> dict[str, str]:
        """All branches and their conditions: uncond, cond, and then the others."""
        found: dict[str, str] = {}
        for part in self.parts:
            for name, condition in part.branches.items():
                if found.setdefault(name, condition) != condition:
                    raise InputError(f"Two guidances ask the branch {name} with different conditions")
        rest = {name: condition for name, condition in found.items() if name not in ("uncond", "cond")}
        first = {"uncond": "uncond"} if "uncond" in found else {}
        return {**first, "cond": "cond", **rest}

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Their edits of attention, in a model."""
        with ExitStack() as stack:
            for part in self.parts:
                for edit in part.edits:
                    stack.enter_context(edit_attention(model, edit.function, edit.layers, kind=edit.kind))
            yield

    def combine(self, predictions: Predictions, x: Tensor, level: Level) -> Prediction:
        """The conditional prediction with all changes."""
        cond = predictions["cond"]
        x0, noise = cond.x0, cond.noise
        for part in self.parts:
            change = part.change(predictions, x, level)
            x0, noise = x0 + change.x0, noise + change.noise
        taken = next((part.renoise for part in self.parts if part.renoise is not None), None)
        return Prediction(x0, noise if taken is None else predictions[taken].noise)


def as_sum(guidance: Guidance | Sum | None) -> Sum:
    """One rule, several or none, as a sum."""
    if guidance is None:
        return Sum()
    return Sum((guidance,)) if isinstance(guidance, Guidance) else guidance


def difference(a: Prediction, b: Prediction, scale: float) -> Prediction:
    """scale (a - b)."""
    return Prediction(scale * (a.x0 - b.x0), scale * (a.noise - b.noise))


def cfg(scale: float = 7.5) -> Guidance:
    """Classifier-free guidance: uncond + scale (cond - uncond).

    Args:
        scale: 1 is plain conditional sampling.
    """
    in_range("scale", scale, 0)
    return Guidance(
        name="cfg",
        branches={"uncond": "uncond"},
        change=lambda found, x, level: difference(found["cond"], found["uncond"], scale - 1),
    )
