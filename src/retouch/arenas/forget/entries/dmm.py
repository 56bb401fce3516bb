"""DMM in the arena `forget`: datamodels from really trained subset models, kept for all requests."""

import torch
from torch import nn

from retouch.arenas.contest import Claim, Entry
from retouch.arenas.forget import ForgetProblem, Replica
from retouch.forget.dmm import datamodel_matching, fit_datamodels, half_subsets

MODELS = {"class": 800, "subset": 800, "subpopulation": 2000}
QUICK = {"class": 16, "subset": 16, "subpopulation": 800}


def shared(problem: ForgetProblem) -> None:
    """Train the subset models and fit the datamodel."""
    count = (QUICK if problem.terms.quick else MODELS)[problem.name]
    masks = half_subsets(count, len(problem.train), seed=problem.root)

    def outputs() -> dict[str, torch.Tensor]:
        models = problem.train_many("subsets", masks)
        return {"logits": models.logits(problem.train.inputs).half()}

    logits = problem.cached("subsets", (count, problem.root), outputs)["logits"]
    problem.store["datamodel"] = fit_datamodels(masks, logits.float())


def solve(replica: Replica, *, lr: float, epochs: int) -> nn.Module:
    """Match the simulated oracle; labels are not read."""
    return datamodel_matching(
        replica.model,
        replica.train,
        replica.forget_indices,
        replica.problem.store["datamodel"],
        lr=lr,
        epochs=epochs,
        batch_size=64,
        retain_multiplier=8.0,
        forget_multiplier=3.0,
        seed=replica.seed,
    )


ENTRY = Entry(
    name="dmm",
    title="DMM",
    solve=solve,
    shared=shared,
    settings={"": {"lr": 5e-3, "epochs": 20}, "subpopulation": {"lr": 1e-2, "epochs": 40}},
    grid={"lr": (2e-3, 5e-3, 1e-2), "epochs": (5, 20, 40)},
    note="datamodels from 800 subset models (2000 for the subpopulation), in the quick version 16 (800)",
    weakness="Its datamodels have seen random halves of the data, none of them without a whole class, and there are "
    "fewer of them here than training points; the subpopulation is the question it is made for.",
    claims=(
        Claim(
            text="DMM's KLoM on the forget set is below half of fine-tuning's.",
            problem="subpopulation",
            measure="klom_forget",
            other="fine_tune",
            relation="at most",
            factor=0.5,
            source="figure 1, table 1",
        ),
        Claim(
            text="DMM's KLoM on the forget set is below half of gradient ascent's.",
            problem="subpopulation",
            measure="klom_forget",
            other="gradient_ascent",
            relation="at most",
            factor=0.5,
            source="figure 1, table 1",
        ),
        Claim(
            text="DMM's KLoM on the forget set is below half of SCRUB's.",
            problem="subpopulation",
            measure="klom_forget",
            other="scrub",
            relation="at most",
            factor=0.5,
            source="figure 1, table 1",
        ),
        Claim(
            text="DMM's KLoM on the forget set is within 1 nat of retraining's floor.",
            problem="subpopulation",
            measure="klom_forget",
            other="retrain",
            relation="at most",
            margin=1.0,
            source="near retraining, section 5",
        ),
    ),
)
