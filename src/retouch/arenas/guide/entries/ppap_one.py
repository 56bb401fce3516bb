"""PPAP with a single expert in the arena `guide`."""

from retouch.arenas.contest import Entry
from retouch.arenas.guide.entries.ppap import ENTRY as SEVERAL
from retouch.arenas.guide.entries.ppap import solve

ENTRY = Entry(
    name="ppap_one",
    title="PPAP, one expert",
    kind="baseline",
    solve=lambda replica, **settings: solve(replica, experts=1, **settings),
    settings=SEVERAL.settings,
    grid=SEVERAL.grid,
    shared=SEVERAL.shared,
    problems=SEVERAL.problems,
)
