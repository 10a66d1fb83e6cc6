"""`pmod convert` from parts and with adapters, word for word."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText

from pmod_cli.cli import main
from tests.checkpoints.test_from_parts import parts  # noqa: F401 - a fixture


def test_language_model_tower_and_projector(parts, workdir, capsys):  # noqa: F811
    folder, _, _ = parts
    words = ["--llm", folder / "llm", "--vision-tower", folder / "clip", "--projector", folder / "mm_projector.bin"]
    assert main(["convert", *map(str, words), "--verify"]) == 0
    out, err = capsys.readouterr()
    assert "in the parts layout" in out
    assert "bit for bit stock" in " ".join(out.split())
    assert "next: pmod finetune" in err
    assert Path("checkpoints/llm-pmod/config.json").exists()
    assert main(["convert", "tiny-llava-next", *map(str, words)]) == 2
    assert "two models" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--merge", "--no-merge"])
def test_adapter(option, stock_model, workdir, capsys):
    model = AutoModelForImageTextToText.from_pretrained(stock_model())
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    torch.manual_seed(0)
    tuned.save_pretrained("adapter")
    assert main(["convert", str(stock_model()), "--adapter", "adapter", option, "-o", "out"]) == 0
    assert ("rewritten" in capsys.readouterr().out) == (option == "--merge")
    assert Path("out/adapter/adapter_model.safetensors").exists() == (option == "--no-merge")
    assert json.loads(Path("out/pmod_provenance.json").read_text())["adapter"] == "adapter"
