"""The benchmarks: the paper's fourteen and the tiny four, one entry each, and those that other packages register.

An entry says what lmms-eval's task is called, which of its numbers counts, and which data it reads. Nothing heavy is
imported.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmod_cli import paper
from pmod_cli.core.plugins import PluginRegistry

if TYPE_CHECKING:
    from pmod_cli.evaluation.intervals import Sums

TINY_TASKS = Path(__file__).with_name("tasks")
TINY_QUESTIONS = 1000  # per tiny task
OWNER = "lmms-lab-encoder"  # who keeps the data sets of lmms-eval 0.7.3 on the hub


@dataclass(frozen=True)
class Split:
    """One split of one data set.

    Attributes:
        repository: Name on the hub, and folder in a mirror: `owner/name`.
        configuration: Of a repository that holds several data sets; empty where it holds one.
        split: The rows that are asked.
        rows: Their number on the hub; None where it is not known.
        megabytes: About what the files of the split take (10^6 bytes), from the hub's file lists; None: not known.
        columns: What lmms-eval reads of a row.
        pictures_of: For a split that holds the pictures of another one's questions: the column there that names them,
            as `id` does here. Empty: the questions have their pictures.
    """

    repository: str
    configuration: str = ""
    split: str = "test"
    rows: int | None = None
    megabytes: float | None = None
    columns: tuple[str, ...] = ()
    pictures_of: str = ""

    def __str__(self) -> str:
        return " ".join(filter(None, (self.repository, self.configuration, self.split)))


@dataclass(frozen=True)
class Benchmark:
    """One row of the report: an lmms-eval task, or group of tasks, and its headline number.

    Attributes:
        name: What a user types.
        title: What the report prints, as in the paper's tables.
        task: lmms-eval's name of the task or group.
        metric: Headline metric, as lmms-eval keys it in its results, without the filter. None: the task's first.
        folder: Folder of the task's YAML: a whole path, or a folder of lmms-eval's tasks; None: all of these are
            searched, which takes seconds.
        data: The splits that the task reads; none where it draws its questions, or nothing is known of its data.
        group: Name that stands for all benchmarks of the group: `general` and `text-rich` are the paper's.
        filter: lmms-eval's answer filter that the headline is taken after.
        scale: Factor from lmms-eval's number to the one the report prints.
        questions: Their number, where the data does not say it.
        judged_task: lmms-eval's task that scores it with a judge model, used where the judge's key is set.
        units: From a task's rows to what each is scored together with; a limited run draws whole units. None: rows.
        sums: From its answered questions to the sums that make its score, for the interval. None: the score is the mean
            of lmms-eval's items.
        weight: Of the score in the average of the group.
    """

    name: str
    title: str
    task: str
    metric: str | None
    folder: str | None = None
    data: tuple[Split, ...] = ()
    group: str = ""
    filter: str = "none"
    scale: float = 100.0
    questions: int | None = None
    judged_task: str | None = None
    units: Callable[[Any], Iterable[Hashable]] | None = None
    weight: float = 1.0
    sums: Sums | None = None

    @property
    def rows(self) -> int | None:
        """Questions of the whole benchmark; None where it is not known."""
        asked = [split.rows for split in self.data if not split.pictures_of]
        return self.questions if not asked or None in asked else sum(asked)


BENCHMARKS: PluginRegistry[Benchmark] = PluginRegistry("benchmark", "pmod_cli.benchmarks")
register_benchmark = BENCHMARKS.add  # an entry point of the group that names a `Benchmark` does the same


def groups() -> dict[str, tuple[Benchmark, ...]]:
    """The benchmarks that one name stands for: `paper`, and the groups that benchmarks name."""
    found = {"paper": tuple(BENCHMARKS[name] for name in paper.BENCHMARKS)}
    for benchmark in BENCHMARKS.values():
        if benchmark.group:
            found[benchmark.group] = (*found.get(benchmark.group, ()), benchmark)
    return found


def sums_of(benchmark: Benchmark, metric: str) -> Sums:
    """The sums that make a benchmark's score: its own, as it is registered, or those of a benchmark with its metric."""
    if benchmark.sums is None:
        alike = next((other for other in BENCHMARKS.values() if other.metric == metric), benchmark)
        benchmark = BENCHMARKS.get(benchmark.name) or alike
    return benchmark.sums or _sums("means")


def _sums(name: str) -> Sums:
    """A function of `score_sums`. That imports NumPy, so it is imported when a score is there."""
    return partial(_call, name)


def _call(name: str, records: Any) -> Any:
    return getattr(import_module("pmod_cli.evaluation.score_sums"), name)(records)


def _mme_pictures(rows: Any) -> Iterable[Hashable]:
    """A bonus where both questions about a picture are right."""
    return zip(rows["category"], rows["question_id"], strict=True)


def _mmbench_questions(rows: Any) -> Iterable[Hashable]:
    """A question is asked under several orders of its options, at rows whose `index` differs by millions."""
    return (index % 1_000_000 for index in rows["index"])


def _split(name: str, configuration: str, split: str, rows: int, megabytes: float, columns: str, **more: str) -> Split:
    return Split(f"{OWNER}/{name}", configuration, split, rows, megabytes, tuple(columns.split()), **more)


_CHOICES = "choice_a choice_b choice_c choice_d"
_IMAGES = "image_1 image_2 image_3 image_4 image_5 image_6 image_7"
_MMBENCH = "image index question hint A B C D answer category L2-category source split"
_POPE = "image question answer question_id"
_DOCUMENT = "image question answers questionId"

for _benchmark in (
    Benchmark(
        "seed",
        "SEED",
        "seedbench",
        "seed_image",
        "seedbench",
        (_split("SEED-Bench", "", "test", 17990, 27_200, f"image question {_CHOICES} answer data_type question_id"),),
        group="general",
        sums=_sums("seed"),
    ),
    Benchmark(
        "rwqa",
        "RWQA",
        "realworldqa",
        "exact_match",
        "realworldqa",
        (_split("RealWorldQA", "", "test", 765, 678, "image question answer"),),
        group="general",
    ),
    Benchmark(
        "mme",
        "MME",
        "mme",
        "mme_perception_score",
        "mme",
        (_split("MME", "", "test", 2374, 865, "image question answer question_id category"),),
        group="general",
        scale=1.0,
        units=_mme_pictures,
        weight=paper.MME_IN_AVERAGE,
        sums=_sums("mme"),
    ),
    Benchmark(
        "mmb",
        "MMB",
        "mmbench_en_dev_static",
        "gpt_eval_score",
        "mmbench",
        (_split("MMBench", "en", "dev", 4329, 103, _MMBENCH),),
        group="general",
        scale=1.0,
        judged_task="mmbench_en_dev",  # a judge model for answers that its parser cannot read
        units=_mmbench_questions,
        sums=_sums("mmbench"),
    ),
    Benchmark(
        "pope",
        "POPE",
        "pope_full",
        "pope_f1_score",
        "pope",
        (
            _split("POPE", "Full", "adversarial", 3000, 85, _POPE),
            _split("POPE", "Full", "popular", 3000, 85, _POPE),
            _split("POPE", "Full", "random", 2910, 85, _POPE),
        ),
        group="general",
        sums=_sums("f1"),
    ),
    Benchmark(
        "gqa",
        "GQA",
        "gqa",
        "exact_match",
        "gqa",
        (
            _split("GQA", "testdev_balanced_instructions", "testdev", 12578, 2.1, "imageId question answer"),
            _split("GQA", "testdev_balanced_images", "testdev", 398, 66, "id image", pictures_of="imageId"),
        ),
        group="general",
    ),
    Benchmark(
        "ai2d",
        "AI2D",
        "ai2d",
        "exact_match",
        "ai2d",
        (_split("ai2d", "", "test", 3088, 139, "image question options answer"),),
        group="general",
        filter="flexible-extract",
    ),
    Benchmark(
        "docvqa",
        "DocVQA",
        "docvqa_val",
        "anls",
        "docvqa",
        (_split("DocVQA", "DocVQA", "validation", 5349, 2_300, _DOCUMENT),),
        group="text-rich",
    ),
    Benchmark(
        "chartqa",
        "ChartQA",
        "chartqa",
        "relaxed_overall",
        "chartqa",
        (_split("ChartQA", "", "test", 2500, 73, "image question answer type"),),
        group="text-rich",
    ),
    Benchmark(
        "textvqa",
        "TextVQA",
        "textvqa_val",
        "exact_match",
        "textvqa",
        (_split("textvqa", "", "validation", 5000, 920, "image question answers question_id"),),
        group="text-rich",
    ),
    Benchmark(
        "infovqa",
        "InfoVQA",
        "infovqa_val",
        "anls",
        "infovqa",
        (_split("DocVQA", "InfographicVQA", "validation", 2801, 310, _DOCUMENT),),
        group="text-rich",
    ),
    Benchmark(
        "okvqa",
        "OK-VQA",
        "ok_vqa_val2014",
        "exact_match",
        "ok_vqa",
        (_split("OK-VQA", "", "val2014", 5046, 831, "image question answers question_id"),),
        group="text-rich",
    ),
    Benchmark(
        "mmmu",
        "MMMU",
        "mmmu_val",
        "mmmu_acc",
        "mmmu",
        (_split("MMMU", "", "validation", 900, 341, f"id question options answer question_type {_IMAGES}"),),
        group="text-rich",
        sums=_sums("mmmu"),
    ),
    Benchmark(
        "sqa",
        "SQA",
        "scienceqa_img",
        "exact_match",
        "scienceqa",
        (_split("ScienceQA", "ScienceQA-IMG", "test", 2017, 130, "image question choices answer hint"),),
        group="text-rich",
    ),
    *(
        Benchmark(task, title, task, metric, str(TINY_TASKS), group="tiny", questions=TINY_QUESTIONS, sums=sums)
        for task, title, metric, sums in (
            ("tiny_doc", "tiny doc", "anls", None),
            ("tiny_chart", "tiny chart", "relaxed_overall", None),
            ("tiny_attribute", "tiny attribute", "exact_match", None),
            ("tiny_presence", "tiny presence", "pope_f1_score", _sums("f1")),
        )
    ),
):
    BENCHMARKS.add(_benchmark)
