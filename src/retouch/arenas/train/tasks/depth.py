"""Where a number of pointers leads, by one layer used eight times: inputs that need one to five of them.

The pointers are those of the chains in `worlds.text.sequences`, one token each and any map instead of a ring: as text,
such chains take a small network many more steps than a laptop should spend here.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from retouch.arenas.contest import Claim, Entry, Measure, Plot
from retouch.arenas.train import Replica, Solution, Split, Task
from retouch.core import seeds
from retouch.core.data import TensorData
from retouch.train.palbert import PonderingClassifier, PonderOutput, pondering

NODES, HOPS, LAYERS, WIDTH = 6, 5, 8, 48
DRAWS = 20
Answer = tuple[Tensor, Tensor]  # logits and layers used
Rule = Callable[[PonderOutput, torch.Generator], Answer]


def draw(seed: int, search: bool) -> Split:
    """Sequences of a start with its number of steps, and where each node points to; splits share no map."""
    train, _ = _sequences(20000, (0, 1, 2), seeds.generator(seed, "train"))
    test, hops = _sequences(1000, (3 + search,), seeds.generator(seed, "test"))
    validation, _ = _sequences(500, (5,), seeds.generator(seed, "validation"))
    return Split(train=train, test=test, validation=validation, notes={"hops": hops})


def _sequences(count: int, parts: tuple[int, ...], generator: torch.Generator) -> tuple[TensorData, Tensor]:
    """Sequences whose map is in one of six parts of all maps."""
    maps = torch.randint(NODES, (8 * count, NODES), generator=generator)
    maps = maps[torch.isin(maps.sum(1) % 6, torch.tensor(parts))][:count]
    start = torch.randint(NODES, (count,), generator=generator)
    hops = torch.randint(1, HOPS + 1, (count,), generator=generator)
    node = start
    for step in range(HOPS):
        node = torch.where(step < hops, maps.gather(1, node[:, None])[:, 0], node)
    return TensorData(torch.cat([(NODES * (hops - 1) + start)[:, None], maps], 1), node), hops


class SharedLayer(nn.Module):
    """A transformer layer used eight times, as ALBERT's is; its head reads the first token after the last time."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Embedding(NODES * HOPS, WIDTH)
        self.pointer, self.place = nn.Embedding(NODES, WIDTH), nn.Embedding(NODES, WIDTH)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 1, 2 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
        self.head = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, NODES))

    @property
    def layers(self) -> list[nn.Module]:
        """The same one, eight times."""
        return [self.layer] * LAYERS

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens (n, 1 + nodes) to hidden states (n, 1 + nodes, width)."""
        pointers = self.pointer(tokens[:, 1:]) + self.place.weight
        return torch.cat([self.start(tokens[:, :1]), pointers], 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens to logits (n, nodes)."""
        hidden = self.embed(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden[:, 0])


class Exits(nn.Module):
    """A pondering classifier with a way to choose where it stops.

    Args:
        model: runs all layers.
        choose: (model, tokens) -> answers, of one draw or several; see `by_rule` and `by_q`.
    """

    def __init__(
        self, model: PonderingClassifier, choose: Callable[[PonderingClassifier, Tensor], list[Answer]]
    ) -> None:
        super().__init__()
        self.model, self.choose = model, choose

    @torch.no_grad()
    def answers(self, tokens: Tensor) -> list[Answer]:
        """Answers of every draw."""
        return self.choose(self.model, tokens)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits, of the first draw."""
        return self.answers(tokens)[0][0]


def by_rule(rule: Rule, draws: int = 1) -> Callable[[PonderingClassifier, Tensor], list[Answer]]:
    """Run all layers and apply a rule to what came out, several times if it is random."""

    def choose(model: PonderingClassifier, tokens: Tensor) -> list[Answer]:
        output = model(tokens)
        return [rule(output, seeds.generator(0, "exit", number)) for number in range(draws)]

    return choose


def by_q(threshold: float) -> Callable[[PonderingClassifier, Tensor], list[Answer]]:
    """The technique itself, which stops early; asked twice, to see whether there is a spread."""
    return lambda model, tokens: [model.predict(tokens, threshold=threshold) for _ in range(2)]


def judge(model: nn.Module, split: Split) -> dict[str, float]:
    """Error, calibration and layers used; over all draws where exits are drawn."""
    from torchmetrics.functional.classification import multiclass_calibration_error

    tokens, labels, hops = split.test.inputs, split.test.targets, split.notes["hops"].double()
    if isinstance(model, Exits):
        answers = model.answers(tokens)
    else:
        with torch.no_grad():
            answers = [(model(tokens), torch.full_like(labels, LAYERS))]
    errors = torch.tensor([100.0 * float((logits.argmax(1) != labels).double().mean()) for logits, _ in answers])
    layers = torch.stack([used.double() for _, used in answers])
    probabilities = answers[0][0].softmax(-1)
    measures = {
        "error": float(errors.mean()),
        "calibration": 100.0 * float(multiclass_calibration_error(probabilities, labels, num_classes=NODES)),
        "layers": float(layers.mean()),
        "spread": float(errors.std(unbiased=False)),
    }
    if layers.std() > 0:
        related = [float(torch.corrcoef(torch.stack([used, hops]))[0, 1]) for used in layers]
        measures["relation"] = sum(related) / len(related)
    return measures


# --- one training run for all ways to stop --------------------------------------------------------------------------


def ponder(replica: Replica, **settings: Any) -> Solution:
    """A pondering classifier, trained once for all entries with the same settings."""
    known: dict[Any, Solution] = replica.problem.store
    key = (replica.seed, replica.number, *sorted(settings.items()))
    if key not in known:
        encoder = replica.build()
        encoder.head = nn.Identity()  # the technique brings its own, for all layers
        with seeds.isolated(seeds.derive(replica.seed, "exits")):
            model = PonderingClassifier(encoder, NODES, dim=WIDTH, dropout=0.0, **settings)

        def error(model: nn.Module) -> float:
            return judge(Exits(model, by_q(0.5)).eval(), replica.split)["error"]  # type: ignore[arg-type]

        known[key] = replica.train(model, objective=pondering, error=error)
    return known[key]


def stopped(replica: Replica, exits: Callable[[PonderingClassifier], Exits], **settings: Any) -> Solution:
    """The classifier, stopped in some way."""
    trained = ponder(replica, **{**PONDER, **settings})
    return dataclasses.replace(trained, model=exits(trained.model).eval())  # type: ignore[arg-type]


def at(output: PonderOutput, layer: Tensor) -> Answer:
    """Answers after given layers (n,), counted from 0."""
    return output.logits[layer, torch.arange(len(layer))], layer + 1


def first(where: Tensor) -> Tensor:
    """The first layer that is marked (layers, n) in each column, or the last."""
    where = where.clone()
    where[-1] = True
    return where.int().argmax(0)


def sampled(output: PonderOutput, generator: torch.Generator) -> Answer:
    """PonderNet's exit: a draw at every layer."""
    return at(output, first(torch.rand(output.lambdas.shape, generator=generator) < output.lambdas))


def patient(output: PonderOutput, generator: torch.Generator, patience: int = 2) -> Answer:
    """PABEE's exit: after `patience` layers in a row that all say what the layer before them said."""
    said = output.logits.argmax(-1)
    agreed, counts = torch.zeros_like(said[0]), []
    for layer in range(len(said)):
        agreed = torch.where(said[layer] == said[layer - 1], agreed + 1, 0) if layer else agreed
        counts.append(agreed)
    return at(output, first(torch.stack(counts) >= patience))


def fixed(replica: Replica) -> Solution:
    """The layer that Q-exit uses on average, for all."""

    def exits(model: PonderingClassifier) -> Exits:
        used = model.predict(replica.split.validation.inputs)[1].double().mean()
        layer = round(float(used)) - 1
        return Exits(
            model, by_rule(lambda output, _: at(output, torch.full_like(output.logits[0, :, 0].long(), layer)))
        )

    return stopped(replica, exits)


def last(output: PonderOutput, generator: torch.Generator) -> Answer:
    """All layers."""
    return at(output, torch.full((output.logits.shape[1],), LAYERS - 1))


def one_cycle(optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    """Up to 3e-3 and down."""
    return OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)


PONDER: dict[str, Any] = {"beta": 0.05, "lambda_p": 0.2, "remainder": "last"}
SAME = "The weights are those of PALBERT's run."


def _baseline(name: str, title: str, solve: Callable[[Replica], Solution], note: str = SAME, claims: Any = ()) -> Entry:
    return Entry(name=name, title=title, kind="baseline", solve=solve, problems=("depth",), note=note, claims=claims)


def _at_threshold(threshold: float) -> Callable[[Replica], Solution]:
    return lambda replica: stopped(replica, lambda model: Exits(model, by_q(threshold)))


TASK = Task(
    name="depth",
    text="The node to which one to five pointers lead, by one transformer layer used up to eight times, 600 steps.",
    split=draw,
    build=SharedLayer,
    steps=600,
    scheduler=one_cycle,
    judge=judge,
    target=20.0,
    measures={
        "layers": Measure(title="layers", better="low", digits=2, line="Layers used, on average over test sequences."),
        "relation": Measure(
            title="relation",
            better="high",
            digits=2,
            line="Correlation of layers used and pointers to follow, where layers used differ.",
        ),
        "spread": Measure(
            title="spread",
            unit="%",
            better="low",
            digits=2,
            line=f"Standard deviation of the error over {DRAWS} draws.",
        ),
    },
    baselines=(
        _baseline("q_exit_30", "PALBERT, q = 0.3", _at_threshold(0.3)),
        _baseline("q_exit_70", "PALBERT, q = 0.7", _at_threshold(0.7)),
        _baseline(
            "q_exit_90",
            "PALBERT, q = 0.9",
            _at_threshold(0.9),
            claims=(
                Claim(
                    text="q = 0.9 uses at least the layers that q = 0.7 uses.",
                    problem="depth",
                    measure="layers",
                    other="q_exit_70",
                    relation="at least",
                ),
            ),
        ),
        _baseline(
            "sampled_exit",
            "sampled exit",
            lambda replica: stopped(replica, lambda model: Exits(model, by_rule(sampled, DRAWS))),
            f"{SAME} PonderNet's way to stop, {DRAWS} draws.",
        ),
        _baseline(
            "patience",
            "patience",
            lambda replica: stopped(replica, lambda model: Exits(model, by_rule(patient))),
            f"{SAME} PABEE's way to stop: when three layers in a row agree.",
        ),
        _baseline("fixed_layer", "fixed layer", fixed, f"{SAME} The number of layers that Q-exit uses on average."),
        _baseline(
            "last_layer", "last layer", lambda replica: stopped(replica, lambda model: Exits(model, by_rule(last)))
        ),
        _baseline(
            "linear_exit_head",
            "linear exit head",
            lambda replica: stopped(
                replica, lambda model: Exits(model, by_q(0.5)), lambda_layers=0, lambda_mode="single"
            ),
            "PonderNet's exit head, which sees one layer's state; trained anew, stopped by Q-exit.",
        ),
        _baseline(
            "no_remainder",
            "remainder to no layer",
            lambda replica: stopped(replica, lambda model: Exits(model, by_q(0.5)), remainder="none"),
            "As in the authors' code: what is left of the exit probability costs nothing. Trained anew.",
        ),
    ),
    plots=(
        Plot(
            kind="scatter",
            x="layers",
            y="error",
            problems=("depth",),
            text="Layers used and error: lower left is better. All but plain training share their weights.",
        ),
    ),
)
