"""PPAP with a single expert in the arena `guide`."""

from retouch.arenas.contest import Entry
from retouch.arenas.guide.entries.ppap import ENTRY as SEVERAL
from retouch.arenas.guide.entries.ppap import solve
from retouch.arenas.guide.tasks.classes import NAME

ENTRY = Entry(
    name="ppap_one",
    title="PPAP, one expert",
    kind="baseline",
    solve=lambda replica, **settings: solve(replica, experts=1, **settings),
    settings=SEVERAL.settings,
    grid=SEVERAL.grid,
    problems=(NAME,),
)
