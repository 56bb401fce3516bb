"""Captions to train on, and the text encoder, which learns to tell what is said of each thing."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retouch.core import seeds
from retouch.core.data import TensorData
from retouch.core.loop import Run
from retouch.core.models import Batch, unpack
from retouch.worlds import shapes
from retouch.worlds.shapes.captions import RELATIONS, caption, parse, reword
from retouch.worlds.shapes.models import architectures
from retouch.worlds.shapes.models.recipes import SCENES, USUAL, Recipe, built
from retouch.worlds.shapes.scenes import ATTRIBUTES, BACKGROUNDS, SHAPES, Distribution, Scene

WORDINGS = 4  # captions of a scene, one of which is drawn at every step


def tokens(captions: Sequence[str]) -> Tensor:
    """Captions as ids (n, 40)."""
    words = architectures.tokenizer()
    return words(list(captions), padding="max_length", truncation=True, return_tensors="pt")["input_ids"]


@dataclass(frozen=True)
class Wordings:
    """Scenes, and ways to say them: captions[i][k] is a text on scenes[i]."""

    scenes: tuple[Scene, ...]
    captions: tuple[tuple[str, ...], ...]

    @property
    def ids(self) -> Tensor:
        """The captions' tokens (n, wordings, 40)."""
        return tokens([text for texts in self.captions for text in texts]).view(len(self.scenes), WORDINGS, -1)


def wordings(count: int, seed: int, distribution: Distribution = SCENES) -> Wordings:
    """Scenes of training, each with four captions: as short as can be, with and without relations, and two that vary.

    As people do, captions leave out nothing that is unusual: a thing of which no size and style is said is a large and
    flat one.
    """
    scenes = shapes.data("train", count=count, distribution=distribution, seed=seed).scenes
    captions = []
    for i, scene in enumerate(scenes):
        draw = seeds.generator(seed, "wordings", i)
        unusual = [name for name, usual in USUAL.items() if any(getattr(t, name) != usual for t in scene.things)]
        always = ("shape", "colour", *unusual)
        short = [caption(scene, say=always), caption(scene, say=(*always, "relation"))]
        captions.append((*short, *(reword(scene, draw, always=always) for _ in range(WORDINGS - len(short)))))
    return Wordings(scenes, tuple(captions))


class Reader(nn.Module):
    """A text encoder and a head that tells from every noun what is said of its thing; only the encoder is kept."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleDict({name: nn.Linear(architectures.WIDTH, len(values)) for name, values in SAID.items()})

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        """Ids (n, t) to logits (n, t, values) of everything in `SAID`."""
        states = self.encoder(input_ids=ids).last_hidden_state
        return {name: head(states) for name, head in self.heads.items()}


SAID = {**ATTRIBUTES, "relation": ("none", *RELATIONS), "background": tuple(BACKGROUNDS)}
IGNORED = -100


def readings(captions: Sequence[str], ids: Tensor) -> dict[str, Tensor]:
    """What is to be told from captions with ids (n, t).

    Returns:
        For everything in `SAID` numbers (n, t): at the noun of a thing its attributes, and the relation of the first
        thing to it; at the end the background; -100 elsewhere and where nothing is said.
    """
    words = architectures.tokenizer()
    nouns = torch.isin(ids, torch.tensor(words.convert_tokens_to_ids([f"{shape}</w>" for shape in SHAPES])))
    ends = (ids == words.eos_token_id).int().argmax(1)
    found = {name: torch.full_like(ids, IGNORED) for name in SAID}
    for row, text in enumerate(captions):
        said = parse(text)
        for k, (mention, at) in enumerate(zip(said.things, nouns[row].nonzero()[:, 0].tolist(), strict=True)):
            for name, value in mention.said().items():
                found[name][row, at] = ATTRIBUTES[name].index(value)
            if k:
                found["relation"][row, at] = SAID["relation"].index(said.relations[k - 1] or "none")
        if said.background:
            found["background"][row, ends[row]] = SAID["background"].index(said.background)
    return found


def text_encoder(recipe: Recipe, *, seed: int = 0, checkpoint: Path | None = None) -> Any:
    """A text encoder whose states of nouns tell what their things are like: what the UNet must find in them."""
    encoder = built(architectures.new_text_encoder, seed)
    reader = built(lambda: Reader(encoder), seed)
    given = wordings(recipe.scenes // WORDINGS, seed)
    captions = [text for texts in given.captions for text in texts]
    ids = tokens(captions)

    def objective(model: nn.Module, batch: Batch, run: Run) -> dict[str, Tensor]:
        inputs, targets = unpack(batch)
        logits: dict[str, Tensor] = model(inputs)
        said = {name: targets[name].flatten() for name in SAID}
        errors = {name: F.cross_entropy(logits[name].flatten(0, 1), said[name], reduction="sum") for name in SAID}
        return {name: error / (said[name] != IGNORED).sum().clamp(min=1) for name, error in errors.items()}

    recipe.train(reader, TensorData(ids, readings(captions, ids)), objective, seed=seed, checkpoint=checkpoint)
    return encoder
