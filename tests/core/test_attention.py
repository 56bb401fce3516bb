"""Attention through one function: the same as before while it does nothing, whatever library the layer is from."""

import pytest
import tiny_pipelines as tiny
import torch
from torch import nn

from retouch.core.attention import (
    attention_layers,
    branches,
    edit_attention,
    kind_of,
    record_attention,
    select_layers,
)
from retouch.core.errors import InputError

TEXT = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
X = tiny.latents()


def original(call):
    return call.original()


def run_unet(model):
    return model(X, 3, encoder_hidden_states=TEXT).sample


def run_sd3(model):
    text = torch.cat([TEXT, TEXT], -1)
    return model(
        X, timestep=torch.tensor([3.0, 3.0]), encoder_hidden_states=text, pooled_projections=torch.ones(2, 12)
    ).sample


def run_flux(model):
    ids = torch.zeros(5, 3), torch.arange(48.0).view(16, 3)
    time = torch.tensor([0.3, 0.3])
    return model(X.reshape(2, 16, 16), TEXT, TEXT[:, 0], time, txt_ids=ids[0], img_ids=ids[1]).sample


def run_dit(model):
    return model(X, timestep=torch.tensor([3, 3]), class_labels=torch.tensor([0, 1])).sample


def run_pixels(model):
    return model(X[:, :3], 3).sample


def run_tokens(model):
    return model(torch.tensor([[1, 4, 5, 2], [1, 6, 7, 2]])).last_hidden_state


def llama(**settings):
    from transformers import LlamaConfig, LlamaModel

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 9}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return tiny.made(lambda: LlamaModel(LlamaConfig(**sizes, **heads, bos_token_id=1, eos_token_id=2, **settings)))


def bert():
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 9}
    return tiny.made(lambda: BertModel(BertConfig(**sizes, num_attention_heads=2)))


def fused():
    model = tiny.unet()
    model.fuse_qkv_projections()
    return model


MODELS = {
    "unet": (tiny.unet, run_unet, 8),
    "unet, fused": (fused, run_unet, 8),
    "pixels": (tiny.pixel_unet, run_pixels, 4),
    "sd3": (lambda: tiny.stable_diffusion_3().transformer, run_sd3, 2),
    "flux": (lambda: tiny.flux().transformer, run_flux, 2),
    "dit": (lambda: tiny.dit().transformer, run_dit, 2),
    "clip": (tiny.text_encoder, run_tokens, 2),
    "llama": (llama, run_tokens, 2),
    "bert": (bert, run_tokens, 2),
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_an_edit_that_calls_the_original_changes_nothing_and_is_gone_afterwards(name):
    build, run, count = MODELS[name]
    model = build()
    before = run(model)
    seen = []
    with edit_attention(model, lambda call: (seen.append(call.layer), call.original())[1]) as layers:
        assert torch.equal(run(model), before)
    assert sorted(seen) == sorted(layers) and len(layers) == count
    with edit_attention(model, lambda call: torch.zeros_like(call.query)):
        assert not torch.allclose(run(model), before)
    assert torch.equal(run(model), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", MODELS)
def test_what_is_recorded_are_the_probabilities_that_the_layer_uses(name):
    build, run, count = MODELS[name]
    model = build()
    before = run(model)
    with record_attention(model) as maps:
        after = run(model)
    assert len(maps) == count
    for probabilities in maps.values():
        assert probabilities.shape[0] == 2
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(probabilities.shape[:-1]))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    if name == "llama":
        assert not maps["layers.0.self_attn"].triu(1).any()  # causal
    loss = next(iter(maps.values())).square().sum()
    assert any(g is not None for g in torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))


def test_recording_without_gradients():
    model = tiny.unet()
    with record_attention(model, detach=True) as maps:
        run_unet(model)
    assert not any(m.requires_grad for m in maps.values())


def test_kinds():
    unet = tiny.unet()
    assert {name.rsplit(".", 1)[1] for name in attention_layers(unet, "self")} == {"attn1"}
    assert {name.rsplit(".", 1)[1] for name in attention_layers(unet, "cross")} == {"attn2"}
    assert not attention_layers(unet, "joint")
    for pipe in (tiny.stable_diffusion_3(), tiny.flux()):
        assert len(attention_layers(pipe.transformer, "joint")) == 2
    assert all(kind_of(*item) == "self" for item in attention_layers(tiny.pixel_unet()).items())


def test_the_call_says_where_it_is():
    model, calls = tiny.unet(), []
    with edit_attention(model, lambda call: (calls.append(call), call.original())[1], kind="cross"):
        with branches(("uncond", "cond"), step="here"):
            run_unet(model)
        run_unet(model)
    assert {call.kind for call in calls} == {"cross"}
    assert {call.grid for call in calls} == {(8, 8), (4, 4)}
    assert calls[0].branches == ("uncond", "cond") and calls[0].step == "here"
    assert calls[0].branch("cond") == slice(1, 2)
    assert calls[-1].branches == () and calls[-1].step is None and calls[-1].branch("cond") == slice(None)
    assert calls[0].key.shape[-2] == 5
    with pytest.raises(InputError, match="branch is 'perturbed', but must be one of 'uncond', 'cond'"):
        calls[0].branch("perturbed")


def test_edits_of_nested_blocks_are_all_called():
    model, order = tiny.unet(), []

    def note(name):
        return lambda call: (order.append(name), call.original())[1]

    with edit_attention(model, note("outer"), "mid_block"), edit_attention(model, note("inner"), "mid_block"):
        run_unet(model)
    assert order == ["inner", "outer"] * 2


def test_changed_parts_of_a_call():
    model = tiny.unet()
    with edit_attention(model, lambda call: call.original(value=torch.zeros_like(call.value)), kind="cross"):
        a = run_unet(model)
    with edit_attention(model, lambda call: torch.zeros_like(call.query), kind="cross"):
        b = run_unet(model)
    torch.testing.assert_close(a, b)


def test_an_error_inside_leaves_nothing_behind():
    model = tiny.unet()
    before = run_unet(model)

    def broken(call):
        raise KeyError

    with pytest.raises(KeyError), edit_attention(model, broken):
        run_unet(model)
    assert torch.equal(run_unet(model), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_patterns_match_whole_parts_of_names():
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Module() for _ in range(11)])
    for block in model.blocks:
        block.to_q = nn.Linear(2, 2)
    assert list(select_layers(model, "blocks.1")) == ["blocks.1"]
    assert list(select_layers(model, ["blocks.1", "blocks.10"])) == ["blocks.1", "blocks.10"]
    assert len(select_layers(model)) == 11


@pytest.mark.parametrize(
    ("layers", "kind", "words"),
    [
        ("mid_blok", "any", "no attention layer of UNet2DConditionModel matches it"),
        ("mid_block.attentions.0.transformer_blocks.0.attn3", "any", "Did you mean mid_block.attentions.0"),
        ((), "any", "layers is empty"),
        ("mid_block", "joint", "no joint attention layer"),
        ("mid_block", "own", "kind is 'own'"),
    ],
)
def test_bad_input(layers, kind, words):
    with pytest.raises(InputError, match=words), edit_attention(tiny.unet(), original, layers, kind=kind):
        pass


def test_layers_that_compute_attention_in_another_way_are_refused():
    model = llama(attn_implementation="eager")
    with pytest.raises(InputError, match="attn_implementation='sdpa'"), edit_attention(model, original):
        run_tokens(model)


def test_masks_are_in_the_probabilities():
    model = bert()
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    with record_attention(model) as maps:
        model(torch.tensor([[1, 4, 5, 0], [1, 6, 7, 2]]), attention_mask=mask)
    assert not maps["encoder.layer.0.attention.self"][0, :, :, 3].any()
    assert maps["encoder.layer.0.attention.self"][1, :, :, 3].all()
