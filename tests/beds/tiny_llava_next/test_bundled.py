"""The bundled tiny model: a stock LLaVA-NeXT checkpoint, small, 32 layers deep, that reads what it is shown."""

import json

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaNextForConditionalGeneration

from pmod_cli.calibration.asked import Asked
from pmod_cli.calibration.depth import ALL, measure_depth, over_tasks
from pmod_cli.calibration.replay import Replay
from pmod_cli.calibration.samples import read_samples
from pmod_cli.checkpoints import bundled_path, load_model
from pmod_cli.core.errors import PmodError
from pmod_cli.data.collator import Collator
from pmod_cli.data.documents import CELL, TASKS, draw, seed_of
from pmod_cli.data.rows import conversation, row
from tests.beds.tiny_llava_next.measure import (
    answer_tokens,
    answers,
    hidden_answers,
    hidden_vision,
    kinds,
    prompts,
    unseen_documents,
)
from tests.beds.tiny_llava_next.processor import CHAT_TEMPLATE

UNSEEN = 5  # questions a task


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(bundled_path())


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(bundled_path(), dtype=torch.float32).eval()


def test_it_is_a_small_stock_checkpoint_of_32_layers(model):
    config = json.loads((bundled_path() / "config.json").read_text())
    assert config["model_type"] == "llava_next"
    assert "pmod" not in config
    assert config["text_config"]["num_hidden_layers"] == len(model.model.language_model.layers) == 32
    assert type(model) is LlavaNextForConditionalGeneration
    assert sum(file.stat().st_size for file in bundled_path().iterdir()) <= 10_000_000
    assert not [file.name for file in bundled_path().iterdir() if file.suffix in {".bin", ".pt", ".py"}]


@pytest.mark.slow
def test_it_reads_unseen_documents_and_cannot_without_the_image_or_what_is_asked(model, processor):
    share = {}
    for control in (None, "blank", "hidden"):
        hits = dict.fromkeys((*TASKS, "chart, longest"), 0)
        for task in TASKS:
            documents = unseen_documents(task, UNSEEN)
            inputs = prompts(processor, documents, blank=control == "blank")
            with hidden_vision(model, hidden_answers(model, inputs, documents) & (control == "hidden")):
                said = answers(model, processor, inputs)
            for answer, document in zip(said, documents, strict=True):
                hits[kinds(document)] += answer == document.turns[0].answer
        share[control] = sum(hits.values()) / (UNSEEN * len(TASKS))
        if control == "hidden":
            assert hits["doc"] + hits["above"] <= 0.25 * 2 * UNSEEN, "a number that stands nowhere cannot be read"
    assert share[None] >= 0.85
    assert share["blank"] <= 0.4
    assert share["hidden"] <= 0.6


def test_hidden_answers_are_the_tokens_of_their_patches(model, processor):
    for size in ((96, 96), (96, 48)):
        document = draw("doc", seed_of("test", 5), size)
        (x0, y0, x1, _), columns = document.turns[0].region, size[0] // CELL
        whole, tiles = (y0 * 6 // size[1]) * 6, 36 + y0 // CELL * (columns + 1)
        wanted = {whole + x * 6 // size[0] for x in range(x0, x1, CELL)} | {
            tiles + x // CELL for x in range(x0, x1, CELL)
        }
        assert set(answer_tokens(document)) == wanted
        inputs = prompts(processor, [document])
        (place,) = torch.where(inputs["input_ids"][0] == model.config.image_token_index)
        assert set((hidden_answers(model, inputs, [document])[0].nonzero()[:, 0] - place[0]).tolist()) == wanted


def test_a_batch_of_mixed_shapes_says_what_single_prompts_say(model, processor):
    documents = [draw("doc", seed_of("test", 1)), draw("doc", seed_of("test", 2), (96, 48))]
    together = answers(model, processor, prompts(processor, documents))
    assert together == [answers(model, processor, prompts(processor, [document]))[0] for document in documents]


@pytest.mark.parametrize(("size", "tokens"), [((96, 96), 192), ((96, 48), 114), ((48, 96), 120)])
def test_anyres_counts_a_base_view_tiles_and_newlines(processor, model, size, tokens):
    assert tokens == 6 * 6 + (size[1] // 8) * (size[0] // 8 + 1)
    inputs = processor(text="USER: <image>\nASSISTANT:", images=Image.new("RGB", size), return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_index).sum() == tokens
    with torch.no_grad():
        (features,) = model.model.get_image_features(
            inputs["pixel_values"], inputs["image_sizes"], return_dict=True
        ).pooler_output
        assert features.shape == (tokens, model.config.text_config.hidden_size)
        model(**inputs)


@pytest.mark.parametrize("text", ["hello, world 2048", "what is the price of tea?", "the qr-code: x1 (3.5%)", "A b C"])
def test_any_lower_case_text_is_spelt_and_read_back(processor, text):
    ids = processor.tokenizer(text, add_special_tokens=False).input_ids
    assert processor.tokenizer.unk_token_id not in ids
    assert processor.decode(ids).replace(" ", "") == text.lower().replace(" ", "")


def test_the_template_speaks_as_llava_does(processor):
    document = draw("doc", 1)
    first, second = document.turns[:2]
    rendered = processor.apply_chat_template(conversation(document, [first, second]), tokenize=False)
    assert rendered == (
        f"USER: <image>\n{first.question} ASSISTANT: {first.answer}</s>"
        f"USER: {second.question} ASSISTANT: {second.answer}</s>"
    )
    system = {"role": "system", "content": [{"type": "text", "text": "be kind"}]}
    spoken = processor.apply_chat_template([system, *conversation(document, [first, second])], tokenize=False)
    assert spoken == f"be kind {rendered}"
    assert processor.chat_template == CHAT_TEMPLATE


def test_the_collator_labels_what_the_assistant_says(processor):
    documents = [draw(task, seed_of("train", 3)) for task in TASKS]
    batch = Collator(processor)([row(document) for document in documents])
    for ids, labels, document in zip(batch["input_ids"], batch["labels"], documents, strict=True):
        labelled = labels >= 0
        assert torch.equal(ids[labelled], labels[labelled])
        said = processor.decode(labels[labelled]).replace(" ", "").split("</s>")
        assert said == [turn.answer for turn in document.turns] + [""]


def test_the_collator_refuses_an_image_too_many_and_a_template_without_marks(processor):
    document = draw("doc", 1)
    with pytest.raises(PmodError, match="2 images, and 1 <image> place"):
        Collator(processor)([row(document) | {"images": [document.image] * 2}])
    unmarked = AutoProcessor.from_pretrained(bundled_path())
    unmarked.chat_template = "<image>{{ messages[0]['role'] }}"
    with pytest.raises(PmodError, match="does not mark"):
        Collator(unmarked)([row(document)])


def test_kinds_tell_the_longest_bar_apart():
    found = {kinds(document) for task in TASKS for document in unseen_documents(task, 8)}
    assert found == {*TASKS, "chart, longest"}


@pytest.mark.slow
def test_few_layers_are_idle_and_images_are_read_at_more_than_one_depth(processor):
    model, _ = load_model(bundled_path(), dtype="float32")
    batches = Asked(model, processor).batches(read_samples("tiny", 24))
    found = over_tasks(measure_depth(Replay(model), batches))
    assert found[ALL].idle <= 12, "of 32; the exact number is of more documents (docs/results.md)"
    assert max(found[task].last_read for task in TASKS) >= 24
    assert {layer // 8 for task in TASKS for layer in found[task].reads_at} >= {0, 2, 3}
