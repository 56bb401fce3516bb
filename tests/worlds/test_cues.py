"""The world `cues`: two cues for one class, of which either can be taken out."""

import pytest
import torch

from retouch.core.errors import InputError
from retouch.worlds import cues


def test_images_are_seeded_and_splits_differ(global_rng_untouched):
    one, two, other = (cues.two_cue("train", count=20, seed=seed) for seed in (1, 1, 2))
    assert one.inputs.shape == (20, 1, 16, 16)
    assert torch.equal(one.inputs, two.inputs) and torch.equal(one.targets, two.targets)
    assert not torch.equal(one.inputs, other.inputs)
    assert not torch.equal(one.inputs, cues.two_cue("test", count=20, seed=1).inputs)
    assert set(cues.two_cue("test", count=200).targets.tolist()) == {0, 1, 2, 3}


def test_taking_a_cue_out_leaves_the_other_half_as_it_was():
    whole = cues.two_cue("test", count=50)
    no_easy, no_hard = cues.two_cue("test", count=50, easy=False), cues.two_cue("test", count=50, hard=False)
    for changed, kept, gone in ((no_easy, slice(8, 16), slice(0, 8)), (no_hard, slice(0, 8), slice(8, 16))):
        assert torch.equal(changed.targets, whole.targets)
        assert torch.equal(changed.inputs[..., kept], whole.inputs[..., kept])
        assert not torch.equal(changed.inputs[..., gone], whole.inputs[..., gone])


def test_the_easy_cue_tells_the_class_and_is_gone_when_taken_out():
    def separation(data):
        levels = data.inputs[..., :8].mean((1, 2, 3))
        means = torch.stack([levels[data.targets == c].mean() for c in range(4)])
        return float(means.std() / levels.std())

    assert separation(cues.two_cue("test", count=400)) > 0.8
    assert separation(cues.two_cue("test", count=400, easy=False)) < 0.3


def test_bad_input_is_refused():
    with pytest.raises(InputError, match="split is 'all'"):
        cues.two_cue("all", count=3)
    with pytest.raises(InputError, match="count is 0"):
        cues.two_cue("train", count=0)
