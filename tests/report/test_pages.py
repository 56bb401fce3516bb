"""Leaderboards and pages: right numbers, no scripts, no network, readable by everyone."""

import itertools
import re
from html.parser import HTMLParser

import pytest

from retouch.report.page import arenas_page, request_page
from retouch.report.plots import _figure, _names, bars, scatter
from retouch.report.tables import claim_numbers, leaderboard, mean_and_error, number, print_leaderboards

SETTINGS = {"lr": 0.01, "kind": "dense", "scaled": True, "steps": 3}


@pytest.fixture
def evidence():
    def row(title, kind, gap, **more):
        values = {"gap": gap, "forget": [v * 2 for v in gap]}
        return {"title": title, "kind": kind, "note": "", "settings": {}, "values": values, "answers": [], **more}

    claim = {
        "entry": "ours",
        "text": "Ours is <better>.",
        "problem": "p",
        "measure": "gap",
        "other": "worse",
        "relation": "at most",
        "margin": 0.0,
        "factor": 0.5,
        "source": "table 1",
        "difference": -1.25,
        "error": 0.5,
        "holds": True,
    }
    failed = {**claim, "text": "Ours is free.", "holds": False}
    answers = [{"text": "3 (99%)", "right": False}, {"text": "4 (98%)", "right": True}]
    return {
        "arena": "a",
        "question": "Which?",
        "created": "2026-01-01",
        "settings": {"replicas": 3},
        "machine": {"device": "cpu", "threads": 2, "torch": "2"},
        "order": "gap",
        "kinds": {"technique": "technique", "baseline": "baseline", "oracle": "the aim", "original": "original"},
        "plots": [
            {"kind": "scatter", "x": "forget", "y": "gap", "text": "Two of them.", "problems": []},
            {"kind": "bars", "x": "gap", "y": "", "text": "One of them.", "problems": []},
            {"kind": "bars", "x": "gap", "y": "", "text": "Not here.", "problems": ["elsewhere"]},
        ],
        "measures": {
            "gap": {"title": "gap", "unit": "%", "better": "low", "digits": 1, "line": "Distance."},
            "forget": {"title": "forget", "unit": "", "better": "oracle", "digits": 2, "line": "Accuracy."},
            "absent": {"title": "absent", "unit": "", "better": "low", "digits": 1, "line": "Nobody has it."},
        },
        "problems": {
            "p": {
                "description": "A question & its answer",
                "words": ["In words."],
                "pictures": [
                    {"png": "data:image/png;base64,AA==", "title": "a 3", "group": "to forget"},
                    {"png": "data:image/png;base64,AA==", "title": "a 4", "group": "to keep"},
                ],
                "claims": [claim, failed],
                "rows": {
                    "worse": row("worse", "baseline", [5.0, 6.0, 7.0]),
                    "ours": row("ours", "technique", [1.0, 2.0, 3.0], answers=answers, settings=SETTINGS, note="n"),
                    "again": row("again", "oracle", [0.5, 0.5, 0.5], answers=answers),
                    "before": row("before", "original", [9.0, 9.0, 9.0]),
                },
            }
        },
    }


class Reader(HTMLParser):
    """Collects what accessibility depends on, and checks that tags close in order."""

    void = frozenset({"meta", "img", "br", "link", "input", "hr", "path", "use", "rect"})

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.headings = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in self.void:
            assert self.open.pop() == tag


def read(html):
    reader = Reader()
    reader.feed(html)
    assert reader.open == []
    return reader


def check_page(html):
    reader = read(html)
    names = [tag for tag, _ in reader.tags]
    assert "script" not in names and "link" not in names and "iframe" not in names
    assert html.startswith("<!doctype html>")
    assert dict(reader.tags)["html"]["lang"] == "en"
    assert any(tag == "meta" and a.get("name") == "viewport" for tag, a in reader.tags)
    for tag, attributes in reader.tags:
        for where in ("src", "href", "xlink:href"):
            address = attributes.get(where) or ""
            assert address.startswith(("data:", "#")) or not address, f"{tag} fetches {address}"
        assert not any(name.startswith("on") for name in attributes)
        if tag == "img":
            assert attributes.get("alt")
        if tag == "svg":
            assert attributes.get("role") == "img" and attributes.get("aria-label")
    assert "url(http" not in html and "@import" not in html
    assert reader.headings.count(1) == 1
    assert all(b <= a + 1 for a, b in zip(reader.headings, reader.headings[1:], strict=False))
    return reader


def test_leaderboard_is_ordered_with_the_oracle_on_top(evidence):
    board = leaderboard(evidence, "p")
    assert [line.name for line in board.lines] == ["again", "before", "ours", "worse"]
    assert [name for name, _ in board.columns] == ["gap", "forget"]
    assert (board.lines[2].cells[0].text, board.lines[2].cells[0].error) == ("2.0", "0.6")
    assert board.lines[2].note == "lr 0.01, kind dense, scaled True, steps 3; n"
    evidence["measures"]["gap"]["better"] = "high"
    assert [line.name for line in leaderboard(evidence, "p").lines][2:] == ["worse", "ours"]


def test_numbers_as_text():
    assert (number(1.25, 1), number(12345.6, 2), number(float("nan"), 1)) == ("1.2", "12346", "–")
    assert mean_and_error([1.0, float("nan"), 3.0]) == (2.0, pytest.approx(1.0))


def test_arena_page_is_whole(evidence):
    html = arenas_page([evidence], title="T <1>", lead="L")
    reader = check_page(html)
    assert "T &lt;1&gt;" in html and "A question &amp; its answer" in html and "Ours is &lt;better&gt;." in html
    assert html.count("does not hold</span>") == 1
    assert "One of them." in html and "Not here." not in html
    assert [tag for tag, _ in reader.tags].count("svg") >= 2
    assert "✗ 3 (99%)" in html and "✓ 4 (98%)" in html
    assert "gap: ours minus 0.5 x worse is -1.25 ± 0.5 %, wanted at most 0 %" in html


def test_a_board_says_of_how_many_seeds_it_is(evidence):
    """Of its own: problems of one arena may have been measured on different numbers of them."""
    problem = evidence["problems"]["p"]
    single = {
        name: {**row, "values": {k: v[:1] for k, v in row["values"].items()}} for name, row in problem["rows"].items()
    }
    evidence["problems"]["q"] = {**problem, "rows": single}
    html = arenas_page([evidence], title="T", lead="L")
    counts = [html.count(text) for text in ("Mean over 3 seeds, ± standard error; best first", "One seed; best first")]
    assert counts[0] == counts[1] > 0


def test_a_plot_of_what_nobody_has_is_left_out(evidence):
    evidence["plots"].append({"kind": "scatter", "x": "absent", "y": "gap", "text": "Nobody is here.", "problems": []})
    html = arenas_page([evidence], title="T", lead="L")
    assert "Two of them." in html and "Nobody is here." not in html


def test_names_of_crowded_points_stay_inside_of_the_plot():
    crowd = [{"title": f"at the bottom {k}", "kind": "baseline", "x": 8.0 + 0.01 * k, "y": 0.1 * k} for k in range(5)]
    figure = _figure(7.0, 4.6)
    axes = figure.subplots()
    axes.scatter([0.0, *(p["x"] for p in crowd)], [100.0, *(p["y"] for p in crowd)])
    _names(axes, [{"title": "far", "kind": "oracle", "x": 0.0, "y": 100.0}, *crowd])
    heights = sorted(text.xyann[1] for text in axes.texts)
    assert heights[0] >= 0 and heights[-1] <= 1
    assert min(b - a for a, b in itertools.pairwise(heights)) > 0.05


def test_a_page_shows_what_solutions_draw(evidence):
    problem = evidence["problems"]["p"]
    for picture in problem["pictures"]:
        del picture["png"]
    for name, row in problem["rows"].items():
        row["answers"] = [
            {"text": "", "right": right, "png": f"data:image/png;base64,{name}{right}"} for right in (True, False)
        ]
    html = arenas_page([evidence], title="T", lead="L")
    reader = check_page(html)
    drawn = [attributes["src"] for tag, attributes in reader.tags if tag == "img"]
    assert len(drawn) == 8 and len(set(drawn)) == 8  # a row a solution, in the order of the board
    assert "What each row draws" in html and "sees in the image" not in html


def test_claims_in_words(evidence):
    claim = evidence["problems"]["p"]["claims"][0]
    assert claim_numbers({**claim, "difference": None}, evidence) == "not measured"


def test_terminal_leaderboard(evidence, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    print_leaderboards(evidence)
    printed = capsys.readouterr().out
    assert "ours" in printed and "does not hold" in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_colours_have_contrast_in_both_modes(evidence):
    html = arenas_page([evidence], title="T", lead="L")
    light, dark = re.findall(r":root \{(.*?)\}", html, flags=re.DOTALL)[:2]
    for mode in (light, dark):
        colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", mode))
        for name in ("ink", "soft", "technique", "baseline", "oracle", "original", "good", "bad"):
            for ground in ("paper", "panel"):
                assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)


def contrast(one, other):
    def luminance(colour):
        parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_plots_use_the_pages_colours_and_describe_themselves():
    points = [
        {"title": "a & b", "kind": "technique", "x": 1.0, "y": 90.0, "x_error": 0.1, "y_error": None},
        {"title": "o", "kind": "oracle", "x": 0.0, "y": 91.0},
        {"title": "gone", "kind": "baseline", "x": 0.5, "y": 3.0},
    ]
    for svg in (scatter(points, x="x", y="y", description='A "plot"'), bars(points, x="x", description='A "plot"')):
        assert svg.startswith("<svg") and "var(--technique)" in svg and "#030303" not in svg
        assert "A &quot;plot&quot;" in svg
        assert "<script" not in svg
    assert "gone (at 3)" in scatter(points, x="x", y="y", description="d")  # drawn at the edge, not out of scale


def test_request_page_is_whole(evidence):
    rows = {"before": evidence["problems"]["p"]["rows"]["before"], "after": evidence["problems"]["p"]["rows"]["ours"]}
    rows["before"]["answers"] = rows["after"]["answers"]
    request = {
        **{key: evidence[key] for key in ("measures", "order")},
        "technique": {"name": "ssd", "title": "SSD", "paper": "arXiv:1", "line": "It forgets."},
        "title": "SSD: label=7",
        "caption": "The model before and after",
        "lead": "It forgets.",
        "request": {"forget": "label=7", "samples to forget": 3},
        "options": {"alpha": "5.0"},
        "record": {"weights before (SHA-256)": "00" * 32},
        "pictures": evidence["problems"]["p"]["pictures"],
        "words": ["It did."],
        "rows": rows,
    }
    html = request_page(request)
    check_page(html)
    assert "SSD: label=7" in html and "00" * 32 in html and "It did." in html
