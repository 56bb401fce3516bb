"""PPAP: routing, its LoRA, transfer from clean to noisy images, and guidance of real models by real guides."""

import math

import pytest
import tiny_pipelines as tiny
import torch
import torch.nn.functional as F
from torch import nn

from retouch.core import seeds
from retouch.core.diffusion.denoiser import Denoiser, Prediction
from retouch.core.diffusion.guidance import cfg
from retouch.core.diffusion.process import EDM, VP, Level
from retouch.core.diffusion.sampling import Hook, sample
from retouch.core.diffusion.steps import ancestral_sigma, ddim, ddpm
from retouch.core.errors import InputError
from retouch.core.features import capture
from retouch.guide import attach
from retouch.guide.ppap import (
    ExpertGuidance,
    add_noise_experts,
    class_loss,
    expert_index,
    knowledge_transfer_loss,
    lora_conv2d,
    lora_delta,
    ppap,
    train_experts,
)
from retouch.worlds.gaussians import ring

DRAW = torch.Generator().manual_seed(0)
PIXELS = tiny.latents(4, 3)
LOGITS, OTHER = torch.randn(2, 6, 5, generator=DRAW)
ALPHAS = VP.linear(timesteps=100, end=0.2).alphas_cumprod
PROMPTS = ["a red circle", "a large blue square"]


def guide(channels=3, seed=0):
    """A small network with a stem, batch normalisation and a classification layer."""
    with seeds.isolated(seed):
        model = nn.Sequential()
        model.conv1 = nn.Conv2d(channels, 6, 3, padding=1, bias=False)
        model.bn1 = nn.BatchNorm2d(6)
        model.act1 = nn.ReLU()
        model.conv2 = nn.Conv2d(6, 6, 3, padding=1, stride=2)
        model.act2 = nn.ReLU()
        model.pool = nn.AdaptiveAvgPool2d(2)
        model.flat = nn.Flatten()
        model.fc = nn.Linear(24, 5)
        return model.eval()


def shaken(experts, seed=1):
    """Experts that differ from the model and from each other."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in experts.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return experts


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(module, before):
    return all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


# --- routing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("boundary", ["upper", "lower"])
@pytest.mark.parametrize(("count", "total"), [(5, 1000), (3, 100), (7, 50), (1, 10), (10, 10)])
def test_each_timestep_has_one_expert(boundary, count, total):
    t = torch.arange(total)
    found = expert_index(t, num_experts=count, num_timesteps=total, boundary=boundary)
    if boundary == "upper":
        wanted = [t * count // total for t in range(total)]
    else:
        wanted = [next(n for n in range(count) if t * count <= (n + 1) * total) for t in range(total)]
    assert found.tolist() == wanted and found.dtype == torch.int64
    assert set(found.tolist()) == set(range(count)) or boundary == "lower"
    told = {"num_experts": count, "num_timesteps": total, "boundary": boundary}
    assert torch.equal(expert_index(t.double(), **told), found)


def test_boundaries():
    assert expert_index(torch.tensor([[199, 200], [399, 999]])).tolist() == [[0, 1], [1, 4]]
    assert expert_index(torch.tensor([0, 200, 201, 400]), boundary="lower").tolist() == [0, 0, 1, 1]
    assert expert_index(torch.tensor([199.5, 200.5])).tolist() == [0, 1]
    assert int(expert_index(999)) == 4


def test_a_mixed_batch_is_split_by_sample():
    experts = shaken(add_noise_experts(guide()))
    t = torch.tensor([900, 10, 450, 20])
    with torch.no_grad():
        found = experts(PIXELS, t)
        for k in range(4):
            alone = experts(PIXELS[k : k + 1], t[k])
            torch.testing.assert_close(found[k : k + 1], alone)
            torch.testing.assert_close(alone, experts(PIXELS[k : k + 1], expert=int(expert_index(t[k]))))
    assert not torch.allclose(found, experts(PIXELS, 10))


# --- LoRA -------------------------------------------------------------------------------------------------------------


def factors(out, channels, k, rank, seed=2):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rank * k, channels * k, generator=draw), torch.randn(out * k, rank * k, generator=draw)


@pytest.mark.parametrize("k", [1, 3])
def test_the_convolution_in_closed_form(k):
    weight, bias, x = torch.randn(4, 3, k, k, generator=DRAW), torch.randn(4, generator=DRAW), PIXELS
    a, b = factors(4, 3, k, 2)
    told = {"rank": 2, "lora_alpha": 6, "stride": 2, "padding": 1, "dilation": 1}
    found = lora_conv2d(x, weight, bias, lora_a=a, lora_b=b, **told)
    wanted = F.conv2d(x, weight + 3 * (b @ a).reshape(4, 3, k, k), bias, stride=2, padding=1)
    torch.testing.assert_close(found, wanted)
    off = lora_conv2d(x, weight, None, lora_a=a, lora_b=torch.zeros_like(b), **told)
    assert torch.equal(off, F.conv2d(x, weight, None, stride=2, padding=1))
    twice = lora_delta(a, b, shape=(4, 3, k, k), rank=2, lora_alpha=12)
    torch.testing.assert_close(twice, 2 * lora_delta(a, b, shape=(4, 3, k, k), rank=2, lora_alpha=6))


def test_linear_layers_agree_with_peft():
    """Alpha differs from r, so that the factor is seen; the release leaves it out before merging."""
    from peft import LoraConfig, inject_adapter_in_model

    with seeds.isolated(0):
        model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 3))
        experts = shaken(add_noise_experts(model, num_experts=1, rank=2, lora_alpha=8))
        theirs = inject_adapter_in_model(LoraConfig(r=2, lora_alpha=8, target_modules=["0"]), model.eval())
    psi, layer = experts.experts[0], theirs[0]
    assert list(psi.lora_a) == ["0/weight"] and not list(psi.values)
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(psi.lora_a["0/weight"])
        layer.lora_B["default"].weight.copy_(psi.lora_b["0/weight"])
    x = torch.randn(3, 6, generator=DRAW)
    torch.testing.assert_close(experts(x, 0), theirs(x))


# --- experts ----------------------------------------------------------------------------------------------------------


def test_new_experts_are_the_model_itself(global_rng_untouched):
    model = guide()
    experts = add_noise_experts(model)
    assert not experts.training
    with torch.no_grad():
        for t in (0, 500, 999):
            assert torch.equal(experts(PIXELS, t), model(PIXELS))
    again = add_noise_experts(model)
    assert same(again, state(experts)) and not same(add_noise_experts(model, seed=1), state(experts))
    bound = 1 / math.sqrt(3 * 3)  # Kaiming with a = sqrt 5
    assert float(experts.experts[0].lora_a["conv1/weight"].detach().abs().max()) <= bound
    assert experts.experts[0].lora_a["conv1/weight"].shape == (48, 9)
    assert experts.experts[0].lora_b["conv1/weight"].shape == (18, 48)


def test_only_psi_is_trained():
    experts = add_noise_experts(guide(), num_experts=2)
    psi = experts.experts[0]
    assert set(psi.lora_a) == {"conv1/weight", "conv2/weight"}
    assert set(psi.values) == {"bn1/weight", "bn1/bias", "conv2/bias"}  # not the bias of fc
    assert {n for n, _ in psi.named_buffers()} == {"bn1/running_mean", "bn1/running_var", "bn1/num_batches_tracked"}
    trained = {name for name, p in experts.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in experts.named_parameters() if name.startswith("experts.")}


def test_merging_is_a_round_trip():
    experts = shaken(add_noise_experts(guide(), num_experts=3, num_timesteps=100))
    before = state(experts)
    t = torch.tensor([0, 40, 80, 99])
    with torch.no_grad():
        plain = experts(PIXELS, t)
        assert torch.equal(experts.merge()(PIXELS, t), plain)
        assert same(experts, before)  # no name and no number has changed
        assert experts.unmerge() is experts and torch.equal(experts(PIXELS, t), plain)
        whole = experts.merged(1)
        assert type(whole) is type(experts.model)
        torch.testing.assert_close(whole(PIXELS), experts(PIXELS, 40))
        experts.merge(1)
        shaken(experts, seed=5)
        torch.testing.assert_close(experts(PIXELS, 40), whole(PIXELS))  # as it was when it was merged
        assert not torch.allclose(experts.unmerge()(PIXELS, 40), whole(PIXELS))
    experts.train().eval()
    assert same(guide(), state(experts.model))


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_in_a_resnet_of_transformers(kind):
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type=kind, num_labels=5)
    model = tiny.made(lambda: ResNetForImageClassification(config))
    experts = add_noise_experts(model, num_experts=2, rank=4)
    stem, block = "resnet.embedder.embedder.convolution", "resnet.encoder.stages.{}.layers.0.layer.{}.convolution"
    names = {stem, *(block.format(stage, k) for stage in range(2) for k in range(2))}
    assert {key.replace("/", ".") for key in experts.experts[0].lora_a} == {f"{name}.weight" for name in names}
    images = tiny.latents(2, 3, 32)
    with torch.no_grad():
        assert torch.equal(experts(images, 900), model(images).logits)
    g = ExpertGuidance(experts, scale=1.0)(images, torch.tensor([10, 900]), torch.tensor([0, 4]))
    assert g.shape == images.shape and float(g.abs().sum()) > 0


@pytest.mark.parametrize("family", ["ViT", "DeiT"])
def test_in_a_vision_transformer_of_transformers(family):
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = getattr(transformers, f"{family}Config")(image_size=8, patch_size=4, num_labels=5, **sizes)
    model = tiny.made(lambda: getattr(transformers, f"{family}ForImageClassification")(config))
    experts = shaken(add_noise_experts(model, num_experts=2, rank=2, lora_alpha=2))
    assert len(experts.experts[0].lora_a) == 8 and "classifier/bias" not in experts.experts[0].values
    assert all("attention" in key for key in experts.experts[0].lora_a)
    with torch.no_grad():
        torch.testing.assert_close(experts(PIXELS, 100), experts.merged(0)(PIXELS).logits)


def test_depth_by_a_dpt_of_transformers():
    from transformers import DPTConfig, DPTForDepthEstimation

    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16}
    neck = {"neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8, "reassemble_factors": [4, 2, 1, 0.5]}
    config = DPTConfig(image_size=16, patch_size=4, backbone_out_indices=[0, 1, 2, 3], **sizes, **neck)
    model = tiny.made(lambda: DPTForDepthEstimation(config))
    experts = add_noise_experts(model, num_experts=2, rank=2)
    images = tiny.latents(2, 3, 16)
    with torch.no_grad():
        depth = model(images).predicted_depth
        assert torch.equal(experts(images, 3), depth)
    train_experts(experts, model, images, ALPHAS, iterations=2, loss="mse", batch_size=2)
    goal = depth.flip(0)
    rule = ExpertGuidance(experts, goal, scale=2.0, loss=lambda out, goal: (out - goal).square().mean((1, 2)))
    x = images.clone().requires_grad_()
    wanted = torch.autograd.grad(-2.0 * (experts(x, 60) - goal).square().mean((1, 2)).sum(), x)[0]
    torch.testing.assert_close(rule(images, 60), wanted)


def test_layers_may_be_named_and_all_but_the_head_fit_in_any_model():
    with seeds.isolated(0):
        plain = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    assert list(add_noise_experts(plain).experts[0].lora_a) == ["0/weight", "2/weight"]
    assert list(add_noise_experts(plain, target_layers=["4", "0"]).experts[0].lora_a) == ["0/weight", "4/weight"]
    assert list(add_noise_experts(guide(), target_layers="conv1").experts[0].lora_a) == ["conv1/weight"]


# --- transfer ---------------------------------------------------------------------------------------------------------


def test_the_loss_in_closed_form():
    wanted, found = (OTHER / 0.25).softmax(1), LOGITS.softmax(1)
    kl = (wanted * (wanted.log() - found.log())).sum(1)
    torch.testing.assert_close(knowledge_transfer_loss(LOGITS, OTHER), kl.mean() / 5)
    whole = {"class_reduction": "sum"}
    torch.testing.assert_close(knowledge_transfer_loss(LOGITS, OTHER, **whole), kl.mean())
    torch.testing.assert_close(knowledge_transfer_loss(LOGITS, OTHER, reduction="none", **whole), kl)
    torch.testing.assert_close(knowledge_transfer_loss(LOGITS, OTHER, reduction="sum"), kl.sum() / 5)
    assert torch.isfinite(knowledge_transfer_loss(1e4 * LOGITS, 1e4 * OTHER))


def test_the_loss_is_zero_only_at_the_sharpened_teacher():
    s, o = (OTHER / 0.25 + 3.0).requires_grad_(), OTHER.clone().requires_grad_()
    loss = knowledge_transfer_loss(s, o)
    assert float(loss) == pytest.approx(0.0, abs=1e-6)
    loss.backward()
    assert o.grad is None and float(s.grad.abs().max()) < 1e-6
    assert float(knowledge_transfer_loss(OTHER, OTHER)) > 0.01
    assert float(knowledge_transfer_loss(OTHER, OTHER, teacher_temperature=1.0)) == pytest.approx(0.0, abs=1e-6)


def test_training_changes_psi_alone(global_rng_untouched):
    model, teacher = guide(), guide().train()
    experts = add_noise_experts(model, num_experts=3, num_timesteps=100, rank=2)
    phi, before, told = state(experts.model), [state(psi) for psi in experts.experts], state(teacher)
    found = train_experts(experts, teacher, PIXELS, ALPHAS, iterations=6, batch_size=4, lr=1e-2)
    assert found is experts and not experts.training
    assert same(experts.model, phi) and same(model, phi) and same(teacher, told)
    assert all(p.grad is None for p in [*teacher.parameters(), *experts.model.parameters()])
    for psi, old in zip(experts.experts, before, strict=True):
        assert not any(torch.equal(value, old[name]) for name, value in psi.state_dict().items() if "lora_b" in name)
        assert not torch.equal(psi.get_buffer("bn1/running_mean"), old["bn1/running_mean"])
    assert int(experts.experts[0].get_buffer("bn1/num_batches_tracked")) == 2
    assert int(experts.experts[2].get_buffer("bn1/num_batches_tracked")) == 6  # it started from the one before
    assert all(p.requires_grad for p in experts.experts.parameters())
    again = train_experts(
        add_noise_experts(model, num_experts=3, rank=2), teacher, PIXELS, ALPHAS, iterations=6, batch_size=4, lr=1e-2
    )
    assert same(again, state(experts)) and again.num_timesteps == 100


def test_without_a_warm_start_experts_are_apart():
    experts = add_noise_experts(guide(), num_experts=2, rank=2)
    train_experts(experts, guide(), PIXELS, ALPHAS, iterations=4, batch_size=4, warm_start=False)
    assert [int(psi.get_buffer("bn1/num_batches_tracked")) for psi in experts.experts] == [2, 2]


@pytest.mark.parametrize(("count", "total"), [(3, 100), (7, 100)])
def test_ranges_of_training_are_those_of_routing(count, total):
    """What the experts see is x0 with the noise of their own range: its variance tells the timestep."""
    experts = add_noise_experts(guide(), num_experts=count, rank=1)
    seen = []
    train = experts._ask

    def ask(expert, x):
        ratio = x.mean((1, 2, 3))  # of images that are all ones, and noise that averages out
        seen.extend((expert, float(value)) for value in ratio)
        return train(expert, x)

    experts._ask = ask
    images = torch.ones(64, 3, 64, 64)
    alphas = VP.linear(timesteps=total, end=0.01).alphas_cumprod
    train_experts(experts, guide(), images, alphas, iterations=count, batch_size=64)
    known = alphas.sqrt()
    for expert, value in seen:
        mine = known[expert_index(torch.arange(total), num_experts=count, num_timesteps=total) == expert]
        assert float(mine.min()) - 0.05 < value < float(mine.max()) + 0.05
    assert {expert for expert, _ in seen} == set(range(count))


def test_images_may_come_from_a_sampler_that_draws():
    asked = []

    def sampler(count):
        asked.append(count)
        return torch.randn(count, 3, 8, 8)  # of the global generator: that of the user is left alone

    def run():
        experts = add_noise_experts(guide(), num_experts=2, rank=2)
        return train_experts(experts, guide(), sampler, ALPHAS, iterations=4, batch_size=3)

    before = torch.get_rng_state()
    first = run()
    assert asked == [3] * 4 and torch.equal(before, torch.get_rng_state())
    assert same(run(), state(first))


def test_the_teacher_sees_clean_images_in_its_own_way():
    teacher, seen = guide(), []

    def preprocess(x):
        seen.append(x)
        return x / 2 + 0.5

    experts = add_noise_experts(guide(), num_experts=1, rank=2)
    told = {"iterations": 1, "batch_size": 4, "flip": False, "teacher_preprocess": preprocess}
    train_experts(experts, teacher, PIXELS, ALPHAS, **told)
    assert {float(x.sum()) for x in seen[0]} == {float(x.sum()) for x in PIXELS}


def test_experts_learn_to_see_through_noise():
    """Points on a ring and a network that tells its sectors; the noise turns no sign around, but shrinks the points."""
    mixture = ring(4, std=0.1)
    modes, points = mixture.draw_with_modes(400, seed=0)
    with seeds.isolated(0):
        teacher = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 4))
        optimizer = torch.optim.Adam(teacher.parameters(), lr=1e-2)
        for _ in range(150):
            optimizer.zero_grad()
            F.cross_entropy(teacher(points), modes).backward()
            optimizer.step()
    told = {"iterations": 300, "batch_size": 200, "lr": 1e-2, "class_reduction": "sum"}
    process, draw = VP(ALPHAS), torch.Generator().manual_seed(9)
    losses = {}
    for count in (1, 4):
        experts = add_noise_experts(teacher, num_experts=count, rank=4)
        train_experts(experts, teacher, points, ALPHAS, **told)
        with torch.no_grad():
            for t in (10, 40, 90):
                times = torch.full((400,), t)
                x = process.add_noise(points, torch.randn(points.shape, generator=draw), times)
                wanted = teacher(points)
                for name, found in (("clean", teacher(x)), (count, experts(x, times))):
                    losses[name, t] = float(knowledge_transfer_loss(found, wanted, class_reduction="sum"))
    for t in (40, 90):
        assert losses[4, t] < losses["clean", t]
    assert sum(losses[4, t] for t in (10, 40, 90)) < sum(losses[1, t] for t in (10, 40, 90))


# --- guidance ---------------------------------------------------------------------------------------------------------


def test_the_gradient_and_what_it_leaves():
    experts = shaken(add_noise_experts(guide(), num_experts=4)).train()
    before = state(experts)
    t, y = torch.tensor([999, 0, 300, 600]), torch.tensor([0, 1, 2, 3])
    found = ExpertGuidance(experts, scale=7.5)(PIXELS, t, y)
    assert experts.training and same(experts, before)  # batch normalisation ran in eval mode
    assert all(p.grad is None for p in experts.parameters()) and not found.requires_grad
    x = PIXELS.clone().requires_grad_()
    chosen = experts.eval()(x, t).log_softmax(1).gather(1, y[:, None]).sum()
    torch.testing.assert_close(found, 7.5 * torch.autograd.grad(chosen, x)[0])
    alone = ExpertGuidance(experts, 2)(PIXELS[2:3], 300)
    torch.testing.assert_close(found[2:3], alone)  # samples do not mix
    torch.testing.assert_close(ExpertGuidance(experts.merge(), y)(PIXELS, t), found)
    assert not ExpertGuidance(experts, y, scale=0.0)(PIXELS, t).any()


def test_the_rule_is_ddims():
    experts = shaken(add_noise_experts(guide()))
    x0, noise, level = PIXELS, PIXELS.flip(0), Level(100, 0.8, 0.6, 1, 5)
    x = level.alpha * x0 + level.sigma * noise
    g = ExpertGuidance(experts, 1)(x, 100)
    change = ppap(experts, 1).change({"cond": Prediction(x0, noise)}, x, level)
    torch.testing.assert_close(change.noise, -level.sigma * g)
    torch.testing.assert_close(level.alpha * change.x0 + level.sigma * change.noise, torch.zeros_like(x))


class Seen(Hook):
    """Keeps what a run went through."""

    def start(self, x, grid):
        self.moves = []

    def after(self, move, x):
        self.moves.append((move.x, move.here, move.there, x))
        return x


def test_ddpm_steps_are_shifted_by_the_variance():
    experts, seen, shifted = shaken(add_noise_experts(guide())), Seen(), Seen()
    rule = ExpertGuidance(experts, torch.tensor([0, 1, 2, 3]), scale=3.0)
    told = {"times": 5, "step": ddpm}
    denoiser = Denoiser(tiny.pixel_unet(), VP.linear())
    sample(denoiser, PIXELS, hooks=[seen, rule, shifted], generator=torch.Generator().manual_seed(0), **told)
    assert [int(expert_index(here.time)) for _, here, _, _ in seen.moves] == [4, 3, 2, 1, 0]  # original timesteps
    for (x, here, there, before), (*_, after) in zip(seen.moves, shifted.moves, strict=True):
        g = rule(x, int(here.time))
        torch.testing.assert_close(after, before + ancestral_sigma(here, there) ** 2 * g)
    off = ExpertGuidance(experts, 0, scale=0.0)
    plain = sample(denoiser, PIXELS, generator=torch.Generator().manual_seed(0), **told)
    assert torch.equal(sample(denoiser, PIXELS, hooks=[off], generator=torch.Generator().manual_seed(0), **told), plain)
    assert torch.equal(
        sample(denoiser, PIXELS, times=5, guidance=ppap(experts, 0, scale=0.0)),
        sample(denoiser, PIXELS, times=5),
    )


def test_inside_an_unconditional_pipeline():
    from diffusers import DDIMPipeline, DDIMScheduler

    pipe = tiny.quiet(DDIMPipeline(tiny.pixel_unet(), DDIMScheduler(clip_sample=False)))
    experts = shaken(add_noise_experts(guide()))
    rule = ppap(experts, torch.tensor([0, 1, 2]), scale=5.0)
    draw = lambda: torch.Generator().manual_seed(4)  # noqa: E731
    told = {"batch_size": 3, "num_inference_steps": 4, "output_type": "np"}
    plain = torch.as_tensor(pipe(generator=draw(), **told).images)
    with attach(pipe, rule):
        theirs = torch.as_tensor(pipe(generator=draw(), **told).images).permute(0, 3, 1, 2)
    assert torch.equal(torch.as_tensor(pipe(generator=draw(), **told).images), plain)
    denoiser = Denoiser(pipe.unet, VP(pipe.scheduler.alphas_cumprod))
    noise = torch.randn(3, 3, 8, 8, generator=draw())
    ours = denoiser.decode(sample(denoiser, noise, times=4, guidance=rule))
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(theirs.permute(0, 2, 3, 1), plain, atol=1e-3)


def test_on_latents_with_classifier_free_guidance():
    pipe = tiny.stable_diffusion()
    experts, z = shaken(add_noise_experts(guide(channels=4))), tiny.latents()
    rule = ppap(experts, [0, 1], scale=5.0)
    settings = {"num_inference_steps": 4, "latents": z, "output_type": "latent", "guidance_scale": 4.0}
    with attach(pipe, rule):
        theirs = pipe(PROMPTS, **settings).images
    ours = sample(Denoiser.from_pipeline(pipe), z, PROMPTS, times=4, guidance=cfg(4.0) + rule, step=ddim)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4 * float(ours.abs().max()))
    with pytest.raises(InputError, match="target is"), attach(pipe, ppap(experts, 99)):
        pipe(PROMPTS, **settings)
    assert not pipe.unet._forward_hooks and torch.is_grad_enabled()


def test_guided_samples_are_what_was_asked_for():
    """An exact unconditional model, and experts whose noisy classifier is exact as well, up to a linear layer."""
    mixture = ring(4, std=0.2)
    with seeds.isolated(0):
        teacher = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 4))
        modes, points = mixture.draw_with_modes(400, seed=0)
        optimizer = torch.optim.Adam(teacher.parameters(), lr=1e-2)
        for _ in range(150):
            optimizer.zero_grad()
            F.cross_entropy(teacher(points), modes).backward()
            optimizer.step()
    process = VP(ALPHAS)
    experts = add_noise_experts(teacher, num_experts=4, rank=4)
    train_experts(experts, teacher, points, ALPHAS, iterations=200, batch_size=200, lr=1e-2, class_reduction="sum")
    wanted = torch.arange(64) % 4
    noise = torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def share(scale):
        x = sample(mixture.denoiser(process), noise, times=50, guidance=ppap(experts, wanted, scale=scale))
        return float((mixture.responsibilities(x).argmax(1) == wanted).double().mean())

    assert share(0.0) < 0.5
    assert share(3.0) > 0.8


def test_experts_are_asked_only_at_levels_of_their_process():
    experts = add_noise_experts(guide())
    with pytest.raises(InputError, match="must be of a VP process"):
        sample(Denoiser(tiny.pixel_unet(), EDM(), predicts="x0"), PIXELS, times=2, guidance=ppap(experts, 0))


def test_nothing_is_left_in_the_guide():
    experts = add_noise_experts(guide())
    with capture(experts.model, ["conv1"]) as seen, pytest.raises(InputError, match="target is"):
        ExpertGuidance(experts.train(), 9)(PIXELS, 3)
    assert "conv1" in seen and experts.training
    assert same(experts.model, state(guide()))


# --- bad input --------------------------------------------------------------------------------------------------------

A, B = factors(4, 3, 3, 2)
WEIGHT = torch.zeros(4, 3, 3, 3)


def conv(weight=WEIGHT, a=A, b=B, rank=2, **settings):
    return lora_conv2d(PIXELS, weight, None, lora_a=a, lora_b=b, rank=rank, lora_alpha=8, **settings)


def train(**settings):
    experts = add_noise_experts(guide(), num_experts=2)
    return train_experts(experts, guide(), PIXELS, ALPHAS, **{"iterations": 2, **settings})


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: expert_index(3, num_experts=0), "num_experts is 0, but must be at least 1 and at most 1000"),
        (lambda: expert_index(3, num_experts=11, num_timesteps=10), "num_experts is 11"),
        (lambda: expert_index(1000), "timesteps is 1000, but must be 0 to 999"),
        (lambda: expert_index(torch.tensor([-1])), "timesteps is"),
        (lambda: expert_index(3, boundary="middle"), "boundary is 'middle'"),
        (lambda: conv(groups=3), "groups is 3, but must be 1"),
        (lambda: conv(rank=0), "rank is 0"),
        (lambda: conv(rank=3), r"lora_a has shape \(6, 9\), but must be \(9, 9\) for rank 3"),
        (lambda: conv(b=B[:4]), "lora_b has shape"),
        (lambda: conv(weight=torch.zeros(4, 3, 3, 1)), "weight has shape"),
        (lambda: knowledge_transfer_loss(LOGITS, OTHER[:2]), "student_logits has shape"),
        (lambda: knowledge_transfer_loss(LOGITS, OTHER, teacher_temperature=0.0), "teacher_temperature is 0.0"),
        (lambda: knowledge_transfer_loss(LOGITS, OTHER, class_reduction="none"), "class_reduction is 'none'"),
        (lambda: knowledge_transfer_loss(LOGITS, OTHER, reduction="all"), "reduction is 'all'"),
        (lambda: add_noise_experts(guide(), num_experts=0), "num_experts is 0"),
        (lambda: add_noise_experts(guide(), num_experts=11, num_timesteps=10), "num_experts is 11"),
        (lambda: add_noise_experts(guide(), rank=0), "rank is 0"),
        (lambda: add_noise_experts(guide(), lora_alpha=0), "lora_alpha is 0"),
        (lambda: add_noise_experts(nn.Sequential(nn.ReLU())), "no Conv2d or Linear layer that could be adapted"),
        (lambda: add_noise_experts(guide(), target_layers=["conv3"]), "target_layers has 'conv3'.*Did you mean conv"),
        (lambda: add_noise_experts(guide(), target_layers=[]), "target_layers is empty"),
        (
            lambda: add_noise_experts(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), target_layers=["0"]),
            "target_layers has '0', a convolution in 2 groups",
        ),
        (lambda: add_noise_experts(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))), "no Conv2d or Linear layer"),
        (lambda: add_noise_experts(guide())(PIXELS, torch.tensor([1, 2])), "t has shape"),
        (lambda: add_noise_experts(guide())(PIXELS), "t is None"),
        (lambda: add_noise_experts(guide())(PIXELS, expert=5), "expert is 5"),
        (lambda: train(iterations=0), "iterations is 0"),
        (lambda: train(lr=0.0), "lr is 0.0"),
        (lambda: train(weight_decay=-1.0), "weight_decay is -1.0"),
        (lambda: train(loss="l1"), "loss is 'l1'"),
        (lambda: ExpertGuidance(add_noise_experts(guide()), scale=-1.0), "scale is -1.0"),
        (lambda: ExpertGuidance(add_noise_experts(guide()))(PIXELS, 3), "target is None"),
        (lambda: ExpertGuidance(add_noise_experts(guide()), 5)(PIXELS, 3), "target is .*but must be 0 to 4"),
        (lambda: ExpertGuidance(add_noise_experts(guide()), [1, 2])(PIXELS, 3), r"target has shape \(2,\)"),
        (lambda: class_loss(torch.zeros(2, 5, 3, 3), 1), "give a loss"),
    ],
)
def test_bad_input(wrong, words):
    with seeds.isolated(0), pytest.raises(InputError, match=words):
        wrong()
