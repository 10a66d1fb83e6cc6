"""The folder of a run: what lies where, one run at a time, and no run over another one's results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pmod_cli.core import folders
from pmod_cli.core.atomic import write_json, write_text
from pmod_cli.core.errors import PmodError
from pmod_cli.core.markers import is_new, require_kind
from pmod_cli.evaluation.benchmarks import Benchmark
from pmod_cli.evaluation.outcome import OF_LMMS_EVAL
from pmod_cli.evaluation.processes import ALONE, Processes
from pmod_cli.evaluation.results import markdown, pareto, tables
from pmod_cli.evaluation.results.stored import RESULTS, read_run

KIND, COMPARISON = "evaluation", "comparison"
FIGURES = (pareto.PICTURE, pareto.PICTURE_OF_MEAN, pareto.PAGE)
MEASURED = ("seconds", "peak_memory_mib", "processes")  # of an entry: known only to the run that asked
WRITTEN = ("journal", "answers", "changed", OF_LMMS_EVAL, RESULTS, "results.md", "results.csv", *FIGURES)


class ResultsFolder(folders.OutputFolder):
    """The folder of a run; made where it is not there.

    Args:
        processes: Those of the run. The one of rank 0 locks and prepares; the others wait, and fail where it fails.
    """

    worth_keeping = "journal"

    def __init__(self, out: Path, processes: Processes = ALONE, *, overwrite: bool = False) -> None:
        super().__init__(out, overwrite=overwrite)
        self.identity: dict[str, Any] = {}
        self._processes = processes

    def prepare(
        self, identity: Mapping[str, Any], benchmarks: Iterable[Benchmark], sources: Iterable[Path] = ()
    ) -> None:
        """Lock the folder, and check that what it holds is this run's, or may be replaced by this run.

        Args:
            sources: What the run reads.

        Raises:
            PmodError: another run is at work there, or has left results of other models, settings or tasks; or what is
                there was not written by `pmod eval`.
        """
        self.identity, error = dict(identity), None
        if self._processes.first:
            try:
                self._prepare(list(benchmarks), list(sources))
            except (PmodError, OSError) as cause:
                error = cause
        if (error := self._processes.gather(error)[0]) is not None:
            raise error

    def check(self, identity: Mapping[str, Any], benchmarks: Iterable[Benchmark], sources: Iterable[Path] = ()) -> None:
        """Refuse what `prepare` would refuse, but for another run at work. Nothing is changed.

        Raises:
            PmodError: as `prepare`.
        """
        self.identity = dict(identity)
        if self.overwrite:
            folders.check_replaceable(self.out, KIND, sources)
        elif not is_new(self.out):
            require_kind(self.out, KIND)
        folders.check_writable(self.out)
        if not self.overwrite and (self.out / RESULTS).exists():
            self._refuse_another_run(benchmarks)

    def finish(self, whole: bool) -> None:
        """Put a successor in its place, if it is whole."""
        self._processes.gather(None)  # nobody writes any more
        if whole:
            self.put_in_place()

    def log(self, rank: int) -> Path:
        """What lmms-eval says, and the tracebacks."""
        return self.path / ("lmms-eval.log" if rank == 0 else f"lmms-eval.{rank}.log")

    def journal(self, label: str) -> Path:
        """Answers as they are made, by process."""
        return self.path / "journal" / label

    def answers(self, label: str, benchmark: str) -> Path:
        """The records of a finished benchmark."""
        return self.path / "answers" / label / f"{benchmark}.jsonl"

    def measured(self) -> dict[tuple[str, str], dict[str, Any]]:
        """What the run that asked has measured, by model and benchmark, for one that finds all answers there."""
        if not (self.path / RESULTS).exists():
            return {}
        return {
            (label, task["name"]): {name: entry.get(name) for name in MEASURED}
            for task in read_run(self.path)[1]["tasks"]
            for label, entry in task["scores"].items()
            if entry["score"] is not None
        }

    def changed(self, label: str, benchmark: str) -> Path:
        """The questions that two models answer differently."""
        return self.path / "changed" / label / f"{benchmark}.jsonl"

    def _prepare(self, benchmarks: Iterable[Benchmark], sources: Iterable[Path]) -> None:
        folders.check_writable(self.out)
        real = self.hold()
        self.check(self.identity, benchmarks, sources)
        if self.overwrite:
            self._successor = folders.successor(real, KIND)
            if (self.path / RESULTS).exists() and self._differs(self.path, benchmarks):
                folders.successor(real, KIND, fresh=True)
        else:
            folders.take(real, KIND)
        logs = [self.log(rank).name for rank in range(self._processes.size)]
        folders.mark(self.path, KIND, [*WRITTEN, *logs])

    def _refuse_another_run(self, benchmarks: Iterable[Benchmark]) -> None:
        if differs := self._differs(self.out, benchmarks):
            hint = "replace it with `overwrite=True`, or choose another folder with `out`"
            raise PmodError(f"{self.path} holds another run, {differs}", hint=hint)

    def _differs(self, run: Path, benchmarks: Iterable[Benchmark]) -> str | None:
        """How earlier results are those of another run."""
        try:
            _, before = read_run(run)
        except PmodError as error:
            return f"whose results cannot be read: {error.what}"
        known = before.get("identity")
        known = known if isinstance(known, dict) else {}
        if differs := [name for name, value in self.identity.items() if known.get(name) != value]:
            return f"with other {', '.join(differs)}"
        asked = {benchmark.name for benchmark in benchmarks}
        if others := [task["name"] for task in before["tasks"] if task["name"] not in asked]:
            return f"of {', '.join(others)} too: add that to `tasks`"
        return None


def write_comparison(results: Mapping[str, Any], out: Path, runs: Iterable[Path], *, overwrite: bool = False) -> None:
    """The tables of finished runs side by side; and where their costs differ, the figure and the page.

    Args:
        results: As `results.compare` returns them.
        out: A folder, which appears whole or not at all.
        runs: What was compared, which must not lie in it.
        overwrite: Replace an earlier comparison.

    Raises:
        PmodError: `out` is there and may not be replaced.
    """
    with folders.staged_directory(out, COMPARISON, overwrite=overwrite, sources=runs) as staged:
        write_json(staged / "comparison.json", results)
        write_tables(results, staged)
        if pareto.has_costs(results):
            pareto.write(results, staged)


def write_tables(results: Mapping[str, Any], folder: Path) -> None:
    """`results.md` and `results.csv`."""
    write_text(folder / "results.md", markdown.to_markdown(results))
    write_text(folder / "results.csv", tables.to_csv(results))
