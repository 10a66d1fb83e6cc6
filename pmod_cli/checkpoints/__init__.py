"""A name to files, and files to a model: resolving, converting and loading checkpoints. Imports no torch."""

from pmod_cli.checkpoints.aliases import ALIASES, builtin_config, bundled_path
from pmod_cli.checkpoints.conversion import check_target, convert, sources_of
from pmod_cli.checkpoints.conversion_report import ConversionReport
from pmod_cli.checkpoints.layout import Calibrated, Options, Source
from pmod_cli.checkpoints.layouts import output_layout, output_layouts, read_source
from pmod_cli.checkpoints.loading import load_model, load_processor, router_state, stored_dtype
from pmod_cli.checkpoints.resolve import Resolved, resolve
