"""The search over latents, which stay draws of N(0, I), and the region of a failure that was found."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from retouch.audit.sage.judging import (
    AGREEMENTS,
    REDUCTIONS,
    Classifier,
    SearchResult,
    agreed,
    check_deterministic,
    class_numbers,
    classes_seen,
    evaluating,
    gradient_of,
    judge,
    log_probabilities,
    several,
    split,
    together,
)
from retouch.core import seeds
from retouch.core.errors import InputError, in_range, one_of, positive

GRADIENTS = ("residual", "full", "random")
PROJECTIONS = ("standardize", "sphere", "none")


def residual_generate(sample_fn: Callable[[Tensor], Tensor], z: Tensor, *, scale: float = 1.0) -> Tensor:
    """The sampler's own value, with scale times the identity for its Jacobian.

    Args:
        sample_fn: latents -> clean samples of the same shape; run without a graph.
        z: latents (b, ...).
        scale: kappa, at least 0.

    Returns:
        Exactly sample_fn(z); its gradient with respect to z is scale times that of the result.
    """
    in_range("scale", scale, 0)
    with torch.no_grad():
        x0 = sample_fn(z.detach())
    if x0.shape != z.shape:
        raise InputError(f"sample_fn gave shape {tuple(x0.shape)}, but must give that of z, {tuple(z.shape)}")
    return x0 + scale * (z - z.detach()).to(x0.dtype)


def gaussianity(z: Tensor, *, alpha: float = 0.05) -> tuple[Tensor, Tensor]:
    """Could each sample be a draw of N(0, I)?

    Args:
        z: latents (b, ...).
        alpha: level of the test of normality, 0 to 1: the share of true draws that it rejects.

    Returns:
        Accepted (b,), booleans: p at least alpha, and the norm between the 0.5% and 99.5% quantiles of chi. The
        p-values (b,) are D'Agostino and Pearson's of the entries; with fewer than 20 Shapiro and Wilk's, with fewer
        than 3 those of the norm.
    """
    from scipy import stats

    in_range("alpha", alpha, 0, 1)
    flat = z.detach().flatten(1).double().cpu().numpy()
    size = flat.shape[1]
    tail = stats.chi2(size).cdf((flat**2).sum(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of entries that are all but the same
        if size >= 20:
            p = stats.normaltest(flat, axis=1).pvalue
        elif size >= 3:
            p = [stats.shapiro(row).pvalue if row.std() else 0.0 for row in flat]
        else:
            p = [2 * min(share, 1 - share) for share in tail]
    values = torch.as_tensor(p, dtype=torch.float64).nan_to_num(0.0)  # constant entries have no p
    within = torch.as_tensor((tail >= 0.005) & (tail <= 0.995))
    return (within & (values >= alpha)).to(z.device), values.to(z.device)


def project_gaussian(z: Tensor, *, mode: str = "standardize") -> Tensor:
    """Latents brought back to where draws of N(0, I) are.

    Args:
        z: (b, ...).
        mode: "standardize" each sample to mean 0 and standard deviation 1 (of n - 1), "sphere" for the norm sqrt(d)
            alone, or "none".
    """
    one_of("mode", mode, PROJECTIONS)
    if mode == "none":
        return z
    flat = z.flatten(1)
    least = torch.finfo(z.dtype).tiny
    if mode == "sphere":
        flat = flat * (math.sqrt(flat.shape[1]) / flat.norm(dim=1, keepdim=True).clamp_min(least))
    else:
        if flat.shape[1] < 2:
            raise InputError("z has 1 entry a sample, but must have at least 2 to be standardized")
        flat = (flat - flat.mean(1, keepdim=True)) / flat.std(1, keepdim=True).clamp_min(least)
    return flat.view_as(z)


def search_latent(
    sample_fn: Callable[[Tensor], Tensor],
    decode: Callable[[Tensor], Tensor],
    classifiers: Sequence[Classifier],
    z: Tensor,
    labels: int | Tensor,
    *,
    steps: int = 100,
    step_size: float = 0.05,
    target: int | Tensor | None = None,
    gradient: str = "residual",
    held_out: int | Sequence[Classifier] = 1,
    kappa: float = 1.0,
    update: str = "normalized",
    projection: str = "standardize",
    reduction: str = "mean",
    agreement: str = "all",
    alpha: float = 0.05,
    reject: bool = True,
    stop_at: float = 0.1,
    shrink: bool = False,
    seed: int = 0,
) -> SearchResult:
    """Latents near the given ones whose images lose their class.

    Args:
        sample_fn: latents (b, ...) -> clean samples of the same shape; deterministic.
        decode: clean samples -> images, differentiable.
        classifiers: see `judge`.
        z: where to start (b, ...), draws of N(0, I).
        labels: what the images should show, one for all or (b,).
        steps: at most; 0 judges the start.
        step_size: of a step, in norms of z.
        target: class to reach, one for all or (b,); only away from the label if None.
        gradient: "residual"; "full" through the sampler, which must let gradients through; or "random": new draws of
            N(0, I) in place of steps, the best of which is kept.
        held_out: see `judge`; never asked before the end.
        kappa: scale of the residual.
        update: "normalized" gradients, or their "sign".
        projection: see `project_gaussian`.
        reduction: see `ensemble_log_prob`.
        agreement: "all" or "majority" of the classifiers searched with must see the failure.
        alpha: level of the test of normality.
        reject: keep no latent that the test rejects; False tells how often it would (`non_gaussian_rate`).
        stop_at: 0 to 1; a latent is done when all agree and the probability of its label is this low (of a target, 1
            minus this).
        shrink: leave out latents that are done; for a sample_fn that takes any number of them.
        seed: of "random".

    Returns:
        The best latents that were met, their images, the mean loss (log-probability of the label, or minus that of the
        target) at every step, and the report.
    """
    one_of("gradient", gradient, GRADIENTS)
    one_of("update", update, ("normalized", "sign"))
    one_of("projection", projection, PROJECTIONS)
    one_of("reduction", reduction, REDUCTIONS)
    one_of("agreement", agreement, AGREEMENTS)
    in_range("steps", steps, 0)
    positive("step_size", step_size)
    in_range("stop_at", stop_at, 0, 1)
    searched, _ = split(classifiers, held_out)
    wanted = class_numbers("labels", labels, z)
    goal = None if target is None else class_numbers("target", target, z)
    if goal is not None and bool((goal == wanted).any()):
        raise InputError(f"target is {int(goal[goal == wanted][0])}, but must be another class than the label")
    aim, sign, done_at = (wanted, 1.0, _log(stop_at)) if goal is None else (goal, -1.0, -_log(1 - stop_at))
    z = z.detach()
    check_deterministic(lambda: sample_fn(z), "sample_fn")
    draw = seeds.generator(seed, "sage", "latents")
    kept, current, rows = z.clone(), z.clone(), torch.arange(len(z), device=z.device)
    lowest, latest = (torch.full((len(z),), math.inf, device=z.device) for _ in range(2))
    natural, done = (torch.zeros(len(z), dtype=torch.bool, device=z.device) for _ in range(2))
    history, generations = list[float](), 0
    with evaluating(searched):
        for k in range(steps + 1):
            follow = k < steps and gradient != "random"
            with torch.set_grad_enabled(follow):
                x = current.clone().requires_grad_(follow)
                made = sample_fn(x) if gradient == "full" else residual_generate(sample_fn, x, scale=kappa)
                if follow and not made.requires_grad:
                    raise InputError("gradient is 'full', but sample_fn lets no gradients through: use 'residual'")
                shown = decode(made)
                scores = log_probabilities(shown, searched)
                loss = sign * together(scores, aim[rows], reduction)
            now = loss.detach().to(lowest)
            latest[rows] = now
            history.append(float(latest.mean()))
            generations += len(rows)
            seen = torch.stack([score.detach().argmax(1) for score in scores])
            wrong = seen != aim[rows] if goal is None else seen == aim[rows]
            accepted, _ = gaussianity(x, alpha=alpha)
            able = accepted | (not reject)
            finished = able & agreed(wrong, agreement) & (now <= done_at) & ~done[rows]
            better = finished | (able & ((now < lowest[rows]) | (accepted & ~natural[rows] & reject)) & ~done[rows])
            if k == 0:
                images = originals = shown.detach()
                better = torch.ones_like(better)
                images = images.clone()
            chosen = rows[better]
            kept[chosen], images[chosen] = x.detach()[better], shown.detach()[better]
            lowest[chosen], natural[chosen] = now[better], accepted[better]
            done[rows] |= finished
            if k == steps or bool(done.all()):
                break
            if gradient == "random":
                moved = torch.randn(x.shape, generator=draw).to(x)
            else:
                moved = project_gaussian(x.detach() - step_size * _direction(loss, x, update), mode=projection)
            live = ~done[rows]
            if shrink:
                rows, current = rows[live], moved[live]
            else:
                current = torch.where(live.view(-1, *[1] * (z.ndim - 1)), moved, x.detach())
    accepted, p_values = gaussianity(kept, alpha=alpha)
    report = judge(
        kept,
        images,
        originals,
        wanted,
        classifiers,
        held_out=held_out,
        target=goal,
        natural=accepted,
        p_values=p_values,
        agreement=agreement,
    )
    return SearchResult(inputs=kept, images=images, history=history, report=report, generations=generations)


def _log(probability: float) -> float:
    return math.log(probability) if probability > 0 else -math.inf


def _direction(loss: Tensor, x: Tensor, update: str) -> Tensor:
    """Where the loss rises, at the norm of a draw of N(0, I)."""
    gradient = gradient_of(loss.sum(), x, "decode or a classifier")
    if update == "sign":
        return gradient.sign()
    flat = gradient.flatten(1).float()  # squares of half precision would be 0
    length = flat.norm(dim=1, keepdim=True).clamp_min(torch.finfo(flat.dtype).tiny)
    return (flat / length * math.sqrt(flat.shape[1])).view_as(x).to(x)


class FailureRegion(NamedTuple):
    """How far a failure reaches.

    Attributes:
        angles: by which z can be turned in each direction (directions,), in radians.
        size: their mean as a share of a right angle, 0 to 1.
        log10_mass: decimal logarithm of the probability of the region's directions under N(0, I); -inf if it is one
            point.
    """

    angles: Tensor
    size: float
    log10_mass: float


@torch.no_grad()
def failure_region(
    sample_fn: Callable[[Tensor], Tensor],
    decode: Callable[[Tensor], Tensor],
    classifiers: Sequence[Classifier],
    z: Tensor,
    label: int,
    *,
    target: int | None = None,
    directions: int = 16,
    rings: int = 8,
    seed: int = 0,
) -> FailureRegion:
    """Grow the region of a failure: turn z in random directions for as long as every judge still sees it.

    z is turned at its norm, so it never leaves where draws of N(0, I) are. The region is taken for star-shaped, and its
    mass for the mean over directions of that of the cap which each angle spans.

    Args:
        sample_fn: see `search_latent`.
        decode: see `search_latent`; gradients are not needed.
        classifiers: all of them judge.
        z: one found latent (...), without a batch dimension.
        label: that the image should show.
        target: that it shows instead, if one was searched for.
        directions: how many.
        rings: angles that are tried in a direction, up to a right one.
        seed: of the directions.
    """
    judges = several(classifiers)
    positive("directions", directions)
    positive("rings", rings)
    flat = z.detach().flatten()
    length = flat.norm()
    across = torch.randn(directions, flat.numel(), generator=seeds.generator(seed, "sage", "region")).to(flat)
    across = across - (across @ flat)[:, None] * flat / length**2
    across = across * (length / across.norm(dim=1, keepdim=True))
    reached, live = torch.zeros(directions, device=z.device), torch.arange(directions, device=z.device)
    with evaluating(judges):
        for ring in range(rings + 1):
            angle = ring * math.pi / (2 * rings)
            turned = math.cos(angle) * flat + math.sin(angle) * across[live]
            seen = classes_seen(decode(sample_fn(turned.view(-1, *z.shape))), judges)
            fails = (seen != label if target is None else seen == target).all(0)
            if ring == 0 and not bool(fails.all()):
                raise InputError("z is no failure in the eyes of every judge, but must be one to grow its region")
            live = live[fails]
            reached[live] = angle
            if not len(live):
                break
    return FailureRegion(reached, float(reached.mean() / (math.pi / 2)), _log10_mass(reached, flat.numel()))


def _log10_mass(angles: Tensor, size: int) -> float:
    """Of the mean share of a sphere in `size` dimensions within these angles, each at most a right one."""
    from scipy import special

    a = (size - 1) / 2

    def log_cap(angle: float) -> float:
        x = math.sin(angle) ** 2
        share = special.betainc(a, 0.5, x) / 2
        if share > 0 or x == 0:
            return _log(share)
        # Below the smallest number: x^a / a F(1/2, a; a + 1; x), the same function, in logarithms.
        mild = math.log(special.hyp2f1(0.5, a, a + 1, x))
        return a * math.log(x) - math.log(a) - special.betaln(a, 0.5) + mild - math.log(2)

    logs = torch.tensor([log_cap(angle) for angle in angles.tolist()], dtype=torch.float64)
    return float((logs.logsumexp(0) - math.log(len(logs))) / math.log(10))
