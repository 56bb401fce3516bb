"""SAGE: the residual's gradient, naturalness, who may confirm a failure, and real pipelines and language models."""

import math

import pytest
import tiny_pipelines as tiny
import torch
from torch import nn

from retouch.audit.sage import (
    CARD,
    FailureReport,
    PipelineGenerator,
    distinct,
    ensemble_log_prob,
    failure_region,
    gaussianity,
    judge,
    project_gaussian,
    residual_generate,
    sage,
    search_latent,
    search_prompt,
    search_token,
)
from retouch.audit.sage.prompts import CONTRADICTING
from retouch.core import seeds
from retouch.core.diffusion.guidance import cfg
from retouch.core.diffusion.process import VP
from retouch.core.diffusion.sampling import sample
from retouch.core.diffusion.steps import ddpm
from retouch.core.errors import InputError
from retouch.worlds.gaussians import ring

NAMES = ["circle", "square", "gray"]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Judge(nn.Module):
    """A linear classifier of images, which all look at the same three directions, each in its own way."""

    def __init__(self, shape, seed=0, noise=0.2, classes=3):
        super().__init__()
        size = math.prod(shape)
        weight = draw(classes, size, seed=100) + noise * draw(classes, size, seed=seed)
        with seeds.isolated():
            self.head = nn.Linear(size, classes)
        with torch.no_grad():
            self.head.weight.copy_(weight / math.sqrt(size) * 2)
            self.head.bias.zero_()
        self.dropout = nn.Dropout(0.5)
        self.calls = 0

    def forward(self, images):
        self.calls += 1
        return self.head(self.dropout(images.flatten(1)))


SHAPE = (1, 8, 8)
Z = draw(24, *SHAPE, seed=1)


def judges(count=3, shape=SHAPE, **settings):
    return [Judge(shape, seed, **settings) for seed in range(count)]


def toy(z):
    return 0.8 * z


def same(x):
    return x


def seen(found=Z, shape=SHAPE):
    """What a judge without noise sees: labels of latents that are right from the start."""
    with torch.no_grad():
        return Judge(shape, noise=0.0).eval()(found).argmax(1)


def search(classifiers=None, **settings):
    return search_latent(toy, same, classifiers or judges(), Z, seen(), **{"steps": 20, **settings})


# --- residual ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 0.25, 0.0])
def test_the_residual_has_the_samplers_value_and_the_identity_for_gradient(scale):
    matrix, upstream = draw(64, 64), draw(24, *SHAPE, seed=3)
    z = Z.clone().requires_grad_()

    def sampler(x):
        return (x.flatten(1) @ matrix).sin().view_as(x)

    x0 = residual_generate(sampler, z, scale=scale)
    assert torch.equal(x0, sampler(Z))
    (gradient,) = torch.autograd.grad(x0, z, upstream)
    assert torch.equal(gradient, scale * upstream)


def test_nothing_of_the_denoiser_is_in_the_graph():
    denoiser, grads = nn.Linear(8, 8), []

    def sampler(x):
        for _ in range(5):
            x = denoiser(x)
            grads.append(x.requires_grad or torch.is_grad_enabled())
        return x

    z = draw(2, 8).requires_grad_()
    x0 = residual_generate(sampler, z)
    x0.square().sum().backward()
    assert not any(grads)
    assert all(p.grad is None for p in denoiser.parameters())
    nodes, queue = set(), [x0.grad_fn]
    while queue:
        node = queue.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            queue += [child for child, _ in node.next_functions]
    assert len(nodes) < 6, "the graph does not grow with the steps of the sampler"


def test_for_a_multiple_of_the_identity_its_direction_is_the_true_one():
    ours, full = (search(gradient=gradient, steps=3, stop_at=0.0) for gradient in ("residual", "full"))
    torch.testing.assert_close(ours.inputs, full.inputs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.history, full.history)


# --- the ensemble -----------------------------------------------------------------------------------------------------


def test_ensemble_log_prob_is_the_mean_of_the_members():
    members, labels = [each.eval() for each in judges()], seen()
    alone = torch.stack([each(Z).log_softmax(1)[torch.arange(24), labels] for each in members])
    torch.testing.assert_close(ensemble_log_prob(Z, labels, members), alone.mean(0))
    torch.testing.assert_close(ensemble_log_prob(Z, labels, members, reduction="max"), alone.amax(0))
    torch.testing.assert_close(ensemble_log_prob(Z, labels, members, reduction="mixture"), alone.exp().mean(0).log())
    torch.testing.assert_close(ensemble_log_prob(Z, 2, members[:1]), members[0](Z).log_softmax(1)[:, 2])
    torch.testing.assert_close(  # log-probabilities are taken as they are, and logits in outputs are found
        ensemble_log_prob(Z, 2, [lambda images: {"logits": members[0](images).log_softmax(1)}]),
        ensemble_log_prob(Z, 2, members[:1]),
    )


# --- naturalness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["standardize", "sphere", "none"])
def test_project_gaussian(mode):
    z = 3 * draw(6, 4, 8, 8) + 2
    flat = project_gaussian(z, mode=mode).flatten(1)
    if mode == "standardize":
        torch.testing.assert_close(flat.mean(1), torch.zeros(6), rtol=0, atol=1e-5)
        torch.testing.assert_close(flat.std(1), torch.ones(6))
    elif mode == "sphere":
        torch.testing.assert_close(flat.norm(dim=1), torch.full((6,), 16.0))
        torch.testing.assert_close(nn.functional.normalize(flat), nn.functional.normalize(z.flatten(1)))
    else:
        assert torch.equal(flat, z.flatten(1))
    again = project_gaussian(flat.view_as(z), mode=mode)
    torch.testing.assert_close(again.flatten(1), flat, rtol=1e-4, atol=1e-5)
    assert torch.isfinite(project_gaussian(torch.zeros(2, 4), mode=mode)).all()


@pytest.mark.parametrize("alpha", [0.05, 0.2])
def test_gaussianity_accepts_true_draws(alpha):
    accepted, p = gaussianity(draw(2000, 1, 12, 12), alpha=alpha)
    assert accepted.dtype == torch.bool and accepted.shape == p.shape == (2000,)
    assert abs(float(accepted.float().mean()) - (1 - alpha) * 0.99) < 0.03
    assert abs(float((p >= alpha).float().mean()) - (1 - alpha)) < 0.03


def test_gaussianity_rejects_what_is_none():
    uniform = torch.rand(100, 400, generator=torch.Generator().manual_seed(0))
    for wrong in (
        uniform,
        project_gaussian(uniform),
        draw(100, 400).clamp(-1, 1),
        1.2 * draw(100, 400),
        draw(100, 400) + 1,
        torch.zeros(100, 400),
    ):
        assert float(gaussianity(wrong)[0].float().mean()) < 0.05


@pytest.mark.parametrize("size", [1, 2, 3, 12, 20])
def test_gaussianity_of_few_entries(size):
    accepted, p = gaussianity(draw(400, size))
    assert abs(float(accepted.float().mean()) - 0.95) < 0.06
    assert bool(((p >= 0) & (p <= 1)).all())
    assert not gaussianity(torch.full((1, size), 6.0))[0]


# --- latents ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", ["normalized", "sign"])
def test_the_loss_falls_and_most_latents_fail_in_the_end(update):
    found = search(update=update)
    assert found.history[-1] < found.history[0] - 0.5
    report = found.report
    assert report.success_rate.share > 0.7
    assert report.success_rate.low < report.success_rate.share <= report.success_rate.high
    assert bool((report.success <= (report.failed & gaussianity(found.inputs)[0])).all())
    assert torch.equal(found.images, toy(found.inputs)), "images are made of the latents, never changed themselves"
    flat = found.inputs[report.success].flatten(1)
    torch.testing.assert_close(flat.std(1), torch.ones(len(flat)))


def test_a_target_is_reached():
    labels = seen()
    target = (labels + 1) % 3
    found = search_latent(toy, same, judges(), Z, labels, steps=30, target=target)
    assert found.history[-1] < found.history[0]
    with torch.no_grad():
        reached = judges()[2].eval()(found.images).argmax(1) == target
    assert float(reached.float().mean()) > 0.7
    assert bool((found.report.verdicts[2] == reached).all())
    assert bool((found.report.success <= reached).all())


def test_without_steps_the_start_comes_back():
    found = search(steps=0)
    assert torch.equal(found.inputs, Z)
    assert torch.equal(found.images, toy(Z))
    assert len(found.history) == 1
    assert not found.report.success.any(), "what fails at the start is no success of the search"


@pytest.mark.parametrize("gradient", ["residual", "full", "random"])
def test_a_search_is_reproducible(gradient, global_rng_untouched):
    first, again = (search(gradient=gradient, steps=4, seed=5) for _ in range(2))
    assert torch.equal(first.inputs, again.inputs)
    assert first.history == again.history
    other = search(gradient=gradient, steps=4, seed=6)
    assert torch.equal(first.inputs, other.inputs) == (gradient != "random")


def test_leaving_out_what_is_done_changes_nothing():
    whole, less = search(), search(shrink=True)
    torch.testing.assert_close(whole.inputs, less.inputs)
    assert torch.equal(whole.report.success, less.report.success)
    assert less.generations < whole.generations


def test_a_search_beats_random_draws_where_failures_are_rare():
    """With classes that most draws show alike, new draws seldom fail, and the search has the same number of them."""

    class Biased(Judge):
        def forward(self, images):
            return super().forward(images) + torch.tensor([6.0, 0.0, 0.0])

    members = [Biased(SHAPE, seed) for seed in range(3)]
    rates = {}
    for gradient in ("residual", "random"):
        found = search_latent(toy, same, members, Z, 0, steps=25, gradient=gradient)
        assert found.report.base_failure_rate.share < 0.2
        rates[gradient] = found.report.success_rate.share
    assert rates["residual"] > rates["random"] + 0.3


def test_latents_that_are_no_draws_are_not_kept():
    """Without projection, a gradient on few entries takes z out of the typical set."""

    class Few(nn.Module):
        def forward(self, images):
            pixel = images.flatten(1)[:, :2].sum(1) / 4
            return torch.stack([3 - pixel, pixel], 1)

    members, settings = [Few(), Few(), Few()], {"steps": 30, "projection": "none", "stop_at": 0.5}
    kept = search_latent(toy, same, members, Z, 0, **settings)
    moved = search_latent(toy, same, members, Z, 0, reject=False, **settings)
    assert moved.report.non_gaussian_rate.share > 0.9
    assert bool(moved.report.failed.any()) and not bool(moved.report.success.any())
    natural = gaussianity(Z)[0]
    assert gaussianity(kept.inputs)[0][natural].all(), "the last natural latent is what is given back"
    assert kept.report.success_rate.hits == 0


def test_parameters_and_modes_stay_as_they_are():
    members = judges()
    members[0].train(), members[1].eval()
    state = [{name: value.clone() for name, value in each.state_dict().items()} for each in members]
    search(members, steps=2)
    with pytest.raises(RuntimeError, match="mat1"):
        search_latent(toy, lambda x: x[..., :4], members, Z, seen())
    assert [each.training for each in members] == [True, False, True]
    for each, before in zip(members, state, strict=True):
        assert all(p.grad is None for p in each.parameters())
        assert all(torch.equal(value, before[name]) for name, value in each.state_dict().items())


# --- who judges -------------------------------------------------------------------------------------------------------


def test_the_last_classifier_is_held_out_and_not_asked_before_the_end():
    members = judges()
    search(members, steps=3, stop_at=0.0)
    assert [each.calls for each in members] == [4 + 2, 4 + 2, 2], "the last one sees the images and the originals"


def test_members_of_the_search_alone_confirm_nothing():
    for alone in (search(judges(1)), search(judges(3), held_out=0), search(judges(1) * 3)):
        assert alone.report.fooled.any()
        assert alone.report.held_out == 0
        assert not alone.report.failed.any() and not alone.report.success.any()

    def stubborn(images):
        return seen()  # always sees the label

    found = search(judges(2), held_out=[stubborn])
    assert found.report.fooled.float().mean() > 0.7 and not found.report.success.any()
    assert found.report.unconfirmed_rate.share == 1.0
    assert found.report.success_rate.share == 0.0


def test_a_single_unlike_classifier_is_fooled_alone_and_an_ensemble_less_so():
    oracle = Judge(SHAPE, noise=0.0)

    z = draw(200, *SHAPE, seed=2)

    def unconfirmed(count):
        members, told = judges(count, noise=1.5), {"steps": 20, "held_out": [oracle], "stop_at": 0.4}
        found = search_latent(toy, same, members, z, seen(z), **told).report.unconfirmed_rate
        assert found.total > 20
        return found.share

    assert unconfirmed(1) > unconfirmed(5) + 0.1


def test_what_fails_from_the_start_is_no_success():
    labels = seen()
    labels[:10] = (labels[:10] + 1) % 3
    found = search_latent(toy, same, judges(), Z, labels, steps=20)
    report = found.report
    assert report.base_failed[:10].all()
    assert not report.success[:10].any() and report.success[10:].any()
    assert report.base_failure_rate.hits == int(report.base_failed.sum()) >= 10
    assert report.success_rate.total == 24 - report.base_failure_rate.hits


def test_the_report_counts_what_its_words_say():
    right, wrong = torch.tensor([[0, 0, 0, 0]]), torch.tensor([[1, 1, 1, 0]])
    verdicts = torch.cat([wrong, torch.tensor([[1, 1, 0, 1]]), torch.tensor([[1, 1, 1, 1]])]).bool()
    base = torch.cat([right, right, torch.tensor([[0, 0, 0, 1]])]).bool()
    told = {"inputs": list("abcd"), "images": Z[:4], "labels": torch.zeros(4), "target": None, "held_out": 1}
    natural = torch.tensor([True, False, True, True])
    report = FailureReport(**told, verdicts=verdicts, base_verdicts=base, natural=natural)
    assert report.fooled.tolist() == [True, True, False, False]
    assert report.failed.tolist() == [True, True, False, False]
    assert report.success.tolist() == [True, False, False, False]
    assert report.success_rate[3:] == (1, 3)
    assert report.non_gaussian_rate[3:] == (1, 2)
    assert report.base_failure_rate[3:] == (1, 4)
    assert report.success_rate_by(torch.tensor([False, True, True, True])).hits == 0
    assert report.summary()["success_rate"]["share"] == pytest.approx(1 / 3)
    most = FailureReport(**told, verdicts=verdicts, base_verdicts=base, natural=natural, agreement="majority")
    assert most.fooled.tolist() == [True, True, False, False], "half of two is no majority"
    # Wilson's interval of 1 in 3, by hand
    assert report.success_rate.low == pytest.approx(0.0615, abs=1e-3)
    assert report.success_rate.high == pytest.approx(0.7923, abs=1e-3)
    empty = FailureReport(**told, verdicts=verdicts, base_verdicts=torch.ones(3, 4).bool(), natural=natural)
    assert math.isnan(empty.success_rate.share) and empty.success_rate[1:] == (0.0, 1.0, 0, 0)


def test_near_duplicates_count_once():
    z = draw(4, 16)
    assert distinct(torch.stack([z[0], 1.01 * z[0], z[1], -z[1], z[0] + 0.01])) == [0, 2, 3]
    assert distinct(["a red circle", "A circle red", "a circle", "a red circle"]) == [0, 2]
    assert distinct([]) == []


def test_an_oracle_may_answer_with_classes_and_judge_alone():
    report = judge([1, 2], Z[:2], Z[:2], 0, [lambda x: torch.tensor([1, 0]), lambda x: torch.tensor([1, 1])])
    assert report.verdicts.tolist() == [[True, False], [True, True]]


# --- regions ----------------------------------------------------------------------------------------------------------


def test_the_region_of_a_half_space_is_half_of_everything():
    """Failure where the first coordinate is positive, from its very middle: every direction reaches a right angle."""

    def side(images):
        return (images.flatten(1)[:, 0] > -1e-4).long()

    z = torch.zeros(SHAPE)
    z[0, 0, 0] = 8.0
    region = failure_region(toy, same, [side], z, 0)
    assert region.size == pytest.approx(1.0)
    assert region.log10_mass == pytest.approx(math.log10(0.5), abs=1e-3)

    def cap(images):
        return (images.flatten(1)[:, 0] > 0.8 * 8.0 * math.cos(1.0)).long()

    region = failure_region(toy, same, [cap], z, 0, rings=16)
    assert region.angles.unique().numel() == 1 and 0.9 < float(region.angles[0]) <= 1.0
    drawn = nn.functional.normalize(draw(200_000, 64), dim=1)[:, 0]
    assert 10**region.log10_mass < float((drawn > 0.3).float().mean()), "less than a wider cap"
    point = failure_region(toy, same, [lambda x: (x.flatten(1)[:, 0] > 6.399).long()], z, 0)
    assert point.size == 0 and point.log10_mass == -math.inf
    with pytest.raises(InputError, match="z is no failure"):
        failure_region(toy, same, [side], -z, 0)


def test_the_mass_of_a_cap_in_three_dimensions_and_in_many():
    from retouch.audit.sage.latents import _log10_mass

    for angle in (0.3, 1.0, math.pi / 2):  # a cap of the ordinary sphere: (1 - cos) / 2
        assert _log10_mass(torch.tensor([angle]), 3) == pytest.approx(math.log10((1 - math.cos(angle)) / 2), abs=1e-6)
    both = 10 ** _log10_mass(torch.tensor([0.3, 1.0]), 3)
    assert both == pytest.approx((1 - math.cos(0.3) + 1 - math.cos(1.0)) / 4, rel=1e-6)
    tiny_mass = _log10_mass(torch.tensor([0.5]), 16384)  # far below the smallest number
    assert tiny_mass == pytest.approx(16384 * math.log10(math.sin(0.5)), rel=1e-3)


# --- tokens -----------------------------------------------------------------------------------------------------------

PROMPTS = ["a red circle", "a blue circle"]
PROMPT_MAP, TOKEN_MAP = draw(3, 64, seed=8), draw(6, 64, seed=9)


def token_images(prompts, embedding=None):
    """Two images a prompt, which the token moves."""
    base = torch.stack([draw(2, 64, seed=len(text)) for text in prompts])
    moved = base if embedding is None else base + 3 * (embedding @ TOKEN_MAP)
    return moved.reshape(-1, *SHAPE)


def test_one_token_turns_all_prompts_into_the_target(global_rng_untouched):
    settings = {"embed_dim": 6, "steps": 40, "lr": 0.05}
    found = search_token(token_images, PROMPTS, judges(), 1, unseen=["a large square on"], **settings)
    assert found.inputs.shape == (6,) and not found.inputs.requires_grad
    assert len(found.history) == 41 and found.history[-1] < found.history[0] - 0.5
    assert found.images.shape == (2, *SHAPE)
    assert found.report.inputs == ["a large square on"] * 2
    again = search_token(token_images, PROMPTS, judges(), 1, unseen=["a large square on"], **settings)
    assert torch.equal(found.inputs, again.inputs)
    with torch.no_grad():
        seen_as = judges()[2].eval()(token_images(PROMPTS, found.inputs)).argmax(1)
    assert (seen_as == 1).all()


def test_a_token_that_the_original_shows_already_is_no_success():
    known = [1, 1]
    target = 0
    with torch.no_grad():
        before = torch.stack([each.eval()(token_images(PROMPTS)).argmax(1) for each in judges()])
    found = search_token(token_images, PROMPTS, judges(), target, embed_dim=6, steps=40, lr=0.05, original=token_images)
    assert torch.equal(found.report.base_failed, (before == target).any(0))
    assert not found.report.success[found.report.base_failed].any()
    told = search_token(token_images, PROMPTS, judges(), target, embed_dim=6, steps=0, labels=known)
    assert torch.equal(told.report.labels, torch.tensor([1, 1, 1, 1]))
    start = search_token(token_images, PROMPTS, judges(), target, embed_dim=6, steps=0, init=torch.ones(6))
    assert torch.equal(start.inputs, torch.ones(6))
    assert not start.report.success.any()


def test_similarity_is_reported_and_held_up():
    def score(images, prompts):
        assert len(images) == len(prompts) == 4 and prompts[0] == prompts[1] == PROMPTS[0]
        return -(images - token_images(PROMPTS)).square().mean((1, 2, 3))

    settings = {"embed_dim": 6, "steps": 40, "lr": 0.05, "similarity": score, "original": token_images}
    free = search_token(token_images, PROMPTS, judges(), 1, **settings)
    held = search_token(token_images, PROMPTS, judges(), 1, similarity_weight=5.0, **settings)
    assert free.measures["similarity_before"] == 0
    assert free.measures["similarity"] < held.measures["similarity"] < 0


# --- prompts ----------------------------------------------------------------------------------------------------------


def language_model(kind="llama", words=15):
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    if kind == "gpt2":
        return tiny.made(
            lambda: GPT2LMHeadModel(
                GPT2Config(
                    vocab_size=words, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2
                )
            )
        )
    settings = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return tiny.made(lambda: LlamaForCausalLM(LlamaConfig(vocab_size=words, max_position_embeddings=32, **settings)))


TABLE = draw(16, 6, seed=12)


def prompt_images(prompt, latents, embedding=None):
    """Images that all words of a prompt move, by their rows in the table."""
    ids = tiny.tokenizer()(prompt, add_special_tokens=False).input_ids
    total = TABLE[ids].sum(0) if embedding is None else TABLE[ids].sum(0) + embedding
    return (draw(16, 64)[:latents] * 0.3 + total @ TOKEN_MAP / 4).view(-1, *SHAPE)


def grow(kind="llama", classifiers=None, label=0, **settings):
    told = {"class_names": NAMES, "latents": 4, "max_words": 3, "inner_lr": 0.2, **settings}
    tokenizer = tiny.tokenizer()
    return search_prompt(
        told.pop("generate", prompt_images),
        told.pop("text_embeddings", TABLE),
        language_model(kind),
        tokenizer,
        classifiers or judges(),
        label,
        **told,
    )


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_prompts_grow_word_by_word_and_keep_the_class(kind, global_rng_untouched):
    found = grow(kind, threshold=1.0)
    assert found.inputs[0] == "a photo of a circle"
    assert len(found.inputs) == len(found.history) == 4
    for shorter, longer in zip(found.inputs, found.inputs[1:], strict=False):
        assert longer.startswith(f"{shorter} ") and len(longer.split()) == len(shorter.split()) + 1
        assert longer.split()[-1] in tiny.WORDS and longer.split()[-1] != shorter.split()[-1]
    assert all("circle" in prompt.split() for prompt in found.inputs)
    assert found.report.inputs == [found.inputs[-1]] * 4
    assert torch.equal(found.images, prompt_images(found.inputs[-1], 4))
    assert grow(kind, threshold=1.0).inputs == found.inputs
    assert found.generations == 4 * (4 + 3 * 5)


def test_the_word_is_the_one_nearest_to_the_free_embedding():
    """With a generator that fails in the direction of one word, that word is taken, however unlikely it is."""
    number = tiny.tokenizer().get_vocab()["large"]
    table = nn.functional.normalize(draw(15, 6, seed=12), dim=1)
    members = [lambda images: torch.stack([-images[:, 0, 0, 0], images[:, 0, 0, 0], 0 * images[:, 0, 0, 0]], 1)] * 2

    def generate(prompt, latents, embedding=None):
        ids = tiny.tokenizer()(prompt, add_special_tokens=False).input_ids
        toward = sum(float(table[number] @ table[each]) for each in ids if each == number) - 0.5
        if embedding is not None:
            toward = toward + embedding @ table[number]
        return (torch.ones(latents, 1, 1, 1) * toward).expand(latents, *SHAPE)

    settings = {"generate": generate, "text_embeddings": table, "held_out": [lambda x: members[0](x)]}
    found = grow(classifiers=members, inner_steps=60, **settings)
    assert found.inputs == ["a photo of a circle", "a photo of a circle large"]
    assert found.history == [0.0, 1.0], "it stops when more than the threshold fails"
    assert found.report.success.all()
    likeliest = grow(classifiers=members, likelihood_weight=1e6, max_words=1, **settings).inputs[1].split()[-1]
    from retouch.audit.sage.prompts import _next_words

    words, _, likelihood = _next_words(
        language_model(), tiny.tokenizer(), "a photo of a circle", 50, {"square", "gray"}
    )
    assert likeliest == words[0] and bool((likelihood.diff() <= 0).all())


def test_banned_words_and_other_classes_never_appear():
    banned = {"red", "left", "on"}
    found = grow(banned=sorted(banned), threshold=1.0, max_words=5)
    added = set(found.inputs[-1].split()[5:])
    assert added and not added & {*banned, "square", "gray", *CONTRADICTING}
    words = [word for word in tiny.WORDS if word not in NAMES]
    stuck = grow(banned=words, threshold=1.0)
    assert stuck.inputs == ["a photo of a circle"], "no word is left"
    assert grow(max_words=0).inputs == ["a photo of a circle"]


def test_whole_words_of_byte_level_and_sentence_piece_vocabularies():
    from types import SimpleNamespace

    from retouch.audit.sage.prompts import _next_words

    class Pieces:
        bos_token_id, all_special_ids = 0, [0]
        tokens = ("<s>", "Ġcat", "ing", "Ġno", "Ġ3", "Ġdog", "Ġbig", "Ġthe")

        def __len__(self):
            return len(self.tokens)

        def __call__(self, text, **settings):
            return SimpleNamespace(input_ids=[7, 1])

        def get_vocab(self):
            return {token: number for number, token in enumerate(self.tokens)}

        def convert_ids_to_tokens(self, ids):
            return [self.tokens[number] for number in ids]

    words, ids, _ = _next_words(language_model(words=8), Pieces(), "the cat", 8, {"no", "dog"})
    assert sorted(words) == ["big", "the"] and sorted(ids) == [6, 7]


# --- real pipelines ---------------------------------------------------------------------------------------------------

PICTURE = (3, 8, 8)


@pytest.mark.parametrize("make", [tiny.stable_diffusion, tiny.stable_diffusion_xl, tiny.stable_diffusion_3, tiny.dit])
def test_latents_of_real_pipelines(make, global_rng_untouched):
    pipe, members = make(), judges(shape=PICTURE, noise=0.05)
    prompt = 0 if make is tiny.dit else "a red circle"
    settings = {"latents": 3, "times": 2, "guidance_scale": 3.0, "steps": 3, "stop_at": 0.0}
    network = getattr(pipe, "unet", None) or pipe.transformer
    network.train()
    found = sage(pipe, prompt, members, 0, **settings)
    again = sage(pipe, prompt, members, 0, **settings)
    assert network.training and not pipe.vae.training
    assert all(p.grad is None for part in (network, pipe.vae) for p in part.parameters())
    assert found.inputs.shape == (3, 4, 8, 8) and found.images.shape == (3, *PICTURE)
    assert found.images.min() >= 0 and found.images.max() <= 1
    assert torch.equal(found.inputs, again.inputs) and found.history == again.history
    made = PipelineGenerator(pipe, latents=found.inputs, times=2, guidance_scale=3.0)
    with torch.no_grad():
        fresh = made.decode(made.sampler(prompt)(found.inputs))
    torch.testing.assert_close(found.images, fresh, rtol=1e-3, atol=1e-4)


def test_what_is_found_is_for_the_users_own_pipeline():
    pipe = tiny.stable_diffusion()
    members = judges(shape=PICTURE, noise=0.05)
    found = sage(pipe, "a red circle", members, 0, latents=2, times=3, steps=2, stop_at=0.0)
    told = {"num_inference_steps": 3, "guidance_scale": 7.5, "output_type": "pt"}
    theirs = pipe(["a red circle"] * 2, latents=found.inputs, **told).images
    torch.testing.assert_close(theirs, found.images, rtol=1e-3, atol=1e-3)


def test_its_images_are_the_pipelines_own():
    pipe = tiny.stable_diffusion()
    make = PipelineGenerator(pipe, latents=2, times=3, guidance_scale=4.0)
    wanted = pipe(PROMPTS[:1] * 2, latents=make.z, num_inference_steps=3, guidance_scale=4.0, output_type="pt").images
    torch.testing.assert_close(make("a red circle"), wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(make.generate("a red circle", 1), make.generate("a red circle", 1))
    plain = PipelineGenerator(pipe, latents=make.z, times=3, guidance_scale=1.0)
    assert plain.guidance is None and not torch.allclose(plain("a red circle"), wanted)


def test_gradients_through_the_sampler_are_exact_and_stop_where_they_are_told_to():
    pipe = tiny.stable_diffusion()
    pipe.unet.train()
    make = PipelineGenerator(pipe, latents=1, times=3, guidance_scale=2.0)
    plain = make.sampler("a red circle")(make.z)
    slopes = {}
    direction = draw(*make.z.shape, seed=4)
    for through in (None, 3, 1, 0):
        z = make.z.clone().requires_grad_()
        x0 = make.sampler("a red circle", through=through)(z)
        torch.testing.assert_close(x0, plain, rtol=1e-4, atol=1e-4)
        slopes[through] = torch.autograd.grad(x0.square().mean(), z)[0] if through in (None, 3) else x0.requires_grad
    assert torch.equal(slopes[None], slopes[3])
    assert slopes[1] and not slopes[0], "the condition has none, but the last step's weights do"
    step = 1e-2
    with torch.no_grad():
        ends = [make.sampler("a red circle")(make.z + s * direction).square().mean() for s in (step, -step)]
    slope = float((slopes[None] * direction).sum())
    assert float(ends[0] - ends[1]) / (2 * step) == pytest.approx(slope, rel=0.05)
    assert pipe.unet.training


def pixart():
    from diffusers import DDIMScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    transformer = tiny.made(
        lambda: PixArtTransformer2DModel(
            sample_size=8,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=4,
            in_channels=4,
            out_channels=8,
            cross_attention_dim=8,
            caption_channels=8,
            use_additional_conditions=False,
        )
    )
    t5 = tiny.made(
        lambda: T5EncoderModel(T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2))
    )
    parts = {"text_encoder": t5, "tokenizer": tiny.tokenizer(), "vae": tiny.vae(), "scheduler": DDIMScheduler()}
    return tiny.quiet(PixArtAlphaPipeline(transformer=transformer, **parts))


@pytest.mark.parametrize("make", [tiny.stable_diffusion, pixart])
def test_a_token_of_a_word_is_that_word(make):
    pipe = make()
    make = PipelineGenerator(pipe, latents=2, times=2, guidance_scale=3.0)
    (circle,) = make.words(["circle"])
    assert make.width == 8
    torch.testing.assert_close(make(["a red", "a"], circle), make(["a red circle", "a circle"]))
    torch.testing.assert_close(make.words(["red circle"])[0], make.words(["red", "circle"]).mean(0))
    embedding = circle.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(make("a red", embedding).square().sum(), embedding)
    assert float(gradient.norm()) > 0
    parts = (make.denoiser.model, pipe.text_encoder, pipe.vae)
    assert all(p.grad is None for part in parts for p in part.parameters())
    with pytest.raises(InputError, match=r"embedding has shape \(7,\)"):
        make("a red", torch.ones(7))
    calls = []

    def fail(*_):
        calls.append(any(module._forward_hooks for module in pipe.text_encoder.modules()))
        if calls[-1]:
            raise KeyError

    pipe.text_encoder.register_forward_pre_hook(fail)
    with pytest.raises(KeyError):
        make("a red", circle)
    assert calls == [False, True]
    assert not any(module._forward_hooks for module in pipe.text_encoder.modules()), "also after an error"


@pytest.mark.parametrize("make", [tiny.stable_diffusion, pixart])
def test_tokens_of_real_pipelines(make, global_rng_untouched):
    pipe = make()
    settings = {"space": "token", "target": 1, "latents": 2, "times": 2, "guidance_scale": 3.0, "steps": 3}
    found = sage(pipe, PROMPTS, judges(shape=PICTURE), 0, lr=0.3, **settings)
    assert found.inputs.shape == (8,) and found.images.shape == (4, *PICTURE)
    assert found.history[-1] < found.history[0]
    again = sage(pipe, PROMPTS, judges(shape=PICTURE), 0, lr=0.3, **settings)
    assert torch.equal(found.inputs, again.inputs)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_prompts_of_real_pipelines(kind, global_rng_untouched):
    pipe, settings = tiny.stable_diffusion(), {"space": "prompt", "latents": 2, "times": 2, "max_words": 2}
    told = {"language_model": language_model(kind), "tokenizer": tiny.tokenizer(), "class_names": NAMES}
    found = sage(pipe, "a large {}", judges(shape=PICTURE), 0, threshold=1.0, inner_steps=2, **told, **settings)
    assert len(found.inputs) == 3 and found.images.shape == (2, *PICTURE)
    assert all(prompt.startswith("a large circle") for prompt in found.inputs)
    make = PipelineGenerator(pipe, latents=2, times=2)
    torch.testing.assert_close(found.images, make(found.inputs[-1]))


def test_names_come_from_a_transformers_classifier_with_logits(tiny_vit):
    tiny_vit.config.id2label = dict(enumerate([*NAMES, "cat", "dog", "bird", "car", "tree", "boat", "fish"]))
    members = [tiny_vit, lambda images: tiny_vit(images).logits, *judges(1)]
    found = grow(classifiers=members, class_names=None, max_words=1, threshold=1.0, label=2)
    assert found.inputs[0] == "a photo of a gray"


def test_an_exact_denoiser_and_its_oracle():
    """A ring of Gaussians, whose oracle says which mode a sample is of: latents are moved to other modes."""
    world = ring(3)
    denoiser = world.denoiser(VP.linear())

    def sampler(z):
        return sample(denoiser, z, times=10)

    def classes(x):
        return -(x[:, None] - world.means.to(x)).square().sum(-1) / 0.1

    def oracle(x):
        return classes(x).argmax(1)

    z = draw(16, 2)
    labels = oracle(sampler(z))
    told = {"steps": 25, "projection": "none", "held_out": [oracle], "stop_at": 0.5}
    found = search_latent(sampler, same, [classes], z, labels, **told)
    assert found.report.base_failure_rate.hits == 0
    assert found.report.success_rate.share > 0.5
    assert torch.equal(oracle(sampler(found.inputs)) != labels, found.report.verdicts[-1])


# --- bad input --------------------------------------------------------------------------------------------------------


def test_a_sampler_that_draws_is_refused(global_rng_untouched):
    denoiser = ring(3).denoiser(VP.linear())
    wild = torch.Generator().manual_seed(0)
    for noisy in (
        lambda z: sample(denoiser, z, times=3, step=ddpm, generator=wild),
        lambda z: z + torch.randn(z.shape),  # by the global generator, which is left as it was
    ):
        with pytest.raises(InputError, match="sample_fn gave two results for the same input"):
            search_latent(noisy, same, [lambda x: x], draw(4, 2), 0)
    with pytest.raises(InputError, match="generate_from_embeddings gave two results"):
        search_token(
            lambda prompts, e: token_images(prompts, e) + torch.randn(1), PROMPTS, judges(), 1, embed_dim=6, steps=1
        )
    with pytest.raises(InputError, match="generate gave two results"):
        grow(generate=lambda prompt, latents, embedding=None: prompt_images(prompt, latents) + torch.randn(1))


def cut(prompts, embedding):
    return token_images(prompts, embedding.detach())


def test_bad_input():
    members, pipe = judges(), tiny.stable_diffusion()
    for wrong, words in (
        (lambda: ensemble_log_prob(Z, 0, []), "classifiers is empty"),
        (lambda: ensemble_log_prob(Z, 3, members), "label is 3, but must be from 0 to 2"),
        (lambda: ensemble_log_prob(Z, -1, members), "labels has -1"),
        (lambda: ensemble_log_prob(Z, torch.zeros(5, dtype=torch.long), members), r"labels has shape \(5,\)"),
        (lambda: ensemble_log_prob(Z, 0, members, reduction="min"), "reduction is 'min'"),
        (lambda: ensemble_log_prob(Z, 0, [lambda x: x[0, 0]]), "A classifier gave shape"),
        (lambda: residual_generate(toy, Z, scale=-1), "scale is -1"),
        (lambda: residual_generate(lambda z: z[:, :, :4], Z), "sample_fn gave shape"),
        (lambda: project_gaussian(Z, mode="clip"), "mode is 'clip'"),
        (lambda: project_gaussian(torch.ones(2, 1)), "z has 1 entry"),
        (lambda: gaussianity(Z, alpha=2), "alpha is 2"),
        (lambda: judge(Z, Z, Z, 0, []), "classifiers is empty"),
        (lambda: search_latent(toy, same, [], Z, 0), "classifiers is empty"),
        (lambda: search_latent(toy, same, members, Z, 7), "label is 7"),
        (lambda: search_latent(toy, same, members, Z, 1, target=1), "target is 1, but must be another class"),
        (lambda: search(gradient="none"), "gradient is 'none'"),
        (lambda: search(update="adam"), "update is 'adam'"),
        (lambda: search(steps=-1), "steps is -1"),
        (lambda: search(step_size=0.0), "step_size is 0"),
        (lambda: search(held_out=[members[0]], classifiers=members), "held_out has a classifier"),
        (lambda: search(held_out=-1), "held_out is -1"),
        (lambda: search(agreement="one"), "agreement is 'one'"),
        (
            lambda: search_latent(torch.no_grad()(toy), same, members, Z, 0, gradient="full"),
            "sample_fn lets no gradients through",
        ),
        (lambda: search_latent(toy, lambda x: x.detach(), members, Z, 0), "decode or a classifier lets no gradients"),
        (lambda: judge(Z, Z, Z, None, members), "labels and target are both None"),
        (lambda: search_token(token_images, [], members, 1, embed_dim=6), "prompts is empty"),
        (lambda: search_token(token_images, PROMPTS, members, 9, embed_dim=6), "label is 9"),
        (lambda: search_token(token_images, PROMPTS, members, 1, embed_dim=6, labels=1), "target is 1"),
        (
            lambda: search_token(token_images, PROMPTS, members, 1, embed_dim=6, init=torch.ones(5)),
            r"init has .*\(5,\)",
        ),
        (lambda: search_token(cut, PROMPTS, members, 1, embed_dim=6), "generate_from_embeddings lets no gradients"),
        (lambda: search_token(PipelineGenerator(pipe, times=1), PROMPTS, members, 1, embed_dim=6), r"must have \(8,\)"),
        (
            lambda: grow(
                threshold=1.0, generate=PipelineGenerator(pipe, times=1).generate, classifiers=judges(3, PICTURE)
            ),
            r"embedding has shape \(6,\), but must have \(8,\)",
        ),
        (lambda: grow(template="a photo"), "template is 'a photo'"),
        (lambda: grow(label=3), "label is 3"),
        (lambda: grow(top_k=0), "top_k is 0"),
        (lambda: grow(class_names=None), "class_names is None"),
        (lambda: grow(threshold=1.0, text_embeddings=lambda words: TABLE[0]), "text_embeddings gave shape"),
        (lambda: grow(threshold=1.0, text_embeddings=TABLE[:5]), "text_embeddings has 5 rows"),
        (lambda: grow(threshold=1.0, generate=lambda p, n, e=None: prompt_images(p, n)), "generate lets no gradients"),
        (lambda: sage(pipe, "a", members, None), "label is None"),
        (lambda: sage(pipe, "a", members, 0, space="pixel"), "space is 'pixel'"),
        (lambda: sage(pipe, "a", members, 0, space="token"), "target is None"),
        (lambda: sage(pipe, "a {}", members, 0, space="prompt"), "language_model or tokenizer is None"),
        (lambda: sage(tiny.dit(), 0, members, 0, space="token", target=1), "must have one text encoder"),
        (lambda: PipelineGenerator(tiny.stable_diffusion_xl()).width, "must have one text encoder"),
        (lambda: PipelineGenerator(pipe, times=2, through=3), "through is 3"),
        (lambda: PipelineGenerator(pipe, latents=2).generate("a", 3), "latents is 3"),
    ):
        with pytest.raises(InputError, match=words):
            wrong()


def test_the_card():
    assert CARD.shape == "probe"
    assert seeds.generator(0, "sage", "start").initial_seed() != seeds.generator(0, "sage", "token").initial_seed()
    assert cfg(1.0).branches
