"""Multiply-adds of one module call, counted by fvcore from a trace on the meta device: no weights, no arithmetic.

fvcore knows matrix products and convolutions. It skips fused attention, and counts normalisation in another unit
than matrix products. So this file adds handles: fused attention counts its two products, and everything elementwise
(norms, activations, residual sums, rotary embedding, the router's tanh, softmax) and everything that only moves data
(sort, gather, scatter) counts as zero. What neither fvcore nor this file knows is not dropped in silence: it is
returned in `Count.unknown_operators`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fvcore.nn import FlopCountAnalysis
from fvcore.nn.jit_handles import get_shape
from torch import Tensor, nn

ELEMENTWISE = tuple(
    [
        "add",
        "addcmul_",
        "cumsum",
        "div",
        "frac",
        "gelu",
        "layer_norm",
        "le",
        "lt",
        "masked_fill_",
        "mean",
        "mul",
        "neg",
        "pow",
        "rms_norm",
        "rsqrt",
        "sigmoid",
        "silu",
        "softmax",
        "sub",
        "tanh",
        "where",
    ]
)
DATA_MOVEMENT = ("argsort", "cat", "clone", "expand_as", "gather", "new_ones", "rand", "scatter", "scatter_", "sort")
FUSED_ATTENTION = (
    "scaled_dot_product_attention",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_attention_math",
)


def attention_macs(query: list[int], key: list[int], value: list[int]) -> int:
    """Multiply-adds of softmax(QKᵀ)V: both products over the full rectangle of queries and keys.

    The half that a causal mask hides is included, as in torch's own counter and in the paper's sizes: a count must not
    depend on which kernel runs. With grouped queries each key head serves several query heads, so query heads count.

    Args:
        query: Shape (B, query heads, queries, head size).
        key: Shape (B, key heads, keys, head size).
        value: Shape (B, key heads, keys, value head size).
    """
    batch, heads, queries, head_size = query
    keys, value_size = key[2], value[3]
    return batch * heads * queries * keys * (head_size + value_size)


def _attention_handle(inputs: list[Any], outputs: list[Any]) -> int:
    return attention_macs(*(get_shape(tensor) for tensor in inputs[:3]))


def _zero_handle(inputs: list[Any], outputs: list[Any]) -> int:
    """None would mean "ignore" to fvcore, but not for operators that it has a handle for, such as layer_norm."""
    return 0


HANDLES: dict[str, Callable[[list[Any], list[Any]], int]] = {
    **{f"aten::{name}": _attention_handle for name in FUSED_ATTENTION},
    **{f"aten::{name}": _zero_handle for name in (*ELEMENTWISE, *DATA_MOVEMENT)},
}


@dataclass(frozen=True)
class Count:
    """What one call of a module multiplies and adds.

    Args:
        by_module: Multiply-adds without attention products, by submodule name; the call itself is "".
        attention_products: Multiply-adds of QKᵀ and of the weights times V.
        unknown_operators: Operators that were met and that nobody counts, with how often.
    """

    by_module: dict[str, int]
    attention_products: int
    unknown_operators: dict[str, int]

    @property
    def linear(self) -> int:
        """Multiply-adds of every matrix product except the attention products."""
        return self.by_module[""]


class _Call(nn.Module):
    """A call with its keyword arguments bound: fvcore traces modules on positional tensors only."""

    def __init__(self, module: nn.Module, **arguments: Any) -> None:
        super().__init__()
        self.module = module
        self.arguments = arguments

    def forward(self, *tensors: Tensor) -> Tensor:
        result = self.module(*tensors, **self.arguments)
        return result if isinstance(result, Tensor) else result[0]


def count(module: nn.Module, *tensors: Tensor, **arguments: Any) -> Count:
    """Trace `module(*tensors, **arguments)` once and count it.

    Args:
        module: Any module; on the meta device nothing is computed.
        arguments: Keyword arguments, handed on as they are.
    """
    analysis = FlopCountAnalysis(_Call(module, **arguments), tensors).set_op_handle(**HANDLES)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    products = {name: _attention_products(counter) for name, counter in analysis.by_module_and_operator().items()}
    totals = analysis.by_module()
    inside = {
        name.removeprefix("module").removeprefix("."): int(totals[name] - products[name])
        for name in totals
        if name.startswith("module")
    }
    unknown = {name.removeprefix("aten::"): times for name, times in analysis.unsupported_ops().items()}
    return Count({**inside, "": int(totals[""] - products[""])}, int(products[""]), unknown)


def _attention_products(by_operator: dict[str, int]) -> int:
    return sum(by_operator.get(name, 0) for name in FUSED_ATTENTION)
