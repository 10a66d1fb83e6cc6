"""What many selections have in common: overlap of neighbouring layers, and tokens on marked regions, against chance.

Chance is the expected value for as many tokens drawn at random from those that are routed, computed, not sampled;
tokens that no layer may skip are kept by chance too. LLaVA-NeXT's patches of the whole image are larger than those of
the tiles and touch a region more often; so there is a second chance for regions: as many tokens drawn from each part as
the layer keeps of it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pmod_cli.core.errors import PmodError
from pmod_cli.visualization.image_selection import ImageSelection

ON_REGION = 0.25  # a patch is on a region when they share this much of the smaller one of the two
RESAMPLES = 2000  # of images, for the 95 % intervals


@dataclass(frozen=True)
class ImageStatistics:
    """Of one record; L layers. NaN where there is nothing to tell.

    Attributes:
        overlap, overlap_chance: float64 (L - 1,), share of the smaller selection that the next layer keeps too; NaN
            where one of the two layers is plain.
        on_regions, on_regions_chance, on_regions_in_parts: float64 (L,), share of the kept tokens that lie on a region,
            its two chances; NaN without regions and for plain layers, the last also where there is one part.
    """

    overlap: np.ndarray
    overlap_chance: np.ndarray
    on_regions: np.ndarray
    on_regions_chance: np.ndarray
    on_regions_in_parts: np.ndarray


def image_statistics(record: ImageSelection) -> ImageStatistics:
    """The statistics of one record."""
    kept, likely = record.kept, record.by_chance
    counts = kept.sum(axis=1)
    both = np.minimum(counts[:-1], counts[1:])
    compared = record.routed[:-1] & record.routed[1:] & (both > 0)
    overlap = np.where(compared, (kept[:-1] & kept[1:]).sum(axis=1) / both.clip(1), np.nan)
    chance = np.where(compared, (likely[:-1] * likely[1:]).sum(axis=1) / both.clip(1), np.nan)
    marked = tokens_on(record)
    known = record.routed & (counts > 0) & marked.any()
    share = np.where(known, kept[:, marked].sum(axis=1) / counts.clip(1), np.nan)
    by_chance = np.where(known, likely[:, marked].sum(axis=1) / counts.clip(1), np.nan)
    groups = [tokens.ravel() for part in record.layout.parts for tokens in (part.tokens, part.newlines) if tokens.size]
    drawn = sum(kept[:, tokens].sum(axis=1) * marked[tokens].mean() for tokens in groups)
    in_parts = np.where(known & (len(groups) > 1), drawn / counts.clip(1), np.nan)
    return ImageStatistics(overlap, chance, share, by_chance, in_parts)


def tokens_on(record: ImageSelection) -> np.ndarray:
    """Bool (V,), the tokens whose patch and one of the record's regions share a quarter of the smaller one."""
    boxes = record.layout.boxes()
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])  # NaN, hence never on a region, for newlines
    on: np.ndarray = np.zeros(record.layout.size, dtype=bool)
    for x0, y0, x1, y1 in record.regions:
        wide = np.minimum(boxes[:, 2], x1) - np.maximum(boxes[:, 0], x0)
        high = np.minimum(boxes[:, 3], y1) - np.maximum(boxes[:, 1], y0)
        on |= wide.clip(0) * high.clip(0) >= ON_REGION * np.minimum(area, (x1 - x0) * (y1 - y0))
    return on


def in_common(first: ImageSelection, second: ImageSelection) -> tuple[np.ndarray, np.ndarray]:
    """float64 (L,) each: share of the smaller selection that the other keeps too, and the same by chance.

    NaN where one of them keeps nothing.

    Raises:
        PmodError: the records are not of the same tokens and layers.
    """
    if first.kept.shape != second.kept.shape or not _same_places(first, second):
        raise PmodError(
            f"{first.model} and {second.model} cannot be compared: {first.num_layers} layers of {first.layout.size} "
            f"vision tokens, against {second.num_layers} of {second.layout.size}, or other places in the image",
            hint="compare checkpoints of the same stock model, on the same image",
        )
    smaller = np.minimum(first.kept.sum(axis=1), second.kept.sum(axis=1))
    shared, likely = (first.kept & second.kept).sum(axis=1), (first.by_chance * second.by_chance).sum(axis=1)
    common, chance = (np.where(smaller > 0, count / smaller.clip(1), np.nan) for count in (shared, likely))
    return common, chance


def _same_places(first: ImageSelection, second: ImageSelection) -> bool:
    return np.array_equal(first.layout.boxes(clip=False), second.layout.boxes(clip=False), equal_nan=True)


def check_depths(depths: Collection[int]) -> None:
    """Raises PmodError where selections are of more than one number of layers."""
    if len(depths) > 1:
        raise PmodError("the selections come from models with different numbers of layers", hint="give one model's")


def summarise(images: Sequence[ImageStatistics], layers: Sequence[int], seed: int = 0) -> dict[str, Any]:
    """Means over images and routed layers, with 95 % bootstrap intervals over images, ready for JSON.

    Args:
        layers: which to count; of neighbours, pairs of which both are among them.

    Returns:
        `neighbour_overlap`, `kept_on_regions` and `kept_on_regions_in_parts` over all these layers, and each layer's
        own; None where a number has no meaning: plain layers, images without regions.

    Raises:
        PmodError: the images were given to models of different depth.
    """
    check_depths({len(image.on_regions) for image in images})
    pairs = [layer for layer in layers if layer + 1 in layers]

    def compared(values: str, chance: str, chosen: Sequence[int]) -> dict[str, Any] | None:
        return _compare(_stack(images, values, chosen), _stack(images, chance, chosen), seed)

    def of_layers(chosen: Sequence[int], neighbours: Sequence[int], overlap_name: str) -> dict[str, Any]:
        return {
            overlap_name: compared("overlap", "overlap_chance", neighbours),
            "kept_on_regions": compared("on_regions", "on_regions_chance", chosen),
            "kept_on_regions_in_parts": compared("on_regions", "on_regions_in_parts", chosen),
        }

    return {
        "images": len(images),
        "images_with_regions": sum(np.isfinite(image.on_regions[list(layers)]).any().item() for image in images),
        **of_layers(layers, pairs, "neighbour_overlap"),
        "layers": [
            {"layer": layer, **of_layers([layer], [layer] if layer in pairs else [], "overlap_with_next")}
            for layer in layers
        ],
    }


def _stack(images: Sequence[ImageStatistics], name: str, layers: Sequence[int]) -> np.ndarray:
    """float64 (images, layers)."""
    return np.stack([getattr(image, name)[list(layers)] for image in images])


def _compare(values: np.ndarray, chance: np.ndarray, seed: int) -> dict[str, Any] | None:
    """Mean, chance and lift = mean / chance with its interval, of (images, layers); NaN entries are left out."""
    known = np.isfinite(values + chance).any(axis=1)
    if not known.any():
        return None
    of_image, by_chance = np.nanmean(values[known], axis=1), np.nanmean(chance[known], axis=1)
    told = by_chance > 0  # where a layer keeps nothing of the parts that touch a box, there is nothing to compare
    if not told.any():
        return None
    of_image, by_chance = of_image[told], by_chance[told]
    drawn = np.random.default_rng(seed).integers(0, len(of_image), (RESAMPLES, len(of_image)))
    lifts = of_image[drawn].mean(axis=1) / by_chance[drawn].mean(axis=1)
    low, high = np.quantile(lifts, [0.025, 0.975])
    return {
        "mean": round(float(of_image.mean()), 4),
        "by_chance": round(float(by_chance.mean()), 4),
        "lift": round(float(of_image.mean() / by_chance.mean()), 4),
        "lift_95": [round(float(low), 4), round(float(high), 4)] if len(of_image) > 1 else None,
    }
