"""Tokenizer, processor and chat template of a checkpoint whose layout has none that transformers could use."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmod_cli.checkpoints.files import read_json, refuse_outside
from pmod_cli.core.atomic import write_json
from pmod_cli.core.errors import PmodError, first_line
from pmod_cli.families.configs import decoder_kind, known_family

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IMAGE = "<image>"
TEMPLATES = Path(__file__).parent / "chat_templates"
MODEL_FILE = "tokenizer.model"  # SentencePiece: no library writes it, it is only carried on
TOKENIZER_FILES = (
    MODEL_FILE,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
_CLIP = {
    "image_processor_type": "CLIPImageProcessor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 1 / 255,
}
_VOCABULARIES = (MODEL_FILE, "tokenizer.json", "vocab.json")


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer with its image token.

    Attributes:
        tokenizer: None where the source has none; then nobody can say which ids mean what.
        image_token: Id of `<image>`.
        rows: Rows that embedding and lm_head need.
        pad_token: Id of the padding token, if known.
        model_file: tokenizer.model, where there is one.
    """

    tokenizer: PreTrainedTokenizerBase | None
    image_token: int
    rows: int
    pad_token: int | None = None
    model_file: Path | None = None


def holds_tokenizer(folder: Path) -> bool:
    """Whether a folder has the vocabulary of a tokenizer."""
    return any((folder / name).is_file() for name in _VOCABULARIES)


def read_vocabulary(folder: Path, rows: int) -> Vocabulary:
    """Read the tokenizer of a folder and give it an image token, as the Hugging Face layout needs.

    New tokens stand behind the old ones. Where they need rows that the embedding lacks, it grows to a multiple of 64.

    Args:
        folder: Holds the tokenizer's files, or none of them.
        rows: Rows of the embedding.

    Raises:
        PmodError: the files cannot be read.
    """
    if not holds_tokenizer(folder):
        return Vocabulary(None, rows, _grown(rows, rows))
    tokenizer = load_tokenizer(folder)
    from transformers import AddedToken

    tokenizer.add_tokens([AddedToken(IMAGE, special=True, normalized=False)], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": tokenizer.unk_token or "<pad>"})
    image, pad = tokenizer.convert_tokens_to_ids(IMAGE), tokenizer.pad_token_id
    model_file = folder / MODEL_FILE
    found = model_file if model_file.is_file() else None
    return Vocabulary(tokenizer, image, _grown(rows, max(image, pad)), pad, found)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer whose files a folder holds; its config.json, whose model type may be unknown, is not looked at.

    Raises:
        PmodError: the files cannot be read.
    """
    from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

    with tempfile.TemporaryDirectory() as aside:
        for name in TOKENIZER_FILES:
            if (folder / name).is_file():
                refuse_outside(folder, folder / name)
                shutil.copyfile(folder / name, Path(aside, name))
        config = read_json(folder / "tokenizer_config.json") if Path(aside, "tokenizer_config.json").is_file() else {}
        known = isinstance(config.get("tokenizer_class"), str)
        plain = PreTrainedTokenizerFast if (folder / "tokenizer.json").is_file() else LlamaTokenizer
        try:
            return (AutoTokenizer if known else plain).from_pretrained(aside, local_files_only=True)
        except Exception as error:  # the tokenizers library raises plain Exception
            raise PmodError(
                f"the tokenizer in {folder} cannot be read: {first_line(error)}",
                hint="give one that can with `tokenizer=FOLDER`",
            ) from error


def write_processor_files(
    folder: Path, vocabulary: Vocabulary, config: Mapping[str, Any], pixels: Mapping[str, Any], *, pad_to_square: bool
) -> None:
    """Write tokenizer, processor and chat template.

    Args:
        vocabulary: Of the model; nothing is written without a tokenizer.
        config: Stock config in the Hugging Face layout.
        pixels: preprocessor_config.json of the tower.
        pad_to_square: LLaVA-1.5: fill the image up to a square, instead of cropping it.
    """
    if vocabulary.tokenizer is None:
        return
    if vocabulary.model_file:  # beside the new tokenizer.json, for the way back to the original code
        shutil.copyfile(vocabulary.model_file, folder / vocabulary.model_file.name)
    family = known_family(config)
    processor = getattr(import_module(family.module), family.processor or f"{family.classes}Processor")
    side = config["vision_config"]["image_size"]
    options = {key: pixels[key] for key in ("image_mean", "image_std") if key in pixels}
    options |= {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    vocabulary.tokenizer.padding_side = "left"  # what batched generation needs
    processor(
        image_processor=family.image_processor(config, options, pad_to_square),
        tokenizer=vocabulary.tokenizer,
        patch_size=config["vision_config"]["patch_size"],
        vision_feature_select_strategy=config["vision_feature_select_strategy"],
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=(TEMPLATES / f"{_template(vocabulary.tokenizer, config)}.jinja").read_text(encoding="utf-8"),
    ).save_pretrained(folder)


def carry_model_file(source: Path, target: Path) -> None:
    """Copy the tokenizer.model of a checkpoint, if it has one, beside what a processor has saved of its tokenizer."""
    if (source / MODEL_FILE).is_file():
        refuse_outside(source, source / MODEL_FILE)
        shutil.copyfile(source / MODEL_FILE, target / MODEL_FILE)


def clip_preprocessor(folder: Path, side: int) -> dict[str, Any]:
    """preprocessor_config.json of a CLIP tower of `side` pixels, with the mean and deviation of a LLaVA's processor.

    Args:
        folder: Holds the processor's files; without any, the values are those of every OpenAI CLIP.
        side: Of the tower's input in pixels.
    """
    values: dict[str, Any] = {}
    if (folder / "processor_config.json").is_file():
        values = read_json(folder / "processor_config.json").get("image_processor") or {}
    if not values and (folder / "preprocessor_config.json").is_file():
        values = read_json(folder / "preprocessor_config.json")
    kept: dict[str, Any] = {
        key: values[key] for key in ("image_mean", "image_std", "resample", "rescale_factor") if key in values
    }
    flags = ("do_center_crop", "do_convert_rgb", "do_normalize", "do_rescale", "do_resize")
    sizes = {"crop_size": {"height": side, "width": side}, "size": {"shortest_edge": side}}
    return {**_CLIP, **dict.fromkeys(flags, True), **sizes, **kept}


def restore_original(folder: Path, rows: int) -> None:
    """Make a folder's tokenizer the original code's again: no tokens behind the embedding's rows, no processor.

    Args:
        folder: Holds the files as the Hugging Face layout has them.
        rows: Rows of the original embedding.
    """
    for name in ("processor_config.json", "preprocessor_config.json", "chat_template.jinja", "added_tokens.json"):
        (folder / name).unlink(missing_ok=True)
    path = folder / "tokenizer.json"
    removed = {IMAGE}
    if path.is_file():
        state = read_json(path)
        removed |= {token["content"] for token in state["added_tokens"] if token["id"] >= rows}
        state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < rows]
        write_json(path, state)
    path = folder / "tokenizer_config.json"
    if path.is_file():
        config = read_json(path)
        for key in ("extra_special_tokens", "image_token", "processor_class", "chat_template", "backend", "is_local"):
            config.pop(key, None)
        decoder = config.pop("added_tokens_decoder", {})
        config["added_tokens_decoder"] = {key: token for key, token in decoder.items() if int(key) < rows}
        if config.get("pad_token") in removed:
            config["pad_token"] = config.get("unk_token")
        if (folder / MODEL_FILE).is_file():
            config["tokenizer_class"] = "LlamaTokenizer"
        write_json(path, config | {"padding_side": "right"})


def _template(tokenizer: PreTrainedTokenizerBase, config: Mapping[str, Any]) -> str:
    """The conversation form that the family was trained with, told by its special tokens."""
    if (template := decoder_kind(config["text_config"], known_family(config)).template) is not None:
        return template
    known = tokenizer.get_vocab()
    if "<|start_header_id|>" in known:
        return "llama3"
    return "chatml" if "<|im_start|>" in known else "vicuna"


def _grown(rows: int, highest: int) -> int:
    return rows if highest < rows else -(-(highest + 1) // 64) * 64
