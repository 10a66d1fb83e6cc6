"""convert on every family: as the hub has its files, tied or not, linked and not copied, and for plain transformers."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from pmod_cli import cli
from pmod_cli.checkpoints import Options, convert
from pmod_cli.core.errors import PmodError
from pmod_cli.families import FAMILIES
from pmod_cli.families.unsupported import REASONS
from pmod_cli.model import PmodSettings
from tests.model.visual import KINDS, prompt, routed, rows_of, stock

SETTINGS = PmodSettings(schedule="list", values=(1.0, 0.6, 0.4, 0.2))
NEW = [kind for kind in KINDS if kind not in ("llava", "llava_next")]
PLAIN = """
import sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

folder, inputs, out = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
with torch.no_grad():
    save_file({"logits": model(**load_file(inputs)).logits}, out)
assert not any(name.startswith("pmod_cli") for name in sys.modules)
"""


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", NEW)
def test_converted_files_are_links_and_give_the_stock_model_with_routers(kind, tied, tmp_path):
    plain = stock(kind, tie_word_embeddings=tied)
    plain.save_pretrained(tmp_path / "stock")
    report = convert(tmp_path / "stock", tmp_path / "ours", SETTINGS, Options(router_init="normal:1", verify=True))
    assert report.linked
    assert any("bit for bit stock" in line for line in report.verified)
    model, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert type(model).__name__ == FAMILIES[kind].routed_class
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    twin, routers = routed(plain, SETTINGS.to_dict(), router_std=0), model.state_dict()
    twin.load_state_dict({name: tensor for name, tensor in routers.items() if ".router." in name}, strict=False)
    inputs = prompt(kind, plain.config, rows_of(kind), "right")
    with torch.no_grad():
        assert torch.equal(model.eval()(**inputs).logits, twin(**inputs).logits)


def test_a_config_with_the_decoder_at_its_top(tmp_path):
    """As the published Qwen2.5-VL checkpoints have it, with names that begin with `model.` and `visual.`."""
    plain = stock("qwen2_5_vl", tie_word_embeddings=True)
    plain.save_pretrained(tmp_path / "stock")
    file = tmp_path / "stock" / "config.json"
    config = json.loads(file.read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    text["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    text["rope_theta"] = rope["rope_theta"]
    del text["model_type"], text["layer_types"]
    file.write_text(json.dumps(config | {key: value for key, value in text.items() if key not in config}))
    names = load_file(tmp_path / "stock" / "model.safetensors")
    assert {name.split(".")[0] for name in names} == {"model", "visual"}
    report = convert(tmp_path / "stock", tmp_path / "ours", SETTINGS, Options(verify=True))
    assert report.linked
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "ours").eval()
    inputs = prompt("qwen2_5_vl", plain.config, rows_of("qwen2_5_vl")[2:3])
    with torch.no_grad():  # of text alone: zero routers still choose
        assert torch.equal(model(**inputs).logits, plain(**inputs).logits)


@pytest.mark.parametrize("settings", [{"before": "visionzip:0.5"}, {"selection": "visionzip"}])
def test_a_class_token_is_not_asked_of_a_tower_without_one(settings, tmp_path):
    stock("qwen3_vl").save_pretrained(tmp_path / "stock")
    with pytest.raises(PmodError, match="VisionZip ranks by the class token of a CLIP tower"):
        convert(tmp_path / "stock", tmp_path / "ours", PmodSettings(**settings))
    assert not (tmp_path / "ours").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", NEW)
def test_plain_transformers_gives_the_same_logits(kind, tmp_path):
    plain = stock(kind)
    plain.save_pretrained(tmp_path / "stock")
    for name, to in (("ours", "pmod"), ("remote", "remote-code")):
        convert(tmp_path / "stock", tmp_path / name, SETTINGS, Options(router_init="normal:1", to=to))
    inputs = prompt(kind, plain.config, rows_of(kind), "right")
    save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, tmp_path / "inputs.safetensors")
    words = [
        sys.executable,
        "-I",
        "-c",
        PLAIN,
        *(str(tmp_path / name) for name in ("remote", "inputs.safetensors", "out")),
    ]
    environment = {
        "HF_HOME": str(tmp_path / "home"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "PATH": "/usr/bin",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),  # sums of other numbers of threads differ in the last bit
    }
    result = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    ours = AutoModelForImageTextToText.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        assert torch.equal(ours(**inputs).logits, load_file(tmp_path / "out")["logits"])


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_5", "molmo2", "glm4v"])
def test_other_families_are_refused_with_the_reason(kind, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    for command in (("convert", tmp_path, "-o", tmp_path / "out"), ("profile", "--model", tmp_path)):
        assert cli.main([str(word) for word in command]) == 2
        assert REASONS[kind] in " ".join(capsys.readouterr().err.split())
