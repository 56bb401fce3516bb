"""A teacher that learned from an oracle teaches a student on few prompts: where do its responses come from?

Small-scale study of teacher hacking, in a world of 4-grams: the oracle is a random network that gives the next of 12
tokens from the last 4. Teacher and student learn from its responses first, the student little; then the student learns
the teacher's next-token distributions on 30 prompts, offline or online. Golden is the distance to the oracle and proxy
that to the teacher, in nats a response of 6 tokens, on 500 other prompts. Plain training learns from the oracle's own
responses.

In the sizes that the study proposes, offline data showed no hacking. Widths, prompts and roughness were varied until it
did, on seeds that no evidence uses: the claims are about a world in which the effect exists, not about how often.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from retouch.arenas.contest import Claim, Entry, Measure, Plot
from retouch.arenas.distill import Replica, Solution, Split, Task
from retouch.audit.teacher_hacking import (
    DistillationTrial,
    Imitation,
    Sampling,
    TeacherHackingMonitor,
    sft,
    split_prompts,
)
from retouch.core import seeds

NAME = "hacking"
TOKENS, CONTEXT, LENGTH = 12, 4, 6
SHARPNESS, ROUGHNESS = 12.0, 1.5  # of the oracle's logits, and of what it makes of its input
WIDTH, RATE = 128, 1.5e-3  # of teacher and student
TOLD, PROMPTS, ASKED = 20_000, 30, 500  # oracle's responses, prompts of the distillation and of the validation
STEPS = 800


class FourGram(nn.Module):
    """The next token from the last four, by a network of two hidden layers.

    Args:
        width: of the hidden layers.
        sharpness: the logits are multiplied by it.
        roughness: what the first layer's weights are multiplied by.
    """

    def __init__(self, width: int, sharpness: float = 1.0, roughness: float = 1.0) -> None:
        super().__init__()
        self.sharpness, self.tokens = sharpness, nn.Embedding(TOKENS, 16)
        first = nn.Linear(16 * CONTEXT, width)
        self.layers = nn.Sequential(first, nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, TOKENS))
        with torch.no_grad():
            first.weight.mul_(roughness)

    def forward(self, prompts: Tensor, responses: Tensor) -> Tensor:
        """Prompts (n, 4) and responses (n, t) to logits (n, t, 12)."""
        text = torch.cat([prompts, responses[:, :-1]], 1)
        return self.sharpness * self.layers(self.tokens(text.unfold(1, CONTEXT, 1)).flatten(2))


def split(seed: int, search: bool) -> Split:
    """An oracle, and prompts of everything: the trial in the notes."""
    draw = seeds.generator(seed, "prompts")
    every = torch.cartesian_prod(*[torch.arange(TOKENS)] * CONTEXT)[torch.randperm(TOKENS**CONTEXT, generator=draw)]
    with seeds.isolated(seeds.derive(seed, "oracle")):
        oracle = FourGram(64, SHARPNESS, ROUGHNESS).eval()
    told = every[ASKED + 2 * PROMPTS :]
    trial = DistillationTrial(
        oracle=oracle,
        make_teacher=lambda: FourGram(WIDTH),
        make_student=lambda: FourGram(WIDTH),
        oracle_prompts=told[torch.randint(len(told), (TOLD,), generator=draw)],
        prompts=every[ASKED : ASKED + PROMPTS],
        validation=every[:ASKED],
        teacher_steps=1000,
        student_steps=500,
        steps=STEPS,
        batch_size=64,
        lr=RATE,
        sampling=Sampling(max_new_tokens=LENGTH, batch_size=TOLD),
        seed=seed,
    )
    return Split(train=trial.pairs, test=every[:ASKED], notes={"trial": trial, "monitor": trial.monitor()})


def error(model: nn.Module, split: Split) -> float:
    """Golden: the distance to the oracle, in nats a response."""
    return split.notes["monitor"].distance("golden", model)


def judge(model: nn.Module, split: Split) -> dict[str, float]:
    """Both distances at the end."""
    return {name: split.notes["monitor"].distance(name, model) for name in ("golden", "proxy")}


def distil(replica: Replica, *, source: str, share: float = 0.5, repeats: int = 1, prompts: float = 1.0) -> Solution:
    """Go on from the student's start with the teacher's distributions, on responses of one source.

    Args:
        replica: of the task.
        source: as in `DistillationTrial.source`.
        share: of online elements in a mixture.
        repeats: offline responses a prompt.
        prompts: share of the prompts that is used.
    """
    trial: DistillationTrial = replica.split.notes["trial"]
    student = copy.deepcopy(trial.student)
    asked = split_prompts(trial.prompts, prompts)
    data = trial.source(source, student, share=share, repeats=repeats, prompts=asked)
    monitor = trial.monitor()
    return replica.train(student, data, Imitation(trial.teacher), callbacks=[monitor], own=lambda _: curves(monitor))


def curves(monitor: TeacherHackingMonitor) -> dict[str, float]:
    """What the run's curves say."""
    report, golden = monitor.report(), monitor.curves["golden"]
    return {
        "rise": report.rise,
        "turning": monitor.curves["steps"][golden.index(min(golden))],
        "hacking": 100.0 * report.hacking,
        "overfitting": 100.0 * report.overfitting,
        "deviation": 100.0 * (report.onset is not None),
    }


def claim(text: str, other: str, measure: str, relation: str, margin: float = 0.0, factor: float = 1.0) -> Claim:
    """A claim of this task; with a factor of 0 the measure itself is compared with the margin."""
    source = "this library's study" if margin else "figures of curves, sources and prompts"
    values: dict[str, Any] = {"margin": margin, "factor": factor, "source": source}
    return Claim(text=text, problem=NAME, measure=measure, other=other, relation=relation, **values)


def arms() -> tuple[Entry, ...]:
    """The sources that the remedy is compared with."""

    def entry(name: str, title: str, note: str, claims: tuple[Claim, ...], **settings: Any) -> Entry:
        solve: Callable[..., Solution] = functools.partial(distil, **settings)
        return Entry(name=name, title=title, kind="baseline", solve=solve, problems=(NAME,), note=note, claims=claims)

    online = "teacher_hacking"
    return (
        entry(
            "offline",
            "offline",
            "one response a prompt, fixed",
            (
                claim("Offline, golden ends 0.005 above its least.", online, "rise", "at least", 0.005, 0.0),
                claim(
                    "The proxy alone shows it: offline it leaves the power law.", online, "deviation", "at least", 50.0
                ),
            ),
            source="offline",
        ),
        entry(
            "offline_half",
            "offline, half of the prompts",
            "two responses a prompt, fixed",
            (
                claim(
                    "Half of the prompts, with twice the responses, end farther from the oracle.",
                    "offline",
                    "golden",
                    "at least",
                ),
                claim(
                    "Half of the prompts, with twice the responses, make golden rise more.",
                    "offline",
                    "rise",
                    "at least",
                ),
                claim("Half of the prompts make golden turn earlier.", "offline", "turning", "at most", -1.0),
            ),
            source="offline",
            repeats=2,
            prompts=0.5,
        ),
        entry(
            "offline_more",
            "offline, more responses",
            "four responses a prompt, fixed",
            (
                claim("More responses a prompt lower golden.", "offline", "golden", "at most"),
                claim("More responses a prompt lower the proxy.", "offline", "proxy", "at most"),
            ),
            source="offline",
            repeats=4,
        ),
        entry(
            "online_student",
            "online, from the student",
            "on-policy",
            (
                claim("The student's own responses keep golden from rising, too.", "offline", "golden", "at most"),
                claim("They lower the proxy, too.", "offline", "proxy", "at most"),
            ),
            source="online_student",
        ),
        entry(
            "mixed",
            "half online, from the teacher",
            "share 0.5",
            (claim("A share of online data helps.", "offline", "golden", "at most"),),
            source="mixed",
        ),
    )


TASK = Task(
    name=NAME,
    text="A network of 4-grams, taught by an oracle, teaches another on 30 prompts: offline or online responses.",
    split=split,
    build=lambda: FourGram(WIDTH),
    steps=STEPS,
    optimizer=lambda parameters: torch.optim.Adam(parameters, lr=RATE),
    objective=sft,
    error=error,
    judge=judge,
    target=0.35,
    order="golden",
    teacher=lambda replica: replica.split.notes["trial"].teacher,
    measures={
        "golden": Measure(
            title="golden", unit="nats", better="low", digits=3, line="Distance to the oracle, a response."
        ),
        "proxy": Measure(
            title="proxy", unit="nats", better="low", digits=3, line="Distance to the teacher, a response."
        ),
        "rise": Measure(title="rise", unit="nats", better="low", digits=3, line="Golden's end above its least value."),
        "turning": Measure(title="turning", unit="step", better="high", digits=0, line="Step of golden's least value."),
        "hacking": Measure(
            title="hacking", unit="%", better="low", digits=0, line="Runs where golden rose while the proxy did not."
        ),
        "overfitting": Measure(
            title="over-fitting", unit="%", better="low", digits=0, line="Runs where the proxy ends above its least."
        ),
        "deviation": Measure(
            title="deviation",
            unit="%",
            better="low",
            digits=0,
            line="Runs where the proxy left its power law to the end.",
        ),
    },
    baselines=arms(),
    plots=(
        Plot(
            kind="scatter",
            x="proxy",
            y="golden",
            text="To the left: nearer to the teacher; further down: nearer to the oracle.",
            problems=(NAME,),
        ),
    ),
)
