"""A base language model, a CLIP tower and a pretrained projector: what the paper's training starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pmod_cli.checkpoints import files
from pmod_cli.checkpoints.layout import Layout, Options, Source, files_of
from pmod_cli.checkpoints.layouts.original import from_flat
from pmod_cli.checkpoints.layouts.published import TOWER
from pmod_cli.checkpoints.layouts.shapes import size
from pmod_cli.core.errors import PmodError
from pmod_cli.families import DECODERS
from pmod_cli.families.llava_next import PINPOINTS


def read_parts(folder: Path, config: dict, options: Options) -> Source:
    """A LLaVA put together from its parts.

    Args:
        folder: The language model, in the Hugging Face layout.
        options: `projector`, `vision_tower`, `anyres`.

    Raises:
        PmodError: a part is damaged or does not fit the others.
    """
    where = folder / files.CONFIG
    decoder = config.get("model_type")
    known = {kind.name: kind.original[0] for kind in DECODERS.values() if kind.original}
    if decoder not in list(known):
        raise PmodError(f"{where}: model_type is {decoder!r}, expected a language model: {', '.join(known)}")
    if any(key in config for key in ("vision_config", "mm_vision_tower")):
        raise PmodError(f"{where} is a LLaVA's already, expected a language model's", hint="leave out `projector`")
    assert options.projector is not None  # it is what makes a language model one of the parts
    tensors, projector = files.read_tensors(folder), files.read_file(options.projector)
    added = {}
    for name, tensor in projector.items():  # the original code's prefixes vary
        if "mm_projector." in name or name.endswith("image_newline"):
            added["model." + name.removeprefix("base_model.").removeprefix("model.").removeprefix("model.")] = tensor
    if not any("mm_projector." in name for name in added):
        found = ", ".join(sorted(projector)[:3]) or "nothing"
        raise PmodError(f"{options.projector} holds no mm_projector, found {found}")
    merge: dict[str, Any] = {"image_aspect_ratio": "pad"}
    if options.anyres:
        merge = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}
        merge["image_grid_pinpoints"] = PINPOINTS  # whose numbers this layout reads as (width, height)
        like = next(iter(tensors.values()))
        added.setdefault("model.image_newline", _new_newline(size(config, "hidden_size", where), like, options.seed))
    flat = config | {
        "model_type": known[decoder],
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_tower": options.vision_tower or TOWER,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        **merge,
    }
    return from_flat(folder, flat, tensors | added, files_of(tensors, projector), options, layout="parts")


def _new_newline(hidden: int, like: files.Tensor, seed: int) -> files.Tensor:
    """A row separator as the original code starts it: normal, with standard deviation 1 / sqrt(D)."""
    import torch

    values = torch.randn(hidden, generator=torch.Generator().manual_seed(seed)) * hidden**-0.5
    return files.Tensor(like.path, "F32", (hidden,), loaded=values)


PARTS = Layout(
    "parts",
    recognises=lambda config, options: options.projector is not None,
    read=read_parts,
    takes=("vision_tower", "tokenizer", "projector", "anyres"),
    loads=False,
)
