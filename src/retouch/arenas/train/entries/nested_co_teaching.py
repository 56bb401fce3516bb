"""Nested dropout and Co-teaching in the arena `train`: both stages, two networks."""

from torch import nn

from retouch.arenas.contest import Claim, Entry
from retouch.arenas.train import Replica, Solution
from retouch.arenas.train.entries import nested_dropout
from retouch.arenas.train.tasks import noise20
from retouch.train.nested_dropout import ChooseKeep, choose_keep


def solve(replica: Replica, *, std: float, forget_rate: float, rate: float, epochs: int) -> Solution:
    """Two networks with nested dropout, fine-tuned on what the other one keeps."""
    validation = replica.split.validation
    one, two = (nested_dropout.solve(which, std=std) for which in (replica, noise20.second(replica)))
    found: list[int] = []

    def finish(pair: nn.Module) -> nn.Module:
        found.append(choose_keep(pair.networks, validation))  # type: ignore[arg-type]
        return pair

    return noise20.fine_tune(
        replica,
        one,
        two,
        rate=rate,
        epochs=epochs,
        co_teaching={"forget_rate": forget_rate},
        callbacks=[ChooseKeep(validation)],
        finish=finish,
        own=lambda pair: {"keep": float(found[-1])},
    )


ENTRY = Entry(
    name="nested_co_teaching",
    title="nested dropout + Co-teaching",
    solve=solve,
    settings=noise20.per_problem(std=10.0, rate=0.01, epochs=40),
    grid={"std": (5.0, 10.0, 25.0), "rate": (0.003, 0.01), "epochs": (20, 40)},
    problems=noise20.PROBLEMS,
    note="two networks in two stages, the mean of their logits; knows the share of wrong labels",
    weakness="Co-teaching from new weights is at its best here: the data are small, the noise is symmetric, and its "
    "share is known.",
    claims=tuple(
        Claim(text=text, problem=problem, measure="error", other=other, relation="at most", source=source)
        for problem in noise20.PROBLEMS
        for text, other, source in (
            (
                "Co-teaching from networks with nested dropout beats Co-teaching from plain ones.",
                "plain_co_teaching",
                "the compression of section III before section IV",
            ),
            (
                "The second stage improves on one network with nested dropout.",
                "nested_dropout",
                "ANIMAL-10N 84.1 against 81.3, Clothing1M 74.9 against 73.1",
            ),
            (
                "Both stages beat Co-teaching from new weights.",
                "co_teaching",
                "Clothing1M 74.9 against 69.2",
            ),
            ("Both stages beat the best dropout.", "tuned_dropout", "Clothing1M 74.9 against 72.8"),
        )
    ),
)
