"""Text from anywhere, such as a file name, as something that can be shown and written."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Control characters but tab and line feed, what turns the order of letters round, and halves of surrogate pairs, which
# stand for bytes of a file name that are no UTF-8.
_UNFIT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""The text with every character escaped that would move a cursor, change a colour or cannot be encoded.

    ESC becomes `\x1b`, and a byte of a file name that is no UTF-8 becomes `\xff`.
    """
    return _UNFIT.sub(_escaped, text)


def one_of(names: Iterable[str]) -> str:
    """`a, b or c`."""
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    code -= 0xDC00 if 0xDC80 <= code <= 0xDCFF else 0  # how Python holds such a byte
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
