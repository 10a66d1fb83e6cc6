"""All pictures of a page as one image below its lines and letters."""

from __future__ import annotations

import numpy as np
from matplotlib.backend_bases import RendererBase
from matplotlib.figure import Figure
from matplotlib.image import BboxImage
from matplotlib.transforms import Bbox, TransformedBbox


class Backdrop(BboxImage):
    """The pixels of a whole figure, white at first.

    An image artist for each of a sheet's panels, each resampled by matplotlib, takes ten times as long.

    Attributes:
        boxes: (left, top, right, bottom) of each pasted picture, in pixels of the figure.
    """

    def __init__(self, figure: Figure) -> None:
        super().__init__(TransformedBbox(Bbox.unit(), figure.transFigure), interpolation="none")
        width, height = figure.canvas.get_width_height()
        self.set_data(np.broadcast_to(np.uint8(255), (height, width, 4)))
        self._pixels = self.get_array()  # set_data's copy; filled in place
        self.boxes: list[tuple[int, int, int, int]] = []
        figure.add_artist(self)

    def paste(self, picture: np.ndarray, left: int, top: int, right: int, bottom: int) -> None:
        """uint8 (h, w, 3), stretched over the box, whose lines and columns are those nearest in the picture."""
        lines = np.arange(bottom - top) * picture.shape[0] // max(bottom - top, 1)
        columns = np.arange(right - left) * picture.shape[1] // max(right - left, 1)
        self._pixels[top:bottom, left:right, :3] = picture[lines[:, None], columns]
        self.boxes.append((left, top, right, bottom))

    def make_image(self, renderer: RendererBase, magnification: float = 1.0, unsampled: bool = False):
        """The pixels as they are, where the figure is drawn whole and at its own resolution.

        Elsewhere, as in a notebook or with `bbox_inches="tight"`, matplotlib moves and scales them.
        """
        x0, y0, x1, y1 = self.get_window_extent(renderer).extents * magnification
        if (x0, y0, int(y1), int(x1)) == (0, 0, *self._pixels.shape[:2]):
            return self._pixels[::-1], 0, 0, None  # the lowest line first
        return super().make_image(renderer, magnification, unsampled)
