"""Techniques that need more than a classifier and labels, trained on the embedded world that the arena has for them."""

import dataclasses
import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retouch import __version__
from retouch.core.cards import Card
from retouch.core.errors import InputError, nearest

if TYPE_CHECKING:
    from torch import nn

    from retouch.arenas.contest import Arena, Entry

OWN_MODEL = ("--model", "--data", "--teacher", "--student")


@dataclasses.dataclass
class OnWorld:
    """What a run on a world needs to know.

    Args:
        problem: of the arena; the technique's own if left out.
        plain: train plainly as well, to compare.
        threads: of torch; the networks are too small for more than one.
        out: new folder for the trained model, evidence.json and report.html.
    """

    problem: str = ""
    plain: bool = True
    threads: int = 1
    out: Path = Path("retouch-world")


def run(card: Card, arguments: Sequence[str]) -> None:
    """Train with a technique on its world, once, with the settings of the arena."""
    import tyro

    given = next((option for option in OWN_MODEL if option in {word.partition("=")[0] for word in arguments}), None)
    if given is not None:
        raise InputError(
            f"{card.name} does not train an ordinary image classifier and takes no {given}: on your own model use it "
            f"from Python, see retouch show {card.name}; retouch {card.room} {card.name} runs it on its embedded world"
        )
    shared = tyro.cli(OnWorld, prog=f"retouch {card.room} {card.name}", description=card.line, args=list(arguments))
    train(card, shared)


def train(card: Card, shared: OnWorld) -> None:
    """Train, and write model, evidence and page: all of it or nothing."""
    import torch

    from retouch.arenas.contest import arena as find_arena
    from retouch.cli.report_command import write_request_page
    from retouch.core.checkpoints import atomic_file, atomic_folder, save_model

    arena = find_arena(card.room)
    entry = next(entry for entry in arena.entries() if entry.name == card.name)
    problem = _problem(arena, entry, shared.problem)
    torch.set_num_threads(shared.threads)
    with atomic_folder(shared.out) as folder:
        model, evidence = carry_out(card, arena, entry, problem, plain=shared.plain)
        save_model(model, folder)
        with atomic_file(folder / "evidence.json") as temporary:
            temporary.write_text(json.dumps(evidence, indent=1) + "\n")
        write_request_page(evidence, folder)
    for sentence in evidence["words"]:
        print(sentence)  # noqa: T201
    print(f"\nModel, evidence.json and report.html are in {shared.out}")  # noqa: T201


def _problem(arena: "Arena", entry: "Entry", name: str) -> str:
    known = entry.problems or tuple(arena.problems)
    if name and name not in known:
        raise InputError(f"--problem is {name}, but must be one of {', '.join(known)}.{nearest(name, known)}")
    return name or known[0]


def carry_out(
    card: Card, arena: "Arena", entry: "Entry", problem: str, *, plain: bool
) -> "tuple[nn.Module, dict[str, Any]]":
    """Train one replica of a problem with the technique, and plainly if asked for, and measure both.

    Returns:
        The model that the technique trained, and the evidence.
    """
    from retouch.arenas.contest import Terms
    from retouch.report.request import weights_digest

    posed, solution = arena.prepare(problem, Terms(replicas=1)), None
    rows: dict[str, Any] = {}
    originals = [other for other in arena.entries() if other.kind == "original"] if plain else []
    for one in (*originals, entry):
        start = time.perf_counter()
        solution = one.solve(posed.replica(0), **one.settings_for(problem))
        values = {**arena.measure(posed, [solution]), "seconds": [time.perf_counter() - start]}
        rows[one.name] = {"title": one.title, "kind": one.kind, "values": values, "answers": []}
    assert solution is not None
    order, settings = arena.measures[arena.order_of(problem)], entry.settings_for(problem)
    shown = {name: f"{row['values'][arena.order_of(problem)][0]:.{order.digits}f}" for name, row in rows.items()}
    words = [
        f"{order.title}{f' ({order.unit})' if order.unit else ''}: "
        + ", ".join(f"{rows[name]['title']} {value}" for name, value in shown.items())
        + f". {order.line}",
        f"This is one seed of each: retouch bench {card.room} --problem {problem} runs more, beside the baselines.",
    ]
    return solution.model, {
        "title": f"{card.title} on {problem}",
        "technique": {name: getattr(card, name) for name in ("name", "title", "paper", "line")},
        "lead": card.line,
        "caption": arena.problems[problem],
        "request": {"arena": arena.name, "problem": problem},
        "options": {name: str(value) for name, value in settings.items()},
        "measures": {name: dataclasses.asdict(measure) for name, measure in arena.measures.items()},
        "order": arena.order_of(problem),
        "rows": rows,
        "pictures": [],
        "words": words,
        "record": {
            "made on": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "weights (SHA-256)": weights_digest(solution.model),
            "software": f"retouch {__version__}, python {platform.python_version()}",
        },
    }
