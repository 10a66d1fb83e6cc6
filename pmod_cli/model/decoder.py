"""Text models whose layers are `RoutedLayer`s: a class for each decoder of `pmod_cli.families`, made when asked for."""

from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from pmod_cli.families import DECODERS

from .cache import CACHE_NAME, take_cache
from .layer import RoutedLayer, Router
from .registry import SELECTIONS
from .routing import Routing
from .selection import Selection
from .settings import PmodSettings
from .stock import Stock

_decoders: dict[str, tuple[type, type]] = {}
"""By the name of the decoder: our text model and our layer, as far as they have been asked for."""


class RoutedDecoder(Stock):
    """Mixin in front of a stock text model whose layers are `RoutedLayer`s."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Router):
            for parameter in module.parameters():
                init.zeros_(parameter)  # leaves what a checkpoint has filled
        else:
            super()._init_weights(module)

    def set_selection(self, name: str, *, seed: int = 0) -> None:
        """Gives the layers a selection by name, one object for all.

        Raises:
            ValueError: There is no such selection.
        """
        self.selection = SELECTIONS[name](seed=seed)
        for layer in self.layers:
            layer.selection = self.selection

    def apply_settings(self, settings: PmodSettings) -> None:
        """Gives every layer the selection and its retention ratio; says who chooses, and whose choice others hold.

        A router of a layer that only holds a choice does nothing: its weights are 1.

        Raises:
            ValueError: The settings do not fit the number of layers.
        """
        self.set_selection(settings.selection)
        self.before = self._first_choice(settings)
        ratios, chosen_at = settings.retention(len(self.layers)), settings.chosen_at(len(self.layers))
        for index, layer in enumerate(self.layers):
            held = index in chosen_at[index + 1 :] or (not settings.returns and index == chosen_at[index])
            left = index and chosen_at[index - 1] is not None and ratios[index - 1] < 1
            drop = (chosen_at[index - 1], ratios[index - 1]) if left and not settings.returns else None
            layer.apply_settings(settings, ratios[index], chosen_at[index], held=held, drop=drop)

    def _first_choice(self, settings: PmodSettings) -> tuple[Selection, SimpleNamespace] | None:
        """What drops tokens in front of the decoder, and what it is told in the place of a layer.

        Raises:
            ValueError: The selection reads attention, which there is none of yet.
        """
        if settings.before_decoder is None:
            return None
        name, share = settings.before_decoder
        selection, first = SELECTIONS[name](), self.layers[0]
        if selection.attends:
            raise ValueError(f"before: {name} reads the attention of a layer, and no layer has run before the decoder")
        return selection, SimpleNamespace(ratio=share, self_attn=first.self_attn, input_layernorm=first.input_layernorm)

    def _returns_attention(self, kwargs: dict) -> bool:
        asked = kwargs.get("output_attentions")
        return bool(getattr(self.config, "output_attentions", False) if asked is None else asked)

    def _thinned(self, inputs_embeds: Tensor, routing: Routing) -> Routing:
        """The routing of what `before` leaves."""
        assert self.before is not None
        selection, stage = self.before
        if routing.counts is None:
            raise ValueError("a model that drops tokens before the decoder cannot be traced: their number is not known")
        plan = routing.gather_plan(selection.order(inputs_embeds, routing, stage), stage.ratio)
        left = zip(routing.kept(stage.ratio), routing.counts, strict=True)
        fewer = routing.without(plan.index, plan.valid, [(kept, others, tail) for kept, (_, others, tail) in left])
        fewer.prepare([1.0, *(layer.ratio for layer in self.layers if layer.selects)])
        return fewer

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, inputs_embeds: Any = None, **kwargs: Any
    ) -> Any:
        """The stock forward, with `routing` in `kwargs` for the layers of a prefill with vision tokens.

        Raises:
            ValueError: Attention is to be returned, and frozen layers compute only some rows of it.
        """
        if kwargs.get("routing") is not None and self.layers[0].keep_keys and self._returns_attention(kwargs):
            raise ValueError(
                "output_attentions: layers that freeze tokens (shortv) compute no attention of frozen ones"
            )
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if self.before is not None and kwargs.get("routing") is not None:
            kwargs["routing"] = self._thinned(inputs_embeds, kwargs["routing"])
        cache = take_cache(kwargs)
        return super().forward(
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            step_valid=padding_of_step(attention_mask, cache, inputs_embeds, routed=kwargs.get("routing") is not None),
            **{CACHE_NAME: cache},
            **kwargs,
        )


def route_layers(decoder: nn.Module, settings: PmodSettings) -> None:
    """Turns a stock text model into a routed one in place, or gives a routed one other settings and new routers.

    Args:
        decoder: Text model of a LLaVA, `model.model.language_model`.
        settings: What each layer keeps. New routers are zero.

    Raises:
        ValueError: A decoder of another architecture, or settings that do not fit its number of layers.
    """
    if not isinstance(decoder, RoutedDecoder):
        decoder.__class__, layer_class = routed_decoder(type(decoder))
        decoder._no_split_modules = set(type(decoder)._no_split_modules)
        # What hidden states are captured from is kept by the name of the class; 5.23 made that a dict of its own kind.
        dict.__setitem__(_CAN_RECORD_REGISTRY, str(type(decoder)), decoder._can_record_outputs)
        decoder.selection_recorder = None
        for layer in decoder.layers:
            layer.__class__ = layer_class
    for layer, routed in zip(decoder.layers, settings.routed(len(decoder.layers)), strict=True):
        layer.add_router(routed)
    decoder.apply_settings(settings)


def stock_class(record: Any, end: str) -> Any:
    """A stock class of a family or a decoder, by what its name ends with."""
    return getattr(import_module(record.module), f"{record.classes}{end}")


def routed_class(stock: type, mixin: type, **attributes: Any) -> type:
    """`mixin` in front of a stock class. Pickle finds it by `__getattr__` of `modeling`."""
    home = __name__.replace(".decoder", ".modeling")
    return type(f"Pmod{stock.__name__}", (mixin, stock), {"__module__": home, **attributes})


def routed_decoder(stock: type) -> tuple[type, type]:
    """Our text model and our layer in the place of the stock ones: `PmodLlamaModel` and `PmodLlamaDecoderLayer`.

    Args:
        stock: A stock text model.

    Raises:
        ValueError: No decoder of that name is known.
    """
    kind = next((kind for kind in DECODERS.values() if stock.__name__ == f"{kind.classes}Model"), None)
    if kind is None:
        known = ", ".join(f"{kind.classes}Model" for kind in DECODERS.values())
        raise ValueError(f"{stock.__name__} decoders cannot be routed: known are {known}")
    if kind.name not in _decoders:
        about = f"{kind.classes} with routed layers."
        layer = routed_class(getattr(import_module(stock.__module__), kind.layer_class), RoutedLayer, __doc__=about)
        model = routed_class(stock, RoutedDecoder, __doc__=about, _no_split_modules=(layer.__name__,))
        _decoders[kind.name] = model, layer
    return _decoders[kind.name]


def is_2d(mask: Any) -> bool:
    """Whether an attention mask is a tensor `(B, N)`."""
    return isinstance(mask, Tensor) and mask.ndim == 2


def has_tokens(cache: Any) -> bool:
    """Whether a cache holds anything yet."""
    return cache is not None and any(layer.is_initialized for layer in cache.layers)


def padding_of_step(attention_mask: Any, cache: Any, inputs_embeds: Tensor, *, routed: bool) -> Tensor | None:
    """`(B, N)` bool, the real tokens of a step of several tokens that is to be cached and has padding; else None.

    None also of a routed prefill, whose routing knows them.
    """
    length = inputs_embeds.shape[1]
    if length == 1 or cache is None or not is_2d(attention_mask) or (routed and not has_tokens(cache)):
        return None
    valid = attention_mask[:, -length:].bool()
    return None if not torch.compiler.is_compiling() and valid.all() else valid
