"""Students of one size cut from super-networks, against students drawn by hand: captions, read by small BERTs.

Small-scale study of AutoDistil. A teacher of 4 layers, 12 heads of 8 and width 96 says the colour of the one of two
things that is on the left or above. Students of at most 26% of its operations learn the relations of its last attention
on captions without labels, and then its task on 24 labelled ones. A hand-made student gets as many steps of the same
loss, alone, from the same slices of the teacher.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from retouch.arenas.contest import Claim, Entry, Measure, mean
from retouch.arenas.distill import Replica, Solution, Split, Task
from retouch.core import seeds
from retouch.core.data import TensorData
from retouch.distill.autodistil import Arch, AutoDistil, Candidate, SearchSpace, bert
from retouch.worlds.shapes.captions import RELATIONS, VOCABULARY, Description, Mention, phrase, tokenize
from retouch.worlds.shapes.scenes import ATTRIBUTES

NAME = "supernet"
TEACHER = Arch(4, 12, 96, 3.0)
SPACE = SearchSpace((2, 3, 4), (6, 8, 10), (32, 48, 64), (2.0, 3.0))  # 54 students
SMALL = SearchSpace((2, 3, 4), (6, 8, 10), (32,), (2.0, 3.0))  # 18 of them
LIMIT = 0.26  # of the teacher's operations
BY_HAND = {"shallow": Arch(2, 10, 64, 3.0), "middle": Arch(3, 10, 48, 3.0), "deep": Arch(4, 8, 48, 2.0)}
OTHERS = (Arch(2, 6, 32, 2.0), Arch(4, 6, 32, 3.0), Arch(2, 8, 48, 3.0), Arch(3, 6, 64, 2.0), Arch(4, 10, 64, 3.0))
LENGTH, UNLABELLED, LABELLED, HELD_OUT, TESTED = 12, 2000, 24, 128, 500
STEPS, RATE = 100, 2e-3


# --- captions -------------------------------------------------------------------------------------------------------


def captions(count: int, *keys: Any) -> TensorData:
    """Captions of two things as tokens, 0 at padding; the label is the colour of the one on the left or above."""
    rng = random.Random(seeds.derive(0, "captions", *keys))
    colours, rows, labels = ATTRIBUTES["colour"], torch.zeros(count, LENGTH, dtype=torch.long), []
    for row in range(count):
        pair, relation = rng.sample(colours, 2), rng.choice(RELATIONS)
        things = tuple(Mention(rng.choice(ATTRIBUTES["shape"]), colour, _size(rng)) for colour in pair)
        ids = [1, *(2 + token for token in tokenize(phrase(Description(things, (relation,)))))]
        rows[row, : len(ids)] = torch.tensor(ids)
        labels.append(colours.index(pair[0 if relation in ("left of", "above") else 1]))
    return TensorData({"input_ids": rows, "attention_mask": (rows > 0).long()}, torch.tensor(labels))


def _size(rng: random.Random) -> str | None:
    return rng.choice((None, *ATTRIBUTES["size"]))


def split(seed: int, search: bool) -> Split:
    """A few captions with labels; in the notes many without, and some to search by."""
    notes = {name: captions(n, seed, name).inputs for name, n in (("texts", UNLABELLED), ("held_out", HELD_OUT))}
    test = captions(TESTED, "search" if search else "test")
    kept = {name: TensorData(inputs) for name, inputs in notes.items()}
    return Split(train=captions(LABELLED, seed, "labelled"), test=test, notes=kept)


def new_bert(arch: Arch = TEACHER) -> nn.Module:
    """An untrained classifier of captions, with heads of 8."""
    from transformers import BertConfig, BertForSequenceClassification

    sizes: dict[str, Any] = {
        "hidden_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 12,
        "intermediate_size": 96,
    }
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.1}
    tokens = {"vocab_size": 2 + len(VOCABULARY), "pad_token_id": 0, "max_position_embeddings": LENGTH}
    labels = {"num_labels": len(ATTRIBUTES["colour"])}
    return bert(BertForSequenceClassification(BertConfig(**{**sizes, **quiet, **tokens, **labels})), arch)


def unseen(model: nn.Module) -> float:
    """Nothing: where the error would mean nothing while training, it is not looked at."""
    return 100.0


def teacher(replica: Replica) -> nn.Module:
    """Trained on captions of its own, with labels."""
    with seeds.isolated(seeds.derive(replica.seed, "teacher")):
        model = new_bert()
    return replica.train(model, captions(2 * UNLABELLED, replica.seed, "teacher"), steps=200, error=unseen).model


# --- students -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Distilled:
    """A super-network of a replica after its training, and the students it would offer, the best first."""

    net: AutoDistil
    offers: list[Candidate]


def limit(net: AutoDistil) -> float:
    """Operations that a student may have."""
    return LIMIT * net.flops(TEACHER, LENGTH)


def taught(replica: Replica, net: AutoDistil, steps: int) -> Distilled:
    """A super-network, or one student alone, trained on the captions without labels."""
    texts, held_out = replica.split.notes["texts"], replica.split.notes["held_out"]
    replica.train(net.model, texts, net, optimizer=net.optimizer, steps=steps, error=unseen)
    return Distilled(net, net.search(held_out, length=LENGTH))


def distilled(replica: Replica, space: SearchSpace, steps: int = STEPS) -> Distilled:
    """A super-network from the teacher's slices, trained once a replica."""
    kept: dict[Any, Distilled] = replica.problem.store.setdefault("super-networks", {})
    key = (replica.seed, space, steps)
    if key not in kept:
        extra = min(2, max(0, len(space.all()) - 2))
        net = AutoDistil(replica.teacher.model, space, extra=extra, lr=RATE, seed=replica.seed)
        kept[key] = taught(replica, net, steps)
    return kept[key]


def alone(replica: Replica, arch: Arch) -> Distilled:
    """A single student from the teacher's slices, trained for as many steps."""
    return distilled(replica, SearchSpace((arch.layers,), (arch.heads,), (arch.hidden,), (arch.mlp_ratio,)))


def fine_tuned(replica: Replica, made: Distilled, arch: Arch, **own: float) -> Solution:
    """The student cut out and trained with labels; its relation loss on test captions is that before."""
    (relation,) = made.net.losses([arch], TensorData(replica.split.test.inputs))
    return replica.train(made.net.extract(arch), own=lambda model: {"relation": relation, **own})


def searched(replica: Replica, steps: int = STEPS) -> Arch:
    """The best student of the super-network within the budget."""
    made = distilled(replica, SPACE, steps)
    return next(row.arch for row in made.offers if row.flops <= limit(made.net))


def of_small(made: Distilled) -> float:
    """Mean relation loss on held-out captions of the students in the small space."""
    return mean([row.loss for row in made.offers if row.arch in SMALL.all()])


def solve(replica: Replica, *, share: float = 1.0) -> Solution:
    """A super-network for a share of the steps, the best student within the budget, which goes on alone."""
    steps = round(share * STEPS)
    made, arch = distilled(replica, SPACE, steps), searched(replica, steps)
    if steps < STEPS:
        made = taught(replica, made.net.alone(arch), STEPS - steps)
    return fine_tuned(replica, made, arch)


def super_network(replica: Replica) -> Solution:
    """The best student within the budget, as it is after all steps of the super-network."""
    made = distilled(replica, SPACE)
    return fine_tuned(replica, made, searched(replica), small=of_small(made))


def by_hand(name: str) -> Callable[[Replica], Solution]:
    """A student of a shape drawn by hand, distilled alone."""
    return lambda replica: fine_tuned(replica, alone(replica, BY_HAND[name]), BY_HAND[name])


def searched_alone(replica: Replica) -> Solution:
    """The shape that was found, distilled alone like those drawn by hand."""
    return fine_tuned(replica, alone(replica, searched(replica)), searched(replica))


def by_chance(replica: Replica) -> Solution:
    """A sub-network of nearly as many operations, at random."""
    made = distilled(replica, SPACE)
    near = [row.arch for row in made.offers if 0.8 * limit(made.net) <= row.flops <= limit(made.net)]
    return fine_tuned(replica, made, random.Random(replica.seed).choice(sorted(near)))


def compact(replica: Replica) -> Solution:
    """A super-network of the small students alone, for half the steps: the other half is for one of the large."""
    made = distilled(replica, SMALL, STEPS // 2)
    return fine_tuned(replica, made, made.offers[0].arch, small=of_small(made))


def trusted(replica: Replica) -> Solution:
    """How well losses under shared weights rank eight students that were each distilled alone."""
    from scipy.stats import spearmanr

    archs, held_out = (*BY_HAND.values(), *OTHERS), replica.split.notes["held_out"]
    shared = distilled(replica, SPACE).net.losses(archs, held_out)
    single = [alone(replica, arch).offers[0].loss for arch in archs]
    best = archs[min(range(len(archs)), key=single.__getitem__)]
    return fine_tuned(replica, alone(replica, best), best, trust=float(spearmanr(shared, single).statistic))


# --- the task -------------------------------------------------------------------------------------------------------


def _claim(text: str, measure: str, other: str, **more: Any) -> Claim:
    return Claim(text=text, problem=NAME, measure=measure, other=other, **{"relation": "at most", **more})


def _entry(name: str, title: str, solve: Callable[[Replica], Solution], note: str = "", *claims: Claim) -> Entry:
    kind: dict[str, Any] = {"kind": "baseline", "problems": (NAME,), "claims": claims}
    return Entry(name=name, title=title, solve=solve, note=note, **kind)


CLAIMS = (
    *(
        _claim(f"At equal operations, the searched student {text} than the {name} one drawn by hand.", measure, name)
        for name in BY_HAND
        for measure, text in (("error", "errs no more"), ("relation", "has no larger relation loss"))
    ),
    _claim("It beats the same labels without distillation.", "error", "plain"),
)
CHOSEN = (
    _claim("What search chooses has no larger relation loss than a random one of its size.", "relation", "by_chance"),
    _claim("And errs no more.", "error", "by_chance"),
)
COMPACT = _claim(
    "A compact space is better for the small: 5% less relation loss than in one wide space.",
    "small",
    "super_network",
    factor=0.95,
    source="section 3",
)
TRUST = _claim(
    "Losses under shared weights rank students as training each alone does: rho at least 0.5.",
    "trust",
    "trusted",
    relation="at least",
    factor=0.0,
    margin=0.5,
)
ALONE = tuple(
    _claim(f"Distilled alone, the shape that was found errs no more than the {name} one.", "error", name)
    for name in BY_HAND
)


def one_cycle(optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    """Up to 0.002 and down."""
    return OneCycleLR(optimizer, RATE, total_steps=steps)


TASK = Task(
    name=NAME,
    text="A BERT of 4 layers teaches students of a quarter of its operations on captions; 24 of them have labels.",
    split=split,
    build=lambda: new_bert(BY_HAND["middle"]),
    steps=40,
    batch_size=32,
    scheduler=one_cycle,
    target=5.0,
    teacher=teacher,
    measures={
        "relation": Measure(
            title="relation loss",
            better="low",
            digits=3,
            line="Of the student's last attention from its teacher's on test captions, before fine-tuning.",
        ),
        "small": Measure(
            title="of the small",
            better="low",
            digits=3,
            line="Mean relation loss on held-out captions of the 18 smallest sub-networks.",
        ),
        "trust": Measure(
            title="rho",
            better="high",
            digits=2,
            line="Spearman correlation, over 8 students, of relation losses under shared weights and alone.",
        ),
    },
    baselines=(
        *(
            _entry(name, f"by hand, {name}", by_hand(name), f"{arch.layers} layers of width {arch.hidden}, alone")
            for name, arch in BY_HAND.items()
        ),
        _entry("searched_alone", "the shape found, alone", searched_alone, "distilled alone like the others", *ALONE),
        _entry("super_network", "cut from it as it is", super_network, "not trained on alone", *CHOSEN),
        _entry("by_chance", "a random sub-network", by_chance, "of 80 to 100% of the operations allowed"),
        _entry("compact", "compact space of the small", compact, "its own best student, of half the steps", COMPACT),
        _entry("trusted", "best of 8, each alone", trusted, "of any size", TRUST),
    ),
)
