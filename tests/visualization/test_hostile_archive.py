"""An `.npz` from anybody: what no selection can hold is refused in a sentence, before it costs memory."""

import io
import json
import resource
import zipfile

import numpy as np
import pytest

from pmod_cli.core.errors import PmodError
from pmod_cli.visualization import check_saved, draw, load_npz, save_npz
from pmod_cli.visualization.inputs import find_items
from pmod_cli.visualization.job import DrawSettings
from tests.visualization.records import anyres_record, padded_record


def arrays_of(tmp_path, record=None) -> dict[str, np.ndarray]:
    save_npz(record or anyres_record(60, 90), tmp_path / "good.npz")
    with np.load(tmp_path / "good.npz") as arrays:
        return dict(arrays)


def rewritten(tmp_path, **changes):
    """A saved selection with some of its arrays replaced."""
    np.savez_compressed(tmp_path / "bad.npz", **arrays_of(tmp_path) | changes)
    return tmp_path / "bad.npz"


def retold(tmp_path, text=None, **changes):
    """A saved selection with other words."""
    about = json.loads(str(arrays_of(tmp_path)["about"])) | changes
    return rewritten(tmp_path, about=np.array(text or json.dumps(about)))


def other_bytes(array: np.ndarray, byte: int) -> np.ndarray:
    return np.full(array.shape, byte, np.uint8).view(bool)


@pytest.mark.parametrize(
    ("name", "change", "fault"),
    [
        ("kept", lambda kept: np.full(kept.shape, 7), "`kept` is int64, expected bool"),
        ("kept", lambda kept: other_bytes(kept, 7), "`kept` holds other values than false and true"),
        ("kept", lambda kept: kept & False, "a plain layer keeps every token"),
        ("kept", lambda kept: kept[:0], "`routed` has the shape"),
        ("kept", lambda kept: kept[0], "`kept` has the shape"),
        ("weight", lambda weight: weight * np.float32(np.nan), "`weight` holds values that are no finite numbers"),
        ("weight", lambda weight: weight * np.float32(2), "a plain layer weights no token"),
        ("weight", lambda weight: weight.astype(np.float64), "`weight` is float64, expected float32"),
        ("retention", lambda retention: -retention, "`retention` lies outside"),
        ("retention", lambda retention: retention * np.nan, "`retention` lies outside"),
        ("routed", lambda routed: other_bytes(routed, 255), "`routed` holds other values"),
        ("image", lambda image: image[:0], "the image is empty"),
        ("image", lambda image: image.astype(np.float32), "`image` is float32, expected uint8"),
        ("image", lambda image: image[:-1], "`boxes_px` are not the boxes of its parts"),
        ("boxes_px", lambda boxes: boxes + 1, "`boxes_px` are not the boxes of its parts"),
        ("tiles.tokens", lambda tokens: tokens + 10**9, "the tokens of `tiles` are not numbered row by row"),
        ("tiles.tokens", lambda tokens: -tokens, "the tokens of `tiles` are not numbered row by row"),
        ("base.tokens", lambda tokens: tokens[::-1], "the tokens of `base` are not numbered row by row"),
        ("tiles.newlines", lambda newlines: newlines[:-1], "kept` has the shape"),
        ("tiles.row_spans", lambda spans: spans * np.nan, "row spans of `tiles` are no pixels"),
        ("base.column_spans", lambda spans: spans[::-1], "columns of `base` are out of order"),
        ("base.column_spans", lambda spans: spans[:, ::-1], "a column of `base` is empty"),
        ("base.column_spans", lambda spans: spans.ravel(), "column spans of `base` of shape"),
    ],
)
def test_arrays_that_no_selection_has(tmp_path, name, change, fault):
    path = rewritten(tmp_path, **{name: change(arrays_of(tmp_path)[name])})
    with pytest.raises(PmodError, match="is not a selection that pmod wrote, or is damaged") as caught:
        load_npz(path)
    assert fault in caught.value.what


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"question": 7}, "expected a text, found 7"),
        ({"question": "\ud800"}, "surrogates not allowed"),
        ({"answer": ["a"]}, "expected a text"),
        ({"notes": "a note"}, "`notes` is no list"),
        ({"notes": [None]}, "expected a text, found None"),
        ({"model_notes": 3}, "`model_notes` is no list"),
        ({"router_state": "tired"}, "router state 'tired'"),
        ({"chosen_by": {}}, "chosen by {}"),
        ({"chosen_by": "attention"}, "a share of attention lies outside"),
        ({"parts": ["tiles", "base"]}, "parts ['tiles', 'base']"),
        ({"parts": ["../x"]}, "parts ['../x']"),
        ({"tile_grid": None}, "a tile grid of None"),
        ({"tile_grid": [1, -1]}, "a tile grid of (1, -1)"),
        ({"tile_grid": 3}, "not iterable"),
        ({"regions": [[0, 0, float("nan"), 4]]}, "a box of [0, 0, nan, 4]"),
        ({"regions": [[0, 0, 10**400, 4]]}, "a box of"),
        ({"regions": [[4, 0, 2, 4]]}, "an empty box"),
        ({"regions": [[0, 0, True, 4]]}, "a box of"),
        ({"regions": [[0, 0, 1, 1]] * 1001}, "1,001 boxes"),
        ({"regions": "none"}, "no list"),
        ({"text": "[" * 100_000}, "recursion"),
        ({"text": "[]"}, "`about` is no object"),
        ({"text": "{}"}, "format None, expected 1"),
    ],
)
def test_words_that_no_selection_has(tmp_path, changes, fault):
    with pytest.raises(PmodError, match="is not a selection that pmod wrote, or is damaged") as caught:
        load_npz(retold(tmp_path, **changes))
    assert fault in caught.value.what


def member(tmp_path, name: str, data: bytes):
    """A saved selection, one of its members replaced by raw bytes."""
    path = rewritten(tmp_path)
    with zipfile.ZipFile(path) as archive:
        members = {entry: archive.read(entry) for entry in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry, content in (members | {name: data}).items():
            archive.writestr(entry, content)
    return path


def header(shape: tuple, kind: str = "|u1") -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": kind, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "shape", "kind", "fault"),
    [
        ("image", (40_000, 40_000, 3), "|u1", "`image` would take 4,800 MB, at most 268 are read"),
        ("image", (-1, -1, 3), "|u1", "`image` has the shape"),
        ("image", (2, 2, 3), "|u1", "`image` has not the length that its header states"),
        ("base.tokens", (2**40, 2**40), "<i8", "`base.tokens` would take"),
        ("about", (), "<U2000000", "`about` would take 8 MB"),
        ("about", (), "|O", "`about` is object"),
    ],
)
def test_a_header_is_believed_before_the_data(tmp_path, name, shape, kind, fault):
    with pytest.raises(PmodError, match="is not a selection that pmod wrote") as caught:
        load_npz(member(tmp_path, f"{name}.npy", header(shape, kind)))
    assert fault in caught.value.what


def test_data_that_go_on_are_not_unpacked(tmp_path):
    """100 kB of file, 24 MB promised, 100 MB there."""
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(rewritten(tmp_path)) as good, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry in good.namelist():
            if entry != "image.npy":
                archive.writestr(entry, good.read(entry))
        with archive.open("image.npy", "w") as stream:
            stream.write(header((2000, 4000, 3)))
            for _ in range(100):
                stream.write(bytes(1 << 20))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(PmodError, match="has not the length that its header states"):
        load_npz(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000  # kB


@pytest.mark.parametrize("box", ["[0, 0, NaN, 4]", "[0, 0, Infinity, 4]", "[0, 0, 1e99, 4]", '["0", 0, 1, 4]'])
def test_boxes_of_rows_are_held_to_the_same(tmp_path, box):
    (tmp_path / "rows.json").write_text(f'[{{"image": "a.png", "boxes": [{box}]}}]')
    with pytest.raises(PmodError, match=r"row 0: `boxes` is expected|is no number of JSON"):
        find_items([tmp_path / "rows.json"])


def test_a_page_of_a_thousand_layers_is_refused_before_it_is_made(tmp_path):
    record = padded_record(60, 90, layers=1000)
    save_npz(record, tmp_path / "deep.npz")
    check_saved(find_items([tmp_path / "deep.npz"]), None, DrawSettings())
    with pytest.raises(PmodError, match=r"the picture would have .* pixels, too many to draw"):
        draw(record, range(1000))


def test_a_long_question_is_cut_not_measured_word_by_word():
    record = anyres_record(60, 90, question="why? " * 200_000)
    draw(record, [3])
