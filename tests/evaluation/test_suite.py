"""Names that users type, against lmms-eval's own task files."""

import pickle
from pathlib import Path

import pytest
import yaml
from lmms_eval.tasks import TaskManager

from pmod_cli.core.errors import PmodError
from pmod_cli.evaluation import suite
from pmod_cli.evaluation.benchmarks import BENCHMARKS
from pmod_cli.evaluation.eval_plan import EvalSettings, plan


def tasks_of(*names: str) -> list[str]:
    return [benchmark.task for benchmark in suite.resolve(names)]


def test_names_titles_tasks_and_groups():
    assert tasks_of("docvqa", "chartqa") == ["docvqa_val", "chartqa"]
    assert tasks_of("DocVQA", "docvqa_val", " OK-VQA ") == ["docvqa_val", "ok_vqa_val2014"]
    assert tasks_of("tiny") == [
        "tiny_doc",
        "tiny_chart",
        "tiny_attribute",
        "tiny_presence",
        "tiny_above",
        "tiny_dearer",
        "tiny_where",
    ]
    assert len(tasks_of("paper")) == 14
    assert tasks_of("general", "text-rich") == tasks_of("paper")
    assert tasks_of("tiny_doc", "tiny") == tasks_of("tiny")


def test_the_paper_wins_and_the_prefix_reaches_lmms_eval():
    assert tasks_of("docvqa") == ["docvqa_val"]
    (passed_through,) = suite.resolve(["lmms:docvqa"])
    assert (passed_through.task, passed_through.metric) == ("docvqa", None)
    assert tasks_of("textcaps_val") == ["textcaps_val"]


def test_two_benchmarks_of_one_task_are_not_taken_for_one(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a key")
    monkeypatch.delenv("API_TYPE", raising=False)
    files = [tmp_path / folder / "task.yaml" for folder in ("a", "b")]
    for file in files:
        file.parent.mkdir()
        file.write_text("task: docvqa_val\n")
    assert [one.name for one in suite.resolve(["docvqa", "lmms:docvqa_val"])] == ["docvqa"], "the first name counts"
    assert tasks_of(str(files[0]), str(files[0])) == ["docvqa_val"]
    for names, said in (
        (["docvqa", str(files[0])], f"have the task docvqa_val: docvqa and {files[0].parent}"),
        (list(map(str, files)), f"have the task docvqa_val: {files[0].parent} and {files[1].parent}"),
        (["mmb", "mmbench_en_dev_static"], "have the name mmb: mmbench_en_dev and mmbench_en_dev_static"),
    ):
        with pytest.raises(PmodError, match=said):
            suite.resolve(names)


def test_a_task_of_ones_own_is_not_drawn_whatever_its_name(tmp_path):
    file = tmp_path / "task.yaml"
    file.write_text("task: tiny_mine\n")
    assert [one.drawn for one in suite.resolve([str(file), "tiny_doc"])] == [False, True]


def test_unknown_names_are_all_named_with_near_ones():
    with pytest.raises(PmodError, match=r"'docvqq'; near: docvqa.*'zzzzzz'") as failure:
        suite.resolve(["docvqq", "tiny", "zzzzzz"])
    assert failure.value.code == 2
    with pytest.raises(PmodError, match="no task was named"):
        suite.resolve([" ", ""])


@pytest.mark.parametrize("benchmark", BENCHMARKS.values(), ids=lambda benchmark: benchmark.name)
def test_task_metric_and_data_are_those_of_lmms_eval(benchmark):
    """Read from the YAML files: an upgrade of lmms-eval that renames one fails here."""
    (folder,) = suite.folders(benchmark)
    assert Path(folder).is_dir()
    manager = TaskManager("ERROR", [folder], include_defaults=False)
    assert benchmark.task in manager.all_tasks
    if benchmark.name == "videomme":
        pytest.importorskip("cv2", reason="the task's own code imports it")
    tagged = manager.task_index[benchmark.task]
    config = tagged if tagged["type"] == "tag" else manager._get_config(benchmark.task)
    leaves = [manager._get_config(task) for task in config["task"]] if isinstance(config["task"], list) else [config]
    for leaf in leaves:
        assert benchmark.metric in [entry["metric"] for entry in leaf["metric_list"]]
        assert benchmark.filter in [entry["name"] for entry in leaf.get("filter_list", [{"name": "none"}])]
        if benchmark.data:
            place = (leaf["dataset_path"], leaf.get("dataset_name", ""), leaf["test_split"].strip())
            assert place in {(source.repository, source.configuration, source.split) for source in benchmark.data}


def test_rows_are_those_of_the_benchmarks():
    rows = {benchmark.name: benchmark.rows for benchmark in BENCHMARKS.values()}
    assert rows["pope"] == 3000 + 3000 + 2910
    assert rows["gqa"] == 12578, "pictures are no questions"
    assert rows["tiny_doc"] == 1000
    assert suite.resolve(["lmms:docvqa"])[0].rows is None


def test_mmbench_is_static_unless_its_judge_has_a_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("API_TYPE", raising=False)
    assert tasks_of("mmb", "MMB") == ["mmbench_en_dev_static"]
    for name in ("mmbench_en_dev", "mmbench_en", "lmms:mmbench", "mmbench_cn_dev"):
        with pytest.raises(PmodError, match=r"judge model, and its key, \$OPENAI_API_KEY, is not set") as failure:
            suite.resolve([name])
        assert failure.value.code == 2
        assert "--tasks mmb" in failure.value.hint
    assert tasks_of("mmbench_en_test") == ["mmbench_en_test"], "its answers are submitted, not judged"
    monkeypatch.setenv("OPENAI_API_KEY", "a key")
    assert tasks_of("mmb") == tasks_of("mmbench_en_dev") == ["mmbench_en_dev"]
    assert suite.resolve(["mmbench_en_dev"])[0].metric == "gpt_eval_score"
    assert tasks_of("mmbench_en_dev_static") == ["mmbench_en_dev_static"]
    monkeypatch.setenv("API_TYPE", "azure")
    assert tasks_of("mmb") == ["mmbench_en_dev_static"]


@pytest.mark.parametrize("benchmark", BENCHMARKS.values(), ids=lambda benchmark: benchmark.name)
def test_benchmarks_go_to_other_processes(benchmark):
    assert pickle.loads(pickle.dumps(benchmark)).name == benchmark.name


def test_a_limit_is_planned_for_each_task_of_a_group(tmp_path):
    """BLINK is 14 tasks of lmms-eval, MVBench 20: a limit of 10 asks 140 and 200. Their number is lmms-eval's own."""
    found = plan(suite.resolve(["blink", "mvbench", "pope", "docvqa"]), [], EvalSettings(limit=10), tmp_path / "run")
    assert [task["questions"] for task in found["tasks"]] == [140, 200, 30, 10]
    assert [BENCHMARKS[name].rows for name in ("blink", "mvbench", "pope")] == [1901, 4000, 8910]
    for name in ("blink", "mvbench", "pope", "muirbench", "videomme", "egoschema"):
        benchmark = BENCHMARKS[name]
        tasks = TaskManager("ERROR", suite.folders(benchmark), include_defaults=False).task_index
        assert len(benchmark.rows_of_tasks) == len(members(tasks[benchmark.task])), name


def members(found: dict) -> list[str]:
    """The tasks that a name of lmms-eval stands for."""
    if found["type"] == "group":
        return yaml.safe_load(Path(found["yaml_path"]).read_text())["task"]
    return found["task"] if found["type"] == "tag" else [found]
