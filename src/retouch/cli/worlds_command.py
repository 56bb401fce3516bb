"""`retouch worlds [list | build NAME]`."""

from collections.abc import Sequence
from pathlib import Path

from retouch.core.errors import InputError
from retouch.worlds import WEIGHTS, names, world


def run(arguments: Sequence[str]) -> None:
    """List the worlds, or train the reference models of one again."""
    import tyro

    def list_worlds() -> None:
        """The embedded worlds."""
        for name in names():
            module = world(name)
            print(f"{name}: {(module.__doc__ or '').splitlines()[0]}")  # noqa: T201
            for variant in module.VARIANTS:
                print(f"  {name}/{variant:6} {module.quality(variant)}")  # noqa: T201

    def build(
        name: tyro.conf.Positional[str], out: Path = WEIGHTS, seed: int = 0, checkpoint: Path | None = None
    ) -> None:
        """Train the reference models of a world and write them with their measured quality.

        Args:
            name: of the world.
            out: folder for the weights; those of the package if left out.
            seed: of weights and orders.
            checkpoint: folder from which a run that was stopped goes on.
        """
        module = world(name)
        if not module.VARIANTS:
            raise InputError(f"The world {name} has no reference models to build")
        module.build(out, seed=seed, checkpoint=checkpoint)

    tyro.extras.subcommand_cli_from_dict(
        {"list": list_worlds, "build": build}, prog="retouch worlds", args=list(arguments) or ["list"]
    )
