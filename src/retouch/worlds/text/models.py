"""The reference models, untrained, how they are trained, and how a language model answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from retouch.core import seeds
from retouch.core.batches import Shuffled
from retouch.core.data import TensorData
from retouch.core.errors import in_range, positive
from retouch.core.loop import fit
from retouch.core.models import Batch, device_of, mode
from retouch.core.objectives import Objective, cross_entropy, next_token
from retouch.worlds.text.tokens import BOS, EOS, PAD, tokenizer, vocabulary


def new_llama(*, width: int = 128, layers: int = 4, **settings: Any) -> nn.Module:
    """An untrained `LlamaForCausalLM` for this world's tokens.

    Args:
        width: of the hidden states; heads have 32.
        layers: how many.
        settings: further ones of `LlamaConfig`.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": width,
        "intermediate_size": 5 * width // 2,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // 32),
        "max_position_embeddings": 256,
        "initializer_range": width**-0.5,  # the usual 0.02 is for wide models, and learns slowly here
        "tie_word_embeddings": True,
    }
    tokens = {"vocab_size": len(vocabulary()), "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **tokens, **settings}))


def new_encoder(
    *, width: int = 128, layers: int = 2, labels: Sequence[str] = ("false", "true"), **settings: Any
) -> nn.Module:
    """An untrained `BertForSequenceClassification` for this world's tokens; it reads the class off <bos>.

    Args:
        width: of the hidden states; heads have 32.
        layers: how many.
        labels: names of the classes.
        settings: further ones of `BertConfig`.
    """
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // 32),
        "max_position_embeddings": 128,
        "initializer_range": 0.03,  # from larger weights it learns its texts by heart instead of what they say
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "id2label": dict(enumerate(labels)),
        "label2id": {name: number for number, name in enumerate(labels)},
    }
    tokens = {"vocab_size": len(vocabulary()), "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    return BertForSequenceClassification(BertConfig(**{**sizes, **tokens, **settings}))


class ByLength(Shuffled):
    """Shuffled batches of texts of about the same length, cut to the longest of them: padding costs little time.

    Args:
        data: encoded texts, see `tokens.encode`.
        batch_size: texts a batch.
        seed: of the order.
    """

    def __init__(self, data: TensorData, batch_size: int = 64, *, seed: int = 0) -> None:
        super().__init__(data, batch_size, seed=seed)
        inputs: Any = data.inputs
        self.lengths = inputs["attention_mask"].sum(1)

    def plan(self, epoch: int) -> list[Any]:
        draw = seeds.generator(self.seed, "order", epoch)
        order = torch.randperm(len(self.data), generator=draw)
        by_length = order[self.lengths[order].argsort(stable=True)]
        batches = by_length.split(self.batch_size)
        return [batches[k] for k in torch.randperm(len(batches), generator=draw)]

    def fetch(self, item: Any) -> Batch:
        inputs, labels = super().fetch(item)
        longest = int(inputs["attention_mask"].sum(1).max())
        inputs = {name: value[:, :longest] for name, value in inputs.items()}
        return inputs, labels[:, :longest] if labels.ndim == 2 else labels


@dataclass(frozen=True)
class Recipe:
    """How a model of this world is made and trained.

    Attributes:
        new: gives the untrained model.
        objective: to minimise.
        epochs: passes over the data.
        rate: highest learning rate of a one-cycle schedule.
        decay: weight decay of AdamW.
        batch_size: texts a step.
    """

    new: Callable[[], nn.Module]
    objective: Objective
    epochs: int
    rate: float
    decay: float = 0.01
    batch_size: int = 32

    def train(self, samples: TensorData, *, seed: int, checkpoint: str | Path | None = None) -> nn.Module:
        """A model trained from scratch, in eval mode; with a checkpoint, a run that was stopped goes on from it."""
        with seeds.isolated(seeds.derive(seed, "weights")):
            model = self.new()

        def optimizer(parameters: Any) -> Optimizer:
            return AdamW(parameters, lr=self.rate, weight_decay=self.decay, betas=(0.9, 0.98))

        def scheduler(optimizer: Optimizer, steps: int) -> LRScheduler:
            return OneCycleLR(optimizer, self.rate, total_steps=steps, pct_start=0.1, cycle_momentum=False)

        fit(
            model,
            ByLength(samples, self.batch_size, seed=seed),
            self.objective,
            epochs=self.epochs,
            optimizer=optimizer,
            scheduler=scheduler,
            clip=1.0,
            checkpoint=checkpoint,
            seed=seed,
        )
        return model.eval()


RECIPES = {
    "llama": Recipe(new_llama, next_token, 8, 2e-3),
    # Strong decay, for the same reason: at 0.01 it judges 65% of what is held out right, with it 95%.
    "encoder": Recipe(new_encoder, cross_entropy, 24, 1.5e-3, decay=1.0, batch_size=64),
}


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 48,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    batch_size: int = 256,
) -> list[str]:
    """A language model's answers to prompts.

    Args:
        model: transformers causal language model for this world's tokens; it answers in eval mode.
        prompts: n texts; "" begins a text anew.
        max_new_tokens: tokens of an answer at most; <eos> ends it before that.
        temperature: 0 takes the likeliest token each time; else tokens are drawn from softmax(logits / temperature).
        top_k: draw from so many likeliest tokens only.
        top_p: draw from the fewest likeliest tokens that have this probability together.
        generator: a CPU generator of the draws; a fresh one if None.
        batch_size: prompts at once.

    Returns:
        n texts, without the prompts and without special tokens.
    """
    in_range("temperature", temperature, 0)
    positive("max_new_tokens", max_new_tokens)
    positive("batch_size", batch_size)
    choose = _chooser(temperature, top_k, top_p, seeds.fresh(generator))
    words, answers = tokenizer(), list[str]()
    with mode(model, training=False):
        for first in range(0, len(prompts), batch_size):
            some = list(prompts[first : first + batch_size])
            # Padding on the left, so that all prompts end, and all answers begin, at the same position.
            encoded = words(some, return_tensors="pt", padding=True, padding_side="left").to(device_of(model))
            ids = _continue(model, encoded["input_ids"], encoded["attention_mask"], max_new_tokens, choose)
            answers += words.batch_decode(ids, skip_special_tokens=True)
    return answers


def _chooser(
    temperature: float, top_k: int | None, top_p: float | None, draw: torch.Generator
) -> Callable[[Tensor], Tensor]:
    """What takes logits (n, v) to the next tokens (n,)."""
    if temperature == 0:
        return lambda logits: logits.argmax(-1)
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    filters: list[Any] = []
    if top_k is not None:
        in_range("top_k", top_k, 1)
        filters.append(TopKLogitsWarper(top_k))
    if top_p is not None:
        in_range("top_p", top_p, 0, 1, above=True)
        filters.append(TopPLogitsWarper(top_p))

    def choose(logits: Tensor) -> Tensor:
        scores = logits.float().cpu() / temperature
        for keep in filters:
            scores = keep(None, scores)
        return scores.softmax(-1).multinomial(1, generator=draw)[:, 0].to(logits.device)

    return choose


def _continue(model: Any, ids: Tensor, mask: Tensor, max_new_tokens: int, choose: Callable[[Tensor], Tensor]) -> Tensor:
    """New tokens (n, up to max_new_tokens) after prompts (n, t) that are padded on the left; <pad> follows <eos>."""
    positions, cache = (mask.cumsum(1) - 1).clamp(min=0), None
    done, found = torch.zeros(len(ids), dtype=torch.bool, device=ids.device), []
    for _ in range(max_new_tokens):
        output = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        token = choose(output.logits[:, -1]).masked_fill(done, PAD)
        found.append(token)
        done |= token == EOS
        if done.all():
            break
        ids, cache, positions = token[:, None], output.past_key_values, positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return torch.stack(found, 1)
