"""Many models trained at once are the models that would be trained one by one."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import OneCycleLR

from retouch.core import seeds
from retouch.core.data import TensorData
from retouch.core.ensemble import Ensemble, train_many
from retouch.core.errors import InputError
from retouch.worlds.digits import DigitsCNN

N, MODELS = 24, 5
DRAW = torch.Generator().manual_seed(0)
X, Y = torch.randn(N, 4, generator=DRAW), torch.randint(3, (N,), generator=DRAW)
MEMBERS = torch.stack([torch.randperm(N, generator=DRAW) < 14 for _ in range(MODELS)])

OPTIMIZERS = {
    "sgd": lambda p: SGD(p, lr=0.2, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: Adam(p, lr=0.01),
    "adamw": lambda p: AdamW(p, lr=0.01, weight_decay=0.1),
}


def build():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def train(data=(X, Y), members=MEMBERS, make=build, **settings):
    return train_many(make, data, members, **{"epochs": 3, "batch_size": 5, **settings})


def assert_close(first, second, rows=slice(None)):
    assert first.state.keys() == second.state.keys()
    for name, value in first.state.items():
        torch.testing.assert_close(value[rows], second.state[name][rows], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_models_trained_at_once_are_those_trained_alone(kind):
    together = train(optimizer=OPTIMIZERS[kind])
    assert len(together) == MODELS
    for chunk in (1, 2, 3):
        assert_close(together, train(optimizer=OPTIMIZERS[kind], chunk=chunk))
    some = train(members=MEMBERS[:2], optimizer=OPTIMIZERS[kind])
    assert_close(some, together, slice(2))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_model_is_that_of_a_plain_loop(kind):
    """All samples in every batch, so that the order does not matter."""

    def fixed():
        with seeds.isolated(7):
            return build()

    together = train(make=fixed, optimizer=OPTIMIZERS[kind], epochs=6, batch_size=64)
    for number in range(MODELS):
        model, rows = fixed(), MEMBERS[number]
        optimizer = OPTIMIZERS[kind](model.parameters())
        for _ in range(6):
            optimizer.zero_grad()
            F.cross_entropy(model(X[rows]), Y[rows]).backward()
            optimizer.step()
        for name, value in model.state_dict().items():
            torch.testing.assert_close(together.state[name][number], value, rtol=1e-4, atol=1e-5, msg=name)


def test_the_scheduler_is_told_the_steps_and_stepped():
    told, rates = [], []

    def scheduler(optimizer, steps):
        told.append(steps)
        made = OneCycleLR(optimizer, 0.1, total_steps=steps)
        rates.append(made)
        return made

    train(optimizer=lambda p: SGD(p, lr=0.1), scheduler=scheduler, chunk=3)
    assert told == [9, 9]  # 3 epochs of 14 samples in batches of 5
    assert all(made.last_epoch == 9 for made in rates)
    assert_close(
        train(optimizer=OPTIMIZERS["sgd"], scheduler=scheduler),
        train(optimizer=OPTIMIZERS["sgd"], scheduler=scheduler, chunk=1),
    )


def test_a_model_does_not_depend_on_samples_outside_of_its_own():
    other_x, other_y = X.clone(), Y.clone()
    outside = ~MEMBERS[1]
    other_x[outside] += 10.0
    other_y[outside] = (other_y[outside] + 1) % 3
    first, second = train(), train((other_x, other_y))
    assert_close(first, second, slice(1, 2))
    assert any((first.state[name][0] != second.state[name][0]).any() for name in first.state)


def test_a_model_learns_its_own_samples():
    ensemble = train(epochs=60, optimizer=lambda p: AdamW(p, lr=0.03))
    right = ensemble.logits(X).argmax(-1) == Y
    inside = torch.stack([right[k, MEMBERS[k]].float().mean() for k in range(MODELS)])
    outside = torch.stack([right[k, ~MEMBERS[k]].float().mean() for k in range(MODELS)])
    assert inside.min() > 0.9
    assert inside.mean() > outside.mean() + 0.2


def test_models_have_weights_and_orders_of_their_own():
    members = torch.ones(2, N, dtype=torch.bool)
    weights = train(members=members, epochs=1, optimizer=lambda p: SGD(p, lr=0.0)).state["0.weight"]
    assert (weights[0] != weights[1]).all()

    def fixed():
        with seeds.isolated(7):
            return build()

    orders = train(members=members, make=fixed, optimizer=OPTIMIZERS["sgd"]).state["0.weight"]
    assert (orders[0] != orders[1]).any()


def test_the_seed_alone_decides(global_rng_untouched):
    def weights(seed):
        return train(seed=seed, make=lambda: nn.Sequential(build(), nn.Dropout(0.5))).state

    first, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert all((value != other[name]).any() for name, value in first.items())


def test_one_of_the_models_gives_the_logits_of_all():
    ensemble = train()
    expected = ensemble.logits(X)
    assert expected.shape == (MODELS, N, 3)
    assert not expected.requires_grad
    for number, model in enumerate(ensemble):
        assert not model.training
        torch.testing.assert_close(model(X), expected[number], rtol=1e-5, atol=1e-6)
    for settings in ({"chunk": 2}, {"batch_size": 7}, {"chunk": 1, "batch_size": 1}):
        torch.testing.assert_close(ensemble.logits(X, **settings), expected, rtol=1e-5, atol=1e-6)


def test_one_of_the_models_is_a_module_of_its_own():
    ensemble = train()
    before = ensemble.state["0.weight"].clone()
    model = ensemble[2]
    assert all(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        model[0].weight.zero_()
    assert torch.equal(ensemble.state["0.weight"], before)
    assert not torch.equal(ensemble[2][0].weight, model[0].weight)
    assert isinstance(Ensemble(build(), ensemble.state)[0], nn.Sequential)


def test_logits_are_in_eval_mode_and_leave_the_template():
    ensemble = train(make=lambda: nn.Sequential(build(), nn.Dropout(0.9)))
    ensemble.template.train()
    assert torch.equal(ensemble.logits(X), ensemble.logits(X))
    assert ensemble.template[1].training


def test_inputs_may_be_a_mapping():
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = build()

        def forward(self, pixels, shift):
            return {"logits": self.body(pixels + shift)}

    data = TensorData({"pixels": X, "shift": torch.zeros(N, 1)}, Y)
    named, plain = train(data, make=Keywords), train()
    torch.testing.assert_close(named.logits(data.inputs), plain.logits(X), rtol=1e-4, atol=1e-5)


def test_convolutions_and_real_models_can_be_stacked(digits_small, tiny_vit):
    members = torch.zeros(2, 240, dtype=torch.bool)
    members[0, :40], members[1, 200:] = True, True
    for make in (lambda: DigitsCNN(width=2, hidden=4), lambda: type(tiny_vit)(tiny_vit.config)):
        first, second = (train(digits_small.train, members, make, epochs=1, batch_size=20, chunk=c) for c in (2, 1))
        assert_close(first, second)
        images = digits_small.test.inputs[:5]
        output = first[1](images)
        torch.testing.assert_close(getattr(output, "logits", output), first.logits(images)[1], rtol=1e-4, atol=1e-5)


def test_buffers_are_stacked_whether_they_are_saved_or_not():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = build()
            self.register_buffer("scale", torch.rand(3))
            self.register_buffer("shift", torch.rand(3), persistent=False)

        def forward(self, x):
            return self.body(x) * self.scale + self.shift

    ensemble = train(make=Scaled)
    assert len(ensemble.state["scale"].unique(dim=0)) == MODELS
    expected = ensemble.logits(X)
    for number in range(MODELS):
        torch.testing.assert_close(ensemble[number](X), expected[number], rtol=1e-5, atol=1e-6)


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.again, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
            self.again.weight = self.first.weight

        def forward(self, x):
            return self.head(self.again(self.first(x).tanh()))

    ensemble = train(make=Tied)
    expected = ensemble.logits(X)
    for number in range(MODELS):
        torch.testing.assert_close(ensemble[number](X), expected[number], rtol=1e-5, atol=1e-6)


def uneven():
    members = MEMBERS.clone()
    members[0] = False
    members[0, :3] = True
    return members


BAD = {
    "uneven rows": ({"members": uneven()}, r"rows of members hold \[3, 14\] samples, but must all hold equally many"),
    "empty rows": ({"members": torch.zeros_like(MEMBERS)}, r"rows of members hold \[0\] samples"),
    "no rows": ({"members": MEMBERS[:0]}, r"rows of members hold \[\] samples"),
    "another length": (
        {"members": MEMBERS[:, 1:]},
        rf"members has shape \(5, 23\), but must be boolean \(models, {N}\)",
    ),
    "numbers": ({"members": MEMBERS.long()}, "but must be boolean"),
    "a vector": ({"members": MEMBERS[0]}, r"members has shape \(24,\)"),
    "no labels": ({"data": TensorData(X)}, r"but must be \(inputs, targets\) held as tensors"),
    "not in memory": ({"data": list(zip(X, Y, strict=True))}, "The data is a list, but must be"),
    "batch normalisation": ({"make": lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))}, "1 is batch norm"),
    "epochs": ({"epochs": 0}, "epochs is 0, but must be greater than 0"),
    "batch_size": ({"batch_size": 0}, "batch_size is 0, but must be greater than 0"),
    "chunk": ({"chunk": 0}, "chunk is 0, but must be greater than 0"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_refused(kind):
    changes, message = BAD[kind]
    with pytest.raises(InputError, match=message):
        train(**changes)
