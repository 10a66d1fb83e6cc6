"""`pmod calibrate` as a user runs it, and what it leaves: whole results, measurements to go on from, or nothing."""

import json
import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pmod_cli import checkpoints
from pmod_cli.calibration.asked import Asked
from pmod_cli.calibration.bench import Bench, Schedule
from pmod_cli.calibration.budget import Budget
from pmod_cli.calibration.calibration import Calibration
from pmod_cli.calibration.measured import Measured
from pmod_cli.calibration.replay import Replay
from pmod_cli.calibration.results import depth_figure
from pmod_cli.calibration.samples import read_samples
from pmod_cli.calibration.search import Found
from pmod_cli.cli import main
from pmod_cli.core.errors import PmodError
from pmod_cli.profiling.budgets import prompt_of
from tests import factories
from tests.calibration.test_budget import SIZES
from tests.calibration.test_depth import batches_of
from tests.conftest import ROOT


def _prompt(processor):
    image = read_samples("doc", 1)[0].images[0]
    return processor(images=[image], text="<image> what is the price of egg?", return_tensors="pt")


@pytest.fixture(scope="module", autouse=True)
def short_answers():
    """A model of random weights would say as much as it may."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pmod_cli.calibration.asked.NEW_TOKENS", 3)
        yield


@pytest.fixture(scope="module")
def calibrated(stock_model, tmp_path_factory) -> Path:
    """Two budgets in one run, by the command."""
    folder = tmp_path_factory.mktemp("calibrated")
    before = Path.cwd()
    os.chdir(folder)
    try:
        call = ["calibrate", str(stock_model()), "--samples", "8", "--device", "cpu", "--budget", "0.6,1", "-o", "made"]
        assert main(call) == 0
    finally:
        os.chdir(before)
    return folder


def test_the_result_is_a_whole_p_mod_checkpoint(calibrated: Path, stock_model):
    folder = calibrated / "made-60"
    assert checkpoints.router_state(folder) == "calibrated"
    config = json.loads((folder / "config.json").read_text())
    said = json.loads((folder / "calibration.json").read_text())["budgets"][0]
    assert config["pmod"]["values"] == said["ratios"]
    assert config["pmod"]["select_at"] == said["select_at"]
    assert Budget(SIZES, 0.6).total(said["ratios"], len(said["select_at"])) <= 0.6 + 1e-6
    stock = stock_model() / "model.safetensors"
    assert os.path.samefile(folder / "model-00001-of-00001.safetensors", stock), "no weight is copied"
    pairs = [["0-1", "2-3"], ["1-2", "3"], ["2-3"], ["3"]][said["select_at"][0]]
    assert list(said["kl_of_neighbours_at_a_ratio"]) == pairs, "though no other ratios were better"
    assert said["judged"][0]["name"] == "calibrated"
    assert {"uniform", "random"} < {row["name"] for row in said["judged"]}
    card = (folder / "README.md").read_text()
    assert "## Calibration" in card
    assert "| calibrated |" in card
    model, processor = checkpoints.load_model(folder)
    assert model.generate(**_prompt(processor), max_new_tokens=2, do_sample=False).shape[1] > 2
    # Measured again in the checkpoint that was written: the same divergence as the report has.
    plain, _ = checkpoints.load_model(stock_model())
    judges = Asked(plain, processor).answered(read_samples("tiny", 8), own=True)[1::2]
    bench = Bench(Replay(plain), Asked(plain, processor).batches(judges), ())
    routers = {i: model.model.language_model.layers[i].router for i in said["select_at"]}
    bench.apply(Schedule(tuple(said["ratios"]), tuple(said["select_at"])), routers)
    assert bench.divergence() == pytest.approx(said["judged"][0]["divergence"], abs=1e-6)


def test_a_bar_is_as_wide_as_the_layers_that_were_changed_at_once():
    found = Found(Schedule((1.0, 0.5, 0.5, 0.2), (1,)), thinned={1: {0.0: 0.3, 1.0: 0.1}, 3: {0.0: 0.2, 1.0: 0.1}})
    _, needed = depth_figure(Calibration(0.5, found, (88, 58), [], [0.9, 0.4, 0.2, 0.1])).axes
    bars = [(bar.get_x(), bar.get_x() + bar.get_width(), bar.get_height()) for bar in needed.patches]
    assert bars == [pytest.approx((0.6, 2.4, 0.3)), pytest.approx((2.6, 3.4, 0.2))]


def test_a_budget_of_one_changes_nothing(calibrated: Path, stock_model):
    ours, processor = checkpoints.load_model(calibrated / "made-100")
    stock, _ = checkpoints.load_model(stock_model())
    assert not ours.config.routed_layers
    batch = Asked(stock, processor).batches(read_samples("doc", 1))[0]
    with torch.no_grad():
        inputs = {**batch.inputs, "labels": None}
        assert torch.equal(ours(**inputs).logits, stock(**inputs).logits)


def test_a_calibrated_model_goes_through_the_other_verbs(calibrated: Path, workdir: Path, capsys):
    folder = str(calibrated / "made-60")
    assert main(["profile", "-m", folder, "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert layers[0]["retention_ratio"] == 1.0
    again = ["calibrate", folder, "-o", "again", "--samples", "8", "--schedule", "cosine", "--device", "cpu"]
    assert main([*again, "--prompt", "data"]) == 0
    assert checkpoints.router_state(Path("again")) == "calibrated"


def test_a_budget_can_be_counted_on_the_prompts_of_the_data(calibrated: Path, stock_model, workdir: Path):
    """The mean of what stands in front of the first answers; the schedule costs the budget there, and not elsewhere."""
    call = ["calibrate", str(stock_model()), "--samples", "8", "--schedule", "cosine", "--device", "cpu", "-o", "made"]
    assert main([*call, "--prompt", "data"]) == 0
    said = json.loads(Path("made/calibration.json").read_text())["budgets"][0]
    plain, processor = checkpoints.load_model(stock_model())
    prompts = []
    for sample in read_samples("tiny", 8):
        (batch,) = Asked(plain, processor).batches([replace(sample, answers=("x",) * len(sample.questions))])
        first = int((batch.inputs["labels"][0] >= 0).nonzero()[0])
        prompts.append(batch.inputs["input_ids"][0, :first])
    vision = [int((ids == plain.config.image_token_id).sum()) for ids in prompts]
    text = [len(ids) - tokens for ids, tokens in zip(prompts, vision, strict=True)]
    found = said["vision_tokens"], said["text_tokens"]
    assert found == (round(sum(vision) / 8), round(sum(text) / 8))
    own = Budget(SIZES, 0.54, prompt=prompt_of(*found)[0])
    assert own.total(said["ratios"]) == pytest.approx(0.54, abs=0.01)
    assert Budget(SIZES, 0.54).total(said["ratios"]) != pytest.approx(0.54, abs=0.01)
    call[-1] = "last"
    assert main([*call, "--prompt", "data", "--logits", "last", "--json"]) == 0
    last = json.loads(Path("last/calibration.json").read_text())
    assert last["asked_for"]["logits"] == "last"
    assert replace(own, logits="last").total(last["budgets"][0]["ratios"]) == pytest.approx(0.54, abs=0.01)
    assert last["budgets"][0]["judged"][0]["retention"] > said["judged"][0]["retention"]
    assert "lm_head on the last position" in Path("last/README.md").read_text()
    assert f"mean prompt of the data: {found[0]} vision, {found[1]} text tokens" in Path("made/README.md").read_text()


def test_a_share_of_nothing_is_not_the_default(stock_model, workdir: Path, capsys):
    assert main(["convert", str(stock_model()), "--calibrate", "nowhere.json", "--target-flops", "0"]) == 2
    assert "--target-flops 0" in capsys.readouterr().err


def test_a_budget_that_cannot_be_met_is_named_as_it_was_typed(stock_model, workdir: Path, capsys):
    for verb, *more, flag in (["calibrate", "--budget"], ["convert", "--calibrate=doc", "--target-flops"]):
        assert main([verb, str(stock_model()), *more, flag, "0.001"]) == 2
        said = capsys.readouterr().err
        assert f"{flag} 0.001 cannot be met" in said
        assert f"{flag} 0." in said.partition("to 1")[2]


@pytest.mark.slow
def test_convert_calibrates_too(stock_model, workdir: Path, monkeypatch, capsys):
    few = lambda data, count, **options: read_samples(data, 8, **options)  # noqa: E731 - the default of 64 takes minutes
    monkeypatch.setattr("pmod_cli.calibration.calibration.read_samples", few)
    call = ["convert", str(stock_model()), "-o", "made", "--calibrate", "doc"]
    assert main([*call, "--target-flops", "0.6", "--schedule", "cosine"]) == 0
    assert checkpoints.router_state(Path("made")) == "calibrated"
    for more in (["--norm", "sigmoid"], ["--schedule", "linear"], ["--dry-run"], ["--dtype", "float32"]):
        assert main([*call, "-o", "other", *more]) == 2
        assert "--calibrate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--samples", "7"], "--samples 7 are too few"),
        (["--question", "What is red in <image>?"], "holds <image>: the picture stands in front of"),
        (["--budget", "0.01"], "cannot be met"),
        (["--budget", "1.5"], "--budget 1.5"),
        (["--budget", "half"], "--budget 'half'"),
        (["--budget", "0.541,0.544"], "one folder"),
        (["--budget", ""], "--budget ''"),
        (["--budget", "0.6,0.5", "-o", "."], "--out . has no name"),
        (["--budget", "0.6,0.5", "-o", ".."], "--out .. has no name"),
        (["--target-retention", "0.01"], "cannot be met"),
        (["--budget", "0.5", "--target-retention", "0.5"], "give one of them"),
        (["--data", "broken", "--samples", "8"], "broken"),
        (["--data", "nowhere.json"], "nowhere.json"),
        (["--data", "chart"], "chart: no picture in this folder"),  # and not the synthetic charts
        (["--schedule", "linear"], "Known: search, cosine"),
        (["--prompt", "mine"], "Known: profile, data"),
        (["--logits", "first"], "Known: every, last"),
        (["-o", "there"], "there"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_leaves_nothing(stock_model, workdir: Path, capsys, arguments, said):
    Path("broken").mkdir()
    Path("chart").mkdir()
    for number in range(8):
        Path(f"broken/{number}.png").write_bytes(b"no picture")
    Path("there").mkdir()
    Path("there/mine").touch()
    before = sorted(workdir.rglob("*"))
    assert main(["calibrate", str(stock_model()), "--device", "cpu", *arguments]) == 2
    out = capsys.readouterr()
    assert out.out == ""
    assert said in out.err
    assert "Traceback" not in out.err
    assert sorted(workdir.rglob("*")) == before


def test_of_several_budgets_one_that_cannot_be_met_is_told_before_any_is_computed(workdir: Path, capsys):
    call = ["calibrate", "tiny-llava-next", "--schedule", "cosine", "--budget", "0.54,0.25", "--device", "cpu"]
    assert main(call) == 2
    error = capsys.readouterr().err
    assert "no shift of the cosine costs as little as 0.25" in error
    assert "the stock model answers" not in error


def test_a_trained_model_needs_a_word_more(calibrated: Path, workdir: Path, capsys):
    import shutil

    shutil.copytree(calibrated / "made-60", "trained")
    config = json.loads(Path("trained/config.json").read_text())
    Path("trained/config.json").write_text(json.dumps(config | {"router_state": "trained"}))
    assert main(["calibrate", "trained", "--device", "cpu", "--samples", "8"]) == 2
    assert "--recalibrate" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_was_stopped_measures_what_is_missing(stock_model, workdir: Path, monkeypatch, capsys):
    """It ends as one that was not stopped, to the bit, and leaves no file of measurements."""
    call = ["calibrate", str(stock_model()), "--samples", "8", "--device", "cpu", "-o"]
    assert main([*call, "whole"]) == 0
    capsys.readouterr()
    with monkeypatch.context() as stopped:
        stopped.setattr("pmod_cli.calibration.calibration._mean", lambda rows: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main([*call, "made"]) == 130
    assert not Path("made").exists()
    assert len(list(Path(".pmod").glob("calibrate-*"))) == 1
    judged = []
    monkeypatch.setattr(Bench, "_judge", lambda self, *a, plain=Bench._judge: judged.append(1) or plain(self, *a))
    capsys.readouterr()
    assert main([*call, "made"]) == 0
    found = int(capsys.readouterr().err.split(" measurements of a run that was stopped")[0].split()[-1])
    assert found > 4 * len(judged)
    assert not list(Path(".pmod").glob("calibrate-*"))
    whole, made = (json.loads(Path(name, "calibration.json").read_text()) for name in ("whole", "made"))
    assert whole == made
    routers = "model-routers.safetensors"
    assert Path("whole", routers).read_bytes() == Path("made", routers).read_bytes()


def test_an_old_measurement_counts_for_the_same_model_data_and_settings_alone(tmp_path: Path):
    stock = factories.model("llava", layers=3)
    batches = batches_of(stock, "llava", count=2)

    def judged(schedule: Schedule, batches=batches, model=stock) -> int:
        measured = Measured(tmp_path / "measured.sqlite")
        bench = Bench(Replay(model), batches, (), measured=measured)
        bench.apply(schedule, bench.zero_routers(schedule))
        bench.judged()
        return measured.found

    half = Schedule((1.0, 0.5, 0.5))
    assert judged(half) == 0
    assert judged(half) == 1
    assert judged(Schedule((1.0, 0.5, 0.25))) == 0
    assert judged(half, batches_of(stock, "llava", count=3)) == 0
    with torch.no_grad():
        stock.lm_head.weight[0] += 1
    assert judged(half) == 0


def test_answers_that_are_no_numbers_are_refused():
    """They would have a divergence of 0, less than any schedule's."""
    model = factories.model("llava", layers=3)
    with torch.no_grad():
        model.lm_head.weight[0] = float("inf")
    bench = Bench(Replay(model), batches_of(model, "llava", count=2), ())
    with pytest.raises(PmodError, match="no numbers in float32"):
        bench.judged()


def test_a_damaged_file_of_measurements_is_begun_anew_and_one_that_cannot_be_is_told(tmp_path: Path, capsys):
    path = tmp_path / "measured.sqlite"
    path.write_bytes(b"no database " * 100)
    measured = Measured(path)
    assert [measured("a", lambda: [1, 2]), measured("a", lambda: [3])] == [[1, 2], [1, 2]]
    assert measured.found == 0, "what a run asks twice is of no run that was stopped"
    again = Measured(path)
    assert (again("a", lambda: [3]), again.found) == ([1, 2], 1)
    measured.forget()
    assert not path.exists()
    (tmp_path / "file").touch()
    without = Measured(tmp_path / "file" / "measured.sqlite")
    assert [without("a", lambda: 1), without("a", lambda: 2)] == [1, 2]
    assert "starts over" in capsys.readouterr().err


@pytest.mark.slow
def test_a_full_disk_leaves_nothing(stock_model, workdir: Path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pmod_cli.profiling.plots.save", full)
    call = ["calibrate", str(stock_model()), "-o", "made", "--samples", "8", "--schedule", "cosine", "--device", "cpu"]
    assert main(call) == 1
    assert not Path("made").exists()
    assert "Traceback" not in capsys.readouterr().err
    assert not [path for path in workdir.iterdir() if "made" in path.name and path.is_dir()]


@pytest.mark.parametrize(
    "kills",
    [pytest.param([1], marks=pytest.mark.slow, id="while it writes"), pytest.param(range(30), marks=pytest.mark.soak)],
)
def test_killed_at_any_moment_it_leaves_nothing_or_all(stock_model, workdir: Path, kills):
    """Every second kill waits for the moment of writing, which is short. The next run needs no help."""
    call = [sys.executable, "-m", "pmod_cli", "calibrate", str(stock_model()), "-o", "made", "--samples", "8"]
    call += ["--schedule", "cosine", "--device", "cpu", "--overwrite"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    seconds = 10.0
    for kill in kills:
        process = subprocess.Popen(call, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        started = time.monotonic()
        moment = random.Random(kill).uniform(0, 1.1 * seconds)
        while process.poll() is None:
            writes = any(path.is_dir() and "staging" in path.name for path in workdir.iterdir())
            if (kill % 2 and writes) or (not kill % 2 and time.monotonic() - started > moment):
                time.sleep(random.Random(kill).uniform(0, 0.2) if writes else 0)
                process.kill()
            time.sleep(0.002)
        seconds = time.monotonic() - started if process.returncode == 0 else seconds
        assert process.returncode in (0, -9)
        if Path("made").exists():
            checkpoints.load_model(Path("made"))
            assert json.loads(Path("made/calibration.json").read_text())["budgets"]
    assert subprocess.run(call, env=environment, capture_output=True).returncode == 0
    assert sorted(path.name for path in workdir.iterdir() if path.is_dir() and path.name != ".pmod") == ["made"]
