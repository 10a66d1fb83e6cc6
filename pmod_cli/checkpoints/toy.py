"""The bundled model is a toy: which checkpoints descend from it, and which pictures it can read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pmod_cli.checkpoints.aliases import bundled_path

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedConfig

NOTE = "a toy model, which reads its own synthetic documents and nothing else"
FOREIGN = (
    f"this is tiny-llava-next or made from it: {NOTE}. What it keeps and answers here means nothing; samples/ of a "
    "checkout has pictures that it reads, and `python -m pmod_cli.data.rows` draws more"
)
MOST_SIDE = 384  # pixels; it has learnt documents of 96


def is_toy(config: PreTrainedConfig | Mapping[str, Any]) -> bool:
    """Whether a model has the sizes of the bundled one, which nothing else has. `config` may be a dict."""
    given = config if isinstance(config, Mapping) else config.to_dict()
    own = json.loads((bundled_path() / "config.json").read_text(encoding="utf-8"))
    return all(
        given.get(part, {}).get(name) == own[part][name]
        for part in ("text_config", "vision_config")
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers")
    )


def is_document(image: Image.Image) -> bool:
    """Whether a picture looks like one that `data.documents` draws: light paper of one tint under a little noise."""
    from pmod_cli.data.documents import CELL

    if max(image.size) > MOST_SIDE or image.width % CELL or image.height % CELL:
        return False
    pixels = np.asarray(image.convert("RGB")).reshape(-1, 3).astype(float)
    tint = np.median(pixels, axis=0)
    paper = pixels[(abs(pixels - tint) <= 12).all(axis=1)]
    noise = paper.std(axis=0)
    return bool(tint.min() >= 215 and len(paper) >= len(pixels) / 3 and noise.max() > 3 and noise.max() < 7)
