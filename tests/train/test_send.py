"""SenD: sensitivity over checkpoints, the EigenScores, and indices that are dropped in train mode only."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from retouch.core.data import TensorData
from retouch.core.errors import InputError
from retouch.core.features import capture
from retouch.core.loop import Callback, Checkpoint, fit
from retouch.core.objectives import next_token
from retouch.train.send import (
    SensitivityDropout,
    blocks_of,
    chebyshev_log_coefficients,
    chebyshev_moments,
    efficient_eigenscore,
    eigenscore,
    embedding_sensitivity,
    sensitive_indices,
    sentence_embedding,
)

DRAW = torch.Generator().manual_seed(0)
TOKENS = torch.randint(1, 40, (12, 6), generator=DRAW)
TEXTS = TensorData({"input_ids": TOKENS}, TOKENS)
TRACKING = TensorData({"input_ids": TOKENS[:4]})


def snapshots(c=3, n=5, d=8):
    return torch.randn(c, n, d, generator=DRAW, dtype=torch.float64)


def test_golden(golden):
    case = golden("send")
    recorded = torch.tensor(case.in_snapshots)
    case.close("out_sensitivity_per_sample", embedding_sensitivity(recorded, reduction="none"))
    case.close("out_sensitivity", embedding_sensitivity(recorded))
    found = sensitive_indices(torch.tensor(case.out_sensitivity), fraction=float(case.param_fraction))
    assert sorted(found.tolist()) == sorted(case.out_indices.tolist())
    case.close("out_eigenscore", eigenscore(torch.tensor(case.in_embeddings), alpha=float(case.param_alpha)))
    moments = chebyshev_moments(torch.tensor(case.in_scaled), torch.tensor(case.in_probes), num_moments=10)
    case.close("out_moments", moments)
    np.testing.assert_allclose(
        chebyshev_log_coefficients(5, mode="official")[1:].numpy(), case.out_official_c, rtol=1e-5
    )


# --- sensitivity ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_embeddings_ignore_padding_on_either_side(side):
    hidden = torch.randn(2, 5, 3, generator=DRAW)
    lengths = (5, 3)
    mask, padded = torch.zeros(2, 5), torch.full((2, 5, 3), 99.0)
    for row, length in enumerate(lengths):
        where = slice(5 - length, 5) if side == "left" else slice(0, length)
        mask[row, where], padded[row, where] = 1, hidden[row, :length]
    expected = torch.stack([(hidden[r, :n].mean(0) + hidden[r, n - 1]) / 2 for r, n in enumerate(lengths)])
    torch.testing.assert_close(sentence_embedding(padded, mask), expected)
    assert torch.equal(sentence_embedding(padded, mask, pooling="second_last_token"), padded[:, -2])


def test_what_does_not_change_is_not_sensitive():
    assert not embedding_sensitivity(snapshots()[:1].expand(4, -1, -1)).any()


def test_scale_shift_and_two_checkpoints():
    some = snapshots()
    torch.testing.assert_close(embedding_sensitivity(3 * some), 27 * embedding_sensitivity(some))
    torch.testing.assert_close(embedding_sensitivity(some + 5), embedding_sensitivity(some))
    a, b = some[0], some[1]
    expected = (a - b).square() / 4 * (a - b).abs()
    torch.testing.assert_close(embedding_sensitivity(some[:2], reduction="none"), expected)


def test_it_measures_wavering_over_training_and_not_spread_across_texts():
    some = torch.zeros(3, 4, 2, dtype=torch.float64)
    some[:, :, 0] = torch.tensor([0.0, 1.0, 0.0])[:, None]  # wavers alike for all texts
    some[:, :, 1] = torch.arange(4.0)  # differs between texts, and stays
    assert sensitive_indices(embedding_sensitivity(some), fraction=0.5).tolist() == [0]
    assert embedding_sensitivity(some)[1] == 0


def test_shares_of_indices():
    values = torch.tensor([1.0, 5.0, 3.0, 4.0, 2.0])
    assert sensitive_indices(values, fraction=0.0).tolist() == []
    assert sensitive_indices(values, fraction=0.5).tolist() == [1, 3]
    assert sensitive_indices(values, fraction=1.0).tolist() == [1, 3, 2, 4, 0]


# --- EigenScore -----------------------------------------------------------------------------------------------------


def test_equal_answers_have_the_lowest_score():
    answer = torch.randn(1, 16, generator=DRAW, dtype=torch.float64)
    same = eigenscore(answer.expand(5, -1))
    centred = answer - answer.mean()
    expected = (4 * math.log(1e-3) + math.log(5 * float(centred.square().sum()) + 1e-3)) / 5
    assert float(same) == pytest.approx(expected, rel=1e-6)
    assert eigenscore(torch.randn(5, 16, generator=DRAW, dtype=torch.float64)) > same


def test_the_score_is_a_log_determinant_and_rotations_of_the_centred_answers_leave_it():
    embeddings = torch.randn(6, 10, generator=DRAW, dtype=torch.float64)
    centred = embeddings - embeddings.mean(1, keepdim=True)
    gram = centred @ centred.T + 1e-3 * torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(eigenscore(embeddings), torch.linalg.slogdet(gram)[1] / 6)
    mixed, _ = torch.linalg.qr(torch.randn(6, 6, generator=DRAW, dtype=torch.float64))
    torch.testing.assert_close(eigenscore(mixed @ embeddings), eigenscore(embeddings))


def test_coefficients_have_their_closed_forms():
    found = chebyshev_log_coefficients(40)
    assert found.shape == (41,)
    assert float(found[0]) == pytest.approx(-math.log(2) / 2, rel=1e-12)
    assert float(found[1]) == pytest.approx(2 / math.pi * (math.log(2) - 1), rel=1e-10)
    for k in range(1, 21):
        assert float(found[2 * k]) == pytest.approx((-1) ** (k + 1) / (2 * k), rel=1e-8)
    theta = (np.arange(2_000_000) + 0.5) / 2_000_000 * math.pi / 2
    for m in (3, 7):  # odd ones against a plain sum
        plain = np.mean(np.log(np.cos(theta)) * np.cos(m * theta))
        assert float(found[m]) == pytest.approx(plain, abs=1e-6)
    assert chebyshev_log_coefficients(3, mode="official")[0] == 0


def scaled(k=6, d=20):
    matrix = torch.randn(d, k, generator=DRAW, dtype=torch.float64)
    return matrix / torch.linalg.matrix_norm(matrix, 2)


def test_moments_are_traces_with_all_unit_probes():
    matrix = scaled()
    eigenvalues = torch.linalg.eigvalsh(matrix.T @ matrix)
    moments = chebyshev_moments(matrix, math.sqrt(6) * torch.eye(6, dtype=torch.float64), num_moments=12)
    expected = torch.stack([torch.cos(m * torch.arccos(eigenvalues.clamp(-1, 1))).mean() for m in range(13)])
    torch.testing.assert_close(moments, expected, rtol=1e-6, atol=1e-8)
    draws = torch.randn(6, 20_000, generator=DRAW, dtype=torch.float64)
    assert float(chebyshev_moments(matrix, draws, num_moments=0)[0]) == pytest.approx(1, abs=0.02)


def test_the_series_tends_to_the_mean_logarithm_for_spectra_away_from_zero():
    values = torch.linspace(0.3, 1.0, 8, dtype=torch.float64)
    matrix, probes = torch.diag(values.sqrt()), math.sqrt(8) * torch.eye(8, dtype=torch.float64)
    errors = []
    for moments in (5, 20, 80):
        estimate = chebyshev_moments(matrix, probes, num_moments=moments) @ chebyshev_log_coefficients(moments)
        errors.append(abs(float(estimate - values.log().mean())))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.02


def correlation(k, moments, exact_traces):
    draw, ours, theirs = torch.Generator().manual_seed(1), [], []
    for _ in range(60):
        rank = int(torch.randint(1, 6, (), generator=draw))
        base = torch.randn(k, rank, generator=draw) @ torch.randn(rank, 64, generator=draw)
        embeddings = base + 2 * float(torch.rand((), generator=draw)) * torch.randn(k, 64, generator=draw)
        spread = embeddings.std(0, correction=0)
        standard = ((embeddings - embeddings.mean(0)) / spread).double()
        matrix = (standard / torch.linalg.matrix_norm(standard, 2)).T
        theirs.append(float((torch.linalg.eigvalsh(matrix.T @ matrix).clamp_min(0) + 1e-3).log().mean()))
        if exact_traces:
            probes = math.sqrt(k) * torch.eye(k, dtype=torch.float64)
            moment = chebyshev_moments(matrix, probes, num_moments=moments)
            ours.append(float(moment @ chebyshev_log_coefficients(moments)))
        else:
            ours.append(float(efficient_eigenscore(embeddings, num_moments=moments, generator=draw)))
    return float(np.corrcoef(ours, theirs)[0, 1])


def test_the_estimate_goes_with_the_exact_score_the_better_the_more_moments():
    """It depends on the spectra: where noise is weaker than here, twenty moments do not tell answers apart at all."""
    few, many = (correlation(10, moments, exact_traces=True) for moments in (20, 100))
    assert 0.5 < few < many
    assert many > 0.85
    assert correlation(10, 20, exact_traces=False) > 0.3


def test_the_estimate_is_seeded_and_takes_constant_features(global_rng_untouched):
    embeddings = torch.randn(6, 30, generator=DRAW)
    embeddings[:, 3] = 1.5
    one, two = (efficient_eigenscore(embeddings, generator=torch.Generator().manual_seed(2)) for _ in range(2))
    assert one == two
    assert torch.isfinite(one)
    assert torch.isfinite(efficient_eigenscore(torch.ones(4, 5)))
    assert efficient_eigenscore(embeddings, mode="official") != one


# --- dropping -------------------------------------------------------------------------------------------------------


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(vocab_size=40, pad_token_id=0, max_position_embeddings=32, **settings))


def neox():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    settings = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=40, max_position_embeddings=32, **settings))


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=3, n_head=2))


MODELS = {"llama": llama, "neox": neox, "gpt2": gpt2}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


def ready(model, **settings):
    """A callback that drops indices 1, 5 and 7 at present."""
    send = SensitivityDropout(model, fraction=0.2, **settings)
    send.indices, send.remaining = torch.tensor([1, 5, 7]), 2
    return send


def test_dropped_entries_are_zero_in_train_mode_and_nothing_changes_in_eval_mode(model):
    before = model.eval()(input_ids=TOKENS).logits
    send = ready(model)
    assert torch.equal(model(input_ids=TOKENS).logits, before)
    name, blocks = blocks_of(model)
    with capture(model, [f"{name}.2"], side="input") as seen:  # what the last block is given is hidden_states[-2]
        logits = model.train()(input_ids=TOKENS).logits
    hidden = seen[f"{name}.2"]
    assert not hidden[..., [1, 5, 7]].any()
    assert hidden[..., [0, 2, 3, 4, 6]].any()
    assert not torch.equal(logits, before)
    send.close()
    assert not blocks[1]._forward_hooks
    model.eval()
    assert torch.equal(model(input_ids=TOKENS).logits, before)


def test_no_gradient_goes_through_dropped_entries(model):
    ready(model)
    name, _ = blocks_of(model)
    model.train()
    with capture(model, [f"{name}.0"]) as seen, capture(model, [f"{name}.1"]) as after:
        model(input_ids=TOKENS).logits.square().mean().backward(retain_graph=True)
    del seen, after
    mlps = {"llama": "mlp.down_proj", "neox": "mlp.dense_4h_to_h", "gpt2": "mlp.c_proj"}
    block = blocks_of(model)[1][1]
    outer = next(block.get_submodule(path) for path in mlps.values() if path in dict(block.named_modules()))
    rows = outer.weight.grad if isinstance(outer, nn.Linear) else outer.weight.grad.T
    assert not rows[[1, 5, 7]].any()
    assert rows[[0, 2, 3]].any()


def sgd(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


def test_output_rows_stay_zero_under_adamw(model):
    send = ready(model, mode="output_weights", tracking=TRACKING)
    send.on_epoch_begin(model)
    seen = []

    class Watch(Callback):
        def on_step(self, run):
            outer = send._projections()[-1]
            rows = outer.weight if isinstance(outer, nn.Linear) else outer.weight.T
            seen.append(float(rows[[1, 5, 7]].abs().sum()))
            assert rows[[0, 2]].any()

    fit(model, TEXTS, next_token, steps=4, batch_size=12, optimizer=sgd, callbacks=[send, Watch()])
    assert seen[0] == 0.0  # one epoch a step: dropped for one more checkpoint
    assert send._projections()[-1].weight.shape


def test_output_rows_stay_zero_in_a_loop_of_ones_own_though_momentum_would_move_them(model):
    send = SensitivityDropout(model, mode="output_weights")
    outer, optimizer = send._projections()[-1], sgd(model.parameters())

    def rows():
        weight = outer.weight if isinstance(outer, nn.Linear) else outer.weight.T
        return [weight[[1, 5, 7]], *([] if outer.bias is None else [outer.bias[[1, 5, 7]]])]

    for step in range(4):
        if step == 2:
            send.indices, send.remaining = torch.tensor([1, 5, 7]), 2
            send.on_epoch_begin(model)
        optimizer.zero_grad()
        model.train()(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        assert all(part.any() for part in rows())  # moved by this step, if by momentum alone
        send.hold(optimizer)
        assert any(part.any() for part in rows()) == (step < 2)
    moments = optimizer.state[outer.weight]["exp_avg"]
    assert not (moments if isinstance(outer, nn.Linear) else moments.T)[[1, 5, 7]].any()


@pytest.mark.parametrize("targets", [False, True])
def test_padding_is_left_out_of_what_tokenizers_give(targets):
    from transformers import BatchEncoding

    model, padded = llama(), TOKENS[:4].clone()
    padded[:, 4:] = 0
    mask = (padded != 0).long()
    given = BatchEncoding({"input_ids": padded, "attention_mask": mask})
    send = SensitivityDropout(model)
    send.on_epoch_end(model, [(given, padded) if targets else given])
    hidden = model.eval()(**given, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(send.snapshots[0], sentence_embedding(hidden.detach(), mask))


def test_official_edit_cuts_units_of_the_inner_width(model):
    send = ready(model, mode="official_weights")
    before = copy.deepcopy(model.state_dict())
    send.on_epoch_begin(model)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(".1.mlp." in name for name in changed)


def test_protocol_of_windows_and_drops(model):
    send, drops, found = SensitivityDropout(model, window=3, drop_epochs=2, fraction=0.25), [], []
    draw = torch.Generator().manual_seed(0)
    for _ in range(8):
        send.on_epoch_begin(model)
        drops.append(send.dropping)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.02 * torch.randn(p.shape, generator=draw))
        send.on_epoch_end(model, [TRACKING[:]])
        found.append(sorted(send.indices.tolist()))
    assert drops == [False] * 3 + [True] * 5
    assert len(found[2]) == 4
    assert found[2] == found[3] and found[4] == found[5]  # recomputed after two checkpoints of dropping
    assert len(send.snapshots) == 3


def test_indices_are_those_of_the_recorded_embeddings():
    model = llama()
    send = SensitivityDropout(model, window=2, fraction=0.5)
    states = []
    for scale in (1.0, 1.3):
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight.mul_(scale)
        hidden = model.eval()(input_ids=TOKENS[:4], output_hidden_states=True).hidden_states[-2]
        states.append(sentence_embedding(hidden, torch.ones(4, 6)))
        send.on_epoch_end(model, [TRACKING[:]])
    torch.testing.assert_close(torch.stack(send.snapshots), torch.stack(states))
    expected = sensitive_indices(embedding_sensitivity(torch.stack(states)), fraction=0.5)
    assert sorted(send.indices.tolist()) == sorted(expected.tolist())


def test_random_indices_of_the_same_number_are_a_control(global_rng_untouched):
    one, two = (SensitivityDropout(llama(), window=2, random_seed=1) for _ in range(2))
    for send in (one, two):
        for _ in range(2):
            send.on_epoch_end(send_model := llama(), [TRACKING[:]])
        assert len(send.indices) == 3
        del send_model
    assert torch.equal(one.indices, two.indices)


@pytest.mark.parametrize("every_n_steps", [None, 2])
def test_a_stopped_run_goes_on_exactly(tmp_path, every_n_steps, global_rng_untouched):
    settings = {"window": 2, "drop_epochs": 2, "tracking": TRACKING, "every_n_steps": every_n_steps}

    class Stop(Callback):
        def __init__(self, at):
            self.at = at

        def on_step(self, run):
            if run.step == self.at:
                raise KeyboardInterrupt

    def train(model, at, **more):
        send = SensitivityDropout(model, **settings)
        budget = {"steps": 12, "batch_size": 6, "optimizer": sgd}
        fit(model, TEXTS, next_token, callbacks=[send, Stop(at)], **budget, **more)
        return send

    whole, resumed = llama(), llama()
    expected = train(whole, None)
    with pytest.raises(KeyboardInterrupt):
        train(llama(), 9, checkpoint=Checkpoint(tmp_path, 2))
    found = train(resumed, None, checkpoint=Checkpoint(tmp_path, 2))
    assert torch.equal(found.indices, expected.indices)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


BAD = {
    "window": (lambda: SensitivityDropout(llama(), window=1), "window is 1, but must be at least 2"),
    "fraction": (lambda: SensitivityDropout(llama(), fraction=1.2), r"fraction is 1\.2, but must be at least 0"),
    "layer": (lambda: SensitivityDropout(llama(), layer=5), "layer is 5, but must be between -3 and 2"),
    "mode": (lambda: SensitivityDropout(llama(), mode="weights"), "mode is 'weights', but must be one of"),
    "no blocks": (lambda: SensitivityDropout(nn.Linear(2, 2)), "Linear has no ModuleList of blocks"),
    "snapshots": (lambda: embedding_sensitivity(torch.zeros(1, 2, 3)), r"snapshots has shape \(1, 2, 3\), but must be"),
    "nan": (
        lambda: embedding_sensitivity(torch.full((2, 2, 3), torch.nan)),
        "snapshots holds values that are not finite",
    ),
    "one answer": (lambda: eigenscore(torch.zeros(1, 5)), r"embeddings has shape \(1, 5\), but must be \(answers >= 2"),
    "alpha": (lambda: eigenscore(torch.zeros(3, 5), alpha=0), "alpha is 0, but must be greater than 0"),
    "probes": (lambda: chebyshev_moments(scaled(), torch.zeros(5, 2), num_moments=3), r"probes has shape \(5, 2\)"),
    "pooling": (lambda: sentence_embedding(torch.zeros(1, 2, 3), torch.ones(1, 2), pooling="max"), "pooling is 'max'"),
    "no tokens": (lambda: sentence_embedding(torch.zeros(1, 2, 3), torch.zeros(1, 2)), "a row without tokens"),
    "mask": (lambda: sentence_embedding(torch.zeros(1, 2, 3), torch.zeros(1, 3)), r"attention_mask has shape \(1, 3\)"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_refused(kind):
    call, message = BAD[kind]
    with pytest.raises(InputError, match=message):
        call()


def test_fit_needs_tracking_texts():
    model = llama()
    with pytest.raises(InputError, match="tracking is None, but must be texts to watch"):
        fit(model, TEXTS, next_token, steps=1, callbacks=[SensitivityDropout(model)])
