"""Digits by two layers of experts: what becomes of a model that is run with more or fewer experts than in training."""

import itertools

import torch
from torch import Tensor, nn

from retouch.arenas.contest import Claim, Entry, Measure, Plot
from retouch.arenas.train import Replica, Solution, Split, Task, classification_measures
from retouch.arenas.train.tasks import digits
from retouch.arenas.training import classification_error
from retouch.train.smoe_dropout import SMoEDropoutMLP, set_active_experts

EXPERTS, WIDTH = 16, 16
COUNTS = (1, 2, 4, 8, 12, 16)


class ResidualExperts(nn.Module):
    """Images are embedded, two layers of experts are added to them, and a linear layer tells the classes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(64, 64)
        self.mlps = nn.ModuleList(SMoEDropoutMLP(64, WIDTH, num_experts=EXPERTS) for _ in range(2))
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Images (n, 1, 8, 8) to logits (n, 10)."""
        x = self.embed(images.flatten(1))
        for mlp in self.mlps:
            x = x + mlp(x)
        return self.head(x)


def with_router_that_learns(model: nn.Module) -> nn.Module:
    """Make the routers of a model parameters, in place."""
    for mlp in [layer for layer in model.modules() if isinstance(layer, SMoEDropoutMLP)]:
        for name, value in list(mlp.router.named_buffers()):
            delattr(mlp.router, name)
            mlp.router.register_parameter(name, nn.Parameter(value))
    return model


def with_experts(model: nn.Module, k: int) -> nn.Module:
    """The model with k experts active."""
    set_active_experts(model, k)
    return model


def judge(model: nn.Module, split: Split) -> dict[str, float]:
    """Error and calibration with all experts, and accuracy with k of them, in percent."""
    curve = {k: 100.0 - classification_error(with_experts(model, k), split) for k in COUNTS}
    falls = [one - two for one, two in itertools.pairwise(curve.values())]
    measures = classification_measures(with_experts(model, EXPERTS), split)
    measures |= {"dip": max(0.0, *falls), "beyond": curve[EXPERTS] - curve[4]}
    return measures | {f"at_{k}": accuracy for k, accuracy in curve.items()}


def fixed(replica: Replica) -> Solution:
    """Four random experts in every step."""
    return replica.train(with_experts(replica.build(), 4), own=lambda model: {"active": 400 / EXPERTS})


def learned(replica: Replica) -> Solution:
    """Four experts in every step, chosen by a router that learns."""
    model = with_router_that_learns(with_experts(replica.build(), 4))
    return replica.train(model, own=lambda model: {"active": 400 / EXPERTS})


def adam(parameters: object) -> torch.optim.Optimizer:
    """Adam at 1e-3."""
    return torch.optim.Adam(parameters, lr=1e-3)  # type: ignore[arg-type]


TASK = Task(
    name="experts",
    text="400 handwritten digits; two residual layers of 16 experts each, 800 steps, run with 1 to 16 of them.",
    split=lambda seed, search: digits.draw(seed, search, 400),
    build=ResidualExperts,
    steps=800,
    optimizer=adam,
    judge=judge,
    target=10.0,
    measures={
        **{
            f"at_{k}": Measure(
                title=f"k = {k}",
                unit="%",
                better="high",
                digits=1,
                line=f"Test accuracy with {k} of 16 experts active.",
            )
            for k in COUNTS
        },
        "dip": Measure(
            title="dip", unit="%", better="low", digits=2, line="Largest fall of accuracy from one k to the next."
        ),
        "beyond": Measure(
            title="4 to 16", unit="%", better="high", digits=2, line="Accuracy gained from k = 4 to k = 16."
        ),
        "active": Measure(
            title="active", unit="%", better="low", line="Mean share of experts active in training (100 if not shown)."
        ),
    },
    baselines=(
        Entry(
            name="learned_router",
            title="learned router, 4 experts",
            kind="baseline",
            solve=learned,
            problems=("experts",),
            note="An ordinary mixture of experts: the router is trained with k = 4.",
            claims=(
                Claim(
                    text="A learned router loses at least 0.8 points when 16 experts are active instead of its 4.",
                    problem="experts",
                    measure="beyond",
                    other="plain",
                    factor=0.0,
                    relation="at most",
                    margin=-0.8,
                    source="figure 1",
                ),
            ),
        ),
        Entry(
            name="random_router",
            title="random router, 4 experts",
            kind="baseline",
            solve=fixed,
            problems=("experts",),
            note="SMoE-Dropout without its schedule.",
        ),
    ),
    plots=(
        Plot(
            kind="scatter",
            x="at_4",
            y="at_16",
            problems=("experts",),
            text="Accuracy with 4 and with all experts: learned routers fall from the one to the other.",
        ),
    ),
)
