"""Where rows come from: files of JSON, data sets of the hub; what cannot be read."""

import json
import os
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch

from pmod_cli.core.errors import PmodError
from pmod_cli.data import index as index_module
from pmod_cli.data.conversation import from_llava
from pmod_cli.data.dataset import build_dataset
from pmod_cli.data.index import open_index
from pmod_cli.data.sources import open_source
from tests.data.rows import said, settings, write
from tests.data.tokenizers import processor_of


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("chunk", [7, 1 << 22])
def test_rows_of_a_file_are_those_of_json(tmp_path, pictures, monkeypatch, lines, chunk):
    """Array and JSONL, whatever the size of what is read at once; letters of several bytes, brackets in strings."""
    monkeypatch.setattr(index_module, "CHUNK", chunk)
    rows = [said(answer=text) for text in ("A dog.", "Größe 狗 😀 ]}[{", 'quote " and \\ slash', "\u2028 x", "1e5")]
    rows.insert(2, said("Colour?", "red", image="a.png"))
    data = build_dataset(settings(write(tmp_path / "rows.json", rows, lines), pictures), processor_of("vicuna_v1"))
    assert len(data) == 6
    assert [data.source[i] for i in range(6)] == [from_llava(row) for row in rows]
    words = [sum(len(turn["value"].split()) for turn in row["conversations"]) for row in rows]
    assert data.lengths.tolist() == [n if "image" in row else -n for n, row in zip(words, rows, strict=True)]


@pytest.mark.parametrize("template", ["auto", "vicuna_v1", "mistral", "llama3", "qwen"])
def test_rows_can_be_sent_to_another_process(tmp_path, template):
    data = build_dataset(settings(write(tmp_path / "rows.json", [said()]), template=template), processor_of(template))
    again = ForkingPickler.loads(
        ForkingPickler.dumps(data)
    )  # as a DataLoader's workers get them where they are spawned
    assert torch.equal(again[0]["labels"], data[0]["labels"])


def test_the_index_is_cached_and_follows_the_file(tmp_path, monkeypatch):
    path = write(tmp_path / "rows.json", [said(), said()])
    assert len(open_index(path, lambda row: 1)) == 2
    counted = []
    assert len(open_index(path, counted.append)) == 2
    assert counted == []  # from the cache
    write(path, [said()] * 3)
    assert len(open_index(path, lambda row: 1)) == 3
    cache = index_module._folder()
    assert all(file.suffix == ".npy" and ".tmp" not in file.name for file in cache.iterdir())
    for file in cache.iterdir():
        file.write_bytes(b"damaged")
    assert len(open_index(path, lambda row: 1)) == 3
    monkeypatch.setattr(index_module, "_folder", lambda: Path("/proc/nowhere"))
    assert len(open_index(path, lambda row: 1)) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}, {"a": ', "broken in row 1, which begins at byte 11"),
        ('[{"a": 1} {"a": 2}]', "broken at byte 10: expected ',' or ']' after row 1"),
        ('[{"a": 1}', "expected ',' or ']' after row 1"),
        ('[{"a": 1}]\n[{"a": 2}]', "goes on at byte 11, behind its array: expected the end"),
        ('[{"a": 1}] \n}', "goes on at byte 12"),
        ("hello", "neither a JSON array nor JSONL: it begins with b'h'"),
        ('{\n"data": []\n}', "neither a JSON array nor JSONL: no line of it is JSON by itself"),
        ("[]", "has no rows"),
        ("", "has no rows"),
    ],
)
def test_a_file_that_is_not_json_says_where(tmp_path, text, message):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(PmodError) as caught:
        open_index(path, lambda row: 1)
    assert message in caught.value.what
    assert "rows.json" in caught.value.what


def test_missing_files_and_folders(tmp_path):
    processor = processor_of("vicuna_v1")
    with pytest.raises(PmodError, match=r"cannot read the data file .*none.json: No such file"):
        build_dataset(settings(tmp_path / "none.json"), processor)
    with pytest.raises(PmodError, match="is a folder, expected a JSON or JSONL file"):
        build_dataset(settings(tmp_path), processor)
    with pytest.raises(PmodError, match=r"no such image folder: .*none"):
        build_dataset(settings(write(tmp_path / "rows.json", [said()]), tmp_path / "none"), processor)


def test_a_hub_data_set_with_llavas_columns(tmp_path, pictures):
    """`conversations` and one `image`, which rows of text lack: as the data of LLaVA-NeXT are published."""
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    turns = [{"from": Value("string"), "value": Value("string")}]
    features = Features({"id": Value("string"), "conversations": turns, "image": ImageFeature()})
    local = [{"id": "1", **said(image="a.png")}, {"id": "2", **said()}, {"id": "3", **said(image="b.png")}]
    rows = [{**row, "image": str(pictures / row["image"]) if "image" in row else None} for row in local]
    Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "saved")
    processor = processor_of("vicuna_v1", "llava_next")
    hub = build_dataset(settings(tmp_path / "saved", kind="hub"), processor)
    own = build_dataset(settings(write(tmp_path / "rows.json", local), pictures), processor)
    assert hub.lengths.tolist() == own.lengths.tolist()
    for row in range(3):
        assert hub[row].keys() == own[row].keys()
        assert all(torch.equal(hub[row][name], own[row][name]) for name in hub[row])
    assert hub.source.id_of(2) == "3"


def test_a_split_of_a_data_set_without_any_is_refused(tmp_path):
    """One that was saved from a split is taken by that name too."""
    from datasets import Dataset

    rows = Dataset.from_dict({"conversations": [said()["conversations"]]})
    rows.save_to_disk(tmp_path / "saved")
    with pytest.raises(PmodError, match="saved holds one data set without splits, and not test"):
        open_source("hub", f"{tmp_path / 'saved'}:test", None)
    rows._split = "validation"
    rows.save_to_disk(tmp_path / "split")
    assert len(open_source("hub", f"{tmp_path / 'split'}:validation", None)) == 1
    with pytest.raises(PmodError, match="and not train"):
        open_source("hub", f"{tmp_path / 'split'}:train", None)


def test_splits_that_were_saved_together_are_named(tmp_path):
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_dict({"conversations": [said()["conversations"]] * 2})
    DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(tmp_path / "both")
    for path, count in (("both", 2), ("both:train", 2), ("both:test", 1), ("both/test", 1)):
        assert len(open_source("hub", str(tmp_path / path), None)) == count
    with pytest.raises(PmodError, match=r"no such split: .*both/validation"):
        open_source("hub", f"{tmp_path / 'both'}:validation", None)


def test_a_data_set_with_a_broken_file_is_named(tmp_path):
    """It breaks while `datasets` reads it, whose own error says nothing but that."""
    (tmp_path / "set").mkdir()
    good = json.dumps(said()) + "\n"
    (tmp_path / "set" / "train.jsonl").write_text(good + '{"conversations": [')
    with pytest.raises(PmodError, match=r"the data set .*set cannot be read: .*JSON"):
        open_source("hub", str(tmp_path / "set"), None)


def test_a_hub_data_set_gives_the_rows_of_its_json(tmp_path, pictures):
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    text = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A dog."}]
    features = Features(
        {"messages": List({"role": Value("string"), "content": Value("string")}), "images": List(ImageFeature())}
    )
    rows = {"messages": [text, [{**text[0], "content": "What?"}, text[1]]], "images": [[str(pictures / "b.png")], []]}
    Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    hub = build_dataset(settings(tmp_path / "saved", kind="hub"), processor_of("vicuna_v1"))
    ours = [said("What?", image="b.png"), said("What?")]
    local = build_dataset(settings(write(tmp_path / "rows.json", ours), pictures), processor_of("vicuna_v1"))
    assert hub.lengths.tolist() == local.lengths.tolist()
    for row in range(2):
        assert hub[row].keys() == local[row].keys()
        assert all(torch.equal(hub[row][name], local[row][name]) for name in hub[row])
    Dataset.from_dict({"text": ["x"]}).save_to_disk(tmp_path / "other")
    with pytest.raises(PmodError, match="has the columns text; expected messages or conversations, and images"):
        build_dataset(settings(tmp_path / "other", kind="hub"), processor_of("vicuna_v1"))


MEMORY = """
import sys
from pathlib import Path
from pmod_cli.core.memory import PeakMemory, peak_memory
from pmod_cli.data.sources import LlavaFile
memory = PeakMemory("cpu")  # what the system says of a child begins with what its parent held
source = LlavaFile(Path(sys.argv[1]), None)
for row in range(0, len(source), 97):
    source[row]
print(len(source), memory.mib() or peak_memory() / 2**20)
"""


def test_memory_does_not_grow_with_the_file(tmp_path):
    """120 MB of rows against 1 MB: the process that indexes and reads them may not hold more than a few chunks."""

    def peak(count):
        path = tmp_path / f"{count}.json"
        row = json.dumps(said(answer="word " * 400))
        with path.open("w") as file:
            file.write("[" + ",\n".join([row] * count) + "]")
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, path], capture_output=True, text=True, check=True, env=os.environ
        )
        rows, most = done.stdout.split()
        assert int(rows) == count
        return float(most)

    small, large = peak(500), peak(60_000)
    assert large - small < 60
