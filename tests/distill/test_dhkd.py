"""DHKD: both losses against closed forms, the alignment of gradients, the second head, the objective in the loop."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from retouch.core import seeds
from retouch.core.data import TensorData
from retouch.core.distillation import answered
from retouch.core.errors import InputError
from retouch.core.loop import Checkpoint, fit
from retouch.core.models import logits_of
from retouch.distill.dhkd import (
    DHKD,
    DHKDLoss,
    DualHead,
    align_gradients,
    binary_kl,
    binary_kl_norm,
    dhkd_backward,
    recipe,
)

DRAW = torch.Generator().manual_seed(0)
S, T = (3 * torch.randn(6, 5, generator=DRAW, dtype=torch.float64) for _ in range(2))
Y = torch.tensor([0, 1, 2, 3, 4, 0])
X = torch.randn(6, 8, generator=DRAW)


def dual(aux="linear", **settings):
    with seeds.isolated(1):
        return DualHead(nn.Sequential(nn.Linear(8, 7), nn.ReLU()), nn.Linear(7, 5), num_classes=5, aux=aux, **settings)


def net(seed, classes=10):
    with seeds.isolated(seed):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, classes))


def losses_of(model, **settings):
    main, aux = model(X)
    return DHKDLoss(**settings)(main, aux, T.float(), Y)


# --- the losses -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [1.0, 2.0, 4.0])
def test_both_losses_are_what_their_definitions_say(tau):
    half, ours, q = torch.tensor(0.5, dtype=torch.float64), ((S - T) / tau).sigmoid(), (T / tau).sigmoid()
    p = (S / tau).sigmoid()
    norm = half * (half.log() - ours.log()) + half * (half.log() - (1 - ours).log())
    torch.testing.assert_close(binary_kl_norm(S, T, temperature=tau), tau**2 / 6 * norm.sum(), rtol=1e-10, atol=0)
    plain = q * (q.log() - p.log()) + (1 - q) * ((1 - q).log() - (1 - p).log())
    torch.testing.assert_close(binary_kl(S, T, temperature=tau), tau**2 / 6 * plain.sum(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("tau", [1.0, 2.0, 4.0])
def test_the_closed_form_and_its_gradient(tau):
    s = S.clone().requires_grad_()
    loss = binary_kl_norm(s, T, temperature=tau)
    expected = tau**2 / 6 * np.log(np.cosh((S - T).numpy() / (2 * tau))).sum()
    assert float(loss.detach()) == pytest.approx(expected, abs=1e-10)
    gradient = tau / 12 * ((S - T) / (2 * tau)).tanh()
    torch.testing.assert_close(torch.autograd.grad(loss, s)[0], gradient, rtol=1e-10, atol=1e-12)


def test_it_is_zero_only_where_logits_are_equal_and_symmetric():
    assert binary_kl_norm(T, T) == 0
    assert binary_kl_norm(T.float(), T.float()) == 0
    torch.testing.assert_close(binary_kl_norm(S, T), binary_kl_norm(T, S), rtol=1e-12, atol=0)
    assert abs(binary_kl(S, T) - binary_kl(T, S)) > 0.1
    assert abs(float(binary_kl(T, T))) < 1e-12


def test_a_common_shift_changes_nothing_but_the_students_own_does_unlike_in_softmax():
    loss = binary_kl_norm(S, T)
    torch.testing.assert_close(binary_kl_norm(S + 3, T + 3), loss, rtol=1e-12, atol=0)
    assert binary_kl_norm(T + 3, T) > 1
    kl = F.kl_div((T + 3).log_softmax(-1), T.log_softmax(-1), log_target=True, reduction="batchmean")
    assert abs(float(kl)) < 1e-12


def test_at_high_temperature_it_is_the_squared_distance():
    expected = (S - T).square().sum() / (8 * 6)
    torch.testing.assert_close(binary_kl_norm(S, T, temperature=1e4), expected, rtol=1e-5, atol=0)


def test_far_apart_it_is_a_line_and_finite_in_single_precision():
    s = torch.full((1, 1), 1e4, requires_grad=True)
    loss = binary_kl_norm(s, torch.zeros(1, 1), temperature=2.0)
    slope = torch.autograd.grad(loss, s)[0]
    assert torch.isfinite(loss)
    assert float(slope) == pytest.approx(1.0)  # tau / (2 N)
    assert torch.isfinite(binary_kl(s.detach(), -s.detach()))


def test_its_gradient_lives_where_that_of_the_older_form_and_of_clamped_sigmoids_is_gone():
    s = torch.full((1, 1), 60.0, requires_grad=True)
    z = torch.full((1, 1), 100.0)
    norm, plain = (torch.autograd.grad(loss(s, z), s)[0].abs() for loss in (binary_kl_norm, binary_kl))
    assert norm > 0.9
    assert plain < 1e-8
    p = ((s - z) / 2).sigmoid().clamp(1e-8, 1 - 1e-8)
    assert torch.autograd.grad(-0.5 * (p.log() + (1 - p).log()).sum(), s)[0] == 0


def test_classes_are_summed_and_not_averaged():
    wide = binary_kl_norm(S.repeat(1, 4), T.repeat(1, 4))
    torch.testing.assert_close(wide, 4 * binary_kl_norm(S, T))
    torch.testing.assert_close(binary_kl_norm(S.repeat(4, 1), T.repeat(4, 1)), binary_kl_norm(S, T))


def test_no_gradient_goes_into_the_teacher():
    z = T.clone().requires_grad_()
    s = S.clone().requires_grad_()
    for loss in (binary_kl, binary_kl_norm):
        loss(s, z).backward()
    assert z.grad is None


# --- alignment ------------------------------------------------------------------------------------------------------


def vectors(*shapes):
    return [torch.randn(*shape, generator=DRAW, dtype=torch.float64) for shape in shapes]


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def test_agreeing_gradients_are_added_exactly():
    first = vectors((3, 4), (5,))
    second = [a + 0.1 for a in first]
    for scope in ("all", "shared"):
        merged = align_gradients(first, second, scope=scope)
        assert all(torch.equal(m, a + b) for m, a, b in zip(merged, first, second, strict=True))


def test_what_points_against_the_primary_is_taken_out_of_the_secondary_alone():
    first = vectors((3, 4), (5,))
    second = [b - 2 * a for a, b in zip(first, vectors((3, 4), (5,)), strict=True)]
    g0, g1 = flat(first), flat(second)
    assert g0 @ g1 < 0
    result = flat(align_gradients(first, second))
    assert abs(float((result - g0) @ g0)) < 1e-10
    torch.testing.assert_close(result, g0 + g1 - (g0 @ g1) / (g0 @ g0) * g0)
    other = flat(align_gradients(second, first))
    assert not torch.allclose(result, other)  # one-sided: the primary stays whole


def test_missing_gradients_are_zeros_and_the_whole_vector_reaches_the_main_head():
    """Parameters: backbone, main head (no secondary), auxiliary head (no primary), none of both."""
    backbone, main = vectors((4,), (3,))
    aux = vectors((2,))[0]
    first, second = [backbone, main, None, None], [-2 * backbone, None, aux, None]
    g0 = torch.cat([backbone, main])
    share = 2 * backbone @ backbone / (g0 @ g0)
    whole = align_gradients(first, second)
    torch.testing.assert_close(whole[0], backbone - 2 * backbone + share * backbone)
    torch.testing.assert_close(whole[1], (1 + share) * main)
    torch.testing.assert_close(whole[2], aux)
    assert whole[3] == 0
    shared = align_gradients(first, second, scope="shared")
    torch.testing.assert_close(shared[0], backbone, rtol=1e-10, atol=1e-12)
    assert torch.equal(shared[1], main)
    assert torch.equal(shared[2], aux)


def test_nothing_to_project_on_is_no_division_by_zero():
    zero, some = torch.zeros(3), torch.ones(3)
    assert torch.equal(align_gradients([zero], [some])[0], some)
    assert torch.equal(align_gradients([None], [some])[0], some)


def test_backward_writes_what_the_two_gradients_merge_to():
    model = dual()
    with torch.no_grad():
        model.aux[0].weight.copy_(-4 * model.head.weight)  # so that they disagree
    params = list(model.parameters())
    terms = losses_of(model)
    g0, g1 = (torch.autograd.grad(terms[n], params, retain_graph=True, allow_unused=True) for n in ("ce", "logit"))
    shared = [(a, b) for a, b in zip(g0, g1, strict=True) if a is not None and b is not None]
    assert sum((a * b).sum() for a, b in shared) < 0
    for scope in ("all", "shared"):
        model.zero_grad()
        dhkd_backward(terms, model.parameters(), scope)
        expected = align_gradients(g0, g1, scope=scope)
        for p, g in zip(params, expected, strict=True):
            torch.testing.assert_close(p.grad, g)
    before = [p.grad.clone() for p in params]
    dhkd_backward(terms, params, "shared")  # added, as backward does
    for p, g in zip(params, before, strict=True):
        torch.testing.assert_close(p.grad, 2 * g)


def test_backward_of_agreeing_losses_is_that_of_their_sum():
    model = dual("mlp", dropout=0.0)
    terms = losses_of(model, alpha=1e-9)
    dhkd_backward(terms, model.parameters())
    merged = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    terms["total"].backward()
    for p, g in zip(model.parameters(), merged, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-7)


# --- two heads ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aux", ["linear", "mlp"])
def test_each_loss_reaches_its_own_head_alone(aux):
    model = dual(aux)
    terms = losses_of(model)
    ce = torch.autograd.grad(terms["ce"], list(model.aux.parameters()), retain_graph=True, allow_unused=True)
    assert all(g is None for g in ce)
    logit = torch.autograd.grad(terms["logit"], list(model.head.parameters()), retain_graph=True, allow_unused=True)
    assert all(g is None for g in logit)
    backbone = list(model.student.backbone.parameters())
    for name in ("ce", "logit"):
        assert all(g.abs().sum() > 0 for g in torch.autograd.grad(terms[name], backbone, retain_graph=True))


def test_eval_mode_is_the_student_alone_and_export_has_no_second_head():
    model = dual("mlp").eval()
    answer = model(X)
    assert isinstance(answer, torch.Tensor)
    exported = model.export()
    assert torch.equal(answer, exported(X))
    assert not [name for name in exported.state_dict() if "aux" in name]
    assert exported.state_dict().keys() == {f"{a}.{b}" for a in ("backbone.0", "head") for b in ("weight", "bias")}
    model.train()
    main, extra = model(X)
    assert torch.equal(main, exported(X))
    assert extra.shape == (6, 5)
    assert torch.equal(logits_of(model(X)), main)


def test_the_nonlinear_head_is_that_of_the_paper():
    kinds = [type(layer) for layer in dual("mlp").aux]
    assert kinds == [nn.Linear, nn.Dropout, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert dual("mlp").aux[0].out_features == 200
    assert dual("mlp").aux[1].p == 0.1


def test_a_whole_model_gets_a_second_head_and_is_given_back(tiny_vit, global_rng_untouched):
    before = copy.deepcopy(tiny_vit.state_dict())
    model = DualHead.of(tiny_vit, seed=3)
    images = torch.zeros(2, 1, 8, 8)
    assert model.export() is tiny_vit
    assert torch.equal(model.eval()(images), tiny_vit(images).logits)
    assert model.aux[0].in_features == 16
    main, extra = model.train()(pixel_values=images)
    assert main.shape == extra.shape == (2, 10)
    assert all(torch.equal(before[name], value) for name, value in tiny_vit.state_dict().items())
    assert not [m for m in tiny_vit.modules() if m._forward_hooks]
    same = DualHead.of(tiny_vit, seed=3)
    assert torch.equal(model.aux[0].weight, same.aux[0].weight)
    assert not torch.equal(model.aux[0].weight, DualHead.of(tiny_vit, seed=4).aux[0].weight)


def test_the_logit_loss_stops_after_some_epochs():
    model, loss = dual(), DHKDLoss(stop_after=2)
    main, aux = model(X)
    assert loss(main, aux, T.float(), Y, epoch=1)["logit"] > 0
    late = loss(main, aux, T.float(), Y, epoch=2)
    assert late["logit"] == 0
    assert torch.equal(late["total"], late["ce"])
    dhkd_backward(late, model.parameters())
    assert model.aux[0].weight.grad is None


# --- in the loop ----------------------------------------------------------------------------------------------------


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def test_terms_are_weighted_and_asking_beforehand_changes_nothing(digits_small, global_rng_untouched):
    teacher, one, two = net(0), DualHead.of(net(1)), DualHead.of(net(1))
    settings = {"alpha": 0.3, "gamma": 0.7, "temperature": 3.0}
    history = fit(one, digits_small.train, DHKD(teacher, **settings), epochs=1, batch_size=240, optimizer=sgd)
    fit(two, answered(digits_small.train, teacher), DHKD(None, **settings), epochs=1, batch_size=240, optimizer=sgd)
    assert torch.equal(one.head.weight, two.head.weight)
    fresh, (images, labels) = DualHead.of(net(1)), digits_small.train[torch.arange(240)]
    main, aux = fresh(images)
    assert history["ce"][0] == pytest.approx(0.7 * float(F.cross_entropy(main, labels)), rel=1e-5)
    logit = binary_kl_norm(aux, teacher(images), temperature=3.0)
    assert history["logit"][0] == pytest.approx(0.3 * float(logit), rel=1e-5)


def test_without_the_logit_loss_it_is_plain_training(digits_small):
    one, two = DualHead.of(net(1)), net(1)
    fit(one, digits_small.train, DHKD(net(0), alpha=0.0), steps=5, optimizer=sgd)
    fit(two, digits_small.train, steps=5, optimizer=sgd)
    assert all(torch.equal(a, b) for a, b in zip(one.export().parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize("scope", ["all", "shared"])
def test_alignment_in_the_loop_is_that_by_hand(digits_small, scope):
    teacher, one, two = net(0), DualHead.of(net(1)), DualHead.of(net(1))
    with torch.no_grad():
        for model in (one, two):
            model.aux[0].weight.copy_(-4 * model.head.weight)
    history = fit(one, digits_small.train, DHKD(teacher, align=scope), steps=3, batch_size=240, optimizer=sgd)
    optimizer, (images, labels) = sgd(two.parameters()), digits_small.train[torch.arange(240)]
    for step in range(3):
        main, aux = two(images)
        terms = DHKDLoss()(main, aux, teacher(images).detach(), labels)
        assert history["loss"][step] == pytest.approx(float(terms["total"]), rel=1e-4)
        optimizer.zero_grad()
        dhkd_backward(terms, two.parameters(), scope)
        optimizer.step()
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_with_batch_norm_a_step_runs_forward_once(digits_small):
    model = DualHead.of(net(1), aux="mlp")
    fit(model, digits_small.train, DHKD(net(0), alpha=0.1, align="all"), steps=2)
    assert model.aux[2].num_batches_tracked == 2


def test_a_vit_teaches_and_a_vit_learns(tiny_vit, digits_small):
    student = copy.deepcopy(tiny_vit)
    before = copy.deepcopy(tiny_vit.state_dict())
    made = recipe(student, tiny_vit, digits_small.train, aux="mlp", align="shared", stop_after=1)
    model, history = made.fit(epochs=2)
    assert model is student
    assert not model.training
    assert history["logit"][0] > 0
    assert history["logit"][-1] == 0
    assert all(torch.equal(before[name], value) for name, value in tiny_vit.state_dict().items())
    assert model(torch.zeros(2, 1, 8, 8)).logits.shape == (2, 10)


def test_resuming_inside_of_it_ends_with_the_same_weights(digits_small, tmp_path):
    found = []
    for stop in (False, True):
        model, folder = DualHead.of(net(1), aux="mlp"), Checkpoint(tmp_path / str(stop), every=2)
        for steps in (3, 6) if stop else (6,):
            if steps == 6 and stop:
                model = DualHead.of(net(1), aux="mlp")
            settings = {"alpha": 0.1, "align": "all", "stop_after": 1}
            fit(model, digits_small.train, DHKD(net(0), **settings), steps=steps, checkpoint=folder, optimizer=sgd)
        found.append(model)
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in found), strict=True))


# --- bad input ------------------------------------------------------------------------------------------------------

BAD = {
    "classes": (lambda: binary_kl_norm(S, T[:, :4]), "The student tells 5 classes apart and the teacher 4"),
    "dimensions": (lambda: binary_kl(S[None], T[None]), r"shape \(1, 6, 5\), but must be \(samples, classes\)"),
    "temperature": (lambda: binary_kl_norm(S, T, temperature=0.0), r"temperature is 0\.0, but must be greater than 0"),
    "empty": (lambda: align_gradients([], []), "primary has 0 gradients and secondary 0, but both must have one"),
    "lengths": (lambda: align_gradients([S], [S, T]), "primary has 1 gradients and secondary 2, but both must have"),
    "shapes": (lambda: align_gradients([S], [T[:2]]), r"primary\[0\] has shape \(6, 5\) and secondary\[0\] \(2, 5\)"),
    "scope": (lambda: align_gradients([S], [T], scope="some"), "scope is 'some', but must be one of 'all', 'shared'"),
    "missing": (lambda: DHKDLoss()(S, None, T, Y), "aux_logits is None, but must be the auxiliary head's"),
    "alpha": (lambda: DHKDLoss(alpha=-1.0), r"alpha is -1\.0, but must be at least 0"),
    "aux": (lambda: dual("deep"), "aux is 'deep', but must be one of 'linear', 'mlp'"),
    "head": (
        lambda: DualHead(nn.Linear(8, 7), nn.ReLU(), num_classes=5),
        "head is a ReLU, but must be a linear layer",
    ),
    "number": (
        lambda: DualHead(nn.Linear(8, 7), nn.Linear(7, 5), num_classes=4),
        "num_classes is 4, but must be 5, as the head has it",
    ),
    "align": (lambda: DHKD(None, align="none"), "align is 'none', but must be one of 'all', 'shared', None"),
    "features": (
        lambda: DualHead(nn.Linear(8, 7), nn.Linear(7, 5), num_classes=5)(X[None]),
        r"The head's input has shape \(1, 6, 7\), but must be \(samples, features\)",
    ),
    "unreached": (
        lambda: dhkd_backward(losses_of(dual()), nn.Linear(2, 2).parameters()),
        "params has no parameter that the losses reach",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_refused(kind):
    call, message = BAD[kind]
    with pytest.raises(InputError, match=message):
        call()


def test_other_models_and_missing_labels_are_refused(digits_small):
    with pytest.raises(InputError, match=r"The model is a Sequential, but must be a DualHead: DualHead\.of"):
        fit(net(1), digits_small.train, DHKD(net(0)), steps=1)
    with pytest.raises(InputError, match="The student tells 10 classes apart and the teacher 4"):
        fit(DualHead.of(net(1)), digits_small.train, DHKD(net(0, classes=4)), steps=1)
    with pytest.raises(InputError, match="The batch has no labels, but DHKD adds cross entropy"):
        fit(DualHead.of(net(1)), TensorData(digits_small.train.inputs), DHKD(net(0)), steps=1)
    with pytest.raises(InputError, match="aux_logits is None"):
        DHKD(net(0))(DualHead.of(net(1)).eval(), digits_small.train[torch.arange(4)])
