"""Figures show the numbers of the profile and of the sweep, and files are written whole and the same each time."""

import pytest
from matplotlib.colors import to_hex
from PIL import Image

from pmod_cli.core.text import GIGA, MIB
from pmod_cli.profiling import Workload, load_subject, profile, scaled
from pmod_cli.profiling.cost_sweep import Scores, parse_axis, sweep
from pmod_cli.profiling.plots import SCORE, layers_figure, save, sweep_figure, to_svg

LAYERS = 4
WORKLOAD = Workload(text_tokens=20)


@pytest.fixture(scope="module")
def result():
    return profile(scaled(load_subject("llava-1.5-7b"), hidden_size=64, layers=LAYERS), WORKLOAD)


def lines_of(axes) -> dict[str, list[float]]:
    return {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}


def test_layers_are_those_of_the_profile(result):
    retention, flops, cache = layers_figure(result).axes
    assert [bar.get_height() for bar in retention.patches] == [layer.retention for layer in result.pmod.layers]
    assert f"mean {round(result.mean_retention, 6):.4f}" in [text.get_text() for text in retention.texts]
    bars = [bar for group in flops.containers for bar in group]
    assert len(bars) == 3 * LAYERS
    for number, layer in enumerate(result.pmod.layers):
        stacked = bars[2 * LAYERS + number]  # the attention products stand on MLP and projections
        top = stacked.get_y() + stacked.get_height()
        assert top == pytest.approx((layer.total - layer.router) / GIGA)
    text = cache.containers[1][0]
    assert text.get_y() + text.get_height() == pytest.approx(result.pmod_kv[0].total / MIB)


def test_the_mean_is_that_of_the_bars_where_tokens_are_dropped_in_front_of_the_decoder():
    subject = load_subject("llava-1.5-7b", {"before": "divprune:0.33"})
    dropped = profile(scaled(subject, hidden_size=64, layers=LAYERS), WORKLOAD)
    retention = layers_figure(dropped).axes[0]
    bars = [bar.get_height() for bar in retention.patches]
    assert sum(bars) / LAYERS == pytest.approx(dropped.mean_retention)
    assert max(bars) == pytest.approx(0.33)


def test_a_sweep_is_in_percent_of_stock():
    axis = parse_axis("shift=0.4,0.5")
    points = sweep("llava-1.5-7b", axis, WORKLOAD)
    (axes,) = sweep_figure(axis, points).axes
    shown = lines_of(axes)
    assert shown["prefill FLOPs"] == [100 * point.pmod.full / point.stock.full for point in points]
    assert shown["KV cache"] == [100 * point.pmod_kv / point.stock_kv for point in points]
    assert list(axes.get_lines()[0].get_xdata()) == [0.4, 0.5]
    assert axes.get_xlabel() == "shift"

    left, right = sweep_figure(axis, points, Scores(("doc", "chart"), (None, 61.5))).axes
    (line,) = right.get_lines()
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([0.5], [61.5])
    assert to_hex(line.get_color()) == SCORE
    assert right.get_ylabel() == "mean score of doc, chart"
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["prefill FLOPs", "KV cache", "score"]


def test_sizes_and_names_stand_at_even_places():
    axis = parse_axis("image-size=336x336,672x672")
    points = sweep("llava-next-7b", axis, WORKLOAD)
    (axes,) = sweep_figure(axis, points).axes
    assert lines_of(axes)["stock"] == [point.stock.full / 1e12 for point in points]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["336x336", "672x672"]


def test_files_are_whole_and_the_same_each_time(result, tmp_path):
    for name in ("a.svg", "b.svg", "figure.png"):
        (tmp_path / name).write_text("older")
        save(layers_figure(result), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert "<text" in (tmp_path / "a.svg").read_text(), "words stay words"
    with Image.open(tmp_path / "figure.png") as picture:
        assert picture.size == (1440, 1200)
    assert to_svg(layers_figure(result)).startswith("<svg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.svg", "b.svg", "figure.png"]
