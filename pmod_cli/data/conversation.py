"""One row of training data: who says what, and which images and videos go where."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pmod_cli.core.errors import PmodError
from pmod_cli.core.images import in_data_url

IMAGE = "<image>"  # stands in a turn's text where an image goes
VIDEO = "<video>"  # the same of a video
PICTURES = ("image", "image_url", "video")  # types of the parts of a message that stand for one
MARKS = re.compile(f"({IMAGE}|{VIDEO})")
Role = Literal["system", "user", "assistant"]
ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


class BadRow(PmodError):
    """A row that cannot be trained on; the message says why."""

    def __init__(self, what: str) -> None:
        # A DataLoader worker hands an exception over as text, with the worker's traceback before it.
        super().__init__(
            what.rsplit(f"{__name__}.{type(self).__name__}: ", 1)[-1].strip(),
            hint="look at all rows with `check_data=True`; leave bad ones out with `data.on_bad_row=skip`",
        )


@dataclass(frozen=True)
class ChatTurn:
    """What one side says; ``<image>`` and ``<video>`` mark the places of images and videos in ``text``."""

    role: Role
    text: str


@dataclass(frozen=True)
class Conversation:
    """The turns, and in the order of their places the images and the videos.

    Attributes:
        turns: Who says what.
        images: File names, encoded bytes or PIL images.
        videos: Names of files or of folders of frames, or lists of the names of frames.
    """

    turns: tuple[ChatTurn, ...]
    images: tuple[Any, ...] = ()
    videos: tuple[Any, ...] = ()


def from_row(row: Any, *, answered: bool = True) -> Conversation:
    """A row of a file: LLaVA's own, or one with ``messages`` as LLaMA-Factory, ms-swift and TRL write them.

    Args:
        answered: Whether it has to hold an answer, to learn from.

    Raises:
        BadRow: what is missing or wrong in it.
    """
    return (from_llava if is_llava(row) else from_messages)(row, answered=answered)


def is_llava(row: Any) -> bool:
    """Whether a row is of LLaVA's own form, or of none; else it has ``messages``, or ``prompt``."""
    return not isinstance(row, Mapping) or "conversations" in row or not ({"messages", "prompt"} & set(row))


def from_llava(row: Any, *, answered: bool = True) -> Conversation:
    """A row of LLaVA's own JSON: ``{"image": name or names, "conversations": [{"from": …, "value": …}, …]}``.

    As in the published code (``preprocess_multimodal``), the image of a turn is moved to its front, on a line of its
    own. A turn with several images keeps them where they are. ``video`` names a video, or several, in the places of
    ``<video>``; where a row has a video and no image, ``<image>`` marks its place too, as in LLaVA-Video's own data.
    ``images`` and ``videos``, as LLaMA-Factory has them, are the same.

    Raises:
        BadRow: what is missing or wrong in it.
    """
    turns = _turns(row, "conversations", "from", "value")
    images, videos = (_names(row, key) for key in ("image", "video"))
    if videos and not images and not any(VIDEO in turn.text for turn in turns):
        turns = [ChatTurn(turn.role, turn.text.replace(IMAGE, VIDEO)) for turn in turns]
    if images or videos:
        marks = [mark for mark, pictures in ((IMAGE, images), (VIDEO, videos)) if pictures]
        turns = [ChatTurn(turn.role, _image_first(turn.text, marks)) for turn in turns]
    return _checked(turns, images, videos, answered)


def from_messages(row: Any, *, answered: bool = True) -> Conversation:
    """A row with ``messages``, and ``images`` and ``videos`` in the order of their places; or one as ``image``.

    ``content`` is text with ``<image>`` and ``<video>`` (LLaMA-Factory, ms-swift), or parts of type ``text``,
    ``image`` and ``video`` (TRL) or ``image_url`` (OpenAI: a file name or a data URL), which may name their picture
    themselves. Where no place is marked, pictures stand in front of the first question. TRL's ``prompt`` and
    ``completion`` are one conversation.

    Raises:
        BadRow: what is missing or wrong in it.
    """
    if isinstance(row, Mapping) and "messages" not in row and "prompt" in row:
        row = {**row, "messages": _joined(row)}
    named: dict[str, list[Any]] = {IMAGE: [], VIDEO: []}
    turns = _turns(row, "messages", "role", "content", named)
    images = [*named[IMAGE]] or _listed(row, "image")
    videos = [*named[VIDEO]] or _listed(row, "video")
    if (images or videos) and not any(MARKS.search(turn.text) for turn in turns):
        marks = f"{IMAGE}\n" * len(images) + f"{VIDEO}\n" * len(videos)
        first = next((number for number, turn in enumerate(turns) if turn.role == "user"), None)
        if first is not None:
            turns[first] = ChatTurn("user", marks + turns[first].text)
    return _checked(turns, images, videos, answered)


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


def _joined(row: Mapping) -> Any:
    prompt, completion = row["prompt"], row.get("completion")
    if not isinstance(prompt, list) or not isinstance(completion, list):
        raise BadRow("'prompt' and 'completion': expected two lists of messages")
    if any(isinstance(turn, Mapping) and turn.get("role") == "assistant" for turn in prompt):
        raise BadRow("'prompt' holds an answer; only conversations all of whose answers are learned can be read")
    return [*prompt, *completion]


def _names(row: Mapping, key: str) -> Sequence[Any]:
    """The value of ``key``, or of ``key`` with an s, as a list of file names; a video may be a list of its frames."""
    given = row.get(key) if row.get(key) is not None else row.get(f"{key}s")
    found = () if given is None else (given,) if isinstance(given, str) else given
    if not isinstance(found, list | tuple) or not all(_is_name(name, key) for name in found):
        raise BadRow(f"'{key}': expected a file name or a list of them, found {given!r:.60}")
    return [_payload(name) for name in found]


def _is_name(value: Any, key: str) -> bool:
    if key == "video" and isinstance(value, list) and value:
        return all(isinstance(name, str) and name for name in value)
    return isinstance(value, str) and bool(value)


def _listed(row: Mapping, key: str) -> Sequence[Any]:
    """The value of ``key`` with an s, or of ``key``, as a list."""
    found = row.get(f"{key}s") or row.get(key) or ()
    found = found if isinstance(found, list | tuple) else [found]
    return [_payload(each) for each in found]


def _payload(picture: Any) -> Any:
    """A name or bytes, also where they stand in an object, as hub data sets, ms-swift and OpenAI have them."""
    if isinstance(picture, Mapping):
        picture = picture.get("bytes") or picture.get("path") or picture.get("url") or picture
    if not isinstance(picture, str) or not picture.startswith("data:"):
        return picture
    try:
        return in_data_url(picture)
    except ValueError as error:
        raise BadRow(str(error)) from None


def _turns(
    row: Any, key: str, role_key: str, text_key: str, named: dict[str, list[Any]] | None = None
) -> list[ChatTurn]:
    if not isinstance(row, Mapping):
        raise BadRow(f"expected an object, found {_kind(row)}")
    if not isinstance(said := row.get(key), list):
        raise BadRow(f"'{key}': expected a list, found {_kind(said)}")
    return [_turn(number, turn, role_key, text_key, named) for number, turn in enumerate(said)]


def _turn(number: int, turn: Any, role_key: str, text_key: str, named: dict[str, list[Any]] | None) -> ChatTurn:
    if not isinstance(turn, Mapping) or role_key not in turn or text_key not in turn:
        raise BadRow(f"turn {number}: expected an object with '{role_key}' and '{text_key}'")
    role, text = turn[role_key], turn[text_key]
    if not isinstance(role, str) or role not in ROLES:
        raise BadRow(f"turn {number}: unknown role {role!r:.40}; expected one of {', '.join(ROLES)}")
    if isinstance(text, list):
        text = "".join(_part(number, part, named) for part in text)
    if not isinstance(text, str):
        raise BadRow(f"turn {number}: '{text_key}': expected text, found {_kind(text)}")
    return ChatTurn(ROLES[role], text)


def _part(number: int, part: Any, named: dict[str, list[Any]] | None) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind in PICTURES:
        mark = VIDEO if kind == "video" else IMAGE
        picture = next((part[key] for key in (kind, "path", "url") if part.get(key) is not None), None)
        if picture is not None and named is not None:
            named[mark].append(_payload(picture))
        return f"{mark}\n"
    known = ", ".join(PICTURES)
    raise BadRow(f"turn {number}: expected parts of type {known} or text, found {kind or _kind(part)}")


def _image_first(text: str, marks: Sequence[str]) -> str:
    found = [mark for mark in MARKS.findall(text) if mark in marks]
    if len(found) != 1:
        return text
    return f"{found[0]}\n{text.replace(found[0], '').strip()}".strip()


def _checked(turns: list[ChatTurn], images: Sequence[Any], videos: Sequence[Any], answered: bool) -> Conversation:
    """The row, begun by its user: an answer before the first question is dropped, as in the published code."""
    if not turns:
        raise BadRow("the conversation is empty")
    if any(turn.role == "system" for turn in turns[1:]):
        raise BadRow("a system turn stands within the conversation; expected it as the first")
    first = 1 if turns[0].role == "system" else 0
    if len(turns) > first and turns[first].role == "assistant":
        del turns[first]
    if answered and not any(turn.role == "assistant" for turn in turns):
        raise BadRow("the assistant says nothing, so there is nothing to learn")
    for mark, what, pictures in ((IMAGE, "image", images), (VIDEO, "video", videos)):
        places = sum(turn.text.count(mark) for turn in turns)
        if places != len(pictures) and (what == "image" or pictures):
            raise BadRow(
                f"the row has {_number(len(pictures), what)}, and {_number(places, f'{mark} place')} in its turns"
            )
    return Conversation(tuple(turns), tuple(images), tuple(videos))


def _number(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__
