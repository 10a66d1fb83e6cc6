"""Methods beside p-MoD: on the stock weights, at a budget, and against random dropping."""

import json
from pathlib import Path
from random import Random

import pytest
from PIL import Image

from pmod_cli import cli
from pmod_cli.core.errors import PmodError
from pmod_cli.evaluation import eval_models
from pmod_cli.evaluation.results import pareto
from pmod_cli.families.sizes import Sizes
from pmod_cli.model import METHODS, PmodSettings
from pmod_cli.profiling.budgets import PromptBudget, cost_of, prompt_of
from pmod_cli.profiling.count import formulas


@pytest.fixture
def converted(stock_model, workdir):
    """A p-MoD checkpoint and what it was made from."""
    assert cli.main(["convert", str(stock_model()), "-o", "tiny-pmod", "-q"]) == 0
    return workdir / "tiny-pmod", stock_model()


def answered(label):
    """The records of a model in the folder `run`."""
    return [json.loads(line) for line in Path("run", "answers", label, "tiny_doc.jsonl").read_text().splitlines()]


def test_a_method_runs_on_the_stock_weights_at_a_budget(converted):
    mine, stock = converted
    chosen = eval_models.choose(str(mine), ["fastv", "divprune@0.8", "random@0.8", "random"])
    main, fastv, divprune, dropped, control = chosen
    assert [one.label for one in chosen[1:]] == ["fastv", "divprune@0.8", "random@0.8", "random"]
    assert {one.path for one in (fastv, divprune, dropped)} == {stock}
    assert (divprune.control, dropped.control, fastv.control) == ("random@0.8", None, None)
    assert (control.method, control.path) == (None, main.path)  # without a budget: a selection of the p-MoD model
    config = json.loads((mine / "config.json").read_text())
    sizes = Sizes.of(config)
    assert fastv.share == PmodSettings.from_dict(config["pmod"])
    assert divprune.share == dropped.share == 0.8
    for share in (0.8, fastv.share):
        budget, rows = PromptBudget(sizes, "divprune", share), prompt_of(400, 30)
        wanted = 0.8 if share == 0.8 else cost_of(sizes, share, rows).flops
        assert budget.is_met(400, 30)
        assert cost_of(sizes, budget.settings(400, 30), rows).flops == pytest.approx(wanted, rel=0.01)


def test_what_cannot_be_asked(converted):
    mine, stock = map(str, converted)
    for name, against, message in (
        (stock, "fastv", "is a stock model, whose cost is no budget"),
        (mine, "fastv@two", "'two' is no share"),
        (mine, "fastv@0.01", r"fastv cannot cost 0.01 of the stock model: it comes as near as 0\."),
        (mine, "pmod@0.4", "pmod needs routers for its schedule"),
    ):
        with pytest.raises(PmodError, match=message):
            eval_models.choose(name, [against])
    for methods, budgets, message in (
        (["best"], ["0.5"], "^`methods=best`: expected all, or some of fastv, "),
        (["pmod"], ["0.5"], "^`methods=pmod`: expected all, or some of fastv, "),  # it needs routers
        (["fastv"], ["0.5", " 2"], "^`budgets=2`: '2' is no share of the stock model's FLOPs"),
    ):
        with pytest.raises(PmodError, match=message):
            eval_models.at_budgets(mine, methods, budgets)
    assert eval_models.at_budgets(mine, ["fastv"], ["0.9", "0.90"])[0] == ["random@0.90", "fastv@0.90"]  # asked once
    asked, left_out = eval_models.at_budgets(mine, ["all"], ["0.01", "0.9"])
    assert asked == [f"{name}@0.9" for name in ["random", *(n for n in METHODS if n not in ("pmod", "random"))]]
    assert len(left_out) == len(list(METHODS)) - 1


def test_a_run_of_methods_and_its_repetition(converted, capsys):
    """One table: every method, its cost in four conventions, and its difference to random; asked once."""
    mine, _ = converted
    words = ["eval", "-m", str(mine), "-t", "tiny_doc", "--against", "none", "--methods", "fastv,divprune"]
    words += ["--budgets", "0.8", "--limit", "4", "-o", "run"]
    assert cli.main([*words, "--no-progress"]) == 0
    shown = capsys.readouterr().out
    assert "this − random" in shown
    assert "cost, share of stock" in shown
    assert "do not beat random at the same FLOPs:" in shown
    results = json.loads((mine.parent / "run" / "results.json").read_text())
    models = results["models"]
    assert list(models) == ["tiny-pmod", "random@0.8", "fastv@0.8", "divprune@0.8"]
    assert [model["cost"]["flops"] for model in models.values()][1:] == pytest.approx([0.8] * 3, rel=0.02)
    assert models["fastv@0.8"]["cost"]["first_layer"] == 1
    for label in ("fastv@0.8", "divprune@0.8"):
        budget = PromptBudget(Sizes.of(json.loads((mine / "config.json").read_text())), label.partition("@")[0], 0.8)
        asked = answered(label)
        prompts = [(record["vision_tokens"], record["input_tokens"] - record["vision_tokens"]) for record in asked]
        kept = [budget.settings(*prompt).mean_retention(models[label]["layers"]) for prompt in prompts]
        assert models[label]["mean_retention"] == pytest.approx(sum(kept) / len(kept)), "of the prompts that were asked"
    assert models["fastv@0.8"]["cost"]["selector"] > 0 == models["random@0.8"]["cost"]["selector"]
    scores = results["tasks"][0]["scores"]
    assert {"difference", "low", "high"} == scores["divprune@0.8"]["over_random"].keys()
    page = (mine.parent / "run" / "report.html").read_text()
    assert "do not beat random at the same FLOPs:" in page
    assert "<svg" in page
    assert "divprune@0.8" in page
    assert Image.open(mine.parent / "run" / "pareto.png").width > 1000
    answers = {label: (mine.parent / "run" / "answers" / label / "tiny_doc.jsonl").read_text() for label in models}
    assert len(set(answers.values())) == 4, "a method changes answers"
    journals = sorted((mine.parent / "run" / "journal").rglob("*.jsonl"))
    before = [journal.read_bytes() for journal in journals]
    assert len(before) == 4
    assert cli.main([*words, "-q"]) == 0
    assert [journal.read_bytes() for journal in journals] == before, "nothing was asked again"

    capsys.readouterr()
    alone = ["eval", "-m", str(mine), "-t", "tiny_doc", "--against", "none", "--limit", "4", "-o", "alone", "-q"]
    assert cli.main(alone) == 0
    assert cli.main(["eval", "--compare", "run", "alone", "-o", "both"]) == 0
    assert "both/pareto.png" in capsys.readouterr().out
    assert {path.name for path in Path("both").iterdir() if not path.name.startswith(".")} == {
        "comparison.json",
        *("pareto.png", "report.html", "results.csv", "results.md"),
    }
    compared = json.loads(Path("both", "comparison.json").read_text())
    again = compared["tasks"][0]["scores"]
    for label in ("fastv@0.8", "divprune@0.8"):
        assert again[label]["over_random"] == scores[label]["over_random"]
    assert compared["models"]["divprune@0.8"]["control"] == "random@0.8"
    assert cli.main(["eval", "--compare", "run", "alone", "-o", "both"]) == 2, "nothing is replaced unasked"
    assert cli.main(["eval", "--compare", "run", "alone", "-o", "both", "--overwrite"]) == 0


def test_smaller_pictures_cost_what_their_prompts_cost(converted, capsys):
    mine, _ = converted
    words = ["eval", "-m", str(mine), "-t", "tiny_doc", "--against", "stock,downsample", "--methods", "random"]
    assert cli.main([*words, "--budgets", "0.8", "--limit", "3", "-o", "run", "-q"]) == 0
    results = json.loads(Path("run", "results.json").read_text())
    small, whole = answered("downsample"), answered("stock")
    sizes, shares = Sizes.of(json.loads((mine / "config.json").read_text())), []
    for one, other in zip(small, whole, strict=True):
        rows = [prompt_of(a["vision_tokens"], a["input_tokens"] - a["vision_tokens"]) for a in (one, other)]
        shares.append([formulas.prefill(sizes, row).decoder for row in rows])
    cost = results["models"]["downsample"]["cost"]
    assert cost["flops"] == pytest.approx(sum(few / many for few, many in shares) / 3)
    assert cost["flops"] < 1 > cost["mean_tokens"]
    assert cost["kv_bytes"] == pytest.approx(
        sum(a["input_tokens"] / b["input_tokens"] for a, b in zip(small, whole, strict=True)) / 3
    )


@pytest.mark.parametrize("seed", range(20))
def test_the_front_is_what_no_other_point_beats(seed):
    random = Random(seed)
    points = [(random.randint(0, 9), random.randint(0, 9)) for _ in range(random.randint(1, 30))]

    def beaten(point):
        return any(o != point and o[0] <= point[0] and o[1] >= point[1] for o in points)

    assert pareto.front(points) == sorted({point for point in points if not beaten(point)})


def test_what_is_drawn_of_a_result():
    """Methods by their budgets, cheapest first; a mark without filling where the interval reaches zero."""

    def entry(score, low):
        gain = {"difference": score - 10, "low": low, "high": score} if low is not None else None
        return {"score": score, "over_random": gain, "generate_seconds": 3.0, "questions": 6}

    models = {"random@0.4": "random", "fastv@0.5": "fastv", "fastv@0.4": "fastv", "stock": None}
    models = {
        label: {"method": method, "cost": method and {"flops": float(label[-3:])}} for label, method in models.items()
    }
    scores = {"random@0.4": entry(10, None), "fastv@0.5": entry(30, 5.0), "fastv@0.4": entry(12, -3.0)}
    task = {"title": "tiny doc", "scores": scores | {"stock": entry(50, None)}}
    found = pareto.curves({"models": models}, task)
    assert [(point.flops, point.seconds, point.beats_random) for point in found["fastv"]] == [
        (40.0, 0.5, False),
        (50.0, 0.5, True),
    ]
    assert [point.flops for point in found["stock"]] == [100.0]
    calibrated = {f"c-{budget}": {"routers": "calibrated", "cost": {"flops": budget / 100}} for budget in (54, 40)}
    also = {"title": "tiny doc", "scores": {label: entry(40, None) for label in calibrated}}
    assert [point.flops for point in pareto.curves({"models": models | calibrated}, also)["c"]] == [40.0, 54.0]
    assert list(pareto.curves({"models": models | dict([*calibrated.items()][:1])}, also)) == ["c-54"]
    of_two = {
        label: model | {"weights_sha256": label[:1], "path": f"runs/{label[:1]}"} for label, model in models.items()
    }
    apart = pareto.curves({"models": of_two}, task)
    assert list(apart) == ["random on r", "fastv on f", "stock"], "methods of two models are no one curve"
    assert list(pareto._looks(list(apart), {"models": of_two})) == ["stock", "random on r", "fastv on f"]
    figure = pareto.figure({"models": models, "tasks": [task], "kinds": []})
    fillings = [
        (line.get_xdata()[0], line.get_markerfacecolor()) for line in figure.axes[0].lines if line.get_marker() == "o"
    ]
    assert (40.0, "white") in fillings
    assert (50.0, pareto.COLOURS[0]) in fillings
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["stock", "random", "fastv"]
