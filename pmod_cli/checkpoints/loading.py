"""Files to a model: stock LLaVA and p-MoD alike. Nothing that the checkpoint lacks is filled in.

A processor comes with a checkpoint, so it may be anybody's. It is held to the config beside it: one that makes larger
pictures than the vision tower takes would fail in the tower, after it has filled the memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from pmod_cli.checkpoints.files import CONFIG, TORCH_NAMES, missing_files, read_json, read_tensors, shard_names
from pmod_cli.checkpoints.layouts import layout_of
from pmod_cli.core.errors import PmodError, first_line
from pmod_cli.families import family_of
from pmod_cli.families.configs import filled, tower_kind
from pmod_cli.families.llava_next import is_pinpoint

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin
    from transformers.utils.quantization_config import QuantizationConfigMixin


def router_state(path: Path) -> str:
    """`stock`, or for a p-MoD checkpoint `untrained`, `trained` or `calibrated`.

    With untrained routers every token of a layer ties: what is kept then means nothing.
    """
    config = read_json(Path(path) / CONFIG)
    return config.get("router_state", "untrained") if "pmod" in config else "stock"


def load_model(
    path: Path,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    attn_implementation: str = "sdpa",
    quantization: QuantizationConfigMixin | None = None,
    pmod: dict[str, Any] | None = None,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A model in eval mode and its processor.

    Args:
        path: Folder of a stock LLaVA or a p-MoD checkpoint, as `resolve` finds it.
        dtype: `auto` (as stored), `bfloat16`, `float16` or `float32`.
        attn_implementation: `sdpa`, `eager` or `flash_attention_2`.
        quantization: How weights are held in fewer bits; transformers then places the model itself.
        pmod: Settings of a method without routers, under which the weights of a stock LLaVA are loaded as they are.

    Raises:
        PmodError: files or tensors are missing, or tensors have another shape than the config says.
    """
    path = Path(path)
    refuse_bytes(path)
    if missing := missing_files(path):
        raise PmodError(f"{path} lacks {', '.join(missing)}", hint="name another model with `model`")
    layout = layout_of(read_json(path / CONFIG))
    if (layout is not None and not layout.loads) or not shard_names(path)[0].endswith(".safetensors"):
        raise PmodError(
            f"{path} is in a layout that has to be converted first", hint=f"pmod convert {quote(str(path))}"
        )

    from transformers import AutoModelForImageTextToText

    import pmod_cli.model.modeling  # noqa: F401 - registers the p-MoD classes

    read_config(path)  # first, since the processor's classes would warn of what it refuses
    processor = load_processor(path)  # before the weights, which take longer
    try:
        model, info = AutoModelForImageTextToText.from_pretrained(
            path,
            config=None if pmod is None else _routed_config(path, pmod),
            dtype=dtype,
            attn_implementation=attn_implementation,
            output_loading_info=True,
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are told by name below
            quantization_config=quantization,
        )
    except (ValueError, ImportError) as error:
        raise PmodError(f"{path} cannot be loaded: {first_line(error)}") from error
    _refuse_differences(path, info)
    return (model if quantization else model.to(device)).eval(), processor


def _routed_config(path: Path, pmod: dict[str, Any]) -> PreTrainedConfig:
    """The p-MoD configuration of a stock checkpoint under these settings."""
    from transformers import AutoConfig

    from pmod_cli.model.configuration import CONFIGS

    stock = AutoConfig.from_pretrained(path, local_files_only=True)
    values = {name: value for name, value in stock.to_dict().items() if name not in ("model_type", "architectures")}
    config_class: Any = CONFIGS[stock.model_type]
    return config_class.from_dict(values | {"pmod": pmod})


def read_config(path: Path) -> PreTrainedConfig:
    """The configuration of a checkpoint, stock or p-MoD.

    Raises:
        PmodError: it is damaged, or holds a setting that nothing here knows.
    """
    from transformers import AutoConfig

    import pmod_cli.model.modeling  # noqa: F401 - registers the p-MoD classes

    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except ValueError as error:
        raise PmodError(
            f"{path / CONFIG}: {first_line(error)}", hint="if a package adds what is unknown here, install it"
        ) from error


def stored_dtype(path: Path) -> str:
    """What ``dtype="auto"`` stands for: the dtype that config.json names, else that of the first weights in the files.

    Raises:
        PmodError: the files lack config.json or weights.
    """
    if (named := read_config(path).dtype) is not None:
        return str(named).removeprefix("torch.")
    found = (TORCH_NAMES.get(tensor.dtype, "") for tensor in read_tensors(path).values())
    return next((dtype for dtype in found if "float" in dtype), "float32")


def load_processor(path: Path) -> ProcessorMixin:
    """The processor of a checkpoint: its tokenizer, its image processor and its chat template.

    Raises:
        PmodError: one of its files is missing or damaged, or it makes other pictures than the vision tower takes, or
            marks them by another token than the config.
    """
    refuse_bytes(path)
    from transformers import AutoImageProcessor, AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(path, local_files_only=True)
        if not type(getattr(processor, "image_processor", None)).__name__.endswith(("Pil", "NoneType")):
            # Pillow's, so that what a picture becomes does not depend on whether torchvision is installed.
            processor.image_processor = AutoImageProcessor.from_pretrained(path, local_files_only=True, backend="pil")
    except Exception as error:  # on a damaged file tokenizers raises a plain Exception, transformers nearly anything
        raise PmodError(
            f"the tokenizer or the image processor in {path} cannot be loaded: {type(error).__name__}: "
            f"{first_line(error):.300}",
            hint="this family's processor needs it, also for still images: pip install torchvision"
            if isinstance(error, ImportError) and "torchvision" in str(error).lower()
            else "fetch or convert the checkpoint again",
        ) from error
    config = read_json(path / CONFIG)
    _complete(processor, config)
    check_processor(processor, config, path)
    return processor


def _complete(processor: ProcessorMixin, config: dict[str, Any]) -> None:
    """Tell a processor from before transformers 4.46 what it counts image tokens by: then the model put them in."""
    family = family_of(config.get("model_type"))
    if family is not None and family.tiled and getattr(processor, "patch_size", 0) is None:
        vision = config.get("vision_config") or {}
        kind, strategy = tower_kind(vision, family), "vision_feature_select_strategy"
        processor.patch_size = filled(vision, kind.defaults)["patch_size"]
        processor.vision_feature_select_strategy = config.get(strategy, family.defaults.get(strategy))
        processor.num_additional_image_tokens = int(kind.class_token)


def refuse_bytes(path: Path) -> None:
    """Raises PmodError at a path that is no UTF-8: transformers and safetensors can neither read nor write there."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise PmodError(
            f"the path {path} is no UTF-8, and transformers cannot read or write there",
            hint="rename it, or name it by a symbolic link",
        ) from None


def _refuse_differences(path: Path, info: dict) -> None:
    """Transformers starts absent tensors at random and goes on; a router without a layer would be dropped silently."""
    mismatched = [entry[0] if isinstance(entry, tuple) else entry for entry in info["mismatched_keys"]]
    extra = [name for name in info["unexpected_keys"] if ".router." in name]
    for names, meaning in (
        (sorted(info["missing_keys"]), "lacks"),
        (sorted(mismatched), "has, in another shape than its config says,"),
        (sorted(extra), "has, on layers that its config calls plain,"),
    ):
        if names:
            raise PmodError(
                f"{path} {meaning} {len(names)} tensors: {', '.join(names[:10])}", hint="convert or fetch it again"
            )


MOST_SEEN = 25_000_000  # pixels of all tiles of an image: 221 tiles of 336 x 336; the published models take at most 5
HINT = "take processor_config.json or preprocessor_config.json from the checkpoint it was made from"


def check_processor(processor: ProcessorMixin, config: dict[str, Any], path: Path) -> None:
    """Hold a loaded processor to the config of its checkpoint.

    Raises:
        PmodError: it makes other pictures than the vision tower of the config takes, or marks them by another token.
    """
    images, tower = getattr(processor, "image_processor", None), config.get("vision_config") or {}
    if images is None or getattr(processor, "tokenizer", None) is None:
        raise PmodError(f"{path} has no image processor or no tokenizer beside its config", hint=HINT)
    token = getattr(processor, "image_token_id", None)
    expected = config.get("image_token_index", config.get("image_token_id"))
    if None not in (token, expected) and token != expected:
        _refuse(path, f"image token {token} in its tokenizer", f"{expected}, the image token of its config")
    side, patch = tower.get("image_size"), tower.get("patch_size")
    if hasattr(images, "merge_size"):
        _check_cells(images, tower, path)
        return
    for what, length, is_result in _lengths(images):
        if type(length) is not int or not 0 < length**2 <= MOST_SEEN:
            _refuse(path, f"{what} {length!r:.40} in its processor", f"at most {MOST_SEEN / 1e6:.0f} megapixels")
        if is_result and type(side) is int and length != side:
            _refuse(path, f"{what} {length} in its processor", f"{side}, the image_size of its vision_config")
    cut = getattr(processor, "patch_size", None)
    if cut is not None and (type(cut) is not int or cut < 1 or (type(patch) is int and cut != patch)):
        _refuse(path, f"patch_size {cut!r:.40} in its processor", f"patch_size {patch} in its vision_config")
    _check_grid(getattr(images, "image_grid_pinpoints", None), config.get("image_grid_pinpoints"), path)


def _check_cells(images: Any, tower: dict[str, Any], path: Path) -> None:
    """Of a processor that cuts a picture of any size into cells: the size of a cell, and how many pixels it makes."""
    for ours, key in (("patch_size", "patch_size"), ("merge_size", "spatial_merge_size")):
        given, expected = getattr(images, ours, None), tower.get(key)
        if type(given) is not int or given < 1 or (expected is not None and given != expected):
            _refuse(path, f"{ours} {given!r:.40} in its processor", f"{expected}, the {key} of its vision_config")
    size = dict(getattr(images, "size", None) or {})
    least, most = size.get("shortest_edge"), size.get("longest_edge")
    if type(least) is not int or type(most) is not int or not 0 < least <= most <= MOST_SEEN:
        _refuse(
            path,
            f"a size of {least!r:.20} to {most!r:.20} pixels in its processor",
            f"two rising numbers of at most {MOST_SEEN:,}",
        )


def _check_grid(pinpoints: Any, of_config: Any, path: Path) -> None:
    if pinpoints is None:
        return
    pairs = [list(pair) if isinstance(pair, list | tuple) else pair for pair in pinpoints]
    for pair in pairs:
        if not is_pinpoint(pair) or pair[0] * pair[1] > MOST_SEEN:
            limit = f"height and width of at most {MOST_SEEN / 1e6:.0f} megapixels"
            _refuse(path, f"{pair!r:.60} in image_grid_pinpoints of its processor", limit)
    if of_config is not None and pairs != [list(pair) for pair in of_config]:
        _refuse(path, "other image_grid_pinpoints in its processor", "those of its config")


def _lengths(images: Any) -> Iterator[tuple[str, Any, bool]]:
    """What the image processor is set to: which setting, pixels, and whether the tower is given as many."""
    size, crop = dict(getattr(images, "size", None) or {}), dict(getattr(images, "crop_size", None) or {})
    crops = bool(crop) and (getattr(images, "do_center_crop", False) or hasattr(images, "image_grid_pinpoints"))
    for what, lengths, is_result in (("size", size, not crops), ("crop_size", crop, crops)):
        for name in ("height", "width", "shortest_edge"):
            if lengths.get(name) is not None:
                yield what, lengths[name], is_result and name != "shortest_edge"


def _refuse(path: Path, found: str, expected: str) -> None:
    raise PmodError(f"{path} has {found}; expected {expected}", hint=HINT)
