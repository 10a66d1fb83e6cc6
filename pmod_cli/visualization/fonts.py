"""Which installed fonts draw a text: the usual one, and behind it those that have what it lacks, such as 漢字."""

from __future__ import annotations

import unicodedata
from functools import cache

from matplotlib.font_manager import FontEntry, FontProperties, findfont, fontManager
from matplotlib.ft2font import FT2Font

USUAL = "sans-serif"  # as matplotlib is set up; its own DejaVu Sans where nobody set it


@cache
def families(text: str) -> tuple[str, ...]:
    """Names of fonts in the order in which matplotlib looks for each letter."""
    return _search(_lacking(text))[0]


def undrawable(*texts: str | None) -> str:
    """The letters that no installed font has, each once; the picture shows a box for each."""
    lacking = _lacking("".join(filter(None, texts)))
    missing = _search(lacking)[1]
    return "".join(letter for letter in lacking if letter in missing)


def _lacking(text: str) -> str:
    """The letters that the usual font lacks. Marks that only join or vary others are not looked for."""
    known = _letters(findfont(FontProperties(family=[USUAL])))
    letters = dict.fromkeys(letter for letter in text if ord(letter) not in known and not letter.isspace())
    return "".join(letter for letter in letters if unicodedata.category(letter) not in ("Cc", "Cf", "Mn"))


@cache
def _search(letters: str) -> tuple[tuple[str, ...], frozenset[str]]:
    """The families that draw these letters, and the letters that none does."""
    found, left = [USUAL], set(letters)
    for entry in _upright() if left else ():
        own = {letter for letter in left if ord(letter) in _letters(entry.fname)}
        if own:
            found.append(entry.name)
            left -= own
        if not left:
            break
    return tuple(found), frozenset(left)


@cache
def _upright() -> list[FontEntry]:
    """Installed fonts of normal style, plain sans-serif ones first. The Last Resort fonts have nothing but boxes."""
    plain = [entry for entry in fontManager.ttflist if entry.style == "normal" and "Last Resort" not in entry.name]
    return sorted(plain, key=lambda entry: (entry.weight not in (400, "normal", "regular"), "Sans" not in entry.name))


@cache
def _letters(path: str) -> frozenset[int]:
    """Code points of a font; none of one that matplotlib cannot draw, such as emoji that are pictures."""
    try:
        font = FT2Font(path)
    except (OSError, RuntimeError):
        return frozenset()
    return frozenset(font.get_charmap()) if font.scalable else frozenset()
