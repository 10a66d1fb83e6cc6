"""What a user meets who has a network: a hub on this machine, the real client, the commands as they are typed."""

import json
import shutil

import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from safetensors.torch import load_file

from pmod_cli import recipe_files
from pmod_cli.checkpoints import ALIASES, router_state
from pmod_cli.checkpoints.resolve import PATTERNS
from pmod_cli.data.documents import seed_of
from pmod_cli.data.rows import row
from pmod_cli.data.several import document_of
from pmod_cli.training.recipe import load_settings
from tests import hub as hubs
from tests.checkpoints.test_from_parts import parts  # noqa: F401
from tests.evaluation import mirrors
from tests.reproduce import make_data

REPO = ALIASES["llava-next-7b"].repo
WEIGHTS = "model.safetensors"
CHARTS = "data/test-00000-of-00001.parquet"


@pytest.fixture
def hub():
    with hubs.running() as running:
        yield running


@pytest.fixture
def call(hub, pmod, tmp_path):
    """`call(*arguments)`: a command in an empty folder with a cache of its own, connected to the hub, or cut off."""

    def run(*arguments, offline=False, **environment):
        hub.asked.clear()
        where = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "01"[offline]}
        where["HF_DATASETS_OFFLINE"] = where["HF_HUB_OFFLINE"]
        done = pmod(*arguments, cwd=tmp_path, env={**where, **environment})
        assert "Traceback" not in done.stderr, done.stderr
        return done

    return run


def test_a_model_is_fetched_once(hub, call, stock_model, tmp_path):
    """`pmod convert llava-next-7b`, word for word; then from the cache, without a word to the hub, and offline."""
    hub.add("models", REPO, stock_model())
    first = call("convert", "llava-next-7b")
    assert first.returncode == 0, first.stderr
    assert "(hub)" in first.stderr
    served = sorted(path.name for path in stock_model().iterdir() if any(path.match(each) for each in PATTERNS))
    assert sorted(hub.files_sent()) == served  # each once, and nothing that no checkpoint needs
    for offline in (False, True):
        again = call("convert", "llava-next-7b", "-o", f"again-{offline}", offline=offline)
        assert again.returncode == 0, again.stderr
        assert "(cache)" in again.stderr
        assert hub.asked == []
    named = [tmp_path / "checkpoints" / "llava-next-7b-pmod", tmp_path / "again-True"]
    assert len({(folder / WEIGHTS).read_bytes() if (folder / WEIGHTS).exists() else b"" for folder in named}) == 1


def test_a_revision_is_another_model(hub, call, stock_model, tmp_path):
    other = shutil.copytree(stock_model(), tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False, "note": "the second"}))
    hub.add("models", "me/model", stock_model())
    hub.add("models", "me/model", other, "v2")
    for name, second in (("me/model", False), ("me/model@v2", True), ("me/model@v2", True)):
        done = call("convert", name, "-o", "made", "--overwrite")
        assert done.returncode == 0, done.stderr
        assert ("note" in json.loads((tmp_path / "made" / "config.json").read_text())) == second
    assert hub.asked == []  # the third time
    done = call("convert", "me/model@v3", "-o", "none")
    assert (done.returncode, done.stdout) == (2, "")
    assert "me/model has no revision" in done.stderr
    assert not (tmp_path / "none").exists()


def test_a_download_that_breaks_off_goes_on(hub, call, stock_model, tmp_path):
    hub.add("models", "me/model", stock_model())
    hub.cut[WEIGHTS] = 50_000
    done = call("convert", "me/model", "-o", "made")
    assert (done.returncode, done.stdout) == (1, "")
    assert "error: the network failed" in done.stderr
    assert "run the same command again" in done.stderr
    assert not (tmp_path / "made").exists()
    hub.cut.clear()
    done = call("convert", "me/model", "-o", "made")
    assert done.returncode == 0, done.stderr
    assert hub.files_sent() == [WEIGHTS]  # the rest was kept


@pytest.mark.parametrize(
    ("repo", "told", "hint"),
    [
        ("nobody/nothing", "the hub shows no repository nobody/nothing", "hf auth login"),
        ("me/gated", "me/gated is gated", "hf auth login"),
    ],
)
def test_a_repository_that_is_not_shown(repo, told, hint, hub, call, stock_model, tmp_path):
    hub.add("models", "me/gated", stock_model())
    hub.gated.add("me/gated")
    done = call("convert", repo, "-o", "made")
    assert (done.returncode, done.stdout) == (2, "")
    what, how = done.stderr.strip().splitlines()
    assert told in what
    assert hint in how
    assert not (tmp_path / "made").exists()
    if repo in hub.gated:
        assert call("convert", repo, "-o", "made", HF_TOKEN="hf_secret").returncode == 0


@pytest.mark.slow
def test_a_slow_hub_is_waited_for_if_the_user_says_so(hub, call, stock_model):
    hub.add("models", "me/model", stock_model())
    hub.late = 2.5
    done = call("convert", "me/model", "-o", "made")
    assert done.returncode == 2
    assert "no answer within 2 s" in done.stderr
    assert "HF_HUB_ETAG_TIMEOUT" in done.stderr
    hub.late = 2.2
    done = call("profile", "-m", "me/model", HF_HUB_ETAG_TIMEOUT="30")  # needs no weights
    assert done.returncode == 0, done.stderr
    assert WEIGHTS not in hub.files_sent()


def test_a_mirror_of_benchmarks(hub, call, tmp_path):
    """`eval --fetch-data`: what it writes, what it asks for when it is repeated, what it says of broken files."""
    root = mirrors.write(tmp_path / "hub", ["chartqa", "docvqa"])
    for folder in root.glob("*/*"):
        hub.add("datasets", folder.relative_to(root).as_posix(), folder)
    fetch = ("eval", "--fetch-data", "chartqa,docvqa", "--data-root", "mirror")
    hub.cut[CHARTS] = 2_000
    broken = call(*fetch)
    assert (broken.returncode, broken.stdout) == (1, "")
    assert "error: the network failed" in broken.stderr
    assert "run the same command again" in broken.stderr
    hub.cut.clear()
    hub.damaged.add(CHARTS)
    wrong = call(*fetch)
    assert wrong.returncode == 1
    assert f"{CHARTS}: its SHA-256 is not the hub's" in wrong.stderr
    hub.damaged.clear()
    (tmp_path / "mirror" / "lmms-lab-encoder" / "ChartQA" / CHARTS).unlink()
    whole = call(*fetch)
    assert (whole.returncode, whole.stdout) == (0, "mirror\n")
    for file in root.rglob("*.parquet"):
        assert (tmp_path / "mirror" / file.relative_to(root)).read_bytes() == file.read_bytes()
        assert f"  {file.relative_to(root).as_posix()}\n" in (tmp_path / "mirror" / "SHA256SUMS").read_text()
    assert call(*fetch).returncode == 0
    assert hub.files_sent() == []
    hub.folders.clear()
    gone = call("eval", "--fetch-data", "gqa", "--data-root", "other")
    assert gone.returncode == 2
    assert "the hub shows no repository lmms-lab-encoder/GQA" in gone.stderr


@pytest.mark.slow
def test_a_benchmark_is_fetched_once(hub, call, stock_model, tmp_path):
    """`pmod eval --tasks chartqa`, on a machine with a network and then without."""
    root = mirrors.write(tmp_path / "hub", ["chartqa"])
    hub.add("datasets", "lmms-lab-encoder/ChartQA", root / "lmms-lab-encoder" / "ChartQA")
    asked = ("eval", "--model", "tiny-llava-next", "--tasks", "chartqa", "--against", "none", "--limit", "2")
    first = call(*asked, "-o", "first")
    assert first.returncode == 0, first.stderr
    assert hub.files_sent().count(CHARTS.rpartition("/")[2]) == 1
    second = call(*asked, "-o", "second", offline=True)
    assert second.returncode == 0, second.stderr
    tasks = [json.loads((tmp_path / name / "results.json").read_text())["tasks"][0] for name in ("first", "second")]
    scores = [task["scores"]["tiny-llava-next"]["score"] for task in tasks]
    assert scores[0] == scores[1] is not None


@pytest.mark.slow
def test_rows_of_a_data_set(hub, call, tmp_path):
    """`data.kind=hub`: fetched, planned, refused by name, and broken off."""
    text = {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
    rows = [row(document_of("doc", seed_of("train", 40_000_000 + index))) for index in range(4)]
    for message in (message for each in rows for message in each["messages"]):
        message["content"] = [{"text": None, **part} for part in message["content"]]
    (tmp_path / "data").mkdir()
    Dataset.from_list(rows, features=Features({"images": List(Image()), "messages": List(text)})).to_parquet(
        tmp_path / "data" / "train-00000-of-00001.parquet"
    )
    (tmp_path / "set").mkdir()
    (tmp_path / "data").rename(tmp_path / "set" / "data")
    for name in ("me/rows", "me/gated", "me/cut"):
        hub.add("datasets", name, tmp_path / "set")
    hub.gated.add("me/gated")
    plan = ("finetune", "tiny", "-m", "tiny-llava-next", "--set", "data.kind=hub", "--dry-run", "--json", "--set")
    done = call(*plan, "data.path=me/rows")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["data"]["rows"] == 4
    for name, told in (("me/none", "no such data set: me/none"), ("me/gated", "hf auth login")):
        refused = call(*plan, f"data.path={name}")
        assert (refused.returncode, refused.stdout) == (2, "")
        assert told in refused.stderr
    hub.cut["data/train-00000-of-00001.parquet"] = 3_000
    broken = call(*plan, "data.path=me/cut")
    assert (broken.returncode, broken.stdout) == (1, "")
    assert "error: the network failed" in broken.stderr


@pytest.mark.slow
def test_the_papers_parts(hub, call, parts, tmp_path):  # noqa: F811
    """Recipe `llava-1.5-7b` names three repositories: a language model in pickles, a tower, a projector."""
    folder, _, _ = parts
    recipe = load_settings(recipe_files.find("llava-1.5-7b"))
    llm = shutil.copytree(folder / "llm", tmp_path / "llm")
    torch.save(load_file(llm / WEIGHTS), llm / "pytorch_model.bin")
    (llm / WEIGHTS).unlink()
    (tmp_path / "projector").mkdir()
    shutil.copy(folder / "mm_projector.bin", tmp_path / "projector")
    hub.add("models", recipe.model.llm, llm)
    hub.add("models", recipe.model.vision_tower, folder / "clip")
    hub.add("models", recipe.model.projector, tmp_path / "projector")
    make_data(tmp_path / "data", 8)
    changed = ["model.precision=float32", "train.engine=auto", "data.max_length=null", "data.workers=0"]
    changed += ["train.batch_size=2", "train.global_batch_size=2", "train.max_steps=1"]
    done = call(*("finetune", "llava-1.5-7b", "-o", "run"), *(word for one in changed for word in ("--set", one)))
    assert done.returncode == 0, done.stderr
    assert {"pytorch_model.bin", WEIGHTS, "mm_projector.bin"} <= set(hub.files_sent())
    assert router_state(tmp_path / "run") == "trained"
