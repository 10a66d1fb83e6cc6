"""`pmod env`: what a bug report needs to know about this machine."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

from rich.table import Table

from pmod_cli import __version__
from pmod_cli.commands.common import JsonOpt, default_model
from pmod_cli.core import output

EXAMPLES = """\
pmod env
pmod env --json
"""

PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "lmms-eval",
    "safetensors",
    "huggingface-hub",
    "fvcore",
    "typer",
)


def env(as_json: JsonOpt = False) -> None:
    """Show versions, devices, threads and caches."""
    report = collect()
    if as_json:
        output.print_json(report)
        return
    table = Table(show_header=False, box=None)
    for key, value in report.items():
        lines = [f"{k} {v}" for k, v in value.items()] if isinstance(value, dict) else [str(value)]
        table.add_row(key, "\n".join(lines))
    output.stdout.print(table, markup=False)


def collect() -> dict:
    """Versions, devices and paths as a JSON-ready dict; names no secret."""
    import torch
    from huggingface_hub import constants

    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "schema_version": 1,
        "pmod": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "executable": sys.executable,
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": {f"cuda:{index}": name for index, name in enumerate(devices)} or "cpu only",
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "hf_cache": constants.HF_HUB_CACHE,
        "hf_offline": constants.HF_HUB_OFFLINE,
        "current_model": str(default_model() or "none"),
    }


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"
