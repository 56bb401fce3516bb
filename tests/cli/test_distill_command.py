"""`retouch distill` as users meet it."""

import json
import sys

import pytest
import torch
import transformers
from test_cli import write_images

from retouch.cli import main as cli
from retouch.core.checkpoints import load_model
from retouch.worlds import WEIGHTS, digits, text

VIT, ENCODER = WEIGHTS / "digits-vit", WEIGHTS / "text-encoder"


@pytest.fixture
def retouch(capsys, monkeypatch):
    """retouch("distill", "sinkd", ...) gives (exit code, standard output, standard error)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["retouch", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return call


def test_a_vit_teaches_a_cnn_of_the_world(retouch, tmp_path):
    out = tmp_path / "out"
    code, said, err = retouch("distill", "sinkd", "--epochs", "3", "--lr", "0.01", "--beta", "0.5", "--out", out)
    assert code == 0, err
    evidence = json.loads((out / "evidence.json").read_text())
    assert set(evidence["rows"]) == {"teacher", "plain", "technique"}
    assert evidence["options"]["beta"] == "0.5"
    values = evidence["rows"]["technique"]["values"]
    assert values["agreement"][0] > 80
    assert values["parameters"][0] < evidence["rows"]["teacher"]["values"]["parameters"][0]
    assert evidence["rows"]["teacher"]["values"]["agreement"] == [100.0]
    assert isinstance(load_model(out), digits.DigitsCNN)
    assert evidence["words"][0] in said


def test_a_users_vit_teaches_another_on_images(retouch, tmp_path):
    images, student, out = write_images(tmp_path / "train"), tmp_path / "student", tmp_path / "out"
    config = transformers.ViTConfig.from_pretrained(VIT, num_hidden_layers=1, hidden_size=16, intermediate_size=16)
    with torch.random.fork_rng():
        transformers.ViTForImageClassification(config).save_pretrained(student)
    digits.image_processor().save_pretrained(student)
    arguments = ["--teacher", VIT, "--student", student, "--data", images, "--epochs", "1", "--no-plain", "--out", out]
    code, _, err = retouch("distill", "sinkd", *arguments)
    assert code == 0, err
    assert transformers.ViTForImageClassification.from_pretrained(out).config.hidden_size == 16
    transformers.AutoImageProcessor.from_pretrained(out)


def write_claims(path, count=120):
    """Statements of the world `text`, true or false, as a table."""
    claims = text.claims("train", "facts")[:count]
    lines = [json.dumps({"text": claim.text, "label": "true" if claim.true else "false"}) for claim in claims]
    path.write_text("\n".join(lines) + "\n")
    return path


def small_reader(folder, **settings):
    config = transformers.BertConfig.from_pretrained(
        ENCODER, num_hidden_layers=1, hidden_size=16, intermediate_size=16, num_attention_heads=2, **settings
    )
    with torch.random.fork_rng():
        transformers.BertForSequenceClassification(config).save_pretrained(folder)
    text.tokenizer().save_pretrained(folder)
    return folder


def test_a_users_bert_teaches_a_smaller_one_on_texts(retouch, tmp_path):
    claims, student, out = write_claims(tmp_path / "claims.jsonl"), small_reader(tmp_path / "student"), tmp_path / "out"
    arguments = ["--teacher", ENCODER, "--student", student, "--data", claims, "--test", claims, "--epochs", "2"]
    code, _, err = retouch("distill", "sinkd", *arguments, "--out", out)
    assert code == 0, err
    evidence = json.loads((out / "evidence.json").read_text())
    assert evidence["rows"]["teacher"]["values"]["test"][0] > 85
    assert transformers.BertForSequenceClassification.from_pretrained(out).config.hidden_size == 16
    assert transformers.AutoTokenizer.from_pretrained(out).get_vocab() == text.tokenizer().get_vocab()
    code, _, err = retouch(
        "train",
        "multi_sample_dropout",
        "--model",
        out,
        "--data",
        claims,
        "--epochs",
        "1",
        "--no-plain",
        "--out",
        tmp_path / "again",
    )
    assert code == 0, err


def test_readers_must_fit_together(retouch, tmp_path):
    claims, student = write_claims(tmp_path / "claims.jsonl", 20), small_reader(tmp_path / "student")
    out = ["--data", claims, "--out", tmp_path / "out"]
    code, _, err = retouch("distill", "sinkd", "--teacher", VIT, "--student", student, *out)
    assert code == 2 and "must both be classifiers of texts with their tokenizers, or both of images" in err
    other = json.loads((student / "tokenizer.json").read_text())
    other["model"]["vocab"]["zebra"] = len(other["model"]["vocab"])
    (tmp_path / "other").mkdir()
    for file in student.iterdir():
        (tmp_path / "other" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(other))
    code, _, err = retouch("distill", "sinkd", "--teacher", tmp_path / "other", "--student", student, *out)
    assert code == 2 and "must have the same vocabulary" in err
    code, _, err = retouch("forget", "ssd", "--model", ENCODER, "--data", claims, "--forget", "label=true")
    assert code == 2 and "reads texts, but retouch forget takes classifiers of images" in err
    assert not (tmp_path / "out").exists()


def test_a_teacher_of_other_classes_is_refused(retouch, tmp_path):
    other = tmp_path / "other"
    config = transformers.ViTConfig.from_pretrained(VIT, num_labels=4)
    with torch.random.fork_rng():
        transformers.ViTForImageClassification(config).save_pretrained(other)
    code, _, err = retouch("distill", "sinkd", "--teacher", other, "--out", tmp_path / "out")
    assert code == 2
    assert "tells 4 classes apart, but must tell those of the student and the data apart: 10" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sinkdd"], "Did you mean sinkd"),
        (["sinkd", "--alpha", "2"], "alpha is 2.0, but must be at least 0 and at most 1"),
        (["sinkd", "--kd-temperature", "0"], "kd_temperature is 0.0, but must be greater than 0"),
        (["sinkd", "--teacher", "nowhere"], "There is no model at nowhere"),
        (["sinkd", "--batch-size", "0"], "--batch-size is 0, but must be greater than 0"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(retouch, tmp_path, arguments, words):
    code, _, err = retouch("distill", *arguments, "--out", tmp_path / "out")
    assert code == 2
    assert words in err
    assert len(err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
