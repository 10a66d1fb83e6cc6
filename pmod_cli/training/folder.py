"""The run folder: settings at first, training state meanwhile, a checkpoint in the end.

```
config.yaml                  the settings that ran: a recipe
checkpoints/checkpoint-N     what the run goes on from; removed when it is finished
adapter/                     of a LoRA run, in the end
config.json, *.safetensors   the result; config.json comes last
```
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pmod_cli.core.atomic import write_json, write_text
from pmod_cli.core.errors import PmodError
from pmod_cli.training.recipe import differences, dump, load_settings
from pmod_cli.training.settings import Settings

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


def is_checkpoint(out: Path) -> bool:
    """Whether the run in ``out`` has left a model."""
    return (out / "config.json").is_file()


def is_finished(out: Path, settings: Settings) -> bool:
    """Whether nothing is left to do for the run in ``out``."""
    return is_checkpoint(out) or (settings.lora.enabled and not settings.lora.merge and adapter_of(out) is not None)


def adapter_of(out: Path) -> Path | None:
    """The adapter that a finished LoRA run has left in ``out``."""
    return out / ADAPTER if (out / ADAPTER / "adapter_config.json").is_file() else None


def open_run(out: Path, settings: Settings, processes: int, *, resume: bool, overwrite: bool) -> None:
    """Take ``out`` for a run: new, empty, or holding this very run.

    Raises:
        PmodError: as ``check_free``.
    """
    check_free(out, settings, processes, resume=resume, overwrite=overwrite)
    saved = out / SETTINGS
    if overwrite and saved.is_file():
        shutil.rmtree(out)
    if is_checkpoint(out):
        return
    (out / STATE).mkdir(parents=True, exist_ok=True)
    write_json(out / STATE / PROCESSES, {"processes": processes})
    write_text(saved, dump(settings))


def check_free(out: Path, settings: Settings, processes: int, *, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that ``open_run`` could not take. Nothing is changed.

    Raises:
        PmodError: ``out`` holds something else, a run with other settings or of another number of processes; nothing
            can be written there.
    """
    saved = out / SETTINGS
    if saved.is_file():
        if not overwrite:
            _check_saved(out, load_settings(saved), settings, processes, resume)
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PmodError(f"{out} exists and is not a run of pmod finetune", hint="choose another --out")
    above = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not above.is_dir():
        raise PmodError(f"{out} cannot be made: {above} is a file", hint="choose another --out")
    if not os.access(above, os.W_OK | os.X_OK):
        raise PmodError(f"nothing can be written into {above}", hint="choose another --out")


def _check_saved(out: Path, saved: Settings, settings: Settings, processes: int, resume: bool) -> None:
    if not resume:
        raise PmodError(
            f"{out} already holds a run, and --no-resume was given", hint="choose another --out, or add --overwrite"
        )
    changed = differences(saved, settings)
    if changed:
        raise PmodError(
            f"{out} holds a run with other settings:\n  " + "\n  ".join(changed),
            hint=f"go on with its own: pmod finetune --recipe {out / SETTINGS} --out {out}; or choose another --out",
        )
    record = out / STATE / PROCESSES
    before = json.loads(record.read_text())["processes"] if record.is_file() else processes
    if before != processes and any((out / STATE).glob("checkpoint-*")):
        raise PmodError(
            f"{out} holds a run of {before} processes, and this one has {processes}: its rows would be dealt otherwise",
            hint=f"go on with --num-processes {before}, or choose another --out",
        )


@contextmanager
def publishing(out: Path) -> Iterator[Path]:
    """A folder to fill, whose files are then moved into the run folder, ``config.json`` last: without it the run is no
    checkpoint yet. A process that dies meanwhile leaves the training state, and the next one repeats it."""
    staging = out / STATE / "finished"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    yield staging
    for path in sorted(staging.iterdir(), key=lambda path: path.name in ("config.json", ADAPTER)):
        target = out / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.replace(target)


def close_run(out: Path) -> None:
    """Remove the training state of a finished run."""
    shutil.rmtree(out / STATE, ignore_errors=True)
