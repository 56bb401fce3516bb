"""Two processes give the weights and the losses of one, whatever divides by what."""

import os
import subprocess
import sys

import _distributed_job as job
import pytest
import torch

from retouch.core.checkpoints import load_state


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """What every run gave on (both processes of one launch, this process)."""
    folder, alone = tmp_path_factory.mktemp("launched"), tmp_path_factory.mktemp("alone")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*launch, job.__file__, str(folder)], check=True, timeout=120, env=environment)
    both = [load_state(folder / f"results-{rank}.safetensors") for rank in range(2)]
    return both, job.run_all(alone)


def close(first, second):
    for name, value in first["model"].items():
        torch.testing.assert_close(value, second["model"][name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [*job.RUNS, "interrupted"])
def test_two_processes_give_the_weights_and_losses_of_one(launched, name):
    both, alone = launched
    assert (both[0]["processes"], alone["processes"]) == (2, 1)
    assert len(alone[name]["history"]) > 1
    for process in both:
        close(process[name], alone[name])
        assert len(process[name]["history"]) == len(alone[name]["history"])
        for record, expected in zip(process[name]["history"], alone[name]["history"], strict=True):
            assert record == pytest.approx(expected, rel=1e-5)


def test_both_processes_have_the_same_weights(launched):
    (first, second), _ = launched
    for name in job.RUNS:
        assert all(torch.equal(value, second[name]["model"][key]) for key, value in first[name]["model"].items())


def test_an_interrupted_run_ends_as_one_that_was_not(launched):
    (first, _), _ = launched
    whole = first["a last batch of one sample"]
    assert all(torch.equal(value, whole["model"][key]) for key, value in first["interrupted"]["model"].items())


def test_every_process_stops_at_a_loss_that_is_not_finite_on_one_of_them(launched):
    both, alone = launched
    assert "not finite at step 2: cross_entropy went wrong" in alone["diverged"]
    assert both[0]["diverged"] == both[1]["diverged"] == alone["diverged"]
