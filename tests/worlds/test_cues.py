"""The world `cues`: two cues that agree, each of which can be taken out without changing anything else."""

import pytest
import torch

from retouch.core.errors import InputError
from retouch.worlds import cues, names, world


def test_the_world_is_found():
    assert "cues" in names() and world("cues") is cues
    assert {split: len(cues.data(split)) for split in cues.SPLITS} == cues.SPLITS


def test_images_depend_on_the_arguments_alone(global_rng_untouched):
    one, same, other, test = (
        cues.two_cue(split, count=40, seed=seed)
        for split, seed in (("train", 1), ("train", 1), ("train", 2), ("test", 1))
    )
    assert one.inputs.shape == (40, 1, 16, 16) and one.inputs.dtype == torch.float32
    assert torch.equal(one.inputs, same.inputs) and torch.equal(one.targets, same.targets)
    assert not torch.equal(one.inputs, other.inputs) and not torch.equal(one.inputs, test.inputs)
    assert torch.bincount(one.targets).tolist() == [10] * 4


def test_taking_a_cue_out_changes_its_half_alone():
    both, no_easy, no_hard, neither = (
        cues.two_cue("test", count=60, easy=easy, hard=hard)
        for easy, hard in ((True, True), (False, True), (True, False), (False, False))
    )
    left, right = slice(0, 8), slice(8, 16)
    assert torch.equal(both.inputs[..., right], no_easy.inputs[..., right])
    assert torch.equal(both.inputs[..., left], no_hard.inputs[..., left])
    assert torch.equal(neither.inputs[..., left], no_easy.inputs[..., left])
    assert torch.equal(neither.inputs[..., right], no_hard.inputs[..., right])
    assert torch.equal(both.targets, neither.targets)
    assert float(neither.inputs.mean()) == pytest.approx(cues.PLAIN, abs=0.01)
    assert float(neither.inputs.std()) == pytest.approx(cues.NOISE, abs=0.01)


def test_the_easy_cue_is_the_brightness_of_the_square():
    data = cues.two_cue("test", count=400, hard=False)
    found = (data.inputs[..., :8] - cues.PLAIN).sum((1, 2, 3)) / cues.SQUARE**2 + cues.PLAIN
    nearest = (found[:, None] - torch.tensor(cues.BRIGHTNESS)).abs().argmin(1)
    assert float((nearest == data.targets).float().mean()) > 0.95


def test_the_hard_cue_is_the_orientation_of_the_grating():
    data = cues.two_cue("test", count=400, easy=False)
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(8.0), indexing="ij")
    angles = torch.arange(4) * torch.pi / 4
    wave = torch.exp(2j * torch.pi / cues.WAVE * (y * angles.cos().view(4, 1, 1) + x * angles.sin().view(4, 1, 1)))
    power = torch.einsum("nhw,chw->nc", (data.inputs[:, 0, :, 8:] - cues.PLAIN).to(wave.dtype), wave).abs()
    assert float((power.argmax(1) == data.targets).float().mean()) > 0.95  # known to a matched filter
    easy_only = cues.two_cue("test", count=400, easy=False, hard=False)
    power = torch.einsum("nhw,chw->nc", (easy_only.inputs[:, 0, :, 8:] - cues.PLAIN).to(wave.dtype), wave).abs()
    assert float((power.argmax(1) == easy_only.targets).float().mean()) < 0.4


def test_bad_input_is_named():
    with pytest.raises(InputError, match="split is 'all'"):
        cues.two_cue("all")
    with pytest.raises(InputError, match="count is 0"):
        cues.two_cue(count=0)
