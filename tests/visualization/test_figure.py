"""The picture: planted patches are clear where they lie, nothing overlaps, nothing is cut."""

import io
import itertools
import warnings
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.transforms import Bbox
from PIL import Image

from pmod_cli.core.errors import PmodError
from pmod_cli.visualization.figure import MODES, draw
from pmod_cli.visualization.fonts import families, undrawable
from pmod_cli.visualization.overlay import KEPT, SKIPPED, prepare
from pmod_cli.visualization.page import Page, save
from tests.visualization.records import anyres_record, cropped_record, padded_record

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


@pytest.mark.parametrize("parts", [[0], [1], [0, 1]])
def test_weights_tell_kept_from_skipped_on_both_sides_of_a_frame(parts):
    """Every patch has one weight here: without the marks, a frame would stand between equal colours."""
    record = anyres_record(84, 168)
    base, tiles = record.layout.parts
    kept = np.zeros(record.layout.size, dtype=bool)
    kept[base.tokens[:, :6]] = kept[tiles.tokens[:, : tiles.tokens.shape[1] // 2]] = True
    panel = prepare(record.image, record.layout, [(base, tiles)[part] for part in parts], 336, 168)
    drawn = panel.draw_heat(np.full((record.layout.size, 3), 120, dtype=np.uint8), kept)
    colours = [{tuple(colour) for colour in half.reshape(-1, 3)} for half in (drawn[:, 8:160], drawn[:, 176:])]
    assert len(colours[0]) == 1  # plain
    assert len(colours[1]) == 2  # hatched
    share = (drawn[8:160, 176:328] != drawn[20, 80]).any(-1).mean()
    assert 0.15 < share < 0.5


@pytest.mark.parametrize("colour", [tuple(KEPT.tolist()), (255, 0, 0), (255, 255, 255), (0, 0, 0), (205, 205, 205)])
def test_a_frame_is_seen_on_a_picture_of_any_colour(colour):
    """Beside the border there is a line that differs from the picture by a third of the scale in some channel."""
    record = anyres_record(84, 168, image=Image.new("RGB", (168, 84), colour))
    base = record.layout.parts[0]
    kept = np.zeros(record.layout.size, dtype=bool)
    kept[base.tokens[:, :6]] = True
    drawn = prepare(record.image, record.layout, [base], 336, 168).draw_kept(kept)
    line = drawn[84, 160:176].astype(int)
    assert abs(line - colour).max(axis=1).max() >= 85


RECORDS = {
    "square": anyres_record(168, 168),
    "wide-long": anyres_record(84, 252, question=LONG, answer=LONG),
    "tall-untrained": anyres_record(252, 84, router_state="untrained", answer=""),
    "thin": anyres_record(12, 250, regions=((3.0, 2.0, 40.0, 9.0),)),
    "thinner": anyres_record(3, 250),  # so thin that no row of tiles is left
    "narrower": anyres_record(2400, 12),  # and here no column, but the ends of its rows
    "cropped": cropped_record(100, 300, answer=None, model="long/" * 30),
    "padded": padded_record(300, 100),
}
NOTES = ("first of 3 frames",)


def assert_nothing_overlaps(figure) -> None:
    """No text leaves the page, lies over another or over a panel."""
    figure.draw_without_rendering()
    frame = figure.bbox
    charts = figure.axes
    texts = [text for text in figure.texts if text.get_text()]
    for legend in figure.legends:
        texts += legend.get_texts()
    for chart in charts:
        texts += [chart.xaxis.label, chart.yaxis.label]
        for axis, (low, high) in ((chart.xaxis, chart.get_xlim()), (chart.yaxis, chart.get_ylim())):
            texts += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    boxes = {text: text.get_window_extent() for text in texts if text.get_text()}
    for text, box in boxes.items():
        assert frame.x0 <= box.x0 <= box.x1 <= frame.x1, text.get_text()
        assert frame.y0 <= box.y0 <= box.y1 <= frame.y1, text.get_text()
    for (first, a), (second, b) in itertools.combinations(boxes.items(), 2):
        apart = a.x1 <= b.x0 or b.x1 <= a.x0 or a.y1 <= b.y0 or b.y1 <= a.y0
        # Neighbouring lines of a text touch by their letters' descent; half a line is a real overlap.
        overlap = min(a.y1, b.y1) - max(a.y0, b.y0)
        assert apart or overlap < 0.35 * min(a.height, b.height), (first.get_text(), second.get_text())
    panels = [chart.get_window_extent() for chart in charts]
    for left, top, right, bottom in (box for artist in figure.artists for box in getattr(artist, "boxes", [])):
        panels.append(Bbox([[left, frame.y1 - bottom], [right, frame.y1 - top]]))
    assert panels
    for text, box in boxes.items():
        assert not any(panel.overlaps(box.padded(-2)) for panel in panels), text.get_text()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", RECORDS)
def test_no_text_overlaps_or_leaves_the_page(name, mode):
    record = replace(RECORDS[name], notes=NOTES)
    other = replace(record, kept=record.kept[::-1], question="And what is that?", model="another")
    against = other if mode == "compare" else None
    assert_nothing_overlaps(draw(record, range(record.num_layers), mode, against=against))


@pytest.mark.parametrize("mode", ["kept", "grid"])
def test_a_sheet_of_many_layers(mode):
    assert_nothing_overlaps(draw(anyres_record(168, 168, layers=20), range(20), mode))


@pytest.mark.parametrize("parts", ["merged", "base", "tiles"])
def test_other_parts(parts):
    record = anyres_record(84, 168)
    for mode in ("kept", "weights", "depth"):
        assert_nothing_overlaps(draw(record, [0, 3], mode, parts=parts))
    with pytest.raises(PmodError, match="`parts=tiles`: this image has only image"):
        draw(cropped_record(84, 84), [3], parts="tiles")


def test_merged_parts_are_clear_for_both_and_half_clear_for_one():
    record = anyres_record(84, 168)
    base, tiles = record.layout.parts
    chosen = np.zeros(record.layout.size, dtype=bool)
    chosen[base.tokens[:, :6]] = True  # the left half of the picture
    chosen[tiles.tokens[:6]] = True  # the upper half
    panel = prepare(record.image, record.layout, [base, tiles], 168, 84)
    drawn = panel.draw_kept(chosen)
    both, only_base, only_tiles, none = (drawn[y, x].tolist() for y, x in ((20, 40), (60, 40), (20, 130), (60, 130)))
    assert both == BLUE
    assert only_base == only_tiles
    assert none == panel.greyed[60, 130].tolist()
    assert all(min(a, c) <= b <= max(a, c) for a, b, c in zip(both, only_base, none, strict=True))
    assert only_base not in (both, none)


def test_heat_shows_each_tokens_colour():
    record = anyres_record(84, 168, image=Image.new("RGB", (168, 84), "white"))
    colours = np.random.default_rng(0).integers(0, 255, (record.layout.size, 3), dtype=np.uint8)
    for part in record.layout.parts:
        panel = prepare(record.image, record.layout, [part], 336, 168)
        drawn = panel.draw_heat(colours)
        for token in part.tokens.ravel():
            x0, y0, x1, y1 = 2 * record.layout.boxes()[token]
            assert drawn[int((y0 + y1) / 2), int((x0 + x1) / 2)].tolist() == colours[token].tolist()  # no ink on white


def words_of(figure) -> list[str]:
    return [text.get_text() for text in figure.texts]


@pytest.mark.parametrize("mode", ["kept", "weights", "depth", "compare", "grid"])
@pytest.mark.parametrize("name", ["cropped", "tall", "square", "padded"])
def test_stripes_have_a_legend_where_a_panel_has_them(name, mode):
    record = RECORDS.get(name) or anyres_record(100, 37)  # its tiles miss a strip, the whole image does not
    striped = False
    for part in record.layout.parts:
        striped |= bool((prepare(record.image, record.layout, [part], 300, 300).cells < 0).all(0).any())
    assert striped == (name in ("cropped", "tall"))
    words = words_of(draw(record, [3], mode, against=record if mode == "compare" else None))
    assert ("grey stripes: cut off, never seen by the model" in words) == striped


def test_a_banner_has_no_empty_rows():
    """The labels of flat panels stand below them, and the rows are as high as their panels."""
    figure = draw(anyres_record(12, 250), [2, 3])
    assert any(text.startswith("whole image: ") for text in words_of(figure))
    (boxes,) = (artist.boxes for artist in figure.artists if hasattr(artist, "boxes"))
    tops = sorted({(top, bottom) for _, top, _, bottom in boxes})
    gap = (tops[1][0] - tops[0][1]) / figure.dpi
    assert gap < 0.3  # inches: a line of text


def test_letters_that_the_usual_font_lacks_come_from_another():
    circled = "Ⓐ"  # of matplotlib's own STIX, and not of its DejaVu Sans
    assert families("plain") == ("sans-serif",)
    assert families(f"a {circled}")[0] == "sans-serif"
    assert len(families(f"a {circled}")) == 2
    assert undrawable(circled, "plain ü", None) == ""
    assert undrawable("x\U000e0fff\U000e0fffy") == "\U000e0fff"  # no font has it
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib's, of a letter that is a box
        draw(anyres_record(84, 84, question=circled), [3]).canvas.draw()


def test_depth_and_weights_name_their_ends():
    record = anyres_record(168, 168)
    words = [text.get_text() for text in draw(record, range(4), "depth").texts]
    assert {"Picture", "Whole image", "2×2 tiles", "kept in so many of 4 layers", "2", "4"} <= set(words)
    base = record.layout.parts[0].tokens
    assert f"mean {record.depth[base].mean():.1f} layers" in words
    words = [text.get_text() for text in draw(record, range(4), "weights").texts]
    assert {"1.000", "1.100", "router weight, one scale for all layers"} <= set(words)


def test_schedule_plots_the_plan_and_what_was_kept():
    record = anyres_record(168, 168, layers=6)
    (chart,) = draw(record, [0], "schedule").axes
    real, *parts = chart.lines
    np.testing.assert_allclose(real.get_ydata(), record.kept.mean(axis=1))
    base, tiles = record.layout.parts
    for line, tokens in zip(parts, (base.tokens, tiles.tokens, tiles.newlines), strict=True):
        np.testing.assert_allclose(line.get_ydata(), record.kept[:, tokens.ravel()].mean(axis=1))
    (plan,) = chart.patches
    np.testing.assert_allclose(plan.get_data().values, record.retention)


def test_compare_says_what_is_in_common():
    record = anyres_record(168, 168)
    flipped = replace(record, kept=np.where(record.routed[:, None], ~record.kept, True), model="other")
    words = [text.get_text() for text in draw(record, [0, 3], "compare", against=flipped).texts]
    assert {"100% in common", "0% in common", "A: whole image", "B: 2×2 tiles", "Q: What is it?"} <= set(words)
    assert {"A: planted, trained routers; answers: blue", "B: other, trained routers; answers: blue"} <= set(words)
    nothing = replace(record, kept=record.kept & ~record.routed[:, None])
    words = [text.get_text() for text in draw(record, [3], "compare", against=nothing).texts]
    assert f"{record.kept[3].sum()} and 0 of {record.layout.size}" in words
    assert not [word for word in words if "in common" in word or "by chance" in word]
    with pytest.raises(PmodError, match="something to compare with"):
        draw(record, [3], "compare")


def test_answer_only():
    words = " ".join(t.get_text() for t in draw(anyres_record(168, 168), [3], answer_only=True).texts)
    assert "blue" in words
    assert all(other not in words for other in ("What is it?", "planted", "patch kept", "A: "))
    untrained = draw(anyres_record(168, 168, router_state="untrained"), [3], answer_only=True)
    assert "Untrained routers" in " ".join(text.get_text() for text in untrained.texts)


def test_headings_and_caption():
    record = anyres_record(168, 168, router_state="untrained", notes=("first of 3 frames",))
    words = [text.get_text() for text in draw(record, [0, 3]).texts]
    total = record.layout.size
    assert {"Layer 0", "plain layer:", f"all {total} tokens", "Layer 3"} <= set(words)
    assert f"{record.kept[3].sum()} of {total} kept" in words
    assert "retention 0.33" in words
    assert {"Q: What is it?", "A: blue"} <= set(words)
    text = " ".join(words)
    assert "Untrained routers" in text
    assert "planted, untrained routers; first of 3 frames" in text
    assert "Untrained" not in " ".join(t.get_text() for t in draw(anyres_record(168, 168), [0]).texts)


@pytest.mark.parametrize("options", [{}, {"dpi": 100}, {"bbox_inches": "tight"}, {"bbox_inches": "tight", "dpi": 72}])
def test_pictures_stay_in_their_frames_however_the_figure_is_saved(options):
    """At the figure's own resolution, at another, and cut to what is on it."""
    page = Page(3, 2, dpi=200)
    page.picture(np.full((5, 5, 3), BLUE, dtype=np.uint8), 0.7, 0.4, 1, 0.6)
    page.frame(0.7, 0.4, 1, 0.6, edgecolor="red", linewidth=4)
    buffer = io.BytesIO()
    page.figure.savefig(buffer, format="png", **options)
    drawn = np.asarray(Image.open(buffer).convert("RGB"))
    line, inside = (drawn == [255, 0, 0]).all(-1), (drawn == BLUE).all(-1)
    for axis in (0, 1):
        outer, inner = np.flatnonzero(line.any(axis)), np.flatnonzero(inside.any(axis))
        widths = inner[0] - outer[0], outer[-1] - inner[-1]
        assert min(widths) >= 3
        assert abs(widths[0] - widths[1]) <= 2


def test_saved_as_png_or_svg(tmp_path):
    record = anyres_record(168, 168, answer="漢字 $x$")
    figure = draw(record, [2, 3])
    save(figure, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        picture.load()
        assert picture.width == int(figure.get_figwidth() * 300)
    save(figure, tmp_path / "a.svg")
    drawn = (tmp_path / "a.svg").read_text()
    assert "</svg>" in drawn
    save(draw(record, [2, 3]), tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text() == drawn
    with pytest.raises(PmodError, match=r"a\.gif: pictures are written as \.png or \.svg"):
        save(figure, tmp_path / "a.gif")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "a.svg"]
