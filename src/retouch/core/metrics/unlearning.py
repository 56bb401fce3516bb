"""Has a model forgotten, and what did it cost? Measures against the retrained oracle.

The reference is a model trained by the same recipe without the forget set. A number is good when it is close to that
oracle's, not when it is 0 or 100: an oracle still classifies most random forget samples correctly. Print the original,
the oracle, a second oracle (the floor) and the method side by side. A destroyed model has a perfect forget accuracy, so
no measure here says anything alone.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retouch.core.batches import in_order
from retouch.core.data import labels_of
from retouch.core.errors import InputError, in_range, one_of, positive
from retouch.core.models import predict

ArrayLike = Any  # a tensor or an array
Outputs = tuple[ArrayLike, ArrayLike]  # logits (n, k), labels (n,)

# --- accuracy -------------------------------------------------------------------------------------------------------


def accuracy(logits: ArrayLike, labels: ArrayLike) -> float:
    """Share of samples classified correctly, in percent; NaN for no samples. Logits (n, k), labels (n,)."""
    logits, labels = torch.as_tensor(logits), torch.as_tensor(labels)
    return 100.0 * float((logits.argmax(-1) == labels).double().mean())


def unlearning_accuracy(model: nn.Module, forget: Any, retain: Any, test: Any) -> dict[str, float]:
    """Accuracies after forgetting, in percent, in eval mode.

    Args:
        model: classifier.
        forget: samples to be forgotten, as a data set.
        retain: the rest of the training data.
        test: held-out samples of all classes.

    Returns:
        UA: 100 - accuracy on the forget set. RA: accuracy on the retain set. TA: accuracy on the test set. If classes
        were forgotten whole (none of their samples are in the retain set), TA is that of the remaining classes and FTA
        that of the forgotten ones.
    """
    retained, tested = labels_of(retain), labels_of(test)
    gone = ~torch.isin(tested, retained) & torch.isin(tested, labels_of(forget))
    logits = predict(model, in_order(test)).cpu()
    measures = {
        "UA": 100.0 - accuracy(predict(model, in_order(forget)).cpu(), labels_of(forget)),
        "RA": accuracy(predict(model, in_order(retain)).cpu(), retained),
        "TA": accuracy(logits[~gone], tested[~gone]),
    }
    return {**measures, "FTA": accuracy(logits[gone], tested[gone])} if gone.any() else measures


def oracle_gap(method: Mapping[str, float], oracle: Mapping[str, float]) -> float:
    """Mean over UA, RA, TA and MIA of the distance to the oracle's value; the measures that both have."""
    common = [name for name in ("UA", "RA", "TA", "MIA") if name in method and name in oracle]
    if not common:
        raise InputError("method and oracle share none of UA, RA, TA and MIA, but must share at least one")
    return float(np.mean([abs(method[name] - oracle[name]) for name in common]))


# --- membership inference -------------------------------------------------------------------------------------------

FEATURES = ("confidence", "entropy", "correctness", "prob")


def prediction_entropy(probs: ArrayLike) -> Tensor:
    """Entropy of distributions (..., k) -> (...), natural logarithm; 0 log 0 counts as 0."""
    return torch.special.entr(torch.as_tensor(probs)).sum(-1)


def _attack_feature(outputs: Outputs, feature: str) -> np.ndarray:
    logits, labels = torch.as_tensor(outputs[0]), torch.as_tensor(outputs[1]).long()
    probs = logits.softmax(-1)
    columns = {
        "confidence": lambda: probs.gather(1, labels[:, None]),
        "entropy": lambda: prediction_entropy(probs)[:, None],
        "correctness": lambda: (probs.argmax(-1) == labels)[:, None].to(probs.dtype),
        "prob": lambda: probs,
    }
    return columns[feature]().detach().cpu().numpy()


def _members_and_others(member: np.ndarray, nonmember: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if len(member) == 0 or len(nonmember) == 0:
        raise InputError("An attack needs at least one member and one non-member to learn from")
    return np.concatenate([member, nonmember]), np.concatenate([np.ones(len(member)), np.zeros(len(nonmember))])


def membership_inference_svc(
    member: Outputs, nonmember: Outputs, target: Outputs, *, feature: str = "confidence", C: float = 3.0
) -> float:
    """Share of the target that an RBF support vector machine takes for non-members (MIA efficacy).

    The attack is fitted on `member` (from the retain set) against `nonmember` (from the test set); take as many of one
    as of the other.

    Args:
        member: logits (n, k) and labels (n,) of the model under attack.
        nonmember: likewise.
        target: likewise, of the forget set.
        feature: "confidence" of the label, "entropy", "correctness", or "prob" for the whole softmax vector.
        C: of scikit-learn's SVC (gamma "auto").

    Source: the evaluation of SalUn (arXiv 2310.12508).
    """
    from sklearn.svm import SVC

    one_of("feature", feature, FEATURES)
    x, y = _members_and_others(_attack_feature(member, feature), _attack_feature(nonmember, feature))
    attack = SVC(C=C, gamma="auto", kernel="rbf").fit(x, y)
    return float(1.0 - attack.predict(_attack_feature(target, feature)).mean())


def membership_inference_entropy(member: Outputs, nonmember: Outputs, target: Outputs) -> float:
    """Share of the target that a balanced logistic regression on prediction entropy takes for members.

    Source: the evaluation of SSD (arXiv 2308.07707).
    """
    from sklearn.linear_model import LogisticRegression

    x, y = _members_and_others(_attack_feature(member, "entropy"), _attack_feature(nonmember, "entropy"))
    attack = LogisticRegression(class_weight="balanced").fit(x, y)
    return float(attack.predict(_attack_feature(target, "entropy")).mean())


def membership_inference_loss(
    member_loss: ArrayLike, nonmember_loss: ArrayLike, *, splits: int = 10, seed: int = 42
) -> tuple[float, float]:
    """Accuracy of telling members from non-members by their loss, and its distance from 0.5.

    Logistic regression on the per-sample loss, fitted on nine tenths and tested on the rest, over stratified shuffle
    splits of equally many of both.

    Args:
        member_loss: per-sample losses (n,).
        nonmember_loss: per-sample losses (m,).
        splits: how many are drawn.
        seed: of the splits, and of the draw that makes both sides equal in number.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedShuffleSplit, cross_val_score

    positive("splits", splits)
    sides = [np.asarray(torch.as_tensor(side).detach().cpu()).reshape(-1, 1) for side in (member_loss, nonmember_loss)]
    count = min(map(len, sides))
    if count < 2:
        raise InputError(f"The smaller side has {count} samples, but must have at least 2")
    draw = np.random.default_rng(seed)
    x, y = _members_and_others(*(side[np.sort(draw.permutation(len(side))[:count])] for side in sides))
    tested = max(2, math.ceil(0.1 * len(y)))  # at least one of each kind
    folds = StratifiedShuffleSplit(n_splits=splits, test_size=tested, random_state=seed % 2**32)
    score = float(cross_val_score(LogisticRegression(), x, y, cv=folds, scoring="accuracy").mean())
    return score, abs(score - 0.5)


def transfer_rate(member_probs: ArrayLike, nonmember_probs: ArrayLike, target_probs: ArrayLike) -> float:
    """Share of members that an attack learned on the original model takes for non-members on the new one (Fr).

    A linear support vector machine on standardised probabilities of the original model for the forget class, training
    against test samples, is applied to the new model's outputs for the training samples. It misfires on small classes.

    Args:
        member_probs: original model, forget class, training samples (n, k).
        nonmember_probs: original model, forget class, test samples (m, k).
        target_probs: new model, the training samples again (n, k).

    Source: the evaluation of concept poisoning (arXiv 2405.15662).
    """
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    arrays = [torch.as_tensor(a).detach().cpu().numpy() for a in (member_probs, nonmember_probs, target_probs)]
    attack = make_pipeline(StandardScaler(), SVC(kernel="linear")).fit(*_members_and_others(arrays[0], arrays[1]))
    return float(1.0 - attack.predict(arrays[2]).mean())


# --- distance to the oracles ----------------------------------------------------------------------------------------


def classification_margins(logits: ArrayLike, labels: ArrayLike) -> Tensor:
    """Margin of the true class over all others together: f_y - logsumexp of f_c over c != y.

    Logits (..., n, k), labels (n,) -> (..., n). Adding a constant to a sample's logits changes nothing.
    """
    logits, labels = torch.as_tensor(logits), torch.as_tensor(labels).long()
    index = labels.expand(logits.shape[:-1])[..., None]
    true = logits.gather(-1, index)
    others = logits.scatter(-1, index, -torch.inf)
    return true.squeeze(-1) - others.logsumexp(-1)


def klom(
    unlearned_margins: ArrayLike, oracle_margins: ArrayLike, *, bins: int = 20, clip: float = 100.0, eps: float = 1e-5
) -> Tensor:
    """KL divergence of margins, unlearned against retrained models, point by point (KLoM).

    Margins of many models are put into equal bins over the range of both sides; the largest sample of all falls out of
    the last bin, as in the released evaluation. Fewer than 100 models a side bias it upward by about 1, so print it
    beside that of a second set of oracles.

    Args:
        unlearned_margins: (models, points) of independently trained and unlearned models.
        oracle_margins: (models, points) of independently retrained models.
        bins: of the histograms.
        clip: margins are cut to -clip..clip.
        eps: least probability of an oracle bin where the unlearned side has some.

    Returns:
        (points,), in nats.

    Source: arXiv 2410.23232, section 2, and RoyRin/data-unlearning-bench.
    """
    sides = [torch.as_tensor(side).double().clamp(-clip, clip) for side in (unlearned_margins, oracle_margins)]
    if any(side.ndim != 2 for side in sides) or sides[0].shape[1] != sides[1].shape[1]:
        raise InputError(
            f"Margins have shapes {tuple(sides[0].shape)} and {tuple(sides[1].shape)}, but must be (models, points) "
            "over the same points"
        )
    if min(len(side) for side in sides) < 2:
        raise InputError(f"klom has {len(sides[0])} and {len(sides[1])} models, but needs at least 2 on each side")
    positive("bins", bins)
    both = torch.cat(sides)
    low, high = both.min(0).values, both.max(0).values
    high = torch.where(high > low, high, low + 1.0)
    edges = low[:, None] + torch.arange(bins + 1) * ((high - low) / bins)[:, None]  # (points, bins + 1)
    edges[:, -1] = high
    p, q = (_histogram(side, edges, bins) for side in sides)
    q = torch.where(p > 0, q.clamp_min(eps), q)
    q = q / q.sum(1, keepdim=True)
    return torch.special.xlogy(p, p / q.clamp_min(1e-300)).sum(1)


def _histogram(values: Tensor, edges: Tensor, bins: int) -> Tensor:
    """Share of values (models, points) in each bin (points, bins).

    What lies on the upper edge is not counted, unless all of it does: then it is in the last bin.
    """
    index = torch.searchsorted(edges, values.T.contiguous(), right=True) - 1
    counts = torch.zeros(len(edges), bins + 1, dtype=torch.float64).scatter_add_(
        1, index.clamp(0, bins), torch.ones_like(values.T)
    )
    counts, beyond = counts[:, :bins], counts[:, bins]
    counts[:, -1] += torch.where(counts.sum(1) == 0, beyond, 0)
    return counts / counts.sum(1, keepdim=True)


def activation_distance(logits: ArrayLike, oracle_logits: ArrayLike) -> float:
    """Mean L2 distance between the softmax outputs of two models on the same samples: (n, k) and (n, k)."""
    p, q = torch.as_tensor(logits).softmax(-1), torch.as_tensor(oracle_logits).softmax(-1)
    return float((p - q).norm(dim=-1).mean())


def logit_kl(logits: ArrayLike, oracle_logits: ArrayLike) -> float:
    """Mean KL divergence of a model's predictions from the oracle's, KL(oracle || model), in nats."""
    p, q = torch.as_tensor(oracle_logits).log_softmax(-1), torch.as_tensor(logits).log_softmax(-1)
    return float(F.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean())


def zero_retrain_forgetting(logits: ArrayLike, random_logits: ArrayLike) -> float:
    """ZRF: 1 - mean Jensen-Shannon divergence (bits) from an untrained model on the forget set; 1 if not to be told."""
    p, q = torch.as_tensor(logits).softmax(-1), torch.as_tensor(random_logits).softmax(-1)
    entropy = prediction_entropy
    divergence = entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2
    return float(1.0 - divergence.mean() / np.log(2))


# --- concepts in generated images -----------------------------------------------------------------------------------


def erasure_report(
    samples_by_prompt: Mapping[tuple[str, str], Any],
    classify: Callable[[Any, Sequence[str]], Sequence[str]],
    *,
    target: str,
    same_kind: Sequence[str],
    other_kind: Sequence[str],
) -> dict[str, float]:
    """How far a concept is gone from a generator's samples, and what stayed, in percent (UnlearnCanvas).

    Args:
        samples_by_prompt: samples by what was asked for, as (value of the target's kind, value of the other kind), such
            as ("van gogh", "dog").
        classify: (samples, names) -> the name that each sample shows.
        target: the erased concept.
        same_kind: all values of the target's kind, such as styles.
        other_kind: all values of the other kind, such as objects.

    Returns:
        UA: samples asked to show the target that do not. IRA: samples asked for another value of its kind that show it.
        CRA: of the same samples, those that show the value of the other kind they were asked for.
    """
    one_of("target", target, list(same_kind))
    erased: list[bool] = []
    in_domain: list[bool] = []
    cross_domain: list[bool] = []
    for (own, other), samples in samples_by_prompt.items():
        shown = classify(samples, same_kind)
        if own == target:
            erased += [name != target for name in shown]
        else:
            in_domain += [name == own for name in shown]
            cross_domain += [name == other for name in classify(samples, other_kind)]
    parts = {"UA": erased, "IRA": in_domain, "CRA": cross_domain}
    return {name: 100.0 * float(np.mean(hits)) if hits else float("nan") for name, hits in parts.items()}


# --- language models ------------------------------------------------------------------------------------------------


def truth_ratio(right_loss: ArrayLike, wrong_loss: ArrayLike) -> Tensor:
    """Likelihood of wrong answers against the right one: exp(-mean wrong loss) / exp(-right loss).

    Args:
        right_loss: mean token loss of the paraphrased right answer (n,).
        wrong_loss: mean token losses of w wrong answers (n, w).
    """
    right, wrong = torch.as_tensor(right_loss), torch.as_tensor(wrong_loss)
    return torch.exp(right - wrong.mean(-1))


def forget_quality(tr_model: ArrayLike, tr_oracle: ArrayLike) -> float:
    """p-value of a two-sample Kolmogorov-Smirnov test between truth ratios of the model and of the oracle."""
    from scipy.stats import ks_2samp

    model, oracle = (np.asarray(torch.as_tensor(side).detach().cpu()).ravel() for side in (tr_model, tr_oracle))
    return float(ks_2samp(model, oracle).pvalue)


def extraction_strength(pred_ids: ArrayLike, label_ids: ArrayLike) -> float:
    """1 - k/length, where k is the shortest prefix after which all teacher-forced predictions match.

    0 when the last token is wrong; the released loop of open-unlearning gives 1/length there.
    """
    right = _matches(pred_ids, label_ids)
    suffix = right.flip(0).long().cumprod(0).sum()  # length of the matching end
    return float(suffix) / len(right)


def exact_memorization(pred_ids: ArrayLike, label_ids: ArrayLike) -> float:
    """Share of teacher-forced predictions that equal the answer's tokens."""
    return float(_matches(pred_ids, label_ids).double().mean())


def _matches(pred_ids: ArrayLike, label_ids: ArrayLike) -> Tensor:
    pred, label = torch.as_tensor(pred_ids), torch.as_tensor(label_ids)
    if pred.shape != label.shape or pred.ndim != 1 or len(pred) == 0:
        raise InputError(
            f"pred_ids and label_ids have shapes {tuple(pred.shape)} and {tuple(label.shape)}, "
            "but must be vectors of one length, at least 1"
        )
    return pred == label


def mia_auc(forget_scores: ArrayLike, holdout_scores: ArrayLike) -> float:
    """Area under the curve of telling forget data from holdout data by a score that is low on members.

    1 means that the forget data is far more likely to the model than the holdout data, 0.5 that it cannot be told.
    """
    from sklearn.metrics import roc_auc_score

    forget, holdout = (np.asarray(torch.as_tensor(s).detach().cpu()).ravel() for s in (forget_scores, holdout_scores))
    return float(roc_auc_score(np.r_[np.zeros(len(forget)), np.ones(len(holdout))], np.r_[forget, holdout]))


def min_k_score(token_logprobs: ArrayLike, *, k: float = 0.2) -> float:
    """Mean of the lowest share k of token log-probabilities (at least one token), negated: low on members."""
    in_range("k", k, 0, 1, above=True)
    logprobs = torch.as_tensor(token_logprobs).double().flatten()
    count = max(1, int(k * len(logprobs)))
    return float(-logprobs.sort().values[:count].mean())
