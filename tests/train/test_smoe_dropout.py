"""SMoE-Dropout: frozen routing, experts that are the dense MLP, and the same numbers by every way of computing them."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from retouch.core.batches import in_order
from retouch.core.data import TensorData
from retouch.core.errors import InputError
from retouch.core.loop import Callback, Checkpoint, fit
from retouch.core.models import predict
from retouch.train.smoe_dropout import (
    SMoEDropoutMLP,
    SMoEDropoutSchedule,
    apply_smoe_dropout,
    by_expert,
    convert,
    dense_experts,
    find_mlps,
    num_active_experts,
    recipe,
    remove_smoe_dropout,
    route_top_k,
    set_active_experts,
    sparse_experts,
)

DRAW = torch.Generator().manual_seed(0)
TOKENS = torch.randn(30, 8, generator=DRAW)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def layer(n=4, seed=0, **settings):
    return SMoEDropoutMLP(8, 6, num_experts=n, generator=seeded(seed), **settings)


def experts_of(module, tokens):
    """Each expert's output (n, experts, d), written out."""
    hidden = torch.einsum("td,nhd->tnh", tokens, module.w1) + module.b1
    return torch.einsum("tnh,ndh->tnd", F.relu(hidden), module.w2) + module.b2


def dense(bias=True):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Linear(8, 24, bias=bias), nn.Linear(24, 8, bias=bias)


def silence(module):
    """Give every expert of every layer the same logit."""
    for part in module.modules():
        if isinstance(part, SMoEDropoutMLP):
            part.router.weight.zero_()
            part.router.bias.zero_()


# --- routing --------------------------------------------------------------------------------------------------------


def test_equal_logits_and_all_experts_give_the_mean_of_the_experts():
    mlp = layer()
    silence(mlp)
    torch.testing.assert_close(mlp(TOKENS), experts_of(mlp, TOKENS).mean(1))


def test_one_expert_has_weight_one_and_is_the_likeliest():
    mlp = layer()
    mlp.k = 1
    indices, weights = route_top_k(TOKENS, mlp.router.weight, mlp.router.bias, 1)
    assert torch.equal(weights, torch.ones(30, 1))
    assert torch.equal(indices[:, 0], F.linear(TOKENS, mlp.router.weight, mlp.router.bias).argmax(1))
    torch.testing.assert_close(mlp(TOKENS), experts_of(mlp, TOKENS)[torch.arange(30), indices[:, 0]])


def test_weights_sum_to_one_and_active_experts_are_nested():
    weight, bias = torch.randn(16, 8, generator=DRAW), torch.randn(16, generator=DRAW)
    before = torch.zeros(30, 16, dtype=torch.bool)
    for k in range(1, 17):
        indices, weights = route_top_k(TOKENS, weight, bias, k)
        torch.testing.assert_close(weights.sum(-1), torch.ones(30))
        now = by_expert(indices, torch.ones(30, k), 16) > 0
        assert torch.equal(now.sum(1), torch.full((30,), k))
        assert (now | ~before).all()
        before = now


def test_ties_go_by_position():
    indices, weights = route_top_k(torch.zeros(2, 3, 8), torch.zeros(5, 8), None, 2)
    assert torch.equal(indices, torch.tensor([0, 1]).expand(2, 3, 2))
    assert torch.equal(weights, torch.full((2, 3, 2), 0.5))


def test_weights_are_a_softmax_of_the_active_logits_only():
    weight = torch.randn(6, 8, generator=DRAW)
    logits = F.linear(TOKENS, weight)
    indices, weights = route_top_k(TOKENS, weight, None, 3)
    torch.testing.assert_close(weights, logits.gather(1, indices).softmax(1))
    truncated = logits.softmax(1).gather(1, indices)  # of all, and then cut: its sum changes with k
    assert truncated.sum(1).min() < 0.8


# --- computing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_sorting_tokens_equals_computing_all_experts_with_gradients(k):
    mlp = layer()
    mlp.k = k
    found = []
    for sparse in (False, True):
        mlp.sparse = sparse
        tokens = TOKENS.clone().requires_grad_()
        output = mlp(tokens)
        gradients = torch.autograd.grad(output.square().sum(), [tokens, *mlp.parameters()])
        found.append([output, *gradients])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    indices, weights = route_top_k(TOKENS, mlp.router.weight, mlp.router.bias, k)
    written_out = (experts_of(mlp, TOKENS) * by_expert(indices, weights, 4)[..., None]).sum(1)
    torch.testing.assert_close(found[0][0], written_out)


def test_gated_experts_without_biases():
    gate, up, down = (torch.randn(shape, generator=DRAW) for shape in ((4, 6, 8), (4, 6, 8), (4, 8, 6)))
    from retouch.train.smoe_dropout import Experts

    experts = Experts(((gate, None), (up, None)), down, None, F.silu)
    indices, weights = route_top_k(TOKENS, torch.randn(4, 8, generator=DRAW), None, 2)
    expected = torch.zeros(30, 8)
    for row in range(30):
        for e, w in zip(indices[row], weights[row], strict=True):
            expected[row] += w * (down[e] @ (F.silu(gate[e] @ TOKENS[row]) * (up[e] @ TOKENS[row])))
    for mix in (dense_experts, sparse_experts):
        torch.testing.assert_close(mix(TOKENS, indices, weights, experts), expected, rtol=1e-4, atol=1e-4)


def test_tokens_are_sorted_only_below_half_of_the_experts_and_where_it_pays():
    mlp = SMoEDropoutMLP(64, 64, num_experts=16, generator=seeded())
    for k, tokens, expected in ((4, 4096, True), (7, 4096, True), (8, 4096, False), (16, 4096, False), (4, 8, False)):
        mlp.k = k
        assert mlp.sorts(torch.empty(tokens, 64)) is expected


@pytest.mark.parametrize("sparse", [False, True])
def test_no_tokens_and_experts_that_nobody_chose(sparse):
    mlp = layer(n=16)
    mlp.k, mlp.sparse = 1, sparse
    assert mlp(torch.zeros(0, 8)).shape == (0, 8)
    assert mlp(torch.zeros(2, 0, 8)).shape == (2, 0, 8)
    loss = mlp(TOKENS[:1]).sum()
    assert all(g is not None for g in torch.autograd.grad(loss, list(mlp.parameters())))


def test_shapes_dtypes_and_dropout():
    mlp = layer(dropout=0.5).double()
    assert mlp(TOKENS.double().view(5, 6, 8)).dtype == torch.float64
    assert (mlp.train()(TOKENS.double()) == 0).any()
    assert torch.equal(mlp.eval()(TOKENS.double()), mlp(TOKENS.double()))


# --- the router -----------------------------------------------------------------------------------------------------


def test_the_router_is_saved_is_no_parameter_and_never_changes():
    mlp = layer()
    start = mlp.router.weight.clone(), mlp.router.bias.clone()
    assert {"router.weight", "router.bias"} <= mlp.state_dict().keys()
    assert not [name for name, _ in mlp.named_parameters() if "router" in name]
    assert not mlp.router.weight.requires_grad
    data = TensorData(TOKENS, torch.arange(30) % 4)
    model = nn.Sequential(mlp, nn.Linear(8, 4))
    fit(model, data, steps=5, optimizer=lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5))
    assert torch.equal(mlp.router.weight, start[0])
    assert torch.equal(mlp.router.bias, start[1])


def test_weights_begin_like_linear_layers():
    mlp = SMoEDropoutMLP(64, 25, num_experts=32, generator=seeded())
    for weight, fan in ((mlp.w1, 64), (mlp.w2, 25), (mlp.router.weight, 64)):
        assert weight.abs().max() <= 1 / math.sqrt(fan)
        assert float(weight.detach().std()) == pytest.approx(1 / math.sqrt(3 * fan), rel=0.05)
    assert not torch.equal(mlp.router.weight, SMoEDropoutMLP(64, 25, num_experts=32, generator=seeded(1)).router.weight)


def test_a_pass_of_initial_weights_does_not_reach_the_router(tiny_vit):
    model = convert(tiny_vit, num_experts=4)
    start = {name: b.clone() for name, b in model.named_buffers() if "router" in name}
    model.apply(model._init_weights)
    assert all(torch.equal(dict(model.named_buffers())[name], b) for name, b in start.items())


# --- from a dense MLP -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3, 4, 8])
@pytest.mark.parametrize("bias", [True, False])
def test_all_experts_at_equal_weights_are_the_dense_mlp(n, bias):
    fc1, fc2 = dense(bias)
    mlp = SMoEDropoutMLP.from_dense(fc1, fc2, num_experts=n, generator=seeded())
    silence(mlp)
    torch.testing.assert_close(mlp(TOKENS), fc2(F.relu(fc1(TOKENS))), rtol=1e-5, atol=1e-6)
    small = SMoEDropoutMLP.from_dense(fc1, fc2, num_experts=n, rescale=False)
    silence(small)
    torch.testing.assert_close(n * small(TOKENS), fc2(F.relu(fc1(TOKENS))), rtol=1e-5, atol=1e-6)


def test_the_number_of_weights_stays_but_for_output_biases():
    fc1, fc2 = dense()
    mlp = SMoEDropoutMLP.from_dense(fc1, fc2, num_experts=4)
    own = sum(p.numel() for p in mlp.parameters())
    assert own == sum(p.numel() for part in (fc1, fc2) for p in part.parameters()) + 3 * 8
    assert mlp.w1.data_ptr() != fc1.weight.data_ptr()
    assert sum(b.numel() for b in mlp.buffers()) == 4 * 8 + 4


def test_rescaling_takes_outputs_to_the_dense_size_at_any_k():
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        fc1, fc2 = nn.Linear(64, 256, bias=False), nn.Linear(256, 64, bias=False)
    tokens = torch.randn(500, 64, generator=seeded())
    mlp = SMoEDropoutMLP.from_dense(fc1, fc2, num_experts=16, generator=seeded())
    size = fc2(F.relu(fc1(tokens))).std()
    sizes = [float((mlp(tokens).std() / size).detach()) for mlp.k in (16, 8, 4)]
    assert sizes[0] == pytest.approx(1, abs=0.3)
    assert sizes[0] < sizes[1] < sizes[2] < 3  # about sqrt(N / k)


# --- the schedule ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["linear_increase", "cosine_increase", "exp_increase"])
def test_the_ramp_starts_at_the_minimum_never_falls_and_ends_at_the_maximum(mode):
    ramp = [num_active_experts(s, 900, minimum=8, maximum=16, mode=mode) for s in range(4000)]
    assert ramp[0] == 8
    assert ramp[900] == 16
    assert all(a <= b for a, b in itertools.pairwise(ramp))
    assert set(ramp) == set(range(8, 17))
    assert [num_active_experts(s, 900, minimum=5, maximum=5, mode=mode) for s in (0, 9, 900, 2000)] == [5] * 4


def test_the_ramps_in_numbers():
    halves = [num_active_experts(s, 16, minimum=8, maximum=16) for s in range(17)]
    assert halves == [8, 8, 9, 10, 10, 10, 11, 12, 12, 12, 13, 14, 14, 14, 15, 16, 16]  # .5 goes to the even one
    late = [num_active_experts(s, 100, minimum=4, maximum=16, mode="cosine_increase") for s in (0, 50, 75, 100)]
    assert late == [4, 16 - round(12 * math.cos(math.pi / 4)), 16 - round(12 * math.cos(3 * math.pi / 8)), 16]
    early = [num_active_experts(s, 600, minimum=4, maximum=16, mode="exp_increase") for s in (0, 1, 200, 600)]
    assert early == [4, 4, 16 - round(12 * 0.99**100), 15]  # short of 16: the ramp is longer than 10
    assert num_active_experts(0, 1, minimum=1, maximum=1) == 1


def test_mean_share_of_active_experts_from_half_to_all_is_three_quarters():
    ramp = [num_active_experts(s, 1000, minimum=8, maximum=16) for s in range(1000)]
    assert sum(ramp) / 1000 / 16 == pytest.approx(0.75, abs=0.01)


def test_the_callback_in_fit_and_by_hand():
    model = nn.Sequential(layer(n=8), nn.Linear(8, 2))
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(module.k))
    history = fit(
        model, TensorData(TOKENS, torch.arange(30) % 2), steps=16, batch_size=30, callbacks=[SMoEDropoutSchedule(model)]
    )
    expected = [num_active_experts(s, 16, minimum=4, maximum=8) for s in range(17)]
    assert seen == history["active_experts"] == expected[:16]
    assert model[0].k == 8
    by_hand = SMoEDropoutSchedule(model, total_steps=16, minimum=2, maximum=6)
    assert [by_hand.on_step(s) for s in (0, 8, 16, 99)] == [2, 4, 6, 6]
    assert model[0].k == 6


class Kill(Callback):
    def __init__(self, at):
        self.at = at

    def on_step(self, run):
        if run.step == self.at:
            raise InterruptedError


def test_a_run_that_was_killed_resumes_to_the_same_weights(tmp_path, global_rng_untouched):
    def train(folder, kill=None, seed=0):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            mlp = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
            model = apply_smoe_dropout(nn.Sequential(mlp, nn.Linear(8, 2)), num_experts=8, seed=seed)
        data, callbacks = TensorData(TOKENS, torch.arange(30) % 2), [SMoEDropoutSchedule(model), Kill(kill)]
        fit(model, data, steps=12, batch_size=10, callbacks=callbacks, checkpoint=Checkpoint(folder, every=2))
        return model.state_dict()

    whole = train(tmp_path / "whole")
    with pytest.raises(InterruptedError):
        train(tmp_path / "killed", kill=7)
    resumed = train(tmp_path / "killed", seed=5)  # another router, until the checkpoint brings back the first
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


BAD = {
    "k": (lambda: setattr(layer(), "k", 5), "k is 5, but must be at least 1 and at most 4"),
    "no k": (lambda: set_active_experts(nn.Sequential(layer(), layer(n=2)), 3), "k is 3, but must be .* at most 2"),
    "k of the router": (lambda: route_top_k(TOKENS, torch.zeros(4, 8), None, 0), "k is 0, but must be at least 1"),
    "not divisible": (
        lambda: SMoEDropoutMLP.from_dense(*dense(), num_experts=5),
        "num_experts is 5, but must divide the inner width 24",
    ),
    "do not fit": (
        lambda: SMoEDropoutMLP.from_dense(dense()[0], dense()[0], num_experts=4),
        r"weights \(24, 8\), but must have \(8, 24\)",
    ),
    "no steps": (lambda: num_active_experts(0, 0, minimum=1, maximum=2), "total_steps is 0, but must be at least 1"),
    "few steps": (
        lambda: num_active_experts(0, 299, minimum=1, maximum=2, mode="exp_increase"),
        "total_steps is 299, but must be at least 300",
    ),
    "minimum": (lambda: num_active_experts(0, 9, minimum=3, maximum=2), "minimum is 3, but must be .* at most 2"),
    "step": (lambda: num_active_experts(-1, 9, minimum=1, maximum=2), "step is -1, but must be at least 0"),
    "mode": (lambda: num_active_experts(0, 9, minimum=1, maximum=2, mode="up"), "mode is 'up', but must be one of"),
    "maximum": (lambda: SMoEDropoutSchedule(layer(), maximum=5), "maximum is 5, but must be .* at most 4"),
    "schedule": (lambda: SMoEDropoutSchedule(layer(), minimum=3, maximum=2), "minimum is 3, but must be"),
    "schedule mode": (lambda: SMoEDropoutSchedule(layer(), mode="x"), "mode is 'x'"),
    "no total": (lambda: SMoEDropoutSchedule(layer()).on_step(0), "total_steps is None, but must be given outside"),
    "no layers": (lambda: set_active_experts(nn.Linear(2, 2), 1), "Linear has no layers of experts, but must"),
    "no mlp": (lambda: convert(nn.Sequential(nn.Linear(2, 2))), "Sequential has no two-layer or gated MLP"),
    "no experts": (lambda: layer(n=0), "num_experts is 0, but must be greater than 0"),
    "activation": (lambda: layer(activation="swish"), "activation is 'swish', but must be one of 'relu', 'gelu'"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_refused(kind):
    call, message = BAD[kind]
    with pytest.raises(InputError, match=message):
        call()


def test_a_k_that_one_layer_refuses_changes_none():
    model = nn.Sequential(layer(), layer(n=2))
    with pytest.raises(InputError):
        set_active_experts(model, 4)
    assert [part.k for part in model] == [4, 2]
    set_active_experts(model, 1)
    assert [part.k for part in model] == [1, 1]


# --- in real models -------------------------------------------------------------------------------------------------

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def build(kind):
    import transformers as t

    narrow = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 30}
    words = {"vocab_size": 30, **TINY}
    makers = {
        "vit": lambda: t.ViTForImageClassification(t.ViTConfig(image_size=8, patch_size=4, num_channels=1, **TINY)),
        "bert": lambda: t.BertForSequenceClassification(t.BertConfig(**words)),
        "roberta": lambda: t.RobertaForSequenceClassification(t.RobertaConfig(**words)),
        "albert": lambda: t.AlbertForSequenceClassification(t.AlbertConfig(embedding_size=8, **words)),
        "distilbert": lambda: t.DistilBertForSequenceClassification(
            t.DistilBertConfig(vocab_size=30, dim=16, hidden_dim=32, n_layers=2, n_heads=2)
        ),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(**narrow)),
        "neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**words)),
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**words)),
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return makers[kind]().eval()


KINDS = ("vit", "bert", "roberta", "albert", "distilbert", "gpt2", "neox", "llama")


def inputs_of(kind):
    if kind == "vit":
        return {"pixel_values": torch.rand(3, 1, 8, 8, generator=seeded(1))}
    return {"input_ids": torch.randint(3, 30, (3, 7), generator=seeded(1))}


@pytest.mark.parametrize("kind", KINDS)
def test_real_models_with_equal_weights_are_dense_and_can_be_undone(kind, global_rng_untouched):
    model, inputs = build(kind), inputs_of(kind)
    before, state = model(**inputs).logits, {k: v.clone() for k, v in model.state_dict().items()}
    cut = convert(model, num_experts=4)
    assert len([m for m in cut.modules() if isinstance(m, SMoEDropoutMLP)]) == (1 if kind == "albert" else 2)
    assert not torch.equal(cut(**inputs).logits, before)  # random weights of experts
    assert torch.equal(model(**inputs).logits, before)
    added = cut.state_dict().keys() - state.keys()
    assert state.keys() <= cut.state_dict().keys()
    assert all(".experts." in name for name in added)
    own = {"router.weight", "router.bias"} | (set() if kind == "llama" else {"bias"})  # Llama's layers have no biases
    assert {name.rsplit("experts.")[1] for name in added} == own

    undone = remove_smoe_dropout(copy.deepcopy(cut))
    assert torch.equal(undone(**inputs).logits, before)
    assert undone.state_dict().keys() == state.keys()
    assert all(torch.equal(undone.state_dict()[name], value) for name, value in state.items())
    assert not [m for m in undone.modules() if m._forward_hooks or m._forward_pre_hooks]
    silence(cut)
    torch.testing.assert_close(cut(**inputs).logits, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 3])
def test_real_models_give_the_same_by_sorting_tokens(kind, k):
    model, inputs = convert(build(kind), num_experts=8, inplace=True), inputs_of(kind)
    layers = [m for m in model.modules() if isinstance(m, SMoEDropoutMLP)]
    set_active_experts(model, k)
    for part in layers:
        if part.bias is not None:
            part.bias.data = torch.randn(part.bias.shape, generator=seeded(2))
    found = []
    for sparse in (False, True):
        for part in layers:
            part.sparse = sparse
        logits = model(**inputs).logits
        gradients = torch.autograd.grad(
            logits.square().sum(), [p for p in model.parameters() if p.requires_grad], allow_unused=True
        )
        found.append([logits, *(g for g in gradients if g is not None)])
    assert len(found[0]) == len(found[1])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["vit", "gpt2", "llama"])
def test_experts_in_a_model_are_the_written_out_ones(kind):
    model = convert(build(kind), num_experts=4, inplace=True)
    mlp = find_mlps(model)[0]
    experts, tokens = mlp.last.experts, torch.randn(2, 5, 16, generator=seeded(3))
    experts.k = 2
    torch.testing.assert_close(mlp.holder.eval()(tokens), experts(tokens), rtol=1e-4, atol=1e-6)
    indices, weights = route_top_k(tokens, experts.router.weight, experts.router.bias, 2)
    cut = experts.experts
    parts = [torch.einsum("btd,nhd->btnh", tokens, w) + (0 if b is None else b) for w, b in cut.inner]
    outputs = 4 * torch.einsum("btnh,ndh->btnd", cut.units(parts), cut.outer)
    outputs = outputs + (0 if mlp.last.bias is None else mlp.last.bias)
    expected = (outputs * by_expert(indices, weights, 4)[..., None]).sum(2)
    torch.testing.assert_close(experts(tokens), expected, rtol=1e-4, atol=1e-6)


def test_which_mlps(tiny_vit):
    assert [mlp.name for mlp in find_mlps(tiny_vit)] == ["vit.layers.0.mlp", "vit.layers.1.mlp"]
    for match in (r"layers\.1", lambda name, holder: name.endswith("1.mlp")):
        model = convert(tiny_vit, num_experts=2, match=match)
        assert [n for n, m in model.named_modules() if isinstance(m, SMoEDropoutMLP)] == [
            "vit.layers.1.mlp.fc2.experts"
        ]
    assert len(find_mlps(build("bert"), r"0\.intermediate\.dense$")) == 1
    with pytest.raises(InputError, match="match='nowhere' takes none of them"):
        convert(tiny_vit, match="nowhere")


def test_what_cannot_be_cut_leaves_the_model_as_it_was(tiny_vit, tiny_llama):
    with pytest.raises(InputError, match="num_experts is 5, but must divide the inner width 32"):
        apply_smoe_dropout(tiny_llama, num_experts=5)
    assert not [m for m in tiny_llama.modules() if isinstance(m, SMoEDropoutMLP)]
    apply_smoe_dropout(tiny_vit, num_experts=2, match=r"layers\.1")
    with pytest.raises(InputError, match=r"The MLP in vit\.layers\.1\.mlp has experts already"):
        apply_smoe_dropout(tiny_vit, num_experts=2)
    assert len([m for m in tiny_vit.modules() if isinstance(m, SMoEDropoutMLP)]) == 1


def test_an_unknown_activation_is_left_to_the_model():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = dense()

        def forward(self, x):
            return self.fc2(torch.sin(self.fc1(x)))

    model = Odd()
    before = model(TOKENS)
    apply_smoe_dropout(model, num_experts=4)
    silence(model)
    torch.testing.assert_close(model(TOKENS), before, rtol=1e-5, atol=1e-6)
    set_active_experts(model, 1)
    assert model.fc2.experts.sorts(torch.empty(10**6, 8)) is False


def test_a_saved_model_comes_back(tiny_vit, tmp_path, digits_small):
    from safetensors.torch import load_file, save_file

    model, images = convert(tiny_vit, num_experts=4, seed=1), digits_small.test.inputs[:5]
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    again = convert(tiny_vit, num_experts=4, seed=2)
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    set_active_experts(model, 2), set_active_experts(again, 2)
    assert torch.equal(model(images).logits, again(images).logits)


def test_routers_follow_from_the_seed(tiny_vit):
    one, two, three = (convert(tiny_vit, num_experts=4, seed=seed) for seed in (0, 0, 1))
    first = [[m.router.weight for m in x.modules() if isinstance(m, SMoEDropoutMLP)] for x in (one, two, three)]
    assert torch.equal(first[0][0], first[1][0])
    assert not torch.equal(first[0][0], first[2][0])
    assert not torch.equal(first[0][0], first[0][1])  # each layer has its own


def test_trains_a_real_vit_by_recipe(tiny_vit, digits_small, global_rng_untouched):
    plan = recipe(tiny_vit, digits_small.train, num_experts=4, minimum=1)
    router = tiny_vit.vit.layers[0].mlp.fc2.experts.router.weight.clone()
    model, history = plan.fit(steps=6, batch_size=32)
    assert history["active_experts"] == [num_active_experts(s, 6, minimum=1, maximum=4) for s in range(6)]
    experts = model.vit.layers[0].mlp.fc2.experts
    assert torch.equal(experts.router.weight, router)
    assert experts.bias.abs().sum() > 0
    answers = [predict(model, in_order(digits_small.test)) for k in (1, 4) if set_active_experts(model, k) is None]
    assert not torch.equal(*answers)


def test_language_models_train_with_checkpointed_activations(tiny_llama):
    model = convert(tiny_llama, num_experts=4, inplace=True).train()
    for part in model.modules():
        if isinstance(part, SMoEDropoutMLP):
            part.sparse, part.k = True, 2
    ids = torch.randint(0, 40, (2, 9), generator=seeded(4))
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.slow
def test_study_the_curve_rises_with_k_and_ends_above_a_learned_routers():
    from retouch.arenas.contest import Terms, mean
    from retouch.arenas.train import TrainProblem
    from retouch.arenas.train.entries.smoe_dropout import solve
    from retouch.arenas.train.tasks.experts import TASK, learned
    from retouch.arenas.training import measure

    problem = TrainProblem(TASK, Terms(replicas=2))
    ours = measure(problem, [solve(problem.replica(n), minimum=4) for n in range(2)])
    theirs = measure(problem, [learned(problem.replica(n)) for n in range(2)])
    assert mean(ours["dip"]) <= 0.5
    assert mean(ours["at_16"]) > mean(theirs["at_16"])
