"""`pmod finetune --dry-run` tells the truth: it refuses what the start refuses, in the same words, and at once."""

import json
import os

import pytest
from PIL import Image

from pmod_cli import cli, recipe_files
from pmod_cli.training import folder
from pmod_cli.training.recipe import dump, load_settings
from tests.test_cli import imported_by

QUICK = ("--set", "train.max_steps=2", "--batch-size", "2", "--set", "data.turns=1", "--device", "cpu")


def call(*words: object) -> int:
    return cli.main(["finetune", *map(str, words)])


def files(root) -> list:
    return sorted(path for path in root.rglob("*") if ".pmod" not in path.parts)


# (words, what is said); "there" is a folder with a file in it, "taken" a run with another seed.
REFUSED = {
    "an unknown task": (["--eval", "docvqaa"], "no task is called 'docvqaa'"),
    "a task whose data is not here": (["--eval", "chartqa"], "the data of ChartQA is not on this machine"),
    "a log without its package": (["--report-to", "wandb"], "train.report_to: wandb needs wandb"),
    "a foreign folder": (["-o", "there"], "there exists and is not a run of pmod finetune"),
    "a run whose checkpoint is damaged": (["-o", "damaged"], "no training checkpoint in damaged/checkpoints is whole"),
    "a folder below a file": (["-o", "there/thesis.txt/run"], "there/thesis.txt is a file"),
    "a folder whose name is no UTF-8": (["-o", os.fsdecode(b"m\xff")], r"the path m\xff is no UTF-8"),
    "another run": (["-o", "taken"], "taken holds a run with other settings"),
    "more processes than GPUs": (["--num-processes", "8", "--device", "auto"], "and none was found"),
    "a GPU": (["--device", "cuda"], "no CUDA GPU can be used"),
    "a second GPU": (["--device", "cuda:1"], "no CUDA GPU can be used"),
    "an engine": (["--num-processes", "2", "--engine", "zero2"], "DeepSpeed (zero2) needs CUDA GPUs"),
    "a kernel": (["--set", "model.attention=flash_attention_2"], "flash_attention_2 needs a CUDA GPU"),
    "an uneven batch": (["--set", "train.global_batch_size=7"], "7 is no multiple of 2 rows x 1 processes"),
    "no end": (["--set", "train.max_steps=null"], "synthetic documents have no end"),
    "no folder of all machines": (
        ["--num-processes", "2", "--num-machines", "2", "--main-process-ip", "a"],
        "--num-machines needs --out",
    ),
    "no file of data": (["--set", "data.kind=llava", "--set", "data.path=no.json"], "there is no file no.json"),
    "no folder of images": (
        ["--set", "data.kind=llava", "--set", "data.path=rows.json", "--set", "data.images=nowhere"],
        "there is no folder nowhere",
    ),
    "a bad row": (["--set", "data.kind=llava", "--set", "data.path=rows.json"], "no such image: gone.png"),
    "bad rows alone": (
        ["--set", "data.kind=llava", "--set", "data.path=rows.json", "--on-bad-row", "skip"],
        "none is good",
    ),
    "a schedule of another model": (
        ["--set", "pmod.schedule=list", "--set", "pmod.values=[0.5,0.5]"],
        "needs one ratio per layer",
    ),
    "adapters of nothing": (["--set", "lora.enabled=true", "--set", "lora.targets=[qq_proj]"], "no qq_proj"),
    "a model that is no model": (["-m", "there"], "lacks config.json"),
}


@pytest.fixture
def place(stock_model, workdir, monkeypatch):
    (workdir / "there").mkdir()
    (workdir / "there" / "thesis.txt").write_text("years")
    (workdir / "taken").mkdir()
    (workdir / "taken" / "config.yaml").write_text("train: {seed: 5}\n")
    settings = load_settings(recipe_files.find("tiny"), ["train.max_steps=2", "train.batch_size=2", "data.turns=1"])
    settings.model.name = str(stock_model().resolve())
    (workdir / "damaged" / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    (workdir / "damaged" / "config.yaml").write_text(dump(settings))
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "red"}]
    (workdir / "rows.json").write_text(json.dumps([{"id": "1", "image": "gone.png", "conversations": turns}]))
    monkeypatch.setenv("PMOD_MODEL", str(stock_model()))
    return workdir


@pytest.mark.parametrize("case", REFUSED)
def test_a_dry_run_refuses_what_the_start_refuses(place, capsys, case):
    words, said = REFUSED[case]
    before = files(place)
    assert call(*QUICK, *words, "--dry-run") == 2
    planned = capsys.readouterr()
    assert said in planned.err
    assert planned.out == ""
    assert files(place) == before
    assert call(*QUICK, *words) == 2
    started = capsys.readouterr()
    assert started.err.replace("run folder", "\0").partition("\0")[0] in planned.err
    assert said in started.err
    if case not in ("a bad row", "bad rows alone"):  # found by reading rows, which the run folder keeps a list of
        assert files(place) == before


@pytest.mark.timing
@pytest.mark.parametrize("case", ["an unknown task", "more processes than GPUs", "a log without its package", "a GPU"])
def test_what_needs_no_weights_is_refused_before_torch_is_imported(place, case):
    for more in ([], ["--dry-run"]):
        heavy = imported_by(["finetune", *QUICK, *REFUSED[case][0], *more], cwd=place)
        assert not heavy & {"torch", "transformers", "lmms_eval"}


def test_a_plan_that_does_not_fit_names_what_would(workdir, capsys):
    words = ("--recipe", "llava-next-7b", "--dry-run", "--gpu", "rtx-4090", "--num-processes", 8)
    assert call(*words, "--json") == 1
    shown = capsys.readouterr()
    plan = json.loads(shown.out)
    assert "does not fit: it takes 37.3 GiB on each RTX 4090, which has 24 GiB" in shown.err
    assert "what would fit: --batch-size" in shown.err
    assert "data/llava_next_data.json" in " ".join(plan["lacking_here"])
    assert plan["remedies"]
    for remedy in plan["remedies"]:  # each holds what it promises
        changes = [word for key, value in remedy["settings"].items() for word in ("--set", f"{key}={value}")]
        assert call(*words[:-1], remedy["processes"], *changes, "--json") == 0
        better = json.loads(capsys.readouterr().out)
        assert better["pmod"]["memory_bytes"] == remedy["memory"]
        assert better["rows_per_step"] == plan["rows_per_step"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--set", "train.batch_size=1", "--set", "train.global_batch_size=16"], "--set lora.enabled=true"),
        (["--set", "train.batch_size=1", "--set", "train.global_batch_size=16"], "--engine fsdp2 --num-processes"),
        (["--set", "model.gradient_checkpointing=false"], "model.gradient_checkpointing=true"),
    ],
)
def test_one_gpu_is_told_of_adapters_and_of_more_gpus(workdir, capsys, words, named):
    assert call("--recipe", "llava-1.5-7b", "--dry-run", "--gpu", "a100-80gb", *words) == 1
    assert named in capsys.readouterr().err


def test_the_disk_of_a_plan_is_what_a_run_writes(stock_model, workdir, capsys, monkeypatch):
    words = ("-m", stock_model(), *QUICK, "--set", "train.save_steps=1")
    assert call(*words, "--dry-run", "--json") == 0
    disk = json.loads(capsys.readouterr().out)["disk"]
    monkeypatch.setattr(folder, "close_run", lambda out: None)  # else the last checkpoint is gone
    assert call(*words, "-o", "run") == 0

    def weights(of) -> int:
        return sum(path.stat().st_size for path in of.iterdir() if path.suffix in (".safetensors", ".pt"))

    (checkpoint,) = (workdir / "run" / "checkpoints").glob("checkpoint-*")
    assert weights(checkpoint) == pytest.approx(
        disk["checkpoint_bytes"], rel=0.01, abs=60_000
    )  # beside the tensors: names and headers
    assert weights(workdir / "run") == pytest.approx(
        disk["result_bytes"], rel=0.01, abs=60_000
    )  # beside the tensors: names and headers
    assert disk["peak_bytes"] == 2 * disk["checkpoint_bytes"] > disk["result_bytes"]
    assert disk["free_bytes"] > 0


def test_a_full_disk_does_not_fit(stock_model, workdir, capsys, monkeypatch):
    from pmod_cli.training import cost

    monkeypatch.setattr(cost.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    assert call("-m", stock_model(), *QUICK, "--dry-run") == 1
    assert "does not fit on the disk" in capsys.readouterr().err


def test_a_plan_on_images_of_ones_own(stock_model, workdir, capsys):
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "red"}]
    (workdir / "rows.json").write_text(json.dumps([{"id": "1", "image": "one.png", "conversations": turns}]))
    Image.new("RGB", (40, 30), "red").save(workdir / "one.png")
    data = ("--set", "data.kind=llava", "--set", "data.path=rows.json")
    assert call("-m", stock_model(), *QUICK, *data, "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["data"]["source"] == "1 rows of the data"


def test_a_sweep_is_planned_cell_by_cell(workdir, capsys):
    words = ("--sweep", "ablations", "--seeds", 2, "--device", "cpu", "-o", "sweep")
    assert call(*words, "--dry-run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["schema_version"], plan["cells"], plan["done"], plan["left"]) == (1, 40, 0, 40)
    rows = {row["recipe"]: row for row in plan["rows"]}
    assert (rows["p-mod"]["steps"], rows["p-mod"]["rows"], rows["p-mod"]["left"]) == (24, 384, [0, 1])
    assert rows["shift-0.3"]["flops_per_cell"] < rows["p-mod"]["flops_per_cell"] < rows["stock"]["flops_per_cell"]
    assert rows["stock"]["mean_retention"] == 1
    assert not list(workdir.iterdir())

    cells = workdir / "sweep" / "cells"
    cells.mkdir(parents=True)
    (cells / "p-mod-seed0.json").write_text(json.dumps(_result_of("ablations/p-mod", seed=0)))
    assert call(*words, "--dry-run") == 0
    assert "40 cells in sweep: 1 done, 39 left" in capsys.readouterr().out
    for more in ((), ("--dry-run",)):  # the plan and the start
        assert call(*words, *more, "--max-steps", 3) == 2
        assert "holds cell p-mod-seed0 with other settings" in capsys.readouterr().err
        assert call(*words, *more, "--report-to", "wandb") == 2
        assert "wandb, which is not installed" in capsys.readouterr().err


def _result_of(recipe: str, seed: int) -> dict:
    from dataclasses import asdict

    from pmod_cli import recipe_files
    from pmod_cli.training.ablation_sweep import IMAGES, SEED_STRIDE
    from pmod_cli.training.recipe import load_settings

    settings = load_settings(recipe_files.find(recipe), [f"train.seed={seed}"])
    settings.data.first += seed * SEED_STRIDE
    scored = {"mean_retention": 0.5375, "answered": {"doc": [9, 10]}}
    return {"settings": asdict(settings), "images": IMAGES, "seed": seed, "cpu_seconds": 70.0, **scored}


def test_a_quiet_plan_is_its_exit_code(stock_model, workdir, capsys):
    assert call("-m", stock_model(), *QUICK, "--dry-run", "-q") == 0
    assert capsys.readouterr() == ("", "")
    assert call("--recipe", "llava-next-7b", "--dry-run", "--gpu", "24GB", "-q") == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: the run does not fit")
    assert call("--sweep", "ablations", "--seeds", 1, "--device", "cpu", "-o", "sweep", "--dry-run", "-q") == 0
    assert capsys.readouterr() == ("sweep\n", "")


def test_rows_beyond_the_decoders_context_are_told(stock_model, workdir, capsys):
    words = "what colour? " * 1500
    said = [{"from": "human", "value": words}, {"from": "gpt", "value": "red"}]
    (workdir / "rows.json").write_text(json.dumps([{"conversations": said}] * 2))
    asked = ("-m", stock_model(), *QUICK, "--set", "data.kind=llava", "--set", "data.path=rows.json", "--dry-run")
    call(*asked)
    warned = capsys.readouterr().err
    assert "the longest row has" in warned
    assert "--set data.max_length=" in warned
    cut = warned.partition("--set data.max_length=")[2].split()[0]
    call(*asked, "--set", f"data.max_length={cut}")
    assert "the longest row has" not in capsys.readouterr().err
    assert call(*asked[:-1], "--set", "train.max_steps=1", "-o", "run") == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "the longest row has" in line]
    assert line in warned
