"""As `pruned`, with a fifth of the labels wrong: hard samples are then those that nobody should learn from.

The teacher has learned from the wrong labels too.
"""

from retouch.arenas.distill.tasks._pruned import NOISY, pruned_task, rows

TASK = pruned_task(
    NOISY,
    "A network of three layers, taught on a share of 1000 digits, a fifth mislabelled, by one that has seen all.",
    wrong=0.2,
    target=25.0,
    baselines=rows(NOISY),
)
