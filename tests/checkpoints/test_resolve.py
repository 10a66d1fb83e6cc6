"""Names to files: folder, alias, cache, hub; and what is said where there is none of them."""

import json
import shutil
import time
from pathlib import Path

import pytest

from pmod_cli.checkpoints import ALIASES, builtin_config, convert, load_model, load_processor, resolve
from pmod_cli.core.errors import PmodError
from pmod_cli.model import PmodSettings

REPO = ALIASES["llava-next-7b"].repo
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def fill_cache(cache: Path, source: Path, leave_out: str = "") -> Path:
    """A Hugging Face cache that holds REPO at COMMIT."""
    root = cache / f"models--{REPO.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    snapshot = root / "snapshots" / COMMIT
    shutil.copytree(source, snapshot, ignore=shutil.ignore_patterns(leave_out))
    return snapshot


def test_a_local_folder_wins(stock_model, workdir):
    shutil.copytree(stock_model(), workdir / "llava-next-7b")
    found = resolve("llava-next-7b")
    assert (found.path, found.origin, found.repo) == (Path("llava-next-7b"), "folder", None)


def test_an_alias_is_taken_from_the_cache(stock_model, tmp_path):
    snapshot = fill_cache(tmp_path, stock_model())
    for name in ("llava-next-7b", REPO, f"{REPO}@main", f"{REPO}@{COMMIT}"):
        found = resolve(name, cache_dir=tmp_path)
        assert (found.path, found.origin, found.commit, found.repo) == (snapshot, "cache", COMMIT, REPO)


def test_a_cache_without_weights_is_enough_for_the_configuration(stock_model, tmp_path):
    fill_cache(tmp_path, stock_model(), leave_out="*.safetensors")
    assert resolve("llava-next-7b", cache_dir=tmp_path, weights=False).origin == "cache"
    with pytest.raises(PmodError, match=r"missing: model.safetensors"):
        resolve("llava-next-7b", cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("llava-next-7", "llava-next-7b"),
        ("tiny", "tiny-llava-next"),
        ("./absent", "there is no folder ./absent"),
        ("~/absent", "there is no folder ~/absent"),
        ("a/b/c", "there is no folder a/b/c"),
        ("org/na--me..", "cannot be a repository"),
        ("https://hub.example/org/model/", "is the address of a page"),
    ],
)
def test_a_miss_says_what_is_near(name, told, workdir):
    with pytest.raises(PmodError) as caught:
        resolve(name)
    assert told in caught.value.what


def test_a_name_that_is_like_none_gets_three(workdir):
    with pytest.raises(PmodError) as caught:
        resolve("nonsuch")
    assert caught.value.what.partition("Near: ")[2].count(",") == 2


@pytest.mark.parametrize("page", ["https://hub.example/org/model", "https://hub.example/org/model/tree/v2"])
def test_a_page_of_the_hub_names_its_model(page, workdir):
    with pytest.raises(PmodError) as caught:
        resolve(page)
    assert caught.value.hint.endswith(": org/model@v2" if "tree" in page else ": org/model")


def test_local_checkpoints_are_listed_on_a_miss(workdir):
    (workdir / "checkpoints" / "mine").mkdir(parents=True)
    (workdir / "checkpoints" / "mine" / "config.json").write_text("{}")
    with pytest.raises(PmodError, match="checkpoints/mine"):
        resolve("mine")


def test_a_folder_that_is_no_checkpoint(workdir):
    (workdir / "photos").mkdir()
    (workdir / "photos" / "cat.jpg").touch()
    with pytest.raises(PmodError, match=r"lacks config\.json.*holds cat\.jpg"):
        resolve("photos")


def test_two_revisions_are_refused():
    with pytest.raises(PmodError, match="two revisions"):
        resolve(f"{REPO}@main", revision="v2")


def test_a_revision_that_is_not_here_is_fetched_by_its_name(stock_model, tmp_path):
    fill_cache(tmp_path, stock_model())
    with pytest.raises(PmodError, match="not in the Hugging Face cache") as caught:
        resolve(f"{REPO}@v2", offline=True, cache_dir=tmp_path)
    assert f"`hf download {REPO} --revision v2`" in caught.value.hint


@pytest.mark.timing
@pytest.mark.parametrize(
    ("environment", "why"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "offline mode is on"),
        ({"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}, "http://127.0.0.1:9 does not answer"),
    ],
)
def test_neither_cached_nor_reachable(environment, why, pmod, tmp_path):
    """Two sentences and exit code 2 within 3 s of the program's own time, whether offline or cut off."""
    started = time.monotonic()
    result = pmod("convert", "llava-next-7b", cwd=tmp_path, env=environment)
    seconds = time.monotonic() - started
    assert (result.returncode, result.stdout) == (2, "")
    what, hint = result.stderr.strip().splitlines()
    assert f"llava-next-7b ({REPO}) is not in the Hugging Face cache" in what
    assert why in what
    assert f"hf download {REPO}" in hint
    assert list(tmp_path.iterdir()) == []
    assert seconds < 3, f"{seconds:.1f} s"


@pytest.mark.parametrize(
    ("name", "layers", "hidden"),
    [
        ("llava-1.5-7b", 32, 4096),
        ("llava-1.5-13b", 40, 5120),
        ("llava-next-mistral-7b", 32, 4096),
        ("llava-next-llama3-8b", 32, 4096),
        ("llava-next-34b", 60, 7168),
    ],
)
def test_builtin_sizes(name, layers, hidden):
    config = builtin_config(name)
    text = config.text_config
    assert (config.model_type, text.num_hidden_layers, text.hidden_size) == (ALIASES[name].kind, layers, hidden)
    assert config.image_token_index < text.vocab_size
    assert json.dumps(config.to_dict())


def test_a_file_is_not_looked_for_on_the_hub(stock_model, tmp_path):
    """Neither a file of a checkpoint, which names its folder, nor another one."""
    config = stock_model() / "config.json"
    with pytest.raises(PmodError, match="is a file, and a checkpoint is a folder") as caught:
        resolve(str(config))
    assert caught.value.hint == f"name the folder that holds it: {config.parent}"
    (tmp_path / "notes.txt").touch()
    with pytest.raises(PmodError, match=r"notes\.txt is a file"):
        resolve(str(tmp_path / "notes.txt"))


@pytest.mark.parametrize("name", ["tiny-llava-next@main", "tiny-llava-next", "."])
def test_what_has_no_revisions_takes_none(name, workdir):
    with pytest.raises(PmodError, match="has no revision 'main'"):
        resolve(name, revision=None if "@" in name else "main")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model": {"type": "none"}}', "\x00"])
def test_a_damaged_tokenizer_is_a_sentence(stock_model, tmp_path, text):
    shutil.copytree(stock_model(), tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text(text)
    with pytest.raises(PmodError, match=r"the tokenizer or the image processor in .*model cannot be loaded"):
        load_processor(tmp_path / "model")


def test_a_selection_of_a_package_that_is_missing_is_a_sentence_and_no_more(stock_model, tmp_path, capfd):
    convert(stock_model(), tmp_path / "model", PmodSettings())
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["pmod"]["selection"] = "elsewhere"
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(PmodError, match=r"config\.json: selection must be one of .* found 'elsewhere'") as caught:
        load_model(tmp_path / "model")
    assert "if a package adds" in caught.value.hint
    assert "You are using a model of type" not in capfd.readouterr().err


def test_an_alias_in_any_case():
    assert resolve("Tiny-LLaVA-NeXT").path == resolve("tiny-llava-next").path
    assert resolve("TINY-LLAVA-NEXT").alias == "tiny-llava-next"
