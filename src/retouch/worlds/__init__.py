"""Embedded worlds: small data with exact answers, and reference models trained on it. Nothing is downloaded.

A world is a module with `CLASSES`, `VARIANTS` of models (those in `QUICK` train in seconds), `data(split)`,
`image_processor()`, `train(variant, samples, seed=...)`, `reference(variant)`, `quality(variant)` and `build(folder)`.
"""

from pathlib import Path
from types import ModuleType

WEIGHTS = Path(__file__).parent / "weights"


def names() -> list[str]:
    """All worlds."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem != "__init__")


def world(name: str) -> ModuleType:
    """The module of a world, such as "digits"."""
    import importlib

    from retouch.core.errors import InputError, nearest

    if name not in names():
        raise InputError(f"There is no world {name!r}, only {', '.join(names())}.{nearest(name, names())}")
    return importlib.import_module(f"retouch.worlds.{name}")
