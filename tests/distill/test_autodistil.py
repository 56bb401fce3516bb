"""AutoDistil: relations and slices against the authors' code, sub-networks against plain BERTs, training and search."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from retouch.core import seeds
from retouch.core.data import TensorData
from retouch.core.errors import InputError
from retouch.core.loop import Callback, Checkpoint, fit
from retouch.distill.autodistil import (
    Arch,
    AutoDistil,
    SandwichSampler,
    SearchSpace,
    SuperTransformer,
    bert,
    bert_param_count,
    kept_layers,
    padding_mask,
    qkv_layers,
    relation_loss,
    relation_scores,
    sub_space,
)

DRAW = torch.Generator().manual_seed(0)
SPACE = SearchSpace((2, 3, 4), (3, 4, 6), (16, 32, 48), (2.0, 3.0))  # of teachers of 4 layers, 6 heads of 8
MIDDLE = Arch(3, 4, 32, 2.0)


def normal(*shape):
    return torch.randn(*shape, generator=DRAW, dtype=torch.float64)


def three(width, length=5, batch=2):
    return tuple(normal(batch, length, width) for _ in range(3))


def tiny_bert(kind="BertForSequenceClassification", seed=0, **changes):
    import transformers

    sizes = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 6, "intermediate_size": 144}
    more = {"vocab_size": 40, "num_labels": 3, "max_position_embeddings": 16, "initializer_range": 0.2, **changes}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return getattr(transformers, kind)(transformers.BertConfig(**sizes, **more)).eval()


@pytest.fixture
def teacher():
    return tiny_bert()


@pytest.fixture
def texts():
    draw = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 8, (48, 1), generator=draw)
    tokens = torch.randint(1, 40, (48, 7), generator=draw)
    mask = (torch.arange(7) < lengths).long()
    return TensorData({"input_ids": tokens * mask, "attention_mask": mask})


def made(teacher, **settings):
    return AutoDistil(teacher, SPACE, **{"lr": 1e-3, **settings})


def test_golden(golden):
    case = golden("autodistil")
    heads = int(case.param_heads)
    width, hidden = int(case.param_student_heads) * int(case.param_head_dim), int(case.param_student_hidden)
    mask, found = torch.tensor(case.in_additive_mask), {}
    for who, rows, columns in (("teacher", None, None), ("student", width, hidden)):
        x, found[who] = torch.tensor(getattr(case, f"in_{who}_hidden")), []
        for name in ("query", "key", "value"):
            weight = torch.tensor(getattr(case, f"param_{who}_{name}_weight"))[:rows, :columns]
            bias = torch.tensor(getattr(case, f"param_{who}_{name}_bias"))[:rows]
            found[who].append(F.linear(x, weight.to(x), bias.to(x)))
        for name, value in zip(("qq", "kk", "vv"), found[who], strict=True):
            settings = {"num_relation_heads": heads, "additive_mask": mask, "normalize": False}
            case.close(f"out_{who}_{name}", relation_scores(value, value, **settings))
    settings = {"num_relation_heads": heads, "additive_mask": mask, "divergence": "mse"}
    case.close("out_relation_mse", relation_loss(found["student"], found["teacher"], **settings))
    for name in ("tiny", "small", "base"):
        rows = sub_space(name).sorted_by_params(bert_param_count)
        case.close(f"out_{name}_archs", np.array([[a.layers, a.heads, a.hidden, a.mlp_ratio] for a, _ in rows]))
        case.close(f"out_{name}_params", np.array([count for _, count in rows]))
    for depth in (4, 6, 7, 9, 10):
        case.close(f"out_kept_layers_{depth}", np.array(kept_layers(num_layers=12, depth=depth)))


# --- spaces and samples -----------------------------------------------------------------------------------------------


def test_spaces_have_256_students_of_the_papers_sizes():
    limits = {"tiny": (4.4e6, 10.7e6), "small": (12.6e6, 28.2e6), "base": (39.2e6, 79.4e6)}
    for name, (low, high) in limits.items():
        space = sub_space(name)
        rows = space.sorted_by_params(bert_param_count)
        assert len(set(space.all())) == 256
        assert rows[0] == (space.smallest, pytest.approx(low, rel=0.01))
        assert rows[-1] == (space.largest, pytest.approx(high, rel=0.01))


def test_kept_layers_are_evenly_spread():
    assert kept_layers(12, 6) == [0, 2, 4, 6, 8, 10]
    assert kept_layers(12, 9) == [i for i in range(12) if i % 4 != 3]
    assert kept_layers(12, 12) == list(range(12))
    assert all(len(set(kept_layers(12, d))) == d for d in range(1, 13))


def test_a_sandwich_has_both_ends_and_is_the_same_at_the_same_step(global_rng_untouched):
    sampler, again = SandwichSampler(SPACE, 2, seed=3), SandwichSampler(SPACE, 2, seed=3)
    for step in range(50):
        archs = sampler.draw(step)
        assert archs[:2] == [SPACE.largest, SPACE.smallest]
        assert len(set(archs)) == 4
        assert archs == again.draw(step)
    assert len({tuple(sampler.draw(step)) for step in range(20)}) > 15
    assert SandwichSampler(SPACE, 2, seed=4).draw(0) != sampler.draw(0)


# --- relations --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", ["kl", "mse"])
def test_equal_relations_cost_nothing_and_widths_may_differ(divergence):
    ours, theirs = three(24), three(36)
    settings = {"num_relation_heads": 6, "divergence": divergence}
    assert abs(relation_loss(ours, ours, **settings)) < 1e-12
    loss = relation_loss(ours, theirs, **settings)
    assert loss > 0.01
    for position in range(3):  # a rotation within each relation head
        turned = list(ours)
        rotation = torch.block_diag(*[torch.linalg.qr(normal(4, 4)).Q for _ in range(6)])
        turned[position] = ours[position] @ rotation
        torch.testing.assert_close(relation_loss(turned, theirs, **settings), loss)
        scaled = list(ours)
        scaled[position] = 2 * ours[position]
        assert abs(relation_loss(scaled, theirs, **settings) - loss) > 1e-3


def test_the_losses_are_those_written_out():
    ours, theirs = three(13), three(12)  # the last channel of 13 is left over
    mask = torch.tensor([[0.0, 0, 0, 0, 0], [0, 0, 0, -1e4, -1e4]], dtype=torch.float64)[:, None, None]
    kl = mse = 0.0
    for a, b in zip(ours, theirs, strict=True):
        raw = []
        for x in (a, b):
            heads = x[..., :12].view(2, 5, 3, 4).permute(0, 2, 1, 3)
            raw.append(torch.einsum("bhid,bhjd->bhij", heads, heads) / 2)
        p, q = ((scores + mask).softmax(-1) for scores in (raw[1], raw[0]))
        kl += torch.where(p > 0, p * (p.clamp_min(1e-300) / q.clamp_min(1e-300)).log(), 0.0).sum() / (2 * 3 * 5)
        mse += (raw[0] - raw[1]).square().mean()
    settings = {"num_relation_heads": 3, "additive_mask": mask}
    torch.testing.assert_close(relation_loss(ours, theirs, **settings), kl)
    torch.testing.assert_close(relation_loss(ours, theirs, divergence="mse", **settings), mse)
    torch.testing.assert_close(relation_scores(ours[0], ours[0], **settings).sum(-1), torch.ones(2, 3, 5).double())
    left_over = (torch.cat([ours[0][..., :12], 9 * ours[0][..., 12:]], -1), *ours[1:])
    torch.testing.assert_close(relation_loss(left_over, theirs, **settings), kl)


def test_padding_is_not_related_to_and_masks_may_be_infinite():
    ours, theirs = three(12), three(12)
    mask = torch.zeros(2, 1, 1, 5, dtype=torch.float64)
    mask[..., 4:] = -1e4
    scores = relation_scores(ours[0], ours[0], num_relation_heads=3, additive_mask=mask)
    assert (scores[..., 4] == 0).all()
    settings = {"num_relation_heads": 3}
    finite = relation_loss(ours, theirs, additive_mask=mask, **settings)
    infinite = mask.masked_fill(mask < 0, -math.inf)
    torch.testing.assert_close(relation_loss(ours, theirs, additive_mask=infinite, **settings), finite)
    half = [[x.half() for x in side] for side in (ours, theirs)]
    single = [[x.half().float() for x in side] for side in (ours, theirs)]
    rough, exact = (
        relation_loss(*sides, additive_mask=mask.to(sides[0][0]), divergence="mse", **settings)
        for sides in (half, single)
    )
    assert float(rough) == pytest.approx(float(exact), rel=2e-2)  # no digits are lost to the mask


def test_the_teacher_gets_no_gradient():
    ours, theirs = ([x.requires_grad_() for x in three(12)] for _ in range(2))
    relation_loss(ours, theirs, num_relation_heads=3).backward()
    assert all(x.grad.abs().sum() > 0 for x in ours)
    assert all(x.grad is None for x in theirs)


def test_relations_of_llama(tiny_llama):
    """Any attention with layers for query, key and value, here with fewer keys than queries."""
    import transformers

    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 32, "vocab_size": 40}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)
        teacher = transformers.LlamaForCausalLM(config).eval()
    from retouch.core.features import capture

    inputs = {"input_ids": torch.randint(1, 40, (2, 5), generator=DRAW)}
    found = []
    for model in (tiny_llama, teacher):
        layers = qkv_layers(model)
        assert layers[0] == "model.layers.1.self_attn.q_proj"
        with capture(model, layers) as seen:
            model(**inputs)
        found.append([seen[name] for name in layers])
    loss = relation_loss(*found, num_relation_heads=4)
    loss.backward()
    assert loss > 0
    assert tiny_llama.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
    assert abs(relation_loss(found[1], found[1], num_relation_heads=4)) < 1e-6


# --- the super-network ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["BertModel", "BertForSequenceClassification", "BertForMaskedLM"])
def test_the_largest_is_the_teacher(kind, texts, global_rng_untouched):
    teacher = tiny_bert(kind)
    before = copy.deepcopy(teacher.state_dict())
    net = SuperTransformer.from_teacher(teacher, SPACE).eval()
    inputs = texts[torch.arange(6)]
    output, ours = net(**inputs, return_qkv=True)
    expected = teacher(**inputs)
    assert torch.equal(output[0], expected[0])
    theirs = made(teacher).relations(inputs)
    assert relation_loss(ours, theirs, num_relation_heads=6, additive_mask=padding_mask(inputs)).abs() < 1e-6
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize("kind", ["BertModel", "BertForSequenceClassification"])
def test_what_is_cut_out_does_what_the_sub_network_did(kind, texts, global_rng_untouched):
    net = SuperTransformer.from_teacher(tiny_bert(kind), SPACE).eval()
    inputs = texts[torch.arange(6)]
    for arch in (MIDDLE, SPACE.smallest, Arch(2, 6, 16, 3.0), SPACE.largest):
        student = net.extract(arch)
        output, qkv = net.set_arch(arch)(**inputs, return_qkv=True)
        torch.testing.assert_close(student(**inputs)[0], output[0], rtol=0, atol=1e-6)
        assert type(student).__name__ == kind
        assert all(x.shape == (6, 7, 8 * arch.heads) for x in qkv)
        assert len(student.base_model.encoder.layer) == arch.layers
        assert not any(p.is_meta for p in [*student.parameters(), *student.buffers()])
        with torch.no_grad():
            next(student.parameters()).add_(1)  # weights of its own
        torch.testing.assert_close(net(**inputs)[0], output[0])


def test_sizes_are_counted_exactly(teacher):
    net = AutoDistil(teacher, SPACE)
    for arch in (MIDDLE, SPACE.smallest, SPACE.largest):
        h, inner, mlp = arch.hidden, 8 * arch.heads, arch.mlp
        layer = 3 * (h * inner + inner) + inner * h + h + 2 * h + (h * mlp + mlp) + (mlp * h + h) + 2 * h
        expected = h * (40 + 16 + 2) + 2 * h + arch.layers * layer + (h * h + h) + (3 * h + 3)
        assert net.parameters(arch) == expected == sum(p.numel() for p in net.extract(arch).parameters())
        assert abs(bert_param_count(arch, vocab=40, positions=16, head_dim=8) / expected - 1) > 0.01  # only an order


def test_operations_are_those_of_the_layers(teacher):
    from torch.utils.flop_counter import FlopCounterMode

    net = AutoDistil(teacher, SPACE)
    student = net.extract(MIDDLE).bert
    student.set_attn_implementation("eager")  # whose operations torch counts on the CPU as well
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        student.encoder(torch.zeros(1, 7, 32))
    assert net.flops(MIDDLE, length=7) == counter.get_total_flops()


def test_layers_are_dropped_evenly(teacher, texts):
    net = SuperTransformer.from_teacher(teacher, SPACE)
    student = net.extract(Arch(2, 6, 48, 3.0))
    for mine, its in enumerate((0, 2)):
        one, two = student.bert.encoder.layer[mine].state_dict(), teacher.bert.encoder.layer[its].state_dict()
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_layer_norm_is_over_the_slice_alone(teacher, texts):
    net = SuperTransformer.from_teacher(teacher, SPACE).eval().set_arch(MIDDLE)
    states = net.extract(MIDDLE).bert(**texts[torch.arange(6)]).last_hidden_state
    norm = net.storage.bert.encoder.layer[2].output.LayerNorm  # the last of layers 0, 1, 2 of 4
    plain = (states - norm.bias[:32]) / norm.weight[:32]
    torch.testing.assert_close(plain.mean(-1), torch.zeros(6, 7), rtol=0, atol=1e-5)
    torch.testing.assert_close(plain.var(-1, unbiased=False), torch.ones(6, 7), rtol=1e-3, atol=1e-3)


def test_gradients_stay_within_the_slice(teacher, texts):
    net = made(teacher)
    inputs = texts[torch.arange(6)]
    net.model.set_arch(MIDDLE)
    net.loss(net.model, inputs, [2 * x for x in net.relations(inputs)]).backward()
    inside = dict(net.model.shell(MIDDLE).named_parameters())
    kept = kept_layers(4, 3)
    touched = 0
    for name, parameter in net.model.storage.named_parameters():
        parts = name.split(".")
        mine = name
        if "layer" in parts:
            number = int(parts[3])
            if number not in kept:
                assert parameter.grad is None, name
                continue
            mine = ".".join([*parts[:3], str(kept.index(number)), *parts[4:]])
        if parameter.grad is None:
            continue
        outside = parameter.grad.clone()
        outside[tuple(slice(n) for n in inside[mine].shape)] = 0
        assert not outside.any(), name
        touched += int(parameter.grad.abs().sum() > 0)
    assert touched > 20


def test_smaller_teachers_and_other_models_are_refused(teacher, tiny_vit):
    with pytest.raises(
        InputError, match="The largest hidden of the space is 64, but must be at least 1 and at most 48"
    ):
        SuperTransformer.from_teacher(teacher, SearchSpace((2,), (3,), (64,), (2.0,)))
    with pytest.raises(InputError, match="The largest layers of the space is 5, but must"):
        SuperTransformer.from_teacher(teacher, SearchSpace((5,), (3,), (16,), (2.0,)))
    with pytest.raises(InputError, match="must be a BertModel or a class on it"):
        SuperTransformer.from_teacher(tiny_vit, SPACE)
    with pytest.raises(InputError, match="must be a BertModel or a class on it"):
        SuperTransformer.from_teacher(nn.Linear(3, 3), SPACE)


BAD = {
    "heads": (lambda net: net.set_arch(Arch(3, 5, 32, 2.0)), "heads of the architecture is 5, but must be one of 3, 4"),
    "layers": (lambda net: net.extract(Arch(1, 4, 32, 2.0)), "layers of the architecture is 1, but must be one of 2"),
    "half heads": (lambda net: Arch(3, 4.5, 32, 2.0), r"heads is 4\.5, but must be a whole number"),
    "none": (lambda net: Arch(0, 4, 32, 2.0), "layers is 0, but must be greater than 0"),
    "ratio": (lambda net: Arch(3, 4, 32, 0.3), r"mlp_ratio is 0\.3, but its product with hidden 32 must be whole"),
    "space": (lambda net: sub_space("huge"), "name is 'huge', but must be one of 'tiny', 'small', 'base'"),
    "depth": (lambda net: kept_layers(12, 13), "depth is 13, but must be at least 1 and at most 12"),
    "extra": (lambda net: SandwichSampler(SPACE, 53), "extra is 53, but must be at least 0 and at most 52"),
    "narrow": (
        lambda net: relation_loss(three(5), three(12), num_relation_heads=6),
        "num_relation_heads is 6, but must be at least 1 and at most 5",
    ),
    "lengths": (
        lambda net: relation_loss(three(12, length=4), three(12), num_relation_heads=3),
        r"\(batch, length\) \(2, 4\) and the teacher \(2, 5\), but both must read the same tokens",
    ),
    "pair": (
        lambda net: relation_scores(normal(2, 5, 12), normal(2, 4, 12), num_relation_heads=3),
        r"a has shape \(2, 5, 12\) and b \(2, 4, 12\)",
    ),
    "divergence": (
        lambda net: relation_loss(three(12), three(12), num_relation_heads=3, divergence="js"),
        "divergence is 'js', but must be one of 'kl', 'mse'",
    ),
    "no attention": (lambda net: qkv_layers(nn.Linear(2, 2)), "Linear has no layers named query, key, value or"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_refused(kind, teacher):
    call, message = BAD[kind]
    with pytest.raises(InputError, match=message):
        call(SuperTransformer.from_teacher(teacher, SPACE))


def test_relation_heads_must_fit_the_narrowest_student(teacher):
    with pytest.raises(InputError, match="num_relation_heads is 25, but must be at least 1 and at most 24"):
        made(teacher, num_relation_heads=25)


# --- training and search ----------------------------------------------------------------------------------------------


def test_a_step_sums_the_losses_of_four(teacher, texts):
    net = made(tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    inputs = texts[torch.arange(8)]
    losses = net(net.model, inputs)
    assert list(losses) == ["largest", "smallest", "random 1", "random 2"]
    theirs = net.relations(inputs)
    for arch, loss in zip(net.sampler.draw(0), losses.values(), strict=True):
        assert torch.equal(net.loss(net.model.set_arch(arch), inputs, theirs), loss)
    sum(losses.values()).backward()
    whole = {name: p.grad.clone() for name, p in net.model.named_parameters() if p.grad is not None}
    net.model.zero_grad()
    for arch in net.sampler.draw(0):
        net.loss(net.model.set_arch(arch), inputs, theirs).backward()
    for name, parameter in net.model.named_parameters():
        if name in whole:
            torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-4, atol=1e-6)


def test_training_lowers_the_loss_and_leaves_the_teacher_alone(teacher, texts, global_rng_untouched):
    before = copy.deepcopy(teacher.state_dict())
    net = made(teacher)
    archs = [SPACE.smallest, MIDDLE]
    start = net.losses(archs, texts)
    history = net.train(texts, steps=15, batch_size=16, progress=False)
    assert history["lr"][0] > history["lr"][-1] == 0
    assert all(after < 0.9 * first for after, first in zip(net.losses(archs, texts), start, strict=True))
    assert net.model.arch == SPACE.largest
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any(p.requires_grad for p in net.teacher.parameters())


def test_labels_are_not_used(teacher, texts):
    labelled = TensorData(texts.inputs, torch.arange(48) % 3)
    found = []
    for data in (texts, labelled):
        net = made(teacher)
        net.train(data, steps=2, batch_size=16, progress=False)
        found.append(net.model.storage.bert.embeddings.word_embeddings.weight)
    assert torch.equal(*found)
    bare = made(teacher)
    assert bare(bare.model, texts.inputs["input_ids"][:4])["largest"] >= 0  # token ids alone


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(teacher, texts, tmp_path):
    class Kill(Callback):
        def __init__(self, step):
            self.step = step

        def on_gradients(self, run):
            if run.step == self.step:
                raise KeyboardInterrupt

    def weights(checkpoint, kill):
        net = made(teacher)
        settings = {"steps": 6, "checkpoint": checkpoint, "callbacks": [Kill(kill)], "progress": False}
        net.train(texts, batch_size=16, **settings)
        return torch.cat([p.detach().flatten() for p in net.model.parameters()])

    checkpoint = Checkpoint(tmp_path, every=3)
    with pytest.raises(KeyboardInterrupt):
        weights(checkpoint, 4)
    assert torch.equal(weights(checkpoint, -1), weights(None, -1))


def test_search_ranks_what_is_within_the_budget(teacher, texts):
    net = made(teacher)
    net.train(texts, steps=5, batch_size=16, progress=False)
    rows = net.search(texts, max_params=30_000)
    assert rows and all(row.params == net.parameters(row.arch) <= 30_000 for row in rows)
    assert [row.loss for row in rows] == sorted(row.loss for row in rows)
    assert len(rows) == sum(net.parameters(arch) <= 30_000 for arch in SPACE.all())
    assert rows[0].loss == pytest.approx(net.losses([rows[0].arch], texts)[0])
    cap = net.flops(MIDDLE, 7)
    assert all(row.flops <= cap for row in net.search(texts, max_flops=cap, length=7))
    assert len(net.search(texts)) == len(SPACE.all())
    with pytest.raises(InputError, match=r"max_params is 10 and max_flops None, .* the smallest has \d+ parameters"):
        net.search(texts, max_params=10)
    with pytest.raises(InputError, match="max_params is 0 and max_flops None"):
        net.search(texts, max_params=0)
    with pytest.raises(InputError, match="archs is empty, but must hold"):
        net.search(texts, archs=[])
    by_proxy = net.search(texts, archs=[MIDDLE, SPACE.smallest], proxy=lambda s: -float(s.config.hidden_size))
    assert [row.arch for row in by_proxy] == [MIDDLE, SPACE.smallest]
    assert net.model.arch == SPACE.largest


def test_a_student_can_be_distilled_on_alone_and_fine_tuned(teacher, texts, tmp_path):
    net = made(teacher)
    student = net.extract(MIDDLE)
    alone, weights = net.alone(MIDDLE), copy.deepcopy(net.model.state_dict())
    assert list(alone(alone.model, texts[torch.arange(4)])) == ["largest"]
    start = alone.losses([MIDDLE], texts)
    assert start == pytest.approx(net.losses([MIDDLE], texts), rel=1e-5)
    alone.train(texts, steps=10, batch_size=16, progress=False)
    assert alone.losses([MIDDLE], texts) < start
    assert all(torch.equal(value, weights[name]) for name, value in net.model.state_dict().items())
    assert len(alone.train(texts, batch_size=16, progress=False)) == 8 * 3  # 8 epochs unless told
    single = AutoDistil(teacher, SearchSpace((3,), (4,), (32,), (2.0,)), extra=0)  # a space of one
    assert single.losses([MIDDLE], texts) == pytest.approx(start, rel=1e-5)
    history = fit(student, TensorData(texts.inputs, torch.arange(48) % 3), steps=2)
    assert len(history) == 2
    from retouch.core.checkpoints import load_tensors, save_tensors

    save_tensors(tmp_path / "student.safetensors", student.state_dict())
    with seeds.isolated(0):
        again = bert(teacher, MIDDLE).eval()
    again.load_state_dict(load_tensors(tmp_path / "student.safetensors"))
    inputs = texts[torch.arange(4)]
    assert torch.equal(again(**inputs).logits, student.eval()(**inputs).logits)


@pytest.mark.slow
def test_the_papers_spaces_are_cut_from_bert_base():
    """Real sizes, on a BERT-base of random weights and a small vocabulary."""
    import transformers

    config = transformers.BertConfig(vocab_size=50)
    with seeds.isolated(0):
        teacher = transformers.BertModel(config).eval()
    inputs = {"input_ids": torch.randint(1, 50, (1, 6), generator=DRAW)}
    for name in ("tiny", "base"):
        net = SuperTransformer.from_teacher(teacher, sub_space(name)).eval()
        arch = sub_space(name).smallest
        student = net.extract(arch)
        torch.testing.assert_close(
            student(**inputs).last_hidden_state, net.set_arch(arch)(**inputs).last_hidden_state, rtol=0, atol=1e-5
        )
        assert student.encoder.layer[0].attention.self.query.weight.shape == (64 * arch.heads, arch.hidden)
