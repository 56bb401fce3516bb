"""CutMix in the arena `train`."""

from retouch.arenas.contest import Claim, Entry
from retouch.arenas.train import Replica, Solution
from retouch.train.cutmix import CutMix


def solve(replica: Replica, *, probability: float = 0.5) -> Solution:
    """A callback on batches."""
    return replica.train(callbacks=[CutMix(probability=probability)])


ENTRY = Entry(
    name="cutmix",
    title="CutMix",
    solve=solve,
    settings={"": {"probability": 0.5}},
    grid={"probability": (0.25, 0.5, 1.0)},
    problems=("digits", "cues"),
    weakness="The paper trains for hundreds of epochs on large images; here are 8x8 pixels and 400 steps.",
    claims=(
        Claim(
            text="CutMix lowers the test error.",
            problem="digits",
            measure="error",
            other="plain",
            relation="at most",
            source="table 3",
        ),
        Claim(
            text="CutMix lowers the calibration error.",
            problem="digits",
            measure="calibration",
            other="plain",
            relation="at most",
            source="section 4.4",
        ),
        Claim(
            text="CutMix makes a network use the hard cue too: at least 8 points fewer errors with it alone.",
            problem="cues",
            measure="without_easy",
            other="plain",
            relation="at most",
            margin=-8.0,
            source="section 3.2: attend to less discriminative parts",
        ),
        Claim(
            text="It costs less than 2 points where both cues are there.",
            problem="cues",
            measure="error",
            other="plain",
            relation="at most",
            margin=2.0,
        ),
    ),
)
