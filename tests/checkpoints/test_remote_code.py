"""`--to remote-code`: plain transformers, on a machine without pmod, gives the same logits and the same words."""

import ast
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from pmod_cli.checkpoints import Options, convert, load_model
from pmod_cli.checkpoints.layouts.remote_code import FILE, modeling_source
from pmod_cli.model import PmodSettings
from tests.factories import KINDS
from tests.model.published import GOLDEN

SETTINGS = PmodSettings(schedule="list", values=(1.0, 0.6, 0.4, 0.2))
CLEAN = """
import sys

class NoPmod:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "pmod_cli":
            raise ImportError("pmod is not installed on this machine")

sys.meta_path.insert(0, NoPmod())
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, pipeline

folder, out = sys.argv[1:]
try:
    AutoConfig.from_pretrained(folder)
    raise SystemExit("loaded without being trusted")
except ValueError as error:
    assert "trust_remote_code" in str(error), error
model, info = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
assert not any(info.values()), info
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
image = Image.effect_mandelbrot((50, 60), (-2, -1.5, 1, 1.5), 30).convert("RGB")
inputs = processor(images=image, text="USER: <image>\\nwhat is this ASSISTANT:", return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits
words = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)

# Several prompts at once, padded on the left: each as alone.
texts = ["USER: <image>\\nwhat is this ASSISTANT:", "USER: <image>\\nwhat is the price of ham and of tea? ASSISTANT:"]
pictures = [image, image.resize((90, 30))]
options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
batch = processor(images=pictures, text=texts, padding=True, return_tensors="pt")
together = model.generate(**batch, **options)[:, -4:]
for row, (picture, text) in enumerate(zip(pictures, texts)):
    alone = model.generate(**processor(images=picture, text=text, return_tensors="pt"), **options)
    assert torch.equal(together[row], alone[0, -4:]), row

pipe = pipeline("image-text-to-text", model=model, processor=processor)
(said,) = pipe(images=image, text=texts[0], generate_kwargs=options, return_full_text=False)
whole = processor.decode(words[0], skip_special_tokens=True)
assert said["generated_text"] and whole.endswith(said["generated_text"]), (whole, said)

tensors = {"logits": logits, "words": words, **{f"inputs.{k}": v for k, v in inputs.items() if torch.is_tensor(v)}}
save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out)
assert not any(name.startswith("pmod_cli") for name in sys.modules)
"""


@pytest.mark.parametrize("kind", KINDS)
def test_same_logits_and_words_without_pmod(kind, stock_model, tmp_path):
    options = Options(to="remote-code", router_init="normal:1")
    report = convert(stock_model(kind), tmp_path / "remote", SETTINGS, options)
    assert FILE in report.written
    assert report.linked  # weights are those of our layout, so they are not copied either
    convert(stock_model(kind), tmp_path / "ours", SETTINGS, Options(router_init="normal:1"))
    result = subprocess.run(
        [sys.executable, "-I", "-c", CLEAN, str(tmp_path / "remote"), str(tmp_path / "out.safetensors")],
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    there = load_file(tmp_path / "out.safetensors")
    model, _ = load_model(tmp_path / "ours")
    inputs = {name.removeprefix("inputs."): tensor for name, tensor in there.items() if name.startswith("inputs.")}
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, there["logits"])
    words = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert torch.equal(words, there["words"])


def test_the_file_is_one_module_without_relative_imports_or_names_twice():
    tree = ast.parse(modeling_source())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    plain = [node.names[0].name for node in tree.body if isinstance(node, ast.Import)]
    assert not any(name.startswith("pmod") for name in plain)
    names = [node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    assigned = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    assigned += [node.target for node in tree.body if isinstance(node, ast.AnnAssign)]
    names += [target.id for target in assigned if isinstance(target, ast.Name)]
    assert len(names) == len(set(names))


def test_back_to_our_layout_is_bit_equal(tmp_path):
    convert(GOLDEN / "llava15" / "ckpt", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "remote", options=Options(to="remote-code"))
    convert(tmp_path / "remote", tmp_path / "published", options=Options(to="published"))
    before = load_file(GOLDEN / "llava15" / "ckpt" / "model.safetensors")
    after = load_file(tmp_path / "published" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "auto_map" in json.loads((tmp_path / "remote" / "config.json").read_text())
