"""A report whose numbers are worked out by hand: two models, a few questions each, as the runner would add them."""

from __future__ import annotations

from typing import Any

from pmod_cli.evaluation import suite
from pmod_cli.evaluation.benchmarks import groups
from pmod_cli.evaluation.results.report import Report

VICUNA = {"layers": 32, "hidden_size": 4096, "decoder": "llama", "dtype": "bfloat16"}
PMOD = {
    "model_type": "pmod_llava_next",
    "routers": "trained",
    "selection": "router",
    "mean_retention": 0.5375,
    **VICUNA,
}
STOCK = {"model_type": "llava_next", "routers": "stock", "selection": None, "mean_retention": 1.0, **VICUNA}


def records(answers: list[str], items: list[Any], task: str = "t") -> list[dict[str, Any]]:
    return [
        {"task": task, "doc_id": place, "question": f"q{place}?", "target": "x", "answer": answer, "item": item}
        for place, (answer, item) in enumerate(zip(answers, items, strict=True))
    ]


def entry(score: float | None, questions: int = 4, available: int | None = None, **more: Any) -> dict[str, Any]:
    if score is None:
        return {"score": None, "seconds": 0.5, **more}
    return {
        "score": score,
        "questions": questions,
        "questions_available": available or questions,
        "limited": questions < (available or questions),
        "metric": None,
        "empty_answers": 0,
        "cut_answers": 0,
        "random_answers": 0,
        "unread_answers": 0,
        "seconds": 12.345,
        "tokens_per_second": 101.25,
        "peak_memory_mib": 14336.4,
    } | more


def small(names: str = "docvqa,chartqa") -> Report:
    """DocVQA and ChartQA, 4 questions each: p-MoD has 75 and 50, stock 100 and, failed, none."""
    benchmarks = suite.resolve(names.split(","))
    report = Report(benchmarks, seed=0)
    report.add_model("p-mod", PMOD)
    report.add_model("stock", STOCK)
    docvqa, chartqa = benchmarks
    report.add(docvqa, "p-mod", entry(75.0, cut_answers=1), records(["x", "x", "x", ""], [1.0, 1.0, 1.0, 0.0]))
    report.add(
        chartqa, "p-mod", entry(50.0, 4, 2500, empty_answers=2), records(["x", "", "x", ""], [1.0, 0.0, 1.0, 0.0])
    )
    report.add(docvqa, "stock", entry(100.0), records(["x"] * 4, [1.0] * 4))
    report.add(chartqa, "stock", entry(None, error="a picture [17] cannot be read"), [])
    return report


def group(scores: dict[str, float], *, limited: str = "", missing: str = "") -> Report:
    """All benchmarks of `general` for one p-MoD model, each of one question that scores what `scores` says."""
    report = Report(groups()["general"], seed=0)
    report.add_model("p-mod", PMOD)
    for benchmark in groups()["general"]:
        if benchmark.name == missing:
            report.add(benchmark, "p-mod", entry(None, error="no data"), [])
        else:
            available = 9 if benchmark.name == limited else 1
            report.add(benchmark, "p-mod", entry(scores[benchmark.name], 1, available), [])
    return report
