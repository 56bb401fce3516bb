"""PPAP in the arena `guide`."""

from typing import Any

from torch import Tensor

from retouch.arenas.contest import Claim, Entry
from retouch.arenas.guide import Outcome, Replica
from retouch.arenas.guide.tasks import classes, classifier
from retouch.core import seeds
from retouch.core.diffusion.process import VP
from retouch.core.diffusion.sampling import sample
from retouch.guide.ppap import ExpertGuidance, NoiseExperts, add_noise_experts, train_experts


def solve(replica: Replica, **settings: Any) -> Outcome:
    """Adapters of the clean classifier, one for each range of noise, trained on what the model samples."""
    return SOLVE[replica.problem.name](replica, **settings)


def points(replica: Replica, *, scale: float = 7.5, experts: int = 5, lr: float = 5e-3) -> Outcome:
    """On Gaussians."""
    given = replica.given
    noise = given.noise.new_empty(4000, 2).normal_(generator=seeds.generator(given.seed, "synthetic"))
    made = sample(given.denoiser, noise, times=50)
    adapted = _adapted(given, made, experts=experts, rank=4, lr=lr, iterations=classes.ITERATIONS)
    return classes.steered(replica, [ExpertGuidance(adapted, given.modes, scale=scale)])


def shapes(replica: Replica, *, scale: float = 7.5, experts: int = 5, lr: float = 5e-3) -> Outcome:
    """On images of the model of pixels, which are made once for all replicas."""
    given, made = replica.given, classifier.synthetic()
    adapted = _adapted(given, made, experts=experts, rank=8, lr=lr, iterations=classifier.ITERATIONS, batch_size=64)
    return classifier.steered(replica, [ExpertGuidance(adapted.merge(), given.labels, scale=scale)])


SOLVE = {classes.NAME: points, classifier.NAME: shapes}


def _adapted(given: Any, made: Tensor, *, experts: int, rank: int, **settings: Any) -> NoiseExperts:
    process = given.denoiser.process
    assert isinstance(process, VP)
    adapted = add_noise_experts(given.classifier, num_experts=experts, rank=rank, seed=given.seed)
    settings = {"class_reduction": "sum", "seed": given.seed, **settings}
    return train_experts(adapted, given.classifier, made, process.alphas_cumprod, **settings)


def made_once(problem: Any) -> None:
    """The images that experts are trained on."""
    if problem.name == classifier.NAME:
        classifier.synthetic()


def _claim(problem: str, text: str, other: str) -> Claim:
    measure, relation = {classes.NAME: ("wrong", "at most"), classifier.NAME: ("right", "at least")}[problem]
    return Claim(text=text, problem=problem, measure=measure, other=other, relation=relation, source="tables 1 and 3")


ENTRY = Entry(
    name="ppap",
    title="PPAP",
    solve=solve,
    settings={"": {"scale": 7.5, "lr": 5e-3}},
    grid={"scale": (2.0, 4.0, 7.5, 15.0), "lr": (1e-3, 5e-3)},
    shared=made_once,
    problems=(classes.NAME, classifier.NAME),
    note="five experts without labels: 1000 iterations in all on points, 300 on shapes",
    weakness="Experts share the iterations: each of five has a fifth of what a single one has.",
    claims=(
        _claim(classes.NAME, "Several noise ranges guide better than one, at as many iterations.", "ppap_one"),
        _claim(classes.NAME, "Adapted experts guide better than the clean classifier.", "clean_on_noise"),
        _claim(classifier.NAME, "Of shapes too several noise ranges guide better than one.", "ppap_one"),
        _claim(classifier.NAME, "Adapted experts guide better than the clean classifier.", "classifier_on_noise"),
    ),
)
