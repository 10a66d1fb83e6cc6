"""The synthetic documents: reproducible, disjoint between splits, answers true to the drawing and not guessable."""

from collections import Counter

import numpy as np
import pytest

from pmod_cli.data.documents import CELL, COLOURS, FIELD, LABELS, SHAPES, TASKS, draw, seed_of
from pmod_cli.data.glyphs import glyph
from pmod_cli.data.rows import conversation, question


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_names_one_document(task):
    first, again, other = draw(task, 7), draw(task, 7), draw(task, 8)
    assert np.array_equal(first.image, again.image)
    assert first.turns == again.turns
    assert not np.array_equal(first.image, other.image)


def test_splits_share_no_seed():
    train = {seed_of("train", i) for i in range(1000)}
    test = {seed_of("test", i) for i in range(1000)}
    assert len(train) == len(test) == 1000
    assert not train & test
    with pytest.raises(ValueError, match="'validation'"):
        seed_of("validation", 0)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("size", [(96, 96), (96, 48), (144, 48)])
def test_regions_and_marks_lie_in_the_image(task, size):
    for index in range(40):
        document = draw(task, seed_of("test", index), size)
        assert document.image.size == size
        assert document.image.mode == "RGB"
        assert document.turns
        boxes = [turn.region for turn in document.turns if turn.region] + [mark.box for mark in document.marks]
        for x0, y0, x1, y1 in boxes:
            assert 0 <= x0 < x1 <= size[0]
            assert 0 <= y0 < y1 <= size[1]


def read(image, box):
    """The character in a cell, by the best match of its ink with every digit at every place in the cell."""
    x0, y0, _, _ = box
    grey = np.asarray(image.convert("L"), dtype=float)[y0 : y0 + CELL, x0 : x0 + CELL]
    ink = grey < (grey.min() + grey.max()) / 2
    scores = {}
    for digit in "0123456789":
        for dy in range(2):
            for dx in range(4):
                drawn = np.zeros((CELL, CELL), dtype=bool)
                drawn[dy : dy + 7, dx : dx + 5] = glyph(digit)
                scores[digit, dy, dx] = (drawn == ink).sum()
    return max(scores, key=scores.get)[0]


@pytest.mark.parametrize("task", ["doc", "chart", "above"])
def test_the_region_of_a_number_shows_that_number(task):
    for index in range(10):
        document = draw(task, seed_of("test", index))
        for turn in document.turns:
            if turn.answer.isdigit():
                x0, y0, x1, y1 = turn.region
                assert "".join(read(document.image, (x, y0, x + CELL, y1)) for x in range(x0, x1, CELL)) == turn.answer


def test_the_longest_bar_has_the_largest_value():
    for index in range(50):
        turns = draw("chart", index).turns
        values = {turn.question.split()[-1][:-1]: int(turn.answer) for turn in turns if turn.answer.isdigit()}
        (longest,) = [turn.answer for turn in turns if not turn.answer.isdigit()]
        assert longest == max(values, key=values.get)
        assert sorted(values.values())[-1] - sorted(values.values())[-2] >= 18


def prices(document) -> dict[str, tuple[int, int]]:
    """Price and row of each item, from what was drawn."""
    digits = {label: "" for label in LABELS}
    rows = {}
    for mark in document.marks:
        if mark.shows.isdigit():
            digits[mark.belongs] += mark.shows
            rows[mark.belongs] = mark.box[1] // CELL
    return {label: (int(digits[label]), row) for label, row in rows.items()}


@pytest.mark.parametrize("size", [(96, 96), (96, 48)])
def test_the_item_above_is_the_next_one_up_and_the_first_look_finds_the_named_one(size):
    for index in range(50):
        document = draw("above", index, size)
        drawn = prices(document)
        assert len({row for _, row in drawn.values()}) == len(drawn), "one item a line"
        for turn in document.turns:
            named = turn.question.removesuffix("?").split()[-1]
            (look,) = turn.looks
            over = max((row, label) for label, (_, row) in drawn.items() if row < drawn[named][1])[1]
            assert (look.word, look.tells, turn.answer) == (named, over, str(drawn[over][0]))
            shown = [mark.shows for mark in document.marks if mark.belongs == named and mark.box[0] < look.box[2]]
            assert "".join(shown) == named
            assert {mark.above for mark in document.marks if mark.belongs == named and mark.above} == {over}


def test_the_dearer_item_is_the_one_of_the_larger_price_by_ten():
    first = 0
    for index in range(50):
        document = draw("dearer", index)
        drawn = prices(document)
        for turn in document.turns:
            one, _, other = turn.question.removesuffix("?").split()[-3:]
            one, values = one.strip(","), [drawn[one.strip(",")][0], drawn[other][0]]
            assert turn.answer == (one if values[0] > values[1] else other)
            assert abs(values[0] - values[1]) >= 10
            assert [(look.word, look.tells) for look in turn.looks] == list(
                zip((one, other), map(str, values), strict=True)
            )
            first += turn.answer == one
        assert len(set(turn.question for turn in document.turns)) == len(document.turns)
    assert 100 < first < 200, "the first named is the dearer one in half of them"


def test_the_region_of_a_colour_shows_that_colour():
    for index in range(50):
        document = draw("attribute", index)
        for turn in document.turns:
            if turn.question.startswith("what colour"):
                x0, y0, x1, y1 = turn.region
                pixels = np.asarray(document.image, dtype=int)[y0:y1, x0:x1].reshape(-1, 3)
                assert (abs(pixels - COLOURS[turn.answer]).max(axis=1) <= 8).mean() > 0.2


def test_presence_is_balanced_and_true():
    said = Counter()
    for index in range(200):
        document = draw("presence", index)
        there = {(mark.shows, mark.belongs) for mark in document.marks}
        for turn in document.turns:
            colour, shape = turn.question[:-1].split()[-2:]
            assert ((colour, shape) in there) == (turn.answer == "yes") == (turn.region is not None)
        said[document.turns[0].answer] += 1
    assert 70 < said["yes"] < 130


@pytest.mark.parametrize(("size", "fields"), [((96, 96), 9), ((96, 48), 3), ((144, 48), 4)])
def test_where_names_the_one_field_that_the_thing_stands_in(size, fields):
    said = Counter()
    for index in range(60):
        document = draw("where", index, size)
        drawn = {mark.box: (mark.shows, mark.belongs) for mark in document.marks}
        assert len({turn.question for turn in document.turns}) == len(document.turns) == len(drawn)
        for turn in document.turns:
            colour, shape = turn.question.removesuffix("?").split()[-2:]
            assert shape in SHAPES
            assert drawn[turn.region] == (colour, shape)
            top, left = "abc".index(turn.answer[0]) * FIELD, (int(turn.answer[1:]) - 1) * FIELD
            x0, y0, x1, y1 = turn.region
            assert left <= x0 < x1 <= left + FIELD
            assert top <= y0 < y1 <= top + FIELD
            inside = np.asarray(document.image, dtype=int)[y0:y1, x0:x1].reshape(-1, 3)
            assert (abs(inside - COLOURS[colour]).max(axis=1) <= 8).mean() > 0.2
        said[document.turns[0].answer] += 1
    assert len(said) == fields, "no field is left out, and none can be guessed"
    assert max(said.values()) < 60 * 2.5 / fields


def test_answers_are_spread():
    values = Counter(draw("doc", index).turns[0].answer for index in range(400))
    labels = Counter(
        turn.answer for index in range(100) for turn in draw("chart", index).turns if turn.answer in LABELS
    )
    assert len(values) > 80
    assert max(values.values()) < 20
    assert len(labels) == len(LABELS)
    assert max(labels.values()) < 20


@pytest.mark.parametrize(("task", "size"), [("page", (96, 96)), ("doc", (90, 96)), ("doc", (48, 96))])
def test_what_cannot_be_drawn_is_refused(task, size):
    with pytest.raises(ValueError, match=r"page|pixels"):
        draw(task, 0, size)


def test_a_conversation_shows_the_image_once():
    document = draw("doc", 3)
    messages = conversation(document)
    assert [message["role"] for message in messages] == ["user", "assistant"] * len(document.turns)
    kinds = [part["type"] for message in messages for part in message["content"]]
    assert kinds.count("image") == 1
    assert kinds[0] == "image"
    assert question(document)[0] == messages[0]
    with pytest.raises(ValueError, match="one turn"):
        conversation(document, [])
