"""PCoreSet: greedy k-center against brute force, two heads and what trains them, and rounds that ask for few labels."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from retouch.core.data import TensorData
from retouch.core.distillation import softened_kl
from retouch.core.errors import InputError
from retouch.core.loop import Checkpoint, fit
from retouch.core.models import logits_of
from retouch.distill.pcoreset import (
    STRATEGIES,
    ActiveKD,
    ClapTeacher,
    DualHeadKD,
    DualHeadStudent,
    PoolOutputs,
    ZeroShotTeacher,
    activekd_loss,
    combine_heads,
    coreset,
    entropy_ranking,
    k_center_greedy,
    one_per_class,
    pcoreset,
)

DRAW = torch.Generator().manual_seed(0)
DOUBLE = torch.float64


def drawn(*shape, dtype=DOUBLE):
    return torch.randn(*shape, generator=DRAW, dtype=dtype)


def probs(n, k=5, sharp=2.0):
    return (sharp * drawn(n, k)).softmax(-1)


# --- selection ------------------------------------------------------------------------------------------------------


def distances(metric):
    if metric == "euclidean":
        return lambda a, b: (a[:, None] - b).square().sum(-1).sqrt()
    return lambda a, b: 1 - F.cosine_similarity(a[:, None], b, dim=-1)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_every_pick_is_the_farthest_point_from_all_centres(metric):
    pool, centers, between = probs(40), probs(7), distances(metric)
    picks = k_center_greedy(pool, centers, num_queries=12, metric=metric)
    assert picks.tolist() == k_center_greedy(pool, centers, num_queries=12, metric=metric).tolist()
    assert len(picks.unique()) == 12
    gaps = []
    for number, pick in enumerate(picks.tolist()):
        nearest = between(pool, torch.cat([centers, pool[picks[:number]]])).amin(1)
        assert pick == int(nearest.argmax())
        gaps.append(float(nearest.max()))
    assert gaps == sorted(gaps, reverse=True)


def radius(pool, centers):
    return float(distances("euclidean")(pool, centers).amin(1).max())


@pytest.mark.parametrize("seed", range(5))
def test_the_radius_is_at_most_twice_the_best(seed):
    points = torch.rand(10, 2, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    pool, centers = points[:9], points[9:]
    found = radius(pool, torch.cat([centers, pool[k_center_greedy(pool, centers, num_queries=3)]]))
    every = itertools.combinations(range(9), 3)
    best = min(radius(pool, torch.cat([centers, pool[list(chosen)]])) for chosen in every)
    assert best <= found + 1e-12
    assert found <= 2 * best + 1e-12


def test_asking_for_all_gives_each_once_and_copies_of_centres_come_last():
    centers = probs(4)
    pool = torch.cat([centers[:2], probs(6), centers[2:]])
    order = k_center_greedy(pool, centers, num_queries=10)
    assert sorted(order.tolist()) == list(range(10))
    assert set(order[-4:].tolist()) == {0, 1, 8, 9}
    assert order[-4:].tolist() == [0, 1, 8, 9]  # ties go to the lower index
    single = k_center_greedy(pool.float(), centers.float(), num_queries=10)  # exact zeros in single precision too
    assert single.tolist() == order.tolist()


def test_the_order_of_the_pool_and_of_the_centres_does_not_matter():
    pool, centers, order = probs(30), probs(5), torch.randperm(30, generator=DRAW)
    picks = k_center_greedy(pool, centers, num_queries=8)
    assert torch.equal(order[k_center_greedy(pool[order], centers, num_queries=8)], picks)
    assert torch.equal(k_center_greedy(pool, centers.flip(0), num_queries=8), picks)


def test_many_centres_are_gone_through_in_parts():
    pool, centers = probs(30), probs(600)
    nearest = distances("euclidean")(pool, centers).amin(1)
    assert int(k_center_greedy(pool, centers, num_queries=1)) == int(nearest.argmax())


def test_entropy_ranks_in_nats_and_ties_by_index():
    p = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.9, 0.1], [0.5, 0.5], [0.0, 1.0]])
    assert entropy_ranking(p).tolist() == [1, 3, 2, 0, 4]
    p = probs(50)
    entropies = -(p * p.log()).sum(1)[entropy_ranking(p)]
    assert (entropies.diff() <= 0).all()


def outputs(n, start=0):
    draws = torch.Generator().manual_seed(1)
    return PoolOutputs(torch.arange(start, start + n), probs(n), drawn(n, 6), drawn(n, 5), draws)


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategies_give_as_many_as_asked(name):
    pool, labeled = outputs(20), outputs(4, start=20)
    for queries in (1, 7, 20):
        picks = STRATEGIES[name](pool, labeled, queries)
        assert len(picks) == len(picks.unique()) == queries
        assert 0 <= int(picks.min()) <= int(picks.max()) < 20


def test_what_strategies_look_at():
    pool, labeled = outputs(20), outputs(4, start=20)
    assert torch.equal(pcoreset(pool, labeled, 5), k_center_greedy(pool.probs, labeled.probs, num_queries=5))
    found = k_center_greedy(pool.features, labeled.features, num_queries=5, metric="cosine")
    assert torch.equal(coreset(pool, labeled, 5), found)
    sharp = PoolOutputs(pool.ids, pool.probs, 3 * pool.features, pool.teacher_logits)
    assert torch.equal(coreset(sharp, labeled, 5), found)
    one_hot = F.one_hot(torch.arange(4), 5).double()  # labels instead of predictions: other picks
    assert not torch.equal(k_center_greedy(pool.probs, one_hot, num_queries=5), pcoreset(pool, labeled, 5))
    residual = pool.probs - F.one_hot(pool.probs.argmax(1), 5)
    size = residual.norm(dim=1) * pool.features.norm(dim=1)
    assert int(STRATEGIES["badge"](pool, labeled, 1)) == int(size.argmax())
    rare = torch.eye(5, dtype=DOUBLE)[torch.tensor([0] * 19 + [1])]
    hits = 0
    for _ in range(200):
        picks = STRATEGIES["class_balanced"](PoolOutputs(pool.ids, rare, pool.features, rare, DRAW), labeled, 1)
        hits += int(picks == 19)
    assert 70 <= hits <= 130  # half of the draws, not a twentieth


# --- student and loss -----------------------------------------------------------------------------------------------


def test_combined_predictions():
    ce, kd = drawn(7, 5), drawn(7, 5)
    torch.testing.assert_close(combine_heads(ce, kd).sum(1), torch.ones(7, dtype=DOUBLE))
    assert torch.equal(combine_heads(ce, kd, alpha=0.0), ce.softmax(-1))
    torch.testing.assert_close(combine_heads(ce, kd, alpha=1.0, beta=2.0), (kd / 2).softmax(-1))
    expected = 0.7 * ce.softmax(-1) + 0.3 * (kd / 0.5).softmax(-1)
    torch.testing.assert_close(combine_heads(ce, kd, alpha=0.3, beta=0.5), expected)


SIDES = ("ce_logits_l", "kd_logits_l", "labels", "teacher_logits_l", "kd_logits_u", "teacher_logits_u")


def sides():
    values = (drawn(4, 5), drawn(4, 5), torch.tensor([0, 3, 1, 4]), drawn(4, 5), drawn(6, 5), drawn(6, 5))
    given = dict(zip(SIDES, values, strict=True))
    return {n: v.requires_grad_() if v.is_floating_point() else v for n, v in given.items()}


def test_the_loss_is_its_formula():
    given = sides()
    terms = activekd_loss(**given)
    torch.testing.assert_close(terms["ce"], 0.5 * F.cross_entropy(given["ce_logits_l"], given["labels"]))
    for side in "lu":
        p, q = ((given[f"{who}_logits_{side}"] / 2).softmax(-1) for who in ("teacher", "kd"))
        expected = 0.5 * 4 * (p * (p / q).log()).sum() / len(p)
        torch.testing.assert_close(terms[f"kd_{side}"], expected)
    torch.testing.assert_close(terms["total"], terms["ce"] + terms["kd_l"] + terms["kd_u"])
    weighed = activekd_loss(**given, ce_weight=2.0, kd_weight=0.0)
    torch.testing.assert_close(weighed["total"], 4 * terms["ce"])


def test_labels_train_one_head_and_the_teacher_the_other():
    given = sides()
    terms = activekd_loss(**given)
    floats = [name for name in SIDES if name != "labels"]
    values = [given[name] for name in floats]
    by_labels = torch.autograd.grad(terms["ce"], values, allow_unused=True, retain_graph=True)
    assert [name for name, g in zip(floats, by_labels, strict=True) if g is not None] == ["ce_logits_l"]
    by_teacher = torch.autograd.grad(terms["kd_l"] + terms["kd_u"], values, allow_unused=True, retain_graph=True)
    assert [n for n, g in zip(floats, by_teacher, strict=True) if g is not None] == ["kd_logits_l", "kd_logits_u"]
    terms["total"].backward()
    assert given["teacher_logits_l"].grad is None
    assert given["teacher_logits_u"].grad is None


def student(seed=0, width=8):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Dropout(0.5))
        return DualHeadStudent(backbone, width, 10)


def test_the_student_is_a_classifier_of_its_combined_prediction(digits_small):
    model, images = student(), digits_small.test.inputs
    found = model.predict_proba(images)
    assert model.training  # as it was, though dropout was off
    assert torch.equal(found, model.predict_proba(images))
    ce, kd, features = model.eval()(images)
    assert features.shape == (100, 8)
    torch.testing.assert_close(found, combine_heads(ce, kd))
    torch.testing.assert_close(model.predict_proba(images, 0.2, 3.0), combine_heads(ce, kd, alpha=0.2, beta=3.0))
    torch.testing.assert_close(logits_of(model(images)).softmax(-1), found)


def told(data, seed=3):
    logits = torch.randn(len(data), 10, generator=torch.Generator().manual_seed(seed))
    labeled = TensorData(data.inputs[:20], {"labels": data.targets[:20], "teacher": logits[:20]})
    return labeled, TensorData(data.inputs[20:], {"teacher": logits[20:]})


def test_the_objective_draws_labelled_samples_with_replacement(digits_small, global_rng_untouched):
    labeled, rest = told(digits_small.train)
    objective = DualHeadKD(labeled, batch_size=50, temperature=3.0, ce_weight=0.2)
    history = fit(student(), rest, objective, steps=3, batch_size=16)
    assert set(history.records[0]) >= {"ce", "kd_l", "kd_u", "loss"}
    assert history["loss"][0] == pytest.approx(sum(history[name][0] for name in ("ce", "kd_l", "kd_u")))

    class Run:
        generator = torch.Generator().manual_seed(5)

    model, batch = student().eval(), rest[torch.arange(16)]
    rows = torch.randint(20, (50,), generator=torch.Generator().manual_seed(5))
    terms = objective(model, batch, Run)
    mine, theirs = model(labeled.inputs[rows]), model(batch[0])
    expected = 0.2 * F.cross_entropy(mine.ce, labeled.targets["labels"][rows])
    torch.testing.assert_close(terms["ce"], expected)
    torch.testing.assert_close(terms["kd_u"], 0.5 * softened_kl(theirs.kd, batch[1]["teacher"], temperature=3.0))


def test_a_round_that_was_killed_ends_alike(digits_small, tmp_path):
    labeled, rest = told(digits_small.train)
    objective = DualHeadKD(labeled)
    whole, halves = student(), student()
    fit(whole, rest, objective, steps=6)
    settings = {"steps": 6, "checkpoint": Checkpoint(tmp_path, every=1)}

    def broken(model, batch, run):
        if run.step == 3:
            raise KeyboardInterrupt
        return objective(model, batch, run)

    with pytest.raises(KeyboardInterrupt):
        fit(halves, rest, broken, **settings)
    again = student(seed=4)
    fit(again, rest, objective, **settings)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


# --- rounds ---------------------------------------------------------------------------------------------------------


class Oracle:
    def __init__(self, labels):
        self.labels, self.asked = labels, []

    def __call__(self, ids):
        self.asked += ids.tolist()
        return self.labels[ids]


TEACHER = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
with torch.no_grad():
    TEACHER[1].weight.copy_(torch.randn(10, 64, generator=torch.Generator().manual_seed(2)))
    TEACHER[1].bias.zero_()


def active(data, strategy="pcoreset", **changes):
    oracle = Oracle(data.targets)
    initial = changes.pop("initial", one_per_class(data.targets, seed=1))
    settings = {"rounds": 2, "queries": 5, "steps": 4, "initial": initial, **changes}
    return ActiveKD(settings.pop("teacher", TEACHER), student, data.inputs, oracle, strategy, **settings), oracle


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_labels_are_read_of_chosen_samples_alone(strategy, digits_small, global_rng_untouched):
    loop, oracle = active(digits_small.train, strategy)
    first = loop.labeled
    assert sorted(digits_small.train.targets[first].tolist()) == list(range(10))
    found = list(loop)
    assert [one.number for one in found] == [1, 2]
    assert torch.equal(found[0].labeled, first)
    assert torch.equal(found[1].labeled, torch.cat([first, found[0].queried]))
    chosen = torch.cat([first, *(one.queried for one in found)])
    assert oracle.asked == chosen.tolist()  # each once, and no other
    assert len(chosen.unique()) == 20
    assert torch.equal(loop.labeled, chosen)
    assert torch.equal(loop.labels, digits_small.train.targets[chosen])
    assert not found[0].student.training
    again = list(active(digits_small.train, strategy)[0])
    assert all(torch.equal(a.queried, b.queried) for a, b in zip(found, again, strict=True))


def test_labels_that_the_pool_brings_along_are_not_looked_at(digits_small):
    data = digits_small.train
    plain, _ = active(data)
    shuffled = TensorData(data.inputs, data.targets.flip(0))
    other = ActiveKD(
        TEACHER, student, shuffled, Oracle(data.targets), rounds=2, queries=5, steps=4, initial=plain.labeled
    )
    for one, two in zip(plain, other, strict=True):
        assert torch.equal(one.queried, two.queried)


def test_positions_are_mapped_to_ids_and_centres_are_predictions(digits_small):
    seen = []

    def strategy(pool, labeled, queries):
        seen.append((pool, labeled))
        return torch.arange(queries)  # the first ones of the current pool

    loop, _ = active(digits_small.train, strategy)
    for found in loop:
        pool, labeled = seen[-1]
        assert found.queried.tolist() == pool.ids[:5].tolist()
        assert torch.equal(labeled.ids, found.labeled)
        assert not set(pool.ids.tolist()) & set(found.labeled.tolist())
        images = digits_small.train.inputs
        torch.testing.assert_close(labeled.probs, found.student.predict_proba(images[labeled.ids]))
        torch.testing.assert_close(pool.probs, found.student.predict_proba(images[pool.ids]))
        torch.testing.assert_close(pool.teacher_logits, TEACHER(images[pool.ids]).detach())
        covered = torch.cat([labeled.probs, pool.probs[:5]])
        assert found.radius == pytest.approx(radius(pool.probs, covered), rel=1e-4)


def test_each_round_begins_with_a_new_student_and_the_last_labels_train_one_more(digits_small):
    starts = []

    def trainer(model, data, objective, **settings):
        starts.append(([p.detach().clone() for p in model.parameters()], len(data), len(objective.labeled)))
        return fit(model, data, objective, **settings)

    made = []

    def factory():
        made.append(student(seed=len(made)))
        return made[-1]

    data = digits_small.train
    loop = ActiveKD(TEACHER, factory, data.inputs, Oracle(data.targets), rounds=2, queries=5, steps=2, trainer=trainer)
    rounds = list(loop)
    final = loop.train()
    assert [one.student for one in rounds] + [final] == made
    assert [counts[1:] for counts in starts] == [(230, 10), (225, 15), (220, 20)]


def test_rounds_go_on_where_they_were(digits_small):
    whole = list(active(digits_small.train, "random", rounds=3)[0])
    loop, _ = active(digits_small.train, "random", rounds=3)
    next(iter(loop))
    state = loop.state_dict()
    other, oracle = active(digits_small.train, "random", rounds=3)
    other.load_state_dict(state)
    oracle.asked.clear()
    rest = list(other)
    assert [one.number for one in rest] == [2, 3]
    assert all(torch.equal(a.queried, b.queried) for a, b in zip(whole[1:], rest, strict=True))
    assert len(oracle.asked) == 10
    for a, b in zip(whole[2].student.parameters(), rest[1].student.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_pool_that_is_used_up(digits_small):
    data = TensorData(digits_small.train.inputs[:20], digits_small.train.targets[:20])
    loop, oracle = active(data, initial=torch.arange(10))
    assert len(list(loop)) == 2
    assert sorted(oracle.asked) == list(range(20))
    assert loop.train().predict_proba(data.inputs).shape == (20, 10)


def test_defaults_ask_for_as_many_as_there_are_classes(digits_small):
    loop, oracle = active(digits_small.train, initial=None, queries=None, rounds=1)
    assert len(oracle.asked) == 10
    assert len(next(iter(loop)).queried) == 10


# --- CLIP -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip():
    from transformers import CLIPConfig, CLIPModel

    shared = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    text = {"vocab_size": 30, "max_position_embeddings": 6, "eos_token_id": 1, "bos_token_id": 2, "pad_token_id": 0}
    vision = {"image_size": 8, "patch_size": 4, "num_channels": 1}
    config = CLIPConfig(text_config={**text, **shared}, vision_config={**vision, **shared}, projection_dim=12)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CLIPModel(config).eval()


def prompts(classes=10, ways=2):
    rows = [[[2, 10 + way, 15 + c, 1] for way in range(ways)] for c in range(classes)]
    return [{"input_ids": torch.tensor(each), "attention_mask": torch.ones(ways, 4).long()} for each in rows]


def test_zero_shot_logits_are_scaled_cosines_with_the_mean_of_prompts(clip, digits_small):
    images = digits_small.test.inputs[:6]
    single = ZeroShotTeacher(clip, prompts(ways=1))
    texts = torch.cat([each["input_ids"] for each in prompts(ways=1)])
    expected = clip(pixel_values=images, input_ids=texts).logits_per_image
    torch.testing.assert_close(single(images), expected, rtol=1e-4, atol=1e-5)
    pair = ZeroShotTeacher(clip, prompts(), logit_scale=100.0)
    assert float(pair(images).detach().abs().max()) <= 100.001
    embeds = torch.stack([F.normalize(clip.get_text_features(**p).pooler_output, dim=1).mean(0) for p in prompts()])
    torch.testing.assert_close(pair.weights, F.normalize(embeds, dim=1))
    assert not single(images).requires_grad
    assert not any(p.requires_grad for p in pair.parameters())


def test_a_clip_teaches_in_rounds(clip, digits_small):
    before = [p.detach().clone() for p in clip.parameters()]
    loop, _ = active(digits_small.train, teacher=ZeroShotTeacher(clip, prompts(), logit_scale=20.0))
    assert len(list(loop)) == 2
    assert all(torch.equal(a, b) for a, b in zip(clip.parameters(), before, strict=True))


def test_the_few_shot_teacher_follows_labels_and_holds_on_to_texts(clip, digits_small, global_rng_untouched):
    teacher = ClapTeacher(clip, prompts(), logit_scale=20.0)
    zero = ZeroShotTeacher(clip, prompts(), logit_scale=20.0)
    images, labels = digits_small.train[torch.arange(0, 240, 4)]  # six of each class
    torch.testing.assert_close(teacher(images), zero(images))
    texts = teacher.weights.clone()
    teacher.adapt(images, labels)
    fewer = F.cross_entropy(teacher(images), labels)
    assert fewer < F.cross_entropy(zero(images), labels)
    first = teacher.weights.clone()
    teacher.adapt(images, labels)  # from the texts again, not from where it was
    assert torch.equal(teacher.weights, first)
    teacher.adapt(images[labels < 5], labels[labels < 5])
    moved = (teacher.weights - texts).norm(dim=1)
    assert moved[:5].mean() > 3 * moved[5:].mean()  # classes without samples are held
    loop, _ = active(digits_small.train, teacher=teacher)
    logits = loop.teacher_logits
    list(loop)
    assert not torch.equal(loop.teacher_logits, logits)


def test_a_resnet_is_a_backbone(digits_small):
    from transformers import ResNetConfig, ResNetModel

    shape = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DualHeadStudent(ResNetModel(ResNetConfig(num_channels=1, **shape)), 8, 10)
    labeled, rest = told(digits_small.train)
    assert len(fit(model, rest, DualHeadKD(labeled), steps=2)) == 2
    assert model.predict_proba(digits_small.test.inputs).shape == (100, 10)


def test_a_plain_function_can_teach(digits_small):
    loop, _ = active(digits_small.train, teacher=lambda images: images.flatten(1)[:, 20:30])
    assert torch.equal(loop.teacher_logits, digits_small.train.inputs.flatten(1)[:, 20:30])


# --- bad input ------------------------------------------------------------------------------------------------------

NAN = torch.full((3, 5), float("nan"))
POOL, CENTERS, IMAGES = probs(6), probs(2), torch.zeros(12, 1, 8, 8)


def loop_of(**changes):
    data = TensorData(IMAGES, torch.zeros(12).long())
    return active(data, **{"initial": torch.arange(2), **changes})[0]


BAD = {
    "too many": (lambda: k_center_greedy(POOL, CENTERS, num_queries=7), "num_queries is 7, but must be at least 1 and"),
    "none": (lambda: k_center_greedy(POOL, CENTERS, num_queries=0), "num_queries is 0, but must be"),
    "no centres": (lambda: k_center_greedy(POOL, POOL[:0], num_queries=1), "centers is empty, but must hold"),
    "nan": (lambda: k_center_greedy(NAN.double(), CENTERS, num_queries=1), "pool holds values that are not finite"),
    "nan centres": (lambda: k_center_greedy(POOL, NAN, num_queries=1), "centers holds values that are not finite"),
    "width": (lambda: k_center_greedy(POOL, CENTERS[:, :3], num_queries=1), r"pool has shape \(6, 5\) and centers"),
    "metric": (lambda: k_center_greedy(POOL, CENTERS, num_queries=1, metric="l1"), "metric is 'l1', but must be one"),
    "entropy": (lambda: entropy_ranking(NAN), "but must be finite probabilities"),
    "alpha": (lambda: combine_heads(POOL, POOL, alpha=1.1), r"alpha is 1\.1, but must be at least 0 and at most 1"),
    "beta": (lambda: combine_heads(POOL, POOL, beta=0), "beta is 0, but must be greater than 0"),
    "heads": (lambda: combine_heads(POOL, POOL[:, :4]), "ce_logits have shape"),
    "temperature": (lambda: activekd_loss(**sides(), temperature=0), "temperature is 0, but must be greater than 0"),
    "weight": (lambda: activekd_loss(**sides(), ce_weight=-1), "ce_weight is -1, but must be at least 0"),
    "classes": (
        lambda: activekd_loss(**{**sides(), "teacher_logits_u": drawn(6, 4)}),
        "The student tells 5 classes apart and the teacher 4",
    ),
    "strategy": (lambda: loop_of(strategy="best"), "strategy is 'best', but must be one of 'pcoreset'"),
    "rounds": (lambda: loop_of(rounds=0), "rounds is 0, but must be greater than 0"),
    "budget": (
        lambda: loop_of(queries=6),
        "rounds is 2 and queries 6, but with 2 labelled at the start all must be at",
    ),
    "initial": (
        lambda: loop_of(initial=torch.tensor([1, 1])),
        "initial must hold ids from 0 to 11, none of them twice",
    ),
    "outside": (lambda: loop_of(initial=torch.tensor([1, 12])), "initial must hold ids from 0 to 11"),
    "empty": (lambda: loop_of(initial=[]), "initial is empty, but must have at least one id"),
    "picks": (
        lambda: next(iter(loop_of(strategy=lambda pool, labeled, queries: torch.zeros(5)))),
        "The strategy must give 5 positions in the pool of 10, none twice",
    ),
    "range": (
        lambda: next(iter(loop_of(strategy=lambda pool, labeled, queries: 8 + torch.arange(5)))),
        "The strategy must give 5 positions",
    ),
    "oracle": (
        lambda: ActiveKD(TEACHER, student, IMAGES, lambda ids: torch.zeros(1), rounds=1, queries=1),
        "The oracle gave",
    ),
    "prompts": (lambda: ZeroShotTeacher(TEACHER, []), "prompts is empty, but must hold those of every class"),
    "backbone": (
        lambda: DualHeadStudent(nn.Flatten(), 8, 10)(torch.zeros(2, 1, 8, 8)),
        r"The backbone gives \(2, 64\), but must give features \(batch, 8\)",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_refused(kind):
    call, message = BAD[kind]
    with torch.random.fork_rng(), pytest.raises(InputError, match=message):
        call()
