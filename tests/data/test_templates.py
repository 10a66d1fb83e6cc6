"""Tokens and labels of conversations: equal to the published rules, on ordinary and on tricky ones."""

from itertools import pairwise

import pytest

from pmod_cli.core.errors import PmodError
from pmod_cli.data.conversation import BadRow, ChatTurn, Conversation, from_llava
from pmod_cli.data.dataset import RowEncoder
from pmod_cli.data.rendered import IGNORED, encode
from pmod_cli.data.templates import renderer
from tests.data import published
from tests.data.tokenizers import processor_of
from tests.factories import KINDS

TEMPLATES = ("vicuna_v1", "mistral", "llama3", "qwen")

# Each: turns in order, human first unless said otherwise. "<image>" makes it a row with an image.
SAID = {
    "one round": ["<image>\nWhat is in the picture?", "A red circle."],
    "several rounds": ["<image>\nWhat?", "Two dogs.", "And cars?", "No.", "Where is it?", "In the street."],
    "text only": ["What is a street?", "A place for cars.\n\nAnd people."],
    "image in the middle": ["Look at <image> and describe it.", "It shows people."],
    "image at the end": ["Describe the image in detail.\n<image>", "Cars."],
    "image in a later round": ["Hello", "Yes?", "What is <image>", "A dog."],
    "image and nothing else": ["<image>", "A dog."],
    "empty answer within": ["<image>\nWhat?", "", "And now?", "A dog."],
    "empty answer at the end": ["What?", "A dog.", "And?", ""],
    "empty question": ["", "A dog."],
    "empty question later": ["What?", "A dog.", "", "Cars."],
    "question at the end": ["<image>\nWhat?", "A dog.", "And the cars?"],
    "separator in an answer": ["What?", "The text reads ASSISTANT: yes", "And?", "No."],
    "separator in a question": ["Say USER: a ASSISTANT: b", "a b"],
    "instruction marks in a question": ["Say [INST] a [/INST] b", "a b"],
    "end of sequence in an answer": ["What?", "It ends </s> here", "And?", "No."],
    "end of sequence at its end": ["What?", "It ends</s>"],
    "end of sequence in a question": ["What is </s> for?", "The end."],
    "chat marks in an answer": ["What?", "<|im_end|>\n<|im_start|>user\n<|eot_id|> no"],
    "spaces around": ["  <image>\n  What?  ", "   A dog.  \n"],
    "a new line first": ["What?", "\nA dog\n\n\nand cars"],
    "letters of several bytes": ["Wie heißt der große Hund? 😀", "Er heißt Rex ☃ 狗."],
    "image in an answer": ["Show a dog.", "Here: <image>"],
    "an answer first": ["gpt:Hello!", "What?", "A dog."],
}


def turns_of(said):
    who = ("human", "gpt")
    return [("gpt", text[4:]) if text.startswith("gpt:") else (who[(n - said[0].startswith("gpt:")) % 2], text)
            for n, text in enumerate(said)]  # fmt: skip


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", SAID)
def test_tokens_and_labels_are_the_published_ones(template, name):
    turns = turns_of(SAID[name])
    has_image = any("<image>" in text for _, text in turns)
    row = {"conversations": [{"from": who, "value": text} for who, text in turns]} | (
        {"image": "a.png"} if has_image else {}
    )
    processor = processor_of(template)
    if template == "mistral" and name == "empty question":
        with pytest.raises(BadRow, match="the first question is empty"):
            renderer(template, processor)(from_llava(row).turns)
        return
    encoded = encode(renderer(template, processor)(from_llava(row).turns), processor.tokenizer, 4096)
    ids = encoded.ids.tolist()
    for place in encoded.images:
        ids[place] = published.PLACE
    expected_ids, expected_labels = published.learned(template, turns, has_image)
    assert ids == expected_ids
    assert encoded.labels.tolist() == expected_labels
    if name in ("one round", "several rounds", "text only", "image in the middle"):
        assert any(label != IGNORED for label in expected_labels)


def test_tricky_conversations_that_are_given_no_label():
    """What the table above relies on: these rows teach nothing under vicuna_v1, and the others do."""
    silent = {
        *("empty answer at the end", "empty question", "empty question later", "question at the end"),
        *("separator in an answer", "separator in a question"),
        *("end of sequence in an answer", "end of sequence at its end", "end of sequence in a question"),
    }
    for name, said in SAID.items():
        turns = turns_of(said)
        _, labels = published.learned("vicuna_v1", turns, any("<image>" in text for _, text in turns))
        assert (set(labels) == {IGNORED}) == (name in silent), name


@pytest.mark.parametrize("template", TEMPLATES)
def test_what_is_learned_reads_as_the_answers(template):
    processor = processor_of(template)
    turns = [
        ChatTurn("user", "What is it?"),
        ChatTurn("assistant", "A dog."),
        ChatTurn("user", "And?"),
        ChatTurn("assistant", "Cars."),
    ]
    encoded = encode(renderer(template, processor)(turns), processor.tokenizer)
    spans, current = [], []
    for token in encoded.labels.tolist():
        if token != IGNORED:
            current.append(token)
        elif current:
            spans, current = [*spans, current], []
    read = [processor.tokenizer.decode(span) for span in [*spans, current] if span]
    answers = [text for text in read if "dog" in text or "Cars" in text]
    assert len(answers) == 2
    assert answers[0].count("A dog.") == answers[1].count("Cars.") == 1
    assert "What" not in "".join(read)


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_system_turn_replaces_the_template_s_own(template):
    processor = processor_of(template)
    text = renderer(template, processor)(
        [ChatTurn("system", "Be brief."), ChatTurn("user", "a"), ChatTurn("assistant", "b")]
    ).text
    assert "Be brief." in text
    assert "helpful" not in text
    encoded = encode(
        renderer(template, processor)(
            [ChatTurn("system", "Be brief."), ChatTurn("user", "a"), ChatTurn("assistant", "b")]
        ),
        processor.tokenizer,
    )
    assert "brief" not in processor.tokenizer.decode(encoded.labels[encoded.labels != IGNORED])


def test_a_break_behind_the_limit_leaves_the_labels_before_it():
    """The published code compares lengths only below model_max_length."""
    processor = processor_of("vicuna_v1")
    said = [("human", "What?"), ("gpt", "A dog. " * 20), ("human", "And then?"), ("gpt", "It </s> ends.")]
    said += [("human", "Where?"), ("gpt", "In the street.")]
    turns = [ChatTurn({"human": "user", "gpt": "assistant"}[who], text) for who, text in said]
    rendered = renderer("vicuna_v1", processor)(turns)
    for limit in (40, 4096):
        _, expected = published.by_round(
            rendered.text, " ASSISTANT: ", processor.tokenizer, has_image=True, longest=limit
        )
        assert encode(rendered, processor.tokenizer, limit).labels.tolist() == expected
    assert (encode(rendered, processor.tokenizer, 40).labels != IGNORED).any()


def test_plain_learns_the_caption_alone():
    processor = processor_of("plain")
    turns = [ChatTurn("user", "Give a short caption.\n<image>"), ChatTurn("assistant", "A red circle.")]
    encoded = encode(renderer("plain", processor)(turns), processor.tokenizer)
    assert encoded.images.tolist() == [1]
    assert encoded.labels[:2].tolist() == [IGNORED, IGNORED]
    assert processor.tokenizer.decode(encoded.labels[2:]) == "A red circle.\n"
    with pytest.raises(BadRow, match="one question with an image, and one answer"):
        renderer("plain", processor)([ChatTurn("user", "no image"), ChatTurn("assistant", "b")])


def test_templates_refuse_what_they_cannot_hold():
    two = [ChatTurn("user", "a"), ChatTurn("user", "b"), ChatTurn("assistant", "c")]
    for template in ("vicuna_v1", "mistral"):
        with pytest.raises(BadRow, match="two turns of the user in a row"):
            renderer(template, processor_of(template))(two)
    for template in ("llama3", "qwen"):
        assert "a" in renderer(template, processor_of(template))(two).text
    with pytest.raises(PmodError, match=r"template qwen needs <\|im_start\|>"):
        renderer("qwen", processor_of("vicuna_v1"))
    with pytest.raises(PmodError, match="unknown conversation template 'v2'"):
        renderer("v2", processor_of("vicuna_v1"))
    without = processor_of("vicuna_v1")
    without.chat_template = "{{ messages }}"
    with pytest.raises(PmodError, match="does not mark the assistant's words"):
        renderer("auto", without)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", ["vicuna_v1", "llama3"])
def test_token_ids_are_those_of_the_processor_at_inference(kind, template):
    """The same text through the stock processor: image places expanded in the same way, to the same ids."""
    from PIL import Image

    processor = processor_of(template, kind)
    turns = (ChatTurn("user", "<image>\nWhat is it?"), ChatTurn("assistant", "A dog."))
    image = Image.new("RGB", (70, 41), "red")
    text = renderer(template, processor)(turns).text
    stock = processor(text=[text], images=[image], add_special_tokens=template == "vicuna_v1")
    row = RowEncoder(processor, template)(Conversation(turns, (image,)))
    assert row["input_ids"].tolist() == stock["input_ids"][0]


def test_offsets_are_needed_in_order():
    """Labels are found by where tokens begin in the text; these never go back."""
    processor = processor_of("vicuna_v1")
    text = renderer("vicuna_v1", processor)(
        [ChatTurn("user", "Wie heißt 狗?"), ChatTurn("assistant", "Er heißt ☃.")]
    ).text
    starts = [start for start, _ in processor.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]]
    assert all(one <= other for one, other in pairwise(starts))
