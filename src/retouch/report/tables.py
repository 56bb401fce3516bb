"""Leaderboards: rows of evidence in order, with every number as text, for the terminal and for pages."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Evidence = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """A number as it is shown: text, and the standard error behind it ("" where there is none)."""

    text: str
    error: str = ""


@dataclass(frozen=True)
class Line:
    """One contestant's line of a leaderboard."""

    name: str
    title: str
    kind: str
    note: str
    cells: list[Cell]


@dataclass(frozen=True)
class Leaderboard:
    """Columns and lines, best first; originals and oracles on top."""

    columns: list[tuple[str, dict[str, Any]]]
    lines: list[Line]


def number(value: float, digits: int) -> str:
    """A number as text; long ones without decimals, missing ones as a dash."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.{0 if abs(value) >= 1000 else digits}f}"


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean of the finite values, and its standard error."""
    found = [v for v in values if v is not None and math.isfinite(v)]
    if not found:
        return math.nan, math.nan
    mean = sum(found) / len(found)
    spread = math.sqrt(sum((v - mean) ** 2 for v in found) / (len(found) - 1)) if len(found) > 1 else math.nan
    return mean, spread / math.sqrt(len(found))


def leaderboard(evidence: Evidence, problem: str) -> Leaderboard:
    """The leaderboard of one problem of an arena's evidence."""
    record = evidence["problems"][problem]
    rows = record["rows"]
    columns = [
        (name, measure)
        for name, measure in evidence["measures"].items()
        if any(name in row["values"] and _finite(row["values"][name]) for row in rows.values())
    ]
    order = record.get("order", evidence.get("order"))
    sign = -1 if evidence["measures"][order]["better"] == "high" else 1
    ranks = {"oracle": 0, "original": 1}

    def rank(item: tuple[str, dict[str, Any]]) -> tuple[float, ...]:
        mean = mean_and_error(item[1]["values"].get(order, []))[0]
        return ranks.get(item[1]["kind"], 2), math.inf if math.isnan(mean) else sign * mean

    lines = []
    for name, row in sorted(rows.items(), key=rank):
        cells = []
        for measure_name, measure in columns:
            mean, error = mean_and_error(row["values"].get(measure_name, []))
            digits = measure["digits"]
            cells.append(Cell(number(mean, digits), number(error, digits) if math.isfinite(error) else ""))
        settings = ", ".join(f"{key} {_setting(value)}" for key, value in row.get("settings", {}).items())
        note = "; ".join(part for part in (settings, row.get("note", "")) if part)
        lines.append(Line(name, row["title"], row["kind"], note, cells))
    return Leaderboard(columns, lines)


def _setting(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _finite(values: Sequence[float]) -> bool:
    return any(v is not None and math.isfinite(v) for v in values)


def print_leaderboards(evidence: Evidence) -> None:
    """Print every problem's leaderboard and claims to the terminal, with as many columns as it has room for."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    for problem, record in evidence["problems"].items():
        board = leaderboard(evidence, problem)
        console.print(f"\n[bold]{evidence['arena']}/{problem}[/]  {escape(record['description'])}")
        table = Table(box=None, pad_edge=False)
        table.add_column("", no_wrap=True)
        room = console.width - max((len(line.title) for line in board.lines), default=0)
        shown = []
        for number, (_, measure) in enumerate(board.columns):
            heading = measure["title"] + (f" {measure['unit']}" if measure["unit"] else "")
            room -= 2 + max(len(heading), *(len(line.cells[number].text) for line in board.lines))
            if room < 0:
                break
            table.add_column(heading, justify="right", no_wrap=True)
            shown.append(number)
        styles = {"oracle": "green", "original": "dim", "technique": "bold", "baseline": ""}
        for line in board.lines:
            table.add_row(line.title, *(line.cells[number].text for number in shown), style=styles[line.kind])
        console.print(table)
        for claim in record.get("claims", []):
            mark = {True: "[green]holds[/]", False: "[red]does not hold[/]", None: "not measured"}[claim["holds"]]
            console.print(f"  {mark}: {escape(claim['text'])} [dim]{escape(claim_numbers(claim, evidence))}[/]")


def markdown(evidence: Evidence) -> str:
    """Every problem's leaderboard and claims as Markdown, for documentation."""
    parts = [f"## {evidence['arena']}\n\n{evidence['question']}"]
    for problem, record in evidence["problems"].items():
        board = leaderboard(evidence, problem)
        parts.append(f"### {problem}\n\n{record['description']}")
        parts.append("\n\n".join(record.get("words", [])))
        headings = [m["title"] + (f" ({m['unit']})" if m["unit"] else "") for _, m in board.columns]
        table = [["", *headings], ["---", *["---:"] * len(headings)]]
        for line in board.lines:
            cells = [cell.text + (f" ± {cell.error}" if cell.error else "") for cell in line.cells]
            table.append([f"**{line.title}**" if line.kind == "technique" else line.title, *cells])
        parts.append("\n".join("| " + " | ".join(row) + " |" for row in table))
        marks = {True: "holds", False: "**does not hold**", None: "not measured"}
        claims = record.get("claims", [])
        parts.append("\n".join(f"- {marks[c['holds']]}: {c['text']} ({claim_numbers(c, evidence)})" for c in claims))
    return "\n\n".join(part for part in parts if part) + "\n"


def claim_numbers(claim: dict[str, Any], evidence: Evidence) -> str:
    """The measured difference of a claim in words."""
    if claim["difference"] is None:
        return "not measured"
    rows = evidence["problems"][claim["problem"]]["rows"]
    measure, ours, other = evidence["measures"][claim["measure"]], rows[claim["entry"]], rows[claim["other"]]
    against = other["title"] if claim["factor"] == 1 else f"{claim['factor']:g} x {other['title']}"
    error = "" if claim["error"] is None or not math.isfinite(claim["error"]) else f" ± {claim['error']:.2g}"
    unit = f" {measure['unit']}" if measure["unit"] else ""
    wanted = f"wanted {claim['relation']} {claim['margin']:g}{unit}"
    return f"{measure['title']}: {ours['title']} minus {against} is {claim['difference']:.3g}{error}{unit}, {wanted}"
