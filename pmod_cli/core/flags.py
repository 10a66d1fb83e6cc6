"""From the words of the library to those of the command line, at the one place where errors are printed.

The library speaks of its own arguments, in backticks: "`out` is the source", "replace it with `overwrite=True`",
"lower `train.batch_size`". A verb has options of the same names, so its errors say `--out`, `--overwrite`,
`--batch-size`; and `--set KEY=VALUE` for a setting of a recipe that has no option of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_NAME = r"[a-z_]+(?:\.[a-z_0-9]+)*"
_ARGUMENT = re.compile(rf"`({_NAME})(?:=([^`]*))?`")


def as_flags(text: str, options: Mapping[str, str], *, settings: bool = False) -> str:
    """A message as a user of the command line reads it; what is no option of the verb stays as it is.

    Args:
        text: With arguments of the library in backticks, as `name` or `name=value`.
        options: Of the verb: the name of an argument to its flag, such as `out` to `--out`.
        settings: Whether the verb takes any setting of a recipe by `--set`.
    """

    def translate(found: re.Match[str]) -> str:
        name, value = found.groups()
        flag = options.get(name)
        if flag is None:
            if not settings or "." not in name:
                return found[0] if "." not in name else found[0].strip("`")
            return name if value is None else f"--set {name}={value}"
        if value in (None, "True"):
            return flag
        if value == "False":
            return f"--no-{flag.removeprefix('--')}"
        return f"{flag} {value}"

    return _ARGUMENT.sub(translate, text)
