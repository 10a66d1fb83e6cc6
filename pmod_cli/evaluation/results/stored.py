"""A finished run read back from its folder, held to the form that `runner` writes before anybody uses it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pmod_cli.checkpoints.files import read_json
from pmod_cli.core import json_text
from pmod_cli.core.errors import PmodError
from pmod_cli.evaluation.intervals import Record

SCHEMA_VERSION = 2
RESULTS = "results.json"
ANSWERS = "answers"
LARGEST = 1e15  # of any number: sums of them stay exact
AGAIN = "run the evaluation again; answers that are there are not asked again"


@dataclass(frozen=True)
class Kind:
    """What a value is expected to be, and the test for it."""

    name: str
    holds: Callable[[Any], bool]

    def or_null(self) -> Kind:
        """The same kind, or null."""
        return Kind(f"{self.name} or null", lambda value: value is None or self.holds(value))


@dataclass(frozen=True)
class Each:
    """An object with any keys, whose values have one shape; the keys name files where `names` says so."""

    shape: Any
    names: bool = False


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) <= LARGEST


def _is_file_name(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable() and "/" not in value and value not in ("", ".", "..")


def _is_bounded(value: Any) -> bool:
    if isinstance(value, dict | list):
        return all(map(_is_bounded, value.values() if isinstance(value, dict) else value))
    return type(value) not in (int, float) or _is_number(value)


ANY = Kind("a value without numbers beyond 1e15", _is_bounded)
TEXT = Kind("text", lambda value: isinstance(value, str))
NAME = Kind("a file name", _is_file_name)
NUMBER = Kind("a number of at most 1e15", _is_number)
COUNT = Kind("a count", lambda value: type(value) is int and 0 <= value <= LARGEST)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
ROW = Kind("a count or text", lambda value: COUNT.holds(value) or TEXT.holds(value))

# A key with a question mark may be absent.
FAILED = {"score": ANY, "error": TEXT, "seconds?": NUMBER.or_null()}
SCORED = {
    "score": NUMBER,
    "questions": COUNT,
    "questions_available": COUNT,
    "limited": FLAG,
    "metric": TEXT.or_null(),
    **{
        f"{name}?": COUNT.or_null()
        for name in ("empty_answers", "cut_answers", "too_long_prompts", "random_answers", "unread_answers")
    },
    **{f"{name}?": NUMBER.or_null() for name in ("seconds", "tokens_per_second", "peak_memory_mib")},
    "lower_is_better?": FLAG,
    "batching?": ANY,
}
BATCHING = {"questions": COUNT, "changed": COUNT, "batch_size": COUNT}
FORM = {
    "models": Each({"mean_retention?": NUMBER.or_null()}, names=True),
    "tasks": [
        {
            "name": NAME,
            **{field: TEXT for field in ("title", "task", "group", "filter")},
            "metric": TEXT.or_null(),
            "scale": NUMBER,
            "scores": Each({"score": NUMBER.or_null()}),
        }
    ],
    "settings": {},
    "software": {"packages": Each(ANY)},
}
RECORD = {
    **{name: TEXT for name in ("task", "question", "answer")},
    "doc_id": ROW,
    "target": ANY,
    "item": ANY,
    "prompt?": TEXT.or_null(),
}


def read_run(run: Path) -> tuple[Path, dict[str, Any]]:
    """The folder of a finished run, and what its `results.json` holds.

    Args:
        run: The folder, or the file.

    Raises:
        PmodError: there is no such run, it is of another version, or a key is missing or holds something else.
    """
    folder = run.parent if run.name == RESULTS else run
    path = folder / RESULTS
    if not path.is_file():
        raise PmodError(f"{run} is no finished run: there is no {path}", hint="pmod eval -o DIR makes one")
    results = read_json(path)
    if results.get("schema_version") != SCHEMA_VERSION:
        raise PmodError(
            f"{path} has schema version {results.get('schema_version')!r:.40}, expected {SCHEMA_VERSION}", hint=AGAIN
        )
    try:
        _hold(results, FORM, "")
        for place, task in enumerate(results["tasks"]):
            for label, entry in task["scores"].items():
                _hold_score(entry, f"tasks[{place}].scores.{label}")
    except ValueError as error:
        raise PmodError(f"{path}: {error}", hint=AGAIN) from None
    return folder, results


def read_records(folder: Path, label: str, benchmark: str, questions: int) -> list[Record]:
    """The answers of one model to one benchmark.

    Args:
        questions: How many there are, as the results say.

    Raises:
        PmodError: the file cannot be read, holds another number of answers, or something else.
    """
    path = folder / ANSWERS / label / f"{benchmark}.jsonl"
    try:
        records = json_text.read_lines(path)
        for place, record in enumerate(records):
            _hold(record, RECORD, f"answer {place}")
    except (PmodError, ValueError) as error:
        raise PmodError(f"{path} cannot be read, so this run cannot be compared: {error}", hint=AGAIN) from error
    if len(records) != questions:
        raise PmodError(f"{path} holds {len(records)} answers, and {RESULTS} names {questions}", hint=AGAIN)
    return records


def _hold_score(entry: Mapping[str, Any], where: str) -> None:
    if entry["score"] is None:
        _hold(entry, FAILED, where)
        return
    _hold(entry, SCORED, where)
    if (batching := entry.get("batching")) is not None:
        _hold(batching, BATCHING, f"{where}.batching")
        if batching["changed"] > batching["questions"]:
            raise ValueError(f"{where}.batching: more answers changed than were asked")


def _hold(value: Any, shape: Any, where: str) -> None:
    """ValueError where a value has another shape."""
    if isinstance(shape, Kind):
        if not shape.holds(value):
            raise ValueError(f"{where}: expected {shape.name}, found {value!r:.60}")
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise ValueError(f"{where}: expected a list, found {value!r:.60}")
        for place, item in enumerate(value):
            _hold(item, shape[0], f"{where}[{place}]")
    elif not isinstance(value, dict):
        raise ValueError(f"{where or 'the file'}: expected an object, found {value!r:.60}")
    elif isinstance(shape, Each):
        for key, item in value.items():
            if shape.names and not _is_file_name(key):
                raise ValueError(f"{where}: expected file names as keys, found {key!r:.60}")
            _hold(item, shape.shape, _below(where, key))
    else:
        for key, inner in shape.items():
            name = key.removesuffix("?")
            if name in value:
                _hold(value[name], inner, _below(where, name))
            elif name == key:
                raise ValueError(f"{where or 'the file'}: the key {name!r} is missing")


def _below(where: str, key: str) -> str:
    return f"{where}.{key:.60}" if where else f"{key:.60}"
