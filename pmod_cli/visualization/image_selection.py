"""What every layer kept of one image, as arrays: the result that pictures, files and statistics are made from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from pmod_cli.core.errors import PmodError
from pmod_cli.families.geometry import TokenLayout

IMAGE_MARK = "<image>"  # in a question, the place of the image; without it the image stands first


@dataclass(frozen=True)
class ImageSelection:
    """The selection of every layer for one image and question.

    L layers, V vision tokens. A plain layer keeps every token and weights none: its weights are 1.

    Attributes:
        image: RGB, the picture that the model was given.
        layout: where its V vision tokens lie.
        kept: bool (L, V).
        weight: float32 (L, V), the normalised router weights; of `attention`, the share of attention, which sums to 1.
        routed: bool (L,), False for a plain layer.
        retention: float64 (L,), the schedule's retention ratio.
        question: the text asked about the image.
        answer: what the model answered, None where it was not asked to.
        router_state: "untrained", "trained" or "calibrated"; "stock" where attention was read from a stock model.
        model: a name for the caption.
        chosen_by: a selection, such as "router", or "attention": the tokens that the last token of the prompt attends
            to most.
        notes: what was done to the picture that its owner may not expect, for the caption.
        model_notes: what the caption says of the model besides.
        regions: pixel boxes (x0, y0, x1, y1) given with the picture, such as its text.
        routed_tokens: bool (V,), the tokens among which layers choose; every layer keeps the others, such as the whole
            image under `vision_hr`. None where all are routed.
    """

    image: Image.Image
    layout: TokenLayout
    kept: np.ndarray
    weight: np.ndarray
    routed: np.ndarray
    retention: np.ndarray
    question: str
    answer: str | None
    router_state: str
    model: str
    chosen_by: str = "router"
    notes: tuple[str, ...] = ()
    model_notes: tuple[str, ...] = ()
    regions: tuple[tuple[float, float, float, float], ...] = ()
    routed_tokens: np.ndarray | None = None

    @property
    def image_first(self) -> bool:
        """Whether the image stood before all of the question, so that no layer knew any of it when it selected."""
        before, mark, _ = self.question.partition(IMAGE_MARK)
        return not mark or not before.strip()

    @property
    def all_notes(self) -> tuple[str, ...]:
        """Of the picture, then of the model."""
        return self.notes + self.model_notes

    @property
    def num_layers(self) -> int:
        """L, decoder layers."""
        return len(self.kept)

    @property
    def depth(self) -> np.ndarray:
        """int64 (V,), how many layers keep each token."""
        return self.kept.sum(axis=0)

    @property
    def by_chance(self) -> np.ndarray:
        """float64 (L, V): how likely each token is kept, were as many of the routed ones drawn at random."""
        if self.routed_tokens is None:
            return np.broadcast_to(self.kept.mean(axis=1, keepdims=True), self.kept.shape)
        drawn = self.kept[:, self.routed_tokens].sum(axis=1, keepdims=True) / max(1, self.routed_tokens.sum())
        return np.where(self.routed_tokens, drawn, self.kept)

    @property
    def weighted(self) -> np.ndarray:
        """Bool (L,), the layers that weigh their tokens; others are plain, or hold an earlier choice."""
        tied = (self.weight == 1).all(axis=1)
        new = self.router_state == "untrained" and self.chosen_by == "router"  # whose first tokens win
        return self.routed & (~tied | new)

    def ranks(self, layer: int) -> np.ndarray:
        """int64 (V,): 0 for the token of largest weight. Ties go to the lowest position, as in the model."""
        order = np.argsort(-self.weight[layer], kind="stable")
        ranks = np.empty_like(order)
        ranks[order] = np.arange(len(order))
        return ranks

    def to_dict(self, layers: Sequence[int]) -> dict[str, Any]:
        """The raw selection of `layers`, ready for JSON: each token's part, cell and pixel box, each layer's choice."""
        return {
            "model": self.model,
            "router_state": self.router_state,
            "chosen_by": self.chosen_by,
            "image_width_px": self.layout.width,
            "image_height_px": self.layout.height,
            "notes": list(self.all_notes),
            "regions_px": [list(region) for region in self.regions],
            "question": self.question,
            "answer": self.answer,
            "vision_tokens": self.layout.size,
            "tile_grid": self.layout.tile_grid,
            "tokens": describe_tokens(self.layout),
            "layers": [
                {
                    "layer": layer,
                    "routed": bool(self.routed[layer]),
                    "retention_ratio": float(self.retention[layer]),
                    "kept_tokens": int(self.kept[layer].sum()),
                    "kept": np.flatnonzero(self.kept[layer]).tolist(),
                    "weights": [round(float(weight), 6) for weight in self.weight[layer]],
                }
                for layer in layers
            ],
        }


def describe_tokens(layout: TokenLayout) -> list[dict[str, Any]]:
    """One entry a vision token, in the model's order. A box is null for newlines and for patches of padding."""
    boxes = layout.boxes()
    described: list[dict[str, Any]] = [{}] * layout.size
    for part in layout.parts:
        for (row, column), token in np.ndenumerate(part.tokens):
            box = None if np.isnan(boxes[token]).any() else [round(float(edge), 2) for edge in boxes[token]]
            described[token] = {"token": int(token), "part": part.name, "row": row, "column": column, "box_px": box}
        for row, token in enumerate(part.newlines):
            described[token] = {"token": int(token), "part": part.name, "row": row, "column": None, "box_px": None}
    return described


def parse_layers(text: str, num_layers: int) -> list[int]:
    """`all`, or a comma-separated list of layers and ranges: `2,14,26`, `2-8`, `0,8-12`. Sorted, each once.

    Raises:
        PmodError: anything else, or a layer that the model does not have.
    """
    if text.strip().lower() == "all":
        return list(range(num_layers))
    layers: set[int] = set()
    shown = text if len(text) <= 60 else f"{text[:60]}…"
    for item in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,9})\s*(?:-\s*([0-9]{1,9})\s*)?", item)
        if match is None:
            raise PmodError(
                f"`layers={shown!r}`: {item.strip()[:40]!r} is neither a layer nor a range",
                hint="for example: `layers=2,14,26`",
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise PmodError(f"`layers={shown!r}`: the range {item.strip()} runs backwards", hint=f"try {last}-{first}")
        if last >= num_layers:
            raise PmodError(
                f"`layers={shown!r}`: there is no layer {last}; the model's layers are 0..{num_layers - 1}",
                hint="`layers=all` draws every layer",
            )
        layers.update(range(first, last + 1))
    return sorted(layers)
