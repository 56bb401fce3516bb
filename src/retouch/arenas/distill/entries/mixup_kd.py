"""Mixup distillation in the arena `distill`."""

from retouch.arenas.contest import Claim, Entry
from retouch.arenas.distill import Replica, Solution
from retouch.arenas.distill.tasks.mixes import NAME, mixing


def solve(replica: Replica, *, mix_fraction: float = 0.1, beta: float = 1.0) -> Solution:
    """Partial mixup, and logits scaled by their spread."""
    return mixing(replica, mix_fraction=mix_fraction, beta=beta)


OTHERS = {
    "kd": "classic distillation",
    "kd_full_mixup": "classic distillation on fully mixed batches",
    "kd_partial_mixup": "classic distillation with a tenth of each batch mixed: what the scaling brings",
    "std_scaling": "the scaling without mixed samples: what mixing brings",
}

ENTRY = Entry(
    name="mixup_kd",
    title="Mixup distillation",
    solve=solve,
    settings={"": {"mix_fraction": 0.5}},
    grid={"mix_fraction": (0.1, 0.5, 1.0), "beta": (0.2, 0.4, 1.0)},
    problems=("digits", "cnn_vit", "vit_mlp", "few", "noisy", NAME),
    note="gamma 0.1, alpha 0.9; calibration and entropy are of the logits as they are, whose size the loss leaves open",
    weakness="Digits are so easy that a teacher is nearly certain of them, mixed or not, and mixing adds little to the "
    "scaling.",
    claims=tuple(
        Claim(
            text=f"Mixup distillation beats {text}.",
            problem=NAME,
            measure="error",
            other=other,
            relation="at most",
            source="sections 3 and 4",
        )
        for other, text in OTHERS.items()
    ),
)
