"""The model card: metadata the hub reads, the schedule, results marked as published, no path of the machine."""

import dataclasses

import pytest
import yaml

from pmod_cli.checkpoints import Options, bundled_path, convert
from pmod_cli.model import PmodSettings
from tests.model.published import GOLDEN


def card(folder):
    text = (folder / "README.md").read_text()
    _, metadata, body = text.split("---\n", 2)
    return yaml.safe_load(metadata), body


def test_of_a_p_mod_checkpoint(stock_model, tmp_path):
    values = (1.0, 0.5, 0.5, 0.25)
    convert(stock_model(), tmp_path / "my-pmod", PmodSettings(schedule="list", values=values), origin="org/name@0123")
    metadata, body = card(tmp_path / "my-pmod")
    assert metadata["base_model"] == "org/name"
    assert "mixture-of-depths" in metadata["tags"]
    assert "# my-pmod" in body
    assert "| 0 | 1.0000 |\n| 1–2 | 0.5000 |\n| 3 | 0.2500 |" in body
    assert "untrained" in body
    assert "None measured yet" in body
    assert str(tmp_path) not in body


def test_what_is_dropped_in_front_counts(stock_model, tmp_path):
    settings = PmodSettings(schedule="list", values=(1.0, 0.5, 0.5, 0.25), before="divprune:0.4")
    report = convert(stock_model(), tmp_path / "two", settings)
    assert report.mean_retention == pytest.approx(0.4 * 2.25 / 4)
    _, body = card(tmp_path / "two")
    assert "the mean retention ratio is 0.2250" in body
    assert "keeps (of those that `divprune:0.4` leaves in front of the decoder):" in body


def test_a_choice_that_is_held(stock_model, tmp_path):
    settings = PmodSettings(schedule="list", values=(1.0, 0.5, 0.5, 0.25), select_at=(1,))
    convert(stock_model(), tmp_path / "held", settings)
    _, body = card(tmp_path / "held")
    assert "4 layers: 1 layer has a router, " in body
    assert "Layer 1 chooses; each later layer keeps the first of the last ranking before it." in body
    convert(stock_model(), tmp_path / "twice", dataclasses.replace(settings, select_at=(1, 3)))
    _, body = card(tmp_path / "twice")
    assert "4 layers: 2 layers have a router, " in body
    assert "Layers 1, 3 choose; each later layer" in body


def test_the_family_is_called_by_its_name(tmp_path):
    convert(bundled_path("tiny-qwen3-vl"), tmp_path / "qwen")
    metadata, body = card(tmp_path / "qwen")
    assert "qwen3_vl" in metadata["tags"]
    assert "of a Qwen3-VL of 12 layers: 9 layers have a router" in body
    convert(bundled_path(), tmp_path / "next")
    assert "of a LLaVA-NeXT over a Llama decoder of 32 layers" in card(tmp_path / "next")[1]


def test_of_a_published_checkpoint_its_results_are_called_published(tmp_path):
    convert(GOLDEN / "next" / "ckpt", tmp_path / "next", origin="MCG-NJU/p-MoD-LLaVA-NeXT-7B@0123")
    _, body = card(tmp_path / "next")
    assert "Published by the authors of the source, not measured with this checkpoint: SEED 69.0" in body
    assert "The routers are trained." in body


def test_scores_of_the_run_that_made_the_weights(stock_model, tmp_path):
    """What `finetune --eval` has put beside them; of other weights nothing is said."""
    convert(stock_model(), tmp_path / "ours")
    (tmp_path / "ours" / "eval").mkdir()
    (tmp_path / "ours" / "eval" / "results.md").write_text("| DocVQA | 71.2 |\n")
    for name, options, known in (
        ("same", Options(to="remote-code"), True),
        ("rounded", Options(to="remote-code", dtype="bfloat16"), False),
        ("plain", Options(to="stock"), False),
    ):
        convert(tmp_path / "ours", tmp_path / name, options=options)
        _, body = card(tmp_path / name)
        assert ("Measured with these weights by `pmod eval`:\n\n| DocVQA | 71.2 |\n" in body) == known
        assert ("None measured yet" in body) != known


def test_of_the_bundled_model_what_it_reads_is_said(stock_model, tmp_path):
    report = convert(bundled_path(), tmp_path / "tiny")
    assert report.notes == ["this is a toy model, which reads its own synthetic documents and nothing else"]
    assert "reads its own synthetic documents and nothing else." in card(tmp_path / "tiny")[1]
    convert(tmp_path / "tiny", tmp_path / "again", options=Options(to="published"))
    assert "reads its own synthetic documents" in card(tmp_path / "again")[1]
    assert not convert(stock_model(), tmp_path / "other").notes


def test_of_a_stock_and_a_remote_code_checkpoint(stock_model, tmp_path):
    for to, said in (("stock", "without routers"), ("remote-code", "trust_remote_code=True")):
        convert(stock_model(), tmp_path / to, options=Options(to=to))
        metadata, body = card(tmp_path / to)
        assert said in body
        assert f'"./{to}"' in body
        assert "base_model" not in metadata
        assert ("p-mod" in metadata["tags"]) == (to != "stock")
