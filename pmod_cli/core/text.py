"""Text and numbers as people read them: names from anywhere made printable, lists in words, sizes in their units.

Units are decimal for FLOPs, files and disks, and binary for memory.
"""

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


MEGA, GIGA, TERA = 10**6, 10**9, 10**12
KIB, MIB, GIB = 2**10, 2**20, 2**30


def percent(part: float, whole: float) -> float:
    """Part of whole in percent; 100 where both are nothing."""
    return 100 * part / whole if whole else 100.0


def disk_size(number: float) -> str:
    """Bytes of files: `512 B`, `3.4 MB`, `14 GB`."""
    return _in_unit(number, 1000, ("B", "kB", "MB", "GB", "TB"))


def memory_size(number: float) -> str:
    """Bytes of memory: `512 B`, `3.4 MiB`, `14 GiB`."""
    return _in_unit(number, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def _in_unit(number: float, factor: int, units: tuple[str, ...]) -> str:
    """Three digits tell what fits: one behind the point below 100, none above, and none that is 0."""
    for unit in units:
        digits = 0 if unit == "B" or number >= 99.95 else 1
        if round(number, digits) < factor or unit == units[-1]:
            return f"{number:,.{digits}f}".removesuffix(".0") + f" {unit}"
        number /= factor
    raise AssertionError("the last unit takes every number")
