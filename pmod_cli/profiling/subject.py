"""Which model is profiled: a name becomes two configurations, stock and p-MoD. No weights are read."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import LlavaConfig, LlavaNextConfig

from pmod_cli.checkpoints import resolve
from pmod_cli.checkpoints.aliases import ALIASES, builtin_config
from pmod_cli.core.errors import PmodError
from pmod_cli.model import PmodLlavaConfig, PmodLlavaNextConfig, PmodSettings
from pmod_cli.profiling.sizes import Sizes

STOCK = {"llava": LlavaConfig, "llava_next": LlavaNextConfig}
PMOD = {"llava": PmodLlavaConfig, "llava_next": PmodLlavaNextConfig}


@dataclass(frozen=True)
class Subject:
    """A stock model and its p-MoD.

    Args:
        name: As given by the user.
        source: Where the configuration was read.
        stock: Configuration of the stock model.
        pmod: The same with p-MoD settings.
    """

    name: str
    source: str
    stock: LlavaConfig | LlavaNextConfig
    pmod: PmodLlavaConfig | PmodLlavaNextConfig


def load_subject(name: str, overrides: dict[str, Any] | None = None, *, revision: str | None = None) -> Subject:
    """Read the configuration of a model. An alias needs neither files nor network.

    Args:
        name: A checkpoint folder, a config.json, an alias or a hub id; stock or p-MoD.
        overrides: `PmodSettings` fields that replace the checkpoint's own, or the paper's for a stock model.
        revision: Branch, tag or commit on the hub.

    Raises:
        PmodError: nothing has this name, the configuration is no LLaVA, or a setting is out of range.
    """
    config, source = _read(name, revision)
    kind = str(config.get("model_type")).removeprefix("pmod_")
    if kind not in STOCK:
        raise PmodError(
            f"{source} is not a LLaVA: model_type is {config.get('model_type')!r}, expected one of "
            f"{', '.join([*STOCK, *(f'pmod_{known}' for known in STOCK)])}",
            hint="pmod profile --model llava-next-7b",
        )
    own = config.get("pmod") or {}
    if not all(isinstance(config.get(part, {}), dict | NoneType) for part in ("text_config", "vision_config")):
        raise PmodError(f"{source}: text_config and vision_config are JSON objects", hint="name a LLaVA's config.json")
    for key, value in (overrides or {}).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise PmodError(f"{key} is {value}: expected a finite number", hint="pmod profile --help")
    if not isinstance(own, dict):
        raise PmodError(f"{source}: pmod is {own!r:.60}: expected a JSON object", hint="convert the model again")
    try:
        Sizes.of(config)
    except PmodError as error:
        raise PmodError(f"{source}: {error.what}", hint=error.hint) from error
    shared = {
        key: value
        for key, value in config.items()
        if key not in ("model_type", "architectures", "pmod", "router_state")
    }
    try:
        settings = PmodSettings.from_dict({**_without_conflicts(own, overrides or {}), **(overrides or {})})
        return Subject(
            name, source, STOCK[kind].from_dict(shared), PMOD[kind].from_dict({**shared, "pmod": settings.to_dict()})
        )
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise PmodError(f"{name}: {str(error).splitlines()[0]}", hint="pmod profile --help") from error


def scaled(subject: Subject, *, hidden_size: int | None = None, layers: int | None = None) -> Subject:
    """The same architecture at another size: what a model of random weights needs to be measured on a small machine.

    Width goes down in the decoder's proportions: MLP, heads and vision tower shrink with the hidden size, and the
    vocabulary stays. Number and size of the images' tokens stay too.

    Args:
        subject: The model.
        hidden_size: D of the decoder, a multiple of 64. None leaves it.
        layers: L of the decoder. None leaves it.

    Raises:
        PmodError: a size that cannot be built.
    """
    if hidden_size is None and layers is None:
        return subject
    for flag, number, least in (("--hidden-size", hidden_size, 64), ("--layers", layers, 2)):
        if number is not None and number < least:
            raise PmodError(f"{flag} {number} is too small: expected {least} or more", hint="pmod profile --help")
    if hidden_size is not None and hidden_size % 64:
        raise PmodError(
            f"--hidden-size {hidden_size} is no multiple of 64", hint=f"--hidden-size {hidden_size // 64 * 64 or 64}"
        )
    shared = subject.pmod.to_dict()
    for key in ("model_type", "architectures", "dtype"):
        shared.pop(key, None)
    text, vision = shared["text_config"], shared["vision_config"]
    if layers is not None:
        text["num_hidden_layers"] = layers
        text.pop("layer_types", None)
    if hidden_size is not None:
        share = hidden_size / text["hidden_size"]
        group = text["num_attention_heads"] // text["num_key_value_heads"]
        head = 128 if hidden_size % 128 == 0 and hidden_size // 128 % group == 0 else 64
        heads = hidden_size // head
        if heads % group:
            raise PmodError(
                f"--hidden-size {hidden_size} makes {heads} heads, which do not share K and V in groups of {group}",
                hint=f"--hidden-size {64 * group}, or a multiple of it",
            )
        text |= {
            "hidden_size": hidden_size,
            "intermediate_size": max(64, round(text["intermediate_size"] * share / 64) * 64),
            "num_attention_heads": heads,
            "num_key_value_heads": heads // group,
            "head_dim": head,
        }
        width = max(64, round(vision["hidden_size"] * share / 64) * 64)
        vision |= {
            "intermediate_size": max(64, round(vision["intermediate_size"] * width / vision["hidden_size"])),
            "hidden_size": width,
            "num_attention_heads": width // 64,
        }
    stock = {key: value for key, value in shared.items() if key not in ("pmod", "router_state")}
    kind = subject.stock.model_type
    try:
        return replace(subject, stock=STOCK[kind].from_dict(stock), pmod=PMOD[kind].from_dict(shared))
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise PmodError(f"{subject.name}: {str(error).splitlines()[0]}", hint="pmod profile --help") from error


def _read(name: str, revision: str | None) -> tuple[dict[str, Any], str]:
    """The configuration as a dict, and where it came from."""
    path = Path(name).expanduser()
    if path.is_file():
        return _parse(path), str(path)
    if name in ALIASES and not path.exists() and revision is None:
        return builtin_config(name).to_dict(), f"built-in configuration of {name}"
    file = resolve(name, revision=revision, weights=False).path / "config.json"
    return _parse(file), str(file)


def _parse(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PmodError(f"{file} is not JSON: {error}", hint="name a checkpoint folder or its config.json") from error
    if not isinstance(config, dict):
        raise PmodError(f"{file} holds no configuration: expected a JSON object", hint="name a model's config.json")
    return config


def _without_conflicts(own: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """A new schedule, shift or mean replaces what the checkpoint says on the same question."""
    replaced = {"schedule": ("shift", "mean", "values"), "shift": ("mean",), "mean": ("shift",)}
    dropped = {key for name in overrides for key in replaced.get(name, ())}
    return {key: value for key, value in own.items() if key not in dropped}
