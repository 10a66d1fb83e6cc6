"""What holds for every method on every family and batch shape. A new method is tested by being in `METHODS`."""

from itertools import pairwise

import pytest
import torch

from pmod_cli.model import METHODS, SELECTIONS, Method, PmodSettings, Selection, capture_selection, kept_tokens
from tests import factories
from tests.model import visual
from tests.model.models import IMAGES, ROWS, batch, pmod_model, single
from tests.model.test_selections import HELD, captured, positions

VARIANTS = {name: {"method": name, "mean": 0.55} for name in METHODS} | {
    f"{name}, renumbered": {"method": name, "mean": 0.55, "positions": "renumbered"}
    for name in ("pyramiddrop", "divprune")
}
VARIANTS |= {  # dropped in front of the decoder, then routed
    "pmod, divprune before": {"before": "divprune:0.6", "mean": 0.55},
    "pmod held, uniform before": HELD | {"before": "uniform:0.5"},
    "pyramiddrop, divprune before": {"method": "pyramiddrop", "mean": 0.55, "before": "divprune:0.6"},
    "pmod, visionzip before": {"before": "visionzip:0.6", "mean": 0.55},
    "shortv, random before": {"method": "shortv", "mean": 0.55, "before": "random:0.6"},
    "attention, divprune before": {"method": "attention", "values": [1.0, 0.5, 0.5, 0.3], "before": "divprune:0.5"},
    "dart, divprune before": {"method": "dart", "mean": 0.55, "before": "divprune:0.5"},
    "divprune held, more later": HELD | {"selection": "divprune", "select_at": [0], "values": [0.2, 0.5, 0.5, 0.3]},
}
WITH_CLASS_TOKEN = ("llava", "llava_next")
"""Families whose tower has one and whose vision tokens are its patches."""
CLOSE = {"atol": 3e-5, "rtol": 1e-4}


class Replay(Selection):
    """The scores of the first prefill again, for a recomputation whose last token is another one."""

    def __init__(self, selection):
        super().__init__()
        self.selection, self.known, self.finite = selection, {}, selection.finite

    def scores(self, hidden_states, routing, layer):
        index = layer.self_attn.layer_idx
        if index not in self.known:
            self.known[index] = self.selection.scores(hidden_states, routing, layer)
        missing = routing.target.shape[1] - self.known[index].shape[1]
        return torch.nn.functional.pad(self.known[index], (0, missing))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", factories.KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_holds_for_every_method(variant, kind, side):
    """A row of a padded batch gets what it gets alone; K is exact; the dropped do not return; the cache has as many."""
    model = pmod_model(kind, pmod=VARIANTS[variant])
    settings, retention = model.config.settings, model.config.retention
    inputs = batch(kind, ROWS, side)
    real = inputs["attention_mask"].bool()
    with torch.no_grad(), capture_selection(model) as record:
        outputs = model(**inputs, position_ids=positions(inputs), use_cache=True)
    text, before = real & ~record.vision_mask, real
    num_vision = record.vision_mask.sum(dim=1).tolist()
    if settings.before is not None:
        num_vision = [kept_tokens(number, settings.before_decoder[1]) for number in num_vision]
    for layer, (ratio, slots) in enumerate(zip(retention, outputs.past_key_values.layers, strict=True)):
        wanted = [kept_tokens(number, ratio) for number in num_vision]
        longest = max(int(t) + k for t, k in zip(text.sum(dim=1), wanted, strict=True))
        whole = (ratio == 1 and settings.before is None) or settings.keep_keys
        assert slots.keys.shape[2] == (real.shape[1] if whole else longest)
        if layer not in record.layers:
            continue
        kept = record.layers[layer].kept
        assert record.layers[layer].K.tolist() == wanted
        assert torch.equal(kept & ~record.vision_mask, text)
        assert settings.returns or not (kept & ~before).any()
        before = kept if not settings.returns or ratio == 1 else before
    for row in range(len(ROWS)):
        expected, alone = captured(model, single(inputs, row, IMAGES[row]))
        left = before[row] if settings.before or not settings.returns else real[row]
        torch.testing.assert_close(outputs.logits[row][left], expected[0][left[real[row]]], **CLOSE)
        for layer, selected in alone.layers.items():
            assert torch.equal(record.layers[layer].kept[row][real[row]], selected.kept[0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_in_front_changes_no_choice(variant):
    """Without positions a row stands at the far end of its batch, which rotary attention does not mind."""
    model, inputs = pmod_model(pmod=VARIANTS[variant]), batch("llava_next", ROWS, "left")
    _, record = captured(model, inputs)
    for row in range(len(ROWS)):
        real = inputs["attention_mask"][row].bool()
        _, alone = captured(model, single(inputs, row, IMAGES[row]))
        for layer, selected in alone.layers.items():
            assert torch.equal(record.layers[layer].kept[row][real], selected.kept[0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_decode_equals_recompute(variant):
    """One token, then three at once, on a padded batch of several images; the choice is that of the prompt."""
    model = pmod_model(pmod=VARIANTS[variant])
    replay = Replay(model.model.language_model.selection)
    for layer in model.model.language_model.layers:
        layer.selection = replay
    for side in ("left", "right"):
        replay.known.clear()
        inputs = batch("llava_next", ROWS, side)
        ids, mask, at = inputs["input_ids"], inputs["attention_mask"], positions(inputs)
        extra = torch.arange(8, 8 + 4 * len(ROWS)).view(len(ROWS), 4)
        later = at.amax(dim=1, keepdim=True) + 1 + torch.arange(4)
        with torch.no_grad():
            cache, logits = model(**inputs, position_ids=at, use_cache=True).past_key_values, []
            for start, end in ((0, 1), (1, 4)):
                mask = torch.cat([mask, torch.ones_like(extra[:, start:end])], dim=1)
                step = {"input_ids": extra[:, start:end], "position_ids": later[:, start:end], "attention_mask": mask}
                logits.append(model(**step, past_key_values=cache).logits)
            whole = {"input_ids": torch.cat([ids, extra], dim=1), "attention_mask": mask}
            images = {key: inputs[key] for key in ("pixel_values", "image_sizes")}
            expected = model(**whole, **images, position_ids=torch.cat([at, later], dim=1)).logits[:, -4:]
        torch.testing.assert_close(torch.cat(logits, dim=1), expected, **CLOSE)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "pmod"])
def test_a_method_on_stock_weights_has_no_router_and_at_ratio_one_is_stock(method):
    stock = factories.model()
    model = pmod_model(pmod={"method": method, "values": [1.0] * 4})
    assert model.config.routed_layers == []
    inputs = batch("llava_next", ROWS)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits[real], stock(**inputs).logits[real])


def test_tokens_dropped_before_the_decoder_are_as_if_they_had_never_been():
    """The stock decoder on what is left, at true positions, gives the same; so does a choice that is held."""
    inputs = batch("llava_next", ROWS[:1])
    model = pmod_model(pmod={"method": "uniform", "values": [1.0] * 4, "before": "divprune:0.4"})
    logits, record = captured(model, inputs)
    kept = record.layers[0].kept[0]
    assert int((kept & record.vision_mask[0]).sum()) == kept_tokens(int(record.vision_mask.sum()), 0.4)
    method = captured(pmod_model(pmod={"method": "divprune", "values": [0.4] * 4}), inputs)[0]
    assert torch.equal(logits[0][kept], method[0][kept])
    stock, ids = factories.model(), inputs["input_ids"]
    with torch.no_grad():
        features = stock.get_image_features(inputs["pixel_values"], inputs["image_sizes"], return_dict=True)
        embeds = stock.get_input_embeddings()(ids)
        embeds = embeds.masked_scatter(record.vision_mask[..., None], torch.cat(list(features.pooler_output)))
        left = kept.nonzero().flatten()
        mask = torch.ones(1, len(left), dtype=torch.long)
        hidden = stock.model.language_model(
            inputs_embeds=embeds[:, left], position_ids=left[None], attention_mask=mask
        ).last_hidden_state
        torch.testing.assert_close(logits[0][kept], stock.lm_head(hidden)[0], **CLOSE)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if "renumbered" not in name])
@pytest.mark.parametrize("kind", visual.KINDS)
def test_every_family(kind, variant):
    """Images and videos of every family, padded: a row of a batch gets what it gets alone."""
    plain, rows = visual.stock(kind), visual.rows_of(kind)
    if "visionzip" in variant and kind not in WITH_CLASS_TOKEN:
        with pytest.raises(ValueError, match=r"VisionZip ranks by the class token|pools those of video"):
            visual.routed(plain, VARIANTS[variant])
        return
    model = visual.routed(plain, VARIANTS[variant])
    inputs = visual.prompt(kind, plain.config, rows)
    given = {} if "mm_token_type_ids" in inputs else {"position_ids": positions(inputs)}  # M-RoPE makes its own
    logits, record = captured(model, inputs | given)
    for index in range(len(rows)):
        expected, alone = captured(model, visual.alone(kind, plain.config, rows, index, inputs))
        real = inputs["attention_mask"][index].bool()
        for layer, selected in alone.layers.items():
            assert torch.equal(record.layers[layer].kept[index][real], selected.kept[0])
        torch.testing.assert_close(logits[index][real], expected[0], atol=1e-4, rtol=1e-3)


def test_a_model_takes_one_method_after_another():
    model, inputs = pmod_model(pmod={"method": "fastv"}), batch("llava_next", ROWS)
    model.set_method({"method": "pyramiddrop", "mean": 0.4})
    assert torch.equal(
        captured(model, inputs)[0], captured(pmod_model(pmod={"method": "pyramiddrop", "mean": 0.4}), inputs)[0]
    )
    assert model.config.settings.selection == "pyramiddrop"
    with pytest.raises(ValueError, match=r"method 'pmod' needs routers, and layers \[0, 1, 2, 3\] have none"):
        model.set_method({"schedule": "constant", "mean": 0.5})


def test_a_method_leaves_routers_alone():
    """On a model that has routers a method gives what it gives on the stock weights."""
    model, inputs = pmod_model(router_std=1.0), batch("llava_next", ROWS)
    model.set_method({"method": "divprune", "mean": 0.4})
    expected = captured(pmod_model(pmod={"method": "divprune", "mean": 0.4}), inputs)[0]
    assert torch.equal(captured(model, inputs)[0], expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "best"}, "method must be one of pmod, fastv"),
        ({"method": "fastv", "selection": "random"}, "method 'fastv' has selection 'fastv', found 'random'"),
        ({"positions": "absolute"}, "positions must be one of true, renumbered"),
        ({"before": "divprune"}, "before must be a selection and a share, as divprune:0.33, found 'divprune'"),
        ({"before": "divprune:0"}, "before must be a selection and a share"),
        ({"before": "router:0.5"}, "before must name one of attention, dart, divprune, .*, found 'router'"),
        ({"before": "outliers:0.5"}, "before must name one of attention, dart, divprune, .*, found 'outliers'"),
        ({"before": "divprune:0.5", "positions": "renumbered"}, "before goes with true positions and quota row"),
        ({"keep_keys": True, "returns": False}, "keep_keys needs returns"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        PmodSettings(**settings)


def test_positions_in_several_axes_cannot_be_renumbered():
    plain = visual.stock("qwen2_5_vl")
    with pytest.raises(ValueError, match="positions of this decoder have several axes"):
        visual.routed(plain, {"method": "divprune", "mean": 0.5, "positions": "renumbered"})


def test_tiles_cannot_put_the_tokens_of_visionzip_in_front():
    with pytest.raises(ValueError, match="VisionZip puts its tokens in front with positions renumbered"):
        pmod_model(pmod={"method": "visionzip", "mean": 0.5, "positions": "renumbered"})
    with pytest.raises(ValueError, match="target_tokens vision_hr spares the first"):
        pmod_model(pmod={"method": "visionzip", "mean": 0.5, "target_tokens": "vision_hr"})
    model = pmod_model("llava", pmod={"method": "visionzip", "mean": 0.5})
    with torch.no_grad(), pytest.raises(ValueError, match="it needs images, not features that are merged"):
        model(inputs_embeds=torch.randn(1, 9, 64), vision_mask=torch.ones(1, 9, dtype=torch.bool))


def test_beams_have_the_ranks_of_their_image():
    """A beam search repeats images: every beam gets what the image alone gets, whatever stands beside it."""
    model = pmod_model(pmod={"method": "visionzip", "mean": 0.5})
    inputs = batch("llava_next", [ROWS[0], ROWS[1]])
    given = {"num_beams": 2, "max_new_tokens": 4, "do_sample": False}
    together = model.generate(**inputs, **given)[:, -4:]
    for row in (0, 1):
        alone = model.generate(**single(inputs, row, IMAGES[row]), **given)[0, -4:]
        assert torch.equal(together[row], alone)


def test_frozen_layers_have_no_attention_to_return():
    model, inputs = pmod_model(pmod={"method": "shortv", "mean": 0.55}, attention="eager"), batch("llava_next", ROWS)
    with torch.no_grad(), pytest.raises(ValueError, match="output_attentions"):
        model(**inputs, output_attentions=True)
    text = {key: inputs[key][2:, -4:] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        assert len(model(**text, output_attentions=True).attentions) == 4


def test_what_reads_attention_cannot_choose_before_the_decoder():
    with pytest.raises(ValueError, match="fastv reads the attention of a layer"):
        pmod_model(pmod={"before": "fastv:0.5"})


def test_settings_that_do_not_fit_the_layers():
    with pytest.raises(ValueError, match=r"layer 1 keeps 0.6 of the vision tokens, the layer before it 0\.5"):
        PmodSettings(method="pyramiddrop", values=[0.5, 0.6]).chosen_at(2)
    with pytest.raises(ValueError, match="ranks the tokens 1 layer earlier: layer 0 keeps all"):
        PmodSettings(method="fastv", values=[0.5, 0.5]).chosen_at(2)
    assert PmodSettings(method="fastv").chosen_at(8) == [None, 1, 1, 1, 1, 1, 1, 1]
    assert PmodSettings(method="pyramiddrop").chosen_at(8) == [None, None, 2, 2, 4, 4, 6, 6]
    for name in METHODS:
        settings = PmodSettings(method=name, mean=0.4)
        assert PmodSettings.from_dict(settings.to_dict()) == settings
        assert sum(settings.retention(32)) / 32 == pytest.approx(0.4, abs=0.02)


def test_a_method_from_outside():
    """A selection and a record, both registered by a call: the model runs it, and its settings name it."""

    class Loudest(Selection):
        def scores(self, hidden_states, routing, layer):
            return hidden_states.norm(dim=-1)

    SELECTIONS.register("loudest")(Loudest)
    METHODS.register("loudest")(Method("loudest", "pyramid"))
    try:
        model, inputs = pmod_model(pmod={"method": "loudest", "mean": 0.5}), batch("llava_next", ROWS)
        _, record = captured(model, inputs)
        kept = [record.layers[layer].kept for layer in (1, 2, 3)]
        assert model.config.routed_layers == []
        assert all(not (later & ~earlier).any() and later.sum() < earlier.sum() for earlier, later in pairwise(kept))
    finally:
        METHODS.unregister("loudest")
        SELECTIONS.unregister("loudest")


@pytest.mark.parametrize("variant", ["pmod", "shortv"])
def test_a_first_prefill_is_stored_without_a_copy(variant):
    """The stock cache appends the first K and V to nothing. A turn of text in front of the image is appended to."""
    model, inputs = pmod_model(pmod=VARIANTS[variant]), batch("llava_next", ROWS[:1])
    ids, image = inputs["input_ids"], {key: inputs[key] for key in ("pixel_values", "image_sizes")}
    thinned = [layer for layer, ratio in enumerate(model.config.retention) if ratio < 1]
    made = []
    for index in thinned:
        attention = model.model.language_model.layers[index].self_attn
        attention.v_proj.register_forward_hook(lambda _, __, out: made.append(out))
    with torch.no_grad():
        whole = model(input_ids=ids, **image, use_cache=True).past_key_values
        for index, out in zip(thinned, made, strict=True):
            assert whole.layers[index].values.data_ptr() == out.data_ptr()
        text = torch.full((1, 4), 7)
        cache = model(input_ids=text, use_cache=True).past_key_values
        seen = model(input_ids=ids, **image, past_key_values=cache, use_cache=True).logits
        expected = model(input_ids=torch.cat([text, ids], dim=1), **image).logits[:, 4:]
    torch.testing.assert_close(seen, expected, **CLOSE)
