"""A name to files, and files to a model: resolving, converting and loading checkpoints. Imports no torch."""

from pmod_cli.checkpoints.aliases import ALIASES, builtin_config, bundled_path
from pmod_cli.checkpoints.convert import ConversionReport, convert
from pmod_cli.checkpoints.loading import load_model, router_state
from pmod_cli.checkpoints.resolve import Resolved, resolve

__all__ = [
    "ALIASES",
    "ConversionReport",
    "Resolved",
    "builtin_config",
    "bundled_path",
    "convert",
    "load_model",
    "resolve",
    "router_state",
]
