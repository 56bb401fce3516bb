"""`retouch show NAME`."""

import re
from collections.abc import Sequence

from retouch.core.cards import find


def run(arguments: Sequence[str]) -> None:
    """Print one technique's page."""
    import tyro

    from retouch.cli.main import RUNNABLE

    def show(name: tyro.conf.Positional[str]) -> None:
        """One technique: what it does, when to use it, its paper and its options.

        Args:
            name: of the technique, as retouch list has it.
        """
        card = find(name)
        plugin = card.plugin or card.name
        print(f"{card.title}\n{card.room}, {card.shape}; {card.paper}; {', '.join(card.tags)}\n")  # noqa: T201
        print(card.docstring)  # noqa: T201
        print(f"\nfrom {card.module} import {plugin}")  # noqa: T201
        # Read, not imported: what `retouch guide` and `retouch audit` run are functions of these names.
        parts = re.search(r"^def (steer|findings)\(", card.path.read_text(), re.MULTILINE)
        if card.room in RUNNABLE and (parts or card.room not in ("guide", "audit")):
            print(f"retouch {card.room} {card.name} --help lists its options.")  # noqa: T201

    tyro.cli(show, prog="retouch show", args=list(arguments))
