"""Two processes on the CPU (gloo) against one: DDP and FSDP2, with ranks whose batch has no image."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pmod_cli.core.errors import PmodError
from pmod_cli.data.documents import draw, seed_of
from pmod_cli.training import folder
from pmod_cli.training.launch import Distributed, launch, launcher_arguments
from pmod_cli.training.recipe import load_settings
from pmod_cli.training.run import finetune

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Twelve conversations in LLaVA's layout, every second one without an image."""
    place = tmp_path_factory.mktemp("rows")
    written = []
    for index in range(12):
        document = draw("attribute", seed_of("train", index))
        turn = document.turns[0]
        row = {"id": str(index), "conversations": [{"from": "human", "value": turn.question}]}
        if index % 2:
            row["image"] = f"{index}.png"
            document.image.save(place / row["image"])
            row["conversations"][0]["value"] = f"<image>\n{turn.question}"
        row["conversations"].append({"from": "gpt", "value": turn.answer})
        written.append(row)
    (place / "rows.json").write_text(json.dumps(written))
    return place


def settings_for(model, rows, *overrides):
    return load_settings(
        None,
        [
            *(f"model.name={model}", "data.kind=llava", f"data.path={rows}/rows.json", f"data.images={rows}"),
            *("train.global_batch_size=2", "train.learning_rate=1e-2", "train.warmup_steps=0", "train.log_steps=1"),
            *("train.report_to=none", *overrides),
        ],
    )


def start(settings, out, processes=2):
    job = {"settings": asdict(settings), "out": str(out), "device": "cpu", "resume": True, "overwrite": False}
    return launch(
        Distributed(processes),
        job | {"named": out.name, "quiet": True, "progress": False},
        on_command=lambda command: None,
    )


def losses(out):
    lines = map(json.loads, (out / folder.LOG).read_text().splitlines())
    return [(line["loss"], line["grad_norm"], line["vision_tokens"]) for line in lines if "loss" in line]


def weights(out):
    return {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def alone(routed, rows, tmp_path_factory):
    """The run of one process: six steps of two rows."""
    out = tmp_path_factory.mktemp("alone") / "run"
    report = finetune(settings_for(routed, rows, "train.batch_size=2"), out)
    assert (report.status, report.step) == ("finished", 6)
    return out


@pytest.mark.parametrize("engine", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_two_processes_train_as_one(routed, rows, alone, tmp_path, engine):
    report = start(settings_for(routed, rows, "train.batch_size=1", f"train.engine={engine}"), tmp_path / "run")
    assert (report.status, report.step, report.summary.processes) == ("finished", 6, 2)
    for mine, single in zip(losses(tmp_path / "run"), losses(alone), strict=True):
        assert mine == pytest.approx(single, abs=1e-4)
    mixed = {round(vision) for _, _, vision in losses(alone)}
    assert len(mixed) > 1, "every step had as many images: no process was ever without one beside one with"
    one, other = weights(alone), weights(tmp_path / "run")
    assert one.keys() == other.keys()
    assert max((one[name] - other[name]).abs().max().item() for name in one) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "precision", "near"), [("ddp", "float32", 1e-4), ("fsdp2", "float32", 1e-4), ("fsdp2", "bfloat16", 0.05)]
)
def test_two_processes_distil_as_one(routed, rows, tmp_path, engine, precision, near):
    """Adapters, and a teacher that is the same weights without them, in batches of text beside batches with images."""
    lora = ("lora.enabled=true", "lora.rank=4", "lora.dropout=0", "train.loss=distill", "train.max_steps=3")
    lora += (f"model.precision={precision}",)
    finetune(settings_for(routed, rows, "train.batch_size=2", *lora), tmp_path / "alone")
    report = start(settings_for(routed, rows, "train.batch_size=1", f"train.engine={engine}", *lora), tmp_path / "run")
    assert (report.status, report.step, report.summary.processes) == ("finished", 3, 2)
    for mine, single in zip(losses(tmp_path / "run"), losses(tmp_path / "alone"), strict=True):
        assert mine == pytest.approx(single, rel=near)


@pytest.mark.slow
@pytest.mark.parametrize("engine", [pytest.param("ddp", marks=pytest.mark.soak), "fsdp2"])
def test_interrupted_processes_save_together_and_go_on(routed, rows, alone, tmp_path, engine):
    """Ctrl-C at the launcher alone: the processes agree on a step, and the run ends as an unbroken one."""
    words = [sys.executable, "-m", "pmod_cli", "finetune", "--num-processes", "2", "--device", "cpu", "-o", "run"]
    folder.write_text(tmp_path / "r.yaml", folder.dump(settings_for(routed, rows, "train.batch_size=1")))
    words += ["--recipe", "r.yaml", "--engine", engine]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(words, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.startswith("step 2/"):
            break
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 130, said
    assert "go on with: pmod finetune --recipe run/config.yaml --out run --num-processes 2" in said
    assert "Traceback" not in said
    assert len(list((tmp_path / "run" / folder.STATE).glob("checkpoint-*"))) == 1
    report = start(load_settings(tmp_path / "run" / folder.SETTINGS), tmp_path / "run")
    assert (report.status, report.step) == ("finished", 6)
    for mine, single in zip(losses(tmp_path / "run"), losses(alone), strict=True):
        assert mine == pytest.approx(single, abs=1e-4)


def test_another_number_of_processes_does_not_go_on(routed, rows, tmp_path):
    out = tmp_path / "run"
    settings = settings_for(routed, rows, "train.batch_size=1")
    (out / folder.STATE / "checkpoint-1").mkdir(parents=True)
    folder.write_text(out / folder.SETTINGS, folder.dump(settings))
    folder.write_json(out / folder.STATE / folder.PROCESSES, {"processes": 2})
    with pytest.raises(PmodError, match="holds a run of 2 processes, and this one has 1"):
        finetune(settings, out)


@pytest.mark.slow
def test_what_a_process_says_is_what_is_raised(routed, rows, tmp_path):
    with pytest.raises(PmodError, match="no multiple of 3 rows x 2 processes") as caught:
        start(settings_for(routed, rows, "train.batch_size=3"), tmp_path / "run")
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"processes": 3, "machines": 2}, "expected a multiple"),
        ({"processes": 2, "machines": 2}, "needs `main_process_ip`"),
        ({"processes": 2, "machines": 2, "machine_rank": 2, "main_ip": "x"}, "expected less"),
    ],
)
def test_numbers_that_do_not_fit(options, part):
    with pytest.raises(PmodError, match=part):
        Distributed(**options)


def test_the_command_of_a_machine_among_several(tmp_path):
    words = launcher_arguments(Distributed(processes=16, machines=2, machine_rank=1, main_ip="node0"), tmp_path)
    line = " ".join(words)
    assert "--nnodes 2 --node-rank 1 --master-addr node0 --master-port 29500 --nproc-per-node 8" in line


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_deepspeed_trains_as_one_process(routed, rows, alone, tmp_path, engine):
    pytest.importorskip("deepspeed", reason="needs DeepSpeed; it is not installed")
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    settings = settings_for(routed, rows, "train.batch_size=1", f"train.engine={engine}", "model.precision=float32")
    job = {"settings": asdict(settings), "out": str(tmp_path / "run"), "device": "cuda", "resume": True}
    launch(
        Distributed(2),
        job | {"named": "run", "overwrite": False, "quiet": True, "progress": False},
        on_command=lambda command: None,
    )
    for mine, single in zip(losses(tmp_path / "run"), losses(alone), strict=True):
        assert mine == pytest.approx(single, abs=1e-3)
