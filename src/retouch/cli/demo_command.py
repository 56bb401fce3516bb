"""`retouch demo`: the arenas of forgetting in short, and a page."""

from collections.abc import Sequence
from pathlib import Path


def run(arguments: Sequence[str]) -> None:
    """Forget a digit by every technique, and show it on a page."""
    import tyro

    def demo(out: Path = Path("retouch-demo"), replicas: int = 2) -> None:
        """See a digit forgotten by every technique beside the baselines; about two minutes on two cores.

        Args:
            out: folder of the page and its evidence.
            replicas: networks that each technique is tried on.
        """
        import torch

        from retouch.arenas.contest import Terms, arena
        from retouch.arenas.runner import run as run_arena
        from retouch.report.page import arenas_page
        from retouch.report.tables import print_leaderboards

        torch.set_num_threads(1)  # these networks are too small for more, and the machine may be busy
        forget = run_arena(
            arena("forget"),
            out / "forget",
            problems=("class", "subpopulation"),
            terms=Terms(replicas=replicas, quick=True),
        )
        deletions = run_arena(arena("deletions"), out / "deletions", problems=("simulated",), terms=Terms(replicas=64))
        print_leaderboards(forget)
        print_leaderboards(deletions)
        page = out / "index.html"
        page.write_text(
            arenas_page(
                [forget, deletions],
                title="A network forgets",
                lead="A classifier of handwritten digits is made to forget, by every technique of the room.",
                words=WORDS,
            )
        )
        print(f"\nThe page: {page.resolve()}")  # noqa: T201

    tyro.cli(demo, prog="retouch demo", args=list(arguments))


WORDS = (
    "A network has learned ten digits. Somebody asks that some of what it learned be taken out: a whole digit, a few "
    "images of one person's hand. Training again without them is the honest answer, and the dear one. The techniques "
    "here change the trained network instead.",
    "How to read it: what has never been seen is not answered with zero. The row called retrained is a network that "
    "really was trained without the samples, and every number is good when it is near that row's, for the samples to "
    "forget as for all others. The same work with more networks and all problems is run by retouch bench.",
)
