"""Tiny checkpoints in the original LLaVA layout, each the twin of a stock Hugging Face one with the same weights."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import CLIPVisionModel, PreTrainedTokenizerFast

from tests import factories
from tests.beds.tiny_llava_next.processor import IMAGE, SPECIAL, build_tokenizer

MODEL_TYPES = {"llama": "llava_llama", "mistral": "llava_mistral", "qwen2": "llava_qwen"}
EXTRA = {
    "vicuna": [],
    "mistral": [],
    "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "chatml": ["<|im_start|>", "<|im_end|>"],
}
KEPT = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "max_position_embeddings",
    "hidden_act",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
)


def tokenizer_without_image(family: str = "vicuna") -> PreTrainedTokenizerFast:
    """The bundled tokenizer as a language model has it: without an image token, with the family's own tokens."""
    state = json.loads(build_tokenizer().backend_tokenizer.to_str())
    pieces = [piece for piece in state["model"]["vocab"] if piece != IMAGE] + EXTRA[family]
    state["model"]["vocab"] = {piece: i for i, piece in enumerate(pieces)}
    state["added_tokens"] = [
        entry | {"id": pieces.index(entry["content"])} for entry in state["added_tokens"] if entry["content"] != IMAGE
    ]
    special = dict(SPECIAL)
    if family != "vicuna":
        del special["pad_token"]  # such as Llama 3 and Mistral have it
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), **special)


def twins(folder: Path, kind: str = "llava", decoder: str = "llama", **options) -> tuple[nn.Module, int]:
    """Write a checkpoint in the original layout; returns the stock model of the same weights, and its vocabulary.

    Args:
        folder: Where to.
        kind: `llava` or `llava_next`.
        decoder: `llama`, `mistral` or `qwen2`.
        options: `family` (vicuna, mistral, llama3, chatml), `tower` (inside, beside), `weights` (safetensors, sharded,
            pickle), `dtype`, `layers`.
    """
    family, tower = options.get("family", "vicuna"), options.get("tower", "inside")
    tokenizer = tokenizer_without_image(family)
    vocabulary = len(tokenizer)
    stock = factories.model(kind, decoder, options.get("layers", 2), vocab_size=vocabulary + 8, pad_token_id=0)
    stock = stock.to(options.get("dtype", torch.float32))
    stock.config.image_token_index = stock.config.image_token_id = vocabulary
    weights = {original_name(name): tensor for name, tensor in stock.state_dict().items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:vocabulary].clone()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # as old versions saved it
    folder.mkdir(parents=True)
    inside = {name: tensor for name, tensor in weights.items() if tower == "inside" or "vision_tower" not in name}
    save(inside, folder, options.get("weights", "safetensors"))
    vision = CLIPVisionModel(stock.config.vision_config)
    beside = folder.parent / "clip"
    if tower == "inside":
        vision.config.save_pretrained(beside)
    else:
        vision.load_state_dict({k: v for k, v in stock.model.vision_tower.state_dict().items()})
        vision.save_pretrained(beside)
    config = original_config(stock.config, kind, decoder, vocabulary)
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(folder)
    return stock, vocabulary


def original_name(name: str) -> str:
    """From a parameter's name in the stock model."""
    for old, new in (
        ("model.vision_tower.", "model.vision_tower.vision_tower.vision_model."),
        ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
        ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
        ("model.language_model.", "model."),
    ):
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def original_config(config, kind: str, decoder: str, vocabulary: int) -> dict:
    text = config.text_config.to_dict()
    anyres = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}
    return {
        **{key: text[key] for key in KEPT},
        "model_type": MODEL_TYPES[decoder],
        "vocab_size": vocabulary,
        "rope_theta": text["rope_parameters"]["rope_theta"],
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "clip",
        "unfreeze_mm_vision_tower": True,
        **(anyres if kind == "llava_next" else {"image_aspect_ratio": "pad"}),
        "image_grid_pinpoints": [[width, height] for height, width in getattr(config, "image_grid_pinpoints", [])],
    }


def save(weights: dict[str, Tensor], folder: Path, form: str) -> None:
    """One safetensors file, two with an index, or two pickles with an index."""
    if form == "safetensors":
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    suffix = {"sharded": "safetensors", "pickle": "bin"}[form]
    stem = {"sharded": "model", "pickle": "pytorch_model"}[form]
    names = sorted(weights)
    index = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"{stem}-{number:05}-of-00002.{suffix}"
        shard = {name: weights[name] for name in part}
        if form == "sharded":
            save_file(shard, folder / file, metadata={"format": "pt"})
        else:
            torch.save(shard, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
