"""The layouts that are read, each into a `Source`: Hugging Face (stock and ours), original, published, parts."""

from __future__ import annotations

from pathlib import Path

from pmod_cli.checkpoints.files import CONFIG, read_json
from pmod_cli.checkpoints.layouts.huggingface import read_huggingface
from pmod_cli.checkpoints.layouts.normal import LowRank, Part, Source
from pmod_cli.checkpoints.layouts.original import is_original, original_types, read_original
from pmod_cli.checkpoints.layouts.parts import read_parts
from pmod_cli.checkpoints.options import Options
from pmod_cli.core.errors import PmodError
from pmod_cli.families import DECODERS, FAMILIES, family_of, model_types

__all__ = ["LowRank", "Part", "Source", "read_source"]


def read_source(folder: Path, options: Options | None = None) -> Source:
    """A checkpoint of any layout, checked as far as config and headers go.

    Args:
        folder: Where it is.
        options: For the original layout: its tower and tokenizer, where the checkpoint has none.

    Raises:
        PmodError: it is of no known layout, damaged, or not whole.
    """
    options = options or Options()
    where = folder / CONFIG
    config = read_json(where)
    if options.projector is not None:
        return read_parts(folder, config, options)
    if is_original(config):
        return read_original(folder, config, options)
    model_type = config.get("model_type")
    if family_of(model_type) is not None:
        for name in ("vision_tower", "tokenizer"):
            if getattr(options, name) is not None:
                raise PmodError(
                    f"{where}: a checkpoint with its own {name.replace('_', ' ')}: `{name}` is for the original layout",
                    hint=f"leave `{name}` out",
                )
        return read_huggingface(folder, config)
    if model_type in list(original_types()):
        raise PmodError(f"{where}: mm_vision_tower is absent, so this is a language model without its vision part")
    if model_type in DECODERS:
        raise PmodError(
            f"{where}: this is a language model without a vision part",
            hint="pmod convert --llm NAME --vision-tower NAME --projector mm_projector.bin",
        )
    known = [*model_types(), *(name for name in original_types() if name not in FAMILIES)]
    raise PmodError(f"{where}: model_type is {model_type!r}, expected one of {', '.join(known)}")
