"""The reference models of the shapes world: tokenizer, recipes, and what is shipped with its recorded quality."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch.optim import AdamW
from transformers import CLIPTokenizer

from retouch.core.averages import MovingAverage
from retouch.core.data import TensorData
from retouch.core.diffusion.guidance import cfg
from retouch.core.diffusion.process import from_scheduler, spread
from retouch.core.diffusion.sampling import sample, unit_noise
from retouch.core.diffusion.steps import heun
from retouch.core.errors import InputError
from retouch.core.optimizers import MuonAdamW
from retouch.worlds import WEIGHTS, shapes
from retouch.worlds.shapes import oracle
from retouch.worlds.shapes.captions import VOCABULARY, caption, parse, with_article
from retouch.worlds.shapes.models import (
    architectures,
    building,
    latents,
    measures,
    recipes,
    references,
    training,
    wordings,
)

TINY = {name: replace(recipe, steps=2, batch_size=4, scenes=16) for name, recipe in recipes.RECIPES.items()}


# --- the tokenizer ----------------------------------------------------------------------------------------------------


def test_every_word_is_one_token_and_all_captions_fit(tmp_path):
    words = architectures.tokenizer()
    assert isinstance(words, CLIPTokenizer)
    assert all(words.tokenize(word) == [f"{word}</w>"] for word in VOCABULARY)
    scenes = shapes.data("test", count=200, distribution=shapes.Distribution(counts=(3,))).scenes
    for template in range(shapes.TEMPLATES):
        texts = [caption(scene, template=template) for scene in scenes]
        assert max(map(len, words(texts)["input_ids"])) <= architectures.TOKENS
        assert words.batch_decode(words(texts)["input_ids"], skip_special_tokens=True) == texts
    assert len(words.tokenize("zebra")) == 5  # spelled, not lost
    words.save_pretrained(tmp_path)
    assert CLIPTokenizer.from_pretrained(tmp_path)("a red circle") == words("a red circle")


def test_numbers_of_words_are_those_that_the_shipped_models_learned():
    """Whatever the process: where pairs are equally frequent, the order of the merges must not depend on hashes."""
    shipped = shapes.reference("pipeline").tokenizer
    assert architectures.tokenizer().get_vocab() == shipped.get_vocab()
    text = " ".join(sorted(VOCABULARY)[:30])
    assert architectures.tokenizer()(text) == shipped(text)


# --- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("muon", "kind"), [(False, AdamW), (True, MuonAdamW)])
def test_a_recipe_names_its_optimizer(monkeypatch, muon, kind):
    class Looks(MovingAverage):
        def on_step(self, run):
            seen.append((type(run.optimizer), run.optimizer.param_groups[0]["lr"]))

    seen = []
    monkeypatch.setattr(recipes, "MovingAverage", Looks)
    data = TensorData(torch.eye(2).repeat(4, 1), torch.ones(8, 1))
    model = torch.nn.Linear(2, 1)
    recipes.Recipe(4, 4, 0.1, 8, average=0.5, muon=muon).train(
        model, data, lambda m, b, run: (m(b[0]) - b[1]).square().mean(), seed=0
    )
    assert [kind for kind, _ in seen] == [kind] * 4
    assert max(rate for _, rate in seen) <= 0.1 and seen[-1][1] < seen[0][1]


def test_relations_are_told_in_the_second_caption_of_a_scene_and_not_in_the_first():
    given = wordings.wordings(40, 0)
    for scene, (short, placed, *_) in zip(given.scenes, given.captions, strict=True):
        assert parse(short).relations == (None,) * (len(scene.things) - 1)
        assert all(parse(placed).relations)


def test_crops_are_parts_of_their_images():
    images = shapes.data("train", count=3).images
    parts = latents.crops(images, torch.Generator().manual_seed(0))
    for image, part in zip(images, parts, strict=True):
        windows = image.unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
        assert (windows == part).flatten(1).all(1).any()


def test_what_is_to_be_read_off_a_caption():
    texts = ["a large red circle left of a small hatched blue square on gray", "a star"]
    ids = wordings.tokens(texts)
    told = wordings.readings(texts, ids)
    words = architectures.tokenizer().convert_ids_to_tokens(ids[0])
    circle, square = words.index("circle</w>"), words.index("square</w>")
    assert told["colour"][0, circle] == list(shapes.COLOURS).index("red")
    assert told["size"][0, square] == list(shapes.SIZES).index("small")
    assert told["style"][0, circle] == wordings.IGNORED and told["style"][0, square] == 2
    assert told["relation"][0, circle] == wordings.IGNORED
    assert wordings.SAID["relation"][told["relation"][0, square]] == "left of"
    end = words.index("<|endoftext|>")
    assert told["background"][0, end] == 0 and (told["background"][0, :end] == wordings.IGNORED).all()
    assert (told["background"][1] == wordings.IGNORED).all()
    assert int((told["shape"] != wordings.IGNORED).sum()) == 3


def test_wordings_say_nothing_but_the_truth():
    given = wordings.wordings(12, 0)
    assert len(given.scenes) == 12 and given.ids.shape == (12, wordings.WORDINGS, architectures.TOKENS)
    assert len({text for texts in given.captions for text in texts}) > 30
    readings = oracle.read(shapes.render(given.scenes, 64))
    for reading, texts in zip(readings, given.captions, strict=True):
        assert all(oracle.matches(reading, text)["all"] for text in texts)
        assert parse(texts[0]).background is None


def test_wordings_leave_out_nothing_that_is_unusual():
    given = wordings.wordings(60, 0)
    spoken = dict.fromkeys(recipes.USUAL, 0)
    for scene, texts in zip(given.scenes, given.captions, strict=True):
        for name, usual in recipes.USUAL.items():
            told = [all(getattr(mention, name) for mention in parse(text).things) for text in texts]
            if any(getattr(thing, name) != usual for thing in scene.things):
                assert all(told)
            else:
                assert not told[0] and not told[1]
                spoken[name] += sum(told)
    assert min(spoken.values()) > 10  # what is usual is said now and then, or nobody would know the words


def test_velocity_loss_is_zero_for_a_model_that_knows_the_noise():
    x0 = torch.randn(6, 4, 16, 16, generator=torch.Generator().manual_seed(1))

    def perfect(x, times):
        alpha, sigma = (spread(value, x) for value in training.PROCESS.levels(times))
        noise = (x - alpha * x0) / sigma
        return alpha * noise - sigma * x0

    draw = torch.Generator().manual_seed(0)
    assert float(training.velocity_loss(perfect, x0, draw)) < 1e-4
    assert float(training.velocity_loss(lambda x, times: torch.zeros_like(x), x0, draw)) > 0.5


def test_latents_are_kept_beside_a_checkpoint(tmp_path, monkeypatch):
    scenes, autoencoder = wordings.wordings(3, 0).scenes, recipes.built(architectures.new_autoencoder, 0).eval()
    made = latents.latents_of(scenes, autoencoder, tmp_path / "run")
    torch.testing.assert_close(made, latents.latents_of(scenes, autoencoder, None))
    monkeypatch.setattr(latents, "scaled", None)  # not encoded again
    assert torch.equal(latents.latents_of(scenes, autoencoder, tmp_path / "run"), made)
    with pytest.raises(InputError, match="has latents of other scenes"):
        latents.latents_of(scenes[::-1], autoencoder, tmp_path / "run")
    other = recipes.built(architectures.new_autoencoder, 1).eval()
    with pytest.raises(InputError, match="or another autoencoder"):
        latents.latents_of(scenes, other, tmp_path / "run")


def test_a_label_is_left_out_in_all_blocks_of_a_dit_or_in_none(monkeypatch):
    """Diffusers' own dropout, a draw a block, would leave hardly a sample without its class."""
    seen = []
    monkeypatch.setattr(training, "DROPPED", 0.5)

    def new():
        model = building.DITS["dit-small"]()
        for part in model.modules():
            if hasattr(part, "embedding_table"):
                part.embedding_table.register_forward_hook(lambda module, args, output: seen.append(args[0].tolist()))
        return model

    vae = recipes.built(architectures.new_autoencoder, 0).eval()
    training.dit(replace(TINY["dit-small"], batch_size=16), vae, new)
    rows = [labels for labels in seen if len(labels) == 16]
    assert rows and all(row == rows[0] for row in rows[:2])
    left_out = [architectures.NO_CLASS in row for row in rows]
    assert all(left_out) and not all(label == architectures.NO_CLASS for row in rows for label in row)


def test_noise_levels_of_training_are_those_of_the_pipelines():
    process = from_scheduler(references.scheduler())
    torch.testing.assert_close(process.alphas_cumprod, training.PROCESS.alphas_cumprod, rtol=1e-5, atol=1e-7)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    building.build(folder, recipes=TINY, measured=2, checkpoint=folder / "checkpoints")
    return folder


def test_build_writes_every_model_with_recipe_licence_and_quality(built):
    for variant in shapes.VARIANTS:
        folder = built / f"shapes-{variant}"
        recipe = json.loads((folder / "recipe.json").read_text())
        assert recipe["command"].startswith("retouch worlds build shapes") and "Apache-2.0" in recipe["licence"]
        assert recipe["recipes"] and all(part["steps"] == 2 for part in recipe["recipes"].values())
        assert references.quality(variant, folder=built).keys() == shapes.quality(variant).keys()
        weights = list(folder.rglob("*.safetensors"))
        assert weights and not list(folder.rglob("*.bin"))
    assert set(json.loads((built / "shapes-pipeline" / "recipe.json").read_text())["recipes"]) == {
        "autoencoder",
        "text",
        "unet",
    }


def test_build_goes_on_from_its_checkpoints_to_the_same_weights(built):
    before = (built / "shapes-dit-small" / "diffusion_pytorch_model.safetensors").read_bytes()
    building.build(built, recipes=TINY, measured=2, checkpoint=built / "checkpoints")
    assert (built / "shapes-dit-small" / "diffusion_pytorch_model.safetensors").read_bytes() == before


def test_measures_of_a_model_that_has_learned_nothing(built):
    found = references.quality("pipeline", folder=built)
    assert found["bound"] == 0 and found["frechet"] > found["frechet_real"]


# --- what is shipped --------------------------------------------------------------------------------------------------


def test_the_package_holds_all_weights_in_twenty_megabytes():
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20_000_000
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pkl", ".ckpt")]


def test_the_pipeline_is_a_stable_diffusion_pipeline_and_follows_its_prompt():
    pipe = shapes.reference("pipeline")
    assert type(pipe) is StableDiffusionPipeline
    assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.float32}
    prompts = ["a red circle", "a blue square", "a green star", "a pink heart"]
    draw = torch.Generator().manual_seed(0)
    images = pipe(prompts, num_inference_steps=15, guidance_scale=3.0, generator=draw, output_type="pt").images
    told = [oracle.prompt_fidelity(images, said)["colour"] for said in (prompts, prompts[1:] + prompts[:1])]
    assert told[0] > told[1]


def test_what_is_shipped_draws_what_it_is_asked_for():
    """A handful of what `quality` records: weights, tokenizer and noise levels belong together."""
    distribution = replace(recipes.SCENES, counts=(2,))
    scenes = shapes.data("validation", count=12, distribution=distribution).scenes
    for say in (("shape", "colour"), ("shape", "colour", "relation")):
        said = [caption(scene, say=say) for scene in scenes]
        told = oracle.prompt_fidelity(measures.drawn(shapes.denoiser(), said, scale=3.0, times=12, last="x0"), said)
        assert told["attributes"] >= 0.9 and told["relations"] >= 0.9
    for variant, settings in (("pixels", {"scale": 1.0, "step": heun}), ("dit-large", {"scale": 2.0})):
        names = architectures.CLASSES[::4]
        images = measures.drawn(shapes.denoiser(variant), names, times=12, **settings)
        assert oracle.prompt_fidelity(images, [with_article(name) for name in names])["all"] >= 0.75


def test_denoisers_take_captions_and_classes():
    for variant, wish in (("pipeline", "a red circle"), ("pixels", "red circle"), ("dit-small", "red circle")):
        model = shapes.denoiser(variant)
        noise = unit_noise(model, 2, torch.Generator().manual_seed(0))
        images = model.decode(sample(model, noise, wish, times=2, guidance=cfg(2.0)))
        side = 32 if variant == "pixels" else 64
        assert images.shape == (2, 3, side, side) and torch.isfinite(images).all()
    numbered = [
        sample(model, noise, wish, times=1)
        for model, noise in [(shapes.denoiser("pixels"), torch.ones(1, 3, 32, 32))]
        for wish in ("orange square", architectures.CLASSES.index("orange square"))
    ]
    assert torch.equal(*numbered)


def test_clip_tells_captions_apart():
    clip = shapes.reference("clip")
    scenes = shapes.data("test", count=8, distribution=recipes.SINGLE)
    with torch.no_grad():
        scores = measures._scores(clip, scenes.images, wordings.tokens(scenes.captions))
    assert float((scores.argmax(1) == torch.arange(8)).double().mean()) >= 0.75


def test_the_autoencoder_keeps_what_the_oracle_reads():
    assert shapes.quality("pipeline")["autoencoded"] >= 95


def test_prompts_are_kept_as_the_world_aims_at():
    """Recorded by `build` on what is shipped: 30 steps of DDIM at a guidance scale of 3, 500 prompts of each kind."""
    assert shapes.quality("pipeline")["single"] >= 95 and shapes.quality("pipeline")["bound"] >= 70


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: shapes.reference("unet"), "variant is 'unet'"),
        (lambda: shapes.denoiser("clip"), "variant is 'clip'"),
        (lambda: shapes.quality("vae"), "variant is 'vae'"),
        (lambda: references._labels([99]), "condition is 99"),
        (lambda: references._labels(["red cirle"]), "condition is 'red cirle'"),
    ],
)
def test_bad_input(wrong, words):
    with pytest.raises(InputError, match=words):
        wrong()
