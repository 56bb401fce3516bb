"""Teachers are frozen copies, and caches hold what a model says of every sample."""

import copy

import pytest
import torch
from torch import nn

from retouch.core.batches import in_order
from retouch.core.loop import fit
from retouch.core.models import forward, logits_of, unpack
from retouch.core.objectives import cross_entropy
from retouch.core.teachers import Teacher, cache

DRAW = torch.Generator().manual_seed(0)
X, Y = torch.randn(10, 4, generator=DRAW), torch.randint(3, (10,), generator=DRAW)


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))


def test_a_teacher_says_what_the_model_says_in_eval_mode(model):
    teacher = Teacher(model.train())
    assert torch.equal(teacher(X), copy.deepcopy(model).eval()(X))
    assert torch.equal(teacher(X), teacher(X))
    assert model.training, "the model itself is not changed"
    assert all(p.requires_grad for p in model.parameters())


def test_a_teacher_gives_no_gradients(model):
    teacher = Teacher(model)
    x = X.clone().requires_grad_()
    assert not teacher(x).requires_grad
    assert not any(p.requires_grad for p in teacher.parameters())


def test_a_teacher_is_a_copy_that_stays_when_the_model_is_trained(model):
    teacher = Teacher(model)
    before = teacher(X)
    fit(model, (X, Y), steps=3)
    assert torch.equal(teacher(X), before)


def test_train_has_no_effect_on_a_teacher_also_inside_of_a_module_that_is_trained(model):
    teacher = Teacher(model)
    assert teacher.train() is teacher
    assert not any(m.training for m in teacher.model.modules())
    pair = nn.ModuleDict({"student": copy.deepcopy(model), "teacher": teacher}).train()
    assert all(m.training for m in pair["student"].modules())
    assert not any(m.training for m in teacher.model.modules())
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    pair["teacher"](X)
    assert all(torch.equal(value, teacher.state_dict()[name]) for name, value in before.items())


def test_a_student_with_its_teacher_inside_is_trained_alone(model):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.student, self.teacher = copy.deepcopy(model), Teacher(model)

        def forward(self, x):
            return self.student(x) + self.teacher(x)

    pair = Pair()
    before = {name: value.clone() for name, value in pair.state_dict().items()}
    fit(pair, (X, Y), cross_entropy, steps=3, optimizer=lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5))
    for name, value in pair.named_parameters():
        assert torch.equal(value, before[name]) is name.startswith("teacher")
    assert torch.equal(pair.state_dict()["teacher.model.1.running_mean"], before["teacher.model.1.running_mean"])


def test_a_teacher_is_called_like_its_model(tiny_vit):
    images = torch.rand(2, 1, 8, 8)
    expected = tiny_vit(images).logits
    assert torch.equal(Teacher(tiny_vit)(images).logits, expected)
    assert torch.equal(forward(Teacher(tiny_vit), {"pixel_values": images}).logits, expected)


def test_a_cache_is_looked_up_by_sample_index(model):
    def answer(model, batch):
        assert not model.training
        return logits_of(model(unpack(batch)[0]))

    model[1].eval()
    answers = cache(model, in_order((X, Y), 3), answer)
    assert answers.shape == (10, 3)
    assert not answers.requires_grad
    model.eval()
    torch.testing.assert_close(answers[[7, 2]], model(X[[7, 2]]))


def test_a_cache_leaves_each_modules_mode(model):
    model.train()
    model[1].eval()
    cache(model, [X], lambda model, batch: model(batch))
    assert [m.training for m in model] == [True, False, True, True]
    assert model.training
