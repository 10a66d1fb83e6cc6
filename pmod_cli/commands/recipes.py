"""`pmod recipes ls|show|cp`: a user starts by copying one."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from pmod_cli import recipe_files
from pmod_cli.commands.common import OverwriteOpt
from pmod_cli.core import output
from pmod_cli.core.atomic import write_bytes
from pmod_cli.core.errors import PmodError

EXAMPLES = """\
pmod recipes ls
pmod recipes show tiny
pmod recipes cp tiny mine.yaml && pmod finetune --recipe mine.yaml
"""

recipes = typer.Typer()
NameArg = Annotated[str, typer.Argument(help="Name of a shipped recipe, or a .yaml file.")]


@recipes.command("ls")
def list_recipes() -> None:
    """List the shipped recipes, each with its first line."""
    width = max(map(len, recipe_files.names()), default=0)
    for name in recipe_files.names():
        lines = recipe_files.read(name).splitlines()
        output.print_line(f"{name:{width}}  {lines[0].lstrip('# ') if lines else ''}".rstrip())


@recipes.command("show")
def show(name: NameArg) -> None:
    """Print a recipe."""
    output.print_line(recipe_files.read(name).rstrip("\n"))


@recipes.command("cp")
def copy(
    name: NameArg,
    target: Annotated[Path, typer.Argument(help="File or folder to write.")],
    overwrite: OverwriteOpt = False,
) -> None:
    """Copy a recipe, to edit it."""
    source = recipe_files.find(name)
    if target.is_dir():
        target = target / source.name
    if target.exists() and not overwrite:
        raise PmodError(f"{target} exists", hint=f"pmod recipes cp {quote(name)} {quote(str(target))} --overwrite")
    write_bytes(target, source.read_bytes())
    output.print_line(target)
