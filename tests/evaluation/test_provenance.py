"""What a result file says of where its scores come from: digests that tell checkpoints apart, and no secrets."""

import hashlib
import json
import shutil

import pytest

from pmod_cli.checkpoints import convert
from pmod_cli.evaluation import provenance
from pmod_cli.evaluation.benchmarks import BENCHMARKS
from pmod_cli.model import PmodSettings
from tests.evaluation import mirrors


def test_digest_is_that_of_the_files(stock_model):
    (file,) = stock_model().glob("*.safetensors")
    of_file = hashlib.sha256(file.read_bytes()).hexdigest()
    assert provenance.weights_sha256(stock_model()) == hashlib.sha256(of_file.encode()).hexdigest()


def test_digest_tells_checkpoints_apart(stock_model, tmp_path):
    convert(stock_model(), tmp_path / "pmod", PmodSettings())
    stock, pmod = provenance.weights_sha256(stock_model()), provenance.weights_sha256(tmp_path / "pmod")
    assert stock != pmod
    shutil.copytree(tmp_path / "pmod", tmp_path / "trained")  # one byte of one router differs
    routers = tmp_path / "trained" / "model-routers.safetensors"
    data = bytearray(routers.read_bytes())
    data[-1] ^= 1
    routers.write_bytes(data)
    assert provenance.weights_sha256(tmp_path / "trained") != pmod


@pytest.mark.parametrize(
    "name", ["preprocessor_config.json", "video_preprocessor_config.json", "special_tokens_map.json", "merges.txt"]
)
def test_what_the_processor_reads_is_part_of_it(stock_model, tmp_path, name):
    shutil.copytree(stock_model(), tmp_path / "other")
    before = provenance.checkpoint(tmp_path / "other", None)
    (tmp_path / "other" / name).write_text("{}")
    assert provenance.checkpoint(tmp_path / "other", None) != before


def test_a_file_of_the_cache_is_not_read(stock_model, tmp_path):
    """The cache names a blob by its SHA-256; a blob of other content with that name proves that it is not read."""
    digest = hashlib.sha256(b"weights").hexdigest()
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / digest).write_bytes(b"not these")
    snapshot = tmp_path / "snapshots" / "commit"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to(tmp_path / "blobs" / digest)
    assert provenance.weights_sha256(snapshot) == hashlib.sha256(digest.encode()).hexdigest()


def test_nor_is_a_hard_link_to_it(tmp_path, monkeypatch):
    """As `pmod convert` leaves it: linked shards, and a small one of its own."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    digest = hashlib.sha256(b"weights").hexdigest()
    blob = tmp_path / "hub" / "models--a--b" / "blobs" / digest
    blob.parent.mkdir(parents=True)
    blob.write_bytes(b"not these")
    converted = tmp_path / "converted"
    converted.mkdir()
    (converted / "model-00001-of-00001.safetensors").hardlink_to(blob)
    (converted / "model-routers.safetensors").write_bytes(b"routers")
    names = {"a": "model-00001-of-00001.safetensors", "b": "model-routers.safetensors"}
    (converted / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    own = hashlib.sha256(b"routers").hexdigest()
    assert provenance.weights_sha256(converted) == hashlib.sha256(f"{digest}{own}".encode()).hexdigest()


def test_a_file_that_changes_is_read_again(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"one")
    before = provenance.weights_sha256(tmp_path)
    file.write_bytes(b"three")
    assert provenance.weights_sha256(tmp_path) != before


def test_software_names_every_package_and_no_secret(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_the_test")
    found = provenance.software()
    names = {name.lower().replace("-", "_") for name in found["packages"]}
    assert {"torch", "transformers", "lmms_eval", "datasets", "tokenizers", "pillow", "numpy"} <= names
    assert "hf_secret_of_the_test" not in json.dumps([found, provenance.machine("cpu")])


def test_a_checkout_has_a_commit():
    commit = provenance.software()["pmod_commit"]
    if commit is None:
        pytest.skip("these files are no git checkout")
    assert len(commit.removesuffix("-dirty")) == 40


def test_data_of_a_mirror_has_its_listed_digest(tmp_path):
    mirrors.write(tmp_path, ["gqa"])
    benchmark = BENCHMARKS["gqa"]
    digests = {
        path.relative_to(tmp_path).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in tmp_path.rglob("*.parquet")
    }
    (tmp_path / "SHA256SUMS").write_text("".join(f"{digest}  {name}\n" for name, digest in digests.items()))
    found = provenance.data(benchmark.data, tmp_path)
    assert [part["split"] for part in found] == ["testdev", "testdev"]
    assert {file["sha256"] for part in found for file in part["files"]} == set(digests.values())
    (tmp_path / "SHA256SUMS").unlink()
    assert provenance.data(benchmark.data, tmp_path)[0]["files"][0]["sha256"] is None
