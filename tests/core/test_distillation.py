"""The objective that asks a teacher, answers kept on disk, and the classic losses."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from retouch.core.batches import Together
from retouch.core.data import TensorData, labels_of, subset
from retouch.core.distillation import Answer, Distillation, answered, ask, check_pair, hint_loss, softened_kl
from retouch.core.errors import InputError
from retouch.core.loop import fit
from retouch.core.models import predict

DRAW = torch.Generator().manual_seed(0)
X, Y = torch.randn(10, 4, generator=DRAW), torch.arange(10) % 3


class Net(nn.Module):
    """Counts how often it is asked."""

    def __init__(self, seed=0, classes=3):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body, self.drop, self.head = nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, classes)
        self.asked = 0

    def forward(self, x):
        self.asked += 1
        return self.head(self.drop(self.body(x).tanh()))


def kl(student, teacher, labels):
    return softened_kl(student.logits, teacher.logits)


def test_the_teacher_is_asked_once_a_batch_frozen_and_in_eval_mode():
    teacher, student = Net(0), Net(1)
    objective = Distillation(teacher, kl)
    fit(student, (X, Y), objective, steps=4, batch_size=5)
    assert objective.teacher.model.asked == student.asked == 4
    assert teacher.asked == 0  # a copy was
    assert not objective.teacher.model.training
    assert all(
        torch.equal(a, b) for a, b in zip(teacher.parameters(), objective.teacher.model.parameters(), strict=True)
    )


def test_a_loss_sees_features_of_both_and_labels():
    seen = {}

    def loss(student, teacher, labels):
        seen.update(student=student.features, teacher=teacher.features, labels=labels)
        return (student.features["body"] - teacher.features["body"]).square().mean()

    student = Net(1)
    fit(student, (X, Y), Distillation(Net(0), loss, student_layers=["body"], teacher_layers=["body"]), steps=1)
    assert seen["student"]["body"].requires_grad
    assert not seen["teacher"]["body"].requires_grad
    assert torch.equal(seen["labels"].sort().values, Y.sort().values)


def test_inputs_alone_can_be_taught_on():
    student = Net(1)
    history = fit(student, TensorData(X), Distillation(Net(0), kl), steps=2)
    assert len(history) == 2


def test_answers_beside_the_labels_equal_asking(tmp_path):
    teacher, one, two = Net(0), Net(1), Net(1)
    data = answered((X, Y), teacher, batch_size=3)
    assert torch.equal(labels_of(data), Y)
    torch.testing.assert_close(data.targets["teacher"], predict(teacher, [(X,)]))
    for model, source, objective in ((one, (X, Y), Distillation(teacher, kl)), (two, data, Distillation(None, kl))):
        model.drop.p = 0.0
        fit(model, source, objective, epochs=3, batch_size=4)
    torch.testing.assert_close(one.head.weight, two.head.weight)
    part = subset(data, [4, 2])
    assert torch.equal(part.targets["teacher"], data.targets["teacher"][[4, 2]])
    batch, _, _ = next(Together({"a": data}, 4).epoch(0))
    assert batch["a"][1].keys() == {"teacher", "labels"}


def test_kept_answers_are_read_back_and_not_asked_again(tmp_path, monkeypatch):
    monkeypatch.setattr("retouch.core.distillation.SHARD", 4)
    teacher = Net(0)
    first = answered((X, Y), teacher, folder=tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    asked = teacher.asked
    again = answered((X, Y), teacher, folder=tmp_path)
    assert teacher.asked == asked
    assert torch.equal(first.targets["teacher"], again.targets["teacher"])
    (tmp_path / "answers-00001.safetensors").unlink()  # a run that was stopped goes on
    third = answered((X, Y), teacher, folder=tmp_path)
    torch.testing.assert_close(third.targets["teacher"], first.targets["teacher"])
    with pytest.raises(InputError, match="keeps the answers of another teacher or to other data"):
        answered((X, Y), Net(1), folder=tmp_path)
    with pytest.raises(InputError, match="keeps the answers of another teacher or to other data"):
        answered((X + 1, Y), teacher, folder=tmp_path)


def test_softened_kl_is_hintons():
    s, t = torch.randn(5, 4, generator=DRAW, requires_grad=True), torch.randn(5, 4, generator=DRAW, requires_grad=True)
    expected = 9 * F.kl_div((s / 3).log_softmax(-1), (t / 3).softmax(-1), reduction="batchmean")
    loss = softened_kl(s, t, temperature=3.0)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert t.grad is None
    assert softened_kl(s, s).abs() < 1e-6
    centred = s - s.mean(1, keepdim=True), t - t.mean(1, keepdim=True)
    hot = softened_kl(*(c.double() for c in centred), temperature=1e4)
    torch.testing.assert_close(hot, (centred[0] - centred[1]).double().square().sum(1).mean() / 8, rtol=1e-3, atol=0)


def test_hints_are_distances_of_flattened_features():
    adapter = nn.Linear(8, 3)
    student, teacher = torch.randn(5, 2, 4, generator=DRAW), torch.randn(5, 3, generator=DRAW, requires_grad=True)
    loss = hint_loss(student, teacher, adapter)
    torch.testing.assert_close(loss, F.mse_loss(adapter(student.flatten(1)), teacher.detach()))


def test_ask_gives_logits_and_features():
    model = Net(0).eval()
    answer = ask(model, X, ["body"])
    assert isinstance(answer, Answer)
    torch.testing.assert_close(answer.logits, model(X))
    torch.testing.assert_close(answer.features["body"], model.body(X))


def test_bad_pairs_are_refused():
    with pytest.raises(InputError, match="The student tells 3 classes apart and the teacher 5"):
        fit(Net(1), (X, Y), Distillation(Net(0, classes=5), kl), steps=1)
    with pytest.raises(InputError, match="teacher is None, but must be a model"):
        fit(Net(1), (X, Y), Distillation(None, kl), steps=1)
    with pytest.raises(InputError, match="both must be for the same samples"):
        check_pair(torch.zeros(3, 2), torch.zeros(4, 2))
    with pytest.raises(InputError, match="temperature is 0, but must be greater than 0"):
        softened_kl(X, X, temperature=0)
    with pytest.raises(InputError, match="has no layer 'bdy'.*Did you mean body"):
        fit(Net(1), (X, Y), Distillation(Net(0), kl, student_layers=["bdy"]), steps=1)
