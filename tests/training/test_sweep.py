"""The ablation sweep: which cells, going on where it stopped, sharing, the table, and the score it is made of."""

import json
import multiprocessing
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pmod_cli import recipe_files
from pmod_cli.checkpoints import convert, load_model, resolve
from pmod_cli.core.atomic import locked
from pmod_cli.core.errors import PmodError
from pmod_cli.data.documents import TASKS
from pmod_cli.data.rendered import IGNORED
from pmod_cli.model import PmodSettings
from pmod_cli.profiling.plots import save
from pmod_cli.training import teacher_forced
from pmod_cli.training.ablation_sweep import cells_of, folder_of, markdown, sweep, table
from pmod_cli.training.answers import positions
from pmod_cli.training.recipe import load_settings
from pmod_cli.training.sweep_cells import Cell, read_result
from pmod_cli.training.sweep_figure import sweep_figure
from pmod_cli.training.sweep_plan import plan_sweep
from pmod_cli.training.teacher_forced import answered, right_answers
from pmod_cli.training.trainer import PmodTrainer
from tests.conftest import ROOT

QUICK = ["train.max_steps=1", "train.batch_size=2", "model.calibration_images=2"]
RESULT = {  # of a cell, without what its table does not need
    **{"seed": 0, "settings": {}, "images": 4, "mean_retention": 0.5375, "cpu_seconds": 1.0},
    "answered": {"doc": [9, 10]},
}


def test_each_ablation_changes_one_thing_and_keeps_as_many_tokens():
    """All rows of Tables 3, 4, 5 and Figure 3, and the two controls, beside the reference."""
    reference = load_settings(recipe_files.find("ablations/p-mod"))
    found = {
        cell.recipe.partition("/")[2]: load_settings(recipe_files.find(cell.recipe))
        for cell in cells_of("ablations", [0])
    }
    assert next(iter(found)) == "p-mod"
    assert len(found) == 20
    for name, settings in found.items():
        same_data = (settings.data, settings.train, settings.model) == (
            reference.data,
            reference.train,
            reference.model,
        )
        assert same_data, name
        changed = set(settings.pmod.given) | ({"selection"} if settings.pmod.selection is not None else set())
        expected = {"layers": {"schedule", "values"}, "p": set(), "stock": set()}
        assert changed == expected.get(name.partition("-")[0], {name.partition("-")[0]}), name
        ratios = PmodSettings.from_dict(settings.pmod.given).retention(32)
        kept = sum(ratios) / 32
        if name.startswith(("schedule", "norm", "selection", "string", "p-mod")):
            assert kept == pytest.approx(0.5375, abs=0.002), name
        if name.startswith("layers"):
            first, last = map(int, name.split("-")[1:])
            assert [i for i, ratio in enumerate(ratios) if ratio == 0.15] == list(range(first, last + 1))
            assert set(ratios) == {0.15, 0.7}
    assert {0.394, 0.475, 0.6} == {
        round(sum(PmodSettings.from_dict(s.pmod.given).retention(32)) / 32, 3)
        for name, s in found.items()
        if name.startswith("shift")
    }


def test_choices_differ_in_who_chooses_and_where_routers_start_and_in_nothing_else():
    found = {
        cell.recipe.partition("/")[2]: load_settings(recipe_files.find(cell.recipe)) for cell in cells_of("choice", [0])
    }
    reference = found["p-mod"]
    chosen = {"held-1": [8], "held-2": [8, 16], "zero-held-1": [8]}
    for name, settings in found.items():
        assert (settings.data, settings.train) == (reference.data, reference.train), name
        start = "zero" if name.startswith("zero") else "calibrated"
        assert settings.model == replace(reference.model, router_start=start), name
        assert settings.pmod.enabled is (name != "stock")
        given = PmodSettings.from_dict(settings.pmod.given)
        assert list(given.select_at or ()) == chosen.get(name, []), name
        assert given.retention(32) == PmodSettings().retention(32)
        assert given.retention(32).index(next(ratio for ratio in given.retention(32) if ratio < 1)) == 8


def test_the_rows_that_ask_for_reasons_keep_as_many_tokens():
    """Beside the rows of the first bed whose place they explain: one thing differs."""
    found = {
        cell.row: load_settings(recipe_files.find(cell.recipe))
        for cell in cells_of(str(ROOT / "tests" / "beds" / "tiny_llava_next" / "reasons"), [0])
    }
    ratios = {name: PmodSettings.from_dict(settings.pmod.given).retention(32) for name, settings in found.items()}
    cosine, stepped = PmodSettings().retention(32), PmodSettings(schedule="stepped").retention(32)
    for name, last in (("stepped-15", cosine[24:]), ("cosine-7", stepped[24:])):
        assert sum(ratios[name]) == pytest.approx(sum(cosine))
        assert ratios[name][24:] == pytest.approx(last)
    thinned = PmodSettings.from_dict(load_settings(recipe_files.find("ablations/layers-16-23")).pmod.given)
    held = PmodSettings.from_dict(found["layers-16-23-held"].pmod.given)
    assert ratios["layers-16-23-held"] == thinned.retention(32)
    assert [i for i in range(32) if i not in held.select_at] == list(range(17, 24))


def test_cells_come_seed_by_seed_the_reference_first():
    cells = cells_of("ablations", range(3))
    assert len(cells) == 60
    assert cells[0] == Cell("ablations/p-mod", 0)
    assert [cell.seed for cell in cells] == [0] * 20 + [1] * 20 + [2] * 20
    names = [cell.recipe for cell in cells[:20]]
    assert names.index("ablations/layers-8-15") < names.index("ablations/layers-16-23")
    with pytest.raises(PmodError, match=r"no recipes are called nothing/…; there are groups .*ablations"):
        cells_of("nothing", [0])


def test_single_recipes_of_a_group_are_a_sweep_too():
    cells = cells_of("choice/held-1, choice/p-mod", range(2))
    assert [cell.name for cell in cells] == ["p-mod-seed0", "held-1-seed0", "p-mod-seed1", "held-1-seed1"]
    for wrong in ("tiny", "choice/held", "choice,nothing"):
        with pytest.raises(PmodError, match="there are groups"):
            cells_of(wrong, [0])


def test_a_pattern_names_recipes_of_a_group():
    found = [cell.name for cell in cells_of("ablations/norm-s*,ablations/p-mod", [0])]
    assert found == ["p-mod-seed0", "norm-shifted-softmax-seed0", "norm-sigmoid-seed0", "norm-softmax-seed0"]


def test_a_folder_of_ones_own_is_a_group(tmp_path, monkeypatch):
    """Beside shipped recipes, in the same table; a shipped group is meant where a folder has its name."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "half-0.5.yaml").write_text("base: ablations/p-mod\npmod: {min_ratio: 0.5}\n")
    (mine / "notes.txt").write_text("no recipe")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "choice").mkdir()
    for asked in ("mine", "./mine/", str(mine), "mine/half-0.5.yaml"):
        assert [cell.name for cell in cells_of(f"{asked},choice/p-mod", [0])] == ["p-mod-seed0", "half-0.5-seed0"]
    cells = cells_of("mine", [0])
    found = sweep(cells, tmp_path / "out", overrides=QUICK, images=2)
    assert [(row["recipe"], row["status"]) for row in found["rows"]] == [("half-0.5", "run")]
    (mine / "third.yml").write_text("base: ablations/p-mod\npmod: {min_ratio: 0.3}\n")
    assert [cell.row for cell in cells_of("mine", [0])] == ["half-0.5", "third"]
    assert found["rows"][0]["mean_retention"] > 0.6
    assert read_result(tmp_path / "out", cells[0])["settings"]["pmod"]["min_ratio"] == 0.5


def test_two_recipes_of_one_name_cannot_share_a_table(tmp_path):
    with pytest.raises(PmodError, match=r"ablations/p-mod and choice/p-mod .* p-mod"):
        cells_of("ablations,choice", [0])


def test_a_folder_without_recipes_is_no_group(tmp_path, monkeypatch):
    with pytest.raises(PmodError, match=r"no recipe \(\.yaml or \.yml\) in"):
        cells_of(str(tmp_path), [0])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("base: ablations/p-mod\n")
    with pytest.raises(PmodError, match="there are groups"):
        cells_of("choice,", [0])


def test_a_sweep_has_a_folder_of_its_group(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "half.yaml").write_text("base: ablations/p-mod\n")
    for group, name in (("choice/held-1,choice/p-mod", "choice"), (f"{tmp_path}/mine", "mine")):
        assert folder_of(cells_of(group, [0])) == Path("runs", name)


@pytest.mark.parametrize(("folder", "elsewhere"), [("layers", 0.7), ("alone", 1)])
def test_the_groups_of_layers_of_the_second_bed_cover_it(folder, elsewhere):
    """Each thins as many of its 30 layers, and the rest is that of the shipped rows."""
    reference = load_settings(recipe_files.find("ablations/p-mod"))
    thinned = []
    for cell in cells_of(str(ROOT / "tests" / "beds" / "small_llava_next" / folder), [0]):
        settings = load_settings(recipe_files.find(cell.recipe))
        assert (settings.data, settings.train, settings.model) == (reference.data, reference.train, reference.model)
        ratios = PmodSettings.from_dict(settings.pmod.given).retention(30)
        assert set(ratios) == {0.15, elsewhere}
        thinned.append([i for i, ratio in enumerate(ratios) if ratio == 0.15])
        assert cell.row == f"{folder}-{thinned[-1][0]}-{thinned[-1][-1]}"
    assert thinned == [list(range(first, first + 6)) for first in range(0, 30, 6)]


@pytest.mark.parametrize("override", ["train.seed=7", "eval=[tiny]", "eval_limit=3"])
def test_what_a_sweep_would_not_follow_is_refused(tmp_path, override):
    with pytest.raises(PmodError, match=override.partition("=")[0]):
        sweep([Cell("ablations/p-mod", 0)], tmp_path, overrides=[*QUICK, override])
    assert not list(tmp_path.iterdir())


def test_a_sweep_goes_on_and_tells_what_was_not_run(tmp_path):
    cells = [Cell("ablations/p-mod", 0), Cell("ablations/selection-uniform", 0), Cell("ablations/stock", 0)]
    told = []

    def tell(cell, what):
        told.append((cell.name, what))
        if what == "done" and len(told) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(cells, tmp_path, overrides=QUICK, images=4, on_cell=tell)
    found = table(cells, tmp_path)["rows"]
    assert [row["status"] for row in found] == ["run", "not run", "not run"]
    text = markdown({"rows": found})
    assert "| p-mod | 0.5375 |" in text
    assert re.search(r"^\| selection-uniform \|(  \|)+ not run \| 0 (\|  ){3}\|$", text, re.MULTILINE)

    told.clear()
    before = (tmp_path / "cells" / "p-mod-seed0.json").read_bytes()
    (tmp_path / "runs" / "selection-uniform-seed0").mkdir()  # as of a process that was killed
    (tmp_path / "runs" / "p-mod-seed0").mkdir()  # of one that was killed when it had written its result
    found = sweep(
        cells[:2], tmp_path, overrides=QUICK, images=4, on_cell=lambda cell, what: told.append((cell.name, what))
    )
    assert told == [
        ("p-mod-seed0", "done before"),
        *[("selection-uniform-seed0", what) for what in ("running", "done")],
    ]
    assert (tmp_path / "cells" / "p-mod-seed0.json").read_bytes() == before
    assert not list((tmp_path / "runs").iterdir())  # a scored run is removed
    assert found["rows"][1]["cpu_seconds"] is None  # what that one took is not known
    row = found["rows"][0]
    assert set(row["score_percent"]) == set(TASKS)
    assert row["mean_score_percent"]["spread"] is None
    assert row["questions"]["doc"] == 12
    assert row["steps"] == 1
    assert 200 < row["peak_memory_mib"] < 8_000  # of a process that holds torch, and of a model of megabytes
    assert re.search(r"\| 1 \| 1 \| \d+ \| \d{3,4} \|$", markdown(found).splitlines()[2])
    with pytest.raises(PmodError, match=r"cell p-mod-seed0 with other settings:\n  train.max_steps: 1 -> 2"):
        sweep(cells[:1], tmp_path, overrides=[*QUICK, "train.max_steps=2"], images=4)


def test_a_cell_that_was_stopped_while_it_was_scored_knows_its_loss(tmp_path, monkeypatch):
    def stopped(*arguments, **named):
        raise KeyboardInterrupt

    cell = Cell("ablations/p-mod", 0)
    monkeypatch.setattr(teacher_forced, "answered", stopped)
    with pytest.raises(KeyboardInterrupt):
        sweep([cell], tmp_path, overrides=[*QUICK, "train.log_steps=1"], images=2)
    monkeypatch.undo()
    sweep([cell], tmp_path, overrides=[*QUICK, "train.log_steps=1"], images=2)
    assert read_result(tmp_path, cell)["loss"] > 0


def test_a_cell_that_another_process_has_is_left_to_it(tmp_path):
    cell, told = Cell("ablations/p-mod", 0), []
    (tmp_path / "cells").mkdir()
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()

    def hold():
        with locked(tmp_path / "cells" / f".{cell.name}.lock"):
            ready.set()
            done.wait(30)

    other = context.Process(target=hold)
    other.start()
    ready.wait(30)
    try:
        found = sweep([cell], tmp_path, overrides=QUICK, images=4, on_cell=lambda cell, what: told.append(what))
    finally:
        done.set()
        other.join()
    assert told == ["taken by another process"]
    assert found["rows"][0]["status"] == "not run"


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "Expecting value"),
        (json.dumps(RESULT)[:60], "Unterminated string|Expecting"),
        ("[]", "a list is not"),
        ("null", "a NoneType is not"),
        (json.dumps(RESULT | {"seed": 1}), "seed is not"),
        (json.dumps(RESULT | {"settings": None, "images": "4"}), "settings, images are not"),
        (json.dumps({key: value for key, value in RESULT.items() if key != "answered"}), "answered is not"),
        *(
            (json.dumps(RESULT | {"answered": answered}), "answered is not")
            for answered in ({}, [], {"doc": 9}, {"doc": [9]}, {"doc": [0, 0]}, {"doc": [11, 10]}, {"doc": ["9", 10]})
        ),
        (json.dumps(RESULT | {"mean_retention": float("nan")}), "NaN is no number"),
        (json.dumps(RESULT).replace("0.5375", "1e999"), "larger than any float"),
        (json.dumps(RESULT | {"cpu_seconds": "long", "steps": True}), "cpu_seconds, steps are not"),
        (json.dumps(RESULT | {"failed": None}), "failed is not"),
    ],
)
def test_a_damaged_result_is_named(tmp_path, text, wrong):
    """By the file, and by what to do: no traceback, and no table with a number of it."""
    cell, path = Cell("ablations/p-mod", 0), tmp_path / "cells" / "p-mod-seed0.json"
    path.parent.mkdir()
    path.write_text(json.dumps(RESULT))
    assert read_result(tmp_path, cell) == RESULT
    path.write_text(text)
    for look in (
        lambda: table([cell], tmp_path),
        lambda: sweep([cell], tmp_path),
        lambda: plan_sweep([cell], tmp_path),
    ):
        with pytest.raises(PmodError, match=f"{path} is no result of this cell: .*({wrong})") as caught:
            look()
        assert caught.value.hint == "remove that file: the cell is then run again"


def test_cells_of_another_process_with_other_settings_are_in_no_table(tmp_path):
    """It began this one before there was a result to compare with."""
    cell, path = Cell("ablations/p-mod", 0), tmp_path / "cells" / "p-mod-seed0.json"
    path.parent.mkdir()

    def ends(cell, what):
        assert what == "taken by another process"
        path.write_text(json.dumps(RESULT | {"settings": {"train": {"max_steps": 2}}}))

    with locked(path.with_name(".p-mod-seed0.lock")), pytest.raises(PmodError, match=r"train\.max_steps: 2 -> 1"):
        sweep([cell], tmp_path, overrides=QUICK, images=4, on_cell=ends)


def test_a_cell_that_was_stopped_and_is_another_now_is_refused_first(stock_model, tmp_path, monkeypatch):
    """Before any cell runs, by its own name; the command of a single run would not help."""
    cells, told = [Cell("choice/p-mod", 0), Cell("choice/stock", 0)], []
    words = [f"model.name={stock_model()}", "train.max_steps=2", "train.batch_size=1", "model.router_start=zero"]

    def stopped(self, *arguments, **named):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PmodTrainer, "train_rest", stopped)
        with pytest.raises(KeyboardInterrupt):
            sweep(cells[1:], tmp_path, overrides=words, images=1)
    for again in (sweep, plan_sweep):
        with pytest.raises(
            PmodError, match=r"unfinished run of cell stock-seed0 .*\n  train.batch_size: 1 -> 2"
        ) as caught:
            again(cells, tmp_path, overrides=[*words, "train.batch_size=2"], images=1)
        assert caught.value.hint == f"choose another `out`, or remove {tmp_path / 'runs' / 'stock-seed0'}"
    assert not list((tmp_path / "cells").iterdir())
    sweep(cells[1:], tmp_path, overrides=words, images=1, on_cell=lambda cell, what: told.append(what))
    assert told == ["running", "done"]


def test_a_model_that_was_trained_anew_meanwhile_is_another_start(stock_model, tmp_path):
    """Its name is the same, and a table would have rows of two models."""
    model, cell = tmp_path / "model", Cell("choice/stock", 0)
    shutil.copytree(stock_model(), model)
    words = [f"model.name={model}", "train.max_steps=1", "train.batch_size=1"]
    found = sweep([cell], tmp_path / "out", overrides=words, images=1)
    assert sweep([cell], tmp_path / "out", overrides=words, images=1) == found
    weights = load_file(model / "model.safetensors")
    name = next(iter(weights))
    save_file({**weights, name: weights[name] + 1}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        PmodError, match=r"stock-seed0 with other settings:\n  model\.name: other weights under that name"
    ):
        sweep([cell], tmp_path / "out", overrides=words, images=1)


def test_adapters_of_a_cell_are_merged_to_be_scored(stock_model, tmp_path):
    (tmp_path / "apart.yaml").write_text("lora: {enabled: true, merge: false, rank: 2}\npmod: {enabled: true}\n")
    words = [f"model.name={stock_model()}", "train.max_steps=1", "train.batch_size=1"]
    found = sweep([Cell(str(tmp_path / "apart.yaml"), 0)], tmp_path / "out", overrides=words, images=1)
    assert found["rows"][0]["status"] == "run"


def test_a_run_that_diverges_is_a_result(tmp_path):
    """An absurd learning rate: the loss is not a number, which the table says, and the sweep goes on."""
    cell = Cell("ablations/norm-none", 0)
    overrides = ["train.max_steps=6", "train.batch_size=2", "model.calibration_images=2", "train.learning_rate=1e9"]
    found = sweep([cell], tmp_path, overrides=overrides, images=4)
    (row,) = found["rows"]
    assert row["failed"]["0"].startswith("the loss is ")
    assert row["status"] == "run"
    assert "the loss is" in markdown(found)
    assert json.loads((tmp_path / "cells" / "norm-none-seed0.json").read_text())["failed"] == row["failed"]["0"]


def test_a_full_disk_is_no_result(stock_model, tmp_path, monkeypatch):
    """The sweep ends with it, and the cell is run when it is repeated."""
    cell, saved, told = Cell("choice/p-mod", 0), PmodTrainer._save_rng_state, []
    small = [f"model.name={stock_model()}", "train.max_steps=1", "train.batch_size=1", "model.router_start=zero"]

    def full(self, folder):
        raise OSError(28, "No space left on device", folder)

    monkeypatch.setattr(PmodTrainer, "_save_rng_state", full)
    with pytest.raises(PmodError, match="the disk is full"):
        sweep([cell], tmp_path, overrides=small, images=1)
    assert table([cell], tmp_path)["rows"][0]["status"] == "not run"
    monkeypatch.setattr(PmodTrainer, "_save_rng_state", saved)
    sweep([cell], tmp_path, overrides=small, images=1, on_cell=lambda cell, what: told.append(what))
    assert told == ["running", "done"]


def test_the_retention_of_a_cell_is_that_of_its_model(stock_model, tmp_path):
    """A p-MoD checkpoint keeps its own routing where a recipe names none."""
    convert(stock_model("llava_next", "llama"), tmp_path / "routed", PmodSettings(shift=0.6))
    small = [f"model.name={tmp_path / 'routed'}", "train.max_steps=1", "train.batch_size=1", "model.router_start=zero"]
    cell = Cell("choice/p-mod", 0)
    found = sweep([cell], tmp_path / "sweep", overrides=small, images=1)["rows"][0]["mean_retention"]
    planned = plan_sweep([cell], tmp_path / "sweep", overrides=small, images=1)["rows"][0]["mean_retention"]
    assert found == planned == load_model(tmp_path / "routed")[0].config.settings.mean_retention(4) > 0.6


def test_a_sweep_is_drawn_row_by_row(tmp_path):
    rows = [
        {"recipe": "p-mod", "mean_score_percent": {"mean": 90.0, "spread": 1.0}, "of_each_seed": [89.0, 90.0, 91.0]},
        {"recipe": "one-seed", "mean_score_percent": {"mean": 80.0, "spread": None}, "of_each_seed": [80.0]},
        {"recipe": "norm-none", "status": "run", "failed": {"0": "the loss is not a number"}},
        {"recipe": "stock", "status": "not run", "failed": {}},
    ]
    figure = sweep_figure(rows, "p-mod")
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [row["recipe"] for row in rows]
    assert [text.get_text() for text in axes.texts] == ["the loss is not a number", "not run"]
    points = [line.get_xydata().tolist() for line in axes.lines if line.get_marker() == "o"]
    assert points == [[[90.0, 0.0]], [[80.0, 1.0]]]
    seeds = [line.get_xdata().tolist() for line in axes.lines if line.get_marker() == "|"]
    assert seeds == [[89.0, 90.0, 91.0], [80.0]]
    save(figure, tmp_path / "table.png")
    assert (tmp_path / "table.png").stat().st_size > 5000


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_cell_is_scored_in_the_precision_it_was_trained_in(tmp_path, monkeypatch, precision):
    seen = []

    def watched(model, *arguments, **named):
        seen.append(model.dtype)
        return answered(model, *arguments, **named)

    monkeypatch.setattr(teacher_forced, "answered", watched)
    overrides = [*QUICK, f"model.precision={precision}"]
    row = sweep([Cell("ablations/p-mod", 0)], tmp_path, overrides=overrides, images=2)["rows"][0]
    assert row["status"] == "run"
    assert seen == [getattr(torch, precision)]


def test_mean_and_spread_are_over_seeds(tmp_path):
    (tmp_path / "cells").mkdir()
    for seed, right in enumerate((80, 90)):
        result = {**RESULT, "seed": seed, "answered": {"doc": [right, 100], "chart": [50, 50]}}
        (tmp_path / "cells" / f"p-mod-seed{seed}.json").write_text(json.dumps(result))
    found = table(cells_of("ablations", range(3))[::20], tmp_path)
    (row,) = found["rows"]
    assert (row["status"], row["seeds"]) == ("partly run", [0, 1])
    assert row["score_percent"]["doc"] == {"mean": 85.0, "spread": pytest.approx(50**0.5)}
    assert row["mean_score_percent"] == {"mean": 92.5, "spread": pytest.approx(12.5**0.5)}
    assert "| p-mod | 0.5375 | 85.0 ± 7.1 | 100.0 ± 0.0 | 92.5 ± 3.5 | 2 |  | 1 |  |" in markdown(found)


def test_recipes_may_teach_other_tasks(tmp_path):
    """Each task has its column, and the table says that the means are over unlike tasks."""
    (tmp_path / "cells").mkdir()
    for name, right in (("a", {"doc": [80, 100], "chart": [50, 100]}), ("b", {"doc": [9, 10], "where": [4, 10]})):
        (tmp_path / "cells" / f"{name}-seed0.json").write_text(json.dumps({**RESULT, "answered": right}))
    both = [Cell("mine/a.yaml", 0), Cell("mine/b.yaml", 0)]
    lines = markdown(table(both, tmp_path)).splitlines()
    assert lines[0].startswith("| recipe | retention | doc | chart | where | mean |")
    assert lines[2].startswith("| a | 0.5375 | 80.0 | 50.0 |  | 65.0 |")
    assert lines[3].startswith("| b | 0.5375 | 90.0 |  | 40.0 | 65.0 |")
    assert lines[4:] == ["", "The recipes were not scored on the same tasks: a mean is over a row's own."]
    assert len(markdown(table(both[:1], tmp_path)).splitlines()) == 3


def test_an_answer_is_right_if_all_of_it_is():
    labels = torch.full((2, 9), IGNORED)
    labels[0, 2:4], labels[0, 6:9] = torch.tensor([5, 1]), torch.tensor([4, 4, 1])
    labels[1, 8] = 3
    assert positions(labels).tolist() == [1, 2, 5, 6, 7, 9 + 7]
    said = torch.tensor([5, 1, 4, 4, 1, 3])
    assert right_answers(said, labels).tolist() == [True, True, True]
    said[3] = 2  # the middle token of the second answer
    assert right_answers(said, labels).tolist() == [True, False, True]
    said[5] = 0
    assert right_answers(said, labels).tolist() == [True, False, False]


def test_the_bundled_model_answers_in_this_measure():
    """As by generation (docs/results.md): nearly all; the same questions in batches of any size."""
    model, processor = load_model(resolve("tiny-llava-next").path, dtype="float32")
    found = answered(model, processor, ["doc", "presence"], 8)
    assert found == answered(model, processor, ["doc", "presence"], 8, batch_size=3)
    assert found["doc"][1] == found["presence"][1] == 24
    assert found["doc"][0] >= 22
