"""`pmod finetune` as a user runs it: stdout, stderr, exit code and what is on the disk."""

import json
import os
import shlex
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from PIL import Image

from pmod_cli import cli
from pmod_cli.checkpoints import load_model
from pmod_cli.core import errors
from tests.conftest import ROOT

QUICK = ("--max-steps", 2, "--batch-size", 2, "--set", "data.turns=1", "--set", "train.log_steps=1", "--device", "cpu")


def call(*arguments: object) -> int:
    """The program in this process: the cheap way where nothing is trained."""
    return cli.main([str(argument) for argument in arguments])


def test_two_steps_after_convert(stock_model, workdir, capsys):
    assert call("convert", stock_model(), "-o", "routed") == 0
    capsys.readouterr()
    assert call("finetune", "--recipe", "tiny", *QUICK, "--json") == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    folder = report["path"]
    assert (report["status"], report["step"]) == ("finished", 2)
    assert folder.startswith("runs/tiny-")
    assert report["parameters"]["router"]["trained"]
    assert not report["parameters"]["vision_tower"]["trained"]
    assert "model: routed" in captured.err
    assert f"run folder: {folder}\n" in captured.err
    assert "step 2/2  loss" in captured.err
    assert (workdir / ".pmod" / "current").read_text().strip() == folder
    assert json.loads((workdir / folder / "config.json").read_text())["router_state"] == "trained"

    assert call("finetune", "-r", f"{folder}/config.yaml", "-o", folder, "--device", "cpu") == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == folder
    assert "already finished" in captured.err


def test_a_sweep_of_ones_own_recipes_leaves_its_table(workdir, capsys):
    (workdir / "mine").mkdir()
    (workdir / "mine" / "half.yaml").write_text("base: ablations/p-mod\npmod: {min_ratio: 0.5}\n")
    small = ("--set", "data.tasks=[presence]", "--set", "model.calibration_images=2")
    words = ("finetune", "--sweep", "mine/,ablations/stock", "--seeds", 1, *small, *QUICK)
    assert call(*words, "-o", "swept") == 0
    captured = capsys.readouterr()
    assert "cell 1/2  half-seed0  done" in captured.err
    assert captured.out.startswith("| recipe | retention | presence | mean | seeds |")
    assert {path.name for path in (workdir / "swept").iterdir()} >= {"cells", "table.json", "table.md", "table.png"}
    rows = json.loads((workdir / "swept" / "table.json").read_text())["rows"]
    assert [row["recipe"] for row in rows] == ["half", "stock"]
    assert rows[1]["of_each_seed"] == [rows[1]["score_percent"]["presence"]["mean"]]
    assert call(*words, "-o", "swept", "--json") == 0
    captured = capsys.readouterr()
    assert "done before" in captured.err
    assert json.loads(captured.out)["rows"] == rows


def test_overwrite_and_resume_exclude_each_other(stock_model, workdir, capsys):
    assert call("finetune", "-m", stock_model(), "-o", "run", "--overwrite", "--resume", *QUICK) == 2
    assert "they exclude each other" in capsys.readouterr().err
    assert not (workdir / "run").exists()
    assert call("finetune", "-m", stock_model(), "--resume", *QUICK) == 2  # it would begin another run
    assert "name it with --out" in capsys.readouterr().err
    assert not (workdir / "runs").exists()


def test_interrupted_run_says_how_to_go_on(stock_model, workdir):
    words = ["finetune", "-m", stock_model(), "-o", "run", "--batch-size", 1, "--max-steps", 5000, "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pmod_cli", *map(str, words), "--set", "train.log_steps=1"],
        cwd=workdir,
        env={**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(cli.__file__))},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stderr:
        if line.startswith("step 2/"):
            break
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert stdout == ""
    assert "interrupted after step" in stderr
    assert "pmod finetune --recipe run/config.yaml --out run" in stderr
    assert list((workdir / "run" / "checkpoints").glob("checkpoint-*"))
    assert not (workdir / ".pmod").exists()


def test_dry_run_counts_and_writes_nothing(stock_model, workdir, capsys):
    words = ("finetune", "-m", stock_model(), "--dry-run", *QUICK, "--gpu", "24GB")
    assert call(*words, "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["steps"], plan["rows"], plan["runs_as"]) == (2, 4, "stock")
    tower = plan["parameters"]["vision_tower"]
    assert (tower["trained"], tower["learning_rate"]) == (0, None)
    assert tower["parameters"] > 0
    assert plan["tokens"] > 4 * 16
    assert plan["device"]["memory_bytes"] == 24 * 2**30
    assert plan["pmod"]["mean_retention_ratio"] < plan["stock"]["mean_retention_ratio"] == 1
    assert 0 < plan["pmod"]["flops"] < plan["stock"]["flops"]
    assert plan["stock"]["fits"] is True
    assert call(*words) == 0
    assert "frozen" in capsys.readouterr().out
    assert list(workdir.iterdir()) == []


def test_the_papers_run_is_planned_without_a_file_of_it(workdir, capsys):
    words = ("finetune", "--recipe", "llava-next-7b", "--dry-run", "--gpu", "a100-80gb", "--num-processes", 8)
    assert call(*words, "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["rows_per_step"], plan["steps"], plan["runs_as"]) == (128, 6089, "p-mod")
    assert "is not here" in plan["data"]["source"]
    assert plan["pmod"]["fits"]
    # 6 FLOPs a parameter and token, less the tokens that layers skip, and what checkpointing repeats.
    tokens, weights = plan["tokens"], plan["parameters"]["language_model"]["parameters"]
    assert 6 * tokens * weights < plan["stock"]["flops"] < 10 * tokens * weights
    assert 0.5 < plan["pmod"]["hours"] / plan["stock"]["hours"] < 0.65
    assert call(*words, "--gpu", "rtx-4090") == 1
    shown = capsys.readouterr().out
    assert "fits 24 GiB" in shown
    assert "no" in shown
    assert list(workdir.iterdir()) == []


def test_a_recipe_may_be_named_without_its_flag(workdir, capsys):
    assert call("finetune", "--recipe", "lora", "--print-config") == 0
    named = capsys.readouterr().out
    assert call("finetune", "lora", "--print-config") == 0
    assert capsys.readouterr().out == named
    assert call("finetune", "lora", "--recipe", "tiny", "--print-config") == 2
    assert "two recipes" in capsys.readouterr().err


def test_print_config_is_a_recipe(workdir, capsys):
    assert call("finetune", "--print-config", "--seed", 5, "--set", "train.learning_rate=1e-3") == 0
    first = capsys.readouterr().out
    settings = yaml.safe_load(first)
    assert settings["train"]["seed"] == 5
    assert settings["train"]["learning_rate"] == 1e-3
    (workdir / "mine.yaml").write_text(first)
    assert call("finetune", "--print-config", "--recipe", "mine.yaml") == 0
    assert capsys.readouterr().out == first


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--set", "train.maxsteps=3"], ["--set train.maxsteps=3", "did you mean train.max_steps?"]),
        (["--max-steps", "0"], ["--max-steps", "expected 1 or more, got 0"]),
        (["--dtype", "float16"], ["--dtype", "expected one of auto, float32, bfloat16"]),
        (["--recipe", "tinny"], ["tinny", "tiny"]),
        (["--recipe", "none.yaml"], ["none.yaml"]),
        ([], ["no model", "pmod convert tiny-llava-next"]),
        (["--model", "./nowhere"], ["there is no folder ./nowhere"]),
        (["--gpu", "h100"], ["--gpu belongs to --dry-run of one recipe: here it would change nothing"]),
        (["--utilization", "0.9"], ["--utilization belongs to --dry-run"]),
        (["--seeds", "5"], ["--seeds belongs to --sweep"]),
        (["--eval-limit", "2"], ["--eval-limit belongs to --eval"]),
        (["--merge", "lo", "-o", "elsewhere"], ["--out belongs to a training run"]),
        (["tiny", "--merge", "lo"], ["[RECIPE] belongs to a training run"]),
        (["--sweep", "choice", "--dry-run", "--gpu", "h100"], ["--gpu belongs to --dry-run of one recipe"]),
        (["--sweep", "choice", "--dry-run", "--model", "./no #where"], ["there is no folder ./no #where"]),
        (["--sweep", "choice", "--seed", "1"], ["--seed: a sweep runs several seeds"]),
        (["tiny", "--sweep", "choice"], ["[RECIPE] belongs to a run of one recipe: here it would change nothing"]),
        *(
            (["--sweep", "choice/held-1", "--dry-run", *words], [f"{words[0]} belongs to a run of one recipe"])
            for words in (
                ["--recipe", "lora"],
                ["--eval", "tiny"],
                ["--eval-limit", "3"],
                ["--num-processes", "4"],
                ["--engine", "zero3"],
                ["--machine-rank", "1"],
                ["--check-data"],
                ["--print-config"],
                ["--overwrite"],
                ["--no-resume"],
            )
        ),
    ],
)
def test_bad_input_is_a_sentence(workdir, capsys, words, parts):
    assert call("finetune", *words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    for part in parts:
        assert part in captured.err
    assert "Traceback" not in captured.err
    assert "run folder" not in captured.err
    assert not (workdir / "runs").exists()


def test_a_missing_extra_is_a_sentence(stock_model, workdir, capsys, monkeypatch):
    find = errors.find_spec
    monkeypatch.setattr(errors, "find_spec", lambda name: None if name == "accelerate" else find(name))
    assert call("finetune", "-m", stock_model()) == 2
    assert "pip install -e '.[train]'" in capsys.readouterr().err


def test_a_recipes_engine_that_one_process_does_not_need_is_said(stock_model, workdir, capsys):
    assert call("finetune", "-m", stock_model(), *QUICK, "--set", "train.engine=zero3", "-o", "run") == 0
    assert "train.engine: zero3: one process shares nothing" in capsys.readouterr().err
    assert call("finetune", "-m", stock_model(), *QUICK, "--engine", "fsdp2", "-o", "other") == 0
    assert "--engine fsdp2: one process shares nothing" in capsys.readouterr().err
    assert call("finetune", "-m", stock_model(), *QUICK, "-o", "third") == 0
    assert "one process" not in capsys.readouterr().err


def test_a_path_is_all_that_quiet_prints(stock_model, workdir, capsys):
    assert call("finetune", "-m", stock_model(), *QUICK, "-o", "run", "-q") == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("run\n", "")


@pytest.mark.slow
def test_scores_of_the_finished_run_are_in_its_summary_and_card(stock_model, workdir, capfd, monkeypatch):
    """`--eval` on the first questions of one task, beside the stock model; nothing of it reaches stdout.

    Where scoring failed, the command that is printed does what was left.
    """
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the evaluation is a program of its own
    assert call("convert", stock_model(), "-o", "routed") == 0
    capfd.readouterr()
    words = ("finetune", "-m", "routed", *QUICK, "-o", "run")
    assert call(*words) == 0
    (workdir / "run" / "eval").touch()  # a file in the way of the folder
    assert call(*words, "--eval", "tiny_doc", "--eval-limit", 4) == errors.PARTIAL
    *_, what, hint = capfd.readouterr().err.splitlines()
    assert what == "error: run is trained, but scoring it failed"
    (workdir / "run" / "eval").unlink()
    code, done = call(*shlex.split(hint)[1:]), capfd.readouterr()
    assert (code, done.out) == (0, "run\n"), done.err
    assert "$ pmod eval --tasks tiny_doc --model run -o run/eval --device cpu --limit 4" in done.err
    summary = json.loads((workdir / "run" / "training_summary.json").read_text())
    scored = json.loads((workdir / "run" / "eval" / "results.json").read_text())["tasks"][0]["scores"]
    assert (summary["status"], summary["step"]) == ("finished", 2)
    assert summary["scores"]["tiny_doc"].keys() == scored.keys() == {"run", "stock"}
    for model, score in summary["scores"]["tiny_doc"].items():
        assert (score["score"], score["metric"], score["questions"]) == (scored[model]["score"], "anls", 4)
    card = (workdir / "run" / "README.md").read_text()
    assert card.count("## Scores") == 1
    assert "| tiny doc | run |" in card.partition("## Scores")[2]


def test_tasks_that_cannot_be_scored_are_refused_before_the_training(stock_model, workdir, capsys):
    assert call("finetune", "-m", stock_model(), *QUICK, "--eval", "tiny_dok") == 2
    assert "tiny_doc" in capsys.readouterr().err
    adapter = ("--set", "lora.enabled=true", "--set", "lora.merge=false")
    assert call("finetune", "-m", stock_model(), *QUICK, "--eval", "tiny_doc", *adapter) == 2
    assert "an adapter that is not merged cannot be scored" in capsys.readouterr().err
    assert not (workdir / "runs").exists()


def test_check_data_names_a_bad_row_and_trains_nothing(stock_model, workdir, capsys):
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "red"}]
    rows = [{"id": name, "image": f"{name}.png", "conversations": turns} for name in ("one", "gone", "two")]
    (workdir / "images").mkdir()
    for name in ("one", "two"):
        Image.new("RGB", (40, 30), "red").save(workdir / "images" / f"{name}.png")
    (workdir / "rows.json").write_text(json.dumps(rows))
    data = ("data.kind=llava", "data.path=rows.json", "data.images=images", "data.template=vicuna_v1")
    words = ("finetune", "-m", stock_model(), "--device", "cpu", "--check-data")
    words += tuple(word for setting in data for word in ("--set", setting))
    before = sorted(workdir.rglob("*"))

    assert call(*words) == 2
    captured = capsys.readouterr()
    assert "cannot be used" in captured.out
    assert "gone.png" in captured.err
    assert "leave bad ones out with --on-bad-row skip" in captured.err
    assert "--check-data" not in captured.err
    assert "Traceback" not in captured.err
    assert call(*words, "--json") == 2
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["num_bad"]) == (3, 1)
    bad = {"row": 1, "reason": "no such image: gone.png, in images", "id": "gone", "file": "rows.json"}
    assert found["bad"] == [bad]
    assert sorted(workdir.rglob("*")) == sorted([*before, workdir / "bad_rows.jsonl"])
    assert [json.loads(line) for line in (workdir / "bad_rows.jsonl").read_text().splitlines()] == [bad]
    assert "row 1 (id gone): no such image" in captured.err
    assert "bad_rows.jsonl" in captured.err

    assert call(*words, "--on-bad-row", "skip") == 0  # what it would advise is what it was told
    skipped = capsys.readouterr().err
    assert "gone.png" in skipped
    assert "the run leaves them out" in skipped
    assert "--on-bad-row" not in skipped

    (workdir / "rows.json").write_text(json.dumps([rows[0], rows[2]]))
    assert call(*words) == 0
    assert (workdir / "bad_rows.jsonl").read_text() == ""  # the list of the look before would be untrue


def test_out_of_memory_says_what_to_lower_and_the_run_goes_on(stock_model, workdir, capsys, monkeypatch):
    """Only the cause is made up: the allocation of the second step's forward pass fails."""
    assert call("convert", stock_model(), "-o", "routed") == 0
    capsys.readouterr()
    model = type(load_model(workdir / "routed")[0])
    forward, calls = model.forward, []

    def short_of_memory(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, *arguments, **options)

    words = ("finetune", "-m", "routed", *QUICK, "-o", "run", "--set", "train.save_steps=1")
    words += ("--set", "model.router_start=zero")
    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", short_of_memory)
        assert call(*words) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    for part in ("out of memory with train.batch_size 2", "--batch-size 1", "model.gradient_checkpointing=true"):
        assert part in captured.err
    assert "Traceback" not in captured.err
    assert [path.name for path in (workdir / "run" / "checkpoints").glob("checkpoint-*")] == ["checkpoint-1"]

    assert call(*words, "--set", "model.gradient_checkpointing=true") == 0
    captured = capsys.readouterr()
    assert captured.out == "run\n"
    assert "step 2/2" in captured.err
    assert "step 1/2" not in captured.err
