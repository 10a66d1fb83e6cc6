"""Conversations as chat-template messages."""

from collections.abc import Sequence

from pmod_cli.data.documents import Document, Turn

Messages = list[dict]


def conversation(document: Document, turns: Sequence[Turn] | None = None) -> Messages:
    """The chat messages of a document: the image with the first question, then answers and questions in turn.

    Args:
        document: what is asked about; its image is not copied into the messages.
        turns: the turns to include, in order; by default all of the document's.

    Raises:
        ValueError: no turn to include.
    """
    turns = document.turns if turns is None else turns
    if not turns:
        raise ValueError("a conversation needs one turn at least")
    messages = []
    for turn in turns:
        messages.append({"role": "user", "content": [{"type": "text", "text": turn.question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    messages[0]["content"].insert(0, {"type": "image"})
    return messages


def question(turn: Turn) -> Messages:
    """The chat messages of one question about an image, to be rendered with ``add_generation_prompt=True``."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": turn.question}]}]


def row(document: Document, turns: Sequence[Turn] | None = None) -> dict:
    """A training row, ``{"images": [image], "messages": messages}``, as the collator takes it."""
    return {"images": [document.image], "messages": conversation(document, turns)}
