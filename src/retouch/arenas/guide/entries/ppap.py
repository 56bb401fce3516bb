"""PPAP in the arena `guide`."""

from retouch.arenas.contest import Claim, Entry
from retouch.arenas.guide import Outcome, Replica
from retouch.arenas.guide.tasks.classes import ITERATIONS, NAME, steered
from retouch.core import seeds
from retouch.core.diffusion.process import VP
from retouch.core.diffusion.sampling import sample
from retouch.guide.ppap import ExpertGuidance, add_noise_experts, train_experts


def solve(replica: Replica, *, scale: float = 7.5, experts: int = 5, rank: int = 4, lr: float = 5e-3) -> Outcome:
    """Adapters of the clean classifier, one for each range of noise, trained on what the model samples."""
    given = replica.given
    process = given.denoiser.process
    assert isinstance(process, VP)
    noise = given.noise.new_empty(4000, 2).normal_(generator=seeds.generator(given.seed, "synthetic"))
    made = sample(given.denoiser, noise, times=50)
    adapted = add_noise_experts(given.classifier, num_experts=experts, rank=rank, seed=given.seed)
    train_experts(
        adapted,
        given.classifier,
        made,
        process.alphas_cumprod,
        iterations=ITERATIONS,
        lr=lr,
        class_reduction="sum",
        seed=given.seed,
    )
    return steered(replica, [ExpertGuidance(adapted, given.modes, scale=scale)])


def _claim(text: str, other: str) -> Claim:
    return Claim(text=text, problem=NAME, measure="wrong", other=other, relation="at most", source="tables 1 and 3")


ENTRY = Entry(
    name="ppap",
    title="PPAP",
    solve=solve,
    settings={"": {"scale": 7.5, "lr": 5e-3}},
    grid={"scale": (2.0, 4.0, 7.5), "lr": (1e-3, 5e-3)},
    problems=(NAME,),
    note="five experts, 1000 iterations in all, without labels",
    weakness="Experts share the iterations: each of five has a fifth of what a single one has.",
    claims=(
        _claim("Several noise ranges guide better than one, at as many iterations.", "ppap_one"),
        _claim("Adapted experts guide better than the clean classifier.", "clean_on_noise"),
    ),
)
