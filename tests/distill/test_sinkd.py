"""SinKD: the plan against POT and closed forms, the loss against the authors' code, and the objective in the loop."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from retouch.core.data import TensorData
from retouch.core.distillation import answered
from retouch.core.errors import InputError
from retouch.core.loop import fit
from retouch.distill.sinkd import SinKD, SinKDLoss, recipe, sinkd_loss, sinkhorn_plan

DRAW = torch.Generator().manual_seed(0)
S, T = (torch.randn(7, 5, generator=DRAW, dtype=torch.float64) * 2 for _ in range(2))
Y = torch.tensor([0, 1, 2, 3, 4, 0, 1])


def distributions(n, k=5, sharp=1.0):
    return (sharp * torch.randn(n, k, generator=DRAW, dtype=torch.float64)).softmax(-1)


def test_golden(golden):
    case = golden("sinkd")
    settings = {"epsilon": float(case.param_epsilon), "n_iters": int(case.param_n_iters)}
    for tag in "ab":
        student, teacher = (torch.tensor(getattr(case, f"in_{tag}_{side}")) for side in ("student", "teacher"))
        soft = [(logits / float(case.param_temperature)).softmax(-1) for logits in (student, teacher)]
        plan, cost = sinkhorn_plan(*soft, **settings)
        case.close(f"out_{tag}_plan", plan)
        case.close(f"out_{tag}_cost", cost)
        case.close(f"out_{tag}_transport", (plan * cost).sum())
        student.requires_grad_()
        more = {"temperature": float(case.param_temperature), "scale": float(case.param_scale), "reduction": "sum"}
        loss = sinkd_loss(student, teacher, **settings, **more)
        case.close(f"out_{tag}_loss", loss)
        case.close(f"out_{tag}_grad", torch.autograd.grad(loss, student)[0])


# --- the plan -------------------------------------------------------------------------------------------------------


def test_columns_of_the_plan_sum_to_one_and_rows_do_so_in_the_end():
    p, q = distributions(6), distributions(6)
    plan, cost = sinkhorn_plan(p, q)
    assert (plan >= 0).all()
    assert ((cost >= 0) & (cost <= 2)).all()
    torch.testing.assert_close(plan.sum(0), torch.ones(6, dtype=torch.float64), rtol=0, atol=1e-12)
    gaps = [(sinkhorn_plan(p, q, n_iters=n)[0].sum(1) - 1).abs().max() for n in (1, 5, 50, 500)]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 1e-8


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_logarithms_change_nothing_where_nothing_underflows(power):
    p, q = distributions(6), distributions(4)
    one, two = (sinkhorn_plan(p, q, log_domain=log, cost_p=power) for log in (True, False))
    torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-10)
    expected = (p[:, None] - q).abs().pow(power).sum(-1)
    torch.testing.assert_close(one[1], expected)


def test_small_entropies_do_not_underflow():
    plan, _ = sinkhorn_plan(distributions(6, sharp=9.0), distributions(6, sharp=9.0), epsilon=1e-3)
    assert torch.isfinite(plan).all()


def test_the_plan_is_that_of_pot():
    ot = pytest.importorskip("ot")
    p, q = distributions(6), distributions(6)
    plan, cost = sinkhorn_plan(p, q, n_iters=2000)
    uniform = torch.full((6,), 1 / 6, dtype=torch.float64)
    reference = ot.sinkhorn(uniform, uniform, cost, reg=0.1, numItermax=5000, stopThr=1e-14)
    torch.testing.assert_close(plan, 6 * reference, rtol=1e-6, atol=1e-9)


# --- the loss -------------------------------------------------------------------------------------------------------


def test_one_sample_is_the_l1_distance():
    p, q = ((logits[:1] / 2).softmax(-1) for logits in (S, T))
    torch.testing.assert_close(sinkd_loss(S[:1], T[:1]), (p - q).abs().sum())


def test_equal_batches_cost_nothing_only_without_entropy():
    logits = 12 * torch.eye(5, dtype=torch.float64)
    assert sinkd_loss(logits, logits, epsilon=1e-3) < 1e-6
    mild = torch.eye(5, dtype=torch.float64)
    assert sinkd_loss(mild, mild) > 1e-3  # the bias of the entropy: not a mistake


def test_the_teachers_order_does_not_matter_to_it_but_to_kl():
    order = torch.randperm(7, generator=DRAW)
    torch.testing.assert_close(sinkd_loss(S, T[order]), sinkd_loss(S, T))
    kl = [F.kl_div(S.log_softmax(-1), t.softmax(-1), reduction="batchmean") for t in (T, T[order])]
    assert abs(kl[0] - kl[1]) > 0.1


def test_it_is_bounded_and_grows_with_the_batch_when_summed():
    for scale in (0.1, 1, 30):
        assert 0 <= sinkd_loss(scale * S, -scale * T) <= 2
    torch.testing.assert_close(sinkd_loss(S, T, reduction="sum"), 7 * sinkd_loss(S, T))
    torch.testing.assert_close(sinkd_loss(S, T, scale=0.01), 0.01 * sinkd_loss(S, T))


def test_constants_added_to_a_row_change_nothing_and_the_teacher_gets_no_gradient():
    student, teacher = S.clone().requires_grad_(), T.clone().requires_grad_()
    shift = torch.randn(7, 1, generator=DRAW, dtype=torch.float64)
    loss = sinkd_loss(student, teacher)
    torch.testing.assert_close(sinkd_loss(S + shift, T - shift), loss)
    loss.backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


def test_infinite_entropy_is_the_mean_of_all_pairs():
    p, q = ((logits / 2).softmax(-1) for logits in (S, T))
    plan, cost = sinkhorn_plan(p, q, epsilon=1e6)
    torch.testing.assert_close(plan, torch.full((7, 7), 1 / 7, dtype=torch.float64), rtol=1e-4, atol=0)
    expected = 7 * torch.cdist(p, q, p=1).mean()
    torch.testing.assert_close(sinkd_loss(S, T, epsilon=1e6, reduction="sum"), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(cost, torch.cdist(p, q, p=1))


def test_a_constant_plan_has_the_same_value_and_nearly_the_same_gradient():
    student = S.clone().requires_grad_()
    values = [sinkd_loss(student, T, unroll=unroll, n_iters=300) for unroll in (True, False)]
    assert values[0] == values[1]
    unrolled, constant = (torch.autograd.grad(value, student)[0] for value in values)
    assert F.cosine_similarity(unrolled.flatten(), constant.flatten(), dim=0) > 0.9


def test_it_keeps_a_gradient_where_reverse_kl_and_js_lose_theirs():
    """Student and teacher sure of different classes, ever more so."""
    norms = {"sinkhorn": [], "reverse": [], "kl": []}
    for gap in (5.0, 20.0):
        student = torch.tensor([[gap, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
        teacher = torch.tensor([[0.0, 0.0, 40.0]], dtype=torch.float64)
        p, q = student.softmax(-1), teacher.softmax(-1)
        losses = {
            "sinkhorn": sinkd_loss(student, teacher),
            "reverse": (p * (p.log() - q.clamp_min(1e-12).log())).sum(),
            "kl": F.kl_div(student.log_softmax(-1), q, reduction="sum"),
        }
        for name, loss in losses.items():
            norms[name].append(float(torch.autograd.grad(loss, student, retain_graph=True)[0].norm()))
        assert losses["sinkhorn"] <= 2 < losses["kl"]
    assert norms["kl"][1] == pytest.approx(2**0.5, rel=1e-2)
    assert norms["reverse"][1] < 1e-6


def test_half_precision_is_computed_in_single():
    loss = sinkd_loss(S.half(), T.half())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, sinkd_loss(S.float(), T.float()), rtol=1e-2, atol=1e-3)


BAD = {
    "classes": (lambda: sinkd_loss(S, T[:, :4]), "The student tells 5 classes apart and the teacher 4"),
    "samples": (lambda: sinkd_loss(S, T[:4]), r"have shape \(7, 5\) and the teacher's \(4, 5\)"),
    "regression": (lambda: sinkd_loss(S[:, :1], T[:, :1]), "has 1 class, but must have at least 2"),
    "dimensions": (lambda: sinkd_loss(S[None], T[None]), r"shape \(1, 7, 5\), but must be \(samples, classes\)"),
    "epsilon": (lambda: sinkd_loss(S, T, epsilon=0.0), r"epsilon is 0\.0, but must be greater than 0"),
    "n_iters": (lambda: sinkhorn_plan(S.softmax(-1), T.softmax(-1), n_iters=0), "n_iters is 0, but must be"),
    "temperature": (lambda: sinkd_loss(S, T, temperature=-1), "temperature is -1, but must be greater than 0"),
    "nan": (lambda: sinkd_loss(S / 0, T), "student_logits holds values that are not finite"),
    "reduction": (lambda: sinkd_loss(S, T, reduction="none"), "reduction is 'none', but must be one of"),
    "alpha": (lambda: SinKDLoss(alpha=1.5), r"alpha is 1\.5, but must be at least 0 and at most 1"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_refused(kind):
    call, message = BAD[kind]
    with pytest.raises(InputError, match=message):
        call()


# --- in the loop ----------------------------------------------------------------------------------------------------


def test_terms_and_their_total():
    terms = SinKDLoss(alpha=0.6, beta=0.3, kd_temperature=3.0, epsilon=0.2)(S, T, Y)
    soft = F.cross_entropy(S / 3, (T / 3).softmax(-1))
    expected = {"ce": 0.4 * F.cross_entropy(S, Y), "kl": 0.6 * soft, "sinkhorn": 0.3 * sinkd_loss(S, T, epsilon=0.2)}
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value)
    torch.testing.assert_close(terms["total"], sum(expected.values()))


def nets(*seeds):
    found = []
    for seed in seeds:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            found.append(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    return found


def test_asking_beforehand_equals_asking_at_every_step(digits_small, global_rng_untouched):
    teacher, one, two = nets(0, 1, 1)
    history = fit(one, digits_small.train, SinKD(teacher), epochs=1)
    fit(two, answered(digits_small.train, teacher), SinKD(None), epochs=1)
    assert torch.equal(one[1].weight, two[1].weight)
    assert {"ce", "kl", "sinkhorn"} <= history.records[0].keys()


def test_a_vit_teaches_a_linear_student(tiny_vit, digits_small):
    (student,) = nets(1)
    before = [p.clone() for p in tiny_vit.parameters()]
    model, history = recipe(student, tiny_vit, digits_small.train).fit(epochs=1)
    assert len(history) == 4
    assert all(torch.equal(a, b) for a, b in zip(tiny_vit.parameters(), before, strict=True))
    assert model is student


def test_a_language_model_teaches_another_at_the_answers_positions(tiny_llama):
    import copy

    student = copy.deepcopy(tiny_llama)
    tokens = torch.randint(1, 40, (6, 7), generator=DRAW)
    labels = tokens.masked_fill(torch.arange(7) < 3, -100)
    data = TensorData({"input_ids": tokens}, labels)
    history = fit(student, data, SinKD(tiny_llama, alpha=0.5), steps=1, batch_size=6)
    logits = tiny_llama(input_ids=tokens).logits[:, :-1][labels[:, 1:] != -100]
    assert history["sinkhorn"][0] == pytest.approx(0.8 * float(sinkd_loss(logits, logits)), rel=1e-4)
    assert history["ce"][0] == pytest.approx(0.5 * float(F.cross_entropy(logits, tokens[:, 3:].flatten())), rel=1e-4)


def test_sequence_classifiers_of_bert(digits_small):
    import transformers

    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=30, num_labels=3, **tiny)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher, student = (transformers.BertForSequenceClassification(config) for _ in range(2))
    tokens = torch.randint(3, 30, (8, 6), generator=DRAW)
    data = TensorData({"input_ids": tokens}, torch.arange(8) % 3)
    assert len(fit(student, data, SinKD(teacher), steps=2)) == 2


def test_other_classes_and_missing_labels_are_refused(digits_small):
    (student,) = nets(1)
    narrow = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    with pytest.raises(InputError, match="The student tells 10 classes apart and the teacher 4"):
        fit(student, digits_small.train, SinKD(narrow), steps=1)
    with pytest.raises(InputError, match="The batch has no labels, but SinKD adds cross entropy"):
        fit(student, TensorData(digits_small.train.inputs), SinKD(student), steps=1)
