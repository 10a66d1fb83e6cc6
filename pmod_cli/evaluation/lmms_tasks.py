"""A benchmark's lmms-eval tasks, with their data opened: from a mirror, the Hugging Face cache or the hub."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmms_eval.tasks import TaskManager, get_task_dict

from pmod_cli.core.errors import RUN_FAILED, PmodError
from pmod_cli.evaluation import mirror
from pmod_cli.evaluation.benchmarks import BENCHMARKS, Benchmark, Split
from pmod_cli.evaluation.suite import folders

if TYPE_CHECKING:
    from lmms_eval.api.task import ConfigurableTask


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

    def _get_config(self, name: str) -> dict[str, Any]:
        config = super()._get_config(name)
        if not isinstance(config.get("dataset_path"), str):
            return config  # a group, or a task that draws its data
        source = self._source(config)
        if source is None:
            return config | {"dataset_kwargs": _without_login(config.get("dataset_kwargs"))}
        files = mirror.obtain(source, self._data_root)
        _check(source, files)
        opened = {"data_files": {source.split: [str(file) for file in files]}}
        config = config | {"dataset_path": "parquet", "dataset_name": None, "dataset_kwargs": opened}
        if (pictures := _pictures_of(source)) is not None:
            config |= {"process_docs": None, "doc_to_visual": self._picture(pictures)}
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
        if not mirror.find(Split(*key), self._data_root):
            raise PmodError(f"{Split(*key)}: not in {self._data_root}", code=RUN_FAILED)
        return Split(*key)

    def _picture(self, source: Split) -> Callable[[dict], list]:
        """lmms-eval's GQA names its pictures' repository in code, and copies a picture to each of its questions.

        Args:
            source: The split with the pictures.
        """
        from datasets import load_dataset

        files = mirror.obtain(source, self._data_root)
        _check(source, files)
        pictures = load_dataset("parquet", data_files={source.split: [str(file) for file in files]})[source.split]
        place = {name: index for index, name in enumerate(pictures["id"])}

        def picture(doc: dict) -> list:
            name = doc[source.pictures_of]
            if name not in place:
                raise PmodError(f"{source} has no picture {name}", code=RUN_FAILED)
            return [pictures[place[name]]["image"].convert("RGB")]

        return picture


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
                f"{file} is no whole parquet file: {str(error).splitlines()[0]}",
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
