"""Nested dropout in the arena `train`: one network, the first stage."""

from torch import nn

from retouch.arenas.contest import Claim, Entry
from retouch.arenas.train import Replica, Solution
from retouch.train.nested_dropout import choose_keep, convert, nested_layers


def solve(replica: Replica, *, std: float) -> Solution:
    """Channels to use are chosen on validation data with clean labels."""

    def finish(model: nn.Module) -> nn.Module:
        choose_keep(model, replica.split.validation)
        return model

    def own(model: nn.Module) -> dict[str, float]:
        return {"keep": float(nested_layers(model)[-1].eval_keep)}

    model = convert(replica.build(), std=std, drop_bias=True, inplace=True)
    return replica.train(model, finish=finish, own=own)


NOISY = ("noise20", "noise40", "noise50")

ENTRY = Entry(
    name="nested_dropout",
    title="nested dropout",
    solve=solve,
    settings={"": {"std": 5.0}, "digits": {"std": 100.0}},
    grid={"std": (2.5, 5.0, 10.0, 25.0, 100.0)},
    problems=("digits", *NOISY),
    note="one network, the first stage; `digits` has no wrong labels",
    weakness="Dropout of 0.8, stronger than any share that the paper tries, hinders memorising here as well and leaves "
    "more of the 128 features in use.",
    claims=(
        *(
            Claim(
                text="Nested dropout lowers the test error of plain training.",
                problem=problem,
                measure="error",
                other="plain",
                relation="at most",
                source="ANIMAL-10N 81.3 against 79.4, Clothing1M 73.1 against 67.2",
            )
            for problem in NOISY
        ),
        Claim(
            text="Nested dropout is at least 3 points better than dropout of 0.5.",
            problem="noise40",
            measure="error",
            other="head_dropout",
            relation="at most",
            margin=-3.0,
        ),
        *(
            Claim(
                text="Nested dropout is no worse than dropout with the best share.",
                problem=problem,
                measure="error",
                other="tuned_dropout",
                relation="at most",
                source="ANIMAL-10N 81.3 and 81.3, Clothing1M 73.1 against 72.8",
            )
            for problem in NOISY
        ),
        Claim(
            text="Nested dropout learns fewer of the wrong labels than dropout of 0.5.",
            problem="noise40",
            measure="memorised",
            other="head_dropout",
            relation="at most",
        ),
    ),
)
