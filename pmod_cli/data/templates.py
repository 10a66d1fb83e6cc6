"""Conversation templates: the text of a conversation, and which of its tokens are learned.

The templates and the labels are those of the published LLaVA code (``llava/conversation.py`` and ``preprocess_*`` in
``llava/train/train.py`` of LLaVA and LLaVA-NeXT), token for token. Three things about them may surprise:

- ``vicuna_v1`` and ``mistral`` cut the text at its separators. Where that does not come out even (a separator inside
  somebody's words, a question or an empty answer at the end), the whole row is given no label.
- ``llama3`` and ``qwen`` also learn the assistant's header, and the special tokens of every turn.
- An empty answer in the middle of a ``vicuna_v1`` or ``mistral`` conversation has no end-of-turn token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from pmod_cli.core import chat
from pmod_cli.core.errors import PmodError
from pmod_cli.data.conversation import IMAGE, BadRow, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

IGNORED = -100  # the label cross-entropy skips
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


@dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    Attributes:
        text: with ``<image>`` in the places of images.
        learned: [start, end) character ranges that are learned.
        broken_at: from here on the text cannot be cut into rounds; None where all of it can.
        always_learned: tokens that are learned wherever they stand.
        begins: whether the tokenizer's beginning-of-sequence token has to be put before it.
    """

    text: str
    learned: list[tuple[int, int]]
    broken_at: int | None = None
    always_learned: frozenset[int] = field(default_factory=frozenset)
    begins: bool = False


@dataclass(frozen=True)
class Encoded:
    """A conversation as N tokens, each image one ``image`` token yet.

    Attributes:
        ids: int64 (N,).
        labels: int64 (N,), -100 where nothing is learned.
        images: positions of the images.
    """

    ids: np.ndarray
    labels: np.ndarray
    images: np.ndarray


def renderer(name: str, processor: "ProcessorMixin") -> Callable[[Sequence[Turn]], Rendered]:
    """How the template ``name``, one of ``TEMPLATES``, turns a conversation into text.

    Raises:
        PmodError: unknown name, special tokens that the tokenizer lacks, or for ``auto`` a chat template that does
            not mark what the assistant says.
    """
    tokenizer = processor.tokenizer
    if name == "auto":
        return _Own(processor)
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


def encode(rendered: Rendered, tokenizer: "PreTrainedTokenizerBase", limit: int | None = None) -> Encoded:
    """Tokens and labels of a conversation.

    The pieces between images are tokenized each for itself, as in the published code.

    Args:
        tokenizer: a fast one, since it has to tell where in the text each token comes from.
        limit: ``max_length`` of the run. A text that breaks only beyond it keeps the labels before.
    """
    pieces = rendered.text.split(IMAGE)
    offsets = accumulate((len(piece) + len(IMAGE) for piece in pieces[:-1]), initial=0)
    ids, starts, images = [], [], []
    if rendered.begins:
        ids += tokenizer("").input_ids
        starts += [-1] * len(ids)
    # A tokenizer may not tell where in an empty text a token comes from.
    found = tokenizer(pieces, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    for number, (piece_ids, piece_offsets, offset) in enumerate(
        zip(found.input_ids, found.offset_mapping, offsets, strict=True)
    ):
        if number:
            images.append(len(ids))
            ids.append(-1)
            starts.append(offset - 1)
        ids += piece_ids
        starts += [offset + start for start, _ in piece_offsets]
    ids, starts = np.array(ids, dtype=np.int64), np.array(starts, dtype=np.int64)
    bounds = [edge for span in rendered.learned for edge in span]
    learned = np.searchsorted(bounds, starts, side="right") % 2 == 1
    if rendered.always_learned:
        learned |= np.isin(ids, list(rendered.always_learned))
    learned[images] = False
    if rendered.broken_at is not None:
        whole = int((starts < rendered.broken_at).sum())
        learned[whole if limit is not None and whole >= limit else 0 :] = False
    return Encoded(ids, np.where(learned, ids, IGNORED), np.array(images, dtype=np.int64))


class _Text:
    """Text under construction, with the ranges that are learned."""

    def __init__(self, text: str = "") -> None:
        self.text = text
        self.learned: list[tuple[int, int]] = []

    def add(self, text: str, learned: bool = False) -> None:
        if learned and text:
            self.learned.append((len(self.text), len(self.text) + len(text)))
        self.text += text


def _vicuna(turns: Sequence[Turn]) -> Rendered:
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


def _mistral(turns: Sequence[Turn]) -> Rendered:
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


def _plain(turns: Sequence[Turn]) -> Rendered:
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


def _headed(turns: Sequence[Turn], style: _Headers, learned: Sequence[int]) -> Rendered:
    system, turns = _split(turns, style.system)
    text = _Text(style.begin)
    for turn in (Turn("system", system), *turns):
        said = turn.text.strip() if style.strip else turn.text
        text.add(style.head.format(turn.role) + said + style.end, learned=turn.role == "assistant")
    return Rendered(text.text, text.learned, always_learned=frozenset(learned))


class _Own:
    """The processor's own chat template; ``{% generation %}`` blocks mark what is learned."""

    def __init__(self, processor: "ProcessorMixin") -> None:
        self.template = processor.chat_template or ""
        self.variables = processor.tokenizer.special_tokens_map
        self.begin = processor.tokenizer.bos_token
        if "{% generation %}" not in self.template.replace("{%-", "{%"):
            raise PmodError(
                "the chat template of this processor does not mark the assistant's words",
                hint="choose data.template, or put {% generation %} … {% endgeneration %} around them in "
                "chat_template.jinja",
            )

    def __call__(self, turns: Sequence[Turn]) -> Rendered:
        from transformers.utils.chat_template_utils import render_jinja_template

        messages = [{"role": turn.role, "content": _parts(turn.text)} for turn in turns]
        texts, spans = chat.rendered(
            lambda: render_jinja_template(
                conversations=[messages],
                chat_template=self.template,
                return_assistant_tokens_mask=True,
                **self.variables,
            ),
            text_of=lambda made: made[0][0],
        )
        return Rendered(texts[0], list(spans[0]), begins=not (self.begin and texts[0].startswith(self.begin)))


def _parts(text: str) -> list[dict[str, Any]]:
    """Chat templates put the images of a turn before its text."""
    rest = text.replace(f"{IMAGE}\n", "").replace(IMAGE, "")
    return [{"type": "image"}] * text.count(IMAGE) + ([{"type": "text", "text": rest}] if rest else [])


def _split(turns: Sequence[Turn], default: str) -> tuple[str, Sequence[Turn]]:
    """The system text, the row's own before the template's, and the other turns."""
    return (turns[0].text, turns[1:]) if turns[0].role == "system" else (default, turns)


def _must_alternate(turns: Sequence[Turn]) -> None:
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
