"""The benchmarks: the paper's fourteen, those of several images and of video, and the tiny ones, one entry each.

Other packages register more.

An entry says what lmms-eval's task is called, which of its numbers counts, and which data it reads. Nothing heavy is
imported.
"""

from __future__ import annotations

import math
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
KINDS = ("text-rich", "general", "hallucination", "grounding")  # of questions: where tokens matter differs
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
        scale: Factor from lmms-eval's number to the one the report prints, see `scale_of`.
        questions: Their number, where the data does not say it; of a group, that of each of its tasks.
        judged_task: lmms-eval's task that scores it with a judge model, used where the judge's key is set.
        units: From a task's rows to what each is scored together with; a limited run draws whole units. None: rows.
        sums: From its answered questions to the sums that make its score, for the interval. None: the score is the mean
            of lmms-eval's items.
        weight: Of the score in the average of the group.
        kind: Of its questions, one of `KINDS`, for the means by kind; empty: it is in none of them.
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
    questions: int | tuple[int, ...] | None = None
    judged_task: str | None = None
    units: Callable[[Any], Iterable[Hashable]] | None = None
    weight: float = 1.0
    sums: Sums | None = None
    kind: str = ""

    @property
    def drawn(self) -> bool:
        """Whether its questions are drawn here, about synthetic documents."""
        return self.folder == str(TINY_TASKS)

    @property
    def rows_of_tasks(self) -> tuple[int, ...]:
        """Questions of each of its tasks; empty where they are not known."""
        asked = [split.rows for split in self.data if not split.pictures_of]
        known = tuple(rows for rows in asked if rows is not None)
        if known and len(known) == len(asked):
            return known
        return (self.questions,) if isinstance(self.questions, int) else self.questions or ()

    @property
    def rows(self) -> int | None:
        """Questions of the whole benchmark; None where it is not known."""
        return sum(self.rows_of_tasks) or None


BENCHMARKS: PluginRegistry[Benchmark] = PluginRegistry("benchmark", "pmod_cli.benchmarks", Benchmark)
register_benchmark = BENCHMARKS.add  # an entry point of the group that names a `Benchmark` does the same


def groups() -> dict[str, tuple[Benchmark, ...]]:
    """The benchmarks that one name stands for: `paper`, and the groups that benchmarks name."""
    found = {"paper": tuple(BENCHMARKS[name] for name in paper.BENCHMARKS)}
    for benchmark in BENCHMARKS.values():
        if benchmark.group:
            found[benchmark.group] = (*found.get(benchmark.group, ()), benchmark)
    return found


def asked_of(rows: int, limit: float | None) -> int:
    """How many of a task's rows a limit leaves: a count, or a fraction below 1, rounded up."""
    if limit is None:
        return rows
    return math.ceil(round(rows * limit, 6)) if limit < 1 else min(int(limit), rows)  # 2500 * 0.07 is above 175


def sums_of(benchmark: Benchmark, metric: str) -> Sums:
    """The sums that make a benchmark's score: its own, as it is registered, or those of a benchmark with its metric."""
    if benchmark.sums is None:
        benchmark = BENCHMARKS.get(benchmark.name) or _with_metric(metric) or benchmark
    return benchmark.sums or _sums("means")


def scale_of(benchmark: Benchmark, metric: str | None) -> float:
    """The factor of a benchmark's score: its own; of a task that was passed through, of one with its metric."""
    passed_through = benchmark.metric is None and benchmark.name not in BENCHMARKS
    return ((_with_metric(metric) if passed_through else None) or benchmark).scale


def _with_metric(metric: str | None) -> Benchmark | None:
    return next((other for other in BENCHMARKS.values() if other.metric == metric is not None), None)


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


_LETTERS = "choice_a choice_b choice_c choice_d"
_IMAGES = "image_1 image_2 image_3 image_4 image_5 image_6 image_7"
_DATA = {  # by benchmark
    "seed": (
        _split("SEED-Bench", "", "test", 17990, 27_200, f"image question {_LETTERS} answer data_type question_id"),
    ),
    "rwqa": (_split("RealWorldQA", "", "test", 765, 678, "image question answer"),),
    "mme": (_split("MME", "", "test", 2374, 865, "image question answer question_id category"),),
    "mmb": (
        _split(
            "MMBench",
            "en",
            "dev",
            4329,
            103,
            "image index question hint A B C D answer category L2-category source split",
        ),
    ),
    "pope": tuple(
        _split("POPE", "Full", split, rows, 85, "image question answer question_id")
        for split, rows in (("adversarial", 3000), ("popular", 3000), ("random", 2910))
    ),
    "gqa": (
        _split("GQA", "testdev_balanced_instructions", "testdev", 12578, 2.1, "imageId question answer"),
        _split("GQA", "testdev_balanced_images", "testdev", 398, 66, "id image", pictures_of="imageId"),
    ),
    "ai2d": (_split("ai2d", "", "test", 3088, 139, "image question options answer"),),
    "docvqa": (_split("DocVQA", "DocVQA", "validation", 5349, 2_300, "image question answers questionId"),),
    "chartqa": (_split("ChartQA", "", "test", 2500, 73, "image question answer type"),),
    "textvqa": (_split("textvqa", "", "validation", 5000, 920, "image question answers question_id"),),
    "infovqa": (_split("DocVQA", "InfographicVQA", "validation", 2801, 310, "image question answers questionId"),),
    "okvqa": (_split("OK-VQA", "", "val2014", 5046, 831, "image question answers question_id"),),
    "mmmu": (_split("MMMU", "", "validation", 900, 341, f"id question options answer question_type {_IMAGES}"),),
    "sqa": (_split("ScienceQA", "ScienceQA-IMG", "test", 2017, 130, "image question choices answer hint"),),
}


def _add(group: str, name: str, title: str, task: str, metric: str, folder: str, **more: Any) -> None:
    kind = more.pop("kind", group if group in KINDS else "")
    BENCHMARKS.add(Benchmark(name, title, task, metric, folder, _DATA.get(name, ()), group, kind=kind, **more))


_general, _text_rich = partial(_add, "general"), partial(_add, "text-rich")
_general("seed", "SEED", "seedbench", "seed_image", "seedbench", sums=_sums("seed"))
_general("rwqa", "RWQA", "realworldqa", "exact_match", "realworldqa")
_general(
    *("mme", "MME", "mme", "mme_perception_score", "mme"),
    scale=1.0,
    units=_mme_pictures,
    weight=paper.MME_IN_AVERAGE,
    sums=_sums("mme"),
)
_general(
    *("mmb", "MMB", "mmbench_en_dev_static", "gpt_eval_score", "mmbench"),
    scale=1.0,
    judged_task="mmbench_en_dev",  # a judge model for answers that its parser cannot read
    units=_mmbench_questions,
    sums=_sums("mmbench"),
)
_general("pope", "POPE", "pope_full", "pope_f1_score", "pope", sums=_sums("f1"), kind="hallucination")
_general("gqa", "GQA", "gqa", "exact_match", "gqa")
_general("ai2d", "AI2D", "ai2d", "exact_match", "ai2d", filter="flexible-extract")
_text_rich("docvqa", "DocVQA", "docvqa_val", "anls", "docvqa")
_text_rich("chartqa", "ChartQA", "chartqa", "relaxed_overall", "chartqa")
_text_rich("textvqa", "TextVQA", "textvqa_val", "exact_match", "textvqa")
_text_rich("infovqa", "InfoVQA", "infovqa_val", "anls", "infovqa")
_text_rich("okvqa", "OK-VQA", "ok_vqa_val2014", "exact_match", "ok_vqa")
_text_rich("mmmu", "MMMU", "mmmu_val", "mmmu_acc", "mmmu", sums=_sums("mmmu"))
_text_rich("sqa", "SQA", "scienceqa_img", "exact_match", "scienceqa")
# lmms-eval fetches the data of these by itself: films are archives, which it unpacks below HF_HOME.
_several, _video = (partial(_add, group) for group in ("multi-image", "video"))
_several(
    *("muirbench", "MuirBench", "muirbench", "muirbench_score_overall", "muirbench"),
    filter="flexible-extract",
    questions=2600,
    sums=_sums("options"),
)
_several(
    *("blink", "BLINK", "blink_groups", "blink_acc", "blink"),
    questions=(117, 120, 132, 130, 150, 150, 133, 122, 124, 134, 139, 143, 172, 135),
    sums=_sums("options"),
)
_video(
    *("mvbench", "MVBench", "mvbench", "mvbench_accuracy", "mvbench"),
    scale=1.0,
    questions=(200,) * 20,
    sums=_sums("mvbench"),
)
_video(
    *("videomme", "Video-MME", "videomme", "videomme_perception_score", "videomme"),
    scale=1.0,
    questions=2700,
    sums=_sums("videomme"),
)
_video(  # the part with answers
    *("egoschema", "EgoSchema", "egoschema_subset", "score", "egoschema"),
    questions=500,
    sums=_sums("options"),
)
for _group, _kind, _name, _metric, _own in (
    ("tiny", "text-rich", "doc", "anls", None),
    ("tiny", "text-rich", "chart", "relaxed_overall", None),
    ("tiny", "general", "attribute", "exact_match", None),
    ("tiny", "hallucination", "presence", "pope_f1_score", _sums("f1")),
    ("tiny", "text-rich", "above", "exact_match", None),
    ("tiny", "text-rich", "dearer", "exact_match", None),
    ("tiny", "grounding", "where", "exact_match", None),
    ("tiny-several", "general", "which", "exact_match", None),  # two pictures
    ("tiny-several", "text-rich", "moving", "exact_match", None),  # a film
):
    _task = f"tiny_{_name}"
    _add(
        *(_group, _task, f"tiny {_name}", _task, _metric, str(TINY_TASKS)),
        questions=TINY_QUESTIONS,
        sums=_own,
        kind=_kind,
    )
