"""`retouch report [FOLDER]`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retouch.core.checkpoints import atomic_file
from retouch.core.errors import InputError


def run(arguments: Sequence[str]) -> None:
    """Make the page of the evidence in a folder."""
    import tyro

    def report(folder: tyro.conf.Positional[Path] = Path("retouch-bench"), markdown: bool = False) -> None:
        """Make the web page of the evidence in a folder.

        Args:
            folder: searched for evidence.json, with all its subfolders.
            markdown: write the arenas' leaderboards as report.md too.
        """
        files = sorted(folder.rglob("evidence.json")) if folder.is_dir() else []
        if not files:
            raise InputError(f"There is no evidence.json in {folder}: run retouch bench or retouch forget first")
        found = [(file, read_evidence(file)) for file in files]
        for file, evidence in found:
            if "arena" not in evidence:
                print(write_request_page(evidence, file.parent))  # noqa: T201
        arenas = [evidence for _, evidence in found if "arena" in evidence]
        if arenas:
            print(write_page(arenas, folder))  # noqa: T201
        if arenas and markdown:
            from retouch.report.tables import markdown as as_markdown

            print(_write("\n".join(map(as_markdown, arenas)), folder / "report.md"))  # noqa: T201

    tyro.cli(report, prog="retouch report", args=list(arguments))


def read_evidence(file: Path) -> dict[str, Any]:
    """Evidence from its file."""
    try:
        evidence = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not evidence of retouch ({error})") from None
    if not isinstance(evidence, dict) or not {"arena", "technique"} & evidence.keys():
        raise InputError(f"{file} is not evidence of retouch: it names neither an arena nor a technique")
    return evidence


def write_page(arenas: Sequence[dict[str, Any]], folder: Path) -> Path:
    """One page of all arenas."""
    from retouch.report.page import arenas_page

    names = " and ".join(evidence["arena"] for evidence in arenas)
    lead = "Every technique on the same work, beside the baselines it must beat and the oracle that is the aim."
    page = arenas_page(arenas, title=f"retouch: {names}", lead=lead)
    return _write(page, folder / "report.html")


def write_request_page(evidence: dict[str, Any], folder: Path) -> Path:
    """The page of one request on a user's model."""
    from retouch.report.page import request_page

    return _write(request_page(evidence), folder / "report.html")


def _write(page: str, path: Path) -> Path:
    with atomic_file(path) as temporary:
        temporary.write_text(page)
    return path
