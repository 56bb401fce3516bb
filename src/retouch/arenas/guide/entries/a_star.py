"""A-STAR in the arena `guide`."""

from typing import Any

from retouch.arenas.contest import Claim, Entry
from retouch.arenas.guide import Outcome, Replica
from retouch.arenas.guide.tasks import _shapes as world
from retouch.arenas.guide.tasks import crowded, prompts
from retouch.core.diffusion.steering import Steering
from retouch.guide.a_star import AStarGuidance, find_tokens
from retouch.worlds import shapes

RESOLUTION = 8  # of the only grid from which this model's images attend to text, as SD's do from 16


def concepts(prompt: str, said: str) -> list[list[int]]:
    """Tokens of the things that a prompt asks for.

    Args:
        prompt: of the task.
        said: "shapes" for their nouns alone, as in the paper, or "phrases" with their colours.
    """
    things = shapes.parse(prompt).things
    words = [str(thing.shape) if said == "shapes" else f"{thing.colour} {thing.shape}" for thing in things]
    return find_tokens(world.denoiser().tokenizer, prompt, words)


def solve(replica: Replica, *, alpha: float = 20.0, said: str = "shapes", **settings: Any) -> Outcome:
    """Gradient steps on the latents before every step, on top of classifier-free guidance."""
    tokens = [concepts(prompt, said) for prompt in replica.given.prompts]
    hook = AStarGuidance(tokens, resolution=RESOLUTION, alpha=alpha, **settings)
    return prompts.drawn(replica, Steering(hooks=[hook]))


def _claim(problem: str, text: str, measure: str, other: str = "cfg_3", margin: float = 0.0) -> Claim:
    return Claim(
        text=text,
        problem=problem,
        measure=measure,
        other=f"{problem}_{other}",
        relation="at least",
        margin=margin,
        source="section 4, where it is CLIP similarity",
    )


ENTRY = Entry(
    name="a_star",
    title="A-STAR",
    solve=solve,
    settings={prompts.NAME: {"alpha": 20.0, "said": "shapes"}, crowded.NAME: {"alpha": 180.0, "said": "shapes"}},
    grid={"alpha": (60.0, 180.0, 540.0), "said": ("shapes", "phrases")},
    problems=(prompts.NAME, crowded.NAME),
    note="the paper gives no step size: 20 is that of Attend-and-Excite; calls do not tell of its backward pass",
    weakness=(
        "It repairs concepts that share places or fade. Maps of 8 x 8 hardly tell small things apart, and where a "
        "model keeps its prompts already, there is nothing to repair, and the steps leave marks."
    ),
    claims=tuple(
        claim
        for problem in (prompts.NAME, crowded.NAME)
        for claim in (
            _claim(problem, "All things are there with their own words more often, by 3 points.", "bound", margin=3.0),
            _claim(problem, "All shapes are there more often.", "objects"),
            _claim(
                problem, "Things are bound more often than with as many calls spent on more steps.", "bound", "cfg_more"
            ),
        )
    ),
)
