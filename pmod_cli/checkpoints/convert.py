"""A stock LLaVA checkpoint to a p-MoD checkpoint, without copying its weights.

A MoD layer only adds `router.weight` and `router.bias` to stock names. So the stock shards are hard-linked, and one
small shard of zero routers, the index and the config are written. Everything is checked first, from config and headers.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from pmod_cli import __version__
from pmod_cli.checkpoints import files
from pmod_cli.checkpoints.atomic import refuse_existing, staged_directory, write_json
from pmod_cli.errors import PmodError
from pmod_cli.model import PmodSettings

KINDS = {
    "llava": ("pmod_llava", "PmodLlavaForConditionalGeneration"),
    "llava_next": ("pmod_llava_next", "PmodLlavaNextForConditionalGeneration"),
}
DECODERS = ("llama", "mistral", "qwen2")
PARTS = ("language_model", "vision_tower", "multi_modal_projector")
ROUTERS = "model-routers.safetensors"
PROVENANCE = "pmod_provenance.json"
COPIED_SUFFIXES = (".json", ".txt", ".model", ".jinja")
LAYER = re.compile(r"(?P<layer>.*\blanguage_model\.(?:model\.)?layers\.(?P<number>\d+)\.)input_layernorm\.weight")


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion wrote, or would write.

    Attributes:
        target: Folder of the p-MoD checkpoint.
        source: What it was made from: a folder, or `repository@commit`.
        model_type: `pmod_llava` or `pmod_llava_next`.
        decoder: `llama`, `mistral` or `qwen2`.
        retention: Retention ratio per decoder layer, length L.
        routed_layers: Layers that have a router.
        router_parameters: Parameters of all routers.
        linked: Weight files that share their bytes with the source.
        copied: Weight files that had to be copied: the source is on another file system.
        written: Files made new or copied because they are small.
        settings: The p-MoD settings, as `config.json` holds them.
    """

    target: Path
    source: str
    model_type: str
    decoder: str
    retention: list[float]
    routed_layers: list[int]
    router_parameters: int
    settings: dict
    linked: list[str] = field(default_factory=list)
    copied: list[str] = field(default_factory=list)
    written: list[str] = field(default_factory=list)

    @property
    def mean_retention(self) -> float:
        """Mean of the retention ratios: the share of the vision KV cache that is left."""
        return sum(self.retention) / len(self.retention)


@dataclass(frozen=True)
class _Plan:
    source: Path
    config: dict
    tensors: dict[str, files.Tensor]
    shards: dict[str, str]  # name in the source -> name in the target
    routers: dict[str, tuple[int, ...]]  # tensor name -> shape
    dtype: str


def convert(
    source: Path,
    target: Path,
    settings: PmodSettings,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    origin: str | None = None,
) -> ConversionReport:
    """Write the p-MoD checkpoint of a stock LLaVA; its routers are zero and untrained.

    Args:
        source: Folder in the Hugging Face layout: llava or llava_next over a Llama, Mistral or Qwen2 decoder.
        target: Folder to write. It appears whole or not at all.
        settings: Schedule, weight norm and the rest.
        overwrite: Replace an existing target.
        dry_run: Check everything and write nothing.
        origin: What to name as the source instead of the folder, such as `repository@commit`.

    Raises:
        PmodError: the source is no whole stock checkpoint of a known kind, the settings do not fit it, or `target`
            exists.
    """
    source, target = Path(source), Path(target)
    _check_target(source, target, overwrite)
    plan, report = _plan(source, target, settings, origin or str(source))
    if dry_run:
        names = list(plan.shards.values())
        linked = names if _same_file_system(source, plan.shards, target) else []
        return _with_files(report, linked, [name for name in names if name not in linked], _small_files(source))
    with staged_directory(target, overwrite=overwrite) as staging:
        linked, copied = _place_shards(plan, staging)
        for name in _small_files(source):
            shutil.copyfile(source / name, staging / name)
        files.write_zeros(staging / ROUTERS, plan.routers, plan.dtype)
        write_json(staging / files.INDEX, _index(plan))
        write_json(staging / files.CONFIG, plan.config)
        write_json(staging / PROVENANCE, _provenance(report, source, plan))
    written = [*_small_files(source), files.CONFIG, files.INDEX, ROUTERS, PROVENANCE]
    return _with_files(report, linked, copied, written)


def _plan(source: Path, target: Path, settings: PmodSettings, origin: str) -> tuple[_Plan, ConversionReport]:
    config = files.read_json(source / files.CONFIG)
    kind, decoder = _check_architecture(config, source)
    tensors = files.read_tensors(source)
    layers = _decoder_layers(tensors, config, source)
    hidden, dtype = _width(tensors, layers)
    try:
        retention, routed = settings.retention(len(layers)), settings.routed(len(layers))
    except ValueError as error:
        raise PmodError(f"the settings do not fit {len(layers)} decoder layers: {error}") from error
    if settings.target_tokens == "vision_hr" and kind != "llava_next":
        raise PmodError("--target-tokens vision_hr needs anyres images, that is, a LLaVA-NeXT model", hint="vision_all")
    routers: dict[str, tuple[int, ...]] = {}
    for number, prefix in enumerate(layers):
        if routed[number]:
            routers |= {f"{prefix}router.weight": (1, hidden), f"{prefix}router.bias": (1,)}
    model_type, architecture = KINDS[kind]
    config |= {
        "model_type": model_type,
        "architectures": [architecture],
        "pmod": settings.to_dict(),
        "router_state": "untrained",
    }
    names = files.shard_names(source)
    shards = {name: name for name in names}
    if names == [files.SINGLE]:  # beside an index, a file of this name would be loaded alone, without the routers
        shards = {files.SINGLE: "model-00001-of-00001.safetensors"}
    report = ConversionReport(
        target=target,
        source=origin,
        model_type=model_type,
        decoder=decoder,
        retention=retention,
        routed_layers=[number for number, is_routed in enumerate(routed) if is_routed],
        router_parameters=sum(routed) * (hidden + 1),
        settings=settings.to_dict(),
    )
    return _Plan(source, config, tensors, shards, routers, dtype), report


def _check_target(source: Path, target: Path, overwrite: bool) -> None:
    """Overwriting removes a folder: only one that a conversion wrote, and never the source."""
    refuse_existing(target, overwrite)
    if not target.exists():
        return
    if target.resolve() in (source.resolve(), *source.resolve().parents):
        raise PmodError(f"{target} is the source or holds it", hint="choose another folder with --out")
    if not target.is_dir() or (any(target.iterdir()) and not (target / PROVENANCE).is_file()):
        raise PmodError(
            f"{target} was not written by pmod convert: it lacks {PROVENANCE}",
            hint="choose another folder with --out, or remove it yourself",
        )


def _check_architecture(config: dict, source: Path) -> tuple[str, str]:
    """(kind, decoder) of a stock checkpoint that can be converted."""
    kind = config.get("model_type")
    if kind in [pmod for pmod, _ in KINDS.values()]:
        raise PmodError(f"{source} is a p-MoD checkpoint already", hint=f"pmod finetune --model {source}")
    if kind in ("llava_llama", "llava_mistral", "llava_qwen", "pmod_llava_llama"):
        raise PmodError(
            f"{source} is in the layout of the original code (model_type {kind!r}), expected the Hugging Face layout",
            hint="pmod convert --list names the stock models in that layout",
        )
    if kind not in KINDS:
        raise PmodError(f"{source / files.CONFIG}: model_type is {kind!r}, expected one of {', '.join(KINDS)}")
    text = config.get("text_config") or {}
    decoder = text.get("model_type", "llama")
    if decoder not in DECODERS:
        raise PmodError(
            f"{source / files.CONFIG}: the decoder, text_config.model_type, is {decoder!r}; "
            f"expected one of {', '.join(DECODERS)}"
        )
    # Mistral's default where the config is silent is a window; Qwen2 has one only where it says so.
    window = text.get("sliding_window", 4096 if decoder == "mistral" else None)
    if window and (decoder == "mistral" or text.get("use_sliding_window")):
        raise PmodError(
            f"{source / files.CONFIG}: sliding-window attention ({window} tokens) is not supported: "
            "a window counts tokens that routing drops"
        )
    if config.get("quantization_config") or text.get("quantization_config"):
        raise PmodError(f"{source} is quantised; expected float32, bfloat16 or float16 weights")
    return kind, decoder


def _decoder_layers(tensors: dict[str, files.Tensor], config: dict, source: Path) -> list[str]:
    """Name prefix of each decoder layer in order, such as `language_model.model.layers.0.`."""
    absent = [part for part in PARTS if not any(part in name for name in tensors)]
    if absent:
        raise PmodError(f"{source} holds no tensor of its {', '.join(absent)}: not a whole LLaVA checkpoint")
    if any(".router." in name for name in tensors):
        raise PmodError(f"{source} holds routers already, though its config says that it is a stock model")
    matches = filter(None, map(LAYER.fullmatch, tensors))
    prefixes = {int(match["number"]): match["layer"] for match in matches}
    expected = (config.get("text_config") or {}).get("num_hidden_layers") or len(prefixes)
    if sorted(prefixes) != list(range(expected)) or not prefixes:
        raise PmodError(f"{source} holds decoder layers {_ranges(sorted(prefixes))}, expected 0-{expected - 1}")
    return [prefixes[number] for number in range(expected)]


def _width(tensors: dict[str, files.Tensor], layers: list[str]) -> tuple[int, str]:
    """(hidden size D, dtype) that the routers take, which all layers have to share."""
    norms = {tensors[f"{layer}input_layernorm.weight"] for layer in layers}
    kinds = {(norm.shape, norm.dtype) for norm in norms}
    if len(kinds) != 1:
        raise PmodError(f"the decoder layers differ in width or dtype: {sorted(kinds)}")
    shape, dtype = kinds.pop()
    if len(shape) != 1 or dtype not in ("F32", "BF16", "F16"):
        raise PmodError(f"decoder norms of shape {shape} and dtype {dtype}; expected (D,) in F32, BF16 or F16")
    return shape[0], dtype


def _small_files(source: Path) -> list[str]:
    """Tokenizer, processor and generation files: copied, so that editing one never reaches the source."""
    made_new = (files.CONFIG, files.INDEX, PROVENANCE)
    return sorted(
        path.name
        for path in source.iterdir()
        if path.is_file() and path.suffix in COPIED_SUFFIXES and path.name not in made_new
    )


def _place_shards(plan: _Plan, staging: Path) -> tuple[list[str], list[str]]:
    """Hard-link each shard, or copy it where the file system does not allow that: (linked, copied)."""
    linked, copied = [], []
    for name, new_name in plan.shards.items():
        blob = (plan.source / name).resolve()  # the Hugging Face cache holds symbolic links to its blobs
        try:
            os.link(blob, staging / new_name)
            linked.append(new_name)
        except OSError:
            shutil.copyfile(blob, staging / new_name)
            copied.append(new_name)
    return linked, copied


def _same_file_system(source: Path, shards: dict[str, str], target: Path) -> bool:
    existing = next(parent for parent in target.absolute().parents if parent.exists())
    return all((source / name).stat().st_dev == existing.stat().st_dev for name in shards)


def _index(plan: _Plan) -> dict:
    weight_map = {name: plan.shards[tensor.file] for name, tensor in plan.tensors.items()}
    weight_map |= dict.fromkeys(plan.routers, ROUTERS)
    routers = [files.Tensor(ROUTERS, plan.dtype, shape) for shape in plan.routers.values()]
    total_bytes = sum(tensor.nbytes for tensor in [*plan.tensors.values(), *routers])
    return {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}


def _provenance(report: ConversionReport, source: Path, plan: _Plan) -> dict:
    """Enough to say later what this was made of: digests of what is small, header digests of the shards."""
    small = [files.CONFIG, *_small_files(source)]
    return {
        "schema_version": 1,
        "made_by": f"pmod {__version__}",
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": report.source,
        "settings": report.settings,
        "retention": report.retention,
        "versions": {name: version(name) for name in ("safetensors", "transformers")},
        "source_files_sha256": {name: hashlib.sha256((source / name).read_bytes()).hexdigest() for name in small},
        "source_shards": {
            name: {"bytes": (source / name).stat().st_size, "header_sha256": files.header_digest(source / name)}
            for name in plan.shards
        },
    }


def _with_files(report: ConversionReport, linked: list[str], copied: list[str], written: list[str]) -> ConversionReport:
    return ConversionReport(**{**vars(report), "linked": linked, "copied": copied, "written": written})


def _ranges(numbers: list[int]) -> str:
    """`0-3, 5` for [0, 1, 2, 3, 5]."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts) or "none"
