"""A selection as one `.npz` file: read back without the model, and by anyone who has NumPy.

Arrays: `kept` bool (L, V), `weight` float32 (L, V), `routed` (L,), `retention` (L,), `boxes_px` float64 (V, 4) with NaN
for tokens without a place, `image` uint8 (H, W, 3); of each part of the layout `<part>.tokens`, `.row_spans`,
`.column_spans`, `.newlines` (see geometry.Part); and `about`, a JSON text with everything else.
"""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from pmod_cli.core.errors import PmodError
from pmod_cli.visualization.geometry import Layout, Part
from pmod_cli.visualization.record import SelectionRecord

FORMAT = 1
PER_TOKEN = ("kept", "weight")
PER_LAYER = ("routed", "retention")
GRIDS = ("tokens", "row_spans", "column_spans", "newlines")
WORDS = ("question", "answer", "router_state", "model", "chosen_by", "notes", "regions")


def save_npz(record: SelectionRecord, path: Path) -> None:
    """Write the record; an existing file is replaced at once or not at all."""
    from pmod_cli.core.atomic import write_bytes

    write_bytes(path, npz_bytes(record))


def npz_bytes(record: SelectionRecord) -> bytes:
    """The file's content."""
    about = {word: getattr(record, word) for word in WORDS}
    about |= {"format": FORMAT, "tile_grid": record.layout.tile_grid, "parts": [p.name for p in record.layout.parts]}
    arrays = {name: getattr(record, name) for name in PER_TOKEN + PER_LAYER}
    arrays |= {f"{p.name}.{grid}": getattr(p, grid) for p in record.layout.parts for grid in GRIDS}
    arrays |= {
        "boxes_px": record.layout.boxes(),
        "image": np.asarray(record.image),
        "about": np.array(json.dumps(about)),
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def load_npz(path: Path) -> SelectionRecord:
    """Read what `save_npz` wrote. Pickled objects are refused.

    Raises:
        PmodError: no such file, not one of ours, or arrays that do not fit each other.
    """
    if not path.is_file():
        raise PmodError(f"{path}: no such selection file", hint="pmod visualize IMAGE --npz writes one")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            record = _read(arrays)
    except (KeyError, ValueError, OSError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise PmodError(
            f"{path} is not a selection that pmod wrote, or is damaged ({error})",
            hint="pmod visualize IMAGE --npz writes one",
        ) from error
    return record


def _read(arrays: np.lib.npyio.NpzFile) -> SelectionRecord:
    about = json.loads(str(arrays["about"]))
    if about["format"] != FORMAT:
        raise ValueError(f"format {about['format']}, expected {FORMAT}")
    image = arrays["image"]
    parts = tuple(Part(name, *(arrays[f"{name}.{grid}"] for grid in GRIDS)) for name in about["parts"])
    layout = Layout(image.shape[1], image.shape[0], parts, about["tile_grid"] and tuple(about["tile_grid"]))
    fields = {name: arrays[name] for name in PER_TOKEN + PER_LAYER}
    num_layers = len(fields["kept"])
    shapes = {name: fields[name].shape for name in fields}
    expected = dict.fromkeys(PER_TOKEN, (num_layers, layout.size)) | dict.fromkeys(PER_LAYER, (num_layers,))
    if shapes != expected:
        raise ValueError(f"shapes {shapes}, expected {expected}")
    words = {word: about[word] for word in WORDS}
    words |= {"notes": tuple(about["notes"]), "regions": tuple(tuple(region) for region in about["regions"])}
    return SelectionRecord(image=Image.fromarray(image), layout=layout, **fields, **words)
