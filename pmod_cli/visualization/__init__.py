"""See which image patches each layer keeps: `select` returns arrays, `draw` a figure, `save` writes it."""

from pmod_cli.core.images import LoadedImage, load_image
from pmod_cli.families.geometry import Part, TokenLayout
from pmod_cli.visualization.archive import load_npz, save_npz
from pmod_cli.visualization.figure import BLIND, MODES, PARTS, asked_blindly, draw
from pmod_cli.visualization.fonts import undrawable
from pmod_cli.visualization.image_selection import ImageSelection, parse_layers
from pmod_cli.visualization.inputs import (
    STATISTICS,
    Item,
    check_pictures,
    find_items,
    folder_targets,
    one_target,
    short_name,
    summed_up,
)
from pmod_cli.visualization.job import Drawn, DrawSettings, check_saved, describe, layer_table, run, summary_lines
from pmod_cli.visualization.page import check_format, save
from pmod_cli.visualization.recording import (
    DEFAULT_QUESTION,
    MAX_NEW_TOKENS,
    OFF_BUDGET,
    LoadedModel,
    attend,
    check_checkpoint,
    check_pair,
    load_checkpoint,
    select,
    select_together,
)
from pmod_cli.visualization.selection_page import html_page, save_html
from pmod_cli.visualization.statistics import ImageStatistics, image_statistics, in_common, summarise
