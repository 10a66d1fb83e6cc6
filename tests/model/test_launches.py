"""What a routed layer asks of a GPU beyond a stock one: operators, each a launch or more, and waits of the host."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from pmod_cli.model import Routing
from pmod_cli.model.routing import Lengths
from tests import factories
from tests.model.models import ROWS, batch, pmod_model

LAYER = 2  # routed in `ROUTED_FROM_START`
NO_KERNEL = {"aten::promote_types", "aten::empty.memory_format", "aten::detach"}
ROUTER = {
    "aten::addmm": 1,
    "aten::tanh": 1,
    "aten::mul.Tensor": 1,
    "aten::add.Tensor": 1,
    "aten::masked_fill_.Scalar": 1,
}
CHOICE = {"aten::add.Tensor": 1, "aten::sort.stable": 1, "aten::sort": 1}
TOKENS = {"aten::gather": 3, "aten::mul.Tensor": 2, "aten::scatter_.src": 1}
"""Tokens, weights and both rotary tables are gathered; the MLP and the skipped tokens are scaled; one scatter."""


class Operators(TorchDispatchMode):
    """Counts the operators that start a kernel on a GPU: all but views and what only allocates."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if not operator.is_view and operator.name() not in NO_KERNEL:
            self.seen[operator.name()] += 1
        return operator(*args, **(kwargs or {}))


def operators_of_a_layer(model, inputs, use_cache) -> Counter:
    layer, mode = model.model.language_model.layers[LAYER], Operators()
    stock_forward = layer.forward

    def counted(*args, **kwargs):
        with mode:
            return stock_forward(*args, **kwargs)

    layer.forward = counted
    with torch.no_grad():
        model(**inputs, use_cache=use_cache)
    return mode.seen


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_launches_beyond_a_stock_layer(dtype, use_cache):
    inputs = batch("llava_next", ROWS[:1])
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    stock = operators_of_a_layer(factories.model(layers=4).to(dtype), inputs, use_cache)
    ours = operators_of_a_layer(pmod_model().to(dtype), inputs, use_cache)
    casts = {"aten::_to_copy": 2} if dtype == torch.bfloat16 else {}  # logits to float32, weights back
    assert ours - stock == Counter(ROUTER) + Counter(CHOICE) + Counter(TOKENS) + Counter(casts)
    # The stock cache appends the first keys and values to nothing; ours stores them.
    assert stock - ours == Counter({"aten::cat": 2} if use_cache else {})


def test_a_padded_batch_adds_four_launches():
    """Fillers move behind the others and back, and stay as skipped tokens are."""
    one = operators_of_a_layer(pmod_model(), batch("llava_next", ROWS[:1]), False)
    four = operators_of_a_layer(pmod_model(), batch("llava_next", ROWS), False)
    assert four - one == Counter(
        {"aten::add.Tensor": 1, "aten::sub.Tensor": 1, "aten::mul.Tensor": 1, "aten::where.self": 1}
    )


WAITS = ("tolist", "item", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")


@pytest.mark.parametrize("rows", [ROWS[:1], ROWS])
def test_making_the_routing_waits_once(monkeypatch, rows):
    model, inputs, waits = pmod_model(), batch("llava_next", rows), []
    vision = inputs["input_ids"] == model.config.image_token_id
    for name in WAITS:
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, *a, _n=name, _r=real: (waits.append(_n), _r(self, *a))[1])
    Routing.build(vision, inputs["attention_mask"]).prepare(model.model.routed_ratios)
    assert waits == ["tolist"]


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("rows", [ROWS[:1], ROWS])
def test_layers_wait_for_nothing(rows, cached):
    """They run on the meta device, where a tensor has no value that could be waited for."""
    model, inputs = pmod_model(), batch("llava_next", rows)
    routing = Routing.build(inputs["input_ids"] == model.config.image_token_id, inputs["attention_mask"])
    routing.prepare(model.model.routed_ratios)
    for name, value in vars(routing).items():
        if isinstance(value, torch.Tensor):
            setattr(routing, name, value.to("meta"))
    for ratio, lengths in routing._lengths.items():
        if lengths.valid is not None:
            routing._lengths[ratio] = Lengths(lengths.longest, lengths.valid.to("meta"), lengths.behind.to("meta"))
    decoder = model.model.language_model.to("meta")
    states = torch.empty(*inputs["input_ids"].shape, decoder.config.hidden_size, device="meta")
    tables = decoder.rotary_emb(states, torch.empty(1, states.shape[1], device="meta"))
    cache = DynamicCache() if cached else None
    for layer in decoder.layers:
        states = layer(states, position_embeddings=tables, past_key_values=cache, routing=routing)
    assert states.shape == (*inputs["input_ids"].shape, decoder.config.hidden_size)
    with pytest.raises(RuntimeError, match="meta"):
        states.sum().item()
