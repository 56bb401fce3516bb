"""`retouch guide` as users meet it, on small random pipelines from disk."""

import json
import sys

import numpy as np
import pytest
import tiny_pipelines as tiny
import torch
from PIL import Image

from retouch.cli import main as cli
from retouch.core import seeds
from retouch.core.diffusion.denoiser import Denoiser
from retouch.core.diffusion.guidance import cfg
from retouch.core.diffusion.sampling import sample
from retouch.guide.pag import pag


@pytest.fixture
def retouch(capsys, monkeypatch):
    """retouch("guide", "pag", ...) gives (exit code, standard output, standard error)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["retouch", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return call


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline") / "sd"
    tiny.stable_diffusion().save_pretrained(folder)
    return folder


def test_images_with_a_technique_and_plainly_from_the_same_noise(retouch, pipeline, tmp_path):
    arguments = ["--pipeline", pipeline, "--prompt", "a red circle", "--images", 2, "--steps", 3, "--scale", 2.0]
    code, said, err = retouch("guide", "pag", *arguments, "--guidance-scale", 4.0, "--out", tmp_path / "out")
    assert code == 0, err
    names = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert names == ["comparison.png", "guidance.json", "pag-0.png", "pag-1.png", "plain-0.png", "plain-1.png"]
    denoiser = Denoiser.from_pipeline(tiny.stable_diffusion())
    noise = torch.randn(2, 4, 8, 8, generator=seeds.generator(0, "noise"))
    for name, guidance in (("plain", cfg(4.0)), ("pag", cfg(4.0) + pag(2.0))):
        expected = denoiser.decode(sample(denoiser, noise, "a red circle", times=3, guidance=guidance))
        found = np.asarray(Image.open(tmp_path / "out" / f"{name}-1.png"))
        assert np.abs(found / 255 - expected[1].permute(1, 2, 0).numpy()).max() < 0.01
    assert Image.open(tmp_path / "out" / "comparison.png").size == (2 * 128 + 4, 2 * 128 + 4)
    evidence = json.loads((tmp_path / "out" / "guidance.json").read_text())
    assert evidence["options"]["scale"] == "2.0" and evidence["request"]["prompt"] == "a red circle"
    assert "the same noise in each column" in said


@pytest.mark.parametrize(
    "technique",
    [["skip_tuning", "--rho-bottom", "0.5"], ["a_star", "--words", "circle, blue square", "--resolution", "4"]],
)
def test_other_techniques_of_a_prompt(technique, retouch, pipeline, tmp_path):
    prompt = "a circle left of a blue square"
    arguments = ["--pipeline", pipeline, "--prompt", prompt, "--images", 1, "--steps", 2, "--out", tmp_path / "out"]
    code, _, err = retouch("guide", *technique, *arguments)
    assert code == 0, err
    plain, steered = (np.asarray(Image.open(tmp_path / "out" / f"{n}-0.png")) for n in ("plain", technique[0]))
    assert (plain != steered).any()


def test_without_a_pipeline_it_is_the_embedded_one(retouch, tmp_path, monkeypatch):
    (tmp_path / "shapes").mkdir()  # a folder of this name that holds no pipeline is not meant
    monkeypatch.chdir(tmp_path)
    prompt = ["--prompt", "a red circle and a blue square", "--images", 1, "--steps", 2]
    code, _, err = retouch("guide", "a_star", *prompt, "--words", "circle,square", "--out", tmp_path / "both")
    assert code == 0, err
    assert Image.open(tmp_path / "both" / "plain-0.png").size == (64, 64)
    assert json.loads((tmp_path / "both" / "guidance.json").read_text())["request"]["pipeline"] == "shapes"
    arguments = ["--pipeline", "shapes/dit-small", "--prompt", "red circle", "--images", 1, "--steps", 2]
    code, _, err = retouch("guide", "pag", *arguments, "--layers", "transformer_blocks.0", "--out", tmp_path / "dit")
    assert code == 0, err


def test_a_class_of_dit(retouch, tmp_path):
    tiny.dit().save_pretrained(tmp_path / "dit")
    arguments = [
        "--pipeline",
        tmp_path / "dit",
        "--prompt",
        "3",
        "--images",
        1,
        "--steps",
        2,
        "--out",
        tmp_path / "out",
    ]
    code, _, err = retouch("guide", "cfgpp", *arguments)
    assert code == 0, err
    assert "retouch guide TECHNIQUE" in retouch("guide")[1]
    assert "--reference-steps" in retouch("guide", "cfgpp", "--help")[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pog"], "Did you mean pag"),
        (["pag"], "--prompt is missing"),
        (["pag", "--pipeline", "nowhere", "--prompt", "a"], "There is no pipeline at nowhere"),
        (["pag", "--pipeline", "shapes/dit", "--prompt", "a"], "Did you mean shapes/dit-small or shapes/dit-large"),
        (["pag", "--pipeline", "HERE", "--prompt", "a", "--layers", "middle"], "layers is 'middle'"),
        (["pag", "--pipeline", "HERE", "--prompt", "a", "--scale", "-1"], "scale is -1.0"),
        (["cfgpp", "--pipeline", "HERE", "--prompt", "a", "--scale", "2"], "scale is 2.0, but must be at most 1.5"),
        (["cfgpp", "--pipeline", "HERE", "--prompt", "a", "--steps", "0"], "--steps is 0"),
        (["a_star", "--pipeline", "HERE", "--prompt", "a red circle"], "words is empty"),
        (["elucd", "--pipeline", "HERE", "--prompt", "a"], "elucd needs more than a prompt"),
        (["cfgpp", "--pipeline", "HERE", "--prompt", "a red circle " * 9], "but must have at most 12"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(retouch, pipeline, tmp_path, arguments, words):
    arguments = [pipeline if word == "HERE" else word for word in arguments]
    code, _, err = retouch("guide", *arguments, "--out", tmp_path / "out")
    assert code == 2
    assert words in err
    assert len(err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
