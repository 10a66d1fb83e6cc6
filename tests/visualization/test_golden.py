"""Selections as the pictures take them, against the masks of the published code."""

import pytest
import torch
import torch.nn.functional as F

from pmod_cli.visualization.recording import run
from tests.model.published import expanded, golden, image_token, info, our_model


def inputs_of(case: str, prefix: str):
    stored = golden(case, "inputs")
    if case == "llava15":
        ids = expanded(case, stored[f"{prefix}.input_ids"][:1], [36])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": stored["pixel_values"][:1]}
    tiles = stored["pixel_values.0"]
    ids = expanded(case, stored[f"{prefix}.input_ids"][:1], [info(case)["sdpa"][f"{prefix}.vision_tokens"]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": F.pad(tiles, (0, 0, 0, 0, 0, 0, 0, 5 - len(tiles)))[None],
        "image_sizes": stored["image_sizes_wh"].flip(1)[:1],
    }


@pytest.mark.parametrize(("case", "prefix"), [("llava15", "single"), ("next", "single0")])
def test_kept_masks(case, prefix):
    model, inputs, expected = our_model(case), inputs_of(case, prefix), golden(case)
    kept, weight, routed, _, new = run(model, inputs)
    is_vision = inputs["input_ids"][0] == image_token(case)
    assert kept.shape == weight.shape == (32, int(is_vision.sum()))
    assert routed.tolist() == [layer >= 8 for layer in range(32)]
    assert kept[:8].all()
    assert len(new) == 0
    for layer in range(8, 32):
        mask = expected[f"{prefix}.mod.{layer}.kept_mask"][0].bool()
        assert kept[layer].tolist() == mask[is_vision].tolist(), f"layer {layer}"
        weights = expected[f"{prefix}.mod.{layer}.router_weight"][0][is_vision]
        torch.testing.assert_close(torch.from_numpy(weight[layer]), weights, atol=1e-4, rtol=0)
