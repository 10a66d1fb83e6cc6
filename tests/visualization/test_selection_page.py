"""The page, as a text and in a real browser: headless Chromium moves the slider, hovers and reads."""

import base64
import io
import json
import os
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from pmod_cli.visualization.selection_page import html_page, save_html
from tests.visualization.records import anyres_record, cropped_record, film_record, padded_record, record_of

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
TRICKY = 'what is </script><b id="x">&amp; "$x"? 漢字'


def data_of(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def weighted(record):
    """The record with weights that differ, so that ranks are plain to see: the token's own number in thousandths."""
    weight = np.where(record.routed[:, None], 1 + np.arange(record.layout.size) / 1000, 1)
    return replace(record, weight=weight.astype(np.float32))


def test_nothing_is_fetched_and_nothing_breaks_out():
    page = html_page(anyres_record(84, 168, question=TRICKY, answer=TRICKY))
    assert not re.search(r"https?://|@import|url\(|<link|src=", page)
    assert "default-src 'none'" in page
    assert page.count("</script>") == 2
    assert data_of(page)["question"] == TRICKY
    assert "<b id" not in page


def test_the_largest_page_is_at_most_three_megabytes(tmp_path):
    """Noise of 1,000 x 1,000 pixels, which no picture format makes small; 2,928 tokens, 32 layers."""
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    from tests.visualization.records import image_layout

    processor = LlavaNextImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    random = np.random.default_rng(0)
    record = record_of(image_layout(processor, 14, 1000, 1000), layers=32)
    noise = Image.fromarray(random.integers(0, 255, (1000, 1000, 3), dtype=np.uint8))
    record = replace(record, image=noise, weight=random.normal(1, 0.1, record.weight.shape).astype(np.float32))
    save_html(record, tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size <= 3_000_000


def test_the_page_of_a_film_holds_every_frame_and_a_slider():
    record = film_record(3)
    page = html_page(record)
    data = data_of(page)
    assert data["frames"] == 3
    kind, _, encoded = data["image"].partition(",")
    assert kind == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as strip:
        assert np.array_equal(np.asarray(strip.convert("RGB")), np.asarray(record.image))
    assert '<input type="range" id="frame"' in page
    assert data_of(html_page(anyres_record(84, 84)))["frames"] == 1


def test_a_film_of_many_frames_stays_legible():
    """64 frames of 640 x 360: as many pixels as the largest still, not 25 a frame."""
    noise = np.random.default_rng(0).integers(0, 255, (360, 640 * 64, 3), dtype=np.uint8)
    record = film_record(64)
    strip = Image.fromarray(noise)
    page = data_of(html_page(replace(record, image=strip, layout=replace(record.layout, width=640 * 64, height=360))))
    with Image.open(io.BytesIO(base64.b64decode(page["image"].partition(",")[2]))) as shown:
        assert shown.width / 64 >= 200
        assert max(shown.size) <= 16_000


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        pytest.skip("needs Chromium; none was found (.ci/run installs it where apt-get is there)")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the dev extra")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser, tmp_path):
    """`open_page(record, scheme)`: the record's page from the file system; any error or request fails the test."""
    troubles, requests, contexts = [], [], []

    def get(record, scheme: str = "light", layers=None):
        save_html(record, tmp_path / "page.html", layers=layers)
        context = browser.new_context(color_scheme=scheme, viewport={"width": 1100, "height": 800})
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: requests.append(request.url))
        page.goto((tmp_path / "page.html").as_uri())
        page.wait_for_selector("body[data-ready=yes]")
        return page

    yield get
    for context in contexts:
        context.close()
    assert troubles == []
    assert {url[:5] for url in requests} <= {"file:", "data:"}


def hover(page, part: str, across: float, down: float) -> str:
    """Point into a panel, at shares of its width and height; the text about the token."""
    box = page.locator(f"canvas[data-part={part}]").bounding_box()
    page.mouse.move(box["x"] + box["width"] * across, box["y"] + box["height"] * down)
    return page.inner_text("#token")


def test_slider_hover_texts_and_screenshot(open_page, tmp_path):
    record = weighted(anyres_record(84, 168, layers=6, question=TRICKY, answer="ice cream"))
    page = open_page(record)
    total = record.layout.size
    assert page.inner_text("#question") == TRICKY
    assert page.inner_text("#answer") == "ice cream"
    assert "planted, trained routers; 168 × 84 pixels" in page.inner_text("#about")
    assert page.is_hidden("#alert")

    kept = int(record.kept[5].sum())
    assert page.inner_text("#status") == f"Layer 5: {kept} of {total} kept, retention {record.retention[5]:.3f}"
    page.locator("#layer").fill("1")
    assert page.inner_text("#status") == f"Layer 1: plain, all {total} tokens"
    page.locator("#layer").fill("3")
    assert page.inner_text("#status").startswith("Layer 3: ")
    base, tiles = record.layout.parts
    counts = page.locator("figcaption").all_inner_texts()
    own = [int(record.kept[3][np.append(part.tokens.ravel(), part.newlines)].sum()) for part in (base, tiles)]
    for count, part, text in zip(own, (base, tiles), counts, strict=True):
        assert f"{count} of {part.size} kept" in text

    token = int(base.tokens[6, 3])
    text = hover(page, "base", 3.5 / 12, 6.5 / 12)
    x0, y0, x1, y1 = (int(edge) for edge in record.layout.boxes()[token])
    for line in (
        f"Token {token}",
        "Whole image",
        "6, 3",
        f"{x0}–{x1}",
        f"{y0}–{y1}",
        f"{1 + token / 1000:.4f}",
        f"{record.ranks(3)[token] + 1} of {total}",
        "kept" if record.kept[3, token] else "skipped",
    ):
        assert line in text.split("\n"), (line, text)
    layers = "0–5" if record.kept[3, token] else "0–2"
    assert f"{record.depth[token]} of 6 layers: {layers}" in text.replace("\n", " ")

    end = int(tiles.newlines[0])
    text = hover(page, "tiles", 0.99, 0.5 / len(tiles.row_spans))
    assert f"Token {end}: end of row 0" in text
    page.mouse.move(2, 2)
    assert "Point at a patch." in page.inner_text("#token")

    page.screenshot(path=tmp_path / "page.png", full_page=True)
    with Image.open(tmp_path / "page.png") as shot:
        assert shot.width == 1100
        assert len(shot.convert("RGB").getcolors(maxcolors=2**20)) > 20
    # The blue picture is clear where the token is kept and grey where it is skipped.
    for row, column in ((0, 0), (0, 1), (5, 4), (7, 9)):
        token = base.tokens[row, column]
        pixel = page.evaluate(
            """([across, down]) => { const c = document.querySelector("canvas[data-part=base]");
            return [...c.getContext("2d").getImageData(across * c.width, down * c.height, 1, 1).data]; }""",
            [(column + 0.5) / 12 / 1.045, (row + 0.5) / 12],  # the strip at the right is 0.045 as wide
        )
        assert (pixel[:3] == [0, 0, 255]) == record.kept[3, token], (row, column, pixel)


@pytest.mark.parametrize(("height", "width"), [(2400, 120), (2000, 480), (120, 2400), (7, 9), (480, 640)])
def test_panels_stand_in_line_and_no_caption_lies_over_another(open_page, height, width):
    page = open_page(anyres_record(height, width))
    page.set_viewport_size({"width": 1100, "height": 800})
    canvases = [part.bounding_box() for part in page.locator("canvas[data-part]").all()]
    captions = [caption.bounding_box() for caption in page.locator("figcaption span").all()]
    assert len(canvases) == 2
    beside = canvases[0]["x"] != canvases[1]["x"]
    assert canvases[0]["y"] == canvases[1]["y"] if beside else canvases[0]["x"] == canvases[1]["x"]
    for key in ("width", "height"):
        assert abs(canvases[0][key] - canvases[1][key]) <= 1
    apart = width / height if width / height < 3 else 0  # the strip beside a banner is a larger share
    if apart:
        assert abs(canvases[0]["width"] / canvases[0]["height"] / apart / 1.045 - 1) < 0.1
    boxes = canvases + captions
    for place, one in enumerate(boxes):
        for other in boxes[place + 1 :]:
            across = min(one["x"] + one["width"], other["x"] + other["width"]) - max(one["x"], other["x"])
            down = min(one["y"] + one["height"], other["y"] + other["height"]) - max(one["y"], other["y"])
            assert across <= 0.5 or down <= 0.5, (one, other)


def test_tiles_without_a_column_are_striped_whole(open_page):
    """Of a picture so narrow that only the ends of the rows are left of its tiles."""
    page = open_page(anyres_record(2400, 12))
    assert page.locator("canvas[data-part]").count() == 2
    assert "Striped: cut off" in page.inner_text("#scale")
    found = colours_at(page, "tiles", slice(10, 80), slice(5, 95))
    assert max(max(colour) - min(colour) for colour in found) < 8  # white and grey, nothing of the blue picture


def colours_at(page, part: str, x: slice, y: slice) -> set[tuple[int, ...]]:
    """The colours that a panel has between these percents of its picture."""
    pixels = page.evaluate(
        """([part, x0, x1, y0, y1]) => { const c = document.querySelector(`canvas[data-part=${part}]`);
        const at = (share, size) => Math.round(share / 100 * size);
        return [...c.getContext("2d").getImageData(at(x0, c.width), at(y0, c.height), at(x1 - x0, c.width),
          at(y1 - y0, c.height)).data]; }""",
        [part, x.start, x.stop, y.start, y.stop],
    )
    return {tuple(colour) for colour in np.reshape(pixels, (-1, 4))[:, :3].tolist()}


def test_what_the_model_never_saw_is_striped(open_page):
    record = cropped_record(84, 252)  # the middle third is seen
    page = open_page(record)
    for show in ("kept", "weights", "depth"):
        page.select_option("#show", show)
        assert "Striped: cut off" in page.inner_text("#scale")
        for ends in (slice(10, 20), slice(80, 90)):
            found = colours_at(page, "image", ends, slice(40, 60))
            assert (0, 0, 255) not in found
            assert max(max(colour) - min(colour) for colour in found) < 8  # white and grey
    page = open_page(anyres_record(84, 84))
    assert "Striped" not in page.inner_text("#scale")


def test_weights_hatch_what_is_skipped(open_page):
    record = anyres_record(84, 168)
    base = record.layout.parts[0]
    kept = np.zeros(record.layout.size, dtype=bool)
    kept[base.tokens[:, :6]] = True
    flat = np.full((4, record.layout.size), 1.5, dtype=np.float32)
    page = open_page(replace(record, kept=np.where(record.routed[:, None], kept, True), weight=flat))
    page.select_option("#show", "weights")
    assert "Framed: kept. Hatched: skipped." in page.inner_text("#scale")
    left, right = (colours_at(page, "base", half, slice(30, 70)) for half in (slice(10, 30), slice(60, 80)))
    assert len(left) == 1
    assert len(right) > 5


def test_a_layer_that_holds_a_choice_tells_no_weight_and_no_rank(open_page):
    record = weighted(anyres_record(84, 168))
    record.weight[3] = 1
    page = open_page(record)
    assert hover(page, "base", 0.5, 0.5).count("none: no router here") == 2
    page.select_option("#show", "weights")
    assert "it holds an earlier choice" in page.inner_text("#scale")
    page.keyboard.press("ArrowLeft")
    assert f"1.0000 to {1 + (record.layout.size - 1) / 1000:.4f}" in page.inner_text("#scale")


def test_a_token_that_is_not_routed_has_no_weight_and_no_rank(open_page):
    record = weighted(anyres_record(84, 168))
    base, tiles = record.layout.parts
    routed_tokens = np.arange(record.layout.size) >= base.size
    page = open_page(replace(record, kept=record.kept | ~routed_tokens, routed_tokens=routed_tokens))
    assert hover(page, "base", 0.5, 0.5).count("none: not routed") == 2
    assert f" of {tiles.size}\n" in hover(page, "tiles", 0.5, 0.5)


def test_keyboard_and_themes(open_page):
    record = weighted(anyres_record(84, 168, layers=6))
    page = open_page(record, scheme="dark")
    background = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(background)
    assert max(map(int, re.findall(r"\d+", dark)[:3])) < 60
    page.keyboard.press("t")
    assert page.evaluate(background) == "rgb(255, 255, 255)"
    page.click("#theme")
    assert page.evaluate(background) == dark
    page.locator("#theme").blur()

    page.keyboard.press("Home")
    assert page.inner_text("#status").startswith("Layer 0: plain")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#status").startswith("Layer 3: ")
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#status").startswith("Layer 2: ")
    page.keyboard.press("End")
    assert page.inner_text("#status").startswith("Layer 5: ")
    page.keyboard.press("s")
    assert "router weight 1.0000 to" in page.inner_text("#scale")
    page.keyboard.press("s")
    assert page.inner_text("#scale") == "Dark to light: kept in 0 to 6 layers."

    page.focus("canvas[data-part=tiles]")
    page.keyboard.press("ArrowDown")
    first = int(record.layout.parts[1].tokens[0, 0])
    assert f"Token {first}" in page.inner_text("#token")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert f"Token {int(record.layout.parts[1].tokens[1, 1])}" in page.inner_text("#token")
    assert page.inner_text("#status").startswith("Layer 5: ")  # the arrows were the image's


def test_the_frames_of_a_film_are_walked_through(open_page, tmp_path):
    record = film_record(3)
    page = open_page(record)
    page.keyboard.press("End")
    assert page.is_visible("#frame")
    assert "3 frames" in page.inner_text("#about")
    blue = lambda number: (80 * number, 10, 255 - 80 * number)  # noqa: E731
    for number in range(3):
        page.locator("#frame").fill(str(number))
        assert page.inner_text("#time") == f"{number + 1} of 3"
        assert f"{3 * (number + 1)} of 12 kept" in page.inner_text("figcaption")
        kept = colours_at(page, "image", slice(2, 20), slice(40, 60))
        assert blue(number) in kept
        assert not kept & {blue(other) for other in range(3) if other != number}
        assert f"{number + 1} of 3" in page.get_attribute("canvas[data-part=image]", "aria-label")
        text = hover(page, "image", 0.9, 0.5)
        assert f"Token {12 + 4 * number + 3}" in text
        assert "1, 3" in text
        assert "42–56" in text
    page.screenshot(path=tmp_path / "film.png", full_page=True)
    page.locator("#frame").blur()
    for key, at in ((",", 2), (",", 1), (",", 1), (".", 2), (".", 3), (".", 3)):
        page.keyboard.press(key)
        assert page.inner_text("#time") == f"{at} of 3"
    layer = page.inner_text("#status")
    page.focus("#frame")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Home")
    assert page.inner_text("#time") == "1 of 3"
    assert page.inner_text("#status") == layer, "the arrows were the slider's"
    page.focus("canvas[data-part=image]")
    for _ in range(6):
        page.keyboard.press("ArrowRight")
    assert "Token 3" in page.inner_text("#token"), "the last column of the frame, not of the film"
    assert open_page(anyres_record(84, 84)).is_hidden("#frame")


def test_the_address_names_a_layer(open_page):
    page = open_page(anyres_record(84, 84, layers=6), layers=[1, 3, 5])
    for address, layer in (("#3", 3), ("#1", 1), ("#2", 5), ("#x", 5)):
        page.evaluate("address => { location.hash = address; }", address)
        page.wait_for_function(
            "words => document.querySelector('#status').innerText.startsWith(words)", arg=f"Layer {layer}:"
        )


def test_untrained_padded_and_chosen_layers(open_page):
    record = padded_record(84, 252, router_state="untrained", answer=None, notes=("first of 3 frames",))
    page = open_page(record, layers=[1, 3])
    assert page.is_visible("#alert")
    assert page.inner_text("#answer") == "(not asked for)"
    assert "first of 3 frames" in page.inner_text("#about")
    assert page.locator("canvas[data-part]").count() == 1
    page.keyboard.press("Home")
    assert page.inner_text("#status").startswith("Layer 1: ")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#status").startswith("Layer 3: ")
    assert "padding" in hover(page, "image", 0.5, 0.05)
    assert "padding" not in hover(page, "image", 0.5, 0.5)
