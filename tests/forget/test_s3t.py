import itertools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from retouch.core.data import TensorData, concat, subset
from retouch.core.errors import InputError
from retouch.core.loop import fit
from retouch.forget.s3t import (
    S3TEnsemble,
    SlicedAdapters,
    bipartite_sequences,
    cyclic_sequences,
    delete_slice,
    expected_deletions,
    sequence_score,
    split_shards,
    stage_trainer,
)
from retouch.worlds import digits

TRAINER = stage_trainer(epochs=1, lr=1e-2, batch_size=4)
LORA = {"rank": 2, "alpha": 4}


def vit(layers=4, seed=0):
    from transformers import ViTConfig, ViTForImageClassification

    settings = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": layers}
    torch.manual_seed(seed)
    config = ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=10, **settings)
    return ViTForImageClassification(config).eval()


def slices(shards=2, count=3, each=8, seed=0):
    """Digits by shard and slice."""
    data = digits.data("train")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[: shards * count * each]
    return [[subset(data, rows) for rows in part.split(each)] for part in order.split(count * each)]


def ensemble(shard_slices, budget, *, count=None, model=None, trainer=TRAINER, **settings):
    made = S3TEnsemble(model or vit(), slices=count or len(shard_slices[0]), budget=budget, **{**LORA, **settings})
    return made.fit(shard_slices, trainer)


def images(n=5):
    return digits.data("test").inputs[:n]


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


# --- orders of slices -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_full_budget_leads_with_every_slice_once_and_has_it_in_every_place_once(count):
    rows = cyclic_sequences(count, count)
    assert len(rows) == count
    for place in range(count):
        assert sorted(row[place] for row in rows) == list(range(count))


def test_rows_are_rotations_to_the_right():
    assert cyclic_sequences(4, 4) == [[0, 1, 2, 3], [3, 0, 1, 2], [2, 3, 0, 1], [1, 2, 3, 0]]
    assert cyclic_sequences(4, 2) == [[0, 1, 2, 3], [3, 0, 1, 2]]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_rows_of_any_budget_are_distinct_permutations(count):
    for budget in range(1, math.factorial(count) + 1):
        rows = cyclic_sequences(count, budget)
        assert len(rows) == budget
        assert all(sorted(row) == list(range(count)) for row in rows)
        assert len({tuple(row) for row in rows}) == budget


@pytest.mark.parametrize("count", [3, 4, 5])
def test_larger_budgets_share_first_elements_and_prefixes_fairly(count):
    for budget in range(count, math.factorial(count) + 1):
        rows = cyclic_sequences(count, budget)
        firsts = [sum(row[0] == first for row in rows) for first in range(count)]
        assert max(firsts) - min(firsts) <= 1
        if count * (count - 1) <= budget <= count * (count - 1) * (count - 2):
            pairs = [sum(row[:2] == [a, b] for row in rows) for a, b in itertools.permutations(range(count), 2)]
            assert max(pairs) - min(pairs) <= 1
    assert {tuple(row) for row in cyclic_sequences(count, math.factorial(count))} == set(
        itertools.permutations(range(count))
    )


def test_remainder_of_a_round_goes_to_the_first_prefixes():
    counts = [0, 0, 0, 0]
    for row in cyclic_sequences(4, 6):
        counts[row[0]] += 1
    first, second = (row[0] for row in cyclic_sequences(4, 4)[:2])
    assert sorted(counts) == [1, 1, 2, 2]
    assert counts[first] == counts[second] == 2


def test_orders_beyond_the_rotations_are_those_of_the_released_code():
    """Printed by src/sequence_selection.py:get_cyclic of brcsomnath/S3T; the order of rows is an artefact there."""
    six = "0123 0312 1230 2301 3012 3201"
    thirteen = "0123 0132 0231 0312 1023 1230 1302 2013 2130 2301 3012 3120 3201"
    for budget, theirs in ((6, six), (13, thirteen)):
        assert sorted("".join(map(str, row)) for row in cyclic_sequences(4, budget)) == theirs.split()


@pytest.mark.parametrize("horizon", [1, 10, 100])
def test_score_of_an_order_by_loops(horizon):
    probs = [0.01, 0.2, 0.03, 0.76]
    for length in range(5):
        expected = sum(n * (1 - sum(probs[:n])) ** horizon for n in range(1, length + 1))
        assert sequence_score(probs[:length], horizon=horizon) == pytest.approx(expected, rel=1e-12, abs=1e-300)


def test_score_is_higher_for_orders_that_begin_with_rarely_deleted_slices():
    assert sequence_score([0.001, 0.009, 0.99]) > sequence_score([0.009, 0.001, 0.99]) > sequence_score([0.99, 0.001])


@pytest.mark.parametrize(
    "probs", [[0.1, 0.2, 0.3, 0.4], [0.005, 0.015, 0.03, 0.95], [0.25] * 4, [0.7, 0.2, 0.1], [1.0]]
)
def test_matched_orders_reach_the_best_sum_in_every_round(probs):
    """Round by round against all ways of giving the orders their next elements."""
    count = len(probs)
    rows = bipartite_sequences(probs)
    assert sorted(row[0] for row in rows) == list(range(count))
    assert all(sorted(row) == list(range(count)) for row in rows)
    for length in range(1, count):
        prefixes = [row[:length] for row in rows]

        def value(given, prefixes=prefixes, length=length):
            if any(slice in prefix for slice, prefix in zip(given, prefixes, strict=True)):
                return -math.inf
            full = [[*prefix, slice] for slice, prefix in zip(given, prefixes, strict=True)]
            return sum(n * (1 - sum(probs[s] for s in row[:n])) ** 100 for row in full for n in range(1, length + 2))

        best = max(value(given) for given in itertools.permutations(range(count)))
        assert value([row[length] for row in rows]) == pytest.approx(best, rel=1e-9, abs=1e-300)


def test_deletion_leaves_prefixes_of_the_original_rows():
    rows = cyclic_sequences(5, 5)
    kept = [row[:] for row in rows]
    assert delete_slice(rows, 2) == [[0, 1], [4, 0, 1], [3, 4, 0, 1], [1]]
    for deleted in range(5):
        after = delete_slice(rows, deleted)
        assert len(after) == 4  # the one that begins with it is gone
        for row in after:
            assert any(row == one[: len(row)] and one[len(row)] == deleted for one in rows)
    assert rows == kept


def test_deleting_the_same_slice_twice_is_idempotent():
    for budget in (1, 4, 9):
        once = delete_slice(cyclic_sequences(4, budget), 2)
        assert delete_slice(once, 2) == once


def test_deleting_in_any_order_leaves_the_same_orders():
    rows = cyclic_sequences(5, 7)
    for gone in ((0, 3), (1, 2, 4), (4, 0, 1, 3)):
        results = []
        for order in itertools.permutations(gone):
            after = rows
            for slice in order:
                after = delete_slice(after, slice)
            results.append(after)
        assert all(result == results[0] for result in results)


def test_deleting_all_first_slices_empties_the_shard():
    for budget in (1, 2, 4):
        rows = cyclic_sequences(4, budget)
        for first in {row[0] for row in rows}:
            assert rows
            rows = delete_slice(rows, first)
        assert rows == []


@pytest.mark.parametrize(
    ("shards", "count", "budget"), [(1, 4, 1), (3, 4, 2), (5, 4, 4), (5, 6, 6), (2, 3, 5), (5, 6, 1)]
)
def test_expected_deletions_follow_the_closed_form(shards, count, budget):
    """m L H(m min(B, L)), and the deviation of a sum of geometric waiting times."""
    firsts, total, trials = shards * min(budget, count), shards * count, 4000
    mean = total * sum(1 / k for k in range(1, firsts + 1))
    variance = sum((1 - k / total) / (k / total) ** 2 for k in range(1, firsts + 1))
    got_mean, got_std = expected_deletions(
        shards, count, budget, trials=trials, generator=torch.Generator().manual_seed(0)
    )
    assert abs(got_mean - mean) < 5 * math.sqrt(variance / trials)
    assert got_std == pytest.approx(math.sqrt(variance), rel=0.1)


def test_expected_deletions_equal_a_simulation_of_requests():
    draw = torch.Generator().manual_seed(1)
    waits = []
    for _ in range(300):
        shards, requests = [cyclic_sequences(4, 2) for _ in range(2)], 0
        while any(shards):
            shard, slice = divmod(int(torch.randint(8, (1,), generator=draw)), 4)
            shards[shard] = delete_slice(shards[shard], slice)
            requests += 1
        waits.append(requests)
    simulated = torch.tensor(waits, dtype=torch.float64)
    mean, std = expected_deletions(2, 4, 2, trials=4000, generator=torch.Generator().manual_seed(0))
    assert abs(float(simulated.mean()) - mean) < 5 * std / math.sqrt(300)


def test_expected_deletions_grow_with_the_budget_and_meet_the_authors_simulator():
    """46, 58 and 71 of the released simulator at m = 5, L = 4 over 400 trials, standard deviation 23 to 37."""
    means = [expected_deletions(5, 4, b, trials=2000, generator=torch.Generator().manual_seed(b))[0] for b in (1, 2, 4)]
    assert means[0] < means[1] < means[2]
    for mean, theirs in zip(means, (46, 58, 71), strict=True):
        assert abs(mean - theirs) < 5


def test_expected_deletions_with_the_same_generator_are_the_same(global_rng_untouched):
    one, other = (expected_deletions(2, 3, 2, trials=50, generator=torch.Generator().manual_seed(4)) for _ in range(2))
    assert one == other
    expected_deletions(2, 3, 2, trials=5)


# --- one model ------------------------------------------------------------------------------------------------------


def filled(adapters):
    """Every LoRA weight random, so that every group changes the output."""
    draw = torch.Generator().manual_seed(5)
    for group in range(1, adapters.num_slices + 1):
        for p in adapters.group_parameters(group).values():
            p.data = 0.5 * torch.randn(p.shape, generator=draw)
    return adapters


def test_groups_are_counted_from_the_top():
    adapters = SlicedAdapters(vit(4), 2, **LORA)
    layers = [{int(name.split(".")[2]) for name in group} for group in adapters.groups]
    assert layers == [{2, 3}, {0, 1}]
    for group in (1, 2):
        names = adapters.group_parameters(group)
        assert {int(name.split(".")[2]) for name in names} == layers[group - 1]
        assert len(names) == 2 * 2 * 2  # two layers, query and value, A and B
        assert all("lora" in name for name in names)


def test_layers_that_do_not_divide_stay_without_adapters_at_the_bottom():
    adapters = SlicedAdapters(vit(5), 2, **LORA)
    assert [{int(name.split(".")[2]) for name in group} for group in adapters.groups] == [{3, 4}, {1, 2}]
    assert not [name for name, _ in adapters.model.vit.layers[0].named_parameters() if "lora" in name]


def test_ten_groups_are_told_apart():
    adapters = SlicedAdapters(vit(11), 11, **LORA)
    for group in range(1, 12):
        layers = {int(name.split(".")[2]) for name in adapters.group_parameters(group)}
        assert layers == {11 - group}
    adapters.stage(1)
    assert {
        name.split(".")[2] for name, p in adapters.model.named_parameters() if p.requires_grad and "lora" in name
    } == {"10"}


def test_given_backbone_is_not_changed_and_without_groups_the_output_is_its():
    model = vit()
    model.classifier.bias.requires_grad_(False)
    before = state(model)
    adapters = filled(SlicedAdapters(model, 2, **LORA))
    assert_same(state(model), before)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["classifier.bias"]
    with torch.no_grad():
        assert torch.equal(adapters.eval()(images()).logits, model(images()).logits)
        assert not torch.equal(adapters.truncate(1)(images()).logits, model(images()).logits)


def test_fresh_adapters_change_nothing():
    model = vit()
    adapters = filled(SlicedAdapters(model, 2, **LORA)).eval()
    for group in (1, 2):
        adapters.fresh(group, seed=group)
    with torch.no_grad():
        torch.testing.assert_close(adapters.truncate(2)(images()).logits, model(images()).logits)


@pytest.mark.parametrize("rslora", [True, False])
@pytest.mark.parametrize("active", [0, 1, 2])
def test_with_later_groups_off_the_output_is_backbone_plus_the_groups_so_far(active, rslora):
    model = vit()
    adapters = filled(SlicedAdapters(model, 2, rank=4, alpha=6, rslora=rslora)).eval().truncate(active)
    merged = vit()  # the same seed: the plain formula w + scale * B A, written into the backbone
    scale = 6 / math.sqrt(4) if rslora else 6 / 4
    for group in range(1, active + 1):
        for name in adapters.groups[group - 1]:
            lora = adapters.model.get_submodule(name)
            (a,), (b,) = lora.lora_A.values(), lora.lora_B.values()
            merged.get_submodule(name).weight.data += scale * b.weight.data @ a.weight.data
    with torch.no_grad():
        torch.testing.assert_close(adapters(images()).logits, merged(images()).logits, rtol=1e-4, atol=1e-5)
        if active < 2:
            assert not torch.allclose(adapters(images()).logits, adapters.truncate(active + 1)(images()).logits)


def test_stage_sets_what_is_trained_and_truncate_nothing():
    adapters = SlicedAdapters(vit(), 2, **LORA)
    for stage in (1, 2):
        adapters.stage(stage)
        trained = {name for name, p in adapters.model.named_parameters() if p.requires_grad}
        assert trained == adapters.group_parameters(stage).keys() | {"classifier.weight", "classifier.bias"}
        adapters.truncate(stage)
        assert not any(p.requires_grad for p in adapters.parameters())


@pytest.mark.parametrize("stage", [1, 2])
def test_stage_training_changes_no_tensor_outside_of_its_group_and_the_head(stage):
    adapters = filled(SlicedAdapters(vit(), 2, **LORA))
    adapters.stage(stage)
    before = state(adapters.model)
    TRAINER(adapters, slices()[0][0], 3)
    after = state(adapters.model)
    allowed = adapters.group_parameters(stage).keys() | adapters.head_parameters().keys()
    assert {name for name in before if not torch.equal(before[name], after[name])} == allowed


@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_of_other_groups_and_the_backbone_are_none(stage):
    adapters = filled(SlicedAdapters(vit(), 2, **LORA)).stage(stage)
    data = slices()[0][0]
    F.cross_entropy(adapters(data.inputs).logits, data.targets).backward()
    allowed = adapters.group_parameters(stage).keys() | adapters.head_parameters().keys()
    for name, p in adapters.model.named_parameters():
        assert (p.grad is not None) == (name in allowed), name


def test_batch_statistics_do_not_carry_slices_into_stages():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.BatchNorm1d(6), nn.Linear(6, 6)

        def forward(self, x):
            return x + self.linear(self.norm(x)).relu()

    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks, self.head = nn.ModuleList(Block() for _ in range(2)), nn.Linear(6, 3)

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    torch.manual_seed(0)
    model = Stack()
    x, y = 3 + torch.randn(16, 6), torch.arange(16) % 3
    parts = [[TensorData(x[:8], y[:8]), TensorData(x[8:], y[8:])]]
    trained = S3TEnsemble(model, slices=2, budget=1, targets=None, **LORA).fit(parts, TRAINER)
    for name, value in trained.adapters.model.named_buffers():
        assert torch.equal(value, dict(model.named_buffers())[name]), name


def test_a_real_llama_gets_its_groups(tiny_llama):
    adapters = SlicedAdapters(tiny_llama, 2, head="lm_head", **LORA)
    assert adapters.groups == [
        [f"model.layers.{layer}.self_attn.{name}" for name in ("q_proj", "v_proj")] for layer in (1, 0)
    ]
    with torch.no_grad():
        ids = torch.arange(8)[None]
        assert torch.equal(adapters.eval()(input_ids=ids).logits, tiny_llama(input_ids=ids).logits)


# --- training and deleting ------------------------------------------------------------------------------------------


def test_prefixes_are_trained_once_on_the_union_of_their_slices_from_the_checkpoint_before():
    parts, seen = slices(shards=2, count=3), []

    def trainer(adapters, data, seed):
        seen.append((adapters.active, data.targets.clone(), seed, adapters.state()))
        TRAINER(adapters, data, seed)

    trained = ensemble(parts, 6, trainer=trainer, model=vit(3))  # all orders: prefixes are shared
    prefixes = {tuple(order[:i]) for order in cyclic_sequences(3, 6) for i in (1, 2, 3)}
    assert trained.checkpoints.keys() == {(shard, prefix) for shard in (0, 1) for prefix in prefixes}
    assert len(seen) == len(trained.checkpoints)
    assert len({seed for _, _, seed, _ in seen}) == len(seen)
    for (shard, prefix), (active, targets, _, start) in zip(trained.checkpoints, seen, strict=True):
        assert active == len(prefix)
        assert torch.equal(targets, torch.cat([parts[shard][s].targets for s in prefix]))
        before = trained.checkpoints[shard, prefix[:-1]] if len(prefix) > 1 else trained.first_head
        for name, value in before.items():
            assert torch.equal(start[name], value), name
        for name, value in start.items():
            if name not in before and "lora_B" in name:
                assert not value.any()  # a new group begins without effect
    heads = [weights["classifier.weight"] for weights in trained.checkpoints.values()]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(heads, 2))  # stored for each stage


def test_after_deletion_the_model_equals_the_checkpoint_of_the_prefix_bit_for_bit():
    parts = slices(shards=1, count=2)
    trained = ensemble(parts, 1)
    saved = {name: value.clone() for name, value in trained.checkpoints[0, (0,)].items()}
    with torch.no_grad():
        at_stage_one = trained.member(0, (0,)).eval()(images()).logits.clone()
        at_stage_two = trained.member(0, (0, 1)).eval()(images()).logits.clone()
    assert torch.equal(trained.predict(images()), at_stage_two)
    trained.delete(0, 1)
    assert trained.serving() == [(0, (0,))]
    assert_same(trained.member(0, (0,)).state(), saved)
    assert torch.equal(trained.predict(images()), at_stage_one)
    assert not torch.equal(at_stage_one, at_stage_two)


@pytest.mark.parametrize("budget", [1, 3, 5])
@pytest.mark.parametrize("gone", [[(0, 2)], [(0, 1), (1, 2)], [(0, 0), (0, 1), (1, 1)]])
def test_after_deletion_all_equals_training_without_the_slice_bit_for_bit(budget, gone):
    """The slice's data replaced by other data: nothing that survives may have depended on it."""
    parts = slices(shards=2, count=3)
    other = slices(shards=2, count=3, seed=7)
    replaced = [[other[a][s] if (a, s) in gone else parts[a][s] for s in range(3)] for a in range(2)]
    without = ensemble(replaced, budget, model=vit(3))
    trained = ensemble(parts, budget, model=vit(3))
    full = {key: dict(weights) for key, weights in trained.checkpoints.items()}
    for shard, slice in gone:
        for one in (trained, without):
            one.delete(shard, slice)
    assert trained.sequences == without.sequences
    assert trained.checkpoints.keys() == without.checkpoints.keys()
    for key, weights in trained.checkpoints.items():
        assert_same(weights, without.checkpoints[key])
        assert_same(weights, full[key])
    if trained.alive():
        assert torch.equal(trained.predict(images()), without.predict(images()))


def test_replaced_data_would_be_seen_where_it_is_not_deleted():
    parts, other = slices(shards=1, count=2), slices(shards=1, count=2, seed=7)
    one, two = (ensemble(data, 1) for data in (parts, [[parts[0][0], other[0][1]]]))
    assert_same(one.checkpoints[0, (0,)], two.checkpoints[0, (0,)])
    for name, value in one.checkpoints[0, (0, 1)].items():
        if "lora_B" in name and "layers.0." in name:
            assert not torch.equal(value, two.checkpoints[0, (0, 1)][name]), name


@pytest.mark.parametrize("requests", list(itertools.permutations([(0, 2), (0, 1), (1, 0)])))
def test_deletions_in_any_order_leave_the_same_ensemble(requests):
    trained = _shared_ensemble()
    for shard, slice in requests:
        trained.delete(shard, slice)
    expected = _shared_ensemble()
    for shard, slice in sorted(requests):
        expected.delete(shard, slice)
    assert trained.sequences == expected.sequences
    assert trained.checkpoints.keys() == expected.checkpoints.keys()
    assert torch.equal(trained.predict(images()), expected.predict(images()))
    survivors = [len(trained.sequences[0]), len(trained.sequences[1])]
    assert survivors == [1, 2]


_trained = {}


def _shared_ensemble():
    """One trained ensemble with fresh copies of what deletions change."""
    if not _trained:
        made = ensemble(slices(shards=2, count=3), 3, model=vit(3))
        _trained["made"] = made, made.sequences, made.checkpoints
    made, sequences, checkpoints = _trained["made"]
    made.sequences, made.checkpoints = [list(map(list, rows)) for rows in sequences], dict(checkpoints)
    return made


def test_deleting_twice_is_idempotent_and_reports_what_was_cut():
    trained = _shared_ensemble()
    report = trained.delete(1, 0)
    assert (report.shard, report.slice, report.cut, report.lost, report.alive) == (1, 0, 3, 1, True)
    kept = [list(rows) for rows in trained.sequences], set(trained.checkpoints)
    again = trained.delete(1, 0)
    assert (again.cut, again.lost, again.alive) == (0, 0, True)
    assert ([list(rows) for rows in trained.sequences], set(trained.checkpoints)) == kept


def test_deletion_touches_no_other_shard_and_drops_all_weights_that_saw_the_slice():
    trained = _shared_ensemble()
    before = {key: dict(weights) for key, weights in trained.checkpoints.items()}
    trained.delete(0, 1)
    assert trained.sequences[1] == cyclic_sequences(3, 3)
    assert trained.checkpoints.keys() == {key for key in before if not (key[0] == 0 and 1 in key[1])}
    for key, weights in trained.checkpoints.items():
        assert_same(weights, before[key])


def test_after_deletion_no_weights_that_saw_the_slice_are_kept_in_the_ensemble_s_own_model():
    parts = slices(shards=1, count=2)
    trained = ensemble(parts, 2)
    gone = [dict(weights) for (_, prefix), weights in trained.checkpoints.items() if 1 in prefix]
    kept = [dict(weights) for (_, prefix), weights in trained.checkpoints.items() if 1 not in prefix]
    trained.delete(0, 1)
    held = dict(trained.adapters.model.named_parameters())
    for weights in gone:
        for name, value in weights.items():
            if not any(name in one and torch.equal(one[name], value) for one in kept):
                assert not torch.equal(held[name], value), name


def test_serves_the_longest_prefix_first_on_ties_and_averages_shards_equally():
    trained = _shared_ensemble()
    assert trained.serving() == [(0, (0, 1, 2)), (1, (0, 1, 2))]
    trained.delete(0, 1)  # left of shard 0: (0), (2, 0)
    trained.delete(1, 0)  # left of shard 1: (2), (1, 2)
    assert trained.serving() == [(0, (2, 0)), (1, (1, 2))]
    with torch.no_grad():
        logits = [trained.member(*key).eval()(images()).logits.clone() for key in trained.serving()]
    torch.testing.assert_close(trained.predict(images()), (logits[0] + logits[1]) / 2)
    trained.delete(0, 0)
    trained.delete(0, 2)  # shard 0 is empty and is skipped
    assert trained.serving() == [(1, (1, 2))]
    assert torch.equal(trained.predict(images()), logits[1])


def test_is_alive_until_all_first_slices_of_all_shards_are_gone():
    trained = _shared_ensemble()
    reports = [trained.delete(shard, slice) for shard in (0, 1) for slice in (0, 1, 2)]
    assert [report.alive for report in reports] == [True] * 5 + [False]
    assert not trained.alive()
    assert trained.checkpoints == {}
    with pytest.raises(InputError, match="trained again"):
        trained.predict(images())


def test_budget_one_is_sisa_with_lora_and_one_model_s_mean_is_that_model():
    parts = slices(shards=1, count=2)
    trained = ensemble(parts, 1)
    assert trained.sequences == [[[0, 1]]]
    assert list(trained.checkpoints) == [(0, (0,)), (0, (0, 1))]

    plain = SlicedAdapters(vit(), 2, **LORA)
    seeds_seen = []

    def record(adapters, data, seed):
        seeds_seen.append(seed)
        TRAINER(adapters, data, seed)

    ensemble(parts, 1, trainer=record)
    for stage in (1, 2):
        plain.fresh(stage, seeds_seen[stage - 1])
        plain.stage(stage)
        TRAINER(plain, concat(*parts[0][:stage]), seeds_seen[stage - 1])
    with torch.no_grad():
        assert torch.equal(trained.predict(images()), plain.eval()(images()).logits)
    trained.delete(0, 0)
    assert not trained.alive()


def test_deletion_probabilities_choose_orders_that_begin_with_rare_slices():
    probs = [0.9, 0.07, 0.03]
    made = S3TEnsemble(vit(3), slices=3, budget=2, probs=probs, **LORA)
    assert [order[0] for order in made.orders] == [2, 1]
    scores = [sequence_score([probs[s] for s in order]) for order in made.orders]
    assert scores == sorted(scores, reverse=True)


def test_save_and_load_give_the_same_ensemble_and_hold_nothing_deleted(tmp_path):
    trained = _shared_ensemble()
    trained.delete(0, 1)
    trained.save(tmp_path / "ensemble.safetensors")
    loaded = S3TEnsemble(vit(3), slices=3, budget=3, **LORA).load(tmp_path / "ensemble.safetensors")
    assert loaded.sequences == trained.sequences
    assert loaded.checkpoints.keys() == trained.checkpoints.keys()
    for key, weights in trained.checkpoints.items():
        assert_same(loaded.checkpoints[key], weights)
    assert torch.equal(loaded.predict(images()), trained.predict(images()))
    assert [p.name for p in tmp_path.iterdir()] == ["ensemble.safetensors"]
    loaded.delete(1, 2)
    trained.delete(1, 2)
    assert torch.equal(loaded.predict(images()), trained.predict(images()))
    with pytest.raises(InputError, match="orders"):
        S3TEnsemble(vit(3), slices=3, budget=2, **LORA).load(tmp_path / "ensemble.safetensors")


def test_same_seed_same_bits_and_no_global_randomness(global_rng_untouched):
    rng = torch.get_rng_state()
    model, parts = vit(), slices(shards=1, count=2)
    torch.set_rng_state(rng)
    runs = [ensemble(parts, 2, model=model, seed=seed) for seed in (5, 5, 6)]
    for key, weights in runs[0].checkpoints.items():
        assert_same(weights, runs[1].checkpoints[key])
        assert not torch.equal(weights["classifier.weight"], runs[2].checkpoints[key]["classifier.weight"])
    assert torch.equal(runs[0].predict(images()), runs[1].predict(images()))


def test_given_model_stays_bit_identical(tiny_vit, digits_small):
    tiny_vit.train()
    before = state(tiny_vit)
    data = digits_small.train
    parts = [[subset(data, rows) for rows in shard] for shard in split_shards(64, 2, 2)]
    trained = ensemble(parts, 2, model=tiny_vit)
    trained.delete(0, 0)
    trained.predict(data.inputs[:4])
    assert_same(state(tiny_vit), before)
    assert all(module.training for module in tiny_vit.modules())
    assert all(p.requires_grad and p.grad is None for p in tiny_vit.parameters())
    assert not any("lora" in name for name, _ in tiny_vit.named_modules())


def test_learns_digits_slice_by_slice_and_keeps_answering_after_deletions():
    """The backbone is the shipped ViT, and the labels are others than it has learned."""
    data, test = digits.data("train"), digits.data("test")
    data = TensorData(data.inputs[:160], (data.targets[:160] + 3) % 10)
    wanted = (test.targets + 3) % 10
    parts = [[subset(data, rows) for rows in shard] for shard in split_shards(160, 2, 2)]
    model = digits.reference("vit")

    def accuracy(logits):
        return 100 * float((logits.argmax(1) == wanted).double().mean())

    with torch.no_grad():
        assert accuracy(model(test.inputs).logits) < 10
    trained = S3TEnsemble(model, slices=2, budget=2, rank=4, alpha=4)
    trained.fit(parts, stage_trainer(epochs=6, lr=2e-2, batch_size=32))
    assert accuracy(trained.predict(test.inputs)) > 80
    for shard, slice in ((0, 0), (1, 1), (0, 1)):
        assert trained.delete(shard, slice).alive
        assert accuracy(trained.predict(test.inputs)) > 60
    assert not trained.delete(1, 0).alive


# --- splitting and training stages ----------------------------------------------------------------------------------


def test_shards_and_slices_partition_the_data():
    rows = split_shards(23, 3, 2, seed=1)
    assert [len(shard) for shard in rows] == [2, 2, 2]
    joined = torch.cat([part for shard in rows for part in shard])
    assert sorted(joined.tolist()) == list(range(23))
    sizes = [len(part) for shard in rows for part in shard]
    assert max(sizes) - min(sizes) <= 1
    assert torch.equal(joined, torch.cat([part for shard in split_shards(23, 3, 2, seed=1) for part in shard]))
    assert not torch.equal(joined, torch.cat([part for shard in split_shards(23, 3, 2, seed=2) for part in shard]))


def test_stage_trainer_is_adamw_with_cross_entropy():
    data = slices()[0][0]
    one, other = (filled(SlicedAdapters(vit(), 2, **LORA)).stage(1) for _ in range(2))
    stage_trainer(epochs=2, lr=1e-3, batch_size=4, weight_decay=0.1)(one, data, 9)
    fit(
        other,
        data,
        epochs=2,
        batch_size=4,
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1),
        seed=9,
    )
    assert_same(state(one), state(other))


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0, -1, 7])
def test_budget_outside_of_one_to_the_number_of_orders_is_an_error(budget):
    calls = [
        lambda: cyclic_sequences(3, budget),
        lambda: expected_deletions(2, 3, budget),
        lambda: S3TEnsemble(vit(3), slices=3, budget=budget),
    ]
    for call in calls:
        with pytest.raises(InputError, match=rf"budget is {budget}.*at least 1 and at most 6"):
            call()


@pytest.mark.parametrize("budget", [0, 4])
def test_budget_beyond_the_matched_orders_is_an_error(budget):
    with pytest.raises(InputError, match=rf"budget is {budget}.*at least 1 and at most 3"):
        S3TEnsemble(vit(3), slices=3, budget=budget, probs=[0.2, 0.3, 0.5])


@pytest.mark.parametrize("probs", [[], [0.5, -0.1, 0.6]])
def test_probabilities_must_be_there_and_not_negative(probs):
    with pytest.raises(InputError, match=r"probs is .*negative"):
        bipartite_sequences(probs)


def test_probabilities_that_do_not_sum_to_one_warn():
    with pytest.warns(UserWarning, match=r"probs sum to 0\.9,"):
        bipartite_sequences([0.2, 0.3, 0.4])


def test_probabilities_within_the_tolerance_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bipartite_sequences([0.2, 0.3, 0.5 + 5e-7])


def test_probabilities_of_another_number_of_slices_are_an_error():
    with pytest.raises(InputError, match=r"probs holds 2 values.*3 slices"):
        S3TEnsemble(vit(3), slices=3, budget=1, probs=[0.5, 0.5])


def test_fewer_layers_than_slices_is_an_error():
    with pytest.raises(InputError, match=r"vit\.layers has 4 layers.*5 slices"):
        SlicedAdapters(vit(4), 5)


@pytest.mark.parametrize("shard", [-1, 2])
def test_unknown_shard_is_an_error(shard):
    with pytest.raises(InputError, match=rf"shard is {shard}.*between 0 and 1"):
        _shared_ensemble().delete(shard, 0)


@pytest.mark.parametrize("slice", [-1, 3])
def test_unknown_slice_is_an_error(slice):
    with pytest.raises(InputError, match=rf"slice is {slice}.*at least 0 and at most 2"):
        _shared_ensemble().delete(0, slice)


def test_unknown_member_is_an_error():
    with pytest.raises(InputError, match=r"shard 0 and slices \(1, 0\)"):
        _shared_ensemble().member(0, (1, 0))


@pytest.mark.parametrize("stage", [0, 3])
def test_unknown_stage_is_an_error(stage):
    with pytest.raises(InputError, match=f"stage is {stage}"):
        SlicedAdapters(vit(), 2, **LORA).stage(stage)


def test_shard_with_another_number_of_slices_is_an_error():
    parts = slices(shards=2, count=2)
    with pytest.raises(InputError, match="Shard 1 has 1 slices, but must have 2"):
        ensemble([parts[0], parts[1][:1]], 1, count=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ["qurey"]}, "targets is.*qurey.*q_proj"),
        ({"layers": "vit.layer"}, "no layer 'vit.layer'.*vit.layers"),
        ({"head": "clasifier"}, "no layer 'clasifier'.*classifier"),
        ({"rank": 0}, "rank is 0"),
    ],
)
def test_bad_adapter_settings_are_named(settings, message):
    with pytest.raises(InputError, match=message):
        SlicedAdapters(vit(), 2, **settings)


def test_model_without_a_stack_is_an_error(trained_cnn):
    with pytest.raises(InputError, match="DigitsCNN has no stack of layers"):
        SlicedAdapters(trained_cnn, 2)


def test_fewer_samples_than_slices_is_an_error():
    with pytest.raises(InputError, match=r"5 samples.*6 slices"):
        split_shards(5, 3, 2)
