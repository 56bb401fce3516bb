"""As `noise20`, with 40% of the labels wrong."""

from retouch.arenas.train.tasks import noise20

TASK = noise20.task(0.4)
