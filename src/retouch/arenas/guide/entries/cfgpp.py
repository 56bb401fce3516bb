"""CFG++ in the arena `guide`."""

from retouch.arenas.contest import Claim, Entry
from retouch.arenas.guide import Outcome, Replica
from retouch.arenas.guide.tasks import inversion, prompts, reconstruction
from retouch.core.diffusion.guidance import Guidance
from retouch.core.diffusion.steering import Steering
from retouch.guide.cfgpp import cfgpp

STEPS = 50  # with which the paper matches its scales and those of plain guidance


def _from_noise(replica: Replica, guidance: Guidance) -> Outcome:
    return prompts.drawn(replica, Steering(guidance=guidance))


SOLVE = {
    inversion.NAME: inversion.guided,
    prompts.NAME: _from_noise,
    reconstruction.NAME: reconstruction.guided,
}


def solve(replica: Replica, *, scale: float = 0.6) -> Outcome:
    """In place of classifier-free guidance, with its own inversion; as strong as it is in 50 steps."""
    return SOLVE[replica.problem.name](replica, cfgpp(scale, reference_steps=STEPS))


def _claim(problem: str, other: str, text: str, measure: str, relation: str = "at most", margin: float = 0.0) -> Claim:
    return Claim(
        text=text,
        problem=problem,
        measure=measure,
        other=other,
        relation=relation,
        margin=margin,
        source="sections 4.1 and 4.2",
    )


ENTRY = Entry(
    name="cfgpp",
    title="CFG++",
    solve=solve,
    settings={"": {"scale": 0.6}, prompts.NAME: {"scale": 0.25}, reconstruction.NAME: {"scale": 0.25}},
    grid={"scale": (0.15, 0.2, 0.25, 0.3, 0.4, 0.6)},
    problems=(inversion.NAME, prompts.NAME, reconstruction.NAME),
    note=(
        "lam is that of 50 steps, multiplied by 50 / steps where there are fewer: 0.6 is what the paper matches with a "
        "scale of 7.5, and 0.25 has the strength of a scale of 3 in the mean over the steps"
    ),
    weakness=(
        "With a score that is exact, CFG++ has no advantage at equal strength. A small network in two dimensions has "
        "nearly that, and so has one that has learned a small world of images well; its effect is on errors of a "
        "learned score, and on scales that burn out."
    ),
    claims=(
        _claim(inversion.NAME, "cfg_75", "Inverted points come back nearer than with plain guidance.", "back"),
        _claim(
            inversion.NAME,
            "cfg_75",
            "It misses what is asked for no more often, within a point.",
            "missed",
            margin=1.0,
        ),
        _claim(inversion.NAME, "cfg_75", "Fewer samples lie outside of the data.", "outside"),
        _claim(
            prompts.NAME,
            "prompts_cfg_3",
            "At equal strength prompts are kept as well as with plain guidance, within a point.",
            "bound",
            "at least",
            -1.0,
        ),
        _claim(prompts.NAME, "prompts_cfg_3", "At equal strength images are nearer to real scenes.", "frechet"),
        _claim(prompts.NAME, "prompts_cfg_3", "Colours are no more saturated.", "saturation"),
        _claim(reconstruction.NAME, "back_cfg_3", "Inverted scenes come back nearer, as latents.", "latent"),
        _claim(reconstruction.NAME, "back_cfg_3", "They come back nearer as images.", "psnr", "at least"),
        _claim(reconstruction.NAME, "back_cfg_3", "More of them are still as they were told.", "told", "at least"),
    ),
)
