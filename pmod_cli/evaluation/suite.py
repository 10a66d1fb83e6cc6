"""From the names that users type to benchmarks, and to the folders of lmms-eval's task files. Imports nothing heavy."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import replace
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from pmod_cli.core.errors import BAD_PACKAGE, PmodError
from pmod_cli.core.paths import expanded
from pmod_cli.evaluation.benchmarks import BENCHMARKS, Benchmark, groups

LMMS_PREFIX = "lmms:"  # `lmms:docvqa` is lmms-eval's own group of that name
JUDGE_KEYS = {"openai": "OPENAI_API_KEY", "azure": "AZURE_API_KEY"}  # by $API_TYPE, as lmms-eval reads them
_NAMES = re.compile(r"""^(?:task|group)\s*:\s*["']?([\w.-]+)["']?\s*$""", re.MULTILINE)


def resolve(names: Iterable[str]) -> tuple[Benchmark, ...]:
    """The benchmarks of names, groups and task files, in the order given, each once.

    A name that is no benchmark's is looked up among lmms-eval's own tasks, which takes seconds. A benchmark that can be
    judged is scored by lmms-eval's judge model where its key is set.

    Args:
        names: A benchmark or group, an lmms-eval task, or the path of a YAML file that defines one.

    Raises:
        PmodError: no name, unknown names, each with the nearest known ones, a file that defines no task, a benchmark
            whose folder does not exist, two of one task or name, or a judged task without the judge's key.
    """
    found: dict[str, Benchmark] = {}
    unknown = []
    known, spellings = groups(), _by_spelling()
    judged = {benchmark.judged_task: benchmark for benchmark in BENCHMARKS.values() if benchmark.judged_task}
    for name in (part.strip() for part in names):
        if not name:
            continue
        if name.lower() in known:
            chosen = [_judged(benchmark) for benchmark in known[name.lower()]]
        elif name.lower() in spellings:
            benchmark = spellings[name.lower()]
            chosen = [benchmark if name.lower() == benchmark.task else _judged(benchmark)]
        elif name.endswith((".yaml", ".yml")):
            chosen = [_of_file(expanded(name))]
        elif (task := name.removeprefix(LMMS_PREFIX)) in _tasks_of_lmms_eval():
            _require_judge(name, task)
            chosen = [_judged(judged[name]) if name in judged else Benchmark(name, task, task, metric=None)]
        else:
            unknown.append(name)
            continue
        for benchmark in chosen:
            _add(found, benchmark)
    if unknown:
        raise PmodError("; ".join(_unknown(name) for name in unknown), hint="pmod eval --list")
    if not found:
        raise PmodError("no task was named", hint="pmod eval --list")
    for benchmark in found.values():
        folder = benchmark.folder or ""
        if os.path.isabs(folder) and not os.path.isdir(folder):
            raise PmodError(f"the task files of {benchmark.name} are in {folder}: no such folder", hint=BAD_PACKAGE)
    return tuple(found.values())


def _add(found: dict[str, Benchmark], benchmark: Benchmark) -> None:
    """Adds a benchmark to those by task, unless it is there; another one of its task or name would take its place."""
    for other in found.values():
        same_task, same_name = other.task == benchmark.task, other.name == benchmark.name
        elsewhere = None not in (other.folder, benchmark.folder) and other.folder != benchmark.folder
        if (same_task and elsewhere) or (same_name and not same_task):
            what = f"task {other.task}" if same_task else f"name {other.name}"
            both = f"{other.folder} and {benchmark.folder}" if same_task else f"{other.task} and {benchmark.task}"
            raise PmodError(f"two benchmarks have the {what}: {both}", hint="score them in two runs, or rename one")
    found.setdefault(benchmark.task, benchmark)


def folders(benchmark: Benchmark) -> list[str] | None:
    """The folders whose YAML files define a benchmark, or None where all of lmms-eval's have to be searched.

    Reading only these takes milliseconds; indexing all tasks of lmms-eval takes five seconds.
    """
    if benchmark.folder is None:
        return None
    folder = Path(benchmark.folder)
    return [str(folder if folder.is_absolute() else _lmms_eval_folder() / "tasks" / folder)]


def _by_spelling() -> dict[str, Benchmark]:
    """Every spelling of a benchmark: typed name, lmms-eval's task, title. Where two meet the typed name wins."""
    known = BENCHMARKS.values()
    spellings = {benchmark.title.lower(): benchmark for benchmark in known}
    spellings |= {benchmark.task: benchmark for benchmark in known}
    return spellings | {benchmark.name: benchmark for benchmark in known}


def _of_file(path: Path) -> Benchmark:
    """The benchmark that a task file of the user's defines."""
    if not path.is_file():
        raise PmodError(f"there is no task file {path}", hint="pmod eval --list shows the names that are known")
    found = _NAMES.search(path.read_text(encoding="utf-8", errors="replace"))
    if found is None:
        raise PmodError(f"{path} defines no task: expected a line such as `task: my_task`", hint="docs/eval.md")
    return Benchmark(found[1], found[1], found[1], metric=None, folder=str(path.resolve().parent))


def task_files(folder: Path) -> list[Path]:
    """The YAML files in a folder, and below it, that define a task or a group. What other tools keep there does not."""
    files = sorted(path for path in folder.rglob("*.yaml") if path.is_file())
    return [path for path in files if _NAMES.search(path.read_text(encoding="utf-8", errors="replace"))]


def _judge_key() -> str:
    """The variable that holds the judge's key."""
    return JUDGE_KEYS.get(os.environ.get("API_TYPE", "openai"), JUDGE_KEYS["openai"])


def _judged(benchmark: Benchmark) -> Benchmark:
    """A benchmark with its judge, where it has one and there is a key for it; else as it is."""
    if benchmark.judged_task is None or not os.environ.get(_judge_key()):
        return benchmark
    return replace(benchmark, task=benchmark.judged_task)


def _require_judge(name: str, task: str) -> None:
    """lmms-eval without a key waits 45 seconds for each answer it cannot read, then draws an option at random."""
    judged = task.startswith("mmbench") and not task.endswith(("_static", "_test"))
    if judged and not os.environ.get(_judge_key()):
        raise PmodError(
            f"{name} is scored by a judge model, and its key, ${_judge_key()}, is not set",
            hint="pmod eval --tasks mmb scores MMBench without a judge",
        )


def _unknown(name: str) -> str:
    known = {*groups(), *_by_spelling(), *_tasks_of_lmms_eval()}
    near = get_close_matches(name.lower().removeprefix(LMMS_PREFIX), known, n=4, cutoff=0.6)
    return f"no task is called {name!r}" + (f"; near: {', '.join(near)}" if near else "")


def _lmms_eval_folder() -> Path:
    spec = find_spec("lmms_eval")
    assert spec is not None, "the command checks for the [eval] extra first"
    assert spec.submodule_search_locations is not None, "it is a package"
    return Path(spec.submodule_search_locations[0])


@cache
def _tasks_of_lmms_eval() -> frozenset[str]:
    """All names that lmms-eval's YAML files define as a task or a group, read without importing lmms-eval."""
    names: set[str] = set()
    for path in (_lmms_eval_folder() / "tasks").rglob("*.yaml"):
        names.update(_NAMES.findall(path.read_text(encoding="utf-8")))
    return frozenset(names)
