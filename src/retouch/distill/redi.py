"""REDI: reinforcement distillation, a student learns from a teacher's wrong reasoning traces besides its right ones.

For a problem x with a right trace y_w and a wrong one y_l, in two offline stages:

    stage 1   SFT on all right traces:   -log pi(y_w | x)
    stage 2   -c log pi(y_w | x) / |y_w|  +  alpha log pi(y_l | x) / |y_l|          c = 1, 0 <= alpha < 1

|y| counts a trace's tokens with the end token: every trace is averaged for itself, so that long wrong ones do not
dominate. alpha = 0 is SFT on the pairs' right traces; alpha = 1 is the symmetric loss, the limit of SimPO at beta -> 0.
No reference model, no sigmoid, no samples of the student.

Use it where a teacher's rejected traces are at hand and the student has already learned its right ones; negatives help
by the mistakes they share, so expect nothing of random slips. Not on a student that is still far off: the second term
has no lower bound, and pulls the right traces down with the wrong ones. What holds it is alpha < 1, a small learning
rate and one epoch. The loss falls during a collapse too, so do not stop by it: watch the right traces'
log-probability (`CollapseGuard`) and the task's accuracy.

Paper: arXiv 2505.24850. Code: Tim-Siu/reinforcement-distillation. Where they part: the code counts a trace's tokens
before it is cut to the longest length (here they are counted after, and what is too long raises), an empty trace warns
and counts as one token (here it raises), and fields for beta, label smoothing and a reference have no effect. In the
code alone is a factor exp(gate * mean log pi(y_l | x)) on the second term, off here by default. How the paper chooses
one wrong trace of several is not said; here it is the first.

Cost: one forward and backward of both traces, which is what DPO takes without its reference. Limits: causal language
models; the first stage must have learned the end token. The paper's learning rate of 1e-6 is for 1.5 billion weights
(and for alpha = 1 it is 2e-7); models of some hundred thousand bear 1e-5 to 1e-4. The paper leaves out pairs of prompts
above 800 or traces above 19,000 tokens; here no length is assumed, see `max_length`.
"""

import math
import random
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retouch.core import seeds
from retouch.core.cards import Card
from retouch.core.data import TensorData
from retouch.core.errors import InputError, in_range, one_of, positive
from retouch.core.loop import Callback, History, Run, fit
from retouch.core.models import Batch, forward, logits_of
from retouch.core.objectives import next_token
from retouch.core.schedules import warm_up_then_down

CARD = Card(
    title="REDI: reinforcement distillation",
    room="distill",
    paper="arXiv:2505.24850",
    shape="objective",
    line="Teaches a language model from a teacher's right and wrong reasoning traces, wrong ones at a lower weight.",
    tags=("language models", "reasoning", "preferences", "negative examples", "offline"),
    plugin="REDI",
)

IGNORED = -100  # a label that no loss counts
SIDES = ("chosen", "rejected")

# --- the loss -------------------------------------------------------------------------------------------------------


def sequence_logps(logits: Tensor, labels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each sequence's tokens under the mask, and how many they are.

    Args:
        logits: (batch, length, vocabulary), each position's of the label beside it: shifted by one already.
        labels: (batch, length) token ids; anything where the mask is off.
        mask: (batch, length), true or 1 at the tokens of the completion, its end token among them.

    Returns:
        (sum, count), each (batch,); in float32 at least, as half precision loses what tells two traces apart.

    Raises:
        InputError: if shapes do not fit, or a label under the mask is not in the vocabulary.
    """
    if logits.ndim != 3 or labels.shape != logits.shape[:2] or mask.shape != labels.shape:
        raise InputError(
            f"logits, labels and mask have shapes {tuple(logits.shape)}, {tuple(labels.shape)} and "
            f"{tuple(mask.shape)}, but must be (batch, length, vocabulary), (batch, length) and (batch, length)"
        )
    rows, columns = mask.bool().nonzero(as_tuple=True)
    wanted, vocabulary = labels[rows, columns], logits.shape[-1]
    if wanted.numel() and not (int(wanted.min()) >= 0 and int(wanted.max()) < vocabulary):
        low, high = int(wanted.min()), int(wanted.max())
        raise InputError(f"labels under the mask are {low} to {high}, but must be 0 to {vocabulary - 1}")
    scores = logits[rows, columns]  # completions alone: prompts and padding cost no softmax
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    logps = -F.cross_entropy(scores, wanted, reduction="none")
    return logps.new_zeros(len(logits)).index_add(0, rows, logps), mask.bool().sum(1)


def redi_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    alpha: float = 0.8,
    chosen_coef: float = 1.0,
    reduction: Literal["mean", "none"] = "mean",
    gate: float = 0.0,
) -> Tensor:
    """-c log pi(y_w) / |y_w| + alpha log pi(y_l) / |y_l|, per pair or in the mean.

    Args:
        chosen_logps: (pairs,) summed log-probabilities of right traces.
        rejected_logps: (pairs,) likewise of wrong ones.
        chosen_lengths: (pairs,) tokens of right traces, at least 1.
        rejected_lengths: (pairs,) likewise of wrong ones.
        alpha: weight of the wrong ones, 0 to 1.
        chosen_coef: c, weight of the right ones, >= 0.
        reduction: "mean" over pairs, or "none".
        gate: >= 0; the wrong traces' term is multiplied by exp(gate * its mean log-probability), with gradients
            through it. 0 is the paper, 1 the released code's option: what is unlikely already is pushed less.

    Raises:
        InputError: for alpha out of range, tensors of several shapes, or a trace without tokens.
    """
    in_range("alpha", alpha, 0, 1)
    in_range("chosen_coef", chosen_coef, 0)
    in_range("gate", gate, 0)
    one_of("reduction", reduction, ("mean", "none"))
    given = {
        "chosen_logps": chosen_logps,
        "rejected_logps": rejected_logps,
        "chosen_lengths": chosen_lengths,
        "rejected_lengths": rejected_lengths,
    }
    for name, value in given.items():
        if value.ndim != 1 or value.shape != chosen_logps.shape:
            raise InputError(
                f"{name} has shape {tuple(value.shape)}, but all must be (pairs,), as chosen_logps "
                f"{tuple(chosen_logps.shape)}"
            )
        if name.endswith("lengths") and value.numel() and int(value.min()) < 1:
            raise InputError(
                f"{name} holds {int(value.min())}, but must be at least 1: a completion has no token, or was cut off"
            )
    chosen, rejected = chosen_logps / chosen_lengths, rejected_logps / rejected_lengths
    if gate:
        rejected = rejected * (gate * rejected).exp()
    loss = alpha * rejected - chosen_coef * chosen
    return loss.mean() if reduction == "mean" else loss


# --- the data -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trace:
    """A teacher's answer to a problem.

    Attributes:
        prompt: the problem, as the student is asked.
        text: the reasoning and the answer.
        right: whether it is right, or what each of several verifiers says; it is right only if all agree.
    """

    prompt: str
    text: str
    right: bool | Sequence[bool]


class Pair(NamedTuple):
    """A preference triple."""

    prompt: str
    chosen: str
    rejected: str


def build_pairs(
    traces: Iterable[Trace], *, select: Literal["first", "random"] = "first", seed: int = 0
) -> tuple[list[tuple[str, str]], list[Pair]]:
    """The data of both stages.

    Args:
        traces: of any problems in any order.
        select: which of a problem's wrong traces becomes the rejected one.
        seed: of the choice at random.

    Returns:
        (sft, pairs): (prompt, text) of all right traces, and a `Pair` for each right trace of a problem that has a
        wrong one, in the order in which problems first appear.
    """
    one_of("select", select, ("first", "random"))
    found: dict[str, tuple[list[str], list[str]]] = {}
    for trace in traces:
        verdicts = list(trace.right) if isinstance(trace.right, Iterable) else [trace.right]
        if not verdicts:
            raise InputError(f"right is empty for the trace {trace.text!r}, but must have a verdict")
        found.setdefault(trace.prompt, ([], []))[0 if all(verdicts) else 1].append(trace.text)
    draw = random.Random(seeds.derive(seed, "select"))
    sft = [(prompt, text) for prompt, (right, _) in found.items() for text in right]
    pairs = []
    for prompt, (right, wrong) in found.items():
        if wrong:
            pairs += [Pair(prompt, text, wrong[0] if select == "first" else draw.choice(wrong)) for text in right]
    return sft, pairs


def encode(
    tokenizer: Any, examples: Sequence[tuple[str, ...]], *, max_length: int | None = None, side: str = "right"
) -> TensorData:
    """(prompt, completion) or (prompt, chosen, rejected) as tokens, ready for `next_token` or `REDI`.

    A completion is tokenised for itself and ends with the end token. Prompt and completion share no token, so that the
    prompt's are the same in both traces.

    Args:
        tokenizer: of transformers, with an end token.
        examples: n of one kind.
        max_length: largest number of tokens; no limit if None. Nothing is cut: filter what is longer.
        side: "right" or "left", where the padding is.

    Returns:
        Inputs "input_ids", "attention_mask" (n, t) and labels (n, t), -100 at prompts and padding; for pairs a mapping
        "chosen_input_ids", "chosen_attention_mask", "chosen_labels" and the same for "rejected".

    Raises:
        InputError: if there is no example, an example is too long or a completion is empty, or the tokenizer has no
            end token.
    """
    one_of("side", side, ("right", "left"))
    if not examples:
        raise InputError("examples is empty, but must have at least one")
    if tokenizer.eos_token_id is None:
        raise InputError("tokenizer has no end token, but traces must end with one")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    prompts = [tokenizer(example[0])["input_ids"] for example in examples]
    columns: dict[str, list[list[int]]] = {}
    kinds = SIDES if len(examples[0]) == 3 else ("",)
    for number, kind in enumerate(kinds, start=1):
        ids, mask, labels = (columns.setdefault(_name(kind, part), []) for part in PARTS)
        for prompt, example in zip(prompts, examples, strict=True):
            answer = tokenizer(example[number], add_special_tokens=False)["input_ids"]
            if not answer:
                raise InputError(f"The completion of {example[0]!r} has no token, but must have at least one")
            row = [*prompt, *answer, tokenizer.eos_token_id]
            if max_length is not None and len(row) > max_length:
                raise InputError(f"max_length is {max_length}, but {example[0]!r} and its trace have {len(row)} tokens")
            ids.append(row)
            mask.append([1] * len(row))
            labels.append([IGNORED] * len(prompt) + row[len(prompt) :])
    longest = max(len(row) for rows in columns.values() for row in rows)  # one length, so that both sides are one batch
    fill = {"input_ids": pad, "attention_mask": 0, "labels": IGNORED}
    tensors = {}
    for name, rows in columns.items():
        gaps = [[fill[name.removeprefix("chosen_").removeprefix("rejected_")]] * (longest - len(r)) for r in rows]
        tensors[name] = torch.tensor(
            [row + gap if side == "right" else gap + row for row, gap in zip(rows, gaps, strict=True)]
        )
    return TensorData(tensors) if len(kinds) == 2 else TensorData(tensors, tensors.pop("labels"))


PARTS = ("input_ids", "attention_mask", "labels")


def _name(kind: str, part: str) -> str:
    return f"{kind}_{part}" if kind else part


# --- in the loop ----------------------------------------------------------------------------------------------------


class REDI:
    """Objective for `fit` over pairs as `encode` gives them; both traces go through the model as one batch.

    Logs the mean log-probability a token of right and wrong traces, `chosen_logp` and `rejected_logp`, and their
    `margin`.

    Args:
        settings: of `redi_loss`.
    """

    def __init__(self, **settings: Any) -> None:
        empty = torch.ones(1)
        redi_loss(empty, empty, empty, empty, **settings)  # settings are refused here, not at the first step
        self.settings = settings

    def __call__(self, model: nn.Module, batch: Batch, run: Run | None = None) -> Tensor:
        """The mean loss over pairs."""
        (chosen, rejected), (ours, theirs) = pair_logps(model, batch)
        if run is not None:
            means = [float((logps / counts).detach().mean()) for logps, counts in ((chosen, ours), (rejected, theirs))]
            run.log(chosen_logp=means[0], rejected_logp=means[1], margin=means[0] - means[1])
        return redi_loss(chosen, rejected, ours, theirs, **self.settings)


def pair_logps(model: nn.Module, batch: Batch) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Summed log-probabilities of both traces, and their numbers of tokens: (chosen, rejected) each (pairs,).

    Args:
        model: causal language model.
        batch: mapping as `encode` gives it.
    """
    missing = [name for kind in SIDES for part in PARTS if (name := _name(kind, part)) not in batch]
    if missing:
        raise InputError(f"The batch has no {', '.join(missing)}, but must be of pairs, see redi.encode")
    ids, mask, labels = (torch.cat([batch[_name(kind, part)] for kind in SIDES]) for part in PARTS)
    seen = mask.any(0).nonzero()[:, 0]
    used = slice(int(seen[0]), int(seen[-1]) + 1)  # padding that the whole batch shares costs nothing
    ids, mask, labels = ids[:, used], mask[:, used], labels[:, used]
    inputs = {"input_ids": ids, "attention_mask": mask}
    if not mask[:, 0].all():  # padding on the left moves the positions
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    logits = logits_of(forward(model, inputs))[:, :-1]
    sums, counts = sequence_logps(logits, labels[:, 1:], labels[:, 1:] != IGNORED)
    half = len(ids) // 2
    return (sums[:half], sums[half:]), (counts[:half], counts[half:])


class CollapseGuard(Callback):
    """Warns once, or ends the run, when right traces have become less likely than they were.

    Args:
        drop: > 0; fall of `chosen_logp` below its start, in nats a token. Runs that go well lose some hundredths.
        window: steps that the start and the present are means over.
        action: "warn" or "stop".

    Attributes:
        start: mean over the first `window` steps; None before.
        collapsed: step at which the fall was seen; None so far.
    """

    def __init__(self, *, drop: float = 0.1, window: int = 10, action: Literal["warn", "stop"] = "warn") -> None:
        positive("drop", drop)
        positive("window", window)
        one_of("action", action, ("warn", "stop"))
        self.drop, self.window, self.action = drop, window, action
        self.start: float | None = None
        self.collapsed: int | None = None
        self.recent: list[float] = []

    def update(self, step: int, chosen_logp: float) -> bool:
        """Take a step's value, in a loop of your own; true from the step on at which it has collapsed."""
        self.recent = [*self.recent, chosen_logp][-self.window :]
        if len(self.recent) == self.window:
            now = sum(self.recent) / self.window
            self.start = now if self.start is None else self.start
            if self.collapsed is None and (now < self.start - self.drop or math.isnan(now)):
                self.collapsed = step
                text = (
                    f"The right traces' log-probability fell from {self.start:.3f} to {now:.3f} a token by step {step}"
                )
                warnings.warn(f"{text}: lower alpha or the learning rate", stacklevel=2)
        return self.collapsed is not None

    def on_step(self, run: Run) -> None:
        if not run.history.records:
            return  # a step's record is written after this event: what is seen is the step before
        last = run.history.records[-1]
        if "chosen_logp" not in last:
            raise InputError("The steps have no chosen_logp, but CollapseGuard needs what the objective REDI logs")
        if self.update(last["step"], last["chosen_logp"]) and self.action == "stop":
            run.stop()

    def state_dict(self) -> dict[str, Any]:
        return {"start": self.start, "collapsed": self.collapsed, "recent": self.recent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start, self.collapsed, self.recent = state["start"], state["collapsed"], list(state["recent"])


class GradientNorm(Callback):
    """Logs the norm of all gradients together as `grad_norm`; a surge is the other sign of a collapse."""

    def on_gradients(self, run: Run) -> None:
        found = [p.grad.detach().float().norm() for p in run.module.parameters() if p.grad is not None]
        run.log(grad_norm=float(torch.stack(found).norm()))


class REDITrainer:
    """Both stages, with the paper's optimizer: AdamW, weight decay 1e-4, 10% warm-up, then linearly to 0.

        sft, pairs = build_pairs(traces)
        trainer = REDITrainer(model, tokenizer, lr=1e-6)
        trainer.fit_sft(sft)
        history = trainer.fit_redi(pairs, callbacks=[CollapseGuard(action="stop")])

    Args:
        model: causal language model, trained in place.
        tokenizer_or_collate: a tokenizer, or a function from a list of examples to data for `fit`, as `encode` gives.
        alpha: as in `redi_loss`.
        lr: of stage 2.
        warmup_ratio: share of the steps, in both stages.
        sft_lr: of stage 1.
        weight_decay: of both.
        seed: of the orders of the data.
        max_length: as in `encode`.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer_or_collate: Any,
        alpha: float = 0.8,
        lr: float = 1e-6,
        warmup_ratio: float = 0.1,
        *,
        sft_lr: float = 5e-5,
        weight_decay: float = 1e-4,
        seed: int = 0,
        max_length: int | None = None,
    ) -> None:
        positive("lr", lr)
        positive("sft_lr", sft_lr)
        self.model, self.objective = model, REDI(alpha=alpha)
        self.lr, self.sft_lr, self.weight_decay, self.seed = lr, sft_lr, weight_decay, seed
        self.scheduler = warm_up_then_down(warmup_ratio)
        is_tokenizer = hasattr(tokenizer_or_collate, "eos_token_id")
        self.collate: Callable[[Sequence[Any]], Any] = (
            (lambda examples: encode(tokenizer_or_collate, examples, max_length=max_length))
            if is_tokenizer
            else tokenizer_or_collate
        )

    def fit_sft(
        self, d_sft: Sequence[tuple[str, str]], *, epochs: int = 3, batch_size: int = 128, **settings: Any
    ) -> History:
        """Stage 1: token cross entropy of completions. Settings are those of `core.loop.fit`."""
        return self._fit(d_sft, next_token, self.sft_lr, epochs, batch_size, settings)

    def fit_redi(
        self, d_pref: Sequence[tuple[str, str, str]], *, epochs: int = 1, batch_size: int = 32, **settings: Any
    ) -> History:
        """Stage 2, logging chosen_logp, rejected_logp, margin and grad_norm. Settings are those of `core.loop.fit`."""
        callbacks = [GradientNorm(), *settings.pop("callbacks", ())]
        return self._fit(d_pref, self.objective, self.lr, epochs, batch_size, {**settings, "callbacks": callbacks})

    def _fit(
        self, examples: Sequence[Any], objective: Any, lr: float, epochs: int, batch_size: int, settings: dict[str, Any]
    ) -> History:
        def optimizer(parameters: Any) -> torch.optim.Optimizer:
            return torch.optim.AdamW(parameters, lr=lr, weight_decay=self.weight_decay)

        length = {} if "steps" in settings else {"epochs": epochs}
        own: dict[str, Any] = {"optimizer": optimizer, "scheduler": self.scheduler, "seed": self.seed, **length}
        return fit(self.model, self.collate(examples), objective, batch_size=batch_size, **{**own, **settings})
