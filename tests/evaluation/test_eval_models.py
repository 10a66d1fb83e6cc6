"""Who stands beside the model, and how the stock model is found again."""

import pytest

from pmod_cli.checkpoints import convert
from pmod_cli.core.errors import PmodError
from pmod_cli.evaluation import eval_models
from pmod_cli.model import PmodSettings


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
