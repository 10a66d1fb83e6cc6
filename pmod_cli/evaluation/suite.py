"""The benchmarks by the names that users type: the paper's fourteen and the tiny four. Imports nothing heavy."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from pmod_cli.core.errors import PmodError
from pmod_cli.evaluation import sources
from pmod_cli.evaluation.sources import Source

TINY_TASKS = Path(__file__).with_name("tasks")
TINY_QUESTIONS = 1000  # per tiny task
LMMS_PREFIX = "lmms:"  # `lmms:docvqa` is lmms-eval's own group of that name
JUDGED = "mmbench_en_dev"  # MMBench with a judge model for answers that its parser cannot read
JUDGE_KEYS = {"openai": "OPENAI_API_KEY", "azure": "AZURE_API_KEY"}  # by $API_TYPE, as lmms-eval reads them


@dataclass(frozen=True)
class Benchmark:
    """One row of the report: an lmms-eval task, or group of tasks, and its headline number.

    Attributes:
        name: What a user types.
        title: What the report prints, as in the paper's tables.
        task: lmms-eval's name of the task or group.
        metric: Headline metric, as lmms-eval keys it in its results, without the filter. None: the task's first.
        folder: Folder of the task's YAML, inside lmms-eval's tasks; None for our own and for tasks passed through.
        data: The splits that the task reads; none where the questions are drawn here, or the task is passed through.
        group: `general` or `text-rich` as in the paper, or `tiny`.
        filter: lmms-eval's answer filter that the headline is taken after.
        scale: Factor from lmms-eval's number to the one the paper prints.
    """

    name: str
    title: str
    task: str
    metric: str | None
    folder: str | None = None
    data: tuple[Source, ...] = ()
    group: str = ""
    filter: str = "none"
    scale: float = 100.0

    @property
    def rows(self) -> int | None:
        """Questions of the whole benchmark; None where it is not known."""
        if self.group == "tiny":
            return TINY_QUESTIONS
        asked = [source.rows for source in self.data if "question" in source.columns]
        return sum(asked) if asked else None


def _paper(
    group: str, title: str, name: str, task: str, metric: str, data: tuple[Source, ...], folder: str = "", **more
) -> Benchmark:
    return Benchmark(name, title, task, metric, folder or name, data, group, **more)


PAPER = (
    _paper("general", "SEED", "seed", "seedbench", "seed_image", sources.SEED, "seedbench"),
    _paper("general", "RWQA", "rwqa", "realworldqa", "exact_match", sources.RWQA, "realworldqa"),
    _paper("general", "MME", "mme", "mme", "mme_perception_score", sources.MME, scale=1.0),
    _paper("general", "MMB", "mmb", f"{JUDGED}_static", "gpt_eval_score", sources.MMB, "mmbench", scale=1.0),
    _paper("general", "POPE", "pope", "pope_full", "pope_f1_score", sources.POPE),
    _paper("general", "GQA", "gqa", "gqa", "exact_match", sources.GQA),
    _paper("general", "AI2D", "ai2d", "ai2d", "exact_match", sources.AI2D, filter="flexible-extract"),
    _paper("text-rich", "DocVQA", "docvqa", "docvqa_val", "anls", sources.DOCVQA),
    _paper("text-rich", "ChartQA", "chartqa", "chartqa", "relaxed_overall", sources.CHARTQA),
    _paper("text-rich", "TextVQA", "textvqa", "textvqa_val", "exact_match", sources.TEXTVQA),
    _paper("text-rich", "InfoVQA", "infovqa", "infovqa_val", "anls", sources.INFOVQA),
    _paper("text-rich", "OK-VQA", "okvqa", "ok_vqa_val2014", "exact_match", sources.OKVQA, "ok_vqa"),
    _paper("text-rich", "MMMU", "mmmu", "mmmu_val", "mmmu_acc", sources.MMMU),
    _paper("text-rich", "SQA", "sqa", "scienceqa_img", "exact_match", sources.SQA, "scienceqa"),
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

    A name that is not in the suite is looked up among lmms-eval's own tasks, which takes seconds. MMBench is scored
    statically, and by lmms-eval's judge model where its key is set.

    Raises:
        PmodError: no name, unknown names, each with the nearest known ones, or a judged task without the judge's key.
    """
    found: dict[str, Benchmark] = {}
    unknown = []
    for name in (part.strip() for part in names):
        if not name:
            continue
        if name.lower() in GROUPS:
            chosen = [_judged(benchmark) for benchmark in GROUPS[name.lower()]]
        elif name.lower() in _BY_NAME:
            benchmark = _BY_NAME[name.lower()]
            chosen = [benchmark if name.lower() == benchmark.task else _judged(benchmark)]
        elif (task := name.removeprefix(LMMS_PREFIX)) in _tasks_of_lmms_eval():
            _require_judge(name, task)
            chosen = [_judged(_BY_NAME["mmb"]) if name == JUDGED else Benchmark(name, task, task, metric=None)]
        else:
            unknown.append(name)
            continue
        found |= {benchmark.task: benchmark for benchmark in chosen}
    if unknown:
        raise PmodError("; ".join(_unknown(name) for name in unknown), hint="pmod eval --list")
    if not found:
        raise PmodError("no task was named", hint="pmod eval --list")
    return tuple(found.values())


def _judge_key() -> str:
    """The variable that holds the judge's key."""
    return JUDGE_KEYS.get(os.environ.get("API_TYPE", "openai"), JUDGE_KEYS["openai"])


def _judged(benchmark: Benchmark) -> Benchmark:
    """MMBench with its judge where there is a key for it; every other benchmark as it is."""
    return replace(benchmark, task=JUDGED) if benchmark.name == "mmb" and os.environ.get(_judge_key()) else benchmark


def _require_judge(name: str, task: str) -> None:
    """lmms-eval without a key waits 45 seconds for each answer it cannot read, then draws an option at random."""
    judged = task.startswith("mmbench") and not task.endswith(("_static", "_test"))
    if judged and not os.environ.get(_judge_key()):
        raise PmodError(
            f"{name} is scored by a judge model, and its key, ${_judge_key()}, is not set",
            hint="pmod eval --tasks mmb scores MMBench without a judge",
        )


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
