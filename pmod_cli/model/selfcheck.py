"""What a transformers that is newer than any tested one has to show before a checkpoint is loaded.

On small random models: at ratio 1 the p-MoD model equals the stock one (logits, hidden states, generated tokens), and
at ratio 0.5 a cached step equals the same step without a cache. Costs a second, once per class and process.
"""

import logging
from collections.abc import Iterable
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .cache import CACHE_NAME
from .versions import NEWEST, RELEASE, UnsupportedTransformers

_IMAGE_TOKEN, _VOCABULARY, _TILE, _PATCH = 9, 64, 8, 2  # 16 vision tokens a tile
_checked: set[type] = set()


def check_release(ours: type[PreTrainedModel], decoders: Iterable[type]) -> None:
    """Under an untested newer release: one warning, and the check of one class. Under a tested one: nothing.

    Args:
        ours: p-MoD model with a language-model head.
        decoders: Stock text models that it can have.

    Raises:
        UnsupportedTransformers: The small model computes something else, or does not run.
    """
    if RELEASE <= NEWEST or ours in _checked:
        return
    if not _checked:
        found, newest = (".".join(map(str, release)) for release in (RELEASE, NEWEST))
        logging.getLogger(__name__).warning(
            f"transformers {found} is newer than {newest}, the newest that p-MoD is tested with: checking a small model"
        )
    _checked.add(ours)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
            for decoder in decoders:
                _check(ours, decoder)
    except UnsupportedTransformers:
        _checked.discard(ours)
        raise
    except Exception as error:
        _checked.discard(ours)
        raise UnsupportedTransformers(f"does not run a p-MoD model ({type(error).__name__}: {error})") from error


def _check(ours: type[PreTrainedModel], decoder: type) -> None:
    family = ours.family
    plain = _fill(_small(ours.stock_class, decoder, family))
    whole = _small(ours, decoder, family, pmod={"schedule": "constant", "mean": 1.0, "max_ratio": 1.5})
    _require(
        not whole.load_state_dict(plain.state_dict(), strict=False).unexpected_keys, "names weights in another way"
    )
    inputs = _inputs(plain, family)
    outputs = [model(**inputs, output_hidden_states=True, use_cache=True) for model in (plain, whole)]
    _require(torch.equal(*(output.logits for output in outputs)), "gives other logits at ratio 1")
    states = [output.hidden_states or () for output in outputs]
    _require(len(states[0]) == len(states[1]) > 0, "does not collect hidden states")
    _require(all(torch.equal(*pair) for pair in zip(*states, strict=True)), "gives other hidden states at ratio 1")
    words = [model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False) for model in (plain, whole)]
    _require(torch.equal(*words), "generates other tokens at ratio 1")

    routed = _fill(_small(ours, decoder, family, pmod={"schedule": "constant", "mean": 0.5}))
    first = routed(**inputs, use_cache=True)
    step = torch.tensor([[3]])
    cached = routed(input_ids=step, **{CACHE_NAME: first[CACHE_NAME]}).logits[:, -1]
    longer = {**inputs, "input_ids": torch.cat([inputs["input_ids"], step], dim=1)}
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    longer |= _types(plain, longer["input_ids"])
    again = routed(**longer, use_cache=False).logits[:, -1]
    _require(torch.allclose(cached, again, rtol=1e-3, atol=1e-4), "caches routed layers in another way")
    vision = int((inputs["input_ids"] == _IMAGE_TOKEN).sum())
    held = [layer.keys.shape[-2] for layer in first[CACHE_NAME].layers]
    expected = longer["input_ids"].shape[1] - vision + (vision + 1) // 2
    _require(held == [expected] * len(held), f"holds {held} slots, not {expected}, in routed layers")


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise UnsupportedTransformers(f"{otherwise}, so routing on it cannot be trusted")


def _small(cls: Any, decoder: Any, family: Any, **extra: Any) -> PreTrainedModel:
    """Two decoder layers of width 16."""
    sizes = {"hidden_size": 16, "intermediate_size": 32}
    text: dict[str, Any] = {
        **sizes,
        "vocab_size": _VOCABULARY,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if hasattr(decoder.config_class, "sliding_window"):
        text["sliding_window"] = None
    vision = sizes | {"patch_size": _PATCH}
    small = dict(family.small_config)
    own = small.pop("vision_config", {"model_type": "clip_vision_model", "projection_dim": 16})
    if family.tiled:
        vision |= {"image_size": _TILE, "num_hidden_layers": 2, "num_attention_heads": 2}
        small = {"image_token_index": _IMAGE_TOKEN, "image_seq_length": (_TILE // _PATCH) ** 2, **small}
    config = cls.config_class(
        text_config=decoder.config_class(**text | small.pop("text_config", {})).to_dict(),
        vision_config=vision | own,
        tie_word_embeddings=False,
        **small,
        **extra,
    )
    return cls(config).float().eval()


def _fill(model: PreTrainedModel) -> PreTrainedModel:
    """Weights so large that every layer changes the logits; routers too."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
        else:
            parameter.copy_(0.1 * noise + (1.0 if name.endswith("norm.weight") else 0.0))
    return model


def _inputs(model: PreTrainedModel, family: Any) -> dict[str, Tensor]:
    """A prompt of text, one image and text."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(family.small_pixels, generator=generator)
    sizes = {name: torch.tensor(value) for name, value in family.small_inputs.items()}
    features = model.get_image_features(pixel_values=pixels, **sizes, return_dict=True).pooler_output
    ids = torch.tensor([[1, 5, *[_IMAGE_TOKEN] * len(features[0]), 6, 7, 8]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, **sizes} | _types(
        model, ids
    )


def _types(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """Which tokens are an image's, for models that make positions of it."""
    if "mm_token_type_ids" not in signature(model.forward).parameters:
        return {}
    return {"mm_token_type_ids": (ids == _IMAGE_TOKEN).int()}
