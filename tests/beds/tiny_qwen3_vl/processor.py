"""The vocabulary and the processor of the bundled tiny Qwen3-VL."""

from collections.abc import Mapping
from string import ascii_lowercase, digits, punctuation

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from pmod_cli.data.documents import COLOURS, LABELS, SHAPES
from tests.beds.tiny_llava_next.processor import LATER_WORDS, WORDS

PAD, UNKNOWN, BEGIN, END = "<|endoftext|>", "<|unk|>", "<|im_start|>", "<|im_end|>"
VISION = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
SEVERAL_WORDS = [
    "two",
    "pictures",
    "shows",
    "first",
    "second",
    "did",
    "moving",
    "digit",
    "read",
    "at",
    "start",
    "end",
    "still",
    "seconds",
]

# The form of Qwen3-VL's own. What the assistant says is marked as labelled, so that training sets labels there. The
# system text that `pmod eval` puts to every Qwen3-VL is left out: the model was trained without it.
CHAT_TEMPLATE = """\
{%- for message in messages if message['role'] != 'system' or message['content'] != [{'type': 'text', 'text': 'You are a helpful assistant.'}] -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' -%}
{% generation %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{{ '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif part['type'] == 'video' -%}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}
{%- else -%}{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{{ '<|im_end|>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""  # noqa: E501


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A lower-casing WordPiece over the words of the synthetic documents; letter by letter it spells any ASCII text."""
    letters = ascii_lowercase + digits
    special = [PAD, UNKNOWN, BEGIN, END, *VISION.values()]
    pieces = [*special, *letters, *("##" + letter for letter in letters), *punctuation]
    pieces += dict.fromkeys([*WORDS, *LABELS, *COLOURS, *SHAPES, *LATER_WORDS, *SEVERAL_WORDS])
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=UNKNOWN))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        extra_special_tokens=VISION,
        padding_side="left",
        model_max_length=8192,
    )


def build_processor(image: Mapping) -> Qwen3VLProcessor:
    """The stock Qwen3-VL processor with this bed's tokenizer and template.

    Args:
        image: Holds patch (pixels), merge and temporal (patches, frames), and the least and most pixels of a picture.
    """
    cell = {"patch_size": image["patch"], "merge_size": image["merge"], "temporal_patch_size": image["temporal"]}
    cell |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    least, most = image["pixels"]
    size = {"shortest_edge": least, "longest_edge": most}
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessorPil(size=size, **cell),
        video_processor=Qwen3VLVideoProcessor(
            size={"shortest_edge": least, "longest_edge": image["clip"]}, cap_pixels_per_frame=False, **cell
        ),
        tokenizer=build_tokenizer(),
        chat_template=CHAT_TEMPLATE,
    )
