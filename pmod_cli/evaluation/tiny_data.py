"""The test questions of the tiny tasks: drawn once from the test seeds, kept in a cache, never trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pmod_cli.core.errors import PmodError
from pmod_cli.data import documents, glyphs, several
from pmod_cli.evaluation.benchmarks import TINY_QUESTIONS as QUESTIONS
from pmod_cli.evaluation.benchmarks import Benchmark

LAYOUT = 2  # raise it when the columns change


def draw(benchmarks: Iterable[Benchmark], on_wait: Callable[[Path], None]) -> None:
    """Draw the questions of the tiny tasks among some benchmarks, unless they are there.

    Args:
        on_wait: Called once where another process is drawing them, with the folder, before it is waited for.
    """
    for benchmark in benchmarks:
        if benchmark.drawn:
            folder(benchmark.task.removeprefix("tiny_"), on_wait=on_wait)


def folder(task: str, questions: int = QUESTIONS, on_wait: Callable[[Path], None] = lambda folder: None) -> Path:
    """The data set of one tiny task as `datasets.load_from_disk` reads it, drawn on the first call.

    Args:
        task: one of `pmod_cli.data.several.ALL_TASKS`.
        questions: Number of test documents, one question each.
        on_wait: As in `draw`.
    """
    target = _cache() / f"tiny-tasks-{_version()}" / f"{task}-{questions}"
    if not target.is_dir():
        _write(task, questions, target, on_wait)
    return target


def rows(task: str, questions: int) -> dict[str, list[Any]]:
    """Columns of one task, named as in the benchmark it stands for. Row i asks test document i its first question."""
    drawn = [several.document_of(task, documents.seed_of("test", index)) for index in range(questions)]
    answers = [document.turns[0].answer for document in drawn]
    return {
        "question_id": list(range(questions)),
        "image": [document.image for document in drawn],
        "pictures": [document.pictures for document in drawn],
        "question": [document.turns[0].question for document in drawn],
        "answer": answers,
        "answers": [[answer] for answer in answers],  # DocVQA has a list of accepted answers
    }


def _write(task: str, questions: int, target: Path, on_wait: Callable[[Path], None]) -> None:
    from datasets import Dataset, DatasetDict, Features, Image, List, Value

    from pmod_cli.core.folders import staged_directory

    text = Value("string")
    columns = {"question_id": Value("int64"), "image": Image(), "pictures": Value("int64")}
    columns |= {"question": text, "answer": text, "answers": List(text)}
    split = Dataset.from_dict(rows(task, questions), features=Features(columns))
    for wait in (False, True):
        try:
            with staged_directory(target, "data", wait=wait) as staged:  # of several processes, one draws
                DatasetDict({"test": split}).save_to_disk(staged)
            return
        except PmodError:
            if target.is_dir():  # another process has drawn the same questions meanwhile
                return
            if wait:
                raise
            on_wait(target)
        except OSError as error:
            raise PmodError(
                f"the drawn questions are kept in {target.parent}, which cannot be written: {error.strerror or error}",
                hint="set HF_HOME to a folder with room that can be written",
            ) from error


def _version() -> str:
    """Changes with the code that draws the documents, so that old questions are never scored as new ones."""
    digest = hashlib.sha256(f"{LAYOUT}".encode())
    for module in (documents, several, glyphs):
        digest.update(Path(str(module.__file__)).read_bytes())
    return digest.hexdigest()[:12]


def _cache() -> Path:
    """Beside the data sets of the other benchmarks, where HF_HOME puts them."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME, "pmod")
