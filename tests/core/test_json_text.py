"""JSON lines: where a line ends, and what is said of one that is no JSON."""

import json

import pytest

from pmod_cli.core import json_text
from pmod_cli.core.errors import PmodError

SEPARATORS = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei"  # all that str.splitlines() cuts at, but line ends


def test_a_line_ends_at_a_line_feed_and_nowhere_else(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": SEPARATORS}, {"text": "two\r\nlines"}, 3]
    path.write_bytes("\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode() + b"\r\n\n  \n")
    assert json_text.read_lines(path) == rows
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert json_text.read_lines(path) == rows


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        (b'"\xed\xa0\x80"', "not JSON"),  # half of a surrogate pair
        (b"NaN", "NaN is no number"),
        (b"[" * 100_000, "nested too deeply"),
        (b"9" * 5000, "not JSON"),
    ],
)
def test_a_line_that_is_no_json_is_named(tmp_path, line, said):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"1\n\n" + line)
    with pytest.raises(PmodError, match=rf"rows\.jsonl, line 3: .*{said}"):
        json_text.read_lines(path)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(PmodError, match=r"gone\.jsonl cannot be read"):
        json_text.read_lines(tmp_path / "gone.jsonl")
