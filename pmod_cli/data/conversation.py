"""One row of training data: who says what, which images go where, and how these are opened."""

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image

from pmod_cli.core.errors import PmodError
from pmod_cli.core.images import as_rgb, load_image

if TYPE_CHECKING:
    from transformers import ProcessorMixin


IMAGE = "<image>"  # stands in a turn's text where an image goes
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
class Turn:
    """What one side says; ``<image>`` marks the places of images in ``text``."""

    role: Role
    text: str


@dataclass(frozen=True)
class Conversation:
    """The turns, and in the order of their places the images: file names, encoded bytes or PIL images."""

    turns: tuple[Turn, ...]
    images: tuple[Any, ...] = ()


def from_llava(row: Any, *, answered: bool = True) -> Conversation:
    """A row of LLaVA's own JSON: ``{"image": name or names, "conversations": [{"from": …, "value": …}, …]}``.

    As in the published code (``preprocess_multimodal``), the image of a turn is moved to its front, on a line of its
    own. A turn with several images keeps them where they are.

    Args:
        answered: Whether it has to hold an answer, to learn from.

    Raises:
        BadRow: what is missing or wrong in it.
    """
    turns = _turns(row, "conversations", "from", "value")
    images = row.get("image")
    images = () if images is None else (images,) if isinstance(images, str) else images
    if not isinstance(images, list | tuple) or not all(isinstance(name, str) and name for name in images):
        raise BadRow(f"'image': expected a file name or a list of them, found {row['image']!r:.60}")
    if images:
        turns = [Turn(turn.role, _image_first(turn.text)) for turn in turns]
    return _checked(turns, images, answered)


def from_messages(row: Any, *, answered: bool = True) -> Conversation:
    """A row with ``messages`` (``content``: text, or parts of type ``image`` and ``text``) and ``images``.

    Args:
        answered: Whether it has to hold an answer, to learn from.

    Raises:
        BadRow: what is missing or wrong in it.
    """
    turns = _turns(row, "messages", "role", "content")
    images = row.get("images") or ()
    return _checked(turns, images if isinstance(images, list | tuple) else [images], answered)


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


def _turns(row: Any, key: str, role_key: str, text_key: str) -> list[Turn]:
    if not isinstance(row, Mapping):
        raise BadRow(f"expected an object, found {_kind(row)}")
    if not isinstance(said := row.get(key), list):
        raise BadRow(f"'{key}': expected a list, found {_kind(said)}")
    return [_turn(number, turn, role_key, text_key) for number, turn in enumerate(said)]


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


def _checked(turns: list[Turn], images: Sequence[Any], answered: bool) -> Conversation:
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


LONGEST_PADDED_SIDE = 8192  # pixels: a longer side is reduced before padding, since a square of it is huge


def open_image(source: Any, folder: Path | None = None) -> Image.Image:
    """An RGB image, opened as in every other verb (`pmod_cli.core.images`).

    Args:
        source: a file name below ``folder``, encoded bytes, or a PIL image.

    Raises:
        BadRow: no such file, one outside the folder, not an image, cut off, or too large to decode safely.
    """
    if isinstance(source, Image.Image):
        return as_rgb(source)
    try:
        if isinstance(source, str):
            return load_image(find_image(source, folder), source).pixels
        if isinstance(source, bytes):
            return load_image(source, "its image").pixels
        raise BadRow(f"expected an image, its bytes or a file name, found {type(source).__name__}")
    except BadRow:
        raise
    except PmodError as error:
        raise BadRow(error.what) from None


def find_image(name: str, folder: Path | None) -> Path:
    """The file ``name`` of the image folder.

    Raises:
        BadRow: there is none, or it lies outside the folder.
    """
    path = inside(name, folder)
    if not os.path.exists(path):  # False for a name that is too long, where `Path.exists` raises
        raise BadRow(f"no such image: {name}, in {folder}")
    return path


def inside(name: str, folder: Path | None) -> Path:
    """The path of ``name`` in the image folder, there or not. Raises BadRow where it lies outside."""
    relative = Path(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise BadRow(f"{name} lies outside the image folder")
    return (folder or Path()) / relative


def reduced(image: Image.Image, padded: bool) -> Image.Image:
    """The image, smaller by a whole factor where padding it to a square would take gigabytes."""
    longest = max(image.size)
    if not padded or longest <= LONGEST_PADDED_SIDE:
        return image
    factor = -(-longest // LONGEST_PADDED_SIDE)
    return image.resize([max(1, side // factor) for side in image.size], Image.Resampling.BICUBIC)


def is_anyres(processor: "ProcessorMixin") -> bool:
    """Whether the processor cuts images into tiles (LLaVA-NeXT)."""
    return hasattr(processor.image_processor, "image_grid_pinpoints")


def padding_processor(processor: "ProcessorMixin") -> "ProcessorMixin":
    """A LLaVA-1.5 processor that pads images to a square with their mean colour, as LLaVA-1.5 was trained.

    The processors of the Hugging Face LLaVA-1.5 checkpoints crop the centre instead. Save the one returned here with
    the trained model, so that it sees in use what it saw in training. LLaVA-NeXT's is returned as it is.
    """
    images = processor.image_processor
    if is_anyres(processor) or getattr(images, "do_pad", False):
        return processor
    if type(images).__name__.endswith("Pil"):
        from transformers import LlavaImageProcessorPil as Padding
    else:
        from transformers import LlavaImageProcessor as Padding
    settings = {key: value for key, value in images.to_dict().items() if hasattr(Padding, key)}
    padding = copy.copy(processor)
    padding.image_processor = Padding(**{**settings, "do_pad": True})
    return padding
