"""What is known of a model family, a decoder and a vision tower. Records import neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers.image_processing_utils import BaseImageProcessor

_DECODER = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
}
_TOWER = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
}


@dataclass(frozen=True, eq=False)
class DecoderKind:
    """A language model that can be routed: pre-norm layers of `self_attn` and `mlp`, as Llama's.

    Attributes:
        name: `model_type` of its configuration.
        classes: What the names of its classes begin with: `Llama` of `LlamaConfig`, `LlamaModel`, `LlamaDecoderLayer`.
        sizes: Defaults of the configuration class that differ from those of most decoders.
        biases: Projections with a bias, by the key of the config that asks for it; the key "" stands for always.
        head_norms: Norms over a head, of shape `(head_dim,)`.
        sliding_window: Window in tokens where a config does not say it; None: none.
        window_key: Key of the config that turns the window on; None: the decoder has no windows.
        original: `model_type` of the original LLaVA code over this decoder.
        template: Chat template of all models over it; None: told by the special tokens of the tokenizer.
        layer: Name of the layer class, where it is not `classes` + `DecoderLayer`.
        family: Name of the family whose own text model it is; None: any LLaVA can have it.
        module: Where the classes are imported from.
    """

    name: str
    classes: str
    sizes: Mapping[str, Any]
    biases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    head_norms: tuple[str, ...] = ()
    sliding_window: int | None = None
    window_key: str | None = None
    original: tuple[str, ...] = ()
    template: str | None = None
    layer: str | None = None
    family: str | None = None
    module: str = "transformers"

    @property
    def layer_class(self) -> str:
        """Name of the stock layer class."""
        return self.layer or f"{self.classes}DecoderLayer"

    @property
    def defaults(self) -> dict[str, Any]:
        """What a config.json leaves out.

        None follows from others: as many key/value heads as query heads, hidden size over query heads.
        """
        return {**_DECODER, **self.sizes}

    def window(self, text: Mapping[str, Any]) -> int | None:
        """Tokens of the sliding window that a `text_config` asks for, or None."""
        length = text.get("sliding_window", self.sliding_window)
        on = self.window_key is not None and (self.window_key == "sliding_window" or text.get(self.window_key))
        return length if on and length else None


@dataclass(frozen=True, eq=False)
class TowerKind:
    """A vision tower: a transformer over the patches of a square tile.

    Attributes:
        name: `model_type` of its configuration.
        sizes: Defaults of the configuration class that differ from those of most towers.
        class_token: Whether the sequence begins with a CLS token.
        norms: Norms around the encoder.
        patch_bias: Whether the patch embedding has a bias.
    """

    name: str
    sizes: Mapping[str, Any]
    class_token: bool
    norms: tuple[str, ...]
    patch_bias: bool

    @property
    def defaults(self) -> dict[str, Any]:
        """What a config.json leaves out."""
        return {**_TOWER, **self.sizes}


@dataclass(frozen=True)
class ImageTokens:
    """One image, or one video, as the model sees it.

    Args:
        width: Pixels.
        height: Pixels.
        tiles: Passes through the vision tower, the downscaled base image included.
        base: Vision tokens of the base image.
        high_resolution: Vision tokens of the other tiles after unpadding, one `image_newline` a row included. 0 for
            LLaVA-1.5.
        patches_per_tile: Vision tokens that the tower gives for one tile; all of them pass the projector.
        frames: Of a video, as many as have vision tokens of their own.
        video: Whether it is a video.
    """

    width: int
    height: int
    tiles: int
    base: int
    high_resolution: int
    patches_per_tile: int
    frames: int = 1
    video: bool = False

    @property
    def tokens(self) -> int:
        """Vision tokens of the prompt, V."""
        return self.base + self.high_resolution


PixelInputs = tuple[tuple[int, ...], dict[str, list]]


@dataclass(frozen=True, eq=False, kw_only=True)
class Family:
    """A vision-language model of transformers that can become a p-MoD model.

    Attributes:
        name: `model_type` of the stock configuration.
        title: What people call it.
        classes: What the names of its classes begin with: `LlavaNext` of `LlavaNextConfig`, `LlavaNextModel`,
            `LlavaNextForConditionalGeneration` and `LlavaNextPreTrainedModel`.
        defaults: What a config.json leaves out, its parts included.
        image_tokens: How many vision tokens an image gives: `(sizes, (width, height) in pixels or None for the paper's
            case, images of the row)`, of a `Sizes`.
        pixel_inputs: What the model takes for images: `(config, [(height, width) in pixels], images of each row)` to
            the shape of `pixel_values`, all images of the batch together, and the values of the other inputs by name.
            Without the third, each image is alone in its row.
        video_tokens: How many vision tokens a video gives: `(sizes, (frames, width, height))`; None: none are taken.
        video_inputs: As `pixel_inputs`, for `pixel_values_videos`: `(config, [(frames, height, width)])`.
        frames_apart: Whether text (a timestamp) stands between the frames of a video.
        frame_text: Text tokens between the frames of a video: `(its frames, frames a second)`.
        place_tokens: Where the vision tokens of an image lie: `(processor, patch_size, height, width)` to a
            `geometry.TokenLayout`.
        image_processor: `(config, options, pad_to_square)` to the stock image processor for such a config.
        small_config: What the configuration of a tiny model needs besides, its tower one of 8-pixel tiles of 2-pixel
            patches; what it says of `text_config` and `vision_config` is added to theirs. A transformers that is newer
            than any tested one is checked on such a model.
        small_pixels: Shape of the `pixel_values` of one image for it.
        small_inputs: What comes with these pixels.
        vision_tokens: Attributes of the configuration that hold the ids of vision tokens.
        processor: Name of the processor class; None: `classes` + `Processor`.
        more_shapes: `(hidden, projector_in)` to names and shapes of tensors beside decoder, tower and the two maps
            of the projector; `projector_in` is the width of what the projector takes.
        high_resolution: Whether images are cut into tiles beside the whole image, so that `vision_hr` can be routed.
        projector: What leads from the tower's features to the decoder, modules and single tensors, as the model names
            them. It is trained, frozen and counted apart from the tower, in which it may lie.
        tower: `(config)` to the sizes of a tower that is no CLIP or SigLIP, for `Sizes.tower`.
        tower_shapes: `(tower)` to names and shapes of its tensors, with all that leads to the decoder, below `visual.`.
        asked_as: What lmms-eval's own model of the family lets the system say before a question, where its
            chat template says nothing by itself.
        asked_pixels: Least and most pixels of an image in lmms-eval's own model of the family.
        unfold: A config.json as older versions wrote it, in the form of today.
        module: Where the classes are imported from.
    """

    name: str
    title: str
    classes: str
    defaults: Mapping[str, Any]
    image_tokens: Callable[[Any, tuple[int, int] | None, int], ImageTokens]
    pixel_inputs: Callable[..., PixelInputs]
    place_tokens: Callable[..., Any]
    image_processor: Callable[[Mapping[str, Any], dict[str, Any], bool], BaseImageProcessor]
    small_pixels: tuple[int, ...]
    small_config: Mapping[str, Any] = field(default_factory=dict)
    small_inputs: Mapping[str, Any] = field(default_factory=dict)
    vision_tokens: tuple[str, ...] = ("image_token_id",)
    more_shapes: Callable[[int, int], dict[str, tuple[int, ...]]] = lambda hidden, projector_in: {}
    high_resolution: bool = False
    processor: str | None = None
    video_tokens: Callable[[Any, tuple[int, int, int]], ImageTokens] | None = None
    video_inputs: Callable[[Any, Sequence[tuple[int, int, int]]], PixelInputs] | None = None
    frames_apart: bool = False
    frame_text: Callable[[int, float], int] = lambda frames, per_second: 0
    projector: tuple[str, ...] = ("multi_modal_projector", "image_newline")
    tower: Callable[[Any], Any] | None = None
    tower_shapes: Callable[[Any], dict[str, tuple[int, ...]]] | None = None
    asked_as: str | None = None
    asked_pixels: tuple[int, int] | None = None
    unfold: Callable[[Mapping[str, Any]], dict[str, Any]] = dict
    module: str = "transformers"

    @property
    def tiled(self) -> bool:
        """Whether the tower reads square tiles, as CLIP and SigLIP do."""
        return self.tower is None

    @property
    def routed_name(self) -> str:
        """`model_type` of the p-MoD configuration."""
        return f"pmod_{self.name}"

    @property
    def stock_class(self) -> str:
        """Name of the stock model with a language-model head."""
        return f"{self.classes}ForConditionalGeneration"

    @property
    def routed_class(self) -> str:
        """Name of the p-MoD model with a language-model head."""
        return f"Pmod{self.stock_class}"
