"""Teacher hacking: exact distances on enumerable models, planted curves, data sources, the monitor, real classes."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

from retouch.audit.teacher_hacking import (
    SOURCES,
    DistillationTrial,
    Imitation,
    PowerLaw,
    ResponseSource,
    Sampling,
    TeacherHackingMonitor,
    hacking_report,
    power_law_fit,
    prompts_of,
    respond,
    response_logits,
    sequence_divergence,
    sft,
    split_prompts,
    token_divergence,
)
from retouch.core.data import TensorData
from retouch.core.errors import InputError
from retouch.core.loop import Callback, Checkpoint, fit

DRAW = torch.Generator().manual_seed(0)
P, Q = (torch.randn(3, 4, 5, generator=DRAW, dtype=torch.float64) for _ in range(2))
TOKENS = torch.randint(5, (3, 4), generator=DRAW)
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
V, L = 3, 3


class Markov(nn.Module):
    """A model of 3 tokens whose next depends on the two before."""

    def __init__(self, seed, sharp=2.0):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(sharp * torch.randn(V, V, V, generator=draw))
        self.dropout = nn.Dropout(0.5)
        self.modes = []

    def forward(self, prompts, responses):
        self.modes.append((self.training, torch.is_grad_enabled()))
        text = torch.cat([prompts[:, -2:], responses[:, :-1]], 1)
        return self.dropout(self.table[text[:, :-1], text[:, 1:]])


PROMPTS = torch.cartesian_prod(torch.arange(V), torch.arange(V))
ALL = torch.tensor(list(itertools.product(range(V), repeat=L)))
SHORT = Sampling(max_new_tokens=L)


def along(model, prompt, responses):
    """A function from responses to a model's logits for one prompt."""
    return lambda tokens: response_logits(model, {**prompts_of(prompt.expand(len(tokens), -1)), "responses": tokens})


def chance(model, prompt):
    """The probability of every response (27,)."""
    logits = along(model, prompt, ALL)(ALL)
    return logits.log_softmax(-1).gather(-1, ALL[..., None])[..., 0].sum(1).exp()


# --- distances ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["forward", "reverse", "js"])
def test_a_model_is_at_no_distance_from_itself_and_all_others_are(kind):
    assert (token_divergence(P, P, kind=kind).abs() < 1e-12).all()
    assert (token_divergence(P, Q, kind=kind) > 0).all()


def test_divergences_are_what_they_are_called():
    p, q = P.softmax(-1), Q.softmax(-1)
    forward, reverse = (p * (p / q).log()).sum(-1), (q * (q / p).log()).sum(-1)
    torch.testing.assert_close(token_divergence(P, Q), forward)
    torch.testing.assert_close(token_divergence(P, Q, kind="reverse"), reverse)
    for beta in (0.1, 0.5, 0.9):
        m = beta * p + (1 - beta) * q
        js = beta * (p * (p / m).log()).sum(-1) + (1 - beta) * (q * (q / m).log()).sum(-1)
        torch.testing.assert_close(token_divergence(P, Q, kind="js", beta=beta), js)


def test_js_ends_at_zero_and_is_symmetric_in_the_middle():
    for beta in (0.0, 1.0):
        assert (token_divergence(P, Q, kind="js", beta=beta) == 0).all()
    for beta in (1e-6, 1 - 1e-6):
        assert (token_divergence(P, Q, kind="js", beta=beta) < 1e-4).all()
    one, other = token_divergence(P, Q, kind="js"), token_divergence(Q, P, kind="js")
    torch.testing.assert_close(one, other)
    assert not torch.allclose(token_divergence(P, Q, kind="js", beta=0.2), token_divergence(Q, P, kind="js", beta=0.2))


def test_shifted_logits_change_nothing_and_the_teacher_gets_no_gradient():
    shift = torch.randn(3, 4, 1, generator=DRAW, dtype=torch.float64)
    torch.testing.assert_close(token_divergence(P + shift, Q - shift), token_divergence(P, Q))
    p, q = P.clone().requires_grad_(), Q.clone().requires_grad_()
    token_divergence(p, q, kind="js").sum().backward()
    assert p.grad is None and q.grad.abs().sum() > 0


def test_masked_positions_contribute_nothing():
    whole = sequence_divergence(P, Q, TOKENS, mask=MASK)
    torch.testing.assert_close(whole, (token_divergence(P, Q) * MASK).sum(1))
    broken = Q.clone()
    broken[MASK == 0] = float("nan")
    torch.testing.assert_close(sequence_divergence(P, broken, TOKENS, mask=MASK.bool()), whole)
    q = Q.clone().requires_grad_()
    sequence_divergence(P, q, TOKENS, mask=MASK).sum().backward()
    assert (q.grad[MASK == 0] == 0).all()


def test_half_precision_is_computed_in_single():
    assert token_divergence(P.bfloat16(), Q.bfloat16()).dtype == torch.float32


@torch.no_grad()
def test_the_chain_rule_is_exact_over_all_responses():
    """Summed token divergences, weighted with p(y), are the KL of whole responses."""
    p, q = Markov(1), Markov(2)
    p.eval(), q.eval()
    for prompt in PROMPTS:
        ours, theirs = chance(p, prompt), chance(q, prompt)
        exact = (ours * (ours / theirs).log()).sum()
        each = sequence_divergence(along(p, prompt, ALL), along(q, prompt, ALL), ALL, mask=torch.ones_like(ALL))
        torch.testing.assert_close((ours * each).sum(), exact)


@torch.no_grad()
def test_the_monitors_distance_is_that_within_monte_carlo_error():
    teacher, student = Markov(1).eval(), Markov(2).eval()
    exact = torch.stack(
        [(c * (c / chance(student, prompt)).log()).sum() for prompt in PROMPTS for c in [chance(teacher, prompt)]]
    ).mean()
    monitor = TeacherHackingMonitor(teacher, PROMPTS.repeat(300, 1), sampling=SHORT)
    data = monitor.responses["proxy"]
    each = sequence_divergence(
        response_logits(teacher, data.inputs),
        response_logits(student, data.inputs),
        data.inputs["responses"],
        mask=data.inputs["mask"],
    )
    found = monitor.distance("proxy", student)
    assert found == pytest.approx(float(each.mean()), rel=1e-5)
    assert abs(found - float(exact)) < 5 * float(each.std()) / len(each) ** 0.5
    assert monitor.distance("proxy", teacher) == pytest.approx(0, abs=1e-6)


def test_samples_have_the_models_chances():
    model, prompt = Markov(3, sharp=1.0).eval(), torch.tensor([1, 2])
    with torch.no_grad():
        expected = chance(model, prompt)
    drawn = respond(model, prompt.expand(20_000, -1), sampling=SHORT).inputs["responses"]
    number = (drawn * torch.tensor([9, 3, 1])).sum(1)
    share = torch.bincount(number, minlength=27) / len(number)
    assert ((share - expected).abs() < 5 * (expected * (1 - expected) / len(number)).sqrt() + 1e-9).all()


# --- what the curves say --------------------------------------------------------------------------------------------

N = torch.arange(1, 21) * 50.0
LAW = 3.0 * N**-0.4


def test_a_power_law_is_recovered_exactly():
    law = power_law_fit(N, LAW)
    assert (law.a, law.b, law.std) == pytest.approx((3.0, 0.4, 0.0), abs=1e-5)
    torch.testing.assert_close(law(N), LAW.double(), rtol=1e-5, atol=0)
    assert PowerLaw(2.0, 0.5, 0.0)([4.0]).tolist() == [1.0]


def test_residual_deviation():
    noise = 0.1 * torch.randn(2000, generator=DRAW, dtype=torch.float64)
    n = torch.arange(1, 2001, dtype=torch.float64)
    law = power_law_fit(n, 3 * n**-0.4 * noise.exp())
    assert (law.a, law.b, law.std) == pytest.approx((3.0, 0.4, 0.1), rel=0.08)


def test_a_planted_u_is_found_at_its_minimum():
    golden = 1 + ((N - 400) / 1000) ** 2
    report = hacking_report(LAW, golden, steps=N, window=6)
    assert report.turning == 400 and report.hacking and not report.overfitting
    assert report.rise == pytest.approx(0.36)
    assert report.onset is None  # the proxy keeps to its law


def test_monotone_curves_are_not_flagged():
    report = hacking_report(LAW, 0.5 + LAW, steps=N, window=6, teacher_golden=0.5)
    assert report.turning is None and report.onset is None
    assert not report.hacking and not report.overfitting and not report.starts_closer
    assert report.rise == 0


def test_a_bend_upwards_is_found_without_an_oracle():
    bent = torch.where(N > 500, LAW * (1 + (N - 500) / 1000), LAW)
    report = hacking_report(bent, steps=N, window=6)
    assert report.onset == 550
    assert report.turning is None and not report.hacking and report.rise != report.rise
    assert len(report.deviation) == 20 and max(report.deviation[:6]) < 0.1
    assert hacking_report(torch.where(N == 800, 2 * LAW, LAW), steps=N, window=6).onset is None  # does not persist
    assert hacking_report(LAW * (1 + 0.5 * (N > 900)), steps=N, window=6).onset is None  # two points are too few
    assert hacking_report(torch.where(N > 500, LAW * 0.5, LAW), steps=N, window=6).onset is None  # downwards


def test_over_fitting_is_told_apart():
    """Golden and the proxy rise together: that is over-fitting, and not hacking."""
    both = 1 + ((N - 400) / 1000) ** 2
    report = hacking_report(both, both, steps=N, window=6)
    assert report.turning == 400 and report.overfitting and not report.hacking


def test_over_fitting_after_a_stretch_of_hacking_is_both():
    proxy = torch.where(N <= 700, LAW, LAW[13] * (N / 700) ** 2)
    report = hacking_report(proxy, 1 + ((N - 400) / 1000) ** 2, steps=N, window=6)
    assert report.hacking and report.overfitting


def test_a_student_that_began_closer_than_its_teacher():
    golden = 0.3 + N / 1e4
    report = hacking_report(LAW, golden, steps=N, window=6, teacher_golden=0.5)
    assert report.starts_closer and report.turning == 50
    assert hacking_report(LAW, golden, steps=N, window=6).starts_closer is None


def test_step_0_is_not_fitted():
    steps, proxy = torch.cat([torch.zeros(1), N]), torch.cat([torch.full((1,), 9.0), LAW])
    report = hacking_report(proxy, proxy, steps=steps, window=6)
    assert report.law == power_law_fit(N[:6], LAW[:6])
    assert len(report.deviation) == 20


ONES = torch.ones(3, 4, dtype=torch.long)
BAD = {
    "vocabulary": (lambda: token_divergence(P, Q[..., :4]), "The student tells 4 classes apart and the teacher 5"),
    "shapes": (lambda: token_divergence(P, Q[:, :2]), r"have shape \(3, 2, 5\) and the teacher's \(3, 4, 5\)"),
    "kind": (lambda: token_divergence(P, Q, kind="tv"), "kind is 'tv', but must be one of 'forward', 'reverse', 'js'"),
    "beta": (
        lambda: token_divergence(P, Q, kind="js", beta=1.5),
        r"beta is 1\.5, but must be at least 0 and at most 1",
    ),
    "empty": (
        lambda: sequence_divergence(P, Q, TOKENS, mask=0 * ONES),
        "mask is empty, but must have at least one token",
    ),
    "mask": (lambda: sequence_divergence(P, Q, TOKENS, mask=ONES[:2]), r"mask has shape \(2, 4\), but must be"),
    "length": (lambda: sequence_divergence(P, Q, TOKENS[:, :3], mask=ONES[:, :3]), r"logits are for \(3, 4\) tokens"),
    "steps": (
        lambda: power_law_fit([1.0, 3.0, 2.0], [1.0, 1.0, 1.0]),
        r"steps are \['1', '3', '2'\], but must increase",
    ),
    "report": (lambda: hacking_report([1.0, 1.0], steps=[2, 2], window=2), "but must increase"),
    "values": (lambda: power_law_fit([1, 2], [1.0, 0.0]), r"The least of values is 0\.0, but must be greater than 0"),
    "step 0": (lambda: power_law_fit([0, 2], [1.0, 0.5]), r"The least of steps is 0\.0, but must be greater than 0"),
    "points": (lambda: power_law_fit([1], [1.0]), "have 1 and 1 points, but must have as many, and at least 2"),
    "finite": (lambda: power_law_fit([1, 2], [1.0, float("nan")]), "values has shape .* but must be finite numbers"),
    "window": (lambda: hacking_report(LAW, steps=N, window=30), "window is 30, but must be at least 2 and at most 20"),
    "proxy": (lambda: hacking_report(LAW[:4], steps=N, window=3), "proxy has 4 points and steps 20"),
    "golden": (lambda: hacking_report(LAW, LAW[:4], steps=N, window=3), "golden has 4 points, but must have as many"),
    "temperature": (lambda: respond(Markov(0), PROMPTS, sampling=Sampling(temperature=0.0)), r"temperature is 0\.0"),
    "refresh": (lambda: ResponseSource.online(Markov(0), PROMPTS, refresh="never"), "refresh is 'never', but must be"),
    "share": (lambda: ResponseSource.mixed(offline(), offline(), 1.2), r"share is 1\.2, but must be at least 0"),
    "prompts": (
        lambda: ResponseSource.mixed(offline(), offline(PROMPTS[:3]), 0.5),
        "a has 9 prompts and b 3, but both",
    ),
    "every": (lambda: TeacherHackingMonitor(Markov(0), PROMPTS, every=0), "every is 0, but must be greater than 0"),
    "source": (lambda: trial().source("cached", Markov(0)), "source is 'cached', but must be one of 'offline'"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_refused(kind):
    call, message = BAD[kind]
    with pytest.raises(InputError, match=message):
        call()


# --- data sources ---------------------------------------------------------------------------------------------------


def offline(prompts=PROMPTS, **settings):
    return ResponseSource.offline(respond(Markov(5), prompts, sampling=SHORT), batch_size=4, **settings)


def seen(source, epoch):
    """All prompts of an epoch, with their responses, in the order of prompts."""
    batches = [batch for batch, _, _ in source.epoch(epoch)]
    rows = torch.cat([torch.cat([b["prompts"], b["responses"], b["mask"]], 1) for b in batches])
    return rows[(rows[:, 0] * V + rows[:, 1]).argsort()]


def test_offline_responses_are_the_same_in_every_epoch(global_rng_untouched):
    source = offline()
    assert torch.equal(seen(source, 0), seen(source, 3))
    pairs = respond(Markov(5), PROMPTS, sampling=SHORT).inputs
    assert torch.equal(seen(source, 0)[:, 2:5], pairs["responses"])
    given = ResponseSource.offline((PROMPTS, pairs["responses"]), batch_size=4)
    assert torch.equal(seen(given, 0), seen(source, 0))


@pytest.mark.parametrize("refresh", ["batch", "epoch"])
def test_online_responses_differ_between_epochs_and_can_be_drawn_again(refresh, global_rng_untouched):
    source = ResponseSource.online(Markov(5, sharp=0.1), PROMPTS, sampling=SHORT, refresh=refresh, batch_size=4)
    first, second = seen(source, 0), seen(source, 1)
    assert torch.equal(first[:, :2], PROMPTS) and torch.equal(second[:, :2], PROMPTS)
    assert not torch.equal(first, second)
    assert torch.equal(seen(source, 0), first)
    assert len(source) == 3


def test_online_follows_the_student_as_it_changes():
    student = Markov(5)
    source = ResponseSource.online(student, PROMPTS, sampling=SHORT, batch_size=9)
    with torch.no_grad():
        student.table.zero_()
        student.table[..., 2] = 50.0
    assert (seen(source, 0)[:, 2:5] == 2).all()


def test_sampling_is_in_eval_mode_without_gradients_and_the_mode_comes_back():
    student = Markov(5).train()
    student.dropout.eval()
    list(ResponseSource.online(student, PROMPTS, sampling=SHORT).epoch(0))
    assert set(student.modes) == {(False, False)}
    assert student.training and not student.dropout.training


def test_the_mixed_share_is_right_in_expectation():
    marked = (PROMPTS.repeat(300, 1), torch.full((2700, L), 7))
    online = ResponseSource.online(Markov(5), marked[0], sampling=SHORT, batch_size=100)
    source = ResponseSource.mixed(ResponseSource.offline(marked, batch_size=100), online, 0.3)
    share = [float((b["responses"] != 7).all(1).double().mean()) for b, _, _ in source.epoch(0)]
    assert sum(share) / len(share) == pytest.approx(0.3, abs=0.05)
    assert len(set(share)) > 3  # each element for itself
    for end, expected in ((0.0, 0.0), (1.0, 1.0)):
        some = ResponseSource.mixed(ResponseSource.offline(marked, batch_size=100), online, end)
        assert float((next(some.epoch(0))[0]["responses"] != 7).double().mean()) == expected


def test_mixed_batches_of_several_lengths_are_padded():
    long = respond(Markov(5), PROMPTS, sampling=Sampling(max_new_tokens=5))
    source = ResponseSource.mixed(ResponseSource.offline(long, batch_size=9), offline(), 0.5)
    (batch,) = [batch for batch, _, _ in source.epoch(0)]
    assert batch["responses"].shape == batch["mask"].shape == (9, 5)
    assert set(batch["mask"].sum(1).tolist()) == {3, 5}


def test_the_end_token_is_the_last_that_counts():
    data = respond(Markov(5, sharp=0.1), PROMPTS.repeat(20, 1), sampling=Sampling(max_new_tokens=8, eos=2)).inputs
    for row, mask in zip(data["responses"], data["mask"], strict=True):
        length = int(mask.sum())
        assert (mask[:length] == 1).all() and (row[: length - 1] != 2).all()
        assert length == 8 or row[length - 1] == 2
    assert len(set(data["mask"].sum(1).tolist())) > 2


def test_fewer_prompts():
    assert torch.equal(split_prompts(PROMPTS, 0.5)["prompts"], PROMPTS[:4])
    assert split_prompts({"input_ids": PROMPTS, "attention_mask": PROMPTS + 1}, 1.0)["prompt_mask"][0, 1] == 1


# --- along a run ----------------------------------------------------------------------------------------------------


def test_proxy_and_golden_coincide_where_the_teacher_is_the_oracle():
    teacher = Markov(1)
    monitor = TeacherHackingMonitor(teacher, PROMPTS.repeat(400, 1), copy.deepcopy(teacher), sampling=SHORT)
    for seed in (2, 3, 4):
        found = monitor.on_evaluate(Markov(seed), seed)
        assert found["proxy"] == pytest.approx(found["golden"], rel=0.1)  # of other responses
    same = {**monitor.responses, "golden": monitor.responses["proxy"]}
    monitor.responses = same
    found = monitor.on_evaluate(Markov(5), 9)
    assert found["proxy"] == found["golden"]
    assert monitor.teacher_golden == pytest.approx(0, abs=1e-6)


def test_validation_responses_are_the_teachers_and_the_oracles_and_never_change():
    teacher, oracle, student = Markov(1), Markov(2), Markov(3)
    monitor = TeacherHackingMonitor(teacher, PROMPTS, oracle, sampling=SHORT)
    before = copy.deepcopy({name: data.inputs for name, data in monitor.responses.items()})
    once = monitor.on_evaluate(student, 1)
    assert monitor.on_evaluate(student, 2) == once  # dropout is off, and nothing is drawn
    assert once == {name: monitor.distance(name, student) for name in ("proxy", "golden")}
    assert monitor.distance("golden", oracle) == pytest.approx(0, abs=1e-6)
    assert monitor.distance("proxy", teacher) == pytest.approx(0, abs=1e-6)
    assert once["golden"] != once["proxy"] and monitor.teacher_golden == monitor.distance("golden", teacher) > 0.1
    again = TeacherHackingMonitor(teacher, PROMPTS, oracle, sampling=SHORT)
    for name, data in again.responses.items():
        assert all(torch.equal(data.inputs[key], before[name][key]) for key in before[name])
    assert student.training


def test_a_run_is_watched_from_its_start_to_its_end(global_rng_untouched):
    teacher, student = Markov(1), Markov(3)
    monitor = TeacherHackingMonitor(teacher, PROMPTS, Markov(2), every=3, sampling=SHORT)
    start = monitor.distance("proxy", student)
    optimizer = lambda p: torch.optim.Adam(p, lr=0.05)  # noqa: E731
    history = fit(student, offline(), Imitation(teacher), steps=10, optimizer=optimizer, callbacks=[monitor])
    assert monitor.curves["steps"] == [0, 3, 6, 9, 10]
    assert monitor.curves["proxy"][0] == start
    assert history["proxy"] == monitor.curves["proxy"][1:]
    assert history["golden"] == monitor.curves["golden"][1:]
    assert monitor.curves["proxy"][-1] < start
    assert monitor.report(window=2).law.b > 0


def test_by_default_about_twenty_looks():
    monitor = TeacherHackingMonitor(Markov(1), PROMPTS, sampling=SHORT)
    fit(Markov(3), offline(), Imitation(Markov(1)), steps=45, callbacks=[monitor])
    assert len(monitor.curves["steps"]) == 24 and monitor.curves["steps"][-1] == 45
    assert set(monitor.curves) == {"steps", "proxy"}
    assert monitor.report().turning is None


def test_watching_changes_no_weight():
    one, two = Markov(3), Markov(3)
    fit(one, offline(), Imitation(Markov(1)), steps=6, callbacks=[TeacherHackingMonitor(Markov(1), PROMPTS, every=1)])
    fit(two, offline(), Imitation(Markov(1)), steps=6)
    assert torch.equal(one.table, two.table)


def test_imitation_is_the_mean_divergence_and_leaves_the_teacher_alone():
    teacher, student = Markov(1), Markov(3).eval()
    batch = respond(teacher, PROMPTS, sampling=SHORT).inputs
    objective = Imitation(teacher, kind="js", beta=0.3)
    loss = objective(student, batch)
    loss.backward()
    theirs, ours = response_logits(teacher.eval(), batch), response_logits(student, batch)
    expected = token_divergence(theirs, ours, kind="js", beta=0.3).sum(1).mean()
    torch.testing.assert_close(loss, expected)
    assert teacher.table.grad is None and student.table.grad is not None


def test_sft_is_the_responses_negative_log_likelihood():
    model = Markov(1).eval()
    batch = respond(model, PROMPTS, sampling=Sampling(max_new_tokens=L, eos=2)).inputs
    logps = response_logits(model, batch).log_softmax(-1).gather(-1, batch["responses"][..., None])[..., 0]
    torch.testing.assert_close(sft(model, batch), -(logps * batch["mask"]).sum(1).mean())


class Killed(Exception):
    pass


class KillAt(Callback):
    def __init__(self, step):
        self.at = step

    def on_step(self, run):
        if run.step == self.at:
            raise Killed


@pytest.mark.parametrize("kind", ["online_teacher", "online_student"])
def test_a_run_that_was_killed_resumes_with_its_data_and_curves(kind, tmp_path: Path):
    teacher = Markov(1)

    def run(folder, kill=None):
        student = Markov(3)
        model = student if kind == "online_student" else teacher
        source = ResponseSource.online(model, PROMPTS, sampling=SHORT, batch_size=4)
        monitor = TeacherHackingMonitor(teacher, PROMPTS, every=2, sampling=SHORT)
        try:
            checkpoint = Checkpoint(tmp_path / folder, every=2)
            callbacks = [monitor, KillAt(kill)]
            fit(student, source, Imitation(teacher), steps=9, callbacks=callbacks, checkpoint=checkpoint)
        except Killed:
            pass
        return student, monitor

    student, monitor = run("whole")
    run("killed", kill=5)
    resumed, same = run("killed")
    assert torch.equal(student.table, resumed.table)
    assert same.curves == monitor.curves


# --- real classes ---------------------------------------------------------------------------------------------------


def t5():
    import transformers

    tiny = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 40}
    config = transformers.T5Config(**tiny, decoder_start_token_id=0, dropout_rate=0.1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.T5ForConditionalGeneration(config)


def llama():
    import transformers

    tiny = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.LlamaConfig(vocab_size=40, pad_token_id=0, max_position_embeddings=64, **tiny)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config)


def gpt2():
    import transformers

    tiny = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": 40, "eos_token_id": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**tiny))


BUILD = {"llama": llama, "gpt2": gpt2, "t5": t5}
LONG = Sampling(max_new_tokens=6, eos=2, batch_size=5)
IDS = torch.randint(3, 40, (8, 5), generator=DRAW)
ASKED = {"input_ids": IDS, "attention_mask": (torch.arange(5) >= torch.arange(8)[:, None] % 3).long()}


@pytest.mark.parametrize("name", BUILD)
def test_cached_sampling_has_the_logits_of_a_whole_pass(name, monkeypatch):
    """Each step of generation sees what one pass over the response gives at its place, padding on the left and all."""
    from retouch.audit import teacher_hacking

    model, steps = BUILD[name]().eval(), []
    stepper = teacher_hacking._stepper

    def spy(*args):
        step = stepper(*args)
        return lambda found: steps.append(step(found)) or steps[-1]

    monkeypatch.setattr(teacher_hacking, "_stepper", spy)
    sampling = Sampling(max_new_tokens=6, eos=None if name == "gpt2" else 39)
    data = respond(model, ASKED, sampling=sampling).inputs
    with torch.no_grad():
        whole = response_logits(model, data)
    told = data["mask"].bool()
    torch.testing.assert_close(torch.stack(steps, 1)[told], whole[told], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", BUILD)
def test_real_models_are_distilled_and_watched(name, global_rng_untouched):
    teacher, student = BUILD[name](), BUILD[name]()
    with torch.no_grad():
        for i, p in enumerate(student.parameters()):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    monitor = TeacherHackingMonitor(teacher, ASKED, BUILD[name](), every=4, sampling=LONG)
    source = ResponseSource.mixed(
        ResponseSource.online(teacher, ASKED, sampling=LONG, batch_size=4),
        ResponseSource.online(student, ASKED, sampling=LONG, batch_size=4),
        0.5,
    )
    history = fit(student, source, Imitation(teacher), steps=12, callbacks=[monitor])
    assert history["proxy"][-1] < monitor.curves["proxy"][0]
    assert monitor.teacher_golden == pytest.approx(0, abs=1e-5)  # the oracle is the teacher's like
    assert student.training


def test_padding_of_prompts_on_the_left_changes_nothing():
    model, data = llama().eval(), respond(llama(), ASKED, sampling=LONG).inputs
    with torch.no_grad():
        whole = response_logits(model, data)
        for i in range(3):
            one = {name: value[i : i + 1] for name, value in data.items()}
            start = int((one["prompt_mask"] == 0).sum())
            one |= {name: one[name][:, start:] for name in ("prompts", "prompt_mask")}
            told = one["mask"].bool()
            torch.testing.assert_close(response_logits(model, one)[told], whole[i : i + 1][told], rtol=1e-4, atol=1e-5)


def test_prompts_padded_on_the_right_are_refused_for_causal_models():
    right = {"input_ids": IDS, "attention_mask": (torch.arange(5) < 3).long().expand(8, 5)}
    with pytest.raises(InputError, match="prompts end with padding, but must be padded on the left"):
        respond(llama(), right, sampling=LONG)
    assert len(respond(t5(), right, sampling=LONG)) == 8


# --- the experiment -------------------------------------------------------------------------------------------------


def trial(**changes):
    settings = {
        "oracle": Markov(1),
        "make_teacher": lambda: Markov(2, sharp=0.1),
        "make_student": lambda: Markov(3, sharp=0.1),
        "oracle_prompts": PROMPTS.repeat(20, 1),
        "prompts": PROMPTS[:6],
        "validation": PROMPTS[6:].repeat(20, 1),
        "teacher_steps": 40,
        "student_steps": 4,
        "steps": 12,
        "batch_size": 8,
        "lr": 0.03,
        "sampling": SHORT,
        **changes,
    }
    return DistillationTrial(**settings)


def test_a_trial_runs_on_every_source_from_the_same_student(global_rng_untouched):
    asked = trial()
    starts = set()
    for name in SOURCES:
        monitor = asked.run(name)
        starts.add((monitor.curves["golden"][0], monitor.curves["proxy"][0]))
        assert monitor.curves["proxy"][-1] < monitor.curves["proxy"][0]
        assert monitor.curves["steps"][-1] == 12
    assert len(starts) == 1
    assert asked.teacher is asked.teacher
    one, two = asked.monitor(), asked.monitor()
    assert one.responses is two.responses and one.curves is not two.curves
    assert monitor.models is one.models and one.curves == {"steps": [], "proxy": [], "golden": []}
    again = trial().run("offline")
    assert again.curves == asked.run("offline").curves


def test_a_trials_sources():
    asked = trial()
    student = copy.deepcopy(asked.student)
    assert len(asked.source("offline", student, repeats=3).data) == 18
    assert len(asked.source("online_teacher", student, prompts=split_prompts(asked.prompts, 0.5)).data) == 3
    assert asked.source("online_student", student).model is student
    assert asked.source("mixed", student, share=0.2).share == 0.2


@pytest.mark.parametrize("objective", [sft, Imitation(Markov(0))])
def test_other_batches_are_refused(tiny_llama, objective):
    data = TensorData({"input_ids": IDS}, IDS)
    with pytest.raises(InputError, match="The batch has no prompts, prompt_mask, responses, mask, but must be of a"):
        fit(tiny_llama, data, objective, steps=1)
