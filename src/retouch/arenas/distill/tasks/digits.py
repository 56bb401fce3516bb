"""A network of three layers teaches one a third as wide, on a fifth of its data."""

from retouch.arenas.contest import Entry
from retouch.arenas.distill.tasks._pairs import by, js, mlp, reverse_kl, task

TASK = task(
    "digits",
    "A network of three layers, trained on 1000 digits, teaches a narrow one on 200 of them.",
    student=lambda: mlp(24, 24),
    teacher=lambda: mlp(128, 128),
    more=(
        Entry(name="reverse_kl", title="reverse KL", kind="baseline", solve=by(reverse_kl), problems=("digits",)),
        Entry(name="js", title="Jensen-Shannon", kind="baseline", solve=by(js), problems=("digits",)),
    ),
)
