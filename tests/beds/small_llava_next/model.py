"""small-llava-next as a folder: SmolLM2 with a vision tower and a projector, their configuration and processor."""

import copy
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    PreTrainedTokenizerBase,
)

from pmod_cli import checkpoints
from pmod_cli.core.errors import PmodError
from pmod_cli.core.folders import settle
from tests.beds.small_llava_next.language_model import load_language_model
from tests.beds.tiny_llava_next import processor as tiny

IMAGE = "<image>"
ROWS = 64  # the rows of the vocabulary are a multiple of this
TEMPLATE = Path(checkpoints.__file__).with_name("chat_templates") / "chatml.jinja"


def build_processor(tokenizer: PreTrainedTokenizerBase, image: Mapping) -> LlavaNextProcessor:
    """The stock LLaVA-NeXT processor; ``image`` holds tile (pixels), patch (pixels) and pinpoints (height, width)."""
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    tokenizer.padding_side = "left"
    return tiny.build_processor(image, tokenizer, TEMPLATE.read_text())


def build_config(decoder: LlamaConfig, processor: LlavaNextProcessor, recipe: Mapping) -> LlavaNextConfig:
    """The configuration; the decoder's vocabulary gets room for ``<image>``."""
    image, tokens = recipe["image"], len(processor.tokenizer)
    decoder.vocab_size = -(-tokens // ROWS) * ROWS
    decoder.dtype = torch.bfloat16
    return LlavaNextConfig(
        text_config=decoder,
        vision_config=CLIPVisionConfig(
            image_size=image["tile"], patch_size=image["patch"], dtype=torch.bfloat16, **recipe["tower"]
        ),
        image_token_index=processor.image_token_id,
        image_grid_pinpoints=image["pinpoints"],
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
        image_seq_length=(image["tile"] // image["patch"]) ** 2,
        tie_word_embeddings=True,
        architectures=["LlavaNextForConditionalGeneration"],
        dtype=torch.bfloat16,
    )


def write(
    folder: Path,
    recipe: Mapping,
    vision: Mapping[str, Tensor] | None = None,
    updates: Mapping[str, Tensor] | None = None,
    finish: Callable[[Path], None] = lambda staged: None,
) -> None:
    """Write the model as a stock checkpoint folder, under another name until it is whole.

    Args:
        folder: must not be there yet.
        vision: the tensors of tower, projector and newline, by the names of the file; without them they get a random
            start.
        updates: what is added to tensors of the decoder, float64, by the same names.
        finish: gets the folder with all its files before it has its name.

    Raises:
        PmodError: ``folder`` is there, or the language model cannot be installed.
    """
    if folder.exists():
        raise PmodError(f"{folder} exists", hint="choose another folder")
    decoder, weights, tokenizer = load_language_model()
    processor = build_processor(tokenizer, recipe["image"])
    config = build_config(decoder, processor, recipe)
    weights.pop("lm_head.weight", None)  # tied: it is the embedding
    if vision is None:
        newline = tokenizer("\n", add_special_tokens=False).input_ids[0]
        vision = random_vision(config) | {"image_newline": weights["model.embed_tokens.weight"][newline]}
    tensors = dict(vision)
    for name, tensor in weights.items():
        name = f"language_model.{name}"
        if name.endswith("embed_tokens.weight"):
            new_rows = config.text_config.vocab_size - len(tensor)
            tensor = torch.cat([tensor, tensor.new_zeros(new_rows, tensor.shape[1])])
        tensors[name] = tensor + updates[name] if updates and name in updates else tensor
    tensors = {name: tensors[name].to(torch.bfloat16).contiguous() for name in sorted(tensors)}
    folder.parent.mkdir(parents=True, exist_ok=True)
    staged = folder.with_name(f".{folder.name}.{os.getpid()}")
    staged.mkdir()
    try:
        save_file(tensors, staged / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(staged)
        processor.save_pretrained(staged)
        finish(staged)
        settle(staged, like=staged / "config.json")
        staged.rename(folder)
    except BaseException:
        shutil.rmtree(staged)
        raise


def random_vision(config: LlavaNextConfig) -> dict[str, Tensor]:
    """Tower and projector at a random start with variance one over the inputs; the caller seeds torch."""
    small = copy.deepcopy(config)
    small.text_config.num_hidden_layers, small.text_config.vocab_size = 1, ROWS
    model = LlavaNextForConditionalGeneration(small)
    for part in (model.model.vision_tower, model.model.multi_modal_projector):
        for module in part.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return vision_tensors(model)


def load(folder: Path) -> tuple[LlavaNextForConditionalGeneration, LlavaNextProcessor]:
    """Model, bfloat16, and processor of a folder."""
    model = LlavaNextForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
    return model, AutoProcessor.from_pretrained(folder)


def vision_tensors(model: LlavaNextForConditionalGeneration) -> dict[str, Tensor]:
    """The parameters of tower, projector and newline, bfloat16, by the names of the file."""
    found = {name.removeprefix("model."): tensor for name, tensor in model.named_parameters() if is_vision(name)}
    return {name: tensor.detach().to(torch.bfloat16) for name, tensor in found.items()}


def is_vision(name: str) -> bool:
    """Whether a parameter of the model belongs to tower, projector or newline."""
    return not name.startswith(("model.language_model.", "lm_head."))


@contextmanager
def projected(model: LlavaNextForConditionalGeneration) -> Iterator[list[Tensor]]:
    """A list that gets what the projector gives while the block runs: (P, D), base view and tiles of each image."""
    seen = []
    hook = model.model.multi_modal_projector.register_forward_hook(lambda _, args, out: seen.append(out.flatten(0, 1)))
    try:
        yield seen
    finally:
        hook.remove()
