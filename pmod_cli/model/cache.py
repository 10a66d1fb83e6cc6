"""K/V of routed layers: shorter than the sequence, with slot validity and the true length kept beside them.

A layer subclass inside the stock `DynamicCache` and `StaticCache`, so that generation, beam search and assisted
decoding stay stock. Tokens after a prefill (decode, later text) are appended by every layer, at their true positions.
"""

from collections.abc import Callable
from inspect import signature
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer
from transformers.masking_utils import create_causal_mask

from .stock import Stock

# What transformers calls the cache on its way through decoder and layers: `cache` since 5.24, `past_key_values` before.
CACHE_NAME = "cache" if "cache" in signature(create_causal_mask).parameters else "past_key_values"


def take_cache(kwargs: dict) -> Cache | None:
    """Takes the cache of a step out of its keyword arguments, under either name.

    Raises:
        ValueError: There is a cache under another name: it would go past routing unseen.
    """
    old, new = kwargs.pop("past_key_values", None), kwargs.pop("cache", None)
    for name, value in kwargs.items():
        if isinstance(value, Cache):
            raise ValueError(f"this transformers hands the cache on as {name}, a name that p-MoD does not know")
    return old if new is None else new


class _RoutedSlots(Stock):
    """Shared by both kinds: which slots are real, how many tokens were skipped, how many may be cropped."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.valid: Tensor | None = None  # (B, slots or more) bool, True ahead; None while every slot is real
        self.skipped = 0  # tokens of the sequence, padding included, that have no slot
        self.croppable = 0  # slots at the end that stand for the last tokens of the sequence, one to one
        self.shift: tuple[Tensor, Tensor] | None = None  # (B, 1, d) each, see `RoutedLayer._shift`
        self._incoming: tuple[Tensor | None, int, int] | None = None  # None: tokens that are all kept and real

    def expect(self, valid: Tensor | None, skipped: int = 0, croppable: int = 0) -> None:
        """Announces the next `update`: validity of its slots, tokens left out, and croppable slots at its end."""
        self._incoming = (valid, skipped, croppable)

    def own_mask(self, config: Any, states: Tensor, valid: Tensor | None) -> Tensor | None:
        """Attention mask of `states` `(B, M, D)` over this layer's slots and their own; None where causality suffices.

        Args:
            config: Text configuration; names the attention implementation.
            states: The tokens that are about to be processed; only shape, dtype and device are used.
            valid: `(B, M)` bool, or None if all of them are real.
        """
        if valid is None and not self.is_initialized and hides_the_future(config):
            return None
        keys = self._keys_seen(valid, states)
        if states.shape[1] == 1 and config._attn_implementation == "sdpa":
            # Decoding: a single query sees whatever is there. Built here, as each layer of each step needs its own.
            seen = self._seen_by_last(keys)
            return None if seen is None else seen[:, None, None]
        view = self.view(states.shape[1])
        return create_causal_mask(config, states, keys, view, layer_idx=0, allow_is_causal_skip=keys is None)

    def crop(self, tokens_to_remove: int) -> None:
        """Drops the last tokens (a negative number, as in the stock cache).

        Raises:
            ValueError: They reach into vision tokens or padding, of which this layer keeps only some.
        """
        if -tokens_to_remove > self.croppable:
            raise ValueError(f"cannot crop {-tokens_to_remove} tokens: only {self.croppable} stand behind the image")
        super().crop(tokens_to_remove)
        self.croppable += tokens_to_remove
        if self.valid is not None:
            self.valid = self.valid[:, : self.slots]  # what comes in the place of the dropped is real again

    def reset(self) -> None:
        super().reset()
        self.is_initialized = False  # the next image may keep another number of tokens
        self.valid, self.skipped, self.croppable, self.shift = None, 0, 0, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._choose_rows(lambda valid: valid.index_select(0, beam_idx.to(valid.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._choose_rows(lambda valid: valid.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._choose_rows(lambda valid: valid[indices.to(valid.device)])

    def _choose_rows(self, choose: Callable[[Tensor], Tensor]) -> None:
        if self.valid is not None:
            self.valid = choose(self.valid)
        if self.shift is not None:
            self.shift = choose(self.shift[0]), choose(self.shift[1])


class RoutedDynamicLayer(_RoutedSlots, DynamicLayer):
    """Grows by concatenation. `get_seq_length` is the true length of the sequence, `slots` that of K and V."""

    @property
    def slots(self) -> int:
        """Tokens that K and V hold."""
        return super().get_seq_length()

    def get_seq_length(self) -> int:
        """True length of the sequence, skipped tokens included."""
        return self.slots + self.skipped if self.is_initialized else 0

    def view(self, arriving: int) -> "_Slots":
        """What a mask is made from, when `arriving` tokens come."""
        return _Slots(self.slots, self.slots + arriving)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As the stock layer: takes K and V of a step, and returns those that its queries see."""
        if self._incoming is None:
            self.croppable += key_states.shape[-2]
        else:
            valid, skipped, self.croppable = self._incoming
            self._incoming = None
            self.skipped += skipped
            if valid is not None:
                self.valid = self._keys_seen(valid, valid)
        if self.slots:
            return super().update(key_states, value_states, *args, **kwargs)
        return store_first(self, key_states, value_states)

    def _keys_seen(self, valid: Tensor | None, states: Tensor) -> Tensor | None:
        """`(B, slots + M)` bool: which slots will be real when `states` have arrived; None if all are."""
        if valid is None:
            return None if self.valid is None else self._known(self.slots + states.shape[1])
        if self.valid is None and not self.slots:
            return valid
        if self.valid is None:
            known = torch.ones((len(valid), self.slots), dtype=torch.bool, device=valid.device)
        else:
            known = self._known(self.slots)
        return torch.cat([known, valid], dim=1)

    def _known(self, length: int) -> Tensor:
        """`valid` of the first `length` slots. Grows ahead by blocks, so that a decoded token copies nothing."""
        assert self.valid is not None
        missing = length - self.valid.shape[1]
        if missing > 0:
            self.valid = F.pad(self.valid, (0, missing + 256), value=True)
        return self.valid[:, :length]

    def _seen_by_last(self, keys: Tensor | None) -> Tensor | None:
        return keys


class RoutedStaticLayer(_RoutedSlots, StaticLayer):
    """Preallocated: `max_cache_len` less the tokens that the first prefill skips; `valid` spans all slots."""

    max_cache_len: int
    cumulative_length: Tensor

    @property
    def slots(self) -> Tensor | int:
        """Tokens that K and V hold, as the stock layer counts them."""
        return super().get_seq_length()

    def get_seq_length(self) -> Tensor | int:
        """True length of the sequence, skipped tokens included."""
        return self.slots + self.skipped if self.is_initialized else 0

    def view(self, arriving: int) -> "_Slots":
        """What a mask is made from, when `arriving` tokens come."""
        return _Slots(self.slots, self.keys.shape[-2], True) if self.is_initialized else _Slots(0, arriving)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """As the stock layer, without slots for what the first prefill skips."""
        full = self.max_cache_len
        if self._incoming is not None:
            self.max_cache_len -= self._incoming[1]
        self.cumulative_length = torch.zeros_like(self.cumulative_length)
        super().lazy_initialization(key_states, value_states)
        self.max_cache_len = full

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As the stock layer: takes K and V of a step, and returns those that its queries see.

        Raises:
            ValueError: A second prefill.
        """
        first = not self.is_initialized
        if not first and self._incoming is not None:
            raise ValueError("a static cache takes one prefill: give images and padding with the first forward only")
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        valid, skipped, _ = self._incoming or (None, 0, 0)
        self._incoming = None
        self.skipped += skipped
        if valid is not None:
            behind = self.keys.shape[-2] - valid.shape[1]
            self.valid = torch.cat([valid, valid.new_ones((valid.shape[0], behind))], dim=1)
        return (key_states, value_states) if first else (keys, values)  # a prefill attends to itself: M x M

    def _keys_seen(self, valid: Tensor | None, states: Tensor) -> Tensor | None:
        return self.valid if self.is_initialized else valid

    def _seen_by_last(self, keys: Tensor | None) -> Tensor | None:
        """`(B or 1, slots)` bool: the filled slots and the one that the query's own token will take."""
        if not self.is_initialized:
            return keys
        filled = torch.arange(self.keys.shape[-2], device=self.keys.device)[None] <= self.slots
        return filled if keys is None else filled & keys


class _Slots(NamedTuple):
    """A layer's slots in the shape that `create_causal_mask` asks a cache for."""

    past: Tensor | int
    total: int
    is_compileable: bool = False

    def get_query_offset(self, layer_idx: int) -> Tensor | int:
        return self.past

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.total, 0


def hides_the_future(config: Any) -> bool:
    """Whether the attention kernel is causal by itself where it gets no mask and every key is one of the queries' own.

    `create_causal_mask` says the same at a cost in every layer, and builds the square where a model is exported.
    """
    return config._attn_implementation == "sdpa" or "flash" in config._attn_implementation


def store_all(cache: Cache, keys: Tensor, values: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
    """`Cache.update` for a layer that skips tokens and yet keeps the K/V of all; a first prefill is not copied."""
    layer = stock_cache_layer(cache, layer_idx)
    if type(layer) is not DynamicLayer or layer.is_initialized or cache.offloading:
        return cache.update(keys, values, layer_idx)
    return store_first(layer, keys, values)


def store_first(layer: DynamicLayer, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Puts K and V in an empty layer as they are. The stock layer appends them to nothing, which copies both."""
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    return keys, values


def stock_cache_layer(cache: Cache, layer_idx: int) -> Any:
    """The K/V of one layer as it is. A cache that was made without a configuration has none before its first use."""
    while len(cache.layers) <= layer_idx:
        cache.layers.append(DynamicLayer())
    return cache.layers[layer_idx]


def routed_cache_layer(cache: Cache, layer_idx: int) -> RoutedDynamicLayer | RoutedStaticLayer:
    """The routed K/V of one layer, put in the place of the stock cache layer before its first use.

    Raises:
        ValueError: The stock layer already holds tokens, or is of a kind whose K/V cannot have their own length.
    """
    layer = stock_cache_layer(cache, layer_idx)
    if isinstance(layer, RoutedDynamicLayer | RoutedStaticLayer):
        return layer
    if layer.is_initialized and layer.keys is not None:
        raise ValueError(f"layer {layer_idx} of the cache was filled by another model: start with an empty cache")
    if type(layer) is DynamicLayer:
        routed = RoutedDynamicLayer()
    elif type(layer) is StaticLayer:
        routed = RoutedStaticLayer(max_cache_len=layer.max_cache_len)
    else:
        raise ValueError(f"{type(layer).__name__} is not supported in a p-MoD layer: use a dynamic or static cache")
    cache.layers[layer_idx] = routed
    return routed
