"""Measures of unlearning: the authors' numbers, closed forms, and what they say when there is nothing to find."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from retouch.core.data import TensorData
from retouch.core.errors import InputError
from retouch.core.metrics.unlearning import (
    FEATURES,
    accuracy,
    activation_distance,
    classification_margins,
    erasure_report,
    exact_memorization,
    extraction_strength,
    forget_quality,
    klom,
    logit_kl,
    membership_inference_entropy,
    membership_inference_loss,
    membership_inference_svc,
    mia_auc,
    min_k_score,
    oracle_gap,
    prediction_entropy,
    transfer_rate,
    truth_ratio,
    unlearning_accuracy,
    zero_retrain_forgetting,
)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- accuracy -------------------------------------------------------------------------------------------------------


def samples(labels, said):
    """Samples whose inputs are the logits that a model which does nothing then gives."""
    return TensorData(nn.functional.one_hot(torch.tensor(said), 4).double(), torch.tensor(labels))


def test_accuracy_is_in_percent():
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0], [0.0, 5.0]])
    assert accuracy(logits, torch.tensor([0, 1, 1, 1])) == 75.0
    assert accuracy(logits.numpy(), np.array([1, 0, 1, 0])) == 0.0
    assert math.isnan(accuracy(logits[:0], torch.tensor([], dtype=torch.long)))


def test_accuracies_after_random_forgetting():
    forget, retain = samples([0, 1, 2, 3], [0, 0, 0, 0]), samples([0, 1, 2, 3], [0, 1, 2, 2])
    test = samples([0, 1, 2, 3, 3], [0, 1, 2, 3, 0])
    measures = unlearning_accuracy(nn.Identity(), forget, retain, test)
    assert measures == {"UA": 75.0, "RA": 75.0, "TA": 80.0}


def test_accuracies_after_a_class_was_forgotten_show_its_test_accuracy_apart():
    forget, retain = samples([3, 3, 3, 3], [3, 0, 1, 2]), samples([0, 1, 2, 0], [0, 1, 2, 0])
    test = samples([0, 1, 2, 2, 3, 3], [0, 1, 2, 0, 3, 0])
    measures = unlearning_accuracy(nn.Identity(), forget, retain, test)
    assert measures == {"UA": 75.0, "RA": 100.0, "TA": 75.0, "FTA": 50.0}


def test_accuracies_are_measured_in_eval_mode_on_any_data(trained_cnn, digits_small):
    model = nn.Sequential(trained_cnn, nn.Dropout(0.99)).train()
    data, test = digits_small.train, digits_small.test
    loader = DataLoader(TensorDataset(data.inputs, data.targets), 50)
    first, second = (unlearning_accuracy(model, test, part, test) for part in (loader, data))
    assert first == second
    assert first["RA"] > 95
    assert first["UA"] == pytest.approx(100 - first["TA"])
    assert model.training
    assert model[1].training


def test_the_gap_is_the_mean_distance_of_what_both_have():
    method = {"UA": 10.0, "RA": 99.0, "TA": 90.0, "MIA": 20.0, "seconds": 3.0}
    oracle = {"UA": 6.0, "RA": 100.0, "TA": 93.0, "MIA": 28.0, "seconds": 90.0}
    assert oracle_gap(method, oracle) == pytest.approx(4.0)
    assert oracle_gap(oracle, oracle) == 0.0
    assert oracle_gap({"UA": 1.0, "TA": 5.0}, {"UA": 2.0, "MIA": 9.0}) == 1.0
    with pytest.raises(InputError, match="share none of UA, RA, TA and MIA"):
        oracle_gap({"UA": 1.0}, {"TA": 2.0})


# --- membership inference -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feature", FEATURES)
def test_the_svc_attack_gives_the_authors_numbers(golden, feature):
    case = golden("forget_measures")
    sides = [(case.in_retain_logits, case.in_retain_labels), (case.in_test_logits, case.in_test_labels)]
    target = case.in_forget_logits, case.in_forget_labels
    found = membership_inference_svc(*sides, target, feature=feature)
    case.close(f"out_mia_{feature}", found)
    as_tensors = [tuple(map(torch.as_tensor, side)) for side in (*sides, target)]
    assert membership_inference_svc(*as_tensors, feature=feature) == found
    if feature == "confidence":
        assert membership_inference_svc(*sides, target) == found


def test_entropy_gives_the_authors_numbers(golden):
    case = golden("forget_measures")
    case.close("out_entropy", prediction_entropy(torch.as_tensor(case.in_forget_logits).softmax(-1)))


def test_entropy_of_known_distributions():
    probs = torch.tensor([[0.25] * 4, [1.0, 0, 0, 0], [0.5, 0.5, 0, 0]])
    expected = torch.tensor([math.log(4), 0.0, math.log(2)])
    torch.testing.assert_close(prediction_entropy(probs), expected)
    torch.testing.assert_close(prediction_entropy(probs.numpy()), expected)
    assert prediction_entropy(probs.view(3, 1, 4)).shape == (3, 1)


def outputs(confidence, n=40, k=3):
    """Logits whose softmax gives the label (always 0) the given probability, a little spread; and the labels."""
    probability = torch.as_tensor(confidence).expand(n) + 0.001 * torch.linspace(-1, 1, n)
    logits = torch.stack([probability.log(), *[((1 - probability) / (k - 1)).log()] * (k - 1)], -1)
    return logits, torch.zeros(n, dtype=torch.long)


@pytest.mark.parametrize("feature", ["confidence", "entropy", "prob"])
def test_the_svc_attack_tells_members_apart_that_it_can_tell_apart(feature):
    sure, unsure = outputs(0.95), outputs(0.4)
    assert membership_inference_svc(sure, unsure, sure, feature=feature) == 0.0
    assert membership_inference_svc(sure, unsure, unsure, feature=feature) == 1.0
    both = torch.cat([sure[0], unsure[0]]), torch.cat([sure[1], unsure[1]])
    assert membership_inference_svc(sure, unsure, both, feature=feature) == 0.5


def test_the_svc_attack_on_correctness_sees_only_that():
    right, wrong = outputs(0.95), outputs(0.1)
    assert membership_inference_svc(right, wrong, outputs(0.6), feature="correctness") == 0.0
    assert membership_inference_svc(right, wrong, outputs(0.2), feature="correctness") == 1.0


@pytest.mark.parametrize("feature", FEATURES)
def test_a_forget_set_drawn_from_the_test_set_has_its_rate_of_non_members(feature):
    labels = torch.arange(1200) % 5
    own = nn.functional.one_hot(labels, 5)
    member = (2 * draw(1200, 5, seed=1) + 6 * own)[:400], labels[:400]
    test = 2 * draw(1200, 5, seed=2) + 3 * own
    known, forget = (test[:400], labels[:400]), (test[400:], labels[400:])
    rates = [membership_inference_svc(member, known, part, feature=feature) for part in (known, forget, member)]
    assert rates[0] == pytest.approx(rates[1], abs=0.06)
    assert rates[2] < rates[1] - 0.2


def test_an_attack_needs_both_sides_and_a_feature_it_knows():
    sure, nobody = outputs(0.9), (torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))
    with pytest.raises(InputError, match="feature is 'loss', but must be one of 'confidence', 'entropy'"):
        membership_inference_svc(sure, sure, sure, feature="loss")
    for sides in ((sure, nobody), (nobody, sure)):
        with pytest.raises(InputError, match="needs at least one member and one non-member"):
            membership_inference_svc(*sides, sure)
        with pytest.raises(InputError, match="needs at least one member and one non-member"):
            membership_inference_entropy(*sides, sure)


def test_the_entropy_attack_gives_the_share_judged_members():
    sure, unsure = outputs(0.95), outputs(0.4)
    assert membership_inference_entropy(sure, unsure, sure) == 1.0
    assert membership_inference_entropy(sure, unsure, unsure) == 0.0
    few = sure[0][:4], sure[1][:4]
    assert membership_inference_entropy(few, unsure, sure) == 1.0, "both sides weigh the same, however many they are"


def test_the_loss_attack_tells_members_apart_that_it_can_tell_apart(global_rng_untouched):
    low, high = 0.1 * draw(50).abs(), 5 + draw(80, seed=1).abs()
    assert membership_inference_loss(low, high) == (1.0, 0.5)
    assert membership_inference_loss(high.numpy(), low.numpy()) == (1.0, 0.5)


def test_the_loss_attack_is_at_chance_on_losses_of_one_kind_however_many_there_are():
    score, gap = membership_inference_loss(draw(200).exp(), draw(4000, seed=1).exp())
    assert score == pytest.approx(0.5, abs=0.1)
    assert gap == abs(score - 0.5)


def test_the_loss_attack_is_repeatable():
    sides = draw(60).exp(), (draw(60, seed=1) + 0.3).exp()
    found = [membership_inference_loss(*sides, splits=3, seed=seed) for seed in (1, 1, 2, 3, 2**62 + 1)]
    assert found[0] == found[1]
    assert len(set(found)) > 1


@pytest.mark.parametrize("count", [0, 1, 2, 3, 5])
def test_the_loss_attack_works_on_few_samples_or_says_that_they_are_too_few(count):
    try:
        score, gap = membership_inference_loss(draw(count), draw(20, seed=1))
    except InputError as error:
        assert f"has {count} samples, but must have at least" in str(error)
        return
    assert 0 <= score <= 1
    assert 0 <= gap <= 0.5


def test_the_loss_attack_needs_splits():
    with pytest.raises(InputError, match="splits is 0, but must be greater than 0"):
        membership_inference_loss(draw(20), draw(20), splits=0)


def test_the_transfer_rate_is_the_share_that_looks_like_test_samples_now():
    spread = 0.01 * draw(30, 2).float()
    member, other = torch.tensor([0.95, 0.05]) + spread, torch.tensor([0.6, 0.4]) + spread
    assert transfer_rate(member, other, member) == 0.0
    assert transfer_rate(member, other, other) == 1.0
    assert transfer_rate(member.numpy(), other.numpy(), torch.cat([member, other]).numpy()) == 0.5
    assert transfer_rate(1e-4 * member, 1e-4 * other, 1e-4 * other) == 1.0, "features are standardised"


# --- distance to the oracles ----------------------------------------------------------------------------------------


def test_margins_and_klom_give_the_authors_numbers(golden):
    case = golden("dmm")
    case.close("out_margins", classification_margins(case.in_logits, case.in_labels))
    settings = {"bins": int(case.param_bins), "clip": float(case.param_clip), "eps": float(case.param_eps)}
    case.close("out_klom", klom(case.in_unlearned_margins, case.in_oracle_margins, **settings))
    case.close("out_klom", klom(torch.as_tensor(case.in_unlearned_margins), torch.as_tensor(case.in_oracle_margins)))


def test_margins_in_closed_form():
    logits, labels = draw(3, 6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    margins = classification_margins(logits, labels)
    probs = logits.softmax(-1).gather(-1, labels.expand(3, 6)[..., None]).squeeze(-1)
    torch.testing.assert_close(margins, (probs / (1 - probs)).log())
    torch.testing.assert_close(classification_margins(logits + 100 * draw(3, 6, 1), labels), margins)
    torch.testing.assert_close(classification_margins(torch.zeros(2, 5), [0, 3]), torch.full((2,), -math.log(4)))
    two = draw(6, 2)
    torch.testing.assert_close(classification_margins(two, [0] * 6), two[:, 0] - two[:, 1])
    assert classification_margins(torch.tensor([[1000.0, 0.0]]), [0]).tolist() == [1000.0]


def test_klom_of_two_bins_by_hand():
    unlearned = torch.tensor([[0.0], [0.0], [0.0], [0.6]])
    oracle = torch.tensor([[0.0], [0.6], [0.6], [1.0]])  # the largest of all falls out of the last bin
    expected = 0.75 * math.log(0.75 / (1 / 3)) + 0.25 * math.log(0.25 / (2 / 3))
    assert klom(unlearned, oracle, bins=2).tolist() == pytest.approx([expected])


def test_klom_where_the_oracle_never_is_by_hand():
    unlearned, oracle = torch.tensor([[0.6]] * 4), torch.tensor([[0.0], [0.1], [0.2], [1.0]])
    assert klom(unlearned, oracle, bins=2).tolist() == pytest.approx([math.log(1e5 + 1)])
    assert klom(unlearned, oracle, bins=2, eps=1e-3).tolist() == pytest.approx([math.log(1e3 + 1)])


def test_klom_of_the_oracle_is_zero_and_of_other_oracles_at_the_floor():
    oracle, again, other = draw(200, 8), draw(200, 8, seed=1), draw(200, 8, seed=2) + 3
    torch.testing.assert_close(klom(oracle, oracle), torch.zeros(8, dtype=torch.float64))
    floor = klom(again, oracle)
    assert floor.max() < 1
    assert (klom(other, oracle) > 4 * floor).all()


def test_klom_falls_as_the_margins_come_closer():
    oracle = draw(300, 5)
    distances = torch.stack([klom(draw(300, 5, seed=1) + shift, oracle) for shift in (4.0, 2.0, 1.0, 0.0)]).mean(1)
    assert (distances.diff() < 0).all()


def test_klom_depends_on_neither_order_nor_scale_of_margins_and_points_are_apart():
    unlearned, oracle = draw(50, 6), draw(70, 6, seed=1) + 1
    expected = klom(unlearned, oracle)
    assert expected.shape == (6,)
    assert (expected > 0).all()
    torch.testing.assert_close(klom(unlearned.flip(0), oracle[torch.randperm(70)]), expected)
    torch.testing.assert_close(klom(4 * unlearned + 8, 4 * oracle + 8), expected)
    torch.testing.assert_close(klom(unlearned[:, 2:4], oracle[:, 2:4]), expected[2:4])


def test_klom_cuts_margins_at_the_clip():
    unlearned, oracle = draw(50, 3), draw(50, 3, seed=1)
    far, edge = unlearned.clone(), unlearned.clone()
    far[:5], edge[:5] = -1e6, -10.0
    torch.testing.assert_close(klom(far, oracle, clip=10.0), klom(edge, oracle, clip=10.0))
    assert not torch.allclose(klom(far, oracle, clip=20.0), klom(edge, oracle, clip=20.0))


@pytest.mark.parametrize("side", [150.0, -150.0])
def test_klom_is_large_where_all_margins_are_cut(side):
    """A model that was destroyed has margins beyond the clip; the oracles have not."""
    assert klom(torch.full((60, 1), side), draw(60, 1)).item() > 3


def test_klom_of_constants():
    assert klom(torch.ones(5, 2), torch.ones(7, 2)).tolist() == [0.0, 0.0]


def test_klom_refuses_what_it_cannot_compare():
    with pytest.raises(InputError, match=r"shapes \(5, 3\) and \(5, 4\), but must be \(models, points\)"):
        klom(draw(5, 3), draw(5, 4))
    with pytest.raises(InputError, match="over the same points"):
        klom(draw(5), draw(5))
    with pytest.raises(InputError, match="klom has 1 and 5 models, but needs at least 2 on each side"):
        klom(draw(1, 3), draw(5, 3))
    with pytest.raises(InputError, match="bins is 0, but must be greater than 0"):
        klom(draw(5, 3), draw(5, 3), bins=0)


def test_distances_between_outputs_in_closed_form():
    sure, other = torch.tensor([[200.0, 0.0], [0.0, 200.0]]), torch.tensor([[0.0, 200.0], [0.0, 200.0]])
    assert activation_distance(sure, other) == pytest.approx(math.sqrt(2) / 2)
    assert zero_retrain_forgetting(sure, other) == pytest.approx(0.5)
    p, q = torch.tensor([[0.2, 0.8]]), torch.tensor([[0.6, 0.4]])
    assert activation_distance(p.log(), q.log()) == pytest.approx(math.sqrt(0.32))
    assert logit_kl(p.log(), q.log()) == pytest.approx(0.6 * math.log(3) + 0.4 * math.log(0.5))
    mean = (p + q) / 2
    divergence = 0.5 * ((p * (p / mean).log2()).sum() + (q * (q / mean).log2()).sum())
    assert zero_retrain_forgetting(p.log().numpy(), q.log().numpy()) == pytest.approx(1 - divergence.item())


def test_distances_to_itself_are_zero():
    logits = draw(20, 4)
    assert activation_distance(logits, logits + 5) == pytest.approx(0, abs=1e-12)
    assert logit_kl(logits, logits + 5) == pytest.approx(0, abs=1e-12)
    assert zero_retrain_forgetting(logits, logits + 5) == pytest.approx(1)


# --- concepts in generated images -----------------------------------------------------------------------------------


def test_an_erasure_report_counts_what_is_gone_and_what_stayed():
    def classify(images, names):
        """A sample says itself what it shows, as "style object"."""
        return [next(name for name in image.split() if name in names) for image in images]

    shown = {
        ("gogh", "dog"): ["monet dog", "gogh dog", "klimt cat", "monet cat"],  # 3 of 4 are not in the erased style
        ("monet", "dog"): ["monet dog", "klimt dog"],
        ("klimt", "cat"): ["klimt dog", "klimt dog", "klimt cat"],
    }
    report = erasure_report(
        shown, classify, target="gogh", same_kind=["gogh", "monet", "klimt"], other_kind=["dog", "cat"]
    )
    assert report == pytest.approx({"UA": 75.0, "IRA": 80.0, "CRA": 60.0})


def test_an_erasure_report_without_prompts_of_a_kind_says_so():
    report = erasure_report(
        {("a", "x"): [0, 0]}, lambda samples, names: ["b"] * 2, target="a", same_kind="ab", other_kind="xy"
    )
    assert report["UA"] == 100.0
    assert math.isnan(report["IRA"])
    assert math.isnan(report["CRA"])


def test_an_erasure_report_needs_a_target_of_the_kind():
    with pytest.raises(InputError, match="target is 'c', but must be one of 'a', 'b'"):
        erasure_report({}, None, target="c", same_kind=["a", "b"], other_kind=[])


# --- language models ------------------------------------------------------------------------------------------------


def test_the_truth_ratio_is_that_of_likelihoods():
    right, wrong = torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 3.0], [2.0, 2.0]])
    torch.testing.assert_close(truth_ratio(right, wrong), torch.tensor([math.exp(-1), 1.0]))
    torch.testing.assert_close(truth_ratio(right.numpy(), wrong.numpy()), torch.tensor([math.exp(-1), 1.0]))


def test_forget_quality_of_the_oracle_is_uniform_and_of_another_distribution_zero():
    values = [forget_quality(draw(60, seed=2 * k), draw(60, seed=2 * k + 1)) for k in range(150)]
    assert np.mean(values) == pytest.approx(0.5, abs=0.08)
    assert np.mean(np.array(values) < 0.1) == pytest.approx(0.1, abs=0.06)
    assert forget_quality(draw(60), draw(60)) == pytest.approx(1.0)
    assert forget_quality(draw(60), draw(60, seed=1) + 2) < 1e-6


@pytest.mark.parametrize(
    ("predicted", "strength", "memorized"),
    [
        ([1, 2, 3, 4], 1.0, 1.0),
        ([0, 2, 3, 4], 0.75, 0.75),
        ([1, 2, 0, 4], 0.25, 0.75),
        ([1, 2, 3, 0], 0.0, 0.75),
        ([0, 0, 0, 0], 0.0, 0.0),
        ([0, 0, 3, 4], 0.5, 0.5),
    ],
)
def test_extraction_strength_and_exact_memorization(predicted, strength, memorized):
    assert extraction_strength(predicted, [1, 2, 3, 4]) == strength
    assert extraction_strength(torch.tensor(predicted), torch.tensor([1, 2, 3, 4])) == strength
    assert exact_memorization(np.array(predicted), np.array([1, 2, 3, 4])) == memorized


@pytest.mark.parametrize("measure", [extraction_strength, exact_memorization])
@pytest.mark.parametrize(("predicted", "labels"), [([1, 2], [1]), ([], []), ([[1, 2]], [[1, 2]])])
def test_token_ids_that_do_not_fit_are_refused(measure, predicted, labels):
    with pytest.raises(InputError, match="but must be vectors of one length, at least 1"):
        measure(predicted, labels)


def test_the_auc_is_the_share_of_pairs_in_order():
    assert mia_auc([0.1, 0.2], [0.3, 0.4]) == 1.0
    assert mia_auc([0.3, 0.4], [0.1, 0.2]) == 0.0
    assert mia_auc(torch.tensor([0.1, 0.35]), torch.tensor([0.3, 0.4])) == 0.75
    assert mia_auc(np.ones(3), np.ones(5)) == 0.5


def test_min_k_is_the_mean_of_the_least_likely_tokens():
    logprobs = -torch.arange(1.0, 11.0)
    assert min_k_score(logprobs) == 9.5
    assert min_k_score(logprobs.numpy(), k=0.5) == 8.0
    assert min_k_score(logprobs, k=1) == 5.5
    assert min_k_score([-3.0, -1.0], k=0.1) == 3.0, "one token at least"
    for k in (0, 1.1, -1):
        with pytest.raises(InputError, match=f"k is {k}, but must be greater than 0 and at most 1"):
            min_k_score(logprobs, k=k)
