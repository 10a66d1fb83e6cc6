"""Tiny stock LLaVA checkpoints with random weights, made on the spot: real models, real processors, no network."""

from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import (
    CLIPVisionConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from pmod_cli import families
from pmod_cli.families.decoders import BUNDLED
from tests.beds.tiny_llava_next.processor import CHAT_TEMPLATE, IMAGE, build_tokenizer

KINDS = ("llava", "llava_next")  # of which checkpoints with a processor are made here; tests/model/visual.py has all
DECODERS = tuple(decoder.name for decoder in BUNDLED)
TILE, PATCH = 32, 8  # pixels: 16 vision tokens a tile
PINPOINTS = [[TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE]]  # (height, width) in pixels


def processor(kind: str = "llava_next", tokenizer: PreTrainedTokenizerBase | None = None) -> ProcessorMixin:
    """The stock processor of `kind`, over the tokenizer of the bundled tiny model unless another is given."""
    pixels = {"size": {"shortest_edge": TILE}, "crop_size": {"height": TILE, "width": TILE}}
    options = {
        "tokenizer": tokenizer or build_tokenizer(),
        "patch_size": PATCH,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "chat_template": CHAT_TEMPLATE,
    }
    family = families.FAMILIES[kind]
    images = family.image_processor({"image_grid_pinpoints": PINPOINTS}, pixels, False)
    return getattr(transformers, family.processor or f"{family.classes}Processor")(image_processor=images, **options)


def config(kind: str = "llava_next", decoder: str = "llama", layers: int = 4, **text) -> PreTrainedConfig:
    """A stock config of `layers` decoder layers of width 32, grouped K/V heads; `text` overrides the decoder's."""
    tokenizer = build_tokenizer()
    family, kind_of_decoder = families.FAMILIES[kind], families.DECODERS[decoder]
    decoder_config = getattr(transformers, f"{kind_of_decoder.classes}Config")
    layers_read = family.defaults["vision_feature_layer"]
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
    if kind_of_decoder.window(settings):
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
        "vision_feature_layer": [-2, -1] if isinstance(layers_read, list) else layers_read,
        "tie_word_embeddings": False,
    }
    if "image_grid_pinpoints" in family.defaults:
        common["image_grid_pinpoints"] = PINPOINTS
    return getattr(transformers, f"{family.classes}Config")(**common)


def model(
    kind: str = "llava_next", decoder: str = "llama", layers: int = 4, *, seed: int = 0, **text
) -> PreTrainedModel:
    """A stock model in eval mode, float32, whose weights are large enough that every layer changes the logits."""
    stock = getattr(transformers, families.FAMILIES[kind].stock_class)(config(kind, decoder, layers, **text)).eval()
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
