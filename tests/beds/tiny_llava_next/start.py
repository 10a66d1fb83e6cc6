"""The random weights that training starts from."""

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
        _fan_in(part)
    for layer in model.model.language_model.layers:
        _fan_in(layer)
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):  # small outputs, the smaller the deeper the model
            linear.weight.data.mul_(0.2 / (2 * decoder["num_hidden_layers"]) ** 0.5)
    nn.init.normal_(model.get_input_embeddings().weight, std=0.5)
    return model


def _fan_in(module: nn.Module) -> None:
    """Variance one over the inputs: at this width the usual standard deviation of 0.02 hardly trains."""
    for linear in module.modules():
        if isinstance(linear, nn.Linear):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
