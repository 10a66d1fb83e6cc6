"""See which image patches each layer keeps: `select` returns arrays, `draw` a figure, `save` writes it."""

from pmod_cli.visualization.capture import DEFAULT_QUESTION, MAX_NEW_TOKENS, select
from pmod_cli.visualization.figure import check_format, draw, save
from pmod_cli.visualization.geometry import Layout, Part, image_layout
from pmod_cli.visualization.images import LoadedImage, load_image
from pmod_cli.visualization.record import SelectionRecord, parse_layers

__all__ = [
    "DEFAULT_QUESTION",
    "MAX_NEW_TOKENS",
    "Layout",
    "LoadedImage",
    "Part",
    "SelectionRecord",
    "check_format",
    "draw",
    "image_layout",
    "load_image",
    "parse_layers",
    "save",
    "select",
]
