"""What a conversion is asked for, and what it did."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from pmod_cli.core.errors import PmodError

LARGEST = 1000.0  # deviation of routers: beyond it their logits soon leave 16 bits
LINKS = ("hard", "copy", "symlink")
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


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
class ConversionReport:
    """What a conversion wrote, or would write.

    Attributes:
        target: Folder of the result.
        source: What it was made from: a folder, or `repository@commit`.
        layout: Layout of the source: `huggingface`, `original`, `published` or `parts`.
        to: Layout of the result.
        model_type: As its config.json says.
        decoder: Name of the decoder.
        retention: Retention ratio per decoder layer, length L; empty for a stock model.
        routed_layers: Layers that have a router.
        router_parameters: Parameters of all routers.
        settings: The p-MoD settings, as our `config.json` holds them; empty for a stock model.
        router_state: `stock`, `untrained`, `trained` or `calibrated`.
        num_layers: Decoder layers, L.
        read_bytes: Size of the source's weights.
        streamed_bytes: Weights that are renamed, cast or merged on the way, hence written anew.
        copied_bytes: Weight files that are copied as they are.
        free_bytes: Free space on the target's disk before.
        linked: Weight files that share their bytes with the source.
        symlinked: Weight files that only point to the source.
        copied: Weight files that are copies, as asked for or since the source is on another file system.
        streamed: Weight files that were written anew.
        written: Small files.
        notes: What the user has to know.
        verified: What `--verify` compared; empty without it.
    """

    target: Path
    source: str
    layout: str
    to: str
    model_type: str
    decoder: str
    retention: list[float]
    routed_layers: list[int]
    router_parameters: int
    settings: dict
    router_state: str
    num_layers: int
    read_bytes: int
    streamed_bytes: int
    copied_bytes: int = 0
    free_bytes: int = 0
    linked: list[str] = field(default_factory=list)
    symlinked: list[str] = field(default_factory=list)
    copied: list[str] = field(default_factory=list)
    streamed: list[str] = field(default_factory=list)
    written: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    verified: list[str] = field(default_factory=list)

    @property
    def mean_retention(self) -> float:
        """Mean of the retention ratios: the share of the vision KV cache that is left."""
        return sum(self.retention) / len(self.retention) if self.retention else 1.0
