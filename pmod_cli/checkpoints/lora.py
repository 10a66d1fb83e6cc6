"""LoRA adapters upon a checkpoint: merged while it is written, or kept in a folder of their own."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from pmod_cli.checkpoints import files
from pmod_cli.checkpoints.layout import LowRank, Source
from pmod_cli.checkpoints.layouts.shapes import canonical, from_original
from pmod_cli.core.atomic import write_json
from pmod_cli.core.errors import PmodError

CONFIG = "adapter_config.json"
APART = "adapter"  # the folder of one that is not merged
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
FULL = "non_lora_trainables.bin"  # what the original code trains beside LoRA: projector, image_newline
_UPDATE = re.compile(r"(.*)\.lora_([AB])(?:\.default)?\.weight")
_ORIGINAL = re.compile(
    r"(base_model\.model\.)?model\.(layers|mm_projector|vision_tower\.vision_tower|image_newline)\b.*"
)
_PEFT = "base_model.model."
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # starts that take something from the weights themselves
_HF_MODULES = ("model.language_model.", "model.vision_tower.", "model.multi_modal_projector.", "language_model.")


def merged(source: Source, folder: Path) -> Source:
    """A source with an adapter's updates added to its weights, and its fully trained tensors in their places.

    Args:
        source: What the adapter was trained on.
        folder: The adapter, as peft or the original code saves it.

    Raises:
        PmodError: the adapter is damaged, of another kind, or was trained on another model.
    """
    config = read_config(folder)
    _refuse_unmergeable(config, folder / CONFIG)
    tensors = files.read_file(_weights(folder))
    full = files.read_file(folder / FULL) if (folder / FULL).is_file() else {}
    on_disk = {canonical(name): name for name in source.parts}
    parts = dict(source.parts)
    updates: dict[str, dict[str, files.Tensor]] = {}
    for name, tensor in tensors.items():
        if match := _UPDATE.fullmatch(name):
            updates.setdefault(match[1], {})[match[2]] = tensor
        else:
            full[name] = tensor
    for module, sides in updates.items():
        own = on_disk.get(_canonical(f"{module}.weight"))
        if own is None or sides.keys() != {"A", "B"}:
            problem = "has no counterpart in the model" if own is None else "is only half there"
            raise PmodError(
                f"{_weights(folder)}: the update of {module} {problem}", hint="give the model it was trained on"
            )
        update = LowRank(sides["A"], sides["B"], _scale(config, module, sides["A"].shape[0], folder))
        _check_fit(parts[own].source, update, folder, module)
        parts[own] = replace(parts[own], low_rank=update)
    for spelled, tensor in full.items():
        own = on_disk.get(_canonical(spelled.replace(".modules_to_save.default.", ".").replace(".base_layer.", ".")))
        if own is None or parts[own].source.shape != tensor.shape:
            raise PmodError(
                f"{tensor.path}: {spelled} {list(tensor.shape)} has no counterpart of its shape in the model"
            )
        parts[own] = replace(parts[own], source=tensor, dtype=parts[own].result.dtype)
    trained = source.settings is not None and any(".router." in name for name in full)
    return replace(source, parts=parts, router_state="trained" if trained else source.router_state)


def stands_apart(folder: Path) -> Path | None:
    """The adapter that `keep_apart` has put beside a model, which is not in the model's weights; None without one."""
    try:
        base = files.read_json(folder / APART / CONFIG).get("base_model_name_or_path")
    except PmodError:  # there is none, or it is damaged: nothing that the conversion needs
        return None
    return folder / APART if base == ".." else None


def read_config(folder: Path) -> dict:
    """adapter_config.json of a plain LoRA.

    Raises:
        PmodError: it is something else.
    """
    config = files.read_json(folder / CONFIG)
    where = folder / CONFIG
    if config.get("peft_type") != "LORA":
        raise PmodError(f"{where}: peft_type is {config.get('peft_type')!r}, expected 'LORA'")
    for key in ("use_dora", "fan_in_fan_out"):
        if config.get(key):
            raise PmodError(f"{where}: {key} is true, which cannot be merged", hint="merge it with peft, then convert")
    if not isinstance(config.get("lora_alpha"), int | float) or not isinstance(config.get("r"), int):
        raise PmodError(
            f"{where}: lora_alpha is {config.get('lora_alpha')!r} and r {config.get('r')!r}, expected numbers"
        )
    _weights(folder)
    return config


def keep_apart(folder: Path, target: Path) -> None:
    """Copy an adapter into `target`, a new folder, beside the model that it belongs to.

    Raises:
        PmodError: its names are those of the original code.
    """
    config = read_config(folder)
    tensors = files.read_file(_weights(folder))
    if (folder / FULL).is_file() or any(map(_ORIGINAL.fullmatch, tensors)):
        raise PmodError(f"{folder} names its weights as the original code does: it can only be merged", hint="`merge`")
    target.mkdir()
    shutil.copyfile(_weights(folder), target / _weights(folder).name)
    write_json(target / CONFIG, config | {"base_model_name_or_path": ".."})


def _weights(folder: Path) -> Path:
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise PmodError(f"{folder} has no {WEIGHTS[0]}", hint="`adapter` takes the folder that peft wrote")


def _refuse_unmergeable(config: dict, where: Path) -> None:
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        raise PmodError(
            f"{where}: init_lora_weights is {start!r:.40}, which changes the weights that the update is added to",
            hint="merge it with peft, or save it as an update of the stock weights, then convert",
        )
    if config.get("alora_invocation_tokens"):
        raise PmodError(f"{where}: alora_invocation_tokens is set: an update of some tokens alone cannot be merged")


def _canonical(name: str) -> str:
    """Canonical name, from one of peft over transformers, or of peft over the original code."""
    name = name.removeprefix(_PEFT)
    return canonical(name if name.startswith(_HF_MODULES) else canonical(from_original(name)))


def _scale(config: dict, module: str, rank: int, folder: Path) -> float:
    def said(key: str, default: str) -> Any:
        """The value of the first pattern that fits, as peft looks for it."""
        patterns, name = config.get(key) or {}, module.removeprefix(_PEFT)
        fitting = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name))
        return next(fitting, config[default])

    alpha, expected = said("alpha_pattern", "lora_alpha"), said("rank_pattern", "r")
    if rank != expected or rank < 1:
        raise PmodError(f"{folder / CONFIG}: r is {expected}, and {module} has an update of rank {rank}")
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def _check_fit(weight: files.Tensor, update: LowRank, folder: Path, module: str) -> None:
    up, down = update.up.shape, update.down.shape
    if up[1:] != down[:1] or (*up[:1], *down[1:]) != weight.shape:
        found = f"{list(up)} x {list(down)}"
        raise PmodError(f"{folder}: the update of {module} is {found}, its weight {list(weight.shape)}")
