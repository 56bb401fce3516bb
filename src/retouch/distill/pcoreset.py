"""PCoreSet and ActiveKD: spend a labelling budget where the predictions of a distilled student are far from covered.

A vision-language teacher (CLIP, zero-shot) knows something of every unlabelled sample and its predictions cluster: some
classes it never says. A student with two heads on one feature learns from both sources, and chooses what to label next:

    loss        1/2 CE(ce(x_l), y) + 1/2 [KD(kd(x_l), t(x_l)) + KD(kd(x_u), t(x_u))],  KD = T^2 KL(teacher || student)
    prediction  p = (1 - a) softmax(ce) + a softmax(kd / b)          a = 1/2, b = 1: there is no data to tune them on
    selection   again and again the pool sample whose p is the farthest from those of all labelled and chosen samples

A round trains a new student, chooses Q samples, asks for their labels. The space is that of the student's own combined
predictions, for labelled samples too: neither the teacher's probabilities nor the labels as one-hot vectors.

Use it where a zero-shot teacher is decent but blind in places and labels are few. Not where the teacher is good
everywhere, as any choice then does, nor where labels are many. In the first rounds it can be below random choice: the
farthest predictions of a student that knows little are odd, not typical. In our measurements (arena `distill`, task
`active`) it wins, but not by asking for more samples of the classes that the teacher never says.

Paper: arXiv 2506.00910. Code: erjui/PCoreSet (no licence; not copied). Followed where the paper is open: the student's
probabilities are covered, and training is counted in optimizer steps (its "200 epochs" are one pass over the labelled
set resampled 200 times). What differs: the minimum of distances is kept as centres are added, O(Q N C), where the code
computes all distances at every pick; the few-shot teacher (`ClapTeacher`) is CLAP without its outer updates of the
multipliers; BADGE begins with the largest gradient.

Cost: training a student a round; the teacher is asked once, a selection takes milliseconds. Limits: the pool is held in
memory; students are trained anew every round, which is what makes rounds comparable.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retouch.core import seeds
from retouch.core.batches import in_order
from retouch.core.cards import Card
from retouch.core.data import TensorData, in_memory, subset
from retouch.core.distillation import check_pair, softened_kl
from retouch.core.errors import InputError, in_range, one_of, positive
from retouch.core.loop import fit
from retouch.core.models import Batch, device_of, forward, logits_of, mode, predict, to_device, unpack
from retouch.core.schedules import warm_up_then_down
from retouch.core.teachers import Teacher

CARD = Card(
    title="PCoreSet: active learning with a distilled student",
    room="distill",
    paper="arXiv:2506.00910",
    shape="objective",
    line="Distils a zero-shot teacher and chooses what to label next by covering the space of predictions.",
    tags=("classification", "active learning", "vision-language models", "core-set", "few labels"),
    plugin="ActiveKD",
)

# --- selection ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def k_center_greedy(
    pool: Tensor, centers: Tensor, *, num_queries: int, metric: Literal["euclidean", "cosine"] = "euclidean"
) -> Tensor:
    """Pick the point farthest from its nearest centre, make it a centre, and again: indices in pick order (Q,).

    The largest distance that is left is at most twice the smallest possible one (Gonzalez, 1985).

    Args:
        pool: points (N, d).
        centers: (M, d), at least one.
        num_queries: Q, 1 to N.
        metric: "euclidean", or "cosine" for 1 - cosine.

    Returns:
        Indices into the pool, none twice; of equally far points the first.
    """
    one_of("metric", metric, ("euclidean", "cosine"))
    if pool.ndim != 2 or centers.ndim != 2 or pool.shape[1] != centers.shape[1]:
        raise InputError(
            f"pool has shape {tuple(pool.shape)} and centers {tuple(centers.shape)}, but both must be (points, width)"
        )
    if not len(centers):
        raise InputError("centers is empty, but must hold at least one point to start from")
    in_range("num_queries", num_queries, 1, len(pool))
    for name, value in (("pool", pool), ("centers", centers)):
        if not torch.isfinite(value).all():
            raise InputError(f"{name} holds values that are not finite, but must be finite")
    wide = torch.promote_types(pool.dtype, torch.float32)
    points, centers = pool.to(wide), centers.to(pool.device, wide)
    if metric == "cosine":
        points, centers = F.normalize(points, dim=1), F.normalize(centers, dim=1)

    def distance(to: Tensor) -> Tensor:
        if metric == "cosine":
            return 1 - points @ to.T
        # By differences: through products, points that are equal are not at distance 0.
        return torch.cdist(points, to, compute_mode="donot_use_mm_for_euclid_dist")

    nearest = torch.stack([distance(part).amin(1) for part in centers.split(256)]).amin(0)
    picks = []
    for _ in range(num_queries):
        pick = int(nearest.argmax())
        picks.append(pick)
        nearest = torch.minimum(nearest, distance(points[pick : pick + 1])[:, 0])
        nearest[pick] = -torch.inf
    return torch.tensor(picks, device=pool.device)


def entropy_ranking(probs: Tensor) -> Tensor:
    """All pool indices (N,) by entropy of the prediction in nats, the most uncertain first; ties by index.

    Args:
        probs: (N, classes).
    """
    if probs.ndim != 2 or not torch.isfinite(probs).all():
        raise InputError(f"probs has shape {tuple(probs.shape)}, but must be finite probabilities (samples, classes)")
    return torch.special.entr(probs).sum(1).argsort(descending=True, stable=True)


@dataclass(frozen=True)
class PoolOutputs:
    """What a student, in eval mode, says of samples.

    Attributes:
        ids: of the samples in the whole data (N,).
        probs: combined predictions (N, classes).
        features: (N, width).
        teacher_logits: (N, classes).
        generator: for strategies that draw.
    """

    ids: Tensor
    probs: Tensor
    features: Tensor
    teacher_logits: Tensor
    generator: torch.Generator = field(default_factory=torch.Generator)


Strategy = Callable[[PoolOutputs, PoolOutputs, int], Tensor]  # (pool, labelled, queries) -> positions in the pool


def pcoreset(pool: PoolOutputs, labeled: PoolOutputs, queries: int) -> Tensor:
    """Cover the student's predictions."""
    return k_center_greedy(pool.probs, labeled.probs, num_queries=queries)


def coreset(pool: PoolOutputs, labeled: PoolOutputs, queries: int) -> Tensor:
    """Cover the student's features, by their cosine (Sener and Savarese, 2018)."""
    return k_center_greedy(pool.features, labeled.features, num_queries=queries, metric="cosine")


def entropy(pool: PoolOutputs, labeled: PoolOutputs, queries: int) -> Tensor:
    """The most uncertain predictions."""
    return entropy_ranking(pool.probs)[:queries]


def random(pool: PoolOutputs, labeled: PoolOutputs, queries: int) -> Tensor:
    """Any samples."""
    return torch.randperm(len(pool.ids), generator=pool.generator)[:queries]


def badge(pool: PoolOutputs, labeled: PoolOutputs, queries: int) -> Tensor:
    """Cover the gradients that the predicted labels would have at the last layer, from the largest one on.

    Holds a gradient of classes x width for every sample of the pool.
    """
    residual = pool.probs - F.one_hot(pool.probs.argmax(1), pool.probs.shape[1])
    gradients = (residual[:, :, None] * pool.features[:, None]).flatten(1)
    first = gradients.norm(dim=1).argmax()[None]
    if queries == 1:
        return first
    rest = torch.arange(len(gradients), device=first.device)
    rest = rest[rest != first]
    more = k_center_greedy(gradients[rest], gradients[first], num_queries=queries - 1)
    return torch.cat([first, rest[more]])


def class_balanced(pool: PoolOutputs, labeled: PoolOutputs, queries: int) -> Tensor:
    """Draw without replacement, each sample by the inverse frequency of its predicted class."""
    predicted = pool.probs.argmax(1).cpu()
    return (1 / predicted.bincount()[predicted]).multinomial(queries, generator=pool.generator)


STRATEGIES: dict[str, Strategy] = {
    "pcoreset": pcoreset,
    "random": random,
    "entropy": entropy,
    "coreset": coreset,
    "badge": badge,
    "class_balanced": class_balanced,
}

# --- student --------------------------------------------------------------------------------------------------------


def combine_heads(ce_logits: Tensor, kd_logits: Tensor, *, alpha: float = 0.5, beta: float = 1.0) -> Tensor:
    """Probabilities (1 - alpha) softmax(ce) + alpha softmax(kd / beta): (batch, classes).

    Args:
        ce_logits: of the head that labels train (batch, classes).
        kd_logits: of the head that the teacher trains (batch, classes).
        alpha: share of the latter, 0 to 1.
        beta: its temperature, above 0.
    """
    in_range("alpha", alpha, 0, 1)
    positive("beta", beta)
    if ce_logits.shape != kd_logits.shape:
        raise InputError(
            f"ce_logits have shape {tuple(ce_logits.shape)} and kd_logits {tuple(kd_logits.shape)}, but both must be "
            "for the same samples and classes"
        )
    return (1 - alpha) * ce_logits.softmax(-1) + alpha * (kd_logits / beta).softmax(-1)


class TwoHeads(NamedTuple):
    """Logits of both heads (batch, classes) and the features they read (batch, width)."""

    ce: Tensor
    kd: Tensor
    features: Tensor

    @property
    def logits(self) -> Tensor:
        """Logarithm of the combined prediction at the defaults, so that the student is a classifier like any other."""
        return combine_heads(self.ce, self.kd).clamp_min(1e-30).log()


class DualHeadStudent(nn.Module):
    """A backbone with a head for labels and a head for the teacher.

    Args:
        backbone: inputs -> pooled features (batch, dim), or a transformers output with `pooler_output`.
        dim: their width.
        classes: of both heads.
    """

    def __init__(self, backbone: nn.Module, dim: int, classes: int) -> None:
        super().__init__()
        positive("dim", dim)
        positive("classes", classes)
        self.backbone, self.ce_head, self.kd_head = backbone, nn.Linear(dim, classes), nn.Linear(dim, classes)

    def forward(self, *args: Any, **kwargs: Any) -> TwoHeads:
        """(ce, kd, features)."""
        output = self.backbone(*args, **kwargs)
        features = output if isinstance(output, Tensor) else getattr(output, "pooler_output", None)
        if features is None or features.flatten(1).shape[1] != self.ce_head.in_features:
            shape = type(output).__name__ if features is None else tuple(features.shape)
            raise InputError(f"The backbone gives {shape}, but must give features (batch, {self.ce_head.in_features})")
        features = features.flatten(1)
        return TwoHeads(self.ce_head(features), self.kd_head(features), features)

    @torch.no_grad()
    def predict_proba(self, x: Any, alpha: float = 0.5, beta: float = 1.0) -> Tensor:
        """Combined probabilities (batch, classes) in eval mode, see `combine_heads`."""
        with mode(self, training=False):
            heads = forward(self, x)
        return combine_heads(heads.ce, heads.kd, alpha=alpha, beta=beta)


def activekd_loss(
    ce_logits_l: Tensor,
    kd_logits_l: Tensor,
    labels: Tensor,
    teacher_logits_l: Tensor,
    kd_logits_u: Tensor,
    teacher_logits_u: Tensor,
    *,
    temperature: float = 2.0,
    ce_weight: float = 0.5,
    kd_weight: float = 0.5,
) -> dict[str, Tensor]:
    """{"total", "ce", "kd_l", "kd_u"}, the last three weighted: labels on one head, the teacher on the other.

    Args:
        ce_logits_l: of labelled samples (n, classes).
        kd_logits_l: likewise.
        labels: classes (n,).
        teacher_logits_l: (n, classes); no gradient goes into them.
        kd_logits_u: of unlabelled samples (m, classes).
        teacher_logits_u: (m, classes); no gradient goes into them.
        temperature: T > 0 of the teacher's terms, T^2 KL(teacher || student).
        ce_weight: of cross entropy.
        kd_weight: of both terms of the teacher.
    """
    in_range("ce_weight", ce_weight, 0)
    in_range("kd_weight", kd_weight, 0)
    check_pair(kd_logits_l, teacher_logits_l)
    check_pair(kd_logits_u, teacher_logits_u)
    terms = {
        "ce": ce_weight * F.cross_entropy(ce_logits_l, labels),
        "kd_l": kd_weight * softened_kl(kd_logits_l, teacher_logits_l, temperature=temperature),
        "kd_u": kd_weight * softened_kl(kd_logits_u, teacher_logits_u, temperature=temperature),
    }
    return {"total": terms["ce"] + terms["kd_l"] + terms["kd_u"], **terms}


class DualHeadKD:
    """Objective for `fit` on unlabelled samples with targets {"teacher"}; labelled ones are drawn beside each batch.

    Args:
        labeled: samples with targets {"labels", "teacher"}, held in memory; drawn with replacement.
        batch_size: labelled samples a step.
        settings: of `activekd_loss`.
    """

    __name__ = "activekd"

    def __init__(self, labeled: TensorData, *, batch_size: int = 64, **settings: Any) -> None:
        positive("batch_size", batch_size)
        self.labeled, self.batch_size, self.settings = labeled, batch_size, settings

    def __call__(self, model: nn.Module, batch: Batch, run: Any) -> dict[str, Tensor]:
        """The three terms."""
        inputs, told = unpack(batch)
        rows = torch.randint(len(self.labeled), (self.batch_size,), generator=run.generator)
        mine, targets = to_device(self.labeled[rows], told["teacher"].device)
        one, two = forward(model, mine), forward(model, inputs)
        sides = (one.ce, one.kd, targets["labels"], targets["teacher"], two.kd, told["teacher"])
        return {name: term for name, term in activekd_loss(*sides, **self.settings).items() if name != "total"}


# --- teachers -------------------------------------------------------------------------------------------------------


class ZeroShotTeacher(nn.Module):
    """CLIP as a classifier: scaled cosines of an image with the mean of each class's prompts.

    Args:
        clip: a transformers CLIPModel.
        prompts: of each class, what the tokenizer gives for its prompts: {"input_ids": (prompts, length), ...}.
        logit_scale: factor of the cosines, 100 in the CLIP models that are shared; the model's own if None.
    """

    def __init__(
        self, clip: nn.Module, prompts: Sequence[Mapping[str, Tensor]], *, logit_scale: float | None = None
    ) -> None:
        super().__init__()
        if not prompts:
            raise InputError("prompts is empty, but must hold those of every class")
        held: Any = Teacher(clip)
        self.clip, own = held, float(held.model.logit_scale.exp())
        self.logit_scale = own if logit_scale is None else logit_scale
        positive("logit_scale", self.logit_scale)
        with torch.no_grad():
            texts = [_embedded(held.model.get_text_features(**each)).mean(0) for each in prompts]
        self.weights: Tensor
        self.register_buffer("weights", F.normalize(torch.stack(texts), dim=1))

    def embed(self, images: Tensor) -> Tensor:
        """Normalised image embeddings (n, width), without gradients."""
        held: Any = self.clip
        with torch.no_grad():
            return _embedded(held.model.get_image_features(pixel_values=images))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Images to logits (n, classes)."""
        return self.logit_scale * self.embed(pixel_values) @ self.weights.T


def _embedded(output: Any) -> Tensor:
    return F.normalize(output if isinstance(output, Tensor) else output.pooler_output, dim=-1)


class ClapTeacher(ZeroShotTeacher):
    """The few-shot teacher: class weights that start at the texts, move for the labels, and are held back where the
    texts do well (CLAP, arXiv 2312.12730): CE + sum_c l_c |w_c - t_c|^2, l_c the mean probability that zero-shot gives
    the labelled samples of class c.
    """

    def adapt(self, images: Tensor, labels: Tensor, *, steps: int = 300, lr: float = 0.1) -> None:
        """Fit the class weights to labelled samples, from the texts on.

        Args:
            images: (n, channels, height, width).
            labels: (n,).
            steps: of gradient descent with momentum on all samples.
            lr: its rate, with a cosine schedule.
        """
        if not hasattr(self, "texts"):
            self.register_buffer("texts", self.weights.clone())
        texts: Any = self.texts
        z = self.embed(images.to(texts.device))
        labels, classes = labels.to(texts.device), len(texts)
        right = (self.logit_scale * z @ texts.T).softmax(1).gather(1, labels[:, None])[:, 0]
        counts = torch.bincount(labels, minlength=classes)
        held = torch.zeros_like(texts[:, 0]).index_add(0, labels, right) / counts.clamp_min(1)
        held = torch.where(counts > 0, held, 1.0)  # nothing says that a class without samples should move
        weights = texts.clone().requires_grad_()
        optimizer = torch.optim.SGD([weights], lr=lr, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            logits = self.logit_scale * z @ F.normalize(weights, dim=1).T
            loss = F.cross_entropy(logits, labels) + (held * (weights - texts).square().sum(1)).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        self.weights = F.normalize(weights.detach(), dim=1)


# --- rounds ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Round:
    """A round of active learning.

    Attributes:
        number: from 1.
        student: trained on the labels so far, in eval mode.
        labeled: ids of the samples whose labels it was trained on.
        queried: ids chosen in this round, in pick order.
        radius: largest distance of a pool sample's prediction from its nearest centre, with the chosen ones as centres.
    """

    number: int
    student: nn.Module
    labeled: Tensor
    queried: Tensor
    radius: float


def one_per_class(labels: Tensor, *, shots: int = 1, seed: int = 0) -> Tensor:
    """Ids of `shots` random samples of every class, for `ActiveKD(initial=...)`."""
    order = torch.randperm(len(labels), generator=seeds.generator(seed, "initial"))
    return torch.cat([order[labels[order] == c][:shots] for c in labels.unique().tolist()])


class ActiveKD:
    """Rounds of distillation and selection, one record each:

        active = ActiveKD(ZeroShotTeacher(clip, prompts), student, images, ask, rounds=15, initial=first)
        for found in active:                        found.student, found.queried
            ...
        final = active.train()                      a student of all labels, also those of the last round

    Args:
        teacher: module or callable, inputs -> logits; one with `adapt(inputs, labels)`, such as `ClapTeacher`, is
            fitted to the labelled samples in every round.
        student_factory: () -> a new `DualHeadStudent`, with a pre-trained backbone where there is one.
        pool: inputs to choose from; labels among them are never looked at.
        oracle: ids (n,) -> labels (n,); asked for the chosen samples only.
        strategy: name among `STRATEGIES`, or a function of (pool outputs, labelled outputs, queries) -> positions in
            the pool.
        rounds: rounds.
        queries: samples a round; as many as classes if None.
        initial: ids labelled at the start, see `one_per_class`; as many random ones as there are classes if None,
            which may leave classes out.
        steps: of training, each round.
        batch_size: labelled and as many unlabelled samples a step.
        lr: of AdamW, which rises over a tenth of the steps and then falls to 0.
        alpha: of `combine_heads`.
        beta: of `combine_heads`.
        seed: of weights, orders and draws.
        trainer: called like `core.loop.fit`, instead of it.
        settings: temperature and weights of `activekd_loss`.
    """

    def __init__(
        self,
        teacher: Callable[..., Any],
        student_factory: Callable[[], nn.Module],
        pool: Any,
        oracle: Callable[[Tensor], Tensor],
        strategy: str | Strategy = "pcoreset",
        rounds: int = 15,
        queries: int | None = None,
        *,
        initial: Tensor | Sequence[int] | None = None,
        steps: int = 200,
        batch_size: int = 64,
        lr: float = 1e-3,
        alpha: float = 0.5,
        beta: float = 1.0,
        seed: int = 0,
        trainer: Callable[..., Any] | None = None,
        **settings: Any,
    ) -> None:
        if isinstance(strategy, str):
            one_of("strategy", strategy, tuple(STRATEGIES))
        for name, value in (("rounds", rounds), ("steps", steps), ("lr", lr), ("beta", beta)):
            positive(name, value)
        in_range("alpha", alpha, 0, 1)
        self.teacher, self.student_factory, self.oracle, self.rounds = teacher, student_factory, oracle, rounds
        self.strategy = STRATEGIES[strategy] if isinstance(strategy, str) else strategy
        self.steps, self.batch_size, self.lr, self.alpha, self.beta = steps, batch_size, lr, alpha, beta
        self.seed, self.trainer, self.settings = seed, trainer, settings
        self.inputs = in_memory(pool).inputs
        self.size = len(TensorData(self.inputs))
        self.teacher_logits = self._ask()
        classes = self.teacher_logits.shape[1]
        self.queries = classes if queries is None else queries
        if initial is None:
            initial = torch.randperm(self.size, generator=seeds.generator(seed, "initial"))[:classes]
        self.labeled = torch.as_tensor(initial).long().flatten()
        positive("queries", self.queries)
        if not len(self.labeled):
            raise InputError("initial is empty, but must have at least one id to start from")
        inside = 0 <= int(self.labeled.min()) <= int(self.labeled.max()) < self.size
        if not inside or len(self.labeled.unique()) != len(self.labeled):
            raise InputError(f"initial must hold ids from 0 to {self.size - 1}, none of them twice")
        if len(self.labeled) + rounds * self.queries > self.size:
            raise InputError(
                f"rounds is {rounds} and queries {self.queries}, but with {len(self.labeled)} labelled at the start "
                f"all must be at most {self.size}, the size of the pool"
            )
        self.labels = self._reveal(self.labeled)
        self.round = 0

    def __iter__(self) -> Iterator[Round]:
        return self.run()

    def run(self) -> Iterator[Round]:
        """The rounds that are left: train, choose, ask."""
        while self.round < self.rounds:
            labeled, number = self.labeled, self.round + 1
            student = self.train()
            queried, radius = self.select(student)
            self.labeled = torch.cat([self.labeled, queried])
            self.labels = torch.cat([self.labels, self._reveal(queried)])
            self.round = number
            yield Round(number, student, labeled, queried, radius)

    def train(self) -> nn.Module:
        """A new student, trained on the labels so far; in eval mode."""
        with seeds.isolated(seeds.derive(self.seed, "student", self.round)):
            student = self.student_factory()
        adapt: Any = getattr(self.teacher, "adapt", None)
        if adapt is not None:
            adapt(subset(TensorData(self.inputs), self.labeled).inputs, self.labels)
            self.teacher_logits = self._ask()
        told = TensorData(self.inputs, {"teacher": self.teacher_logits})
        mine = subset(told, self.labeled)
        labeled = TensorData(mine.inputs, {**mine.targets, "labels": self.labels})
        rest = self.unlabeled
        (self.trainer or fit)(
            student,
            subset(told, rest if len(rest) else self.labeled),
            DualHeadKD(labeled, batch_size=self.batch_size, **self.settings),
            steps=self.steps,
            batch_size=self.batch_size,
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=self.lr),
            scheduler=warm_up_then_down(0.1),
            seed=seeds.derive(self.seed, "training", self.round),
        )
        return student.eval()

    def select(self, student: nn.Module) -> tuple[Tensor, float]:
        """Ids to label next, and how far the predictions of the pool then are from covered."""
        rest = self.unlabeled
        pool, labeled = self.outputs(student, rest), self.outputs(student, self.labeled)
        picks = torch.as_tensor(self.strategy(pool, labeled, self.queries)).long().cpu()
        fine = len(picks) == len(picks.unique()) == self.queries and 0 <= int(picks.min()) <= int(picks.max())
        if not fine or int(picks.max()) >= len(rest):
            raise InputError(f"The strategy must give {self.queries} positions in the pool of {len(rest)}, none twice")
        covered = torch.cat([labeled.probs, pool.probs[picks]])
        gaps = torch.cdist(pool.probs, covered, compute_mode="donot_use_mm_for_euclid_dist").amin(1)
        return rest[picks], float(gaps.max())

    @torch.no_grad()
    def outputs(self, student: nn.Module, ids: Tensor) -> PoolOutputs:
        """What a student says of samples, in eval mode."""
        device, parts = device_of(student), list[TwoHeads]()
        with mode(student, training=False):
            for batch in in_order(subset(TensorData(self.inputs), ids)):
                parts.append(forward(student, unpack(to_device(batch, device))[0]))
        ce, kd, features = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
        probs = combine_heads(ce, kd, alpha=self.alpha, beta=self.beta)
        draws = seeds.generator(self.seed, "selection", self.round)
        return PoolOutputs(ids, probs, features, self.teacher_logits[ids], draws)

    @property
    def unlabeled(self) -> Tensor:
        """Ids without a label, in order."""
        free = torch.ones(self.size, dtype=torch.bool)
        free[self.labeled] = False
        return free.nonzero()[:, 0]

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on after this round needs."""
        return {"round": self.round, "labeled": self.labeled, "labels": self.labels}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.round, self.labeled, self.labels = state["round"], state["labeled"], state["labels"]

    def _reveal(self, ids: Tensor) -> Tensor:
        labels = torch.as_tensor(self.oracle(ids)).long().cpu()
        if labels.shape != ids.shape:
            raise InputError(
                f"The oracle gave {tuple(labels.shape)} for {len(ids)} ids, but must give a label for each"
            )
        return labels

    @torch.no_grad()
    def _ask(self) -> Tensor:
        """The teacher's logits of the whole pool."""
        batches = in_order(TensorData(self.inputs))
        if isinstance(self.teacher, nn.Module):
            return predict(self.teacher, batches).cpu()
        return torch.cat([logits_of(forward(self.teacher, unpack(batch)[0])) for batch in batches]).detach().cpu()
