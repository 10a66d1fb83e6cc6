"""From token ids to text, as they come: what is handed out once is never taken back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\ufffd"  # what a tokenizer gives for the first bytes of a character


class TextStream:
    """The text of one answer, without white space around it and cut at the first stop string.

    Args:
        tokenizer: Of the model.
        stop: Strings that end the answer and are no part of it.

    Attributes:
        stopped: Whether a stop string has come.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, [each for each in stop if each]
        self._ids: list[int] = []
        self._start = self._read = 0  # ids that are decoded again for what they do to later ones; ids already in text
        self._held = ""  # text that a stop string may begin in, or white space that may be the last
        self._begun = False

    def add(self, token: int) -> str:
        """The text that is certain with one more token; often none."""
        self._ids.append(token)
        # A token looks different behind others, so its text is what a piece of the answer grows by.
        before = self._decode(self._ids[self._start : self._read])
        after = self._decode(self._ids[self._start :])
        if len(after) <= len(before) or after.endswith(UNFINISHED):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return self._take(after[len(before) :])

    def end(self) -> str:
        """The text that was still held back."""
        if self.stopped:
            return ""
        before = self._decode(self._ids[self._start : self._read])
        text = self._take(self._decode(self._ids[self._start :])[len(before) :])
        last, self._held = ("" if self.stopped else self._held.rstrip()), ""
        return text + last

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _take(self, text: str) -> str:
        if self.stopped:
            return ""
        held = self._held + text
        if not self._begun:
            held = held.lstrip()
        found = [place for place in (held.find(each) for each in self._stop) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return held[: min(found)].rstrip()
        keep = len(held.rstrip())
        for each in self._stop:
            keep = min([keep, *(len(held) - n for n in range(1, len(each)) if held.endswith(each[:n]))])
        keep = len(held[:keep].rstrip())  # also white space in front of what may become a stop string
        self._held, self._begun = held[keep:], self._begun or keep > 0
        return held[:keep]
