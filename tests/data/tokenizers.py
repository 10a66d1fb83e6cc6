"""Small tokenizers built as those of Vicuna and Mistral (SentencePiece BPE), Llama 3 and Qwen (byte-level BPE) are."""

from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests import factories

CORPUS = [
    "A chat between a curious user and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "USER: What is in the picture? ASSISTANT: A red circle and two dogs.",
    "[INST] Describe the image in detail. [/INST] It shows a street, people and cars. ",
    "system user assistant You are a helpful language and vision assistant.",
    "Wie heißt der große Hund? Er heißt Rex.\n\nline one\nline two",
] * 4


@cache
def sentencepiece() -> PreTrainedTokenizerFast:
    """As Vicuna's and Mistral's: a space is put before every piece of text, also behind special tokens."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    begin = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", begin)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=4096,
    )


@cache
def byte_level(kind: str) -> PreTrainedTokenizerFast:
    """As Llama 3's or Qwen's, ``kind`` llama3 or qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {
        "llama3": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"],
        "qwen": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    }[kind]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    options = {"pad_token": special[-1], "eos_token": special[-1]}
    if kind == "llama3":
        begin = tokenizer.token_to_id(special[0])
        tokenizer.post_processor = processors.TemplateProcessing(
            f"{special[0]} $A", special_tokens=[(special[0], begin)]
        )
        options["bos_token"] = special[0]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **options,
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=4096,
    )


def tokenizer_of(template: str) -> PreTrainedTokenizerFast:
    """The tokenizer of the decoder that a template belongs to."""
    return byte_level(template) if template in ("llama3", "qwen") else sentencepiece()


def processor_of(template: str, kind: str = "llava_next"):
    """The stock processor of ``kind`` over that tokenizer."""
    return factories.processor(kind, tokenizer_of(template))
