"""The vocabulary and the processor of the bundled tiny LLaVA-NeXT."""

from collections.abc import Mapping
from string import ascii_lowercase, digits, punctuation

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    PreTrainedTokenizerBase,
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
LATER_WORDS = ["item", "above", "dearer", "or", "where"]  # last in the vocabulary: the start weights do not have them

# LLaVA's own conversation form. The end of each answer is marked as labelled, so that training sets labels there.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{ ' ' }}{% generation %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{{ eos_token }}{% endgeneration %}
{%- else -%}
{{ 'USER: ' if message['role'] == 'user' else '' }}{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}
{%- for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}{{ ' ASSISTANT:' if message['role'] == 'user' else ' ' }}
{%- endif -%}
{%- endfor -%}
"""  # noqa: E501


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A lower-casing WordPiece over the words of the synthetic documents; letter by letter it spells any ASCII text."""
    letters = ascii_lowercase + digits
    pieces = [*SPECIAL.values(), IMAGE, *letters, *("##" + letter for letter in letters), *punctuation]
    pieces += dict.fromkeys([*WORDS, *LABELS, *COLOURS, *SHAPES, *LATER_WORDS])
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


def build_processor(
    image: Mapping, tokenizer: PreTrainedTokenizerBase | None = None, template: str | None = None
) -> LlavaNextProcessor:
    """The stock LLaVA-NeXT processor, by default with this bed's tokenizer and template.

    Args:
        image: Holds tile (pixels), patch (pixels) and pinpoints (height, width).
    """
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
        tokenizer=build_tokenizer() if tokenizer is None else tokenizer,
        patch_size=image["patch"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token that the "default" strategy drops
        chat_template=CHAT_TEMPLATE if template is None else template,
    )
