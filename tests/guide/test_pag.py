"""Perturbed-attention guidance: the authors' numbers, the identity in every kind of layer, and real pipelines."""

import pytest
import tiny_pipelines as tiny
import torch
from diffusers.models.attention_processor import Attention

from retouch.core.attention import AttentionCall, attention_layers, edit_attention, record_attention
from retouch.core.diffusion.denoiser import Denoiser, Prediction
from retouch.core.diffusion.guidance import cfg
from retouch.core.diffusion.process import VP, Level
from retouch.core.diffusion.sampling import sample
from retouch.core.errors import InputError
from retouch.guide import attach
from retouch.guide.pag import (
    PAG,
    PerturbedSelfAttnProcessor,
    identity_attention,
    pag,
    pag_adaptive_scale,
    pag_guidance,
    perturb,
    select_self_attention,
)

Z = tiny.latents()
PROMPTS = ["a red circle", "a large blue square"]
DRAW = torch.Generator().manual_seed(0)
Q, K, V = (torch.randn(3, 2, 5, 4, generator=DRAW) for _ in range(3))
TEXT = torch.randn(2, 5, 8, generator=DRAW)


def call(q=Q, k=K, v=V, **settings):
    told = {
        "mask": None,
        "scale": 0.5,
        "causal": False,
        "layer": "x",
        "kind": "self",
        "grid": None,
        "image": slice(None),
    }
    told |= {"branches": ("uncond", "cond", "perturbed"), "step": None}

    def compute(call):
        return torch.nn.functional.scaled_dot_product_attention(
            call.query, call.key, call.value, attn_mask=call.mask, scale=call.scale
        )

    return AttentionCall(query=q, key=k, value=v, _compute=compute, **{**told, **settings})


# --- functional core --------------------------------------------------------------------------------------------------


def test_golden(golden):
    case = golden("pag")
    t = {name: torch.as_tensor(getattr(case, name)) for name in case.keys}
    case.close("out_attn_identity", identity_attention(t["in_q"], t["in_k"], t["in_v"]))
    scale = float(t["param_pag_scale"])
    case.close("out_guided", pag_guidance(t["in_noise"], t["in_noise_perturbed"], pag_scale=scale))
    both = {"noise_uncond": t["in_noise_uncond"], "guidance_scale": float(t["param_guidance_scale"])}
    case.close("out_guided_cfg", pag_guidance(t["in_noise"], t["in_noise_perturbed"], pag_scale=scale, **both))
    adaptive = float(t["param_adaptive_scale"])
    case.close("out_adaptive", pag_adaptive_scale(t["in_timesteps"], pag_scale=scale, adaptive_scale=adaptive))
    layer = Attention(query_dim=12, heads=3, dim_head=4, bias=False)
    names = {"to_q.weight": "to_q", "to_k.weight": "to_k", "to_v.weight": "to_v"}
    names |= {"to_out.0.weight": "to_out_w", "to_out.0.bias": "to_out_b"}
    layer.load_state_dict({name: t[f"param_{own}"] for name, own in names.items()})
    with torch.no_grad():
        layer.set_processor(PerturbedSelfAttnProcessor(2))
        case.close("out_layer", layer(t["in_hidden"]))
        layer.set_processor(PerturbedSelfAttnProcessor(3))
        case.close("out_layer3", layer(t["in_hidden3"]))


def test_the_identity_is_the_value_and_depends_on_nothing_else():
    q, k, v = (x.clone().requires_grad_() for x in (Q, K, V))
    out = identity_attention(q, k, v)
    assert torch.equal(out, v)
    gradients = torch.autograd.grad(out.sum(), (q, k, v), allow_unused=True)
    assert gradients[0] is None and gradients[1] is None and torch.equal(gradients[2], torch.ones_like(V))
    alone = torch.full((5, 5), -torch.inf).fill_diagonal_(0.0)
    masked = torch.nn.functional.scaled_dot_product_attention(Q, K, V, attn_mask=alone)
    torch.testing.assert_close(out, masked, rtol=1e-6, atol=1e-6)


def test_the_rule():
    noise, other, uncond = Z, Z.flip(0), Z.flip(1)
    assert pag_guidance(noise, other, pag_scale=0.0) is noise
    assert torch.equal(pag_guidance(noise, noise, pag_scale=7.0), noise)
    one = pag_guidance(noise, other, pag_scale=2.0)
    torch.testing.assert_close(one, other + 3.0 * (noise - other))  # g = s + 1
    with_cfg = pag_guidance(noise, other, pag_scale=2.0, noise_uncond=uncond, guidance_scale=1.0)
    torch.testing.assert_close(with_cfg, one)
    whole = pag_guidance(noise, other, pag_scale=2.0, noise_uncond=uncond, guidance_scale=4.0)
    torch.testing.assert_close(whole, uncond + 4 * (noise - uncond) + 2 * (noise - other))


def test_the_adaptive_scale_falls_and_stays_at_zero():
    times = torch.tensor([1000, 500, 0])
    assert pag_adaptive_scale(times, pag_scale=3.0).tolist() == [3.0, 3.0, 3.0]
    assert pag_adaptive_scale(times, pag_scale=3.0, adaptive_scale=0.004).tolist() == pytest.approx([3.0, 1.0, 0.0])


# --- the edit ---------------------------------------------------------------------------------------------------------


def test_only_the_perturbed_rows_change():
    plain = call().original()
    out = perturb(call())
    torch.testing.assert_close(out[:2], plain[:2])
    assert torch.equal(out[2:], V[2:])
    torch.testing.assert_close(perturb(call(branches=("uncond", "cond"))), plain)
    torch.testing.assert_close(perturb(call(branches=())), plain)
    middle = perturb(call(branches=("cond", "perturbed", "other")))
    torch.testing.assert_close(middle[[0, 2]], plain[[0, 2]])
    assert torch.equal(middle[1], V[1])


def test_a_single_token_is_not_perturbed():
    one = call(Q[:, :, :1], K[:, :, :1], V[:, :, :1])
    torch.testing.assert_close(perturb(one), one.original())


@pytest.mark.parametrize("image", [slice(0, 3), slice(2, None)])
def test_in_joint_attention_image_tokens_see_themselves_and_the_text(image):
    out = perturb(call(kind="joint", image=image))
    plain = call().original()
    torch.testing.assert_close(out[:2], plain[:2])
    places = list(range(5))[image]
    text = [k for k in range(5) if k not in places]
    torch.testing.assert_close(out[2, :, text], plain[2, :, text])
    for place in places:
        seen = sorted([place, *text])
        torch.testing.assert_close(
            out[2, :, place],
            call(Q[2:, :, [place]], K[2:, :, seen], V[2:, :, seen]).original()[0, :, 0],
        )
    with pytest.raises(InputError, match="does not tell which of its tokens are the image's"):
        perturb(call(kind="joint", image=None))


@pytest.mark.parametrize("added", [False, True], ids=["boolean", "added to the scores"])
def test_tokens_that_a_joint_layer_hides_stay_hidden(added):
    """Padding of the text, a row a sample: no token sees it, perturbed or not."""
    keys = torch.ones(3, 1, 1, 5, dtype=torch.bool)
    keys[2, ..., 4] = False
    mask = torch.zeros(3, 1, 1, 5).masked_fill(~keys, -torch.inf) if added else keys
    out = perturb(call(kind="joint", image=slice(0, 3), mask=mask))
    for place in range(3):
        alone = call(Q[2:, :, [place]], K[2:, :, [place, 3]], V[2:, :, [place, 3]]).original()
        torch.testing.assert_close(out[2, :, place], alone[0, :, 0])


# --- layers -----------------------------------------------------------------------------------------------------------


def test_layers_are_chosen_by_name_and_cross_attention_never():
    unet = tiny.unet()
    assert list(select_self_attention(unet, "mid")) == ["mid_block.attentions.0.transformer_blocks.0.attn1"]
    assert all(name.endswith("attn1") for name in select_self_attention(unet, ["mid", "up_blocks.1"]))
    assert list(select_self_attention(tiny.stable_diffusion_3().transformer, "transformer_blocks.1"))
    for wrong in ("nothing", "attn2", "mid_blok"):
        with pytest.raises(InputError, match="no image attention layer"):
            select_self_attention(unet, wrong)
    for empty in ((), []):
        with pytest.raises(ValueError, match="layers is empty"):
            select_self_attention(unet, empty)
        with pytest.raises(ValueError, match="layers is empty"):
            pag(3.0, empty)


@pytest.mark.parametrize("build", [tiny.unet, tiny.pixel_unet])
def test_one_perturbed_layer_leaves_the_others_their_own_attention(build):
    model = build()
    keywords = {"encoder_hidden_states": torch.cat([TEXT] * 2)} if build is tiny.unet else {}
    x = torch.cat([Z] * 2) if build is tiny.unet else torch.cat([Z[:, :3]] * 2)
    from retouch.core.attention import branches

    with torch.no_grad(), branches(("cond", "perturbed")):
        with record_attention(model) as before:
            model(x, 3, **keywords)
        with record_attention(model) as after, edit_attention(model, perturb, "mid_block", kind="image"):
            out = model(x, 3, **keywords).sample
    plain, perturbed = out.chunk(2)
    assert not torch.allclose(plain, perturbed)
    for name in attention_layers(model):
        if name in before and name in after:
            torch.testing.assert_close(before[name][:2], after[name][:2], rtol=1e-4, atol=1e-5)
    assert [n for n in before if n.startswith("down")] == [n for n in after if n.startswith("down")]


def test_the_layer_of_a_pixel_unet_keeps_its_norm_and_residual():
    layer = tiny.pixel_unet().mid_block.attentions[0]
    x = torch.randn(4, 16, 4, 4, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        own = layer(x)
        layer.set_processor(PerturbedSelfAttnProcessor(2))
        out = layer(x)
        torch.testing.assert_close(out[:2], own[:2])
        tokens = layer.group_norm(x[2:].flatten(2)).mT
        value = layer.to_out[0](layer.to_v(tokens)).mT.view_as(x[2:])
        torch.testing.assert_close(out[2:], (value + x[2:]) / layer.rescale_output_factor)
    with pytest.raises(InputError, match="hidden_states has 3 rows, but must have a multiple of 2"):
        layer(x[:3])
    with pytest.raises(InputError, match="num_branches is 4"):
        PerturbedSelfAttnProcessor(4)


# --- the guidance -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny.stable_diffusion, tiny.stable_diffusion_xl, tiny.stable_diffusion_3, tiny.dit])
def test_on_real_pipelines(make):
    pipe = make()
    denoiser = Denoiser.from_pipeline(pipe)
    layers = "mid" if hasattr(pipe, "unet") else "transformer_blocks.1"
    what = [0, 1] if make is tiny.dit else PROMPTS
    plain = sample(denoiser, Z, what, times=3, guidance=cfg(4.0))
    both = sample(denoiser, Z, what, times=3, guidance=cfg(4.0) + pag(3.0, layers))
    assert torch.isfinite(both).all() and not torch.allclose(plain, both)
    torch.testing.assert_close(sample(denoiser, Z, what, times=3, guidance=cfg(4.0) + pag(0.0)), plain)
    assert torch.equal(sample(denoiser, Z, what, times=3, guidance=cfg(4.0)), plain)  # nothing is left behind


def test_it_is_what_diffusers_pag_pipeline_makes():
    from diffusers import StableDiffusionPAGPipeline

    pipe = tiny.stable_diffusion()
    parts = {name: value for name, value in pipe.components.items() if name != "image_encoder"}
    theirs = tiny.quiet(StableDiffusionPAGPipeline(**parts, pag_applied_layers=["mid"], requires_safety_checker=False))
    settings = {"num_inference_steps": 4, "latents": Z, "output_type": "latent"}
    for w in (1.0, 4.0):
        wanted = theirs(PROMPTS, guidance_scale=w, pag_scale=2.0, **settings).images
        with attach(pipe, pag(2.0)):
            found = pipe(PROMPTS, guidance_scale=w, **settings).images
        ours = sample(Denoiser.from_pipeline(pipe), Z, PROMPTS, times=4, guidance=cfg(w) + pag(2.0))
        for value in (found, ours):
            torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_forward_passes_and_rows():
    unet, rows = tiny.pixel_unet(), []
    unet.register_forward_pre_hook(lambda module, args, kwargs: rows.append(len(args[0])), with_kwargs=True)
    denoiser = Denoiser(unet, VP.linear())
    for scale, expected in ((0.0, [2, 2]), (3.0, [4, 4])):
        rows.clear()
        sample(denoiser, Z[:, :3], times=2, guidance=pag(scale))
        assert rows == expected


def test_by_hand():
    unet, rows = tiny.unet(), []
    uncond, cond = {"encoder_hidden_states": torch.zeros_like(TEXT)}, {"encoder_hidden_states": TEXT}
    processors = dict(unet.attn_processors)
    with torch.no_grad():
        plain, empty = unet(Z, 3, **cond).sample, unet(Z, 3, **uncond).sample
        with edit_attention(unet, lambda call: call.value, "mid_block", kind="self"):
            perturbed = unet(Z, 3, **cond).sample
        with PAG(unet, 2.0) as guided:
            torch.testing.assert_close(guided(Z, 3, **cond), plain + 2 * (plain - perturbed), rtol=1e-4, atol=1e-5)
            expected = empty + 4 * (plain - empty) + 2 * (plain - perturbed)
            torch.testing.assert_close(guided(Z, 3, uncond=uncond, **cond), expected, rtol=1e-4, atol=1e-5)
        unet.register_forward_pre_hook(lambda module, args, kwargs: rows.append(len(args[0])), with_kwargs=True)
        with PAG(unet, 0.0) as guided:
            assert torch.equal(guided(Z, 3, **cond), plain)
        assert rows == [2]
        with pytest.raises(KeyError), PAG(unet, 2.0):
            raise KeyError
        assert torch.equal(unet(Z, 3, **cond).sample, plain)
    assert all(unet.attn_processors[name] is processor for name, processor in processors.items())


def test_a_learned_variance_is_not_guided():
    transformer = tiny.dit().transformer
    time, labels = torch.tensor([3, 3]), torch.tensor([0, 1])
    with torch.no_grad():
        plain = transformer(Z, timestep=time, class_labels=labels).sample
        with PAG(transformer, 2.0, "transformer_blocks.1") as guided:
            out = guided(Z, timestep(time, 2), class_labels=labels)
    torch.testing.assert_close(out[:, 4:], plain[:, 4:])
    assert not torch.allclose(out[:, :4], plain[:, :4])


def timestep(time, count):
    return torch.cat([time] * count)


def test_bad_input():
    for wrong, words in (
        (lambda: pag(-1.0), "scale is -1.0"),
        (lambda: pag(1.0, adaptive_scale=-1.0), "adaptive_scale is -1.0"),
        (lambda: pag_guidance(Z, Z[:1]), "noise_perturbed has shape"),
        (lambda: pag_guidance(Z, Z, noise_uncond=Z), "must be given together"),
        (
            lambda: sample(Denoiser(tiny.pixel_unet(), VP.linear()), Z[:, :3], times=1, guidance=pag(1.0, "midle")),
            "midle",
        ),
    ):
        with pytest.raises(InputError, match=words):
            wrong()


def test_the_adaptive_scale_acts_in_the_guidance():
    found = {"cond": Prediction(Z, Z), "perturbed": Prediction(Z.flip(0), Z.flip(1))}
    fading = pag(3.0, adaptive_scale=0.004).change(found, Z, Level(500.0, 0.6, 0.8))
    plain = pag(1.0).change(found, Z, Level(500.0, 0.6, 0.8))
    torch.testing.assert_close(fading.x0, plain.x0)
    torch.testing.assert_close(fading.noise, plain.noise)
