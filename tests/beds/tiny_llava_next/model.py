"""The bundled tiny LLaVA-NeXT before training: its vocabulary, processor and randomly started model."""

from collections.abc import Mapping
from string import ascii_lowercase, digits, punctuation

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
)

from pmod_cli.data.documents import COLOURS, LABELS, SHAPES

SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
IMAGE = "<image>"
WORDS = [
    "user",
    "assistant",
    "what",
    "is",
    "the",
    "price",
    "value",
    "of",
    "which",
    "bar",
    "longest",
    "colour",
    "shape",
    "object",
    "there",
    "a",
    "yes",
    "no",
]

# LLaVA's own conversation form. The end of each answer is marked as labelled, so that training sets labels there.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{ ' ' }}{% generation %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{{ eos_token }}{% endgeneration %}
{%- else -%}
{{ message['role'] | upper }}: {% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}
{%- for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}{{ ' ASSISTANT:' }}
{%- endif -%}
{%- endfor -%}
"""  # noqa: E501


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A lower-casing WordPiece over the words of the synthetic documents; letter by letter it spells any ASCII text."""
    letters = ascii_lowercase + digits
    pieces = [*SPECIAL.values(), IMAGE, *letters, *("##" + letter for letter in letters), *punctuation]
    pieces += dict.fromkeys([*WORDS, *LABELS, *COLOURS, *SHAPES])
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=SPECIAL["unk_token"]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    bos = SPECIAL["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, vocabulary[bos])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **SPECIAL,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        model_max_length=2048,
    )


def build_processor(image: Mapping) -> LlavaNextProcessor:
    """The stock LLaVA-NeXT processor; ``image`` holds tile (pixels), patch (pixels) and pinpoints (height, width)."""
    side = image["tile"]
    pixels = LlavaNextImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_grid_pinpoints=image["pinpoints"],
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaNextProcessor(
        image_processor=pixels,
        tokenizer=build_tokenizer(),
        patch_size=image["patch"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token that the "default" strategy drops
        chat_template=CHAT_TEMPLATE,
    )


def build_model(recipe: Mapping, processor: LlavaNextProcessor, num_layers: int) -> LlavaNextForConditionalGeneration:
    """A randomly started model of ``num_layers`` decoder layers, float32; the caller seeds torch."""
    tokenizer, image = processor.tokenizer, recipe["image"]
    config = LlavaNextConfig(
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            num_hidden_layers=num_layers,
            num_key_value_heads=recipe["decoder"]["num_attention_heads"],
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            tie_word_embeddings=False,
            **recipe["decoder"],
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
        start_layer(layer, num_layers)
    nn.init.normal_(model.get_input_embeddings().weight, std=0.5)
    return model


def start_layer(layer: nn.Module, num_layers: int) -> None:
    """Give a decoder layer a fresh random start; its outputs are small, the smaller the deeper the model."""
    _fan_in(layer)
    for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
        linear.weight.data.mul_(0.2 / (2 * num_layers) ** 0.5)


def _fan_in(module: nn.Module) -> None:
    """Variance one over the inputs: at this width the usual standard deviation of 0.02 hardly trains."""
    for linear in module.modules():
        if isinstance(linear, nn.Linear):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
