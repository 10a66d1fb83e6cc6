"""What a run goes on from: a damaged training checkpoint, another source."""

import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pmod_cli.checkpoints import convert
from pmod_cli.core.errors import PmodError
from pmod_cli.model import PmodSettings
from pmod_cli.training import resume
from pmod_cli.training.adapters import merge
from pmod_cli.training.folder import ADAPTER, STATE
from pmod_cli.training.run import finetune
from tests.training.test_finetune import run_settings, weights


@pytest.fixture
def routed(stock_model, tmp_path) -> Path:
    """A p-MoD checkpoint of the test's own."""
    convert(stock_model("llava_next", "llama"), tmp_path / "routed", PmodSettings())
    return tmp_path / "routed"


@pytest.fixture(scope="module")
def whole_run(stock_model, tmp_path_factory) -> dict[str, torch.Tensor]:
    """The weights that an unbroken run of four steps ends with."""
    root = tmp_path_factory.mktemp("whole")
    convert(stock_model("llava_next", "llama"), root / "routed", PmodSettings())
    finetune(run_settings(root / "routed", max_steps=4), root / "run")
    return weights(root / "run")


def interrupted(settings, out: Path, step: int) -> Path:
    """A run that was stopped after a step; the folder of its training checkpoints."""

    def interrupt(done):
        if done.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    assert finetune(settings, out, on_step=interrupt).status == "interrupted"
    return out / STATE


def change_weights(checkpoint: Path) -> None:
    """Add 1 to one tensor of the decoder; the file keeps its name and its size."""
    for path in checkpoint.glob("*.safetensors"):
        tensors = load_file(path)
        name = next((name for name in tensors if name.endswith("self_attn.q_proj.weight")), None)
        if name is not None:
            changed = path.with_suffix(".new")
            save_file({**tensors, name: tensors[name] + 1}, changed, {"format": "pt"})
            changed.replace(path)
            return
    raise AssertionError("no such tensor")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.fixture(scope="module")
def two_checkpoints(stock_model, tmp_path_factory) -> Path:
    """The folder of the training checkpoints of a run that was stopped after its second step."""
    root = tmp_path_factory.mktemp("two")
    convert(stock_model("llava_next", "llama"), root / "routed", PmodSettings())
    settings = run_settings(root / "routed", max_steps=4, save_steps=1, keep_checkpoints=2)
    return interrupted(settings, root / "run", 2)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda newest: cut(newest / "model.safetensors"), r"model\.safetensors has [\d,]+ of [\d,]+ bytes"),
        (lambda newest: (newest / "optimizer.pt").unlink(), r"optimizer\.pt is missing"),
        (lambda newest: cut(newest / "optimizer.pt"), r"optimizer\.pt has [\d,]+ of [\d,]+ bytes"),
        (lambda newest: (newest / "trainer_state.json").write_text(""), r"trainer_state\.json has 0 of [\d,]+ bytes"),
        (lambda newest: (newest / resume.FILES).unlink(), r"has no files\.json"),
        (lambda newest: (newest / resume.FILES).write_text('{"files": [3]}'), r"files\.json: "),
    ],
)
def test_a_damaged_checkpoint_is_set_aside(two_checkpoints, tmp_path, damage, said):
    state = tmp_path / "state"
    shutil.copytree(two_checkpoints, state)
    assert resume.set_damaged_aside(state) == []
    damage(state / "checkpoint-2")
    (sentence,) = resume.set_damaged_aside(state)
    assert re.search(said, sentence)
    assert sentence.endswith("going on from checkpoint-1")
    assert [path.name for path in resume.checkpoints(state)] == ["checkpoint-1"]
    assert (state / "damaged-2").is_dir()


def test_a_run_goes_on_from_the_checkpoint_before(routed, tmp_path, whole_run):
    settings = run_settings(routed, max_steps=4, save_steps=1, keep_checkpoints=2)
    state = interrupted(settings, tmp_path / "run", 2)
    cut(state / "checkpoint-2" / "optimizer.pt")
    notes, seen = [], []
    report = finetune(settings, tmp_path / "run", on_note=notes.append, on_step=lambda step: seen.append(step.step))
    assert (report.status, seen) == ("finished", [2, 3, 4])
    assert len(notes) == 1
    other = weights(tmp_path / "run")
    assert all(torch.equal(whole_run[name], other[name]) for name in whole_run)


@pytest.mark.parametrize("lora", [False, True])
def test_a_process_that_dies_after_the_last_step_leaves_no_step_to_be_done_again(routed, tmp_path, monkeypatch, lora):
    """Three steps of two images, of 20: an epoch's end would hide it."""
    settings = run_settings(routed, max_steps=3)
    settings.data.rows, settings.lora.enabled, settings.lora.rank = 20, lora, 4
    whole = finetune(settings, tmp_path / "whole")

    def die(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pmod_cli.training.run.publish", die)
        with pytest.raises(KeyboardInterrupt):
            finetune(settings, tmp_path / "run")
    seen = []
    report = finetune(settings, tmp_path / "run", on_step=seen.append)
    assert (report.status, report.step, seen) == ("finished", 3, [])
    assert (report.loss, report.tokens) == (whole.loss, whole.tokens)
    assert report.seconds > 0
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "run")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not (tmp_path / "run" / STATE).exists()


def test_no_whole_checkpoint_is_a_sentence(routed, tmp_path):
    settings = run_settings(routed, max_steps=4)
    state = interrupted(settings, tmp_path / "run", 2)
    (state / "checkpoint-2" / "optimizer.pt").unlink()
    with pytest.raises(PmodError, match=r"is whole, so this run cannot go on: checkpoint-2: optimizer\.pt is missing"):
        finetune(settings, tmp_path / "run")
    assert (state / "checkpoint-2" / "model.safetensors").is_file()


def test_adapters_do_not_land_on_other_weights(routed, tmp_path):
    settings = run_settings(routed, max_steps=3)
    settings.lora.enabled, settings.lora.rank, settings.lora.merge = True, 4, False
    interrupted(settings, tmp_path / "run", 1)
    shutil.copytree(routed, tmp_path / "kept")
    change_weights(routed)
    with pytest.raises(PmodError, match=r"model\.name: its weights are not those that the run in .*run began with"):
        finetune(settings, tmp_path / "run")
    shutil.rmtree(routed)
    (tmp_path / "kept").rename(routed)
    assert finetune(settings, tmp_path / "run").status == "finished"
    assert (tmp_path / "run" / ADAPTER / resume.SOURCE).is_file()
    change_weights(routed)
    with pytest.raises(PmodError, match="its weights are not those"):
        merge(tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_run_with_all_weights_in_its_checkpoint_goes_on_and_says_so(routed, tmp_path, whole_run):
    settings = run_settings(routed, max_steps=4)
    interrupted(settings, tmp_path / "run", 2)
    change_weights(routed)
    notes = []
    assert finetune(settings, tmp_path / "run", on_note=notes.append).status == "finished"
    assert "model.name: other weights than this run began with" in notes[0]
    other = weights(tmp_path / "run")
    assert all(torch.equal(whole_run[name], other[name]) for name in whole_run)


def test_a_run_without_a_checkpoint_does_not_begin_with_other_weights(routed, tmp_path):
    settings = run_settings(routed, max_steps=4)
    state = interrupted(settings, tmp_path / "run", 1)
    shutil.rmtree(state / "checkpoint-1")
    change_weights(routed)
    with pytest.raises(PmodError, match="its weights are not those"):
        finetune(settings, tmp_path / "run")


def test_an_unchanged_source_costs_no_second_read(routed, tmp_path, monkeypatch):
    from pmod_cli.checkpoints import digests

    monkeypatch.setattr(digests, "LARGE", 1)
    first = digests.weights_sha256(routed)
    digests._read_digest.cache_clear()
    monkeypatch.setattr(digests, "file_sha256", lambda file: pytest.fail(f"{file} is read again"))
    assert digests.weights_sha256(routed) == first
    monkeypatch.undo()
    monkeypatch.setattr(digests, "LARGE", 1)
    change_weights(routed)
    digests._read_digest.cache_clear()
    assert digests.weights_sha256(routed) != first
