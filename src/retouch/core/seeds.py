"""Randomness that is explicit: one seed, and a value derived from it for every use.

`derive(seed, "order", epoch)` gives each use its own stream, so that adding a use never shifts the others, and a run
that resumes at step k needs no stored generator state: step k's randomness is a function of (seed, k).
"""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive(seed: int, *keys: object) -> int:
    """A 63-bit seed that depends on `seed` and on every key; the same on every machine and in every version."""
    text = repr((seed, *keys)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def generator(seed: int, *keys: object) -> torch.Generator:
    """A CPU generator seeded with `derive(seed, *keys)`."""
    return torch.Generator().manual_seed(derive(seed, *keys))


def fresh(generator: torch.Generator | None) -> torch.Generator:
    """The given generator, or a new one seeded by the system, so that the global one is not drawn from."""
    if generator is not None:
        return generator
    unseeded = torch.Generator()
    unseeded.seed()
    return unseeded


def reseed(seed: int) -> None:
    """Set the global generators of torch, numpy and random; only for use inside `isolated`."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  a user's transform may draw from the global generator
    random.seed(seed)


@contextmanager
def isolated(seed: int | None = None) -> Iterator[None]:
    """Run a block under its own global randomness and give the caller's back afterwards, also on an error.

    Layers such as dropout draw from torch's global generator. Inside this block they may, seeded with `seed` if one is
    given; outside, nothing is seen of it.
    """
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
        try:
            if seed is not None:
                reseed(seed)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
