"""Handwritten digits of which a share is labelled wrongly, and a network that is trained until it knows them by heart.

The same for three shares: this file is the task of 20%; `noise40` and `noise50` are the others.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR

from retouch.arenas.contest import Claim, Entry, Measure, Plot
from retouch.arenas.train import Replica, Solution, Split, Task, classification_measures
from retouch.core import seeds
from retouch.core.batches import in_order
from retouch.core.corruptions import noisy
from retouch.core.data import labels_of, subset
from retouch.core.metrics.unlearning import accuracy
from retouch.core.models import predict
from retouch.train.nested_dropout import Pair, co_teaching
from retouch.worlds import digits

SAMPLES, BATCH, EPOCHS = 1000, 64, 60
STEPS = EPOCHS * -(-SAMPLES // BATCH)
PROBLEMS = ("noise20", "noise40", "noise50")


def draw(seed: int, search: bool, share: float) -> Split:
    """Training digits drawn and mislabelled anew for every replica; the others of the split have clean labels."""
    whole = digits.data("train")
    rows = torch.randperm(len(whole), generator=seeds.generator(seed))
    clean = subset(whole, rows[:SAMPLES])
    return Split(
        train=noisy(clean, share, seed, classes=len(digits.CLASSES)),
        validation=subset(whole, rows[SAMPLES:]),
        test=digits.data("validation" if search else "test"),
        notes={"labels": labels_of(clean)},
    )


def build(dropout: float = 0.0) -> nn.Module:
    """Two layers with batch normalisation, 128 features, and a linear head without bias."""
    first = [nn.Flatten(), nn.Linear(64, 512), nn.BatchNorm1d(512), nn.ReLU()]
    second = [nn.Linear(512, 128), nn.BatchNorm1d(128), nn.ReLU()]
    last = [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*first, *second, *last, nn.Linear(128, 10, bias=False))


def sgd(parameters: Any, rate: float = 0.1) -> torch.optim.Optimizer:
    """SGD with momentum at 0.1."""
    return torch.optim.SGD(parameters, lr=rate, momentum=0.9, weight_decay=5e-4)


def steps_down(optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    """A tenth of the rate from 60% of the steps on, and a hundredth from 85% on."""
    return MultiStepLR(optimizer, [int(0.6 * steps), int(0.85 * steps)], gamma=0.1)


def judge(model: nn.Module, split: Split) -> dict[str, float]:
    """Errors on clean test samples, and how many of the wrong labels were learnt."""
    given, clean = labels_of(split.train), split.notes["labels"]
    wrong = given != clean
    memorised = accuracy(predict(model, in_order(split.train))[wrong], given[wrong])
    return {**classification_measures(model, split), "memorised": memorised}


# --- what runs in two stages ----------------------------------------------------------------------------------------


def second(replica: Replica) -> Replica:
    """The replica for another network: other weights, orders and draws on the same data."""
    return replace(replica, seed=seeds.derive(replica.seed, "second"))


def after(stage: Solution, *before: Solution) -> Solution:
    """A solution whose steps and seconds count those of the stages before it."""
    steps = sum(solution.curve[-1][0] for solution in before)
    seconds = sum(solution.curve[-1][1] for solution in before)
    curve = [(step + steps, time + seconds, error) for step, time, error in stage.curve]
    return replace(stage, curve=[*before[-1].curve, *curve])


def fine_tune(replica: Replica, one: Solution, two: Solution, *, rate: float, epochs: int, **settings: Any) -> Solution:
    """Co-teaching from two trained networks, with batch normalisation frozen."""
    stage = replica.train(
        Pair(one.model, two.model),
        objective=co_teaching(**settings.pop("co_teaching")),
        optimizer=lambda parameters: sgd(parameters, rate),
        steps=epochs * -(-SAMPLES // BATCH),
        **settings,
    )
    return after(stage, one, two)


def dropout(replica: Replica, *, p: float) -> Solution:
    """Dropout before the head."""
    with seeds.isolated(seeds.derive(replica.seed, "weights")):
        return replica.train(build(p))


def scratch(replica: Replica, *, forget_rate: float, num_gradual: int) -> Solution:
    """Co-teaching as first published: from new weights, both networks on whole batches."""
    objective = co_teaching(forget_rate=forget_rate, num_gradual=num_gradual, split_batch=False, freeze_bn=False)
    return replica.train(Pair(replica.build(), second(replica).build()), objective=objective)


def plain_co_teaching(replica: Replica, *, forget_rate: float, rate: float, epochs: int) -> Solution:
    """Stage two without stage one's nested dropout."""
    one, two = replica.train(), second(replica).train()
    return fine_tune(replica, one, two, rate=rate, epochs=epochs, co_teaching={"forget_rate": forget_rate})


def per_problem(**others: Any) -> Mapping[str, Mapping[str, Any]]:
    """Settings with the forget rate at the task's share of wrong labels."""
    return {name: {"forget_rate": int(name[-2:]) / 100, **others} for name in PROBLEMS}


BASELINES = (
    Entry(
        name="head_dropout",
        title="dropout of 0.5",
        kind="baseline",
        solve=dropout,
        settings={"": {"p": 0.5}},
        problems=PROBLEMS,
        claims=(
            Claim(
                text="Dropout before the head lowers the test error by at least 1 point.",
                problem="noise40",
                measure="error",
                other="plain",
                relation="at most",
                margin=-1.0,
                source="ANIMAL-10N 81.3 against 79.4",
            ),
        ),
    ),
    Entry(
        name="tuned_dropout",
        title="dropout of 0.8",
        kind="baseline",
        solve=dropout,
        settings={"": {"p": 0.8}},
        grid={"p": (0.3, 0.5, 0.7, 0.8, 0.9)},
        problems=PROBLEMS,
        note="the share that a search found",
    ),
    Entry(
        name="co_teaching",
        title="Co-teaching",
        kind="baseline",
        solve=scratch,
        settings=per_problem(num_gradual=5),
        grid={"num_gradual": (5, 10, 15)},
        problems=PROBLEMS,
        note="two networks from new weights, the mean of their logits; knows the share of wrong labels",
    ),
    Entry(
        name="plain_co_teaching",
        title="plain + Co-teaching",
        kind="baseline",
        solve=plain_co_teaching,
        settings=per_problem(rate=0.03, epochs=40),
        grid={"rate": (0.01, 0.03, 0.1), "epochs": (20, 40)},
        problems=PROBLEMS,
        note="the second stage alone, after two networks trained plainly; knows the share of wrong labels",
    ),
)


def task(share: float, baselines: tuple[Entry, ...] = (), measures: Any = None, plots: Any = ()) -> Task:
    """The task for a share of wrong labels."""
    return Task(
        name=f"noise{round(100 * share)}",
        text=f"{SAMPLES} handwritten digits, {share:.0%} of them with a wrong label, test digits with the right one; a "
        f"network of three layers with batch normalisation, {EPOCHS} epochs.",
        split=lambda seed, search: draw(seed, search, share),
        build=build,
        steps=STEPS,
        batch_size=BATCH,
        optimizer=sgd,
        scheduler=steps_down,
        judge=judge,
        target=15.0,
        measures=measures or {},
        baselines=baselines,
        plots=plots,
    )


TASK = task(
    0.2,
    BASELINES,
    {
        "memorised": Measure(
            title="wrong labels learnt",
            unit="%",
            better="low",
            line="Training samples with a wrong label to which the model gives that label.",
        ),
        "keep": Measure(title="channels", digits=0, line="Channels of the features that are used, k*."),
    },
    (
        Plot(
            kind="scatter",
            x="memorised",
            y="error",
            text="Who learns the wrong labels, and who is wrong on clean test samples.",
            problems=PROBLEMS,
        ),
    ),
)
