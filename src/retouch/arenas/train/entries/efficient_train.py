"""EfficientTrain in the arena `train`."""

from typing import Literal

from retouch.arenas.contest import Claim, Entry
from retouch.arenas.train import Replica, Solution
from retouch.arenas.train.tasks.resolution import SIZE, STRIDE, Compute
from retouch.train.efficient_train import EfficientTrain, efficient_train_curriculum


def solve(replica: Replica, *, plusplus: bool = False, multiple: int = STRIDE) -> Solution:
    """A callback on batches; as many steps as all others."""
    compute = Compute()
    preset: Literal["iccv", "plusplus_deit"] = "plusplus_deit" if plusplus else "iccv"
    curriculum = efficient_train_curriculum(SIZE, multiple=int(multiple), preset=preset)
    return replica.train(callbacks=[EfficientTrain(curriculum), compute], own=compute.total)


ENTRY = Entry(
    name="efficient_train",
    title="EfficientTrain",
    solve=solve,
    settings={"": {"plusplus": False, "multiple": STRIDE}},
    grid={"plusplus": (False, True), "multiple": (2, STRIDE)},
    problems=("resolution",),
    note="without its augmentation, which plain training has not either",
    weakness="30 epochs of 1200 images are short for it; digits change size under batch statistics at every stage.",
    claims=(
        Claim(
            text="EfficientTrain needs at most 0.72 of the compute.",
            problem="resolution",
            measure="compute",
            other="plain",
            relation="at most",
            factor=0.72,
        ),
        Claim(
            text="Its test error is within 1.5 points of that of training at full size.",
            problem="resolution",
            measure="error",
            other="plain",
            relation="within",
            margin=1.5,
        ),
        Claim(
            text="Its test error is no higher than that of plain training with as much compute.",
            problem="resolution",
            measure="error",
            other="short",
            relation="at most",
        ),
        Claim(
            text="It reaches an error of 2% in less time than plain training.",
            problem="resolution",
            measure="wait",
            other="plain",
            relation="at most",
        ),
    ),
)
