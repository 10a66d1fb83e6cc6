"""What an interrupted run goes on from: its newest whole training checkpoint, and the weights that it began with.

A training checkpoint lists its files (``files.json``, written last): their sizes, and of small ones the digest. One
that has lost a file, or the end of one, is set aside as ``damaged-N``, and the run goes on from the one before.

``source.json`` names the digests of the weights that the run began with. Adapters belong to the very weights they were
trained on, so a LoRA run keeps it beside its adapter too.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from pmod_cli.checkpoints import resolve
from pmod_cli.checkpoints.digests import file_sha256, weights_sha256
from pmod_cli.checkpoints.files import read_json
from pmod_cli.core.atomic import write_json
from pmod_cli.core.errors import PmodError
from pmod_cli.core.paths import expanded
from pmod_cli.training.run_settings import Settings, needed

FILES = "files.json"  # in a training checkpoint
SOURCE = "source.json"  # beside the training checkpoints, and in an adapter's folder
ROWS = "rows.json"  # beside the training checkpoints
DAMAGED = "damaged"
DIGESTED = 1 << 20  # bytes: larger files are known by their size


def list_files(checkpoint: Path) -> None:
    """Write down what a training checkpoint consists of, once all of it is there."""
    files = {
        path.relative_to(checkpoint).as_posix(): _state(path)
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != FILES
    }
    write_json(checkpoint / FILES, {"schema_version": 1, "files": files})


def fault(checkpoint: Path) -> str | None:
    """What a training checkpoint lacks, or None where it is whole."""
    try:
        files = read_json(checkpoint / FILES)["files"]
        for name, state in files.items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if (found := _state(path)) != state:
                sizes = found["bytes"], state["bytes"]
                return (
                    f"{name} has {sizes[0]:,} of {sizes[1]:,} bytes" if sizes[0] != sizes[1] else f"{name} is changed"
                )
    except (PmodError, LookupError, TypeError, AttributeError) as error:
        return f"{FILES}: {error}"
    return None


def checkpoints(state: Path) -> list[Path]:
    """The training checkpoints in a folder, newest first, whole or not."""
    found = {
        int(number): path
        for path in state.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (number := path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")).isdecimal() and path.is_dir()
    }
    return [found[number] for number in sorted(found, reverse=True)]


def newest_whole(state: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest whole training checkpoint in a folder, and what the newer ones lack.

    Raises:
        PmodError: there are training checkpoints, and none is whole.
    """
    damaged: dict[Path, str] = {}
    for checkpoint in checkpoints(state):
        if (lack := fault(checkpoint)) is None:
            return checkpoint, damaged
        damaged[checkpoint] = lack
    if damaged:
        told = "; ".join(f"{path.name}: {lack}" for path, lack in damaged.items())
        raise PmodError(
            f"no training checkpoint in {state} is whole, so this run cannot go on: {told}",
            hint="start it anew in another folder",
        )
    return None, damaged


def set_damaged_aside(state: Path) -> list[str]:
    """Rename the training checkpoints that are newer than the newest whole one; a sentence about each.

    Nothing takes them for checkpoints then, and they go when the run is finished.

    Raises:
        PmodError: as ``newest_whole``.
    """
    whole, damaged = newest_whole(state)
    if whole is None:
        return []
    said = []
    for path, lack in damaged.items():
        aside, count = path.with_name(path.name.replace(PREFIX_CHECKPOINT_DIR, DAMAGED)), 1
        while aside.exists():
            count += 1
            aside = path.with_name(f"{path.name.replace(PREFIX_CHECKPOINT_DIR, DAMAGED)}-{count}")
        path.rename(aside)
        said.append(f"{path} is damaged ({lack}): going on from {whole.name}")
    return said


def source_digests(settings: Settings) -> dict[str, str]:
    """By setting, the digest of the weights that a run begins with."""
    model = settings.model
    if model.llm is None:
        return {"model.name": weights_sha256(resolve(needed(model.name, "model.name")).path)}
    found = {"model.llm": weights_sha256(resolve(model.llm).path)}
    tower = needed(model.vision_tower, "model.vision_tower")
    found["model.vision_tower"] = weights_sha256(resolve(tower).path)
    if model.projector is not None and expanded(model.projector).is_file():
        found["model.projector"] = file_sha256(expanded(model.projector))
    return found


def hold_source(settings: Settings, state: Path) -> str | None:
    """Write down what a new run begins with; compare it where the run goes on.

    Returns:
        A sentence where the weights are others now, and the run does not read them any more: its training checkpoint
        has all weights.

    Raises:
        PmodError: the weights are others now, and the run would read them.
    """
    now = source_digests(settings)
    if not (state / SOURCE).is_file():
        write_json(state / SOURCE, {"schema_version": 1, "sha256": now})
        return None
    changed = _changed(read_json(state / SOURCE), now)
    if not changed:
        return None
    if not settings.lora.enabled and checkpoints(state):
        return f"{changed}: other weights than this run began with; it goes on with those of its training checkpoint"
    raise _other_weights(changed, state.parent)


def hold_rows(rows: int, state: Path) -> str | None:
    """Write down how many rows a new run reads; a sentence where one that goes on has another number of them."""
    if not checkpoints(state) or not (state / ROWS).is_file():
        write_json(state / ROWS, {"schema_version": 1, "rows": rows})
    before = read_json(state / ROWS)["rows"]
    if before == rows:
        return None
    return (
        f"the data have {rows:,} rows, and had {before:,} when this run began: their order is another one from here "
        "on, so that some come again and others do not, and the number of steps is that of the new ones"
    )


def check_adapter(settings: Settings, adapter: Path, out: Path) -> None:
    """Raises PmodError where an adapter was trained on other weights than those that the settings name now."""
    record = next((path for path in (adapter / SOURCE, adapter.parent / SOURCE) if path.is_file()), None)
    if record is not None and (changed := _changed(read_json(record), source_digests(settings))):
        raise _other_weights(changed, out)


def _changed(record: Mapping[str, Any], now: Mapping[str, str]) -> str:
    before = record.get("sha256")
    return ", ".join(key for key, digest in now.items() if not isinstance(before, dict) or before.get(key) != digest)


def _other_weights(changed: str, out: Path) -> PmodError:
    return PmodError(
        f"{changed}: its weights are not those that the run in {out} began with, so its training does not fit them",
        hint="put the weights back that it began with, or start anew in another folder",
    )


def _state(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    return {"bytes": size} | ({"sha256": file_sha256(path)} if size <= DIGESTED else {})
