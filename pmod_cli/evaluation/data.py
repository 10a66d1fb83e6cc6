"""Are the data sets of the benchmarks here, or can they be fetched? Asked for all before a model is loaded."""

from __future__ import annotations

from collections.abc import Iterable

from pmod_cli.errors import PmodError
from pmod_cli.evaluation.suite import Benchmark


def require_data(benchmarks: Iterable[Benchmark]) -> None:
    """Check that `datasets` can open what the benchmarks read.

    Nothing is downloaded but a data set's description. A task that was passed through is checked when it runs.

    Raises:
        PmodError: one sentence with all that is missing, and how to get it.
    """
    missing = {
        data: benchmark
        for benchmark in benchmarks
        for data in benchmark.data
        if not _can_open(*data.partition(":")[::2])
    }
    if not missing:
        return
    titles = ", ".join(dict.fromkeys(benchmark.title for benchmark in missing.values()))
    tasks = ",".join(dict.fromkeys(benchmark.name for benchmark in missing.values()))
    repositories = ", ".join(dict.fromkeys(data.partition(":")[0] for data in missing))
    raise PmodError(
        f"the data of {titles} is not on this machine, and cannot be had from the Hugging Face hub: {repositories}",
        hint=f"with a network the same command fetches it; else run `pmod eval --tasks {tasks} --limit 8` on a machine "
        "that has one and copy its HF_HOME folder here; `pmod eval --tasks tiny` needs no data",
    )


def _can_open(repository: str, configuration: str) -> bool:
    from datasets import load_dataset_builder

    try:
        load_dataset_builder(repository, configuration or None)
    except (
        OSError,
        ValueError,
    ):  # no network, no such repository; not in the cache under this name
        return False
    return True
