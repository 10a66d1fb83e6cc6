"""The report's numbers against hand computation, and the table as a user reads it at 100 columns."""

import csv
import io
import json
import re

import pytest
from rich.console import Console

from pmod_cli import paper
from pmod_cli.evaluation import suite
from pmod_cli.evaluation.benchmarks import Benchmark, groups
from pmod_cli.evaluation.results import markdown, pareto, tables
from pmod_cli.evaluation.results.report import Report
from tests.evaluation import reports

PAPER_SCORES = {name: score.pmod for name, score in paper.MODELS["llava_next"].scores.items()}
SCORES = """\

 benchmark  model                score  paper  its p-MoD  to paper  first − this  changed
 ────────────────────────────────────────────────────────────────────────────────────────
 DocVQA     p-mod          75.0 ± 37.5   70.1       70.0      +5.0
            stock                100.0   70.1       70.0     +29.9  −25.0 ± 37.5        1
 ChartQA    p-mod         50.0* ± 50.0   61.6       61.8    −11.8*
            stock               failed   61.6       61.8
"""
ANSWERS = """\

 benchmark  model           asked  empty  cut  seconds  tok/s     MiB     kept
 ─────────────────────────────────────────────────────────────────────────────
 DocVQA     p-mod               4      0    1     12.3  101.2  14,336   53.8 %
            stock               4      0    0     12.3  101.2  14,336  100.0 %
 ChartQA    p-mod         4/2,500      2    0     12.3  101.2  14,336   53.8 %
            stock                                  0.5                 100.0 %
"""
NOTES = """\
metrics: DocVQA anls, ChartQA relaxed_overall
±: half of the 95 % interval, questions resampled; none where all questions score alike or it is unknown
first − this: p-mod minus the row's model, same questions; changed: answers that differ
paper, its p-MoD: published scores of LLaVA-NeXT 7B and of its p-MoD; to paper: the score minus its kind's
cut: the answer reached the task's length limit
stock: ChartQA: a picture [17] cannot be read"""


def printed(table) -> str:
    console = Console(width=100, file=io.StringIO(), highlight=False)
    console.print(table)
    return "".join(f"{line.rstrip()}\n" for line in console.file.getvalue().splitlines()).rstrip() + "\n"


def test_the_tables_as_a_user_reads_them():
    results = reports.small().results()
    assert printed(tables.score_table(results)) == SCORES
    assert printed(tables.answer_table(results)) == ANSWERS
    assert "\n".join(markdown.notes(results)) == NOTES
    assert markdown.warnings(results) == [
        "limited run: scores marked * are not the scores of the benchmarks",
        "DocVQA: the data has 4 questions, the benchmark 5,349",
    ]


def test_scores_and_differences():
    docvqa, chartqa = reports.small().results()["tasks"]
    assert (docvqa["scores"]["p-mod"]["low"], docvqa["scores"]["p-mod"]["high"]) == (25.0, 100.0)
    assert docvqa["scores"]["stock"]["low"] is None, "every question scores alike"
    assert docvqa["differences"] == {
        "stock": {"difference": -25.0, "low": -75.0, "high": 0.0, "questions": 4, "changed_answers": 1}
    }
    assert docvqa["scores"]["p-mod"]["paper"] == {"baseline": 70.1, "pmod": 70.0, "difference": 5.0}
    assert docvqa["scores"]["stock"]["paper"]["difference"] == pytest.approx(29.9)
    assert chartqa["differences"] == {}
    assert reports.small().results()["failed"] == ["stock: ChartQA: a picture [17] cannot be read"]


def test_changed_answers_are_listed():
    found = reports.small().differences["docvqa"]["stock"]
    assert found.changed == [
        {
            "task": "t",
            "doc_id": 3,
            "question": "q3?",
            "target": "x",
            "answer": "",
            "other_answer": "x",
            "item": 0.0,
            "other_item": 1.0,
        }
    ]


def test_no_interval_where_the_summands_are_not_the_score():
    """Another aggregation than the one known here must not get the interval of a mean."""
    (benchmark,) = suite.resolve(["docvqa"])
    report = Report([benchmark], seed=0)
    for label in ("a", "b"):
        report.add_model(label, reports.PMOD)
        report.add(benchmark, label, reports.entry(60.0), reports.records(["x"] * 4, [1.0, 1.0, 1.0, 0.0]))
    task = report.results()["tasks"][0]
    assert task["scores"]["a"]["low"] is None
    assert task["differences"]["b"] == {
        "difference": 0.0,
        "low": None,
        "high": None,
        "questions": 4,
        "changed_answers": 0,
    }


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize("group", ["general", "text-rich"])
def test_averages_of_the_papers_rows_are_the_papers(family, group):
    """Its rows, MME divided by 20, average to the numbers that it prints."""
    model = paper.MODELS[family]
    for kind in ("stock", "pmod"):
        scores = {name: getattr(pair, kind) for name, pair in model.scores.items()}
        points = [scores[benchmark.name] / (20 if benchmark.name == "mme" else 1) for benchmark in groups()[group]]
        expected = getattr(model.averages[group], kind)
        assert sum(points) / 7 == pytest.approx(expected, abs=0.1), "rounded scores, rounded average"


def test_average_of_measured_scores():
    scores = PAPER_SCORES
    (average,) = reports.group(scores).results()["averages"]
    assert average["group"] == "general"
    assert average["scores"]["p-mod"]["score"] == pytest.approx(69.125, abs=1e-9)
    assert average["scores"]["p-mod"]["paper"] == {"baseline": 69.2, "pmod": 69.1, "difference": pytest.approx(0.025)}
    assert average["missing"] == {}
    (average,) = reports.group(scores, limited="pope").results()["averages"]
    assert average["scores"]["p-mod"]["limited"]


def test_no_average_over_missing_tasks():
    results = reports.group(PAPER_SCORES, missing="pope").results()
    (average,) = results["averages"]
    assert average["scores"] == {}
    assert average["missing"] == {"p-mod": ["pope"]}
    assert "p-mod: no average of general, which lacks pope" in markdown.notes(results)
    assert "AVG" not in printed(tables.score_table(results))
    assert reports.small().results()["averages"] == [], "nobody asked for the group"


def test_average_row_is_last():
    text = printed(tables.score_table(reports.group(PAPER_SCORES).results()))
    assert text.rstrip().splitlines()[-1].split() == ["AVG", "general", "p-mod", "69.1", "69.2", "69.1", "+0.0"]
    assert "1495.5" in text


def test_means_by_kind_of_task():
    """Two text-rich tasks and one of grounding: means, and their gain over random; none where one fails."""
    benchmarks = suite.resolve(["tiny_doc", "tiny_chart", "tiny_where"])
    report = Report(benchmarks, seed=0)
    models = {
        "stock": {},
        "random@0.4": {"method": "random"},
        "fastv@0.4": {"method": "fastv", "control": "random@0.4"},
    }
    right = {"stock": (4, 4, None), "random@0.4": (1, 2, 2), "fastv@0.4": (3, 2, 1)}
    for label, model in models.items():
        report.add_model(label, reports.STOCK | model)
        for benchmark, number in zip(benchmarks, right[label], strict=True):
            if number is None:
                report.add(benchmark, label, reports.entry(None, error="no picture"), [])
                continue
            items = [1.0] * number + [0.0] * (4 - number)
            found = reports.entry(25.0 * number, generate_seconds=2.0)
            report.add(benchmark, label, found, reports.records(["x"] * 4, items))
    results = report.results()
    text, grounding, mean = results["kinds"]
    assert (mean["title"], mean["tasks"]) == ("mean of tasks", ["tiny_doc", "tiny_chart", "tiny_where"])
    assert mean["scores"]["fastv@0.4"]["score"] == pytest.approx((75 + 50 + 25) / 3)
    assert mean["scores"]["fastv@0.4"]["over_random"]["difference"] == pytest.approx((50 + 0 - 25) / 3)
    assert (text["title"], text["tasks"]) == ("text-rich", ["tiny_doc", "tiny_chart"])
    assert {label: entry["score"] for label, entry in text["scores"].items()} == dict(
        zip(models, (100.0, 37.5, 62.5), strict=True)
    )
    assert (text["scores"]["fastv@0.4"]["questions"], text["scores"]["fastv@0.4"]["generate_seconds"]) == (8, 4.0)
    assert text["scores"]["fastv@0.4"]["over_random"]["difference"] == 25.0
    assert text["scores"]["fastv@0.4"]["over_random"]["low"] < 25.0 < text["scores"]["fastv@0.4"]["over_random"]["high"]
    assert "over_random" not in text["scores"]["random@0.4"]
    assert list(grounding["scores"]) == ["random@0.4", "fastv@0.4"], "none where a task failed"
    assert grounding["scores"]["fastv@0.4"]["over_random"]["difference"] == -25.0
    table = printed(tables.kind_table(results))
    assert re.search(r"by kind of task +text-rich +grounding +mean of tasks", table)
    assert re.search(r"fastv@0.4 +62.5 ± [\d.]+ \(\+25.0 ± [\d.]+\) +25.0 ± [\d.]+ \(−25.0 ± [\d.]+\)", table)
    assert "by kind of task" in markdown.to_markdown(results)
    assert {benchmark.kind for benchmark in groups()["paper"]} == {"general", "text-rich", "hallucination"}


def test_a_pmod_model_is_held_to_random_dropping_of_its_own_cost():
    """Whichever of them comes first; not to one that costs more than a few percent more or less, nor is stock."""
    (benchmark,) = suite.resolve(["tiny_doc"])
    report = Report([benchmark], seed=0)
    models = {
        "mine-54": (3, {"routers": "calibrated", "selection": "router"}, 0.53),
        "mine-25": (2, {"routers": "calibrated", "selection": "router"}, 0.3),
        "stock": (4, {"routers": "stock"}, None),
        "random@0.54": (1, {"method": "random"}, 0.54),
        "random@0.25": (1, {"method": "random"}, 0.25),
    }
    for label, (number, model, flops) in models.items():
        report.add_model(label, model)
        cost = {} if flops is None else {"cost": {"flops": flops}}
        entry = reports.entry(25.0 * number, **cost)
        report.add(benchmark, label, entry, reports.records(["x"] * 4, [1.0] * number + [0.0] * (4 - number)))
    scores = report.results()["tasks"][0]["scores"]
    assert {label for label, entry in scores.items() if "over_random" in entry} == {"mine-54"}
    assert scores["mine-54"]["over_random"]["difference"] == 50.0


@pytest.mark.parametrize("order", [("random@0.52", "random@0.54"), ("random@0.54", "random@0.52")])
def test_a_pmod_model_is_held_to_the_nearest_random_dropping(order):
    """Two budgets are near enough: the nearer one counts, whichever comes first."""
    (benchmark,) = suite.resolve(["tiny_doc"])
    report = Report([benchmark], seed=0)
    right = {"mine-54": 3, "random@0.52": 2, "random@0.54": 1}
    for label in ("mine-54", *order):
        model = {"routers": "calibrated"} if label == "mine-54" else {"method": "random"}
        report.add_model(label, model)
        entry = reports.entry(25.0 * right[label], cost={"flops": float(f"0.{label[-2:]}")})
        answered = [1.0] * right[label] + [0.0] * (4 - right[label])
        report.add(benchmark, label, entry, reports.records(["x"] * 4, answered))
    (mine, *_) = report.results()["tasks"][0]["scores"].values()
    assert mine["over_random"]["difference"] == 50.0


def test_a_pmod_model_is_not_held_to_random_dropping_of_another_size():
    (benchmark,) = suite.resolve(["tiny_doc"])
    report = Report([benchmark], seed=0)
    report.add_model("mine", reports.PMOD)
    report.add_model("other: random@0.54", reports.STOCK | {"method": "random", "hidden_size": 5120})
    for label in report.models:
        entry = reports.entry(25.0, cost={"flops": 0.54})
        report.add(benchmark, label, entry, reports.records(["x"] * 4, [1.0] + [0.0] * 3))
    assert "over_random" not in report.results()["tasks"][0]["scores"]["mine"]


def test_means_by_kind_of_a_limited_run_are_marked():
    benchmarks = suite.resolve(["tiny_doc", "tiny_where"])
    report = Report(benchmarks, seed=0)
    report.add_model("stock", reports.STOCK)
    for benchmark in benchmarks:
        report.add(benchmark, "stock", reports.entry(25.0, 4, 1000), reports.records(["x"] * 4, [1.0] + [0.0] * 3))
    _, (cells,) = tables.kind_rows(report.results())
    assert [cell.partition(" ")[0] for cell in cells] == ["stock", "25.0*", "25.0*", "25.0*"]


def test_what_is_kept_of_smaller_pictures_is_not_all():
    """Where the cost of smaller pictures is not known, it is not the stock model's: in no table and no figure."""
    (benchmark,) = suite.resolve(["tiny_doc"])
    report = Report([benchmark], seed=0)
    report.add_model("stock", reports.STOCK)
    report.add_model("downsample", reports.STOCK | {"mean_retention": 0.44})
    for label in report.models:
        report.add(benchmark, label, reports.entry(25.0), reports.records(["x"] * 4, [1.0] + [0.0] * 3))
    results = report.results()
    _, (stock, smaller) = tables.cost_rows(results)
    assert stock[1:-1] == ["100.0 %", "0.0 %", "100.0 %", "100.0 %", "100.0 %"]
    assert smaller[1:-1] == [""] * 5
    assert [row["flops"] for row in tables.rows(results)] == [1.0, None]
    assert list(pareto.curves(results, results["tasks"][0])) == ["stock"]
    assert not pareto.has_costs(results)


def test_average_interval_is_that_of_independent_benchmarks():
    """Seven benchmarks with a half width of h each: the average has h / √7."""
    report = Report(groups()["text-rich"], seed=0)
    for label, right in (("a", 0.6), ("b", 0.5)):
        report.add_model(label, reports.PMOD)
        for benchmark in report.benchmarks:
            items = [1.0] * int(400 * right) + [0.0] * int(400 * (1 - right))
            if benchmark.name == "mmmu":
                kind = {"subdomain": "Art", "question_type": "multiple-choice", "answer": "B"}
                items = [
                    {**kind, "id": f"validation_Art_{n}", "parsed_pred": ["AB"[int(item)]]}
                    for n, item in enumerate(items)
                ]
            report.add(benchmark, label, reports.entry(100 * right, 400), reports.records(["x"] * 400, items))
    results = report.results()
    (average,) = results["averages"]
    halves = [(task["scores"]["a"]["high"] - task["scores"]["a"]["low"]) / 2 for task in results["tasks"]]
    half = (average["scores"]["a"]["high"] - average["scores"]["a"]["low"]) / 2
    assert half == pytest.approx(sum(halves) / 7 / 7**0.5, rel=0.12)
    assert average["differences"]["b"]["difference"] == pytest.approx(10.0)
    assert average["differences"]["b"]["low"] > 0


def test_csv_and_markdown_agree_with_the_results():
    results = reports.small().results()
    read = list(csv.DictReader(io.StringIO(tables.to_csv(results))))
    expected = tables.rows(results)
    assert len(read) == len(expected) == 4
    for line, row in zip(read, expected, strict=True):
        assert line == {key: "" if value is None else str(value) for key, value in row.items()}
    assert float(read[0]["score"]) == results["tasks"][0]["scores"]["p-mod"]["score"]
    assert float(read[1]["difference_low"]) == results["tasks"][0]["differences"]["stock"]["low"]

    text = markdown.to_markdown(results)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    assert cells[0] == ["benchmark", "model", "score", "paper", "its p-MoD", "to paper", "first − this", "changed"]
    assert cells[2][:3] == ["DocVQA", "p-mod", "75.0 ± 37.5"]
    assert cells[4][2] == r"50.0\* ± 50.0"
    assert re.search(r"^\*\*limited run", text)
    assert "| ChartQA | stock | failed |" in text


def test_results_are_plain_json():
    """Nothing that JSON cannot hold, numbers of known units, and the same object after a round trip."""
    results = reports.small().results()
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    assert {*results} == {"models", "tasks", "averages", "kinds", "failed"}
    task = results["tasks"][0]
    named = {"name", "title", "group", "kind", "task", "metric", "filter", "scale", "lower_is_better", "rows"}
    assert {*task} == named | {"scores", "differences"}


def test_flip_rate_is_summed_over_tasks():
    results = reports.small().results()
    first, second = (task["scores"]["p-mod"] for task in results["tasks"])
    first["batching"] = {"questions": 60, "changed": 3, "batch_size": 16}
    second["batching"] = {"questions": 40, "changed": 0, "batch_size": 8}
    results["tasks"][0]["scores"]["stock"]["batching"] = {"questions": 0, "changed": 0, "batch_size": 1}
    lines = markdown.notes(results)
    assert (
        "p-mod: 3 of 100 answers change when asked one at a time instead of up to 16 together, in bfloat16 "
        "(3.0 %, at most 8.5 %)"
    ) in lines
    assert "stock: no answer came from a batch of several rows, so batching was not checked" in lines


def test_markup_in_names_is_text():
    report = reports.small()
    results = json.loads(json.dumps(report.results()).replace('"stock"', '"[red]st|ock[/red]"'))
    assert "[red]st|ock[/red]" in printed(tables.score_table(results))
    assert r"[red]st\|ock[/red]" in markdown.to_markdown(results)


def test_untrained_routers_are_named_but_not_for_controls():
    results = reports.small().results()
    results["models"] |= {
        "new": {**reports.PMOD, "routers": "untrained"},
        "random": {**reports.PMOD, "routers": "untrained", "selection": "random"},
    }
    first = markdown.warnings(results)[0]
    assert first.startswith("new: untrained routers")


def test_other_sizes_are_told_from_the_papers():
    results = reports.small().results()
    results["models"]["stock"]["layers"] = 40
    assert any(line.startswith("stock: not of the paper's size") for line in markdown.notes(results))


def test_a_score_that_is_better_where_it_is_lower():
    """Beating random, filled marks and the front turn round; it is in no mean."""
    errors = Benchmark("errors", "Errors", "errors", None)
    benchmarks = [*suite.resolve(["tiny_doc", "tiny_where"]), errors]
    report = Report(benchmarks, seed=0)
    wrong = {"random@0.5": 30, "few@0.5": 10, "many@0.5": 50, "dear@0.9": 20}
    for label, number in wrong.items():
        control = None if label in ("random@0.5", "dear@0.9") else "random@0.5"
        report.add_model(label, reports.STOCK | {"method": label.partition("@")[0], "control": control})
        for benchmark in benchmarks:
            lower = {"lower_is_better": True} if benchmark is errors else {}
            cost = {"flops": float(label[-3:])} | dict.fromkeys(("selector", "first_layer", "mean_tokens"), 0.5)
            items = [1.0] * number + [0.0] * (60 - number)
            found = reports.entry(100 * number / 60, 60, metric="mae", cost=cost | {"kv_bytes": 0.5}, **lower)
            report.add(benchmark, label, found, reports.records(["x"] * 60, items))
    results = report.results()
    notes = markdown.notes(results)
    assert "Errors: do not beat random at the same FLOPs: many@0.5" in notes
    assert "tiny doc: do not beat random at the same FLOPs: few@0.5" in notes
    assert "lower scores are better: Errors; they are in no mean" in notes
    assert [kind["tasks"] for kind in results["kinds"]] == [["tiny_doc"], ["tiny_where"], ["tiny_doc", "tiny_where"]]
    filled = {
        name: [point.beats_random for point in points]
        for name, points in pareto.curves(results, results["tasks"][-1]).items()
    }
    assert filled == {"random": [True], "few": [True], "many": [False], "dear": [True]}
    figure = pareto.figure({**results, "kinds": [], "tasks": results["tasks"][-1:]})
    assert figure.axes[0].get_ylabel() == "Errors, score, lower is better"
    (front,) = (line for line in figure.axes[0].lines if line.get_drawstyle() == "steps-post")
    assert [(x, y) for x, y in zip(*front.get_data(), strict=True)] == [(50, pytest.approx(100 / 6))]
