"""One row of training data: who says what, and which images go where."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pmod_cli.core.errors import PmodError

IMAGE = "<image>"  # stands in a turn's text where an image goes
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class BadRow(PmodError):
    """A row that cannot be trained on; the message says why."""

    def __init__(self, what: str) -> None:
        # A DataLoader worker hands an exception over as text, with the worker's traceback before it.
        super().__init__(
            what.rsplit(f"{__name__}.{type(self).__name__}: ", 1)[-1].strip(),
            hint="look at all rows with `check_data=True`; leave bad ones out with `data.on_bad_row=skip`",
        )


@dataclass(frozen=True)
class Turn:
    """What one side says; ``<image>`` marks the places of images in ``text``."""

    role: Literal["system", "user", "assistant"]
    text: str


@dataclass(frozen=True)
class Conversation:
    """The turns, and in the order of their places the images: file names, encoded bytes or PIL images."""

    turns: tuple[Turn, ...]
    images: tuple[Any, ...] = ()


def from_llava(row: Any) -> Conversation:
    """A row of LLaVA's own JSON: ``{"image": name or names, "conversations": [{"from": …, "value": …}, …]}``.

    As in the published code (``preprocess_multimodal``), the image of a turn is moved to its front, on a line of its
    own. A turn with several images keeps them where they are.

    Raises:
        BadRow: what is missing or wrong in it.
    """
    if not isinstance(row, Mapping):
        raise BadRow(f"expected an object, found {_kind(row)}")
    images = row.get("image")
    images = () if images is None else (images,) if isinstance(images, str) else images
    if not isinstance(images, list | tuple) or not all(isinstance(name, str) and name for name in images):
        raise BadRow(f"'image': expected a file name or a list of them, found {row['image']!r:.60}")
    said = row.get("conversations")
    if not isinstance(said, list):
        raise BadRow(f"'conversations': expected a list, found {_kind(said)}")
    turns = [_turn(number, turn, "from", "value") for number, turn in enumerate(said)]
    if images:
        turns = [Turn(turn.role, _image_first(turn.text)) for turn in turns]
    return _checked(turns, images)


def from_messages(row: Any) -> Conversation:
    """A row with ``messages`` (``content``: text, or parts of type ``image`` and ``text``) and ``images``.

    Raises:
        BadRow: what is missing or wrong in it.
    """
    if not isinstance(row, Mapping):
        raise BadRow(f"expected an object, found {_kind(row)}")
    said, images = row.get("messages"), row.get("images")
    if not isinstance(said, list):
        raise BadRow(f"'messages': expected a list, found {_kind(said)}")
    if images is not None and not isinstance(images, list | tuple):
        images = [images]
    return _checked([_turn(number, turn, "role", "content") for number, turn in enumerate(said)], images or ())


def length_of(conversation: Mapping, said: str, text: str, images: bool) -> int:
    """Words of a row, negative where it has no image: what batches are grouped by, as in the published code.

    Never 0, and never an error: a broken row counts as one word, and is reported when it is read.
    """
    turns = conversation.get(said) if isinstance(conversation, Mapping) else None
    words = 0
    for turn in turns if isinstance(turns, list) else ():
        value = turn.get(text) if isinstance(turn, Mapping) else None
        for part in value if isinstance(value, list) else (value,):
            part = part.get("text") if isinstance(part, Mapping) else part
            words += len(part.split()) if isinstance(part, str) else 0
    return max(words, 1) * (1 if images else -1)


def _turn(number: int, turn: Any, role_key: str, text_key: str) -> Turn:
    if not isinstance(turn, Mapping) or role_key not in turn or text_key not in turn:
        raise BadRow(f"turn {number}: expected an object with '{role_key}' and '{text_key}'")
    role, text = turn[role_key], turn[text_key]
    if not isinstance(role, str) or role not in ROLES:
        raise BadRow(f"turn {number}: unknown role {role!r:.40}; expected one of {', '.join(ROLES)}")
    if isinstance(text, list):
        text = "".join(_part(number, part) for part in text)
    if not isinstance(text, str):
        raise BadRow(f"turn {number}: '{text_key}': expected text, found {_kind(text)}")
    return Turn(ROLES[role], text)


def _part(number: int, part: Any) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "image":
        return f"{IMAGE}\n"
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise BadRow(f"turn {number}: expected parts of type image or text, found {kind or _kind(part)}")


def _image_first(text: str) -> str:
    if text.count(IMAGE) != 1:
        return text
    return f"{IMAGE}\n{text.replace(IMAGE, '').strip()}".strip()


def _checked(turns: list[Turn], images: Sequence[Any]) -> Conversation:
    """The row, begun by its user: an answer before the first question is dropped, as in the published code."""
    if not turns:
        raise BadRow("the conversation is empty")
    if any(turn.role == "system" for turn in turns[1:]):
        raise BadRow("a system turn stands within the conversation; expected it as the first")
    first = 1 if turns[0].role == "system" else 0
    if len(turns) > first and turns[first].role == "assistant":
        del turns[first]
    if not any(turn.role == "assistant" for turn in turns):
        raise BadRow("the assistant says nothing, so there is nothing to learn")
    places = sum(turn.text.count(IMAGE) for turn in turns)
    if places != len(images):
        raise BadRow(
            f"the row has {_number(len(images), 'image')}, and {_number(places, f'{IMAGE} place')} in its turns"
        )
    return Conversation(tuple(turns), tuple(images))


def _number(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__
