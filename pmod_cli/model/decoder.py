"""Text models whose layers are `RoutedLayer`s: a class for each decoder of `pmod_cli.families`, from its record."""

from importlib import import_module

import torch
from torch import Tensor, nn
from transformers import initialization as init

from pmod_cli.families import DECODERS

from .cache import CACHE_NAME, take_cache
from .layer import RoutedLayer, Router
from .registry import SELECTIONS

ROUTED_DECODERS: dict[type, tuple[type, type]] = {}
"""By the stock text model: ours, and our layer."""


class RoutedDecoder:
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

    def choose_at(self, chosen_at: list[int | None]) -> None:
        """Says which layers choose, and whose choice the others hold.

        Args:
            chosen_at: Per layer, as `PmodSettings.chosen_at` gives it. A router of a layer that only holds a choice
                does nothing: its weights are 1.
        """
        for index, layer in enumerate(self.layers):
            layer.choose_at(chosen_at[index], held=index in chosen_at[index + 1 :])

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, **kwargs):
        """The stock forward, with `routing` in `kwargs` for the layers of a prefill with vision tokens."""
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        cache = take_cache(kwargs)
        return super().forward(
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            step_valid=padding_of_step(attention_mask, cache, inputs_embeds),
            **{CACHE_NAME: cache},
            **kwargs,
        )


def add_decoder(kind) -> None:
    """Make `Pmod...Model` and `Pmod...DecoderLayer` of a decoder, `LlamaModel` becoming `PmodLlamaModel`.

    Args:
        kind: Its `DecoderKind`.
    """
    stock = getattr(import_module(kind.module), f"{kind.classes}Model")
    stock_layer = getattr(import_module(stock.__module__), kind.layer or f"{kind.classes}DecoderLayer")
    shared = {"__module__": __name__, "__doc__": f"{kind.classes} with routed layers."}
    layer = type(f"Pmod{stock_layer.__name__}", (RoutedLayer, stock_layer), shared)
    split = {"_no_split_modules": (layer.__name__,)}
    model = type(f"Pmod{stock.__name__}", (RoutedDecoder, stock), shared | split)
    globals().update({layer.__name__: layer, model.__name__: model})  # where pickle looks for them
    ROUTED_DECODERS[stock] = model, layer


def is_2d(mask) -> bool:
    return isinstance(mask, Tensor) and mask.ndim == 2


def has_tokens(cache) -> bool:
    return cache is not None and any(layer.is_initialized for layer in cache.layers)


def padding_of_step(attention_mask, cache, inputs_embeds: Tensor) -> Tensor | None:
    """`(B, N)` bool of a later step of several tokens with padding; None in a prefill, in decode, without padding."""
    length = inputs_embeds.shape[1]
    if length == 1 or not has_tokens(cache) or not is_2d(attention_mask):
        return None
    valid = attention_mask[:, -length:].bool()
    return None if valid.all() else valid


DECODERS.follow(add_decoder)
