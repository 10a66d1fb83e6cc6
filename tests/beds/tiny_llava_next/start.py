"""The random weights that training starts from.

Each layer begins by adding as much, relative to the residual stream, as any other: its outputs grow with depth as the
stream does. With the usual small and equal outputs late layers learn to do little, and can be skipped.
"""

from collections.abc import Mapping

from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
)

from tests.beds.tiny_llava_next.processor import IMAGE

STREAM = 0.5  # rms of an embedding
SHARE, GROWTH = (
    0.4,
    1.2,
)  # variance that attention or MLP of layer l adds, over that of an embedding: SHARE * GROWTH ** l


def build_model(recipe: Mapping, processor: LlavaNextProcessor) -> LlavaNextForConditionalGeneration:
    """The model of a recipe with random weights, float32; the caller seeds torch."""
    tokenizer, image, decoder = processor.tokenizer, recipe["image"], recipe["decoder"]
    config = LlavaNextConfig(
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            num_key_value_heads=decoder["num_attention_heads"],
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            tie_word_embeddings=False,
            **decoder,
        ),
        vision_config=CLIPVisionConfig(image_size=image["tile"], patch_size=image["patch"], **recipe["tower"]),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_grid_pinpoints=image["pinpoints"],
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        image_seq_length=(image["tile"] // image["patch"]) ** 2,
        tie_word_embeddings=False,
    )
    model = LlavaNextForConditionalGeneration(config)
    for part in (model.model.vision_tower, model.model.multi_modal_projector, model.lm_head):
        fan_in(part)
    for index, layer in enumerate(model.model.language_model.layers):
        fan_in(layer)
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight.data.mul_(STREAM * (SHARE * GROWTH**index) ** 0.5)
    nn.init.normal_(model.get_input_embeddings().weight, std=STREAM)
    return model


def fan_in(module: nn.Module) -> None:
    """Variance one over the inputs: at this width the usual standard deviation of 0.02 hardly trains."""
    for linear in module.modules():
        if isinstance(linear, nn.Linear):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
