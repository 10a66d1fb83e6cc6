"""YAML as people write settings: the one reader of it, with limits, and with the line of every value.

A recipe may come from anyone. Aliases can make a small file stand for billions of values, or hold themselves; a key
that stands twice silently loses one of its values; tags can ask for types that no setting has. All that is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pmod_cli.core.errors import PmodError

LONGEST = 64 * 1024  # bytes of a file; the longest shipped recipe has 2,000
MOST_VALUES = 10_000  # after aliases have been followed
DEEPEST = 20
PLAIN = ("str", "int", "float", "bool", "null")  # YAML's own types of single values; a date is read as text


@dataclass(frozen=True)
class Located:
    """A value and the line, from 1, that it begins on. A mapping's values are `Located`, and those of a list are."""

    data: Any
    line: int

    def plain(self) -> Any:
        """Without the lines."""
        if isinstance(self.data, dict):
            return {key: value.plain() for key, value in self.data.items()}
        if isinstance(self.data, list):
            return [value.plain() for value in self.data]
        return self.data


def read(path: Path) -> Located:
    """The value that a file holds.

    Raises:
        PmodError: as `parse`; the file is larger than `LONGEST` bytes.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        data = file.read(LONGEST + 1)
    if len(data) > LONGEST:
        raise PmodError(f"{path} has more than {LONGEST:,} bytes, which is the limit for YAML settings")
    try:
        return parse(data.decode(), str(path))
    except UnicodeDecodeError as error:
        raise PmodError(f"{path} is not YAML: it is not UTF-8: {error.reason} at byte {error.start}") from None


def parse(text: str, where: str) -> Located:
    """The value of a YAML text; that of an empty one is None.

    Args:
        where: what the text is called in messages.

    Raises:
        PmodError: it is no YAML, names a key twice, has a tag of no plain type, or goes beyond `LONGEST`,
            `MOST_VALUES` or `DEEPEST`.
    """
    if len(text) > LONGEST:
        raise PmodError(f"{where} has more than {LONGEST:,} characters, which is the limit for YAML settings")
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise PmodError(f"{where} is not YAML: {_shown(error)}") from None
    except RecursionError:
        raise PmodError(f"{where}: nested more than {DEEPEST} levels deep, which is the limit") from None
    return _Reader(where).value(node, ()) if node is not None else Located(None, 1)


class _Reader:
    """From PyYAML's nodes, which share what aliases name, to values, as many as the aliases stand for."""

    def __init__(self, where: str) -> None:
        self.where, self.values = where, 0
        self.scalars = yaml.SafeLoader("")

    def value(self, node: yaml.Node, above: tuple[int, ...]) -> Located:
        line = node.start_mark.line + 1
        self.values += 1
        if self.values > MOST_VALUES:
            raise self.fault(line, f"more than {MOST_VALUES:,} values, counted behind aliases; that is the limit")
        if id(node) in above:
            raise self.fault(line, "an alias names the very value that it stands in")
        if len(above) >= DEEPEST:
            raise self.fault(line, f"nested more than {DEEPEST} levels deep, which is the limit")
        above = (*above, id(node))
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return Located(self.mapping(node, above), line)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return Located([self.value(item, above) for item in node.value], line)
        if isinstance(node, yaml.ScalarNode):
            return Located(self.scalar(node, kind, line), line)
        raise self.fault(line, f"the tag {node.tag} is unknown here; expected none")

    def mapping(self, node: yaml.MappingNode, above: tuple[int, ...]) -> dict[str, Located]:
        found: dict[str, Located] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise self.fault(line, "expected a word as key")
            if key.value in found:
                raise self.fault(line, f"the key {key.value!r:.60} stands twice; first on line {found[key.value].line}")
            inner = self.value(value, above)
            found[key.value] = Located(inner.data, line)
        return found

    def scalar(self, node: yaml.ScalarNode, kind: str, line: int) -> Any:
        if kind in ("timestamp", "value", "merge"):  # `2024-01-01`, `=`, `<<`: nobody wrote a tag
            return node.value
        if kind not in PLAIN:
            raise self.fault(line, f"the tag {node.tag} is unknown here; expected none")
        try:
            return self.scalars.construct_object(node)
        except (yaml.YAMLError, ValueError, KeyError, OverflowError) as error:
            raise self.fault(line, f"{node.value!r:.60} is not of the type {kind}: {_shown(error)}") from None

    def fault(self, line: int, what: str) -> PmodError:
        return PmodError(f"{self.where}, line {line}: {what}")


def _shown(error: Exception) -> str:
    """PyYAML's sentence without the text around the fault, which may be anything."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is not None and problem:
        return f"{problem}, line {mark.line + 1}, column {mark.column + 1}"
    return " ".join(str(error).split())[:200]
