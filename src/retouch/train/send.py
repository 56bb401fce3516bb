"""SenD: switch off, for some epochs, the embedding dimensions of a language model that waver most; and EigenScore.

During training, the penultimate layer's sentence embeddings e of tracking texts are recorded after every checkpoint. An
index that changes and varies much over the last C checkpoints is sensitive, and the most sensitive share is dropped,
deterministically, for the next T checkpoints:

    embedding     e = (mean over tokens + last token) / 2                     (definition 3.1)
    sensitivity   V_i = mean over texts of Var_t(e_i) * sum_t |e_i^t - e_i^(t-1)|      (3.2, 3.3)
    drop          the int(K d) indices of largest V, in train mode

EigenScore says how different several sampled answers to one prompt are, an unsupervised sign of confabulation:
(1/K) log det(E_c E_c^T + alpha I). `efficient_eigenscore` estimates it from Chebyshev moments, for trends only.

Use it when answers waver from epoch to epoch; expect steadier scores rather than better answers. For the usual ten
answers the exact score is a 10 x 10 problem, and the efficient one does not pay.

Paper: arXiv 2410.15460 (v4). Code: EMZEDI/SEND. Where they part: the training scripts measure spread across texts
instead of over training, and cut units of the wrong width; here the definitions are followed (`mode="official_weights"`
is the scripts' edit). The scripts' Chebyshev coefficients take cos(m x) for cos(m arccos x); `mode="official"` keeps
that, but not the exact log-sum that the scripts add on top. Nothing is rescaled by 1 / (1 - K), and nothing is dropped
at inference.

Cost: a pass over the tracking texts a checkpoint, and (C, N, d) numbers. Limits: twenty moments resolve small
eigenvalues badly.
"""

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from retouch.core import seeds
from retouch.core.batches import in_order
from retouch.core.cards import Card
from retouch.core.errors import InputError, in_range, one_of, positive
from retouch.core.features import capture
from retouch.core.loop import Callback, Run
from retouch.core.models import Batch, device_of, forward, mode, to_device, unpack

CARD = Card(
    title="SenD: sensitivity dropout",
    room="train",
    paper="arXiv:2410.15460",
    shape="callback",
    line="Drops the embedding dimensions of a language model that waver most between checkpoints.",
    tags=("language models", "hallucination", "dropout", "EigenScore"),
    plugin="SensitivityDropout",
)

POOLINGS = ("mean_last", "second_last_token")
MODES = ("activation", "output_weights", "official_weights")


# --- sensitivity ----------------------------------------------------------------------------------------------------


def sentence_embedding(
    hidden: Tensor, attention_mask: Tensor, *, pooling: Literal["mean_last", "second_last_token"] = "mean_last"
) -> Tensor:
    """One vector a text: half the mean over its tokens and half its last token (definition 3.1).

    Args:
        hidden: (n, tokens, d).
        attention_mask: (n, tokens), 1 at tokens and 0 at padding on either side.
        pooling: "second_last_token" is what the authors' scripts take, the position before the last, padding or not.

    Returns:
        (n, d).
    """
    one_of("pooling", pooling, POOLINGS)
    if attention_mask.shape != hidden.shape[:2]:
        raise InputError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, but must be {tuple(hidden.shape[:2])}, as hidden"
        )
    if pooling == "second_last_token":
        return hidden[:, -2, :]
    told = attention_mask.to(hidden)
    if not bool(told.any(1).all()):
        raise InputError("attention_mask has a row without tokens, but every text must have at least one")
    mean = (hidden * told[..., None]).sum(1) / told.sum(1, keepdim=True)
    positions = torch.arange(hidden.shape[1], device=hidden.device)
    last = (positions * (told > 0)).argmax(1)
    return (mean + hidden[torch.arange(len(hidden), device=hidden.device), last]) / 2


def embedding_sensitivity(snapshots: Tensor, *, reduction: Literal["mean", "none"] = "mean") -> Tensor:
    """How much each index of the embeddings wavers over checkpoints (definitions 3.2 and 3.3).

    Args:
        snapshots: (C, N, d), embeddings of N texts after each of C >= 2 checkpoints.
        reduction: "mean" over texts, (d,); or "none", (N, d).
    """
    one_of("reduction", reduction, ("mean", "none"))
    if snapshots.ndim != 3 or len(snapshots) < 2:
        raise InputError(f"snapshots has shape {tuple(snapshots.shape)}, but must be (checkpoints >= 2, texts, d)")
    if not torch.isfinite(snapshots).all():
        raise InputError("snapshots holds values that are not finite, but must be finite")
    sensitivity = snapshots.var(0, correction=0) * snapshots.diff(dim=0).abs().sum(0)
    return sensitivity.mean(0) if reduction == "mean" else sensitivity


def sensitive_indices(sensitivity: Tensor, *, fraction: float = 0.2) -> Tensor:
    """The int(fraction * d) indices of largest sensitivity, the largest first.

    Args:
        sensitivity: (d,).
        fraction: 0 to 1.
    """
    in_range("fraction", fraction, 0, 1)
    return sensitivity.topk(int(fraction * len(sensitivity))).indices


# --- EigenScore -----------------------------------------------------------------------------------------------------


def _answers(embeddings: Tensor) -> Tensor:
    if embeddings.ndim != 2 or len(embeddings) < 2:
        raise InputError(f"embeddings has shape {tuple(embeddings.shape)}, but must be (answers >= 2, d)")
    if not torch.isfinite(embeddings).all():
        raise InputError("embeddings holds values that are not finite, but must be finite")
    return embeddings if embeddings.dtype == torch.float64 else embeddings.float()


def eigenscore(embeddings: Tensor, *, alpha: float = 1e-3) -> Tensor:
    """Mean logarithm of the eigenvalues of the answers' centred Gram matrix plus alpha; high for diverse answers.

    Args:
        embeddings: (K, d), one vector for each of K sampled answers to one prompt; each is centred over its d entries.
        alpha: > 0; ridge.

    Source: Chen et al. 2024 (INSIDE), as in SenD's `regular_eigenscore`, without a division by the sample size.
    """
    positive("alpha", alpha)
    embeddings = _answers(embeddings)
    centred = embeddings - embeddings.mean(1, keepdim=True)
    return (torch.linalg.eigvalsh(centred @ centred.T).clamp_min(0) + alpha).log().mean()


def chebyshev_log_coefficients(num_moments: int, *, mode: Literal["exact", "official"] = "exact") -> Tensor:
    """Coefficients c_0..c_M of log x on (0, 1] in Chebyshev polynomials, (num_moments + 1,) (algorithm 1, step 4).

    c_m = 2 / ((1 + [m = 0]) pi) * integral over 0..1 of log(x) T_m(x) / sqrt(1 - x^2); even ones are (-1)^(k+1) / (2k)
    for m = 2k, and c_0 = -log(2) / 2. "official" has cos(m x) in place of T_m(x) and begins at m = 1.
    """
    in_range("num_moments", num_moments, 0)
    one_of("mode", mode, ("exact", "official"))
    return torch.from_numpy(_log_coefficients(num_moments, mode).copy())


@functools.cache
def _log_coefficients(num_moments: int, mode: str) -> np.ndarray:
    """By Gauss-Legendre quadrature, whose nodes are dear: worked out once."""
    nodes, weights = np.polynomial.legendre.leggauss(256 + 2 * num_moments)
    theta, weights = (nodes + 1) * math.pi / 4, weights * math.pi / 4  # x = cos(theta), theta in 0..pi/2
    m = np.arange(num_moments + 1)[:, None]
    if mode == "official":
        # log cos is not smooth at the end, so cos(m x) is taken there (1) and its integral, -pi log(2) / 2, added.
        smooth = np.log(np.cos(theta)) * (np.cos(m * np.cos(theta)) - 1)
        found = 2 / math.pi * (smooth @ weights - math.pi / 2 * math.log(2))
        return np.where(m[:, 0] == 0, 0.0, found)
    # By parts: log cos(theta) cos(m theta) has the same integral as the smooth (sin(m theta) - sin(m pi / 2)) tan / m.
    end = np.sin(m * math.pi / 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = (np.sin(m * theta) - end) * np.tan(theta) / m
    found = 2 / math.pi * (parts @ weights)
    return np.where(m[:, 0] == 0, -math.log(2) / 2, found)


def chebyshev_moments(matrix: Tensor, probes: Tensor, *, num_moments: int) -> Tensor:
    """Estimates of (1/K) trace T_m(H) for m = 0..num_moments, with H = matrix^T matrix (algorithm 1, step 3).

    Args:
        matrix: (d, K) with largest singular value 1.
        probes: (K, N_z), standard normal; sqrt(K) times the identity gives exact traces.
        num_moments: M.

    Returns:
        (num_moments + 1,).
    """
    in_range("num_moments", num_moments, 0)
    if probes.ndim != 2 or len(probes) != matrix.shape[-1]:
        raise InputError(f"probes has shape {tuple(probes.shape)}, but must be ({matrix.shape[-1]}, probes)")
    before, current = probes, matrix.T @ (matrix @ probes)
    terms = [probes, current]
    for _ in range(num_moments - 1):
        before, current = current, 2 * (matrix.T @ (matrix @ current)) - before
        terms.append(current)
    return torch.stack([(probes * term).sum() for term in terms[: num_moments + 1]]) / probes.numel()


def _largest_singular_value(matrix: Tensor, generator: torch.Generator) -> Tensor:
    """By the power method on (K, d), until it changes by less than a ten-thousandth."""
    vector = torch.randn(matrix.shape[1], generator=generator, dtype=matrix.dtype).to(matrix.device)
    value = matrix.new_zeros(())
    for _ in range(300):
        image = matrix.T @ (matrix @ (vector / vector.norm().clamp_min(1e-30)))
        vector, before, value = image, value, image.norm().sqrt()
        if (value - before).abs() <= 1e-4 * value:
            break
    return value


def efficient_eigenscore(
    embeddings: Tensor,
    *,
    num_moments: int = 20,
    num_probes: int = 20,
    mode: Literal["exact", "official"] = "exact",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Estimate of the mean log eigenvalue of the standardised, scaled Gram matrix, without forming it (algorithm 1).

    Its range is another than that of `eigenscore`; the cut-off series is a floor for eigenvalues of 0.

    Args:
        embeddings: (K, d), one vector an answer.
        num_moments: of the Chebyshev series.
        num_probes: random vectors.
        mode: of the coefficients, see `chebyshev_log_coefficients`.
        generator: a CPU generator.
    """
    positive("num_moments", num_moments)
    positive("num_probes", num_probes)
    embeddings, generator = _answers(embeddings), seeds.fresh(generator)
    spread = embeddings.std(0, correction=0)
    standard = (embeddings - embeddings.mean(0)) / torch.where(spread > 0, spread, 1)
    largest = _largest_singular_value(standard, generator)
    matrix = (standard / largest.clamp_min(1e-30)).T
    probes = torch.randn(len(embeddings), num_probes, generator=generator, dtype=matrix.dtype).to(matrix.device)
    coefficients = chebyshev_log_coefficients(num_moments, mode=mode).to(matrix)
    return chebyshev_moments(matrix, probes, num_moments=num_moments) @ coefficients


# --- dropping -------------------------------------------------------------------------------------------------------


def blocks_of(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The stack of blocks of a transformer: its longest ModuleList, by name."""
    lists = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.ModuleList)]
    if not lists:
        raise InputError(f"{type(model).__name__} has no ModuleList of blocks")
    return max(lists, key=lambda pair: len(pair[1]))


class SensitivityDropout(Callback):
    """Finds sensitive indices after every window of checkpoints, and drops them during the next ones (algorithm 2).

    In `fit(callbacks=[...])` a checkpoint is an epoch, or `every_n_steps` steps, and `tracking` is what is watched. In
    a loop of one's own, call `on_epoch_begin(model)` and `on_epoch_end(model, tracking)`, and `hold(optimizer)` after
    every step in mode "output_weights". `close()` takes it off; in eval mode it does nothing.

    Args:
        model: transformers causal language model.
        layer: block whose output is watched and dropped from; -2 is the penultimate, `hidden_states[-2]`.
        fraction: share of indices dropped.
        window: checkpoints C that sensitivity is measured over, at least 2.
        drop_epochs: checkpoints T during which the indices found are dropped.
        mode: "activation" sets these entries of the block's output to zero; "output_weights" sets the rows of its MLP's
            output projection that write them to zero and holds them there; "official_weights" is the authors' scripts'
            edit of the MLP's inner units at every such checkpoint's start.
        tracking: texts, as inputs of the model, for `fit`.
        pooling: of the embeddings.
        every_n_steps: length of a checkpoint for `fit`; an epoch if None.
        random_seed: drop as many random indices in place of sensitive ones, as a control; None for the method itself.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layer: int = -2,
        fraction: float = 0.2,
        window: int = 3,
        drop_epochs: int = 3,
        mode: Literal["activation", "output_weights", "official_weights"] = "activation",
        tracking: Any = None,
        pooling: Literal["mean_last", "second_last_token"] = "mean_last",
        every_n_steps: int | None = None,
        random_seed: int | None = None,
    ) -> None:
        in_range("fraction", fraction, 0, 1)
        in_range("window", window, 2)
        positive("drop_epochs", drop_epochs)
        one_of("mode", mode, MODES)
        one_of("pooling", pooling, POOLINGS)
        if every_n_steps is not None:
            positive("every_n_steps", every_n_steps)
        name, blocks = blocks_of(model)
        if not -len(blocks) <= layer < len(blocks):
            raise InputError(f"layer is {layer}, but must be between {-len(blocks)} and {len(blocks) - 1}")
        self.name = f"{name}.{layer % len(blocks)}"
        self.block = blocks[layer]
        self.fraction, self.window, self.drop_epochs, self.mode = fraction, window, drop_epochs, mode
        self.tracking, self.pooling, self.every_n_steps, self.random_seed = (
            tracking,
            pooling,
            every_n_steps,
            random_seed,
        )
        self.snapshots: list[Tensor] = []
        self.indices = torch.empty(0, dtype=torch.long)
        self.remaining, self.checkpoints = 0, 0
        self.handle = self.block.register_forward_hook(self._drop)

    @property
    def dropping(self) -> bool:
        """Whether indices are dropped at present."""
        return self.remaining > 0 and len(self.indices) > 0

    def close(self) -> None:
        """Take the hook off the model."""
        self.handle.remove()

    # --- the protocol

    @torch.no_grad()
    def on_epoch_end(self, model: nn.Module, tracking_loader: Iterable[Batch]) -> None:
        """A checkpoint is over: record the embeddings of the tracking texts, and find the indices when they are due."""
        rows, device = [], device_of(model)
        with mode(model, training=False), capture(model, [self.name]) as seen:
            for batch in tracking_loader:
                inputs = unpack(to_device(batch, device))[0]
                forward(model, inputs)
                hidden = seen[self.name]
                told = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
                told = torch.ones(hidden.shape[:2], device=device) if told is None else told
                rows.append(sentence_embedding(hidden.float(), told, pooling=self.pooling).cpu())
        self.snapshots = [*self.snapshots, torch.cat(rows)][-self.window :]
        self.checkpoints += 1
        self.remaining = max(0, self.remaining - 1)
        if self.remaining == 0 and len(self.snapshots) == self.window:
            self.indices = self._found()
            self.remaining = self.drop_epochs

    def _found(self) -> Tensor:
        sensitivity = embedding_sensitivity(torch.stack(self.snapshots))
        if self.random_seed is not None:
            draw = seeds.generator(self.random_seed, "indices", self.checkpoints)
            return torch.randperm(len(sensitivity), generator=draw)[: int(self.fraction * len(sensitivity))]
        return sensitive_indices(sensitivity, fraction=self.fraction)

    @torch.no_grad()
    def on_epoch_begin(self, model: nn.Module) -> None:
        """A checkpoint begins: in the modes that edit weights, edit them."""
        if not self.dropping:
            return
        if self.mode == "output_weights":
            outer = self._projections()[-1]
            for part in (outer.weight, outer.bias):
                self._clear(outer, part)
        if self.mode == "official_weights":
            *inner, outer = self._projections()
            for projection in inner:
                _rows(projection)[self.indices] = 0
                if projection.bias is not None:
                    projection.bias[self.indices] = 0
            _rows(outer)[:, self.indices] = 0

    def _drop(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Forward hook of the block: in train mode, zeros at the dropped indices."""
        if not (module.training and self.dropping and self.mode == "activation"):
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        kept = torch.ones(hidden.shape[-1], device=hidden.device, dtype=hidden.dtype)
        kept[self.indices.to(hidden.device)] = 0
        return (hidden * kept, *output[1:]) if isinstance(output, tuple) else hidden * kept

    def _projections(self) -> list[Any]:
        """Linear maps of the block's MLP, the output projection last."""
        mlps = [part for name, part in self.block.named_children() if "mlp" in name or "feed_forward" in name]
        maps = [part for mlp in mlps for part in mlp.modules() if isinstance(getattr(part, "weight", None), Tensor)]
        maps = [part for part in maps if part.weight.ndim == 2]
        if not maps:
            raise InputError(f"The block {self.name} has no MLP of linear layers, which mode {self.mode!r} edits")
        return maps

    def _clear(self, outer: Any, value: Any) -> None:
        """Zero what belongs to the dropped indices in a tensor shaped like the projection's weight or bias."""
        if value is not None:
            rows = value if value.ndim == 1 else _oriented(outer, value)
            rows[self.indices] = 0

    @torch.no_grad()
    def hold(self, optimizer: Optimizer) -> None:
        """In mode "output_weights", keep the rows at zero whatever momentum and weight decay do, without any traces.

        `fit` sees to it; in a loop of one's own, call it after every `optimizer.step()`.
        """
        if not (self.dropping and self.mode == "output_weights"):
            return
        outer = self._projections()[-1]
        for parameter in (outer.weight, outer.bias):
            if parameter is None:
                continue
            for value in (parameter, parameter.grad, *optimizer.state.get(parameter, {}).values()):
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    self._clear(outer, value)

    # --- in `fit`

    def on_start(self, run: Run) -> None:
        if self.tracking is None:
            raise InputError(
                "tracking is None, but must be texts to watch when SensitivityDropout is a callback of fit"
            )

    def _checkpoint(self, run: Run) -> None:
        self.on_epoch_end(run.module, in_order(self.tracking))
        self.on_epoch_begin(run.module)

    def on_epoch(self, run: Run) -> None:
        if self.every_n_steps is None and run.step > 0:
            self._checkpoint(run)

    def on_gradients(self, run: Run) -> None:
        self.hold(run.optimizer)

    def on_step(self, run: Run) -> None:
        self.hold(run.optimizer)
        if self.every_n_steps is not None and run.step % self.every_n_steps == 0:
            self._checkpoint(run)

    def on_end(self, run: Run) -> None:
        self.remaining = 0  # nothing is dropped in what comes after

    def state_dict(self) -> dict[str, Any]:
        return {
            "snapshots": list(self.snapshots),
            "indices": self.indices,
            "remaining": self.remaining,
            "checkpoints": self.checkpoints,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.snapshots, self.indices = list(state["snapshots"]), state["indices"]
        self.remaining, self.checkpoints = state["remaining"], state["checkpoints"]


def _oriented(projection: Any, value: Tensor) -> Tensor:
    """A weight-shaped tensor as (outputs, inputs): GPT-2's Conv1D holds it the other way round."""
    return value if isinstance(projection, nn.Linear) else value.T


def _rows(projection: Any) -> Tensor:
    """The weight as (outputs, inputs), a view."""
    return _oriented(projection, projection.weight)
