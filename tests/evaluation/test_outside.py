"""A benchmark from outside the package: registered by a call, by an entry point, or named by its YAML file."""

import json

import pytest
from datasets import Dataset, Features, Image, Value
from PIL import Image as Pictures

from pmod_cli import cli
from pmod_cli.core.errors import PmodError
from pmod_cli.evaluation import questions, scoring
from pmod_cli.evaluation.benchmarks import BENCHMARKS, Benchmark, register_benchmark
from pmod_cli.evaluation.journal import Answer
from pmod_cli.evaluation.suite import resolve

TASK = """\
task: toy_colours
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: generate_until
doc_to_visual: !function toy_colours_pictures.visual
doc_to_text: "{{{{question}}}}"
doc_to_target: "answer"
generation_kwargs:
  max_new_tokens: 2
  temperature: 0
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
PACKAGE = """\
from pmod_cli.evaluation.benchmarks import Benchmark

COLOURS = Benchmark("colours", "Colours", "toy_colours", "exact_match", {folder!r}, group="toys", questions=3)
"""


@pytest.fixture
def registry(monkeypatch):
    """What the test registers is forgotten after it."""
    BENCHMARKS.values()
    monkeypatch.setattr(BENCHMARKS, "_items", dict(BENCHMARKS._items))
    return BENCHMARKS


@pytest.fixture
def task(tmp_path):
    """A folder with the task file of a benchmark of three questions, its code and its data."""
    folder = tmp_path / "toy"
    folder.mkdir()
    colours = ("red", "green", "blue")
    rows = {
        "image": [Pictures.new("RGB", (8, 8), colour) for colour in colours],
        "question": ["What colour is this?"] * 3,
        "answer": list(colours),
    }
    features = Features({"image": Image(), "question": Value("string"), "answer": Value("string")})
    Dataset.from_dict(rows, features=features).to_parquet(folder / "rows.parquet")
    (folder / "toy_colours.yaml").write_text(TASK.format(rows=folder / "rows.parquet"))
    (folder / "toy_colours_pictures.py").write_text('def visual(doc):\n    return [doc["image"].convert("RGB")]\n')
    return folder


def scores(capsys, tasks: str, stock) -> list[dict]:
    assert cli.main(["eval", "--tasks", tasks, "-m", str(stock), "--json", "-o", "run", "--overwrite"]) == 0
    return json.loads(capsys.readouterr().out)["tasks"]


def test_by_a_call(registry, task, stock_model, workdir, capsys):
    register_benchmark(
        Benchmark("colours", "Colours", "toy_colours", "exact_match", str(task), group="toys", questions=3)
    )
    (found,) = scores(capsys, "toys", stock_model())
    assert (found["title"], found["group"], found["rows"]) == ("Colours", "toys", 3)
    (entry,) = found["scores"].values()
    assert (entry["questions"], entry["paper"], entry.get("error")) == (3, None, None)
    assert 0 <= entry["score"] <= 100

    assert cli.main(["eval", "--list"]) == 0
    listed = capsys.readouterr().out
    assert "toys: colours" in listed
    assert "toy_colours" in listed
    with pytest.raises(PmodError, match="near: colours"):
        resolve(["colour"])
    with pytest.raises(PmodError, match="two of the benchmark 'colours'"):
        register_benchmark(Benchmark("colours", "Other", "other", None))


def test_by_an_entry_point(registry, task, stock_model, workdir, tmp_path, monkeypatch, capsys):
    (tmp_path / "colours_package.py").write_text(PACKAGE.format(folder=str(task)))
    information = tmp_path / "colours_package-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: colours-package\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[pmod_cli.benchmarks]\ncolours = colours_package:COLOURS\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_complete", False)
    assert cli.main(["eval", "--tasks", "colours", "-m", str(stock_model()), "--dry-run", "--json"]) == 0
    (planned,) = json.loads(capsys.readouterr().out)["tasks"]
    assert (planned["name"], planned["questions"]) == ("colours", 3)


def test_a_folder_that_does_not_exist_is_named_before_a_model_is_loaded(registry, stock_model, workdir, capsys):
    register_benchmark(Benchmark("colours", "Colours", "toy_colours", "exact_match", "/no/such/folder"))
    assert cli.main(["eval", "--tasks", "colours", "-m", str(stock_model()), "-o", "run"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "the task files of colours are in /no/such/folder: no such folder" in said
    assert not (workdir / "run").exists()


def test_a_metric_of_100_points_is_not_multiplied_by_100(task, stock_model, workdir, capsys):
    """As of `--tasks mvbench_action_count`, one of MVBench's own tasks: its metric is in percent already."""
    file = task / "toy_colours.yaml"
    metric = "metric: mvbench_accuracy\n    aggregation: !function toy_colours_pictures.percent"
    file.write_text(file.read_text().replace("metric: exact_match\n    aggregation: mean", metric))
    with file.open("a") as text:
        text.write("process_results: !function toy_colours_pictures.judge\n")
    with (task / "toy_colours_pictures.py").open("a") as text:
        item = '{"pred_answer": "A", "score": doc["answer"] != "red"}'
        text.write(f'def judge(doc, results):\n    return {{"mvbench_accuracy": {item}}}\n')
        text.write('def percent(items):\n    return 100 * sum(item["score"] for item in items) / len(items)\n')
    (found,) = scores(capsys, str(file), stock_model())
    (entry,) = found["scores"].values()
    assert (entry["score"], found["scale"]) == (pytest.approx(200 / 3), 1.0)
    assert entry["high"] == 100.0  # the interval is in the same points


def test_by_its_file(task, stock_model, workdir, capsys):
    # Files of other tools beside it: lmms-eval would read each, and ends at the first that is no mapping.
    (task / "deploy.yaml").write_text("a: 1\n---\nb: 2\n")
    (task / "list.yaml").write_text("- a\n")
    (task / "cloud.yaml").write_text("a: !Ref b\n")
    (task / "old.yaml").write_bytes(b"a: \xff\n")
    (found,) = scores(capsys, str(task / "toy_colours.yaml"), stock_model())
    assert (found["name"], next(iter(found["scores"].values()))["questions"]) == ("toy_colours", 3)
    assert cli.main(["eval", "--tasks", "missing.yaml", "-m", str(stock_model())]) == 2
    assert "there is no task file missing.yaml" in capsys.readouterr().err
    (task / "empty.yaml").write_text("metric_list: []\n")
    assert cli.main(["eval", "--tasks", str(task / "empty.yaml"), "-m", str(stock_model())]) == 2
    assert "defines no task" in capsys.readouterr().err


@pytest.mark.parametrize("lower", [True, False])
def test_whether_lower_is_better_is_read_from_the_task(registry, task, tmp_path, lower):
    file = task / "toy_colours.yaml"
    file.write_text(file.read_text().replace("higher_is_better: true", f"higher_is_better: {str(not lower).lower()}"))
    (benchmark,) = resolve([str(file)])
    opened = questions.load(benchmark, log=tmp_path / "log")
    answers = {place: Answer("red", "prompt", 10, 1) for place in range(3)}
    entry = scoring.score(benchmark, opened, answers, seed=0, log=tmp_path / "log").entry()
    assert (entry["score"], entry["lower_is_better"]) == (pytest.approx(100 / 3), lower)
