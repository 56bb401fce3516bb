"""Text with exact oracles: facts on people, instructions on words and sums of several steps, and two models.

    samples("test", "arithmetic")    prompts, answers and their meaning; `sample.check(answer)` is the oracle
    data("train")                    the same as tokens, ready for `core.objectives.next_token`
    claims("test"), judged("test")   true and false statements and equations, and the same as tokens
    train("llama", ...)              800 thousand weights, a transformers LlamaForCausalLM; `generate` lets it answer
    train("encoder", ...)            465 thousand weights, a BertForSequenceClassification of true and false facts

Everything is drawn from seeds, and each part has a file: `facts` (knowledge bases of any size, four answer styles),
`instructions`, `arithmetic` (traces and a solver that errs at a known rate), `sequences` (classification of varying
difficulty), `tokens` (the tokenizer). What the splits hold out differs: facts are the same in all splits, and asked in
wordings that training has not; instructions, problems and equations are others. The models know the first 64 people of
`facts.KnowledgeBase()`; the people after them are new to them. `build` trains both and records beside the weights what
share of the answers the oracles find right.
"""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from retouch.core.batches import in_order
from retouch.core.checkpoints import load_model, save_model
from retouch.core.data import TensorData, labels_of, subset
from retouch.core.errors import one_of
from retouch.core.metrics.unlearning import accuracy
from retouch.core.models import predict
from retouch.worlds import WEIGHTS
from retouch.worlds.text import arithmetic, facts, instructions
from retouch.worlds.text.models import RECIPES, generate
from retouch.worlds.text.samples import SPLITS, Claim, Sample
from retouch.worlds.text.tokens import encode, encode_texts, tokenizer

KIND = "text"
MODELS = ("llama", "encoder")
VARIANTS = MODELS
QUICK = ()  # none can be trained again in seconds
TASKS = ("facts", "instructions", "arithmetic")
COUNTS = {"train": 18_000, "validation": 500, "test": 500}  # instructions, and problems


def samples(
    split: str = "train", tasks: str | Sequence[str] = TASKS, *, count: int | None = None, seed: int = 0
) -> list[Sample]:
    """What the language model learns or is measured by.

    Args:
        split: "train", "validation" or "test".
        tasks: one or several of `TASKS`, in this order.
        count: of instructions and of problems; `COUNTS` if None. Facts are all there are: statements and questions in
            training, questions elsewhere.
        seed: of the draws; the facts are those of `facts.KnowledgeBase()` whatever the seed.
    """
    one_of("split", split, SPLITS)
    found, number = list[Sample](), COUNTS[split] if count is None else count
    for task in (tasks,) if isinstance(tasks, str) else tasks:
        one_of("task", task, TASKS)
        if task == "facts":
            found += _on_facts(split, seed)
        elif task == "instructions":
            found += instructions.samples(instructions.instructions(number, split, seed=seed))
        else:
            problems = arithmetic.problems(number, split, seed=seed)
            found += arithmetic.samples([arithmetic.solve(problem) for problem in problems])
    return found


def _on_facts(split: str, seed: int) -> list[Sample]:
    """Questions on known people; in training with statements, and often in the styles that are hard to learn."""
    known = facts.KnowledgeBase()
    if split != "train":
        return known.questions(split, styles=tuple(facts.STYLES), seed=seed)
    found = 2 * known.statements(split) + known.questions(split, styles=("short", "sentence"), repeats=2, seed=seed)
    return found + known.questions(split, styles=("yes_no", "choice"), repeats=8, seed=seed)


def data(
    split: str = "train", tasks: str | Sequence[str] = TASKS, *, count: int | None = None, seed: int = 0
) -> TensorData:
    """`samples` as tokens, in the same order: see `tokens.encode`."""
    return encode(samples(split, tasks, count=count, seed=seed))


def claims(
    split: str = "train",
    tasks: str | Sequence[str] = ("facts", "arithmetic"),
    *,
    count: int | None = None,
    seed: int = 0,
) -> list[Claim]:
    """Statements and equations, half of them true.

    Args:
        split: "train", "validation" or "test".
        tasks: "facts", "arithmetic" or both.
        count: of equations; `COUNTS` if None.
        seed: of the draws.
    """
    one_of("split", split, SPLITS)
    found, number = list[Claim](), COUNTS[split] if count is None else count
    for task in (tasks,) if isinstance(tasks, str) else tasks:
        one_of("task", task, ("facts", "arithmetic"))
        if task == "facts":
            found += facts.KnowledgeBase().claims(split, repeats=15 if split == "train" else 1, seed=seed)
        else:
            found += arithmetic.claims(number, split, seed=seed)
    return found


def judged(
    split: str = "train",
    tasks: str | Sequence[str] = ("facts", "arithmetic"),
    *,
    count: int | None = None,
    seed: int = 0,
) -> TensorData:
    """`claims` as tokens, in the same order; the label is 1 for true ones."""
    found = claims(split, tasks, count=count, seed=seed)
    return encode_texts([claim.text for claim in found], torch.tensor([int(claim.true) for claim in found]))


def train(variant: str, samples: TensorData, *, seed: int, checkpoint: str | Path | None = None) -> nn.Module:
    """A model trained from scratch by the world's recipe.

    Args:
        variant: one of `MODELS`.
        samples: such as `data()` for "llama" and `judged(tasks="facts")` for "encoder".
        seed: of weights and order.
        checkpoint: folder from which a run that was stopped goes on.
    """
    one_of("variant", variant, MODELS)
    return RECIPES[variant].train(samples, seed=seed, checkpoint=checkpoint)


def reference(variant: str = "llama") -> nn.Module:
    """The shipped model, in eval mode; `quality(variant)` says how good it is."""
    one_of("variant", variant, VARIANTS)
    return load_model(WEIGHTS / f"text-{variant}")


def quality(variant: str) -> dict[str, float]:
    """Recorded share of right answers of the shipped model, in percent."""
    return json.loads((WEIGHTS / f"text-{variant}" / "quality.json").read_text())


def score(model: nn.Module, asked: Sequence[Sample]) -> float:
    """Share of samples that a language model answers right, in percent, taking the likeliest token each time."""
    answers = generate(model, [sample.prompt for sample in asked])
    right = [sample.check(answer) for sample, answer in zip(asked, answers, strict=True)]
    return round(100 * sum(right) / len(right), 2)


def measure_answers(model: nn.Module, split: str = "test", *, count: int | None = None) -> dict[str, float]:
    """Share of right answers of a language model on what a split holds out, in percent.

    Args:
        model: transformers causal language model.
        split: "validation" or "test".
        count: of samples each; all if None.

    Returns:
        Of questions on facts by answer style, of instructions, and of arithmetic (the final answer).
    """
    asked = {style: facts.KnowledgeBase().questions(split, styles=(style,)) for style in facts.STYLES}
    asked |= {task: samples(split, task) for task in ("instructions", "arithmetic")}
    return {name: score(model, some[:count]) for name, some in asked.items()}


def measure_judgements(
    model: nn.Module, split: str = "test", tasks: Sequence[str] = ("facts",), *, count: int | None = None
) -> dict[str, float]:
    """Share of claims that a classifier judges right on what a split holds out, in percent, by task.

    Args:
        model: classifier of claims; class 1 is true.
        split: "validation" or "test".
        tasks: of "facts", which is what the reference model learns, and "arithmetic".
        count: of claims each; all if None.
    """
    found = {task: subset(part, range(len(part))[:count]) for task in tasks for part in [judged(split, task)]}
    return {task: round(accuracy(predict(model, in_order(part)), labels_of(part)), 2) for task, part in found.items()}


MEASURES = {"llama": measure_answers, "encoder": measure_judgements}
MATERIAL: dict[str, Callable[..., TensorData]] = {"llama": data, "encoder": functools.partial(judged, tasks="facts")}


def build(folder: Path = WEIGHTS, *, seed: int = 0, checkpoint: Path | None = None) -> None:
    """Train the reference models and write them with their tokenizer and their measured quality.

    Args:
        folder: takes a folder a model.
        seed: of data, weights and orders.
        checkpoint: folder from which a run that was stopped goes on.
    """
    for variant in MODELS:
        model = train(
            variant, MATERIAL[variant]("train", seed=seed), seed=seed, checkpoint=checkpoint and checkpoint / variant
        )
        target = folder / f"text-{variant}"
        target.mkdir(parents=True, exist_ok=True)
        save_model(model, target)
        tokenizer().save_pretrained(target)
        (target / "quality.json").write_text(json.dumps(MEASURES[variant](model), indent=1) + "\n")
