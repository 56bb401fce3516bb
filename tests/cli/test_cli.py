"""The command line as users meet it: help, a changed model with evidence, and one sentence for what is wrong."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from retouch.cli import main as cli
from retouch.core.checkpoints import load_model, save_model
from retouch.core.models import predict
from retouch.worlds import WEIGHTS, digits


@pytest.fixture
def retouch(capsys, monkeypatch):
    """retouch("forget", "ssd", ...) gives (exit code, standard output, standard error)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["retouch", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return call


def write_images(folder, split="train", count=60, names=digits.CLASSES):
    from PIL import Image

    data = digits.data(split)
    for row in range(count):
        place = folder / names[int(data.targets[row])]
        place.mkdir(parents=True, exist_ok=True)
        pixels = (data.inputs[row, 0] * 255).round().to(torch.uint8).numpy()
        Image.fromarray(pixels).save(place / f"{row:04}.png")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "train")


VIT = WEIGHTS / "digits-vit"


def test_light_commands_load_no_torch_and_answer_at_once():
    code = """
import sys, time
start = time.perf_counter()
import retouch
from retouch.cli.main import run
run(["--help"]), run(["list"]), run(["show", "ssd"]), run(["forget", "--help"])
assert "torch" not in sys.modules and "transformers" not in sys.modules
assert time.perf_counter() - start < 2, time.perf_counter() - start
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("ssd", "salun", "laf", "s3t", "dmm", "concept_poisoning"):
        assert name in done.stdout


def test_help_shows_a_techniques_own_options_in_its_docstrings_words(retouch):
    code, out, _ = retouch("forget", "salun", "--help")
    assert code == 0
    words = " ".join(out.replace("│", " ").split())
    assert "--weight-decay FLOAT" in words
    assert "the one setting that must be searched" in words
    assert "--inplace" not in words and "--forget STR" in words


def test_forget_on_the_world_writes_model_evidence_and_page(retouch, tmp_path):
    out = tmp_path / "new" / "out"
    code, said, err = retouch("forget", "ssd", "--forget", "label=7", "--alpha", "3", "--out", out)
    assert code == 0, err
    assert {f.name for f in out.iterdir()} == {
        "model.safetensors",
        "retouch.json",
        "preprocessor_config.json",
        "evidence.json",
        "report.html",
    }
    model, test = load_model(out), digits.data("test")
    right = predict(model, [test[:]]).argmax(-1) == test.targets
    assert right[test.targets == 7].float().mean() < 0.2
    assert right[test.targets != 7].float().mean() > 0.9
    evidence = json.loads((out / "evidence.json").read_text())
    assert evidence["options"]["alpha"] == "3.0"
    assert set(evidence["rows"]) == {"before", "after", "oracle"}
    assert evidence["rows"]["oracle"]["values"]["forget"] == [0.0]
    assert "label=7" in (out / "report.html").read_text()
    assert evidence["words"][0] in said
    assert not list(tmp_path.glob("**/.*"))


@pytest.mark.parametrize("form", ["folder", "parquet", "saved"])
def test_forget_on_a_users_vit_and_images(retouch, tmp_path, images, form):
    import transformers

    data = images
    if form != "folder":
        import datasets

        rows = datasets.load_dataset(
            "imagefolder", data_dir=str(images), split="train", cache_dir=str(tmp_path / "cache")
        )
        data = tmp_path / ("table.parquet" if form == "parquet" else "saved")
        rows.to_parquet(str(data)) if form == "parquet" else rows.save_to_disk(str(data))
    chosen = tmp_path / "rows.txt"
    chosen.write_text("0\n3  # a comment\n\n3\n")
    out = tmp_path / "out"
    arguments = ["--model", VIT, "--data", data, "--forget", f"index={chosen}", "--out", out]
    code, _, err = retouch("forget", "salun", *arguments, "--epochs", "1", "--lr", "0.001")
    assert code == 0, err
    transformers.AutoImageProcessor.from_pretrained(out)
    changed, before = (transformers.AutoModelForImageClassification.from_pretrained(f) for f in (out, VIT))
    assert changed.config.id2label == before.config.id2label
    assert not torch.equal(changed.classifier.weight, before.classifier.weight)
    evidence = json.loads((out / "evidence.json").read_text())
    assert evidence["request"]["samples to forget"] == 2
    assert evidence["rows"]["before"]["values"]["retain"][0] > 95
    assert "oracle" not in evidence["rows"]


def test_an_oracle_and_held_out_images_may_be_given(retouch, tmp_path, images):
    test = write_images(tmp_path / "test", "test", 40)
    arguments = ["--model", VIT, "--data", images, "--test", test, "--oracle", VIT, "--forget", "label=4"]
    code, _, err = retouch("forget", "ssd", *arguments, "--out", tmp_path / "out")
    assert code == 0, err
    rows = json.loads((tmp_path / "out" / "evidence.json").read_text())["rows"]
    assert rows["before"]["values"]["distance"] == [0.0]
    assert {"test", "test_forget", "attack"} <= set(rows["after"]["values"])


def bad_inputs(tmp_path, images):
    """Arguments of `retouch forget` that are wrong in one thing, and words of the sentence that says so."""
    rows = tmp_path / "rows.txt"
    rows.write_text("1\n99999\n")
    none, everything = tmp_path / "none.txt", tmp_path / "all.txt"
    none.write_text("# nothing\n")
    everything.write_text("\n".join(str(row) for row in range(1200)))
    seven = write_images(tmp_path / "seven", names=["0", "1", "2", "3", "4", "5", "6", "6", "6", "6"])
    few = write_images(tmp_path / "few", names=list("aabbccddee"))
    mixed = write_images(tmp_path / "mixed", names=["0", "1", "2", "3", "4", "5", "6", "7", "8", "cat"])
    corrupt = write_images(tmp_path / "corrupt")
    victim = next((corrupt / "4").iterdir())
    victim.write_bytes(victim.read_bytes()[:40])
    in_use = tmp_path / "in use"
    in_use.mkdir()
    (in_use / "thesis.tex").write_text("do not lose")
    empty, text = tmp_path / "empty", tmp_path / "notes.txt"
    empty.mkdir()
    text.write_text("hello")
    unprocessed = tmp_path / "unprocessed"
    save_model(digits.reference("cnn"), unprocessed)
    damaged = tmp_path / "damaged"
    save_model(digits.reference("cnn"), damaged)
    (damaged / "model.safetensors").write_bytes(b"x" * 100)
    seven_for = ["--forget", "label=7"]
    vit = ["--model", VIT, *seven_for, "--data"]
    return {
        "technique": (["sdd", *seven_for], "Did you mean ssd"),
        "not an edit": (["s3t", *seven_for], "must be trained with it from the start"),
        "label": (["ssd", "--forget", "label=seven"], "labels are 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"),
        "form": (["ssd", "--forget", "seven"], "must be label=NAME or index=FILE"),
        "row": (
            ["ssd", "--forget", f"index={rows}"],
            "Line 2 of .* is '99999', but must be a row number from 0 to 1199",
        ),
        "rows file": (["ssd", "--forget", f"index={tmp_path}/no.txt"], "There is no file"),
        "nothing": (["ssd", "--forget", f"index={none}"], "names no sample"),
        "everything": (["ssd", "--forget", f"index={everything}"], "names all 1200 samples"),
        "model": (["ssd", *seven_for, "--model", tmp_path / "no"], "There is no model at"),
        "variant": (["ssd", *seven_for, "--model", "digits/vgg"], "has no model 'vgg', only cnn, vit"),
        "no model": (["ssd", *seven_for, "--model", empty], "holds no model"),
        "damaged": (["ssd", *seven_for, "--model", damaged], "cannot be loaded"),
        "data": (["ssd", *vit, tmp_path / "no"], "There is no data at"),
        "no classes": (["ssd", *vit, empty], "has no subfolders"),
        "no images": (["ssd", *vit, text], "must be a folder of images or parquet"),
        "no processor": (["ssd", *seven_for, "--model", unprocessed, "--data", images], "no image processor"),
        "count": (["ssd", *vit, few], "tells 10 classes apart, but the data has 5: a, b, c, d, e"),
        "names": (["ssd", *vit, mixed], "the classes cat, which the model does not know"),
        "corrupt": (["ssd", *vit, corrupt], "cannot be read as an image"),
        "in use": (["ssd", *seven_for, "--out", in_use], "in use"),
        "option": (["ssd", *seven_for, "--alpha", "-1"], "alpha is -1.0, but must be greater than 0"),
        "batch": (["ssd", *seven_for, "--batch-size", "0"], "batch_size is 0, but must be greater than 0"),
        "oracle": (["ssd", *seven_for, "--oracle", tmp_path / "no"], "There is no model folder at"),
        "several classes": (["concept_poisoning", "--forget", f"index={_some_rows(tmp_path)}"], "forgets one class"),
        "no such class here": (["ssd", "--model", VIT, "--data", seven, "--forget", "label=9"], "names no sample"),
    }


def _some_rows(tmp_path):
    path = tmp_path / "some.txt"
    path.write_text("\n".join(str(row) for row in range(20)))
    return path


def test_what_is_wrong_is_said_in_one_sentence_and_nothing_is_written(retouch, tmp_path, images):
    (tmp_path / "in").mkdir()
    cases = bad_inputs(tmp_path / "in", images)
    for name, (arguments, words) in cases.items():
        out = tmp_path / "out" / name.replace(" ", "-")
        given = arguments if "--out" in arguments else [*arguments, "--out", out]
        code, said, err = retouch("forget", *given)
        assert code == 2, (name, said, err)
        lines = [line for line in err.strip().splitlines() if line.startswith("retouch: ")]
        assert len(lines) == 1 and "Traceback" not in err, (name, err)
        assert re.search(words, lines[0]), (name, lines[0])
        assert not out.exists(), name
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    assert (tmp_path / "in" / "in use" / "thesis.tex").read_text() == "do not lose"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["lst"], "Did you mean list"),
        (["edit", "spm"], "The room edit is still empty"),
        (
            ["forget", "ssd", "--forget", "label=1", "--data", "modular"],
            "The world modular is of numbers, but must be one of images: digits",
        ),
        (["worlds", "build", "modular"], "The world modular has no reference models to build"),
        (["show", "salum"], "Did you mean salun"),
        (["list", "forgets"], "Did you mean forget"),
        (["bench", "forgets"], "Did you mean forget"),
        (["bench", "forget", "--replicas", "0"], "replicas is 0"),
        (["bench", "forget", "--only", "sssd"], "Did you mean ssd"),
        (["bench", "forget", "--search", "sssd"], "Did you mean ssd"),
        (["bench", "guide", "--search", "a_star", "--problem", "stitched"], "only prompts, crowded"),
        (["worlds", "build", "digit"], "Did you mean digits"),
    ],
)
def test_unknown_names_elsewhere(retouch, arguments, words):
    code, _, err = retouch(*arguments)
    assert code == 2
    assert words in err


def test_bench_and_report(retouch, tmp_path, monkeypatch):
    monkeypatch.setenv("RETOUCH_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "bench"
    arguments = ["--problem", "subpopulation", "--only", "ssd", "--replicas", "2", "--out", out]
    code, said, err = retouch("bench", "forget", *arguments)
    assert code == 0, err
    assert "SSD" in said and "retrained" in said
    page = (out / "report.html").read_text()
    (out / "report.html").unlink()
    code, said, err = retouch("report", out)
    assert code == 0, err
    assert (out / "report.html").read_text() == page
    code, _, err = retouch("report", tmp_path / "nowhere")
    assert code == 2 and "no evidence.json" in err
    broken = tmp_path / "broken" / "evidence.json"
    broken.parent.mkdir()
    broken.write_text("{")
    code, _, err = retouch("report", broken.parent)
    assert code == 2 and "is not evidence of retouch" in err


def test_search_prints_settings_best_first(retouch, tmp_path, monkeypatch):
    monkeypatch.setenv("RETOUCH_CACHE", str(tmp_path / "cache"))
    code, said, err = retouch(
        "bench", "forget", "--problem", "subpopulation", "--search", "scrub", "--replicas", "1", "--out", tmp_path / "b"
    )
    assert code == 0, err
    gaps = [float(line.partition("gap ")[2].partition(",")[0]) for line in said.splitlines() if "gap " in line]
    assert len(gaps) == 12 and gaps == sorted(gaps)


def test_worlds_are_listed(retouch):
    code, said, _ = retouch("worlds")
    assert code == 0
    assert "digits/vit" in said and "'test'" in said


def test_version_and_no_arguments(retouch):
    assert retouch("--version")[1].startswith("retouch 0.")
    assert "usage: retouch" in retouch()[1]


@pytest.mark.slow
def test_demo_makes_its_page(retouch, tmp_path, monkeypatch):
    monkeypatch.setenv("RETOUCH_CACHE", str(tmp_path / "cache"))
    from retouch.arenas.forget.entries import dmm

    monkeypatch.setattr(dmm, "QUICK", {"class": 2, "subpopulation": 16})
    code, said, err = retouch("demo", "--out", tmp_path / "demo", "--replicas", "1")
    assert code == 0, err
    page = (tmp_path / "demo" / "index.html").read_text()
    for title in ("SSD", "SalUn", "LAF", "DMM", "concept poisoning", "S3T", "retrained", "SCRUB", "bad teacher"):
        assert title in page
    assert "<script" not in page
    assert str(Path(tmp_path / "demo" / "index.html")) in said
