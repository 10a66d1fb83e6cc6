"""The questions of a benchmark: built by lmms-eval from opened data, drawn by the seed, each with a key."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lmms_eval.tasks
import lmms_eval.utils
from lmms_eval.tasks import TaskManager, get_task_dict

from pmod_cli.core.errors import RUN_FAILED, PmodError, first_line
from pmod_cli.evaluation import data as data_files
from pmod_cli.evaluation.benchmarks import BENCHMARKS, Benchmark, Split, asked_of
from pmod_cli.evaluation.processes import hidden_launcher
from pmod_cli.evaluation.suite import folders, task_files

if TYPE_CHECKING:
    from lmms_eval.api.instance import Instance
    from lmms_eval.api.task import ConfigurableTask


@dataclass
class Questions:
    """What is asked, in lmms-eval's order.

    Attributes:
        tasks: lmms-eval's tasks by name, cut down to the drawn rows.
        requests: One per question. Their `doc_id` counts the drawn rows.
        rows: By task, the place of each drawn row in the whole data set.
        available: By task, the number of rows of the whole data set.
        digests: By request, a digest of the question: its row with its pictures, its text and generation settings.
    """

    tasks: dict[str, ConfigurableTask]
    requests: list[Instance] = field(default_factory=list)
    rows: dict[str, list[int]] = field(default_factory=dict)
    available: dict[str, int] = field(default_factory=dict)
    digests: list[str] = field(default_factory=list)

    def keys(self, answerer: str) -> list[str]:
        """By request, the key of its answer by a model; `answerer` is a digest of the model and its settings."""
        return [hashlib.sha256(f"{answerer}/{digest}".encode()).hexdigest()[:24] for digest in self.digests]

    def row_of(self, request: Instance) -> int:
        """The place of a question's row in the whole data set."""
        return self.rows[request.task_name][request.doc_id]


def load(
    benchmark: Benchmark, *, limit: float | None = None, seed: int = 0, data_root: Path | None = None, log: Path
) -> Questions:
    """Open a benchmark's data and build its questions.

    Args:
        limit: Rows per task: a count, or a fraction below 1; drawn by `seed`, so that every model gets the same.
        log: File that takes what lmms-eval prints and logs.

    Raises:
        PmodError: the task asks in a way that is not supported.
    """
    with quiet_lmms_eval(log), hidden_launcher():
        tasks = load_tasks(benchmark, data_root)
        questions = Questions(tasks)
        for name, task in tasks.items():
            _draw(questions, name, task, limit, seed)
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=seed)
            task.build_all_requests(rank=0, world_size=1)
            _add(questions, name, task)
    return questions


@contextlib.contextmanager
def quiet_lmms_eval(log: Path) -> Iterator[None]:
    """lmms-eval and its tasks print and log on stdout, which is ours for the result: both go to a file."""
    import datasets
    import lmms_eval.api.task
    import lmms_eval.evaluator
    from loguru import logger

    with log.open("a", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        logger.remove()
        logger.add(file, level="INFO")
        datasets.disable_progress_bars()
        lmms_eval.evaluator.tqdm = lmms_eval.api.task.tqdm = _no_bar
        try:
            yield
        finally:
            logger.remove()


def _no_bar(*given: Any, **named: Any) -> Any:
    from tqdm import tqdm

    return tqdm(*given, **named | {"disable": True})


def _draw(questions: Questions, name: str, task: ConfigurableTask, limit: float | None, seed: int) -> None:
    """Cut a task's data down to the drawn rows, in their order."""
    split = task.config.test_split if task.has_test_docs() else task.config.validation_split
    questions.available[name] = available = len(task.eval_docs)
    questions.rows[name] = rows = drawn_rows(name, task.eval_docs_no_media, limit, seed)
    if len(rows) < available:
        same = task.dataset_no_image is task.dataset
        task.dataset[split] = task.dataset[split].select(rows)
        if not same:
            task.dataset_no_image[split] = task.dataset_no_image[split].select(rows)


def drawn_rows(task: str, docs: Any, limit: float | None, seed: int) -> list[int]:
    """Places of the rows that a limited run asks, ascending; all of them without a limit."""
    available = len(docs)
    wanted = asked_of(available, limit)
    if wanted == available:
        return list(range(available))
    draw = random.Random(f"{seed}/{task}")
    known = (benchmark for benchmark in BENCHMARKS.values() if task in (benchmark.task, benchmark.judged_task))
    unit_of = next((benchmark.units for benchmark in known), None)  # rows that are scored together are drawn together
    if unit_of is None:
        return sorted(draw.sample(range(available), wanted))
    units: dict[Hashable, list[int]] = {}
    for place, unit in enumerate(unit_of(docs)):
        units.setdefault(unit, []).append(place)
    rows: list[int] = []
    for unit in draw.sample(list(units), len(units)):
        if len(rows) >= wanted:
            break
        rows += units[unit]
    return sorted(rows)


def _add(questions: Questions, name: str, task: ConfigurableTask) -> None:
    docs, pictures = task.eval_docs_no_media, _encoded_pictures(task)
    for request in task.instances:
        if request.request_type != "generate_until":
            raise PmodError(f"{name} asks by {request.request_type}; pmod scores generated answers only")
        if request.repeats != 1:
            raise PmodError(f"{name} asks each question {request.repeats} times; pmod asks once")
        text, settings = request.args[:2]
        parts = (name, str(task.VERSION), questions.rows[name][request.doc_id], text, settings, docs[request.doc_id])
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=_name_of).encode())
        for picture in pictures(request.doc_id):
            digest.update(hashlib.sha256(picture).digest())
        questions.digests.append(digest.hexdigest())
        questions.requests.append(request)


def _encoded_pictures(task: ConfigurableTask) -> Callable[[int], Iterator[bytes]]:
    """From the place of a row to its pictures as the data files hold them: nothing is decoded."""
    if isinstance(task.config.doc_to_visual, PicturesApart):
        apart = task.config.doc_to_visual
        return lambda place: _bytes_in(apart.encoded(task.eval_docs_no_media[place]))
    if not hasattr(task.eval_docs, "with_format"):
        return lambda place: iter(())  # drawn from numbers, which the row has
    rows = task.eval_docs.with_format("arrow")
    return lambda place: _bytes_in(rows[place : place + 1].to_pylist())


def _bytes_in(value: Any) -> Iterator[bytes]:
    if isinstance(value, bytes):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _bytes_in(part)


def _name_of(value: Any) -> str:
    """What stands for a value that JSON cannot hold: never an address in memory."""
    shown = str(value)
    return type(value).__name__ if " at 0x" in shown else shown


def load_tasks(benchmark: Benchmark, data_root: Path | None = None) -> dict[str, ConfigurableTask]:
    """The tasks of a benchmark by lmms-eval's name; one, or those of its group.

    Args:
        data_root: Mirror that holds the data sets as `lmms-lab-encoder/<Repo>/`; None: the cache, else the hub.

    Raises:
        PmodError: a split is not there, is empty or damaged, or its columns are not those that lmms-eval reads.
    """
    return _leaves(get_task_dict([benchmark.task], Tasks(folders(benchmark), data_root), "simple"))


class Tasks(TaskManager):
    """lmms-eval's tasks, each pointed at the parquet files of the one split that it asks.

    Left alone, lmms-eval downloads every split of a data set, asks for a login that these data sets do not need, and
    knows no mirror.

    Args:
        paths: Folders of task files; None: all of lmms-eval's.
        data_root: As in `load_tasks`.
    """

    def __init__(self, paths: list[str] | None, data_root: Path | None) -> None:
        self._data_root = data_root
        super().__init__("WARNING", paths, include_defaults=paths is None, model_name="pmod")

    def _get_task_and_group(self, task_dir: str) -> dict[str, dict]:
        """What a folder defines: name to kind and file. lmms-eval's own ends at a YAML file of another tool."""
        if Path(task_dir).is_relative_to(Path(lmms_eval.tasks.__file__).parent):
            return super()._get_task_and_group(task_dir)
        found: dict[str, dict] = {}
        for path in task_files(Path(task_dir)):
            config = lmms_eval.utils.load_yaml_config(str(path), mode="simple")
            if self._config_is_python_task(config):
                found[config["task"]] = {"type": "python_task", "yaml_path": str(path)}
            elif self._config_is_group(config):
                found[config["group"]] = {"type": "group", "task": -1, "yaml_path": str(path)}  # read when it is asked
            elif self._config_is_task(config):
                found[config["task"]] = {"type": "task", "yaml_path": str(path)}
        return found

    def _get_config(self, name: str) -> dict[str, Any]:
        config = super()._get_config(name)
        if not isinstance(config.get("dataset_path"), str):
            return config  # a group, or a task that draws its data
        source = self._source(config)
        if source is None:
            return config | {"dataset_kwargs": _without_login(config.get("dataset_kwargs"))}
        files = self._obtain(source)
        opened = {"data_files": {source.split: [str(file) for file in files]}}
        config = config | {"dataset_path": "parquet", "dataset_name": None, "dataset_kwargs": opened}
        if (pictures := _pictures_of(source)) is not None:
            config |= {"process_docs": None, "doc_to_visual": PicturesApart(pictures, self._obtain(pictures))}
        return config

    def _source(self, config: dict[str, Any]) -> Split | None:
        """The data of a task: a benchmark's is known; another task's is looked up where there is a mirror."""
        split = config.get("test_split") or config.get("validation_split")
        key = (config["dataset_path"], config.get("dataset_name") or "", (split or "").strip())
        for benchmark in BENCHMARKS.values():
            for source in benchmark.data:
                if key == (source.repository, source.configuration, source.split):
                    return source
        if self._data_root is None:
            return None
        if not data_files.find(Split(*key), self._data_root):
            raise PmodError(f"{Split(*key)}: not in {self._data_root}", code=RUN_FAILED)
        return Split(*key)

    def _obtain(self, source: Split) -> list[Path]:
        files = data_files.obtain(source, self._data_root)
        _check(source, files)
        return files


class PicturesApart:
    """Pictures that lie beside the questions, found by name.

    lmms-eval's GQA names its pictures' repository in code, and copies a picture to each of its questions.

    Args:
        source: The split with the pictures.
        files: Of it.
    """

    def __init__(self, source: Split, files: Sequence[Path]) -> None:
        from datasets import load_dataset

        opened = load_dataset("parquet", data_files={source.split: [str(file) for file in files]})[source.split]
        self._source, self._pictures = source, opened
        self._places = {name: place for place, name in enumerate(opened["id"])}

    def __call__(self, doc: dict) -> list:
        """The picture of a row, RGB."""
        return [self._pictures[self._place(doc)]["image"].convert("RGB")]

    def encoded(self, doc: dict) -> list[dict]:
        """The same as the file holds it; nothing where there is none, which is said when it is asked for."""
        name = doc[self._source.pictures_of]
        rows = self._pictures.with_format("arrow")
        return rows[self._places[name] : self._places[name] + 1].to_pylist() if name in self._places else []

    def _place(self, doc: dict) -> int:
        name = doc[self._source.pictures_of]
        if name not in self._places:
            raise PmodError(f"{self._source} has no picture {name}", code=RUN_FAILED)
        return self._places[name]


def _pictures_of(source: Split) -> Split | None:
    """The split that holds the pictures of another one's questions; None where the questions have them."""
    data = next((benchmark.data for benchmark in BENCHMARKS.values() if source in benchmark.data), ())
    return next((split for split in data if split.pictures_of and split != source), None)


def _check(source: Split, files: Sequence[Path]) -> None:
    """Read the files' ends: can they be read, have they rows, and the columns that the task needs?"""
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import ParquetFile

    rows = 0
    for file in files:
        try:
            with ParquetFile(file) as opened:
                rows += opened.metadata.num_rows
                columns = opened.schema_arrow.names
        except (ArrowInvalid, OSError) as error:
            raise PmodError(
                f"{file} is no whole parquet file: {first_line(error)}",
                hint="in the mirror: sha256sum --check SHA256SUMS",
                code=RUN_FAILED,
            ) from error
        if lacking := [column for column in source.columns if column not in columns]:
            raise PmodError(
                f"{file}: expected the columns {', '.join(source.columns)}; {', '.join(lacking)} not found among "
                f"{', '.join(columns)}",
                hint=f"is this a copy of {source.repository} as it is on the hub?",
                code=RUN_FAILED,
            )
    if not rows:
        raise PmodError(f"{source}: no rows in {files[0].parent}", hint="fetch the data again", code=RUN_FAILED)


def _without_login(options: dict[str, Any] | None) -> dict[str, Any]:
    """The options of `load_dataset`; a login is used where there is one, and not asked for where there is none."""
    from huggingface_hub import get_token

    return {name: value for name, value in (options or {}).items() if name != "token" or get_token()}


def _leaves(tasks: dict) -> dict[str, ConfigurableTask]:
    """lmms-eval nests the tasks of a group under the group."""
    leaves: dict[str, ConfigurableTask] = {}
    for name, task in tasks.items():
        leaves |= _leaves(task) if isinstance(task, dict) else {name: task}
    return leaves
