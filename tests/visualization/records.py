"""Records with a planted selection, for tests that need no model."""

from types import SimpleNamespace

import numpy as np
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from pmod_cli.families.geometry import TokenLayout, numbered
from pmod_cli.families.llava import LLAVA
from pmod_cli.families.llava_next import LLAVA_NEXT
from pmod_cli.visualization.image_selection import ImageSelection

SIDE, PATCH = 84, 7
SQUARE = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
PINPOINTS = [[84, 168], [168, 84], [168, 168], [252, 84], [84, 252]]


def image_layout(image_processor, patch_size: int, height: int, width: int) -> TokenLayout:
    """Where the vision tokens of an image lie, by the family whose image processor this is."""
    family = LLAVA_NEXT if hasattr(image_processor, "image_grid_pinpoints") else LLAVA
    return family.place_tokens(SimpleNamespace(image_processor=image_processor), patch_size, height, width)


def record_of(layout: TokenLayout, kept: np.ndarray | None = None, *, layers: int = 4, **changes) -> ImageSelection:
    """The first half of the layers plain; the others keep `kept`, or every third token."""
    routed = np.arange(layers) >= layers // 2
    chosen = np.arange(layout.size) % 3 == 0 if kept is None else kept
    values = {
        "image": Image.new("RGB", (layout.width, layout.height), "blue"),
        "layout": layout,
        "kept": np.where(routed[:, None], chosen, True),
        "weight": np.where(routed[:, None], 1 + 0.1 * chosen, 1).astype(np.float32),
        "routed": routed,
        "retention": np.where(routed, chosen.mean(), 1.0),
        "question": "What is it?",
        "answer": "blue",
        "router_state": "trained",
        "model": "planted",
    }
    return ImageSelection(**values | changes)


def anyres_record(height: int, width: int, **changes) -> ImageSelection:
    processor = LlavaNextImageProcessorPil(image_grid_pinpoints=PINPOINTS, **SQUARE)
    return record_of(image_layout(processor, PATCH, height, width), **changes)


def cropped_record(height: int, width: int, **changes) -> ImageSelection:
    return record_of(image_layout(CLIPImageProcessorPil(**SQUARE), PATCH, height, width), **changes)


def padded_record(height: int, width: int, **changes) -> ImageSelection:
    return record_of(image_layout(LlavaImageProcessorPil(do_pad=True, **SQUARE), PATCH, height, width), **changes)


def film_record(frames: int = 3, **changes) -> ImageSelection:
    """A film of 56 by 42 pixels, one colour a frame, with 4 by 3 tokens each; frame n keeps its first n + 1 columns."""
    width, height, across, down = 56, 42, 4, 3
    pictures = [Image.new("RGB", (width, height), (80 * number, 10, 255 - 80 * number)) for number in range(frames)]
    strip = Image.fromarray(np.concatenate([np.asarray(picture) for picture in pictures], axis=1))
    edges = np.linspace(0, width * frames, across * frames + 1)
    rows = np.linspace(0, height, down + 1)
    part = numbered("image", np.stack([rows[:-1], rows[1:]], 1), np.stack([edges[:-1], edges[1:]], 1), first=0)
    kept = np.tile(np.arange(across) <= np.arange(frames)[:, None], (down, 1, 1)).reshape(down, -1)
    layout = TokenLayout(strip.width, height, (part,), frames=frames)
    return record_of(layout, kept.ravel(), image=strip, **changes)
