"""As `prompts`, but with three things, where the model has learned from scenes of one or two.

It draws two of the three, and draws them well: the neglect that A-STAR and its kin are made against.
"""

from retouch.arenas.guide.tasks.prompts import task

NAME = "crowded"
TASK = task(
    NAME,
    3,
    "Three things are asked for in words of the shapes' text-to-image model, which has never seen more than two.",
)
