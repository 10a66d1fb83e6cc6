"""LLaVA-NeXT: the whole image in one tile, and beside it as many tiles as fit its shape (anyres)."""

from pmod_cli.families import llava
from pmod_cli.families.record import Family

PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
"""(height, width) in pixels that an image may be fitted to. The original code's list has the same numbers in the same
order, and reads them as (width, height)."""

LLAVA_NEXT = Family(
    name="llava_next",
    title="LLaVA-NeXT",
    classes="LlavaNext",
    defaults={**llava.DEFAULTS, "image_grid_pinpoints": PINPOINTS},
    small_config={"image_grid_pinpoints": [[8, 16]]},
    small_pixels=(1, 3, 3, 8, 8),  # the whole image and two tiles
    small_inputs={"image_sizes": [[8, 16]]},
    vector_shapes=("image_newline",),
    high_resolution=True,
)
