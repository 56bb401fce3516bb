"""Perturbed-attention guidance in the arena `guide`."""

from retouch.arenas.contest import Claim, Entry
from retouch.arenas.guide import Outcome, Replica
from retouch.arenas.guide.tasks import free, prompts, unprompted
from retouch.core.diffusion.steering import Steering
from retouch.guide.pag import pag


def _digits(replica: Replica, steering: Steering) -> Outcome:
    return free.drawn(replica, lambda denoiser: steering)


SOLVE = {
    free.NAME: _digits,
    prompts.NAME: prompts.drawn,  # on top of classifier-free guidance
    unprompted.NAME: unprompted.drawn,
}


def solve(replica: Replica, *, scale: float = 3.0, layers: str = "mid") -> Outcome:
    """Away from what the model predicts when chosen layers of self-attention see no other token."""
    return SOLVE[replica.problem.name](replica, Steering(guidance=pag(scale, layers)))


def _claim(problem: str, other: str, text: str, measure: str, relation: str = "at most", margin: float = 0.0) -> Claim:
    return Claim(
        text=text,
        problem=problem,
        measure=measure,
        other=other,
        relation=relation,
        margin=margin,
        source="section 4",
    )


ENTRY = Entry(
    name="pag",
    title="PAG",
    solve=solve,
    settings={
        free.NAME: {"scale": 1.0, "layers": "down_blocks.1"},
        prompts.NAME: {"scale": 3.0, "layers": "mid"},
        unprompted.NAME: {"scale": 1.0, "layers": "mid"},
    },
    grid={"scale": (0.3, 1.0, 3.0), "layers": ("mid", "up_blocks.0", "down_blocks.1")},
    problems=(free.NAME, prompts.NAME, unprompted.NAME),
    note="one more call a step: two without a prompt, three on top of classifier-free guidance",
    weakness=(
        "Attention of these networks has 4 x 4 or 8 x 8 tokens: there is little structure that it alone could carry. "
        "And where a model is nearly right already, guidance only narrows."
    ),
    claims=(
        _claim(
            free.NAME,
            "free_plain",
            "A classifier is sure of 5 points more of its images.",
            "unsure",
            margin=-5.0,
        ),
        _claim(free.NAME, "free_plain", "They are nearer to real digits.", "distance"),
        _claim(free.NAME, "twice", "They are nearer than with as many calls spent on twice the steps.", "distance"),
        _claim(
            unprompted.NAME,
            "unprompted_plain",
            "Without a prompt, 5 points more of the images are scenes of this world.",
            "valid",
            "at least",
            5.0,
        ),
        _claim(unprompted.NAME, "unprompted_plain", "They are nearer to real scenes.", "frechet"),
        _claim(
            unprompted.NAME,
            "unprompted_twice",
            "They are nearer than with as many calls spent on twice the steps.",
            "frechet",
        ),
        _claim(
            prompts.NAME,
            "prompts_cfg_3",
            "On top of classifier-free guidance, prompts are kept at least as well.",
            "bound",
            "at least",
        ),
        _claim(prompts.NAME, "prompts_cfg_3", "Images are nearer to real scenes than with it alone.", "frechet"),
        _claim(
            prompts.NAME,
            "prompts_cfg_more",
            "Images are nearer than with as many calls spent on more steps.",
            "frechet",
        ),
    ),
)
