"""PerpGrad and StableMax: closed forms, gradients without the weight in them, a network that generalises at once."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.optim import LBFGS, SGD, AdamW

from retouch.core.batches import in_order
from retouch.core.data import TensorData
from retouch.core.errors import InputError
from retouch.core.loop import Callback, Checkpoint, fit
from retouch.core.models import predict
from retouch.core.objectives import cross_entropy
from retouch.train.cutmix import CutMix
from retouch.train.grokking import (
    PerpGrad,
    ProjectGradients,
    log_stablemax,
    nlm_alignment,
    perp_gradient,
    project_gradients_,
    recipe,
    softmax_collapse_fraction,
    stablemax,
    stablemax_cross_entropy,
    stablemax_loss,
    stablemax_map,
)
from retouch.worlds import modular


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def leaf(value):
    return value.clone().requires_grad_()


def cosine(one, two):
    one, two = one.double().flatten(), two.double().flatten()
    return float(one @ two / (one.norm() * two.norm()))


def test_golden(golden):
    case = golden("grokking")
    logits, labels = leaf(torch.tensor(case.in_logits)), torch.tensor(case.in_labels)
    case.close("out_s", stablemax_map(logits))
    case.close("out_log_stablemax", log_stablemax(logits))
    loss = stablemax_cross_entropy(logits, labels)
    case.close("out_loss", loss)
    case.close("out_logits_grad", torch.autograd.grad(loss, logits)[0])
    case.close("out_loss_none", stablemax_cross_entropy(logits, labels, reduction="none"))
    for number in range(4):
        weight, grad = (torch.tensor(getattr(case, f"in_{name}{number}")) for name in ("weight", "grad"))
        case.close(f"out_grad{number}", perp_gradient(weight, grad))
    bases = {
        "sgd": lambda w: SGD([w], lr=0.1, momentum=0.8),
        "adamw": lambda w: AdamW([w], lr=0.01, weight_decay=0.0),
    }
    for name, build in bases.items():
        weight = leaf(torch.tensor(case.in_weight0))
        optimizer = PerpGrad(build(weight))
        for grad in (case.in_grad0, case.in_second_grad0):
            weight.grad = torch.tensor(grad)
            optimizer.step()
        case.close(f"out_{name}_two_steps", weight)


# --- StableMax ------------------------------------------------------------------------------------------------------


def test_s_is_one_at_zero_smooth_there_monotone_and_its_own_reciprocal():
    x = torch.cat([torch.linspace(-30, 30, 601), torch.tensor([-1e30, 1e30])]).double()
    assert stablemax_map(torch.zeros(())) == 1
    torch.testing.assert_close(stablemax_map(-x) * stablemax_map(x), torch.ones_like(x), rtol=1e-12, atol=0)
    assert (stablemax_map(x[:601]).diff() > 0).all()
    assert (stablemax_map(x) > 0).all()
    at = leaf(torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64))
    slope = torch.autograd.grad(stablemax_map(at).sum(), at, create_graph=True)[0]
    assert slope.tolist() == [0.25, 1.0, 1.0]  # and finite where the other branch would divide by zero


def test_probabilities_sum_to_one_in_the_order_of_softmax():
    logits = 20 * draw(50, 7)
    torch.testing.assert_close(stablemax(logits).sum(-1), torch.ones(50, dtype=torch.float64))
    torch.testing.assert_close(stablemax(logits.T, dim=0), stablemax(logits).T)
    assert torch.equal(stablemax(logits).argsort(-1), logits.argsort(-1))
    s = stablemax_map(logits)
    torch.testing.assert_close(stablemax(logits), s / s.sum(-1, keepdim=True))


def test_is_softmax_of_the_signed_logarithm_and_finite_far_out():
    logits = 5 * draw(20, 6)
    expected = F.log_softmax(logits.sign() * logits.abs().log1p(), -1)
    torch.testing.assert_close(log_stablemax(logits), expected, rtol=1e-12, atol=0)
    for dtype in (torch.float32, torch.float64):
        far = torch.tensor([[1e30, -1e30, 0.0], [-1e30, -1e30, 1e30]], dtype=dtype)
        assert log_stablemax(far).isfinite().all()
        assert log_stablemax(far).dtype == dtype


def test_the_gradient_is_that_of_softmax_over_one_plus_the_logits():
    logits = leaf(torch.cat([3 * draw(9, 5), torch.zeros(1, 5, dtype=torch.float64)]))  # zeros: a new head's answer
    labels = torch.arange(10) % 5
    stablemax_cross_entropy(logits, labels, reduction="sum").backward()
    expected = (stablemax(logits) - F.one_hot(labels, 5)) / (1 + logits.abs())
    torch.testing.assert_close(logits.grad, expected.detach())
    assert torch.autograd.gradcheck(lambda z: stablemax_cross_entropy(z, labels), leaf(draw(10, 5)))


def test_the_loss_is_in_float64_unless_told_otherwise():
    logits, labels = draw(8, 5, dtype=torch.float32), torch.arange(8) % 5
    whole = stablemax_cross_entropy(logits, labels)
    assert whole.dtype == torch.float64
    own = stablemax_cross_entropy(logits, labels, compute_dtype=None)
    assert own.dtype == torch.float32
    torch.testing.assert_close(own.double(), whole, rtol=1e-5, atol=0)
    half = leaf(logits.half())
    stablemax_cross_entropy(half, labels).backward()
    assert half.grad.dtype == torch.float16


def test_weights_ignored_targets_distributions_and_maps():
    logits, labels = draw(6, 4), torch.tensor([0, 3, -100, 2, 1, -100])
    rows, weight = labels >= 0, torch.tensor([1.0, 2.0, 0.5, 3.0])
    torch.testing.assert_close(
        stablemax_cross_entropy(logits, labels), stablemax_cross_entropy(logits[rows], labels[rows])
    )
    logs = log_stablemax(logits)[rows].gather(1, labels[rows, None])[:, 0]
    shares = weight.double()[labels[rows]]
    torch.testing.assert_close(
        stablemax_cross_entropy(logits, labels, weight=weight), -(shares * logs).sum() / shares.sum()
    )
    hard = F.one_hot(labels[rows], 4).float()
    torch.testing.assert_close(stablemax_cross_entropy(logits[rows], hard), stablemax_cross_entropy(logits, labels))
    maps, ids = draw(2, 4, 3, 3), torch.randint(4, (2, 3, 3), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        stablemax_cross_entropy(maps, ids), stablemax_cross_entropy(maps.movedim(1, -1).flatten(0, 2), ids.flatten())
    )


def test_large_logits_stop_softmax_but_not_stablemax():
    logits, labels = 50 * (6 * torch.eye(5) + draw(5, 5, dtype=torch.float32)), torch.arange(5)
    assert softmax_collapse_fraction(logits, labels) == 1
    for loss, stopped in ((F.cross_entropy, 5), (stablemax_cross_entropy, 0)):
        z = leaf(logits)
        loss(z, labels).backward()
        assert int((z.grad == 0).all(1).sum()) == stopped


@pytest.mark.parametrize(("dtype", "edge"), [(torch.float32, 24 * math.log(2)), (torch.float64, 53 * math.log(2))])
def test_collapse_begins_where_the_other_exponentials_are_absorbed(dtype, edge):
    margins = torch.tensor([0.5 * edge, 0.99 * edge, 1.01 * edge, 2 * edge], dtype=dtype)
    logits = torch.stack([margins, torch.zeros_like(margins)], 1)
    assert softmax_collapse_fraction(logits, torch.zeros(4, dtype=torch.long)) == 0.5
    assert softmax_collapse_fraction(logits, torch.ones(4, dtype=torch.long)) == 0  # a wrong answer is not collapsed
    assert softmax_collapse_fraction(logits.double(), torch.zeros(4, dtype=torch.long)) <= 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: stablemax_cross_entropy(torch.ones(2, 3).long(), torch.tensor([0, 1])),
            "logits has dtype torch.int64",
        ),
        (lambda: log_stablemax(torch.ones(2, 3).long()), "logits has dtype torch.int64, but must be floating"),
        (lambda: stablemax_map(torch.ones(2).long()), "x has dtype torch.int64, but must be floating"),
        (
            lambda: stablemax_cross_entropy(torch.ones(2, 3), torch.tensor([0, 3])),
            "targets has 3, but must have 0 to 2, or -100",
        ),
        (lambda: stablemax_cross_entropy(torch.ones(2, 3), torch.tensor([0, -1])), "targets has -1, but must have"),
        (
            lambda: stablemax_cross_entropy(torch.ones(2, 3), torch.ones(2, 4)),
            r"targets has shape \(2, 4\), but must have \(2, 3\)",
        ),
        (
            lambda: stablemax_cross_entropy(torch.ones(2, 3), torch.tensor([0, 1]), reduction="max"),
            "reduction is 'max', but must be one of",
        ),
    ],
)
def test_bad_logits_and_targets_are_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


# --- the projection -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sine", [1.0, 1e-1, 1e-3])
def test_the_gradient_is_perpendicular_and_as_long_as_before(dtype, sine):
    weight = draw(64, 32, dtype=dtype)
    grad = perp_gradient(weight, draw(64, 32, seed=1, dtype=dtype)) * sine - 0.7 * weight
    kept, cut = (perp_gradient(weight, grad, rescale=rescale) for rescale in (True, False))
    assert abs(cosine(kept, weight)) < 1e-6  # also where float32 left some of the weight in the first time
    assert float(kept.norm()) == pytest.approx(float(grad.norm()), rel=1e-5)
    assert float(cut.norm()) < float(grad.norm())
    assert cosine(kept, cut) == pytest.approx(1, abs=1e-6)


def test_is_the_closed_form():
    weight, grad = draw(3, 4), draw(3, 4, seed=1)
    cut = grad - (weight * grad).sum() / weight.square().sum() * weight
    torch.testing.assert_close(perp_gradient(weight, grad, rescale=False), cut)
    torch.testing.assert_close(perp_gradient(weight, grad), cut * grad.norm() / cut.norm())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("factor", [3.0, -0.3])
def test_along_the_weight_nothing_is_left(dtype, factor):
    weight = draw(300, 40).to(dtype)
    grad = factor * weight
    left = perp_gradient(weight, grad)
    assert left.dtype == dtype
    if dtype.itemsize > 2:
        assert (left == 0).all()
    else:  # rounding of the gradient itself is no rounding of ours
        assert left.isfinite().all()
    assert float(perp_gradient(weight, grad, rescale=False).double().norm()) < 1e-2 * float(grad.double().norm())
    assert (perp_gradient(weight, grad, min_sine=0.01) == 0).all()
    assert perp_gradient(weight, grad, min_sine=0).isfinite().all()  # as in the authors' code


def test_zero_weights_and_zero_gradients():
    weight, grad, zero = draw(3, 4), draw(3, 4, seed=1), torch.zeros(3, 4, dtype=torch.float64)
    torch.testing.assert_close(perp_gradient(zero, grad), grad, rtol=1e-12, atol=0)
    assert torch.equal(perp_gradient(weight, zero), zero)
    assert torch.equal(perp_gradient(zero, zero), zero)


@pytest.mark.parametrize("factor", [1e-3, -1.0, 250.0])
def test_the_scale_and_sign_of_the_weight_do_not_matter(factor):
    weight, grad = draw(5, 6), draw(5, 6, seed=1)
    torch.testing.assert_close(perp_gradient(factor * weight, grad), perp_gradient(weight, grad))


def test_half_precision_is_projected_in_float32():
    weight, grad = draw(256, 64).half(), draw(256, 64, seed=1).half()
    exact = perp_gradient(weight.double(), grad.double())
    assert perp_gradient(weight, grad).dtype == torch.float16
    torch.testing.assert_close(perp_gradient(weight, grad).double(), exact, rtol=2e-3, atol=1e-4)


def test_very_small_gradients_keep_their_norm():
    weight, grad = draw(8, 8, dtype=torch.float32), 1e-24 * draw(8, 8, seed=1, dtype=torch.float32)
    assert float((grad * grad).sum()) == 0  # squares underflow
    new = perp_gradient(weight, grad)
    assert float(new.double().norm()) == pytest.approx(float(grad.double().norm()), rel=1e-4)


def test_all_tensors_of_a_model_are_projected_each_for_itself_and_the_rest_is_left():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2).double(), nn.Embedding(5, 2))
    parameters = list(model.parameters())
    for number, parameter in enumerate(parameters[:-1]):
        parameter.grad = draw(*parameter.shape, seed=number, dtype=parameter.dtype)
    expected = [perp_gradient(p, p.grad) for p in parameters[:-1]]
    before = copy.deepcopy([p.grad for p in parameters[:-1]])
    project_gradients_(parameters, filter=lambda parameter: parameter.ndim > 1)
    for parameter, new, old in zip(parameters[:-1], expected, before, strict=True):
        assert torch.equal(parameter.grad, new if parameter.ndim > 1 else old)
    assert parameters[-1].grad is None
    project_gradients_([])


def test_in_a_homogeneous_network_no_layer_moves_along_itself():
    model = modular.ModularMLP(7, 32).double()
    data = modular.data("train", modulus=7)
    F.cross_entropy(model(data.inputs.double()), data.targets).backward()
    assert all(abs(value) > 1e-3 for value in nlm_alignment(model).values())
    project_gradients_(model.parameters())
    for parameter in model.parameters():
        assert abs(float((parameter.detach() * parameter.grad).sum())) < 1e-14
    assert all(abs(value) < 1e-12 for value in nlm_alignment(model).values())


def test_alignment_is_that_of_minus_the_gradient():
    model = nn.Linear(3, 2)
    assert nlm_alignment(model) == {}
    model.weight.grad, model.bias.grad = -2 * model.weight.detach(), torch.zeros(2)
    assert nlm_alignment(model) == {"weight": pytest.approx(1), "bias": 0}


def test_bad_gradients_and_settings_are_refused():
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(InputError, match=r"The gradient of a parameter of shape \(5, 3\) is sparse, but must be dense"):
        project_gradients_(embedding.parameters())
    project_gradients_(embedding.parameters(), filter=lambda parameter: False)
    with pytest.raises(InputError, match=r"grad has shape \(2,\), but must have the weight's, \(3,\)"):
        perp_gradient(torch.ones(3), torch.ones(2))
    with pytest.raises(InputError, match="eps is -1, but must be at least 0"):
        perp_gradient(torch.ones(3), torch.ones(3), eps=-1)
    with pytest.raises(InputError, match="min_sine is 2, but must be at least 0 and at most 1"):
        ProjectGradients(min_sine=2)
    with pytest.raises(InputError, match="base is .*SGD.*, but must be an optimizer that is already built"):
        PerpGrad(SGD)
    with pytest.raises(InputError, match="loss is 'softmax', but must be one of"):
        recipe(nn.Linear(2, 2), None, loss="softmax")


# --- the optimizer --------------------------------------------------------------------------------------------------


def test_a_step_is_a_projection_and_a_step_of_the_base():
    one, two = leaf(draw(4, 3)), leaf(draw(4, 3))
    wrapped, base = PerpGrad(AdamW([one], lr=0.1)), AdamW([two], lr=0.1)
    for seed in range(3):
        one.grad, two.grad = draw(4, 3, seed=seed), draw(4, 3, seed=seed)
        wrapped.step()
        project_gradients_([two])
        base.step()
    assert torch.equal(one, two)


def test_small_steps_keep_the_norm_to_second_order():
    changes = []
    for rate in (1e-2, 1e-3):
        weight = leaf(draw(20))
        optimizer = PerpGrad(SGD([weight], lr=rate), rescale=False)
        weight.grad = draw(20, seed=1)
        optimizer.step()
        changes.append(float(weight.detach().norm() - draw(20).norm()))
    assert changes[0] == pytest.approx(100 * changes[1], rel=1e-2)


def test_closures_make_their_gradients_before_they_are_projected():
    def steps(build, *, closure):
        weight, target = leaf(draw(4)), draw(4, seed=1)
        optimizer = build(weight)

        def loss():
            optimizer.zero_grad()
            value = (weight - target).square().sum()
            value.backward()
            return value

        values = []
        for _ in range(3):
            value = optimizer.step(loss) if closure else (loss(), optimizer.step())[0]
            values.append(float(value.detach()))
        return weight.detach(), values

    def perp(weight):
        return PerpGrad(SGD([weight], lr=0.05, momentum=0.5))

    (one, first), (two, second) = steps(perp, closure=True), steps(perp, closure=False)
    assert torch.equal(one, two)
    assert first == second
    moved, _ = steps(lambda weight: PerpGrad(LBFGS([weight], lr=0.1, max_iter=3), rescale=False), closure=True)
    assert float(moved.norm()) == pytest.approx(float(draw(4).norm()), rel=0.05)  # every gradient was projected
    assert not torch.allclose(moved, draw(4), atol=0.05)


def test_groups_state_hooks_and_schedulers_are_those_of_the_base():
    weight, bias = leaf(draw(3, 2)), leaf(draw(2))
    base = AdamW([weight], lr=0.1, betas=(0.5, 0.6))
    optimizer = PerpGrad(base)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is base.param_groups
    assert optimizer.state is base.state
    assert optimizer.defaults["betas"] == (0.5, 0.6)
    optimizer.add_param_group({"params": [bias], "lr": 0.2})
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    weight.grad, bias.grad = draw(3, 2), draw(2)
    optimizer.step()
    scheduler.step()
    assert calls == [1]
    assert [group["lr"] for group in base.param_groups] == [0.05, 0.1]
    optimizer.zero_grad()
    assert weight.grad is None
    other = PerpGrad(AdamW([{"params": [leaf(draw(3, 2))]}, {"params": [leaf(draw(2))]}]))
    other.load_state_dict(optimizer.state_dict())
    assert other.base.param_groups[1]["lr"] == 0.1
    assert torch.equal(other.base.state_dict()["state"][0]["exp_avg"], base.state[weight]["exp_avg"])
    assert other.param_groups is other.base.param_groups
    for again in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(PerpGrad(SGD([weight], lr=0.3))))):
        assert again.param_groups[0]["lr"] in (0.05, 0.3)
        assert "PerpGrad" in repr(again)


# --- in fit ---------------------------------------------------------------------------------------------------------


def small(seed=0):
    data = modular.data("train", modulus=7)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return modular.ModularMLP(7, 16), data


def adamw(parameters):
    return AdamW(parameters, lr=0.01, eps=1e-25, weight_decay=0.0)


def weights(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def test_the_callback_and_the_optimizer_are_one_thing(global_rng_untouched):
    (one, data), (two, _), (three, _) = small(), small(), small()
    fit(one, data, steps=6, batch_size=8, optimizer=adamw, callbacks=[ProjectGradients()])
    fit(two, data, steps=6, batch_size=8, optimizer=lambda parameters: PerpGrad(adamw(parameters)))
    fit(three, data, steps=6, batch_size=8, optimizer=adamw)
    assert torch.equal(weights(one), weights(two))
    assert not torch.equal(weights(one), weights(three))


def test_clipping_before_is_clipping_after():
    class ClipAfter(Callback):
        def on_gradients(self, run):
            nn.utils.clip_grad_norm_(run.module.parameters(), 0.1)

    (one, data), (two, _) = small(), small()
    fit(one, data, steps=4, batch_size=8, clip=0.1, callbacks=[ProjectGradients()])
    fit(two, data, steps=4, batch_size=8, callbacks=[ProjectGradients(), ClipAfter()])
    torch.testing.assert_close(weights(one), weights(two))


def test_accumulated_gradients_are_projected_once():
    (one, data), (two, _) = small(), small()
    rows = TensorData(data.inputs[:16], data.targets[:16])
    settings = {"optimizer": lambda parameters: SGD(parameters, lr=0.1), "callbacks": [ProjectGradients()]}
    fit(one, rows, steps=3, batch_size=16, **settings)
    fit(two, rows, steps=3, batch_size=4, accelerator=Accelerator(gradient_accumulation_steps=4), **settings)
    torch.testing.assert_close(weights(one), weights(two))


@pytest.mark.parametrize("wrapped", [False, True])
def test_resumes_to_the_same_weights(tmp_path, wrapped):
    class Kill(Callback):
        def on_step(self, run):
            if run.step == 5:
                raise KeyboardInterrupt

    settings = {"steps": 8, "batch_size": 8, "checkpoint": Checkpoint(tmp_path / "run", every=2)}
    settings["optimizer"] = (lambda parameters: PerpGrad(adamw(parameters))) if wrapped else adamw
    own = [] if wrapped else [ProjectGradients()]
    (whole, data), (killed, _), (again, _) = small(), small(), small()
    fit(whole, data, callbacks=[*own, Callback()], **{**settings, "checkpoint": None})
    with pytest.raises(KeyboardInterrupt):
        fit(killed, data, callbacks=[*own, Kill()], **settings)
    Kill.on_step = Callback.on_step
    fit(again, data, callbacks=[*own, Kill()], **settings)
    assert torch.equal(weights(again), weights(whole))


def test_sharded_models_are_refused():
    from types import SimpleNamespace

    run = SimpleNamespace(accelerator=SimpleNamespace(distributed_type="FSDP"))
    with pytest.raises(InputError, match="The model is sharded"):
        ProjectGradients().on_start(run)


@pytest.mark.parametrize("loss", ["cross_entropy", "stablemax"])
@pytest.mark.parametrize("project", [False, True])
def test_trains_a_real_vit(tiny_vit, digits_small, loss, project):
    before = predict(tiny_vit, in_order(digits_small.test))
    plan = recipe(tiny_vit, digits_small.train, loss=loss, project=project)
    model, history = plan.fit(steps=3, batch_size=32)
    assert len(history) == 3
    assert not torch.equal(predict(model, in_order(digits_small.test)), before)


def test_the_recipe_gives_adam_a_small_eps_where_it_projects(digits_small):
    seen = []

    class Note(Callback):
        def on_step(self, run):
            seen.append(run.optimizer.param_groups[0]["eps"])

    for settings in ({}, {"optimizer_eps": 1e-12}, {"project": False}):
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        recipe(net, digits_small.train, **settings).fit(steps=1, batch_size=32, callbacks=[Note()])
    assert seen == [1e-25, 1e-12, 1e-8]
    with pytest.raises(InputError, match="optimizer_eps is -1"):
        ProjectGradients(optimizer_eps=-1)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    plan = recipe(net, digits_small.train)
    plan.fit(steps=1, batch_size=32, optimizer=lambda p: SGD(p, lr=0.1))  # has no eps


def test_the_recipe_without_both_is_plain_training(tiny_vit, digits_small):
    one, two = tiny_vit, copy.deepcopy(tiny_vit)
    recipe(one, digits_small.train, project=False).fit(steps=2, batch_size=32)
    fit(two, digits_small.train, steps=2, batch_size=32)
    assert torch.equal(weights(one), weights(two))


def test_trains_a_real_language_model_on_sums(tiny_llama):
    data = modular.data("train", modulus=31, form="tokens")

    def last_token(model, batch, run):
        inputs, targets = batch
        return stablemax_cross_entropy(model(**inputs).logits[:, -1], targets)

    history = fit(tiny_llama, data, last_token, steps=4, batch_size=32, callbacks=[ProjectGradients()])
    assert all(map(math.isfinite, history["loss"]))
    logits = tiny_llama(**data[torch.arange(6)][0]).logits.flatten(0, 1)
    labels = torch.arange(18) % 31
    labels[:6] = -100
    own, whole = (stablemax_cross_entropy(logits, labels, compute_dtype=d) for d in (None, torch.float64))
    torch.testing.assert_close(own.double(), whole, rtol=1e-5, atol=0)


def test_the_objective_takes_distributions_and_several_answers(digits_small, tiny_vit):
    fit(tiny_vit, digits_small.train, stablemax_loss, steps=2, callbacks=[CutMix(probability=1.0)])
    data = TensorData(draw(6, 4, dtype=torch.float32), torch.arange(6) % 4)
    several = stablemax_loss(lambda x: torch.stack([x, 2 * x]), data[:])["stablemax_loss"]
    singles = [stablemax_loss(lambda x, k=k: k * x, data[:])["stablemax_loss"] for k in (1, 2)]
    torch.testing.assert_close(several, torch.stack(singles).mean())
    with pytest.raises(InputError, match="StableMax needs them"):
        stablemax_loss(lambda x: x, draw(2, 3))


def test_generalises_where_plain_training_only_remembers():
    """The study of the paper in small: modular addition, full batches."""
    train, test = (modular.data(split, modulus=31) for split in ("train", "test"))
    right = {}
    for name, callbacks in {"plain": [], "perpgrad": [ProjectGradients()]}.items():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = modular.ModularMLP(31)

        def optimizer(parameters):
            return AdamW(parameters, lr=0.01, betas=(0.9, 0.99), eps=1e-25, weight_decay=0.0)

        fit(model, train, cross_entropy, steps=400, batch_size=1000, optimizer=optimizer, callbacks=callbacks)
        fitted = model(train.inputs).detach()
        right[name] = [float((predict(model, [d[:]]).argmax(1) == d.targets).float().mean()) for d in (train, test)]
    assert right["plain"][0] == right["perpgrad"][0] == 1
    assert right["plain"][1] < 0.1
    assert right["perpgrad"][1] > 0.8
    gone = {}
    for loss in (F.cross_entropy, stablemax_cross_entropy):  # a fitted network's logits, 50 times as large
        logits = leaf(50 * fitted)
        loss(logits, train.targets).backward()
        gone[loss] = float((logits.grad == 0).all(1).float().mean())
    assert gone[F.cross_entropy] > 0.8
    assert gone[stablemax_cross_entropy] == 0


def test_adams_usual_eps_hides_small_gradients():
    """A pitfall: gradients of a fitted network are smaller than 1e-8."""
    moved = {}
    for eps in (1e-8, 1e-25):
        weight = leaf(draw(20))
        optimizer = PerpGrad(AdamW([weight], lr=0.01, eps=eps, weight_decay=0.0))
        weight.grad = 1e-12 * draw(20, seed=1)
        optimizer.step()
        moved[eps] = float((weight.detach() - draw(20)).abs().max())
    assert moved[1e-25] == pytest.approx(0.01)
    assert moved[1e-8] < 1e-5
