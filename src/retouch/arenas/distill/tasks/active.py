"""Which digits to label: a small CLIP that never says two of the ten teaches a student in rounds of ten labels.

Small-scale study of PCoreSet. The CLIP learns from pictures and captions in which most sevens are called one and most
nines four, so that it hardly ever predicts a seven or a nine: the structured bias that the paper speaks of.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retouch.arenas.contest import Claim, Entry, Measure, mean
from retouch.arenas.distill import Replica, Solution, Split, Task
from retouch.arenas.training import classification_error, classification_measures
from retouch.core import seeds
from retouch.core.data import TensorData, subset
from retouch.core.models import unpack
from retouch.distill.pcoreset import (
    ActiveKD,
    ClapTeacher,
    DualHeadStudent,
    PoolOutputs,
    Strategy,
    ZeroShotTeacher,
    k_center_greedy,
    one_per_class,
)
from retouch.worlds import digits

NAME = "active"
TAUGHT = 400  # digits that the teacher has seen; the other 800 are the pool
ROUNDS, QUERIES, STEPS = 5, 10, 150
CALLED, MISCALLED = {7: 1, 9: 4}, 0.7  # what captions call the two blind classes, and how often
TEMPLATES = 4  # ways to put a caption
START, END, FIRST_TEMPLATE, FIRST_WORD = 1, 2, 3, 3 + TEMPLATES


def captions(classes: Tensor) -> Tensor:
    """Every way to name each class, four tokens each: (n, templates, 4)."""
    words = FIRST_WORD + classes[:, None].expand(-1, TEMPLATES)
    ways = (FIRST_TEMPLATE + torch.arange(TEMPLATES)).expand_as(words)
    return torch.stack([torch.full_like(words, START), ways, words, torch.full_like(words, END)], -1)


def new_clip() -> nn.Module:
    """A transformers CLIPModel: a ViT of two layers for the digits, a transformer of one for the captions."""
    from transformers import CLIPConfig, CLIPModel

    shared = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    vision = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_hidden_layers": 2, **shared}
    text: dict[str, Any] = {"vocab_size": FIRST_WORD + 10, "max_position_embeddings": 4, "num_hidden_layers": 1}
    text |= {"bos_token_id": START, "eos_token_id": END, "pad_token_id": 0, **shared}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32))


def contrast(model: nn.Module, batch: Any, run: Any) -> Tensor:
    """CLIP's loss; pictures with the same word share it."""
    inputs, words = unpack(batch)
    pictures, texts = inputs["pixel_values"], inputs["input_ids"]
    ways = torch.randint(TEMPLATES, (len(texts),), generator=run.generator)
    scores = model(pixel_values=pictures, input_ids=texts[torch.arange(len(texts)), ways]).logits_per_image
    same = (words[:, None] == words).float()
    pairs = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(scores, pairs) + F.cross_entropy(scores.T, pairs)) / 2


def zero_shot(replica: Replica) -> nn.Module:
    """The teacher, trained on its own digits."""
    taught = replica.split.notes["taught"]
    said = taught.targets.clone()
    wrong = torch.rand(len(said), generator=seeds.generator(replica.seed, "miscalled")) < MISCALLED
    for digit, word in CALLED.items():
        said[(taught.targets == digit) & wrong] = word
    with seeds.isolated(seeds.derive(replica.seed, "teacher")):
        model = new_clip()
    data = TensorData({"pixel_values": taught.inputs, "input_ids": captions(said)}, said)
    rates: dict[str, Any] = {"optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=2e-3)}
    replica.train(model, data, contrast, steps=250, error=lambda _: 100.0, **rates)
    return ZeroShotTeacher(model.eval(), prompts())


def prompts() -> list[dict[str, Tensor]]:
    """All captions of each class."""
    return [{"input_ids": each} for each in captions(torch.arange(10))]


def few_shot(replica: Replica) -> nn.Module:
    """The same CLIP as a teacher that is fitted to the labels of every round."""
    zero: Any = replica.teacher.model
    return ClapTeacher(zero.clip.model, prompts())


def split(seed: int, search: bool) -> Split:
    """400 digits for the teacher, 800 to choose from; plain training has 60 random ones of them, labelled."""
    whole, order = digits.data("train"), torch.randperm(1200, generator=seeds.generator(seed))
    taught, pool = subset(whole, order[:TAUGHT]), subset(whole, order[TAUGHT:])
    initial = one_per_class(pool.targets, seed=seed)
    free = torch.ones(len(pool), dtype=torch.bool)
    free[initial] = False
    rest = free.nonzero()[:, 0][: ROUNDS * QUERIES]  # the pool is in random order
    test = digits.data("validation" if search else "test")
    notes = {"taught": taught, "pool": pool, "initial": initial}
    return Split(train=subset(pool, torch.cat([initial, rest])), test=test, notes=notes)


def body() -> nn.Sequential:
    """Two layers of 64."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())


def judge(model: nn.Module, split: Split) -> dict[str, float]:
    """Errors of a model; what has no rounds has the same one in all of them."""
    found = classification_measures(model, split)
    return {**found, "area": found["error"]}


def rounds(
    replica: Replica, strategy: str | Strategy, *, teacher: nn.Module | None = None, **settings: Any
) -> Solution:
    """Five rounds of ten labels, and a student of all sixty."""
    pool, parts = replica.split.notes["pool"], list[Solution]()

    def trainer(model: nn.Module, data: Any, objective: Any, **given: Any) -> None:
        steps, optimizer = given["steps"], given["optimizer"]
        parts.append(replica.train(model, data, objective, steps=steps, optimizer=optimizer, error=lambda _: 100.0))

    active = ActiveKD(
        replica.teacher if teacher is None else teacher,
        lambda: DualHeadStudent(body(), 64, 10),
        pool.inputs,
        lambda ids: pool.targets[ids],
        strategy,
        ROUNDS,
        QUERIES,
        initial=replica.split.notes["initial"],
        steps=STEPS,
        seed=seeds.derive(replica.seed, "rounds"),
        trainer=trainer,
        **settings,
    )
    found = list(active)
    students: list[nn.Module] = [*(one.student for one in found), active.train()]
    errors = [classification_error(student, replica.split) for student in students]
    asked = pool.targets[torch.cat([one.queried for one in found])]
    own = {
        "area": mean(errors[1:]),
        "first": errors[1],
        "blind": float(sum((asked == digit).sum() for digit in CALLED)),
        "radius": found[0].radius,
    }
    curve, steps, seconds = [], 0, 0.0
    for part, error in zip(parts, errors, strict=True):
        steps, seconds = steps + part.curve[-1][0], seconds + part.curve[-1][1]
        curve.append((steps, seconds, error))
    return Solution(students[-1], curve, seconds / steps, own)


def by_teacher(pool: PoolOutputs, labeled: PoolOutputs, queries: int) -> Tensor:
    """Cover the teacher's predictions instead of the student's."""
    ours, theirs = pool.teacher_logits.softmax(-1), labeled.teacher_logits.softmax(-1)
    return k_center_greedy(ours, theirs, num_queries=queries)


def _entry(name: str, title: str, solve: Callable[[Replica], Solution], note: str = "", *claims: Claim) -> Entry:
    return Entry(name=name, title=title, kind="baseline", solve=solve, problems=(NAME,), note=note, claims=claims)


def by(strategy: str | Strategy) -> Callable[[Replica], Solution]:
    """An entry that only chooses in another way."""
    return lambda replica: rounds(replica, strategy)


def adapted(strategy: str) -> Callable[[Replica], Solution]:
    """An entry with the few-shot teacher."""
    return lambda replica: rounds(replica, strategy, teacher=few_shot(replica))


FEW_SHOT = Claim(
    text="With a few-shot teacher too, PCoreSet beats random choice over all rounds.",
    problem=NAME,
    measure="area",
    other="query_random_clap",
    relation="at most",
    source="section 4",
)

TASK = Task(
    name=NAME,
    text="A CLIP that calls most sevens one and most nines four teaches a student of two heads; ten labels are given "
    "at the start and ten in each of five rounds. Plain training has sixty random labels and no teacher.",
    split=split,
    build=lambda: nn.Sequential(*body(), nn.Linear(64, 10)),
    steps=STEPS,
    judge=judge,
    target=15.0,
    teacher=zero_shot,
    order="area",
    measures={
        "area": Measure(
            title="mean error",
            unit="%",
            better="low",
            digits=2,
            line="Error after each of the five rounds, mean; at the end where there are no rounds.",
        ),
        "first": Measure(title="first round", unit="%", better="low", digits=2, line="Error after the first round."),
        "blind": Measure(
            title="blind classes", better="high", line="Of the 50 labels asked for, those of sevens and nines."
        ),
        "radius": Measure(
            title="covering radius",
            better="low",
            digits=3,
            line="Largest distance of a pool sample's prediction from a labelled one's after the first choice.",
        ),
    },
    baselines=(
        _entry("query_random", "random choice", by("random")),
        _entry("query_entropy", "entropy", by("entropy")),
        _entry("query_coreset", "feature core-set", by("coreset")),
        _entry("query_badge", "BADGE", by("badge")),
        _entry("query_balanced", "class-balanced", by("class_balanced")),
        _entry("query_teacher", "teacher's core-set", by(by_teacher), "covers the teacher's predictions"),
        _entry("query_random_clap", "random choice, few-shot", adapted("random"), "CLAP teacher"),
        _entry("pcoreset_clap", "PCoreSet, few-shot", adapted("pcoreset"), "CLAP teacher", FEW_SHOT),
    ),
)
