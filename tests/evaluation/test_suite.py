"""Names that users type, against lmms-eval's own task files."""

from pathlib import Path

import pytest
from lmms_eval.tasks import TaskManager

from pmod_cli.errors import PmodError
from pmod_cli.evaluation import suite


def tasks_of(*names: str) -> list[str]:
    return [benchmark.task for benchmark in suite.resolve(names)]


def test_names_titles_tasks_and_groups():
    assert tasks_of("docvqa", "chartqa") == ["docvqa_val", "chartqa"]
    assert tasks_of("DocVQA", "docvqa_val", " OK-VQA ") == ["docvqa_val", "ok_vqa_val2014"]
    assert tasks_of("tiny") == ["tiny_doc", "tiny_chart", "tiny_attribute", "tiny_presence"]
    assert len(tasks_of("paper")) == 14
    assert tasks_of("general", "text-rich") == tasks_of("paper")
    assert tasks_of("tiny_doc", "tiny") == tasks_of("tiny")


def test_the_paper_wins_and_the_prefix_reaches_lmms_eval():
    assert tasks_of("docvqa") == ["docvqa_val"]
    (passed_through,) = suite.resolve(["lmms:docvqa"])
    assert (passed_through.task, passed_through.metric) == ("docvqa", None)
    assert tasks_of("textcaps_val") == ["textcaps_val"]


def test_unknown_names_are_all_named_with_near_ones():
    with pytest.raises(PmodError, match=r"'docvqq'; near: docvqa.*'zzzzzz'") as failure:
        suite.resolve(["docvqq", "tiny", "zzzzzz"])
    assert failure.value.code == 2
    with pytest.raises(PmodError, match="no task was named"):
        suite.resolve([" ", ""])


@pytest.mark.parametrize("benchmark", suite.KNOWN, ids=lambda benchmark: benchmark.name)
def test_task_metric_and_data_are_those_of_lmms_eval(benchmark):
    """Read from the YAML files: an upgrade of lmms-eval that renames one fails here."""
    (folder,) = suite.folders(benchmark)
    assert Path(folder).is_dir()
    manager = TaskManager("ERROR", [folder], include_defaults=False)
    assert benchmark.task in manager.all_tasks
    config = manager._get_config(benchmark.task)
    leaves = [manager._get_config(task) for task in config["task"]] if isinstance(config["task"], list) else [config]
    for leaf in leaves:
        assert benchmark.metric in [entry["metric"] for entry in leaf["metric_list"]]
        assert benchmark.filter in [entry["name"] for entry in leaf.get("filter_list", [{"name": "none"}])]
        if benchmark.data:
            wanted = leaf["dataset_path"] + (f":{leaf['dataset_name']}" if "dataset_name" in leaf else "")
            assert benchmark.data[0] == wanted
