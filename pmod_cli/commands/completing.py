"""What a shell offers for the values of options: names that are known here, without torch and without a network.

`VALUES` is the one table. Where nothing in it fits what was typed, bash goes on with the names of files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, get_type_hints

import typer

from pmod_cli import recipe_files
from pmod_cli.checkpoints.aliases import ALIASES, alias_of
from pmod_cli.commands.common import DTYPES, default_model
from pmod_cli.commands.profile_checks import FORMATS, PHASES, REPORTS
from pmod_cli.core import json_text
from pmod_cli.core.errors import PmodError
from pmod_cli.core.hardware import KERNELS
from pmod_cli.core.paths import expanded
from pmod_cli.model.methods import METHODS, droppers
from pmod_cli.model.registry import SELECTIONS
from pmod_cli.model.schedule import SCHEDULES
from pmod_cli.model.settings import NORMS, QUOTAS, TARGET_TOKENS
from pmod_cli.profiling.count.training import ENGINES

Completer = Callable[..., list[str]]
Names = Callable[[], Iterable[str]]


def one(names: Names) -> Completer:
    """Completes one of these names, which are asked for when the shell asks."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names() if name.startswith(incomplete)]

    return complete


def several(names: Names) -> Completer:
    """Completes the last of a comma-separated list of these names, without those that are in front of it."""

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        given = before.split(",")
        left = [name for name in names() if name not in given and name.startswith(last)]
        return [f"{before}{comma}{name}" for name in left]

    return complete


def tasks() -> list[str]:
    """Groups of benchmarks and benchmarks."""
    from pmod_cli.evaluation.benchmarks import BENCHMARKS, groups

    return [*groups(), *BENCHMARKS]


def tiny_tasks() -> list[str]:
    """The tasks that are drawn, and the name of all of them."""
    from pmod_cli.evaluation.benchmarks import groups

    return ["tiny", *(benchmark.name for benchmark in groups()["tiny"])]


def gpus() -> list[str]:
    """GPUs whose peaks and memory are known."""
    from pmod_cli.profiling.measure.devices import DEVICES

    return list(DEVICES)


def modes() -> tuple[str, ...]:
    """What `visualize` can draw."""
    from pmod_cli.visualization.figure import MODES

    return MODES


def parts() -> tuple[str, ...]:
    """Which parts of an image `visualize` can draw."""
    from pmod_cli.visualization.figure import PARTS

    return PARTS


def sweeps() -> list[str]:
    """Folders of recipes."""
    return sorted({name.rpartition("/")[0] for name in recipe_files.names()} - {""})


def layers(ctx: typer.Context, incomplete: str) -> list[str]:
    """The last layer of `2,14` or `2-`: those of the model that the line names, or of the current one."""
    found = re.fullmatch(r"(.*[,-])?([0-9]*|a[l]*)", incomplete)
    named = ctx.args[:1] if "name" in ctx.params else [ctx.params.get("model")]  # of convert, the words are unparsed
    number = _layers_of(str(next(filter(None, named), "")))
    if found is None or number is None:
        return []
    before = found[1] or ""
    return [f"{before}{name}" for name in ("all", *map(str, range(number))) if name.startswith(found[2])]


def _layers_of(name: str) -> int | None:
    """L of a model, from the table of aliases or from its config; None where neither says it."""
    if (alias := ALIASES.get(alias_of(name))) is not None:
        return alias.layers
    try:
        folder = expanded(name) if name else default_model()
        config = json_text.loads((folder / "config.json").read_bytes()) if folder else {}
        number = config.get("text_config", config).get("num_hidden_layers")
    except (PmodError, OSError, ValueError, AttributeError):  # a shell shows nothing, and a command says why
        return None
    return number if isinstance(number, int) else None


def _outputs() -> list[str]:
    from pmod_cli.checkpoints.layouts import output_layouts

    return [layout.name for layout in output_layouts().values()]


_MODELS, _RECIPES = one(lambda: ALIASES), one(recipe_files.names)
VALUES: dict[str, Completer] = {  # by parameter, or by verb and parameter where verbs differ
    "model": _MODELS,
    "convert name": _MODELS,
    "calibrate name": _MODELS,
    "finetune name": _RECIPES,
    "recipes name": _RECIPES,
    "recipe": _RECIPES,
    "finetune sweep": one(sweeps),
    "tasks": several(tasks),
    "profile tasks": several(tiny_tasks),
    "eval_tasks": several(tasks),
    "fetch_data": several(tasks),
    "against": several(lambda: dict.fromkeys(["stock", "none", "downsample", *SELECTIONS, *droppers(), *ALIASES])),
    "profile against": several(lambda: ["stock", *SELECTIONS]),
    "visualize against": one(lambda: ["stock", *SELECTIONS, *ALIASES]),
    "methods": several(lambda: ["all", *droppers()]),
    "method": one(lambda: METHODS),
    "selection": one(lambda: SELECTIONS),
    "schedule": one(lambda: SCHEDULES),
    "calibrate schedule": one(lambda: ("search", "cosine")),
    "select_at": layers,
    "visualize layers": layers,
    "mode": one(modes),
    "parts": one(parts),
    "norm": one(lambda: NORMS),
    "target_tokens": one(lambda: TARGET_TOKENS),
    "quota": one(lambda: QUOTAS),
    "to": one(_outputs),
    "report": one(lambda: REPORTS),
    "phases": several(lambda: PHASES),
    "output_format": one(lambda: FORMATS),
    "shown_as": one(lambda: FORMATS),
    "engine": one(lambda: ENGINES),
    "report_to": one(lambda: ("tensorboard", "wandb", "none")),
    "on_bad_row": one(lambda: ("error", "skip")),
    "gpu": one(gpus),
    "gpu_memory": one(gpus),
    "device": one(lambda: ("auto", "cpu", "cuda", "mps")),
    "dtype": one(lambda: DTYPES),
    "attention": one(lambda: KERNELS),
}


def add_values(target: Callable[..., Any] | typer.Typer, verb: str) -> None:
    """Give the options of a verb, or of each command of its group, their values in `VALUES`."""
    if isinstance(target, typer.Typer):
        for command in target.registered_commands:
            if command.callback is not None:
                add_values(command.callback, verb)
        return
    target.__annotations__ = get_type_hints(target, include_extras=True)  # else Typer would make each option anew
    for name, hint in target.__annotations__.items():
        for declared in getattr(hint, "__metadata__", ()):
            if hasattr(declared, "autocompletion"):
                declared.autocompletion = VALUES.get(f"{verb} {name}", VALUES.get(name))
