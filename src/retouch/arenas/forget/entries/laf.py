"""LAF in the arena `forget`."""

from torch import nn

from retouch.arenas.contest import Claim, Entry
from retouch.arenas.forget import Replica
from retouch.forget.laf import laf


def solve(replica: Replica, *, lr_ue: float, lr_ra: float, temperature: float, epochs: int = 100) -> nn.Module:
    """The representation is what the head takes in; labels are not read."""
    return laf(
        replica.model,
        replica.forget,
        replica.retain,
        lr_ue=lr_ue,
        lr_ra=lr_ra,
        temperature=temperature,
        epochs=epochs,
        latent=8,
        vae_epochs=20,
        seed=replica.seed,
    )


ENTRY = Entry(
    name="laf",
    title="LAF",
    solve=solve,
    settings={
        "class": {"lr_ue": 3e-4, "lr_ra": 1e-3, "temperature": 5.0},
        "subset": {"lr_ue": 1e-3, "lr_ra": 1e-3, "temperature": 5.0},
        "subpopulation": {"lr_ue": 3e-4, "lr_ra": 3e-4, "temperature": 20.0},
    },
    grid={"lr_ue": (3e-4, 1e-3), "lr_ra": (3e-4, 1e-3), "temperature": (5.0, 20.0)},
    note="no labels",
    claims=(
        Claim(
            text="LAF forgets a class: within 5 points of the oracle's forget accuracy.",
            problem="class",
            measure="forget",
            other="retrain",
            relation="within",
            margin=5.0,
        ),
        Claim(
            text="LAF keeps the remaining classes: within 3 points of the oracle's test accuracy.",
            problem="class",
            measure="test",
            other="retrain",
            relation="within",
            margin=3.0,
        ),
        Claim(
            text="LAF without labels is within 5 points of random labels in the gap.",
            problem="class",
            measure="gap",
            other="random_labels",
            relation="at most",
            margin=5.0,
            source="comparable to supervised unlearning, section 5",
        ),
    ),
)
