"""Data sets of rows: reading, lengths, cutting, bad input, skipping, the check before a run, grouping."""

import io
import json
import os
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from pmod_cli.core.errors import PmodError
from pmod_cli.data import index as index_module
from pmod_cli.data.check import check_rows, refuse_bad
from pmod_cli.data.collator import Collator, ModalityBatches
from pmod_cli.data.conversation import BadRow, from_llava, from_messages
from pmod_cli.data.dataset import RowEncoder, build_dataset
from pmod_cli.data.index import open_index
from pmod_cli.data.pictures import open_image
from pmod_cli.data.rendered import IGNORED
from pmod_cli.data.sources import open_source
from tests import factories
from tests.data.tokenizers import processor_of
from tests.factories import KINDS


def settings(path, images=None, **changes):
    values = {"kind": "llava", "template": "vicuna_v1", "max_length": None, "on_bad_row": "error"}
    values |= {"video_fps": 2.0, "video_frames": 4}
    return SimpleNamespace(path=str(path), images=None if images is None else str(images), **{**values, **changes})


def said(question="What is it?", answer="A dog.", image=None):
    row = {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
    if image is not None:
        row["image"] = image
        row["conversations"][0]["value"] = f"<image>\n{question}"
    return row


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name, size, colour in [("a", (64, 64), "red"), ("b", (70, 41), "green"), ("c", (41, 70), "blue")]:
        Image.new("RGB", size, colour).save(folder / f"{name}.png")
    return folder


def write(path, rows, lines=False):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) if lines else json.dumps(rows, indent=2)
    path.write_text(text, encoding="utf-8")
    return path


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


@pytest.mark.parametrize("kind", KINDS)
def test_rows_with_no_one_and_several_images(tmp_path, pictures, kind):
    several = {
        "image": ["a.png", "b.png"],
        "conversations": [
            {"from": "human", "value": "<image>\n<image>\nCompare."},
            {"from": "gpt", "value": "Red and green."},
        ],
    }
    rows = [said(), said(image="b.png"), several]
    processor = processor_of("vicuna_v1", kind)
    data = build_dataset(settings(write(tmp_path / "rows.json", rows), pictures), processor)
    assert "pixel_values" not in data[0]
    assert [len(data[i]["pixel_values"]) for i in (1, 2)] == [1, 2]
    batch = Collator(data.encoder.processor)([data[i] for i in range(3)])
    model = factories.model(kind, vocab_size=len(processor.tokenizer)).train()
    model.config.image_token_index = model.config.image_token_id = processor.image_token_id
    tokens = (batch["input_ids"] == processor.image_token_id).sum(dim=1)
    assert tokens[0] == 0 < tokens[1] < tokens[2]
    loss = model(**batch).loss  # the model counts image tokens against features
    assert loss.isfinite()
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()


def test_llava_15_pads_to_a_square_with_the_mean_colour(tmp_path, pictures):
    processor = processor_of("vicuna_v1", "llava")
    data = build_dataset(settings(write(tmp_path / "rows.json", [said(image="b.png")]), pictures), processor)
    mean = tuple(int(value * 255) for value in processor.image_processor.image_mean)
    square = Image.new("RGB", (70, 70), mean)
    square.paste(Image.open(pictures / "b.png"), (0, (70 - 41) // 2))
    expected = processor.image_processor(images=[square], return_tensors="pt")["pixel_values"]
    assert torch.equal(data[0]["pixel_values"], expected)
    assert data.encoder.processor.image_processor.do_pad  # what is saved with the model


def test_next_cuts_into_tiles_as_its_processor_does(tmp_path, pictures):
    processor = processor_of("vicuna_v1")
    data = build_dataset(settings(write(tmp_path / "rows.json", [said(image="c.png")]), pictures), processor)
    expected = processor.image_processor(images=[Image.open(pictures / "c.png")], return_tensors="pt")
    assert torch.equal(data[0]["pixel_values"], expected["pixel_values"])
    assert data[0]["image_sizes"].tolist() == [[70, 41]]


def test_long_rows_are_cut_behind_the_image_and_counted(tmp_path, pictures):
    rows = [said(answer="A dog. " * 200), said(answer="A dog. " * 200, image="a.png"), said()]
    path = write(tmp_path / "rows.json", rows)
    processor = processor_of("vicuna_v1")
    whole = build_dataset(settings(path, pictures), processor)
    limit = 150
    data = build_dataset(settings(path, pictures, max_length=limit), processor)
    for row in range(2):
        one, other = data[row], whole[row]
        assert all(torch.equal(one[name], other[name][:limit]) for name in ("input_ids", "labels"))
    assert torch.equal(data[2]["input_ids"], whole[2]["input_ids"])
    report = check_rows(data, None)
    assert (report.checked, report.cut, report.num_bad) == (3, 2, 0)
    assert report.longest == max(len(whole[row]["input_ids"]) for row in range(3))
    short = build_dataset(settings(path, pictures, max_length=30), processor)
    with pytest.raises(BadRow, match=r"row 1 of .*: its images end at token \d+, behind data.max_length 30"):
        short[1]
    assert data.counts() == {"skipped": 0, "cut": 2, "without_labels": 0}


def save(folder, name, image, **options):
    image.save(folder / name, **options)


def broken_images(folder):
    """File name to what is said about it; None where it is a fine image."""
    picture = Image.effect_noise((300, 300), 80).convert("RGB")
    save(folder, "whole.jpg", picture)
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:9000])
    save(folder, "whole.png", picture)
    (folder / "cut.png").write_bytes((folder / "whole.png").read_bytes()[:9000])
    (folder / "text.jpg").write_text("<html>404</html>")
    (folder / "empty.jpg").write_bytes(b"")
    save(folder, "bomb.png", Image.new("1", (20000, 20000)))
    save(folder, "cmyk.jpg", picture.convert("CMYK"))
    save(folder, "palette.gif", picture.convert("P"))
    save(folder, "palette.png", picture.convert("P"), transparency=0)
    save(folder, "alpha.png", picture.convert("RGBA"))
    save(folder, "grey.png", picture.convert("L"))
    save(folder, "one.png", Image.new("RGB", (1, 1)))
    save(folder, "long.png", Image.new("RGB", (20000, 10), "red"))
    save(folder, "tall.png", Image.new("RGB", (10, 20000), "red"))
    (folder / "folder.png").mkdir()
    return {
        "cut.jpg": "cut.jpg cannot be decoded",
        "cut.png": "cut.png cannot be decoded",
        "text.jpg": "text.jpg is not an image",
        "empty.jpg": "empty.jpg is not an image",
        "bomb.png": "bomb.png has more than 89 megapixels",
        "folder.png": "folder.png: this is a folder, expected image file",
        "none.png": "no such image: none.png",
        "../secret.png": "../secret.png lies outside the image folder",
        "a/../b.png": "a/../b.png has '..' in it",
        "/etc/secret.png": "/etc/secret.png lies outside the image folder",
        **dict.fromkeys(["cmyk.jpg", "palette.gif", "palette.png", "alpha.png", "grey.png"]),
        **dict.fromkeys(["one.png", "long.png", "tall.png"]),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image_trains_or_is_named(tmp_path, pictures, kind):
    expected = broken_images(pictures)
    path = write(tmp_path / "rows.json", [said(image=name) for name in expected])
    processor = processor_of("vicuna_v1", kind)
    data = build_dataset(settings(path, pictures), processor)
    report = check_rows(data, None)
    assert report.num_bad == sum(reason is not None for reason in expected.values())
    found = {fault.row: fault.reason for fault in report.bad}
    model = factories.model(kind, vocab_size=len(processor.tokenizer))
    model.config.image_token_index = model.config.image_token_id = processor.image_token_id
    for row, (name, reason) in enumerate(expected.items()):
        if reason is None:
            assert row not in found, (name, found.get(row))
            with torch.no_grad():
                assert model(**Collator(processor)([data[row]])).loss.isfinite()
        else:
            assert reason in found[row]
            with pytest.raises(BadRow) as caught:
                data[row]
            assert caught.value.what.startswith(f"row {row} of {path}: ")
            assert "\n" not in caught.value.what
    with pytest.raises(PmodError, match=r"10 of 18 rows looked at in .*rows.json cannot be used:\n  row 0: cut.jpg"):
        refuse_bad(report)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("text", "expected an object, found str"),
        ({}, "'conversations': expected a list, found nothing"),
        ({"conversations": []}, "the conversation is empty"),
        ({"conversations": [{"from": "human"}]}, "turn 0: expected an object with 'from' and 'value'"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "turn 0: unknown role 'bot'"),
        ({"conversations": [{"from": ["human"], "value": "x"}]}, "turn 0: unknown role ['human']"),
        ({"conversations": [{"from": {}, "value": "x"}]}, "turn 0: unknown role {}"),
        ({"conversations": [{"from": "human", "value": 3}]}, "turn 0: 'value': expected text, found int"),
        ({"conversations": [{"from": "human", "value": "x"}]}, "the assistant says nothing"),
        (said() | {"image": "a.png"}, "the row has 1 image, and 0 <image> places in its turns"),
        (said("<image>\nWhat?"), "the row has 0 images, and 1 <image> place in its turns"),
        (said() | {"image": 7}, "'image': expected a file name or a list of them, found 7"),
        (said() | {"image": ""}, "'image': expected a file name or a list of them, found ''"),
    ],
)
def test_a_broken_row_says_what_is_wrong(row, reason):
    with pytest.raises(BadRow) as caught:
        from_llava(row)
    assert reason in caught.value.what


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", ["vicuna_v1", "auto"])
def test_the_html_tag_of_a_film_is_text_to_a_model_of_images(pictures, template, kind):
    encoder = RowEncoder(processor_of("vicuna_v1", kind), template)
    asked = [{"from": "human", "value": "Where does <video> stand?"}, {"from": "gpt", "value": "<video> stands there"}]
    row = said(image="a.png")
    with_image = {**row, "conversations": [*row["conversations"], *asked]}
    for row in ({"conversations": asked}, with_image):
        ids, labels = (encoder(from_llava(row), pictures)[name] for name in ("input_ids", "labels"))
        assert "Where does <video> stand?" in encoder.processor.tokenizer.decode(ids)
        assert "<video> stands there" in encoder.processor.tokenizer.decode(labels[labels != IGNORED])


def test_messages_with_parts():
    image = Image.new("RGB", (4, 4))
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "A dog."}]}
    conversation = from_messages(row | {"images": [image]})
    assert [turn.text for turn in conversation.turns] == ["<image>\nWhat?", "A dog."]
    with pytest.raises(BadRow, match="turn 0: expected parts of type image, image_url, video or text, found audio"):
        from_messages({"messages": [{"role": "user", "content": [{"type": "audio"}]}]})


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_rows_are_skipped_and_written_down(tmp_path, pictures, workers):
    rows = [
        said(answer="zero"),
        said(image="none.png"),
        {"conversations": []},
        said(image="b.png"),
        said(answer="four"),
    ]
    path = write(tmp_path / "rows.jsonl", rows, lines=True)
    with path.open("a") as file:
        file.write("{broken\n")
    skipped = tmp_path / "skipped.jsonl"
    data = build_dataset(settings(path, pictures, on_bad_row="skip"), processor_of("vicuna_v1"), skipped=skipped)
    loader = DataLoader(data, batch_size=1, num_workers=workers, collate_fn=Collator(data.encoder.processor))
    got = [batch["input_ids"] for batch in loader]
    good = [data[i]["input_ids"] for i in (0, 3, 4, 3, 4, 0)]  # the next good row of the same kind, from the start
    assert all(torch.equal(one[0], other) for one, other in zip(got, good, strict=True))
    lines = [json.loads(line) for line in skipped.read_text().splitlines()]
    reasons = {line["row"]: line["reason"] for line in lines}
    assert reasons[1] == f"no such image: none.png, in {pictures}"
    assert reasons[2] == "the conversation is empty"
    assert reasons[5].startswith("not JSON: ")
    assert {line["file"] for line in lines} == {str(path)}
    assert data.counts()["skipped"] >= 3


@pytest.mark.parametrize("workers", [0, 2])
def test_a_row_is_left_out_once(tmp_path, pictures, workers):
    """Whichever worker meets it, in whichever epoch; and where a run goes on, it is in the list already."""
    rows = [said(image="a.png") for _ in range(8)]
    rows[3] = said(image="none.png")
    path, skipped = write(tmp_path / "rows.json", rows), tmp_path / "skipped.jsonl"
    for _ in range(2):  # the run, and the same run again
        data = build_dataset(settings(path, pictures, on_bad_row="skip"), processor_of("vicuna_v1"), skipped=skipped)
        loader = DataLoader(data, batch_size=2, num_workers=workers, collate_fn=Collator(data.encoder.processor))
        for _ in range(2):
            assert len(list(loader)) == 4
        assert data.counts()["skipped"] == 1
        skipped.write_text(skipped.read_text() + '{"row": 4')  # as a killed process may leave it
    assert [json.loads(line)["row"] for line in skipped.read_text().splitlines() if line.endswith("}")] == [3]


def test_an_error_in_a_worker_is_one_sentence(tmp_path, pictures):
    path = write(tmp_path / "rows.json", [said(), said(image="none.png")])
    data = build_dataset(settings(path, pictures), processor_of("vicuna_v1"))
    loader = DataLoader(data, num_workers=1, collate_fn=Collator(data.encoder.processor))
    with pytest.raises(BadRow) as caught:
        list(loader)
    assert caught.value.what == f"row 1 of {path}: no such image: none.png, in {pictures}"


def test_nothing_but_bad_rows_ends(tmp_path, pictures):
    path = write(tmp_path / "rows.json", [said(image="none.png")] * 300)
    data = build_dataset(settings(path, pictures, on_bad_row="skip"), processor_of("vicuna_v1"))
    with pytest.raises(PmodError, match=r"100 rows from row 5 on of .* cannot be used"):
        data[5]


def test_the_check_looks_at_a_sample_or_at_all(tmp_path, pictures):
    rows = [said() for _ in range(1000)]
    rows[500] = said(image="none.png")
    data = build_dataset(settings(write(tmp_path / "rows.json", rows), pictures), processor_of("vicuna_v1"))
    sample, seen = check_rows(data, 64), []
    assert (sample.rows, sample.checked, sample.num_bad) == (1000, 64, 0)
    whole = check_rows(data, None, workers=2, on_progress=lambda done, total: seen.append((done, total)))
    assert (whole.checked, whole.num_bad) == (1000, 1)
    assert whole.bad == [(500, f"no such image: none.png, in {pictures}", None)]
    assert seen[-1] == (1000, 1000)
    assert whole.tokens_per_row == pytest.approx(len(data[0]["input_ids"]))
    refuse_bad(sample)


def test_rows_that_teach_nothing_are_passed_over_and_counted(tmp_path, pictures):
    rows = [said(), said(answer="it reads ASSISTANT: yes")]
    data = build_dataset(settings(write(tmp_path / "rows.json", rows), pictures), processor_of("vicuna_v1"))
    assert check_rows(data, None).without_labels == 1
    assert torch.equal(data[1]["input_ids"], data[0]["input_ids"])  # passed over
    assert data.counts() == {"skipped": 0, "cut": 0, "without_labels": 1}


def test_absolute_names_of_images_are_taken_below_the_image_folder(tmp_path, pictures, monkeypatch):
    """As some tools write them; the folder says what is allowed, and `/` allows all."""
    name = str(pictures / "a.png")
    path = write(tmp_path / "rows.json", [said(image=name), said(image=f"{pictures}/../images/b.png")])
    processor = processor_of("vicuna_v1")
    for folder in (pictures, tmp_path, "/"):
        data = build_dataset(settings(path, folder), processor)
        assert data[0]["pixel_values"].shape[0] == 1
        with pytest.raises(BadRow, match="lies outside"):
            data[1]
    monkeypatch.chdir(tmp_path)
    assert len(build_dataset(settings("rows.json", "images"), processor)[0]["pixel_values"]) == 1
    (tmp_path / "other").mkdir()
    with pytest.raises(BadRow, match=r"a\.png lies outside the image folder .*other"):
        build_dataset(settings(path, tmp_path / "other"), processor)[0]


def test_bad_rows_are_named_by_their_id(tmp_path, pictures):
    rows = [{"id": id, **said(image="none.png")} for id in ("coco/1", 7, None, ["x"], "long" * 100)]
    data = build_dataset(
        settings(write(tmp_path / "rows.json", rows), pictures, on_bad_row="error"), processor_of("vicuna_v1")
    )
    report = check_rows(data, None)
    assert [fault.id for fault in report.bad] == ["coco/1", "7", None, None, "long" * 15]
    with pytest.raises(
        PmodError, match=r"\n  row 0 \(id coco/1\): no such image.*\n  row 1 \(id 7\).*\n  row 2: no such"
    ):
        refuse_bad(report)
    with pytest.raises(BadRow, match=r"^row 0 \(id coco/1\) of .*rows\.json: no such image"):
        data[0]


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


def lengths(count=1000, seed=0):
    random = np.random.default_rng(seed)
    return random.integers(1, 400, count) * random.choice([1, 1, -1], count)


@pytest.mark.parametrize(("batch", "batches"), [(4, 1), (4, 6), (1, 3), (7, 2)])
def test_batches_are_all_image_or_all_text_and_no_row_is_lost(batch, batches):
    sizes = lengths()
    order = list(ModalityBatches(sizes, batch, batches, seed=3))
    assert len(order) == len(ModalityBatches(sizes, batch, batches))
    assert set(order) == set(range(1000))
    assert len(order) - 1000 < 2 * batch * batches
    groups = np.array(order).reshape(-1, batch * batches)  # one a step: the same kind on every process
    assert all(len(set(np.sign(sizes[group]))) == 1 for group in groups)


def test_batches_are_evenly_long_and_the_order_is_seed_and_epoch():
    sizes = lengths()
    sampler = ModalityBatches(sizes, 8, 4, seed=1)
    first = list(sampler)
    assert first == list(sampler) == list(ModalityBatches(sizes, 8, 4, seed=1))
    assert first != list(ModalityBatches(sizes, 8, 4, seed=2))
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    resumed = ModalityBatches(sizes, 8, 4, seed=1)
    resumed.set_epoch(1)
    assert list(resumed) == second
    totals = np.abs(sizes[np.array(first)]).reshape(-1, 4, 8).sum(axis=2)
    plain = np.abs(sizes[np.random.default_rng(0).permutation(960)]).reshape(-1, 4, 8).sum(axis=2)
    assert np.ptp(totals, axis=1).mean() < 0.3 * np.ptp(plain, axis=1).mean()


def test_one_kind_alone_is_grouped_too():
    assert sorted(ModalityBatches(np.array([5, 3, 9, 1]), 2)) == [0, 1, 2, 3]
    assert sorted(ModalityBatches(np.array([-5, -3, -9]), 2, 2)) in ([0, 0, 1, 2], [0, 1, 1, 2], [0, 1, 2, 2])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_damaged_images_are_bad_rows_and_nothing_else(kind):
    """60 images of each kind with bytes changed, lost or cut off, at places of a fixed seed."""
    buffer, random = io.BytesIO(), np.random.default_rng(0)
    Image.effect_noise((40, 30), 90).convert("P" if kind == "GIF" else "RGB").save(buffer, kind)
    outcomes = set()
    for _ in range(60):
        data = bytearray(buffer.getvalue())
        for place in random.integers(0, len(data), 4):
            data[place] = random.integers(0, 256)
        del data[random.integers(len(data) // 2, 2 * len(data)) :]
        try:
            assert open_image(bytes(data)).mode == "RGB"
            outcomes.add("fine")
        except BadRow:
            outcomes.add("bad")
    assert "bad" in outcomes
