"""LOOK: votes as scikit-learn takes them, gradients in closed form, oneself left out, memories that resume."""

import copy
import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from retouch.core.batches import in_order
from retouch.core.data import TensorData, indexed, labels_of
from retouch.core.errors import InputError
from retouch.core.features import layer_of
from retouch.core.loop import Checkpoint, fit
from retouch.core.metrics.unlearning import accuracy
from retouch.core.models import head_of, predict
from retouch.core.seeds import isolated
from retouch.train.look import (
    LOOK,
    Embedder,
    LOOKLoss,
    MemoryBank,
    MomentumQueue,
    features_of_data,
    fit_head,
    k_schedule,
    knn_predict,
    leave_one_out_knn_probabilities,
    look_loss,
    nearest_neighbours,
    recipe,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=seeded(seed), dtype=torch.float64), dim=-1)


N, E, K, T = 30, 5, 7, 0.3
MEMORY, QUERIES = unit(N, E), unit(6, E, seed=1)
MEMORY_LABELS, LABELS = torch.arange(N) % 3, torch.tensor([0, 1, 2, 0, 1, 2])


def loss(queries=QUERIES, labels=LABELS, memory=MEMORY, memory_labels=MEMORY_LABELS, **options):
    return look_loss(queries, labels, memory, memory_labels, **{"k": K, "temperature": T, **options})


def test_golden(golden):
    case = golden("look")
    embeddings, labels = torch.tensor(case.in_embeddings), torch.tensor(case.in_labels)
    for name in "abc":
        k, temperature = int(getattr(case, f"param_k_{name}")), float(getattr(case, f"param_temperature_{name}"))
        votes = leave_one_out_knn_probabilities(embeddings, labels, num_classes=3, k=k, temperature=temperature)
        case.close(f"out_probabilities_{name}", votes)


# --- neighbours -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [1, 64, 10**6])
@pytest.mark.parametrize("k", [1, 4, 30, 100])
def test_the_search_in_tiles_finds_what_a_full_sort_finds(tile, k):
    queries, own = unit(11, E, seed=2), torch.tensor([-1, 0, 5, 29, -1, 3, 3, 8, 9, 10, 11])
    valid = torch.rand(N, generator=seeded(3)) > 0.2
    near, rows = nearest_neighbours(queries, MEMORY, k=k, self_index=own, valid=valid, tile=tile)
    products = queries @ MEMORY.T
    products[:, ~valid] = -torch.inf
    products[own >= 0, own[own >= 0]] = -torch.inf
    expected = products.sort(1, descending=True).values[:, : min(k, N)]
    torch.testing.assert_close(near.sort(1, descending=True).values, expected)
    found = near > -torch.inf
    torch.testing.assert_close(products.gather(1, rows)[found], near[found])
    assert all(len(set(row[ok].tolist())) == int(ok.sum()) for row, ok in zip(rows, found, strict=True))


def test_a_search_inside_of_classes():
    near, rows = nearest_neighbours(QUERIES, MEMORY, k=2, classes=(LABELS, MEMORY_LABELS), tile=16)
    assert torch.equal(MEMORY_LABELS[rows], LABELS[:, None].expand(-1, 2))
    near, _ = nearest_neighbours(QUERIES, MEMORY, k=2, classes=(LABELS + 9, MEMORY_LABELS))
    assert (near == -torch.inf).all()


def test_a_search_for_nobody_and_in_half_precision():
    near, rows = nearest_neighbours(QUERIES[:0], MEMORY, k=3)
    assert near.shape == rows.shape == (0, 3)
    _, rows = nearest_neighbours(QUERIES.float(), MEMORY.half(), k=3)
    assert rows.shape == (6, 3)


# --- votes ----------------------------------------------------------------------------------------------------------


def test_votes_sum_to_one_and_with_all_neighbours_are_those_of_nca():
    votes = leave_one_out_knn_probabilities(MEMORY, MEMORY_LABELS, num_classes=4, k=K, temperature=T)
    torch.testing.assert_close(votes.sum(1), torch.ones(N, dtype=torch.float64))
    assert not votes[:, 3].any()
    cosines = (MEMORY @ MEMORY.T / T).fill_diagonal_(-torch.inf)
    expected = cosines.softmax(1) @ F.one_hot(MEMORY_LABELS, 4).double()
    for k in (N - 1, 500):
        torch.testing.assert_close(
            leave_one_out_knn_probabilities(MEMORY, MEMORY_LABELS, num_classes=4, k=k, temperature=T), expected
        )


def test_limits_of_the_temperature():
    def votes(temperature):
        return leave_one_out_knn_probabilities(MEMORY, MEMORY_LABELS, num_classes=3, k=K, temperature=temperature)

    _, rows = nearest_neighbours(MEMORY, MEMORY, k=K, self_index=torch.arange(N))
    fractions = F.one_hot(MEMORY_LABELS[rows], 3).double().mean(1)
    torch.testing.assert_close(votes(1e9), fractions, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(votes(float("inf")), fractions)
    _, nearest = nearest_neighbours(MEMORY, MEMORY, k=1, self_index=torch.arange(N))
    torch.testing.assert_close(votes(1e-6), F.one_hot(MEMORY_LABELS[nearest[:, 0]], 3).double())


def test_the_loss_against_a_memory_of_oneself_is_the_log_of_the_leave_one_out_vote():
    votes = leave_one_out_knn_probabilities(MEMORY, MEMORY_LABELS, num_classes=3, k=K, temperature=T)
    own = votes.gather(1, MEMORY_LABELS[:, None])[:, 0]
    losses = loss(
        MEMORY, MEMORY_LABELS, self_index=torch.arange(N), fallback="clamp", log_floor=-30.0, reduction="none"
    )
    torch.testing.assert_close(losses, -own.log().clamp(min=-30.0))


# --- the loss -------------------------------------------------------------------------------------------------------


def test_with_one_neighbour_it_is_zero_or_the_fallback():
    _, rows = nearest_neighbours(QUERIES, MEMORY, k=1)
    right = MEMORY_LABELS[rows[:, 0]] == LABELS
    assert right.any()
    assert not right.all()
    losses = loss(k=1, reduction="none")
    assert torch.equal(losses[right], torch.zeros(int(right.sum())).double())
    same, _ = nearest_neighbours(QUERIES, MEMORY, k=1, classes=(LABELS, MEMORY_LABELS))
    near, _ = nearest_neighbours(QUERIES, MEMORY, k=1)
    torch.testing.assert_close(losses[~right], F.softplus((near - same)[:, 0] / T)[~right])


@pytest.mark.parametrize("k", [3, K, N])  # both ways to take the products
def test_the_gradient_has_the_closed_form_and_only_neighbours_have_one(k):
    queries, memory = QUERIES.clone().requires_grad_(), MEMORY.clone().requires_grad_()
    loss(queries, memory=memory, k=k, reduction="sum", fallback="skip").backward()
    near, rows = nearest_neighbours(QUERIES, MEMORY, k=k)
    weights, same = (near / T).softmax(1), MEMORY_LABELS[rows] == LABELS[:, None]
    p = (weights * same).sum(1, keepdim=True)
    by_similarity = torch.where(p > 0, (weights - weights * same / p.clamp(min=1e-12)) / T, 0.0)
    torch.testing.assert_close(queries.grad, torch.einsum("nk,nke->ne", by_similarity, MEMORY[rows]))
    assert memory.grad is None
    moved = MEMORY.clone()
    far = ~torch.isin(torch.arange(N), rows)
    moved[far] = -QUERIES.mean(0) / QUERIES.mean(0).norm()  # others may be anywhere, as long as they stay far
    if far.any():
        assert loss(k=k, fallback="skip") == loss(memory=moved, k=k, fallback="skip")


def test_where_all_labels_are_equal_there_is_nothing_to_learn():
    queries = QUERIES.clone().requires_grad_()
    value = loss(queries, torch.zeros(6).long(), memory_labels=torch.zeros(N).long())
    value.backward()
    assert value == 0
    assert not queries.grad.any()


def test_the_example_itself_has_no_vote():
    for number, own in enumerate((4, 8, 1, 20)):
        query, label, index = QUERIES[number][None], LABELS[number][None], torch.tensor([own])
        memory, labels = MEMORY.clone(), MEMORY_LABELS.clone()
        memory[own], labels[own] = query[0], label[0]  # an exact duplicate, under the query's own number
        copied = {"memory": memory, "memory_labels": labels}
        before = loss(query, label, self_index=index)
        assert loss(query, label, self_index=index, **copied) == before
        assert loss(query, label, self_index=torch.tensor([-1]), **copied) < 0.9 * before
        assert loss(query, label, self_index=index + 1, **copied) < 0.9 * before  # under another's number it votes
        assert loss(query, label, self_index=torch.tensor([-1])) == loss(query, label)


def test_views_of_one_example_are_all_left_out():
    views = F.normalize(torch.cat([MEMORY, MEMORY + 0.01 * unit(N, E, seed=5)]), dim=1)
    labels, owners = MEMORY_LABELS.repeat(2), torch.arange(N).repeat(2)
    index = torch.tensor([3, 7])
    options = {"memory": views, "memory_labels": labels, "reduction": "none"}
    found = loss(MEMORY[index], MEMORY_LABELS[index], self_index=index, memory_index=owners, **options)
    for number, own in enumerate(index):
        rest = owners != own
        alone = loss(MEMORY[own][None], MEMORY_LABELS[own][None], views[rest], labels[rest])
        torch.testing.assert_close(found[number], alone)
    assert (loss(MEMORY[index], MEMORY_LABELS[index], self_index=index, **options) < found).all()


def test_fallbacks_where_no_neighbour_is_of_the_class():
    labels = torch.full((N,), 1)
    labels[:2] = 0  # far away, for this query
    query = (-F.normalize(MEMORY[:2].sum(0), dim=0)[None]).requires_grad_()
    zero = torch.tensor([0])
    assert loss(query, zero, memory_labels=labels, fallback="skip") == 0
    clamped = loss(query, zero, memory_labels=labels, fallback="clamp")
    assert clamped == 20
    clamped.backward()
    assert not query.grad.any()
    query.grad = None
    pulled = loss(query, zero, memory_labels=labels, fallback="nearest_positive")
    pulled.backward()
    assert torch.isfinite(pulled)
    nearest = int((query.detach() @ MEMORY[:2].T).argmax())
    assert float(query.grad @ MEMORY[nearest]) < 0  # descent increases the similarity
    assert loss(query, zero, memory_labels=labels, fallback="clamp", log_floor=-3.0) == 3


def test_reductions_leave_out_what_is_skipped():
    _, rows = nearest_neighbours(QUERIES, MEMORY, k=2)
    kept = (MEMORY_LABELS[rows] == LABELS[:, None]).any(1)
    assert kept.any()
    assert not kept.all()
    each = loss(k=2, fallback="skip", reduction="none")
    assert not each[~kept].any()
    torch.testing.assert_close(loss(k=2, fallback="skip"), each[kept].mean())
    torch.testing.assert_close(loss(k=2, fallback="skip", reduction="sum"), each.sum())


def test_rotations_and_the_order_of_the_memory_do_not_matter():
    rotation = torch.linalg.qr(torch.randn(E, E, generator=seeded(4), dtype=torch.float64)).Q
    order = torch.randperm(N, generator=seeded())
    torch.testing.assert_close(loss(QUERIES @ rotation, memory=MEMORY @ rotation), loss())
    torch.testing.assert_close(loss(memory=MEMORY[order], memory_labels=MEMORY_LABELS[order]), loss())


def test_the_sum_over_positives_is_inside_of_the_log():
    """A query beside one cluster of its class gets almost no pull to the other one: it is not contrastive learning."""
    memory = F.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.2]]).double(), dim=1)
    query = F.normalize(torch.tensor([[1.0, 0.1]]).double(), dim=1).requires_grad_()
    look_loss(query, torch.tensor([0]), memory, torch.tensor([0, 0, 1]), k=3, temperature=0.1).backward()
    assert query.grad.norm() < 1e-3


def test_rows_that_are_not_unit_are_normalised_or_refused():
    torch.testing.assert_close(loss(3 * QUERIES, memory=0.5 * MEMORY), loss())
    with pytest.raises(InputError, match=r"queries has rows of length 3 to 3, but must have unit rows"):
        loss(3 * QUERIES, normalise=False)
    with pytest.raises(InputError, match="memory has rows of length"):
        loss(memory=0.5 * MEMORY, normalise=False)
    scaled = leave_one_out_knn_probabilities(2 * MEMORY, MEMORY_LABELS, num_classes=3, k=K)
    torch.testing.assert_close(scaled, leave_one_out_knn_probabilities(MEMORY, MEMORY_LABELS, num_classes=3, k=K))


def test_a_class_with_one_example_is_left_out_with_a_counted_warning():
    labels = MEMORY_LABELS.clone()
    labels[4] = 7
    own, given = torch.tensor([4, 3]), torch.tensor([7, 0])
    with pytest.warns(UserWarning, match="1 of 2 queries have no other example of their class"):
        found = loss(MEMORY[own], given, memory_labels=labels, self_index=own, reduction="none")
    assert found[0] == 0
    assert found[1] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k is 0, but must be greater than 0"),
        ({"temperature": 0.0}, "temperature is 0.0, but must be greater than 0"),
        ({"labels": LABELS[:3]}, r"The labels of queries have shape \(3,\), but must be one class id for each of 6"),
        ({"memory_labels": LABELS}, r"The labels of memory have shape \(6,\)"),
        ({"queries": QUERIES[0]}, r"queries has shape \(5,\), but must be \(n, e\)"),
        ({"memory": MEMORY[:, :3]}, "queries has 5 columns and memory 3"),
        ({"self_index": torch.tensor([0, 1, 2, 3, 4, N])}, "self_index is 30, but must be at least -1 and at most 29"),
        ({"self_index": torch.tensor([0, 1, 2, 3, 4, -2])}, "self_index is -2, but must be"),
        ({"self_index": torch.tensor([0])}, r"self_index has shape \(1,\), but must be \(6,\)"),
        ({"fallback": "none"}, "fallback is 'none', but must be one of 'nearest_positive', 'skip', 'clamp'"),
        ({"reduction": "max"}, "reduction is 'max'"),
    ],
)
def test_bad_input_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        loss(**options)


def test_bad_settings_are_refused():
    for options in ({"k": 0}, {"temperature": -1.0}, {"fallback": "no"}):
        with pytest.raises(InputError, match="but must be"):
            LOOKLoss(5, 2, **options)
    for call in (lambda: MemoryBank(0, 3), lambda: MemoryBank(3, 0)):
        with pytest.raises(InputError, match="is 0, but must be greater than 0"):
            call()
    with pytest.raises(InputError, match="A label is outside of the classes: labels must be 0 to 1"):
        leave_one_out_knn_probabilities(MEMORY, MEMORY_LABELS, num_classes=2, k=3)
    with pytest.raises(InputError, match="embeddings has 1 rows, but must have at least 2"):
        leave_one_out_knn_probabilities(MEMORY[:1], MEMORY_LABELS[:1], num_classes=2, k=3)


# --- memories -------------------------------------------------------------------------------------------------------


def test_a_bank_takes_unit_detached_rows_and_unfilled_ones_are_never_chosen():
    bank = MemoryBank(5, 3)
    features = torch.randn(2, 3, generator=seeded()).requires_grad_()
    bank.update(torch.tensor([3, 1]), features, torch.tensor([7, 8]))
    torch.testing.assert_close(bank.features[3], F.normalize(features, dim=1)[0].detach())
    assert not bank.features.requires_grad
    assert bank.filled.tolist() == [False, True, False, True, False]
    assert bank.labels.tolist() == [-1, 8, -1, 7, -1]
    assert set(knn_predict(bank, -torch.ones(4, 3), k=5).tolist()) <= {7, 8}
    near, rows = nearest_neighbours(torch.ones(4, 3), bank.features, k=5, valid=bank.filled)
    assert set(rows[near > -torch.inf].tolist()) == {1, 3}
    assert set(bank.state_dict()) == {"features", "labels", "filled"}


def test_a_bank_refuses_what_does_not_fit():
    bank = MemoryBank(5, 3)
    with pytest.raises(InputError, match="index is 5, but must be at least 0 and at most 4"):
        bank.update(torch.tensor([5]), torch.ones(1, 3), torch.tensor([0]))
    with pytest.raises(InputError, match=r"but must have \(1, 3\) and \(1,\)"):
        bank.update(torch.tensor([1]), torch.ones(1, 4), torch.tensor([0]))
    with pytest.raises(InputError, match="bank is empty"):
        knn_predict(bank, torch.ones(1, 3))


def test_prediction_is_the_vote_of_scikit_learn():
    from sklearn.neighbors import KNeighborsClassifier

    bank = MemoryBank(N, E).double()
    bank.update(torch.arange(N), MEMORY, MEMORY_LABELS)
    peer = KNeighborsClassifier(9, weights=lambda d: torch.exp((1 - torch.tensor(d) ** 2 / 2) / T).numpy())
    expected = peer.fit(MEMORY.numpy(), MEMORY_LABELS.numpy()).predict(QUERIES.numpy())
    assert knn_predict(bank, 4 * QUERIES, k=9, temperature=T).tolist() == expected.tolist()


def test_the_loss_of_a_batch_is_against_the_memory_before_it():
    look = LOOKLoss(N, E, k=K, temperature=T).double()
    index = torch.arange(N)
    assert look(MEMORY, MEMORY_LABELS, index) == 0  # the memory was empty
    assert look.bank.filled.all()
    fresh = unit(6, E, seed=9).requires_grad_()
    value = look(fresh, LABELS, index[:6])
    expected = loss(fresh, memory=MEMORY, self_index=index[:6])
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(look.bank.features[:6], fresh.detach())
    value.backward()
    assert fresh.grad.any()
    assert int(look.step) == 2


def test_a_first_batch_has_the_gradient_zero_and_no_warning():
    look, embeddings = LOOKLoss(20, E), torch.randn(4, E, generator=seeded()).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for start in (0, 4):
            look(embeddings, torch.arange(start, start + 4), torch.arange(start, start + 4)).backward()
    assert not embeddings.grad.any()
    full = LOOKLoss(4, E)
    full(embeddings, torch.arange(4), torch.arange(4))
    with pytest.warns(UserWarning, match="4 of 4 examples have no other of their class"):
        full(embeddings, torch.arange(4), torch.arange(4))


def test_all_neighbours_can_be_asked_and_fewer_later():
    schedule = functools.partial(k_schedule, k=5, start=N, warmup=10)
    asked = [schedule(step) for step in range(12)]
    assert asked[0] == N
    assert asked[10:] == [5, 5]
    assert asked == sorted(asked, reverse=True)
    look = LOOKLoss(N, E, k=schedule).double()
    for _ in range(3):
        embeddings = unit(N, E, seed=3).requires_grad_()
        look(embeddings, MEMORY_LABELS, torch.arange(N)).backward()  # the memory is written to in between
    assert embeddings.grad.any()


def encoder(seed=0):
    with isolated(seed):
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6))


def embedder(seed=0, dim=5):
    model = encoder(seed)
    with isolated(seed):
        return Embedder(model, 6, dim)


def test_a_queue_is_first_in_first_out_and_its_encoder_follows():
    fast = embedder()
    queue = MomentumQueue(fast, 5, length=7, momentum=0.9)
    rows = unit(10, 5, seed=6).float()
    queue.update(torch.arange(4), rows[:4], torch.arange(4))
    queue.update(torch.arange(4, 9), rows[4:9], torch.arange(4, 9))
    assert queue.examples().tolist() == [7, 8, 2, 3, 4, 5, 6]
    torch.testing.assert_close(queue.features[0], rows[7])
    queue.update(torch.arange(10), rows, torch.arange(10))  # more than it holds: the latest
    assert sorted(queue.examples().tolist()) == list(range(3, 10))
    before = queue.encoder.projection[0].weight.clone()
    with torch.no_grad():
        fast.projection[0].weight += 1
    queue.follow(fast)
    torch.testing.assert_close(queue.encoder.projection[0].weight, before + 0.1)
    assert not any(p.requires_grad for p in queue.encoder.parameters())


# --- in fit ---------------------------------------------------------------------------------------------------------

DATA = TensorData(torch.randn(40, 4, generator=seeded(7)), torch.arange(40) % 4)


def pretrain(folder=None, *, steps=9, queue=False, callback=True):
    model = embedder()
    bank = MomentumQueue(model, 5, length=24) if queue else None
    look = LOOK(labels_of(DATA), 5, k=4, bank=bank)
    checkpoint = None if folder is None else Checkpoint(folder, 1)
    callbacks = [look] if callback else []
    fit(model, indexed(DATA), look, callbacks=callbacks, steps=steps, batch_size=10, checkpoint=checkpoint)
    return model, look


@pytest.mark.parametrize("queue", [False, True])
def test_a_stopped_run_goes_on_with_its_memory(tmp_path, queue, global_rng_untouched):
    whole, memory = pretrain(tmp_path / "whole", queue=queue)
    pretrain(tmp_path / "parts", steps=5, queue=queue)
    parts, resumed = pretrain(tmp_path / "parts", queue=queue)
    for name, value in whole.state_dict().items():
        assert torch.equal(parts.state_dict()[name], value)
    for name, value in memory.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)
    assert not torch.equal(whole.projection[2].weight, embedder().projection[2].weight)


def test_features_are_those_before_the_projection():
    model = embedder()
    x = DATA.inputs
    model.eval()
    assert torch.equal(model.features(x), model.model(x))
    torch.testing.assert_close(model(x).norm(dim=1), torch.ones(40))
    direct = Embedder(model.model, 6, None).eval()
    torch.testing.assert_close(direct(x), F.normalize(model.features(x), dim=1))
    with pytest.raises(InputError, match="has no layer 'no'"):
        Embedder(model.model, 6, layer="no")


def test_data_without_numbers_is_refused():
    look = LOOK(labels_of(DATA), 5)
    with pytest.raises(InputError, match=r"LOOK needs them as targets: pass indexed\(data\)"):
        fit(embedder(), TensorData(DATA.inputs), look, steps=1)


def test_a_head_is_fitted_as_scikit_learn_does():
    from sklearn.linear_model import LogisticRegression

    model = nn.Sequential(encoder(), nn.Linear(6, 4)).eval()
    before = copy.deepcopy(model[0].state_dict())
    fit_head(model, DATA, decay=1 / 40)
    features = features_of_data(model, DATA, "1")
    peer = LogisticRegression(C=1.0, max_iter=1000, tol=1e-8).fit(features.numpy(), DATA.targets.numpy())
    ours = model(DATA.inputs).softmax(1).detach()
    torch.testing.assert_close(
        ours.double(), torch.tensor(peer.predict_proba(features.numpy())).double(), atol=2e-3, rtol=0
    )
    assert all(torch.equal(value, before[name]) for name, value in model[0].state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_recipe_on_a_real_vit(tiny_vit, digits_small, global_rng_untouched):
    before = predict(tiny_vit, in_order(digits_small.test))
    plan = recipe(tiny_vit, digits_small.train, k=5, dim=8, warmup=2)
    model, history = plan.fit(steps=4, batch_size=60)
    assert model is tiny_vit
    assert len(history) == 4
    assert not model.training
    assert not torch.equal(predict(model, in_order(digits_small.test)), before)


def test_recipe_learns_digits(digits_small):
    from retouch.worlds import digits

    with isolated(0):
        model = digits.DigitsCNN(width=8, hidden=32)
    model, _ = recipe(model, digits_small.train, k=10, dim=16).fit(steps=60, batch_size=60)
    assert accuracy(predict(model, in_order(digits_small.test)), labels_of(digits_small.test)) > 80


def test_real_language_models_and_mappings(tiny_llama):
    from transformers import LlamaForSequenceClassification

    config = copy.deepcopy(tiny_llama.config)
    config.num_labels = 2
    with isolated(0):
        model = LlamaForSequenceClassification(config)
    ids = torch.randint(1, 40, (12, 6), generator=seeded())
    data = TensorData({"input_ids": ids}, torch.arange(12) % 2)

    class LastToken(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids):
            return self.model.model(input_ids).last_hidden_state[:, -1]

    look = LOOK(labels_of(data), 4, k=3)
    history = fit(Embedder(LastToken(), 16, 4), indexed(data), look, callbacks=[look], steps=4, batch_size=6)
    assert history["loss"][-1] > 0


@pytest.mark.slow
def test_parity_is_learnt_so_that_digits_can_be_told():
    """The study: pre-training on even and odd, judged on the ten digits."""
    from retouch.arenas.contest import Terms
    from retouch.arenas.train.entries import look as entry
    from retouch.arenas.train.tasks import transfer
    from retouch.arenas.training import TrainProblem

    replica = TrainProblem(transfer.TASK, Terms(replicas=1)).replica(0)
    plain, ours = replica.train(), entry.solve(replica, k=20, dim=None)
    plain, ours = (transfer.judge(solution.model, replica.split) for solution in (plain, ours))
    assert ours["error"] < plain["error"] - 10
    assert ours["neighbours"] < plain["neighbours"] - 4
    assert ours["upstream"] < plain["upstream"] + 1


def test_the_head_is_what_pretraining_leaves_alone():
    model = nn.Sequential(encoder(), nn.Linear(6, 4))
    name = head_of(model)
    wrapped = Embedder(model, layer_of(model, name).in_features, 5, layer=name)
    before = model[1].weight.detach().clone()
    look = LOOK(labels_of(DATA), 5, k=4)
    fit(wrapped, indexed(DATA), look, callbacks=[look], steps=3, batch_size=20)
    assert torch.equal(model[1].weight, before)
