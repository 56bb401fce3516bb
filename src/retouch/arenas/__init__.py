"""One question each: the same problem, the same budget and the same measures for every technique that answers it.

An arena is a package with `ARENA = Arena(...)` and a folder `entries` of one file a contestant, each with
`ENTRY = Entry(...)`; entries are found, never listed.
"""
