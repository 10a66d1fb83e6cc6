"""Which model is profiled: a name becomes two configurations, stock and p-MoD. No weights are read."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import NoneType
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from pmod_cli.checkpoints import resolve
from pmod_cli.checkpoints.aliases import ALIASES, alias_of, builtin_config
from pmod_cli.checkpoints.files import CONFIG, read_json
from pmod_cli.checkpoints.layouts import layout_of
from pmod_cli.checkpoints.layouts.huggingface import hold_to_weights
from pmod_cli.checkpoints.layouts.shapes import checked_shapes
from pmod_cli.checkpoints.processor_limits import with_limits
from pmod_cli.core.errors import PmodError, first_line
from pmod_cli.core.paths import expanded
from pmod_cli.families import Family, family_of, model_types
from pmod_cli.families.configs import MOST_LAYERS, known_family, left_out
from pmod_cli.families.sizes import Sizes
from pmod_cli.families.unsupported import why_not
from pmod_cli.model import PmodSettings

WIDEST = 2**20
# What transformers raises at values that it does not foresee in a file, beside its own errors.
REFUSALS = (
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    IndexError,
    OverflowError,
    ZeroDivisionError,
    RecursionError,
    NotImplementedError,
    StrictDataclassError,
)


@dataclass(frozen=True)
class Subject:
    """A stock model and its p-MoD.

    Args:
        name: As given by the user.
        source: Where the configuration was read.
        stock: Configuration of the stock model.
        pmod: The same with p-MoD settings.
        assumed: Sizes that are transformers' defaults, since neither the configuration nor weights say them.
    """

    name: str
    source: str
    stock: PreTrainedConfig
    pmod: PreTrainedConfig
    assumed: tuple[str, ...] = ()

    @cached_property
    def sizes(self) -> Sizes:
        """Sizes of the stock model; how many pixels it makes of a picture, as the processor beside it says."""
        sizes, file = Sizes.of(self.stock), Path(self.source)
        return with_limits(sizes, file.parent) if file.is_file() else sizes


@dataclass(frozen=True)
class FoundConfig:
    """A configuration as it was read.

    Args:
        name: As given by the user.
        source: Where it was read.
        config: The dict of a config.json, with both of its parts.
        assumed: Sizes that it leaves out and no weights confirm: transformers' defaults, as `text_config.head_dim 64`.
    """

    name: str
    source: str
    config: dict[str, Any]
    assumed: tuple[str, ...] = ()


def load_subject(name: str, overrides: dict[str, Any] | None = None, *, revision: str | None = None) -> Subject:
    """Read the configuration of a model. An alias needs neither files nor network.

    Args:
        name: A checkpoint folder, a config.json, an alias or a hub id; stock or p-MoD.
        overrides: `PmodSettings` fields that replace the checkpoint's own, or the paper's for a stock model.

    Raises:
        PmodError: as `find_config` and `subject_of`.
    """
    return subject_of(find_config(name, revision=revision), overrides)


def find_config(name: str, *, revision: str | None = None) -> FoundConfig:
    """The configuration behind a name. Where its weights are beside it, it is held to their headers.

    Raises:
        PmodError: nothing has this name, the configuration is no LLaVA's, or it says other sizes than the weights have.
    """
    path = expanded(name)
    if (alias := alias_of(name)) in ALIASES and not path.exists() and revision is None:
        name = alias
        if ALIASES[alias].repo is not None:  # a bundled model is a folder like another, with its tokenizer
            return FoundConfig(alias, f"built-in configuration of {alias}", builtin_config(alias).to_dict())
    if path.is_file() and revision is not None:
        raise PmodError(f"{name} is a file, and has no revision {revision!r}", hint="leave `revision` out")
    file = path if path.is_file() else resolve(name, revision=revision, weights=False).path / CONFIG
    config = read_json(file)
    if (layout := layout_of(config)) is not None and not layout.loads:
        raise PmodError(
            f"{file} is in the {layout.name} layout, which has to be converted first", hint="pmod convert NAME"
        )
    if (family := family_of(kind := config.get("model_type"))) is None:
        if reason := why_not(kind):
            raise PmodError(f"{file}: {reason}", hint="pmod profile --model llava-next-7b")
        raise PmodError(
            f"{file} is not a LLaVA: model_type is {kind!r:.60}, expected one of {', '.join(model_types())}",
            hint="pmod profile --model llava-next-7b",
        )
    config = family.unfold(config)
    if not all(isinstance(config.get(part), dict | NoneType) for part in ("text_config", "vision_config")):
        raise PmodError(f"{file}: text_config and vision_config are JSON objects", hint="name a LLaVA's config.json")
    whole = config | {part: config.get(part) or family.defaults[part] for part in ("text_config", "vision_config")}
    try:
        Sizes.of(whole)
    except PmodError as error:
        raise PmodError(f"{file}: {error.what}", hint=error.hint) from error
    checked_shapes(whole, file)
    held = file.name == CONFIG and hold_to_weights(file.parent, whole)
    return FoundConfig(name, str(file), whole, () if held else tuple(left_out(config)))


def subject_of(found: FoundConfig, overrides: dict[str, Any] | None = None) -> Subject:
    """Stock and p-MoD configuration.

    Raises:
        PmodError: a setting is out of range, or transformers refuses the configuration.
    """
    config, name, overrides = found.config, found.name, overrides or {}
    own = config.get("pmod") or {}
    if not isinstance(own, dict):
        raise PmodError(f"{found.source}: pmod is {own!r:.60}: expected a JSON object", hint="convert the model again")
    for key, value in overrides.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise PmodError(f"{key} is {value}: expected a finite number", hint="pmod profile --help")
    stock_class, pmod_class = _config_classes(known_family(config))
    shared = {
        key: value
        for key, value in config.items()
        if key not in ("model_type", "architectures", "pmod", "router_state")
    }
    try:
        settings = PmodSettings.from_dict({**_without_conflicts(own, overrides), **overrides})
        pmod = pmod_class.from_dict({**shared, "pmod": settings.to_dict()})
        _ = pmod.retention  # a schedule that this number of layers cannot have
        return Subject(name, found.source, stock_class.from_dict(shared), pmod, found.assumed)
    except REFUSALS as error:
        raise PmodError(f"{name}: {first_line(error)}", hint="pmod profile --help") from error


def scaled(subject: Subject, *, hidden_size: int | None = None, layers: int | None = None) -> Subject:
    """The same architecture at another size: what a model of random weights needs to be measured on a small machine.

    Width goes down in the decoder's proportions: MLP, heads and vision tower shrink with the hidden size, and the
    vocabulary stays. Number and size of the images' tokens stay too. Positions in three parts (M-RoPE) keep the shares
    that these have of a head.

    Args:
        hidden_size: D of the decoder, a multiple of 64. None leaves it.
        layers: L of the decoder. None leaves it.

    Raises:
        PmodError: a size that cannot be built.
    """
    if hidden_size is None and layers is None:
        return subject
    for name, number, least in (("hidden_size", hidden_size, 64), ("layers", layers, 2)):
        if number is not None and number < least:
            raise PmodError(f"`{name}={number}` is too small: expected {least} or more", hint="pmod profile --help")
    for what, number, most in (("layers", layers, MOST_LAYERS), ("hidden size", hidden_size, WIDEST)):
        if number is not None and number > most:
            raise PmodError(f"{what} {number} is more than {most:,}, which no model has", hint="pmod profile --help")
    if hidden_size is not None and hidden_size % 64:
        raise PmodError(
            f"`hidden_size={hidden_size}` is no multiple of 64", hint=f"`hidden_size={hidden_size // 64 * 64 or 64}`"
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
        whole = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
        head = 128 if hidden_size % 128 == 0 and hidden_size // 128 % group == 0 else 64
        heads = hidden_size // head
        if heads % group:
            raise PmodError(
                f"`hidden_size={hidden_size}` makes {heads} heads, which do not share K and V in groups of {group}",
                hint=f"`hidden_size={64 * group}`, or a multiple of it",
            )
        text |= {
            "hidden_size": hidden_size,
            "intermediate_size": max(64, round(text["intermediate_size"] * share / 64) * 64),
            "num_attention_heads": heads,
            "num_key_value_heads": heads // group,
            "head_dim": head,
        }
        rope = text.get("rope_parameters") or {}
        if "mrope_section" in rope:
            text["rope_parameters"] = rope | {"mrope_section": [part * head // whole for part in rope["mrope_section"]]}
        width = max(64, round(vision["hidden_size"] * share / 64) * 64)
        vision |= {
            "intermediate_size": max(64, round(vision["intermediate_size"] * width / vision["hidden_size"])),
            "hidden_size": width,
        }
        if known_family(subject.stock).tiled:
            vision["num_attention_heads"] = width // 64
        else:
            vision |= {"num_heads": width // 64, "out_hidden_size": hidden_size}
    stock = {key: value for key, value in shared.items() if key not in ("pmod", "router_state")}
    stock_class, pmod_class = _config_classes(known_family(subject.stock))
    try:
        pmod = pmod_class.from_dict(shared)
        _ = pmod.retention  # as in `subject_of`
        return replace(subject, stock=stock_class.from_dict(stock), pmod=pmod)
    except REFUSALS as error:
        raise PmodError(f"{subject.name}: {first_line(error)}", hint="pmod profile --help") from error


def _config_classes(family: Family) -> tuple[type[PreTrainedConfig], type[PreTrainedConfig]]:
    """The configuration classes of a family, stock and p-MoD."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    import pmod_cli.model.configuration  # noqa: F401 - registers the p-MoD configurations

    return CONFIG_MAPPING[family.name], CONFIG_MAPPING[family.routed_name]


def _without_conflicts(own: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """A new schedule, shift or mean replaces what the checkpoint says on the same question."""
    replaced = {"schedule": ("shift", "mean", "values"), "shift": ("mean",), "mean": ("shift",)}
    replaced["method"] = (*replaced["schedule"], "schedule", "selection", "select_at", "returns", "keep_keys")
    dropped = {key for name in overrides for key in replaced.get(name, ())}
    return {key: value for key, value in own.items() if key not in dropped}
