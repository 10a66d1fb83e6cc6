"""Multiply-adds of single modules on the meta device, against products worked out by hand."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from pmod_cli.profiling.count.operators import attention_macs, count

TOKENS, WIDTH, INNER = 5, 8, 32


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="meta")


class Block(nn.Module):
    """Attention of one head over a linear map, then an MLP: products, fused attention, and what counts as zero."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, INNER), nn.SiLU(), nn.Linear(INNER, WIDTH))

    def forward(self, states: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        heads = self.project(states).unsqueeze(1)
        attended = scaled_dot_product_attention(heads, heads, heads, is_causal=True).squeeze(1)
        return states + scale * self.mlp(attended)


def test_attention_is_the_full_rectangle_of_all_query_heads():
    assert attention_macs([2, 4, 3, 8], [2, 4, 5, 8], [2, 4, 5, 8]) == 2 * 4 * 3 * 5 * (8 + 8)
    assert attention_macs([1, 8, 3, 16], [1, 2, 3, 16], [1, 2, 3, 4]) == 8 * 3 * 3 * (16 + 4), (
        "two key heads serve eight"
    )


def test_products_stand_by_module_and_attention_apart():
    with torch.device("meta"):
        block = Block()
    counted = count(block, meta(2, TOKENS, WIDTH), scale=2.0)
    project, mlp = 2 * TOKENS * WIDTH * WIDTH, 2 * TOKENS * 2 * WIDTH * INNER
    assert counted.by_module["project"] == project
    assert counted.by_module["mlp"] == mlp
    assert counted.by_module["mlp.0"] == 0, "a norm multiplies no matrices"
    assert counted.linear == counted.by_module[""] == project + mlp
    assert counted.attention_products == attention_macs(*3 * [[2, 1, TOKENS, WIDTH]])
    assert counted.unknown_operators == {}


def test_the_first_of_several_results_is_traced():
    class Two(nn.Linear):
        def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, None]:
            return super().forward(states), None

    with torch.device("meta"):
        assert count(Two(WIDTH, INNER), meta(1, TOKENS, WIDTH)).linear == TOKENS * WIDTH * INNER


@pytest.mark.parametrize(("operator", "times"), [("cumprod", 1), ("cos", 2)])
def test_what_nobody_counts_is_named(operator, times):
    class Odd(nn.Module):
        def forward(self, states: torch.Tensor) -> torch.Tensor:
            for _ in range(times):
                states = states.cumprod(1) if operator == "cumprod" else states.cos()
            return states

    counted = count(Odd(), meta(1, TOKENS, WIDTH))
    assert counted.unknown_operators == {operator: times}
    assert (counted.linear, counted.attention_products) == (0, 0)
