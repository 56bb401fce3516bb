"""A share of the data, with and without a teacher that has seen all of it.

Small-scale study of distillation on pruned data: 3, 10, 30 and 50% of 1000 digits, kept at random or by EL2N, under
several weights of the teacher, and with teachers of other widths.
"""

from retouch.arenas.contest import Claim, Entry
from retouch.arenas.distill.tasks._pruned import CLEAN, pruned_task, rows, taught_by

CAPACITY = Claim(
    text="Of 3%, a teacher four times as wide makes a worse student.",
    problem=CLEAN,
    measure="error_3",
    other="pruned_data",
    relation="at least",
    source="section 5",
)
WIDTHS = {"wide_teacher": (256, (CAPACITY,)), "narrow_teacher": (32, ())}

TASK = pruned_task(
    CLEAN,
    "A network of three layers, taught on a share of 1000 digits by one of its own kind that has seen them all.",
    baselines=(
        *rows(CLEAN),
        *(
            Entry(
                name=name,
                title=f"random share, teacher of width {width}",
                kind="baseline",
                solve=taught_by(width),
                problems=(CLEAN,),
                claims=claims,
            )
            for name, (width, claims) in WIDTHS.items()
        ),
    ),
)
