"""A forgetting request: what is measured, before and after."""

import copy

import pytest
import torch

from retouch.core.cards import find
from retouch.core.metrics.unlearning import accuracy
from retouch.core.models import predict
from retouch.report.request import Request, carry_out, weights_digest
from retouch.worlds import digits


@pytest.fixture
def request_for(digits_small, trained_cnn):
    def make(forget, oracle=None, test=True):
        return Request(
            model=trained_cnn,
            data=digits_small.train,
            forget=forget,
            classes=digits.CLASSES,
            test=digits_small.test if test else None,
            oracle=oracle,
            picture=lambda row: f"data:{row}",
            described={"forget": "label=3"},
        )

    return make


def broken(model, forget, retain, **options):
    """Answers 8 to everything."""
    changed = copy.deepcopy(model)
    torch.nn.init.zeros_(changed.head.weight)
    changed.head.bias.data = torch.eye(10)[8]
    return changed


def test_measures_are_those_of_the_models(request_for, digits_small, trained_cnn):
    data = digits_small.train
    rows = (data.targets == 3).nonzero()[:, 0]
    changed, evidence = carry_out(request_for(rows), find("ssd"), broken, {})
    before, after = evidence["rows"]["before"]["values"], evidence["rows"]["after"]["values"]
    logits = predict(trained_cnn, [data[:]])
    kept = data.targets != 3
    assert before["forget"] == [accuracy(logits[~kept], data.targets[~kept])]
    assert before["retain"] == [accuracy(logits[kept], data.targets[kept])]
    assert after["forget"] == [0.0]
    assert after["retain"] == [pytest.approx(100 / 9)]
    assert after["test_forget"] == [0.0]
    labels = digits_small.test.targets
    assert after["test"] == [accuracy(torch.eye(10)[8].expand(len(labels), 10)[labels != 3], labels[labels != 3])]
    assert "oracle" not in evidence["rows"]
    assert evidence["record"]["weights before (SHA-256)"] == weights_digest(trained_cnn)
    assert evidence["record"]["weights after (SHA-256)"] == weights_digest(changed) != weights_digest(trained_cnn)


def test_an_oracle_is_the_aim(request_for, trained_cnn):
    _, evidence = carry_out(request_for(torch.arange(5), oracle=trained_cnn), find("ssd"), broken, {})
    rows = evidence["rows"]
    assert rows["oracle"]["values"]["distance"] == [0.0]
    assert rows["before"]["values"]["distance"] == [0.0]
    assert rows["after"]["values"]["distance"][0] > 0.5
    assert "that is the aim" in " ".join(evidence["words"])


def test_random_rows_without_test_data(request_for, digits_small, trained_cnn):
    rows = torch.tensor([0, 7, 100, 239])
    _, evidence = carry_out(request_for(rows, test=False), find("ssd"), broken, {"alpha": 2.0})
    assert evidence["options"] == {"alpha": "2.0"}
    assert evidence["request"]["samples to forget"] == 4
    assert "test" not in evidence["rows"]["after"]["values"]
    pictures = evidence["pictures"]
    assert [p["group"] for p in pictures] == ["to forget"] * 4 + ["to keep"] * 7
    assert [p["png"] for p in pictures[:4]] == [f"data:{row}" for row in rows.tolist()]
    predicted = predict(trained_cnn, [digits_small.train[:]]).argmax(-1)
    shown = [int(p["png"].removeprefix("data:")) for p in pictures]
    answers = [answer["text"].split()[0] for answer in evidence["rows"]["before"]["answers"]]
    assert answers == [str(int(predicted[row])) for row in shown]
