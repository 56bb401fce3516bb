"""`retouch bench [ARENA]`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from retouch.arenas.contest import Arena


def run(arguments: Sequence[str]) -> None:
    """Run arenas and make their page."""
    import tyro

    def bench(
        arena: tyro.conf.Positional[str] = "",
        problem: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
        only: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
        replicas: int = 16,
        vary: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
        quick: bool = False,
        search: str = "",
        threads: int = 1,
        out: Path = Path("retouch-bench"),
    ) -> None:
        """Run an arena: the same work for every technique that answers its question.

        A run that was stopped goes on where it was, as long as its settings are the same.

        Args:
            arena: its name; all arenas if left out.
            problem: only this problem; may be given again.
            only: only this entry, besides the original and the oracle; may be given again.
            replicas: seeds; 64 and more for distances between distributions (KLoM).
            vary: what the seeds vary: train, forget or evaluate; may be given again; all three if left out.
            quick: save on what entries share, such as subset models.
            search: try this entry's grid of settings on seeds and data that no evidence uses, and print the result.
            threads: of torch; the networks of most arenas are too small for more than one.
            out: folder of the evidence.
        """
        import torch

        from retouch.arenas.contest import VARIED, Terms, arena_names
        from retouch.arenas.contest import arena as find_arena
        from retouch.core.errors import positive

        positive("threads", threads)
        torch.set_num_threads(threads)
        terms = Terms(replicas=replicas, vary=vary or VARIED, quick=quick)
        arenas = [find_arena(name) for name in ([arena] if arena else arena_names())]
        if search:
            _search(arenas, search, problem, replicas)
            return
        evidence = []
        for chosen in arenas:
            from retouch.arenas.runner import run as run_arena
            from retouch.report.tables import print_leaderboards

            evidence.append(run_arena(chosen, out / chosen.name, problems=problem, only=only, terms=terms))
            print_leaderboards(evidence[-1])
        from retouch.cli.report_command import write_page

        print(f"\nThe page: {write_page(evidence, out)}")  # noqa: T201

    tyro.cli(bench, prog="retouch bench", args=list(arguments))


def _search(arenas: Sequence["Arena"], name: str, problems: Sequence[str], replicas: int) -> None:
    from retouch.arenas.runner import search
    from retouch.core.errors import InputError, nearest

    entries = [(arena, entry) for arena in arenas for entry in arena.entries()]
    known = list(dict.fromkeys(entry.name for _, entry in entries))
    if name not in known:
        raise InputError(f"search is {name!r}, but must be one of {', '.join(known)}.{nearest(name, known)}")
    for arena, entry in entries:
        if entry.name != name:
            continue
        for problem in problems or entry.problems or arena.problems:
            print(f"{arena.name}/{problem}: {name}, by {arena.order_of(problem)}")  # noqa: T201
            for settings, values in search(arena, name, problem, replicas=replicas):
                shown = ", ".join(f"{measure} {value:.2f}" for measure, value in values.items())
                print(f"  {settings}: {shown}")  # noqa: T201
