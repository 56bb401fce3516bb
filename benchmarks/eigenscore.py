"""EigenScore by Chebyshev moments against eigenvalues of the Gram matrix, for as many answers as dimensions."""

import torch
from ratios import compare

from retouch.train.send import efficient_eigenscore, eigenscore

if __name__ == "__main__":
    for size in (500, 1000, 2000):
        embeddings = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
        compare(
            f"efficient EigenScore, {size} answers of {size} dimensions",
            lambda embeddings=embeddings: efficient_eigenscore(embeddings),
            lambda embeddings=embeddings: eigenscore(embeddings),
            against="the exact score",
            rounds=3,
            wanted="at least 2 at 2000",
        )
