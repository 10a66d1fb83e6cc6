"""What a checkpoint layout is, what it is read into, and what a conversion is asked for; the registry of layouts.

Every layout is read into a `Source`: a stock Hugging Face config, and for each tensor of it where its bytes come from.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmod_cli.checkpoints.files import Tensor
from pmod_cli.core.errors import PmodError
from pmod_cli.core.plugins import PluginRegistry
from pmod_cli.model import PmodSettings

if TYPE_CHECKING:
    import numpy as np

LARGEST = 1000.0  # deviation of routers: beyond it their logits soon leave 16 bits
LINKS = ("hard", "copy", "symlink")
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
Progress = Callable[[int], None]  # told the bytes of each piece of weights that is written
LAYER = "input_layernorm.weight"  # every decoder layer has one, and nothing else has


@dataclass(frozen=True)
class LowRank:
    """A LoRA update: `weight + scale * up @ down`.

    Attributes:
        down: (r, in).
        up: (out, r).
        scale: alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA.
    """

    down: Tensor
    up: Tensor
    scale: float


@dataclass(frozen=True)
class TensorSource:
    """One tensor of the result: bytes of the source, and what happens to them on the way.

    Attributes:
        source: Where the bytes are.
        rows: First size of the result, if it differs: rows beyond the source's are its mean row, the rest is cut off.
        dtype: Dtype of the result, if it differs.
        low_rank: Update that is added, if any.
    """

    source: Tensor
    rows: int | None = None
    dtype: str | None = None
    low_rank: LowRank | None = None

    @property
    def result(self) -> Tensor:
        """Dtype and shape of the result."""
        rows = self.source.shape[:1] if self.rows is None else (self.rows,)
        return replace(self.source, dtype=self.dtype or self.source.dtype, shape=rows + self.source.shape[1:])

    @property
    def changed(self) -> bool:
        """Whether the result's bytes differ from the source's."""
        result = self.result
        return (result.dtype, result.shape) != (self.source.dtype, self.source.shape) or self.low_rank is not None


@dataclass(frozen=True)
class Source:
    """A checkpoint of any layout.

    Attributes:
        folder: Where it is.
        layout: `huggingface`, `original`, `published` or `parts`.
        config: Stock configuration in the Hugging Face layout; its `model_type` is the name of a family.
        parts: Tensors by the name that they get in the Hugging Face layout, routers included.
        files: Every weight file that was read, with the names of its tensors in it.
        small_files: Small files that are copied as they are.
        write_processor: Writes tokenizer, processor and chat template into a folder, where they have to be made.
        settings: p-MoD settings, where the checkpoint is a p-MoD one already.
        router_state: `stock`, `untrained`, `trained` or `calibrated`.
        original_config: config.json of the source, where its layout is another.
        notes: What the user has to know.
    """

    folder: Path
    layout: str
    config: dict
    parts: dict[str, TensorSource]
    files: dict[Path, set[str]]
    small_files: list[Path] = field(default_factory=list)
    write_processor: Callable[[Path], None] | None = None
    settings: PmodSettings | None = None
    router_state: str = "stock"
    original_config: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    def name_of(self, path: Path) -> str:
        """Of a small file, in its folder and in the result's."""
        return path.relative_to(self.folder).as_posix() if path.is_relative_to(self.folder) else path.name

    @property
    def kind(self) -> str:
        """Name of the family."""
        return self.config["model_type"]

    @property
    def num_layers(self) -> int:
        """L, from the names of the tensors: the config was held to them."""
        return sum(name.endswith(LAYER) for name in self.parts)

    @property
    def hidden_size(self) -> int:
        """D, from the shape of a norm."""
        return next(part.source.shape[0] for name, part in self.parts.items() if name.endswith(LAYER))

    def without_routers(self) -> Source:
        """A p-MoD checkpoint as the stock model that its other weights are."""
        routers = {name for name in self.parts if ".router." in name}
        read = {path: names - routers for path, names in self.files.items()}
        return replace(
            self,
            parts={name: part for name, part in self.parts.items() if name not in routers},
            files={path: names for path, names in read.items() if names},
            settings=None,
            router_state="stock",
        )

    @property
    def decoder(self) -> str:
        """Name of the decoder."""
        return self.config["text_config"].get("model_type", "llama")


def files_of(*groups: dict[str, Tensor]) -> dict[Path, set[str]]:
    """Names by file, for `Source.files`."""
    files: dict[Path, set[str]] = {}
    for group in groups:
        for name, tensor in group.items():
            files.setdefault(tensor.path, set()).add(name)
    return files


@dataclass(frozen=True)
class Calibrated:
    """Routers that were fitted, for a conversion to write.

    Attributes:
        values: Weight `(1, D)` and bias `(1,)`, float32, of each layer that has a router.
        card: What the model card says about them, Markdown.
        finish: Writes what else belongs to them into the folder of the result.
    """

    values: Mapping[int, tuple[np.ndarray, np.ndarray]]
    card: str
    finish: Callable[[Path], None] = lambda folder: None

    def by_name(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """The values by tensor name, such as `….layers.8.router.weight`."""
        return {name: self.values[int(name.split(".")[-3])][name.endswith("bias")] for name in names}


@dataclass(frozen=True)
class Options:
    """How a checkpoint is written.

    Attributes:
        to: Layout of the result, one of `layouts.output_layouts()`.
        dtype: Dtype of all weights, as in `DTYPES`; None keeps them.
        max_shard_bytes: Size of a weight file; None keeps the source's files where possible.
        link: How unchanged files are taken over, one of `LINKS`.
        router_init: `zero`, or `normal:STD`.
        seed: Of `normal`.
        vision_tower: Folder or hub id of the tower, instead of the one that an original checkpoint names.
        tokenizer: Folder of the tokenizer, for a checkpoint that has none.
        projector: File of a pretrained projector: the source is then a language model, to become a LLaVA.
        anyres: With `projector`: LLaVA-NeXT, not LLaVA-1.5.
        adapter: Folder of a LoRA adapter that was trained on the source.
        merge: Add the adapter to the weights; else it is kept in a folder `adapter` of the result.
        verify: Read again what was written and compare it with its source.
        offline: Do not use the network.

    Raises:
        PmodError: a value that is not known.
    """

    to: str = "pmod"
    dtype: str | None = None
    max_shard_bytes: int | None = None
    link: str = "hard"
    router_init: str = "zero"
    seed: int = 0
    vision_tower: str | None = None
    tokenizer: Path | None = None
    projector: Path | None = None
    anyres: bool = False
    adapter: Path | None = None
    merge: bool = True
    verify: bool = False
    offline: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (
            ("link", self.link, LINKS),
            ("dtype", self.dtype, (None, *DTYPES)),
        ):
            if value not in known:
                raise PmodError(f"`{name}={value!r}`: expected one of {', '.join(filter(None, known))}")
        _ = self.router_std

    @property
    def router_std(self) -> float:
        """Standard deviation of new routers; 0 for zeros."""
        match = re.fullmatch(r"normal:(\d+(?:\.\d*)?(?:[eE]-?\d+)?)", self.router_init, re.ASCII)
        if self.router_init != "zero" and (match is None or float(match[1]) > LARGEST):
            raise PmodError(f"`router_init={self.router_init!r}`: expected zero, or normal:STD such as normal:0.02")
        return float(match[1]) if match else 0.0


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


THIS_FOLDER = "THIS_FOLDER"


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
        usage: Markdown for the model card: how it is loaded; `THIS_FOLDER` in it becomes the name of the folder.
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


LAYOUTS: PluginRegistry[Layout] = PluginRegistry("checkpoint layout", "pmod_cli.layouts", Layout)
register_layout = LAYOUTS.add  # an entry point of the group that names a `Layout` does the same
