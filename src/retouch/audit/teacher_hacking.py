"""Teacher hacking: does a distilled language model near the truth, or only its teacher's mistakes?

    distance   D(p, q) = E_x E_{y ~ p(.|x)} sum_i KL(p(.|x, y_<i) || q(.|x, y_<i))        by the chain rule, in nats
    proxy      D(teacher, student)        golden   D(oracle, student)        both on validation prompts

The student hacks its teacher over a stretch of training where the proxy falls, or stays, and golden rises: a U in the
plane of the two. It comes with offline data, that is, the teacher's responses generated once and used in every epoch;
it fades with responses that are drawn anew, by the teacher or the student. Where generation is dear: rather more
prompts than more epochs or more responses each, and a share of online data.

`TeacherHackingMonitor` measures both along a run of `fit`, `ResponseSource` gives the data of each kind, and
`DistillationTrial` is the whole experiment with an oracle of your own. Without an oracle the proxy alone tells
something: with online data it follows a power law a n^-b, a line in log-log, and leaves it upwards under hacking
(`hacking_report`). That a curve leaves a line may have other reasons too, such as the student's capacity, a falling
learning rate or over-fitting, which the report tells apart: there the proxy on held-out prompts rises as well. A
student that begins closer to the oracle than its teacher is gets worse from step one whatever the data
(`starts_closer`).

Paper: arXiv 2502.02671 (abstract, figure captions and table of settings; no official code was found). The sign of the
deviation is the paper's; fitting the first points by least squares and asking for standardised residuals above 3 to
the end is this library's test, and so are the tolerances. `DistillationTrial` has no warm-up (the paper's is 100 of
390,625 steps): Adam's rate is 3e-4 from the first step on.

Cost: generation is most of online data; the monitor takes two forwards over its validation responses, which are drawn
once, at each of about 20 evaluations. Distances are Monte Carlo over responses and exact over the vocabulary.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retouch.core import seeds
from retouch.core.batches import Shuffled
from retouch.core.cards import Card
from retouch.core.data import TensorData, subset
from retouch.core.distillation import check_pair
from retouch.core.errors import InputError, in_range, one_of, positive
from retouch.core.loop import Callback, History, Run, fit
from retouch.core.models import Batch, device_of, mode, to_device
from retouch.core.teachers import Teacher

CARD = Card(
    title="Teacher hacking",
    room="audit",
    paper="arXiv:2502.02671",
    shape="callback",
    line="Tells during distillation whether a language model nears the truth or only its teacher's mistakes.",
    tags=("language models", "distillation", "over-optimisation", "on-policy data", "power law"),
    plugin="TeacherHackingMonitor",
)

Logits = Tensor | Callable[[Tensor], Tensor]  # (batch, time, vocabulary), each position's of the token beside it
KINDS = ("forward", "reverse", "js")

# --- distances ------------------------------------------------------------------------------------------------------


def token_divergence(
    teacher_logits: Tensor,
    student_logits: Tensor,
    *,
    kind: Literal["forward", "reverse", "js"] = "forward",
    beta: float = 0.5,
) -> Tensor:
    """Divergence of two next-token distributions at every position, (batch, time), in nats.

    Args:
        teacher_logits: (batch, time, vocabulary), p; no gradient goes into them.
        student_logits: likewise, q.
        kind: "forward" KL(p || q), "reverse" KL(q || p), or "js" beta KL(p || m) + (1 - beta) KL(q || m).
        beta: 0 to 1, of m = beta p + (1 - beta) q; 0.5 is the Jensen-Shannon divergence, and both ends give 0.

    Raises:
        InputError: for vocabularies or shapes that differ.
    """
    one_of("kind", kind, KINDS)
    in_range("beta", beta, 0, 1)
    check_pair(student_logits, teacher_logits)
    wide = torch.promote_types(student_logits.dtype, torch.float32)
    p, q = (logits.to(wide).log_softmax(-1) for logits in (teacher_logits.detach(), student_logits))
    if kind == "forward":
        return _kl(p, q)
    if kind == "reverse":
        return _kl(q, p)
    if beta in (0, 1):
        return 0 * _kl(p, q)
    m = torch.logaddexp(p + math.log(beta), q + math.log1p(-beta))
    return beta * _kl(p, m) + (1 - beta) * _kl(q, m)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return F.kl_div(q, p, log_target=True, reduction="none").sum(-1)


def sequence_divergence(
    p: Logits, q: Logits, tokens: Tensor, *, mask: Tensor, kind: str = "forward", beta: float = 0.5
) -> Tensor:
    """Divergence of two models along given responses, summed over time: (batch,), in nats.

    With responses drawn from p and the forward KL its mean is D(p, q). Over all responses, weighted with p(y), it is
    exact.

    Args:
        p: logits (batch, time, vocabulary), or a function of `tokens` that gives them; each position's are of the
            token beside it, given those before.
        q: likewise.
        tokens: responses (batch, time).
        mask: (batch, time), true or 1 at a response's tokens, its end token among them.
        kind: as in `token_divergence`.
        beta: likewise.
    """
    if mask.shape != tokens.shape or tokens.ndim != 2:
        raise InputError(
            f"mask has shape {tuple(mask.shape)}, but must be (batch, time), as tokens {tuple(tokens.shape)}"
        )
    if not mask.any():
        raise InputError("mask is empty, but must have at least one token")
    ours, theirs = (logits if isinstance(logits, Tensor) else logits(tokens) for logits in (q, p))
    found = token_divergence(theirs, ours, kind=kind, beta=beta)  # type: ignore[arg-type]
    if found.shape != mask.shape:
        raise InputError(
            f"logits are for {tuple(found.shape)} tokens, but must be for those of mask {tuple(mask.shape)}"
        )
    return found.masked_fill(~mask.bool(), 0).sum(1)


# --- what the curves say --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PowerLaw:
    """a n^-b, and the standard deviation of log residuals around it."""

    a: float
    b: float
    std: float

    def __call__(self, steps: Any) -> Tensor:
        """Its values."""
        return self.a * torch.as_tensor(steps, dtype=torch.float64) ** -self.b


def power_law_fit(steps: Any, values: Any) -> PowerLaw:
    """Least squares on log n and log J, which a power law makes a line.

    Args:
        steps: (n,), > 0 and increasing, at least two.
        values: (n,), > 0.
    """
    x, y = _curve("steps", steps), _curve("values", values)
    _increasing(x)
    if len(x) != len(y) or len(x) < 2:
        raise InputError(f"steps and values have {len(x)} and {len(y)} points, but must have as many, and at least 2")
    for name, numbers in (("steps", x), ("values", y)):
        positive(f"The least of {name}", float(numbers.min()))
    x, y = x.log(), y.log()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    start = y.mean() - slope * x.mean()
    residuals = y - start - slope * x
    return PowerLaw(float(start.exp()), -float(slope), float((residuals.square().sum() / max(1, len(x) - 2)).sqrt()))


def _curve(name: str, values: Any) -> Tensor:
    found = torch.as_tensor(values, dtype=torch.float64)
    if found.ndim != 1 or not torch.isfinite(found).all():
        raise InputError(f"{name} has shape {tuple(found.shape)} or holds no numbers, but must be finite numbers (n,)")
    return found


def _increasing(steps: Tensor) -> None:
    if (steps.diff() <= 0).any():
        raise InputError(f"steps are {[f'{s:g}' for s in steps.tolist()]}, but must increase")


@dataclass(frozen=True, kw_only=True)
class HackingReport:
    """What a run's curves say.

    Attributes:
        law: power law of the proxy over the early window.
        deviation: standardised log residual of the proxy at every step > 0; those after the window judge.
        onset: first step from which the proxy stays above the law to the end; None if it does not.
        turning: step of golden's least value, if golden rises after it; None if it does not, or is not known.
        rise: how much golden ends above its least value; NaN if it is not known.
        hacking: over a stretch after `turning` golden rose and the proxy did not.
        overfitting: the proxy on held-out prompts ends above its own least value.
        starts_closer: the student began closer to the oracle than the teacher is; None if that is not known.
    """

    law: PowerLaw
    deviation: tuple[float, ...]
    onset: int | None
    turning: int | None
    rise: float
    hacking: bool
    overfitting: bool
    starts_closer: bool | None = None


def hacking_report(
    proxy: Any,
    golden: Any = None,
    *,
    steps: Any,
    window: int,
    threshold: float = 3.0,
    tolerance: float = 0.02,
    floor: float = 0.01,
    persist: int = 3,
    teacher_golden: float | None = None,
) -> HackingReport:
    """Find the signs of teacher hacking in a run's curves.

    Args:
        proxy: (n,), distance to the teacher on validation prompts, > 0.
        golden: (n,), distance to the oracle; None without one.
        steps: (n,), increasing, from 0 on.
        window: number of first points (step 0 apart) that the power law is fitted to; at least 2.
        threshold: standardised residual that counts as a deviation.
        tolerance: share of its least value by which a curve must rise to count as rising.
        floor: smallest standard deviation of log residuals; a cleaner fit is not taken at its word.
        persist: points that a deviation must have at least.
        teacher_golden: D(oracle, teacher), to tell a student that began closer to the oracle.
    """
    x, j = _curve("steps", steps), _curve("proxy", proxy)
    _increasing(x)
    if len(j) != len(x) or float(x.min()) < 0:
        raise InputError(
            f"proxy has {len(j)} points and steps {len(x)} from {x.min():g}, but must be as many, from 0 on"
        )
    timed = x > 0
    in_range("window", window, 2, int(timed.sum()))
    law = power_law_fit(x[timed][:window], j[timed][:window])
    deviation = (j[timed].log() - law(x[timed]).log()) / max(law.std, floor)
    late = deviation[window:] > threshold
    calm = (~late).nonzero()[:, 0]
    first = int(calm[-1]) + 1 if len(calm) else 0
    onset = int(x[timed][window + first]) if len(late) - first >= persist else None
    turning, rise, hacking, closer = None, math.nan, False, None
    if golden is not None:
        g = _curve("golden", golden)
        if len(g) != len(x):
            raise InputError(f"golden has {len(g)} points, but must have as many as steps, {len(x)}")
        at = int(g.argmin())
        rise = float(g[-1] - g[at])
        if rise > tolerance * float(g[at]):
            turning = int(x[at])
        not_worse = (j[at:] <= j[at] * (1 + tolerance)) & (g[at:] > g[at] * (1 + tolerance))
        hacking = turning is not None and bool(not_worse.any())
        closer = None if teacher_golden is None else float(g[0]) < teacher_golden
    return HackingReport(
        law=law,
        deviation=tuple(deviation.tolist()),
        onset=onset,
        turning=turning,
        rise=rise,
        hacking=hacking,
        overfitting=bool(j[-1] > j.min() * (1 + tolerance)),
        starts_closer=closer,
    )


# --- prompts, responses and the models that give them ---------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How responses are drawn.

    Attributes:
        max_new_tokens: longest response.
        temperature: > 0, of the softmax.
        eos: token that ends a response; the model's own if None; a model without one fills every response.
        batch_size: prompts at once.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    eos: int | None = None
    batch_size: int = 256


def prompts_of(prompts: Any) -> dict[str, Tensor]:
    """Prompts as {"prompts", "prompt_mask"}, each (n, s).

    Args:
        prompts: token ids (n, s), or a mapping as tokenizers give it; causal models need padding on the left.
    """
    if isinstance(prompts, Tensor):
        return {"prompts": prompts, "prompt_mask": torch.ones_like(prompts)}
    ids = prompts["prompts" if "prompts" in prompts else "input_ids"]
    mask = prompts.get("prompt_mask", prompts.get("attention_mask"))
    return {"prompts": ids, "prompt_mask": torch.ones_like(ids) if mask is None else mask}


def response_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Logits (n, t, vocabulary) of each response token given the prompt and the tokens before it.

    Args:
        model: a transformers causal or encoder-decoder language model; or any module called as
            `model(prompts, responses)` that gives such logits itself.
        batch: {"prompts", "prompt_mask"} (n, s) and {"responses", "mask"} (n, t).
    """
    prompts, known, responses = batch["prompts"], batch["prompt_mask"], batch["responses"]
    config = getattr(_bare(model), "config", None)
    if config is None:
        return model(prompts, responses)
    if getattr(config, "is_encoder_decoder", False):
        start = torch.full_like(responses[:, :1], config.decoder_start_token_id)
        decoded = torch.cat([start, responses[:, :-1]], 1)
        return model(input_ids=prompts, attention_mask=known, decoder_input_ids=decoded).logits
    mask = torch.cat([known, batch["mask"].to(known)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    ids = torch.cat([prompts, responses], 1)
    output = model(input_ids=ids, attention_mask=mask, position_ids=positions)
    return output.logits[:, prompts.shape[1] - 1 : -1]


def _bare(model: nn.Module) -> nn.Module:
    """The model in a frozen copy, or in what wraps it for several processes."""
    while isinstance(model, Teacher) or (not hasattr(model, "config") and hasattr(model, "module")):
        model = model.model if isinstance(model, Teacher) else model.module  # type: ignore[assignment]
    return model


@torch.no_grad()
def respond(model: nn.Module, prompts: Any, *, sampling: Sampling = Sampling(), seed: int = 0) -> TensorData:
    """Draw a response to every prompt: the prompts with {"responses", "mask"} (n, t).

    In eval mode, whatever mode the model is in, with a key-value cache where it is transformers'. Tokens after the end
    token are masked.

    Args:
        model: as in `response_logits`.
        prompts: as in `prompts_of`.
        sampling: lengths, temperature and end token.
        seed: of the draws.
    """
    positive("temperature", sampling.temperature)
    positive("max_new_tokens", sampling.max_new_tokens)
    model, asked = _bare(model), prompts_of(prompts)
    config, draw = getattr(model, "config", None), seeds.generator(seed, "responses")
    if (
        config is not None
        and not getattr(config, "is_encoder_decoder", False)
        and not asked["prompt_mask"][:, -1].all()
    ):
        raise InputError("prompts end with padding, but must be padded on the left for a causal language model")
    eos = sampling.eos if sampling.eos is not None else getattr(config, "eos_token_id", None)
    ends = set(eos) if isinstance(eos, list | tuple) else set() if eos is None else {eos}
    device, parts = device_of(model), list[Tensor]()
    with mode(model, training=False):
        for ids, known in zip(
            *(asked[name].split(sampling.batch_size) for name in ("prompts", "prompt_mask")), strict=True
        ):
            step = _stepper(model, ids.to(device), known.to(device))
            found, done = list[Tensor](), torch.zeros(len(ids), dtype=torch.bool)
            for _ in range(sampling.max_new_tokens):
                chances = (step(found).float() / sampling.temperature).softmax(-1).cpu()
                token = chances.multinomial(1, generator=draw)[:, 0].masked_fill(done, 0)
                found.append(token.masked_fill(done, -1).to(device))
                for end in ends:
                    done |= token == end
                if done.all():
                    break
            parts.append(torch.stack(found, 1).cpu())
    longest = max(part.shape[1] for part in parts)
    tokens = torch.cat([F.pad(part, (0, longest - part.shape[1]), value=-1) for part in parts])
    return TensorData({**asked, "responses": tokens.clamp(min=0), "mask": (tokens >= 0).long()})


def _stepper(model: Any, ids: Tensor, known: Tensor) -> Callable[[list[Tensor]], Tensor]:
    """A function from the tokens drawn so far to the next one's logits (n, vocabulary)."""
    config = getattr(model, "config", None)
    if config is None:

        def plain(found: list[Tensor]) -> Tensor:
            return model(ids, torch.stack([*found, ids[:, 0]], 1).clamp(min=0))[:, -1]

        return plain
    kept: dict[str, Any] = {"cache": None, "mask": known}
    both = getattr(config, "is_encoder_decoder", False)
    encoded = model.get_encoder()(input_ids=ids, attention_mask=known) if both else None

    def cached(found: list[Tensor]) -> Tensor:
        new = found[-1].clamp(min=0)[:, None] if found else None
        settings = {"past_key_values": kept["cache"], "use_cache": True}
        if both:
            new = torch.full_like(ids[:, :1], config.decoder_start_token_id) if new is None else new
            output = model(encoder_outputs=encoded, attention_mask=known, decoder_input_ids=new, **settings)
        else:
            if new is not None:
                kept["mask"] = torch.cat([kept["mask"], kept["mask"].new_ones(len(ids), 1)], 1)
            positions = (kept["mask"].cumsum(1) - 1).clamp(min=0)
            new = ids if new is None else new
            positions = positions[:, -new.shape[1] :]
            output = model(input_ids=new, attention_mask=kept["mask"], position_ids=positions, **settings)
        kept["cache"] = output.past_key_values
        return output.logits[:, -1]

    return cached


def sft(model: nn.Module, batch: Batch, run: Any = None) -> Tensor:
    """Objective for `fit`: -log of a response's probability, summed over its tokens, mean over the batch."""
    _check(batch)
    logits = response_logits(model, batch)
    wanted = batch["responses"].masked_fill(batch["mask"] == 0, -100)
    return F.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten(), reduction="sum") / len(wanted)


def _check(batch: Batch) -> None:
    names = ("prompts", "prompt_mask", "responses", "mask")
    missing = [name for name in names if name not in batch] if isinstance(batch, Mapping) else list(names)
    if missing:
        raise InputError(f"The batch has no {', '.join(missing)}, but must be of a ResponseSource")


class Imitation:
    """Objective for `fit`: `sequence_divergence` between a frozen teacher and the student, mean over the batch.

    Args:
        teacher: kept as a frozen copy.
        kind: as in `token_divergence`.
        beta: likewise.
    """

    def __init__(self, teacher: nn.Module, *, kind: str = "forward", beta: float = 0.5) -> None:
        one_of("kind", kind, KINDS)
        in_range("beta", beta, 0, 1)
        self.teacher = teacher if isinstance(teacher, Teacher) else Teacher(teacher)
        self.kind, self.beta = kind, beta

    def __call__(self, model: nn.Module, batch: Batch, run: Any = None) -> Tensor:
        """The loss of a batch of responses."""
        _check(batch)
        self.teacher.to(batch["prompts"].device)
        with torch.no_grad():
            theirs = response_logits(self.teacher, batch)
        ours, settings = response_logits(model, batch), {"kind": self.kind, "beta": self.beta}
        return sequence_divergence(theirs, ours, batch["responses"], mask=batch["mask"], **settings).mean()  # type: ignore[arg-type]


# --- data -----------------------------------------------------------------------------------------------------------


class ResponseSource(Shuffled):
    """Batches of prompts with responses, for `fit`; make one with `offline`, `online` or `mixed`.

    Every use of a prompt has a number of its own, epoch times prompts plus place, which the draws are seeded with. A
    run that resumes therefore sees the same responses, as long as the model that gives them is the same.
    """

    def __init__(self, prompts: TensorData, batch_size: int = 32, *, seed: int = 0) -> None:
        super().__init__(prompts, batch_size, seed=seed)

    def plan(self, epoch: int) -> list[Any]:
        return [rows + epoch * len(self.data) for rows in super().plan(epoch)]

    def fetch(self, item: Any) -> Batch:
        return self.answer(torch.as_tensor(item))

    def answer(self, uses: Tensor) -> Batch:
        """Prompts and responses for uses of prompts."""
        return self.data[uses % len(self.data)]

    @staticmethod
    def offline(pairs: Any, *, batch_size: int = 32, seed: int = 0) -> "ResponseSource":
        """Fixed responses, the same in every epoch.

        Args:
            pairs: as `respond` gives them; or (prompts, responses), token ids (n, s) and (n, t).
            batch_size: prompts a step.
            seed: of their order.
        """
        if isinstance(pairs, tuple):
            prompts, responses = pairs
            pairs = TensorData({**prompts_of(prompts), "responses": responses, "mask": torch.ones_like(responses)})
        return ResponseSource(pairs, batch_size, seed=seed)

    @staticmethod
    def online(
        model: nn.Module,
        prompts: Any,
        *,
        sampling: Sampling = Sampling(),
        refresh: Literal["batch", "epoch"] = "batch",
        batch_size: int = 32,
        seed: int = 0,
    ) -> "ResponseSource":
        """Responses drawn anew each time a prompt is used.

        Args:
            model: a frozen teacher, or the student that is being trained (on-policy).
            prompts: as in `prompts_of`.
            sampling: how responses are drawn.
            refresh: draw at every batch; or once an epoch for all prompts together, which is faster, and for a student
                that is being trained lags behind it, and after a resume within an epoch differs.
            batch_size: prompts a step.
            seed: of order and draws.
        """
        return _Online(model, prompts, sampling, refresh, batch_size, seed)

    @staticmethod
    def mixed(a: "ResponseSource", b: "ResponseSource", share: float, *, seed: int = 0) -> "ResponseSource":
        """Each element of a batch from `b` with probability `share`, else from `a`.

        Args:
            a: such as offline; its order and batch size are used.
            b: such as online, over as many prompts.
            share: 0 to 1.
            seed: of the choice.
        """
        return _Mixed(a, b, share, seed)


class _Online(ResponseSource):
    def __init__(
        self, model: nn.Module, prompts: Any, sampling: Sampling, refresh: str, batch_size: int, seed: int
    ) -> None:
        one_of("refresh", refresh, ("batch", "epoch"))
        super().__init__(TensorData(prompts_of(prompts)), batch_size, seed=seed)
        self.model, self.sampling, self.refresh = model, sampling, refresh
        self.held: tuple[int, TensorData] | None = None

    def answer(self, uses: Tensor) -> Batch:
        if self.refresh == "batch":
            asked, seed = super().answer(uses), seeds.derive(self.seed, "use", int(uses[0]))
            found: Any = respond(self.model, asked, sampling=self.sampling, seed=seed)
            return found.inputs
        epoch = int(uses[0]) // len(self.data)
        if self.held is None or self.held[0] != epoch:
            seed = seeds.derive(self.seed, "epoch", epoch)
            self.held = epoch, respond(self.model, self.data.inputs, sampling=self.sampling, seed=seed)
        return self.held[1][uses % len(self.data)]


class _Mixed(ResponseSource):
    def __init__(self, a: ResponseSource, b: ResponseSource, share: float, seed: int) -> None:
        in_range("share", share, 0, 1)
        if len(a.data) != len(b.data):
            raise InputError(f"a has {len(a.data)} prompts and b {len(b.data)}, but both must have the same")
        super().__init__(a.data, a.batch_size, seed=a.seed)
        self.a, self.b, self.share, self.draw_seed = a, b, share, seed

    def answer(self, uses: Tensor) -> Batch:
        draw = seeds.generator(self.draw_seed, "mix", int(uses[0]))
        chosen = torch.rand(len(uses), generator=draw) < self.share
        parts = [s.answer(rows) for s, rows in ((self.a, uses[~chosen]), (self.b, uses[chosen])) if len(rows)]
        longest = max(part["responses"].shape[1] for part in parts)
        wide = [
            {k: F.pad(v, (0, longest - v.shape[1])) if k in ("responses", "mask") else v for k, v in part.items()}
            for part in parts
        ]
        return {name: torch.cat([part[name] for part in wide]) for name in wide[0]}


# --- along a run ----------------------------------------------------------------------------------------------------


class TeacherHackingMonitor(Callback):
    """Measures proxy and golden along a run, always on the same responses to validation prompts.

        monitor = TeacherHackingMonitor(teacher, prompts, oracle=None)
        fit(student, ResponseSource.offline(pairs), Imitation(teacher), epochs=60, callbacks=[monitor])
        monitor.report().onset

    In a loop of your own call `on_evaluate(student, step)` now and then. Logged are `proxy` and `golden`.

    Args:
        teacher: the model that the student learns from; kept as a frozen copy.
        prompts: validation prompts, none of which are trained on; as in `prompts_of`.
        oracle: the model that stands for the truth; None without one.
        every: steps between two evaluations; a twentieth of the run if None.
        sampling: of the validation responses.
        seed: of their draws.

    Attributes:
        curves: "steps", "proxy" and, with an oracle, "golden".
        teacher_golden: D(oracle, teacher); None without an oracle.
    """

    def __init__(
        self,
        teacher: nn.Module,
        prompts: Any,
        oracle: nn.Module | None = None,
        *,
        every: int | None = None,
        sampling: Sampling = Sampling(),
        seed: int = 0,
    ) -> None:
        if every is not None:
            positive("every", every)
        self.every, self.size = every, sampling.batch_size
        models = {"proxy": teacher} | ({} if oracle is None else {"golden": oracle})
        self.models = {name: m if isinstance(m, Teacher) else Teacher(m) for name, m in models.items()}
        self.responses = {
            name: respond(model, prompts, sampling=sampling, seed=seeds.derive(seed, name))
            for name, model in self.models.items()
        }
        self.teacher_golden = None if oracle is None else self.distance("golden", self.models["proxy"])
        self.curves: dict[str, list[float]] = {"steps": [], **{name: [] for name in self.models}}

    @torch.no_grad()
    def distance(self, name: str, model: nn.Module) -> float:
        """D of the teacher ("proxy") or the oracle ("golden") to a model, in eval mode, in nats a response."""
        source, data, found = self.models[name], self.responses[name], []
        device = device_of(model)
        source.to(device)
        with mode(model, training=False):
            for rows in torch.arange(len(data)).split(self.size):
                batch = to_device(data[rows], device)
                theirs, ours = (response_logits(m, batch) for m in (source, model))
                found.append(sequence_divergence(theirs, ours, batch["responses"], mask=batch["mask"]))
        return float(torch.cat(found).double().mean())

    def on_evaluate(self, student: nn.Module, step: int) -> dict[str, float]:
        """Measure the student now; steps must increase."""
        found = {name: self.distance(name, student) for name in self.models}
        for name, value in {"steps": step, **found}.items():
            self.curves[name].append(value)
        return found

    def report(self, window: int | None = None, **settings: Any) -> HackingReport:
        """`hacking_report` of the curves so far; the window is the first third of them if None."""
        points = sum(step > 0 for step in self.curves["steps"])
        settings = {"window": window or max(2, points // 3), "teacher_golden": self.teacher_golden, **settings}
        return hacking_report(self.curves["proxy"], self.curves.get("golden"), steps=self.curves["steps"], **settings)

    def on_start(self, run: Run) -> None:
        self.curves = {name: [] for name in self.curves}
        self.on_evaluate(run.module, 0)

    def on_step(self, run: Run) -> None:
        every = self.every or max(1, run.steps // 20)
        if run.step % every == 0 or run.step == run.steps:
            run.log(**self.on_evaluate(run.module, run.step))

    def state_dict(self) -> dict[str, Any]:
        return {"curves": self.curves}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.curves = {name: list(values) for name, values in state["curves"].items()}


# --- the experiment -------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class DistillationTrial:
    """The controlled experiment: an oracle, a teacher and a student that learned from it, and runs on several sources.

        trial = DistillationTrial(oracle=..., make_teacher=..., make_student=..., oracle_prompts=..., prompts=...,
                                  validation=..., steps=1500)
        monitor = trial.run("offline")
        monitor.curves["golden"], monitor.report().turning

    Attributes:
        oracle: model that stands for the truth.
        make_teacher: () -> an untrained model, called under the seed.
        make_student: likewise.
        oracle_prompts: the oracle answers them once; teacher and student start with SFT on that.
        prompts: of the distillation, of the same kind.
        validation: prompts that are not trained on.
        teacher_steps: of SFT.
        student_steps: likewise.
        steps: of distillation.
        batch_size: prompts a step.
        lr: of Adam.
        sampling: of all responses.
        kind: of the token loss.
        beta: likewise.
        seed: of weights, orders and draws.
    """

    oracle: nn.Module
    make_teacher: Callable[[], nn.Module]
    make_student: Callable[[], nn.Module]
    oracle_prompts: Any
    prompts: Any
    validation: Any
    teacher_steps: int
    student_steps: int
    steps: int
    batch_size: int = 32
    lr: float = 3e-4
    sampling: Sampling = field(default_factory=Sampling)
    kind: str = "forward"
    beta: float = 0.5
    seed: int = 0
    _made: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def pairs(self) -> TensorData:
        """The oracle's responses."""
        return self._once("pairs", lambda: self._answers(self.oracle, self.oracle_prompts, "oracle"))

    @property
    def teacher(self) -> nn.Module:
        """The teacher after SFT."""
        return self._once("teacher", lambda: self._taught("teacher", self.make_teacher, self.teacher_steps))

    @property
    def student(self) -> nn.Module:
        """The student after SFT, which every run begins from a copy of."""
        return self._once("student", lambda: self._taught("student", self.make_student, self.student_steps))

    def source(
        self, name: str, student: nn.Module, *, share: float = 0.5, repeats: int = 1, prompts: Any = None
    ) -> Any:
        """Data of one kind.

        Args:
            name: "offline", "online_teacher", "online_student" or "mixed" (offline, and online from the teacher).
            student: the model that will be trained.
            share: of online elements in "mixed".
            repeats: offline responses a prompt.
            prompts: the trial's if None.
        """
        one_of("source", name, SOURCES)
        asked = prompts_of(self.prompts if prompts is None else prompts)
        settings: dict[str, Any] = {"batch_size": self.batch_size, "seed": self.seed}
        if name == "online_student":
            return ResponseSource.online(student, asked, sampling=self.sampling, **settings)
        repeated = {key: value.repeat(repeats, 1) for key, value in asked.items()}
        online = ResponseSource.online(self.teacher, repeated, sampling=self.sampling, refresh="epoch", **settings)
        if name == "online_teacher":
            return online
        fixed = ResponseSource.offline(self._answers(self.teacher, repeated, "offline"), **settings)
        return fixed if name == "offline" else ResponseSource.mixed(fixed, online, share, seed=self.seed)

    def monitor(self) -> TeacherHackingMonitor:
        """A monitor of both distances on the validation prompts; all share models and responses, not curves."""
        settings: dict[str, Any] = {"sampling": self.sampling, "seed": seeds.derive(self.seed, "validation")}
        made = lambda: TeacherHackingMonitor(self.teacher, self.validation, self.oracle, **settings)  # noqa: E731
        found = copy.copy(self._once("monitor", made))
        found.curves = {name: [] for name in found.curves}
        return found

    def run(self, name: str, *, callbacks: Sequence[Callback] = (), **options: Any) -> TeacherHackingMonitor:
        """Distil a copy of the student on one source, and give the curves; `options` are those of `source`."""
        student, monitor = copy.deepcopy(self.student), self.monitor()
        data = self.source(name, student, **options)
        loss = Imitation(monitor.models["proxy"], kind=self.kind, beta=self.beta)
        self._fit(student, data, loss, self.steps, [monitor, *callbacks])
        return monitor

    def _fit(self, model: nn.Module, data: Any, loss: Any, steps: int, callbacks: Sequence[Callback] = ()) -> History:
        return fit(
            model,
            data,
            loss,
            steps=steps,
            optimizer=lambda parameters: torch.optim.Adam(parameters, lr=self.lr),
            callbacks=callbacks,
            seed=self.seed,
            progress=False,
        )

    def _taught(self, name: str, make: Callable[[], nn.Module], steps: int) -> nn.Module:
        with seeds.isolated(seeds.derive(self.seed, name)):
            model = make()
        source = ResponseSource.offline(self.pairs, batch_size=self.batch_size, seed=seeds.derive(self.seed, name))
        self._fit(model, source, sft, steps)
        return model.eval()

    def _answers(self, model: nn.Module, prompts: Any, name: str) -> TensorData:
        return respond(model, prompts, sampling=self.sampling, seed=seeds.derive(self.seed, name))

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]


SOURCES = ("offline", "online_teacher", "online_student", "mixed")


def split_prompts(prompts: Any, share: float) -> dict[str, Tensor]:
    """The first share of prompts, for studies of fewer of them."""
    in_range("share", share, 0, 1, above=True)
    asked = TensorData(prompts_of(prompts))
    return subset(asked, range(max(1, round(share * len(asked))))).inputs
