"""Who stands beside the model, and how the stock model is found again."""

import pytest
from PIL import Image

from pmod_cli.checkpoints import convert
from pmod_cli.core.errors import PmodError
from pmod_cli.evaluation import eval_models, suite
from pmod_cli.evaluation.loaded import load
from pmod_cli.evaluation.prompts import prepare
from pmod_cli.evaluation.results import markdown, tables
from pmod_cli.evaluation.results.report import Report
from pmod_cli.families.configs import vision_token_ids
from pmod_cli.families.sizes import Sizes
from pmod_cli.model import PmodSettings
from pmod_cli.profiling import Workload
from pmod_cli.profiling.budgets import cost_of
from tests.evaluation import reports


@pytest.fixture(scope="module")
def converted(stock_model, tmp_path_factory):
    target = tmp_path_factory.mktemp("checkpoints") / "tiny-pmod"
    convert(stock_model(), target, PmodSettings())
    return target


def test_stock_is_where_the_checkpoint_came_from(stock_model, converted, tmp_path):
    assert eval_models.stock_source(converted) == str(stock_model())
    run = tmp_path / "run"  # a fine-tuned one names the checkpoint that it started from
    run.mkdir()
    (run / "config.json").write_text((converted / "config.json").read_text())
    assert eval_models.stock_source(run) is None
    (run / "config.yaml").write_text(f"model:\n  name: {converted}\n")
    assert eval_models.stock_source(run) == str(stock_model())


def test_columns(stock_model, converted):
    chosen = eval_models.choose(str(converted), ["stock", "random", str(converted), "downsample"])
    assert [eval_model.label for eval_model in chosen] == [
        "tiny-pmod",
        "stock",
        "random",
        "tiny-pmod (2)",
        "downsample",
    ]
    assert [eval_model.routers for eval_model in chosen] == ["untrained", "stock", "untrained", "untrained", "stock"]
    assert [eval_model.selection for eval_model in chosen] == ["router", "router", "random", "router", "router"]
    assert chosen[1].path == chosen[4].path == stock_model()
    retention = PmodSettings().retention(4)
    assert chosen[4].tokens_left == pytest.approx(sum(retention) / 4)


def test_the_control_is_shown_as_many_tokens_as_are_left_of_what_is_dropped_before(stock_model, tmp_path):
    convert(stock_model(), tmp_path / "before", PmodSettings(before="divprune:0.33"))
    _, control = eval_models.choose(str(tmp_path / "before"), ["downsample"])
    assert control.tokens_left == pytest.approx(0.33 * sum(PmodSettings().retention(4)) / 4)


def test_what_cannot_be_compared(stock_model, converted, tmp_path):
    for control in ("random", "downsample"):
        with pytest.raises(PmodError, match=f"`against={control}`.*keeps every vision token"):
            eval_models.choose(str(stock_model()), [control])
    with pytest.raises(PmodError, match="no folder"):
        eval_models.choose(str(converted), [str(tmp_path / "gone")])


@pytest.mark.parametrize("settings", [{"target_tokens": "vision_hr"}, {"quota": "per_image"}, {}])
def test_a_pmod_model_costs_what_its_prompts_cost(stock_model, tmp_path, settings):
    """Not the paper's prompt, whatever is routed; of several pictures nothing is known where their cut matters."""
    convert(stock_model(), tmp_path / "mine", PmodSettings(**settings))
    (mine,) = eval_models.choose(str(tmp_path / "mine"), [])
    loaded = load(mine, dtype="float32", device="cpu", attention="sdpa")
    sizes, records, expected = Sizes.of(loaded.model.config), [], []
    for size in ((96, 64), (40, 160)):
        prompt = prepare(loaded.processor, 0, "What is it?", [Image.new("RGB", size)], "pmod_llava_next")
        vision = prompt.count(vision_token_ids(loaded.model.config))
        records.append({"prompt": prompt.prompt, "vision_tokens": vision, "input_tokens": prompt.length})
        rows = Workload((size,), text_tokens=prompt.length - vision).rows(sizes)
        assert rows[0].vision_tokens == vision
        expected.append(cost_of(sizes, loaded.model.config.settings, rows).as_dict())
    found = loaded.cost_of_prompts(mine, records)["cost"]
    assert found == pytest.approx({name: (expected[0][name] + expected[1][name]) / 2 for name in found})
    assert "cost" not in loaded.describe(mine), "no prompt was asked yet"
    of_two = [records[0] | {"prompt": records[0]["prompt"].replace("<image>", "<image><image>")}]
    assert bool(loaded.cost_of_prompts(mine, of_two)) == (not settings)
    if "target_tokens" in settings:
        with pytest.raises(
            PmodError, match=r"with target_tokens vision_hr, what .* depends on how pictures"
        ) as failure:
            eval_models.choose(str(tmp_path / "mine"), ["fastv"])
        assert "`against=fastv@0." in failure.value.hint


def test_a_cost_that_is_not_known_of_every_task_is_none():
    """A mean over other tasks than the methods beside it were asked would be compared with theirs."""
    benchmarks = suite.resolve(["tiny_doc", "tiny_where"])
    report = Report(benchmarks, seed=0)
    cost = {"flops": 0.5, "selector": 0.0, "first_layer": 1.0, "mean_tokens": 0.6, "kv_bytes": 0.6}
    report.add_model("mine", reports.PMOD | {"pmod": {"target_tokens": "vision_hr"}})
    report.add_model("random@0.5", reports.STOCK | {"method": "random"})
    for label in report.models:
        for place, benchmark in enumerate(benchmarks):
            known = {"cost": cost} if label != "mine" or place == 0 else {}
            report.add(benchmark, label, reports.entry(25.0, **known), reports.records(["x"] * 4, [1.0] + [0.0] * 3))
            shown = report.models[label]["cost"]
            assert shown == (cost if known else None)
    assert report.models["random@0.5"]["mean_retention"] == 0.6
    assert any(note.startswith("mine: no cost, ") for note in markdown.notes(report.results()))
    _, (mine, _) = tables.cost_rows(report.results())
    assert mine[1:-1] == [""] * 5
