"""See which image patches each layer keeps: `select` returns arrays, `draw` a figure, `save` writes it."""

from pmod_cli.core.images import LoadedImage, load_image
from pmod_cli.families.geometry import Layout, Part
from pmod_cli.visualization.archive import load_npz, save_npz
from pmod_cli.visualization.capture import DEFAULT_QUESTION, MAX_NEW_TOKENS, attend, select
from pmod_cli.visualization.figure import BLIND, MODES, PARTS, asked_blindly, draw
from pmod_cli.visualization.html import html_page, save_html
from pmod_cli.visualization.inputs import Item, check_pictures, find_items, folder_targets, one_target, short_name
from pmod_cli.visualization.job import Drawn, Settings, check_saved, describe, layer_table, run, summary_lines
from pmod_cli.visualization.page import check_format, save
from pmod_cli.visualization.record import SelectionRecord, parse_layers
from pmod_cli.visualization.statistics import ImageStatistics, image_statistics, in_common, summarise
from pmod_cli.visualization.subjects import Subject, check_pair, check_subject, load_subject

__all__ = [
    "BLIND",
    "DEFAULT_QUESTION",
    "MAX_NEW_TOKENS",
    "MODES",
    "PARTS",
    "Drawn",
    "ImageStatistics",
    "Item",
    "Layout",
    "LoadedImage",
    "Part",
    "SelectionRecord",
    "Settings",
    "Subject",
    "asked_blindly",
    "attend",
    "check_format",
    "check_pair",
    "check_pictures",
    "check_saved",
    "check_subject",
    "describe",
    "draw",
    "find_items",
    "folder_targets",
    "html_page",
    "image_statistics",
    "in_common",
    "layer_table",
    "load_image",
    "load_npz",
    "load_subject",
    "one_target",
    "parse_layers",
    "run",
    "save",
    "save_html",
    "save_npz",
    "select",
    "short_name",
    "summarise",
    "summary_lines",
]
