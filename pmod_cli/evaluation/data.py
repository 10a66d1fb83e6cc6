"""Are the data sets of the benchmarks here, or can they be fetched? Asked for all before a model is loaded."""

from __future__ import annotations

from collections.abc import Iterable

from pmod_cli.checkpoints.resolve import HUB_ANSWERS_WITHIN, within
from pmod_cli.errors import PmodError
from pmod_cli.evaluation.suite import Benchmark


def require_data(benchmarks: Iterable[Benchmark]) -> None:
    """Check that `datasets` can open what the benchmarks read.

    Nothing is downloaded but a data set's description. A task that was passed through is checked when it runs.

    Raises:
        PmodError: one sentence with all that is missing, and how to get it.
    """
    wanted = {data: benchmark for benchmark in benchmarks for data in benchmark.data}
    if wanted:
        _go_offline_without_hub()
    missing = {data: benchmark for data, benchmark in wanted.items() if not _can_open(*data.partition(":")[::2])}
    if not missing:
        return
    titles = ", ".join(dict.fromkeys(benchmark.title for benchmark in missing.values()))
    tasks = ",".join(dict.fromkeys(benchmark.name for benchmark in missing.values()))
    repositories = ", ".join(dict.fromkeys(data.partition(":")[0] for data in missing))
    raise PmodError(
        f"the data of {titles} is not on this machine, and cannot be had from the Hugging Face hub: {repositories}",
        hint=f"with a network the same command fetches it; without, run `pmod eval --tasks {tasks} --limit 8` on a "
        "machine that has one, and copy its HF_HOME folder here; `pmod eval --tasks tiny` needs no data",
    )


def _go_offline_without_hub() -> None:
    """Where the hub does not answer, read the cache only, as HF_HUB_OFFLINE=1 does: no minutes of retries."""
    import datasets
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return
    try:
        within(HUB_ANSWERS_WITHIN, lambda: get_session().head(constants.ENDPOINT))
    except Exception:  # whichever way a network can fail
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def _can_open(repository: str, configuration: str) -> bool:
    from datasets import load_dataset_builder

    try:
        load_dataset_builder(repository, configuration or None)
    except (OSError, ValueError):  # no network, no such repository; not in the cache under this name
        return False
    return True
