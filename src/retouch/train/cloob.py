"""CLOOB: contrast what pairs recall from the batch, and leave the pair itself out of its negatives.

Image embeddings X and text embeddings Y of N pairs, all of length 1. Every embedding first retrieves from the batch by
one step of a modern Hopfield network; the retrieved ones are then contrasted by InfoLOOB:

    H(r; U)   = normalise(U^T softmax(beta U r))                      features that occur together reinforce one another
    L(A, B)   = tau mean_i [-a_i.b_i / tau + log sum_{j != i} exp(a_i.b_j / tau)]
    loss      = L(H(X; X), H(Y; X)) + L(H(Y; Y), H(X; Y))

InfoNCE stops learning from a pair that is told apart already, by whichever feature does it first, and neglects the
others; InfoLOOB does not saturate, but alone it overfits in the paper's runs, which the retrieval holds down. Use it to
train two towers (image and text, audio and text, two views) on many noisy pairs with many features in common; on few
clean ones InfoLOOB alone may do better. Not for tiny batches, whose memory and negatives are the batch, nor at
inference: zero-shot classification is by the cosine of plain embeddings, as CLIP's.

Paper: arXiv 2110.11316. Code: ml-jku/cloob. Where they part: the code multiplies by tau, so that the gradient does not
grow with inv_tau, and that is followed (`scale_by_tau`). It puts -1000 on the diagonal before the log-sum-exp, which is
right up to similarities of that size; here it is -inf. In its second term texts are the anchors, and what images
retrieve from texts are the partners, over whose rows the negatives run, as here.

Cost: nine products of N x N x e for InfoNCE's one, little next to the towers. Limits: embeddings that all point one way
retrieve one and the same, and stay at a loss of 2 tau log(N - 1); a lower learning rate or a larger beta gets away from
there. A learned inv_tau drifts upwards without end under InfoLOOB, so it is fixed by default and bounded. All of the
batch is memory: over several processes it is gathered, and what other processes embed is constant, as in the code.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retouch.core.cards import Card
from retouch.core.errors import InputError, in_range, positive
from retouch.core.loop import Run
from retouch.core.models import Batch, forward, unpack

CARD = Card(
    title="CLOOB",
    room="train",
    paper="arXiv:2110.11316",
    shape="objective",
    line="Trains two towers on pairs, by Hopfield retrieval and a contrast that leaves the pair out.",
    tags=("contrastive learning", "image and text", "zero-shot"),
    plugin="CLOOB",
)


def _single(embeds: Tensor) -> Tensor:
    """At least single precision."""
    return embeds if embeds.dtype == torch.float64 else embeds.float()


def _pairs(names: tuple[str, str], first: Tensor, second: Tensor, *, unit: bool) -> tuple[Tensor, Tensor]:
    """Both sides of at least two pairs, in at least single precision; refuses what is none."""
    if first.ndim != 2 or first.shape != second.shape:
        shapes = f"{names[0]} has shape {tuple(first.shape)} and {names[1]} {tuple(second.shape)}"
        raise InputError(f"{shapes}, but both must be (pairs, features)")
    if len(first) < 2:
        raise InputError(f"{names[0]} has {len(first)} rows, but must have at least 2: others are a pair's negatives")
    first, second = _single(first), _single(second)
    if unit:
        for name, embeds in zip(names, (first, second), strict=True):
            lengths = embeds.detach().norm(dim=1)
            worst = float(lengths[(lengths - 1).abs().argmax()])
            if not abs(worst - 1) <= 1e-2:  # also NaN; half precision is off by less
                raise InputError(f"{name} has a row of length {worst:.4g}, but must be normalised to length 1")
    return first, second


def _retrieve(similarities: Tensor, stored: Tensor, beta: float, *, normalize: bool = True) -> Tensor:
    found = (beta * similarities).softmax(1) @ stored
    return F.normalize(found, dim=1) if normalize else found


def hopfield_retrieval(state: Tensor, stored: Tensor, *, beta: float = 8.0, normalize: bool = True) -> Tensor:
    """One update of a modern Hopfield network: softmax(beta state stored^T) stored.

    Args:
        state: (n, e).
        stored: (m, e); a state that is among them stays among them.
        beta: > 0, inverse temperature: towards 0 the mean of all that is stored, towards infinity the nearest.
        normalize: scale what is retrieved to length 1.

    Returns:
        Retrieved patterns (n, e); nothing is learned, and gradients flow through state and stored.
    """
    positive("beta", beta)
    if state.ndim != 2 or stored.ndim != 2 or state.shape[1] != stored.shape[1] or not len(stored):
        shapes = f"state has shape {tuple(state.shape)} and stored {tuple(stored.shape)}"
        raise InputError(f"{shapes}, but they must be (n, features) and (m, features), m at least 1")
    state, stored = _single(state), _single(stored)
    return _retrieve(state @ stored.T, stored, beta, normalize=normalize)


def infoloob_loss(
    anchors: Tensor,
    partners: Tensor,
    *,
    inv_tau: float | Tensor = 30.0,
    scale_by_tau: bool = True,
    negatives_mask: Tensor | None = None,
) -> Tensor:
    """InfoLOOB: each anchor against its partner, and apart from it against all others.

    Args:
        anchors: (n, e), rows of length 1 as a rule.
        partners: (n, e), row i being the partner of anchor i.
        inv_tau: > 0, 1 / tau.
        scale_by_tau: multiply by tau, as the code does; the gradient of each positive similarity is then -1 / n.
        negatives_mask: (n, n), True where partner j is a negative of anchor i; all but its own if None. An anchor's own
            partner never is one.

    Returns:
        The mean over anchors.
    """
    _temperature(inv_tau)
    anchors, partners = _pairs(("anchors", "partners"), anchors, partners, unit=False)
    excluded = torch.eye(len(anchors), dtype=torch.bool, device=anchors.device)
    if negatives_mask is not None:
        if negatives_mask.shape != excluded.shape:
            shape, wanted = tuple(negatives_mask.shape), tuple(excluded.shape)
            raise InputError(f"negatives_mask has shape {shape}, but must be {wanted}")
        excluded = excluded | ~negatives_mask.to(anchors.device, torch.bool)
        if excluded.all(1).any():
            raise InputError("negatives_mask leaves an anchor without negatives, but must keep at least one of each")
    scaled = inv_tau * (anchors @ partners.T).to(anchors.dtype)
    rows = scaled.masked_fill(excluded, -math.inf).logsumexp(1) - scaled.diagonal()
    return rows.mean() / inv_tau if scale_by_tau else rows.mean()


def _temperature(inv_tau: float | Tensor) -> None:
    positive("inv_tau", float(inv_tau.detach() if isinstance(inv_tau, Tensor) else inv_tau))


def info_nce_loss(image_embeds: Tensor, text_embeds: Tensor, *, inv_tau: float | Tensor) -> Tensor:
    """CLIP's loss: mean of the cross entropies of images over texts and of texts over images.

    Args:
        image_embeds: (n, e), rows of length 1 as a rule.
        text_embeds: (n, e).
        inv_tau: > 0, 1 / tau.
    """
    _temperature(inv_tau)
    images, texts = _pairs(("image_embeds", "text_embeds"), image_embeds, text_embeds, unit=False)
    logits = inv_tau * (images @ texts.T).to(images.dtype)
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def retrievals(
    image_embeds: Tensor, text_embeds: Tensor, *, beta: float = 8.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What images and texts retrieve from images, then what texts and images retrieve from texts, each (n, e).

    Args:
        image_embeds: (n, e), rows of length 1.
        text_embeds: (n, e), rows of length 1.
        beta: > 0.
    """
    positive("beta", beta)
    x, y = _pairs(("image_embeds", "text_embeds"), image_embeds, text_embeds, unit=True)
    across = x @ y.T
    from_images = _retrieve(x @ x.T, x, beta), _retrieve(across.T, x, beta)
    return *from_images, _retrieve(y @ y.T, y, beta), _retrieve(across, y, beta)


def cloob_loss(
    image_embeds: Tensor, text_embeds: Tensor, *, inv_tau: float | Tensor = 30.0, beta: float = 8.0
) -> Tensor:
    """InfoLOOB over what was retrieved, images plus texts; not halved.

    Args:
        image_embeds: (n, e), rows of length 1, n at least 2.
        text_embeds: (n, e), likewise.
        inv_tau: > 0, 1 / tau.
        beta: > 0, of the Hopfield retrieval.

    Raises:
        InputError: for fewer than two pairs, forms that differ, or embeddings that are not normalised.
    """
    xx, yx, yy, xy = retrievals(image_embeds, text_embeds, beta=beta)
    return infoloob_loss(xx, yx, inv_tau=inv_tau) + infoloob_loss(yy, xy, inv_tau=inv_tau)


class CLOOBLoss(nn.Module):
    """CLOOB's loss with its temperature, for a training loop of one's own.

    Args:
        inv_tau: 1 / tau, > 0.
        beta: of the Hopfield retrieval.
        learn_inv_tau: train log(inv_tau) with the model; it must be handed to the optimizer, and stays within 0 and
            log(max_inv_tau).
        max_inv_tau: bound of inv_tau.
        gather: take the embeddings of all processes as one batch; see `gathered`. Every process then has the loss of
            the whole batch, and the gradient of its own pairs.
    """

    def __init__(
        self,
        *,
        inv_tau: float = 30.0,
        beta: float = 8.0,
        learn_inv_tau: bool = False,
        max_inv_tau: float = 100.0,
        gather: bool = False,
    ) -> None:
        super().__init__()
        positive("beta", beta)
        positive("inv_tau", inv_tau)
        in_range("inv_tau", inv_tau, 1 if learn_inv_tau else -math.inf, max_inv_tau)
        self.beta, self.max_inv_tau, self.learn_inv_tau, self.gather = beta, max_inv_tau, learn_inv_tau, gather
        self.log_inv_tau = nn.Parameter(torch.tensor(math.log(inv_tau)), requires_grad=learn_inv_tau)

    @property
    def inv_tau(self) -> Tensor:
        """1 / tau, with its gradient if it is learned."""
        return self.log_inv_tau.exp()

    def forward(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        """The loss of pairs (n, e), rows of length 1."""
        if self.learn_inv_tau:
            with torch.no_grad():  # where the last step has taken it; a clamp with gradient would stay at the bound
                self.log_inv_tau.clamp_(0, math.log(self.max_inv_tau))
        if self.gather:
            image_embeds, text_embeds = gathered(image_embeds), gathered(text_embeds)
        return cloob_loss(image_embeds, text_embeds, inv_tau=self.inv_tau, beta=self.beta)


def gathered(embeds: Tensor) -> Tensor:
    """The rows of all processes, this one's first and the only ones with a gradient; as given if there is one process.

    Processes may have different numbers of rows.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return embeds
    rank, world = distributed.get_rank(), distributed.get_world_size()
    sizes = [torch.zeros(1, dtype=torch.long, device=embeds.device) for _ in range(world)]
    distributed.all_gather(sizes, torch.tensor([len(embeds)], device=embeds.device))
    counts = [int(size) for size in sizes]
    padded = F.pad(embeds.detach(), (0, 0, 0, max(counts) - len(embeds)))  # gathering needs equal forms
    blocks = [torch.empty_like(padded) for _ in range(world)]
    distributed.all_gather(blocks, padded.contiguous())
    return torch.cat([embeds, *(blocks[r][: counts[r]] for r in range(world) if r != rank)])


def embeddings_of(output: Any) -> tuple[Tensor, Tensor]:
    """Image and text embeddings, normalised, from the output of CLIPModel and its like, or a pair of tensors."""
    pair = output if isinstance(output, tuple) and len(output) == 2 else ()
    images, texts = pair or (getattr(output, name, None) for name in ("image_embeds", "text_embeds"))
    if not isinstance(images, Tensor) or not isinstance(texts, Tensor):
        found = type(output).__name__
        raise InputError(
            f"The model returned {found}, but must return image_embeds and text_embeds, or a pair of tensors"
        )
    return F.normalize(images, dim=-1), F.normalize(texts, dim=-1)


class CLOOB:
    """An objective for `fit`: CLOOB over the pairs of a batch.

        fit(clip, pairs, CLOOB())          batches as the model takes them: {"pixel_values", "input_ids", ...}

    Over several processes, all their pairs are one batch, and weights are those that one process would give. A
    temperature of the model's own, such as CLIP's `logit_scale`, plays no part; let it not require gradients there.

    Args:
        inv_tau: 1 / tau, > 0.
        beta: of the Hopfield retrieval.
        embeddings: output of the model -> image and text embeddings, normalised.
    """

    def __init__(
        self,
        *,
        inv_tau: float = 30.0,
        beta: float = 8.0,
        embeddings: Callable[[Any], tuple[Tensor, Tensor]] = embeddings_of,
    ) -> None:
        positive("inv_tau", inv_tau)
        positive("beta", beta)
        self.inv_tau, self.beta, self.embeddings = inv_tau, beta, embeddings

    def __call__(self, model: nn.Module, batch: Batch, run: Run | None = None) -> Tensor:
        """The loss of a batch of pairs."""
        images, texts = self.embeddings(forward(model, unpack(batch)[0]))
        everything = gathered(images), gathered(texts)
        loss = cloob_loss(*everything, inv_tau=self.inv_tau, beta=self.beta)
        # `fit` weighs a process by its share of the batch, but this gradient, of its own pairs in the loss of all, is
        # to be added up: its size is changed and the value of the loss is not.
        share = len(images) / len(everything[0])
        return loss if share == 1 else loss.detach() + (loss - loss.detach()) / share


def effective_rank(embeddings: Tensor, *, share: float = 0.99) -> int:
    """Number of the largest eigenvalues of the covariance that hold a share of their sum; 0 if all rows are alike.

    Args:
        embeddings: (n, e), n at least 2.
        share: above 0 up to 1; the paper's is 0.99.
    """
    in_range("share", share, 0, 1, above=True)
    if embeddings.ndim != 2 or len(embeddings) < 2:
        raise InputError(f"embeddings has shape {tuple(embeddings.shape)}, but must be (n, features), n at least 2")
    size = embeddings.shape[1]
    covariance = embeddings.detach().double().T.cov().reshape(size, size)
    values = torch.linalg.eigvalsh(covariance).clamp(min=0).flip(0)
    if not values.sum() > 0:
        return 0
    return int((values.cumsum(0) / values.sum() < share - 1e-12).sum()) + 1
