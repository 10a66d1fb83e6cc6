"""Conversation templates: the text of a conversation, and which of its tokens are learned.

The templates and the labels are those of the published LLaVA code (``llava/conversation.py`` and ``preprocess_*`` in
``llava/train/train.py`` of LLaVA and LLaVA-NeXT), token for token. Three things about them may surprise:

- ``vicuna_v1`` and ``mistral`` cut the text at its separators. Where that does not come out even (a separator inside
  somebody's words, a question or an empty answer at the end), the whole row is given no label.
- ``llama3`` and ``qwen`` also learn the assistant's header, and the special tokens of every turn.
- ``auto`` learns what the processor's own ``{% generation %}`` blocks hold. Where a template has none, as Qwen-VL's, it
  learns what each answer adds to the text, its end of turn included.
- An empty answer in the middle of a ``vicuna_v1`` or ``mistral`` conversation has no end-of-turn token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from pmod_cli.core.errors import PmodError
from pmod_cli.data.conversation import IMAGE, BadRow, ChatTurn
from pmod_cli.data.own_template import OwnTemplate
from pmod_cli.data.rendered import Rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

TEMPLATES = ("auto", "vicuna_v1", "mistral", "llama3", "qwen", "plain")

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
LLAMA3_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
QWEN_SYSTEM = "You are a helpful assistant."


def renderer(name: str, processor: "ProcessorMixin") -> Callable[[Sequence[ChatTurn]], Rendered]:
    """How the template ``name``, one of ``TEMPLATES``, turns a conversation into text.

    Raises:
        PmodError: unknown name, special tokens that the tokenizer lacks, or for ``auto`` a chat template that does
            not mark what the assistant says.
    """
    tokenizer = processor.tokenizer
    if name == "auto":
        return OwnTemplate(processor)
    if processor.image_token != IMAGE:
        raise PmodError(
            f"template {name} is one of LLaVA models, whose images stand at {IMAGE}; this one has "
            f"{processor.image_token}",
            hint="set data.template to auto: the processor's own chat template",
        )
    if name in ("vicuna_v1", "mistral"):
        _require(tokenizer, name, ["</s>"])
        return _vicuna if name == "vicuna_v1" else _mistral
    if name == "plain":
        return _plain
    if name == "llama3":
        _require(tokenizer, name, LLAMA3_SPECIAL)
        blank_line = tokenizer.convert_tokens_to_ids("\n\n")  # None, or unknown, in Llama 3's own vocabulary
        learned = [tokenizer.convert_tokens_to_ids(token) for token in LLAMA3_SPECIAL]
        learned += [blank_line] if blank_line not in (None, tokenizer.unk_token_id) else []
        return partial(_headed, style=LLAMA3, learned=learned)
    if name == "qwen":
        _require(tokenizer, name, QWEN_SPECIAL)
        learned = [tokenizer.convert_tokens_to_ids(token) for token in QWEN_SPECIAL]
        learned += tokenizer("\n", add_special_tokens=False).input_ids
        return partial(_headed, style=QWEN, learned=learned)
    raise PmodError(f"unknown conversation template {name!r}: expected one of {', '.join(TEMPLATES)}")


class _Text:
    """Text under construction, with the ranges that are learned."""

    def __init__(self, text: str = "") -> None:
        self.text = text
        self.learned: list[tuple[int, int]] = []

    def add(self, text: str, learned: bool = False) -> None:
        if learned and text:
            self.learned.append((len(self.text), len(self.text) + len(text)))
        self.text += text


def _vicuna(turns: Sequence[ChatTurn]) -> Rendered:
    system, turns = _split(turns, VICUNA_SYSTEM)
    _must_alternate(turns)
    text = _Text(f"{system} ")
    for turn in turns:
        if turn.role == "user":
            text.add(f"USER: {turn.text} " if turn.text else "USER:")
        else:
            text.add("ASSISTANT:")
            text.add(f" {turn.text}</s>" if turn.text else "", learned=True)
    return Rendered(text.text, text.learned, _first_break(text.text, " ASSISTANT: "), begins=True)


def _mistral(turns: Sequence[ChatTurn]) -> Rendered:
    system, turns = _split(turns, "")
    _must_alternate(turns)
    if not turns[0].text:
        raise BadRow("the first question is empty")
    text = _Text()
    for number, turn in enumerate(turns):
        if turn.role == "user":
            head = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system and number == 0 else ""
            text.add(f"[INST] {head}{turn.text} [/INST]" if turn.text else "")
        else:
            text.add(f" {turn.text} </s>" if turn.text else "", learned=True)
    return Rendered(text.text, text.learned, _first_break(text.text, "[/INST] "), begins=True)


def _first_break(text: str, question_end: str) -> int | None:
    """Where the first stretch between two ``</s>`` begins that is not one question and one answer."""
    start = 0
    rounds = text.split("</s>")
    if rounds[-1] == "":
        del rounds[-1]
    for stretch in rounds:
        if len(stretch.split(question_end)) != 2:
            return start
        start += len(stretch) + len("</s>")
    return None if text.endswith("</s>") else start - len("</s>")


def _plain(turns: Sequence[ChatTurn]) -> Rendered:
    """The image and its caption, without the question: what the projector is pre-trained on."""
    if len(turns) != 2 or IMAGE not in turns[0].text:
        raise BadRow("template plain: expected one question with an image, and one answer")
    text = _Text(IMAGE)
    text.add(f"{turns[1].text}\n", learned=True)
    return Rendered(text.text, text.learned, begins=True)


@dataclass(frozen=True)
class _Headers:
    begin: str
    head: str  # takes the role
    end: str
    system: str
    strip: bool


LLAMA3 = _Headers("<|begin_of_text|>", "<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>", LLAMA3_SYSTEM, True)
QWEN = _Headers("", "<|im_start|>{}\n", "<|im_end|>\n", QWEN_SYSTEM, False)
LLAMA3_SPECIAL = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
QWEN_SPECIAL = ["<|im_start|>", "<|im_end|>"]


def _headed(turns: Sequence[ChatTurn], style: _Headers, learned: Sequence[int]) -> Rendered:
    system, turns = _split(turns, style.system)
    text = _Text(style.begin)
    for turn in (ChatTurn("system", system), *turns):
        said = turn.text.strip() if style.strip else turn.text
        text.add(style.head.format(turn.role) + said + style.end, learned=turn.role == "assistant")
    return Rendered(text.text, text.learned, always_learned=frozenset(learned))


def _split(turns: Sequence[ChatTurn], default: str) -> tuple[str, Sequence[ChatTurn]]:
    """The system text, the row's own before the template's, and the other turns."""
    return (turns[0].text, turns[1:]) if turns[0].role == "system" else (default, turns)


def _must_alternate(turns: Sequence[ChatTurn]) -> None:
    for number, turn in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if turn.role != expected:
            raise BadRow(f"two turns of the {turn.role} in a row; this template needs question and answer in turn")


def _require(tokenizer: "PreTrainedTokenizerBase", template: str, tokens: Sequence[str]) -> None:
    known = tokenizer.get_vocab()
    missing = [token for token in tokens if token not in known]
    if missing:
        raise PmodError(
            f"template {template} needs {', '.join(missing)}, which this model's tokenizer does not have",
            hint="set data.template to the one of the model's decoder, or to auto",
        )
