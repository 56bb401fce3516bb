"""Plots as inline SVG whose colours are the page's own, so that they follow light and dark mode."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

# Stand-ins that matplotlib draws with, and the style sheet's colours that take their place.
COLOURS = {
    "#010101": "var(--ink)",
    "#020202": "var(--faint)",
    "#030303": "var(--technique)",
    "#040404": "var(--baseline)",
    "#050505": "var(--oracle)",
    "#060606": "var(--original)",
}
INK, FAINT = "#010101", "#020202"
KIND_COLOURS = {"technique": "#030303", "baseline": "#040404", "oracle": "#050505", "original": "#060606"}
KIND_MARKERS = {"technique": "o", "baseline": "s", "oracle": "*", "original": "X"}

Point = Mapping[str, Any]  # title, kind, x, y, and x_error, y_error where known


def _figure(width: float, height: float) -> Any:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _style(axes: Any, title_x: str, title_y: str) -> None:
    axes.set_xlabel(title_x, color=INK)
    axes.set_ylabel(title_y, color=INK)
    axes.tick_params(colors=INK)
    axes.grid(color=FAINT, linewidth=0.5)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)


def _svg(figure: Any, description: str) -> str:
    """The figure as an SVG element with a description for those who cannot see it."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "retouch"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for stand_in, colour in COLOURS.items():
        svg = svg.replace(stand_in, colour)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    label = description.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def scatter(points: Sequence[Point], *, x: str, y: str, description: str) -> str:
    """Contestants as points, the oracle as a star, with names beside them.

    Args:
        points: what is drawn.
        x: title of the horizontal axis.
        y: title of the vertical axis.
        description: the plot in a sentence.
    """
    figure = _figure(7.0, 4.6)
    axes = figure.subplots()
    _style(axes, x, y)
    # What has been destroyed must not squeeze all others together: it is drawn at the edge, with its number.
    kept = [point["y"] for point in points if point["kind"] != "baseline"] or [point["y"] for point in points]
    floor = min(kept) - max(0.6 * (max(kept) - min(kept)), 3.0)
    drawn = []
    for point in points:
        below = point["y"] < floor
        shown = {**point, "y": max(point["y"], floor)}
        if below:
            shown |= {"title": f"{point['title']} (at {point['y']:.0f})", "y_error": None}
        drawn.append(shown)
        colour, marker = KIND_COLOURS[point["kind"]], "v" if below else KIND_MARKERS[point["kind"]]
        size = 15 if point["kind"] == "oracle" else 8
        errors = {"xerr": shown.get("x_error"), "yerr": shown.get("y_error"), "elinewidth": 1}
        axes.errorbar(shown["x"], shown["y"], **errors, fmt=marker, color=colour, markersize=size, zorder=3)
    _names(axes, drawn)
    return _svg(figure, description)


def _names(axes: Any, points: Sequence[Point]) -> None:
    """Write names beside points, further apart where points crowd."""
    axes.margins(0.12)
    axes.autoscale_view()
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    taken: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda p: (-p["y"], p["x"])):
        x, y = (point["x"] - left) / (right - left), (point["y"] - low) / (high - low)
        place, down = y, -0.0275
        while any(abs(place - other) < 0.055 and abs(x - near) < 0.3 for near, other in taken):
            place += down
            if place < 0.02:  # below is the axis with its numbers: upwards from here
                place, down = y, 0.0275
        taken.append((x, place))
        right_half = x > 0.7
        axes.annotate(
            point["title"],
            (point["x"], point["y"]),
            xytext=(x + (-0.025 if right_half else 0.025), place),
            textcoords="axes fraction",
            ha="right" if right_half else "left",
            va="center",
            fontsize=9,
            color=INK,
            arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 0.6} if abs(place - y) > 0.03 else None,
        )


def bars(points: Sequence[Point], *, x: str, description: str) -> str:
    """Contestants as horizontal bars with their errors, in the order given.

    Args:
        points: what is drawn; `x` is the bar's length.
        x: title of the horizontal axis.
        description: the plot in a sentence.
    """
    figure = _figure(7.0, 0.9 + 0.45 * len(points))
    axes = figure.subplots()
    _style(axes, x, "")
    for row, point in enumerate(points):
        axes.barh(
            -row, point["x"], xerr=point.get("x_error"), color=KIND_COLOURS[point["kind"]], ecolor=INK, height=0.62
        )
    axes.set_yticks([-row for row in range(len(points))], [point["title"] for point in points])
    axes.grid(axis="y", visible=False)
    return _svg(figure, description)
