"""What the benchmarks share: two ways of doing one thing, timed in turn in one run, and their ratio."""

import json
import time
from pathlib import Path
from statistics import median

import torch

RESULTS = Path(__file__).parent / "results.json"


def seconds(work) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(name: str, ours, other, *, against: str, rounds: int = 7, wanted: str = "") -> float:
    """Time both in turn, print the median of each and of their ratio other / ours, and keep it in results.json.

    Args:
        name: what is compared.
        ours: function without arguments.
        other: the alternative, likewise.
        against: the alternative's name.
        rounds: how often each is timed, after one round that does not count.
        wanted: what the ratio should be, in words.
    """
    ours(), other()
    pairs = [(seconds(ours), seconds(other)) for _ in range(rounds)]
    ratio = median(b / a for a, b in pairs)
    row = {
        "ours_seconds": round(median(a for a, _ in pairs), 5),
        "other_seconds": round(median(b for _, b in pairs), 5),
        "ratio": round(ratio, 3),
        "against": against,
        "wanted": wanted,
        "threads": torch.get_num_threads(),
    }
    print(
        f"{name}: {row['ours_seconds']} s, {against}: {row['other_seconds']} s, ratio {row['ratio']} (wanted: {wanted})"
    )
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps({**results, name: row}, indent=1, sort_keys=True) + "\n")
    return ratio
