"""`retouch`: finds the command, and turns bad input into one sentence and exit code 2."""

import importlib
import sys
from collections.abc import Sequence

from retouch import __version__
from retouch.core.cards import ROOMS, cards, room_line
from retouch.core.errors import Diverged, InputError, nearest

COMMANDS = {
    "list": "what there is: the rooms and their techniques",
    "show": "one technique: what it does, when to use it, its paper and its options",
    "bench": "run an arena: the same work for every technique that answers its question",
    "report": "make the web page of the evidence in a folder",
    "demo": "see a digit forgotten, by every technique, in three minutes",
    "worlds": "the embedded worlds: list them, or train their reference models again",
}
RUNNABLE = ("forget", "train", "distill", "guide", "audit")  # rooms with a command of their own so far


def usage() -> str:
    """What `retouch --help` prints."""
    lines = ["retouch changes what a trained model knows, and shows that it changed.", ""]
    lines += ["usage: retouch COMMAND [OPTIONS]     retouch COMMAND --help tells more", "", "commands"]
    lines += [f"  {name:10} {line}" for name, line in COMMANDS.items()]
    lines += ["", "techniques on your own model: retouch ROOM TECHNIQUE [OPTIONS]"]
    for room in ROOMS:
        count = len(cards(room))
        number = f"{count} technique{'s' if count != 1 else ''}" if count else "none yet"
        lines.append(f"  {room:10} {room_line(room)} ({number})")
    return "\n".join(lines)


def run(arguments: Sequence[str]) -> int:
    """Run one command; returns the exit code."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())  # noqa: T201
        return 0
    command, *rest = arguments
    if command == "--version":
        print(f"retouch {__version__}")  # noqa: T201
        return 0
    if command in COMMANDS or command in RUNNABLE:
        return importlib.import_module(f"retouch.cli.{command}_command").run(rest) or 0
    if command in ROOMS and cards(command):
        raise InputError(f"retouch {command} is no command yet, but its techniques can be used: retouch list {command}")
    if command in ROOMS:
        filled = ", ".join(room for room in ROOMS if cards(room))
        raise InputError(f"The room {command} is still empty; the rooms with techniques are: {filled}")
    known = [*COMMANDS, *ROOMS]
    raise InputError(f"There is no command {command!r}.{nearest(command, known) or ' Try: retouch --help'}")


def main() -> None:
    """Entry point of the `retouch` script."""
    try:
        code = run(sys.argv[1:])
    except InputError as error:
        print(f"retouch: {error}", file=sys.stderr)  # noqa: T201
        code = 2
    except Diverged as error:
        print(f"retouch: {error}", file=sys.stderr)  # noqa: T201
        code = 1
    except BrokenPipeError:  # the reader, such as head, has had enough; flushing at exit must not complain either
        sys.stdout = None
        code = 0
    except KeyboardInterrupt:
        print("retouch: stopped", file=sys.stderr)  # noqa: T201
        code = 130
    sys.exit(code)
