"""`retouch audit` as users meet it, on small random pipelines and classifiers from disk."""

import json
import sys

import pytest
import tiny_pipelines as tiny
import torch
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from retouch.audit.sage.classifiers import load_judge
from retouch.cli import main as cli
from retouch.core.checkpoints import load_tensors
from retouch.core.diffusion.denoiser import Denoiser
from retouch.core.diffusion.guidance import cfg
from retouch.core.diffusion.sampling import sample


@pytest.fixture
def retouch(capsys, monkeypatch):
    """retouch("audit", "sage", ...) gives (exit code, standard output, standard error)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["retouch", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return call


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A pipeline and three classifiers."""
    root = tmp_path_factory.mktemp("folders")
    tiny.stable_diffusion().save_pretrained(root / "sd")
    names = {"circle": 0, "square": 1, "star": 2}
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = ViTConfig(image_size=8, patch_size=4, label2id=names, id2label={n: k for k, n in names.items()}, **sizes)
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    for number in range(3):
        tiny.made(lambda: ViTForImageClassification(config), number).save_pretrained(root / str(number))
        processor.save_pretrained(root / str(number))
    return root


def test_doubtful_images_come_first(retouch, folders, tmp_path):
    arguments = ["--pipeline", folders / "sd", "--prompt", "a red circle", "--count", 10, "--steps", 10]
    code, said, err = retouch("audit", "mode_interpolation", *arguments, "--window", 0.5, "--out", tmp_path / "out")
    assert code == 0, err
    found = json.loads((tmp_path / "out" / "findings.json").read_text())
    scores = [row["score"] for row in found["images"]]
    assert scores == sorted(scores, reverse=True) and len(scores) == 10
    assert [row["kept"] for row in found["images"]] == [False] + [True] * 9
    assert sorted(row["noise"] for row in found["images"]) == list(range(10))
    assert (tmp_path / "out" / "0009.png").exists() and (tmp_path / "out" / "overview.png").exists()
    assert load_tensors(tmp_path / "out" / "tensors.safetensors")["noise"].shape == (10, 4, 8, 8)
    assert found["words"][0] in said


def test_failures_are_searched_with_classifiers_from_disk(retouch, folders, tmp_path):
    judges = ",".join(str(folders / str(number)) for number in range(3))
    arguments = ["--pipeline", folders / "sd", "--prompt", "a red circle", "--classifiers", judges, "--label", "circle"]
    rest = ["--count", 4, "--steps", 3, "--iterations", 3, "--guidance-scale", 2.0, "--out", tmp_path / "out"]
    code, said, err = retouch("audit", "sage", *arguments, *rest)
    assert code == 0, err
    found = json.loads((tmp_path / "out" / "findings.json").read_text())
    assert len(found["images"]) == 4 and "of 4 latents were turned into failures" in said
    for row in found["images"]:
        assert not row["success"] or (row["fooled"] and row["confirmed"] and not row["failed from the start"])
    latents = load_tensors(tmp_path / "out" / "tensors.safetensors")["latents"]
    denoiser = Denoiser.from_pipeline(tiny.stable_diffusion())
    images = denoiser.decode(sample(denoiser, latents, "a red circle", times=3, guidance=cfg(2.0)))
    verdicts = torch.stack([load_judge(str(folders / str(n)))[0](images).argmax(1) != 0 for n in range(3)])
    assert [row["confirmed"] for row in found["images"]] == verdicts[2].tolist()


def test_a_judge_is_its_model_behind_its_processor(folders):
    judge, classes = load_judge(str(folders / "0"))
    model = ViTForImageClassification.from_pretrained(folders / "0").eval()
    processor = ViTImageProcessorPil.from_pretrained(folders / "0")
    image = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    pixels = processor(list(image), return_tensors="pt", do_rescale=False)["pixel_values"]
    torch.testing.assert_close(judge(image), model(pixels).logits, rtol=1e-4, atol=1e-4)
    assert classes["star"] == 2
    image.requires_grad_()
    judge(image)[:, 0].sum().backward()
    assert image.grad.abs().sum() > 0 and all(p.grad is None for p in judge.parameters())
    assert judge(torch.rand(1, 3, 20, 30)).shape == (1, 3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sagee"], "Did you mean sage"),
        (["sage"], "--prompt is missing"),
        (["sage", "--pipeline", "SD", "--prompt", "a"], "classifiers is '', but must name at least two folders"),
        (["sage", "--pipeline", "SD", "--prompt", "a", "--classifiers", "SD,SD"], "has no preprocessor_config.json"),
        (
            ["sage", "--pipeline", "SD", "--prompt", "a", "--classifiers", "A,B", "--label", "cirle"],
            "label is 'cirle', but must be a class of the classifiers. Did you mean circle",
        ),
        (["mode_interpolation", "--pipeline", "SD", "--prompt", "a", "--keep", "2"], "keep is 2.0"),
        (["mode_interpolation", "--pipeline", "nowhere", "--prompt", "a"], "There is no pipeline at nowhere"),
        (["teacher_hacking", "--prompt", "a"], "teacher_hacking is no probe of a pipeline"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(retouch, folders, tmp_path, arguments, words):
    places = {
        "SD": folders / "sd",
        "SD,SD": f"{folders / 'sd'},{folders / 'sd'}",
        "A,B": f"{folders / '0'},{folders / '1'}",
    }
    code, _, err = retouch("audit", *[places.get(word, word) for word in arguments], "--out", tmp_path / "out")
    assert code == 2
    assert words in err
    assert len(err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
