"""A selection as one `.npz` file: read back without the model, and by anyone who has NumPy.

Arrays: `kept` bool (L, V), `weight` float32 (L, V), `routed` (L,), `retention` (L,), `boxes_px` float64 (V, 4) with NaN
for tokens without a place, `image` uint8 (H, W, 3); `routed_tokens` bool (V,) where some are not; of each part of the
layout `<part>.tokens`, `.row_spans`, `.column_spans`, `.newlines` (see geometry.Part); and `about`, a JSON text with
everything else.

A file may come from anybody, so an array is read only if its header promises a type, a shape and a size that a
selection can have. Then the values are held to each other.
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

from pmod_cli.core.atomic import write_bytes
from pmod_cli.core.errors import PmodError
from pmod_cli.core.images import MOST_PIXELS
from pmod_cli.families.geometry import Part, TokenLayout, numbered
from pmod_cli.model import SELECTIONS
from pmod_cli.visualization.image_selection import ImageSelection

ROUTER_STATES = ("untrained", "trained", "calibrated", "stock")
STOCK_CHOOSER = "attention"  # of a stock model; all others are selections
MOST_LAYERS = 1000
MOST_REGIONS = 1000
FARTHEST = 1e9  # pixels: no edge of a patch or of a region lies farther away
FORMAT = 1
PER_TOKEN = {"kept": np.bool_, "weight": np.float32}
PER_LAYER = {"routed": np.bool_, "retention": np.float64}
GRIDS = {"tokens": np.int64, "row_spans": np.float64, "column_spans": np.float64, "newlines": np.int64}
WORDS = ("question", "answer", "router_state", "model", "chosen_by", "notes", "model_notes", "regions")
MOST_BYTES = 1 << 26  # of one array but the image; the weights of a 7B selection of 2,928 tokens have 375 kB
MOST_TOKENS = 1 << 18
CHUNK = 1 << 20  # bytes
MOST_WORDS = 1 << 20  # characters of `about`


def save_npz(record: ImageSelection, path: Path) -> None:
    """Write the record; an existing file is replaced at once or not at all."""
    write_bytes(path, npz_bytes(record))


def npz_bytes(record: ImageSelection) -> bytes:
    """The file's content."""
    about = {word: getattr(record, word) for word in WORDS}
    about |= {"format": FORMAT, "tile_grid": record.layout.tile_grid, "parts": [p.name for p in record.layout.parts]}
    about |= {"frames": record.layout.frames} if record.layout.frames > 1 else {}
    arrays = {name: np.asarray(getattr(record, name), dtype) for name, dtype in (PER_TOKEN | PER_LAYER).items()}
    for part in record.layout.parts:
        arrays |= {f"{part.name}.{grid}": np.asarray(getattr(part, grid), dtype) for grid, dtype in GRIDS.items()}
    arrays |= {} if record.routed_tokens is None else {"routed_tokens": record.routed_tokens}
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
    about.setdefault("model_notes", [])  # an older file has them among `notes`
    words = check_words({word: about[word] for word in WORDS})
    image = _array(archive, "image", np.uint8, (None, None, 3), 3 * MOST_PIXELS)

    names, tile_grid = about["parts"], about["tile_grid"]
    expect(names in (["image"], ["base", "tiles"]), f"parts {names!r:.60}")
    parts = tuple(Part(name, *(_array(archive, f"{name}.{grid}", GRIDS[grid]) for grid in GRIDS)) for name in names)
    frames = about.get("frames", 1)
    whole = isinstance(frames, int) and 0 < frames <= MOST_TOKENS
    expect(whole and (frames == 1 or parts[0].tokens.shape[-1] % frames == 0), f"{frames!r:.60} frames")
    tiles = None if tile_grid is None else tuple(tile_grid)
    layout = TokenLayout(image.shape[1], image.shape[0], parts, tiles, frames)
    expect(layout.size <= MOST_TOKENS, f"{layout.size:,} vision tokens, at most {MOST_TOKENS:,} are drawn")
    arrays: dict[str, Any] = {}
    arrays |= {name: _array(archive, name, dtype, (None, layout.size)) for name, dtype in PER_TOKEN.items()}
    layers = len(arrays["kept"])
    arrays |= {name: _array(archive, name, dtype, (layers,)) for name, dtype in PER_LAYER.items()}
    if "routed_tokens.npy" in archive.namelist():
        arrays["routed_tokens"] = _array(archive, "routed_tokens", np.bool_, (layout.size,))
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
        data = bytearray()
        while piece := stream.read(min(CHUNK, size - len(data))):
            data += piece
        expect(len(data) == size and not stream.read(1), f"`{name}` has not the length that its header states")
    return np.frombuffer(data, kind).reshape(found, order="F" if fortran else "C")


def expect(holds: Any, fault: str) -> None:
    """Raises ValueError with the fault where it does not hold."""
    if not holds:
        raise ValueError(fault)


def check_words(words: dict[str, Any]) -> dict[str, Any]:
    """The record's texts, the notes and `regions` as tuples.

    Raises:
        ValueError: one of another type, or a text that is no Unicode.
    """
    texts = [words["question"], words["model"], *([] if words["answer"] is None else [words["answer"]])]
    notes = {name: words[name] for name in ("notes", "model_notes")}
    for name, given in notes.items():
        expect(isinstance(given, list), f"`{name}` is no list")
        texts += given
    for text in texts:
        expect(isinstance(text, str), f"expected a text, found {text!r:.60}")
        text.encode()  # half a surrogate pair cannot be drawn or written
    expect(words["router_state"] in ROUTER_STATES, f"router state {words['router_state']!r:.60}")
    expect(
        words["chosen_by"] == STOCK_CHOOSER or words["chosen_by"] in SELECTIONS, f"chosen by {words['chosen_by']!r:.60}"
    )
    tuples = {name: tuple(given) for name, given in notes.items()}
    return {**words, **tuples, "regions": check_regions(words["regions"])}


def check_regions(boxes: Any) -> tuple[tuple[float, float, float, float], ...]:
    """Boxes [x0, y0, x1, y1] in pixels, as tuples of floats.

    Raises:
        ValueError: no such list, an edge that is no finite number, an empty box, or more than MOST_REGIONS.
    """
    expect(isinstance(boxes, list | tuple), f"{type(boxes).__name__}, no list")
    expect(len(boxes) <= MOST_REGIONS, f"{len(boxes):,} boxes, at most {MOST_REGIONS:,} are drawn")
    for box in boxes:
        expect(isinstance(box, list | tuple) and len(box) == 4, f"a box of {box!r:.60}")
        for edge in box:
            number = isinstance(edge, int | float) and not isinstance(edge, bool)
            expect(number and abs(edge) <= FARTHEST, f"a box of {box!r:.60}")  # never true of NaN
        expect(box[0] < box[2] and box[1] < box[3], f"an empty box, {box!r:.60}")
    return tuple((float(x0), float(y0), float(x1), float(y1)) for x0, y0, x1, y1 in boxes)


def check_selection(record: ImageSelection) -> None:
    """Hold the arrays of a record to each other. Their types and shapes are right already.

    Raises:
        ValueError: what cannot be.
    """
    _check_layout(record.layout)
    kept, weight, routed, retention = record.kept, record.weight, record.routed, record.retention
    expect(1 <= record.num_layers <= MOST_LAYERS, f"{record.num_layers} layers, expected 1 to {MOST_LAYERS}")
    # A byte other than 0 and 1 in a bool array is true for some of NumPy's functions, and itself for others.
    of_tokens = np.ones(record.layout.size, dtype=bool) if record.routed_tokens is None else record.routed_tokens
    for name, flags in (("kept", kept), ("routed", routed), ("routed_tokens", of_tokens)):
        expect(flags.view(np.uint8).max(initial=0) <= 1, f"`{name}` holds other values than false and true")
    expect(np.isfinite(weight).all(), "`weight` holds values that are no finite numbers")
    expect(((retention >= 0) & (retention <= 1)).all(), "`retention` lies outside 0 … 1")
    expect(kept[~routed].all(), "a plain layer keeps every token, and this one does not")
    expect(kept[:, ~of_tokens].all(), "tokens that are not routed are kept by every layer, and these are not")
    if record.chosen_by != STOCK_CHOOSER:
        expect((weight[~routed] == 1).all(), "a plain layer weights no token, and this one does")
    else:
        expect(((weight >= 0) & (weight <= 1)).all(), "a share of attention lies outside 0 … 1")


def _check_layout(layout: TokenLayout) -> None:
    expect(layout.width * layout.height <= MOST_PIXELS, "the image is too large")
    expect(layout.width and layout.height, "the image is empty")
    grid, anyres = layout.tile_grid, len(layout.parts) == 2
    whole = grid is not None and len(grid) == 2 and all(type(count) is int and 0 < count <= 1000 for count in grid)
    expect(whole if anyres else grid is None, f"a tile grid of {grid!r:.60}")
    expect(layout.parts[0].size, "no token in the image")
    first = 0
    for part in layout.parts:
        _check_part(part, first, newline=part.name == "tiles")
        first += part.size


def _check_part(part: Part, first: int, *, newline: bool) -> None:
    for name, spans in (("row", part.row_spans), ("column", part.column_spans)):
        expect(spans.ndim == 2 and spans.shape[1] == 2, f"{name} spans of `{part.name}` of shape {spans.shape}")
        edges = spans.ravel()
        expect((np.abs(edges) <= FARTHEST).all(), f"{name} spans of `{part.name}` are no pixels")
        expect((np.diff(edges)[::2] > 0).all(), f"a {name} of `{part.name}` is empty")
        rounding = 1e-6 * np.abs(edges).max(initial=1)
        expect((np.diff(edges) >= -rounding).all(), f"{name}s of `{part.name}` are out of order")
    as_ours = numbered(part.name, part.row_spans, part.column_spans, first=first, newline=newline)
    same = np.array_equal(part.tokens, as_ours.tokens) and np.array_equal(part.newlines, as_ours.newlines)
    expect(same, f"the tokens of `{part.name}` are not numbered row by row from {first}")
