"""Four times the bags: what attention entropy is for less."""

import functools
from dataclasses import replace

from retouch.arenas.train.tasks import bags

TASK = replace(
    bags.TASK,
    name="more_bags",
    text="120 bags instead of 30, all else as in the problem `bags`.",
    split=functools.partial(bags.draw, count=120),
    baselines=(),
    plots=(),
)
