"""`retouch list [ROOM]`."""

from collections.abc import Sequence

from retouch.core.cards import ROOMS, cards, room_line


def run(arguments: Sequence[str]) -> None:
    """Print the techniques of all rooms, or of one."""
    import tyro

    def list_techniques(room: tyro.conf.Positional[str] = "") -> None:
        """What there is.

        Args:
            room: one room; all of them if left out.
        """
        rooms = [room] if room else [name for name in ROOMS if cards(name)]
        for name in rooms:
            found = cards(name)
            print(f"\n{name}: {room_line(name)}")  # noqa: T201
            for card in found:
                print(f"  {card.name:24} {card.line}")  # noqa: T201
            if not found:
                print("  nothing yet")  # noqa: T201
        print("\nretouch show NAME tells more.")  # noqa: T201

    tyro.cli(list_techniques, prog="retouch list", args=list(arguments))
