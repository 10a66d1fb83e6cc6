"""The CLIP vision tower that an original checkpoint holds or only names."""

from __future__ import annotations

from pathlib import Path

from pmod_cli.checkpoints import files
from pmod_cli.core.errors import PmodError
from pmod_cli.families.towers import CLIP_L_336

KNOWN = {"openai/clip-vit-large-patch14-336": CLIP_L_336}
_KEPT = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "image_size",
    "patch_size",
    "projection_dim",
    "hidden_act",
    "layer_norm_eps",
)


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
    for place in (Path(name).expanduser(), folder / name, folder.parent / name):
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
    return {"model_type": "clip_vision_model"} | {key: config[key] for key in _KEPT if config.get(key) is not None}


def tower_names(tensors: dict[str, files.Tensor]) -> dict[str, files.Tensor]:
    """The tower's tensors by their names in the Hugging Face layout of LLaVA; a CLIP's text half is left out."""
    if any(name.startswith("vision_model.") for name in tensors):
        tensors = {name: tensor for name, tensor in tensors.items() if name.startswith("vision_model.")}
    return {f"vision_tower.{name}": tensor for name, tensor in tensors.items()}


def preprocessor(place: Path | None) -> dict:
    """preprocessor_config.json of the tower, or nothing: the values of every OpenAI CLIP are the defaults."""
    path = place / "preprocessor_config.json" if place else None
    return files.read_json(path) if path and path.is_file() else {}
