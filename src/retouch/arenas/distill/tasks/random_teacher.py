"""What a narrow encoder learns from a random teacher, without labels: features of the digits, judged by a probe."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from retouch.arenas.contest import Entry, Measure
from retouch.arenas.distill import Replica, Solution, Split, Task
from retouch.core import seeds
from retouch.core.data import TensorData
from retouch.distill.random_teacher import RandomTeacherPretraining, knn_probe, linear_probe
from retouch.worlds import digits

NAME = "random_teacher"
HEAD: dict[str, Any] = {"hidden_dims": (256, 256), "bottleneck_dim": 32, "out_dim": 512}
WIDTH = 16  # of the embedding, and channels: so narrow that a random one does not tell the digits apart


class Encoder(nn.Module):
    """Three convolutions, whose mean over the image is the embedding; no BatchNorm, so a copy starts at the minimum."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, wide = nn.ModuleList(), 1
        for number in range(3):
            self.layers.append(nn.Conv2d(wide, WIDTH, 3, 1 + (number > 0), 1))
            wide = WIDTH

    def forward(self, images: Tensor) -> Tensor:
        """Images (n, 1, 8, 8) to embeddings (n, 16)."""
        x = images
        for layer in self.layers:
            x = layer(x).relu()
        return x.mean((2, 3))


class Classifier(nn.Module):
    """The encoder with a linear layer, for training with labels."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = Encoder(), nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Images to logits (n, 10)."""
        return self.head(self.encoder(images))


def split(seed: int, search: bool) -> Split:
    """All training digits, whose labels are for probes alone."""
    train = digits.data("train")
    return Split(train=train, test=digits.data("validation" if search else "test"))


def probe_error(model: nn.Module, split: Split) -> float:
    """Error of a linear probe on an encoder's embeddings, in percent."""
    encoder = getattr(model, "encoder", model)
    return 100 - 100 * linear_probe(encoder, split.train, split.test, epochs=40, lr=1e-2)


def judge(model: nn.Module, split: Split) -> dict[str, float]:
    """Errors of two probes, in percent."""
    encoder = getattr(model, "encoder", model)
    return {"error": probe_error(encoder, split), "knn": 100 - 100 * knn_probe(encoder, split.train, split.test)}


def pretraining(replica: Replica, *, alpha: float = 0.0, **settings: Any) -> RandomTeacherPretraining:
    """The replica's draws: one teacher for all entries."""
    seed = seeds.derive(replica.seed, "draws")
    return RandomTeacherPretraining(Encoder, HEAD, alpha, seed=seed, **settings)


def imitate(replica: Replica, *, alpha: float = 0.0, data: Any = None, **settings: Any) -> Solution:
    """Train a student of the random teacher; the solution is its encoder."""
    plan = pretraining(replica, alpha=alpha, **settings)
    data = TensorData(replica.split.train.inputs) if data is None else data
    student, teacher = plan.start(data.inputs)
    theirs = nn.utils.parameters_to_vector(teacher.encoder.parameters()).detach()

    def distance(encoder: nn.Module) -> dict[str, float]:
        ours = nn.utils.parameters_to_vector(encoder.parameters()).detach()
        return {"distance": 100 * float((ours - theirs).norm() / theirs.norm())}

    return replica.train(
        student,
        data,
        plan.objective(teacher),
        optimizer=plan.optimizer,
        finish=lambda trained: student.encoder,
        own=distance,
    )


def from_noise(replica: Replica) -> Solution:
    """The same on images of independent pixels with the data's mean and deviation."""
    images = replica.split.train.inputs
    noise = torch.randn(images.shape, generator=seeds.generator(replica.seed, "noise"))
    return imitate(replica, data=TensorData(images.mean() + images.std() * noise))


def far(alpha: float) -> Callable[[Replica], Solution]:
    """The same from a start further off."""
    return lambda replica: imitate(replica, alpha=alpha)


def pixels(replica: Replica) -> Solution:
    """No encoder: the probe sees the pixels."""
    model = nn.Flatten()
    return Solution(model, [(0, 0.0, replica.task.error(model, replica.split))], float("nan"))


def _entry(name: str, title: str, solve: Callable[[Replica], Solution], note: str) -> Entry:
    return Entry(name=name, title=title, kind="baseline", solve=solve, problems=(NAME,), note=note)


TASK = Task(
    name=NAME,
    text="An encoder of 16 features learns from 1200 digits without labels; a linear probe on its features is judged.",
    split=split,
    build=Classifier,
    steps=300,
    batch_size=256,
    error=probe_error,
    judge=judge,
    target=20.0,
    teacher=lambda replica: pretraining(replica).start(replica.split.train.inputs)[1].encoder,
    measures={
        "knn": Measure(
            title="20-NN error", unit="%", better="low", digits=2, line="Error of a vote of the 20 nearest embeddings."
        ),
        "distance": Measure(
            title="distance",
            unit="%",
            better="low",
            line="Of the encoder's weights from its teacher's, against their norm.",
        ),
    },
    baselines=(
        _entry("pixels", "raw pixels", pixels, "no encoder"),
        _entry(
            "noise_inputs", "random teacher on noise", from_noise, "trained on noise with the data's mean and spread"
        ),
        _entry("alpha_half", "random teacher, alpha 0.5", far(0.5), "starts half way to another draw"),
        _entry("alpha_one", "random teacher, alpha 1", far(1.0), "starts at an independent draw"),
    ),
)
