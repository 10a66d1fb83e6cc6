"""From a recipe file, ``--set`` and flags to one ``Settings`` object, and back to YAML.

Later beats earlier: default, recipe, ``--set key.path=value``, flag. Everything wrong is reported at once, each fault
with the place it came from.
"""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import yaml

from pmod_cli import recipe_files
from pmod_cli.core import yaml_text
from pmod_cli.core.errors import PmodError
from pmod_cli.core.yaml_text import Located
from pmod_cli.data.several import ALL_TASKS
from pmod_cli.model import PmodSettings
from pmod_cli.training.run_settings import PARTS, Settings

BASE = "base"  # a recipe's first key may name the recipe that it changes
LARGEST = {int: 2**31 - 1, float: 1e9}  # of any setting: beyond it a run would never end, or its numbers would
LONGEST_NAME = 100  # characters


class Entry(NamedTuple):
    """One value that somebody wrote, and where."""

    key: str  # dotted: "train.batch_size"
    value: Any
    where: str  # "recipes/tiny.yaml, line 7"


def load_settings(
    recipe: Path | None, overrides: Iterable[str] = (), flags: Mapping[str, tuple[str, Any]] | None = None
) -> Settings:
    """Resolve the settings of a run.

    Args:
        recipe: a YAML file of settings.
        overrides: ``key.path=value`` strings, the value in YAML.
        flags: dotted key to (spelling of the flag, value); a value of None was not given.

    Raises:
        PmodError: a file that is no YAML mapping, unknown keys, wrong types or values, all in one message.
    """
    entries = [*(_read(recipe) if recipe else ()), *map(_override, overrides)]
    entries += [Entry(key, value, flag) for key, (flag, value) in (flags or {}).items() if value is not None]
    settings, faults = Settings(), []
    if recipe:
        settings.name = recipe.stem
    for entry in entries:
        try:
            _assign(settings, entry)
        except ValueError as fault:
            faults.append(f"{entry.where}: {fault}")
    faults += _not_a_name(settings.name)
    faults += _unknown("model.freeze", settings.model.freeze, PARTS)
    faults += _unknown("data.tasks", settings.data.tasks, ALL_TASKS)
    faults += settings.conflicts()
    try:
        PmodSettings.from_dict(settings.pmod.given)
    except ValueError as fault:
        faults.append(f"pmod: {fault}")
    if faults:
        raise PmodError("\n  ".join(faults), hint="all keys with their values: pmod finetune --print-config")
    return settings


def settings_of(tree: Mapping[str, Any]) -> Settings:
    """Settings from the mapping that ``dataclasses.asdict`` made of them."""
    settings = Settings()
    for key, value in flatten(tree):
        _assign(settings, Entry(key, value, "a job"))
    return settings


def dump(settings: Settings) -> str:
    """The settings as YAML, which as a recipe gives the same settings again."""
    return yaml.safe_dump(asdict(settings), sort_keys=False)


# What a run may change when it goes on: nothing in it reaches the weights.
HARMLESS = (
    *("train.report_to", "train.log_steps", "train.save_steps", "train.keep_checkpoints"),
    *("data.workers", "lora.merge", "eval", "eval_limit"),
    "data.on_bad_row",  # a run that goes on has met no bad row, or goes on without them
    "model.gradient_checkpointing",
)


def differences(one: Settings, other: Settings) -> list[str]:
    """The dotted keys whose values differ and matter, each as ``key: value -> value``."""
    flat_one, flat_other = dict(flatten(asdict(one))), dict(flatten(asdict(other)))
    return [
        f"{key}: {value!r} -> {flat_other[key]!r}"
        for key, value in flat_one.items()
        if value != flat_other[key] and key not in HARMLESS
    ]


def flatten(tree: Mapping, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Every value of nested mappings, with its dotted key."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _read(path: Path, above: tuple[Path, ...] = ()) -> Iterable[Entry]:
    """The entries of a YAML file, after those of its base."""
    if path in above:
        raise PmodError(f"the recipe {path} is its own base: {' -> '.join(map(str, (*above, path)))}")
    try:
        root = yaml_text.read(path)
    except OSError as error:
        raise PmodError(f"cannot read the recipe {path}: {error.strerror}", hint="pmod recipes ls") from None
    if root.data is not None and not isinstance(root.data, dict):
        raise PmodError(f"the recipe {path} holds no mapping of keys to values")
    entries = list(_walk(root, path, ""))
    base = next((entry for entry in entries if entry.key == BASE), None)
    if base is None:
        return entries
    if not isinstance(base.value, str):
        raise PmodError(f"{base.where}: {BASE}: expected the name of a recipe, got {base.value!r}")
    below = _read(_base_of(path, base), (*above, path))
    return [*(entry for entry in below if entry.key != "name"), *(entry for entry in entries if entry is not base)]


def _base_of(path: Path, base: Entry) -> Path:
    """The file of a base: in the folder of the recipe that names it, or below, else a shipped recipe."""
    inside = Path(base.value)
    if inside.is_absolute() or ".." in inside.parts or "\0" in base.value:
        raise PmodError(f"{base.where}: {BASE}: {base.value!r:.100} lies outside the recipe's folder")
    if (path.parent / inside).is_file():
        return path.parent / inside
    if inside.suffix in recipe_files.SUFFIXES:
        raise PmodError(f"{base.where}: {BASE}: no such recipe beside it: {base.value!r:.100}", hint="pmod recipes ls")
    return recipe_files.find(base.value)


def _walk(tree: Located, path: Path, prefix: str) -> Iterable[Entry]:
    for name, value in (tree.data or {}).items():
        if isinstance(value.data, dict) and value.data:
            yield from _walk(value, path, f"{prefix}{name}.")
        else:
            yield Entry(prefix + name, value.plain(), f"{path}, line {value.line}")


def _override(text: str) -> Entry:
    key, equals, value = text.partition("=")
    if not equals:
        raise PmodError(f"--set {text}: expected key.path=value", hint="--set train.max_steps=100")
    return Entry(key.strip(), yaml_text.parse(value, f"--set {text:.200}").plain(), f"--set {text}")


def _assign(settings: Settings, entry: Entry) -> None:
    """Put one entry in its place; ValueError if there is none or the value does not fit."""
    *groups, name = entry.key.split(".")
    target: Any = settings
    for group in groups:
        target = getattr(target, group, None)
    known = {field.name: field for field in fields(target)} if is_dataclass(target) else {}
    if name not in known:
        nearest = get_close_matches(entry.key[:100], _keys(), n=1)
        raise ValueError(f"unknown key {entry.key:.100}" + (f"; did you mean {nearest[0]}?" if nearest else ""))
    if is_dataclass(getattr(target, name)):
        raise ValueError(f"{entry.key} is a group of settings, not a value")
    value = _fit(entry.value, get_type_hints(type(target))[name], entry.key)
    names = known[name].metadata.get("names")
    if names is not None and value is not None and value not in names:
        raise ValueError(f"{entry.key}: expected one of {', '.join(names)}, got {value!r:.100}")
    minimum = known[name].metadata.get("min")
    if minimum is not None and value is not None and not value >= minimum:
        raise ValueError(f"{entry.key}: expected {minimum} or more, got {value}")
    bound = known[name].metadata.get("above")
    if bound is not None and value is not None and not value > bound:
        raise ValueError(f"{entry.key}: expected more than {bound}, got {value}")
    below = known[name].metadata.get("below")
    if below is not None and value is not None and not value < below:
        raise ValueError(f"{entry.key}: expected less than {below}, got {value}")
    setattr(target, name, value)


def _fit(value: Any, kind: Any, key: str) -> Any:
    """The value as the declared type, or ValueError. Takes ``2e-5`` for a number, which YAML 1.1 reads as a string."""
    if get_origin(kind) in (UnionType, Union):  # "int | None"; with a Literal, Python makes it a Union
        return None if value is None else _fit(value, get_args(kind)[0], key)
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ValueError(f"{key}: expected one of {', '.join(get_args(kind))}, got {value!r:.100}")
        return value
    if get_origin(kind) is list:
        if not isinstance(value, list):
            raise ValueError(f"{key}: expected a list, got {value!r:.100}")
        return [_fit(item, get_args(kind)[0], key) for item in value]
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            value = float(value)
    if type(value) is not kind:
        raise ValueError(f"{key}: expected {_NAMES[kind]}, got {value!r:.100}")
    if kind in LARGEST and not abs(value) <= LARGEST[kind]:  # which is false of what is no number, too
        raise ValueError(f"{key}: expected {_NAMES[kind]} of at most {LARGEST[kind]:,.0f}, got {value!r:.100}")
    return value


_NAMES = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}


def _keys() -> list[str]:
    return [key for key, _ in flatten(asdict(Settings()))]


def _unknown(key: str, values: list[str], allowed: tuple[str, ...]) -> list[str]:
    wrong = [value for value in values if value not in allowed]
    return [f"{key}: unknown {', '.join(wrong)}; expected some of {', '.join(allowed)}"] if wrong else []


def _not_a_name(name: str) -> list[str]:
    """The name of a recipe names the run folder: so it is a file name, and names no other folder."""
    if 0 < len(name) <= LONGEST_NAME and name.isprintable() and not set(name) & set("/\\") and name not in (".", ".."):
        return []
    return [f"name: expected a file name of up to {LONGEST_NAME} characters without / and \\, got {name!r:.120}"]
