"""Stock checkpoints of the families that take videos, small: random weights, real tokenizers and processors.

The templates make text of the published ones' form. The image processors are the stock ones, with the tile or the cell
of the tiny models of `tests/model/visual.py`.
"""

from functools import cache
from pathlib import Path

import torch
import transformers
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast, ProcessorMixin

from pmod_cli.families import FAMILIES
from tests.data.tokenizers import byte_level, sentencepiece
from tests.factories import fill
from tests.model.visual import stock_config

_PARTS = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}\
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}\
{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}\
{% elif part['type'] == 'video' %}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}\
{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
QWEN2_5_VL = (
    """{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"""
    "{% endif %}" + _PARTS
)
QWEN3_VL = _PARTS
_FIRST = """{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}\
{% for part in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>' }}{% endfor %}"""
_TEXT = (
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\\n' + part['text'] }}{% endfor %}"
)
LLAVA_ONEVISION = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    + _FIRST
    + "{% if message['role'] == 'assistant' %}{% generation %}"
    + _TEXT
    + "{% endgeneration %}{% else %}"
    + _TEXT
    + "{% endif %}{{ '<|im_end|>' }}{% endfor %}"
    + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAVA_NEXT_VIDEO = (
    "{% for message in messages %}{{ message['role'] | upper + ': ' }}"
    + _FIRST
    + "{% if message['role'] == 'assistant' %}{% generation %}"
    + _TEXT.replace("'\\n' + part['text']", "part['text'] + ' '")
    + "{% endgeneration %}{% else %}"
    + _TEXT
    + "{{ ' ' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
TEMPLATES = {
    "qwen2_5_vl": QWEN2_5_VL,
    "qwen3_vl": QWEN3_VL,
    "llava_onevision": LLAVA_ONEVISION,
    "llava_next_video": LLAVA_NEXT_VIDEO,
}
KINDS = tuple(TEMPLATES)
PINPOINTS = [[8, 16], [16, 8], [16, 16]]


def _tokenizer(kind: str) -> PreTrainedTokenizerFast:
    if kind == "llava_next_video":
        made, places = sentencepiece(), {"image_token": "<image>", "video_token": "<video>"}
    elif kind == "llava_onevision":
        made, places = byte_level("qwen"), {"image_token": "<image>", "video_token": "<video>"}
    else:
        made, places = byte_level("qwen"), {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
        places |= {"vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"}
    ends = {"eos_token": "</s>" if kind == "llava_next_video" else "<|im_end|>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made.backend_tokenizer,
        bos_token=made.bos_token,
        unk_token=made.unk_token,
        pad_token=made.pad_token or "<|endoftext|>",
        model_max_length=4096,
        extra_special_tokens=places,
        **ends,
    )
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in places.values()])
    return tokenizer


@cache
def processor(kind: str) -> ProcessorMixin:
    """The stock processor of a family: cells of 4 x 4 pixels, or tiles of 8 x 8 with patches of 2."""
    parts = {"tokenizer": _tokenizer(kind), "chat_template": TEMPLATES[kind]}
    if kind.startswith("qwen"):
        cell = {"patch_size": 2, "merge_size": 2, "temporal_patch_size": 2}
        video = {"qwen2_5_vl": transformers.Qwen2VLVideoProcessor, "qwen3_vl": transformers.Qwen3VLVideoProcessor}[kind]
        pixels = transformers.Qwen2VLImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 512}, **cell)
        clips = video(size={"shortest_edge": 64, "longest_edge": 512}, cap_pixels_per_frame=False, **cell)
        name = {"qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen3_vl": "Qwen3VLProcessor"}[kind]
        return getattr(transformers, name)(image_processor=pixels, video_processor=clips, **parts)
    if kind == "llava_onevision":
        square = {"height": 8, "width": 8}
        return transformers.LlavaOnevisionProcessor(
            image_processor=transformers.LlavaOnevisionImageProcessorPil(size=square, image_grid_pinpoints=PINPOINTS),
            video_processor=transformers.LlavaOnevisionVideoProcessor(size=square),
            num_image_tokens=16,
            vision_feature_select_strategy="full",
            **parts,
        )
    square = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    return transformers.LlavaNextVideoProcessor(
        image_processor=transformers.LlavaNextImageProcessorPil(image_grid_pinpoints=PINPOINTS, **square),
        video_processor=transformers.LlavaNextVideoVideoProcessor(**square),
        patch_size=2,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        **parts,
    )


def model(kind: str, layers: int = 4, seed: int = 0) -> transformers.PreTrainedModel:
    """A stock model in eval mode, float32, for that processor."""
    made = processor(kind)
    tokenizer = made.tokenizer
    own = {"image_token_id": made.image_token_id, "video_token_id": made.video_token_id}
    if kind.startswith("llava"):
        own = {"image_token_index": made.image_token_id, "video_token_index": made.video_token_id}
        own |= {"image_grid_pinpoints": PINPOINTS}
    else:
        own |= {
            f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}|>")
            for name in ("vision_start", "vision_end")
        }
    config = stock_config(kind, layers=layers, **own)
    text = config.text_config
    text.vocab_size = len(tokenizer)
    text.bos_token_id, text.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    text.pad_token_id = tokenizer.pad_token_id
    stock = getattr(transformers, FAMILIES[kind].stock_class)(config).eval()
    fill(stock, seed)
    stock.generation_config.update(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return stock


def save_stock(folder: Path, kind: str, layers: int = 4, dtype: torch.dtype = torch.float32) -> Path:
    """Write a whole stock checkpoint as `save_pretrained` lays it out."""
    model(kind, layers).to(dtype).save_pretrained(folder)
    processor(kind).save_pretrained(folder)
    return folder


def save_interleave(folder: Path) -> Path:
    """A LLaVA-Interleave: a LLaVA-1.5 with a Qwen2 decoder and a SigLIP tower, which several images are given to."""
    tokenizer = _tokenizer("llava_onevision")
    made = transformers.LlavaProcessor(
        image_processor=transformers.SiglipImageProcessorPil(size={"height": 8, "width": 8}),
        tokenizer=tokenizer,
        patch_size=2,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=LLAVA_ONEVISION,
    )
    config = stock_config(
        "llava",
        image_token_index=made.image_token_id,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    config.text_config = transformers.Qwen2Config(
        **{key: getattr(config.text_config, key) for key in ("hidden_size", "intermediate_size", "num_hidden_layers")},
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config.vision_config = transformers.SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=8,
        patch_size=2,
        vision_use_head=False,
    )
    stock = transformers.LlavaForConditionalGeneration(config).eval()
    fill(stock, 0)
    stock.save_pretrained(folder)
    made.save_pretrained(folder)
    return folder
