"""The benchmarks by the names that users type: the paper's fourteen and the tiny four. Imports nothing heavy."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from pmod_cli.errors import PmodError

TINY_TASKS = Path(__file__).with_name("tasks")
LMMS_PREFIX = "lmms:"  # `lmms:docvqa` is lmms-eval's own group of that name


@dataclass(frozen=True)
class Benchmark:
    """One row of the report: an lmms-eval task, or group of tasks, and its headline number.

    Attributes:
        name: What a user types.
        title: What the report prints, as in the paper's tables.
        task: lmms-eval's name of the task or group.
        metric: Headline metric, as lmms-eval keys it in its results, without the filter. None: the task's first.
        folder: Folder of the task's YAML, inside lmms-eval's tasks; None for our own and for tasks passed through.
        data: Hub data sets that the task reads, as `repository` or `repository:configuration`.
        group: `general` or `text-rich` as in the paper, or `tiny`.
        filter: lmms-eval's answer filter that the headline is taken after.
        scale: Factor from lmms-eval's number to the one the paper prints.
    """

    name: str
    title: str
    task: str
    metric: str | None
    folder: str | None = None
    data: tuple[str, ...] = ()
    group: str = ""
    filter: str = "none"
    scale: float = 100.0


def _paper(group: str, title: str, name: str, task: str, metric: str, data: str, folder: str = "", **more) -> Benchmark:
    data_sets = tuple(f"lmms-lab-encoder/{part}" for part in data.split(","))
    return Benchmark(name, title, task, metric, folder or name, data_sets, group, **more)


PAPER = (
    _paper("general", "SEED", "seed", "seedbench", "seed_image", "SEED-Bench", "seedbench"),
    _paper("general", "RWQA", "rwqa", "realworldqa", "exact_match", "RealWorldQA", "realworldqa"),
    _paper("general", "MME", "mme", "mme", "mme_perception_score", "MME", scale=1.0),
    _paper("general", "MMB", "mmb", "mmbench_en_dev_static", "gpt_eval_score", "MMBench:en", "mmbench", scale=1.0),
    _paper("general", "POPE", "pope", "pope_full", "pope_f1_score", "POPE:Full"),
    _paper(
        "general", "GQA", "gqa", "gqa", "exact_match", "GQA:testdev_balanced_instructions,GQA:testdev_balanced_images"
    ),
    _paper("general", "AI2D", "ai2d", "ai2d", "exact_match", "ai2d", filter="flexible-extract"),
    _paper("text-rich", "DocVQA", "docvqa", "docvqa_val", "anls", "DocVQA:DocVQA"),
    _paper("text-rich", "ChartQA", "chartqa", "chartqa", "relaxed_overall", "ChartQA"),
    _paper("text-rich", "TextVQA", "textvqa", "textvqa_val", "exact_match", "textvqa"),
    _paper("text-rich", "InfoVQA", "infovqa", "infovqa_val", "anls", "DocVQA:InfographicVQA"),
    _paper("text-rich", "OK-VQA", "okvqa", "ok_vqa_val2014", "exact_match", "OK-VQA", "ok_vqa"),
    _paper("text-rich", "MMMU", "mmmu", "mmmu_val", "mmmu_acc", "MMMU"),
    _paper("text-rich", "SQA", "sqa", "scienceqa_img", "exact_match", "ScienceQA:ScienceQA-IMG", "scienceqa"),
)
TINY = tuple(
    Benchmark(task, title, task, metric, group="tiny")
    for task, title, metric in (
        ("tiny_doc", "tiny doc", "anls"),
        ("tiny_chart", "tiny chart", "relaxed_overall"),
        ("tiny_attribute", "tiny attribute", "exact_match"),
        ("tiny_presence", "tiny presence", "pope_f1_score"),
    )
)
GROUPS: dict[str, tuple[Benchmark, ...]] = {
    "paper": PAPER,
    "general": tuple(benchmark for benchmark in PAPER if benchmark.group == "general"),
    "text-rich": tuple(benchmark for benchmark in PAPER if benchmark.group == "text-rich"),
    "tiny": TINY,
}
KNOWN = PAPER + TINY
# Every spelling of a benchmark: typed name, lmms-eval's task, the paper's title. Where two meet the typed name wins.
_BY_NAME = {benchmark.title.lower(): benchmark for benchmark in KNOWN}
_BY_NAME |= {benchmark.task: benchmark for benchmark in KNOWN}
_BY_NAME |= {benchmark.name: benchmark for benchmark in KNOWN}


def resolve(names: Iterable[str]) -> tuple[Benchmark, ...]:
    """The benchmarks of names and groups, in the order given, each once.

    A name that is not in the suite is looked up among lmms-eval's own tasks, which takes seconds.

    Raises:
        PmodError: no name, or unknown names, each with the nearest known ones.
    """
    found: dict[str, Benchmark] = {}
    unknown = []
    for name in (part.strip() for part in names):
        if not name:
            continue
        if name.lower() in GROUPS:
            found |= {benchmark.task: benchmark for benchmark in GROUPS[name.lower()]}
        elif name.lower() in _BY_NAME:
            benchmark = _BY_NAME[name.lower()]
            found[benchmark.task] = benchmark
        elif (task := name.removeprefix(LMMS_PREFIX)) in _tasks_of_lmms_eval():
            found[task] = Benchmark(name, task, task, metric=None)
        else:
            unknown.append(name)
    if unknown:
        raise PmodError("; ".join(_unknown(name) for name in unknown), hint="pmod eval --list")
    if not found:
        raise PmodError("no task was named", hint="pmod eval --list")
    return tuple(found.values())


def folders(benchmark: Benchmark) -> list[str] | None:
    """The folders whose YAML files define a benchmark, or None where all of lmms-eval's have to be searched.

    Reading only these takes milliseconds; indexing all tasks of lmms-eval takes five seconds.
    """
    if benchmark in TINY:
        return [str(TINY_TASKS)]
    if benchmark.folder is None:
        return None
    return [str(_lmms_eval_folder() / "tasks" / benchmark.folder)]


def _unknown(name: str) -> str:
    known = {*GROUPS, *_BY_NAME, *_tasks_of_lmms_eval()}
    near = get_close_matches(name.lower().removeprefix(LMMS_PREFIX), known, n=4, cutoff=0.6)
    return f"no task is called {name!r}" + (f"; near: {', '.join(near)}" if near else "")


def _lmms_eval_folder() -> Path:
    spec = find_spec("lmms_eval")
    assert spec is not None, "the command checks for the [eval] extra first"
    return Path(spec.submodule_search_locations[0])


@cache
def _tasks_of_lmms_eval() -> frozenset[str]:
    """All names that lmms-eval's YAML files define as a task or a group, read without importing lmms-eval."""
    line = re.compile(r"""^(?:task|group)\s*:\s*["']?([\w.-]+)["']?\s*$""", re.MULTILINE)
    names: set[str] = set()
    for path in (_lmms_eval_folder() / "tasks").rglob("*.yaml"):
        names.update(line.findall(path.read_text(encoding="utf-8")))
    return frozenset(names)
