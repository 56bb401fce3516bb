"""CLOOB: the authors' numbers, closed forms and limits of both parts, and training of a real CLIP."""

import math
import os
import subprocess
import sys

import _cloob_job as job
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from retouch.core.checkpoints import load_state
from retouch.core.data import TensorData
from retouch.core.errors import InputError
from retouch.core.loop import Checkpoint, fit
from retouch.train.cloob import (
    CLOOB,
    CLOOBLoss,
    cloob_loss,
    effective_rank,
    embeddings_of,
    gathered,
    hopfield_retrieval,
    info_nce_loss,
    infoloob_loss,
    retrievals,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def unit(n, e=8, seed=0, dtype=torch.float64):
    return F.normalize(torch.randn(n, e, generator=seeded(seed), dtype=dtype), dim=1)


X, Y = unit(10, seed=1), F.normalize(unit(10, seed=1) + 0.7 * unit(10, seed=2), dim=1)


@pytest.mark.parametrize("setting", ["a", "b"])
def test_golden(golden, setting):
    case = golden("cloob")
    beta, inv_tau = (float(getattr(case, f"param_{name}_{setting}")) for name in ("beta", "inv_tau"))
    images, texts = (torch.tensor(part, requires_grad=True) for part in (case.in_image_embeds, case.in_text_embeds))
    loss = cloob_loss(images, texts, inv_tau=inv_tau, beta=beta)
    loss.backward()
    case.close(f"out_loss_{setting}", loss)
    case.close(f"out_image_grad_{setting}", images.grad)
    case.close(f"out_text_grad_{setting}", texts.grad)
    found = {
        "image_image": (images, images),
        "text_text": (texts, texts),
        "image_from_text": (texts, images),
        "text_from_image": (images, texts),
    }
    for name, (state, stored) in found.items():
        case.close(f"out_{name}_{setting}", hopfield_retrieval(state, stored, beta=beta))
    case.close(f"out_infoloob_plain_{setting}", infoloob_loss(images, texts, inv_tau=inv_tau))


# --- InfoLOOB -------------------------------------------------------------------------------------------------------


def of_similarities(similarities, loss=infoloob_loss, **settings):
    """The loss of given similarities, and its gradient on them."""
    s = similarities.clone().double().requires_grad_()
    value = loss(s, torch.eye(len(s), dtype=torch.float64), **settings)
    value.backward()
    return value.detach(), s.grad


def test_two_pairs_in_closed_form():
    s = torch.tensor([[0.9, -0.2], [0.4, 0.7]])
    for inv_tau in (1.0, 30.0):
        loss, _ = of_similarities(s, inv_tau=inv_tau)
        assert float(loss) == pytest.approx(-(0.9 + 0.7) / 2 + (-0.2 + 0.4) / 2, rel=1e-6)
        raw, _ = of_similarities(s, inv_tau=inv_tau, scale_by_tau=False)
        assert float(raw) == pytest.approx(inv_tau * float(loss))


@pytest.mark.parametrize("inv_tau", [1.0, 14.3, 100.0])
def test_infoloob_does_not_saturate_and_infonce_does(inv_tau):
    told_apart = 2 * torch.eye(6) - 1  # each pair at 1, all others at -1
    for s in (told_apart, torch.rand(6, 6, generator=seeded())):
        gradient = of_similarities(s, inv_tau=inv_tau)[1].diagonal()
        torch.testing.assert_close(gradient, torch.full_like(gradient, -1 / 6), rtol=1e-12, atol=0)

    def nce(anchors, partners):
        return F.cross_entropy(inv_tau * anchors @ partners.T, torch.arange(len(anchors))) / inv_tau

    saturated = of_similarities(told_apart, nce)[1].diagonal().abs().max()
    assert saturated <= 5 * math.exp(-2 * inv_tau) / 6 * (1 + 1e-9) + 1e-15


def test_infonce_is_the_softplus_of_infoloob():
    for inv_tau in (1.0, 30.0):
        anchors, partners = X, Y
        logits = inv_tau * anchors @ partners.T
        for i in range(10):
            others = torch.arange(10) != i
            loob = torch.logsumexp(logits[i, others], 0) - logits[i, i]
            nce = F.cross_entropy(logits[i : i + 1], torch.tensor([i]))
            torch.testing.assert_close(nce, F.softplus(loob))
        rows = [torch.logsumexp(logits[i, torch.arange(10) != i], 0) - logits[i, i] for i in range(10)]
        expected = torch.stack(rows).mean()
        torch.testing.assert_close(infoloob_loss(X, Y, inv_tau=inv_tau, scale_by_tau=False), expected)
        torch.testing.assert_close(infoloob_loss(X, Y, inv_tau=inv_tau), expected / inv_tau)


def test_infonce_is_clips_own_loss():
    clip, batch = tiny_clip(), pairs(6)[torch.arange(6)]
    output = clip(**batch, return_loss=True)
    found = info_nce_loss(output.image_embeds, output.text_embeds, inv_tau=clip.logit_scale.exp())
    torch.testing.assert_close(found, output.loss)


def test_negatives_can_be_left_out():
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 4, 4])
    allowed = labels[:, None] != labels
    found = infoloob_loss(X, Y, inv_tau=5.0, negatives_mask=allowed, scale_by_tau=False)
    logits = 5.0 * X @ Y.T
    rows = [torch.logsumexp(logits[i][allowed[i]], 0) - logits[i, i] for i in range(10)]
    torch.testing.assert_close(found, torch.stack(rows).mean())
    everything = torch.ones(10, 10, dtype=torch.bool)  # the pair itself is none of its negatives even so
    torch.testing.assert_close(infoloob_loss(X, Y, negatives_mask=everything), infoloob_loss(X, Y))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    images, texts = (part.to(dtype).requires_grad_() for part in (X, Y))
    for inv_tau in (30.0, 5000.0):  # -1000 for the pair itself would not be low enough for the second
        loss = cloob_loss(images, texts, inv_tau=inv_tau)
        torch.testing.assert_close(loss.double(), cloob_loss(X, Y, inv_tau=inv_tau), rtol=0.02, atol=0.02)
        loss.backward()
        assert loss.dtype == torch.float32
        assert images.grad.isfinite().all()
        assert texts.grad.isfinite().all()


# --- retrieval ------------------------------------------------------------------------------------------------------


def test_small_beta_retrieves_the_mean_of_all():
    mean = F.normalize(X.mean(0), dim=0).expand(10, -1)
    torch.testing.assert_close(hopfield_retrieval(Y, X, beta=1e-9), mean)


def test_large_beta_retrieves_the_nearest():
    xx, yx, yy, xy = retrievals(X, Y, beta=1e6)
    torch.testing.assert_close(xx, X)
    torch.testing.assert_close(yy, Y)
    nearest_image, nearest_text = X[(Y @ X.T).argmax(1)], Y[(X @ Y.T).argmax(1)]
    torch.testing.assert_close(yx, nearest_image)
    torch.testing.assert_close(xy, nearest_text)
    limit = infoloob_loss(X, nearest_image) + infoloob_loss(Y, nearest_text)
    torch.testing.assert_close(cloob_loss(X, Y, beta=1e6), limit)


def test_the_four_retrievals_are_those_of_the_function():
    pairs = ((X, X), (Y, X), (Y, Y), (X, Y))
    for found, (state, stored) in zip(retrievals(X, Y, beta=8.0), pairs, strict=True):
        torch.testing.assert_close(found, hopfield_retrieval(state, stored))
        torch.testing.assert_close(found.norm(dim=1), torch.ones(10, dtype=torch.float64))
        fused = F.scaled_dot_product_attention(state[None], stored[None], stored[None], scale=8.0)[0]
        torch.testing.assert_close(hopfield_retrieval(state, stored, normalize=False), fused)


def test_one_pattern_and_one_feature_keep_their_form():
    assert hopfield_retrieval(unit(1), unit(1)).shape == (1, 8)
    assert hopfield_retrieval(unit(3, 1), unit(5, 1)).shape == (3, 1)
    assert hopfield_retrieval(X[:4], Y).shape == (4, 8)
    assert cloob_loss(unit(3, 1), unit(3, 1)).isfinite()


def test_nothing_is_learned_unless_asked_for():
    assert not any(p.requires_grad for p in CLOOBLoss().parameters())
    assert not X.requires_grad
    assert not hopfield_retrieval(X, Y).requires_grad


def test_gradients_flow_through_states_and_what_is_stored():
    for leaf, other in ((0, 1), (1, 0)):
        parts = [X[:5].clone(), Y[5:].clone()]
        parts[leaf].requires_grad_()
        hopfield_retrieval(parts[0], parts[1], beta=2.0).square()[:, 0].sum().backward()
        assert parts[leaf].grad.abs().sum() > 0
        assert parts[other].grad is None
    images, texts = X[:4].clone().requires_grad_(), Y[:4].clone().requires_grad_()

    def normalised(x, y):
        return cloob_loss(F.normalize(x, dim=1), F.normalize(y, dim=1), inv_tau=3.0, beta=2.0)

    assert torch.autograd.gradcheck(normalised, (images, texts))


# --- the whole ------------------------------------------------------------------------------------------------------


def test_rotations_and_orders_do_not_matter_and_modalities_are_alike():
    turn = torch.linalg.qr(torch.randn(8, 8, generator=seeded(), dtype=torch.float64)).Q
    order = torch.randperm(10, generator=seeded())
    expected = cloob_loss(X, Y)
    torch.testing.assert_close(cloob_loss(X @ turn, Y @ turn), expected)
    torch.testing.assert_close(cloob_loss(X[order], Y[order]), expected)
    torch.testing.assert_close(cloob_loss(Y, X), expected)
    assert abs(float(cloob_loss(X, Y[order]) - expected)) > 1e-3


def test_it_is_the_sum_of_both_sides_and_not_halved():
    xx, yx, yy, xy = retrievals(X, Y)
    both = infoloob_loss(xx, yx, inv_tau=12.0) + infoloob_loss(yy, xy, inv_tau=12.0)
    torch.testing.assert_close(cloob_loss(X, Y, inv_tau=12.0), both)


def test_the_module_is_the_function():
    module = CLOOBLoss(inv_tau=14.3, beta=5.0).double()
    torch.testing.assert_close(module(X, Y), cloob_loss(X, Y, inv_tau=14.3, beta=5.0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(CLOOBLoss(gather=True)(X, Y), CLOOBLoss()(X, Y))  # one process has it all
    assert gathered(X) is X


def test_a_learned_temperature_drifts_up_and_is_held_at_its_bound():
    module = CLOOBLoss(inv_tau=20.0, learn_inv_tau=True, max_inv_tau=25.0)
    optimizer = torch.optim.SGD(module.parameters(), lr=20.0)
    seen = []
    for _ in range(30):
        optimizer.zero_grad()
        module(X, Y).backward()
        seen.append(float(module.inv_tau.detach()))
        optimizer.step()
    assert seen[0] == pytest.approx(20.0)
    assert seen[0] < seen[3] <= max(seen) <= 25.0 * (1 + 1e-6)
    assert seen[-1] == pytest.approx(25.0)
    assert module.log_inv_tau.grad.abs() > 0  # it may come back
    fixed = CLOOBLoss(inv_tau=20.0)
    fixed(X.clone().requires_grad_(), Y).backward()
    assert fixed.log_inv_tau.grad is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cloob_loss(X[:1], Y[:1]), "image_embeds has 1 rows, but must have at least 2"),
        (lambda: infoloob_loss(X[:1], Y[:1]), "anchors has 1 rows, but must have at least 2"),
        (lambda: cloob_loss(X, Y[:5]), r"image_embeds has shape \(10, 8\) and text_embeds \(5, 8\), but both must"),
        (lambda: cloob_loss(X, 2 * Y), "text_embeds has a row of length 2, but must be normalised to length 1"),
        (lambda: cloob_loss(0 * X, Y), "image_embeds has a row of length 0, but must be normalised"),
        (lambda: cloob_loss(X * math.nan, Y), "image_embeds has a row of length nan, but must be normalised"),
        (lambda: CLOOBLoss()(1.2 * X, Y), r"image_embeds has a row of length 1\.2, but must be normalised"),
        (lambda: cloob_loss(X, Y, beta=0.0), r"beta is 0\.0, but must be greater than 0"),
        (lambda: hopfield_retrieval(X, Y, beta=-1.0), r"beta is -1\.0, but must be greater than 0"),
        (lambda: hopfield_retrieval(X, Y[:, :4]), r"state has shape \(10, 8\) and stored \(10, 4\), but they must"),
        (lambda: hopfield_retrieval(X, Y[:0]), r"stored \(0, 8\), but they must be"),
        (lambda: cloob_loss(X, Y, inv_tau=0.0), r"inv_tau is 0\.0, but must be greater than 0"),
        (lambda: infoloob_loss(X, Y, inv_tau=torch.tensor(-1.0)), r"inv_tau is -1\.0, but must be greater than 0"),
        (lambda: info_nce_loss(X, Y, inv_tau=-2.0), r"inv_tau is -2\.0, but must be greater than 0"),
        (lambda: infoloob_loss(X, Y, negatives_mask=torch.ones(3, 3)), r"negatives_mask has shape \(3, 3\), but must"),
        (lambda: infoloob_loss(X, Y, negatives_mask=torch.eye(10)), "negatives_mask leaves an anchor without"),
        (lambda: CLOOBLoss(inv_tau=200.0), r"inv_tau is 200\.0, but must be at most 100"),
        (lambda: CLOOBLoss(inv_tau=0.5, learn_inv_tau=True), r"inv_tau is 0\.5, but must be at least 1"),
        (lambda: CLOOBLoss(beta=0.0), r"beta is 0\.0, but must be"),
        (lambda: CLOOB(inv_tau=0.0), r"inv_tau is 0\.0, but must be"),
        (lambda: CLOOB(beta=-1.0), r"beta is -1\.0, but must be"),
        (lambda: embeddings_of(X), "The model returned Tensor, but must return image_embeds and text_embeds"),
        (lambda: effective_rank(X, share=0.0), r"share is 0\.0, but must be greater than 0"),
        (lambda: effective_rank(X[:1]), r"embeddings has shape \(1, 8\), but must be \(n, features\), n at least 2"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


# --- effective rank -------------------------------------------------------------------------------------------------


def test_effective_rank_counts_the_eigenvalues_that_hold_the_share():
    scores = torch.linalg.qr(torch.randn(200, 6, generator=seeded(), dtype=torch.float64)).Q
    scores = torch.linalg.qr(scores - scores.mean(0)).Q  # centred and orthonormal
    turn = torch.linalg.qr(torch.randn(6, 6, generator=seeded(1), dtype=torch.float64)).Q
    embeddings = scores * torch.tensor([50, 30, 15, 4.5, 0.5, 0], dtype=torch.float64).sqrt() @ turn + 3.0
    for share, rank in ((0.4, 1), (0.5, 1), (0.51, 2), (0.95, 3), (0.99, 4), (0.999, 5), (1.0, 5)):
        assert effective_rank(embeddings, share=share) == rank, share
    assert effective_rank(embeddings) == 4


def test_effective_rank_at_its_ends():
    assert effective_rank(torch.ones(5, 3)) == 0
    assert effective_rank(torch.arange(4.0)[:, None]) == 1
    assert effective_rank(torch.arange(4.0)[:, None] * torch.tensor([[1.0, 2.0, 3.0]])) == 1
    assert effective_rank(torch.cat([torch.eye(5), -torch.eye(5)]), share=1.0) == 5


# --- in fit ---------------------------------------------------------------------------------------------------------


def tiny_clip():
    from transformers import CLIPConfig, CLIPModel

    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**size, "vocab_size": 30, "max_position_embeddings": 8, "eos_token_id": 29, "bos_token_id": 28}
    vision = {**size, "image_size": 8, "patch_size": 4, "num_channels": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))


def pairs(n=24):
    """Images of one bright row each, and texts that say which."""
    number = torch.arange(n) % 8
    images = 0.1 * torch.rand(n, 1, 8, 8, generator=seeded())
    images[torch.arange(n), 0, number] += 1.0
    texts = torch.stack([torch.full((n,), 28), number, number + 10, torch.full((n,), 29)], 1)
    return TensorData({"pixel_values": images, "input_ids": texts, "attention_mask": torch.ones_like(texts)})


def test_trains_a_real_clip(global_rng_untouched):
    clip, data = tiny_clip(), pairs(8)
    batch = data[torch.arange(8)]
    output = clip(**batch)
    expected = cloob_loss(output.image_embeds, output.text_embeds)
    torch.testing.assert_close(CLOOB()(clip, batch), expected)
    history = fit(clip, data, CLOOB(), steps=60, batch_size=8, optimizer=lambda p: torch.optim.AdamW(p, lr=5e-4))
    assert list(history.records[0]) == ["step", "epoch", "loss", "lr"]
    assert sum(history["loss"][-5:]) < sum(history["loss"][:5]) - 0.5
    clip.eval()
    with torch.no_grad():
        found = clip(**batch)  # at inference there is no retrieval: plain cosines tell the texts apart
    assert (found.logits_per_image.argmax(1) == torch.arange(8)).double().mean() > 0.2  # of 1 in 8 by chance


def test_resuming_gives_the_same_clip(tmp_path):
    def go(steps, **settings):
        clip = tiny_clip()
        fit(clip, pairs(), CLOOB(), steps=steps, batch_size=8, **settings)
        return clip.state_dict()

    whole = go(6)
    go(3, checkpoint=Checkpoint(tmp_path, 3))
    resumed = go(6, checkpoint=Checkpoint(tmp_path, 3))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_any_two_towers_and_their_own_form_of_output():
    class Towers(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, inputs):
            return {"a": self.one(inputs[:, 0]), "b": self.two(inputs[:, 1])}

    def normalised(output):
        return F.normalize(output["a"], dim=1), F.normalize(output["b"], dim=1)

    views = torch.stack([X, Y], 1).float()
    history = fit(Towers(), views, CLOOB(embeddings=normalised), steps=3, batch_size=5)
    assert all(map(math.isfinite, history["loss"]))
    with pytest.raises(InputError, match="The model returned dict, but must return image_embeds"):
        fit(Towers(), views, CLOOB(), steps=1, batch_size=5)


def test_dropping_tau_changes_gradients_by_its_inverse():
    def gradient(**settings):
        images = X.clone().requires_grad_()
        infoloob_loss(images, Y, inv_tau=30.0, **settings).backward()
        return images.grad

    torch.testing.assert_close(gradient(scale_by_tau=False), 30.0 * gradient())


@pytest.mark.parametrize("seed", range(3))
def test_more_directions_of_the_embedding_are_used_than_with_infonce(seed):
    draw = seeded(seed)
    cause = torch.randn(1000, 16, generator=draw) * torch.logspace(0.5, -0.7, 16)  # some much plainer than others
    images, texts = (cause @ torch.randn(16, 40, generator=draw) for _ in range(2))
    data = TensorData({"images": images, "texts": texts})

    class Towers(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = (nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 32)) for _ in range(2))

        def forward(self, images, texts):
            return self.one(images), self.two(texts)

    def info_nce(model, batch, run):
        return info_nce_loss(*embeddings_of(model(**batch)), inv_tau=14.3)

    def rank(objective):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = Towers()
        fit(model, data, objective, steps=150, batch_size=128, seed=seed)
        with torch.no_grad():
            return effective_rank(embeddings_of(model(images, texts))[0])

    assert rank(CLOOB()) > rank(info_nce)


# --- several processes ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """What both processes of one launch found."""
    folder = tmp_path_factory.mktemp("launched")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*launch, job.__file__, str(folder)], check=True, timeout=120, env=environment)
    return [load_state(folder / f"results-{rank}.safetensors") for rank in range(2)]


def test_each_process_has_the_loss_of_all_and_the_gradient_of_its_own(launched):
    alone = job.run_all(slice(None))
    for rank, rows in job.BLOCKS.items():  # blocks of 4 and of 7
        torch.testing.assert_close(launched[rank]["loss"], alone["loss"])
        torch.testing.assert_close(launched[rank]["images"], alone["images"][rows])
        torch.testing.assert_close(launched[rank]["texts"], alone["texts"][rows])


def test_in_fit_two_processes_give_the_weights_of_one(launched):
    alone = job.train()
    for process in launched:
        assert process["training"]["history"] == pytest.approx(alone["history"], rel=1e-5)
        for name, value in alone["weights"].items():
            torch.testing.assert_close(process["training"]["weights"][name], value, rtol=1e-4, atol=1e-4)
