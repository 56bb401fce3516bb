"""Which technique makes a classifier forget, at what price, and how near does it come to never having seen the data?

    class           forget one digit of ten                             CNN, 1200 digits
    subset          forget 5% of the samples, drawn at random           CNN, 1200 digits
    subpopulation   forget 10 samples of one digit                      small network, 200 digits

Every replica i has its own original model, its own oracle (retrained without the forget set, by the same recipe) and
its own seeds of forgetting and of evaluation. The row "retrained" is a second set of oracles measured against the
first: the floor that no technique can be expected to beat.
"""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from retouch.arenas.contest import Answer, Arena, Entry, Measure, Picture, Plot, Terms, Values, mean
from retouch.core import seeds
from retouch.core.batches import in_order
from retouch.core.checkpoints import load_tensors, save_tensors
from retouch.core.data import TensorData, labels_of, subset
from retouch.core.ensemble import Ensemble, train_many
from retouch.core.metrics.unlearning import (
    accuracy,
    activation_distance,
    classification_margins,
    klom,
    logit_kl,
    membership_inference_svc,
    oracle_gap,
)
from retouch.core.models import predict
from retouch.worlds import digits

DIGIT = 3
KLOM_MODELS = 16  # with fewer, a histogram of margins says nothing


class SmallNetwork(nn.Module):
    """One hidden layer of 16 units: small enough to train hundreds at once."""

    def __init__(self) -> None:
        super().__init__()
        self.config: dict[str, Any] = {}
        self.hidden = nn.Linear(64, 16)
        self.head = nn.Linear(16, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Images (n, 1, 8, 8) to logits (n, 10)."""
        return self.head(torch.relu(self.hidden(images.flatten(1))))


@dataclass(frozen=True)
class Setting:
    """Model, recipe and data of a problem."""

    build: Callable[[], nn.Module]
    recipe: digits.Recipe
    samples: int
    chunk: int


SETTINGS = {
    "class": Setting(digits.DigitsCNN, digits.RECIPES["cnn"], 1200, 16),
    "subset": Setting(digits.DigitsCNN, digits.RECIPES["cnn"], 1200, 16),
    "subpopulation": Setting(SmallNetwork, digits.Recipe(60, 1e-2, 0.01), 200, 64),
}


def cache_folder() -> Path:
    """Where trained oracles are kept: RETOUCH_CACHE, or ~/.cache/retouch."""
    return Path(os.environ.get("RETOUCH_CACHE", Path.home() / ".cache" / "retouch"))


@dataclass(frozen=True)
class Replica:
    """What an entry is given.

    Attributes:
        model: the original; entries leave it as it is.
        forget, retain: the training data in its two parts.
        train: the training data in the problem's order.
        forget_indices: rows of `train` to forget.
        seed: for the entry's own randomness.
        train_from_scratch: (data, seed) -> model, the original's recipe.
        problem: for what is shared by all replicas.
    """

    number: int
    model: nn.Module
    forget: TensorData
    retain: TensorData
    train: TensorData
    forget_indices: Tensor
    seed: int
    problem: "ForgetProblem"

    def train_from_scratch(self, data: Any, *, seed: int) -> nn.Module:
        """A model trained by the original's recipe."""
        setting = self.problem.setting
        with seeds.isolated(seeds.derive(seed, "weights")):
            model = setting.build()
        return setting.recipe.train(model, data, seed=seed, progress=False)


class ForgetProblem:
    """Originals, oracles and data of one problem.

    A search has other seeds throughout, another random subset, and the validation split in the test split's place.

    Args:
        name: of the problem.
        terms: seeds and the like.
    """

    def __init__(self, name: str, terms: Terms) -> None:
        self.name, self.terms = name, terms
        self.root = int(terms.search)  # all seeds are derived from this
        self.setting = SETTINGS[name]
        whole = digits.data("train")
        self.train = subset(whole, range(self.setting.samples))
        self.test = digits.data("validation" if terms.search else "test")
        self.forget_indices = self._forget_indices()
        self.kept = torch.ones(len(self.train), dtype=torch.bool)
        self.kept[self.forget_indices] = False
        self.forget = subset(self.train, self.forget_indices)
        self.retain = subset(self.train, self.kept.nonzero()[:, 0])
        self.labels = {"train": labels_of(self.train), "test": labels_of(self.test)}
        self.gone = ~torch.isin(self.labels["test"], labels_of(self.retain))  # test samples of a forgotten class
        self.store: dict[str, Any] = {}  # what an entry shares between requests

    def _forget_indices(self) -> Tensor:
        labels = labels_of(self.train)
        if self.name == "class":
            return (labels == DIGIT).nonzero()[:, 0]
        if self.name == "subpopulation":
            return (labels == DIGIT).nonzero()[:10, 0]
        draw = torch.randperm(len(labels), generator=seeds.generator(self.root, "subset"))
        return draw[: len(labels) // 20].sort().values

    def cached(self, kind: str, key: object, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors from the cache folder if they were computed before: same model, recipe, data, seeds and key."""
        recipe = vars(self.setting.recipe)
        whole = repr((self.setting.build.__name__, recipe, self.setting.samples, self.root, kind, key))
        name = f"{kind}-{hashlib.sha256(whole.encode()).hexdigest()[:16]}.safetensors"
        path = cache_folder() / "forget" / name
        if path.exists():
            return load_tensors(path)
        tensors = compute()
        save_tensors(path, tensors)
        return tensors

    def train_many(self, kind: str, members: Tensor) -> Ensemble:
        """Models of the problem's recipe, each trained on its members."""
        recipe = self.setting.recipe
        return train_many(
            self.setting.build,
            self.train,
            members,
            epochs=recipe.epochs,
            batch_size=recipe.batch_size,
            optimizer=recipe.optimizer,
            scheduler=recipe.scheduler,
            seed=seeds.derive(self.root, kind),
            chunk=self.setting.chunk,
        )

    def _models(self, kind: str, member: Tensor, count: int) -> Ensemble:
        members = member.expand(count, -1).clone()
        digest = hashlib.sha256(member.numpy().tobytes()).hexdigest()
        state = self.cached(kind, (count, digest), lambda: self.train_many(kind, members).state)
        return Ensemble(self.setting.build(), state)

    @cached_property
    def originals(self) -> Ensemble:
        """Trained on everything."""
        return self._models(
            "original", torch.ones_like(self.kept), self.terms.number("train", self.terms.replicas - 1) + 1
        )

    @cached_property
    def oracles(self) -> Ensemble:
        """Trained without the forget set: the reference."""
        return self._models("oracle", self.kept, self.terms.replicas)

    @cached_property
    def oracle_logits(self) -> dict[str, Tensor]:
        """The oracles' logits on training and test data, (replicas, n, k)."""
        return {"train": self.oracles.logits(self.train.inputs), "test": self.oracles.logits(self.test.inputs)}

    def replica(self, number: int) -> Replica:
        """What an entry is given for replica `number`."""
        model = self.originals[self.terms.number("train", number)]
        seed = seeds.derive(self.root, "forget", self.terms.number("forget", number))
        return Replica(number, model, self.forget, self.retain, self.train, self.forget_indices, seed, self)


def measure(problem: ForgetProblem, solutions: Sequence[nn.Module]) -> Values:
    """All measures of a row, one value a replica; KLoM is one value over all replicas."""
    # a destroyed model may answer NaN; as a guess it can still be measured
    outputs = {
        name: torch.stack([predict(model, in_order(data)).nan_to_num() for model in solutions])
        for name, data in (("train", problem.train), ("test", problem.test))
    }
    rows = [_measure_one(problem, number, outputs) for number in range(len(solutions))]
    values = {name: [row[name] for row in rows] for name in rows[0]}
    return {**values, **(_klom(problem, outputs) if len(solutions) >= KLOM_MODELS else {})}


def _measure_one(problem: ForgetProblem, number: int, outputs: dict[str, Tensor]) -> dict[str, float]:
    train, test = outputs["train"][number], outputs["test"][number]
    oracle = {name: logits[number] for name, logits in problem.oracle_logits.items()}
    mine = _accuracies(problem, number, train, test)
    reference = _accuracies(problem, number, oracle["train"], oracle["test"])
    forget = ~problem.kept
    # KL and distance are means over several oracles: a single one is as noisy as the method
    several = [problem.oracle_logits["train"][k][forget] for k in range(min(len(problem.oracles), 8))]
    return {
        **mine,
        "gap": oracle_gap(_named(mine), _named(reference)),
        "kl": sum(logit_kl(train[forget], o) for o in several) / len(several),
        "distance": sum(activation_distance(train[forget], o) for o in several) / len(several),
    }


def _named(values: dict[str, float]) -> dict[str, float]:
    names = {"UA": "forget", "RA": "retain", "TA": "test", "MIA": "mia"}
    return {name: values[own] for name, own in names.items()}


def _accuracies(problem: ForgetProblem, number: int, train: Tensor, test: Tensor) -> dict[str, float]:
    kept, gone, labels = problem.kept, problem.gone, problem.labels["test"]
    values = {
        "forget": accuracy(train[~kept], problem.labels["train"][~kept]),
        "retain": accuracy(train[kept], problem.labels["train"][kept]),
        "test": accuracy(test[~gone], labels[~gone]),
        "mia": 100 * _attack(problem, number, train, test),
    }
    return {**values, "test_forget": accuracy(test[gone], labels[gone])} if gone.any() else values


def _attack(problem: ForgetProblem, number: int, train: Tensor, test: Tensor) -> float:
    """Share of the forget set taken for non-members, by an attack learned on equally many of both sides."""
    kept, gone = problem.kept, problem.gone
    others, tested = kept.nonzero()[:, 0], (~gone).nonzero()[:, 0]
    count = min(len(others), len(tested))
    draw = seeds.generator(problem.root, "evaluate", problem.terms.number("evaluate", number))
    others = others[torch.randperm(len(others), generator=draw)[:count]]
    tested = tested[torch.randperm(len(tested), generator=draw)[:count]]
    labels = problem.labels["train"]
    return membership_inference_svc(
        (train[others], labels[others]),
        (test[tested], problem.labels["test"][tested]),
        (train[~kept], labels[~kept]),
    )


def _klom(problem: ForgetProblem, outputs: dict[str, Tensor]) -> Values:
    """95th percentile over points of the divergence of margins from the oracles'."""
    values = {}
    for name, split, points in (
        ("klom_forget", "train", ~problem.kept),
        ("klom_retain", "train", problem.kept),
        ("klom_test", "test", ~problem.gone),
    ):
        labels = getattr(problem, split).targets[points]
        sides = [
            classification_margins(logits[split][:, points], labels) for logits in (outputs, problem.oracle_logits)
        ]
        values[name] = [float(klom(*sides).quantile(0.95))]
    return values


def pictures(problem: ForgetProblem) -> list[Picture]:
    """Samples to forget, and others."""
    found = []
    for group, data, rows in _picture_rows(problem):
        labels = labels_of(data)
        found += [Picture(image=data[row][0], title=str(int(labels[row])), group=group) for row in rows]
    return found


def _picture_rows(problem: ForgetProblem) -> list[tuple[str, TensorData, list[int]]]:
    """Headings, data and rows of the samples shown: five to forget, and a test sample of each other digit."""
    whole_class = bool(problem.gone.any())
    forget: tuple[str, TensorData, list[int]] = ("to forget", problem.forget, list(range(5)))
    if whole_class:
        forget = (f"unseen {DIGIT}s", problem.test, problem.gone.nonzero()[:5, 0].tolist())
    labels = problem.labels["test"]
    others = [c for c in range(10) if not (whole_class and c == DIGIT)]
    keep = [int((labels == c).nonzero()[0, 0]) for c in others]
    return [forget, ("to keep", problem.test, keep)]


def answers(problem: ForgetProblem, model: nn.Module) -> list[Answer]:
    """The class a model sees in each picture, with its probability."""
    found = []
    for group, data, rows in _picture_rows(problem):
        probabilities = predict(model, in_order(subset(data, rows))).nan_to_num().softmax(-1)
        labels = labels_of(subset(data, rows))
        for row, label in zip(probabilities, labels, strict=True):
            seen = int(row.argmax())
            right = None if group == "to forget" else (seen == int(label)) != (group != "to keep")
            found.append(Answer(text=f"{seen} ({100 * float(row.max()):.0f}%)", right=right))
    return found


def words(problem: str, rows: Mapping[str, Any]) -> list[str]:
    """The result in plain sentences."""
    if "retrain" not in rows or "nothing" not in rows:
        return []
    value = {name: {m: mean(v) for m, v in row["values"].items()} for name, row in rows.items()}
    original, oracle = value["nothing"], value["retrain"]
    sentences = [
        f"Before, the network is right on {original['forget']:.0f}% of the samples to forget. Trained again without "
        f"them it is right on {oracle['forget']:.0f}% of them, and on {oracle['test']:.1f}% of the test samples to "
        "keep: that is the aim, not zero and not a hundred."
    ]
    techniques = {name: row for name, row in rows.items() if row["kind"] == "technique"}
    if techniques:
        best = min(techniques, key=lambda name: value[name]["gap"])
        sentences.append(
            f"{rows[best]['title']} comes nearest to that, {value[best]['gap']:.1f} points off on average (a second "
            f"retrained network is {oracle['gap']:.1f} off), {_speed(value[best]['speedup'])}."
        )
    for name, row in techniques.items():
        forget, test = value[name]["forget"] - oracle["forget"], value[name]["test"] - oracle["test"]
        if abs(forget) > 5 or abs(test) > 3:
            missed = f"{forget:+.0f} points in forget accuracy, {test:+.1f} in test accuracy"
            sentences.append(f"{row['title']} misses the aim: {missed}. {row['weakness']}".strip())
    return sentences


def _speed(times: float) -> str:
    if times >= 1.5:
        return f"{times:.0f} times as fast as retraining"
    return "in about the time of retraining" if times > 0.7 else f"in {1 / times:.1f} times the time of retraining"


MEASURES = {
    "gap": Measure(
        title="gap",
        better="low",
        line="Mean distance to the oracle in forget, retain and test accuracy and in membership inference, in points.",
    ),
    "forget": Measure(title="forget", unit="%", line="Accuracy on the samples to forget."),
    "test_forget": Measure(title="forget, test", unit="%", line="Accuracy on test samples of the forgotten class."),
    "retain": Measure(title="retain", unit="%", line="Accuracy on the rest of the training data."),
    "test": Measure(title="test", unit="%", line="Accuracy on test samples of the remaining classes."),
    "mia": Measure(title="attack", unit="%", line="Share of the forget set that an attack takes for never seen."),
    "klom_forget": Measure(
        title="KLoM forget",
        better="low",
        digits=2,
        line="Divergence of margins from many retrained models, forget samples, 95th percentile; fewer than 100 models "
        "bias it upward, so compare with the retrained row.",
    ),
    "klom_retain": Measure(title="KLoM retain", better="low", digits=2, line="The same on retained samples."),
    "klom_test": Measure(title="KLoM test", better="low", digits=2, line="The same on test samples."),
    "kl": Measure(
        title="KL", better="low", digits=2, line="Divergence of predictions on the forget set from the oracles'."
    ),
    "distance": Measure(
        title="distance",
        better="low",
        digits=2,
        line="L2 distance of predictions on the forget set to the oracles'.",
    ),
    "seconds": Measure(title="time", unit="s", better="low", digits=2, line="Seconds for one request."),
    "speedup": Measure(title="speed-up", unit="x", better="high", line="How many times quicker than retraining."),
    "memory": Measure(title="memory", unit="MiB", better="low", digits=0, line="Largest memory above the start."),
}


def _baselines() -> Sequence[Entry]:
    from retouch.arenas.forget.baselines import BASELINES

    return BASELINES


ARENA = Arena(
    name="forget",
    question="Which technique makes a classifier forget, at what price, and how near does it come to retraining?",
    problems={
        "class": f"Forget one class: all {DIGIT}s of 1200 handwritten digits; a small convolutional network.",
        "subset": "Forget 5% of 1200 handwritten digits, drawn at random; a small convolutional network.",
        "subpopulation": f"Forget ten of the {DIGIT}s of 200 handwritten digits; a network of one hidden layer.",
    },
    measures=MEASURES,
    prepare=ForgetProblem,
    measure=measure,
    order="gap",
    baselines=_baselines,
    plots=(
        Plot(
            kind="scatter",
            x="forget",
            y="test",
            text="Forgetting against keeping. The star is the retrained network: the nearer, the better. To its right, "
            "too little is forgotten; below it, the samples to keep have paid for it.",
        ),
    ),
    pictures=pictures,
    answers=answers,
    words=words,
)
