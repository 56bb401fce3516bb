"""Few labelled bags, of which only a handful of instances matter: what attention entropy is for."""

from typing import Any

import torch
from torch import nn

from retouch.arenas.contest import Claim, Entry, Measure, Plot
from retouch.arenas.train import Replica, Solution, Split, Task
from retouch.core import seeds
from retouch.core.models import mode
from retouch.train.aem import AEM, GatedAttentionMIL, attention_entropy
from retouch.worlds import bags

SIZE = 60  # instances of a bag


def draw(seed: int, search: bool, count: int = 30) -> Split:
    """Training bags drawn anew for every replica, and 300 bags of other digits."""
    held_out = "validation" if search else "test"
    train = bags.data("train", count=count, sizes=(SIZE, SIZE), seed=seeds.derive(seed, "train"))
    return Split(train=train, test=bags.data(held_out, count=300, sizes=(SIZE, SIZE), seed=seed))


def build() -> nn.Module:
    """Gated attention over 32 features of each digit."""
    return GatedAttentionMIL(64, 2, hidden=32, attention_hidden=16)


@torch.no_grad()
def judge(model: nn.Module, split: Split) -> dict[str, float]:
    """Area under the ROC curve, error, entropy of attention, and how well attention finds the key instances."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    with mode(model, training=False):
        logits, attention = model(**split.test.inputs)
    scores, labels = logits[:, 1] - logits[:, 0], split.test.targets
    pairs = zip(split.test.keys[labels == 1], attention[labels == 1].mean(1), strict=True)
    return {
        "auc": 100 * roc_auc_score(labels, scores),
        "error": 100 * float(((scores > 0) != labels).float().mean()),
        "entropy": float(attention_entropy(attention, mask=split.test.inputs["mask"]).mean()),
        "recovery": 100 * sum(average_precision_score(keys, weights) for keys, weights in pairs) / int(labels.sum()),
    }


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """AdamW at 2e-3."""
    return torch.optim.AdamW(parameters, lr=2e-3)


def mean_pooling(replica: Replica) -> Solution:
    """Attention that is uniform and stays so."""
    model = replica.build()
    for parameter in model.get_submodule("attention_weights").parameters():
        nn.init.zeros_(parameter.requires_grad_(False))
    return replica.train(model)


def with_weight(replica: Replica, *, weight: float) -> Solution:
    """AEM at one lambda."""
    return replica.train(objective=AEM(weight))


WEIGHTS = (0.01, 0.05, 0.5, 1.0)  # besides the entry's own, and 0, which is plain training
PROBLEMS = ("bags", "more_bags")
AT_ONE_TWENTIETH = Claim(
    text="Lambda 0.05 raises the AUC by at least 0.8 points.",
    problem="bags",
    measure="auc",
    other="plain",
    relation="at least",
    margin=0.8,
)

TASK = Task(
    name="bags",
    text="30 bags of 60 handwritten digits, positive if nines are among them; gated attention, 400 steps of 8 bags.",
    split=draw,
    build=build,
    steps=400,
    batch_size=8,
    optimizer=adamw,
    judge=judge,
    target=10.0,
    order="auc",
    measures={
        "auc": Measure(title="AUC", unit="%", better="high", digits=2, line="Area under the ROC curve over test bags."),
        "entropy": Measure(
            title="entropy", unit="nats", better="high", digits=2, line="Entropy of attention; at most log 60 = 4.09."
        ),
        "recovery": Measure(
            title="key instances",
            unit="%",
            better="high",
            line="Average precision of attention in finding the nines of positive bags.",
        ),
    },
    baselines=(
        Entry(name="mean_pooling", title="mean pooling", kind="baseline", solve=mean_pooling, problems=PROBLEMS),
        *(
            Entry(
                name=f"aem_{weight:g}",
                title=f"AEM at lambda {weight:g}",
                kind="baseline",
                solve=with_weight,
                settings={"": {"weight": weight}},
                problems=("bags",),
                claims=(AT_ONE_TWENTIETH,) if weight == 0.05 else (),
            )
            for weight in WEIGHTS
        ),
    ),
    plots=(
        Plot(
            kind="scatter",
            x="entropy",
            y="auc",
            text="The more entropy the better, up to a point: with too much of it, attention is mean pooling.",
            problems=("bags",),
        ),
    ),
)
