"""Training of small-llava-next: what a patch shows, the questions, the losses and LoRA do what they claim."""

import re

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from tokenizers import Tokenizer, models
from torch.nn import functional as F
from transformers import AutoProcessor, LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedTokenizerFast

from pmod_cli.checkpoints import bundled_path
from pmod_cli.data.documents import CELL, COLOURS, LABELS, SHAPES, draw
from tests.beds.small_llava_next.align import UNKNOWN, WORDS, Alignment, shown
from tests.beds.small_llava_next.build import lora_updates
from tests.beds.small_llava_next.pretrain import LINEAR, asked, causal_attention, in_model, label_weights, owned
from tests.beds.tiny_llava_next.pretrain import Masters

TILE = 48


def tile_words(document):
    """The words of the tile patches of a 96x96 document as 12 rows of 12."""
    tiles = shown([document], TILE)[36:].view(2, 2, 6, 6).permute(0, 2, 1, 3).reshape(12, 12)
    return [[WORDS[i] if i >= 0 else "?" for i in line] for line in tiles.tolist()]


def test_patches_of_a_receipt_show_its_lines():
    document = draw("doc", 6)
    lines = {"".join(line).replace("blank", " ").strip() for line in tile_words(document)}
    for turn in document.turns:
        label = re.fullmatch(r"what is the price of (\w+)\?", turn.question)[1]
        assert f"{label} {turn.answer}" in lines


def test_patches_of_a_chart_show_how_long_a_bar_is_and_which_is_the_longest_in_view():
    document = draw("chart", 6)
    rows = {mark.belongs: mark.box[1] // CELL for mark in document.marks if mark.shows == "bar"}
    value = {re.fullmatch(r"what is the value of (\w+)\?", t.question)[1]: int(t.answer) for t in values(document)}
    words, base = tile_words(document), [WORDS[i] for i in shown([document], TILE)[:36].tolist() if i >= 0]
    bands = [{label for label, row in rows.items() if row // 6 == band} for band in (0, 1)]
    assert all(bands)
    for label, row in rows.items():
        longest = label == max(bands[row // 6], key=value.get)
        assert words[row][6] == ("longest" if longest else "bar")
        assert set(words[row][6::2]) <= {words[row][6], "blank", "?"}
        assert value[label] < 20 or words[row][7] == str(value[label] // 10)
    assert {"longest", "bar"} <= set(base)


def values(document):
    """The turns of a chart that ask for a value."""
    return [turn for turn in document.turns if turn.answer.isdigit()]


def test_patches_of_objects_show_colour_and_shape_in_both_views():
    document = draw("attribute", 6)
    objects = {f"{mark.shows} {mark.belongs}" for mark in document.marks}
    for view in (shown([document], TILE)[:36], shown([document], TILE)[36:]):
        lines = [" ".join(WORDS[i] if i >= 0 else "?" for i in line) for line in view.view(-1, 6).tolist()]
        assert all(any(there in line for line in lines) for there in objects)
        told = {pair for line in lines for pair in re.findall(f"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})", line)}
        assert {" ".join(pair) for pair in told} == objects


def test_alignment_is_least_at_the_words_themselves():
    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    embeddings = torch.randn(len(WORDS), 64)
    alignment = Alignment(tokenizer, embeddings, {"sharpness": 16.0, "distance": 0.2})
    patches = torch.tensor([3, 40, UNKNOWN])
    features = torch.stack([alignment.words[3], alignment.words[40], torch.randn(64)])
    loss, right = alignment(features, patches)
    assert right == 1
    assert loss < alignment(features + 0.3 * torch.randn(3, 64), patches)[0]
    assert alignment(features[[1, 0, 2]], patches)[1] == 0
    assert torch.equal(loss, alignment(features + torch.tensor([[0.0], [0.0], [9.0]]), patches)[0])  # unknown: no part


@pytest.mark.parametrize("task", ["doc", "chart", "attribute", "presence"])
def test_questions_are_true_and_no_answer_tells_a_later_one(task):
    for seed in range(40):
        document = draw(task, seed)
        turns = asked(document)
        assert turns
        if task == "doc":
            assert len(turns) == 3
            assert all(turn in document.turns for turn in turns)
            continue
        if task == "chart":
            assert turns[0] in document.turns
            assert turns[0].question.startswith("which bar is the longest")
            assert turns[3] in document.turns
            for turn in turns[1:3]:
                number = re.fullmatch(r"which bar has the value (\d+)\?", turn.question)[1]
                assert [t.answer for t in document.turns if turn.answer in t.question] == [number]
            told = [turn.answer for turn in turns[:3]]
            assert len({*told, re.search(r"of (\w+)", turns[3].question)[1]}) == 4
            continue
        objects = [(mark.shows, mark.belongs) for mark in document.marks]
        told = []
        for turn in turns:
            if found := re.fullmatch(r"is there a (\w+) (\w+)\?", turn.question):
                assert turn.answer == ("yes" if found.groups() in objects else "no")
                told += [found.groups()] * (turn.answer == "yes")
            elif found := re.fullmatch(r"what colour is the (\w+)\?", turn.question):
                assert [c for c, s in objects if s == found[1]] == [turn.answer]
                told.append((turn.answer, found[1]))
            else:
                colour = re.fullmatch(r"what shape is the (\w+) object\?", turn.question)[1]
                assert [s for c, s in objects if c == colour] == [turn.answer]
                told.append((colour, turn.answer))
        assert len(set(told)) == len(told)
        assert task == "attribute" or sorted(told) == sorted(objects)


def test_patches_of_digits_and_bars_are_told_the_label_of_their_line():
    document = draw("chart", 6)
    vision = torch.zeros(2, 230, dtype=torch.bool)
    vision[0, 3 : 3 + 36 + 12 * 13] = True
    vision[1, 9 : 9 + 36 + 12 * 13] = True
    for start, owners in zip((3, 9), owned([document, document], vision), strict=True):
        lines = owners[start + 36 : start + 36 + 12 * 13].view(12, 13)
        for line, words in zip(lines.tolist(), tile_words(document), strict=True):
            label = "".join(words[:3])
            told = {LABELS[owner] for owner in line if owner >= 0}
            assert told == ({label} if label in LABELS else set())
            assert label not in LABELS or (line[:4] == [-1] * 4 and min(line[4:7]) >= 0 and line[12] == -1)
        assert (owners >= 0).sum() == (lines >= 0).sum()


def test_lora_goes_back_into_the_model_under_its_name():
    config = LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4)
    model = torch.nn.ModuleDict({"model": torch.nn.ModuleDict({"language_model": LlamaModel(config)})})
    inject_adapter_in_model(LoraConfig(target_modules=LINEAR, r=2), model)
    lora = [name for name, _ in model.named_parameters() if "lora_" in name]
    assert len(lora) == 2 * 7
    for name in lora:
        in_file = name.replace("model.language_model.", "language_model.model.").replace(".default.", ".")
        assert in_model(in_file) == name


def test_causal_attention_is_the_stock_one():
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 11, 8, requires_grad=True) for heads in (6, 2, 2))
    ours, _ = causal_attention(None, query, key, value, None, scaling=0.3)
    stock = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(ours, stock.transpose(1, 2))
    weights = torch.randn_like(ours)
    one = torch.autograd.grad((ours * weights).sum(), (query, key, value))
    other = torch.autograd.grad((stock.transpose(1, 2) * weights).sum(), (query, key, value))
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b)


def test_masters_keep_steps_that_bfloat16_would_lose():
    model = torch.nn.Linear(3, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    masters, parameter = Masters(model), model.weight
    assert parameter.dtype == torch.bfloat16
    optimizer = torch.optim.SGD(masters.parameters(), lr=1.0)
    for _ in range(8):
        (parameter * 0.001).sum().backward()
        masters.take_gradients()
        optimizer.step()
        masters.write()
    assert parameter.detach().tolist() == [pytest.approx([0.992] * 3, abs=0.004)]
    assert parameter.grad is None


def test_lora_in_the_delta_is_what_peft_computes():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    decoder = torch.nn.ModuleDict({"language_model": LlamaForCausalLM(config)}).eval()
    ids = torch.randint(0, 90, (1, 7))
    settings = {"r": 3, "lora_alpha": 6}
    inject_adapter_in_model(LoraConfig(target_modules=LINEAR, **settings), decoder)
    delta = {}
    for name, tensor in decoder.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(tensor, std=0.1)
            delta[name.replace(".default.", ".")] = tensor.detach()
    updates = lora_updates(delta, settings)
    assert len(updates) == 2 * 7
    plain = torch.nn.ModuleDict({"language_model": LlamaForCausalLM(config)}).eval()
    weights = {name.replace(".base_layer", ""): tensor for name, tensor in decoder.state_dict().items()}
    for name, update in updates.items():
        weights[name] = weights[name] + update.float()
    plain.load_state_dict({name: tensor for name, tensor in weights.items() if "lora_" not in name})
    with torch.no_grad():
        torch.testing.assert_close(
            plain["language_model"](ids).logits, decoder["language_model"](ids).logits, atol=1e-5, rtol=1e-4
        )


def test_labels_count_by_their_kind():
    processor = AutoProcessor.from_pretrained(bundled_path())
    ids = processor.tokenizer("yes red 4", add_special_tokens=False).input_ids
    labels = torch.tensor([[*ids, processor.tokenizer.eos_token_id]])
    weights = {"number": 1.0, "word": 2.0, "yes_no": 3.0, "end": 0.5}
    assert label_weights(processor, labels, weights).tolist() == [[3.0, 2.0, 1.0, 0.5]]
