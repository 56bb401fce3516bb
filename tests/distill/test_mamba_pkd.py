"""Mamba PKD: the scan against its recurrence and transformers' mixer, the loss, the ensemble, and its stages."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from retouch.core.batches import in_order
from retouch.core.data import TensorData
from retouch.core.errors import InputError
from retouch.core.loop import Checkpoint, fit
from retouch.core.metrics.compute import forward_flops
from retouch.core.models import predict
from retouch.distill.mamba_pkd import (
    PKD,
    MambaClassifier,
    ProgressiveDistiller,
    ProgressiveEnsemble,
    SelectiveSSM,
    adamw,
    gap_weights,
    pkd_loss,
    selective_scan,
)

DRAW = torch.Generator().manual_seed(0)
DOUBLE = torch.float64


def drawn(*shape, scale=1.0, dtype=DOUBLE):
    return scale * torch.randn(*shape, generator=DRAW, dtype=dtype)


def made(build, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


# --- the scan -------------------------------------------------------------------------------------------------------


def scan_inputs(length=7, batch=2, channels=3, state=4):
    a, delta = drawn(batch, length, channels), F.softplus(drawn(batch, length, channels))
    A, D = -drawn(channels, state).exp(), drawn(channels)
    return a, delta, A, drawn(batch, length, state), drawn(batch, length, state), D


def recurrence(a, delta, A, B, C, D):
    """The definition, one number at a time."""
    out = torch.zeros_like(a)
    for b in range(a.shape[0]):
        for e in range(a.shape[2]):
            h = torch.zeros(A.shape[1], dtype=a.dtype)
            for t in range(a.shape[1]):
                h = torch.exp(delta[b, t, e] * A[e]) * h + delta[b, t, e] * B[b, t] * a[b, t, e]
                out[b, t, e] = (C[b, t] * h).sum() + D[e] * a[b, t, e]
    return out


@pytest.mark.parametrize("chunk", [None, 1, 2, 3, 5, 7, 16])
def test_the_scan_is_the_recurrence_in_any_chunks(chunk):
    inputs = scan_inputs()
    torch.testing.assert_close(selective_scan(*inputs, chunk=chunk), recurrence(*inputs), rtol=1e-10, atol=1e-12)
    single = [value.float() for value in inputs]
    found = selective_scan(*single, chunk=chunk)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), recurrence(*inputs), rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_the_recurrence():
    inputs = [value.requires_grad_() for value in scan_inputs(length=5, batch=1, channels=2, state=2)]
    weight = drawn(1, 5, 2)
    expected = torch.autograd.grad((recurrence(*inputs) * weight).sum(), inputs)
    for chunk in (None, 2, 8):
        found = torch.autograd.grad((selective_scan(*inputs, chunk=chunk) * weight).sum(), inputs)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("chunk", [None, 3])
def test_limits_of_the_scan(chunk):
    a, delta, A, B, C, D = scan_inputs()
    torch.testing.assert_close(selective_scan(a, 0 * delta, A, B, C, D, chunk=chunk), D * a)
    torch.testing.assert_close(selective_scan(a, delta, A, B, 0 * C, D, chunk=chunk), D * a)
    memoryless = delta * (B * C).sum(-1, keepdim=True) * a + D * a
    for rate in (-1e9, -math.inf):
        found = selective_scan(a, delta, torch.full_like(A, rate), B, C, D, chunk=chunk)
        torch.testing.assert_close(found, memoryless)
    gate = drawn(*a.shape)
    gated = selective_scan(a, delta, A, B, C, D, z=gate, chunk=chunk)
    torch.testing.assert_close(gated, selective_scan(a, delta, A, B, C, D) * F.silu(gate))


def test_half_precision_is_scanned_in_single():
    """Decays of half precision would sum up to a wrong memory over 200 positions."""
    inputs = [value.float() for value in scan_inputs(length=200)]
    halved = [value.bfloat16() for value in inputs]
    found = selective_scan(*halved)
    assert found.dtype == torch.bfloat16
    exact = selective_scan(*(value.float() for value in halved))
    torch.testing.assert_close(found.float(), exact, rtol=1e-2, atol=1e-3)
    assert torch.isfinite(selective_scan(*inputs, chunk=64)).all()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(selective_scan(*inputs), selective_scan(*inputs).float())


# --- the block ------------------------------------------------------------------------------------------------------


def test_golden(golden):
    case = golden("mamba_pkd")
    block = made(lambda: SelectiveSSM(8, state_dim=4, conv_kernel=3, expand=2, dt_rank=2))
    names = dict.fromkeys(block.state_dict())
    given = {name: torch.tensor(getattr(case, "param_" + name.replace(".", "_"))) for name in names}
    block.load_state_dict(given)
    tokens = torch.tensor(case.in_tokens)
    case.close("out_mixer", block(tokens))
    for chunk in (3, 16):
        block.chunk = chunk
        case.close("out_mixer", block(tokens))


def mamba_config(**changes):
    from transformers import MambaConfig

    sizes = {"hidden_size": 8, "state_size": 4, "num_hidden_layers": 2, "time_step_rank": 2, "vocab_size": 20}
    return MambaConfig(**{**sizes, **changes})


def test_weights_can_be_exchanged_with_transformers(global_rng_untouched):
    from transformers import MambaModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        whole = MambaModel(mamba_config()).eval()
        block = SelectiveSSM(8, state_dim=4, dt_rank=2).eval()
    theirs = whole.layers[0].mixer
    tokens = drawn(3, 9, 8, dtype=torch.float32)
    block.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(block(tokens), theirs(tokens), rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        block.A_log += 0.3
        block.conv1d.bias += 0.1
    theirs.load_state_dict(block.state_dict())
    torch.testing.assert_close(theirs(tokens), block(tokens), rtol=1e-4, atol=1e-6)


def test_a_later_token_changes_nothing_before_it():
    block = made(lambda: SelectiveSSM(8, state_dim=4))
    tokens = drawn(2, 9, 8, dtype=torch.float32)
    changed = tokens.clone()
    changed[:, 5] += 1
    for chunk in (None, 4):
        block.chunk = chunk
        one, two = block(tokens), block(changed)
        assert torch.equal(one[:, :5], two[:, :5])
        assert not torch.allclose(one[:, 5:], two[:, 5:])


def test_gradients_reach_decay_step_sizes_and_everything_else():
    block = made(lambda: SelectiveSSM(8, state_dim=4))
    block(drawn(2, 9, 8, dtype=torch.float32)).square().sum().backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_the_start_of_a_block():
    block = made(lambda: SelectiveSSM(64, state_dim=5, expand=3))
    assert block.rank == 4  # 64 / 16
    torch.testing.assert_close(block.A_log, torch.arange(1.0, 6).log().expand(192, 5))
    assert torch.equal(block.D, torch.ones(192))
    steps = F.softplus(block.dt_proj.bias.detach())
    assert 1e-3 * 0.99 <= float(steps.min()) <= float(steps.max()) <= 0.1 * 1.01  # the default bias gives about 0.7
    assert float(block.dt_proj.weight.detach().abs().max()) <= 4**-0.5
    assert made(lambda: SelectiveSSM(17)).rank == 2


def test_weight_decay_leaves_the_dynamics_alone():
    model = made(lambda: MambaClassifier(8, 1, 4, 6, 2, 10))
    optimizer = adamw(model, lr=0.1, weight_decay=0.5)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        free = name.endswith(("A_log", ".D"))
        assert torch.equal(parameter, before[name]) == (free or not before[name].any()), name


def test_pooling_and_directions():
    images = drawn(3, 1, 8, 8, dtype=torch.float32)
    last = made(lambda: MambaClassifier(8, 1, 2, 6, 1, 10, pool="last"))
    both = made(lambda: MambaClassifier(8, 1, 2, 6, 1, 10, pool="last", bidirectional=True))
    assert last(images).shape == both(images).shape == (3, 10)

    def first_tokens(model):
        """What of the first token after the block changes with the last patch."""
        changed = images.clone()
        changed[..., 6:, 6:] += 1
        tokens = [model.patches(x).flatten(2).transpose(1, 2) + model.positions for x in (images, changed)]
        one, two = (model.blocks[0](t)[:, 0] for t in tokens)
        return float((one - two).abs().max().detach())

    assert first_tokens(last) == 0  # a causal scan: why the mean is the default
    assert first_tokens(both) > 0
    mean = made(lambda: MambaClassifier(8, 1, 2, 6, 1, 10))
    tokens = mean.patches(images).flatten(2).transpose(1, 2) + mean.positions
    torch.testing.assert_close(mean(images), mean.head(mean.norm(mean.blocks[0](tokens)).mean(1)))


# --- the loss -------------------------------------------------------------------------------------------------------

S, Z, P = (drawn(7, 5, scale=2.0) for _ in range(3))
Y = torch.tensor([0, 1, 2, 3, 4, 0, 1])


def kd(student, teacher, temperature):
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    return temperature**2 * (p * (p / q).log()).sum(-1)


def test_limits_of_the_loss():
    torch.testing.assert_close(pkd_loss(S, Z, Y, alpha=1.0), F.cross_entropy(S, Y))
    torch.testing.assert_close(pkd_loss(S, Z, Y, alpha=0.0, temperature=3.0), kd(S, Z, 3.0).mean())
    both = 0.3 * F.cross_entropy(S + P, Y) + 0.7 * kd(S + P, Z, 2.0).mean()
    torch.testing.assert_close(pkd_loss(S, Z, Y, prior_logits=P, alpha=0.3, temperature=2.0), both)
    assert abs(float(pkd_loss(0 * S, Z, Y, prior_logits=Z, alpha=0.0))) < 1e-12


def test_only_the_student_gets_a_gradient():
    student, teacher, prior = (x.clone().requires_grad_() for x in (S, Z, P))
    pkd_loss(student, teacher, Y, prior_logits=prior).backward()
    assert teacher.grad is None
    assert prior.grad is None
    assert student.grad.abs().sum() > 0


def test_the_sum_is_taken_before_the_temperature():
    right = pkd_loss(S, Z, Y, prior_logits=P, alpha=0.0, temperature=4.0)
    wrong = kd(S + 4 * P, Z, 4.0).mean()  # prior not divided
    assert abs(float(right - wrong)) > 0.1


def test_sample_weights():
    weight = torch.rand(7, generator=DRAW, dtype=DOUBLE)
    plain = 0.5 * F.cross_entropy(S, Y, reduction="none") + 0.5 * kd(S, Z, 4.0)
    torch.testing.assert_close(pkd_loss(S, Z, Y, sample_weight=weight), (weight * plain).mean())
    torch.testing.assert_close(pkd_loss(S, Z, Y, sample_weight=torch.ones(7)), pkd_loss(S, Z, Y))
    gaps = gap_weights(P, Z)
    assert float(gaps.mean()) == pytest.approx(1)
    torch.testing.assert_close(gaps, kd(P, Z, 1.0) / kd(P, Z, 1.0).mean())
    assert torch.equal(gap_weights(Z, Z), torch.ones(7, dtype=DOUBLE))


# --- the ensemble ---------------------------------------------------------------------------------------------------


def linear(seed, classes=10):
    return made(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, classes)), seed)


def test_an_ensemble_of_one_is_its_student_and_prefixes_add_up():
    images = drawn(6, 1, 8, 8, dtype=torch.float32)
    students = [linear(seed) for seed in range(3)]
    outputs = torch.stack([student(images) for student in students])
    for combine in ("sum", "mean"):
        one = ProgressiveEnsemble(students[:1], combine=combine, weights=[0.37] if combine == "mean" else None)
        assert torch.equal(one(images), students[0](images))
    added = ProgressiveEnsemble(students)
    torch.testing.assert_close(added(images), outputs.sum(0))
    torch.testing.assert_close(added(images, 2), outputs[:2].sum(0))
    weights = torch.tensor([0.2, 0.5, 0.3])
    mean = ProgressiveEnsemble(students, combine="mean", weights=weights.tolist())
    torch.testing.assert_close(mean(images), (weights[:, None, None] * outputs).sum(0))
    torch.testing.assert_close(mean(images, num_students=2), (outputs[0] * 0.2 + outputs[1] * 0.5) / 0.7)
    copied = ProgressiveEnsemble([linear(9) for _ in range(3)], combine="mean")
    copied.load_state_dict(mean.state_dict())  # its weights travel along
    assert torch.equal(copied(images), mean(images))


@pytest.mark.parametrize("combine", ["sum", "mean"])
def test_anytime_stops_each_sample_alone(combine):
    images = drawn(40, 1, 8, 8, scale=2.0, dtype=torch.float32)
    weights = [0.5, 0.2, 0.3] if combine == "mean" else None
    ensemble = ProgressiveEnsemble([linear(seed) for seed in range(3)], combine=combine, weights=weights)
    logits, used = ensemble.anytime(images, 0.3)
    assert set(used.tolist()) == {1, 2, 3}
    for row, (found, count) in enumerate(zip(logits, used.tolist(), strict=True)):
        torch.testing.assert_close(found, ensemble(images[row : row + 1], count)[0], rtol=1e-4, atol=1e-5)
        sure = [
            float(ensemble(images[row : row + 1], j).detach().softmax(-1).max()) >= 0.3 for j in range(1, count + 1)
        ]
        assert sure[:-1] == [False] * (count - 1)
        assert sure[-1] or count == 3
    assert ensemble.anytime(images, 0.0).used.tolist() == [1] * 40
    logits, used = ensemble.anytime(images, 1.0)
    assert used.tolist() == [3] * 40
    torch.testing.assert_close(logits, ensemble(images), rtol=1e-4, atol=1e-5)


def test_operations_are_those_counted_by_hand():
    assert forward_flops(nn.Linear(6, 10), torch.zeros(3, 6)) == 2 * 3 * 6 * 10
    d, n, k, e, rho, length = 8, 4, 3, 16, 2, 5
    block = made(lambda: SelectiveSSM(d, state_dim=n, conv_kernel=k, expand=2, dt_rank=rho))
    products = 2 * length * (d * 2 * e + (rho + 2 * n) * e + rho * e + e * d)  # in, x, dt and out projection
    convolution = 2 * length * e * k
    # A state: decay (product, exponential), push, two for the update, two to read it. A channel: push, D, sum, gate.
    scan = length * e * (7 * n + 4)
    assert forward_flops(block, torch.zeros(2, length, d)) == 2 * (products + convolution + scan)
    ensemble = ProgressiveEnsemble([linear(0), linear(1)], costs=[100.0, 50.0], teacher_cost=1000.0)
    assert ensemble.flops() == pytest.approx(0.15)
    assert ensemble.flops(1) == pytest.approx(0.1)
    assert ensemble.student_flops() == pytest.approx([0.1, 0.05])


# --- stages ---------------------------------------------------------------------------------------------------------


def students(*dims):
    return [lambda dim=dim: MambaClassifier(8, 1, 4, dim, 1, 10, state_dim=2) for dim in dims]


TEACHER = linear(5)


@pytest.mark.parametrize("mode", ["residual", "boost", "chain"])
def test_earlier_students_and_the_teacher_stay_as_they_are(mode, digits_small, global_rng_untouched):
    before, held = copy.deepcopy(TEACHER), []
    distiller = ProgressiveDistiller(TEACHER, students(6, 4, 3), mode)
    for ensemble in distiller.stages(digits_small.train, steps=3):
        held.append(copy.deepcopy(ensemble))
    assert [len(one) for one in held] == [1, 2, 3]
    for number in range(3):
        assert all(same(one.students[number], ensemble.students[number]) for one in held[number:])
    assert same(before, TEACHER)
    assert not any(p.requires_grad for p in ensemble.parameters())
    assert len(distiller.histories) == 3
    assert {"hard", "soft"} <= distiller.histories[0].records[0].keys()
    expected = [forward_flops(s, digits_small.train.inputs[:1]) / (2 * 640) for s in ensemble.students]
    assert ensemble.student_flops() == pytest.approx(expected)
    assert ensemble.flops() == pytest.approx(sum(expected))
    again = ProgressiveDistiller(TEACHER, students(6, 4, 3), mode).fit(digits_small.train, steps=3)
    assert same(again, ensemble)
    assert not same(
        ProgressiveDistiller(TEACHER, students(6, 4, 3), mode, seed=1).fit(digits_small.train, steps=3), again
    )


@pytest.mark.parametrize("mode", ["residual", "chain"])
def test_asking_once_is_asking_at_every_step(mode, digits_small):
    """Not so in "boost", whose weights have mean 1 over all data, and over a batch where nothing is kept."""
    found = [
        ProgressiveDistiller(TEACHER, students(6, 4), mode, cache=cache).fit(digits_small.train, steps=4)
        for cache in (True, False)
    ]
    images = digits_small.test.inputs
    torch.testing.assert_close(found[0](images), found[1](images), rtol=1e-3, atol=1e-4)


def test_what_each_mode_learns_from(digits_small):
    batch = digits_small.train[torch.arange(50)]
    images, labels = batch
    first, second = linear(0), linear(1)
    prior = ProgressiveEnsemble([first])
    terms = PKD(TEACHER, prior)(second, batch)
    expected = pkd_loss(second(images), TEACHER(images), labels, prior_logits=first(images))
    torch.testing.assert_close(terms["hard"] + terms["soft"], expected)
    terms = PKD(TEACHER, prior, weigh=True, alpha=0.2)(second, batch)
    weight = gap_weights(first(images), TEACHER(images))
    expected = pkd_loss(second(images), TEACHER(images), labels, sample_weight=weight, alpha=0.2)
    torch.testing.assert_close(terms["hard"] + terms["soft"], expected)
    told = {"labels": labels, "teacher": TEACHER(images), "prior": first(images)}
    torch.testing.assert_close(PKD(None)(second, (images, told)), PKD(TEACHER, prior)(second, batch))


def test_the_modes_see_what_they_should(digits_small):
    seen = {}
    for mode in ("residual", "boost", "chain"):
        rows = []

        def trainer(student, data, objective, rows=rows, **settings):
            rows.append(data.targets)
            return fit(student, data, objective, **settings)

        ensemble = ProgressiveDistiller(TEACHER, students(4, 4), mode).fit(digits_small.train, trainer=trainer, steps=2)
        seen[mode] = rows, predict(ensemble.students[0], in_order(digits_small.train)), ensemble
    teacher = predict(TEACHER, in_order(digits_small.train))
    assert all(rows[0].keys() == {"labels", "teacher"} for rows, _, _ in seen.values())
    rows, before, _ = seen["residual"]
    assert torch.equal(rows[1]["prior"], before)
    assert torch.equal(rows[1]["teacher"], teacher)
    rows, before, ensemble = seen["boost"]
    assert rows[1].keys() == {"labels", "teacher", "weight"}
    torch.testing.assert_close(rows[1]["weight"], gap_weights(before, teacher))
    share = float((before.argmax(-1) == digits_small.train.targets).double().mean())
    assert float(ensemble.weights[0]) == pytest.approx(max(share, 1e-6))
    rows, before, _ = seen["chain"]
    assert torch.equal(rows[1]["teacher"], before)


def test_boosted_students_weigh_by_held_out_accuracy(digits_small):
    test = digits_small.test
    distiller = ProgressiveDistiller(TEACHER, students(6, 4), "boost", lr=1e-2)
    ensemble = distiller.fit(digits_small.train, validation=test, steps=30)
    for weight, student in zip(ensemble.weights, ensemble.students, strict=True):
        right = (predict(student, in_order(test)).argmax(-1) == test.targets).float().mean()
        assert float(weight) == pytest.approx(max(float(right), 1e-6))
        also = (predict(student, in_order(digits_small.train)).argmax(-1) == digits_small.train.targets).float().mean()
        assert right != also
    assert distiller.histories[0]["lr"][0] > distiller.histories[0]["lr"][-1] == pytest.approx(0, abs=1e-9)


def test_a_run_that_was_killed_ends_alike(digits_small, tmp_path):
    whole = ProgressiveDistiller(TEACHER, students(6, 4)).fit(digits_small.train, steps=4)
    settings = {"steps": 4, "checkpoint": Checkpoint(tmp_path, every=1)}

    def killed(student, data, objective, **given):
        def broken(model, batch, run):
            if run.step == 2 and data.targets.keys() >= {"prior"}:
                raise KeyboardInterrupt
            return objective(model, batch, run)

        return fit(student, data, broken, **given)

    distiller = ProgressiveDistiller(TEACHER, students(6, 4))
    with pytest.raises(KeyboardInterrupt):
        distiller.fit(digits_small.train, trainer=killed, **settings)
    assert same(distiller.fit(digits_small.train, **settings), whole)


def test_loaders_lists_of_batches_and_epochs(digits_small):
    from torch.utils.data import DataLoader

    loader = DataLoader(TensorData(*digits_small.train[:]), 60, shuffle=True)
    distiller = ProgressiveDistiller(TEACHER, students(4, 3))
    distiller.fit(loader, epochs=1)
    assert [len(history) for history in distiller.histories] == [4, 4]
    batches = [digits_small.train[torch.arange(0, 60)], digits_small.train[torch.arange(60, 120)]]
    assert len(distiller.fit(batches, steps=2)) == 2
    with pytest.raises(InputError, match="loader gave no batch"):
        distiller.fit([])


class MambaStudent(nn.Module):
    """Transformers' own Mamba on the rows of a digit."""

    def __init__(self):
        super().__init__()
        from transformers import MambaModel

        self.rows, self.body = nn.Linear(8, 8), MambaModel(mamba_config(use_cache=False))
        self.head = nn.Linear(8, 10)

    def forward(self, images):
        return self.head(self.body(inputs_embeds=self.rows(images[:, 0])).last_hidden_state.mean(1))


def test_a_vit_teaches_students_of_both_libraries(tiny_vit, digits_small, global_rng_untouched):
    factories = [MambaStudent, *students(4)]
    ensemble = ProgressiveDistiller(tiny_vit, factories).fit(digits_small.train, steps=2)
    assert ensemble(digits_small.test.inputs).shape == (100, 10)
    assert 0 < ensemble.flops(1) < ensemble.flops()


@pytest.mark.slow
def test_students_add_up_where_each_is_weak(trained_cnn, digits_small):
    train, test = digits_small.train, digits_small.test
    tiny = [lambda: MambaClassifier(8, 1, 2, 3, 1, 10, state_dim=4)] * 3
    errors = []
    for ensemble in ProgressiveDistiller(trained_cnn, tiny, lr=1e-2).stages(train, steps=120):
        errors.append(float((predict(ensemble, in_order(test)).argmax(-1) != test.targets).double().mean()))
    assert errors[-1] < errors[0] - 0.1
    alone = [float((predict(s, in_order(test)).argmax(-1) != test.targets).double().mean()) for s in ensemble.students]
    assert errors[-1] < min(alone) - 0.1


def cases():
    ensemble, images = ProgressiveEnsemble([linear(0)]), torch.zeros(2, 1, 8, 8)
    a, delta, A, B, C, D = scan_inputs()
    return {
        "patch": (
            lambda: MambaClassifier(8, 1, 3, 4, 1, 10),
            "image_size is 8, but must be a multiple of patch, which",
        ),
        "pool": (lambda: MambaClassifier(8, 1, 2, 4, 1, 10, pool="max"), "pool is 'max', but must be one of"),
        "images": (
            lambda: MambaClassifier(8, 1, 2, 4, 1, 10)(torch.zeros(2, 3, 8, 8)),
            r"images have shape \(2, 3, 8, 8\), but must be \(samples, 1, 8, 8\)",
        ),
        "alpha": (lambda: pkd_loss(S, Z, Y, alpha=1.5), r"alpha is 1\.5, but must be at least 0 and at most 1"),
        "alpha of the distiller": (lambda: ProgressiveDistiller(TEACHER, students(3), alpha=-0.1), r"alpha is -0\.1"),
        "temperature": (lambda: pkd_loss(S, Z, Y, temperature=0), "temperature is 0, but must be greater than 0"),
        "classes": (lambda: pkd_loss(S, Z[:, :4], Y), "The student tells 5 classes apart and the teacher 4"),
        "prior": (lambda: pkd_loss(S, Z, Y, prior_logits=P[:, :4]), "tells 5 classes apart"),
        "weights": (
            lambda: pkd_loss(S, Z, Y, sample_weight=torch.ones(3)),
            r"sample_weight has shape \(3,\), but must",
        ),
        "factories": (lambda: ProgressiveDistiller(TEACHER, []), "student_factories is empty, but must have at least"),
        "mode": (lambda: ProgressiveDistiller(TEACHER, students(3), "bag"), "mode is 'bag', but must be one of"),
        "too many": (lambda: ensemble(images, 2), "num_students is 2, but must be at least 1 and at most 1"),
        "none": (lambda: ensemble(images, num_students=0), "num_students is 0, but must be"),
        "flops": (lambda: ensemble.flops(3), "num_students is 3"),
        "no students": (lambda: ProgressiveEnsemble()(images), "The ensemble has no students"),
        "threshold": (lambda: ensemble.anytime(images, 1.2), r"threshold is 1\.2, but must be at least 0"),
        "numbers": (lambda: ProgressiveEnsemble([linear(0)], weights=[1.0, 2.0]), "weights has 2 numbers"),
        "scan": (lambda: selective_scan(a, delta[:, :3], A, B, C, D), r"delta has shape \(2, 3, 3\), but a and delta"),
        "skip": (lambda: selective_scan(a, delta, A, B, C, D[:2]), r"D has shape \(2,\)"),
        "chunk": (lambda: selective_scan(a, delta, A, B, C, D, chunk=0), "chunk is 0, but must be greater than 0"),
        "state_dim": (lambda: SelectiveSSM(4, state_dim=0), "state_dim is 0, but must be greater than 0"),
    }


@pytest.mark.parametrize("kind", cases())
def test_bad_input_is_refused(kind, global_rng_untouched):
    call, message = cases()[kind]
    with torch.random.fork_rng(), pytest.raises(InputError, match=message):
        call()


def test_other_classes_and_missing_labels_are_refused(digits_small):
    four = [lambda: MambaClassifier(8, 1, 4, 4, 1, 4)]
    with pytest.raises(InputError, match="The student tells 4 classes apart and the teacher 10"):
        ProgressiveDistiller(TEACHER, four).fit(digits_small.train, steps=1)
    with pytest.raises(InputError, match="The batch has no labels, but this adds cross entropy"):
        fit(linear(0), TensorData(digits_small.train.inputs), PKD(TEACHER), steps=1)
    with pytest.raises(InputError, match="teacher is None, but must be a model where the batch does not bring"):
        fit(linear(0), digits_small.train, PKD(None), steps=1)
