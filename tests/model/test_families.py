"""Every family through one suite: stock at ratio 1, a masked reference, batches, cache, static cache, gradients.

The reference gathers nothing: it is the stock model, each of whose layers is run on all tokens of one row, with a mask
over the keys that the layer does not keep, and whose result is used for the kept tokens alone.
"""

import inspect
from functools import partial

import pytest
import torch
from transformers import DynamicCache

from pmod_cli.core.errors import PmodError
from pmod_cli.families import FAMILIES
from pmod_cli.model import capture_selection, kept_tokens
from pmod_cli.model.cache import CACHE_NAME
from pmod_cli.profiling.count.workload import Row
from tests.model import visual
from tests.model.naive import Float64Norm
from tests.model.visual import (
    IMAGE,
    KINDS,
    ROUTED_FROM_START,
    VIDEO,
    VIDEO_KINDS,
    WORDS,
    alone,
    prompt,
    routed,
    rows_of,
    stock,
    stock_config,
    visuals,
)

WHOLE = {"schedule": "constant", "mean": 1.0, "max_ratio": 1.5}
"""Every layer takes the router path, at ratio 1."""
RATIOS = (0.6, 1.0, 0.35, 0.15)


def in_float64(model):
    """The model in float64, its RMS norms included, which cast to float32 in stock."""
    for module in list(model.double().modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                setattr(module, name, Float64Norm(child))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_ratio_one_is_bit_equal_to_stock(kind, dtype):
    plain = stock(kind).to(dtype)
    whole = routed(plain, WHOLE, router_std=0)
    assert whole.config.routed_layers == [0, 1, 2, 3]
    for side in ("left", "right"):
        inputs = prompt(kind, plain.config, rows_of(kind), side, dtype)
        real = inputs["attention_mask"].bool()
        with torch.no_grad():
            ours, theirs = whole(**inputs).logits, plain(**inputs).logits
        assert torch.equal(ours[real], theirs[real])
    inputs = prompt(kind, plain.config, rows_of(kind), "left", dtype)
    words = [model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False) for model in (whole, plain)]
    assert torch.equal(*words)


@pytest.mark.parametrize("kind", KINDS)
def test_arguments_may_come_in_the_order_of_the_stock_model(kind):
    plain = stock(kind)
    whole = routed(plain, {"schedule": "list", "values": RATIOS})
    inputs = prompt(kind, plain.config, rows_of(kind))
    order = list(inspect.signature(plain.model.forward).parameters)
    given = [inputs.pop(name, None) for name in order[: 1 + max(order.index(name) for name in inputs if name in order)]]
    with torch.no_grad():
        ours, theirs = (
            whole.model(*given, **inputs)[0],
            whole.model(**dict(zip(order, given, strict=False)), **inputs)[0],
        )
    assert torch.equal(ours, theirs)


def masked_reference(plain, pmod, ids: torch.Tensor, targets: tuple[int, ...]):
    """The stock model of one row, each layer's result used for its kept tokens alone.

    Args:
        plain: Stock model in float64; its layers are changed in place.
        pmod: The p-MoD model whose routers are read.
        ids: `(1, N)` token ids.
        targets: Ids of the tokens that are routed.
    """
    vision = torch.isin(ids[0], torch.tensor(targets))
    settings, length = pmod.config.settings, ids.shape[1]

    def run(layer, router, ratio, hidden_states, position_embeddings, **kwargs):
        x = hidden_states[0]
        weight, kept = torch.ones(length, dtype=x.dtype), torch.ones(length, dtype=torch.bool)
        if router is not None:
            weight[vision] = 1 + settings.alpha * torch.tanh(x @ router.weight[0] + router.bias[0])[vision]
            candidates = sorted(vision.nonzero().flatten().tolist(), key=lambda t: (-float(weight[t]), t))
            kept[candidates[kept_tokens(len(candidates), ratio) :]] = False
        seen = torch.ones(length, length).tril().bool() & kept
        seen |= torch.eye(length, dtype=torch.bool)  # a skipped query, whose result is not used, needs some key
        mask = torch.zeros(1, 1, length, length, dtype=x.dtype).masked_fill_(~seen, float("-inf"))
        attended, _ = layer.self_attn(
            hidden_states=layer.input_layernorm(hidden_states),
            attention_mask=mask,
            position_embeddings=position_embeddings,
        )
        h = hidden_states + attended
        y = h + weight[:, None] * layer.mlp(layer.post_attention_layernorm(h))
        return torch.where(kept[:, None], y, weight[:, None] * hidden_states)

    for layer, ours, ratio in zip(
        plain.model.language_model.layers, pmod.model.language_model.layers, pmod.config.retention, strict=True
    ):
        layer.forward = partial(run, layer, ours.router, ratio)
    return plain


@pytest.mark.parametrize("target", ["vision_all", "vision_image", "vision_video"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_equals_a_masked_reference_row_by_row(kind, target):
    if target != "vision_all" and kind not in VIDEO_KINDS:
        pytest.skip("it has images alone")
    targets = {"vision_all": (IMAGE, VIDEO), "vision_image": (IMAGE,), "vision_video": (VIDEO,)}[target]
    plain, rows = stock(kind), rows_of(kind)
    pmod = in_float64(routed(plain, ROUTED_FROM_START | {"target_tokens": target}))
    reference = in_float64(stock(kind))
    for side in ("left", "right") if target == "vision_all" else ("left",):
        inputs = prompt(kind, plain.config, rows, side, torch.float64)
        positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        given = {} if "mm_token_type_ids" in inputs else {"position_ids": positions}  # M-RoPE makes its own
        with torch.no_grad():
            logits = pmod(**inputs, **given).logits
            for index in range(len(rows)):
                single = alone(kind, plain.config, rows, index, inputs)
                expected = masked_reference(reference, pmod, single["input_ids"], targets)(**single).logits[0]
                real = inputs["attention_mask"][index].bool()
                torch.testing.assert_close(logits[index][real], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_cached_decode_equals_recomputation_and_holds_what_is_counted(kind):
    """`generate` over a padded batch, against a forward of each row alone over all its tokens."""
    plain, rows = stock(kind), rows_of(kind)
    pmod = in_float64(routed(plain))
    inputs = prompt(kind, plain.config, rows, "left", torch.float64)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
    made = pmod.generate(**inputs, **options, output_logits=True)
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    vision = torch.isin(ids, torch.tensor([IMAGE, VIDEO]))
    for layer, ratio in zip(made[CACHE_NAME].layers, RATIOS, strict=True):
        counted = [
            kept_tokens(int(vision[row].sum()), ratio) + int((real & ~vision)[row].sum()) for row in range(len(rows))
        ]
        assert layer.keys.shape[-2] == (max(counted) + 4 if ratio < 1 else ids.shape[1] + 4)
        if ratio < 1:
            assert layer.valid[:, : layer.keys.shape[-2]].sum(1).tolist() == [count + 4 for count in counted]
    new = made.sequences[:, ids.shape[1] :]
    for index in range(len(rows)):
        single = alone(kind, plain.config, rows, index, inputs)
        single["input_ids"] = torch.cat([single["input_ids"], new[index : index + 1, :-1]], dim=1)
        single["attention_mask"] = torch.ones_like(single["input_ids"])
        if "mm_token_type_ids" in single:
            single["mm_token_type_ids"] = torch.nn.functional.pad(single["mm_token_type_ids"], (0, 4))
        with torch.no_grad():
            again = pmod(**single, use_cache=False).logits[0, -5:]
        # `generate` hands its logits out in float32.
        torch.testing.assert_close(torch.stack(made.logits, 1)[index], again.float(), atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_of_an_earlier_turn_is_never_seen(kind):
    """Two turns of text, both padded, then a token: what the stock model says. A turn with an image in the middle."""
    plain = stock(kind)
    pmod, generator = routed(plain), torch.Generator().manual_seed(1)
    masks = [torch.ones(2, length, dtype=torch.long) for length in (6, 5, 1)]
    masks[0][1, :3], masks[1][0, :2] = 0, 0
    steps = [(torch.randint(20, 60, mask.shape, generator=generator), mask, {}) for mask in masks]
    for ours, theirs, mask in zip(turns(pmod, steps), turns(plain, steps), masks, strict=True):
        assert torch.equal(ours[mask.bool()], theirs[mask.bool()])
    if not FAMILIES[kind].tiled:
        return  # M-RoPE: positions of a later turn with an image are the caller's
    shown = prompt(kind, plain.config, [visual.Row([(8, 8)], words=4)] * 2)
    steps[1] = shown.pop("input_ids"), shown.pop("attention_mask"), shown
    pixels = {key: value[1:] for key, value in shown.items()}
    alone_steps = [(ids[1:], mask[1:], pixels if more else {}) for ids, mask, more in steps]
    alone_steps[0] = steps[0][0][1:, 3:], steps[0][1][1:, 3:], {}
    for batched, single in list(zip(turns(pmod, steps), turns(pmod, alone_steps), strict=True))[1:]:
        torch.testing.assert_close(batched[1:], single, atol=3e-5, rtol=1e-4)


def turns(model, steps):
    """Logits of each turn `(ids, mask, pixels)`, on one cache."""
    cache, mask = DynamicCache(config=model.config.get_text_config()), None
    for ids, real, more in steps:
        mask = real if mask is None else torch.cat([mask, real], dim=1)
        at = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        given = {"attention_mask": mask, "position_ids": at, CACHE_NAME: cache, **more}
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=True, **given).logits
        yield logits  # outside: a generator that waits would leave gradients off for everybody


@pytest.mark.parametrize("kind", KINDS)
def test_a_static_cache_gives_the_same_words(kind):
    plain, rows = stock(kind), rows_of(kind)
    pmod = routed(plain)
    inputs = prompt(kind, plain.config, rows)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "disable_compile": True}
    static = pmod.generate(**inputs, **options, cache_implementation="static")
    assert torch.equal(static, pmod.generate(**inputs, **options))


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_gives_the_same_gradients_and_each_router_gets_one(kind):
    plain, rows = stock(kind), rows_of(kind)
    pmod, found = routed(plain, router_std=0.1).train(), []
    inputs = prompt(kind, plain.config, rows, "right")
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] < WORDS, -100)
    for checkpointing in (False, True):
        if checkpointing:
            pmod.gradient_checkpointing_enable({"use_reentrant": False})
        pmod.zero_grad()
        pmod(**inputs, labels=labels, use_cache=False).loss.backward()
        found.append({name: p.grad.clone() for name, p in pmod.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], atol=1e-6, rtol=1e-4)
    assert all(found[0][name].any() for name, _ in pmod.named_parameters() if name.endswith("router.weight"))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if FAMILIES[kind].tiled])
def test_a_tower_that_a_checkpoint_lacks_starts_as_in_a_new_model(kind):
    made = routed(stock(kind), router_std=0)
    torch.manual_seed(0)
    fresh, filled = type(made)(made.config), type(made).from_pretrained(None, config=made.config, state_dict={})
    for one, other in zip(fresh.named_parameters(), filled.named_parameters(), strict=True):
        if "vision_tower" in one[0] and one[1].ndim == 2:
            ratio = other[1].std() / one[1].std()
            assert 0.8 < ratio < 1.25, f"{one[0]}: {ratio}"


@pytest.mark.parametrize("kind", KINDS)
def test_text_alone_is_stock(kind):
    plain = stock(kind)
    pmod = routed(plain)
    inputs = prompt(kind, plain.config, [row for row in rows_of(kind) if not row.images and not row.videos])
    with torch.no_grad():
        assert torch.equal(pmod(**inputs).logits, plain(**inputs).logits)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if FAMILIES[kind].high_resolution])
def test_base_images_are_kept_whole(kind):
    """With `vision_hr`, of images all but the base image is routed, and of videos every token."""
    plain, rows = stock(kind), rows_of(kind)
    pmod = routed(plain, ROUTED_FROM_START | {"target_tokens": "vision_hr"})
    inputs = prompt(kind, plain.config, rows)
    with torch.no_grad(), capture_selection(pmod) as record:
        pmod(**inputs)
    for index, row in enumerate(rows):
        images = int((inputs["input_ids"][index] == IMAGE).sum())
        videos = int((inputs["input_ids"][index] == VIDEO).sum())
        assert int(record.vision_mask[index].sum()) == images - 16 * len(row.images) + videos
    assert record.layers[0].K.tolist() == [kept_tokens(int(row.sum()), 0.6) for row in record.vision_mask]


@pytest.mark.parametrize("kind", KINDS)
def test_videos_are_asked_of_models_that_have_them(kind):
    if kind in VIDEO_KINDS:
        assert stock_config(kind, pmod={"target_tokens": "vision_video"}).settings.target_tokens == "vision_video"
    else:
        with pytest.raises((ValueError, PmodError), match="vision_video' needs a model of videos"):
            stock_config(kind, pmod={"target_tokens": "vision_video"})


@pytest.mark.parametrize("kind", KINDS)
def test_a_quota_for_each_image_and_frame(kind):
    """Of each the best K, whatever the others are worth; the count of `profile` and the cache say the same."""
    plain, rows = stock(kind), rows_of(kind)
    pmod = routed(plain, ROUTED_FROM_START | {"quota": "per_image"})
    inputs = prompt(kind, plain.config, rows)
    with torch.no_grad(), capture_selection(pmod) as record:
        pmod(**inputs)
    for layer, ratio in ((0, 0.6), (2, 0.35), (3, 0.15)):
        chosen = record.layers[layer]
        for index, row in enumerate(rows):
            places, expected = record.vision_mask[index].nonzero().flatten().tolist(), set()
            for _, picture in visuals(kind, plain.config, row):
                frame = picture.tokens // picture.frames
                for number in range(picture.frames):
                    last = number == picture.frames - 1
                    size = picture.tokens - frame * number if last else frame
                    unit, places = places[:size], places[size:]
                    best = sorted(unit, key=lambda place: (-float(chosen.weight[index, place]), place))
                    expected |= set(best[: kept_tokens(size, ratio)])
            kept = chosen.kept[index] & record.vision_mask[index]
            assert set(kept.nonzero().flatten().tolist()) == expected
            pictures = tuple(picture for _, picture in visuals(kind, plain.config, row))
            assert Row(pictures, 0).kept("vision_all", ratio, per_image=True) == len(expected)
    made = pmod.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    real = inputs["attention_mask"].bool() & ~record.vision_mask
    held = max(int(k) + int(text) for k, text in zip(record.layers[0].K, real.sum(1), strict=True))
    assert made[CACHE_NAME].layers[0].keys.shape[-2] == held + 1


def test_frames_of_a_fast_film_are_told_apart_while_generating():
    """More than `tokens_per_second` a second share one time: rows and columns tell where the next one begins."""
    kind = "qwen2_5_vl"
    plain, rows = stock(kind), rows_of(kind)
    pmod = routed(plain, ROUTED_FROM_START | {"quota": "per_image"})
    inputs = prompt(kind, plain.config, rows)
    inputs["second_per_grid_ts"] = torch.full((len(inputs["video_grid_thw"]),), 0.01)
    kept = []
    for run in (pmod, partial(pmod.generate, max_new_tokens=1, do_sample=False)):
        with torch.no_grad(), capture_selection(pmod) as record:
            run(**inputs)
        kept.append(torch.stack([chosen.kept for chosen in record.layers.values()]))
    assert torch.equal(*kept)
