"""The layouts of checkpoints, one file each: how it is recognised, read into a `Source`, and written.

A package from outside adds one by `register_layout`, or by an entry point in the group `pmod_cli.layouts`.
"""

from __future__ import annotations

from pathlib import Path

from pmod_cli.checkpoints.files import CONFIG, read_json
from pmod_cli.checkpoints.layout import LAYOUTS, Draft, Layout, Options, Source, register_layout
from pmod_cli.checkpoints.layouts import from_parts, huggingface, original, published, remote_code
from pmod_cli.core.errors import PmodError
from pmod_cli.core.text import one_of
from pmod_cli.families import DECODERS
from pmod_cli.families.unsupported import why_not

for _layout in (
    huggingface.HUGGINGFACE,
    huggingface.PMOD,
    huggingface.STOCK,
    original.ORIGINAL,
    published.PUBLISHED,
    from_parts.PARTS,
    remote_code.REMOTE_CODE,
):
    register_layout(_layout)


def read_source(folder: Path, options: Options | None = None) -> Source:
    """A checkpoint of any layout, checked as far as config and headers go.

    Args:
        options: What is not in the folder, such as the tower and the tokenizer of an original checkpoint.

    Raises:
        PmodError: it is of no known layout, damaged, not whole, or has what an option names.
    """
    options = options or Options()
    where = folder / CONFIG
    config = read_json(where)
    layout = layout_of(config, options)
    if layout is None or (read := layout.read) is None:
        raise _unknown(config, where)
    for other in LAYOUTS.values():
        for name in other.takes:
            if name not in layout.takes and getattr(options, name) not in (None, False):
                takers = one_of(known.name for known in LAYOUTS.values() if name in known.takes)
                raise PmodError(
                    f"{where}: a checkpoint with its own {name.replace('_', ' ')}: `{name}` is for the layout {takers}",
                    hint=f"leave `{name}` out",
                )
    return read(folder, config, options)


def layout_of(config: dict, options: Options | None = None) -> Layout | None:
    """The layout of a config.json, or None where none recognises it.

    Args:
        options: Of a conversion: with a projector, a language model is one of the parts of a LLaVA.
    """
    options = options or Options()
    latest_first = reversed(LAYOUTS.values())
    return next((layout for layout in latest_first if layout.recognises and layout.recognises(config, options)), None)


def output_layouts() -> dict[str, Layout]:
    """The layouts that can be written, by name."""
    return {layout.name: layout for layout in LAYOUTS.values() if layout.arrange is not None}


def output_layout(name: str) -> Layout:
    """A layout that can be written.

    Raises:
        PmodError: there is none of this name.
    """
    known = output_layouts()
    if name not in known:
        raise PmodError(f"`to={name!r}`: expected one of {', '.join(known)}")
    return known[name]


def _unknown(config: dict, where: Path) -> PmodError:
    model_type = config.get("model_type")
    if model_type in list(original.original_types()):
        return PmodError(f"{where}: mm_vision_tower is absent, so this is a language model without its vision part")
    if model_type in DECODERS:
        return PmodError(
            f"{where}: this is a language model without a vision part",
            hint="pmod convert --llm NAME --vision-tower NAME --projector mm_projector.bin",
        )
    if reason := why_not(model_type):
        return PmodError(f"{where}: {reason}")
    known = dict.fromkeys(name for layout in LAYOUTS.values() for name in layout.model_types())
    return PmodError(f"{where}: model_type is {model_type!r}, expected one of {', '.join(known)}")
