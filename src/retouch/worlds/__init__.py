"""Embedded worlds: small data with exact answers, and reference models trained on it. Nothing is downloaded.

A world is a module with a `KIND` of data and `VARIANTS` of reference models, for which it has `reference(variant)`,
`quality(variant)` and `build(folder, seed=..., checkpoint=...)`; a world without models has none. One of the kind
"images", which techniques for image classifiers run on, also has `CLASSES`, `data(split)`, `image_processor()` and
`train(variant, samples, seed=...)`, and its variants in `QUICK` train in seconds.
"""

from pathlib import Path
from types import ModuleType

WEIGHTS = Path(__file__).parent / "weights"


def names() -> list[str]:
    """All worlds."""
    here = Path(__file__).parent
    packages = [path.parent.name for path in here.glob("*/__init__.py")]
    return sorted(packages + [path.stem for path in here.glob("*.py") if path.stem != "__init__"])


def world(name: str) -> ModuleType:
    """The module of a world, such as "digits"."""
    import importlib

    from retouch.core.errors import InputError, nearest

    if name not in names():
        raise InputError(f"There is no world {name!r}, only {', '.join(names())}.{nearest(name, names())}")
    return importlib.import_module(f"retouch.worlds.{name}")
