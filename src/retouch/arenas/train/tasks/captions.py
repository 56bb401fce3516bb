"""Images and their captions: what a contrast of pairs learns of each attribute that the captions mention."""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retouch.arenas.contest import Claim, Entry, Measure, Plot
from retouch.arenas.train import Replica, Solution, Split, Task
from retouch.core.data import TensorData
from retouch.core.models import Batch, forward, mode, unpack
from retouch.train.cloob import effective_rank, embeddings_of, info_nce_loss, infoloob_loss, retrievals
from retouch.worlds import shapes
from retouch.worlds.shapes.scenes import all_things

SAMPLES, HELD_OUT = 2000, 400
INV_TAU = 14.3  # that CLIP starts from; at 30 its error is no lower
BETA = 30.0  # found for CLOOB
JUDGED = ("colour", "shape", "size")


def tokens(captions: Iterable[str]) -> Tensor:
    """Words by number from 1 on, and 0 after the last (n, longest)."""
    rows = [torch.tensor(shapes.tokenize(text)) + 1 for text in captions]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


def pairs(split: str, count: int, seed: int, *, things: tuple[int, ...] = (1, 2)) -> tuple[TensorData, Any]:
    """Images of 32 x 32 pixels with captions that say everything, and their scenes."""
    samples = shapes.data(split, size=32, count=count, distribution=shapes.Distribution(counts=things), seed=seed)
    return TensorData({"pixel_values": samples.images, "input_ids": tokens(samples.captions)}), samples.scenes


def draw(seed: int, search: bool) -> Split:
    """New scenes for every replica; those judged on are of another split of the world."""
    held_out = "validation" if search else "test"
    train, _ = pairs("train", SAMPLES, seed)
    several, _ = pairs(held_out, HELD_OUT, seed)
    single, scenes = pairs(held_out, HELD_OUT, seed, things=(1,))
    labels = {name: shapes.labels(scenes, name) for name in JUDGED}
    return Split(train=train, test=several, notes={"single": single, "labels": labels})


class Pairs(NamedTuple):
    """Embeddings of images and of texts (n, 64), normalised."""

    image_embeds: Tensor
    text_embeds: Tensor


class Everywhere(nn.Module):
    """Largest and mean value of each channel over all places: what is seen, not where."""

    def forward(self, maps: Tensor) -> Tensor:
        """Maps (n, c, h, w) to (n, 2 c)."""
        return torch.cat([maps.amax((2, 3)), maps.mean((2, 3))], 1)


class Towers(nn.Module):
    """Three convolutions for an image, a bag of words for a text."""

    def __init__(self, width: int = 8, size: int = 64) -> None:
        super().__init__()
        self.image = nn.Sequential(
            nn.Conv2d(3, width, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(2 * width, 4 * width, 3, padding=1),
            nn.ReLU(),
            Everywhere(),
            nn.Linear(8 * width, size),
        )
        self.words = nn.EmbeddingBag(len(shapes.VOCABULARY) + 1, size, mode="mean", padding_idx=0)
        self.text = nn.Sequential(nn.Linear(size, 2 * size), nn.ReLU(), nn.Linear(2 * size, size))

    def forward(self, pixel_values: Tensor, input_ids: Tensor) -> Pairs:
        """Images (n, 3, 32, 32) and words (n, length)."""
        return Pairs(self.embed_images(pixel_values), self.embed_texts(input_ids))

    def embed_images(self, pixel_values: Tensor) -> Tensor:
        """Images alone."""
        return F.normalize(self.image(2 * pixel_values - 1), dim=1)

    def embed_texts(self, input_ids: Tensor) -> Tensor:
        """Texts alone."""
        return F.normalize(self.text(self.words(input_ids)), dim=1)


@functools.cache
def prompts() -> tuple[Tensor, dict[str, Tensor]]:
    """A caption of every single thing on every background, and which value of each attribute it names."""
    scenes = [shapes.Scene((thing,), background) for thing in all_things() for background in shapes.BACKGROUNDS]
    return tokens(map(shapes.caption, scenes)), {name: shapes.labels(scenes, name) for name in JUDGED}


@torch.no_grad()
def zero_shot(model: Any, split: Split) -> dict[str, float]:
    """Share of single things whose attribute is that of the nearest prompts, in percent.

    A value's prompts are all captions that name it; their mean stands for it, as in CLIP's ensembles of prompts.
    """
    words, values = prompts()
    with mode(model, training=False):
        texts = model.embed_texts(words)
        images = model.embed_images(split.notes["single"].inputs["pixel_values"])
    found = {}
    for name in JUDGED:
        named = F.one_hot(values[name]).to(texts.dtype)
        classes = F.normalize(named.T @ texts, dim=1)
        right = (images @ classes.T).argmax(1) == split.notes["labels"][name]
        found[name] = 100 * float(right.double().mean())
    return found


def error(model: nn.Module, split: Split) -> float:
    """Zero-shot error, mean over attributes, in percent."""
    found = zero_shot(model, split)
    return 100.0 - sum(found.values()) / len(found)


@torch.no_grad()
def judge(model: Any, split: Split) -> dict[str, float]:
    """Zero-shot accuracies, retrieval, effective rank, and what a linear layer reads of the shape."""
    from sklearn.linear_model import RidgeClassifier

    found, inputs = zero_shot(model, split), split.test.inputs
    with mode(model, training=False):
        images, texts = model(**inputs)
        single = model.embed_images(split.notes["single"].inputs["pixel_values"])
    best = (images @ texts.T).argmax(1)
    same = (inputs["input_ids"][best] == inputs["input_ids"]).all(1)  # of two equal captions either is right
    half, named = len(single) // 2, split.notes["labels"]["shape"].numpy()
    probe = RidgeClassifier(alpha=1e-3).fit(single[:half].numpy(), named[:half])
    return {
        **found,
        "error": 100.0 - sum(found.values()) / len(found),
        "recall": 100 * float(same.double().mean()),
        "rank": float(effective_rank(images)),
        "probe": 100 * probe.score(single[half:].numpy(), named[half:]),
    }


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """AdamW at 3e-3."""
    return torch.optim.AdamW(parameters, lr=3e-3)


def info_nce(model: nn.Module, batch: Batch, run: Any = None) -> Tensor:
    """CLIP's loss."""
    return info_nce_loss(*embeddings_of(forward(model, unpack(batch)[0])), inv_tau=INV_TAU)


def infoloob(model: nn.Module, batch: Batch, run: Any = None) -> Tensor:
    """InfoLOOB of plain embeddings, both ways."""
    images, texts = embeddings_of(forward(model, unpack(batch)[0]))
    return infoloob_loss(images, texts, inv_tau=INV_TAU) + infoloob_loss(texts, images, inv_tau=INV_TAU)


def hopfield_info_nce(model: nn.Module, batch: Batch, run: Any = None) -> Tensor:
    """CLIP's loss of retrieved embeddings, in both memories."""
    xx, yx, yy, xy = retrievals(*embeddings_of(forward(model, unpack(batch)[0])), beta=BETA)
    return (info_nce_loss(xx, yx, inv_tau=INV_TAU) + info_nce_loss(yy, xy, inv_tau=INV_TAU)) / 2


def solve_with(objective: Any) -> Any:
    """An entry that only changes the objective."""

    def solve(replica: Replica) -> Solution:
        return replica.train(objective=objective)

    return solve


def worse(what: str) -> Claim:
    """The paper's finding about each half of CLOOB."""
    text = f"{what} is worse than InfoNCE in zero-shot classification."
    return Claim(text=text, problem="captions", measure="error", other="plain", relation="at least", source="ablation")


RICHER = Claim(
    text="Retrieval uses more directions of the embedding also with InfoNCE: a higher effective rank.",
    problem="captions",
    measure="rank",
    other="plain",
    relation="at least",
    source="ablation",
)


def percent(title: str, line: str) -> Measure:
    """A share."""
    return Measure(title=title, unit="%", better="high", line=line)


TASK = Task(
    name="captions",
    text=f"{SAMPLES} images of one or two things and their captions; two small towers, 800 steps of 128 pairs. Plain "
    "training is CLIP's loss (InfoNCE); the error is that of zero-shot classification of colour, shape and size.",
    split=draw,
    build=Towers,
    steps=800,
    batch_size=128,
    optimizer=adamw,
    objective=info_nce,
    error=error,
    judge=judge,
    target=30.0,
    measures={
        **{name: percent(name, f"Zero-shot accuracy on the {name} of single things.") for name in JUDGED},
        "recall": percent("recall@1", "Held-out images whose own caption is the nearest of 400."),
        "probe": percent("shape probe", "Accuracy of a linear classifier of shapes on the image embeddings."),
        "rank": Measure(
            title="effective rank",
            better="high",
            line="Eigenvalues of the covariance of image embeddings that hold 99% of its sum.",
        ),
    },
    baselines=(
        Entry(
            name="infoloob",
            title="InfoLOOB alone",
            kind="baseline",
            solve=solve_with(infoloob),
            problems=("captions",),
            claims=(worse("InfoLOOB without Hopfield"),),
        ),
        Entry(
            name="hopfield_infonce",
            title="Hopfield and InfoNCE",
            kind="baseline",
            solve=solve_with(hopfield_info_nce),
            problems=("captions",),
            claims=(worse("Hopfield with InfoNCE"), RICHER),
        ),
    ),
    plots=(
        Plot(
            kind="scatter",
            x="rank",
            y="shape",
            text="More directions in use, and what they know of the shape, which colours alone nearly make needless.",
            problems=("captions",),
        ),
    ),
)
