"""EfficientTrain: exact low frequencies, the schedule of the paper, and real vision transformers that change size."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.optim import AdamW

from retouch.core.data import TensorData
from retouch.core.errors import InputError
from retouch.core.loop import Callback, Checkpoint, fit
from retouch.core.models import Batch
from retouch.train.cutmix import CutMix
from retouch.train.efficient_train import (
    CurriculumStage,
    EfficientTrain,
    efficient_train_curriculum,
    low_frequency_crop,
    recipe,
    relative_cost,
    resize_position_embedding,
    stage_at,
)

DRAW = torch.Generator().manual_seed(0)
IMAGES = torch.randn(3, 2, 24, 24, generator=DRAW, dtype=torch.float64)


def cropped_by_fft(images, height, width):
    """The definition, with both Fourier transforms."""
    rows, columns = images.shape[-2:]
    spectrum = torch.fft.fft2(images)
    a, b = height // 2, width // 2
    spectrum = torch.cat([spectrum[..., :a, :], spectrum[..., rows - a :, :]], -2)
    spectrum = torch.cat([spectrum[..., :b], spectrum[..., columns - b :]], -1)
    return torch.fft.ifft2(spectrum * (2 * a / rows) * (2 * b / columns)).real


def wave(size, frequency, phase=0.0, dim=-1):
    n = torch.arange(size, dtype=torch.float64)
    values = (2 * math.pi * frequency * n / size + phase).cos()
    return (values if dim == -1 else values[:, None]).expand(1, 1, size, size)


def test_golden(golden):
    case = golden("efficient_train")
    for bandwidth in (8, 16, 20, 24, 32):
        case.close(f"out_crop_{bandwidth}", low_frequency_crop(torch.tensor(case.in_images), bandwidth))


# --- the crop -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(24, 24), (23, 23), (24, 31), (7, 12)])
@pytest.mark.parametrize("bandwidth", [2, 3, 6, 7, (4, 6)])
def test_is_the_definition_by_fourier_transforms(size, bandwidth):
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    height, width = bandwidth if isinstance(bandwidth, tuple) else (bandwidth, bandwidth)
    cropped = low_frequency_crop(images, bandwidth)
    assert cropped.shape == (2, 3, 2 * (height // 2), 2 * (width // 2))
    torch.testing.assert_close(cropped, cropped_by_fft(images, height, width))


def test_at_full_bandwidth_nothing_changes():
    assert torch.equal(low_frequency_crop(IMAGES, 24), IMAGES)
    odd = IMAGES[..., :23, :23]
    assert low_frequency_crop(odd, 23).shape[-2:] == (22, 22)  # an odd number counts as the even one below
    for bandwidth in (23, 22):  # one axis whole
        torch.testing.assert_close(low_frequency_crop(IMAGES, (24, bandwidth)), cropped_by_fft(IMAGES, 24, bandwidth))


@pytest.mark.parametrize("bandwidth", range(2, 25, 2))
def test_constants_and_means_are_kept(bandwidth):
    constant = torch.full((1, 1, 24, 24), 0.3, dtype=torch.float64)
    torch.testing.assert_close(
        low_frequency_crop(constant, bandwidth), constant[..., :bandwidth, :bandwidth], rtol=1e-10, atol=0
    )
    cropped = low_frequency_crop(IMAGES, bandwidth)
    torch.testing.assert_close(cropped.mean((-2, -1)), IMAGES.mean((-2, -1)))


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("frequency", range(13))
def test_low_waves_stay_exactly_the_nyquist_wave_halves_and_high_ones_vanish(frequency, dim):
    cropped = low_frequency_crop(wave(24, frequency, dim=dim), 16)
    share = 1.0 if frequency < 8 else 0.5 if frequency == 8 else 0.0
    torch.testing.assert_close(cropped, share * wave(16, frequency, dim=dim), rtol=1e-9, atol=1e-12)


def test_band_limited_images_are_resampled_exactly():
    def surface(size):
        x = torch.arange(size, dtype=torch.float64) / size
        y = x[:, None]
        turn = 2 * math.pi
        return ((turn * (3 * x + 2 * y) + 0.3).cos() + 0.5 * (turn * (5 * y - x)).sin() + 0.1)[None, None]

    torch.testing.assert_close(low_frequency_crop(surface(24), 14), surface(14))


def test_is_linear_and_acts_on_every_channel_alike():
    other = IMAGES.flip(0)
    mixed = low_frequency_crop(2 * IMAGES - 3 * other, 16)
    torch.testing.assert_close(mixed, 2 * low_frequency_crop(IMAGES, 16) - 3 * low_frequency_crop(other, 16))
    weights = torch.tensor([[0.2, 0.8], [1.5, -0.5]], dtype=torch.float64)
    torch.testing.assert_close(
        low_frequency_crop(torch.einsum("oc,nchw->nohw", weights, IMAGES), 16),
        torch.einsum("oc,nchw->nohw", weights, low_frequency_crop(IMAGES, 16)),
    )
    clips = IMAGES.view(3, 1, 2, 24, 24)
    torch.testing.assert_close(low_frequency_crop(clips, 16).view(3, 2, 16, 16), low_frequency_crop(IMAGES, 16))


def test_flips_and_turns_commute():
    def flipped(images, dim):  # index n becomes -n: a flip, and a roll by one pixel
        return images.flip(dim).roll(1, dim)

    # All but one: of the frequencies (-8, -8), (-8, 8), (8, -8) and (8, 8), one in the crop, it keeps the first.
    spectrum = torch.fft.fft2(IMAGES)
    spectrum[..., [8, 8, 16, 16], [8, 16, 8, 16]] = 0
    images = torch.fft.ifft2(spectrum).real
    cropped = low_frequency_crop(images, 16)
    for dim in (-1, -2):
        torch.testing.assert_close(low_frequency_crop(flipped(images, dim), 16), flipped(cropped, dim))
    torch.testing.assert_close(low_frequency_crop(flipped(images.mT, -1), 16), flipped(cropped.mT, -1))
    both = flipped(flipped(IMAGES, -1), -2)  # half a turn keeps that one as well
    torch.testing.assert_close(low_frequency_crop(both, 16), flipped(flipped(low_frequency_crop(IMAGES, 16), -1), -2))


def test_the_energy_is_that_of_the_band():
    band = torch.fft.fft2(IMAGES)
    f = torch.fft.fftfreq(24, 1 / 24).abs() < 8
    inside = torch.fft.ifft2(band * (f[:, None] & f)).real  # without the Nyquist frequency
    cropped = low_frequency_crop(inside, 16)
    torch.testing.assert_close(cropped.square().sum() * 24**2 / 16**2, inside.square().sum())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_and_memory_format_are_kept_and_half_precision_is_computed_in_float32(dtype):
    images = IMAGES.to(dtype).to(memory_format=torch.channels_last)
    cropped = low_frequency_crop(images, 14)  # no power of two
    assert cropped.dtype == dtype
    assert cropped.is_contiguous(memory_format=torch.channels_last)
    exact = low_frequency_crop(images.double(), 14).to(dtype)
    torch.testing.assert_close(cropped, exact, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(low_frequency_crop(images, 14), cropped)


def test_gradients_flow_also_after_inference_mode():
    with torch.inference_mode():
        low_frequency_crop(IMAGES, 18)
    images = IMAGES.clone().requires_grad_()
    low_frequency_crop(images, 18).sum().backward()
    torch.testing.assert_close(images.grad, torch.full_like(images, 18**2 / 24**2))


@pytest.mark.parametrize(
    ("images", "bandwidth", "message"),
    [
        (IMAGES, 1, "bandwidth is 1, but must be at least 2 and at most 24"),
        (IMAGES, 26, "bandwidth is 26, but must be at least 2 and at most 24"),
        (IMAGES, (8, 30), "bandwidth is 30, but must be"),
        (IMAGES.long(), 8, "images has dtype torch.int64, but must be floating"),
        (IMAGES.cfloat(), 8, "images has dtype torch.complex64, but must be floating"),
        (IMAGES[0, 0], 8, r"images has shape \(24, 24\), but must be \(batch, channel, height, width\)"),
        (IMAGES[:, 0], 8, r"images has shape \(3, 24, 24\), but must be"),
    ],
)
def test_bad_images_are_refused(images, bandwidth, message):
    with pytest.raises(InputError, match=message):
        low_frequency_crop(images, bandwidth)


# --- the curriculum -------------------------------------------------------------------------------------------------


def test_the_schedule_of_the_paper():
    stages = efficient_train_curriculum()
    assert [stage.bandwidth for stage in stages] == [160, 160, 160, 192, 224]
    assert [stage.start for stage in stages] == [0, 0.2, 0.4, 0.6, 0.8]
    assert [stage.magnitude for stage in stages] == [1, 3, 5, 7, 9]
    assert relative_cost(stages, 224) == pytest.approx(0.653, abs=5e-4)
    for epoch, expected in ((0, 160), (59, 160), (179, 160), (180, 192), (239, 192), (240, 224), (300, 224)):
        assert stage_at(stages, epoch / 300).bandwidth == expected


def test_later_schedule_spends_equal_compute_on_every_stage():
    stages = efficient_train_curriculum(preset="plusplus_deit")
    assert [stage.bandwidth for stage in stages] == [96, 96, 160, 160, 160, 160, 192, 192, 224, 224]
    ends = [*(stage.start for stage in stages[1:]), 1.0]
    work = [(end - stage.start) * stage.bandwidth**2 for stage, end in zip(stages, ends, strict=True)]
    assert work == pytest.approx([work[0]] * 10)
    assert relative_cost(stages, 224) == pytest.approx(0.426, abs=1e-3)


@pytest.mark.parametrize("preset", ["iccv", "plusplus_deit"])
@pytest.mark.parametrize(("resolution", "multiple"), [(32, 4), (32, 1), (64, 16), (33, 1), (8, 8), (35, 7), (384, 32)])
def test_sizes_are_even_multiples_and_end_at_the_full_one(resolution, multiple, preset):
    stages = efficient_train_curriculum(resolution, multiple=multiple, preset=preset)
    sizes = [stage.bandwidth for stage in stages]
    assert sizes[-1] == resolution
    assert sizes == sorted(sizes)
    assert all(size % multiple == 0 and (size % 2 == 0 or size == resolution) for size in sizes)
    assert [stage.magnitude for stage in stages] == sorted(stage.magnitude for stage in stages)
    assert 0 < relative_cost(stages, resolution) <= 1


def test_the_schedule_of_the_study():
    assert [s.bandwidth for s in efficient_train_curriculum(32, multiple=4)] == [24, 24, 24, 28, 32]
    assert relative_cost(efficient_train_curriculum(32, multiple=4), 32) == pytest.approx(20.7 / 30, abs=1e-3)


HALF = [CurriculumStage(0.0, 16, 1.0), CurriculumStage(0.5, 24, 2.0)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: efficient_train_curriculum(33, multiple=4), "resolution is 33, but must be divisible by multiple, 4"),
        (lambda: efficient_train_curriculum(preset="late"), "preset is 'late', but must be one of"),
        (lambda: efficient_train_curriculum(multiple=0), "multiple is 0, but must be greater than 0"),
        (lambda: relative_cost(HALF, 32), "curriculum ends at 24 pixels, but must end at the full resolution, 32"),
        (lambda: EfficientTrain(HALF[::-1]), r"curriculum has stages that start at \[0\.5, 0\.0\], but they must"),
        (lambda: EfficientTrain([]), "curriculum has stages that start at"),
        (lambda: EfficientTrain([CurriculumStage(0.0, 1, 1.0)]), "bandwidth is 1, but must be at least 2"),
        (
            lambda: EfficientTrain([HALF[1]._replace(start=0.0), HALF[0]._replace(start=0.5)]),
            "curriculum ends at 16 pixels, but must end at the full resolution, 24",
        ),
        (lambda: stage_at(HALF, 1.5), "progress is 1.5, but must be at least 0 and at most 1"),
        (lambda: EfficientTrain(HALF)(torch.ones(1, 1, 32, 32)), "The images are 32x32, but must be 24x24"),
        (lambda: EfficientTrain(HALF)(torch.ones(1, 1, 24, 16)), "The images are 24x16, but must be 24x24"),
    ],
)
def test_bad_curricula_are_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_in_a_loop_of_ones_own():
    magnitudes, stages = [], []
    train = EfficientTrain(HALF, augment=magnitudes.append, on_stage_change=[stages.append])
    sizes = []
    for epoch in range(4):
        train.set_progress(epoch / 4)
        sizes.append(train(IMAGES).shape[-1])
    assert sizes == [16, 16, 24, 24]
    assert magnitudes == [1.0, 2.0]
    assert stages == [HALF[1]]
    assert train.magnitude == 2.0
    assert train(IMAGES) is IMAGES


# --- position embeddings --------------------------------------------------------------------------------------------


def test_position_embeddings_are_resized_bilinearly_and_prefixes_kept():
    pos = torch.randn(1, 2 + 16, 5, generator=torch.Generator().manual_seed(0))
    options = {"grid": (4, 4), "num_prefix_tokens": 2}
    assert torch.equal(resize_position_embedding(pos, new_grid=(4, 4), **options), pos)
    smaller = resize_position_embedding(pos, new_grid=(3, 2), **options)
    assert smaller.shape == (1, 8, 5)
    assert torch.equal(smaller[:, :2], pos[:, :2])
    patches = pos[0, 2:].view(4, 4, 5).permute(2, 0, 1)[None]
    expected = F.interpolate(patches, size=(3, 2), mode="bilinear")[0].permute(1, 2, 0).reshape(6, 5)
    assert torch.equal(smaller[0, 2:], expected)
    assert resize_position_embedding(pos.half(), new_grid=(3, 3), **options).dtype == torch.float16
    rising = torch.arange(4.0).view(1, 4, 1).expand(1, 4, 1)
    between = resize_position_embedding(rising, grid=(1, 4), new_grid=(1, 2), num_prefix_tokens=0)
    assert between.flatten().tolist() == [0.5, 2.5]
    with pytest.raises(InputError, match=r"pos has shape \(1, 18, 5\), but must be \(1, 17, width\)"):
        resize_position_embedding(pos, grid=(4, 4), new_grid=(3, 3))
    with pytest.raises(InputError, match=r"new_grid is \(0, 3\), but must be"):
        resize_position_embedding(pos, new_grid=(0, 3), **options)


# --- in fit ---------------------------------------------------------------------------------------------------------


class Sizes(Callback):
    """Keeps the size of every batch's images, and the position embedding with what Adam has of it."""

    def __init__(self):
        self.sizes = []

    def on_batch(self, run, batch: Batch):
        self.sizes.append(batch[0]["pixel_values"].shape[-1] if isinstance(batch[0], dict) else batch[0].shape[-1])
        return batch


def images(count=24, size=16, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return TensorData(torch.rand(count, 1, size, size, generator=draw), torch.randint(4, (count,), generator=draw))


def cnn():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)]
        return nn.Sequential(
            *first, nn.Conv2d(4, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
        )


def vit(kind="ViT", **settings):
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        **{
            "image_size": 16,
            "patch_size": 4,
            "num_channels": 1,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "num_labels": 4,
            **settings,
        }
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, f"{kind}ForImageClassification")(config).eval()


def curriculum():
    return efficient_train_curriculum(16, multiple=4)  # 12, 12, 12, 12, 16


def weights(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def test_sizes_follow_the_steps_and_full_ones_alone_are_plain_training(global_rng_untouched):
    sizes, magnitudes = Sizes(), []
    train = EfficientTrain(efficient_train_curriculum(16), augment=magnitudes.append)
    fit(cnn(), images(), steps=10, batch_size=8, callbacks=[train, sizes])
    assert sizes.sizes == [12] * 6 + [14] * 2 + [16] * 2
    assert magnitudes == [1, 1, 3, 5, 7, 9]  # at once, and anew when a run starts
    one, two = cnn(), cnn()
    fit(one, images(), steps=4, batch_size=8, callbacks=[EfficientTrain([CurriculumStage(0.0, 16, 9.0)])])
    fit(two, images(), steps=4, batch_size=8)
    assert torch.equal(weights(one), weights(two))


def test_the_rate_is_not_restarted():
    def cosine(optimizer, steps):
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    settings = {"steps": 10, "batch_size": 8, "scheduler": cosine}
    with_it = fit(cnn(), images(), callbacks=[EfficientTrain(curriculum())], **settings)
    assert with_it["lr"] == fit(cnn(), images(), **settings)["lr"]


def test_crops_come_before_boxes():
    seen = []

    class Seen(Callback):
        def on_batch(self, run, batch):
            seen.append(batch)
            return batch

    data = images()
    callbacks = [EfficientTrain(curriculum()), CutMix(probability=1.0), Seen()]
    fit(cnn(), data, steps=1, batch_size=24, callbacks=callbacks)
    mixed, targets = seen[0]
    assert mixed.shape[-2:] == (12, 12)
    assert targets.shape == (24, 4)
    cropped = low_frequency_crop(data.inputs, 12)
    values = set(cropped.flatten().tolist())
    assert all(
        value in values for value in mixed.flatten()[:200].tolist()
    )  # boxes of cropped images, not crops of boxes


def test_under_accumulation_all_batches_of_a_step_have_one_size():
    sizes = Sizes()
    fit(
        cnn(),
        images(),
        steps=5,
        batch_size=4,
        accelerator=Accelerator(gradient_accumulation_steps=2),
        callbacks=[EfficientTrain(curriculum()), sizes],
    )
    assert sizes.sizes == [12] * 8 + [16] * 2


def test_models_of_one_size_are_refused_at_once(trained_cnn):
    data = TensorData(torch.rand(8, 1, 8, 8), torch.zeros(8, dtype=torch.long))
    with pytest.raises(InputError, match="The model DigitsCNN cannot be run on images of 6x6, but must take several"):
        fit(copy.deepcopy(trained_cnn), data, steps=5, callbacks=[EfficientTrain(efficient_train_curriculum(8))])


def test_bandwidths_must_fit_the_patches_and_the_embedding():
    with pytest.raises(InputError, match="bandwidth is 14, but must be divisible by the patch size, 4"):
        fit(vit(), images(), steps=5, callbacks=[EfficientTrain(efficient_train_curriculum(16))])
    with pytest.raises(InputError, match="curriculum ends at 16 pixels, but must end at the size .*, 32x32"):
        fit(vit(image_size=32), images(), steps=5, callbacks=[EfficientTrain(curriculum())])


class Positions(Callback):
    """Copies a position embedding and its moments of Adam: before each step, behind EfficientTrain, and after it."""

    def __init__(self, parameter):
        self.parameter, self.before, self.after = parameter, {}, {}

    def on_batch(self, run, batch):
        self.before[run.step] = self.copy(run)
        return batch

    def on_step(self, run):
        self.after[run.step] = self.copy(run)

    def copy(self, run):
        state = run.optimizer.state.get(self.parameter, {})
        moments = [state[name] for name in ("exp_avg", "exp_avg_sq") if state]
        return [tensor.detach().clone() for tensor in (self.parameter, *moments)]


def test_a_real_vits_embedding_and_its_moments_are_resized_when_the_stage_changes():
    model = vit()
    parameter = model.vit.embeddings.position_embeddings
    start = parameter.detach().clone()
    positions, sizes = Positions(parameter), Sizes()
    callbacks = [EfficientTrain(curriculum()), positions, sizes]
    fit(model, images(), steps=10, batch_size=8, optimizer=lambda p: AdamW(p, lr=1e-2), callbacks=callbacks)
    assert sizes.sizes == [12] * 8 + [16] * 2
    small = resize_position_embedding(start, grid=(4, 4), new_grid=(3, 3))
    assert torch.equal(positions.before[0][0][:, :10], small)
    assert (positions.before[0][0][:, 10:] == 0).all()
    assert all(map(torch.equal, positions.before[3], positions.after[3]))  # within a stage nothing is resized
    for old, new in zip(positions.after[8], positions.before[8], strict=True):
        assert (old[:, :10] != 0).any()
        assert (old[:, 10:] == 0).all()
        assert torch.equal(new, resize_position_embedding(old[:, :10], grid=(3, 3), new_grid=(4, 4)))
    assert (positions.before[8][2] >= 0).all()
    assert parameter.shape == (1, 17, 16)
    assert not torch.equal(parameter, positions.before[8][0])  # and trained on


def test_a_step_on_small_images_is_that_of_a_model_built_for_them():
    """At the same weights, with the embedding resized, a small ViT of the library gives the same gradients."""
    from types import SimpleNamespace

    model, small = vit(), vit(image_size=12)
    state = model.state_dict()
    name = "vit.embeddings.position_embeddings"
    small.load_state_dict({**state, name: resize_position_embedding(state[name], grid=(4, 4), new_grid=(3, 3))})
    data = images()
    train = EfficientTrain(curriculum())
    run = SimpleNamespace(module=model, optimizer=AdamW(model.parameters()), step=0, steps=10)
    train.on_start(run)
    batch = train.on_batch(run, data[:])
    F.cross_entropy(model(batch[0]).logits, batch[1]).backward()
    F.cross_entropy(small(low_frequency_crop(data.inputs, 12)).logits, data.targets).backward()
    for (key, one), two in zip(model.named_parameters(), small.parameters(), strict=True):
        expected = F.pad(two.grad, (0, 0, 0, 7)) if key == name else two.grad
        torch.testing.assert_close(one.grad, expected, msg=key)
    assert model(data.inputs).logits.shape == (24, 4)  # a look at full size in between
    train.on_end(run)


@pytest.mark.parametrize("kind", ["ViT", "DeiT"])
def test_afterwards_the_model_is_as_the_library_made_it(kind):
    model = vit(kind)
    names, hooks = (
        list(model.state_dict()),
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
    )
    order = [name for name, _ in model.named_parameters()]
    fit(model, images(), steps=5, batch_size=8, callbacks=[EfficientTrain(curriculum())])
    assert list(model.state_dict()) == names
    assert [name for name, _ in model.named_parameters()] == order
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert not any("position_embeddings" in vars(module) for module in model.modules())
    assert model.eval()(images().inputs).logits.shape == (24, 4)
    with pytest.raises(ValueError, match="doesn't match model"):
        model(torch.rand(1, 1, 12, 12))


@pytest.mark.parametrize("error", [False, True])
def test_a_run_that_ends_early_leaves_an_embedding_of_full_size(error):
    model = vit()

    class End(Callback):
        def on_step(self, run):
            if error:
                raise KeyboardInterrupt
            run.stop()

    start = model.vit.embeddings.position_embeddings.detach().clone()
    try:
        fit(model, images(), steps=5, batch_size=8, callbacks=[EfficientTrain(curriculum()), End()])
    except KeyboardInterrupt:
        assert error
    now = model.vit.embeddings.position_embeddings.detach()
    down = resize_position_embedding(start, grid=(4, 4), new_grid=(3, 3))
    back = resize_position_embedding(down, grid=(3, 3), new_grid=(4, 4))
    assert (now - back).abs().max() < 0.01
    assert (now[:, 10:].abs().sum(-1) > 0).all()


def test_frozen_embeddings_are_interpolated_and_not_changed():
    model = vit()
    model.vit.embeddings.position_embeddings.requires_grad_(False)
    before = model.vit.embeddings.position_embeddings.clone()
    fit(model, images(), steps=5, batch_size=8, callbacks=[EfficientTrain(curriculum())])
    assert torch.equal(model.vit.embeddings.position_embeddings, before)


@pytest.mark.parametrize("kind", ["ViT", "cnn"])
@pytest.mark.parametrize("stop", [3, 7, 8, 9])
def test_resumes_to_the_same_weights(tmp_path, kind, stop):
    build = cnn if kind == "cnn" else vit

    class Kill(Callback):
        armed = True

        def on_step(self, run):
            if self.armed and run.step == stop:
                raise KeyboardInterrupt

    settings = {"steps": 10, "batch_size": 8, "optimizer": lambda p: AdamW(p, lr=1e-2)}
    whole, killed, again = build(), build(), build()
    fit(whole, images(), callbacks=[EfficientTrain(curriculum()), Callback()], **settings)
    saved = {**settings, "checkpoint": Checkpoint(tmp_path / "run", every=1)}
    with pytest.raises(KeyboardInterrupt):
        fit(killed, images(), callbacks=[EfficientTrain(curriculum()), Kill()], **saved)
    Kill.armed = False
    fit(again, images(), callbacks=[EfficientTrain(curriculum()), Kill()], **saved)
    assert torch.equal(weights(again), weights(whole))
    finished = build()  # the checkpoint of a finished run
    fit(finished, images(), callbacks=[EfficientTrain(curriculum()), Kill()], **saved)
    assert torch.equal(weights(finished), weights(whole))


def test_mappings_and_models_of_other_kinds():
    from transformers import ConvNextConfig, ConvNextForImageClassification, SwinConfig, SwinForImageClassification

    sizes = {"num_channels": 1, "num_labels": 4, "image_size": 32}
    swin = SwinConfig(patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4, **sizes)
    convnext = ConvNextConfig(patch_size=2, hidden_sizes=[4, 8], depths=[1, 1], num_stages=2, **sizes)
    data = images(16, 32)
    keyed = TensorData({"pixel_values": data.inputs}, data.targets)
    with torch.random.fork_rng():
        models = [SwinForImageClassification(swin), ConvNextForImageClassification(convnext)]
    for model in models:
        seen = Sizes()
        train = EfficientTrain(efficient_train_curriculum(32, multiple=4))
        fit(model, keyed, steps=5, batch_size=8, callbacks=[train, seen])
        assert seen.sizes == [24, 24, 24, 28, 32]


def test_masked_autoencoders_can_be_trained():
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    width = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    decoder = {f"decoder_{key}": value for key, value in width.items()}
    with torch.random.fork_rng():
        model = ViTMAEForPreTraining(ViTMAEConfig(image_size=16, patch_size=4, num_channels=1, **width, **decoder))
    before = model.vit.embeddings.position_embeddings.clone()  # sines and cosines, which are not learnt

    def reconstruction(model, batch, run):
        return model(batch[0]).loss

    history = fit(model, images(), reconstruction, steps=5, batch_size=8, callbacks=[EfficientTrain(curriculum())])
    assert all(map(math.isfinite, history["loss"]))
    assert torch.equal(model.vit.embeddings.position_embeddings, before)


def test_the_recipe_reads_sizes_and_patches(tiny_vit, digits_small):
    plan = recipe(vit(), images())
    assert [stage.bandwidth for stage in plan.callbacks[0].curriculum] == [12, 12, 12, 12, 16]
    model, history = plan.fit(steps=5, batch_size=8)
    assert len(history) == 5
    assert not model.training
    plan = recipe(cnn(), images(), preset="plusplus_deit", multiple=4)
    assert [stage.bandwidth for stage in plan.callbacks[0].curriculum] == [8] * 2 + [12] * 4 + [12] * 2 + [16] * 2
    trained, _ = recipe(tiny_vit, digits_small.train).fit(steps=5, batch_size=32)
    assert trained(digits_small.test.inputs).logits.shape == (100, 10)
    with pytest.raises(InputError, match="preset is 'late', but must be one of"):
        recipe(cnn(), images(), preset="late")
