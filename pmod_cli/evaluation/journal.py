"""Answers on the disk as they are made: lines are only ever added, one file per benchmark and process.

A line names its answer by a key that is a digest of everything the answer depends on (see `questions.keys`). So a rerun
may read the files of any earlier run, of any number of processes, and takes what fits.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO


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
    """

    text: str
    prompt: str = ""
    input_tokens: int = 0
    output_tokens: int = 0
    cut: bool = False
    too_long: bool = False
    seconds: float = 0.0
    batch: int = 1

    @property
    def empty(self) -> bool:
        """There is no letter and no digit in it."""
        return not any(letter.isalnum() for letter in self.text)


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
        """Every whole line of every process, by key. Where a question was answered twice, the first answer counts."""
        answers: dict[str, Answer] = {}
        for path in sorted(self.folder.glob(f"{self.benchmark}.*.jsonl")):
            for line in path.read_bytes().splitlines():
                try:
                    entry = json.loads(line)
                    answers.setdefault(entry.pop("key"), Answer(**entry))
                except (ValueError, TypeError, KeyError, AttributeError):
                    continue  # the writer was killed in the middle of this line
        return answers

    def append(self, answers: Iterable[tuple[str, Answer]]) -> None:
        """Add a batch with a single write, so that a kill leaves at most one broken line."""
        lines = (json.dumps({"key": key, **asdict(answer)}, ensure_ascii=False) for key, answer in answers)
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab+", buffering=0) as file:
            data = (("\n" if _ends_inside_a_line(file) else "") + "".join(f"{line}\n" for line in lines)).encode()
            while data:
                data = data[file.write(data) :]


def _ends_inside_a_line(file: BinaryIO) -> bool:
    """A killed writer may have left a line without its end."""
    if not file.seekable() or file.seek(0, os.SEEK_END) == 0:
        return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"
