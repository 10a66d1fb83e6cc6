"""What a checkpoint layout is, and the registry of the layouts that are read and written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pmod_cli.checkpoints.options import Options
from pmod_cli.checkpoints.source import Source, TensorSource
from pmod_cli.core.registry import Registry
from pmod_cli.model import PmodSettings

Progress = Callable[[int], None]  # told the bytes of each piece of weights that is written


@dataclass(frozen=True)
class Draft:
    """A result before its weight files are laid out: made in the Hugging Face layout, arranged by its own.

    Attributes:
        source: Where everything comes from.
        options: What was asked for.
        settings: p-MoD settings; None for a stock model.
        config: config.json of the result.
        parts: Its tensors by name, without new routers.
        routers: Shapes of new routers by name.
        routed_layers: Layers with a router.
        tower: The vision tower by the names of a CLIP, where it gets a folder of its own.
    """

    source: Source
    options: Options
    settings: PmodSettings | None
    config: dict
    parts: dict[str, TensorSource]
    routers: dict[str, tuple[int, ...]]
    routed_layers: list[int]
    tower: dict[str, TensorSource] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """A form in which checkpoints are stored. It has `read`, or `arrange`, or both.

    Attributes:
        name: What reports call it, and, where it is written, `--to` and `Options.to`.
        recognises: Whether a config.json, with the options of a conversion, is of this layout. The layout that was
            registered last is asked first.
        read: From folder, config.json and options to a `Source`, checked as far as config and headers go.
        model_types: Every `model_type` of its config.json, for messages.
        takes: Options that a checkpoint of this layout takes and others do not.
        arrange: From a draft in the Hugging Face layout to one in this layout.
        finish: Writes what the layout has beside weights and config.json into the folder of a result; returns what the
            user has to know.
        summary: What it is written for, a few words of help.
        usage: Markdown for the model card: how it is loaded.
        routed: Whether the result has routers and settings.
        loads: Whether transformers, with our classes, loads it; then `--verify` holds it to the model.
        current: Whether the commands go on with the result.
    """

    name: str
    recognises: Callable[[dict, Options], bool] | None = None
    read: Callable[[Path, dict, Options], Source] | None = None
    model_types: Callable[[], list[str]] = list
    takes: tuple[str, ...] = ()
    arrange: Callable[[Draft], Draft] | None = None
    finish: Callable[[Draft, Path, Progress], list[str]] | None = None
    summary: str = ""
    usage: str = ""
    routed: bool = True
    loads: bool = True
    current: bool = False


LAYOUTS: Registry[Layout] = Registry("checkpoint layout", "pmod_cli.layouts")
register_layout = LAYOUTS.add  # an entry point of the group that names a `Layout` does the same
