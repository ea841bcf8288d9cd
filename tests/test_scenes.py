"""Scenes and their captions: functions of a number alone, grammatical, parsed back; and scores of what is told."""

from __future__ import annotations

from collections import Counter

import numpy
import pytest
import torch

from pyattn.check import RangeError
from pyattn.decoding.captions import Caption
from pyattn.training import scene_scores
from pyattn.training.scene_captions import TEMPLATES, CaptionError, captions, longest, parse
from pyattn.training.scene_scores import scores_of
from pyattn.training.scenes import (
    CELLS,
    COLOURS,
    HELD_OUT,
    MOST,
    SHAPES,
    SIDE,
    SIZES,
    Kind,
    Object,
    Scene,
    picture,
    scene,
)

SEEN = [scene(0, number) for number in range(2000)]
UNSEEN = [scene(0, number, held_out=True) for number in range(500)]


def _scene(*objects: tuple[str, int]) -> Scene:
    return Scene(tuple(Object(Kind(*words.split()), cell) for words, cell in objects), (0, 0, 0))


def test_a_scene_is_a_function_of_its_number_alone() -> None:
    assert scene(0, 7) == SEEN[7]
    assert numpy.array_equal(picture(scene(0, 7)), picture(SEEN[7]))
    assert scene(1, 7) != SEEN[7] != scene(0, 7, held_out=True)
    assert len({each.objects for each in SEEN}) > 1800  # of one object there are 630 scenes


def test_scenes_have_everything_that_is_promised_and_no_pair_that_is_held_out() -> None:
    of_kinds = [kind for each in SEEN for kind in each.kinds]
    pairs = {(kind.colour, kind.shape) for kind in of_kinds}
    assert pairs == {(colour, shape) for colour in COLOURS for shape in SHAPES} - set(HELD_OUT)
    assert {kind.size for kind in of_kinds} == set(SIZES)
    assert {len(each.objects) for each in SEEN} == set(range(1, MOST + 1))
    assert {each.cell for one in SEEN for each in one.objects} == set(range(CELLS**2))
    for each in (*SEEN, *UNSEEN):
        assert len({one.cell for one in each.objects}) == len(each.objects) and len(each.kinds) in (1, 2)
    unseen = [{(kind.colour, kind.shape) for kind in each.kinds} for each in UNSEEN]
    assert all(pairs & set(HELD_OUT) for pairs in unseen)
    assert set().union(*unseen) >= set(HELD_OUT)
    # What is held out has its colour and its shape in other pairs.
    assert {colour for colour, _ in pairs} == set(COLOURS) and {shape for _, shape in pairs} == set(SHAPES)


def test_a_picture_shows_each_object_in_its_cell_and_colour_and_nothing_elsewhere() -> None:
    cell = SIDE / CELLS
    for each in SEEN[:50]:
        shown = picture(each)
        assert shown.dtype == numpy.uint8 and shown.shape == (3, SIDE, SIDE)
        background = numpy.array([Counter(channel.flatten().tolist()).most_common(1)[0][0] for channel in shown])
        differs = (abs(shown.astype(int) - background[:, None, None]) > 3).any(0)
        rows, columns = differs.nonzero()
        used = {one.cell for one in each.objects}
        # A pixel on a border may show what is on either side of it.
        whole = [(int((r + 0.5) // cell), int((c + 0.5) // cell)) for r, c in zip(rows, columns, strict=True)
                 if r not in (21, 42) and c not in (21, 42)]  # fmt: skip
        assert {row * CELLS + column for row, column in whole} == used
        for one in each.objects:
            part = shown[:, int(one.row * cell) : int((one.row + 1) * cell), int(one.column * cell) :][
                :, :, : int(cell)
            ]
            expected = 255 * numpy.array(COLOURS[one.kind.colour])
            distance = abs(part.reshape(3, -1).T - expected).max(1).min()
            assert distance < 25, one


def test_sizes_and_shapes_differ_in_area_and_edges_are_smooth() -> None:
    def area(words: str) -> float:
        shown = picture(_scene((words, 4))).astype(float)
        return float((abs(shown - shown[:, :1, :1]).max(0) > 40).sum())

    areas = {(size, shape): area(f"{size} white {shape}") for size in SIZES for shape in SHAPES}
    for shape in SHAPES:
        assert 2 < areas["large", shape] / areas["small", shape] < 5
    assert areas["large", "square"] == pytest.approx((2 * 0.85 * 9.1) ** 2, rel=0.2)
    assert areas["large", "star"] < areas["large", "circle"]
    values = numpy.unique(picture(_scene(("large white circle", 4)))[0])
    assert len(values) > 5  # neither the background nor the object: covered in part


def test_every_caption_is_parsed_and_right() -> None:
    for each in (*SEEN, *UNSEEN):
        told = captions(each)
        assert len(told) == TEMPLATES
        for caption in told:
            description = parse(caption)
            assert description.is_of(each), (caption, each)
            words = caption.split()
            for phrase in description.phrases:
                assert words[phrase.words[0]] == phrase.kind.colour
                assert words[phrase.words[1]].startswith(phrase.kind.shape)


def test_templates_are_the_documented_ones() -> None:
    one = _scene(("large blue square", 0))
    assert captions(one) == (
        "a large blue square in the top left",
        "there is a large blue square in the top left",
        "in the top left there is a large blue square",
        "a large blue square",
        "a blue square that is large in the top left",
    )
    two = _scene(("small orange cross", 0), ("small orange cross", 2), ("large blue square", 7))
    assert captions(two) == (
        "two small orange crosses above a large blue square",
        "there are two small orange crosses above a large blue square",
        "in the top row there are two small orange crosses above a large blue square",
        "two small orange crosses in the top row and a large blue square in the bottom middle",
        "two orange crosses that are small are above a blue square that is large",
    )
    assert captions(_scene(("large orange star", 4)))[4] == "an orange star that is large in the centre"
    mixed = _scene(("small red star", 0), ("small red star", 8), ("large red star", 4))
    assert captions(mixed)[0] == "two small red stars and a large red star"


@pytest.mark.parametrize(
    ("caption", "is_right"),
    [
        ("a large blue square below two small red circles", True),
        ("two small red circles and a large blue square in the bottom left", True),
        ("two small red circles and a large blue square", True),
        ("two small red circles left of a large blue square", False),  # not what is true of both
        ("two small red circles below a large blue square", False),
        ("two small red circles and a large blue square in the centre", False),
        ("two small red circles in the top row", False),  # says nothing of the square
        ("three small red circles above a large blue square", False),
        ("two small red circles above a small blue square", False),
        ("two small red circles above a large green square", False),
        ("two small red circles above two small red circles", False),
        ("a small red circle above a small red circle", False),
    ],
)
def test_a_description_is_right_when_it_has_all_objects_and_all_it_says_is_true(caption: str, is_right: bool) -> None:
    shown = _scene(("small red circle", 0), ("small red circle", 2), ("large blue square", 6))
    assert parse(caption).is_of(shown) is is_right


def test_objects_that_are_named_twice_are_not_right() -> None:
    shown = _scene(("small red circle", 0), ("small red circle", 2))
    assert parse("two small red circles").is_of(shown)
    for twice in ("two small red circles and two small red circles", "a small red circle and a small red circle"):
        assert not parse(twice).is_of(shown)


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a red circle",  # of no size
        "a small red circle that is small",
        "a small red circles",
        "two small red circle",
        "a orange star that is large",
        "an small red circle",
        "two red circles that is small",
        "there are a small red circle",
        "there is two small red circles",
        "a red circle that is small are above a blue square that is large",
        "a small red circle above",
        "a small red circle a large blue square",
        "a small red circle above a large blue square above a small red star",
        "a small red circle in the top",
        "a small crimson circle",
        "five small red circles",
        "a  small red circle",
        "A small red circle.",
        "in the bottom right there is a small red circle in the top left",
        "a small red circle in the top row",
        "two small red circles in the top left",
        "there is a small red circle are above a large blue square",
        "there is a small red circle is above a large blue square",
    ],
)
def test_what_no_template_writes_is_refused(caption: str) -> None:
    with pytest.raises(CaptionError, match="caption: expected"):
        parse(caption)


def test_looks_are_scored_while_colours_and_shapes_are_named() -> None:
    shown = _scene(("small red circle", 0), ("large blue square", 8))
    text = "a small red circle above a large blue square"
    side = 6  # two positions in each direction for a cell
    weights = torch.zeros(9, side * side)
    weights[:, 35] = 1.0  # the square's cell, at every word
    found = scores_of([shown], [Caption(text, 0.0, text.split(), weights)])
    assert (found.parsed, found.right, found.inside, found.pointed) == (1, 1, 0.5, 0.5)
    assert found.area == pytest.approx(1 / 9)
    weights[2:4] = 0  # red, circle
    weights[2, 0], weights[2, 1], weights[2, 20] = 0.3, 0.3, 0.4
    weights[3, 7], weights[3, 12] = 0.6, 0.4
    found = scores_of([shown], [Caption(text, 0.0, text.split(), weights)])
    assert found.inside == pytest.approx((0.6 + 0.6 + 1 + 1) / 4) and found.pointed == 0.75


def test_words_of_cells_without_a_position_are_not_scored() -> None:
    shown = _scene(("small red circle", 4))
    told = Caption("a small red circle", 0.0, ["a", "small", "red", "circle"], torch.full((4, 4), 0.25))
    assert scores_of([shown], [told]).area == 0
    other = _scene(("small red circle", 0))
    assert scores_of([shown, other], [told, told]).inside == 0.25  # of the other alone


def test_longest_bounds_every_caption() -> None:
    for size in (len, lambda words: len(words.split())):
        most = max(size(caption) for number in range(500) for caption in captions(scene(3, number)))
        assert most <= longest(size)
    assert longest(lambda words: len(words.split())) == 18
    with pytest.raises(RangeError, match="seed: expected one of a scene's"):
        scene(2**32, 0)


def test_captions_that_cannot_be_parsed_and_things_that_are_not_there_count_against_a_model() -> None:
    shown = _scene(("small red circle", 0))
    texts = ["a small red circle", "a small green circle", "a a a", ""]
    told = [Caption(text, 0.0, text.split(), torch.full((max(1, len(text.split())), 64), 1 / 64)) for text in texts]
    found = scores_of([shown] * 4, told)
    assert (found.scenes, found.parsed, found.right) == (4, 0.5, 0.25)
    assert found.inside == pytest.approx(9 / 64 / 2) and found.area == pytest.approx(9 / 64 / 2)
    assert scores_of([shown], told[3:]).inside == 0
    assert "25.0% of 4 captions right (50.0% parsed)" in str(found)


def test_scenes_of_scores_are_in_no_training() -> None:
    assert scene_scores._FIRST > 10**12  # as many steps as a run may have
