"""A solver's right and wrong reasoning traces teach a small Llama to compute, in two offline stages.

Small-scale study of REDI. The solver often computes from left to right where a product is due, and slips at random;
"right" is exact. Like a base model, the student is pre-trained on many traces that nobody checked, and so shares the
first mistake. Traces of few problems are checked: stage 1 is SFT on the right ones (the row of the teacher is that
model), and stage 2 goes on from it, each entry with a loss of its own. Plain training spends all steps on the few right
traces. Two baselines have a better teacher instead, the reference language model of the text world.

The set-up is one of about eight that were tried, on a seed that no evidence uses, for one in which negatives can help.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retouch.arenas.contest import Claim, Entry, Measure
from retouch.arenas.distill import Replica, Solution, Split, Task
from retouch.core import seeds
from retouch.core.data import TensorData
from retouch.core.distillation import Answer, Distillation
from retouch.core.models import Batch, mode
from retouch.core.objectives import next_token
from retouch.core.schedules import warm_up_then_down
from retouch.core.teachers import Teacher
from retouch.distill.redi import REDI, Trace, build_pairs, encode, pair_logps
from retouch.worlds.text import arithmetic, reference
from retouch.worlds.text.models import ByLength, generate, new_llama
from retouch.worlds.text.tokens import tokenizer

NAME = "traces"
WORLD: dict[str, Any] = {"steps": (2, 3), "largest": 5, "limit": 9, "signs": ("+", "*")}
LEARNED, VERIFIED, TESTED, WATCHED = 3000, 300, 500, 100  # problems
BASE, FIRST, SECOND = 400, 20, 40  # steps of the stages
LOW, HIGH = 3e-5, 1e-4  # learning rates of stage 2
ATTEMPTS, RATE = 4, 0.7  # of the solver's errors, where one can be made

# --- data -----------------------------------------------------------------------------------------------------------


def solved(problems: Sequence[arithmetic.Problem], seed: int, errors: Sequence[str] = ("order", "slip")) -> list[Trace]:
    """Attempts of a solver that errs, half of them in each way."""
    answers = [
        arithmetic.solve(problem, rate=RATE, error=error, seed=seeds.derive(seed, error, attempt))
        for error in errors
        for attempt in range(ATTEMPTS // len(errors))
        for problem in problems
    ]
    return [Trace(answer.problem.prompt, answer.text, answer.right) for answer in dict.fromkeys(answers)]


def split(seed: int, search: bool) -> Split:
    """Right traces to train on, pairs in the notes, and held-out problems."""
    words = tokenizer()
    held_out = "validation" if search else "test"
    learned = arithmetic.problems(LEARNED, seed=seed, **WORLD)
    asked = arithmetic.problems(TESTED, held_out, seed=seed, **WORLD)
    few = learned[:VERIFIED]
    right, pairs = build_pairs(solved(few, seed))
    left_to_right = [arithmetic.solve(problem, rate=1.0, error="order") for problem in asked]
    notes = {
        "tempting": [trace.problem for trace in left_to_right if not trace.right],
        "unverified": encode(words, [(trace.prompt, trace.text) for trace in solved(learned, seed, ("order",))]),
        "pairs": encode(words, pairs),
        "slips": encode(words, build_pairs(solved(few, seed, ("slip",)))[1]),
        "held_out": encode(words, build_pairs(solved(asked, seed))[1]),
    }
    return Split(train=encode(words, right), test=asked, notes=notes)


# --- measures -------------------------------------------------------------------------------------------------------


def error(model: nn.Module, split: Split, *, count: int = WATCHED) -> float:
    """Held-out problems whose final answer is wrong, in percent, taking the likeliest token each time."""
    asked = split.test[:count]
    answers = generate(model, [problem.prompt for problem in asked], max_new_tokens=40)
    right = sum(problem.check(answer) for problem, answer in zip(asked, answers, strict=True))
    return 100 - 100 * right / len(asked)


@torch.no_grad()
def judge(model: nn.Module, split: Split) -> dict[str, float]:
    """The same over all problems, and what the model thinks of held-out right and wrong traces, in nats a token."""
    with mode(model, training=False):
        (chosen, rejected), (ours, theirs) = pair_logps(model, split.notes["held_out"].inputs)
    means = float((chosen / ours).mean()), float((rejected / theirs).mean())
    return {
        "error": error(model, split, count=TESTED),
        "misled": error(model, replace(split, test=split.notes["tempting"])),
        "chosen": means[0],
        "rejected": means[1],
        "margin": means[0] - means[1],
    }


def collapsed(solution: Solution) -> Solution:
    """The same solution, with how much worse it was at its end than at its best."""
    watched = [error for _, _, error in solution.curve]
    own = {"collapse": 100.0 * (watched[-1] - min(watched) > 10)}
    return Solution(solution.model, solution.curve, solution.step_seconds, own)


# --- stages ---------------------------------------------------------------------------------------------------------


def adamw(rate: float) -> Callable[[Any], torch.optim.Optimizer]:
    """The paper's optimizer."""
    return lambda parameters: torch.optim.AdamW(parameters, lr=rate, weight_decay=1e-4)


def first(replica: Replica) -> nn.Module:
    """Pre-training on the solver's traces as they are, then stage 1: SFT on the right ones."""
    model = replica.train(data=ByLength(replica.split.notes["unverified"], 64, seed=replica.seed), steps=BASE).model
    right = ByLength(replica.split.train, 64, seed=replica.seed)
    return replica.train(model, right, optimizer=adamw(5e-4), steps=FIRST).model


def second(replica: Replica, objective: Any, *, data: Any = None, rate: float = HIGH) -> Solution:
    """Stage 2: go on with another loss."""
    model = copy.deepcopy(replica.teacher.model).requires_grad_(True)
    data = replica.split.notes["pairs"] if data is None else data
    return collapsed(replica.train(model, data, objective, optimizer=adamw(rate), steps=SECOND))


# --- what REDI is compared with -------------------------------------------------------------------------------------


class DPO:
    """-log sigmoid(beta (log pi/ref of the right trace - that of the wrong one)), from summed log-probabilities.

    Args:
        reference: model before stage 2, frozen.
        beta: its scale.
    """

    def __init__(self, reference: nn.Module, *, beta: float = 0.1) -> None:
        self.reference, self.beta = Teacher(reference), beta

    def __call__(self, model: nn.Module, batch: Batch, run: Any = None) -> Tensor:
        """The mean over pairs."""
        (chosen, rejected), _ = pair_logps(model, batch)
        (before, before_rejected), _ = pair_logps(self.reference, batch)
        return -F.logsigmoid(self.beta * (chosen - before - rejected + before_rejected)).mean()


def simpo(model: nn.Module, batch: Batch, run: Any = None, *, beta: float = 2.0, gamma: float = 1.0) -> Tensor:
    """-log sigmoid(beta (difference of mean log-probabilities a token) - gamma)."""
    (chosen, rejected), (ours, theirs) = pair_logps(model, batch)
    return -F.logsigmoid(beta * (chosen / ours - rejected / theirs) - gamma).mean()


def forward_kl(student: Answer, teacher: Answer, labels: Tensor | None) -> Tensor:
    """KL(teacher || student) at the tokens of right traces."""
    q, p = told(student, labels), told(teacher, labels)
    return F.kl_div(q, p, log_target=True, reduction="batchmean")


def reverse_kl(student: Answer, teacher: Answer, labels: Tensor | None) -> Tensor:
    """KL(student || teacher) at the same tokens."""
    q, p = told(student, labels), told(teacher, labels)
    return F.kl_div(p, q, log_target=True, reduction="batchmean")


def told(answer: Answer, labels: Tensor | None) -> Tensor:
    """Log-probabilities (tokens, vocabulary) at the positions that predict a label."""
    assert labels is not None
    return answer.logits[:, :-1][labels[:, 1:] != -100].log_softmax(-1)


def by_kl(replica: Replica, *, loss: Callable[..., Tensor], rate: float) -> Solution:
    """Go on from stage 1 with a better teacher's distributions, on the right traces of the pairs."""
    pairs: Any = replica.split.notes["pairs"].inputs
    inputs = {name: pairs[f"chosen_{name}"] for name in ("input_ids", "attention_mask")}
    data = TensorData(inputs, pairs["chosen_labels"])
    return second(replica, Distillation(reference("llama"), loss), data=data, rate=rate)


def robust() -> tuple[Claim, ...]:
    """At a high learning rate a weight below 1 holds what the symmetric loss loses."""

    def claim(text: str, measure: str, relation: str) -> Claim:
        source = "study of alpha and the learning rate"
        return Claim(text=text, problem=NAME, measure=measure, other="symmetric", relation=relation, source=source)

    return (
        claim(
            "At the high rate, alpha 0.8 keeps right traces likelier than the symmetric loss does.",
            "chosen",
            "at least",
        ),
        claim("At the high rate, alpha 0.8 collapses in no more runs.", "collapse", "at most"),
        claim("At the high rate, alpha 0.8 makes fewer errors than the symmetric loss.", "error", "at most"),
    )


def arms() -> tuple[Entry, ...]:
    """All stages 2 besides REDI."""

    def weighted(replica: Replica, *, alpha: float, rate: float, data: str = "pairs") -> Solution:
        return second(replica, REDI(alpha=alpha), data=replica.split.notes[data], rate=rate)

    def dpo(replica: Replica, *, rate: float) -> Solution:
        return second(replica, DPO(replica.teacher.model), rate=rate)

    def margins(replica: Replica, *, rate: float) -> Solution:
        return second(replica, simpo, rate=rate)

    def entry(
        name: str, title: str, solve: Callable[..., Solution], note: str = "", claims: Any = (), **settings: Any
    ) -> Entry:
        return Entry(
            name=name,
            title=title,
            kind="baseline",
            solve=functools.partial(solve, **settings),
            grid={"rate": RATES},
            claims=claims,
            problems=(NAME,),
            note=note,
        )

    return (
        entry("positives", "SFT on positives", weighted, "alpha = 0", alpha=0.0, rate=HIGH),
        entry("positives_low", "SFT on positives, low rate", weighted, "alpha = 0", alpha=0.0, rate=LOW),
        entry("symmetric", "symmetric", weighted, "alpha = 1", alpha=1.0, rate=HIGH),
        entry("symmetric_low", "symmetric, low rate", weighted, "alpha = 1", alpha=1.0, rate=LOW),
        entry("redi_high", "REDI, high rate", weighted, claims=robust(), alpha=0.8, rate=HIGH),
        entry("redi_slips", "REDI, random slips", weighted, "errors are random", alpha=0.8, rate=LOW, data="slips"),
        entry("dpo", "DPO", dpo, "beta 0.1", rate=LOW),
        entry("simpo", "SimPO", margins, "beta 2, gamma 1", rate=LOW),
        entry("traces_forward_kl", "forward KL", by_kl, "has a better teacher", loss=forward_kl, rate=HIGH),
        entry("traces_reverse_kl", "reverse KL", by_kl, "has a better teacher", loss=reverse_kl, rate=HIGH),
    )


RATES = (1e-5, 3e-5, 1e-4, 3e-4)

TASK = Task(
    name=NAME,
    text="A solver's right and wrong traces of sums teach a small Llama after SFT on the right ones.",
    split=split,
    build=lambda: new_llama(width=64, layers=2),
    steps=BASE + FIRST + SECOND,
    batch_size=32,
    optimizer=adamw(4e-3),
    scheduler=warm_up_then_down(0.1),
    objective=next_token,
    error=error,
    judge=judge,
    target=20.0,
    teacher=first,
    measures={
        "misled": Measure(
            title="error, precedence",
            unit="%",
            better="low",
            line="Problems answered wrongly, of those where a product is due and not leftmost.",
        ),
        "chosen": Measure(
            title="right traces", unit="nats", better="high", digits=3, line="Mean log-probability a token, held out."
        ),
        "rejected": Measure(
            title="wrong traces", unit="nats", better="low", digits=3, line="Mean log-probability a token, held out."
        ),
        "margin": Measure(title="margin", unit="nats", better="high", digits=3, line="Right less wrong."),
        "collapse": Measure(
            title="collapsed", unit="%", better="low", digits=0, line="Runs that end 10 points below their best."
        ),
    },
    baselines=arms(),
)
