"""Runs an arena: every entry on every replica, with time, memory and evidence; a stopped run goes on where it was."""

import dataclasses
import json
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from retouch import __version__
from retouch.arenas.contest import Answer, Arena, Entry, Picture, Terms, judge, mean, standard_error
from retouch.core.checkpoints import atomic_file
from retouch.core.errors import Diverged, InputError, nearest
from retouch.core.pictures import png_address
from retouch.core.progress import bar

EVIDENCE = "evidence.json"


def run(
    arena: Arena,
    out: str | Path,
    *,
    problems: Sequence[str] = (),
    only: Sequence[str] = (),
    terms: Terms = Terms(),  # noqa: B008  frozen
    progress: bool | None = None,
) -> dict[str, Any]:
    """Run an arena and write its evidence.

    Args:
        arena: what to run.
        out: folder of the evidence; entries that are in it with the same settings are not run again.
        problems: names; all if empty.
        only: entries to run, besides what they are compared with: originals, oracles, the other side of their claims;
            all if empty.
        terms: seeds and the like.
        progress: show a progress bar; None shows it on a terminal.

    Returns:
        The evidence.
    """
    entries = _chosen(arena, only)
    _known("problem", problems, list(arena.problems))
    settings = json.loads(json.dumps({**dataclasses.asdict(terms), "version": __version__}))
    evidence = _load(Path(out) / EVIDENCE, arena, settings)
    names = list(problems) or list(arena.problems)
    with bar(f"arena {arena.name}", len(names) * len(entries) * terms.replicas, show=progress) as line:
        for name in names:
            new = {"description": arena.problems[name], "order": arena.order_of(name), "rows": {}}
            record = evidence["problems"].setdefault(name, new)
            todo = [e for e in entries if (not e.problems or name in e.problems) and e.name not in record["rows"]]
            line.advance((len(entries) - len(todo)) * terms.replicas)
            problem = arena.prepare(name, terms) if todo else None
            if todo:
                record["pictures"] = [_picture(picture) for picture in arena.pictures(problem)]
            for entry in todo:
                record["rows"][entry.name] = _row(arena, problem, entry, terms.replicas, line)
                _judge(arena, entries, name, record)
                record["words"] = list(arena.words(name, record["rows"]))
                _save(Path(out) / EVIDENCE, evidence)
    return evidence


def search(
    arena: Arena, name: str, problem: str, *, replicas: int = 3, progress: bool | None = None
) -> list[tuple[dict[str, Any], dict[str, float]]]:
    """Try an entry's grid on seeds and held-out data that no evidence uses.

    Returns:
        Settings and mean measures, best first by the arena's order; without settings under which training diverged.
    """
    _known("entry", [name], [entry.name for entry in arena.entries()])
    entry = next(entry for entry in arena.entries() if entry.name == name)
    _known("problem", [problem], list(entry.problems or arena.problems))
    trial = arena.prepare(problem, Terms(replicas=replicas, search=True))
    if entry.shared is not None:
        entry.shared(trial)
    found = []
    points = entry.grid_points()
    with bar(f"search {name}", len(points) * replicas, show=progress) as line:
        for point in points:
            hyper = {**entry.settings_for(problem), **point}
            try:
                solutions = [entry.solve(trial.replica(number), **hyper) for number in range(replicas)]
            except Diverged:
                continue
            finally:
                line.advance(replicas, note=str(point))
            values = arena.measure(trial, solutions)
            found.append((point, {measure: mean(per_replica) for measure, per_replica in values.items()}))
    order = arena.order_of(problem)
    sign = -1.0 if arena.measures[order].better == "high" else 1.0
    return sorted(found, key=lambda pair: sign * pair[1][order])


def _chosen(arena: Arena, only: Sequence[str]) -> list[Entry]:
    entries = arena.entries()
    _known("entry", only, [entry.name for entry in entries])
    wanted = set(only) | {claim.other for entry in entries if entry.name in only for claim in entry.claims}
    return [e for e in entries if not only or e.name in wanted or e.kind in ("original", "oracle")]


def _known(kind: str, names: Sequence[str], known: list[str]) -> None:
    for name in names:
        if name not in known:
            raise InputError(f"There is no {kind} {name!r}, only {', '.join(known)}.{nearest(name, known)}")


def _row(arena: Arena, problem: Any, entry: Entry, replicas: int, line: Any) -> dict[str, Any]:
    """Solve every replica and measure the solutions."""
    shared, settings = 0.0, entry.settings_for(problem.name)
    if entry.shared is not None:
        start = time.perf_counter()
        entry.shared(problem)
        shared = time.perf_counter() - start
    solutions, seconds, memory = [], [], []
    for number in range(replicas):
        replica = problem.replica(number)
        start = time.perf_counter()
        with peak_memory() as peak:
            solutions.append(entry.solve(replica, **settings))
        seconds.append(time.perf_counter() - start)
        memory.append(peak[0])
        line.advance(note=f"{problem.name}: {entry.title}")
    values = {**arena.measure(problem, solutions), "seconds": seconds, "memory": memory}
    values = {name: [float(v) for v in vs] for name, vs in values.items()}
    return {
        "title": entry.title,
        "kind": entry.kind,
        "note": entry.note,
        "weakness": entry.weakness,
        "settings": settings,
        "shared_seconds": shared,
        "values": values,
        "answers": [_answer(answer) for answer in arena.answers(problem, solutions[0])],
    }


def _picture(picture: Picture) -> dict[str, str]:
    return {**_png(picture.image), "title": picture.title, "group": picture.group}


def _answer(answer: Answer) -> dict[str, Any]:
    return {"text": answer.text, "right": answer.right, **_png(answer.image)}


def _png(image: Any) -> dict[str, str]:
    return {} if image is None else {"png": png_address(image)}


def _judge(arena: Arena, entries: Sequence[Entry], problem: str, record: dict[str, Any]) -> None:
    """Measure every claim whose two sides are there; and ratios to the oracle's time."""
    rows = record["rows"]
    oracle = next((row for row in rows.values() if row["kind"] == "oracle"), None)
    if oracle is not None and "speedup" in arena.measures:
        whole = mean(oracle["values"]["seconds"])
        for row in rows.values():
            row["values"]["speedup"] = [whole / max(s, 1e-9) for s in row["values"]["seconds"]]
    arena.derive(rows)
    record["claims"] = []
    for entry in entries:
        for claim in entry.claims:
            if claim.problem == problem and entry.name in rows and claim.other in rows:
                verdict = judge(claim, rows[entry.name]["values"], rows[claim.other]["values"])
                record["claims"].append({"entry": entry.name, **dataclasses.asdict(claim), **verdict})


def _load(path: Path, arena: Arena, settings: dict[str, Any]) -> dict[str, Any]:
    """Evidence to go on with, if it is of the same arena and settings."""
    if path.exists():
        evidence = json.loads(path.read_text())
        if evidence.get("arena") == arena.name and evidence.get("settings") == settings:
            return evidence
    return {
        "arena": arena.name,
        "question": arena.question,
        "created": time.strftime("%Y-%m-%d"),
        "settings": settings,
        "machine": machine(),
        "order": arena.order,
        "kinds": dict(arena.kinds),
        "plots": [dataclasses.asdict(plot) for plot in arena.plots],
        "measures": {name: dataclasses.asdict(measure) for name, measure in arena.measures.items()},
        "problems": {},
    }


def _save(path: Path, evidence: dict[str, Any]) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(evidence, indent=1) + "\n")


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def summary(values: dict[str, list[float]], measure: str) -> tuple[float, float]:
    """Mean and standard error of a measure of a row."""
    found = values.get(measure, [])
    return mean(found), standard_error(found)


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """Largest memory of the process during the block above what it had before, in MiB: yields a list of one number.

    On Linux the kernel's high-water mark is reset and read; elsewhere, and where that is not allowed, NaN. On a GPU
    it is torch's own count.
    """
    result = [float("nan")]
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield result
        result[0] = (torch.cuda.max_memory_allocated() - before) / 2**20
        return
    before_mib = _reset_high_water()
    yield result
    if before_mib is not None:
        result[0] = max(0.0, _status("VmHWM") - before_mib)


def _reset_high_water() -> float | None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return None


def _status(field: str) -> float:
    for text in Path("/proc/self/status").read_text().splitlines():
        if text.startswith(field):
            return int(text.split()[1]) / 1024
    return float("nan")
