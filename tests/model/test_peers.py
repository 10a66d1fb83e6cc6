"""Parity with the published code of other methods (tests/golden/peers): kept tokens exact, logits to 1e-4, ids exact.

Where a number of tokens is rounded or cut otherwise there, the ratio is chosen so that as many are kept.
"""

from functools import cache

import pytest
import torch
from safetensors.torch import load_file

from pmod_cli.model import capture_selection
from pmod_cli.model.attention_rows import attention_rows
from pmod_cli.model.routing import Routing
from tests.model.published import GOLDEN, expanded, golden, image_token, info, our_model

LAYERS = 32
GREEDY = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
model_of = cache(our_model)


@cache
def inputs_of(case: str, prompt: str) -> dict[str, torch.Tensor]:
    """What the published code was asked, in our form."""
    inputs, row = golden(case, "inputs"), int(prompt[-1])
    if case == "llava15":
        ids = inputs["single.input_ids"] if row == 0 else inputs["batch.input_ids"][:1]
        return {"input_ids": expanded(case, ids, [36]), "pixel_values": inputs["pixel_values"][row : row + 1]}
    ids, tokens = (inputs["single0.input_ids"], 126) if row == 0 else (inputs["batch.input_ids"][1:], 144)
    if row:
        ids = ids[:, inputs["batch.attention_mask"][1].bool()]
    return {
        "input_ids": expanded(case, ids, [tokens]),
        "pixel_values": inputs[f"pixel_values.{row}"][None],
        "image_sizes": inputs["image_sizes_wh"][row : row + 1].flip(1),
    }


def vision(case, inputs) -> torch.Tensor:
    return inputs["input_ids"][0] == image_token(case)


def share(kept: int, vision_tokens: int) -> float:
    """A ratio at which `kept` tokens are kept."""
    return 1.0 if kept == vision_tokens else (kept + 0.5) / vision_tokens


def stages(starts, kept, vision_tokens: int) -> list[float]:
    """Ratios of all layers, from the layers where stages start and the tokens that each keeps."""
    counts = {0: vision_tokens} | dict(zip(starts, kept, strict=True))
    return [share(counts[max(start for start in counts if start <= layer)], vision_tokens) for layer in range(LAYERS)]


def fastv(found, start, vision_tokens):
    """(settings of ours, layers whose kept tokens are known) of one case."""
    settings = found["settings"]
    start, kept = (
        (settings[0], int(settings[1] * vision_tokens))
        if isinstance(settings, list)
        else (settings["K"] if "K" in settings else settings["fastv_k"], settings["keep"])
    )
    return {"method": "fastv", "values": stages([start], [kept], vision_tokens)}, {"": start}


def pyramiddrop(found, start, vision_tokens):
    settings = found["settings"]
    layers, ratios = settings if isinstance(settings, list) else settings.values()
    kept = [int(vision_tokens * ratio) for ratio in ratios]
    values = stages(layers, kept, vision_tokens)
    return {"method": "pyramiddrop", "values": values, "positions": "renumbered"}, {f".{n}": n for n in layers}


def vtw(found, start, vision_tokens):
    return {"method": "vtw", "values": stages([found["settings"]["K"]], [0], vision_tokens)}, {}


def shortv(found, start, vision_tokens):
    frozen = found["settings"]["replaced_layers"]
    return {"method": "shortv", "values": [0.0 if layer in frozen else 1.0 for layer in range(LAYERS)]}, {}


def divprune(found, start, vision_tokens):
    text = found.get("seq_len_unpruned", found["seq_len"]) - vision_tokens
    values = [share(found["kv_len_after_prefill"][0] - text, vision_tokens)] * LAYERS
    return {"method": "divprune", "values": values, "positions": "renumbered"}, {"": 0}


def visionzip(found, start, vision_tokens):
    settings = found["settings"]
    values = [share(settings["tokens_fed"], vision_tokens)] * LAYERS
    return {"method": "visionzip", "values": values, "positions": "renumbered"}, {}


PEERS = {
    "fastv_inplace": fastv,
    "fastv_mask": fastv,
    "fastv_kvcache": fastv,
    "fastv_hf": fastv,
    "fastv_kvcache_next": fastv,
    "pyramiddrop": pyramiddrop,
    "pyramiddrop_next": pyramiddrop,
    "vtw": vtw,
    "shortv": shortv,
    "divprune": divprune,
    "divprune_next": divprune,
    "visionzip": visionzip,
}
UNCACHED = ("fastv_inplace", "fastv_mask")
"""They rank anew at each generated token: what our model does without a cache."""
DOUBLED = "fastv_kvcache"
"""Its layer K - 1 runs twice and its cache holds every key twice: a flaw that is not copied."""


def prompts(peer: str) -> list[str]:
    return [f"{prompt}{row}" for prompt in (["nx"] if peer.endswith("_next") else ["img"]) for row in (0, 1)]


@pytest.mark.parametrize("setting", "AB")
@pytest.mark.parametrize("prompt", ["img0", "img1"])
def test_visionzip_at_true_positions_feeds_the_same_tokens(prompt, setting):
    """Each stands at its patch and the class token at one that is dropped; none but the order is another."""
    name = f"{prompt}.{setting}"
    found = info("peers/visionzip")[name]["settings"]
    expected = load_file(GOLDEN / "peers" / "visionzip" / "outputs.safetensors")
    inputs, model = inputs_of("llava15", prompt), model_of("llava15")
    image = vision("llava15", inputs)
    model.set_method({"method": "visionzip", "values": [share(found["tokens_fed"], int(image.sum()))] * LAYERS})
    model.model.language_model.selection.contextual = found["contextual"] / found["tokens_fed"]
    with torch.no_grad(), capture_selection(model) as record:
        features = model.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output[0]
        model(**inputs)
        theirs = model.model.multi_modal_projector(expected[f"{name}.tower_output"])
    kept = record.layers[0].kept[0][image].nonzero().flatten().tolist()
    dominant, contextual = (expected[f"{name}.{which}"].tolist() for which in ("dominant", "contextual_targets"))
    (spare,) = set(kept) - {*dominant, *contextual}
    assert spare == min(set(range(int(image.sum()))) - {*dominant, *contextual})
    torch.testing.assert_close(features[[spare, *dominant, *contextual]], theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("setting", "attention"), [("A", "sdpa"), ("B", "sdpa"), ("A", "eager")])
@pytest.mark.parametrize(("peer", "prompt"), [(peer, prompt) for peer in PEERS for prompt in prompts(peer)])
def test_published_code(peer, prompt, setting, attention):
    case, name = ("next" if peer.endswith("_next") else "llava15"), f"{prompt}.{setting}"
    found = info(f"peers/{peer}")[name]
    expected = load_file(GOLDEN / "peers" / peer / "outputs.safetensors")
    inputs = inputs_of(case, prompt)
    image = vision(case, inputs)
    pmod, known = PEERS[peer](found, int(image.int().argmax()), int(image.sum()))
    model = model_of(case, attention=attention)
    model.set_method(pmod)
    if peer == "visionzip":  # each setting has a share of its own
        picks = found["settings"]
        model.model.language_model.selection.contextual = picks["contextual"] / picks["tokens_fed"]
    with torch.no_grad(), capture_selection(model) as record:
        logits = model(**inputs).logits[0]
    for suffix, layer in known.items():
        kept = (record.layers[layer].kept[0] & image).nonzero().flatten()
        assert kept.tolist() == expected[f"{name}.kept{suffix}"].tolist()
    left = torch.ones_like(image) if peer in ("shortv", "fastv_mask") else record.layers[LAYERS - 1].kept[0]
    theirs = expected[f"{name}.logits"][0]
    if peer == "fastv_mask":  # has rows of dropped tokens too, which nothing reads
        left = record.layers[LAYERS - 1].kept[0]
        theirs = theirs[left]
    torch.testing.assert_close(logits[left], theirs, atol=1e-4, rtol=0)
    done = model.generate(
        **inputs, **GREEDY, use_cache=peer not in UNCACHED, output_logits=True, return_dict_in_generate=True
    )
    assert done.sequences[:, image.numel() :].tolist() == expected[f"{name}.gen_ids"].tolist()
    theirs = expected[f"{name}.gen_logits"]
    torch.testing.assert_close(torch.stack(done.logits, dim=1), theirs, atol=1e-4, rtol=0)
    if peer not in UNCACHED:
        slots = [layer.keys.shape[2] - 11 for layer in done.past_key_values.layers]
        lengths = list(found["kv_len_after_prefill"])
        if peer.startswith(DOUBLED):
            assert lengths[known[""] - 1] == 2 * image.numel()
            lengths[known[""] - 1] = image.numel()
        assert slots == lengths


@pytest.mark.parametrize("prompt", ["img0", "img1"])
def test_one_row_of_attention_is_that_of_the_whole_square(prompt):
    """What the last token attends to in every layer, beside an eager run of LLaVA."""
    expected = load_file(GOLDEN / "peers" / "plain" / "outputs.safetensors")[f"{prompt}.last_row_attention"]
    inputs, model = inputs_of("llava15", prompt), model_of("llava15")
    model.set_method({"method": "uniform", "values": [1.0] * LAYERS})
    image, rows = vision("llava15", inputs), []

    def look(layer, args, kwargs):
        routing = Routing.build(image[None], None)
        routing.position_embeddings = kwargs["position_embeddings"]
        rows.append(attention_rows(args[0], routing, layer, routing.last)[0, 0, image])

    hooks = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in model.model.language_model.layers]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(torch.stack(rows), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("peer", ["fastv_hf", "pyramiddrop", "divprune", "visionzip", "vtw", "shortv"])
def test_on_purpose_each_row_of_a_padded_batch_is_as_alone(peer):
    """There row 0 ranks for all (FastV, DivPrune), one row is all there is, or padding is wrong or refused (others)."""
    expected = load_file(GOLDEN / "peers" / peer / "outputs.safetensors")
    alone = [inputs_of("llava15", prompt) for prompt in ("img0", "img1")]
    longest = max(inputs["input_ids"].shape[1] for inputs in alone)
    pads = [longest - inputs["input_ids"].shape[1] for inputs in alone]
    assert any(pads)

    def joined(tensors):
        return torch.cat([torch.nn.functional.pad(row, (pad, 0)) for row, pad in zip(tensors, pads, strict=True)])

    image = vision("llava15", alone[0])
    found = info(f"peers/{peer}")["img0.A"]
    pmod, known = PEERS[peer](found, int(image.int().argmax()), int(image.sum()))
    model = model_of("llava15")
    model.set_method(pmod)
    if peer == "visionzip":
        picks = found["settings"]
        model.model.language_model.selection.contextual = picks["contextual"] / picks["tokens_fed"]
    mask = joined([torch.ones_like(inputs["input_ids"]) for inputs in alone])
    with torch.no_grad(), capture_selection(model) as record:
        logits = model(
            input_ids=joined([inputs["input_ids"] for inputs in alone]),
            attention_mask=mask,
            position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
            pixel_values=torch.cat([inputs["pixel_values"] for inputs in alone]),
        ).logits
    for row, pad in enumerate(pads):
        for suffix, layer in known.items():
            kept = (record.layers[layer].kept[row] & record.vision_mask[row]).nonzero().flatten() - pad
            assert kept.tolist() == expected[f"img{row}.A.kept{suffix}"].tolist()
        left = mask[row].bool() if peer == "shortv" else record.layers[LAYERS - 1].kept[row]
        torch.testing.assert_close(logits[row][left], expected[f"img{row}.A.logits"][0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("peer", ["pyramiddrop", "divprune"])
def test_on_purpose_positions_stay_true(peer):
    """What is kept first is the same; the published code numbers what is left anew, and so gives other logits."""
    expected = load_file(GOLDEN / "peers" / peer / "outputs.safetensors")
    found, inputs = info(f"peers/{peer}")["img0.A"], inputs_of("llava15", "img0")
    image = vision("llava15", inputs)
    pmod, known = PEERS[peer](found, int(image.int().argmax()), int(image.sum()))
    model, (suffix, layer) = model_of("llava15"), next(iter(known.items()))
    model.set_method({key: value for key, value in pmod.items() if key != "positions"})
    with torch.no_grad(), capture_selection(model) as record:
        logits = model(**inputs).logits[0]
    assert (record.layers[layer].kept[0] & image).nonzero().flatten().tolist() == expected[
        f"img0.A.kept{suffix}"
    ].tolist()
    theirs = expected["img0.A.logits"][0]
    assert (logits[-1] - theirs[-1]).abs().max() > 1e-2
