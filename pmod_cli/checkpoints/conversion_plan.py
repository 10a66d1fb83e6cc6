"""A source and options to a plan: the tensors, config and files of the result. Nothing is written here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from pmod_cli.checkpoints import files
from pmod_cli.checkpoints.layout import DTYPES, LAYER, Options, Source, TensorSource
from pmod_cli.checkpoints.layouts import Draft, output_layout
from pmod_cli.checkpoints.layouts.shapes import canonical
from pmod_cli.checkpoints.writing import WeightFiles, lay_out
from pmod_cli.core.errors import PmodError
from pmod_cli.families import FAMILIES, high_resolution_titles
from pmod_cli.model import PmodSettings

ROUTERS = "model-routers.safetensors"


@dataclass(frozen=True)
class ConversionPlan:
    """What is to be written.

    Attributes:
        draft: Config, tensors and routers of the result, in its layout.
        weights: Weight files, without the new routers.
        router_dtype: Dtype of new routers.
        router_state: Of the result.
    """

    draft: Draft
    weights: WeightFiles
    router_dtype: str
    router_state: str

    @property
    def source(self) -> Source:
        """What is converted."""
        return self.draft.source

    @property
    def options(self) -> Options:
        """What was asked for."""
        return self.draft.options

    @property
    def streamed_bytes(self) -> int:
        """Bytes of weights that are written anew."""
        return self.weights.streamed_bytes + sum(part.result.nbytes for part in self.draft.tower.values())

    @property
    def retention(self) -> list[float]:
        """Retention ratio of each layer, length L; empty for a stock model."""
        return self.draft.settings.retention(self.source.num_layers) if self.draft.settings else []

    def weight_map(self) -> dict[str, str]:
        """Tensor name to file name, sorted."""
        of_file = {path: name for name, path in self.weights.unchanged.items()}
        found = {
            tensor: of_file[path]
            for path, tensors in self.source.files.items()
            if path in of_file
            for tensor in tensors
        }
        found |= {tensor: name for name, parts in self.weights.streamed.items() for tensor in parts}
        found |= dict.fromkeys(self.draft.routers, ROUTERS)
        return dict(sorted(found.items()))

    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        kept = set(self.weights.unchanged.values())
        old = sum(part.source.nbytes for part in self.source.parts.values() if part.source.path in kept)
        new = sum(files.Tensor(Path(), self.router_dtype, shape).nbytes for shape in self.draft.routers.values())
        return old + self.weights.streamed_bytes + new


def make_plan(
    source: Source, settings: PmodSettings | None, options: Options, *, calibrated: bool = False
) -> ConversionPlan:
    """Decide everything that does not need a weight.

    Args:
        settings: p-MoD settings; None keeps those of a p-MoD checkpoint, and is the paper's for a stock one.
        calibrated: Whether new routers get values that were fitted.

    Raises:
        PmodError: the settings do not fit the model, or the layout asked for cannot hold it.
    """
    to = output_layout(options.to)
    if source.settings is not None and settings is not None and to.routed:
        raise PmodError(
            f"{source.folder} is a p-MoD checkpoint already, with settings that its routers were made for",
            hint="leave out schedule and norm; for other settings start from the stock model",
        )
    settings = (source.settings or settings or PmodSettings()) if to.routed else None
    routed = _routed_layers(source, settings)
    dtype = DTYPES[options.dtype] if options.dtype else _norm_dtype(source)
    parts = {name: part for name, part in source.parts.items() if settings is not None or ".router." not in name}
    if options.dtype:
        parts = {name: replace(part, dtype=_cast(part, dtype)) for name, part in parts.items()}
    new = "calibrated" if calibrated else "untrained"
    routers, config = _new_routers(source, routed), _config(source, settings, options, new)
    assert to.arrange is not None  # of every layout that is written
    draft = to.arrange(Draft(source, options, settings, config, parts, routers, routed))
    trained = source.settings is not None and settings is not None
    return ConversionPlan(
        draft,
        weights=lay_out(
            draft.parts,
            source,
            max_shard_bytes=options.max_shard_bytes,
            routers=ROUTERS if draft.routers else None,
        ),
        router_dtype=dtype,
        router_state="stock" if settings is None else source.router_state if trained else new,
    )


def _routed_layers(source: Source, settings: PmodSettings | None) -> list[int]:
    if settings is None:
        return []
    layers = source.num_layers
    try:
        routed = settings.routed(layers)
    except ValueError as error:
        raise PmodError(f"the settings do not fit {layers} decoder layers: {error}") from error
    if settings.target_tokens == "vision_hr" and not FAMILIES[source.kind].high_resolution:
        raise PmodError(
            f"`target_tokens=vision_hr` needs anyres images, that is, a {high_resolution_titles()} model",
            hint="vision_all",
        )
    if settings.target_tokens == "vision_video" and FAMILIES[source.kind].video_tokens is None:
        raise PmodError(
            f"`target_tokens=vision_video`: {FAMILIES[source.kind].title} takes no videos", hint="vision_all"
        )
    return [layer for layer, is_routed in enumerate(routed) if is_routed]


def _new_routers(source: Source, routed: list[int]) -> dict[str, tuple[int, ...]]:
    """Routers, or biases of routers, that the source has not, by name in its own spelling."""
    layers = [name.removesuffix(LAYER) for name in source.parts if name.endswith(LAYER)]
    wanted: dict[str, tuple[int, ...]] = {}
    for layer in layers:
        if int(layer.split(".")[-2]) in routed:
            wanted |= {f"{layer}router.weight": (1, source.hidden_size), f"{layer}router.bias": (1,)}
    present = {canonical(name): part.source for name, part in source.parts.items() if ".router." in name}
    if routed and source.settings is not None:
        _check_routers(present, {canonical(name): shape for name, shape in wanted.items()}, source.folder)
    return {name: shape for name, shape in wanted.items() if canonical(name) not in present}


def _check_routers(present: dict[str, files.Tensor], wanted: dict[str, tuple[int, ...]], folder: Path) -> None:
    """The routers of a p-MoD checkpoint must be there, in the right layers, in their shapes; a bias may be absent."""
    lacking = sorted(name for name in wanted if name.endswith(".weight") and name not in present)
    extra = sorted(present.keys() - wanted.keys())
    for names, meaning in ((lacking, "lacks"), (extra, "has, on layers that its config calls plain,")):
        if names:
            raise PmodError(f"{folder} {meaning} {len(names)} routers: {', '.join(names[:5])}")
    for name, tensor in present.items():
        if tensor.shape != wanted[name]:
            found = f"{name} has shape {list(tensor.shape)}"
            raise PmodError(f"{tensor.file}: {found}, expected {list(wanted[name])}")


def _config(source: Source, settings: PmodSettings | None, options: Options, new: str) -> dict:
    config = dict(source.config)
    if options.dtype:
        config = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
        config["text_config"] = {k: v for k, v in config["text_config"].items() if k not in ("dtype", "torch_dtype")}
        config["dtype"] = options.dtype
    if settings is None:
        return config
    family = FAMILIES[source.kind]
    state = source.router_state if source.settings is not None else new
    return config | {
        "model_type": family.routed_name,
        "architectures": [family.routed_class],
        "pmod": settings.to_dict(),
        "router_state": state,
    }


def _norm_dtype(source: Source) -> str:
    """The dtype that new routers take, which all layers have to share."""
    dtypes = {part.source.dtype for name, part in source.parts.items() if name.endswith(LAYER)}
    if len(dtypes) != 1:
        raise PmodError(
            f"the decoder layers differ in dtype: {', '.join(sorted(dtypes))}", hint="`dtype` makes them one"
        )
    return dtypes.pop()


def _cast(part: TensorSource, dtype: str) -> str | None:
    return dtype if part.source.dtype in ("F32", "BF16", "F16", "F64") else None
