"""Label-Agnostic Forgetting: move the forget samples' representations away, keep the others', and read no label.

Two small variational autoencoders learn what representations e = g(x) look like: h those of all data, h_f those of the
forget set. Then the model takes two steps in turn on each pair of batches (x_f, x_r):

    unlearn   L_UE = B(h(e_r), e_r) - B(h_f(e_f), e_f),  B(a, e) = sum_i exp(M_i / (M_i + 1)),  M_i = |a_i - e_i|^2
    align     L_RA = sum_i c_i(x_r) - n_r * logsumexp_j c_j(x_f) / tau,     c(x) = 1 - cos(g(x), g_0(x))

The first keeps remaining samples inside of what h knows and pushes forget samples out of what h_f knows; B is bounded,
so that the maximised term cannot run away. The second ties remaining samples to the original model g_0 and lets the
forget samples go. The head gets no gradient.

Use it when labels are missing or not to be trusted. It needs the remaining inputs, two autoencoders and some hundred
alternations before anything is seen, and it must be run with Adam: where M is large, B is flat and SGD stalls.

Paper: arXiv 2404.00506 (equations 4 to 8). Code: ShaofeiShen768/LAF. Where they part: h is fitted to all data, an
approximation of the remaining data for a small forget set (both do; `all_loader` may be the remaining data, better for
a large class); only the forget term is divided by tau (code); the two KL terms of the bounds are dropped (both). The
released decoder ends in a sigmoid, which cannot reconstruct unbounded representations: here it is an option and off.

Cost: two autoencoders on cached representations, then four forward passes and two steps a pair of batches; two of the
forward passes are saved with `cache_original=True`.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retouch.core import seeds
from retouch.core.batches import Planned, Ready, Shuffled, Together, as_batches, in_order
from retouch.core.cards import Card
from retouch.core.data import TensorData, concat
from retouch.core.errors import Diverged, InputError, one_of, positive
from retouch.core.features import features_of
from retouch.core.loop import Run, fit
from retouch.core.models import Batch, device_of, head_of, mode, own, to_device, training_only, unpack
from retouch.core.objectives import cross_entropy
from retouch.core.progress import track
from retouch.core.teachers import Teacher

CARD = Card(
    title="Label-Agnostic Forgetting",
    room="forget",
    paper="arXiv:2404.00506",
    shape="model edit",
    line="Moves the representations of unlabelled forget samples away and keeps all others aligned.",
    tags=("classification", "no labels", "representation", "fine-tuning"),
)

Split = Callable[[nn.Module, Any], Tensor]  # (model, inputs) -> representation (n, d)


class RepresentationVAE(nn.Module):
    """Variational autoencoder of representations: d -> hidden -> latent -> hidden reversed -> d.

    Args:
        dim: d.
        latent: size of the code.
        hidden: widths of the encoder's layers.
        output_activation: applied to the reconstruction, such as torch.sigmoid; none if None.
    """

    def __init__(
        self,
        dim: int,
        latent: int = 16,
        hidden: tuple[int, ...] = (128, 32),
        output_activation: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        positive("latent", latent)
        self.encoder = _layers(dim, *hidden)
        self.mu, self.log_variance = nn.Linear(hidden[-1], latent), nn.Linear(hidden[-1], latent)
        self.decoder = nn.Sequential(_layers(latent, *reversed(hidden)), nn.Linear(hidden[0], dim))
        self.output_activation = output_activation

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Representations (n, d) to reconstruction (n, d), mu and sigma (n, latent); the code is always sampled."""
        code = self.encoder(x)
        mu, sigma = self.mu(code), (0.5 * self.log_variance(code)).exp()
        reconstruction = self.decoder(mu + sigma * torch.randn_like(sigma))
        return (self.output_activation or nn.Identity())(reconstruction), mu, sigma


def _layers(*widths: int) -> nn.Sequential:
    pairs = itertools.pairwise(widths)
    return nn.Sequential(*(layer for a, b in pairs for layer in (nn.Linear(a, b), nn.ReLU())))


def laf_vae_loss(reconstruction: Tensor, x: Tensor, mu: Tensor, sigma: Tensor, *, kl_weight: float = 0.025) -> Tensor:
    """Squared error plus weighted KL divergence from the standard normal, both summed and divided by the batch size.

    Args:
        reconstruction: (n, d).
        x: (n, d).
        mu: (n, latent).
        sigma: standard deviations (n, latent).
        kl_weight: weight of the divergence.
    """
    divergence = -0.5 * (torch.log(sigma.square() + 1e-8) + 1 - mu.square() - sigma.square()).sum()
    return ((reconstruction - x).square().sum() + kl_weight * divergence) / len(x)


def _bounded(reconstruction: Tensor, embedding: Tensor) -> Tensor:
    """Sum over samples of exp(M / (M + 1)), M the squared distance: each term is in [1, e)."""
    if reconstruction.shape != embedding.shape:
        raise InputError(
            f"A reconstruction has shape {tuple(reconstruction.shape)}, but must have its embedding's, "
            f"{tuple(embedding.shape)}"
        )
    distance = (reconstruction - embedding).square().flatten(1).sum(1)
    return (distance / (distance + 1)).exp().sum()


def laf_extractor_loss(rec_retain: Tensor, emb_retain: Tensor, rec_forget: Tensor, emb_forget: Tensor) -> Tensor:
    """L_UE (equation 6): bounded reconstruction error of the remaining samples minus that of the forget samples.

    Args:
        rec_retain: h(e_r), (n_r, d).
        emb_retain: e_r, (n_r, d).
        rec_forget: h_f(e_f), (n_f, d).
        emb_forget: e_f, (n_f, d).
    """
    return _bounded(rec_retain, emb_retain) - _bounded(rec_forget, emb_forget)


def laf_alignment_loss(
    emb_retain: Tensor,
    emb_retain_orig: Tensor,
    emb_forget: Tensor,
    emb_forget_orig: Tensor,
    *,
    temperature: float = 20.0,
) -> Tensor:
    """L_RA (equation 7): remaining samples stay where the original model has them, forget samples do not.

    Args:
        emb_retain: (n_r, d) of the model being unlearned.
        emb_retain_orig: (n_r, d) of the original model; carries no gradient.
        emb_forget: (n_f, d).
        emb_forget_orig: (n_f, d).
        temperature: > 0, of the forget term only, as in the released code; larger pushes forget samples more softly.
    """
    positive("temperature", temperature)
    for one, other in ((emb_retain, emb_retain_orig), (emb_forget, emb_forget_orig)):
        if one.shape != other.shape:
            raise InputError(f"Embeddings have shapes {tuple(one.shape)} and {tuple(other.shape)}, but must have one")
    retain = 1 - F.cosine_similarity(emb_retain, emb_retain_orig.detach())
    forget = 1 - F.cosine_similarity(emb_forget, emb_forget_orig.detach())
    return retain.sum() - len(retain) * torch.logsumexp(forget / temperature, dim=0)


def _fit_vae(embeddings: Tensor, latent: int, epochs: int, seed: int) -> nn.Module:
    """A frozen autoencoder of these representations (stage 1)."""
    with seeds.isolated(seeds.derive(seed, "weights")):
        vae = RepresentationVAE(embeddings.shape[1], latent).to(embeddings)

    def loss(model: nn.Module, batch: Batch, run: Run) -> Tensor:
        x = unpack(batch)[0]
        reconstruction, mu, sigma = model(x)
        return laf_vae_loss(reconstruction, x, mu, sigma)

    fit(
        vae,
        TensorData(embeddings),
        loss,
        epochs=epochs,
        batch_size=32,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
        seed=seed,
    )
    return vae.eval().requires_grad_(False)


def label_agnostic_forgetting(
    model: nn.Module,
    split: Split,
    all_loader: Any,
    forget_loader: Any,
    retain_loader: Any,
    *,
    epochs: int = 40,
    lr_ue: float = 1e-5,
    lr_ra: float = 5e-5,
    temperature: float = 20.0,
    latent: int = 16,
    vae_epochs: int = 10,
    batch_size: int = 32,
    cycle: bool = False,
    cache_original: bool = False,
    repair_loader: Any = None,
    repair_epochs: int = 1,
    repair_lr: float = 1e-3,
    seed: int = 0,
    inplace: bool = False,
) -> nn.Module:
    """Forget unlabelled samples of a model; the whole network moves but for what comes after the representation.

    Args:
        model: any module.
        split: (model, inputs) -> representation (n, d), with gradients.
        all_loader: inputs that the autoencoder of remaining representations is fitted to: all data, or for a large
            forget set the remaining data. Data sets, loaders or lists of batches; labels may be there and are not read.
        forget_loader: inputs to forget.
        retain_loader: remaining inputs.
        epochs: passes over the pairs of batches.
        lr_ue: learning rate of the unlearning steps (Adam).
        lr_ra: learning rate of the alignment steps (Adam).
        temperature: of the alignment's forget term; larger pushes forget samples more softly.
        latent: size of the autoencoders' code.
        vae_epochs: passes for each autoencoder.
        batch_size: samples of each kind in a pair, where the data does not say itself.
        cycle: begin the shorter data anew until the longer one ends; otherwise an epoch ends with the shorter one, as
            in the released code.
        cache_original: ask the original model about each sample beforehand and not at every step; for data without
            random augmentation.
        repair_loader: labelled remaining samples for a last supervised repair of the head; none if None.
        repair_epochs: passes of that repair.
        repair_lr: its learning rate (Adam).
        seed: of orders, autoencoders and their noise.
        inplace: train the given model instead of a copy.
    """
    positive("temperature", temperature)
    positive("epochs", epochs)
    pairs = Together({"forget": forget_loader, "retain": retain_loader}, batch_size, cycle=cycle, seed=seed)
    edited, original = own(model, inplace=inplace), Teacher(model)
    device = device_of(edited)

    def embed(model: nn.Module, batch: Batch) -> Tensor:
        return split(model, unpack(to_device(batch, device))[0])

    @torch.no_grad()
    def original_embed(batch: Batch) -> Tensor:
        return embed(original.model, batch)

    def autoencoder(name: str, data: Any) -> nn.Module:
        embeddings = [original_embed(batch) for batch in in_order(data)]
        if not embeddings:
            raise InputError(f"The {name} data is empty, but must have at least one sample")
        return _fit_vae(torch.cat(embeddings), latent, vae_epochs, seeds.derive(seed, name))

    h, h_f = autoencoder("all", all_loader), autoencoder("forget", forget_loader)
    known = {name: _answers(part, original_embed) for name, part in pairs.parts.items()} if cache_original else {}
    unlearn = torch.optim.Adam(edited.parameters(), lr=lr_ue)
    align = torch.optim.Adam(edited.parameters(), lr=lr_ra)

    def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            raise Diverged("The loss of laf is not finite: try lower lr_ue and lr_ra")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    with seeds.isolated(seeds.derive(seed, "noise")), mode(edited, training=True):
        for epoch in track(range(epochs), "forgetting"):
            for items in pairs.plan(epoch):
                pair = pairs.fetch(items)
                e_f, e_r = embed(edited, pair["forget"]), embed(edited, pair["retain"])
                step(unlearn, laf_extractor_loss(h(e_r)[0], e_r, h_f(e_f)[0], e_f))

                originals = {
                    name: known[name](items[name]) if cache_original else original_embed(batch)
                    for name, batch in pair.items()
                }
                e_f, e_r = embed(edited, pair["forget"]), embed(edited, pair["retain"])
                loss = laf_alignment_loss(e_r, originals["retain"], e_f, originals["forget"], temperature=temperature)
                step(align, loss)
    edited.zero_grad()
    if repair_loader is not None:
        _repair(edited, repair_loader, repair_epochs, repair_lr, seed)
    return edited


def _answers(part: Planned, ask: Callable[[Batch], Tensor]) -> Callable[[Any], Tensor]:
    """Ask about every sample of the data, once; the result says the answers for one item of the part's plan."""
    if isinstance(part, Ready):
        answers = [ask(batch) for batch in part.batches]
        return lambda item: answers[item[0]]
    if not isinstance(part, Shuffled):
        raise InputError(
            f"cache_original is True, but must be False for {type(part).__name__}: it takes data sets, loaders over "
            "them and lists of batches"
        )
    table = torch.cat([ask(part.fetch(rows)) for rows in torch.arange(len(part.data)).split(256)])
    return lambda rows: table[torch.as_tensor(rows)]


def _repair(model: nn.Module, labelled: Any, epochs: int, lr: float, seed: int) -> None:
    """Supervised training of the head alone (LAF+R)."""
    head = head_of(model)
    names = [name for name, _ in model.named_parameters() if name.startswith(f"{head}.")]
    with training_only(model, names):
        fit(
            model,
            as_batches(labelled, seed=seed),
            cross_entropy,
            epochs=epochs,
            optimizer=lambda parameters: torch.optim.Adam(parameters, lr=lr),
            seed=seed,
        )


def laf(
    model: nn.Module,
    forget: Any,
    retain: Any,
    *,
    layer: str | None = None,
    side: str = "input",
    reference: str = "all",
    epochs: int = 40,
    lr_ue: float = 1e-5,
    lr_ra: float = 5e-5,
    temperature: float = 20.0,
    latent: int = 16,
    vae_epochs: int = 10,
    batch_size: int = 32,
    cycle: bool = False,
    seed: int = 0,
    inplace: bool = False,
) -> nn.Module:
    """Forget some of the training samples of a classifier; labels are not read.

    Args:
        model: classifier that was trained on both data sets.
        forget: samples to forget; no random augmentation, the original model is asked once for each.
        retain: all other training samples, or a part of them.
        layer: whose activation is the representation; the classification head if None.
        side: "input" or "output" of that layer.
        reference: fit the autoencoder of what remains to "all" data or, better for a large class, to "retain" data.
        epochs: passes over the pairs of batches.
        lr_ue: learning rate of the unlearning steps.
        lr_ra: learning rate of the alignment steps.
        temperature: of the alignment's forget term; larger pushes forget samples more softly.
        latent: size of the autoencoders' code; 8 for small networks, 16 for larger ones.
        vae_epochs: passes for each autoencoder.
        batch_size: samples of each kind in a pair.
        cycle: let an epoch go through the larger data set; otherwise it ends with the smaller one.
        seed: of orders, autoencoders and their noise.
        inplace: train the given model instead of a copy.
    """
    one_of("reference", reference, ("all", "retain"))
    name = layer or head_of(model)
    return label_agnostic_forgetting(
        model,
        lambda model, inputs: features_of(model, inputs, name, side=side).flatten(1),
        concat(forget, retain) if reference == "all" else retain,
        forget,
        retain,
        epochs=epochs,
        lr_ue=lr_ue,
        lr_ra=lr_ra,
        temperature=temperature,
        latent=latent,
        vae_epochs=vae_epochs,
        batch_size=batch_size,
        cycle=cycle,
        cache_original=True,
        seed=seed,
        inplace=inplace,
    )
