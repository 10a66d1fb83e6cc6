"""Answers on the disk: what a killed writer leaves, what several processes write, what a full line holds."""

import json
from dataclasses import replace

import pytest

from pmod_cli.evaluation import eval_plan
from pmod_cli.evaluation.journal import Answer, Journal

FIRST = Answer("zehn €", "why?\nASSISTANT:", 12, 2, cut=True, seconds=0.25, batch=3)
SECOND = Answer("", too_long=True)


def test_what_was_written_is_read(tmp_path):
    journal = Journal(tmp_path / "new" / "folder", "doc")
    assert journal.read() == {}
    journal.append([("a", FIRST), ("b", SECOND)])
    journal.append([("c", FIRST)])
    assert journal.read() == {"a": FIRST, "b": SECOND, "c": FIRST}
    assert journal.path.read_text().count("\n") == 3


def test_every_cut_leaves_the_whole_lines(tmp_path):
    """The file ends after any number of bytes; then the writer goes on."""
    journal = Journal(tmp_path, "doc")
    journal.append([("a", FIRST), ("b", SECOND)])
    written = journal.path.read_bytes()
    end = written.index(b"\n")
    for length in range(len(written) + 1):
        journal.path.write_bytes(written[:length])
        known = journal.read()
        assert set(known) == ({"a"} if length >= end else set()) | ({"b"} if length >= len(written) - 1 else set())
        journal.append([("c", FIRST)])
        assert journal.read() == known | {"c": FIRST}


def test_processes_write_files_of_their_own(tmp_path):
    for rank in range(3):
        Journal(tmp_path, "doc", rank).append([(f"of {rank}", FIRST)])
    Journal(tmp_path, "document").append([("other", FIRST)])
    assert set(Journal(tmp_path, "doc").read()) == {"of 0", "of 1", "of 2"}


def test_the_first_answer_counts_and_strange_lines_do_not(tmp_path):
    journal = Journal(tmp_path, "doc")
    journal.append([("a", FIRST)])
    with journal.path.open("a") as file:
        for line in ("[]", "1", json.dumps({"key": "x"}), json.dumps({"key": "y", "text": "t", "unknown": 1}), "\x00"):
            file.write(line + "\n")
    journal.append([("a", SECOND)])
    assert journal.read() == {"a": FIRST}


def test_a_flipped_bit_makes_no_other_answer(tmp_path):
    """Each bit of a line in turn: what is read is the answer as it was written, or none."""
    journal = Journal(tmp_path, "doc")
    journal.append([("a", Answer("seven", "why?", 12, 2, seconds=0.25))])
    written = journal.path.read_bytes()
    read = 0
    for place in range(len(written)):
        for bit in range(8):
            flipped = bytearray(written)
            flipped[place] ^= 1 << bit
            journal.path.write_bytes(flipped)
            known = journal.read()
            assert known in ({}, {"a": Answer("seven", "why?", 12, 2, seconds=0.25)}), (place, bit)
            read += bool(known)
    assert read < 20  # blanks between fields, and the line's end


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("text", 7),
        ("text", None),
        ("cut", 1),
        ("input_tokens", 12.0),
        ("seconds", "0.25"),
        ("seconds", 1),
        ("batch", True),
    ],
)
def test_a_field_of_another_type_is_refused(tmp_path, field, value):
    journal = Journal(tmp_path, "doc")
    journal.append([("a", replace(FIRST, **{field: value}))])
    assert journal.read() == {}


def test_separators_of_lines_in_an_answer(tmp_path):
    answer = Answer("a\u2028b\u2029c\x85d\re", "p\u2028")
    Journal(tmp_path, "doc").append([("a", answer)])
    assert Journal(tmp_path, "doc").read() == {"a": answer}


def test_another_version_of_pmod_asks_again(monkeypatch):
    settings, described = eval_plan.EvalSettings(), {"weights_sha256": "x"}
    now = eval_plan.answerer(described, settings)
    assert eval_plan.answerer(described, settings) == now
    monkeypatch.setattr(eval_plan, "__version__", "99.0")
    assert eval_plan.answerer(described, settings) != now


def test_empty_is_without_letter_and_digit():
    assert [Answer(text).empty for text in ("", " .!", "7", "é")] == [True, True, False, False]
