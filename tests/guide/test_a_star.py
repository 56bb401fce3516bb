"""A-STAR: the overlap terms and a peer's numbers, the update on real networks, masks over steps, and pipelines."""

import pytest
import tiny_pipelines as tiny
import torch
from torch import nn

from retouch.core.attention import record_attention
from retouch.core.diffusion.denoiser import Denoiser
from retouch.core.diffusion.guidance import cfg
from retouch.core.diffusion.sampling import sample
from retouch.core.errors import InputError
from retouch.guide.a_star import (
    AStarGuidance,
    aggregate_cross_attention,
    attention_retention_loss,
    attention_segregation_loss,
    binarize_attention,
    find_tokens,
    overlap_ratio,
    pairwise_overlap,
    steer,
)
from retouch.guide.cfgpp import cfgpp

Z = tiny.latents()
PROMPT = "a red circle left of a blue square"
CONCEPTS = [[3], [8]]
DRAW = torch.Generator().manual_seed(0)
TEXT = torch.randn(2, 12, 8, generator=DRAW)
MAPS = torch.rand(3, 6, 6, generator=DRAW)


def halves():
    """Two maps without a place in common."""
    left, right = torch.zeros(6, 6), torch.zeros(6, 6)
    left[:, :3], right[:, 3:] = 1.0, 1.0
    return left, right


def sharp_unet():
    """Text matters more to it than to one with fresh weights, so that gradients are no rounding errors."""
    unet = tiny.unet()
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "attn2.to_q" in name or "attn2.to_k" in name:
                parameter *= 6
    return unet


def losses(unet, z, concepts=CONCEPTS, resolution=8, **settings):
    """The losses at a latent, from a guidance that does not move it."""
    probe = AStarGuidance(concepts, resolution=resolution, alpha=0.0, **settings)
    assert torch.equal(probe.before_step(unet, z, 3, TEXT), z)
    return probe.history[0]


# --- the terms --------------------------------------------------------------------------------------------------------


def test_golden(golden):
    case = golden("a_star")
    t = {name: torch.as_tensor(getattr(case, name)) for name in case.keys}
    pairs, concepts = float(t["param_num_pairs"]), float(t["param_num_concepts"])
    maps = t["in_attn"].clone().requires_grad_()
    case.close("out_pairwise", pairwise_overlap(maps))
    loss = attention_segregation_loss(maps)
    case.close("out_segregation_mean", loss / pairs)
    case.close("out_segregation_grad_mean", torch.autograd.grad(loss, maps)[0] / pairs)
    case.close("out_segregation_mean", attention_segregation_loss(maps, reduction="mean"))
    case.close("out_retention_mean", attention_retention_loss(maps, t["in_masks"]) / concepts)
    case.close("out_retention_mean", attention_retention_loss(maps, t["in_masks"], reduction="mean"))


def test_overlap():
    p, q = MAPS[0], MAPS[1]
    assert float(overlap_ratio(p, p)) == pytest.approx(0.5)
    assert float(overlap_ratio(*halves())) == 0.0
    assert torch.equal(overlap_ratio(p, q), overlap_ratio(q, p))
    torch.testing.assert_close(overlap_ratio(0.01 * p, 0.01 * q), overlap_ratio(p, q))
    assert not torch.allclose(overlap_ratio(3 * p, q), overlap_ratio(p, q))
    assert 0 < float(overlap_ratio(p, q)) < 0.5
    assert float(overlap_ratio(torch.zeros(4, 4), torch.zeros(4, 4))) == 0.0
    pairs = pairwise_overlap(MAPS)
    torch.testing.assert_close(pairs.diagonal(), torch.full((3,), 0.5))
    assert torch.equal(pairs, pairs.T)
    torch.testing.assert_close(pairs[0, 2], overlap_ratio(MAPS[0], MAPS[2]))
    assert pairwise_overlap(MAPS.expand(2, 3, 6, 6)).shape == (2, 3, 3)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_losses_of_equal_maps(count):
    maps = MAPS[:1].expand(count, 6, 6)
    assert float(attention_segregation_loss(maps)) == pytest.approx(count * (count - 1) / 4)
    masks = (maps > 0.5).float()
    assert float(attention_retention_loss(masks, masks)) == pytest.approx(count / 2)


def test_losses_over_a_batch():
    batch = torch.stack([MAPS, MAPS.flip(0).square()])
    masks = (batch > 0.5).float()
    for loss, rest in ((attention_segregation_loss, ()), (attention_retention_loss, (masks,))):
        each = [loss(batch[k], *(r[k] for r in rest)) for k in range(2)]
        torch.testing.assert_close(loss(batch, *rest), each[0] + each[1])
        torch.testing.assert_close(loss(batch, *rest, reduction="mean"), (each[0] + each[1]) / 6)
        torch.testing.assert_close(loss(batch, *rest, reduction="none").sum(1), torch.stack(each))
    assert float(attention_segregation_loss(MAPS[:1], reduction="mean")) == 0.0
    left, right = halves()
    assert float(attention_retention_loss(left[None], right[None])) == 1.0


def test_no_gradient_reaches_the_mask_and_one_concept_has_none():
    maps, masks = MAPS.clone().requires_grad_(), (MAPS > 0.5).float().requires_grad_()
    gradients = torch.autograd.grad(attention_retention_loss(maps, masks), (maps, masks), allow_unused=True)
    assert gradients[1] is None and bool((gradients[0] != 0).any())
    one = MAPS[:1].clone().requires_grad_()
    assert not bool(torch.autograd.grad(attention_segregation_loss(one), one)[0].any())


def test_unnormalised_maps_leave_retention_nearly_constant():
    masks = (MAPS > 0.5).float()
    small = attention_retention_loss(MAPS / 77, masks, reduction="none")
    assert bool((small > 0.97).all())
    assert bool((attention_retention_loss(MAPS / MAPS.amax((1, 2), keepdim=True), masks, reduction="none") < 0.7).all())


@pytest.mark.parametrize("method", ["otsu", "fraction", "mean_std", "top"])
def test_masks_are_zero_or_one_and_do_not_depend_on_scale(method):
    maps = torch.cat([MAPS, torch.full((1, 6, 6), 0.3)]).requires_grad_()
    masks = binarize_attention(maps, method=method)
    assert not masks.requires_grad and masks.shape == maps.shape and set(masks.unique().tolist()) <= {0.0, 1.0}
    assert bool((masks.flatten(1).sum(1) > 0).all()) and bool((masks[:3].flatten(1).sum(1) < 36).all())
    assert torch.equal(binarize_attention(maps / 64, method=method), masks)
    assert torch.equal(binarize_attention(maps[None], method=method)[0], masks)
    assert bool(masks[-1].all())  # of a constant map all is the maximum


def test_how_masks_are_made():
    spot = torch.full((4, 4), 0.1)
    spot[1:3, 1:3] = torch.tensor([[0.9, 0.8], [0.85, 1.0]])
    wanted = (spot > 0.5).float()
    assert torch.equal(binarize_attention(spot), wanted)
    assert torch.equal(binarize_attention(spot, method="fraction", threshold=0.5), wanted)
    assert torch.equal(binarize_attention(spot, method="top", threshold=0.25), wanted)
    assert torch.equal(binarize_attention(spot, method="mean_std"), wanted)
    assert int(binarize_attention(spot, method="top", threshold=0.0).sum()) == 1
    assert int(binarize_attention(spot, method="fraction", threshold=1.0).sum()) == 1


def test_otsu_is_the_split_of_least_variance_within():
    values = MAPS[0].flatten()
    mask = binarize_attention(MAPS[0]).flatten().bool()

    def within(side):
        return sum(float((part - part.mean()).square().sum()) for part in (values[side], values[~side]))

    others = [within(values > cut) for cut in values.sort().values[:-1]]
    assert within(mask) == pytest.approx(min(others))


# --- maps -------------------------------------------------------------------------------------------------------------


def test_maps_are_means_over_heads_and_layers_of_one_grid():
    draw = torch.Generator().manual_seed(1)
    store = {name: torch.rand(2, 3, n, 5, generator=draw) for name, n in (("a", 16), ("b", 4), ("c", 16))}
    maps = aggregate_cross_attention(store, resolution=4)
    assert maps.shape == (2, 5, 4, 4)
    mean = (store["a"].mean(1) + store["c"].mean(1)) / 2
    torch.testing.assert_close(maps[1, 3, 2, 1], mean[1, 2 * 4 + 1, 3])
    torch.testing.assert_close(aggregate_cross_attention(store, resolution=4, tokens=[3, 1]), maps[:, [3, 1]])
    assert aggregate_cross_attention(store, resolution=(2, 8)).shape == (2, 5, 2, 8)
    assert aggregate_cross_attention({"a": store["a"].half()}, resolution=4).dtype == torch.float32
    for wrong, words in (
        ({"resolution": 8}, "resolution is 8 x 8, but text is attended to from grids of 2 x 2, 4 x 4 only"),
        ({"resolution": 4, "tokens": [5]}, "tokens is 5, but must be at least 0 and at most 4"),
        ({"resolution": 0}, "resolution is 0"),
    ):
        with pytest.raises(InputError, match=words):
            aggregate_cross_attention(store, **wrong)


def test_the_maps_are_those_that_the_network_makes_with_the_text():
    unet = sharp_unet()
    with torch.no_grad(), record_attention(unet, kind="cross") as store:
        unet(Z, 3, encoder_hidden_states=TEXT)
    probe = AStarGuidance([[3, 4], 8], resolution=8, alpha=0.0)
    probe.before_step(unet, Z, 3, TEXT)
    maps = aggregate_cross_attention(store, resolution=8, tokens=[3, 4, 8])
    torch.testing.assert_close(probe.maps, torch.stack([(maps[:, 0] + maps[:, 1]) / 2, maps[:, 2]], 1))
    middle = AStarGuidance([3, 8], resolution=4, alpha=0.0)
    middle.before_step(unet, Z, 3, TEXT)
    torch.testing.assert_close(middle.maps, aggregate_cross_attention(store, resolution=4, tokens=[3, 8]))


def test_concepts_of_each_sample():
    unet = sharp_unet()
    probe = AStarGuidance(resolution=8, alpha=0.0)
    apart = []
    for concepts in ([[3], [8]], [[2], [5, 6]]):
        probe.before_step(unet, Z, 3, TEXT, concepts)
        apart.append(probe.maps)
    probe.reset()
    probe.before_step(unet, Z, 3, TEXT, [[[3], [8]], [[2], [5, 6]]])
    torch.testing.assert_close(probe.maps, torch.stack([apart[0][0], apart[1][1]]))


def test_attend_and_excites_preprocessing():
    unet = sharp_unet()
    raw = AStarGuidance(list(range(1, 9)), resolution=8, alpha=0.0, prompt_length=8)
    raw.before_step(unet, Z, 3, TEXT)
    done = AStarGuidance(list(range(1, 9)), resolution=8, alpha=0.0, prompt_length=8, preprocess="attend_and_excite")
    done.before_step(unet, Z, 3, TEXT)
    wanted = (100 * raw.maps).softmax(1)
    # A Gaussian of standard deviation 1/2 at distances 0, 1 and sqrt 2.
    weights = torch.tensor([[-4.0, -2.0, -4.0], [-2.0, 0.0, -2.0], [-4.0, -2.0, -4.0]]).exp()
    inner = (wanted[:, :, 2:5, 1:4] * (weights / weights.sum())).sum((-2, -1))
    torch.testing.assert_close(done.maps[:, :, 3, 2], inner)
    torch.testing.assert_close(done.maps.sum(1), torch.ones(2, 8, 8))


def test_words_are_found():
    words = tiny.tokenizer()
    assert find_tokens(words, PROMPT, ["circle", "square"]) == CONCEPTS
    assert find_tokens(words, PROMPT, ["blue square", "a", "a"]) == [[7, 8], [1], [6]]
    for wrong in ("large", ""):
        with pytest.raises(InputError, match="but must have words of the prompt"):
            find_tokens(words, PROMPT, [wrong])


# --- the update -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("global_rng_untouched")
def test_the_update_is_a_gradient_step():
    unet = sharp_unet()
    before = {name: parameter.clone() for name, parameter in unet.named_parameters()}
    moved = AStarGuidance(CONCEPTS, resolution=8, alpha=2.0).before_step(unet, Z, 3, TEXT)
    z = Z.clone().requires_grad_()
    with record_attention(unet, kind="cross") as store:
        unet(z, 3, encoder_hidden_states=TEXT)
    maps = aggregate_cross_attention(store, resolution=8, tokens=[3, 8])
    (gradient,) = torch.autograd.grad(attention_segregation_loss(maps), z)
    torch.testing.assert_close((moved - Z) / 2.0, -gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))
    assert bool((gradient != 0).any()) and not moved.requires_grad
    for name, parameter in unet.named_parameters():
        assert parameter.grad is None and parameter.requires_grad and torch.equal(parameter, before[name])
    assert not unet.training and not any(len(module._forward_pre_hooks) for module in unet.modules())
    lower = losses(unet, moved)["segregation"]
    assert bool((lower < losses(unet, Z)["segregation"]).all())


def test_samples_do_not_see_each_other():
    unet = sharp_unet()
    whole = AStarGuidance(CONCEPTS, resolution=8, alpha=5.0).before_step(unet, Z, 3, TEXT)
    alone = AStarGuidance(CONCEPTS, resolution=8, alpha=5.0).before_step(unet, Z[:1], 3, TEXT[:1])
    torch.testing.assert_close(whole[:1], alone, rtol=1e-4, atol=1e-5)
    shared = AStarGuidance(CONCEPTS, resolution=8, alpha=5.0).before_step(unet, Z, 3, TEXT[:1])
    torch.testing.assert_close(shared[:1], alone, rtol=1e-4, atol=1e-5)


def test_retention_begins_at_the_second_step_with_the_mask_of_the_first():
    unet = sharp_unet()
    guide = AStarGuidance(CONCEPTS, resolution=8, alpha=1.0)
    first = guide.before_step(unet, Z, 9, TEXT)
    assert guide.history[0]["retention"] is None
    masks = guide.masks
    assert masks.shape == (2, 2, 8, 8) and set(masks.unique().tolist()) == {0.0, 1.0} and not masks.requires_grad
    assert torch.equal(masks, binarize_attention(guide.maps))
    second = guide.before_step(unet, first, 5, TEXT)
    whole = guide.maps / guide.maps.amax((-2, -1), keepdim=True)
    expected = attention_retention_loss(whole, masks, reduction="none").sum(1)
    torch.testing.assert_close(guide.history[1]["retention"], expected)
    assert torch.equal(guide.masks, binarize_attention(guide.maps))
    # Without the mask, and with segregation alone, the second step is another one.
    alone = AStarGuidance(CONCEPTS, resolution=8, alpha=1.0).before_step(unet, first, 5, TEXT)
    assert not torch.allclose(second, alone, atol=1e-6)
    off = AStarGuidance(CONCEPTS, resolution=8, alpha=1.0, retention=0.0)
    off.before_step(unet, Z, 9, TEXT)
    torch.testing.assert_close(off.before_step(unet, first, 5, TEXT), alone)
    guide.reset()
    assert guide.masks is None and guide.maps is None and not guide.history
    torch.testing.assert_close(guide.before_step(unet, Z, 9, TEXT), first)


def test_one_concept_moves_by_retention_alone():
    unet = sharp_unet()
    guide = AStarGuidance([3], resolution=8, alpha=5.0)
    first = guide.before_step(unet, Z, 9, TEXT)
    assert torch.equal(first, Z)
    assert not torch.equal(guide.before_step(unet, first, 5, TEXT), first)


def test_the_step_shrinks_and_may_be_repeated():
    unet = sharp_unet()

    def moved(progress=0.0, **settings):
        guide = AStarGuidance(CONCEPTS, resolution=8, **{"alpha": 2.0, **settings})
        return guide.before_step(unet, Z, 3, TEXT, progress=progress) - Z

    full = moved()
    torch.testing.assert_close(moved(progress=1.0), full * 0.5**0.5, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(moved(progress=0.5, decay=0.0), full * 0.5**0.5, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(moved(loss_scale=1024.0), full, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(moved(segregation=2.0), 2 * full, rtol=1e-3, atol=1e-6)
    twice = AStarGuidance(CONCEPTS, resolution=8, alpha=2.0, iterations=2)
    end = twice.before_step(unet, Z, 3, TEXT)
    again = AStarGuidance(CONCEPTS, resolution=8, alpha=2.0).before_step(unet, Z + full, 3, TEXT)
    torch.testing.assert_close(end, again, rtol=1e-4, atol=1e-5)
    assert len(twice.history) == 2


@pytest.mark.parametrize("batched", [False, True])
def test_layout_masks_draw_attention_in(batched):
    unet = sharp_unet()
    layout = torch.stack([torch.kron(half, torch.ones(4, 4)) for half in halves()])  # of another size
    layout = layout.expand(2, *layout.shape) if batched else layout
    before = losses(unet, Z, layout_masks=layout)["retention"]
    guide = AStarGuidance(CONCEPTS, resolution=8, alpha=1.0, segregation=0.0, layout_masks=layout)
    moved = guide.before_step(unet, Z, 3, TEXT)
    assert guide.history[0]["retention"] is not None  # at the first step as well
    after = losses(unet, moved, layout_masks=layout)["retention"]
    assert bool((after < before).all())
    place = torch.zeros(8, 8)
    place[:, :4] = 1
    assert torch.equal(guide.masks[0, 0], place) and torch.equal(guide.masks[1, 1], 1 - place)
    for _ in range(10):
        moved = AStarGuidance(CONCEPTS, resolution=8, alpha=5.0, segregation=0.0, layout_masks=layout).before_step(
            unet, moved, 3, TEXT
        )

    def inside(z):
        probe = AStarGuidance(CONCEPTS, resolution=8, alpha=0.0)
        probe.before_step(unet, z, 3, TEXT)
        whole = probe.maps / probe.maps.sum((-2, -1), keepdim=True)
        return float((whole * guide.masks).sum((-2, -1)).mean())

    assert inside(moved) > inside(Z)


class Toy(nn.Module):
    """One cross-attention layer on the pixels of a latent."""

    def __init__(self):
        from diffusers.models.attention_processor import Attention

        super().__init__()
        self.attn = Attention(query_dim=4, cross_attention_dim=8, heads=2, dim_head=4)

    def forward(self, x, t, encoder_hidden_states):
        hidden = self.attn(x.flatten(2).mT, encoder_hidden_states=encoder_hidden_states)
        return hidden.mT.view_as(x)


def test_on_a_single_attention_layer():
    toy = tiny.made(Toy)
    layout = torch.stack(halves())
    start = losses(toy, Z, layout_masks=layout)["retention"]
    z = Z
    for _ in range(5):
        z = AStarGuidance(CONCEPTS, resolution=8, alpha=1.0, segregation=0.0, layout_masks=layout).before_step(
            toy, z, 3, {"encoder_hidden_states": TEXT}
        )
    assert bool((losses(toy, z, layout_masks=layout)["retention"] < start).all())


def test_in_training_mode_and_in_half_precision():
    unet = sharp_unet()
    wanted = AStarGuidance(CONCEPTS, resolution=8, alpha=2.0).before_step(unet, Z, 3, TEXT)
    unet.train()
    unet.mid_block.resnets[0].dropout.p = 0.5
    with torch.no_grad():  # as samplers have it
        moved = AStarGuidance(CONCEPTS, resolution=8, alpha=2.0).before_step(unet, Z, 3, TEXT)
    torch.testing.assert_close(moved, wanted)
    assert unet.training and unet.mid_block.training
    half = sharp_unet().to(torch.bfloat16)
    guide = AStarGuidance(CONCEPTS, resolution=8, alpha=2.0, loss_scale=256.0)
    moved = guide.before_step(half, Z.to(torch.bfloat16), 3, TEXT.to(torch.bfloat16))
    assert moved.dtype == torch.bfloat16 and torch.isfinite(moved).all()
    assert guide.maps.dtype == guide.history[0]["segregation"].dtype == torch.float32


# --- sampling ---------------------------------------------------------------------------------------------------------

FAMILIES = pytest.mark.parametrize(
    ("make", "resolution"),
    [(tiny.stable_diffusion, 8), (tiny.stable_diffusion_xl, 4), (tiny.stable_diffusion_3, 4)],
    ids=["sd", "sdxl", "sd3"],
)


@FAMILIES
@pytest.mark.usefixtures("global_rng_untouched")
def test_on_real_pipelines(make, resolution):
    denoiser = Denoiser.from_pipeline(make())
    rules = {"times": 4, "guidance": cfg(4.0)}
    plain = sample(denoiser, Z, PROMPT, **rules)
    off = AStarGuidance(CONCEPTS, resolution=resolution, alpha=0.0)
    assert torch.equal(sample(denoiser, Z, PROMPT, **rules, hooks=[off]), plain)
    assert len(off.history) == 4 and off.history[0]["retention"] is None and off.history[1]["retention"] is not None
    guide = AStarGuidance(CONCEPTS, resolution=resolution, alpha=2000.0)
    moved = sample(denoiser, Z, PROMPT, **rules, hooks=[guide])
    assert torch.isfinite(moved).all() and not torch.allclose(moved, plain, rtol=1e-3)
    assert torch.equal(sample(denoiser, Z, PROMPT, **rules, hooks=[guide]), moved)  # begins anew
    assert len(guide.history) == 4
    with_other = sample(denoiser, Z, PROMPT, times=4, guidance=cfgpp(0.6), hooks=[guide])
    assert torch.isfinite(with_other).all()
    assert torch.equal(sample(denoiser, Z, PROMPT, **rules), plain)
    assert all(p.requires_grad and p.grad is None for p in denoiser.model.parameters())


@FAMILIES
def test_inside_a_pipeline_it_is_what_our_sampler_makes(make, resolution):
    pipe = make()
    guide = AStarGuidance(CONCEPTS, resolution=resolution, alpha=2000.0)
    settings = {"num_inference_steps": 4, "latents": Z, "output_type": "latent", "guidance_scale": 4.0}
    prompts = [PROMPT, PROMPT]
    plain = pipe(prompts, **settings).images
    step = pipe.scheduler.step
    for scale in (4.0, 1.0):
        settings["guidance_scale"] = scale
        with guide.attached(pipe):
            theirs = pipe(prompts, **settings).images
        ours = sample(Denoiser.from_pipeline(pipe), Z, prompts, times=4, guidance=cfg(scale), hooks=[guide])
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3 * float(ours.abs().max()))
        assert not torch.allclose(theirs, plain, rtol=1e-2, atol=1e-2)
    settings["guidance_scale"] = 4.0
    off = AStarGuidance(CONCEPTS, resolution=resolution, alpha=0.0)
    with off.attached(pipe):
        assert torch.equal(pipe(prompts, **settings).images, plain)
    with pytest.raises(InputError, match="resolution is 5"), AStarGuidance([3], resolution=5).attached(pipe):
        pipe(prompts, **settings)
    assert torch.equal(pipe(prompts, **settings).images, plain)
    assert pipe.scheduler.step == step and "step" not in vars(pipe.scheduler)


def test_on_flux():
    pipe = tiny.flux()
    guide = AStarGuidance([[2], [7]], resolution=4, alpha=500.0, start_token=False)
    settings = {"num_inference_steps": 3, "height": 16, "width": 16, "output_type": "latent", "max_sequence_length": 12}
    denoiser = Denoiser.from_pipeline(pipe)
    plain = sample(denoiser, Z, PROMPT, times=3)
    assert not torch.allclose(sample(denoiser, Z, PROMPT, times=3, hooks=[guide]), plain)
    assert len(guide.history) == 3
    draws = [torch.Generator().manual_seed(0) for _ in range(2)]
    own = pipe(PROMPT, generator=draws[0], **settings).images
    guide = AStarGuidance([[2], [7]], resolution=tuple([int(own.shape[1] ** 0.5)] * 2), alpha=500.0, start_token=False)
    with guide.attached(pipe):
        moved = pipe(PROMPT, generator=draws[1], **settings).images
        assert not torch.allclose(moved, own)
        assert torch.equal(pipe(PROMPT, generator=torch.Generator().manual_seed(0), **settings).images, moved)
        assert len(guide.history) == 3  # it began anew
        guide.stop = 0.5
        pipe(PROMPT, **settings)
        assert len(guide.history) == 2


def test_only_some_of_the_steps():
    denoiser = Denoiser.from_pipeline(tiny.stable_diffusion())
    guide = AStarGuidance(CONCEPTS, resolution=8, alpha=50.0, stop=0.5)
    moved = sample(denoiser, Z, PROMPT, times=4, guidance=cfg(4.0), hooks=[guide])
    assert len(guide.history) == 2
    never = AStarGuidance(CONCEPTS, resolution=8, alpha=50.0, stop=0.0)
    plain = sample(denoiser, Z, PROMPT, times=4, guidance=cfg(4.0))
    assert torch.equal(sample(denoiser, Z, PROMPT, times=4, guidance=cfg(4.0), hooks=[never]), plain)
    assert not torch.equal(moved, plain)


def test_only_the_conditional_branch_is_read():
    """The last maps are those of the text, at the latent of the last step."""
    pipe = tiny.stable_diffusion()
    denoiser = Denoiser.from_pipeline(pipe)
    seen = []
    pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    guide = AStarGuidance(CONCEPTS, resolution=8, alpha=50.0)
    sample(denoiser, Z, PROMPT, times=3, guidance=cfg(4.0), hooks=[guide])
    assert [len(x) for x in seen] == [2, 4] * 3  # text alone with gradients, then both branches
    text = denoiser.encode(PROMPT, 2)
    with torch.no_grad(), record_attention(pipe.unet, kind="cross") as store:
        pipe.unet(seen[4], denoiser.process.grid(3).levels[2].time, **text)
    torch.testing.assert_close(guide.maps, aggregate_cross_attention(store, resolution=8, tokens=[3, 8]))


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("concepts", "settings", "words"),
    [
        ([], {}, "concept_tokens names no token"),
        (None, {}, "concept_tokens names no token"),
        ([[], [3]], {}, "concept_tokens names no token"),
        ([[3], [12]], {}, "concept_tokens has token 12, but must have tokens of the prompt, 1 to 10"),
        ([[0], [3]], {}, "concept_tokens has token 0"),
        ([3, 11], {}, "concept_tokens has token 11"),
        ([3, 9], {"prompt_length": 8}, "concept_tokens has token 9, but must have tokens of the prompt, 1 to 8"),
        ([3, -1], {}, "concept_tokens has token -1"),
        ([[[3], [4]], [[3], [4]], [[3], [4]]], {}, "concept_tokens is for 3 samples, but must be for 2"),
        ([[[3], [4]], [[3]]], {}, "equally many concepts"),
        (CONCEPTS, {"resolution": 16}, "resolution is 16 x 16, but text is attended to from grids of 4 x 4, 8 x 8"),
        (CONCEPTS, {"layout_masks": torch.ones(3, 8, 8)}, r"but must have them for \(2, 2\)"),
        (CONCEPTS, {"layout_masks": torch.ones(8, 8)}, r"layout_masks has shape \(8, 8\)"),
        (CONCEPTS, {"layout_masks": torch.zeros(2, 8, 8)}, "layout_masks, at 8 x 8, has an empty mask"),
        (CONCEPTS, {"alpha": -1.0}, "alpha is -1.0"),
        (CONCEPTS, {"stop": 1.5}, "stop is 1.5"),
        (CONCEPTS, {"iterations": 0}, "iterations is 0"),
        (CONCEPTS, {"method": "median"}, "method is 'median', but must be one of 'otsu'"),
        (CONCEPTS, {"preprocess": "blur"}, "preprocess is 'blur'"),
        (CONCEPTS, {"prompt_length": 0}, "prompt_length is 0"),
    ],
)
def test_bad_input(concepts, settings, words):
    unet = tiny.unet()
    with pytest.raises(InputError, match=words):
        AStarGuidance(**{"resolution": 8, **settings}).before_step(unet, Z, 3, TEXT, concepts)
    assert not any(len(module._forward_pre_hooks) for module in unet.modules())
    assert all(parameter.requires_grad for parameter in unet.parameters())


def test_bad_maps_and_masks():
    for wrong, words in (
        (lambda: overlap_ratio(MAPS[0], MAPS[0, :3]), r"q has maps of \(3, 6\), but must have p's size, \(6, 6\)"),
        (lambda: attention_segregation_loss(MAPS[0]), "maps has shape"),
        (lambda: attention_segregation_loss(MAPS[:0]), "maps has shape"),
        (lambda: attention_segregation_loss(MAPS, reduction="all"), "reduction is 'all'"),
        (lambda: attention_retention_loss(MAPS, MAPS[:2]), "masks has shape"),
        (lambda: attention_retention_loss(MAPS, torch.zeros_like(MAPS)), "masks has an empty mask"),
        (lambda: binarize_attention(MAPS, threshold=2.0), "threshold is 2.0"),
        (lambda: AStarGuidance(CONCEPTS).before_step(tiny.unet(), Z, 3, TEXT, progress=2.0), "progress is 2.0"),
        (lambda: AStarGuidance([]), "concept_tokens names no token"),
    ):
        with pytest.raises(InputError, match=words):
            wrong()
    unet = tiny.unet()
    guide = AStarGuidance(CONCEPTS, resolution=8)
    guide.before_step(unet, Z, 3, TEXT)
    with pytest.raises(InputError, match="call reset\\(\\) first"):
        guide.before_step(unet, Z[:1], 3, TEXT[:1])
    with pytest.raises(InputError, match="must have layers in which images attend to text"):
        AStarGuidance([3], resolution=4).before_step(tiny.pixel_unet(), Z[:, :3], 3, {})


def test_the_grid_is_found_where_none_is_given():
    """A quarter of this latent's side is 2, and images attend to text from 8 x 8 and 4 x 4."""
    denoiser = Denoiser.from_pipeline(tiny.stable_diffusion())
    (hook,) = steer(denoiser, "a red circle", words="circle").hooks
    assert hook.size == (4, 4)
