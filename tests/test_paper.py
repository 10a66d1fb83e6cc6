"""The paper's numbers, against what the code computes and against the benchmarks that can be asked."""

import pytest

from pmod_cli import paper
from pmod_cli.evaluation.benchmarks import BENCHMARKS
from pmod_cli.model import PmodSettings
from pmod_cli.model.schedule import PAPER_MEAN


def test_every_score_of_the_paper_belongs_to_a_benchmark_that_can_be_asked():
    assert set(paper.BENCHMARKS) <= set(BENCHMARKS)
    for model in paper.MODELS.values():
        assert list(model.scores) == list(paper.BENCHMARKS)
        assert {score.where for score in model.scores.values()} == {paper.TABLE_1, paper.TABLE_2}


@pytest.mark.parametrize("kind", paper.MODELS)
def test_the_kv_cache_that_it_prints_is_the_mean_retention_of_the_default_schedule(kind):
    retention = PmodSettings().retention(paper.VICUNA_7B["num_hidden_layers"])
    assert sum(retention) / len(retention) == pytest.approx(PAPER_MEAN)
    assert paper.MODELS[kind].kv_percent.pmod == pytest.approx(100 * PAPER_MEAN, abs=0.051)


def test_a_name_that_the_paper_has_not():
    assert paper.MODELS["llava"].score_of("textcaps") is None
    assert paper.MODELS["llava"].score_of("text-rich").where == paper.TABLE_2
