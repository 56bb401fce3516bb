"""The index of techniques: every file of a room carries a CARD, and the index is found by reading those files.

Nothing is imported to build it, so `retouch list` answers at once: CARD is a call with literal arguments, which `ast`
reads without running the file.
"""

import ast
import dataclasses
import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from retouch.core.errors import InputError, nearest

ROOMS = ("train", "distill", "accelerate", "guide", "edit", "generate", "forget", "retain", "adapt", "audit")
SHAPES = ("objective", "callback", "layer", "sampler part", "model edit", "probe")
PACKAGE = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """What the index says of one technique.

    `plugin` names the function or class that a user hands to us, where it is not called like the file.
    `name` is the file's own name and is filled in by the index.
    """

    title: str
    room: str
    paper: str
    shape: str
    line: str
    tags: tuple[str, ...] = ()
    plugin: str = ""
    name: str = ""

    def __post_init__(self) -> None:
        """Refuse a card that the index could not show."""
        if self.room not in ROOMS:
            raise InputError(f"room is {self.room!r}, but must be one of {', '.join(ROOMS)}")
        if self.shape not in SHAPES:
            raise InputError(f"shape is {self.shape!r}, but must be one of {', '.join(SHAPES)}")
        for field in ("title", "paper", "line"):
            if not getattr(self, field):
                raise InputError(f"{field} of a card is empty, but must say what the technique is")

    @property
    def module(self) -> str:
        """Import path of the technique's file."""
        return f"retouch.{self.room}.{self.name}"

    @property
    def path(self) -> Path:
        """The technique's file, or its folder's `__init__.py`."""
        file = PACKAGE / self.room / f"{self.name}.py"
        return file if file.exists() else PACKAGE / self.room / self.name / "__init__.py"

    @property
    def docstring(self) -> str:
        """The technique's page: its module docstring, read without an import."""
        return ast.get_docstring(ast.parse(self.path.read_text())) or ""

    def load(self) -> Callable[..., Any]:
        """Import the technique and return its plug-in."""
        return getattr(importlib.import_module(self.module), self.plugin or self.name)


def read_card(path: Path) -> Card | None:
    """The CARD of one Python file, or None if it has none."""
    name = path.parent.name if path.name == "__init__.py" else path.stem
    for node in ast.parse(path.read_text(), filename=str(path)).body:
        if isinstance(node, ast.Assign) and [ast.unparse(t) for t in node.targets] == ["CARD"]:
            try:
                fields = {str(k.arg): ast.literal_eval(k.value) for k in node.value.keywords}  # type: ignore[attr-defined]
            except (AttributeError, ValueError):
                raise InputError(f"CARD in {path} is not a call of Card with literal arguments") from None
            return Card(name=name, **fields)
    return None


@functools.cache
def cards(room: str | None = None) -> tuple[Card, ...]:
    """All techniques, or those of one room, by room and name."""
    if room is not None and room not in ROOMS:
        raise InputError(f"{room!r} is no room; the rooms are {', '.join(ROOMS)}.{nearest(room, ROOMS)}")
    found = []
    for folder in (room,) if room else ROOMS:
        home = PACKAGE / folder
        files = [f for f in home.glob("*.py") if not f.stem.startswith("_")] + list(home.glob("[!_]*/__init__.py"))
        read = [read_card(file) for file in files]
        found += sorted((card for card in read if card), key=lambda card: card.name)
    return tuple(found)


def find(name: str, room: str | None = None) -> Card:
    """The card of one technique, with the nearest names in the error if there is none."""
    known = {card.name: card for card in cards(room)}
    if name not in known:
        where = f"in the room {room}" if room else "here"
        raise InputError(f"There is no technique {name!r} {where}.{nearest(name, known) or ' Try: retouch list'}")
    return known[name]


def room_line(room: str) -> str:
    """The room in one sentence: the first line of its package's docstring."""
    docstring = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text()))
    return (docstring or "").splitlines()[0]
