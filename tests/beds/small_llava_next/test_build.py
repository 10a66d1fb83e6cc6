"""small-llava-next from its package and delta: whole or not at all, and every command takes it.

Everything that needs the language model is a soak test: its package has 98 MB and comes from the package index.
"""

import json
import os
import re
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaNextForConditionalGeneration

from pmod_cli.checkpoints import load_model
from pmod_cli.core import yaml_text
from pmod_cli.core.errors import PmodError
from pmod_cli.data.collator import Collator
from pmod_cli.data.documents import draw, seed_of
from pmod_cli.data.rows import row
from tests.beds.small_llava_next import pretrain as module
from tests.beds.small_llava_next.build import DELTA, DIGEST, RECIPE, build
from tests.beds.small_llava_next.measure import TAUGHT, measure
from tests.beds.small_llava_next.model import is_vision

ASKED = 10  # questions a task


def test_the_delta_is_small_and_has_no_code():
    assert DELTA.stat().st_size <= 10_000_000
    tensors = load_file(DELTA)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    adapted = {name.rsplit(".lora_")[0] for name in tensors if ".lora_" in name}
    assert len(adapted) == 30 * 7
    assert {name.split(".")[0] for name in tensors} == {
        "language_model", "vision_tower", "multi_modal_projector", "image_newline"
    }  # fmt: skip
    assert re.fullmatch(r"[0-9a-f]{64}", DIGEST.read_text().strip())


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The model's folder, built from the commit's own delta."""
    folder = tmp_path_factory.mktemp("beds") / "small-llava-next"
    build(folder, yaml_text.read(RECIPE).plain(), digest=DIGEST.read_text().strip())
    return folder


@pytest.fixture(scope="module")
def converted(small, pmod, tmp_path_factory):
    """What `pmod convert` makes of it, and what it said."""
    work = tmp_path_factory.mktemp("converted")
    done = pmod("convert", small, "-o", "p-mod", "--json", cwd=work)
    assert done.returncode == 0, done.stderr
    return work / "p-mod", json.loads(done.stdout)


@pytest.mark.soak
def test_it_is_built_in_under_a_minute_and_a_wrong_digest_leaves_nothing(small, tmp_path):
    started = time.monotonic()
    recipe = yaml_text.read(RECIPE).plain()
    with pytest.raises(PmodError, match="digest"):
        build(tmp_path / "model", recipe, digest="0" * 64)
    assert time.monotonic() - started < 60  # `small` has fetched the package
    assert not list(tmp_path.iterdir())
    with pytest.raises(PmodError, match="exists"):
        build(small, recipe)


@pytest.mark.soak
def test_it_is_a_stock_checkpoint_with_tied_embeddings_and_grouped_heads(small):
    model = AutoModelForImageTextToText.from_pretrained(small)
    assert type(model) is LlavaNextForConditionalGeneration
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert "language_model.lm_head.weight" not in load_file(small / "model.safetensors")
    text = model.config.text_config
    assert (text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads) == (30, 9, 3)
    assert not hasattr(text, "quantization_config")


@pytest.mark.soak
def test_labels_are_the_answers_and_their_ends(small):
    """The padding token of this tokenizer is also the one that ends an answer."""
    processor = AutoProcessor.from_pretrained(small)
    assert processor.tokenizer.pad_token_id == processor.tokenizer.eos_token_id
    documents = [draw(task, seed_of("train", 3)) for task in TAUGHT]
    batch = Collator(processor)([row(document) for document in documents])
    for ids, labels, document in zip(batch["input_ids"], batch["labels"], documents, strict=True):
        labelled = labels >= 0
        assert torch.equal(ids[labelled], labels[labelled])
        said = processor.decode(labels[labelled]).split("<|im_end|>")
        assert said == [turn.answer for turn in document.turns] + [""]


@pytest.mark.soak
def test_it_reads_unseen_documents_and_cannot_without_the_image(small):
    model = AutoModelForImageTextToText.from_pretrained(small, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(small)
    for control, least, most in ((None, 75, 100), ("blank", 0, 40)):
        found = [measure(model, processor, ASKED, control, tasks=[task]) for task in TAUGHT]
        right = sum(share * asked for kinds in found for share, _, _, asked in kinds.values()) / (ASKED * len(TAUGHT))
        assert least <= right <= most


@pytest.mark.soak
def test_convert_links_the_weights_and_keeps_embeddings_tied(small, converted):
    folder, _ = converted
    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"]
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert not [name for name in index if "lm_head" in name]
    shard = folder / index["language_model.model.embed_tokens.weight"]
    assert os.path.samefile(shard, small / "model.safetensors")
    model, _ = load_model(folder)
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


@pytest.mark.soak
def test_calibrate_is_nearer_to_stock_than_random_and_links_the_weights(small, pmod, tmp_path):
    asked = ("--data", ",".join(TAUGHT), "--samples", "16", "--schedule", "cosine", "--budget", "0.6")
    done = pmod("calibrate", small, "-o", "calibrated", *asked, "--json", cwd=tmp_path, timeout=2400)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads((tmp_path / "calibrated" / "calibration.json").read_text())["budgets"]
    divergence = {row["name"]: row["divergence"] for row in result["judged"]}
    assert divergence["calibrated"] < divergence["random"]
    index = json.loads((tmp_path / "calibrated" / "model.safetensors.index.json").read_text())["weight_map"]
    shard = tmp_path / "calibrated" / index["language_model.model.embed_tokens.weight"]
    assert os.path.samefile(shard, small / "model.safetensors")


@pytest.mark.soak
def test_profile_counts_grouped_heads_and_reports_where_it_reads(small, converted, pmod, tmp_path):
    for model, report in ((converted[0], "all"), (small, "depth")):
        more = ("--tasks", "doc", "--samples", "4") if report == "depth" else ()
        done = pmod("profile", "--report", report, "-m", model, "--json", *more, cwd=tmp_path, timeout=1200)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)


@pytest.mark.soak
def test_eval_scores_it_and_no_answer_is_cut(small, pmod, tmp_path):
    """An answer ends with the token that also pads: `generate` has to stop there, in a batch too."""
    asked = ("--tasks", ",".join(f"tiny_{task}" for task in TAUGHT), "--limit", "8", "-b", "4", "--against", "none")
    done = pmod("eval", "-m", small, *asked, "-o", "scores", cwd=tmp_path, timeout=1200)
    assert done.returncode == 0, done.stderr
    tasks = json.loads((tmp_path / "scores" / "results.json").read_text())["tasks"]
    assert [task["name"] for task in tasks] == [f"tiny_{task}" for task in TAUGHT]
    for task in tasks:
        (scored,) = task["scores"].values()
        assert (scored["cut_answers"], scored["empty_answers"]) == (0, 0)
        assert scored["questions"] == 8
    assert next(iter(tasks[0]["scores"].values()))["score"] >= 75


@pytest.mark.soak
def test_finetune_adapts_it_by_lora_and_visualize_shows_what_it_keeps(converted, pmod, tmp_path):
    recipe = RECIPE.with_name("finetune.yaml")
    done = pmod("finetune", "--recipe", recipe, "-m", converted[0], "-o", "run", cwd=tmp_path, timeout=2400)
    assert done.returncode == 0, done.stderr
    trained = {name for file in (tmp_path / "run").glob("*.safetensors") for name in load_file(file)}
    assert "language_model.model.embed_tokens.weight" in trained  # still tied
    assert not [name for name in trained if "lm_head" in name or "lora" in name]
    draw("doc", seed_of("test", 0)).image.save(tmp_path / "receipt.png")
    question = "what is the price of ham?"
    done = pmod("visualize", "receipt.png", "-m", "run", "--question", question, cwd=tmp_path, timeout=1200)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "receipt-pmod.png").stat().st_size > 1000


@pytest.mark.soak
def test_an_interrupted_training_ends_where_a_whole_one_does(tmp_path, monkeypatch):
    recipe = yaml_text.read(RECIPE).plain() | {"log_every": 1, "save_every": 1}
    recipe["align"] |= {"steps": 8, "batch_size": 2}
    recipe["answer"] |= {"steps": 2, "batch_size": 2}

    class Killed(Exception):
        pass

    def dying(*arguments):
        keep(*arguments)
        raise Killed

    keep = module.keep
    with monkeypatch.context() as patch:
        patch.setattr(module, "keep", dying)
        for _ in range(3):
            with pytest.raises(Killed):
                module.pretrain(recipe, tmp_path / "broken", report=lambda line: None)
    (tmp_path / "whole").mkdir()
    os.symlink(tmp_path / "broken" / "start", tmp_path / "whole" / "start")
    one, other = (
        load_file(module.pretrain(recipe, tmp_path / name, report=lambda line: None)) for name in ("broken", "whole")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(is_vision(f"model.{name}") for name in one)
