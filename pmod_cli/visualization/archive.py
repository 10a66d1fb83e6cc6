"""A selection as one `.npz` file: read back without the model, and by anyone who has NumPy.

Arrays: `kept` bool (L, V), `weight` float32 (L, V), `routed` (L,), `retention` (L,), `boxes_px` float64 (V, 4) with NaN
for tokens without a place, `image` uint8 (H, W, 3); of each part of the layout `<part>.tokens`, `.row_spans`,
`.column_spans`, `.newlines` (see geometry.Part); and `about`, a JSON text with everything else.

A file may come from anybody, so an array is read only if its header promises a type, a shape and a size that a
selection can have; `checked.py` then holds the values to each other.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pmod_cli.core.errors import PmodError
from pmod_cli.core.images import MOST_PIXELS
from pmod_cli.families.geometry import Layout, Part
from pmod_cli.visualization.checked import check_selection, check_words, expect
from pmod_cli.visualization.record import ImageSelection

FORMAT = 1
PER_TOKEN = {"kept": np.bool_, "weight": np.float32}
PER_LAYER = {"routed": np.bool_, "retention": np.float64}
GRIDS = {"tokens": np.int64, "row_spans": np.float64, "column_spans": np.float64, "newlines": np.int64}
WORDS = ("question", "answer", "router_state", "model", "chosen_by", "notes", "regions")
MOST_BYTES = 1 << 26  # of one array but the image; the weights of a 7B selection of 2,928 tokens have 375 kB
MOST_TOKENS = 1 << 18
CHUNK = 1 << 20  # bytes
MOST_WORDS = 1 << 20  # characters of `about`


def save_npz(record: ImageSelection, path: Path) -> None:
    """Write the record; an existing file is replaced at once or not at all."""
    from pmod_cli.core.atomic import write_bytes

    write_bytes(path, npz_bytes(record))


def npz_bytes(record: ImageSelection) -> bytes:
    """The file's content."""
    about = {word: getattr(record, word) for word in WORDS}
    about |= {"format": FORMAT, "tile_grid": record.layout.tile_grid, "parts": [p.name for p in record.layout.parts]}
    arrays = {name: np.asarray(getattr(record, name), dtype) for name, dtype in (PER_TOKEN | PER_LAYER).items()}
    for part in record.layout.parts:
        arrays |= {f"{part.name}.{grid}": np.asarray(getattr(part, grid), dtype) for grid, dtype in GRIDS.items()}
    arrays |= {
        "boxes_px": record.layout.boxes(),
        "image": np.asarray(record.image),
        "about": np.array(json.dumps(about)),
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def load_npz(path: Path) -> ImageSelection:
    """Read what `save_npz` wrote. Pickled objects are refused.

    Raises:
        PmodError: no such file, not one of ours, or values that cannot be those of a selection.
    """
    if not path.is_file():
        raise PmodError(f"{path}: no such selection file", hint="pmod visualize IMAGE --npz writes one")
    try:
        with zipfile.ZipFile(path) as archive:
            return _read(archive)
    except MemoryError:
        raise
    except Exception as error:  # of a damaged file zipfile, zlib and NumPy's header parser raise nearly anything
        raise PmodError(
            f"{path} is not a selection that pmod wrote, or is damaged ({error or type(error).__name__})",
            hint="pmod visualize IMAGE --npz writes one",
        ) from error


def _read(archive: zipfile.ZipFile) -> ImageSelection:
    about = json.loads(str(_array(archive, "about", np.str_, (), 4 * MOST_WORDS)))
    expect(isinstance(about, dict), "`about` is no object")
    expect(about.get("format") == FORMAT, f"format {about.get('format')}, expected {FORMAT}")
    words = check_words({word: about[word] for word in WORDS})
    image = _array(archive, "image", np.uint8, (None, None, 3), 3 * MOST_PIXELS)

    names, tile_grid = about["parts"], about["tile_grid"]
    expect(names in (["image"], ["base", "tiles"]), f"parts {names!r:.60}")
    parts = tuple(Part(name, *(_array(archive, f"{name}.{grid}", GRIDS[grid]) for grid in GRIDS)) for name in names)
    layout = Layout(image.shape[1], image.shape[0], parts, None if tile_grid is None else tuple(tile_grid))
    expect(layout.size <= MOST_TOKENS, f"{layout.size:,} vision tokens, at most {MOST_TOKENS:,} are drawn")
    arrays = {name: _array(archive, name, dtype, (None, layout.size)) for name, dtype in PER_TOKEN.items()}
    layers = len(arrays["kept"])
    arrays |= {name: _array(archive, name, dtype, (layers,)) for name, dtype in PER_LAYER.items()}
    record = ImageSelection(image=Image.fromarray(image), layout=layout, **arrays, **words)
    check_selection(record)
    boxes = _array(archive, "boxes_px", np.float64, (layout.size, 4))
    expect(np.array_equal(boxes, layout.boxes(), equal_nan=True), "`boxes_px` are not the boxes of its parts")
    return record


def _array(
    archive: zipfile.ZipFile, name: str, dtype: Any, shape: tuple[int | None, ...] | None = None, most: int = MOST_BYTES
) -> np.ndarray:
    """One array, read only after its header is known to be harmless.

    Args:
        dtype: expected; of `np.str_` any length.
        shape: expected; None where any length will do, or for the whole shape any number of axes.
        most: bytes.
    """
    with archive.open(f"{name}.npy") as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        found, fortran, kind = read(stream)
        right = kind.kind == "U" if dtype is np.str_ else kind == np.dtype(dtype)
        expect(right, f"`{name}` is {kind}, expected {np.dtype(dtype).name}")
        fits = shape is None or (
            len(found) == len(shape) and all(want in (None, length) for length, want in zip(found, shape, strict=True))
        )
        expect(fits and all(length >= 0 for length in found), f"`{name}` has the shape {found}, expected {shape}")
        size = math.prod(found) * kind.itemsize
        expect(size <= most, f"`{name}` would take {size / 1e6:,.0f} MB, at most {most / 1e6:,.0f} are read")
        data, filled = memoryview(bytearray(size)), 0
        while filled < size and (count := stream.readinto(data[filled : filled + CHUNK])):
            filled += count
        expect(filled == size and not stream.read(1), f"`{name}` has not the length that its header states")
    return np.frombuffer(data, kind).reshape(found, order="F" if fortran else "C")
