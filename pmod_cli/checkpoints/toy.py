"""The bundled models are toys: which checkpoints descend from them, and which pictures they can read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pmod_cli.checkpoints.aliases import ALIASES, bundled_path

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedConfig

NOTE = "a toy model, which reads its own synthetic documents and nothing else"
FOREIGN = (
    f"this is a bundled model or made from one: {NOTE}. What it keeps and answers here means nothing; samples/ of a "
    "checkout has pictures that it reads, and `python -m pmod_cli.data.rows` draws more"
)
SIZES = (
    *(("text_config", name) for name in ("hidden_size", "intermediate_size", "num_hidden_layers")),
    *(("vision_config", name) for name in ("hidden_size", "intermediate_size")),
)
MOST_SIDE = 384  # pixels; they have learnt documents of 96


def is_toy(config: PreTrainedConfig | Mapping[str, Any]) -> bool:
    """Whether a model has the sizes of a bundled one, which nothing else has. `config` may be a dict."""
    given = config if isinstance(config, Mapping) else config.to_dict()
    return any(all(given.get(part, {}).get(name) == own[part][name] for part, name in SIZES) for own in _bundled())


def _bundled() -> list[dict]:
    return [
        json.loads((bundled_path(alias.bundled) / "config.json").read_text(encoding="utf-8"))
        for alias in ALIASES.values()
        if alias.bundled
    ]


def is_document(image: Image.Image) -> bool:
    """Whether a picture looks like one that `data.documents` draws: light paper of one tint under a little noise."""
    import numpy as np  # not above: `pmod convert --help` reads this file, through the card that a conversion writes

    from pmod_cli.data.documents import CELL

    if max(image.size) > MOST_SIDE or image.width % CELL or image.height % CELL:
        return False
    pixels = np.asarray(image.convert("RGB")).reshape(-1, 3).astype(float)
    tint = np.median(pixels, axis=0)
    paper = pixels[(abs(pixels - tint) <= 12).all(axis=1)]
    noise = paper.std(axis=0)
    return bool(tint.min() >= 215 and len(paper) >= len(pixels) / 3 and noise.max() > 3 and noise.max() < 7)
