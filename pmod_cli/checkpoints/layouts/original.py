"""The layout of the original LLaVA code (liuhaotian, lmms-lab), and of the published p-MoD code, which extends it.

Such a checkpoint holds its CLIP vision tower, or only names it.
"""

from __future__ import annotations

import ast
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pmod_cli.checkpoints import files
from pmod_cli.checkpoints.layout import Layout, Options, Source, TensorSource, files_of
from pmod_cli.checkpoints.layouts import published_settings
from pmod_cli.checkpoints.layouts.huggingface import check_decoder
from pmod_cli.checkpoints.layouts.shapes import OBSOLETE, check_shapes, from_original, size
from pmod_cli.checkpoints.tokenizer_files import holds_tokenizer, read_vocabulary, write_processor_files
from pmod_cli.core.errors import PmodError
from pmod_cli.core.paths import expanded
from pmod_cli.families import DECODERS, FAMILIES
from pmod_cli.families.llava import LLAVA
from pmod_cli.families.llava_next import LLAVA_NEXT
from pmod_cli.families.towers import CLIP_L_336

_TEXT = (
    "attention_bias",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "max_window_layers",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "tie_word_embeddings",
    "use_sliding_window",
    "vocab_size",
)
KNOWN = {"openai/clip-vit-large-patch14-336": CLIP_L_336}
_TOWER = (*CLIP_L_336, "num_channels", "hidden_act", "layer_norm_eps")  # what is kept of a tower's own config
EMBEDDINGS = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")


def original_types() -> dict[str, str]:
    """`model_type` of this layout, and the decoder that each of them has."""
    found = {name: decoder.name for decoder in DECODERS.values() for name in decoder.original}
    return found | {published_settings.MODEL_TYPE: "llama"}


def is_original(config: dict) -> bool:
    """Whether a config.json is of this layout: `llava` is both layouts' name, and only one of them has sections."""
    kind = config.get("model_type")
    return kind in list(original_types()) and "text_config" not in config and "mm_vision_tower" in config


def read_original(folder: Path, config: dict, options: Options) -> Source:
    """A checkpoint of the original or the published layout.

    Args:
        options: Tower and tokenizer, where the checkpoint's own are not to be used; and whether there is a network.

    Raises:
        PmodError: it is damaged, not whole, or has what the Hugging Face layout cannot hold.
    """
    tensors = files.read_tensors(folder)
    return from_flat(folder, config, tensors, files_of(tensors), options, layout="original")


def from_flat(
    folder: Path,
    config: dict,
    tensors: dict[str, files.Tensor],
    read: dict[Path, set[str]],
    options: Options,
    *,
    layout: str,
) -> Source:
    """A checkpoint in the words of the original code, as one in the Hugging Face layout.

    Args:
        config: Flat: decoder and `mm_*` fields side by side.
        tensors: By name in the original layout.
        read: Names by file, as they are there.
        layout: What to call it.
    """
    where = folder / files.CONFIG
    stock = {"text_config": _text_config(config, where), **_image_config(config, where)}
    check_decoder(stock | {"quantization_config": config.get("quantization_config")}, where)
    found = {from_original(name): tensor for name, tensor in tensors.items()}
    tower_name = options.vision_tower or config.get("mm_vision_tower")
    inside = any(name.startswith("vision_tower.") for name in found)
    place = find_tower(tower_name, folder, weights=not inside, offline=options.offline)
    stock["vision_config"] = tower_config(str(tower_name), place)
    tower = files.read_tensors(place) if place and not inside else {}
    dtype = next((tensor.dtype for name, tensor in found.items() if name.endswith("norm.weight")), None)
    parts = {name: TensorSource(tensor) for name, tensor in found.items()}
    if layout == "parts":
        parts = {n: p if n.startswith("language_model.") else replace(p, dtype=dtype) for n, p in parts.items()}
    # A tower from elsewhere is stored wider as a rule; the original code casts it when it loads it.
    parts |= {name: TensorSource(tensor, dtype=dtype) for name, tensor in tower_names(tower).items()}
    parts = {name: part for name, part in parts.items() if not OBSOLETE.fullmatch(name)}

    settings = None
    if config["model_type"] == published_settings.MODEL_TYPE and config.get("mod_target_layers") is not None:
        settings = published_settings.read_settings(config, size(config, "num_hidden_layers", where), where)
    elif any(".router." in name for name in parts):
        raise PmodError(f"{where}: mod_target_layers is absent, though the weights hold routers")
    pixels = preprocessor(place)
    source = _whole(folder, stock, parts, config, tokenizer=options.tokenizer, pixels=pixels)
    return replace(
        source,
        files=read | files_of(tower),
        layout="published" if settings else layout,
        settings=settings,
        router_state="stock" if settings is None else _router_state(parts),
        original_config=config if layout == "original" else None,
    )


def _router_state(parts: dict[str, TensorSource]) -> str:
    """The layout does not say it: routers that are all zero, as `convert` makes them, are not trained."""
    routers = [part.source for name, part in parts.items() if ".router." in name]
    return "untrained" if all(map(files.is_zero, routers)) else "trained"


def _whole(
    folder: Path, stock: dict, parts: dict[str, TensorSource], config: dict, *, tokenizer: Path | None, pixels: dict
) -> Source:
    """The parts as one model: vocabulary, feature sizes and checks."""
    where = folder / files.CONFIG
    rows = size(config, "vocab_size", where)
    # Hold the tensors to the source's own config first: a damaged embedding must not be mended by the new rows.
    check_shapes({name: part.source for name, part in parts.items()}, stock, where)
    if tokenizer is not None and not holds_tokenizer(tokenizer):
        raise PmodError(f"there is no tokenizer in {tokenizer}", hint="`tokenizer` takes the folder of one")
    vocabulary = read_vocabulary(tokenizer or folder, rows)
    if vocabulary.rows != rows:
        parts = {
            n: TensorSource(part.source, rows=vocabulary.rows) if n in EMBEDDINGS else part for n, part in parts.items()
        }
    vision = stock["vision_config"]
    stock["text_config"] |= {"vocab_size": vocabulary.rows, "pad_token_id": vocabulary.pad_token}
    if vocabulary.pad_token is None:
        stock["text_config"]["pad_token_id"] = config.get("pad_token_id")
    stock |= {
        "architectures": [FAMILIES[stock["model_type"]].stock_class],
        "image_token_index": vocabulary.image_token,
        "image_seq_length": (vision["image_size"] // vision["patch_size"]) ** 2,
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": bool(config.get("tie_word_embeddings")),
        "dtype": files.TORCH_NAMES[
            next(part for name, part in parts.items() if name.endswith("norm.weight")).source.dtype
        ],
    }
    notes = []
    if vocabulary.tokenizer is None:
        notes.append(
            f"{folder} holds no tokenizer, so none is written: add one, or convert again with the folder of one"
        )
    square = config.get("image_aspect_ratio") == "pad"
    generation = folder / "generation_config.json"
    files.refuse_outside(folder, generation)
    return Source(
        folder=folder,
        layout="original",
        config=stock,
        parts=parts,
        files={},
        small_files=[generation] if generation.is_file() else [],
        write_processor=partial(
            write_processor_files, vocabulary=vocabulary, config=stock, pixels=pixels, pad_to_square=square
        ),
        notes=notes,
    )


def _text_config(config: dict, where: Path) -> dict:
    text = {key: config[key] for key in _TEXT if key in config}
    decoder = DECODERS[original_types()[config["model_type"]]]
    if decoder.window_key is None:
        text.pop("sliding_window", None)
    elif decoder.sliding_window and decoder.window_key == "sliding_window":
        text.setdefault("sliding_window", None)  # the original code attends to everything
    for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size"):
        size(config, key, where)
    return {"model_type": decoder.name, **text}


def _image_config(config: dict, where: Path) -> dict:
    """What the config says about images, in the words of the Hugging Face layout."""
    projector = config.get("mm_projector_type", "linear")
    if projector != "mlp2x_gelu":
        raise PmodError(
            f"{where}: mm_projector_type is {projector!r}, expected 'mlp2x_gelu', the one of LLaVA-1.5 and NeXT"
        )
    if config.get("mm_use_im_start_end"):
        raise PmodError(f"{where}: mm_use_im_start_end is true; start and end tokens of images are not supported")
    if config.get("max_num_patches") is not None:
        raise PmodError(
            f"{where}: max_num_patches is {config['max_num_patches']!r:.60}: the original code then scales "
            "the features of large images down to so many tiles (anyres_max), which the Hugging Face layout cannot say"
        )
    strategies = {"patch": "default", "cls_patch": "full"}
    feature = config.get("mm_vision_select_feature", "patch")
    if not isinstance(feature, str) or feature not in strategies:
        raise PmodError(f"{where}: mm_vision_select_feature is {feature!r}, expected 'patch' or 'cls_patch'")
    layer = config.get("mm_vision_select_layer", -2)
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise PmodError(f"{where}: mm_vision_select_layer is {layer!r}, expected a whole number such as -2")
    common = {"vision_feature_layer": layer, "vision_feature_select_strategy": strategies[feature]}
    merge, ratio = config.get("mm_patch_merge_type") or "flat", config.get("image_aspect_ratio") or "square"
    if merge == "spatial_unpad" and ratio == "anyres":
        if feature == "cls_patch":
            raise PmodError(
                f"{where}: mm_vision_select_feature is 'cls_patch' with anyres images: a tile with a class token is no "
                "grid, and LLaVA itself cannot put tiles together so"
            )
        points = _pinpoints(config.get("image_grid_pinpoints"), where)
        return {"model_type": LLAVA_NEXT.name, "image_grid_pinpoints": points, **common}
    if merge == "flat" and ratio in ("pad", "square"):
        return {"model_type": LLAVA.name, **common}
    raise PmodError(
        f"{where}: image_aspect_ratio {ratio!r} with mm_patch_merge_type {merge!r}; expected 'pad' with 'flat' "
        "(LLaVA-1.5) or 'anyres' with 'spatial_unpad' (LLaVA-NeXT)"
    )


def _pinpoints(value: object, where: Path) -> list[list[int]]:
    """(height, width) in pixels; the original code writes (width, height), at times as a string."""
    try:
        pairs: Any = ast.literal_eval(value) if isinstance(value, str) else value
        points = [[int(height), int(width)] for width, height in pairs]
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        points = []
    if not points or min(map(min, points)) < 1:
        raise PmodError(
            f"{where}: image_grid_pinpoints is {str(value)[:80]!r}, expected pairs of width and height in pixels"
        )
    return points


def find_tower(name: object, folder: Path, *, weights: bool, offline: bool) -> Path | None:
    """Folder of a tower; None where only its configuration is wanted and it is a well-known one.

    Args:
        name: Folder, also relative to the checkpoint or beside it, or hub id.
        weights: Whether its weights are wanted too.

    Raises:
        PmodError: there is none.
    """
    if not isinstance(name, str) or not name or not name.isprintable():
        raise PmodError(f"{folder / files.CONFIG}: mm_vision_tower is {name!r}, expected a folder or hub id")
    for place in (expanded(name), folder / name, folder.parent / name):
        if (place / files.CONFIG).is_file():
            return place
    if name in KNOWN and not weights:
        return None
    from pmod_cli.checkpoints.resolve import resolve

    try:
        return resolve(name, weights=weights, offline=offline).path
    except PmodError as error:
        raise PmodError(
            f"the vision tower {name}, which {folder} {'needs' if weights else 'names'}, is not here: {error.what}",
            hint="give its folder with `vision_tower`",
        ) from error


def tower_config(name: str, place: Path | None) -> dict:
    """`vision_config` of a CLIP tower.

    Raises:
        PmodError: it is no CLIP.
    """
    if place is None:
        return {"model_type": "clip_vision_model", **KNOWN[name]}
    where = place / files.CONFIG
    config = files.read_json(where)
    if config.get("model_type") == "clip" and isinstance(config.get("vision_config"), dict):
        config = config["vision_config"] | {"model_type": "clip_vision_model"}
    if config.get("model_type") != "clip_vision_model":
        raise PmodError(f"{where}: model_type is {config.get('model_type')!r}, expected a CLIP vision tower")
    return {"model_type": "clip_vision_model"} | {key: config[key] for key in _TOWER if config.get(key) is not None}


def tower_names(tensors: dict[str, files.Tensor]) -> dict[str, files.Tensor]:
    """The tower's tensors by their names in the Hugging Face layout of LLaVA; a CLIP's text half is left out."""
    if any(name.startswith("vision_model.") for name in tensors):
        tensors = {name: tensor for name, tensor in tensors.items() if name.startswith("vision_model.")}
    return {f"vision_tower.{name}": tensor for name, tensor in tensors.items()}


def preprocessor(place: Path | None) -> dict:
    """preprocessor_config.json of the tower, or nothing: the values of every OpenAI CLIP are the defaults."""
    path = place / "preprocessor_config.json" if place else None
    return files.read_json(path) if path and path.is_file() else {}


ORIGINAL = Layout(
    "original",
    recognises=lambda config, options: is_original(config),
    read=read_original,
    model_types=lambda: list(original_types()),
    takes=("vision_tower", "tokenizer"),
    loads=False,
)
