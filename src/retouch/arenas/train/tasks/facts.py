"""A small language model learns facts on people: how sure are its answers from epoch to epoch?"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from retouch.arenas.contest import Entry, Measure
from retouch.arenas.train import Replica, Solution, Split, Task
from retouch.core import seeds
from retouch.core.batches import in_order
from retouch.core.features import capture
from retouch.core.loop import Callback, Run
from retouch.core.models import forward, mode, unpack
from retouch.core.objectives import next_token
from retouch.train.send import SensitivityDropout, blocks_of, eigenscore, sentence_embedding
from retouch.worlds import text
from retouch.worlds.text import facts
from retouch.worlds.text.samples import Sample

PEOPLE, EPOCHS, BATCH = 24, 12, 16
EPOCH = 38  # steps: 25 wordings of statements and questions for each person
ANSWERS = 10  # sampled to each question


@functools.cache
def lessons() -> tuple[list[Sample], list[Sample], list[Sample]]:
    """What is learned (questions and statements), what is watched, and what is asked."""
    base = facts.KnowledgeBase()
    known = base.facts(base.known[:PEOPLE])
    learned = base.questions("train", known) + base.statements("train", known)
    return learned, base.questions("validation", known)[::3], base.questions("test", known)


def split(seed: int, search: bool) -> Split:
    """The same facts for all; a search asks in the validation's wordings."""
    learned, tracking, asked = lessons()
    asked = tracking if search else asked
    notes = {"asked": asked, "tracking": text.encode(tracking)}
    return Split(train=text.encode(learned), test=text.encode(asked), notes=notes)


def build() -> nn.Module:
    """A Llama of four layers of 64."""
    from retouch.worlds.text.models import new_llama

    return new_llama(width=64, layers=4)


def error(model: nn.Module, split: Split) -> float:
    """Facts answered wrongly, in percent."""
    asked = split.notes["asked"]
    answers = text.generate(model, [sample.prompt for sample in asked], max_new_tokens=6)
    return 100.0 - 100.0 * sum(s.check(answer) for s, answer in zip(asked, answers, strict=True)) / len(asked)


def judge(model: nn.Module, split: Split) -> dict[str, float]:
    """Facts answered wrongly, and how different ten sampled answers are."""
    return {"error": error(model, split), "eigenscore": mean_eigenscore(model, split.notes["asked"][:30], seed=0)}


@torch.no_grad()
def mean_eigenscore(model: nn.Module, asked: Sequence[Sample], *, seed: int) -> float:
    """Mean EigenScore over questions, of the penultimate layer's embeddings of ten sampled answers."""
    prompts = [sample.prompt for sample in asked for _ in range(ANSWERS)]
    draw = seeds.generator(seed, "answers")
    settings: dict[str, Any] = {"temperature": 0.5, "top_k": 5, "top_p": 0.99, "max_new_tokens": 6}
    answers = text.generate(model, prompts, generator=draw, **settings)
    texts = text.encode([Sample(p, a, "facts", None) for p, a in zip(prompts, answers, strict=True)])  # type: ignore[arg-type]
    name, blocks = blocks_of(model)
    layer, rows = f"{name}.{len(blocks) - 2}", []
    with mode(model, training=False), capture(model, [layer]) as seen:
        for batch in in_order(texts):
            inputs = unpack(batch)[0]
            forward(model, inputs)
            rows.append(sentence_embedding(seen[layer], inputs["attention_mask"]))
    embeddings = torch.cat(rows).view(len(asked), ANSWERS, -1)
    return float(torch.stack([eigenscore(one) for one in embeddings]).mean())


class Wavering(Callback):
    """The mean EigenScore after every epoch."""

    def __init__(self, split: Split) -> None:
        self.asked, self.scores = split.notes["asked"][:15], list[float]()

    def on_step(self, run: Run) -> None:
        if run.step % EPOCH == 0:
            with seeds.isolated():
                self.scores.append(mean_eigenscore(run.module, self.asked, seed=run.step))

    def measures(self, model: nn.Module) -> dict[str, float]:
        """Variance over the last half of the epochs."""
        later = self.scores[len(self.scores) // 2 :]
        return {"wavering": float(np.var(later)) if later else math.nan}


def train(replica: Replica, **settings: Any) -> Solution:
    """Train with sensitivity dropout of some settings, or without it if there are none."""
    wavering, model = Wavering(replica.split), replica.build()
    callbacks: list[Callback] = [wavering]
    if settings:
        send = SensitivityDropout(model, tracking=replica.split.notes["tracking"], **settings)
        callbacks.insert(0, send)
        return replica.train(
            model, callbacks=callbacks, own=wavering.measures, finish=lambda model: _closed(model, send)
        )
    return replica.train(model, callbacks=callbacks, own=wavering.measures)


def _closed(model: nn.Module, send: SensitivityDropout) -> nn.Module:
    send.close()
    return model


def normal(replica: Replica) -> Solution:
    """Training as usual, with its wavering measured."""
    return train(replica)


def random(replica: Replica) -> Solution:
    """As many random indices are dropped."""
    return train(replica, random_seed=replica.seed)


TASK = Task(
    name="facts",
    text=f"A Llama of 4 layers learns the facts on {PEOPLE} people, {EPOCHS} epochs; it is asked in other words.",
    split=split,
    build=build,
    steps=EPOCHS * EPOCH,
    batch_size=BATCH,
    objective=next_token,
    optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=2e-3),
    error=error,
    judge=judge,
    target=50.0,
    order="error",
    measures={
        "eigenscore": Measure(
            title="EigenScore", better="low", digits=2, line="How different ten sampled answers to a question are."
        ),
        "wavering": Measure(
            title="wavering",
            better="low",
            digits=3,
            line="Variance of the EigenScore over the later half of the epochs.",
        ),
    },
    baselines=(
        Entry(name="normal", title="without dropping", kind="baseline", solve=normal, problems=("facts",)),
        Entry(name="random_indices", title="random indices", kind="baseline", solve=random, problems=("facts",)),
    ),
)
