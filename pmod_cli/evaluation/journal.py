"""Answers on the disk as they are made: lines are only ever added, one file per benchmark and process.

A line names its answer by a key that is a digest of everything the answer depends on (see `questions.keys`). So a rerun
may read the files of any earlier run, of any number of processes, and takes what fits. The last field of a line is a
digest of the others: a line that was cut, or in which a bit has flipped, is no answer, and its question is asked again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, get_type_hints

from pmod_cli.core import json_text


@dataclass(frozen=True)
class Answer:
    """One answered question.

    Attributes:
        text: The answer, cut at the task's first stop string.
        prompt: What the model read, image places not expanded.
        input_tokens: Tokens of the prompt, vision tokens included.
        output_tokens: Generated tokens, without the end token.
        cut: The answer reached the task's length limit without an end token.
        too_long: The prompt does not fit the model's context, so the question was not put and the answer is empty.
        seconds: Its share of the time that its batch spent in `generate`.
        batch: Rows of its batch.
        vision_tokens: Of the prompt.
    """

    text: str
    prompt: str = ""
    input_tokens: int = 0
    output_tokens: int = 0
    cut: bool = False
    too_long: bool = False
    seconds: float = 0.0
    batch: int = 1
    vision_tokens: int = 0

    @property
    def empty(self) -> bool:
        """There is no letter and no digit in it."""
        return not any(letter.isalnum() for letter in self.text)


SUM = "sha256"  # of a line: the first 16 digits
FIELDS = {"key": str, **get_type_hints(Answer), SUM: str}


class Journal:
    """The answers of one benchmark by one model.

    Args:
        folder: Where its files are.
        benchmark: Name of the benchmark.
        rank: Which of several processes writes.
    """

    def __init__(self, folder: Path, benchmark: str, rank: int = 0) -> None:
        self.folder, self.benchmark = folder, benchmark
        self.path = folder / f"{benchmark}.{rank}.jsonl"

    def read(self) -> dict[str, Answer]:
        """Every whole line of every process, by key. Where a question was answered twice, the first answer counts.

        Lines that are not whole are passed over: a killed writer leaves one.
        """
        answers: dict[str, Answer] = {}
        for path in sorted(self.folder.glob(f"{self.benchmark}.*.jsonl")):
            for _, line in json_text.lines(path.read_bytes()):
                if (entry := _whole(line)) is not None:
                    answers.setdefault(*entry)
        return answers

    def append(self, answers: Iterable[tuple[str, Answer]]) -> None:
        """Add a batch with a single write, so that a kill leaves at most one broken line."""
        lines = (_line({"key": key, **asdict(answer)}) for key, answer in answers)
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab+", buffering=0) as file:
            data = (("\n" if _ends_inside_a_line(file) else "") + "".join(f"{line}\n" for line in lines)).encode()
            while data:
                data = data[file.write(data) :]


def _line(entry: dict[str, Any]) -> str:
    return _text({**entry, SUM: _sum(_text(entry))})


def _text(entry: dict[str, Any]) -> str:
    """Read and written again, it is the same text."""
    return json.dumps(entry, ensure_ascii=False, allow_nan=False)


def _sum(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]


def _whole(line: bytes) -> tuple[str, Answer] | None:
    """Key and answer of a line; None where it is not as it was written, or not of this layout."""
    try:
        entry = json_text.loads(line)
        if not isinstance(entry, dict) or entry.keys() != FIELDS.keys():
            return None
        if not all(type(entry[name]) is kind for name, kind in FIELDS.items()):
            return None
        if entry.pop(SUM) != _sum(_text(entry)):
            return None
    except ValueError:  # no JSON, or a number beyond what a float holds
        return None
    return entry.pop("key"), Answer(**entry)


def _ends_inside_a_line(file: BinaryIO) -> bool:
    """A killed writer may have left a line without its end."""
    if not file.seekable() or file.seek(0, os.SEEK_END) == 0:
        return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"
