"""The layout of the published p-MoD code: the original one with `mod_*` fields, and layers that wrap the stock ones.

Its config.json is flat: decoder, `mm_*` and `mod_*` fields side by side.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pmod_cli.checkpoints import files
from pmod_cli.checkpoints.layout import Draft, Layout, Progress, Source, TensorSource
from pmod_cli.checkpoints.layouts import published_settings
from pmod_cli.checkpoints.layouts.original import EMBEDDINGS, KNOWN, is_original, read_original
from pmod_cli.checkpoints.layouts.shapes import HEAD, canonical, to_original
from pmod_cli.checkpoints.tokenizer_files import MODEL_FILE, clip_preprocessor, restore_original
from pmod_cli.checkpoints.writing import WeightFiles, stream
from pmod_cli.core.atomic import write_json
from pmod_cli.core.errors import PmodError
from pmod_cli.families import FAMILIES
from pmod_cli.families.configs import filled
from pmod_cli.families.decoders import LLAMA
from pmod_cli.families.towers import CLIP, CLIP_L_336
from pmod_cli.model import PmodSettings

TOWER_FOLDER = "vision_tower"
NO_MODEL_FILE = f"there is no {MODEL_FILE}, and the published code reads no other tokenizer: put it beside config.json"
TOWER = "openai/clip-vit-large-patch14-336"
_TEXT = {key: value for key, value in LLAMA.defaults.items() if value is not None} | {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.02,
    "pretraining_tp": 1,
    "use_cache": True,
}


def _arrange(draft: Draft) -> Draft:
    """Names, config and rows of the published code; the tower apart where it cannot be named."""
    rows, config = published_config(draft.source, draft.settings, draft.config)
    tower = own_tower(draft.source, draft.parts, config)
    routed = draft.routed_layers
    return replace(
        draft,
        config=config,
        parts={to_original(name, routed): _resized(name, part, rows) for name, part in draft.parts.items()},
        routers={to_original(name, routed): shape for name, shape in draft.routers.items()},
        tower=tower,
    )


def _finish(draft: Draft, folder: Path, progress: Progress) -> list[str]:
    """The tower as a CLIP of its own, with its preprocessor, and the tokenizer as it was before images."""
    if draft.tower:
        tower, vision = folder / TOWER_FOLDER, filled(draft.source.config["vision_config"], CLIP.defaults)
        tower.mkdir()
        write_json(tower / files.CONFIG, {"architectures": ["CLIPVisionModel"], **vision})
        write_json(tower / "preprocessor_config.json", clip_preprocessor(folder, vision["image_size"]))
        stream(WeightFiles(streamed={files.SINGLE: draft.tower}), tower, progress)
    restore_original(folder, draft.config["vocab_size"])
    return [] if (folder / MODEL_FILE).is_file() else [NO_MODEL_FILE]


def _resized(name: str, part: TensorSource, rows: int | None) -> TensorSource:
    if rows is None or canonical(name) not in EMBEDDINGS:
        return part
    return replace(part, rows=None if part.source.shape[0] == rows else rows)


def published_config(source: Source, settings: PmodSettings, config: dict) -> tuple[int | None, dict]:
    """(rows of the embedding, or None to keep them; config.json).

    A checkpoint that came from this layout gets back the config and the rows that it came with.

    Raises:
        PmodError: the published code cannot run this model.
    """
    family = FAMILIES[source.kind]
    config, vision = filled(config, family.defaults), filled(config["vision_config"], CLIP.defaults)
    text = filled(config["text_config"], _TEXT)
    if source.decoder != LLAMA.name:
        raise PmodError(f"`to=published`: the published code has Llama decoders only, this one is {source.decoder}")
    if vision.get("model_type", CLIP.name) != CLIP.name:
        raise PmodError("`to=published`: the published code has CLIP towers only")
    fields = published_settings.write_settings(settings, text["num_hidden_layers"])
    if source.original_config is not None:
        kept = {key: value for key, value in source.original_config.items() if not key.startswith("mod_")}
        named = {"model_type": published_settings.MODEL_TYPE, "architectures": [published_settings.ARCHITECTURE]}
        dtype = {"torch_dtype": config["dtype"]} if "torch_dtype" in kept else {}
        return kept["vocab_size"], dict(sorted((kept | fields | dtype | named).items()))
    rows = _rows_before_images(text["vocab_size"], config.get("image_token_index"))
    flat = {key: text[key] for key in _TEXT}
    rope = text.get("rope_parameters") or {}
    scaling = text.get("rope_scaling") or {k: v for k, v in rope.items() if k != "rope_theta"}
    if scaling.get("rope_type", scaling.get("type", "default")) != "default":
        flat["rope_scaling"] = scaling
    next_model = family.high_resolution
    flat |= {
        "architectures": [published_settings.ARCHITECTURE],
        "model_type": published_settings.MODEL_TYPE,
        "vocab_size": rows or text["vocab_size"],
        "num_key_value_heads": text.get("num_key_value_heads") or flat["num_attention_heads"],
        "rope_theta": text.get("rope_theta") or rope.get("rope_theta") or 10000.0,
        "pad_token_id": 0,
        "tie_word_embeddings": HEAD not in map(canonical, source.parts),
        "torch_dtype": config.get("dtype") or config.get("torch_dtype") or "float32",
        "image_aspect_ratio": "anyres" if next_model else "pad",
        "mm_hidden_size": vision["hidden_size"],
        "mm_patch_merge_type": "spatial_unpad" if next_model else "flat",
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "cls_patch" if config.get("vision_feature_select_strategy") == "full" else "patch",
        "mm_vision_select_layer": config.get("vision_feature_layer", -2),
        "mm_vision_tower": TOWER,
        "tune_mm_mlp_adapter": False,
        "unfreeze_mm_vision_tower": True,
        "use_mm_proj": True,
        **fields,
    }
    if next_model:
        flat["image_grid_pinpoints"] = [[width, height] for height, width in config["image_grid_pinpoints"]]
    return rows, dict(sorted(flat.items()))


def _rows_before_images(rows: int, image: object) -> int | None:
    """Rows without the image token and the padding behind it, which the published code has not; None: all of them."""
    return image if isinstance(image, int) and 0 < rows - image <= 64 and image > rows // 2 else None


def own_tower(source: Source, parts: dict[str, TensorSource], config: dict) -> dict[str, TensorSource]:
    """Tensors of the tower by the names of a CLIP, to be written beside the published config, which only names it.

    None of them where the name is a hub id: then the published code fetches the tower itself. Else config names the
    folder.

    Args:
        parts: Tensors of the result by their names in the Hugging Face layout.
        config: As `published_config` made it.
    """
    name = config["mm_vision_tower"]
    vision = filled(source.config["vision_config"], CLIP.defaults)
    sizes = {key: vision.get(key) for key in CLIP_L_336}
    if "/" in name and not (name in KNOWN and sizes != KNOWN[name]):
        return {}
    config["mm_vision_tower"] = TOWER_FOLDER
    prefix = "vision_tower."
    names = {canonical(name): part for name, part in parts.items()}
    return {
        f"vision_model.{name.removeprefix(prefix)}": part for name, part in names.items() if name.startswith(prefix)
    }


PUBLISHED = Layout(
    "published",
    recognises=lambda config, options: is_original(config) and config["model_type"] == published_settings.MODEL_TYPE,
    read=read_original,
    takes=("vision_tower", "tokenizer"),
    arrange=_arrange,
    finish=_finish,
    loads=False,
    summary="for the authors' code",
    usage="""\
In the layout of the published code (MCG-NJU/p-MoD): its `load_pretrained_model` reads it. `mm_vision_tower` in
config.json names the vision tower: a hub id, or the folder `vision_tower` here; then start the program in this folder.
""",
)
