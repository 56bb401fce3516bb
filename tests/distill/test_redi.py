"""REDI: closed forms of the loss, its limits (NLL, SimPO), padding, the data of both stages, real language models."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from retouch.core.data import TensorData
from retouch.core.errors import InputError
from retouch.core.loop import Callback, Checkpoint, fit
from retouch.core.objectives import next_token
from retouch.distill.redi import (
    REDI,
    CollapseGuard,
    GradientNorm,
    Pair,
    REDITrainer,
    Trace,
    build_pairs,
    encode,
    pair_logps,
    redi_loss,
    sequence_logps,
)
from retouch.worlds import text
from retouch.worlds.text.models import new_llama
from retouch.worlds.text.tokens import tokenizer, vocabulary

DRAW = torch.Generator().manual_seed(0)
V = 11
LOGITS = 2 * torch.randn(4, 6, V, generator=DRAW, dtype=torch.float64)
LABELS = torch.randint(V, (4, 6), generator=DRAW)
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
CHOSEN, REJECTED = (-5 * torch.rand(5, generator=DRAW, dtype=torch.float64) for _ in range(2))
OURS, THEIRS = torch.tensor([3, 4, 1, 7, 2]), torch.tensor([9, 2, 2, 5, 1])


# --- log-probabilities ----------------------------------------------------------------------------------------------


def test_logps_are_the_log_softmax_gathered_and_summed_under_the_mask():
    sums, counts = sequence_logps(LOGITS, LABELS, MASK)
    logps = LOGITS.log_softmax(-1).gather(-1, LABELS[..., None])[..., 0]
    torch.testing.assert_close(sums, (logps * MASK).sum(1))
    assert counts.tolist() == [4, 2, 2, 6]
    booleans = sequence_logps(LOGITS, LABELS, MASK.bool())
    assert torch.equal(booleans[0], sums) and torch.equal(booleans[1], counts)


def test_what_is_under_no_mask_may_be_anything_and_gets_no_gradient():
    logits = LOGITS.clone().requires_grad_()
    sums, _ = sequence_logps(logits, LABELS.masked_fill(MASK == 0, -100), MASK)
    torch.testing.assert_close(sums, sequence_logps(LOGITS, LABELS, MASK)[0])
    (gradient,) = torch.autograd.grad(sums.sum(), logits)
    assert (gradient[MASK == 0] == 0).all()
    assert (gradient[MASK == 1] != 0).any(-1).all()


def test_half_precision_is_summed_in_single():
    half = LOGITS.bfloat16()
    sums, _ = sequence_logps(half, LABELS, MASK)
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums, sequence_logps(half.float(), LABELS, MASK)[0])


# --- the loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.8, 1.0])
def test_loss_of_each_pair_and_its_mean(alpha):
    each = redi_loss(CHOSEN, REJECTED, OURS, THEIRS, alpha=alpha, reduction="none")
    for i in range(5):
        expected = -float(CHOSEN[i]) / int(OURS[i]) + alpha * float(REJECTED[i]) / int(THEIRS[i])
        assert float(each[i]) == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(redi_loss(CHOSEN, REJECTED, OURS, THEIRS, alpha=alpha), each.mean())


def through_logits(loss, *logits):
    """Gradients of a loss of (chosen, rejected, lengths) with respect to the logits of two batches."""
    pair = [value.clone().requires_grad_() for value in logits]
    (ours, n), (theirs, m) = (sequence_logps(value, LABELS, MASK) for value in pair)
    total = loss(ours, theirs, n, m)
    return total, torch.autograd.grad(total, pair, allow_unused=True, materialize_grads=True)


OTHER = 2 * torch.randn(4, 6, V, generator=DRAW, dtype=torch.float64)


def test_alpha_0_is_length_normalised_nll_of_the_right_traces():
    _, (chosen, rejected) = through_logits(lambda *a: redi_loss(*a, alpha=0.0), LOGITS, OTHER)
    logits = LOGITS.clone().requires_grad_()
    each = [F.cross_entropy(logits[i][MASK[i] == 1], LABELS[i][MASK[i] == 1]) for i in range(4)]
    torch.testing.assert_close(chosen, torch.autograd.grad(torch.stack(each).mean(), logits)[0])
    assert (rejected == 0).all()


def test_alpha_1_with_equal_traces_is_zero_and_so_is_its_gradient():
    logits = LOGITS.clone().requires_grad_()
    sums, counts = sequence_logps(logits, LABELS, MASK)
    loss = redi_loss(sums, sums, counts, counts, alpha=1.0)
    assert loss == 0
    assert (torch.autograd.grad(loss, logits)[0] == 0).all()


def test_linear_in_alpha():
    at = [redi_loss(CHOSEN, REJECTED, OURS, THEIRS, alpha=alpha, reduction="none") for alpha in (0.0, 0.3, 1.0)]
    torch.testing.assert_close(at[1], 0.7 * at[0] + 0.3 * at[2])


def test_every_token_twice_changes_nothing():
    once = redi_loss(CHOSEN, REJECTED, OURS, THEIRS, reduction="none")
    torch.testing.assert_close(redi_loss(2 * CHOSEN, 2 * REJECTED, 2 * OURS, 2 * THEIRS, reduction="none"), once)


def test_the_mean_is_over_traces_not_over_tokens():
    """A wrong trace of a hundred tokens weighs as much as one of a single token."""
    rejected, lengths = torch.tensor([-100.0, -3.0]), torch.tensor([100, 1])
    nothing, one = torch.zeros(2), torch.ones(2, dtype=torch.long)
    assert float(redi_loss(nothing, rejected, one, lengths, alpha=1.0)) == pytest.approx((-1 - 3) / 2)


def test_chosen_coef_and_gate():
    chosen, rejected = CHOSEN / OURS, REJECTED / THEIRS
    found = redi_loss(CHOSEN, REJECTED, OURS, THEIRS, alpha=0.5, chosen_coef=0.3, gate=1.0, reduction="none")
    torch.testing.assert_close(found, -0.3 * chosen + 0.5 * rejected * rejected.exp())
    off = redi_loss(CHOSEN, REJECTED, OURS, THEIRS, gate=0.0)
    assert torch.equal(off, redi_loss(CHOSEN, REJECTED, OURS, THEIRS))


def test_simpo_without_a_margin_tends_to_the_symmetric_loss():
    beta = 1e-4

    def simpo(ours, theirs, n, m):
        return -F.logsigmoid(beta * (ours / n - theirs / m)).mean()

    _, small = through_logits(simpo, LOGITS, OTHER)
    _, symmetric = through_logits(lambda *a: redi_loss(*a, alpha=1.0), LOGITS, OTHER)
    for mine, limit in zip(small, symmetric, strict=True):
        torch.testing.assert_close(mine / (beta / 2), limit, rtol=1e-3, atol=1e-6)


def test_a_collapse_lowers_the_loss():
    """Both traces ever less likely, the wrong ones faster: the loss has no lower bound, so nobody should stop by it."""
    steps = [redi_loss(-t * torch.ones(1), -2 * t * torch.ones(1), *torch.ones(2, 1)) for t in (1.0, 10.0, 1000.0)]
    assert steps[0] > steps[1] > steps[2] < -500


ONES = torch.ones(5, dtype=torch.long)
BAD = {
    "alpha high": (
        lambda: redi_loss(CHOSEN, REJECTED, OURS, THEIRS, alpha=1.1),
        r"alpha is 1\.1, but must be at least 0",
    ),
    "alpha low": (lambda: redi_loss(CHOSEN, REJECTED, OURS, THEIRS, alpha=-0.1), r"alpha is -0\.1, but must be"),
    "empty trace": (
        lambda: redi_loss(CHOSEN, REJECTED, OURS, 0 * ONES),
        "rejected_lengths holds 0, but must be at least 1",
    ),
    "pairs": (
        lambda: redi_loss(CHOSEN, REJECTED[:4], OURS, THEIRS),
        r"rejected_logps has shape \(4,\), but all must be",
    ),
    "lengths": (lambda: redi_loss(CHOSEN, REJECTED, OURS[:, None], THEIRS), r"chosen_lengths has shape \(5, 1\)"),
    "reduction": (
        lambda: redi_loss(CHOSEN, REJECTED, OURS, THEIRS, reduction="sum"),
        "reduction is 'sum', but must be",
    ),
    "vocabulary": (
        lambda: sequence_logps(LOGITS, LABELS + V, MASK),
        "labels under the mask are .*, but must be 0 to 10",
    ),
    "ignored": (lambda: sequence_logps(LOGITS, LABELS * 0 - 100, MASK), "labels under the mask are -100 to -100"),
    "labels": (lambda: sequence_logps(LOGITS, LABELS[:, :5], MASK), r"have shapes \(4, 6, 11\), \(4, 5\) and \(4, 6\)"),
    "mask": (lambda: sequence_logps(LOGITS, LABELS, MASK[:3]), r"\(3, 6\), but must be \(batch, length, vocabulary\)"),
    "settings": (lambda: REDI(alpha=2.0), r"alpha is 2\.0, but must be at least 0 and at most 1"),
    "drop": (lambda: CollapseGuard(drop=0.0), r"drop is 0\.0, but must be greater than 0"),
    "action": (lambda: CollapseGuard(action="panic"), "action is 'panic', but must be one of 'warn', 'stop'"),
    "ratio": (
        lambda: REDITrainer(llama(), None, warmup_ratio=1.0),
        r"ratio is 1\.0, but must be at least 0 and less than 1",
    ),
    "select": (lambda: build_pairs([], select="last"), "select is 'last', but must be one of 'first', 'random'"),
    "verdicts": (
        lambda: build_pairs([Trace("p", "t", ())]),
        "right is empty for the trace 't', but must have a verdict",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_refused(kind):
    call, message = BAD[kind]
    with pytest.raises(InputError, match=message):
        call()


# --- the data -------------------------------------------------------------------------------------------------------

TRACES = [
    Trace("p", "r1", True),
    Trace("q", "r2", (True, np.True_)),
    Trace("p", "w1", False),
    Trace("p", "w2", (True, False)),  # one verifier is not convinced
    Trace("p", "r3", True),
    Trace("s", "w3", False),
]


def test_data_of_both_stages():
    sft, pairs = build_pairs(TRACES)
    assert sft == [("p", "r1"), ("p", "r3"), ("q", "r2")]
    assert pairs == [Pair("p", "r1", "w1"), Pair("p", "r3", "w1")]  # "q" has no wrong trace and "s" no right one
    assert build_pairs([]) == ([], [])


def test_random_choice_is_seeded(global_rng_untouched):
    traces = [Trace("p", f"r{i}", True) for i in range(20)] + [Trace("p", f"w{i}", False) for i in range(5)]
    one, same, other = (build_pairs(traces, select="random", seed=seed)[1] for seed in (0, 0, 1))
    assert one == same != other
    assert len({pair.rejected for pair in one}) > 1


@pytest.fixture(scope="module")
def words():
    return tokenizer()


EXAMPLES = [
    Pair("Compute 3 + 4 * 2 step by step.", "3 + 8 = 11. The answer is 11.", "7 * 2 = 14. The answer is 14."),
    Pair("Compute 1 + 1 step by step.", "2. The answer is 2.", "3. The answer is 3."),
    Pair("Compute 9 - 2 - 3 step by step.", "7 - 3 = 4. The answer is 4.", "9 - 2 = 7. The answer is 7."),
]


def test_encoded_as_the_world_does_it(words):
    asked = text.samples("train", "arithmetic", count=5)
    mine = encode(words, [(sample.prompt, sample.answer) for sample in asked])
    its = text.encode(asked)
    assert all(torch.equal(mine.inputs[name], its.inputs[name]) for name in its.inputs)
    assert torch.equal(mine.targets, its.targets)


def test_completions_end_with_the_end_token_and_prompts_are_not_learned(words):
    data = encode(words, EXAMPLES)
    for side, answer in (("chosen", EXAMPLES[0].chosen), ("rejected", EXAMPLES[0].rejected)):
        ids, labels = (data.inputs[f"{side}_{part}"][0] for part in ("input_ids", "labels"))
        learned = labels[labels != -100]
        assert learned[-1] == words.eos_token_id
        assert words.decode(learned[:-1]) == answer
        assert words.decode(ids, skip_special_tokens=True) == f"{EXAMPLES[0].prompt} {answer}"


def test_what_cannot_be_encoded_is_refused(words):
    with pytest.raises(InputError, match="max_length is 12, but 'Compute .*' and its trace have .* tokens"):
        encode(words, EXAMPLES, max_length=12)
    with pytest.raises(InputError, match="The completion of 'Compute .*' has no token, but must have at least one"):
        encode(words, [(EXAMPLES[0].prompt, "")])
    with pytest.raises(InputError, match="examples is empty, but must have at least one"):
        encode(words, [])
    with pytest.raises(InputError, match="tokenizer has no end token"):
        encode(SimpleNamespace(eos_token_id=None), EXAMPLES)


# --- real language models -------------------------------------------------------------------------------------------

TOKENS = len(vocabulary())


def llama(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return new_llama(width=32, layers=2).eval()


def gpt2():
    """Positions are learned here, so that padding on the left must move them."""
    import transformers

    tiny = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": TOKENS}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**tiny)).eval()


def qwen2():
    import transformers

    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.Qwen2Config(vocab_size=TOKENS, intermediate_size=32, **tiny)
        return transformers.Qwen2ForCausalLM(config).eval()


@pytest.mark.parametrize("build", [llama, gpt2, qwen2])
def test_padding_on_either_side_changes_nothing(words, build):
    model = build()
    losses = {}
    with torch.no_grad():
        for side in ("right", "left"):
            batch = encode(words, EXAMPLES, side=side).inputs
            losses[side] = float(REDI(alpha=0.5)(model, batch))
            wider = {
                name: F.pad(value, (0, 5) if side == "right" else (5, 0), value=-100 if name.endswith("labels") else 0)
                for name, value in batch.items()
            }
            losses[f"{side}, wider"] = float(REDI(alpha=0.5)(model, wider))
        alone = [REDI(alpha=0.5)(model, encode(words, [pair]).inputs) for pair in EXAMPLES]
    losses["alone"] = float(torch.stack(alone).mean())
    assert max(losses.values()) - min(losses.values()) < 1e-5, losses


def test_pairs_of_a_model_are_the_sums_of_its_own_loss(words):
    model = llama()
    with torch.no_grad():
        (chosen, rejected), (ours, theirs) = pair_logps(model, encode(words, EXAMPLES).inputs)
        for i, pair in enumerate(EXAMPLES):
            for logps, counts, answer in ((chosen, ours, pair.chosen), (rejected, theirs, pair.rejected)):
                data = encode(words, [(pair.prompt, answer)])
                mean = model(**data.inputs, labels=data.targets).loss
                assert float(logps[i]) == pytest.approx(-float(mean) * int(counts[i]), rel=1e-4)


class Fixed(torch.nn.Module):
    """Gives the same logits whatever it is asked."""

    def __init__(self, batch, length):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.randn(batch, length, TOKENS, generator=DRAW))

    def forward(self, input_ids, attention_mask, position_ids=None):
        return self.logits


@pytest.mark.parametrize("side", ["right", "left"])
def test_prompts_and_padding_get_no_gradient(words, side):
    """Only the positions before a completion's tokens do."""
    batch = encode(words, EXAMPLES, side=side).inputs
    labels = torch.cat([batch["chosen_labels"], batch["rejected_labels"]])
    model = Fixed(*labels.shape)
    REDI()(model, batch).backward()
    told = F.pad(labels[:, 1:] != -100, (0, 1))
    assert torch.equal((model.logits.grad != 0).any(-1), told)


def test_other_batches_are_refused(tiny_llama):
    with pytest.raises(InputError, match="The batch has no chosen_attention_mask, .* but must be of pairs"):
        REDI()(tiny_llama, {"chosen_input_ids": torch.ones(1, 4, dtype=torch.long)})


def test_one_step_moves_both_traces_the_right_way_and_is_logged(words, global_rng_untouched):
    model, batch = llama(), encode(words, EXAMPLES)
    settings = {"steps": 30, "optimizer": lambda p: torch.optim.AdamW(p, lr=1e-3), "progress": False}
    history = fit(model, batch, REDI(), callbacks=[GradientNorm()], **settings)
    first, last = history.records[0], history.records[-1]
    assert last["margin"] > first["margin"] + 0.5
    assert last["loss"] < first["loss"]
    assert first["loss"] == pytest.approx(-first["chosen_logp"] + 0.8 * first["rejected_logp"], rel=1e-5)
    assert first["margin"] == pytest.approx(first["chosen_logp"] - first["rejected_logp"], abs=1e-6)
    assert first["grad_norm"] > 0


def test_trainer_runs_both_stages(words, global_rng_untouched):
    model = llama()
    trainer = REDITrainer(model, words, alpha=0.8, lr=1e-4, sft_lr=1e-2)
    sft, pairs = build_pairs(
        [
            t
            for pair in EXAMPLES
            for t in (Trace(pair.prompt, pair.chosen, True), Trace(pair.prompt, pair.rejected, False))
        ]
    )
    first = trainer.fit_sft(sft, epochs=8, batch_size=2, progress=False)
    second = trainer.fit_redi(pairs, batch_size=1, progress=False)
    assert len(first) == 16 and first["loss"][-1] < 0.8 * first["loss"][0]
    assert len(second) == 3  # one epoch
    assert {"chosen_logp", "rejected_logp", "margin", "grad_norm"} <= second.records[0].keys()
    assert second["lr"][-1] < second["lr"][0] <= 1e-4


def test_trainer_takes_a_collate_function(words):
    seen = []

    def collate(examples):
        seen.append(examples)
        return encode(words, examples)

    one, two = llama(), llama()
    REDITrainer(one, collate, lr=1e-3).fit_redi(EXAMPLES, progress=False)
    REDITrainer(two, words, lr=1e-3).fit_redi(EXAMPLES, progress=False)
    assert seen == [EXAMPLES]
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_stage_1_is_next_token_cross_entropy(words):
    one, two = llama(), llama()
    sft = [(pair.prompt, pair.chosen) for pair in EXAMPLES]
    REDITrainer(one, words, sft_lr=1e-3, warmup_ratio=0.0).fit_sft(sft, epochs=1, progress=False)
    optimizer = lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=1e-4)  # noqa: E731
    fit(two, encode(words, sft), next_token, epochs=1, optimizer=optimizer, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


# --- the guard ------------------------------------------------------------------------------------------------------


def test_guard_sees_a_fall_below_the_start_and_warns_once():
    guard = CollapseGuard(drop=0.5, window=2)
    values = [-0.2, -0.4, -0.1, -0.3, -0.7, -1.0, -2.0]
    with pytest.warns(UserWarning, match="fell from -0.300 to -0.850 a token by step 6: lower alpha") as caught:
        verdicts = [guard.update(step, value) for step, value in enumerate(values, start=1)]
    assert len(caught) == 1
    assert verdicts == [False] * 5 + [True] * 2
    assert guard.start == pytest.approx(-0.3) and guard.collapsed == 6


def test_guard_is_silent_while_right_traces_hold():
    guard = CollapseGuard(drop=0.5, window=3)
    assert not any(guard.update(step, -0.5 - 0.01 * step) for step in range(1, 40))


def test_guard_stops_a_run_that_collapses_and_alpha_0_does_not(words):
    settings = {"steps": 60, "optimizer": lambda p: torch.optim.AdamW(p, lr=1e-2), "progress": False}
    base = llama()
    fit(base, encode(words, [(p.prompt, p.chosen) for p in EXAMPLES]), next_token, **settings)
    data = encode(words, EXAMPLES)
    guard = CollapseGuard(drop=0.5, window=2, action="stop")
    high = {**settings, "optimizer": lambda p: torch.optim.SGD(p, lr=3.0)}
    with pytest.warns(UserWarning, match="lower alpha or the learning rate"):
        history = fit(copy.deepcopy(base), data, REDI(alpha=1.0), callbacks=[guard], **high)
    assert guard.collapsed is not None and len(history) < 60
    calm = CollapseGuard(drop=0.5, window=2, action="stop")
    assert len(fit(copy.deepcopy(base), data, REDI(alpha=0.0), callbacks=[calm], **settings)) == 60


def test_guard_needs_the_log(tiny_llama):
    data = torch.ones(2, 5, dtype=torch.long)
    with pytest.raises(InputError, match="The steps have no chosen_logp, but CollapseGuard needs what"):
        fit(tiny_llama, TensorData({"input_ids": data}, data), next_token, steps=3, callbacks=[CollapseGuard()])


class Killed(Exception):
    pass


class KillAt(Callback):
    def __init__(self, step):
        self.at = step

    def on_step(self, run):
        if run.step == self.at:
            raise Killed


def test_a_run_that_was_killed_resumes_with_its_guard(words, tmp_path):
    data = encode(words, EXAMPLES)

    def run(folder, kill=None):
        guard, model = CollapseGuard(window=3), llama()
        try:
            checkpoint = Checkpoint(tmp_path / folder, every=2)
            fit(model, data, REDI(), steps=8, batch_size=1, callbacks=[guard, KillAt(kill)], checkpoint=checkpoint)
        except Killed:
            pass
        return guard, model

    whole, model = run("whole")
    run("killed", kill=5)
    resumed, same = run("killed")
    assert resumed.state_dict() == whole.state_dict()
    assert whole.start is not None
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
