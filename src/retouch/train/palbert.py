"""PALBERT: an encoder that learns after which layer it may answer, and stops there.

A classifier and an exit head, both shared by all layers, look at the first token's state v_l after every layer:

    exit at l, if not before     lambda_l = Lambda(v_l, v_{l-1}),  v_0 = 0
    exit at l                    p_l = lambda_l (1 - lambda_1) .. (1 - lambda_{l-1})
    training, all layers         sum_l mean(p_l CE(logits_l, y)) + beta KL(prior || p),  prior geometric in lambda_p
    inference (Q-exit)           stop at the first l with 1 - (1 - lambda_1) .. (1 - lambda_l) > q

The stop is where half of the exit probability has been used up (q = 0.5), not a draw: PonderNet's sampled exits differ
from run to run. Use it for encoders whose inputs differ in difficulty and that answer one at a time, such as in a
service. Not where all layers can always be paid for, nor where large batches must end together: a batch takes as long
as its slowest row, with fewer rows in every layer.

Paper: arXiv 2204.03276. Code: tinkoff-ai/palbert. Where they part, the code is followed: where more than 1 - epsilon is
used up, p_l is the constant epsilon / L, and what is left over is given to no layer, so that p sums to 0.96 to 1.03
(`remainder="last"` is PonderNet's); the divergence is KL(prior || p), which keeps some probability wherever the prior
has some, also late, and PonderNet's is the other one (`direction`). For "expectation" the code weights the last layer
by 1 - p_L, taken for a slip: here it is what is left over. Train new weights with `remainder="last"`: otherwise not to
stop costs nothing, and while answers are bad the network learns never to stop instead of learning to answer.

Cost: one small head a layer in training, which runs all layers (or until all rows are past 1 - epsilon); at inference
the layers used, since finished rows leave the batch. Limits: one head for all layers; in training over several
processes some layers may get no gradient in one of them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retouch.core import seeds
from retouch.core.cards import Card
from retouch.core.errors import InputError, in_range, one_of, positive
from retouch.core.models import Batch, mode, own, unpack
from retouch.core.objectives import objective
from retouch.core.recipe import Recipe

CARD = Card(
    title="PALBERT",
    room="train",
    paper="arXiv:2204.03276",
    shape="layer",
    line="Adds a head that learns after which layer an encoder may answer, and stops there.",
    tags=("early exit", "transformers", "adaptive depth"),
    plugin="convert",
)
CRITERIA = ("q_exit", "sample", "expectation", "last")
KINDS = ("albert", "bert", "roberta", "xlm-roberta", "camembert", "vit")  # of encoders of transformers
FLOOR = 1e-20  # of probabilities whose logarithm is taken


def _full(values: Tensor) -> Tensor:
    """At least float32, for products over layers."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _probabilities(lambdas: Tensor) -> Tensor:
    if lambdas.ndim != 2 or len(lambdas) == 0:
        raise InputError(f"lambdas has shape {tuple(lambdas.shape)}, but must be (layers, batch) with some layers")
    if bool(((lambdas < 0) | (lambdas > 1)).any()):
        low, high = float(lambdas.min()), float(lambdas.max())
        raise InputError(f"lambdas is between {low:.4g} and {high:.4g}, but must be between 0 and 1")
    return _full(lambdas)


def exit_distribution(lambdas: Tensor, *, epsilon: float = 0.05, remainder: Literal["none", "last"] = "none") -> Tensor:
    """Probability of an exit at each layer, in training (section 3.1, and the code's truncation).

    Args:
        lambdas: probability of an exit at a layer given none before (layers, batch).
        epsilon: where more than 1 - epsilon of the probability is used up, each layer gets epsilon / layers, without a
            gradient; 0 to 1 (not 1), and 0 truncates nothing.
        remainder: give what is left over to no layer, or to the "last" one (nothing, if it is below 0 by truncation).

    Returns:
        (layers, batch), in float32 for half precision.
    """
    one_of("remainder", remainder, ("none", "last"))
    in_range("epsilon", epsilon, 0, 1, below=True)
    return _exit_distribution(_probabilities(lambdas), epsilon, remainder)


def _exit_distribution(lambdas: Tensor, epsilon: float, remainder: str) -> Tensor:
    ones = torch.ones_like(lambdas[:1])
    pdf = lambdas * torch.cat([ones, (1 - lambdas[:-1]).cumprod(0)])
    used = torch.cat([0 * ones, pdf[:-1].cumsum(0)])  # before each layer; past the bound it does not matter by how much
    pdf = torch.where(used > 1 - epsilon, epsilon / len(lambdas), pdf)
    if remainder == "none":
        return pdf
    return torch.cat([pdf[:-1], (1 - pdf[:-1].sum(0, keepdim=True)).clamp(min=0)])


def truncated_geometric(lambda_p: float, num_layers: int) -> Tensor:
    """The prior: lambda_p (1 - lambda_p)^(l - 1), and the rest at the last layer; (num_layers,), sums to 1.

    Args:
        lambda_p: 0 to 1, both excluded; 1 / lambda_p layers are used on average, if there are many.
        num_layers: at least 1.
    """
    in_range("lambda_p", lambda_p, 0, 1, above=True, below=True)
    positive("num_layers", num_layers)
    left = (1 - lambda_p) ** torch.arange(num_layers, dtype=torch.float64)
    return torch.cat([lambda_p * left[:-1], left[-1:]]).to(torch.get_default_dtype())


def ponder_task_loss(
    logits: Tensor, exit_pdf: Tensor, targets: Tensor, *, loss_fn: Callable[..., Tensor] = F.cross_entropy
) -> Tensor:
    """Sum over the computed layers of the mean over the batch of p_l times the loss of layer l (equation 2).

    Args:
        logits: (computed layers, batch, classes); layers that were not reached are left out.
        exit_pdf: (layers, batch), at least as many layers.
        targets: class ids (batch,), distributions (batch, classes), or values for a regression.
        loss_fn: called with reduction="none"; a regression with one output (classes = 1) sees logits (rows,).
    """
    computed, batch = logits.shape[:2]
    if len(exit_pdf) < computed or exit_pdf.shape[1:] != (batch,):
        raise InputError(
            f"exit_pdf has shape {tuple(exit_pdf.shape)}, but must be (at least {computed}, {batch}) to fit the logits"
        )
    if len(targets) != batch:
        raise InputError(f"targets has {len(targets)} rows, but must have {batch}, as the logits of each layer")
    rows = logits.flatten(0, 1)
    if rows.shape[-1] == 1 and targets.ndim == 1 and targets.is_floating_point():
        rows = rows.squeeze(-1)
    losses = loss_fn(rows, torch.cat([targets] * computed), reduction="none").view(computed, batch, -1).mean(-1)
    return (exit_pdf[:computed] * losses).mean(1).sum()


def ponder_kl(
    exit_pdf: Tensor,
    *,
    prior: Tensor,
    direction: Literal["prior_posterior", "posterior_prior"] = "prior_posterior",
) -> Tensor:
    """Divergence of exit probabilities and prior, mean over the batch.

    Args:
        exit_pdf: p (layers, batch); below 1e-20 it counts as that in logarithms.
        prior: g (layers,).
        direction: "prior_posterior" is sum g log(g / p), the code's; "posterior_prior" sum p log(p / g), PonderNet's.
    """
    one_of("direction", direction, ("prior_posterior", "posterior_prior"))
    if prior.shape != exit_pdf.shape[:1]:
        raise InputError(f"prior has {tuple(prior.shape)} entries, but exit_pdf has {len(exit_pdf)} layers")
    p = _full(exit_pdf)
    g = prior.to(p)[:, None].expand_as(p)
    one, two = (g, p) if direction == "prior_posterior" else (p, g)
    return (one * (one.clamp(min=FLOOR).log() - two.clamp(min=FLOOR).log())).sum(0).mean()


def q_exit(lambdas: Tensor, *, threshold: float = 0.5) -> Tensor:
    """Layer after which to stop: the first whose cumulative exit probability is above the threshold, or the last.

    Args:
        lambdas: (layers, batch), as in `exit_distribution`; nothing is truncated here.
        threshold: q, 0 to 1 (not 1); a probability equal to it goes on.

    Returns:
        Layers counted from 0 (batch,).
    """
    in_range("threshold", threshold, 0, 1, below=True)
    above = 1 - (1 - _probabilities(lambdas)).cumprod(0) > threshold
    above[-1] = True
    return above.int().argmax(0)


class LambdaHead(nn.Module):
    """Probability of an exit, from a layer's state and that of the layer before.

    Args:
        dim: width d of states.
        num_layers: hidden layers with tanh; 0 is PonderNet's linear head.
        mode: what is seen: both states ("cat"), their difference ("diff"), or the current one ("single").
        dropout: of the input.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_layers: int = 3,
        mode: Literal["cat", "diff", "single"] = "cat",
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        positive("dim", dim)
        in_range("num_layers", num_layers, 0)
        one_of("mode", mode, ("cat", "diff", "single"))
        in_range("dropout", dropout, 0, 1)
        self.mode, width = mode, 2 * dim if mode == "cat" else dim
        hidden = [part for _ in range(num_layers) for part in (nn.Linear(width, width), nn.Tanh())]
        self.layers = nn.Sequential(nn.Dropout(dropout), *hidden, nn.Linear(width, 1))

    def forward(self, current: Tensor, previous: Tensor) -> Tensor:
        """States (batch, d) of this layer and the one before, zeros before the first; to probabilities (batch,)."""
        if self.mode == "cat":
            seen = torch.cat([current, previous], -1)
        else:
            seen = current - previous if self.mode == "diff" else current
        return _full(self.layers(seen).squeeze(-1)).sigmoid()


# --- encoders -------------------------------------------------------------------------------------------------------


class Stack(NamedTuple):
    """An encoder taken apart.

    Attributes:
        embed: inputs -> what the first layer is called on: hidden states, and perhaps more (such as a mask) for all.
        layers: called on those, each gives hidden states; a shared layer occurs several times.
        summary: hidden states -> state of each row (batch, d).
        classify: states -> logits; None where the encoder has no classifier.
        dim: d.
    """

    embed: Callable[..., tuple[Any, ...]]
    layers: Sequence[Callable[..., Tensor]]
    summary: Callable[[Tensor], Tensor]
    classify: Callable[[Tensor], Tensor] | None
    dim: int | None


def _first_token(hidden: Tensor) -> Tensor:
    return hidden[:, 0] if hidden.ndim == 3 else hidden


def take_apart(encoder: Any) -> Stack:
    """The parts of an encoder.

    Args:
        encoder: transformers' ALBERT, BERT, RoBERTa or ViT (and models built like them), with a classification head or
            without; or a module with `embed(inputs)`, which gives hidden states or a tuple of them and what else the
            layers take, and `layers`. Hidden states are (batch, tokens, d), or (batch, d).
    """
    if hasattr(encoder, "embed") and hasattr(encoder, "layers"):

        def embed(*inputs: Any, **named: Any) -> tuple[Any, ...]:
            found = encoder.embed(*inputs, **named)
            return found if isinstance(found, tuple) else (found,)

        return Stack(embed, list(encoder.layers), _first_token, None, None)
    kind = getattr(getattr(encoder, "config", None), "model_type", type(encoder).__name__)
    if kind not in KINDS:
        raise InputError(f"encoder is {kind}, but must be one of {', '.join(KINDS)}, or have embed(inputs) and layers")
    base: Any = encoder.base_model
    head: Any = getattr(encoder, "classifier", None)
    width, dropout = base.config.hidden_size, getattr(encoder, "dropout", nn.Identity())

    def embed_tokens(input_ids: Any = None, attention_mask: Any = None, **named: Any) -> tuple[Any, ...]:
        from transformers.masking_utils import create_bidirectional_mask

        hidden = base.embeddings(input_ids=input_ids, **named)
        mask = create_bidirectional_mask(base.config, hidden, attention_mask)
        return getattr(base.encoder, "embedding_hidden_mapping_in", nn.Identity())(hidden), mask

    if kind == "vit":  # the state is what its own classifier would see

        def see(hidden: Tensor) -> Tensor:
            return base.layernorm(hidden)[:, 0]

        return Stack(lambda *x, **named: (base.embeddings(*x, **named),), list(base.layers), see, head, width)
    if kind == "albert":
        groups, depth = base.encoder.albert_layer_groups, base.config.num_hidden_layers
        layers = [groups[number * len(groups) // depth] for number in range(depth)]
    else:
        layers = list(base.encoder.layer)
    if hasattr(head, "out_proj"):  # RoBERTa

        def pool(hidden: Tensor) -> Tensor:
            return head.dense(head.dropout(hidden[:, 0])).tanh()

        return Stack(embed_tokens, layers, pool, lambda state: head.out_proj(head.dropout(state)), width)
    pooler = getattr(base, "pooler", None)
    if head is None or pooler is None:
        return Stack(embed_tokens, layers, _first_token, None, width)
    if isinstance(pooler, nn.Linear):  # ALBERT
        return Stack(embed_tokens, layers, lambda h: pooler(h[:, 0]).tanh(), lambda v: head(dropout(v)), width)
    return Stack(embed_tokens, layers, pooler, lambda state: head(dropout(state)), width)


class PonderOutput(NamedTuple):
    """What a pondering classifier gives in training, or to look at.

    Attributes:
        loss: task_loss + beta kl; None without targets, as are the next two.
        task_loss: expected loss over exits.
        kl: divergence from the prior.
        logits: (computed layers, batch, classes).
        exit_pdf: p (layers, batch).
        lambdas: (computed layers, batch).
    """

    loss: Tensor | None
    task_loss: Tensor | None
    kl: Tensor | None
    logits: Tensor
    exit_pdf: Tensor
    lambdas: Tensor


class PonderingClassifier(nn.Module):
    """An encoder that can answer after every layer.

    `forward` runs all layers and gives losses; `predict` stops early. Its own parts are `lambda_head` and, where the
    encoder brings no classifier, `pooler` and `classifier`: give these a learning rate of their own if need be.

    Args:
        encoder: see `take_apart`; a classification head that it has is used after every layer, so that the answer
            after the last layer is the encoder's own.
        num_classes: where the encoder has no classification head; 1 for a regression.
        dim: width of the hidden states, where the encoder does not say.
        beta: weight of the divergence.
        lambda_p: of the geometric prior.
        epsilon: of the truncation.
        remainder: see `exit_distribution`.
        direction: see `ponder_kl`.
        lambda_layers: hidden layers of the exit head.
        lambda_mode: what the exit head sees, see `LambdaHead`.
        dropout: before the exit head, and before a classifier of its own.
        loss_fn: of the answers; cross entropy, or squared error for one output, if None.
    """

    def __init__(
        self,
        encoder: nn.Module,
        num_classes: int | None = None,
        *,
        dim: int | None = None,
        beta: float = 0.5,
        lambda_p: float = 0.1,
        epsilon: float = 0.05,
        remainder: Literal["none", "last"] = "none",
        direction: Literal["prior_posterior", "posterior_prior"] = "prior_posterior",
        lambda_layers: int = 3,
        lambda_mode: Literal["cat", "diff", "single"] = "cat",
        dropout: float = 0.1,
        loss_fn: Callable[..., Tensor] | None = None,
    ) -> None:
        super().__init__()
        in_range("beta", beta, 0)
        in_range("epsilon", epsilon, 0, 1, below=True)
        in_range("lambda_p", lambda_p, 0, 1, above=True, below=True)
        one_of("remainder", remainder, ("none", "last"))
        one_of("direction", direction, ("prior_posterior", "posterior_prior"))
        parts = take_apart(encoder)
        width = dim or parts.dim
        if width is None:
            raise InputError("dim is None, but must be given for this encoder: the width of its hidden states")
        if not parts.layers:
            raise InputError(f"encoder is a {type(encoder).__name__} without layers, but must have at least one")
        if parts.classify is None and num_classes is None:
            raise InputError("num_classes is None, but must be given for an encoder without a classification head")
        self.encoder, self.loss_fn = encoder, loss_fn
        self.beta, self.lambda_p, self.epsilon = beta, lambda_p, epsilon
        self.remainder, self.direction = remainder, direction
        self.lambda_head = LambdaHead(width, num_layers=lambda_layers, mode=lambda_mode, dropout=dropout)
        if num_classes is not None:
            positive("num_classes", num_classes)
            self.pooler = nn.Linear(width, width)
            self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(width, num_classes))

    def parts(self) -> Stack:
        """The encoder taken apart, with this model's own pooler and classifier if it has them."""
        parts = take_apart(self.encoder)
        if not hasattr(self, "pooler"):
            return parts
        return parts._replace(summary=lambda h: self.pooler(_first_token(h)).tanh(), classify=self.classifier)

    def forward(self, *inputs: Any, targets: Tensor | None = None, **named: Any) -> PonderOutput:
        """Answers and exit probabilities after every layer, and losses if there are targets.

        In train mode layers are left out after one at which all rows are past 1 - epsilon.
        """
        parts, states, lambdas = self.parts(), list[Tensor](), list[Tensor]()
        hidden, *context = parts.embed(*inputs, **named)
        for layer in parts.layers:
            hidden = layer(hidden, *context)
            state = parts.summary(hidden)
            lambdas.append(self.lambda_head(state, states[-1] if states else torch.zeros_like(state)))
            states.append(state)
            if self.training and self._all_passed(lambdas):
                break
        logits = parts.classify(torch.cat(states)).unflatten(0, (len(states), -1))  # type: ignore[misc]
        found, depth = torch.stack(lambdas), len(parts.layers)
        padded = torch.cat([found, found.new_zeros(depth - len(found), found.shape[1])])  # truncated there anyway
        pdf = _exit_distribution(padded, self.epsilon, self.remainder)
        if targets is None:
            return PonderOutput(None, None, None, logits, pdf, found)
        loss_fn = self.loss_fn or (F.mse_loss if logits.shape[-1] == 1 else F.cross_entropy)
        task = ponder_task_loss(logits, pdf, targets, loss_fn=loss_fn)
        kl = ponder_kl(pdf, prior=truncated_geometric(self.lambda_p, depth), direction=self.direction)
        return PonderOutput(task + self.beta * kl, task, kl, logits, pdf, found)

    @torch.no_grad()
    def _all_passed(self, lambdas: list[Tensor]) -> bool:
        used = _exit_distribution(torch.stack(lambdas), 0.0, "none").cumsum(0)[-1]
        return bool((used > 1 - self.epsilon).all())

    @torch.no_grad()
    def predict(
        self,
        *inputs: Any,
        criterion: str = "q_exit",
        threshold: float = 0.5,
        generator: torch.Generator | None = None,
        **named: Any,
    ) -> tuple[Tensor, Tensor]:
        """Answers, each from the layer at which its row stops; in eval mode.

        Args:
            inputs: of the encoder, as are further keywords.
            criterion: "q_exit"; "sample", an exit drawn at each layer (PonderNet's); "expectation", logits of the mean
                of all layers' probabilities, weighted by their exit probabilities; or "last".
            threshold: q of "q_exit", 0 to 1 (not 1).
            generator: a CPU generator for "sample".

        Returns:
            Logits (batch, classes), and how many layers each row used (batch,).
        """
        one_of("criterion", criterion, CRITERIA)
        in_range("threshold", threshold, 0, 1, below=True)
        with mode(self, training=False):
            if criterion in ("expectation", "last"):
                return self._at_full_depth(criterion, self(*inputs, **named))
            draw = seeds.fresh(generator)

            def stops(lambdas: Tensor, left: Tensor) -> Tensor:
                if criterion == "sample":
                    return torch.rand(len(lambdas), generator=draw).to(lambdas.device) < lambdas
                return 1 - left > threshold

            return self._row_by_row(stops, *inputs, **named)

    @staticmethod
    def _at_full_depth(criterion: str, output: PonderOutput) -> tuple[Tensor, Tensor]:
        layers, logits = len(output.logits), output.logits[-1]
        if criterion == "expectation":
            weights = _exit_distribution(output.lambdas, 0.0, "last")[..., None]
            if logits.shape[-1] == 1:
                logits = (weights * output.logits).sum(0)
            else:
                logits = (weights * output.logits.softmax(-1)).sum(0).clamp(min=FLOOR).log()
        return logits, torch.full(logits.shape[:1], layers, device=logits.device)

    def _row_by_row(
        self, stops: Callable[[Tensor, Tensor], Tensor], *inputs: Any, **named: Any
    ) -> tuple[Tensor, Tensor]:
        """Layer after layer, from which rows leave as (lambdas, probability that is left) says."""
        parts = self.parts()
        hidden, *context = parts.embed(*inputs, **named)
        rows = torch.arange(len(hidden), device=hidden.device)
        used, left = torch.full_like(rows, len(parts.layers)), hidden.new_ones(len(hidden), dtype=torch.float32)
        answers: Any = None
        previous: Any = None
        for number, layer in enumerate(parts.layers, 1):
            hidden = layer(hidden, *context)
            state = parts.summary(hidden)
            answers = torch.zeros_like(state) if answers is None else answers
            lambdas = self.lambda_head(state, torch.zeros_like(state) if previous is None else previous)
            left = left * (1 - lambdas)
            go_on = ~stops(lambdas, left)
            if number == len(parts.layers):
                go_on = torch.zeros_like(go_on)
            answers[rows[~go_on]], used[rows[~go_on]] = state[~go_on], number
            if not go_on.all():
                context = [_rows(part, go_on) for part in context]
                hidden, state, left, rows = hidden[go_on], state[go_on], left[go_on], rows[go_on]
                if not len(rows):
                    break
            previous = state
        return parts.classify(answers), used  # type: ignore[misc]


def _rows(part: Any, keep: Tensor) -> Any:
    """The rows of what layers take besides hidden states, where it has a row for each."""
    return part[keep] if isinstance(part, Tensor) and len(part) == len(keep) else part


@objective
def pondering(model: nn.Module, batch: Batch, run: Any = None) -> dict[str, Tensor]:
    """Objective of `fit` for a pondering classifier: its task loss and its weighted divergence."""
    inputs, targets = unpack(batch)
    if targets is None:
        raise InputError("The batch has no targets, but pondering needs them: samples must be (input, target)")
    output = model(**inputs, targets=targets) if isinstance(inputs, Mapping) else model(inputs, targets=targets)
    return {"task": output.task_loss, "divergence": output.loss - output.task_loss}


class EarlyExit(nn.Module):
    """A pondering classifier as it is used: called like any classifier, it gives logits (batch, classes).

    Args:
        model: the pondering classifier.
        criterion: see `PonderingClassifier.predict`.
        threshold: likewise.
    """

    def __init__(self, model: PonderingClassifier, *, criterion: str = "q_exit", threshold: float = 0.5) -> None:
        super().__init__()
        one_of("criterion", criterion, CRITERIA)
        in_range("threshold", threshold, 0, 1, below=True)
        self.model, self.criterion, self.threshold = model, criterion, threshold

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """Logits, of the layers at which rows stop."""
        return self.model.predict(*inputs, criterion=self.criterion, threshold=self.threshold, **named)[0]


def convert(model: nn.Module, *, seed: int = 0, inplace: bool = False, **settings: Any) -> PonderingClassifier:
    """A pondering classifier around a copy of a model, or around the model itself if `inplace`.

    Train it with `fit(converted, data, pondering)`; the encoder's weights and its classification head are kept.

    Args:
        model: transformers' AlbertForSequenceClassification, RobertaForSequenceClassification and the like.
        seed: of the new heads' weights.
        inplace: do not copy.
        settings: of `PonderingClassifier`.
    """
    with seeds.isolated(seeds.derive(seed, "palbert")):
        made = PonderingClassifier(own(model, inplace=inplace), **settings)
    first = next(model.parameters())
    return made.to(first.device, first.dtype).train(model.training)


def recipe(
    model: nn.Module,
    data: Any,
    validation: Any = None,
    *,
    threshold: float = 0.5,
    beta: float = 0.5,
    lambda_p: float = 0.1,
    epsilon: float = 0.05,
    remainder: str = "none",
    seed: int = 0,
) -> Recipe:
    """Train an encoder that answers early; the finished model stops by Q-exit.

    Args:
        model: transformers' ViT, ALBERT, BERT or RoBERTa with a classification head; trained in place.
        data: labelled samples.
        validation: not used.
        threshold: stop where so much of the exit probability is used up; larger is later.
        beta: weight of the divergence from the prior.
        lambda_p: of the prior; 1 / lambda_p layers on average, if there are many.
        epsilon: of the truncation in training.
        remainder: what is left of the exit probability goes to no layer (none), or to the last: for new weights.
        seed: of the exit head's weights.
    """
    settings: dict[str, Any] = {"beta": beta, "lambda_p": lambda_p, "epsilon": epsilon, "remainder": remainder}
    made = convert(model, seed=seed, inplace=True, **settings)
    return Recipe(model=made, data=data, objective=pondering, finish=lambda _: EarlyExit(made, threshold=threshold))
