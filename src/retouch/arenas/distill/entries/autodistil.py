"""AutoDistil in the arena `distill`."""

from retouch.arenas.contest import Entry
from retouch.arenas.distill.tasks.supernet import CLAIMS, NAME, solve

ENTRY = Entry(
    name="autodistil",
    title="AutoDistil",
    solve=solve,
    settings={NAME: {"share": 0.25}},
    grid={"share": (0.25, 0.5, 0.75, 1.0)},
    problems=(NAME,),
    note="25 steps of the super-network, four students each, and 75 of the chosen one alone",
    weakness="A super-network shares its steps among 54 students, and pays only where many sizes are wanted.",
    claims=CLAIMS,
)
