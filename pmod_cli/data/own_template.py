"""A processor's own chat template as a template of training: which of its text is learned."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pmod_cli.core import chat
from pmod_cli.core.errors import PmodError
from pmod_cli.data.conversation import IMAGE, MARKS, VIDEO, BadRow, ChatTurn
from pmod_cli.data.rendered import Rendered

if TYPE_CHECKING:
    from transformers import ProcessorMixin


class OwnTemplate:
    """The processor's own chat template; calling it renders a conversation.

    ``{% generation %}`` blocks mark what is learned. In a template that has none, it is what an answer adds to the text
    that ends where the answer begins.

    Raises:
        PmodError: the template neither marks the assistant's words nor puts each answer behind what was said before.
    """

    def __init__(self, processor: "ProcessorMixin") -> None:
        self.template = processor.chat_template or ""
        self.variables = processor.tokenizer.special_tokens_map
        self.begin = processor.tokenizer.bos_token
        self.image = processor.image_token
        self.has_videos = getattr(processor, "video_token", None) is not None
        self.is_marked = "{% generation %}" in self.template.replace("{%-", "{%")
        if not self.is_marked and not self._grows():
            raise PmodError(
                "the chat template of this processor does not mark the assistant's words",
                hint="choose data.template, or put {% generation %} … {% endgeneration %} around them in "
                "chat_template.jinja",
            )
        self.in_order = self._keeps_order()

    def __call__(self, turns: Sequence[ChatTurn]) -> Rendered:
        """The conversation as text. Raises BadRow where the template refuses it, or puts an answer elsewhere."""
        messages = [{"role": turn.role, "content": self._parts(turn.text)} for turn in turns]
        try:
            if self.is_marked:
                text, spans = self._rendered(messages, return_assistant_tokens_mask=True)
            else:
                (text, _), spans = self._rendered(messages), self._answers(messages)
        except PmodError as fault:  # such as a template that takes no system turn
            raise BadRow(fault.what) from None
        begins = not (self.begin and text.startswith(self.begin))
        return Rendered(text, list(spans), overlapping=self.is_marked, begins=begins)

    def _rendered(self, messages: Sequence[dict], **options: Any) -> tuple[str, Any]:
        """The text, and with ``return_assistant_tokens_mask`` its spans between the marks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        texts, spans = chat.rendered(
            lambda: render_jinja_template(
                conversations=[messages], chat_template=self.template, **options, **self.variables
            ),
            text_of=lambda made: made[0][0],
        )
        return texts[0], spans[0] if len(spans) else ()

    def _answers(self, messages: Sequence[dict]) -> list[tuple[int, int]]:
        """The spans of a template without marks."""
        spans, whole = [], self._rendered(messages)[0]
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self._rendered(messages[:number], add_generation_prompt=True)[0]
                after = self._rendered(messages[: number + 1])[0]
                if not (after.startswith(before) and whole.startswith(after)):
                    raise BadRow("the chat template does not put this answer behind the text that asks for it")
                spans.append((len(before), len(after)))
        return spans

    def _grows(self) -> bool:
        """Whether the text of a conversation begins with that of its first turns: an answer is what is added."""
        asked, said = ({"role": role, "content": [{"type": "text", "text": "1"}]} for role in ("user", "assistant"))
        try:
            answers = self._answers([asked, said, asked, said]) if self.template else []
        except BadRow:
            return False
        return len(answers) == 2 and all(start < end for start, end in answers)

    def _keeps_order(self) -> bool:
        """Whether the template writes images where they stand among the words, and not in front of them."""
        parts = [{"type": "text", "text": "before"}, {"type": "image"}, {"type": "text", "text": "behind"}]
        text = self._rendered([{"role": "user", "content": parts}])[0].partition(self.image)
        return "before" in text[0] and "behind" in text[2]

    def _parts(self, text: str) -> list[dict[str, Any]]:
        """A turn as parts of a message: in their order, or images and videos first where the template has them so.

        The line break behind a mark goes with it: it is how LLaVA's rows are written.
        """
        marks = MARKS if self.has_videos else re.compile(f"({IMAGE})")
        kinds = {IMAGE: {"type": "image"}, VIDEO: {"type": "video"}}
        if self.in_order:
            pieces = re.split(f"{marks.pattern}\n?", text)
            return [kinds.get(piece, {"type": "text", "text": piece}) for piece in pieces if piece]
        rest = re.sub(f"{marks.pattern}\n|{marks.pattern}", "", text)
        return [kinds[mark] for mark in marks.findall(text)] + ([{"type": "text", "text": rest}] if rest else [])
