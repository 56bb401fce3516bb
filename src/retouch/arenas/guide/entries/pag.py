"""Perturbed-attention guidance in the arena `guide`."""

from retouch.arenas.contest import Claim, Entry
from retouch.arenas.guide import Outcome, Replica
from retouch.arenas.guide.tasks.free import NAME, drawn
from retouch.core.diffusion.steering import Steering
from retouch.guide.pag import pag


def solve(replica: Replica, *, scale: float = 3.0, layers: str = "mid") -> Outcome:
    """Without a condition."""
    return drawn(replica, lambda denoiser: Steering(guidance=pag(scale, layers)))


def _claim(text: str, measure: str, other: str, margin: float = 0.0) -> Claim:
    return Claim(
        text=text, problem=NAME, measure=measure, other=other, relation="at most", margin=margin, source="section 4"
    )


ENTRY = Entry(
    name="pag",
    title="PAG",
    solve=solve,
    settings={"": {"scale": 1.0, "layers": "down_blocks.1"}},
    grid={"scale": (0.3, 1.0, 3.0), "layers": ("mid", "up_blocks.0", "down_blocks.1")},
    problems=(NAME,),
    note="two calls a step",
    weakness="The middle of this network has 4 x 4 tokens: there is little structure left that attention could carry.",
    claims=(
        _claim("A classifier is sure of 5 points more of its images.", "unsure", "free_plain", margin=-5.0),
        _claim("They are nearer to real digits.", "distance", "free_plain"),
        _claim("They are nearer than with as many calls spent on twice the steps.", "distance", "twice"),
    ),
)
