"""What is profiled: one batch of prompts, its images cut and padded as the stock model does it. Needs no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pmod_cli.core.errors import PmodError
from pmod_cli.families.sizes import ImageTokens, Sizes, image_tokens, video_tokens
from pmod_cli.model.methods import METHODS, Cost
from pmod_cli.model.schedule import kept_tokens
from pmod_cli.model.settings import PmodSettings

MOST_ROWS = 100_000
MOST_PIXELS = 10**6  # on a side
MOST_TOKENS = 10**9  # of text in a row: far beyond any context


@dataclass(frozen=True)
class Workload:
    """One batch of prompts: images, a text, and what is generated after it.

    Args:
        image_sizes: Width and height of images in pixels. Row i of the batch has images of size i, beginning again when
            the sizes run out; rows of unlike sizes are padded to the longest. Empty: a square of two by two tiles, the
            paper's case (672x672 for a tower of 336 pixels).
        images: Images of one row.
        text_tokens: Text tokens of one row (58 in the paper's figures).
        new_tokens: Generated tokens that are fed back through the model after the prefill.
        batch_size: Rows, B. None: a row for each image size.
        videos: Of each row: frames, and width and height in pixels. With videos a row has images only if it has sizes.
        frames_per_second: Of the videos, for the timestamps that some families write between frames.

    Raises:
        PmodError: a size or a count below 1, or a negative number of tokens.
    """

    image_sizes: tuple[tuple[int, int], ...] = ()
    images: int = 1
    text_tokens: int = 58
    new_tokens: int = 0
    batch_size: int | None = None
    videos: tuple[tuple[int, int, int], ...] = ()
    frames_per_second: float = 2.0

    def __post_init__(self) -> None:
        for frames, width, height in self.videos:
            if min(frames, width, height) < 1 or max(frames, width, height) > MOST_PIXELS:
                raise PmodError(
                    f"`video={frames}x{width}x{height}`: frames, width and height are 1 ... {MOST_PIXELS:,}",
                    hint="pmod profile --video 64x480x360",
                )
        for width, height in self.image_sizes:
            if min(width, height) < 1:
                raise PmodError(
                    f"`image_size={width}x{height}` is empty: width and height are at least 1 pixel",
                    hint="pmod profile --image-size 672x672",
                )
            if max(width, height) > MOST_PIXELS:
                raise PmodError(f"an image of {width} x {height} pixels has more than {MOST_PIXELS:,} on a side")
        for name, number, least in (
            ("images", self.images, 1),
            ("text_tokens", self.text_tokens, 0),
            ("new_tokens", self.new_tokens, 0),
            ("batch_size", 1 if self.batch_size is None else self.batch_size, 1),
        ):
            if number < least:
                wrong = "negative" if number < 0 else "no prompt"
                raise PmodError(f"`{name}={number}` is {wrong}: expected {least} or more", hint="pmod profile --help")
        if self.batch_size is not None and self.batch_size > MOST_ROWS:
            raise PmodError(
                f"`batch_size={self.batch_size}` is more than {MOST_ROWS:,} rows",
                hint="costs of equal rows are a multiple",
            )
        if (images := self.images * (self.batch_size or max(1, len(self.image_sizes)))) > MOST_ROWS:
            raise PmodError(f"{images:,} images in a batch are more than {MOST_ROWS:,}", hint="pmod profile --help")
        for what, number in (("text", self.text_tokens), ("new", self.new_tokens)):
            if number > MOST_TOKENS:
                raise PmodError(f"{number} {what} tokens are more than {MOST_TOKENS:,}", hint="pmod profile --help")
        if self.batch_size is not None and self.batch_size < len(self.image_sizes):
            raise PmodError(
                f"`batch_size={self.batch_size}` has no room for {len(self.image_sizes)} image sizes, one a row",
                hint=f"`batch_size={len(self.image_sizes)}`, or fewer sizes in `image_size`",
            )

    def rows(self, sizes: Sizes) -> list[Row]:
        """The rows of the batch, length B, as the model of these sizes cuts their images."""
        pictured = self.image_sizes or (() if self.videos else (None,))
        kinds = [(image_tokens(sizes, size, self.images),) * self.images for size in pictured] or [()]
        videos = tuple(video_tokens(sizes, size) for size in self.videos)
        between = sum(sizes.family.frame_text(frames, self.frames_per_second) for frames, *_ in self.videos)
        count = self.batch_size or len(kinds)
        return [Row(kinds[index % len(kinds)] + videos, self.text_tokens + between) for index in range(count)]


@dataclass(frozen=True)
class Row:
    """One row of a batch, without padding.

    Args:
        images: How each of its images is cut, then each of its videos.
        text_tokens: Its text tokens, timestamps of videos included.
    """

    images: tuple[ImageTokens, ...]
    text_tokens: int

    @property
    def tiles(self) -> int:
        """Passes through the vision tower."""
        return sum(image.tiles for image in self.images)

    @property
    def patches(self) -> int:
        """Vision tokens that pass the projector, before unpadding."""
        return sum(image.tiles * image.patches_per_tile for image in self.images)

    @property
    def vision_tokens(self) -> int:
        """V."""
        return sum(image.tokens for image in self.images)

    @property
    def tokens(self) -> int:
        """N before padding."""
        return self.vision_tokens + self.text_tokens

    def routable(self, target_tokens: str) -> int:
        """Vision tokens that routed layers choose from.

        All of them, those of images or of videos alone, or for `vision_hr` all but the base images.
        """
        if target_tokens == "vision_hr":
            return sum(image.tokens if image.video else image.high_resolution for image in self.images)
        if target_tokens in ("vision_image", "vision_video"):
            return sum(image.tokens for image in self.images if image.video == (target_tokens == "vision_video"))
        return self.vision_tokens

    def kept(self, target_tokens: str, ratio: float, per_image: bool = False, before: float = 1.0) -> int:
        """Vision tokens that a layer of this retention ratio processes: K, and those that are not routed.

        Args:
            target_tokens: Which vision tokens are routed.
            ratio: Retention ratio.
            per_image: Whether K is taken of each image and frame apart.
            before: Share that is left in front of the decoder; 1 where K is taken of each image.
        """
        routable = self.routable(target_tokens)
        if per_image:
            units = (unit for image in self.images for unit in _units(image, target_tokens))
            return self.vision_tokens - routable + sum(kept_tokens(unit, ratio) for unit in units)
        return self.vision_tokens - routable + kept_tokens(kept_tokens(routable, before), ratio)


@dataclass(frozen=True)
class Routed:
    """What p-MoD changes in a count: how many of which vision tokens each layer keeps.

    Args:
        retention: Retention ratio of each layer, length L.
        target_tokens: Which vision tokens are routed, one of `TARGET_TOKENS`.
        routers: Which layers have a router, length L; None is those that keep less than all.
        chooses: Which layers choose by the method's own `cost`, length L; None: none of them.
        cost: Of one choice, see `model.methods.Cost`.
        keep_keys: Whether skipped tokens still give keys and values.
        per_image: Whether K is taken of each image and frame apart.
        before: Share of the vision tokens that is left in front of the decoder.
        cost_before: Of the choice there.
    """

    retention: Sequence[float]
    target_tokens: str = "vision_all"
    routers: Sequence[bool] | None = None
    chooses: Sequence[bool] | None = None
    cost: Cost | None = None
    keep_keys: bool = False
    per_image: bool = False
    before: float = 1.0
    cost_before: Cost | None = None

    @classmethod
    def of(cls, config: Any) -> Routed:
        """Of a p-MoD configuration."""
        return cls.by(config.settings, config.text_config.num_hidden_layers)

    @classmethod
    def by(cls, settings: PmodSettings, layers: int) -> Routed:
        """Of settings, on so many layers."""
        chosen_at = settings.chosen_at(layers)
        first, before = settings.before_decoder or ("", 1.0)
        return cls(
            settings.retention(layers),
            settings.target_tokens,
            settings.routed(layers),
            [at == layer for layer, at in enumerate(chosen_at)],
            ranking(settings.method, settings.selection),
            settings.keep_keys,
            settings.quota == "per_image",
            before,
            METHODS[first].cost if first in METHODS else None,
        )

    @classmethod
    def stock(cls, layers: int) -> Routed:
        """A stock model of so many layers: each keeps everything."""
        return cls([1.0] * layers)

    @property
    def has_router(self) -> Sequence[bool]:
        """Which layers have a router, length L."""
        return [ratio < 1 for ratio in self.retention] if self.routers is None else self.routers

    @property
    def mean_retention(self) -> float:
        """Share of the routed vision tokens that a layer processes, mean over the layers."""
        return self.before * sum(self.retention) / len(self.retention)

    def mean_tokens(self, rows: Sequence[Row]) -> float:
        """The same of all vision tokens of a batch: a layer processes every one that is not routed."""
        return self.of_all(rows, self.mean_retention)

    def of_all(self, rows: Sequence[Row], share: float) -> float:
        """Share of all vision tokens of a batch, where this share of the routed ones is processed."""
        vision = sum(row.vision_tokens for row in rows)
        routed = sum(row.routable(self.target_tokens) for row in rows) / vision if vision else 1.0
        return routed * share + (1 - routed)


def ranking(method: str, selection: str) -> Cost | None:
    """What a choice costs: that of the method, or of the method whose selection stands in the place of its own."""
    if selection == METHODS[method].selection:
        return METHODS[method].cost
    return next((METHODS[name].cost for name in METHODS if METHODS[name].selection == selection), None)


def layer_tokens(rows: Sequence[Row], routed: Routed) -> list[tuple[int, int]]:
    """(K, M) of each layer: vision tokens and all tokens, each in the row where it is most; M is what a layer gathers.

    A layer that keeps nothing of a prompt without text gathers one filler.
    """
    tokens = []
    for ratio in routed.retention:
        kept = [row.kept(routed.target_tokens, ratio, routed.per_image, routed.before) for row in rows]
        tokens.append((max(kept), max(1, *(k + row.text_tokens for k, row in zip(kept, rows, strict=True)))))
    return tokens


def pictures(rows: Sequence[Row]) -> Counter[ImageTokens]:
    """The images and videos of a batch, each kind once."""
    return Counter(image for row in rows for image in row.images)


def selector_flops(sizes: Sizes, rows: Sequence[Row], routed: Routed, layer: int | None) -> int:
    """FLOPs of a choice on one row, padding included; 0 where a layer does not choose, or a router does.

    Args:
        sizes: The model.
        rows: The batch.
        routed: What the layers keep.
        layer: The layer that chooses; None: in front of the decoder.
    """
    vision, tokens = max(row.routable(routed.target_tokens) for row in rows), max(row.tokens for row in rows)
    if layer is None:
        return (
            routed.cost_before(sizes, tokens, vision, kept_tokens(vision, routed.before))
            if routed.cost_before is not None
            else 0
        )
    if routed.cost is None or routed.chooses is None or not routed.chooses[layer] or not vision:
        return 0
    left = kept_tokens(vision, routed.before)
    kept = max(row.kept(routed.target_tokens, routed.retention[layer], routed.per_image, routed.before) for row in rows)
    return routed.cost(sizes, tokens, left, kept)


def _units(image: ImageTokens, target_tokens: str) -> list[int]:
    """Routed tokens of an image, or of each frame of a video; what is over belongs to the last frame."""
    routable = Row((image,), 0).routable(target_tokens)
    if not image.video or not routable:
        return [routable]
    frame = routable // image.frames
    return [frame] * (image.frames - 1) + [routable - frame * (image.frames - 1)]


def cached_tokens(rows: Sequence[Row], routed: Routed) -> list[int]:
    """Tokens whose keys and values each layer holds after the prefill, in the longest row; length L."""
    if routed.keep_keys:
        return [max(row.tokens for row in rows)] * len(routed.retention)
    return [gathered for _, gathered in layer_tokens(rows, routed)]
