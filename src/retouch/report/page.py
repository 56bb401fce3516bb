"""Self-contained web pages from evidence: no scripts, no network, light and dark, for phones and for paper."""

import itertools
import time
from collections.abc import Sequence
from typing import Any

from retouch import __version__
from retouch.report.plots import bars, scatter
from retouch.report.tables import Evidence, claim_numbers, leaderboard, mean_and_error

KINDS = {kind: kind for kind in ("technique", "baseline", "oracle", "original")}  # where evidence has no other names


def _render(template: str, **values: Any) -> str:
    import jinja2

    loader = jinja2.PackageLoader("retouch.report", "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    created = time.strftime("%Y-%m-%d")
    return environment.get_template(f"{template}.html.jinja").render(version=__version__, created=created, **values)


def arenas_page(arenas: Sequence[Evidence], *, title: str, lead: str, words: Sequence[str] = ()) -> str:
    """One page of the evidence of one or more arenas.

    Args:
        arenas: as `arenas.runner.run` gives it.
        title: of the page.
        lead: a sentence below it.
        words: paragraphs before the first arena.
    """
    shown = [
        {**evidence, "problems": [_problem(evidence, name) for name in evidence["problems"]]} for evidence in arenas
    ]
    return _render("arenas", title=title, lead=lead, words=words, arenas=shown)


def _problem(evidence: Evidence, name: str) -> dict[str, Any]:
    record = evidence["problems"][name]
    kinds = {row["kind"] for row in record["rows"].values()}
    board = leaderboard(evidence, name)
    rows = [record["rows"][line.name] for line in board.lines]
    return {
        "description": record["description"],
        "legend": {kind: text for kind, text in evidence.get("kinds", KINDS).items() if kind in kinds},
        "words": record.get("words", []),
        "pictures": _pictures(record.get("pictures", [])),
        "rows": [row for row in rows if row.get("answers")],
        "board": board,
        "seeds": max(len(values) for row in rows for values in row["values"].values()),
        "plots": [
            _plot(evidence, points, plot)
            for plot in evidence["plots"]
            if _drawn(plot, name) and (points := _points(rows, plot))
        ],
        "claims": [{**claim, "numbers": claim_numbers(claim, evidence)} for claim in record.get("claims", [])],
    }


def _drawn(plot: dict[str, Any], problem: str) -> bool:
    return not plot["problems"] or problem in plot["problems"]


def _pictures(pictures: Sequence[dict[str, str]]) -> dict[str, Any]:
    groups = [(group, len(list(found))) for group, found in itertools.groupby(pictures, key=lambda p: p["group"])]
    return {"shown": list(pictures), "groups": groups}


def _axis(measure: dict[str, Any]) -> str:
    return measure["line"].rstrip(".") + (f" ({measure['unit']})" if measure["unit"] else "")


def _points(rows: Sequence[dict[str, Any]], plot: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that have what the plot shows."""
    points = []
    for row in rows:
        point: dict[str, Any] = {"title": row["title"], "kind": row["kind"]}
        for axis in ("x", "y"):
            if plot[axis]:
                point[axis], error = mean_and_error(row["values"].get(plot[axis], []))
                point[f"{axis}_error"] = error if error == error else None  # NaN for a single seed
        if point["x"] == point["x"] and point.get("y", 0) == point.get("y", 0):
            points.append(point)
    return points


def _plot(evidence: Evidence, points: Sequence[dict[str, Any]], plot: dict[str, Any]) -> dict[str, str]:
    measures = evidence["measures"]
    x = _axis(measures[plot["x"]])
    if plot["kind"] == "bars":
        svg = bars(points, x=x, description=f"{plot['text']} Bars for {_names(points)}.")
    else:
        description = f"{plot['text']} Points for {_names(points)}."
        svg = scatter(points, x=x, y=_axis(measures[plot["y"]]), description=description)
    return {"svg": svg, "text": plot["text"]}


def _names(points: Sequence[dict[str, Any]]) -> str:
    return ", ".join(f"{p['title']} ({p['x']:.1f}" + (f", {p['y']:.1f}" if "y" in p else "") + ")" for p in points)


def request_page(evidence: Evidence) -> str:
    """The page of one request on a user's model: to forget something, or to train."""
    board = leaderboard({**evidence, "problems": {"request": {"rows": evidence["rows"]}}}, "request")
    pictures, shown = _pictures(evidence["pictures"]), {"title": evidence["title"], "lead": evidence["lead"]}
    return _render("request", **shown, evidence=evidence, board=board, pictures=pictures)
