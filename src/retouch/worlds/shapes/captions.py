"""Captions of scenes, and what a caption says, each the exact inverse of the other.

    caption(scene)            "a large flat red circle left of a small glossy blue square on gray"
    parse("a red circle")     Description((Mention(shape="circle", colour="red"),), relations=(), background=None)

The grammar, where words in brackets may be left out and every relation is one of the first thing to a later one:

    things      nothing | thing [RELATION thing [and RELATION thing ...]]      without relations: thing and thing ...
    thing       a [SIZE] [STYLE] [COLOUR] SHAPE                                "thing" is a word for any shape
    templates   THINGS [on BACKGROUND]
                a picture of THINGS [on a BACKGROUND background]
                a [BACKGROUND] background with THINGS
                [on BACKGROUND] there is THINGS
"""

import re
from collections.abc import Collection
from dataclasses import dataclass

import torch

from retouch.core.errors import InputError, nearest, one_of
from retouch.worlds.shapes.scenes import ATTRIBUTES, BACKGROUNDS, Scene, Thing

RELATIONS = ("left of", "right of", "above", "below")
LONG = {"left of": "to the left of", "right of": "to the right of"}
SAYABLE = (*ATTRIBUTES, "relation", "background")
TEMPLATES = 4
SIDE = 0.05  # how much further to a side the centre of a thing must be for a relation to hold


@dataclass(frozen=True)
class Mention:
    """A thing as a caption mentions it; None is what the caption does not say."""

    shape: str | None = None
    colour: str | None = None
    size: str | None = None
    style: str | None = None

    def said(self) -> dict[str, str]:
        """The attributes that are said."""
        return {name: value for name in ATTRIBUTES if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class Description:
    """What a caption says.

    Args:
        things: the things, the first of them being the one that relations start from.
        relations: of the first thing to the second, third and so on; None where none is said.
        background: one of `BACKGROUNDS`, or None.
    """

    things: tuple[Mention, ...]
    relations: tuple[str | None, ...] = ()
    background: str | None = None


def holds(relation: str, one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether a position (x, y), as shares of the image, is on that side of another by at least `SIDE`."""
    one_of("relation", relation, RELATIONS)
    axis, sign = {"left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1)}[relation]
    return sign * (other[axis] - one[axis]) >= SIDE


def relation(one: Thing, other: Thing) -> str | None:
    """Where one thing is, seen from another: along x or along y, whichever parts them more; None if they coincide."""
    x, y = other.x - one.x, other.y - one.y
    pair = ("left of", "right of") if abs(x) >= abs(y) else ("above", "below")
    return next((word for word in pair if holds(word, (one.x, one.y), (other.x, other.y))), None)


def describe(scene: Scene, say: Collection[str] = SAYABLE) -> Description:
    """What there is to say about a scene.

    Args:
        scene: the scene.
        say: which of `SAYABLE` to say.
    """
    for part in say:
        one_of("say", part, SAYABLE)
    mentions = tuple(Mention(**{name: getattr(t, name) for name in ATTRIBUTES if name in say}) for t in scene.things)
    relations = tuple(relation(scene.things[0], t) if "relation" in say else None for t in scene.things[1:])
    return Description(mentions, relations, scene.background if "background" in say else None)


def caption(scene: Scene, *, say: Collection[str] = SAYABLE, template: int = 0) -> str:
    """A scene in words; `parse` gives `describe(scene, say)` back.

    Args:
        scene: the scene.
        say: which of `SAYABLE` to say.
        template: one of four ways to put it, 0 to 3.
    """
    return phrase(describe(scene, say), template)


def reword(
    scene: Scene,
    draw: torch.Generator,
    *,
    say: Collection[str] = SAYABLE,
    always: Collection[str] = ("shape", "colour"),
) -> str:
    """A scene in one of the four ways to put it; what need not always be said is left out half the time.

    Args:
        scene: the scene.
        draw: of the way and of what is left out.
        say: which of `SAYABLE` may be said.
        always: which of these are never left out.
    """
    template, *heard = torch.rand(1 + len(SAYABLE), generator=draw).tolist()
    said = [part for part, u in zip(SAYABLE, heard, strict=True) if part in say and (part in always or u < 0.5)]
    return caption(scene, say=said, template=int(template * TEMPLATES))


def phrase(description: Description, template: int = 0) -> str:
    """A description in words."""
    one_of("template", template, range(TEMPLATES))
    background = description.background
    things = _things(description, LONG if template in (1, 3) else {})
    if template == 0:
        return things + (f" on {background}" if background else "")
    if template == 1:
        return f"a picture of {things}" + (f" on a {background} background" if background else "")
    if template == 2:
        return f"a {background + ' ' if background else ''}background with {things}"
    return (f"on {background} " if background else "") + f"there is {things}"


def _things(description: Description, forms: dict[str, str]) -> str:
    if not description.things:
        return "nothing"
    first, *others = (_noun(mention) for mention in description.things)
    words = [first]
    for i, (relation, other) in enumerate(zip(description.relations, others, strict=True)):
        if i > 0 or relation is None:
            words.append("and")
        words += [forms.get(relation, relation)] if relation else []
        words.append(other)
    return " ".join(words)


def _noun(mention: Mention) -> str:
    words = [mention.size, mention.style, mention.colour, mention.shape or "thing"]
    return with_article(" ".join(word for word in words if word))


def with_article(noun: str) -> str:
    """A noun or a name of a class as a caption has it, such as "an orange star"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _any(words: Collection[str]) -> str:
    return "|".join(words)


_NOUN = re.compile(
    rf"an? (?:({_any(ATTRIBUTES['size'])}) )?(?:({_any(ATTRIBUTES['style'])}) )?"
    rf"(?:({_any(ATTRIBUTES['colour'])}) )?({_any(ATTRIBUTES['shape'])}|thing)(?: |$)"
)
_LINK = re.compile(rf"(and )?(?:(?:to the )?({_any(RELATIONS)}) )?")
_FRAMES = [
    re.compile(frame.replace("BACK", f"(?P<background>{_any(BACKGROUNDS)})"))
    for frame in (
        r"a picture of (?P<things>.+?)(?: on a BACK background)?",
        r"a (?:BACK )?background with (?P<things>.+)",
        r"(?:on BACK )?there is (?P<things>.+)",
        r"(?P<things>.+?)(?: on BACK)?",
    )
]


def parse(caption: str) -> Description:
    """What a caption says; any words that `phrase` can make, in any case.

    Raises:
        InputError: if the caption is not one of this world's.
    """
    text = " ".join(caption.lower().split())
    for frame in _FRAMES:
        found = frame.fullmatch(text)
        if found is not None:
            things, relations = _parse_things(found["things"], caption)
            return Description(things, relations, found["background"])
    raise _unreadable(caption)


def _parse_things(text: str, caption: str) -> tuple[tuple[Mention, ...], tuple[str | None, ...]]:
    if text == "nothing":
        return (), ()
    mentions: list[Mention] = []
    relations: list[str | None] = []
    at = 0
    while at < len(text):
        if mentions:
            link = _LINK.match(text, at)
            if link is None or not link[0] or (len(mentions) > 1 and not link[1]):
                raise _unreadable(caption)
            if len(mentions) == 1 and link[1] and link[2]:
                raise _unreadable(caption)  # "a circle and left of a square" has no thing to be left of
            relations.append(link[2])
            at = link.end()
        noun = _NOUN.match(text, at)
        if noun is None:
            raise _unreadable(caption)
        size, style, colour, shape = noun.groups()
        mentions.append(Mention(None if shape == "thing" else shape, colour, size, style))
        at = noun.end()
    return tuple(mentions), tuple(relations)


def _unreadable(caption: str) -> InputError:
    unknown = next((word for word in caption.lower().split() if word not in VOCABULARY), None)
    hint = f"; it does not know {unknown!r}.{nearest(unknown, VOCABULARY)}" if unknown else ""
    return InputError(
        f"caption is {caption!r}, but must be in the world's words, such as "
        f'"a large red circle left of a blue square on gray"{hint}'
    )


def tokenize(caption: str) -> list[int]:
    """A caption as numbers in `VOCABULARY`."""
    words = caption.lower().split()
    for word in words:
        one_of("A word of the caption", word, VOCABULARY)
    return [VOCABULARY.index(word) for word in words]


VOCABULARY = tuple(
    sorted(
        {"a", "an", "and", "background", "is", "nothing", "of", "on", "picture", "the", "there", "thing", "to", "with"}
        | {word for words in ATTRIBUTES.values() for word in words}
        | {word for relation in RELATIONS for word in relation.split()}
        | set(BACKGROUNDS)
    )
)
