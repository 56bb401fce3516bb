"""Makes the page of every technique from its file, a page for each mechanism of core, and the navigation."""

import ast
from pathlib import Path

import mkdocs_gen_files

from retouch.core.cards import PACKAGE, ROOMS, cards, room_line

DOCS = Path(__file__).parent

summary = [
    "* [retouch](index.md)",
    "* [From zero](start.md)",
    *(f"* [{room.capitalize()}]({room}.md)" for room in ROOMS if (DOCS / f"{room}.md").exists()),
    "* [Adding a technique](adding.md)",
]

summary.append("* Techniques")
for room in ROOMS:
    if not cards(room):
        continue
    summary.append(f"    * {room}")
    for card in cards(room):
        path = f"techniques/{room}/{card.name}.md"
        plugin = card.plugin or card.name
        with mkdocs_gen_files.open(path, "w") as page:
            page.write(f"# {card.title}\n\n{card.line}\n\n")
            page.write("| room | shape | paper | tags |\n|---|---|---|---|\n")
            link = card.paper.removeprefix("arXiv:")
            paper = f"[{card.paper}](https://arxiv.org/abs/{link})" if card.paper.startswith("arXiv:") else card.paper
            page.write(f"| {room_line(room)} | {card.shape} | {paper} | {', '.join(card.tags)} |\n\n")
            page.write(f"```python\nfrom {card.module} import {plugin}\n```\n\n::: {card.module}\n")
        summary.append(f"        * [{card.name}]({path})")

summary.append("* Mechanisms")
for file in sorted((PACKAGE / "core").rglob("*.py")):
    if file.stem == "__init__":
        continue
    module = ".".join(("retouch", *file.relative_to(PACKAGE).with_suffix("").parts))
    title = module.removeprefix("retouch.core.")
    first = (ast.get_docstring(ast.parse(file.read_text())) or "").splitlines()[0]
    path = f"core/{title}.md"
    with mkdocs_gen_files.open(path, "w") as page:
        page.write(f"# core.{title}\n\n{first}\n\n::: {module}\n")
    summary.append(f"    * [{title}]({path})")

with mkdocs_gen_files.open("SUMMARY.md", "w") as nav:
    nav.write("\n".join(summary) + "\n")
