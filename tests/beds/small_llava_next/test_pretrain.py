"""Training of small-llava-next: what a patch shows, the questions, the losses and LoRA do what they claim."""

import re

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from tokenizers import Tokenizer, models
from torch.nn import functional as F
from transformers import AutoProcessor, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pmod_cli.checkpoints import bundled_path
from pmod_cli.data.documents import COLOURS, SHAPES, draw
from tests.beds.small_llava_next.align import UNKNOWN, WORDS, Alignment, shown
from tests.beds.small_llava_next.build import lora_updates
from tests.beds.small_llava_next.pretrain import LINEAR, asked, causal_attention, label_weights
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


def test_patches_of_a_chart_show_how_long_a_bar_is_and_which_is_the_longest():
    document = draw("chart", 6)
    values = [int(turn.answer) for turn in document.turns if turn.answer.isdigit()]
    lines = [line[6:] for line in tile_words(document) if line[6] == "bar"]
    told = {"longest", *(str(value // 10) for value in values if 20 < value < max(values))}
    assert {line[1] for line in lines} - {"blank", "?"} == told
    assert all(set(line[::2]) <= {"bar", "blank", "?"} for line in lines)


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
        if task in ("doc", "chart"):
            assert len(turns) == 3
            assert all(turn in document.turns for turn in turns)
            assert all(turn.answer.isdigit() for turn in turns[1 if task == "chart" else 0 :])
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
