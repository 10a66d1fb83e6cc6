"""p-MoD over the families of `pmod_cli.families`: real subclasses of the stock models, whose forwards stay.

The stock decoder's layers become routed ones in place (their class and a router are all that is added), so every stock
parameter keeps its name. Vision tokens are known where image features are merged: there one `Routing` is built per
prefill and passed down to the layers. Steps without images (decode, text) get none and run as in a plain model.

`PmodLlavaModel`, `PmodLlavaForConditionalGeneration`, `PmodLlamaModel` and their like are made of the records of
`pmod_cli.families`, each when it is asked for. The Auto classes know all of them from the start.
"""

from collections.abc import Mapping
from functools import reduce
from inspect import signature
from itertools import accumulate
from operator import or_
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from pmod_cli.families import DECODERS, FAMILIES

from .cache import CACHE_NAME, take_cache
from .configuration import CONFIGS, RoutedConfig
from .decoder import has_tokens, is_2d, route_layers, routed_class, routed_decoder, stock_class
from .registry import SELECTIONS
from .routing import Routing
from .selection import looks_ahead
from .selfcheck import check_release
from .settings import PmodSettings
from .stock import Stock
from .tower import with_ranks, working_in_tower

ONE_KIND: dict[str, tuple[str, ...]] = {"vision_image": ("image_token_id",), "vision_video": ("video_token_id",)}
"""Attributes of the configuration that hold the ids of vision tokens, where `target_tokens` asks for one kind."""
PAGED = "a paged cache has one length for all layers, and a p-MoD layer its own: use a dynamic or static cache"
_made: dict[str, tuple[type, type]] = {}
"""By family: our models without and with a language-model head, as far as they have been asked for."""


class CheckedRelease(Stock):
    """Mixin: loading weights under a transformers newer than any tested one checks a small model first."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """The stock method.

        Raises:
            UnsupportedTransformers: This release of transformers does not do what routing builds on.
        """
        kinds = [kind for kind in DECODERS.values() if kind.family in (None, cls.family.name)]
        own = [kind for kind in kinds if kind.family == cls.family.name]
        # Made when they are checked: a decoder that nobody uses may be of another transformers.
        check_release(routed_models(cls.family)[1], (stock_class(kind, "Model") for kind in own or kinds))
        return super().from_pretrained(*args, **kwargs)

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: what initialises our weights leaves those that are filled, as in the classes of transformers.

        Custom code is not trusted to, and so a tower that a checkpoint lacks would get the scale of a plain linear map.
        """
        return False


class RoutedModel(CheckedRelease):
    """Mixin in front of a stock `...Model`: finds the vision tokens of a prefill."""

    def __init__(self, config: RoutedConfig) -> None:
        super().__init__(config)
        self._route_decoder(config)
        self.post_init()

    def _route_decoder(self, config: RoutedConfig) -> None:
        """Turns the stock decoder into a routed one in place.

        Raises:
            ValueError: A decoder of another architecture.
        """
        route_layers(self.language_model, config.settings)
        self.apply_settings(config.settings)

    def apply_settings(self, settings: PmodSettings) -> None:
        """What each layer keeps and what ranks the tokens; see `RoutedGeneration.set_method`.

        Raises:
            ValueError: The settings do not fit the number of layers.
        """
        decoder = self.language_model
        decoder.apply_settings(settings)
        # What a forward reads, as plain attributes: a traced graph cannot take settings apart.
        self.routes = True  # False: every layer is plain, as in the stock model
        self.routed_token_keys = ONE_KIND.get(settings.target_tokens, self.family.vision_tokens)
        self.spares_base_image = settings.target_tokens == "vision_hr"
        self.counts_each_image = settings.quota == "per_image"
        self.ranks_in_tower = working_in_tower(self) is not None
        self.routed_ratios = tuple(dict.fromkeys(layer.ratio for layer in decoder.layers if layer.selects))

    def forward(self, input_ids: Any = None, *others: Any, **named: Any) -> Any:
        """The stock forward, with its arguments in its own order, routed if the step has images.

        Args:
            input_ids: `(B, N)`, as the stock model's.
            others: In the order of the family's stock model.
            named: Also `vision_mask`, see `_routed`.
        """
        if others:
            return self._routed(**signature(super().forward).bind_partial(input_ids, *others).arguments, **named)
        return self._routed(input_ids, **named)

    def _routed(
        self,
        input_ids: Any = None,
        pixel_values: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        vision_mask: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The stock forward of named arguments, routed if the step has images.

        Args:
            vision_mask: `(B, N)` bool, the vision tokens of `inputs_embeds` that already hold image features.

        Raises:
            ValueError: Merged embeddings start a sequence without a `vision_mask`, or the attention mask is not 2D.
        """
        cache, routing, units, ranks = take_cache(kwargs), None, None, None
        pixels = (pixel_values, kwargs.get("pixel_values_videos"))
        # `generate` hands the prefill what the tower has made of the pixels, and no pixels.
        if any(each is not None and len(each) for each in pixels) or kwargs.get("mm_encoder_outputs"):
            if vision_mask is None:
                vision_mask = self._placeholders(input_ids, inputs_embeds, self.routed_token_keys)
            if self.spares_base_image or self.counts_each_image or self.ranks_in_tower:
                outputs = self._features(pixel_values, kwargs)
                pixel_values, kwargs = None, {**kwargs, "mm_encoder_outputs": outputs}
                image, video = (ONE_KIND[kind] for kind in ("vision_image", "vision_video"))
                images, videos = self._placeholders(input_ids, inputs_embeds, image), None
                if video[0] in self.family.vision_tokens:
                    videos = self._placeholders(input_ids, inputs_embeds, video)
                if self.spares_base_image and "image" in outputs:
                    lengths = [len(features) for features in outputs["image"].pooler_output]
                    vision_mask = vision_mask & (self.spare_base_images(images, lengths) | ~images)
                if self.ranks_in_tower:
                    ranks = _ranks(images, outputs["image"])
                if self.counts_each_image:
                    units = self._units(images, videos, outputs, kwargs)
        elif inputs_embeds is not None and vision_mask is None and not has_tokens(cache):
            raise ValueError(
                "inputs_embeds without images need vision_mask, a (B, N) bool tensor of the merged vision tokens "
                "(all False for text): without it every layer would be plain"
            )
        if vision_mask is not None and self.routes:
            decoder = self.language_model
            step_mask = attention_mask[:, -vision_mask.shape[1] :] if is_2d(attention_mask) else attention_mask
            routing = Routing.build(
                vision_mask,
                step_mask,
                recorder=decoder.selection_recorder,
                units=units,
                ranks=ranks,
            )
            if routing.any_target:
                routing.prepare(self.routed_ratios)
            else:
                routing = None
        return super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            routing=routing,
            **{CACHE_NAME: cache},
            **kwargs,
        )

    def _placeholders(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, keys: tuple[str, ...]) -> Tensor:
        """`(B, N)` bool: where the stock forward merges the features of images or videos.

        Args:
            input_ids: `(B, N)`, or None.
            inputs_embeds: `(B, N, D)`, embeddings of the placeholders; read where there are no ids.
            keys: Attributes of the configuration that hold the ids of the placeholders.
        """
        tokens = [getattr(self.config, key) for key in keys]
        if input_ids is not None:
            places = [input_ids == token for token in tokens]
        else:
            assert inputs_embeds is not None
            rows = self.get_input_embeddings()(torch.tensor(tokens, device=inputs_embeds.device))
            places = [(inputs_embeds == row).all(-1) for row in rows]
        return reduce(or_, places)

    def _features(self, pixel_values: Any, kwargs: dict) -> dict:
        """What the tower makes of images and videos, by kind, as `generate` would hand it on."""
        outputs, videos = dict(kwargs.pop("mm_encoder_outputs", None) or {}), kwargs.pop("pixel_values_videos", None)

        def given(*names: str) -> dict:
            names = ("vision_feature_layer", "vision_feature_select_strategy", *names)
            return {name: kwargs[name] for name in names if name in kwargs}

        if pixel_values is not None:
            own = given("image_sizes", "vision_aspect_ratio", "batch_num_images", "image_grid_thw")
            outputs["image"] = self.get_image_features(pixel_values, **own, return_dict=True)
        if videos is not None:
            outputs["video"] = self.get_video_features(videos, **given("video_grid_thw"), return_dict=True)
        return outputs

    def _units(self, images: Tensor, videos: Tensor | None, outputs: dict, kwargs: dict) -> Tensor:
        """To which image or frame each vision token belongs, `(B, N)` int64, counted from 0 in each row.

        Args:
            images: `(B, N)` bool, placeholders of images.
            videos: The same of videos; None where the family has none.
            outputs: Features, by kind.
            kwargs: Of the forward.
        """
        starts = images & ~_behind(images)
        if "image" in outputs:
            starts = starts | _first_of_each(images, [len(features) for features in outputs["image"].pooler_output])
        if videos is not None:
            starts = starts | videos & ~_behind(videos)
            if (lengths := self._frames(outputs, kwargs)) is not None:
                starts = starts | _first_of_each(videos, lengths)
            elif "video" in outputs and (positions := kwargs.get("position_ids")) is not None and positions.ndim == 3:
                rows, columns = positions[-2:]  # M-RoPE: a frame is read row by row; frames may share a time
                on = (rows > _behind(rows)) | (rows == _behind(rows)) & (columns > _behind(columns))
                starts = starts | videos & ~on
        return (starts.cumsum(dim=1) - 1).clamp_(min=0)

    def _frames(self, outputs: dict, kwargs: dict) -> list[int] | None:
        """Vision tokens of each frame of all videos; None where they are not known, or text stands between frames."""
        if "video" not in outputs or self.family.frames_apart:
            return None
        if (grids := kwargs.get("video_grid_thw")) is not None:
            cell = self.config.vision_config.spatial_merge_size**2
            return [rows * columns // cell for frames, rows, columns in grids.tolist() for _ in range(frames)]
        if not self.family.tiled:
            return None
        vision = self.config.vision_config
        side, lengths = vision.image_size // vision.patch_size, []
        for video in outputs["video"].pooler_output:
            # A quarter of a tile's patches, a side rounded up or down; a newline at the end belongs to the last frame.
            frame = next(each**2 for each in ((side + 1) // 2, side // 2) if video.shape[-2] % each**2 <= 1)
            count = video.shape[-2] // frame
            lengths += [frame] * (count - 1) + [video.shape[-2] - frame * (count - 1)]
        return lengths

    def spare_base_images(self, vision_mask: Tensor, lengths: list[int]) -> Tensor:
        """The mask without the tokens of each image's base image, `(B, N)` bool.

        Args:
            vision_mask: `(B, N)` bool, all vision tokens of images.
            lengths: Vision tokens of each image, in the order of the batch.
        """
        vision = self.config.vision_config
        base = (vision.image_size // vision.patch_size) ** 2
        routed = torch.cat([torch.arange(length, device=vision_mask.device) >= base for length in lengths])
        return vision_mask.masked_scatter(vision_mask, routed)


def _ranks(images: Tensor, outputs: Any) -> Tensor:
    """What the tower's selection found, `(B, N)` float32; -1 outside of images.

    Args:
        images: `(B, N)` bool, placeholders of images.
        outputs: Of `with_ranks`. A beam search repeats the features of an image, so they are told by their identity.
    """
    ranks = torch.cat([outputs.ranks[id(features)] for features in outputs.pooler_output])
    return torch.full(images.shape, -1.0, device=images.device).masked_scatter(images, ranks.float())


def _behind(values: Tensor) -> Tensor:
    """At each place what stands in front of it, zero at the first."""
    return torch.nn.functional.pad(values[:, :-1], (1, 0))


def _first_of_each(mask: Tensor, lengths: list[int]) -> Tensor:
    """`(B, N)` bool: where pieces of these lengths begin among the tokens of `mask`, rows one after another."""
    first = torch.zeros(sum(lengths), dtype=torch.bool)
    first[list(accumulate(lengths[:-1], initial=0))] = True
    return torch.zeros_like(mask).masked_scatter(mask, first.to(mask.device))


class RoutedGeneration(CheckedRelease):
    """Mixin in front of the stock `...ForConditionalGeneration`: what `generate` must know."""

    def __init__(self, config: RoutedConfig) -> None:
        super(self.stock_class, self).__init__(config)  # the stock constructor would build a plain model first
        self.model = self.body_class(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def set_selection(self, selection: str, *, seed: int = 0) -> None:
        """Chooses how the K vision tokens of a layer are found: by the routers, or by a control that they must beat.

        Args:
            selection: A name in `SELECTIONS`, such as `router`, `random` (the same for every row) or `uniform`
                (evenly spaced). Weights still come from the routers, and which layers choose stays as it is.
            seed: Of selections that draw.

        Raises:
            ValueError: An unknown selection.
        """
        if selection not in SELECTIONS:
            raise ValueError(f"selection must be one of {', '.join(SELECTIONS)}, found {selection!r}")
        self.model.language_model.set_selection(selection, seed=seed)
        self.model.ranks_in_tower = working_in_tower(self.model) is not None

    def set_method(self, pmod: Mapping) -> None:
        """Gives the model other settings, of a method that needs no routers: its weights stay as they are.

        Args:
            pmod: Fields of `PmodSettings`, such as `{"method": "fastv", "mean": 0.5}`.

        Raises:
            ValueError: The settings do not fit the model, or a layer would need a router that it does not have.
        """
        settings, decoder = PmodSettings.from_dict(pmod), self.model.language_model
        routed = settings.routed(len(decoder.layers))
        if missing := [i for i, layer in enumerate(decoder.layers) if routed[i] and layer.router is None]:
            raise ValueError(f"method {settings.method!r} needs routers, and layers {missing} have none")
        self.model.apply_settings(settings)
        self.config.pmod = settings.to_dict()

    def prepare_inputs_for_generation(
        self,
        input_ids: Any,
        inputs_embeds: Any = None,
        vision_mask: Any = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Gives `vision_mask` to the prefill only: later tokens are text."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if is_first_iteration and vision_mask is not None:
            inputs["vision_mask"] = vision_mask
        return inputs

    def _assisted_decoding(self, *arguments: Any, **named: Any) -> Any:
        """Candidates stand behind the prompt in the first pass already: no selection may read them.

        Raises:
            ValueError: The selection in use reads what stands behind the images.
        """
        if looks_ahead(self):
            raise ValueError(
                "assisted decoding and prompt lookup put candidates behind the prompt, and the selection in use reads "
                "its end: it would keep other vision tokens. Generate without them, or by routers"
            )
        return super()._assisted_decoding(*arguments, **named)

    def _prepare_generation_config(self, *args: Any, **kwargs: Any) -> Any:
        generation_config, model_kwargs = super()._prepare_generation_config(*args, **kwargs)
        if generation_config.prefill_chunk_size is not None:
            raise ValueError(
                "prefill_chunk_size is not supported: each chunk would be routed alone, and keep other tokens"
            )
        if generation_config.cache_implementation == "paged":
            raise ValueError(PAGED)
        return generation_config, model_kwargs

    def init_continuous_batching(self, *arguments: Any, **named: Any) -> Any:
        """Refused: `pmod serve` joins requests to a batch."""
        raise ValueError(PAGED)

    @staticmethod
    def create_masks_for_generate(config: Any, inputs_embeds: Any, attention_mask: Any, **kwargs: Any) -> Any:
        """The 2D mask, unchanged: layers hold different tokens, so each makes its own."""
        return attention_mask


def routed_models(family: Any) -> tuple[Any, Any]:
    """Our models of a `Family`: `PmodLlavaModel` and `PmodLlavaForConditionalGeneration`."""
    if family.name not in _made:
        stock_model, stock = (stock_class(family, end) for end in ("Model", "ForConditionalGeneration"))
        title, shared = f"p-MoD over {family.title}", {"config_class": CONFIGS[family.name], "family": family}
        about = f"{title}, without a language-model head."
        features = {"get_image_features": with_ranks(stock_model.get_image_features)}
        model = routed_class(stock_model, RoutedModel, __doc__=about, **features, **shared)
        own = {"__doc__": f"{title}.", "stock_class": stock, "body_class": model}
        generation = routed_class(stock, RoutedGeneration, **shared, **own)
        _made[family.name] = model, generation
        _register(family, model, generation)
        # Without the stock weight names every stock tensor would be re-initialised.
        for ours, theirs in (
            (family.routed_name, family.name),
            (model.__name__, stock_model.__name__),
            (generation.__name__, stock.__name__),
        ):
            if mapping := get_checkpoint_conversion_mapping(theirs):
                register_checkpoint_conversion_mapping(ours, mapping, overwrite=True)
    return _made[family.name]


def _register(family: Any, model: type, generation: type) -> None:
    config = CONFIGS[family.name]
    AutoModel.register(config, model, exist_ok=True)
    for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        auto.register(config, generation, exist_ok=True)


def add_family(family: Any) -> None:
    """Tells the Auto classes of a family. What they find stands in for our classes, which are made at the first load.

    Args:
        family: Its `Family`.
    """

    def stand_in(place: int, name: str) -> type:
        def load(cls: type, *args: Any, **kwargs: Any) -> Any:
            return routed_models(family)[place].from_pretrained(*args, **kwargs)

        def build(cls: type, *args: Any, **kwargs: Any) -> Any:
            return routed_models(family)[place]._from_config(*args, **kwargs)

        found = {"config_class": CONFIGS[family.name], "from_pretrained": classmethod(load)}
        return type(name, (), {**found, "_from_config": classmethod(build)})

    _register(family, stand_in(0, f"Pmod{family.classes}Model"), stand_in(1, family.routed_class))


FAMILIES.follow(add_family)


def __getattr__(name: str) -> type:
    """Our classes by name, also for pickle and for the Auto classes of remote code."""
    for family in FAMILIES.values():
        if name in (f"Pmod{family.classes}Model", family.routed_class):
            return routed_models(family)[name == family.routed_class]
    for kind in DECODERS.values():
        if name in (f"Pmod{kind.classes}Model", f"Pmod{kind.layer_class}"):
            return routed_decoder(stock_class(kind, "Model"))[name == f"Pmod{kind.layer_class}"]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
