"""What the paper printed, to be shown beside a count of the same case. Never used to compute anything."""

from __future__ import annotations

from dataclasses import dataclass

from pmod_cli.model import PmodSettings


@dataclass(frozen=True)
class Published:
    """One row pair of the paper's results table.

    Args:
        name: The paper's name of the stock model.
        vision_tokens: V of the row.
        stock_tflops: TFLOPs of the stock model.
        pmod_tflops: TFLOPs of its p-MoD.
        kv_percent: KV cache of p-MoD, percent of stock.
    """

    name: str
    vision_tokens: int
    stock_tflops: float
    pmod_tflops: float
    kv_percent: float


TEXT_TOKENS = 58
VICUNA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
ROWS = (
    Published("LLaVA-1.5 7B", 576, 8.38, 4.92, 53.8),
    Published("LLaVA-NeXT 7B", 2928, 39.46, 21.94, 53.8),
)


def published_for(
    text_config: object, vision_tokens: int, text_tokens: int, retention: list[float]
) -> Published | None:
    """The paper's row for this very case, or None where the paper has none.

    Args:
        text_config: The decoder's configuration.
        vision_tokens: V of the profiled prompt.
        text_tokens: Text tokens of the profiled prompt.
        retention: Retention ratio of each layer.
    """
    if any(getattr(text_config, key) != value for key, value in VICUNA_7B.items()) or text_tokens != TEXT_TOKENS:
        return None
    if retention != PmodSettings().retention(len(retention)):
        return None
    return next((row for row in ROWS if row.vision_tokens == vision_tokens), None)
