"""Sweeps: what is read from the command line, and that each point is what a profile of it would count."""

import json

import pytest

from pmod_cli.core.errors import PmodError
from pmod_cli.model import PmodSettings
from pmod_cli.profiling import Workload, load_subject, profile
from pmod_cli.profiling.cost_sweep import Axis, parse_axis, read_scores, sweep, sweep_rows

WORKLOAD = Workload(((672, 672),), text_tokens=58)


def test_axes_are_read() -> None:
    assert parse_axis("shift=0.3:0.5:0.1") == Axis("shift", (0.3, 0.4, 0.5))
    assert parse_axis("target_retention=0.5,0.4") == Axis("target-retention", (0.5, 0.4))
    assert parse_axis("schedule=cosine, linear,cosine") == Axis("schedule", ("cosine", "linear"))


@pytest.mark.parametrize(
    "text", ["depth=1", "shift=", "shift=a", "shift=0:1", "shift=1:0:0.1", "shift=0:1:0", "shift=0:1e9:1"]
)
def test_axes_without_an_end_are_refused(text: str) -> None:
    with pytest.raises(PmodError):
        parse_axis(text)


@pytest.mark.parametrize("size", ["x", "336", "336x", "-1x3", "3x99999999999"])
def test_sizes_that_are_none_are_refused(size: str) -> None:
    with pytest.raises(PmodError, match="WIDTHxHEIGHT"):
        sweep("llava-1.5-7b", Axis("image-size", (size,)), WORKLOAD)


def test_a_point_is_the_profile_of_its_setting() -> None:
    axis = parse_axis("shift=0.4,0.5")
    points = sweep("llava-1.5-7b", axis, WORKLOAD)
    alone = profile(load_subject("llava-1.5-7b", {"shift": 0.4}), WORKLOAD, dtype="bfloat16")
    formula = alone.formula(pmod=True)
    assert points[0].pmod.full == formula.full
    assert points[0].pmod.paper == formula.paper
    assert points[0].stock.full == points[1].stock.full == alone.formula(pmod=False).full
    assert points[0].pmod_kv == sum(layer.total for layer in alone.pmod_kv)
    assert points[0].mean_retention == pytest.approx(alone.mean_retention)
    assert points[0].pmod.full < points[1].pmod.full
    rows = sweep_rows(axis, points)
    assert [row["shift"] for row in rows] == [0.4, 0.5]
    assert rows[0]["pmod_tflops"] == formula.full / 1e12


def results(folder, mean: float, scores: dict[str, float], **model):
    folder.mkdir()
    known = {"pmod": PmodSettings(mean=mean).to_dict(), "selection": "router", "layers": 32} | model
    tasks = [{"name": name, "scores": {"a": {"score": score}}} for name, score in scores.items()]
    (folder / "results.json").write_text(json.dumps({"models": {"a": known}, "tasks": tasks}))
    return folder


def test_scores_are_means_over_the_tasks_that_all_were_asked(tmp_path) -> None:
    axis = parse_axis("target-retention=0.4,0.5,0.6")
    points = sweep("llava-1.5-7b", axis, WORKLOAD)
    runs = [
        results(tmp_path / "low", 0.4, {"x": 10, "y": 20, "z": 99}),
        results(tmp_path / "high", 0.6, {"x": 30, "y": 50}),
    ]
    found = read_scores(runs, axis, points)
    assert found.tasks == ("x", "y")
    assert found.at == (15, None, 40)
    both = results(tmp_path / "both", 0.5, {"mme": 1500, "pope": 85})
    assert read_scores([both], axis, points, {"mme": 1 / 20}).at == (None, 80, None)
    file = results(tmp_path / "errors", 0.5, {"x": 10, "errors": 3}) / "results.json"
    file.write_text(file.read_text().replace('"score": 3', '"score": 3, "lower_is_better": true'))
    assert read_scores([file], axis, points).tasks == ("x",), "a mean of rights and errors says nothing"
    assert [row["mean_score"] for row in sweep_rows(axis, points, found)] == [15, None, 40]
    with pytest.raises(PmodError, match="same schedule"):
        read_scores([*runs, results(tmp_path / "again", 0.4, {"x": 1})], axis, points)
    with pytest.raises(PmodError, match="at no"):
        read_scores([results(tmp_path / "other", 0.3, {"x": 1})], axis, points)
    with pytest.raises(PmodError, match="no p-MoD model"):
        read_scores([results(tmp_path / "control", 0.4, {"x": 1}, selection="random")], axis, points)
    with pytest.raises(PmodError, match="there is no"):
        read_scores([tmp_path / "nothing"], axis, points)
    with pytest.raises(PmodError, match="image size"):
        read_scores(runs, Axis("image-size", ("3x3",)), points)
