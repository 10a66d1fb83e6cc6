"""Methods beside p-MoD: on the stock weights, at a budget, and against random dropping."""

import json

import pytest

from pmod_cli import cli
from pmod_cli.core.errors import PmodError
from pmod_cli.evaluation import eval_models
from pmod_cli.families.sizes import Sizes
from pmod_cli.model import METHODS, PmodSettings
from pmod_cli.profiling.methods import cost_of


@pytest.fixture
def converted(stock_model, workdir):
    """A p-MoD checkpoint and what it was made from."""
    assert cli.main(["convert", str(stock_model()), "-o", "tiny-pmod", "-q"]) == 0
    return workdir / "tiny-pmod", stock_model()


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
    own = cost_of(sizes, PmodSettings.from_dict(config["pmod"])).flops
    assert cost_of(sizes, fastv.method).flops == pytest.approx(own, rel=0.02)
    assert cost_of(sizes, divprune.method).flops == pytest.approx(0.8, rel=0.02)


def test_what_cannot_be_asked(converted):
    mine, stock = map(str, converted)
    for name, against, message in (
        (stock, "fastv", "is a plain LLaVA, whose cost is no budget"),
        (mine, "fastv@two", "'two' is no share"),
        (mine, "fastv@0.01", r"fastv cannot cost 0.01 of the stock model: it comes as near as 0\."),
        (mine, "pmod@0.4", "pmod needs routers for its schedule"),
    ):
        with pytest.raises(PmodError, match=message):
            eval_models.choose(name, [against])
    with pytest.raises(PmodError, match="unknown method 'best': expected all, or some of pmod, fastv"):
        eval_models.at_budgets(mine, ["best"], ["0.5"])
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
    assert models["fastv@0.8"]["cost"]["selector"] > 0 == models["random@0.8"]["cost"]["selector"]
    scores = results["tasks"][0]["scores"]
    assert {"difference", "low", "high"} == scores["divprune@0.8"]["over_random"].keys()
    answers = {label: (mine.parent / "run" / "answers" / label / "tiny_doc.jsonl").read_text() for label in models}
    assert len(set(answers.values())) == 4, "a method changes answers"
    journals = sorted((mine.parent / "run" / "journal").rglob("*.jsonl"))
    before = [journal.read_bytes() for journal in journals]
    assert len(before) == 4
    assert cli.main([*words, "-q"]) == 0
    assert [journal.read_bytes() for journal in journals] == before, "nothing was asked again"
