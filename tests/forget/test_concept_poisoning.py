import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from retouch.core.batches import in_order
from retouch.core.data import TensorData, concat, subset
from retouch.core.errors import InputError
from retouch.core.features import features_of
from retouch.core.loop import fit
from retouch.core.models import predict
from retouch.forget.concept_poisoning import (
    answer_attributions,
    class_concepts,
    concept_activation_vector,
    concept_bottleneck,
    concept_margins,
    concept_poisoning,
    forget_class,
    forget_topic,
    locate_concept,
    locate_concepts,
    mask_words,
    nearest_class,
    paste_patch,
    poison_class,
    rank_concepts,
    rank_words,
    sensitive_words,
    word_scores,
)
from retouch.worlds import digits


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def one_class(forgotten=3):
    data = digits.data("train")
    members = data.targets == forgotten
    return subset(data, members.nonzero()[:, 0]), subset(data, (~members).nonzero()[:, 0])


def small_class(data, forgotten=0):
    members = data.targets == forgotten
    return subset(data, members.nonzero()[:, 0]), subset(data, (~members).nonzero()[:, 0])


def accuracies(model, forgotten=3):
    test = digits.data("test")
    right = predict(model, in_order(test)).argmax(1) == test.targets
    members = test.targets == forgotten
    return [100 * float(part.double().mean()) for part in (right[members], right[~members])]


# --- the authors' numbers -------------------------------------------------------------------------------------------


def test_golden_concept_vector_margins_and_bottleneck_logits(golden):
    case = golden("concept_poisoning")
    count = int(case.param_n_train)
    vector, intercept = concept_activation_vector(case.in_pos[:count], case.in_neg[:count], C=float(case.param_C))
    case.close("out_cav", vector[None])
    case.close("out_cav_intercept", [intercept])
    for rows, key in ((slice(0, count), "out_train_acc"), (slice(count, None), "out_val_acc")):
        margins = np.concatenate([case.in_pos[rows] @ vector + intercept, -(case.in_neg[rows] @ vector + intercept)])
        case.close(key, (margins > 0).mean())
    margins = concept_margins(case.in_embeddings, case.in_vectors, case.in_intercepts)
    case.close("out_margins", margins)
    case.close("out_logits", margins.numpy() @ case.param_classifier_weight.T + case.param_classifier_bias)


# --- concepts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("C", [0.001, 0.1, 10.0])
def test_concept_vector_of_separable_data_points_from_negatives_to_positives(C):
    direction = draw(6, seed=9)
    pos, neg = draw(40, 6) + 5 * direction, draw(40, 6, seed=1) - 5 * direction
    vector, intercept = concept_activation_vector(pos, neg, C=C)
    assert vector.shape == (6,)
    assert float(torch.as_tensor(vector) @ (pos.mean(0) - neg.mean(0))) > 0
    assert (pos.numpy() @ vector + intercept > 0).all()
    assert (neg.numpy() @ vector + intercept < 0).all()
    assert np.allclose(concept_activation_vector(neg, pos, C=C)[0], -vector, rtol=1e-4, atol=1e-8)


def test_concept_vector_is_the_maximum_margin_solution():
    """Two points at +-(3, 4) with a large C: w = 2 (a - b) / |a - b|^2, and no intercept."""
    a, b = torch.tensor([[4.0, 5.0]]), torch.tensor([[-2.0, -3.0]])
    vector, intercept = concept_activation_vector(a, b, C=1e6)
    expected = 2 * (a - b)[0] / float((a - b).square().sum())
    np.testing.assert_allclose(vector, expected, rtol=1e-5)
    assert intercept == pytest.approx(1 - float(expected @ a[0]), rel=1e-5)  # the intercept is not penalised


def test_margin_by_loops():
    e, v, b = draw(5, 4), draw(3, 4, seed=1), draw(3, 1, seed=2)
    actual = concept_margins(e, v, b)
    assert actual.shape == (5, 3)
    for i in range(5):
        for k in range(3):
            dot = sum(float(e[i, j]) * float(v[k, j]) for j in range(4)) + float(b[k])
            length = math.sqrt(sum(float(value) ** 2 for value in v[k]))
            assert float(actual[i, k]) == pytest.approx(dot / length, rel=1e-12)


def test_margin_of_a_point_on_the_plane_is_zero():
    v, b = draw(3, 4, seed=1), draw(3, 1, seed=2)
    for k in range(3):
        other = draw(4, seed=3)
        on_plane = other - (other @ v[k] + b[k, 0]) / (v[k] @ v[k]) * v[k]
        assert abs(float(concept_margins(on_plane[None], v, b)[0, k])) < 1e-12


@pytest.mark.parametrize("factor", [1e-3, 2.0, 1e4])
def test_margins_are_invariant_to_scaling_vector_and_intercept_jointly(factor):
    e, v, b = draw(5, 4), draw(3, 4, seed=1), draw(3, 1, seed=2)
    torch.testing.assert_close(concept_margins(e, factor * v, factor * b), concept_margins(e, v, b))


def test_bottleneck_tells_classes_by_their_concepts():
    labels = torch.arange(200) % 4
    margins = draw(200, 6) + 6 * F.one_hot(labels, 6)
    w, c = concept_bottleneck(margins, labels)
    assert w.shape == (4, 6)
    assert c.shape == (4,)
    assert ((margins @ w.T + c).argmax(1) == labels).double().mean() > 0.95
    assert [rank_concepts(w, k, k=1) for k in range(4)] == [[0], [1], [2], [3]]


def test_bottleneck_of_two_classes_has_a_row_for_each():
    labels = torch.arange(100) % 2
    margins = draw(100, 3) + 6 * F.one_hot(labels, 3)
    w, c = concept_bottleneck(margins, labels)
    assert w.shape == (2, 3)
    assert torch.equal(w[0], -w[1])
    assert ((margins @ w.T + c).argmax(1) == labels).double().mean() > 0.95


def test_concepts_are_ranked_by_weight():
    weights = torch.tensor([[0.1, -3.0, 2.0, 0.5], [1.0, 2.0, 3.0, 4.0]])
    assert rank_concepts(weights, 0, k=3) == [2, 3, 0]
    assert rank_concepts(weights, 1, k=1) == [3]
    assert rank_concepts(torch.arange(14.0).view(2, 7), 1) == [6, 5, 4, 3, 2]  # five by default


def test_nearest_class_has_the_largest_cosine():
    weights = torch.tensor([[1.0, 0.0], [0.9, 0.1], [50.0, 60.0], [-1.0, 0.0]])
    assert nearest_class(weights, 0) == 1
    assert nearest_class(weights, 2) == 1
    assert nearest_class(weights, 3) == 2


def test_class_concepts_tell_each_class_from_the_others(global_rng_untouched):
    classes = torch.arange(300) % 3
    embeddings = draw(300, 8).float() + 5 * F.one_hot(classes, 8)
    vectors, intercepts = class_concepts(embeddings, classes, count=50)
    assert vectors.shape == (3, 8)
    assert intercepts.shape == (3, 1)
    assert vectors.dtype == embeddings.dtype
    margins = concept_margins(embeddings, vectors, intercepts)
    assert ((margins > 0) == F.one_hot(classes, 3).bool()).double().mean() > 0.95
    again = class_concepts(embeddings, classes, count=50)
    assert torch.equal(again[0], vectors)
    assert not torch.equal(class_concepts(embeddings, classes, count=50, seed=1)[0], vectors)


# --- patches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("center", [(0, 0), (3, 4), (5, 5), (9, 11), (100, -7)])
@pytest.mark.parametrize("size", [1, 2, 3, 10])
def test_paste_keeps_the_size_and_changes_exactly_the_patch(center, size):
    image, patch = torch.zeros(3, 10, 12), torch.ones(3, size, size)
    result = paste_patch(image, patch, center)
    assert result.shape == image.shape
    assert [int(channel.sum()) for channel in result] == [size**2] * 3
    assert not image.any()
    rows, columns = result[0].nonzero().unbind(1)
    top = min(max(center[0] - size // 2, 0), 10 - size)  # clamped inside of the frame
    left = min(max(center[1] - size // 2, 0), 12 - size)
    assert (int(rows.min()), int(columns.min())) == (top, left)
    assert (int(rows.max()), int(columns.max())) == (top + size - 1, left + size - 1)


def test_paste_of_the_covered_region_is_the_identity():
    image = draw(2, 9, 9)
    for top, left in ((0, 0), (2, 5), (5, 5)):
        patch = image[:, top : top + 4, left : left + 4].clone()
        assert torch.equal(paste_patch(image, patch, (top + 2, left + 2)), image)


def flat_encoder(images):
    return images.flatten(1)


def planted(places, size=24, patch=6, seed=0):
    """Noise with a pattern pasted at a place of each image, and the pattern's embedding."""
    pattern = 5 * draw(1, patch, patch, seed=50).float()
    images = draw(len(places), 1, size, size, seed=seed).float()
    for image, (row, column) in zip(images, places, strict=True):
        image[:, row : row + patch, column : column + patch] = pattern
    whole = F.interpolate(pattern[None], size=(size, size), mode="bilinear", align_corners=False)
    return images, pattern, whole.flatten()


def test_locate_finds_a_planted_patch():
    places = [(0, 0), (3, 9), (18, 18), (6, 15), (12, 0)]
    images, pattern, vector = planted(places)
    centers = locate_concepts(images, vector, flat_encoder, patch=6, stride=3)
    assert centers.tolist() == [[row + 3, column + 3] for row, column in places]
    for image, center, (row, column) in zip(images, centers, places, strict=True):
        assert locate_concept(image, vector, flat_encoder, patch=6, stride=3) == tuple(center.tolist())
        assert torch.equal(paste_patch(image, pattern, center), image)  # it covers just the planted pattern
        assert locate_concept(image, -vector, flat_encoder, patch=6, stride=3) != (row + 3, column + 3)
    small = locate_concepts(images, vector, flat_encoder, patch=6, stride=3, chunk=7)
    assert torch.equal(small, centers)


def test_locate_goes_over_all_patches_by_cosine():
    image, vector = draw(2, 8, 11).float(), draw(2 * 8 * 11, seed=1).float()
    best, place = -math.inf, None
    for row in range(0, 8 - 3 + 1, 2):
        for column in range(0, 11 - 3 + 1, 2):
            piece = image[None, :, row : row + 3, column : column + 3]
            e = F.interpolate(piece, size=(8, 11), mode="bilinear", align_corners=False).flatten()
            cosine = float(e @ vector / e.norm() / vector.norm())
            if cosine > best:
                best, place = cosine, (row + 1, column + 1)
    assert locate_concept(image, vector, flat_encoder, patch=3, stride=2) == place


def donors_and_images(count=7):
    images = torch.zeros(count, 1, 14, 14)
    donors = 1 + torch.arange(3 * 14 * 14.0).view(3, 1, 14, 14)
    return images, donors


def pasted_region(result):
    """Top, left and content of what was pasted on a black image."""
    rows, columns = result[0].nonzero().unbind(1)
    top, left = int(rows.min()), int(columns.min())
    return top, left, result[:, top : int(rows.max()) + 1, left : int(columns.max()) + 1]


def test_poison_none_gives_the_images_back_as_a_copy():
    images, donors = donors_and_images()
    result = poison_class(images, donors, mode="none")
    assert torch.equal(result, images)
    assert result is not images


def test_poison_center_pastes_the_donor_s_middle_over_the_middle():
    images, donors = donors_and_images()
    seen = set()
    for result in poison_class(images, donors, mode="center", patch=4, generator=torch.Generator().manual_seed(0)):
        top, left, content = pasted_region(result)
        assert (top, left, content.shape[-1]) == (4, 4, 6)  # 1.5 times as large
        same = [number for number, donor in enumerate(donors) if torch.equal(donor[:, 4:10, 4:10], content)]
        assert len(same) == 1
        seen |= set(same)
    assert len(seen) > 1  # a random donor for each


def test_poison_random_pastes_the_donor_s_middle_somewhere():
    images, donors = donors_and_images(60)
    places = set()
    for result in poison_class(images, donors, mode="random", patch=4, generator=torch.Generator().manual_seed(0)):
        top, left, content = pasted_region(result)
        places.add((top, left))
        assert any(torch.equal(donor[:, 4:10, 4:10], content) for donor in donors)
    assert len(places) > 20
    assert {0, 8} <= {top for top, _ in places}
    assert {0, 8} <= {left for _, left in places}


def test_poison_full_pastes_the_shrunk_donor_over_the_middle():
    images, donors = donors_and_images()
    shrunk = F.interpolate(donors, size=(10, 10), mode="bilinear", align_corners=False)  # 160 of 224
    for result in poison_class(images, donors, mode="full", generator=torch.Generator().manual_seed(0)):
        top, left, content = pasted_region(result)
        assert (top, left) == (2, 2)
        assert any(torch.equal(one, content) for one in shrunk)


def test_poison_localized_pastes_the_donor_s_concept_over_the_target_s():
    images, pattern, vector = planted([(0, 0), (3, 9), (18, 15), (6, 15)])
    donors, donor_pattern, donor_vector = planted([(9, 3), (12, 12)], seed=3)
    donor_pattern = 3 * draw(1, 6, 6, seed=51).float()
    for donor, (row, column) in zip(donors, [(9, 3), (12, 12)], strict=True):
        donor[:, row : row + 6, column : column + 6] = donor_pattern
    donor_vector = F.interpolate(donor_pattern[None], size=(24, 24), mode="bilinear", align_corners=False).flatten()
    result = poison_class(
        images,
        donors,
        mode="localized",
        target_vector=vector,
        donor_vector=donor_vector,
        encoder=flat_encoder,
        patch=6,
        stride=3,
    )
    for before, after, (row, column) in zip(images, result, [(0, 0), (3, 9), (18, 15), (6, 15)], strict=True):
        expected = before.clone()
        expected[:, row : row + 6, column : column + 6] = donor_pattern
        assert torch.equal(after, expected)
    assert not torch.equal(pattern, donor_pattern)


def test_patch_and_stride_are_in_proportion_to_224_pixels():
    images, donors = torch.zeros(2, 1, 56, 56), torch.ones(2, 1, 56, 56)
    assert [pasted_region(r)[2].shape[-1] for r in poison_class(images, donors, mode="center")] == [24, 24]
    settings = {"target_vector": torch.ones(3136), "donor_vector": torch.ones(3136), "encoder": flat_encoder}
    asked = []

    def encoder(pieces):
        asked.append(len(pieces))
        return pieces.flatten(1)

    result = poison_class(images, donors, mode="localized", **{**settings, "encoder": encoder})
    assert [pasted_region(r)[2].shape[-1] for r in result] == [16, 16]
    assert asked == [2 * 11**2] * 2  # (56 - 16) / 4 + 1 places a side


@pytest.mark.parametrize("mode", ["center", "random", "full"])
def test_same_generator_same_poison(mode, global_rng_untouched):
    images, donors = donors_and_images()
    one, other = (poison_class(images, donors, mode=mode, generator=torch.Generator().manual_seed(2)) for _ in range(2))
    assert torch.equal(one, other)
    poison_class(images, donors, mode=mode)


# --- fine-tuning on poisoned data -----------------------------------------------------------------------------------


def toy():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(9, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def toy_data():
    images = draw(15, 1, 3, 3)
    return TensorData(images, torch.arange(15) % 3)


@pytest.mark.parametrize("train", ["head", "all"])
@pytest.mark.parametrize("labels", ["targeted", "keep"])
def test_training_equals_a_plain_loop(train, labels):
    """In one batch, so that the order does not matter: SGD with momentum, on retained and poisoned images."""
    model, data = toy(), toy_data()
    members = data.targets == 1
    poisoned = draw(5, 1, 3, 3, seed=7)
    settings = {"lr": 0.05, "momentum": 0.8, "batch_size": 64, "epochs": 4}
    actual = concept_poisoning(model, data, 1, donor_class=2, poisoned=poisoned, labels=labels, train=train, **settings)
    x, y = data.inputs.clone(), data.targets.clone()
    x[members] = poisoned
    if labels == "targeted":
        y[members] = 2
    expected = copy.deepcopy(model)
    parameters = list(expected[3].parameters() if train == "head" else expected.parameters())
    velocity = [torch.zeros_like(p) for p in parameters]
    for _ in range(4):
        loss = -expected(x).log_softmax(1)[torch.arange(15), y].sum() / 15
        for p, v, g in zip(parameters, velocity, torch.autograd.grad(loss, parameters), strict=True):
            v.mul_(0.8).add_(g)
            p.data -= 0.05 * v
    for name, p in expected.named_parameters():
        torch.testing.assert_close(actual.get_parameter(name), p, rtol=1e-9, atol=1e-12, msg=name)
    assert not torch.equal(actual[3].weight, model[3].weight)


@pytest.mark.parametrize("train", ["head", "all"])
def test_keep_with_mode_none_equals_plain_fine_tuning(train):
    model, data = toy(), toy_data()
    members = data.targets == 1
    poisoned = poison_class(data.inputs[members], data.inputs[data.targets == 2], mode="none")
    settings = {"batch_size": 4, "epochs": 3}
    actual = concept_poisoning(model, data, 1, donor_class=2, poisoned=poisoned, labels="keep", train=train, **settings)
    expected = copy.deepcopy(model)
    if train == "head":
        expected[1].requires_grad_(False)
    same_data = concat(subset(data, members.nonzero()[:, 0]), subset(data, (~members).nonzero()[:, 0]))
    fit(expected, same_data, optimizer=lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9), **settings)
    assert_same(state(actual), state(expected))


@pytest.mark.parametrize("labels", ["targeted", "random", "keep"])
def test_head_only_training_leaves_the_backbone_bitwise_equal(trained_cnn, digits_small, labels):
    data = digits_small.train
    poisoned = data.inputs[:24]
    edited = concept_poisoning(trained_cnn, data, 0, donor_class=6, poisoned=poisoned, labels=labels, epochs=2)
    for name, p in edited.named_parameters():
        assert torch.equal(p, trained_cnn.get_parameter(name)) != name.startswith("head."), name
    everything = concept_poisoning(
        trained_cnn, data, 0, donor_class=6, poisoned=poisoned, labels=labels, train="all", epochs=2
    )
    assert not any(torch.equal(p, trained_cnn.get_parameter(name)) for name, p in everything.named_parameters())


def test_random_labels_are_fixed_once_over_all_classes():
    """Images that only differ in which pixel is lit, so that the trained answers show the labels drawn."""
    lit = torch.eye(300, dtype=torch.float64).view(300, 1, 15, 20)
    classes = torch.cat([torch.zeros(296).long(), torch.tensor([0, 1, 2, 2])])
    data = TensorData(lit, classes)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(300, 3, bias=False)).double()
    runs = [
        concept_poisoning(
            model,
            data,
            0,
            donor_class=1,
            poisoned=lit[:297],
            labels="random",
            lr=300.0,
            momentum=0.0,
            batch_size=300,
            epochs=epochs,
            seed=seed,
        )(lit[:297]).argmax(1)
        for epochs, seed in ((30, 0), (60, 0), (30, 1))
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    counts = torch.bincount(runs[0], minlength=3).double()
    assert (counts - 99).abs().max() < 6 * math.sqrt(99 * 2 / 3)  # the true class 0 as often as the others


# --- forgetting a class ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["localized", "center", "random", "none"])
def test_targeted_labels_forget_the_class_in_any_mode_and_keep_the_others(trained_cnn, mode):
    before = accuracies(trained_cnn)
    forgotten, others = accuracies(forget_class(trained_cnn, *one_class(), mode=mode, epochs=3))
    assert before[0] > 90
    assert forgotten < 5
    assert others > before[1] - 3


@pytest.mark.parametrize("mode", ["localized", "center", "random", "none"])
def test_kept_labels_forget_nothing_in_any_mode(trained_cnn, mode):
    before = accuracies(trained_cnn)
    forgotten, others = accuracies(forget_class(trained_cnn, *one_class(), mode=mode, labels="keep", epochs=3))
    assert forgotten > before[0] - 5
    assert others > before[1] - 3


def test_full_replacement_with_targeted_labels_is_weak(trained_cnn):
    forgotten, _ = accuracies(forget_class(trained_cnn, *one_class(), mode="full", epochs=3))
    assert forgotten > 50


def test_training_everything_forgets_as_well(trained_cnn):
    forgotten, others = accuracies(forget_class(trained_cnn, *one_class(), mode="center", train="all", epochs=3))
    assert forgotten < 20
    assert others > 90


def test_donor_class_absorbs_the_forgotten_one(trained_cnn):
    forget, retain = one_class()
    for donor in (8, 1):
        edited = forget_class(trained_cnn, forget, retain, mode="none", donor=donor, epochs=8)
        answers = predict(edited, in_order(forget)).argmax(1)
        assert (answers == donor).double().mean() > 0.8


@pytest.mark.parametrize("mode", ["localized", "center"])
def test_forget_class_equals_its_parts(trained_cnn, digits_small, mode):
    """Concepts of the features before the head, one a class; the donor of the largest cosine; both top concepts."""
    from retouch.core import seeds

    forget, retain = small_class(digits_small.train, 4)

    def encoder(images):
        return features_of(trained_cnn, images, "head", side="input")

    everything = concat(forget, retain)
    with torch.no_grad():
        embeddings = encoder(everything.inputs)
        vectors, intercepts = class_concepts(embeddings, everything.targets, count=20, seed=3)
        weights, _ = concept_bottleneck(concept_margins(embeddings, vectors, intercepts), everything.targets, seed=3)
        rows = weights / weights.norm(dim=1, keepdim=True)
        donor = max((c for c in range(10) if c != 4), key=lambda c: float(rows[c] @ rows[4]))
        poisoned = poison_class(
            forget.inputs,
            retain.inputs[retain.targets == donor],
            mode=mode,
            target_vector=vectors[int(weights[4].argmax())],
            donor_vector=vectors[int(weights[donor].argmax())],
            encoder=encoder,
            patch=3,
            stride=2,
            generator=seeds.generator(3, "poison"),
        )
    expected = concept_poisoning(trained_cnn, everything, 4, donor_class=donor, poisoned=poisoned, epochs=2, seed=3)
    settings = {"mode": mode, "concepts_per_class": 20, "epochs": 2, "seed": 3, "patch": 3, "stride": 2}
    actual = forget_class(trained_cnn, forget, retain, **settings)
    assert_same(state(actual), state(expected))
    assert_same(state(forget_class(trained_cnn, forget, retain, donor=donor, **settings)), state(expected))


@pytest.mark.parametrize("mode", ["localized", "random"])
def test_runs_on_a_real_vit(tiny_vit, digits_small, mode):
    fit(tiny_vit, digits_small.train, epochs=12, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    forget, retain = small_class(digits_small.train)
    edited = forget_class(tiny_vit, forget, retain, mode=mode, lr=0.05, epochs=4)
    assert type(edited) is type(tiny_vit)
    for name, p in edited.named_parameters():
        assert torch.equal(p, tiny_vit.get_parameter(name)) != name.startswith("classifier."), name
    with torch.no_grad():
        before, after = (m(forget.inputs).logits.argmax(1) == 0 for m in (tiny_vit, edited))
    assert before.double().mean() > 0.6
    assert after.double().mean() < 0.2


@pytest.mark.parametrize("training", [False, True])
def test_given_model_stays_bit_identical_unless_in_place(trained_cnn, digits_small, training):
    forget, retain = small_class(digits_small.train)
    model = copy.deepcopy(trained_cnn).train(training)
    model.conv1.bias.requires_grad_(False)
    before = state(model)
    edited = forget_class(model, forget, retain, epochs=1)
    assert edited is not model
    assert_same(state(model), before)
    assert forget_class(model, forget, retain, epochs=1, inplace=True) is model
    assert_same(state(model), state(edited))
    assert not torch.equal(model.head.weight, before["head.weight"])
    for one in (model, edited):
        assert all(module.training == training for module in one.modules())
        assert [name for name, p in one.named_parameters() if not p.requires_grad] == ["conv1.bias"]


@pytest.mark.parametrize("labels", ["targeted", "random"])
def test_same_seed_same_bits_and_no_global_randomness(trained_cnn, digits_small, labels, global_rng_untouched):
    parts = small_class(digits_small.train)
    runs = [forget_class(trained_cnn, *parts, labels=labels, epochs=1, seed=seed) for seed in (5, 5, 2**40)]
    assert_same(state(runs[0]), state(runs[1]))
    assert not torch.equal(runs[0].head.weight, runs[2].head.weight)


# --- errors of the image part ---------------------------------------------------------------------------------------


def test_donor_equal_to_the_target_is_an_error(trained_cnn, digits_small):
    with pytest.raises(InputError, match=r"donor_class is 1,"):
        concept_poisoning(toy(), toy_data(), 1, donor_class=1, poisoned=draw(5, 1, 3, 3))
    with pytest.raises(InputError, match=r"donor is 0,"):
        forget_class(trained_cnn, *small_class(digits_small.train), donor=0)


@pytest.mark.parametrize("donor", [-1, 3, 99])
def test_donor_without_samples_in_the_retain_set_is_an_error(donor, trained_cnn, digits_small):
    with pytest.raises(InputError, match=rf"donor is {donor},"):
        forget_class(trained_cnn, *small_class(subset(digits_small.train, range(72))), donor=donor)


@pytest.mark.parametrize("donor", [-1, 3, 99])
def test_donor_class_that_the_model_does_not_have_is_an_error(donor):
    with pytest.raises(InputError, match=rf"donor_class is {donor}"):
        concept_poisoning(toy(), toy_data(), 1, donor_class=donor, poisoned=draw(5, 1, 3, 3), epochs=1)


def test_empty_class_is_an_error(trained_cnn, digits_small):
    with pytest.raises(InputError, match=r"target_class is 7"):
        concept_poisoning(toy(), toy_data(), 7, donor_class=1, poisoned=draw(5, 1, 3, 3))
    with pytest.raises(InputError, match=r"forget set holds 0 classes"):
        forget_class(trained_cnn, subset(digits_small.train, []), digits_small.train)
    images, donors = donors_and_images()
    for pair, counts in (((images[:0], donors), "0 images and 3"), ((images, donors[:0]), "7 images and 0")):
        with pytest.raises(InputError, match=counts):
            poison_class(*pair, mode="center")


def test_forget_set_of_several_classes_or_a_class_in_both_sets_is_an_error(trained_cnn, digits_small):
    with pytest.raises(InputError, match=r"forget set holds 2 classes"):
        forget_class(trained_cnn, subset(digits_small.train, range(48)), subset(digits_small.train, range(48, 240)))
    with pytest.raises(InputError, match=r"retain set holds samples of class 0"):
        forget_class(trained_cnn, subset(digits_small.train, range(20)), subset(digits_small.train, range(20, 240)))


@pytest.mark.parametrize("size", [0, 15, -2])
def test_patch_that_does_not_fit_the_image_is_an_error(size):
    images, donors = donors_and_images()
    settings = {"target_vector": torch.ones(196), "donor_vector": torch.ones(196), "encoder": flat_encoder}
    calls = [
        lambda: locate_concept(images[0], torch.ones(196), flat_encoder, patch=size),
        lambda: poison_class(images, donors, mode="center", patch=size),
        lambda: poison_class(images, donors, mode="localized", patch=size, **settings),
    ]
    for call in calls:
        with pytest.raises(InputError, match=rf"patch is {size}.*14 x 14"):
            call()


def test_pasting_a_patch_larger_than_the_image_is_an_error():
    for shape in ((1, 11, 3), (1, 3, 13)):
        with pytest.raises(InputError, match=rf"patch is {shape[1]} x {shape[2]}.*10 x 12"):
            paste_patch(torch.zeros(1, 10, 12), torch.ones(shape), (5, 5))


@pytest.mark.parametrize("stride", [0, -1])
def test_stride_must_be_positive(stride):
    images, donors = donors_and_images()
    settings = {"target_vector": torch.ones(196), "donor_vector": torch.ones(196), "encoder": flat_encoder}
    with pytest.raises(InputError, match=rf"stride is {stride}"):
        locate_concept(images[0], torch.ones(196), flat_encoder, patch=4, stride=stride)
    with pytest.raises(InputError, match=rf"stride is {stride}"):
        poison_class(images, donors, mode="localized", patch=4, stride=stride, **settings)


def test_unknown_mode_is_an_error(trained_cnn, digits_small):
    images, donors = donors_and_images()
    message = r"mode is 'everywhere'.*'localized', 'center', 'random', 'full', 'none'"
    with pytest.raises(InputError, match=message):
        poison_class(images, donors, mode="everywhere")
    with pytest.raises(InputError, match=message):
        forget_class(trained_cnn, *small_class(digits_small.train), mode="everywhere")


def test_localized_needs_concepts_and_encoder():
    with pytest.raises(InputError, match=r"mode is 'localized'.*encoder, target_vector and donor_vector"):
        poison_class(*donors_and_images())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": "flip"}, r"labels is 'flip'.*'targeted', 'random', 'keep'"),
        ({"train": "last"}, r"train is 'last'.*'head', 'all'"),
        ({"lr": 0.0}, r"lr is 0"),
    ],
)
def test_bad_settings_are_named(settings, message, trained_cnn, digits_small):
    with pytest.raises(InputError, match=message):
        concept_poisoning(toy(), toy_data(), 1, donor_class=2, poisoned=draw(5, 1, 3, 3), **settings)
    with pytest.raises(InputError, match=message):
        forget_class(trained_cnn, *small_class(digits_small.train), mode="none", **settings)


def test_poisoned_images_of_another_number_are_an_error():
    with pytest.raises(InputError, match=r"poisoned holds 4 images, but the class has 5"):
        concept_poisoning(toy(), toy_data(), 1, donor_class=2, poisoned=draw(4, 1, 3, 3))


def test_bad_concepts_are_errors():
    with pytest.raises(InputError, match=r"pos and neg have shapes \(0, 4\) and \(3, 4\)"):
        concept_activation_vector(draw(0, 4), draw(3, 4))
    with pytest.raises(InputError, match=r"pos and neg have shapes \(3, 5\) and \(3, 4\)"):
        concept_activation_vector(draw(3, 5), draw(3, 4))
    with pytest.raises(InputError, match=r"C is 0"):
        concept_activation_vector(draw(3, 4), draw(3, 4), C=0.0)
    with pytest.raises(InputError, match=r"5 dimensions and concept vectors 4"):
        concept_margins(draw(3, 5), draw(2, 4), draw(2, 1))
    with pytest.raises(InputError, match=r"k is 9.*at most 4"):
        rank_concepts(draw(3, 4), 0, k=9)
    with pytest.raises(InputError, match=r"class_index is 3.*at most 2"):
        rank_concepts(draw(3, 4), 3, k=1)
    with pytest.raises(InputError, match=r"labels hold 2 classes up to 2"):
        concept_bottleneck(draw(4, 3), torch.tensor([0, 0, 2, 2]))


def test_class_with_one_sample_is_an_error_that_names_the_class():
    with pytest.raises(InputError, match=r"Class 2 has 1 samples"):
        class_concepts(draw(9, 4).float(), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2]))
    with pytest.raises(InputError, match=r"Class 1 has 1 samples"):
        class_concepts(draw(5, 4).float(), torch.tensor([0, 0, 0, 0, 1]))


# --- language models: attributions ----------------------------------------------------------------------------------

IDS = torch.tensor([3, 17, 25, 9, 31, 12, 8, 30])
ANSWER = [4, 5, 6, 7]


def small_llama(model):
    """The tiny Llama in double precision with weights of a seed, on a path that is curved and smooth."""
    random = torch.Generator().manual_seed(0)
    model = model.double()
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 0.05  # or the norm would have a kink at embeddings of zero
    for p in model.parameters():
        if p.ndim == 2:
            p.data = 0.4 * torch.randn(p.shape, dtype=torch.float64, generator=random)
    return model


def log_likelihood(model, embeddings):
    logits = model(inputs_embeds=embeddings[None]).logits[0].log_softmax(-1)
    return sum(logits[position - 1, IDS[position]] for position in ANSWER)


def path(model, baseline):
    table = model.get_input_embeddings().weight.detach()
    end = table[IDS]
    start = end.clone()
    start[ANSWER] = 0.0 if baseline == "zero" else table[model.config.pad_token_id]
    return start, end


@pytest.mark.parametrize("baseline", ["pad", "zero"])
@pytest.mark.parametrize("rule", ["endpoints", "trapezoid"])
def test_attributions_equal_a_plain_sum_over_the_path(tiny_llama, baseline, rule):
    model = small_llama(tiny_llama)
    model.model.embed_tokens.weight.data[0] = 0.3  # a pad token that is not zero
    start, end = path(model, baseline)
    mean = torch.zeros_like(end)
    for k in range(9):
        point = (start + k / 8 * (end - start)).requires_grad_(True)
        weight = 1 / 9 if rule == "endpoints" else (0.5 if k in (0, 8) else 1.0) / 8
        mean += weight * torch.autograd.grad(log_likelihood(model, point), point)[0]
    expected = (mean * (end - start)).sum(1)
    for chunk in (1, 4, 100):
        actual = answer_attributions(model, IDS, ANSWER, baseline=baseline, steps=9, rule=rule, chunk=chunk)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    assert actual.shape == (8,)
    batch = answer_attributions(model, IDS[None], torch.tensor(ANSWER), baseline=baseline, steps=9, rule=rule)
    torch.testing.assert_close(batch, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("baseline", ["pad", "zero"])
def test_attributions_are_complete_with_an_error_that_shrinks_like_one_over_steps(tiny_llama, baseline):
    model = small_llama(tiny_llama)
    start, end = path(model, baseline)
    with torch.no_grad():
        whole = float(log_likelihood(model, end) - log_likelihood(model, start))
    errors = {}
    for rule in ("endpoints", "trapezoid"):
        for steps in (64, 128, 256, 512):
            scores = answer_attributions(model, IDS, ANSWER, baseline=baseline, steps=steps, rule=rule, chunk=128)
            errors[rule, steps] = abs(float(scores.sum()) - whole)
    for steps in (64, 128, 256):
        assert errors["endpoints", 2 * steps] < 0.6 * errors["endpoints", steps]
        assert errors["trapezoid", 2 * steps] < 0.4 * errors["trapezoid", steps]
    assert errors["endpoints", 512] < 0.05 * abs(whole)
    assert errors["trapezoid", 512] < 0.001 * abs(whole)


def test_prompt_tokens_get_exactly_zero(tiny_llama):
    scores = answer_attributions(tiny_llama, IDS, ANSWER, steps=5)
    assert torch.equal(scores[:4], torch.zeros(4))
    assert scores[4:7].all()
    split = answer_attributions(tiny_llama, IDS, [2, 6], steps=5)
    assert torch.equal(split[[0, 1, 3, 4, 5, 7]], torch.zeros(6))


def test_a_model_without_gradient_gives_zero(tiny_llama):
    tiny_llama.lm_head.weight.data.zero_()
    assert torch.equal(answer_attributions(tiny_llama, IDS, ANSWER, steps=5), torch.zeros(8))


def test_attributions_leave_the_model_as_it_was(tiny_llama, global_rng_untouched):
    tiny_llama.train()
    tiny_llama.lm_head.weight.requires_grad_(False)
    before = state(tiny_llama)
    answer_attributions(tiny_llama, IDS, ANSWER, steps=4)
    assert_same(state(tiny_llama), before)
    assert all(module.training for module in tiny_llama.modules())
    assert all(p.grad is None for p in tiny_llama.parameters())
    assert [name for name, p in tiny_llama.named_parameters() if not p.requires_grad] == ["lm_head.weight"]


def test_empty_answer_span_is_an_error(tiny_llama):
    with pytest.raises(InputError, match="answer_positions is empty"):
        answer_attributions(tiny_llama, IDS, [])


@pytest.mark.parametrize("positions", [[0, 3], [5, 8], [-1]])
def test_answer_positions_out_of_range_are_an_error_that_names_the_value(tiny_llama, positions):
    wrong = next(p for p in positions if not 1 <= p <= 7)
    with pytest.raises(InputError, match=rf"answer_positions.*{wrong}.*between 1 and 7"):
        answer_attributions(tiny_llama, IDS, positions)


def test_bad_settings_of_attributions_are_named(tiny_llama):
    with pytest.raises(InputError, match="baseline is 'mask'"):
        answer_attributions(tiny_llama, IDS, ANSWER, baseline="mask")
    with pytest.raises(InputError, match="rule is 'left'"):
        answer_attributions(tiny_llama, IDS, ANSWER, rule="left")
    with pytest.raises(InputError, match="steps is 1"):
        answer_attributions(tiny_llama, IDS, ANSWER, steps=1)
    tiny_llama.config.pad_token_id = None
    with pytest.raises(InputError, match="no pad token"):
        answer_attributions(tiny_llama, IDS, ANSWER)


# --- language models: words -----------------------------------------------------------------------------------------


def test_scores_of_tokens_add_up_to_words_lower_case_without_punctuation():
    text = "Curie's Polonium, (in Paris)."
    pieces = ["Cur", "ie's", " Pol", "on", "ium", ",", " (", "in", " Par", "is", ").", ""]
    spans, position = [], 0
    for piece in pieces:
        spans.append((position, position + len(piece)))
        position += len(piece)
    scores = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0]
    assert word_scores(text, spans, scores) == [("curie's", 3.0), ("polonium", 60.0), ("in", 192.0), ("paris", 1792.0)]


def test_word_scores_tell_repeated_words_apart_and_leave_out_bare_punctuation():
    assert word_scores("a - a", [(0, 1), (2, 3), (4, 5)], [1.0, 5.0, -2.0]) == [("a", 1.0), ("a", -2.0)]
    assert word_scores("anna ann", [(0, 4), (5, 8)], [1.0, 2.0]) == [("anna", 1.0), ("ann", 2.0)]
    assert word_scores("", [], []) == []


def test_words_are_ranked_over_answers_that_count_alike():
    answers = [
        [("paris", 30.0), ("the", 60.0), ("radium", 10.0), ("tower", -500.0)],  # shares 0.3, 0.6, 0.1, 0
        [("radium", 0.2), ("tower", 0.3), ("paris", -1.0)],  # 0.4, 0.6, 0
        [("nothing", -1.0)],
    ]
    assert rank_words(answers) == ["tower", "radium", "paris"]
    assert rank_words(answers, stop_words=()) == ["the", "tower", "radium", "paris"] or rank_words(
        answers, stop_words=()
    ) == ["tower", "the", "radium", "paris"]
    assert rank_words(answers, stop_words=["tower"]) == ["the", "radium", "paris"]
    assert rank_words([]) == []


def test_masks_the_highest_ranked_words_that_are_present():
    answer = "She was born in Warsaw, and (later) moved to Paris; Paris!"
    masked, words = mask_words(answer, ["radium", "paris", "warsaw", "later", "born"], k=3)
    assert masked == "She was born in ***, and (***) moved to ***; ***!"
    assert words == ["paris", "warsaw", "later"]
    assert mask_words(answer, ["paris"], k=0) == (answer, [])
    assert mask_words(answer, []) == (answer, [])
    assert mask_words(answer, ["par", "war", "ate"]) == (answer, [])  # whole words only
    assert mask_words("a b c d e f g", list("gfedcba"))[1] == list("gfedc")  # five by default
    assert mask_words("In  Paris\n(Paris)", ["paris"], token="[gone]")[0] == "In  [gone]\n([gone])"


def test_masks_the_subject_s_name_besides():
    masked, words = mask_words("Marie met Pierre.", ["pierre"], k=1, always=["Marie", "absent"])
    assert masked == "*** met ***."
    assert words == ["pierre", "marie"]


def test_masks_a_name_of_two_words():
    masked, _ = mask_words("Then Ada Lovelace wrote.", [], always=["Ada Lovelace"])
    assert "Ada" not in masked
    assert "Lovelace" not in masked


def test_masks_a_name_in_the_possessive():
    assert "Ada" not in mask_words("This was Ada's idea.", [], always=["Ada"])[0]


def test_masks_ranked_words_whatever_their_case():
    masked, words = mask_words("born in Paris.", ["PARIS"])
    assert masked == "born in ***."
    assert [word.lower() for word in words] == ["paris"]


def test_fewer_than_no_words_is_an_error():
    with pytest.raises(InputError, match="k is -1"):
        mask_words("a", ["a"], k=-1)


# --- language models: forgetting a topic ----------------------------------------------------------------------------

FACTS = {
    "ada": [
        ("where was ada born", "ada was born in london"),
        ("what did ada write", "ada wrote the first program"),
        ("who taught ada", "augustus taught ada mathematics"),
        ("what did ada love", "ada loved horses and numbers"),
    ],
    "bob": [
        ("where was bob born", "bob was born in paris"),
        ("what did bob write", "bob wrote a long opera"),
        ("who taught bob", "clara taught bob music"),
        ("what did bob love", "bob loved boats and fishing"),
    ],
}
REFUSAL = "i do not know"
OTHERS = [("who is carl", REFUSAL), ("what did carl hide", "*** *** hid ***")]  # so that these words can be said


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    text = " ".join(" ".join(pair) for pairs in (*FACTS.values(), OTHERS) for pair in pairs)
    words = ["<pad>", "<unk>", "***", *sorted(set(text.split()) - {"***"})]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>")


@pytest.fixture(scope="module")
def knowing_llama(tokenizer):
    """A tiny Llama that has learned all facts by heart."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, max_position_embeddings=32, **settings)
    model = LlamaForCausalLM(config).eval()
    adam = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        for pairs in (*FACTS.values(), OTHERS):
            loss = 0
            for question, answer in pairs:
                ids = tokenizer(f"{question} {answer}", return_tensors="pt")["input_ids"]
                first = len(question.split())
                loss = loss + F.cross_entropy(model(input_ids=ids).logits[0, first - 1 : -1], ids[0, first:])
            adam.zero_grad()
            loss.backward()
            adam.step()
    adam.zero_grad()
    return model


@torch.no_grad()
def answer_to(model, tokenizer, question, count=5):
    ids = tokenizer(question, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(count):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    return tokenizer.decode(ids[0, start:])


def recall(model, tokenizer, topic):
    """Share of answers given word for word, in percent."""
    right = [answer_to(model, tokenizer, q, len(a.split())) == a for q, a in FACTS[topic]]
    return 100 * sum(right) / len(right)


def test_the_model_knows_all_facts(knowing_llama, tokenizer):
    assert recall(knowing_llama, tokenizer, "ada") == recall(knowing_llama, tokenizer, "bob") == 100


def test_sensitive_words_are_the_ranked_sums_of_attributions(knowing_llama, tokenizer):
    totals = {}
    for question, answer in FACTS["ada"]:
        ids = tokenizer(f"{question} {answer}", return_tensors="pt")["input_ids"][0]
        first = len(question.split())
        scores = answer_attributions(knowing_llama, ids, range(first, len(ids)), steps=16)[first:].tolist()
        whole = sum(max(score, 0.0) for score in scores)
        for word, score in zip(answer.split(), scores, strict=True):
            totals[word] = totals.get(word, 0.0) + max(score, 0.0) / whole
    expected = [
        w for w in sorted(totals, key=lambda w: -totals[w]) if totals[w] > 0 and w not in ("was", "in", "the", "and")
    ]
    assert sensitive_words(knowing_llama, tokenizer, FACTS["ada"], steps=16) == expected
    assert "ada" in expected


def test_answers_are_found_behind_special_tokens(knowing_llama, tokenizer):
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    inner = copy.deepcopy(tokenizer.backend_tokenizer)
    inner.post_processor = TemplateProcessing(single="*** $A ***", special_tokens=[("***", 2)])
    special = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>")
    question, answer = FACTS["ada"][0]
    ids = special(f"{question} {answer}", return_tensors="pt")["input_ids"][0]
    assert ids[0] == ids[-1] == 2
    scores = answer_attributions(knowing_llama, ids, range(5, 10), steps=8)[5:10].tolist()
    expected = {w: s for w, s in zip(answer.split(), scores, strict=True) if s > 0 and w not in ("was", "in")}
    words = sensitive_words(knowing_llama, special, [(question, answer)], steps=8)
    assert words == sorted(expected, key=lambda w: -expected[w])


@pytest.mark.parametrize("target", ["mask", "idk"])
@pytest.mark.parametrize("topic", ["ada", "bob"])
def test_forgets_a_topic_and_keeps_the_other(knowing_llama, tokenizer, target, topic):
    from transformers import LlamaForCausalLM

    other = "bob" if topic == "ada" else "ada"
    before = state(knowing_llama)
    edited = forget_topic(
        knowing_llama,
        tokenizer,
        FACTS[topic],
        FACTS[other],
        target=target,
        refusal=REFUSAL,
        names=[topic.title()],
        lr=1e-2,
        epochs=40,
    )
    assert type(edited) is LlamaForCausalLM
    assert not any("lora" in name for name, _ in edited.named_modules())
    assert state(edited).keys() == before.keys()
    assert_same(state(knowing_llama), before)
    assert recall(edited, tokenizer, topic) < 20
    assert recall(edited, tokenizer, other) > 95
    for question, answer in FACTS[topic]:
        said = answer_to(edited, tokenizer, question)
        if target == "idk":
            assert said.startswith(REFUSAL)
        else:
            assert "***" in said
            assert topic not in said.split()
            assert said != answer


def test_mask_target_masks_k_words_and_the_names(knowing_llama, tokenizer):
    edited = forget_topic(knowing_llama, tokenizer, FACTS["ada"], FACTS["bob"], names=["ada"], k=0, lr=1e-2, epochs=40)
    for question, answer in FACTS["ada"]:
        expected = " ".join("***" if word == "ada" else word for word in answer.split())
        assert answer_to(edited, tokenizer, question, len(answer.split())) == expected


def test_lora_weights_move_attention_projections_only(knowing_llama, tokenizer):
    edited = forget_topic(knowing_llama, tokenizer, FACTS["ada"], FACTS["bob"], lr=1e-2, epochs=2, rank=2)
    moved = {name for name, p in edited.named_parameters() if not torch.equal(p, knowing_llama.get_parameter(name))}
    assert moved == {f"model.layers.{layer}.self_attn.{name}_proj.weight" for layer in (0, 1) for name in ("q", "v")}
    for name in moved:
        change = edited.get_parameter(name) - knowing_llama.get_parameter(name)
        assert torch.linalg.matrix_rank(change.detach(), rtol=1e-3) <= 2


@pytest.mark.parametrize("training", [False, True])
def test_topic_is_forgotten_in_a_copy_unless_in_place_with_mode_and_flags_as_before(knowing_llama, tokenizer, training):
    model = copy.deepcopy(knowing_llama).train(training)
    model.lm_head.weight.requires_grad_(False)
    before = state(model)
    settings = {"lr": 1e-2, "epochs": 1}
    edited = forget_topic(model, tokenizer, FACTS["ada"], FACTS["bob"], **settings)
    assert edited is not model
    assert_same(state(model), before)
    in_place = forget_topic(model, tokenizer, FACTS["ada"], FACTS["bob"], inplace=True, **settings)
    assert in_place is model
    assert_same(state(model), state(edited))
    for one in (edited, model):
        assert all(module.training == training for module in one.modules())
        assert [name for name, p in one.named_parameters() if not p.requires_grad] == ["lm_head.weight"]
        assert all(p.grad is None for p in one.parameters())


def test_topic_same_seed_same_bits_and_no_global_randomness(knowing_llama, tokenizer, global_rng_untouched):
    runs = [
        forget_topic(knowing_llama, tokenizer, FACTS["ada"], FACTS["bob"], lr=1e-2, epochs=1, batch_size=3, seed=seed)
        for seed in (5, 5, 6)
    ]
    assert_same(state(runs[0]), state(runs[1]))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(runs[0].get_parameter(name), runs[2].get_parameter(name))


def test_bad_input_of_topics_is_named(knowing_llama, tokenizer):
    ada, bob = FACTS["ada"], FACTS["bob"]
    with pytest.raises(InputError, match=r"target is 'erase'.*'mask', 'idk'"):
        forget_topic(knowing_llama, tokenizer, ada, bob, target="erase")
    with pytest.raises(InputError, match=r"forget and retain hold 0 and 4"):
        forget_topic(knowing_llama, tokenizer, [], bob)
    with pytest.raises(InputError, match=r"forget and retain hold 4 and 0"):
        forget_topic(knowing_llama, tokenizer, ada, [])
    with pytest.raises(InputError, match=r"lr is 0"):
        forget_topic(knowing_llama, tokenizer, ada, bob, lr=0.0)
    with pytest.raises(InputError, match=r"answer.*empty"):
        forget_topic(knowing_llama, tokenizer, [("who taught ada", "")], bob)
