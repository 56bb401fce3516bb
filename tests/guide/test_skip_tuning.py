"""Skip-Tuning: coefficients, the tensors that each decoder block receives, GroupNorm's part, and real models."""

import math

import pytest
import tiny_pipelines as tiny
import torch
from torch import nn

from retouch.core.diffusion.denoiser import Denoiser
from retouch.core.diffusion.guidance import cfg
from retouch.core.diffusion.process import VP
from retouch.core.diffusion.sampling import sample
from retouch.core.diffusion.steps import heun
from retouch.core.errors import InputError
from retouch.guide.pag import pag
from retouch.guide.skip_tuning import (
    SkipTuning,
    count_skips,
    discriminative_score_matching,
    scale_skips,
    search_skip_coefficients,
    skip_coefficients,
    skip_norm_ratio,
)

Z = tiny.latents()
PROMPTS = ["a red circle", "a large blue square"]
TEXT = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(3))
PIXELS = Z[:, :3]


def run(model, t=3):
    """One call of whichever model it is."""
    with torch.no_grad():
        if isinstance(model, UViT | EDM):
            return model(PIXELS, torch.tensor([float(t)] * 2))
        keywords = {"encoder_hidden_states": TEXT} if "Condition" in type(model).__name__ else {}
        return model(Z[:, : model.config.in_channels], t, **keywords).sample


class Block(nn.Module):
    """One of EDM's: it knows its widths."""

    def __init__(self, into, out):
        super().__init__()
        self.in_channels, self.out_channels = into, out
        self.conv = nn.Conv2d(into, out, 3, padding=1)

    def forward(self, x, emb):
        return (self.conv(x) + emb).tanh()


class EDM(nn.Module):
    """The outline of EDM's networks: an encoder whose features wait on a stack, and a decoder that takes them off."""

    def __init__(self):
        super().__init__()
        self.enc = nn.ModuleDict({"8x8_conv": Block(3, 4), "8x8_block0": Block(4, 4), "8x8_block1": Block(4, 6)})
        self.dec = nn.ModuleDict(
            {
                "8x8_in0": Block(6, 6),
                "8x8_block0": Block(12, 5),
                "8x8_block1": Block(9, 4),
                "8x8_block2": Block(8, 4),
                "8x8_aux_conv": nn.Conv2d(4, 3, 1),
            }
        )

    def forward(self, x, sigma):
        emb, skips = sigma.view(-1, 1, 1, 1) / 10, []
        for block in self.enc.values():
            x = block(x, emb)
            skips.append(x)
        for name, block in self.dec.items():
            if "aux" in name:
                return block(x)
            x = block(x if x.shape[1] == block.in_channels else torch.cat([x, skips.pop()], 1), emb)
        raise AssertionError


class Merge(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.skip_linear = nn.Linear(2 * dim, dim)

    def forward(self, x, skip):
        return self.skip_linear(torch.cat([x, skip], -1)).tanh()


class UViT(nn.Module):
    """The outline of a U-ViT on rows of pixels."""

    def __init__(self):
        super().__init__()
        self.in_blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
        self.out_blocks = nn.ModuleList([Merge(8) for _ in range(2)])

    def forward(self, x, timesteps):
        skips = []
        for block in self.in_blocks:
            x = block(x).tanh()
            skips.append(x)
        x = x + timesteps.view(-1, 1, 1, 1) / 10
        for block in self.out_blocks:
            x = block(x, skips.pop())
        return x


def deep_unet():
    """Three skips in each of two up blocks."""
    return tiny.unet(layers_per_block=2)


def hunyuan():
    from diffusers import HunyuanDiT2DModel

    return tiny.made(
        lambda: HunyuanDiT2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            patch_size=2,
            sample_size=8,
            hidden_size=16,
            num_layers=4,
            cross_attention_dim=8,
            cross_attention_dim_t5=8,
            pooled_projection_dim=4,
            text_len=3,
            text_len_t5=3,
        )
    )


MODELS = {
    "conditional": tiny.unet,
    "deep": deep_unet,
    "pixels": tiny.pixel_unet,
    "edm": lambda: tiny.made(EDM),
    "uvit": lambda: tiny.made(UViT),
}
each_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)


def hooks_of(model):
    return [
        hook
        for module in model.modules()
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    ]


def received(model, coefficients):
    """The skips that each up block of diffusers receives, in the order in which they are used."""
    seen = []

    def probe(module, args, kwargs):
        seen.extend(reversed(kwargs["res_hidden_states_tuple"] if kwargs else args[1]))

    with SkipTuning(model, coefficients):
        handles = [block.register_forward_pre_hook(probe, with_kwargs=True) for block in model.up_blocks]
        run(model)
    for handle in handles:
        handle.remove()
    return seen


# --- coefficients -----------------------------------------------------------------------------------------------------


def test_coefficients_are_on_a_line_from_the_deepest():
    rho = skip_coefficients(8, rho_bottom=0.6, rho_top=1.0)
    torch.testing.assert_close(rho.diff(), torch.full((7,), 0.4 / 8))
    assert rho.shape == (8,) and float(rho[0]) == pytest.approx(0.6) and float(rho[-1]) == pytest.approx(0.95)
    assert float(skip_coefficients(8, rho_bottom=0.6, endpoint=True)[-1]) == pytest.approx(1.0)
    assert float(skip_coefficients(5)[0]) == pytest.approx(0.8)
    for endpoint in (False, True):
        assert skip_coefficients(1, rho_bottom=0.5, endpoint=endpoint).tolist() == [0.5]
    assert torch.equal(skip_coefficients(4, rho_bottom=1.0), torch.ones(4))
    assert float(skip_coefficients(4, rho_bottom=1.1)[0]) == pytest.approx(1.1)  # a search has two sides


@pytest.mark.parametrize(
    ("build", "count"), [*zip(MODELS.values(), (4, 6, 4, 3, 2), strict=True), (hunyuan, 1)], ids=[*MODELS, "hunyuan"]
)
def test_skips_are_counted(build, count):
    model = build()
    assert count_skips(model) == count
    assert count_skips(nn.ModuleDict({"model": model})) == count  # inside of EDM's preconditioning, or wrapped


# --- what happens to the skips ----------------------------------------------------------------------------------------


@each_model
@pytest.mark.usefixtures("global_rng_untouched")
def test_ones_change_nothing_and_nothing_is_left(build):
    model = build()
    plain, k = run(model), count_skips(model)
    for ones in ([1.0] * k, torch.ones(k), lambda t: torch.ones(k)):
        with SkipTuning(model, ones):
            assert torch.equal(run(model), plain)
    with SkipTuning(model, [0.5] * k):
        assert not torch.allclose(run(model), plain)
        assert hooks_of(model)
    assert not hooks_of(model) and torch.equal(run(model), plain)
    with pytest.raises(KeyError), SkipTuning(model, [0.5] * k):
        raise KeyError
    assert not hooks_of(model) and torch.equal(run(model), plain)
    handle = scale_skips(model, [0.5] * k)
    assert not torch.allclose(run(model), plain)
    handle.remove()
    assert not hooks_of(model) and torch.equal(run(model), plain)
    with SkipTuning(model) as tuning, tuning:  # the default, and once more on top
        assert not torch.allclose(run(model), plain)
    assert not hooks_of(model)


def test_an_error_inside_of_the_network_leaves_nothing():
    unet = tiny.unet()
    plain = run(unet)
    with pytest.raises(RuntimeError), SkipTuning(unet), torch.no_grad():
        unet(Z[:, :3], 3, encoder_hidden_states=TEXT)
    assert not hooks_of(unet) and torch.equal(run(unet), plain)


@pytest.mark.parametrize("build", [tiny.unet, deep_unet, tiny.pixel_unet])
def test_each_skip_is_scaled_by_its_own_factor(build):
    model = build()
    k = count_skips(model)
    plain = received(model, [1.0] * k)
    rho = skip_coefficients(k, rho_bottom=0.3)
    for place, (mine, own) in enumerate(zip(received(model, rho), plain, strict=True)):
        torch.testing.assert_close(mine, own * rho[place])
    zero = received(model, [0.0] * k)
    assert all(torch.equal(skip, torch.zeros_like(skip)) for skip in zero)


def test_zero_is_the_same_as_zeros_in_place_of_the_skips():
    unet = tiny.pixel_unet()

    def blank(module, args):
        hidden, skips, *rest = args
        return (hidden, tuple(torch.zeros_like(skip) for skip in skips), *rest)

    with SkipTuning(unet, [0.0] * 4):
        ours = run(unet)
    handles = [block.register_forward_pre_hook(blank) for block in unet.up_blocks]
    assert torch.equal(run(unet), ours)
    for handle in handles:
        handle.remove()


def test_index_zero_is_the_deepest_and_the_last_is_what_conv_in_gave():
    unet, stem = deep_unet(), []
    plain = received(unet, [1.0] * 6)
    unet.conv_in.register_forward_hook(lambda module, args, output: stem.append(output))
    deepest = received(unet, [0.5, 1, 1, 1, 1, 1])
    changed = [not torch.equal(a, b) for a, b in zip(deepest, plain, strict=True)]
    assert changed == [True, False, False, False, False, False]
    assert torch.equal(plain[-1], stem[0]) and torch.equal(deepest[-1], stem[0])
    assert deepest[0].shape[-1] < deepest[-1].shape[-1]
    top = received(unet, [1, 1, 1, 1, 1, 0.0])
    assert [not torch.equal(a, b) for a, b in zip(top, plain, strict=True)] == [False] * 5 + [True]


def test_the_encoders_own_tensors_stay():
    """Scaled in place, the second residual block of a stage would see it."""
    unet, stem = tiny.unet(), []
    unet.conv_in.register_forward_hook(lambda module, args, output: stem.append(output))
    run(unet)
    with SkipTuning(unet, [0.0] * 4):
        run(unet)
    assert torch.equal(stem[0], stem[1])


@pytest.mark.parametrize("place", range(3))
def test_edm_skips_are_the_last_channels_of_each_block(place):
    model, inputs = tiny.made(EDM), []
    blocks = [model.dec[name] for name in ("8x8_block0", "8x8_block1", "8x8_block2")]

    def listen():
        inputs.clear()
        handles = [block.register_forward_pre_hook(lambda _m, args: inputs.append(args[0])) for block in blocks]
        run(model)
        for handle in handles:
            handle.remove()
        return list(inputs)

    plain, width = listen(), (6, 5, 4)[place]
    rho = [1.0, 1.0, 1.0]
    rho[place] = 0.5
    with SkipTuning(model, rho):
        tuned = listen()
    for earlier in range(place):
        assert torch.equal(tuned[earlier], plain[earlier])
    assert torch.equal(tuned[place][:, :width], plain[place][:, :width])
    assert torch.equal(tuned[place][:, width:], plain[place][:, width:] * 0.5)


def test_vision_transformers_with_long_skips():
    model = tiny.made(UViT)
    weight = model.out_blocks[0].skip_linear.weight
    with SkipTuning(model, [0.25, 1.0]):
        tuned = run(model)
    with torch.no_grad():
        weight[:, 8:] *= 0.25  # the same, folded into the weights
    torch.testing.assert_close(run(model), tuned)


def test_a_norm_after_the_join_of_hunyuan_dit():
    model = hunyuan()
    seen = []
    block = next(block for block in model.blocks if block.skip_linear is not None)
    with SkipTuning(model, [0.5]):
        block.skip_norm.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
        block.skip_norm(torch.ones(1, 2, 32))
    assert torch.equal(seen[0], torch.cat([torch.ones(1, 2, 16), torch.full((1, 2, 16), 0.5)], -1))


def test_what_a_controlnet_adds_is_scaled_too():
    unet, seen = tiny.unet(), []
    extra = torch.ones(2, 16, 4, 4)

    def residuals(amount):
        shapes = [(8, 8), (8, 8), (8, 4), (16, 4)]
        adds = [torch.zeros(2, width, side, side) for width, side in shapes[:-1]] + [amount * extra]
        keywords = {"down_block_additional_residuals": adds, "mid_block_additional_residual": torch.zeros(1)}
        seen.clear()
        with torch.no_grad(), SkipTuning(unet, [0.5, 1, 1, 1]):
            handle = unet.up_blocks[0].register_forward_pre_hook(
                lambda module, args, kwargs: seen.append(kwargs["res_hidden_states_tuple"][-1]), with_kwargs=True
            )
            unet(Z, 3, encoder_hidden_states=TEXT, **keywords)
            handle.remove()
        return seen[0]

    torch.testing.assert_close(residuals(3.0) - residuals(0.0), 1.5 * extra)


def test_the_effect_enters_by_the_shortcut():
    """GroupNorm takes the factor out where no group has channels of both halves."""
    from diffusers.models.resnet import ResnetBlock2D

    draw = torch.Generator().manual_seed(1)
    up, down = (torch.randn(2, 8, 6, 6, generator=draw) for _ in range(2))
    for groups, cancels in ((4, True), (1, False)):
        block = tiny.made(
            lambda groups=groups: ResnetBlock2D(
                in_channels=16, out_channels=8, groups=groups, groups_out=4, temb_channels=None, eps=1e-6
            )
        )
        with torch.no_grad():
            moved = block(torch.cat([up, 0.6 * down], 1), None) - block(torch.cat([up, down], 1), None)
            weight = block.conv_shortcut.weight
            expected = nn.functional.conv2d(torch.cat([torch.zeros_like(up), -0.4 * down], 1), weight)
        assert torch.allclose(moved, expected, atol=1e-4) == cancels


# --- time -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [7, torch.tensor(7), torch.tensor([7]), torch.tensor([7, 7])])
def test_a_schedule_is_called_once_a_forward_pass_with_its_time(t):
    unet, times = tiny.pixel_unet(), []

    def schedule(time):
        times.append(time)
        return skip_coefficients(4, rho_bottom=0.5)

    with torch.no_grad(), SkipTuning(unet, schedule):
        tuned = unet(PIXELS, t).sample
        unet(PIXELS, timestep=t + 2)
    assert times == [7, 9]
    with torch.no_grad(), SkipTuning(unet, skip_coefficients(4, rho_bottom=0.5)):
        assert torch.equal(unet(PIXELS, t).sample, tuned)


def test_a_window_of_times():
    unet = tiny.pixel_unet()
    plain = {t: run(unet, t) for t in (100, 500, 900)}
    for coefficients in ([0.5] * 4, lambda t: [0.5] * 4):
        with SkipTuning(unet, coefficients, window=(300, 700)):
            assert [torch.equal(run(unet, t), own) for t, own in plain.items()] == [True, False, True]


def test_a_schedule_needs_one_time():
    unet = tiny.pixel_unet()
    with SkipTuning(unet, lambda t: [1.0] * 4):
        with pytest.raises(InputError, match="several times in one batch"):
            unet(PIXELS, torch.tensor([3, 4]))
        with pytest.raises(InputError, match="must have 4, one for each skip"), SkipTuning(unet, lambda t: [1.0]):
            unet(PIXELS, 3)
    model = tiny.made(UViT)
    with SkipTuning(model, lambda t: [1.0] * 2), pytest.raises(InputError, match="called without a time"):
        model(PIXELS)


def test_one_sample_and_gradients():
    unet = tiny.pixel_unet()
    whole = run(unet)
    with SkipTuning(unet, [0.5] * 4):
        batch = run(unet)
        x = PIXELS[:1].clone().requires_grad_()
        out = unet(x, 3).sample
        torch.testing.assert_close(out, batch[:1], rtol=1e-4, atol=1e-5)
        assert torch.isfinite(torch.autograd.grad(out.sum(), x)[0]).all()
    assert torch.equal(run(unet), whole)


def test_compiled():
    model, unet = tiny.made(EDM), tiny.pixel_unet()
    torch._dynamo.reset()
    with torch.no_grad():
        for coefficients in ([0.5, 0.7, 0.9], lambda t: [0.5, t / 6, 0.9]):
            with SkipTuning(model, coefficients):
                compiled = torch.compile(model, backend="eager")
                torch.testing.assert_close(compiled(PIXELS, torch.tensor([3.0, 3.0])), run(model))
            torch._dynamo.reset()
        with SkipTuning(unet, [0.5, 0.7, 0.9, 0.2]):
            compiled = torch.compile(unet, backend="eager")
            torch.testing.assert_close(compiled(PIXELS, torch.tensor(3)).sample, run(unet))
    torch._dynamo.reset()


# --- measures ---------------------------------------------------------------------------------------------------------


@each_model
def test_the_ratio_of_the_norms_scales_with_the_factor(build):
    model = build()
    k, plain = count_skips(model), run(model)
    keywords = {"encoder_hidden_states": TEXT} if build in (tiny.unet, deep_unet) else {}
    x = Z if keywords else PIXELS
    t = torch.tensor([3.0, 3.0])
    own = skip_norm_ratio(model, x, t, **keywords)
    assert own.shape == (k,) and bool((own > 0).all())
    rho = [1.0] * k
    rho[0] = 0.5
    with SkipTuning(model, rho):
        tuned = skip_norm_ratio(model, x, t, **keywords)
    assert float(tuned[0]) == pytest.approx(0.5 * float(own[0]), rel=1e-5)
    assert not hooks_of(model) and torch.equal(run(model), plain)


def test_the_ratio_is_that_of_the_tensors_that_are_joined():
    model, inputs = tiny.made(EDM), []
    handle = model.dec["8x8_block1"].register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
    ratio = skip_norm_ratio(model, PIXELS, torch.tensor([3.0, 3.0]))
    handle.remove()
    up, skip = inputs[0][:, :5].flatten(1), inputs[0][:, 5:].flatten(1)
    torch.testing.assert_close(ratio[1], (skip.norm(dim=1) / up.norm(dim=1)).mean())


@pytest.mark.usefixtures("global_rng_untouched")
def test_losses_in_pixels_and_in_features():
    model = tiny.made(EDM)
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))

    def features(x):
        return x.mean((2, 3)) @ weight

    def denoise(x, sigma):
        return model(x, torch.full((len(x),), 2.0))

    noise = tiny.latents(seed=4)[:, :3]
    with torch.no_grad():
        found = denoise(PIXELS + 2.0 * noise, 2.0)
        pixel, feature = discriminative_score_matching(denoise, PIXELS, 2.0, features, noise=noise)
        torch.testing.assert_close(pixel, (found - PIXELS).square().mean())
        torch.testing.assert_close(feature, (features(found) - features(PIXELS)).square().mean())
        with SkipTuning(model, [1.0] * 3):
            assert discriminative_score_matching(denoise, PIXELS, 2.0, features, noise=noise) == (pixel, feature)
        with SkipTuning(model, [0.5] * 3):
            assert discriminative_score_matching(denoise, PIXELS, 2.0, features, noise=noise)[0] != pixel
        each = discriminative_score_matching(denoise, PIXELS, torch.tensor([2.0, 2.0]), features, noise=noise)
        torch.testing.assert_close(each[0], pixel)
        drawn = [
            discriminative_score_matching(denoise, PIXELS, 2.0, features, generator=torch.Generator().manual_seed(5))
            for _ in range(2)
        ]
        assert drawn[0] == drawn[1] and drawn[0][0] != pixel
        assert torch.isfinite(discriminative_score_matching(denoise, PIXELS, 2.0, features)[0])
    exact = discriminative_score_matching(lambda x, sigma: PIXELS, PIXELS, 1.0, features)
    assert exact[0] == 0 and exact[1] == 0


def test_a_search_finds_the_least():
    unet = tiny.pixel_unet()
    plain = run(unet)

    def sample_fn():
        return run(unet)

    with SkipTuning(unet, skip_coefficients(4, rho_bottom=0.7)):
        wanted = run(unet)
    found = search_skip_coefficients(
        unet, sample_fn, lambda samples: (samples - wanted).square().mean(), rho_top=(1.0, 0.9)
    )
    assert (found.rho_bottom, found.rho_top, found.value) == (0.7, 1.0, 0.0)
    assert torch.equal(found.coefficients, skip_coefficients(4, rho_bottom=0.7))
    assert [row[:2] for row in found.table[:6]] == [(b / 10, 1.0) for b in range(5, 11)] and len(found.table) == 12
    same = search_skip_coefficients(unet, lambda model, seed=0: model, lambda model: 1.0, rho_bottom=(0.5, 1.0, 1.3))
    assert same.rho_bottom == 1.0  # of equals, the untouched model
    assert not hooks_of(unet) and torch.equal(run(unet), plain)


# --- sampling and pipelines -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny.stable_diffusion, tiny.stable_diffusion_xl])
def test_on_real_pipelines(make):
    pipe = make()
    denoiser = Denoiser.from_pipeline(pipe)
    k = count_skips(pipe.unet)
    settings = {"num_inference_steps": 3, "latents": Z, "output_type": "latent", "guidance_scale": 4.0}
    rules = {"times": 3, "guidance": cfg(4.0)}
    plain = sample(denoiser, Z, PROMPTS, **rules)
    theirs = pipe(PROMPTS, **settings).images
    with SkipTuning(pipe.unet, [1.0] * k):
        assert torch.equal(sample(denoiser, Z, PROMPTS, **rules), plain)
        assert torch.equal(pipe(PROMPTS, **settings).images, theirs)
    with SkipTuning(pipe.unet, skip_coefficients(k, rho_bottom=0.6)):
        tuned, inside = sample(denoiser, Z, PROMPTS, **rules), pipe(PROMPTS, **settings).images
        with_pag = sample(denoiser, Z, PROMPTS, times=3, guidance=cfg(4.0) + pag(2.0))
    torch.testing.assert_close(inside, tuned, rtol=1e-4, atol=1e-4 * float(tuned.abs().max()))
    assert not torch.allclose(tuned, plain) and not torch.allclose(with_pag, tuned)
    assert torch.isfinite(tuned).all() and torch.isfinite(with_pag).all()
    assert torch.equal(sample(denoiser, Z, PROMPTS, **rules), plain)
    assert torch.equal(pipe(PROMPTS, **settings).images, theirs)


def test_a_schedule_in_a_sampler_that_asks_twice_a_step():
    unet, times = tiny.pixel_unet(), []

    def schedule(t):
        times.append(t)
        return skip_coefficients(4, rho_bottom=0.6)

    denoiser = Denoiser(unet, VP.linear())
    with SkipTuning(unet, schedule):
        out = sample(denoiser, PIXELS, times=3, step=heun)
    assert torch.isfinite(out).all() and len(times) == 5  # 2n - 1
    with SkipTuning(unet, skip_coefficients(4, rho_bottom=0.6)):
        assert torch.equal(sample(denoiser, PIXELS, times=3, step=heun), out)


@pytest.mark.parametrize("make", [tiny.dit, tiny.stable_diffusion_3, tiny.flux])
def test_transformers_without_long_skips_are_refused(make):
    transformer = make().transformer
    for call in (
        lambda: SkipTuning(transformer, [1.0]),
        lambda: scale_skips(transformer, [1.0]),
        lambda: count_skips(transformer),
    ):
        with pytest.raises(TypeError, match="must have long skip connections"):
            call()


def test_one_dimensional_unets_have_one_skip_a_block():
    from diffusers import UNet1DModel

    model = tiny.made(
        lambda: UNet1DModel(
            sample_size=32,
            in_channels=2,
            out_channels=2,
            block_out_channels=(32, 32, 32),  # an attention head has 32
            extra_in_channels=64,
            down_block_types=("DownBlock1DNoSkip", "DownBlock1D", "DownBlock1D"),
            up_block_types=("UpBlock1D", "UpBlock1D", "UpBlock1DNoSkip"),
        )
    )
    x = torch.randn(1, 2, 32, generator=torch.Generator().manual_seed(0))
    assert count_skips(model) == 3
    with torch.no_grad():
        plain = model(x, 3).sample
        own = skip_norm_ratio(model, x, 3)
        with SkipTuning(model, [0.5, 1.0, 1.0]):
            assert not torch.allclose(model(x, 3).sample, plain)
            assert float(skip_norm_ratio(model, x, 3)[0]) == pytest.approx(0.5 * float(own[0]), rel=1e-5)
        assert torch.equal(model(x, 3).sample, plain)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda unet: SkipTuning(unet, [1.0] * 3), "coefficients has 3 numbers, but must have 4, one for each skip"),
        (lambda unet: scale_skips(unet, torch.ones(5)), "coefficients has 5 numbers, but must have 4"),
        (lambda unet: SkipTuning(unet, [1.0, -0.1, 1.0, 1.0]), r"coefficients\[1\] is -0.1, but must be at least 0"),
        (lambda unet: scale_skips(unet, [math.nan, 1.0, 1.0, 1.0]), r"coefficients\[0\] is nan"),
        (lambda unet: SkipTuning(unet, [1.0] * 4, window=(3, 2)), "window is"),
        (lambda unet: skip_coefficients(0), "num_skips is 0, but must be greater than 0"),
        (lambda unet: skip_coefficients(4, rho_bottom=-1.0), "rho_bottom is -1.0, but must be at least 0"),
        (lambda unet: skip_coefficients(4, rho_top=math.inf), "rho_top is inf"),
        (lambda unet: search_skip_coefficients(unet, list, len, rho_bottom=()), "rho_bottom or rho_top is empty"),
        (lambda unet: search_skip_coefficients(unet, lambda: 0, lambda x: math.nan), "metric_fn gave nan"),
        (lambda unet: discriminative_score_matching(len, PIXELS, 0.0, len), "sigma is 0.0, but must be a number above"),
        (lambda unet: discriminative_score_matching(len, PIXELS, torch.ones(3), len), "one for each of 2 samples"),
        (lambda unet: discriminative_score_matching(len, PIXELS, 1.0, len, noise=Z), "noise has shape"),
    ],
)
def test_bad_input(wrong, words):
    unet = tiny.pixel_unet()
    with pytest.raises(InputError, match=words):
        wrong(unet)
    assert not hooks_of(unet)


def test_freeu_is_refused():
    unet = tiny.unet()
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    with pytest.raises(InputError, match="FreeU"):
        scale_skips(unet, [1.0] * 4)
    unet.disable_freeu()
    with SkipTuning(unet):
        run(unet)
        unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
        with pytest.raises(InputError, match="FreeU"):
            run(unet)
