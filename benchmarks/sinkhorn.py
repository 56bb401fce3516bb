"""Sinkhorn in log space against POT's on the same problems, with as many scalings and the same plan."""

import ot
import torch
from ratios import compare

from retouch.distill.sinkd import sinkhorn_plan

SCALINGS = 20

if __name__ == "__main__":
    draw = torch.Generator().manual_seed(0)
    for size, epsilon in ((64, 0.1), (256, 0.1), (64, 0.01)):
        p, q = (torch.randn(size, 100, generator=draw).softmax(-1) for _ in range(2))
        uniform = torch.ones(size)

        def pot(p=p, q=q, uniform=uniform, epsilon=epsilon):
            settings = {"method": "sinkhorn_log", "numItermax": SCALINGS, "stopThr": 0, "warn": False}
            return ot.sinkhorn(uniform, uniform, torch.cdist(p, q, p=1), epsilon, **settings)

        def ours(p=p, q=q, epsilon=epsilon):
            return sinkhorn_plan(p, q, epsilon=epsilon, n_iters=SCALINGS)[0]

        # POT ends with rows, we with columns: converged or not, each is held against its own fixed point.
        exact = sinkhorn_plan(p.double(), q.double(), epsilon=epsilon, n_iters=5000)[0]
        errors = [float((plan - exact).abs().sum() / size) for plan in (ours(), pot())]
        print(f"{size} x {size}, epsilon {epsilon}: error of the plan {errors[0]:.2e}, POT's {errors[1]:.2e}")
        compare(
            f"Sinkhorn plan, {size} x {size}, epsilon {epsilon}, {SCALINGS} scalings",
            ours,
            pot,
            against="POT's sinkhorn_log",
            rounds=15,
            wanted="more than 1",
        )
