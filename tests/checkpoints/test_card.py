"""The model card: metadata the hub reads, the schedule, results marked as published, no path of the machine."""

import yaml

from pmod_cli.checkpoints import Options, convert
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


def test_of_a_published_checkpoint_its_results_are_called_published(tmp_path):
    convert(GOLDEN / "next" / "ckpt", tmp_path / "next", origin="MCG-NJU/p-MoD-LLaVA-NeXT-7B@0123")
    _, body = card(tmp_path / "next")
    assert "Published by the authors of the source, not measured with this checkpoint: SEED 69.0" in body
    assert "The routers are trained." in body


def test_of_a_stock_and_a_remote_code_checkpoint(stock_model, tmp_path):
    for to, said in (("stock", "without routers"), ("remote-code", "trust_remote_code=True")):
        convert(stock_model(), tmp_path / to, options=Options(to=to))
        metadata, body = card(tmp_path / to)
        assert said in body
        assert "base_model" not in metadata
        assert ("p-mod" in metadata["tags"]) == (to != "stock")
