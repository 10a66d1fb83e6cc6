"""Text as it comes: pieces add up to what the whole answer decodes to."""

import pytest

from pmod_cli.serving.text_stream import TextStream
from tests.beds.tiny_llava_next.processor import build_tokenizer


class Bytes:
    """A tokenizer of bytes, of which a character takes several."""

    def decode(self, ids, skip_special_tokens=True):
        return bytes(ids).decode(errors="replace")


def pieces(stream: TextStream, ids) -> list[str]:
    found = []
    for token in ids:
        found.append(stream.add(token))
        if stream.stopped:
            break
    return [piece for piece in [*found, stream.end()] if piece]


def streamed(text: str, *stop: str) -> tuple[list[str], bool]:
    stream = TextStream(Bytes(), stop)
    return pieces(stream, text.encode()), stream.stopped


@pytest.mark.parametrize("text", ["what is the price of ham?", "yes", "a red ring . and 47", "ham 47 tea 12"])
def test_pieces_are_the_whole_text(text):
    tokenizer = build_tokenizer()
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert "".join(pieces(TextStream(tokenizer), ids)) == tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_a_character_of_several_bytes_comes_whole():
    assert streamed("é€😀x") == (["é", "€", "😀", "x"], False)


def test_white_space_around_the_answer_is_not_part_of_it():
    assert streamed(" \n a b \n ") == (["a", " b"], False)


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one STOP two", ["STOP"], "one"),
        ("one STO two", ["STOP"], "one STO two"),
        ("one ST", ["STOP"], "one ST"),
        ("a b b c", ["b c", "z"], "a b"),
        ("STOP", ["STOP"], ""),
        ("abcabd", ["abd"], "abc"),
        ("a\n\nb", ["\n\n"], "a"),
    ],
)
def test_a_stop_string_ends_the_answer_and_is_not_shown(text, stop, expected):
    found, stopped = streamed(text, *stop)
    assert "".join(found) == expected
    assert stopped == (expected != text)


def test_half_a_character_at_the_end_is_shown_as_such():
    stream = TextStream(Bytes())
    assert pieces(stream, "é".encode()[:1]) == ["\ufffd"]
