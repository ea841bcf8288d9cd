"""Captions of `pyattn.training.scenes`: written by five templates, and parsed back.

    a large blue square in the top left                                 one kind
    two small red circles above a large blue square                     two kinds, with a relation where one holds
    there are two small red circles above a large blue square
    in the top row there are two small red circles above a large blue square
    two small red circles in the top row and a large blue square in the bottom left
    two red circles that are small are above a blue square that is large

A place is said of one object, which has a cell, and of several that share a row or a column. A relation holds where it
does of every two objects of the two kinds.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pyattn.check import PyattnError
from pyattn.training.scenes import CELLS, COLOURS, SHAPES, SIZES, Kind, Object, Scene

TEMPLATES = 5
_COUNTS = {"two": 2, "three": 3, "four": 4}
_ROWS, _COLUMNS = ("top", "middle", "bottom"), ("left", "middle", "right")
_CENTRE = "in the centre"
_RELATIONS = ("above", "below", "left of")  # the leftmost object is the first kind's, so nothing is right of another


class CaptionError(PyattnError, ValueError):
    """A text is no caption that the templates could have written."""


@dataclass(frozen=True, slots=True)
class Phrase:
    """A kind as a caption names it."""

    count: int
    kind: Kind
    place: str | None
    words: tuple[int, int]  # which words of the caption are its colour and its noun


@dataclass(frozen=True, slots=True)
class Description:
    """What a caption says."""

    phrases: tuple[Phrase, ...]
    relation: str | None  # of the first phrase to the second

    def is_of(self, scene: Scene) -> bool:
        """Whether it names exactly the scene's objects, and all that it says of where they are is true."""
        counts = Counter({phrase.kind: phrase.count for phrase in self.phrases})
        if len(counts) < len(self.phrases) or counts != Counter(each.kind for each in scene.objects):
            return False
        found = [scene.of(phrase.kind) for phrase in self.phrases]
        places = [(phrase.place, _place(objects)) for phrase, objects in zip(self.phrases, found, strict=True)]
        is_there = all(said is None or said == true for said, true in places)
        return is_there and (self.relation is None or self.relation in _relations(found[0], found[1]))


def captions(scene: Scene) -> tuple[str, ...]:
    """The scene's caption by each of the TEMPLATES."""
    groups = [(kind, scene.of(kind)) for kind in scene.kinds]
    return _of_one(*groups[0]) if len(groups) == 1 else _of_two(*groups)


def longest(size: Callable[[str], int]) -> int:
    """A bound of what captions come to, by a size that adds up over words."""

    def most(words: Iterable[str]) -> int:
        return max(map(size, words))

    be, place = most(("is", "are")), most((*_CELLS, *_LINES))
    named = most(("a", "an", *_COUNTS)) + most(SIZES) + most(COLOURS) + most(_NOUNS)
    joint = most((*_RELATIONS, "and"))
    return (
        max(place + size("there") + be + 2 * named, 2 * (named + place), 2 * (named + size("that") + be) + be) + joint
    )


def parse(caption: str) -> Description:
    """What a caption says.

    Raises:
        CaptionError: it has another form than those of the templates; a wrong article, number or verb is one.
    """
    if (found := _CAPTION.fullmatch(caption)) is None:
        raise CaptionError(f"caption: expected one of the templates', got {caption[:200]!r}")
    if found["lead"] and found["place1"]:
        raise CaptionError(f"caption: expected one place of a kind, got two in {caption[:200]!r}")
    phrases = [phrase for phrase in (_phrase(found, number) for number in (1, 2)) if phrase is not None]
    verbs = [verb for name in ("there", "lead_there", "verb") if (verb := found[name])]
    if verbs not in ([], [_be(phrases[0].count)]):
        raise CaptionError(
            f"caption: expected {_be(phrases[0].count)} of {phrases[0].count}, once, got {caption[:200]!r}"
        )
    return Description(tuple(phrases), found["relation"])


def _of_one(kind: Kind, objects: tuple[Object, ...]) -> tuple[str, ...]:
    plain, place = _named(kind, len(objects)), _place(objects)
    there = f"there {_be(len(objects))}"
    placed = plain if place is None else f"{plain} {place}"
    led = f"{there} {plain}" if place is None else f"{place} {there} {plain}"
    predicate = _named(kind, len(objects), by_predicate=True)
    return placed, f"{there} {placed}", led, plain, predicate if place is None else f"{predicate} {place}"


def _of_two(first: tuple[Kind, tuple[Object, ...]], second: tuple[Kind, tuple[Object, ...]]) -> tuple[str, ...]:
    (a, of_a), (b, of_b) = first, second
    relation = next(iter(_relations(of_a, of_b)), None)
    joint = relation or "and"
    plain_a, plain_b = _named(a, len(of_a)), _named(b, len(of_b))
    placed = [
        name if (place := _place(objects)) is None else f"{name} {place}"
        for name, objects in ((plain_a, of_a), (plain_b, of_b))
    ]
    verb = "" if relation is None else f"{_be(len(of_a))} "
    simple = f"{plain_a} {joint} {plain_b}"
    there, place = f"there {_be(len(of_a))} {simple}", _place(of_a)
    return (
        simple,
        there,
        there if place is None else f"{place} {there}",
        " and ".join(placed),
        f"{_named(a, len(of_a), by_predicate=True)} {verb}{joint} {_named(b, len(of_b), by_predicate=True)}",
    )


def _named(kind: Kind, count: int, *, by_predicate: bool = False) -> str:
    """A kind with its number; by_predicate: with its size behind it."""
    words = f"{kind.colour} {_noun(kind.shape, count)}"
    words = words if by_predicate else f"{kind.size} {words}"
    number = _article(words) if count == 1 else next(word for word, value in _COUNTS.items() if value == count)
    return f"{number} {words} that {_be(count)} {kind.size}" if by_predicate else f"{number} {words}"


def _noun(shape: str, count: int) -> str:
    if count == 1:
        return shape
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def _article(words: str) -> str:
    return "an" if words[0] in "aeiou" else "a"


def _be(count: int) -> str:
    return "is" if count == 1 else "are"


def _place(objects: tuple[Object, ...]) -> str | None:
    """Where one object is, or several that share a row or a column."""
    rows, columns = {each.row for each in objects}, {each.column for each in objects}
    if len(objects) == 1:
        row, column = rows.pop(), columns.pop()
        return _cell_name(row, column)
    if len(rows) == 1:
        return f"in the {_ROWS[rows.pop()]} row"
    return f"in the {_COLUMNS[columns.pop()]} column" if len(columns) == 1 else None


def _cell_name(row: int, column: int) -> str:
    is_centre = row == column == CELLS // 2
    return _CENTRE if is_centre else f"in the {_ROWS[row]} {_COLUMNS[column]}"


def _relations(first: tuple[Object, ...], second: tuple[Object, ...]) -> list[str]:
    """Those that hold of every object of the first and every one of the second."""
    pairs = [(a, b) for a in first for b in second]
    holds = {
        "above": all(a.row < b.row for a, b in pairs),
        "below": all(a.row > b.row for a, b in pairs),
        "left of": all(a.column < b.column for a, b in pairs),
    }
    return [name for name, held in holds.items() if held]


def _phrase(found: re.Match[str], number: int) -> Phrase | None:
    """The first or second phrase of a caption; None if it has no second."""
    if (colour := found[f"colour{number}"]) is None:
        return None
    count, noun = _COUNTS.get(found[f"number{number}"], 1), found[f"noun{number}"]
    before, behind = found[f"size{number}"], found[f"predicate{number}"]
    shape = next(shape for shape in SHAPES if noun in (shape, _noun(shape, 2)))
    kind = Kind(before or behind or "", colour, shape)
    place = found[f"place{number}"] or (found["lead"] if number == 1 else None)
    if place is not None and (count == 1) != (place in _CELLS):
        raise CaptionError(f"caption: expected a cell of one object, a row or a column of several, got {place} of "
                           f"{count} in {found[0][:200]!r}")  # fmt: skip
    expected = _named(kind, count, by_predicate=behind is not None)
    if found[f"named{number}"] != expected:  # a wrong article or number, or a size that is missing or said twice
        raise CaptionError(f"caption: expected {expected!r}, got {found[f'named{number}']!r} in {found[0][:200]!r}")
    words = tuple(found[0].count(" ", 0, found.start(f"{name}{number}")) for name in ("colour", "noun"))
    return Phrase(count, kind, place, (words[0], words[1]))


def _pattern() -> re.Pattern[str]:
    """Of a caption; what has to agree within it is not looked at."""
    place, sizes, relations = ("|".join(words) for words in ((*_CELLS, *_LINES), SIZES, _RELATIONS))

    def phrase(number: int) -> str:
        count = f"(?P<number{number}>an?|{'|'.join(_COUNTS)})"
        middle = f"(?:(?P<size{number}>{sizes}) )?(?P<colour{number}>{'|'.join(COLOURS)})"
        behind = f"(?: that (?:is|are) (?P<predicate{number}>{sizes}))?"
        named = f"(?P<named{number}>{count} {middle} (?P<noun{number}>{'|'.join(_NOUNS)}){behind})"
        return f"{named}(?: (?P<place{number}>{place}))?"

    start = f"(?:(?P<lead>{place}) there (?P<lead_there>is|are) |there (?P<there>is|are) )?"
    joint = f"(?: (?:and|(?:(?P<verb>is|are) )?(?P<relation>{relations})) {phrase(2)})?"
    return re.compile(f"{start}{phrase(1)}{joint}")


_CELLS = tuple(_cell_name(row, column) for row in range(CELLS) for column in range(CELLS))
_LINES = (*(f"in the {name} row" for name in _ROWS), *(f"in the {name} column" for name in _COLUMNS))
_NOUNS = tuple(_noun(shape, count) for shape in SHAPES for count in (2, 1))
_CAPTION = _pattern()
