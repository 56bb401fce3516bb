"""The index of techniques is complete, and is read without running anything."""

import json
import re
import subprocess
import sys

import pytest

from retouch.core import cards as index
from retouch.core.cards import PACKAGE, ROOMS, SHAPES, Card, cards, find, read_card, room_line
from retouch.core.errors import InputError

# What says "CARD = Card(" in a room, found by a text search that shares nothing with the index.
FILES = [
    path
    for room in ROOMS
    for path in sorted((PACKAGE / room).rglob("*.py"))
    if re.search(r"^CARD = Card\(", path.read_text(), re.MULTILINE)
]
VALID = {"title": "T", "room": "forget", "paper": "arXiv:1", "shape": "probe", "line": "L"}


def technique(path):
    return path.parent.name if path.name == "__init__.py" else path.stem


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of empty rooms that the index reads in place of ours."""
    for room in ROOMS:
        (tmp_path / room).mkdir()
        (tmp_path / room / "__init__.py").write_text(f'"""The room {room}.\n\nMore."""\n')
    monkeypatch.setattr(index, "PACKAGE", tmp_path)
    cards.cache_clear()
    yield tmp_path
    cards.cache_clear()


def write_card(path, **changes):
    path.parent.mkdir(exist_ok=True)
    settings = {**VALID, **changes}
    arguments = ", ".join(f"{key}={value!r}" for key, value in settings.items())
    path.write_text(f'"""The page."""\n\nimport nothing_of_this_name\n\nCARD = Card({arguments})\n')


@pytest.mark.parametrize("path", FILES, ids=technique)
def test_every_technique_file_is_in_the_index_with_a_complete_card(path):
    card = find(technique(path))
    assert card.room == path.relative_to(PACKAGE).parts[0]
    assert card.path == path
    assert card.shape in SHAPES
    assert len(card.title) > 3
    assert re.search(r"arXiv:\d{4}\.\d{4,5}|doi:|https?://", card.paper), card.paper
    assert 20 < len(card.line) <= 140, "one line that says what it does"
    assert "\n" not in card.line
    assert card.tags
    assert len(card.docstring.splitlines()) > 5
    assert "Paper" in card.docstring or card.paper.removeprefix("arXiv:") in card.docstring


@pytest.mark.parametrize("path", FILES, ids=technique)
def test_every_technique_loads_its_plugin(path):
    card = read_card(path)
    assert callable(card.load())
    assert card.load().__module__.startswith(card.module)


def test_the_index_lists_each_technique_once_and_rooms_by_name():
    assert sorted(card.name for card in cards()) == sorted(map(technique, FILES))
    for room in ROOMS:
        names = [card.name for card in cards(room)]
        assert names == sorted(names)
        assert {card.room for card in cards(room)} <= {room}
    assert [card for room in ROOMS for card in cards(room)] == list(cards())


def test_the_index_answers_without_importing_torch_or_a_technique():
    program = (
        "import json, sys, time; start = time.perf_counter(); from retouch.core.cards import cards, find, room_line;"
        "names = [c.name for c in cards()]; page = find('ssd').docstring; line = room_line('forget');"
        "print(json.dumps([names, page, line, list(sys.modules), time.perf_counter() - start]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    names, page, line, modules, seconds = json.loads(done.stdout)
    assert {"ssd", "salun", "dmm", "laf", "s3t"} <= set(names)
    assert page.startswith("Selective Synaptic Dampening")
    assert line
    assert not {"torch", "numpy", "transformers", "accelerate", "sklearn"} & set(modules)
    assert [name for name in modules if name.startswith("retouch.forget.")] == []
    assert seconds < 2


def test_importing_retouch_is_fast_and_loads_nothing_heavy():
    program = (
        "import sys, time; start = time.perf_counter(); import retouch; seconds = time.perf_counter() - start;"
        "print(seconds, [n for n in sys.modules if n in ('torch', 'numpy', 'transformers', 'rich', 'scipy')],"
        "retouch.__version__)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    seconds, rest = done.stdout.split(maxsplit=1)
    assert float(seconds) < 0.3
    assert re.fullmatch(r"\[\] \d+\.\d+\.\d+\S*\n", rest)


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(InputError, match=r"There is no technique 'saluun' here\. Did you mean salun"):
        find("saluun")
    with pytest.raises(InputError, match=r"There is no technique 'sdd' in the room forget\. Did you mean ssd"):
        find("sdd", "forget")
    with pytest.raises(InputError, match="Try: retouch list"):
        find("qqqqqqqqqq")


def test_a_technique_of_another_room_is_not_found():
    with pytest.raises(InputError, match="in the room guide"):
        find("ssd", "guide")


def test_an_unknown_room_suggests_the_nearest():
    with pytest.raises(InputError, match=r"'forgett' is no room; the rooms are train, .*\. Did you mean forget"):
        cards("forgett")


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_says_what_it_is_in_one_line(room):
    assert 10 < len(room_line(room)) <= 140


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"room": "cellar"}, "room is 'cellar', but must be one of train, distill"),
        ({"shape": "thing"}, "shape is 'thing', but must be one of objective, callback"),
        ({"title": ""}, "title of a card is empty"),
        ({"paper": ""}, "paper of a card is empty"),
        ({"line": ""}, "line of a card is empty"),
    ],
)
def test_a_card_that_could_not_be_shown_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        Card(**{**VALID, **change})


def test_techniques_are_files_and_folders_and_are_not_run(package):
    write_card(package / "forget" / "zeta.py")
    write_card(package / "forget" / "alpha.py", tags=("a", "b"))
    write_card(package / "audit" / "probe.py", room="audit", plugin="Probe")
    (package / "forget" / "helper.py").write_text("x = 1\n")
    assert [card.name for card in cards()] == ["alpha", "zeta", "probe"]
    alpha, _, probe = cards()
    assert (alpha.tags, alpha.module, alpha.path) == (("a", "b"), "retouch.forget.alpha", package / "forget/alpha.py")
    assert alpha.docstring == "The page."
    assert (probe.plugin, probe.room) == ("Probe", "audit")


def test_a_technique_that_is_a_folder_is_found(package):
    write_card(package / "forget" / "large" / "__init__.py")
    (card,) = cards("forget")
    assert (card.name, card.module) == ("large", "retouch.forget.large")
    assert card.path == package / "forget" / "large" / "__init__.py"


def test_private_files_are_left_out(package):
    write_card(package / "forget" / "_draft.py")
    assert cards("forget") == ()


@pytest.mark.parametrize("text", ["CARD = Card(title=f'{1}', room='forget')", "CARD = 3"])
def test_a_card_that_cannot_be_read_without_running_the_file_is_refused(tmp_path, text):
    (tmp_path / "new.py").write_text(text)
    with pytest.raises(InputError, match="literal arguments"):
        read_card(tmp_path / "new.py")
