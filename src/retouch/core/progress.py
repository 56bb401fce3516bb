"""Progress bars on a terminal, silence elsewhere; bars of nested work share one display."""

import sys
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

T = TypeVar("T")
_display: ContextVar[Any] = ContextVar("display", default=None)


class Bar:
    """One line of progress; without a terminal it does nothing."""

    def __init__(self, display: Any = None, task: Any = None) -> None:
        self.display, self.task = display, task

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Move on by `amount`, with a short note beside the bar."""
        if self.display is not None:
            self.display.update(self.task, advance=amount, note=note)


@contextmanager
def bar(title: str, total: float | None, *, show: bool | None = None, done: float = 0) -> Iterator[Bar]:
    """A progress bar for a block of work.

    Args:
        title: what is being done.
        total: how much there is to do; None if not known.
        show: True or False; None shows it if the standard error stream is a terminal.
        done: how much of it is done already.
    """
    if not (sys.stderr.isatty() if show is None else show):
        yield Bar()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

    class Rate(ProgressColumn):
        def render(self, task: Any) -> str:
            return f"{task.speed:.1f}/s" if task.speed else ""

    display = _display.get()
    outermost = display is None
    if outermost:
        display = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            Rate(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
            transient=True,
            refresh_per_second=5,
        )
        display.start()
    token = _display.set(display)
    task = display.add_task(title, total=total, completed=done, note="")
    try:
        yield Bar(display, task)
    finally:
        _display.reset(token)
        display.remove_task(task)
        if outermost:
            display.stop()


def track(items: Iterable[T], title: str, *, show: bool | None = None) -> Iterator[T]:
    """Go through items under a progress bar."""
    total = len(items) if isinstance(items, Sized) else None
    with bar(title, total, show=show) as progress:
        for item in items:
            yield item
            progress.advance()
