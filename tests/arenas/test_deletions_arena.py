"""The arena `deletions`: bookkeeping exactly, training in a smoke."""

import pytest
import torch

from retouch.arenas import deletions
from retouch.arenas.contest import Terms
from retouch.arenas.deletions import ARENA, DeletionProblem, Served, measure
from retouch.arenas.runner import run


def test_simulated_streams_agree_with_the_coupon_collector(tmp_path):
    evidence = run(ARENA, tmp_path, problems=["simulated"], terms=Terms(replicas=300))
    rows = evidence["problems"]["simulated"]["rows"]
    harmonic = {n: sum(1 / k for k in range(1, n + 1)) for n in (5, 10, 30)}
    for name, firsts in (("sisa", 5), ("s3t_two_orders", 10), ("s3t", 30)):
        served = rows[name]["values"]["served"]
        error = (sum((v - sum(served) / 300) ** 2 for v in served) / 299) ** 0.5 / 300**0.5
        assert abs(sum(served) / 300 - 30 * harmonic[firsts]) < 4 * error, name
    assert all(claim["holds"] for claim in evidence["problems"]["simulated"]["claims"])


def test_slices_are_disjoint_and_the_backbone_saw_none_of_them():
    problem = DeletionProblem("stream", Terms(replicas=1))
    rows = torch.cat([rows for shard in problem.rows for rows in shard])
    assert sorted(rows.tolist()) == list(range(len(problem.private)))
    assert len(problem.public) + len(problem.private) == 1200


def test_a_dead_ensemble_counts_as_a_guess():
    problem = DeletionProblem("stream", Terms(replicas=1))
    perfect = torch.nn.functional.one_hot(problem.test.targets, 10).float()
    values = measure(problem, [Served(3, [perfect] * 4 + [None] * 30)])
    assert values["start"] == [100.0]
    assert values["after_5"] == [10.0]
    assert values["area"] == [pytest.approx((3 * 100 + 17 * 10) / 20)]


@pytest.mark.slow
def test_smoke_with_real_training_is_exact(tmp_path, monkeypatch):
    from retouch.forget.s3t import stage_trainer
    from retouch.worlds import digits

    short = property(lambda self: stage_trainer(epochs=1, lr=5e-3, batch_size=64))
    monkeypatch.setattr(DeletionProblem, "train_stage", short)
    monkeypatch.setattr(deletions.digits, "Recipe", lambda *args, **options: digits.RECIPES["quick"])
    monkeypatch.setitem(digits.RECIPES, "quick", _Short())
    evidence = run(ARENA, tmp_path, problems=["stream"], terms=Terms(replicas=2))
    rows = evidence["problems"]["stream"]["rows"]
    assert rows["s3t"]["values"]["exact"] == [1.0, 1.0]
    assert min(rows["s3t"]["values"]["served"]) >= max(1, min(rows["sisa"]["values"]["served"]))
    assert rows["whole"]["values"]["served"] == [0.0, 0.0]


class _Short:
    def train(self, model, samples, *, seed):
        return model.eval()
