"""A teacher of another family and one of the student's own: an MLP-Mixer and a CNN teach a small CNN on few digits.

Small-scale study of OFA-KD. Beside every student stands how much better it is than plain KL from the same teacher
(`lead`), and how much its features have in common with its teacher's (`cka`, mean over stages).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from retouch.arenas.contest import Entry, Measure
from retouch.arenas.distill import Replica, Solution
from retouch.arenas.distill.tasks._pairs import draw, kl, task, taught
from retouch.core import seeds
from retouch.core.batches import in_order
from retouch.core.distillation import Distillation, answered
from retouch.core.features import capture
from retouch.core.metrics.similarity import linear_cka
from retouch.core.models import mode, predict
from retouch.core.teachers import Teacher
from retouch.distill.ofa import OFADistiller, stages_of

NAME = "families"


class MixerBlock(nn.Module):
    """Mixes a grid's tokens with each other, then the channels of each."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.across = nn.Sequential(nn.Linear(tokens, 2 * tokens), nn.GELU(), nn.Linear(2 * tokens, tokens))
        self.along = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(n, tokens, width) to the same."""
        x = x + self.across(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.along(self.norm2(x))


class Mixer(nn.Module):
    """A small MLP-Mixer for the digits: patches of 2 by 2, four blocks."""

    def __init__(self, width: int = 32, depth: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.blocks = nn.ModuleList([MixerBlock(16, width) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Images (n, 1, 8, 8) to logits (n, 10)."""
        x = self.patches(images).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def cnn(width: int = 4) -> nn.Module:
    """Three stages of convolutions, at 8, 4 and 2 pixels."""
    stages, wide = list[nn.Module](), 1
    for number in range(3):
        out = width << number
        convolution = nn.Conv2d(wide, out, 3, 1 + (number > 0), 1, bias=False)
        stages.append(nn.Sequential(convolution, nn.BatchNorm2d(out), nn.ReLU()))
        wide = out
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(wide, 10))


class AsMaps(nn.Module):
    """A chain of layers on vectors, run so that exits can look at each hidden layer as at a map of one pixel."""

    def __init__(self, chain: nn.Sequential) -> None:
        super().__init__()
        self.chain = chain
        self.maps = nn.ModuleDict({str(i): nn.Identity() for i, m in enumerate(chain) if isinstance(m, nn.ReLU)})

    def forward(self, images: Tensor) -> Tensor:
        """The chain's output."""
        x = images
        for number, layer in enumerate(self.chain):
            x = layer(x)
            if str(number) in self.maps:
                self.maps[str(number)](x[:, :, None, None])
        return x


def through_exits(
    replica: Replica,
    teacher: nn.Module,
    *,
    gamma: float,
    temperature: float,
    w_gt: float = 1.0,
    w_kd: float = 1.0,
    w_ofa: float,
    own: Callable[[nn.Module], dict[str, float]] = lambda model: {},
) -> Solution:
    """Train a student of the task with OFA-KD."""
    student: Any = replica.build()
    inputs = replica.split.train[torch.arange(2)][0]
    whole, product = student, student
    if not any(isinstance(module, nn.Conv2d | nn.LayerNorm) for module in student.modules()):  # no maps, no tokens
        whole = AsMaps(student)
        stages = {f"maps.{name}": number + 1 for number, name in enumerate(whole.maps)}
    else:
        stages = stages_of(student, inputs)
    seed = seeds.derive(replica.seed, "exits")
    settings: dict[str, Any] = {"gamma": gamma, "weights": (w_gt, w_kd, w_ofa), "temperature": temperature}
    model = OFADistiller(whole, teacher, stages, 10, seed=seed, **settings).build(inputs)
    data = answered(replica.split.train, teacher)
    return replica.train(model, data, model.objective, finish=lambda trained: product, own=own)


# --- what the two teachers do -----------------------------------------------------------------------------------------


def kin(replica: Replica) -> Teacher:
    """The teacher of the student's own family, trained once for all entries."""
    kept = replica.problem.store.setdefault("kin", {})
    if replica.seed not in kept:
        kept[replica.seed] = Teacher(taught(lambda: cnn(16))(replica))
    return kept[replica.seed]


def by_kl(replica: Replica, teacher: Teacher, **own: Any) -> Solution:
    """Classic distillation from either teacher."""
    return replica.train(data=answered(replica.split.train, teacher), objective=Distillation(None, kl), **own)


def beside(replica: Replica, teacher: Teacher) -> Callable[[nn.Module], dict[str, float]]:
    """How a student compares with KL from its teacher, and with its teacher."""

    def own(model: nn.Module) -> dict[str, float]:
        error, test = replica.task.error, replica.split
        lead = error(by_kl(replica, teacher).model, test) - error(model, test)
        return {"lead": lead, "cka": alike(model, teacher.model, test.test)}

    return own


@torch.no_grad()
def alike(student: nn.Module, teacher: nn.Module, data: Any) -> float:
    """Linear CKA of the features of two networks, mean over the student's stages, each with the one as deep."""
    batches, found = list(in_order(data, 1024)), []
    for model in (student, teacher):
        layers = list(stages_of(model, batches[0][0]))
        with mode(model, training=False), capture(model, layers) as seen:
            predict(model, batches[:1])
        found.append([seen[layer] for layer in layers])
    ours, theirs = found
    pairs = [(a, theirs[round((i + 1) / len(ours) * len(theirs)) - 1]) for i, a in enumerate(ours)]
    return float(torch.stack([linear_cka(a, b) for a, b in pairs]).mean())


def kd_kin(replica: Replica) -> Solution:
    """Classic distillation from the teacher of the student's own family."""
    model = kin(replica)
    return by_kl(replica, model, own=lambda student: {"cka": alike(student, model.model, replica.split.test)})


def kd_one(replica: Replica) -> Solution:
    """Classic distillation at temperature 1, half of it cross entropy."""

    def loss(student: Any, teacher: Any, labels: Any) -> Any:
        return kl(student, teacher, labels, temperature=1.0, alpha=0.5)

    return replica.train(objective=Distillation(replica.teacher, loss))


SETTINGS: dict[str, Any] = {"gamma": 1.5, "temperature": 1.0, "w_ofa": 1.0}


def ofa_kin(replica: Replica) -> Solution:
    """OFA-KD from the teacher of the student's own family."""
    return through_exits(replica, kin(replica), own=beside(replica, kin(replica)), **SETTINGS)


def ofa_plain(replica: Replica) -> Solution:
    """OFA-KD without enhancement of the target."""
    settings = {**SETTINGS, "gamma": 1.0}
    return through_exits(replica, replica.teacher, own=beside(replica, replica.teacher), **settings)


def _entry(name: str, title: str, solve: Callable[[Replica], Solution], note: str) -> Entry:
    return Entry(name=name, title=title, kind="baseline", solve=solve, problems=(NAME,), note=note)


TASK = task(
    NAME,
    "An MLP-Mixer (in some rows a CNN), trained on 1000 digits, teaches a small CNN of three stages on 100 of them.",
    student=cnn,
    teacher=Mixer,
    split=draw(100),
    steps=300,
    target=10.0,
    measures={
        "lead": Measure(
            title="lead over KD",
            unit="%",
            better="high",
            digits=2,
            line="Error of KD from the same teacher, less this.",
        ),
        "cka": Measure(
            title="CKA", better="high", digits=2, line="Linear CKA of features with the teacher's, mean over stages."
        ),
    },
    more=(
        _entry("kd_t1", "KD, temperature 1", kd_one, "alpha 0.5"),
        _entry("kd_kin", "KD from a CNN", kd_kin, "the teacher is of the student's own family"),
        _entry("ofa_kin", "OFA-KD from a CNN", ofa_kin, "the teacher is of the student's own family"),
        _entry("ofa_gamma1", "OFA-KD, gamma 1", ofa_plain, "the target is not enhanced"),
    ),
)
