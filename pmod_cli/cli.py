"""The program `pmod`: its verbs, its global options and its one error handler. Imports nothing heavy.

A verb is a line of `VERBS`. Its module `pmod_cli.commands.<verb>` is imported only when that verb is called, and offers
an attribute named like the verb: a function, which becomes the command, or a `typer.Typer`, which becomes a group.
`EXAMPLES` of the module, one command a line, closes its help.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from pmod_cli import __version__
from pmod_cli.core import output
from pmod_cli.core.errors import BAD_INPUT, INTERRUPTED, RUN_FAILED, as_flags, explain

VERBS = {
    "convert": "Turn a stock LLaVA checkpoint into a p-MoD checkpoint, without copying its weights.",
    "calibrate": "Turn a stock LLaVA into a p-MoD model that works, without training.",
    "finetune": "Train a p-MoD model, or the stock model for comparison, from a recipe.",
    "eval": "Score a model on benchmarks with lmms-eval.",
    "profile": "Count FLOPs, KV cache, latency and memory, p-MoD beside stock.",
    "ask": "Ask a model about a picture, once or in a conversation.",
    "serve": "Serve a model behind the HTTP interface of OpenAI.",
    "visualize": "Draw which image patches each layer keeps.",
    "demo": "Calibrate, evaluate, profile and draw the bundled model, into one folder; with --train, train it too.",
    "recipes": "List, show and copy the training recipes.",
    "env": "Show versions, devices, threads and caches.",
}

EXAMPLES = """\
pmod convert llava-next-7b
pmod calibrate tiny-llava-next
pmod finetune --recipe tiny
pmod eval --tasks docvqa,chartqa
pmod profile --report flops
pmod visualize img.png --layers 2,14,26
"""

COMPLETE = "_PMOD_COMPLETE"  # set by a shell that asks how a line goes on
NARROW = 80  # columns; in fewer, Typer's panels would cut the names of options
CONTEXT = {
    "help_option_names": ["-h", "--help"],
    # Users carry --batch_size over from other programs: it is the same option as --batch-size.
    "token_normalize_func": lambda name: name.replace("_", "-"),
}


def _show_version(shown: bool) -> None:
    if shown:
        output.print_line(f"pmod {__version__}")
        raise typer.Exit()


def _root(version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True)] = False) -> None:
    """Turn a stock LLaVA into a p-MoD (Mixture-of-Depths) model, and see what it costs, scores and keeps."""


def build_app(verb: str | None) -> typer.Typer:
    """The program with `verb` loaded. The other verbs are names with one line of help, and import nothing."""
    app = typer.Typer(
        name="pmod",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        pretty_exceptions_show_locals=False,
        context_settings=CONTEXT,
        rich_markup_mode="rich" if verb is None or shutil.get_terminal_size().columns >= NARROW else None,
    )
    app.callback(epilog=_epilog(EXAMPLES))(_root)
    for name, summary in VERBS.items():
        if name != verb:
            app.command(name, help=summary)(_not_loaded)
            continue
        module = importlib.import_module(f"pmod_cli.commands.{name}")
        target = getattr(module, name)
        if COMPLETE in os.environ:
            importlib.import_module("pmod_cli.commands.completing").add_values(target, name)
        if isinstance(target, typer.Typer):
            app.add_typer(target, name=name, help=summary, epilog=_epilog(module.EXAMPLES), no_args_is_help=True)
        else:
            app.command(name, epilog=_epilog(module.EXAMPLES))(target)
    return app


def _epilog(examples: str) -> str:
    """Commands, one a line, as the end of a help text. Typer joins single line breaks and keeps double ones."""
    commands = "\n\n".join(f"  {line}" for line in examples.strip().splitlines())
    return f"Examples:\n\n{commands}"


def _not_loaded() -> None:
    raise AssertionError("a verb was called without being loaded")


def _verb_in(words: Sequence[str]) -> str | None:
    """The verb of a command line: its first word that is no option, since no global option takes a value."""
    word = next((word for word in words if not word.startswith("-")), None)
    return word if word in VERBS else None


def main(arguments: Sequence[str] | None = None, *, on_ready: Callable[[], None] = lambda: None) -> int:
    """Run `pmod` and return its exit code: 0, 1 run failed, 2 bad usage, 3 partial, 130 interrupted.

    Args:
        arguments: The words behind `pmod`; by default those of the process.
        on_ready: Called when the modules are loaded: from here on Ctrl-C is an exception too, which is handled here.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    completed = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS", "")  # bash; the other shells
    verb = _verb_in(arguments or completed.split()[1:])
    command: Any = None  # until its module is loaded, which reads what packages add to it
    output.hush_libraries()
    try:
        command = typer.main.get_command(build_app(verb))
        on_ready()
        result: Any = command.main(args=arguments, prog_name="pmod", standalone_mode=False)
    except BaseException as error:
        return _report(error, _options_of(command, verb) if command else {})
    if result == INTERRUPTED:  # Typer turns Ctrl-C into this exit code, silently
        return _report(KeyboardInterrupt(), {})
    return result if isinstance(result, int) else 0


def _options_of(command: Any, verb: str | None) -> dict[str, str]:
    """The options of a verb by the names that the library knows them by: those of its arguments, and recipe keys."""
    options: dict[str, str] = {}
    for parameter in getattr(command, "commands", {verb: None}).get(verb, command).params:
        flags = [flag for flag in parameter.opts if flag.startswith("--")]
        options |= {flag[2:].replace("-", "_"): flag for flag in flags}
        if flags:
            options.setdefault(parameter.name, min(flags, key=len))
    return options | getattr(sys.modules.get(f"pmod_cli.commands.{verb}"), "SETTINGS", {})


def _report(error: BaseException, options: dict[str, str]) -> int:
    """Print what is known about an error on stderr and return the exit code."""
    if os.environ.get("PMOD_DEBUG") == "1" and not isinstance(error, SystemExit):
        raise error
    if isinstance(error, SystemExit):
        if getattr(error.__context__, "errno", None) == errno.EPIPE:  # Typer ends so where the reader has seen enough
            return 0
        return error.code if isinstance(error.code, int) else RUN_FAILED
    if isinstance(error, BrokenPipeError):  # the reader, such as `head`, has seen enough
        for stream in (sys.stdout, sys.stderr):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return 0
    if isinstance(error, typer.Abort):
        _say("stopped at a question that nobody answered")
        return RUN_FAILED
    if isinstance(error, typer.TyperException):
        return _report_usage(error)
    known = explain(error)
    if known is None:
        raise error
    takes_settings = "overrides" in options
    what, hint = (text and as_flags(text, options, settings=takes_settings) for text in (known.what, known.hint))
    _say(what, hint)
    return known.code


def _say(what: str | None, hint: str | None = None) -> None:
    """Print an error. Where nobody reads stderr any more, the exit code says it alone."""
    with contextlib.suppress(BrokenPipeError, SystemExit):  # rich makes the first into the second
        output.error(what or "", hint)


def _report_usage(error: typer.TyperException) -> int:
    """A wrong word on the command line: the sentence of Typer, which names the nearest words, and where to look."""
    context = getattr(error, "ctx", None)
    if not error.format_message():  # no arguments at all: Typer has shown the help
        return BAD_INPUT
    _say(error.format_message(), f"{context.command_path if context else 'pmod'} --help")
    return BAD_INPUT
