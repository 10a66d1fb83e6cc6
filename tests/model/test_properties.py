"""Properties: batch N equals batch 1, cached decode equals recompute, generation modes agree, errors, saving."""

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM
from transformers.cache_utils import DynamicCache, StaticCache

from pmod_cli.model import SELECTIONS, PmodLlavaNextModel, capture_selection, kept_tokens
from tests import factories
from tests.model.models import IMAGES, ROUTED_FROM_START, ROWS, batch, pmod_model, single

CLOSE = {"atol": 2e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def model():
    return pmod_model()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("selection", list(SELECTIONS))
def test_batch_equals_single_rows(model, side, selection):
    inputs = batch("llava_next", ROWS, side)
    positions = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    model.set_selection(selection, seed=3)
    try:
        with torch.no_grad(), capture_selection(model) as together:
            logits = model(**inputs, position_ids=positions).logits
        for row in range(len(ROWS)):
            real = inputs["attention_mask"][row].bool()
            with torch.no_grad(), capture_selection(model) as alone:
                expected = model(**single(inputs, row, IMAGES[row])).logits[0]
            torch.testing.assert_close(logits[row][real], expected, **CLOSE)
            for layer, selected in alone.layers.items():
                assert torch.equal(together.layers[layer].kept[row][real], selected.kept[0])
    finally:
        model.set_selection("router")


def test_every_layer_keeps_k_vision_tokens_and_all_text(model):
    inputs = batch("llava_next", ROWS)
    for selection in SELECTIONS:
        model.set_selection(selection)
        with torch.no_grad(), capture_selection(model) as record:
            model(**inputs)
        text = inputs["attention_mask"].bool() & ~record.vision_mask
        num_vision = record.vision_mask.sum(dim=1).tolist()
        assert sorted(record.layers) == [0, 2, 3]
        assert len(set(num_vision)) == 4
        assert 0 in num_vision
        for layer, selected in record.layers.items():
            assert selected.K.tolist() == [kept_tokens(n, model.config.retention[layer]) for n in num_vision]
            assert torch.equal(selected.kept & ~record.vision_mask, text)
    model.set_selection("router")


def test_uniform_selection_is_evenly_spaced_and_random_depends_on_the_seed(model):
    inputs = batch("llava_next", ROWS[:1])
    model.set_selection("uniform")
    with torch.no_grad(), capture_selection(model) as record:
        model(**inputs)
    kept = record.layers[2].kept[0][record.vision_mask[0]].nonzero().flatten()
    gaps = kept.diff()
    assert gaps.max() - gaps.min() <= 1
    picks = []
    for seed in (0, 0, 1):
        model.set_selection("random", seed=seed)
        with torch.no_grad(), capture_selection(model) as record:
            model(**inputs)
        picks.append(record.layers[2].kept)
    model.set_selection("router")
    assert torch.equal(picks[0], picks[1])
    assert not torch.equal(picks[0], picks[2])


def test_ties_keep_the_lowest_positions():
    model = pmod_model(router_std=0.0)
    with torch.no_grad(), capture_selection(model) as record:
        model(**batch("llava_next", ROWS[:1]))
    for selected in record.layers.values():
        kept = selected.kept[0][record.vision_mask[0]]
        assert kept[: int(selected.K)].all()
        assert not kept[int(selected.K) :].any()


def test_high_resolution_target_keeps_the_base_image():
    model = pmod_model(pmod=ROUTED_FROM_START | {"target_tokens": "vision_hr"})
    inputs = batch("llava_next", ROWS[:2])
    with torch.no_grad(), capture_selection(model) as record:
        logits = model(**inputs).logits
    base = (factories.TILE // factories.PATCH) ** 2
    for row, images in enumerate(IMAGES[:2]):
        vision = inputs["input_ids"][row] == model.config.image_token_id
        assert int(vision.sum()) - int(record.vision_mask[row].sum()) == base * len(images)
        assert not record.vision_mask[row][vision.nonzero().flatten()[:base]].any()
    assert logits.isfinite().all()


MODES = {
    "static": {"cache_implementation": "static", "disable_compile": True},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", MODES)
def test_generation_modes_agree(mode, attention):
    model = pmod_model(attention=attention)
    inputs = batch("llava_next", ROWS)
    greedy = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    greedy["suppress_tokens"] = [model.config.image_token_id]  # random weights could speak it; it needs an image
    expected = model.generate(**inputs, **greedy)
    assert torch.equal(model.generate(**inputs, **greedy, **MODES[mode]), expected)


def test_assisted_decoding_equals_greedy(model):
    inputs = batch("llava_next", ROWS[:1])
    assistant = pmod_model(seed=5)
    greedy = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    greedy["suppress_tokens"] = [model.config.image_token_id]  # random weights could speak it; it needs an image
    assisted = model.generate(**inputs, **greedy, assistant_model=assistant)
    assert torch.equal(assisted, model.generate(**inputs, **greedy))


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "attention"])
def test_assisted_decoding_is_refused_where_candidates_would_choose(name):
    """The first pass holds candidates behind the prompt, and these methods rank by its end."""
    model, inputs = pmod_model(pmod={"method": name, "mean": 0.5}), batch("llava_next", ROWS[:1])
    for assisted in ({"prompt_lookup_num_tokens": 2}, {"assistant_model": pmod_model(seed=5)}):
        with pytest.raises(ValueError, match="candidates behind the prompt"):
            model.generate(**inputs, max_new_tokens=4, do_sample=False, **assisted)
    model.generate(**inputs, max_new_tokens=4, do_sample=False)


def test_a_paged_cache_is_refused(model):
    inputs = batch("llava_next", ROWS[:1])
    with pytest.raises(ValueError, match="a paged cache has one length"):
        model.generate(**inputs, max_new_tokens=2, cache_implementation="paged")
    with pytest.raises(ValueError, match="a paged cache has one length"):
        model.generate_batch(inputs=[[1, 5, 6]])


def test_beam_search_of_a_batch_equals_single_rows(model):
    beams = {"num_beams": 3, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    inputs = batch("llava_next", ROWS)
    together = model.generate(**inputs, **beams)[:, inputs["input_ids"].shape[1] :]
    for row in range(len(ROWS)):
        alone = single(inputs, row, IMAGES[row])
        assert torch.equal(model.generate(**alone, **beams)[0, alone["input_ids"].shape[1] :], together[row])


@pytest.mark.parametrize("make_cache", [DynamicCache, lambda: DynamicCache(config=None)])
def test_cached_decode_equals_recompute_and_a_second_image_joins(model, make_cache):
    inputs = batch("llava_next", ROWS[:1])
    more = torch.tensor([[9, 10, 11, 12]])
    second = batch("llava_next", [("is there a circle?", [(32, 64)])])
    with torch.no_grad():
        cache = make_cache()
        model(**inputs, past_key_values=cache)
        length = inputs["input_ids"].shape[1]
        assert cache.get_seq_length() == length
        assert cache.layers[0].slots < length
        first = model(input_ids=more[:, :1], past_key_values=cache).logits
        rest = model(input_ids=more[:, 1:], past_key_values=cache).logits
        ids = torch.cat([inputs["input_ids"], more], dim=1)
        images = {key: inputs[key] for key in ("pixel_values", "image_sizes")}
        expected = model(input_ids=ids, **images).logits[:, -4:]
        torch.testing.assert_close(torch.cat([first, rest], dim=1), expected, **CLOSE)
        joined = model(input_ids=second["input_ids"], past_key_values=cache, **{k: second[k] for k in images})
    assert joined.logits.isfinite().all()
    assert cache.get_seq_length() == length + 4 + second["input_ids"].shape[1]


def test_static_cache_is_sized_by_what_each_layer_keeps(model):
    inputs = batch("llava_next", ROWS[:1])
    cache = StaticCache(config=model.config.text_config, max_cache_len=200)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    num_vision = int((inputs["input_ids"] == model.config.image_token_id).sum())
    for ratio, layer in zip(model.config.retention, cache.layers, strict=True):
        assert layer.keys.shape[2] == 200 - num_vision + kept_tokens(num_vision, ratio)
    cache.reset()
    with torch.no_grad():
        again = model(**inputs, past_key_values=cache).logits
        assert torch.equal(again, model(**inputs).logits)


def test_merged_embeddings_need_a_vision_mask(model):
    inputs = batch("llava_next", ROWS[:1])
    ids = inputs["input_ids"]
    vision = ids == model.config.image_token_id
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"], return_dict=True)
        embeds = model.get_input_embeddings()(ids)
        embeds = embeds.masked_scatter(vision[..., None], torch.cat(features.pooler_output))
        expected = model(**inputs).logits
        assert torch.equal(model(inputs_embeds=embeds, vision_mask=vision).logits, expected)
        with pytest.raises(ValueError, match="vision_mask"):
            model(inputs_embeds=embeds)
        greedy = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        generated = model.generate(
            inputs_embeds=embeds, attention_mask=torch.ones_like(ids), vision_mask=vision, **greedy
        )
    assert torch.equal(generated, model.generate(**inputs, **greedy)[:, ids.shape[1] :])


def test_unsupported_uses_are_refused(model):
    inputs = batch("llava_next", ROWS)
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=8)
    mask = inputs["attention_mask"]
    with pytest.raises(ValueError, match="2D attention mask"):
        model(**inputs | {"attention_mask": mask[:, None, None].expand(-1, 1, mask.shape[1], -1).bool()})
    with pytest.raises(ValueError, match="selection must be one of"):
        model.set_selection("best")
    cache = DynamicCache()
    factories.model()(**inputs, past_key_values=cache)
    with pytest.raises(ValueError, match="filled by another model"):
        model(**inputs, past_key_values=cache)
    with pytest.raises(ValueError, match="sliding-window"):
        pmod_model(decoder="mistral", sliding_window=64)
    with pytest.raises(ValueError, match="unknown p-MoD settings"):
        pmod_model(pmod={"shfit": 0.5})
    with pytest.raises(ValueError, match="vision_hr"):
        pmod_model("llava", pmod={"target_tokens": "vision_hr"})


@pytest.mark.parametrize("kind", factories.KINDS)
def test_saved_models_load_through_the_auto_classes(kind, tmp_path):
    model = pmod_model(kind)
    model.save_pretrained(tmp_path)
    inputs = batch(kind, ROWS[:1])
    loaded, report = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded) is type(model)
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(model.config)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**inputs).logits, model(**inputs).logits)
    headless = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(
        headless.language_model.layers[0].router.weight, model.model.language_model.layers[0].router.weight
    )


def test_stock_weights_get_zero_routers_and_nothing_else_new(tmp_path):
    stock = factories.model()
    stock.save_pretrained(tmp_path)
    config = pmod_model().config
    from pmod_cli.model import PmodLlavaNextForConditionalGeneration

    loaded, report = PmodLlavaNextForConditionalGeneration.from_pretrained(
        tmp_path, config=config, output_loading_info=True
    )
    assert report["missing_keys"]
    assert all(".router." in name for name in report["missing_keys"])
    assert not report["unexpected_keys"]
    for name, parameter in loaded.named_parameters():
        assert not parameter.any() if ".router." in name else torch.equal(parameter, stock.state_dict()[name])


def test_text_only_training_steps_touch_the_routers(model):
    model = pmod_model().train()
    inputs = batch("llava_next", [("yes", []), ("no", [])])
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    routers = [parameter for name, parameter in model.named_parameters() if ".router." in name]
    assert len(routers) == 6
    assert all(p.grad is not None and not p.grad.any() for p in routers)


def test_headless_model_and_device_map_names():
    model = pmod_model()
    assert isinstance(model.model, PmodLlavaNextModel)
    assert "PmodLlamaDecoderLayer" in model._no_split_modules


SPREAD = {
    "paper": ROUTED_FROM_START,
    "held": {"schedule": "list", "values": [0.6, 0.5, 0.35, 0.15], "select_at": [0]},
    "dropping": {"method": "fastv", "mean": 0.6},
    "thinned": {**ROUTED_FROM_START, "before": "divprune:0.5"},
}


@pytest.mark.parametrize("pmod", SPREAD.values(), ids=SPREAD)
@pytest.mark.parametrize("place", ["cpu:0", "meta"])
def test_layers_may_be_spread_over_devices(pmod, place):
    """As `device_map` does it. `cpu:0` is `cpu` by another name, so that numbers can be compared; `meta` is none."""
    model, inputs = pmod_model("llava", pmod=pmod), batch("llava", ROWS)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with torch.no_grad():
        expected = model(**inputs).logits, model.generate(**inputs, **settings)
        for layer in model.model.language_model.layers[2:]:
            options = {"io_same_device": place == "cpu:0", "skip_keys": ["past_key_values", "cache"]}
            hook = AlignDevicesHook(execution_device=torch.device(place), **options)
            add_hook_to_module(layer.to(place), hook)
        if place == "meta":
            model.model.language_model.norm.to(place), model.lm_head.to(place)
            assert model(**inputs).logits.shape == expected[0].shape
            return
        assert torch.equal(model(**inputs).logits, expected[0])
        assert torch.equal(model.generate(**inputs, **settings), expected[1])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_prompt_of_images_alone_of_which_a_layer_keeps_nothing(cache):
    """Nothing passes the layers, so logits are those of the embeddings; a later token sees itself alone."""
    model = pmod_model("llava", pmod={"schedule": "list", "values": [0.0] * 4, "string": False})
    inputs = batch("llava", [("", [(64, 64)]), ("", [(32, 64)])])
    count = (inputs["input_ids"][0] == model.config.image_token_id).sum()
    ids = torch.full((2, count), model.config.image_token_id)
    pixels = {"pixel_values": inputs["pixel_values"]}
    with torch.no_grad():
        merged = torch.stack(model.get_image_features(inputs["pixel_values"]).pooler_output)
        expected = model.lm_head(model.model.language_model.norm(merged))
        torch.testing.assert_close(model(input_ids=ids, use_cache=False, **pixels).logits, expected, **CLOSE)
        settings = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True}
        done = model.generate(input_ids=ids, **pixels, **settings, output_logits=True, cache_implementation=cache)
        torch.testing.assert_close(done.logits[0], expected[:, -1], **CLOSE)
        first = done.sequences[:, count : count + 1]
        alone = model(input_ids=first, position_ids=count.reshape(1, 1)).logits[:, -1]
    torch.testing.assert_close(done.logits[1], alone, **CLOSE)


def test_every_auto_class_for_images_and_text_finds_the_model(model, tmp_path):
    model.save_pretrained(tmp_path)
    for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        assert type(auto.from_pretrained(tmp_path)) is type(model)
