"""Parity: with stock models at ratio 1 (bit-equal) and with a naive per-token loop in float64 (1e-10)."""

import pytest
import torch

from tests import factories
from tests.model.models import IMAGES, ROUTED_FROM_START, ROWS, batch, pmod_model, pmod_twin, single
from tests.model.naive import in_float64, naive_logits

WHOLE = {"schedule": "constant", "mean": 1.0, "max_ratio": 1.5}
"""Every layer takes the router path, at ratio 1."""


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decoder", factories.DECODERS)
@pytest.mark.parametrize("kind", factories.KINDS)
def test_ratio_one_is_bit_equal_to_stock(kind, decoder, dtype):
    stock = factories.model(kind, decoder).to(dtype)
    routed = pmod_twin(stock, WHOLE)
    assert routed.config.routed_layers == [0, 1, 2, 3]
    for inputs in (batch(kind, ROWS[:1]), batch(kind, ROWS, "right"), batch(kind, ROWS, "left")):
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        real = inputs["attention_mask"].bool()
        with torch.no_grad():
            ours, theirs = routed(**inputs).logits, stock(**inputs).logits
        assert torch.equal(ours[real], theirs[real])
    generated = [model.generate(**inputs, max_new_tokens=4, do_sample=False) for model in (routed, stock)]
    assert torch.equal(*generated)


@pytest.mark.parametrize("attention", ["eager"])
def test_ratio_one_is_bit_equal_to_stock_in_eager(attention):
    stock = factories.model()
    stock.set_attn_implementation(attention)
    routed = pmod_twin(stock, WHOLE)
    inputs = batch("llava_next", ROWS)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        assert torch.equal(routed(**inputs).logits[real], stock(**inputs).logits[real])


def _merged(model, inputs):
    """Merged embeddings and vision mask of one row, from the stock pieces."""
    ids = inputs["input_ids"]
    embeds = model.get_input_embeddings()(ids)
    vision = ids == model.config.image_token_id
    if "pixel_values" in inputs:
        features = {key: inputs[key] for key in ("pixel_values", "image_sizes") if key in inputs}
        merged = torch.cat(model.get_image_features(**features, return_dict=True).pooler_output)
        embeds = embeds.masked_scatter(vision[..., None], merged.to(embeds))
    return embeds[0], vision[0]


@pytest.mark.parametrize(
    ("kind", "decoder", "pmod"),
    [
        ("llava_next", "llama", ROUTED_FROM_START),
        ("llava_next", "mistral", ROUTED_FROM_START | {"string": False}),
        ("llava", "qwen2", ROUTED_FROM_START | {"norm": "shifted_softmax"}),
        ("llava", "llama", {"norm": "sigmoid"}),
        ("llava_next", "llama", ROUTED_FROM_START | {"select_at": [0]}),
        ("llava", "qwen2", {"schedule": "list", "values": [1.0, 0.4, 0.4, 0.7], "select_at": [0, 2]}),
        ("llava_next", "qwen2", {"schedule": "interleaved", "norm": "none_0.1_1"}),
    ],
)
def test_prefill_and_cached_decode_equal_a_naive_loop(kind, decoder, pmod):
    """Padded batches of unequal rows, then two more steps on the cache: one token, and three at once."""
    model = in_float64(pmod_model(kind, decoder, pmod))
    for side in ("left", "right"):
        inputs = batch(kind, ROWS, side)
        inputs["pixel_values"] = inputs["pixel_values"].double()
        mask = inputs["attention_mask"]
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        extra = torch.arange(8, 8 + 4 * len(ROWS)).view(len(ROWS), 4)
        with torch.no_grad():
            prefill = model(**inputs, position_ids=positions, use_cache=True)
            last, cache, logits = positions.amax(dim=1, keepdim=True), prefill.past_key_values, [prefill.logits]
            for step in (extra[:, :1], extra[:, 1:]):
                mask = torch.cat([mask, torch.ones_like(step)], dim=1)
                ahead = last + 1 + torch.arange(step.shape[1])
                logits.append(
                    model(input_ids=step, attention_mask=mask, position_ids=ahead, past_key_values=cache).logits
                )
                last = ahead[:, -1:]
            for row in range(len(ROWS)):
                alone = single(inputs, row, IMAGES[row])
                embeds, vision = _merged(model, alone)
                embeds = torch.cat([embeds, model.get_input_embeddings()(extra[row])])
                vision = torch.cat([vision, torch.zeros(4, dtype=torch.bool)])
                expected = naive_logits(model, embeds, vision)
                real = inputs["attention_mask"][row].bool()
                ours = torch.cat([logits[0][row][real], logits[1][row], logits[2][row]])
                assert ours.isfinite().all()
                torch.testing.assert_close(ours, expected, atol=1e-10, rtol=0)
