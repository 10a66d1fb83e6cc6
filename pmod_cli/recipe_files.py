"""Where the shipped recipes are: `recipes/` of a checkout, `pmod_cli/_recipes` of an installed wheel."""

from __future__ import annotations

import difflib
from pathlib import Path

from pmod_cli.core.errors import PmodError
from pmod_cli.core.paths import expanded

PACKAGE = Path(__file__).parent
SUFFIX = ".yaml"  # of those that are shipped
SUFFIXES = (SUFFIX, ".yml")


def folder() -> Path:
    """The folder of the shipped recipes. A checkout wins, so that an edited recipe is the one that runs."""
    checkout = PACKAGE.parent / "recipes"
    return checkout if (PACKAGE.parent / "pyproject.toml").is_file() else PACKAGE / "_recipes"


def names() -> list[str]:
    """Names of all shipped recipes, without suffix; one in a subfolder as `ablations/linear`."""
    root = folder()
    return sorted(str(path.relative_to(root).with_suffix("")) for path in root.rglob(f"*{SUFFIX}"))


def find(name: str) -> Path:
    """The file of a recipe: a path that exists (it ends in .yaml), else a shipped name.

    Raises:
        PmodError: there is neither; the nearest names are listed.
    """
    if name.endswith(SUFFIXES):
        path = expanded(name)
        if path.is_file():
            return path
        raise PmodError(f"no such recipe file: {name}", hint="pmod recipes ls")
    if name in names():
        return folder() / f"{name}{SUFFIX}"
    near = difflib.get_close_matches(name, names()) or [known for known in names() if "/" not in known]
    raise PmodError(f"no recipe is called {name!r}; near: {', '.join(near)}", hint="pmod recipes ls")


def read(name: str) -> str:
    """The text of a recipe, as its author wrote it.

    Raises:
        PmodError: as `find`; or it is not UTF-8.
    """
    path = find(name)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PmodError(f"{path} is no recipe: it is not UTF-8: {error.reason} at byte {error.start}") from None
