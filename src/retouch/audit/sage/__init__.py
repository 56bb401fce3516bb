"""SAGE: search natural inputs on which a text-to-image model fails: latents, one token, or whole prompts.

A generator G(z, p) should show the class y. Classifiers of its images drive a search for inputs where it does not:

    latent    min_z  log p_D(y | G(z, p)),  z <- project(z - eta |z| g / |g|)      distorted or unrelated images
    token     max_e  log p_D(target | G(z, p + e)) over prompts and latents        one embedding for all prompts
    prompt    "a photo of a y" grows word by word: a free embedding in the next place is optimised to make G
              fail, and of the language model's likely next words that nearest to it is taken    readable prompts

The gradient reaches z over a residual connection, x0 = S(z) + kappa (z - stop(z)): the value is the sampler's, the
denoiser's Jacobians are left out, and only decoder and classifiers are differentiated. Pixels never carry the step: the
image comes from a fresh run at the new z. z stays a plausible draw of N(0, I): it is standardised after every step, and
kept only while D'Agostino's test at 5% and the 0.5% to 99.5% range of its norm accept it.

The trap of such a search is to find failures of the classifiers. So several of them are searched with and must agree,
others that the search never asked must confirm it (`held_out`, by default the last one of `classifiers`; an exact
oracle or a human's answers are best), and an input that any of them saw fail from the start counts as no success. With
one classifier nothing is confirmed, and every success stays False.

    found = sage(pipe, "a photo of a cat", [resnet, vit, clip_zero_shot, held_out], label=3)
    found.report.summary(), found.images[found.report.success]
    z = found.inputs[found.report.success][:1]                        # with DDIM, the pipeline itself fails there too
    pipe("a photo of a cat", latents=z, num_inference_steps=20)

Use it to find systematic failures of a generator before its users do. Not with classifiers that are unsure on the
generator's ordinary images (see `base_failure_rate` first), nor with stochastic samplers, which are refused.

Paper: arXiv 2306.00974. No code was released, so these are choices that follow its idea, not its numbers: the exact
place and scale of the residual (after the whole sampler, kappa 1), the mean of log-probabilities, agreement of all
members, standardising as the projection, step and stopping rule, 5 inner steps and cosine alone for words, and regions
measured by rotation of z. "full" differentiates the sampler, and "random" draws new latents: the baselines to beat.

Cost: a latent step is one generation forward, and one backward of decoder and classifiers; 10 to 20 sampler steps do.
Tokens and words need gradients through the sampler, whose steps are computed twice for it (checkpoints).
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from retouch.audit.sage.classifiers import ImageJudge, load_judges
from retouch.audit.sage.judging import (
    Classifier,
    FailureReport,
    Rate,
    SearchResult,
    distinct,
    ensemble_log_prob,
    judge,
)
from retouch.audit.sage.latents import (
    FailureRegion,
    failure_region,
    gaussianity,
    project_gaussian,
    residual_generate,
    search_latent,
)
from retouch.audit.sage.pipeline import PipelineGenerator
from retouch.audit.sage.prompts import search_prompt
from retouch.audit.sage.tokens import search_token
from retouch.core.cards import Card
from retouch.core.diffusion.findings import Findings
from retouch.core.errors import InputError, one_of

__all__ = [
    "CARD",
    "FailureRegion",
    "FailureReport",
    "ImageJudge",
    "PipelineGenerator",
    "Rate",
    "SearchResult",
    "distinct",
    "ensemble_log_prob",
    "failure_region",
    "gaussianity",
    "judge",
    "project_gaussian",
    "residual_generate",
    "sage",
    "search_latent",
    "search_prompt",
    "search_token",
]

CARD = Card(
    title="SAGE: adversarial search for failures of text-to-image models",
    room="audit",
    paper="arXiv:2306.00974",
    shape="probe",
    line="Searches latents, token embeddings and prompts that are natural and make a text-to-image model fail.",
    tags=("diffusion", "text-to-image", "failure modes", "adversarial search", "no training"),
)

SPACES = ("latent", "token", "prompt")


def sage(
    pipeline: Any,
    prompt: Any,
    classifiers: Sequence[Classifier],
    label: int | None,
    *,
    space: str = "latent",
    target: int | None = None,
    latents: int | Tensor = 16,
    held_out: int | Sequence[Classifier] = 1,
    times: int = 20,
    guidance_scale: float = 7.5,
    language_model: nn.Module | None = None,
    tokenizer: Any = None,
    seed: int = 0,
    **settings: Any,
) -> SearchResult:
    """Search a pipeline of diffusers for inputs on which it fails.

    Args:
        pipeline: text-to-image, or DiT for latents; it is not changed.
        prompt: for latents a prompt (or a class of DiT); for a token one or several; for prompts the template, with {}
            in the place of the class.
        classifiers: images in 0 to 1 -> scores; at least three, the last of them held out, see `judge`.
        label: that images of the prompt should show; None if not known, for a token only.
        space: "latent", "token" or "prompt".
        target: class to reach; needed for a token, not used for prompts.
        latents: how many, or the latents themselves.
        held_out: see `judge`.
        times: steps of DDIM.
        guidance_scale: of classifier-free guidance.
        language_model: for prompts.
        tokenizer: of the language model.
        seed: of latents and starts.
        settings: for `search_latent`, `search_token` or `search_prompt`.
    """
    one_of("space", space, SPACES)
    make = PipelineGenerator(pipeline, latents=latents, times=times, guidance_scale=guidance_scale, seed=seed)
    if space == "token":
        if target is None:
            raise InputError("target is None, but must be a class for the token to lead to")
        token = {"embed_dim": make.width, "labels": label, "original": make, "seed": seed, **settings}
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        return search_token(make, prompts, classifiers, target, held_out=held_out, **token)
    if label is None:
        raise InputError("label is None, but must be the class that the images should show")
    if space == "latent":
        through = None if settings.get("gradient") == "full" else 0
        sampler = make.sampler(prompt, through=through)
        settings = {"shrink": True, "seed": seed, **settings}
        return search_latent(
            sampler, make.decode, classifiers, make.z, label, target=target, held_out=held_out, **settings
        )
    if language_model is None or tokenizer is None:
        raise InputError("language_model or tokenizer is None, but prompts are grown by a language model")
    settings = {"template": prompt, "latents": len(make.z), "held_out": held_out, **settings}
    return search_prompt(make.generate, make.words, language_model, tokenizer, classifiers, label, **settings)


def findings(
    pipeline: Any,
    prompt: Any,
    *,
    classifiers: str = "",
    label: str = "",
    count: int = 16,
    steps: int = 20,
    iterations: int = 100,
    step_size: float = 0.05,
    guidance_scale: float = 7.5,
    seed: int = 0,
) -> Findings:
    """Latents on which a prompt fails, those that are confirmed first.

    Args:
        pipeline: of diffusers.
        prompt: text, or a class of DiT.
        classifiers: folders of image classifiers with their processors, with commas between them; the last one takes
            no part in the search and confirms what the others see.
        label: class that images of the prompt should show.
        count: latents to start from.
        steps: of DDIM.
        iterations: of the search, at most.
        step_size: of one, in norms of the latent.
        guidance_scale: of classifier-free guidance.
        seed: of the latents.
    """
    judges, number = load_judges(classifiers, label)
    found = sage(
        pipeline,
        prompt,
        judges,
        number,
        latents=count,
        times=steps,
        guidance_scale=guidance_scale,
        seed=seed,
        steps=iterations,
        step_size=step_size,
    )
    report = found.report
    order = (report.success.long() * 2 + report.fooled.long()).argsort(descending=True, stable=True)
    rows = [
        {
            "image": place,
            "success": bool(report.success[row]),
            "fooled": bool(report.fooled[row]),
            "confirmed": bool(report.verdicts[-1][row]),
            "failed from the start": bool(report.base_failed[row]),
            "natural": bool(report.natural[row]),
        }
        for place, row in enumerate(order.tolist())
    ]
    words = [
        f"{int(report.success.sum())} of {count} latents were turned into failures that the classifier that was held "
        f"out confirms; {int(report.base_failed.sum())} failed from the start. The search made {found.generations} "
        "images.",
        "A classifier is no oracle: look at the first images.",
    ]
    return Findings(
        images=found.images[order], rows=rows, words=words, tensors={"latents": found.inputs[order].detach().cpu()}
    )
