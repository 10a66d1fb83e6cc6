"""The tensors that a stock config calls for, by name and shape: what a checkpoint is held to before it is written.

A tensor has a name in each of three layouts. Hugging Face names are written as transformers writes them to disk.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pmod_cli.checkpoints.layouts.values import check_values
from pmod_cli.core.errors import PmodError
from pmod_cli.families.configs import MOST_LAYERS, decoder_kind, filled, known_family, tower_kind
from pmod_cli.families.record import DecoderKind, TowerKind

# The original code's names (LLaVA, and p-MoD upon it) on the left; the first match counts, from the top.
_ORIGINAL = (
    ("model.vision_tower.vision_tower.", "vision_tower."),
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("model.image_newline", "image_newline"),
    ("lm_head.", "language_model.lm_head."),
    ("model.", "language_model.model."),
)
# Names that transformers also reads: of the modules themselves, and of files from version 4.52 on.
_VARIANTS = (
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.image_newline", "image_newline"),
    ("model.visual.", "visual."),
    ("model.", "language_model.model."),  # of older Qwen checkpoints
    ("lm_head.", "language_model.lm_head."),
    ("vision_tower.vision_model.", "vision_tower."),
)
_LAYER = re.compile(r"(model\.layers\.\d+\.)(.*)")
# Buffers of old versions, which are computed today.
OBSOLETE = re.compile(r".*(\.rotary_emb\.inv_freq|\.embeddings\.position_ids)")


def canonical(name: str) -> str:
    """A name in the Hugging Face layout, in the one spelling that configs are compared with."""
    for old, new in _VARIANTS:
        if name.startswith(old):
            name = new + name.removeprefix(old)
    return name


def from_original(name: str) -> str:
    """Name in the Hugging Face layout of a tensor of the original or the published layout."""
    for old, new in _ORIGINAL:
        if name.startswith(old):
            renamed = new + name.removeprefix(old)
            return renamed.replace(".decoder_layer.", ".").replace(".router.router.", ".router.")
    return name


def to_original(name: str, routed_layers: list[int]) -> str:
    """Name in the published layout of a tensor of the Hugging Face layout; layers with a router wrap the stock one."""
    name = canonical(name)
    if name.startswith("vision_tower."):
        name = name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    for old, new in _ORIGINAL:
        if name.startswith(new):
            name = old + name.removeprefix(new)
            break
    match = _LAYER.fullmatch(name)
    if match and int(match[1].split(".")[2]) in routed_layers:
        inner = match[2]
        return match[1] + (f"router.{inner}" if inner.startswith("router.") else f"decoder_layer.{inner}")
    return name


EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
_AT_MOST = 10**7


def size(config: Mapping[str, Any], key: str, where: object) -> int:
    """A positive whole number of a config.

    Raises:
        PmodError: it is absent, something else, or larger than any model's.
    """
    value, most = config.get(key), MOST_LAYERS if key == "num_hidden_layers" else _AT_MOST
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise PmodError(f"{where}: {key} is {value!r:.60}, expected a whole number above 0")
    if value > most:
        raise PmodError(f"{where}: {key} is more than {most:,}, which no model has")
    return value


def section(config: Mapping[str, Any], key: str, where: object) -> dict:
    """A part of a config that has to be there and be an object."""
    value = config.get(key)
    if not isinstance(value, dict):
        found = "absent" if value is None else f"a {type(value).__name__}"
        raise PmodError(f"{where}: {key} is {found}, expected the configuration of that part of a LLaVA")
    return value


def decoder_shapes(
    text: Mapping[str, Any], where: object, kind: DecoderKind | None = None
) -> dict[str, tuple[int, ...]]:
    """Names (canonical) and shapes of a decoder with its lm_head; `kind` is the one that `text` names."""
    kind = kind or decoder_kind(text)
    text = filled(text, kind.defaults)
    hidden, inner = size(text, "hidden_size", where), size(text, "intermediate_size", where)
    vocabulary, heads = size(text, "vocab_size", where), size(text, "num_attention_heads", where)
    shared = kind.defaults["num_key_value_heads"] or text["num_key_value_heads"] is not None
    kv_heads = size(text, "num_key_value_heads", where) if shared else heads
    derived = text["head_dim"] is None and kind.defaults["head_dim"] is None
    head = max(hidden // heads, 1) if derived else size(text, "head_dim", where)
    if hidden % heads:
        raise PmodError(f"{where}: hidden_size {hidden} is no multiple of num_attention_heads {heads}")
    if heads % kv_heads:
        raise PmodError(f"{where}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    layer = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (heads * head, hidden),
        "self_attn.k_proj.weight": (kv_heads * head, hidden),
        "self_attn.v_proj.weight": (kv_heads * head, hidden),
        "self_attn.o_proj.weight": (hidden, heads * head),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    for key, projections in kind.biases.items():
        if not key or text.get(key):
            layer |= {f"{name}.bias": layer[f"{name}.weight"][:1] for name in projections}
    layer |= {f"{name}.weight": (head,) for name in kind.head_norms}
    shapes = {
        EMBEDDING: (vocabulary, hidden),
        "language_model.model.norm.weight": (hidden,),
    }
    if not text.get("tie_word_embeddings"):
        shapes[HEAD] = (vocabulary, hidden)
    for number in range(size(text, "num_hidden_layers", where)):
        shapes |= {f"language_model.model.layers.{number}.{name}": shape for name, shape in layer.items()}
    return shapes


def tower_shapes(vision: Mapping[str, Any], where: object, kind: TowerKind | None = None) -> dict[str, tuple[int, ...]]:
    """Names (canonical) and shapes of a vision tower; `kind` is the one that `vision` names."""
    kind = kind or tower_kind(vision)
    vision = filled(vision, kind.defaults)
    hidden, inner, channels, side, patch = (
        size(vision, key, where)
        for key in ("hidden_size", "intermediate_size", "num_channels", "image_size", "patch_size")
    )
    if hidden % (heads := size(vision, "num_attention_heads", where)):
        raise PmodError(f"{where}: hidden_size {hidden} is no multiple of num_attention_heads {heads}")
    layer: dict[str, tuple[int, ...]]
    layer = {f"self_attn.{name}.weight": (hidden, hidden) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    layer |= {"layer_norm1.weight": (hidden,), "layer_norm2.weight": (hidden,)}
    layer |= {"mlp.fc1.weight": (inner, hidden), "mlp.fc2.weight": (hidden, inner)}
    layer |= {name.replace(".weight", ".bias"): shape[:1] for name, shape in layer.items()}
    shapes = {
        "embeddings.patch_embedding.weight": (hidden, channels, patch, patch),
        "embeddings.position_embedding.weight": ((side // patch) ** 2 + kind.class_token, hidden),
    }
    if kind.class_token:
        shapes["embeddings.class_embedding"] = (hidden,)
    if kind.patch_bias:
        shapes["embeddings.patch_embedding.bias"] = (hidden,)
    for norm in kind.norms:
        shapes |= {f"{norm}.weight": (hidden,), f"{norm}.bias": (hidden,)}
    for number in range(size(vision, "num_hidden_layers", where)):
        shapes |= {f"encoder.layers.{number}.{name}": shape for name, shape in layer.items()}
    return {f"vision_tower.{name}": shape for name, shape in shapes.items()}


def tied(config: Mapping[str, Any]) -> bool:
    """Whether lm_head is the embedding table: some configs say it at the top, some of the decoder."""
    return bool(config.get("tie_word_embeddings") or config["text_config"].get("tie_word_embeddings"))


def expected_shapes(config: Mapping[str, Any], where: object) -> dict[str, tuple[int, ...]]:
    """Names (canonical) and shapes of a whole stock model; without the head that some SigLIP towers have."""
    family = known_family(config)
    text, vision = section(config, "text_config", where), section(config, "vision_config", where)
    text = text | {"tie_word_embeddings": tied(config)}
    shapes = decoder_shapes(text, f"{where}: text_config", decoder_kind(text, family))
    if family.tower is not None and family.tower_shapes is not None:
        try:
            tower = family.tower(config)
        except PmodError as error:
            raise PmodError(f"{where}: {error.what}") from error
        return shapes | {f"visual.{name}": shape for name, shape in family.tower_shapes(tower).items()}
    shapes |= tower_shapes(vision, f"{where}: vision_config", tower_kind(vision, family))
    hidden = shapes["language_model.model.norm.weight"][0]
    features = config.get("vision_feature_layer", family.defaults["vision_feature_layer"])
    joined = len(features) if isinstance(features, list) else 1
    width = joined * shapes["vision_tower.embeddings.position_embedding.weight"][1]
    shapes |= {
        "multi_modal_projector.linear_1.weight": (hidden, width),
        "multi_modal_projector.linear_2.weight": (hidden, hidden),
    }
    if config.get("multimodal_projector_bias", family.defaults["multimodal_projector_bias"]):
        shapes |= {f"multi_modal_projector.linear_{n}.bias": (hidden,) for n in (1, 2)}
    return shapes | family.more_shapes(hidden, width)


def checked_shapes(config: Mapping[str, Any], where: object) -> dict[str, tuple[int, ...]]:
    """`expected_shapes` of a config whose values have been looked at, each for itself and side by side.

    Raises:
        PmodError: a value that cannot be.
    """
    section(config, "text_config", where), section(config, "vision_config", where)
    check_values(config, where)
    expected = expected_shapes(config, where)
    image, rows = config.get("image_token_index", config.get("image_token_id")), expected[EMBEDDING][0]
    if image is not None and not 0 <= image < rows:
        raise PmodError(f"{where}: image_token_index {image} is no row of an embedding of {rows} rows")
    return expected


def check_shapes(found: Mapping[str, Any], config: Mapping[str, Any], where: object) -> None:
    """Hold tensors to a stock config; routers are none of its business.

    Args:
        found: What has `file`, `dtype` and `shape`, by name in the Hugging Face layout.
        config: Stock config in that layout.
        where: Its file, for messages.

    Raises:
        PmodError: a tensor is absent, has another shape, is no floating-point number, or belongs to no such model.
    """
    by_name = {canonical(name): tensor for name, tensor in found.items()}
    expected = checked_shapes(config, where)
    # A tied model may bring its head all the same.
    for name, shape in {HEAD: expected[EMBEDDING], **expected}.items():
        if name not in by_name:
            continue
        tensor = by_name[name]
        if tuple(tensor.shape) != shape:
            raise PmodError(f"{tensor.file}: {name} has shape {list(tensor.shape)}, expected {list(shape)} by {where}")
        if tensor.dtype not in ("F32", "BF16", "F16"):
            raise PmodError(
                f"{tensor.file}: {name} is {tensor.dtype}, expected F32, BF16 or F16",
                hint="quantised weights cannot be converted: take the model as it was before",
            )
    if missing := [name for name in expected if name not in by_name]:
        raise PmodError(f"{where} calls for {len(missing)} tensors that are absent: {', '.join(missing[:5])}")
    ours = ("language_model.", "multi_modal_projector.", "vision_tower.", "visual.")
    extra = [
        name
        for name in by_name
        if name not in expected
        and name.startswith(ours)
        and ".router." not in name
        and not name.startswith("vision_tower.head.")  # of a SigLIP
        and name != HEAD  # of a tied model
        and not OBSOLETE.fullmatch(name)
    ]
    if extra:
        raise PmodError(f"{where} knows nothing of {len(extra)} tensors that are there: {', '.join(sorted(extra)[:5])}")
