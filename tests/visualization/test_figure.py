"""The picture: planted patches are clear where they lie, nothing overlaps, nothing is cut."""

import itertools
import time

import numpy as np
import pytest
from PIL import Image

from pmod_cli.errors import PmodError
from pmod_cli.visualization.figure import draw
from pmod_cli.visualization.overlay import KEPT, SKIPPED, prepare
from pmod_cli.visualization.page import save
from tests.visualization.records import anyres_record, cropped_record, padded_record, record_of

BLUE = [0, 0, 255]
LONG = "W" * 120 + " costs $5 and $6_7 {x} \\frac " + "and so on " * 60


@pytest.mark.parametrize(("height", "width"), [(168, 168), (84, 252), (252, 84), (200, 90)])
def test_kept_patches_are_clear_and_skipped_ones_are_not(height, width):
    record = anyres_record(height, width)
    chosen = np.random.default_rng(0).random(record.layout.size) < 0.4
    boxes = record.layout.boxes()
    for part in record.layout.parts:
        panel = prepare(record.image, record.layout, [part], width=3 * width, height=3 * height)
        drawn = panel.draw_kept(chosen)
        strip = np.where(chosen[:, None], KEPT, SKIPPED)
        for token in part.tokens.ravel():
            x, y = 3 * (boxes[token, :2] + boxes[token, 2:]) / 2
            is_clear = drawn[int(y), int(x)].tolist() == BLUE
            assert is_clear == chosen[token], token
        for row, token in zip(part.row_spans, part.newlines, strict=False):
            middle = int(3 * np.clip(row, 0, height).mean())
            assert (panel.draw_strip(strip)[middle, 0] == KEPT).all() == chosen[token]


def test_cut_off_and_padded_regions():
    """A centre crop leaves the ends of a wide image unseen; a square pad adds rows that are no image."""
    record = cropped_record(84, 252)
    panel = prepare(record.image, record.layout, record.layout.parts, 252, 84)
    assert (panel.cells[0][:, :84] == -1).all()
    assert (panel.cells[0][:, 84:168] >= 0).all()
    assert panel.draw_kept(np.ones(144, dtype=bool))[40, 10].tolist() != BLUE

    record = padded_record(84, 252)
    panel = prepare(record.image, record.layout, record.layout.parts, 252, 252)
    clear = panel.draw_kept(np.ones(144, dtype=bool))
    assert clear[20, 100].tolist() == [255, 255, 255]
    assert clear[126, 100].tolist() == BLUE


@pytest.mark.parametrize(
    "record",
    [
        anyres_record(168, 168),
        anyres_record(84, 252, question=LONG, answer=LONG),
        anyres_record(252, 84, router_state="untrained", answer=""),
        anyres_record(12, 250),
        anyres_record(3, 250),  # so thin that no row of tiles is left
        cropped_record(100, 300, answer=None, model="long/" * 30),
        padded_record(300, 100),
        anyres_record(168, 168, layers=20),
    ],
    ids=["square", "wide-long", "tall-untrained", "thin", "thinner", "cropped", "padded", "sheet"],
)
def test_no_text_overlaps_or_leaves_the_page(record):
    figure = draw(record, range(record.num_layers))
    figure.canvas.draw()
    (page,) = figure.axes
    frame = figure.bbox
    boxes = {text: text.get_window_extent() for text in page.texts if text.get_text()}
    for text, box in boxes.items():
        assert frame.x0 <= box.x0 <= box.x1 <= frame.x1, text.get_text()
        assert frame.y0 <= box.y0 <= box.y1 <= frame.y1, text.get_text()
    for (first, a), (second, b) in itertools.combinations(boxes.items(), 2):
        apart = a.x1 <= b.x0 or b.x1 <= a.x0 or a.y1 <= b.y0 or b.y1 <= a.y0
        # Neighbouring lines of a text touch by their letters' descent; half a line is a real overlap.
        overlap = min(a.y1, b.y1) - max(a.y0, b.y0)
        assert apart or overlap < 0.35 * min(a.height, b.height), (first.get_text(), second.get_text())
    images = [image.get_window_extent() for image in page.images]
    for text, box in boxes.items():
        assert not any(image.overlaps(box.padded(-2)) for image in images), text.get_text()


def test_headings_and_caption():
    record = anyres_record(168, 168, router_state="untrained", notes=("first of 3 frames",))
    words = [text.get_text() for text in draw(record, [0, 3]).axes[0].texts]
    total = record.layout.size
    assert {"Layer 0", "plain layer:", f"all {total} tokens", "Layer 3"} <= set(words)
    assert f"{record.kept[3].sum()} of {total} kept" in words
    assert "retention 0.33" in words
    assert {"Q: What is it?", "A: blue"} <= set(words)
    text = " ".join(words)
    assert "Untrained routers" in text
    assert "planted, untrained routers; first of 3 frames" in text
    assert "Untrained" not in " ".join(t.get_text() for t in draw(anyres_record(168, 168), [0]).axes[0].texts)


def test_saved_as_png_or_svg(tmp_path):
    record = anyres_record(168, 168, answer="漢字 $x$")
    figure = draw(record, [2, 3])
    save(figure, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        picture.load()
        assert picture.width == int(figure.get_figwidth() * 300)
    save(figure, tmp_path / "a.svg")
    assert "</svg>" in (tmp_path / "a.svg").read_text()
    with pytest.raises(PmodError, match=r"a\.gif: pictures are written as \.png or \.svg"):
        save(figure, tmp_path / "a.gif")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "a.svg"]


def test_a_contact_sheet_of_32_layers_is_drawn_in_a_second(tmp_path):
    record = anyres_record(168, 168, layers=32)
    save(draw(record, [0]), tmp_path / "fonts.png")  # loads fonts, once a process
    start = time.process_time()
    save(draw(record, range(32)), tmp_path / "sheet.png")
    assert time.process_time() - start < 2  # 0.8 s where the core is not shared


def test_the_selection_of_a_7b_next_is_drawn(tmp_path):
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    from pmod_cli.visualization.geometry import image_layout

    processor = LlavaNextImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    record = record_of(image_layout(processor, 14, 1000, 1000), layers=32)
    assert record.layout.size == 2928
    start = time.process_time()
    save(draw(record, range(32)), tmp_path / "sheet.png")
    assert time.process_time() - start < 3
