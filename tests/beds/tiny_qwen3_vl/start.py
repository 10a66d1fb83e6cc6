"""The random weights that training starts from, chosen as those of the tiny LLaVA-NeXT were."""

from collections.abc import Mapping

from torch import nn
from transformers import (
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLTextConfig,
    Qwen3VLVisionConfig,
)

from tests.beds.tiny_llava_next.start import STREAM, fan_in

ADDED = 0.3  # variance that attention or MLP of each layer adds, over that of an embedding
SHARPER = 1.5  # weight of the norms of queries and keys: at one no head can look at one token alone


def build_model(recipe: Mapping, processor: Qwen3VLProcessor) -> Qwen3VLForConditionalGeneration:
    """The model of a recipe with random weights, float32; the caller seeds torch."""
    tokenizer, image, decoder = processor.tokenizer, recipe["image"], recipe["decoder"]
    config = Qwen3VLConfig(
        text_config=Qwen3VLTextConfig(
            vocab_size=len(tokenizer),
            num_key_value_heads=decoder["num_attention_heads"],
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            tie_word_embeddings=False,
            **decoder,
        ),
        vision_config=Qwen3VLVisionConfig(
            patch_size=image["patch"],
            spatial_merge_size=image["merge"],
            temporal_patch_size=image["temporal"],
            out_hidden_size=decoder["hidden_size"],
            **recipe["tower"],
        ),
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        vision_start_token_id=processor.vision_start_token_id,
        vision_end_token_id=processor.vision_end_token_id,
        tie_word_embeddings=False,
    )
    model = Qwen3VLForConditionalGeneration(config)
    fan_in(model)
    tower = model.model.visual
    nn.init.normal_(tower.patch_embed.proj.weight, std=tower.patch_embed.proj.weight[0].numel() ** -0.5)
    for merger in (tower.merger, *tower.deepstack_merger_list):
        merger.linear_fc2.weight.data.mul_(STREAM)
    for layer in model.model.language_model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight.data.mul_(STREAM * ADDED**0.5)
        for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
            nn.init.constant_(norm.weight, SHARPER)
    nn.init.normal_(model.get_input_embeddings().weight, std=STREAM)
    return model
