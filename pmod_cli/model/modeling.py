"""p-MoD over LLaVA-1.5 and LLaVA-NeXT: real subclasses of the stock models, whose forwards stay.

The stock decoder's layers become routed ones in place (their class and a router are all that is added), so every stock
parameter keeps its name. Vision tokens are known where image features are merged: there one `Routing` is built per
prefill and passed down to the layers. Steps without images (decode, text) get none and run as in a plain model.
"""

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaNextForConditionalGeneration,
    LlavaNextModel,
)
from transformers import initialization as init
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.models.llava.modeling_llava import LlavaPreTrainedModel
from transformers.models.llava_next.modeling_llava_next import LlavaNextPreTrainedModel
from transformers.models.mistral.modeling_mistral import MistralModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from .cache import CACHE_NAME, take_cache
from .configuration import PmodLlavaConfig, PmodLlavaNextConfig
from .layer import PmodLlamaDecoderLayer, PmodMistralDecoderLayer, PmodQwen2DecoderLayer, Router
from .routing import SELECTIONS, Routing
from .selfcheck import check_release


class RoutedDecoder:
    """Mixin in front of a stock text model whose layers are `RoutedLayer`s."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Router):
            for parameter in module.parameters():
                init.zeros_(parameter)  # leaves what a checkpoint has filled
        else:
            super()._init_weights(module)

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, **kwargs):
        """The stock forward, with `routing` in `kwargs` for the layers of a prefill with vision tokens."""
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        cache = take_cache(kwargs)
        return super().forward(
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            step_valid=_padding_of_step(attention_mask, cache, inputs_embeds),
            **{CACHE_NAME: cache},
            **kwargs,
        )


class PmodLlamaModel(RoutedDecoder, LlamaModel):
    """Llama and Vicuna."""

    _no_split_modules = ("PmodLlamaDecoderLayer",)


class PmodMistralModel(RoutedDecoder, MistralModel):
    """Mistral."""

    _no_split_modules = ("PmodMistralDecoderLayer",)


class PmodQwen2Model(RoutedDecoder, Qwen2Model):
    """Qwen1.5 and Qwen2."""

    _no_split_modules = ("PmodQwen2DecoderLayer",)


DECODERS = {
    LlamaModel: (PmodLlamaModel, PmodLlamaDecoderLayer),
    MistralModel: (PmodMistralModel, PmodMistralDecoderLayer),
    Qwen2Model: (PmodQwen2Model, PmodQwen2DecoderLayer),
}


class CheckedRelease:
    """Mixin: loading weights under a transformers newer than any tested one checks a small model first."""

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """The stock method.

        Raises:
            UnsupportedTransformers: This release of transformers does not do what routing builds on.
        """
        check_release(*GENERATION[cls.config_class], list(DECODERS))
        return super().from_pretrained(*args, **kwargs)


class RoutedLlava(CheckedRelease):
    """Mixin in front of `LlavaModel` and `LlavaNextModel`: finds the vision tokens of a prefill."""

    def _route_decoder(self, config: PmodLlavaConfig | PmodLlavaNextConfig) -> None:
        """Turns the stock decoder into a routed one in place.

        Raises:
            ValueError: A decoder of another architecture.
        """
        decoder = self.language_model
        if type(decoder) not in DECODERS:
            known = ", ".join(model.__name__ for model in DECODERS)
            raise ValueError(f"{type(decoder).__name__} decoders cannot be routed: known are {known}")
        decoder.__class__, layer_class = DECODERS[type(decoder)]
        decoder._no_split_modules = set(type(decoder)._no_split_modules)
        # What hidden states are captured from is kept by the name of the class; 5.23 made that a dict of its own kind.
        dict.__setitem__(_CAN_RECORD_REGISTRY, str(type(decoder)), decoder._can_record_outputs)
        decoder.selection, decoder.selection_seed, decoder.selection_recorder = "router", 0, None
        settings = config.settings
        layers = zip(decoder.layers, config.retention, settings.routed(len(decoder.layers)), strict=True)
        for layer, ratio, routed in layers:
            layer.__class__ = layer_class
            layer.add_routing(settings, ratio, routed)
        # What a forward reads, as plain attributes: a traced graph cannot take settings apart.
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
        elif inputs_embeds is not None and vision_mask is None and not _has_tokens(cache):
            raise ValueError(
                "inputs_embeds without images need vision_mask, a (B, N) bool tensor of the merged vision tokens "
                "(all False for text): without it every layer would be plain"
            )
        if vision_mask is not None:
            decoder = self.language_model
            step_mask = attention_mask[:, -vision_mask.shape[1] :] if _is_2d(attention_mask) else attention_mask
            routing = Routing.build(
                vision_mask,
                step_mask,
                selection=decoder.selection,
                seed=decoder.selection_seed,
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
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        image_token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(image_token)).all(-1)

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
        vision = self.config.vision_config
        base = (vision.image_size // vision.patch_size) ** 2
        lengths = [len(features) for features in outputs["image"].pooler_output]
        routed = torch.cat([torch.arange(length, device=vision_mask.device) >= base for length in lengths])
        return vision_mask.masked_scatter(vision_mask, routed), {**kwargs, "mm_encoder_outputs": outputs}


class RoutedGeneration(CheckedRelease):
    """Mixin in front of the stock `...ForConditionalGeneration`: what `generate` must know."""

    def set_selection(self, selection: str, *, seed: int = 0) -> None:
        """Chooses how the K vision tokens of a layer are found: by the routers, or by a control that they must beat.

        Args:
            selection: `router` (default of every model), `random` (per layer, the same for every row) or `uniform`
                (evenly spaced). Weights still come from the routers.
            seed: Of the random control.

        Raises:
            ValueError: An unknown selection.
        """
        if selection not in SELECTIONS:
            raise ValueError(f"selection must be one of {', '.join(SELECTIONS)}, found {selection!r}")
        decoder = self.model.language_model
        decoder.selection, decoder.selection_seed = selection, seed

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


class PmodLlavaModel(RoutedLlava, LlavaModel):
    """p-MoD over LLaVA-1.5, without a language-model head."""

    config_class = PmodLlavaConfig

    def __init__(self, config: PmodLlavaConfig):
        super().__init__(config)
        self._route_decoder(config)
        self.post_init()


class PmodLlavaNextModel(RoutedLlava, LlavaNextModel):
    """p-MoD over LLaVA-NeXT, without a language-model head."""

    config_class = PmodLlavaNextConfig

    def __init__(self, config: PmodLlavaNextConfig):
        super().__init__(config)
        self._route_decoder(config)
        self.post_init()


class PmodLlavaForConditionalGeneration(RoutedGeneration, LlavaForConditionalGeneration):
    """p-MoD over LLaVA-1.5."""

    config_class = PmodLlavaConfig

    def __init__(self, config: PmodLlavaConfig):
        LlavaPreTrainedModel.__init__(self, config)  # the stock constructor would build a plain model first
        self.model = PmodLlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()


class PmodLlavaNextForConditionalGeneration(RoutedGeneration, LlavaNextForConditionalGeneration):
    """p-MoD over LLaVA-NeXT."""

    config_class = PmodLlavaNextConfig

    def __init__(self, config: PmodLlavaNextConfig):
        LlavaNextPreTrainedModel.__init__(self, config)  # the stock constructor would build a plain model first
        self.model = PmodLlavaNextModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()


GENERATION = {
    PmodLlavaConfig: (PmodLlavaForConditionalGeneration, LlavaForConditionalGeneration),
    PmodLlavaNextConfig: (PmodLlavaNextForConditionalGeneration, LlavaNextForConditionalGeneration),
}
"""Ours and the stock class that it extends."""


def _is_2d(mask) -> bool:
    return isinstance(mask, Tensor) and mask.ndim == 2


def _has_tokens(cache) -> bool:
    return cache is not None and any(layer.is_initialized for layer in cache.layers)


def _padding_of_step(attention_mask, cache, inputs_embeds: Tensor) -> Tensor | None:
    """`(B, N)` bool of a later step of several tokens with padding; None in a prefill, in decode, without padding."""
    length = inputs_embeds.shape[1]
    if length == 1 or not _has_tokens(cache) or not _is_2d(attention_mask):
        return None
    valid = attention_mask[:, -length:].bool()
    return None if valid.all() else valid


def _register() -> None:
    """Auto classes and weight names: without the stock conversion maps every stock tensor would be re-initialised."""
    for config, model, generation, stock in (
        (PmodLlavaConfig, PmodLlavaModel, PmodLlavaForConditionalGeneration, LlavaModel),
        (PmodLlavaNextConfig, PmodLlavaNextModel, PmodLlavaNextForConditionalGeneration, LlavaNextModel),
    ):
        AutoModel.register(config, model)
        for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
            auto.register(config, generation)
        stock_type = config.model_type.removeprefix("pmod_")
        for ours, theirs in ((config.model_type, stock_type), (model.__name__, stock.__name__)):
            if mapping := get_checkpoint_conversion_mapping(theirs):
                register_checkpoint_conversion_mapping(ours, mapping, overwrite=True)


_register()
