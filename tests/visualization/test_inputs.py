"""Folders and LLaVA rows become items; what cannot be read is said before anything starts."""

import json
import time

import pytest
from PIL import Image

from pmod_cli.core.errors import PmodError
from pmod_cli.visualization.inputs import check_pictures, find_items


def picture(path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


def test_a_folder_gives_its_pictures_by_name(tmp_path):
    for name in ("b.png", "a.jpg", "sub/c.png"):
        picture(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    assert [item.path.name for item in find_items([tmp_path])] == ["a.jpg", "b.png"]


def test_names_are_given_once(tmp_path):
    for name in ("one/a.png", "two/a.png", "one/a-2.png"):
        picture(tmp_path / name)
    names = [item.name for item in find_items([tmp_path / "one", tmp_path / "two", tmp_path / "one/a.png"])]
    assert names == ["a-2", "a", "a-3", "a-4"]  # "-" sorts before "."


def test_llava_rows(tmp_path):
    rows = [
        {
            "image": "x/a.png",
            "boxes": [[1, 2, 3, 4]],
            "conversations": [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "ice"}],
        },
        {"conversations": [{"from": "human", "value": "text alone"}]},
        {"image": "x/a.png", "conversations": [{"from": "human", "value": "look at <image> and tell"}]},
        {"image": "b.png"},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    for name in ("rows.json", "rows.jsonl"):
        first, second, third = find_items([tmp_path / name], tmp_path / "images")
        assert first.path == tmp_path / "images" / "x" / "a.png"
        assert (first.question, first.regions, first.name) == ("what is it?", ((1.0, 2.0, 3.0, 4.0),), "a")
        assert (second.question, second.name) == ("look at <image> and tell", "a-2")
        assert (third.question, third.regions) == (None, ())
    assert find_items([tmp_path / "rows.json"])[2].path == tmp_path / "b.png"


def test_rows_of_the_other_forms_that_finetune_takes(tmp_path):
    asked = {"role": "user", "content": [{"type": "image", "image": "b.png"}, {"type": "text", "text": "what is it?"}]}
    rows = [
        {"images": ["a.png"], "messages": [{"role": "user", "content": "look at <image> and tell"}]},
        {"messages": [{"role": "system", "content": "be brief"}, asked]},
        {"images": ["a.png", {"path": "b.png"}], "prompt": [{"role": "user", "content": "which?"}], "completion": []},
        {"videos": ["clip"], "messages": [{"role": "user", "content": "<video>what?"}], "boxes": [[1, 2, 3, 4]]},
        {"messages": [{"role": "user", "content": "text alone"}]},
        {"images": ["a.png"], "conversations": [{"from": "human", "value": "<image>\nLLaVA's"}]},
        {"video": ["clip"], "conversations": [{"from": "human", "value": "<video>\nLLaVA's"}]},
        {"video": "clip", "conversations": [{"from": "human", "value": "what happens?\n<video>"}]},
        {"image": ["a.png", "b.png"], "conversations": [{"from": "human", "value": "<image> or <image>: which?"}]},
        {"image": "c.png", "messages": [{"role": "user", "content": [asked["content"][0]]}]},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    found = [
        (item.path.name, item.question, len(item.together), item.is_film)
        for item in find_items([tmp_path / "rows.json"])
    ]
    assert found == [
        ("a.png", "look at <image> and tell", 0, False),
        ("b.png", "what is it?", 0, False),
        ("a.png", "which?", 2, False),
        ("b.png", "which?", 2, False),
        ("clip", "what?", 0, True),
        ("a.png", "LLaVA's", 0, False),
        ("clip", "LLaVA's", 0, True),
        ("clip", "what happens?", 0, True),
        ("a.png", "<image> or <image>: which?", 2, False),
        ("b.png", "<image> or <image>: which?", 2, False),
        ("b.png", "", 0, False),
    ]


def test_a_row_may_hold_the_other_line_separators(tmp_path):
    row = {"image": "a.png", "conversations": [{"from": "human", "value": "one\u2028two\u2029three\x85four"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    (item,) = find_items([tmp_path / "rows.jsonl"])
    assert item.question == "one\u2028two\u2029three\x85four"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("{}", "expected a list of rows, found dict"),
        ("[]", "no row has an image"),
        ("[3]", "row 0: expected an object, found int"),
        ('[{"image": ["a.png", 3]}]', "`image` is expected to be a file name"),
        ('[{"image": ""}]', r"rows\.json, row 0: `image` is expected to be a file name, found \"\""),
        ('[{"image": "http://x.y/a.png"}]', r"row 0: `image` is expected .* found \"http://x\.y/a\.png\""),
        (
            json.dumps([{"images": ["data:image/png;base64,AAAA"], "messages": [{"role": "user", "content": "?"}]}]),
            r"`image` is expected to be a file name, found \[\"3 bytes\"\]",
        ),
        ('[{"image": "data:image/png;base64,AAAA"}]', "row 0: `image` is expected to be a file name, found"),
        ('[{"video": ["a", "b"]}]', "row 0: `video` is expected to be a file name, found"),
        ('[{"image": "a.png", "video": "b"}]', "row 0 has images and a video, which are not drawn from one prompt"),
        ('[{"images": ["a.png"], "messages": [{"role": "user"}]}]', "row 0: turn 0: expected an object with 'role'"),
        ('[{"image": "a.png", "conversations": ["hm"]}]', "row 0: a turn is"),
        ('[{"image": "a.png", "conversations": 3}]', "row 0: a turn is"),
        ('[{"image": "a.png", "boxes": [[1, 2, 3]]}]', "row 0: `boxes` is expected"),
        ('[{"image": "a.png", "boxes": [[5, 2, 3, 4]]}]', "row 0: `boxes` is expected"),
        ('[{"image": "a.png", "boxes": 7}]', "row 0: `boxes` is expected"),
    ],
)
def test_bad_rows(tmp_path, text, message):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(PmodError, match=message) as caught:
        find_items([tmp_path / "rows.json"])
    assert caught.value.code == 2


def test_bad_bytes_and_empty_folders(tmp_path):
    (tmp_path / "rows.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PmodError, match=r"rows\.json: not JSON"):
        find_items([tmp_path / "rows.json"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(PmodError, match="no picture in this folder"):
        find_items([tmp_path / "empty"])


def test_every_bad_picture_is_named_at_once(tmp_path):
    picture(tmp_path / "good.png")
    for name in ("bad.png", "worse.png"):
        (tmp_path / name).write_text("no picture")
    bad = [tmp_path / "bad.png", tmp_path / "worse.png"]
    assert list(check_pictures(find_items([tmp_path]))) == bad
    with pytest.raises(PmodError, match=r"2 pictures cannot be drawn: .*bad\.png.*worse\.png"):
        check_pictures(find_items(bad))
    assert check_pictures(find_items([tmp_path / "good.png"])) == {}


def test_long_names_leave_room_for_an_ending(tmp_path):
    for name in ("é" * 125, "é" * 124 + "ff", "y" * 250):
        picture(tmp_path / f"{name}.png")
    names = [item.name for item in find_items([tmp_path])]
    assert len(set(names)) == 3
    assert all(len(f"{name}-pmod.html".encode()) <= 255 for name in names)


def test_many_rows_of_one_picture_are_named_in_no_time(tmp_path):
    rows = [{"image": "a.png"}] * 20_000 + [{"image": "a-3.png"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    started = time.process_time()
    names = [item.name for item in find_items([tmp_path / "rows.json"])]
    assert time.process_time() - started < 5
    assert (names[:3], names[-1], len(set(names))) == (["a", "a-2", "a-4"], "a-3", 20_001)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/secret.png", "a/../../b.png"])
def test_rows_name_no_picture_outside_their_folder(tmp_path, name):
    (tmp_path / "rows.json").write_text(json.dumps([{"image": name}]))
    with pytest.raises(PmodError, match=r"row 0: .*\.png lies outside the image folder"):
        find_items([tmp_path / "rows.json"])
