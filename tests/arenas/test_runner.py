"""The runner, on an arena that takes no time."""

import json
from dataclasses import dataclass

import pytest

from retouch.arenas import contest
from retouch.arenas.contest import Answer, Arena, Claim, Entry, Measure, Picture, Terms
from retouch.arenas.runner import EVIDENCE, peak_memory, run, search
from retouch.core.errors import Diverged, InputError


@dataclass
class Guess:
    name: str
    terms: Terms

    def replica(self, number):
        return number + (100 if self.terms.search else 0)


calls = []


def solving(offset):
    def solve(replica, *, step=0):
        calls.append((offset, replica, step))
        if step == 13:
            raise Diverged("went wrong")
        return replica + offset + step

    return solve


def guessing(**changes):
    entries = (
        Entry(name="original", title="original", kind="original", solve=solving(10)),
        Entry(name="oracle", title="oracle", kind="oracle", solve=solving(0)),
        Entry(
            name="clever",
            title="clever",
            solve=solving(1),
            settings={"easy": {"step": 1}},
            grid={"step": (0, 5, 13)},
            claims=(
                Claim(text="near", problem="easy", measure="error", other="oracle", relation="within", margin=3.0),
                Claim(text="exact", problem="easy", measure="error", other="oracle", relation="within", margin=1.0),
            ),
        ),
        Entry(name="elsewhere", title="elsewhere", solve=solving(2), problems=("hard",)),
    )
    settings = {
        "name": "guess",
        "question": "?",
        "problems": {"easy": "easy one", "hard": "hard one"},
        "measures": {"error": Measure(title="error", better="low"), "speedup": Measure(title="speed-up")},
        "prepare": Guess,
        "measure": lambda problem, solutions: {
            "error": [float(s - problem.replica(k)) for k, s in enumerate(solutions)]
        },
        "order": "error",
        "baselines": lambda: entries,
        "pictures": lambda problem: [Picture(image=[[0.0, 1.0]], title="x", group="g")],
        "answers": lambda problem, solution: [Answer(text=str(solution), image=[[0.5]])],
        "words": lambda name, rows: [f"{name}: {len(rows)} rows"],
    }
    return Arena(**{**settings, **changes})


@pytest.fixture(autouse=True)
def no_entry_files(monkeypatch):
    calls.clear()
    monkeypatch.setattr(contest.Arena, "entries", lambda self: list(self.baselines()))


def test_rows_claims_words_and_evidence(tmp_path):
    evidence = run(guessing(), tmp_path, terms=Terms(replicas=3))
    easy = evidence["problems"]["easy"]
    assert list(easy["rows"]) == ["original", "oracle", "clever"]
    assert easy["rows"]["clever"]["values"]["error"] == [2.0, 2.0, 2.0]  # offset 1, and step 1 from the settings
    assert easy["rows"]["clever"]["settings"] == {"step": 1}
    assert [made["holds"] for made in easy["claims"]] == [True, False]
    assert easy["words"] == ["easy: 3 rows"]
    (answer,) = easy["rows"]["clever"]["answers"]
    assert answer["png"].startswith("data:image/png;base64,")
    assert {name: answer[name] for name in ("text", "right")} == {"text": "2", "right": None}
    assert easy["pictures"][0]["png"].startswith("data:image/png;base64,")
    assert len(easy["rows"]["clever"]["values"]["seconds"]) == 3
    assert "speedup" in easy["rows"]["clever"]["values"]
    assert "elsewhere" in evidence["problems"]["hard"]["rows"]
    assert json.loads((tmp_path / EVIDENCE).read_text()) == evidence


def test_what_is_there_is_not_run_again(tmp_path):
    run(guessing(), tmp_path, problems=["easy"], only=["clever"], terms=Terms(replicas=2))
    before = len(calls)
    run(guessing(), tmp_path, problems=["easy"], terms=Terms(replicas=2))
    assert len(calls) == before
    run(guessing(), tmp_path, problems=["easy"], terms=Terms(replicas=3))  # other terms: all of it again
    assert len(calls) == before + 9


def test_a_stopped_run_goes_on(tmp_path):
    def broken(replica, **settings):
        raise KeyboardInterrupt

    whole = guessing()
    entries = [*whole.baselines()[:2], Entry(name="clever", title="clever", solve=broken)]
    with pytest.raises(KeyboardInterrupt):
        run(guessing(baselines=lambda: entries), tmp_path, problems=["easy"], terms=Terms(replicas=2))
    assert len(calls) == 4
    evidence = run(whole, tmp_path, problems=["easy"], terms=Terms(replicas=2))
    assert len(calls) == 6
    assert list(evidence["problems"]["easy"]["rows"]) == ["original", "oracle", "clever"]


def test_search_uses_other_seeds_and_leaves_out_what_diverges():
    found = search(guessing(), "clever", "easy", replicas=2)
    assert [settings for settings, _ in found] == [{"step": 0}, {"step": 5}]
    assert found[0][1]["error"] == 1.0
    assert {replica for _, replica, _ in calls} == {100, 101}


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(InputError, match="no entry 'clevr'.*Did you mean clever"):
        run(guessing(), tmp_path, only=["clevr"])
    with pytest.raises(InputError, match="no problem 'esy'.*Did you mean easy"):
        run(guessing(), tmp_path, problems=["esy"])


def test_peak_memory_sees_a_large_block():
    with peak_memory() as nothing:
        pass
    with peak_memory() as large:
        block = bytearray(200 * 2**20)
        block[:: 2**12] = b"x" * len(block[:: 2**12])
        del block
    if large[0] == large[0]:  # not a number where the kernel does not tell
        assert large[0] > 150
        assert nothing[0] < 50
