"""The golden checkpoints of the published code, brought into our model for parity tests."""

import json
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from pmod_cli.checkpoints.layouts.shapes import canonical, from_original
from pmod_cli.model import (
    PmodLlavaConfig,
    PmodLlavaForConditionalGeneration,
    PmodLlavaNextConfig,
    PmodLlavaNextForConditionalGeneration,
)

GOLDEN = Path(__file__).parent.parent / "golden"
PLACEHOLDER = -200  # the published code's image token; one stands for all tokens of an image


@cache
def golden(case: str, kind: str = "outputs_sdpa") -> dict[str, Tensor]:
    return load_file(GOLDEN / case / f"{kind}.safetensors")


@cache
def info(case: str) -> dict:
    return json.loads((GOLDEN / case / "info.json").read_text())


def our_model(case: str, *, attention: str = "sdpa", pmod: dict | None = None):
    """Our model with the weights of `tests/golden/<case>/ckpt`; a checkpoint key that finds no place is an error."""
    published = json.loads((GOLDEN / case / "ckpt" / "config.json").read_text())
    config_class, model_class = {
        "llava15": (PmodLlavaConfig, PmodLlavaForConditionalGeneration),
        "next": (PmodLlavaNextConfig, PmodLlavaNextForConditionalGeneration),
    }[case]
    text = {
        key: published[key]
        for key in [
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "num_hidden_layers",
            "num_key_value_heads",
            "rms_norm_eps",
            "rope_theta",
            "vocab_size",
            "max_position_embeddings",
            "hidden_act",
            "bos_token_id",
            "eos_token_id",
            "pad_token_id",
        ]
    }
    anyres = {"image_grid_pinpoints": published["image_grid_pinpoints"]} if case == "next" else {}
    config = config_class(
        text_config={"model_type": "llama", **text},
        vision_config=json.loads((GOLDEN / case / "vision_tower" / "config.json").read_text()),
        image_token_index=image_token(case),
        pmod=pmod or {},
        attn_implementation=attention,
        **anyres,
    )
    model = model_class(config).eval()
    own = model.state_dict()
    renamed = {
        our_name(name): tensor for name, tensor in load_file(GOLDEN / case / "ckpt" / "model.safetensors").items()
    }
    routers = {name for name in renamed if ".router." in name}
    assert set(renamed) - routers == {name for name in own if ".router." not in name}
    model.load_state_dict({name: tensor for name, tensor in renamed.items() if name in own}, strict=False)
    return model


def our_name(name: str) -> str:
    """A parameter's name in our model, from its name in the published checkpoint."""
    on_disk = canonical(from_original(name))
    if on_disk.startswith("language_model.lm_head."):
        return on_disk.removeprefix("language_model.")
    return "model." + on_disk.replace("language_model.model.", "language_model.", 1)


@cache
def image_token(case: str) -> int:
    """An id that no input of the case uses as text."""
    used = {int(i) for name, ids in golden(case, "inputs").items() if name.endswith("input_ids") for i in ids.flatten()}
    return max(set(range(128)) - used)


def expanded(case: str, ids: Tensor, counts: list[int], *, fill: int = 0, others: Tensor | None = None):
    """Replaces each placeholder of `(B, n)` ids by as many image tokens as the image has, right-padded.

    Args:
        counts: Vision tokens of the images, in order.
        fill: Padding value.
        others: Another tensor of the shape of `ids` (mask or labels) to expand alike: 1 or -100 at vision tokens.
    """
    rows, follow, images = [], [], iter(counts)
    for row, ids_row in enumerate(ids.tolist()):
        out, also = [], []
        for column, token in enumerate(ids_row):
            number = next(images) if token == PLACEHOLDER else 1
            out += [image_token(case) if token == PLACEHOLDER else token] * number
            if others is not None:
                value = int(others[row, column])
                also += [value if token != PLACEHOLDER else (1 if fill == 0 else -100)] * number
        rows.append(out)
        follow.append(also)
    width = max(map(len, rows))

    def pad(values: list[list[int]], with_value: int) -> Tensor:
        return torch.tensor([value + [with_value] * (width - len(value)) for value in values])

    return (pad(rows, 0), pad(follow, fill)) if others is not None else pad(rows, 0)
