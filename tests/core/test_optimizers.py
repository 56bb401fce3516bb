import copy
import weakref

import pytest
import torch
from torch import nn
from torch.optim import AdamW, Muon

from retouch.core.checkpoints import load_state, save_state
from retouch.core.optimizers import MuonAdamW


class Net(nn.Module):
    """A convolution and a linear layer that Muon takes, and a norm, biases and a narrow head for AdamW."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 24, 3)
            self.norm = nn.GroupNorm(4, 24)
            self.linear = nn.Linear(24, 32)
            self.head = nn.Linear(32, 2)

    def forward(self, x):
        return self.head(self.linear(self.norm(self.conv(x)).relu().mean((2, 3))).relu())


def samples():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(64, 3, 8, 8, generator=draw)
    return x, (x.mean((1, 2, 3)) > 0).long()


def descend(model, optimizer, steps=3):
    x, y = samples()
    for _ in range(steps):
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def same(one, other):
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def test_matrices_take_muons_steps_and_the_rest_adamws():
    model = Net()
    optimizer = MuonAdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    assert optimizer.matrices[0] is model.conv.weight and optimizer.matrices[1] is model.linear.weight
    assert len(optimizer.matrices) == 2
    x, y = samples()
    nn.functional.cross_entropy(model(x), y).backward()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step()

    for name, kind, settings in (
        ("conv.weight", Muon, {"adjust_lr_fn": "match_rms_adamw"}),
        ("linear.weight", Muon, {"adjust_lr_fn": "match_rms_adamw"}),
        ("head.weight", AdamW, {"betas": (0.9, 0.99)}),
        ("conv.bias", AdamW, {"betas": (0.9, 0.99)}),
    ):
        flat = kind is Muon
        alone = nn.Parameter((weights[name].flatten(1) if flat else weights[name]).clone())
        alone.grad = gradients[name].flatten(1) if flat else gradients[name]
        kind([alone], lr=0.01, weight_decay=0.1, **settings).step()
        torch.testing.assert_close(dict(model.named_parameters())[name], alone.view_as(weights[name]))
        assert not torch.equal(alone.view_as(weights[name]), weights[name])


def test_the_rates_of_its_groups_are_what_both_go_by():
    model = Net()
    before = copy.deepcopy(model)
    optimizer = MuonAdamW(model.parameters(), weight_decay=0.0)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    assert same(descend(model, optimizer), before)


def test_weights_of_another_memory_format_or_place_are_stepped_too():
    plain, last = Net(), Net().to(memory_format=torch.channels_last)
    moved = Net()
    optimizers = [MuonAdamW(model.parameters(), lr=0.01) for model in (plain, last, moved)]
    for p in moved.parameters():
        p.data = p.data.clone()
    for model, optimizer in zip((plain, last, moved), optimizers, strict=True):
        descend(model, optimizer)
    assert same(plain, moved)
    for p, q in zip(plain.parameters(), last.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-4, rtol=1e-3)


def test_a_state_read_back_goes_on_as_if_it_had_not_been_stopped(tmp_path):
    model = Net()
    whole = descend(model, MuonAdamW(model.parameters(), lr=0.01), steps=6)

    first = Net()
    optimizer = MuonAdamW(first.parameters(), lr=0.01)
    descend(first, optimizer, steps=3)
    save_state(tmp_path / "state.safetensors", {"model": first.state_dict(), "optimizer": optimizer.state_dict()})
    state = load_state(tmp_path / "state.safetensors")
    second = Net()
    second.load_state_dict(state["model"])
    optimizer = MuonAdamW(second.parameters(), lr=0.01)
    optimizer.load_state_dict(state["optimizer"])
    assert same(descend(second, optimizer, steps=3), whole)


def test_dropped_gradients_are_not_kept_alive():
    model = Net()
    optimizer = MuonAdamW(model.parameters())
    model(samples()[0]).sum().backward()
    gradient = weakref.ref(model.conv.weight.grad)
    optimizer.step()
    optimizer.zero_grad()
    assert gradient() is None


def test_a_model_without_matrices_or_with_nothing_else():
    for part in (nn.GroupNorm(2, 8), nn.Linear(32, 32, bias=False)):
        before = copy.deepcopy(part)
        optimizer = MuonAdamW(part.parameters(), lr=0.01)
        part(torch.randn(4, 8 if isinstance(part, nn.GroupNorm) else 32, generator=torch.Generator().manual_seed(0)))[
            :, 0
        ].sum().backward()
        optimizer.step()
        assert not same(part, before)
    with pytest.raises(ValueError, match="empty"):
        MuonAdamW([])


def test_a_closure_is_called_once_with_gradients():
    model = Net()
    optimizer = MuonAdamW(model.parameters())
    x, y = samples()

    def closure():
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    assert optimizer.step(closure).requires_grad
