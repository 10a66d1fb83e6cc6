"""The run folder: settings at first, training state meanwhile, a checkpoint in the end.

```
config.yaml                  the settings that ran: a recipe
checkpoints/checkpoint-N     what the run goes on from; removed when it is finished
adapter/                     of a LoRA run, in the end
config.json, *.safetensors   the result; config.json comes last
```
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote

from pmod_cli.checkpoints.files import read_json
from pmod_cli.core import folders
from pmod_cli.core.atomic import write_json, write_text
from pmod_cli.core.errors import PmodError
from pmod_cli.core.markers import MARKER, is_new, mark
from pmod_cli.core.paths import expanded
from pmod_cli.training.recipe import differences, dump, load_settings
from pmod_cli.training.run_settings import Settings

SETTINGS = "config.yaml"
STATE = "checkpoints"
START = "start"  # in STATE: the stock checkpoint of the run, converted
PROCESSES = "processes.json"  # in STATE: how many there are, since the data position depends on it
ADAPTER = "adapter"
LOG = "training_log.jsonl"  # one line per logged step
SUMMARY = "training_summary.json"
CURVES = "training_curves.png"
TENSORBOARD = "tensorboard"
CARD = "README.md"
SKIPPED = "skipped_rows.jsonl"  # rows that could not be used
KIND = "run"
WRITTEN = (SETTINGS, STATE, ADAPTER, LOG, SUMMARY, CURVES, TENSORBOARD, CARD, SKIPPED)


def is_checkpoint(out: Path) -> bool:
    """Whether the run in ``out`` has left a model."""
    return (out / "config.json").is_file()


def is_finished(out: Path, settings: Settings) -> bool:
    """Whether nothing is left to do for the run in ``out``."""
    return is_checkpoint(out) or (settings.lora.enabled and not settings.lora.merge and adapter_of(out) is not None)


def adapter_of(out: Path) -> Path | None:
    """The adapter that a finished LoRA run has left in ``out``."""
    return out / ADAPTER if (out / ADAPTER / "adapter_config.json").is_file() else None


class RunFolder(folders.OutputFolder):
    """The folder of a run. A successor that was left goes on if it has the same settings.

    ``path`` is the same in all processes of a run.
    """

    worth_keeping = f"{STATE}/checkpoint-*"

    def open(self, settings: Settings, processes: int, *, resume: bool) -> None:
        """Take the folder for a run: new, empty, holding this very run, or to be replaced. Called by one process.

        Raises:
            PmodError: as ``check_free``; another run is at work there.
        """
        real = self.hold()
        check_free(self.out, settings, processes, resume=resume, overwrite=self.overwrite)
        if self.overwrite:
            fresh = not resume or not _goes_on(folders.staging_of(self.out), settings, processes)
            self._successor = folders.successor(real, KIND, fresh=fresh)
        self.path.mkdir(parents=True, exist_ok=True)
        mark(self.path, KIND, WRITTEN)
        if is_checkpoint(self.path):
            return
        (self.path / STATE).mkdir(exist_ok=True)
        write_json(self.path / STATE / PROCESSES, {"processes": processes})
        write_text(self.path / SETTINGS, dump(settings))


def check_free(out: Path, settings: Settings, processes: int, *, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that ``RunFolder.open`` could not take. Nothing is changed.

    Raises:
        PmodError: ``out`` holds something else, a run with other settings or of another number of processes; it is to
            be replaced, and the run reads it, or not all of it was written by a run; nothing can be written there.
    """
    if overwrite:
        folders.check_replaceable(out, KIND, sources_of(settings))
    elif (out / SETTINGS).is_file():
        _check_saved(out, load_settings(out / SETTINGS), settings, processes, resume)
    elif not is_new(out):
        raise PmodError(f"{out} exists and is not a run of pmod finetune", hint="choose another `out`")
    folders.check_writable(out)


def sources_of(settings: Settings) -> list[Path]:
    """The files and folders on this machine that a run reads."""
    model, data = settings.model, settings.data
    names = (model.name, model.llm, model.vision_tower, model.projector, data.path, data.images)
    return [path for path in (expanded(name) for name in names if name) if path.exists()]


def _goes_on(successor: Path, settings: Settings, processes: int) -> bool:
    """Whether a successor that was left is of this very run."""
    try:
        _check_saved(successor, load_settings(successor / SETTINGS), settings, processes, resume=True)
    except (PmodError, OSError):
        return False
    return True


def _check_saved(out: Path, saved: Settings, settings: Settings, processes: int, resume: bool) -> None:
    if not resume:
        raise PmodError(
            f"{out} already holds a run, and `resume=False` was given",
            hint="choose another `out`, or `overwrite=True`",
        )
    changed = differences(saved, settings)
    if changed:
        raise PmodError(
            f"{out} holds a run with other settings:\n  " + "\n  ".join(changed),
            hint=f"go on with its own: pmod finetune --recipe {quote(str(out / SETTINGS))} --out {quote(str(out))}; "
            "or choose another `out`",
        )
    record = out / STATE / PROCESSES
    before = read_json(record).get("processes") if record.is_file() else processes
    if before != processes and any((out / STATE).glob("checkpoint-*")):
        raise PmodError(
            f"{out} holds a run of {before} processes, and this one has {processes}: its rows would be dealt otherwise",
            hint=f"go on with `num_processes={before}`, or choose another `out`",
        )


@contextmanager
def publishing(out: Path) -> Iterator[Path]:
    """A folder to fill, whose files are then moved into the run folder.

    ``config.json`` comes last: without it the run is no checkpoint yet. A process that dies meanwhile leaves the
    training state, and the next one repeats it.
    """
    staging = out / STATE / "finished"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    yield staging
    mark(out, KIND, [*WRITTEN, *(path.name for path in staging.iterdir())])
    folders.settle(staging, like=out / MARKER)
    for path in sorted(staging.iterdir(), key=lambda path: path.name in ("config.json", ADAPTER)):
        target = out / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.replace(target)
    staging.rmdir()


def close_run(out: Path) -> None:
    """Remove the training state of a finished run."""
    shutil.rmtree(out / STATE, ignore_errors=True)
