"""tokenizer.model, all that most original checkpoints have: the same ids as sentencepiece's own, there and back."""

import io
import json
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from pmod_cli.checkpoints import Options, convert, load_model
from pmod_cli.model import PmodSettings
from tests.checkpoints.originals import twins

TEXT = ["USER: what is the value of a bar? ASSISTANT: 12", "which colour is the circle? red", "a chat between two"] * 20
ROWS = 340


@pytest.fixture
def original(tmp_path) -> tuple[Path, sentencepiece.SentencePieceProcessor]:
    """A checkpoint with tokenizer.model and no tokenizer.json, and that tokenizer in sentencepiece itself."""
    folder, model = tmp_path / "original", io.BytesIO()
    twins(folder, layers=4)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_writer=model, vocab_size=ROWS, model_type="bpe", byte_fallback=True,
        character_coverage=1.0, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False, "unk_token": "<unk>"})
    )
    weights = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.randn(ROWS, 32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": ROWS}))
    return folder, sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def test_there_and_back(original, tmp_path):
    folder, reference = original
    convert(folder, tmp_path / "pmod", PmodSettings(schedule="list", values=(1.0, 0.4, 1.0, 0.4)))
    model, processor = load_model(tmp_path / "pmod")
    assert model.config.image_token_id == ROWS
    assert model.get_input_embeddings().num_embeddings == 384
    for text in ("USER: what?", "hello  you\nthere", "é"):
        assert processor.tokenizer(text).input_ids == [1, *reference.encode(text)]
    convert(tmp_path / "pmod", tmp_path / "published", options=Options(to="published"))
    back = AutoTokenizer.from_pretrained(tmp_path / "published")
    assert len(back) == ROWS
    assert back("USER: what?").input_ids == [1, *reference.encode("USER: what?")]
    assert (tmp_path / "published" / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()
    assert not (tmp_path / "published" / "processor_config.json").exists()
    report = convert(tmp_path / "published", tmp_path / "again")
    assert report.layout == "published"
    assert load_model(tmp_path / "again")[1].tokenizer("<image>").input_ids[-1] == ROWS
