"""DisWOT in the arena `distill`."""

from retouch.arenas.contest import Entry
from retouch.arenas.distill.tasks.architectures import CHEAP, NAME, by, claim, diswot, prepare

ENTRY = Entry(
    name="diswot",
    title="DisWOT",
    solve=by(diswot),
    shared=prepare,
    grid={"combine": ("sum", "rank"), "init": ("default", "gaussian"), "repeats": (1, 5)},
    problems=(NAME,),
    settings={NAME: {"combine": "rank", "repeats": 5}},
    note="sum of ranks, one batch of 64, five draws of the weights; the official sum has a row of its own",
    weakness="In a space of 27 small networks of one family, size alone says most of what there is to say; and "
    "a training takes half a second here, so that no score can be very much cheaper.",
    claims=(
        claim("Its scores go with accuracy after distillation: tau is above 0.", "kendall", "any_student"),
        claim("So does even the lower end of its interval.", "low", "any_student"),
        *(
            claim(f"It ranks better than {title}.", "kendall", name)
            for name, title in (
                ("naswot", "NASWOT"),
                ("synflow", "SynFlow"),
                ("parameters", "the number of parameters"),
                ("flops", "the number of operations"),
            )
        ),
        claim("Both terms rank better than relations alone.", "kendall", "relation"),
        claim("Both terms rank better than semantics alone.", "kendall", "semantic"),
        claim("Among students of equal size it still ranks above chance.", "matched", "any_student"),
        claim("Its choice is better than a random one.", "regret", "any_student", relation="at most"),
        CHEAP,
    ),
)
