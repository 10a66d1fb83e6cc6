"""The selection as one HTML page, `reporting/templates/selection.html`.

What it shows is put in as one JSON object, its arrays as little-endian bytes in base64.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pmod_cli.core.atomic import write_text
from pmod_cli.families.geometry import Part
from pmod_cli.reporting import render
from pmod_cli.visualization.image_selection import ImageSelection
from pmod_cli.visualization.overlay import canvas

LONGEST_SIDE = 1600  # pixels of the embedded image; the boxes stay those of the original
STRIP_SIDE = 16_000  # of the frames of a film side by side, which have the area of the largest image at most
IMAGE_BYTES = 900_000  # of the embedded image; base64 makes them a third more
QUALITIES = (90, 80, 65, 50, 30)


def save_html(record: ImageSelection, path: Path, *, layers: Sequence[int] | None = None) -> None:
    """Write the page; an existing file is replaced at once or not at all.

    Args:
        layers: where the slider can stop; default all.
    """
    write_text(path, html_page(record, layers=layers))


def html_page(record: ImageSelection, *, layers: Sequence[int] | None = None) -> str:
    """The page's text, at most 3 MB for 1,000 x 1,000 pixels, 2,928 tokens and 32 layers."""
    return render("selection.html", title=f"{record.model}: {record.question}", data=_data(record, layers))


def _data(record: ImageSelection, layers: Sequence[int] | None) -> dict[str, Any]:
    x0, y0, x1, y1 = canvas(record.layout)
    layers = list(range(record.num_layers)) if layers is None else list(layers)
    return {
        "model": record.model,
        "routerState": record.router_state,
        "chosenBy": record.chosen_by,
        "question": record.question,
        "answer": record.answer,
        "notes": list(record.all_notes),
        "image": _image_url(record.image, record.layout.frames),
        "width": record.layout.width,
        "height": record.layout.height,
        "frames": record.layout.frames,  # of a film: the picture is that many, side by side
        "view": [x0, y0, x1 - x0, y1 - y0],
        "regions": [list(region) for region in record.regions],
        "tokens": record.layout.size,
        "numLayers": record.num_layers,
        "layers": layers,
        "routed": record.routed.tolist(),
        "weighted": record.weighted.tolist(),
        "retention": [round(float(ratio), 6) for ratio in record.retention],
        "kept": _base64(np.packbits(record.kept, axis=1, bitorder="little")),  # (L, ceil(V / 8)) bytes
        "weights": _base64(record.weight.astype("<f4")),  # (L, V)
        "fixed": [] if record.routed_tokens is None else np.flatnonzero(~record.routed_tokens).tolist(),
        "parts": [_part(part, record) for part in record.layout.parts if part.size],
    }


def _part(part: Part, record: ImageSelection) -> dict[str, Any]:
    titles = {
        "image": "Frame" if record.layout.frames > 1 else "Image",
        "base": "Whole image",
        "tiles": "{}×{} tiles".format(*record.layout.tile_grid or (0, 0)),
    }
    return {
        "name": part.name,
        "title": titles[part.name],
        "first": int(min(np.append(part.tokens.ravel(), part.newlines))),
        "stride": part.tokens.shape[1] + bool(part.newlines.size),  # tokens from one row to the next
        "rows": part.row_spans.round(3).tolist(),
        "columns": part.column_spans.round(3).tolist(),
        "newlines": bool(part.newlines.size),
    }


def _image_url(image: Image.Image, frames: int) -> str:
    """A data URL: PNG where that is small enough, else JPEG as good as the size allows."""
    share = LONGEST_SIDE / max(image.size)
    if frames > 1:
        share = min(LONGEST_SIDE / (image.width * image.height) ** 0.5, STRIP_SIDE / image.width)
    if share < 1:
        image = image.copy()
        image.thumbnail((image.width * share, image.height * share), Image.Resampling.BOX)
    encoded, kind = _encode(image, format="PNG"), "png"
    for quality in QUALITIES:
        if len(encoded) <= IMAGE_BYTES:
            break
        encoded, kind = _encode(image, format="JPEG", quality=quality), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}"


def _encode(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
