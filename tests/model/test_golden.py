"""Parity with the published code: logits, kept tokens, generated ids, loss and gradients of tests/golden."""

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from pmod_cli.model import capture_selection, kept_tokens
from tests.model.published import GOLDEN, expanded, golden, info, our_model, our_name

ATTENTIONS = ("sdpa", "eager")


@pytest.fixture(scope="module")
def cases():
    """Inputs of both cases by prefix: keyword arguments for the model, plus `labels` and `padding` where they exist."""
    made = {}
    inputs = golden("llava15", "inputs")
    for prefix, pixels, counts in (
        ("single", inputs["pixel_values"][:1], [36]),
        ("batch", inputs["pixel_values"], [36, 36]),
        (
            "mixed",
            inputs["mixed.pixel_values"][:1],
            [36],
        ),  # row 1 is text: the published code's dummy image is not ours
    ):
        made["llava15", prefix] = _case("llava15", inputs, prefix, counts) | {"pixel_values": pixels}
    inputs = golden("next", "inputs")
    sizes = inputs["image_sizes_wh"].flip(1)
    tiles = [inputs["pixel_values.0"], inputs["pixel_values.1"]]
    stacked = torch.stack([F.pad(tile, (0, 0, 0, 0, 0, 0, 0, 5 - len(tile))) for tile in tiles])
    counts = [info("next")["sdpa"]["single0.vision_tokens"]]
    both = info("next")["sdpa"]["batch.vision_tokens"]
    made["next", "single0"] = _case("next", inputs, "single0", counts) | {
        "pixel_values": stacked[:1],
        "image_sizes": sizes[:1],
    }
    made["next", "batch"] = _case("next", inputs, "batch", both) | {"pixel_values": stacked, "image_sizes": sizes}
    return made


@pytest.fixture(scope="module")
def model_of():
    """`model_of(case, attention)`: each model is loaded once; a test must leave it as it was."""
    return cache(lambda case, attention="sdpa": our_model(case, attention=attention))


def _case(case, inputs, prefix, counts):
    ids = inputs[f"{prefix}.input_ids"]
    if f"{prefix}.attention_mask" not in inputs:
        merged = expanded(case, ids, counts)
        return {"input_ids": merged, "attention_mask": torch.ones_like(merged)}
    merged, mask = expanded(case, ids, counts, others=inputs[f"{prefix}.attention_mask"])
    _, labels = expanded(case, ids, counts, fill=-100, others=inputs[f"{prefix}.labels"])
    width = int(mask.sum(dim=1).max())  # the published code drops the padding of the placeholders' batch first
    return {"input_ids": merged[:, :width], "attention_mask": mask[:, :width], "labels": labels[:, :width]}


def _real(tensor, mask):
    return tensor[mask.bool()]


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize(
    "key", [("llava15", "single"), ("llava15", "batch"), ("llava15", "mixed"), ("next", "single0"), ("next", "batch")]
)
def test_logits_loss_and_kept_tokens(cases, model_of, key, attention):
    case, prefix = key
    expected = golden(case, f"outputs_{attention}")
    inputs = cases[key]
    model = model_of(case, attention)
    with torch.no_grad(), capture_selection(model) as record:
        outputs = model(**inputs)
    mask = inputs["attention_mask"]
    length = mask.shape[1]
    torch.testing.assert_close(
        _real(outputs.logits, mask), _real(expected[f"{prefix}.logits"][:, :length], mask), atol=1e-4, rtol=0
    )
    if "labels" in inputs:
        torch.testing.assert_close(outputs.loss, expected[f"{prefix}.loss"][0], atol=1e-5, rtol=0)
    selections = golden(case)
    if f"{prefix}.mod.8.kept_mask" not in selections:
        return
    assert sorted(record.layers) == list(range(8, 32))
    for layer, selection in record.layers.items():
        name = f"{prefix}.mod.{layer}"
        assert torch.equal(selection.kept, selections[f"{name}.kept_mask"].bool()), f"kept tokens of layer {layer}"
        assert torch.equal(selection.K.int(), selections[f"{name}.k"].reshape(-1)), f"K of layer {layer}"
        weights, logits = selections[f"{name}.router_weight"], selections[f"{name}.router_logit"]
        torch.testing.assert_close(_real(selection.weight, mask), _real(weights, mask), atol=1e-4, rtol=0)
        vision = record.vision_mask
        torch.testing.assert_close(selection.logit[vision], logits[vision], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("case", "prefix"), [("llava15", "single"), ("llava15", "batch"), ("next", "batch")])
def test_hidden_states(cases, model_of, case, prefix):
    expected = golden(case)
    inputs = cases[case, prefix]
    with torch.no_grad():
        hidden = model_of(case)(**inputs, output_hidden_states=True).hidden_states
    checked = [layer for layer in range(33) if f"{prefix}.hidden.{layer}" in expected]
    assert {0, 8, 9, 20, 31, 32} <= set(checked)
    for layer in checked:
        ours, theirs = (
            _real(x, inputs["attention_mask"]) for x in (hidden[layer], expected[f"{prefix}.hidden.{layer}"])
        )
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4, msg=lambda m, n=layer: f"layer {n}: {m}")


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("key", [("llava15", "single"), ("next", "single0")])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_greedy_generation(cases, model_of, key, attention, kind):
    case, prefix = key
    expected = golden(case, f"outputs_{attention}")
    inputs = cases[key]
    model = model_of(case, attention)
    generated = model.generate(
        **inputs,
        max_new_tokens=12,
        min_new_tokens=12,
        do_sample=False,
        cache_implementation=kind,
        disable_compile=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    length = inputs["input_ids"].shape[1]
    assert generated.sequences[:, length:].tolist() == expected[f"{prefix}.gen_ids"].tolist()
    logits = torch.stack(generated.logits, dim=1)
    torch.testing.assert_close(logits, expected[f"{prefix}.gen_logits"], atol=1e-4, rtol=0)
    slots = info(case)["sdpa"][f"{prefix}.kv_len_after_prefill"]
    held = [layer.keys.shape[2] for layer in generated.past_key_values.layers]
    room = 11 if kind == "dynamic" else held[0] - length
    assert held == [prefill + room for prefill in slots]


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_cache_contents_text_and_chunk(cases, model_of, attention):
    """K and V of the prefill, three tokens at once on top of it, and a text-only prompt."""
    expected = golden("llava15", f"outputs_{attention}")
    inputs = golden("llava15", "inputs")
    model = model_of("llava15", attention)
    with torch.no_grad():
        prefill = model(**cases["llava15", "single"], use_cache=True)
        keys = {name: tensor for name, tensor in golden("llava15").items() if name.startswith("single.cache_")}
        for name, tensor in keys.items():
            layer = prefill.past_key_values.layers[int(name.rsplit(".", 1)[1])]
            torch.testing.assert_close(layer.keys if "cache_k" in name else layer.values, tensor, atol=1e-4, rtol=0)
        chunk = model(input_ids=inputs["chunk.input_ids"], past_key_values=prefill.past_key_values)
        text = model(input_ids=inputs["text.input_ids"])
    assert keys
    torch.testing.assert_close(chunk.logits, expected["chunk.logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(text.logits, expected["text.logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("case", ["llava15", "next"])
def test_gradients(cases, case, checkpointing):
    expected = golden(case)
    model = our_model(case).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    model(**cases[case, "batch"], use_cache=False).loss.backward()
    ours = dict(model.named_parameters())
    prefix = "batch.grad."
    names = [name.removeprefix(prefix) for name in expected if name.startswith(prefix)]
    assert sum(".router." in name for name in names) == 48
    worst = {}
    for name in names:
        theirs, gradient = expected[prefix + name], ours[our_name(name)].grad
        # Layer 30's router moves the loss by 1e-6 only: there float32 is off by 5 % (ours and the published code's
        # alike, against ours in float64), so what counts is the difference beside the gradients that can be resolved.
        worst[name] = float((gradient - theirs).norm() / theirs.norm().clamp_min(1e-3))
    assert max(worst.values()) < 1e-4, sorted(worst.items(), key=lambda item: -item[1])[:3]


@pytest.mark.parametrize(
    ("variant", "pmod"),
    [
        ("plain", {"schedule": "list", "values": [1.0] * 32}),
        ("interleave_0.3", {"schedule": "interleaved", "mean": 0.65}),
        ("shiftedlinear_0.85_0.15", {"schedule": "linear", "shift": 0.5}),
        ("norm_softmax", {"norm": "softmax"}),
        ("norm_tanh_0.5_1", {"norm": "tanh", "alpha": 0.5}),
        ("norm_tanh_0.5_1", {"norm": "tanh_0.5_1"}),
    ],
)
def test_options(cases, variant, pmod):
    details = info("options")[variant]
    model = our_model("llava15", pmod=pmod)
    bank = load_file(GOLDEN / "llava15" / "router_bank.safetensors")
    assert model.config.routed_layers == details["mod_layers"]
    for layer in details["mod_layers"]:
        router = model.model.language_model.layers[layer].router
        router.weight.data.copy_(bank[f"router.{layer}.weight"] * details["router_scale"])
        router.bias.data.copy_(bank[f"router.{layer}.bias"] * details["router_scale"])
        assert model.config.retention[layer] == pytest.approx(details["ratio"][str(layer)], abs=1e-9)
        assert kept_tokens(36, model.config.retention[layer]) == details["k"][str(layer)]
    expected = golden("options")
    with torch.no_grad(), capture_selection(model) as record:
        logits = model(**cases["llava15", "single"]).logits
    torch.testing.assert_close(logits, expected[f"{variant}.logits"], atol=1e-4, rtol=0)
    for layer, selection in record.layers.items():
        if f"{variant}.mod.{layer}.kept_mask" in expected:
            assert torch.equal(selection.kept, expected[f"{variant}.mod.{layer}.kept_mask"].bool())
