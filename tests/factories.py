"""Tiny stock LLaVA checkpoints with random weights, made on the spot: real models, real processors, no network."""

from pathlib import Path

import torch
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    MistralConfig,
    PreTrainedTokenizerBase,
    Qwen2Config,
)

from tests.beds.tiny_llava_next.model import CHAT_TEMPLATE, IMAGE, build_tokenizer

KINDS = ("llava", "llava_next")
DECODERS = ("llama", "mistral", "qwen2")
TILE, PATCH = 32, 8  # pixels: 16 vision tokens a tile
PINPOINTS = [[TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE]]  # (height, width) in pixels


def processor(
    kind: str = "llava_next", tokenizer: PreTrainedTokenizerBase | None = None
) -> LlavaProcessor | LlavaNextProcessor:
    """The stock processor of `kind`, over the tokenizer of the bundled tiny model unless another is given."""
    pixels = {"size": {"shortest_edge": TILE}, "crop_size": {"height": TILE, "width": TILE}}
    options = {
        "tokenizer": tokenizer or build_tokenizer(),
        "patch_size": PATCH,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "chat_template": CHAT_TEMPLATE,
    }
    if kind == "llava":
        return LlavaProcessor(image_processor=CLIPImageProcessorPil(**pixels), **options)
    return LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(image_grid_pinpoints=PINPOINTS, **pixels), **options
    )


def config(kind: str = "llava_next", decoder: str = "llama", layers: int = 4, **text) -> LlavaConfig | LlavaNextConfig:
    """A stock config of `layers` decoder layers of width 32, grouped K/V heads; `text` overrides the decoder's."""
    tokenizer = build_tokenizer()
    decoder_config = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}[decoder]
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "tie_word_embeddings": False,
    }
    if decoder == "mistral":
        settings["sliding_window"] = None
    common = {
        "text_config": decoder_config(**settings | text),
        "vision_config": CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=TILE,
            patch_size=PATCH,
            projection_dim=32,
        ),
        "image_token_index": tokenizer.convert_tokens_to_ids(IMAGE),
        "image_seq_length": (TILE // PATCH) ** 2,
        "vision_feature_select_strategy": "default",
        "vision_feature_layer": -2,
        "tie_word_embeddings": False,
    }
    return LlavaConfig(**common) if kind == "llava" else LlavaNextConfig(image_grid_pinpoints=PINPOINTS, **common)


def model(
    kind: str = "llava_next", decoder: str = "llama", layers: int = 4, *, seed: int = 0, **text
) -> LlavaForConditionalGeneration | LlavaNextForConditionalGeneration:
    """A stock model in eval mode, float32, whose weights are large enough that every layer changes the logits."""
    cls = LlavaForConditionalGeneration if kind == "llava" else LlavaNextForConditionalGeneration
    stock = cls(config(kind, decoder, layers, **text)).eval()
    fill(stock, seed)
    return stock


@torch.no_grad()
def fill(module: nn.Module, seed: int) -> None:
    """Deterministic non-trivial weights: fan-in scaled matrices, norms near one, small biases."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
        if parameter.ndim >= 2:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
        else:
            parameter.copy_(0.1 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))


def save_stock(
    folder: Path,
    kind: str = "llava_next",
    decoder: str = "llama",
    layers: int = 4,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    **text,
) -> Path:
    """Write a whole stock checkpoint (weights, config, processor) as `save_pretrained` lays it out."""
    model(kind, decoder, layers, seed=seed, **text).to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    processor(kind).save_pretrained(folder)
    return folder
