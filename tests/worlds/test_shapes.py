"""The world `shapes`: scenes, captions that say what they show, exact layers, and an oracle that reads images."""

from collections import Counter
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch

from retouch.core.data import TensorData
from retouch.core.errors import InputError
from retouch.worlds import names, shapes, world
from retouch.worlds.shapes import oracle, oracle_quality
from retouch.worlds.shapes.captions import holds
from retouch.worlds.shapes.models import references
from retouch.worlds.shapes.scenes import GAP, MARGIN, all_things, extent


def scenes(count, split="test", **choices):
    distribution = shapes.Distribution(**choices)
    return [shapes.scene(split, i, seed=5, distribution=distribution) for i in range(count)]


def test_the_world_is_found():
    assert "shapes" in names() and world("shapes") is shapes
    assert set(shapes.VARIANTS) == set(references.VARIANTS) and shapes.CLASSES == shapes.SHAPES


# Scenes


def test_scenes_depend_on_seed_split_and_number_alone(global_rng_untouched):
    one = shapes.scene("train", 3)
    assert one == shapes.scene("train", 3)
    others = [shapes.scene("test", 3), shapes.scene("train", 4), shapes.scene("train", 3, seed=1)]
    assert one not in others
    assert shapes.data("train", count=20).scenes == shapes.data("train", count=30, size=32).scenes[:20]


def test_splits_share_no_scene():
    drawn = [s for split in shapes.SPLITS for s in shapes.data(split, count=500).scenes]
    assert len(set(drawn)) == 1500


def test_scenes_keep_their_rules():
    drawn = scenes(400, counts=(1, 2, 3, 4))
    for scene in drawn:
        boxes = []
        for thing in scene.things:
            left, right, up, down = extent(thing)
            boxes.append((thing.x - left, thing.x + right, thing.y - up, thing.y + down))
        assert min(min(box) for box in boxes) >= MARGIN - 1e-9
        assert max(max(box) for box in boxes) <= 1 - MARGIN + 1e-9
        for a, b in combinations(boxes, 2):
            assert max(a[0] - b[1], b[0] - a[1], a[2] - b[3], b[2] - a[3]) >= GAP - 1e-9
        assert len({(thing.shape, thing.colour) for thing in scene.things}) == len(scene.things)
    for name, values in shapes.ATTRIBUTES.items():
        seen = Counter(getattr(thing, name) for scene in drawn for thing in scene.things)
        assert set(seen) == set(values)
        assert min(seen.values()) > 0.6 * max(seen.values())
    assert set(Counter(scene.background for scene in drawn)) == set(shapes.BACKGROUNDS)


def test_distributions_choose_what_is_drawn():
    red = scenes(50, colours=("red",), styles=("flat", "glossy"), counts=(2,), backgrounds=("navy",))
    assert {t.colour for s in red for t in s.things} == {"red"}
    assert {t.style for s in red for t in s.things} == {"flat", "glossy"}
    assert {s.background for s in red} == {"navy"} and {len(s.things) for s in red} == {2}
    kept = scenes(30, keep=lambda s: not any(t.shape == "star" and t.colour == "blue" for t in s.things))
    assert len(kept) == 30
    overlapping = scenes(50, counts=(3,), sizes=("large",), overlap=True)
    assert any(float(shapes.silhouettes(s).sum(0).max()) > 1.5 for s in overlapping)
    faint = scenes(30, opacity=(0.3, 0.6))
    assert all(0.3 <= t.opacity <= 0.6 for s in faint for t in s.things)


# Images, masks, layers


@pytest.mark.parametrize("size", [32, 64, 50])
def test_images_of_one_scene_and_of_many_agree(size):
    some = scenes(10, counts=(0, 1, 2, 3))
    images = shapes.render(some, size)
    assert images.shape == (10, 3, size, size) and images.dtype == torch.float32
    assert float(images.min()) >= 0 and float(images.max()) <= 1
    for image, scene in zip(images, some, strict=True):
        assert torch.equal(image, shapes.render(scene, size))


@pytest.mark.parametrize("choices", [{}, {"overlap": True, "counts": (3,)}, {"opacity": (0.3, 1.0), "overlap": True}])
def test_layers_composite_back_to_the_image(choices):
    for scene in [*scenes(20, **choices), shapes.Scene((), "white")]:
        layers = shapes.layers(scene, 48)
        assert layers.shape == (1 + len(scene.things), 4, 48, 48)
        assert torch.equal(shapes.composite(layers), shapes.render(scene, 48))


def test_masks_say_what_is_seen():
    scene = shapes.Scene((shapes.Thing("square", "red", x=0.4, y=0.5), shapes.Thing("square", "blue", x=0.55, y=0.5)))
    alphas, seen, filled = shapes.alphas(scene), shapes.visible(scene), shapes.silhouettes(scene)
    assert torch.equal(alphas, filled)  # flat and opaque
    assert torch.equal(seen[1], alphas[1])  # in front
    assert torch.equal(seen[0], alphas[0] * (1 - alphas[1]))
    assert float(seen.sum(0).max()) <= 1
    image = shapes.render(scene)
    red, blue = (torch.tensor(shapes.COLOURS[name])[:, None] for name in ("red", "blue"))
    assert torch.allclose(image[:, seen[0] == 1], red.expand(-1, int((seen[0] == 1).sum())))
    assert torch.allclose(image[:, seen[1] == 1], blue.expand(-1, int((seen[1] == 1).sum())))
    assert torch.allclose(image[:, seen.sum(0) == 0], torch.tensor(0.5))


def test_an_outline_has_a_hole_and_its_silhouette_has_none():
    scene = shapes.Scene((shapes.Thing("circle", "red", style="outlined"),))
    assert float(shapes.alphas(scene)[0, 32, 32]) == 0
    assert float(shapes.silhouettes(scene)[0, 32, 32]) == 1


def test_a_shape_covers_its_area_wherever_it_lies():
    areas = {"circle": np.pi * 0.95**2, "square": 4 * 0.84**2, "cross": 8 * 0.42 - 4 * 0.42**2}
    areas |= {"triangle": 3 * 3**0.5 / 4 * 1.15**2, "heart": (4 + np.pi) * 0.62**2}
    for name, area in areas.items():
        for x in (0.5, 0.503, 0.4711):
            scene = shapes.Scene((shapes.Thing(name, "red", x=x, y=0.5 + x / 20),))
            assert float(shapes.silhouettes(scene, 256).sum()) == pytest.approx(area * (0.18 * 256) ** 2, rel=0.01)


# Captions


def test_parse_is_the_inverse_of_caption():
    for scene in scenes(25, counts=(0, 1, 2, 3, 4)):
        for few in range(len(shapes.SAYABLE) + 1):
            for say in combinations(shapes.SAYABLE, few):
                for template in range(shapes.TEMPLATES):
                    text = shapes.caption(scene, say=say, template=template)
                    assert shapes.parse(text) == shapes.describe(scene, say), text
                    assert [shapes.VOCABULARY[i] for i in shapes.tokenize(text)] == text.split()


def test_captions_in_words():
    circle = shapes.Thing("circle", "red", x=0.2)
    square = shapes.Thing("square", "orange", "small", "outlined", x=0.7, y=0.6)
    scene = shapes.Scene((circle, square), "navy")
    assert shapes.caption(scene) == "a large flat red circle left of a small outlined orange square on navy"
    short = ("shape", "colour")
    assert shapes.caption(scene, say=short) == "a red circle and an orange square"
    texts = [shapes.caption(scene, say=("shape", "relation", "background"), template=t) for t in range(4)]
    assert texts == [
        "a circle left of a square on navy",
        "a picture of a circle to the left of a square on a navy background",
        "a navy background with a circle left of a square",
        "on navy there is a circle to the left of a square",
    ]
    assert shapes.caption(scene, say=("colour",)) == "a red thing and an orange thing"
    assert shapes.caption(shapes.Scene((), "gray")) == "nothing on gray"
    three = shapes.Scene((circle, square, shapes.Thing("star", "pink", x=0.25, y=0.1)), "navy")
    text = "a circle left of a square and below a star"
    assert shapes.caption(three, say=("shape", "relation")) == text
    assert shapes.parse("A  circle left of a square AND below a star").relations == ("left of", "below")


def test_relations_that_are_said_hold():
    for scene in scenes(200, counts=(2, 3)):
        first = scene.things[0]
        for other, relation in zip(scene.things[1:], shapes.describe(scene).relations, strict=True):
            assert holds(relation, (first.x, first.y), (other.x, other.y))


def test_paraphrases_say_true_things_in_many_ways():
    samples = shapes.data("validation", count=60, paraphrase=True)
    assert samples.captions == shapes.data("validation", count=60, paraphrase=True).captions
    starts = Counter(text.split()[0] + text.split()[1] for text in samples.captions)
    assert len(starts) > 5
    for text, scene in zip(samples.captions, samples.scenes, strict=True):
        said, full = shapes.parse(text), shapes.describe(scene)
        assert said.background in (None, full.background)
        for mention, whole in zip(said.things, full.things, strict=True):
            assert mention.said().items() <= whole.said().items()
            assert mention.shape and mention.colour
        assert all(a in (None, b) for a, b in zip(said.relations, full.relations, strict=True))


@pytest.mark.parametrize(
    "text", ["", "a circle a square", "a circle and left of a square", "a red circle on", "a circle left a square"]
)
def test_captions_outside_of_the_grammar_are_refused(text):
    with pytest.raises(InputError, match="caption is"):
        shapes.parse(text)


# Data sets


def test_samples_are_images_with_captions():
    samples = shapes.data("test", count=5, size=32)
    image, text = samples[2]
    assert torch.equal(image, samples.images[2])
    assert torch.equal(samples[2][0], image)
    assert text == shapes.caption(samples.scenes[2])
    assert len(samples) == 5 and len(shapes.data("validation")) == 500
    images, texts = next(iter(torch.utils.data.DataLoader(samples, batch_size=4)))
    assert images.shape == (4, 3, 32, 32) and len(texts) == 4


def test_classification_has_one_thing_and_its_label():
    data = shapes.classification("train", "colour", "shape", count=40)
    assert isinstance(data, TensorData) and data.inputs.shape == (40, 3, 32, 32)
    names = shapes.classes("colour", "shape")
    assert len(names) == 48 and names[0] == "red circle"
    for reading, label in zip(oracle.read(data.inputs), data.targets.tolist(), strict=True):
        assert f"{reading.things[0].colour} {reading.things[0].shape}" == names[label]
    assert shapes.classification("train", count=3).targets.max() < len(shapes.CLASSES)


# The oracle


@pytest.mark.parametrize("size", [32, 64])
def test_the_oracle_reads_every_thing_exactly(size):
    rng = np.random.default_rng(size)
    singles = []
    for number, thing in enumerate(all_things()):
        x, y = 0.3 + 0.4 * rng.random(2)
        singles.append(shapes.Scene((replace(thing, x=x, y=y),), tuple(shapes.BACKGROUNDS)[number % 4]))
    chosen = singles if size == 32 else singles[::5]
    readings = oracle.read(shapes.render(chosen, size))
    for scene, reading in zip(chosen, readings, strict=True):
        assert reading.valid and reading.background == scene.background and len(reading.things) == 1
        drawn, read = scene.things[0], reading.things[0]
        assert all(getattr(drawn, name) == getattr(read, name) for name in shapes.ATTRIBUTES), drawn
        assert read.x == pytest.approx(drawn.x, abs=0.6 / size)
        assert read.y == pytest.approx(drawn.y, abs=0.6 / size)
        assert read.radius == pytest.approx(drawn.radius, rel=0.1)
        assert reading.error < 0.02


@pytest.mark.parametrize("size", [32, 64])
def test_the_oracle_reads_every_scene_exactly(size):
    some = scenes(200 if size == 32 else 100, counts=(0, 1, 2, 3))
    readings = oracle.read(shapes.render(some, size))
    rates = oracle_quality.accuracy(readings, some)
    assert all(rates[name] == 100 for name in ("background", *shapes.ATTRIBUTES)), rates
    assert rates["count"] == 100 if size == 64 else rates["count"] > 99, rates  # at 32 pixels two may run together
    assert rates["place"] < 0.002
    again = shapes.render([reading.scene() for reading in readings], size)
    assert float((again - shapes.render(some, size)).abs().mean()) < 0.005


@pytest.mark.parametrize(("wear", "size"), [("noise", 64), ("noise and JPEG", 64), ("blur", 64), ("noise", 32)])
def test_the_oracle_reads_worn_images(wear, size):
    some = scenes(60)
    images = oracle_quality.worn(
        shapes.render(some, size), **oracle_quality.WEAR[wear], generator=torch.Generator().manual_seed(1)
    )
    rates = oracle_quality.accuracy(oracle.read(images), some)
    assert all(rates[name] >= 99 for name in ("count", "background", *shapes.ATTRIBUTES)), rates


def test_scores_are_probabilities_and_fall_with_noise():
    scene = shapes.Scene((shapes.Thing("square", "blue", "small"),))
    image = shapes.render(scene)
    noisy = (image + 0.25 * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    clear, unclear = (reading.things[0] for reading in oracle.read(torch.stack([image, noisy])))
    for name, values in shapes.ATTRIBUTES.items():
        assert tuple(clear.scores[name]) == values
        assert sum(clear.scores[name].values()) == pytest.approx(1, abs=1e-4)
        assert clear.confidence(name) > 0.95
    assert unclear.confidence("shape") < clear.confidence("shape")
    assert unclear.explained < clear.explained


@pytest.mark.parametrize(("shape", "colour"), [("square", "blue"), ("heart", "blue"), ("triangle", "red")])
def test_things_that_touch_are_taken_apart(shape, colour):
    one = shapes.Thing("circle", "red", x=0.3)
    other = shapes.Thing(shape, colour)
    other = replace(other, x=0.3 + extent(one)[1] + extent(other)[0])
    reading = oracle.read(shapes.render([shapes.Scene((one, other))]))[0]
    assert [(t.colour, t.shape) for t in reading.things] == [("red", "circle"), (colour, shape)]


def test_images_that_are_no_scenes_are_not_valid():
    draw = torch.Generator().manual_seed(0)
    nothing = shapes.render(shapes.Scene((), "gray"))
    noise = torch.rand(3, 64, 64, generator=draw)
    blob = torch.nn.functional.interpolate(torch.rand(1, 3, 4, 4, generator=draw), 64, mode="bicubic")[0].clamp(0, 1)
    assert [reading.valid for reading in oracle.read(torch.stack([nothing, noise, blob]))] == [False] * 3


def test_matches_judges_each_part():
    circle, square = shapes.Thing("circle", "red", x=0.25), shapes.Thing("square", "blue", "small", x=0.75)
    reading = oracle.read(shapes.render([shapes.Scene((circle, square), "black")]))[0]
    true = dict.fromkeys(("count", "objects", "attributes", "relations", "background", "all"), True)

    def wrong(text):
        return {part for part, holds in oracle.matches(reading, text).items() if not holds}

    assert oracle.matches(reading, "a large red circle left of a small blue square on black") == true
    assert wrong("a square right of a circle") == set()
    assert wrong("a blue thing and a red thing") == set()
    assert wrong("a blue circle left of a red square") == {"attributes", "all"}
    assert wrong("a red circle right of a blue square") == {"relations", "all"}
    assert wrong("a red circle above a blue square") == {"relations", "all"}
    assert wrong("a red circle and a blue square on white") == {"background", "all"}
    assert wrong("a red circle") == {"count", "all"}
    assert wrong("a red circle left of a blue star") == {"objects", "attributes", "relations", "all"}
    assert wrong("a red circle and a blue square and a star") == {"count", "objects", "attributes", "all"}
    assert wrong("nothing on black") == {"count", "all"}
    image = shapes.render(shapes.Scene((circle, square), "black"))
    assert oracle.matches(image, "a red circle on black")["background"]


def test_matches_chooses_among_alike_things_by_relation():
    things = (shapes.Thing("circle", "red", y=0.2), shapes.Thing("circle", "blue", y=0.75))
    image = shapes.render(shapes.Scene(things))
    assert oracle.matches(image, "a circle above a circle")["all"]
    assert not oracle.matches(image, "a blue circle above a circle")["all"]


def test_prompt_fidelity_of_true_and_of_shuffled_captions():
    samples = shapes.data("test", count=40, size=32, paraphrase=True)
    readings = oracle.read(samples.images)
    assert set(oracle.prompt_fidelity(readings, samples.captions).values()) == {1.0}
    shuffled = [*samples.captions[1:], samples.captions[0]]
    rates = oracle.prompt_fidelity(readings, shuffled)
    assert rates["all"] < 0.1 and rates["colour"] < 0.4 and rates["valid"] == 1
    assert "style" not in oracle.prompt_fidelity(readings[:1], ["a red circle"])


def test_change_outside_sees_only_what_is_outside():
    first, second = shapes.Thing("circle", "red", x=0.25), shapes.Thing("star", "blue", x=0.75)
    before = shapes.render([shapes.Scene((first, second))])
    after = shapes.render([shapes.Scene((replace(first, colour="green", style="hatched"), second))])
    mask = (shapes.silhouettes(shapes.Scene((first, second)))[0] > 0).float()
    assert oracle.change_outside(before, after, mask).tolist() == [0]
    assert float(oracle.change_outside(before, after, torch.zeros(64, 64))) > 0.01
    half = torch.zeros(64, 64)
    half[:, :32] = 1
    edited = before.clone()
    edited[..., 32:] += 0.25
    assert oracle.change_outside(before, edited, half[None]).tolist() == pytest.approx([0.25])


def test_features_tell_distributions_apart():
    def distance(a, b):
        (m, s), (n, t) = ((x.mean(0), x.T.cov()) for x in (a.double(), b.double()))
        root = torch.linalg.eigvals(s @ t).real.clamp(min=0).sqrt().sum()
        return float((m - n).square().sum() + s.trace() + t.trace() - 2 * root)

    one, two = (oracle.oracle_features(shapes.data(split, count=80, size=32).images) for split in ("train", "test"))
    other = shapes.Distribution(colours=("red", "orange"), styles=("outlined",))
    three = oracle.oracle_features(shapes.data("test", count=80, size=32, distribution=other).images)
    assert one.shape == (80, 44) and bool(torch.isfinite(one).all())
    assert distance(one, one) == pytest.approx(0, abs=1e-3)
    assert distance(one, three) > 3 * distance(one, two)
    assert oracle.oracle_features(torch.zeros(0, 3, 32, 32)).shape == (0, 44)


def test_the_oracle_leaves_randomness_and_its_input_alone(global_rng_untouched):
    images = shapes.render(scenes(4))
    before = images.clone()
    assert oracle.read(images) == oracle.read(images.double())
    assert torch.equal(images, before)
    single = oracle.read(images[1:2])[0]  # batching changes nothing
    for one, two in zip(single.things, oracle.read(images)[1].things, strict=True):
        assert all(getattr(one, name) == getattr(two, name) for name in shapes.ATTRIBUTES)
        assert (one.x, one.y, one.radius) == pytest.approx((two.x, two.y, two.radius), abs=1e-4)


# Bad input

NEVER = shapes.Distribution(counts=(0,), keep=lambda scene: False)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: shapes.Thing("blob", "red"), "shape is 'blob'"),
        (lambda: shapes.Thing("circle", "mauve"), "colour is 'mauve'"),
        (lambda: shapes.Thing("circle", "red", x=1.2), "x is 1.2"),
        (lambda: shapes.Thing("circle", "red", opacity=0), "opacity is 0"),
        (lambda: shapes.Scene((), "green"), "background is 'green'"),
        (lambda: shapes.Distribution(counts=(5,)), "counts is 5"),
        (lambda: shapes.Distribution(shapes=("circle", "blob")), "shapes is 'blob'"),
        (lambda: shapes.Distribution(colours="red"), "colours is 'red'"),
        (lambda: shapes.Distribution(styles=()), r"styles is \(\)"),
        (lambda: shapes.Distribution(counts=(2,), shapes=("circle",), colours=("red",)), "at most 1 things"),
        (lambda: shapes.Distribution(opacity=(0.9, 0.5)), "opacity is 0.9"),
        (lambda: shapes.scene("all", 0), "split is 'all'"),
        (lambda: shapes.scene("test", -1), "index is -1"),
        (lambda: shapes.scene("test", 0, distribution=NEVER), "keep accepts none"),
        (lambda: shapes.render(shapes.Scene(()), 16), "size is 16"),
        (lambda: shapes.data("test", size=8), "size is 8"),
        (lambda: shapes.data("test", count=0), "count is 0"),
        (lambda: shapes.caption(shapes.Scene(()), say=("smell",)), "say is 'smell'"),
        (lambda: shapes.caption(shapes.Scene(()), template=4), "template is 4"),
        (lambda: shapes.parse("a rod circle"), "does not know 'rod'.*Did you mean red"),
        (lambda: shapes.tokenize("a photo"), "'photo'"),
        (lambda: shapes.classes("weight"), "attributes is 'weight'"),
        (lambda: shapes.labels(scenes(3, counts=(2,)), "shape"), "scenes of one thing"),
        (lambda: shapes.composite(torch.zeros(3, 64, 64)), "layers have the form"),
        (lambda: oracle.read(torch.zeros(3, 64, 64)), r"images have the form \(3, 64, 64\)"),
        (lambda: oracle.read(torch.zeros(1, 3, 16, 16)), "size is 16"),
        (lambda: oracle.read(torch.full((1, 3, 32, 32), torch.nan)), "not finite"),
        (lambda: oracle.prompt_fidelity([], []), "0 captions for 0 images"),
        (lambda: oracle.change_outside(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8), torch.ones(8, 8)), "mask"),
        (lambda: oracle.change_outside(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 9, 8), torch.ones(8, 8)), "forms"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()
