"""`pmod profile` as a user runs it."""

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from pmod_cli.cli import main
from pmod_cli.model import PmodSettings
from tests import factories
from tests.conftest import ROOT
from tests.usage import usage


def run(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str, str]:
    code = main(["profile", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def tiny(workdir: Path) -> Path:
    """A config.json alone: no weights, six layers."""
    path = workdir / "config.json"
    factories.config("llava_next", layers=6).to_json_file(path)
    return path


def test_the_default_prints_the_papers_figures(workdir: Path) -> None:
    """On an empty directory, offline."""
    shown, notes, *_, peak = usage(workdir, sys.executable, "-m", "pmod_cli", "profile", "--report", "flops")
    assert "model: llava-next-7b, from its built-in configuration" in notes
    paper = next(line for line in shown.splitlines() if line.startswith("paper convention  "))
    assert paper.split() == ["paper", "convention", "39.46", "21.92", "55.5", "%", "39.46", "->", "21.94"]
    assert any(line.startswith("full convention") for line in shown.splitlines())
    kv = next(line for line in shown.splitlines() if line.startswith("paper convention: vision, K not rounded"))
    assert kv.split()[-4:] == ["53.8", "%", "53.8", "%"]
    assert "…" not in shown  # nothing is cut off in a pipe
    # No weights: the rest is torch itself, of which builds with CUDA take three times as much as others.
    assert peak < 6e8 + usage(workdir, sys.executable, "-c", "import torch").peak


TIMED = """
import sys, time
import torch, transformers, fvcore.nn, rich.table
import pmod_cli.model.modeling, pmod_cli.commands.profile, pmod_cli.checkpoints.resolve
import pmod_cli.profiling.comparison, pmod_cli.profiling.count_report
import transformers.models.llava.modeling_llava, transformers.models.clip.modeling_clip
from pmod_cli.cli import main
torch.set_num_threads(1)
begin = time.process_time()
code = main(["profile", "--report", "flops", *sys.argv[1:]])
print(time.process_time() - begin, file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.timing
@pytest.mark.parametrize(("model", "limit"), [("llava-next-7b", 2), ("llava-next-34b", 4)])
def test_counting_takes_seconds_beyond_its_imports(workdir: Path, model: str, limit: float) -> None:
    def seconds() -> float:
        done = subprocess.run(
            [sys.executable, "-c", TIMED, "--model", model],
            cwd=workdir,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return float(done.stderr.splitlines()[-1])

    assert min(seconds() for _ in range(2)) < limit


def test_json_is_one_object_with_units_in_its_keys(tiny: Path, capsys: pytest.CaptureFixture) -> None:
    code, out, _ = run(capsys, "-m", str(tiny), "--json", "--new-tokens", "4", "--image-size", "50x37")
    report = json.loads(out)
    assert code == 0
    assert report["schema_version"] == 2
    assert report["workload"]["rows"][0]["vision_tokens"] == 16 + 6 * (8 + 1)  # base; 6 of 8 rows, each with a newline
    assert len(report["layers"]) == 6
    assert report["kv_cache"]["pmod_total_mib"] < report["kv_cache"]["stock_total_mib"]
    full = report["flops"]["conventions"]["full"]
    assert full["pmod_tflops"] < full["stock_tflops"]
    assert report["flops"]["decoder_by_closed_formula"]["pmod_tflops"] > 0
    assert "published_stock_tflops" not in report["flops"]["conventions"]["paper"]  # not the paper's case


def test_a_pmod_checkpoint_keeps_its_own_schedule_and_options_replace_it(
    stock_model: Callable, workdir: Path, capsys: pytest.CaptureFixture
) -> None:
    assert (
        main(["convert", str(stock_model()), "-o", "mine", "--schedule", "constant", "--target-retention", "0.4"]) == 0
    )
    capsys.readouterr()
    code, out, err = run(capsys, "--json")  # the checkpoint that convert wrote last here
    assert code == 0
    assert "model: mine" in err
    assert json.loads(out)["model"]["mean_retention_ratio"] == pytest.approx(0.4)
    code, out, _ = run(capsys, "--json", "--target-retention", "0.6")
    assert json.loads(out)["model"]["mean_retention_ratio"] == pytest.approx(0.6)
    code, out, _ = run(capsys, "--json", "--schedule", "cosine")
    assert json.loads(out)["layers"][0]["retention_ratio"] == 1.0


@pytest.mark.parametrize("report", ["flops", "kv", "all"])
def test_reports(tiny: Path, capsys: pytest.CaptureFixture, report: str) -> None:
    code, out, _ = run(capsys, "-m", str(tiny), "--report", report)
    assert code == 0
    assert ("Prefill" in out) == (report != "kv")
    assert ("KV cache of each layer" in out) == (report != "flops")
    assert "KV cache, KiB in bfloat16" in out


def test_a_sweep_counts_the_cache_that_a_profile_does(
    stock_model: Callable, workdir: Path, capsys: pytest.CaptureFixture
) -> None:
    stock = ["-m", str(stock_model()), "--json"]
    alone = json.loads(run(capsys, *stock, "--new-tokens", "4")[1])["kv_cache"]
    swept = json.loads(run(capsys, *stock, "--new-tokens", "4", "--sweep", "shift=0.5")[1])["sweep"]
    assert swept["points"][0]["stock_kv_cache_mib"] == alone["stock_total_mib"]
    assert swept["points"][0]["pmod_kv_cache_mib"] == alone["pmod_total_mib"]
    assert swept["dtype"] == alone["dtype"] == "float32"


def write_run(folder: Path, settings: dict, scores: dict[str, float]) -> None:
    """A finished run of one p-MoD model, as `pmod eval` writes it, as far as it is read here."""
    model = {"pmod": PmodSettings(**settings).to_dict(), "selection": "router", "layers": 32}
    tasks = [{"name": name, "scores": {"p-mod": {"score": score}}} for name, score in scores.items()]
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps({"models": {"p-mod": model}, "tasks": tasks}))


def test_scores_of_runs_stand_beside_the_costs(workdir: Path, capsys: pytest.CaptureFixture) -> None:
    write_run(Path("a"), {}, {"tiny_doc": 80.0, "tiny_chart": 60.0})
    write_run(Path("b"), {"shift": 0.3}, {"tiny_doc": 50.0})
    arguments = ["-m", "llava-1.5-7b", "--sweep", "shift=0.3:0.5:0.1", "--runs", "a,b"]
    code, out, _ = run(capsys, *arguments, "--json", "--plot", "sweep.svg")
    assert code == 0
    points = json.loads(out)["sweep"]["points"]
    assert [point["mean_score"] for point in points] == [50.0, None, 80.0]  # of the task that both were asked
    assert "mean score of tiny_doc" in Path("sweep.svg").read_text()
    assert "score: mean of tiny_doc" in run(capsys, *arguments)[1]


def test_the_mean_of_a_run_is_that_of_pmod_eval(workdir: Path, capsys: pytest.CaptureFixture) -> None:
    write_run(Path("a"), {}, {"mme": 1500.0, "pope": 85.0})
    code, out, _ = run(capsys, "-m", "llava-1.5-7b", "--sweep", "shift=0.5", "--runs", "a", "--json")
    assert code == 0
    assert json.loads(out)["sweep"]["points"][0]["mean_score"] == 80.0  # MME's points are divided by 20


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["-m", "llava-next-7bb"], "is no folder and no alias. Near: llava-next-7b"),
        (["-m", "./nowhere"], "there is no folder ./nowhere"),
        (["--image-size", "0x672"], "--image-size 0x672 is empty"),
        (["--image-size", "672"], "'672' is not WIDTHxHEIGHT"),
        (["--text-tokens", "-1"], "--text-tokens -1 is negative"),
        (["--new-tokens", "-3"], "--new-tokens -3 is negative"),
        (["-m", "llava-1.5-7b", "--text-tokens", "4000"], "the prompt does not fit: 576 vision + 4000 text"),
        (["--report", "speed"], "'speed' is not a report. Known: flops, kv, memory, latency, depth, all"),
        (["--schedule", "sine"], "unknown schedule 'sine'"),
        (["--format", "xml"], "'xml' is not a format. Known: table, markdown, csv, json"),
        (["--sweep", "depth=1:2:1"], "'depth' cannot be swept. Known: shift"),
        (["--sweep", "shift=0.3:0.7"], "expected first:last:step"),
        (["--sweep", "shift=0.3:0.7:0"], "the range has no end"),
        (["--sweep", "shift=0.3:nan:0.1"], "the range has no end"),
        (["--sweep", "schedule="], "has no values"),
        (["--sweep", "image-size=0x5"], "--image-size 0x5 is empty"),
        (["--html", "."], "--html . is a folder"),
        (["--shift", "nan"], "shift is nan: expected a finite number"),
        (["--batch-size", "100000000"], "is more than 100,000 rows"),
        (["-m", "heads.json"], "text_config.num_attention_heads is 0: expected a whole number of 1 or more"),
        (["--runs", "somewhere"], "--runs belongs to --sweep"),
        (["--sweep", "shift=0.5", "--runs", "somewhere"], "there is no somewhere/results.json"),
        (["--sweep", "shift=0.4", "--runs", "run"], "(mean retention 0.537) is at no value of --sweep shift"),
        (["--sweep", "image-size=64x64", "--runs", "run"], "a run has no single image size"),
        (["--report", "memory", "--gpu-memory", "h900"], "no GPU is known as 'h900'"),
        (["--report", "memory", "--gpu-memory", "0GB"], "0GB is no memory"),
        (["-m", "deep.json"], "deep.json is not JSON"),
        (["-m", "nested.json"], "nested.json"),
        (["-m", "rope.json"], "rope.json: the rotary embedding is '[1]', expected one of default,"),
        (["-m", "rope2.json"], "rope2.json: the rotary embedding yarn lacks factor"),
        (["--layers", "100000000"], "layers 100000000 is more than 1,000"),
        (["--hidden-size", "64000000000"], "hidden size 64000000000 is more than 1,048,576"),
        (["--images", "100000", "--batch-size", "100000"], "10,000,000,000 images in a batch are more than 100,000"),
        (["--image-size", f"1x{10**8}"], "has more than 1,000,000 on a side"),
        (["--image-size", "²x²"], "'²x²' is not WIDTHxHEIGHT"),
        (["--new-tokens", "1" * 30], "new tokens are more than 1,000,000,000"),
        (["--report", "memory", "--gpu-memory", "9" * 400 + "GB"], "is no memory"),
        (["--report", "latency", "--device", "cuda:²"], "is not a device"),
        (["--json", "--format", "csv"], "--json and --format csv are two forms"),
        (["--threads", "2"], "--threads belongs to --report latency"),
        (["--macs", "--json"], "--macs belongs to tables"),
        (["--macs", "--format", "csv"], "--macs belongs to tables"),
        (["--report", "depth", "--data", "x.json", "--tasks", "doc"], "--tasks belongs to pictures that are drawn"),
        (["--gpu-memory", "24GB"], "--gpu-memory belongs to --report memory"),
        (["--report", "memory", "--plot", "a.png"], "--plot belongs to --sweep, or a report of layers"),
        (["--limit", "2"], "--limit belongs to --from-data"),
        (["--from-data", "rows.json", "--video", "4x48x48"], "--video belongs to a report of one batch"),
        (["--report", "depth", "--video", "4x48x48"], "--video belongs to a report of one batch"),
        (["--sweep", "shift=0.4", "--shift", "0.3"], "--shift belongs to a call that does not sweep shift"),
        (["--sweep", "image-size=9x9", "--image-size", "8x8"], "belongs to a call that does not sweep image-size"),
        (["-m", "qwen2.5-vl-7b", "--video", "4x64x64", "--images", "2"], "--images belongs to rows with pictures"),
        (["--plot", "no where/cost.png"], "mkdir -p 'no where'"),
        (["--from-data", "rows.json", "--new-tokens", "2"], "--new-tokens belongs to a report of one batch"),
        (["--plot", "cost.gif"], "the name ends in none of .png, .svg, .pdf"),
        (["--plot", "nowhere/cost.png"], "there is no folder nowhere"),
        (["--html", "nowhere/cost.html"], "there is no folder nowhere"),
        (["--from-data", "rows.json", "--text-tokens", "3"], "row 0: no such image: gone.png"),
        (["--from-data", "rows.json"], "has no tokenizer here to count text with"),
        (["--from-data", "missing.json", "--text-tokens", "3"], "missing.json"),
        (["--from-data", "rows.json", "--report", "latency"], "does not go with --report latency"),
        (["--report", "latency", "--hidden-size", "64"], "add --random-weights"),
        (["--schedule", "constant", "--shift", "0.4"], "a shift belongs to the schedules cosine and linear"),
        (["-m", "llava-1.5-7b", "--target-tokens", "vision_hr"], "vision_hr"),
        (["-m", "text.json"], "text.json is not JSON"),
        (["-m", "list.json"], "list.json holds a list, expected an object"),
        (["-m", "bert.json"], "is not a LLaVA: model_type is 'bert'"),
        (["-m", "half.json"], "half.json: text_config and vision_config are JSON objects"),
        (["-m", "gemma.json"], "gemma.json: the decoder gemma is unknown: expected one of llama, mistral, qwen2"),
    ],
)
def test_bad_input_is_a_sentence(
    workdir: Path, capsys: pytest.CaptureFixture, arguments: list[str], sentence: str
) -> None:
    write_run(Path("run"), {}, {"tiny_doc": 50.0})
    Path("text.json").write_text("not json")
    said = [{"from": "human", "value": "<image> a"}, {"from": "gpt", "value": "b"}]
    Path("rows.json").write_text(json.dumps([{"image": "gone.png", "conversations": said}]))
    Path("list.json").write_text("[]")
    Path("deep.json").write_text("[" * 100_000)
    Path("nested.json").write_text('{"model_type": "llava", "text_config": {"a": ' + "[" * 900 + "]" * 900 + "}}")
    for name, rope in (("rope", {"rope_type": [1]}), ("rope2", {"rope_type": "yarn", "rope_theta": 1e4})):
        config = {"model_type": "llava", "text_config": {"model_type": "llama", "rope_parameters": rope}}
        Path(f"{name}.json").write_text(json.dumps(config))
    Path("heads.json").write_text('{"model_type": "llava", "text_config": {"num_attention_heads": 0}}')
    Path("bert.json").write_text('{"model_type": "bert"}')
    Path("half.json").write_text('{"model_type": "llava", "text_config": 3}')
    Path("gemma.json").write_text('{"model_type": "llava", "text_config": {"model_type": "gemma"}}')
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert sentence in err
    assert "Traceback" not in err


@pytest.mark.parametrize("option", ["--plot=cost.png", "--html=cost.html"])
def test_a_folder_that_takes_no_files_is_told_before_anything_is_measured(
    workdir: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    code, _, err = run(capsys, "-m", "no-such-model", option)
    assert code == 2
    assert "nothing can be written into ." in err


def test_formats_say_the_same(tiny: Path, capsys: pytest.CaptureFixture) -> None:
    said = json.loads(run(capsys, "-m", str(tiny), "--json")[1])
    _, out, _ = run(capsys, "-m", str(tiny), "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [float(row["total_gflops"]) for row in rows] == [layer["total_gflops"] for layer in said["layers"]]
    _, out, _ = run(capsys, "-m", str(tiny), "--format", "markdown")
    assert "| paper convention |" in out
    assert out.count("\n| --- |") == 5  # tables


def test_the_page_and_the_plot(tiny: Path, capsys: pytest.CaptureFixture) -> None:
    code, _, err = run(capsys, "-m", str(tiny), "--report", "all", "--html", "cost.html", "--plot", "cost.svg")
    assert code == 0
    assert "page: cost.html" in err
    page = Path("cost.html").read_text()
    assert page.count("<svg") == 1
    assert "full convention" in page
    assert "src=" not in page
    assert "<script" not in page  # one file, nothing fetched
    assert Path("cost.svg").read_text().startswith("<?xml")
    assert sorted(path.name for path in Path().iterdir() if path.name.startswith("cost")) == ["cost.html", "cost.svg"]


def test_memory_of_named_and_sized_gpus(tiny: Path, capsys: pytest.CaptureFixture) -> None:
    code, out, _ = run(capsys, "-m", "llava-next-7b", "--report", "memory", "--gpu-memory", "24GB", "--json")
    assert code == 0
    memory = json.loads(out)["memory"]
    (fits,) = memory["fits"]
    assert fits["pmod"]["batch_rows"] > fits["stock"]["batch_rows"] > 0
    assert memory["inference"]["pmod"]["cache_bytes"] < memory["inference"]["stock"]["cache_bytes"]
    assert memory["training"]["all weights"]["pmod"]["peak_bytes"] > 16 * 6.7e9  # weights, gradients, two moments
    named = json.loads(run(capsys, "-m", str(tiny), "--report", "memory", "--gpu-memory", "h100", "--json")[1])
    assert named["memory"]["fits"][0]["gpu"] == "H100 SXM"
    none = json.loads(run(capsys, "-m", "llava-next-34b", "--report", "memory", "--gpu-memory", "24GB", "--json")[1])
    assert none["memory"]["fits"][0]["pmod"] == {"batch_rows": 0, "context_tokens": 0, "limited_by": "memory"}


def test_a_sweep_is_what_each_value_would_be(tiny: Path, capsys: pytest.CaptureFixture) -> None:
    code, out, _ = run(capsys, "-m", str(tiny), "--sweep", "shift=0.3:0.7:0.1", "--json", "--plot", "sweep.png")
    points = json.loads(out)["sweep"]["points"]
    assert code == 0
    assert [point["shift"] for point in points] == [0.3, 0.4, 0.5, 0.6, 0.7]
    one = json.loads(run(capsys, "-m", str(tiny), "--shift", "0.4", "--json")[1])
    assert points[1]["pmod_tflops"] == pytest.approx(one["flops"]["conventions"]["full"]["pmod_tflops"], rel=1e-3)
    assert points[1]["pmod_kv_cache_mib"] == pytest.approx(one["kv_cache"]["pmod_total_mib"])
    assert Path("sweep.png").read_bytes().startswith(b"\x89PNG")
    for axis in ("schedule=cosine,linear", "min-ratio=0.1,0.2", "max-ratio=0.8:0.9:0.05", "image-size=32x32,64x64"):
        code, out, _ = run(capsys, "-m", str(tiny), "--sweep", axis, "--format", "csv")
        assert code == 0
        assert len(out.splitlines()) >= 3, axis


def test_the_average_over_a_data_set(stock_model: Callable, workdir: Path, capsys: pytest.CaptureFixture) -> None:
    """Sizes from image headers alone: the pixels of these files are cut off."""
    said = [{"from": "human", "value": "<image>\nwhat"}, {"from": "gpt", "value": "that"}]
    text = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    for name, size in (("a.png", (64, 64)), ("b.png", (32, 64))):
        Image.effect_noise(size, 50).save(name)
        Path(name).write_bytes(Path(name).read_bytes()[:200])
    rows = [{"image": "a.png", "conversations": said}] * 2 + [{"image": "b.png", "conversations": said}]
    rows.append({"conversations": text})
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model = str(stock_model())
    code, out, _ = run(capsys, "-m", model, "--from-data", "rows.jsonl", "--text-tokens", "9", "--json")
    assert code == 0
    data = json.loads(out)["data"]
    assert (data["rows"], data["with_image"], data["text_tokens"]["mean"]) == (4, 3, 9)
    alone = [
        json.loads(run(capsys, "-m", model, "--image-size", size, "--text-tokens", "9", "--json")[1])
        for size in ("64x64", "32x64")
    ]
    tokens = [report["workload"]["rows"][0]["vision_tokens"] for report in alone]
    assert data["vision_tokens"]["mean"] == (2 * tokens[0] + tokens[1]) / 4
    code, out, _ = run(capsys, "-m", model, "--from-data", "rows.jsonl", "--limit", "2", "--json")
    same = json.loads(out)["data"]
    assert same["text_tokens"]["mean"] > 1  # by the model's tokenizer
    one = json.loads(
        run(capsys, "-m", model, "--image-size", "64x64", "--text-tokens", str(same["text_tokens"]["most"]), "--json")[
            1
        ]
    )
    full = one["flops"]["conventions"]["full"]
    assert same["mean_pmod_flops"] / 1e12 == pytest.approx(full["pmod_tflops"], rel=1e-3)
    assert same["mean_stock_flops"] / 1e12 == pytest.approx(full["stock_tflops"], rel=1e-3)


def test_a_measured_report(tiny: Path, capsys: pytest.CaptureFixture) -> None:
    """Every phase of every model really runs, on a batch of unequal rows; cache bytes are those counted."""
    arguments = ["-m", str(tiny), "--report", "latency", "--random-weights", "--device", "cpu", "--repeats", "1"]
    arguments += ["--image-size", "64x64,50x37", "--text-tokens", "9", "--new-tokens", "2", "--json"]
    phases = "prefill,first-token,decode,train,train-checkpointed"
    code, out, _ = run(capsys, *arguments, "--phases", phases)
    assert code == 0
    latency = json.loads(out)["latency"]
    assert {row["phase"] for row in latency["phases"]} == set(phases.split(","))
    assert {row["model"] for row in latency["phases"]} == {"stock", "p-mod", "random", "uniform"}
    assert all(row["median_ms"] > 0 for row in latency["phases"])
    for held in latency["cache"].values():
        assert held["held_bytes"] == held["counted_bytes"]
    assert sum(latency["first_token_share_by_part"]["p-mod"].values()) == pytest.approx(1)


def test_what_is_wrong_whatever_the_model_is_is_said_before_anything_heavy_is_imported(workdir: Path) -> None:
    for words in (["--plot", "x.jpg"], ["--html", "nowhere/x.html"], ["--json", "--format", "csv"], ["--threads", "2"]):
        code = f"import sys; from pmod_cli.cli import main; assert main(['profile', *{words}]) == 2; "
        heavy = "print(sorted({'torch', 'transformers', 'matplotlib', 'fvcore'} & set(sys.modules)))"
        done = subprocess.run(
            [sys.executable, "-c", code + heavy], capture_output=True, text=True, cwd=ROOT, check=True
        )
        assert done.stdout == "[]\n", words


def test_an_alias_in_any_case(capsys):
    assert run(capsys, "-m", "LLaVA-NeXT-7B", "--json")[1] == run(capsys, "-m", "llava-next-7b", "--json")[1]
