"""The page docs/commands.md, from the command tree: `make reference` writes it, tests/test_cli.py compares it."""

from __future__ import annotations

import re
from collections.abc import Iterator

import typer

from pmod_cli.cli import VERBS, build_app

HEAD = """\
# Commands

Written by `make reference` from the commands themselves. `pmod --version` prints the version, `-h` and `--help` work
everywhere, and `--batch_size` is the same option as `--batch-size`. Exit codes: 0 done, 1 the run failed, 2 bad usage
or input, 3 partly done, 130 interrupted. `PMOD_DEBUG=1` shows tracebacks.
"""


def page() -> str:
    """All verbs in the order of `pmod --help`, as Markdown."""
    return HEAD + "".join("\n" + "\n".join(_verb(name)) + "\n" for name in VERBS)


def _verb(name: str) -> Iterator[str]:
    group = typer.main.get_command(build_app(name))
    with group.make_context("pmod", [name], resilient_parsing=True) as context:
        command = group.commands[name]
        yield f"## pmod {name}"
        yield from _command(command, context, f"pmod {name}")


def _command(command, context, path: str) -> Iterator[str]:
    with command.make_context(path, [], parent=context, resilient_parsing=True) as own:
        yield ""
        yield _plain(command.help)
        yield from _parameters(command, own)
    for child in getattr(command, "commands", {}).values():
        yield ""
        yield f"### {path} {child.name}"
        yield from _command(child, own, f"{path} {child.name}")
    if command.epilog:
        examples = [line.strip() for line in command.epilog.splitlines() if line.strip().startswith("pmod")]
        yield from ("", "```", *examples, "```")


def _parameters(command, context) -> Iterator[str]:
    panel = None
    for parameter in command.params:
        record = parameter.get_help_record(context)
        if record is None or "--help" in parameter.opts or getattr(parameter, "hidden", False):
            continue
        own_panel = getattr(parameter, "rich_help_panel", None)
        if panel is None or own_panel != panel[0]:
            panel = (own_panel,)
            title = own_panel or ("Options" if parameter.param_type_name == "option" else "Arguments")
            yield from ("", f"| {title} | |", "|---|---|")
        names, text = record
        yield f"| `{names.replace('|', ', ')}` | {_plain(text).replace('|', chr(92) + '|')} |"


def _plain(text: str | None) -> str:
    """Help text without the line breaks of its source."""
    return re.sub(r"\s+", " ", text or "").strip()


if __name__ == "__main__":
    print(page(), end="")
