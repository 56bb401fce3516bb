"""The moving average of weights: its formula, resuming, and what the model ends with."""

import pytest
import torch
from torch import nn

from retouch.core.averages import MovingAverage
from retouch.core.errors import InputError
from retouch.core.loop import Callback, Checkpoint, fit

DATA = (torch.linspace(-1, 1, 32).view(16, 2), torch.arange(16) % 3)


def trained(steps=6, decay=0.9, callbacks=(), **settings):
    model = nn.Linear(2, 3)
    with torch.no_grad():
        model.weight.fill_(0.1)
        model.bias.zero_()
    average = MovingAverage(decay)
    fit(model, DATA, steps=steps, batch_size=4, callbacks=[*callbacks, average], progress=False, **settings)
    return model


class Followed(Callback):
    """The average by its formula, from the weights of every step."""

    def __init__(self, decay):
        self.decay = decay

    def on_start(self, run):
        self.mean = run.module.weight.detach().clone()

    def on_step(self, run):
        kept = min(self.decay, (1 + run.step) / (10 + run.step))
        self.mean = kept * self.mean + (1 - kept) * run.module.weight.detach()
        self.last = run.module.weight.detach().clone()


def test_the_model_ends_with_the_average():
    beside = Followed(0.9)
    model = trained(decay=0.9, callbacks=[beside])
    torch.testing.assert_close(model.weight.detach(), beside.mean)
    assert not torch.equal(model.weight, beside.last)


def test_without_memory_it_is_the_last_weights():
    beside = Followed(0.0)
    assert torch.equal(trained(decay=0.0, callbacks=[beside]).weight, beside.last)


def test_a_run_that_was_stopped_ends_with_the_same_average(tmp_path):
    class Stop(Callback):
        at = 3

        def on_step(self, run):
            if run.step == self.at:
                raise KeyboardInterrupt

    whole, settings = trained(), {"callbacks": [Stop()], "checkpoint": Checkpoint(tmp_path, every=1)}
    with pytest.raises(KeyboardInterrupt):
        trained(**settings)
    Stop.at = None
    assert torch.equal(trained(**settings).weight, whole.weight)
    assert torch.equal(trained(**settings).weight, whole.weight)  # when it is all done


def test_frozen_weights_are_left_alone():
    model = nn.Linear(2, 3)
    model.bias.requires_grad_(False)
    bias = model.bias.clone()
    fit(model, DATA, steps=2, callbacks=[MovingAverage()], progress=False)
    assert torch.equal(model.bias, bias)


def test_a_decay_that_is_none():
    with pytest.raises(InputError, match="decay is 1.5"):
        MovingAverage(1.5)
