"""LOOK's neighbours of every sample in a bank: the search in tiles against the whole matrix, in time and in memory."""

import json

import torch
import torch.nn.functional as F
from ratios import RESULTS, compare

from retouch.arenas.runner import peak_memory
from retouch.train.look import nearest_neighbours

SAMPLES, DIM, K = 12000, 128, 20


def in_tiles(bank):
    return nearest_neighbours(bank, bank, k=K, self_index=torch.arange(len(bank)))


def whole(bank):
    return (bank @ bank.T).fill_diagonal_(-torch.inf).topk(K, sorted=False)


def compare_memory(name, ours, other, *, against, wanted):
    """As `compare`, for the largest memory of each above what it began with."""
    mib = []
    for work in (ours, other):
        with peak_memory() as peak:
            work()
        mib.append(peak[0])
    row = {"ours_mib": round(mib[0], 1), "other_mib": round(mib[1], 1), "ratio": round(mib[1] / max(mib[0], 1.0), 3)}
    row |= {"against": against, "wanted": wanted}
    print(f"{name}: {row['ours_mib']} MiB, {against}: {row['other_mib']} MiB, ratio {row['ratio']} (wanted: {wanted})")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps({**results, name: row}, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    bank = F.normalize(torch.randn(SAMPLES, DIM, generator=torch.Generator().manual_seed(0)), dim=1)
    name = f"neighbours of {SAMPLES} samples, LOOK"
    work = (lambda: in_tiles(bank)), (lambda: whole(bank))
    in_tiles(bank[:256]), whole(bank[:256])  # libraries make themselves at home
    compare_memory(f"{name}, memory", *work, against="the whole matrix", wanted="at least 5")  # first: heaps only grow
    assert torch.equal(in_tiles(bank)[1].sort(1).values, whole(bank).indices.sort(1).values)
    compare(name, *work, against="the whole matrix", rounds=5, wanted="at least 1")
