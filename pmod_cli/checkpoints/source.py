"""What every layout is read into: a stock Hugging Face config, and for each tensor of it where its bytes come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pmod_cli.checkpoints.files import Tensor
from pmod_cli.model import PmodSettings

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
