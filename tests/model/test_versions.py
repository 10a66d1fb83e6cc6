"""Releases of transformers: both names of the cache, and what happens under one that is too old, new or different."""

import re
import tomllib
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache
from transformers.utils import output_capturing

from pmod_cli.checkpoints.layouts.remote_code import modeling_source
from pmod_cli.core.errors import explain
from pmod_cli.model import layer, selfcheck, versions
from tests.model.models import ROWS, batch, pmod_model
from tests.model.visual import KINDS, routed, stock

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_is_taken_under_both_names(name):
    model = pmod_model().model
    inputs, step = batch("llava_next", ROWS[:1]), torch.tensor([[3]])
    with torch.no_grad():
        whole = model(**inputs, use_cache=True)
        cache = DynamicCache()
        given = model(**inputs, **{name: cache})
        assert torch.equal(given.last_hidden_state, whole.last_hidden_state)
        held = [layer.keys.shape[-2] for layer in cache.layers]
        assert len(set(held)) > 1, "routed layers hold fewer tokens"
        model(input_ids=step, **{name: cache})
    assert [layer.keys.shape[-2] for layer in cache.layers] == [length + 1 for length in held]


def test_a_layer_refuses_to_cache_without_a_cache():
    decoder = pmod_model().model.language_model
    states, tables = torch.zeros(1, 3, 32), decoder.rotary_emb(torch.zeros(1, 3, 32), torch.arange(3)[None])
    with pytest.raises(ValueError, match="the layer got no cache"):
        decoder.layers[0](states, position_embeddings=tables, use_cache=True)
    with pytest.raises(ValueError, match="hands the cache on as memory"):
        decoder.layers[0](states, position_embeddings=tables, memory=DynamicCache())
    with pytest.raises(ValueError, match="hands the cache on as memory"):
        decoder(inputs_embeds=states, memory=DynamicCache())


@pytest.fixture
def newer(monkeypatch):
    """This process takes the installed transformers for a release that nobody has tested."""
    monkeypatch.setattr(selfcheck, "RELEASE", (versions.NEWEST[0], versions.NEWEST[1] + 1))
    monkeypatch.setattr(selfcheck, "_checked", set())


@pytest.mark.parametrize("kind", KINDS)
def test_a_newer_release_is_checked_once_and_warned_of_once(kind, newer, tmp_path, caplog):
    model = routed(stock(kind))
    model.save_pretrained(tmp_path)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    loaded = [type(model).from_pretrained(tmp_path), type(model.model).from_pretrained(tmp_path)]
    assert torch.equal(torch.rand(3), expected), "the check leaves the random state alone"
    assert torch.equal(loaded[0].lm_head.weight, model.lm_head.weight)
    assert [record.levelname for record in caplog.records if "newer than" in record.message] == ["WARNING"]


def test_a_newer_release_that_loses_the_cache_is_refused(newer, monkeypatch, tmp_path):
    model = pmod_model()
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(layer, "CACHE_NAME", "memory")  # as if attention took the cache under a third name
    for _ in range(2):  # the second load is refused as well
        with pytest.raises(versions.UnsupportedTransformers, match=r"p-MoD is tested with 5\.\d+ to 5\.\d+"):
            type(model).from_pretrained(tmp_path)


def test_a_newer_release_that_collects_no_hidden_states_is_refused(newer, monkeypatch, tmp_path):
    model = pmod_model()
    model.save_pretrained(tmp_path)
    registry = output_capturing._CAN_RECORD_REGISTRY
    stock = type(registry)()
    dict.update(stock, {name: outputs for name, outputs in registry.items() if "Pmod" not in name})
    monkeypatch.setattr(output_capturing, "_CAN_RECORD_REGISTRY", stock)  # as if what we register were read no more
    with pytest.raises(versions.UnsupportedTransformers, match="does not collect hidden states"):
        type(model).from_pretrained(tmp_path)


def test_a_newer_release_that_computes_something_else_is_refused(newer, monkeypatch, tmp_path):
    model = pmod_model()
    model.save_pretrained(tmp_path)
    process = layer.RoutedLayer._process
    monkeypatch.setattr(
        layer.RoutedLayer, "_process", lambda self, x, *args, **kwargs: process(self, x, *args, **kwargs) + x
    )
    with pytest.raises(versions.UnsupportedTransformers, match="other logits at ratio 1"):
        type(model).from_pretrained(tmp_path)


def test_the_remote_code_file_names_a_release_that_is_too_old(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "5.19.0")
    with pytest.raises(ImportError, match=r"transformers 5\.19\.0 is too old; p-MoD is tested with 5\.20") as refusal:
        exec(compile(modeling_source(), "modeling_pmod.py", "exec"), {})
    assert "too old" in explain(refusal.value).what


def test_the_remote_code_file_names_a_release_that_lacks_something(monkeypatch):
    monkeypatch.delattr("transformers.masking_utils.create_causal_mask")
    with pytest.raises(ImportError, match=r"lacks what p-MoD builds on \(cannot import name 'create_causal_mask'"):
        exec(compile(modeling_source(), "modeling_pmod.py", "exec"), {})


def test_the_package_declares_the_releases_that_are_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = next(line for line in project["dependencies"] if line.startswith("transformers"))
    (oldest, newest) = versions.OLDEST, versions.NEWEST
    assert declared == f"transformers>={oldest[0]}.{oldest[1]},<{newest[0]}.{newest[1] + 1}"
    locked = re.search(r"^transformers==(\d+)\.(\d+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert oldest <= tuple(map(int, locked.groups())) <= newest
