"""S3T: exact unlearning. Train so that what an example touched can be switched off, and deleting is not training.

The data is cut into m shards and each shard into L slices. A shard has B models, one for each of B orders of its
slices. A model is a frozen backbone with LoRA weights in its layers, and its layers fall into L groups counted from
the top:

    stage i    data: the slices pi_1 .. pi_i      trained: LoRA of group i, and the head (continued from stage i-1)
               frozen: LoRA of groups 1 .. i-1    off: groups i+1 .. L        saved: groups 1 .. i and the head

Whatever is active at stage j has touched the slices pi_1 .. pi_j only. To delete an example of slice s, every order
of its shard is cut before s: later groups go off and that stage's head comes back. No weight is changed, and what is
left equals, bit for bit, a model that never saw s. A shard answers with its longest surviving prefix, the shards'
logits are averaged, and only when the first slices of all orders of all shards are gone must anything be retrained.
Orders that start with different slices are what buys deletions; SISA with LoRA is B = 1.

Use it when deletions are requested by law and must be provable, and the model can be trained for it from the start.
It is no edit of a model that has already seen the data: the backbone must come from elsewhere. Anything trained in
common (a tokeniser, early stopping on the data, a learning rate chosen on it) breaks exactness.

Paper: arXiv 2406.16257 (algorithms 1 and 2, section 3.3 for the orders). Code: brcsomnath/S3T. Where they part: stage
i trains on all slices up to i, as in the code; heads are stored for each stage, which the equality needs; if the
layers do not divide into L groups, the bottom ones get no LoRA (code); the code's choice of a checkpoint on test data
is left out.

Cost: at most B times SISA's training; orders that share a prefix share its stages.
"""

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from retouch.core import seeds
from retouch.core.cards import Card
from retouch.core.checkpoints import load_state, save_state
from retouch.core.data import concat
from retouch.core.errors import InputError, in_range, positive
from retouch.core.features import layer_of
from retouch.core.loop import fit
from retouch.core.models import forward, head_of, logits_of, mode, own
from retouch.core.objectives import cross_entropy
from retouch.core.progress import track

CARD = Card(
    title="S3T: sequence-aware sharded sliced training",
    room="forget",
    paper="arXiv:2406.16257",
    shape="model edit",
    plugin="S3TEnsemble",
    line="Trains LoRA slice by slice so that deleting examples is switching layers off, exactly and without training.",
    tags=("exact", "classification", "language models", "LoRA", "training"),
)

Order = list[int]
Prefix = tuple[int, ...]
State = dict[str, Tensor]
ADAPTER = "slices"  # one LoRA adapter of peft; which of its layers are on is what a stage sets

# --- orders of slices -----------------------------------------------------------------------------------------------


def _rotations(items: Order) -> list[Order]:
    """Rotations to the right by 0, 1, 2, ... places."""
    return [items[len(items) - k :] + items[: len(items) - k] for k in range(len(items))]


def cyclic_sequences(num_slices: int, budget: int) -> list[Order]:
    """Orders of the slices that differ as much as possible, for slices that are equally likely to be deleted.

    Up to `num_slices` orders are rotations, so that each begins with another slice. Beyond that, each order is split
    into rotations of what comes after its first element, then its second, and so on; what does not divide goes to the
    first orders of each block, one each.

    Args:
        num_slices: L.
        budget: B, 1 to L!.
    """
    positive("num_slices", num_slices)
    in_range("budget", budget, 1, math.factorial(num_slices))
    rows = _rotations(list(range(num_slices)))[:budget]
    for fixed in itertools.count(1):
        if len(rows) >= budget:
            return rows
        share, rest = divmod(budget, len(rows))
        block = len(rows) // num_slices
        more = set(sorted(range(len(rows)), key=lambda row: (row % block, row))[:rest])
        rows = [
            row[:fixed] + tail
            for number, row in enumerate(rows)
            for tail in _rotations(row[fixed:])[: share + (number in more)]
        ]
    raise AssertionError("unreachable")


def sequence_score(prefix_probs: Sequence[float], *, horizon: int = 100) -> float:
    """Expected use of an order whose slices are deleted with these probabilities a request.

    The sum over its prefixes of their length times the probability that none of `horizon` requests hits them.
    """
    hit = itertools.accumulate(prefix_probs)
    return sum(length * max(1.0 - p, 0.0) ** horizon for length, p in enumerate(hit, start=1))


def bipartite_sequences(probs: Sequence[float], *, horizon: int = 100) -> list[Order]:
    """L orders for slices with known deletion probabilities, built element by element by bipartite matching.

    Each order starts with another slice; every round gives each order a next element such that the sum of the scores
    of the longer prefixes is largest (Hungarian algorithm).

    Args:
        probs: probability of each slice at a deletion request, not negative; a warning if they do not sum to 1.
        horizon: requests looked ahead in the score.
    """
    from scipy.optimize import linear_sum_assignment

    if not len(probs) or min(probs) < 0:
        raise InputError(f"probs is {list(probs)}, but must hold at least one value and no negative one")
    if abs(sum(probs) - 1) > 1e-6:
        warnings.warn(f"probs sum to {sum(probs):.6g}, not to 1", stacklevel=2)
    count = len(probs)
    orders = [[first] for first in range(count)]
    for _ in range(count - 1):
        scores = torch.full((count, count), -torch.inf, dtype=torch.float64)
        for row, order in enumerate(orders):
            for following in set(range(count)) - set(order):
                scores[row, following] = sequence_score([probs[s] for s in [*order, following]], horizon=horizon)
        for row, following in zip(*linear_sum_assignment(scores.numpy(), maximize=True), strict=True):
            orders[row].append(int(following))
    return orders


def delete_slice(sequences: Sequence[Order], slice_id: int) -> list[Order]:
    """What survives of each order when a slice is deleted: the part before it; orders that begin with it are
    dropped."""
    cut = [order[: order.index(slice_id)] if slice_id in order else list(order) for order in sequences]
    return [order for order in cut if order]


def expected_deletions(
    shards: int, slices: int, budget: int, *, trials: int = 1000, generator: torch.Generator | None = None
) -> tuple[float, float]:
    """Uniform deletion requests until every shard of every order is gone: mean and standard deviation over trials.

    A shard fails once the first slices of all its orders have been hit, so a trial is a coupon collector's: it ends
    when all m * min(B, L) first slices have come up among the m * L. The waiting times between new ones are
    geometric, and drawn as such.

    Args:
        shards: m.
        slices: L.
        budget: B.
        trials: simulated streams.
        generator: a CPU generator.
    """
    positive("shards", shards)
    positive("trials", trials)
    firsts = {order[0] for order in cyclic_sequences(slices, budget)}
    left = torch.arange(shards * len(firsts), 0, -1, dtype=torch.float64)
    chance = (left / (shards * slices)).expand(trials, -1)
    uniform = torch.rand(chance.shape, dtype=torch.float64, generator=seeds.fresh(generator))
    waits = torch.where(chance < 1, (torch.log1p(-uniform) / torch.log1p(-chance)).ceil().clamp_min(1), 1.0)
    total = waits.sum(1)
    return float(total.mean()), float(total.std())


# --- one model ------------------------------------------------------------------------------------------------------


class SlicedAdapters(nn.Module):
    """A frozen model with LoRA weights in groups of layers, the first group at the top.

    Args:
        model: backbone with a stack of layers and a linear head; copied.
        num_slices: groups; layers that do not divide stay without LoRA, at the bottom.
        rank: of the LoRA weights.
        alpha: their scale.
        rslora: divide the scale by the root of the rank instead of the rank.
        dropout: on their inputs while training.
        targets: last names of the linear layers that get them; all linear layers of the stack if None.
        layers: name of the stack (an nn.ModuleList); the longest one of the model if None.
        head: name of the head; the last linear layer if None.
    """

    def __init__(
        self,
        model: nn.Module,
        num_slices: int,
        *,
        rank: int = 16,
        alpha: int = 16,
        rslora: bool = True,
        dropout: float = 0.1,
        targets: Sequence[str] | None = ("query", "value", "q_proj", "v_proj"),
        layers: str | None = None,
        head: str | None = None,
    ) -> None:
        super().__init__()
        import peft

        positive("num_slices", num_slices)
        positive("rank", rank)
        self.num_slices, self.head_name = num_slices, head or head_of(model)
        layer_of(model, self.head_name)
        stack = layers or _longest_stack(model)
        self.groups = _groups(model, stack, num_slices, targets)
        self.model = own(model, inplace=False).requires_grad_(False)
        names = [name for group in self.groups for name in group]
        config = peft.LoraConfig(
            r=rank, lora_alpha=alpha, use_rslora=rslora, lora_dropout=dropout, target_modules=names
        )
        with seeds.isolated(0):  # the weights that count are drawn in `fresh`
            peft.inject_adapter_in_model(config, self.model, adapter_name=ADAPTER)
        self.active = 0
        self.truncate(0)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output with the active groups."""
        return self.model(*args, **kwargs)

    def train(self, mode: bool = True) -> "SlicedAdapters":
        """Train mode, but for batch normalisation: its statistics would carry every slice into every stage."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def _lora_layers(self, group: int) -> list[Any]:
        return [self.model.get_submodule(name) for name in self.groups[group - 1]]

    def group_parameters(self, group: int) -> dict[str, nn.Parameter]:
        """LoRA weights of a group, by name."""
        inside = tuple(f"{name}.lora_" for name in self.groups[group - 1])
        return {name: p for name, p in self.model.named_parameters() if name.startswith(inside)}

    def head_parameters(self) -> dict[str, nn.Parameter]:
        """Weights of the head, by name."""
        return {name: p for name, p in self.model.named_parameters() if name.startswith(f"{self.head_name}.")}

    def _set(self, active: int, trained: dict[str, nn.Parameter]) -> None:
        in_range("stage", active, 0, self.num_slices)
        for group in range(1, self.num_slices + 1):
            for layer in self._lora_layers(group):
                layer.enable_adapters(group <= active)
        self.model.requires_grad_(False)
        for parameter in trained.values():
            parameter.requires_grad_(True)
        self.active = active

    def stage(self, i: int) -> "SlicedAdapters":
        """Ready to train stage i (from 1): groups up to i are on, group i and the head are trained."""
        in_range("stage", i, 1, self.num_slices)
        self._set(i, {**self.group_parameters(i), **self.head_parameters()})
        return self

    def truncate(self, i: int) -> "SlicedAdapters":
        """Groups up to i (from 0) are on, nothing is trained."""
        self._set(i, {})
        return self

    def fresh(self, group: int, seed: int) -> None:
        """New LoRA weights for a group, which change nothing yet."""
        with seeds.isolated(seed):
            for layer in self._lora_layers(group):
                layer.reset_lora_parameters(ADAPTER, True)

    def state(self) -> State:
        """Copies of the active groups' weights and the head's: the checkpoint of a stage."""
        named = self.head_parameters()
        for group in range(1, self.active + 1):
            named |= self.group_parameters(group)
        return {name: p.detach().clone() for name, p in named.items()}

    @torch.no_grad()
    def load(self, state: State) -> None:
        """Take back a checkpoint."""
        named = dict(self.model.named_parameters())
        for name, value in state.items():
            named[name].copy_(value)


def _longest_stack(model: nn.Module) -> str:
    stacks = {name: len(m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential)}
    if not stacks:
        raise InputError(f"{type(model).__name__} has no stack of layers (nn.ModuleList): give layers=, its name")
    return max(stacks, key=lambda name: stacks[name])


def _groups(model: nn.Module, stack: str, count: int, targets: Sequence[str] | None) -> list[list[str]]:
    """Names of the linear layers of every group, the top group first."""
    blocks = layer_of(model, stack)
    total = len(blocks)  # type: ignore[arg-type]
    each = total // count
    if each == 0:
        raise InputError(f"{stack} has {total} layers, but must have at least one for each of {count} slices")
    groups = []
    for group in range(1, count + 1):
        names = [
            f"{stack}.{block}.{name}" if name else f"{stack}.{block}"
            for block in range(total - group * each, total - (group - 1) * each)
            for name, module in blocks[block].named_modules()  # type: ignore[index]
            if isinstance(module, nn.Linear) and (targets is None or name.rpartition(".")[2] in targets)
        ]
        if not names:
            linear = {n.rpartition(".")[2] for n, m in blocks.named_modules() if isinstance(m, nn.Linear)}
            raise InputError(f"targets is {targets}, but the linear layers of {stack} are called {sorted(linear)}")
        groups.append(names)
    return groups


# --- the ensemble ---------------------------------------------------------------------------------------------------

TrainStage = Callable[[SlicedAdapters, Any, int], None]  # (adapters at their stage, data, seed)


def stage_trainer(*, epochs: int = 15, lr: float = 2e-4, batch_size: int = 64, weight_decay: float = 0.0) -> TrainStage:
    """Train a stage with AdamW and cross entropy; deterministic in the data and the seed."""
    positive("lr", lr)

    def train(adapters: SlicedAdapters, data: Any, seed: int) -> None:
        fit(
            adapters,
            data,
            cross_entropy,
            epochs=epochs,
            batch_size=batch_size,
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay),
            seed=seed,
            progress=False,
        )

    return train


def split_shards(count: int, shards: int, slices: int, *, seed: int = 0) -> list[list[Tensor]]:
    """Cut `count` samples into shards and slices at random: row numbers by shard and slice."""
    positive("shards", shards)
    positive("slices", slices)
    if count < shards * slices:
        raise InputError(f"There are {count} samples, but must be at least one for each of {shards * slices} slices")
    order = torch.randperm(count, generator=seeds.generator(seed, "shards"))
    return [list(shard.tensor_split(slices)) for shard in order.tensor_split(shards)]


@dataclass(frozen=True)
class DeletionReport:
    """What a deletion did.

    Attributes:
        shard: the shard that held the slice.
        slice: the slice deleted.
        cut: orders of the shard that became shorter or went.
        lost: those that went altogether.
        alive: whether any shard can still answer; if not, retraining is due.
    """

    shard: int
    slice: int
    cut: int
    lost: int
    alive: bool


class S3TEnsemble:
    """Shards of models whose slices can be deleted without training.

    Args:
        model: backbone that has not seen the data; copied once, whatever the number of models.
        slices: L, slices a shard.
        budget: B, orders a shard.
        probs: deletion probability of each slice; orders are then matched to them (`bipartite_sequences`, the first B
            of them by score) instead of rotated.
        seed: of weights and orders of samples, for each shard and prefix on its own.
        adapters: further keywords of `SlicedAdapters`.

    Attributes:
        sequences: surviving orders of every shard.
        checkpoints: weights of every (shard, prefix) trained.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        slices: int,
        budget: int,
        probs: Sequence[float] | None = None,
        seed: int = 0,
        **adapters: Any,
    ) -> None:
        if probs is None:
            self.orders = cyclic_sequences(slices, budget)
        else:
            if len(probs) != slices:
                raise InputError(f"probs holds {len(probs)} values, but must hold one for each of {slices} slices")
            in_range("budget", budget, 1, slices)
            scored = bipartite_sequences(probs)
            self.orders = sorted(scored, key=lambda order: -sequence_score([probs[s] for s in order]))[:budget]
        self.slices, self.budget, self.seed, self.settings = slices, budget, seed, adapters
        self.adapters = SlicedAdapters(model, slices, **adapters)
        self.first_head = self.adapters.state()
        self.sequences: list[list[Order]] = []
        self.checkpoints: dict[tuple[int, Prefix], State] = {}

    def fit(self, shard_slices: Sequence[Sequence[Any]], train_stage: TrainStage | None = None) -> "S3TEnsemble":
        """Train every stage of every order of every shard, each prefix once.

        Args:
            shard_slices: data sets by shard and slice.
            train_stage: (adapters, data, seed) -> None, trains what requires gradients; `stage_trainer()` if None.
                Deletion is exact if it depends on these arguments alone.
        """
        train_stage = train_stage or stage_trainer()
        for number, parts in enumerate(shard_slices):
            if len(parts) != self.slices:
                raise InputError(f"Shard {number} has {len(parts)} slices, but must have {self.slices}")
        prefixes = {tuple(order[:i]) for order in self.orders for i in range(1, self.slices + 1)}
        work = [(shard, p) for shard in range(len(shard_slices)) for p in sorted(prefixes, key=lambda p: (len(p), p))]
        for shard, prefix in track(work, "training stages"):
            self.checkpoints[shard, prefix] = self.train_prefix(shard, prefix, shard_slices[shard], train_stage)
        self.sequences = [[list(order) for order in self.orders] for _ in shard_slices]
        return self

    def train_prefix(self, shard: int, prefix: Prefix, data: Sequence[Any], train_stage: TrainStage) -> State:
        """Train the last stage of a prefix from the checkpoint before it; a function of the prefix's slices alone."""
        seed, stage = seeds.derive(self.seed, shard, prefix), len(prefix)
        adapters = self.adapters
        adapters.load(self.checkpoints[shard, prefix[:-1]] if stage > 1 else self.first_head)
        adapters.fresh(stage, seed)
        adapters.stage(stage)
        train_stage(adapters, concat(*(data[s] for s in prefix)), seed)
        state = adapters.state()
        adapters.truncate(0)
        return state

    def delete(self, shard: int, slice: int) -> DeletionReport:
        """Delete a slice: cut every order of its shard before it, and drop the weights that saw it. No training.

        A model that `member` gave before is without adapters afterwards.
        """
        if not 0 <= shard < len(self.sequences):
            raise InputError(f"shard is {shard}, but must be between 0 and {len(self.sequences) - 1}")
        in_range("slice", slice, 0, self.slices - 1)
        before = self.sequences[shard]
        after = delete_slice(before, slice)
        self.sequences[shard] = after
        for key in [key for key in self.checkpoints if key[0] == shard and slice in key[1]]:
            del self.checkpoints[key]  # weights that have seen the slice must not be kept
        for group in range(1, self.slices + 1):
            self.adapters.fresh(group, self.seed)  # nor in the model that all prefixes share
        self.adapters.truncate(0).load(self.first_head)
        cut = sum(slice in order for order in before)
        return DeletionReport(shard, slice, cut, len(before) - len(after), self.alive())

    def save(self, path: str | Path) -> None:
        """Write surviving orders and weights as one file; the backbone is not in it."""
        rows = [[shard, prefix, state] for (shard, prefix), state in self.checkpoints.items()]
        save_state(path, {"orders": self.orders, "sequences": self.sequences, "checkpoints": rows})

    def load(self, path: str | Path) -> "S3TEnsemble":
        """Take back what `save` wrote, into an ensemble made with the same arguments."""
        state = load_state(path)
        if not isinstance(state, dict) or state.get("orders") != self.orders:
            raise InputError(f"{path} was not saved by an ensemble with the orders {self.orders}")
        self.sequences = state["sequences"]
        self.checkpoints = {(shard, prefix): weights for shard, prefix, weights in state["checkpoints"]}
        return self

    def alive(self) -> bool:
        """Whether any shard still has a model."""
        return any(self.sequences)

    def serving(self) -> list[tuple[int, Prefix]]:
        """The shards that can answer, each with its longest surviving prefix (the first one on ties)."""
        return [(s, max(map(tuple, orders), key=len)) for s, orders in enumerate(self.sequences) if orders]

    def member(self, shard: int, prefix: Prefix) -> SlicedAdapters:
        """The model of a prefix; the same object for all, so use it before asking for another."""
        if (shard, prefix) not in self.checkpoints:
            raise InputError(f"There is no model of shard {shard} and slices {prefix}")
        self.adapters.load(self.checkpoints[shard, prefix])
        return self.adapters.truncate(len(prefix))

    @torch.no_grad()
    def predict(self, x: Any) -> Tensor:
        """Mean logits of the serving models for inputs (n, ...).

        Raises:
            InputError: if nothing survives, and retraining is due.
        """
        serving = self.serving()
        if not serving:
            raise InputError("Every model has been deleted, so the ensemble must be trained again")
        logits = []
        for shard, prefix in serving:
            with mode(self.member(shard, prefix), training=False) as member:
                logits.append(logits_of(forward(member, x)))
        return torch.stack(logits).mean(0)
