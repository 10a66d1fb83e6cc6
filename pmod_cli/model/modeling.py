"""p-MoD over the families of `pmod_cli.families`: real subclasses of the stock models, whose forwards stay.

The stock decoder's layers become routed ones in place (their class and a router are all that is added), so every stock
parameter keeps its name. Vision tokens are known where image features are merged: there one `Routing` is built per
prefill and passed down to the layers. Steps without images (decode, text) get none and run as in a plain model.

`PmodLlavaModel`, `PmodLlavaForConditionalGeneration` and their like are made by `add_family`, from a family's record.
"""

from collections.abc import Mapping
from functools import reduce
from importlib import import_module
from operator import or_

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from pmod_cli.families import FAMILIES

from .cache import CACHE_NAME, take_cache
from .configuration import CONFIGS, RoutedConfig
from .decoder import ROUTED_DECODERS, has_tokens, is_2d, route_layers
from .registry import SELECTIONS
from .routing import Routing
from .selfcheck import check_release
from .settings import PmodSettings

GENERATION: dict[type, type] = {}
"""Our model with a language-model head, by its configuration class."""


class CheckedRelease:
    """Mixin: loading weights under a transformers newer than any tested one checks a small model first."""

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """The stock method.

        Raises:
            UnsupportedTransformers: This release of transformers does not do what routing builds on.
        """
        check_release(GENERATION[cls.config_class], list(ROUTED_DECODERS))
        return super().from_pretrained(*args, **kwargs)


class RoutedModel(CheckedRelease):
    """Mixin in front of a stock `...Model`: finds the vision tokens of a prefill."""

    def __init__(self, config: RoutedConfig):
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
        self.vision_token_keys = self.family.vision_tokens
        self.spares_base_image = settings.target_tokens == "vision_hr"
        self.routed_ratios = tuple(dict.fromkeys(layer.ratio for layer in decoder.layers if layer.selects))

    def forward(
        self,
        input_ids=None,
        pixel_values=None,
        attention_mask=None,
        inputs_embeds=None,
        vision_mask=None,
        **kwargs,
    ):
        """The stock forward, routed if the step has images.

        Args:
            vision_mask: `(B, N)` bool, the vision tokens of `inputs_embeds` that already hold image features.

        Raises:
            ValueError: Merged embeddings start a sequence without a `vision_mask`, or the attention mask is not 2D.
        """
        cache, routing = take_cache(kwargs), None
        if (pixel_values is not None and len(pixel_values)) or kwargs.get("mm_encoder_outputs"):
            if vision_mask is None:
                vision_mask = self._placeholders(input_ids, inputs_embeds)
            if self.spares_base_image:
                vision_mask, kwargs = self._high_resolution(vision_mask, pixel_values, kwargs)
                pixel_values = None
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

    def _placeholders(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """`(B, N)` bool: where the stock forward merges image features."""
        tokens = [getattr(self.config, key) for key in self.vision_token_keys]
        if input_ids is not None:
            places = [input_ids == token for token in tokens]
        else:
            rows = self.get_input_embeddings()(torch.tensor(tokens, device=inputs_embeds.device))
            places = [(inputs_embeds == row).all(-1) for row in rows]
        return reduce(or_, places)

    def _high_resolution(self, vision_mask: Tensor, pixel_values, kwargs: dict) -> tuple[Tensor, dict]:
        """Takes the base image's tokens out of the mask; returns it and `kwargs` with the image features."""
        outputs = kwargs.get("mm_encoder_outputs") or {
            "image": self.get_image_features(
                pixel_values,
                kwargs.get("image_sizes"),
                vision_feature_layer=kwargs.get("vision_feature_layer"),
                vision_feature_select_strategy=kwargs.get("vision_feature_select_strategy"),
                return_dict=True,
            )
        }
        lengths = [len(features) for features in outputs["image"].pooler_output]
        routed = self.spare_base_images(vision_mask, lengths)
        return routed, {**kwargs, "mm_encoder_outputs": outputs}

    def spare_base_images(self, vision_mask: Tensor, lengths: list[int]) -> Tensor:
        """The mask without the tokens of each image's base image, `(B, N)` bool.

        Args:
            vision_mask: `(B, N)` bool, all vision tokens.
            lengths: Vision tokens of each image, in the order of the batch.
        """
        vision = self.config.vision_config
        base = (vision.image_size // vision.patch_size) ** 2
        routed = torch.cat([torch.arange(length, device=vision_mask.device) >= base for length in lengths])
        return vision_mask.masked_scatter(vision_mask, routed)


class RoutedGeneration(CheckedRelease):
    """Mixin in front of the stock `...ForConditionalGeneration`: what `generate` must know."""

    def __init__(self, config: RoutedConfig):
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
        self, input_ids, inputs_embeds=None, vision_mask=None, is_first_iteration=False, **kwargs
    ):
        """Gives `vision_mask` to the prefill only: later tokens are text."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if is_first_iteration and vision_mask is not None:
            inputs["vision_mask"] = vision_mask
        return inputs

    def _prepare_generation_config(self, *args, **kwargs):
        generation_config, model_kwargs = super()._prepare_generation_config(*args, **kwargs)
        if generation_config.prefill_chunk_size is not None:
            raise ValueError(
                "prefill_chunk_size is not supported: each chunk would be routed alone, and keep other tokens"
            )
        return generation_config, model_kwargs

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask, **kwargs):
        """The 2D mask, unchanged: layers hold different tokens, so each makes its own."""
        return attention_mask


def add_family(family) -> None:
    """Make the p-MoD models of a family and register them: `LlavaModel` becomes `PmodLlavaModel`.

    Args:
        family: Its `Family`.
    """
    home, config = import_module(family.module), CONFIGS[family.name]
    stock_model, stock = (getattr(home, f"{family.classes}{end}") for end in ("Model", "ForConditionalGeneration"))
    shared = {"__module__": __name__, "config_class": config, "family": family}
    title = f"p-MoD over {family.title}"
    model = type(
        f"Pmod{stock_model.__name__}",
        (RoutedModel, stock_model),
        shared | {"__doc__": f"{title}, without a language-model head."},
    )
    generation = type(
        f"Pmod{stock.__name__}",
        (RoutedGeneration, stock),
        shared | {"__doc__": f"{title}.", "stock_class": stock, "body_class": model},
    )
    globals().update({model.__name__: model, generation.__name__: generation})  # where pickle looks for them
    GENERATION[config] = generation
    AutoModel.register(config, model)
    for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        auto.register(config, generation)
    # Without the stock weight names every stock tensor would be re-initialised.
    for ours, theirs in ((config.model_type, family.name), (model.__name__, stock_model.__name__)):
        if mapping := get_checkpoint_conversion_mapping(theirs):
            register_checkpoint_conversion_mapping(ours, mapping, overwrite=True)


FAMILIES.follow(add_family)
