"""Documents of two pictures and of a film: what they ask is answered by what is drawn, and by nothing else."""

from collections import Counter

import numpy as np
import pytest

from pmod_cli.data.documents import CELL, seed_of
from pmod_cli.data.rows import conversation, row
from pmod_cli.data.several import FRAMES, SEVERAL, SIZES, document_of, draw_several, film_of

DRAWN = {task: [draw_several(task, seed_of("test", index)) for index in range(200)] for task in SEVERAL}


@pytest.mark.parametrize("task", SEVERAL)
def test_a_seed_gives_one_document_and_its_pictures_have_one_size(task):
    again = draw_several(task, DRAWN[task][7].seed)
    assert np.array_equal(np.asarray(again.image), np.asarray(DRAWN[task][7].image))
    assert again.turns == DRAWN[task][7].turns
    for document in DRAWN[task]:
        assert len(document.images) == document.pictures
        assert {image.size for image in document.images} == {SIZES[task]}


def test_which_asks_for_what_one_picture_alone_shows():
    for document in DRAWN["which"]:
        width = SIZES["which"][0]
        shown = [
            {f"{mark.shows} {mark.belongs}" for mark in document.marks if mark.box[0] // width == number}
            for number in range(2)
        ]
        for turn in document.turns:
            name = turn.question.removeprefix("which of the two pictures shows a ").removesuffix("?")
            assert [name in shown[0], name in shown[1]] == [turn.answer == "first", turn.answer == "second"]
            assert turn.region[0] // width == ["first", "second"].index(turn.answer)


def test_a_digit_moves_cell_by_cell_changes_and_is_asked_for_at_its_end():
    changed = Counter()
    for document in DRAWN["moving"]:
        width, frames = SIZES["moving"][0], document.pictures
        assert frames in FRAMES
        path = [mark for mark in document.marks if mark.belongs != "still"]
        cells = [((mark.box[0] - n * width) // CELL, mark.box[1] // CELL) for n, mark in enumerate(path)]
        assert len(set(cells)) == frames
        assert all(abs(a - c) + abs(b - d) == 1 for (a, b), (c, d) in zip(cells[1:], cells[:-1], strict=True))
        end, start = document.turns
        assert (end.answer, start.answer) == (path[-1].shows, path[0].shows)
        assert end.region == path[-1].box
        assert end.answer != start.answer
        changed[sum(a.shows != b.shows for a, b in zip(path[1:], path[:-1], strict=True))] += 1
        still = Counter((mark.box[0] % width, mark.box[1], mark.shows) for mark in document.marks if mark not in path)
        assert set(still.values()) == {frames}
    assert len(changed) >= 4


def test_answers_cannot_be_guessed():
    first = Counter(document.turns[0].answer for document in DRAWN["which"])
    assert set(first) == {"first", "second"}
    assert max(first.values()) <= 0.6 * 200
    assert max(Counter(document.turns[0].answer for document in DRAWN["moving"]).values()) <= 0.2 * 200


def test_rows_hold_two_images_or_a_film():
    pair, film = DRAWN["which"][0], DRAWN["moving"][0]
    assert len(row(pair)["images"]) == 2
    (video,) = row(film)["videos"]
    assert video.size == (film.pictures, 48, 48)
    assert np.array_equal(video.pixels[-1], np.asarray(film.images[-1]))
    assert film_of(film).per_second == 2.0
    kinds = [[part["type"] for part in conversation(each)[0]["content"]] for each in (pair, film)]
    assert kinds == [["image", "image", "text"], ["video", "text"]]
    assert document_of("doc", 1).pictures == 1
    with pytest.raises(ValueError, match="unknown task"):
        draw_several("doc", 1)
