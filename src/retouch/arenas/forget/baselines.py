"""What every technique is compared with: do nothing, retrain, and the common ways to unlearn by fine-tuning."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from retouch.arenas.contest import Entry
from retouch.arenas.forget import Replica
from retouch.core import seeds
from retouch.core.batches import InTurn
from retouch.core.loop import Run, fit
from retouch.core.models import Batch, forward, logits_of, own, unpack
from retouch.core.objectives import cross_entropy
from retouch.core.teachers import Teacher
from retouch.forget.salun import salun


def _kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of softened predictions, mean over the batch."""
    p, q = (teacher / temperature).log_softmax(-1), (student / temperature).log_softmax(-1)
    return temperature**2 * F.kl_div(q, p, log_target=True, reduction="batchmean")


def _sgd(lr: float, momentum: float = 0.9) -> Callable[..., Optimizer]:
    return lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=momentum)


def nothing(replica: Replica) -> nn.Module:
    """The original."""
    return replica.model


def retrain(replica: Replica) -> nn.Module:
    """Train from scratch without the forget set, with seeds that the reference oracles do not have."""
    return replica.train_from_scratch(
        replica.retain, seed=seeds.derive(replica.problem.root, "retrain", replica.number)
    )


def fine_tune(replica: Replica, *, lr: float, epochs: int) -> nn.Module:
    """Go on training on the retained data only."""
    model = own(replica.model, inplace=False)
    fit(model, replica.retain, cross_entropy, epochs=epochs, optimizer=_sgd(lr), seed=replica.seed, progress=False)
    return model


def gradient_ascent(replica: Replica, *, lr: float, epochs: int) -> nn.Module:
    """Raise the loss on the forget set."""
    model = own(replica.model, inplace=False)
    ascent = -cross_entropy
    fit(model, replica.forget, ascent, epochs=epochs, optimizer=_sgd(lr, 0.0), seed=replica.seed, progress=False)
    return model


def random_labelling(replica: Replica, *, lr: float, epochs: int) -> nn.Module:
    """SalUn without its mask."""
    parts = replica.model, replica.forget, replica.retain
    return salun(*parts, ratio=1.0, epochs=epochs, lr=lr, batch_size=64, seed=replica.seed)


def bad_teacher(replica: Replica, *, lr: float, epochs: int) -> nn.Module:
    """Imitate an untrained model on the forget set and the original on the retained data (Chundawat et al., 2023)."""
    with seeds.isolated(seeds.derive(replica.seed, "untrained")):
        untrained = Teacher(replica.problem.setting.build())
    original, model = Teacher(replica.model), own(replica.model, inplace=False)

    def imitate(model: nn.Module, batch: Batch, run: Run) -> Tensor:
        ((part, samples),) = batch.items()
        inputs = unpack(samples)[0]
        teacher = untrained if part == "forget" else original
        return _kl(logits_of(forward(model, inputs)), logits_of(forward(teacher, inputs)))

    passes = InTurn({"forget": replica.forget, "retain": replica.retain}, seed=replica.seed)
    fit(model, passes, imitate, epochs=epochs, optimizer=_sgd(lr), seed=replica.seed, progress=False)
    return model


def scrub(replica: Replica, *, lr: float, epochs: int, temperature: float = 4.0) -> nn.Module:
    """Move away from the original on the forget set, stay with it and the labels on the rest (Kurmanji et al., 2023).

    The first half of the epochs does both, the second half only the latter. The optimizer holds the student's weights
    only.
    """
    original, model = Teacher(replica.model), own(replica.model, inplace=False)

    def away_and_back(model: nn.Module, batch: Batch, run: Run) -> Tensor:
        ((part, samples),) = batch.items()
        inputs, targets = unpack(samples)
        student, teacher = logits_of(forward(model, inputs)), logits_of(forward(original, inputs))
        distance = _kl(student, teacher, temperature)
        return -distance if part == "forget" else distance + F.cross_entropy(student, targets)

    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    both = InTurn({"forget": replica.forget, "retain": replica.retain}, seed=replica.seed)
    back = InTurn({"retain": replica.retain}, seed=seeds.derive(replica.seed, "back"))
    for passes in (both, back):
        fit(model, passes, away_and_back, epochs=epochs // 2, optimizer=optimizer, seed=replica.seed, progress=False)
    return model


# Found with `retouch bench forget --search NAME`: the smallest gap among settings that keep at least 95% of retain
# accuracy; of those within a quarter point of it, the one of fewest epochs. The techniques' settings likewise.
SETTINGS: dict[str, dict[str, dict[str, float]]] = {
    "fine_tune": {
        "class": {"lr": 0.1, "epochs": 8},
        "subset": {"lr": 0.01, "epochs": 2},
        "subpopulation": {"lr": 0.1, "epochs": 4},
    },
    "gradient_ascent": {
        "class": {"lr": 0.1, "epochs": 2},
        "subset": {"lr": 0.3, "epochs": 2},
        "subpopulation": {"lr": 0.01, "epochs": 8},
    },
    "random_labels": {
        "class": {"lr": 0.001, "epochs": 8},
        "subset": {"lr": 0.003, "epochs": 4},
        "subpopulation": {"lr": 0.003, "epochs": 2},
    },
    "bad_teacher": {
        "class": {"lr": 0.001, "epochs": 4},
        "subset": {"lr": 0.003, "epochs": 2},
        "subpopulation": {"lr": 0.03, "epochs": 8},
    },
    "scrub": {
        "class": {"lr": 0.003, "epochs": 8},
        "subset": {"lr": 0.01, "epochs": 2},
        "subpopulation": {"lr": 0.01, "epochs": 8},
    },
}


def _baseline(name: str, title: str, solve: Callable[..., nn.Module], lrs: tuple[float, ...]) -> Entry:
    grid = {"lr": lrs, "epochs": (2, 4, 8)}
    return Entry(name=name, title=title, kind="baseline", solve=solve, settings=SETTINGS[name], grid=grid)


BASELINES = (
    Entry(name="nothing", title="do nothing", kind="original", solve=nothing),
    Entry(
        name="retrain",
        title="retrained",
        kind="oracle",
        solve=retrain,
        note="A second set of oracles against the first: the floor of every measure.",
    ),
    _baseline("fine_tune", "fine-tune on the rest", fine_tune, (0.01, 0.03, 0.1, 0.3)),
    _baseline("gradient_ascent", "gradient ascent", gradient_ascent, (0.01, 0.03, 0.1, 0.3, 1.0)),
    _baseline("random_labels", "random labels", random_labelling, (0.001, 0.003, 0.01, 0.03)),
    _baseline("bad_teacher", "bad teacher", bad_teacher, (0.001, 0.003, 0.01, 0.03)),
    _baseline("scrub", "SCRUB", scrub, (0.0003, 0.001, 0.003, 0.01)),
)
