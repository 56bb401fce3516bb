"""`retouch train` as users meet it."""

import json
import sys

import pytest
import torch
import transformers
from test_cli import write_images

from retouch.arenas import training
from retouch.cli import main as cli
from retouch.core.checkpoints import load_model, load_tensors
from retouch.core.models import predict
from retouch.worlds import WEIGHTS, digits

VIT = WEIGHTS / "digits-vit"


@pytest.fixture
def retouch(capsys, monkeypatch):
    """retouch("train", "cutmix", ...) gives (exit code, standard output, standard error)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["retouch", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return call


def test_on_the_world_with_evidence_of_plain_training(retouch, tmp_path):
    out = tmp_path / "out"
    code, said, err = retouch("train", "cutmix", "--epochs", "4", "--lr", "0.01", "--probability", "0.3", "--out", out)
    assert code == 0, err
    evidence = json.loads((out / "evidence.json").read_text())
    assert set(evidence["rows"]) == {"plain", "technique"}
    assert evidence["options"] == {"alpha": "1.0", "probability": "0.3", "per_sample": "False"}
    assert evidence["request"]["training samples"] == 1080  # a tenth is kept apart
    test = digits.data("test")
    right = 100 * (predict(load_model(out), [test[:]]).argmax(-1) == test.targets).double().mean()
    assert evidence["rows"]["technique"]["values"]["test"] == [pytest.approx(float(right))]
    assert right > 85
    assert evidence["words"][0] in said
    assert "CutMix on digits" in (out / "report.html").read_text()


def test_on_a_users_vit_and_images_from_its_own_weights(retouch, tmp_path):
    images = write_images(tmp_path / "train")
    out = tmp_path / "out"
    arguments = ["--model", VIT, "--data", images, "--out", out, "--epochs", "1", "--lr", "1e-5", "--no-plain"]
    code, _, err = retouch("train", "multi_sample_dropout", *arguments, "--samples", "3")
    assert code == 0, err
    transformers.AutoImageProcessor.from_pretrained(out)
    model = transformers.ViTForImageClassification.from_pretrained(out).eval()
    start = digits.reference("vit")
    test = digits.data("test")
    assert not torch.equal(model.classifier.weight, start.classifier.weight)
    assert (model(test.inputs).logits.argmax(-1) == test.targets).float().mean() > 0.9
    evidence = json.loads((out / "evidence.json").read_text())
    assert list(evidence["rows"]) == ["technique"]
    assert evidence["request"]["weights"] == "those of the model"


def test_a_stopped_run_goes_on(retouch, tmp_path, monkeypatch):
    from retouch.core import loop

    arguments = ["train", "rs2", "--fraction", "0.2", "--epochs", "4", "--no-plain"]
    saves, save = [], loop._Loop.save

    def stop(self, run):
        save(self, run)
        saves.append(run.step)
        if len(saves) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop._Loop, "save", stop)
        code, _, _ = retouch(*arguments, "--checkpoint", tmp_path / "run", "--out", tmp_path / "stopped")
    assert code == 130
    assert not (tmp_path / "stopped").exists()
    assert retouch(*arguments, "--checkpoint", tmp_path / "run", "--out", tmp_path / "resumed")[0] == 0
    assert retouch(*arguments, "--out", tmp_path / "whole")[0] == 0
    resumed, whole = (load_model(tmp_path / name).state_dict() for name in ("resumed", "whole"))
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())


def test_what_trains_no_classifier_runs_on_its_world(retouch, tmp_path, monkeypatch):
    train = training.Replica.train
    monkeypatch.setattr(training.Replica, "train", lambda self, *a, **k: train(self, *a, **{**k, "steps": 3}))
    threads = torch.get_num_threads()
    code, said, err = retouch("train", "aem", "--problem", "bags", "--out", tmp_path / "out", "--threads", threads)
    assert code == 0, err
    evidence = json.loads((tmp_path / "out" / "evidence.json").read_text())
    assert set(evidence["rows"]) == {"plain", "aem"}
    assert evidence["words"][0] in said and "AUC (%): plain training" in said
    assert "on bags" in (tmp_path / "out" / "report.html").read_text()
    assert load_tensors(tmp_path / "out" / "model.safetensors")
    assert "--problem" in retouch("train", "cloob", "--help")[1]


def test_help_has_the_shared_options_once(retouch):
    code, out, _ = retouch("train", "rs2", "--help")
    assert code == 0
    assert out.count("--batch-size") == 1 and "--fraction FLOAT" in out
    assert "multi_sample_dropout" in retouch("train")[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["cutmx"], "Did you mean cutmix"),
        (["cutmix", "--epochs", "0"], "--epochs is 0, but must be greater than 0"),
        (["cutmix", "--alpha", "-1"], "alpha is -1.0, but must be greater than 0"),
        (["cutmix", "--data", "nowhere"], "There is no data at nowhere"),
        (["cutmix", "--model", "nowhere"], "There is no model at nowhere"),
        (["rs2", "--fraction", "0.0001"], "fraction is 0.0001, but must give at least one"),
        (["aem", "--model", "digits/cnn"], "aem does not train an ordinary image classifier and takes no --model"),
        (["aem", "--problem", "bag"], "--problem is bag, but must be one of bags, more_bags. Did you mean bags"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(retouch, tmp_path, arguments, words):
    code, _, err = retouch("train", *arguments, "--out", tmp_path / "out")
    assert code == 2
    assert words in err
    assert len(err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
