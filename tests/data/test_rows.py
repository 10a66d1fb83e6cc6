"""Rows as a model reads them: lengths, cutting, bad rows named or skipped, the check before a run."""

import json

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from pmod_cli.core.errors import PmodError
from pmod_cli.data.check import check_rows, refuse_bad
from pmod_cli.data.collator import Collator
from pmod_cli.data.conversation import BadRow, from_llava, from_messages
from pmod_cli.data.dataset import RowEncoder, build_dataset
from pmod_cli.data.rendered import IGNORED
from tests import factories
from tests.data.rows import said, settings, write
from tests.data.tokenizers import processor_of
from tests.factories import KINDS


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
