"""SMoE-Dropout in the arena `train`."""

from retouch.arenas.contest import Claim, Entry
from retouch.arenas.train import Replica, Solution
from retouch.train.smoe_dropout import SMoEDropoutSchedule, set_active_experts


def solve(replica: Replica, *, minimum: int = 4) -> Solution:
    """A schedule of active experts; the error is watched with as many as are active."""
    model, total = replica.build(), replica.task.steps
    schedule = SMoEDropoutSchedule(model, total_steps=total, minimum=int(minimum))
    share = sum(schedule.k_at(step, total) for step in range(total)) / total / schedule.maximum
    set_active_experts(model, int(minimum))
    return replica.train(model, callbacks=[schedule], own=lambda model: {"active": 100 * share})


ENTRY = Entry(
    name="smoe_dropout",
    title="SMoE-Dropout",
    solve=solve,
    settings={"": {"minimum": 4}},
    grid={"minimum": (1, 2, 4, 8)},
    problems=("experts",),
    note="4 to 16 experts; the paper starts at 8 of 16. All experts are computed and weighted, which is faster here.",
    weakness="Two layers of 256 units are too small for time to be saved, and dense training does not overfit here.",
    claims=(
        Claim(
            text="Accuracy rises with the number of active experts, with dips of at most 0.5 points.",
            problem="experts",
            measure="dip",
            other="plain",
            factor=0.0,
            relation="at most",
            margin=0.5,
            source="figure 1",
        ),
        Claim(
            text="With all experts it is at least 1 point more accurate than a learned router.",
            problem="experts",
            measure="at_16",
            other="learned_router",
            relation="at least",
            margin=1.0,
            source="figure 1",
        ),
        Claim(
            text="With all experts it is at least as accurate as a random router without the schedule.",
            problem="experts",
            measure="at_16",
            other="random_router",
            relation="at least",
            source="table 4",
        ),
        Claim(
            text="With all experts it is at least as accurate as dense training.",
            problem="experts",
            measure="at_16",
            other="plain",
            relation="at least",
            source="tables 1 and 2",
        ),
        Claim(
            text="A training step takes less time than one of dense training.",
            problem="experts",
            measure="step",
            other="plain",
            relation="at most",
            source="table 1",
        ),
    ),
)
